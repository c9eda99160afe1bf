"""Tasks and replies as parcels, and back.

What is decoded came from outside and is believed only after it was checked: the size before anything is parsed, the
version before anything else is read, and every count, name, shape and length before it is used. Whatever is wrong is a
WireError; no input raises anything else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from . import messages_pb2 as pb
from .errors import MalformedMessage, MessageTooLarge, UnknownVersion
from .messages import (
    Evaluate,
    Evaluated,
    Failed,
    Outcome,
    Refused,
    Reply,
    Secure,
    Secured,
    Task,
    Train,
    Trained,
    Work,
)
from .parcel import Body, Buffer, Parcel, cut, join
from .tensors import ITEM_BYTES, DType, Tensor

WIRE_VERSION: Final = 1

M = TypeVar("M", bound=Message)

_TO_PB: Final[dict[DType, pb.DType.ValueType]] = {"float32": pb.FLOAT32, "bfloat16": pb.BFLOAT16}
_FROM_PB: Final[dict[int, DType]] = {pb.FLOAT32: "float32", pb.BFLOAT16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a message may be.

    A head has a limit of its own, because a parsed one takes up to thirty times its size in memory.
    """

    message_bytes: int = 1 << 30
    head_bytes: int = 1 << 20
    tensors: int = 65_536
    dimensions: int = 8
    text_chars: int = 4_096


LIMITS: Final = Limits()


def pack_body(work: Work) -> Body:
    """The body of every task that asks for `work`."""
    pieces: list[Buffer] = []
    if isinstance(work, Secure):
        pieces.append(work.common)
    inner = work.work if isinstance(work, Secure) else work
    return Body(tuple(cut([*pieces, *_values(inner.adapter)] if inner else pieces)))


def encode_task(task: Task, body: Body | None = None) -> Parcel:
    """The task as a parcel. `body` is `pack_body(task.work)`, for callers that send the same work to many nodes."""
    body = body or pack_body(task.work)
    message = pb.Task(version=WIRE_VERSION, run=task.run, round=task.round, node=task.node, cohort=task.cohort)
    message.plan_digest = bytes.fromhex(task.plan_digest)
    message.body_digest = body.digest
    match task.work:
        case Secure(step, session, common, own, subject, work):
            secure = pb.Secure(step=step, session=session, common_bytes=len(common), own=own, subject=subject)
            if work is not None:
                _describe(secure, work)
            message.secure.CopyFrom(secure)
        case work:
            _describe(message, work)
    return Parcel(message.SerializeToString(deterministic=True), list(body.frames))


def _describe(message: pb.Task | pb.Secure, work: Train | Evaluate) -> None:
    match work:
        case Train(adapter, clipping_norm):
            message.train.CopyFrom(pb.Train(adapter=_described(adapter), clipping_norm=clipping_norm))
        case Evaluate(adapter):
            message.evaluate.CopyFrom(pb.Evaluate(adapter=_described(adapter)))


def encode_reply(reply: Reply) -> tuple[bytes, Iterator[bytes]]:
    """The reply's head, and the frames of its body, made one by one."""
    message = pb.Reply(version=WIRE_VERSION, run=reply.run, round=reply.round, node=reply.node)
    message.plan_digest = bytes.fromhex(reply.plan_digest)
    values: Iterable[Buffer] = ()
    match reply.outcome:
        case Trained(update, examples, targets, steps, loss, clipped):
            message.trained.CopyFrom(
                pb.Trained(examples=examples, targets=targets, steps=steps, loss=loss, clipped=clipped)
            )
            message.trained.update.extend(_described(update))
            values = _values(update)
        case Evaluated(examples, targets, loss, correct):
            message.evaluated.CopyFrom(pb.Evaluated(examples=examples, targets=targets, loss=loss, correct=correct))
        case Secured(answer):
            message.secured.SetInParent()
            values = [answer]
        case Failed(reason):
            message.failed.CopyFrom(pb.Failed(reason=reason))
        case Refused(reason):
            message.refused.CopyFrom(pb.Refused(reason=reason))
    return message.SerializeToString(deterministic=True), cut(values)


def decode_task(parcel: Parcel, limits: Limits = LIMITS) -> Task:
    """The task in `parcel`, whose frames are used up.

    Raises:
        MessageTooLarge: more bytes, tensors, dimensions or characters than `limits` allow.
        UnknownVersion: the sender speaks another version.
        MalformedMessage: anything else that is wrong.
    """
    message, body = _opened(pb.Task(), parcel, limits)
    if hashlib.sha256(body).digest() != message.body_digest:
        raise MalformedMessage("the body is not the one that the task names")
    work: Work | None
    if message.WhichOneof("work") == "secure":
        secure = message.secure
        if secure.common_bytes > len(body):
            raise MalformedMessage(f"{secure.common_bytes} bytes in common, and the body has {len(body)}")
        common, rest = body[: secure.common_bytes], body[secure.common_bytes :]
        inner = _work(secure, rest, limits)
        if inner is None and rest:
            raise MalformedMessage(f"{len(rest)} bytes that belong to no tensor")
        work = Secure(_text(secure.step, limits), secure.session, common, secure.own, secure.subject, inner)
    else:
        work = _work(message, body, limits)
        if work is None:
            raise MalformedMessage("a task without work")
    return Task(*_address(message, limits), work, message.cohort)


