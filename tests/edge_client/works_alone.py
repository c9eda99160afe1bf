"""Works by a Plan in a process of its own, as a client does, and prints what memory that took.

python works_alone.py < QUESTION    {"plan": canonical, "folder": …, "way": {…} or null, "most": bytes or null}
"""

from __future__ import annotations

import importlib
import json
import sys
from array import array
from pathlib import Path

import numpy as np

from farfield.edge_client import device, limit
from farfield.edge_client.choice import Way
from farfield.edge_client.data import ClassExample, ClientData, Example, TokenExample
from farfield.edge_client.train import evaluate
from farfield.edge_client.worker import Worker
from farfield.emulator import methods
from farfield.emulator.bench import Bench
from farfield.protocols import plan as plans
from farfield.protocols.errors import DeviceError
from farfield.protocols.messages import Task, Train
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import pack_state

STEPS = 2


def work(plan: Plan, folder: Path, local: Plan) -> None:
    """Two steps, and an evaluation of one batch."""
    bench = Bench(plan, folder, local=local)
    generator = np.random.default_rng(0)
    count = max(local.training.batch_size * local.training.gradient_accumulation * STEPS, local.evaluation.batch_size)
    rows = [array("i", generator.integers(3, 200, plan.data.max_length).tolist()) for _ in range(count)]
    examples: list[Example] = [
        TokenExample(one, one) if plan.model.task == "causal-lm" else ClassExample(one, 1) for one in rows
    ]
    worker = Worker("node", bench, lambda: ClientData(examples, []), used_up=True)
    brought = Train(pack_state(bench.current(), plan.delivery.dtype))
    worker.outcome(Task("run", 1, "node", plan.digest, brought, cohort=1))
    evaluate(bench.tuned, examples[: local.evaluation.batch_size], local.evaluation.batch_size, pad_id=bench.pad_id)


def main() -> None:
    """Answer one question."""
    question = json.load(sys.stdin)
    importlib.import_module("farfield.edge_client.resident")
    plan = plans.restore(question["plan"].encode(), methods.registered())
    way = None if question["way"] is None else Way(**question["way"])
    device.save_memory(way is not None and way.frugal)
    try:
        with limit.held(question["most"]):
            work(plan, Path(question["folder"]), plan if way is None else way.plan(plan))
    except DeviceError as error:
        print(json.dumps({"stopped": str(error), "peak": device.most_resident()}))
        return
    print(json.dumps({"stopped": None, "peak": device.most_resident()}))


if __name__ == "__main__":
    main()
