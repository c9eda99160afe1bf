"""Secure aggregation beside Flower's SecAgg+, in the same run: a client's time, the server's, bytes, and mask speed.

    python benchmarks/secure_aggregation.py [--values 10000000] [--repeats 3] [--json FILE]

A client's time is everything that it does in a session apart from training: keys, agreement, sharing, boxes, weighting,
fixed point, masks, packing, and, on our side, the signatures of the roster and of who survived. It masks with everybody
on a roster of one more than it has neighbours. Its peers run the same code and answer in full, but for the masks on
their vectors, which are left out. The server's time is everything that it does from the first question to the decoded
sum, with the degree and threshold that our defaults come to; some clients drop out after they have shared their
secrets.

Flower's side is the code of its package: the functions behind `secaggplus_mod`, without the handling of messages, and
`SecAggPlusWorkflow` as a whole, without the time in which it waits for the grid. Both sides have the same threshold
and the same vector. Of the masked vectors that Flower's server adds at full size, all are copies of one, because a real
one takes seconds to make and 80 MB; its work does not depend on what is in them. Before anything is timed, both sides
aggregate a small vector for real. Our sums, small and large, must equal the plain sum of the fixed-point values.

What counts is processor time, which other work on the machine lengthens less than the time by the clock. Neither side
computes in parallel: the threads in Flower's sharing are of Python and take turns.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Final, cast
from unittest.mock import patch

import numpy as np
import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import Code, FitIns, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat
from flwr.compat.common import recorddict_compat
from flwr.server import LegacyContext
from flwr.server.strategy import Strategy
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD
from flwr.server.workflow.constant import Key as WorkflowKey
from flwr.serverapp import Grid
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from farfield.protocols.errors import PrivacyError
from farfield.protocols.privacy import distributed
from farfield.protocols.randomness import Randomness
from farfield.protocols.secagg import Open, Phase, State, Step, Terms, begin, fixedpoint, masks, open_session, session
from farfield.protocols.secagg.masks import Words
from farfield.protocols.secagg.parameters import SMALL, choose
from farfield.protocols.secagg.parameters import Parameters as Graph

BITS: Final = 16  # precision of one value, as a Plan has it by default
LIMIT: Final = 0.05
WEIGHT: Final = 1000  # of every client; Flower's `max_weight`, and so as much as there may be
DEFAULTS: Final = (0.1, 0.1)  # corrupt and dropping out, as a Plan has them by default
EVERYBODY: Final = (0.33, 0.3)  # more than a sparse graph withstands: everybody masks with everybody
NOISE_MULTIPLIER: Final = 1.0
FASTER, BYTES, BYTES_WITH_NOISE, OF_AES = 8.0, 3.0, 2.0, 0.5

Values = NDArray[np.float32]


def graph(clients: int, stated: tuple[float, float]) -> Graph:
    return choose(clients, *stated, "semi-malicious")


def draw(values: int, number: int) -> Values:
    """The update of a client."""
    drawn = np.random.default_rng(number).standard_normal(values, np.float32)
    return np.multiply(drawn, LIMIT / 4, out=drawn)


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds: of processor, all threads together, and by the clock."""

    busy: float
    clock: float

    def __add__(self, other: Took) -> Took:
        return Took(self.busy + other.busy, self.clock + other.clock)

    def __sub__(self, other: Took) -> Took:
        return Took(self.busy - other.busy, self.clock - other.clock)


class Stopwatch:
    """What was taken within `with`, summed."""

    def __init__(self) -> None:
        self.took = Took(0.0, 0.0)

    def __enter__(self) -> None:
        self._began = Took(time.process_time(), time.perf_counter())

    def __exit__(self, *_: object) -> None:
        self.took += Took(time.process_time(), time.perf_counter()) - self._began


# Ours


