"""The protocol self-test passes on what is built, and finds out each check that is taken away."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import audits
import numpy as np
import pytest

from farfield.edge_client import participant, secure, worker
from farfield.edge_client.audit import protocol
from farfield.edge_client.audit.forgeries import FORGERIES, Post
from farfield.edge_client.audit.lies import LIES
from farfield.edge_client.audit.protocol import Protocol
from farfield.edge_client.audit.staged import Setting
from farfield.edge_client.audit.trial import Attempt, Outcome, tried
from farfield.protocols import envelope, identity
from farfield.protocols.audit.finding import Finding
from farfield.protocols.audit.uniform import uniformity
from farfield.protocols.errors import SecAggError
from farfield.protocols.messages import Train
from farfield.protocols.secagg import boxes, masks, session, states
from farfield.protocols.secagg.messages import decode_survivors
from farfield.protocols.secagg.session import Split

DISTRIBUTED: dict[str, Any] = {
    "privacy": {"kind": "client", "noise": "distributed", "noise_multiplier": 1.0, "clipping_norm": 0.5},
    "aggregation": {"weighting": "uniform"},
}
EXAMPLE: dict[str, Any] = {
    "data": {"packing": False, "truncate": True},
    "privacy": {"kind": "example", "noise_multiplier": 1.0, "sampling_rate": 0.5, "participations": 1},
}


@pytest.fixture(autouse=True, scope="module")
def strict() -> Iterator[None]:
    """So that no good mask fails by chance."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(protocol, "LEVEL", 1e-7)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("protocol")


def found(folder: Path, **sections: Any) -> Finding:
    return Protocol().run(audits.subject(folder, **sections))


def rows(finding: Finding) -> dict[str, tuple[str, str]]:
    return {what: (refused, said) for what, refused, said in finding.tables[0].rows}


def test_secure_aggregation_as_it_is_built(folder: Path) -> None:
    finding = found(folder)
    assert finding.verdict == "passed", finding.found
    said = rows(finding)
    assert (len(said), len(said) > 60) == (finding.figures[0].value, True)
    expected = {
        "One client is said to be both alive and dropped out": "said to be alive and said to have dropped out",
        "One client is on the roster under two names": "identity key twice",
        "Different clients are told of different models or Plans": "the signature on this secagg advertisement",
        "Different clients are told of different rosters": "the box does not open",
        "Different clients are told that different ones survived": "the signature on this secagg confirmation",
        "A client is asked to unmask twice": "does not take part in, or has finished",
        "The same parts are added up again without one client, so that it is the difference": "tell clients apart",
        "A sum is opened that withstands fewer corrupt clients than the Plan says": "other parameters than the Plan's",
        "The task's clipping norm is another than the one that all agreed on": "other work than was agreed on",
        "A client's update is asked for by itself, and the Plan promises secure aggregation": "promises secure",
        "A task is delivered a second time": "was here before",
        "A holder gives another share than the one that was dealt to it": "the sum is right",
    }
    for what, words in expected.items():
        assert words in said[what][1]
    masked: Any = finding.data["masked"]
    bare: Any = finding.data["without masks"]
    assert masked["words"] == bare["words"]
    assert min(masked["bytes_p"], masked["spread_p"], masked["correlation_p"]) * 3 >= protocol.LEVEL
    assert bare["bytes_p"] < 1e-12, "the same test tells vectors without masks from random words"


@pytest.mark.parametrize("sections", [DISTRIBUTED, EXAMPLE], ids=["distributed noise", "by example"])
def test_other_configurations_pass(folder: Path, sections: dict[str, Any]) -> None:
    finding = found(folder, **sections)
    assert finding.verdict == "passed", finding.found
    assert "A held-out loss is asked for that the Plan's ε does not cover" in rows(finding)
    if sections is EXAMPLE:
        assert "A client is asked in a round that is not its turn" in rows(finding)


@pytest.mark.slow
def test_a_sparse_graph(folder: Path) -> None:
    finding = found(folder, cohort={"size": 51})
    assert finding.verdict == "passed", finding.found
    assert (
        "what was committed to"
        in rows(finding)["The randomness of the graph is not what a client committed itself to"][1]
    )


def test_sealed_updates(folder: Path) -> None:
    finding = found(folder, protection={"kind": "sealed"})
    assert finding.verdict == "passed"
    said = rows(finding)
    assert set(said) > set(FORGERIES)
    assert not any("roster" in what for what in said)
    assert "the coordinator reads every update" in " ".join(finding.limits)


def test_without_protection_an_update_is_read(folder: Path) -> None:
    finding = found(folder, protection={"kind": "none"})
    assert finding.verdict == "leak"
    assert "whoever carries the messages reads every update" in finding.found[0]


# --- a check that is taken away ---------------------------------------------------------------------------------------


def anybody_survives(opened: Any, sharers: Any, raw: bytes) -> Split:
    """`read_split` without what it checks."""
    survivors, dropped = decode_survivors(raw, 2 * len(sharers) + 1)
    return Split(frozenset(survivors), frozenset(dropped))


def nothing(*args: object, **more: object) -> None:
    """A check that checks nothing."""


def believing(run: session.Session, survivors: bytes, name: str, signature: bytes) -> None:
    """`check_confirmation` without its signature."""


def test_a_client_that_believes_who_survived_is_found_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "read_split", anybody_survives)
    finding = found(folder)
    assert finding.verdict == "failed"
    what = "One client is said to be both alive and dropped out"
    assert f"Not as it has to be. {what}: it was answered." in finding.found
    assert rows(finding)[what] == ("NO", "it was answered")
    assert rows(finding)["One client is on the roster under two names"][0] == "yes"


