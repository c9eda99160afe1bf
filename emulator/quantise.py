"""The stand-in's matrices in NF4."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from farfield.kernels import nf4

from .assemble import inner_linears, rebuilt, skeleton
from .layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def quantised(emulator: PreTrainedModel, layout: Layout) -> tuple[PreTrainedModel, Layout]:
    """The emulator with every matrix of its stand-in in 4 bits, factors included, and the layout that says so."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for linear in inner_linears(emulator, layout):
        module: Any = emulator.get_submodule(linear.path)
        packed, scales = nf4.quantize(module.weight.T if linear.transposed else module.weight)
        parts[linear.path] = {"packed": packed, "scales": scales}
    layout = replace(layout, quantization="nf4")
    return rebuilt(emulator, layout, parts), layout


def dequantised(emulator: PreTrainedModel, layout: Layout) -> tuple[PreTrainedModel, Layout]:
    """The emulator with the matrices of its stand-in as 4 bits have left them, so that they can be trained."""
    bare = replace(layout, quantization="none")
    model = skeleton(emulator.config, bare, type(emulator), None)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for linear in inner_linears(model, bare):
        module: Any = emulator.get_submodule(linear.path)
        rows, columns = linear.out_features, linear.in_features
        weight = nf4.dequantize(module.packed, module.scales, rows, columns, emulator.dtype)
        parts[linear.path] = {"weight": weight.T.contiguous() if linear.transposed else weight}
    return rebuilt(emulator, bare, parts), bare
