"""Inversion: which words of a client's text its update gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final, final

from farfield.protocols.audit.finding import Finding
from farfield.protocols.errors import TuningError

from . import inversion_words as words
from .attack import Attack, Attacker, register
from .inversion_texts import Public, public
from .inversion_trials import Reader, Row, as_planned, at_rank, in_order, seen, swept, warmed
from .subject import Subject

DISTINCT: Final = (16, 64, 256, 1024)
"""Numbers of distinct tokens in a text."""

RANKS: Final = (4, 8, 16, 32)

COHORTS: Final = (1, 2, 4, 8)

PROBE: Final = 64
"""Distinct tokens of the texts by which ranks and cohorts are compared."""

SHORT: Final = 12
"""Tokens of a text that is to be found in its order."""


@register
@final
class InversionAttack(Attack):
    """Token sets by DAGER's span check and by ranking, and the order of short texts (Petrov et al. 2024)."""

    name: ClassVar[str] = "inversion"
    title: ClassVar[str] = "Text from updates"
    attacker: ClassVar[Attacker] = Attacker.COORDINATOR
    cost: ClassVar[str] = "a minute or two: some dozen trainings of one client"
    place: ClassVar[int] = 60

    def unfit(self, subject: Subject) -> str | None:
        if subject.plan.model.task != "causal-lm":
            return "it goes by the tokens that a model is to predict, and a classifier predicts classes"
        return None

    def run(self, subject: Subject) -> Finding:
        text = public(subject)
        single = _kept(subject, "single", lambda: _single(subject, text))
        planned = subject.notes.values("inversion/planned", lambda: as_planned(subject, text, seen(subject)))
        return words.finding(self, subject, single, planned)


def _kept(subject: Subject, name: str, make: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = subject.notes.values(f"inversion/{name}", make)
    return found


def _single(subject: Subject, text: Public) -> dict[str, Any]:
    """Bare gradients: what there is to protect from. By start, then by what is changed."""
    late = subject.course.adapter(subject.course.rounds - 1) if subject.course.rounds > 1 else warmed(subject, text)
    found: dict[str, Any] = {}
    for name, start in (("first", subject.initial), ("later", late)):
        reader = Reader.at(subject, text, start)
        found[name] = {"distinct": _each(subject, DISTINCT, lambda count: swept(reader, count))}  # noqa: B023
    # `reader` is the one that begins with the later adapter, where more shows.
    found["order"] = in_order(reader, SHORT)
    found["small"] = swept(reader, PROBE, update=reader.planned)
    told = {clue for row in found["later"]["distinct"].get(str(PROBE), ()) for clue in row["clues"]}
    if told and subject.federation is not None:
        sizes = [size for size in COHORTS if size <= len(subject.clients)]
        found["cohorts"] = _each(subject, sizes, lambda size: swept(reader, PROBE, size))
    if told and hasattr(subject.plan.tuning, "rank"):
        found["ranks"] = _each(subject, RANKS, lambda rank: _ranked(subject, text, rank))
    every = [row for start in ("first", "later") for rows in found[start]["distinct"].values() for row in rows]
    found["clues"] = sorted({clue for row in every for clue in row["clues"]})
    return found


def _each(subject: Subject, values: Sequence[int], trial: Any) -> dict[str, list[Row]]:
    found = {}
    for number, value in enumerate(values):
        subject.say("reading tokens from single steps", number, len(values))
        if rows := trial(value):
            found[str(value)] = rows
    return found


def _ranked(subject: Subject, text: Public, rank: int) -> list[Row]:
    try:
        return at_rank(subject, text, rank, PROBE)
    except TuningError:  # the model is too narrow for that rank
        return []
