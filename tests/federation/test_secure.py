"""Secure aggregation and privacy between real processes: what comes out, what it survives, and what nobody can find."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from memory import Trace, floats, in_files, in_memory, stretches
from processes import Federation, Process, eventually, federation, result
from toy import FOUR, equal, place, plan, simulated

from farfield.coordinator import bounds, plans
from farfield.coordinator.runs import RunFolder
from farfield.coordinator.simulation import Fleet, sources
from farfield.emulator.bench import Bench
from farfield.protocols import summing
from farfield.protocols.messages import Task, Train, Trained
from farfield.protocols.plan import Plan
from farfield.protocols.randomness import Randomness
from farfield.protocols.secagg import fixedpoint
from farfield.protocols.summing import Part, Subject, Words
from farfield.protocols.tensors import State, pack_state, unpack_state

VICTIM, SLOW, *OTHERS = FOUR

UNIFORM = {"weighting": "uniform"}
NOISE = {"kind": "client", "noise": "distributed", "noise_multiplier": 1.0, "clipping_norm": 0.1}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place(tmp_path_factory.mktemp("toy"), len(FOUR))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation")) as made:
        made.serve()
        yield made


@pytest.fixture(scope="module")
def _joined(running: Federation, toy: Path) -> dict[str, Process]:
    return {name: running.join(name, toy / "data" / name) for name in FOUR}


@pytest.fixture
def clients(running: Federation, _joined: dict[str, Process]) -> dict[str, Process]:
    """All four, and they attend."""
    for name, process in _joined.items():
        if process.status is not None:
            _joined[name] = running.rejoin(name)
    return _joined


def test_a_secure_run_comes_to_what_its_simulation_comes_to(
    running: Federation, toy: Path, clients: dict[str, Process]
) -> None:
    run = running.submit(plan(toy, rounds=3, steps=5, minimum=4, protection="secagg"))
    done = running.finishes(run)
    assert [one["clients"] for one in result(done)["rounds"]] == [4, 4, 4]
    equal(RunFolder.open(done.folder), simulated(toy, 3, 5, "secagg", 4), 4)
    for process in clients.values():
        for step in ("advertise", "share", "confirm", "unmask"):
            process.says(f"Run {run}, round 3: secure aggregation: {step}", times=2)  # it trains, and it evaluates


@pytest.mark.slow
def test_a_client_that_dies_in_a_session_costs_its_own_part(
    running: Federation, toy: Path, clients: dict[str, Process]
) -> None:
    """In round 1 it is back before the round ends, and knows nothing of the session; in round 3 it stays away."""
    run = running.submit(plan(toy, rounds=4, steps=150, minimum=3, seconds=200, protection="secagg"))
    with _held_in_training([clients[SLOW]], run, 1):
        clients[VICTIM].says(f"Run {run}, round 1: training").kill()
        clients[VICTIM] = running.rejoin(VICTIM)
    clients[VICTIM].says(f"Run {run}, round 3: training").kill()
    rounds = result(running.finishes(run))["rounds"]
    assert [one["clients"] for one in rounds] == [3, 4, 3, 3]
    assert rounds[0]["problems"][VICTIM] in {"started anew in the middle of its task", "went away before it answered"}
    assert rounds[1]["problems"] == {}
    assert VICTIM in rounds[2]["problems"]


@pytest.mark.slow
def test_the_coordinator_may_die_in_any_step(running: Federation, toy: Path, clients: dict[str, Process]) -> None:
    """The run goes on after the last finished round, whose successor is done again with a new session."""
    run = running.submit(plan(toy, rounds=4, steps=40, minimum=4, protection="secagg"))
    before = running.log(run).count("going on after round")
    for number, (what, phase) in enumerate(
        [
            ("flwr-serverapp", ("training",)),
            ("coordinator.superlink", ("sharing keys", "training")),
            ("coordinator serve", ("confirming who is there", "unmasking the sum", "evaluating")),
        ],
        1,
    ):
        _comes_to(running, run, [f"round {number}: {one}" for one in phase])
        finished = running.rounds(run)
        _kill(running, what)
        if what == "coordinator serve":
            assert running.service is not None
            running.service.wait()
            running.serve()
        assert running.rounds(run) >= finished
        running.reaches(run, finished + 1)
    done = running.finishes(run)
    assert running.log(run).count("going on after round") - before == 3
    assert [one["clients"] for one in result(done)["rounds"]] == [4, 4, 4, 4]
    equal(RunFolder.open(done.folder), simulated(toy, 4, 40, "secagg", 4), 4)


@pytest.mark.slow
def test_nobody_but_the_client_has_its_update(running: Federation, toy: Path, clients: dict[str, Process]) -> None:
    """The update is known from a simulation, and looked for in every form it could have. That the search finds what is
    there shows in a sealed run, where the coordinator reads each update, and in the client's own memory.

    The others are held, so that the victim's is the only update that the coordinator has.
    """
    others = FOUR[1:]
    sealed = plan(toy, rounds=1, steps=150, minimum=1)
    secure = plan(toy, rounds=1, steps=150, minimum=3, protection="secagg")
    trace, vector = _trace(toy, sealed, secure)
    assert trace.found(vector.tobytes()) == {"words"}
    assert trace.found(bytes(fixedpoint.pack(vector, 24))) == {"packed"}

    run = running.submit(sealed)
    with _held_in_training([clients[name] for name in others], run, 1):
        _accepts(running, run, times=1)
        assert "weighted" in _at_the_coordinator(running, trace)
    running.finishes(run)
    for number, name in enumerate(FOUR):  # what freed memory still holds of it must not be taken for the next run's
        clients[name].end()
        clients[name] = running.rejoin(name)
        if number == 0:
            assert running.service is not None
            running.service.end()
            running.serve()

    run = running.submit(secure)
    with _held_in_training([clients[name] for name in others], run, 1):
        _accepts(running, run, times=3)  # its keys, its shares, and its vector
        assert not _at_the_coordinator(running, trace)
        assert "float32" in in_memory(trace, clients[VICTIM].pid)
    looked = 0
    while running.run(run).finished_at is None:
        assert not _at_the_coordinator(running, trace)
        looked += 1
    assert looked
    running.finishes(run)
    assert not _at_the_coordinator(running, trace)
    assert not in_files(trace, running.path)


@pytest.mark.slow
def test_what_is_spent_stands_in_the_ledgers_of_both_sides(
    running: Federation, toy: Path, clients: dict[str, Process]
) -> None:
    run = running.submit(plan(toy, 2, 5, minimum=4, protection="secagg", aggregation=UNIFORM, privacy=NOISE))
    done = running.finishes(run)
    assert [one["clients"] for one in result(done)["rounds"]] == [4, 4]
    ledger = json.loads(running.command("coordinator", "ledger", "--home", running.home, "--json"))
    noise = "noise added by the clients"
    spent = [(one["round"], one["note"]) for one in ledger["entries"] if one["run"] == run]
    assert spent == [(1, noise), (2, noise)]
    (population,) = ledger["populations"]
    assert population["epsilon"] > 1
    for name in FOUR:
        assert _spent(running, name, run) == [1, 2]


@pytest.mark.slow
def test_an_owner_who_allows_less_is_not_overruled(running: Federation, toy: Path, clients: dict[str, Process]) -> None:
    """It refuses before its data is opened, and the others go on."""
    with _settings(running, clients, VICTIM, "\n[consent]\n", "\n[consent]\nmax_epsilon = 0.5\n"):
        before = len(clients[VICTIM].output)
        run = running.submit(plan(toy, 1, 5, minimum=3, protection="secagg", aggregation=UNIFORM, privacy=NOISE))
        (round_,) = result(running.finishes(run))["rounds"]
        said = clients[VICTIM].output[before:]
    assert round_["clients"] == 3
    assert round_["problems"][VICTIM].startswith("refused: consent.max_epsilon = 0.5: on this machine's data")
    assert "refused" in said and "backbone" not in said and "training" not in said
    assert [_spent(running, name, run) for name in FOUR] == [[], [1], [1], [1]]


@pytest.mark.slow
def test_a_plan_over_the_budget_is_not_begun(running: Federation, toy: Path, clients: dict[str, Process]) -> None:
    file = plan(toy, 5, 5, minimum=4, protection="secagg", aggregation=UNIFORM, privacy=NOISE)
    settings = running.home / "coordinator.toml"
    before = settings.read_text()
    settings.write_text(before.replace("# max_epsilon = 8.0", "max_epsilon = 1.0"))
    try:
        said = running.command("coordinator", "run", file, "--home", running.home, "--detach", status=2)
    finally:
        settings.write_text(before)
    assert said.startswith("error: ") and "ε" in said and "Traceback" not in said


@pytest.mark.slow
def test_a_consortium_adds_up_among_its_own_only(
    running: Federation, toy: Path, clients: dict[str, Process], tmp_path: Path
) -> None:
    """Whom it does not vouch for is not asked; and its members refuse a roster that the coordinator signed itself."""
    members, signed = tmp_path / "members.json", tmp_path / "roster.json"
    running.command("coordinator", "roster", "list", "--home", running.home, "--json", members)
    everybody = json.loads(members.read_text())
    keys = {
        whose: running.command("coordinator", "roster", "key", tmp_path / whose).split()[0]
        for whose in ("consortium", "coordinator")
    }
    file = plan(toy, 1, 5, minimum=3, protection="secagg")

    def install(who: dict[str, str], whose: str) -> str:
        members.write_text(json.dumps(who))
        running.command("coordinator", "roster", "sign", members, "--key", tmp_path / whose, "--out", signed)
        return running.command("coordinator", "roster", "install", signed, "--home", running.home)

    with ExitStack() as stack:
        for name in OTHERS:
            asks = f'roster_key = "{keys["consortium"]}"'
            stack.enter_context(_settings(running, clients, name, 'roster_key = ""', asks))
        stack.callback((running.home / "roster.json").unlink)

        assert VICTIM in install({name: key for name, key in everybody.items() if name != VICTIM}, "consortium")
        run = running.submit(file)
        (round_,) = result(running.finishes(run))["rounds"]
        assert (round_["clients"], round_["problems"]) == (3, {})
        assert run not in clients[VICTIM].output

        install(everybody, "coordinator")
        run = running.submit(file)
        eventually(lambda: running.run(run).finished_at is not None, lambda: running.log(run))
        assert "no round counted an update" in running.run(run).detail
        problems = RunFolder.open(running.run(run).folder).records()[-1].problems
        assert all(f"and not with {keys['consortium']}" in problems[name] for name in OTHERS), problems


@pytest.mark.slow
def test_a_node_that_left_joins_again_where_its_ledger_is(running: Federation, toy: Path) -> None:
    home = running.enrol("guest", toy / "data" / FOUR[0])
    (home / "ledger.jsonl").touch(mode=0o600)
    running.command("edge-client", "leave", "--yes", "--home", home)
    assert (home / "ledger.jsonl").exists()
    (token,) = running.invite()
    running.command(
        "edge-client", "join", f"localhost:{running.ports['enrolment']}", "--data", toy / "data" / FOUR[0],
        "--name", "guest-again", "--home", home, "--no-start", FARFIELD_TOKEN=token,
    )  # fmt: skip
    assert (home / "ledger.jsonl").exists()


def _spent(running: Federation, name: str, run: str) -> list[int]:
    """The rounds of the run that stand in the client's own ledger."""
    file = running.path / name / "ledger.jsonl"
    entries = [json.loads(line)["entry"] for line in file.read_text().splitlines()] if file.exists() else []
    return [entry["round"] for entry in entries if entry["run"] == run]


