import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from farfield.protocols import codec, messages_pb2, tensors
from farfield.protocols.errors import MalformedMessage, MessageTooLarge, UnknownVersion, WireError
from farfield.protocols.messages import Evaluate, Evaluated, Failed, Reply, Task, Train, Trained
from farfield.protocols.tensors import DType, Tensor

arrays = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
dtypes = st.sampled_from(("float32", "bfloat16"))
packed = st.builds(tensors.pack, arrays, dtypes)
states = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=20), packed, max_size=4)
counts = st.integers(0, 2**63)
finite = st.floats(allow_nan=False, allow_infinity=False)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
names = st.text(st.characters(codec="utf-8"), max_size=30)
works = st.one_of(st.builds(Train, states), st.builds(Evaluate, states))
outcomes = st.one_of(
    st.builds(Trained, states, counts, counts, counts, finite),
    st.builds(Evaluated, counts, counts, finite, counts),
    st.builds(Failed, names),
)
tasks = st.builds(Task, names, st.integers(0, 2**32 - 1), names, digests, works)
replies = st.builds(Reply, names, st.integers(0, 2**32 - 1), names, digests, outcomes)

A_TASK = Task("run", 1, "node", "ab" * 32, Train({"w": tensors.pack(np.ones((2, 3), np.float32), "float32")}))


@given(tasks)
def test_a_task_comes_back_as_it_was(task: Task) -> None:
    assert codec.decode_task(codec.encode_task(task)) == task


@given(replies)
def test_a_reply_comes_back_as_it_was(reply: Reply) -> None:
    assert codec.decode_reply(codec.encode_reply(reply)) == reply


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


@given(st.binary(max_size=300))
def test_bytes_from_nowhere_are_a_wire_error(raw: bytes) -> None:
    for decode in (codec.decode_task, codec.decode_reply):
        with pytest.raises(WireError):
            decode(raw)


@given(st.data())
def test_a_flipped_bit_is_a_wire_error_or_a_well_formed_message(data: st.DataObject) -> None:
    raw = bytearray(codec.encode_task(A_TASK))
    position = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[position // 8] ^= 1 << position % 8
    try:
        task = codec.decode_task(bytes(raw))
    except WireError:
        return
    assert codec.decode_task(codec.encode_task(task)) == task


@pytest.mark.parametrize(("version", "older"), [(0, "the sender"), (2, "this program")])
def test_another_version_is_refused_and_says_who_is_older(version: int, older: str) -> None:
    message = messages_pb2.Task.FromString(codec.encode_task(A_TASK))
    message.version = version
    with pytest.raises(UnknownVersion, match=f"wire version {version}, expected 1. Update .* {older}"):
        codec.decode_task(message.SerializeToString())


def test_fields_of_the_future_are_refused() -> None:
    raw = codec.encode_task(A_TASK) + bytes([0b1111_1000, 0b0000_0110, 1])
    with pytest.raises(MalformedMessage, match="unknown fields in Task"):
        codec.decode_task(raw)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (codec.Limits(message_bytes=10), "a message of [0-9]+ bytes. The limit is 10"),
        (codec.Limits(tensors=0), "1 tensors. The limit is 0"),
        (codec.Limits(dimensions=1), "w: 2 dimensions. The limit is 1"),
        (codec.Limits(text_chars=2), "a text of 3 characters"),
    ],
)
def test_what_is_over_a_limit_is_refused(limits: codec.Limits, message: str) -> None:
    with pytest.raises(MessageTooLarge, match=message):
        codec.decode_task(codec.encode_task(A_TASK), limits)


def test_a_shape_that_promises_more_than_came_allocates_nothing() -> None:
    message = messages_pb2.Task.FromString(codec.encode_task(A_TASK))
    message.train.adapter[0].shape[:] = [2**40, 2**20]
    with pytest.raises(MalformedMessage, match=r"needs [0-9]+ bytes, not 24"):
        codec.decode_task(message.SerializeToString())


def test_a_shape_that_no_array_can_have_is_refused() -> None:
    message = messages_pb2.Task.FromString(codec.encode_task(A_TASK))
    message.train.adapter[0].shape[:] = [0, 2**63]
    message.train.adapter[0].data = b""
    with pytest.raises(MessageTooLarge, match="w: shape"):
        codec.decode_task(message.SerializeToString())


def test_contradictions_are_refused() -> None:
    message = messages_pb2.Task.FromString(codec.encode_task(A_TASK))
    twice = messages_pb2.Task.FromString(message.SerializeToString())
    twice.train.adapter.append(twice.train.adapter[0])
    with pytest.raises(MalformedMessage, match="w: two tensors of one name"):
        codec.decode_task(twice.SerializeToString())
    message.train.adapter[0].dtype = 9  # type: ignore[assignment]
    with pytest.raises(MalformedMessage, match="w: unknown number format 9"):
        codec.decode_task(message.SerializeToString())
    message.ClearField("train")
    with pytest.raises(MalformedMessage, match="a task without work"):
        codec.decode_task(message.SerializeToString())
    message.plan_digest = b"short"
    message.evaluate.SetInParent()
    with pytest.raises(MalformedMessage, match="a plan digest of 5 bytes"):
        codec.decode_task(message.SerializeToString())


def test_a_loss_that_is_no_number_is_refused() -> None:
    reply = Reply("run", 1, "node", "ab" * 32, Evaluated(1, 1, math.nan, 0))
    with pytest.raises(MalformedMessage, match="a loss of nan"):
        codec.decode_reply(codec.encode_reply(reply))


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
