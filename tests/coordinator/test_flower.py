"""Rounds over a grid in memory that hands replies back when a test says so: what is counted, and what is not."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from farfield.coordinator import flower, plans
from farfield.coordinator.aggregation.mean import WeightedMean
from farfield.coordinator.conductor import Traffic
from farfield.coordinator.flower import Cancelled, GridCarrier, Present, _DatabaseRoll, _Journal, _Puller
from farfield.coordinator.rounds import EvaluationRound, TrainingRound
from farfield.coordinator.runs import Checkpoint, RoundRecord, RunFolder, RunInfo
from farfield.coordinator.server_optimizer import Moments
from farfield.coordinator.storage import Node, Run, RunState, Store
from farfield.protocols import flower as carried
from farfield.protocols import parcel
from farfield.protocols.envelope import Charter, Identity, Opened, Signer, close_reply, open_task
from farfield.protocols.errors import MalformedMessage, RunError, StorageError
from farfield.protocols.flower import to_record
from farfield.protocols.messages import Evaluated, Failed, Outcome, Reply, Trained
from farfield.protocols.parcel import Parcel
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import State, pack_state

NODES = ("ann", "bob", "cy")
KEYS = {name: Identity(Ed25519PrivateKey.generate(), X25519PrivateKey.generate()) for name in NODES}
SIGNER = Signer(Ed25519PrivateKey.generate())
ADAPTER: State = {"a": np.zeros((2, 2), np.float32), "b": np.zeros(3, np.float32)}
PATIENCE = 30.0
"""Seconds after which a test that waits for something has failed."""


def plan_of(extra: str = "") -> Plan:
    text = '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "lora"\n[training]\nrounds = 3\nsteps = 1\n'
    return plans.parse(f'{text}[protection]\nkind = "sealed"\n{extra}')


def trained(value: float = 1.0, examples: int = 10) -> Trained:
    update = {name: np.full_like(array, value) for name, array in ADAPTER.items()}
    return Trained(pack_state(update, "float32"), examples, 5, 1, 2.0)


@dataclass
class Office:
    """A grid in memory. A message that was announced, and not yet delivered, blocks whoever pulls it, as in Flower."""

    online: list[int] = field(default_factory=lambda: list(range(len(NODES))))
    refusing: frozenset[int] = frozenset()
    sent: dict[str, Message] = field(default_factory=dict)
    ready: dict[str, Message] = field(default_factory=dict)
    announced: set[str] = field(default_factory=set)
    blocked: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    pulled: list[list[str]] = field(default_factory=list)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.online)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            if message.metadata.dst_node_id in self.refusing:
                ids.append("")
                continue
            ids.append(f"message-{len(self.sent)}")
            message.metadata.__dict__["_message_id"] = ids[-1]  # as Flower's own grid does
            self.sent[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        self.pulled.append(ids)
        if self.announced & set(ids):
            self.blocked.set()
            assert self.release.wait(PATIENCE)
        return [self.ready.pop(one) for one in ids if one in self.ready]

    def task(self, node: str, number: int) -> Message:
        """What was sent to the node in round `number`."""
        (found,) = (
            message
            for message in self.sent.values()
            if message.metadata.dst_node_id == NODES.index(node) and message.metadata.group_id == str(number)
        )
        return found

    def deliver(self, reply: Message) -> None:
        self.ready[reply.metadata.reply_to_message_id] = reply

    def answer(self, node: str, outcome: Outcome, number: int = 1) -> None:
        asked = self.task(node, number)
        self.deliver(Message(to_record(closed(asked, node, outcome)), reply_to=asked))

    def fail(self, node: str, code: int, reason: str | None) -> None:
        self.deliver(Message(Error(code, reason), reply_to=self.task(node, 1)))


def opened(asked: Message, node: str) -> Opened:
    """The task in the message, which stays as it is."""
    head = asked.content.config_records["head"]
    raw = head["head"]
    assert isinstance(raw, bytes)
    came = Parcel(raw, frames_of(asked))
    return open_task(came, node, lambda _: SIGNER.key.public_key(), KEYS[node].sealing, time.time())


def closed(asked: Message, node: str, outcome: Outcome) -> Parcel:
    to = opened(asked, node)
    return close_reply(Reply.to(to.task, outcome), to, KEYS[node].signing)


@dataclass
class Book:
    """Who is there, and what was said to whom."""

    there: dict[str, Present] = field(
        default_factory=lambda: {
            name: Present(at, KEYS[name].member, f"{name}'s first") for at, name in enumerate(NODES)
        }
    )
    gone: set[str] = field(default_factory=set)
    said: list[str] = field(default_factory=list)
    told: list[tuple[str, str]] = field(default_factory=list)
    meanwhile: Callable[[], None] = lambda: None

    def present(self) -> Mapping[str, Present]:
        self.meanwhile()
        return dict(self.there)

    def revoked(self, node: str) -> bool:
        return node in self.gone

    def say(self, detail: str) -> None:
        self.said.append(detail)

    def tell(self, node: str, text: str) -> None:
        self.told.append((node, text))


@dataclass
class Clock:
    """A carrier asks it between any two looks at the grid, and each time it lets a story go on by a step."""

    value: float = 100.0
    story: Iterator[None] = field(default_factory=lambda: iter(()))
    began: float = field(default_factory=time.monotonic)

    def __call__(self) -> float:
        assert time.monotonic() - self.began < PATIENCE, "what the story waits for does not happen"
        next(self.story, None)
        return self.value


@dataclass
class Scene:
    """One carrier between a grid, a roll and a clock that tests move."""

    plan: Plan
    workers: int = 1  # replies are then counted in the order in which they were asked for
    office: Office = field(default_factory=Office)
    book: Book = field(default_factory=Book)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        charter = Charter("run", self.plan.canonical(), "ab" * 32, 1000, "cd" * 32)
        self.carrier = GridCarrier(self.office, self.book, self.plan, charter, SIGNER, self.clock, self.workers)

    def training(self, number: int = 1, nodes: Sequence[str] = NODES, wanted: int | None = None) -> TrainingRound:
        rule = WeightedMean(self.plan.aggregation)
        return TrainingRound(self.plan, "run", number, ADAPTER, nodes, rule, self.clock.value, wanted)

    def carry(self, round_: TrainingRound | EvaluationRound, *stories: Callable[[], Iterator[None]]) -> Traffic:
        def told() -> Iterator[None]:
            for story in stories:
                yield from story()

        traffic = Traffic()
        self.clock.story = told()
        self.carrier.carry(round_, "training", traffic)
        return traffic

    def answering(self, *answers: tuple[str, Outcome]) -> Callable[[], Iterator[None]]:
        """These answers come, one after another."""

        def story() -> Iterator[None]:
            for node, outcome in answers:
                self.office.answer(node, outcome)
                yield

        return story

    def time_is_up(self) -> Iterator[None]:
        self.clock.value += 1e9
        yield

    def counted(self, round_: TrainingRound) -> tuple[str, ...]:
        result = round_.result()
        return tuple(sorted(result.clients)) if result else ()


LATE = "run run: your answer to round 1 came after the round was closed; not counted"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(flower, "WATCH_SECONDS", 0.0)
    monkeypatch.setattr(flower, "SAVE_SECONDS", 0.0)
    for name in ("_run_id", "_node_id", "_task_id"):  # the SuperLink gives them to the processes that it starts
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def scenes() -> Iterator[Callable[..., Scene]]:
    """Makes scenes; threads that wait in them are let go at the end."""
    made: list[Scene] = []

    def make(extra: str = "") -> Scene:
        made.append(Scene(plan_of(extra)))
        return made[-1]

    yield make
    for one in made:
        one.office.release.set()


@pytest.fixture
def scene(scenes: Callable[..., Scene]) -> Scene:
    return scenes()


# --- What is counted --------------------------------------------------------------------------------------------------


def test_replies_are_counted_and_are_the_weighted_mean(scene: Scene) -> None:
    round_ = scene.training()
    answers = {"cy": (6.0, 30), "ann": (1.0, 10), "bob": (-2.0, 5)}
    sizes = []

    def story() -> Iterator[None]:
        for node, (value, examples) in answers.items():
            sent = closed(scene.office.task(node, 1), node, trained(value, examples))
            sizes.append(sent.size)
            scene.office.deliver(Message(to_record(sent), reply_to=scene.office.task(node, 1)))
            while node in round_.waiting:
                yield

    traffic = scene.carry(round_, story)
    result = round_.result()
    assert result is not None
    mean = sum(value * examples for value, examples in answers.values()) / 45
    for name, array in ADAPTER.items():
        np.testing.assert_allclose(result.update[name], np.full_like(array, mean), rtol=1e-6)
    assert (result.clients, result.examples, result.steps) == (tuple(answers), 45, 3)
    assert scene.book.said == ["round 1: training"]
    assert (traffic.problems, scene.book.told) == ({}, [])
    assert traffic.up == sum(sizes)
    assert traffic.down > sum(len(raw) for raw in frames_of(scene.office.task("ann", 1))) * len(NODES)


def frames_of(message: Message) -> list[bytes]:
    for body in message.content.array_records.values():
        return [array.data for array in body.values()]
    frames = message.content.config_records["head"]["frames"]
    assert isinstance(frames, list)
    return [frame for frame in frames if isinstance(frame, bytes)]


def test_an_evaluation_travels_as_one(scene: Scene) -> None:
    round_ = EvaluationRound(scene.plan, "run", 1, ADAPTER, NODES, scene.clock.value)
    scene.carry(round_, scene.answering(*((node, Evaluated(3, 4, 1.5, 2)) for node in NODES)))
    score = round_.result()
    assert score is not None
    assert (score.loss, score.accuracy, score.targets, score.clients) == (1.5, 0.5, 12, NODES)
    assert {message.metadata.message_type for message in scene.office.sent.values()} == {"evaluate"}


def test_all_messages_of_a_round_share_their_frames(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parcel, "FRAME_BYTES", 8)
    monkeypatch.setattr(carried, "SMALL_BYTES", 0)
    scene.carry(scene.training(), scene.time_is_up)
    bodies = [message.content["body"] for message in scene.office.sent.values()]
    assert len(bodies) == len(NODES)
    assert all(body is bodies[0] for body in bodies)
    assert len(frames_of(scene.office.task("ann", 1))) == 4, "7 values of 4 bytes in frames of 8"
    assert {message.metadata.message_type for message in scene.office.sent.values()} == {"train"}
    assert [message.metadata.dst_node_id for message in scene.office.sent.values()] == [0, 1, 2]
    heads = [
        record["head"] for message in scene.office.sent.values() for record in message.content.config_records.values()
    ]
    assert len(set(map(str, heads))) == len(NODES)


def test_a_round_nobody_of_which_is_there_is_over_at_once(scene: Scene) -> None:
    scene.book.there.clear()
    traffic = scene.carry(scene.training())
    assert traffic.problems == dict.fromkeys(NODES, "left before the round began")
    assert (traffic.down, scene.office.sent) == (0, {})


def test_who_left_and_whose_task_was_not_taken_is_not_waited_for(scene: Scene) -> None:
    del scene.book.there["ann"]
    scene.office.refusing = frozenset({1})
    round_ = scene.training()
    traffic = scene.carry(round_, scene.answering(("cy", trained())))
    assert traffic.problems == {"ann": "left before the round began", "bob": "the SuperLink did not take its task"}
    assert scene.counted(round_) == ("cy",)


# --- What comes too late ----------------------------------------------------------------------------------------------


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where answers must come in one pull: on a busy machine a thread may wait longer than a pull does."""
    monkeypatch.setattr(flower, "POLL_SECONDS", 1.0)