@contextmanager
def _held_in_training(clients: Sequence[Process], run: str, number: int) -> Iterator[None]:
    """Stop these clients while they train, so that the round cannot end, and let them go on."""
    try:
        for client in clients:
            client.says(f"Run {run}, round {number}: training").send(signal.SIGSTOP)
        yield
    finally:
        for client in clients:
            client.send(signal.SIGCONT)


@contextmanager
def _settings(running: Federation, clients: dict[str, Process], name: str, old: str, new: str) -> Iterator[None]:
    """The client with other settings."""
    file = running.path / name / "edge-client.toml"
    before = file.read_text()
    assert old in before
    try:
        for text in (before.replace(old, new), before):
            clients[name].end()
            file.write_text(text)
            clients[name] = running.rejoin(name)
            if text != before:
                yield
    finally:
        file.write_text(before)


def _accepts(running: Federation, run: str, times: int) -> None:
    """Wait until the victim's answers in round 1 have been accepted."""
    line = f"round 1, {VICTIM}: reply accepted"
    eventually(lambda: running.log(run).count(line) >= times, lambda: running.log(run))


def _at_the_coordinator(running: Federation, trace: Trace) -> frozenset[str]:
    """The forms in which the update is in the memory of any process that is not a client's."""
    processes = {pid: line for pid, line in running.descendants().items() if "edge-client" not in line}
    assert any("coordinator serve" in line for line in processes.values())
    return frozenset().union(*(in_memory(trace, pid) for pid in processes))


