"""Reversible blocks: a stack that keeps its last two streams, and finds all earlier ones from them, bit for bit.

With streams x₁ and x₂, and λ = 2^-bits, a block f with an adapter g makes (Liao et al. 2023, eq. 2, MEFT₁)

    y₁ = λ·x₁ + F(x₂)        F(x) = f(x) - λ·x
    y₂ = x₂ + g(y₁)

and hands on (y₂, y₁): y₁ is what the next block reads. Both streams begin as the stack's input. So where all adapters
give zero, a block gives f(x₂) less λ times what the block before it has changed. Backward goes from the end:

    x₂ = y₂ - g(y₁)          x₁ = (y₁ - F(x₂)) / λ

Each division multiplies the rounding errors of floating point by 1/λ: they outgrow the values within a few blocks. So
the streams are integers, in units of 2⁻³²: adding is undone exactly, and the bits that the product λ·x₁ shifts out are
kept, `bits` for a value and block. Both functions must compute the same when they are called twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

import torch

Function: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

UNIT: Final = 2.0**-32
"""What one stands for in a stream."""
LARGEST: Final = 2.0**30
"""Beyond this a value cannot be held; the stack's output is then no number."""
BITS: Final = (1, 2, 4, 8)
"""What may be shifted out of a value, so that a byte holds it without waste."""


Block: TypeAlias = tuple[Function, Function | None, Sequence[torch.Tensor]]
"""A block, its adapter, and all that is trained in the adapter."""


def reference_stack(hidden: torch.Tensor, blocks: Sequence[Block], bits: int) -> torch.Tensor:
    """As `stack`, in floating point and with autograd as it comes."""
    scale = 2.0**-bits
    side = main = hidden
    for f, g, _ in blocks:
        new = scale * (side - main) + f(main)
        side, main = (main if g is None else main + g(new)), new
    return main


def stack(hidden: torch.Tensor, blocks: Sequence[Block], bits: int) -> torch.Tensor:
    """What the blocks make of `hidden`, float[...], one after the other: a `Pass` through all of them and its `end`.

    Raises:
        ValueError: on the way back, where a block has computed something else the second time.
    """
    run = Pass(hidden, bits, ValueError("a reversible block has not computed the same when it was called again"))
    for f, g, parameters in blocks:
        run.through(f, g, parameters)
    return run.end()


@dataclass(frozen=True, slots=True)
class Streams:
    """The two streams between blocks.

    Attributes:
        side, main: x₁ and x₂, int64 of any shape, in units of 2⁻³².
        sound: bool, a scalar: whether every value so far could be held.
    """

    side: torch.Tensor
    main: torch.Tensor
    sound: torch.Tensor


