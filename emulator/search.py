"""What an emulator can be made of, what that comes to, and the best of it under a budget of bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from farfield.kernels import nf4
from farfield.protocols.durable import write
from farfield.protocols.errors import EmulatorError
from farfield.protocols.sections import Emulator

from .architecture import describe
from .assemble import assemble, tensors
from .compress import SELECTIONS, in_turn, tuned_gradient
from .factorise import factorised, rank_of
from .layout import Layout
from .objective import mean_loss, predicts_tokens
from .quantise import quantised
from .split import Split
from .streams import Batch, entering, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARES: Final = (0.75, 0.5, 0.25)
"""Shares of low-rank factors that a search tries."""


@dataclass(frozen=True, slots=True)
class Choice:
    """How the middle is compressed, with nothing left open; the keys of the Plan's `[emulator]`."""

    select: str
    blocks: int
    low_rank: float | None = None
    quantization: Literal["none", "nf4"] = "none"

    def disclosed(self, depth: int) -> float:
        """The share of the middle's `depth` blocks whose matrices are there as they were, or rounded to 4 bits.

        Factors of a lower rank are not counted, and distillation is not considered.
        """
        return 0.0 if self.low_rank is not None else self.blocks / depth

    def __str__(self) -> str:
        low_rank = "" if self.low_rank is None else f", rank share {self.low_rank:g}"
        return f"{self.blocks} blocks by {self.select}{low_rank}{', NF4' if self.quantization == 'nf4' else ''}"


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near an emulator is to its backbone on public text.

    Attributes:
        loss: the emulator's own, in nats per token; None for a classifier, which has no classes of public text.
        hidden: share of the stream after the middle that is wrong: mean(((T − S) / rms(T))²).
        agreement: cosine of the tuned blocks' gradients on the emulator and on the backbone: whether a step that helps
            the one helps the other.
    """

    loss: float | None
    hidden: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """A choice, the bytes of its stand-in, and what was measured, without any distillation.

    Attributes:
        disclosed: see `Choice.disclosed`.
    """

    choice: Choice
    size: int
    disclosed: float
    fidelity: Fidelity

    @property
    def discloses(self) -> bool:
        """Whether it gives the middle away: every block of it is there."""
        return self.disclosed >= 1


@dataclass(frozen=True, slots=True)
class Material:
    """What emulators are made of: the backbone, its split, and public text."""

    model: PreTrainedModel
    split: Split
    calibration: Sequence[Batch]


def stated(settings: Emulator, split: Split, keep: int | None) -> Choice:
    """What the Plan says, where it leaves the number of blocks open `keep` of them.

    Raises:
        EmulatorError: more blocks than there are; or the Plan and `keep` differ.
    """
    if keep is not None and settings.blocks not in (None, keep):
        raise EmulatorError(
            f"--keep {keep}, but the Plan says emulator.blocks = {settings.blocks}", hint="Leave one of them out."
        )
    depth = len(split.middle)
    compressed = settings.low_rank is not None or settings.quantization != "none"
    blocks = keep or settings.blocks or (depth if compressed else max(1, depth // 2))
    if blocks > depth:
        raise EmulatorError(f"{blocks} blocks are to remain, and the middle has {depth}", hint="Lower emulator.blocks.")
    return Choice(settings.select, blocks, settings.low_rank, settings.quantization)


def compressed(material: Material, choice: Choice, turn: int = 0, turns: int = 1) -> tuple[PreTrainedModel, Layout]:
    """The emulator that the choice stands for, but for its 4 bits, which come after distillation.

    Args:
        turn: from 0, which of `turns` emulators it is.
    """
    if turns > 1:
        chosen = in_turn(material.split, choice.blocks, turn, turns)
    elif choice.blocks == len(material.split.middle):
        chosen = tuple(material.split.middle)
    else:
        chosen = SELECTIONS[choice.select](material.model, material.split, choice.blocks, material.calibration)
    layout = Layout(material.split, chosen)
    emulator = assemble(material.model, layout)
    if choice.low_rank is not None:
        return factorised(emulator, layout, choice.low_rank, material.calibration)
    return emulator, layout


def finished(emulator: PreTrainedModel, layout: Layout, choice: Choice) -> tuple[PreTrainedModel, Layout]:
    """The same, in the number format that the choice says."""
    return quantised(emulator, layout) if choice.quantization == "nf4" else (emulator, layout)


def middle_bytes(model: PreTrainedModel, numbers: Sequence[int]) -> int:
    """Bytes of the tensors in these blocks as a file holds them, shared ones once."""
    path = describe(model).blocks_path
    inside = tuple(f"{path}.{number}." for number in numbers)
    return sum(one.nbytes for name, one in tensors(model).items() if name.startswith(inside))


def fidelity(material: Material, emulator: PreTrainedModel, layout: Layout, whole: torch.Tensor) -> Fidelity:
    """How near the emulator is to the backbone, whose `tuned_gradient` is `whole`, on the material's text."""
    gradient = tuned_gradient(emulator, layout.outer, material.calibration)
    return Fidelity(
        mean_loss(emulator, material.calibration) if predicts_tokens(emulator) else None,
        stream_error(material.model, emulator, layout, material.calibration),
        float(torch.cosine_similarity(whole, gradient, dim=0)),
    )


