"""Which blocks of a backbone are tuned, and which are stood in for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from farfield.protocols.errors import EmulatorError


@dataclass(frozen=True, slots=True)
class Split:
    """A stack of `depth` blocks: the `first` and the `last` ones are tuned, the middle stays with its owner."""

    depth: int
    first: int
    last: int

    @property
    def middle(self) -> range:
        return range(self.first, self.depth - self.last)

    @property
    def outer(self) -> tuple[int, ...]:
        return (*range(self.first), *range(self.depth - self.last, self.depth))


def split(depth: int, ends: tuple[int, int], where: object = "") -> Split:
    """The split of `depth` blocks with so many at both ends (l and r of Xiao et al. 2023).

    Raises:
        EmulatorError: nothing would be left between them.
    """
    first, last = ends
    if first + last >= depth:
        raise EmulatorError(
            f"delivery.first = {first} and delivery.last = {last} leave nothing between them in {depth} blocks",
            where=where,
            hint=f"Together they may be at most {depth - 1}.",
        )
    return Split(depth, first, last)


def renumbered(name: str, blocks_path: str, numbers: Sequence[int]) -> str:
    """The parameter's name with block i called `numbers[i]`; the same where it is in no block.

    An adapter has one set of names, those of the backbone, whatever stands between the blocks that it belongs to.

    Args:
        name: a name in the model, or in what `peft` has made of it.
        blocks_path: where the model has its blocks.
    """
    return re.sub(
        rf"(?<![^.]){re.escape(blocks_path)}\.(\d+)(?![^.])",
        lambda found: f"{blocks_path}.{numbers[int(found[1])]}",
        name,
        count=1,
    )
