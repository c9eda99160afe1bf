"""Public text as token windows: what a model's owner compresses, distils and judges an emulator with.

Nothing here comes from a client. Documents are read (`read`), tokenised once and cut into windows, of which some are
held out (`prepare`). Ids are kept as 32-bit arrays and become int64 tensors one batch at a time, for training
(`batches`) or once each in their order (`in_order`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from farfield.protocols.durable import write
from farfield.protocols.errors import DataError
from farfield.protocols.seeds import derive

from . import stdlib
from .backbone import BUILTIN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIMIT: Final = 4_000_000
"""Tokens that are taken where nobody says how many: some 16 MB of English, 16 MB in memory."""

MAX_BYTES: Final = 512 << 20
"""The most that is read, as all documents are in memory until they are tokenised."""

MIN_TOKENS: Final = 8
"""What is left at the end of a stream of tokens is a window only if it has this many."""

_PIECE_CHARS: Final = 1 << 20
"""A longer document is tokenised piece by piece, for what a tokenizer notes down is many times the size of the text."""

_PLAIN: Final = frozenset({".txt", ".md", ".rst", ".py"})
_JSON: Final = frozenset({".json", ".jsonl", ".ndjson"})

Ids: TypeAlias = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Windows of tokens, one behind the other in one array.

    Attributes:
        tokens: int32[total].
        bounds: int64[count + 1], rising from 0 to total; window i is `tokens[bounds[i] : bounds[i + 1]]`.
        pad_id: what the shorter windows of a batch are filled up with.
    """

    tokens: Ids
    bounds: NDArray[np.int64]
    pad_id: int

    @classmethod
    def of(cls, pieces: Sequence[Ids], pad_id: int) -> Self:
        """One window for each of `pieces`, none of which is empty."""
        bounds = np.array([0, *accumulate(map(len, pieces))], dtype=np.int64)
        return cls(np.concatenate([np.empty(0, np.int32), *pieces]), bounds, pad_id)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Ids:
        """int32[length], a view. Raises IndexError outside 0 … count - 1."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.tokens[self.bounds[index] : self.bounds[index + 1]]

    def __iter__(self) -> Iterator[Ids]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True, slots=True, eq=False)
class PublicText:
    """Windows to make an emulator with, and those held out to judge it by. Made by `prepare`; never changed."""

    train: Windows
    held_out: Windows

    def save(self, path: Path) -> None:
        """Write all of it to one safetensors file, which appears complete or not at all.

        Raises:
            DataError: the disk refuses.
        """
        arrays: dict[str, NDArray[Any]] = {}
        for name, windows in (("train", self.train), ("held_out", self.held_out)):
            arrays |= {f"{name}.tokens": windows.tokens, f"{name}.bounds": windows.bounds}
        try:
            write(path, save(arrays, metadata={"pad_id": str(self.train.pad_id)}))
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror}", where=path) from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` has written to `path`.

        Raises:
            DataError: there is no such file, or it holds something else.
        """
        try:
            with safe_open(path, "numpy") as file:
                pad_id = int(file.metadata()["pad_id"])
                train, held_out = (
                    _checked(file.get_tensor(f"{name}.tokens"), file.get_tensor(f"{name}.bounds"), pad_id)
                    for name in ("train", "held_out")
                )
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            hint = "Take it away, and the text is prepared anew."
            raise DataError("no public text, or a damaged one", where=path, hint=hint) from None
        return cls(train, held_out)


def _checked(tokens: NDArray[Any], bounds: NDArray[Any], pad_id: int) -> Windows:
    if tokens.dtype != np.int32 or bounds.dtype != np.int64 or not tokens.ndim == bounds.ndim == 1:
        raise ValueError("arrays of another kind")
    if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(tokens) or (np.diff(bounds) <= 0).any():
        raise ValueError("bounds of other windows")
    return Windows(tokens, bounds, pad_id)