LIED: dict[str, tuple[Any, str, Any, str]] = {
    "who is there twice": (session, "_no_repeats", nothing, "One client is on the roster under two names"),
    "whose keys": (session, "check_advertisement", nothing, "A client's keys are exchanged under its signature"),
    "who was told what": (
        states,
        "check_confirmation",
        believing,
        "Different clients are told that different ones survived",
    ),
    "two sums of a part": (
        secure.Sessions,
        "_once",
        nothing,
        "The same parts are added up again without one client, so that it is the difference",
    ),
    "what is opened": (
        secure,
        "_check",
        nothing,
        "A sum is opened that withstands fewer corrupt clients than the Plan says",
    ),
    "which adapter": (
        secure,
        "unpack_state",
        lambda adapter: {name: np.zeros(one.shape, np.float32) for name, one in adapter.items()},
        "The task's adapter is another than the one that all agreed on",
    ),
}


@pytest.mark.parametrize("name", LIED)
def test_a_client_without_a_check_is_found_out(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, attribute, instead, what = LIED[name]
    subject = audits.subject(folder)
    setting = Setting.made(subject.plan, 4, "", {"a": np.zeros((3, 2), np.float32)}, 1)
    before = tried(what, lambda: LIES[what](setting))
    assert before is not None and before.held
    monkeypatch.setattr(where, attribute, instead)
    after = tried(what, lambda: LIES[what](setting))
    assert after is not None and not after.held


FORGED: dict[str, tuple[Any, str, Any, str]] = {
    "a replay": (participant, "REMEMBERED", 0, "A task is delivered a second time"),
    "a signature": (identity, "verify", nothing, "The coordinator's signature on a task is altered"),
    "whose reply": (envelope, "_answering", lambda task, reply: reply, "A client replies in the name of another"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_node_without_a_check_is_found_out(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, attribute, instead, what = FORGED[name]
    plan = audits.subject(folder, protection={"kind": "sealed"}).plan

    def outcome() -> Outcome | None:
        post = Post(plan, "", {"a": np.zeros((3, 2), np.float32)})
        return tried(what, lambda: FORGERIES[what](post))

    before = outcome()
    assert before is not None and before.held, before
    monkeypatch.setattr(where, attribute, instead)
    after = outcome()
    assert after is not None and not after.held


def test_masks_that_hide_nothing_are_found_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums come out right without any masks, so that no run would notice."""
    monkeypatch.setattr(masks, "add", nothing)
    finding = found(folder)
    assert finding.verdict == "failed"
    assert "Not as it has to be. Masked vectors can be told from random words." in finding.found


def test_one_mask_that_is_forgotten_is_found_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server takes off a mask that a client has not put on."""
    own = boxes.own_key
    calls = iter(range(10**9))
    monkeypatch.setattr(
        boxes, "own_key", lambda seed, digest, name: own(seed, digest, name if next(calls) % 7 else f"{name}?")
    )
    assert found(folder).verdict == "failed"


def test_a_worker_that_gives_its_update_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is noticed although no data are there to train on."""
    before = worker.Worker.outcome

    def outcome(self: worker.Worker, task: Any) -> Any:
        return self.trained(task, task.work) if isinstance(task.work, Train) else before(self, task)

    monkeypatch.setattr(worker.Worker, "outcome", outcome)
    finding = found(folder)
    what = "A client's update is asked for by itself, and the Plan promises secure aggregation"
    assert rows(finding)[what] == ("NO", "it ended in an error that nobody foresaw: RuntimeError")


# --- the pieces -------------------------------------------------------------------------------------------------------


def refused() -> None:
    raise SecAggError("no", where="ann")


def test_only_a_refusal_holds() -> None:
    assert tried("x", lambda: Attempt(refused)) is not None
    one = tried("x", lambda: Attempt(refused, refused))
    assert one is not None and (one.held, one.said) == (True, "ann: no")
    for attempt in (Attempt(lambda: b"yes"), Attempt(refused, lambda: b"yes"), Attempt(lambda: [][0])):
        outcome = tried("x", lambda attempt=attempt: attempt)  # type: ignore[misc]
        assert outcome is not None and not outcome.held

    def unprepared() -> Attempt:
        raise SecAggError("an honest step")

    outcome = tried("x", unprepared)
    assert outcome is not None and not outcome.held
    assert tried("x", lambda: None) is None


def test_uniform_words_pass_at_their_level_and_others_fail() -> None:
    random = np.random.default_rng(3)
    beneath = random.standard_normal(4000)
    low = [uniformity(random.integers(0, 2**24, 4000).astype(np.uint32), 24, beneath).p for _ in range(400)]
    assert sum(p < 0.05 for p in low) <= 32, "5 % of 400 and three standard deviations"
    words = random.integers(0, 2**24, 4000).astype(np.uint32)
    assert uniformity(words & np.uint32(0xFFFFFE), 24, beneath).p < 1e-9
    assert uniformity(words // 2, 24, beneath).p < 1e-9
    correlated = (words.astype(np.float64) / 2**24 - 0.5) * 0.1 + 0.1 * beneath
    assert uniformity(words, 24, correlated).p < 1e-9
    with pytest.raises(ValueError, match="words over"):
        uniformity(words, 24, beneath[:3])
    with pytest.raises(ValueError, match="4000 words modulo 2"):
        uniformity(words, 8, beneath)
