"""Random directions: the fast way against the plain one, and what must be true of the numbers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.kernels import perturb

CPU = torch.device("cpu")
KEYS = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
SCALES = st.dictionaries(st.integers(0, 4095), st.floats(-1, 1, width=32), max_size=20)


def test_it_is_philox() -> None:
    """The known answer of Random123 for Philox4x64-10 with a counter and a key of zeros (`kat_vectors`)."""
    words = perturb._reference_bytes((0, 0), -32, 32, 0, 0, CPU).numpy().view(np.uint64)
    known = ["16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b"]
    assert [f"{word:016x}" for word in words] == known


@given(KEYS, st.integers(0, 40), st.integers(1, 300), st.integers(0, 2**63 - 1), st.sampled_from([0, 1]))
@settings(deadline=None, max_examples=60)
def test_numpys_bytes_are_those_of_the_plain_way(
    key: perturb.Key, blocks: int, count: int, group: int, purpose: int
) -> None:
    fast = perturb._bytes(key, 32 * blocks, count, group, purpose, CPU)
    assert torch.equal(fast, perturb._reference_bytes(key, 32 * blocks, count, group, purpose, CPU))


@given(KEYS, SCALES, st.integers(1, 3000), st.sampled_from([32, 96, 1 << 18]))
@settings(deadline=None, max_examples=60)
def test_a_mixture_is_what_the_plain_way_adds(
    key: perturb.Key, scales: dict[int, float], count: int, chunk: int
) -> None:
    """Each group of eight is rounded once to float32, and so is each sum of groups, however the tensor is cut."""
    tensor = torch.linspace(-1, 1, count).view(-1, 1)
    ours, size = tensor.clone(), sum(map(abs, scales.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(perturb, "_CHUNK", {"cpu": chunk})
        perturb.add_(ours, key, perturb.mixture(scales))
    roundings = 2 * len({number // 8 for number in scales}) + 1
    plain = tensor.double()
    perturb.reference_add_(plain, key, perturb.mixture(scales))
    error = (ours - plain).abs().max()
    assert error <= roundings * 2**-24 * (1 + size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_how_a_tensor_is_cut_and_how_many_threads_there_are_changes_no_bit(dtype: torch.dtype) -> None:
    threads, outcomes = torch.get_num_threads(), []
    for number, chunk in ((1, 1 << 18), (2, 1 << 16), (2, 4096)):
        tensor = torch.linspace(-1, 1, 150_001).to(dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(perturb, "_CHUNK", {"cpu": chunk})
            torch.set_num_threads(number)
            perturb.add_(tensor, (3, 5), perturb.mixture({0: 0.3, 9: -1e-3, 700: 1.0}), rounding=4)
            torch.set_num_threads(threads)
        outcomes.append(tensor)
    assert all(torch.equal(outcomes[0], one) for one in outcomes)


def test_the_values_are_the_same_for_good() -> None:
    values = perturb.reference_signs((3, 5), 11, 10_000).numpy().tobytes()
    assert hashlib.sha256(values).hexdigest() == "da3f03d8e4e6b067cc6ffa839b9afe1580c128d8081979ea6d23ab0379cf0f8b"


def test_values_are_signs_that_know_nothing_of_each_other() -> None:
    """Means and products of n independent signs are within five standard deviations, 5/√n."""
    count = 100_000
    keys = [(1, 1), (1, 2), (2, 1)]
    drawn = [perturb.reference_signs(key, number, count) for key in keys for number in (0, 1, 8, 4095)]
    signs = torch.stack(drawn).double()
    assert set(torch.unique(signs).tolist()) == {-1.0, 1.0}
    products = signs @ signs.T / count
    assert (products - torch.eye(len(drawn))).abs().max() < 5 / count**0.5
    assert signs.mean(1).abs().max() < 5 / count**0.5
    assert (signs[:, 1:] * signs[:, :-1]).mean(1).abs().max() < 5 / count**0.5


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=50), st.integers(0, 2**32))
@settings(deadline=None)
def test_stochastic_rounding_is_that_of_the_plain_way(values: list[float], seed: int) -> None:
    exact = torch.tensor(values)
    noise = torch.randint(256, (2 * len(values),), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    plain = perturb.reference_stochastically_rounded(exact, noise)
    assert torch.equal(perturb.stochastically_rounded(exact.clone(), noise), plain)


@pytest.mark.parametrize("change", [1e-5, -3e-5, 1.7e-3])
def test_stochastic_rounding_is_right_on_average(change: float) -> None:
    """0.25 + 10⁻⁵ is not in bfloat16, nor is anything near: the mean over many values is, to five deviations."""
    count = 100_000
    tensor = torch.full((count,), 0.25, dtype=torch.bfloat16)
    perturb.add_(tensor, (0, 0), perturb.mixture({0: change}), rounding=7)
    moved = (tensor.double() - 0.25) * perturb.reference_signs((0, 0), 0, count)
    place = 2.0**-9 if abs(change) < 2.0**-9 else 2.0**-8
    assert abs(float(moved.mean()) - change) < 5 * (abs(change) * 2 * place / count) ** 0.5
    again = torch.full((count,), 0.25, dtype=torch.bfloat16)
    perturb.add_(again, (0, 0), perturb.mixture({0: change}), rounding=7)
    assert torch.equal(again, tensor)
    perturb.add_(again.fill_(0.25), (0, 0), perturb.mixture({0: change}), rounding=8)
    assert not torch.equal(again, tensor)


def test_without_it_bfloat16_is_rounded_to_nearest() -> None:
    tensor = torch.full((1000,), 0.25, dtype=torch.bfloat16)
    perturb.add_(tensor, (0, 0), perturb.mixture({0: 1e-5}))
    assert torch.equal(tensor, torch.full_like(tensor, 0.25))
    tensor = torch.linspace(-1, 1, 999).bfloat16()
    nearest = tensor.clone()
    perturb.reference_add_(nearest, (1, 2), perturb.mixture({3: 0.011}))
    perturb.add_(tensor, (1, 2), perturb.mixture({3: 0.011}))
    assert torch.equal(tensor, nearest)


def test_nothing_is_added_for_nothing() -> None:
    tensor = torch.full((5,), -0.0)
    perturb.add_(tensor, (0, 0), perturb.mixture({3: 0.0, 99: 0.0}))
    assert torch.equal(tensor.view(torch.int32), torch.full((5,), -0.0).view(torch.int32))
    assert perturb.mixture({3: 0.0, 90: 1.0}).groups == (11,)


def test_other_formats_are_refused() -> None:
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        perturb.add_(torch.zeros(3, dtype=torch.float16), (0, 0), perturb.mixture({0: 1.0}))


@pytest.mark.gpu
def test_a_gpu_makes_the_same_values() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        here = torch.linspace(-1, 1, 70_001).to(dtype)
        there = here.cuda()
        for tensor in (here, there):
            perturb.add_(tensor, (3, 5), perturb.mixture({0: 0.3, 9: -1e-3, 700: 1.0}), rounding=4)
        assert torch.equal(there.cpu(), here)
