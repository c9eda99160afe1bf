"""Fed-SB: a small trained matrix between two frozen ones, so that the mean is exact and little travels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from farfield.protocols.errors import TuningError
from farfield.protocols.seeds import derive

from .lora import Lora
from .method import Setting, Tuned, TuningMethod, register
from .peft_method import Dropout, Rank, Targets
from .sharing import Sharing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@register
class FedSb(TuningMethod):
    """W + B·R·A, where only R ∈ ℝ^(r×r), zero at first, is trained (Singhal et al. 2025, section 3; s is 1).

    The change is linear in R, so the mean of the clients' R makes the mean of their changes. What travels is r² values
    a layer, whatever its widths.

    The paper takes A ∈ ℝ^(r×k) and B ∈ ℝ^(d×r) from the first gradient of full fine-tuning (LoRA-SB, Ponkshe et al.
    2024, section 3), which a coordinator without data does not have. Here they span where W itself does most, as in
    LoRA-XS (Bałazy et al. 2024), with orthonormal rows and columns, as LoRA-SB's step wants them. Every machine
    computes them for itself; docs/tuning-methods.md compares them with random ones.

    It is built on `peft`'s LoRA with R·x before B, and saved as an ordinary LoRA whose B is B·R.

    Attributes:
        rank: r; no more than the smaller width of any target. r² values of a layer are trained where LoRA trains
            r·(d + k), so it can be far larger than LoRA's.
        dropout: probability with which values of the input of A are dropped in training.
        targets: `all-linear`, or names of linear layers.
    """

    kind: Literal["fed-sb"] = "fed-sb"
    rank: Rank = 64
    dropout: Dropout = 0.0
    targets: Targets = "all-linear"

    @property
    def by_example(self) -> bool:
        return True

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=True)

    def install(self, model: PreTrainedModel, setting: Setting) -> Tuned:
        tuned = self._lora().install(model, setting)
        for path, layer in _layers(tuned.model):
            self._rebuild(path, layer, derive(setting.seed, "fed-sb", setting.named(path)))
        return tuned

    def merge(self, tuned: Tuned) -> PreTrainedModel:
        with _folded(tuned.model):
            return self._lora().merge(tuned)

    def save(self, tuned: Tuned, folder: Path) -> None:
        with _folded(tuned.model):
            self._lora().save(tuned, folder)

    def _lora(self) -> Lora:
        return Lora(rank=self.rank, alpha=self.rank, dropout=self.dropout, targets=self.targets, freeze_a=True)

    def _rebuild(self, path: str, layer: Any, seed: int) -> None:
        """Give the LoRA layer orthonormal A and B, and R between them."""
        import torch
        from peft.utils.integrations import dequantize_module_weight

        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if self.rank > min(a.shape[1], b.shape[0]):
            raise TuningError(
                f"this layer maps {a.shape[1]} features to {b.shape[0]}, which cannot hold rank {self.rank}",
                where=path.removeprefix("base_model.model."),
                hint="Lower tuning.rank, or leave the layer out of tuning.targets.",
            )
        weight = dequantize_module_weight(layer.get_base_layer()).detach()
        rows, columns = _subspaces(weight.T if layer.fan_in_fan_out else weight, self.rank, seed)
        a.data = rows.T.contiguous().to(a)
        basis = _linear(columns.to(b))
        core = _linear(b.new_zeros(self.rank, self.rank)).requires_grad_(True)
        layer.lora_variant.clear()  # which takes B to be a single matrix
        layer.lora_B["default"] = torch.nn.Sequential(OrderedDict(core=core, basis=basis))


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    """A frozen layer with this weight, for which nothing is drawn."""
    import torch

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def _subspaces(weight: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases, (k, rank) and (d, rank), of what `weight` (d, k) takes in and puts out most.

    Two steps of subspace iteration from a random start (Halko et al. 2011, algorithm 4.4): far cheaper than singular
    vectors, and as good here. Processors differ in the last bits of what they compute in float64; the result
    is rounded to bfloat16, so that it is the same on all of them.
    """
    import torch

    weight = weight.double()
    start = torch.randn(weight.shape[1], rank, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    columns = _orthonormal(weight @ start.to(weight.device))
    for _ in range(2):
        rows = _orthonormal(weight.T @ columns)
        columns = _orthonormal(weight @ rows)
    return rows.bfloat16().contiguous(), columns.bfloat16().contiguous()


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """The one orthonormal basis of its columns whose triangular factor has a positive diagonal."""
    import torch

    basis, upper = torch.linalg.qr(matrix)
    unique: torch.Tensor = basis * torch.where(upper.diagonal() < 0, -1.0, 1.0)
    return unique


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


@contextmanager
def _folded(model: torch.nn.Module) -> Iterator[None]:
    """Within it every layer is one of plain LoRA, with B·R for its B."""
    chains = [(layer, layer.lora_B["default"]) for _, layer in _layers(model)]
    for layer, (core, basis) in chains:
        product = (basis.weight.float() @ core.weight.float()).detach()
        layer.lora_B["default"] = _linear(product.to(core.weight.dtype))
    try:
        yield
    finally:
        for layer, chain in chains:
            layer.lora_B["default"] = chain
