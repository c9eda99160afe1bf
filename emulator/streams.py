"""What flows through a model's blocks, watched from outside: the same for every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch import nn

Batch: TypeAlias = Mapping[str, torch.Tensor]
"""`input_ids` and `attention_mask`, int64[batch, length]; or `pixel_values` of an image model."""


class _Enough(Exception):
    """Ends a forward pass that has shown what was wanted."""


def stream(output: Any) -> torch.Tensor:
    """The hidden states [batch, length, width] in what a block returns."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def watched(module: nn.Module, see: Callable[[torch.Tensor, Any], None]) -> Iterator[None]:
    """Within it `see` gets the module's first input, and its output, each time that the module runs."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        see(args[0] if args else kwargs["hidden_states"], output)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's output for the batch, without a cache of keys, which blocks that run twice would confuse."""
    decoder = "input_ids" in batch and hasattr(getattr(model, "config", None), "use_cache")
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    return model(**inputs, **({"use_cache": False} if decoder else {}))


@contextmanager
def watched_entry(block: nn.Module, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Within it `see` gets the stream [batch, length, width] that goes into the block, each time that it runs."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(args[0] if args else kwargs["hidden_states"])

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def entering(model: nn.Module, block: nn.Module, batch: Batch) -> torch.Tensor:
    """The stream [batch, length, width] that goes into `block`; nothing from there on is computed."""
    seen: list[torch.Tensor] = []

    def see(states: torch.Tensor) -> None:
        seen.append(states)
        raise _Enough

    with watched_entry(block, see), suppress(_Enough):
        run(model, batch)
    return seen[0]


@torch.no_grad()
def all_after(model: nn.Module, blocks: tuple[nn.Module, ...], batch: Batch) -> list[torch.Tensor]:
    """The stream before the first of the blocks, and after each of them."""
    seen: list[torch.Tensor] = []

    def see(inputs: torch.Tensor, output: Any) -> None:
        if not seen:
            seen.append(inputs)
        seen.append(stream(output))

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(watched(block, see))
        run(model, batch)
    return seen


def positions(batch: Batch) -> torch.Tensor | None:
    """bool[batch, length]: where the stream is that of a token, not of padding; None where all of it is."""
    return batch["attention_mask"].bool() if "attention_mask" in batch else None


def tokens(states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The stream at tokens, float32[tokens, width]; all of it where it is not [batch, length, width] in some form."""
    where = positions(batch)
    flat = states.reshape(-1, states.shape[-1])  # OPT has its positions in one row
    if where is not None and where.numel() == len(flat):
        flat = flat[where.reshape(-1).to(flat.device)]
    return flat.float()
