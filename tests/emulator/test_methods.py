"""The contract of every registered tuning method, on every family. A new method is tested by being registered."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, batch, build
from pydantic import ValidationError

from farfield.emulator.descent import descend
from farfield.emulator.methods import Setting, Tuned, TuningMethod, registered
from farfield.protocols.errors import TuningError
from farfield.protocols.sections import Training, TuningSettings

SEED = 5
STEPS = 4

SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "fed-sb": {"rank": 8},
    "adalora": {"initial_rank": 4, "target_rank": 2, "interval": 1},
    "lokr": {"rank": 2},
    "vera": {"rank": 8},
    "prompt-tuning": {"tokens": 3},
    "p-tuning": {"tokens": 3},
    "prefix-tuning": {"tokens": 3},
    "fedkseed": {"pool": 8},
    "bottleneck": {"width": 4},
    "lst": {"reduction": 4},
    "lora-fa": {"rank": 4},
    "meft": {"rank": 4},
    "galore": {"rank": 4},
}
"""Settings that suit a tiny model; a method that is not here is tested as it comes."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ffa-lora": ("lora", {"rank": 4, "freeze_a": True}),
    "rolora": ("lora", {"rank": 4, "alternate": True}),
    "fedsa-lora": ("lora", {"rank": 4, "local_b": True}),
    "dora": ("lora", {"rank": 4, "dora": True}),
    "rslora": ("lora", {"rank": 4, "rslora": True}),
    "prefix-tuning-projected": ("prefix-tuning", {"tokens": 3, "projection": True}),
    "parallel": ("bottleneck", {"width": 4, "placement": "parallel"}),
    "lokr-both": ("lokr", {"rank": 2, "decompose_both": True, "factor": 4}),
}


def method_of(kind: str, **settings: Any) -> TuningMethod:
    """The method as a Plan makes it."""
    return registered()[kind].model_validate({"kind": kind, **settings})


METHODS: dict[str, TuningMethod] = {kind: method_of(kind, **SMALL.get(kind, {})) for kind in registered()} | {
    name: method_of(kind, **settings) for name, (kind, settings) in VARIANTS.items()
}

ENCODERS = ("bert", "roberta", "distilbert")
VIRTUAL_TOKENS = ("prompt-tuning", "p-tuning", "prefix-tuning")

REFUSED: dict[tuple[str, str], str] = (
    # peft wraps nn.Linear for these two, and GPT-2 is made of Conv1D.
    {(kind, "gpt2"): "this layer is a Conv1D" for kind in ("bitfit", "lokr")}
    # Pixels are no sequence that tokens could stand before.
    | {(kind, "vit"): "this model reads pixel_values" for kind in VIRTUAL_TOKENS}
    # A prefix is a cache of keys and values, and encoders have none.
    | {("prefix-tuning", family): "an encoder takes none" for family in ENCODERS}
    # With embeddings for input, transformers reads a padded batch at the padding.
    | {(kind, "llama-classifier"): "finds the last token" for kind in ("prompt-tuning", "p-tuning")}
)
"""Each pair of a method and a family that cannot be, with what the refusal says."""

UNMERGEABLE: dict[tuple[str, str], str] = (
    # Nothing of these is in the model's own weights.
    {(kind, name): "nothing to fold" for kind in (*VIRTUAL_TOKENS, "bottleneck", "lst", "meft") for name in FAMILIES}
    # No bias anywhere, so none that a trained one could be added to.
    | {
        (kind, family): "no bias here"
        for kind in ("bitfit", "ssf")
        for family in ("llama", "mistral", "qwen3", "gemma", "falcon", "llama-classifier")
    }
    | {("ssf", "qwen2"): "no bias here"}  # none but at queries, keys and values
)
"""Each pair that trains but cannot be merged, with what the refusal says."""

CONSTANT_START = {"ia3", "bitfit", "full", "mezo", "ssf", "lst", "galore"}
"""Methods that draw nothing: scales start at one, biases at zero, the model's own weights as they are."""

NOT_OF_PEFT = {"full", "fedkseed", "mezo", "bottleneck", "ssf", "lst", "galore", "meft"}
"""Methods that `peft` does not have, and so no format for; they have tests of their own."""

