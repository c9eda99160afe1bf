"""The coordinator's services, over real sockets with real certificates: what they do, and all that they refuse."""

from __future__ import annotations

import logging
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Pair, TestAuthority, private_pem, signing_request
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped] # it ships no types
from hypothesis import given
from hypothesis import strategies as st
from serving import LIMITS, Loop, Memory, Serving, Wire, serving

from farfield.coordinator import listening
from farfield.coordinator.admission import Buckets, status
from farfield.coordinator.shipping import AHEAD, Source
from farfield.emulator.bundle import MIN_CHUNK_BYTES, Manifest, describe
from farfield.protocols import errors, identity
from farfield.protocols import federation_pb2 as wire
from farfield.protocols.federation_pb2_grpc import EnrolmentStub, FederationStub

CHUNK = MIN_CHUNK_BYTES
Code = grpc.StatusCode


@pytest.fixture
def place() -> Iterator[Serving]:
    with serving() as it:
        yield it


@pytest.fixture
def manifest(tmp_path: Path, place: Serving) -> Manifest:
    return add_bundle(place.memory, tmp_path, 10 * CHUNK + 1)


def add_bundle(memory: Memory, folder: Path, size: int, chunk_bytes: int = CHUNK) -> Manifest:
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(secrets.token_bytes(size))
    manifest = describe(folder, chunk_bytes=chunk_bytes)
    memory.add(manifest, folder)
    return manifest


