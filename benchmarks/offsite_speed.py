"""What a step on an emulator takes a client, beside LoRA and full fine-tuning of the whole backbone: time and memory.

    python benchmarks/offsite_speed.py [--scale 0.5] [--rounds 3] [--steps 2] [--write FILE] [--json FILE]
    python benchmarks/offsite_speed.py --full      # OPT-1.3B's own shape: a GPU, or 40 GB of memory and patience

The backbone has the shape of OPT-1.3B (24 blocks; Zhang et al. 2022) and random weights. `--scale` multiplies its
widths, its heads and its vocabulary, so that each matrix keeps its share of the whole. The emulator is that of
Offsite-Tuning (Xiao et al. 2023): two blocks at each end, and 8 of the 20 between them, evenly spaced, undistilled.

    full fine-tuning           all weights in bfloat16, with float32 copies on which AdamW works
    LoRA as peft comes         `get_peft_model` on all linear layers, its adapter in float32
    LoRA on the backbone       Farfield's own, what a client of delivery.kind = "adapter" does
    offsite, LoRA              the same on the emulator: on its outer blocks
    offsite, full tuning       all weights of the emulator's outer blocks

The last three are a client's own path: the Bench on the folder, and its training loop. All have the same texts,
attention, loss and AdamW, and recompute nothing. In each round each makes a warm-up step and `--steps` more in a
process of its own; ratios of time are taken within a round, and the median of the rounds counts.

Memory is the most that the process held (`ru_maxrss`), and on a GPU the most that torch had allocated there. In the
former are Python and its libraries, which weigh the more the smaller the model is: ratios without them stand in
brackets.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import sys
import time
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final

import peft
import tomli_w
import torch
import transformers
import typer
from stopwatch import Took
from tokenizers import Tokenizer, models

from farfield.edge_client.data import Example, TokenExample, batches, collate
from farfield.edge_client.train import forward, train
from farfield.emulator import backbone, stored
from farfield.emulator.architecture import describe
from farfield.emulator.assemble import tensors
from farfield.emulator.bench import Bench, loaded
from farfield.emulator.layout import Record
from farfield.emulator.methods import Tuned, registered
from farfield.emulator.schedule import make_optimizer
from farfield.emulator.search import Choice, Material, compressed
from farfield.emulator.split import split
from farfield.kernels import cross_entropy
from farfield.protocols.plan import Plan, parse

hf: Any = transformers  # whose constructors are untyped

HEADS, HEAD, BLOCKS, VOCABULARY = 32, 64, 24, 50272
ENDS, KEPT, RANK = (2, 2), 8, 8
BEGIN, END = "<!-- offsite-speed -->", "<!-- /offsite-speed -->"


@dataclass(frozen=True, slots=True)
class Case:
    """What all ways have in common.

    Attributes:
        folder: holds the backbone and the emulator.
        heads: of the backbone; its widths and its vocabulary are in proportion.
        texts, length: of a batch, and the tokens of a text.
        steps: that are timed, after one that is not.
    """

    folder: Path
    heads: int
    texts: int
    length: int
    steps: int

    @property
    def width(self) -> int:
        return self.heads * HEAD

    @property
    def vocabulary(self) -> int:
        return VOCABULARY * self.heads // HEADS

    @property
    def backbone(self) -> Path:
        return self.folder / "backbone"

    @property
    def emulator(self) -> Path:
        return self.folder / "emulator"

    def plan(self, delivery: str, tuning: str) -> Plan:
        ends = {"first": ENDS[0], "last": ENDS[1]} if delivery == "emulator" else {}
        document: dict[str, dict[str, Any]] = {
            "model": {"backbone": "backbone"},
            "tuning": {"kind": tuning} | ({"rank": RANK} if tuning == "lora" else {}),
            "data": {"max_length": self.length},
            "training": {"rounds": 1, "steps": 1 + self.steps, "batch_size": self.texts, "learning_rate": 1e-4},
            "delivery": {"kind": delivery} | ends,
            "emulator": {"blocks": KEPT},
            "distillation": {"steps": 0},
        }
        return parse(tomli_w.dumps(document), registered(), None)

    def examples(self) -> list[Example]:
        """As many texts as all steps take, of random tokens."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.texts * (1 + self.steps), self.length)
        drawn = torch.randint(3, self.vocabulary, shape, generator=generator, dtype=torch.int32).tolist()
        return [TokenExample(ids, ids) for ids in (array("i", row) for row in drawn)]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare(case: Case) -> None:
    """Write the backbone and its emulator."""
    config = hf.OPTConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        word_embed_proj_dim=case.width,
        ffn_dim=4 * case.width,
        num_hidden_layers=BLOCKS,
        num_attention_heads=case.heads,
    )
    words = Tokenizer(models.WordLevel({"<end>": 0}, unk_token="<end>"))  # noqa: S106
    torch.manual_seed(0)
    with backbone.silent_transformers():
        hf.OPTForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(case.backbone)
        hf.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(case.backbone)  # noqa: S106
    model = backbone.load_model(case.backbone, task="causal-lm", dtype="bfloat16")
    material = Material(model, split(len(describe(model).blocks), ENDS), [])
    emulator, layout = compressed(material, Choice("uniform", KEPT))
    case.emulator.mkdir()
    record = Record(layout, case.plan("emulator", "lora").emulator_digest, backbone.fingerprint(case.backbone), 0)
    stored.save(emulator, backbone.load_tokenizer(case.backbone), record, case.emulator)


