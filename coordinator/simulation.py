"""A whole federation in one process: the same rounds, messages and worker as a deployment, without the network.

Every task and every reply goes through the codec as bytes, and those bytes are what is counted. One bench (a backbone
with the tuning method installed) serves all clients in turn, and of their examples only so much is kept, so memory
does not grow with the number of clients.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from farfield.protocols import codec
from farfield.protocols.errors import DataError, PlanError, WireError
from farfield.protocols.messages import Failed, Participant, Reply, Task
from farfield.protocols.plan import Plan
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import State

from .aggregation import SumRule, registered
from .rounds import EvaluationRound, TrainingRound, sample_cohort, sample_evaluators
from .runs import Checkpoint, RoundRecord, RunFolder
from .server_optimizer import Moments, step

if TYPE_CHECKING:
    from farfield.edge_client.data import ClientData
    from farfield.emulator.bench import Bench

CACHED_BYTES = 32_000_000
"""How much memory the clients' examples may take after use, so that small data is tokenised only once."""

EXAMPLE_BYTES = 130
"""What an example takes besides its tokens of 4 bytes each."""


@dataclass(frozen=True, slots=True)
class Faults:
    """Simulated trouble: the probability that a client vanishes from a round, or answers when the round is over."""

    dropout: float = 0.0
    stragglers: float = 0.0


class Observer(Protocol):
    """Is told how a simulation goes on; the console, or nobody."""

    def on_preparing(self, done: int, clients: int) -> None: ...
    def on_client(self, number: int, activity: str, done: int, clients: int) -> None: ...
    def on_round(self, record: RoundRecord) -> None: ...


@dataclass(frozen=True, slots=True)
class Source:
    """Where one client's records come from: a file or folder, or prose of the standard library."""

    name: str
    path: Path | None = None
    texts: tuple[str, ...] = ()


def sources(clients: int | None, data: Path | None) -> list[Source]:
    """One source for each client: the entries of `data` in the order of their names, or the standard library's prose.

    Raises:
        DataError: `data` is no folder or holds fewer entries than `clients`.
    """
    from farfield.edge_client import stdlib

    if data is None:
        if clients is None:
            raise DataError(
                "how many clients?", hint="Give --clients N, or --data DIR with one file or folder per client."
            )
        return [Source(name, texts=tuple(texts)) for name, texts in stdlib.clients(clients)]
    if not data.is_dir():
        raise DataError("not a folder", where=data, hint="--data takes a folder with one file or folder per client.")
    found = [Source(path.name, path) for path in sorted(data.iterdir()) if not path.name.startswith(".")]
    if not found:
        raise DataError("the folder is empty", where=data, hint="It should hold one file or folder per client.")
    if clients is not None and clients > len(found):
        raise DataError(
            f"{clients} clients, but data for {len(found)}", where=data, hint="Lower --clients, or add data."
        )
    return found[:clients]


class Fleet:
    """The simulated clients: gives each by name as a participant, at one bench."""

    def __init__(self, plan: Plan, bench: Bench, clients: Sequence[Source]) -> None:
        self._plan = plan
        self._bench = bench
        self._sources = {client.name: client for client in clients}
        self._kept: OrderedDict[str, tuple[ClientData, int]] = OrderedDict()

    @property
    def names(self) -> list[str]:
        return sorted(self._sources)

    def client(self, name: str) -> Participant:
        from farfield.edge_client.worker import Worker

        return Worker(name, self._bench, lambda: self.data(name))

    def data(self, name: str) -> ClientData:
        """The client's examples: those used last are kept, up to `CACHED_BYTES`, the others read again."""
        if name not in self._kept:
            data = self._read(name)
            size = sum(EXAMPLE_BYTES + 4 * len(example.input_ids) for example in (*data.train, *data.held_out))
            self._kept[name] = data, size
        self._kept.move_to_end(name)
        while sum(size for _, size in self._kept.values()) > CACHED_BYTES and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return self._kept[name][0]

    def check(self, observer: Observer) -> None:
        """Read every client's data once, so that what is wrong with it is said before any work is done.

        Raises:
            DataError: names the client's file and line.
        """
        for done, name in enumerate(self.names, 1):
            self.data(name)
            observer.on_preparing(done, len(self.names))

    def _read(self, name: str) -> ClientData:
        from farfield.edge_client import data, records

        source, plan = self._sources[name], self._plan
        if source.path is None:
            if plan.model.task != "causal-lm":
                raise PlanError(
                    f"the built-in clients hold text without classes, so they cannot do {plan.model.task}",
                    hint="Give --data.",
                )
            read: Iterator[records.Record] = iter([records.Text(text) for text in source.texts])
        else:
            read = records.read(source.path, plan.data, plan.model.task, plan.model.labels)
        seed = derive(plan.training.seed, "held-out", name)
        where = source.path or f"client {name}"
        return data.prepare(read, self._bench.tokenizer, plan.data, plan.model.task, seed, where)


@dataclass(slots=True)
class _Traffic:
    """Bytes of encoded messages in one round."""

    down: int = 0
    up: int = 0
    problems: dict[str, str] = field(default_factory=dict)


