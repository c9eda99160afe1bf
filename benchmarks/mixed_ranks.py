"""Adapters of unequal ranks made one, and many adapters used at once: time and equality, beside what there is.

    python benchmarks/mixed_ranks.py [--width 4096] [--clients 10] [--rank 16] [--rows 2048] [--threads 1] [--json]

First the best adapter of rank r for a weighted sum of the clients' products B·A, of one layer, `width` × `width`: by
thin QR of the stacks (`kernels/stacked.py`, as FlexLoRA uses it), by the singular values of the whole matrix in numpy,
and by `add_weighted_adapter` of `peft` with `combination_type="svd"`. All get the same factors, of ranks r, r / 2 and
r / 4 in turn; what is compared is the product of the two factors that come out. Differences are in shares
of the reference, by the Frobenius norm.

Then `rows` rows through 16 adapters of rank 8, forward and backward: by the grouped product of `kernels/grouped.py`,
and by its reference, a loop over the adapters. Times are the best of several, of one by the whole matrix.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final

import numpy as np
import torch
import typer
from torch import nn

from farfield.kernels import dispatch, stacked
from farfield.kernels.dispatch import Implementation
from farfield.kernels.stacked import Matrix, Truncated

ADAPTERS: Final = 16
RANK: Final = 8
WIDTH: Final = 1024


@dataclass(frozen=True)
class Row:
    """One way to do it: seconds, and how far it is from the reference."""

    what: str
    seconds: float
    difference: float | None = None


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    best, result = float("inf"), None
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - began)
    return best, result


def factors(width: int, clients: int, rank: int) -> tuple[list[Matrix], list[Matrix], list[float]]:
    """float32 B and A of each client, as they are after training, and its share."""
    rng = np.random.default_rng(0)
    ranks = [max(1, rank >> number % 3) for number in range(clients)]
    b: list[Matrix] = [(rng.normal(size=(width, own)) / width**0.5).astype(np.float32) for own in ranks]
    a: list[Matrix] = [(rng.normal(size=(own, width)) / width**0.5).astype(np.float32) for own in ranks]
    shares = rng.uniform(1, 3, clients)
    return b, a, list(shares / shares.sum())


def product(found: Truncated) -> Matrix:
    return (found.left * found.values) @ found.right


def by_peft(b: list[Matrix], a: list[Matrix], shares: list[float], rank: int) -> tuple[float, Matrix]:
    """Seconds of `add_weighted_adapter`, and its B·A."""
    from peft import LoraConfig, get_peft_model

    width = len(b[0])
    names = [f"client{number}" for number in range(len(b))]
    plain: Any = nn.Sequential(nn.Linear(width, width, bias=False))
    configs = [LoraConfig(r=len(one), lora_alpha=len(one), target_modules=["0"]) for one in a]
    model: Any = get_peft_model(plain, configs[0], names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        for name, one_b, one_a in zip(names, b, a, strict=True):
            layer.lora_A[name].weight.copy_(torch.from_numpy(one_a))
            layer.lora_B[name].weight.copy_(torch.from_numpy(one_b))
        began = time.perf_counter()
        model.add_weighted_adapter(names, shares, "all", combination_type="svd", svd_rank=rank, svd_full_matrices=False)
        seconds = time.perf_counter() - began
        return seconds, np.asarray(layer.get_delta_weight("all").numpy())


def combining(width: int, clients: int, rank: int) -> list[Row]:
    b, a, shares = factors(width, clients, rank)
    whole, expected = timed(lambda: stacked.reference_truncated(b, a, shares, rank), 1)
    kernel = dispatch.choose("stacked.truncated", Implementation.FAST, "cpu")
    single, found = timed(lambda: kernel(b, a, shares, rank), 5)
    wide = [[one.astype(np.float64) for one in side] for side in (b, a)]
    double, exact = timed(lambda: kernel(*wide, shares, rank), 5)
    theirs, merged = by_peft(b, a, shares, rank)
    reference = product(expected)

    def off(other: Matrix) -> float:
        return float(np.linalg.norm(other - reference) / np.linalg.norm(reference))

    return [
        Row("singular values of the whole matrix, numpy", whole),
        Row("peft's add_weighted_adapter, svd", theirs, off(merged)),
        Row("thin QR of the stacks, float32", single, off(product(found))),
        Row("thin QR of the stacks, float64, as the rule does it", double, off(product(exact))),
    ]


def grouping(rows: int, dtype: torch.dtype) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    inputs, a, b, weights = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((rows, WIDTH), (ADAPTERS, RANK, WIDTH), (ADAPTERS, WIDTH, RANK), (rows, WIDTH))
    )
    counts = torch.full((ADAPTERS,), rows // ADAPTERS)
    counts[0] += rows - int(counts.sum())
    for one in (inputs, a, b):
        one.requires_grad_()

    def work(version: Implementation) -> Callable[[], tuple[torch.Tensor, ...]]:
        kernel = dispatch.choose("grouped.low_rank", version, "cpu")

        def forward_and_backward() -> tuple[torch.Tensor, ...]:
            outputs = kernel(inputs, a, b, counts)
            return (outputs.detach(), *torch.autograd.grad(outputs, (inputs, a, b), weights))

        return forward_and_backward

    loop, expected = timed(work(Implementation.REFERENCE), 10)
    grouped, found = timed(work(Implementation.FAST), 10)
    off = max(
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(found, expected, strict=True)
    )
    return [Row("a loop over the adapters", loop), Row("the grouped product", grouped, off)]


def main(
    width: Annotated[int, typer.Option(min=8)] = 4096,
    clients: Annotated[int, typer.Option(min=1)] = 10,
    rank: Annotated[int, typer.Option(min=4)] = 16,
    rows: Annotated[int, typer.Option(min=16)] = 2048,
    threads: Annotated[int, typer.Option(min=1, help="Of torch; those of numpy follow OMP_NUM_THREADS.")] = 1,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    torch.set_num_threads(threads)
    parts = {f"{clients} clients, {width} x {width}, to rank {rank}": combining(width, clients, rank)}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        parts[f"{rows} rows, {ADAPTERS} adapters of rank {RANK}, {WIDTH} x {WIDTH}, {name}"] = grouping(rows, dtype)
    if as_json:
        print(json.dumps({title: [asdict(row) for row in rows] for title, rows in parts.items()}))
        return
    for title, found in parts.items():
        print(title)
        for row in found:
            off = "" if row.difference is None else f"   differs by {row.difference:.1e}"
            print(f"  {row.what:<52} {row.seconds:9.4f} s   x {found[0].seconds / row.seconds:7.1f}{off}")


if __name__ == "__main__":
    typer.run(main)
