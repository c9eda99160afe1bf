"""Membership inference: it finds what is to be found, says where that is nothing, and goes on where it was killed."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import audits
import numpy as np
import pytest
import tiny
from scipy.stats import norm

from farfield.coordinator import plans
from farfield.coordinator.audited import Simulated
from farfield.coordinator.simulation import sources
from farfield.edge_client import data
from farfield.edge_client.audit import Planted, Planting, Subject
from farfield.edge_client.audit import membership_scores as scores
from farfield.edge_client.audit.attack import registered
from farfield.edge_client.audit.candidates import candidates, occurrences, visits
from farfield.edge_client.audit.losses import WORST, losses
from farfield.edge_client.audit.membership_results import (
    BLIND,
    LIRA,
    LOSS,
    OFFLINE,
    RMIA,
    Result,
    control,
    figures,
    leaks,
    result,
)
from farfield.edge_client.audit.membership_words import found
from farfield.edge_client.audit.notes import Notes
from farfield.edge_client.audit.shadows import Shadows, halves
from farfield.edge_client.data import ClientData, Example, collate
from farfield.edge_client.records import Record, Text
from farfield.edge_client.train import evaluate
from farfield.emulator import backbone
from farfield.emulator.bench import Bench
from farfield.protocols.audit.finding import Finding
from farfield.protocols.errors import AuditError
from farfield.protocols.seeds import derive

ATTACK = registered()["membership"]

DATA = {"packing": False, "truncate": True, "max_length": 24, "held_out": 0.5}
SEALED: tiny.Document = {"protection": {"kind": "sealed"}}

LEARNS: tiny.Document = {
    "tuning": {"kind": "full", "rank": None},
    "data": DATA,
    "training": {"rounds": 2, "steps": 20, "learning_rate": 0.03, "batch_size": 8},
    "evaluation": {"every": 2},
}
"""Enough training of little data that records are known by heart."""


def subject(folder: Path, sections: tiny.Document, clients: int = 2, records: int = 40, labels: int = 0) -> Subject:
    """Clients whose records are random letters, so that nothing about one can be known from the others."""
    if not (folder / "backbone").exists():
        tiny.write_backbone(folder / "backbone")
        (folder / "clients").mkdir()
        generator = random.Random(3)
        for client in range(clients):
            rows: list[dict[str, object]] = [
                {"text": "".join(generator.choices("abcdefghij", k=6))} for _ in range(records)
            ]
            if labels:
                rows = [row | {"label": generator.randrange(labels)} for row in rows]
            file = folder / "clients" / f"client-{client}.jsonl"
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given: dict[str, Any] = SEALED | sections
    return audits.subject(folder, **given)


SEEN: tiny.Document = {"data": DATA, "training": {"rounds": 1, "steps": 20}}
"""Enough steps to have seen all records."""


def figure(finding: Finding, name: str) -> Any:
    (one,) = (one for one in finding.figures if one.name == name)
    return one


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Finding]:
    """A run without protection, and what was found in it."""
    made = subject(tmp_path_factory.mktemp("leaky"), LEARNS)
    return made, ATTACK.run(made)


def test_what_is_learnt_by_heart_is_found(leaky: tuple[Subject, Finding]) -> None:
    made, finding = leaky
    assert ATTACK.unfit(made) is None and finding.verdict == "leak"
    for name in ("RMIA", "LiRA", "LiRA, offline", "loss difference"):
        assert figure(finding, f"AUC, {name}").value > 0.75
    area, blind = figure(finding, "AUC, RMIA"), figure(finding, "AUC, loss before training")
    assert area.interval.low > 0.75 and area.chance == 0.5
    assert blind.interval.low < 0.5 < blind.interval.high
    assert "gives away something" in finding.found[0] and "no sign that the two sides differ" in finding.found[-1]


def test_rare_rates_are_given_where_there_are_enough_non_members(leaky: tuple[Subject, Finding]) -> None:
    for fpr, needed in ((0.01, 100), (0.001, 1000)):
        rate = figure(leaky[1], f"members found at {fpr:.1%} false positives, RMIA")
        assert rate.value is None and str(needed) in rate.note
        assert any(f"{fpr:.1%} false positives takes {needed} non-members" in sentence for sentence in leaky[1].found)


def test_a_finding_holds_what_its_scores_follow_from(leaky: tuple[Subject, Finding]) -> None:
    raw: Any = leaky[1].data
    members = np.array([flag == "1" for flag in raw["member"]])
    trained = np.array([[flag == "1" for flag in row] for row in raw["trained_by_shadow"]])
    again = scores.rmia(np.array(raw["loss_released"]), np.array(raw["loss_shadows"]))
    wins = np.sign(again[members][:, None] - again[~members][None]) / 2 + 0.5
    assert figure(leaky[1], "AUC, RMIA").value == pytest.approx(wins.mean(), abs=1e-12)
    assert trained.shape == (4, len(members)) and (trained.sum(axis=0) == 2).all()
    (plot,), (table, clients) = leaky[1].plots, leaky[1].tables
    assert (
        plot.x.log
        and plot.y.log
        and plot.diagonal
        and [one.label for one in plot.series] == [row[0] for row in table.rows]
    )
    assert all(min(*one.x, *one.y) > 0 and (one.x[-1], one.y[-1]) == (1, 1) for one in plot.series)
    assert {row[0] for row in clients.rows} == set(leaky[0].clients)
    assert len(leaky[1].model_dump_json()) < 200_000


def test_shadows_learn_their_own_half(leaky: tuple[Subject, Finding]) -> None:
    """If they did not, LiRA and RMIA would measure noise."""
    raw: Any = leaky[1].data
    measured, trained = (
        np.array(raw["loss_shadows"]),
        np.array([list(row) for row in raw["trained_by_shadow"]]) == "1",
    )
    for losses_, inside in zip(measured, trained, strict=True):
        assert losses_[inside].mean() < losses_[~inside].mean() - 0.1


@pytest.mark.usefixtures("repeatable_noise")
def test_noise_in_which_nothing_is_learnt_leaves_it_at_chance(tmp_path: Path) -> None:
    """The run that leaks without it, with noise far above what is learnt.

    The noise is truly random, and the attack has a right to be lucky once in forty times; twice in three is a defect.
    """
    noisy: tiny.Document = LEARNS | {
        "privacy": {"kind": "client", "noise_multiplier": 100.0, "clipping_norm": 1.0},
        "aggregation": {"weighting": "uniform"},
    }
    findings = []
    for _ in range(3):
        shutil.rmtree(tmp_path / "federations", ignore_errors=True)
        (tmp_path / "notes" / "membership" / "released.json").unlink(missing_ok=True)
        findings.append(ATTACK.run(subject(tmp_path, noisy)))
    assert len({figure(finding, "AUC, RMIA").value for finding in findings}) > 1
    at_chance = [finding for finding in findings if finding.verdict == "no leak found"]
    assert len(at_chance) >= 2
    for finding in at_chance:
        area = figure(finding, "AUC, RMIA")
        assert area.interval.low <= max(0.5, figure(finding, "AUC, loss before training").value)
        assert "not shown to be better than guessing" in finding.found[0]
        assert figure(finding, "AUC, RMIA, where nothing protects").value > 0.75, "it could have found something"


def test_a_difference_that_was_there_before_is_no_leak() -> None:
    """Members of another kind than non-members are told apart by any score, whatever was learnt."""
    generator = np.random.default_rng(2)

    def results(best: float, blind: float) -> dict[str, Result]:
        shifts = {RMIA: best, LIRA: 0, OFFLINE: 0, LOSS: 0, BLIND: blind}
        return {name: result(generator.normal(by, 1, 300), generator.normal(0, 1, 300)) for name, by in shifts.items()}

    assert leaks(results(1.0, 0.0)) and leaks(results(2.0, 0.5)) and leaks(results(1.0, -1.0))
    assert not leaks(results(0.0, 0.0)) and not leaks(results(-1.0, 0.0)) and not leaks(results(1.0, 1.2))
    assert "differ of themselves, and what" in found(results(2.0, 0.5), None, leak=True)[-1]
    assert "differ of themselves, and what" in found(results(2.0, -0.5), None, leak=True)[-1]
    rates = figures(results(3.0, 0.0), None)
    (rare,) = (one for one in rates if one.name == "members found at 1.0% false positives, RMIA")
    assert rare.value is not None and rare.interval is not None and rare.interval.low is not None
    assert 0.5 < rare.interval.low < rare.value < 0.95 and rare.note.startswith("3 of 300")


def test_what_a_killed_audit_had_made_is_not_made_again(tmp_path: Path, leaky: tuple[Subject, Finding]) -> None:
    """Killed while the third shadow is trained: two are kept as they are, and the end is that of an audit in one go."""
    made = subject(tmp_path, LEARNS)

    def kill(what: str, done: int, total: int) -> None:
        if what == "training shadow adapter 3 of 4" and done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        ATTACK.run(replace(made, say=kill))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    notes = tmp_path / "notes" / "membership"
    kept = {file: file.stat().st_mtime_ns for file in notes.iterdir()}
    assert {file.name for file in kept} >= {"shadow-1.safetensors", "shadow-2.safetensors", "shadow-2-losses.json"}
    assert not (notes / "shadow-3.safetensors").exists()
    assert ATTACK.run(subject(tmp_path, LEARNS)) == leaky[1]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_an_edge_client_alone_tests_its_own_update(tmp_path: Path) -> None:
    training = LEARNS["training"] | {"rounds": 1, "steps": 60}
    made = subject(tmp_path, LEARNS | {"training": training}, clients=1, records=80)
    finding = ATTACK.run(replace(made, federation=None))
    assert finding.verdict == "leak" and finding.attacker.startswith("the coordinator")
    assert len(finding.data["loss_shadows"]) == 2  # type: ignore[arg-type]
    assert "one round of this client alone" in finding.tried[0] and len(finding.tables) == 1


def test_it_asks_about_labels_where_the_plan_learns_them(tmp_path: Path) -> None:
    """Labels by lot can only be known by heart."""
    model = {"task": "sequence-classification", "labels": 4}
    texts = DATA | {"packing": None, "truncate": None}
    made = subject(tmp_path, LEARNS | {"data": texts, "model": model}, labels=4)
    finding = ATTACK.run(made)
    assert finding.verdict == "leak" and figure(finding, "AUC, RMIA").value > 0.65
    assert max(finding.model_dump()["data"]["loss_initial"]) < 5, "the loss of one label, not of a text"


def test_members_are_what_was_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of four are less than a client has: what counts is what training really took."""
    seen: Counter[bytes] = Counter()

    def noted(examples: list[Example], pad_id: int) -> dict[str, Any]:
        if made.bench.tuned.model.training:
            seen.update(example.input_ids.tobytes() for example in examples)
        return collate(examples, pad_id)

    made = subject(tmp_path, {"data": DATA, "training": {"rounds": 2, "steps": 2}, "cohort": {"size": 2}}, 3)
    monkeypatch.setattr("farfield.edge_client.train.collate", noted)
    asked = candidates(made)
    keys = [example.input_ids.tobytes() for example in asked.examples]
    inside = {key for key, member in zip(keys, asked.members, strict=True) if member}
    assert inside <= set(seen) and not seen.keys() & (set(keys) - inside)
    for name, read in made.clients.items():
        mine = [one.input_ids.tobytes() for one in read().train]
        rounds = [number for number in (1, 2) if name in made.course.members(number)]
        assert visits(made.plan, name, len(mine), rounds).tolist() == [seen[key] for key in mine]
        assert 0 < sum(seen[key] > 0 for key in mine) < len(mine)


