"""MeZO and FedKSeed: against their equations, done plainly; and what must hold of weights that are moved in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from families import FAMILIES, batch, build, deep, text
from pydantic import ValidationError
from safetensors import safe_open

from farfield.emulator.descent import descend
from farfield.emulator.methods import Setting, Tuned, TuningMethod, registered
from farfield.emulator.seed_pool import SeedPool
from farfield.emulator.zeroth_order import Directions
from farfield.kernels import perturb
from farfield.protocols.errors import TuningError
from farfield.protocols.sections import Training
from farfield.protocols.seeds import derive
from farfield.protocols.tensors import Arrays, State, digest

# Of peft 0.21 on transformers 5.23, where a test loads an adapter as its later user would.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SEED, STEPS, RATE, EPSILON = 3, 5, 1e-2, 1e-3
SCALARS = "pool.scalars"


def method_of(kind: str, **settings: Any) -> TuningMethod:
    return registered()[kind].model_validate({"kind": kind, **settings})


MEZO, LORA, POOL = method_of("mezo"), method_of("mezo", over="lora", rank=4), method_of("fedkseed", pool=64)


def installed(method: TuningMethod, family: str = "llama", dtype: torch.dtype = torch.float32) -> Tuned:
    return method.install(build(family, dtype), Setting(FAMILIES[family].task, 0, STEPS))


def training(**other: Any) -> Training:
    return Training.model_validate(
        {"rounds": 1, "steps": STEPS, "optimizer": "sgd", "learning_rate": RATE, "max_grad_norm": 0.0} | other
    )


def loss_of(model: torch.nn.Module, family: str = "llama") -> Callable[[bool], float]:
    """Of the family's batch."""

    def loss(backward: bool) -> float:
        assert not backward
        with torch.no_grad():
            return float(model(**batch(family)).loss)

    return loss


def start_of(tuned: Tuned) -> State:
    return {name: value.detach().float().cpu().numpy().copy() for name, value in tuned.trainable().items()}


def trained(
    tuned: Tuned, start: State, *, seed: int = SEED, steps: int = STEPS, first: int = 0, **other: Any
) -> Arrays:
    loss = loss_of(tuned.model)
    plan = training(steps=steps, **other)
    return descend(tuned, start, plan, lambda _: loss, seed=seed, steps=steps, first_step=first)


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def direction(name: str, shape: torch.Size, number: int, seed: int = SEED) -> torch.Tensor:
    """z of one parameter, made the plain way."""
    return perturb.reference_signs((seed, derive(0, name)), number, shape.numel()).view(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "distilbert"])
def test_two_looks_along_a_direction_leave_every_bit_where_it_was(family: str, dtype: torch.dtype) -> None:
    tuned = installed(MEZO, family, dtype)
    before, places = bits(tuned.model), [one.data_ptr() for one in tuned.model.parameters()]
    directions = directions_of(tuned, family)
    slope, _ = directions.slope(3, 0.1, loss_of(tuned.model, family))
    assert slope
    assert same(bits(tuned.model), before)
    assert [one.data_ptr() for one in tuned.model.parameters()] == places


def directions_of(tuned: Tuned, family: str = "llama") -> Directions:
    blocks = tuned.model.get_submodule(FAMILIES[family].blocks)
    assert isinstance(blocks, torch.nn.ModuleList)
    modules = [*blocks, *(tuned.model.get_submodule(path) for path in FAMILIES[family].head)]
    return Directions(modules, {one: name for name, one in tuned.trainable().items()}, SEED)


