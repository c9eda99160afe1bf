"""Reading: every format gives the same records, and every fault names its file, its line and what was expected."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.edge_client.records import Chat, Completion, Labelled, Message, Record, Text, read
from farfield.protocols.errors import DataError
from farfield.protocols.sections import Data

LM, CLASSES = "causal-lm", "sequence-classification"
USER, ASSISTANT = Message("user", "What is it?"), Message("assistant", "A test.")


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def jsonl(path: Path, *rows: object) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def records(path: Path, task: str = LM, labels: int | None = None, **columns: Any) -> list[Record]:
    return list(read(path, Data(**columns), task, labels))


def complaint(path: Path, task: str = LM, labels: int | None = None, **columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        records(path, task, labels, **columns)
    return str(caught.value)


# What is read


def test_jsonl_decides_row_by_row(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "mixed.jsonl",
        {"text": "Plain."},
        {"prompt": "2 + 2", "completion": "4", "text": "not this"},
        {"messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A test."}]},
        {"messages": None, "prompt": None, "text": "nulls are absent columns"},
    )
    assert records(path) == [
        Text("Plain."),
        Completion("2 + 2", "4"),
        Chat((USER, ASSISTANT)),
        Text("nulls are absent columns"),
    ]


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ndjson", '{"text": "one"}\n\n{"text": "two"}\nnot JSON\n')
    found = read(path, Data(), LM, None)
    assert (next(found), next(found)) == (Text("one"), Text("two"))
    with pytest.raises(DataError, match=r"a\.ndjson, line 4"):
        next(found)


def test_nothing_is_opened_before_the_first_record_is_asked_for(tmp_path: Path) -> None:
    read(tmp_path / "absent.jsonl", Data(), LM, None)


def test_columns_are_named_by_the_plan(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "a", "text": "t"})
    assert records(path, prompt="question", completion="answer") == [Completion("q", "a")]


def test_labels_are_integers_or_their_digits(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "good", "label": 1}, {"text": "bad", "label": " 0 "})
    assert records(path, CLASSES, 2) == [Labelled("good", 1), Labelled("bad", 0)]


def test_glue_sst2(tmp_path: Path) -> None:
    content = 'label\tsentence\n0\t" hide new secretions\n1\tthat loves its characters "\n'
    path = write(tmp_path / "train.tsv", content)
    assert records(path, CLASSES, 2, text="sentence") == [
        Labelled('" hide new secretions', 0),
        Labelled('that loves its characters "', 1),
    ]


def test_csv_quotes_byte_order_mark_and_long_fields(tmp_path: Path) -> None:
    long = "word " * 40_000
    path = write(tmp_path / "a.CSV", f'\ufefftext,other\r\n"two\r\nlines, ""quoted""",x\r\n\r\n{long},y\r\n')
    assert records(path) == [Text('two\r\nlines, "quoted"'), Text(long)]


def test_parquet_reads_only_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    chat = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A test."}]
    table = pyarrow.table({"id": list(range(2500)), "messages": [chat] * 2499 + [None], "text": ["t"] * 2500})
    pyarrow.parquet.write_table(table, path)
    found = records(path)
    assert found[:2499] == [Chat((USER, ASSISTANT))] * 2499
    assert found[2499] == Text("t")


