"""The coordinator's memory while it aggregates sealed replies, beside the size of one reply.

    python benchmarks/aggregation.py [--clients 100] [--megabytes 40] [--dtype float32] [--json]

One process plays the coordinator: it locks the tasks' body and addresses a task to each client, then opens their
replies one after another and adds them to the round. In place of Flower's grid there is a pipe; at its other end a
process of its own opens the tasks and makes, seals and signs the replies, so that what the makers take does not count.
What is reported is the peak of the coordinator's resident memory above its level when all tasks are out and no reply
has come. The running sum is part of the peak; the adapter, and the tasks' body, as the round has it and as it travels,
are part of the level.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from farfield.coordinator.aggregation.mean import WeightedMean
from farfield.coordinator.asking import Verdict
from farfield.coordinator.rounds import TrainingRound
from farfield.emulator import methods
from farfield.protocols.envelope import (
    Charter,
    Desk,
    Identity,
    Member,
    Opened,
    Signer,
    close_reply,
    open_task,
    sign_charter,
)
from farfield.protocols.messages import Reply, Train, Trained
from farfield.protocols.parcel import Parcel, release_freed_frames
from farfield.protocols.plan import parse
from farfield.protocols.tensors import ITEM_BYTES, DType, State, pack_state

PLAN = """
[model]
backbone = "none"
[tuning]
kind = "lora"
[training]
rounds = 1
steps = 1
[delivery]
dtype = "{dtype}"
"""
RUN = "aggregation"


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes and seconds: one reply, the coordinator with all tasks out, its peak, and both beside one reply."""

    clients: int
    reply: int
    level: int
    peak: int
    seconds: float

    @property
    def ratio(self) -> float:
        return (self.peak - self.level) / self.reply


@dataclass(frozen=True, slots=True)
class Size:
    """How many tensors a reply is made of, in which number format, and how large they are together."""

    megabytes: float
    tensors: int
    dtype: DType

    def adapter(self) -> State:
        values = int(self.megabytes * 1e6 / ITEM_BYTES[self.dtype] / self.tensors)
        return {f"layer.{number:03d}.weight": np.ones(values, np.float32) for number in range(self.tensors)}


def names(clients: int) -> list[str]:
    return [f"client-{number:03d}" for number in range(clients)]


def send(link: Connection, parcel: Parcel) -> None:
    link.send(len(parcel.frames))
    for part in (parcel.head, *parcel.frames):
        link.send_bytes(part)


def receive(link: Connection) -> Parcel:
    count: int = link.recv()
    head = link.recv_bytes()
    return Parcel(head, [link.recv_bytes() for _ in range(count)])


def answer(link: Connection, coordinator: bytes, clients: int, size: Size) -> None:
    """All clients: open every task, then seal a reply whenever one is asked for. Client n answers n everywhere."""
    own = Identity(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())
    link.send((own.member.signing.public_bytes_raw(), own.member.sealing))
    trusted = Ed25519PublicKey.from_public_bytes(coordinator)
    tasks = [
        emptied(open_task(receive(link), name, lambda _: trusted, own.sealing, time.time())) for name in names(clients)
    ]
    for number, opened in enumerate(tasks):
        link.recv()
        update = {name: np.full_like(array, number) for name, array in size.adapter().items()}
        outcome = Trained(pack_state(update, size.dtype), examples=1, targets=1, steps=1, loss=1.0)
        send(link, close_reply(Reply.to(opened.task, outcome), opened, own.signing))


def emptied(opened: Opened) -> Opened:
    """Without the adapter, of which this process would otherwise hold one copy for each client."""
    return replace(opened, task=replace(opened.task, work=Train({})))


def memory(field: str) -> int:
    """`VmRSS`, what this process has in memory now, or `VmHWM`, its peak; in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def aggregate(link: Connection, signer: Signer, clients: int, size: Size) -> Measured:
    release_freed_frames()
    plan = parse(PLAN.format(dtype=size.dtype), methods.registered(), None)
    member = Member.of(*link.recv())
    round_ = TrainingRound(
        plan, RUN, 1, adapter := size.adapter(), names(clients), WeightedMean(plan.aggregation), now=0.0
    )
    charter = sign_charter(Charter(RUN, plan.canonical(), "", 0, ""), signer)
    desk = Desk(charter, signer, round_.work, expires=time.time() + 3600, sealed=True)
    tasks = list(round_.tasks())
    for task in tasks:
        send(link, desk.address(task, member))

    def replies() -> Iterator[Parcel]:
        for _ in tasks:
            link.send(None)
            yield receive(link)

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted from here
    level, began, largest = memory("VmRSS"), time.monotonic(), 0
    for task, parcel in zip(tasks, replies(), strict=True):
        largest = max(largest, parcel.size)
        verdict = round_.receive(desk.open(parcel, task, member), now=0.0)
        assert verdict is Verdict.ACCEPTED, verdict
    peak, seconds = memory("VmHWM"), time.monotonic() - began
    result = round_.result()
    assert result is not None
    assert result.update.keys() == adapter.keys()
    for array in result.update.values():
        np.testing.assert_allclose(array, (clients - 1) / 2, rtol=1e-5)
    return Measured(clients, largest, level, peak, seconds)


def main(
    clients: Annotated[int, typer.Option(help="How many replies are aggregated.")] = 100,
    megabytes: Annotated[float, typer.Option(help="Size of each.")] = 40.0,
    tensors: Annotated[int, typer.Option(help="Tensors that it is made of.")] = 16,
    dtype: Annotated[str, typer.Option(help="Their number format, float32 or bfloat16.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    if dtype not in ITEM_BYTES:
        raise typer.BadParameter("float32 or bfloat16", param_hint="--dtype")
    size = Size(megabytes, tensors, dtype)
    ours, theirs = multiprocessing.Pipe()
    signer = Signer(Ed25519PrivateKey.generate())
    coordinator = signer.key.public_key().public_bytes_raw()
    maker = multiprocessing.get_context("spawn").Process(
        target=answer, args=(theirs, coordinator, clients, size), daemon=True
    )
    maker.start()
    theirs.close()
    done = aggregate(ours, signer, clients, size)
    maker.join()
    if as_json:
        print(json.dumps(asdict(done) | {"ratio": done.ratio}))
        return
    print(
        f"{done.clients} replies of {done.reply / 1e6:.1f} MB in {done.seconds:.0f} s: "
        f"{done.level / 1e6:.0f} MB before the first, {done.peak / 1e6:.0f} MB at the peak; "
        f"{(done.peak - done.level) / 1e6:.1f} MB more, {done.ratio:.2f} times one reply"
    )


if __name__ == "__main__":
    typer.run(main)
