"""The `coordinator` command as a person runs it: real processes, killed, interrupted, short of disk, and misused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny import Ended, Launcher, Place, launcher, write_backbone, write_clients

from farfield.coordinator import plans

REPOSITORY = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def command() -> Iterator[Launcher]:
    with launcher() as started:
        yield started


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture
def place(tmp_path: Path, backbone: Path) -> Place:
    return Place.make(tmp_path, backbone)


SIMULATE = ("simulate", "plan.toml", "--data", "data", "--json", "out.json")


def finished(place: Place, ended: Ended) -> dict[str, object]:
    """The result that a command which went well has written, with nothing on stderr."""
    assert (ended.status, ended.err) == (0, "")
    result: dict[str, object] = json.loads((place.path / "out.json").read_text())
    return result


def refused(ended: Ended, *parts: str) -> None:
    """One line that says what is wrong, status 2, and nothing else on stderr."""
    assert ended.status == 2, ended
    assert re.fullmatch(r"error: [^\n]+\n", ended.err), ended.err
    for part in parts:
        assert part in ended.err
    assert "Traceback" not in ended.out + ended.err


_digests: dict[tuple[str, ...], object] = {}


def digest_of(place: Place, command: Launcher, *more: str) -> object:
    """The adapter's digest of a run of the place's Plan that nothing disturbs; the same wherever the place is."""
    known = ((place.path / "plan.toml").read_text(), *more)
    if known not in _digests:
        ended = command.run(place, *SIMULATE, "--runs", "undisturbed", *more)
        _digests[known] = finished(place, ended)["adapter_digest"]
    return _digests[known]


def test_a_federation_from_one_command(place: Place) -> None:
    """The console script itself, started from nothing."""
    script = Path(sys.executable).with_name("coordinator")
    done = subprocess.run(
        [script, *SIMULATE, "--compare"],
        cwd=place.path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    result = finished(place, Ended(done.returncode, done.stdout, done.stderr, 0))
    run = place.run()
    plan = plans.load(place.path / "plan.toml")
    assert result["run"] == run.name
    assert result["plan_digest"] == plan.digest
    assert isinstance(result["adapter_digest"], str)
    assert isinstance(result["eval_loss_before"], float)
    assert isinstance(result["eval_loss_after"], float)
    rounds = result["rounds"]
    assert isinstance(rounds, list)
    assert [one["round"] for one in rounds] == [1, 2, 3]
    for one in rounds:
        assert one["clients"] == 3
        assert min(one[key] for key in ("train_loss", "eval_loss", "bytes_down", "bytes_up", "seconds")) > 0
    assert rounds[-1]["eval_loss"] == result["eval_loss_after"]

    assert [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] == rounds
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"round-{number:04}.safetensors" for number in range(4)
    ]
    assert sorted(path.name for path in (run / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (run / "plan.toml").read_text() == (place.path / "plan.toml").read_text()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads((run / "result.json").read_text()) == result

    for said in ("Held-out loss before", "Federated", "Centralised", str(result["adapter_digest"]), "adapter"):
        assert said in done.stdout
    assert f"{result['eval_loss_after']:.4f}" in done.stdout


def test_the_console_prints_what_it_is_given(place: Place, command: Launcher) -> None:
    """Square brackets in a path are no markup."""
    (place.path / "plan.toml").rename(place.path / "odd [red] plan.toml")
    ended = command.run(place, "simulate", "odd [red] plan.toml", "--data", "data", "--runs", "my[/b]runs")
    assert (ended.status, ended.err) == (0, "")
    run = place.run("my[/b]runs")
    assert f"Run {run.name} in my[/b]runs/{run.name}: 3 clients, 3 rounds\n" in ended.out
    assert f"coordinator export my[/b]runs/{run.name} OUT --merged" in ended.out


def test_nobody_is_told_to_merge_what_cannot_be_merged(place: Place, command: Launcher) -> None:
    plan = place.path / "plan.toml"
    text = plan.read_text(encoding="utf-8").replace('kind = "lora"', 'kind = "prompt-tuning"').replace("rank = 2\n", "")
    plan.write_text(text, encoding="utf-8")
    ended = command.run(place, *SIMULATE)
    assert (ended.status, ended.err) == (0, "")
    assert "Adapter" in ended.out
    assert "--merged" not in ended.out


def test_export_says_where_it_went(place: Place, command: Launcher) -> None:
    finished(place, command.run(place, *SIMULATE))
    run = place.run().relative_to(place.path)
    ended = command.run(place, "export", run, "out", "--merged")
    assert (ended.status, ended.out, ended.err) == (0, "Model with the adapter of round 3 written to out\n", "")
    assert (place.path / "out" / "model.safetensors").is_file()
    ended = command.run(place, "export", run, "adapter")
    assert (ended.status, ended.out, ended.err) == (0, "Adapter of round 3 written to adapter\n", "")
    assert (place.path / "adapter" / "adapter_model.safetensors").is_file()
    refused(command.run(place, "export", run, "adapter"), "adapter", "not empty")
    refused(command.run(place, "export", "data", "elsewhere"), "data", "not a run folder")
    refused(
        command.run(place, "export", run, "full", "--merged", largest_file=20_000),
        "full",
        "file too large",
        "Make room",
    )


def test_a_plan_is_checked(place: Place, command: Launcher) -> None:
    ended = command.run(place, "plan", "check", "plan.toml")
    assert (ended.status, ended.err) == (0, "")
    assert plans.load(place.path / "plan.toml").digest in ended.out
    place.plan(training={"rouns": 3})
    refused(command.run(place, "plan", "check", "plan.toml"), "plan.toml", "training.rouns", "Did you mean 'rounds'?")


# --- Stopped, and resumed -------------------------------------------------------------------------------------------

LONGER = {"rounds": 6, "steps": 2}
KEEPS_STATE = {"server_optimizer": "yogi", "learning_rate": 0.01}


def resumed(place: Place, command: Launcher, *more: str) -> dict[str, object]:
    return finished(
        place, command.run(place, "simulate", "plan.toml", "--resume", place.run().name, "--json", "out.json", *more)
    )


@pytest.mark.parametrize("after", [0, 3, 6])
def test_killed_after_any_round_and_resumed(place: Place, command: Launcher, after: int) -> None:
    place.plan(training=LONGER, aggregation=KEEPS_STATE, cohort={"size": 2})
    expected = digest_of(place, command)
    name = f"checkpoints/round-{after:04}.safetensors"
    running = command.start(place, *SIMULATE)
    running.kill_when(lambda: bool(place.runs()) and (place.run() / name).exists(), signal.SIGKILL)
    assert running.end().status == -signal.SIGKILL
    result = resumed(place, command)
    assert result["adapter_digest"] == expected
    assert isinstance(result["rounds"], list)
    assert [one["round"] for one in result["rounds"]] == [1, 2, 3, 4, 5, 6]
    lines = [json.loads(line) for line in (place.run() / "metrics.jsonl").read_text().splitlines()]
    assert lines == result["rounds"]


def test_killed_again_and_again(place: Place, command: Launcher) -> None:
    place.plan(training=LONGER, aggregation=KEEPS_STATE)
    expected = digest_of(place, command, "--dropout", "0.3")
    running = command.start(place, *SIMULATE, "--dropout", "0.3")
    for after in (1, 2, 4):
        name = f"checkpoints/round-{after:04}.safetensors"
        running.kill_when(lambda name=name: bool(place.runs()) and (place.run() / name).exists(), signal.SIGKILL)  # type: ignore[misc]
        assert running.end().status == -signal.SIGKILL
        running = command.start(place, "simulate", "plan.toml", "--resume", place.run().name, "--json", "out.json")
    assert finished(place, running.end())["adapter_digest"] == expected


def test_killed_before_the_first_checkpoint(place: Place, command: Launcher) -> None:
    expected = digest_of(place, command)
    running = command.start(place, *SIMULATE)
    running.kill_when(lambda: bool(place.runs()) and (place.run() / "run.json").exists(), signal.SIGKILL)
    assert running.end().status == -signal.SIGKILL
    shutil.rmtree(place.run() / "checkpoints")  # whatever it had managed to write
    (place.run() / "checkpoints").mkdir()
    assert resumed(place, command)["adapter_digest"] == expected


def test_killed_while_a_checkpoint_was_half_written(place: Place, command: Launcher) -> None:
    expected = digest_of(place, command)
    finished(place, command.run(place, *SIMULATE))
    checkpoints = place.run() / "checkpoints"
    whole = (checkpoints / "round-0003.safetensors").read_bytes()
    for number in (2, 3):
        (checkpoints / f"round-000{number}.safetensors").unlink()
    (checkpoints / "round-0002.safetensors.partial").write_bytes(whole[: len(whole) // 2])
    (place.run() / "metrics.jsonl").write_text('{"round": 1, "cli')
    (place.run() / "result.json").unlink()
    assert resumed(place, command)["adapter_digest"] == expected
    assert sorted(path.name for path in checkpoints.iterdir()) == [f"round-{n:04}.safetensors" for n in range(4)]


def test_resuming_a_finished_run_changes_nothing(place: Place, command: Launcher) -> None:
    before = finished(place, command.run(place, *SIMULATE))
    after = resumed(place, command)
    assert after["adapter_digest"] == before["adapter_digest"]
    assert after["rounds"] == before["rounds"]


def test_interrupted_it_says_how_to_go_on(place: Place, command: Launcher) -> None:
    expected = digest_of(place, command)
    running = command.start(place, *SIMULATE)
    running.kill_when(
        lambda: bool(place.runs()) and (place.run() / "checkpoints/round-0001.safetensors").exists(), signal.SIGINT
    )
    ended = running.end()
    assert ended.status == 130
    run = place.run().relative_to(place.path)
    hint = f"coordinator simulate plan.toml --resume {run}"
    assert ended.err == f"Stopped. Finished rounds are kept; go on with: {hint}\n"
    _, *arguments = hint.split()
    assert finished(place, command.run(place, *arguments, "--json", "out.json"))["adapter_digest"] == expected


def test_a_disk_that_fills_is_said_and_nothing_is_lost(place: Place, command: Launcher) -> None:
    """Limited so that the first checkpoint fits and one with the server optimiser's two moments does not."""
    place.plan(aggregation=KEEPS_STATE)
    expected = finished(place, command.run(place, *SIMULATE, "--runs", "undisturbed"))["adapter_digest"]
    (undisturbed,) = place.runs("undisturbed")
    sizes = [(undisturbed / f"checkpoints/round-000{number}.safetensors").stat().st_size for number in (0, 1)]
    assert sizes[0] < sizes[1]
    ended = command.run(place, *SIMULATE, largest_file=sum(sizes) // 2)
    refused(ended, "round-0001.safetensors", "file too large", "Make room")
    assert resumed(place, command)["adapter_digest"] == expected


def test_a_disk_that_fills_at_the_very_end(place: Place, command: Launcher) -> None:
    """Everything fits but the last thing that is written, the picture."""
    expected = finished(place, command.run(place, *SIMULATE, "--runs", "undisturbed"))["adapter_digest"]
    (undisturbed,) = place.runs("undisturbed")
    picture = (undisturbed / "loss.png").stat().st_size
    others = max(path.stat().st_size for path in undisturbed.rglob("*") if path.is_file() and path.suffix != ".png")
    assert others < picture
    refused(command.run(place, *SIMULATE, largest_file=(others + picture) // 2), place.run().name, "file too large")
    assert resumed(place, command)["adapter_digest"] == expected


def test_a_disk_too_full_for_the_adapter(place: Place, command: Launcher) -> None:
    """safetensors reports this by an error of its own."""
    finished(place, command.run(place, *SIMULATE))
    shutil.rmtree(place.run() / "adapter")
    ended = command.run(place, "simulate", "plan.toml", "--resume", place.run().name, largest_file=6_000)
    refused(ended, f"{place.run().name}/adapter", "file too large")


# --- What a person gets wrong ---------------------------------------------------------------------------------------


def edit_plan(place: Place, old: str, new: str) -> None:
    text = (place.path / "plan.toml").read_text()
    assert old in text
    (place.path / "plan.toml").write_text(text.replace(old, new))


def own_backbone(place: Place) -> Path:
    """A copy of the backbone that may be spoilt."""
    folder = place.path / "backbone"
    source = folder.resolve()
    folder.unlink()
    shutil.copytree(source, folder)
    return folder


def pickled(place: Place) -> None:
    folder = own_backbone(place)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remote_code(place: Place) -> None:
    config = own_backbone(place) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModel": "evil.Model"}}))


def spoil(name: str, text: str) -> Callable[[Place], None]:
    def write(place: Place) -> None:
        (place.path / "data" / name).write_text(text)

    return write


def empty_data(place: Place) -> None:
    for path in (place.path / "data").iterdir():
        path.unlink()


def plan_with(**sections: dict[str, object]) -> Callable[[Place], object]:
    return lambda place: place.plan(**sections)


MISTAKES: dict[str, tuple[Callable[[Place], object], tuple[str, ...], tuple[str, ...]]] = {
    "no plan": (lambda place: (place.path / "plan.toml").unlink(), SIMULATE, ("plan.toml", "no such file")),
    "no TOML": (
        lambda place: edit_plan(place, "[model]", "[model"),
        SIMULATE,
        ("plan.toml", "not valid TOML", "line 1"),
    ),
    "misspelled key": (
        plan_with(training={"learning_rte": 0.1}),
        SIMULATE,
        ("plan.toml", "unknown key 'training.learning_rte'", "Did you mean 'learning_rate'?"),
    ),
    "misspelled section": (plan_with(trainin={"x": 1}), SIMULATE, ("plan.toml", "'trainin'", "'training'")),
    "misspelled tuning key": (plan_with(tuning={"rnk": 2}), SIMULATE, ("plan.toml", "tuning.rnk", "'rank'")),
    "wrong type": (plan_with(training={"rounds": "3"}), SIMULATE, ("plan.toml", "training.rounds = '3'", "integer")),
    "no such format": (
        plan_with(model={"quantization": "fp4"}),
        SIMULATE,
        ("plan.toml", "model.quantization = 'fp4'", "'nf4'"),
    ),
    "no backbone": (
        plan_with(model={"backbone": "nowhere"}),
        SIMULATE,
        ("nowhere", "no such folder"),
    ),
    "unknown builtin": (
        plan_with(model={"backbone": "builtin:huge"}),
        SIMULATE,
        ("builtin:huge", "no builtin backbone"),
    ),
    "pickles": (pickled, SIMULATE, ("backbone", "pickle", "pytorch_model.bin")),
    "remote code": (remote_code, SIMULATE, ("config.json", "auto_map")),
    "no data folder": (
        lambda place: shutil.rmtree(place.path / "data"),
        SIMULATE,
        ("data", "not a folder"),
    ),
    "empty data folder": (
        empty_data,
        SIMULATE,
        ("data", "the folder is empty"),
    ),
    "empty file": (spoil("client-001.jsonl", ""), SIMULATE, ("data/client-001.jsonl", "holds no records")),
    "malformed line": (
        spoil("client-001.jsonl", '{"text": "fine"}\n{"text": \n'),
        SIMULATE,
        ("data/client-001.jsonl, line 2", "not JSON"),
    ),
    "missing column": (
        spoil("client-001.jsonl", '{"txt": "fine"}\n'),
        SIMULATE,
        ("data/client-001.jsonl, line 1", "no column 'text'", "'txt'"),
    ),
    "too short to learn": (
        spoil("client-001.jsonl", '{"text": "a"}\n'),
        SIMULATE,
        ("data/client-001.jsonl", "no usable example"),
    ),
    "unknown kind of file": (spoil("notes.docx", "x"), SIMULATE, ("data/notes.docx", "'.docx' cannot be read")),
    "more clients than data": (
        lambda place: None,
        (*SIMULATE, "--clients", "4"),
        ("data", "4 clients, but data for 3"),
    ),
    "no clients": (lambda place: None, ("simulate", "plan.toml"), ("how many clients?", "--clients")),
    "too few for a sum": (
        lambda place: None,
        (*SIMULATE, "--clients", "2"),
        ("plan.toml", '"secagg" takes 3 clients, and there are 2', 'protection.kind = "sealed"'),
    ),
    "too few for a round": (plan_with(cohort={"minimum": 4}), SIMULATE, ("plan.toml", "cohort.minimum = 4")),
    "runs is a file": (
        lambda place: (place.path / "runs").write_text(""),
        SIMULATE,
        ("runs", "cannot be written", "not a directory"),
    ),
    "runs where nobody may write": (
        lambda place: None,
        (*SIMULATE, "--runs", "/proc/self/runs"),
        ("/proc/self/runs", "cannot be written"),
    ),
    "resume nothing": (
        lambda place: None,
        ("simulate", "plan.toml", "--resume", "nothing"),
        ("runs/nothing", "not a run folder"),
    ),
    "JSON into nowhere": (
        lambda place: None,
        ("simulate", "plan.toml", "--data", "data", "--json", "plan.toml/out.json"),
        ("plan.toml/out.json", "exists already"),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line(place: Place, command: Launcher, mistake: str) -> None:
    make, arguments, said = MISTAKES[mistake]
    make(place)
    refused(command.run(place, *arguments), *said)
    # Found before any work is done.
    assert not (place.path / "runs").is_dir() or not place.runs()


def test_a_run_is_resumed_as_what_it_is(place: Place, command: Launcher) -> None:
    finished(place, command.run(place, *SIMULATE))
    run = place.run().name
    again = ("simulate", "plan.toml", "--resume", run)
    refused(command.run(place, *again, "--clients", "2"), run, "this run has 3 clients, not 2")
    refused(command.run(place, *again, "--dropout", "0.5"), run, "--dropout 0.0")
    write_clients(place.path / "other", 3)
    refused(command.run(place, *again, "--data", "other"), run, "this run's data is", "Leave --data out")
    resumed(place, command, "--data", "data", "--clients", "3")
    place.plan(training={"seed": 6})
    refused(command.run(place, *again), run, "belongs to another Plan", "plan.toml")
    place.plan()
    (place.run() / "checkpoints" / "round-0002.safetensors").write_bytes(b"junk")
    refused(command.run(place, *again), "round-0002.safetensors", "cannot be read")


# --- Memory ---------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_number_of_clients(place: Place, command: Launcher) -> None:
    """256 clients and 8, the same cohort and the same number of evaluators. If examples of all clients were kept, they
    would be some 100 MB here: more than twice what is allowed."""
    place.plan(
        data={"max_length": 8, "held_out": 0.01},
        training={"rounds": 2, "steps": 1},
        cohort={"size": 8},
        evaluation={"clients": 4, "examples": 8},
    )
    for clients in (8, 256):
        write_clients(place.path / f"of-{clients}", clients, records=0)
        text = "".join(json.dumps({"text": "Q#x!" * 250}) + "\n" for _ in range(12))
        for file in (place.path / f"of-{clients}").iterdir():
            file.write_text(text)
    peaks = {}
    for clients in (8, 256):
        ended = command.run(place, "simulate", "plan.toml", "--data", f"of-{clients}", "--json", "out.json")
        finished(place, ended)
        peaks[clients] = ended.peak / 1024
    assert peaks[256] < 1.1 * peaks[8], peaks


# --- The backbone that the package carries --------------------------------------------------------------------------


def test_the_builtin_backbone_and_the_standard_library(tmp_path: Path, command: Launcher) -> None:
    place = Place(tmp_path)
    text = (REPOSITORY / "examples" / "quickstart.toml").read_text()
    for key, value in {"rounds": 1, "steps": 1, "batch_size": 1}.items():
        text, found = re.subn(rf"^{key} = \d+", f"{key} = {value}", text, flags=re.MULTILINE)
        assert found == 1
    text = text.replace("every = 1", "every = 1\nexamples = 2")
    (tmp_path / "plan.toml").write_text(text)
    result = finished(place, command.run(place, "simulate", "plan.toml", "--clients", "3", "--json", "out.json"))
    assert result["clients"] == 3
    assert isinstance(result["eval_loss_before"], float)
    assert result["eval_loss_before"] < 6, "a trained model is better than chance"
