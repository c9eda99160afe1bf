"""Train `builtin:tiny-llama-py`, the backbone that Farfield carries, on a part of Python's standard library.

    python examples/pretrain_backbone.py train --steps 1500     # resumes where it stopped
    python examples/pretrain_backbone.py measure                # bits per byte against xz and gzip; the model's card

The data is the code of every standard-library unit that no client holds (`farfield.emulator.stdlib`), without
docstrings and comments. The learning rate is constant until the last fifth of the steps and then falls linearly to
zero, so `--steps` may be raised or lowered while a run is under way. Matrices are trained with Muon, embeddings and
norms with AdamW. Everything is kept under `--work` until `measure` writes the finished model.
"""

from __future__ import annotations

import gzip
import lzma
import math
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from farfield.emulator import stdlib
from farfield.emulator.backbone import silent_transformers

VOCABULARY = 3072
CONTEXT = 512
BATCH = 16
SEED = 20
DECAY = 0.2
END = "<|endoftext|>"
TARGET = Path(__file__).parent.parent / "emulator" / "builtin" / "tiny-llama-py"

app = typer.Typer(add_completion=False, help=__doc__)
Work = Annotated[Path, typer.Option(help="Folder of tokens and checkpoints.")]


def configuration() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=320,
        num_hidden_layers=12,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def held_out() -> list[stdlib.Source]:
    """The sources that are the clients', their text reduced to code."""
    return [replace(source, text=stdlib.code(source.text)) for source in stdlib.sources(of_clients=True)]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One stream of token ids: every text preceded by the end-of-text token."""
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    return torch.from_numpy(np.concatenate([np.array([0, *one.ids], dtype=np.int64) for one in encoded]))


def prepared(work: Path) -> tuple[PreTrainedTokenizerFast, torch.Tensor]:
    """Tokenizer and training stream, made once and kept in `work`."""
    stream = work / "tokens.safetensors"
    if stream.exists():
        return PreTrainedTokenizerFast.from_pretrained(work / "tokenizer"), load_file(stream)["tokens"].long()
    texts = list(stdlib.backbone_texts())
    tokenizer = train_tokenizer(texts)
    tokens = encode(tokenizer, texts)
    tokenizer.save_pretrained(work / "tokenizer")
    save_file({"tokens": tokens.short()}, stream)
    print(f"{len(texts)} files, {sum(map(len, texts)):,} characters, {len(tokens):,} tokens")
    return tokenizer, tokens


def batch(tokens: torch.Tensor, step: int) -> torch.Tensor:
    """int64[BATCH, CONTEXT]: windows at places that depend on nothing but `SEED` and `step`."""
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    starts = torch.randint(len(tokens) - CONTEXT, (BATCH,), generator=generator)
    return torch.stack([tokens[start : start + CONTEXT] for start in starts.tolist()])


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: 50 steps up, then level, then down to zero."""
    return min((step + 1) / 50, 1.0, (steps - step) / (DECAY * steps))


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=6e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def checkpoint(path: Path, model: LlamaForCausalLM, chosen: list[torch.optim.Optimizer], step: int) -> None:
    state = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for number, optimizer in enumerate(chosen):
        for index, values in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{number}.{index}.{key}": torch.as_tensor(value) for key, value in values.items()}
    partial = path.with_suffix(".partial")
    save_file(state, partial, metadata={"step": str(step)})
    partial.replace(path)


