"""Ladder side-tuning: a narrow network beside the blocks, so that nothing is computed backwards through them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from farfield.protocols.errors import TuningError
from farfield.protocols.sections import PositiveInt

from .method import Setting, Tuned, TuningMethod, register
from .own import frozen, like, unmergeable, write
from .sharing import Sharing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from farfield.emulator.architecture import Architecture


@register
class Lst(TuningMethod):
    """A side network of width d/reduction reads the streams hᵢ behind the blocks, without gradient (Sung et al. 2022).

    z = μᵢ·Dᵢ·hᵢ + (1 − μᵢ)·s with the learned gate μᵢ = sigmoid(αᵢ) (section 3.1), s ← z + Bᵢ·gelu(Aᵢ·norm(z)), and in
    the end h_L + U·s goes to the final norm and the head. U is zero at first, so the model begins as it is.

    Aᵢ and Bᵢ are cut out of the two matrices of block i's own feed-forward network (section 3.2): the d/reduction
    positions of the stream that carry most weight (the sum of magnitudes in these matrices over all blocks, the same
    positions for all), and of the hidden features as large a share, those whose row and column weigh most. Dᵢ picks the
    positions at first.

    The paper's side blocks are whole transformer blocks; ours have no attention. Tokens are mixed by the backbone, at
    full width, and the side network works on each position by itself. So it is as causal as its backbone, needs no
    mask, no positions and no cache of keys, and is the same for every family, encoders and images too.

    It stands beside the backbone, so nothing can be folded into the weights; it multiplies what it trains, so the mean
    is not exact.

    Attributes:
        reduction: how many times narrower than the backbone the side network is.
        every: a side block for every so many blocks, counted back from the last (section 3.2, layer dropping).
    """

    kind: Literal["lst"] = "lst"
    reduction: Annotated[int, Field(ge=2)] = 8
    every: PositiveInt = 1

    @property
    def merges(self) -> bool:
        return False

    @property
    def by_block(self) -> bool:
        return False

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=False)

    def install(self, model: PreTrainedModel, setting: Setting) -> Tuned:
        import torch

        from farfield.emulator.ladder import Ladder, Rung

        architecture = frozen(model, setting)
        narrow = architecture.hidden_size // self.reduction
        if not narrow:
            raise TuningError(
                f"the stream is {architecture.hidden_size} wide, too narrow to be reduced {self.reduction} times",
                where="tuning.reduction",
            )
        blocks = len(architecture.blocks)
        # One block's matrices at a time: in float32 all of them are more than the model.
        weights = torch.stack([entry.abs().sum(0) + exit_.abs().sum(1) for entry, exit_ in _pairs(model, architecture)])
        positions = _heaviest(weights.sum(0), narrow)
        rungs = []
        for block, pair in enumerate(_pairs(model, architecture)):
            if (blocks - 1 - block) % self.every:
                continue
            entry, exit_ = pair[0][:, positions], pair[1][positions]
            inner = _heaviest(entry.abs().sum(1) + exit_.abs().sum(0), max(1, len(entry) // self.reduction))
            rungs.append(Rung(block, entry[inner], exit_[:, inner]))
        ladder = Ladder(architecture.hidden_size, positions, rungs)
        ladder.lean(architecture.blocks)
        model.add_module("ladder", like(ladder, model, f"{architecture.blocks_path}.{blocks - 1}"))
        return Tuned(model)

    def merge(self, tuned: Tuned) -> PreTrainedModel:
        raise unmergeable(self.kind, "the side network stands beside them")

    def save(self, tuned: Tuned, folder: Path) -> None:
        """In the format of `farfield.emulator.methods.own`."""
        write(self, tuned, folder)


def _pairs(model: PreTrainedModel, architecture: Architecture) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The two matrices of each block's feed-forward network, [inner, hidden] and [hidden, inner], float32 on the CPU.

    Raises:
        TuningError: a block has no feed-forward network.
    """
    from peft.utils.integrations import dequantize_module_weight

    by_path = {linear.path: linear for linear in architecture.linears}

    def matrix(path: str) -> torch.Tensor:
        weight = dequantize_module_weight(model.get_submodule(path)).detach().float()
        if not weight.is_meta:  # as it is where only shapes are asked about
            weight = weight.cpu()
        return weight.T if by_path[path].transposed else weight

    for one in architecture.sublayers():
        if one.part == "feedforward":
            exit_ = matrix(one.exit)
            # Of a gate that is fused with what it gates, the second half is what it gates.
            yield matrix(one.entry)[-exit_.shape[1] :], exit_


def _heaviest(weights: torch.Tensor, count: int) -> torch.Tensor:
    """The places of the `count` largest, in ascending order; of equals the first."""
    import torch

    chosen: torch.Tensor = torch.sort(weights, descending=True, stable=True).indices[:count].sort().values
    return chosen
