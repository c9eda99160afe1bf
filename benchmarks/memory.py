"""What training takes of a machine's memory, method by method, beside `peft` as it comes.

    python benchmarks/memory.py [--only NAME …] [--predict] [--write docs/benchmarks.md]

Each row is a process of its own that trains the same Llama (134 million parameters in 12 blocks, vocabulary 32,000,
random weights, bfloat16) on batches of 4 × 512 tokens for a few steps of AdamW, by the code that an edge client runs:
from a task's packed adapter to a packed update.
`peft` is LoRA as the library installs it, with its float32 copies and all logits, in a plain loop; "inference" is an
evaluation of the same batch. Peak is the most resident memory that the process had, Python and its libraries included;
saved is what autograd keeps of one batch for the way back, weights not counted.

"frugal" is a process whose allocator gives large tensors back at once (`farfield.edge_client.device.save_memory`).
With `--predict` each row is also foreseen as `edge-client doctor --plan` does.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from tokenizers import Tokenizer, models, pre_tokenizers

from farfield.edge_client import device
from farfield.edge_client.choice import promised
from farfield.edge_client.data import ClientData, Example, TokenExample
from farfield.edge_client.probe import probe
from farfield.edge_client.traced import trace
from farfield.edge_client.train import evaluate
from farfield.edge_client.worker import Worker
from farfield.emulator import methods
from farfield.emulator.bench import Bench
from farfield.protocols import plan as plans
from farfield.protocols.messages import Task, Train
from farfield.protocols.plan import Plan
from farfield.protocols.tensors import pack_state

hf: Any = transformers

VOCABULARY, BATCH, LENGTH, STEPS = 32_000, 4, 512, 3
RESULTS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- memory -->", "<!-- /memory -->"


@dataclass(frozen=True, slots=True)
class Row:
    """One process: `method` is a tuning method, "mezo over lora", "peft" or "inference"; `wire` is `delivery.dtype`."""

    method: str
    frugal: bool = True
    checkpointing: bool = False
    wire: str = "float32"

    @property
    def name(self) -> str:
        marks = ", checkpointing" * self.checkpointing + ", frugal" * self.frugal
        marks += f", {self.wire} on the wire" * (self.wire != "float32")
        return f"{self.method}{marks}"


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes and seconds; `predicted` is None where nobody asked."""

    peak: int
    saved: int
    seconds: float
    predicted: int | None


def rows() -> list[Row]:
    """The table's, in its order."""
    ours = [Row(kind) for kind in sorted([*methods.registered(), "mezo over lora"]) if kind != "lora"]
    ours.append(Row("mezo", wire="bfloat16"))
    lora = [Row("lora", frugal=False), Row("lora"), Row("lora", frugal=False, checkpointing=True)]
    return [
        Row("peft", frugal=False), Row("peft"), Row("inference", frugal=False), Row("inference"),
        *lora, Row("lora", checkpointing=True), *ours,
    ]  # fmt: skip


def plan_of(row: Row, folder: Path) -> Plan:
    """The Plan that the row's process works by."""
    kind, _, over = row.method.partition(" over ")
    kind = kind if kind in methods.registered() else "lora"
    settings = f'over = "{over}"' if over else ""
    plain = 'optimizer = "sgd"' if kind in ("mezo", "fedkseed") else ""
    text = f"""
        [model]
        backbone = "{folder}"
        [data]
        max_length = {LENGTH}
        [tuning]
        kind = "{kind}"
        {settings}
        [training]
        rounds = 1
        steps = {STEPS}
        batch_size = {BATCH}
        learning_rate = 1e-4
        checkpointing = {str(row.checkpointing).lower()}
        {plain}
        [evaluation]
        batch_size = {BATCH}
        [delivery]
        dtype = "{row.wire}"
        [protection]
        kind = "none"
    """
    return plans.parse(text, methods.registered(), None)


def write_backbone(folder: Path) -> int:
    """Make the backbone, and return how many bytes its weights have."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=12, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(folder)  # noqa: S106
    return sum(one.nbytes for one in model.parameters())


def alone(row: Row, folder: Path) -> Measured:
    """Do the row's work in this process."""
    device.save_memory(row.frugal)
    generator = np.random.default_rng(0)
    ids = [array("i", generator.integers(3, VOCABULARY, LENGTH).tolist()) for _ in range(BATCH * STEPS)]
    work = {"peft": _peft, "inference": _inference}.get(row.method, _ours)
    saved = Saved()
    with saved.counted():
        seconds = work(row, folder, ids)
    return Measured(device.most_resident(), saved.most, seconds, None)


def foreseen(row: Row, folder: Path) -> int:
    """What the planner predicts for the row, in this process."""
    from farfield.edge_client.choice import in_heap

    plan = plan_of(row, folder)
    program = probe(plan.model.dtype).program
    traced = trace(plan, folder)
    tensors = traced.evaluating if row.method == "inference" else traced.training
    assert promised(plan).batch_size == BATCH
    return program + (tensors if row.frugal else traced.weights + in_heap(tensors - traced.weights))


class Saved:
    """What autograd keeps, the most at any time: bytes of storages that are no parameters."""

    def __init__(self) -> None:
        self.most = 0
        self._now: dict[int, int] = {}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within it everything that is kept for a way back is counted, until the way back has been made."""
        held: dict[int, tuple[int, int]] = {}

        def keep(tensor: torch.Tensor) -> Kept:
            storage = tensor.untyped_storage()
            if isinstance(tensor, torch.nn.Parameter) or (tensor.is_leaf and tensor.requires_grad):
                return Kept(tensor, lambda: None)
            key = storage.data_ptr()
            size, users = held.get(key, (storage.nbytes(), 0))
            held[key] = (size, users + 1)
            self.most = max(self.most, sum(size for size, _ in held.values()))

            def gone() -> None:
                size, users = held[key]
                if users > 1:
                    held[key] = (size, users - 1)
                else:
                    del held[key]

            return Kept(tensor, gone)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
            yield


class Kept:
    """A tensor in autograd's hands; says when it is let go."""

    def __init__(self, tensor: torch.Tensor, gone: Callable[[], None]) -> None:
        self.tensor, self._gone = tensor, gone

    def __del__(self) -> None:
        self._gone()