class Ours:
    """A session about to begin, and all of its clients."""

    def __init__(self, clients: int, values: int, stated: tuple[float, float]) -> None:
        self.modulus_bits, self.levels = fixedpoint.choose_modulus(clients, BITS)
        corrupt, dropouts = stated
        self.identities = {f"client-{number:04}": Ed25519PrivateKey.generate() for number in range(clients)}
        self.states: dict[str, State | None] = {
            name: begin(name, key, Terms(3, 2), lambda _: None) for name, key in self.identities.items()
        }
        self.opened = Open(
            session=secrets.token_bytes(32),
            run="benchmark",
            round=1,
            context=bytes(32),
            clients=clients,
            modulus_bits=self.modulus_bits,
            length=values,
            minimum=2,
            corrupt=corrupt,
            dropouts=dropouts,
            adversary="semi-malicious",
        )

    def open(self) -> Phase:
        return open_session(
            self.opened, {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}
        )

    def encode(self, update: Values) -> Words:
        words = fixedpoint.zeros(len(update), self.modulus_bits)
        fixedpoint.encode(update * np.float32(1), LIMIT, self.levels, words, Randomness())
        return words

    def answer(self, name: str, common: bytes, own: bytes, words: Words | None) -> bytes | memoryview:
        state = self.states[name]
        assert state is not None
        self.states[name], answer = state.answer(common, own, words)
        return answer


@dataclass(frozen=True, slots=True)
class Client:
    """What one client took, and sent: in its masked vector, and in everything else."""

    took: Took
    vector_bytes: int
    other_bytes: int


def our_client(update: Values, neighbours: int) -> Client:
    """The first of `neighbours` + 1 clients, from the first step to the last."""
    ours = Ours(neighbours + 1, len(update), EVERYBODY)
    assert graph(neighbours + 1, EVERYBODY).degree == neighbours
    phase, watch, sent = ours.open(), Stopwatch(), dict[Step, int]()
    nothing = fixedpoint.zeros(len(update), ours.modulus_bits)
    while True:
        for name in phase.clients:
            step, common, own = phase.step, phase.common, phase.own(name)
            if sent.get(step) is None:  # the first in line
                _forget(step, neighbours + 1 > SMALL)
                with watch:
                    words = ours.encode(update) if step is Step.SUBMIT else None
                    answer = ours.answer(name, common, own, words)
                sent[step] = len(answer)
                if step is Step.UNMASK:
                    vector = sent.pop(Step.SUBMIT)
                    return Client(watch.took, vector, sum(sent.values()))
            else:
                with patch.object(masks, "add", lambda *_: None):
                    answer = ours.answer(name, common, own, nothing if step is Step.SUBMIT else None)
            phase.receive(name, answer)
        after = phase.close()
        assert isinstance(after, Phase)
        phase = after


def _forget(step: Step, sparse: bool) -> None:
    """What the server's side has read before this client did, in the same process."""
    if step is (Step.REVEAL if sparse else Step.SHARE):
        session.read_roster.cache_clear()
    if step is Step.SHARE:
        session.read_session.cache_clear()


def our_server(values: int, clients: int, dropped: int) -> Took:
    """With all clients run for real. The sum must be exact."""
    ours, watch = Ours(clients, values, DEFAULTS), Stopwatch()
    plain, silent = np.zeros(values, np.int64), set(list(ours.identities)[:dropped])
    with watch:
        phase = ours.open()
    while True:
        for number, name in enumerate(phase.clients):
            words = None
            if phase.step is Step.SUBMIT:
                if name in silent:
                    continue
                words = ours.encode(draw(values, number))
                plain += words.view(np.int32)
            with watch:
                common, own = phase.common, phase.own(name)
            answer = ours.answer(name, common, own, words)
            with watch:
                phase.receive(name, answer)
        with watch:
            after = phase.close()
        if not isinstance(after, Phase):
            break
        phase = after
    with watch:
        decoded = fixedpoint.decode(after.total, ours.modulus_bits, LIMIT, ours.levels)
    assert after.clients == tuple(sorted(ours.identities.keys() - silent))
    assert np.array_equal(decoded, plain * (LIMIT / ours.levels)), "the sum is not that of the fixed-point values"
    return watch.took


# Flower's


