"""A worker at a real bench: what it answers, and that what it cannot do is an answer too."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from farfield.edge_client.data import ClientData, Example, TokenExample
from farfield.edge_client.secure import Work
from farfield.edge_client.train import evaluate, train
from farfield.edge_client.worker import Worker
from farfield.emulator.bench import Bench
from farfield.emulator.methods import registered
from farfield.protocols import plan as plans
from farfield.protocols.errors import DataError, MalformedMessage, PlanError
from farfield.protocols.messages import Evaluate, Evaluated, Failed, Reply, Secure, Secured, Task, Train, Trained
from farfield.protocols.plan import Plan
from farfield.protocols.privacy.clipping import l2_norm
from farfield.protocols.seeds import derive
from farfield.protocols.summing import Part, Shapes
from farfield.protocols.tensors import Made, State, pack_state, unpack_state

hf: Any = transformers  # whose constructors are untyped

WORDS = {"<pad>": 0, "<end>": 1} | {f"w{index}": index for index in range(2, 20)}


SEALED = '[protection]\nkind = "sealed"'


def text(rounds: int = 2, wire: str = "float32", examples: str = "", extra: str = SEALED) -> str:
    return f"""
        [model]
        backbone = "anywhere"
        dtype = "float32"
        [tuning]
        kind = "lora"
        rank = 2
        [training]
        rounds = {rounds}
        epochs = 2
        batch_size = 2
        schedule = "linear"
        [evaluation]
        batch_size = 2
        {examples}
        [delivery]
        dtype = "{wire}"
        {extra}
    """


def parsed(source: str) -> Plan:
    return plans.parse(source, registered(), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone")
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>").save_pretrained(path)
    config = hf.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    hf.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bench(folder: Path) -> Bench:
    return Bench(parsed(text()), folder)


def examples(count: int, seed: int = 0) -> list[Example]:
    generator = np.random.default_rng(seed)
    rows = [array("i", [int(one) for one in generator.integers(2, 20, 6 + row)]) for row in range(count)]
    return [TokenExample(ids, ids) for ids in rows]


def data() -> ClientData:
    return ClientData(examples(5), examples(3, seed=1))


@pytest.fixture(scope="module")
def start(bench: Bench) -> State:
    generator = np.random.default_rng(2)
    return {name: generator.normal(0, 0.1, array_.shape).astype(np.float32) for name, array_ in bench.adapter().items()}


def task(bench: Bench, work: Train | Evaluate, round_: int = 1) -> Task:
    return Task("run", round_, "ann", bench.plan.digest, work, cohort=3)


def perform(
    bench: Bench, start: State, kind: type[Train] | type[Evaluate], source: Callable[[], ClientData] = data
) -> Reply:
    sent = task(bench, kind(pack_state(start, "float32")))
    return Worker("ann", bench, source).perform(sent)


def test_training_answers_with_the_difference_and_what_it_took(bench: Bench, start: State) -> None:
    steps: list[float] = []
    sent = task(bench, Train(pack_state(start, "float32")))
    reply = Worker("ann", bench, data, steps.append).perform(sent)
    assert (reply.run, reply.round, reply.node, reply.plan_digest) == ("run", 1, "ann", bench.plan.digest)
    done = reply.outcome
    assert isinstance(done, Trained)
    assert done.examples == 5
    assert done.steps == len(steps) == 6  # two epochs of three batches
    assert done.targets == 2 * sum(len(one.input_ids) - 1 for one in data().train)
    update = unpack_state(done.update)
    assert {name: one.shape for name, one in update.items()} == {name: one.shape for name, one in start.items()}
    for name, parameter in bench.tuned.trainable().items():
        assert update[name].any()
        np.testing.assert_allclose(parameter.detach().numpy(), start[name] + update[name], rtol=0, atol=2**-22)


def test_a_task_is_done_the_same_whatever_was_done_before_it(bench: Bench, start: State) -> None:
    first = perform(bench, start, Train)
    perform(bench, {name: -one for name, one in start.items()}, Train)
    perform(bench, start, Evaluate)
    assert perform(bench, start, Train) == first


def test_checkpointing_and_smaller_parts_of_a_batch_change_no_result(folder: Path, bench: Bench, start: State) -> None:
    done = perform(bench, start, Train).outcome
    assert isinstance(done, Trained)
    for keys in ("checkpointing = true", "gradient_accumulation = 2"):
        batch = 2 if keys.startswith("check") else 1
        other = Bench(parsed(text().replace("batch_size = 2", f"batch_size = {batch}\n{keys}", 1)), folder)
        saving = any(getattr(module, "gradient_checkpointing", False) for module in other.tuned.model.modules())
        assert saving == keys.startswith("check")
        again = perform(other, start, Train).outcome
        assert isinstance(again, Trained)
        assert (again.steps, again.targets) == (done.steps, done.targets)
        for name, change in unpack_state(again.update).items():
            np.testing.assert_allclose(change, unpack_state(done.update)[name], rtol=1e-3, atol=2**-18)


def test_another_round_or_node_is_trained_in_another_order(bench: Bench, start: State) -> None:
    sent = task(bench, Train(pack_state(start, "float32")))
    outcomes = [
        Worker("ann", bench, data).perform(one).outcome
        for one in (sent, replace(sent, round=2), replace(sent, node="b"))
    ]
    updates = [one.update for one in outcomes if isinstance(one, Trained)]
    assert updates[0] != updates[1]
    assert updates[0] != updates[2]


def test_updates_travel_in_the_plans_number_format(folder: Path) -> None:
    bench = Bench(parsed(text(wire="bfloat16")), folder)
    done = perform(bench, bench.adapter(), Train).outcome
    assert isinstance(done, Trained)
    assert {tensor.dtype for tensor in done.update.values()} == {"bfloat16"}


def test_evaluation_is_on_the_held_out_examples(bench: Bench, start: State) -> None:
    measured = perform(bench, start, Evaluate).outcome
    assert isinstance(measured, Evaluated)
    bench.load(start)
    expected = evaluate(bench.tuned, data().held_out, 2, pad_id=bench.pad_id)
    assert measured == Evaluated(3, expected.targets, expected.loss, expected.correct)


def test_evaluation_takes_no_more_examples_than_the_plan_says(folder: Path) -> None:
    bench = Bench(parsed(text(examples="examples = 2")), folder)
    measured = perform(bench, bench.adapter(), Evaluate).outcome
    assert isinstance(measured, Evaluated)
    assert measured.examples == 2
    assert measured.targets == sum(len(one.input_ids) - 1 for one in data().held_out[:2])


def test_evaluation_without_held_out_examples_counts_for_nothing(bench: Bench, start: State) -> None:
    reply = perform(bench, start, Evaluate, lambda: ClientData(examples(2), []))
    assert reply.outcome == Evaluated(0, 0, 0.0, 0)


def refused() -> ClientData:
    raise DataError("no usable example", where="secret-free/path.jsonl")


def test_what_cannot_be_done_is_an_answer(bench: Bench, start: State) -> None:
    for kind in (Train, Evaluate):
        work = kind(pack_state(start, "float32"))
        other = replace(task(bench, work), plan_digest="00" * 32)
        reply = Worker("ann", bench, data).perform(other)
        assert isinstance(reply.outcome, Failed)
        assert reply.plan_digest == "00" * 32
        assert reply.outcome.reason == "run run, round 1: the task belongs to another Plan"

        reply = perform(bench, start, kind, refused)
        assert reply.outcome == Failed("secret-free/path.jsonl: no usable example")

        names = sorted(start)
        shorter = {name: start[name] for name in names[1:]}
        longer = start | {"more": np.zeros(2, np.float32)}
        reshaped = start | {names[0]: start[names[0]].T.copy()}
        for wrong in (shorter, longer, reshaped, {}):
            reply = perform(bench, wrong, kind)
            assert isinstance(reply.outcome, Failed)
            assert "the adapter's tensors are not those" in reply.outcome.reason


def test_a_training_that_runs_away_is_an_answer_and_no_update(folder: Path) -> None:
    fast = text().replace(
        "batch_size = 2", 'batch_size = 2\noptimizer = "sgd"\nlearning_rate = 1e38\nmax_grad_norm = 0.0', 1
    )
    bench = Bench(parsed(fast), folder)
    reply = perform(bench, bench.adapter(), Train).outcome
    assert isinstance(reply, Failed)
    assert re.search(r"diverges|the loss is nan|no longer a number", reply.reason)
    assert "Lower training.learning_rate, which is 1e+38." in reply.reason


def test_an_outcome_alone_is_what_the_reply_holds_and_what_is_impossible_an_error(bench: Bench, start: State) -> None:
    sent = task(bench, Evaluate(pack_state(start, "float32")))
    worker = Worker("ann", bench, data)
    assert worker.outcome(sent) == worker.perform(sent).outcome
    for impossible, error in (
        (replace(sent, plan_digest="00" * 32), PlanError),
        (replace(sent, work=Evaluate({})), MalformedMessage),
    ):
        with pytest.raises(error):
            worker.outcome(impossible)
    with pytest.raises(DataError):
        Worker("ann", bench, refused).outcome(sent)


def test_data_is_not_touched_for_another_plan(bench: Bench, start: State) -> None:
    def touched() -> ClientData:
        raise AssertionError("the data was read")

    sent = replace(task(bench, Train(pack_state(start, "float32"))), plan_digest="00" * 32)
    assert isinstance(Worker("ann", bench, touched).perform(sent).outcome, Failed)


def test_a_round_that_the_plan_does_not_have_is_not_trained(bench: Bench, start: State) -> None:
    """What is promised of a Plan's rounds would not hold of more."""
    sent = task(bench, Train(pack_state(start, "float32")))
    for number in (0, 3, 2**40):
        with pytest.raises(PlanError, match=f"round {number} "):
            Worker("ann", bench, untouched).outcome(replace(sent, round=number))
    with pytest.raises(PlanError, match="round 3 of a Plan of 2"):
        Worker("ann", bench, untouched).outcome(task(bench, Evaluate(pack_state(start, "float32")), 3))