def test_parquet_classes(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    texts = pyarrow.array(["a", "b"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": pyarrow.array([2, 0], "int8")}), path)
    assert records(path, CLASSES, 3) == [Labelled("a", 2), Labelled("b", 0)]


def test_a_text_file_is_one_record(tmp_path: Path) -> None:
    assert records(write(tmp_path / "note.txt", "\ufeffOne.\r\nTwo.\n")) == [Text("One.\nTwo.\n")]


def test_a_folder_is_read_in_order_without_what_is_hidden_or_unknown(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "third")
    jsonl(tmp_path / "a" / "2.jsonl", {"text": "second"})
    write(tmp_path / "a" / "1.md", "first")
    write(tmp_path / "picture.png", b"\0\xff")
    write(tmp_path / ".cache" / "x.txt", "hidden")
    write(tmp_path / "._b.txt", b"\0\xff")
    assert records(tmp_path) == [Text("first"), Text("second"), Text("third")]


def test_a_hidden_folder_itself_can_be_given(tmp_path: Path) -> None:
    write(tmp_path / ".data" / "x.txt", "seen")
    assert records(tmp_path / ".data") == [Text("seen")]


def test_a_folder_of_classes_may_hold_a_readme(tmp_path: Path) -> None:
    write(tmp_path / "README.md", "About these files.")
    write(tmp_path / "train.csv", "text,label\ngood,1\n")
    assert records(tmp_path, CLASSES, 2) == [Labelled("good", 1)]


printable = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(deadline=None)
@given(st.lists(printable, min_size=1, max_size=8))
def test_any_text_survives_json_csv_and_parquet(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    jsonl(folder / "a.jsonl", *({"text": text} for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet")
    with (folder / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([["text"], *([text] for text in texts)])
    expected = [Text(text) for text in texts]
    assert records(folder / "a.jsonl") == records(folder / "a.parquet") == records(folder / "a.csv") == expected


# What is refused: the path


def test_missing_path(tmp_path: Path) -> None:
    assert complaint(tmp_path / "no.csv") == (
        f"{tmp_path / 'no.csv'}: no such file or folder. Give the path of the client's data."
    )


def test_unknown_suffix(tmp_path: Path) -> None:
    message = complaint(write(tmp_path / "a.xlsx", "x"))
    assert message.startswith(
        f"{tmp_path / 'a.xlsx'}: files that end in '.xlsx' cannot be read. Known are: .csv, .jsonl,"
    )
    assert "files without a suffix" in complaint(write(tmp_path / "plain", "x"))


def test_folder_without_data(tmp_path: Path) -> None:
    write(tmp_path / "a.png", b"x")
    assert complaint(tmp_path).startswith(f"{tmp_path}: the folder holds no data. Looked for .csv, .jsonl,")
    write(tmp_path / "a.txt", "text")
    assert ".txt" not in complaint(tmp_path, CLASSES, 2)


def test_plain_text_cannot_be_classified(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "text")
    assert complaint(path, CLASSES, 2).startswith(f"{path}: plain text has no labels. Give a table")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.csv", ""), ("a.csv", "text\n"), ("a.tsv", "text\n\n"), ("a.txt", "")],
)
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content)
    assert complaint(path) == f"{path}: holds no records. Add some, or take the file away."


def test_empty_parquet_and_an_empty_file_in_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "text")
    path = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], "string")}), path)
    assert complaint(tmp_path).startswith(f"{path}: holds no records")


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some text"] * 1000}), path)
    whole = path.read_bytes()
    assert complaint(write(path, whole[:-20])).startswith(f"{path}: ")
    assert complaint(write(path, b"not Parquet at all")).startswith(f"{path}: not a Parquet file that can be read")
    assert complaint(write(path, whole[:8] + b"\xff" * 60 + whole[68:])).startswith(f"{path}")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x"}')

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert complaint(path) == f"{path}: cannot be read: Permission denied"


# What is refused: the bytes


@pytest.mark.parametrize(
    ("name", "start"), [("a.jsonl", '{"text": "x"}\n'), ("a.csv", "text\n"), ("a.tsv", "text\n"), ("a.txt", "one\n")]
)
def test_not_utf8_and_nul(tmp_path: Path, name: str, start: str) -> None:
    path = write(tmp_path / name, start.encode() + "ä\n".encode("latin-1"))
    assert complaint(path) == f"{path}, line 2: not UTF-8 text (byte 1 of the line). Save the file as UTF-8."
    path = write(tmp_path / name, start.encode() + b"b\0c\n")
    assert complaint(path).startswith(f"{path}, line 2: holds a NUL byte.")


