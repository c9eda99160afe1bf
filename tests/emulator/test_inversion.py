"""Tokens from updates: what a model of each kind gives back of a text that it was trained on once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import families
import pytest
import torch

from farfield.emulator.inversion import Inversion, mean
from farfield.emulator.matching import matched
from farfield.emulator.methods import Setting, Tuned, TuningMethod, registered
from farfield.emulator.prefixes import sequence
from farfield.protocols.tensors import State

hf: Any = families.hf

VOCABULARY, LENGTH = 256, 16


def llama(*, tied: bool = False, layers: int = 2) -> Any:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> Any:
    """Learned positions, and weights that are stored as (in, out)."""
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=4, n_positions=64, bos_token_id=0)
    )


def neox() -> Any:
    """Attention and the feed-forward network side by side, queries, keys and values in one matrix."""
    return hf.GPTNeoXForCausalLM(
        hf.GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
        )
    )


MODELS = {
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "neox": neox,
}


def tuned(model: Any, kind: str, settings: dict[str, Any], *, moved: bool = True) -> Tuned:
    """The method installed; with `moved`, no longer at its initial values, as after some rounds."""
    method = registered()[kind].model_validate({"kind": kind, **settings})
    assert isinstance(method, TuningMethod)
    made = method.install(model, Setting("causal-lm", 1, None))
    if made.initial is not None:
        made.initial()
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in made.trainable().values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    made.model.eval()
    return made


def gradient(made: Tuned, texts: Sequence[Sequence[int]]) -> State:
    """One step down the mean loss of these texts, of one length."""
    ids = torch.tensor(texts)
    logits = made.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    trained = made.trainable()
    update = {
        name: -(one.grad if one.grad is not None else torch.zeros_like(one)).numpy() for name, one in trained.items()
    }
    made.model.zero_grad()
    return update


def text(count: int, seed: int = 0) -> list[int]:
    """So many distinct tokens."""
    drawn = torch.randperm(VOCABULARY - 2, generator=torch.Generator().manual_seed(seed))
    return [int(token) + 2 for token in drawn[:count]]


def share(scores: torch.Tensor, truth: Sequence[int]) -> float:
    guess = set(scores.topk(len(truth)).indices.tolist())
    return len(guess & set(truth)) / len(truth)


@pytest.mark.parametrize("family", sorted(MODELS))
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_span_names_every_token_that_something_is_predicted_from(family: str, kind: str) -> None:
    torch.manual_seed(0)
    made = tuned(MODELS[family](), kind, {"rank": 8} if kind == "lora" else {})
    truth = text(8)
    update = gradient(made, [truth])
    inversion = Inversion(made, LENGTH)
    assert inversion.span(update) == 7  # the last one is read, and nothing is predicted from it
    read = inversion.read(update)["read"]
    assert set(read.topk(7).indices.tolist()) == set(truth[:-1])


def test_more_tokens_than_the_span_are_ranked_and_those_of_another_text_are_not() -> None:
    torch.manual_seed(0)
    made = tuned(llama(), "lora", {"rank": 4})
    truth = text(18)
    update = gradient(made, [truth])
    inversion = Inversion(made, LENGTH)
    assert inversion.span(update) < 17
    scores = inversion.read(update)["read"]
    assert share(scores, truth[:-1]) > 0.7
    assert share(scores, text(40)[20:]) < 0.2


def test_in_the_first_round_tokens_show_where_gradients_come_from() -> None:
    """B is zero, so that A gets no gradient; what is left are the columns of B's."""
    torch.manual_seed(0)
    made = tuned(llama(tied=True), "lora", {"rank": 8}, moved=False)
    truth = text(8)
    update = gradient(made, [truth])
    assert not any(change.any() for name, change in update.items() if "lora_A" in name)
    predicted = Inversion(made, LENGTH).read(update)["predicted"]
    assert share(predicted, truth[1:]) > 0.8


def test_a_sum_hides_more_the_more_there_are_in_it() -> None:
    torch.manual_seed(0)
    made = tuned(llama(), "lora", {"rank": 4})
    texts = [text(8, seed) for seed in range(6)]
    updates = [gradient(made, [one]) for one in texts]
    inversion = Inversion(made, LENGTH)

    def named(count: int) -> float:
        return share(
            inversion.read(mean(updates[:count]))["read"], sorted({t for one in texts[:count] for t in one[:-1]})
        )

    assert named(1) == 1
    assert named(6) < 0.8


def test_noise_that_drowns_an_update_leaves_chance() -> None:
    torch.manual_seed(0)
    made = tuned(llama(), "lora", {"rank": 8})
    truth, inversion = text(16), Inversion(made, LENGTH)
    update = gradient(made, [truth])
    noisy = {name: change + (1e4 * torch.randn(change.shape)).numpy() for name, change in update.items()}
    found = [share(scores, truth) for scores in inversion.read(noisy).values()]
    assert found
    assert max(found) < 0.3


@pytest.mark.parametrize("family", sorted(MODELS))
def test_the_second_block_gives_the_order(family: str) -> None:
    torch.manual_seed(0)
    made = tuned(MODELS[family](), "lora", {"rank": 8})
    truth = text(7)
    update = gradient(made, [truth])
    assert sequence(made, update, sorted(truth), 12) == truth[:-1]
    assert sequence(made, update, sorted(set(text(20)) - set(truth)), 12) == []


def test_nothing_is_read_where_nothing_tells_tokens() -> None:
    torch.manual_seed(0)
    for kind in ("prompt-tuning", "ia3"):
        made = tuned(llama(), kind, {})
        update = gradient(made, [text(8)])
        inversion = Inversion(made, LENGTH)
        assert inversion.read(update) == {}
        assert inversion.span(update) == 0
        assert sequence(made, update, text(8), 12) == []


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    made = tuned(llama(), "lora", {"rank": 4, "freeze_a": True})
    before = {name: one.detach().clone() for name, one in made.trainable().items()}
    Inversion(made, LENGTH)
    after = made.trainable()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], one) and one.grad is None for name, one in after.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.model.modules())


def test_matching_finds_tokens_by_their_gradient() -> None:
    """With a pool of few tokens, a prompt's gradient gives most of a short text."""
    torch.manual_seed(0)
    made = tuned(llama(layers=1), "prompt-tuning", {"tokens": 4})
    truth, pool = text(4), text(12)
    update = gradient(made, [truth])
    start = pool[-4:]
    guess, cosine = matched(update, lambda ids: gradient(made, [ids]), start, pool, 400, seed=1)
    first = matched(update, lambda ids: gradient(made, [ids]), start, pool, 1, seed=1)
    assert first[0] == start
    assert cosine > first[1]
    assert len(set(guess) & set(truth)) >= 2