def test_each_client_has_the_same_share_of_both_sides(tmp_path: Path) -> None:
    made = subject(tmp_path, SEEN | {"data": DATA | {"held_out": 0.25}})
    asked = candidates(made)
    by_client = Counter(zip(asked.clients, asked.members.tolist(), strict=True))
    for name in made.clients:
        assert by_client[name, True] == 3 * by_client[name, False] == 30
    held_out = {one.input_ids.tobytes() for read in made.clients.values() for one in read().held_out}
    for example, member in zip(asked.examples, asked.members, strict=True):
        assert (example.input_ids.tobytes() in held_out) is not bool(member)


@pytest.mark.parametrize("packing", [True, False])
def test_what_others_planted_is_no_member(tmp_path: Path, packing: bool) -> None:
    """Planted records look like nothing that is held out, and would be told apart by that."""
    texts = DATA if not packing else {"packing": True, "max_length": 24, "held_out": 0.5}
    made = subject(tmp_path, SEEN | {"data": texts}, records=80)
    records = tuple(Planted("client-0.jsonl", Text(f"QQQ {number} ZZZ QZZ"), times=2) for number in range(3))
    made.plantings["other"] = Planting(records=records)
    planted = [example for example in made.members["client-0.jsonl"].data().train if "QQ" in _text(made, example)]
    assert len(planted) >= 4
    asked = candidates(made)
    assert asked.members[[name == "client-0.jsonl" for name in asked.clients]].any()
    assert not [example for example in asked.examples if any(mark in _text(made, example) for mark in "QZ")]


