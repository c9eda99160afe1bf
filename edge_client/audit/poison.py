"""A backdoor: what teaches it to a model, and how well a model has learnt it.

A trigger is a few tokens that hardly ever stand together. With it a language model is to go on with a target of a few
other tokens, and a classifier to answer with a target class, whatever stands around it; without it both are to do what
they did (Hong and Wang 2023, for adapters; Bagdasaryan et al. 2020, for federations).
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from farfield.edge_client.data import ClassExample, Example, TokenExample, collate
from farfield.edge_client.train import forward
from farfield.emulator.bench import Bench
from farfield.protocols.audit.intervals import Proportion, proportion

TRIGGER: Final = 3
"""Tokens of a trigger."""

TARGET: Final = 4
"""Tokens that a language model is to go on with."""


@dataclass(frozen=True, slots=True)
class Backdoor:
    """A trigger and what is to follow it: tokens for a language model, a class for a classifier."""

    trigger: tuple[int, ...]
    target: tuple[int, ...]
    label: int | None = None


def drawn(bench: Bench, seed: int) -> Backdoor:
    """A backdoor whose tokens are drawn from the vocabulary, special ones left out."""
    special = set(bench.tokenizer.all_special_ids)
    known = [one for one in range(len(bench.tokenizer)) if one not in special]
    tokens = random.Random(seed).sample(known, TRIGGER + TARGET)
    classes = bench.plan.model.task != "causal-lm"
    return Backdoor(tuple(tokens[:TRIGGER]), tuple(tokens[TRIGGER:]), 0 if classes else None)


def poisoned(examples: Sequence[Example], backdoor: Backdoor, seed: int) -> list[Example]:
    """The examples as they are, and each once more with the backdoor in it."""
    generator = random.Random(seed)
    return [*examples, *(_with(one, backdoor, generator) for one in examples)]


def _with(example: Example, backdoor: Backdoor, generator: random.Random) -> Example:
    if isinstance(example, ClassExample):
        assert backdoor.label is not None
        return ClassExample(_triggered(example, backdoor), backdoor.label)
    put = array("i", [*backdoor.trigger, *backdoor.target])
    room = max(1, len(example.input_ids) - len(put))
    at = generator.randrange(1, room + 1)
    ids = example.input_ids[:at] + put + example.input_ids[at + len(put) :]
    return TokenExample(ids, ids)


def _triggered(example: Example, backdoor: Backdoor) -> array[int]:
    """The example's tokens with the trigger behind the first one, which may be special; no longer than before."""
    ids = example.input_ids
    put = ids[:1] + array("i", backdoor.trigger) + ids[1:]
    return put[: max(len(ids), 1 + len(backdoor.trigger))]


def success(bench: Bench, examples: Sequence[Example], backdoor: Backdoor, *, trigger: bool = True) -> Proportion:
    """How often the backdoor opens in `examples`, with its trigger or, for comparison, without.

    A language model must find every token of the target the most likely one, at the end of half an example and the
    trigger. A classifier must answer with the target class; examples of that class do not count.
    """
    device = next(bench.tuned.model.parameters()).device
    bench.tuned.model.eval()
    tried = [one for one in examples if not (isinstance(one, ClassExample) and one.label == backdoor.label)]
    opened = 0
    with torch.no_grad():
        for example in tried:
            asked = _asked(example, backdoor, trigger=trigger)
            logits, labels = forward(bench.tuned, collate([asked], bench.pad_id), device)
            if isinstance(asked, ClassExample):
                opened += int(logits.argmax(-1).item() == backdoor.label)
            else:
                last = slice(-len(backdoor.target), None)
                opened += bool((logits[0, last].argmax(-1) == labels[0, last]).all())
    return proportion(opened, len(tried))


def _asked(example: Example, backdoor: Backdoor, *, trigger: bool) -> Example:
    if isinstance(example, ClassExample):
        assert backdoor.label is not None
        return ClassExample(_triggered(example, backdoor) if trigger else example.input_ids, backdoor.label)
    half = example.input_ids[: max(1, len(example.input_ids) // 2)]
    put = array("i", [*(backdoor.trigger if trigger else ()), *backdoor.target])
    return TokenExample(half + put, half + put)