@torch.no_grad()
def stream_error(model: PreTrainedModel, emulator: PreTrainedModel, layout: Layout, batches: Sequence[Batch]) -> float:
    """Share of the stream behind the middle that the stand-in gets wrong: mean(((T − S) / rms(T))²) over batches."""
    split = layout.split
    behind = describe(model).blocks[split.depth - split.last]
    entry = describe(emulator).blocks[layout.inner.stop]
    wrong = 0.0
    for batch in batches:
        wanted = tokens(entering(model, behind, batch), batch)
        given = tokens(entering(emulator, entry, batch), batch)
        wrong += float(((wanted - given) / wanted.square().mean().sqrt()).square().mean())
    return wrong / len(batches)


def search(
    material: Material, budget: int, kept: Path, on_candidate: Callable[[Candidate, int, int], None]
) -> tuple[Candidate, ...]:
    """Candidates of at most `budget` bytes, the best first: the one whose gradients agree most with the backbone's.

    First the ways to select blocks are compared, with as many as fit and with half of them; then, with the best way,
    factors and 4 bits, which leave room for more blocks.

    Gradients agree most where nothing is held back: with room enough, all of the middle in 4 bits would always win, and
    its owner might as well ship the backbone. A candidate that holds every block of the middle (`discloses`) therefore
    comes behind all that do not, whatever was measured, and is taken only where nothing else fits.

    Args:
        kept: a file where what was measured is kept; what it holds is not measured again.

    Raises:
        EmulatorError: not even one block fits.
    """
    done = _read(kept)
    whole = tuned_gradient(material.model, material.split.outer, material.calibration)

    def measured(choice: Choice) -> Candidate:
        if choice not in done:
            emulator, layout = finished(*compressed(material, choice), choice)
            done[choice] = Candidate(
                choice,
                middle_bytes(emulator, layout.inner),
                choice.disclosed(len(material.split.middle)),
                fidelity(material, emulator, layout, whole),
            )
            _write(kept, done.values())
        return done[choice]

    first = list(_selections(material, budget))
    count = len(first) + len(list(_combinations(material, budget, "uniform")))
    if not count:
        smallest = min(_size(material, Choice("uniform", 1, share, "nf4")) for share in (None, *SHARES))
        raise EmulatorError(
            f"no stand-in of {budget:,} bytes can be made", hint=f"The smallest takes {smallest:,}: raise --budget-mb."
        )
    found: list[Candidate] = []
    for choice in first:
        found.append(measured(choice))
        on_candidate(found[-1], len(found), count)
    best = max(found, key=_score).choice.select if found else "uniform"
    for choice in _combinations(material, budget, best):
        found.append(measured(choice))
        on_candidate(found[-1], len(found), count)
    return tuple(sorted(found, key=_score, reverse=True))


def _score(candidate: Candidate) -> tuple[bool, float]:
    return not candidate.discloses, candidate.fidelity.agreement


def _selections(material: Material, budget: int) -> Iterator[Choice]:
    for blocks in _counts(material, budget, None, "none"):
        every = blocks == len(material.split.middle)
        yield from (Choice(select, blocks) for select in (("uniform",) if every else SELECTIONS))


def _combinations(material: Material, budget: int, select: str) -> Iterator[Choice]:
    quantizations: tuple[Literal["none", "nf4"], ...] = ("none", "nf4")
    for quantization in quantizations:
        for share in (None, *SHARES):
            if (share, quantization) != (None, "none"):
                counts = _counts(material, budget, share, quantization)
                yield from (Choice(select, blocks, share, quantization) for blocks in counts)


def _counts(
    material: Material, budget: int, share: float | None, quantization: Literal["none", "nf4"]
) -> tuple[int, ...]:
    """As many blocks as fit; where these are whole, half of them too, for as many as fit may be all of the middle."""
    most = _most(material, budget, share, quantization)
    return tuple(count for count in (most, most // 2 if share is None else 0) if count)


def _most(material: Material, budget: int, share: float | None, quantization: Literal["none", "nf4"]) -> int:
    """The most blocks whose stand-in has at most `budget` bytes; 0 where none has."""
    fitting = (
        count
        for count in range(len(material.split.middle), 0, -1)
        if _size(material, Choice("uniform", count, share, quantization)) <= budget
    )
    return next(fitting, 0)


def _size(material: Material, choice: Choice) -> int:
    """Bytes of the stand-in, reckoned from the shapes of its first block; the others are taken to be like it."""
    number = material.split.middle[0]
    linears = describe(material.model).within([number]).linears
    item = material.model.dtype.itemsize
    matrices = [(linear.out_features, linear.in_features) for linear in linears]
    rest = middle_bytes(material.model, [number]) - sum(rows * columns for rows, columns in matrices) * item
    if choice.low_rank is not None:
        ranks = [rank_of(linear, choice.low_rank) for linear in linears]
        matrices = [
            factor
            for (rows, columns), rank in zip(matrices, ranks, strict=True)
            for factor in ((rows, rank), (rank, columns))
        ]
    if choice.quantization == "nf4":
        sizes = [nf4.sizes(rows, columns) for rows, columns in matrices]
        return choice.blocks * (rest + sum(packed + 2 * scales for packed, scales in sizes))
    return choice.blocks * (rest + item * sum(rows * columns for rows, columns in matrices))


def _read(path: Path) -> dict[Choice, Candidate]:
    if not path.exists():
        return {}
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    found = (
        Candidate(**row | {"choice": Choice(**row["choice"]), "fidelity": Fidelity(**row["fidelity"])}) for row in rows
    )
    return {one.choice: one for one in found}


def _write(path: Path, candidates: Any) -> None:
    write(path, json.dumps([asdict(one) for one in candidates], indent=1).encode())
