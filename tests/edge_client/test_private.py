"""DP-SGD against sums, clips and divisions written out by hand, and its randomness against its distribution."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from opacus.accountants import RDPAccountant
from opacus.grad_sample import GradSampleModule
from scipy import stats

from farfield.edge_client import per_example, private
from farfield.edge_client.data import IGNORED, ClassExample, Example, TokenExample, collate
from farfield.edge_client.private import sample, train
from farfield.edge_client.train import Outcome, forward
from farfield.emulator.methods import Setting, Tuned, TuningMethod, registered
from farfield.kernels import cross_entropy
from farfield.protocols.errors import TuningError
from farfield.protocols.privacy.accounting import SampledGaussian, spent
from farfield.protocols.privacy.mechanism import ExampleMechanism
from farfield.protocols.randomness import Randomness
from farfield.protocols.sections import Training
from farfield.protocols.tensors import Arrays, State

VOCABULARY, WIDTH, PAD, RATE = 11, 6, 0, 0.5
KEY = bytes(range(32))
FAINT = 1e-6
"""A noise multiplier under which what is computed shows; 2⁻²⁰ of the gradients here."""

ROUNDING = 2**-18


class Bigram(torch.nn.Module):
    """Predicts a token from the one before."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.embedding = torch.nn.Parameter(torch.randn(VOCABULARY, width, generator=generator).to(dtype))
        self.embedding.requires_grad_(False)
        self.layer = torch.nn.Linear(width, VOCABULARY, dtype=dtype)
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        logits = self.layer(self.dropout(self.embedding[input_ids]))
        return transformers.modeling_outputs.CausalLMOutput(logits=logits)


def start_of(one: Tuned) -> State:
    return {name: p.detach().float().numpy().copy() for name, p in one.trainable().items()}


def settings(**keys: Any) -> Training:
    return Training.model_validate(
        {"rounds": 1, "steps": 1, "optimizer": "sgd", "learning_rate": RATE, "batch_size": 4, **keys}
    )


def texts(*lengths: int) -> list[Example]:
    """Texts of these lengths; every fifth token is read and not learnt."""
    generator = np.random.default_rng(1)
    found: list[Example] = []
    for length in lengths:
        ids = array("i", [int(one) for one in generator.integers(1, VOCABULARY, length)])
        found.append(TokenExample(ids, array("i", [IGNORED if i % 5 == 4 else one for i, one in enumerate(ids)])))
    return found


def mute(count: int) -> list[Example]:
    """Texts from which nothing is to be learnt: their gradients are zero."""
    return [TokenExample(array("i", [1, 2, 3]), array("i", [IGNORED] * 3)) for _ in range(count)]


def run(
    one: Tuned,
    examples: Sequence[Example],
    mechanism: ExampleMechanism,
    training: Training | None = None,
    key: bytes = KEY,
    **keys: Any,
) -> Outcome:
    values = {"seed": 1, "first_step": 0, "horizon": mechanism.steps, **keys}
    return train(one, start_of(one), examples, training or settings(), mechanism, Randomness(key), pad_id=PAD, **values)


def by_a_loop(one: Tuned, examples: Sequence[Example]) -> list[dict[str, NDArray[np.float64]]]:
    """The gradient of each example's mean loss, by a backward pass for each."""
    found = []
    for example in examples:
        logits, labels = forward(one, collate([example], PAD), torch.device("cpu"))
        targets = max(1, int((labels != IGNORED).sum()))
        (cross_entropy.summed(logits, labels) / targets).backward()  # type: ignore[no-untyped-call]
        gradients = {}
        for name, parameter in one.trainable().items():
            gradients[name] = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.double().numpy()
            parameter.grad = None
        found.append(gradients)
    return found


def norm(gradients: State | dict[str, NDArray[np.float64]]) -> float:
    return math.sqrt(sum(float((one.astype(np.float64) ** 2).sum()) for one in gradients.values()))


