"""Random directions that nobody stores: each value follows from a key and its place, wherever it is needed.

Direction j of a tensor is z_j ∈ {−1, +1}ⁿ, and what is done with directions is always to add a mixture Σⱼ sⱼ·z_j.
MeZO (Malladi et al. 2023, definition 1) draws normal values. It is an instance of SPSA, which was made for signs (Spall
1992, section III), and signs have the least mean square error there (Sadegh and Spall 1998): the estimate (∇·z)z has
the mean ∇ with both, and the mean square d‖∇‖² with signs and (d + 2)‖∇‖² with normal values. What decides here is that

- they are bits, so there is no logarithm or cosine whose last place differs from processor to processor;
- |sⱼ·z_j| is |sⱼ|, so the range of an update is known beforehand and exactly;
- a byte holds one element of eight directions, and a mixture of them is one look-up in a table of 256 sums.

The bits are those of Philox4x64-10 (Salmon et al. 2011), a counter-based generator: byte i of stream (key, group) has
in bit k the sign of element i of direction 8·group + k. The arithmetic is on integers, hence the same on every machine
and for any number of threads. On CPUs numpy's Philox does it, whose stream is fixed for good; elsewhere, and as the
plain reference, it is written out in torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import torch

Key: TypeAlias = tuple[int, int]
"""Two numbers below 2⁶⁴: a seed, and which tensor it is."""

_TOGETHER: Final = 8
"""Directions in a group: bits of a byte."""

_BLOCK: Final = 32
"""Bytes that one counter gives."""

_CHUNK: Final = {"cpu": 2**18, "cuda": 2**24}
"""Elements worked on at a time: what is held for them stays in a processor's second-level cache."""

_SIGNS, _ROUNDING = 0, 1

