"""Many adapters at once, against a loop over them, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.kernels import grouped

DTYPES = (torch.float32, torch.bfloat16)


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(DTYPES),
    st.integers(0, 10**6),
)
def test_it_equals_the_reference(
    counts: list[int], rank: int, width: int, out: int, dtype: torch.dtype, seed: int
) -> None:
    """Widths that torch would not take, and groups without a row, too. Both round once a product; sums of up to 20
    values of size 1 in another order differ by a few of the last place.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, groups = sum(counts), len(counts)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    leaves = leaf(rows, width), leaf(groups, rank, width), leaf(groups, out, rank)
    weights = torch.randn(rows, out, generator=generator).to(dtype)
    if not rows:
        return
    found, expected = (
        version(*leaves, torch.tensor(counts)) for version in (grouped.low_rank, grouped.reference_low_rank)
    )
    assert (found.shape, found.dtype) == ((rows, out), dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 0.25
    torch.testing.assert_close(found, expected, rtol=tolerance / 4, atol=tolerance)
    for one, other in zip(
        torch.autograd.grad(found, leaves, weights), torch.autograd.grad(expected, leaves, weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=tolerance / 4, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_smaller_rank_padded_with_zeros_is_itself(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs, a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((4, 8), (1, 2, 8), (1, 6, 2)))
    counts = torch.tensor([4])
    wide_a, wide_b = torch.cat([a, torch.zeros_like(a)], 1), torch.cat([b, torch.zeros_like(b)], 2)
    torch.testing.assert_close(grouped.low_rank(inputs, wide_a, wide_b, counts), grouped.low_rank(inputs, a, b, counts))
