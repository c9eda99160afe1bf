"""Reversible blocks against the plain equations, and what is left of the streams on the way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farfield.kernels import reversible
from farfield.kernels.reversible import BITS, Block, Function, reference_stack, stack

WIDTH = 6


def network(depth: int, seed: int, dtype: torch.dtype) -> tuple[list[tuple[Function, Function | None]], list[Any]]:
    """Blocks with adapters, every third without; and each adapter's weight."""
    generator = torch.Generator().manual_seed(seed)
    pairs: list[tuple[Function, Function | None]] = []
    weights: list[Any] = []
    for number in range(depth):
        inner = (torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5).to(dtype)
        weight = (0.3 * torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)).to(dtype)
        weights.append(None if number % 3 == 2 else weight.requires_grad_(True))

        def f(x: torch.Tensor, inner: torch.Tensor = inner) -> torch.Tensor:
            return x + torch.tanh(x @ inner)

        def g(x: torch.Tensor, weight: torch.Tensor = weight) -> torch.Tensor:
            return torch.sin(x @ weight)

        pairs.append((f, None if number % 3 == 2 else g))
    return pairs, weights


def blocks(pairs: Sequence[tuple[Function, Function | None]], weights: Sequence[Any]) -> list[Block]:
    return [(f, g, () if weight is None else (weight,)) for (f, g), weight in zip(pairs, weights, strict=True)]


def gone(
    hidden: torch.Tensor, pairs: Sequence[tuple[Function, Function | None]], weights: Sequence[Any], bits: int
) -> torch.Tensor:
    return stack(hidden, blocks(pairs, weights), bits)


def gradients(out: torch.Tensor, hidden: torch.Tensor, weights: Sequence[Any]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    pull = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    # The last block's adapter reaches nothing: its stream ends there.
    return [
        torch.zeros(()) if one is None else one
        for one in torch.autograd.grad(out, [hidden, *(w for w in weights if w is not None)], pull, allow_unused=True)
    ]


@given(
    st.lists(st.integers(0, 3), max_size=2).map(lambda shape: (*shape, WIDTH)),
    st.integers(1, 9),
    st.sampled_from(BITS),
    st.integers(0, 2**31),
)
def test_it_computes_the_equations_and_their_gradients(
    shape: tuple[int, ...], depth: int, bits: int, seed: int
) -> None:
    """In float64, so that what is left is the rounding of streams to 2⁻³², a few times over."""
    pairs, weights = network(depth, seed, torch.float64)
    hidden = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    ours, plain = gone(hidden, pairs, weights, bits), reference_stack(hidden, blocks(pairs, weights), bits)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)
    for one, other in zip(gradients(ours, hidden, weights), gradients(plain, hidden, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", BITS)
def test_the_way_back_finds_every_stream_to_the_bit_however_deep(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, weights = network(40, 1, dtype)
    there: list[reversible.Streams] = []
    back: list[torch.Tensor] = []
    couple = reversible.couple

    def watched(before: reversible.Streams, *rest: Any) -> Any:
        there.append(before)
        return couple(before, *rest)

    def seen(f: Function) -> Function:
        def call(x: torch.Tensor) -> torch.Tensor:
            if x.requires_grad:
                back.append(x.detach().clone())
            return f(x)

        return call

    monkeypatch.setattr(reversible, "couple", watched)
    hidden = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    gone(hidden, [(seen(f), g) for f, g in pairs], weights, bits).float().sum().backward()  # type: ignore[no-untyped-call]
    assert len(there) == len(back) == 40
    for before, again in zip(there, reversed(back), strict=True):
        assert torch.equal((before.main.double() * reversible.UNIT).to(dtype), again)


def naive(hidden: torch.Tensor, pairs: Sequence[tuple[Function, Function | None]], bits: int) -> torch.Tensor:
    """The input again, by dividing in floating point."""
    scale = 2.0**-bits
    side = main = hidden
    for f, g in pairs:
        new = scale * (side - main) + f(main)
        side, main = (main if g is None else main + g(new)), new
    for f, g in reversed(pairs):
        before = side if g is None else side - g(main)
        side, main = (main - f(before) + scale * before) / scale, before
    return main


def test_floating_point_would_lose_the_streams() -> None:
    """Why the streams are integers."""
    pairs, _ = network(9, 1, torch.float32)
    hidden = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(naive(hidden, pairs[:3], 4), hidden, rtol=0, atol=1e-2)
        assert float((naive(hidden, pairs, 4) - hidden).abs().max()) > 100


def kept(make: Callable[[], torch.Tensor]) -> int:
    """Bytes that autograd keeps."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = make()
    assert out.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("bits", BITS)
def test_what_is_kept_is_two_streams_and_a_few_bits_of_each_block(bits: int) -> None:
    pairs, weights = network(12, 1, torch.bfloat16)
    hidden = torch.randn(64, 4, WIDTH).bfloat16()
    values = hidden.numel()
    sound = 1
    assert kept(lambda: gone(hidden, pairs, weights, bits)) == 2 * 8 * values + 12 * values * bits // 8 + sound


def test_a_graph_can_be_gone_back_through_twice() -> None:
    pairs, weights = network(5, 3, torch.float32)
    hidden = torch.randn(4, WIDTH).requires_grad_()
    out = gone(hidden, pairs, weights, 4).sum()
    once, again = (torch.autograd.grad(out, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, again)


def test_a_block_that_does_not_compute_the_same_twice_is_noticed() -> None:
    pairs, weights = network(4, 3, torch.float32)
    inner, calls = pairs[2][0], []

    def moody(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return inner(x) + 1e-5 * len(calls)

    pairs[2] = (moody, pairs[2][1])
    out = gone(torch.randn(4, WIDTH).requires_grad_(), pairs, weights, 4)
    with pytest.raises(ValueError, match="has not computed the same"):
        out.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e10])
@pytest.mark.parametrize("where", ["input", "block", "adapter"])
def test_what_cannot_be_held_makes_the_output_no_number(where: str, value: float) -> None:
    pairs, weights = network(4, 3, torch.float32)
    f, g = pairs[1]
    assert g is not None
    if where == "block":
        pairs[1] = (lambda x: f(x) + value, g)
    if where == "adapter":
        pairs[1] = (f, lambda x: g(x) + value)
    hidden = torch.full((4, WIDTH), value if where == "input" else 1.0).requires_grad_()
    out = gone(hidden, pairs, weights, 4)
    assert out.isnan().all()
    out.sum().backward()  # type: ignore[no-untyped-call]