class Pass:
    """One pass through a stack of reversible blocks, and the way back that autograd takes through it.

    Attributes:
        main: what the next block reads, float[...], of the input's dtype. Pass on this very tensor.
    """

    def __init__(self, hidden: torch.Tensor, bits: int, unlike: Exception) -> None:
        """Begin with `hidden`, float[...].

        Args:
            bits: one of `BITS`; λ = 2^-bits.
            unlike: raised where the way back does not end at `hidden`: a block has computed something else the second
                time.
        """
        self.bits, self.unlike, self.dtype = bits, unlike, hidden.dtype
        start = _fixed(hidden)
        self.streams: Streams | None = Streams(start, start, _held(hidden))
        self.first = True
        self.main, self._side = hidden, hidden

    def through(self, f: Function, g: Function | None, parameters: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Go through one block and return `main`.

        Args:
            f: the block, from float[...] to the same shape and dtype. Nothing in it is trained.
            g: the adapter, likewise; None adds nothing.
            parameters: all that is trained in `g`.
        """
        self.main, self._side = cast(
            "tuple[torch.Tensor, torch.Tensor]",
            _Block.apply(self, f, g, self.main, self._side, *parameters),  # type: ignore[no-untyped-call]
        )
        return self.main

    def end(self) -> torch.Tensor:
        """What the stack gives: `main`, or no numbers where a value could not be held."""
        return cast("torch.Tensor", _End.apply(self, self.main))  # type: ignore[no-untyped-call]


def couple(
    before: Streams, f: Function, g: Function | None, bits: int, dtype: torch.dtype
) -> tuple[Streams, torch.Tensor]:
    """The streams after a block, and the bits that the way back needs, packed to uint8[values · bits / 8]."""
    changed = f(_float(before.main, dtype))
    # An arithmetic shift rounds down, the same for both: where they are equal nothing of either is left.
    main = _fixed(changed) + ((before.side >> bits) - (before.main >> bits))
    side, sound = before.main, before.sound & _held(changed)
    if g is not None:
        added = g(_float(main, dtype))
        side, sound = side + _fixed(added), sound & _held(added)
    return Streams(side, main, sound), _packed(before.side & (2**bits - 1), bits)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Pass,
        f: Function,
        g: Function | None,
        main: torch.Tensor,
        side: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert run.streams is not None
        run.streams, lost = couple(run.streams, f, g, run.bits, run.dtype)
        ctx.run, ctx.f, ctx.g, ctx.parameters, ctx.first = run, f, g, parameters, run.first
        ctx.save_for_backward(lost)
        ctx.set_materialize_grads(False)
        run.first = False
        # Its values are in the streams; autograd needs no more than a shape for its gradient.
        unseen = torch.zeros((), dtype=torch.float32, device=main.device).expand(main.shape)
        return _float(run.streams.main, run.dtype), unseen

    @staticmethod
    def backward(ctx: Any, d_main: torch.Tensor | None, d_side: torch.Tensor | None) -> tuple[Any, ...]:
        run: Pass = ctx.run
        (lost,) = ctx.saved_tensors
        after = run.streams
        assert after is not None, "backward did not begin at the end of the stack"
        d_1 = torch.zeros(after.main.shape, device=after.main.device) if d_main is None else d_main.float()
        main, d_parameters = after.side, [None] * len(ctx.parameters)
        if ctx.g is not None:
            added, (d_read, *d_parameters) = _pull(ctx.g, _float(after.main, run.dtype), d_side, ctx.parameters)
            main = main - _fixed(added)
            d_1 = d_1 if d_read is None else d_1 + d_read.float()
        wanted = d_1 if ctx.needs_input_grad[3] or ctx.needs_input_grad[4] else None
        changed, (d_2,) = _pull(ctx.f, _float(main, run.dtype), wanted)
        side = ((after.main - _fixed(changed) + (main >> run.bits)) << run.bits) + _unpacked(lost, run.bits, main.shape)
        run.streams = Streams(side, main, after.sound)
        if ctx.first and not torch.equal(side, main) and bool(after.sound):
            raise run.unlike
        if d_2 is None:
            return (None, None, None, None, None, *d_parameters)
        scaled = d_1 * 2.0**-run.bits
        d_2 = d_2.float().sub_(scaled)
        return (None, None, None, d_2 if d_side is None else d_2.add_(d_side), scaled, *d_parameters)


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Pass, main: torch.Tensor) -> torch.Tensor:
        last = run.streams
        assert last is not None
        ctx.run = run
        ctx.save_for_backward(last.side, last.main, last.sound)
        run.streams = None
        return torch.where(last.sound, _float(last.main, run.dtype), torch.nan)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        ctx.run.streams = Streams(*ctx.saved_tensors)
        return None, gradient


def _pull(
    function: Function, at: torch.Tensor, gradient: torch.Tensor | None, parameters: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """What the function computes, and from the gradient of that those of its input and parameters; None without."""
    if gradient is None:
        with torch.no_grad():
            return function(at), (None,) * (1 + len(parameters))
    with torch.enable_grad():
        at.requires_grad_(True)
        value = function(at)
        return value.detach(), torch.autograd.grad(value, (at, *parameters), gradient.to(value.dtype))


def _fixed(values: torch.Tensor) -> torch.Tensor:
    return (values.detach().double() / UNIT).round_().long()


def _float(stream: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return stream.double().mul_(UNIT).to(dtype)


def _held(values: torch.Tensor) -> torch.Tensor:
    return (values.detach().abs() < LARGEST).all()


def _packed(lost: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8, the values beside each other in each byte; zeros fill the last one."""
    each = 8 // bits
    flat = lost.to(torch.uint8).flatten()
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % each)).view(-1, each)
    packed = rows[:, 0].clone()
    for place in range(1, each):
        packed |= rows[:, place] << (place * bits)
    return packed


def _unpacked(packed: torch.Tensor, bits: int, shape: torch.Size) -> torch.Tensor:
    places = [(packed >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.stack(places, dim=1).flatten()[: shape.numel()].view(shape).long()
