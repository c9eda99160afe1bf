"""What an emulator gives away: numbers that are compared, losses that are measured, and words that follow from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from builds import Notes, built, plan_of, shipped, write_all

from farfield.emulator import backbone as backbones
from farfield.emulator import build as building
from farfield.emulator import leakage, text
from farfield.emulator.architecture import describe
from farfield.emulator.assemble import assemble, own_middle
from farfield.emulator.disclosure import Disclosure, Share, disclosed
from farfield.emulator.fit import fit
from farfield.emulator.layout import Layout, Record
from farfield.emulator.leakage import Budget, Leakage, Losses
from farfield.emulator.methods import Tuned
from farfield.emulator.search import Choice, Material, compressed, finished
from farfield.emulator.split import Split
from farfield.emulator.text import PublicText
from farfield.protocols.errors import EmulatorError
from farfield.protocols.sections import Training

NAMES = ("safe", "secure", "private", "guarantee")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A backbone whose middle has learned some sentences, and nothing else in it has; and those sentences."""
    folder, data = write_all(tmp_path_factory.mktemp("made"))
    model = backbones.load_model(folder, task="causal-lm", dtype="float32")
    tokenizer = backbones.load_tokenizer(folder)
    public = building.prepared(plan_of(), text.read(data, "backbone"), tokenizer)
    training = Training(rounds=1, steps=150, batch_size=8, learning_rate=5e-3)
    head: Any = model.get_submodule("lm_head")
    head.weight.mul_(15)  # as it is drawn, it cannot tell tokens apart
    for block in describe(model).blocks[1:5]:
        block.requires_grad_(True)
    fit(Tuned(model), training, lambda step: text.batches(public.train, 8, seed=0, step=step))
    model.save_pretrained(folder)
    return folder, data


def measured(folder: Path, out: Path, steps: int = 4, **sections: Any) -> Leakage:
    public = PublicText.load(out / building.TEXT)
    return leakage.measure(plan_of(**sections), folder, out, public, steps, Notes())