def minus(one: Arrays, other: Arrays) -> dict[str, NDArray[np.float64]]:
    return {name: one[name].astype(np.float64) - other[name] for name in one}


def noise_of(update: Arrays, values: int) -> NDArray[np.float64]:
    flat = np.concatenate([one.flatten() for one in update.values()]).astype(np.float64)
    assert len(flat) == values
    return flat


# What a step is


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_step_is_the_one_written_by_hand(batch_size: int) -> None:
    one, examples, limit, rate = Tuned(Bigram()), texts(7, 3, 9, 2, 12, 5), 1.2, 0.8
    gradients = by_a_loop(one, examples)
    batch = sample(len(examples), rate, Randomness(KEY))
    assert batch_size > 3 or len(batch) > batch_size, "nothing is put together from parts"
    norms = [norm(gradients[index]) for index in batch]
    assert min(norms) < limit < max(norms)
    done = run(one, examples, ExampleMechanism(FAINT, limit, rate, 1), settings(batch_size=batch_size))
    for name, update in done.update.items():
        total = sum(gradients[index][name] * min(1, limit / size) for index, size in zip(batch, norms, strict=True))
        np.testing.assert_allclose(update, -RATE * total / (rate * len(examples)), rtol=0, atol=ROUNDING)


def test_the_plans_optimiser_and_schedule_go_on_over_rounds_and_nothing_is_clipped_twice() -> None:
    """With AdamW a step is its rate in each value, whatever the gradient: that shows the schedule."""
    one, examples = Tuned(Bigram()), texts(7, 3, 9)
    training = settings(optimizer="adamw", schedule="linear", max_grad_norm=1e-9)
    moved = run(one, examples, ExampleMechanism(1.0, 1.0, 1.0, 1), training, first_step=3, horizon=4).update
    np.testing.assert_allclose(np.abs(noise_of(moved, 7 * VOCABULARY)), RATE / 4, rtol=1e-3)


def test_fedprox_pulls_back_without_being_clipped() -> None:
    """x ← x − η (noise + μ (x − x₀)), with the same noise in both runs."""
    mechanism, mu = ExampleMechanism(1.0, 1.0, 1.0, 1), 0.3
    once = run(Tuned(Bigram()), mute(3), mechanism).update
    twice = ExampleMechanism(1.0, 1.0, 1.0, 2)
    free = run(Tuned(Bigram()), mute(3), twice).update
    pulled = run(Tuned(Bigram()), mute(3), twice, settings(proximal_mu=mu)).update
    for name in once:
        np.testing.assert_allclose(pulled[name], free[name] - RATE * mu * once[name], rtol=0, atol=2**-20)


def test_tiny_updates_add_up_in_bfloat16() -> None:
    one = Tuned(Bigram(dtype=torch.bfloat16))
    training = settings(optimizer="adamw", learning_rate=2**-8 / 100)
    update = run(one, texts(7, 3), ExampleMechanism(FAINT, 1.0, 1.0, 200), training).update
    assert {array.dtype for array in update.values()} == {np.dtype(np.float32)}
    assert max(float(np.abs(array).max()) for array in update.values()) > 2**-8


# What one example can do


def test_an_example_moves_the_sum_by_the_clipping_norm_and_no_more() -> None:
    quiet = texts(7, 3, 9)
    limit, silenced = 0.7, [*quiet, *mute(1)]
    model = Bigram()
    with torch.no_grad():
        model.embedding[VOCABULARY - 1] = 1e4  # whoever has this token has a gradient of thousands
    loud = TokenExample(array("i", [VOCABULARY - 1] * 3), array("i", [1, 2, 3]))
    one, mechanism = Tuned(model), ExampleMechanism(FAINT, limit, 1.0, 1)
    start = start_of(one)
    assert norm(by_a_loop(one, [loud])[0]) > 1000 * limit
    influence = []
    for examples in ([*quiet, loud], silenced):
        training, random = settings(batch_size=2), Randomness(KEY)
        done = train(one, start, examples, training, mechanism, random, pad_id=PAD, seed=1, first_step=0, horizon=1)
        influence.append(done.update)
    moved = norm(minus(*influence)) * len(silenced) / RATE
    assert moved == pytest.approx(limit, rel=1e-5)


