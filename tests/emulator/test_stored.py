"""An emulator in a folder: it comes back as it was, and whatever does not fit together is refused."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, LABELS, deep, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_bench import write_backbone
from transformers import PreTrainedModel

from farfield.emulator import backbone, stored
from farfield.emulator.assemble import assemble, tensors
from farfield.emulator.factorise import factorised
from farfield.emulator.layout import LAYOUT, Layout, Record
from farfield.emulator.quantise import quantised
from farfield.emulator.split import split
from farfield.emulator.streams import run
from farfield.protocols.errors import BackboneError, EmulatorError, FarfieldError

PARTS = split(6, (1, 2))
LAYOUT_HERE = Layout(PARTS, (2, 3, 3))

SOME_FAMILIES = ("llama", "gpt2", "roberta", "vit")
"""One of each kind that differs here: no bias, transposed and tied, an encoder, no text."""


class Words:
    """Stands for a tokenizer where there is nothing to read."""

    def save_pretrained(self, folder: Path) -> None: ...


def made(model: PreTrainedModel, batch: dict[str, torch.Tensor], kind: str) -> tuple[PreTrainedModel, Layout]:
    emulator, layout = assemble(model, LAYOUT_HERE), LAYOUT_HERE
    if "low-rank" in kind:
        emulator, layout = factorised(emulator, layout, 0.5, [batch])
    if "nf4" in kind:
        emulator, layout = quantised(emulator, layout)
    return emulator, layout


def write(emulator: PreTrainedModel, layout: Layout, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer: Any = Words()
    stored.save(emulator, tokenizer, Record(layout, "0" * 64, "0" * 64, 0), folder)
    return folder


def load(folder: Path, family: str = "llama", dtype: str = "float32") -> PreTrainedModel:
    task = FAMILIES[family].task
    labels = LABELS if task == "sequence-classification" else None
    return stored.load(folder, task=task, dtype=dtype, labels=labels)[0]


@pytest.mark.parametrize(
    ("family", "kind"),
    [(family, kind) for family in FAMILIES for kind in ("plain", "low-rank, nf4")]
    + [(family, kind) for family in SOME_FAMILIES for kind in ("low-rank", "nf4")],
)
def test_it_comes_back_as_it_was(family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep(family)
    emulator, layout = made(model, text(family), kind)
    write(emulator, layout, tmp_path)
    if family == "vit":  # of no task that a Plan can have, and so of no class that is looked for
        monkeypatch.setattr(backbone, "model_class", lambda *_, **__: (backbone._config(tmp_path), type(model)))
    back, record = stored.load(tmp_path, task=FAMILIES[family].task, dtype="float32", labels=LABELS, attention=None)
    assert record.layout == layout
    ours, theirs = tensors(back), tensors(emulator)
    assert {name: (one.shape, one.dtype) for name, one in ours.items()} == {
        name: (one.shape, one.dtype) for name, one in theirs.items()
    }
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(run(back, text(family)).logits, run(emulator, text(family)).logits)
    assert not back.training
    assert not any(parameter.requires_grad for parameter in back.parameters())


@pytest.mark.parametrize("kind", ["plain", "low-rank, nf4"])
@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "opt", "bert"])
def test_it_comes_back_in_bfloat16(family: str, kind: str, tmp_path: Path) -> None:
    deep(family).save_pretrained(tmp_path / "backbone")
    task = FAMILIES[family].task
    labels = LABELS if task == "sequence-classification" else None
    model = backbone.load_model(tmp_path / "backbone", task=task, dtype="bfloat16", labels=labels)
    whole = assemble(model, Layout(PARTS, tuple(PARTS.middle)))
    assert torch.equal(run(whole, text(family)).logits, run(model, text(family)).logits)
    emulator, layout = made(model, text(family), kind)
    back = load(write(emulator, layout, tmp_path / "emulator"), family, "bfloat16")
    assert back.dtype == torch.bfloat16
    assert torch.equal(run(back, text(family)).logits, run(emulator, text(family)).logits)


def test_another_number_format_leaves_four_bits_as_they_are(tmp_path: Path) -> None:
    emulator, layout = made(deep("llama"), text("llama"), "nf4")
    back = tensors(load(write(emulator, layout, tmp_path), dtype="bfloat16"))
    for name, tensor in tensors(emulator).items():
        exact = name.endswith((".packed", ".scales"))
        assert back[name].dtype == (tensor.dtype if exact else torch.bfloat16)
        assert torch.equal(back[name], tensor if exact else tensor.bfloat16())


def test_the_file_holds_the_blocks_that_remain_and_no_other_of_the_middle(tmp_path: Path) -> None:
    for family in SOME_FAMILIES:
        model = deep(family)
        folder = write(assemble(model, LAYOUT_HERE), LAYOUT_HERE, tmp_path / family)
        held = [tensor for tensor in load_file(folder / stored.WEIGHTS).values() if tensor.numel() > 1]
        for number in PARTS.middle:
            block = model.get_submodule(f"{FAMILIES[family].blocks}.{number}")
            found = [any(torch.equal(one, tensor) for tensor in held) for one in block.parameters()]
            assert all(found) if number in LAYOUT_HERE.middle else not any(found), (family, number)


@pytest.mark.parametrize("kind", ["low-rank", "nf4", "low-rank, nf4"])
def test_compressed_matrices_of_the_middle_are_not_in_the_file(kind: str, tmp_path: Path) -> None:
    """Norms and biases of the blocks that remain are: they are not compressed."""
    for family in SOME_FAMILIES:
        model = deep(family)
        emulator, layout = made(model, text(family), kind)
        folder = write(emulator, layout, tmp_path / family)
        held = list(load_file(folder / stored.WEIGHTS).values())
        path = FAMILIES[family].blocks
        middle = {
            name: tensor
            for name, tensor in tensors(model).items()
            if any(name.startswith(f"{path}.{number}.") for number in PARTS.middle)
        }
        there = {name for name, one in middle.items() if any(torch.equal(one, tensor) for tensor in held)}
        assert there == {
            name
            for name, tensor in middle.items()
            if tensor.dim() == 1 and int(name.removeprefix(f"{path}.").partition(".")[0]) in layout.middle
        }


def test_each_shared_tensor_is_stored_once(tmp_path: Path) -> None:
    emulator, layout = made(deep("gpt2"), text("gpt2"), "plain")
    with safe_open(write(emulator, layout, tmp_path) / stored.WEIGHTS, "pt") as file:
        names = set(file.keys())
    assert not any(name.startswith("transformer.h.3.") for name in names), "the same block once more"
    assert {name for name in names if "wte" in name or "lm_head" in name} == {"transformer.wte.weight"}


def test_no_path_of_the_owners_machine_is_in_it(tmp_path: Path) -> None:
    folder = write_backbone(tmp_path / "somewhere-secret", seed=1, layers=6)
    model = backbone.load_model(folder, task="causal-lm", dtype="float32")
    (tmp_path / "out").mkdir()
    layout = Layout(PARTS, (1,))
    stored.save(
        assemble(model, layout),
        backbone.load_tokenizer(folder),
        Record(layout, "0" * 64, "0" * 64, 0),
        tmp_path / "out",
    )
    files = list((tmp_path / "out").iterdir())
    assert {"config.json", LAYOUT, stored.WEIGHTS, "tokenizer.json"} <= {file.name for file in files}
    assert not any(b"somewhere-secret" in file.read_bytes() for file in files)


# What is refused.


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    emulator, layout = made(deep("llama"), text("llama"), "low-rank, nf4")
    return write(emulator, layout, tmp_path_factory.mktemp("sound"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    for file in sound.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def refusal(folder: Path) -> str:
    with pytest.raises(EmulatorError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


UP = "model.layers.1.mlp.up_proj.up"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(NORM), f"lacks a tensor: '{NORM}'"),
        (lambda held: held.pop(f"{UP}.scales"), "lacks a tensor"),
        (lambda held: held.update(more=torch.zeros(1)), "has a tensor too many: 'more'"),
        # A name that is there twice in the model, once in the file.
        (lambda held: held.update({NORM.replace("1", "3"): torch.zeros(32)}), "has a tensor too many"),
        (lambda held: held.update({NORM: torch.zeros(33)}), r"is of shape [33], and its configuration wants [32]"),
        (lambda held: held.update({NORM: torch.zeros(32, 1)}), r"is of shape [32, 1]"),
        (lambda held: held.update({NORM: torch.zeros(())}), r"is of shape []"),
        (lambda held: held.update({f"{UP}.packed": torch.zeros(3, dtype=torch.uint8)}), "is of shape [3]"),
        (lambda held: held.update({f"{UP}.packed": held[f"{UP}.packed"].to(torch.int8)}), "numbers of the kind"),
        (lambda held: held.update({f"{UP}.packed": held[f"{UP}.packed"].float()}), "numbers of the kind"),
        (lambda held: held.update({f"{UP}.scales": held[f"{UP}.scales"].float()}), "numbers of the kind"),
        (lambda held: held.update({NORM: torch.zeros(32, dtype=torch.int64)}), "numbers of the kind torch.int64"),
        (lambda held: held.update({NORM: torch.zeros(32, dtype=torch.complex64)}), "numbers of the kind"),
        (lambda held: held.update({NORM: torch.zeros(32).to(torch.float8_e4m3fn)}), "numbers of the kind"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    held = load_file(folder / stored.WEIGHTS)
    change(held)
    save_file(held, folder / stored.WEIGHTS)
    said = refusal(folder)
    assert message in said
    assert stored.WEIGHTS in said
    assert said.endswith("Build it again with `coordinator emulator build`.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layout: layout["ranks"].update({"2.mlp.nothing": 4}), "gives a rank to '2.mlp.nothing'"),
        (lambda layout: layout["ranks"].update({"2.input_layernorm": 4}), "gives a rank to '2.input_layernorm'"),
        (lambda layout: layout["ranks"].update({"2.mlp.up_proj": 5}), "is of shape"),
        (lambda layout: layout["ranks"].update({"2.mlp.up_proj": 10**15}), "is of shape"),
        (lambda layout: layout["ranks"].pop("2.mlp.up_proj"), "tensor"),
        (lambda layout: layout.update(quantization="none"), "tensor"),
        (lambda layout: layout.update(middle=[2, 2, 3]), "tensor"),
        (lambda layout: layout.update(middle=[2, 3]), "says 6 layers, and the emulator's record says 5"),
        (lambda layout: layout["split"].update(depth=7, last=3), "says 6 layers, and the emulator's record says 7"),
    ],
)
def test_a_record_that_does_not_fit_the_weights_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit(folder / LAYOUT, lambda document: change(document["layout"]))
    assert message in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 2**40, "head_dim": 2**38},
        {"intermediate_size": 2**50},
        {"vocab_size": 2**45},
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": "six"},
        {"num_attention_heads": 0},
        {"num_attention_heads": -4, "head_dim": None},
        {"num_key_value_heads": 3},
        {"hidden_size": -1},
        {"hidden_act": "nonsense"},
        {"rope_parameters": {"rope_type": "nonsense"}},
    ],
    ids=str,
)
def test_an_absurd_configuration_is_refused_before_memory_is_taken(folder: Path, change: dict[str, Any]) -> None:
    edit(folder / "config.json", lambda config: config.update(change))
    with pytest.raises((EmulatorError, BackboneError)):
        load(folder)


def test_tables_out_of_all_proportion_are_refused(tmp_path: Path) -> None:
    """Nothing in the file is as long as these, which are made when the model is."""
    from transformers import GPTJConfig, GPTJForCausalLM

    config: Any = GPTJConfig(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, rotary_dim=4)
    made: Any = GPTJForCausalLM(config)
    model = made.eval()
    layout = Layout(split(3, (1, 1)), (1,))
    folder = write(assemble(model, layout), layout, tmp_path)
    load(folder)
    edit(folder / "config.json", lambda config: config.update(n_positions=10**12))
    assert "asks for tables of" in refusal(folder)


@given(st.integers(0, 2**32))
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_that_is_cut_off_or_damaged_is_refused(folder: Path, sound: Path, seed: int) -> None:
    generator, content = random.Random(seed), (sound / stored.WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    place = generator.randrange(end)
    if generator.random() < 0.5:
        damaged = content[: generator.randrange(len(content))]
    else:
        damaged = content[:place] + bytes([content[place] ^ (1 << generator.randrange(8))]) + content[place + 1 :]
    (folder / stored.WEIGHTS).write_bytes(damaged)
    try:
        load(folder)
    except FarfieldError as error:
        assert isinstance(error, EmulatorError)
    else:
        assert len(damaged) == len(content), "a letter of the metadata may change"


def test_files_that_are_missing_are_refused(folder: Path) -> None:
    content = (folder / stored.WEIGHTS).read_bytes()
    (folder / stored.WEIGHTS).unlink()
    assert "no valid safetensors file" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    assert "no valid safetensors file" in refusal(folder)
    (folder / stored.WEIGHTS).write_bytes(content)
    (folder / LAYOUT).unlink()
    assert "there is no emulator.json" in refusal(folder)


def test_code_is_never_run(folder: Path) -> None:
    edit(folder / "config.json", lambda config: config.update(auto_map={"AutoModelForCausalLM": "evil.Model"}))
    with pytest.raises(BackboneError, match="asks to run Python code"):
        load(folder)


def test_the_record_is_what_was_written(sound: Path) -> None:
    record = stored.load(sound, task="causal-lm", dtype="float32")[1]
    assert dataclasses.replace(record.layout, ranks={}) == Layout(PARTS, (2, 3, 3), {}, "nf4")
