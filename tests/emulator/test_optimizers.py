"""The Plan's lean optimisers: as far as they go beside AdamW, and what they hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from farfield.emulator.schedule import make_optimizer
from farfield.protocols.sections import Training

SHAPES = {"A": (8, 128), "B": (128, 8), "bias": (5,), "wide": (96, 70)}


def descended(name: Any, steps: int = 40) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer, float]:
    """Values drawn to a target from zero, as an adapter's are; A has no gradient in the first step, as LoRA's has not.

    Returns them, the optimiser, and the share of the distance that is left.
    """
    draw = torch.Generator().manual_seed(0)
    targets = {key: torch.randn(shape, generator=draw) for key, shape in SHAPES.items()}
    values = {key: torch.zeros(shape) for key, shape in SHAPES.items()}
    training = Training(rounds=1, steps=steps, optimizer=name, learning_rate=1e-2, weight_decay=0.01)
    optimizer = make_optimizer(training, values)
    for step in range(steps):
        for key, value in values.items():
            value.grad = (value.detach() - targets[key]) * (0 if key == "A" and step == 0 else 1)
        optimizer.step()
    left = sum(float((values[key] - target).square().sum()) for key, target in targets.items())
    return values, optimizer, left / sum(float(one.square().sum()) for one in targets.values())


def held(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all that it keeps for each value; the levels of 8 bits are one table for all."""
    kept = [(key, one) for state in optimizer.state.values() for key, one in state.items() if key[:4] != "qmap"]
    return sum(one.nbytes for _, one in kept if isinstance(one, torch.Tensor))


def test_eight_bits_go_where_adamw_goes_with_a_quarter_of_its_memory() -> None:
    whole, adamw, _ = descended("adamw")
    small, lean, _ = descended("adamw-8bit")
    for key, value in whole.items():
        # The moments have a few per cent of error each, which mostly cancel over the steps.
        assert float((small[key] - value).norm() / value.norm()) < 0.05, key
    values = sum(one.numel() for one in whole.values())
    assert held(adamw) >= 8 * values
    assert held(lean) < 2.1 * values + 8 * len(SHAPES)
    kinds = {state[key].dtype for state in lean.state.values() for key in ("state1", "state2")}
    assert kinds == {torch.uint8}, "no tensor is too small for it"


def test_adafactor_moves_what_begins_at_zero_and_holds_rows_and_columns_only() -> None:
    _, adamw, near = descended("adamw")
    _, lean, far = descended("adafactor")
    assert far < 1.1 * near < 0.9
    matrices = [shape for shape in SHAPES.values() if len(shape) == 2]
    assert held(lean) <= 4 * (sum(map(sum, matrices)) + 5 + len(SHAPES))
    assert held(lean) < held(adamw) / 20


@pytest.mark.parametrize("name", ["adamw-8bit", "adafactor", "adamw", "sgd"])
def test_the_same_gradients_give_the_same_values(name: str) -> None:
    one, other = descended(name, steps=3)[0], descended(name, steps=3)[0]
    assert all(torch.equal(one[key], other[key]) for key in one)
