"""What is foreseen of memory, against processes that train and are measured; and limits that hold."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from farfield.edge_client import choice, device, fitting, limit
from farfield.edge_client.choice import Fit, Way
from farfield.edge_client.probe import Device
from farfield.edge_client.traced import Traced, Work, trace
from farfield.emulator import backbone
from farfield.emulator.methods import registered
from farfield.protocols import plan as plans
from farfield.protocols.errors import DeviceError
from farfield.protocols.plan import Plan

hf: Any = transformers

BUILTIN = backbone.resolve("builtin:tiny-llama-py", Path())
MACHINE = Device(program=500_000_000, flops=1e11, moved=1e10, fresh=1e9)

ERROR = 0.15
"""How far a prediction may be from what is measured."""

SHAPES = {
    "tiny": None,
    "small": {"vocab_size": 16_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
              "num_attention_heads": 8, "num_key_value_heads": 8},
    "medium": {"vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
               "num_attention_heads": 12, "num_key_value_heads": 12},
}  # fmt: skip


def parsed(kind: str = "lora", tuning: str = "", length: int = 64, **training: Any) -> Plan:
    if not registered()[kind].model_construct().by_gradient:
        training |= {"optimizer": "sgd"}
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in training.items())
    text = f"""
        [model]
        backbone = "anywhere"
        [data]
        max_length = {length}
        [training]
        rounds = 1
        steps = 2
        {lines}
        [evaluation]
        batch_size = 2
        [protection]
        kind = "none"
        [tuning]
        kind = "{kind}"
        {tuning}
    """
    return plans.parse(text, registered(), None)


def alone(plan: Plan, folder: Path, way: Way | None, most: int | None = None) -> dict[str, Any]:
    """What a process says that works by `plan`."""
    asked = {
        "plan": plan.canonical().decode(),
        "folder": str(folder),
        "way": None if way is None else asdict(way),
        "most": most,
    }
    script = Path(__file__).with_name("works_alone.py")
    done = subprocess.run(
        [sys.executable, script], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Backbones of three shapes."""
    found = {"tiny": BUILTIN}
    for name, shape in SHAPES.items():
        if shape is None:
            continue
        found[name] = folder = tmp_path_factory.mktemp(name)
        config = hf.LlamaConfig(max_position_embeddings=1024, tie_word_embeddings=False, **shape)
        hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        words = Tokenizer(models.WordLevel({f"w{one}": one for one in range(300)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(folder)
    return found


def test_weights_and_states_are_counted_to_the_byte() -> None:
    plan = parsed("full", batch_size=1, length=8)
    seen = trace(plan, BUILTIN)
    with torch.device("meta"):
        config, kind = backbone.model_class(BUILTIN, task="causal-lm", labels=None)
        model: Any = kind._from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    parameters = {id(one): one.nbytes for one in model.parameters()}
    buffers = sum(one.nbytes for one in model.buffers())
    assert 0 <= seen.weights - sum(parameters.values()) <= 2 * buffers + 4096
    # Weights; start, masters, their gradients, and AdamW's two moments in float32: at least that is there at once.
    assert seen.training >= seen.weights + 5 * 4 * seen.trained
    assert seen.training <= seen.weights + 8 * 4 * seen.trained + 64 * 2**20


def test_a_part_of_an_adapter_comes_whole_and_is_masked_whole() -> None:
    plan = parsed(tuning="rank = 64\n[[tuning.alternatives]]\nrank = 2\n", batch_size=1, length=8)
    local = plan.alternative(0, registered())
    masked = local.model_copy(update={"protection": plan.protection.model_copy(update={"kind": "secagg"})})
    alone, part, summed = trace(local, BUILTIN), trace(local, BUILTIN, 64), trace(masked, BUILTIN, 64)
    assert part.trained == alone.trained
    whole = 32 * part.trained  # in float32 as it comes, as words, and as the update that they are made of
    more = 4 * (whole - part.trained)
    assert part.training - alone.training == pytest.approx(more, abs=1000)
    assert part.evaluating - alone.evaluating == pytest.approx(more, abs=1000)
    assert 0 <= summed.training - summed.weights - 3 * 4 * whole < 0.01 * 4 * whole


@pytest.mark.slow
def test_what_ought_to_save_memory_saves_it() -> None:
    at = {name: trace(one, BUILTIN) for name, one in {
        "whole": parsed("bitfit", batch_size=8),
        "half": parsed("bitfit", batch_size=4, gradient_accumulation=2),
        "checkpointing": parsed("bitfit", batch_size=8, checkpointing=True),
    }.items()}  # fmt: skip
    assert at["half"].training < 0.75 * at["whole"].training
    assert at["checkpointing"].training < 0.5 * at["whole"].training
    assert at["checkpointing"].step.flops > 1.2 * at["whole"].step.flops
    assert at["half"].step.flops == pytest.approx(at["whole"].step.flops, rel=0.01)


def straight(plan: Plan, folder: Path, rank: int | None) -> Traced:
    """As if each example took 10 MB, or 2 with checkpointing, and an evaluation 1 MB."""
    taken = 10**6 * (2 if plan.training.checkpointing else 10) * plan.training.batch_size
    return Traced(0, 1, taken, 10**6 * plan.evaluation.batch_size, 10**6, Work(1e9, 1e9, 1e9))


def test_ways_keep_the_group_and_come_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "trace", straight)
    plan = parsed(tuning="[[tuning.alternatives]]\nrank = 2\n", batch_size=4, gradient_accumulation=3)
    found = list(choice.fits(plan, BUILTIN, MACHINE, None))
    assert [(one.way.alternative, one.way.checkpointing, one.way.batch_size, one.way.frugal) for one in found] == [
        (None, False, 4, False), (None, False, 4, True), (None, False, 2, True), (None, False, 1, True),
        (None, True, 4, True), (None, True, 2, True), (None, True, 1, True),
        (0, False, 4, True), (0, False, 2, True), (0, False, 1, True),
        (0, True, 4, True), (0, True, 2, True), (0, True, 1, True),
    ]  # fmt: skip
    assert {one.way.batch_size * one.way.gradient_accumulation for one in found} == {12}
    assert all(one.fits and one.memory > MACHINE.program for one in found)
    assert found[0].way.plan(plan) == plan
    local: Any = found[-1].way.plan(plan)
    assert (local.tuning.rank, local.training.batch_size, local.training.checkpointing) == (2, 1, True)
    memory = [one.memory for one in found[1:4]]
    assert memory == sorted(memory, reverse=True)


def test_evaluations_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "trace", straight)
    plan = plans.restore(
        parsed(batch_size=4).canonical().replace(b'"batch_size":2,', b'"batch_size":32,'), registered()
    )
    assert plan.evaluation.batch_size == 32
    found = list(choice.fits(plan, BUILTIN, MACHINE, MACHINE.program + 15_000_000))
    assert [(one.way.batch_size, one.way.checkpointing, one.way.evaluation) for one in found] == [
        (4, False, 32), (4, False, 32), (2, False, 16), (1, False, 8), (4, True, 8), (2, True, 4), (1, True, 2),
    ]  # fmt: skip
    assert found[0].memory == MACHINE.program + 130_000_000
    assert [one.memory - MACHINE.program for one in found[1:]] == [
        40_000_000, 20_000_000, 10_000_000, 8_000_000, 4_000_000, 2_000_000
    ]  # fmt: skip


def test_a_method_that_the_owner_does_not_allow_is_no_way() -> None:
    plan = parsed(batch_size=1)
    assert not list(choice.fits(plan, BUILTIN, MACHINE, None, ["ia3"]))
    with pytest.raises(DeviceError, match="none of the tuning methods"):
        raise fitting.nothing_fits(plan, (), None)


@pytest.mark.slow
def test_the_chord_is_near_what_a_size_in_between_takes() -> None:
    plan = parsed(batch_size=8)
    found = {one.way.batch_size: one for one in choice.fits(plan, BUILTIN, MACHINE, None) if one.way.frugal
             and not one.way.checkpointing}  # fmt: skip
    real = trace(found[4].way.plan(plan), BUILTIN).training + MACHINE.program
    assert 0.99 * real <= found[4].memory <= 1.1 * real


@pytest.fixture(scope="module")
def tight() -> tuple[Plan, int, fitting.Choice]:
    """A Plan that does not fit as it is, its limit, and what is chosen."""
    plan = parsed(batch_size=16, length=512)
    most = 900_000_000
    return plan, most, fitting.choose(plan, BUILTIN, most)


def test_what_is_chosen_stays_below_the_limit_and_near_what_was_foretold(tight: tuple[Plan, int, Any]) -> None:
    plan, most, chosen = tight
    assert not chosen.table[0].fits and chosen.chosen == chosen.table[-1] and chosen.chosen.way.frugal
    told = alone(plan, BUILTIN, chosen.chosen.way, most)
    assert told["stopped"] is None and told["peak"] < most
    assert told["peak"] == pytest.approx(chosen.chosen.memory, rel=ERROR)


@pytest.mark.slow
def test_what_is_not_chosen_is_stopped_at_the_limit(tight: tuple[Plan, int, Any]) -> None:
    plan, most, _ = tight
    told = alone(plan, BUILTIN, None, most)
    assert told["stopped"].startswith("this work takes more memory than the 900.0 MB that are allowed here")
    assert told["peak"] <= 1.01 * most


def test_an_impossible_limit_says_what_the_least_is() -> None:
    plan = parsed(batch_size=2)
    fit = Fit(Way(None, 1, 2, True, 1, True), 930_000_000, 1.0, False)
    with pytest.raises(DeviceError) as caught:
        raise fitting.nothing_fits(plan, (fit,), 100_000_000)
    assert str(caught.value) == (
        "this work takes at least 1.0 GB of memory, and 100.0 MB are allowed. "
        "That is with lora, batch 1 × 2, checkpointing, frugal."
    )
    with pytest.raises(DeviceError, match="more memory than the 1 B"), limit.held(1):
        raise AssertionError("nothing may begin")


def test_one_large_tensor_does_not_get_past_the_limit() -> None:
    with pytest.raises(DeviceError, match="takes more memory"), limit.held(device.resident() + 50_000_000):
        torch.ones(100_000_000)
    assert torch.ones(100_000_000).sum() == 1e8  # afterwards there is no limit


def test_layers_that_would_grow_past_the_limit_are_stopped() -> None:
    layer = torch.nn.Linear(1000, 1000)
    kept = []
    with pytest.raises(DeviceError), limit.held(device.resident() + 100_000_000):
        for _ in range(1000):
            kept.append(layer(torch.ones(1000, 1000)))
    assert 5 < len(kept) < 60


def test_other_failures_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), limit.held(None):
        torch.ones(2, 3) @ torch.ones(2, 3)
    with pytest.raises(DeviceError, match="than this machine has"), limit.held(None):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(DeviceError), limit.held(None):
        raise MemoryError


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", sorted(registered()))
def test_predictions_are_near_what_is_measured(kind: str, shape: str, folders: dict[str, Path]) -> None:
    plan, folder = parsed(kind, batch_size=2, length=256), folders[shape]
    foretold = fitting.look_ahead(plan, folder, None, thorough=True)
    fit = next(one for one in foretold if one.way.frugal and one.way.batch_size == 2)
    told = alone(plan, folder, fit.way)
    assert told["peak"] == pytest.approx(fit.memory, rel=ERROR), (kind, shape)


@pytest.mark.slow
@pytest.mark.parametrize("gigabytes", [1, 2, 4, 8])
def test_limits_hold_from_one_to_eight_gigabytes(gigabytes: int, folders: dict[str, Path]) -> None:
    plan, most = parsed("full" if gigabytes > 4 else "lora", batch_size=16, length=512), gigabytes * 10**9
    folder = folders["small" if gigabytes == 1 else "medium"]
    chosen = fitting.choose(plan, folder, most)
    told = alone(plan, folder, chosen.chosen.way, most)
    assert told["stopped"] is None and told["peak"] < most
