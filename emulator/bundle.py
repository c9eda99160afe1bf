"""Content-addressed bundles: what a folder of model files holds, chunk by chunk, in one small document.

A bundle is named by the SHA-256 of its manifest, and the manifest has the SHA-256 of every chunk, so whoever knows the
name can verify each chunk by itself, from whomever it came. Chunks are numbered through all files, in the order of the
manifest; none spans two files. Only weights, configuration and tokenizer go in: never pickle, never code.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Final, Self

from farfield.protocols.errors import BundleError

from .backbone import _CONFIG, _INDEX, _TOKENIZER
from .layout import LAYOUT, is_emulator

KINDS: Final = ("backbone", "emulator")

OWNER_ONLY: Final = "OWNER_ONLY"
"""A file of this name beside a backbone's weights, whatever is in it, keeps the backbone from ever being bundled."""

CHUNK_BYTES: Final = 4 << 20
"""How long chunks are made; chosen by measuring, see `benchmarks/bundles.py`."""

MIN_CHUNK_BYTES: Final = 4 << 10
MAX_CHUNK_BYTES: Final = 8 << 20
MAX_MANIFEST_BYTES: Final = 12 << 20
MAX_CHUNKS: Final = 150_000
MAX_FILES: Final = 4096
MAX_PATH: Final = 255
SUFFIXES: Final = frozenset({".json", ".safetensors", ".txt", ".model", ".jinja"})

_FORMAT: Final = 1
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*")
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")
"""Names that some systems take for devices, in whatever folder they stand."""