def test_a_planted_record_is_found_where_its_end_was_dropped() -> None:
    stream = np.array([1, 2, 3, 1, 2, 4, 1, 2], np.intc)
    assert occurrences(stream, np.array([1, 2, 3], np.intc)) == [0, 6]
    assert occurrences(stream, np.array([2, 4], np.intc)) == [4, 7] and not occurrences(stream, np.array([5], np.intc))


def _text(made: Subject, example: Example) -> str:
    return str(made.bench.tokenizer.decode(list(example.input_ids)))


def test_who_holds_out_what_another_trains_on_has_no_non_member_in_it(tmp_path: Path) -> None:
    made = subject(tmp_path, SEEN)
    copied = made.clients["client-1.jsonl"]().held_out[0]
    line = json.dumps({"text": _text(made, copied).removesuffix("<end>")})
    (tmp_path / "clients" / "client-0.jsonl").write_text(f"{line}\n" * 40, encoding="utf-8")
    assert copied.input_ids in [one.input_ids for one in made.clients["client-0.jsonl"]().train]
    asked = candidates(made)
    outside = [one.input_ids for one, member in zip(asked.examples, asked.members, strict=True) if not member]
    assert copied.input_ids not in outside and len(outside) == 19


def test_it_says_where_it_cannot_be_made(tmp_path: Path) -> None:
    nothing = subject(tmp_path / "nothing", {"data": DATA | {"held_out": 0.0}})
    assert "holds anything out" in (ATTACK.unfit(nothing) or "")
    with pytest.raises(AuditError, match=r"no client that trained has held anything out.*data\.held_out"):
        candidates(nothing)
    at_home = subject(tmp_path / "home", {"tuning": {"local_b": True}, "data": DATA})
    assert "keeps a part of what it trains at home" in (ATTACK.unfit(at_home) or "")


