"""Flower's simulation engine against the engine of this process: with a grid of our own, and with the real one."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from tiny import Place, Silent, write_backbone
from typer.testing import CliRunner

from farfield.coordinator import cli, engine, plans
from farfield.coordinator.engine import LOG, Setting
from farfield.coordinator.flower import Cancelled
from farfield.coordinator.results import Result
from farfield.coordinator.runs import Checkpoint, RoundRecord, RunFolder, RunInfo
from farfield.coordinator.simulate import Request, simulate
from farfield.coordinator.simulation import Faults, Fleet, sources
from farfield.edge_client.worker import Worker
from farfield.emulator.bench import Bench
from farfield.protocols.envelope import Signer
from farfield.protocols.errors import BackboneError, RunError, ServiceError
from farfield.protocols.messages import Task
from farfield.protocols.tensors import State, digest


class Watcher(Silent):
    """Keeps what was told."""

    def __init__(self) -> None:
        self.rounds: list[int] = []
        self.clients: list[tuple[int, str, int, int]] = []

    def on_client(self, number: int, activity: str, done: int, clients: int) -> None:
        self.clients.append((number, activity, done, clients))

    def on_round(self, record: RoundRecord) -> None:
        self.rounds.append(record.round)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def place(tmp_path: Path, backbone: Path) -> Place:
    return Place.make(tmp_path, backbone)


def in_process(place: Place, **request: Any) -> Result:
    asked = Request(place.path / "plan.toml", data=place.path / "data", runs=place.path / "runs")
    return simulate(replace(asked, **request), Watcher())


def refused(*arguments: object) -> str:
    """What `coordinator simulate` says to options that it does not take."""
    ended = CliRunner().invoke(cli.app, ["simulate", *map(str, arguments)])
    assert isinstance(ended.exception, RunError | ServiceError), ended.output
    assert "\n" not in str(ended.exception)
    return str(ended.exception)


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's engine sets before it calls a ServerApp: without it there are no messages."""
    for name, value in {"_run_id": 1, "_task_id": 1, "_node_id": SUPERLINK_NODE_ID}.items():
        monkeypatch.setattr(TaskIdentity, name, value)


class Loop:
    """Flower's engine without Ray: nodes in this process, of which the one asked last answers first.

    Messages are pickled on both ways, as Ray does it.
    """

    def __init__(self, setting: Setting, clients: int) -> None:
        self._app = engine.client_app(setting)
        self._partitions = {1000 - 7 * number: number for number in range(clients)}
        self._states = {node: RecordDict() for node in self._partitions}
        self._waiting: dict[str, Message] = {}
        self._answers: dict[str, Message] = {}
        self.sent: list[Message] = []
        self.fail: Callable[[Message], bool] = lambda message: False

    def get_node_ids(self) -> Iterable[int]:
        return list(self._partitions)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            self.sent.append(message)
            ids.append(message.metadata.message_id)
            self._waiting[ids[-1]] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        if self._waiting:
            name, message = self._waiting.popitem()
            self._answers[name] = self._answer(message)
        return [self._answers.pop(one) for one in message_ids if one in self._answers]

    def _answer(self, message: Message) -> Message:
        if self.fail(message):
            reason = "<class 'X'>:<'Traceback:\n  File\nException ClientAppException occurred. Message: out of luck'>"
            return Message(Error(0, reason), reply_to=message)
        node = message.metadata.dst_node_id
        config: dict[str, Any] = {"partition-id": self._partitions[node], "num-partitions": len(self._partitions)}
        context = Context(1, node, config, pickle.loads(pickle.dumps(self._states[node])), {})
        answer = self._app(pickle.loads(pickle.dumps(message)), context)
        self._states[node] = context.state
        return cast(Message, pickle.loads(pickle.dumps(answer)))


