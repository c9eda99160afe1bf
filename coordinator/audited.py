"""The federations of an audit: simulations of its Plan, with the rounds, messages and noise of a deployment.

Imported only where an audit is made, since clients are run here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from farfield.edge_client.audit import Act, Course, Member
from farfield.edge_client.audit.subject import Say
from farfield.edge_client.local_state import LocalState
from farfield.edge_client.secure import Ground, Sessions
from farfield.edge_client.worker import Worker
from farfield.emulator import methods
from farfield.emulator.bench import Bench
from farfield.protocols.durable import write
from farfield.protocols.errors import FarfieldError, RunError
from farfield.protocols.messages import Evaluate, Failed, Participant, Reply, Secure, Task, Train, Trained
from farfield.protocols.plan import Plan
from farfield.protocols.secagg import Terms
from farfield.protocols.summing import Part, Shapes
from farfield.protocols.tensors import State, pack_state, unpack_state

from .aggregation import traits
from .releasing import Aggregate
from .runs import RoundRecord, RunFolder, RunInfo, writing
from .simulation import Faults, Simulation


class RunCourse(Course):
    """A course that lies in a run folder, with what each round let out beside its checkpoint."""

    def __init__(self, folder: RunFolder, rounds: int) -> None:
        self._folder, self.rounds = folder, rounds

    def adapter(self, number: int) -> State:
        return self._folder.load(number).adapter

    def aggregate(self, number: int) -> State | None:
        file = _aggregate(self._folder, number)
        if not file.exists():
            return None
        with _reading(file), safe_open(file, "numpy") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping

    def members(self, number: int) -> tuple[str, ...]:
        file = _aggregate(self._folder, number)
        if not file.exists():
            return ()
        with _reading(file), safe_open(file, "numpy") as opened:
            return tuple(json.loads(opened.metadata()["clients"]))


@dataclass(frozen=True, slots=True)
class Simulated:
    """Runs federations in run folders below `folder`, at one bench.

    Attributes:
        initial: the adapter that every federation begins with.
        backbone: the folder of the model, and its fingerprint.
    """

    folder: Path
    bench: Bench
    initial: State
    backbone: tuple[Path, str]

    def run(self, name: str, plan: Plan, members: Mapping[str, Member], say: Say) -> RunCourse:
        """See `farfield.edge_client.audit.Federation`.

        Raises:
            pydantic.ValidationError: the Plan asks for what its aggregation rule cannot do; a mistake in an attack.
            RunError: the folder cannot be written, or holds a run of another Plan.
        """
        context = {"tuning_kinds": methods.registered(), "rules": traits()}
        plan = Plan.model_validate(plan.model_dump(mode="json"), context=context)
        where = self.folder / name
        folder = RunFolder.open(where) if (where / "run.json").exists() else self._created(where, name, plan, members)
        if folder.info.plan_digest != plan.digest:
            raise RunError("a run of another Plan", where=where, hint="Remove the folder, or give another --out.")
        done = folder.rounds()
        if not done or done[-1] < plan.training.rounds:
            company = _Company(plan, self.bench.under(plan), members, folder.local_folder)
            observer = _Rounds(name, plan.training.rounds, say)
            with folder.held():
                simulation = Simulation(plan, folder, company, Faults(), observer, watch=_Keeper(folder).keep)
                simulation.go(self.initial)
        return RunCourse(folder, plan.training.rounds)

    def _created(self, where: Path, name: str, plan: Plan, members: Mapping[str, Member]) -> RunFolder:
        model, fingerprint = self.backbone
        info = RunInfo(f"audit-{name}", plan.digest, str(model), fingerprint, len(members))
        return RunFolder.create(where, info, plan.canonical().decode())


class _Company:
    """The members of one federation, as a simulation wants its clients."""

    def __init__(self, plan: Plan, bench: Bench, members: Mapping[str, Member], keep: Path) -> None:
        self._plan, self._bench, self._members, self._keep = plan, bench, members, keep

    @property
    def names(self) -> list[str]:
        return sorted(self._members)

    @property
    def frozen(self) -> str:
        return self._bench.frozen

    def bench(self, name: str) -> Bench:
        return self._bench

    def client(self, name: str, sessions: Sessions | None = None) -> Participant:
        member = self._members[name]
        worker = Worker(name, self._bench, member.data, kept=LocalState(self._keep / name))
        return _Player(worker, member.act, sessions)


@dataclass(frozen=True, slots=True)
class _Player:
    """A member at work: honest, or as its act says."""

    worker: Worker
    act: Act | None
    sessions: Sessions | None

    def perform(self, task: Task) -> Reply:
        try:
            match task.work:
                case Secure() if self.sessions is not None:
                    ground = Ground(self.worker.bench.plan, "", self.worker.bench.frozen, Terms(1, 1))
                    return Reply.to(task, self.sessions.answer(task, task.work, ground, self._part))
                case Train() if self.act is not None:
                    part = self._acted(task, task.work)
                    update = pack_state(part.update, self.worker.bench.plan.delivery.dtype)
                    loss = part.loss / part.targets if part.targets else 0.0
                    return Reply.to(task, Trained(update, part.examples, part.targets, part.steps, loss, part.clipped))
                case _:
                    return self.worker.perform(task)
        except FarfieldError as error:
            return Reply.to(task, Failed(str(error)))

    def _part(self, task: Task, work: Train | Evaluate) -> tuple[Part, Shapes]:
        if self.act is None or isinstance(work, Evaluate):
            return self.worker.part(task, work)
        part = self._acted(task, work)
        whole = replace(part, update=self.worker.bench.whole(part.update))
        return whole, {name: change.shape for name, change in whole.update.items()}

    def _acted(self, task: Task, work: Train) -> Part:
        assert self.act is not None
        return self.act(task.round, unpack_state(work.adapter), lambda: self.worker.trained(task, work))


@dataclass(frozen=True, slots=True)
class _Keeper:
    """Keeps what each round lets out."""

    folder: RunFolder

    def keep(self, number: int, aggregate: Aggregate) -> None:
        file = _aggregate(self.folder, number)
        with writing(file):
            file.parent.mkdir(exist_ok=True)
            write(file, save(aggregate.update, metadata={"clients": json.dumps(aggregate.clients)}))


@dataclass(frozen=True, slots=True)
class _Rounds:
    """Shows a federation's rounds."""

    name: str
    rounds: int
    say: Say

    def on_preparing(self, done: int, clients: int) -> None: ...

    def on_client(self, number: int, activity: str, done: int, clients: int) -> None:
        self.say(f"federation {self.name!r}, round {number}, {activity}", number, self.rounds)

    def on_round(self, record: RoundRecord) -> None:
        self.say(f"federation {self.name!r}", record.round, self.rounds)


def _aggregate(folder: RunFolder, number: int) -> Path:
    return folder.path / "aggregates" / f"round-{number:04d}.safetensors"


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"cannot be read: {error}", where=file, hint="Remove its run's folder, and resume.") from None
