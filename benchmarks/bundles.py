"""Verified download of a bundle, beside a bare gRPC stream of the same chunks; then ten kills and two flipped bytes.

    python benchmarks/bundles.py [--megabytes 256] [--repetitions 9] [--chunk-mebibytes 4]

Server and client are processes of their own on loopback, with mutual TLS; everything lies in a temporary folder.

1. Bare: grpc.aio sends the chunks, and the client drops them; once with a server that has all of them in memory, once
   with one that reads them from the files, a chunk ahead. Ours: `Cache.fetch` into an empty cache: the server reads
   from the files, the client hashes each chunk and writes it to the disk. The three are measured in turn. A chunk is
   hashed at the server when it is first read, so the first of ours is given apart.
2. A client is killed (SIGKILL) at ten random points of one download. After each, no chunk that was on its disk and
   right may be asked for again.
3. A byte is flipped in transit, then one in the cache: each must cost that one chunk, fetched once more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, TypeAlias

import grpc
import grpc.aio
import typer
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from farfield.coordinator import listening
from farfield.coordinator.admission import Limits
from farfield.coordinator.authority import Authority
from farfield.coordinator.shipping import Source
from farfield.coordinator.storage import BundleRow, Node
from farfield.edge_client.bundles import Cache
from farfield.emulator.bundle import Manifest, damaged, describe
from farfield.protocols import federation_pb2 as wire
from farfield.protocols.federation_pb2_grpc import FederationStub

NAME, SEED, KILLS = "bench", 3, 10
OPTIONS = [("grpc.max_receive_message_length", 16 << 20)]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    megabytes: Annotated[int, typer.Option(min=16)] = 256,
    repetitions: Annotated[int, typer.Option(min=1)] = 9,
    chunk_mebibytes: Annotated[int, typer.Option(min=1, max=8)] = 4,
) -> None:
    began = time.monotonic()
    with TemporaryDirectory(prefix="farfield-bundles-") as name:
        folder = Path(name)
        manifest = _prepare(folder, megabytes, chunk_mebibytes << 20)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        server = context.Process(target=_serve, args=(folder, theirs), daemon=True)
        server.start()
        try:
            ports = ours.recv()
            _speed(folder, manifest, ports, repetitions)
            _kills(folder, manifest, ports["meddling"])
            _flips(folder, manifest, ports["meddling"])
        finally:
            server.kill()
            server.join()
    print(f"{time.monotonic() - began:.0f} s in all")


# The three parts


def _speed(folder: Path, manifest: Manifest, ports: dict[str, int], repetitions: int) -> None:
    everything = wire.FetchChunksRequest(
        bundle=bytes.fromhex(manifest.digest), ranges=[wire.Range(first=0, count=manifest.chunks)]
    )
    rates: dict[str, list[float]] = {"memory": [], "files": [], "ours": []}
    with contextlib.ExitStack() as stack:
        channels = {name: stack.enter_context(_channel(folder, ports[name])) for name in rates}
        for _ in range(repetitions + 1):  # the first is not counted
            for name, channel in channels.items():
                if name == "ours":
                    # Only now, so that the memory that held these files is at hand for the next ones: a virtual machine
                    # may give idle memory back to its host, and getting it again takes longer than a download.
                    shutil.rmtree(folder / "cache", ignore_errors=True)
                begin = time.monotonic()
                if name == "ours":
                    Cache(folder / "cache", 2 * manifest.size).fetch(manifest.digest, channel)
                else:
                    got = sum(len(chunk.data) for chunk in FederationStub(channel).FetchChunks(everything))
                    assert got == manifest.size
                rates[name].append(manifest.size / 1e6 / (time.monotonic() - begin))
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, grpcio {grpc.__version__}; {manifest.size / 1e6:.0f} MB "
        f"in {manifest.chunks} chunks of {manifest.chunk_bytes >> 20} MiB; medians of {repetitions}, in turn"
    )
    ours = rates["ours"][1:]
    for name, label in (("memory", "bare stream, from memory"), ("files", "bare stream, from files")):
        bare = rates[name][1:]
        ratio = median(our / its for our, its in zip(ours, bare, strict=True))  # of neighbours, whatever else runs here
        print(f"{label:<26}{median(bare):5.0f} MB/s  {_range(bare)}  ours / this: {ratio:.2f}")
    first = f"the first, hashed at the server too: {rates['ours'][0]:.0f}"
    print(f"{'verified, to the disk':<26}{median(ours):5.0f} MB/s  {_range(ours)}  {first}", flush=True)


def _kills(folder: Path, manifest: Manifest, port: int) -> None:
    draw = random.Random(SEED)
    points = sorted(draw.uniform(0.02, 0.95) for _ in range(KILLS))
    bundle, log = folder / "killed" / manifest.digest, folder / "asked.jsonl"
    right: set[int] = set()
    asked_again = kills = 0
    for point in [*points, 2.0]:
        log.unlink(missing_ok=True)
        client = subprocess.Popen(  # noqa: S603
            [sys.executable, __file__, "--fetch", folder, str(port), "killed"], stdout=subprocess.PIPE, text=True
        )
        assert client.stdout is not None
        for line in client.stdout:
            if int(line) >= point * manifest.size:
                time.sleep(draw.uniform(0, 0.02))
                client.send_signal(signal.SIGKILL)
                break
        kills += client.wait() == -signal.SIGKILL
        client.stdout.close()
        asked_again += sum(index in right for index in _asked(log))
        right = set(range(manifest.chunks)) - set(damaged(bundle, manifest))
    assert len(right) == manifest.chunks, "the last client did not finish"
    print(f"{kills} clients killed; verified chunks asked for again: {asked_again}", flush=True)
    assert kills == KILLS
    assert asked_again == 0


def _flips(folder: Path, manifest: Manifest, port: int) -> None:
    said: list[str] = []
    log = folder / "asked.jsonl"
    with _channel(folder, port) as channel:
        log.unlink()
        (folder / "flip").touch()
        path = Cache(folder / "flipped", 2 * manifest.size, say=said.append).fetch(manifest.digest, channel)
        asked = _asked(log)
        assert not damaged(path, manifest)
        assert len(asked) == manifest.chunks + 1
        print(f"a byte flipped in transit: {said[0]}")

        victim = manifest.chunks // 2
        place = manifest.place(victim)
        with (path / place.file.path).open("r+b") as file:
            file.seek(place.offset + place.size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        log.unlink()
        Cache(folder / "flipped", 2 * manifest.size).fetch(manifest.digest, channel)
        assert not damaged(path, manifest)
        assert _asked(log) == [victim]
        print(f"a byte flipped in the cache: chunk {victim} fetched again, and no other")


def _fetch(folder: Path, port: int, cache: str) -> None:
    """The client that is killed: says how far it is."""
    manifest = Manifest.parse((folder / "manifest").read_bytes())
    with _channel(folder, port) as channel:
        Cache(folder / cache, 2 * manifest.size).fetch(
            manifest.digest, channel, lambda done, total: print(done, flush=True)
        )


# Both sides


def _prepare(folder: Path, megabytes: int, chunk_bytes: int) -> Manifest:
    """A bundle in two shards of random bytes, and the keys of both sides."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    draw = random.Random(SEED)
    for number in (1, 2):
        with (model / f"model-{number:05d}-of-00002.safetensors").open("wb") as file:
            for _ in range(megabytes // 2):
                file.write(draw.randbytes(10**6))
    manifest = describe(model, chunk_bytes=chunk_bytes)
    (folder / "manifest").write_bytes(manifest.canonical())
    now = datetime.now(UTC)
    authority = Authority.create(folder / "keys", [], now)
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    certificate = authority.issue_node(request.public_bytes(serialization.Encoding.DER), NAME, now)
    (folder / "tls.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "tls.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return manifest


def _channel(folder: Path, port: int) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(
        *((folder / name).read_bytes() for name in ("keys/ca.pem", "tls.key", "tls.pem"))
    )
    return grpc.secure_channel(f"localhost:{port}", credentials, OPTIONS)


def _serve(folder: Path, tell: Connection) -> None:
    asyncio.run(_servers(folder, tell))


async def _servers(folder: Path, tell: Connection) -> None:
    manifest = Manifest.parse((folder / "manifest").read_bytes())
    authority = Authority(folder / "keys")
    credentials = authority.server_credentials()
    limits = Limits()
    serial = x509.load_pem_x509_certificate((folder / "tls.pem").read_bytes()).serial_number
    node = Node(NAME, b"", b"", b"", f"{serial:x}", datetime.now(UTC))
    services = await listening.start(
        credentials,
        _Registry(node, BundleRow(manifest.digest, manifest.kind, folder / "model", manifest.canonical())),
        authority,
        enrolment_address="127.0.0.1:0",
        federation_address="127.0.0.1:0",
        advertised=(0, 0),
        now=lambda: datetime.now(UTC),
        limits=limits,
    )
    source = Source(manifest, folder / "model")
    ports = {"ours": services.federation_port}
    servers = []
    handlers = {
        "memory": _from_memory(source),
        "files": _from_files(source, ThreadPoolExecutor(2)),
        "meddling": _meddling(source, folder),
    }
    for name, fetch in handlers.items():
        server = grpc.aio.server(options=listening.options(limits))
        server.add_generic_rpc_handlers((_handlers(fetch, manifest),))
        ports[name] = server.add_secure_port("127.0.0.1:0", listening.tls(credentials, mutual=True))
        await server.start()
        servers.append(server)
    tell.send(ports)
    await asyncio.Event().wait()


class _Registry:
    """One node that may fetch one bundle."""

    def __init__(self, node: Node, bundle: BundleRow) -> None:
        self._node, self._bundle = node, bundle

    def node(self, name: str) -> Node | None:
        return self._node

    def may_fetch(self, digest: str) -> bool:
        return digest == self._bundle.digest

    def bundle(self, digest: str) -> BundleRow | None:
        return self._bundle

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} is not needed to fetch")


Handler: TypeAlias = Callable[[wire.FetchChunksRequest, Any], AsyncIterator[wire.Chunk | bytes]]


def _from_files(source: Source, readers: Executor) -> Handler:
    """Sends chunks as ours does, to anyone."""

    async def fetch(request: wire.FetchChunksRequest, context: Any) -> AsyncIterator[wire.Chunk | bytes]:
        async for raw in source.chunks(source.wanted(request.ranges), readers):
            yield raw

    return fetch


def _from_memory(source: Source) -> Handler:
    chunks = [wire.Chunk.FromString(source.read(index)) for index in range(source.manifest.chunks)]

    async def fetch(request: wire.FetchChunksRequest, context: Any) -> AsyncIterator[wire.Chunk | bytes]:
        for index in source.wanted(request.ranges):
            yield chunks[index]

    return fetch


def _meddling(source: Source, folder: Path) -> Handler:
    """Sends chunks slowly, notes what it was asked for, and flips a byte when there is a file `flip`."""

    async def fetch(request: wire.FetchChunksRequest, context: Any) -> AsyncIterator[wire.Chunk | bytes]:
        wanted = source.wanted(request.ranges)
        with (folder / "asked.jsonl").open("a") as log:
            log.write(json.dumps(wanted) + "\n")
        for index in wanted:
            chunk = wire.Chunk.FromString(source.read(index))
            if (folder / "flip").exists():
                (folder / "flip").unlink()
                chunk.data = chunk.data[:-1] + bytes([chunk.data[-1] ^ 1])
            yield chunk
            await asyncio.sleep(0.01)

    return fetch


def _handlers(fetch: Handler, manifest: Manifest) -> grpc.GenericRpcHandler:
    """The two methods of the federation service that a download needs, without its gate."""

    async def describe(request: wire.DescribeBundleRequest, context: Any) -> wire.BundleDescription:
        return wire.BundleDescription(manifest=manifest.canonical())

    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "DescribeBundle": grpc.unary_unary_rpc_method_handler(
            describe, wire.DescribeBundleRequest.FromString, wire.BundleDescription.SerializeToString
        ),
        "FetchChunks": grpc.unary_stream_rpc_method_handler(
            fetch,
            wire.FetchChunksRequest.FromString,
            lambda reply: reply if isinstance(reply, bytes) else reply.SerializeToString(),
        ),
    }
    return grpc.method_handlers_generic_handler("farfield.federation.v1.Federation", methods)


def _asked(log: Path) -> list[int]:
    return [index for line in log.read_text().splitlines() for index in json.loads(line)] if log.exists() else []


def _range(rates: list[float]) -> str:
    return f"({min(rates):.0f} to {max(rates):.0f})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fetch"]:
        _fetch(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        app()
