"""The training loop against steps written out by hand, on a model that is small enough to follow."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farfield.edge_client.data import IGNORED, ClassExample, Example, TokenExample
from farfield.edge_client.train import evaluate, local_steps, train
from farfield.emulator.methods import Tuned
from farfield.emulator.schedule import learning_rate
from farfield.protocols.sections import Training
from farfield.protocols.tensors import State

VOCABULARY, WIDTH, PAD = 11, 6, 0

ROUNDING = 2**-20
"""A few units in the last place of a float32 of about 1; parameters and losses here are of that size."""


@dataclass
class Output:
    logits: torch.Tensor


class Bigram(torch.nn.Module):
    """Predicts a token from the one before: a frozen embedding, a trained layer, and a parameter that nothing uses."""

    def __init__(self, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype))
        self.weight = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype))
        self.unused = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        self.dropout = torch.nn.Dropout(dropout)
        self.embedding.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Output:
        return Output(self.dropout(self.embedding[input_ids]) @ self.weight.T)


class Pooled(Bigram):
    """A classifier: the mean over the tokens of the text."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Output:
        mask = attention_mask[..., None].to(self.embedding.dtype)
        return Output((self.embedding[input_ids] * mask).sum(1) / mask.sum(1) @ self.weight.T)


def tuned(model: Bigram | None = None) -> Tuned:
    return Tuned(model or Bigram())


def start_of(one: Tuned) -> State:
    return {name: p.detach().float().numpy().copy() for name, p in one.trainable().items()}


