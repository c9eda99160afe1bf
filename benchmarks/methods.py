"""What each tuning method learns: its loss beside LoRA's, at equal steps and at equal wall time.

    python benchmarks/methods.py WORK [--only KIND …] [--write FILE]

The builtin backbone and eight clients with prose of the standard library, four in each round. WORK keeps what was
measured: the same command goes on where it stopped.

Each method gets one learning rate, the best of those in `RATES` after half of LoRA's rounds. Then it trains as many
steps as LoRA, and once more for as long as LoRA took, by the clock of its own rounds, without their evaluations. What
is compared is the loss on what the clients held out, in nats per token. A method that learns nothing fails the
benchmark.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Final

import tomli_w
import torch
import typer
from rich.console import Console

from farfield.coordinator.console import SimulationConsole
from farfield.coordinator.runs import RunFolder
from farfield.coordinator.simulate import Request, simulate
from farfield.emulator.methods import registered
from farfield.protocols.errors import FarfieldError

CLIENTS: Final = 8
ROUNDS: Final = 6
BEGIN, END = "<!-- methods -->", "<!-- /methods -->"

PLAN: Final[Mapping[str, Mapping[str, Any]]] = {
    "model": {"backbone": "builtin:tiny-llama-py"},
    "data": {"max_length": 128},
    "training": {"steps": 5, "batch_size": 8, "schedule": "linear", "seed": 3},
    "cohort": {"size": 4},
    "protection": {"kind": "sealed"},
    "evaluation": {"examples": 64},
}

USUAL: Final = (3e-3, 1e-2)
SCALES: Final = (3e-2, 1e-1)
"""Rates for what starts at one, or at zero, and has few values."""

RATES: Final[Mapping[str, Sequence[float]]] = {
    "full": (3e-4, 1e-3),
    "galore": (3e-3, 1e-2),
    "ia3": SCALES,
    "ssf": (1e-2, 3e-2),
    "bitfit": (1e-2, 3e-2),
    "vera": SCALES,
    "prompt-tuning": (1e-1, 3e-1),
    "p-tuning": (1e-2, 3e-2),
    "prefix-tuning": SCALES,
    "lora-fa": (1e-2, 3e-2),
    "mezo": (3e-4, 1e-3),
    "fedkseed": (3e-4, 1e-3),
}

SLOPES: Final = {"optimizer": "sgd", "max_grad_norm": 5.0}
"""How methods without gradients go: a slope along a random direction is about as large as the gradient's norm."""

SETTINGS: Final[Mapping[str, Mapping[str, Any]]] = {"adalora": {"initial_rank": 12, "target_rank": 8}}