@contextmanager
def ends(code: grpc.StatusCode, *words: str, never: str = "\n") -> Iterator[None]:
    """The call inside must end with this status, and one sentence with these words."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    error: Any = caught.value
    assert error.code() is code, error
    for word in words:
        assert word in error.details()
    assert never not in error.details()


def enrolment(memory: Memory, name: str = "ann") -> wire.EnrolRequest:
    """A request that is right in everything, with an invitation that is good."""
    secret = secrets.token_bytes(16)
    memory.invitations[secret] = "open"
    signing = Ed25519PrivateKey.generate()
    request = wire.EnrolRequest(
        secret=secret,
        node=name,
        signing_request=signing_request(ec.generate_private_key(ec.SECP256R1())),
        fleet_key=fleet_key(ec.SECP384R1()) + b" ann@laptop",
        signing_key=signing.public_key().public_bytes_raw(),
        sealing_key=X25519PrivateKey.generate().public_key().public_bytes_raw(),
    )
    return sign(request, signing)


def sign(request: wire.EnrolRequest, key: Ed25519PrivateKey) -> wire.EnrolRequest:
    parts = identity.enrolment_parts(
        request.secret,
        request.node,
        request.signing_request,
        request.fleet_key,
        request.signing_key,
        request.sealing_key,
    )
    request.proof = identity.sign(key, identity.ENROLMENT, *parts)
    return request


def fleet_key(curve: ec.EllipticCurve) -> bytes:
    return ec.generate_private_key(curve).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def fetch(channel: grpc.Channel, manifest: Manifest, *ranges: tuple[int, int]) -> list[wire.Chunk]:
    request = wire.FetchChunksRequest(
        bundle=bytes.fromhex(manifest.digest), ranges=[wire.Range(first=first, count=count) for first, count in ranges]
    )
    return list(FederationStub(channel).FetchChunks(request, timeout=30))


def describe_bundle(channel: grpc.Channel, digest: bytes = bytes(32)) -> bytes:
    return FederationStub(channel).DescribeBundle(wire.DescribeBundleRequest(bundle=digest), timeout=30).manifest


# Enrolment


def test_a_node_enrols_and_is_known_from_then_on(place: Serving, tmp_path: Path) -> None:
    manifest = add_bundle(place.memory, tmp_path, 1)
    key = ec.generate_private_key(ec.SECP256R1())
    signing = Ed25519PrivateKey.generate()
    request = enrolment(place.memory)
    request.signing_request = signing_request(key)
    request.signing_key = signing.public_key().public_bytes_raw()
    with place.channel(None) as channel:
        reply = EnrolmentStub(channel).Enrol(sign(request, signing), timeout=30)
    assert (reply.fleet_port, reply.federation_port) == (9092, place.services.federation_port)
    node = place.memory.nodes["ann"]
    assert place.memory.invitations[request.secret] == "used"
    assert node.fleet_key == b" ".join(request.fleet_key.split()[:2])
    assert int(node.certificate, 16) == x509.load_pem_x509_certificate(reply.certificate).serial_number
    with place.channel(Pair(private_pem(key), reply.certificate, 0)) as channel:
        assert describe_bundle(channel, bytes.fromhex(manifest.digest)) == manifest.canonical()


def altered_request(request: wire.EnrolRequest) -> None:
    request.signing_request = request.signing_request[:-1] + bytes([request.signing_request[-1] ^ 1])


def other_key(request: wire.EnrolRequest) -> None:
    request.fleet_key = fleet_key(ec.SECP384R1())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: setattr(r, "secret", bytes(16)), "does not hold"),
        (lambda r: setattr(r, "node", "eve"), "does not hold"),
        (lambda r: setattr(r, "proof", bytes(64)), "does not hold"),
        (lambda r: setattr(r, "proof", b""), "does not hold"),
        (lambda r: setattr(r, "signing_key", bytes(31)), "Ed25519"),
        (lambda r: setattr(r, "signing_key", Ed25519PrivateKey.generate().public_key().public_bytes_raw()), "not hold"),
        (lambda r: setattr(r, "sealing_key", bytes(32)), "X25519"),
        (lambda r: setattr(r, "sealing_key", bytes(31)), "X25519"),
        (other_key, "does not hold"),
        (altered_request, "does not hold"),
        (lambda r: setattr(r, "node", "../ann"), "no name for a node"),
        (lambda r: setattr(r, "fleet_key", b"ssh-nothing"), "no OpenSSH public key"),
        (lambda r: setattr(r, "fleet_key", fleet_key(ec.SECP256R1())), "P-384"),
        (lambda r: setattr(r, "signing_request", bytes(5000)), "too long"),
    ],
)
def test_what_was_altered_does_not_enrol(
    place: Serving, change: Callable[[wire.EnrolRequest], None], words: str
) -> None:
    request = enrolment(place.memory)
    secret = request.secret
    change(request)
    with place.channel(None) as channel, ends(Code.PERMISSION_DENIED, words):
        EnrolmentStub(channel).Enrol(request, timeout=30)
    assert place.memory.nodes == {}
    assert place.memory.invitations == {secret: "open"}


def test_a_signing_request_must_be_signed_by_its_own_key(place: Serving) -> None:
    signing = Ed25519PrivateKey.generate()
    request = enrolment(place.memory)
    request.signing_key = signing.public_key().public_bytes_raw()
    altered_request(request)
    with place.channel(None) as channel, ends(Code.PERMISSION_DENIED, "not signed by the key in it"):
        EnrolmentStub(channel).Enrol(sign(request, signing), timeout=30)
    assert place.memory.invitations[request.secret] == "open"


@pytest.mark.parametrize("state", ["used", "expired", "unknown"])
def test_a_token_that_is_not_good_gives_no_certificate(place: Serving, state: str) -> None:
    request = enrolment(place.memory)
    place.memory.invitations[request.secret] = state
    with place.channel(None) as channel, ends(Code.PERMISSION_DENIED, f"token: the invitation is {state}"):
        EnrolmentStub(channel).Enrol(request, timeout=30)
    assert place.memory.nodes == {}


def test_a_token_is_good_for_one_of_two_that_come_at_once(place: Serving) -> None:
    requests = [enrolment(place.memory, name) for name in ("ann", "bob")]
    signing = Ed25519PrivateKey.generate()
    requests[1].secret = requests[0].secret
    requests[1].signing_key = signing.public_key().public_bytes_raw()
    sign(requests[1], signing)
    with place.channel(None) as channel:
        calls = [EnrolmentStub(channel).Enrol.future(request, timeout=30) for request in requests]
        codes = sorted(call.code().name for call in calls)
    assert codes == ["OK", "PERMISSION_DENIED"]
    assert len(place.memory.nodes) == 1


def test_a_defect_is_logged_without_the_secret_and_told_without_the_details(
    place: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def redeem(*_: object) -> None:
        raise RuntimeError("the disk of the database is on fire")

    monkeypatch.setattr(place.memory, "redeem", redeem)
    request = enrolment(place.memory)
    with caplog.at_level(logging.DEBUG), place.channel(None) as channel, ends(Code.INTERNAL, "its log says how"):
        EnrolmentStub(channel).Enrol(request, timeout=30)
    assert "on fire" in caplog.text
    for written in (repr(request.secret)[2:-1], request.secret.hex(), repr(bytes(request.signing_key))[2:-1]):
        assert written not in caplog.text


# Who may call


def test_without_a_certificate_of_this_authority_nobody_is_heard(place: Serving) -> None:
    other = TestAuthority()
    place.memory.admit("ann", stranger := other.node("ann"))
    port = place.services.federation_port
    with place.channel(None, port=port) as channel, ends(Code.UNAVAILABLE):
        describe_bundle(channel)
    with place.channel(stranger) as channel, ends(Code.UNAVAILABLE):
        describe_bundle(channel)
    with grpc.insecure_channel(f"localhost:{port}") as channel, ends(Code.UNAVAILABLE):
        describe_bundle(channel)
    with (
        place.channel(place.node("bob"), authority=other) as channel,
        ends(Code.UNAVAILABLE, "handshake failed"),
    ):
        describe_bundle(channel)  # the client does not talk to a stranger either
    with place.channel(place.node("cid")) as channel, ends(Code.NOT_FOUND):
        describe_bundle(channel)


@pytest.mark.parametrize("which", ["federation_port", "enrolment_port"])
def test_a_port_scan_in_plain_text_gets_nothing_and_harms_nothing(place: Serving, which: str) -> None:
    for probe in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        b"\0" * 100,
        b"",
    ):
        with socket.create_connection(("127.0.0.1", getattr(place.services, which)), 30) as scanner:
            scanner.sendall(probe)
            scanner.shutdown(socket.SHUT_WR)
            answer = b""
            with suppress(ConnectionError):  # it ends in order, or is cut
                while more := scanner.recv(4096):
                    answer += more
            assert b"HTTP" not in answer and len(answer) < 100  # a TLS alert at most
    with place.channel(place.node("ann")) as channel, ends(Code.NOT_FOUND):
        describe_bundle(channel)


CALLS: list[Callable[[grpc.Channel], object]] = [
    describe_bundle,
    lambda channel: list(FederationStub(channel).FetchChunks(wire.FetchChunksRequest(), timeout=30)),
    lambda channel: list(FederationStub(channel).Attend(wire.AttendRequest(instance="i"), timeout=30)),
    lambda channel: FederationStub(channel).Leave(wire.LeaveRequest(), timeout=30),
    lambda channel: health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30),
    lambda channel: list(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30)),
]


@pytest.mark.parametrize("call", CALLS)
def test_every_call_asks_who_calls(place: Serving, call: Callable[[grpc.Channel], object]) -> None:
    ghost = place.authority.node("ghost")
    with place.channel(ghost) as channel, ends(Code.PERMISSION_DENIED, "No node 'ghost' is enrolled here."):
        call(channel)
    ann = place.node("ann")
    place.memory.revoke("ann", "laptop stolen", datetime(2026, 5, 1, 12, tzinfo=UTC))
    with place.channel(ann) as channel, ends(Code.PERMISSION_DENIED, "revoked on 2026-05-01 12:00 UTC: laptop stolen."):
        call(channel)


def test_a_certificate_is_renewed_and_the_old_one_is_good_until_it_ends(place: Serving) -> None:
    """The answer may be lost on its way."""
    bob = place.node("bob")
    key = ec.generate_private_key(ec.SECP256R1())
    with place.channel(bob) as channel:
        asked = wire.RenewRequest(signing_request=signing_request(key))
        reply = FederationStub(channel).Renew(asked, timeout=30)
    renewed = x509.load_pem_x509_certificate(reply.certificate)
    assert int(place.memory.nodes["bob"].certificate, 16) == renewed.serial_number
    for pair in (bob, Pair(private_pem(key), reply.certificate, 0)):
        with place.channel(pair) as channel, ends(Code.NOT_FOUND, "No run"):
            describe_bundle(channel)


def test_a_node_that_leaves_is_out(place: Serving) -> None:
    with place.channel(place.node("ann")) as channel:
        FederationStub(channel).Leave(wire.LeaveRequest(), timeout=30)
        assert ("revoke", "ann", "left") in place.memory.events
        with ends(Code.PERMISSION_DENIED, "left"):
            describe_bundle(channel)


def test_health_is_told_to_nodes(place: Serving) -> None:
    with place.channel(place.node("ann")) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "farfield.federation.v1.Federation"):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with ends(Code.NOT_FOUND):
            health.Check(health_pb2.HealthCheckRequest(service="another"), timeout=30)
        with ends(Code.UNIMPLEMENTED):
            nothing: Any = channel.unary_unary("/farfield.federation.v1.Federation/Nothing")
            nothing(b"", timeout=30)


# Attending


def attend(channel: grpc.Channel, instance: str) -> Any:
    """A stream that is open: its first notice has come."""
    stream = FederationStub(channel).Attend(wire.AttendRequest(instance=instance))
    assert next(stream).text == ""
    return stream


def test_attending_brings_notices_until_it_ends(place: Serving) -> None:
    with place.channel(place.node("ann")) as channel:
        stream = attend(channel, "one")
        assert place.memory.events == [("attend", "ann", "one", "127.0.0.1")]
        place.memory.notices["ann"] = ["first", "second"]
        assert [next(stream).text, next(stream).text] == ["first", "second"]
        place.memory.notices["ann"] = ["third"]
        assert next(stream).text == "third"
        stream.cancel()
        place.memory.wait_for("absent", "ann", "one")


def test_a_second_process_is_told_where_the_first_is() -> None:
    now = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
    with serving(now=lambda: now) as place:
        ann = place.node("ann")
        with place.channel(ann) as one, place.channel(ann) as other:
            stream = attend(one, "one")
            with ends(Code.ALREADY_EXISTS, "'ann'", "from 127.0.0.1", "since 2026-03-04 05:06:07 UTC"):
                attend(other, "two")
            place.memory.notices["ann"] = ["still here"]
            assert next(stream).text == "still here"
            stream.cancel()
            place.memory.wait_for("absent", "ann", "one")
            attend(other, "two").cancel()
            place.memory.wait_for("absent", "ann", "two")


def test_the_same_process_may_come_again_before_its_old_stream_is_gone(place: Serving) -> None:
    ann = place.node("ann")
    with place.channel(ann) as one, place.channel(ann) as other:
        old = attend(one, "one")
        new = attend(other, "one")
        with ends(Code.ABORTED, "over another connection"):
            next(old)
        place.memory.notices["ann"] = ["to the new one"]
        assert next(new).text == "to the new one"
        assert ("absent", "ann", "one") not in place.memory.events
        new.cancel()
        place.memory.wait_for("absent", "ann", "one")


def test_a_node_that_is_revoked_is_sent_away(place: Serving) -> None:
    with place.channel(place.node("ann")) as channel:
        stream = attend(channel, "one")
        place.memory.revoke("ann", "", datetime.now(UTC))
        with ends(Code.PERMISSION_DENIED, "revoked on"):
            next(stream)
        place.memory.wait_for("absent", "ann", "one")


@pytest.mark.parametrize("instance", ["", "a b", "x" * 65, "a\n"])
def test_an_instance_is_a_plain_word(place: Serving, instance: str) -> None:
    with place.channel(place.node("ann")) as channel, ends(Code.INVALID_ARGUMENT, "An instance is"):
        attend(channel, instance)
    assert place.memory.events == []


def test_a_peer_that_died_without_a_word_is_noticed() -> None:
    """A machine that loses its power sends no FIN: only asking it shows that it is gone."""
    with (
        serving(replace(LIMITS, keepalive_seconds=1, keepalive_timeout=1)) as place,
        Wire(place.services.federation_port) as line,
    ):
        ann = place.node("ann")
        with place.channel(ann, port=line.port) as channel, place.channel(ann) as direct:
            attend(channel, "one")
            line.cut()
            place.memory.wait_for("absent", "ann", "one")
            attend(direct, "two").cancel()


# Bundles


def test_chunks_come_as_they_were_asked_for(place: Serving, manifest: Manifest, tmp_path: Path) -> None:
    with place.channel(place.node("ann")) as channel:
        assert describe_bundle(channel, bytes.fromhex(manifest.digest)) == manifest.canonical()
        chunks = fetch(channel, manifest, (3, 2), (0, 1), (11, 1))
        assert [chunk.index for chunk in chunks] == [3, 4, 0, 11]
        assert all(chunk.data == manifest.read_chunk(tmp_path, chunk.index) for chunk in chunks)
        assert fetch(channel, manifest) == []
        assert [chunk.index for chunk in fetch(channel, manifest, (0, manifest.chunks))] == list(range(12))


@pytest.mark.parametrize(
    "ranges", [[(12, 1)], [(0, 13)], [(0, 1), (11, 2)], [(2**63, 2**63)], [(2**64 - 1, 2**64 - 1)]]
)
def test_a_chunk_outside_the_manifest_is_refused(
    place: Serving, manifest: Manifest, ranges: list[tuple[int, int]]
) -> None:
    with place.channel(place.node("ann")) as channel, ends(Code.OUT_OF_RANGE, "the bundle has 0 to 11"):
        fetch(channel, manifest, *ranges)


def test_more_than_everything_is_refused(place: Serving, manifest: Manifest) -> None:
    with place.channel(place.node("ann")) as channel, ends(Code.INVALID_ARGUMENT, "More than all 12 chunks"):
        fetch(channel, manifest, (0, 12), (0, 1))


def test_only_what_a_run_needs_is_shipped(place: Serving, manifest: Manifest) -> None:
    place.memory.fetchable.clear()
    with place.channel(place.node("ann")) as channel:
        for digest in (bytes.fromhex(manifest.digest), b"", b"../../etc/passwd"):
            with ends(Code.NOT_FOUND, "No run that is queued or running uses bundle"):
                describe_bundle(channel, digest)
        with ends(Code.NOT_FOUND):
            fetch(channel, manifest, (0, 1))


def test_a_file_that_has_changed_is_not_shipped(place: Serving, manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    with place.channel(place.node("ann")) as channel:
        assert len(fetch(channel, manifest, (0, 12))) == 12  # and every chunk is known to be right
        path.write_bytes(content[: 5 * CHUNK] + b"?" + content[5 * CHUNK + 1 :])
        with ends(Code.DATA_LOSS, "model.safetensors: changed since the bundle was made", never=str(tmp_path)):
            fetch(channel, manifest, (6, 1))
        assert len(fetch(channel, manifest, (0, 6), (7, 5))) == 11
        path.write_bytes(content)
        assert len(fetch(channel, manifest, (6, 1))) == 1
        path.unlink()
        with ends(Code.DATA_LOSS, "model.safetensors: cannot be read: no such file", never=str(tmp_path)):
            fetch(channel, manifest, (6, 1))


def test_a_client_that_does_not_read_is_not_read_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks wait on the disk, not in the coordinator's memory."""
    read: list[int] = []
    original = Source.read

    def counted(self: Source, index: int) -> bytes:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(Source, "read", counted)
    with serving() as place:
        manifest = add_bundle(place.memory, tmp_path, 96 << 20, 1 << 20)
        with place.channel(place.node("ann")) as channel:
            request = wire.FetchChunksRequest(
                bundle=bytes.fromhex(manifest.digest), ranges=[wire.Range(first=0, count=manifest.chunks)]
            )
            stream = FederationStub(channel).FetchChunks(request, timeout=60)
            next(stream)
            time.sleep(1)  # in which a server that does not wait has read everything
            assert len(read) < 24 + AHEAD  # what fits into the windows and buffers between the two
            assert len(list(stream)) == manifest.chunks - 1


