"""Noise that is as it has to be passes, and each way in which it could not be is found out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import audits
import numpy as np
import pytest

from farfield.edge_client import private
from farfield.edge_client.audit import Subject, mechanism
from farfield.edge_client.audit.mechanism import LEVEL, Mechanism
from farfield.edge_client.audit.noisy import Examples, source
from farfield.kernels import clip
from farfield.protocols.audit.finding import Finding
from farfield.protocols.audit.whiteness import whiteness
from farfield.protocols.privacy import central, clipping, distributed, noise
from farfield.protocols.randomness import Randomness

EXAMPLE: dict[str, Any] = {
    "data": {"packing": False, "truncate": True},
    "privacy": {"kind": "example", "noise_multiplier": 1.0, "sampling_rate": 0.5, "clipping_norm": 0.3},
}
CLIENT: dict[str, Any] = {
    "aggregation": {"weighting": "uniform"},
    "privacy": {"kind": "client", "noise_multiplier": 1.0, "clipping_norm": 0.5},
}
ADAPTIVE = CLIENT | {"privacy": CLIENT["privacy"] | {"clipping": "adaptive", "count_noise": 1.0}}
DISTRIBUTED = CLIENT | {"privacy": CLIENT["privacy"] | {"noise": "distributed"}}
ADAPTIVE_SHARES = CLIENT | {"privacy": ADAPTIVE["privacy"] | {"noise": "distributed"}}
SEALED = CLIENT | {"protection": {"kind": "sealed"}}
PLANS = {
    "example": EXAMPLE,
    "central": CLIENT,
    "sealed": SEALED,
    "adaptive": ADAPTIVE,
    "distributed": DISTRIBUTED,
    "adaptive shares": ADAPTIVE_SHARES,
}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for what is to be seen here, and so strict that no good noise fails by chance."""
    monkeypatch.setattr(mechanism, "_EACH", 1e-7)
    monkeypatch.setattr(mechanism, "VALUES", 40_000)
    monkeypatch.setattr(mechanism, "RELEASES", 400)
    monkeypatch.setattr(mechanism, "_WIDE", 128)


def subject(folder: Path, **sections: Any) -> Subject:
    return audits.subject(folder, **sections)


def found(folder: Path, sections: dict[str, Any]) -> Finding:
    return Mechanism().run(subject(folder, **sections))


def failures(finding: Finding) -> set[str]:
    return {name for name, passed, _, _ in finding.tables[0].rows if passed == "NO"}


def test_without_noise_there_is_nothing_to_test(tmp_path: Path) -> None:
    assert "no noise to test" in str(Mechanism().unfit(subject(tmp_path)))
    assert Mechanism().unfit(subject(tmp_path, **EXAMPLE)) is None


@pytest.mark.parametrize("kind", PLANS)
def test_what_is_built_passes(tmp_path: Path, few: None, kind: str) -> None:
    finding = found(tmp_path, PLANS[kind])
    assert finding.verdict == "passed", finding.found
    tests = {row[0] for row in finding.tables[0].rows}
    assert {"size of the noise", "distribution of the noise", "clipping bounds what goes in"} < tests
    assert ("examples are drawn one by one" in tests) == (kind == "example")
    assert ("noise on what a federation releases" in tests) == (kind != "example")
    assert ("noise on the count of clipped updates" in tests) == kind.startswith("adaptive")
    bound = finding.figures[1]
    assert bound.value is not None and bound.claimed is not None and bound.ceiling is not None
    shown = 0.0 if kind.startswith("adaptive") else 0.2 * bound.claimed  # there the canary leaves room for the count
    assert shown <= bound.value < bound.claimed < bound.ceiling
    assert finding.figures[0].value == pytest.approx(1, abs=0.03)


def halved(draw: Any) -> Any:
    return lambda count, *arguments: np.rint(draw(count, *arguments) / 2).astype(np.int64)


def noisier(draw: Any) -> Any:
    """Of the right variance, and of another shape: now and then there is none."""

    def drawn(count: int, *arguments: Any) -> Any:
        there = Randomness().uniform(count) < 0.8
        return np.rint(np.where(there, draw(count, *arguments), 0) / np.sqrt(0.8)).astype(np.int64)

    return drawn