class Simulation:
    """One run of a Plan over simulated clients, from a checkpoint to the end."""

    def __init__(self, plan: Plan, folder: RunFolder, fleet: Fleet, faults: Faults, observer: Observer) -> None:
        self._plan, self._folder, self._fleet, self._faults, self._observer = plan, folder, fleet, faults, observer
        self._run = folder.info.run
        rule = registered()[plan.aggregation.rule](plan.aggregation)
        if not isinstance(rule, SumRule):
            raise PlanError(
                f"aggregation.rule = {plan.aggregation.rule!r} must see each update; simulate has sums only"
            )
        self._rule: SumRule = rule

    def go(self, initial: State) -> Checkpoint:
        """Do the rounds that are left, each ended by a checkpoint, and return the last.

        Args:
            initial: the adapter before the first round, used when there is no checkpoint yet.
        """
        last = self._folder.resume() or self._begin(initial)
        for number in range(last.record.round + 1, self._plan.training.rounds + 1):
            last = self._round(number, last)
            self._folder.save(last)
            self._observer.on_round(last.record)
        return last

    def _begin(self, initial: State) -> Checkpoint:
        began = time.monotonic()
        traffic = _Traffic()
        loss, accuracy = self._evaluate(0, initial, traffic)
        seconds = time.monotonic() - began
        record = RoundRecord(0, 0, None, loss, accuracy, traffic.down, traffic.up, seconds, problems=traffic.problems)
        checkpoint = Checkpoint(record, initial, Moments())
        self._folder.save(checkpoint)
        self._observer.on_round(record)
        return checkpoint

    def _round(self, number: int, last: Checkpoint) -> Checkpoint:
        plan, began, traffic = self._plan, time.monotonic(), _Traffic()
        cohort = sample_cohort(plan, number, self._fleet.names)
        training = TrainingRound(plan, self._run, number, last.adapter, cohort, self._rule, now=0.0)
        self._drive(training, "training", traffic)
        aggregate = training.result()
        adapter, moments = last.adapter, last.moments
        if aggregate is not None:
            adapter, moments = step(plan.aggregation, adapter, aggregate.update, moments)
        loss, accuracy = None, None
        if number % plan.evaluation.every == 0 or number == plan.training.rounds:
            loss, accuracy = self._evaluate(number, adapter, traffic)
        record = RoundRecord(
            round=number,
            clients=len(aggregate.clients) if aggregate else 0,
            train_loss=aggregate.loss if aggregate else None,
            eval_loss=loss,
            eval_accuracy=accuracy,
            bytes_down=traffic.down,
            bytes_up=traffic.up,
            seconds=time.monotonic() - began,
            steps=aggregate.steps if aggregate else 0,
            problems=traffic.problems,
        )
        return Checkpoint(record, adapter, moments)

    def _evaluate(self, number: int, adapter: State, traffic: _Traffic) -> tuple[float | None, float | None]:
        evaluators = sample_evaluators(self._plan, self._fleet.names)
        evaluation = EvaluationRound(self._plan, self._run, number, adapter, evaluators, now=0.0)
        self._drive(evaluation, "evaluating", traffic)
        score = evaluation.result()
        return (score.loss, score.accuracy) if score else (None, None)

    def _drive(self, round_: TrainingRound | EvaluationRound, activity: str, traffic: _Traffic) -> None:
        """Carry every task to its client and every reply back; stragglers answer when the round is over."""
        tasks = list(round_.tasks())
        late: list[Task] = []
        for done, task in enumerate(tasks, 1):
            if activity == "training" and self._happens("dropout", self._faults.dropout, task):
                traffic.down += len(codec.encode_task(task))
                round_.lose(task.node, "dropped out (simulated)")
            elif activity == "training" and self._happens("straggler", self._faults.stragglers, task):
                late.append(task)
            else:
                round_.receive(self._exchange(task, traffic), now=0.0)
            self._observer.on_client(task.round, activity, done, len(tasks))
        over = self._plan.cohort.round_seconds
        round_.tick(over)
        for task in late:
            round_.receive(self._exchange(task, traffic), now=over)
        traffic.problems |= round_.problems

    def _exchange(self, task: Task, traffic: _Traffic) -> Reply:
        """The client's reply to the task, both as the bytes that would travel."""
        sent = codec.encode_task(task)
        received = codec.encode_reply(self._fleet.client(task.node).perform(codec.decode_task(sent)))
        traffic.down += len(sent)
        traffic.up += len(received)
        try:
            return codec.decode_reply(received)
        except WireError as error:
            return Reply.to(task, Failed(f"sent a reply that cannot be read: {error}"))

    def _happens(self, what: str, probability: float, task: Task) -> bool:
        return random.Random(derive(self._plan.training.seed, what, task.round, task.node)).random() < probability


def improvement(before: float | None, after: float | None) -> float | None:
    """Share by which the loss fell, or None where one of the two is missing."""
    return None if not before or after is None else 1 - after / before
