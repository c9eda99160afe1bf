"""Does what protects updates on their way hold? The Plan's own configuration, attacked by whoever may lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Final, final

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from farfield.protocols import codec
from farfield.protocols.audit.finding import Figure, Finding, Table
from farfield.protocols.audit.uniform import Uniformity, uniformity
from farfield.protocols.envelope import close_reply
from farfield.protocols.errors import FarfieldError
from farfield.protocols.parcel import Parcel
from farfield.protocols.secagg import fixedpoint
from farfield.protocols.secagg.parameters import SMALL, at_most, choose
from farfield.protocols.secagg.session import LABEL_BYTES
from farfield.protocols.summing import Words

from .attack import Attack, Attacker, register
from .forgeries import DEMANDS, FORGERIES, Post
from .lies import LIES
from .staged import ALONE, Aggregation, Company, Setting, cohort
from .subject import Subject
from .trial import Attempt, Outcome, tried

MOST: Final = SMALL + 10
"""Clients that are staged at most: with more than `SMALL` the graph is a sparse one, as with a thousand."""

LEVEL: Final = 1e-3
"""With good masks a test of them fails so often."""


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of the test, and what came out.

    Attributes:
        failures: what was found wrong besides `outcomes`.
    """

    tried: str
    found: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    failures: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    data: Mapping[str, JsonValue] | None = None


@register
@final
class Protocol(Attack):
    """Stages what a coordinator, or who carries the messages, could try, and sees whether each of it is refused."""

    name: ClassVar[str] = "protocol"
    title: ClassVar[str] = "Protocol self-test"
    attacker: ClassVar[Attacker] = Attacker.CHEAT
    cost: ClassVar[str] = "seconds"
    place: ClassVar[int] = 10

    def unfit(self, subject: Subject) -> str | None:
        return None

    def run(self, subject: Subject) -> Finding:
        kind = subject.plan.protection.kind
        if kind == "none":
            return self._in_the_clear(subject)
        parts = [_forged(subject), _demanded(subject)]
        limits = [_NOT_A_PROOF]
        if kind == "secagg":
            setting = _setting(subject)
            parts += [_honest(setting, subject), _lied(setting, subject)]
            limits += [_WHAT_A_SUM_SAYS, _WHO_IS_THERE]
        else:
            limits.append(_SEALED)
        return self._finding(parts, limits)

    def _finding(self, parts: Iterable[_Part], limits: Iterable[str]) -> Finding:
        parts = tuple(parts)
        outcomes = [one for part in parts for one in part.outcomes]
        failures = [failure for part in parts for failure in part.failures]
        failures += [f"{one.what}: {one.said}" for one in outcomes if not one.held]
        held = sum(one.held for one in outcomes)
        summary = f"{held} of {len(outcomes)} attempts were refused, each with an error that says why."
        return Finding(
            attack=self.name,
            title=self.title,
            attacker=self.attacker,
            verdict="failed" if failures else "passed",
            tried=tuple(part.tried for part in parts),
            found=(
                *(f"Not as it has to be. {failure}." for failure in failures),
                summary,
                *(sentence for part in parts for sentence in part.found),
            ),
            limits=tuple(limits),
            figures=(
                Figure(name="attempts refused", value=held, note=f"of {len(outcomes)}", headline=True),
                *(figure for part in parts for figure in part.figures),
            ),
            tables=(
                Table(
                    title="What was attempted, and what came of it",
                    columns=("attempt", "refused", "in these words"),
                    rows=tuple((one.what, "yes" if one.held else "NO", one.said) for one in outcomes),
                ),
            ),
            data={
                "outcomes": [asdict(one) for one in outcomes],
                **{name: value for part in parts for name, value in (part.data or {}).items()},
            },
        )

    def _in_the_clear(self, subject: Subject) -> Finding:
        """Read a reply as whoever carries it can."""
        post = Post(subject.plan, subject.bench.frozen, subject.initial)
        head, frames = codec.encode_reply(post.reply(subject.initial))
        read = codec.decode_reply(Parcel(head, list(frames))).outcome
        sent = post.reply(subject.initial).outcome
        return Finding(
            attack=self.name,
            title=self.title,
            attacker=self.attacker,
            verdict="leak" if read == sent else "no leak found",
            tried=("A client's reply was read as it travels, without any key.",),
            found=(
                'The Plan has protection.kind = "none": whoever carries the messages reads every update, to the last '
                "bit. Such a Plan is for simulations; a coordinator's service does not start its run.",
            ),
        )


