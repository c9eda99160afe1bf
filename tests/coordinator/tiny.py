"""A federation of toys: a backbone of two thin layers, clients of a few sentences, and the Plan over them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

hf: Any = transformers  # whose constructors are untyped

torch.set_num_threads(1)

Document = dict[str, dict[str, Any]]

PLAN: Document = {
    "model": {"backbone": "backbone", "dtype": "float32"},
    "tuning": {"kind": "lora", "rank": 2},
    "data": {"max_length": 16, "held_out": 0.2},
    "training": {"rounds": 3, "steps": 2, "batch_size": 4, "learning_rate": 0.01, "seed": 5},
    "evaluation": {"batch_size": 8},
}


def plan_text(**sections: dict[str, Any]) -> str:
    """`PLAN` with keys of its sections replaced; a None takes a key away."""
    document = {name: {**PLAN.get(name, {}), **sections.get(name, {})} for name in PLAN | sections}
    kept = {name: {key: value for key, value in keys.items() if value is not None} for name, keys in document.items()}
    return tomli_w.dumps(kept)


def write_backbone(folder: Path, layers: int = 2) -> Path:
    """A random Llama with a byte-level tokenizer, as `save_pretrained` writes them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_sentence(0, number) for number in range(50)], trainer)
    wrapped = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    wrapped.save_pretrained(folder)
    config = hf.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        hf.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_clients(folder: Path, clients: int, records: int = 12) -> Path:
    """One JSONL file per client, the later ones longer, so that weights differ."""
    folder.mkdir(parents=True)
    for client in range(clients):
        lines = [json.dumps({"text": _sentence(client, number)}) for number in range(records + 3 * client)]
        (folder / f"client-{client:03}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _sentence(client: int, number: int) -> str:
    animals, places = ("cat", "dog", "owl", "fox"), ("mat", "sea", "moon")
    return f"the {animals[client % 4]} sat on the {places[number % 3]} and saw {number} of the {client} stars"


class Silent:
    """Watches a simulation and says nothing; tests derive from it and keep what they want to know."""

    def on_folder(self, folder: Path, /) -> None: ...
    def on_stage(self, what: str, /) -> None: ...
    def on_candidate(self, candidate: Any, done: int, count: int, /) -> None: ...
    def on_step(self, done: int, steps: int, loss: float, /) -> None: ...
    def on_check(self, check: Any, /) -> None: ...
    def on_preparing(self, done: int, clients: int, /) -> None: ...
    def on_start(self, folder: Path, info: Any, done: list[Any], rounds: int, /) -> None: ...
    def on_client(self, number: int, activity: str, done: int, clients: int, /) -> None: ...
    def on_round(self, record: Any, /) -> None: ...
    def on_baseline(self, done: int, steps: int, loss: float, /) -> None: ...


@dataclass(frozen=True)
class Place:
    """A folder with `backbone/`, `data/` of three clients and `plan.toml`: where a command is run."""

    path: Path

    @classmethod
    def make(cls, path: Path, backbone: Path, clients: int = 3) -> Place:
        path.mkdir(parents=True, exist_ok=True)
        (path / "backbone").symlink_to(backbone)
        write_clients(path / "data", clients)
        place = cls(path)
        place.plan()
        return place

    def plan(self, **sections: dict[str, Any]) -> Path:
        """Write `plan.toml` anew."""
        file = self.path / "plan.toml"
        file.write_text(plan_text(**sections), encoding="utf-8")
        return file

    def runs(self, runs: str = "runs") -> list[Path]:
        return sorted((self.path / runs).iterdir()) if (self.path / runs).is_dir() else []

    def run(self, runs: str = "runs") -> Path:
        """The one run that is there."""
        (run,) = self.runs(runs)
        return run


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (negative: the signal that killed it), its output, its peak RSS in KiB."""

    status: int
    out: str
    err: str
    peak: int


class Running:
    """A command in a process of its own."""

    def __init__(self, launcher: Launcher, pid: int, stem: Path) -> None:
        self._launcher, self.pid, self._stem = launcher, pid, stem

    def kill_when(self, ready: Callable[[], bool], signal: int) -> None:
        """Send `signal` as soon as `ready` says so; the process must not end before that."""
        deadline = time.monotonic() + 60
        while not ready():
            assert time.monotonic() < deadline, "the command never came to the point where it was to be stopped"
            assert not self._launcher.zombie(self.pid), self.end()
            time.sleep(0.0005)
        os.kill(self.pid, signal)

    def end(self) -> Ended:
        status, peak = self._launcher.wait(self.pid)
        return Ended(status, Path(f"{self._stem}.out").read_text(), Path(f"{self._stem}.err").read_text(), peak)


class Launcher:
    """Starts the `coordinator` command as real processes, each forked from one that has imported everything already.

    Importing torch, transformers and peft takes seconds, and there are dozens of commands to run.
    """

    SOURCE = """
import json, os, resource, signal, sys
import torch, transformers, peft
import farfield.coordinator.cli as cli, farfield.coordinator.simulate, farfield.coordinator.plans
import farfield.emulator.bench, farfield.edge_client.worker, matplotlib.figure
from transformers import AutoModelForCausalLM, AutoTokenizer
for line in sys.stdin:
    ask = json.loads(line)
    if "wait" in ask:
        _, status, usage = os.wait4(ask["wait"], 0)
        answer = [os.waitstatus_to_exitcode(status), usage.ru_maxrss]
    else:
        answer = os.fork()
        if answer == 0:
            os.chdir(ask["cwd"])
            for number, end in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{ask['stem']}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if ask["largest_file"]:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (ask["largest_file"],) * 2)
            sys.argv = ["coordinator", *ask["arguments"]]
            code = 0
            try:
                cli.main()
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(json.dumps(answer), flush=True)
"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SOURCE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"},
        )
        self._count = 0

    def start(self, place: Place, *arguments: object, largest_file: int | None = None) -> Running:
        """Start `coordinator ARGUMENTS` in `place`, where no file may grow beyond `largest_file` bytes."""
        self._count += 1
        stem = place.path / f"command-{self._count}"
        pid = self._ask(
            {
                "cwd": str(place.path),
                "stem": str(stem),
                "arguments": [str(one) for one in arguments],
                "largest_file": largest_file,
            }
        )
        return Running(self, pid, stem)

    def run(self, place: Place, *arguments: object, largest_file: int | None = None) -> Ended:
        return self.start(place, *arguments, largest_file=largest_file).end()

    def wait(self, pid: int) -> tuple[int, int]:
        status, peak = self._ask({"wait": pid})
        return status, peak

    @staticmethod
    def zombie(pid: int) -> bool:
        """Whether the process has ended; nobody has waited for it yet, so its number is still its own."""
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


@contextlib.contextmanager
def launcher() -> Iterator[Launcher]:
    started = Launcher()
    try:
        yield started
    finally:
        started.close()
