"""Canaries: what was put in is told from what was left out, promises are held to, and noise leaves nothing to see."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import audits
import numpy as np
import pytest
import tiny

from farfield.edge_client.audit import Subject, canary_clients
from farfield.edge_client.audit.attack import Attacker, registered
from farfield.edge_client.audit.canary_bounds import Measured, Ranking, each, measured, together
from farfield.edge_client.audit.canary_records import CONTROLS, FEWEST, KINDS, SHARE, draw
from farfield.edge_client.audit.conduct import conduct
from farfield.edge_client.audit.losses import losses
from farfield.edge_client.audit.trained_on import times_trained
from farfield.edge_client.data import encode
from farfield.edge_client.records import Labelled, Text
from farfield.protocols import randomness
from farfield.protocols.audit.canaries import OneRunBound
from farfield.protocols.audit.finding import Finding
from farfield.protocols.audit.guessing import Guesses
from farfield.protocols.privacy import central
from farfield.protocols.privacy.mechanism import promised

ATTACK = registered()["canaries"]

DATA = {"packing": False, "truncate": True, "max_length": 48}
LEARNS: dict[str, Any] = {
    "tuning": {"kind": "full", "rank": None},
    "data": DATA,
    "training": {"rounds": 3, "steps": 30, "batch_size": 8, "learning_rate": 0.004},
}
"""Enough training of little data that every record is known by heart."""

BY_CLIENT: dict[str, Any] = {
    "training": {"rounds": 2},
    "aggregation": {"weighting": "uniform"},
    "protection": {"kind": "sealed"},
}
"""Hardly any training: what is looked at is what canary clients send."""


@pytest.fixture(autouse=True)
def same_noise_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise and batches that come out the same each time: at 95 %, one test in twenty would fail with others."""
    keys = (number.to_bytes(32) for number in itertools.count())
    monkeypatch.setattr(randomness, "secrets", SimpleNamespace(token_bytes=lambda size: next(keys)))


class Silent:
    def on_attack(self, attack: Any, number: int, attacks: int) -> None: ...
    def on_finding(self, finding: Finding) -> None: ...
    def on_untried(self, untried: Any) -> None: ...


def made(subject: Subject) -> Finding:
    (finding,), _ = conduct(subject, [ATTACK], Silent())
    return finding


def figure(finding: Finding, name: str) -> Any:
    (found,) = (one for one in finding.figures if one.name == name)
    return found


def by_client(noise_multiplier: float, **sections: Any) -> dict[str, Any]:
    privacy = {"kind": "client", "noise_multiplier": noise_multiplier, "clipping_norm": 0.5}
    return BY_CLIENT | {"privacy": privacy} | sections


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Finding]:
    """A run without protection, and what was found in it."""
    subject = audits.subject(tmp_path_factory.mktemp("leaky"), clients=3, **LEARNS)
    return subject, made(subject)


def test_records_that_are_learnt_by_heart_are_found(leaky: tuple[Subject, Finding]) -> None:
    subject, finding = leaky
    assert ATTACK.unfit(subject) is None and finding.verdict == "leak" and finding.attacker == Attacker.HOLDER
    bound = figure(finding, "ε at least, records")
    assert 1 < bound.value <= bound.ceiling < 3 and bound.interval.low == bound.value and bound.claimed is None
    for kind in ("both kinds", *KINDS):
        assert figure(finding, f"AUC, {kind}").value > 0.85
    assert "more than coins explain" in finding.found[0] and f"{bound.ceiling:.2f} at most" in finding.found[0]
    assert finding.found[1] == "The Plan promises no ε for records."
    assert [plot.title for plot in finding.plots if plot.diagonal and plot.x.log and plot.y.log]


def test_a_finding_holds_what_its_bound_follows_from(leaky: tuple[Subject, Finding]) -> None:
    finding, data = leaky[1], leaky[1].data
    fell: Any = np.array(data["loss_initial"]) - np.array(data["loss_released"])
    fell = fell * np.array(data["targets"])
    new, included = (np.array(list(str(data[name]))) == "1" for name in ("kind", "included"))
    tossed = len(included)
    apart = [
        Ranking(kind, fell[:tossed][mine[:tossed]], included[mine[:tossed]], fell[tossed:][mine[tossed:]])
        for kind, mine in zip(KINDS, (new, ~new), strict=True)
    ]
    again = measured([together("both kinds", apart), *apart], delta=1e-5, claimed=None, gaussian=False, seed=1, tests=3)
    assert figure(finding, "ε at least, records").value == again.bound.epsilon
    assert figure(finding, "ε at least, records").ceiling == again.bound.ceiling
    assert len(finding.model_dump_json()) < 200_000
    rate = figure(finding, "canaries found at 0.1% false positives, both kinds")
    assert rate.value > 0.05 and "1 of 1030" in rate.note.replace(",", "")
    texts = [one.record.text for one in draw(leaky[0]).canaries if isinstance(one.record, Text)]
    assert not any(text in finding.model_dump_json() for text in texts), "a report holds no record of a client"


