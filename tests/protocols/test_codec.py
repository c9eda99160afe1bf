import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from farfield.protocols import codec, messages_pb2, parcel, tensors
from farfield.protocols.errors import MalformedMessage, MessageTooLarge, UnknownVersion, WireError
from farfield.protocols.messages import Evaluate, Evaluated, Failed, Refused, Reply, Task, Train, Trained
from farfield.protocols.parcel import Parcel
from farfield.protocols.tensors import DType, Tensor

arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
dtypes = st.sampled_from(("float32", "bfloat16"))
packed = st.builds(tensors.pack, arrays, dtypes)
texts = st.text(st.characters(codec="utf-8"), max_size=30)
states = st.dictionaries(texts, packed, max_size=4)
counts = st.integers(0, 2**63)
finite = st.floats(allow_nan=False, allow_infinity=False)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
works = st.one_of(st.builds(Train, states), st.builds(Evaluate, states))
outcomes = st.one_of(
    st.builds(Trained, states, counts, counts, counts, finite),
    st.builds(Evaluated, counts, counts, finite, counts),
    st.builds(Failed, texts.map(codec.printable)),
    st.builds(Refused, texts.map(codec.printable)),
)
uint32 = st.integers(0, 2**32 - 1)
tasks = st.builds(Task, texts, uint32, texts, digests, works, uint32)
replies = st.builds(Reply, texts, uint32, texts, digests, outcomes)
frame_sizes = st.sampled_from((1, 3, 7, 16, 64, parcel.FRAME_BYTES))

ADAPTER = {
    "v": tensors.pack(np.arange(5, dtype=np.float32), "bfloat16"),
    "w": tensors.pack(np.ones((2, 3), np.float32), "float32"),
}
A_TASK = Task("run", 1, "node", "ab" * 32, Train(ADAPTER), 3)
A_REPLY = Reply.to(A_TASK, Trained(ADAPTER, 4, 3, 2, 1.0))


def closed(reply: Reply) -> Parcel:
    head, frames = codec.encode_reply(reply)
    return Parcel(head, list(frames))


def altered(change: Callable[[Any], object], message: Task | Reply = A_TASK) -> Parcel:
    """The message's parcel with something changed in its head."""
    sent = codec.encode_task(message) if isinstance(message, Task) else closed(message)
    kind = messages_pb2.Task if isinstance(message, Task) else messages_pb2.Reply
    head = kind.FromString(sent.head)
    change(head)
    return Parcel(head.SerializeToString(), sent.frames)


@given(tasks, frame_sizes)
def test_a_task_comes_back_as_it_was(task: Task, size: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parcel, "FRAME_BYTES", size)
        sent = codec.encode_task(task)
        again = codec.encode_task(task, codec.pack_body(task.work))
    assert (again.head, again.frames) == (sent.head, sent.frames)
    assert codec.decode_task(sent) == task
    assert sent.frames == []


@given(replies, frame_sizes)
def test_a_reply_comes_back_as_it_was(reply: Reply, size: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(parcel, "FRAME_BYTES", size)
        sent = closed(reply)
    assert codec.decode_reply(sent) == reply
    assert sent.frames == []


def test_a_body_is_the_values_in_the_order_of_the_names() -> None:
    (frame,) = codec.encode_task(A_TASK).frames
    assert frame == bytes(ADAPTER["v"].data) + bytes(ADAPTER["w"].data)
    other: Mapping[str, Tensor] = dict(reversed(ADAPTER.items()))
    turned = dataclasses.replace(A_TASK, work=Train(other))
    assert codec.encode_task(turned).head == codec.encode_task(A_TASK).head
    assert closed(A_REPLY).frames == [frame]
    assert closed(Reply.to(A_TASK, Failed("no"))).frames == []


def test_all_tasks_of_a_round_share_one_body() -> None:
    body = codec.pack_body(A_TASK.work)
    one, other = (codec.encode_task(dataclasses.replace(A_TASK, node=name), body) for name in "ab")
    assert one.head != other.head
    assert all(ours is theirs for ours, theirs in zip(one.frames, other.frames, strict=True))
    codec.decode_task(one)
    assert codec.decode_task(other).node == "b"


def test_tensors_of_a_reply_share_one_buffer_that_cannot_be_written() -> None:
    outcome = codec.decode_reply(closed(A_REPLY)).outcome
    assert isinstance(outcome, Trained)
    views = [tensor.data for tensor in outcome.update.values()]
    assert all(isinstance(view, memoryview) and view.readonly for view in views)
    assert len({id(view.obj) for view in views if isinstance(view, memoryview)}) == 1
    assert not tensors.unpack(outcome.update["w"]).flags.writeable


@given(arrays)
def test_float32_is_exact_and_bfloat16_rounds_as_torch_does(array: np.ndarray) -> None:
    exact = tensors.unpack(tensors.pack(array, "float32"))
    np.testing.assert_array_equal(exact, array)
    rounded = torch.from_numpy(tensors.unpack(tensors.pack(array, "bfloat16")).copy())
    expected = torch.from_numpy(array.copy()).bfloat16().float()
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)