def _work(message: Any, body: memoryview, limits: Limits) -> Train | Evaluate | None:
    match message.WhichOneof("work"):
        case "train":
            norm = message.train.clipping_norm if message.train.HasField("clipping_norm") else None
            if norm is not None and not 0 < norm < math.inf:
                raise MalformedMessage(f"a clipping norm of {norm}")
            return Train(_state(message.train.adapter, body, limits), norm)
        case "evaluate":
            return Evaluate(_state(message.evaluate.adapter, body, limits))
    return None


def decode_reply(parcel: Parcel, limits: Limits = LIMITS) -> Reply:
    """The reply in `parcel`, whose frames are used up; its tensors share one buffer. Raises as `decode_task` does."""
    message, body = _opened(pb.Reply(), parcel, limits)
    outcome: Outcome
    match message.WhichOneof("outcome"):
        case "trained":
            trained = message.trained
            update = _state(trained.update, body, limits)
            return Reply(
                *_address(message, limits),
                Trained(
                    update, trained.examples, trained.targets, trained.steps, _finite(trained.loss), trained.clipped
                ),
            )
        case "evaluated":
            measured = message.evaluated
            outcome = Evaluated(measured.examples, measured.targets, _finite(measured.loss), measured.correct)
        case "secured":
            return Reply(*_address(message, limits), Secured(body))
        case "failed":
            outcome = Failed(printable(_text(message.failed.reason, limits)))
        case "refused":
            outcome = Refused(printable(_text(message.refused.reason, limits)))
        case _:
            raise MalformedMessage("a reply without outcome")
    if body:
        raise MalformedMessage(f"{len(body)} bytes that belong to no tensor")
    return Reply(*_address(message, limits), outcome)


def _described(state: Mapping[str, Tensor]) -> Iterable[pb.Tensor]:
    for name, tensor in sorted(state.items()):
        yield pb.Tensor(name=name, dtype=_TO_PB[tensor.dtype], shape=tensor.shape)


def _values(state: Mapping[str, Tensor]) -> Iterable[Buffer]:
    return (tensor.data for _, tensor in sorted(state.items()))


def _opened(message: Any, parcel: Parcel, limits: Limits) -> tuple[Any, memoryview]:
    parcel.check(limits.message_bytes)
    return parse(message, parcel.head, limits), join(parcel.frames)


def parse(message: M, raw: bytes, limits: Limits = LIMITS) -> M:
    """`message` filled from `raw`, which has this program's version, where it has one, and no unknown fields.

    Raises:
        MessageTooLarge, UnknownVersion, MalformedMessage: as `decode_task` does.
    """
    if len(raw) > limits.head_bytes:
        raise MessageTooLarge(f"a head of {len(raw)} bytes", hint=f"The limit is {limits.head_bytes}.")
    try:
        message.ParseFromString(raw)
    except DecodeError as error:
        raise MalformedMessage(f"not a {message.DESCRIPTOR.name} message: {error}") from None
    version = getattr(message, "version", WIRE_VERSION)
    if version != WIRE_VERSION:
        older = "this program" if version > WIRE_VERSION else "the sender"
        raise UnknownVersion(
            f"wire version {version}, expected {WIRE_VERSION}", hint=f"Update Farfield on the side of {older}."
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


def _state(parts: Any, body: memoryview, limits: Limits) -> dict[str, Tensor]:
    """The tensors that `parts` describe, in the order of their names, which together fill the body exactly."""
    if len(parts) > limits.tensors:
        raise MessageTooLarge(f"{len(parts)} tensors", hint=f"The limit is {limits.tensors}.")
    state: dict[str, Tensor] = {}
    at, before = 0, ""
    for part in parts:
        name, shape = _text(part.name, limits), tuple(part.shape)
        if state and name <= before:
            raise MalformedMessage("the tensors are not in the order of their names", where=name)
        if part.dtype not in _FROM_PB:
            raise MalformedMessage(f"unknown number format {part.dtype}", where=name)
        if len(shape) > limits.dimensions:
            raise MessageTooLarge(f"{len(shape)} dimensions", where=name, hint=f"The limit is {limits.dimensions}.")
        if any(size > limits.message_bytes for size in shape):  # beside a 0 the product would not show it
            raise MessageTooLarge(f"shape {shape}", where=name, hint=f"The limit is {limits.message_bytes}.")
        dtype = _FROM_PB[part.dtype]
        size = math.prod(shape) * ITEM_BYTES[dtype]
        state[name] = Tensor(dtype, shape, body[at : at + size])
        at, before = at + size, name
    if at != len(body):
        raise MalformedMessage(f"the tensors take {at} bytes, and the body has {len(body)}")
    return state


def printable(text: str) -> str:
    """`text` with whatever could steer a terminal replaced: it comes from another machine, and people will read it."""
    return "".join(one if one.isprintable() else "\ufffd" for one in text)


def _text(value: str, limits: Limits) -> str:
    if len(value) > limits.text_chars:
        raise MessageTooLarge(f"a text of {len(value)} characters", hint=f"The limit is {limits.text_chars}.")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise MalformedMessage(f"a loss of {value}")
    return value
