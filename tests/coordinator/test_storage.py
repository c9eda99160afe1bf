"""The store on SQLite; with `-m slow`, on a PostgreSQL server that the tests start (needs psycopg)."""

import hashlib
import math
import os
import pwd
import resource
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import farfield.coordinator.storage as storage
from farfield.coordinator.runs import RoundRecord
from farfield.coordinator.storage import ALIVE, BundleRow, Node, Run, RunState, Store
from farfield.coordinator.storage.tables import REVISION, metadata
from farfield.protocols.errors import EnrolmentError, FarfieldError, StorageError

NOW = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
DAY = timedelta(days=1)
SECRET = b"s" * 16


def node(name: str, **changes: object) -> Node:
    raw = hashlib.sha256(name.encode()).digest()
    made = Node(name, b"ecdsa " + raw, raw, bytes(reversed(raw)), raw[:20].hex(), NOW)
    return replace(made, **changes)  # type: ignore[arg-type]


def digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


# --- Both databases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """A PostgreSQL server on a socket in a folder of its own, run by somebody who is not root."""

    folder: Path

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://farfield@/postgres?host={self.folder}"

    def order(self, statement: str) -> None:
        engine = sqlalchemy.create_engine(self.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(statement)
        engine.dispose()

    def schema(self, name: str) -> str:
        """The URL of an empty place in the one database; to make a whole database takes long."""
        self.order(f'CREATE SCHEMA "{name}"')
        return f"{self.url}&options=-csearch_path%3D{name}".replace("+psycopg", "")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Fails, rather than skips, where there is no PostgreSQL."""
    programs = Path(shutil.which("postgres") or "postgres").resolve(strict=True).parent
    folder = Path(tempfile.mkdtemp(prefix="farfield-postgres-"))
    user = pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    os.chown(folder, user.pw_uid, user.pw_gid)
    who: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}

    def call(program: str, *arguments: object) -> None:
        command = [str(one) for one in (programs / program, "-D", folder / "data", *arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder, **who)

    try:
        call("initdb", "-U", "farfield", "--auth=trust", "-E", "UTF8", "-N")
        options = f"-k {folder} -h '' -c timezone=Asia/Tokyo -c fsync=off"
        call("pg_ctl", "-w", "-l", folder / "log", "-o", options, "start")
        try:
            yield Cluster(folder)
        finally:
            call("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/farfield.db"
    cluster: Cluster = request.getfixturevalue("cluster")
    return cluster.schema(f"s{digest(str(tmp_path).encode()).hex()[:16]}")


@pytest.fixture
def store(url: str, tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(url, base=tmp_path, upgrade=True)
    yield opened
    opened.close()


@pytest.fixture
def admit(store: Store) -> Callable[..., Node]:
    def admit(name: str) -> Node:
        secret = digest(name.encode())[:16]
        store.invite([digest(secret)], NOW, DAY)
        store.redeem(secret, node(name), NOW)
        return node(name)

    return admit


@pytest.fixture
def run(store: Store, tmp_path: Path) -> Run:
    return add(store, "first", tmp_path / "runs" / "first")


def add(store: Store, name: str, folder: Path, *, after: timedelta = timedelta(), backbone: str = "b" * 64) -> Run:
    run = Run(name, b"{}", "d" * 64, backbone, folder, RunState.QUEUED, "waits for nodes", NOW + after)
    store.add_run(run)
    return run


# --- Invitations ----------------------------------------------------------------------------------------------------


def test_an_invitation_admits_one_node(store: Store) -> None:
    store.invite([digest(SECRET), digest(b"other")], NOW, DAY)
    assert store.open_invitations(NOW) == 2
    store.redeem(SECRET, node("ann"), NOW + DAY - timedelta(microseconds=1))
    assert store.nodes() == [node("ann")]
    assert store.open_invitations(NOW) == 1
    with pytest.raises(
        EnrolmentError, match=r"token: the invitation was used on 2026-03-02 at 12:30 UTC\. Ask for a new"
    ):
        store.redeem(SECRET, node("bob"), NOW)
    assert store.node("bob") is None


def test_an_invitation_that_was_never_made(store: Store) -> None:
    store.invite([digest(SECRET)], NOW, DAY)
    for secret in (b"t" * 16, b"", digest(SECRET)):  # whoever reads the database cannot redeem what is in it
        with pytest.raises(EnrolmentError, match="made no such invitation"):
            store.redeem(secret, node("ann"), NOW)
    assert store.nodes() == []


def test_an_invitation_expires(store: Store) -> None:
    store.invite([digest(SECRET)], NOW, DAY)
    assert store.open_invitations(NOW + DAY) == 0
    with pytest.raises(EnrolmentError, match=r"the invitation expired on 2026-03-02 at 12:30 UTC"):
        store.redeem(SECRET, node("ann"), NOW + DAY)
    assert store.nodes() == []


@pytest.mark.parametrize(
    ("taken", "said"),
    [
        (replace(node("ann"), name="bob"), "bob: another node has these keys"),
        (replace(node("bob"), name="ann"), "ann: another node has this name"),
        (node("bob", fleet_key=node("ann").fleet_key), "bob: another node has these keys"),
        (node("bob", signing_key=node("ann").signing_key), "bob: another node has these keys"),
        (node("bob", certificate=node("ann").certificate), "bob: another node has these keys"),
    ],
)
def test_a_name_and_keys_belong_to_one_node_for_ever(
    store: Store, admit: Callable[..., Node], taken: Node, said: str
) -> None:
    """Even to one that was revoked; and the invitation is still good for a node that is new."""
    admit("ann")
    store.revoke("ann", "", NOW)
    store.invite([digest(SECRET)], NOW, DAY)
    with pytest.raises(EnrolmentError, match=said):
        store.redeem(SECRET, taken, NOW)
    assert len(store.nodes()) == 1
    store.redeem(SECRET, node("carol"), NOW)


REDEEMING = """
import hashlib, sys
from datetime import datetime, UTC
from farfield.coordinator.storage import Node, Store
from farfield.protocols.errors import EnrolmentError

url, who, shared = sys.argv[1:]
now = datetime(2026, 3, 1, 13, tzinfo=UTC)
store = Store.open(url)
print("ready", flush=True)
sys.stdin.readline()
for number in range(25):
    name = f"node-{number}" if shared == "name" else f"{who}-{number}"
    raw = hashlib.sha256(f"{who}-{number}".encode()).digest()
    secret = f"{who if shared == 'name' else ''}{number}".encode()
    try:
        store.redeem(secret, Node(name, raw, raw, raw, raw[:20].hex(), now), now)
        print("won", number, who)
    except EnrolmentError as error:
        assert "was used on" in str(error) or "another node has" in str(error) or "a moment ago" in str(error), error
"""


@pytest.mark.parametrize("shared", ["token", "name"])
def test_of_processes_that_enrol_at_the_same_time_one_wins(store: Store, url: str, shared: str) -> None:
    """Four processes redeem the same tokens for different names, or different tokens for the same names."""
    people = [f"p{number}" for number in range(4)]
    owners = [""] if shared == "token" else people
    store.invite([digest(f"{who}{number}".encode()) for who in owners for number in range(25)], NOW, DAY)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", REDEEMING, url, who, shared],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for who in people
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    won = sorted(line for process in processes for line in process.communicate()[0].splitlines())
    assert [process.returncode for process in processes] == [0] * 4
    assert sorted(int(line.split()[1]) for line in won) == list(range(25)), won
    admitted = store.nodes()
    assert len(admitted) == 25
    assert {f"won {one.name.split('-')[1]}" for one in admitted} == {" ".join(line.split()[:2]) for line in won}
    assert store.open_invitations(NOW) == (0 if shared == "token" else 75)


def test_of_threads_that_enrol_at_the_same_time_one_wins(store: Store) -> None:
    store.invite([digest(SECRET)], NOW, DAY)
    together, outcomes = threading.Barrier(8), []

    def enrol(name: str) -> None:
        together.wait()
        try:
            store.redeem(SECRET, node(name), NOW)
            outcomes.append(name)
        except EnrolmentError:
            outcomes.append("")

    threads = [threading.Thread(target=enrol, args=(f"n{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 8
    (winner,) = filter(None, outcomes)
    assert [one.name for one in store.nodes()] == [winner]


# --- Nodes ----------------------------------------------------------------------------------------------------------


def test_a_node_comes_and_goes(store: Store, admit: Callable[..., Node]) -> None:
    ann, bob = admit("ann"), admit("bob")
    store.attend("ann", "i1", "10.0.0.7", NOW + DAY)
    here = replace(ann, instance="i1", address="10.0.0.7", seen_at=NOW + DAY)
    assert store.nodes() == [here, bob]
    store.absent("ann", "i0", NOW + 2 * DAY)
    assert store.node("ann") == here, "another process of this node has left"
    store.absent("ann", "i1", NOW + 2 * DAY)
    assert store.node("ann") == replace(here, instance=None, seen_at=NOW + 2 * DAY)
    store.attend("ann", "i2", "10.0.0.8", NOW + 3 * DAY)
    store.everyone_absent()
    assert store.node("ann") == replace(here, instance=None, address="10.0.0.8", seen_at=NOW + 3 * DAY)


def test_a_revoked_node_stays_as_it_was_revoked(store: Store, admit: Callable[..., Node]) -> None:
    ann, bob = admit("ann"), admit("bob")
    store.revoke("ann", "laptop stolen", NOW + DAY)
    store.revoke("ann", "again", NOW + 2 * DAY)
    assert store.nodes() == [replace(ann, revoked_at=NOW + DAY, revoked_because="laptop stolen"), bob]


def test_a_new_certificate_takes_the_place_of_the_old_one(store: Store, admit: Callable[..., Node]) -> None:
    """And the node stays what it was: its keys do not change."""
    ann, bob = admit("ann"), admit("bob")
    store.attend("ann", "i1", "10.0.0.7", NOW + DAY)
    store.renewed("ann", "ab" * 20)
    here = replace(ann, certificate="ab" * 20, instance="i1", address="10.0.0.7", seen_at=NOW + DAY)
    assert store.nodes() == [here, bob]


def test_a_node_that_is_not_there(store: Store, admit: Callable[..., Node]) -> None:
    assert store.node("ann") is None
    with pytest.raises(StorageError, match=r"there is no node 'ann'\. There is no node yet"):
        store.revoke("ann", "", NOW)
    admit("anna")
    actions: list[Callable[[], object]] = [
        lambda: store.revoke("ann", "", NOW),
        lambda: store.attend("ann", "i", "a", NOW),
        lambda: store.notify("ann", "text", NOW),
        lambda: store.renewed("ann", "ab" * 20),
    ]
    for action in actions:
        with pytest.raises(StorageError, match=r"there is no node 'ann'\. Did you mean 'anna'\?"):
            action()
    store.absent("ann", "i", NOW)
    assert store.take_notices("ann") == []


@pytest.mark.parametrize("number", [0, 1, 2**63, 2**64 - 1])
def test_the_superlinks_numbers_have_64_bits(store: Store, admit: Callable[..., Node], run: Run, number: int) -> None:
    admit("ann")
    admit("bob")
    store.set_fleet_ids({"ann": number, "bob": None, "nobody": 3})
    assert [one.fleet_id for one in store.nodes()] == [number, None]
    store.set_fleet_ids({"ann": None})
    assert [one.fleet_id for one in store.nodes()] == [None, None]
    store.begin("first", number, NOW)
    assert store.runs()[0].flower_run == number


# --- Runs -----------------------------------------------------------------------------------------------------------


def test_a_run_from_beginning_to_end(store: Store, run: Run) -> None:
    assert store.run("first") == run
    store.say("first", "waits for 2 more nodes")
    assert store.run("first") == replace(run, detail="waits for 2 more nodes")
    store.begin("first", 17, NOW + DAY)
    began = replace(run, state=RunState.RUNNING, detail="", started_at=NOW + DAY, flower_run=17)
    assert store.run("first") == began
    store.begin("first", 18, NOW + 2 * DAY)
    assert store.run("first") == replace(began, flower_run=18), "started once, whatever crashed since"
    store.end("first", RunState.FINISHED, "", NOW + 3 * DAY)
    ended = replace(began, flower_run=18, state=RunState.FINISHED, finished_at=NOW + 3 * DAY)
    assert store.run("first") == ended
    store.end("first", RunState.CANCELLED, "too late", NOW + 4 * DAY)
    store.begin("first", 19, NOW + 4 * DAY)
    store.say("first", "too late")
    assert store.run("first") == ended


def test_a_cancelled_run_does_not_begin(store: Store, run: Run) -> None:
    """Whichever of `coordinator cancel` and the service comes first."""
    store.end("first", RunState.CANCELLED, "by hand", NOW)
    store.begin("first", 1, NOW)
    ended = store.run("first")
    assert ended is not None and (ended.state, ended.started_at) == (RunState.CANCELLED, None)


def test_runs_are_listed_oldest_first(store: Store, run: Run, tmp_path: Path) -> None:
    add(store, "third", tmp_path / "3", after=2 * DAY)
    add(store, "second", tmp_path / "2", after=DAY)
    store.begin("second", 1, NOW)
    store.end("third", RunState.FAILED, "no", NOW)
    assert [one.name for one in store.runs()] == ["first", "second", "third"]
    assert [one.name for one in store.runs(RunState.QUEUED, RunState.FAILED)] == ["first", "third"]
    assert store.runs(RunState.FINISHED) == []


def test_a_run_that_is_not_there_or_is_there_already(store: Store, run: Run) -> None:
    assert store.run("frist") is None
    record = RoundRecord(1, 1, None, None, None, 0, 0, 0.0)
    actions: list[Callable[[], object]] = [
        lambda: store.begin("frist", 1, NOW),
        lambda: store.end("frist", RunState.FAILED, "", NOW),
        lambda: store.say("frist", ""),
        lambda: store.crashed("frist"),
        lambda: store.add_round("frist", record),
    ]
    for action in actions:
        with pytest.raises(StorageError, match=r"there is no run 'frist'\. Did you mean 'first'\?"):
            action()
    assert store.rounds("frist") == []
    with pytest.raises(StorageError, match="first: a run of this name exists already"):
        store.add_run(run)


def test_a_finished_round_forgives_crashes(store: Store, run: Run) -> None:
    assert [store.crashed("first"), store.crashed("first")] == [1, 2]
    assert store.runs()[0].crashes == 2
    store.add_round("first", RoundRecord(1, 1, None, None, None, 0, 0, 0.0))
    assert store.runs()[0].crashes == 0
    assert store.crashed("first") == 1


def test_rounds_come_back_as_they_were(store: Store, run: Run, tmp_path: Path) -> None:
    add(store, "other", tmp_path / "other")
    records = [
        RoundRecord(0, 0, None, 2.5, 0.25, 10, 20, 0.5),
        RoundRecord(1, 3, 1 / 3, math.inf, 1.0, 2**40, 2, 1e-9, 7, {"ann": "gone \0 \ud800 \N{BELL}"}),
        RoundRecord(10, 0, None, None, None, 0, 0, 0.0, 0, {"bob": "refused"}),
    ]
    for record in reversed(records):
        store.add_round("first", record)
    store.add_round("other", records[0])
    assert store.rounds("first") == records
    again = replace(records[1], clients=4)
    store.add_round("first", again)
    store.add_round("first", again)
    assert store.rounds("first") == [records[0], again, records[2]]


def test_folders_inside_the_home_move_with_it(store: Store, url: str, tmp_path: Path) -> None:
    inside = add(store, "inside", tmp_path / "runs" / "a")
    outside = add(store, "outside", Path("/elsewhere/b"), after=DAY)
    store.add_bundle(BundleRow("d" * 64, "backbone", tmp_path / "models", b""))
    assert store.runs() == [inside, outside]
    (tmp_path / "moved").mkdir()
    moved = Store.open(url, base=tmp_path / "moved")
    assert [one.folder for one in moved.runs()] == [tmp_path / "moved" / "runs" / "a", Path("/elsewhere/b")]
    bundle = moved.bundle("d" * 64)
    assert bundle is not None and bundle.folder == tmp_path / "moved" / "models"
    moved.close()


# --- Bundles, notices, the service ----------------------------------------------------------------------------------


def test_a_bundle_is_offered_while_a_run_needs_it(store: Store, tmp_path: Path) -> None:
    row = BundleRow("b" * 64, "backbone", tmp_path / "one", b'{"files":[]}')
    assert store.bundle(row.digest) is None
    store.add_bundle(row)
    assert store.bundle(row.digest) == row
    store.add_bundle(replace(row, folder=tmp_path / "two"))
    assert store.bundle(row.digest) == replace(row, folder=tmp_path / "two")
    assert not store.may_fetch(row.digest)
    add(store, "first", tmp_path / "1")
    add(store, "second", tmp_path / "2")
    add(store, "third", tmp_path / "3", backbone="c" * 64)
    assert store.may_fetch(row.digest)
    store.begin("first", 1, NOW)
    store.end("second", RunState.FAILED, "", NOW)
    assert store.may_fetch(row.digest)
    store.end("first", RunState.FINISHED, "", NOW)
    assert not store.may_fetch(row.digest)
    assert store.may_fetch("c" * 64)


def test_a_notice_is_given_once(store: Store, admit: Callable[..., Node]) -> None:
    admit("ann")
    admit("bob")
    for number in range(12):
        store.notify("ann", f"notice {number}", NOW - number * DAY)
    store.notify("bob", "for bob", NOW)
    assert store.take_notices("ann") == [f"notice {number}" for number in range(12)]
    assert store.take_notices("ann") == []
    assert store.take_notices("bob") == ["for bob"]


def test_text_from_a_peer_is_kept_as_far_as_it_can_be(store: Store, admit: Callable[..., Node]) -> None:
    admit("ann")
    store.notify("ann", "a\0b\ud800c\n\N{BELL}", NOW)
    assert store.take_notices("ann") == ["a?b?c\n\N{BELL}"]


def test_the_service_is_alive_for_as_long_as_it_beats(store: Store) -> None:
    assert store.last_beat() is None
    assert store.serving_since(NOW) is None
    for seconds in (0, 9, 18):
        store.beat(7, NOW + timedelta(seconds=seconds))
    last = NOW + timedelta(seconds=18)
    assert store.last_beat() == (7, last)
    assert store.serving_since(last + ALIVE - timedelta(microseconds=1)) == NOW
    assert store.serving_since(last + ALIVE) is None
    store.beat(8, last)
    assert store.serving_since(last) == last, "another process"
    store.beat(8, last + ALIVE)
    assert store.serving_since(last + ALIVE) == last + ALIVE, "it was away, and in a container it has its number again"


def test_a_service_that_stopped_is_not_alive(store: Store, admit: Callable[..., Node]) -> None:
    admit("ann")
    store.attend("ann", "i", "10.0.0.7", NOW)
    store.beat(7, NOW)
    store.rest()
    assert (store.last_beat(), store.serving_since(NOW)) == (None, None)
    ann = store.node("ann")
    assert ann is not None and ann.instance is None


# --- What is stored is what comes back ------------------------------------------------------------------------------


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.datetimes(
        datetime(1970, 1, 2),
        datetime(9999, 12, 30),
        timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=45)), timezone(-timedelta(hours=12))]),
    )
)
def test_a_moment_comes_back_in_utc(store: Store, moment: datetime) -> None:
    store.beat(1, moment)
    found = store.last_beat()
    assert found is not None
    assert found[1] == moment
    assert found[1].tzinfo is UTC


def test_a_moment_has_a_time_zone(store: Store) -> None:
    with pytest.raises(sqlalchemy.exc.StatementError, match="without a time zone"):
        store.beat(1, NOW.replace(tzinfo=None))


# --- Several processes at once --------------------------------------------------------------------------------------

WRITING = """
import sys
from datetime import datetime, UTC
from pathlib import Path
from farfield.coordinator.runs import RoundRecord
from farfield.coordinator.storage import Store

url, who = sys.argv[1:]
store = Store.open(url, base=Path("/"), upgrade=True)
for number in range(40):
    store.crashed("first")
    store.say("first", f"{who} {number}")
    store.runs()
    store.notify("ann", f"{who} {number}", datetime.now(UTC))
"""


def test_processes_write_at_the_same_time(store: Store, url: str, admit: Callable[..., Node], run: Run) -> None:
    admit("ann")
    processes = [subprocess.Popen([sys.executable, "-c", WRITING, url, str(who)]) for who in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert store.runs()[0].crashes == 120
    taken = [text.split() for text in store.take_notices("ann")]
    for who in range(3):
        assert [int(number) for writer, number in taken if writer == str(who)] == list(range(40))


OPENING = """
import sys
from farfield.coordinator.storage import Store
print("ready", flush=True)
sys.stdin.readline()
print(Store.open(sys.argv[1], upgrade=True).nodes())
"""


def test_processes_make_the_tables_at_the_same_time(url: str) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", OPENING, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    ended = []
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        ended.append((process.communicate()[0], process.returncode))
    assert ended == [("[]\n", 0)] * 4


# --- Tables and migrations ------------------------------------------------------------------------------------------


def alembic() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(Path(storage.__file__).parent / "migrations"))
    return ScriptDirectory.from_config(config)


def test_the_migrations_make_the_tables_that_the_code_uses(store: Store, url: str) -> None:
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_migrations_are_numbered_in_one_line() -> None:
    script = alembic()
    assert script.get_heads() == [REVISION]
    numbers = [one.revision for one in script.walk_revisions()]
    assert numbers == [f"{number:04}" for number in range(len(numbers), 0, -1)]


def test_a_database_is_used_by_the_release_that_fits(store: Store, url: str) -> None:
    engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))
    for revision, said in {
        "0000": r"was made by an older release of Farfield\. `coordinator serve` upgrades it",
        "9999": r"was made by a newer release of Farfield\. Update Farfield",
    }.items():
        with engine.begin() as connection:
            connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = :new"), {"new": revision})
        with pytest.raises(StorageError, match=said):
            Store.open(url)
    with pytest.raises(StorageError, match="newer release"):
        Store.open(url, upgrade=True)
    engine.dispose()


def test_a_database_without_tables(url: str, tmp_path: Path) -> None:
    (tmp_path / "farfield.db").touch()
    with pytest.raises(StorageError, match=r"holds no tables\. `coordinator serve` makes them"):
        Store.open(url)


def test_upgrading_twice_changes_nothing(store: Store, url: str, admit: Callable[..., Node]) -> None:
    admit("ann")
    again = Store.open(url, upgrade=True)
    assert again.nodes() == [node("ann")]
    again.close()


# --- SQLite ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A database with tables."""
    Store.open("sqlite:///farfield.db", base=tmp_path, upgrade=True).close()
    return tmp_path / "farfield.db"


def test_nobody_else_reads_the_file(file: Path) -> None:
    store = Store.open("sqlite:///farfield.db", base=file.parent)
    store.beat(1, NOW)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in file.parent.iterdir()}
    assert modes == dict.fromkeys(("farfield.db", "farfield.db-wal", "farfield.db-shm"), 0o600)
    store.close()


