"""Examples: what is learnt of each kind of record, and that cutting, packing, splitting and batching lose nothing."""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from farfield.edge_client.data import (
    IGNORED,
    MIN_TOKENS,
    ClassExample,
    Example,
    TokenExample,
    arrange,
    batches,
    collate,
    encode,
    prepare,
    split,
    tokenize,
)
from farfield.edge_client.records import Chat, Completion, Labelled, Message, Record, Text
from farfield.kernels import cross_entropy
from farfield.protocols.errors import BackboneError, DataError
from farfield.protocols.sections import Data

LM, CLASSES = "causal-lm", "sequence-classification"
END, BEGIN, TURN = "<end>", "<begin>", "<turn>"
TEMPLATE = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


def byte_tokenizer(*, begins: bool = False, ends: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    """One token for each byte, so that a test can count; id 0 is the end of a text, 1 its beginning, 2 a turn's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([END, BEGIN, TURN, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.add_special_tokens([END, BEGIN, TURN])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if begins:
        backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=END if ends else None,
        pad_token=END,
        model_max_length=16,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZER = byte_tokenizer(template=TEMPLATE)
LONG = Data(max_length=1000, packing=False)


def encoded(record: Record, data: Data = LONG, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> TokenExample:
    example = encode(record, tokenizer, data, LM, "here")
    assert isinstance(example, TokenExample)
    return example


def written(example: Example) -> str:
    return str(TOKENIZER.decode(list(example.input_ids)))


def learnt(example: TokenExample) -> str:
    """What has labels; "|" where something without labels follows it."""
    assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    runs = groupby(example.labels, lambda label: label != IGNORED)
    return "".join(str(TOKENIZER.decode(list(run))) if counts else "|" for counts, run in runs).removeprefix("|")


def token_examples(examples: Sequence[Example]) -> list[TokenExample]:
    assert all(isinstance(example, TokenExample) for example in examples)
    return [example for example in examples if isinstance(example, TokenExample)]


# Texts


def test_a_text_ends_and_every_token_of_it_counts() -> None:
    example = encoded(Text("Grün."))
    assert written(example) == "Grün.<end>"
    assert example.labels is example.input_ids
    assert example.input_ids.itemsize == 4


def test_a_text_begins_as_the_tokenizer_begins_it() -> None:
    example = encoded(Text("Green."), tokenizer=byte_tokenizer(begins=True))
    assert written(example) == "<begin>Green.<end>"


def test_a_long_text_makes_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    encoded(Text("longer than model_max_length of this tokenizer"))
    assert not caplog.records


def test_long_texts_are_cut_and_short_tails_dropped() -> None:
    data = Data(max_length=10, packing=False)
    pieces = tokenize([Text("a" * 28), Text("b" * 24), Text("c")], TOKENIZER, data, LM)
    assert [written(piece) for piece in pieces] == ["a" * 10, "a" * 10, "a" * 8 + END, "b" * 10, "b" * 10, "c" + END]


# Completions


def test_only_the_completion_counts() -> None:
    example = encoded(Completion("2 + 2 = ", "4"))
    assert written(example) == "2 + 2 = 4<end>"
    assert learnt(example) == "4<end>"
    assert example.labels[:8] == array("i", [IGNORED] * 8)


def test_the_prompt_counts_too_if_the_plan_says_so() -> None:
    example = encoded(Completion("2 + 2 = ", "4"), Data(max_length=1000, completion_only=False))
    assert learnt(example) == "2 + 2 = 4<end>"


def test_no_token_reaches_over_the_boundary() -> None:
    backend = Tokenizer(models.BPE({END: 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)  # type: ignore[no-untyped-call]
    assert tokenizer("ab")["input_ids"] == [3]
    example = encoded(Completion("a", "b"), tokenizer=tokenizer)
    assert (list(example.input_ids), list(example.labels)) == ([1, 2, 0], [IGNORED, 2, 0])


def test_a_long_prompt_loses_its_beginning() -> None:
    example = encoded(Completion("0123456789", "abc"), Data(max_length=8))
    assert written(example) == "6789abc<end>"
    example = encoded(Completion("0123456789", "abc"), Data(max_length=8), byte_tokenizer(begins=True))
    assert written(example) == "<begin>789abc<end>"
    assert learnt(example) == "abc<end>"


def test_a_completion_that_is_too_long_alone_loses_its_end() -> None:
    example = encoded(Completion("0123456789", "abcdefghij"), Data(max_length=8), byte_tokenizer(begins=True))
    assert (written(example), learnt(example)) == ("abcdefgh", "abcdefgh")


@given(st.text("ab", min_size=1, max_size=30), st.text("cd", min_size=1, max_size=30), st.booleans())
@settings(deadline=None)
def test_completions_fit_and_keep_as_much_as_they_can(prompt: str, completion: str, begins: bool) -> None:
    data = Data(max_length=16)
    tokenizer = byte_tokenizer(begins=begins) if begins else TOKENIZER
    example = encoded(Completion(prompt, completion), data, tokenizer)
    whole = len(prompt) + len(completion) + 1 + begins
    assert len(example.input_ids) == len(example.labels) == min(whole, 16)
    assert learnt(example) == (completion + END if len(completion) < 16 else completion[:16])


# Chats

CHAT = Chat(
    (
        Message("system", "Be brief."),
        Message("user", "2 + 2?"),
        Message("assistant", "4"),
        Message("user", "3 + 3?"),
        Message("assistant", "6"),
    )
)


def test_only_what_assistants_say_counts() -> None:
    example = encoded(CHAT)
    assert learnt(example) == "4<end>\n|6<end>\n"
    assert written(example).startswith(
        "<turn>system\nBe brief.<end>\n<turn>user\n2 + 2?<end>\n<turn>assistant\n4<end>\n"
    )


def test_whole_chats_count_if_the_plan_says_so() -> None:
    example = encoded(CHAT, Data(max_length=1000, completion_only=False))
    assert learnt(example) == written(example)


def test_a_template_that_does_not_end_the_text() -> None:
    bare = byte_tokenizer(template=TEMPLATE.replace("<end>", ""))
    assert learnt(encoded(CHAT, tokenizer=bare)) == "4\n|6\n<end>"
    asked = Chat(CHAT.messages[:4])
    assert learnt(encoded(asked, tokenizer=bare)) == "4\n|"
    assert written(encoded(asked, tokenizer=bare)).endswith("3 + 3?\n<end>")


def test_an_assistant_who_speaks_first() -> None:
    chat = Chat((Message("assistant", "Hello."), Message("user", "Hello.")))
    assert learnt(encoded(chat)) == "<turn>assistant\nHello.<end>\n|"


def test_offsets_are_of_characters_and_not_of_bytes() -> None:
    chat = Chat((Message("user", "größer 𝄞?"), Message("assistant", "größer 𝄞!")))
    assert learnt(encoded(chat)) == "größer 𝄞!<end>\n"


def test_no_chat_template() -> None:
    with pytest.raises(DataError) as caught:
        tokenize([Text("fine"), CHAT], byte_tokenizer(), LONG, LM, "a.jsonl")
    assert str(caught.value).startswith(
        "a.jsonl, record 2: a chat, but the backbone's tokenizer has no chat template. "
    )


def test_a_template_that_refuses() -> None:
    refusing = byte_tokenizer(template="{{ raise_exception('Got ' + messages[0].content) }}")
    with pytest.raises(DataError) as caught:
        encoded(CHAT, tokenizer=refusing)
    assert str(caught.value).startswith("here: the chat template refuses the chat (TemplateError). Many templates")
    assert "Be brief" not in str(caught.value)


def test_a_template_that_rewrites_earlier_turns() -> None:
    last_only = byte_tokenizer(template="{{ messages[-1].content }}")
    with pytest.raises(DataError, match="here: the chat template rewrites earlier turns"):
        encoded(CHAT, tokenizer=last_only)
    assert written(encoded(CHAT, Data(completion_only=False), last_only)) == "6<end>"


def test_a_chat_without_an_answer_teaches_nothing() -> None:
    assert tokenize([Chat((Message("user", "Anyone?"),))], TOKENIZER, LONG, LM) == []


def test_a_tokenizer_that_cannot_say_where_its_tokens_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = byte_tokenizer(template=TEMPLATE)
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(BackboneError, match="cannot say where a token stands"):
        encoded(CHAT, tokenizer=slow)


# Classes


def test_classes_keep_special_tokens_and_are_cut() -> None:
    tokenizer = byte_tokenizer(begins=True, ends=False)
    examples = tokenize([Labelled("good", 1), Labelled("0123456789", 0)], tokenizer, Data(max_length=8), CLASSES)
    assert [written(example) for example in examples] == ["<begin>good", "<begin>0123456"]
    assert [example.label for example in examples if isinstance(example, ClassExample)] == [1, 0]


def test_a_text_without_tokens() -> None:
    backend = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    with pytest.raises(DataError, match="f, record 2: the tokenizer makes no tokens of the text"):
        tokenize([Labelled("a", 0), Labelled("?", 1)], tokenizer, LONG, CLASSES, "f")


def test_records_of_another_task() -> None:
    with pytest.raises(DataError, match="f, record 1: a record of the kind Text"):
        tokenize([Text("a")], TOKENIZER, LONG, CLASSES, "f")
    with pytest.raises(DataError, match="f, record 1: a record of the kind Labelled"):
        tokenize([Labelled("a", 1)], TOKENIZER, LONG, LM, "f")


def test_a_tokenizer_without_an_end() -> None:
    with pytest.raises(BackboneError, match="no end-of-text token"):
        encoded(Text("a"), tokenizer=byte_tokenizer(ends=False))


# Packing

text_records = st.builds(Text, st.text("abc ", min_size=1, max_size=40))
completion_records = st.builds(
    Completion, st.text("abc", min_size=1, max_size=40), st.text("de", min_size=1, max_size=40)
)
chat_records = st.builds(
    lambda question, answer: Chat((Message("user", question), Message("assistant", answer))),
    st.text("abc", min_size=1, max_size=20),
    st.text("de", min_size=1, max_size=20),
)
lm_records = st.lists(text_records | completion_records | chat_records, min_size=1, max_size=12)


@given(lm_records, st.integers(8, 64), st.booleans())
@settings(deadline=None)
def test_packing_loses_nothing_but_a_short_end(records: list[Record], size: int, completion_only: bool) -> None:
    data = Data(max_length=size, completion_only=completion_only)
    whole = [encoded(record, data) for record in records]
    tokens = [token for example in whole for token in example.input_ids]
    labels = [label for example in whole for label in example.labels]
    blocks = token_examples(tokenize(records, TOKENIZER, data, LM))
    stream = [(tokens[i : i + size], labels[i : i + size]) for i in range(0, len(tokens), size)]
    assert [(list(block.input_ids), list(block.labels)) for block in blocks] == [
        (ids, targets) for ids, targets in stream if len(ids) >= MIN_TOKENS and any(t != IGNORED for t in targets[1:])
    ]


@given(lm_records, st.integers(8, 64))
@settings(deadline=None)
def test_without_packing_no_example_holds_two_records(records: list[Record], size: int) -> None:
    data = Data(max_length=size, packing=False)
    together = tokenize(records, TOKENIZER, data, LM)
    assert together == [example for record in records for example in tokenize([record], TOKENIZER, data, LM)]
    assert all(len(example.input_ids) <= size for example in together)


@given(lm_records, st.integers(8, 64), st.booleans())
@settings(deadline=None)
def test_truncated_one_record_is_one_example(records: list[Record], size: int, completion_only: bool) -> None:
    """Its beginning, whole if it fits; or none, where nothing of that is to be learnt."""
    data = Data(max_length=size, packing=False, truncate=True, completion_only=completion_only)
    for record in records:
        whole, kept = encoded(record, data), token_examples(tokenize([record], TOKENIZER, data, LM))
        ids, labels = list(whole.input_ids)[:size], list(whole.labels)[:size]
        learns = any(label != IGNORED for label in labels[1:])
        assert [(list(one.input_ids), list(one.labels)) for one in kept] == [(ids, labels)] * learns
    together = tokenize(records, TOKENIZER, data, LM)
    assert together == [example for record in records for example in tokenize([record], TOKENIZER, data, LM)]
    assert len(together) <= len(records)


def test_truncating_cuts_what_cutting_would_keep() -> None:
    records: list[Record] = [Text("a" * 40), Text("b" * 3), Text("c" * 16)]
    lengths = {}
    for truncate in (False, True):
        data = Data(max_length=16, packing=False, truncate=truncate)
        lengths[truncate] = [len(one.input_ids) for one in tokenize(records, TOKENIZER, data, LM)]
    assert lengths == {False: [16, 16, 9, 4, 16], True: [16, 4, 16]}


def test_packed_texts_share_one_array_for_tokens_and_labels() -> None:
    blocks = token_examples(tokenize([Text("a" * 40), Text("b" * 40)], TOKENIZER, Data(max_length=16), LM))
    assert all(block.labels is block.input_ids for block in blocks)
    assert [len(block.input_ids) for block in blocks] == [16] * 5  # two letters are left over: too few


def test_nothing_arranges_to_nothing() -> None:
    assert arrange([], Data()) == []


# Splitting


@given(st.integers(0, 200), st.floats(0, 1), st.integers(0, 2**63 - 1))
@settings(deadline=None)
def test_a_split_is_a_partition_that_depends_on_the_seed_alone(count: int, share: float, seed: int) -> None:
    train, held_out = split(range(count), share, seed)
    assert sorted(train + held_out) == list(range(count))
    assert (train, held_out) == (sorted(train), sorted(held_out))
    letters = [f"record {number}" for number in range(count)]
    assert split(letters, share, seed)[1] == [letters[number] for number in held_out]
    if share == 0 or count < 2:
        assert not held_out
    else:
        assert train
        assert held_out
        assert abs(len(held_out) - share * count) <= 1


def test_splits_differ_between_seeds_and_stay_between_versions() -> None:
    assert split(range(20), 0.2, 0)[1] != split(range(20), 0.2, 1)[1]
    assert split(range(20), 0.2, 7)[1] == [0, 1, 9, 17]


@given(st.lists(st.text("ab", min_size=10, max_size=30), min_size=2, max_size=10, unique=True), st.booleans())
@settings(deadline=None)
def test_no_record_is_on_both_sides(texts: list[str], packing: bool) -> None:
    marked = [f"<{number}:{text}>" for number, text in enumerate(texts)]
    data = Data(max_length=8, packing=packing, held_out=0.3)
    records = [Text(text) for text in marked]
    prepared = prepare(records, TOKENIZER, data, LM, 3, "here")
    train, held_out = split(records, 0.3, 3)
    assert prepared.train == tokenize(train, TOKENIZER, data, LM)
    assert prepared.held_out == tokenize(held_out, TOKENIZER, data, LM)
    assert prepared == prepare(iter(records), TOKENIZER, data, LM, 3, "here")


def test_a_client_without_a_usable_example() -> None:
    with pytest.raises(DataError, match=r"^clinic/a\.jsonl: no records\. Training needs"):
        prepare([], TOKENIZER, Data(), LM, 0, "clinic/a.jsonl")
    with pytest.raises(DataError, match=r"^clinic/a\.jsonl: no usable example\. Training needs"):
        prepare([Text("abc")], TOKENIZER, Data(), LM, 0, "clinic/a.jsonl")
    assert prepare([Text("abc")], TOKENIZER, Data(packing=False), LM, 0, "clinic").held_out == []


def test_a_faulty_record_is_named_by_its_number_in_the_file() -> None:
    with pytest.raises(DataError, match="clinic, record 3: a record of the kind Labelled"):
        prepare([Text("a"), Text("b"), Labelled("c", 1)], TOKENIZER, Data(), LM, 0, "clinic")


# Batches


@given(st.integers(0, 50), st.integers(1, 12), st.integers(0, 2**63 - 1), st.integers(0, 5))
@settings(deadline=None)
def test_an_epoch_has_every_example_once(count: int, size: int, seed: int, epoch: int) -> None:
    found = list(batches(range(count), size, seed, epoch))
    assert Counter(number for batch in found for number in batch) == Counter(range(count))
    assert [len(batch) for batch in found[:-1]] == [size] * (len(found) - 1)
    assert found == list(batches(range(count), size, seed, epoch))


def test_epochs_differ_and_stay_between_versions() -> None:
    first, second = (list(batches(range(8), 8, 0, epoch)) for epoch in (0, 1))
    assert first != second
    assert first == [[5, 0, 3, 7, 6, 2, 4, 1]]


def test_without_a_seed_the_order_stays() -> None:
    assert list(batches(range(5), 2, None, 3)) == [[0, 1], [2, 3], [4]]


# Tensors


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20), min_size=1, max_size=6))
@settings(deadline=None)
def test_collated_tokens(rows: list[list[int]]) -> None:
    examples = [TokenExample(array("i", row), array("i", [IGNORED, *row[1:]])) for row in rows]
    batch = collate(examples, pad_id=9)
    shape = (len(rows), max(map(len, rows)))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (torch.int64, shape)
    )
    for index, row in enumerate(rows):
        padding = shape[1] - len(row)
        assert batch["input_ids"][index].tolist() == row + [9] * padding
        assert batch["attention_mask"][index].tolist() == [1] * len(row) + [0] * padding
        assert batch["labels"][index].tolist() == [IGNORED, *row[1:]] + [IGNORED] * padding


def test_collated_classes() -> None:
    batch = collate([ClassExample(array("i", [5, 6]), 2), ClassExample(array("i", [7]), 0)], pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert (batch["labels"].dtype, batch["labels"].tolist()) == (torch.int64, [2, 0])


def test_collating_copies() -> None:
    example = TokenExample(array("i", [5, 6]), array("i", [5, 6]))
    collate([example], pad_id=1)["input_ids"].zero_()
    assert example.input_ids == array("i", [5, 6])


def test_ignored_is_what_the_loss_ignores() -> None:
    assert IGNORED == cross_entropy.IGNORED


def test_reading_data_needs_no_torch() -> None:
    code = "import sys, farfield.edge_client.data; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
