"""A backbone whose blocks are held in 4 or 8 bits: what it computes, what can be tuned on it, and what it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, batch, build, hf

from farfield.coordinator import plans
from farfield.emulator import backbone, few_bits
from farfield.emulator.architecture import describe
from farfield.emulator.bench import Bench
from farfield.emulator.layers import Int8Linear, Nf4Linear, RoundedLinear
from farfield.emulator.methods import Setting, registered
from farfield.emulator.methods.loftq import factors, residual
from farfield.kernels import int8, nf4
from farfield.protocols.errors import BackboneError, PlanError, TuningError

SHARE: dict[str, Any] = {"nf4": Nf4Linear, "int8": Int8Linear}
TEXTS = sorted(set(FAMILIES) - {"vit"})


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    model = build(family, dtype)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    return folder


def load(folder: Path, family: str, **more: Any) -> Any:
    task = FAMILIES[family].task
    labels = None if task == "causal-lm" else 3
    return backbone.load_model(folder, task=task, labels=labels, **{"dtype": "float32", **more})


def logits(model: Any, family: str) -> torch.Tensor:
    inputs = {name: one for name, one in batch(family, model.dtype).items() if name != "labels"}
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


def reference(weight: torch.Tensor, quantization: str) -> torch.Tensor:
    """The values that the few bits stand for, by plain torch."""
    if quantization == "int8":
        return int8.reference_dequantize(*int8.reference_quantize(weight), weight.dtype)
    # The index of a value halfway between two levels is the library's to choose.
    packed, scales = nf4.quantize(weight)
    return nf4.reference_dequantize(packed, scales, weight.shape[0], weight.shape[1], weight.dtype)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", TEXTS)
def test_it_computes_with_what_the_bits_stand_for(tmp_path: Path, family: str, quantization: str) -> None:
    folder = saved(tmp_path, family)
    model = load(folder, family, quantization=quantization)
    plain = load(folder, family)
    untouched = logits(plain, family)
    with torch.no_grad():
        for linear in describe(plain).linears:
            module: Any = plain.get_submodule(linear.path)
            matrix = module.weight.T.contiguous() if linear.transposed else module.weight
            values = reference(matrix, quantization)
            module.weight.copy_(values.T if linear.transposed else values)
            assert isinstance(model.get_submodule(linear.path), SHARE[quantization]), linear.path
    # A step of 8 bits may be rounded in another order.
    torch.testing.assert_close(logits(model, family), logits(plain, family), rtol=0, atol=1e-6)
    assert float((logits(model, family) - untouched).abs().max()) > 1e-4
    others = {path for path, one in model.named_modules() if isinstance(one, RoundedLinear)}
    assert others == {linear.path for linear in describe(plain).linears}, "nothing but the blocks"
    assert not any(one.requires_grad for one in model.parameters())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("files", [torch.float32, torch.bfloat16])
def test_every_way_to_load_gives_the_same_values(tmp_path: Path, files: torch.dtype, quantization: Any) -> None:
    folder = saved(tmp_path, "gpt2", files)
    read = load(folder, "gpt2", dtype="bfloat16", quantization=quantization)
    values, layers = load(folder, "gpt2", dtype="bfloat16"), load(folder, "gpt2", dtype="bfloat16")
    few_bits.round_values(values, quantization)
    few_bits.round_layers(layers, quantization)
    assert read.dtype == read.config.dtype == torch.bfloat16
    assert torch.equal(logits(read, "gpt2"), logits(layers, "gpt2"))
    bits = {name: one for name, one in read.named_buffers() if name.endswith(("packed", "codes", "scales"))}
    assert len(bits) == 2 * len(describe(values).linears)
    for name, one in layers.named_buffers():
        assert name not in bits or torch.equal(one, bits[name])
    for linear in describe(values).linears:
        module: Any = values.get_submodule(linear.path)
        assert torch.equal(read.get_submodule(linear.path).weight, module.weight.T)
    if quantization == "nf4":  # what an emulator's owner has rounded is what its clients hold
        few_bits.round_layers(values, "nf4")
        assert all(torch.equal(bits[name], one) for name, one in values.named_buffers() if name in bits)


def test_training_after_evaluation_has_gradients(tmp_path: Path) -> None:
    model = load(saved(tmp_path, "llama"), "llama", quantization="nf4")
    logits(model, "llama")
    ids = batch("llama", torch.float32)["input_ids"]
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=inputs).logits.square().sum().backward()
    assert inputs.grad is not None
    assert float(inputs.grad.abs().max()) > 0


def test_routers_are_left_as_they_are() -> None:
    config = hf.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = hf.MixtralForCausalLM(config)
    few_bits.round_layers(model, "nf4")
    kinds = {path.rpartition(".")[2] for path, one in model.named_modules() if isinstance(one, RoundedLinear)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_weights_of_another_shape_and_holes_are_said(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    for change in ({name: torch.zeros(16, 32)}, None):
        wrong = {key: one for key, one in tensors.items() if key != name} | (change or {})
        save_file(wrong, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BackboneError, match="q_proj"):
            load(folder, "llama", quantization="nf4")


SETTINGS: dict[str, dict[str, Any]] = {
    "fed-sb": {"rank": 8}, "vera": {"rank": 8}, "adalora": {"initial_rank": 4, "target_rank": 2, "interval": 1},
    "prompt-tuning": {"tokens": 3}, "p-tuning": {"tokens": 3}, "prefix-tuning": {"tokens": 3}, "mezo": {"over": "lora"},
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(registered()))
def test_every_method_is_tuned_on_it_or_says_that_it_cannot_be(kind: str) -> None:
    method = registered()[kind].model_validate({"kind": kind, **SETTINGS.get(kind, {})})
    if not method.on_quantised:
        with pytest.raises(PlanError, match=rf"tuning.kind = '{kind}' trains the backbone's own weights"):
            plans.parse(plan_text(tuning=f'kind = "{kind}"', training='optimizer = "sgd"'))
        return
    few, plain = build("llama", torch.float32), build("llama", torch.float32)
    few_bits.round_layers(few, "nf4")
    few_bits.round_values(plain, "nf4")
    tuned, twin = (method.install(model, Setting("causal-lm", 5, 4)) for model in (few, plain))
    before = {name: one.detach().clone() for name, one in tuned.model.named_buffers()}
    optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
    if tuned.before_training is not None:
        tuned.before_training()
    for step in range(3):
        tuned.model(**batch("llama", torch.float32)).loss.backward()
        if tuned.after_backward is not None:
            tuned.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()
    for name, one in tuned.model.named_buffers():
        assert torch.equal(one, before[name]) or "packed" not in name, "4 bits never move"
    with torch.no_grad():
        for name, parameter in twin.trainable().items():
            parameter.copy_(tuned.trainable()[name])
    for installed in (tuned, twin):
        installed.model.eval()
        if installed.settled is not None:
            installed.settled()
    found = logits(tuned.model, "llama")
    torch.testing.assert_close(found, logits(twin.model, "llama"), rtol=0, atol=1e-5)
    try:
        merged = method.merge(twin)
    except TuningError:
        return
    torch.testing.assert_close(logits(merged, "llama"), found, rtol=0, atol=1e-5)


def plan_text(model: str = "", tuning: str = 'kind = "lora"', training: str = "", more: str = "") -> str:
    backbone_ = 'backbone = "builtin:tiny-llama-py"\nquantization = "nf4"\n'
    return f"[model]\n{backbone_}{model}\n[tuning]\n{tuning}\n[training]\nrounds = 1\nsteps = 4\n{training}\n{more}\n"


LOFTQ = 'kind = "lora"\ninitial = "loftq"'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (plan_text(tuning=LOFTQ).replace('"nf4"', '"none"'), "corrects what model.quantization takes away"),
        (plan_text(tuning=LOFTQ, more='[delivery]\nkind = "emulator"'), "needs the backbone as it was"),
        (plan_text(tuning=LOFTQ + '\nalternatives = [{quantization = "int8"}]'), "and no other"),
        (plan_text(tuning=LOFTQ + "\nfreeze_a = true"), "must be sent in every round"),
        (plan_text(tuning=LOFTQ + "\nlocal_b = true"), "must be sent in every round"),
        (plan_text(tuning=LOFTQ + "\ndora = true"), "must be sent in every round"),
        (
            plan_text(tuning='kind = "full"\nalternatives = [{quantization = "int8"}]').replace('"nf4"', '"none"'),
            "fixed",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plans.parse(text)


def bench_of(tuning: str, **more: Any) -> Bench:
    plan = plans.parse(plan_text(model='dtype = "float32"', tuning=tuning))
    return Bench(plan, backbone.resolve("builtin:tiny-llama-py", Path()), torch.device("cpu"), **more)


def test_nothing_is_folded_into_few_bits() -> None:
    with pytest.raises(TuningError, match="few bits"):
        bench_of('kind = "lora"').merged()


def test_loftq_begins_nearer_to_the_backbone_and_is_not_computed_by_who_is_sent_it() -> None:
    whole = backbone.load_model(backbone.resolve("builtin:tiny-llama-py", Path()), task="causal-lm", dtype="float32")
    bench = bench_of(LOFTQ + "\nrank = 16\nalpha = 8")
    plain = bench_of('kind = "lora"\nrank = 16\nalpha = 8').adapter()
    start = bench.adapter()
    assert start.keys() == plain.keys()
    for linear in describe(whole).linears:
        module: Any = bench.tuned.model.get_submodule(f"base_model.model.{linear.path}")
        weight: Any = whole.get_submodule(linear.path).weight
        a, b = (torch.from_numpy(start[f"base_model.model.{linear.path}.lora_{x}.default.weight"]) for x in "AB")
        lost = weight - module.get_base_layer().weight
        best = torch.linalg.svdvals(lost)[16:].norm()
        left = (lost - 0.5 * b @ a).norm()
        assert best * (1 - 1e-4) <= left <= 1.02 * best < lost.norm(), linear.path
    ids = torch.arange(2, 34).view(1, -1)
    with torch.no_grad():
        wanted, corrected = whole(input_ids=ids).logits, bench.tuned.model(input_ids=ids).logits
        bench.load(plain)
        rounded = bench.tuned.model(input_ids=ids).logits
    assert float((corrected - wanted).norm()) < 0.9 * float((rounded - wanted).norm())
    other = bench_of(LOFTQ + "\nrank = 16\nalpha = 8")
    other.load(plain)
    assert all((one == plain[name]).all() for name, one in other.adapter().items()), "what was sent stays"


def test_the_residual_is_found_whichever_way_round_the_file_has_the_matrix() -> None:
    rounded = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))
    weight = rounded + 0.01
    for one in (weight, weight.T):
        torch.testing.assert_close(residual(one, rounded), weight - rounded)
    a, b = factors(torch.outer(torch.arange(5.0), torch.arange(7.0)), 1, seed=0)
    torch.testing.assert_close(b @ a, torch.outer(torch.arange(5.0), torch.arange(7.0)))


_PEAK = """
import sys, threading, time
from pathlib import Path
from farfield.emulator import backbone
import torch, accelerate, bitsandbytes, transformers.models.llama.modeling_llama
def own():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
before, peak, done = own(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, own()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
model = backbone.load_model(Path(sys.argv[1]), task="causal-lm", dtype="bfloat16", quantization=sys.argv[2])
done = True; thread.join()
held = sum(one.nbytes for one in [*model.parameters(), *model.buffers()])
print(peak - before, held)
"""


@pytest.mark.slow
def test_loading_never_holds_the_whole_backbone(tmp_path: Path) -> None:
    config = hf.LlamaConfig(
        vocab_size=16384, hidden_size=768, intermediate_size=2048, num_hidden_layers=16, num_attention_heads=12
    )
    hf.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for quantization in ("nf4", "int8"):
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(tmp_path), quantization], capture_output=True, text=True, env=environment
        )
        assert (done.returncode, done.stderr) == (0, "")
        peak, held = map(int, done.stdout.split())
        assert held < (0.62 if quantization == "int8" else 0.42) * size
        # Besides what stays: the largest matrix in the formats that it passes through, and the heap's own losses.
        assert peak < held + 130_000_000
        assert peak < size