def test_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    offsets, values = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")
    column = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, values])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert complaint(path) == f"{path}, row 2: not UTF-8 text"


def test_nul_and_surrogates_escaped_in_json(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", r'{"text": "a\u0000"}')
    assert complaint(path) == f"{path}, line 1: 'text' holds a NUL character"
    path = write(tmp_path / "a.jsonl", r'{"text": "a\ud800"}')
    assert complaint(path) == f"{path}, line 1: 'text' holds half of a surrogate pair"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": "secret"', "not JSON: Expecting ',' delimiter (column 18)"),
        ("secret", "not JSON: Expecting value (column 1)"),
        ('["secret"]', "a list where an object should be"),
        ('"secret"', "text where an object should be"),
        ("[" * 100_000, "not JSON that can be read"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON that can be read"),
    ],
)
def test_malformed_json(tmp_path: Path, line: str, what: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line)
    assert complaint(path) == f"{path}, line 2: {what}. Each line should be one JSON object."


def test_rows_of_another_length(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"two\nlines",1\nfew\n')
    assert complaint(path, CLASSES, 2).startswith(f"{path}, line 4: 1 fields, the header has 2. A field with a comma")
    path = write(tmp_path / "a.tsv", "text\tlabel\na\tb\t1\n")
    assert complaint(path, CLASSES, 2).startswith(f"{path}, line 2: 3 fields, the header has 2. A field of a .tsv")


def test_malformed_quoting(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text\nfine\n"a"b\n')
    assert complaint(path).startswith(f"{path}, line 3: not a row of a table: ")
    path = write(tmp_path / "a.csv", 'text\nfine\n"never closed\n\n')
    assert complaint(path).startswith(f"{path}, line 3: not a row of a table: unexpected end of data")


def test_a_column_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text,id,id,text\na,b,c,d\n")
    assert complaint(path) == f"{path}, line 1: column 'text' is there twice"
    assert records(write(path, "text,id,id\na,b,c\n")) == [Text("a")]  # a column that nobody reads may be


# What is refused: the columns


def test_missing_columns_of_a_table_are_found_at_its_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "texts,id\n")
    assert complaint(path) == (
        f"{path}, line 1: no column 'text' (nor 'messages', nor 'prompt' with 'completion'). "
        "Did you mean 'texts'? Name the column in the Plan: [data] text = \"…\"."
    )
    path = write(tmp_path / "a.tsv", "label\tsentence\n0\tx\n")
    assert complaint(path, CLASSES, 2) == (
        f"{path}, line 1: no column 'text'. Known are: label, sentence. "
        'Name the column in the Plan: [data] text = "…".'
    )
    assert "no column 'label'. Did you mean 'labels'?" in complaint(write(path, "text\tlabels\nx\t0\n"), CLASSES, 2)


@pytest.mark.parametrize(("there", "missing"), [("prompt", "completion"), ("completion", "prompt")])
def test_half_a_completion(tmp_path: Path, there: str, missing: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", {there: "x", f"{missing}s": "y"})
    assert complaint(path) == (
        f"{path}, line 1: no column '{missing}'. Did you mean '{missing}s'? "
        f'Name the column in the Plan: [data] {missing} = "…".'
    )


def test_missing_columns_of_parquet_and_of_an_empty_object(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    assert complaint(path).startswith(f"{path}: no column 'text'")
    path = jsonl(tmp_path / "a.jsonl", {})
    assert complaint(path).endswith("'completion'). Name the column in the Plan: [data] text = \"…\".")


def test_a_forgotten_header_shows_little_of_the_first_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "word " * 100 + ",1\n")
    assert len(complaint(path)) < len(str(path)) + 300


# What is refused: the values


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "null"), (3, "a number"), (True, "true or false"), (["x"], "a list"), ({}, "an object")]
)
def test_text_of_another_type(tmp_path: Path, value: object, kind: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "fine"}, {"text": value})
    assert complaint(path) == f"{path}, line 2: 'text' is {kind}, not text"


