"""Parcels as the content of Flower messages, and back. The only thing that both sides must know about Flower.

A frame is an array of bytes: Flower cuts arrays into objects that are addressed by content, so the body that all tasks
of a round share is stored and sent to the SuperLink once. Bytes in a ConfigRecord are not cut, and each object has its
own calls in both directions: so a small parcel, as the steps of a secure aggregation are, is one record and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from .errors import MalformedMessage
from .parcel import Parcel

SMALL_BYTES: Final = 1 << 16
"""A parcel up to this size travels as one record."""

_HEAD, _BODY, _FRAMES, _STYPE = "head", "body", "frames", "farfield.frame"


def body_record(frames: Sequence[bytes]) -> ArrayRecord:
    """The frames, not copied, as the record that all messages with this body can share."""
    return ArrayRecord({f"{i:06}": Array("uint8", (len(frame),), _STYPE, frame) for i, frame in enumerate(frames)})


def to_record(parcel: Parcel, body: ArrayRecord | None = None) -> RecordDict:
    """The content of a message that carries `parcel`. `body`: `body_record(parcel.frames)`, if it is there."""
    if parcel.size <= SMALL_BYTES:
        return RecordDict({_HEAD: ConfigRecord({_HEAD: parcel.head, _FRAMES: list(parcel.frames)})})
    head = ConfigRecord({_HEAD: parcel.head})
    return RecordDict({_HEAD: head, _BODY: body_record(parcel.frames) if body is None else body})


def from_record(record: RecordDict) -> Parcel:
    """The parcel in a message's content, which is used up.

    Raises:
        MalformedMessage: the content is something else.
    """
    heads, bodies = record.config_records, record.array_records
    if set(record) == {_HEAD} and set(heads) == {_HEAD}:
        return _small(heads[_HEAD])
    if set(record) != {_HEAD, _BODY} or set(heads) != {_HEAD} or set(bodies) != {_BODY}:
        raise MalformedMessage("a Flower message that Farfield did not write")
    head = heads[_HEAD].get(_HEAD)
    arrays = bodies[_BODY]
    if not isinstance(head, bytes) or any(array.stype != _STYPE for array in arrays.values()):
        raise MalformedMessage("a Flower message that Farfield did not write")
    frames = [arrays.pop(name).data for name in sorted(arrays)]
    return Parcel(head, frames)


def _small(record: ConfigRecord) -> Parcel:
    head, frames = record.get(_HEAD), record.get(_FRAMES)
    if set(record) != {_HEAD, _FRAMES} or not isinstance(head, bytes) or not isinstance(frames, list):
        raise MalformedMessage("a Flower message that Farfield did not write")
    whole = [frame for frame in frames if isinstance(frame, bytes)]
    if len(whole) != len(frames):
        raise MalformedMessage("a Flower message that Farfield did not write")
    return Parcel(head, whole)