def test_an_example_that_overflows_does_not_show() -> None:
    model = Bigram()
    with torch.no_grad():
        model.embedding[VOCABULARY - 1] = math.inf
    broken = TokenExample(array("i", [VOCABULARY - 1] * 3), array("i", [1, 2, 3]))
    quiet: list[Example] = [TokenExample(array("i", [1, 2, 3]), array("i", [1, 2, 3]))]
    mechanism = ExampleMechanism(FAINT, 0.7, 1.0, 1)
    found = run(Tuned(model), [*quiet, broken], mechanism).update
    for name, expected in run(Tuned(Bigram()), [*quiet, *mute(1)], mechanism).update.items():
        assert expected.any()
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2**-20)


def test_losses_are_not_told() -> None:
    told: list[float] = []
    done = run(Tuned(Bigram()), texts(7, 3), ExampleMechanism(1.0, 1.0, 0.5, 3), on_step=told.append)
    assert (done.loss, done.targets, done.steps) == (0.0, 0, 3)
    assert len(told) == 3
    assert all(math.isnan(loss) for loss in told)


# The noise


def fits(values: NDArray[np.float64], std: float) -> bool:
    """Whether `values` look like draws of N(0, std²): by their variance and by Kolmogorov and Smirnov's test."""
    variance = stats.chi2(len(values)).cdf((values**2).sum() / std**2)
    return bool(1e-4 < variance < 1 - 1e-4 and stats.kstest(values / std, "norm").pvalue > 1e-4)


def test_without_a_gradient_what_is_left_is_the_noise() -> None:
    width, limit, multiplier, rate, count = 400, 0.7, 1.3, 0.25, 13
    mechanism = ExampleMechanism(multiplier, limit, rate, 1)
    update = run(Tuned(Bigram(width)), mute(count), mechanism).update
    noise = noise_of(update, (width + 1) * VOCABULARY) / -RATE
    expected = multiplier * limit / (rate * count)
    assert fits(noise, expected)
    # The same test finds noise that is halved, or off by a tenth, or divided by what was in the batch.
    in_batch = len(sample(count, rate, Randomness(KEY)))
    assert in_batch != rate * count
    for wrong in (expected / 2, expected * 1.1, expected * rate * count / in_batch):
        assert not fits(noise, wrong)


def test_noise_is_new_in_each_step_and_comes_once_whatever_the_parts() -> None:
    mechanism = ExampleMechanism(1.0, 1.0, 1.0, 1)
    whole = run(Tuned(Bigram(400)), mute(6), mechanism, settings(batch_size=6)).update
    parts = run(Tuned(Bigram(400)), mute(6), mechanism, settings(batch_size=1)).update
    np.testing.assert_array_equal(noise_of(parts, 401 * VOCABULARY), noise_of(whole, 401 * VOCABULARY))
    twice = run(Tuned(Bigram(400)), mute(6), ExampleMechanism(1.0, 1.0, 1.0, 2)).update
    second = noise_of(twice, 401 * VOCABULARY) - noise_of(whole, 401 * VOCABULARY)
    assert fits(second, RATE / 6)
    assert abs(stats.pearsonr(second, noise_of(whole, 401 * VOCABULARY)).statistic) < 4 / math.sqrt(len(second))


def test_an_empty_batch_is_a_step_of_noise() -> None:
    rate, count = 1e-12, 5
    done = run(Tuned(Bigram(400)), texts(7, 3, 9, 2, 4), ExampleMechanism(1.0, 1.0, rate, 1))
    assert done.steps == 1
    assert fits(noise_of(done.update, 401 * VOCABULARY), RATE / (rate * count))