class FlowerClient:
    """The client's side of SecAgg+: what `secaggplus_mod` calls in each stage."""

    def __init__(self, node: int) -> None:
        self.state = SecAggPlusState()
        self.state.nid = node

    def answer(self, stage: str, configs: ConfigRecord, update: Parameters | None) -> dict[str, Any]:
        if stage == Stage.SETUP:
            return _setup(self.state, configs)
        if stage == Stage.SHARE_KEYS:
            return _share_keys(self.state, configs)
        if stage == Stage.COLLECT_MASKED_VECTORS:
            assert update is not None
            return _collect_masked_vectors(self.state, configs, WEIGHT, update)
        return _unmask(self.state, configs)


def flower_client_work(update: Values, neighbours: int) -> Client:
    """The first of `neighbours` + 1 clients, through all stages."""
    everybody, watch = range(1, neighbours + 2), Stopwatch()
    threshold = graph(neighbours + 1, EVERYBODY).threshold
    setup: dict[str, Any] = {
        Key.SAMPLE_NUMBER: neighbours + 1,
        Key.SHARE_NUMBER: neighbours + 1,
        Key.THRESHOLD: threshold,
        Key.CLIPPING_RANGE: LIMIT,
        Key.TARGET_RANGE: 1 << 22,
        Key.MOD_RANGE: 1 << 32,
        Key.MAX_WEIGHT: float(WEIGHT),
    }
    client, *peers = (FlowerClient(node) for node in everybody)
    parameters = ndarrays_to_parameters([update])
    sent = []

    def answer(stage: str, configs: dict[str, Any]) -> dict[str, Any]:
        record = ConfigRecord(configs)
        with watch:
            answered = client.answer(stage, record, parameters)
        sent.append(sum(map(_size, answered.values())))
        return answered

    own = answer(Stage.SETUP, setup)
    keys = {str(client.state.nid): [own[Key.PUBLIC_KEY_1], own[Key.PUBLIC_KEY_2]]}
    for peer in peers:
        public = peer.answer(Stage.SETUP, ConfigRecord(setup), None)
        keys[str(peer.state.nid)] = [public[Key.PUBLIC_KEY_1], public[Key.PUBLIC_KEY_2]]
    answer(Stage.SHARE_KEYS, keys)
    # Every peer has the same shares: to make them takes Flower's code seconds for each.
    seed_share = create_shares(secrets.token_bytes(32), threshold, neighbours + 1)[0]
    key_share = create_shares(peers[0].state.sk1, threshold, neighbours + 1)[0]
    boxes = []
    for peer in peers:
        shared = generate_shared_key(bytes_to_private_key(peer.state.sk2), bytes_to_public_key(client.state.pk2))
        plain = share_keys_plaintext_concat(peer.state.nid, client.state.nid, seed_share, key_share)
        boxes.append(encrypt(shared, plain))
    inbox = {Key.CIPHERTEXT_LIST: boxes, Key.SOURCE_LIST: [peer.state.nid for peer in peers]}
    answer(Stage.COLLECT_MASKED_VECTORS, inbox)
    answer(Stage.UNMASK, {Key.ACTIVE_NODE_ID_LIST: list(everybody), Key.DEAD_NODE_ID_LIST: []})
    vector = sent.pop(2)
    return Client(watch.took, vector, sum(sent))


def _size(value: Any) -> int:
    """Bytes of a value in a record; of a number, eight."""
    if isinstance(value, list):
        return sum(map(_size, value))
    return len(value) if isinstance(value, bytes) else 8


