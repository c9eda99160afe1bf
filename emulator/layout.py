"""What an emulator is made of: the small document that lies beside its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farfield.protocols.errors import EmulatorError
from farfield.protocols.plan import Plan

from .split import Split

LAYOUT: Final = "emulator.json"

_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """How the blocks of an emulator follow from those of its backbone.

    Attributes:
        split: which blocks of the backbone are there as they are.
        middle: for each block of the stand-in, in the order in which they run, the block of the backbone that it was
            made from. Where one comes twice the two share their weights.
        ranks: by block of the backbone and layer within it (`"4.mlp.up_proj"`), the rank of its two factors.
        quantization: how the linear layers of the stand-in are stored.
    """

    split: Split
    middle: tuple[int, ...]
    ranks: Mapping[str, int] = field(default_factory=dict)
    quantization: Literal["none", "nf4"] = "none"

    @property
    def origins(self) -> tuple[int, ...]:
        """For each block of the emulator, the block of the backbone that it stands for."""
        ends = self.split.first, self.split.depth - self.split.last
        return (*range(ends[0]), *self.middle, *range(ends[1], self.split.depth))

    @property
    def inner(self) -> range:
        """The numbers, in the emulator, of the blocks of the stand-in."""
        return range(self.split.first, self.split.first + len(self.middle))

    @property
    def outer(self) -> tuple[int, ...]:
        """The numbers, in the emulator, of the blocks that are tuned."""
        return tuple(number for number in range(len(self.origins)) if number not in self.inner)


@dataclass(frozen=True, slots=True)
class Record:
    """The document: the layout, what it was made for, and what was done.

    Attributes:
        plan: `Plan.emulator_digest` of the Plan that it was made for.
        backbone: `backbone.fingerprint` of the folder that it was made from.
        distilled: optimiser steps of distillation that it has had.
        round: the round of a run with whose adapter it was distilled; 0 is none.
    """

    layout: Layout
    plan: str
    backbone: str
    distilled: int
    round: int = 0

    def write(self, folder: Path) -> None:
        (folder / LAYOUT).write_text(json.dumps({"format": _FORMAT} | asdict(self), indent=2) + "\n", encoding="utf-8")

    def check(self, plan: Plan, where: Path) -> None:
        """Raises EmulatorError unless the emulator was made for such a Plan."""
        if self.plan != plan.emulator_digest:
            raise EmulatorError(
                f"made for another Plan: {self.plan[:12]}…, and this one has {plan.emulator_digest[:12]}…",
                where=where / LAYOUT,
                hint="[model], delivery.first and last, [emulator], [distillation], data.max_length and training.seed "
                "must be the same. Build it again with `coordinator emulator build`.",
            )


def at_turn(emulator: Path, turn: int) -> Path:
    """The folder of the emulator whose turn it is, of those built together; the first is `emulator` itself."""
    return emulator / "turns" / str(turn) if turn else emulator


def is_emulator(folder: Path) -> bool:
    return (folder / LAYOUT).is_file()


def read(folder: Path) -> Record:
    """The record of the emulator in `folder`, which may come from anyone.

    Raises:
        EmulatorError: it has none, or one that contradicts itself.
    """
    path = folder / LAYOUT
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = _Document.model_validate(document)
    except FileNotFoundError:
        raise EmulatorError(
            f"there is no {LAYOUT}", where=folder, hint="Give a folder that `coordinator emulator build` wrote."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise EmulatorError(f"not the record of an emulator: {_first(error)}", where=path) from None
    layout = found.layout
    split = Split(layout.split.depth, layout.split.first, layout.split.last)
    if not set(layout.middle) <= set(split.middle):
        raise EmulatorError("its stand-in has blocks that are not of the middle", where=path)
    if len(layout.middle) > len(split.middle) or layout.middle != sorted(layout.middle):
        raise EmulatorError("its stand-in has more blocks than the middle, or has them in another order", where=path)
    if not {name.partition(".")[0] for name in layout.ranks} <= {str(number) for number in layout.middle}:
        raise EmulatorError("it gives ranks of blocks that it does not have", where=path)
    return Record(
        Layout(split, tuple(layout.middle), layout.ranks, layout.quantization),
        found.plan,
        found.backbone,
        found.distilled,
        found.round,
    )


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        found = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, found['loc']))}: {found['msg']}"
    return str(error)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Split(_Strict):
    depth: int = Field(ge=3, le=1000)
    first: int = Field(ge=1)
    last: int = Field(ge=1)

    def model_post_init(self, context: Any, /) -> None:
        if self.first + self.last >= self.depth:
            raise ValueError("nothing is between the ends")


class _Layout(_Strict):
    split: _Split
    middle: list[int] = Field(min_length=1)
    ranks: dict[str, Annotated[int, Field(ge=1)]]
    quantization: Literal["none", "nf4"]


class _Document(_Strict):
    format: Literal[1]
    layout: _Layout
    plan: str = Field(pattern="^[0-9a-f]{64}$")
    backbone: str = Field(pattern="^[0-9a-f]{64}$")
    distilled: int = Field(ge=0)
    round: int = Field(ge=0)
