"""What a client adds to a sum and what the sum says, without masks: those cancel out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.coordinator import plans
from farfield.protocols import summing
from farfield.protocols.errors import MalformedMessage, PrivacyError, SecAggError, WireError
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.mechanism import ClientMechanism, mechanism
from farfield.protocols.randomness import Randomness
from farfield.protocols.secagg import fixedpoint
from farfield.protocols.summing import LOSS_UNIT, FixedPoint, Layout, Noised, Part, Shapes, Subject, Sum, layout

SHAPES: Shapes = {"a": (2, 3), "b": (), "c": (4,)}
KEY = bytes(range(32))
CLIENT = (
    '[aggregation]\nweighting = "uniform"\n[privacy]\nkind = "client"\nnoise_multiplier = 1.0\nclipping_norm = 2.0\n'
)
ADAPTIVE = 'clipping = "adaptive"\ncount_noise = 4.0\n'
DISTRIBUTED = 'noise = "distributed"\n'


def plan_of(extra: str = "") -> Plan:
    text = '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "lora"\n[training]\nrounds = 3\nsteps = 1\n'
    return plans.parse(text + extra)


def subject(plan: Plan, ranges: tuple[float, ...] = (1.0, 0.5, 2.0), **changes: Any) -> Subject:
    norm = plan.privacy.clipping_norm if plan.privacy.kind == "client" else None
    told: dict[str, Any] = {"purpose": "train", "clipping_norm": norm, "ranges": ranges}
    return Subject(bytes.fromhex(plan.digest), b"backbone", b"frozen", adapter=b"adapter", **told | changes)


def laid_out(plan: Plan, clients: int, shapes: Shapes = SHAPES, **changes: Any) -> Layout:
    return layout(plan, subject(plan, **changes), shapes, clients, summing.smallest_sum(plan, clients))


def added(one: Layout, parts: list[Part]) -> Sum:
    """What the sum of these parts says, summed as masked vectors are."""
    total = fixedpoint.zeros(one.length, one.modulus_bits)
    for part in parts:
        vector = one.pack(part, Randomness())
        assert vector.dtype == total.dtype
        fixedpoint.accumulate(total, fixedpoint.pack(vector, one.modulus_bits), one.modulus_bits)
    return one.read(total, len(parts))


def update(seed: int, scale: float = 1.0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {name: np.asarray(random.normal(0, scale, shape), np.float32) for name, shape in SHAPES.items()}


def rounding(plan: Plan, clients: int, limit: float, weight: float) -> float:
    """How far the sum of `clients` values can be off: a level each, and float32's own rounding of the product."""
    _, levels = fixedpoint.choose_modulus(clients, plan.protection.bits)
    return clients * weight * limit * (1 / levels + 2.0**-21)


@settings(max_examples=60)
@given(
    st.sampled_from(["examples", "uniform"]),
    st.integers(4, 24),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 2**40), st.floats(0, 1e6)), min_size=3, max_size=9),
    st.integers(0, 2**31),
)
def test_the_sum_is_the_weighted_one(
    weighting: str, bits: int, counts: list[tuple[int, int, float]], seed: int
) -> None:
    """Values within the argued rounding, beyond the range cut to it; counts exactly, losses to half their unit each."""
    plan = plan_of(f'[aggregation]\nweighting = "{weighting}"\n[protection]\nbits = {bits}\nweight_limit = 1000\n')
    ranges = {"a": 1.0, "b": 0.5, "c": 2.0}
    parts = [
        Part(update(seed + at), examples, targets, loss, steps=at, correct=3)
        for at, (examples, targets, loss) in enumerate(counts)
    ]
    total = added(laid_out(plan, len(parts)), parts)
    weights = [min(part.examples, 1000) if weighting == "examples" else 1 for part in parts]
    for name, limit in ranges.items():
        wanted = sum(
            weight * np.clip(part.update[name].astype(np.float64), -limit, limit)
            for weight, part in zip(weights, parts, strict=True)
        )
        assert total.update[name].shape == SHAPES[name]
        atol = rounding(plan, len(parts), limit, 1000 if weighting == "examples" else 1)
        np.testing.assert_allclose(total.update[name], wanted, rtol=0, atol=atol)
    assert total.weight == sum(weights)
    assert (total.examples, total.targets) == (sum(c[0] for c in counts), sum(c[1] for c in counts))
    assert total.steps == sum(range(len(parts)))
    assert total.correct == 0, "a round that trains has no hits"
    assert total.loss == pytest.approx(sum(c[2] for c in counts), rel=0, abs=len(parts) * LOSS_UNIT * 0.51)
    assert total.mark.size == 0


