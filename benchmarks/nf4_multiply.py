"""Inputs times a matrix in NF4: our layer beside `bitsandbytes`' own `Linear4bit`, and beside plain bfloat16.

    python benchmarks/nf4_multiply.py [--threads 1] [--json]

All get the same values in bfloat16, for one, 32 and 512 tokens and matrices of 1024 x 1024 and 4096 x 4096, in turn, in
one process. "forward" is what a layer does where nothing is trained; of the library it is the layer in training mode,
which unpacks the matrix and multiplies, and "evaluating" the layer in evaluation mode, which on processors with
AVX512-BF16 packs the matrix anew and multiplies it as it is. "and backward" adds the gradient of the inputs. "whole" is
ours with the matrix unpacked at once. Milliseconds are of processor time, the best of several turns; MB is what the
process took more at its peak, as Linux counts it. Differences are from "whole"; the library keeps scales in float32.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final
from unittest import mock

import torch
import typer

from farfield.emulator import offline as offline  # before bitsandbytes asks the hub for kernels
from farfield.kernels import nf4

SIZES: Final = (1024, 4096)
TOKENS: Final = (1, 32, 512)
TIMES: Final = 15

Work = Callable[[], Any]


def library(weight: torch.Tensor) -> Any:
    """A `Linear4bit` that holds `weight`."""
    import bitsandbytes

    theirs: Any = bitsandbytes.nn
    size = len(weight)
    settings: Any = {"quant_type": "nf4", "compress_statistics": False}
    layer: Any = theirs.Linear4bit(size, size, bias=False, compute_dtype=torch.bfloat16, **settings)
    layer.weight = theirs.Params4bit(weight.clone(), requires_grad=False, **settings)
    return layer.to("cpu")


def ways(weight: torch.Tensor, inputs: torch.Tensor) -> dict[str, Work]:
    """Each of them gives the product; those "and backward" the gradient of the inputs."""
    size = len(weight)
    packed, scales = nf4.quantize(weight)
    plain, leaf, gradient = weight.bfloat16(), inputs.clone().requires_grad_(), torch.ones_like(inputs)
    training, evaluating = library(weight).train(), library(weight).eval()

    def ours(inputs: torch.Tensor) -> torch.Tensor:
        return nf4.linear(inputs, packed, scales, None, size, size)

    def whole(inputs: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(nf4, "CHUNK", weight.numel()):
            return ours(inputs)

    def there_and_back(layer: Callable[[torch.Tensor], torch.Tensor]) -> Work:
        return lambda: torch.autograd.grad(layer(leaf), leaf, gradient)[0]

    def without(layer: Callable[[torch.Tensor], torch.Tensor]) -> Work:
        def work() -> torch.Tensor:
            with torch.no_grad():
                return layer(inputs)

        return work

    return {
        "bfloat16": without(lambda inputs: inputs @ plain.T),
        "whole": without(whole),
        "ours": without(ours),
        "library": without(training),
        "library, evaluating": without(evaluating),
        "ours, and backward": there_and_back(ours),
        "library, and backward": there_and_back(training),
    }


def timed(made: dict[str, Work]) -> dict[str, float]:
    """Milliseconds of each, the best of several turns."""
    best = dict.fromkeys(made, float("inf"))
    for _ in range(TIMES):
        for name, work in made.items():
            began = time.process_time()
            work()
            best[name] = min(best[name], 1e3 * (time.process_time() - began))
    return best


def more(work: Work) -> float:
    """MB more at the peak."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak
    work()
    return (_status("VmHWM") - before) / 1e6


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def main(
    threads: Annotated[int, typer.Option(min=1)] = 1, as_json: Annotated[bool, typer.Option("--json")] = False
) -> None:
    """Measure and print."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found: list[dict[str, Any]] = []
    for size in SIZES:
        weight = 0.02 * torch.randn(size, size)
        for tokens in TOKENS:
            made = ways(weight, torch.randn(tokens, size).bfloat16())
            expected = made["whole"]()
            best = timed(made)
            for name, work in made.items():
                off = None if "backward" in name else float((work() - expected).float().norm() / expected.norm())
                found.append(
                    {"size": size, "tokens": tokens, "way": name, "ms": best[name], "mb": more(work), "off": off}
                )
    if as_json:
        print(json.dumps(found))
        return
    print("| size | tokens | way | ms | of the library's | MB | differs by |\n|---:|---:|---|---:|---:|---:|---:|")
    for one in found:
        other = "library, and backward" if "backward" in one["way"] else "library"
        base = next(
            row for row in found if (row["size"], row["tokens"], row["way"]) == (one["size"], one["tokens"], other)
        )
        apart = "" if one["off"] is None else f"{one['off']:.1e}"
        cells = [one["size"], one["tokens"], one["way"], f"{one['ms']:.2f}", f"{one['ms'] / base['ms']:.2f}"]
        print("|", " | ".join(map(str, [*cells, f"{one['mb']:.0f}", apart])), "|")


if __name__ == "__main__":
    typer.run(main)