_NOT_A_PROOF: Final = (
    "What was refused here are the attempts of this list, made against this version of the code. It is no proof that "
    "there are no others, and nothing of machines that are broken into."
)
_WHAT_A_SUM_SAYS: Final = (
    "What the sum itself gives away is not tested here, nor clients that work together with the coordinator in larger "
    "numbers than the Plan states."
)
_WHO_IS_THERE: Final = (
    "Who the clients of a cohort are, a client believes its coordinator, unless its owner named a consortium whose "
    "roster says so: without one, a coordinator can enrol clients of its own, and protection.corrupt has to count them."
)
_SEALED: Final = (
    'With protection.kind = "sealed" the coordinator reads every update; what that gives away, the other attacks say.'
)


def _forged(subject: Subject) -> _Part:
    """Messages between a coordinator and a client."""

    def post() -> Post:
        return Post(subject.plan, subject.bench.frozen, subject.initial)

    outcomes = _all(FORGERIES, lambda forgery: forgery(post()), subject, "forging messages")
    honest = post()
    answered = honest.delivered(honest.desk().address(honest.task, honest.identity.member))
    words = np.frombuffer(_sealed_zeros(post(), subject), "<u4")
    look = uniformity(words, 32, np.zeros(len(words)))
    failures = []
    if not answered.frames:
        failures.append("An honest task got no sealed reply")
    if look.p < LEVEL:
        failures.append("A sealed reply can be told from random bytes")
    return _Part(
        "Messages between a coordinator and a client were forged, altered, misdirected and replayed, with the keys, "
        "signatures and seals of a deployment.",
        (f"A sealed reply, of an update of nothing but zeros, looks like random bytes ({_p(look)}).",)
        if look.p >= LEVEL
        else (),
        outcomes,
        tuple(failures),
        data={"sealed reply": asdict(look)},
    )


