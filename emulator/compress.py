"""Which blocks of the middle remain: one strategy a function, all with the same arguments.

Each takes the backbone, its split, how many blocks are to remain, and a few batches of public text. It answers with the
block that each place of the stand-in is made from, in the order in which they run. `SELECTIONS` has them by the name
that a Plan uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Final, TypeAlias

import torch

from farfield.protocols.errors import EmulatorError

from .architecture import describe
from .assemble import assemble
from .layout import Layout
from .objective import loss
from .split import Split
from .streams import Batch, all_after, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Selection: TypeAlias = "Callable[[PreTrainedModel, Split, int, Sequence[Batch]], tuple[int, ...]]"


def uniform(model: PreTrainedModel, split: Split, keep: int, batches: Sequence[Batch]) -> tuple[int, ...]:
    """Blocks at equal distances, the first and the last among them (Xiao et al. 2023, section 3.3)."""
    depth = len(split.middle)
    if keep == 1:
        return (split.middle[depth // 2],)
    return tuple(split.middle[round(number * (depth - 1) / (keep - 1))] for number in range(keep))


def in_turn(split: Split, keep: int, turn: int, turns: int) -> tuple[int, ...]:
    """Blocks at equal distances, in each turn others: the middle in `keep` parts, of each part another place.

    Raises:
        EmulatorError: there are more turns than places.
    """
    depth = len(split.middle)
    if turns * keep > depth:
        raise EmulatorError(
            f"emulator.turns = {turns} stand-ins of {keep} blocks each, and the middle has {depth}",
            hint="Lower emulator.turns or emulator.blocks.",
        )
    return tuple(split.middle[int((place + (turn + 0.5) / turns) * depth / keep)] for place in range(keep))


def clusters(model: PreTrainedModel, split: Split, keep: int, batches: Sequence[Batch]) -> tuple[int, ...]:
    """One block of each cluster of neighbours that do alike, in the place of all of them (CRaSh, Zhang et al. 2023).

    Likeness is the linear CKA (Kornblith et al. 2019, eq. 4) of the streams after two blocks. The two neighbouring
    clusters whose centres are most alike become one, until `keep` are left. The depth stays what it was.
    """
    alike = _likeness(model, split, batches)
    groups = [[number] for number in range(len(split.middle))]
    while len(groups) > keep:
        closest = max(range(len(groups) - 1), key=lambda i: float(alike[_centre(groups[i]), _centre(groups[i + 1])]))
        groups[closest : closest + 2] = [groups[closest] + groups[closest + 1]]
    return tuple(split.middle[_centre(group)] for group in groups for _ in group)


def influence(model: PreTrainedModel, split: Split, keep: int, batches: Sequence[Batch]) -> tuple[int, ...]:
    """The blocks that turn the stream most: 1 − E cos(x, y) of what goes in and comes out (Men et al. 2024, eq. 1)."""
    blocks = describe(model).blocks
    moved = torch.zeros(len(split.middle))
    for batch in batches:
        streams = [tokens(one, batch) for one in all_after(model, tuple(blocks[i] for i in split.middle), batch)]
        for place, (before, behind) in enumerate(pairwise(streams)):
            moved[place] += float((1 - torch.cosine_similarity(before, behind, dim=-1)).mean())
    return _largest(moved, split, keep)


def gradient(model: PreTrainedModel, split: Split, keep: int, batches: Sequence[Batch]) -> tuple[int, ...]:
    """The blocks without which the gradient of the tuned blocks turns most.

    Offsite tuning works as far as the gradients that the emulator gives are those of the backbone (GradOT, Zhang et al.
    2025). Each block is left out by itself, and 1 − cos of the two gradients on public text is its weight.
    """
    whole = tuned_gradient(model, split.outer, batches)
    turned = torch.zeros(len(split.middle))
    for place, number in enumerate(split.middle):
        layout = Layout(split, tuple(one for one in split.middle if one != number))
        without = tuned_gradient(assemble(model, layout), layout.outer, batches)
        turned[place] = 1 - torch.cosine_similarity(whole, without, dim=0)
    return _largest(turned, split, keep)


SELECTIONS: Final[Mapping[str, Selection]] = {
    "uniform": uniform,
    "clusters": clusters,
    "influence": influence,
    "gradient": gradient,
}


def _largest(weights: torch.Tensor, split: Split, keep: int) -> tuple[int, ...]:
    return tuple(split.middle[place] for place in sorted(weights.topk(keep).indices.tolist()))


def _centre(group: Sequence[int]) -> int:
    return group[len(group) // 2]


def _likeness(model: PreTrainedModel, split: Split, batches: Sequence[Batch]) -> torch.Tensor:
    """Linear CKA of the streams after each two blocks of the middle, [middle, middle]."""
    blocks = describe(model).blocks
    seen: list[list[torch.Tensor]] = [[] for _ in split.middle]
    for batch in batches:
        for place, one in enumerate(all_after(model, tuple(blocks[i] for i in split.middle), batch)[1:]):
            seen[place].append(tokens(one, batch))
    centred = [torch.cat(parts) for parts in seen]
    centred = [one - one.mean(dim=0) for one in centred]
    result = torch.zeros(len(centred), len(centred))
    for i, first in enumerate(centred):
        for j, second in enumerate(centred[i:], i):
            common = (second.T @ first).square().sum()
            result[i, j] = result[j, i] = common / ((first.T @ first).norm() * (second.T @ second).norm())
    return result


def tuned_gradient(model: PreTrainedModel, numbers: Sequence[int], batches: Sequence[Batch]) -> torch.Tensor:
    """The gradient of the loss by all weights of the tuned blocks, those with these numbers, as one vector."""
    blocks = describe(model).blocks
    parameters = [parameter for number in numbers for parameter in blocks[number].parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        total = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
        for batch in batches:  # one at a time: what backward needs of each is most of the memory
            gradients = torch.autograd.grad(loss(model, batch), parameters, materialize_grads=True)
            for whole, part in zip(total, gradients, strict=True):
                whole += part
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return torch.cat([one.reshape(-1) for one in total]) / len(batches)
