"""What somebody between coordinator and client does to their messages, or a coordinator asks by itself.

Each is done to a real participant, or to the coordinator's own desk. No data are opened by any of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from farfield.edge_client.consent import Consent
from farfield.edge_client.data import ClientData
from farfield.edge_client.participant import Participant
from farfield.edge_client.worker import Worker
from farfield.emulator.bench import Bench
from farfield.protocols import messages_pb2 as pb
from farfield.protocols.envelope import Charter, Desk, Identity, Opened, Signer, close_reply, open_task, sign_charter
from farfield.protocols.errors import BundleError, TrustError
from farfield.protocols.messages import Evaluate, Reply, Task, Train, Trained
from farfield.protocols.parcel import Parcel
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import State, pack_state
from farfield.protocols.turns import takes_part

from .trial import Attempt

NODE: Final = "ann"

_CERTIFICATE: Final = b"the coordinator's"


class Post:
    """A coordinator, a client, and the way between them."""

    def __init__(self, plan: Plan, frozen: str, adapter: State) -> None:
        self.plan = plan
        self.work = Train(pack_state(adapter, plan.delivery.dtype), plan.privacy.clipping_norm)
        self.signer = Signer(Ed25519PrivateKey.generate(), _CERTIFICATE)
        self.identity = Identity(Ed25519PrivateKey.generate(), X25519PrivateKey.generate())
        self.charter = Charter("audit", plan.canonical(), "ab" * 32, 0, frozen)
        self.task = Task("audit", 1, NODE, plan.digest, self.work, plan.smallest_cohort)
        refusing = Consent(backbones=("00" * 32,))  # so that a task that is believed goes no further than that
        self.participant = Participant(
            NODE, self.identity, self._trusted, refusing, Path("no data"), _nothing, lambda *_: None
        )

    def desk(self, *, signer: Signer | None = None, charter: Charter | None = None, seconds: float = 60) -> Desk:
        by = signer or self.signer
        signed = sign_charter(charter or self.charter, by)
        return Desk(signed, by, self.work, expires=time.time() + seconds, sealed=True)

    def delivered(self, parcel: Parcel) -> Parcel:
        """What the client answers. Raises TrustError or WireError when it does not take the parcel for a task."""
        return self.participant.answer(Parcel(parcel.head, list(parcel.frames)))

    def opened(self, parcel: Parcel) -> Opened:
        """The task, as its client reads it."""
        copied = Parcel(parcel.head, list(parcel.frames))
        return open_task(copied, NODE, self._trusted, self.identity.sealing, time.time())

    def reply(self, update: State) -> Reply:
        return Reply.to(self.task, Trained(pack_state(update, self.plan.delivery.dtype), 10, 100, 1, 2.0))

    def _trusted(self, certificate: bytes) -> Ed25519PublicKey:
        if certificate != _CERTIFICATE:
            raise TrustError("a signer whom the pinned authority does not know")
        return self.signer.key.public_key()


def _nothing(digest: str) -> Path:
    raise BundleError("nothing is fetched in an audit")


Forgery: TypeAlias = Callable[[Post], Attempt]

FORGERIES: Final[dict[str, Forgery]] = {}
"""By what is done, for a person."""


def _forgery(what: str) -> Callable[[Forgery], Forgery]:
    def known(forgery: Forgery) -> Forgery:
        FORGERIES[what] = forgery
        return forgery

    return known


def _altered(post: Post, change: Callable[[pb.SignedTask], object]) -> Attempt:
    """A good task whose envelope is changed on its way."""
    parcel = post.desk().address(post.task, post.identity.member)
    signed = pb.SignedTask.FromString(parcel.head)
    change(signed)
    return Attempt(lambda: post.delivered(Parcel(signed.SerializeToString(deterministic=True), parcel.frames)))


def _flipped(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


# --- tasks ------------------------------------------------------------------------------------------------------------


@_forgery("The coordinator's signature on a task is altered")
def _signature(post: Post) -> Attempt:
    return _altered(post, lambda signed: setattr(signed, "signature", _flipped(signed.signature)))


@_forgery("A task is altered after it was signed")
def _task(post: Post) -> Attempt:
    def later(signed: pb.SignedTask) -> None:
        signed.expires += 3600

    return _altered(post, later)


@_forgery("The charter of the run, with the Plan in it, is altered after it was signed")
def _charter(post: Post) -> Attempt:
    other = sign_charter(replace(post.charter, backbone="cd" * 32), Signer(Ed25519PrivateKey.generate(), _CERTIFICATE))
    return _altered(post, lambda signed: setattr(signed.charter, "charter", other.charter))


@_forgery("A task is signed by somebody else, in the coordinator's name")
def _impostor(post: Post) -> Attempt:
    desk = post.desk(signer=Signer(Ed25519PrivateKey.generate(), _CERTIFICATE))
    return Attempt(lambda: post.delivered(desk.address(post.task, post.identity.member)))


@_forgery("A task is signed by another authority's coordinator")
def _stranger(post: Post) -> Attempt:
    desk = post.desk(signer=Signer(Ed25519PrivateKey.generate(), b"another's"))
    return Attempt(lambda: post.delivered(desk.address(post.task, post.identity.member)))


@_forgery("A task of one run comes with the charter of another")
def _other_run(post: Post) -> Attempt:
    desk = post.desk(charter=replace(post.charter, run="another"))
    return Attempt(lambda: post.delivered(desk.address(post.task, post.identity.member)))


@_forgery("A task for another client is delivered")
def _misdelivered(post: Post) -> Attempt:
    parcel = post.desk().address(replace(post.task, node="bob"), post.identity.member)
    return Attempt(lambda: post.delivered(parcel))


@_forgery("A task is delivered after its time")
def _late(post: Post) -> Attempt:
    parcel = post.desk(seconds=-2).address(post.task, post.identity.member)
    return Attempt(lambda: post.delivered(parcel))


@_forgery("A task is delivered a second time")
def _replayed(post: Post) -> Attempt:
    parcel = post.desk().address(post.task, post.identity.member)
    post.delivered(parcel)
    return Attempt(lambda: post.delivered(parcel))


@_forgery("The reply is to be sealed to a key of whoever carries the task")
def _own_key(post: Post) -> Attempt:
    key = X25519PrivateKey.generate().public_key().public_bytes_raw()
    return _altered(post, lambda signed: setattr(signed, "seal_to", key))


@_forgery("The reply is not to be sealed at all, says a task that the coordinator has signed")
def _unsealed(post: Post) -> Attempt:
    signed = sign_charter(post.charter, post.signer)
    desk = Desk(signed, post.signer, post.work, expires=time.time() + 60, sealed=False)
    return Attempt(lambda: post.delivered(desk.address(post.task, post.identity.member)))


@_forgery("The adapter that comes with a task is altered")
def _body(post: Post) -> Attempt:
    parcel = post.desk().address(post.task, post.identity.member)
    frames = [_flipped(parcel.frames[0]), *parcel.frames[1:]]
    return Attempt(lambda: post.delivered(Parcel(parcel.head, frames)))


# --- replies ----------------------------------------------------------------------------------------------------------


def _answered(post: Post, desk: Desk) -> Parcel:
    opened = post.opened(desk.address(post.task, post.identity.member))
    return close_reply(Reply.to(opened.task, post.reply({}).outcome), opened, post.identity.signing)


@_forgery("A reply is altered on its way")
def _altered_reply(post: Post) -> Attempt:
    desk = post.desk()
    parcel = _answered(post, desk)
    frames = [_flipped(parcel.frames[0]), *parcel.frames[1:]]
    return Attempt(lambda: desk.open(Parcel(parcel.head, frames), post.task, post.identity.member))


@_forgery("A reply is made by somebody who is not the client")
def _forged_reply(post: Post) -> Attempt:
    desk = post.desk()
    opened = post.opened(desk.address(post.task, post.identity.member))
    parcel = close_reply(Reply.to(opened.task, post.reply({}).outcome), opened, Ed25519PrivateKey.generate())
    return Attempt(lambda: desk.open(parcel, post.task, post.identity.member))


@_forgery("A reply to an earlier task is counted for a later one")
def _earlier_reply(post: Post) -> Attempt:
    before, desk = post.desk(), post.desk()
    parcel = _answered(post, before)
    desk.address(post.task, post.identity.member)
    return Attempt(lambda: desk.open(parcel, post.task, post.identity.member))


@_forgery("A reply is sealed to another key than the round's")
def _other_key(post: Post) -> Attempt:
    desk = post.desk()
    opened = post.opened(desk.address(post.task, post.identity.member))
    elsewhere = replace(opened, seal_to=X25519PrivateKey.generate().public_key().public_bytes_raw())
    parcel = close_reply(Reply.to(opened.task, post.reply({}).outcome), elsewhere, post.identity.signing)
    return Attempt(lambda: desk.open(parcel, post.task, post.identity.member))


@_forgery("A client replies in the name of another")
def _other_name(post: Post) -> Attempt:
    desk = post.desk()
    opened = post.opened(desk.address(post.task, post.identity.member))
    parcel = close_reply(replace(post.reply({}), node="bob"), opened, post.identity.signing)
    return Attempt(lambda: desk.open(parcel, post.task, post.identity.member))


# --- tasks that are signed and sealed, and not what the Plan promises -------------------------------------------------

Demand: TypeAlias = Callable[[Bench, State], Attempt | None]

DEMANDS: Final[dict[str, Demand]] = {}
"""By what is asked of a client whose worker has come to no data yet."""


def _demand(what: str) -> Callable[[Demand], Demand]:
    def known(demand: Demand) -> Demand:
        DEMANDS[what] = demand
        return demand

    return known


def _asked(bench: Bench, work: Train | Evaluate, *, number: int = 1, node: str = NODE, digest: str = "") -> Attempt:
    plan = bench.plan
    task = Task("audit", number, node, digest or plan.digest, work, plan.smallest_cohort)
    return Attempt(lambda: Worker(node, bench, _data).outcome(task))


def _data() -> ClientData:
    raise RuntimeError("data were about to be opened")


def _trains(bench: Bench, adapter: State) -> Train:
    norm = bench.plan.privacy.clipping_norm if bench.plan.privacy.kind == "client" else None
    return Train(pack_state(adapter, bench.plan.delivery.dtype), norm)


@_demand("A client's update is asked for by itself, and the Plan promises secure aggregation")
def _plain_update(bench: Bench, adapter: State) -> Attempt | None:
    return _asked(bench, _trains(bench, adapter)) if bench.plan.protection.kind == "secagg" else None


@_demand("A client's held-out loss is asked for by itself, and the Plan promises secure aggregation")
def _plain_loss(bench: Bench, adapter: State) -> Attempt | None:
    work = Evaluate(pack_state(adapter, bench.plan.delivery.dtype))
    return _asked(bench, work) if bench.plan.protection.kind == "secagg" else None


@_demand("A held-out loss is asked for that the Plan's ε does not cover")
def _uncovered(bench: Bench, adapter: State) -> Attempt | None:
    if bench.plan.measures:
        return None
    work = Evaluate(pack_state(adapter, bench.plan.delivery.dtype))
    task = Task("audit", 1, NODE, bench.plan.digest, work, bench.plan.smallest_cohort)
    return Attempt(lambda: Worker(NODE, bench, _data).part(task, work))


@_demand("A task is of another Plan than the run's")
def _other_plan(bench: Bench, adapter: State) -> Attempt:
    return _asked(bench, _trains(bench, adapter), digest="00" * 32)


@_demand("A round is asked for after the Plan's last")
def _one_more(bench: Bench, adapter: State) -> Attempt:
    return _asked(bench, _trains(bench, adapter), number=bench.plan.training.rounds + 1)


@_demand("A client is asked in a round that is not its turn")
def _not_its_turn(bench: Bench, adapter: State) -> Attempt | None:
    plan, work = bench.plan, _trains(bench, adapter)
    rounds = range(1, plan.training.rounds + 1)
    number = next((one for one in rounds if not takes_part(plan, NODE, one)), None)
    if number is None:
        return None
    task = Task("audit", number, NODE, plan.digest, work, plan.smallest_cohort)
    return Attempt(lambda: Worker(NODE, bench, _data).part(task, work))
