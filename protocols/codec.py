"""Tasks and replies as bytes. The one place that knows `messages.proto`.

What is decoded came from outside and is believed only after it was checked: the size before anything is parsed, the
version before anything else is read, and every count, name, shape and length before it is used. Whatever is wrong is a
WireError; no input raises anything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

from . import messages_pb2 as pb
from .errors import MalformedMessage, MessageTooLarge, UnknownVersion
from .messages import Evaluate, Evaluated, Failed, Reply, Task, Train, Trained
from .tensors import DType, Tensor

WIRE_VERSION: Final = 1

_TO_PB: Final[dict[DType, pb.DType.ValueType]] = {"float32": pb.FLOAT32, "bfloat16": pb.BFLOAT16}
_FROM_PB: Final[dict[int, DType]] = {pb.FLOAT32: "float32", pb.BFLOAT16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a message may be. Protocol buffers end at 2 GiB; larger ones are refused."""

    message_bytes: int = 1 << 30
    tensors: int = 65_536
    dimensions: int = 8
    text_chars: int = 4_096


def encode_task(task: Task) -> bytes:
    message = pb.Task(version=WIRE_VERSION, run=task.run, round=task.round, node=task.node)
    message.plan_digest = bytes.fromhex(task.plan_digest)
    match task.work:
        case Train(adapter):
            message.train.adapter.extend(_tensors(adapter))
            message.train.SetInParent()
        case Evaluate(adapter):
            message.evaluate.adapter.extend(_tensors(adapter))
            message.evaluate.SetInParent()
    return message.SerializeToString(deterministic=True)


def encode_reply(reply: Reply) -> bytes:
    message = pb.Reply(version=WIRE_VERSION, run=reply.run, round=reply.round, node=reply.node)
    message.plan_digest = bytes.fromhex(reply.plan_digest)
    match reply.outcome:
        case Trained(update, examples, targets, steps, loss):
            message.trained.CopyFrom(pb.Trained(examples=examples, targets=targets, steps=steps, loss=loss))
            message.trained.update.extend(_tensors(update))
        case Evaluated(examples, targets, loss, correct):
            message.evaluated.CopyFrom(pb.Evaluated(examples=examples, targets=targets, loss=loss, correct=correct))
        case Failed(reason):
            message.failed.CopyFrom(pb.Failed(reason=reason))
    return message.SerializeToString(deterministic=True)


def decode_task(raw: bytes, limits: Limits = Limits()) -> Task:
    """The task that `raw` encodes.

    Raises:
        MessageTooLarge: more bytes, tensors, dimensions or characters than `limits` allow.
        UnknownVersion: the sender speaks another version.
        MalformedMessage: anything else that is wrong.
    """
    message = _parsed(pb.Task(), raw, limits)
    work: Train | Evaluate
    match message.WhichOneof("work"):
        case "train":
            work = Train(_state(message.train.adapter, limits))
        case "evaluate":
            work = Evaluate(_state(message.evaluate.adapter, limits))
        case _:
            raise MalformedMessage("a task without work")
    return Task(*_address(message, limits), work)


def decode_reply(raw: bytes, limits: Limits = Limits()) -> Reply:
    """The reply that `raw` encodes. Raises as `decode_task` does."""
    message = _parsed(pb.Reply(), raw, limits)
    outcome: Trained | Evaluated | Failed
    match message.WhichOneof("outcome"):
        case "trained":
            trained = message.trained
            update = _state(trained.update, limits)
            outcome = Trained(update, trained.examples, trained.targets, trained.steps, _finite(trained.loss))
        case "evaluated":
            measured = message.evaluated
            outcome = Evaluated(measured.examples, measured.targets, _finite(measured.loss), measured.correct)
        case "failed":
            outcome = Failed(_text(message.failed.reason, limits))
        case _:
            raise MalformedMessage("a reply without outcome")
    return Reply(*_address(message, limits), outcome)


def _tensors(state: Mapping[str, Tensor]) -> Iterable[pb.Tensor]:
    for name, tensor in sorted(state.items()):
        yield pb.Tensor(name=name, dtype=_TO_PB[tensor.dtype], shape=tensor.shape, data=tensor.data)


def _parsed(message: Any, raw: bytes, limits: Limits) -> Any:
    if len(raw) > limits.message_bytes:
        raise MessageTooLarge(f"a message of {len(raw)} bytes", hint=f"The limit is {limits.message_bytes}.")
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        raise MalformedMessage(f"not a {message.DESCRIPTOR.name} message: {error}") from None
    if message.version != WIRE_VERSION:
        older = "this program" if message.version > WIRE_VERSION else "the sender"
        raise UnknownVersion(
            f"wire version {message.version}, expected {WIRE_VERSION}", hint=f"Update Farfield on the side of {older}."
        )
    _no_unknown_fields(message)
    return message


def _no_unknown_fields(message: Any) -> None:
    if len(UnknownFieldSet(message)):
        raise MalformedMessage(f"unknown fields in {message.DESCRIPTOR.name}")
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else (value,):
                _no_unknown_fields(part)


def _address(message: Any, limits: Limits) -> tuple[str, int, str, str]:
    if len(message.plan_digest) != 32:
        raise MalformedMessage(f"a plan digest of {len(message.plan_digest)} bytes", hint="SHA-256 has 32.")
    run, node = _text(message.run, limits), _text(message.node, limits)
    return run, message.round, node, message.plan_digest.hex()


def _state(parts: Any, limits: Limits) -> dict[str, Tensor]:
    if len(parts) > limits.tensors:
        raise MessageTooLarge(f"{len(parts)} tensors", hint=f"The limit is {limits.tensors}.")
    state: dict[str, Tensor] = {}
    for part in parts:
        name, shape = _text(part.name, limits), tuple(part.shape)
        if name in state:
            raise MalformedMessage("two tensors of one name", where=name)
        if part.dtype not in _FROM_PB:
            raise MalformedMessage(f"unknown number format {part.dtype}", where=name)
        if len(shape) > limits.dimensions:
            raise MessageTooLarge(f"{len(shape)} dimensions", where=name, hint=f"The limit is {limits.dimensions}.")
        state[name] = Tensor(_FROM_PB[part.dtype], shape, part.data)
        if any(size > limits.message_bytes for size in shape):  # beside a 0 the product would not show it
            raise MessageTooLarge(f"shape {shape}", where=name, hint=f"The limit is {limits.message_bytes}.")
    return state


def _text(value: str, limits: Limits) -> str:
    if len(value) > limits.text_chars:
        raise MessageTooLarge(f"a text of {len(value)} characters", hint=f"The limit is {limits.text_chars}.")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise MalformedMessage(f"a loss of {value}")
    return value