def _sealed_zeros(post: Post, subject: Subject) -> bytes:
    reply = post.reply({name: np.zeros_like(values) for name, values in subject.initial.items()})
    opened = post.opened(post.desk().address(post.task, post.identity.member))
    raw = b"".join(close_reply(reply, opened, post.identity.signing).frames)
    return raw[: len(raw) // 4 * 4]


def _demanded(subject: Subject) -> _Part:
    """Tasks that the coordinator has signed and sealed as it should."""
    outcomes = _all(DEMANDS, lambda demand: demand(subject.bench, subject.initial), subject, "asking too much")
    return _Part(
        "A client was given well-signed tasks that go beyond its Plan; it had to refuse them before any data are "
        "opened.",
        outcomes=outcomes,
    )


def _setting(subject: Subject) -> Setting:
    plan = subject.plan
    clients = cohort(plan, None if subject.federation is None else len(subject.clients))
    adapter = dict(subject.bench.whole(subject.initial))
    return Setting.made(plan, min(clients, MOST), subject.bench.frozen, adapter, subject.seed)


def _honest(setting: Setting, subject: Subject) -> _Part:
    try:
        return _summed(setting, subject)
    except FarfieldError as error:
        return _Part("Honest sums were made.", failures=(f"An honest sum cannot be made: {error.what}",))


def _summed(setting: Setting, subject: Subject) -> _Part:
    """The sum is right, with and without somebody who drops out, and no masked vector says anything by itself."""
    plan, clients = setting.plan, len(setting.names)
    subject.say("adding up honestly", 0, 2)
    run = Aggregation(Company(setting))
    right = _is_right(run)
    bits = run.layout.modulus_bits
    looked_at = setting.names[:ALONE]
    plain = [setting.vector(run.layout, name) for name in looked_at]
    beneath = np.concatenate([_signed(vector, bits) for vector in plain])
    masked = np.concatenate([_words(run, name) for name in looked_at])
    look, bare = uniformity(masked, bits, beneath), uniformity(np.concatenate(plain), bits, beneath)
    lost = frozenset(setting.names[: at_most(plan.protection.dropouts, clients)])
    if lost and clients - len(lost) >= run.opened.minimum:
        subject.say("adding up honestly", 1, 2)
        right = right and _is_right(Aggregation(Company(setting)), lost)
    failures, found = [], [_configuration(setting, run)]
    if right:
        found.append(f"Honest sums of {run.layout.length:,} values came out exactly, modulo 2^{bits}.")
    else:
        failures.append("An honest sum is wrong")
    if look.p >= LEVEL:
        found.append(
            f"Masked vectors could not be told from random words, nor did they go up and down with what is beneath "
            f"them ({_p(look)} in three tests together, correlation {look.correlation:+.5f}). The same vectors "
            f"without masks are told from random words at once ({_p(bare)})."
        )
    else:
        failures.append("Masked vectors can be told from random words")
    return _Part(
        f"Among {clients} made-up clients, with the Plan's modulus, graph, threshold and adversary, honest sums were "
        "made, and what a client sends was held against random words and against what lies beneath its masks.",
        tuple(found),
        failures=tuple(failures),
        figures=(_figure(look),),
        data={"masked": asdict(look), "without masks": asdict(bare)},
    )


def _lied(setting: Setting, subject: Subject) -> _Part:
    return _Part(
        f"A coordinator that lies asked {len(setting.names)} made-up clients for what must not be answered, at each "
        "step of secure aggregation and over several sums; it had led them honestly up to there.",
        outcomes=_all(LIES, lambda lie: lie(setting), subject, "lying to clients"),
    )


def _all(
    attempts: Mapping[str, Callable[..., Attempt | None]],
    prepare: Callable[[Any], Attempt | None],
    subject: Subject,
    doing: str,
) -> tuple[Outcome, ...]:
    outcomes = []
    for number, (what, attempt) in enumerate(attempts.items()):
        subject.say(doing, number, len(attempts))
        outcomes.append(tried(what, partial(prepare, attempt)))
    return tuple(one for one in outcomes if one is not None)


def _is_right(run: Aggregation, silent: frozenset[str] = frozenset()) -> bool:
    """Whether all but the silent are added up, to the last bit."""
    total = run.finish(silent)
    there = tuple(name for name in run.company.setting.names if name not in silent)
    return total.clients == there and bool((total.total == run.plain(there)).all())


def _configuration(setting: Setting, run: Aggregation) -> str:
    protection, clients = setting.plan.protection, len(setting.names)
    chosen = choose(clients, protection.corrupt, protection.dropouts, protection.adversary)
    return (
        f"Each of {clients} clients masks with {chosen.degree} others, {chosen.threshold} holders of shares are needed "
        f"to open what one of them shared, and no sum of fewer than {run.opened.minimum} is opened."
    )


def _figure(look: Uniformity) -> Figure:
    return Figure(
        name="p-value of masked vectors as random words",
        value=look.p,
        note=f"χ² of bytes, Kolmogorov–Smirnov and correlation over {look.words:,} words; below {LEVEL:g} is a failure",
    )


def _p(look: Uniformity) -> str:
    return f"p = {look.p:.2g}" if look.p > 1e-9 else "p below 10⁻⁹"


def _words(run: Aggregation, name: str) -> Words:
    return fixedpoint.unpack(memoryview(run.heard[name])[LABEL_BYTES:], run.layout.modulus_bits, run.layout.length)


def _signed(vector: Words, bits: int) -> NDArray[np.float64]:
    """The words as numbers in ±2^(bits − 1)."""
    half, modulus = 1 << (bits - 1), 1 << bits
    centred = ((vector.astype(np.int64) + half) & (modulus - 1)) - half
    return centred.astype(np.float64)
