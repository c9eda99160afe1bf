"""Loading a local folder, and each way in which a folder can be unfit."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, LABELS, batch, build
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from farfield.emulator import backbone
from farfield.protocols.errors import BackboneError

hf: Any = transformers  # whose constructors are untyped

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to leave the machine fails the test, even where the library would swallow the error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("something tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)


def write_tokenizer(folder: Path, **special: str) -> None:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{index}": index for index in range(4, 64)}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama with its tokenizer."""
    build("llama").save_pretrained(tmp_path / "llama")
    write_tokenizer(tmp_path / "llama", eos_token="</s>")
    return tmp_path / "llama"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sharded(folder: Path) -> None:
    """Split the weights of `folder` over two files and an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
    weight_map = {key: file for file, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def logits(model: torch.nn.Module, family: str) -> torch.Tensor:
    inputs = {name: value for name, value in batch(family).items() if name != "labels"}
    with torch.no_grad():
        out: torch.Tensor = model(**inputs).logits
    return out


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.task == "causal-lm"])
def test_a_language_model_loads_as_it_was_saved(family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved = build(family)
    saved.save_pretrained(tmp_path)
    capfd.readouterr()
    model = backbone.load_model(tmp_path, task="causal-lm", dtype="float32")
    assert capfd.readouterr() == ("", "")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model, family), logits(saved, family))


def test_weights_are_converted_to_the_dtype_asked_for(folder: Path) -> None:
    model = backbone.load_model(folder, task="causal-lm", dtype="bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_shards_load_like_one_file(folder: Path) -> None:
    before = backbone.load_model(folder, task="causal-lm", dtype="float32")
    sharded(folder)
    after = backbone.load_model(folder, task="causal-lm", dtype="float32")
    assert torch.equal(logits(before, "llama"), logits(after, "llama"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "distilbert"])
def test_a_new_head_comes_from_the_seed_alone(family: str, tmp_path: Path) -> None:
    saved: Any = build(family)
    saved.base_model.save_pretrained(tmp_path)
    heads: list[list[torch.Tensor]] = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(heads))
        before = torch.get_rng_state()
        model: Any = backbone.load_model(tmp_path, task="sequence-classification", dtype="float32", labels=5, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert not model.training
        own = saved.base_model.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in model.base_model.state_dict().items())
        head = model.score if hasattr(model, "score") else model.classifier
        heads.append([value.clone() for value in head.state_dict().values()])
        assert heads[-1][-1].shape[0] == 5
    same = [all(torch.equal(one, other) for one, other in zip(heads[0], heads[index], strict=True)) for index in (1, 2)]
    assert same == [True, False]


def test_a_head_for_exactly_these_classes_is_kept_and_any_other_is_drawn_anew(tmp_path: Path) -> None:
    saved = build("bert")
    saved.save_pretrained(tmp_path)
    kept = backbone.load_model(tmp_path, task="sequence-classification", dtype="float32", labels=LABELS)
    assert torch.equal(logits(kept, "bert"), logits(saved, "bert"))
    other = backbone.load_model(tmp_path, task="sequence-classification", dtype="float32", labels=LABELS + 1)
    assert logits(other, "bert").shape[1] == LABELS + 1


def test_a_decoder_that_classifies_knows_what_padding_is(folder: Path) -> None:
    edit(folder / "config.json", pad_token_id=None)
    model = backbone.load_model(folder, task="sequence-classification", dtype="float32", labels=2)
    tokenizer = backbone.load_tokenizer(folder)
    assert tokenizer.pad_token == "</s>"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2


def test_a_decoder_without_tokenizer_pads_with_its_end_of_text(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    edit(tmp_path / "config.json", pad_token_id=None, eos_token_id=[7, 8])
    model = backbone.load_model(tmp_path, task="sequence-classification", dtype="float32", labels=2)
    assert model.config.pad_token_id == 7


def test_a_padding_token_of_its_own_is_kept(folder: Path) -> None:
    write_tokenizer(folder, eos_token="</s>", pad_token="<pad>")
    assert backbone.load_tokenizer(folder).pad_token == "<pad>"


def drop_weight(folder: Path, name: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def reshape_weight(folder: Path, name: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def index_names(folder: Path, shard: str | None) -> None:
    """Shard the weights, and let the index say that the head is in `shard`; without one, that there are none."""
    sharded(folder)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map={} if shard is None else weight_map | {"lm_head.weight": shard})


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "llama: no such folder"),
    "no config": (lambda at: (at / "config.json").unlink(), "there is no config.json"),
    "config is no JSON": (lambda at: (at / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    "config is no object": (lambda at: (at / "config.json").write_text("[]"), r"config\.json: not a JSON object"),
    "config is binary": (lambda at: (at / "config.json").write_bytes(b"\xff\xfe"), r"config\.json: not valid JSON"),
    "no model type": (lambda at: (at / "config.json").write_text("{}"), "'model_type' is missing"),
    "an adapter": (lambda at: (at / "adapter_config.json").write_text("{}"), "an adapter, not a backbone"),
    "remote model code": (
        lambda at: edit(at / "config.json", auto_map={"AutoModel": "evil.Model"}),
        r"config\.json: 'auto_map' asks to run Python code",
    ),
    "remote tokenizer code": (
        lambda at: edit(at / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        r"tokenizer_config\.json: 'auto_map' asks to run Python code",
    ),
    "remote kernel": (
        lambda at: edit(at / "config.json", attn_implementation="evil/kernel"),
        "'attn_implementation' names code on the hub",
    ),
    "quantised": (
        lambda at: edit(at / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "already quantised",
    ),
    "pickle only": (to_pickle, r"pickle format only \(pytorch_model\.bin\)"),
    "no weights": (lambda at: (at / WEIGHTS).unlink(), r"neither model\.safetensors nor"),
    "truncated weights": (
        lambda at: (at / WEIGHTS).write_bytes((at / WEIGHTS).read_bytes()[:-64]),
        r"model\.safetensors: no valid safetensors file",
    ),
    "weights are noise": (lambda at: (at / WEIGHTS).write_bytes(b"\xff" * 100), "no valid safetensors file"),
    "empty weights": (lambda at: (at / WEIGHTS).write_bytes(b""), "no valid safetensors file"),
    "missing shard": (lambda at: index_names(at, "c.safetensors"), r"shard 'c\.safetensors' is missing"),
    "shard elsewhere": (lambda at: index_names(at, "../c.safetensors"), r"shard '\.\./c\.safetensors' lies outside"),
    "shard without its tensor": (
        lambda at: index_names(at, "b.safetensors"),
        r"b\.safetensors: 'lm_head.weight' is not",
    ),
    "empty index": (
        lambda at: index_names(at, None),
        "'weight_map' is missing or empty",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_an_unfit_folder_is_refused_in_one_sentence(what: str, folder: Path) -> None:
    spoil, complaint = BROKEN[what]
    spoil(folder)
    for use in (backbone.check, lambda at: backbone.load_model(at, task="causal-lm", dtype="float32")):
        with pytest.raises(BackboneError, match=complaint) as caught:
            use(folder)
        assert "\n" not in str(caught.value)


def test_a_fit_folder_passes(folder: Path) -> None:
    backbone.check(folder)
    sharded(folder)
    backbone.check(folder)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (
            lambda at: drop_weight(at, "model.layers.1.mlp.up_proj.weight"),
            r"missing or .*: model\.layers\.1\.mlp\.up_proj",
        ),
        (lambda at: drop_weight(at, "lm_head.weight"), r"missing or of another shape: lm_head\.weight"),
        (lambda at: reshape_weight(at, "model.norm.weight"), r"of another shape: model\.norm\.weight"),
        (lambda at: edit(at / "config.json", model_type="nonesuch"), r"config\.json: not understood"),
    ],
)
def test_weights_are_never_made_up(spoil: Callable[[Path], None], complaint: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(BackboneError, match=complaint):
        backbone.load_model(folder, task="causal-lm", dtype="float32")


def test_a_classifier_with_a_hole_is_refused_too(tmp_path: Path) -> None:
    build("bert").save_pretrained(tmp_path)
    drop_weight(tmp_path, "bert.pooler.dense.weight")
    with pytest.raises(BackboneError, match=r"bert\.pooler\.dense\.weight"):
        backbone.load_model(tmp_path, task="sequence-classification", dtype="float32", labels=LABELS)


def test_an_encoder_is_no_language_model(tmp_path: Path) -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    hf.BertForMaskedLM(hf.BertConfig(vocab_size=64, **tiny)).save_pretrained(tmp_path / "whole")
    with pytest.raises(BackboneError, match="BertLMHeadModel is an encoder"):
        backbone.load_model(tmp_path / "whole", task="causal-lm", dtype="float32")
    build("bert").save_pretrained(tmp_path / "headless")
    with pytest.raises(BackboneError, match=r"cls\.predictions"):
        backbone.load_model(tmp_path / "headless", task="causal-lm", dtype="float32")


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_an_image_model_does_not_read_text(task: str, tmp_path: Path) -> None:
    build("vit").save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="cannot load a 'vit' for task"):
        backbone.load_model(tmp_path, task=task, dtype="float32", labels=LABELS)


def test_a_classifier_needs_its_number_of_classes(folder: Path) -> None:
    with pytest.raises(BackboneError, match=r"Set model\.labels"):
        backbone.load_model(folder, task="sequence-classification", dtype="float32")


def test_a_missing_or_broken_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BackboneError, match="the tokenizer cannot be read"):
        backbone.load_tokenizer(folder)
    build("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(BackboneError, match="holds no tokenizer"):
        backbone.load_tokenizer(tmp_path / "bare")
    write_tokenizer(tmp_path / "bare")
    with pytest.raises(BackboneError, match="neither a padding nor an end-of-text token"):
        backbone.load_tokenizer(tmp_path / "bare")


def test_names_resolve_to_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backbone.resolve("models/llama", tmp_path) == tmp_path / "models/llama"
    assert backbone.resolve("/models/llama", tmp_path) == Path("/models/llama")
    package = tmp_path / "package"
    (package / "builtin" / "tiny-llama-py").mkdir(parents=True)
    (package / "builtin" / "tiny-llama-py" / "config.json").write_text("{}")
    monkeypatch.setattr(backbone, "__file__", str(package / "backbone.py"))
    assert backbone.resolve("builtin:tiny-llama-py", tmp_path) == package / "builtin" / "tiny-llama-py"
    for wrong in ("builtin:tiny-lama-py", "builtin:", "builtin:../builtin/tiny-llama-py"):
        with pytest.raises(BackboneError, match=r"no builtin backbone .*tiny-llama-py"):
            backbone.resolve(wrong, tmp_path)
    shutil.rmtree(package / "builtin")
    with pytest.raises(BackboneError, match="carries none"):
        backbone.resolve("builtin:tiny-llama-py", tmp_path)


def test_the_fingerprint_covers_what_counts_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    before = backbone.fingerprint(folder)
    assert len(before) == 64
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("notes")
    assert backbone.fingerprint(tmp_path / "copy") == before
    for name in ("config.json", "tokenizer.json", WEIGHTS):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert backbone.fingerprint(folder) != before, name
        (folder / name).write_bytes(content)
    (folder / "config.json").rename(folder / "generation_config.json")
    assert backbone.fingerprint(folder) != before


def test_a_fresh_process_without_settings_reaches_for_nothing(folder: Path) -> None:
    program = f"""
import socket
def refuse(*args, **kwargs): raise SystemExit("network")
socket.socket.connect = socket.getaddrinfo = refuse
from pathlib import Path
from farfield.emulator import backbone
at = Path({str(folder)!r})
backbone.load_model(at, task="sequence-classification", dtype="bfloat16", labels=2)
backbone.load_tokenizer(at)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
