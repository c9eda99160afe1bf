"""NF4: packed as bitsandbytes packs it, and differentiable by what goes in."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.emulator import offline as offline  # before bitsandbytes asks the hub for kernels
from farfield.kernels import nf4

WIDTHS = st.integers(1, 40)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def drawn(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Rows of very different magnitudes, so that each block needs a scale of its own.
    sizes = 10 ** (4 * torch.rand(rows, 1, generator=generator) - 3)
    return (sizes * torch.randn(rows, columns, generator=generator)).to(dtype)


@given(WIDTHS, WIDTHS, st.integers(0, 2**31), DTYPES)
def test_packs_as_the_reference_does(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    weight = drawn(rows, columns, seed, dtype)
    (packed, scales), (other, other_scales) = nf4.quantize(weight), nf4.reference_quantize(weight)
    assert (packed.dtype, scales.dtype) == (torch.uint8, torch.bfloat16)
    assert (tuple(packed.shape), tuple(scales.shape)) == tuple((size,) for size in nf4.sizes(rows, columns))
    assert torch.equal(scales, other_scales)
    for one, same in zip(indices(packed), indices(other), strict=True):
        assert abs(one - same) <= 1
    # A value within a few roundings of the middle between two levels may become either of them.
    assert sum(one != same for one, same in zip(indices(packed), indices(other), strict=True)) <= 1


@given(WIDTHS, WIDTHS, st.integers(0, 2**31), st.sampled_from([torch.float32, torch.bfloat16]))
def test_unpacks_as_the_reference_does(rows: int, columns: int, seed: int, dtype: torch.dtype) -> None:
    packed, scales = nf4.quantize(drawn(rows, columns, seed))
    weight = nf4.dequantize(packed, scales, rows, columns, dtype)
    assert (weight.dtype, tuple(weight.shape)) == (dtype, (rows, columns))
    assert torch.equal(weight, nf4.reference_dequantize(packed, scales, rows, columns, dtype))


@given(WIDTHS, WIDTHS, st.integers(0, 2**31))
def test_no_value_moves_further_than_half_the_widest_gap(rows: int, columns: int, seed: int) -> None:
    weight = drawn(rows, columns, seed)
    packed, scales = nf4.quantize(weight)
    flat = nf4.dequantize(packed, scales, rows, columns, torch.float32).reshape(-1)
    gap = max(after - before for before, after in zip(nf4.LEVELS, nf4.LEVELS[1:], strict=False))
    for block, was in zip(torch.split(flat, nf4.BLOCK), torch.split(weight.reshape(-1), nf4.BLOCK), strict=True):
        largest = float(was.abs().max())
        # Rounding the scale to bfloat16 moves each value by up to 2^-9 of the largest.
        assert float((block - was).abs().max()) <= largest * (gap / 2 + 2**-8)


def indices(packed: torch.Tensor) -> list[int]:
    return [int(nibble) for byte in packed.tolist() for nibble in (byte >> 4, byte & 15)]


def test_levels_come_back_as_they_are() -> None:
    weight = torch.tensor(nf4.LEVELS).repeat(8).view(4, 32) * 0.5
    assert torch.equal(nf4.dequantize(*nf4.quantize(weight), 4, 32, torch.float32), weight)


def test_zero_stays_zero() -> None:
    weight = torch.zeros(3, 64)
    weight[2] = 1
    assert torch.equal(nf4.dequantize(*nf4.quantize(weight), 3, 64, torch.float32), weight)


def test_a_matrix_that_is_a_view_is_packed_in_the_order_of_its_rows() -> None:
    weight = drawn(24, 10, seed=2)
    assert torch.equal(nf4.quantize(weight.T)[0], nf4.quantize(weight.T.contiguous())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(6, 64), (5, 7), (1, 1), (9, 16)])
def test_a_layer_is_the_product_with_the_unpacked_matrix_and_so_is_its_gradient(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    packed, scales = nf4.quantize(drawn(rows, columns, seed=3))
    weight = nf4.reference_dequantize(packed, scales, rows, columns, dtype)
    inputs = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(4)).to(dtype).requires_grad_()
    bias = torch.randn(rows).to(dtype)
    given_back = nf4.linear(inputs, packed, scales, bias, rows, columns)
    assert given_back.dtype == dtype
    expected = inputs @ weight.T + bias
    assert torch.equal(given_back, expected)
    (ours,) = torch.autograd.grad(given_back.float().square().sum(), inputs)
    (theirs,) = torch.autograd.grad(expected.float().square().sum(), inputs)
    assert torch.equal(ours, theirs)


def test_nothing_but_four_bits_is_kept_for_backward() -> None:
    packed, scales = nf4.quantize(torch.randn(64, 64))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nf4.linear(torch.randn(8, 64, requires_grad=True), packed, scales, None, 64, 64)
    assert sum(tensor.nbytes for tensor in kept) == packed.nbytes + scales.nbytes


def test_no_kernel_is_compiled_for_a_shape() -> None:
    """Machines at the edge have no compiler, and ranks are often odd."""
    before = torch._dynamo.utils.counters["stats"]["calls_captured"]
    nf4.dequantize(*nf4.quantize(torch.randn(6, 11)), 6, 11, torch.float32)
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] == before


@given(st.integers(1, 300), st.integers(1, 70), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_rows_that_are_multiplied_a_few_at_a_time_are_those_of_the_whole_matrix(
    rows: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    """Each value is one inner product, wherever its row stands: the sums may only be made in another order, of up to
    70 terms, each within half a unit in the last place.
    """
    packed, scales = nf4.quantize(drawn(rows, columns, seed))
    inputs = torch.randn(3, 2, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "CHUNK", 128 * columns)
        parts = nf4.linear(inputs, packed, scales, None, rows, columns)
    whole = nf4.reference_linear(inputs, packed, scales, None, rows, columns)
    assert (parts.shape, parts.dtype) == ((3, 2, rows), dtype)
    weight = nf4.reference_dequantize(packed, scales, rows, columns, torch.float64)
    size = inputs.double().abs() @ weight.abs().T
    assert ((parts.double() - whole.double()).abs() <= (70 * 2**-24 + torch.finfo(dtype).eps) * size).all()


def test_no_more_than_a_few_rows_of_a_large_matrix_are_there_at_a_time() -> None:
    packed, scales = nf4.quantize(torch.randn(1024, 64))
    made: list[int] = []
    dequantize = nf4.dequantize

    def seen(packed: torch.Tensor, scales: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        made.append(rows)
        return dequantize(packed, scales, rows, columns, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4, "CHUNK", 64 * 300)
        patch.setattr(nf4, "dequantize", seen)
        nf4.linear(torch.randn(2, 64), packed, scales, None, 1024, 64)
    assert made == [256, 256, 256, 256]