def test_the_weight_limit_bounds_what_a_large_client_counts() -> None:
    plan = plan_of("[protection]\nweight_limit = 100\n")
    small, large = update(0, 0.1), update(1, 0.1)
    total = added(laid_out(plan, 3), [Part(small, 50), Part(small, 50), Part(large, 10**6)])
    assert (total.weight, total.examples) == (200.0, 1_000_100)
    wanted = 100 * small["a"].astype(np.float64) + 100 * large["a"]
    np.testing.assert_allclose(total.update["a"], wanted, rtol=0, atol=rounding(plan, 3, 1.0, 100))


def test_a_mean_of_many_small_clients_is_not_lost_in_rounding() -> None:
    """With 16 bits for values and a weight limit of 4096: forty examples must still have a voice."""
    plan = plan_of()
    updates = [update(seed, 0.1) for seed in range(20)]
    one = laid_out(plan, 20)
    total = added(one, [Part(change, 40) for change in updates])
    mean = np.mean([change["a"] for change in updates], axis=0, dtype=np.float64)
    assert np.abs(total.update["a"] / total.weight - mean).max() < 1e-3


def test_a_round_that_evaluates_has_counts_alone() -> None:
    plan = plan_of()
    one = laid_out(plan, 3, {}, ranges=(), purpose="evaluate")
    total = added(one, [Part({}, 5, 40, 12.5, correct=7), Part(), Part({}, 1, 9, 0.25, correct=2)])
    assert (total.examples, total.targets, total.loss, total.correct) == (6, 49, 12.75, 9)
    assert not total.update
    assert one.length < 20


@pytest.mark.parametrize("extra", ["", ADAPTIVE, DISTRIBUTED, DISTRIBUTED + ADAPTIVE])
def test_for_whole_clients_no_count_travels(extra: str) -> None:
    """Two clients with the same update add the same words, however many examples, targets and steps they had."""
    plan = plan_of(CLIENT + extra)
    one = laid_out(plan, 4)
    few, many = (one.pack(Part(update(0, 0.1), n, n, n, n, n), Randomness(KEY)) for n in (1, 10**6))
    np.testing.assert_array_equal(few, many)
    total = added(one, [Part(update(seed, 0.1), 7, 7, 7.0, 7, 7) for seed in range(4)])
    assert (total.examples, total.targets, total.loss, total.steps, total.correct) == (0, 0, 0.0, 0, 0)
    assert total.weight == 4
    assert one.length == 11 + total.mark.size


@pytest.mark.parametrize("noise", ["", DISTRIBUTED])
def test_the_marks_say_how_many_were_clipped(noise: str) -> None:
    """Of ten, three; with noise in shares the answer has its noise, of `count_noise` clients."""
    plan = plan_of(CLIENT + noise + ADAPTIVE)
    made = mechanism(plan)
    assert isinstance(made, ClientMechanism)
    assert made.counted is not None
    total = added(laid_out(plan, 10), [Part(update(seed, 0.1), clipped=seed < 3) for seed in range(10)])
    assert total.mark.size > 0
    share = made.counted.share_within(total.mark, 10, 2.0)
    assert share == pytest.approx(0.7, abs=2.5 if noise else 1e-3)  # six times 4.0 / 10


def test_without_adaptive_clipping_nothing_is_marked() -> None:
    one = laid_out(plan_of(CLIENT), 4)
    for clipped in (False, True):
        assert added(one, [Part(update(0, 0.1), clipped=clipped)] * 4).mark.size == 0


