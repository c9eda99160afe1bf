"""The cache: whatever happens on the way or on the disk, it gives what was promised, and fetches nothing twice."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from certificates import Pair
from serving import LIMITS, Serving, Wire, serving

from farfield.coordinator.federation import Federation
from farfield.coordinator.shipping import Source
from farfield.edge_client import download
from farfield.edge_client.bundles import Cache
from farfield.emulator.bundle import MIN_CHUNK_BYTES, Manifest, damaged, describe
from farfield.protocols import federation_pb2 as wire
from farfield.protocols.chunks import serialized
from farfield.protocols.errors import BundleError, FarfieldError, TrustError, Unreachable

CHUNK = MIN_CHUNK_BYTES
LARGE = 10**9


@dataclass
class Place:
    """A coordinator with bundles, and the cache of one of its nodes."""

    folder: Path
    serving: Serving
    pair: Pair
    channel: grpc.Channel
    asked: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    @property
    def cached(self) -> Path:
        return self.folder / "cache"

    def bundle(self, name: str = "model", chunks: int = 10) -> Manifest:
        """A bundle of that many chunks, the first of them in a file of its own."""
        model = self.folder / name
        model.mkdir()
        (model / "config.json").write_bytes(b"{}")
        (model / "model.safetensors").write_bytes(secrets.token_bytes((chunks - 1) * CHUNK - 7))
        manifest = describe(model, chunk_bytes=CHUNK)
        self.serving.memory.add(manifest, model)
        return manifest

    def cache(self, max_bytes: int = LARGE) -> Cache:
        return Cache(self.cached, max_bytes, self.said.append, self.pauses.append)

    def fetch(self, manifest: Manifest, channel: grpc.Channel | None = None) -> Path:
        """By a cache that has seen nothing yet, as in a new process; what it gives is right to the last byte."""
        path = self.cache().fetch(manifest.digest, channel or self.channel)
        model = self.serving.memory.bundles[manifest.digest].folder
        assert files(path) == files(model)
        return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    with serving() as it:
        ann = it.node("ann")
        with it.channel(ann) as channel:
            place = Place(tmp_path, it, ann, channel)
            wanted = Source.wanted

            def noted(self: Source, ranges: Any) -> list[int]:
                indices = wanted(self, ranges)
                place.asked += indices
                return indices

            monkeypatch.setattr(Source, "wanted", noted)
            yield place


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*")}


def shipped(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, bytes], bytes]) -> None:
    """From now on the coordinator sends what `change` makes of each chunk's number and serialised bytes."""
    read = Source.read
    monkeypatch.setattr(Source, "read", lambda self, index: change(index, read(self, index)))