def test_the_loss_of_each_is_that_of_evaluation(tmp_path: Path) -> None:
    made = subject(tmp_path, {"data": DATA | {"packing": True, "truncate": False}})
    examples = made.clients["client-0.jsonl"]().train
    assert len({len(one.input_ids) for one in examples}) > 1, "one is to be padded"
    measured = losses(made.bench, made.initial, examples)
    for loss, example in zip(measured, examples, strict=True):
        assert loss == pytest.approx(evaluate(made.bench.tuned, [example], 1, pad_id=made.bench.pad_id).loss, abs=1e-5)
    broken = {name: np.full_like(value, np.nan) for name, value in made.initial.items()}
    assert losses(made.bench, broken, examples[:2]) == [WORST, WORST]


def test_every_example_is_in_half_of_the_shadows() -> None:
    chosen = halves(101, 4, seed=1)
    assert chosen.shape == (4, 101) and (chosen.sum(axis=0) == 2).all()
    assert chosen.sum(axis=1).tolist() == [50, 51, 50, 51] and (chosen[0] != chosen[2]).any()
    assert (chosen == halves(101, 4, seed=1)).all() and (chosen != halves(101, 4, seed=2)).any()


@pytest.mark.slow
@pytest.mark.parametrize(("example", "least", "most"), [("quickstart", 0.65, 0.95), ("private", 0.35, 0.6)])
def test_the_examples_as_they_are(tmp_path: Path, example: str, least: float, most: float) -> None:
    """The demo's federation gives its examples away, and the one with DP-SGD does not as far as can be seen."""
    finding = ATTACK.run(builtin(tmp_path, example))
    assert least < figure(finding, "AUC, RMIA").value < most
    assert 0.4 < figure(finding, "AUC, loss before training").value < 0.6
    assert figure(finding, "AUC, RMIA, where nothing protects").value > 0.7
    rate = figure(finding, "members found at 1.0% false positives, RMIA")
    if example == "quickstart":
        assert finding.verdict == "leak" and rate.interval.low > 0.02
    assert len(finding.model_dump_json()) < 200_000


def builtin(folder: Path, example: str) -> Subject:
    """The Plan of `examples/`, over the built-in clients."""
    file = Path(__file__).parents[2] / "examples" / f"{example}.toml"
    plan = plans.load(file)
    model = backbone.resolve(plan.model.backbone, file.parent)
    bench = Bench(plan, model)
    initial, own = bench.adapter(), {one.name: one for one in sources(8, None)}

    def prepare(name: str, planted: Sequence[Record] = ()) -> ClientData:
        texts = [Text(text) for text in own[name].texts or ()]
        seed = derive(plan.training.seed, "held-out", name)
        return data.prepare(texts, bench.tokenizer, plan.data, plan.model.task, seed, name, planted)

    return Subject(
        plan=plan,
        folder=model,
        bench=bench,
        initial=initial,
        seed=1,
        clients={name: partial(prepare, name) for name in own},
        prepare=prepare,
        federation=Simulated(folder / "federations", bench, initial, (model, "built-in")),
        notes=Notes(folder / "notes"),
        say=audits.quiet,
    )


