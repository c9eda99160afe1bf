"""From a sum to what is known of a round: noise exactly once, of the right size, and nothing where none is promised."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from farfield.coordinator import plans, releasing
from farfield.coordinator.aggregation.mean import WeightedMean
from farfield.coordinator.asking import Verdict
from farfield.coordinator.releasing import Aggregate, release
from farfield.coordinator.rounds import TrainingRound
from farfield.protocols.errors import PrivacyError
from farfield.protocols.messages import Reply, Trained
from farfield.protocols.plan import Plan
from farfield.protocols.privacy import central
from farfield.protocols.privacy.mechanism import ClientMechanism, mechanism
from farfield.protocols.randomness import Randomness
from farfield.protocols.summing import Sum
from farfield.protocols.tensors import State, pack_state

SIZE = 20_000
NODES = tuple(f"n{number}" for number in range(10))
CLIENT = """
[aggregation]
weighting = "uniform"
[privacy]
kind = "client"
noise_multiplier = 0.8
"""
EXAMPLE = """
[data]
packing = false
truncate = true
[privacy]
kind = "example"
noise_multiplier = 1
sampling_rate = 0.1
"""
ADAPTIVE = 'clipping = "adaptive"\ncount_noise = 4.0\n'


def plan_of(extra: str = CLIENT, protection: str = "secagg") -> Plan:
    text = '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "lora"\n[training]\nrounds = 3\nsteps = 1\n'
    return plans.parse(f'{text}[protection]\nkind = "{protection}"\n{extra}')


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The norm bound of every sum to which noise was added; the noise is the same in every run."""
    bounds: list[float] = []
    once = central.noised

    def noised(sums: Any, bound: float, *rest: Any, **named: Any) -> Any:
        bounds.append(bound)
        return once(sums, bound, *rest, **named)

    monkeypatch.setattr(central, "noised", noised)
    monkeypatch.setattr(releasing, "Randomness", lambda: Randomness(bytes(32)))
    return bounds


def released(plan: Plan, total: Sum, norm: float | None) -> Aggregate:
    return release(plan, WeightedMean(plan.aggregation), total, NODES, norm)


