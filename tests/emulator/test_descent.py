"""The loop of all training: what ends it, and what it leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from farfield.emulator.descent import Descent, Loss, descend
from farfield.emulator.methods import Tuned
from farfield.protocols.errors import TuningError
from farfield.protocols.sections import Training
from farfield.protocols.tensors import Arrays


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor([2.0]))


def training(rate: float = 0.25, **keys: object) -> Training:
    return Training.model_validate(
        {"rounds": 1, "steps": 1, "optimizer": "sgd", "learning_rate": rate, "max_grad_norm": 0.0, **keys}
    )


def squared(model: Line) -> Callable[[int], Loss]:
    def loss(backward: bool) -> float:
        value = model.slope.square().sum()
        if backward:
            value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    return lambda _: loss


def start(model: Line) -> Arrays:
    return {"slope": model.slope.detach().numpy().copy()}


def test_steps_are_those_of_gradient_descent() -> None:
    model = Line()
    told: list[tuple[int, float]] = []
    update = descend(
        Tuned(model), start(model), training(), squared(model),
        seed=0, steps=2, first_step=3, horizon=9, on_step=lambda step, loss: told.append((step, loss)),
    )  # fmt: skip
    # x ← x − 0.25 · 2x halves it.
    assert told == [(3, 4.0), (4, 1.0)]
    assert update["slope"] == pytest.approx([-1.5])
    assert float(model.slope.detach()) == 0.5
    assert not model.training


def test_a_loss_that_is_no_number_ends_it_with_a_word_on_what_to_do() -> None:
    model = Line()
    with pytest.raises(TuningError, match=r"the loss is nan in step 2.*Lower training.learning_rate, which is 0.25"):
        descend(Tuned(model), start(model), training(), lambda step: lambda _: [1.0, math.nan][step], seed=0, steps=2)
    assert not model.training


def test_a_loss_that_runs_away_ends_it() -> None:
    model = Line()
    with pytest.raises(TuningError, match=r"diverges: the loss is 16 in step 2, and was 4"):
        descend(Tuned(model), start(model), training(1.5), squared(model), seed=0, steps=9)


def test_a_value_that_is_no_number_is_no_update() -> None:
    model = Line()

    def poisoned(backward: bool) -> float:
        model.slope.grad = torch.tensor([math.nan])
        return 1.0

    with pytest.raises(TuningError, match="a trained value is no longer a number"):
        descend(Tuned(model), start(model), training(), lambda _: poisoned, seed=0, steps=1)


def test_a_method_may_take_its_own_steps() -> None:
    class Decrement:
        def __init__(self, begin: Arrays, seed: int) -> None:
            self.value, self.seed = np.zeros_like(begin["slope"]), seed

        def step(self, number: int, rate: float, loss: Loss) -> float:
            assert not model.training
            self.value -= rate * self.seed
            return loss(False)

        def update(self) -> Arrays:
            return {"slope": self.value}

    model = Line()
    made: Callable[[Arrays, Training, int], Descent] = lambda begin, _, seed: Decrement(begin, seed)  # noqa: E731
    update = descend(Tuned(model, descent=made), start(model), training(), squared(model), seed=3, steps=2)
    assert update["slope"] == pytest.approx([-1.5])
    assert float(model.slope.detach()) == 2.0
