"""The order of tokens that an update shows: the second block's span check of DAGER (Petrov et al. 2024, section 4).

In a decoder the second block's input at a position depends on the tokens up to it and on no others. Where these inputs
are no more than the rank of what is trained there, they span the rows of its update, and those of a wrong beginning do
not lie in that span. So a text is found token by token, each beginning tried with every token that may come next.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any, Final

import torch
from torch import nn

from farfield.protocols.tensors import State

from .architecture import describe
from .inversion import Enough, Owner, owners, spanned, still
from .methods import Tuned
from .streams import run

HELD: Final = 0.9993
"""The share of an input's square that a span must hold for the beginning to be taken for a true one. Rounding to
bfloat16 costs some 1e-5 of it; a wrong token that was in the text elsewhere lacks 1e-3 and more."""

NEW: Final = 1e-3
"""The share of an input's square that no earlier input of the text may explain: a token that is said again and again
has the same input each time, which would be held for ever."""

BEAM: Final = 8
"""Beginnings that are gone on with."""


@torch.no_grad()
def sequence(tuned: Tuned, update: State, tokens: Sequence[int], length: int) -> list[int]:
    """The longest text of these tokens, of at most `length`, whose beginnings all lie in the second block's span.

    A text's last token is missing: it is read, but nothing is predicted from it. Empty where what is trained does not
    tell, or where the span holds everything.

    Args:
        tuned: with the adapter loaded that the training began with. It is left as it is.
        tokens: those that may be in the text; the span check of the first block gives them.
    """
    trained = list(owners(tuned))
    with still(tuned.model):
        group = _second(tuned, trained)
        rows = [torch.from_numpy(update[one.name]).double() for one in group]
        if not any(one.any() for one in rows):
            return []
        sides = [one.T if owner.transposed else one for one, owner in zip(rows, group, strict=True)]
        basis = spanned(torch.cat([one / one.norm().clamp_min(1e-30) for one in sides]))[1]
        if len(basis) > group[0].inputs // 2:
            return []
        beams, best = [[token] for token in tokens], list[int]()
        while beams:
            scores = torch.cat([_held(tuned, group[0], part, basis) for part in _parts(beams)])
            order = [int(index) for index in scores.argsort(descending=True)[:BEAM] if scores[index] >= HELD]
            if not order:
                break
            best = beams[order[0]]
            if len(best) == length:
                break
            beams = [[*beams[index], token] for index in order for token in tokens]
        return best


def _second(tuned: Tuned, trained: Sequence[Owner]) -> list[Owner]:
    """The trained layers of the second block that get the same input as the first of them that runs."""
    model: Any = tuned.model
    base = getattr(model, "get_base_model", lambda: model)()
    blocks = describe(base).blocks
    if len(blocks) < 2:
        return []
    inside = set(blocks[1].modules())
    seen: list[tuple[Owner, torch.Tensor]] = []

    def watch(owner: Owner) -> Any:
        return lambda _, args: seen.append((owner, args[0].detach().clone()))

    with ExitStack() as hooks:
        for owner in trained:
            if owner.module in inside:
                hooks.callback(owner.module.register_forward_pre_hook(watch(owner)).remove)
        ids = torch.arange(8)[None]
        run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return [owner for owner, inputs in seen if torch.equal(inputs, seen[0][1])]


def _held(tuned: Tuned, owner: Owner, texts: Sequence[Sequence[int]], basis: torch.Tensor) -> torch.Tensor:
    """float64[texts]: the share of the last input's square that the span holds; 0 where the input is not new."""
    found: list[torch.Tensor] = []

    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0].detach().reshape(len(texts), -1, args[0].shape[-1]).double().cpu())
        raise Enough

    ids = torch.tensor(texts)
    handle = owner.module.register_forward_pre_hook(hook)
    try:
        with suppress(Enough):
            run(tuned.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    finally:
        handle.remove()
    inputs, before = found[0][:, -1], found[0][:, :-1]
    whole = inputs.square().sum(1)
    explained = torch.zeros_like(whole)
    if before.shape[1]:
        axes = torch.linalg.qr(before.transpose(1, 2)).Q
        explained = torch.einsum("twk,tw->tk", axes, inputs).square().sum(1)
    held = (inputs @ basis.T).square().sum(1) / whole
    return torch.where(explained < (1 - NEW) * whole, held, 0)


def _parts(beams: list[list[int]]) -> list[list[list[int]]]:
    return [beams[start : start + 256] for start in range(0, len(beams), 256)]