def test_a_reader_does_not_wait_for_a_writer(file: Path) -> None:
    """The service goes on while a command writes."""
    store = Store.open(f"sqlite:///{file}")
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("INSERT INTO service VALUES (1, 5, '2026-01-01 00:00:00.000000', '2026-01-01 00:00:00.000000')")
    assert store.last_beat() is None
    other.execute("COMMIT")
    assert store.last_beat() == (5, datetime(2026, 1, 1, tzinfo=UTC))
    other.close()
    store.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:///nowhere.db", r"sqlite:////.*/nowhere.db: no such database\. `coordinator init` makes one"),
        ("sqlite:///no/where.db", r"no/where.db: no such database"),
        ("sqlite:///folder", r"folder: cannot be opened: is a directory"),
        ("sqlite:///text.db", r"text.db: the database says: file is not a database\. Restore it from a backup"),
        ("sqlite://", r"database.url: several processes must share it, so it is a file"),
        ("sqlite:///:memory:", r"database.url: several processes must share it"),
        ("mysql://host/x", r"database.url: 'mysql' databases are not supported\. Give sqlite:///FILE, or postgresql:"),
        ("farfield.db", r"database.url: not the URL of a database\. Give sqlite:///FILE"),
        ("postgresql://h:secret/x", r"database.url: not the URL of a database"),
    ],
)
def test_a_database_that_cannot_be_opened(tmp_path: Path, url: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_text("This is a letter to my aunt. " * 100)
    with pytest.raises(StorageError, match=said) as caught:
        Store.open(url, base=tmp_path)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "nowhere.db").exists()