@dataclass(frozen=True, slots=True)
class File:
    """One file: its path below the bundle's folder, its size in bytes, the SHA-256 of each of its chunks."""

    path: str
    size: int
    chunks: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where one chunk lies, and what it must be."""

    file: File
    offset: int
    size: int
    digest: bytes

    def holds(self, data: bytes | memoryview) -> bool:
        """Whether `data` is this chunk."""
        return len(data) == self.size and hashlib.sha256(data).digest() == self.digest

    def __str__(self) -> str:
        return f"{self.file.path}, bytes {self.offset} to {self.offset + self.size}"


@dataclass(frozen=True)
class Manifest:
    """What a bundle is made of. Made by `describe` or `parse`, which check it, never by hand."""

    kind: str
    chunk_bytes: int
    files: tuple[File, ...]

    @classmethod
    def parse(cls, raw: bytes) -> Self:
        """The manifest in `raw`, which may come from anyone.

        Only the canonical bytes are accepted, so a manifest has one digest and no second meaning: no keys twice, no
        other order, no other spelling of a number.

        Raises:
            BundleError: anything else.
        """
        if len(raw) > MAX_MANIFEST_BYTES:
            raise _bad(f"is of {len(raw)} bytes; {MAX_MANIFEST_BYTES} are allowed")
        try:
            document = json.loads(raw.decode())
        except (ValueError, RecursionError):
            raise _bad("is not JSON") from None
        fields = _fields(document, "format", "kind", "chunk_bytes", "files")
        if fields["format"] != _FORMAT:
            raise _bad(f"has format {fields['format']!r}, and this Farfield reads {_FORMAT}", "Update Farfield.")
        if not isinstance(fields["files"], list) or len(fields["files"]) > MAX_FILES:
            raise _bad(f"must list at most {MAX_FILES} files")
        manifest = cls(fields["kind"], fields["chunk_bytes"], tuple(map(_file, fields["files"])))
        manifest._check()
        if manifest.canonical() != raw:
            raise _bad("is not in canonical form")
        return manifest

    def canonical(self) -> bytes:
        """The bytes that are digested: sorted, compact JSON."""
        document = {
            "format": _FORMAT,
            "kind": self.kind,
            "chunk_bytes": self.chunk_bytes,
            "files": [
                {"path": file.path, "bytes": file.size, "chunks": [chunk.hex() for chunk in file.chunks]}
                for file in self.files
            ],
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, in hexadecimal: the name of the bundle."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @cached_property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def chunks(self) -> int:
        """How many chunks there are; they are numbered from 0."""
        return self._ends[-1] if self._ends else 0

    @cached_property
    def _ends(self) -> list[int]:
        """For each file the number of the chunk after its last one."""
        return list(itertools.accumulate(len(file.chunks) for file in self.files))

    def place(self, index: int) -> Place:
        """Where chunk `index` lies. Raises IndexError when there is no such chunk."""
        if not 0 <= index < self.chunks:
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        file = self.files[number]
        within = index - self._ends[number] + len(file.chunks)
        offset = within * self.chunk_bytes
        return Place(file, offset, min(self.chunk_bytes, file.size - offset), file.chunks[within])

    def read_chunk(self, folder: Path, index: int) -> bytes:
        """Chunk `index` from the bundle's files in `folder`, verified.

        Raises:
            BundleError: the file cannot be read, or holds something else there.
        """
        place = self.place(index)
        try:
            descriptor = os.open(folder / place.file.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = pread(descriptor, place)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BundleError(
                f"cannot be read: {(error.strerror or str(error)).lower()}", where=folder / place.file.path
            ) from None
        if not place.holds(data):
            raise changed(place)
        return data

    def _check(self) -> None:
        """Raises BundleError unless every promise of the class holds."""
        if self.kind not in KINDS:
            raise _bad(f"is of kind {self.kind!r}; this Farfield knows {', '.join(KINDS)}", "Update Farfield.")
        if type(self.chunk_bytes) is not int or not MIN_CHUNK_BYTES <= self.chunk_bytes <= MAX_CHUNK_BYTES:
            raise _bad(f"must have chunks of {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} bytes")
        if len(self.files) > MAX_FILES or sum(len(file.chunks) for file in self.files) > MAX_CHUNKS:
            raise _bad(f"may have at most {MAX_FILES} files and {MAX_CHUNKS} chunks", "Make larger chunks.")
        for file in self.files:
            _check_path(file.path)
            if len(file.chunks) != -(-file.size // self.chunk_bytes):
                raise _bad(f"gives {file.path!r} {len(file.chunks)} chunks, which {file.size} bytes do not have")
        paths = [file.path for file in self.files]
        if paths != sorted(paths):
            raise _bad("does not list its files in order")
        # On a file system that knows no case, or where a name stands for a file and for a folder, one file would
        # overwrite another.
        folded = [path.casefold() for path in paths]
        if len(set(folded)) < len(folded):
            raise _bad("has two files of one name")
        folders = {str(parent) for path in folded for parent in PurePosixPath(path).parents}
        if clash := folders & set(folded):
            raise _bad(f"has {min(clash)!r} both as a file and as a folder")


def describe(folder: Path, kind: str = "backbone", *, chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    """The manifest of the model in `folder`: the files that `backbone.fingerprint` covers, an emulator's record, and
    no others.

    Reads every byte once, a chunk at a time. All that is shipped has a manifest, so this is where a backbone that is
    its owner's only is held back.

    Raises:
        BundleError: a file cannot be read, changed meanwhile, or has a name that a bundle cannot carry; or the folder
            is not of this kind, or marked `OWNER_ONLY`.
    """
    if is_emulator(folder) != (kind == "emulator"):
        what = "holds an emulator" if is_emulator(folder) else "holds no emulator"
        raise BundleError(f"{what}, and is to be shipped as a{'n' if kind == 'emulator' else ''} {kind}", where=folder)
    if kind == "backbone" and (folder / OWNER_ONLY).exists():
        raise BundleError(
            f"the backbone is marked {OWNER_ONLY}: it never leaves its owner",
            where=folder,
            hint='Ship an emulator of it: delivery.kind = "emulator".',
        )
    names = {_CONFIG, _INDEX, LAYOUT, "generation_config.json"} | _TOKENIZER
    try:
        found = sorted(one.name for one in folder.iterdir() if one.name in names or one.suffix == ".safetensors")
        files = tuple(_describe_file(folder, name, chunk_bytes) for name in found)
    except OSError as error:
        raise BundleError(
            f"cannot be read: {(error.strerror or str(error)).lower()}", where=error.filename or folder
        ) from None
    if not files:
        raise BundleError("holds no model files", where=folder, hint="Give the path of a local model folder.")
    manifest = Manifest(kind, chunk_bytes, files)
    manifest._check()
    return manifest


def damaged(folder: Path, manifest: Manifest) -> list[int]:
    """The numbers of the chunks that `folder` lacks or holds wrongly, in order. Files are streamed."""
    wrong: list[int] = []
    first = 0
    for file in manifest.files:
        numbers = range(first, first + len(file.chunks))
        try:
            descriptor = os.open(folder / file.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            wrong += numbers
        else:
            try:
                wrong += [number for number in numbers if not intact(descriptor, manifest.place(number))]
            finally:
                os.close(descriptor)
        first += len(file.chunks)
    return wrong


def intact(descriptor: int, place: Place) -> bool:
    """Whether the open file holds the chunk where it belongs; what cannot be read is not intact."""
    try:
        return place.holds(pread(descriptor, place))
    except OSError:
        return False


def pread(descriptor: int, place: Place) -> bytes:
    """What lies at `place` of the open file; shorter where the file ends. Raises OSError."""
    data = os.pread(descriptor, place.size, place.offset)
    while len(data) < place.size and (more := os.pread(descriptor, place.size - len(data), place.offset + len(data))):
        data += more
    return data


def changed(place: Place) -> BundleError:
    return BundleError(
        f"changed since the bundle was made, at bytes {place.offset} to {place.offset + place.size}",
        where=place.file.path,
        hint="Put the original file back.",
    )


def _describe_file(folder: Path, name: str, chunk_bytes: int) -> File:
    with (folder / name).open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digests = tuple(hashlib.sha256(data).digest() for data in _pieces(file.fileno(), size, chunk_bytes))
        if os.fstat(file.fileno()).st_size != size:
            raise BundleError("changed while it was read", where=folder / name, hint="Try again when it is complete.")
    return File(name, size, digests)


def _pieces(descriptor: int, size: int, chunk_bytes: int) -> Iterator[bytes]:
    for offset in range(0, size, chunk_bytes):
        place = Place(File("", size, ()), offset, min(chunk_bytes, size - offset), b"")
        yield pread(descriptor, place)


def _check_path(path: str) -> None:
    """Raises BundleError unless the path is plain, relative, and of a kind of file that holds no code."""
    parts = path.split("/")
    if len(path) > MAX_PATH or not all(_PART.fullmatch(part) for part in parts):
        raise _bad(f"names a path that no bundle may have: {path[:MAX_PATH]!r}")
    if any(_DEVICE.fullmatch(part.casefold()) for part in parts):
        raise _bad(f"names a device: {path!r}")
    if PurePosixPath(path).suffix not in SUFFIXES:
        raise _bad(f"has a file of a kind that bundles never carry: {path!r}", f"Only {', '.join(sorted(SUFFIXES))}.")


def _file(document: Any) -> File:
    fields = _fields(document, "path", "bytes", "chunks")
    path, size, chunks = fields["path"], fields["bytes"], fields["chunks"]
    if not isinstance(path, str) or type(size) is not int or not 0 <= size <= MAX_CHUNKS * MAX_CHUNK_BYTES:
        raise _bad("has a file without a proper name or size")
    if not isinstance(chunks, list) or len(chunks) > MAX_CHUNKS:
        raise _bad(f"has a file without a list of at most {MAX_CHUNKS} chunks")
    return File(path, size, tuple(map(_digest, chunks)))


def _digest(text: Any) -> bytes:
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{64}", text):
        raise _bad("has a chunk without a SHA-256")
    return bytes.fromhex(text)


def _fields(document: Any, *keys: str) -> dict[str, Any]:
    if not isinstance(document, dict) or document.keys() != set(keys):
        raise _bad(f"must have objects of exactly: {', '.join(keys)}")
    return document


def _bad(what: str, hint: str = "") -> BundleError:
    return BundleError(f"the manifest {what}", where="bundle", hint=hint)
