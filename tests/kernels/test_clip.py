from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farfield.kernels import clip

SHAPES = st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), max_size=2).map(tuple))
"""How many examples there are, and what lies between them and the features: nothing, tokens, or more."""

WIDTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)


def drawn(
    shape: tuple[int, tuple[int, ...]], widths: list[tuple[int, int]], seed: int, dtype: torch.dtype = torch.float32
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and gradients of the outputs of a layer for each pair of `widths`; the examples differ a lot in size."""
    generator = torch.Generator().manual_seed(seed)
    examples, inner = shape
    scales = torch.logspace(-2, 1, examples).reshape(-1, *(1 for _ in inner), 1)
    return [
        (
            torch.randn(examples, *inner, width, generator=generator).to(dtype),
            (scales * torch.randn(examples, *inner, out, generator=generator)).to(dtype),
        )
        for width, out in widths
    ]


def counted(layers: list[tuple[torch.Tensor, torch.Tensor]], limit: float) -> float:
    """What the clipped norms of all examples add up to: the size that errors are to be seen against."""
    singles = [
        [(inputs[i : i + 1], outputs[i : i + 1]) for inputs, outputs in layers] for i in range(len(layers[0][0]))
    ]
    return sum(norm(plain(single, limit)) for single in singles)


def norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(one.double().square().sum()) for one in tensors))


def fast(layers: list[tuple[torch.Tensor, torch.Tensor]], limit: float) -> list[torch.Tensor]:
    return clip.clipped_sums([clip.of_linear(inputs, outputs) for inputs, outputs in layers], limit)


def plain(layers: list[tuple[torch.Tensor, torch.Tensor]], limit: float) -> list[torch.Tensor]:
    return clip.reference_clipped_sums([clip.reference_of_linear(inputs, outputs) for inputs, outputs in layers], limit)


@given(SHAPES, WIDTHS, st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_clipped_sums_equal_a_loop(
    shape: tuple[int, tuple[int, ...]], widths: list[tuple[int, int]], seed: int, limit: float
) -> None:
    layers = drawn(shape, widths, seed)
    found, expected = fast(layers, limit), plain(layers, limit)
    assert all(one.dtype == torch.float64 for one in found)
    # A few roundings of 2^-24 in each of sums of at most 16 terms.
    assert norm([a - b for a, b in zip(found, expected, strict=True)]) <= 1e-5 * counted(layers, limit)


@given(SHAPES, WIDTHS, st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_in_bfloat16_each_value_is_rounded_once(
    shape: tuple[int, tuple[int, ...]], widths: list[tuple[int, int]], seed: int, limit: float
) -> None:
    layers = drawn(shape, widths, seed, torch.bfloat16)
    found, expected = fast(layers, limit), plain(layers, limit)
    # Half a unit in the last of 8 bits in each value, and in the norm that they are divided by.
    assert norm([a - b for a, b in zip(found, expected, strict=True)]) <= 2**-8 * counted(layers, limit)


def test_the_tolerance_tells_clipping_layer_by_layer_from_clipping_all_together() -> None:
    layers = drawn((4, (3,)), [(5, 2), (2, 7)], seed=1)
    apart = [fast([layer], 1.0)[0] for layer in layers]
    difference = norm([a - b for a, b in zip(apart, plain(layers, 1.0), strict=True)])
    assert difference > 100 * 1e-5 * counted(layers, 1.0)


@given(SHAPES, st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_of_linear_is_what_autograd_finds_for_each_example(
    shape: tuple[int, tuple[int, ...]], width: int, out: int, seed: int
) -> None:
    ((inputs, outputs),) = drawn(shape, [(width, out)], seed)
    found = clip.of_linear(inputs, outputs)
    assert found.shape == (shape[0], out, width)
    assert found.is_contiguous()
    for example in range(shape[0]):
        weight = torch.zeros(out, width, requires_grad=True)
        torch.autograd.backward(torch.nn.functional.linear(inputs[example], weight), outputs[example])
        assert weight.grad is not None
        torch.testing.assert_close(found[example], weight.grad, rtol=1e-5, atol=1e-5)


@given(SHAPES, st.integers(1, 9), st.integers(0, 2**31))
def test_of_embedding_is_what_autograd_finds_for_each_example(
    shape: tuple[int, tuple[int, ...]], width: int, seed: int
) -> None:
    rows, (examples, inner) = 5, shape
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(rows, (examples, *inner), generator=generator)
    outputs = torch.randn(examples, *inner, width, generator=generator)
    found = clip.of_embedding(indices, outputs, rows)
    for example in range(examples):
        weight = torch.zeros(rows, width, requires_grad=True)
        torch.autograd.backward(torch.nn.functional.embedding(indices[example], weight), outputs[example])
        assert weight.grad is not None
        torch.testing.assert_close(found[example], weight.grad, rtol=1e-5, atol=1e-5)


@given(st.floats(-30, 30), st.floats(-6, 6), st.integers(1, 300), st.integers(0, 2**31))
def test_no_example_counts_for_more_than_the_limit(magnitude: float, limit: float, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [10**magnitude * torch.randn(1, size, 2, generator=generator) for _ in range(2)]
    before, after = norm(gradients), norm(clip.clipped_sums(gradients, 10**limit))
    assert after <= 10**limit
    assert math.isclose(after, min(before, 10**limit), rel_tol=1e-6)


def test_a_gradient_that_is_not_finite_counts_as_zero() -> None:
    for bad in (math.nan, math.inf):
        gradients = [clip.of_linear(*layer) for layer in drawn((4, (3,)), [(5, 2), (2, 7)], seed=3)]
        expected = clip.clipped_sums([torch.cat([one[:1], one[2:]]) for one in gradients], 0.5)
        gradients[1][1, 0, 0] = bad
        for found, wanted in zip(clip.clipped_sums(gradients, 0.5), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=2**-22)


@pytest.mark.parametrize(("value", "limit"), [(1e36, 1e-3), (1e38, 1e-2), (1e38, 1e-3), (3e38, 1e-6), (1e30, 1e-3)])
def test_no_gradient_is_too_long_to_be_clipped(value: float, limit: float) -> None:
    """Where the factor has few bits left in float32, the product could be longer than the limit."""
    for sign in (1, -1):
        (found,) = clip.clipped_sums([torch.full((1, 1000), sign * value)], limit)
        assert float(found.norm()) <= limit


def test_many_examples_are_summed_to_what_is_promised() -> None:
    """Where one example is silent, the sum changes by its norm and by no more than the stated error beside."""
    gradients = [clip.of_linear(*layer) for layer in drawn((200, (3,)), [(5, 2), (2, 7)], seed=3)]
    sums = clip.clipped_sums(gradients, 0.5)
    for example in (0, 77, 199):
        for one in gradients:
            one[example] = 0
        less = clip.clipped_sums(gradients, 0.5)
        change = norm([a - b for a, b in zip(sums, less, strict=True)])
        assert 0 < change <= 0.5 * (1 + clip.SUM_ERROR)
        sums = less


def test_nothing_from_nobody() -> None:
    for found, shape in zip(
        clip.clipped_sums([torch.zeros(0, 3, 4), torch.zeros(0, 5)], 1.0), ((3, 4), (5,)), strict=True
    ):
        assert found.shape == shape
        assert not found.any()
    assert not clip.clipped_sums([torch.zeros(2, 3)], 1.0)[0].any()
