"""NF4: weights in 4 bits, at the quantiles of a normal distribution (Dettmers et al. 2023, section 3 and appendix E).

A weight matrix is cut into blocks of 64 values in the order of its rows. Each block is divided by its largest
magnitude, which is kept in bfloat16, and every value becomes the index of the nearest of the sixteen levels: 4.25 bits
a value. The arithmetic is done by `bitsandbytes`; `reference_*` is the same in plain torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

import torch

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

BLOCK: Final = 64

CHUNK: Final = 1 << 21
"""How many values are unpacked at a time to be multiplied, at most: 4 MB in bfloat16."""

LEVELS: Final = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Appendix E of the paper."""


def sizes(rows: int, columns: int) -> tuple[int, int]:
    """How many bytes of indices, and how many scales, a matrix takes."""
    values = rows * columns
    return -(-values // 2), -(-values // BLOCK)


def reference_quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize`."""
    flat = weight.detach().float().reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(dim=1)
    levels = torch.tensor(LEVELS, device=weight.device)
    # The largest magnitude decides the index, as it was before it is rounded.
    scaled = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    indices = (scaled.unsqueeze(-1) - levels).abs().argmin(dim=-1).reshape(-1)[: len(flat)]
    pairs = torch.nn.functional.pad(indices, (0, len(flat) % 2), value=LEVELS.index(0.0)).view(-1, 2).to(torch.uint8)
    return pairs[:, 0] << 4 | pairs[:, 1], scales.bfloat16()


def reference_dequantize(
    packed: torch.Tensor, scales: torch.Tensor, rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """As `dequantize`."""
    levels = torch.tensor(LEVELS, device=packed.device)
    indices = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[: rows * columns]
    values = levels[indices.long()] * scales.float().repeat_interleave(BLOCK)[: rows * columns]
    return values.view(rows, columns).to(dtype)


def reference_linear(
    inputs: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """As `linear`, with the whole matrix, which autograd keeps."""
    return torch.nn.functional.linear(inputs, reference_dequantize(packed, scales, rows, columns, inputs.dtype), bias)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices, two in a byte, uint8[ceil(n / 2)], and the scales, bfloat16[ceil(n / 64)], of the n values."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight.detach().float().contiguous(), blocksize=BLOCK, quant_type="nf4")
    return packed.reshape(-1), state.absmax.bfloat16()


def dequantize(packed: torch.Tensor, scales: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [rows, columns] that the indices and scales stand for, in `dtype`."""
    from bitsandbytes import functional

    # One block a row. With rows of another length the kernel for CPUs takes the scale of the first block that a row
    # has a part in for all of the row (bitsandbytes 0.50), and where they are odd it compiles itself for each shape.
    blocks = len(scales)
    whole = torch.nn.functional.pad(packed, (0, blocks * BLOCK // 2 - len(packed)))
    values: torch.Tensor = functional.dequantize_4bit(whole.view(-1, 1), _state(scales, (blocks, BLOCK), dtype))
    return values.view(-1)[: rows * columns].view(rows, columns)


def linear(
    inputs: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    rows: int,
    columns: int,
) -> torch.Tensor:
    """`inputs` [..., columns] times the transposed matrix [rows, columns], in the dtype of the inputs.

    The gradient goes to the inputs only. Nothing but the 4 bits is kept for it: the matrix is made again in backward.

    On a CPU a few rows of the matrix are made, used and given up at a time. All of a large one would be memory that the
    system hands out anew in each call, which takes longer than what is to be done with it. Backward makes all of it:
    there the parts would be sums, each rounded.
    """
    product = cast("torch.Tensor", _Linear.apply(inputs, packed, scales, rows, columns))  # type: ignore[no-untyped-call]
    return product if bias is None else product + bias


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, rows: int, columns: int
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.shape = rows, columns
        # So many rows always begin with a block, and with a byte.
        together = max(BLOCK, CHUNK // columns // BLOCK * BLOCK)
        if inputs.device.type != "cpu" or together >= rows:
            return inputs @ dequantize(packed, scales, rows, columns, inputs.dtype).T
        flat = inputs.reshape(-1, columns)
        product = flat.new_empty(len(flat), rows)
        for begin in range(0, rows, together):
            end = min(begin + together, rows)
            indices = packed[begin * columns // 2 : -(-end * columns // 2)]
            their_scales = scales[begin * columns // BLOCK : -(-end * columns // BLOCK)]
            part = dequantize(indices, their_scales, end - begin, columns, inputs.dtype)
            torch.mm(flat, part.T, out=product[:, begin:end])
        return product.view(*inputs.shape[:-1], rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        packed, scales = ctx.saved_tensors
        rows, columns = ctx.shape
        return gradient @ dequantize(packed, scales, rows, columns, gradient.dtype), None, None, None, None


def _state(scales: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> QuantState:
    from bitsandbytes import functional

    levels = torch.tensor(LEVELS, device=scales.device)
    return functional.QuantState(  # type: ignore[no-untyped-call]
        absmax=scales.float(),
        shape=torch.Size(shape),
        code=levels,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
