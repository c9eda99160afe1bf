"""A ledger that nothing changes unnoticed, and that has every spending before it happens."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farfield.protocols.errors import PrivacyError
from farfield.protocols.privacy.accounting import Gaussian, SampledGaussian, spent
from farfield.protocols.privacy.ledger import Budget, Entry, Ledger
from farfield.protocols.privacy.mechanism import ClientMechanism, ExampleMechanism, Mechanism

STRONG = ClientMechanism("distributed", 8.0, 1.0)  # accounted by RDP alone, which is quick
CENTRAL = ClientMechanism("central", 8.0, 1.0)


def entry(number: int = 1, population: str = "patients", mechanism: Mechanism = STRONG, note: str = "") -> Entry:
    return Entry("2026-01-02T03:04:05Z", population, "run-7", number, "ab" * 32, mechanism, note)


def filled(path: Path, rounds: int) -> Ledger:
    ledger = Ledger(path)
    for number in range(1, rounds + 1):
        ledger.spend(entry(number, note=f"round “{number}”"))
    return ledger


def test_what_is_spent_is_there_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    first = ledger.spend(entry(1))
    second = ledger.spend(entry(2, note="again"))
    ledger.spend(entry(1, population="clinic-3", mechanism=ExampleMechanism(1.0, 1.0, 0.01, 50)))
    assert first == spent({STRONG.release: 1}, 1e-5) and second == spent({STRONG.release: 2}, 1e-5)
    again = Ledger(path)
    assert again.entries == ledger.entries and again.head == ledger.head
    assert again.populations == ("clinic-3", "patients")
    assert again.total("patients", 1e-6, "client") == spent({STRONG.release: 2}, 1e-6)
    assert again.total("clinic-3", 1e-5, "example") == spent({SampledGaussian(1.0, 0.01): 50}, 1e-5)
    assert again.total("nobody", 1e-5, "client").epsilon == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert all(json.loads(line)["entry"]["run"] == "run-7" for line in path.read_text().splitlines())


def test_a_round_that_is_repeated_is_spent_twice(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.spend(entry(3))
    assert ledger.spend(entry(3)) == spent({STRONG.release: 2}, 1e-5)


def test_a_budget_is_kept_and_a_refusal_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger, budget = Ledger(path), Budget(1.5, 1e-5)
    rounds = ledger.remaining("patients", STRONG, budget)
    for number in range(rounds):
        assert ledger.spend(entry(number), budget).epsilon <= 1.5
    before = path.read_bytes()
    with pytest.raises(PrivacyError, match=r"population 'patients'.*over the budget of 1\.5") as refusal:
        ledger.spend(entry(9), budget)
    assert "enough left for 0" in refusal.value.hint
    assert path.read_bytes() == before and len(ledger.entries) == rounds
    ledger.spend(entry(9, population="others"), budget)
    assert spent({STRONG.release: rounds + 1}, 1e-5).epsilon > 1.5


def test_a_run_that_would_pass_the_budget_in_the_end_is_refused_at_its_start(tmp_path: Path) -> None:
    ledger, budget = filled(tmp_path / "ledger.jsonl", 3), Budget(2.0, 1e-5)
    possible = ledger.remaining("patients", STRONG, budget)
    assert ledger.forecast("patients", STRONG, possible, budget) == spent({STRONG.release: 3 + possible}, 1e-5)
    with pytest.raises(PrivacyError, match="more rounds would bring ε from") as refusal:
        ledger.forecast("patients", STRONG, possible + 1, budget)
    assert f"enough left for {possible:,} of them" in refusal.value.hint
    assert ledger.remaining("patients", STRONG, budget, most=2) == 2
    assert ledger.remaining("patients", STRONG, Budget(1e-3, 1e-5)) == 0
    assert len(ledger.entries) == 3


def test_mechanisms_add_up(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.spend(entry(1, mechanism=CENTRAL))
    ledger.spend(entry(2, mechanism=ClientMechanism("central", 8.0, 0.3)))  # another norm, the same ε
    ledger.spend(entry(3, mechanism=ClientMechanism("central", 5.0, 1.0)))
    assert ledger.total("patients", 1e-5, "client") == spent({Gaussian(8.0): 2, Gaussian(5.0): 1}, 1e-5)


def test_a_thousand_entries_are_read_and_added_up_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda file: None)
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path)
    for number in range(1000):
        ledger.spend(entry(number))
    assert Ledger(path).total("patients", 1e-5, "client") == spent({STRONG.release: 1000}, 1e-5)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a ledger of four entries."""
    return filled(tmp_path_factory.mktemp("ledger") / "ledger.jsonl", 4).path.read_bytes()


