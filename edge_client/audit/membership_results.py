"""How well scores of membership do, and the figures, curves and tables of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from farfield.protocols.audit.auc import auc
from farfield.protocols.audit.curves import Roc, TprAtFpr, roc, tpr_at_fpr
from farfield.protocols.audit.finding import Axis, Figure, Interval, Plot, Series, Table
from farfield.protocols.audit.intervals import Estimate

from .candidates import Candidates
from .membership_scores import Floats, rmia
from .shadows import Shadows

RMIA: Final = "RMIA"
LIRA: Final = "LiRA"
OFFLINE: Final = "LiRA, offline"
LOSS: Final = "loss difference"
BLIND: Final = "loss before training"
"""The scores by name. The verdict goes by the first alone; the last knows nothing of what was learnt."""

RATES: Final = (0.01, 0.001)
"""The false positive rates that count."""

NAMED: Final = 20
"""How many clients are named, at most."""


@dataclass(frozen=True, slots=True)
class Result:
    """What one score comes to.

    Attributes:
        area: under the curve.
        rates: true positive rates at `RATES`.
    """

    curve: Roc
    area: Estimate
    rates: tuple[TprAtFpr, ...]


def result(members: Floats, non_members: Floats) -> Result:
    """Of these scores; at least one each."""
    rates = tuple(tpr_at_fpr(members, non_members, fpr) for fpr in RATES)
    return Result(roc(members, non_members), auc(members, non_members), rates)


def control(known: Shadows) -> float | None:
    """The area that RMIA gets on the shadow adapters, of which it is known what each was trained on: their mean.

    Each is attacked with those of the other pairs. None where there is one pair.
    """
    areas = []
    for number, (released, trained) in enumerate(zip(known.losses, known.trained, strict=True)):
        others = [other for other in range(len(known.losses)) if other // 2 != number // 2]
        if not others:
            return None
        score = rmia(released, known.losses[others])
        areas.append(auc(score[trained], score[~trained]).value)
    return sum(areas) / len(areas)


def leaks(results: Mapping[str, Result]) -> bool:
    """Whether RMIA does better than guessing, at 95 %, and than the loss before training does of itself."""
    return results[RMIA].area.low > max(0.5, results[BLIND].area.value)


def figures(results: Mapping[str, Result], control: float | None) -> tuple[Figure, ...]:
    areas = [
        Figure(
            name=f"AUC, {name}",
            value=one.area.value,
            interval=Interval(low=one.area.low, high=one.area.high),
            chance=0.5,
            ceiling=1.0,
            note="knows nothing of what was learnt" if name == BLIND else "",
            headline=name == RMIA,
        )
        for name, one in results.items()
    ]
    rates = [_rate(name, rate) for name in (RMIA, LIRA, LOSS) for rate in results[name].rates]
    note = "the mean of the shadow adapters, each attacked with those of the other pairs"
    known = Figure(name="AUC, RMIA, where nothing protects", value=control, chance=0.5, ceiling=1.0, note=note)
    return (*areas, *(() if control is None else (known,)), *rates)


def _rate(name: str, rate: TprAtFpr) -> Figure:
    title = f"members found at {rate.fpr:.1%} false positives, {name}"
    if rate.tpr is None or rate.measured_fpr is None:
        return Figure(name=title, value=None, unit="%", chance=rate.fpr, note=f"takes {rate.needed} non-members")
    false = rate.measured_fpr
    return Figure(
        name=title,
        value=rate.tpr.value,
        unit="%",
        interval=Interval(low=rate.tpr.low, high=rate.tpr.high),
        chance=rate.fpr,
        ceiling=1.0,
        note=f"{false.successes} of {false.trials} non-members are taken for members",
        headline=name == RMIA,
    )


def plot(results: Mapping[str, Result]) -> Plot:
    """Their ROC on logarithmic axes. A rate of zero has no place there and is drawn at the edge."""
    curve = results[RMIA].curve
    low = 0.5 / float(max(curve.true_positives[-1], curve.false_positives[-1]))
    return Plot(
        title="Members found, against non-members taken for members",
        x=Axis(label="false positive rate", log=True, low=low, high=1),
        y=Axis(label="true positive rate", log=True, low=low, high=1),
        series=tuple(_series(name, one.curve, low) for name, one in results.items()),
        diagonal=True,
        caption="Each point is a threshold above which an example is called a member. On the diagonal members are "
        "called so as often as non-members, which is guessing; the higher above it on the left, the surer the attack "
        "is of some members. Rates of zero are drawn at the edge.",
    )


def _series(name: str, curve: Roc, low: float) -> Series:
    """The points at which the curve turns."""
    ways = np.diff(np.stack([curve.false_positives, curve.true_positives]), axis=1) > 0
    kept = np.concatenate([[True], (ways[:, 1:] != ways[:, :-1]).any(axis=0), [True]])
    x, y = (tuple(np.maximum(rate[kept], low).round(6).tolist()) for rate in (curve.fpr, curve.tpr))
    return Series(label=name, x=x, y=y, style="steps")


def scores(results: Mapping[str, Result]) -> Table:
    rows = [(name, _area(one.area), *map(_cell, one.rates)) for name, one in results.items()]
    return Table(
        title="Scores",
        columns=("score", "AUC", *(f"members found at {fpr:.1%} false positives" for fpr in RATES)),
        rows=tuple(rows),
        caption="95 % intervals in brackets. AUC: the share of pairs of a member and a non-member in which the member "
        f"has the higher score. {BLIND!r} knows nothing of what was learnt.",
    )


def clients(asked: Candidates, score: Floats) -> tuple[Table, ...]:
    """By client, the ones whose members show most first; none where there is one client."""
    names = np.array(asked.clients)
    found = []
    for name in sorted(set(asked.clients)):
        inside, outside = score[(names == name) & asked.members], score[(names == name) & ~asked.members]
        found.append((name, len(inside), len(outside), auc(inside, outside)))
    if len(found) < 2:
        return ()
    found.sort(key=lambda one: -one[3].value)
    rows = [(name, str(inside), str(outside), _area(area)) for name, inside, outside, area in found[:NAMED]]
    caption = f"The {len(rows)} highest of {len(found)}. The highest of many is high by chance alone."
    columns = ("client", "members", "non-members", "AUC")
    return (Table(title=f"Clients, by {RMIA}", columns=columns, rows=tuple(rows), caption=caption),)


def _area(area: Estimate) -> str:
    return f"{area.value:.3f} ({area.low:.3f} to {area.high:.3f})"


def _cell(rate: TprAtFpr) -> str:
    if rate.tpr is None:
        return "too few non-members"
    return f"{rate.tpr.value:.1%} ({rate.tpr.low:.1%} to {rate.tpr.high:.1%})"