def restore(path: Path, model: LlamaForCausalLM, chosen: list[torch.optim.Optimizer]) -> int:
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    state = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[f"model.{name}"])
    for number, optimizer in enumerate(chosen):
        whole = optimizer.state_dict()
        for key, value in state.items():
            owner, _, rest = key.partition(".")
            if owner == "optimizer" and rest.startswith(f"{number}."):
                _, index, name = rest.split(".")
                whole["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(whole)
    return step


@app.command()
def train(
    steps: Annotated[int, typer.Option(help=f"Optimiser steps of {BATCH} x {CONTEXT} tokens.")] = 1500,
    work: Work = Path("runs/pretrain"),
) -> None:
    """Train, or go on training; Ctrl-C keeps the last checkpoint (one every 50 steps)."""
    work.mkdir(parents=True, exist_ok=True)
    _, tokens = prepared(work)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(configuration())
    chosen = optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in chosen]
    path = work / "checkpoint.safetensors"
    first = restore(path, model, chosen) if path.exists() else 0
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(tokens):,} tokens in the stream, {steps * BATCH * CONTEXT:,} to train on")
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    smooth = math.nan
    with Progress(*columns) as progress, (work / "loss.tsv").open("a") as log:
        task = progress.add_task("training", total=steps, completed=first)
        for step in range(first, steps):
            began = time.monotonic()
            for optimizer, peak in zip(chosen, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * rate(step, steps)
            window = batch(tokens, step)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                logits = model(input_ids=window, use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), window[:, 1:].flatten())
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in chosen:
                optimizer.step()
                optimizer.zero_grad()
            smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
            log.write(f"{step}\t{loss.item():.4f}\t{time.monotonic() - began:.2f}\n")
            log.flush()
            progress.update(task, advance=1, description=f"loss {smooth:.3f}")
            if (step + 1) % 50 == 0 or step + 1 == steps:
                checkpoint(path, model, chosen, step + 1)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokens: torch.Tensor, size: int) -> float:
    """Bits that code the stream over its size in bytes; every token sees at least CONTEXT / 2 tokens before it.

    Windows of CONTEXT + 1 tokens begin every CONTEXT / 2; of each, the second half is scored, and of the first one all.
    """
    half = CONTEXT // 2
    starts = range(0, len(tokens) - CONTEXT - 1, half)
    tail = tokens[starts[-1] + half :][None]
    nats = 0.0
    for first in track(range(0, len(starts), BATCH), "measuring", transient=True):
        windows = torch.stack([tokens[start : start + CONTEXT + 1] for start in starts[first : first + BATCH]])
        nats += _nats(model, windows, half)
        if first == 0:
            nats += _nats(model, windows[:1, : half + 1], half)
    nats += _nats(model, tail, tail.shape[1] - half - 1)
    return nats / math.log(2) / size


def _nats(model: LlamaForCausalLM, windows: torch.Tensor, scored: int) -> float:
    """Summed negative log-likelihood of the last `scored` tokens of int64[batch, length] windows."""
    logits = model(input_ids=windows[:, :-1], use_cache=False, logits_to_keep=scored).logits
    targets = windows[:, -scored:]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))


@app.command()
def measure(work: Work = Path("runs/pretrain"), target: Path = TARGET) -> None:
    """Round the model to bf16, measure it on the clients' code, and write model, tokenizer and card to `target`."""
    tokenizer, _ = prepared(work)
    model = LlamaForCausalLM(configuration())
    chosen = optimizers(model)
    step = restore(work / "checkpoint.safetensors", model, chosen)
    model.bfloat16().eval()  # type: ignore[no-untyped-call]
    rows = []
    unseen = held_out()
    for label, chosen_files in (
        ("all held-out files", unseen),
        ("without their tests", [source for source in unseen if not source.is_test]),
    ):
        texts = [source.text for source in chosen_files]
        raw = "".join(texts).encode()
        bits = bits_per_byte(model, encode(tokenizer, texts), len(raw))
        packed = (8 * len(lzma.compress(raw, preset=9)) / len(raw), 8 * len(gzip.compress(raw, 9)) / len(raw))
        rows.append(f"| {label} | {len(texts)} | {len(raw):,} | **{bits:.3f}** | {packed[0]:.3f} | {packed[1]:.3f} |")
        print(rows[-1], flush=True)
    target.mkdir(parents=True, exist_ok=True)
    with silent_transformers():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    (target / "README.md").write_text(card(model, step, rows), encoding="utf-8")


def card(model: LlamaForCausalLM, step: int, rows: list[str]) -> str:
    units = ", ".join(stdlib.CLIENT_UNITS)
    size = sum(p.numel() for p in model.parameters())
    table = "\n".join(rows)
    return f"""# builtin:tiny-llama-py

The backbone that Farfield carries so that everything runs without a download: a Llama with 12 blocks,
{size:,} parameters in bf16, and a byte-level BPE tokenizer of {VOCABULARY} tokens of its own.

**Trained on** the code of the standard library of CPython {platform.python_version()}, without docstrings and comments,
for {step:,} steps of {BATCH} x {CONTEXT} tokens ({step * BATCH * CONTEXT:,} tokens) by `examples/pretrain_backbone.py`.
The standard library is distributed under the PSF licence.

**Held out**, with the test files that belong to them, are the units that the clients of a demonstration hold:
{units}.
What those clients hold is the prose of these units, their docstrings and comments, a kind of text that this model was
never shown.

## How good it is

Bits per byte of the held-out code (fewer are better), beside general compressors that saw all of those files as one
archive. The model sees at most {CONTEXT} tokens at a time and does not learn while it is measured.

| held-out code | files | bytes | this model | `xz -9` | `gzip -9` |
|---|---|---|---|---|---|
{table}

It writes plausible Python for a few lines and knows nothing else. It is meant for demonstrations and tests.
"""


if __name__ == "__main__":
    app()