def test_rounding_is_told_as_slack_and_keeps_within_it() -> None:
    """What one client adds, as it reads back, is no longer than its update and the slack together."""
    plan = plan_of(CLIENT + "[protection]\nbits = 6\n")
    one = laid_out(plan, 3)
    for seed in range(50):
        change = update(seed, 0.4)
        change = {name: np.clip(value, -0.5, 0.5) for name, value in change.items()}
        total = one.read(one.pack(Part(change), Randomness()), 1)
        before, after = (
            math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in state.values()))
            for state in (change, total.update)
        )
        assert 0 < total.slack < 0.5
        assert after <= before + total.slack


@pytest.mark.parametrize("clients", [3, 12])
def test_noise_in_shares_is_there_and_of_the_right_size(clients: int) -> None:
    """Standard deviation z·C = 2 on every value of the sum, and a little more for the clients that may drop out."""
    plan = plan_of(CLIENT + DISTRIBUTED)
    shapes = {"a": (3000,)}
    one = layout(plan, subject(plan, (1.0,)), shapes, clients, summing.smallest_sum(plan, clients))
    assert isinstance(one, Noised)
    random = np.random.default_rng(3)
    parts = [Part({"a": np.asarray(random.normal(0, 0.03, 3000), np.float32)}) for _ in range(clients)]
    total = added(one, parts)
    wanted = sum(part.update["a"].astype(np.float64) for part in parts)
    noise = total.update["a"] - wanted
    assert abs(noise.mean()) < 6 * noise.std() / math.sqrt(3000)
    # The shares are made for the fewest whose sum is opened, and here nobody is missing.
    least = 2.0 * math.sqrt(clients / summing.smallest_sum(plan, clients))
    assert least * 0.93 < noise.std() < least * 1.5
    assert total.weight == clients


@pytest.mark.parametrize(
    ("clients", "bits", "modulus"), [(3, 14, 16), (3, 16, 24), (256, 16, 24), (258, 16, 32), (256, 24, 32)]
)
def test_the_modulus_is_the_smallest_that_holds_the_cohort(clients: int, bits: int, modulus: int) -> None:
    plan = plan_of(f"[protection]\nbits = {bits}\n")
    assert laid_out(plan, clients).modulus_bits == modulus


def test_what_cannot_be_added_up_is_refused() -> None:
    plan = plan_of("[protection]\nbits = 24\n")
    with pytest.raises(SecAggError, match="does not fit into 32 bits"):
        laid_out(plan, 258)
    with pytest.raises(SecAggError, match="ranges for 2 tensors, and the update has 3"):
        laid_out(plan, 3, ranges=(1.0, 1.0))
    with pytest.raises(SecAggError, match="ranges for 3 tensors, and the update has 0"):
        laid_out(plan, 3, {}, purpose="evaluate")
    with pytest.raises(SecAggError, match="without the norm that bounds them"):
        laid_out(plan_of(CLIENT), 3, clipping_norm=None)
    with pytest.raises(PrivacyError):
        strong = plan_of(CLIENT.replace("1.0", "1e9", 1) + DISTRIBUTED)
        laid_out(strong, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        Part({name: value for name, value in update(0).items() if name != "c"}, 1),
        Part(update(0) | {"d": np.zeros(1, np.float32)}, 1),
        Part(update(0) | {"a": np.zeros((3, 2), np.float32)}, 1),
        Part(update(0) | {"a": np.full((2, 3), np.nan, np.float32)}, 1),
        Part(update(0) | {"a": np.full((2, 3), np.inf, np.float32)}, 1),
    ],
    ids=["less", "more", "shape", "nan", "inf"],
)
@pytest.mark.parametrize("extra", ["", CLIENT, CLIENT + DISTRIBUTED])
def test_a_part_that_does_not_fit_is_not_packed(extra: str, wrong: Part) -> None:
    one = laid_out(plan_of(extra), 3)
    with pytest.raises((SecAggError, PrivacyError)):
        one.pack(wrong, Randomness())


