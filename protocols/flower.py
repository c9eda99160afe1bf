"""Parcels as the content of Flower messages, and back. The only thing that both sides must know about Flower.

A frame is an array of bytes: Flower cuts arrays into objects that are addressed by content, so the body that all tasks
of a round share is stored and sent to the SuperLink once. (Bytes in a ConfigRecord are not cut.)
"""

from __future__ import annotations

from collections.abc import Sequence

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from .errors import MalformedMessage
from .parcel import Parcel

_HEAD, _BODY, _STYPE = "head", "body", "farfield.frame"


def body_record(frames: Sequence[bytes]) -> ArrayRecord:
    """The frames, not copied, as the record that all messages with this body can share."""
    return ArrayRecord({f"{i:06}": Array("uint8", (len(frame),), _STYPE, frame) for i, frame in enumerate(frames)})


def to_record(parcel: Parcel, body: ArrayRecord | None = None) -> RecordDict:
    """The content of a message that carries `parcel`. `body`: `body_record(parcel.frames)`, if it is there."""
    head = ConfigRecord({_HEAD: parcel.head})
    return RecordDict({_HEAD: head, _BODY: body_record(parcel.frames) if body is None else body})


def from_record(record: RecordDict) -> Parcel:
    """The parcel in a message's content, which is used up.

    Raises:
        MalformedMessage: the content is something else.
    """
    heads, bodies = record.config_records, record.array_records
    if set(record) != {_HEAD, _BODY} or set(heads) != {_HEAD} or set(bodies) != {_BODY}:
        raise MalformedMessage("a Flower message that Farfield did not write")
    head = heads[_HEAD].get(_HEAD)
    arrays = bodies[_BODY]
    if not isinstance(head, bytes) or any(array.stype != _STYPE for array in arrays.values()):
        raise MalformedMessage("a Flower message that Farfield did not write")
    frames = [arrays.pop(name).data for name in sorted(arrays)]
    return Parcel(head, frames)
