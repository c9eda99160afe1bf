"""Where a transformer keeps its parts, derived from its structure: the one file that knows how families differ.

No list of model names is consulted. The blocks are the longest stack of look-alike modules, the final norm stands
beside or above the stack, the head is what the backbone does not contain, and the linear layers are the leaves of the
blocks that map one width to another. A family that `transformers` adds tomorrow works as soon as it is built like that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from farfield.protocols.errors import BackboneError, TuningError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer inside a block.

    Attributes:
        path: its full name in the model.
        in_features, out_features: its widths.
        transposed: its weight is stored as (in, out), as in the `Conv1D` of GPT-2, not as (out, in).
        bias: whether it has one.
    """

    path: str
    in_features: int
    out_features: int
    transposed: bool
    bias: bool


@dataclass(frozen=True, slots=True)
class Sublayer:
    """Attention or the feed-forward network of one block, by the linear layers that lead into it and out of it.

    Attributes:
        block: the number of the block.
        part: which of the two it is.
        entry: path of a layer that gets the sub-layer's input; queries, keys and values all get it, and so do the
            gate and what it gates.
        exit: path of the layer whose output is the sub-layer's.
    """

    block: int
    part: Literal["attention", "feedforward"]
    entry: str
    exit: str


@dataclass(frozen=True, slots=True)
class Architecture:
    """The parts of one model. Paths are those of `named_modules`.

    Attributes:
        blocks_path: the list that holds the transformer blocks.
        blocks: the blocks, in the order in which they run.
        embeddings: token embeddings, or the patch embeddings of an image model.
        norm: the norm after the last block; None where each block ends with its own (BERT).
        head: what follows the backbone, in the order of definition: `lm_head`, `score`, `classifier`; DistilBERT has
            two layers there.
        linears: every linear layer of every block, sorted by path.
        hidden_size: the width of the stream between blocks.
    """

    blocks_path: str
    blocks: tuple[nn.Module, ...]
    embeddings: str
    norm: str | None
    head: tuple[str, ...]
    linears: tuple[Linear, ...]
    hidden_size: int

    def within(self, blocks: Collection[int] | None) -> Architecture:
        """The same, with the linear layers of these blocks only; None is all blocks."""
        if blocks is None:
            return self
        inside = {str(number) for number in blocks}
        kept = tuple(linear for linear in self.linears if _block_of(linear.path, self.blocks_path) in inside)
        return replace(self, linears=kept)

    def keys_and_values(self) -> tuple[str, ...]:
        """Paths of the layers that make attention's keys and values, fused with the queries where the model fuses them.

        Structure cannot tell a query from a key, so this goes by the names that implementations give them. Empty when
        the names are of no known kind.
        """
        return tuple(linear.path for linear in self.linears if _KEY_OR_VALUE.search(linear.path))

    def feedforward_outputs(self) -> tuple[str, ...]:
        """Paths of the layers that lead each feed-forward network back to the hidden width (its second matrix)."""
        widest: dict[str, Linear] = {}
        for linear in self.linears:
            block = _block_of(linear.path, self.blocks_path)
            if linear.out_features == self.hidden_size and (
                block not in widest or linear.in_features > widest[block].in_features
            ):
                widest[block] = linear
        return tuple(sorted(linear.path for linear in widest.values()))

    def sublayers(self) -> tuple[Sublayer, ...]:
        """Attention and the feed-forward network of every block, in the order in which blocks run.

        The layers of a block are told apart by their widths and by the order in which they are defined.

        Raises:
            TuningError: a block is not made of these two; a mixture of experts is not.
        """
        wanted = {linear.path for linear in self.linears}
        blocks: dict[str, list[Linear]] = {}
        for linear in _linears(self.blocks_path, self.blocks):
            if linear.path in wanted:
                blocks.setdefault(_block_of(linear.path, self.blocks_path), []).append(linear)
        exits = set(self.feedforward_outputs())
        return tuple(one for number, linears in blocks.items() for one in self._two(int(number), linears, exits))

    def norms(self) -> tuple[str, ...]:
        """Paths of the norms of the stream that the blocks have, sorted; those of single heads are not among them."""
        inside = {_block_of(linear.path, self.blocks_path) for linear in self.linears}
        return tuple(
            sorted(
                path
                for number, block in enumerate(self.blocks)
                if str(number) in inside
                for path, module in block.named_modules(prefix=f"{self.blocks_path}.{number}")
                if _is_norm(module, self.hidden_size) and next(module.parameters(), None) is not None
            )
        )

    def _two(self, number: int, linears: list[Linear], exits: set[str]) -> tuple[Sublayer, Sublayer]:
        """The sub-layers of one block, from its layers in the order of definition."""
        hidden = self.hidden_size
        down = next((one for one in linears if one.path in exits), None)
        others = [one for one in linears if down and not _ATTENTION.search(one.path)]
        # A gate may stand beside what it gates, or be fused with it.
        ups = [
            one
            for one in others
            if down and one.in_features == hidden and one.out_features in (down.in_features, 2 * down.in_features)
        ]
        outputs = [one for one in others if one.out_features == hidden and one not in (down, *ups[-2:])]
        inputs = [one for one in linears if one.in_features == hidden and one not in (*outputs, *ups[-2:])]
        if down is None or not ups or not outputs or not inputs:
            raise TuningError(
                "attention and a feed-forward network were not both found in it",
                where=f"{self.blocks_path}.{number}",
                hint="Use 'lora', which goes by single layers.",
            )
        return (
            Sublayer(number, "attention", inputs[0].path, outputs[-1].path),
            Sublayer(number, "feedforward", ups[-1].path, down.path),
        )


