"""Run folders: everything that a run leaves on disk, written so that it can be killed at any moment.

    RUN/
        plan.toml                     the Plan as it was given
        run.json                      digests, the backbone's folder, and the options outside the Plan
        checkpoints/round-0007.safetensors    adapter, server-optimiser state and the round's record
        metrics.jsonl                 one record a round
        local/CLIENT/                 what each simulated client keeps of its adapter for itself
        text.safetensors              the owner's own text, where an emulator is shipped
        emulator/                     the emulator that was made for this run, where it was not given
        emulators/round-0004/         one that was distilled anew after that round
        adapter/                      the final adapter in peft's format, where all clients share it
        loss.png  result.json

A checkpoint is written beside its name and then moved there, so it is whole or absent; it carries the round's record,
so `metrics.jsonl` can be made again from the checkpoints and never disagrees with them.
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from farfield.protocols.durable import write
from farfield.protocols.errors import RunError
from farfield.protocols.tensors import State

from .bounds import Bounds
from .server_optimizer import Moments


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What one round did: a line of `metrics.jsonl`.

    Losses are in nats per target; `bytes_*` count encoded messages as the coordinator sends and receives them;
    `clients` is how many updates were counted (0: the round changed nothing); `problems` says by node what went wrong;
    `clipping_norm` is the norm to which whole updates were clipped, where they were. `emulator_loss` and
    `plug_in_loss` are those of the adapter on the emulator and in the backbone, on the owner's own text. `lost` is the
    share of the combined change that no adapter of the Plan's rank can hold, where the aggregation rule measures it.
    """

    round: int
    clients: int
    train_loss: float | None
    eval_loss: float | None
    eval_accuracy: float | None
    bytes_down: int
    bytes_up: int
    seconds: float
    steps: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    clipping_norm: float | None = None
    emulator_loss: float | None = None
    plug_in_loss: float | None = None
    lost: float | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state after a round; round 0 is the state before the first."""

    record: RoundRecord
    adapter: State
    moments: Moments
    bounds: Bounds = field(default_factory=Bounds)


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a run is, besides its Plan: enough to go on with it, or to export it, from the folder alone.

    `clients` and what follows it are for simulations; a run over real clients has None, and takes those that are there.
    `emulator` is the folder of the emulator with which the run began, where it ships one. With `mixed` the simulated
    clients take the Plan's own way to tune and its alternatives in turn.
    """

    run: str
    plan_digest: str
    backbone: str
    backbone_fingerprint: str
    clients: int | None = None
    data: str | None = None
    dropout: float = 0.0
    stragglers: float = 0.0
    emulator: str | None = None
    mixed: bool = False


