"""A round whose answers nobody can read: what it comes to, who may fall out when, and what a client refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from secure_clients import Answer, Clients, carry, step_of

from farfield.coordinator import plans
from farfield.coordinator.asking import Verdict
from farfield.coordinator.secure_rounds import SecureRound, SecureStep, scored
from farfield.edge_client.secure import KEPT
from farfield.protocols import secagg
from farfield.protocols.errors import FarfieldError, SecAggError
from farfield.protocols.messages import (
    Evaluate,
    Evaluated,
    Failed,
    Outcome,
    Refused,
    Reply,
    Secure,
    Secured,
    Task,
    Train,
)
from farfield.protocols.plan import Plan
from farfield.protocols.secagg import Step, Terms, messages
from farfield.protocols.summing import Part, Subject, Sum
from farfield.protocols.tensors import State, digest, pack_state, unpack_state

ADAPTER: State = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
SHAPES = {"a": (2, 3), "b": (2,)}
NODES = ("ann", "bob", "cy", "dan", "eve", "flo")
SESSION = bytes(range(32))
STEPS = [Step.ADVERTISE, Step.SHARE, Step.SUBMIT, Step.CONFIRM, Step.UNMASK]
CLIENT = '[aggregation]\nweighting = "uniform"\n[privacy]\nkind = "client"\nnoise_multiplier = 1.0\n'


def plan_of(extra: str = "") -> Plan:
    text = '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "lora"\n[training]\nrounds = 3\nsteps = 1\n'
    return plans.parse(text + extra)


def update_of(node: str) -> State:
    random = np.random.default_rng(list(node.encode()))
    return {name: random.uniform(-0.9, 0.9, shape).astype(np.float32) for name, shape in SHAPES.items()}


def examples_of(node: str) -> int:
    return 10 * (1 + NODES.index(node))


def work(task: Task, asked: Train | Evaluate) -> Part:
    if isinstance(asked, Train):
        return Part(update_of(task.node), examples_of(task.node), 7, 3.5, 2)
    return Part({}, 2, 8, 4.0, correct=3)


def subject_of(clients: Clients, asked: Train | Evaluate, **changes: Any) -> Subject:
    train = isinstance(asked, Train)
    told: dict[str, Any] = {
        "plan": bytes.fromhex(clients.plan.digest),
        "backbone": bytes.fromhex(clients.backbone),
        "frozen": bytes.fromhex(clients.frozen),
        "purpose": "train" if train else "evaluate",
        "adapter": bytes.fromhex(digest(unpack_state(asked.adapter))),
        "clipping_norm": asked.clipping_norm if isinstance(asked, Train) else None,
        "ranges": (1.0, 1.0) if train else (),
    }
    return Subject(**told | changes)


def opened(
    clients: Clients,
    nodes: tuple[str, ...] = NODES,
    asked: Train | Evaluate | None = None,
    wanted: int | None = None,
    session: bytes = SESSION,
    clock: Callable[[], float] = lambda: 0.0,
    subject: Subject | None = None,
    run: str = "run",
) -> SecureRound:
    asked = asked or Train(pack_state(ADAPTER, "float32"))
    shapes = SHAPES if isinstance(asked, Train) else {}
    subject = subject or subject_of(clients, asked)
    identities = clients.identities(nodes)
    return SecureRound(clients.plan, run, 2, asked, subject, shapes, identities, session, clock, wanted)


def honest(clients: Clients, silent: dict[Step, set[str]] | None = None) -> Answer:
    """Everybody answers, but for those who say nothing from a step on."""
    gone: set[str] = set()

    def answer(step: Step, task: Task) -> Outcome | None:
        gone.update((silent or {}).get(step, ()))
        return None if task.node in gone else clients.answer(task)

    return answer


def assert_sum_of(round_: SecureRound, nodes: tuple[str, ...]) -> None:
    """The plain weighted sum of these, within a level of 2²⁴ / 6 or more for each client."""
    assert round_.failure == ""
    assert round_.clients == tuple(sorted(nodes))
    total = round_.sum
    assert total is not None
    assert total.weight == total.examples == sum(map(examples_of, nodes))
    assert (total.targets, total.steps, total.loss) == (7 * len(nodes), 2 * len(nodes), 3.5 * len(nodes))
    for name in SHAPES:
        wanted = sum(examples_of(node) * update_of(node)[name].astype(np.float64) for node in nodes)
        np.testing.assert_allclose(total.update[name], wanted, rtol=0, atol=len(nodes) * 4096 * 2.0**-19)


def test_the_sum_is_the_plain_weighted_one() -> None:
    clients = Clients(plan_of(), work)
    round_ = opened(clients)
    assert carry(round_, honest(clients)) == STEPS
    assert_sum_of(round_, NODES)
    assert not round_.problems
    assert clients.done == list(NODES)


def test_more_than_fifty_draw_a_graph_first() -> None:
    nodes = tuple(f"node-{number:02}" for number in range(52))
    clients = Clients(plan_of(), lambda task, asked: Part({}, 1, 1, 1.0))
    round_ = opened(clients, nodes, Evaluate(pack_state(ADAPTER, "float32")))
    assert carry(round_, honest(clients)) == [STEPS[0], Step.REVEAL, *STEPS[1:]]
    assert round_.sum is not None
    assert round_.sum.examples == 52


@pytest.mark.parametrize("step", STEPS)
def test_who_falls_silent_costs_the_round_no_more_than_its_own_part(step: Step) -> None:
    """After the step that submits its part is there already, and counts."""
    clients = Clients(plan_of(), work)
    round_ = opened(clients)
    assert carry(round_, honest(clients, {step: {"bob", "eve"}})) == STEPS
    late = step in (Step.CONFIRM, Step.UNMASK)
    assert_sum_of(round_, NODES if late else ("ann", "cy", "dan", "flo"))
    waited = 60 if step not in (Step.ADVERTISE, Step.SUBMIT) else 3600
    assert round_.problems == dict.fromkeys(("bob", "eve"), f"no answer within {waited} s")
    assert ("bob" in clients.done) is late


@pytest.mark.parametrize("step", STEPS)
def test_of_too_few_nothing_is_opened(step: Step) -> None:
    clients = Clients(plan_of(), work)
    round_ = opened(clients)
    steps = carry(round_, honest(clients, {step: {"ann", "bob", "cy"}}))
    assert steps == STEPS[: STEPS.index(step) + 1]
    assert round_.sum is None
    assert round_.clients == ()
    assert "too few" in round_.failure or "4 are needed" in round_.failure
    assert set(round_.problems) == {"ann", "bob", "cy"}


def test_the_first_problem_of_a_node_is_what_is_told() -> None:
    """Who fell out early is not blamed for what it could not answer afterwards, and is not asked again."""
    clients = Clients(plan_of(), work)
    asked: list[tuple[Step, str]] = []

    def answer(step: Step, task: Task) -> Outcome:
        asked.append((step, task.node))
        if step is Step.SHARE and task.node == "bob":
            return Refused("not at night")
        if step is Step.SUBMIT and task.node == "cy":
            return Failed("no data")
        return clients.answer(task)

    round_ = opened(clients)
    carry(round_, answer)
    assert round_.problems == {"bob": "refused: not at night", "cy": "no data"}
    assert_sum_of(round_, ("ann", "dan", "eve", "flo"))
    assert [step for step, node in asked if node == "bob"] == STEPS[:2]
    assert [step for step, node in asked if node == "cy"] == STEPS[:3]


def first(round_: SecureRound) -> tuple[Iterator[tuple[str, SecureStep]], SecureStep]:
    steps = round_.steps()
    return steps, next(steps)[1]


def through(round_: SecureRound, clients: Clients, until: Step) -> SecureStep:
    """The step of this kind, open; those before it went well."""
    for _, one in round_.steps():
        if step_of(one) is until:
            return one
        for task in one.tasks():
            one.receive(Reply.to(task, clients.outcome(task)), 0.0)
    raise AssertionError


def test_what_is_no_answer_to_a_step_is_a_problem_of_its_sender() -> None:
    clients = Clients(plan_of(), work)
    round_ = opened(clients)
    steps, one = first(round_)
    ann, bob, cy, dan, eve, flo = one.tasks()
    assert one.receive(Reply.to(ann, Evaluated(1, 1, 0.0, 0)), 0.0) is Verdict.INVALID
    assert one.receive(Reply.to(bob, Secured(b"not an advertisement")), 0.0) is Verdict.INVALID
    # Another's keys, under its own name and under the other's.
    assert one.receive(Reply.to(cy, clients.outcome(dan)), 0.0) is Verdict.INVALID
    assert one.receive(Reply.to(dan, Secured(b"")), 0.0) is Verdict.INVALID
    assert one.receive(Reply.to(eve, clients.outcome(eve)), 0.0) is Verdict.ACCEPTED
    assert not one.closed
    assert one.receive(Reply.to(flo, clients.outcome(flo)), 0.0) is Verdict.ACCEPTED
    assert one.closed
    assert set(one.problems) == {"ann", "bob", "cy", "dan"}
    assert list(steps) == []
    assert "2 clients" in round_.failure


def test_what_is_not_addressed_to_the_step_changes_nothing() -> None:
    clients = Clients(plan_of(), work)
    _, one = first(opened(clients))
    task = next(iter(one.tasks()))
    good = Reply.to(task, clients.outcome(task))
    strays = [
        replace(good, run="other"),
        replace(good, round=1),
        replace(good, node="gil"),
        replace(good, plan_digest=""),
    ]
    assert [one.receive(stray, 0.0) for stray in strays] == [Verdict.STRAY] * 4
    assert one.receive(good, 0.0) is Verdict.ACCEPTED
    assert one.receive(good, 0.0) is Verdict.STRAY
    assert not one.problems


def test_a_step_must_be_closed_before_the_next() -> None:
    steps, _ = first(opened(Clients(plan_of(), work)))
    with pytest.raises(RuntimeError, match="still open"):
        next(steps)


def test_the_deadlines_of_the_steps() -> None:
    """Work, and the first step, have the round's; the others are short; each counts from where it began."""
    now = 1000.0
    clients = Clients(plan_of("[cohort]\nround_seconds = 600.0\n[protection]\nstep_seconds = 20.0\n"), work)
    round_ = opened(clients, clock=lambda: now)
    for _, one in round_.steps():
        seconds = 600 if step_of(one) in (Step.ADVERTISE, Step.SUBMIT) else 20
        *others, last = one.tasks()
        for task in others:
            one.receive(Reply.to(task, clients.outcome(task)), now)
        one.tick(now + seconds - 0.1)
        assert one.waiting == {last.node}
        assert not one.closed
        one.tick(now + seconds)
        assert one.closed
        assert one.problems == {last.node: f"no answer within {seconds} s"}
        assert one.receive(Reply.to(last, Failed("late")), now + seconds) is Verdict.LATE
        now += 5000.0
        if step_of(one) is Step.SHARE:
            break


