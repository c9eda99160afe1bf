"""What cannot be counted and is measured: what the program takes of this machine's memory, and how fast it is."""

from __future__ import annotations

import importlib
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from farfield.emulator import backbone, methods
from farfield.protocols import plan as plans

from .device import most_resident, save_memory

_PLAN: Final = """
    [model]
    backbone = "builtin:tiny-llama-py"
    [data]
    max_length = 32
    [tuning]
    kind = "lora"
    [training]
    rounds = 1
    steps = 1
    batch_size = 1
    [protection]
    kind = "none"
"""

_LARGE: Final = 8_000_000
"""Values of a tensor that no cache holds."""


@dataclass(frozen=True, slots=True)
class Device:
    """What one machine is like.

    Attributes:
        program: bytes of the client with all that it imports, after a step of training, without tensors of a model.
        flops: of matrix products in a second.
        moved: bytes that other operations read and write in a second.
        fresh: bytes of new pages in a second.
    """

    program: int
    flops: float
    moved: float
    fresh: float


def probe(dtype: str) -> Device:
    """Measure this machine, in a process that does nothing else, for a few seconds.

    Args:
        dtype: number format of the model that is to be trained.
    """
    save_memory(True)
    importlib.import_module("farfield.edge_client.resident")  # Flower and gRPC, which a client has loaded as well
    _small_step()
    program = most_resident()
    number_format = getattr(torch, dtype)
    left, right = (torch.randn(side, 1024).to(number_format) for side in (2048, 1024))
    flops = 2 * 2048 * 1024 * 1024 / _seconds(lambda: left @ right.T)
    one, other = torch.ones(_LARGE), torch.ones(_LARGE)
    moved = 3 * one.nbytes / _seconds(lambda: one.add_(other))
    fresh = one.nbytes / max(_seconds(lambda: torch.empty_like(one).fill_(1.0)) - one.nbytes / moved, 1e-4)
    return Device(program, flops, moved, fresh)


def _small_step() -> None:
    """Train a moment, so that all is loaded and compiled which is only loaded and compiled when it is needed."""
    from farfield.emulator.bench import Bench

    from .data import TokenExample
    from .train import train

    plan = plans.parse(_PLAN, methods.registered(), None)
    bench = Bench(plan, backbone.resolve(plan.model.backbone, Path()))
    ids = array("i", range(32))
    train(
        bench.tuned,
        bench.adapter(),
        [TokenExample(ids, ids)],
        plan.training,
        pad_id=bench.pad_id,
        seed=0,
        steps=1,
        first_step=0,
        horizon=1,
    )


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of a few times."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