def _trace(toy: Path, sealed: Path, secure: Path) -> tuple[Trace, Words]:
    """What the victim's update in round 1 looks like, and its vector before it is masked."""
    kept, hidden = plans.load(sealed), plans.load(secure)
    bench = Bench(kept, toy / "backbone")
    start = bench.adapter()
    worker = Fleet(kept, bench, sources(None, toy / "data")).client(VICTIM)
    task = Task("any", 1, VICTIM, kept.digest, Train(pack_state(start, "float32")), len(FOUR))
    trained = worker.perform(task).outcome
    assert isinstance(trained, Trained)
    update = unpack_state(trained.update)
    vector = _vector(hidden, start, Part(update, trained.examples))
    exact: dict[str, list[bytes]] = {}
    words, at, flat = [], 0, {name: values.reshape(-1) for name, values in sorted(update.items())}
    weight = np.float32(trained.examples / hidden.protection.weight_limit)
    high = (vector >> 16).astype(np.uint8)
    for (name, values), stretch in zip(flat.items(), stretches(flat.values()), strict=True):
        if stretch is not None:
            trainable = start[name].reshape(-1)[stretch] + values[stretch]
            forms = {
                **floats(values[stretch]),
                "weighted": (values[stretch] * np.float32(trained.examples)).tobytes(),
                "scaled": (values[stretch] * weight).tobytes(),
                "trained": trainable.tobytes(),
            }
            for form, raw in forms.items():
                exact.setdefault(form, []).append(raw)
            words.append(vector[at + stretch.start : at + stretch.stop] & np.uint32(0xFFFFFF))
        if len(exact.get("packed", ())) < 2:
            exact.setdefault("packed", []).append(high[at : at + 64].tobytes())
        at += values.size
    return Trace({form: tuple(raws) for form, raws in exact.items()}, tuple(words)), vector


def _vector(plan: Plan, start: State, part: Part) -> Words:
    shapes = {name: values.shape for name, values in part.update.items()}
    ranges = tuple(bounds.first(plan, start).ranges[name] for name in sorted(shapes))
    subject = Subject(b"", b"", b"", "train", b"", None, ranges)
    fewest = summing.smallest_sum(plan, len(FOUR))
    return summing.layout(plan, subject, shapes, len(FOUR), fewest).pack(part, Randomness())


def _comes_to(running: Federation, run: str, activities: list[str]) -> None:
    eventually(lambda: running.run(run).detail in activities, lambda: f"{running.run(run)}\n{running.log(run)}")


def _kill(running: Federation, what: str) -> None:
    (victim,) = [pid for pid, line in running.descendants().items() if what in line]
    os.kill(victim, signal.SIGKILL)
