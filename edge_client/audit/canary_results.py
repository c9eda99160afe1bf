"""Figures, curves and tables of what canaries show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from farfield.protocols.audit.auc import auc
from farfield.protocols.audit.canaries import OneRunBound, ceiling
from farfield.protocols.audit.curves import TprAtFpr, roc, tpr_at_fpr
from farfield.protocols.audit.finding import Axis, Figure, Interval, Mark, Plot, Series, Table

from .canary_bounds import Measured, Ranking

RATES: Final = (0.01, 0.001)
_COUNTS: Final = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def figures(levels: Mapping[str, Measured], rankings: Sequence[Ranking]) -> tuple[Figure, ...]:
    bounds = [figure for name, level in levels.items() for figure in _bounds(name, level)]
    rates = [_rate(one, tpr_at_fpr(*one.sides, fpr)) for one in rankings for fpr in RATES]
    return (*bounds, *(_area(one) for one in rankings), *rates)


def curves(rankings: Sequence[Ranking]) -> Plot:
    """ROC on logarithmic axes. A rate of zero has no place there and is drawn at the edge."""
    low = 0.5 / max(len(side) for one in rankings for side in one.sides)
    return Plot(
        title="Canaries that are found, against others that are taken for them",
        x=Axis(label="false positive rate", log=True, low=low, high=1),
        y=Axis(label="true positive rate", log=True, low=low, high=1),
        series=tuple(_series(one, low) for one in rankings),
        diagonal=True,
        caption="Each point is a threshold above which a canary is said to have been in the run. On the diagonal that "
        "is guessing; the higher a curve is above it on the left, the surer the attack is of some canaries. Rates of "
        "zero are drawn at the edge.",
    )


def bounds(name: str, level: Measured) -> Plot:
    """The bound beside the ceiling, over the number of canaries that it takes to lift that."""
    found = level.bound
    return Plot(
        title=f"What is measured of ε for {name}, what could be, and what is promised",
        x=Axis(label="canaries", log=True),
        y=Axis(label=f"ε at δ = {found.delta:g}", low=0),
        series=(
            Series(
                label="ceiling: every guess right",
                x=tuple(map(float, _COUNTS)),
                y=tuple(
                    round(ceiling(count, delta=found.delta, claim=found.claim, confidence=found.confidence), 4)
                    for count in _COUNTS
                ),
            ),
            Series(label="ε at least, measured", x=(float(found.canaries),), y=(found.epsilon,), style="points"),
        ),
        marks=() if level.claimed is None else (Mark(label="promised", y=level.claimed),),
        caption="The line is the largest bound that so many canaries could show if the attacker were always right. A "
        "promise above the line at the measured point cannot be refuted there, however much leaks.",
    )


def kinds(rankings: Sequence[Ranking]) -> Table:
    rows = []
    for one in rankings:
        inside, outside = one.sides
        area = auc(inside, outside)
        rates = [_cell(tpr_at_fpr(inside, outside, fpr)) for fpr in RATES]
        counts = (one.name, str(len(inside)), str(len(outside)))
        rows.append((*counts, f"{area.value:.3f} ({area.low:.3f} to {area.high:.3f})", *rates))
    return Table(
        title="Canaries by kind",
        columns=("kind", "put in", "not put in", "AUC", *(f"found at {fpr:.1%} false positives" for fpr in RATES)),
        rows=tuple(rows),
        caption="95 % intervals in brackets. AUC: the share of pairs of a canary that was in the run and one that was "
        "not in which the first has the higher score.",
    )


def flags(values: Iterable[bool]) -> str:
    """A character for each: 1 for True."""
    return "".join("1" if value else "0" for value in values)


def _bounds(name: str, level: Measured) -> tuple[Figure, Figure]:
    made, right = level.bound.guesses.made, level.bound.right
    told = f"{right} of {made} guesses right, of {level.bound.canaries} canaries ({level.ranking})"
    return (
        _bound(f"ε at least, {name}", level.bound, level.claimed, told, headline=True),
        _bound(
            f"ε at least, {name}, held against Gaussian noise",
            level.sharper,
            level.claimed,
            "sharper; refutes only that it is as good as the Gaussian mechanism with this ε",
        ),
    )


def _bound(name: str, found: OneRunBound, claimed: float | None, note: str, *, headline: bool = False) -> Figure:
    return Figure(
        name=name,
        value=found.epsilon,
        interval=Interval(low=found.epsilon),
        chance=0.0,
        ceiling=found.ceiling,
        claimed=claimed,
        note=note,
        headline=headline,
    )


def _area(one: Ranking) -> Figure:
    area = auc(*one.sides)
    interval = Interval(low=area.low, high=area.high)
    return Figure(name=f"AUC, {one.name}", value=area.value, interval=interval, chance=0.5, ceiling=1.0)


def _rate(one: Ranking, rate: TprAtFpr) -> Figure:
    title = f"canaries found at {rate.fpr:.1%} false positives, {one.name}"
    if rate.tpr is None or rate.measured_fpr is None:
        note = f"takes {rate.needed} canaries that were not put in"
        return Figure(name=title, value=None, unit="%", chance=rate.fpr, note=note)
    false = rate.measured_fpr
    return Figure(
        name=title,
        value=rate.tpr.value,
        unit="%",
        interval=Interval(low=rate.tpr.low, high=rate.tpr.high),
        chance=rate.fpr,
        ceiling=1.0,
        note=f"{false.successes} of {false.trials} that were not put in are taken for ones that were",
    )


def _series(one: Ranking, low: float) -> Series:
    """The points at which the curve turns."""
    curve = roc(*one.sides)
    ways = np.diff(np.stack([curve.false_positives, curve.true_positives]), axis=1) > 0
    kept = np.concatenate([[True], (ways[:, 1:] != ways[:, :-1]).any(axis=0), [True]])
    x, y = (tuple(np.maximum(rate[kept], low).round(6).tolist()) for rate in (curve.fpr, curve.tpr))
    return Series(label=one.name, x=x, y=y, style="steps")


def _cell(rate: TprAtFpr) -> str:
    if rate.tpr is None:
        return "too few not put in"
    return f"{rate.tpr.value:.1%} ({rate.tpr.low:.1%} to {rate.tpr.high:.1%})"
