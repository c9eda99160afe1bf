"""The best low-rank part of a weighted sum of low-rank products, found without forming the sum.

    Σₖ pₖ·Bₖ·Aₖ  =  [B₁ … B_K] · [p₁A₁; …; p_K A_K]

The ranks rₖ may differ, and n is their sum. With thin QR of both stacks, Q·R and Q′·R′, the sum is Q·(R·R′ᵀ)·Q′ᵀ: its
singular values are those of a core of n × n, in O((d + k)·n²) instead of O(d·k·min(d, k)) for a d × k matrix. In numpy:
the process that aggregates need not have a torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Matrix: TypeAlias = NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Truncated:
    """The first q singular triples of a d × k matrix W; q is the rank that was asked for, or less where W has less.

    Attributes:
        left: U, [d, q], orthonormal columns.
        values: σ, [q], falling and above what rounding makes of zero.
        right: Vᵀ, [q, k], orthonormal rows.
        energy: ‖W‖²_F.
        lost: what of it the triples leave out.
    """

    left: Matrix
    values: Matrix
    right: Matrix
    energy: float
    lost: float


def reference_truncated(b: Sequence[Matrix], a: Sequence[Matrix], weights: Sequence[float], rank: int) -> Truncated:
    """As `truncated`, by the whole matrix."""
    whole = sum(weight * (left @ right) for weight, left, right in zip(weights, b, a, strict=True))
    left, values, right = np.linalg.svd(np.asarray(whole), full_matrices=False)
    return _first(left, values, right, rank, sum(one.shape[1] for one in b))


def truncated(b: Sequence[Matrix], a: Sequence[Matrix], weights: Sequence[float], rank: int) -> Truncated:
    """SVD_q(Σₖ pₖ·Bₖ·Aₖ), as FlexLoRA wants it (Bai et al. 2024), by the stacks of FLoRA (Wang et al. 2024).

    Args:
        b: Bₖ, [d, rₖ], one or more of any ranks, all of one dtype, which is computed in.
        a: Aₖ, [rₖ, k].
        weights: pₖ.
        rank: how many triples are wanted.
    """
    columns = np.concatenate(b, axis=1)
    rows = np.concatenate([weight * one for weight, one in zip(weights, a, strict=True)], axis=0)
    left, upper = np.linalg.qr(columns)
    right, lower = np.linalg.qr(rows.T)
    core_left, values, core_right = np.linalg.svd(upper @ lower.T, full_matrices=False)
    return _first(left @ core_left[:, :rank], values, core_right[:rank] @ right.T, rank, columns.shape[1])


def _first(left: Matrix, values: Matrix, right: Matrix, rank: int, most: int) -> Truncated:
    noise = values[:1] * np.finfo(values.dtype).eps * max(len(left), right.shape[1])
    squares = np.square(values.astype(np.float64))
    kept = min(rank, most, int((values > noise).sum()))
    return Truncated(left[:, :kept], values[:kept], right[:kept], float(squares.sum()), float(squares[kept:].sum()))
