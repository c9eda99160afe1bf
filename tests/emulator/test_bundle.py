"""Bundles: a manifest says exactly what a folder holds, and one that comes from outside is believed in nothing."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farfield.emulator import backbone, bundle
from farfield.emulator.bundle import MIN_CHUNK_BYTES, Manifest, damaged, describe
from farfield.protocols.errors import BundleError

CHUNK = MIN_CHUNK_BYTES
NAMES = ("config.json", "model.safetensors", "tokenizer.json", "merges.txt", "tokenizer.model", "chat_template.jinja")

folders = st.dictionaries(
    st.sampled_from(NAMES),
    st.integers(0, 4 * CHUNK).flatmap(lambda size: st.randoms().map(lambda r: r.randbytes(size))),
).filter(bool)


def make(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def document(**changes: Any) -> dict[str, Any]:
    file = {"path": "model.safetensors", "bytes": CHUNK + 1, "chunks": ["ab" * 32, "cd" * 32]}
    return {"format": 1, "kind": "backbone", "chunk_bytes": CHUNK, "files": [file | changes.pop("file", {})]} | changes


def raw(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def complaint(content: bytes) -> str:
    with pytest.raises(BundleError) as caught:
        Manifest.parse(content)
    return str(caught.value)


# What is made


@given(folders)
def test_a_manifest_finds_every_byte_and_comes_back_as_it_was(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make(Path(name), **files)
        manifest = describe(folder, chunk_bytes=CHUNK)
        assert Manifest.parse(manifest.canonical()) == manifest
        assert manifest.digest == hashlib.sha256(manifest.canonical()).hexdigest()
        assert manifest.size == sum(map(len, files.values()))
        found: dict[str, bytes] = {file.path: b"" for file in manifest.files}
        for index in range(manifest.chunks):
            place = manifest.place(index)
            assert len(found[place.file.path]) == place.offset
            found[place.file.path] += manifest.read_chunk(folder, index)
        assert found == files
        assert damaged(folder, manifest) == []


@given(folders.filter(lambda files: any(files.values())), st.data())
def test_damage_is_found_where_it_is(files: dict[str, bytes], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make(Path(name), **files)
        manifest = describe(folder, chunk_bytes=CHUNK)
        index = data.draw(st.integers(0, manifest.chunks - 1))
        place = manifest.place(index)
        at = place.offset + data.draw(st.integers(0, place.size - 1))
        content = bytearray(files[place.file.path])
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        (folder / place.file.path).write_bytes(content)
        assert damaged(folder, manifest) == [index]
        with pytest.raises(BundleError, match="changed since the bundle was made"):
            manifest.read_chunk(folder, index)


def test_what_is_missing_or_cut_is_damaged(tmp_path: Path) -> None:
    manifest = describe(
        make(tmp_path, **{"config.json": b"{}", "model.safetensors": bytes(3 * CHUNK)}), chunk_bytes=CHUNK
    )
    (tmp_path / "model.safetensors").write_bytes(bytes(CHUNK + 1))
    assert damaged(tmp_path, manifest) == [2, 3]
    (tmp_path / "config.json").unlink()
    assert damaged(tmp_path, manifest) == [0, 2, 3]
    with pytest.raises(BundleError, match="cannot be read"):
        manifest.read_chunk(tmp_path, 0)


def test_chunks_have_numbers_from_0_to_the_last(tmp_path: Path) -> None:
    manifest = describe(make(tmp_path, **{"config.json": b"{}"}), chunk_bytes=CHUNK)
    for index in (-1, 1, 2**63):
        with pytest.raises(IndexError):
            manifest.place(index)


def test_it_covers_what_the_fingerprint_covers(tmp_path: Path) -> None:
    """The same files decide both names of a backbone: neither lets something pass that the other would notice."""
    candidates = [
        *NAMES,
        "model.safetensors.index.json",
        "vocab.txt",
        "README.md",
        "modeling.py",
        "model.bin",
        "a.json",
    ]
    candidates += ["other.safetensors", "generation_config.json", "optimizer.pt", "training.json"]
    make(tmp_path, **dict.fromkeys(candidates, b"1"))
    manifest, fingerprint = describe(tmp_path), backbone.fingerprint(tmp_path)
    covered = {file.path for file in manifest.files}
    assert covered < set(candidates)
    for name in candidates:
        (tmp_path / name).write_bytes(b"2")
        assert (describe(tmp_path) != manifest) == (backbone.fingerprint(tmp_path) != fingerprint) == (name in covered)
        (tmp_path / name).write_bytes(b"1")


def test_pickle_and_code_never_go_in(tmp_path: Path) -> None:
    make(tmp_path, **{"pytorch_model.bin": b"x", "modeling_x.py": b"x"})
    with pytest.raises(BundleError, match="no model files"):
        describe(tmp_path)


def test_what_cannot_be_described_is_said(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such file"):
        describe(tmp_path / "nowhere")
    make(tmp_path, **{"modèle.safetensors": b"x"})
    with pytest.raises(BundleError, match="a path that no bundle may have"):
        describe(tmp_path)


def test_it_needs_no_torch() -> None:
    code = "import sys, farfield.emulator.bundle; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


# What comes from outside


def test_the_document_of_these_tests_is_a_manifest() -> None:
    assert Manifest.parse(raw(document())).chunks == 2


@pytest.mark.parametrize(
    "path",
    [
        *("", "/etc/x.json", "../x.json", "a/../x.json", "a/./x.json", "./x.json", "a//x.json", "a/", "a/x.json/"),
        *("C:/x.json", "C:x.json", "a\\x.json", "\\\\host\\x.json", "x.json\0", "a\nx.json", " x.json", "x.json "),
        *(
            ".json",
            ".hidden.json",
            "~/x.json",
            "é.json",
            "e\u0301.json",
            "x\u202e.json",
            "a" * 251 + ".json",
        ),
    ],
)
def test_a_path_that_could_leave_the_folder_is_refused(path: str) -> None:
    assert "path that no bundle may have" in complaint(raw(document(file={"path": path})))


@pytest.mark.parametrize("path", ["con.json", "NUL.json", "a/Aux.x.json", "com1.txt", "LPT9.safetensors"])
def test_a_device_is_refused(path: str) -> None:
    assert "names a device" in complaint(raw(document(file={"path": path})))


@pytest.mark.parametrize("path", ["x.py", "x.bin", "x.pt", "x.pkl", "x.so", "x", "x.json.py", "x.JSON", "x.json."])
def test_a_file_that_could_be_code_is_refused(path: str) -> None:
    assert "of a kind that bundles never carry" in complaint(raw(document(file={"path": path})))


@pytest.mark.parametrize(
    ("paths", "what"),
    [
        (["a.json", "a.json"], "two files of one name"),
        (["A.json", "a.json"], "two files of one name"),
        (["x/B.json", "x/b.json"], "two files of one name"),
        (["a.json", "a.json/b.json"], "both as a file and as a folder"),
        (["A.json", "a.json/b.json"], "both as a file and as a folder"),
        (["b.json", "a.json"], "in order"),
    ],
)
def test_files_that_would_collide_are_refused(paths: list[str], what: str) -> None:
    files = [{"path": path, "bytes": 1, "chunks": ["ab" * 32]} for path in paths]
    assert what in complaint(raw(document(files=files)))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"format": 2}, "format 2, and this Farfield reads 1. Update Farfield."),
        ({"format": True}, "canonical"),
        ({"kind": "program"}, "of kind 'program'"),
        ({"kind": 7}, "of kind 7"),
        ({"chunk_bytes": 0}, "chunks of"),
        ({"chunk_bytes": CHUNK - 1}, "chunks of"),
        ({"chunk_bytes": bundle.MAX_CHUNK_BYTES + 1}, "chunks of"),
        ({"chunk_bytes": True}, "chunks of"),
        ({"chunk_bytes": float(CHUNK)}, "chunks of"),
        ({"chunk_bytes": "4096"}, "chunks of"),
        ({"files": {}}, "files"),
        ({"files": [7]}, "exactly: path, bytes, chunks"),
        ({"more": 1}, "exactly: format"),
        ({"file": {"more": 1}}, "exactly: path"),
        ({"file": {"path": 7}}, "proper name or size"),
        ({"file": {"bytes": -1}}, "proper name or size"),
        ({"file": {"bytes": True}}, "proper name or size"),
        ({"file": {"bytes": 2**70}}, "proper name or size"),
        ({"file": {"bytes": CHUNK}}, "2 chunks, which 4096 bytes do not have"),
        ({"file": {"bytes": 2 * CHUNK + 1}}, "chunks, which"),
        ({"file": {"bytes": 0}}, "chunks, which 0 bytes do not have"),
        ({"file": {"chunks": []}}, "0 chunks, which"),
        ({"file": {"chunks": "ab" * 32}}, "without a list"),
        ({"file": {"chunks": ["ab" * 32, "CD" * 32]}}, "without a SHA-256"),
        ({"file": {"chunks": ["ab" * 32, "cd" * 31]}}, "without a SHA-256"),
        ({"file": {"chunks": ["ab" * 32, 7]}}, "without a SHA-256"),
    ],
)
def test_what_contradicts_itself_is_refused(changes: dict[str, Any], what: str) -> None:
    assert what in complaint(raw(document(**changes)))


def test_only_the_canonical_bytes_count() -> None:
    good = raw(document())
    assert "canonical" in complaint(json.dumps(document(), sort_keys=True).encode())
    assert "canonical" in complaint(good.replace(b'"format":1', b'"format":1,"format":1'))
    assert "canonical" in complaint(good.replace(b'"format":1', b'"format":1.0'))
    assert "canonical" in complaint(good.replace(b"backbone", b"\\u0062ackbone"))
    assert "canonical" in complaint(good + b"\n")
    assert "not JSON" in complaint(good.decode().encode("utf-16"))


def test_too_much_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "bytes are allowed" not in complaint(b" " * 10)
    monkeypatch.setattr(bundle, "MAX_MANIFEST_BYTES", 100)
    assert "100 are allowed" in complaint(raw(document()))
    monkeypatch.undo()
    monkeypatch.setattr(bundle, "MAX_CHUNKS", 1)
    assert "at most 1 chunks" in complaint(raw(document()))
    monkeypatch.undo()
    monkeypatch.setattr(bundle, "MAX_FILES", 0)
    assert "at most 0 files" in complaint(raw(document()))
    assert "not JSON" in complaint(b"[" * 100_000)
    assert "not JSON" in complaint(b'{"format":' + b"9" * 5000 + b"}")


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_a_sentence(content: bytes) -> None:
    complaint(content)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(CHUNK) | st.just("ab" * 32),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(["format", "kind", "chunk_bytes", "files", "path", "bytes", "chunks"]), values)
def test_any_value_anywhere_is_a_manifest_or_refused(key: str, value: object) -> None:
    changed = document(file={key: value}) if key in ("path", "bytes", "chunks") else document(**{key: value})
    content = raw(changed)
    try:
        manifest = Manifest.parse(content)
    except BundleError:
        return
    assert manifest.canonical() == content