def one_sentence(error: FarfieldError, *parts: str) -> None:
    assert "\n" not in str(error)
    assert "INSERT" not in str(error) and "sqlalche" not in str(error)
    for part in parts:
        assert part in str(error)


@pytest.fixture
def pragma() -> Iterator[Callable[[str], None]]:
    """Give SQLite an order on every connection that is opened from then on."""
    listeners = []

    def order(text: str) -> None:
        def listener(connection: sqlite3.Connection, _: object) -> None:
            connection.execute(text)

        sqlalchemy.event.listen(sqlalchemy.Engine, "connect", listener)
        listeners.append(listener)

    yield order
    for listener in listeners:
        sqlalchemy.event.remove(sqlalchemy.Engine, "connect", listener)


def test_a_database_that_may_only_be_read(file: Path, pragma: Callable[[str], None]) -> None:
    pragma("PRAGMA query_only = ON")
    store = Store.open(f"sqlite:///{file}")
    assert store.nodes() == []
    with pytest.raises(StorageError) as caught:
        store.beat(1, NOW)
    one_sentence(caught.value, f"sqlite:///{file}: the database says: attempt to write a readonly database. Whoever")
    store.close()


def test_a_database_that_is_full_keeps_what_it_has(file: Path, pragma: Callable[[str], None]) -> None:
    pragma("PRAGMA max_page_count = 30")
    store = Store.open(f"sqlite:///{file}", base=file.parent)
    kept = []
    with pytest.raises(StorageError) as caught:
        for number in range(30):
            kept.append(add(store, f"run-{number:02}", file.parent / str(number), backbone="b" * 10_000))
    one_sentence(caught.value, "database or disk is full. Make room on its disk")
    assert kept
    assert store.runs() == kept
    store.close()


