"""Builds an emulator: text, choice of what remains, factors, distillation, 4 bits, and a folder that can be shipped.

    OUT/                    config.json  model.safetensors  tokenizer files  emulator.json      the bundle
    OUT/turns/1/            another one, where emulators take turns
    OUT/build/              what stays with the owner
        request.json            what was asked for; the same command goes on where it stopped
        text.safetensors        the public text, cut once; its held-out part judges the emulator, here and in runs
        search.json             what a search under a budget has measured so far
        distillation-0.safetensors  the checkpoint
        report.json             what was measured

The bundle's files are written last, and `emulator.json` last of all, so a folder with one is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from safetensors import SafetensorError

from farfield.protocols import durable
from farfield.protocols.errors import BundleError, EmulatorError
from farfield.protocols.plan import Plan
from farfield.protocols.seeds import derive

from . import assemble, backbone, few_bits, stored, text
from .architecture import describe
from .compress import tuned_gradient
from .distill import Check, distil
from .layout import LAYOUT, Layout, Record, at_turn, is_emulator
from .objective import mean_loss, predicts_tokens
from .search import Candidate, Choice, Fidelity, Material, compressed, fidelity, finished, middle_bytes, search, stated
from .split import split
from .text import PublicText, Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WORKSHOP: Final = "build"

TEXT: Final = "build/text.safetensors"

_REQUEST: Final = "request.json"

CALIBRATION: Final = 4
"""Batches of public text by which blocks and factors are chosen."""

JUDGED: Final = 8
"""Batches of held-out public text by which distillation, and what comes of it, is judged."""

TOKENS: Final = 2_000_000
"""How much public text is taken."""


class Progress(Protocol):
    """Is told how a build goes on."""

    def on_stage(self, what: str) -> None: ...
    def on_candidate(self, candidate: Candidate, done: int, count: int) -> None: ...
    def on_step(self, done: int, steps: int, loss: float) -> None: ...
    def on_check(self, check: Check) -> None: ...


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for besides the Plan: a limit, and public text; None is what the Plan says, and its own.

    Attributes:
        keep: how many blocks of the middle remain.
        budget: bytes that the stand-in may have.
        data: a file or a folder; None is what the builtin backbone was trained on.
    """

    keep: int | None = None
    budget: int | None = None
    data: Path | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What was built.

    Attributes:
        choice: what the stand-in was made of.
        backbone_bytes, middle_bytes: of the backbone, and of those of its blocks that are stood for.
        emulator_bytes, emulated_bytes: of the emulator, and of what stands for the middle.
        backbone_loss: the backbone's own, in nats per token of held-out public text; None for a classifier.
        before: how near the emulator was to the backbone on that text before it was distilled.
        fidelity: the same as it is shipped.
        checks: what was measured while it was distilled, in order.
        candidates: what a search under a budget compared, the best first.
    """

    choice: Choice
    layout: Layout
    backbone_bytes: int
    middle_bytes: int
    emulator_bytes: int
    emulated_bytes: int
    backbone_loss: float | None
    before: Fidelity
    fidelity: Fidelity
    checks: tuple[Check, ...]
    candidates: tuple[Candidate, ...]


def build(plan: Plan, folder: Path, out: Path, request: Request, progress: Progress) -> Report:
    """Build an emulator of the backbone in `folder`, or go on with it, and write it to `out`.

    Whenever it is stopped, the same call goes on, and ends with the same bytes.

    Raises:
        EmulatorError: the Plan wants none, or one that cannot be; `out` holds something else, or is finished.
        BackboneError, DataError: the backbone or the public text cannot be used.
        BundleError: the disk refuses.
    """
    if plan.delivery.kind != "emulator":
        raise EmulatorError(
            f'the Plan wants no emulator: delivery.kind = "{plan.delivery.kind}"', hint='Use kind = "emulator".'
        )
    workshop = _opened(plan, folder, out, request)
    progress.on_stage("loading the backbone")
    tokenizer = backbone.load_tokenizer(folder)
    model = _backbone(plan, folder)
    assert plan.delivery.ends is not None
    parts = split(len(describe(model).blocks), plan.delivery.ends, folder)
    public = _text(plan, out, request, tokenizer, progress)
    size, seed = plan.distillation.batch_size, plan.training.seed
    calibration = [
        text.batches(public.train, size, seed=derive(seed, "calibration"), step=step) for step in range(CALIBRATION)
    ]
    material = Material(model, parts, calibration)
    candidates: tuple[Candidate, ...] = ()
    if request.budget is None:
        choice = stated(plan.emulator, parts, request.keep)
    else:
        progress.on_stage("searching")
        with writing(out):
            candidates = search(material, request.budget, workshop / "search.json", progress.on_candidate)
        choice = candidates[0].choice
    # The first, which is what makes the folder an emulator's, comes last.
    for turn in range(plan.emulator.turns - 1, 0, -1):
        if not is_emulator(at_turn(out, turn)):
            _made(plan, folder, out, turn, material, choice, candidates, public, tokenizer, progress)
    return _made(plan, folder, out, 0, material, choice, candidates, public, tokenizer, progress)


def _made(
    plan: Plan,
    folder: Path,
    out: Path,
    turn: int,
    material: Material,
    choice: Choice,
    candidates: tuple[Candidate, ...],
    public: PublicText,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> Report:
    """Make the emulator of one turn, and write it."""
    model, parts = material.model, material.split
    turns = plan.emulator.turns
    progress.on_stage(f"compressing: {choice}" + (f", turn {turn + 1} of {turns}" if turns > 1 else ""))
    emulator, layout = compressed(material, choice, turn, turns)
    progress.on_stage("measuring")
    held_out = Material(model, parts, judged(public.held_out, plan.distillation.batch_size, JUDGED))
    whole = tuned_gradient(model, parts.outer, held_out.calibration)
    before = near = fidelity(held_out, emulator, layout, whole)
    checks: list[Check] = []
    workshop = out / WORKSHOP
    checkpoint = workshop / f"distillation-{turn}.safetensors"
    if plan.distillation.steps:
        progress.on_stage("distilling")
        with writing(out):
            checks = distilled(
                plan, model, emulator, layout, public, checkpoint, progress, seed=plan.training.seed + turn
            )
    emulator, layout = finished(emulator, layout, choice)
    if checks or choice.quantization != "none":
        progress.on_stage("measuring")
        near = fidelity(held_out, emulator, layout, whole)
    report = Report(
        choice=choice,
        layout=layout,
        backbone_bytes=all_bytes(model),
        middle_bytes=middle_bytes(model, parts.middle),
        emulator_bytes=all_bytes(emulator),
        emulated_bytes=middle_bytes(emulator, layout.inner),
        backbone_loss=mean_loss(model, held_out.calibration) if predicts_tokens(model) else None,
        before=before,
        fidelity=near,
        checks=tuple(checks),
        candidates=candidates,
    )
    steps = checks[-1].step if checks else 0
    with writing(out):
        (workshop / "report.json").write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
        record = Record(layout, plan.emulator_digest, backbone.fingerprint(folder), steps)
        write(emulator, tokenizer, record, at_turn(out, turn))
        checkpoint.unlink(missing_ok=True)
    return report


def distilled(
    plan: Plan,
    teacher: PreTrainedModel,
    emulator: PreTrainedModel,
    layout: Layout,
    public: PublicText,
    checkpoint: Path,
    progress: Progress,
    *,
    seed: int,
) -> list[Check]:
    """Distil the stand-in of `emulator`, which gets memory of its own, from `teacher`."""
    settings = plan.distillation
    assemble.own_middle(emulator, layout)

    def drawn(step: int) -> dict[str, torch.Tensor]:
        return text.batches(public.train, settings.batch_size, seed=derive(seed, "distillation"), step=step)

    return distil(
        teacher,
        emulator,
        layout,
        settings,
        drawn,
        judged(public.held_out, settings.batch_size, JUDGED),
        checkpoint,
        lambda step, loss: progress.on_step(step + 1, settings.steps, loss),
        progress.on_check,
    )


def judged(windows: Windows, size: int, count: int) -> list[dict[str, torch.Tensor]]:
    """The first `count` batches of held-out text."""
    return [batch for batch, _ in zip(text.in_order(windows, size), range(count), strict=False)]


def write(emulator: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, record: Record, out: Path) -> None:
    """Put the emulator's files into `out`, `emulator.json` last: until it is there, nothing else counts.

    Raises:
        BundleError: the disk refuses.
    """
    new = out / WORKSHOP / "new"
    with writing(out):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        stored.save(emulator, tokenizer, record, new)
        for file in sorted(new.iterdir(), key=lambda one: one.name == LAYOUT):
            file.replace(out / file.name)
        new.rmdir()


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Turn what the disk refuses into a BundleError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        path = getattr(error, "filename", None) or where
        raise BundleError(
            f"cannot be written: {reason}", where=path, hint="Make room, and give the same command again."
        ) from None


def all_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's tensors as a file holds them, shared ones once."""
    return sum(one.nbytes for one in assemble.tensors(model).values())