class FlowerGrid:
    """Clients who answer at once; the dropped share their secrets, and then fall silent.

    Attributes:
        waited: what the server waited for.
    """

    def __init__(self, updates: Callable[[int], Parameters], clients: int, dropped: int, copies: bool) -> None:
        """`copies`: all submit the masked vector of the first, and mask a single value besides, to read their inbox."""
        self.waited = Stopwatch()
        self._clients = {node: FlowerClient(node) for node in range(1, clients + 1)}
        self._updates, self._dropped, self._copies = updates, dropped, copies
        self._masked: Any = None

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        with self.waited:
            return list(self._replies(messages))

    def _replies(self, messages: Iterable[Message]) -> Iterator[Message]:
        for message in messages:
            node = message.metadata.dst_node_id
            configs = dict(message.content.config_records[RECORD_KEY_CONFIGS])
            stage, update = str(configs.pop(Key.STAGE)), None
            fit = FitRes(Status(Code.OK, ""), Parameters([], "numpy.ndarray"), WEIGHT, {})
            content = recorddict_compat.fitres_to_recorddict(fit, keep_input=True)
            if stage == Stage.COLLECT_MASKED_VECTORS:
                if node <= self._dropped:
                    continue
                copied = self._copies and self._masked is not None
                update = ndarrays_to_parameters([np.zeros(1, np.float32)]) if copied else self._updates(node)
            answer = self._clients[node].answer(stage, ConfigRecord(configs), update)
            if update is not None and self._copies:
                self._masked = self._masked or answer[Key.MASKED_PARAMETERS]
                answer[Key.MASKED_PARAMETERS] = self._masked
            content.config_records[RECORD_KEY_CONFIGS] = ConfigRecord(answer)
            yield Message(content, reply_to=message)


class Once:
    """A strategy that asks everybody, and keeps the mean."""

    def __init__(self, clients: int) -> None:
        self._clients = clients
        self.mean = Parameters([], "numpy.ndarray")

    def configure_fit(self, number: int, parameters: Parameters, clients: Any) -> list[tuple[Any, FitIns]]:
        return [(Proxy(node), FitIns(parameters, {})) for node in range(1, self._clients + 1)]

    def aggregate_fit(
        self, number: int, results: Sequence[tuple[Any, FitRes]], failures: Any
    ) -> tuple[None, dict[str, Any]]:
        assert not failures
        self.mean = results[0][1].parameters
        return None, {}


@dataclass(frozen=True)
class Proxy:
    node_id: int


def flower_server(updates: Callable[[int], Values], clients: int, dropped: int, copies: bool) -> tuple[Took, Values]:
    """And the mean that came out."""
    chosen, strategy = graph(clients, DEFAULTS), Once(clients)
    grid = FlowerGrid(lambda node: ndarrays_to_parameters([updates(node)]), clients, dropped, copies)
    state = RecordDict()
    state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({WorkflowKey.CURRENT_ROUND: 1})
    state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord([np.zeros(1, np.float32)])
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # whose messages the workflow's are
    context = LegacyContext(
        Context(run_id=1, node_id=0, node_config={}, state=state, run_config={}),
        strategy=cast(Strategy, strategy),
    )
    workflow = SecAggPlusWorkflow(
        chosen.degree + 1, chosen.threshold, max_weight=float(WEIGHT), clipping_range=LIMIT, timeout=None
    )
    whole = Stopwatch()
    with whole:
        workflow(cast(Grid, grid), context)
    (mean,) = parameters_to_ndarrays(strategy.mean)
    return whole.took - grid.waited.took, mean


def check(values: int, clients: int, dropped: int) -> None:
    """Both sides on real vectors: our sum exactly, Flower's to its own precision."""
    our_server(values, clients, dropped)
    mean = flower_server(lambda node: draw(values, node), clients, dropped, copies=False)[1]
    clipped = [np.clip(draw(values, node), -LIMIT, LIMIT) for node in range(dropped + 1, clients + 1)]
    assert np.abs(mean - np.mean(clipped, axis=0)).max() < 1e-6, "Flower's code is not driven as it should be"


# The speed of AES and of masks


def aes_speed(algorithm: type[algorithms.AES128] | type[algorithms.AES256], key_bytes: int) -> float:
    """GB/s of AES-CTR by `update_into` over a buffer in the core's cache."""
    stream = Cipher(algorithm(secrets.token_bytes(key_bytes)), modes.CTR(bytes(16))).encryptor()
    zeros, drawn, blocks = bytes(masks.BLOCK_BYTES), bytearray(masks.BLOCK_BYTES), 2000
    watch = Stopwatch()
    with watch:
        for _ in range(blocks):
            stream.update_into(zeros, drawn)
    return blocks * masks.BLOCK_BYTES / watch.took.busy / 1e9


