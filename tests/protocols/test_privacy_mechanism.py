"""A Plan's promise as one value: what it does, what it spends, and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farfield.protocols.errors import PrivacyError
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.accounting import Gaussian, SampledGaussian, Skellam, spent
from farfield.protocols.privacy.mechanism import (
    ClientMechanism,
    ExampleMechanism,
    Mechanism,
    document,
    mechanism,
    promised,
    restore,
)
from farfield.protocols.sections import Privacy, Training


def plan(rounds: int = 5, steps: int | None = 4, **privacy: Any) -> Plan:
    """What a mechanism reads of a Plan."""
    training, wanted = Training(rounds=rounds, steps=steps, epochs=None if steps else 1), Privacy(**privacy)
    return cast(Plan, _Sections(training, wanted))


@dataclass(frozen=True)
class _Sections:
    training: Training
    privacy: Privacy
    participations = Plan.participations


def test_a_plan_without_privacy_has_no_mechanism() -> None:
    assert mechanism(plan()) is None
    assert promised(plan()) is None


def test_by_example_every_step_of_every_round_counts() -> None:
    asked = plan(kind="example", noise_multiplier=1.1, clipping_norm=0.5, sampling_rate=0.02)
    made = mechanism(asked)
    assert made == ExampleMechanism(1.1, 0.5, 0.02, 4)
    assert (made.unit, made.release, made.releases) == ("example", SampledGaussian(1.1, 0.02), 4)
    assert promised(asked) == spent({SampledGaussian(1.1, 0.02): 20}, 1e-5)


def test_whole_batches_are_not_sampled() -> None:
    made = mechanism(plan(kind="example", noise_multiplier=1.1, sampling_rate=1.0))
    assert made is not None and made.release == Gaussian(1.1)


@pytest.mark.parametrize(("noise", "release"), [("central", Gaussian(2.0)), ("distributed", Skellam(2.0))])
def test_by_client_every_round_counts_and_nothing_is_amplified(noise: str, release: object) -> None:
    asked = plan(kind="client", noise=noise, noise_multiplier=2.0)
    made = mechanism(asked)
    assert isinstance(made, ClientMechanism) and made.noise == noise
    assert (made.unit, made.release, made.releases) == ("client", release, 1)
    assert made.bound(3.0) == 3.0 and made.counted is None
    assert promised(asked) == spent({made.release: 5}, 1e-5)


def test_clients_that_take_turns_spend_their_turns_only() -> None:
    asked = plan(rounds=20, kind="client", noise_multiplier=2.0, participations=4)
    assert promised(asked) == spent({Gaussian(2.0): 4}, 1e-5)
    target = mechanism(plan(rounds=20, kind="client", target_epsilon=8.0, noise="distributed", participations=4))
    assert target == mechanism(plan(rounds=4, kind="client", target_epsilon=8.0, noise="distributed"))


def test_a_counted_norm_costs_the_updates_noise_and_no_epsilon() -> None:
    fixed = plan(kind="client", noise_multiplier=2.0)
    adaptive = plan(kind="client", noise_multiplier=2.0, clipping="adaptive", count_noise=5.0)
    made = mechanism(adaptive)
    assert isinstance(made, ClientMechanism) and made.counted is not None
    assert made.bound(3.0) == pytest.approx(3.0 * (1 - (2.0 / 10) ** 2) ** -0.5)
    assert promised(adaptive) == promised(fixed)


def test_a_count_with_less_noise_than_the_whole_is_refused() -> None:
    with pytest.raises(PrivacyError, match="count_noise"):
        mechanism(plan(kind="client", noise_multiplier=2.0, clipping="adaptive", count_noise=1.0))


@pytest.mark.parametrize(
    "privacy",
    [{"kind": "client"}, {"kind": "client", "noise": "distributed"}, {"kind": "example", "sampling_rate": 0.1}],
)
def test_a_target_is_met_and_hardly_missed(privacy: dict[str, Any]) -> None:
    asked = plan(target_epsilon=20.0, **privacy)
    made, total = mechanism(asked), promised(asked)
    assert made is not None and total is not None
    assert 19.9 < total.epsilon <= 20.0
    assert made == mechanism(plan(noise_multiplier=made.noise_multiplier, **privacy))


def test_privacy_by_example_needs_steps() -> None:
    with pytest.raises(PrivacyError, match="steps"):
        mechanism(plan(steps=None, kind="example", noise_multiplier=1.0, sampling_rate=0.1))


numbers = st.floats(1e-3, 1e3)
mechanisms = st.one_of(
    st.builds(ExampleMechanism, numbers, numbers, st.floats(1e-6, 1), st.integers(1, 10**6)),
    st.builds(ClientMechanism, st.sampled_from(["central", "distributed"]), numbers, numbers, st.none() | numbers),
)


@given(mechanisms)
def test_a_mechanism_goes_into_json_and_back(made: Mechanism) -> None:
    assert restore(json.loads(json.dumps(document(made)))) == made


GOOD = document(ClientMechanism("central", 1.0, 1.0))


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {},
        {"kind": "unknown"},
        {"kind": ["client"]},
        {**GOOD, "more": 1},
        {**GOOD, "noise_multiplier": 0.0},
        {**GOOD, "noise_multiplier": -1.0},
        {**GOOD, "noise_multiplier": float("inf")},
        {**GOOD, "noise_multiplier": float("nan")},
        {**GOOD, "noise_multiplier": "1"},
        {**GOOD, "noise_multiplier": True},
        {**GOOD, "noise": "none"},
        {name: value for name, value in GOOD.items() if name != "clipping_norm"},
        document(ExampleMechanism(1.0, 1.0, 0.5, 1)) | {"steps": 1.5},
        document(ExampleMechanism(1.0, 1.0, 0.5, 1)) | {"sampling_rate": 1.5},
    ],
)
def test_what_is_no_mechanism_is_refused(bad: object) -> None:
    with pytest.raises(PrivacyError):
        restore(bad)