@pytest.mark.parametrize("loss", [math.nan, math.inf, -1.0, 1e300])
def test_a_loss_that_no_sum_has_room_for_is_an_error_of_the_aggregation(loss: float) -> None:
    """A model that diverged measures such losses: the client drops out, and no process ends."""
    one = laid_out(plan_of(), 3, {}, ranges=(), purpose="evaluate")
    with pytest.raises(SecAggError, match="loss"):
        one.pack(Part({}, 1, 1, loss), Randomness())


def test_a_count_that_no_sum_has_room_for() -> None:
    one = laid_out(plan_of(), 3, {}, ranges=(), purpose="evaluate")
    assert added(one, [Part({}, 2**48 - 1)] * 3).examples == 3 * (2**48 - 1)
    for examples in (2**48, -1):
        with pytest.raises(SecAggError, match=f"a count of {examples} examples"):
            one.pack(Part({}, examples), Randomness())


@given(
    st.tuples(*[st.binary(max_size=40)] * 4),
    st.sampled_from(["train", "evaluate"]),
    st.none() | st.floats(1e-300, 1e300),
    st.lists(st.floats(1e-300, 1e300), max_size=5),
)
def test_a_subject_reads_back(texts: tuple[bytes, ...], purpose: Any, norm: float | None, ranges: list[float]) -> None:
    plan, backbone, frozen, adapter = texts
    one = Subject(plan, backbone, frozen, purpose, adapter, norm, tuple(ranges))
    assert Subject.decode(one.encode()) == one
    assert Subject.decode(one.encode()).digest == one.digest


@pytest.mark.parametrize(
    "change",
    [
        {"plan": b"other"},
        {"backbone": b"other"},
        {"frozen": b"other"},
        {"purpose": "evaluate"},
        {"adapter": b"other"},
        {"clipping_norm": None},
        {"clipping_norm": math.nextafter(2.0, 3)},
        {"ranges": (1.0, 0.5)},
        {"ranges": (0.5, 1.0, 2.0)},
        {"ranges": (1.0, 0.5, math.nextafter(2.0, 3))},
    ],
    ids=str,
)
def test_all_of_a_subject_is_in_its_digest(change: dict[str, Any]) -> None:
    one = subject(plan_of(CLIENT))
    assert replace(one, **change).digest != one.digest


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_subject_without_meaning_is_malformed(bad: float) -> None:
    one = subject(plan_of(CLIENT))
    for wrong in (replace(one, ranges=(1.0, bad)), replace(one, clipping_norm=bad)):
        with pytest.raises(MalformedMessage, match="a range of"):
            Subject.decode(wrong.encode())
    with pytest.raises(MalformedMessage, match="for no known purpose"):
        Subject.decode(replace(one, purpose="export").encode())  # type: ignore[arg-type]


@given(st.binary(max_size=200))
def test_bytes_from_nowhere_are_a_wire_error_or_a_subject(raw: bytes) -> None:
    try:
        one = Subject.decode(raw)
    except WireError:
        return
    assert all(0 < value < math.inf for value in one.ranges)


def test_the_smallest_sum_is_two_thirds_and_no_less_than_hides_or_the_plan_wants() -> None:
    plan = plan_of()
    assert [summing.smallest_sum(plan, clients) for clients in (3, 4, 6, 50, 100)] == [3, 3, 4, 34, 67]
    assert summing.smallest_sum(plan_of("[cohort]\nminimum = 5\n"), 6) == 5


def test_a_layout_follows_from_public_values_alone() -> None:
    """Client and coordinator compute it apart, the one from the subject that came over the wire."""
    plan = plan_of(CLIENT + ADAPTIVE)
    one = subject(plan, (1 / 3, 0.1, 2.7))
    mine = layout(plan, one, SHAPES, 5, 4)
    theirs = layout(plan, Subject.decode(one.encode()), dict(reversed(list(SHAPES.items()))), 5, 4)
    assert isinstance(mine, FixedPoint)
    vectors = [each.pack(Part(update(0, 0.1)), Randomness(KEY)) for each in (mine, theirs)]
    np.testing.assert_array_equal(vectors[0], vectors[1])
