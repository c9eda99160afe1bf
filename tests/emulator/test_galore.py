"""GaLore against its algorithm, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, build
from test_methods import method_of

from farfield.emulator.galore import GaLore, basis
from farfield.emulator.methods import Setting, registered
from farfield.protocols.errors import PlanError
from farfield.protocols.plan import parse
from farfield.protocols.sections import Training

RATE, DECAY = 0.02, 0.1


def algorithm_2(weight: torch.Tensor, gradients: list[torch.Tensor], rank: int, interval: int, scale: float) -> Any:
    """Zhao et al. 2024, algorithm 2, as it stands there, for m ≤ n; with decoupled weight decay."""
    first: Any = 0
    second: Any = 0
    for t, gradient in enumerate(gradients):
        g = -gradient
        if t % interval == 0:
            p = basis(g, rank)  # which has a test of its own: signs of singular vectors are anybody's choice
        r = p.T @ g
        first = 0.9 * first + 0.1 * r
        second = 0.999 * second + 0.001 * r**2
        n = (first / (1 - 0.9 ** (t + 1))) / ((second / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)
        weight = weight * (1 - RATE * DECAY) + RATE * scale * p @ n
    return weight


def drawn(shape: tuple[int, ...], count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def stepped(start: torch.Tensor, gradients: list[torch.Tensor], **settings: Any) -> tuple[torch.Tensor, GaLore]:
    value = start.clone()
    optimizer = GaLore([value], RATE, weight_decay=DECAY, **settings)
    for gradient in gradients:
        value.grad = gradient.clone()
        optimizer.step()
    return value, optimizer


@pytest.mark.parametrize("shape", [(6, 9), (7, 7)])
@pytest.mark.parametrize(("rank", "interval"), [(2, 1), (3, 4), (5, 100)])
def test_it_is_algorithm_2(shape: tuple[int, int], rank: int, interval: int) -> None:
    start, *gradients = drawn(shape, 10)
    expected = algorithm_2(start, gradients, rank, interval, 0.25)
    ours, _ = stepped(start, gradients, rank=rank, interval=interval, scale=0.25)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    if shape[0] < shape[1]:  # where m > n it is the other side that is projected
        tall, _ = stepped(start.T, [one.T for one in gradients], rank=rank, interval=interval, scale=0.25)
        torch.testing.assert_close(tall.T, ours, rtol=0, atol=1e-10)


def test_a_basis_is_of_the_strongest_singular_vectors() -> None:
    (gradient,) = drawn((6, 9), 1)
    found = basis(gradient, 3)
    wanted = torch.linalg.svd(gradient).U[:, :3]
    torch.testing.assert_close((found.T @ wanted).abs(), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_basis_is_kept_for_an_interval() -> None:
    start, *gradients = drawn((6, 9), 7)
    seen = []
    for count in range(1, 8):
        _, optimizer = stepped(start, gradients[:count], rank=2, interval=3, scale=1.0)
        (state,) = optimizer.state.values()
        seen.append(tuple(state["basis"].flatten().tolist()))
    assert [len(set(seen[a : a + 3])) for a in (0, 3)] == [1, 1]
    assert seen[2] != seen[3]


def test_the_whole_rank_is_adam_in_another_basis_and_vectors_have_adam_itself() -> None:
    for shape in ((5,), (3, 9)):
        start, *gradients = drawn(shape, 6)
        ours, _ = stepped(start, gradients, rank=3, interval=2, scale=0.25)
        value = start.clone()
        adam = torch.optim.AdamW([value], lr=RATE, weight_decay=DECAY)
        for gradient in gradients:
            value.grad = gradient
            adam.step()
        torch.testing.assert_close(ours, value, rtol=0, atol=1e-12)


def test_what_is_kept_is_of_its_rank() -> None:
    start, gradient = drawn((40, 90), 2)
    _, optimizer = stepped(start, [gradient], rank=4, interval=5, scale=1.0)
    (state,) = optimizer.state.values()
    assert sum(one.numel() for one in state.values() if torch.is_tensor(one)) == 4 * (40 + 2 * 90)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_it_trains_what_full_trains_by_steps_of_its_rank(family: str) -> None:
    setting = Setting(FAMILIES[family].task, 5, None)
    galore = method_of("galore", rank=4, interval=7, scale=0.5).install(build(family), setting)
    assert galore.trainable().keys() == method_of("full").install(build(family), setting).trainable().keys()
    assert galore.optimizer is not None
    values = {name: one.detach().clone() for name, one in galore.trainable().items()}
    training = Training(rounds=1, steps=1, learning_rate=RATE)
    optimizer = galore.optimizer(training, values)
    before = {name: value.clone() for name, value in values.items()}
    generator = torch.Generator().manual_seed(1)
    for value in values.values():
        value.grad = torch.randn(value.shape, generator=generator)
    optimizer.step()
    ranks = {
        int(torch.linalg.matrix_rank(value - before[name], rtol=1e-4))
        for name, value in values.items()
        if value.ndim == 2 and min(value.shape) > 4
    }
    assert ranks == {4}


def test_another_optimiser_is_refused_when_the_plan_is_read() -> None:
    text = '[model]\nbackbone = "builtin:tiny-llama-py"\n[tuning]\nkind = "{}"\n[training]\nrounds = 1\nsteps = 1\n'
    with pytest.raises(PlanError, match=r"'galore' has a step of its own.*use 'adamw'"):
        parse(text.format("galore") + 'optimizer = "adafactor"\n', registered(), None)
    with pytest.raises(PlanError, match=r"'lora-fa' has a step of its own.*use 'adamw' or"):
        parse(text.format("lora-fa") + 'optimizer = "sgd"\n', registered(), None)
