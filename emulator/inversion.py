"""Which tokens a model was trained on, read off from the change of what was trained.

A matrix that multiplies x is changed by Σ δ·xᵀ: its rows lie in the span of the inputs x, its columns in that of the
gradients δ. In two places these say which token it was:

* Where a layer sees nothing but the token (and its position): behind the embeddings, in the first block. There every
  token of the vocabulary has one known x, and those that lie in the span of the rows were in the text. That is the span
  check of DAGER (Petrov et al. 2024, section 3), exact while the distinct tokens are no more than the rank. Where they
  are more, the span holds a part of each, and tokens are ranked by how much of them it holds.
* Where a layer adds to the stream that the head reads: there δ is made of the head's rows for the tokens that were to
  be predicted (as in iDLG, Zhao et al. 2020), whatever the block, since the stream hands gradients back nearly as they
  are. That speaks in the first round too, when LoRA's B is still zero, and A gets no gradient.

Both sides are whitened by what the vocabulary looks like there: embeddings crowd around a few directions, and tokens
would be ranked by how common they are instead of by the span.

No method and no family is known by name. Which trained matrices are of either kind is found by running the model:
whether a layer's input stays the same when the other tokens change, and how near the gradient at its output is to that
at the head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import nn

from farfield.protocols.seeds import derive
from farfield.protocols.tensors import State

from .architecture import describe
from .methods import Tuned
from .streams import Batch, run

Clue: TypeAlias = Literal["read", "predicted"]
"""Tokens that were read show in the inputs of layers, tokens that were to be predicted in the gradients."""

EXACT: Final = 1e-3
"""Singular values below this share of the largest are rounding, where a span is exact; bfloat16 has 8 bits."""

SOFT: Final = 1e-2
"""Directions of less energy than this share of the largest count less and less, where a span is not."""

AGREEMENT: Final = 0.3
"""The least cosine between a layer's output gradient and the head's for its columns to be looked at."""

PROBED: Final = 64
"""Tokens in each sequence that the model is watched with."""


class Enough(Exception):
    """Ends a forward pass that has shown what was wanted."""


@dataclass(frozen=True, slots=True)
class Site:
    """A trained matrix, and which side of it tells tokens.

    Attributes:
        name: of the parameter, in the update.
        transposed: it is stored as (in, out).
        clue: its rows (`read`) or its columns (`predicted`).
        agreement: the cosine between the gradients at its output and at the head; 1 for rows.
    """

    name: str
    transposed: bool
    clue: Clue
    agreement: float = 1.0

    def directions(self, update: State) -> torch.Tensor:
        """float64[count, width]: what spans the side that tells."""
        change = torch.from_numpy(update[self.name]).double()
        rows = change.T if self.transposed else change
        return rows if self.clue == "read" else rows.T


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """What every token looks like to some sites, at each position it can be told at.

    Attributes:
        tokens: float64[positions, vocabulary, width], whitened, each of length 1.
        whitening: float64[width, width], symmetric.
    """

    sites: tuple[Site, ...]
    tokens: torch.Tensor
    whitening: torch.Tensor

    def held(self, update: State) -> torch.Tensor | None:
        """float64[vocabulary]: how much of a token's square the update's span holds, at the position where it is most.

        None where the update spans nothing here (a layer whose B is zero gives its A no gradient), or everything.
        """
        rows = self._rows(update)
        span = spanned(rows)[1]
        sharp = self.sites[0].clue == "read"
        if not len(span) or (sharp and len(span) == len(self.whitening)):
            return None
        strength, basis = spanned((span if sharp else rows) @ self.whitening)
        weight = strength.square() / (strength.square() + (0 if sharp else SOFT) * strength[0].square())
        return ((self.tokens @ basis.T).square() @ weight).amax(0)

    def rank(self, update: State) -> int:
        """The dimensions of the span: so many distinct tokens are told exactly."""
        return len(spanned(self._rows(update))[1])

    def _rows(self, update: State) -> torch.Tensor:
        """float64[count, width]: all that the sites span; each counts by its agreement, however large its change."""
        found = [(site, site.directions(update)) for site in self.sites]
        return torch.cat([rows * (site.agreement / max(float(rows.norm()), 1e-30)) for site, rows in found])


class Inversion:
    """What the trained parameters of one model can tell of the tokens that it was trained on.

    Attributes:
        tables: by clue; empty where what is trained has no side that tells.
        vocabulary: how many tokens there are.
    """

    def __init__(self, tuned: Tuned, length: int) -> None:
        """
        Args:
            tuned: with the adapter loaded that the training began with. It is left as it is.
            length: where a layer sees a token with its position, so many positions are tried.
        """
        self._model = tuned.model
        backbone: Any = getattr(tuned.model, "get_base_model", lambda: tuned.model)()
        self._backbone = backbone
        self.vocabulary = int(backbone.get_input_embeddings().weight.shape[0])
        found = list(owners(tuned))
        with still(tuned.model):
            self.tables = (*self._reading(found, length), *self._predicting(found))

    def read(self, update: State) -> dict[Clue, torch.Tensor]:
        """Of each kind of clue that the update gives: float64[vocabulary], higher for tokens that speak for themselves.

        Empty where it gives none: then it has to be matched, see `farfield.emulator.matching.matched`.
        """
        found: dict[Clue, torch.Tensor] = {}
        for table in self.tables:
            if (held := table.held(update)) is not None:
                # The wider a space is, the less of it a token fills by accident.
                scores, clue = standard(held) * len(table.whitening), table.sites[0].clue
                found[clue] = found[clue] + scores if clue in found else scores
        return {clue: standard(scores) for clue, scores in found.items()}

    def span(self, update: State) -> int:
        """How many distinct tokens the first block's span can tell exactly; 0 where it tells none."""
        return max((one.rank(update) for one in self.tables if one.sites[0].clue == "read"), default=0)

    @torch.no_grad()
    def _reading(self, owners: Sequence[Owner], length: int) -> Iterator[Table]:
        """Tables of the layers whose input is a token's own."""
        ids = self._drawn("inputs", 3, 8)
        ids[1, 3] = ids[0, 3]
        ids[2] = ids[0].roll(1)
        seen = [self._inputs(owners, row[None]) for row in ids]
        alone: dict[str, Owner] = {}
        for one in owners:
            at = [inputs.get(one.name) for inputs in seen]
            if at[0] is not None and at[1] is not None and len(at[0]) == 8 and torch.allclose(at[0][3], at[1][3]):
                alone[one.name] = one
        groups: list[list[Owner]] = []
        for one in alone.values():  # queries, keys and values get the same, so their spans are one
            like = [group for group in groups if _same(seen[0][group[0].name], seen[0][one.name])]
            like[0].append(one) if like else groups.append([one])
        for group in groups:
            first = group[0].name
            anywhere = torch.allclose(seen[0][first][3], seen[2][first][4])
            tokens = torch.stack([self._vocabulary(group[0], at, length) for at in range(1 if anywhere else length)])
            sites = tuple(Site(one.name, one.transposed, "read") for one in group)
            yield _table(sites, tokens)

    def _vocabulary(self, owner: Owner, shift: int, length: int) -> torch.Tensor:
        """[vocabulary, width]: the layer's input for each token, at position (its number + `shift`) mod `length`."""
        size = -(-self.vocabulary // length) * length
        rows = (torch.arange(size) % self.vocabulary).reshape(-1, length).roll(shift, 1)
        found = [self._inputs([owner], part)[owner.name] for part in torch.split(rows, 16)]
        width = found[0].shape[-1]
        return torch.cat(found).reshape(-1, length, width).roll(-shift, 1).reshape(-1, width)[: self.vocabulary]

    def _inputs(self, owners: Sequence[Owner], ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """float64[tokens, in] of each layer that runs on tokens, by the parameter's name."""
        seen: dict[str, torch.Tensor] = {}

        def watch(owner: Owner) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
                    flat = args[0].detach().reshape(-1, args[0].shape[-1])
                    if len(flat) == ids.numel() and flat.shape[-1] == owner.inputs:
                        seen[owner.name] = flat.double().cpu()
                        if len(seen) == len(owners):
                            raise Enough

            return hook

        with ExitStack() as hooks:
            for owner in owners:
                hooks.callback(owner.module.register_forward_pre_hook(watch(owner)).remove)
            with suppress(Enough):
                run(self._model, _batch(ids))
        return seen

    def _predicting(self, owners: Sequence[Owner]) -> Iterator[Table]:
        """The table of the layers whose output has the head's gradient, scaled feature by feature as a norm does."""
        head = getattr(self._backbone, "get_output_embeddings", lambda: None)()
        if not isinstance(head, nn.Linear):  # a classifier's head tells classes, not tokens
            return
        found, stream = self._gradients(owners, self._drawn("gradients", 8, PROBED), head)
        power = stream.square().sum(0).clamp_min(1e-30)
        alike = {}
        for name, one in found.items():
            if one.shape == stream.shape:
                gain = (one * stream).sum(0) / power
                alike[name] = (_cosine(one, stream * gain), gain)
        if not alike:
            return
        _, gain = max(alike.values(), key=lambda one: one[0])
        sites = tuple(
            Site(owner.name, owner.transposed, "predicted", agreement)
            for owner in owners
            if owner.name in alike and (agreement := _cosine(found[owner.name], stream * gain)) >= AGREEMENT
        )
        if sites:
            rows = head.weight.detach().double().cpu() * gain
            yield _table(sites, (rows - rows.mean(0))[None])  # a gradient is a difference of rows

    def _gradients(
        self, owners: Sequence[Owner], ids: torch.Tensor, head: nn.Module
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """float64[tokens, out] of the gradients at the layers' outputs, and [tokens, hidden] of that at the head."""
        found: dict[str, torch.Tensor] = {}

        def keep(name: str, gradient: torch.Tensor) -> None:
            found[name] = _flat(gradient)

        def watch(name: str, width: int) -> Any:
            def hook(_: nn.Module, __: Any, output: Any) -> None:
                states = output[0] if isinstance(output, tuple) else output
                if isinstance(states, torch.Tensor) and states.requires_grad and states.shape[-1] == width:
                    states.register_hook(partial(keep, name))  # type: ignore[no-untyped-call]

            return hook

        def arrive(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            args[0].register_hook(partial(keep, ""))  # type: ignore[no-untyped-call]

        with ExitStack() as hooks, torch.enable_grad():
            embeddings = self._backbone.get_input_embeddings()
            lead = embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_())
            hooks.callback(lead.remove)
            hooks.callback(head.register_forward_pre_hook(arrive).remove)
            for owner in owners:
                hooks.callback(owner.module.register_forward_hook(watch(owner.name, owner.outputs)).remove)
            logits = run(self._model, _batch(ids)).logits[:, -ids.shape[1] :]
            targets = self._drawn("targets", *ids.shape).to(logits.device)
            nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
        stream = found.pop("")
        return {name: one for name, one in found.items() if len(one) == len(stream)}, stream

    def _drawn(self, what: str, count: int, length: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive(0, "inversion", what))
        return torch.randint(self.vocabulary, (count, length), generator=generator)


def standard(scores: torch.Tensor) -> torch.Tensor:
    """With mean 0 and standard deviation 1, so that scores of different kinds can be added."""
    return (scores - scores.mean()) / scores.std().clamp_min(1e-12)


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """A module that has a trained matrix for its own."""

    name: str
    module: nn.Module
    inputs: int
    outputs: int
    transposed: bool


def owners(tuned: Tuned) -> Iterator[Owner]:
    linears = {linear.path: linear for linear in describe(_base(tuned.model)).linears}
    names = {parameter: name for name, parameter in tuned.trainable().items()}
    paths = {module: path for path, module in _base(tuned.model).named_modules()}
    for module in tuned.model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter not in names:
                continue
            linear = linears.get(paths.get(module, ""))
            transposed = linear is not None and linear.transposed
            if parameter.ndim == 2:
                out, into = reversed(parameter.shape) if transposed else parameter.shape
                yield Owner(names[parameter], module, int(into), int(out), transposed)


def _base(model: Any) -> Any:
    return getattr(model, "get_base_model", lambda: model)()


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Within it no parameter gets a gradient, and dropout is off.

    A layer of frozen and trained factors also takes its long way then, through its factors one by one.
    """
    trained = [one for one in model.parameters() if one.requires_grad]
    training = model.training
    model.eval()
    try:
        for one in trained:
            one.requires_grad_(False)
        yield
    finally:
        for one in trained:
            one.requires_grad_(True)
        model.train(training)


def _table(sites: tuple[Site, ...], tokens: torch.Tensor) -> Table:
    flat = tokens.flatten(0, 1)
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    whitening = vectors @ torch.diag(values.clamp_min(values[-1] * 1e-6).rsqrt()) @ vectors.T
    tokens = tokens @ whitening
    return Table(sites, tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-12), whitening)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def spanned(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The singular values [rank], the largest first, and right singular vectors [rank, width], without rounding's."""
    squares, vectors = torch.linalg.eigh(rows.T @ rows)
    kept = (squares > EXACT**2 * squares[-1].clamp_min(1e-30)).nonzero().flatten().flip(0)
    return squares[kept].sqrt(), vectors.T[kept]


def _cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one * other).sum() / (one.norm() * other.norm()).clamp_min(1e-30))


def _batch(ids: torch.Tensor) -> Batch:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _flat(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.detach().reshape(-1, gradient.shape[-1]).double().cpu()


def mean(updates: Sequence[Mapping[str, Any]]) -> State:
    """What a sum of clients' updates lets out: their mean, all weighing the same."""
    return {name: sum(one[name] for one in updates) / len(updates) for name in updates[0]}
