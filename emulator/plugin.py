"""Plugging in: what was tuned on an emulator, in the backbone for which it was meant.

An adapter has the backbone's names whatever it was tuned on, so plugging it in is loading it. What stands here is the
owner's view of both, and a new emulator for an adapter that has moved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from farfield.protocols.plan import Plan
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import State

from .assemble import with_middle
from .bench import Bench, loaded
from .build import JUDGED, WORKSHOP, Progress, distilled, judged, write
from .layout import read
from .objective import mean_loss
from .quantise import dequantised, quantised
from .text import PublicText


def measure(benches: Iterable[Bench], adapter: State, own: PublicText) -> list[float]:
    """Loss of `adapter` at each bench, in nats per token of the owner's own text. One bench is asked for at a time.

    Raises:
        MalformedMessage: the adapter does not fit.
    """
    losses = []
    for bench in benches:
        bench.load(adapter)
        losses.append(mean_loss(bench.tuned.model, judged(own.held_out, bench.plan.evaluation.batch_size, JUDGED)))
    return losses


def redistilled(
    plan: Plan,
    backbone: Path,
    emulator: Path,
    adapter: State,
    number: int,
    public: PublicText,
    out: Path,
    progress: Progress,
) -> None:
    """Distil the stand-in of `emulator` anew, from the backbone with `adapter` in it, and write the emulator to `out`.

    The stand-in learns what the middle does to the stream that the adapter makes now. The tuned blocks are shipped as
    they were: what is added to them is the adapter, which every client gets anyway. A distillation that was begun in
    `out` is gone on with.

    Args:
        number: the round after which the adapter is as it is.

    Raises:
        TuningError: the method has nothing that could be folded into the backbone.
        BundleError: the disk refuses.
    """
    record = read(emulator)
    workshop = out / WORKSHOP
    workshop.mkdir(parents=True, exist_ok=True)
    teaching, learning = Bench(plan, backbone, plain=True), Bench(plan, emulator, plain=True)
    for bench in (teaching, learning):
        bench.load(adapter)
    teacher, student = teaching.merged(), learning.merged()
    layout, number_format = record.layout, record.layout.quantization
    if number_format == "nf4":
        student, layout = dequantised(student, layout)
    seed = derive(plan.training.seed, "redistillation", number)
    checkpoint = workshop / "distillation-0.safetensors"
    checks = distilled(plan, teacher, student, layout, public, checkpoint, progress, seed=seed)
    if number_format == "nf4":
        student, layout = quantised(student, layout)
    # With the tuned blocks as they are without the adapter.
    untuned, _, _ = loaded(plan, emulator, learning.device, plain=True)
    write(
        with_middle(untuned, student, layout),
        learning.tokenizer,
        replace(record, distilled=record.distilled + checks[-1].step, round=number),
        out,
    )
    checkpoint.unlink(missing_ok=True)
