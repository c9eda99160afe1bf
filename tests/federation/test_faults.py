"""What dies, what is cut, what is full, and what is there twice: after each, no finished round is lost, no aggregate is
wrong, and somebody was told what happened. Real processes, really killed. The Plans are sealed, for nothing is rounded
then; what befalls the steps of a secure aggregation is in test_secure.py.
"""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Federation, eventually, federation, result
from relay import Relay
from toy import CLIENTS, equal, place, plan, simulated

from farfield.coordinator.runs import RunFolder
from farfield.coordinator.storage import RunState

ROUNDS = 6


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone of two thin layers, the data of three clients, and what their simulation comes to."""
    return place(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def running(tmp_path: Path, toy: Path) -> Iterator[Federation]:
    with federation(tmp_path) as made:
        made.serve()
        yield made


@pytest.mark.slow
def test_the_service_the_superlink_and_the_serverapp_may_die_in_any_phase(running: Federation, toy: Path) -> None:
    """Each of the three is killed in another phase of a round, and the end is that of a run that nothing befell."""
    for name in CLIENTS:
        running.join(name, toy / "data" / name)
    run = running.submit(plan(toy, rounds=4, steps=30, minimum=3))
    killed = []
    for number, (what, phase) in enumerate(
        [("flwr-serverapp", "training"), ("coordinator.superlink", "evaluating"), ("coordinator serve", "training")], 1
    ):
        running.detail(run, f"round {number}: {phase}")
        before = running.rounds(run)
        _kill(running, what)
        killed.append(what)
        if what == "coordinator serve":
            assert running.service is not None
            running.service.wait()
            running.serve()
        running.reaches(run, before + 1)
    done = running.finishes(run)

    assert running.log(run).count("going on after round") == len(killed)
    assert "its ServerApp died" in (running.path / "serve.log").read_text()
    assert "The SuperLink is gone; starting it again" in (running.path / "serve.log").read_text()
    equal(RunFolder.open(done.folder), simulated(toy, 4, 30))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["flwr-serverapp", "coordinator.superlink", "coordinator serve"])
def test_each_may_die_in_every_phase(running: Federation, toy: Path, what: str) -> None:
    for name in CLIENTS:
        running.join(name, toy / "data" / name)
    run = running.submit(plan(toy, rounds=ROUNDS, steps=60, minimum=3))
    folder = running.run(run).folder
    for phase in (
        lambda: "loading the backbone" in running.run(run).detail,
        lambda: "round 1: training" in running.run(run).detail,
        lambda: "round 2: evaluating" in running.run(run).detail,
        lambda: (folder / "checkpoints" / "round-0003.safetensors").exists(),
        lambda: (folder / "checkpoints" / "round-0004.safetensors.partial").exists() or running.rounds(run) >= 4,
        lambda: "writing the adapter" in running.run(run).detail or running.run(run).state is RunState.FINISHED,
    ):
        eventually(phase, lambda: f"{running.run(run)}\n{running.log(run)}")
        before = running.rounds(run)
        if running.run(run).state is RunState.FINISHED:
            break
        _kill(running, what)
        if what == "coordinator serve":
            assert running.service is not None
            running.service.wait()
            running.serve()
        assert running.rounds(run) >= before
    done = running.finishes(run)
    equal(RunFolder.open(done.folder), simulated(toy, ROUNDS, 60))


@pytest.mark.slow
def test_a_client_that_is_killed_while_it_trains_costs_one_update(running: Federation, toy: Path) -> None:
    """The round closes with the other two, and says who is missing; the client, started again, is in the next ones."""
    clients = {name: running.join(name, toy / "data" / name) for name in CLIENTS}
    run = running.submit(plan(toy, rounds=ROUNDS, steps=60, minimum=2))
    victim = CLIENTS[1]
    running.reaches(run, 1)
    eventually(
        lambda: clients[victim].output.rstrip().endswith("training"), lambda: f"not training:\n{clients[victim].output}"
    )
    clients[victim].kill()
    running.rejoin(victim)
    done = running.finishes(run)
    rounds = result(done)["rounds"]
    missed = [one for one in rounds if victim in one["problems"]]
    assert [one["clients"] for one in missed] == [2]
    assert missed[0]["problems"][victim] in {"started anew in the middle of its task", "went away before it answered"}
    assert all(one["clients"] == 3 for one in rounds if one not in missed)


@pytest.mark.slow
def test_a_node_that_never_comes_back_does_not_stall_a_run(running: Federation, toy: Path) -> None:
    clients = {name: running.join(name, toy / "data" / name) for name in CLIENTS}
    run = running.submit(plan(toy, rounds=3, steps=300, minimum=2, seconds=25))
    running.reaches(run, 0)
    clients[CLIENTS[0]].says("round 1: training")
    clients[CLIENTS[0]].kill()
    rounds = result(running.finishes(run))["rounds"]
    assert rounds[-1]["clients"] == 2
    lost = [one["problems"].get(CLIENTS[0], "") for one in rounds]
    assert any(problem == "no answer within 25 s" for problem in lost), rounds


def test_two_clients_with_one_identity(running: Federation, toy: Path, tmp_path: Path) -> None:
    """The second one is turned away with a reason, and the first one goes on."""
    name = CLIENTS[0]
    first = running.join(name, toy / "data" / name)
    again = running.command("edge-client", "start", "--home", running.path / name, status=2)
    assert str(first.pid) in again and "another" in again
    shutil.copytree(running.path / name, tmp_path / "stolen", ignore=shutil.ignore_patterns("*.lock"))
    stolen = running.command("edge-client", "start", "--home", tmp_path / "stolen", status=2)
    assert "attends" in stolen and "Stop one of the two" in stolen
    assert first.status is None
    (state,) = json.loads(running.command("coordinator", "nodes", "--home", running.home, "--json"))
    assert state["state"] == "attending"


@pytest.mark.slow
def test_a_line_that_is_cut_for_half_a_minute(running: Federation, toy: Path) -> None:
    """Longer than keepalives wait: both sides notice, the client says so, and its update still counts."""
    relay = Relay([running.ports["federation"], running.ports["fleet"]])
    try:
        clients = {}
        for name in CLIENTS:
            home = running.enrol(name, toy / "data" / name)
            if name == CLIENTS[0]:
                settings = (home / "edge-client.toml").read_text()
                for real, relayed in relay.ports.items():
                    settings = settings.replace(f"port = {real}", f"port = {relayed}")
                (home / "edge-client.toml").write_text(settings)
            clients[name] = running.rejoin(name)
        run = running.submit(plan(toy, rounds=3, steps=60, minimum=3))
        running.detail(run, "round 1: training")
        relay.cut()
        eventually(lambda: "trying again" in clients[CLIENTS[0]].output, lambda: clients[CLIENTS[0]].output, 60)
        time.sleep(30)  # what is tested is the half minute itself
        relay.mend()
        done = running.finishes(run)
    finally:
        relay.close()
    assert [one["clients"] for one in result(done)["rounds"]] == [3, 3, 3]
    equal(RunFolder.open(done.folder), simulated(toy, 3, 60))


@pytest.mark.slow
def test_clocks_that_disagree(running: Federation, toy: Path, tmp_path: Path) -> None:
    """A client goes by the coordinator's clock, and tells its owner how wrong its own is."""
    shim = _clock(tmp_path)
    offsets = dict(zip(CLIENTS, ("1200", "-1200", "0"), strict=True))
    clients = {
        name: running.join(name, toy / "data" / name, LD_PRELOAD=str(shim), CLOCK_OFFSET=offset)
        for name, offset in offsets.items()
    }
    run = running.submit(plan(toy, rounds=2, steps=5, minimum=3, protection="secagg"))
    assert [one["clients"] for one in result(running.finishes(run))["rounds"]] == [3, 3]
    said = [clients[name].output for name in CLIENTS]
    assert "s ahead of the coordinator's, which is used instead" in said[0]
    assert "s behind the coordinator's, which is used instead" in said[1]
    assert "which is used instead" not in said[2]


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_client(running: Federation, toy: Path) -> None:
    """It says so, to its owner in full and to the coordinator without a path; the others go on."""
    name, *others = CLIENTS
    home = running.enrol(name, toy / "data" / name)
    full = running.rejoin(name)
    subprocess.run(["prlimit", f"--pid={full.pid}", "--fsize=4096"], check=True)
    for other in others:
        running.join(other, toy / "data" / other)
    run = running.submit(plan(toy, rounds=2, steps=5, minimum=2))
    rounds = result(running.finishes(run))["rounds"]
    assert [one["clients"] for one in rounds] == [2, 2]
    problem = rounds[0]["problems"][name]
    assert "full" in problem or "too large" in problem.lower() or "cannot be written" in problem
    assert str(home) not in problem
    assert full.status is None and "failed" in full.output