@dataclass(frozen=True, slots=True)
class KeyValueCache:
    """The keys and values that a decoder keeps of earlier tokens: two (batch, heads, tokens, width) in each layer."""

    layers: int
    heads: int
    head_width: int


_KEY_OR_VALUE = re.compile(r"(^|\.)([kv](_proj|_lin)?|key|value|kv_proj|c_attn|w?qkv(_proj)?|query_key_value)$", re.I)
_ATTENTION = re.compile(rf"{_KEY_OR_VALUE.pattern}|(^|\.)(q(_proj|_lin)?|query)$", re.I)


def describe(model: PreTrainedModel) -> Architecture:
    """The parts of `model`.

    Raises:
        BackboneError: the model is not one stack of transformer blocks between embeddings and a head.
    """
    name = type(model).__name__
    path, blocks = _stack(model, name)
    embeddings = _path_of(model, model.get_input_embeddings())
    if embeddings is None:
        raise BackboneError("no token or patch embeddings were found", where=name)
    hidden = _hidden_size(model, name)
    linears = tuple(sorted(_linears(path, blocks), key=lambda linear: linear.path))
    return Architecture(path, blocks, embeddings, _final_norm(model, path, hidden), _head(model, path), linears, hidden)


def key_value_cache(model: PreTrainedModel) -> KeyValueCache | None:
    """The cache that `model` keeps, found by running it on one token; None for encoders and for models without tokens.

    Configurations are no guide here: GPT-NeoX says of itself that it is no decoder, and the number of heads that share
    a key has a name of its own in every family.

    Raises:
        BackboneError: the layers of the cache differ in shape.
    """
    if model.main_input_name != "input_ids":
        return None
    was_training = model.training
    model.train(mode=False)
    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        kept = getattr(model.base_model(input_ids=token, use_cache=True), "past_key_values", None)
    model.train(was_training)
    layers = getattr(kept, "layers", None)
    if not layers:
        return None
    shapes = {tuple(states.shape) for layer in layers for states in (layer.keys, layer.values)}
    if len(shapes) != 1:
        raise BackboneError(f"the layers keep keys of different shapes: {sorted(shapes)}", where=type(model).__name__)
    ((_, heads, _, width),) = shapes
    return KeyValueCache(len(layers), heads, width)


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Have each block keep its input only, in training, and be computed once more on the way back (Chen et al. 2016).

    Raises:
        BackboneError: transformers has no checkpointing for this model.
    """
    if not model.supports_gradient_checkpointing:
        raise BackboneError(
            "transformers cannot checkpoint this model",
            where=type(model).__name__,
            hint="Leave training.checkpointing out.",
        )
    cast("Any", model).activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def _stack(model: nn.Module, name: str) -> tuple[str, tuple[nn.Module, ...]]:
    """The only outermost list of modules with linear layers in them."""
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(any(_linears("", (one,))) for one in module)
    }
    # A mixture of experts keeps a list inside each block: only lists within no other list are stacks of blocks.
    outermost = {path: module for path, module in lists.items() if not any(path.startswith(f"{one}.") for one in lists)}
    if not outermost:
        raise BackboneError("no list of transformer blocks was found", where=name)
    if len(outermost) > 1:
        raise BackboneError(
            f"more than one stack of transformer blocks was found ({', '.join(sorted(outermost))})",
            where=name,
            hint="Farfield tunes decoder-only and encoder-only models.",
        )
    ((path, blocks),) = outermost.items()
    return path, tuple(blocks)


def _linears(prefix: str, blocks: tuple[nn.Module, ...]) -> Iterator[Linear]:
    """The leaves that map one width to another: `nn.Linear`, its quantised kin, and the `Conv1D` of GPT-2."""
    for index, block in enumerate(blocks):
        for path, module in block.named_modules(prefix=f"{prefix}.{index}"):
            bias = getattr(module, "bias", None) is not None
            if next(module.children(), None) is not None:
                continue
            if isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features"):
                yield Linear(path, int(module.in_features), int(module.out_features), False, bias)
            elif isinstance(getattr(module, "nx", None), int) and isinstance(getattr(module, "nf", None), int):
                yield Linear(path, int(module.nx), int(module.nf), True, bias)


def _hidden_size(model: PreTrainedModel, name: str) -> int:
    hidden = getattr(model.config.get_text_config(), "hidden_size", None)
    if not isinstance(hidden, int):
        raise BackboneError("its configuration gives no hidden_size", where=name)
    return hidden


def _final_norm(model: nn.Module, blocks: str, hidden: int) -> str | None:
    """The norm among the children of the modules that contain the stack, from the inside out.

    Where there are several, it is the last one defined: BLOOM also has one between its embeddings and its blocks.
    """
    owner = blocks
    while owner:
        owner = owner.rpartition(".")[0]
        norms = [name for name, module in model.get_submodule(owner).named_children() if _is_norm(module, hidden)]
        if norms:
            return f"{owner}.{norms[-1]}" if owner else norms[-1]
    return None


def _is_norm(module: nn.Module, hidden: int) -> bool:
    parameters = list(module.parameters())
    return "norm" in type(module).__name__.lower() and all(tuple(one.shape) == (hidden,) for one in parameters)


def _head(model: PreTrainedModel, blocks: str) -> tuple[str, ...]:
    output = _path_of(model, cast("Any", model).get_output_embeddings())
    if output is not None:
        return (output,)
    backbone = blocks.split(".")[0]
    return tuple(
        name
        for name, module in model.named_children()
        if name != backbone and next(module.parameters(), None) is not None
    )


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str | None:
    return next((path for path, module in model.named_modules() if module is wanted), None)


def _block_of(path: str, blocks: str) -> str:
    return path[len(blocks) + 1 :].split(".", 1)[0]
