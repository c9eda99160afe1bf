"""Public text: what is read, how it is cut, what is held out, and that a batch depends on seed and step alone."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from farfield.emulator import stdlib, text
from farfield.emulator.text import PublicText, Windows, batches, in_order, prepare, read
from farfield.protocols.errors import DataError

LM, CLASSES = "causal-lm", "sequence-classification"
END, BEGIN, PAD = 0, 1, 2


def byte_tokenizer(*, begins: bool = False, marks: bool = False) -> PreTrainedTokenizerFast:
    """One token for each byte, so that a test can count. With `marks` every text stands between two special tokens."""
    special = ["<end>", "<begin>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(special + alphabet)}, []))
    backend.add_special_tokens(special)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if marks:
        ends = [("<begin>", BEGIN), ("<end>", END)]
        backend.post_processor = processors.TemplateProcessing(single="<begin> $A <end>", special_tokens=ends)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token="<begin>" if begins else None,
        eos_token="<end>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


TOKENIZER, MARKING = byte_tokenizer(), byte_tokenizer(marks=True)


def decoded(windows: Windows) -> list[str]:
    return [str(TOKENIZER.decode(window.tolist())) for window in windows]


def windows_of(*sizes: int) -> Windows:
    """Windows of such lengths, the tokens numbered through from 100."""
    numbers = iter(range(100, 10**6))
    return Windows.of([np.array([next(numbers) for _ in range(size)], dtype=np.int32) for size in sizes], PAD)


# Reading


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    files = {
        "b.txt": "\ufeffone\r\ntwo\n",
        "a/c.md": "three",
        "a/d.jsonl": '{"text": "four\\nfive"}\n\n{"text": "six", "label": 1}\n{"text": "  "}\n',
        "a/e.json": '{"text": "seven \u2028"}',
        "blank.rst": " \n",
        "code.PY": "x = 8\n",
        "picture.png": "\0",
        ".hidden/f.txt": "never",
        "a/.g.txt": "never",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    assert read(tmp_path, "model") == ["three", "four\nfive", "six", "seven \u2028", "one\ntwo\n", "x = 8\n"]
    assert read(tmp_path / "b.txt", "model") == ["one\ntwo\n"]
    (tmp_path / "LICENCE").write_text("free")
    assert read(tmp_path / "LICENCE", "model") == ["free"]


def test_a_builtin_backbone_brings_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    one = stdlib.Source("ast", PurePosixPath("ast.py"), "x = 1\n")
    monkeypatch.setattr(stdlib, "sources", lambda *, of_clients, tests: iter([] if of_clients or tests else [one]))
    assert read(None, "builtin:tiny-llama-py") == ["x = 1\n"]
    with pytest.raises(DataError, match=r"none was given\. Give --data TEXT"):
        read(None, "/models/llama")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo \xff", "a.txt, line 2: not UTF-8 text. Save the file as UTF-8"),
        ("a.txt", b"one\n\ntwo \0", "a.txt, line 3: holds a NUL byte. UTF-16 is not read"),
        ("a.txt", b" \n", "a.txt: holds no text"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "a.jsonl, line 2: not JSON that can be read. Each line should"),
        ("a.jsonl", b'["one"]', "a.jsonl, line 1: no text. Each line should"),
        ("a.json", b'{"text": 1}', "a.json, line 1: no text."),
        ("a.json", b'{"text": "\\ud800"}', "a.json, line 1: the text holds half of a surrogate pair"),
        ("a.png", b"\x89PNG\0", "a.png, line 1: holds a NUL byte."),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name, "model")
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_folders_and_paths_without_text(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"the folder holds no text\. Looked for .*\.txt"):
        read(tmp_path, "model")
    with pytest.raises(DataError, match="no such file or folder"):
        read(tmp_path / "nowhere", "model")


def test_more_text_than_fits_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_BYTES", 2 << 20)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_bytes(b"\xff" * (1 << 20))
    with pytest.raises(DataError, match="holds 3 MiB of text, and at most 2 are read"):
        read(tmp_path, "model")


# Windows of a decoder


def test_documents_make_one_stream() -> None:
    found = prepare(["abc", "defgh"], TOKENIZER, task=LM, max_length=4, held_out=0)
    assert len(found.held_out) == 0
    stream = found.train.tokens.tolist()
    assert [len(window) for window in found.train] == [4, 4]
    assert found.train.tokens.dtype == np.int32
    assert TOKENIZER.decode(stream) in ("<end>abc<end>def", "<end>defgh<end>a")
    begun = prepare(["abc", "defgh"], byte_tokenizer(begins=True), task=LM, max_length=4, held_out=0)
    assert begun.train.tokens.tolist() == [BEGIN if token == END else token for token in stream]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(8, 20), st.integers(0, 3))
def test_no_token_is_lost_but_at_ends_and_none_is_on_both_sides(sizes: list[int], length: int, seed: int) -> None:
    documents = [chr(ord("a") + number) * size for number, size in enumerate(sizes)]
    try:
        found = prepare(documents, TOKENIZER, task=LM, max_length=length, held_out=0.2, seed=seed)
    except DataError:
        assert sum(sizes) + len(sizes) < 2 * length + 8
        return
    kept = found.train.tokens.tolist() + found.held_out.tokens.tolist()
    assert all(
        text.MIN_TOKENS <= len(window) <= length for windows in (found.train, found.held_out) for window in windows
    )
    assert len(kept) > sum(sizes) + len(sizes) - 2 * text.MIN_TOKENS
    written = TOKENIZER.decode(kept, skip_special_tokens=True)
    assert all(written.count(document[0]) <= len(document) for document in documents)


def test_a_long_document_is_tokenised_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    document = "some words of one long line " * 20 + "x" * 100 + "\n" + "more\n" * 30
    whole = prepare([document], TOKENIZER, task=LM, max_length=16, held_out=0)
    monkeypatch.setattr(text, "_PIECE_CHARS", 50)
    pieces = [piece.tolist() for piece in text._parts(document, TOKENIZER)]
    assert max(map(len, pieces)) <= 50
    assert all(TOKENIZER.decode(piece)[0] in " \nx" for piece in pieces[2:])
    cut = prepare([document], TOKENIZER, task=LM, max_length=16, held_out=0)
    assert cut.train.tokens.tolist() == whole.train.tokens.tolist()


def test_no_more_is_taken_than_asked_for() -> None:
    documents = [letter * 99 for letter in "abcdefghij"]
    found = prepare(documents, TOKENIZER, task=LM, max_length=10, held_out=0, limit=250)
    assert len(found.train.tokens) == 250
    letters = set("".join(decoded(found.train)).replace("<end>", ""))
    assert len(letters) == 3
    others = prepare(documents, TOKENIZER, task=LM, max_length=10, held_out=0, limit=250, seed=1)
    assert set("".join(decoded(others.train)).replace("<end>", "")) != letters


# Windows of an encoder


def test_each_line_is_a_window_of_an_encoder() -> None:
    found = prepare(["one\n\n  two  \n", "three and more\none\n"], MARKING, task=CLASSES, max_length=6, held_out=0)
    assert sorted(decoded(found.train)) == ["<begin>one<end>", "<begin>thre<end>", "<begin>two<end>"]


def test_an_encoder_takes_whole_lines_up_to_the_limit() -> None:
    lines = "\n".join(f"line {number:02d}" for number in range(50))
    found = prepare([lines], MARKING, task=CLASSES, max_length=32, held_out=0, limit=85)
    assert decoded(found.train) == [f"<begin>line {number:02d}<end>" for number in range(10)]


# What is held out


@pytest.mark.parametrize("task", [LM, CLASSES])
def test_whole_documents_are_held_out_by_their_tokens(task: str) -> None:
    documents = [chr(ord("A") + number) * (20 + 5 * number) for number in range(40)]
    found = prepare(documents, TOKENIZER, task=task, max_length=10, held_out=0.25)
    train, held_out = ("".join(decoded(one)).replace("<end>", "") for one in (found.train, found.held_out))
    assert not set(train) & set(held_out)
    if task == LM:
        assert len(held_out) / len(train + held_out) == pytest.approx(0.25, abs=0.03)
    again = prepare(documents, TOKENIZER, task=task, max_length=10, held_out=0.25)
    assert again.held_out.tokens.tolist() == found.held_out.tokens.tolist()
    other = prepare(documents, TOKENIZER, task=task, max_length=10, held_out=0.25, seed=1)
    assert set("".join(decoded(other.held_out))) != set("".join(decoded(found.held_out)))


def test_a_document_that_is_there_twice_is_on_one_side() -> None:
    documents = [chr(ord("a") + number % 10) * 30 for number in range(20)]
    found = prepare(documents, TOKENIZER, task=LM, max_length=31)
    assert len(found.train) == 9
    assert len(found.held_out) == 1


def test_a_document_is_held_out_even_if_it_is_more_than_the_share() -> None:
    found = prepare([letter * 59 for letter in "abcdef"], TOKENIZER, task=LM, max_length=30, held_out=0.1)
    assert (len(found.train), len(found.held_out)) == (10, 2)


@pytest.mark.parametrize(("task", "documents"), [(LM, 1), (LM, 2), (CLASSES, 1)])
def test_windows_are_held_out_where_documents_are_few(task: str, documents: int) -> None:
    texts = ["\n".join(f"{part}-line {number:03d}" for number in range(100)) for part in range(documents)]
    found = prepare(texts, TOKENIZER, task=task, max_length=24, held_out=0.1)
    train, held_out = decoded(found.train), decoded(found.held_out)
    assert len(held_out) == round(0.1 * (len(train) + len(held_out)))
    assert not set(train) & set(held_out)
    other = prepare(texts, TOKENIZER, task=task, max_length=24, held_out=0.1, seed=1)
    assert decoded(other.held_out) != held_out


def test_too_little_text_is_refused() -> None:
    for documents in ([], ["one line that is one window"], ["a", "b"]):
        with pytest.raises(DataError, match="makes too few windows of at most 64 tokens"):
            prepare(documents, TOKENIZER, task=LM, max_length=64)
    for share in (0.01, 0.9):
        two = prepare(["a line for two windows"], TOKENIZER, task=LM, max_length=12, held_out=share)
        assert (len(two.train), len(two.held_out)) == (1, 1)


# Batches


def test_a_batch_is_filled_up_to_its_longest() -> None:
    (first, second) = in_order(windows_of(2, 3, 1), 2)
    assert first["input_ids"].dtype == first["attention_mask"].dtype == torch.int64
    assert first["input_ids"].tolist() == [[100, 101, PAD], [102, 103, 104]]
    assert first["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert second["input_ids"].tolist() == [[105]]
    assert list(in_order(windows_of(), 2)) == []


@given(st.integers(1, 12), st.integers(1, 15), st.integers(0, 2**40))
def test_every_window_comes_once_before_any_comes_again(count: int, batch_size: int, seed: int) -> None:
    windows = windows_of(*[1] * count)
    drawn = [batches(windows, batch_size, seed=seed, step=step)["input_ids"] for step in range(2 * count)]
    assert all(one.shape == (batch_size, 1) for one in drawn)
    row = torch.cat(drawn).flatten().tolist()
    for start in range(0, len(row) - count + 1, count):
        assert sorted(row[start : start + count]) == list(range(100, 100 + count))
    for step in reversed(range(2 * count)):
        again = batches(windows, batch_size, seed=seed, step=step)
        assert torch.equal(again["input_ids"], drawn[step])


def test_batches_differ_by_seed_and_epoch() -> None:
    windows = windows_of(*[1] * 32)
    drawn = [batches(windows, 32, seed=seed, step=step)["input_ids"] for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == 3


# On disk


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    whole = PublicText(windows_of(3, 1, 4), windows_of())
    whole.save(tmp_path / "text.safetensors")
    loaded = PublicText.load(tmp_path / "text.safetensors")
    for before, after in ((whole.train, loaded.train), (whole.held_out, loaded.held_out)):
        assert [window.tolist() for window in after] == [window.tolist() for window in before]
        assert after.pad_id == PAD
        assert after.tokens.dtype == np.int32
        assert after.bounds.dtype == np.int64
    batch = batches(loaded.train, 3, seed=0, step=5)["input_ids"]
    assert torch.equal(batch, batches(whole.train, 3, seed=0, step=5)["input_ids"])
    assert [path.name for path in tmp_path.iterdir()] == ["text.safetensors"]


def test_anything_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    PublicText(windows_of(3, 1), windows_of(2)).save(path)
    good, raw = load_file(path), path.read_bytes()
    wrong = {
        "train.tokens": [good["train.tokens"].astype(np.int64), good["train.tokens"][:-1]],
        "train.bounds": [np.array(bounds, dtype=np.int64) for bounds in ([], [1, 4], [0, 5, 4], [0, 4, 4], [[0, 4]])],
    }
    for key, arrays in wrong.items():
        for array in arrays:
            save_file(good | {key: array}, path, metadata={"pad_id": "0"})
            with pytest.raises(DataError, match="no public text, or a damaged one"):
                PublicText.load(path)
    for content in (b"", raw[:-1], json.dumps({}).encode()):
        path.write_bytes(content)
        with pytest.raises(DataError, match="no public text, or a damaged one"):
            PublicText.load(path)
    with pytest.raises(DataError, match="no public text"):
        PublicText.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be written"):
        PublicText(windows_of(1), windows_of(1)).save(tmp_path / "nowhere" / "text.safetensors")