@pytest.mark.slow
def test_a_disk_that_is_full_at_the_coordinator(running: Federation, toy: Path) -> None:
    """The round waits until there is room, and nothing is computed twice."""
    for name in CLIENTS:
        running.join(name, toy / "data" / name)
    run = running.submit(plan(toy, rounds=3, steps=20, minimum=3))
    running.reaches(run, 1)
    (app,) = [pid for pid, line in running.descendants().items() if "flwr-serverapp" in line]
    subprocess.run(["prlimit", f"--pid={app}", "--fsize=2048:unlimited"], check=True)
    eventually(lambda: "is not saved yet" in running.log(run), lambda: running.log(run))
    subprocess.run(["prlimit", f"--pid={app}", "--fsize=unlimited"], check=True)
    done = running.finishes(run)
    assert "going on after" not in running.log(run)
    equal(RunFolder.open(done.folder), simulated(toy, 3, 20))


def _kill(running: Federation, what: str) -> None:
    victims = [pid for pid, line in running.descendants().items() if what in line]
    assert len(victims) == 1, running.descendants()
    os.kill(victims[0], signal.SIGKILL)


def _clock(folder: Path) -> Path:
    """A library that moves the wall clock of a process, and no other clock, by CLOCK_OFFSET seconds."""
    source = folder / "clock.c"
    source.write_text(
        """
        #define _GNU_SOURCE
        #include <stdlib.h>
        #include <sys/syscall.h>
        #include <sys/time.h>
        #include <time.h>
        #include <unistd.h>
        static long offset(void) { const char *text = getenv("CLOCK_OFFSET"); return text ? atol(text) : 0; }
        int clock_gettime(clockid_t id, struct timespec *now) {
            long failed = syscall(SYS_clock_gettime, id, now);
            if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += offset();
            return (int)failed;
        }
        time_t time(time_t *out) {
            struct timespec now; clock_gettime(CLOCK_REALTIME, &now);
            if (out) *out = now.tv_sec;
            return now.tv_sec;
        }
        int gettimeofday(struct timeval *restrict out, void *restrict zone) {
            struct timespec now; clock_gettime(CLOCK_REALTIME, &now);
            out->tv_sec = now.tv_sec; out->tv_usec = now.tv_nsec / 1000;
            return 0;
        }
        """,
        encoding="utf-8",
    )
    library = folder / "clock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source)], check=True)
    return library