def untouched() -> ClientData:
    raise AssertionError("the data was read")


def secure_step(step: str = "advertise", work: Train | Evaluate | None = None) -> Secure:
    return Secure(step, bytes(32), b"common", b"own", work=work)


def test_where_sums_are_promised_nobody_answers_by_itself(folder: Path) -> None:
    bench = Bench(parsed(text(extra="")), folder)
    assert bench.plan.protection.kind == "secagg"
    for kind in (Train, Evaluate):
        with pytest.raises(PlanError, match="wants this client's answer by itself, and the Plan promises secure"):
            Worker("ann", bench, untouched).outcome(task(bench, kind(pack_state(bench.adapter(), "float32"))))


def test_where_no_sum_is_made_no_step_of_one_is_taken(bench: Bench) -> None:
    sent = replace(task(bench, Evaluate({})), work=secure_step())
    with pytest.raises(PlanError, match="a step of a secure aggregation, which this Plan does not have"):
        Worker("ann", bench, untouched).outcome(sent)


def parts(bench: Bench, work: Train | Evaluate, source: Callable[[], ClientData] = data) -> tuple[Part, Shapes]:
    """What the worker would add to a sum."""
    found: list[tuple[Part, Shapes]] = []

    def secure(task: Task, asked: Secure, do: Work) -> Secured:
        assert asked.work is not None
        found.append(do(task, asked.work))
        return Secured(b"masked")

    sent = replace(task(bench, work), work=secure_step("submit", work))
    assert Worker("ann", bench, source, secure=secure).outcome(sent) == Secured(b"masked")
    return found[0]


