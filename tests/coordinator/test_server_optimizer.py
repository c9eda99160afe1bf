import numpy as np
import pytest

from farfield.coordinator.server_optimizer import Moments, step
from farfield.protocols.sections import Aggregation
from farfield.protocols.tensors import State

ETA, BETA1, BETA2, TAU = 0.3, 0.8, 0.95, 0.01


def reference(kind: str, x: float, deltas: list[float]) -> float:
    """FedOpt for one number in double precision, written from Algorithm 2 of Reddi et al. 2021."""
    m, v = 0.0, TAU**2
    for delta in deltas:
        if kind == "none":
            x += ETA * delta
        elif kind == "momentum":
            m = BETA1 * m + delta
            x += ETA * m
        else:
            m = BETA1 * m + (1 - BETA1) * delta
            if kind == "adam":
                v = BETA2 * v + (1 - BETA2) * delta**2
            else:
                v = v - (1 - BETA2) * delta**2 * np.sign(v - delta**2)
            x += ETA * m / (v**0.5 + TAU)
    return x


@pytest.mark.parametrize("kind", ["none", "momentum", "adam", "yogi"])
def test_equals_the_reference_over_several_rounds(kind: str) -> None:
    settings = Aggregation.model_validate(
        {"server_optimizer": kind, "learning_rate": ETA, "beta1": BETA1, "beta2": BETA2, "tau": TAU}
    )
    generator = np.random.default_rng(0)
    start = generator.normal(size=(4, 3)).astype(np.float32)
    deltas = [generator.normal(scale=0.1, size=(4, 3)).astype(np.float32) for _ in range(6)]
    adapter: State = {"w": start.copy(), "untouched": np.ones(2, np.float32)}
    moments = Moments()
    for delta in deltas:
        adapter, moments = step(settings, adapter, {"w": delta}, moments)
    expected = np.vectorize(lambda x, *d: reference(kind, x, list(d)))(start, *deltas)
    np.testing.assert_allclose(adapter["w"], expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(adapter["untouched"], 1.0)
    assert adapter["w"].dtype == np.float32


def test_changes_nothing_that_was_passed_in() -> None:
    adapter: State = {"w": np.ones(3, np.float32)}
    update: State = {"w": np.full(3, 0.5, np.float32)}
    step(Aggregation(server_optimizer="adam"), adapter, update, Moments())
    np.testing.assert_array_equal(adapter["w"], 1.0)
    np.testing.assert_array_equal(update["w"], 0.5)


@pytest.mark.parametrize("kind", ["momentum", "adam", "yogi"])
def test_a_tensor_that_rests_in_a_round_keeps_its_moments(kind: str) -> None:
    """Two halves that take turns move as each would alone."""
    settings = Aggregation.model_validate({"server_optimizer": kind, "learning_rate": ETA})
    generator = np.random.default_rng(1)
    deltas = [generator.normal(size=3).astype(np.float32) for _ in range(6)]
    together: State = {"a": np.zeros(3, np.float32), "b": np.zeros(3, np.float32)}
    moments = Moments()
    for number, delta in enumerate(deltas):
        together, moments = step(settings, together, {"ab"[number % 2]: delta}, moments)
    for first, name in enumerate("ab"):
        alone: State = {name: np.zeros(3, np.float32)}
        own = Moments()
        for delta in deltas[first::2]:
            alone, own = step(settings, alone, {name: delta}, own)
        np.testing.assert_array_equal(together[name], alone[name])
        np.testing.assert_array_equal(moments.first[name], own.first[name])