def test_a_round_shorter_than_a_step_bounds_it() -> None:
    clients = Clients(plan_of("[cohort]\nround_seconds = 5.0\n"), work)
    one = through(opened(clients), clients, Step.SHARE)
    one.tick(5.0)
    assert one.closed


@pytest.mark.parametrize(("wanted", "counted"), [(5, 5), (4, 4), (2, 4), (None, 6)])
def test_over_selection_closes_with_as_many_as_wanted_but_not_fewer_than_may_be_opened(
    wanted: int | None, counted: int
) -> None:
    clients = Clients(plan_of(), work)
    round_ = opened(clients, wanted=wanted)
    carry(round_, honest(clients))
    assert_sum_of(round_, NODES[:counted])
    assert not round_.problems
    assert clients.done == list(NODES[:counted])


def test_only_the_step_that_submits_is_over_selected() -> None:
    clients = Clients(plan_of(), work)
    round_ = opened(clients, wanted=4)
    asked = []
    for _, one in round_.steps():
        tasks = list(one.tasks())
        asked.append(len(tasks))
        for task in tasks:
            if not one.closed:
                one.receive(Reply.to(task, clients.outcome(task)), 0.0)
    assert asked == [6, 6, 6, 4, 4]


def test_an_evaluation_is_scored_over_all_targets() -> None:
    clients = Clients(plan_of(), lambda task, _: Part() if task.node == "ann" else Part({}, 2, 8, 4.0, correct=3))
    round_ = opened(clients, asked=Evaluate(pack_state(ADAPTER, "float32")))
    assert carry(round_, honest(clients)) == STEPS
    assert round_.sum is not None
    score = scored(round_.sum, round_.clients)
    assert score is not None
    assert (score.loss, score.accuracy, score.targets, score.clients) == (0.5, 3 / 8, 40, NODES)
    assert scored(Sum({}, 6.0, examples=3), NODES) is None