FULL_DISK = """
import resource, signal, sys
from datetime import datetime, UTC
from farfield.coordinator.storage import Store
from farfield.protocols.errors import StorageError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = Store.open(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
kept = 0
try:
    while True:
        store.notify("ann", "x" * 1000, datetime(2026, 3, 1, tzinfo=UTC))
        kept += 1
except StorageError as error:
    print(kept)
    print(error)
"""


def test_a_disk_that_takes_no_more(file: Path) -> None:
    """In a real process, where the system refuses to write; what was committed before is there afterwards."""
    url = f"sqlite:///{file}"
    store = Store.open(url)
    store.invite([digest(SECRET)], NOW, DAY)
    store.redeem(SECRET, node("ann"), NOW)
    limit = 40 * resource.getpagesize()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, url, str(limit)], check=True, capture_output=True, text=True
    )
    kept, error = done.stdout.splitlines()
    assert f"{url}: the database says: disk I/O error. Make room on its disk" in error
    assert int(kept) > 0
    assert len(store.take_notices("ann")) == int(kept)
    store.close()


def test_a_writer_that_never_ends(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farfield.coordinator.storage.database._WAIT_SECONDS", 0.01)
    store = Store.open(f"sqlite:///{file}")
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError) as caught:
        store.beat(1, NOW)
    one_sentence(caught.value, "database is locked. Another process has been writing for too long; try again")
    other.close()
    store.beat(1, NOW)
    store.close()