def settings(**keys: Any) -> Training:
    return Training.model_validate(
        {"rounds": 1, "steps": 1, "optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, **keys}
    )


def texts(*lengths: int) -> list[Example]:
    """Texts of these lengths; the first token of each is read and not learnt, and neither is every fifth."""
    generator = np.random.default_rng(1)
    found: list[Example] = []
    for length in lengths:
        ids = array("i", [int(one) for one in generator.integers(1, VOCABULARY, length)])
        labels = array("i", [IGNORED if place % 5 == 4 else token for place, token in enumerate(ids)])
        found.append(TokenExample(ids, labels))
    return found


def run(
    one: Tuned, examples: Sequence[Example], training: Training, *, start: State | None = None, **keys: Any
) -> State:
    values = {"seed": 1, "steps": 1, "first_step": 0, "horizon": 1, **keys}
    return dict(train(one, start or start_of(one), examples, training, pad_id=PAD, **values).update)


def pairs(examples: Sequence[Example]) -> list[tuple[int, int]]:
    """Every (token, next token) that is to be learnt."""
    return [
        (before, label)
        for example in examples
        if isinstance(example, TokenExample)
        for before, label in zip(example.input_ids, example.labels[1:], strict=False)
        if label != IGNORED
    ]


def gradient(model: Bigram, weight: np.ndarray[Any, Any], examples: Sequence[Example]) -> tuple[Any, float]:
    """Gradient by `weight` of the mean loss over all targets, and that loss, in float64 and without autograd."""
    embedding = model.embedding.detach().double().numpy()
    total, loss = np.zeros_like(weight), 0.0
    learnt = pairs(examples)
    for before, label in learnt:
        scores = weight @ embedding[before]
        chances = np.exp(scores - scores.max())
        chances /= chances.sum()
        loss -= math.log(chances[label])
        chances[label] -= 1
        total += np.outer(chances, embedding[before])
    return total / len(learnt), loss / len(learnt)


def test_one_sgd_step_is_the_one_written_by_hand() -> None:
    one, examples = tuned(), texts(7, 3, 9)
    weight = start_of(one)["weight"].astype(np.float64)
    expected, loss = gradient(Bigram(), weight, examples)
    done = train(one, start_of(one), examples, settings(), pad_id=PAD, seed=1, steps=1, first_step=0, horizon=1)
    np.testing.assert_allclose(done.update["weight"], -0.5 * expected, rtol=0, atol=ROUNDING)
    assert done.loss == pytest.approx(loss, abs=ROUNDING)
    assert (done.targets, done.steps) == (len(pairs(examples)), 1)
    trained = dict(one.model.named_parameters())["weight"].detach().numpy()
    np.testing.assert_array_equal(trained, (weight.astype(np.float32) + done.update["weight"]).astype(np.float32))
    assert not one.model.training


def test_a_parameter_that_gets_no_gradient_stays_where_it_is() -> None:
    for optimizer in ("sgd", "adamw"):
        update = run(tuned(), texts(7, 3), settings(optimizer=optimizer, steps=3), steps=3)
        assert not update["unused"].any()
        assert update["weight"].any()


def test_it_begins_at_the_start_that_it_is_given() -> None:
    one, examples = tuned(), texts(7, 3)
    start = start_of(one)
    first = run(one, examples, settings(), start=start)
    assert any(not np.array_equal(start_of(one)[name], start[name]) for name in start)
    again = run(one, examples, settings(), start=start)
    np.testing.assert_array_equal(first["weight"], again["weight"])


def test_tiny_updates_add_up_in_bfloat16() -> None:
    """Each step is a thousandth of what bfloat16 can tell apart near 1, and two thousand of them are not."""
    steps, rate = 2000, 2**-8 / 1000
    model = Bigram(torch.bfloat16)
    with torch.no_grad():
        model.weight.copy_(torch.ones_like(model.weight))
    one = tuned(model)
    before = model.weight.detach().clone()
    training = settings(optimizer="adamw", learning_rate=rate, steps=steps)
    update = run(one, texts(7), training, steps=steps, horizon=steps)["weight"]
    moved = np.abs(update).max()
    assert 2**-8 < moved < 1.01 * steps * rate
    changed = model.weight.detach() != before
    assert changed.any(), "the model itself never moved"
    # What is reported is what the masters moved, and the model holds it rounded.
    torch.testing.assert_close(
        model.weight.detach(), (before.float() + torch.from_numpy(update)).to(torch.bfloat16), rtol=0, atol=0
    )

    plain = torch.nn.Parameter(before.clone())
    optimizer = torch.optim.AdamW([plain], lr=rate, weight_decay=0.0)
    for _ in range(50):
        plain.grad = torch.ones_like(plain)
        optimizer.step()
    assert torch.equal(plain.detach(), before), "plain bfloat16 would have moved: the test shows nothing"


def test_two_batches_of_four_are_one_of_eight() -> None:
    """With unequal numbers of targets, which a mean of the batches' means would get wrong."""
    examples = texts(3, 4, 3, 9, 12, 2, 7, 30)
    whole = run(tuned(), examples, settings(batch_size=8))
    parts = run(tuned(), examples, settings(batch_size=4, gradient_accumulation=2))
    np.testing.assert_allclose(parts["weight"], whole["weight"], rtol=0, atol=ROUNDING)
    halves = [run(tuned(), part, settings(batch_size=8))["weight"] for part in (examples[:4], examples[4:])]
    assert np.abs(sum(halves) / 2 - whole["weight"]).max() > 100 * ROUNDING


def test_an_epoch_ends_with_what_is_left_of_a_group() -> None:
    """Five examples in batches of two, two batches a step: steps of four examples and of one, then from the front."""
    examples = texts(3, 4, 5, 6, 7)
    training = settings(batch_size=2, gradient_accumulation=2, epochs=1, steps=None)
    assert local_steps(training, len(examples)) == 2
    done = train(tuned(), start_of(tuned()), examples, training, pad_id=PAD, seed=1, steps=2, first_step=0, horizon=2)
    assert done.targets == len(pairs(examples))
    longer = train(tuned(), start_of(tuned()), examples, training, pad_id=PAD, seed=1, steps=4, first_step=0, horizon=4)
    assert longer.targets == 2 * len(pairs(examples))


@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_epochs_come_to_so_many_steps(examples: int, batch_size: int, accumulation: int, epochs: int) -> None:
    training = settings(steps=None, epochs=epochs, batch_size=batch_size, gradient_accumulation=accumulation)
    steps = 0
    for _ in range(epochs):
        left = examples
        while left > 0:
            left -= batch_size * accumulation
            steps += 1
    assert local_steps(training, examples) == steps
    assert local_steps(settings(steps=17), examples) == 17


def test_gradients_are_clipped_by_their_norm_over_all_parameters() -> None:
    examples = texts(7, 3, 9)
    free = run(tuned(), examples, settings())
    norm = math.sqrt(
        sum(
            float((array / 0.5) ** 2).real if array.ndim == 0 else float(((array / 0.5) ** 2).sum())
            for array in free.values()
        )
    )
    clipped = run(tuned(), examples, settings(max_grad_norm=norm / 4))
    np.testing.assert_allclose(clipped["weight"], free["weight"] / 4, rtol=1e-4)
    untouched = run(tuned(), examples, settings(max_grad_norm=norm * 2))
    np.testing.assert_array_equal(untouched["weight"], free["weight"])


def test_momentum_and_weight_decay_are_those_of_the_textbook() -> None:
    one, examples = tuned(), texts(7, 3)
    x = x0 = start_of(one)["weight"].astype(np.float64)
    velocity = np.zeros_like(x)
    for _ in range(3):
        velocity = 0.9 * velocity + gradient(Bigram(), x, examples)[0] + 0.01 * x
        x = x - 0.5 * velocity
    training = settings(momentum=0.9, weight_decay=0.01, steps=3)
    update = run(one, examples, training, steps=3, horizon=3)["weight"]
    np.testing.assert_allclose(update, x - x0, rtol=0, atol=8 * ROUNDING)


def test_fedprox_pulls_back_to_the_start() -> None:
    """x ← x - η (g + μ (x - x₀)): nothing in the first step, then more the further it has gone."""
    one, examples, mu = tuned(), texts(7, 3), 0.3
    x = x0 = start_of(one)["weight"].astype(np.float64)
    for _ in range(4):
        x = x - 0.5 * (gradient(Bigram(), x, examples)[0] + mu * (x - x0))
    update = run(one, examples, settings(proximal_mu=mu, steps=4), steps=4, horizon=4)["weight"]
    np.testing.assert_allclose(update, x - x0, rtol=0, atol=8 * ROUNDING)
    free = run(tuned(), examples, settings(steps=4), steps=4, horizon=4)["weight"]
    assert np.linalg.norm(update) < 0.9 * np.linalg.norm(free)


def test_the_same_seed_gives_the_same_update_to_the_last_bit() -> None:
    examples, training = texts(*range(3, 15)), settings(batch_size=2)
    updates = []
    for seed, elsewhere in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        updates.append(run(tuned(Bigram(dropout=0.5)), examples, training, seed=seed, steps=3, horizon=3)["weight"])
        assert torch.equal(torch.get_rng_state(), before), "training drew from the global generator"
    assert np.array_equal(updates[0], updates[1])
    assert not np.array_equal(updates[0], updates[2])


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    examples = texts(7, 3)
    dropped = run(tuned(Bigram(dropout=0.5)), examples, settings())["weight"]
    assert not np.allclose(dropped, run(tuned(), examples, settings())["weight"])
    one = tuned(Bigram(dropout=0.5))
    one.model.train()
    assert evaluate(one, examples, 2, pad_id=PAD) == evaluate(tuned(), examples, 2, pad_id=PAD)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.1, 0.2, 0.2, 0.2, 0.2, 0.2]),
        ("linear", [0.1, 0.2, 0.2, 0.15, 0.1, 0.05]),
        ("cosine", [0.1, 0.2, 0.2, 0.2 * (0.5 + 0.25 * math.sqrt(2)), 0.1, 0.2 * (0.5 - 0.25 * math.sqrt(2))]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    training = settings(schedule=schedule, learning_rate=0.2, warmup_steps=2)
    assert [learning_rate(training, step, 6) for step in range(6)] == pytest.approx(expected)


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 30), st.integers(1, 30), st.floats(1e-6, 10))
def test_no_step_of_any_schedule_is_idle_or_over_the_rate(
    schedule: str, warmup: int, horizon: int, rate: float
) -> None:
    training = settings(schedule=schedule, learning_rate=rate, warmup_steps=warmup)
    assert all(0 < learning_rate(training, step, horizon) <= rate * (1 + 1e-12) for step in range(horizon))


