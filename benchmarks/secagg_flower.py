"""Flower's side of the benchmark of secure aggregation: a client's work by SecAgg+, and the server's whole workflow."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
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
from secagg_case import DEFAULTS, EVERYBODY, LIMIT, WEIGHT, Client, Values, graph
from stopwatch import Stopwatch, Took


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


def flower_client(update: Values, neighbours: int) -> Client:
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