def test_what_is_added_to_a_sum_is_what_would_be_told(folder: Path, bench: Bench, start: State) -> None:
    """Training and measuring are the same; losses are summed over their targets."""
    adapter = pack_state(start, "float32")
    secure = Bench(parsed(text(extra="")), folder)
    told, part = perform(bench, start, Train).outcome, parts(secure, Train(adapter))[0]
    assert isinstance(told, Trained)
    assert (part.examples, part.targets, part.steps) == (told.examples, told.targets, told.steps)
    assert part.loss == pytest.approx(told.loss * told.targets, rel=1e-6)
    update = unpack_state(told.update)
    for name in update:
        np.testing.assert_array_equal(part.update[name], update[name])
    assert parts(secure, Train(adapter))[1] == {name: one.shape for name, one in start.items()}
    measured, part = perform(bench, start, Evaluate).outcome, parts(secure, Evaluate(adapter))[0]
    assert isinstance(measured, Evaluated)
    assert (part.examples, part.targets, part.correct) == (measured.examples, measured.targets, measured.correct)
    assert part.loss == pytest.approx(measured.loss * measured.targets, rel=1e-6)
    assert parts(secure, Evaluate(adapter), lambda: ClientData(examples(2), [])) == (Part(), {})


CLIENT = """
    [aggregation]
    weighting = "uniform"
    [privacy]
    kind = "client"
    noise_multiplier = 1.0
"""


@pytest.mark.parametrize("extra", [CLIENT, SEALED + CLIENT], ids=["secagg", "sealed"])
def test_of_a_protected_client_nothing_leaves_but_its_clipped_update(folder: Path, extra: str) -> None:
    bench = Bench(parsed(text(extra=extra)), folder)
    adapter = pack_state(bench.adapter(), "float32")

    def part(norm: float | None) -> Part:
        work = Train(adapter, norm)
        if bench.plan.protection.kind == "secagg":
            return parts(bench, work)[0]
        told = Worker("ann", bench, data).outcome(task(bench, work))
        assert isinstance(told, Trained)
        return Part(unpack_state(told.update), told.examples, told.targets, told.loss, told.steps, 0, told.clipped)

    whole, clipped = part(1e6), part(1e-3)
    assert 1e-3 < l2_norm(whole.update) < 1e6
    assert l2_norm(clipped.update) <= 1e-3
    assert l2_norm(clipped.update) == pytest.approx(1e-3, rel=1e-5)
    assert (whole.clipped, clipped.clipped) == (False, True)
    for one in (whole, clipped):
        assert replace(one, update={}, clipped=False) == Part()
    factor = 1e-3 / l2_norm(whole.update)
    for name, change in whole.update.items():
        np.testing.assert_allclose(clipped.update[name], change * factor, rtol=1e-4, atol=1e-12)
    with pytest.raises(PlanError, match="does not say to which norm"):
        part(None)