_MULTIPLIERS: Final = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_WEYL: Final = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
"""The constants of Philox4x64 (Salmon et al. 2011, table 2 and section 4.3)."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """Σⱼ sⱼ·z_j over the directions j that have a part in it.

    Attributes:
        groups: those that hold any of them, in rising order.
        tables: float32 [groups, 256], what each byte of a group comes to. Each is summed in float64 and rounded once.
        scales: sⱼ by j, as the mixture was made of them.
    """

    groups: tuple[int, ...]
    tables: torch.Tensor
    scales: Mapping[int, float]


def mixture(scales: Mapping[int, float]) -> Mixture:
    """The mixture with these sⱼ, by j; what is zero, or left out, costs nothing."""
    groups = sorted({number // _TOGETHER for number, scale in scales.items() if scale})
    bits = np.arange(256)
    tables = np.zeros((len(groups), 256))
    for bit in range(_TOGETHER):
        column = np.array([scales.get(_TOGETHER * group + bit, 0.0) for group in groups], dtype=np.float64)
        tables += column[:, None] * (2.0 * (bits >> bit & 1) - 1.0)
    return Mixture(tuple(groups), torch.from_numpy(tables.astype(np.float32)), scales)


def reference_signs(key: Key, number: int, count: int) -> torch.Tensor:
    """The first `count` values of direction `number`, int8."""
    stream = _reference_bytes(key, 0, count, number // _TOGETHER, _SIGNS, torch.device("cpu"))
    return (stream >> number % _TOGETHER & 1).to(torch.int8) * 2 - 1


@torch.no_grad()
def reference_add_(tensor: torch.Tensor, key: Key, mixed: Mixture, *, rounding: int | None = None) -> None:
    """As `add_`, direction by direction in float64 and all at once; float64 tensors are taken too, and not rounded."""
    exact = tensor.double().reshape(-1)
    for number, scale in mixed.scales.items():
        exact = exact + scale * reference_signs(key, number, exact.numel()).to(exact.device)
    if tensor.dtype == torch.bfloat16:
        exact = exact.float()
        if rounding is not None:
            noise = _reference_bytes(key, 0, 2 * exact.numel(), rounding, _ROUNDING, exact.device)
            exact = reference_stochastically_rounded(exact, noise)
    tensor.copy_(exact.view(tensor.shape))


@torch.no_grad()
def add_(tensor: torch.Tensor, key: Key, mixed: Mixture, *, rounding: int | None = None) -> None:
    """Add the mixture to `tensor`, float32 or bfloat16 and contiguous, in place; nothing of its size is held.

    Sums are made in float32, group by group. A bfloat16 tensor takes them rounded to nearest; or, with `rounding`, to
    one of the two neighbours, up or down with probabilities that make the expectation exact, as a change far below
    its last place needs it (stochastic rounding; Gupta et al. 2015, section 3). `rounding` is a number that
    says which random bits decide; the same one decides the same.
    """
    if not mixed.groups:
        return
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"a tensor in float32 or bfloat16 is wanted, not in {tensor.dtype}")
    flat, size = tensor.view(-1), _CHUNK["cpu" if tensor.device.type == "cpu" else "cuda"]
    tables = mixed.tables.to(tensor.device)
    indices = torch.empty(min(size, flat.numel()), dtype=torch.long, device=tensor.device)
    part, total = (torch.empty(len(indices), device=tensor.device) for _ in range(2))
    for start in range(0, flat.numel(), size):
        chunk = flat[start : start + size]
        count = chunk.numel()
        index, one, whole = indices[:count], part[:count], total[:count]
        whole.zero_()
        for group, table in zip(mixed.groups, tables, strict=True):
            index.copy_(_bytes(key, start, count, group, _SIGNS, tensor.device))
            torch.index_select(table, 0, index, out=one)
            whole.add_(one)
        if tensor.dtype == torch.float32:
            chunk.add_(whole)
        elif rounding is None:
            chunk.copy_(whole.add_(chunk))
        else:
            noise = _bytes(key, 2 * start, 2 * count, rounding, _ROUNDING, tensor.device)
            chunk.copy_(stochastically_rounded(whole.add_(chunk), noise))


def reference_stochastically_rounded(exact: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """As `stochastically_rounded`."""
    below = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32)
    above = (below.view(torch.int32) + (1 << 16)).view(torch.float32)
    share = (exact.double() - below) / (above.double() - below)
    chance = (noise.view(torch.int16).int() & 0xFFFF).double() / 2**16
    return torch.where(chance >= 1 - share, above, below).bfloat16()


def stochastically_rounded(exact: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """float32[n], which is overwritten, as bfloat16[n]: one neighbour or the other, by 16 random bits each, uint8[2n].

    Adding random bits to those that are cut off carries into the last place that stays with just the probability that
    is wanted.
    """
    bits = exact.view(torch.int32)
    bits.add_(noise.view(torch.int16).int().bitwise_and_(0xFFFF)).bitwise_right_shift_(16)
    return bits.to(torch.int16).view(torch.bfloat16)


def _bytes(key: Key, start: int, count: int, group: int, purpose: int, device: torch.device) -> torch.Tensor:
    """Bytes `start`, a multiple of 32, to `start + count` of a stream: uint8[count]."""
    if device.type != "cpu":
        return _reference_bytes(key, start, count, group, purpose, device)
    # Its counter is raised before it is used, so the first block has number 1.
    counter = np.array([start // _BLOCK, group, purpose, 0], dtype=np.uint64)
    generator = np.random.Philox(counter=counter, key=np.array(key, dtype=np.uint64))
    return torch.from_numpy(generator.random_raw(-(-count // 8)).view(np.uint8)[:count])


def _reference_bytes(key: Key, start: int, count: int, group: int, purpose: int, device: torch.device) -> torch.Tensor:
    """As `_bytes`: Philox4x64-10 in the wrapping arithmetic of int64."""
    blocks = -(-count // _BLOCK)
    first = start // _BLOCK + 1
    zero = torch.zeros(blocks, dtype=torch.long, device=device)
    words = (torch.arange(first, first + blocks, device=device), zero + group, zero + purpose, zero)
    keys = list(key)
    for _ in range(10):
        high0, low0 = _product(_MULTIPLIERS[0], words[0])
        high1, low1 = _product(_MULTIPLIERS[1], words[2])
        words = (high1 ^ words[1] ^ _signed(keys[0]), low1, high0 ^ words[3] ^ _signed(keys[1]), low0)
        keys = [one + step for one, step in zip(keys, _WEYL, strict=True)]
    return torch.stack(words, dim=1).view(-1).view(torch.uint8)[:count]


def _product(factor: int, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper and the lower 64 bits of `factor` times each word, all unsigned."""
    half, mask = 32, 2**32 - 1
    upper, lower = words >> half & mask, words & mask
    low, middle, other = (factor & mask) * lower, (factor & mask) * upper, (factor >> half) * lower
    carried = (low >> half & mask) + (middle & mask) + (other & mask)
    high = (factor >> half) * upper + (middle >> half & mask) + (other >> half & mask) + (carried >> half)
    return high, words * _signed(factor)


def _signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    number &= 2**64 - 1
    return number - 2**64 if number >> 63 else number