def assert_damaged(path: Path, raw: bytes, line: int) -> None:
    path.write_bytes(raw)
    with pytest.raises(PrivacyError, match=rf"line {line}: .*Restore the file from a backup"):
        Ledger(path)
    assert path.read_bytes() == raw


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_noticed(tmp_path: Path, written: bytes, data: st.DataObject) -> None:
    place, change = data.draw(st.integers(0, len(written) - 1)), data.draw(st.integers(1, 255))
    changed = written[:place] + bytes([written[place] ^ change]) + written[place + 1 :]
    assert_damaged(tmp_path / "ledger.jsonl", changed, min(written[:place].count(b"\n") + 1, 4))


def test_a_changed_last_newline_is_no_line_that_was_cut_off(tmp_path: Path, written: bytes) -> None:
    for other in range(256):
        if other != ord("\n"):
            assert_damaged(tmp_path / "ledger.jsonl", written[:-1] + bytes([other]), 4)


def test_lines_that_are_lost_swapped_doubled_or_added_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    filled(path, 4)
    one, two, three, four = path.read_bytes().splitlines(keepends=True)
    for lines, wrong in (
        ([two, three, four], 1),
        ([one, three, four], 2),
        ([one, two, four], 3),
        ([two, one, three, four], 1),
        ([one, two, four, three], 3),
        ([one, two, two, three, four], 3),
        ([one, two, three, four, one], 5),
        ([one, two, b"\n", three, four], 3),
        ([one, two, three.replace(b",", b", ", 1), four], 3),
        ([one, two, three, four, b"{}\n"], 5),
        ([one, two, three, four, b"garbage"], 5),
    ):
        path.write_bytes(b"".join(lines))
        with pytest.raises(PrivacyError, match=f"line {wrong}"):
            Ledger(path)


def test_lines_taken_off_the_end_show_in_the_head(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    head = filled(path, 3).head
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert Ledger(path).head != head


def test_a_file_that_shrinks_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = filled(path, 3)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(PrivacyError, match="shorter than it was"):
        ledger.spend(entry(4))
    path.unlink()
    with pytest.raises(PrivacyError, match="shorter than it was"):
        ledger.refresh()


def test_an_entry_of_a_newer_release_is_named(tmp_path: Path) -> None:
    from farfield.protocols.privacy.ledger import _GENESIS, _entry_document, _line

    path = tmp_path / "ledger.jsonl"
    path.write_bytes(_line({**_entry_document(entry()), "mechanism": {"kind": "quantum"}}, _GENESIS))
    with pytest.raises(PrivacyError, match=r"line 1: no mechanism that this release.*Update Farfield"):
        Ledger(path)


def test_a_last_line_cut_off_anywhere_is_taken_away_and_a_whole_one_counts(
    tmp_path: Path, written: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash the file ends anywhere in the line that was being written, perhaps with zeros behind."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    path = tmp_path / "ledger.jsonl"
    kept = written[: written.rindex(b"\n", 0, -1) + 1]
    ends = range(len(kept), len(written) - 1)
    for end in {*ends[:20], *ends[::7], *ends[-5:]}:
        for zeros in (b"", b"\0" * 7):
            path.write_bytes(written[:end] + zeros)
            ledger = Ledger(path)
            assert len(ledger.entries) == 3 and ledger.cut == end - len(kept) + len(zeros)
            assert path.read_bytes() == kept
    path.write_bytes(written[:-1])
    ledger = Ledger(path)
    assert len(ledger.entries) == 4 and ledger.cut == 0
    assert path.read_bytes() == written


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("partly", [0.0, 0.3, 1.0])
def test_a_crash_at_any_step_around_a_release_never_leaves_it_unrecorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partly: float
) -> None:
    """Each call to the operating system is the last one, in turn; a write gets as far as `partly` says."""
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "close", "pread", "fstat")}
    for last in itertools.count():
        path = tmp_path / f"{partly}-{last}.jsonl"
        filled(path, 1)
        calls, released = itertools.count(), []

        def stepping(name: str) -> Any:
            def step(*arguments: Any, **named: Any) -> Any:
                if next(calls) != last:  # noqa: B023
                    return real[name](*arguments, **named)
                if name == "write":
                    real["write"](arguments[0], arguments[1][: int(len(arguments[1]) * partly)])
                if name == "close":
                    real["close"](*arguments)
                raise Crash

            return step

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, stepping(name))
            crashed = False
            try:
                Ledger(path).spend(entry(2))
                released.append(2)
            except Crash:
                crashed = True
        recorded = [seen.round for seen in Ledger(path).entries]
        assert recorded in ([1], [1, 2])
        assert set(released) <= set(recorded)
        assert crashed or released
        if not crashed:
            assert last > 8
            return


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_fails_stops_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = filled(path, 1)

    def failing(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(PrivacyError, match=r"No space left on device.*Nothing is let out"):
            ledger.spend(entry(2))
    with pytest.raises(PrivacyError, match="Open it again"):
        ledger.spend(entry(2))
    assert len(Ledger(path).entries) == (1 if call == "write" else 2)


def test_short_writes_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, raw: write(file, raw[:10]))
    assert len(Ledger(filled(tmp_path / "ledger.jsonl", 2).path).entries) == 2


