"""What a quantised backbone costs and saves: loss, bytes, memory and time of the quickstart's federation.

    python benchmarks/quantised.py WORK [--rounds N] [--write FILE]

The Plan is `examples/quickstart.toml`, with eight clients, `model.quantization` as the row says, and in the last row
`tuning.initial = "loftq"`. Each row is a process of its own. WORK keeps what was measured: the same command goes on
where it stopped. Given are the loss on what the clients held out, before and after, in nats per token; the share of the
full-precision run's improvement that is lost, counted from the loss of the backbone as it is; the bytes of the weights
as they are held; the largest resident memory of the process; the time of a round's training and evaluation. For 4 and
8 bits also ‖W - Q‖ / ‖W‖ over all matrices, and with LoftQ what is left of it, ‖W - (Q + s·B·A)‖ / ‖W‖.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Final

import tomli_w
import torch
import typer
from rich.console import Console

from farfield.coordinator import plans
from farfield.coordinator.console import SimulationConsole
from farfield.coordinator.runs import RunFolder
from farfield.coordinator.simulate import Request, simulate
from farfield.emulator import backbone
from farfield.emulator.architecture import describe
from farfield.emulator.bench import Bench
from farfield.protocols.errors import FarfieldError

CLIENTS: Final = 8
PLAN: Final = Path(__file__).parent.parent / "examples" / "quickstart.toml"
BEGIN, END = "<!-- quantised -->", "<!-- /quantised -->"

CASES: Final[Mapping[str, tuple[str, str]]] = {
    "none": ("none", "zero"),
    "nf4": ("nf4", "zero"),
    "int8": ("int8", "zero"),
    "nf4 and LoftQ": ("nf4", "loftq"),
}
"""By the name of a row, what the backbone is held in, and how LoRA begins."""


@dataclass(frozen=True, slots=True)
class Row:
    """One federation. `rounded` and `left` are relative errors of the matrices, without and with the adapter."""

    name: str
    before: float
    after: float
    bytes_held: int
    peak: int
    seconds: float
    rounded: float
    left: float

    def cells(self, whole: Row) -> str:
        lost = (self.after - whole.after) / (whole.before - whole.after)
        return (
            f"| {self.name} | {self.before:.4f} | {self.after:.4f} | {lost:.2%} | {self.bytes_held / 1e6:.2f} | "
            f"{self.peak / 1e6:.0f} | {self.seconds:.1f} | {self.rounded:.4f} | {self.left:.4f} |"
        )


def errors(bench: Bench, folder: Path) -> tuple[float, float]:
    """‖W - Q‖ and ‖W - (Q + s·B·A)‖, each over ‖W‖, of all matrices of the blocks together."""
    plan = bench.plan
    whole = backbone.load_model(folder, task=plan.model.task, dtype=plan.model.dtype)
    bench.adapter()  # which is where its initial values are made

    def squares() -> Iterator[tuple[float, float, float]]:
        for linear in describe(whole).linears:
            weight: Any = whole.get_submodule(linear.path).weight
            layer: Any = bench.tuned.model.get_submodule(f"base_model.model.{linear.path}")
            a, b = layer.lora_A["default"].weight.float(), layer.lora_B["default"].weight.float()
            lost = weight.float() - layer.get_base_layer().weight.float()
            left = lost - layer.scaling["default"] * b @ a
            yield tuple(float(one.square().sum()) for one in (weight.float(), lost, left))  # type: ignore[misc]

    with torch.no_grad():
        total, lost, left = (sum(column) for column in zip(*squares(), strict=True))
    return math.sqrt(lost / total), math.sqrt(left / total)


def measured(work: Path, name: str, rounds: int | None) -> Row:
    """The row, measured in this process."""
    quantization, initial = CASES[name]
    document = tomllib.loads(PLAN.read_text(encoding="utf-8"))
    document["model"]["quantization"] = quantization
    document["tuning"]["initial"] = initial
    if rounds is not None:
        document["training"]["rounds"] = rounds
    path = work / f"{name.replace(' ', '-')}.toml"
    path.write_text(tomli_w.dumps(document), encoding="utf-8")
    console = SimulationConsole(Console(stderr=True))
    with console:
        folder = RunFolder.open(simulate(Request(path, CLIENTS, None, work / "runs"), console).folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    records = [folder.load(number).record for number in folder.rounds()]
    first, last = records[0].eval_loss, records[-1].eval_loss
    assert first is not None
    assert last is not None
    seconds = sorted(one.seconds for one in records[1:])[len(records[1:]) // 2]
    bench = Bench(plans.parse(folder.plan_text), Path(folder.info.backbone))
    # Without those of the adapter.
    held = [*bench.tuned.model.buffers(), *(one for one in bench.tuned.model.parameters() if not one.requires_grad)]
    rounded, left = errors(bench, Path(folder.info.backbone))
    return Row(name, first, last, sum(one.nbytes for one in held), peak, seconds, rounded, left)


def kept(work: Path, name: str, rounds: int | None) -> Row:
    """The row, of a process of its own or of one that has measured it before."""
    file = work / f"{name.replace(' ', '-')}.json"
    if not file.exists():
        limit = [] if rounds is None else ["--rounds", str(rounds)]
        subprocess.run([sys.executable, __file__, str(work), "--one", name, *limit], check=True)  # noqa: S603 - this file
    return Row(**json.loads(file.read_text(encoding="utf-8")))


def main(
    work: Annotated[Path, typer.Argument(help="Keeps what was measured.")],
    rounds: Annotated[int | None, typer.Option(help="Fewer rounds than the quickstart's.")] = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
    write: Annotated[Path | None, typer.Option(help="Put the table into this file.")] = None,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    if one is not None:
        row = json.dumps(asdict(measured(work, one, rounds)))
        (work / f"{one.replace(' ', '-')}.json").write_text(row, encoding="utf-8")
        return
    rows = [kept(work, name, rounds) for name in CASES]
    machine = f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    lines = [
        f"{machine}; the quickstart's federation" + (f" with {rounds} rounds." if rounds else "."),
        "",
        "| backbone | loss before | loss after | improvement lost | MB of weights | peak MB of the process "
        "| seconds of a round | matrices off by | with the adapter's start |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row.cells(rows[0]) for row in rows),
    ]
    print("\n".join(lines))
    if write is not None:
        text = write.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, found, after = rest.partition(END)
        if not found:
            sys.exit(f"error: {write} has no {BEGIN} … {END}")
        write.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    try:
        typer.run(main)
    except FarfieldError as error:
        sys.exit(f"error: {error}")
