"""Is the noise what the ledger says? The code that makes a Plan's noise, run some thousand times by itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue
from scipy.special import bdtr, bdtrc, chdtr, chdtrc, ndtri

from farfield.protocols.audit.finding import Axis, Figure, Finding, Interval, Plot, Series, Table
from farfield.protocols.audit.noise import NoiseComparison, compare_noise
from farfield.protocols.audit.releases import Claim, ReleaseBound, audit
from farfield.protocols.audit.whiteness import whiteness
from farfield.protocols.errors import PrivacyError
from farfield.protocols.plan import Plan
from farfield.protocols.privacy import clipping
from farfield.protocols.privacy.accounting import Gaussian, Release, spent
from farfield.protocols.privacy.mechanism import ClientMechanism, ExampleMechanism, mechanism, promised
from farfield.protocols.seeds import derive
from farfield.protocols.summing import Part
from farfield.protocols.tensors import State

from .attack import Attack, Attacker, register
from .noisy import EXAMPLES, Examples, Source, source
from .staged import cohort
from .subject import Member, Subject

LEVEL: Final = 0.01
"""With noise that is as it has to be, the whole test fails at most so often."""

TESTS: Final = 12
"""No Plan has more tests than this, so each of them fails at most with a `TESTS`-th of `LEVEL` (Bonferroni)."""

VALUES: Final = 400_000
"""Values of noise that are looked at; a standard deviation is known to a thousandth of itself then."""

RELEASES: Final = 2000
"""Releases with a canary, and as many without, for a bound on ε."""

ROUNDS: Final = 2
"""Rounds of a federation whose clients change nothing."""

_WIDE: Final = 1024
"""Values of a release with a canary in it; it is spread over all of them."""

_EACH: Final = LEVEL / TESTS


@dataclass(frozen=True, slots=True)
class _Check:
    """One test, and whether it is as it has to be.

    Attributes:
        p: how likely it would be at least as far from that by chance; None where chance has no part in it.
    """

    name: str
    passed: bool
    said: str
    p: float | None = None


@register
@final
class Mechanism(Attack):
    """Runs what makes the noise, with nothing under it and with a canary, and tests what comes out."""

    name: ClassVar[str] = "mechanism"
    title: ClassVar[str] = "Mechanism test"
    attacker: ClassVar[Attacker] = Attacker.COORDINATOR
    cost: ClassVar[str] = "some ten seconds"
    place: ClassVar[int] = 20

    def unfit(self, subject: Subject) -> str | None:
        if subject.plan.privacy.kind == "none":
            return 'the Plan has privacy.kind = "none", so there is no noise to test'
        return None

    def run(self, subject: Subject) -> Finding:
        plan = subject.plan
        made = mechanism(plan)
        assert made is not None
        clients = cohort(plan, None if subject.federation is None else len(subject.clients))
        random = np.random.default_rng(derive(subject.seed, "mechanism"))
        size = sum(values.size for values in subject.initial.values())

        subject.say("drawing noise", 0, 4)
        wide = source(plan, min(size, VALUES // 64), clients)
        noise = wide.noise(max(64, min(RELEASES, VALUES // wide.dimension)), random)
        compared = compare_noise(noise.reshape(-1), wide.claimed, 1 - _EACH)
        checks = [*_size_and_shape(wide, compared), *_fresh(noise), *_counted(made, wide, noise, clients)]

        subject.say("releasing with a canary and without", 1, 4)
        narrow = source(plan, min(size, _values_for(plan)), clients)
        canary = _direction(narrow, random)
        bounds = _bounds(subject, made, narrow, canary)
        checks += [_within(one) for one in bounds]

        subject.say("clipping what ought not to be", 2, 4)
        if isinstance(narrow, Examples):
            checks += [_clipped_examples(narrow, canary), *_sampled(narrow, made)]
        else:
            checks.append(_clipped_updates(narrow.norm, random))
            subject.say("a federation whose clients change nothing", 3, 4)
            checks += _federated(subject, made, wide)
        return self._finding(subject, made, wide, noise, compared, bounds, checks)

    def _finding(
        self,
        subject: Subject,
        made: ExampleMechanism | ClientMechanism,
        wide: Source,
        noise: NDArray[np.float64],
        compared: NoiseComparison,
        bounds: list[_Bound],
        checks: list[_Check],
    ) -> Finding:
        failed = [one for one in checks if not one.passed]
        whole = promised(subject.plan)
        assert whole is not None
        ratio = compared.deviation.value / wide.unit
        return Finding(
            attack=self.name,
            title=self.title,
            attacker=self.attacker,
            verdict="failed" if failed else "passed",
            tried=(
                _how(made),
                f"{len(noise):,} releases of a sum of zeros were made, {noise.size:,} values of noise in all, and "
                "their size, their distribution and their independence were tested.",
                f"Then {RELEASES:,} releases with one canary and as many without were told apart as well as can be, "
                "which gives a lower bound on the ε of one release.",
                "Inputs that try to get past the clipping were put in: huge and tiny ones, infinities and no numbers.",
            ),
            found=(
                *(f"Not as it has to be. {one.name}: {one.said}." for one in failed),
                f"{len(checks) - len(failed)} of {len(checks)} tests came out as they have to.",
                f"The noise has {ratio:.4f} times the standard deviation that the ledger counts on.",
                *(one.sentence for one in bounds),
                f"For the whole run the ledger claims ε = {whole.epsilon:.3g} at δ = {whole.delta:g}, by "
                f"{whole.accountant}; that was not measured here, and follows from the noise of one release.",
            ),
            limits=(
                "It is a test of the code that makes the noise, on this machine. It does not show that the coordinator "
                "or a client of a deployment runs that code, nor that the accountant adds up correctly.",
                f"With noise as it has to be, one of the tests fails with a probability of {LEVEL:.0%} at most, all of "
                "them together.",
                *_trust(made),
            ),
            figures=(
                Figure(
                    name="noise, as a multiple of what the ledger counts on",
                    value=ratio,
                    interval=Interval(
                        low=compared.deviation.low / wide.unit,
                        high=compared.deviation.high / wide.unit,
                        confidence=compared.deviation.confidence,
                    ),
                    claimed=1.0,
                    note="1 or a little more: rounding has to be hidden too",
                    headline=True,
                ),
                *(one.figure for one in bounds),
                Figure(name="ε of the whole run", value=None, claimed=whole.epsilon, note="claimed, not measured here"),
            ),
            plots=(_quantiles(noise, wide.unit),),
            tables=(
                Table(
                    title="Tests",
                    columns=("test", "as it has to be", "p-value", "what came out"),
                    rows=tuple(
                        (one.name, "yes" if one.passed else "NO", "" if one.p is None else f"{one.p:.3g}", one.said)
                        for one in checks
                    ),
                    caption=f"A test whose p-value is below {_EACH:.2g} fails, but for size and distribution, each of "
                    "which has half of that.",
                ),
            ),
            data={
                "deviation": compared.deviation.value,
                "deviation by the ledger": wide.unit,
                "values": noise.size,
                "whole": {"epsilon": whole.epsilon, "delta": whole.delta, "accountant": whole.accountant},
                "scores": {one.name: {"with": _short(one.inside), "without": _short(one.outside)} for one in bounds},
            },
        )


def _short(scores: NDArray[np.float64]) -> list[JsonValue]:
    return [float(f"{one:.6g}") for one in scores]


def _how(made: ExampleMechanism | ClientMechanism) -> str:
    if isinstance(made, ExampleMechanism):
        return (
            "The optimiser of DP-SGD that a client trains with was given gradients of made-up examples, with the "
            "Plan's noise multiplier, clipping norm and sampling rate, and its noisy sums were read."
        )
    if made.noise == "central":
        return "Made-up updates were clipped and summed as the Plan has it, and noise put on the sum."
    return "Made-up updates were clipped and given noise in shares as clients do it, and these were summed."


def _trust(made: ExampleMechanism | ClientMechanism) -> tuple[str, ...]:
    if isinstance(made, ExampleMechanism):
        return (
            "Each client adds the noise for its own examples, and sees to it that its batches are drawn in secret.",
        )
    if made.noise == "central":
        return ("The coordinator adds the noise: it has to be trusted with that, and with the sum before.",)
    return ("Clients add the noise; it was tested for as few honest ones as the ledger counts on.",)


# --- the noise by itself ----------------------------------------------------------------------------------------------


def _size_and_shape(wide: Source, compared: NoiseComparison) -> Iterable[_Check]:
    half = _EACH / 2
    size = compared.deviation
    yield _Check(
        "size of the noise",
        compared.size_p >= half and wide.claimed >= wide.unit * (1 - 1e-9),
        f"standard deviation {size.value:.6g} ({size.low:.6g} to {size.high:.6g}), and {wide.claimed:.6g} is meant",
        compared.size_p,
    )
    yield _Check(
        "distribution of the noise",
        compared.shape_p >= half,
        "as a normal one's" if compared.shape_p >= half else "not as a normal one's",
        compared.shape_p,
    )


def _fresh(noise: NDArray[np.float64]) -> Iterable[_Check]:
    found = whiteness(noise)
    yield _Check(
        "values are drawn independently",
        found.distance_p >= _EACH,
        f"the largest correlation is {found.likeness:+.5f}, of values {found.distance:,} apart",
        found.distance_p,
    )
    yield _Check(
        "noise is drawn afresh for every release",
        found.pair_p >= _EACH,
        f"the two releases most alike have a correlation of {found.pair_likeness:+.5f}",
        found.pair_p,
    )


def _counted(
    made: ExampleMechanism | ClientMechanism, wide: Source, noise: NDArray[np.float64], clients: int
) -> Iterable[_Check]:
    """The noise on the count that an adaptive clipping norm follows."""
    counted = made.counted if isinstance(made, ClientMechanism) else None
    if counted is None:
        return
    shares = [counted.share_within(row[wide.dimension :], clients, wide.norm) - 0.5 for row in noise]
    meant = counted.count_noise / clients * wide.claimed / wide.unit
    compared = compare_noise(shares, meant, 1 - _EACH)
    yield _Check(
        "noise on the count of clipped updates",
        not compared.refused,
        f"standard deviation {compared.deviation.value * clients:.4g} clients, and {meant * clients:.4g} are meant",
        min(compared.size_p, compared.shape_p),
    )


# --- a canary ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Bound:
    """A lower bound on the ε of one release, beside what the ledger says of it.

    Attributes:
        found: at 95 %, for a report.
        strict: at the level of a test.
        inside, outside: the score of each release with the canary, and without.
    """

    name: str
    found: ReleaseBound
    strict: ReleaseBound
    claimed: float
    inside: NDArray[np.float64]
    outside: NDArray[np.float64]

    @property
    def sentence(self) -> str:
        return (
            f"The {self.name} is at least {self.found.epsilon:.3g}, with a confidence of {self.found.confidence:.0%}, "
            f"by {RELEASES // 2:,} releases of either kind; so many could have shown {self.found.ceiling:.3g} at "
            f"most. The ledger says {self.claimed:.3g}."
        )

    @property
    def figure(self) -> Figure:
        return Figure(
            name=self.name,
            value=self.found.epsilon,
            interval=Interval(low=self.found.epsilon, confidence=self.found.confidence),
            chance=0.0,
            ceiling=self.found.ceiling,
            claimed=self.claimed,
            note=f"lower bound at δ = {self.found.delta:g}; assumes {self.found.claim}",
            headline=True,
        )


def _values_for(plan: Plan) -> int:
    """Over so many values a canary has to be spread so that the range of a masked value cuts none of them."""
    if plan.privacy.kind == "example" or plan.protection.kind != "secagg" or plan.value_range is None:
        return _WIDE
    return min(8 * _WIDE, max(_WIDE, math.ceil((plan.privacy.clipping_norm / plan.value_range) ** 2)))


def _direction(narrow: Source, random: np.random.Generator) -> NDArray[np.float32]:
    """A canary of the clipping norm, or a rounding less, spread over all values."""
    signs = random.choice([-1.0, 1.0], narrow.dimension)
    return (signs * narrow.norm / math.sqrt(narrow.dimension) * (1 - 2.0**-20)).astype(np.float32)


def _bounds(
    subject: Subject, made: ExampleMechanism | ClientMechanism, narrow: Source, canary: NDArray[np.float32]
) -> list[_Bound]:
    direction = canary / np.linalg.norm(canary)

    def score(there: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.array([narrow.release(canary if one else None)[: narrow.dimension] @ direction for one in there])

    always, never = np.ones(RELEASES, np.bool_), np.zeros(RELEASES, np.bool_)
    inside, outside = score(always), score(never)
    if not isinstance(narrow, Examples):
        return [_bound("ε of one release", "Gaussian DP", made.release, subject, inside, outside)]
    whole = Gaussian(made.noise_multiplier)
    found = [_bound("ε of one step that the canary is in", "Gaussian DP", whole, subject, inside, outside)]
    if made.release != whole:
        drawn = score(narrow.batches(RELEASES)[:, 0])
        name = "ε of one step whose batch is drawn"
        found.append(_bound(name, "(ε, δ)-DP", made.release, subject, drawn, score(never)))
    return found


def _bound(
    name: str,
    claim: Claim,
    release: Release,
    subject: Subject,
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
) -> _Bound:
    delta = subject.plan.privacy.delta
    found, strict = (
        audit(inside, outside, delta=delta, claim=claim, confidence=confidence) for confidence in (0.95, 1 - _EACH)
    )
    return _Bound(name, found, strict, spent({release: 1}, delta).epsilon, inside, outside)


def _within(bound: _Bound) -> _Check:
    return _Check(
        f"{bound.name} against the ledger's",
        bound.strict.epsilon <= bound.claimed,
        f"at least {bound.strict.epsilon:.4g} at {1 - _EACH:.2%}, and {bound.claimed:.4g} is claimed",
    )


# --- clipping and sampling --------------------------------------------------------------------------------------------


def _hostile(dimension: int, norm: float) -> dict[str, NDArray[np.float32]]:
    """Vectors that try to be longer than `norm` afterwards, all of them finite."""
    one = np.zeros(dimension, np.float32)
    one[-1] = norm * 3
    just = np.full(dimension, norm / math.sqrt(dimension), np.float32)
    return {
        "huge": np.full(dimension, 1e38, np.float32),
        "of one value": one,
        "tiny": np.full(dimension, 1e-42, np.float32),
        "as long as is allowed": just,
        "a little longer": np.nextafter(just, np.float32(np.inf)),
        "much longer": 100 * just,
        "of all sizes": np.geomspace(1e-38, 1e38, dimension).astype(np.float32),
    }


def _longest(vectors: Iterable[NDArray[np.floating[Any]]]) -> float:
    return max(float(np.linalg.norm(one.astype(np.longdouble))) for one in vectors)


def _clipped_examples(narrow: Examples, canary: NDArray[np.float32]) -> _Check:
    """By what one example changes the sum of a batch that others are in, at most."""
    others = np.stack([np.roll(canary, place) for place in range(8)])
    before = narrow.clipped(others)
    hostile = _hostile(narrow.dimension, narrow.norm)
    hostile |= {"no number": np.full(narrow.dimension, np.nan, np.float32)}
    hostile |= {"infinite": np.full(narrow.dimension, np.inf, np.float32)}
    changes = [narrow.clipped(np.concatenate([others, one[None]])) - before for one in hostile.values()]
    changes += [narrow.clipped(one[None]) for one in hostile.values()]
    # Sums of float32 round by 2⁻¹³ of the norm at most, and the noise is larger by that.
    return _bounded(_longest(changes), narrow.norm, len(hostile), 2.0**-13)


def _clipped_updates(norm: float, random: np.random.Generator) -> _Check:
    hostile = _hostile(_WIDE, norm)
    hostile["random"] = random.standard_normal(_WIDE).astype(np.float32)
    clipped = []
    for one in hostile.values():
        update, _ = clipping.clip({"a": one[:100], "b": one[100:]}, norm)
        clipped.append(np.concatenate([update["a"], update["b"]]))
    taken = []
    for wrong in (math.nan, math.inf, -math.inf):
        try:
            clipping.clip({"a": np.array([0.0, wrong], np.float32)}, norm)
        except PrivacyError:
            continue
        taken.append(str(wrong))
    check = _bounded(_longest(clipped), norm, len(hostile) + 3)
    if taken:
        return _Check(check.name, False, f"an update with {', '.join(taken)} in it was taken")
    return check


def _bounded(longest: float, norm: float, tried: int, rounding: float = 0.0) -> _Check:
    return _Check(
        "clipping bounds what goes in",
        bool(longest <= norm * (1 + rounding)),
        f"of {tried} inputs the largest contribution had {longest / norm:.8f} times the clipping norm",
    )


def _sampled(narrow: Examples, made: ExampleMechanism | ClientMechanism) -> Iterable[_Check]:
    """Whether each example is in a batch by itself, as often as is claimed."""
    assert isinstance(made, ExampleMechanism)
    rate = made.sampling_rate
    if rate == 1:
        return
    there = narrow.batches(RELEASES)
    drawn = int(there.sum())
    p = min(1.0, 2 * min(float(bdtr(drawn, there.size, rate)), float(bdtrc(drawn - 1, there.size, rate))))
    yield _Check(
        "how often an example is in a batch",
        p >= _EACH,
        f"{drawn / there.size:.5f}, and {rate:g} is claimed",
        p,
    )
    square = float(np.square(there.sum(axis=1) - EXAMPLES * rate).sum()) / (EXAMPLES * rate * (1 - rate))
    p = min(1.0, 2 * min(float(chdtr(RELEASES, square)), float(chdtrc(RELEASES, square))))
    yield _Check(
        "examples are drawn one by one",
        p >= _EACH / 2,
        f"sizes of batches vary {square / RELEASES:.4f} times as much as independent draws do",
        p,
    )


# --- a federation -----------------------------------------------------------------------------------------------------


def _federated(subject: Subject, made: ExampleMechanism | ClientMechanism, wide: Source) -> Iterable[_Check]:
    """What a coordinator releases of clients whose updates are zeros: its own noise and nothing else."""
    if subject.federation is None or subject.plan.aggregation.rule != "mean":
        return
    plan = subject.variant(
        training={"rounds": 1 if wide.marks else ROUNDS},  # an adaptive norm is known for the first only
        privacy={
            "target_epsilon": None,
            "noise_multiplier": made.noise_multiplier,
            "participations": None,
            "exact_evaluation": False,
        },
    )

    def nothing(number: int, adapter: State, honest: object) -> Part:
        return Part({name: np.zeros_like(values) for name, values in adapter.items()})

    members = {name: Member(read, nothing) for name, read in subject.clients.items()}
    course = subject.federation.run("mechanism", plan, members, subject.say)
    random = np.random.default_rng(derive(subject.seed, "mechanism", "federation"))
    rows = []
    for number in range(1, course.rounds + 1):
        released = course.aggregate(number)
        if released is None:
            continue
        summed = len(course.members(number))
        row = np.concatenate([released[name].reshape(-1) for name in sorted(released)]).astype(np.float64) * summed
        rows.append(row[: VALUES // ROUNDS])
    if not rows:
        yield _Check("noise on what a federation releases", False, "nothing was released")
        return
    noise = np.concatenate(rows)
    size = sum(values.size for values in subject.initial.values())
    step = source(plan, size, cohort(plan, len(subject.clients))).step
    noise += step * (random.random(noise.size) - 0.5)
    compared = compare_noise(noise, wide.unit, 1 - _EACH)
    yield _Check(
        "noise on what a federation releases",
        not compared.too_small and compared.shape_p >= _EACH / 2,
        f"standard deviation {compared.deviation.value:.6g} on {len(rows)} sums of zeros, and the ledger counts on "
        f"{wide.unit:.6g}",
        compared.shape_p,
    )


def _quantiles(noise: NDArray[np.float64], unit: float) -> Plot:
    share = np.concatenate([[1e-4, 1e-3, 5e-3], np.linspace(0.01, 0.99, 99), [0.995, 0.999, 0.9999]])
    found = np.quantile(noise, share) / unit
    return Plot(
        title="Quantiles of the noise against those of a normal distribution",
        x=Axis(label="normal distribution (standard deviations)"),
        y=Axis(label="noise (standard deviations that the ledger counts on)"),
        series=(
            Series(
                label="noise",
                x=tuple(float(one) for one in ndtri(share)),
                y=tuple(float(one) for one in found),
                style="points",
            ),
        ),
        diagonal=True,
        caption="Points on the line: the noise is normal and of the size that the ledger counts on. A flatter row of "
        "points is noise that is too small.",
    )