def read(path: Path | None, backbone_name: str) -> list[str]:
    """Documents of public text, none of them blank.

    A file is one document, a JSON file has one in the "text" of the object on each line. A folder is read recursively
    in the order of its files' paths: `.txt`, `.md`, `.rst`, `.py`, and the lines of `.jsonl`, `.ndjson` and `.json`;
    hidden files and files of other kinds are passed over. A single file of another kind is read as plain text.

    Args:
        path: a file or a folder; None for the builtin backbone: the standard library without its tests, and without
            what the clients of a demonstration hold.
        backbone_name: the Plan's `model.backbone`.

    Raises:
        DataError: there is nothing to read, or it is not UTF-8 text, not JSON as described, or more than `MAX_BYTES`.
            Names the file with its line.
    """
    if path is None:
        if backbone_name.startswith(BUILTIN):
            return [source.text for source in stdlib.sources(of_clients=False, tests=False)]
        hint = "Give --data TEXT, a file or a folder of public text of the kind that the clients hold."
        raise DataError("an emulator of this backbone is made with text, and none was given", hint=hint)
    file = path
    documents: list[str] = []
    try:
        files = _files(path)
        size = sum(one.stat().st_size for one in files)
        if size > MAX_BYTES:
            what = f"holds {size / 2**20:,.0f} MiB of text, and at most {MAX_BYTES >> 20} are read"
            raise DataError(what, where=path, hint=f"Give a part of it: {LIMIT:,} tokens are plenty.")
        for file in files:
            text = _text(file)
            documents += _json_texts(text, file) if file.suffix.lower() in _JSON else [text]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=file) from None
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise DataError("holds no text", where=path, hint="Add some.")
    return documents


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError("no such file or folder", where=path, hint="Give the path of public text.")
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in _PLAIN | _JSON
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        kinds = ", ".join(sorted(_PLAIN | _JSON))
        raise DataError("the folder holds no text", where=path, hint=f"Looked for {kinds} files.")
    return found


def _text(file: Path) -> str:
    raw = file.read_bytes()
    if b"\0" in raw:
        hint = "UTF-16 is not read; save it as UTF-8, or take it away if it is no text."
        raise DataError("holds a NUL byte", where=_line(file, raw, raw.index(0)), hint=hint)
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        hint = "Save the file as UTF-8, or take it away if it is no text."
        raise DataError("not UTF-8 text", where=_line(file, raw, error.start), hint=hint) from None


def _line(file: Path, raw: bytes, offset: int) -> str:
    return f"{file}, line {raw.count(10, 0, offset) + 1}"


def _json_texts(text: str, file: Path) -> Iterator[str]:
    hint = 'Each line should be one JSON object with a "text", such as {"text": "…"}.'
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError("not JSON that can be read", where=where, hint=hint) from None
        found = row.get("text") if isinstance(row, dict) else None
        if not isinstance(found, str):
            raise DataError("no text", where=where, hint=hint)
        try:
            found.encode()
        except UnicodeEncodeError:
            raise DataError("the text holds half of a surrogate pair", where=where) from None
        yield found


def prepare(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str,
    max_length: int,
    held_out: float = 0.1,
    seed: int = 0,
    limit: int = LIMIT,
) -> PublicText:
    """Windows of at most `max_length` tokens, the same for the same arguments.

    * For "causal-lm" the documents' tokens make one stream, each document preceded by the tokenizer's beginning-of-text
      token, or its end-of-text token where it has no other, and the stream is cut every `max_length` tokens. Its end is
      a window of its own if it has `MIN_TOKENS`.
    * For "sequence-classification" each line that is not blank is a window: what the tokenizer makes of it, special
      tokens included, cut to `max_length`. A window that was there before is left out.

    A document that is there twice is taken once. Whole documents are held out, drawn so that their tokens come near to
    the share. Where that cannot be, as with a single document or with a few long ones, windows are drawn instead.

    Args:
        task: "causal-lm" or "sequence-classification".
        documents: taken in an order drawn from `seed` until there are `limit` tokens; the rest is not looked at.
        held_out: share of the tokens, at least 0 and below 1. Where it is not 0, either side has a window or more.

    Raises:
        DataError: too little text.
    """
    pad_id: Any = tokenizer.pad_token_id
    taken = list(_taken(documents, tokenizer, task, max_length, limit, seed))

    def cut(chosen: Iterable[list[Ids]]) -> list[Ids]:
        pieces = [piece for document in chosen for piece in document]
        return _stream(pieces, max_length) if task == "causal-lm" else pieces

    held = _held_out([sum(map(len, document)) for document in taken], held_out)
    train = cut(document for index, document in enumerate(taken) if index not in held)
    judged = cut(taken[index] for index in sorted(held))
    if held_out > 0 and not (train and judged):
        windows = cut(taken)
        count = min(max(round(held_out * len(windows)), 1), len(windows) - 1)
        drawn = set(random.Random(derive(seed, "windows")).sample(range(len(windows)), max(count, 0)))
        train = [window for index, window in enumerate(windows) if index not in drawn]
        judged = [windows[index] for index in sorted(drawn)]
    if not train or (held_out > 0 and not judged):
        what = f"makes too few windows of at most {max_length} tokens: {len(train)} to train on, {len(judged)} held out"
        raise DataError(what, where="the public text", hint="Give more text with --data.")
    return PublicText(Windows.of(train, pad_id), Windows.of(judged, pad_id))


