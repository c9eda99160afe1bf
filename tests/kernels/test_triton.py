"""Triton's versions against those that they stand for: in its interpreter, and on a device.

`make test-triton` installs Triton, which torch for CPUs does not bring, and runs those for the interpreter.
"""

from __future__ import annotations

import pytest
import torch

from farfield.kernels import dispatch, perturb
from farfield.kernels.dispatch import Implementation

SCALES = {0: 0.3, 9: -1e-3, 700: 1.0}


def apart(dtype: torch.dtype, count: int, rounding: int | None, key: perturb.Key, device: str) -> list[torch.Tensor]:
    """What both make of the same values."""
    from farfield.kernels import triton_perturb

    values = torch.linspace(-1, 1, count).to(dtype)
    ours, plain = values.clone().to(device), values.clone()
    triton_perturb.add_(ours, key, perturb.mixture(SCALES), rounding=rounding)
    perturb.add_(plain, key, perturb.mixture(SCALES), rounding=rounding)
    assert not torch.equal(plain, values)
    return [ours.cpu(), plain]


@pytest.mark.triton
@pytest.mark.parametrize("key", [(3, 5), (2**64 - 3, 2**63)])
@pytest.mark.parametrize("rounding", [None, 4, 2**63 + 5])
@pytest.mark.parametrize("count", [1, 31, 1024, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixture_is_added_to_the_bit(dtype: torch.dtype, count: int, rounding: int | None, key: perturb.Key) -> None:
    ours, plain = apart(dtype, count, rounding, key, "cpu")
    assert torch.equal(ours, plain)


@pytest.mark.triton
def test_what_perturb_refuses_or_leaves_alone_it_does_too() -> None:
    from farfield.kernels import triton_perturb

    with pytest.raises(TypeError, match="float32 or bfloat16"):
        triton_perturb.add_(torch.zeros(3, dtype=torch.float16), (0, 0), perturb.mixture({0: 1.0}))
    values = torch.full((5,), -0.0)
    triton_perturb.add_(values, (0, 0), perturb.mixture({3: 0.0}))
    assert torch.equal(values.view(torch.int32), torch.full((5,), -0.0).view(torch.int32))
    assert dispatch.choose("perturb.add_", Implementation.TRITON, "cuda") is triton_perturb.add_


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_adds_the_same_bits(dtype: torch.dtype, rounding: int | None) -> None:
    ours, plain = apart(dtype, 1_000_003, rounding, (3, 5), "cuda")
    assert torch.equal(ours, plain)


@pytest.mark.triton
def test_what_lies_between_two_values_goes_to_the_even_one() -> None:
    from farfield.kernels import triton_perturb

    values = (1 + torch.arange(64) * 2.0**-7).bfloat16()
    ours, plain = values.clone(), values.clone()
    for version, one in ((triton_perturb.add_, ours), (perturb.add_, plain)):
        version(one, (0, 0), perturb.mixture({0: 2.0**-8}))
    assert not torch.equal(plain, values)
    assert torch.equal(ours, plain)
