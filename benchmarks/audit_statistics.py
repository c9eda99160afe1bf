"""The statistics of audits, ours beside those of jax-privacy's `CanaryScoreAuditor` and of scikit-learn.

    python benchmarks/audit_statistics.py [--seeds 200] [--json FILE]

It needs jax-privacy and scikit-learn: `make bench-audit` installs the extra of that name first.

First the statistics that both have, on the same scores, drawn from chance to a leak that no one could miss, with ties
and without. Where jax-privacy goes through all corners of the ROC's convex hull and divides the error among them, our
functions are called at the same thresholds with the same share of the error, so that what is compared is the statistic
and not how its threshold was chosen. All must be equal to 10⁻⁶. Its area is that under the hull, so it is compared with
the area under our hull, and scikit-learn's with our AUC.

Then the procedures with their defaults, each with its own way to choose thresholds: how often the bound says that there
is a leak where there is none, which must not be oftener than the confidence allows, and what they find where there is
one. jax-privacy's bound by Gaussian DP takes the upper limits of both error rates for lower ones where they sum to more
than one, so it finds leaks in noise; it is compared on scores with a single threshold only.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final

import numpy as np
import typer
from jax_privacy import auditing
from numpy.typing import NDArray
from scipy.stats import binom
from sklearn.metrics import roc_auc_score

from farfield.protocols.audit import canaries, gaussian_dp, one_run, one_run_gaussian, releases
from farfield.protocols.audit.auc import auc
from farfield.protocols.audit.curves import hull, randomised_tpr_at_fpr, roc

ERROR, DELTA, WANTED, CANARIES = 0.05, 1e-5, 1e-6, 1000
Scores = NDArray[np.float64]
Bound = Callable[[int, int, int, float, float], float]

SHAPES: Final[dict[str, Callable[[np.random.Generator, NDArray[np.bool_]], Scores]]] = {
    "chance": lambda random, inside: random.normal(size=len(inside)),
    "weak": lambda random, inside: random.normal(inside * 0.7),
    "strong": lambda random, inside: random.normal(inside * 3.0),
    "few are given away": lambda random, inside: random.normal(inside * (random.random(len(inside)) < 0.1) * 8.0),
    "ties": lambda random, inside: np.round(random.normal(inside * 1.5) * 2),
    "yes or no": lambda random, inside: (random.random(len(inside)) < 0.2 + 0.6 * inside).astype(float),
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """Scores of canaries, each of them in the data by a coin of its own."""

    scores: Scores
    included: NDArray[np.bool_]

    @property
    def inside(self) -> Scores:
        return self.scores[self.included]

    @property
    def outside(self) -> Scores:
        return self.scores[~self.included]

    @property
    def theirs(self) -> Any:
        return auditing.CanaryScoreAuditor(self.inside, self.outside)


def draw(shape: str, seed: int) -> Drawn:
    random = np.random.default_rng(seed)
    included = random.random(CANARIES) < 0.5
    return Drawn(SHAPES[shape](random, included), included)


@dataclass(frozen=True, slots=True)
class Pair:
    """One statistic on one set of scores."""

    statistic: str
    ours: float
    theirs: float

    @property
    def apart(self) -> float:
        return abs(self.ours - self.theirs)


def shared(drawn: Drawn, exact: bool) -> Iterator[Pair]:
    """Every statistic that both have. `exact`: the scores are yes or no, so that there is one threshold only."""
    theirs, inside, outside = drawn.theirs, drawn.inside, drawn.outside
    yield Pair("AUC, scikit-learn", auc(inside, outside).value, roc_auc_score(drawn.included, drawn.scores))
    corners = hull(roc(inside, outside))
    area = float(np.trapezoid(corners.tpr, corners.fpr))
    yield Pair("area under the convex hull, jax-privacy", area, theirs.attack_auroc())
    for fpr in (0.001, 0.01):
        name = f"TPR at {fpr:.1%} FPR, lots between thresholds"
        yield Pair(name, randomised_tpr_at_fpr(inside, outside, fpr), theirs.tpr_at_given_fpr(fpr))
    for quantile in (0.3, 0.5, 0.9, 0.99):
        threshold = float(np.quantile(drawn.scores, quantile))
        strategy = {"threshold_strategy": auditing.Explicit(threshold)}
        for delta in (0.0, DELTA):
            yield Pair(
                "ε, Clopper–Pearson, one threshold",
                releases.at_threshold(inside, outside, threshold, delta=delta).epsilon,
                theirs.epsilon_clopper_pearson(ERROR, delta, one_sided=False, **strategy),
            )
        yield Pair(
            "ε, one run, one threshold",
            guessed(drawn, threshold, one_run.lower_bound, ERROR),
            theirs.epsilon_one_run(ERROR, DELTA, **strategy),
        )
        yield Pair(
            "ε, one run, Gaussian DP, one threshold",
            guessed(drawn, threshold, one_run_gaussian.lower_bound, ERROR),
            theirs.epsilon_one_run_fdp(ERROR, DELTA, **strategy),
        )
    thresholds = [float(threshold) for threshold in corners.thresholds]
    each = ERROR / len(thresholds)
    yield Pair(
        "ε, Clopper–Pearson, corners",
        max(
            releases.at_threshold(inside, outside, threshold, delta=DELTA, confidence=1 - each).epsilon
            for threshold in thresholds
        ),
        theirs.epsilon_clopper_pearson(ERROR, DELTA, one_sided=False),
    )
    yield Pair(
        "ε, one run, corners",
        max(guessed(drawn, threshold, one_run.lower_bound, each) for threshold in thresholds),
        theirs.epsilon_one_run(ERROR, DELTA),
    )
    yield Pair(
        "ε, one run, Gaussian DP, corners",
        max(guessed(drawn, threshold, one_run_gaussian.lower_bound, each) for threshold in thresholds),
        theirs.epsilon_one_run_fdp(ERROR, DELTA),
    )
    if exact:
        found = [
            releases.at_threshold(inside, outside, threshold, delta=DELTA, claim="Gaussian DP", confidence=1 - each)
            for threshold in thresholds
        ]
        yield Pair(
            "ε, Clopper–Pearson, Gaussian DP, corners",
            gaussian_dp.epsilon(max(one.mu or 0.0 for one in found), DELTA),
            theirs.epsilon_from_gdp(ERROR, DELTA),
        )


def guessed(drawn: Drawn, threshold: float, bound: Bound, error: float) -> float:
    """The bound when all canaries whose score reaches the threshold are said to have been in."""
    guesses, right = int((drawn.scores >= threshold).sum()), int((drawn.inside >= threshold).sum())
    return bound(len(drawn.scores), guesses, right, DELTA, 1 - error) if guesses else 0.0


def compared(seeds: int) -> dict[str, list[Pair]]:
    """By statistic, on all shapes of scores."""
    found: dict[str, list[Pair]] = {}
    for shape in SHAPES:
        for seed in range(seeds):
            for pair in shared(draw(shape, seed), exact=shape == "yes or no"):
                found.setdefault(pair.statistic, []).append(pair)
    return found


PROCEDURES: Final[dict[str, tuple[Callable[[Drawn], float], Callable[[Drawn], float]]]] = {
    "ε, one run": (
        lambda drawn: canaries.audit(drawn.scores, drawn.included, delta=DELTA).epsilon,
        lambda drawn: drawn.theirs.epsilon_one_run(ERROR, DELTA),
    ),
    "ε, one run, Gaussian DP": (
        lambda drawn: canaries.audit(drawn.scores, drawn.included, delta=DELTA, claim="Gaussian DP").epsilon,
        lambda drawn: drawn.theirs.epsilon_one_run_fdp(ERROR, DELTA),
    ),
    "ε, Clopper–Pearson": (
        lambda drawn: releases.audit(drawn.inside, drawn.outside, delta=DELTA).epsilon,
        lambda drawn: drawn.theirs.epsilon_clopper_pearson(ERROR, DELTA, one_sided=False),
    ),
    "ε, Clopper–Pearson, Gaussian DP": (
        lambda drawn: releases.audit(drawn.inside, drawn.outside, delta=DELTA, claim="Gaussian DP").epsilon,
        lambda drawn: drawn.theirs.epsilon_from_gdp(ERROR, DELTA),
    ),
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a procedure of both sides, each with its own choice of thresholds, comes to on scores of one shape."""

    procedure: str
    shape: str
    ours: list[float]
    theirs: list[float]