def test_the_whole_run_is_what_is_scored(leaky: tuple[Subject, Finding]) -> None:
    subject, finding = leaky
    drawn = draw(subject)
    examples = [one.example for one in drawn.canaries + drawn.controls]
    assert finding.data["loss_initial"] == losses(subject.bench, subject.initial, examples)
    assert finding.data["loss_released"] == losses(subject.bench, subject.course.adapter(3), examples)


def test_canaries_are_coins_and_the_same_each_time(leaky: tuple[Subject, Finding]) -> None:
    subject, drawn = leaky[0], draw(leaky[0])
    again = draw(subject)
    assert drawn == again and len(drawn.canaries) == FEWEST
    assert 0.3 < np.mean([one.included for one in drawn.canaries]) < 0.7
    for name in subject.clients:
        mine = [one.kind for one in drawn.canaries if one.client == name]
        assert mine.count("natural") == mine.count("new tokens") >= FEWEST // 6
    assert len({str(one.record) for one in drawn.canaries + drawn.controls}) == FEWEST + CONTROLS
    assert not any(one.included for one in drawn.controls)
    other = draw(replace(subject, seed=2))
    assert [one.included for one in other.canaries] != [one.included for one in drawn.canaries]
    planted = [(one.client, one.record, one.times) for one in ATTACK.plant(subject).records]
    assert planted == [(one.client, one.record, 1) for one in drawn.canaries if one.included]


def test_new_tokens_are_in_no_client_s_data(leaky: tuple[Subject, Finding]) -> None:
    subject = leaky[0]
    used = {token for read in subject.clients.values() for example in read().train for token in example.input_ids}
    for one in draw(subject).canaries:
        tokens = set(one.example.input_ids) - {subject.bench.tokenizer.eos_token_id}
        assert bool(tokens & used) is (one.kind == "natural") and len(tokens) > 3


def test_there_are_as_many_as_the_data_can_bear(tmp_path: Path) -> None:
    subject = audits.subject(tmp_path, clients=2, records_each=400, data={"packing": True, "held_out": 0.0})
    drawn = draw(subject)
    assert len(drawn.canaries) > FEWEST and 0.6 * SHARE < drawn.share < 1.4 * SHARE
    ids = [len(one.example.input_ids) for one in drawn.canaries if one.included]
    tokens = sum(len(example.input_ids) for read in subject.clients.values() for example in read().train)
    assert drawn.share == sum(ids) / (sum(ids) + tokens)


@pytest.mark.parametrize("packing", [True, False])
def test_how_often_a_record_was_trained_on(tmp_path: Path, packing: bool) -> None:
    """Two rounds of three epochs: six times, and what was left out never; a client that was not drawn, never."""
    data = {"packing": packing, "max_length": 32, "held_out": 0.0}
    training = {"rounds": 2, "steps": None, "epochs": 3, "learning_rate": 1e-6}
    subject = audits.subject(tmp_path, clients=3, data=data, training=training, cohort={"size": 2})
    drawn = draw(subject)
    subject.plantings["canaries"] = ATTACK.plant(subject)
    for name in subject.clients:
        mine = [one for one in drawn.canaries if one.client == name]
        rounds = sum(name in subject.course.members(number) for number in (1, 2))
        for one, times in zip(mine, times_trained(subject, name, [one.record for one in mine]), strict=True):
            if not one.included:
                assert times == 0
            elif not packing:
                assert times == 3 * rounds
            else:  # the end of a client's stream may be too short for an example
                assert times in (pytest.approx(3 * rounds), 0)


@pytest.mark.usefixtures("repeatable_noise")
def test_noise_in_which_nothing_is_learnt_leaves_records_at_chance(tmp_path: Path) -> None:
    """The run that leaks without it, with noise far above what is learnt."""
    training = LEARNS["training"] | {"steps": 4}
    privacy = {"kind": "example", "noise_multiplier": 200.0, "sampling_rate": 0.3, "exact_evaluation": True}
    tuning = {"kind": "lora", "rank": 4}
    finding = made(
        audits.subject(tmp_path, clients=3, **LEARNS | {"training": training, "tuning": tuning}, privacy=privacy)
    )
    bound, area = figure(finding, "ε at least, records"), figure(finding, "AUC, both kinds")
    assert finding.verdict == "no leak found" and bound.value == 0 < bound.claimed < 0.1 < bound.ceiling
    assert area.interval.low < 0.5 < area.interval.high
    assert "not shown to be better than guessing" in finding.found[0] and f"{bound.ceiling:.2f}" in finding.found[0]
    assert "is not refuted" in finding.found[1]
    assert "in 3.6 batches on average" in finding.tried[1], "three rounds of four steps at 0.3"