@pytest.mark.parametrize("extra", [CLIENT, SEALED + CLIENT], ids=["secagg", "sealed"])
def test_a_loss_that_privacy_does_not_cover_is_not_measured(folder: Path, extra: str) -> None:
    bench = Bench(parsed(text(extra=extra)), folder)
    work = Evaluate(pack_state(bench.adapter(), "float32"))
    with pytest.raises(PlanError, match="a held-out loss, which this Plan's privacy does not allow"):
        if bench.plan.protection.kind == "secagg":
            parts(bench, work, untouched)
        else:
            Worker("ann", bench, untouched).outcome(task(bench, work))


def test_a_loss_that_the_plan_lets_out_is_measured(folder: Path) -> None:
    bench = Bench(parsed(text(extra=CLIENT + "exact_evaluation = true\n")), folder)
    assert parts(bench, Evaluate(pack_state(bench.adapter(), "float32")))[0].targets > 0


def test_a_round_that_is_anothers_turn_is_not_trained(folder: Path) -> None:
    bench = Bench(parsed(text(extra=CLIENT + "participations = 1\n")), folder)
    work = Train(pack_state(bench.adapter(), "float32"), 1.0)
    for node in ("ann", "bob", "cy", "dan"):
        refused = []
        for number in (1, 2):
            sent = replace(task(bench, work, number), node=node, work=secure_step("submit", work))
            try:
                Worker(node, bench, data, secure=did).outcome(sent)
            except PlanError as error:
                assert "is not this client's turn" in str(error)
                refused.append(number)
        assert len(refused) == 1, "of a turn of two rounds it is in one"


def did(task: Task, asked: Secure, do: Work) -> Secured:
    assert asked.work is not None
    do(task, asked.work)
    return Secured(b"")


WHOLE = """
        [tuning]
        kind = "{kind}"
        [training]
        rounds = 2
        steps = 2
        batch_size = 2
        {optimizer}
        [evaluation]
        batch_size = 2
        [delivery]
        dtype = "{wire}"
        [protection]
        kind = "sealed"
        [model]
        backbone = "anywhere"
        dtype = "{dtype}"
"""


@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["mezo", "full"])
def test_what_is_given_up_on_the_way_changes_no_bit(folder: Path, kind: str, dtype: str, wire: Any) -> None:
    """Against training from a start that stays, as one array for each tensor."""
    optimizer = 'optimizer = "sgd"' if kind == "mezo" else ""
    bench = Bench(parsed(WHOLE.format(kind=kind, optimizer=optimizer, wire=wire, dtype=dtype)), folder)
    generator = np.random.default_rng(2)
    begin = {
        name: one + generator.normal(0, 0.1, one.shape).astype(np.float32) for name, one in bench.adapter().items()
    }
    packed = pack_state(begin, wire)
    outcomes = []
    for used_up in (False, True):
        brought = dict(packed)
        done = Worker("ann", bench, data, used_up=used_up).outcome(task(bench, Train(brought)))
        assert isinstance(done, Trained)
        assert (not brought) == (used_up and kind == "mezo")
        outcomes.append(done)
    assert outcomes[0] == outcomes[1]
    plan = bench.plan
    with bench.round(1):
        plain = train(
            bench.tuned, unpack_state(packed), examples(5), plan.training, pad_id=bench.pad_id,
            seed=derive(plan.training.seed, "train", 1, "ann"), steps=2, first_step=0, horizon=4,
        )  # fmt: skip
    assert pack_state(dict(plain.update), wire) == outcomes[0].update
    assert any(np.any(one) for one in plain.update.values())


def test_an_array_that_is_made_when_it_is_asked_for_is_not_made_before() -> None:
    asked: list[str] = []

    def make(name: str) -> NDArray[np.float32]:
        asked.append(name)
        return np.full(1, len(name), np.float32)

    made = Made(["a", "bb"], make)
    assert (list(made), len(made), "bb" in made, "c" in made, asked) == (["a", "bb"], 2, True, False, [])
    assert {name: float(one[0]) for name, one in made.items()} == {"a": 1.0, "bb": 2.0}
    assert asked == ["a", "bb"]
    with pytest.raises(KeyError):
        made["c"]