def test_an_emulator_with_the_whole_middle_protects_nothing(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = made
    asked: dict[str, Any] = {"distillation": {"steps": 0}, "emulator": {"blocks": 4}}
    built(plan_of(**asked), folder, tmp_path / "out", data)
    before = shipped(tmp_path / "out")
    found = measured(folder, tmp_path / "out", **asked)
    given = found.disclosed
    assert (given.whole.given, given.around.given, given.outer.given, given.middle.given) == (1, 1, 1, 1)
    assert (given.whole.rounded, given.error, found.hidden) == (0, 0, 0)
    assert found.losses is not None
    assert found.losses.emulator == pytest.approx(found.losses.backbone, abs=1e-5)
    assert found.losses.emulator_tuned == pytest.approx(found.losses.plug_in, abs=1e-4)
    assert found.losses.backbone_tuned == pytest.approx(found.losses.plug_in, abs=1e-4)
    assert found.verdict[0].startswith("This emulator protects nothing: 100% of the middle's parameters are in it.")
    assert json.loads(json.dumps(found.document()))["verdict"] == list(found.verdict)
    assert shipped(tmp_path / "out") == before


def test_four_bits_of_the_whole_middle_protect_nothing(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = made
    asked: dict[str, Any] = {"distillation": {"steps": 0}, "emulator": {"quantization": "nf4"}}
    built(plan_of(**asked), folder, tmp_path / "out", data)
    found = measured(folder, tmp_path / "out", steps=2, **asked)
    given = found.disclosed.middle
    assert given.given == 1
    assert given.rounded == sum(
        linear.in_features * linear.out_features
        for linear in describe(backbones.load_model(folder, task="causal-lm", dtype="float32"))
        .within(range(1, 5))
        .linears
    )
    assert 0.05 < found.disclosed.error < 0.12, "what NF4 does to a normal distribution"
    assert "rounded to 4 bits" in found.verdict[0]


def test_a_stand_in_of_random_weights_is_near_the_floor(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = made
    asked: dict[str, Any] = {"distillation": {"steps": 0}, "emulator": {"blocks": 4}}
    plan, out = plan_of(**asked), tmp_path / "out"
    built(plan, folder, out, data)
    model = backbones.load_model(folder, task="causal-lm", dtype="float32")
    layout = Layout(Split(6, 1, 1), (1, 2, 3, 4))
    emulator = assemble(model, layout)
    own_middle(emulator, layout)
    leakage.redrawn(emulator, layout, seed=99)
    building.write(emulator, backbones.load_tokenizer(folder), Record(layout, plan.emulator_digest, "0" * 64, 0), out)
    found = measured(folder, out, **asked)
    # Norms of ones are all that such a stand-in could have in common with the middle.
    assert found.disclosed.middle.given < 0.01
    assert found.disclosed.outer.given == 1
    assert found.disclosed.error > 0.9
    assert found.losses is not None
    assert found.losses.backbone < found.losses.floor - 0.5, "else the test shows nothing"
    reached = found.losses.quality(found.losses.attacked)
    assert reached is not None
    assert abs(reached) < 0.2


def test_the_same_measuring_gives_the_same_figures(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = made
    asked: dict[str, Any] = {"emulator": {"blocks": 2, "low_rank": 0.5, "quantization": "nf4"}}
    built(plan_of(**asked), folder, tmp_path / "out", data)
    first = measured(folder, tmp_path / "out", steps=2, **asked)
    assert first == measured(folder, tmp_path / "out", steps=2, **asked)
    assert first.losses is not None
    assert first.losses.attacked <= first.losses.emulator + 1e-3, "an attacker can stop whenever it likes"
    assert first.disclosed.middle.given < 0.01


def test_an_emulator_of_another_plan_is_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    folder, data = made
    built(plan_of(distillation={"steps": 0}), folder, tmp_path / "out", data)
    with pytest.raises(EmulatorError, match="made for another Plan"):
        measured(folder, tmp_path / "out", distillation={"steps": 1})
    with pytest.raises(EmulatorError, match=r"there is no emulator\.json"):
        leakage.measure(plan_of(), folder, folder, PublicText.load(tmp_path / "out" / building.TEXT), 1, Notes())


@pytest.mark.parametrize(
    ("choice", "unchanged", "rounded"),
    [
        (Choice("uniform", 2), {1, 4}, set()),
        (Choice("uniform", 2, None, "nf4"), set(), {1, 4}),
        (Choice("uniform", 2, 0.5), set(), set()),
        (Choice("uniform", 2, 0.5, "nf4"), set(), set()),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_what_is_given_away_is_counted(family: str, choice: Choice, unchanged: set[int], rounded: set[int]) -> None:
    """In these models no two tensors are alike by chance, norms and biases included."""
    model = families.deep(family)
    made_of = Material(model, Split(6, 1, 1), [families.text(family)])
    emulator, layout = finished(*compressed(made_of, choice), choice)
    given = disclosed(model, emulator, layout)
    blocks = describe(model).blocks
    sizes = {number: sum(one.numel() for one in blocks[number].parameters()) for number in range(6)}
    matrices = {
        number: sum(one.in_features * one.out_features for one in describe(model).within([number]).linears)
        for number in range(6)
    }
    assert given.middle.parameters == sum(sizes[number] for number in range(1, 5))
    rest = {number: sizes[number] - matrices[number] for number in layout.middle}  # norms and biases
    assert given.middle.unchanged == sum(sizes[n] if n in unchanged else rest[n] for n in layout.middle)
    assert given.middle.rounded == sum(matrices[number] for number in rounded)
    assert given.outer.given == given.around.given == 1
    assert given.outer.parameters == sizes[0] + sizes[5]
    assert given.whole.parameters == sum(one.numel() for one in {id(p): p for p in model.parameters()}.values())
    assert given.whole.bytes == 4 * given.whole.parameters
    assert (given.error == 0) is bool(unchanged)


def test_a_block_that_moved_is_no_longer_given_away() -> None:
    model = families.deep("llama")
    layout = Layout(Split(6, 1, 1), (2, 3))
    emulator = assemble(model, layout)
    own_middle(emulator, layout)
    before = disclosed(model, emulator, layout)
    parameters = list(describe(emulator).blocks[1].parameters())
    with torch.no_grad():
        for one in parameters:
            one.mul_(1.01)
    moved = disclosed(model, emulator, layout)
    assert before.middle.unchanged - moved.middle.unchanged == sum(one.numel() for one in parameters)
    assert 0 < moved.error < 0.01


@pytest.mark.parametrize("part", ["packed", "scales"])
def test_four_bits_of_other_weights_are_not_counted(part: str) -> None:
    model = families.deep("llama")
    made_of, choice = Material(model, Split(6, 1, 1), [families.text("llama")]), Choice("uniform", 1, None, "nf4")
    emulator, layout = finished(*compressed(made_of, choice), choice)
    before = disclosed(model, emulator, layout)
    layer: Any = emulator.get_submodule("model.layers.1.mlp.up_proj")
    getattr(layer, part)[0] += 1
    after = disclosed(model, emulator, layout)
    assert before.middle.rounded - after.middle.rounded == layer.in_features * layer.out_features


def test_a_stand_in_that_is_drawn_anew_has_nothing_left() -> None:
    for family in ("llama", "gpt2", "opt", "bert", "bloom"):
        model = families.deep(family)
        layout = Layout(Split(6, 1, 1), (2, 2, 4))
        emulator = assemble(model, layout)
        own_middle(emulator, layout)
        leakage.redrawn(emulator, layout, seed=3)
        found = disclosed(model, emulator, layout)
        assert found.middle.given == 0
        assert found.outer.given == found.around.given == 1
        assert found.error > 0.9


LOSSES = Losses(
    backbone=4.0, emulator=4.6, emulator_tuned=3.8, plug_in=3.5, backbone_tuned=3.4, attacked=3.9, floor=4.4
)
NOTHING = Share(100, 400, 0, 0)
HALF = Disclosure(Share(300, 1200, 200, 0), Share(100, 400, 100, 0), Share(100, 400, 100, 0), NOTHING, 0.5, 0.5)
FOUND = Leakage(Budget(200, 8, 128, 1e-3), HALF, 0.25, LOSSES)


def test_shares_of_the_full_models_quality() -> None:
    assert LOSSES.quality(3.4) == 1
    assert LOSSES.quality(4.4) == 0
    assert LOSSES.quality(3.9) == pytest.approx(0.5)
    assert LOSSES.quality(4.6) == pytest.approx(-0.2)
    assert LOSSES.recovered == pytest.approx(5 / 6)
    untuned = replace(LOSSES, backbone_tuned=4.1)
    assert untuned.best == 4.0
    assert untuned.recovered is None, "tuning gains nothing that could be recovered"
    assert replace(LOSSES, floor=3.405).quality(3.4) is None, "the floor is as good as the backbone"
    assert replace(LOSSES, floor=3.0).quality(3.4) is None
    assert FOUND.budget.tokens == 204_800


def test_what_is_kept_back_is_said_with_its_figures() -> None:
    said = " ".join(FOUND.verdict)
    assert said.startswith("This emulator keeps back some of the backbone")
    for figure in ("0.3000", "3.5000", "3.8000", "50%", "4.4000", "204,800", "67% of the backbone's parameters"):
        assert figure in said
    assert "an attacker may come further" in said
    assert "protects nothing" not in said


@pytest.mark.parametrize(
    ("found", "because"),
    [
        (replace(FOUND, losses=replace(LOSSES, emulator_tuned=3.5)), "by itself at least as good"),
        (replace(FOUND, losses=replace(LOSSES, emulator_tuned=3.3)), "by itself at least as good"),
        (replace(FOUND, losses=replace(LOSSES, attacked=3.5)), "against further training"),
        (replace(FOUND, losses=replace(LOSSES, attacked=3.5, floor=3.5)), "So is a stand-in of random weights"),
        (replace(FOUND, disclosed=replace(HALF, middle=Share(100, 400, 100, 0))), "Whoever has it has the backbone"),
        (replace(FOUND, disclosed=replace(HALF, middle=Share(100, 400, 1, 99))), "rounded to 4 bits"),
        (replace(FOUND, losses=None, disclosed=replace(HALF, middle=Share(100, 400, 1, 99))), "rounded to 4 bits"),
    ],
)
def test_it_is_said_plainly_when_nothing_is_protected(found: Leakage, because: str) -> None:
    assert all(sentence.startswith("This emulator protects nothing") for sentence in found.verdict)
    assert because in " ".join(found.verdict)
    assert "keeps back" not in " ".join(found.verdict)


def test_the_verdict_claims_no_more_than_was_measured() -> None:
    few = (
        FOUND,
        replace(FOUND, losses=None),
        replace(FOUND, losses=replace(LOSSES, floor=3.4)),
        replace(FOUND, losses=replace(LOSSES, plug_in=4.1, emulator_tuned=4.2, attacked=4.3)),
    )
    for found in few:
        said = " ".join(found.verdict)
        assert not any(name in said.lower() for name in NAMES)
    assert "cannot be told from text without classes" in " ".join(few[1].verdict)
    assert "too near the backbone" in " ".join(few[2].verdict)
    assert "makes the backbone no better" in " ".join(few[3].verdict)


def test_a_middle_that_was_hardly_moved_counts_as_given_away() -> None:
    """Distillation leaves no value as it was, and yet all of the middle may be there."""
    moved = replace(HALF, blocks=1.0, error=0.03)
    (said,) = Leakage(Budget(10, 2, 16, 1e-3), moved, 0.1, None).verdict
    assert said.startswith("This emulator protects nothing: every block of the middle is in it")
    assert "3.0% of their norm" in said
    for kept in (replace(moved, error=0.4), replace(moved, blocks=0.5)):
        assert "protects nothing" not in Leakage(Budget(10, 2, 16, 1e-3), kept, 0.1, None).verdict[0]


def test_those_who_take_turns_are_said_to_be_more() -> None:
    said = Leakage(Budget(10, 2, 16, 1e-3), HALF, 0.1, None, turns=3).verdict
    assert any("Clients get 3 emulators that take turns" in sentence for sentence in said)
    assert not any("take turns" in sentence for sentence in Leakage(Budget(10, 2, 16, 1e-3), HALF, 0.1, None).verdict)