# The ways


OnStep = Callable[[float], None]


def full_fine_tuning(case: Case, ready: Callable[[torch.nn.Module], None], on_step: OnStep) -> None:
    plan = case.plan("adapter", "full")
    model, _, _ = loaded(plan, case.backbone, device())
    _by_hand(Tuned(model.requires_grad_(True)), case, plan, ready, on_step)


def lora_of_peft(case: Case, ready: Callable[[torch.nn.Module], None], on_step: OnStep) -> None:
    plan = case.plan("adapter", "lora")
    model, _, _ = loaded(plan, case.backbone, device())
    config = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type=peft.TaskType.CAUSAL_LM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a name in transformers that peft still uses
        tuned = Tuned(peft.get_peft_model(model, config))
    _by_hand(tuned, case, plan, ready, on_step)


def lora_on_backbone(case: Case, ready: Callable[[torch.nn.Module], None], on_step: OnStep) -> None:
    _as_client(case.plan("adapter", "lora"), case.backbone, case, ready, on_step)


def offsite_lora(case: Case, ready: Callable[[torch.nn.Module], None], on_step: OnStep) -> None:
    _as_client(case.plan("emulator", "lora"), case.emulator, case, ready, on_step)


def offsite_full(case: Case, ready: Callable[[torch.nn.Module], None], on_step: OnStep) -> None:
    _as_client(case.plan("emulator", "full"), case.emulator, case, ready, on_step)


Way = Callable[[Case, Callable[[torch.nn.Module], None], OnStep], None]

FULL, PEFT, LORA, OFFSITE, OFFSITE_FULL = (
    "full fine-tuning", "LoRA as peft comes", "LoRA on the backbone", "offsite, LoRA", "offsite, full tuning",
)  # fmt: skip

WAYS: Final[Mapping[str, Way]] = {
    FULL: full_fine_tuning,
    PEFT: lora_of_peft,
    LORA: lora_on_backbone,
    OFFSITE: offsite_lora,
    OFFSITE_FULL: offsite_full,
}

PEERS: Final = {FULL: (6.5, 5.6), PEFT: (2.5, 2.0), LORA: (2.5, 2.0)}
"""What offsite LoRA is wanted to be ahead of them, in speed and in memory: the paper's figures."""


def _as_client(plan: Plan, folder: Path, case: Case, ready: Callable[[torch.nn.Module], None], on_step: OnStep) -> None:
    bench = Bench(plan, folder, device())
    ready(bench.tuned.model)
    train(
        bench.tuned, bench.adapter(), case.examples(), plan.training,
        pad_id=bench.pad_id, seed=0, steps=1 + case.steps, first_step=0, horizon=1 + case.steps, on_step=on_step,
    )  # fmt: skip