def summed(value: float = 3.0, **told: Any) -> Sum:
    return Sum({"a": np.full((SIZE // 2, 2), value), "b": np.full(SIZE, -value)}, 10.0, **told)


@pytest.mark.parametrize("norm", [1.0, 0.25])
def test_noise_is_added_once_to_the_sum_and_then_divided(counted: list[float], norm: float) -> None:
    """Deviation z·C on the sum of ten, so a tenth of it on the mean."""
    aggregate = released(plan_of(), summed(), norm)
    assert counted == [norm]
    for name, mean in (("a", 0.3), ("b", -0.3)):
        noise = (aggregate.update[name].astype(np.float64) - mean).ravel() / (0.8 * norm / 10)
        assert aggregate.update[name].dtype == np.float32
        assert stats.kstest(noise, "norm").pvalue > 1e-4
        assert stats.kstest(noise / math.sqrt(2), "norm").pvalue < 1e-12, "as if it were added twice"
    assert aggregate.update["a"].shape == (SIZE // 2, 2)
    assert (aggregate.loss, aggregate.within, aggregate.clients) == (None, None, NODES)


def test_rounding_that_lengthens_an_update_is_paid_for(counted: list[float]) -> None:
    aggregate = released(plan_of(), summed(slack=1.0), 1.0)
    noise = (aggregate.update["b"].astype(np.float64) + 0.3) / (0.8 * 2.0 / 10)
    assert stats.kstest(noise, "norm").pvalue > 1e-4
    assert len(counted) == 1


def test_noise_that_clients_added_gets_none_on_top(counted: list[float]) -> None:
    aggregate = released(plan_of(CLIENT + 'noise = "distributed"\n'), summed(), 1.0)
    assert counted == []
    np.testing.assert_allclose(aggregate.update["a"], 0.3, rtol=1e-6)


@pytest.mark.parametrize(
    "extra",
    [
        "",
        EXAMPLE,
    ],
)
def test_where_no_client_is_promised_anything_there_is_no_noise(counted: list[float], extra: str) -> None:
    told: dict[str, Any] = {"examples": 80, "targets": 50, "loss": 75.0, "steps": 20}
    aggregate = released(plan_of(extra), summed(**told), None)
    assert counted == []
    np.testing.assert_allclose(aggregate.update["a"], 0.3, rtol=1e-6)
    assert (aggregate.loss, aggregate.examples, aggregate.targets, aggregate.steps) == (1.5, 80, 50, 20)


def test_the_share_within_the_norm_has_noise_of_its_own(counted: list[float]) -> None:
    """Seven of ten, with a deviation of `count_noise` clients: over many releases, four tenths."""
    plan = plan_of(CLIENT + ADAPTIVE)
    made = mechanism(plan)
    assert isinstance(made, ClientMechanism)
    assert made.counted is not None
    mark = 4 * made.counted.coordinates(0.0, 1.0).astype(np.float64)  # seven and three against
    random = Randomness(bytes(32))
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(releasing, "Randomness", lambda: random)
        for _ in range(2000):
            total = Sum({"a": np.zeros(1)}, 10.0, mark=mark)
            within = released(plan, total, 1.0).within
            assert within is not None
            shares.append(within)
    noise = (np.array(shares) - 0.7) / 0.4
    assert stats.kstest(noise, "norm").pvalue > 1e-4
    assert counted[0] == made.bound(1.0) > 1.0


def test_a_sum_that_diverged_is_not_released() -> None:
    with pytest.raises(PrivacyError, match="not finite"):
        released(plan_of(), summed(math.nan), 1.0)


# The same through a sealed round, where the coordinator sees updates and clips them once more.


def sealed_round(plan: Plan, updates: list[float], clipped: int = 0) -> Aggregate:
    adapter: State = {"a": np.zeros(SIZE, np.float32)}
    nodes = NODES[: len(updates)]
    rule = WeightedMean(plan.aggregation)
    round_ = TrainingRound(plan, "run", 1, adapter, nodes, rule, 0.0, clipping_norm=plan.privacy.clipping_norm)
    for number, (task, length) in enumerate(zip(round_.tasks(), updates, strict=True)):
        assert getattr(task.work, "clipping_norm", None) == plan.privacy.clipping_norm
        update = pack_state({"a": np.full(SIZE, length / math.sqrt(SIZE), np.float32)}, "float32")
        outcome = Trained(update, 0, 0, 1, 0.0, clipped=number < clipped)
        assert round_.receive(Reply.to(task, outcome), 0.0) is Verdict.ACCEPTED
    aggregate = round_.result()
    assert aggregate is not None
    return aggregate


def test_a_sealed_round_adds_the_noise_once(counted: list[float]) -> None:
    aggregate = sealed_round(plan_of(protection="sealed"), [0.5] * 10)
    noise = (aggregate.update["a"].astype(np.float64) - 0.5 / math.sqrt(SIZE)) / (0.8 / 10)
    assert counted == [1.0]
    assert stats.kstest(noise, "norm").pvalue > 1e-4


def test_a_client_that_did_not_clip_is_clipped(counted: list[float]) -> None:
    """One of a thousand times the norm adds no more than one of the norm."""
    tiny = plan_of(CLIENT.replace("0.8", "1e-5"), "sealed")
    aggregate = sealed_round(tiny, [1000.0, 1.0])
    assert float(np.linalg.norm(aggregate.update["a"].astype(np.float64))) == pytest.approx(1.0, rel=1e-4)
    assert len(counted) == 1


def test_a_sealed_round_counts_those_that_were_clipped() -> None:
    strong = CLIENT.replace("0.8", "1e-4") + ADAPTIVE.replace("4.0", "1e-3")
    for clipped in (0, 3, 10):
        aggregate = sealed_round(plan_of(strong, "sealed"), [0.5] * 10, clipped)
        assert aggregate.within == pytest.approx(1 - clipped / 10, abs=0.01)