class Looped:
    """A run on a `Loop`, set up as `engine.go` sets it up."""

    def __init__(self, place: Place) -> None:
        plan = plans.load(place.path / "plan.toml")
        bench = Bench(plan, place.path / "backbone")
        self.fleet = Fleet(plan, bench, sources(None, place.path / "data"))
        self.initial = bench.adapter()
        fingerprint = json.loads((place.run() / "run.json").read_text())["backbone_fingerprint"]
        info = RunInfo("looped", plan.digest, str(place.path / "backbone"), fingerprint, 3, str(place.path / "data"))
        self.folder = RunFolder.create(place.path / "looped", info, place.path.joinpath("plan.toml").read_text())
        signer = Signer(Ed25519PrivateKey.generate())
        coordinator = signer.key.public_key().public_bytes_raw()
        self.setting = Setting(info, plan.canonical(), coordinator, b"s" * 32)
        self.loop, self.watcher, self.stop = Loop(self.setting, 3), Watcher(), threading.Event()
        self._federation = engine._Federation(
            plan, self.folder, self.fleet, self.setting, signer, self.watcher, self.stop, None
        )

    def go(self) -> Checkpoint:
        try:
            return self._federation.conduct(cast(Grid, self.loop), self.initial)
        finally:
            engine._fleet.cache_clear()


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"cohort": {"size": 2, "over_selection": 0.5}, "aggregation": {"server_optimizer": "adam"}},
        {"protection": {"kind": "none"}, "delivery": {"dtype": "bfloat16"}, "evaluation": {"clients": 2}},
    ],
    ids=["secure", "over-selection", "bare"],
)
def test_replies_in_any_order_come_to_the_same_adapter(
    place: Place, sections: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: though the last client is the first to answer, sums add up in the order of the tasks."""
    place.plan(**sections)
    alone = in_process(place)
    benches: list[Bench] = []
    load = Bench.__init__

    def counted(self: Bench, *arguments: Any) -> None:
        benches.append(self)
        load(self, *arguments)

    looped = Looped(place)
    monkeypatch.setattr(Bench, "__init__", counted)
    last = looped.go()
    assert len(benches) == 1, "a process loads the backbone once, whichever clients it is"
    assert digest(last.adapter) == alone.adapter_digest
    for ours, theirs in zip(looped.folder.records(), alone.rounds, strict=True):
        kept = ("round", "clients", "train_loss", "eval_loss", "eval_accuracy", "steps", "problems")
        assert [getattr(ours, key) for key in kept] == [getattr(theirs, key) for key in kept]
    assert looped.watcher.rounds == [0, 1, 2, 3]
    assert plans.load(place.path / "plan.toml").protection.kind == (
        "sealed" if "cohort" in sections else "none" if sections else "secagg"
    )
    steps = () if sections else ("agreeing on keys", "sharing keys", "confirming who is there", "unmasking the sum")
    assert {what for _, what, _, _ in looped.watcher.clients} == {"training", "evaluating", *steps}
    assert {what for number, what, _, _ in looped.watcher.clients if number == 0} == {"evaluating", *steps}
    asked = [done for number, what, done, _ in looped.watcher.clients if (number, what) == (2, "training")]
    assert asked == list(range(1, len(asked) + 1))  # those who were too many are heard as well, and not counted
    assert len(asked) >= alone.rounds[2].clients


def test_a_process_that_fails_ends_the_run_after_the_last_whole_round(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """It is no client that may be lost: the result would be another one."""
    in_process(place)
    looped = Looped(place)
    looped.loop.fail = lambda message: message.metadata.group_id == "2" and message.metadata.dst_node_id == 1000 - 7
    with pytest.raises(RunError, match=r"^\S*run\.log: client-001\.jsonl failed: out of luck\. This log has all of it"):
        looped.go()
    assert looped.folder.rounds() == [0, 1]
    assert "Traceback" in caplog.text


def test_another_backbone_in_a_process_ends_the_run(place: Place) -> None:
    in_process(place)
    looped = Looped(place)
    other = place.path / "other"
    other.mkdir()
    for file in (place.path / "backbone").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    (place.path / "backbone").unlink()
    (place.path / "backbone").symlink_to(other)
    with pytest.raises(BackboneError, match="is not the one that this run began with"):
        looped.go()


def test_a_client_that_cannot_do_its_task_is_a_problem_of_its_own(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in this process: what a worker reports is a reply."""
    outcome = Worker.outcome

    def sick(self: Worker, task: Task) -> Any:
        if self.node == "client-001.jsonl" and task.round == 2:
            raise RunError("no luck")
        return outcome(self, task)

    monkeypatch.setattr(Worker, "outcome", sick)
    alone = in_process(place)
    looped = Looped(place)
    assert digest(looped.go().adapter) == alone.adapter_digest
    assert [record.problems for record in looped.folder.records()] == [record.problems for record in alone.rounds]
    assert alone.rounds[2].problems


def test_a_run_that_is_to_stop_stops_between_two_replies(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(place)
    looped = Looped(place)

    def stopped(message: Message) -> bool:
        if message.metadata.group_id == "1":
            looped.stop.set()
        return False

    looped.loop.fail = stopped
    monkeypatch.setattr("farfield.coordinator.flower.WATCH_SECONDS", 0.0)
    with pytest.raises(Cancelled):
        looped.go()
    assert looped.folder.rounds() == [0]


def test_a_task_for_another_client_gets_no_answer(place: Place) -> None:
    in_process(place)
    looped = Looped(place)
    answer = looped.loop._answer

    def swapped(message: Message) -> Message:
        if message.metadata.message_type != "query":
            numbers = looped.loop._partitions
            looped.loop._partitions = {node: (number + 1) % 3 for node, number in numbers.items()}
        return answer(message)

    looped.loop._answer = swapped  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"failed: a task for 'client-\d+\.jsonl', and this is 'client-\d+\.jsonl'"):
        looped.go()


def test_the_setting_is_small_and_does_not_show_its_secret(place: Place) -> None:
    in_process(place)
    setting = Looped(place).setting
    assert len(pickle.dumps(setting)) < 4000
    assert pickle.loads(pickle.dumps(setting)) == setting
    assert "ssss" not in repr(setting)


def test_options_of_one_engine_are_refused_by_the_other(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "check", lambda: None)
    plan, data = place.path / "plan.toml", place.path / "data"
    for option in ("--client-cpus", "--client-gpus"):
        assert "Add --engine flower" in refused(plan, "--data", data, option, 2)
    for option in ("--dropout", "--stragglers"):
        said = refused(plan, "--data", data, "--runs", place.path / "runs", "--engine", "flower", option, 0.5)
        assert said.startswith("--dropout and --stragglers are for the engine of this process")
    assert not place.runs()
    run = in_process(place, faults=Faults(dropout=0.5)).folder
    said = refused(plan, "--engine", "flower", "--resume", run)
    assert said.startswith(f"{run}: --dropout and --stragglers are for the engine of this process")


def test_an_engine_that_there_is_not_is_no_engine(place: Place) -> None:
    ended = CliRunner().invoke(cli.app, ["simulate", str(place.path / "plan.toml"), "--engine", "spark"])
    assert ended.exit_code == 2
    assert "'in-process', 'flower'" in re.sub(r"[^\S ]*\s+[│|]?\s*", " ", ended.output)


def test_without_ray_the_extra_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    said = refused(place.path / "plan.toml", "--data", place.path / "data", "--engine", "flower")
    assert said.endswith("Install it with: pip install 'farfield[ray]'")


def test_flower_is_imported_after_its_telemetry_was_turned_off() -> None:
    """It reads that setting when it is imported."""
    modules = "cli", "console", "engine", "export", "simulate", "simulation"
    source = (
        f"import sys, {', '.join(f'farfield.coordinator.{name}' for name in modules)}; print('flwr' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_what_flower_logs_goes_to_the_run_folder_only_while_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import logging

    loggers = [logging.getLogger(name) for name in ("flwr", "ray", "farfield.run")]
    before = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    with engine._logged(tmp_path / LOG):
        for logger in loggers:
            logger.error("bad news from %s", logger.name)
    assert [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers] == before
    assert capsys.readouterr() == ("", "")
    lines = (tmp_path / LOG).read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [f"ERROR bad news from {one.name}" for one in loggers]


COORDINATOR = Path(sys.executable).with_name("coordinator")


def start(place: Place, *arguments: object) -> subprocess.Popen[str]:
    """`coordinator simulate` in `place`, in a session of its own; all that it starts carries the mark of the place."""
    command = [str(one) for one in (COORDINATOR, "simulate", "plan.toml", "--json", "out.json", *arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FARFIELD_TEST": str(place.path)}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(
        command,
        cwd=place.path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finished(place: Place, *arguments: object) -> tuple[dict[str, Any], str]:
    """The result of a command that went well, and what it printed."""
    process = start(place, *arguments)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (0, "")
    nothing_is_left(place)
    result: dict[str, Any] = json.loads((place.path / "out.json").read_text())
    return result, out


def nothing_is_left(place: Place) -> None:
    """Every process of the place's commands ends, at once or as soon as it sees that its parent has."""
    mark = f"FARFIELD_TEST={place.path}\0".encode()
    deadline = time.monotonic() + 60
    while left := [one for one in Path("/proc").iterdir() if one.name.isdigit() and mark in _environment(one)]:
        assert time.monotonic() < deadline, [(one / "cmdline").read_bytes() for one in left]
        time.sleep(0.1)


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes() + b"\0"
    except OSError:  # ended meanwhile
        return b""


def when(place: Place, process: subprocess.Popen[str], pattern: str) -> None:
    """Wait until the run has a file of that name."""
    deadline = time.monotonic() + 300
    while not list(place.path.glob(f"runs/*/{pattern}")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def equal(ours: dict[str, Any], theirs: dict[str, Any], place: Place) -> None:
    """Every checkpoint's adapter is the same but for rounding; so are losses, and all that is counted."""
    for one, other in zip(ours["rounds"], theirs["rounds"], strict=True):
        for key in ("round", "clients", "steps", "bytes_down", "bytes_up", "problems"):
            assert one[key] == other[key], key
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-5)
    folders = [RunFolder.open(place.path / result["folder"]) for result in (ours, theirs)]
    for number in folders[1].rounds():
        adapter, expected = (folder.load(number).adapter for folder in folders)
        same_but_for_rounding(adapter, expected)


def same_but_for_rounding(adapter: State, expected: State) -> None:
    assert set(adapter) == set(expected)
    for name, array in adapter.items():
        scale = float(np.abs(expected[name]).max())
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-6 * scale, err_msg=name)


@pytest.mark.slow
def test_on_ray_a_run_is_what_it_is_in_this_process(place: Place) -> None:
    """The same numbers, files and lines, whichever engine; and it can be compared with pooled training."""
    theirs, printed_alone = finished(place, "--data", "data", "--compare")
    ours, printed = finished(place, "--data", "data", "--compare", "--engine", "flower")
    equal(ours, theirs, place)
    assert ours["centralised"]["steps"] == theirs["centralised"]["steps"]
    folder, alone = place.path / ours["folder"], place.path / theirs["folder"]
    assert {path.name for path in folder.iterdir()} - {path.name for path in alone.iterdir()} == {LOG}
    assert _shape(printed) == _shape(printed_alone)
    resumed, _ = finished(place, "--resume", theirs["folder"], "--engine", "flower")
    assert resumed["adapter_digest"] == theirs["adapter_digest"]


def _shape(printed: str) -> list[str]:
    """Printed lines without what differs between two runs: names, digests and times."""
    return [re.sub(r" +[\d.]+ s$|[0-9a-f]{64}|\d{8}-\d{6}-plan-[0-9a-f]{4}", "", line) for line in printed.splitlines()]


@pytest.mark.slow
def test_on_ray_a_run_that_was_killed_goes_on(place: Place) -> None:
    place.plan(training={"rounds": 30}, aggregation={"server_optimizer": "momentum", "beta1": 0.5})
    theirs, _ = finished(place, "--data", "data", "--runs", "undisturbed")
    process = start(place, "--data", "data", "--engine", "flower")
    when(place, process, "checkpoints/round-0003.safetensors")
    process.kill()
    process.communicate()
    nothing_is_left(place)
    assert 3 <= RunFolder.open(place.run()).rounds()[-1] < 30
    ours, printed = finished(place, "--resume", place.run().name, "--engine", "flower")
    assert "resumed after round" in printed
    equal(ours, theirs, place)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [LOG, "checkpoints/round-0003.safetensors"], ids=["while Ray starts", "in a round"])
def test_on_ray_an_interrupted_run_says_how_it_goes_on(place: Place, moment: str) -> None:
    """As a terminal does it: the signal goes to Ray's processes, too."""
    place.plan(training={"rounds": 1000})
    process = start(place, "--data", "data", "--engine", "flower")
    when(place, process, moment)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    run = place.run().relative_to(place.path)
    again = f"coordinator simulate plan.toml --resume {run} --engine flower"
    assert (process.returncode, err) == (130, f"Stopped. Finished rounds are kept; go on with: {again}\n")
    nothing_is_left(place)


@pytest.mark.slow
def test_on_ray_a_process_that_is_killed_ends_the_run_in_one_line(place: Place) -> None:
    place.plan(training={"rounds": 1000})
    process = start(place, "--data", "data", "--engine", "flower")
    when(place, process, "checkpoints/round-0003.safetensors")
    mark = f"FARFIELD_TEST={place.path}\0".encode()
    processes = [one for one in Path("/proc").iterdir() if one.name.isdigit() and mark in _environment(one)]
    actors = [int(one.name) for one in processes if (one / "cmdline").read_bytes().startswith(b"ray::ClientApp")]
    for actor in actors:
        os.kill(actor, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert actors
    assert process.returncode == 2
    assert re.fullmatch(r"error: \S+run\.log: client-00\d\.jsonl failed: The actor is dead [^\n]+\n", err), err
    nothing_is_left(place)


@pytest.mark.slow
def test_on_ray_more_than_the_machine_has_is_refused_in_one_line(place: Place) -> None:
    process = start(place, "--data", "data", "--engine", "flower", "--client-gpus", "1000")
    _, err = process.communicate(timeout=300)
    expected = "no machine here has 1 cores and 1000 GPUs for a client. Lower --client-cpus or --client-gpus."
    assert (process.returncode, err) == (2, f"error: {expected}\n")
    nothing_is_left(place)