class RunFolder:
    """One run's folder, held by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, info: RunInfo, plan_text: str) -> RunFolder:
        """Make the folder. Raises RunError when it exists or cannot be written."""
        with writing(path):
            path.mkdir(parents=True)
            (path / "checkpoints").mkdir()
            (path / "plan.toml").write_text(plan_text, encoding="utf-8")
            _write(path / "run.json", json.dumps(asdict(info), indent=2).encode())
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The existing folder at `path`. Raises RunError when there is none."""
        if not (path / "run.json").is_file():
            raise RunError(
                "not a run folder", where=path, hint="A run folder holds run.json; `ls` its parent for others."
            )
        return cls(path)

    @property
    def info(self) -> RunInfo:
        try:
            return RunInfo(**json.loads((self.path / "run.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RunError(f"damaged: {error}", where=self.path / "run.json") from None

    @property
    def plan_text(self) -> str:
        with _reading(self.path / "plan.toml"):
            return (self.path / "plan.toml").read_text(encoding="utf-8")

    @property
    def adapter_folder(self) -> Path:
        return self.path / "adapter"

    @property
    def text(self) -> Path:
        return self.path / "text.safetensors"

    @property
    def emulator_folder(self) -> Path:
        return self.path / "emulator"

    @property
    def emulators_folder(self) -> Path:
        return self.path / "emulators"

    @property
    def local_folder(self) -> Path:
        return self.path / "local"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from working on this run; released by the system when this process ends, even if killed.

        Raises:
            RunError: another process holds it.
        """
        with writing(self.path):
            lock = (self.path / "lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError("another process is working on this run", where=self.path) from None
            yield

    @property
    def is_held(self) -> bool:
        """Whether some process works on this run now."""
        try:
            with (self.path / "lock").open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # nobody ever held it
            return False
        return False

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the checkpoint, then its line in metrics.jsonl."""
        arrays = {
            f"{group}/{name}": array for group, state in _groups(checkpoint).items() for name, array in state.items()
        }
        number = checkpoint.record.round
        with writing(self.path):
            metadata = {"record": asdict(checkpoint.record), "bounds": asdict(checkpoint.bounds)}
            raw = save(arrays, metadata={key: json.dumps(value) for key, value in metadata.items()})
            _write(self._checkpoint(number), raw)
            if number:
                with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as metrics:
                    metrics.write(json.dumps(asdict(checkpoint.record)) + "\n")

    def load(self, number: int) -> Checkpoint:
        """The checkpoint of round `number`. Raises RunError when it is missing or damaged."""
        path = self._checkpoint(number)
        groups: dict[str, State] = {"adapter": {}, "first": {}, "second": {}}
        with _reading(path), safe_open(path, "numpy") as file:
            record = RoundRecord(**json.loads(file.metadata()["record"]))
            bounds = Bounds(**json.loads(file.metadata()["bounds"]))
            for key in file.keys():  # noqa: SIM118 - not a mapping
                group, _, name = key.partition("/")
                groups[group][name] = file.get_tensor(key)
        return Checkpoint(record, groups["adapter"], Moments(groups["first"], groups["second"]), bounds)

    def rounds(self) -> list[int]:
        """Numbers of the rounds that have a checkpoint: 0, 1, … Raises RunError when one between others is missing."""
        folder = self.path / "checkpoints"
        with _reading(folder):
            names = [path.name for path in folder.iterdir()]
        found = (re.fullmatch(r"round-(\d+)\.safetensors", name) for name in names)
        numbers = sorted(int(match[1]) for match in found if match)
        for expected, number in enumerate(numbers):
            if number != expected:
                raise RunError(
                    f"the checkpoint of round {expected} is missing",
                    where=folder,
                    hint="Put it back, or remove all later ones to go on from the round before.",
                )
        return numbers

    def records(self) -> list[RoundRecord]:
        """The records of all finished rounds, from the checkpoints. Raises RunError when one is damaged."""
        found = []
        for number in self.rounds():
            path = self._checkpoint(number)
            with _reading(path), safe_open(path, "numpy") as file:
                found.append(RoundRecord(**json.loads(file.metadata()["record"])))
        return found

    def resume(self) -> Checkpoint | None:
        """The last checkpoint, with metrics.jsonl made to agree; None when the run died before it wrote one."""
        numbers = self.rounds()
        if not numbers:
            return None
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in self.records() if record.round)
        with writing(self.path):
            _write(self.path / "metrics.jsonl", lines.encode())
        return self.load(numbers[-1])

    def write_json(self, name: str, value: Any) -> None:
        with writing(self.path):
            _write(self.path / name, (json.dumps(value, indent=2) + "\n").encode())

    def _checkpoint(self, number: int) -> Path:
        return self.path / "checkpoints" / f"round-{number:04d}.safetensors"


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn what the disk refuses into a RunError that says what to do."""
    try:
        yield
    except FileExistsError:
        raise RunError("exists already", where=where, hint="Give another place, or remove it.") from None
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise RunError(
            f"cannot be written: {reason}",
            where=getattr(error, "filename", None) or where,
            hint="Make room or choose another disk; finished rounds are kept.",
        ) from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"cannot be read: {error}", where=path, hint="Remove it to go on from an earlier round."
        ) from None


def _groups(checkpoint: Checkpoint) -> dict[str, State]:
    return {"adapter": checkpoint.adapter, "first": checkpoint.moments.first, "second": checkpoint.moments.second}


def _write(path: Path, raw: bytes) -> None:
    """Put `raw` at `path`, whole or not at all, and on the disk before returning."""
    with writing(path):
        write(path, raw)