def prepared(plan: Plan, documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> PublicText:
    """Public text cut as the Plan has it. Raises DataError where it is too little."""
    return text.prepare(
        documents,
        tokenizer,
        task=plan.model.task,
        max_length=plan.data.max_length,
        seed=plan.training.seed,
        limit=TOKENS,
    )


def _opened(plan: Plan, folder: Path, out: Path, request: Request) -> Path:
    """The workshop in `out`, new or of the same request. Raises EmulatorError where `out` is something else."""
    backbone.check(folder)
    wanted: dict[str, Any] = {
        "plan": plan.emulator_digest,
        "backbone": backbone.fingerprint(folder),
        "keep": request.keep,
        "budget": request.budget,
        "data": str(request.data.absolute()) if request.data else None,
    }
    workshop, note = out / WORKSHOP, out / WORKSHOP / _REQUEST
    try:
        if is_emulator(out):
            raise EmulatorError("holds a finished emulator", where=out, hint="Give a new folder, or remove it.")
        if note.exists():
            if json.loads(note.read_text(encoding="utf-8")) != wanted:
                raise EmulatorError(
                    "an emulator was begun here for another Plan, backbone, text or limit",
                    where=out,
                    hint="Give a new folder, or the same command as before to go on.",
                )
            return workshop
        if out.exists() and (not out.is_dir() or not _untouched(out)):
            raise EmulatorError("exists and is not empty", where=out, hint="Give a new folder.")
        workshop.mkdir(parents=True, exist_ok=True)
        durable.write(note, json.dumps(wanted).encode())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EmulatorError(f"cannot be used: {reason.lower()}", where=out, hint="Give a new folder.") from None
    return workshop


def _untouched(out: Path) -> bool:
    """Whether there is nothing in `out` but what a build leaves that was killed before it began."""
    return {one.relative_to(out).as_posix() for one in out.rglob("*")} <= {WORKSHOP, f"{WORKSHOP}/{_REQUEST}.partial"}


def _backbone(plan: Plan, folder: Path) -> PreTrainedModel:
    """The teacher: what clients tune is to fit it as the Plan has it, so its matrices have the values of the few bits.

    They are held in plain ones, since the emulator is cut from them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = backbone.load_model(
        folder,
        task=plan.model.task,
        dtype=plan.model.dtype,
        labels=plan.model.labels,
        seed=plan.training.seed,
        device=device,
        attention=backbone.attention(device, plan.data.max_length),
    )
    if plan.model.quantization != "none":
        few_bits.round_values(model, plan.model.quantization)
    return model


def _text(
    plan: Plan, out: Path, request: Request, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> PublicText:
    if not (out / TEXT).exists():
        progress.on_stage("reading public text")
        prepared(plan, text.read(request.data, plan.model.backbone), tokenizer).save(out / TEXT)
    return PublicText.load(out / TEXT)