STANDING_FOR_WEIGHTS = {"fedkseed"}
"""Methods whose trained parameters, in float32, say what becomes of weights that are not trained themselves."""

SOME_FAMILIES = ("llama", "gpt2", "roberta", "vit")
"""One of each kind that `peft` treats apart: shared keys, Conv1D, a head of two layers, no text."""

ALIKE = {"fedkseed", "galore", "lora-fa"}
"""Methods that meet a model by the same code as another, which is tested on every family; on some, as the variants."""

PAIRS = [
    (name, family)
    for name, method in METHODS.items()
    for family in (SOME_FAMILIES if name in VARIANTS or name in ALIKE else FAMILIES)
    if (method.kind, family) not in REFUSED
]

pytestmark = [
    # Of peft 0.21 on transformers 5.23, where a test loads an adapter as its later user would.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term:UserWarning"),
]


def install(name: str, family: str, *, seed: int = SEED, dtype: torch.dtype = torch.float32) -> Tuned:
    tuned = METHODS[name].install(build(family, dtype), Setting(FAMILIES[family].task, seed, STEPS))
    tuned.model.eval()
    return tuned


def train(tuned: Tuned, family: str, dtype: torch.dtype = torch.float32) -> None:
    """`STEPS` steps on the same batch as the trainer makes them: of AdamW, or the method's own."""
    if tuned.descent is not None:
        start = {name: value.detach().float().numpy().copy() for name, value in tuned.trainable().items()}
        plain = Training(rounds=1, steps=STEPS, optimizer="sgd", learning_rate=1e-2)
        descend(tuned, start, plain, lambda _: lambda _: _loss(tuned, family, dtype), seed=SEED, steps=STEPS)
        if tuned.settled is not None:
            tuned.settled()
        return
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
    for step in range(STEPS):
        tuned.model(**batch(family, dtype)).loss.backward()
        if tuned.after_backward is not None:
            tuned.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()


def _loss(tuned: Tuned, family: str, dtype: torch.dtype) -> float:
    with torch.no_grad():
        return float(tuned.model(**batch(family, dtype)).loss)