def mask_speed(vector: Words) -> float:
    """GB/s of AES-CTR stream that `masks.add` draws and adds."""
    keys, watch = [secrets.token_bytes(masks.KEY_BYTES) for _ in range(8)], Stopwatch()
    with watch:
        masks.add(vector, keys[:4], keys[4:])
    return len(keys) * vector.nbytes / watch.took.busy / 1e9


@dataclass(slots=True)
class Speeds:
    """GB/s, in turn."""

    aes128: list[float]
    aes256: list[float]
    masks: list[float]

    def measure(self, vector: Words) -> None:
        self.aes128.append(aes_speed(algorithms.AES128, 16))
        self.masks.append(mask_speed(vector))
        self.aes256.append(aes_speed(algorithms.AES256, 32))


# Noise in shares


@dataclass(frozen=True, slots=True)
class Noise:
    """A modulus for distributed noise, and the noise beside central noise; None where the modulus is too small."""

    modulus_bits: int
    inflation: float | None

    def __str__(self) -> str:
        noise = "does not fit" if self.inflation is None else f"noise × {self.inflation:.3f}"
        return f"{self.modulus_bits / 8:.2f}: {noise}"


def noise(values: int, clients: int, dropped: int) -> tuple[Noise, Noise]:
    """What `distributed.smallest` picks, and then what 16 bits would come to."""
    survivors = clients - dropped
    picked = distributed.smallest(values, clients, survivors, NOISE_MULTIPLIER)
    try:
        inflation: float | None = distributed.design(values, clients, survivors, 16, NOISE_MULTIPLIER).inflation
    except PrivacyError:
        inflation = None
    return Noise(picked.modulus_bits, picked.inflation), Noise(16, inflation)


# The report


@dataclass(frozen=True, slots=True)
class Verdict:
    """A figure beside what is wanted of it."""

    what: str
    figure: float
    wanted: str
    met: bool

    def __str__(self) -> str:
        return f"{'met' if self.met else 'MISSED'}: {self.what}: {self.figure:.2f}; wanted {self.wanted}"


def at_least(what: str, figure: float, wanted: float) -> Verdict:
    return Verdict(what, figure, f"≥ {wanted:g}", figure >= wanted)


def at_most(what: str, figure: float, wanted: float) -> Verdict:
    return Verdict(what, figure, f"≤ {wanted:g}", round(figure, 2) <= wanted)


@dataclass(frozen=True, slots=True)
class Measured:
    """All figures.

    Attributes:
        clients: by the number of neighbours.
        server: of both sides.
        noise: what is picked, and what 16 bits come to.
    """

    machine: str
    values: int
    clients: dict[int, tuple[list[Client], list[Client]]]
    server: tuple[Took, Took]
    noise: tuple[Noise, Noise]
    speeds: Speeds


def report(measured: Measured, server: str) -> list[Verdict]:
    """Print the table, ours beside Flower's. `server`: what is said of the server's session."""
    print(f"{measured.machine}; {measured.values:,} values\n")
    print("| what | ours | Flower's SecAgg+ | ratio | by the clock |\n|---|---|---|---|---|")
    verdicts = [
        _compare(f"client, {degree} neighbours", [one.took for one in ours], [one.took for one in theirs])
        for degree, (ours, theirs) in measured.clients.items()
    ]
    verdicts.append(_compare(f"server, {server}", *([took] for took in measured.server)))
    sent = [ran[0] for ran in list(measured.clients.values())[-1]]
    ours, theirs = (f"{one.vector_bytes / measured.values:.2f} ({one.other_bytes / 1e3:.0f} kB)" for one in sent)
    ratio = sent[1].vector_bytes / sent[0].vector_bytes
    print(f"| bytes a parameter up (and besides) | {ours} | {theirs} | {ratio:.1f} | |")
    verdicts.append(at_most("bytes a parameter up", sent[0].vector_bytes / measured.values, BYTES))
    picked, small = measured.noise
    verdicts.append(at_most("bytes a parameter up, distributed noise", picked.modulus_bits / 8, BYTES_WITH_NOISE))
    print(f"| … with distributed noise | {picked} (or {small}) | | | |")
    speeds = measured.speeds
    share = median(mask / aes for mask, aes in zip(speeds.masks, speeds.aes128, strict=True))
    verdicts.append(at_least("masks, of AES-128-CTR's own speed", share, OF_AES))
    print(
        f"\nmasks {_spread(speeds.masks, ' GB/s')}; AES-128-CTR {_spread(speeds.aes128, ' GB/s')}; "
        f"AES-256-CTR {_spread(speeds.aes256, ' GB/s')}\n"
        "every sum of ours equals the plain sum of the fixed-point values\n"
    )
    print(*verdicts, sep="\n")
    return verdicts


