"""Seconds for a step of DP-SGD on LoRA, ours beside those of Opacus, as multiples of a step without privacy.

    OMP_NUM_THREADS=1 python benchmarks/dp_sgd.py [--rounds 15] [--steps 3] [--json FILE]

One small Llama with random weights (6 layers, 256 wide) and LoRA of rank 8 on all linear layers; each step sees 8 texts
of 128 tokens, clips, adds noise and ends with AdamW. Plain and ours are the product's own training loops, ours with a
sampling rate of 1 so that every batch is of the same size. Opacus trains the same model in its modes `hooks`,
`functorch` and `ghost`, and in `hooks` with our sampler for linear layers in place of its own.

All take turns: in every round each makes `--steps` steps, and what is compared is the ratio to the plain steps of that
round, so that a machine that others use too slows all alike. Medians over the rounds; the first is not counted.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
import warnings
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import transformers
import typer
from opacus.grad_sample import (
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
    register_grad_sampler,
)
from opacus.grad_sample.linear import compute_linear_grad_sample
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

from farfield.edge_client import per_example, private
from farfield.edge_client.data import Example, TokenExample
from farfield.edge_client.train import train
from farfield.emulator.methods import Setting, Tuned, registered
from farfield.protocols.privacy.mechanism import ExampleMechanism
from farfield.protocols.randomness import Randomness
from farfield.protocols.sections import Training

BATCH, LENGTH, VOCABULARY, RANK = 8, 128, 2048, 8
NOISE, NORM, RATE, WANTED = 1.0, 1.0, 1e-3, 1.15
PLAIN, OURS = "plain", "Farfield"


def model(dtype: torch.dtype) -> Tuned:
    torch.manual_seed(0)
    hf: Any = transformers  # its constructors take more than their types say
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        attn_implementation="eager",
    )
    lora = registered()["lora"].model_validate({"kind": "lora", "rank": RANK})
    tuned = lora.install(hf.LlamaForCausalLM(config).to(dtype), Setting("causal-lm", 0, None))
    tuned.model.train()
    return tuned


def texts() -> list[Example]:
    generator = torch.Generator().manual_seed(1)
    drawn = [
        array("i", torch.randint(VOCABULARY, (LENGTH,), generator=generator, dtype=torch.int32).tolist())
        for _ in range(BATCH)
    ]
    return [TokenExample(ids, ids) for ids in drawn]


def losses(network: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The mean loss of each text."""
    logits = network(input_ids=ids).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def plain(dtype: torch.dtype) -> Callable[[int], None]:
    tuned, examples = model(dtype), texts()
    start = {name: p.detach().float().numpy().copy() for name, p in tuned.trainable().items()}

    def run(steps: int) -> None:
        train(tuned, start, examples, settings(steps), pad_id=0, seed=0, steps=steps, first_step=0, horizon=steps)

    return run


def ours(dtype: torch.dtype) -> Callable[[int], None]:
    tuned, examples = model(dtype), texts()
    start = {name: p.detach().float().numpy().copy() for name, p in tuned.trainable().items()}

    def run(steps: int) -> None:
        mechanism = ExampleMechanism(NOISE, NORM, 1.0, steps)
        plan = settings(steps)
        private.train(
            tuned, start, examples, plan, mechanism, Randomness(), pad_id=0, seed=0, first_step=0, horizon=steps
        )

    return run


def opacus(dtype: torch.dtype, sampler: Callable[..., Any], **mode: Any) -> Callable[[int], None]:
    """Opacus with the gradients of all examples in memory."""
    tuned = model(dtype)
    network = GradSampleModule(tuned.model, loss_reduction="sum", **mode)
    adamw = torch.optim.AdamW(tuned.trainable().values(), lr=RATE, weight_decay=0.0)
    optimizer = DPOptimizer(adamw, noise_multiplier=NOISE, max_grad_norm=NORM, expected_batch_size=BATCH)
    ids = torch.tensor([list(example.input_ids) for example in texts()])

    def run(steps: int) -> None:
        with sampling(sampler):
            for _ in range(steps):
                losses(network, ids).sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return run


def ghost(dtype: torch.dtype) -> Callable[[int], None]:
    """Opacus with norms first, and a second pass for the gradient."""
    tuned = model(dtype)
    network = GradSampleModuleFastGradientClipping(tuned.model, loss_reduction="sum", max_grad_norm=NORM)
    adamw = torch.optim.AdamW(tuned.trainable().values(), lr=RATE, weight_decay=0.0)
    optimizer = DPOptimizerFastGradientClipping(
        adamw, noise_multiplier=NOISE, max_grad_norm=NORM, expected_batch_size=BATCH
    )
    ids = torch.tensor([list(example.input_ids) for example in texts()])

    def run(steps: int) -> None:
        with sampling(compute_linear_grad_sample):
            for _ in range(steps):
                DPTensorFastGradientClipping(network, optimizer, losses(network, ids), "sum").backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return run


@contextmanager
def sampling(sampler: Callable[..., Any]) -> Iterator[None]:
    """Within it, `sampler` is what Opacus has for linear layers."""
    register_grad_sampler(torch.nn.Linear)(sampler)
    try:
        yield
    finally:
        register_grad_sampler(torch.nn.Linear)(per_example.linear)


def settings(steps: int) -> Training:
    return Training(rounds=1, steps=steps, batch_size=BATCH, learning_rate=RATE)


def measure(dtype: torch.dtype, rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a step in each round that counts."""
    runs = {
        PLAIN: plain(dtype),
        OURS: ours(dtype),
        "Opacus, hooks": opacus(dtype, compute_linear_grad_sample),
        "Opacus, hooks with our sampler": opacus(dtype, per_example.linear),
        "Opacus, functorch": opacus(dtype, compute_linear_grad_sample, force_functorch=True),
        "Opacus, ghost": ghost(dtype),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for counted in range(-1, rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run(steps)
            if counted >= 0:
                seconds[name].append((time.perf_counter() - began) / steps)
    return seconds


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 15,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each in a round.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
) -> None:
    # Opacus' hooks fire where nothing before a layer is trained, of which torch warns.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    logging.getLogger("opacus").setLevel(logging.ERROR)
    machine = (
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, "
        f"torch {version('torch')}, opacus {version('opacus')}; load {os.getloadavg()[0]:.1f} at the beginning"
    )
    print(f"{machine}; {BATCH} texts of {LENGTH} tokens, LoRA of rank {RANK}, {rounds} rounds of {steps} steps\n")
    print("| dtype | training | seconds a step, median | × plain, median | least to most |\n|---|---|---|---|---|")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        found, name = measure(dtype, rounds, steps), str(dtype).removeprefix("torch.")
        figures[name] = {}
        for kind, seconds in found.items():
            ratios = [one / other for one, other in zip(seconds, found[PLAIN], strict=True)]
            figures[name][kind] = {"seconds": median(seconds), "ratio": median(ratios)}
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
            print(f"| {name} | {kind} | {median(seconds):.3f} | {median(ratios):.2f} | {spread} |")
    worst = max(kinds[OURS]["ratio"] for kinds in figures.values())
    verdict = "PASS" if worst <= WANTED else "SHORT"
    print(f"\n{verdict}: {worst:.2f} times a plain step; {WANTED:g} times or less is wanted")
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