def test_a_forward_that_breaks_off_leaves_every_bit_too() -> None:
    tuned = installed(MEZO)
    before = bits(tuned.model)

    def break_off(*_: object) -> None:
        raise RuntimeError("out of memory")

    layer = tuned.model.get_submodule(f"{FAMILIES['llama'].blocks}.1.mlp")
    hook = layer.register_forward_hook(break_off)
    with pytest.raises(RuntimeError, match="out of memory"):
        directions_of(tuned).slope(0, EPSILON, loss_of(tuned.model))
    hook.remove()
    assert same(bits(tuned.model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tuned.model.modules())


@pytest.mark.parametrize("limit", [0.0, 0.5])
def test_mezo_is_its_equation(limit: float) -> None:
    """θ ← θ - ηgz, step by step on a copy that is really walked from θ to θ + εz, to θ - εz and back."""
    tuned = installed(MEZO)
    start, names = start_of(tuned), list(tuned.trainable())
    plain: Any = copy.deepcopy(tuned.model)
    weights = {name: one for name, one in plain.named_parameters() if name in names}
    epsilon, slopes = 1e-2, []
    with torch.no_grad():
        for number in range(STEPS):
            z = {name: direction(name, one.shape, number) for name, one in weights.items()}
            losses = []
            for way in (epsilon, -2 * epsilon):
                for name, one in weights.items():
                    one += way * z[name]
                losses.append(float(plain(**batch("llama")).loss))
            slope = (losses[0] - losses[1]) / (2 * epsilon)
            slopes.append(slope)
            slope = max(-limit, min(limit, slope)) if limit else slope
            for name, one in weights.items():
                one += epsilon * z[name] - RATE * slope * z[name]
    assert not limit or max(map(abs, slopes)) > limit
    tuned = method_of("mezo", epsilon=epsilon).install(build("llama"), Setting("causal-lm", 0, STEPS))
    update = trained(tuned, start, max_grad_norm=limit)
    assert sorted(update) == names
    for name, one in weights.items():
        expected = one.detach() - torch.from_numpy(start[name])
        torch.testing.assert_close(torch.from_numpy(update[name]), expected, rtol=0, atol=1e-5)
        moved = tuned.trainable()[name].detach() - torch.from_numpy(start[name])
        torch.testing.assert_close(moved, torch.from_numpy(update[name]), rtol=0, atol=1e-6)


def test_the_estimate_points_along_the_gradient() -> None:
    """Of n estimates g·z in d dimensions the mean has a cosine of about √(n / (n + d)), here 0.988, with ∇."""

    class Bowl(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point = torch.nn.Parameter(torch.linspace(-1, 2, 50))

        def forward(self) -> torch.Tensor:
            return (torch.arange(1, 51) * self.point**2).sum() / 2

    bowl = Bowl()
    directions = Directions([bowl], {bowl.point: "point"}, SEED)
    estimate = torch.zeros(50)
    for number in range(2000):
        slope, value = directions.slope(number, 1e-2, lambda _: float(bowl().detach()))
        estimate += slope * direction("point", bowl.point.shape, number) / 2000
    bowl().backward()
    assert bowl.point.grad is not None
    assert torch.cosine_similarity(estimate, bowl.point.grad, dim=0) > 0.97
    # The curvature is Σ i = 1275, all of which a direction of signs meets.
    assert value == pytest.approx(float(bowl().detach()) + 1275 * 1e-4 / 2, rel=1e-4)


@pytest.mark.parametrize("method", [MEZO, LORA, POOL], ids=["mezo", "mezo-lora", "fedkseed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_task_depends_on_nothing_but_the_task(method: TuningMethod, dtype: torch.dtype) -> None:
    tuned = installed(method, dtype=dtype)
    start = start_of(tuned)
    once = trained(tuned, start)
    trained(tuned, start, seed=SEED + 1)
    again = trained(tuned, start)
    assert digest(again) == digest(once)
    fresh = trained(installed(method, dtype=dtype), start)
    assert digest(fresh) == digest(once)
    assert digest(trained(tuned, start, seed=SEED + 1)) != digest(once)


@pytest.mark.parametrize("method", [MEZO, LORA, POOL], ids=["mezo", "mezo-lora", "fedkseed"])
def test_no_value_goes_farther_than_the_range_that_a_plan_reckons_with(method: TuningMethod) -> None:
    tuned = installed(method)
    plan = training(max_grad_norm=0.1)
    update = trained(tuned, start_of(tuned), max_grad_norm=0.1)
    assert plan.update_range is not None
    largest = max(float(np.abs(change).max()) for change in update.values())
    assert 0 < largest <= plan.update_range * (1 + 1e-6)


@pytest.mark.parametrize(
    ("method", "rate", "dtype"),
    [
        (MEZO, 2e-3, torch.bfloat16),
        (method_of("mezo", over="lora", rank=4, epsilon=1e-2), 2e-2, torch.float32),
        (POOL, 2e-3, torch.float32),
    ],
    ids=["mezo", "mezo-lora", "fedkseed"],
)
def test_it_learns(method: TuningMethod, rate: float, dtype: torch.dtype) -> None:
    tuned = installed(method, dtype=dtype)
    before = loss_of(tuned.model)(False)
    trained(tuned, start_of(tuned), steps=100, learning_rate=rate, max_grad_norm=1.0)
    assert loss_of(tuned.model)(False) < before - 0.15


@pytest.mark.parametrize("method", [MEZO, POOL], ids=["mezo", "fedkseed"])
def test_a_loss_that_is_no_number_ends_the_training(method: TuningMethod) -> None:
    tuned = installed(method)
    with pytest.raises(TuningError, match="the loss is nan in step 3"):
        losses = [1.0] * 4 + [math.nan] * 2
        descend(tuned, start_of(tuned), training(), lambda _: lambda _: losses.pop(0), seed=0, steps=STEPS)


def test_mezo_over_lora_trains_what_lora_does_and_is_saved_as_lora_is(tmp_path: Path) -> None:
    tuned = installed(LORA)
    lora = method_of("lora", rank=4).install(build("llama"), Setting("causal-lm", 0, STEPS))
    assert start_of(tuned).keys() == start_of(lora).keys()
    assert digest(start_of(tuned)) == digest(start_of(lora))
    trained(tuned, start_of(tuned))
    LORA.save(tuned, tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("llama"), str(tmp_path)).eval()
    out = tuned.model(**text("llama")).logits
    torch.testing.assert_close(loaded(**text("llama")).logits, out, rtol=0, atol=1e-6)
    torch.testing.assert_close(LORA.merge(tuned)(**text("llama")).logits, out, rtol=0, atol=1e-5)


def test_mezo_says_what_belongs_together() -> None:
    assert MEZO.sharing.exact and not LORA.sharing.exact
    assert not MEZO.by_gradient and not MEZO.by_example
    for setting in ({"rank": 4}, {"alpha": 1}, {"targets": ["q_proj"]}):
        with pytest.raises(ValidationError, match="goes with over"):
            method_of("mezo", **setting)


def test_fedkseed_arrives_where_its_client_went() -> None:
    client, receiver = installed(POOL), installed(POOL)
    start = start_of(client)
    update = trained(client, start, steps=40)
    assert list(update) == [SCALARS] and update[SCALARS].shape == (64,) and update[SCALARS].dtype == np.float32
    assert 20 < np.count_nonzero(update[SCALARS]) <= 40
    put(receiver, start[SCALARS] + update[SCALARS])
    theirs, ours = bits(client.model), bits(receiver.model)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-6)
    assert same(bits(receiver.model), ours)
    assert not torch.equal(ours["model.layers.0.mlp.up_proj.weight"], build("llama").model.layers[0].mlp.up_proj.weight)


def put(tuned: Tuned, scalars: np.ndarray[Any, Any]) -> None:
    with torch.no_grad():
        tuned.trainable()[SCALARS].copy_(torch.from_numpy(scalars))
    assert tuned.settled is not None
    tuned.settled()


def test_fedkseeds_sums_are_sums_of_what_clients_changed() -> None:
    tuned = installed(POOL)
    start = start_of(tuned)
    updates = [trained(tuned, start, seed=seed)[SCALARS] for seed in (1, 2)]
    assert not np.array_equal(updates[0] != 0, updates[1] != 0)
    changes = []
    for scalars in (*updates, updates[0] + updates[1]):
        put(tuned, scalars)
        changes.append({name: one - build("llama").get_parameter(name) for name, one in weights_of(tuned).items()})
    for name, change in changes[2].items():
        torch.testing.assert_close(changes[0][name] + changes[1][name], change, rtol=0, atol=1e-6)


def weights_of(tuned: Tuned) -> dict[str, torch.Tensor]:
    return {name: value for name, value in bits(tuned.model).items() if name != SCALARS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fedkseeds_weights_follow_from_the_scalars_by_its_equation(dtype: torch.dtype) -> None:
    tuned = installed(POOL, dtype=dtype)
    pool = tuned.model.get_submodule("pool")
    assert isinstance(pool, SeedPool)
    scalars = np.random.default_rng(0).normal(0, 0.01, 64).astype(np.float32)
    for passing in (scalars[::-1].copy(), scalars):  # wherever the weights were before
        put(tuned, passing)
    for name, value in weights_of(tuned).items():
        one = build("llama", dtype).get_parameter(name)
        if "layers" in name:
            moved = one.double()
            for number, scalar in enumerate(scalars.tolist()):
                moved = moved - scalar * direction(name, one.shape, number, pool.seed)
            # One place of bfloat16, where rounding in float32 first decides a tie.
            torch.testing.assert_close(
                value.double(), moved.to(dtype).double(), rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=1e-6
            )
        else:
            assert torch.equal(value, one)
    put(tuned, np.zeros(64, dtype=np.float32))
    assert same(weights_of(tuned), bits(build("llama", dtype)))


def test_fedkseed_draws_its_directions_from_the_whole_pool() -> None:
    tuned = installed(POOL)
    drawn = [
        int(np.flatnonzero(trained(tuned, start_of(installed(POOL)), steps=1, first=number)[SCALARS])[0])
        for number in range(60)
    ]
    assert len(set(drawn)) > 30
    assert min(drawn) < 8 and max(drawn) >= 56


def test_a_merged_fedkseed_is_a_plain_model_and_a_saved_one_its_scalars(tmp_path: Path) -> None:
    tuned = installed(POOL)
    trained(tuned, start_of(tuned))
    scalars = tuned.trainable()[SCALARS].detach().clone()
    POOL.save(tuned, tmp_path)
    with safe_open(tmp_path / "scalars.safetensors", "pt") as file:
        assert list(file.keys()) == ["scalars"]
        assert torch.equal(file.get_tensor("scalars"), scalars)
        assert int(file.metadata()["seed"]) == derive(0, "fedkseed")
    merged = POOL.merge(tuned)
    assert merged.state_dict().keys() == build("llama").state_dict().keys()
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_fedkseed_is_the_same_whatever_number_its_blocks_have_here() -> None:
    """An emulator has fewer blocks than the backbone, and its last one another number."""
    whole, part = deep("llama", 6), deep("llama", 3)
    with torch.no_grad():
        part.model.layers[2].load_state_dict(whole.model.layers[5].state_dict())
    scalars = np.linspace(-0.1, 0.1, 64, dtype=np.float32)
    renumbered = lambda name: name.replace("layers.2.", "layers.5.")  # noqa: E731
    there = POOL.install(whole, Setting("causal-lm", 0, STEPS, (0, 5)))
    here = POOL.install(part, Setting("causal-lm", 0, STEPS, (0, 2), renumbered))
    for tuned in (there, here):
        put(tuned, scalars)
    assert same(bits(whole.model.layers[5]), bits(part.model.layers[2]))
    assert not same(bits(whole.model.layers[5]), bits(deep("llama", 6).model.layers[5]))
    assert same(bits(whole.model.layers[2]), bits(deep("llama", 6).model.layers[2]))


@pytest.mark.parametrize("method", [MEZO, POOL], ids=["mezo", "fedkseed"])
def test_packed_weights_cannot_be_moved(method: TuningMethod) -> None:
    model = build("llama")
    packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = packed
    with pytest.raises(TuningError, match=r"mlp\.up_proj: .*these are packed"):
        method.install(model, Setting("causal-lm", 0, STEPS))