@pytest.mark.usefixtures("repeatable_noise")
def test_clients_under_noise_are_at_chance(tmp_path: Path) -> None:
    subject = audits.subject(tmp_path, clients=3, **by_client(200.0))
    finding = made(subject)
    bound = figure(finding, "ε at least, clients")
    assert finding.verdict == "no leak found" and bound.value == 0 < bound.ceiling
    assert bound.claimed == pytest.approx(promised(subject.plan).epsilon)  # type: ignore[union-attr]
    area = figure(finding, "AUC, clients")
    assert area.interval.low < 0.5 < area.interval.high
    assert "coordinator" in finding.attacker


@pytest.mark.usefixtures("repeatable_noise")
def test_clients_are_found_as_often_as_the_noise_says(tmp_path: Path) -> None:
    """Each round gives μ = 1/z, two give √2/z; the area under the curve of N(0, 1) against N(μ, 1) is Φ(μ/√2)."""
    finding = made(audits.subject(tmp_path, clients=3, **by_client(1.0)))
    area = figure(finding, "AUC, clients")
    expected = 0.5 * (1 + math.erf(math.sqrt(2) / 2))
    assert area.interval.low < expected < area.interval.high and area.interval.low > 0.7
    scores, included = np.array(finding.data["client_scores"]), np.array(list(str(finding.data["client_included"])))
    assert len(scores) == 256, "as many as a promise of 6.6 wants"
    # In units of the norm an update that is sent in both rounds reaches 2, with noise of √2·z.
    inside, outside = scores[included == "1"], scores[included == "0"]
    assert inside.mean() == pytest.approx(2, abs=4 * math.sqrt(2 / len(inside)))
    assert outside.mean() == pytest.approx(0, abs=4 * math.sqrt(2 / len(outside)))


def test_noise_that_is_not_there_refutes_the_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noised = central.noised

    def weak(update: Any, norm: float, multiplier: float, *rest: Any, **keys: Any) -> Any:
        return noised(update, norm, multiplier / 1000, *rest, **keys)

    monkeypatch.setattr(central, "noised", weak)
    finding = made(audits.subject(tmp_path, clients=3, **by_client(4.0)))
    bound = figure(finding, "ε at least, clients")
    assert finding.verdict == "leak" and bound.value > bound.claimed and figure(finding, "AUC, clients").value > 0.99
    assert any("That is refuted" in sentence for sentence in finding.found)


@pytest.mark.parametrize("protection", ["sealed", "secagg"])
def test_canary_clients_send_what_the_plan_allows(tmp_path: Path, protection: str) -> None:
    """Under either protection: a vector of the clipping norm in a direction of its own, or nothing."""
    subject = audits.subject(tmp_path, clients=3, **by_client(1.0, protection={"kind": protection}))
    units = [canary_clients.direction(subject, number) for number in range(3)]
    flat = np.array([np.concatenate([unit[name].ravel() for name in sorted(unit)]) for unit in units])
    np.testing.assert_allclose(flat @ flat.T, np.eye(3), atol=6 / math.sqrt(flat.shape[1]))
    plan = canary_clients._plan(subject, 67)
    assert plan.cohort.minimum == 67 and plan.training.rounds == 2 and plan.protection.kind == protection
    assert plan.privacy.noise_multiplier == 1.0


def test_as_many_canary_clients_as_the_promise_wants(tmp_path: Path) -> None:
    subject = audits.subject(tmp_path, clients=3, **by_client(1.0))
    counts = [canary_clients._count(subject.plan, claimed, 0.95) for claimed in (0.5, 5.0, 5.5, 100.0)]
    assert counts == [64, 128, 256, 256]


def test_an_edge_client_alone_tests_its_own_update(tmp_path: Path) -> None:
    training = LEARNS["training"] | {"rounds": 1, "steps": 90}
    subject = audits.subject(tmp_path, clients=1, **LEARNS | {"training": training})
    finding = made(replace(subject, federation=None))
    assert finding.verdict == "leak" and finding.attacker == Attacker.COORDINATOR
    assert "one round of this client alone" in finding.tried[2] and any("one client" in one for one in finding.limits)
    guarded = replace(audits.subject(tmp_path / "guarded", clients=1, **by_client(1.0)), federation=None)
    assert "ε at least, clients" not in [one.name for one in made(guarded).figures]