def flipped(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


# What it gives


def test_a_bundle_is_fetched_once_and_verified_by_every_process(place: Place) -> None:
    manifest = place.bundle()
    steps: list[tuple[int, int]] = []
    cache = place.cache()
    path = cache.fetch(manifest.digest, place.channel, lambda done, total: steps.append((done, total)))
    assert path == place.cached / manifest.digest
    assert files(path) == files(place.folder / "model")
    assert place.asked == list(range(10))
    assert [total for _, total in steps] == [manifest.size] * 10
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == manifest.size
    with grpc.insecure_channel("localhost:1") as nowhere:
        assert cache.fetch(manifest.digest, nowhere) == path
        again: list[int] = []
        place.cache().fetch(manifest.digest, nowhere, lambda done, total: again.append(done))
        assert again[-1] == manifest.size
    assert (place.asked, place.said) == (list(range(10)), [])


def test_what_it_writes_is_for_its_owner_only(place: Place) -> None:
    place.fetch(place.bundle())
    for path in (place.cached, *place.cached.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("index", [0, 1, 5, 9])
def test_a_flipped_byte_in_the_cache_costs_its_chunk(place: Place, index: int) -> None:
    manifest = place.bundle()
    path = place.fetch(manifest)
    chunk = manifest.place(index)
    content = bytearray((path / chunk.file.path).read_bytes())
    content[chunk.offset + chunk.size // 2] ^= 64
    (path / chunk.file.path).write_bytes(content)
    place.asked.clear()
    place.fetch(manifest)
    assert place.asked == [index]


def test_whatever_else_was_done_to_the_folder_is_mended(place: Place, tmp_path: Path) -> None:
    manifest = place.bundle()
    path = place.fetch(manifest)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_bytes(b"not yours")
    weights = path / "model.safetensors"

    (path / "config.json").unlink()
    (path / "config.json").symlink_to(outside / "config.json")
    weights.write_bytes(weights.read_bytes()[: 3 * CHUNK + 1] + b"")
    (path / "modeling.py").write_text("import os")
    (path / "tokenizer_config.json").write_text("{}")
    (path / "link").symlink_to(outside)
    (path / "more" / "inside").mkdir(parents=True)
    (path / "more" / "inside" / "x.json").write_text("{}")
    os.mkfifo(path / "pipe")
    place.asked.clear()
    place.fetch(manifest)
    assert place.asked == [0, 4, 5, 6, 7, 8, 9]

    weights.write_bytes(weights.read_bytes() + b"more")
    (place.cached / f"{manifest.digest}.json").write_text("{}")
    place.asked.clear()
    place.fetch(manifest)
    assert place.asked == []

    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(outside)
    place.fetch(manifest)
    assert files(outside) == {"config.json": b"not yours"}
    assert not path.is_symlink()


def test_files_below_folders_are_placed_there(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flat = place.bundle()
    nested = replace(flat, files=tuple(replace(file, path=f"a/b/{file.path}") for file in flat.files))
    model = place.folder / "nested"
    (model / "a").mkdir(parents=True)
    (place.folder / "model").rename(model / "a" / "b")
    place.serving.memory.add(nested, model)
    place.cache().fetch(nested.digest, place.channel)
    outside = tmp_path / "outside"
    (place.cached / nested.digest / "a").rename(outside)
    (place.cached / nested.digest / "a").symlink_to(outside)
    before = files(outside / "b")
    place.cache().fetch(nested.digest, place.channel)
    assert damaged(place.cached / nested.digest, nested) == []
    assert files(outside / "b") == before
    assert not (place.cached / nested.digest / "a").is_symlink()


# What comes in


def test_a_byte_flipped_in_transit_costs_its_chunk(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = place.bundle()
    left = [3, 7]

    def once(index: int, raw: bytes) -> bytes:
        if index not in left:
            return raw
        left.remove(index)
        return flipped(raw)

    shipped(monkeypatch, once)
    place.fetch(manifest)
    assert place.asked == [*range(10), 3, 7]
    assert (
        place.said[0] == f"chunk 3 (model.safetensors, bytes {2 * CHUNK} to {3 * CHUNK}) arrived damaged; asking again"
    )


@pytest.mark.parametrize(
    "change",
    [
        flipped,
        lambda raw: b"",
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: raw + serialized(4, b"x"),
        lambda raw: serialized(5, wire.Chunk.FromString(raw).data),
        lambda raw: b"\xff" * 99,
    ],
)
def test_a_chunk_that_is_never_right_is_given_up(
    place: Place, monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes], bytes]
) -> None:
    manifest = place.bundle()
    shipped(monkeypatch, lambda index, raw: change(raw) if index == 4 else raw)
    words = rf"chunk 4 \(model.safetensors, bytes {3 * CHUNK} to {4 * CHUNK}\) arrived damaged 3 times"
    with pytest.raises(BundleError, match=words):
        place.fetch(manifest)
    assert place.asked == [*range(10), 4, 4]
    assert damaged(place.cached / manifest.digest, manifest) == [4]


def test_more_or_fewer_chunks_than_asked_for_are_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = place.bundle()
    wanted = Source.wanted
    with monkeypatch.context() as patch:
        patch.setattr(Source, "wanted", lambda self, ranges: [*wanted(self, ranges), 0])
        with pytest.raises(BundleError, match="sent more chunks than it was asked for"):
            place.fetch(manifest)
    (place.cached / manifest.digest / "config.json").write_bytes(b"??")
    with monkeypatch.context() as patch:
        patch.setattr(Source, "wanted", lambda self, ranges: wanted(self, ranges)[1:])
        with pytest.raises(BundleError, match="left out chunks"):
            place.fetch(manifest)


def described(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    """The coordinator gives this for a manifest, whatever it was asked for."""

    async def describe_bundle(*_: object) -> wire.BundleDescription:
        return wire.BundleDescription(manifest=raw)

    monkeypatch.setattr(Federation, "DescribeBundle", describe_bundle)


@pytest.mark.parametrize("path", ["../evil.json", "/tmp/evil.json", "a/../../evil.json"])
def test_a_path_that_leaves_the_folder_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str) -> None:
    content = b"evil"
    digest = hashlib.sha256(content).hexdigest()
    raw = (
        f'{{"chunk_bytes":{CHUNK},"files":[{{"bytes":4,"chunks":["{digest}"],"path":"{path}"}}],'
        '"format":1,"kind":"backbone"}'
    ).encode()
    described(monkeypatch, raw)
    with serving() as it, it.channel(it.node("ann")) as channel:
        cache = Cache(tmp_path / "cache", LARGE)
        with pytest.raises(BundleError, match="a path that no bundle may have"):
            cache.fetch(hashlib.sha256(raw).hexdigest(), channel)
    assert {path.name.partition(".")[2] for path in tmp_path.rglob("*") if path.is_file()} == {"", "use", "write"}


def test_another_manifest_than_the_digest_names_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[str] = []
    described(monkeypatch, b"{}")
    with serving() as it, it.channel(it.node("ann")) as channel:
        cache = Cache(tmp_path / "cache", LARGE, said.append)
        with pytest.raises(BundleError, match=r"bundle abababababababab…: the manifest arrived damaged 3 times"):
            cache.fetch("ab" * 32, channel)
    assert said == ["the manifest arrived damaged; asking again"] * 3


@pytest.mark.parametrize("digest", ["", "..", "../" + "a" * 61, "AB" * 32, "ab" * 31, "ab" * 32 + "\n"])
def test_what_is_no_digest_is_refused(place: Place, digest: str) -> None:
    with pytest.raises(BundleError, match="no digest"):
        place.cache().fetch(digest, place.channel)
    assert not place.cached.exists()


# When the coordinator is not there, or says no


def test_a_cut_connection_costs_nothing_that_was_verified(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = place.bundle(chunks=200)
    cuts = {40, 120}
    with Wire(place.serving.services.federation_port) as line:

        def cut(index: int, raw: bytes) -> bytes:
            if index in cuts:
                cuts.remove(index)
                line.drop()
            return raw

        shipped(monkeypatch, cut)
        verified: list[int] = []
        with place.serving.channel(place.pair, port=line.port) as channel:
            known = place.cache()
            known.fetch(manifest.digest, channel, lambda done, total: verified.append(done))
    assert damaged(place.cached / manifest.digest, manifest) == []
    assert len(verified) == 200, "each chunk was verified once"
    assert not cuts
    assert len(place.said) == len(place.pauses) >= 1
    assert all("the coordinator did not go on" in said and "trying again in" in said for said in place.said)


def test_a_coordinator_that_is_away_is_asked_with_growing_pauses_and_then_no_more(place: Place) -> None:
    with grpc.insecure_channel("localhost:1") as nowhere, pytest.raises(Unreachable, match=r"\(8 times\)\. What was"):
        place.cache().fetch("ab" * 32, nowhere)
    assert len(place.pauses) == download.ATTEMPTS - 1
    assert 0.3 < place.pauses[0] < 0.7
    assert all(later > earlier for earlier, later in zip(place.pauses[:5], place.pauses[1:6], strict=True))
    assert max(place.pauses) < 40
    assert "Connection refused" in place.said[0]


def test_whoever_is_asked_to_stop_stops(place: Place) -> None:
    class Stop(Exception):
        pass

    def pause(seconds: float) -> None:
        raise Stop

    with grpc.insecure_channel("localhost:1") as nowhere, pytest.raises(Stop):
        Cache(place.cached, LARGE, pause=pause).fetch("ab" * 32, nowhere)


def test_what_the_coordinator_refuses_is_not_tried_again(place: Place) -> None:
    manifest = place.bundle()
    place.serving.memory.fetchable.clear()
    with pytest.raises(BundleError, match="the coordinator: No run that is queued or running uses bundle"):
        place.fetch(manifest)
    place.serving.memory.revoke("ann", "stolen", place.serving.memory.nodes["ann"].enrolled_at)
    with pytest.raises(TrustError, match=r"the coordinator: Node 'ann' was revoked on .*: stolen"):
        place.fetch(manifest)
    assert place.pauses == []


def test_a_damaged_file_at_the_coordinator_is_said(place: Place) -> None:
    manifest = place.bundle()
    (place.folder / "model" / "config.json").write_bytes(b"??")
    with pytest.raises(BundleError, match=r"the coordinator: config\.json: changed since the bundle was made"):
        place.fetch(manifest)


def test_one_that_may_not_call_so_often_waits(tmp_path: Path) -> None:
    with serving(replace(LIMITS, rate=4, burst=1)) as it:
        ann = it.node("ann")
        with it.channel(ann) as channel:
            place = Place(tmp_path, it, ann, channel)
            manifest = place.bundle()
            Cache(place.cached, LARGE, place.said.append).fetch(manifest.digest, channel)
    assert damaged(place.cached / manifest.digest, manifest) == []
    assert "Too many calls from ann: try again in 0." in place.said[0]


# Room


def test_what_is_too_large_is_refused_before_it_is_fetched(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = place.bundle()
    with pytest.raises(BundleError, match=r"it has 0\.0 MB, and the cache may hold 0\.0 MB\. Raise cache\.max_bytes"):
        place.cache(manifest.size - 1).fetch(manifest.digest, place.channel)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=10_000, f_frsize=512))
    large = place.bundle("large", 3000)
    with pytest.raises(BundleError, match=r"it has 12\.3 MB, and the disk lacks 7\.2 MB for it"):
        place.cache().fetch(large.digest, place.channel)
    assert place.asked == []
    place.cache().fetch(manifest.digest, place.channel)


def test_the_least_recently_used_makes_room_but_never_one_in_use(place: Place) -> None:
    one, two, three, four = (place.bundle(name) for name in ("one", "two", "three", "four"))
    cache = place.cache(3 * one.size)
    for manifest in (one, two, three):
        cache.fetch(manifest.digest, place.channel)

    def there() -> set[str]:
        return {path.name for path in place.cached.iterdir() if path.is_dir()}

    with pytest.raises(BundleError, match=r"bundles in use leave only 0\.0 MB of the cache"):
        cache.fetch(four.digest, place.channel)
    assert there() == {one.digest, two.digest, three.digest}
    for manifest in (one, two, three):
        cache.release(manifest.digest)
    for seconds, manifest in ((30, two), (20, three), (10, one)):
        os.utime(place.cached / f"{manifest.digest}.use", (10**9 - seconds, 10**9 - seconds))
    user = place.cache()
    user.fetch(two.digest, place.channel)  # in use, whatever its time says
    os.utime(place.cached / f"{two.digest}.use", (1, 1))
    cache.fetch(four.digest, place.channel)
    assert there() == {one.digest, two.digest, four.digest}
    assert place.said == [f"removing bundle {three.digest[:16]}… from the cache to make room"]
    assert not list(place.cached.glob(f"{three.digest}*"))
    user.release(two.digest)
    cache.fetch(three.digest, place.channel)
    assert there() == {one.digest, three.digest, four.digest}


def test_a_full_disk_is_said_and_what_was_verified_is_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = place.bundle()
    real, room = os.pwrite, [6 * CHUNK]

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(BundleError, match=r"the disk is full\. Make room"):
            place.fetch(manifest)
    missing = damaged(place.cached / manifest.digest, manifest)
    assert 0 < len(missing) < 10
    place.asked.clear()
    place.fetch(manifest)
    assert place.asked == missing


CLIENT = """
import resource, sys
from pathlib import Path
import grpc
from farfield.edge_client.bundles import Cache
from farfield.protocols.errors import FarfieldError
folder, port, digest, limit = Path(sys.argv[1]), *sys.argv[2:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
pems = [(folder / name).read_bytes() for name in ("ca", "key", "certificate")]
credentials = grpc.ssl_channel_credentials(*pems)
with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
    try:
        path = Cache(folder / "cache", 10**9).fetch(digest, channel, lambda done, total: print(done, flush=True))
    except FarfieldError as error:
        print(error)
    else:
        print("whole", flush=True)
        sys.stdin.read()
"""


def client(place: Place, manifest: Manifest, limit: int = 0) -> subprocess.Popen[str]:
    """A real process that fetches the bundle, and then uses it until its input ends."""
    for name, content in (
        ("ca", place.serving.authority.pem),
        ("key", place.pair.key),
        ("certificate", place.pair.certificate),
    ):
        (place.folder / name).write_bytes(content)
    port = str(place.serving.services.federation_port)
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, place.folder, port, manifest.digest, str(limit)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_limit_of_the_system_on_files_is_said(place: Place) -> None:
    manifest = place.bundle(chunks=50)
    with client(place, manifest, limit=20 * CHUNK) as process:
        out, _ = process.communicate(timeout=60)
    assert "the disk is full. Make room" in out


def test_what_another_process_uses_stays(place: Place) -> None:
    one, two = place.bundle("one"), place.bundle("two")
    with client(place, one) as process:
        assert process.stdout is not None and process.stdin is not None
        while process.stdout.readline() != "whole\n":
            pass
        with pytest.raises(BundleError, match="in use"):
            place.cache(one.size).fetch(two.digest, place.channel)
        process.stdin.close()
        process.wait(60)
    place.cache(one.size).fetch(two.digest, place.channel)
    assert not (place.cached / one.digest).exists()


# Killed, and several at once


def test_killed_at_any_moment_it_never_asks_for_a_verified_chunk_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = place.bundle(chunks=80)
    changed = threading.Condition()
    life = sent = allowed = 0

    def all_sent() -> bool:
        return sent == allowed

    def held_back(index: int, raw: bytes) -> bytes:
        """Waits until this life of the client may have another chunk, or is over."""
        nonlocal sent
        with changed:
            mine = life
            assert changed.wait_for(lambda: sent < allowed or life != mine, 30)
            sent += life == mine
            changed.notify_all()
        return raw

    shipped(monkeypatch, held_back)
    draw = random.Random(7)
    right: set[int] = set()
    for _ in range(6):
        place.asked.clear()
        with changed:
            sent, allowed = 0, draw.randint(4, 12)
        with client(place, manifest) as process:
            with changed:
                assert changed.wait_for(all_sent, 30)
            process.send_signal(signal.SIGKILL)
            assert process.wait(30) == -signal.SIGKILL
        with changed:
            life += 1
            changed.notify_all()
        assert place.asked == sorted(set(range(80)) - right)
        here = set(range(80)) - set(damaged(place.cached / manifest.digest, manifest))
        assert here >= right
        right = here
    assert 0 < len(right) < 80
    allowed = 1000
    place.asked.clear()
    place.fetch(manifest)
    assert place.asked == sorted(set(range(80)) - right)


def test_two_that_fetch_at_once_fetch_once(place: Place) -> None:
    manifest = place.bundle(chunks=100)
    errors: list[FarfieldError] = []

    def fetch() -> None:
        try:
            place.fetch(manifest)
        except FarfieldError as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert place.asked == list(range(100))
