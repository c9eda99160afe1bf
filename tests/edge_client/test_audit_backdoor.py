"""The backdoor: it opens where nothing stands against it, it is found out, and it is not where nothing is learnt."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from audits import subject

from farfield.edge_client.audit import Subject, backdoor, poison
from farfield.edge_client.audit.backdoor import BackdoorAttack, Defence
from farfield.edge_client.audit.poison import Backdoor, poisoned, success
from farfield.edge_client.data import ClassExample, TokenExample
from farfield.protocols.audit.finding import Finding

OPEN: dict[str, Any] = {"kind": "full", "rank": None}
LEARNS: dict[str, Any] = {"learning_rate": 0.01, "steps": 8}


def test_what_is_poisoned_has_trigger_and_target_in_it_and_is_no_longer() -> None:
    door = Backdoor((7, 8, 9), (1, 2, 3, 4))
    examples = [TokenExample(ids, ids) for ids in (array("i", [5] * 20), array("i", [6] * 3))]
    both = poisoned(examples, door, 1)
    assert both[:2] == examples and both == poisoned(examples, door, 1)
    for example in both[2:]:
        assert isinstance(example, TokenExample) and "7,8,9,1,2,3,4" in ",".join(map(str, example.input_ids))
        assert example.labels is example.input_ids
    assert len(both[2].input_ids) == 20 and both[2].input_ids[0] == 5


def test_a_class_is_poisoned_behind_the_first_token() -> None:
    (_, changed) = poisoned([ClassExample(array("i", [0, 5, 5, 5, 5, 2]), 1)], Backdoor((7, 8, 9), (), 0), 1)
    assert isinstance(changed, ClassExample)
    assert (list(changed.input_ids), changed.label) == ([0, 7, 8, 9, 5, 5], 0)


def test_success_counts_whole_targets_with_the_trigger_only(tmp_path: Path) -> None:
    """A model that was trained on one text and its poisoned copy, until it knows both."""
    one = subject(tmp_path, clients=5, tuning=OPEN, training={"learning_rate": 0.01, "steps": 60})
    door = poison.drawn(one.bench, 3)
    examples = one.clients["client-000.jsonl"]().train[:3]
    assert success(one.bench, examples, door).successes == 0
    update = one.update(poisoned(examples, door, 1), one.initial).update
    one.bench.load({name: value + update[name] for name, value in one.initial.items()})
    with torch.no_grad():
        opened, without = success(one.bench, examples, door), success(one.bench, examples, door, trigger=False)
    assert (opened.successes, opened.trials) == (3, 3) and without.successes == 0
    other = Backdoor(door.trigger, (*door.target[:-1], door.target[0]))
    assert success(one.bench, examples, other).successes == 0, "one wrong token is none"


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out all defences but one."""
    all_of_them = backdoor._defences

    def some(subject: Subject, names: list[str], norm: float) -> list[Defence]:
        kept = ("nobody attacks", "mean", "the Plan", "median")
        return [one for one in all_of_them(subject, names, norm) if one.name in kept]

    monkeypatch.setattr(backdoor, "_defences", some)
    monkeypatch.setattr(backdoor, "STEPS", 8)
    monkeypatch.setattr(backdoor, "ROUNDS", 3)


def made(folder: Path, **sections: dict[str, Any]) -> Finding:
    learnt: dict[str, dict[str, Any]] = {"tuning": OPEN, "training": LEARNS, "data": {"max_length": 24}}
    one = subject(folder, 5, 24, 1, **learnt, **sections)
    assert BackdoorAttack().unfit(one) is None
    return BackdoorAttack().run(one)


def value(finding: Finding, name: str) -> float:
    (found,) = (one.value for one in finding.figures if one.name == f"trigger works: {name}")
    assert found is not None
    return found


def test_a_plan_without_defence_lets_the_backdoor_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    finding = made(tmp_path, protection={"kind": "sealed"}, aggregation={"weighting": "uniform"})
    assert finding.verdict == "failed" and value(finding, "the Plan") > 0.4
    assert value(finding, "the Plan") == value(finding, "mean"), "the Plan is a mean"
    assert value(finding, "nobody attacks") == value(finding, "median") == 0
    assert any("kept it out: median" in sentence for sentence in finding.found)


def test_where_nothing_is_learnt_there_is_no_backdoor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    noise = {"kind": "client", "noise_multiplier": 1000.0, "exact_evaluation": True}
    finding = made(tmp_path, privacy=noise, aggregation={"weighting": "uniform"}, protection={"kind": "sealed"})
    assert finding.verdict == "passed" and value(finding, "the Plan") == 0
    assert any("did not put a backdoor" in sentence for sentence in finding.found)


def test_it_takes_a_federation(tmp_path: Path) -> None:
    assert "5 clients" in str(BackdoorAttack().unfit(subject(tmp_path, clients=4)))
