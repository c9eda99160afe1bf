"""`perturb.add_` as one Triton kernel, for CUDA devices: the same bits, made where they are added.

Written out in torch, Philox takes dozens of operations on tensors of int64, each of which goes through the device's
memory. Here a program makes the words of its counters in registers, looks their bytes up in the mixture's table, and
reads and writes each value of the tensor once.

Triton comes with torch's builds for CUDA and compiles the kernel when it is first used. Its interpreter
(`TRITON_INTERPRET=1`) runs it on a CPU, slowly: so it is tested without a device.
"""

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from .perturb import Key, Mixture

_COUNTERS: Final = 32
"""How many counters a program takes; each gives 32 bytes, one for an element."""


@torch.no_grad()
def add_(tensor: torch.Tensor, key: Key, mixed: Mixture, *, rounding: int | None = None) -> None:
    """As `perturb.add_`, to the bit; `tensor` is on a CUDA device, or anywhere in Triton's interpreter."""
    if not mixed.groups:
        return
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"a tensor in float32 or bfloat16 is wanted, not in {tensor.dtype}")
    flat, device = tensor.view(-1), tensor.device
    numbers = [one - 2**64 if one >> 63 else one for one in (*key, rounding or 0)]
    add_kernel[(triton.cdiv(flat.numel(), 32 * _COUNTERS),)](
        flat,
        mixed.tables.to(device),
        torch.tensor(mixed.groups, dtype=torch.long, device=device),
        torch.tensor(numbers, dtype=torch.long, device=device),
        len(mixed.groups),
        flat.numel(),
        STOCHASTIC=rounding is not None and tensor.dtype == torch.bfloat16,
        COUNTERS=_COUNTERS,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _words(first: tl.tensor, second: tl.tensor, third: tl.tensor, key0: tl.tensor, key1: tl.tensor) -> tl.tensor:
    """uint64 [n, 4]: the words of Philox4x64-10 for counters (first [n], second, third, 0)."""
    multiplier0 = tl.full(first.shape, 0xD2E7470EE14C6C93, tl.uint64)
    multiplier1 = tl.full(first.shape, 0xCA5A826395121157, tl.uint64)
    weyl0 = tl.full(first.shape, 0x9E3779B97F4A7C15, tl.uint64)
    weyl1 = tl.full(first.shape, 0xBB67AE8584CAA73B, tl.uint64)
    zero = tl.zeros(first.shape, tl.uint64)
    word0, word1, word2, word3 = first, zero + second, zero + third, zero
    key0, key1 = zero + key0, zero + key1
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(word0, multiplier0), word0 * multiplier0
        high1, low1 = tl.umulhi(word2, multiplier1), word2 * multiplier1
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0, key1 = key0 + weyl0, key1 + weyl1
    pairs = tl.permute(tl.join(tl.join(word0, word1), tl.join(word2, word3)), (0, 2, 1))
    return tl.reshape(pairs, (first.shape[0], 4))


@triton.jit  # type: ignore[untyped-decorator]
def add_kernel(
    values: tl.tensor,
    tables: tl.tensor,
    groups: tl.tensor,
    numbers: tl.tensor,
    count: tl.tensor,
    size: tl.tensor,
    STOCHASTIC: tl.constexpr,  # noqa: N803 - as Triton writes what is known when it compiles
    COUNTERS: tl.constexpr,  # noqa: N803
) -> None:
    """Add to 32 · COUNTERS values the sums over groups that the tables hold for their bytes."""
    key0 = tl.load(numbers).to(tl.uint64, bitcast=True)
    key1 = tl.load(numbers + 1).to(tl.uint64, bitcast=True)
    begin = tl.program_id(0).to(tl.int64) * COUNTERS
    counters = (begin + tl.arange(0, COUNTERS) + 1).to(tl.uint64)
    total = tl.zeros((32 * COUNTERS,), tl.float32)
    eight = (8 * tl.arange(0, 8)).to(tl.uint64)
    for place in range(count):
        words = _words(counters, tl.load(groups + place).to(tl.uint64, bitcast=True), 0, key0, key1)
        found = (words[:, :, None] >> eight[None, None, :]) & 255
        total += tl.load(tables + 256 * place + tl.reshape(found, (32 * COUNTERS,)).to(tl.int64))
    places = 32 * begin + tl.arange(0, 32 * COUNTERS)
    inside = places < size
    old = tl.load(values + places, mask=inside, other=0.0)
    exact = old.to(tl.float32) + total
    if STOCHASTIC:
        # 16 bits for a value: twice as many counters.
        twice = (2 * begin + tl.arange(0, 2 * COUNTERS) + 1).to(tl.uint64)
        words = _words(twice, tl.load(numbers + 2).to(tl.uint64, bitcast=True), 1, key0, key1)
        sixteen = (16 * tl.arange(0, 4)).to(tl.uint64)
        noise = tl.reshape((words[:, :, None] >> sixteen[None, None, :]) & 65535, (32 * COUNTERS,)).to(tl.int32)
        bits = (exact.to(tl.int32, bitcast=True) + noise) >> 16
        tl.store(values + places, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    elif values.dtype.element_ty == tl.bfloat16:
        # To nearest, ties to even; by hand, since the interpreter would cut off.
        bits = exact.to(tl.int32, bitcast=True)
        bits = (bits + 32767 + ((bits >> 16) & 1)) >> 16
        bits = tl.where(exact == exact, bits, 32704)
        tl.store(values + places, bits.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(values + places, exact, mask=inside)