def test_foreign_keys_are_kept(file: Path) -> None:
    store = Store.open(f"sqlite:///{file}")
    with pytest.raises(sqlalchemy.exc.IntegrityError), store._database._engine.begin() as db:
        db.exec_driver_sql("INSERT INTO rounds VALUES ('nothing', 1, '{}')")
    store.close()


def test_storage_needs_neither_torch_nor_flower() -> None:
    code = "import sys, farfield.coordinator.storage; print(sorted({'torch', 'flwr', 'alembic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# --- PostgreSQL -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_went_away_and_came_back(cluster: Cluster) -> None:
    """The service outlives a restart of its database: connections that it has open are found dead, and replaced."""
    store = Store.open(cluster.schema("restarted"), upgrade=True)
    store.beat(1, NOW)
    cluster.order(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend' "
        "AND pid <> pg_backend_pid()"
    )
    store.beat(1, NOW + DAY)
    assert store.last_beat() == (1, NOW + DAY)
    store.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "postgresql://u:hidden@127.0.0.1:1/x",
            r"postgresql\+psycopg://u:\*\*\*@127.0.0.1:1/x: the database says: .*refused",
        ),
        ("postgresql://farfield@/nothing?host={folder}", "does not exist"),
    ],
)
def test_a_server_that_cannot_be_used(cluster: Cluster, url: str, said: str) -> None:
    with pytest.raises(StorageError, match=said) as caught:
        Store.open(url.format(folder=cluster.folder))
    one_sentence(caught.value, "Is the database server running, and the URL right?")
    assert "hidden" not in str(caught.value)