def _by_hand(tuned: Tuned, case: Case, plan: Plan, ready: Callable[[torch.nn.Module], None], on_step: OnStep) -> None:
    """The loop that has no starting values to subtract: where a weight is in float32, AdamW works on it itself."""
    ready(tuned.model)
    tuned.model.train()
    trained = [one for one in tuned.model.parameters() if one.requires_grad]
    masters = [one if one.dtype == torch.float32 else one.detach().float() for one in trained]
    optimizer = make_optimizer(plan.training, {str(number): one for number, one in enumerate(masters)})
    for batch in batches(case.examples(), case.texts, seed=None, epoch=0):
        loss = _backward(tuned, batch)
        with torch.no_grad():
            for weight, master in zip(trained, masters, strict=True):
                if master is not weight:
                    assert weight.grad is not None
                    master.grad, weight.grad = weight.grad.float(), None
            torch.nn.utils.clip_grad_norm_(masters, plan.training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            for weight, master in zip(trained, masters, strict=True):
                if master is not weight:
                    weight.copy_(master)
        on_step(loss)


def _backward(tuned: Tuned, batch: Sequence[Example]) -> float:
    logits, labels = forward(tuned, collate(batch, 0), device())
    loss = cross_entropy.summed(logits, labels) / labels.numel()
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


# Measuring


@dataclass(frozen=True, slots=True)
class Ran:
    """What one way took in one round, in a process of its own; memory in bytes.

    Attributes:
        trained: how many parameters.
        steps: what each step that counts took.
        libraries: held before anything was loaded.
        loaded: the most that was held until the model was ready, libraries included.
        weights: of the model, the adapter among them: nothing can need less.
        peak: the most that was held at all.
    """

    trained: int
    steps: tuple[Took, ...]
    libraries: int
    loaded: int
    weights: int
    peak: int

    @property
    def seconds(self) -> float:
        return median(step.clock for step in self.steps)

    @property
    def busy(self) -> float:
        return median(step.busy for step in self.steps)


def run(case: Case, name: str) -> Ran:
    """Runs in a process of its own."""
    libraries, found, marks = _held(), {}, []

    def ready(model: torch.nn.Module) -> None:
        found["loaded"] = _held()
        found["weights"] = sum(one.nbytes for one in tensors(model).values())
        found["trained"] = sum(one.numel() for one in model.parameters() if one.requires_grad)

    def on_step(_: float) -> None:
        if device().type == "cuda":
            torch.cuda.synchronize()
        marks.append(Took(time.process_time(), time.perf_counter()))

    WAYS[name](case, ready, on_step)
    steps = tuple(after - before for before, after in pairwise(marks))
    return Ran(steps=steps, libraries=libraries, peak=_held(), **found)


def _held() -> int:
    """The most bytes that this process has held so far."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def alone(task: Callable[..., Any], *arguments: Any) -> Any:
    """What `task` returns, in a process that begins and ends with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(task, *arguments).result()


def measure(case: Case, names: Sequence[str], rounds: int) -> dict[str, list[Ran]]:
    alone(prepare, case)
    found: dict[str, list[Ran]] = {name: [] for name in names}
    for number in range(rounds):
        for name, runs in found.items():
            runs.append(alone(run, case, name))
            one = runs[-1]
            print(
                f"round {number + 1}, {name}: {one.seconds:.2f} s a step ({one.busy:.2f} s of processor), "
                f"{one.peak / 1e6:,.0f} MB",
                file=sys.stderr,
                flush=True,
            )
    return found


# The tables


def speed(runs: Mapping[str, Sequence[Ran]], name: str, peer: str) -> float:
    """How many times as fast `name` is as `peer`."""
    return median(its.seconds / own.seconds for its, own in zip(runs[peer], runs[name], strict=True))


def memory(runs: Mapping[str, Sequence[Ran]], name: str, peer: str, *, libraries: bool = True) -> float:
    """How many times as much memory `peer` needs as `name`, with or without Python and its libraries."""
    its, own = (median(one.peak - (0 if libraries else one.libraries) for one in runs[way]) for way in (peer, name))
    return its / own


def report(runs: Mapping[str, Sequence[Ran]], head: str) -> Iterator[str]:
    peers = [name for name in PEERS if name in runs]
    faster, smaller = (" | ".join(f"× {word} than {name}" for name in peers) for word in ("faster", "less"))
    yield from (head, "", f"| way | trained | seconds a step (least to most) | of processor | {faster} |")
    yield "|" + "---|" * (4 + len(peers))
    for name, rounds in runs.items():
        seconds = [step.clock for one in rounds for step in one.steps]
        ratios = " | ".join("" if name == peer else f"{speed(runs, name, peer):.2f}" for peer in peers)
        yield (
            f"| {name} | {rounds[0].trained / 1e6:.2f} M | {median(one.seconds for one in rounds):.2f} "
            f"({min(seconds):.2f} to {max(seconds):.2f}) | {median(one.busy for one in rounds):.2f} | {ratios} |"
        )
    yield from ("", f"| way | weights alone | once loaded | peak, MB | {smaller} |", "|" + "---|" * (4 + len(peers)))
    for name, rounds in runs.items():
        weights, ready, peak = (
            median(one / 1e6 for one in kind)
            for kind in zip(*((one.weights, one.loaded, one.peak) for one in rounds), strict=True)
        )
        ratios = " | ".join(
            "" if name == peer else f"{memory(runs, name, peer):.2f} ({memory(runs, name, peer, libraries=False):.2f})"
            for peer in peers
        )
        yield f"| {name} | {weights:,.0f} | {ready:,.0f} | {peak:,.0f} | {ratios} |"
    libraries = median(one.libraries for rounds in runs.values() for one in rounds)
    yield from ("", f"Python and its libraries: {libraries / 1e6:,.0f} MB of each peak; in brackets, without them.", "")
    for peer in peers if OFFSITE in runs else ():
        wanted_speed, wanted_memory = PEERS[peer]
        yield f"* Against {peer}: {_verdict('speed', speed(runs, OFFSITE, peer), wanted_speed)}; " + _verdict(
            "memory", memory(runs, OFFSITE, peer), wanted_memory
        )


def _verdict(what: str, figure: float, wanted: float) -> str:
    return f"{what} {figure:.2f}, wanted {wanted:g}: " + ("met" if figure >= wanted else "**missed**")


def main(
    scale: Annotated[float, typer.Option(min=1 / HEADS, max=1, help="Of heads, widths and vocabulary.")] = 0.5,
    full: Annotated[bool, typer.Option("--full", help="The real shape: --scale 1.")] = False,
    texts: Annotated[int, typer.Option(min=1, help="In a batch.")] = 2,
    length: Annotated[int, typer.Option(min=8, max=2048, help="Tokens of a text.")] = 256,
    rounds: Annotated[int, typer.Option(min=1, help="Processes of each way, in turn.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="That count, of each process.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help=f"Of: {'; '.join(WAYS)}.")] = None,
    write: Annotated[Path | None, typer.Option(help=f"Put the tables between {BEGIN} and {END} here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.")] = None,
) -> None:
    if unknown := sorted(set(only or ()) - WAYS.keys()):
        raise typer.BadParameter(f"no way {unknown[0]!r}", param_hint="--only")
    before, heads = os.getloadavg()[0], HEADS if full else round(HEADS * scale)
    with TemporaryDirectory(prefix="farfield-offsite-") as name:
        case = Case(Path(name), heads, texts, length, steps)
        runs = measure(case, [way for way in WAYS if not only or way in only], rounds)
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores ({platform.machine()})"
    on = torch.cuda.get_device_name() if device().type == "cuda" else cores
    head = (
        f"{date.today()}, {on}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}; "
        f"load {before:.1f} at the beginning, {os.getloadavg()[0]:.1f} at the end. "
        f"OPT-1.3B's shape at scale {heads / HEADS:g}: {BLOCKS} blocks, {case.width} wide, {case.vocabulary} tokens; "
        f"{texts} texts of {length} tokens; {rounds} rounds of {steps} steps."
    )
    text = "\n".join(report(runs, head))
    print(text)
    if json_file is not None:
        document = {name: [asdict(one) for one in found] for name, found in runs.items()}
        json_file.write_text(json.dumps({"machine": head, "runs": document}, indent=2) + "\n", encoding="utf-8")
    if write is not None:
        before_it, _, rest = write.read_text(encoding="utf-8").partition(BEGIN)
        _, found, after = rest.partition(END)
        if not found:
            sys.exit(f"error: {write} has no {BEGIN} … {END}")
        write.write_text(f"{before_it}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