def recommended(shape: str, seeds: int) -> list[Bounds]:
    drawn = [draw(shape, seed) for seed in range(seeds)]
    return [
        Bounds(name, shape, [ours(one) for one in drawn], [float(theirs(one)) for one in drawn])
        for name, (ours, theirs) in PROCEDURES.items()
    ]


def report(pairs: dict[str, list[Pair]], chance: list[Bounds], leaks: dict[str, list[Bounds]]) -> bool:
    """Print the tables. Returns whether all that must hold does."""
    print("| statistic | compared | ours, least to most | furthest apart |\n|---|---|---|---|")
    for name, found in pairs.items():
        ours = [pair.ours for pair in found]
        apart = max(pair.apart for pair in found)
        print(f"| {name} | {len(found)} | {min(ours):.3f} to {max(ours):.3f} | {apart:.0e} |")
    furthest = max(pair.apart for found in pairs.values() for pair in found)
    seeds = len(chance[0].ours)
    allowed = int(binom.ppf(0.99, seeds, ERROR))
    print(f"\n| procedure | bounds above 0 at chance, of {seeds}: ours, theirs | highest of them |", end="")
    print("".join(f" median, {shape} |" for shape in leaks) + "\n|---|---|---|" + "---|" * len(leaks))
    for row, bounds in enumerate(chance):
        cells = [
            f"{sum(bound > 0 for bound in bounds.ours)}, {sum(bound > 0 for bound in bounds.theirs)}",
            f"{max(bounds.ours):.2f}, {max(bounds.theirs):.2f}",
            *(f"{median(found[row].ours):.2f}, {median(found[row].theirs):.2f}" for found in leaks.values()),
        ]
        print(f"| {bounds.procedure} | " + " | ".join(cells) + " |")
    most = max(sum(bound > 0 for bound in bounds.ours) for bounds in chance)
    equal, honest = furthest <= WANTED, most <= allowed
    print(f"\n{'met' if equal else 'MISSED'}: statistics apart by {furthest:.0e} at most; wanted ≤ {WANTED:.0e}")
    print(f"{'met' if honest else 'MISSED'}: {most} false alarms of ours in {seeds} at most; wanted ≤ {allowed}")
    return equal and honest


def main(
    seeds: Annotated[int, typer.Option(min=20, help="Of the scores at chance; a tenth for the others.")] = 200,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
) -> None:
    machine = (
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"jax-privacy {version('jax-privacy')}, scikit-learn {version('scikit-learn')}, numpy {version('numpy')}, "
        f"scipy {version('scipy')}"
    )
    print(f"{machine}; {CANARIES:,} canaries, each in by a coin; {1 - ERROR:.0%}, δ = {DELTA:g}\n")
    pairs = compared(seeds // 10)
    chance = recommended("chance", seeds)
    leaks = {shape: recommended(shape, seeds // 10) for shape in SHAPES if shape != "chance"}
    met = report(pairs, chance, leaks)
    if json_file is not None:
        document = {
            "machine": machine,
            "shared": {name: [asdict(pair) for pair in found] for name, found in pairs.items()},
            "chance": [asdict(one) for one in chance],
            "leaks": {shape: [asdict(one) for one in found] for shape, found in leaks.items()},
        }
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    raise typer.Exit(0 if met else 1)


if __name__ == "__main__":
    typer.run(main)