@given(st.integers(0, 2**32 - 1))
def test_bfloat16_rounds_every_bit_pattern_as_torch_does(bits: int) -> None:
    array = np.array([bits], np.uint32).view(np.float32)
    ours = torch.from_numpy(tensors.unpack(tensors.pack(array, "bfloat16")).copy())
    torch.testing.assert_close(ours, torch.from_numpy(array).bfloat16().float(), rtol=0, atol=0, equal_nan=True)


heads = st.one_of(st.binary(max_size=300), st.sampled_from((codec.encode_task(A_TASK).head, closed(A_REPLY).head)))
bodies = st.lists(st.binary(max_size=40), max_size=3).filter(lambda frames: sum(map(len, frames)) != 34)  # as it should


@given(heads, bodies)
def test_bytes_from_nowhere_are_a_wire_error(head: bytes, body: list[bytes]) -> None:
    for decode in (codec.decode_task, codec.decode_reply):
        with pytest.raises(WireError):
            decode(Parcel(head, list(body)))


@given(st.data())
def test_a_flipped_bit_is_a_wire_error_or_a_well_formed_message(data: st.DataObject) -> None:
    """In a task's body it is always an error; in a reply's, what travels is sealed."""
    for sent, decode in ((codec.encode_task(A_TASK), codec.decode_task), (closed(A_REPLY), codec.decode_reply)):
        (body,) = sent.frames
        raw = bytearray(sent.head + body)
        position = data.draw(st.integers(0, 8 * len(raw) - 1))
        raw[position // 8] ^= 1 << position % 8
        head, frames = bytes(raw[: len(sent.head)]), [bytes(raw[len(sent.head) :])]
        try:
            message = decode(Parcel(head, frames))
        except WireError:
            continue
        if isinstance(message, Task):
            assert position < 8 * len(sent.head)
            assert codec.decode_task(codec.encode_task(message)) == message
        else:
            assert codec.decode_reply(closed(message)) == message


@given(st.integers(0, 60), st.binary(min_size=1, max_size=9))
def test_a_head_that_is_cut_or_longer_is_a_wire_error(cut: int, more: bytes) -> None:
    sent = codec.encode_task(A_TASK)
    for head in (sent.head[:-cut], sent.head[cut + 1 :]):
        with pytest.raises(WireError):
            codec.decode_task(Parcel(head, list(sent.frames)))
    longer = bytes([0b1111_1010, 0b0000_0110, len(more)]) + more  # field 111, a string of that length
    with pytest.raises(MalformedMessage, match="unknown fields in Task"):
        codec.decode_task(Parcel(sent.head + longer, sent.frames))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body[:-1],
        lambda body: body + b"\0",
        lambda body: b"",
        lambda body: body * 2,
        lambda body: bytes(len(body)),
        lambda body: body[1:] + body[:1],
    ],
)
def test_a_body_must_be_the_one_that_the_head_describes(change: Callable[[bytes], bytes]) -> None:
    sent, answer = codec.encode_task(A_TASK), closed(A_REPLY)
    (body,) = sent.frames
    with pytest.raises(MalformedMessage, match="the body is not the one that the task names"):
        codec.decode_task(Parcel(sent.head, [change(body)]))
    if len(change(body)) != len(body):
        with pytest.raises(MalformedMessage, match=r"needs \d+ bytes, not \d+|take \d+ bytes, and the body has \d+"):
            codec.decode_reply(Parcel(answer.head, [change(body)]))


@pytest.mark.parametrize("outcome", [Failed("no"), Refused("no"), Evaluated(1, 1, 1.0, 1)], ids=repr)
def test_bytes_after_an_outcome_without_tensors_are_refused(outcome: Failed | Refused | Evaluated) -> None:
    with pytest.raises(MalformedMessage, match="1 bytes that belong to no tensor"):
        codec.decode_reply(Parcel(closed(Reply.to(A_TASK, outcome)).head, [b"x"]))


