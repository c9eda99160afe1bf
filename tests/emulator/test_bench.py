"""A bench: what is trained can be read and set, and what is drawn and never sent is the same everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from farfield.emulator import backbone, stored
from farfield.emulator import bench as benches
from farfield.emulator.architecture import describe
from farfield.emulator.assemble import assemble
from farfield.emulator.bench import Bench
from farfield.emulator.factorise import factorised
from farfield.emulator.layout import Layout, Record
from farfield.emulator.methods import registered
from farfield.emulator.quantise import quantised
from farfield.emulator.split import split
from farfield.protocols import plan as plans
from farfield.protocols.errors import EmulatorError, MalformedMessage, PlanError
from farfield.protocols.plan import Plan

hf: Any = transformers  # whose constructors are untyped

WORDS = {"<pad>": 0, "<end>": 1} | {f"w{index}": index for index in range(2, 20)}

DRAWN = {"lora, A frozen": '"lora"\nfreeze_a = true', "vera": '"vera"\nrank = 4', "fed-sb": '"fed-sb"\nrank = 4'}
"""Methods that draw parts from the seed which they do not train."""

FROM_WEIGHTS = {"fed-sb"}
"""Those that are not drawn from the seed alone, but fitted to the backbone."""

KINDS = {kind: f'"{kind}"' for kind in registered()} | DRAWN

BY_BLOCK = [name for name in KINDS if registered()[name.partition(",")[0]](kind=name.partition(",")[0]).by_block]


def write_backbone(path: Path, seed: int, layers: int = 2) -> Path:
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<pad>").save_pretrained(path)
    config = hf.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"), seed=1)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("other"), seed=2)


def optimizer(kind: str) -> str:
    """The line of the Plan that goes with the method."""
    name = kind.partition(",")[0]
    return "" if registered()[name](kind=name).by_gradient else 'optimizer = "sgd"'


def bench_of(folder: Path, kind: str = "lora", *, seed: int = 0, dtype: str = "float32") -> Bench:
    text = f"""
        [model]
        backbone = "anywhere"
        dtype = "{dtype}"
        [training]
        rounds = 2
        steps = 10
        seed = {seed}
        {optimizer(kind)}
        [tuning]
        kind = {KINDS[kind]}
    """
    return Bench(plans.parse(text, registered(), None), folder)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_drawn_and_not_trained_has_one_digest(kind: str, folder: Path) -> None:
    """Whatever was drawn before it: two sides draw the same, or know that they do not."""
    torch.manual_seed(3)
    one = bench_of(folder, kind).frozen
    torch.rand(100)
    assert bench_of(folder, kind).frozen == one
    assert re.fullmatch(r"|[0-9a-f]{64}", one)


@pytest.mark.parametrize("kind", ["lora", "ia3", "bitfit", "full"])
def test_where_everything_that_was_added_is_trained_there_is_no_digest(kind: str, folder: Path) -> None:
    assert bench_of(folder, kind).frozen == ""


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_draw_has_another_digest(kind: str, dtype: str, folder: Path, other_folder: Path) -> None:
    here = bench_of(folder, kind, dtype=dtype)
    assert here.frozen
    assert bench_of(folder, kind, dtype=dtype, seed=1).frozen != here.frozen
    there = bench_of(other_folder, kind, dtype=dtype)
    assert (there.frozen == here.frozen) == (kind not in FROM_WEIGHTS), "the backbone has a digest of its own"


@pytest.mark.parametrize("kind", DRAWN)
def test_the_digest_is_of_every_added_part_that_is_not_trained_and_of_no_other(kind: str, folder: Path) -> None:
    bench = bench_of(folder, kind)
    added = {
        name: tensor
        for name, tensor in benches._tensors(bench.tuned.model).items()
        if name not in bench.tuned.trainable() and re.search(r"\.(lora|vera)_", name)
    }
    assert added
    assert benches._digest(added) == bench.frozen
    for name, tensor in added.items():
        changed = tensor.detach().clone()
        changed.view(-1)[-1] += 1
        assert benches._digest(added | {name: changed}) != bench.frozen
        assert benches._digest(added | {name: tensor.reshape(-1)}) != bench.frozen
        assert benches._digest({other: one for other, one in added.items() if other != name}) != bench.frozen


def test_a_digest_sees_names_shapes_formats_and_values() -> None:
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    others = [
        {"a": tensor, "b": tensor},
        {"b": tensor},
        {"a": tensor.reshape(3, 2)},
        {"a": tensor.T.contiguous().T.reshape(3, 2)},
        {"a": tensor.bfloat16()},
        {"a": -tensor},
        {"a": tensor.view(torch.int32)},
    ]
    digests = {benches._digest({"a": tensor}), *map(benches._digest, others)}
    assert len(digests) == len(others)  # two of the others are the same
    assert benches._digest({"a": tensor.T.contiguous().T}) == benches._digest({"a": tensor})
    assert benches._digest({}) == ""


def test_an_adapter_is_read_and_set(folder: Path) -> None:
    bench = bench_of(folder)
    generator = np.random.default_rng(0)
    values = {name: generator.normal(size=one.shape).astype(np.float32) for name, one in bench.adapter().items()}
    bench.load(values)
    read = bench.adapter()
    assert read.keys() == values.keys()
    for name, array in values.items():
        np.testing.assert_array_equal(read[name], array)
        read[name] += 1
        np.testing.assert_array_equal(bench.adapter()[name], array)  # what was read is a copy


def test_an_adapter_is_rounded_to_the_models_number_format(folder: Path) -> None:
    bench = bench_of(folder, dtype="bfloat16")
    values = {name: np.full(one.shape, 1 + 2**-12, np.float32) for name, one in bench.adapter().items()}
    bench.load(values)
    assert all((array == 1).all() for array in bench.adapter().values())


def test_an_adapter_of_another_shape_or_name_is_refused_whole(folder: Path) -> None:
    bench = bench_of(folder)
    before = bench.adapter()
    name = min(before)
    moved = {key: array + 1 for key, array in before.items()}
    for wrong in (
        {},
        {key: array for key, array in moved.items() if key != name},
        moved | {"more": np.zeros(1, np.float32)},
        moved | {name: moved[name].T.copy()},
        moved | {name: moved[name].reshape(-1)},
    ):
        with pytest.raises(MalformedMessage, match="the adapter's tensors are not those"):
            bench.load(wrong)
    after = bench.adapter()
    assert all(np.array_equal(after[key], array) for key, array in before.items())


# An emulator in the place of the backbone.


def plan_of(kind: str, *, ends: tuple[int, int] = (2, 2), delivery: str = "emulator", more: str = "") -> Plan:
    text = f"""
        [model]
        backbone = "anywhere"
        dtype = "float32"
        {more}
        [delivery]
        kind = "{delivery}"
        first = {ends[0]}
        last = {ends[1]}
        [training]
        rounds = 2
        steps = 10
        {optimizer(kind)}
        [tuning]
        kind = {KINDS[kind]}
    """
    return plans.parse(text, registered(), None)


def write_emulator(path: Path, plan: Plan, backbone_folder: Path, middle: tuple[int, ...] = (2, 5, 5, 8)) -> Path:
    """One with repeated blocks, low-rank and in 4 bits: all that an emulator can be."""
    model = backbone.load_model(
        backbone_folder, task=plan.model.task, dtype="float32", labels=plan.model.labels, seed=plan.training.seed
    )
    assert plan.delivery.ends is not None
    layout = Layout(split(len(describe(model).blocks), plan.delivery.ends), middle)
    batch = {"input_ids": torch.arange(2, 18).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    emulator, layout = quantised(*factorised(assemble(model, layout), layout, 0.5, [batch]))
    path.mkdir(exist_ok=True)
    stored.save(
        emulator, backbone.load_tokenizer(backbone_folder), Record(layout, plan.emulator_digest, "0" * 64, 0), path
    )
    return path


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # More than ten blocks, so that block 1 and block 11 could be taken for each other.
    return write_backbone(tmp_path_factory.mktemp("deep"), seed=3, layers=12)


@pytest.fixture(scope="module")
def emulator_folder(deep_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_emulator(tmp_path_factory.mktemp("emulator"), plan_of("lora"), deep_folder)


@pytest.mark.parametrize("kind", BY_BLOCK)
def test_what_is_tuned_on_an_emulator_is_at_home_in_the_backbone(
    kind: str, deep_folder: Path, emulator_folder: Path
) -> None:
    plan = plan_of(kind)
    away, home = Bench(plan, emulator_folder), Bench(plan, deep_folder)
    assert away.record is not None
    assert home.record is None
    here, there = away.adapter(), home.adapter()
    assert {name: array.shape for name, array in here.items()} == {name: array.shape for name, array in there.items()}
    assert all(np.array_equal(here[name], there[name]) for name in here), "drawn alike, although never sent"
    assert away.frozen == home.frozen
    assert away.own().keys() == home.own().keys()
    # Only what lies outside the middle.
    numbers = {int(found[1]) for name in here if (found := re.search(r"model\.layers\.(\d+)\.", name))}
    assert numbers <= {0, 1, 10, 11}
    assert numbers or kind in ("prompt-tuning", "p-tuning", "fedkseed")
    generator = np.random.default_rng(1)
    moved = {name: array + generator.normal(size=array.shape).astype(np.float32) for name, array in here.items()}
    away.load(moved)
    home.load(away.adapter())
    assert all(np.array_equal(array, moved[name]) for name, array in home.adapter().items())


@pytest.mark.parametrize("kind", ["lora", "full", "fed-sb"])
def test_a_backbone_with_ends_is_tuned_at_them_only(kind: str, deep_folder: Path) -> None:
    outer = Bench(plan_of(kind, delivery="adapter", ends=(1, 3)), deep_folder).adapter()
    assert {int(re.findall(r"layers\.(\d+)\.", name)[0]) for name in outer} == {0, 9, 10, 11}


def test_training_on_an_emulator_moves_the_tuned_blocks_alone(emulator_folder: Path) -> None:
    bench = Bench(plan_of("full"), emulator_folder)
    before = {name: tensor.clone() for name, tensor in benches._tensors(bench.tuned.model).items()}
    ids = torch.arange(2, 18).view(2, 8)
    bench.tuned.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in bench.tuned.trainable().values():
            assert parameter.grad is not None
            parameter.add_(parameter.grad, alpha=-0.1)
    changed = {
        name for name, tensor in benches._tensors(bench.tuned.model).items() if not torch.equal(tensor, before[name])
    }
    # In the emulator, whose stand-in is of four blocks, the last two have other numbers.
    assert {int(re.findall(r"layers\.(\d+)\.", name)[0]) for name in changed} == {0, 1, 6, 7}


def test_an_emulator_of_another_plan_is_refused(emulator_folder: Path, deep_folder: Path) -> None:
    with pytest.raises(EmulatorError, match="made for another Plan"):
        Bench(plan_of("lora", ends=(1, 2)), emulator_folder)
    with pytest.raises(EmulatorError, match="leave nothing between them in 12 blocks"):
        Bench(plan_of("lora", ends=(6, 6)), deep_folder)


def test_a_method_that_reaches_into_every_block_is_refused_by_the_plan() -> None:
    assert set(KINDS) - set(BY_BLOCK) == {"prefix-tuning", "lst"}
    for kind in ("prefix-tuning", "lst"):
        for delivery in ("adapter", "emulator"):
            with pytest.raises(PlanError, match=f"'{kind}' reaches into every block"):
                plan_of(kind, delivery=delivery)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_classifiers_head_is_tuned_on_both(kind: str, deep_folder: Path, tmp_path: Path) -> None:
    """It is drawn from the seed where the backbone is; the emulator brings it along."""
    plan = plan_of(kind, more='task = "sequence-classification"\nlabels = 3')
    folder = write_emulator(tmp_path, plan, deep_folder)
    away, home = Bench(plan, folder), Bench(plan, deep_folder)
    here, there = away.adapter(), home.adapter()
    assert any("score" in name for name in here)
    assert here.keys() == there.keys()
    assert all(np.array_equal(here[name], there[name]) for name in here)
