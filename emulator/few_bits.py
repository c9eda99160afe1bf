"""A backbone whose blocks hold their matrices in 4 or 8 bits.

Rounded are the linear layers of the blocks: never embeddings, norms, biases, the head, nor what chooses among experts;
and not experts whose matrices are kept as one tensor, since they are no layers. All is rounded on the CPU: the formats
are defined by arithmetic that is the same on every processor, so every machine has the same bits from the same folder.

`bitsandbytes` does the rounding. The layers that multiply are Farfield's own, on the same bits: those of bitsandbytes
0.50 for CPUs take wrong scales where rows are no multiple of 64, with AVX512-BF16 a layer that has been evaluated has
no gradient any more, and its 8 bits also round what is multiplied, in evaluation only.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from farfield.protocols.sections import Quantization

from .architecture import Linear, describe
from .layers import Int8Linear, Nf4Linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYERS: Final[dict[Quantization, type[Nf4Linear] | type[Int8Linear]]] = {"nf4": Nf4Linear, "int8": Int8Linear}

_ROUTER = re.compile(r"\.(router|gate|shared_expert_gate)(\.|$)")
"""What chooses among experts, by the names that implementations give it: a small error there changes who answers."""


@torch.no_grad()
def shrink(model: PreTrainedModel, quantization: Quantization, dtype: torch.dtype) -> None:
    """Round the blocks of a model that was read in the format of its files, and bring all else to `dtype`.

    As long as its files are in one format, such a model has no memory of its own: its tensors are the files, mapped.
    Each is let go of when what stands for it is there, so that the whole is never in memory twice, or in `dtype`.
    """
    round_layers(model, quantization, dtype=dtype)
    exact = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in model.named_parameters():
        wanted = parameter.dtype if set(name.split(".")) & set(exact) else dtype
        if parameter.is_floating_point():
            # A copy, without which one small tensor would keep all of a file mapped.
            parameter.data = parameter.data.to(wanted, copy=True)
    model.config.dtype = dtype


@torch.no_grad()
def round_layers(
    model: PreTrainedModel,
    quantization: Quantization,
    blocks: Collection[int] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Put rounded layers in the place of the plain ones of these blocks; None is all of them.

    Args:
        dtype: what weights are converted to before they are rounded; None is their own.
    """
    for linear in rounded(model, blocks):
        module = model.get_submodule(linear.path)
        layer = _rounded(module, linear, quantization, dtype)
        layer.bias = getattr(module, "bias", None)  # type: ignore[assignment]
        model.set_submodule(linear.path, layer, strict=True)


@torch.no_grad()
def round_values(model: PreTrainedModel, quantization: Quantization, blocks: Collection[int] | None = None) -> None:
    """Give the plain layers of these blocks the values that rounded ones stand for."""
    for linear in rounded(model, blocks):
        module: Any = model.get_submodule(linear.path)
        matrix = _rounded(module, linear, quantization).weight
        module.weight.copy_(matrix.T if linear.transposed else matrix)


def rounded(model: PreTrainedModel, blocks: Collection[int] | None = None) -> tuple[Linear, ...]:
    """The layers of these blocks that are rounded."""
    return tuple(one for one in describe(model).within(blocks).linears if not _ROUTER.search(one.path))


def _rounded(
    module: nn.Module, linear: Linear, quantization: Quantization, dtype: torch.dtype | None = None
) -> Nf4Linear | Int8Linear:
    weight: Any = module.weight
    layer = LAYERS[quantization](linear.in_features, linear.out_features, bias=False)
    layer.dtype = dtype or weight.dtype
    # The graphics processor's own way to round differs in the last bit.
    layer.hold((weight.T if linear.transposed else weight).cpu().to(layer.dtype))
    return layer.to(weight.device)
