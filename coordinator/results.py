"""What a finished run came to, and the files that say so."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farfield.protocols.errors import RunError
from farfield.protocols.tensors import digest

from .runs import Checkpoint, RoundRecord, RunFolder, writing

if TYPE_CHECKING:
    from farfield.emulator.bench import Bench

    from .baseline import Centralised, Offsite

_NOT_READ = frozenset({"folder", "rounds", "centralised", "offsite"})


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run. Losses are in nats per target on the clients' held-out examples."""

    run: str
    folder: Path
    plan_digest: str
    adapter_digest: str
    clients: int
    eval_loss_before: float | None
    eval_loss_after: float | None
    rounds: list[RoundRecord]
    centralised: Centralised | None
    offsite: Offsite | None
    seconds: float

    @classmethod
    def read(cls, folder: RunFolder) -> Result:
        """The result of a finished run, from its files. Raises RunError when they are damaged or missing."""
        path = folder.path / "result.json"
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            known = {key: document[key] for key in cls.__slots__ if key not in _NOT_READ}
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"cannot be read: {error}", where=path) from None
        return cls(**known, folder=folder.path, rounds=folder.records(), centralised=None, offsite=None)

    def document(self) -> dict[str, Any]:
        """The result as JSON-ready values; `rounds` leaves out the evaluation before the first round."""
        return asdict(self) | {
            "folder": str(self.folder),
            "adapter": str(adapter) if (adapter := self.folder / "adapter").exists() else None,
            "rounds": [asdict(record) for record in self.rounds if record.round],
        }


def save_adapter(folder: RunFolder, bench: Bench, last: Checkpoint) -> None:
    """Write the final adapter in its method's format, where all clients share it.

    Where each keeps a part of its own there is none to write: what they share changes nothing by itself.

    Raises:
        RunError: the disk refuses.
    """
    if bench.own():
        return
    bench.load(last.adapter)
    with writing(folder.adapter_folder):
        bench.method.save(bench.tuned, folder.adapter_folder)


def conclude(
    folder: RunFolder,
    last: Checkpoint,
    clients: int,
    seconds: float,
    centralised: Centralised | None = None,
    offsite: Offsite | None = None,
) -> Result:
    """The run's result, also written as `result.json` and `loss.png`. Raises RunError when the disk refuses."""
    records = folder.records()
    result = Result(
        run=folder.info.run,
        folder=folder.path,
        plan_digest=folder.info.plan_digest,
        adapter_digest=digest(last.adapter),
        clients=clients,
        eval_loss_before=records[0].eval_loss,
        eval_loss_after=records[-1].eval_loss,
        rounds=records,
        centralised=centralised,
        offsite=offsite,
        seconds=seconds,
    )
    folder.write_json("result.json", result.document())

    from .plot import plot_losses

    with writing(folder.path):
        plot_losses(result, folder.path / "loss.png")
    return result