def test_key_and_seed_decide_everything() -> None:
    mechanism, updates = ExampleMechanism(1.0, 1.0, 0.5, 3), []
    for key, seed, elsewhere in ((KEY, 1, 0), (KEY, 1, 99), (KEY, 2, 0), (bytes(32), 1, 0)):
        model = Tuned(Bigram(dropout=0.5))
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        updates.append(run(model, texts(*range(3, 15)), mechanism, key=key, seed=seed).update["layer.weight"])
        assert torch.equal(torch.get_rng_state(), before), "training drew from the global generator"
    assert np.array_equal(updates[0], updates[1])
    assert not np.array_equal(updates[0], updates[2])
    assert not np.array_equal(updates[0], updates[3])


# The sampling


def poisson(batches: list[frozenset[int]], count: int, rate: float) -> bool:
    """Whether `batches` look as if each of `count` were in each with probability `rate`, independently of all else."""
    there = np.array([[index in batch for index in range(count)] for batch in batches], dtype=np.float64)
    sizes = there.sum(axis=1)
    grouped = np.clip(sizes, *stats.binom(count, rate).ppf([0.02, 0.98]))  # so that each group has enough in it
    groups, observed = np.unique(grouped, return_counts=True)
    cdf = stats.binom(count, rate).cdf
    edges = [0.0, *(cdf(group) for group in groups[:-1]), 1.0]
    chances = [
        stats.chisquare(observed, np.diff(edges) * len(batches)).pvalue,
        stats.binomtest(int(sizes.sum()), there.size, rate).pvalue,
        # One after the other, and one beside the other: both in with probability q².
        stats.binomtest(int((there[1:] * there[:-1]).sum()), there[1:].size, rate**2).pvalue,
        stats.binomtest(int((there[:, 1:] * there[:, :-1]).sum()), there[:, 1:].size, rate**2).pvalue,
    ]
    each = stats.binom(len(batches), rate).cdf(there.sum(axis=0))
    return bool(min(chances) > 1e-3 and each.min() > 1e-5 and each.max() < 1 - 1e-5)


def test_the_sampling_done_is_the_sampling_accounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who really went through the model, in every step of a run."""
    count, rate, steps = 20, 0.3, 700
    examples = mute(count)
    numbers = {id(example): number for number, example in enumerate(examples)}
    parts: list[list[int]] = []
    batches: list[frozenset[int]] = []

    def watched(part: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
        parts.append([numbers[id(example)] for example in part])
        return collate(part, pad_id)

    def step(_: float) -> None:
        seen = [number for part in parts for number in part]
        assert len(set(seen)) == len(seen)
        batches.append(frozenset(seen))
        parts.clear()

    monkeypatch.setattr(private, "collate", watched)
    run(Tuned(Bigram()), examples, ExampleMechanism(1.0, 1.0, rate, steps), settings(batch_size=5), on_step=step)
    assert len(batches) == steps
    assert poisson(batches, count, rate)

    generator = np.random.default_rng(5)
    fixed = [frozenset(generator.choice(count, 6, replace=False).tolist()) for _ in range(steps)]
    assert not poisson(fixed, count, rate), "batches of a fixed size pass"
    assert not poisson(batches, count, rate * 1.1), "another rate passes"
    assert not poisson([batch for batch in batches for _ in range(2)][:steps], count, rate), "each batch twice passes"


def test_a_rate_of_one_takes_everybody() -> None:
    assert sample(50, 1.0, Randomness(KEY)) == list(range(50))


def test_opacus_would_account_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opacus' accountant, told of each step by its own optimiser, counts what the mechanism says."""
    rate, multiplier, steps = 0.1, 1.1, 40
    accountant = RDPAccountant()

    class Told(private.NoisyOptimizer):
        def __init__(self, *arguments: Any, **keys: Any) -> None:
            super().__init__(*arguments, **keys)
            self.attach_step_hook(accountant.get_optimizer_hook_fn(rate))

    monkeypatch.setattr(private, "NoisyOptimizer", Told)
    mechanism = ExampleMechanism(multiplier, 1.0, rate, steps)
    run(Tuned(Bigram()), texts(*range(2, 22)), mechanism, settings(batch_size=2))
    assert accountant.history == [(multiplier, rate, steps)]
    ours = spent({mechanism.release: mechanism.releases}, 1e-5)
    assert mechanism.release == SampledGaussian(multiplier, rate)
    assert ours.epsilon <= accountant.get_epsilon(1e-5) * 1.001