def _ours(row: Row, folder: Path, ids: list[array[int]]) -> float:
    plan = plan_of(row, folder)
    bench = Bench(plan, folder)
    examples: list[Example] = [TokenExample(one, one) for one in ids]
    times = [time.perf_counter()]
    worker = Worker(
        "node",
        bench,
        lambda: ClientData(examples, []),
        on_step=lambda _: times.append(time.perf_counter()),
        used_up=True,
    )
    work = Train(pack_state(bench.current(), plan.delivery.dtype))
    worker.outcome(Task("run", 1, "node", plan.digest, work, cohort=1))
    return float(np.diff(times).min())


def _inference(row: Row, folder: Path, ids: list[array[int]]) -> float:
    bench = Bench(plan_of(row, folder), folder)
    began = time.perf_counter()
    evaluate(bench.tuned, [TokenExample(one, one) for one in ids], BATCH, pad_id=bench.pad_id)
    return (time.perf_counter() - began) / STEPS


def _peft(row: Row, folder: Path, ids: list[array[int]]) -> float:
    from peft import LoraConfig, get_peft_model

    model: Any = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)
    model.train()
    times = [time.perf_counter()]
    for step in range(STEPS):
        batch = torch.tensor([list(one) for one in ids[step * BATCH : (step + 1) * BATCH]])
        model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
    return float(np.diff(times).min())


def _child(task: str, row: Row, folder: Path) -> Any:
    question = json.dumps([task, row.method, row.frugal, row.checkpointing, row.wire, str(folder)])
    done = subprocess.run(  # noqa: S603 - this file
        [sys.executable, "-W", "ignore", __file__, "--alone", question], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{row.name}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measured(row: Row, folder: Path, predict: bool) -> Measured:
    found = _child("measure", row, folder)
    foretold = _child("predict", row, folder) if predict and row.method != "peft" else None
    return Measured(found[0], found[1], found[2], foretold)


def _table(found: dict[Row, Measured], floor: int) -> list[str]:
    lines = [
        f"{date.today()}, {platform.machine()}, threads: {torch.get_num_threads()}, torch {torch.__version__}.",
        f"The floor, weights alone: {floor / 1e6:.0f} MB.",
        "",
        "| | peak MB | of peft's | saved MB | s a step | predicted MB | error |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = found.get(Row("peft", frugal=False))
    for row, one in found.items():
        share = f"{one.peak / base.peak:.2f}" if base else ""
        guess = "" if one.predicted is None else f"{one.predicted / 1e6:.0f}"
        error = "" if one.predicted is None else f"{one.predicted / one.peak - 1:+.1%}"
        cells = [row.name, f"{one.peak / 1e6:.0f}", share, f"{one.saved / 1e6:.0f}", f"{one.seconds:.1f}", guess, error]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *_targets(found)]


def _targets(found: dict[Row, Measured]) -> Iterator[str]:
    """Each target that the rows allow to be checked, as a line of a list."""
    peft = Row("peft", frugal=False)

    def said(what: str, ratio: float, most: float) -> str:
        return f"- {what}: {ratio:.2f}, at most {most:.2f}: **{'met' if ratio <= most else 'missed'}**"

    for frugal in (False, True):
        for checkpointing, most in ((False, 0.65), (True, 0.40)):
            row = Row("lora", frugal, checkpointing)
            if row in found and peft in found:
                yield said(f"peak of {row.name} by that of peft's", found[row].peak / found[peft].peak, most)
    for row in (Row("mezo"), Row("mezo", wire="bfloat16"), Row("mezo over lora")):
        if row in found and Row("inference") in found:
            yield said(f"peak of {row.name} by that of inference", found[row].peak / found[Row("inference")].peak, 1.10)
    for kind in ("lst", "meft"):
        if Row(kind) in found and peft in found:
            yield said(f"saved by {kind} by what peft's LoRA saves", found[Row(kind)].saved / found[peft].saved, 0.50)


def main(
    only: Annotated[list[str] | None, typer.Option(help="Rows, by method; all if absent.")] = None,
    predict: Annotated[bool, typer.Option("--predict", help="Foresee each row too.")] = False,
    write: Annotated[Path | None, typer.Option(help="Put the table between the markers of this file.")] = None,
    question: Annotated[str | None, typer.Option("--alone", hidden=True)] = None,
) -> None:
    """Measure, print, and write."""
    if question is not None:
        task, method, frugal, checkpointing, wire, place = json.loads(question)
        row = Row(method, frugal, checkpointing, wire)
        if task == "predict":
            print(json.dumps(foreseen(row, Path(place))))
        else:
            one = alone(row, Path(place))
            print(json.dumps([one.peak, one.saved, one.seconds]))
        return
    with TemporaryDirectory() as name:
        floor = write_backbone(Path(name))
        found: dict[Row, Measured] = {}
        for row in rows():
            if only is None or row.method in only:
                found[row] = _measured(row, Path(name), predict)
                print(row.name, found[row], file=sys.stderr, flush=True)
    lines = _table(found, floor)
    print("\n".join(lines))
    if write is not None:
        text = write.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        write.write_text("\n".join([f"{before}{BEGIN}", *lines, f"{END}{after}"]), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
