"""What averages mean: the mean of what clients added, or something else; and what rests, travels or stays at home."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from families import build
from pydantic import ValidationError
from safetensors.torch import load_file
from test_methods import METHODS, SEED, STEPS, logits, method_of

from farfield.emulator.methods import Setting, Sharing, TuningMethod, advice, registered
from farfield.protocols.errors import TuningError

AVERAGED: dict[str, TuningMethod] = METHODS | {
    "ffa-dora": method_of("lora", rank=4, freeze_a=True, dora=True),
    "rolora-rslora": method_of("lora", rank=4, alternate=True, rslora=True),
    "ia3-all": method_of("ia3", targets="all-linear"),
    "ssf-with-bias": method_of("ssf", shift="with-bias"),
}

State = Mapping[str, torch.Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term:UserWarning")


NETWORKS = {"bottleneck", "lst", "meft"}
"""Methods that add what a network makes of the stream, not a change of weights nor virtual tokens."""


def added(method: TuningMethod, state: State, folder: Path) -> dict[str, torch.Tensor]:
    """What the method makes of its parameters: the model's weights, or, where nothing is folded in, what it saves.

    Of a network it is what comes out of it, for a text.
    """
    tuned = method.install(build("llama"), Setting("causal-lm", SEED, STEPS))
    with torch.no_grad():
        for name, parameter in tuned.trainable().items():
            parameter.copy_(state[name])
    if method.kind in NETWORKS:
        return outputs(tuned.model)
    try:
        return {name: value.detach() for name, value in method.merge(tuned).state_dict().items()}
    except TuningError:
        tuned = method.install(build("llama"), Setting("causal-lm", SEED, STEPS))
        with torch.no_grad():
            for name, parameter in tuned.trainable().items():
                parameter.copy_(state[name])
        method.save(tuned, folder)
        (saved,) = folder.glob("*.safetensors")
        return load_file(saved)


def outputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the first network that was added gives; what goes into it is the backbone's alone."""
    found: dict[str, torch.Tensor] = {}
    path = next(path for path, _ in model.named_modules() if path.endswith((".adapter", "ladder")))
    model.get_submodule(path).register_forward_hook(lambda _, __, output: found.update(first=output.detach()))
    logits(model.eval(), "llama")
    return found


def mean(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}


@pytest.mark.parametrize(
    ("name", "number"),
    [(name, number) for name, method in AVERAGED.items() for number in ((1, 2) if method.sharing.resting else (1,))],
)
def test_the_mean_of_the_parameters_adds_the_mean_of_what_clients_add_if_it_says_so(
    name: str, number: int, tmp_path: Path
) -> None:
    """Three clients begin from one adapter in which nothing is zero, and each moves what is trained in the round."""
    method = AVERAGED[name]
    generator = torch.Generator().manual_seed(3)
    tuned = method.install(build("llama"), Setting("causal-lm", SEED, STEPS))
    start = {
        key: value.detach() + 0.2 * torch.randn(value.shape, generator=generator)
        for key, value in tuned.trainable().items()
    }
    moving = {key for key in start if method.sharing.trained_in(key, number) and not method.sharing.is_local(key)}
    clients = [
        {key: one + 0.2 * torch.randn(one.shape, generator=generator) * (key in moving) for key, one in start.items()}
        for _ in range(3)
    ]
    theirs = mean([added(method, client, tmp_path / "client") for client in clients])
    ours = added(method, mean(clients), tmp_path / "mean")
    assert ours.keys() == theirs.keys()
    apart = max(float((ours[key] - theirs[key]).abs().max()) for key in ours)
    begun = added(method, start, tmp_path / "start")
    moved = max(float((ours[key] - begun[key]).abs().max()) for key in ours)
    assert moved > 1e-3
    if method.sharing.exact:
        assert apart < 1e-6
    else:
        assert apart > 1e-4, "it is exact, and says that it is not"


def test_rolora_trains_b_in_odd_rounds_and_a_in_even_ones() -> None:
    sharing = METHODS["rolora"].sharing
    names = ["m.q_proj.lora_A.default.weight", "m.q_proj.lora_B.default.weight", "m.modules_to_save.default.weight"]
    for number, trained in ((1, [False, True, True]), (2, [True, False, True]), (3, [False, True, True])):
        assert [sharing.trained_in(name, number) for name in names] == trained
    assert not any(sharing.is_local(name) for name in names)


def test_fedsa_lora_keeps_b_at_home() -> None:
    sharing = METHODS["fedsa-lora"].sharing
    assert sharing.is_local("m.q_proj.lora_B.default.weight")
    assert not sharing.is_local("m.q_proj.lora_A.default.weight")
    assert sharing.trained_in("m.q_proj.lora_B.default.weight", 1)


def test_by_default_all_is_trained_in_all_rounds_and_nothing_stays_at_home() -> None:
    sharing = Sharing(exact=True)
    assert all(sharing.trained_in("anything", number) for number in range(5))
    assert not sharing.is_local("anything")


@pytest.mark.parametrize("two", [("freeze_a", "alternate"), ("alternate", "local_b"), ("freeze_a", "local_b")])
def test_lora_is_averaged_in_one_way(two: tuple[str, str]) -> None:
    with pytest.raises(ValidationError, match="give one of them"):
        method_of("lora", **dict.fromkeys(two, True))


def test_advice_is_for_those_whose_mean_is_not_exact() -> None:
    said = {name: advice(method) for name, method in AVERAGED.items()}
    assert {name for name, text in said.items() if text} == {
        name for name, method in AVERAGED.items() if not method.sharing.exact
    }
    text = said["lora"]
    assert text is not None
    for kind in ("freeze_a = true", "alternate = true", "'fed-sb'"):
        assert kind in text
    assert not said["fed-sb"]
    assert {"lora", "adalora", "vera", "lokr", "p-tuning", "bottleneck", "lst", "meft"} == {
        kind for kind in registered() if advice(method_of(kind)) is not None
    }