# LiRA and RMIA once more, one example at a time and straight from the papers.


def drawn(shadows: int, examples: int = 30) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(4)
    return (
        generator.gamma(3.0, 0.5, examples),
        generator.gamma(3.0, 0.5, (shadows, examples)),
        halves(examples, shadows, seed=4),
    )


def logit(loss: float) -> float:
    return math.log(math.exp(-loss) / (1 - math.exp(-loss)))


def gaussians(shadows: Any, trained: Any, inside: bool) -> tuple[list[float], float]:
    """Each example's mean, and the root of the mean of all their sample variances."""
    groups = [
        [logit(loss) for loss, was in zip(column, flags, strict=True) if was == inside]
        for column, flags in zip(shadows.T, trained.T, strict=True)
    ]
    return [statistics.mean(one) for one in groups], math.sqrt(statistics.mean(map(statistics.variance, groups)))


def test_lira_is_the_papers() -> None:
    released, shadows, trained = drawn(4)
    (inside, spread_in), (outside, spread_out) = (gaussians(shadows, trained, which) for which in (True, False))
    assert spread_in != pytest.approx(spread_out, rel=1e-3)
    for score, offline, loss, mean_in, mean_out in zip(
        scores.lira(released, shadows, trained),
        scores.lira_offline(released, shadows, trained),
        released,
        inside,
        outside,
        strict=True,
    ):
        at = logit(loss)
        expected = norm.pdf(at, mean_in, spread_in) / norm.pdf(at, mean_out, spread_out)
        assert score == pytest.approx(math.log(expected), rel=1e-9, abs=1e-9)
        assert norm.cdf(offline) == pytest.approx(norm.cdf(at, mean_out, spread_out), abs=1e-12)


def test_rmia_is_the_papers() -> None:
    released, shadows, _ = drawn(4)
    for x, score in enumerate(scores.rmia(released, shadows)):
        beaten = 0
        for z in range(len(released)):
            if z != x:
                ratio_x, ratio_z = (
                    math.exp(-released[one]) / statistics.mean(math.exp(-loss) for loss in shadows[:, one])
                    for one in (x, z)
                )
                beaten += ratio_x / ratio_z >= 1
        assert score == pytest.approx(beaten / (len(released) - 1), abs=1e-12)


def test_the_control_attacks_each_shadow_with_the_other_pair() -> None:
    _, shadows, trained = drawn(4)
    known = Shadows(shadows, trained, (1,) * 4)
    areas = []
    for one, pair in ((0, (2, 3)), (1, (2, 3)), (2, (0, 1)), (3, (0, 1))):
        score = scores.rmia(shadows[one], shadows[list(pair)])
        inside, outside = score[trained[one]], score[~trained[one]]
        areas.append(statistics.mean((a > b) + (a == b) / 2 for a in inside for b in outside))
    assert control(known) == pytest.approx(statistics.mean(areas), abs=1e-12)
    assert control(Shadows(shadows[:2], trained[:2], (1, 1))) is None


def test_two_shadows_are_enough_for_an_order() -> None:
    """With one on each side nothing is known of their spread, and twice any spread gives the same order."""
    released, shadows, trained = drawn(2)
    expected = [
        (logit(loss) - logit(out)) ** 2 - (logit(loss) - logit(in_)) ** 2
        for loss, out, in_ in zip(released, shadows.T[~trained.T], shadows.T[trained.T], strict=True)
    ]
    assert np.argsort(scores.lira(released, shadows, trained)).tolist() == np.argsort(expected).tolist()


def test_scores_stay_numbers_where_losses_are_extreme() -> None:
    released, shadows = np.array([0.0, WORST, 1.0]), np.array([[0.0, WORST, 1.0], [WORST, 0.0, 1.0]])
    trained = np.array([[True, False, True], [False, True, False]])
    for one in (scores.lira, scores.lira_offline):
        assert np.isfinite(one(released, shadows, trained)).all()
    assert scores.rmia(released, shadows).tolist() == [1.0, 0.0, 0.5]
    assert scores.loss_difference(np.array([3.0]), np.array([1.0])).tolist() == [2.0]
    assert scores.rmia(np.ones(3), np.array([[1.0, 1.0, 2.0]] * 2)).tolist() == [0.5, 0.5, 1.0], "a tie is beaten"