@pytest.mark.parametrize("kind", PLANS)
def test_half_the_noise_is_found_out(tmp_path: Path, few: None, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(central, "wide_gaussian", halved(noise.wide_gaussian))
    monkeypatch.setattr(distributed, "skellam", halved(noise.skellam))
    finding = found(tmp_path, PLANS[kind])
    assert finding.verdict == "failed"
    assert "size of the noise" in failures(finding)
    assert finding.figures[0].value == pytest.approx(0.5, abs=0.02)
    if kind != "example":
        assert "noise on what a federation releases" in failures(finding)


def test_the_bound_on_epsilon_finds_half_the_noise_out_by_itself(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """μ is 2 then; a thousand releases of either kind show 1.6 at least, and the ledger says 1."""
    monkeypatch.setattr(mechanism, "RELEASES", 2000)
    monkeypatch.setattr(central, "wide_gaussian", halved(noise.wide_gaussian))
    assert "ε of one release against the ledger's" in failures(found(tmp_path, SEALED))


def test_a_twentieth_less_is_found_out(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = noise.wide_gaussian
    monkeypatch.setattr(
        central, "wide_gaussian", lambda count, random: np.rint(0.95 * draw(count, random)).astype(np.int64)
    )
    assert "size of the noise" in failures(found(tmp_path, EXAMPLE))


def test_another_distribution_is_found_out(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(central, "wide_gaussian", noisier(noise.wide_gaussian))
    assert "distribution of the noise" in failures(found(tmp_path, CLIENT))


def test_noise_that_comes_again_is_found_out(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four generators that are used in turn: every fifth release has the noise of the first."""
    draw, turns = noise.wide_gaussian, itertools.count()
    made: dict[tuple[int, int], Any] = {}

    def drawn(count: int, random: Randomness) -> Any:
        key = count, next(turns) % 4
        if key not in made:
            made[key] = draw(count, random)
        return made[key]

    monkeypatch.setattr(central, "wide_gaussian", drawn)
    assert "noise is drawn afresh for every release" in failures(found(tmp_path, EXAMPLE))


def test_clipping_that_lets_something_past_is_found_out(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clipping, "clip", lambda update, norm: (dict(update), 0.0))
    assert "clipping bounds what goes in" in failures(found(tmp_path, CLIENT))

    def each(gradients: Sequence[Any], limit: float) -> list[Any]:
        """Clipped, but each tensor by itself."""
        return [one for gradient in gradients for one in before([gradient], limit)]

    before = clip.clipped_sums
    monkeypatch.setattr(clip, "clipped_sums", each)
    assert "clipping bounds what goes in" in failures(found(tmp_path, EXAMPLE))


def test_batches_that_are_not_drawn_as_claimed_are_found_out(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from farfield.edge_client.audit import noisy

    drawn = np.random.default_rng(1)

    def fixed(count: int, rate: float, random: Randomness) -> list[int]:
        """Batches of one size, as most libraries make them."""
        return [int(one) for one in drawn.choice(count, round(rate * count), replace=False)]

    monkeypatch.setattr(noisy, "sample", fixed)
    assert failures(found(tmp_path, EXAMPLE)) == {"examples are drawn one by one"}
    monkeypatch.setattr(noisy, "sample", lambda count, rate, random: private.sample(count, rate * 1.2, random))
    assert "how often an example is in a batch" in failures(found(tmp_path, EXAMPLE))


def test_a_client_alone_tests_its_own_noise(tmp_path: Path, few: None) -> None:
    from dataclasses import replace

    alone = subject(tmp_path, **DISTRIBUTED)
    finding = Mechanism().run(replace(alone, federation=None, clients=dict(list(alone.clients.items())[:1])))
    assert finding.verdict == "passed"
    assert "noise on what a federation releases" not in {row[0] for row in finding.tables[0].rows}


def test_a_huge_update_is_clipped_to_the_norm() -> None:
    """The factor is below what float32 holds exactly."""
    for size in (1e38, 3e38):
        clipped, _ = clipping.clip({"a": np.full(1000, size, np.float32)}, 1e-3)
        assert np.linalg.norm(clipped["a"].astype(np.float64)) <= 1e-3


@pytest.mark.slow
def test_good_noise_fails_no_more_often_than_is_said(
    tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tests so strict that one in five whole tests fails at most; 60 of them, and three standard deviations."""
    monkeypatch.setattr(mechanism, "_EACH", 0.2 / mechanism.TESTS)
    made = subject(tmp_path, **EXAMPLE)
    failed = sum(Mechanism().run(made).verdict == "failed" for _ in range(60))
    assert failed <= 60 * 0.2 + 3 * (60 * 0.2 * 0.8) ** 0.5
    assert LEVEL <= 0.01


def test_independent_values_are_white_and_others_are_not() -> None:
    random = np.random.default_rng(5)
    drawn = [whiteness(random.standard_normal((20, 500))) for _ in range(200)]
    assert sum(one.distance_p < 0.05 for one in drawn) <= 20
    assert sum(one.pair_p < 0.05 for one in drawn) <= 20
    values = random.standard_normal((20, 500))
    again = values.copy()
    again[17] = again[3]
    found = whiteness(again)
    assert (found.pair, found.pair_p < 1e-9) == ((3, 17), True)
    smooth = values.copy()
    smooth[:, 1:] += 0.2 * values[:, :-1]
    assert (whiteness(smooth).distance, whiteness(smooth).distance_p < 1e-9) == (1, True)
    with pytest.raises(ValueError, match="values that are to be compared"):
        whiteness(values[:1])


def test_a_canary_is_in_the_sum_as_it_is(tmp_path: Path) -> None:
    """So that the bound on ε is about a unit that contributes all that it may."""
    for kind in ("example", "central", "sealed", "distributed"):
        made = source(subject(tmp_path / kind, **PLANS[kind]).plan, 300, 4)
        canary = np.full(300, made.norm / 300**0.5 * (1 - 2.0**-20), np.float32)
        rows = np.mean([made.release(canary) for _ in range(300)], axis=0)
        error = made.claimed / 300**0.5
        assert abs(rows - canary).max() < 5 * error
        assert rows @ canary / made.norm == pytest.approx(made.norm, abs=5 * error)
        assert isinstance(made, Examples) == (kind == "example")