# Limits


def test_a_message_over_the_limit_is_refused(place: Serving) -> None:
    with place.channel(place.node("ann")) as channel, ends(Code.RESOURCE_EXHAUSTED, "larger than max"):
        describe_bundle(channel, bytes(LIMITS.message_bytes + 1))
    request = enrolment(place.memory)
    request.signing_request = bytes(LIMITS.message_bytes + 1)
    with place.channel(None) as channel, ends(Code.RESOURCE_EXHAUSTED, "larger than max"):
        EnrolmentStub(channel).Enrol(request, timeout=30)


def test_a_node_may_not_call_too_often() -> None:
    with serving(replace(LIMITS, rate=0.001, burst=3)) as place:
        with place.channel(place.node("ann")) as channel:
            for _ in range(3):
                with ends(Code.NOT_FOUND):
                    describe_bundle(channel)
            with ends(Code.RESOURCE_EXHAUSTED, "Too many calls from ann: try again in", "seconds."):
                describe_bundle(channel)
        with place.channel(place.node("bob")) as channel, ends(Code.NOT_FOUND):
            describe_bundle(channel)


def test_an_address_may_not_try_tokens_too_often() -> None:
    with serving(replace(LIMITS, enrol_rate=0.001, enrol_burst=2)) as place, place.channel(None) as channel:
        request = wire.EnrolRequest()
        for _ in range(2):
            with ends(Code.PERMISSION_DENIED):
                EnrolmentStub(channel).Enrol(request, timeout=30)
        with ends(Code.RESOURCE_EXHAUSTED, "Too many calls from 127.0.0.1"):
            EnrolmentStub(channel).Enrol(request, timeout=30)