# Tuning methods

SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "adalora": {"initial_rank": 4, "target_rank": 2, "interval": 1},
    "lokr": {"rank": 2},
    "vera": {"rank": 8},
    "fed-sb": {"rank": 4},
    "prompt-tuning": {"tokens": 3},
    "p-tuning": {"tokens": 3},
    "prefix-tuning": {"tokens": 3},
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ffa-lora": ("lora", {"freeze_a": True}),
    "rslora": ("lora", {"rslora": True}),
    "dora": ("lora", {"dora": True}),
    "prefix-projected": ("prefix-tuning", {"projection": True}),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {kind: (kind, {}) for kind in registered()} | VARIANTS

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_SILENT: dict[str, Any] = {"num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
hf: Any = transformers
MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "llama": ("causal-lm", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, num_key_value_heads=2))),
    # Strings all tokens of a batch together between its two feed-forward layers.
    "opt": (
        "causal-lm",
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**_SIZES, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0)),
    ),
    # The head is of two layers, reads one token, and is trained whole.
    "roberta": (
        "sequence-classification",
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_SIZES, **_SILENT)),
    ),
}


def settings_of(name: str, **more: Any) -> TuningMethod:
    kind, settings = METHODS[name]
    return registered()[kind].model_validate({"kind": kind, **SMALL.get(kind, {}), **settings, **more})


def install(name: str, family: str, **more: Any) -> Tuned:
    """The method, with trained values that are not zero: where B is, A has no gradient."""
    task, build = MODELS[family]
    method = settings_of(name, **more)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        tuned = method.install(build(), Setting(task, 5, 4))
        with torch.no_grad():
            for parameter in tuned.trainable().values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return tuned


def examples_of(family: str) -> list[Example]:
    generator = np.random.default_rng(2)
    found: list[Example] = []
    for label, length in enumerate((5, 9, 7)):
        ids = array("i", [int(one) for one in generator.integers(3, 64, length)])
        found.append(TokenExample(ids, ids) if family != "roberta" else ClassExample(ids, label))
    return found


def recorded(tuned: Tuned, examples: list[Example]) -> dict[str, torch.Tensor]:
    with per_example.recording(tuned) as recorder:
        return dict(private._gradients(recorder, tuned, examples, PAD, torch.device("cpu")))


@pytest.mark.parametrize(
    ("name", "family"),
    # Encoders take no prefix.
    [
        (name, family)
        for name in METHODS
        for family in MODELS
        if (METHODS[name][0], family) != ("prefix-tuning", "roberta")
    ],
)
def test_gradients_of_each_example_are_a_loops_or_the_method_is_refused(name: str, family: str) -> None:
    tuned, promised = install(name, family), settings_of(name).by_example
    tuned.model.eval()
    try:
        per_example.check(tuned, METHODS[name][0])
    except TuningError as refusal:
        assert not promised
        assert f"'{METHODS[name][0]}'" in str(refusal)
        assert "Use 'lora'" in str(refusal)
        return
    assert promised
    examples = examples_of(family)
    found, expected = recorded(tuned, examples), by_a_loop(tuned, examples)
    assert found.keys() == set(tuned.trainable())
    for index, gradients in enumerate(expected):
        assert norm(gradients) > 0.01
        # Shorter texts are padded here and not in the loop, which moves the last bits.
        difference = {name: found[name][index].double().numpy() - one for name, one in gradients.items()}
        assert norm(difference) <= 1e-5 * norm(gradients)


