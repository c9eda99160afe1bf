"""Exposure: repeated secrets are read out of the adapter, ranks are exact, and noise leaves nothing to read."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import audits
import numpy as np
import pytest
import torch

from farfield.edge_client.audit import Subject, planted_secrets
from farfield.edge_client.audit.attack import Attacker, registered
from farfield.edge_client.audit.conduct import conduct
from farfield.edge_client.audit.exposure import rounds_to_look_at
from farfield.edge_client.audit.exposure_results import CHANCE, MAXIMUM, detectable, group, leaks
from farfield.edge_client.audit.planted_secrets import CODES, EACH, TIMES, Question, draw
from farfield.edge_client.data import encode
from farfield.protocols import randomness
from farfield.protocols.audit.exposure import Exposure, by_rank
from farfield.protocols.audit.finding import Finding

ATTACK = registered()["exposure"]

LEARNS: dict[str, Any] = {
    "tuning": {"kind": "full", "rank": None},
    "data": {"packing": False, "truncate": True, "max_length": 48},
    "training": {"rounds": 4, "steps": 30, "batch_size": 8, "learning_rate": 0.004},
}
"""Enough training of little data that what is repeated is known by heart."""


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
    (found,) = (one for one in finding.figures if one.name == f"exposure, {name}")
    return found


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Finding]:
    """A run without protection, and what was found in it."""
    subject = audits.subject(tmp_path_factory.mktemp("leaky"), clients=3, **LEARNS)
    return subject, made(subject)


def test_what_is_repeated_often_is_near_the_maximum(leaky: tuple[Subject, Finding]) -> None:
    subject, finding = leaky
    assert ATTACK.unfit(subject) is None and finding.verdict == "leak" and finding.attacker == Attacker.HOLDER
    repeated, never = figure(finding, "planted 4 times"), figure(finding, "never planted")
    assert repeated.value > 8.5 and repeated.ceiling == MAXIMUM == math.log2(1000) and repeated.headline
    assert never.value < detectable(groups(subject, finding)) and never.chance == CHANCE
    assert any("more than chance explains" in sentence for sentence in finding.found)
    assert not any("No secret is shown" in sentence for sentence in finding.found)


def test_exposure_grows_from_chance_over_the_rounds(leaky: tuple[Subject, Finding]) -> None:
    subject, finding = leaky
    (plot,) = finding.plots
    assert [series.label for series in plot.series] == ["never planted", "planted once", "planted 4 times"]
    for series in plot.series:
        assert series.x == (0, 1, 2, 3, 4) and series.y[0] < 6
        assert all(low <= mean <= high for low, mean, high in zip(series.low, series.y, series.high, strict=True))
    assert plot.series[-1].y[-1] == pytest.approx(figure(finding, "planted 4 times").value, abs=1e-4)
    assert {mark.y for mark in plot.marks} == {MAXIMUM, CHANCE}
    # Every client trains 30 batches of 8 in each of 4 rounds; what is planted four times is seen four times as often.
    seen: Any = finding.data["times_trained"]
    assert np.mean(seen[2 * EACH :]) == pytest.approx(4 * np.mean(seen[EACH : 2 * EACH]), rel=0.2)
    assert seen[:EACH] == [0] * EACH and len(subject.clients) == 3


@pytest.mark.usefixtures("repeatable_noise")
def test_noise_in_which_nothing_is_learnt_leaves_secrets_at_chance(tmp_path: Path) -> None:
    """The run that leaks without it, with noise far above what is learnt."""
    privacy = {"kind": "client", "noise_multiplier": 100.0, "clipping_norm": 1.0}
    finding = made(audits.subject(tmp_path, clients=3, **LEARNS, privacy=privacy, aggregation={"weighting": "uniform"}))
    assert finding.verdict == "no leak found"
    for name in ("planted once", "planted 4 times"):
        assert figure(finding, name).value < 4
    assert f"could have shown {MAXIMUM:.2f} bits at most" in finding.found[-1]


def test_each_code_is_scored_by_its_own_log_probability(leaky: tuple[Subject, Finding]) -> None:
    """Once more, one code at a time and token by token."""
    subject, _ = leaky
    subject.bench.load(subject.course.adapter(4))
    secret = draw(subject).secrets[-1]
    scores, model = Question(subject, secret).scores(), subject.bench.tuned.model
    differences = []
    for code in (0, 1, 57, 999, secret.code):
        record = secret.with_code(code)
        assert record.text == f"{secret.sentence} {CODES[code]}"
        ids = list(encode(record, subject.bench.tokenizer, subject.plan.data, "causal-lm", "here").input_ids)[:-1]
        with torch.no_grad():
            odds = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
        of_all = sum(float(odds[at, token]) for at, token in enumerate(ids[1:]))
        differences.append(of_all - scores[code])
    # What all codes share in front of them is left out of every score alike.
    assert np.ptp(differences) < 1e-4 and min(differences) < 0
    assert scores.argmax() == secret.code, "it was learnt by heart"


def test_the_rank_of_every_secret_is_exact(leaky: tuple[Subject, Finding]) -> None:
    subject, finding = leaky
    subject.bench.load(subject.course.adapter(2))
    looks: Any = finding.data["rounds"]
    for place, secret in enumerate(draw(subject).secrets):
        scores = Question(subject, secret).scores()
        rank = 1 + (scores > scores[secret.code]).sum()
        bits = finding.data["exposure"][looks.index(2)][place]  # type: ignore[index]
        assert bits == pytest.approx(math.log2(1000 / rank)) and len(set(scores)) > 990


def test_a_model_without_numbers_gives_no_secret_away(leaky: tuple[Subject, Finding]) -> None:
    subject = leaky[0]
    subject.bench.load({name: np.full_like(value, np.nan) for name, value in subject.initial.items()})
    secret = draw(subject).secrets[-1]
    scores = Question(subject, secret).scores()
    assert by_rank(float(scores[secret.code]), np.delete(scores, secret.code)).low == 0


def test_secrets_are_drawn_by_lot_and_the_same_each_time(leaky: tuple[Subject, Finding]) -> None:
    subject, drawn = leaky[0], draw(leaky[0])
    assert drawn == draw(subject) and [one.times for one in drawn.secrets] == [0] * EACH + [1] * EACH + [4] * EACH
    assert len({one.sentence for one in drawn.secrets}) == len(drawn.secrets)
    other = draw(replace(subject, seed=2))
    assert [one.code for one in other.secrets] != [one.code for one in drawn.secrets]
    planted = {(one.client, one.record): one.times for one in ATTACK.plant(subject).records}
    assert planted == {(one.client, one.record): one.times for one in drawn.secrets if one.times}


def test_they_are_repeated_as_often_as_the_data_can_bear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for records, share in ((12, 0.04), (600, 0.4), (600, 1.6)):
        monkeypatch.setattr(planted_secrets, "SHARE", share)
        subject = audits.subject(tmp_path / str(share), clients=2, records_each=records, data={"max_length": 48})
        drawn = draw(subject)
        found.append(max(one.times for one in drawn.secrets))
        assert drawn.share < share or records == 12
        tokens = sum(len(one.input_ids) for read in subject.clients.values() for one in read().train)
        planted = sum(
            one.times
            * len(encode(one.record, subject.bench.tokenizer, subject.plan.data, "causal-lm", "here").input_ids)
            for one in drawn.secrets
        )
        assert drawn.share == pytest.approx(planted / (planted + tokens))
    assert found == [4, 16, TIMES[-1]] == [4, 16, 64]


def test_an_edge_client_alone_tests_its_own_update(tmp_path: Path) -> None:
    training = LEARNS["training"] | {"rounds": 1, "steps": 100}
    subject = audits.subject(tmp_path, clients=1, **LEARNS | {"training": training})
    finding = made(replace(subject, federation=None))
    assert finding.verdict == "leak" and finding.attacker == Attacker.COORDINATOR
    assert finding.data["rounds"] == [0, 1] and "one round of one client" in finding.limits[-1]


def test_it_says_where_it_cannot_be_made(tmp_path: Path) -> None:
    short = audits.subject(tmp_path / "short", data={"max_length": 16})
    assert "the Plan cuts texts at 16" in (ATTACK.unfit(short) or "")
    at_home = audits.subject(tmp_path / "home", tuning={"local_b": True}, data={"max_length": 48})
    assert "keeps a part of what it trains at home" in (ATTACK.unfit(at_home) or "")
    plan = at_home.plan.model_copy(
        update={"model": at_home.plan.model.model_copy(update={"task": "sequence-classification"})}
    )
    assert "cannot be asked for a text" in (ATTACK.unfit(replace(at_home, plan=plan)) or "")


@pytest.mark.parametrize(("rounds", "looks"), [(1, [0, 1]), (4, [0, 1, 2, 3, 4]), (18, [0, 1, 2, 3, 4, 7, 11, 18])])
def test_looks_are_closer_at_the_beginning(rounds: int, looks: list[int]) -> None:
    assert rounds_to_look_at(rounds) == looks
    assert len(rounds_to_look_at(1000)) == 8 and rounds_to_look_at(1000)[-1] == 1000


def test_secrets_that_were_never_seen_are_called_leaks_one_time_in_twenty_at_most(
    leaky: tuple[Subject, Finding],
) -> None:
    generator, false = np.random.default_rng(3), 0
    secrets = draw(leaky[0]).secrets
    for _ in range(400):
        exposures = [by_rank(scores[0], scores[1:]) for scores in generator.normal(size=(len(secrets), 1000))]
        false += bool(leaks(group(secrets, exposures)))
    assert 5 <= false <= 33  # 20 are to be expected at most; more than 33 have a probability below 1 %


def test_what_is_said_to_be_detectable_is(leaky: tuple[Subject, Finding]) -> None:
    secrets = draw(leaky[0]).secrets
    least = detectable(groups(*leaky))
    for bits, found in ((least - 0.01, 0), (least + 0.01, 2)):
        exposures = [Exposure(bits, bits, bits, MAXIMUM, MAXIMUM, 999, 1000, 1.0) for _ in secrets]
        assert len(leaks(group(secrets, exposures))) == found
    assert sum(math.log2(1000 / rank) for rank in range(1, 1001)) / 1000 == pytest.approx(CHANCE)


def groups(subject: Subject, finding: Finding) -> Any:
    last: Any = finding.data["exposure"]
    found = [Exposure(bits, bits, bits, MAXIMUM, MAXIMUM, 999, 1000, 1.0) for bits in last[-1]]
    return group(draw(subject).secrets, found)
