"""Which of a backbone's own numbers an emulator of it holds, found by comparing them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from farfield.kernels import nf4

from .architecture import Linear, describe
from .assemble import tensors
from .layers import LowRankLinear, Nf4Linear
from .layout import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Share:
    """What of some part of the backbone is in the emulator.

    Attributes:
        parameters, bytes: how many the part has, and what they take in the number format of the Plan.
        unchanged: how many of them are in tensors that the emulator holds to the last bit, wherever it has them.
        rounded: how many are there rounded to 4 bits, and not otherwise changed.
    """

    parameters: int
    bytes: int
    unchanged: int
    rounded: int

    @property
    def given(self) -> float:
        """The share of the parameters that whoever has the emulator has, as they are or in 4 bits."""
        return (self.unchanged + self.rounded) / self.parameters if self.parameters else 0.0

    def document(self) -> dict[str, float]:
        """JSON-ready values, with what `unchanged` takes in bytes."""
        return asdict(self) | {"given": self.given, "unchanged_bytes": self._bytes(self.unchanged)}

    def _bytes(self, parameters: int) -> int:
        return round(self.bytes * parameters / self.parameters) if self.parameters else 0


@dataclass(frozen=True, slots=True)
class Disclosure:
    """What of the backbone is in the emulator.

    Attributes:
        whole: of all of it; the others are its parts.
        around: embeddings, final norm and head.
        outer: the blocks that are tuned.
        middle: the blocks that are stood for.
        blocks: share of the middle's blocks that the stand-in was made from.
        error: ‖W − W'‖ / ‖W‖ over all matrices W of the middle's blocks that the stand-in was made from, where W' is
            what it has of them: rounded to 4 bits (some 0.1), multiplied out from factors, or moved by distillation.
    """

    whole: Share
    around: Share
    outer: Share
    middle: Share
    blocks: float
    error: float

    def document(self) -> dict[str, Any]:
        parts = ("whole", "around", "outer", "middle")
        return {part: getattr(self, part).document() for part in parts} | {"blocks": self.blocks, "error": self.error}


@torch.no_grad()
def disclosed(model: PreTrainedModel, emulator: PreTrainedModel, layout: Layout) -> Disclosure:
    """Compare an emulator with its backbone; both are in the same number format."""
    held = {_digest(tensor) for tensor in tensors(emulator).values()}
    rounded = {f"{linear.path}.weight" for linear in _rounded(model, emulator, layout)}
    path, middle = describe(model).blocks_path, set(layout.split.middle)
    counts: dict[str, list[int]] = {part: [0, 0, 0, 0] for part in ("around", "outer", "middle")}
    for name, tensor in tensors(model).items():
        inside = name.startswith(f"{path}.")
        number = int(name.removeprefix(f"{path}.").partition(".")[0]) if inside else None
        count = counts["around" if number is None else "middle" if number in middle else "outer"]
        count[0] += tensor.numel()
        count[1] += tensor.nbytes
        if _digest(tensor) in held:
            count[2] += tensor.numel()
        elif name in rounded:
            count[3] += tensor.numel()
    shares = {part: Share(*count) for part, count in counts.items()}
    return Disclosure(
        whole=Share(*(sum(column) for column in zip(*counts.values(), strict=True))),
        blocks=len(set(layout.middle)) / len(layout.split.middle),
        error=_error(model, emulator, layout),
        **shares,
    )


def _digest(tensor: torch.Tensor) -> bytes:
    kind = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(kind + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data).digest()


def _rounded(model: PreTrainedModel, emulator: PreTrainedModel, layout: Layout) -> Iterable[Linear]:
    """The backbone's matrices whose own 4 bits are in the stand-in."""
    for linear, weight, module in _pairs(model, emulator, layout):
        if isinstance(module, Nf4Linear):
            packed, scales = nf4.quantize(weight)
            if torch.equal(packed, module.packed) and torch.equal(scales, module.scales):
                yield linear


def _error(model: PreTrainedModel, emulator: PreTrainedModel, layout: Layout) -> float:
    wrong = total = 0.0
    for _, weight, module in _pairs(model, emulator, layout):
        wrong += float((weight.float() - _matrix(module)).square().sum())
        total += float(weight.float().square().sum())
    return math.sqrt(wrong / total) if total else 0.0


def _pairs(
    model: PreTrainedModel, emulator: PreTrainedModel, layout: Layout
) -> Iterable[tuple[Linear, torch.Tensor, nn.Module]]:
    """The linear layers of the middle that the stand-in has: layer, matrix [out, in], and what stands for it."""
    path = describe(model).blocks_path
    for linear in describe(model).within(set(layout.middle)).linears:
        number, _, within = linear.path.removeprefix(f"{path}.").partition(".")
        module: Any = model.get_submodule(linear.path)
        weight = module.weight.T.contiguous() if linear.transposed else module.weight
        yield linear, weight, emulator.get_submodule(f"{path}.{layout.origins.index(int(number))}.{within}")


def _matrix(module: Any) -> torch.Tensor:
    """The matrix float32[out, in] by which a layer of the stand-in multiplies."""
    if isinstance(module, LowRankLinear):
        return _matrix(module.up) @ _matrix(module.down)
    if isinstance(module, Nf4Linear):
        rows, columns = module.out_features, module.in_features
        return nf4.dequantize(module.packed, module.scales, rows, columns, torch.float32)
    weight: torch.Tensor = module.weight
    return (weight.T if hasattr(module, "nf") else weight).float()
