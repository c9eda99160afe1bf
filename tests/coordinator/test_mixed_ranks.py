"""Clients of one run with adapters of several ranks: what they train, what they send, and that it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import Command, refused, running
from tiny import Place, Silent, write_backbone

from farfield.coordinator import plans
from farfield.coordinator.results import Result
from farfield.coordinator.runs import Checkpoint, RunFolder
from farfield.coordinator.simulate import Request, alternatives, simulate
from farfield.coordinator.simulation import Fleet, sources
from farfield.edge_client.worker import Worker
from farfield.emulator.bench import Bench
from farfield.emulator.factors import padded, part, shapes_at
from farfield.protocols.errors import PlanError, RunError
from farfield.protocols.messages import Task, Train, Trained
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import State, pack_state, unpack_state

MIXED = {"rank": 8, "alternatives": [{"rank": 4}, {"rank": 2}]}
TRAINING = {"rounds": 3, "steps": 4, "learning_rate": 0.02}
SEALED = {"kind": "sealed"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def place(tmp_path: Path, backbone: Path) -> Place:
    place = Place.make(tmp_path, backbone)
    place.plan(tuning=MIXED, training=TRAINING, aggregation={"rule": "flexlora"})
    return place


def go(place: Place, **request: Any) -> Result:
    asked = Request(place.path / "plan.toml", data=place.path / "data", runs=place.path / "runs", mixed=True)
    return simulate(replace(asked, **request), Silent())


def last(result: Result) -> Checkpoint:
    return RunFolder.open(result.folder).load(len(result.rounds) - 1)


def benches(place: Place, **tuning: Any) -> tuple[Plan, list[Bench]]:
    place.plan(tuning=MIXED | tuning, training=TRAINING, protection=SEALED)
    plan = plans.load(place.path / "plan.toml")
    return plan, [Bench(plan, place.path / "backbone", local=way) for way in (plan, *alternatives(plan))]


def ranked(adapter: State, rank: int) -> State:
    """The adapter with B at random, and zero beyond the first `rank` ranks."""
    rng = np.random.default_rng(4)
    filled = {name: 0.1 * rng.normal(size=array.shape).astype(np.float32) for name, array in adapter.items()}
    return padded(part(filled, 8, rank), 8)


# --- parts of an adapter --------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_a_part_computes_what_the_whole_does_where_the_other_ranks_are_zero(place: Place, rslora: bool) -> None:
    """So both have one scale, whatever the rank."""
    _, (whole, four, two) = benches(place, rslora=rslora, alpha=24)
    ids = torch.arange(2, 14).unsqueeze(0)
    start = whole.adapter()
    whole.load(start)
    before = whole.tuned.model(input_ids=ids).logits.detach()
    for bench, rank in ((four, 4), (two, 2)):
        adapter = ranked(start, rank)
        whole.load(adapter)
        bench.load(bench.part(adapter))
        expected = whole.tuned.model(input_ids=ids).logits.detach()
        torch.testing.assert_close(bench.tuned.model(input_ids=ids).logits.detach(), expected, rtol=1e-4, atol=1e-4)
        assert (expected - before).abs().max() > 0.01


def test_a_part_is_the_first_ranks_and_its_update_comes_back_at_their_place(place: Place) -> None:
    plan, (whole, four, _) = benches(place)
    adapter = {
        name: np.arange(array.size, dtype=np.float32).reshape(array.shape) for name, array in whole.adapter().items()
    }
    cut = four.part(adapter)
    shapes = {name: array.shape for name, array in adapter.items()}
    assert {name: array.shape for name, array in cut.items()} == shapes_at(shapes, 4)
    back = four.whole(cut)
    for name, array in adapter.items():
        kept = array.copy()
        kept[(slice(4, None),) if "lora_A" in name else (slice(None), slice(4, None))] = 0
        np.testing.assert_array_equal(back[name], kept)
    assert whole.part(adapter) is not four.part(adapter)
    np.testing.assert_array_equal(whole.part(adapter)[name], adapter[name])
    assert four.plan.digest == plan.digest != four.local.digest


def worker(place: Place, plan: Plan, bench: Bench) -> Worker:
    fleet = Fleet(plan, bench, sources(None, place.path / "data"))
    return Worker("client-000.jsonl", bench, lambda: fleet.data("client-000.jsonl"))


def test_an_update_has_the_rank_that_was_trained(place: Place) -> None:
    plan, ways = benches(place)
    adapter = ways[0].adapter()
    task = Task("run", 1, "client-000.jsonl", plan.digest, Train(pack_state(adapter, "float32")), 3)
    for bench, rank in zip(ways, (8, 4, 2), strict=True):
        outcome = worker(place, plan, bench).outcome(task)
        assert isinstance(outcome, Trained)
        shapes = {name: tensor.shape for name, tensor in outcome.update.items()}
        assert shapes == shapes_at({name: array.shape for name, array in adapter.items()}, rank)
        assert any(np.abs(change).max() > 1e-4 for change in unpack_state(outcome.update).values())


def test_an_adapter_of_another_rank_than_the_plans_is_not_cut_to_fit(place: Place) -> None:
    plan, (whole, _, two) = benches(place)
    narrow = part(whole.adapter(), 8, 4)
    task = Task("run", 1, "client-000.jsonl", plan.digest, Train(pack_state(narrow, "float32")), 3)
    reply = worker(place, plan, two).perform(task)
    assert "tensors are not those" in str(reply.outcome)


# --- a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["flexlora", "hetlora", "mean"])
def test_a_fleet_of_mixed_ranks_learns(place: Place, rule: str) -> None:
    place.plan(tuning=MIXED, training=TRAINING, aggregation={"rule": rule}, protection=SEALED)
    mixed, equal = go(place), go(place, mixed=False)
    for result in (mixed, equal):
        losses = [record.eval_loss for record in result.rounds]
        assert None not in losses
        assert losses[-1] < losses[0] - 0.05, losses  # type: ignore[operator]
    assert mixed.rounds[-1].eval_loss == pytest.approx(equal.rounds[-1].eval_loss, abs=0.25)
    assert [record.clients for record in mixed.rounds[1:]] == [3, 3, 3]
    assert mixed.rounds[1].bytes_up < 0.8 * equal.rounds[1].bytes_up
    assert last(mixed).adapter.keys() == last(equal).adapter.keys()
    told = [record.lost for record in mixed.rounds[1:]]
    assert all(0 < one < 1 for one in told if one is not None)
    assert all((one is None) == (rule != "flexlora") for one in told)


def test_it_comes_out_the_same_wherever_it_was_stopped(place: Place) -> None:
    place.plan(
        tuning=MIXED, training=TRAINING, aggregation={"rule": "flexlora", "server_optimizer": "momentum", "beta1": 0.3}
    )
    whole = go(place)

    class Stopped(Silent):
        def on_round(self, record: Any, /) -> None:
            if record.round == 1:
                raise KeyboardInterrupt

    asked = Request(place.path / "plan.toml", data=place.path / "data", runs=place.path / "again", mixed=True)
    with pytest.raises(KeyboardInterrupt):
        simulate(asked, Stopped())
    (begun,) = (place.path / "again").iterdir()
    resumed = simulate(replace(asked, resume=str(begun), mixed=False), Silent())
    assert resumed.adapter_digest == whole.adapter_digest


def test_a_sum_that_nobody_sees_has_clients_of_several_ranks(place: Place) -> None:
    """Each adds zeros for what it does not train, so all that is sent has one length, and the sum is that of `mean`."""
    place.plan(tuning=MIXED, training=TRAINING | {"rounds": 1})
    unseen = go(place)
    assert unseen.rounds[1].problems == {}
    place.plan(tuning=MIXED, training=TRAINING | {"rounds": 1}, protection=SEALED)
    seen = go(place)
    alone, other = last(unseen).adapter, last(seen).adapter
    for name, array in other.items():  # 16 bits over a range of 2 · 0.02 · 4
        np.testing.assert_allclose(alone[name], array, atol=2e-5)


def test_clients_take_what_there_is_in_turn(place: Place) -> None:
    plan, ways = benches(place)
    fleet = Fleet(plan, ways[0], sources(None, place.path / "data"), others=ways[1:])
    assert [fleet.bench(name) for name in fleet.names] == ways
    fleet.use(ways[0])
    assert {fleet.bench(name) for name in fleet.names} == {ways[0]}


def test_without_alternatives_there_is_nothing_to_mix(place: Place) -> None:
    place.plan(training=TRAINING)
    with pytest.raises(PlanError, match=r"tuning\.alternatives lists none"):
        go(place)


def test_a_run_that_was_not_mixed_stays_so(place: Place) -> None:
    result = go(place, mixed=False)
    with pytest.raises(RunError, match="clients all do what the Plan says"):
        go(place, resume=str(result.folder))


# --- what a Plan may list -------------------------------------------------------------------------

BASE = '[model]\nbackbone = "b"\n[training]\nrounds = 1\nsteps = 1\n[tuning]\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('kind = "lora"\nalternatives = [{rank = 9}]', "rank = 9 is more than what clients are sent, which has 8"),
        ('kind = "lora"\nfreeze_a = true\nalternatives = [{rank = 4}]', "only where LoRA's two factors are both sent"),
        ('kind = "fed-sb"\nalternatives = [{rank = 4}]', "only where LoRA's two factors are both sent"),
        ('kind = "lora"\nalternatives = [{kind = "ia3"}]', "'ia3' does not train the same tensors as this 'lora'"),
        ('kind = "lora"\nalternatives = [{kind = "lora-fa"}]', "'lora-fa' does not train the same tensors"),
        ('kind = "full"\nalternatives = [{kind = "mezo"}]', r"alternatives\[0\]: .*'mezo' makes plain steps"),
    ],
)
def test_alternatives_that_could_not_be_put_together_are_refused(text: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        plans.parse(BASE + text)


def test_methods_that_train_the_same_can_stand_in_for_each_other() -> None:
    plan = plans.parse(BASE + 'kind = "lora"\nfreeze_a = true\nalternatives = [{kind = "lora"}]')
    assert plan.ranks == frozenset()
    sgd = BASE.replace("steps = 1", 'steps = 1\noptimizer = "sgd"')
    plan = plans.parse(sgd + 'kind = "full"\nalternatives = [{kind = "mezo"}]')
    (other,) = alternatives(plan)
    assert (other.tuning.kind, other.training) == ("mezo", plan.training)


def test_a_rule_that_compares_updates_wants_one_rank() -> None:
    from farfield.emulator import methods
    from farfield.protocols import plan as plan_module
    from farfield.protocols.rules import Rule

    rules = {"median": Rule(views=True)}
    text = BASE + 'kind = "lora"\nalternatives = [{rank = 4}]\n[aggregation]\nrule = "median"\n'
    with pytest.raises(PlanError, match="holds updates against each other, so they must have one rank"):
        plan_module.parse(text, methods.registered(), rules)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return running(monkeypatch, capsys, "plan", "check")


def test_plan_check_says_what_the_ranks_mean(check: Command, place: Place) -> None:
    for rule, protection, meaning in (
        ("flexlora", None, "flexlora combines updates of these ranks by what their factors are"),
        ("mean", "sealed", "adds zeros for the ranks that it does not train, so these move by the others' work"),
        ("mean", "secagg", "adds zeros for the ranks that it does not train, before it masks"),
    ):
        file = place.plan(tuning=MIXED, aggregation={"rule": rule}, protection={"kind": protection})
        said = " ".join(check(file).out.split())
        assert "instead rank 4; or rank 2 ranks 8, 4, 2:" in said
        assert meaning in said
    file = place.plan(tuning=MIXED, aggregation={"rule": "flexlora"}, protection={"kind": "secagg"})
    refused(check(file), "must see each update")