def test_all_of_them_are_the_batchs_gradient_with_dropout_too() -> None:
    tuned, examples = install("lora", "llama", dropout=0.3), examples_of("llama")
    tuned.model.train()
    torch.manual_seed(4)
    found = recorded(tuned, examples)
    torch.manual_seed(4)
    logits, labels = forward(tuned, collate(examples, PAD), torch.device("cpu"))
    private._summed_means(logits, labels).backward()  # type: ignore[no-untyped-call]
    for name, parameter in tuned.trainable().items():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-6)


def test_in_bfloat16_gradients_are_near_those_of_a_loop() -> None:
    tuned, examples = install("lora", "llama"), examples_of("llama")
    tuned.model.eval().to(torch.bfloat16)
    found, expected = recorded(tuned, examples), by_a_loop(tuned, examples)
    for index, gradients in enumerate(expected):
        difference = {name: found[name][index].double().numpy() - one for name, one in gradients.items()}
        # The loop's own rounding: eight bits, in every activation on the way.
        assert norm(difference) <= 2**-5 * norm(gradients)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_opacus_uses_our_sampler_and_finds_the_same() -> None:
    tuned, examples = install("lora", "llama"), examples_of("llama")
    tuned.model.eval()
    found = recorded(tuned, examples)
    wrapped = GradSampleModule(tuned.model.train(), loss_reduction="sum")
    assert GradSampleModule.GRAD_SAMPLERS[torch.nn.Linear] is per_example.linear
    logits, labels = forward(Tuned(wrapped), collate(examples, PAD), torch.device("cpu"))
    private._summed_means(logits, labels).backward()  # type: ignore[no-untyped-call]
    for name, parameter in tuned.trainable().items():
        torch.testing.assert_close(found[name], parameter.grad_sample, rtol=1e-4, atol=1e-6)  # type: ignore[attr-defined]


def test_a_layer_that_mixes_examples_is_refused_before_anything_is_released() -> None:
    class Mixed(Bigram):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            every = self.embedding[input_ids].flatten(0, 1)
            logits = self.layer(every[:-1])
            logits = torch.cat([logits, logits[:1]]).reshape(*input_ids.shape, -1)
            return transformers.modeling_outputs.CausalLMOutput(logits=logits)

    with pytest.raises(TuningError, match="one by one"):
        per_example.check(Tuned(Mixed()), "mixed")
    with pytest.raises(TuningError, match="one by one"):
        run(Tuned(Mixed()), texts(3, 4), ExampleMechanism(1.0, 1.0, 1.0, 1))


def test_the_model_is_left_as_it_was() -> None:
    """The next to train at this bench may be without privacy; also when this one failed."""
    tuned, examples = install("lora", "llama"), examples_of("llama")
    resting = next(iter(tuned.trainable().values()))
    resting.requires_grad_(False)
    trainable = set(tuned.trainable())

    def failing(_: float) -> None:
        raise KeyboardInterrupt

    run(tuned, examples, ExampleMechanism(1.0, 1.0, 0.5, 2))
    assert not tuned.model.training
    with pytest.raises(KeyboardInterrupt):
        run(tuned, examples, ExampleMechanism(1.0, 1.0, 0.5, 2), on_step=failing)
    assert set(tuned.trainable()) == trainable
    assert not resting.requires_grad
    for module in tuned.model.modules():
        assert not module._forward_hooks
        assert not module._backward_hooks
        assert not module._forward_pre_hooks
    for parameter in tuned.model.parameters():
        assert parameter.grad is None
        assert not hasattr(parameter, "grad_sample")
        assert not hasattr(parameter, "summed_grad")
