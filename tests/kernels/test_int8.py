"""Eight bits a weight: the library's arithmetic beside plain torch, and the product with it."""

from __future__ import annotations

import pytest
import torch

from farfield.kernels import int8


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (64, 64), (128, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_rounds_and_restores_as_the_reference_does(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight = drawn(rows, columns).to(dtype)
    for one, other in zip(int8.quantize(weight), int8.reference_quantize(weight), strict=True):
        assert torch.equal(one, other)
    codes, scales = int8.quantize(weight)
    back = int8.dequantize(codes, scales, torch.float32)
    # The scale s/127 is rounded to 24 bits before or after the product.
    torch.testing.assert_close(back, int8.reference_dequantize(codes, scales, torch.float32), rtol=2**-22, atol=0)
    # Half a step of its row, and what float16 rounds.
    bound = scales.unsqueeze(1) * (0.5 / 127 + 2**-11)
    assert ((back - weight.float()).abs() <= bound).all()


def test_a_row_of_zeros_stays_one() -> None:
    weight = drawn(4, 16)
    weight[2] = 0
    assert (int8.dequantize(*int8.quantize(weight), torch.float32)[2] == 0).all()


def test_the_product_and_its_gradient_are_those_of_the_restored_matrix() -> None:
    codes, scales = int8.quantize(drawn(24, 33))
    inputs, bias = drawn(5, 33, seed=1).requires_grad_(), drawn(1, 24, seed=2)[0]
    plain = inputs.detach().clone().requires_grad_()
    found = int8.linear(inputs, codes, scales, bias)
    wanted = torch.nn.functional.linear(plain, int8.reference_dequantize(codes, scales, torch.float32), bias)
    torch.testing.assert_close(found, wanted)
    weights = drawn(5, 24, seed=3)
    for product in (found, wanted):
        torch.autograd.backward((product * weights).sum())
    torch.testing.assert_close(inputs.grad, plain.grad)