@pytest.mark.usefixtures("patience")
def test_who_is_too_many_is_not_counted_and_told_so_in_the_same_pull(scene: Scene) -> None:
    """Over-selection: three answers lie on the grid together, and two were wanted."""
    round_ = scene.training(wanted=2)
    pushed = scene.office.push_messages

    def push(messages: Iterable[Message]) -> Iterable[str]:
        ids = list(pushed(messages))
        for node in NODES:
            scene.office.answer(node, trained(100.0 if node == "cy" else 1.0))
        return ids

    scene.office.push_messages = push  # type: ignore[method-assign]
    traffic = scene.carry(round_)
    result = round_.result()
    assert result is not None
    assert result.clients == ("ann", "bob")
    np.testing.assert_allclose(result.update["b"], 1.0, rtol=1e-6)
    assert scene.book.told == [("cy", LATE)]
    assert traffic.problems == {}


def test_who_is_too_many_is_told_so_in_a_later_round(scene: Scene) -> None:
    first = scene.training(wanted=2)
    scene.carry(first, scene.answering(("ann", trained()), ("bob", trained())))
    assert (scene.counted(first), scene.book.told) == (("ann", "bob"), [])
    second = scene.training(2, NODES[:2])

    def story() -> Iterator[None]:
        scene.office.answer("cy", trained(100.0))
        while not scene.book.told:
            yield
        for node in NODES[:2]:
            scene.office.answer(node, trained(3.0), 2)

    traffic = scene.carry(second, story)
    assert scene.book.told == [("cy", LATE)]
    result = second.result()
    assert result is not None
    assert result.clients == ("ann", "bob")
    np.testing.assert_allclose(result.update["b"], 3.0, rtol=1e-6)
    assert traffic.problems == {}
    scene.carry(scene.training(3), scene.time_is_up)
    assert scene.book.told == [("cy", LATE)], "once"