def test_parquet_values(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fine"] * 1500 + [" "]}), path)
    assert complaint(path).startswith(f"{path}, row 1501: 'text' is empty")
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"x"]}), path)
    assert complaint(path) == f"{path}, row 1: 'text' is bytes, not text"


def test_nothing_but_white_space(tmp_path: Path) -> None:
    expected = "'text' is empty. Fill it in, or take the record away."
    path = jsonl(tmp_path / "a.jsonl", {"text": "fine"}, {"text": " \n"})
    assert complaint(path) == f"{path}, line 2: {expected}"
    path = write(tmp_path / "a.csv", "text,id\nfine,1\n,2\n")
    assert complaint(path) == f"{path}, line 3: {expected}"
    path = write(tmp_path / "a.txt", " \n\n")
    assert complaint(path) == f"{path}: {expected}"
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "x", "completion": ""})
    assert complaint(path).startswith(f"{path}, line 1: 'completion' is empty")


@pytest.mark.parametrize("value", ["positive", "1.0", "", "1_0", "٣", 1.0, True, [1], "9" * 5000])
def test_label_that_is_no_integer(tmp_path: Path, value: object) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "fine", "label": 0}, {"text": "x", "label": value})
    message = complaint(path, CLASSES, 3)
    assert message.startswith(f"{path}, line 2: 'label' is ")
    assert message.endswith(", not an integer. Classes are integers from 0 to 2.")


def test_null_label(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "x", "label": None})
    assert "'label' is null, not an integer" in complaint(path, CLASSES, 2)


@pytest.mark.parametrize("value", ["-1", "2", "999999999999"])
def test_label_out_of_range(tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "a.tsv", f"text\tlabel\nfine\t1\nx\t{value}\n")
    assert complaint(path, CLASSES, 2) == (
        f"{path}, line 3: 'label' is out of range. Classes are integers from 0 to 1."
    )


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ("secret", "'messages' is text, not a list of messages"),
        ([], "'messages' is an empty list"),
        (["secret"], "message 1 of 'messages' is text, not an object"),
        ([{"from": "human", "value": "secret"}], "message 1 of 'messages': there is no 'role'"),
        ([{"role": "user", "content": None}], "message 1 of 'messages': 'content' is null, not text"),
        ([{"role": "user", "content": ["secret"]}], "message 1 of 'messages': 'content' is a list, not text"),
        ([{"role": "", "content": "secret"}], "message 1 of 'messages': 'role' is empty"),
        (
            [{"role": "user", "content": "secret"}, {"role": "assistant", "content": " "}],
            "message 2 of 'messages': 'content' is empty",
        ),
    ],
)
def test_malformed_chat(tmp_path: Path, messages: object, what: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": messages})
    message = complaint(path).removeprefix(str(path))
    assert message.startswith(f", line 1: {what}. Expected [")
    assert "secret" not in message


def test_an_empty_system_message_is_fine(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl", {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "x"}]}
    )
    assert records(path) == [Chat((Message("system", ""), Message("user", "x")))]


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["a.jsonl", "a.csv", "a.tsv", "a.txt", "a.parquet"]))
def test_any_bytes_give_records_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "fuzz" / name, content)
    for task, labels in ((LM, None), (CLASSES, 2)):
        try:
            records(path, task, labels)
        except DataError as error:
            assert str(error).startswith(str(path))


columns = st.sampled_from(["text", "label", "messages", "role", "content", "prompt", "completion"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
any_json = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(columns, inner, max_size=4)
)


@settings(deadline=None)
@given(any_json)
def test_any_json_gives_records_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = jsonl(tmp_path_factory.getbasetemp() / "fuzz" / "a.jsonl", value)
    for task, labels in ((LM, None), (CLASSES, 2)):
        try:
            records(path, task, labels)
        except DataError as error:
            assert str(error).startswith(f"{path}, line 1: ")