def test_a_client_that_diverged_falls_out_and_the_others_count() -> None:
    """A loss, or a value, that is no number ends its own session and nothing else."""

    def diverging(task: Task, asked: Train | Evaluate) -> Part:
        part = work(task, asked)
        if task.node == "ann":
            return replace(part, loss=float("nan"))
        if task.node == "bob":
            return replace(part, update={**part.update, "b": np.full(2, np.inf, np.float32)})
        return part

    clients = Clients(plan_of(), diverging)
    round_ = opened(clients)
    carry(round_, honest(clients))
    assert set(round_.problems) == {"ann", "bob"}
    assert_sum_of(round_, ("cy", "dan", "eve", "flo"))


def test_a_share_that_is_not_the_one_dealt_is_told() -> None:
    """The sum is right as long as enough others are true, and who sent the false one is named."""
    clients = Clients(plan_of(), work)

    def answer(step: Step, task: Task) -> Outcome:
        outcome = clients.answer(task)
        if step is Step.UNMASK and task.node == "bob" and isinstance(outcome, Secured):
            shares = dict(messages.decode_revelation(bytes(outcome.answer), len(NODES)))
            return Secured(messages.encode_revelation(shares | {"cy": shares["dan"]}))
        return outcome

    round_ = opened(clients)
    carry(round_, answer)
    assert_sum_of(round_, NODES)
    assert round_.problems == {"bob": "revealed a share of cy that is not the one dealt to it"}