@pytest.mark.usefixtures("patience")
def test_who_misses_the_deadline_is_told_so_in_a_later_round(scenes: Callable[..., Scene]) -> None:
    """The same node may answer its next task meanwhile."""
    scene = scenes("[cohort]\nround_seconds = 60.0\n")
    first = scene.training()

    def until_the_last_moment() -> Iterator[None]:
        scene.office.answer("ann", trained())
        while "ann" in first.waiting:
            yield
        scene.clock.value += 59.9
        yield
        assert not first.closed
        scene.clock.value += 0.1

    traffic = scene.carry(first, until_the_last_moment)
    assert traffic.problems == dict.fromkeys(("bob", "cy"), "no answer within 60 s")
    assert scene.counted(first) == ("ann",)
    second = scene.training(2)

    def story() -> Iterator[None]:
        scene.office.answer("bob", trained(100.0))
        scene.office.fail("cy", ErrorCode.NODE_UNAVAILABLE, "gone")
        for node in NODES:
            scene.office.answer(node, trained(2.0), 2)
        yield

    traffic = scene.carry(second, story)
    assert scene.book.told == [("bob", LATE)], "an error is no answer"
    assert (scene.counted(second), traffic.problems) == (NODES, {})


def test_an_answer_that_is_pulled_after_the_deadline_is_late(
    scenes: Callable[..., Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nobody had noticed yet that the time was up."""
    monkeypatch.setattr(flower, "POLL_SECONDS", PATIENCE)  # the first look at the grid waits for what it gives
    scene = scenes("[cohort]\nround_seconds = 60.0\n")
    round_ = scene.training()
    pull = scene.office.pull_messages

    def slow(message_ids: Iterable[str]) -> Iterable[Message]:
        scene.office.answer("ann", trained())
        scene.clock.value = 160.0
        return pull(message_ids)

    scene.office.pull_messages = slow  # type: ignore[method-assign]
    traffic = scene.carry(round_)
    assert traffic.problems == dict.fromkeys(NODES, "no answer within 60 s")
    assert scene.counted(round_) == ()
    assert scene.book.told == [("ann", LATE)]


# --- Who will not answer ----------------------------------------------------------------------------------------------


def test_a_node_that_started_anew_or_was_revoked_is_given_up(scene: Scene) -> None:
    """And what it sends all the same goes nowhere."""
    round_ = scene.training()

    def story() -> Iterator[None]:
        scene.book.there["ann"] = Present(0, KEYS["ann"].member, "ann's second")
        while "ann" in round_.waiting:
            yield
        del scene.book.there["bob"]
        yield
        yield
        assert "bob" in round_.waiting, "a line that breaks is no reason to give up"
        scene.book.gone.add("bob")
        while "bob" in round_.waiting:
            yield
        assert scene.clock.value == 100.0
        scene.office.answer("ann", trained(100.0))
        scene.office.answer("bob", trained(100.0))
        scene.office.answer("cy", trained())

    traffic = scene.carry(round_, story)
    assert traffic.problems == {"ann": "started anew in the middle of its task", "bob": "was revoked"}
    assert scene.counted(round_) == ("cy",)
    scene.carry(scene.training(2, ["cy"]), scene.time_is_up)
    assert scene.book.told == []


@pytest.mark.parametrize(
    ("code", "reason", "sentence"),
    [
        (ErrorCode.NODE_UNAVAILABLE, "Error: Node Unavailable\x1b[2J", "went away before it answered"),
        (
            ErrorCode.MOD_FAILED_PRECONDITION,
            "a clock\nis\x1b[31m wrong",
            "did not accept its task: a clock�is�[31m wrong",
        ),
        (ErrorCode.MOD_FAILED_PRECONDITION, None, "did not accept its task: "),
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "Zeile 1\r\nZeile 2\u202e", "no reply: Zeile 1��Zeile 2�"),
        (ErrorCode.UNKNOWN, None, "no reply: "),
    ],
)
def test_an_error_becomes_a_sentence_for_people(scene: Scene, code: int, reason: str | None, sentence: str) -> None:
    round_ = scene.training()

    def story() -> Iterator[None]:
        scene.office.fail("ann", code, reason)
        scene.office.answer("bob", Failed("no\x07data"))
        scene.office.answer("cy", trained())
        yield

    traffic = scene.carry(round_, story)
    assert traffic.problems == {"ann": sentence, "bob": "no\ufffddata"}
    assert scene.counted(round_) == ("cy",)
    assert scene.clock.value == 100.0


# --- What is not believed ---------------------------------------------------------------------------------------------


def test_a_reply_that_another_node_made_is_not_counted(scene: Scene) -> None:
    """Of its own task, and of this one with its own key."""
    round_ = scene.training()

    def story() -> Iterator[None]:
        ann, bob, cy = (scene.office.task(node, 1) for node in NODES)
        scene.office.deliver(Message(to_record(closed(cy, "cy", trained(100.0))), reply_to=ann))
        to = opened(bob, "bob")
        forged = close_reply(Reply.to(to.task, trained(100.0)), to, KEYS["cy"].signing)
        scene.office.deliver(Message(to_record(forged), reply_to=bob))
        scene.office.answer("cy", trained())
        yield

    traffic = scene.carry(round_, story)
    result = round_.result()
    assert result is not None
    assert result.clients == ("cy",)
    np.testing.assert_allclose(result.update["b"], 1.0, rtol=1e-6)
    assert set(traffic.problems) == {"ann", "bob"}
    assert "its reply was not accepted: " in traffic.problems["ann"]
    assert "a reply to another task: of 'cy' to round 1 of run 'run'" in traffic.problems["ann"]
    assert "the signature on this reply" in traffic.problems["bob"]
    assert scene.book.told == []


def test_a_reply_to_another_round_is_not_counted(scene: Scene) -> None:
    scene.carry(scene.training(), scene.time_is_up)
    again = scene.training(2)

    def story() -> Iterator[None]:
        old = closed(scene.office.task("ann", 1), "ann", trained(100.0))
        scene.office.deliver(Message(to_record(old), reply_to=scene.office.task("ann", 2)))
        scene.office.answer("bob", trained(), 2)
        scene.office.answer("cy", trained(), 2)
        yield

    traffic = scene.carry(again, story)
    assert scene.counted(again) == ("bob", "cy")
    assert list(traffic.problems) == ["ann"]
    assert "a reply to another task: of 'ann' to round 1 of run 'run'" in traffic.problems["ann"]


def test_a_message_that_farfield_did_not_write_is_not_counted(scene: Scene) -> None:
    round_ = scene.training()

    def story() -> Iterator[None]:
        ann, bob, cy = (scene.office.task(node, 1) for node in NODES)
        scene.office.deliver(Message(RecordDict(), reply_to=ann))
        scene.office.deliver(Message(to_record(Parcel(b"\xff\x00no head", [b"no body"])), reply_to=bob))
        torn = to_record(closed(cy, "cy", trained()))
        torn["more"] = ConfigRecord({"head": b""})
        scene.office.deliver(Message(torn, reply_to=cy))
        yield

    traffic = scene.carry(round_, story)
    assert scene.counted(round_) == ()
    assert traffic.problems.keys() == set(NODES)
    for node in ("ann", "cy"):
        said = "its reply was not accepted: a Flower message that Farfield did not write"
        assert traffic.problems[node] == said
    assert traffic.problems["bob"].startswith("its reply was not accepted: ")


# --- Pulling ----------------------------------------------------------------------------------------------------------


def test_a_reply_that_never_arrives_holds_up_no_other_and_no_deadline(scene: Scene) -> None:
    scene = Scene(scene.plan, workers=2)
    round_ = scene.training()

    def story() -> Iterator[None]:
        scene.office.announced.add(scene.office.task("ann", 1).metadata.message_id)
        while not scene.office.blocked.is_set():
            yield
        for node in NODES[1:]:
            scene.office.answer(node, trained())
            while node in round_.waiting:
                yield
        assert not round_.closed
        scene.clock.value += 1e9

    traffic = scene.carry(round_, story)
    assert scene.counted(round_) == NODES[1:]
    assert set(traffic.problems) == {"ann"}
    assert not scene.office.release.is_set()

    def arrives() -> Iterator[None]:
        scene.office.answer("ann", trained(100.0))
        scene.office.release.set()
        while not scene.book.told:
            yield
        scene.clock.value += 1e9

    scene.carry(scene.training(2), arrives)
    assert scene.book.told == [("ann", LATE)]


@pytest.mark.usefixtures("patience")
def test_each_message_is_asked_for_alone_and_one_that_is_stuck_not_again() -> None:
    office = Office(announced={"a"})
    puller = _Puller(office, workers=2)
    ids = [*"abcdefghij"]
    try:
        for _ in range(3):
            assert not list(puller.arrived(ids))
        assert office.blocked.is_set()
        asked = [one for batch in office.pulled for one in batch]
        assert {one: asked.count(one) for one in ids} == {"a": 1} | dict.fromkeys(ids[1:], 3)
        assert {len(batch) for batch in office.pulled} == {1}
    finally:
        office.release.set()


def test_a_node_that_nothing_can_be_sealed_to_is_lost_alone(scene: Scene) -> None:
    ann = scene.book.there["ann"]
    scene.book.there["ann"] = replace(ann, member=replace(ann.member, sealing=bytes(32)))
    traffic = scene.carry(scene.training(), scene.answering(("bob", trained()), ("cy", trained())))
    assert set(traffic.problems) == {"ann"}
    assert traffic.problems["ann"].startswith("no task can be sealed to it: ")


def test_a_grid_that_fails_ends_the_round(scene: Scene) -> None:
    """The service starts another process then."""

    def broken(message_ids: Iterable[str]) -> Iterable[Message]:
        raise ConnectionError("the SuperLink is gone")

    scene.office.pull_messages = broken  # type: ignore[method-assign]
    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        scene.carry(scene.training())


# --- Waiting for clients ----------------------------------------------------------------------------------------------


def test_gathering_waits_and_says_how_many_there_are(scene: Scene) -> None:
    """Attending is not enough: Flower must know the node, too."""
    scene.office.online = []
    looks: list[None] = []

    def meanwhile() -> None:
        looks.append(None)
        scene.office.online = [[], [], [2], [2], [2, 99], [0, 2]][min(len(looks), 5)]

    scene.book.meanwhile = meanwhile
    assert scene.carrier.gather(2) == ["ann", "cy"]
    assert scene.book.said == [f"waiting for clients: {there} of at least 2 are there" for there in (0, 1)]
    assert len(looks) == 6
    assert scene.carrier.gather(0) == ["ann", "cy"]
    assert len(scene.book.said) == 2


def test_gathering_and_carrying_end_when_the_run_is_no_longer_wanted(scene: Scene) -> None:
    def cancel() -> None:
        raise Cancelled

    scene.office.online = []
    scene.book.meanwhile = cancel
    with pytest.raises(Cancelled):
        scene.carrier.gather(1)
    scene.book.meanwhile = lambda: None

    def story() -> Iterator[None]:
        scene.book.meanwhile = cancel
        yield

    with pytest.raises(Cancelled):
        scene.carry(scene.training(), story)


# --- Journal and roll -------------------------------------------------------------------------------------------------

WHEN = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open("sqlite:///farfield.db", base=tmp_path, upgrade=True)
    run = Run("run", b"{}", "d" * 64, "b" * 64, tmp_path / "run", RunState.QUEUED, "", WHEN)
    opened.add_run(run)
    opened.begin("run", 7, WHEN)
    yield opened
    opened.close()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", RunInfo("run", "ab" * 32, "folder", "cd" * 32), "# plan\n")


def checkpoint(number: int) -> Checkpoint:
    return Checkpoint(RoundRecord(number, 3, 1.5, 1.25, 0.5, 10, 20, 0.1, 6, {"ann": "gone"}), ADAPTER, Moments())


def failing(times: int, error: Exception, call: Callable[..., None]) -> Callable[..., None]:
    """`call`, which does not work so many times."""
    left = [error] * times

    def tried(*arguments: object) -> None:
        if left:
            raise left.pop()
        call(*arguments)

    return tried


@pytest.mark.parametrize("where", ["folder", "store"])
def test_a_round_is_saved_again_and_again_until_it_is(
    store: Store, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "folder":
        full = RunError("cannot be written: no space left on device", where=folder.path)
        monkeypatch.setattr(folder, "save", failing(3, full, folder.save))
    else:
        monkeypatch.setattr(store, "add_round", failing(3, StorageError("disk is full"), store.add_round))
    said: list[str] = []
    monkeypatch.setattr(store, "say", lambda run, detail: said.append(detail))
    _Journal(folder, store, _DatabaseRoll(store, "run")).save(checkpoint(0))
    assert [one.round for one in folder.records()] == [0]
    assert store.rounds("run") == [checkpoint(0).record]
    assert len(said) == 3
    assert all(one.startswith("round 0 cannot be saved, trying again: ") for one in said)


def test_a_round_that_cannot_be_saved_does_not_outlive_its_run(
    store: Store, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "save", failing(10**6, RunError("full"), folder.save))
    store.end("run", RunState.CANCELLED, "", WHEN)
    with pytest.raises(Cancelled):
        _Journal(folder, store, _DatabaseRoll(store, "run")).save(checkpoint(0))


def test_resuming_adds_the_rows_that_are_missing(store: Store, folder: RunFolder) -> None:
    journal = _Journal(folder, store, _DatabaseRoll(store, "run"))
    assert journal.resume() is None
    journal.save(checkpoint(0))
    folder.save(checkpoint(1))
    folder.save(checkpoint(2))
    assert [one.round for one in store.rounds("run")] == [0]
    last = journal.resume()
    assert last is not None
    assert last.record == checkpoint(2).record
    assert store.rounds("run") == [checkpoint(number).record for number in range(3)]


def enrol(store: Store, name: str) -> None:
    keys = KEYS[name]
    signing, sealing = keys.signing.public_key().public_bytes_raw(), keys.member.sealing
    secret = name.encode() * 8
    store.invite([hashlib.sha256(secret).digest()], WHEN, timedelta(days=1))
    store.redeem(secret, Node(name, name.encode(), signing, sealing, name.encode().hex(), WHEN), WHEN)


def test_the_roll_has_those_who_attend_and_whom_flower_knows(store: Store) -> None:
    for name in NODES:
        enrol(store, name)
    roll = _DatabaseRoll(store, "run")
    assert dict(roll.present()) == {}
    for name in NODES:
        store.attend(name, f"{name}'s first", "192.0.2.1", WHEN)
    assert dict(roll.present()) == {}
    store.set_fleet_ids({"ann": 5, "bob": 6})
    found = roll.present()
    assert list(found) == ["ann", "bob"]
    assert (found["ann"].fleet_id, found["ann"].instance) == (5, "ann's first")
    assert found["ann"].member.sealing == KEYS["ann"].member.sealing
    store.revoke("bob", "stolen", WHEN)
    assert list(roll.present()) == ["ann"]
    assert [roll.revoked(name) for name in (*NODES, "eve")] == [False, True, False, True]
    roll.say("round 1: training")
    roll.tell("ann", "late")
    run = store.run("run")
    assert run is not None
    assert run.detail == "round 1: training"
    assert store.take_notices("ann") == ["late"]
    store.end("run", RunState.CANCELLED, "", WHEN)
    with pytest.raises(Cancelled):
        roll.present()


def test_the_roll_bears_a_database_that_does_not_work(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on with what it knew: nobody is given up for that, and none counts as revoked."""
    enrol(store, "ann")
    store.attend("ann", "ann's first", "192.0.2.1", WHEN)
    store.set_fleet_ids({"ann": 5})
    roll = _DatabaseRoll(store, "run")
    before = dict(roll.present())
    assert list(before) == ["ann"]

    def full(*arguments: object) -> None:
        raise StorageError("disk is full")

    for name in ("run", "nodes", "node", "say", "notify"):
        monkeypatch.setattr(store, name, full)
    assert dict(roll.present()) == before
    assert roll.revoked("ann") is False
    roll.say("round 1: training")
    roll.tell("ann", "late")
    assert [record.getMessage() for record in caplog.records] == ["disk is full"] * 4


# --- Traffic ----------------------------------------------------------------------------------------------------------


def test_the_first_problem_of_a_node_is_kept() -> None:
    traffic = Traffic()
    traffic.note({"ann": "was revoked", "bob": "no data"})
    later = {"ann": "left before the round began", "cy": "no answer within 60 s"}
    traffic.note(later)
    assert traffic.problems == {"ann": "was revoked", "bob": "no data", "cy": "no answer within 60 s"}
    assert later == {"ann": "left before the round began", "cy": "no answer within 60 s"}


def test_what_went_wrong_in_training_is_not_replaced_by_the_evaluation(scene: Scene) -> None:
    traffic = Traffic()

    training = scene.training()

    def failed() -> Iterator[None]:
        scene.office.answer("ann", Failed("no data"))
        while "ann" in training.waiting:
            yield
        scene.clock.value += 1e9

    scene.clock.story = failed()
    scene.carrier.carry(training, "training", traffic)
    assert traffic.problems["ann"] == "no data"
    del scene.book.there["ann"]
    evaluation = EvaluationRound(scene.plan, "run", 2, ADAPTER, NODES, scene.clock.value)
    scene.clock.story = scene.time_is_up()
    scene.carrier.carry(evaluation, "evaluating", traffic)
    assert traffic.problems["ann"] == "no data"
    assert evaluation.problems["ann"] == "left before the round began"


def test_a_row_that_has_to_wait_writes_nothing_else_twice(
    store: Store, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(store, "add_round", failing(3, StorageError("disk is full"), store.add_round))
    _Journal(folder, store, _DatabaseRoll(store, "run")).save(checkpoint(1))
    lines = (folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["round"] for line in lines] == [1]


def test_going_on_with_a_full_database_waits_for_room(
    store: Store, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower, "SAVE_SECONDS", 0.0)
    folder.save(checkpoint(0))
    monkeypatch.setattr(store, "add_round", failing(2, StorageError("disk is full"), store.add_round))
    assert _Journal(folder, store, _DatabaseRoll(store, "run")).resume() is not None
    assert [record.round for record in store.rounds("run")] == [0]


@pytest.mark.parametrize("size", [0, carried.SMALL_BYTES // 2, carried.SMALL_BYTES + 1])
def test_a_parcel_of_any_size_comes_out_as_it_went_in(size: int) -> None:
    sent = Parcel(b"head", [bytes(size), b"the end"])
    record = to_record(sent)
    assert ("body" in record) == (size > carried.SMALL_BYTES)
    assert carried.from_record(record) == Parcel(b"head", [bytes(size), b"the end"])


@pytest.mark.parametrize(
    "small", [{"head": b"x"}, {"head": "x", "frames": [b""]}, {"head": b"x", "frames": ["y"]}, {"frames": [b"y"]}]
)
def test_a_small_record_of_another_form_is_no_parcel(small: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage):
        carried.from_record(RecordDict({"head": ConfigRecord(small)}))
