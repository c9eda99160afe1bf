"""A ledger of privacy: what was spent, on whom, before it was spent.

One line of JSON for each round, appended and never changed. A line carries the SHA-256 of the line before it and of
itself, so that what was written cannot be changed, reordered or taken out of the middle unnoticed; lines taken off the
end can, unless someone else knows the `head`. `spend` returns when the line is on the disk, and only then may the noisy
result be let out. A crash in between leaves a round spent that nobody saw; a round that is repeated is spent twice.

An end without a newline is a write that was cut off. Its `spend` never returned, so nothing was let out for it: what
is whole all the same is counted, and what is not is cut off. Anything else that is not as it was written is damage.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from farfield.protocols.durable import sync
from farfield.protocols.errors import PrivacyError

from .accounting import Release, Spent, spent
from .mechanism import Mechanism, Unit, document, restore

_GENESIS: Final = hashlib.sha256(b"farfield privacy ledger 1").hexdigest()
_ENTRY_KEYS: Final = {"time", "population", "run", "round", "plan", "mechanism", "note", "turn"}
_MENDING: Final = (
    "Whatever was spent is not known any more. Restore the file from a backup, or set it aside and count the whole "
    "budget of everybody in it as spent."
)


@dataclass(frozen=True)
class Entry:
    """One round that is about to be let out.

    Attributes:
        time: ISO 8601, in UTC.
        population: whose budget it is.
        run, round: where it belongs; a round that is repeated has an entry for each time.
        plan: the Plan's digest.
        note: anything a person should know of it.
        turn: whose round it was, where the clients of a run take turns (`protocols/turns.py`): nobody is in rounds of
            two turns, so of a run the turn that spent most is what counts.
    """

    time: str
    population: str
    run: str
    round: int
    plan: str
    mechanism: Mechanism
    note: str = ""
    turn: int = 0


@dataclass(frozen=True)
class Budget:
    """No more than `epsilon` at `delta`, in all."""

    epsilon: float
    delta: float


class Ledger:
    """The ledger in one file. Several processes and threads may have it open, and spend from the same budgets.

    What others wrote is known after `spend` and `refresh`, which read on from where they were. The file is locked only
    for that long, and none of them keeps it open.
    """

    def __init__(self, path: Path) -> None:
        """Open the ledger at `path`, mode 0600, making an empty one where there is none, and check all of it.

        Raises:
            PrivacyError: it is damaged (says in which line), or cannot be read and written.
        """
        self.path = path
        self.cut = 0
        """Bytes of a write that had been cut off, which opening took away."""
        self._thread = threading.RLock()
        self._broken = False
        self._read, self._head = 0, _GENESIS
        self._entries: list[Entry] = []
        self._spent: defaultdict[tuple[str, Unit], Counter[Release]] = defaultdict(Counter)
        self._turns: defaultdict[tuple[str, str, Release], Counter[int]] = defaultdict(Counter)
        self.refresh()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All entries that this object has read or written, the oldest first."""
        return tuple(self._entries)

    @property
    def populations(self) -> tuple[str, ...]:
        """Whose budget was ever spent, sorted."""
        return tuple(sorted({population for population, _ in self._spent}))

    def units(self, population: str) -> tuple[Unit, ...]:
        """Which units of `population` anything was spent of."""
        return tuple(sorted(unit for name, unit in self._spent if name == population))

    @property
    def head(self) -> str:
        """SHA-256 of the last line; it stands for all of them. Kept elsewhere, it shows when lines have gone."""
        return self._head

    def refresh(self) -> None:
        """Read what others have written since. Raises PrivacyError as opening does."""
        with self._held():
            pass

    def total(self, population: str, delta: float, unit: Unit) -> Spent:
        """What was spent of the privacy of one `unit` in `population`, at `delta`.

        What protects whole clients protects their examples, too, but at half the noise: an example that changes can
        turn its client's update from one end of the norm to the other. What protects examples says nothing of clients.
        """
        return spent(self._counted(population, unit), delta)

    def _counted(self, population: str, unit: Unit) -> Counter[Release]:
        counted = Counter(self._spent.get((population, unit), Counter()))
        if unit == "example":
            for release, count in self._spent.get((population, "client"), Counter()).items():
                counted[release.with_noise(release.noise_multiplier / 2)] += count
        return counted

    def forecast(self, population: str, mechanism: Mechanism, rounds: int, budget: Budget) -> Spent:
        """What will have been spent after `rounds` more. Raises PrivacyError when that is more than the `budget`."""
        after = self._after(population, mechanism, rounds, budget.delta)
        if after.epsilon > budget.epsilon:
            before = self.total(population, budget.delta, mechanism.unit)
            affordable = self.remaining(population, mechanism, budget, rounds)
            raise PrivacyError(
                f"{rounds:,} more {'round' if rounds == 1 else 'rounds'} would bring ε from {before.epsilon:.4g} "
                f"to {after.epsilon:.4g}, over the budget of {budget.epsilon:.4g} at δ = {budget.delta:g}",
                where=f"one {mechanism.unit} of population {population!r}",
                hint=f"There is enough left for {affordable:,} of them. Add noise, or ask for fewer rounds.",
            )
        return after

    def remaining(self, population: str, mechanism: Mechanism, budget: Budget, most: int = 1_000_000) -> int:
        """How many more rounds of `mechanism` the `budget` has room for; `most` if it is that many or more."""

        def affordable(rounds: int) -> bool:
            return self._after(population, mechanism, rounds, budget.delta).epsilon <= budget.epsilon

        if not affordable(0):
            return 0
        low, high = 0, 1
        while high <= most and affordable(high):
            low, high = high, 2 * high
        high = min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if affordable(middle) else (low, middle)
        return low

    def spend(self, entry: Entry, budget: Budget | None = None) -> Spent:
        """Write `entry`, and return when it is on the disk: only now may its result be let out.

        Returns:
            What has been spent of its population's privacy, with it: at the budget's δ, or at 10⁻⁵ without a budget.

        Raises:
            PrivacyError: it would pass the `budget`, or the file was damaged since: nothing is written. Or the disk
                fails: then it may or may not count as spent, and the ledger has to be opened again.
        """
        with self._held() as file:
            rounds = 1 if self._adds(entry) else 0
            if budget is None:
                after = self._after(entry.population, entry.mechanism, rounds, _DELTA)
            else:
                after = self.forecast(entry.population, entry.mechanism, rounds, budget)
            line = _line(_entry_document(entry), self._head)
            self._broken = True  # until it is known that the disk has it
            with self._explained("written", "Nothing is let out for this round. Make room or repair the disk."):
                self._append(file, line)
            self._broken = False
            self._take(line)
            return after

    def _append(self, file: int, line: bytes) -> None:
        written = 0
        while written < len(line):
            written += os.write(file, line[written:])
        os.fsync(file)

    def _after(self, population: str, mechanism: Mechanism, rounds: int, delta: float) -> Spent:
        counted = self._counted(population, mechanism.unit)
        counted[mechanism.release] += mechanism.releases * rounds
        return spent(counted, delta)

    @contextmanager
    def _held(self) -> Iterator[int]:
        """The file, open and to ourselves, with all that others wrote to it read and checked."""
        with self._thread:
            if self._broken:
                raise PrivacyError("the disk failed while this was written", where=self.path, hint="Open it again.")
            with self._explained("opened"):
                file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                with self._explained("read"):
                    fcntl.flock(file, fcntl.LOCK_EX)
                    self._catch_up(file)
                yield file
            finally:
                os.close(file)

    @contextmanager
    def _explained(self, what: str, hint: str = "") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PrivacyError(f"cannot be {what}: {error.strerror}", where=self.path, hint=hint) from error

    def _catch_up(self, file: int) -> None:
        size = os.fstat(file).st_size
        if size < self._read:
            raise PrivacyError("is shorter than it was", where=self.path, hint=_MENDING)
        if size == 0:
            sync(self.path.parent)  # the name of a new file is on the disk before anything in it counts
        raw = _read(file, self._read, size)
        *lines, rest = raw.split(b"\n")
        for line in lines:
            self._take(line + b"\n")
        if rest:
            self._mend(file, rest)

    def _mend(self, file: int, rest: bytes) -> None:
        """Finish a last line that lacks but its newline; cut one off that lacks more."""
        try:
            self._checked(rest + b"\n")
        except PrivacyError:
            if not _was_cut_off(rest):
                raise
            os.ftruncate(file, self._read)
            os.fsync(file)
            self.cut += len(rest)
        else:
            self._append(file, b"\n")
            self._take(rest + b"\n")

    def _take(self, line: bytes) -> None:
        entry, self._head = self._checked(line)
        self._read += len(line)
        self._entries.append(entry)
        self._spent[entry.population, entry.mechanism.unit][entry.mechanism.release] += self._adds(entry)
        self._turns[entry.population, entry.run, entry.mechanism.release][entry.turn] += entry.mechanism.releases

    def _adds(self, entry: Entry) -> int:
        """How many releases `entry` adds to what the client of whom most is known has spent."""
        turns = self._turns[entry.population, entry.run, entry.mechanism.release]
        most = max(turns.values(), default=0)
        return max(most, turns[entry.turn] + entry.mechanism.releases) - most

    def _checked(self, line: bytes) -> tuple[Entry, str]:
        """The entry in the next line, and the line's own digest."""
        where = f"{self.path}, line {len(self._entries) + 1}"
        try:
            record = json.loads(line)
            content = record["entry"]
            if line != _line(content, self._head):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise PrivacyError(
                "is not as it was written, or not the line that followed", where=where, hint=_MENDING
            ) from None
        try:
            return _entry(content), record["digest"]
        except PrivacyError as error:
            raise PrivacyError(error.what, where=where, hint=error.hint) from None