def test_a_node_may_not_have_too_many_calls_open() -> None:
    gate = threading.Event()

    class Slow(Memory):
        def may_fetch(self, digest: str) -> bool:
            self._happened("asked")
            return gate.wait(30) and False

    with serving(replace(LIMITS, calls=2), Slow()) as place, place.channel(place.node("ann")) as channel:
        stream = attend(channel, "one")
        slow = FederationStub(channel).DescribeBundle.future(wire.DescribeBundleRequest(), timeout=30)
        place.memory.wait_for("asked")
        with ends(Code.RESOURCE_EXHAUSTED, "ann has 2 calls open, which is as many as it may have."):
            describe_bundle(channel)
        gate.set()
        assert slow.code() is Code.NOT_FOUND
        with ends(Code.NOT_FOUND):
            describe_bundle(channel)
        stream.cancel()


def test_no_call_lasts_for_ever_but_attending() -> None:
    gate = threading.Event()

    class Stuck(Memory):
        def may_fetch(self, digest: str) -> bool:
            return gate.wait(30) and False

    with serving(replace(LIMITS, call_seconds=0.2), Stuck()) as place, place.channel(place.node("ann")) as channel:
        stream = attend(channel, "one")
        with ends(Code.DEADLINE_EXCEEDED, "A call may take 0.2 seconds here."):
            FederationStub(channel).DescribeBundle(wire.DescribeBundleRequest())
        place.memory.notices["ann"] = ["still here"]
        assert next(stream).text == "still here"
        with ends(Code.DEADLINE_EXCEEDED, "Deadline Exceeded"):  # the client's own, which is shorter
            FederationStub(channel).DescribeBundle(wire.DescribeBundleRequest(), timeout=0.05)
        limited = FederationStub(channel).Attend(wire.AttendRequest(instance="one"), timeout=0.5)
        with ends(Code.DEADLINE_EXCEEDED):
            list(limited)
        place.memory.wait_for("absent", "ann", "one")
        gate.set()


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 5)), max_size=60), st.floats(0.1, 5), st.integers(1, 5))
def test_a_bucket_gives_its_burst_and_then_its_rate(calls: list[tuple[str, float]], rate: float, burst: int) -> None:
    now = 0.0
    buckets = Buckets(rate, burst, lambda: now)
    admitted: dict[str, list[float]] = {"a": [], "b": []}
    for peer, pause in calls:
        now += pause
        wait = buckets.take(peer)
        if wait == 0:
            admitted[peer].append(now)
        else:
            before, now = now, now + wait + 1e-6
            assert buckets.take(peer) == 0, "after the time that it was told, a peer is admitted"
            admitted[peer].append(now)
            assert now > before
    for times in admitted.values():
        for first in range(len(times)):
            for last in range(first, len(times)):
                assert last - first + 1 <= burst + rate * (times[last] - times[first]) + 1e-3


