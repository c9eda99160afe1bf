"""Clients that are short of memory, as processes: one that works by an alternative of the Plan, and one that cannot."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from processes import Federation, Process, federation, result
from toy import FOUR, place, plan, rounding

from farfield.coordinator import plans
from farfield.coordinator.runs import RunFolder
from farfield.coordinator.simulation import Fleet, sources
from farfield.edge_client import fitting
from farfield.edge_client.worker import Worker
from farfield.emulator.bench import Bench
from farfield.emulator.methods import registered
from farfield.protocols.messages import Task, Train
from farfield.protocols.plan import Plan
from farfield.protocols.summing import Part
from farfield.protocols.tensors import State, pack_state

pytestmark = pytest.mark.slow

SMALL, TINY, *ROOMY = FOUR
NF4 = 1
"""The alternative that the small one can work by; the other has a smaller rank, which is not enough."""

LARGER = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "max_position_embeddings": 64,
}  # fmt: skip
"""In float32 its weights are 200 MB, which smaller batches and checkpointing leave as they are."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = place(tmp_path_factory.mktemp("toy"), len(FOUR))
    config = tiny.hf.LlamaConfig(vocab_size=300, bos_token_id=None, eos_token_id=0, pad_token_id=1, **LARGER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        tiny.hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "backbone")
    return folder


@pytest.fixture(scope="module")
def asked(toy: Path) -> Path:
    alternatives = [{"rank": 2}, {"rank": 2, "quantization": "nf4"}]
    return plan(
        toy, rounds=1, steps=2, minimum=3, protection="secagg",
        tuning={"kind": "lora", "rank": 4, "alternatives": alternatives},
        data={"max_length": 64}, training={"batch_size": 8, "learning_rate": 0.1},
    )  # fmt: skip


@pytest.fixture(scope="module")
def limit(toy: Path, asked: Path) -> int:
    """Bytes halfway between the least that the plain backbone takes on this machine, and the least of all."""
    ways = fitting.look_ahead(plans.load(asked), toy / "backbone", None, thorough=True)
    least = {nf4: min(one.memory for one in ways if (one.way.alternative == NF4) == nf4) for nf4 in (False, True)}
    assert least[False] - least[True] > 100_000_000
    return fitting.needed((least[False] + least[True]) // 2)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("federation")) as made:
        made.serve()
        yield made


def test_who_is_short_of_memory_works_by_an_alternative_or_says_what_is_missing(
    running: Federation, toy: Path, asked: Path, limit: int
) -> None:
    clients = {name: running.join(name, toy / "data" / name) for name in ROOMY}
    for name, most in ((SMALL, limit), (TINY, 500_000_000)):
        _allow(running.enrol(name, toy / "data" / name), most)
        clients[name] = running.rejoin(name)

    done = running.finishes(running.submit(asked))
    (round_,) = result(done)["rounds"]
    assert round_["clients"] == 3 and list(round_["problems"]) == [TINY]
    refusal = round_["problems"][TINY]
    least = r"this work takes at least (\d+\.\d) MB of memory, and 500\.0 MB are allowed"
    said = re.search(rf"^refused: consent\.max_memory_bytes = 500,000,000: {least}\. That is with lora", refusal)
    assert said is not None, refusal
    assert 500_000_000 < float(said[1]) * 1e6 < limit
    assert "of rank 2, nf4, batch 1 × 8, checkpointing, frugal" in refusal
    assert "loading the backbone" not in clients[TINY].output

    assert "fits into memory: lora of rank 2, nf4, batch" in clients[SMALL].output
    assert _most_resident(clients[SMALL]) < limit < _most_resident(clients[ROOMY[0]])
    _each_counts(RunFolder.open(done.folder), plans.load(asked), toy)

    # Whoever has looked ahead once does not do so again: not at the next task or run, nor after a restart.
    clients[SMALL].end()
    clients[SMALL] = running.rejoin(SMALL)
    (round_,) = result(running.finishes(running.submit(asked)))["rounds"]
    assert (round_["clients"], round_["problems"]) == (3, {TINY: refusal})
    assert [clients[name].output.count("looking for what fits into memory") for name in FOUR] == [1, 1, 0, 0]
    assert clients[SMALL].output.count("fits into memory: ") == 2
    assert clients[TINY].output.count("refused: ") > 2


def _each_counts(run: RunFolder, plan: Plan, toy: Path) -> None:
    """The round comes to the mean of three changes, of which the small client's is one of two of four ranks."""
    start, after = run.load(0).adapter, run.load(1).adapter
    ways = {SMALL: plan.alternative(NF4, registered()), **dict.fromkeys(ROOMY, plan)}
    parts = {name: _part(plan, way, start, name, toy) for name, way in ways.items()}
    assert {one.shape for one in parts[SMALL].update.values()} == {one.shape for one in start.values()}

    def error(counted: list[Part]) -> float:
        weights = [one.examples / sum(part.examples for part in counted) for one in counted]
        return max(
            float(np.abs(array - start[name] - _mean(counted, weights, name)).max()) for name, array in after.items()
        )

    allowed = 1e-6 + rounding(plan, run, len(FOUR))
    assert error(list(parts.values())) < allowed
    assert error([parts[name] for name in ROOMY]) > 2 * allowed


def _mean(counted: list[Part], weights: list[float], name: str) -> Any:
    return sum(weight * one.update[name] for weight, one in zip(weights, counted, strict=True))


def _part(plan: Plan, way: Plan, start: State, name: str, toy: Path) -> Part:
    """What the client's training comes to, in this process."""
    worker = Fleet(plan, Bench(plan, toy / "backbone", local=way), sources(None, toy / "data")).client(name)
    assert isinstance(worker, Worker)
    task = Task("any", 1, name, plan.digest, work := Train(pack_state(start, plan.delivery.dtype)), len(FOUR))
    part, _ = worker.part(task, work)
    return part


def _allow(home: Path, most: int) -> None:
    """Have the owner allow so many bytes of memory."""
    file = home / "edge-client.toml"
    before = file.read_text()
    assert before.count("\n[consent]\n") == 1
    file.write_text(before.replace("\n[consent]\n", f"\n[consent]\nmax_memory_bytes = {most}\n"))


def _most_resident(client: Process) -> int:
    """Bytes that the process took at its highest."""
    lines = Path(f"/proc/{client.pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