_DELTA: Final = 1e-5


def _line(content: Mapping[str, Any], previous: str) -> bytes:
    record = {"entry": content, "previous": previous}
    record["digest"] = hashlib.sha256(_canonical(record)).hexdigest()
    return _canonical(record) + b"\n"


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _entry_document(entry: Entry) -> dict[str, Any]:
    return {
        "time": entry.time,
        "population": entry.population,
        "run": entry.run,
        "round": entry.round,
        "plan": entry.plan,
        "mechanism": document(entry.mechanism),
        "note": entry.note,
        "turn": entry.turn,
    }


def _entry(content: Mapping[str, Any]) -> Entry:
    if not isinstance(content, dict) or set(content) != _ENTRY_KEYS:
        raise PrivacyError("an entry with other keys than this release knows", hint="Update Farfield.")
    return Entry(**{**content, "mechanism": restore(content["mechanism"])})


def _was_cut_off(rest: bytes) -> bool:
    """Whether this can be the beginning of a line, as a crash leaves it: perhaps followed by zeros never written."""
    text = rest.rstrip(b"\0").decode("latin-1")
    if not text.startswith('{"digest":"'[: len(text)]):
        return False
    try:
        json.JSONDecoder().raw_decode(text)
    except ValueError:
        return True
    return False  # something whole that does not hold, or that is followed by what is not its newline


def _read(file: int, start: int, end: int) -> bytes:
    parts = []
    while start < end:
        part = os.pread(file, min(end - start, 1 << 24), start)
        if not part:
            break
        parts.append(part)
        start += len(part)
    return b"".join(parts)