@dataclass(frozen=True, slots=True)
class Row:
    """One method: the loss before, after LoRA's steps, and after LoRA's time; seconds and bytes up of one round."""

    kind: str
    rate: float
    trained: int
    before: float
    after: float
    seconds: float
    rounds_in_time: int
    in_time: float
    bytes_up: float

    def gained(self, loss: float, lora: Row) -> float:
        """The share of LoRA's improvement of the backbone that getting to `loss` is; a prompt that is new harms it."""
        return (lora.before - loss) / (lora.before - lora.after)

    def cells(self, lora: Row) -> str:
        return (
            f"| {self.kind} | {self.trained:,} | {self.rate:g} | {self.seconds / lora.seconds:.2f} | "
            f"{self.bytes_up / 1e3:,.1f} | {self.after:.4f} | {self.gained(self.after, lora):.0%} | "
            f"{self.rounds_in_time} | {self.in_time:.4f} | {self.gained(self.in_time, lora):.0%} |"
        )


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished simulation: losses before and after, seconds and bytes up of a round without evaluation."""

    before: float
    after: float
    seconds: float
    bytes_up: float
    values: int


def trained(work: Path, kind: str, rate: float, rounds: int) -> Trained:
    """The simulation of so many rounds, or what is kept of it."""
    stem = f"{kind}-{rate:g}-{rounds}"
    kept = work / f"{stem}.json"
    if kept.exists():
        return Trained(**json.loads(kept.read_text(encoding="utf-8")))
    by_gradient = registered()[kind].model_validate({"kind": kind}).by_gradient
    training = {**PLAN["training"], "rounds": rounds, "learning_rate": rate, **({} if by_gradient else SLOPES)}
    plan = {
        **PLAN,
        "tuning": {"kind": kind, **SETTINGS.get(kind, {})},
        "training": training,
        "evaluation": {**PLAN["evaluation"], "every": rounds},
    }
    path = work / f"{stem}.toml"
    path.write_text(tomli_w.dumps(plan), encoding="utf-8")
    console = SimulationConsole(Console(stderr=True))
    with console:
        folder = RunFolder.open(simulate(Request(path, CLIENTS, None, work / "runs"), console).folder)
    records = [folder.load(number).record for number in range(rounds + 1)]
    first, last = records[0].eval_loss, records[-1].eval_loss
    assert first is not None
    assert last is not None
    # The last round is the one that is evaluated too.
    plain = records[1:-1] or records[1:]
    result = Trained(
        first,
        last,
        sum(one.seconds for one in plain) / len(plain),
        sum(one.bytes_up for one in plain) / len(plain),
        sum(array.size for array in folder.load(rounds).adapter.values()),
    )
    kept.write_text(json.dumps(asdict(result)), encoding="utf-8")
    return result


def best_rate(work: Path, kind: str) -> float:
    """Of the rates for this method the one that has come furthest after half of the rounds."""
    found: dict[float, float] = {}
    for rate in RATES.get(kind, USUAL):
        try:
            found[rate] = trained(work, kind, rate, ROUNDS // 2).after
        except FarfieldError as error:  # a rate too high for it, which is an answer as well
            print(f"{kind} at {rate:g}: {error}", file=sys.stderr)
    if not found:
        raise FarfieldError(f"{kind!r} trains at none of its rates", hint="Give it lower ones in RATES.")
    return min(found, key=lambda rate: found[rate])


def measured(work: Path, kind: str, lora_seconds: float | None) -> Row:
    """The method's row; `lora_seconds` are those of a round of LoRA, None where this is LoRA."""
    rate = best_rate(work, kind)
    steps = trained(work, kind, rate, ROUNDS)
    rounds = ROUNDS if lora_seconds is None else max(1, round(ROUNDS * lora_seconds / steps.seconds))
    time = trained(work, kind, rate, rounds)
    return Row(kind, rate, steps.values, steps.before, steps.after, steps.seconds, rounds, time.after, steps.bytes_up)


def main(
    work: Annotated[Path, typer.Argument(help="Keeps what was measured.")],
    only: Annotated[list[str] | None, typer.Option(help="This method and LoRA; may be given again.")] = None,
    write: Annotated[Path | None, typer.Option(help="Put the table into this file.")] = None,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    lora = measured(work, "lora", None)
    kinds = only or [kind for kind in sorted(registered()) if kind != "lora"]
    rows = [lora, *(measured(work, kind, lora.seconds) for kind in kinds if kind != "lora")]
    rows.sort(key=lambda row: row.after)
    machine = f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [
        f"{machine}; loss before {lora.before:.4f}; {ROUNDS} rounds, 4 clients in each, 5 steps of 8 texts.",
        "",
        "| method | values trained | rate | time of a round, of LoRA's | kB up in a round | loss at equal steps "
        "| of LoRA's gain | rounds in LoRA's time | loss at equal time | of LoRA's gain |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(row.cells(lora) for row in rows),
    ]
    print("\n".join(lines))
    if write is not None:
        text = write.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, found, after = rest.partition(END)
        if not found:
            sys.exit(f"error: {write} has no {BEGIN} … {END}")
        write.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")
    idle = [row.kind for row in rows if row.after > min(row.before, lora.before) - 0.001]
    if idle:
        sys.exit(f"these learnt nothing: {', '.join(idle)}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except FarfieldError as error:
        sys.exit(f"error: {error}")
