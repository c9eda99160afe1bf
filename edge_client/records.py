"""Reading a client's files: from a path to records, lazily, with every fault named by file and line.

What is read: JSONL (`.jsonl`, `.ndjson`), CSV and TSV with a header row, Parquet, plain text (`.txt`, `.md`; a file is
one record), and a folder of such files. Which columns hold what is said by the `[data]` section of the Plan; which kind
of record they make, by the task and by the columns that are there.

Messages name files, lines, columns and types and never quote a value, for they may leave the machine in a reply.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from farfield.protocols.errors import DataError, did_you_mean
from farfield.protocols.sections import Data

CLASSIFICATION = "sequence-classification"

MAX_FIELD_CHARS = 2**31 - 1
"""Of one CSV field; the `csv` module's own limit of 131,072 is less than a long document."""

_SHOWN_CHARS, _SHOWN_NAMES = 40, 30
"""How much of column names goes into a message: without its header row, the "names" of a CSV file are a record."""


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class Completion:
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text with its class, an integer from 0."""

    text: str
    label: int


Record: TypeAlias = Text | Completion | Chat | Labelled
Row: TypeAlias = Mapping[str, object]


def read(path: Path, data: Data, task: str, labels: int | None) -> Iterator[Record]:
    """The records of a file, or of every file of a folder.

    A folder is read recursively in the order of its files' paths. Hidden files and files of other kinds are passed
    over, and so are plain text files when the task is classification, as they have no labels. With the task
    "sequence-classification" records are `Labelled`; else a row with messages is a `Chat`, one with a prompt and a
    completion a `Completion`, and one with a text a `Text`. A null counts as an absent column, and blank lines between
    rows are passed over.

    TSV has no quoting, as GLUE's files and the media type have it: a quotation mark is a character like any other.

    Args:
        labels: how many classes there are; needed for classification only.

    Raises:
        DataError: while iterating, at the first record that is not as it should be. Names the file with its line (for
            Parquet, the row, from 1) and says what was expected. A text, prompt or completion of nothing but white
            space is an error, and so is a file without records.
    """
    expected = _Expected(data, task, labels)
    file = path
    try:
        for file in _files(path, task):
            empty = True
            for where, row in _READERS[file.suffix.lower()](file, expected):
                yield expected.record(row, where)
                empty = False
            if empty:
                raise DataError("holds no records", where=file, hint="Add some, or take the file away.")
    except OSError as error:  # pyarrow raises it without a reason, too
        raise DataError(f"cannot be read: {error.strerror or 'damaged'}", where=file) from None


def _files(path: Path, task: str) -> list[Path]:
    suffixes = ", ".join(sorted(_READERS))
    if path.is_dir():
        usable = set(_READERS) - (set(_PLAIN_TEXT) if task == CLASSIFICATION else set())
        found = [
            file
            for file in sorted(path.rglob("*"))
            if file.suffix.lower() in usable
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not found:
            raise DataError(
                "the folder holds no data", where=path, hint=f"Looked for {', '.join(sorted(usable))} files."
            )
        return found
    if not path.exists():
        raise DataError("no such file or folder", where=path, hint="Give the path of the client's data.")
    if path.suffix.lower() not in _READERS:
        kind = f"files that end in {path.suffix!r}" if path.suffix else "files without a suffix"
        raise DataError(f"{kind} cannot be read", where=path, hint=f"Known are: {suffixes}, and folders of such files.")
    if not path.is_file():
        raise DataError("neither a file nor a folder", where=path)
    if task == CLASSIFICATION and path.suffix.lower() in _PLAIN_TEXT:
        raise DataError(
            "plain text has no labels", where=path, hint="Give a table with a column of texts and one of labels."
        )
    return [path]


@dataclass(frozen=True, slots=True)
class _Expected:
    """What rows have to hold, and the making of records from them."""

    data: Data
    task: str
    labels: int | None

    @property
    def columns(self) -> list[str]:
        data = self.data
        if self.task == CLASSIFICATION:
            return [data.text, data.label]
        return [data.messages, data.prompt, data.completion, data.text]

    def kind(self, columns: Collection[str]) -> type[Record] | None:
        data = self.data
        if self.task == CLASSIFICATION:
            return Labelled if data.text in columns and data.label in columns else None
        if data.messages in columns:
            return Chat
        if data.prompt in columns and data.completion in columns:
            return Completion
        return Text if data.text in columns else None

    def check(self, columns: Collection[str], where: object) -> None:
        """Raise the DataError of a table that lacks a column before any of its rows is read."""
        if self.kind(columns) is None:
            raise self.missing(columns, where)

    def record(self, row: Row, where: object) -> Record:
        data = self.data
        kind = self.kind([name for name, value in row.items() if value is not None])
        # With nothing but nulls to go by, the null itself is the fault to report, not the want of a column.
        kind = kind or self.kind(row)
        if kind is Labelled:
            return Labelled(_text(row, data.text, where), self.label(row[data.label], where))
        if kind is Chat:
            return _chat(row[data.messages], data.messages, where)
        if kind is Completion:
            return Completion(_text(row, data.prompt, where), _text(row, data.completion, where))
        if kind is Text:
            return Text(_text(row, data.text, where))
        raise self.missing(row, where)

    def label(self, value: object, where: object) -> int:
        assert self.labels is not None, "the Plan gives the number of classes"
        hint = f"Classes are integers from 0 to {self.labels - 1}."
        if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value, re.ASCII):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise DataError(f"{self.data.label!r} is {_kind_of(value)}, not an integer", where=where, hint=hint)
        if not 0 <= value < self.labels:
            raise DataError(f"{self.data.label!r} is out of range", where=where, hint=hint)
        return value

    def missing(self, columns: Collection[str], where: object) -> DataError:
        data, also = self.data, ""
        if self.task == CLASSIFICATION:
            key = "label" if data.text in columns else "text"
        elif data.prompt in columns or data.completion in columns:
            key = "completion" if data.prompt in columns else "prompt"
        else:
            key = "text"
            also = f" (nor {data.messages!r}, nor {data.prompt!r} with {data.completion!r})"
        column = getattr(data, key)
        shown = [name if len(name) <= _SHOWN_CHARS else f"{name[:_SHOWN_CHARS]}…" for name in columns][:_SHOWN_NAMES]
        near = f"{did_you_mean(column, shown)} " if shown else ""
        hint = f'{near}Name the column in the Plan: [data] {key} = "…".'
        return DataError(f"no column {column!r}{also}", where=where, hint=hint)


def _text(row: Row, column: str, where: object) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{column!r} is {_kind_of(value)}, not text", where=where)
    if not value.strip():
        raise DataError(f"{column!r} is empty", where=where, hint="Fill it in, or take the record away.")
    return _encodable(value, column, where)


def _encodable(value: str, column: str, where: object) -> str:
    """`value`, if it is text that a tokenizer can take: JSON can write what Unicode text cannot hold."""
    if "\0" in value:
        raise DataError(f"{column!r} holds a NUL character", where=where)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{column!r} holds half of a surrogate pair", where=where) from None
    return value


def _chat(value: object, column: str, where: object) -> Chat:
    hint = 'Expected [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}, …].'
    if not isinstance(value, list):
        raise DataError(f"{column!r} is {_kind_of(value)}, not a list of messages", where=where, hint=hint)
    if not value:
        raise DataError(f"{column!r} is an empty list", where=where, hint=hint)
    messages = []
    for number, message in enumerate(value, 1):
        this = f"message {number} of {column!r}"
        if not isinstance(message, dict):
            raise DataError(f"{this} is {_kind_of(message)}, not an object", where=where, hint=hint)
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = f"'{key}' is {_kind_of(message[key])}, not text" if key in message else f"there is no '{key}'"
                raise DataError(f"{this}: {found}", where=where, hint=hint)
        role, content = message["role"], message["content"]
        # Data sets write "no system prompt" as an empty one; an empty question or answer is a fault.
        if not role.strip() or (not content.strip() and role != "system"):
            raise DataError(f"{this}: '{'content' if role.strip() else 'role'}' is empty", where=where, hint=hint)
        messages.append(Message(_encodable(role, "role", where), _encodable(content, "content", where)))
    return Chat(tuple(messages))


def _kind_of(value: object) -> str:
    """The type of a value in a word that a data owner knows; never the value."""
    names: dict[type, str] = {
        type(None): "null", bool: "true or false", str: "text", int: "a number", float: "a number", bytes: "bytes",
        list: "a list", tuple: "a list", dict: "an object",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Each line of a UTF-8 file with its number, line break included, a byte order mark not."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            where = f"{path}, line {number}"
            if b"\0" in raw:
                raise DataError(
                    "holds a NUL byte", where=where, hint="Is it text at all? UTF-16 is not read; use UTF-8."
                )
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                what = f"not UTF-8 text (byte {error.start + 1} of the line)"
                raise DataError(what, where=where, hint="Save the file as UTF-8.") from None
            yield number, line.removeprefix("\ufeff") if number == 1 else line


def _json_rows(path: Path, expected: _Expected) -> Iterator[tuple[str, Row]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        hint = "Each line should be one JSON object."
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {error.msg} (column {error.colno})", where=where, hint=hint) from None
        except (ValueError, RecursionError):  # a number of thousands of digits; brackets thousands deep
            raise DataError("not JSON that can be read", where=where, hint=hint) from None
        if not isinstance(row, dict):
            raise DataError(f"{_kind_of(row)} where an object should be", where=where, hint=hint)
        yield where, row


def _csv_rows(path: Path, expected: _Expected) -> Iterator[tuple[str, Row]]:
    hint = "A field with a comma, a quotation mark or a line break goes between quotation marks."
    lines = (line for _, line in _lines(path))
    return _table(path, expected, csv.reader(lines, strict=True), hint)


def _tsv_rows(path: Path, expected: _Expected) -> Iterator[tuple[str, Row]]:
    hint = "A field of a .tsv file can hold neither a tab nor a line break; that of a .csv file can."
    lines = (line for _, line in _lines(path))
    return _table(path, expected, csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE), hint)


# `Any`: the type of a csv reader has no public name before Python 3.13.
def _table(path: Path, expected: _Expected, reader: Any, hint: str) -> Iterator[tuple[str, Row]]:
    header: list[str] = []
    for where, fields in _fields(path, reader, hint):
        if not header:
            header = fields
            twice = {name for name in header if header.count(name) > 1 and name in expected.columns}
            if twice:
                raise DataError(f"column {min(twice)!r} is there twice", where=where)
            expected.check(header, where)
            continue
        if len(fields) != len(header):
            raise DataError(f"{len(fields)} fields, the header has {len(header)}", where=where, hint=hint)
        yield where, dict(zip(header, fields, strict=True))


def _fields(path: Path, reader: Any, hint: str) -> Iterator[tuple[str, list[str]]]:
    """Each row that is not blank, with the line it begins on."""
    while True:
        # The limit is one for the whole process, and other libraries set it too.
        csv.field_size_limit(MAX_FIELD_CHARS)
        where = f"{path}, line {reader.line_num + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"not a row of a table: {error}", where=where, hint=hint) from None
        if fields:
            yield where, fields


def _parquet_rows(path: Path, expected: _Expected) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            expected.check(names, path)
            number = 0
            for batch in file.iter_batches(
                batch_size=1024, columns=[name for name in expected.columns if name in names]
            ):
                for index in range(batch.num_rows):
                    number += 1
                    where = f"{path}, row {number}"
                    try:
                        (row,) = batch.slice(index, 1).to_pylist()
                    except UnicodeDecodeError:
                        raise DataError("not UTF-8 text", where=where) from None
                    yield where, row
    except pyarrow.ArrowException as error:
        raise DataError(f"not a Parquet file that can be read ({type(error).__name__})", where=path) from None


def _text_rows(path: Path, expected: _Expected) -> Iterator[tuple[object, Row]]:
    text = "".join(line for _, line in _lines(path)).replace("\r\n", "\n")
    if text:
        yield path, {expected.data.text: text}


_PLAIN_TEXT = (".md", ".txt")

_READERS: dict[str, Callable[[Path, _Expected], Iterable[tuple[object, Row]]]] = {
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".parquet": _parquet_rows,
    ".tsv": _tsv_rows,
    **dict.fromkeys(_PLAIN_TEXT, _text_rows),
}
