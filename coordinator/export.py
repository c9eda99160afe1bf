"""A finished run as files that other programs read: an adapter in `peft`'s format, or a merged Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from farfield.emulator import backbone
from farfield.emulator.bundle import OWNER_ONLY
from farfield.protocols.errors import RunError, TuningError

from . import plans
from .runs import RunFolder, writing


def export(run: Path, out: Path, *, merged: bool, client: str | None = None) -> int:
    """Write the adapter after the run's last finished round to `out`, and return that round's number.

    Where each client keeps a part of the adapter for itself, `client` says whose is meant; only a simulation has them.

    With `merged`, `out` becomes a model folder with the adapter folded into the backbone, in the Plan's dtype, with the
    tokenizer beside it.

    Raises:
        RunError: `run` is no run, has no finished round, its backbone is not what it was, or `out` cannot be written.
        TuningError: the tuning method has nothing to fold in; or each client has an adapter of its own and `client` is
            missing, or all share one and it is not.
    """
    folder = RunFolder.open(run)
    info = folder.info
    plan = plans.parse(folder.plan_text, where=folder.path / "plan.toml")
    finished = folder.rounds()
    if not finished or not finished[-1]:
        raise RunError("no round has been finished yet", where=folder.path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError("exists and is not empty", where=out, hint="Give a new folder.")
    model_folder = Path(info.backbone)
    backbone.check(model_folder)
    if backbone.fingerprint(model_folder) != info.backbone_fingerprint:
        raise RunError("the backbone has changed since this run", where=model_folder)

    from farfield.emulator.bench import Bench

    from .simulation import kept_by

    bench = Bench(plan, model_folder, plain=merged)
    own = kept_by(folder, client, finished[-1]) if bench.own() else None
    if client is not None and not bench.own():
        raise TuningError("all clients share one adapter", where=folder.path, hint="Leave --client out.")
    bench.load(folder.load(finished[-1]).adapter, own)
    with writing(out), backbone.silent_transformers():
        if merged:
            bench.merged().save_pretrained(out)
            bench.tokenizer.save_pretrained(out)
            if (model_folder / OWNER_ONLY).exists():  # what holds the backbone is as much its owner's
                (out / OWNER_ONLY).touch()
        else:
            bench.method.save(bench.tuned, out)
    return finished[-1]
