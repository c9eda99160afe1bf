"""Seconds to make a model's weights from FedKSeed's scalars, and the bytes that the scalars take on the wire.

    OMP_NUM_THREADS=1 python benchmarks/replay.py [--steps 1000] [--repeats 3] [--json FILE]

Two models: the built-in backbone, and a Llama of 134 million parameters with random weights, both in bfloat16. Each is
given scalars of which `--steps` are not zero, as after so many steps along different directions, and is made anew from
them. Beside it, how many values of directions a second that is, and how many normal values a second `torch.randn` draws
in pieces of the same size, which is the least that a replay of stored seeds has to do with them. They take turns, and
the fastest of the repeats counts.

Bytes are those of a reply as a client sends it, sealed to its coordinator, with all K scalars changed.
"""

from __future__ import annotations

import json
import os
import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from farfield.coordinator import plans
from farfield.coordinator.simulation import identity
from farfield.emulator import backbone
from farfield.emulator.methods import Setting, Tuned, registered
from farfield.protocols.envelope import Charter, Desk, Signer, close_reply, open_task, sign_charter
from farfield.protocols.messages import Reply, Task, Train, Trained
from farfield.protocols.tensors import pack_state

PIECE = 2**18
PLAN = """
[model]
backbone = "builtin:tiny-llama-py"
[tuning]
kind = "fedkseed"
[training]
rounds = 1
steps = 1
optimizer = "sgd"
[protection]
kind = "sealed"
"""


def builtin() -> Any:
    plan = plans.parse(PLAN, where="benchmarks/replay.py")
    folder = backbone.resolve(plan.model.backbone, Path())
    return backbone.load_model(folder, task="causal-lm", dtype="bfloat16", labels=None, seed=0)


def llama() -> Any:
    """12 blocks, 768 wide; 134 million parameters, 85 million of them in the blocks."""
    hf: Any = transformers  # its constructors take more than their types say
    config = hf.LlamaConfig(
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).to(torch.bfloat16).requires_grad_(False).eval()


def settled(tuned: Tuned, seeds: int, repeat: int) -> float:
    """Seconds to make the weights from so many scalars, spread over the pool; other ones in each repeat."""
    (scalars,) = tuned.trainable().values()
    places = torch.linspace(0, len(scalars) - 1, seeds).long()
    with torch.no_grad():
        scalars.zero_()
        scalars[places] = 1e-4 * (repeat + 1)
    assert tuned.settled is not None
    began = time.perf_counter()
    tuned.settled()
    return time.perf_counter() - began


def drawn() -> float:
    """Normal values a second."""
    piece = torch.empty(PIECE)
    began = time.perf_counter()
    for _ in range(100):
        piece.normal_()
    return 100 * PIECE / (time.perf_counter() - began)


def reply_bytes(tuned: Tuned) -> int:
    """Of a sealed reply to a task that trained all scalars."""
    plan = plans.parse(PLAN, where="benchmarks/replay.py")
    state = {name: np.random.default_rng(0).normal(size=one.shape) for name, one in tuned.trainable().items()}
    tensors = pack_state({name: one.astype(np.float32) for name, one in state.items()}, plan.delivery.dtype)
    signer, client = Signer(Ed25519PrivateKey.generate()), identity(b"benchmark", "client")
    charter = sign_charter(Charter("benchmark", plan.canonical(), "", 0, ""), signer)
    work = Train(tensors)
    task = Task("benchmark", 1, "client", plan.digest, work, 1)
    parcel = Desk(charter, signer, work, expires=1.0, sealed=True).address(task, client.member)
    opened = open_task(parcel, "client", lambda _: signer.key.public_key(), client.sealing, 0.0)
    return close_reply(Reply.to(task, Trained(tensors, 500, 10_000, 20, 4.0)), opened, client.signing).size


def main(
    steps: Annotated[int, typer.Option(min=1, max=4096, help="Scalars that are not zero.")] = 1000,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each is measured.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
) -> None:
    machine = (
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores, "
        f"torch {version('torch')}; load {os.getloadavg()[0]:.1f} at the beginning"
    )
    print(f"{machine}; {steps} steps of 4096 directions\n")
    print("| model | values in its blocks | replay, s | values a second | × torch.randn | reply, bytes |")
    print("|---|---|---|---|---|---|")
    figures: dict[str, dict[str, float]] = {}
    for name, make in {"builtin:tiny-llama-py": builtin, "Llama, 134 M": llama}.items():
        model = make()
        values = sum(p.numel() for block in model.model.layers for p in block.parameters())
        method = registered()["fedkseed"].model_validate({"kind": "fedkseed"})
        tuned = method.install(model, Setting("causal-lm", 0, None))
        measured = [(settled(tuned, steps, repeat), drawn()) for repeat in range(repeats)]
        seconds, normal = min(one for one, _ in measured), max(rate for _, rate in measured)
        rate, size = values * steps / seconds, reply_bytes(tuned)
        figures[name] = {"seconds": seconds, "values": rate, "normals": normal, "reply": size}
        print(f"| {name} | {values:,} | {seconds:.2f} | {rate:.3g} | {rate / normal:.1f} | {size:,} |")
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine, "figures": figures}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