@pytest.mark.parametrize(("version", "older"), [(0, "the sender"), (2, "this program")])
def test_another_version_is_refused_and_says_who_is_older(version: int, older: str) -> None:
    expected = f"wire version {version}, expected 1. Update .* {older}"
    with pytest.raises(UnknownVersion, match=expected):
        codec.decode_task(altered(lambda message: setattr(message, "version", version)))
    with pytest.raises(UnknownVersion, match=expected):
        codec.decode_reply(altered(lambda message: setattr(message, "version", version), A_REPLY))


def test_fields_of_the_future_are_refused_wherever_they_are() -> None:
    field = bytes([0b1111_1000, 0b0000_0110, 1])
    sent = codec.encode_task(A_TASK)
    with pytest.raises(MalformedMessage, match="unknown fields in Task"):
        codec.decode_task(Parcel(sent.head + field, sent.frames))
    for part in ("Train", "Tensor"):

        def add(message: messages_pb2.Task, part: str = part) -> None:
            (message.train if part == "Train" else message.train.adapter[1]).MergeFromString(field)

        with pytest.raises(MalformedMessage, match=f"unknown fields in {part}"):
            codec.decode_task(altered(add))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (codec.Limits(message_bytes=10), "a message of [0-9]+ bytes. The limit is 10"),
        (codec.Limits(head_bytes=10), "a head of [0-9]+ bytes. The limit is 10"),
        (codec.Limits(tensors=1), "2 tensors. The limit is 1"),
        (codec.Limits(dimensions=1), "w: 2 dimensions. The limit is 1"),
        (codec.Limits(text_chars=2), "a text of 3 characters"),
    ],
)
def test_what_is_over_a_limit_is_refused(limits: codec.Limits, message: str) -> None:
    with pytest.raises(MessageTooLarge, match=message):
        codec.decode_task(codec.encode_task(A_TASK), limits)
    with pytest.raises(MessageTooLarge, match=message):
        codec.decode_reply(closed(A_REPLY), limits)


def test_what_is_over_the_limit_of_a_message_is_not_even_joined() -> None:
    sent = codec.encode_task(A_TASK)
    whole = sent.size
    assert codec.decode_task(Parcel(sent.head, list(sent.frames)), codec.Limits(message_bytes=whole)) == A_TASK
    with pytest.raises(MessageTooLarge):
        codec.decode_task(sent, codec.Limits(message_bytes=whole - 1))
    assert sent.frames, "the frames were used up before the limit was looked at"


def test_a_frame_that_no_sender_would_make_is_not_even_joined() -> None:
    """Sealed ones are a little longer, and the limit is the same for both."""
    for sent, decode in ((codec.encode_task(A_TASK), codec.decode_task), (closed(A_REPLY), codec.decode_reply)):
        (body,) = sent.frames
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(parcel, "FRAME_BYTES", len(body) - parcel.OVERHEAD_BYTES - 1)
            with pytest.raises(MessageTooLarge, match=f"a frame of {len(body)} bytes"):
                decode(sent)
            assert sent.frames == [body]
            patched.setattr(parcel, "FRAME_BYTES", len(body) - parcel.OVERHEAD_BYTES)
            decode(sent)


@given(st.text(max_size=30))
def test_a_printable_text_keeps_its_length_and_steers_no_terminal(text: str) -> None:
    shown = codec.printable(text)
    assert len(shown) == len(text)
    assert shown.isprintable()
    assert all(now in (was, "\ufffd") for was, now in zip(text, shown, strict=True))
    assert codec.printable(shown) == shown


@pytest.mark.parametrize("control", ["\x00", "\x07", "\x1b", "\x7f", "\x9b", "\n", "\r", "\t", "\u202e", "\u2028"])
def test_a_reason_comes_without_what_could_steer_a_terminal(control: str) -> None:
    """A bell, the beginnings of escape sequences, ends of lines, what turns the direction of writing."""
    for kind in (Failed, Refused):
        came = codec.decode_reply(closed(Reply.to(A_TASK, kind(f"héllo {control}[2J 🙂"))))
        assert came.outcome == kind("héllo \ufffd[2J 🙂")


