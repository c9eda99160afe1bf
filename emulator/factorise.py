"""Low-rank factors in place of the stand-in's matrices, chosen by what the matrices really get to see."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .architecture import Linear, describe
from .assemble import inner_linears, own_name, rebuilt
from .layout import Layout
from .streams import Batch, run, tokens, watched

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DAMPING = 1e-4
"""Share of the mean variance of a layer's inputs that is added to all, so that directions never seen count a little."""


def rank_of(linear: Linear, share: float) -> int:
    """The rank at which two factors have `share` of the matrix's parameters; 1 at least."""
    rows, columns = linear.out_features, linear.in_features
    return max(1, int(share * rows * columns / (rows + columns)))


def factorised(
    emulator: PreTrainedModel, layout: Layout, share: float, batches: Sequence[Batch]
) -> tuple[PreTrainedModel, Layout]:
    """The emulator with every linear layer of its stand-in as two factors, and the layout that says so.

    For inputs x with E[x xᵀ] = S Sᵀ, U Σ Vᵀ = svd(W S) cut at rank r gives the W' of that rank with the least
    E‖(W − W')x‖² (Eckart and Young 1936; as in SVD-LLM, Wang et al. 2024): W' = (U √Σ)(√Σ Vᵀ S⁻¹).

    Args:
        share: of the layers' parameters, how much is left.
        batches: public text; its inputs are those of the emulator's own layers.
    """
    ranks: dict[str, int] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    path = describe(emulator).blocks_path
    linears = inner_linears(emulator, layout)
    for number in layout.inner:
        inside = tuple(one for one in linears if one.path.startswith(f"{path}.{number}."))
        if not inside:  # the same block once more
            continue
        for linear, seen in zip(inside, _second_moments(emulator, inside, batches), strict=True):
            module: Any = emulator.get_submodule(linear.path)
            rank = rank_of(linear, share)
            up, down = factors(module.weight.T if linear.transposed else module.weight, seen, rank)
            ranks[own_name(linear.path, path, layout)] = rank
            dtype = module.weight.dtype
            # In the order in which a file has them: kernels for other orders round in another way.
            parts[linear.path] = {"up.weight": up.to(dtype).contiguous(), "down.weight": down.to(dtype).contiguous()}
            if linear.bias:
                parts[linear.path]["up.bias"] = module.bias.detach()
    layout = replace(layout, ranks=ranks)
    return rebuilt(emulator, layout, parts), layout


def factors(weight: torch.Tensor, second_moment: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """up [rows, rank] and down [rank, columns], float32, whose product is nearest to `weight` [rows, columns].

    Args:
        second_moment: E[x xᵀ], [columns, columns], of the inputs by which nearness is measured.
    """
    moment = second_moment.double()
    floor = DAMPING * moment.diagonal().mean().clamp_min(1e-12)
    root = torch.linalg.cholesky(moment + floor * torch.eye(len(moment), device=moment.device))
    left, values, right = torch.linalg.svd(weight.detach().double() @ root, full_matrices=False)
    scale = values[:rank].sqrt()
    down = torch.linalg.solve_triangular(root, scale.unsqueeze(1) * right[:rank], upper=False, left=False)
    return (left[:, :rank] * scale).float(), down.float()


@torch.no_grad()
def _second_moments(
    emulator: PreTrainedModel, linears: Sequence[Linear], batches: Sequence[Batch]
) -> list[torch.Tensor]:
    """E[x xᵀ] of each layer's inputs, float64[in, in]; 0 where a layer (an expert, for instance) was not asked."""
    sums = [
        torch.zeros(one.in_features, one.in_features, dtype=torch.float64, device=emulator.device) for one in linears
    ]
    counts = [0] * len(linears)
    with ExitStack() as stack:
        for index, linear in enumerate(linears):

            def see(inputs: torch.Tensor, _: Any, index: int = index) -> None:
                # In float32 a few large features would drown the small ones, and the sum were no second moment.
                flat = tokens(inputs, batch).double()
                sums[index] += flat.T @ flat
                counts[index] += len(flat)

            stack.enter_context(watched(emulator.get_submodule(linear.path), see))
        for batch in batches:
            run(emulator, batch)
    return [total / max(1, count) for total, count in zip(sums, counts, strict=True)]