def test_the_file_and_its_folder_are_on_the_disk_before_spend_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    fsync = os.fsync

    def noting(file: int) -> None:
        path = Path(f"/proc/self/fd/{file}").resolve()
        synced.append((path.name, path.stat().st_size))
        fsync(file)

    monkeypatch.setattr(os, "fsync", noting)
    path = tmp_path / "ledger.jsonl"
    Ledger(path).spend(entry(1))
    names = [name for name, _ in synced]
    assert names.index(tmp_path.name) < names.index("ledger.jsonl")
    assert synced[-1] == ("ledger.jsonl", path.stat().st_size)


SPENDER = """
import sys
from pathlib import Path
from farfield.protocols.privacy import ledger as module
from farfield.protocols.privacy.mechanism import ClientMechanism
module.spent = lambda releases, delta: None  # the accountant is slow to import, and not what is tested
ledger = module.Ledger(Path(sys.argv[1]))
made = ClientMechanism("distributed", 8.0, 1.0)
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    ledger.spend(module.Entry("t", "patients", "run", number, "00", made))
    print(number, flush=True)
"""


def spender(path: Path, first: int, end: int) -> subprocess.Popen[str]:
    """A process that spends rounds `first` to `end`, and says each one that it may let out."""
    arguments = [sys.executable, "-c", SPENDER, str(path), str(first), str(end)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_a_process_that_is_killed_has_recorded_all_that_it_released(tmp_path: Path) -> None:
    path, released = tmp_path / "ledger.jsonl", 0
    for kills in range(3):
        with spender(path, 0, 10**9) as process:
            assert process.stdout is not None
            for _ in range(5 + 7 * kills):
                process.stdout.readline()
                released += 1
            process.send_signal(signal.SIGKILL)
            released += len(process.stdout.readlines())
        recorded = len(Ledger(path).entries)
        assert released <= recorded <= released + kills + 1


def test_several_processes_share_a_ledger_and_its_budget(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    here = filled(path, 1)
    processes = [spender(path, 100 * number, 100 * number + 10) for number in (1, 2, 3)]
    for process in processes:
        said, _ = process.communicate()
        assert process.returncode == 0 and len(said.splitlines()) == 10
    assert len(here.entries) == 1
    with pytest.raises(PrivacyError, match="over the budget"):
        here.spend(entry(2), Budget(spent({STRONG.release: 31}, 1e-5).epsilon, 1e-5))
    assert len(here.entries) == 31 and len({seen.round for seen in here.entries}) == 31
    assert Ledger(path).head == here.head


def test_nobody_writes_while_another_does(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = filled(path, 1)
    before = path.read_bytes()
    waiting = threading.Thread(target=lambda: ledger.spend(entry(2)))
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(timeout=0.3)
        assert waiting.is_alive() and path.read_bytes() == before
    waiting.join()
    assert len(Ledger(path).entries) == 2


def test_several_threads_share_a_ledger(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    threads = [threading.Thread(target=lambda: [ledger.spend(entry(n)) for n in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Ledger(ledger.path).entries) == 40


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="cannot be opened: No such file"):
        Ledger(tmp_path / "missing" / "ledger.jsonl")
    with pytest.raises(PrivacyError, match="cannot be opened: Is a directory"):
        Ledger(tmp_path)


def test_units_are_counted_apart_and_a_client_covers_its_examples_at_half_the_noise(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    for number in range(3):
        ledger.spend(entry(number, mechanism=CENTRAL))
    ledger.spend(entry(4, mechanism=ExampleMechanism(1.0, 1.0, 0.01, 50)))
    assert ledger.units("patients") == ("client", "example")
    assert ledger.total("patients", 1e-5, "client") == spent({Gaussian(8.0): 3}, 1e-5)
    both = spent({Gaussian(4.0): 3, SampledGaussian(1.0, 0.01): 50}, 1e-5)
    assert Ledger(tmp_path / "ledger").total("patients", 1e-5, "example") == both


def test_of_clients_who_take_turns_those_count_who_spent_most(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    ledger = Ledger(path)
    for number, turn in enumerate((0, 1, 2, 0, 1), 1):
        ledger.spend(replace(entry(number, mechanism=CENTRAL), turn=turn))
    assert ledger.total("patients", 1e-5, "client") == spent({Gaussian(8.0): 2}, 1e-5)
    ledger.spend(replace(entry(6, mechanism=CENTRAL), run="another", turn=2))  # whose turns nobody can compare
    assert Ledger(path).total("patients", 1e-5, "client") == spent({Gaussian(8.0): 3}, 1e-5)


def test_a_round_of_a_turn_that_spent_less_costs_nothing_more(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    budget = Budget(spent({Gaussian(8.0): 1}, 1e-5).epsilon, 1e-5)
    for number in range(3):
        ledger.spend(replace(entry(number, mechanism=CENTRAL), turn=number), budget)
    with pytest.raises(PrivacyError, match="over the budget"):
        ledger.spend(replace(entry(4, mechanism=CENTRAL), turn=1), budget)