# What a client refuses.


def secure(task: Task) -> Secure:
    assert isinstance(task.work, Secure)
    return task.work


def asking(**changes: Any) -> Callable[[Task], Task]:
    return lambda task: replace(task, work=replace(secure(task), **changes))


def opening(**changes: Any) -> Callable[[Task], Task]:
    """Another Open in the place of the one that came."""

    def tamper(task: Task) -> Task:
        raw = bytes(secure(task).common)
        return asking(common=secagg.encode_open(replace(secagg.decode_open(raw), **changes)))(task)

    return tamper


@pytest.mark.parametrize(
    ("tamper", "match"),
    [
        (lambda task: replace(task, run="other"), "another session, run or round"),
        (lambda task: replace(task, round=3), "another session, run or round"),
        (asking(session=bytes(32)), "another session, run or round"),
        (opening(session=bytes(32)), "another session, run or round"),
        (opening(minimum=2), "a sum of 2 of 6 clients would be opened"),
        (opening(minimum=6), "a sum of 6 of 6 clients would be opened"),
        (opening(clients=9), "a sum of 4 of 9 clients would be opened"),
        (opening(corrupt=0.0), "other parameters than the Plan's"),
        (opening(dropouts=0.0), "other parameters than the Plan's"),
        (opening(adversary="curious"), "other parameters than the Plan's"),
    ],
)
def test_an_aggregation_that_is_not_the_tasks_and_the_plans_is_not_begun(
    tamper: Callable[[Task], Task], match: str
) -> None:
    clients = Clients(plan_of(), work)
    _, one = first(opened(clients))
    task = next(iter(one.tasks()))
    with pytest.raises(SecAggError, match=match):
        clients.outcome(tamper(task))
    clients.outcome(task)  # nothing was begun


@pytest.mark.parametrize(
    ("terms", "match"), [(Terms(7, 2), "6 clients|7"), (Terms(3, 5), "4|5"), (Terms(3, 2, {}), "ann|bob|roster|peer")]
)
def test_the_owners_own_terms_are_kept(terms: Terms, match: str) -> None:
    clients = Clients(plan_of(), work, terms=terms)
    round_ = opened(clients)
    carry(round_, honest(clients))
    assert round_.sum is None
    assert not clients.done