def _taken(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, task: str, max_length: int, limit: int, seed: int
) -> Iterator[list[Ids]]:
    """For each document, in a drawn order, its pieces: parts of a stream or windows. Ends at `limit` tokens."""
    order = list(dict.fromkeys(documents))
    random.Random(derive(seed, "documents")).shuffle(order)
    seen: set[bytes] = set()
    for document in order:
        pieces: list[Ids] = []
        encoded = _parts(document, tokenizer) if task == "causal-lm" else _lines(document, tokenizer, max_length, seen)
        for piece in encoded:
            pieces.append(piece[:limit] if task == "causal-lm" else piece)
            limit -= len(pieces[-1])
            if limit <= 0:
                break
        if pieces:
            yield pieces
        if limit <= 0:
            return


def _parts(document: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Ids]:
    """The token that precedes a document, then the tokens of the document, in parts of bounded size."""
    before: Any = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if before is not None:
        yield np.array([before], dtype=np.int32)
    start = 0
    while start < len(document):
        stop = start + _PIECE_CHARS
        if stop < len(document):
            # Before white space, where most tokenizers divide a text anyhow.
            found = max(document.rfind("\n", start, stop), document.rfind(" ", start, stop))
            stop = found if found > start else stop
        ids = tokenizer(document[start:stop], add_special_tokens=False, verbose=False)["input_ids"]
        yield np.array(ids, dtype=np.int32)
        start = stop


def _lines(document: str, tokenizer: PreTrainedTokenizerBase, max_length: int, seen: set[bytes]) -> Iterator[Ids]:
    for line in document.splitlines():
        if not line.strip():
            continue
        ids = tokenizer(line.strip(), truncation=True, max_length=max_length, verbose=False)["input_ids"]
        window = np.array(ids, dtype=np.int32)
        if ids and (digest := window.tobytes()) not in seen:
            seen.add(digest)
            yield window


def _stream(pieces: list[Ids], length: int) -> list[Ids]:
    stream = np.concatenate([np.empty(0, np.int32), *pieces])
    windows = [stream[start : start + length] for start in range(0, len(stream), length)]
    return [window for window in windows if len(window) >= min(MIN_TOKENS, length)]


def _held_out(sizes: Sequence[int], share: float) -> set[int]:
    """Which documents, of so many tokens each, are held out: in their order, each that brings the sum nearer."""
    wanted, total, chosen = share * sum(sizes), 0, set()
    for index, size in enumerate(sizes):
        if total + size / 2 <= wanted:
            total += size
            chosen.add(index)
    return chosen


def batches(windows: Windows, batch_size: int, *, seed: int, step: int) -> dict[str, torch.Tensor]:
    """Batch number `step`, from 0, of an endless row of them: it depends on nothing but the arguments.

    Every window comes once before any comes again, in an order that is another every time.

    Returns:
        input_ids: int64[batch_size, length], filled up on the right with `pad_id` to the longest of the batch.
        attention_mask: int64[batch_size, length], 1 for tokens and 0 for padding.
    """
    first, count = step * batch_size, len(windows)
    epochs = range(first // count, (first + batch_size - 1) // count + 1)
    # From one epoch to the next, as a batch may reach over the end of one.
    orders = [np.random.default_rng(derive(seed, "epoch", epoch)).permutation(count) for epoch in epochs]
    start = first - epochs[0] * count
    return _padded(windows, np.concatenate(orders)[start : start + batch_size].tolist())


def in_order(windows: Windows, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Every window once, in batches as `batches` makes them, the last one perhaps smaller."""
    for start in range(0, len(windows), batch_size):
        yield _padded(windows, range(start, min(start + batch_size, len(windows))))


def _padded(windows: Windows, indices: Sequence[int]) -> dict[str, torch.Tensor]:
    rows = [windows[index] for index in indices]
    ids = np.full((len(rows), max(map(len, rows))), windows.pad_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, window in enumerate(rows):
        ids[row, : len(window)] = window
        mask[row, : len(window)] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