def _compare(what: str, ours: list[Took], theirs: list[Took]) -> Verdict:
    """A row of the table; what counts is processor time."""
    busy, clock = ([[getattr(one, kind) for one in side] for side in (ours, theirs)] for kind in ("busy", "clock"))
    ratio, other = (median(seconds[1]) / median(seconds[0]) for seconds in (busy, clock))
    print(
        f"| {what} | {_spread(busy[0], ' s')} | {_spread(busy[1], ' s')} | {ratio:.1f} "
        f"| {median(clock[0]):.2f} s, {median(clock[1]):.2f} s: {other:.1f} |"
    )
    return at_least(f"{what}, times less time", ratio, FASTER)


def _spread(figures: list[float], unit: str) -> str:
    if len(figures) == 1:
        return f"{figures[0]:.2f}{unit}"
    return f"{median(figures):.2f}{unit} ({min(figures):.2f} to {max(figures):.2f})"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    values: Annotated[int, typer.Option(min=1000, help="Parameters in an update.")] = 10_000_000,
    neighbours: Annotated[list[int] | None, typer.Option(min=2, help="Of a client. [default: 12, 32, 99]")] = None,
    clients: Annotated[int, typer.Option(min=6, help="Of the server.")] = 100,
    dropped: Annotated[int, typer.Option(min=0, help="How many of them drop out.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Of a client's work, in turn.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
) -> None:
    logging.getLogger("flwr").setLevel(logging.WARNING)
    before, update, speeds = os.getloadavg()[0], draw(values, 0), Speeds([], [], [])
    check(1000, clients=7, dropped=1)
    found: dict[int, tuple[list[Client], list[Client]]] = {degree: ([], []) for degree in neighbours or [12, 32, 99]}
    for repeat in range(repeats):
        for degree, (ours, theirs) in found.items():
            with _told(f"client with {degree} neighbours, {repeat + 1} of {repeats}"):
                speeds.measure(fixedpoint.zeros(values, 32))
                ours.append(our_client(update, degree))
                theirs.append(flower_client_work(update, degree))
    with _told(f"our server with {clients} clients"):
        our_took = our_server(values, clients, dropped)
    speeds.measure(fixedpoint.zeros(values, 32))
    with _told(f"Flower's server with {clients} clients"):
        their_took, _ = flower_server(lambda _: update, clients, dropped, copies=True)
    speeds.measure(fixedpoint.zeros(values, 32))
    machine = (
        f"{date.today()}, {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"flwr {version('flwr')}, cryptography {version('cryptography')}; "
        f"load {before:.1f} at the beginning, {os.getloadavg()[0]:.1f} at the end"
    )
    measured = Measured(machine, values, found, (our_took, their_took), noise(values, clients, dropped), speeds)
    degree = graph(clients, DEFAULTS).degree
    verdicts = report(measured, f"{clients} clients, {dropped} dropped, {degree} neighbours")
    if json_file is not None:
        document = asdict(measured) | {"verdicts": [asdict(one) for one in verdicts]}
        json_file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _told(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    app()