def other(name: str) -> State:
    return ADAPTER | {name: ADAPTER[name] + 1}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"work": Train(pack_state(other("b"), "float32"))}, "another adapter than was agreed on"),
        ({"work": Train(pack_state({"a": ADAPTER["a"]}, "float32"))}, "another adapter than was agreed on"),
        ({"work": Train(pack_state(ADAPTER, "float32"), 1.0)}, "other work than was agreed on"),
        ({"work": Evaluate(pack_state(ADAPTER, "float32"))}, "other work than was agreed on"),
        ({"work": None}, "without the work"),
        ({"subject": b""}, "another subject"),
        ({"step": "confirm"}, "the step 'confirm', and this node waits for 'submit'"),
        ({"step": "advertise"}, "begun before"),
    ],
)
def test_other_work_than_the_sessions_is_not_submitted(changes: dict[str, Any], match: str) -> None:
    clients = Clients(plan_of(), work)
    one = through(opened(clients), clients, Step.SUBMIT)
    task = next(iter(one.tasks()))
    with pytest.raises(SecAggError, match=match):
        clients.outcome(asking(**changes)(task))
    assert not clients.done
    if changes.get("step") != "advertise":
        with pytest.raises(SecAggError, match="does not take part in, or has finished"):
            clients.outcome(task)


def test_another_clipping_norm_than_the_sessions_is_not_trained_with() -> None:
    clients = Clients(plan_of(CLIENT), work)
    asked = Train(pack_state(ADAPTER, "float32"), 1.0)
    one = through(opened(clients, asked=asked), clients, Step.SUBMIT)
    task = next(iter(one.tasks()))
    for changed in (replace(asked, clipping_norm=100.0), replace(asked, clipping_norm=None)):
        with pytest.raises(SecAggError):
            clients.outcome(asking(work=changed)(task))
    assert not clients.done


@pytest.mark.parametrize(
    "changes", [{"plan": bytes(32)}, {"backbone": bytes(32)}, {"frozen": bytes(32)}, {"adapter": bytes(32)}], ids=str
)
def test_a_session_over_something_else_gets_no_part(changes: dict[str, Any]) -> None:
    """Agreed on by everybody, and still not what this node knows of the run."""
    clients = Clients(plan_of(), work)
    asked = Train(pack_state(ADAPTER, "float32"))
    round_ = opened(clients, subject=subject_of(clients, asked, **changes))
    assert carry(round_, honest(clients)) == STEPS[:3]
    assert round_.sum is None
    assert set(round_.problems) == set(NODES)
    assert not clients.done


def test_work_at_any_other_step_is_refused() -> None:
    for step in (Step.ADVERTISE, Step.SHARE, Step.CONFIRM, Step.UNMASK):
        clients = Clients(plan_of(), work)
        one = through(opened(clients), clients, step)
        before = list(clients.done)
        task = next(iter(one.tasks()))
        with pytest.raises(SecAggError, match="work at the step"):
            clients.outcome(asking(work=Train(pack_state(ADAPTER, "float32")))(task))
        assert clients.done == before


def test_nothing_is_answered_twice() -> None:
    """Not even the same question: two masked vectors, or two openings, would tell what one does not."""
    for step in STEPS:
        clients = Clients(plan_of(), work)
        one = through(opened(clients), clients, step)
        task = next(iter(one.tasks()))
        clients.outcome(task)
        with pytest.raises(SecAggError):
            clients.outcome(task)


def test_after_a_second_submit_the_session_is_over() -> None:
    clients = Clients(plan_of(), work)
    one = through(opened(clients), clients, Step.SUBMIT)
    for task in one.tasks():
        one.receive(Reply.to(task, clients.outcome(task)), 0.0)
    ann = next(iter(one.tasks()))
    with pytest.raises(SecAggError, match="the step 'submit', and this node waits for 'confirm'"):
        clients.outcome(ann)
    with pytest.raises(SecAggError, match="does not take part in, or has finished"):
        clients.outcome(asking(step="confirm", subject=b"", work=None)(ann))
    assert clients.done.count("ann") == 1