def test_the_schedule_runs_over_all_rounds() -> None:
    """Two rounds of two steps are the four steps of one run: the second begins where the first left off."""
    examples = texts(7, 3)
    training = settings(schedule="linear", rounds=2, steps=2, warmup_steps=1)
    x = start_of(tuned())["weight"].astype(np.float64)
    for step in range(4):
        x = x - 0.5 * (1, 1, 2 / 3, 1 / 3)[step] * gradient(Bigram(), x, examples)[0]
    one = tuned()
    start = start_of(one)
    for first in (0, 2):
        update = run(one, examples, training, start=start, steps=2, first_step=first, horizon=4)
        start = {name: start[name] + update[name] for name in start}
    np.testing.assert_allclose(start["weight"], x, rtol=0, atol=8 * ROUNDING)


def test_every_step_is_told_with_its_loss() -> None:
    losses: list[float] = []
    one, examples = tuned(), texts(7, 3)
    done = train(
        one, start_of(one), examples, settings(), pad_id=PAD, seed=1, steps=5, first_step=0, horizon=5,
        on_step=losses.append,
    )  # fmt: skip
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert done.loss == pytest.approx(sum(losses) / 5)


def test_what_a_method_prunes_after_backward_stays_pruned() -> None:
    """AdaLoRA sets values to zero in the model; the masters must not bring them back."""
    for dtype in (torch.float32, torch.bfloat16):
        model = Bigram(dtype)
        seen: list[int] = []

        def prune(step: int, model: Bigram = model, seen: list[int] = seen) -> None:
            seen.append(step)
            with torch.no_grad():
                model.weight[0] = 0
            assert model.weight.grad is not None
            model.weight.grad[0] = 0

        start = start_of(tuned(model))
        update = run(Tuned(model, prune), texts(7, 3), settings(), start=start, steps=2, first_step=4, horizon=6)
        assert seen == [4, 5]
        assert not model.weight[0].any()
        np.testing.assert_array_equal(update["weight"][0], -start["weight"][0])
        assert (update["weight"][1] != 0).any()