def logits(model: torch.nn.Module, family: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    inputs = {name: value for name, value in batch(family, dtype).items() if name != "labels"}
    with torch.no_grad():
        out: torch.Tensor = model(**inputs).logits
    return out


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, copied."""
    return {name: value.detach().clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_training_changes_what_is_trainable_and_nothing_else(name: str, family: str) -> None:
    tuned = install(name, family)
    before, trainable = state(tuned.model), set(tuned.trainable())
    assert trainable
    train(tuned, family)
    changed = {key for key, value in state(tuned.model).items() if not torch.equal(value, before[key])}
    if METHODS[name].kind in STANDING_FOR_WEIGHTS:
        assert trainable < changed
        return
    assert changed == trainable
    if FAMILIES[family].task == "sequence-classification":
        head = "modules_to_save" if METHODS[name].kind not in NOT_OF_PEFT else FAMILIES[family].head[-1]
        assert any(key.split(".")[-1] == "weight" and head in key for key in trainable)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_the_trainable_state_is_all_that_a_fresh_installation_lacks(name: str, family: str) -> None:
    tuned = install(name, family)
    train(tuned, family)
    fresh = install(name, family)
    with torch.no_grad():
        for key, parameter in fresh.trainable().items():
            parameter.copy_(tuned.trainable()[key])
    if fresh.settled is not None:
        fresh.settled()
    assert torch.equal(logits(fresh.model, family), logits(tuned.model, family))


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_initial_values_come_from_the_seed_alone(name: str, family: str) -> None:
    torch.manual_seed(1)
    one = state(install(name, family).model)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = state(install(name, family).model)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, again)
    other = state(install(name, family, seed=SEED + 1).model)
    assert same(one, other) == (METHODS[name].kind in CONSTANT_START)


@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name, family in PAIRS if METHODS[name].kind not in NOT_OF_PEFT]
)
def test_a_saved_adapter_loads_with_peft(name: str, family: str, tmp_path: Path) -> None:
    tuned = install(name, family)
    train(tuned, family)
    METHODS[name].save(tuned, tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    loaded = peft.PeftModel.from_pretrained(build(family), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(loaded, family), logits(tuned.model, family), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_merging_keeps_the_logits_and_leaves_a_plain_model(name: str, family: str) -> None:
    tuned = install(name, family)
    train(tuned, family)
    if (reason := UNMERGEABLE.get((METHODS[name].kind, family))) is not None:
        with pytest.raises(TuningError, match=reason):
            METHODS[name].merge(tuned)
        return
    before, plain = logits(tuned.model, family), build(family)
    merged = METHODS[name].merge(tuned)
    assert type(merged) is type(plain)
    assert {key: value.shape for key, value in merged.state_dict().items()} == {
        key: value.shape for key, value in plain.state_dict().items()
    }
    assert not any(type(module).__module__.startswith("peft") for module in merged.modules())
    assert not torch.equal(logits(plain, family), before)
    torch.testing.assert_close(logits(merged, family), before, rtol=0, atol=1e-5)


def test_what_is_said_to_merge_merges_into_every_family() -> None:
    """That it does is tested above, but for the pairs of `UNMERGEABLE`."""
    some = {kind for kind, _ in UNMERGEABLE}
    assert {kind for kind in registered() if not METHODS[kind].merges} == some


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_a_bfloat16_model_stays_bfloat16(name: str, family: str) -> None:
    tuned = install(name, family, dtype=torch.bfloat16)
    assert formats(tuned, name) == {torch.bfloat16}
    train(tuned, family, torch.bfloat16)
    assert formats(tuned, name) == {torch.bfloat16}
    out = logits(tuned.model, family, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def formats(tuned: Tuned, name: str) -> set[torch.dtype]:
    """The number formats of what the model computes with."""
    stands = tuned.trainable() if METHODS[name].kind in STANDING_FOR_WEIGHTS else {}
    return {value.dtype for key, value in tuned.model.named_parameters() if key not in stands}


@pytest.mark.parametrize(("kind", "family"), REFUSED)
def test_a_method_that_does_not_fit_says_why(kind: str, family: str) -> None:
    with pytest.raises(TuningError, match=REFUSED[kind, family]):
        install(kind, family)


def test_ffa_lora_sends_no_a() -> None:
    tuned = install("ffa-lora", "llama")
    assert any(".lora_A." in name for name, _ in tuned.model.named_parameters())
    assert all(".lora_B." in name for name in tuned.trainable())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_linear_layer_of_the_blocks(family: str) -> None:
    tuned = install("lora", family)
    adapted = {name.partition(".lora_A.")[0] for name in tuned.trainable() if ".lora_A." in name}
    expected = FAMILIES[family]
    wanted = {f"base_model.model.{expected.blocks}.{index}.{one}" for index in range(2) for one in expected.linears}
    assert adapted == wanted


def test_named_targets_are_matched_by_the_end_of_their_path() -> None:
    method = method_of("lora", targets=["self_attn.q_proj", "down_proj"])
    tuned = method.install(build("llama"), Setting("causal-lm", SEED, STEPS))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in tuned.trainable()}
    assert adapted == {"q_proj", "down_proj"}


def test_an_unknown_target_names_the_nearest_known_one() -> None:
    method = method_of("lora", targets=["q_prj"])
    with pytest.raises(TuningError, match=r"tuning\.targets: .*'q_prj'.*Did you mean 'q_proj'\?"):
        method.install(build("llama"), Setting("causal-lm", SEED, STEPS))


def test_the_head_is_no_target() -> None:
    with pytest.raises(TuningError, match="no linear layer of the blocks is called 'lm_head'"):
        method_of("lora", targets=["lm_head"]).install(build("llama"), Setting("causal-lm", SEED, STEPS))


def test_bitfit_trains_the_biases_a_model_has_and_adds_some_where_it_has_none() -> None:
    of_qwen = {name.split(".")[-3] for name in install("bitfit", "qwen2").trainable()}
    assert of_qwen == {"q_proj", "k_proj", "v_proj"}
    of_llama = {name.split(".")[-3] for name in install("bitfit", "llama").trainable()}
    assert of_llama == {one.split(".")[-1] for one in FAMILIES["llama"].linears}


def test_adalora_prunes_down_to_its_budget() -> None:
    method = method_of("adalora", initial_rank=4, target_rank=2, interval=1, warmup=0.1, cooldown=0.3)
    steps = 20
    tuned = method.install(build("llama"), Setting("causal-lm", SEED, steps))
    assert tuned.after_backward is not None
    optimizer = torch.optim.SGD(tuned.trainable().values(), lr=0.1)
    for step in range(steps):
        tuned.model(**batch("llama")).loss.backward()
        tuned.after_backward(step)
        singular = {name: value.detach() for name, value in tuned.trainable().items() if ".lora_E." in name}
        kept = sum(int((value != 0).sum()) for value in singular.values())
        optimizer.step()
        optimizer.zero_grad()
    assert kept == 2 * len(singular)


def test_adalora_pushes_its_bases_towards_orthogonality_whatever_the_loss() -> None:
    tuned = install("adalora", "llama")
    assert tuned.after_backward is not None
    # A loss that is flat in the adapter: all that remains is the regulariser.
    (0.0 * tuned.model(**batch("llama")).logits.sum()).backward()
    tuned.after_backward(0)
    bases = {name: value for name, value in tuned.trainable().items() if ".lora_E." not in name}

    def distance() -> float:
        squares = [value.T @ value if ".lora_B." in name else value @ value.T for name, value in bases.items()]
        return float(sum(torch.linalg.matrix_norm(one - torch.eye(len(one))) for one in squares))

    with torch.no_grad():
        before = distance()
        for value in bases.values():
            assert value.grad is not None
            value.sub_(0.1 * value.grad)
        assert distance() < before


def test_saved_adapters_name_no_path_of_this_machine_and_are_the_same_each_time(tmp_path: Path) -> None:
    for run in "ab":
        model = build("bert")
        model.name_or_path = "models/of-alice/bert"
        method = METHODS["lora"]
        tuned = method.install(model, Setting("sequence-classification", SEED, STEPS))
        method.save(tuned, tmp_path / run)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert b"alice" not in (tmp_path / "a" / name).read_bytes()


@pytest.mark.parametrize("kind", registered())
def test_settings_are_strict_immutable_and_survive_their_canonical_form(kind: str) -> None:
    settings = method_of(kind)
    assert registered()[kind].model_validate(settings.model_dump(mode="json")) == settings
    assert settings.kind == kind
    with pytest.raises(ValidationError, match="Extra inputs"):
        registered()[kind].model_validate({"kind": kind, "rnak": 8})
    with pytest.raises(ValidationError, match="frozen"):
        settings.kind = "other"


@pytest.mark.parametrize(
    "wrong",
    [
        'kind = "lora"\nrank = 0',
        'kind = "lora"\nrank = "8"',
        'kind = "lora"\ndropout = 1.0',
        'kind = "lora"\ntargets = []',
        'kind = "lora"\ntargets = "all"',
        'kind = "lokr"\nfactor = 1',
        'kind = "adalora"\ntarget_rank = 13',
        'kind = "adalora"\nwarmup = 0.5\ncooldown = 0.5',
        'kind = "prompt-tuning"\ntokens = 0',
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: str) -> None:
    document = tomllib.loads(wrong)
    with pytest.raises(ValidationError):
        registered()[document["kind"]].model_validate(document)


def test_every_method_promises_in_its_docstring() -> None:
    for kind, method in registered().items():
        assert method.__doc__, kind
        assert re.search(r"\(.*\d{4}.*\)", method.__doc__, re.S), f"{kind} names no source"
        for name in set(method.model_fields) - set(TuningSettings.model_fields):
            assert name in method.__doc__, f"{kind}.{name} is not described"


def test_reading_plans_imports_no_torch() -> None:
    program = (
        "import sys, farfield.emulator.methods as m; m.registered()['lora'](rank=4);"
        "print(sorted({'torch', 'peft', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