def test_a_finished_session_is_forgotten_and_not_begun_again_under_its_old_keys() -> None:
    clients = Clients(plan_of(), work)
    advertised: list[bytes] = []

    def answer(step: Step, task: Task) -> Outcome:
        outcome = clients.answer(task)
        if step is Step.ADVERTISE and task.node == "ann" and isinstance(outcome, Secured):
            advertised.append(bytes(outcome.answer))
        return outcome

    for _ in range(2):
        carry(opened(clients), answer)
    assert len(set(advertised)) == 2


def test_a_node_takes_part_in_so_many_at_once_and_gives_up_the_oldest() -> None:
    clients = Clients(plan_of(), work)
    tasks = []
    for number in range(KEPT + 1):
        one = through(opened(clients, session=bytes([number]) * 32), clients, Step.SHARE)
        tasks.append(next(iter(one.tasks())))
    with pytest.raises(SecAggError, match="does not take part in"):
        clients.outcome(tasks[0])
    assert isinstance(clients.outcome(tasks[1]), Secured)
    assert isinstance(clients.outcome(tasks[-1]), Secured)


def test_a_failure_of_the_work_itself_ends_the_session() -> None:
    def failing(task: Task, asked: Train | Evaluate) -> Part:
        raise FarfieldError("no data") if task.node == "ann" else KeyboardInterrupt

    clients = Clients(plan_of(), failing)
    one = through(opened(clients), clients, Step.SUBMIT)
    for task, expected in zip(one.tasks(), (FarfieldError, KeyboardInterrupt), strict=False):
        with pytest.raises(expected):
            clients.outcome(task)
        with pytest.raises(SecAggError, match="does not take part in"):
            clients.outcome(task)


def test_an_update_of_another_form_than_the_layouts_is_not_sent() -> None:
    clients = Clients(
        plan_of(), lambda task, _: Part({"a": np.zeros((2, 4), np.float32), "b": np.zeros(2, np.float32)}, 1)
    )
    round_ = opened(clients)
    carry(round_, honest(clients))
    assert round_.sum is None
    assert set(round_.problems.values()) == {"a sum of another form than this Plan's"}


def test_a_session_moves_between_processes_and_is_then_used_up() -> None:
    clients = Clients(plan_of(), work)
    one = through(opened(clients), clients, Step.SUBMIT)
    ann = next(iter(one.tasks()))
    sessions = clients.sessions["ann"]
    dumped = sessions.dump()
    with pytest.raises(SecAggError, match="does not take part in"):
        clients.outcome(ann)
    sessions.restore(dumped, Terms(1, 1))
    assert isinstance(clients.outcome(ann), Secured)
    assert SESSION.hex() in dumped


def test_secrets_are_not_shown() -> None:
    clients = Clients(plan_of(), work)
    through(opened(clients), clients, Step.SUBMIT)
    shown = repr(clients.sessions["ann"])
    assert "_open" not in shown
    assert "identity" not in shown


@pytest.mark.parametrize("kind", [Train, Evaluate])
def test_no_part_is_in_two_sums_of_different_company(kind: type[Train] | type[Evaluate]) -> None:
    """Whoever has both knows what one more client added, whatever else was chosen otherwise the second time."""
    clients, asked = Clients(plan_of(), work), kind(pack_state(ADAPTER, "float32"))
    first = opened(clients, asked=asked, session=bytes(32))
    carry(first, honest(clients))
    assert first.sum is not None
    changes: dict[str, Any] = {"ranges": (1.0, 1.0000001)} if kind is Train else {}
    other = opened(clients, asked=asked, session=bytes([1]) * 32, subject=subject_of(clients, asked, **changes))
    carry(other, honest(clients, {Step.SUBMIT: {NODES[-1]}}))
    assert other.sum is None
    assert any("tell clients apart" in problem for problem in other.problems.values())
    again = opened(clients, asked=asked, session=bytes([2]) * 32)
    carry(again, honest(clients))
    assert again.sum is not None, "the same sum again tells nobody anything new"