def test_a_head_that_is_too_large_is_not_even_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bytes make a tensor of sixty: a large head of nothing else would fill the memory."""

    class Unparsed:
        def ParseFromString(self, raw: bytes) -> None:  # noqa: N802
            raise AssertionError("it was parsed")

    head = messages_pb2.Task(version=1)
    head.train.adapter.extend(messages_pb2.Tensor() for _ in range(codec.LIMITS.head_bytes // 2))
    raw = head.SerializeToString()
    monkeypatch.setattr(messages_pb2, "Task", Unparsed)
    with pytest.raises(AssertionError, match="it was parsed"):
        codec.decode_task(Parcel(raw[: codec.LIMITS.head_bytes]))
    with pytest.raises(MessageTooLarge, match=f"a head of {len(raw)} bytes"):
        codec.decode_task(Parcel(raw))


def test_a_shape_that_promises_more_than_came_allocates_nothing() -> None:
    def promise(message: Any) -> None:
        message.train.adapter[1].shape[:] = [2**30, 2**20]

    with pytest.raises(MalformedMessage, match=r"needs [0-9]+ bytes, not 24"):
        codec.decode_task(altered(promise))


@pytest.mark.parametrize("shape", [[0, 2**63], [2**40, 2**20], [2**64 - 1]])
def test_a_shape_that_no_array_can_have_is_refused(shape: list[int]) -> None:
    def claim(message: Any) -> None:
        message.trained.update[1].shape[:] = shape

    with pytest.raises(MessageTooLarge, match="w: shape"):
        codec.decode_reply(altered(claim, A_REPLY))


def test_a_negative_size_cannot_be_said() -> None:
    """Sizes are unsigned on the wire, so no slice of the body can begin behind its end."""
    assert messages_pb2.Tensor.DESCRIPTOR.fields_by_name["shape"].type == 4  # TYPE_UINT64


def test_contradictions_are_refused() -> None:
    def refused(match: str, change: Callable[[Any], object]) -> None:
        with pytest.raises(MalformedMessage, match=match):
            codec.decode_task(altered(change))

    order = "the tensors are not in the order of their names"
    refused(f"w: {order}", lambda head: head.train.adapter.append(head.train.adapter[1]))
    refused(f"a: {order}", lambda head: setattr(head.train.adapter[1], "name", "a"))
    refused(f"v: {order}", lambda head: setattr(head.train.adapter[1], "name", "v"))
    refused("w: unknown number format 9", lambda head: setattr(head.train.adapter[1], "dtype", 9))
    refused("w: unknown number format 0", lambda head: head.train.adapter[1].ClearField("dtype"))
    refused("a task without work", lambda head: head.ClearField("train"))
    refused("a plan digest of 5 bytes", lambda head: setattr(head, "plan_digest", b"short"))
    refused("the body is not the one", lambda head: setattr(head, "body_digest", b""))
    refused("the body is not the one", lambda head: setattr(head, "body_digest", hashlib.sha256(b"").digest()))
    with pytest.raises(MalformedMessage, match="a reply without outcome"):
        codec.decode_reply(altered(lambda head: head.ClearField("trained"), A_REPLY))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_refused(loss: float) -> None:
    for outcome in (Evaluated(1, 1, loss, 0), Trained(ADAPTER, 1, 1, 1, loss)):
        with pytest.raises(MalformedMessage, match=f"a loss of {loss}"):
            codec.decode_reply(closed(Reply.to(A_TASK, outcome)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_knows_its_size(dtype: DType) -> None:
    size = tensors.ITEM_BYTES[dtype]
    assert Tensor(dtype, (2, 3), bytes(6 * size)).shape == (2, 3)
    with pytest.raises(MalformedMessage):
        Tensor(dtype, (2, 3), bytes(6 * size - 1))


def test_the_digest_of_a_state_sees_names_shapes_and_values() -> None:
    state = {"a": np.zeros((2, 3), np.float32), "b": np.ones(1, np.float32)}
    others = [
        {"a": state["a"].reshape(3, 2), "b": state["b"]},
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"], "b": np.nextafter(state["b"], np.float32(2))},
    ]
    digests = {tensors.digest(state), *map(tensors.digest, others)}
    assert len(digests) == 4
    assert tensors.digest(dict(reversed(state.items()))) == tensors.digest(state)


def test_a_reply_repeats_the_address_of_its_task() -> None:
    reply = Reply.to(A_TASK, Failed("no"))
    address = [field.name for field in dataclasses.fields(Reply) if field.name != "outcome"]
    assert [getattr(reply, name) for name in address] == [getattr(A_TASK, name) for name in address]
