"""Distillation: the stand-in comes nearer, alone, and goes on to the same weights wherever it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, deep, text
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from farfield.emulator.architecture import describe
from farfield.emulator.assemble import assemble, own_middle, tensors
from farfield.emulator.distill import Check, distil
from farfield.emulator.factorise import factorised
from farfield.emulator.layout import Layout
from farfield.emulator.quantise import quantised
from farfield.emulator.split import split
from farfield.emulator.streams import Batch
from farfield.protocols.errors import EmulatorError
from farfield.protocols.sections import Distillation

PARTS = split(6, (1, 2))
LAYOUT = Layout(PARTS, (2, 3, 3))
SHORT = Distillation(steps=12, learning_rate=3e-3, lm_weight=1.0, hidden_weight=30.0, check_every=3, patience=99)
NONE = SHORT.model_copy(update={"steps": 0})


def texts(step: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(3, VOCABULARY, (4, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


HELD_OUT = [texts(-1), texts(-2)]


def student_of(model: PreTrainedModel, layout: Layout = LAYOUT) -> PreTrainedModel:
    student = assemble(model, layout)
    own_middle(student, layout)
    return student


def copied(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors(model).items()}


def same(one: PreTrainedModel, other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in tensors(one).items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "llama-classifier", "vit"])
def test_it_comes_nearer_and_nothing_but_the_stand_in_changes(family: str) -> None:
    teacher = deep(family)
    before = copied(teacher)
    student = student_of(teacher)
    start = copied(student)
    given = {"vit": lambda step: text("vit")}.get(family, texts)
    held_out = [text("vit")] if family == "vit" else HELD_OUT
    checks = distil(teacher, student, LAYOUT, SHORT, given, held_out)
    assert [check.step for check in checks] == [0, 3, 6, 9, 12]
    assert checks[-1].hidden < 0.8 * checks[0].hidden
    assert (checks[0].lm > 0) == (family in ("llama", "gpt2"))
    assert same(teacher, before)
    blocks = describe(student).blocks
    inner = {id(one) for number in LAYOUT.inner for one in blocks[number].parameters()}
    for name, tensor in tensors(student).items():
        assert torch.equal(tensor, start[name]) == (id(tensor) not in inner), name
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in student.parameters())
    assert blocks[2] is blocks[3]


def test_no_tensor_of_the_middle_is_left_as_it_was() -> None:
    """Norms too: what a client gets holds nothing of the middle by value."""
    teacher = deep("opt")
    student = student_of(teacher)
    distil(teacher, student, LAYOUT, SHORT, texts, HELD_OUT)
    blocks = describe(teacher).blocks
    for number in PARTS.middle:
        for mine in blocks[number].parameters():
            assert not any(torch.equal(mine, tensor) for tensor in tensors(student).values())


def test_the_measure_is_that_of_the_paper() -> None:
    teacher = deep("llama")
    student = student_of(teacher)
    streams = []
    for model, number in ((teacher, 4), (student, LAYOUT.inner.stop)):
        seen: list[torch.Tensor] = []
        block: Any = describe(model).blocks[number]
        handle = block.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        plain: Any = model
        logits = plain(**HELD_OUT[0]).logits
        handle.remove()
        streams.append(seen[0][HELD_OUT[0]["attention_mask"].bool()])
    wanted, given = streams
    (check,) = distil(teacher, student, LAYOUT, NONE, texts, HELD_OUT[:1])
    expected = (wanted - given).square().mean() / wanted.square().mean()
    assert check.hidden == pytest.approx(float(expected), rel=1e-5)
    losses = [
        -float(torch.log_softmax(logits[row, place].double(), dim=-1)[HELD_OUT[0]["input_ids"][row, place + 1]])
        for row in range(4)
        for place in range(7)
        if HELD_OUT[0]["attention_mask"][row, place + 1]
    ]
    assert check.lm == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert check.total(Distillation(lm_weight=2, hidden_weight=3)) == pytest.approx(2 * check.lm + 3 * check.hidden)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_does_not_count(family: str) -> None:
    def otherwise(step: int) -> Batch:
        batch = dict(texts(step))
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
        return batch

    ends = []
    for given in (texts, otherwise):
        student = student_of(deep(family))
        checks = distil(deep(family), student, LAYOUT, SHORT, given, [given(-1)])
        ends.append((checks, tensors(student)))
    (checks, one), (others, two) = ends
    for check, other in zip(checks, others, strict=True):
        assert check.hidden == pytest.approx(other.hidden, rel=1e-4)
    assert all(torch.allclose(one[name], two[name], atol=1e-4) for name in one)


class Stop(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "where", ["step 0", "step 2", "step 4", "step 11", "check 0", "check 3", "check 9", "check 12"]
)
def test_stopped_anywhere_it_goes_on_to_the_same_weights(where: str, dtype: torch.dtype, tmp_path: Path) -> None:
    loaded: Any = deep("llama")
    teacher: PreTrainedModel = loaded.to(dtype)
    undisturbed = student_of(teacher)
    checks = distil(teacher, undisturbed, LAYOUT, SHORT, texts, HELD_OUT)
    kind, number = where.split()

    def on_step(step: int, loss: float) -> None:
        if (kind, int(number)) == ("step", step):
            raise Stop

    def on_check(check: Check) -> None:
        if (kind, int(number)) == ("check", check.step):
            raise Stop

    path = tmp_path / "checkpoint"
    with pytest.raises(Stop):
        distil(teacher, student_of(teacher), LAYOUT, SHORT, texts, HELD_OUT, path, on_step, on_check)
    steps: list[int] = []
    student = student_of(teacher)
    again = distil(teacher, student, LAYOUT, SHORT, texts, HELD_OUT, path, lambda step, _: steps.append(step))
    assert again == checks
    assert same(student, copied(undisturbed))
    begun = int(number) // 3 * 3
    assert steps == list(range(begun, 12)), "what was done is not done again"


def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, teacher = tmp_path / "checkpoint", deep("llama")
    real = Path.replace

    def killed(self: Path, target: Path) -> Path:
        if path.exists():
            raise Stop
        return real(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(Stop):
        distil(teacher, student_of(teacher), LAYOUT, SHORT, texts, HELD_OUT, path)
    monkeypatch.undo()
    student, undisturbed = student_of(teacher), student_of(teacher)
    distil(teacher, student, LAYOUT, SHORT, texts, HELD_OUT, path)
    distil(teacher, undisturbed, LAYOUT, SHORT, texts, HELD_OUT)
    assert same(student, copied(undisturbed))


def test_a_checkpoint_of_another_distillation_is_refused(tmp_path: Path) -> None:
    path, teacher = tmp_path / "checkpoint", deep("llama")
    distil(teacher, student_of(teacher), LAYOUT, SHORT, texts, HELD_OUT, path)
    others = [
        (LAYOUT, SHORT.model_copy(update={"learning_rate": 1e-3})),
        (LAYOUT, SHORT.model_copy(update={"lm_weight": 2.0})),
        (Layout(PARTS, (1, 3, 3)), SHORT),
        (Layout(PARTS, (2, 2, 3)), SHORT),
        (Layout(PARTS, (2,)), SHORT),
    ]
    for layout, settings in others:
        student = student_of(teacher, layout)
        before = copied(student)
        with pytest.raises(EmulatorError, match="checkpoint: a checkpoint of another distillation"):
            distil(teacher, student, layout, settings, texts, HELD_OUT, path)
        assert same(student, before)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    path, teacher = tmp_path / "checkpoint", deep("llama")
    distil(teacher, student_of(teacher), LAYOUT, SHORT, texts, HELD_OUT, path)
    content, held = path.read_bytes(), load_file(path)
    damaged = [b"", content[:7], content[: len(content) // 2], content[:-1], b"\0" * 100]
    without, wide = tmp_path / "without", tmp_path / "wide"
    save_file(held, without)
    damaged.append(without.read_bytes())
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        notes = file.metadata()
    name = next(iter(held))
    save_file(held | {name: torch.zeros(3, 3, 3)}, wide, metadata=notes)
    damaged.append(wide.read_bytes())
    save_file({one: tensor for one, tensor in held.items() if one != name}, wide, metadata=notes)
    damaged.append(wide.read_bytes())
    for bad in damaged:
        path.write_bytes(bad)
        with pytest.raises(EmulatorError, match=r"checkpoint: cannot be read: .* Remove it to begin anew\.$"):
            distil(teacher, student_of(teacher), LAYOUT, SHORT, texts, HELD_OUT, path)


def test_it_stops_when_it_gets_no_better_and_keeps_the_best() -> None:
    teacher = deep("llama")
    student = student_of(teacher)
    before = copied(student)
    wild = SHORT.model_copy(update={"steps": 60, "learning_rate": 1.0, "check_every": 2, "patience": 2})
    checks = distil(teacher, student, LAYOUT, wild, texts, HELD_OUT)
    totals = [check.total(wild) for check in checks]
    best = totals.index(min(totals))
    assert len(checks) - 1 - best == 2
    assert checks[-1].step < 60
    (after,) = distil(teacher, student, LAYOUT, NONE, texts, HELD_OUT)
    assert after.total(wild) == pytest.approx(totals[best], rel=1e-6)
    if best == 0:
        assert same(student, before)


def test_it_is_the_same_every_time_and_no_steps_change_nothing() -> None:
    teacher = deep("llama")
    ends = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        student = student_of(teacher)
        distil(teacher, student, LAYOUT, SHORT, texts, HELD_OUT)
        ends.append(copied(student))
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())
    student = student_of(teacher)
    before = copied(student)
    assert len(distil(teacher, student, LAYOUT, NONE, texts, HELD_OUT)) == 1
    assert same(student, before)


def test_without_the_language_model_only_the_stream_counts() -> None:
    teacher = deep("llama")
    settings = SHORT.model_copy(update={"lm_weight": 0.0})
    checks = distil(teacher, student_of(teacher), LAYOUT, settings, texts, HELD_OUT)
    assert checks[-1].hidden < 0.8 * checks[0].hidden


def test_a_teacher_in_four_bits() -> None:
    whole = Layout(PARTS, tuple(PARTS.middle))
    model = deep("llama")
    teacher, _ = quantised(assemble(model, whole), whole)
    before = copied(teacher)
    student = student_of(model)
    checks = distil(teacher, student, LAYOUT, SHORT, texts, HELD_OUT)
    assert checks[-1].hidden < 0.8 * checks[0].hidden
    assert same(teacher, before)


def test_factors_are_trained() -> None:
    teacher = deep("gpt2")
    student, layout = factorised(assemble(teacher, LAYOUT), LAYOUT, 0.3, HELD_OUT)
    own_middle(student, layout)
    start = copied(student)
    checks = distil(teacher, student, layout, SHORT, texts, HELD_OUT)
    assert checks[-1].hidden < 0.9 * checks[0].hidden
    moved = {name for name, tensor in tensors(student).items() if not torch.equal(tensor, start[name])}
    assert {name for name in start if ".up." in name or ".down." in name} <= moved


def test_a_loss_that_is_no_number_is_said(tmp_path: Path) -> None:
    teacher = deep("llama")
    student = student_of(teacher)
    next(iter(describe(teacher).blocks[3].parameters())).data.fill_(float("nan"))
    with pytest.raises(EmulatorError, match=r"the loss of distillation is nan in step 1\. Lower"):
        distil(teacher, student, LAYOUT, SHORT, texts, HELD_OUT, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