def test_labels_by_lot_are_learnt_by_heart(tmp_path: Path) -> None:
    model = {"task": "sequence-classification", "labels": 4, "backbone": "backbone", "dtype": "float32"}
    (tmp_path / "clients").mkdir()
    tiny.write_backbone(tmp_path / "backbone")
    generator = random.Random(1)
    for client in range(3):
        rows = [
            {"text": "".join(generator.choices("abcdefghij ", k=24)), "label": generator.randrange(4)}
            for _ in range(24)
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "clients" / f"client-{client}.jsonl").write_text(lines, encoding="utf-8")
    sections = LEARNS | {"data": {"max_length": 48, "packing": None}, "model": model}
    sections["training"] = LEARNS["training"] | {"steps": 60}
    subject = audits.subject(tmp_path, **sections)
    assert all(isinstance(one.record, Labelled) for one in draw(subject).canaries)
    finding = made(subject)
    assert finding.verdict == "leak" and set(finding.data["targets"]) == {1}  # type: ignore[arg-type]
    assert {one.times for one in ATTACK.plant(subject).records} == {1}


def test_it_says_where_it_cannot_be_made(tmp_path: Path) -> None:
    subject = audits.subject(tmp_path, tuning={"local_b": True})
    assert "keeps a part of what it trains at home" in (ATTACK.unfit(subject) or "")


def test_a_canary_that_is_cut_is_scored_as_it_was_trained_on(tmp_path: Path) -> None:
    subject = audits.subject(tmp_path, data={"packing": False, "truncate": True, "max_length": 10})
    for one in draw(subject).canaries:
        whole = encode(one.record, subject.bench.tokenizer, subject.plan.data, "causal-lm", "here").input_ids
        assert one.example.input_ids == whole[:10]


# What a bound means beside a promise.


def level(
    epsilon: float,
    ceiling: float,
    claimed: float | None,
    sharper: float = 0.0,
    most: float = 0.0,
    gaussian: bool = True,
) -> Measured:
    def bound(value: float, highest: float) -> OneRunBound:
        return OneRunBound("(ε, δ)-DP", value, highest, 1e-5, 0.95, 64, 32, Guesses(8, 8), 12, 1)

    return Measured(bound(epsilon, ceiling), bound(sharper, most), "some", claimed, gaussian)


@pytest.mark.parametrize(
    ("one", "leak", "refuted"),
    [
        (level(0.0, 3.0, None), False, False),
        (level(0.1, 3.0, None), True, False),
        (level(0.0, 3.0, 8.0), False, False),
        (level(0.5, 3.0, 8.0), True, False),  # a promise that could not have been refuted excuses nothing
        (level(0.5, 3.0, 2.0), False, False),  # what the promise allows
        (level(2.1, 3.0, 2.0), True, True),
        (level(0.5, 3.0, 8.0, sharper=2.0, most=9.0), False, False),
        (level(0.5, 3.0, 8.0, sharper=8.5, most=9.0), True, True),
        (level(0.5, 3.0, 8.0, sharper=8.5, most=9.0, gaussian=False), True, False),
    ],
)
def test_a_promise_excuses_what_it_allows_if_it_withstood_a_test(one: Measured, leak: bool, refuted: bool) -> None:
    assert one.leak is leak and one.refuted is refuted


def test_bounds_of_coins_alone_hold_together() -> None:
    """Scores that know nothing of the coins: more than chance at most once in twenty audits, all rankings together."""
    generator, false = np.random.default_rng(5), 0
    for seed in range(60):
        apart = [Ranking(kind, generator.normal(size=64), generator.random(64) < 0.5, np.zeros(0)) for kind in KINDS]
        rankings = [together("both kinds", apart), *apart]
        assert len(rankings[0].scores) == 128 and abs(rankings[0].scores.mean()) < 1e-9
        found = measured(rankings, delta=1e-5, claimed=1.0, gaussian=True, seed=seed, tests=3)
        assert found.bound.confidence == each(3) == pytest.approx(1 - 0.05 / 6)
        false += found.beyond_chance
    assert false <= 7  # 3 are to be expected at most; more than 7 have a probability below 1 %


def test_a_kind_that_tells_all_is_not_drowned_by_one_that_tells_nothing() -> None:
    generator = np.random.default_rng(6)
    included = generator.random(128) < 0.5
    blind = Ranking("natural", generator.normal(size=128), generator.random(128) < 0.5, np.zeros(0))
    sure = Ranking("new tokens", included.astype(np.float64), included, np.zeros(0))
    rankings: Mapping[str, Ranking] = {one.name: one for one in (together("both kinds", [sure, blind]), sure, blind)}
    found = measured(list(rankings.values()), delta=1e-5, claimed=None, gaussian=False, seed=1, tests=3)
    assert found.ranking == "new tokens" and found.bound.right == found.bound.guesses.made
