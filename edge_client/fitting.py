"""Fits a client to its machine: measures it, looks ahead, and chooses; in a process of its own, which leaves no trace.

    python -m farfield.edge_client.fitting < QUESTION > ANSWER

What is loaded to look ahead would stay in the memory that is being counted.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from farfield.protocols import errors
from farfield.protocols.errors import DeviceError, FarfieldError
from farfield.protocols.plan import Plan
from farfield.protocols.terminal import size

from .consent import PROGRAM_BYTES

if TYPE_CHECKING:
    from .choice import Fit


@dataclass(frozen=True, slots=True)
class Choice:
    """What a client works by, and why.

    Attributes:
        plan: the promised one with the way put in.
        table: what was looked at, in the order in which it is tried.
        chosen: the first of them that fits.
    """

    plan: Plan
    table: tuple[Fit, ...]
    chosen: Fit


def choose(
    plan: Plan, folder: Path, most: int | None, allowed: Collection[str] = (), *, thorough: bool = False
) -> Choice:
    """The first way to work by `plan` that fits.

    Args:
        folder: of the backbone or the emulator.
        most: bytes of resident memory that the client may take; None is no limit.
        allowed: tuning methods that the owner of the data consents to; empty is any.
        thorough: put all ways into the table, those after the choice too.

    Raises:
        DeviceError: none fits; says what the least would be.
        BackboneError, TuningError, EmulatorError: the Plan does not fit the backbone.
    """
    return first(plan, look_ahead(plan, folder, most, allowed, thorough=thorough), most)


def first(plan: Plan, table: tuple[Fit, ...], most: int | None) -> Choice:
    """The first of `table` that fits. Raises DeviceError where none does, which says what the least would be."""
    chosen = next((one for one in table if one.fits), None)
    if chosen is None:
        raise nothing_fits(plan, table, most)
    return Choice(chosen.way.plan(plan), table, chosen)


def ample(plan: Plan, folder: Path) -> int:
    """Bytes that are enough for the Plan as it is, whatever its method; with as much, nobody need look ahead.

    Activations by Korthikanti et al. 2022, equation 2, doubled for what a method adds; the states of full tuning; all
    logits at once; and a heap with holes.
    """
    from farfield.emulator import backbone

    from .choice import in_heap

    config, _ = backbone.model_class(folder, task=plan.model.task, labels=plan.model.labels)
    inner: Any = config.get_text_config()
    sizes = [getattr(inner, key, None) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")]
    if not all(isinstance(one, int) for one in sizes):
        return sys.maxsize
    width, heads, depth = cast("list[int]", sizes)
    words = getattr(inner, "vocab_size", 0)
    length, wide = plan.data.max_length, 2 if plan.model.dtype == "float32" else 1
    tokens = length * max(plan.training.batch_size, plan.evaluation.batch_size)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    activations = 2 * wide * tokens * depth * (34 * width + 5 * heads * length)
    return PROGRAM_BYTES + in_heap(12 * wide * weights + activations + 12 * tokens * words)


def look_ahead(
    plan: Plan, folder: Path, most: int | None, allowed: Collection[str] = (), *, thorough: bool = False
) -> tuple[Fit, ...]:
    """The ways that `choose` looks at. Raises as it does, but where nothing fits."""
    from .choice import Fit, Way

    question = {
        "plan": plan.canonical().decode(),
        "folder": str(folder),
        "most": most,
        "allowed": sorted(allowed),
        "thorough": thorough,
    }
    done = subprocess.run(  # noqa: S603 - our own module
        [sys.executable, "-m", __name__], input=json.dumps(question), capture_output=True, text=True, check=False
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise DeviceError(f"what training takes of this machine could not be found out: {said}") from None
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["what"], where=answer["where"], hint=answer["hint"])
    return tuple(Fit(**{**one, "way": Way(**one["way"])}) for one in answer["table"])


def nothing_fits(plan: Plan, table: tuple[Fit, ...], most: int | None) -> DeviceError:
    """Says what the least would be."""
    if not table:
        return DeviceError("none of the tuning methods that the Plan allows is allowed here")
    least = min(table, key=lambda one: one.memory)
    allowed = "" if most is None else f", and {size(most)} are allowed"
    return DeviceError(
        f"this work takes at least {size(needed(least.memory))} of memory{allowed}",
        hint=f"That is with {named(least, plan)}.",
    )


def needed(memory: int) -> int:
    """The limit under which so much fits."""
    from .choice import MARGIN

    return round(memory / (1 - MARGIN))


def share() -> str:
    """What is left free, as a person reads it."""
    from .choice import MARGIN

    return f"{MARGIN:.0%}"


def named(fit: Fit, plan: Plan) -> str:
    """A way in a few words: "ia3, 2 × 4, checkpointing"."""
    way, local = fit.way, fit.way.plan(plan)
    parts = [local.tuning.kind, f"batch {way.batch_size} × {way.gradient_accumulation}"]
    if way.alternative is not None:
        rank = getattr(local.tuning, "rank", None)
        parts[0] += f" of rank {rank}" if rank is not None and rank != getattr(plan.tuning, "rank", None) else ""
        if local.model.quantization != plan.model.quantization:
            parts.insert(1, local.model.quantization)
    if way.checkpointing:
        parts.append("checkpointing")
    if way.frugal:
        parts.append("frugal")
    return ", ".join(parts)


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    from farfield.emulator import methods
    from farfield.protocols import plan as plans

    from .choice import fits
    from .probe import probe

    try:
        plan = plans.restore(question["plan"].encode(), methods.registered())
        device, table = probe(plan.model.dtype), []
        for one in fits(plan, Path(question["folder"]), device, question["most"], question["allowed"]):
            table.append(asdict(one))
            if one.fits and not question["thorough"]:
                break
    except FarfieldError as error:
        return {"error": type(error).__name__, "what": error.what, "where": error.where, "hint": error.hint}
    return {"table": table}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # what libraries have to say
        answer = _answer(json.load(sys.stdin))
    print(json.dumps(answer))
