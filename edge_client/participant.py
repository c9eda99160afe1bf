"""A participant between machines: takes a task's parcel, and gives the parcel of the reply.

    verify   the coordinator's signature, on the charter and on the task
    consent  the owner's limits; from here on a refusal is a reply
    fetch    the backbone, by its digest, if it is not here yet
    fit      a way to work by the Plan in the memory that there is
    spend    what the Plan costs of the data's privacy, in the owner's own ledger
    perform  the task, at a bench that stays loaded for the next one
    close    seal the reply to the round's key, and sign it

Data is opened in the last but one and not before.
"""

from __future__ import annotations

import gc
import hashlib
import math
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from farfield.emulator import methods
from farfield.emulator.layout import is_emulator
from farfield.protocols import plan as plans
from farfield.protocols.envelope import Charter, Identity, Opened, close_reply, open_task
from farfield.protocols.errors import ConsentError, DataError, DeviceError, FarfieldError, TrustError
from farfield.protocols.messages import Evaluate, Failed, Outcome, Refused, Reply, Secure, Secured, Task, Train
from farfield.protocols.parcel import Parcel
from farfield.protocols.plan import Plan
from farfield.protocols.seeds import derive
from farfield.protocols.turns import takes_part

from . import device, fitting, limit
from .consent import Consent, Request, check
from .foretold import Foretold, question
from .secure import Ground, Sessions
from .spending import Spending
from .terms import terms

if TYPE_CHECKING:
    from farfield.emulator.bench import Bench

    from .choice import Fit, Way
    from .data import ClientData
    from .local_state import LocalState
    from .secure import Work
    from .sources import Part

REMEMBERED: Final = 4096
"""How many nonces of past tasks are kept, so that none is done twice."""


