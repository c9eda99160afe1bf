"""What an attack found: figures with their intervals, curves, and sentences that claim no more than was measured.

These are the parts of a report (`report.py`), so they are checked when one is read, and a page can be made of them by
someone who has neither the model nor the data.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue

Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]


class Document(BaseModel):
    """A part of a report: not to be changed, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(Document):
    """What a value lies between with this `confidence`; a bound on one side has None on the other."""

    low: Finite | None = None
    high: Finite | None = None
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95


class Figure(Document):
    """One number that was measured, and what it is to be held against.

    Attributes:
        name: what it is, as a person would say it.
        value: None where there is no such number; `note` says why.
        unit: "" for a plain number, "%" for a share that is given from 0 to 1, else what follows the number ("bits").
        chance: what guessing comes to.
        ceiling: the most that this measurement could ever have shown, however much leaks.
        claimed: what the Plan or its accounting promises.
        headline: whether it belongs in the summary.
    """

    name: str
    value: Finite | None
    unit: str = ""
    interval: Interval | None = None
    chance: Finite | None = None
    ceiling: Finite | None = None
    claimed: Finite | None = None
    note: str = ""
    headline: bool = False


class Axis(Document):
    """One axis: its label with the unit, and how it is drawn. Limits that are None follow from the data."""

    label: str
    log: bool = False
    low: Finite | None = None
    high: Finite | None = None


class Series(Document):
    """Points of one curve, all lists of one length; `low` and `high` are an interval at each, or empty.

    Attributes:
        style: joined by lines, by steps (a ROC), or not at all.
    """

    label: str
    x: tuple[Finite, ...]
    y: tuple[Finite, ...]
    low: tuple[Finite, ...] = ()
    high: tuple[Finite, ...] = ()
    style: Literal["line", "steps", "points"] = "line"


class Mark(Document):
    """A line across a plot: chance, a ceiling, a promise."""

    label: str
    y: Finite


class Plot(Document):
    """Curves over one pair of axes. `diagonal` draws y = x, what guessing gives in a ROC.

    Attributes:
        caption: how to read it, for someone who has never seen such a plot.
    """

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    marks: tuple[Mark, ...] = ()
    diagonal: bool = False
    caption: str = ""


class Table(Document):
    """Rows of cells, as they are to be read."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


Verdict: TypeAlias = Literal["leak", "no leak found", "passed", "failed"]
"""An attack succeeds beyond chance at its confidence, or it does not; a test of the machinery passes or fails."""


class Finding(Document):
    """One attack: what it was, and what came of it.

    Attributes:
        attack: its name in the registry.
        title: for a heading.
        attacker: who could do it, and what they know.
        tried, found, limits: sentences: what was done, what came out, and what that does not say.
        data: all numbers that the figures follow from, so that someone else can compute them again.
        seconds: what it took.
    """

    attack: str
    title: str
    attacker: str
    verdict: Verdict
    tried: tuple[str, ...]
    found: tuple[str, ...]
    limits: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    plots: tuple[Plot, ...] = ()
    tables: tuple[Table, ...] = ()
    data: dict[str, JsonValue] = {}
    seconds: Finite = 0.0


class Untried(Document):
    """An attack that was not made, and why."""

    attack: str
    title: str
    reason: str
