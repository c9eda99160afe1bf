"""A product added in place, against autograd on the plain sum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farfield.kernels import low_rank

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3)


def leaves(shape: list[int], k: int, d: int, rank: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """x, W, A and B, and the gradient of y."""
    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(*shape, k), (d, k), (rank, k), (d, rank), (*shape, d)]
    return [torch.randn(one, generator=generator).to(dtype) for one in shapes]


@given(
    SHAPES, st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.sampled_from(DTYPES), st.integers(0, 2**31)
)
def test_it_equals_the_reference(shape: list[int], k: int, d: int, rank: int, dtype: torch.dtype, seed: int) -> None:
    """Of the size of the sum of magnitudes, which is what a rounding is relative to: the reference rounds y, h, h·Bᵀ,
    its multiple and the sum, and each gradient three times; ours does less. Six units in the last place hold both.
    """
    x, w, a, b, gradient = leaves(shape, k, d, rank, dtype, seed)
    last = 6 * torch.finfo(dtype).eps
    results = []
    for version in (low_rank.add_, low_rank.reference_add_):
        inputs, factor = x.clone().requires_grad_(), b.clone().requires_grad_()
        given_back = version(torch.nn.functional.linear(inputs, w), inputs, a, factor, 1.7)
        assert given_back.dtype == dtype
        results.append([given_back.detach(), *torch.autograd.grad(given_back, [inputs, factor], gradient)])
    x_, w_, a_, b_, g_ = (one.double().abs() for one in (x, w, a, b, gradient))
    g_ = g_.flatten(0, -2)
    sizes = [
        x_ @ w_.T + 1.7 * (x_ @ a_.T @ b_.T),
        (g_ @ w_ + 1.7 * (g_ @ b_ @ a_)).view(x.shape),
        1.7 * (g_.T @ (x_ @ a_.T).flatten(0, -2)),
    ]
    for ours, plain, size in zip(*results, sizes, strict=True):
        assert ours.shape == plain.shape
        assert ((ours.double() - plain.double()).abs() <= last * size).all()


def test_the_product_is_made_where_the_layer_has_written() -> None:
    x, w, a, b, _ = leaves([4], 6, 5, 2, torch.float32, 1)
    outputs = x @ w.T
    assert low_rank.add_(outputs, x, a, b.requires_grad_(), 0.5).data_ptr() == outputs.data_ptr()


@pytest.mark.parametrize("version", [low_rank.add_, low_rank.reference_add_])
def test_only_the_narrow_product_is_kept(version: Callable[..., torch.Tensor]) -> None:
    x, w, a, b, _ = leaves([7], 64, 48, 3, torch.float32, 2)
    own = {one.data_ptr() for one in (w, a, b)}
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        inputs = x.requires_grad_()
        version(torch.nn.functional.linear(inputs, w), inputs, a, b.requires_grad_(), 0.5)
    assert sum(sizes.values()) == 7 * 3 * 4


def test_gradients_go_on_to_what_made_the_outputs_and_not_to_a() -> None:
    x, w, a, b, gradient = leaves([3], 5, 4, 2, torch.float32, 3)
    w.requires_grad_()
    a.requires_grad_()
    low_rank.add_(torch.nn.functional.linear(x, w), x, a, b.requires_grad_(), 2.0).backward(gradient)  # type: ignore[no-untyped-call]
    assert w.grad is not None
    torch.testing.assert_close(w.grad, gradient.T @ x)
    assert a.grad is None