class Participant:
    """One node's part in all runs. Performs one task at a time."""

    def __init__(
        self,
        node: str,
        identity: Identity,
        trusted: Callable[[bytes], Ed25519PublicKey],
        consent: Consent,
        source: Path | Part,
        fetch: Callable[[str], Path],
        report: Callable[[str, int, str], None],
        clock: Callable[[], float] = time.time,
        keep: Path | None = None,
        ledger: Path | None = None,
        foretold: Path | None = None,
    ) -> None:
        """
        Args:
            identity: opens tasks and signs replies.
            trusted: the key in a signer's certificate (DER); raises TrustError for one that is not to be trusted.
            fetch: the folder of the backbone whose bundle has this digest.
            report: is told the run, the round, and what is being done about it.
            clock: seconds since 1970, by the coordinator's clock.
            keep: the folder for parts of adapters that never leave this machine.
            ledger: the file where it is written down what runs spend of the data's privacy.
            foretold: the file where it is kept what was found to fit into memory.
        """
        self._node, self._identity, self._trusted, self._consent = node, identity, trusted, consent
        self._source, self._fetch, self._report, self._clock = source, fetch, report, clock
        self._keep, self._spending = keep, None if ledger is None else Spending(ledger, consent)
        self._foretold = None if foretold is None else Foretold(foretold)
        self._sessions = Sessions(node, identity.signing)
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._charter: Charter | None = None
        self._bench: Bench | None = None
        self._most: int | None = None
        self._frugal = False
        self._data: ClientData | None = None
        self.loads = 0
        """How often a backbone was loaded."""

    def answer(self, parcel: Parcel) -> Parcel:
        """The reply to the task in `parcel`, whose frames are used up.

        Raises:
            TrustError, WireError: the task is not one that the coordinator made for this node, so it gets no reply.
        """
        size = parcel.size
        key = self._identity.sealing
        opened = open_task(parcel, self._node, self._trusted, key, self._clock())
        if opened.nonce in self._seen:
            raise TrustError(f"round {opened.task.round} of run {opened.task.run!r} was here before: a replay")
        self._seen[opened.nonce] = None
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        return close_reply(Reply.to(opened.task, self._outcome(opened, size)), opened, self._identity.signing)

    def _outcome(self, opened: Opened, size: int) -> Outcome:
        task, charter = opened.task, opened.charter
        try:
            plan = plans.restore(charter.plan, methods.registered(), where=f"run {task.run}")
            self._consents(plan, opened, size)
            bench = self._at_bench(plan, charter, task.round)
            self._report(task.run, task.round, _activity(task))
            with self._held():
                return self._perform(bench, opened)
        except ConsentError as error:
            self._report(task.run, task.round, f"refused: {error}")
            return Refused(str(error))
        except FarfieldError as error:
            self._report(task.run, task.round, f"failed: {error}")
            return Failed(_said(error))
        except Exception as error:  # whatever torch finds impossible here must not end a process that waits for months
            self._report(task.run, task.round, f"failed: {traceback.format_exc()}")
            return Failed(f"it failed unexpectedly ({type(error).__name__}); its own log says more")

    def _consents(self, plan: Plan, opened: Opened, size: int) -> None:
        """Raises ConsentError where the owner's limits forbid the task."""
        charter = opened.charter
        request = Request(
            opened.task.run, plan, charter.backbone, charter.backbone_bytes or None, opened.task.cohort, size
        )
        check(self._consent, request, datetime.now())
        if self._spending is not None:
            ahead = range(max(opened.task.round, 1), plan.training.rounds + 1)
            self._spending.check(
                plan, opened.task.run, [number for number in ahead if takes_part(plan, self._node, number)]
            )

    def _at_bench(self, plan: Plan, charter: Charter, number: int) -> Bench:
        """The bench for this charter: the one that is there, or a new one in its place."""
        if self._bench is not None and self._charter == charter:
            return self._bench
        from farfield.emulator.bench import Bench

        self._bench = self._charter = self._data = None
        gc.collect()  # the old backbone goes before the new one comes
        self._report(charter.run, number, "fetching the backbone")
        folder = self._fetch(charter.backbone)
        if is_emulator(folder) != (plan.delivery.kind == "emulator"):
            found = "an emulator" if is_emulator(folder) else "a whole backbone"
            raise TrustError(f"the Plan's delivery.kind is {plan.delivery.kind!r}, and what was sent is {found}")
        way = self._way(plan, charter, number, folder)
        self._report(charter.run, number, "loading the backbone")
        with self._held():
            bench = Bench(plan, folder, local=None if way is None else way.plan(plan))
        self.loads += 1
        # What an alternative freezes is its own affair: what it trains is what the Plan names.
        if (way is None or way.alternative is None) and bench.frozen != charter.frozen:
            raise TrustError(
                "this machine draws other frozen adapter weights than the coordinator",
                hint="The two sides run different versions of torch or peft.",
            )
        self._bench, self._charter = bench, charter
        return bench

    def _way(self, plan: Plan, charter: Charter, number: int, folder: Path) -> Way | None:
        """How the Plan is worked by here; None is as it is, where there is room for whatever that comes to.

        Raises:
            ConsentError, DeviceError: there is no way within the owner's limit, or within what the machine has left.
        """
        allowed, left = self._consent.max_memory_bytes, device.available_memory()
        limits = [one for one in (allowed, None if left is None else device.resident() + left) if one is not None]
        self._most = min(limits, default=None)
        way = None
        # With noise for each example a step is another one, which is not looked ahead at; the limit holds for it too.
        if self._most is not None and plan.privacy.kind != "example" and self._most < fitting.ample(plan, folder):
            table = self._looked_at(plan, charter, number, folder, self._most)
            try:
                choice = fitting.first(plan, table, self._most)
            except DeviceError as error:
                if self._most != allowed:
                    raise
                raise ConsentError(
                    error.what, where=f"consent.max_memory_bytes = {allowed:,}", hint=error.hint
                ) from None
            way = choice.chosen.way
            self._report(charter.run, number, f"fits into memory: {fitting.named(choice.chosen, plan)}")
        frugal = way is not None and way.frugal
        if frugal != self._frugal:
            self._frugal = frugal
            device.save_memory(frugal)
        return way

    def _looked_at(self, plan: Plan, charter: Charter, number: int, folder: Path, most: int) -> tuple[Fit, ...]:
        """The ways to work by the Plan, as far as one fits: those that are known from before, or looked at now."""
        allowed = self._consent.methods
        asked = question(plan, charter.backbone, allowed)
        known = None if self._foretold is None else self._foretold.recall(asked, most)
        if known is not None:
            return known
        self._report(charter.run, number, "looking for what fits into memory")
        table = fitting.look_ahead(plan, folder, most, allowed)
        if self._foretold is not None:
            self._foretold.keep(asked, table)
        return table

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Keep to the limit. What was foretold and comes to more all the same is not believed at the next start."""
        try:
            with limit.held(self._most):
                yield
        except DeviceError:
            if self._foretold is not None:
                self._foretold.forget()
            raise

    def _perform(self, bench: Bench, opened: Opened) -> Outcome:
        from .worker import Worker

        done = 0

        def on_step(loss: float) -> None:
            nonlocal done
            done += 1
            measured = "" if math.isnan(loss) else f", loss {loss:.3f}"
            self._report(opened.task.run, opened.task.round, f"training, step {done}{measured}")

        def secure(task: Task, asked: Secure, work: Work) -> Secured:
            own = terms(self._consent, opened.charter.roster, datetime.now(UTC))
            ground = Ground(bench.plan, opened.charter.backbone, opened.charter.frozen, own)
            return self._sessions.answer(task, asked, ground, work)

        def spend(number: int) -> None:
            if self._spending is not None:
                self._spending.spend(bench.plan, opened.task.run, number)

        kept = self._kept(opened)
        worker = Worker(self._node, bench, lambda: self._read(bench), on_step, kept, secure, spend, used_up=True)
        return worker.outcome(opened.task)

    def _kept(self, opened: Opened) -> LocalState | None:
        if self._keep is None:
            return None
        from .local_state import LocalState

        # Run and Plan come from outside and name a folder here.
        named = hashlib.sha256(f"{opened.task.run}\0{opened.task.plan_digest}".encode()).hexdigest()
        return LocalState(self._keep / named)

    def _read(self, bench: Bench) -> ClientData:
        if self._data is None:
            from .data import prepare
            from .sources import records

            plan = bench.plan
            found = records(self._source, plan.data, plan.model.task, plan.model.labels)
            seed = derive(plan.training.seed, "held-out", self._node)
            self._data = prepare(found, bench.tokenizer, plan.data, plan.model.task, seed, self._source)
        return self._data


def _activity(task: Task) -> str:
    match task.work:
        case Train() | Secure(work=Train()):
            return "training"
        case Evaluate() | Secure(work=Evaluate()):
            return "evaluating"
        case Secure(step=step):
            return f"secure aggregation: {step}"


def _said(error: FarfieldError) -> str:
    """What leaves this machine about an error: what is wrong, never where; of data not even what."""
    if isinstance(error, DataError):
        return "its data does not fit the Plan; its own log says why"
    return error.what