def test_evaluation_is_the_loss_by_hand() -> None:
    one, examples = tuned(), texts(7, 3, 9, 2, 14)
    weight = start_of(one)["weight"].astype(np.float64)
    embedding = Bigram().embedding.detach().double().numpy()
    learnt = pairs(examples)
    hits = sum(int(np.argmax(weight @ embedding[before])) == label for before, label in learnt)
    for batch_size in (1, 2, 5, 50):
        measured = evaluate(one, examples, batch_size, pad_id=PAD)
        assert measured.loss == pytest.approx(gradient(Bigram(), weight, examples)[1], abs=ROUNDING)
        assert (measured.targets, measured.correct) == (len(learnt), hits)
    assert 0 < hits < len(learnt), "the example tells hits from targets"


def test_classes_are_predicted_from_whole_texts() -> None:
    examples: list[Example] = [ClassExample(array("i", ids), label) for ids, label in (([3, 4], 1), ([5, 6, 7], 2))]
    model = Pooled()
    embedding, weight = (p.detach().double() for p in (model.embedding, model.weight))
    losses = [
        -float(torch.log_softmax(weight @ embedding[list(example.input_ids)].mean(0), 0)[example.label])
        for example in examples
        if isinstance(example, ClassExample)
    ]
    measured = evaluate(tuned(model), examples, 2, pad_id=PAD)
    assert measured.loss == pytest.approx(sum(losses) / 2, abs=ROUNDING)
    assert measured.targets == 2
    done = train(
        tuned(model), start_of(tuned(model)), examples, settings(), pad_id=PAD, seed=1, steps=1, first_step=0, horizon=1
    )
    assert done.targets == 2
    assert done.loss == pytest.approx(measured.loss, abs=ROUNDING)
    assert evaluate(tuned(model), examples, 2, pad_id=PAD).loss < measured.loss


def test_logits_of_virtual_tokens_are_passed_over() -> None:
    """Prompt tuning makes the logits longer than the text; the text's are the last."""

    class Prompted(Bigram):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Output:
            logits = super().forward(input_ids, attention_mask).logits
            return Output(torch.cat([torch.full_like(logits[:, :2], 9.0), logits], dim=1))

    examples = texts(7, 3)
    assert evaluate(tuned(Prompted()), examples, 2, pad_id=PAD) == evaluate(tuned(), examples, 2, pad_id=PAD)
