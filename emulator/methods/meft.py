"""MEFT: a backbone made reversible, so that training keeps hardly anything of what its blocks compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from farfield.protocols.errors import TuningError
from farfield.protocols.seeds import derive

from .method import Setting, Tuned, TuningMethod, register
from .own import frozen, like, unmergeable, write
from .peft_method import Rank
from .sharing import Sharing

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from farfield.kernels.reversible import Pass


@register
class Meft(TuningMethod):
    """y₁ = λ·x₁ + F(x₂); y₂ = β·x₂ + G(y₁), undone block by block in backward (Liao et al. 2023, eq. 2, MEFT₁).

    F is the frozen block f, less λ·x₂; G(y) = λ⁻¹·U·relu(D·y) is trained, from U = 0; β is 1 and λ = 2^-bits.
    The streams change places from block to block, so that the next one reads y₁, with λ·G in it: an adapter beside
    each block. The last one's goes to the output. At the start block n gives f(h) less λ times what the block before it
    has changed, and the first one f(h) itself; docs/tuning-methods.md has what that is in nats.

    How the streams are undone without error is in `farfield.kernels.reversible`. A block is computed twice, as with
    checkpointing. It cannot be folded in: the model that is trained is another one, of two streams.

    Attributes:
        rank: the width of G between D and U.
        bits: λ = 2^-bits, and how many bits of each value and block are kept. More are closer to the backbone at the
            start; how far G reaches does not depend on it.
    """

    kind: Literal["meft"] = "meft"
    rank: Rank = 64
    bits: Literal[1, 2, 4, 8] = 4

    @property
    def merges(self) -> bool:
        return False

    @property
    def sharing(self) -> Sharing:
        return Sharing(exact=False)

    def install(self, model: PreTrainedModel, setting: Setting) -> Tuned:
        architecture = frozen(model, setting)
        if getattr(model.config, "layerdrop", 0):
            raise TuningError(
                "the model leaves blocks out at random (layerdrop), and what was left out cannot be undone",
                where=type(model).__name__,
                hint="Use 'lora', or set layerdrop to 0 in the model's config.json.",
            )
        stack = _Stack(architecture.blocks, self.bits)
        for number, block in enumerate(architecture.blocks):
            if setting.blocks is None or number in setting.blocks:
                path = setting.named(f"{architecture.blocks_path}.{number}")
                adapter = _bottleneck(architecture.hidden_size, self.rank, derive(setting.seed, "meft", path))
                block.add_module(_ADAPTER, like(adapter, model, f"{architecture.blocks_path}.{number}"))
        for block in set(architecture.blocks):  # one may stand in several places
            cast("Any", block).forward = partial(stack.run, block, block.forward)
        return Tuned(model)

    def merge(self, tuned: Tuned) -> PreTrainedModel:
        raise unmergeable(self.kind, "it trains a model of two streams, and the backbone has one")

    def save(self, tuned: Tuned, folder: Path) -> None:
        write(self, tuned, folder)


_ADAPTER: Final = "adapter"
_UNLIKE: Final = TuningError(
    "a block computed something else when it was computed again, so that what came before it cannot be found",
    hint="Use 'lora' with training.checkpointing on this machine.",
)


def _bottleneck(width: int, rank: int, seed: int) -> torch.nn.Module:
    """U·relu(D·x), with D drawn as `torch` draws the weights of a linear layer, and U zero."""
    import torch

    down, up = (torch.nn.Linear(*shape, bias=False, device="meta") for shape in ((width, rank), (rank, width)))
    generator = torch.Generator().manual_seed(seed)
    bound = width**-0.5
    down.weight = torch.nn.Parameter(torch.empty(rank, width).uniform_(-bound, bound, generator=generator))
    up.weight = torch.nn.Parameter(torch.zeros(width, rank))
    return torch.nn.Sequential(down, torch.nn.ReLU(), up)


class _Stack:
    """The blocks of a model, each of which is called by the model's own code with what that has for it."""

    def __init__(self, blocks: Sequence[torch.nn.Module], bits: int) -> None:
        self._first, self._last, self._bits = blocks[0], blocks[-1], bits
        self._pass: Pass | None = None

    def run(self, block: torch.nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What stands for the block's `forward`, which is `plain`."""
        import torch

        from farfield.kernels.reversible import Pass

        hidden = args[0] if args else kwargs["hidden_states"]
        if block is self._first:
            self._pass = Pass(hidden, self._bits, _UNLIKE)
        elif self._pass is None or hidden is not self._pass.main:
            raise TuningError(
                "the model does something to the stream between its blocks, which cannot be undone",
                where=type(block).__name__,
                hint="Use 'lora' with this model.",
            )
        f = _Twice(plain, args, kwargs, cached=not torch.is_grad_enabled())
        adapter = getattr(block, _ADAPTER, None)
        if block is not self._last:
            added = None if adapter is None else partial(_added, adapter, 2**self._bits)
            out = self._pass.through(f, added, () if adapter is None else tuple(adapter.parameters()))
        else:
            self._pass.through(f, None)
            out, self._pass = self._pass.end(), None
            out = out if adapter is None else out + _added(adapter, 1, out)
        return out if f.beside is None else (out, *f.beside)


def _added(adapter: torch.nn.Module, scale: int, states: torch.Tensor) -> torch.Tensor:
    added: torch.Tensor = adapter(states)
    return added * scale


class _Twice:
    """A block with all that it gets beside the stream; called again, it drops what it dropped the first time.

    Attributes:
        beside: what it gave beside the stream, the first time; None where it gave the stream alone.
    """

    def __init__(self, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], cached: bool) -> None:
        from transformers import Cache

        def kept(value: Any) -> Any:
            # The second time its keys would count as those of earlier tokens.
            return value if cached or not isinstance(value, Cache) else None

        self._plain = plain
        self._args = tuple(kept(value) for value in args[1:])
        self._kwargs = {name: kept(value) for name, value in kwargs.items() if name != "hidden_states"}
        self._drawn: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self.beside: tuple[Any, ...] | None = None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        import torch

        from farfield.emulator.streams import stream

        device = states.device if states.device.type == "cuda" else None
        if self._drawn is None:
            self._drawn = torch.get_rng_state(), None if device is None else torch.cuda.get_rng_state(device)
            out = self._plain(states, *self._args, **self._kwargs)
            self.beside = out[1:] if isinstance(out, tuple) else None
            return stream(out)
        with torch.random.fork_rng(devices=[] if device is None else [device]):
            torch.set_rng_state(self._drawn[0])
            if device is not None and self._drawn[1] is not None:
                torch.cuda.set_rng_state(self._drawn[1], device)
            return stream(self._plain(states, *self._args, **self._kwargs))