def test_buckets_do_not_grow_without_end() -> None:
    buckets = Buckets(1, 1, lambda: 0.0)
    for number in range(10_050):
        buckets.take(str(number))
    assert buckets.take("10049") > 0
    assert buckets.take("0") == 0  # forgotten long ago


# Starting and stopping


def test_a_port_in_use_is_said(place: Serving) -> None:
    loop = Loop()
    with pytest.raises(errors.ServiceError, match=r"cannot listen there\. Is another coordinator running\?"):
        loop.run(
            listening.start(
                place.authority.server(),
                Memory(),
                place.authority,
                enrolment_address="127.0.0.1:0",
                federation_address=f"127.0.0.1:{place.services.federation_port}",
                advertised=(9092, 0),
                now=lambda: datetime.now(UTC),
            )
        )
    loop.close()


def test_stopping_ends_what_is_open_and_closes_the_ports() -> None:
    with serving() as place:
        with place.channel(place.node("ann")) as channel:
            stream = attend(channel, "one")
            place.loop.run(place.services.stop(600))  # which an open stream does not use up
            with ends(Code.UNAVAILABLE, "The coordinator is stopping."):
                next(stream)
        assert ("absent", "ann", "one") in place.memory.events
        for port in (place.services.federation_port, place.services.enrolment_port):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), 30)


def test_serving_needs_no_torch() -> None:
    module = "farfield.coordinator.listening"
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'peft'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.EnrolmentError, Code.PERMISSION_DENIED),
        (errors.MessageTooLarge, Code.RESOURCE_EXHAUSTED),
        (errors.WireError, Code.INTERNAL),
        (errors.StorageError, Code.UNAVAILABLE),
        (errors.Unreachable, Code.UNAVAILABLE),
        (errors.FarfieldError, Code.INTERNAL),
    ],
)
def test_an_error_has_the_status_of_its_nearest_kind(error: type[errors.FarfieldError], code: grpc.StatusCode) -> None:
    assert status(error("x")) is code


def test_trouble_of_the_database_is_logged_and_told_without_details(
    place: Serving, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def node(name: str) -> None:
        raise errors.StorageError("password authentication failed", where="postgresql://user@host/db")

    monkeypatch.setattr(place.memory, "node", node)
    with place.channel(place.authority.node("ann")) as channel, ends(Code.UNAVAILABLE, "its log says why"):
        describe_bundle(channel)
    assert "postgresql://user@host/db: password authentication failed" in caplog.text
