"""README and docs say what is so: keys, defaults, Plans, commands, links and code in them are checked, not believed."""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import tomli_w
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from farfield.coordinator import home as coordinator_home
from farfield.coordinator import plans
from farfield.edge_client import settings as edge_settings
from farfield.emulator import methods
from farfield.protocols.plan import Plan
from farfield.protocols.sections import Settings, TuningSettings

ROOT = Path(__file__).parent.parent
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md")))
}
REFERENCE = ROOT / "docs" / "plan.md"

BASE = """
[model]
backbone = "builtin:tiny-llama-py"
[tuning]
kind = "lora"
[training]
rounds = 1
"""
"""What a fragment of a Plan is completed with."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: what stands after the fence, and its text."""

    document: str
    line: int
    info: str
    text: str


def blocks() -> Iterator[Block]:
    for name, path in DOCUMENTS.items():
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.M):
            yield Block(name, text.count("\n", 0, match.start()) + 1, match[1].strip(), match[2])


def shown(block: Block) -> str:
    return f"{block.document}:{block.line}"


# --- the reference of the Plan --------------------------------------------------------------------


def sections() -> dict[str, type[Settings]]:
    """The model of every section of the Plan."""
    found: dict[str, type[Settings]] = {}
    for name, field in Plan.model_fields.items():
        kinds = [one for one in (field.annotation, *get_args(field.annotation)) if isinstance(one, type)]
        (found[name],) = (one for one in kinds if issubclass(one, Settings))
    return found


def type_text(model: type[BaseModel], key: str) -> str:
    """The type of a key as the reference words it, from the JSON schema of its model."""
    if model.model_fields[key].annotation is coordinator_home.Address:
        return "HOST:PORT"
    return _worded(model.model_json_schema(mode="validation")["properties"][key])


def default_text(field: FieldInfo) -> str:
    """The default of a key as the reference words it: a TOML value, "required" or "unset"."""
    if field.is_required():
        return "required"
    return "unset" if field.default is None else f"`{json.dumps(field.default, default=str)}`"


def _worded(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_worded(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if schema["type"] == "array":
        return "list of tables" if "$ref" in schema["items"] else "list of names"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {_number(schema[name])}" for name, sign in signs.items() if name in schema]
    return f"{schema['type']} {', '.join(limits)}".rstrip()


def _number(value: float) -> str:
    whole = int(value)
    return f"2^{whole.bit_length() - 1}" if whole >= 2**15 and whole & (whole - 1) == 0 else f"{value:g}"


def tables(path: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """Type and default by key, for each heading ``### `name` `` with a table of keys under it."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    heading = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"### `\[?([\w-]+)\]?`.*", line):
            heading = match[1]
            assert heading not in found, f"two sections are called {heading!r}"
            found[heading] = {}
        elif line.startswith("#"):
            heading = ""
        elif heading and (match := re.fullmatch(r"\| `(\w+)` \| (.+?) \| (.+?) \| .+ \|", line)):
            assert match[1] not in found[heading], f"{heading}.{match[1]} stands there twice"
            found[heading][match[1]] = (match[2], match[3])
    return found


def test_the_reference_lists_every_key_with_its_type_and_default() -> None:
    models = sections() | dict(methods.registered())
    expected = {
        name: {
            key: (type_text(model, key), default_text(field))
            for key, field in model.model_fields.items()
            if name in sections() or key not in TuningSettings.model_fields  # [tuning] lists what all methods have
        }
        for name, model in models.items()
    }
    assert tables(REFERENCE) == expected


# --- Plans ----------------------------------------------------------------------------------------

PLANS = [block for block in blocks() if block.info in ("toml", "toml fragment")]
NEW_METHOD = "docs/tuning-methods.md"
"""Its Plan asks for a method that is not there; the test of the worked example reads it."""


@pytest.mark.parametrize("block", [block for block in PLANS if block.document != NEW_METHOD], ids=shown)
def test_every_plan_in_the_documents_is_one(block: Block) -> None:
    """A block that is marked as `toml fragment` is laid over a Plan that has the rest."""
    if block.info == "toml fragment":
        document, fragment = tomllib.loads(BASE), tomllib.loads(block.text)
        for name, section in fragment.items():
            document[name] = section if name == "tuning" else document.get(name, {}) | section
        if "epochs" not in document["training"]:
            document["training"].setdefault("steps", 1)
        plans.parse(tomli_w.dumps(document), where=shown(block))
    else:
        assert block.info == "toml"
        plans.parse(block.text, where=shown(block))


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_every_example_is_a_plan(path: Path) -> None:
    plans.load(path)


# --- settings of both sides -----------------------------------------------------------------------

FEDERATION = "docs/federation.md"
SETTINGS: dict[str, type[BaseModel]] = {"coordinator": coordinator_home.Settings, "edge-client": edge_settings.Settings}
WHOLE: dict[str, dict[str, dict[str, Any]]] = {
    "coordinator": {"service": {"hostnames": ["fed.example.org"]}},
    "edge-client": {
        "coordinator": {"host": "fed.example.org", "enrolment_port": 9094, "fleet_port": 9092, "federation_port": 9093},
        "node": {"name": "clinic-a"},
        "data": {"path": "/srv/records"},
    },
}
"""What a fragment of settings is completed with."""


@pytest.mark.parametrize("side", SETTINGS)
def test_the_tables_of_settings_list_every_key_with_its_type_and_default(side: str) -> None:
    expected = {}
    for name, section in SETTINGS[side].model_fields.items():
        model = section.annotation
        assert isinstance(model, type) and issubclass(model, BaseModel)
        for key, field in model.model_fields.items():
            expected[f"{name}.{key}"] = (type_text(model, key), default_text(field))
    (table,) = re.findall(
        rf"<!-- settings {side} -->\n(.*?)<!-- /settings {side} -->",
        DOCUMENTS[FEDERATION].read_text(encoding="utf-8"),
        re.S,
    )
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| .+ \|$", table, re.M)
    assert {key: (kind, default) for key, kind, default in rows} == expected


def test_every_fragment_of_settings_is_accepted() -> None:
    marked = [block for block in blocks() if block.info.split()[:1] == ["toml"] and block not in PLANS]
    assert {block.info for block in marked} == {f"toml {side}" for side in SETTINGS}
    for block in marked:
        side = block.info.removeprefix("toml ")
        document = {name: dict(section) for name, section in WHOLE[side].items()}
        for name, section in tomllib.loads(block.text).items():
            document[name] = document.get(name, {}) | section
        SETTINGS[side].model_validate(document)


def test_every_message_that_is_explained_can_be_said() -> None:
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("coordinator", "edge_client", "protocols")
        for path in (ROOT / folder).rglob("*.py")
    )
    text = DOCUMENTS[FEDERATION].read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| it says \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    said = [words for row in table.splitlines() for words in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert len(said) > 10
    assert [words for words in said if not all(part.strip() in code for part in words.split("…"))] == []


# --- commands -------------------------------------------------------------------------------------

APPS = ("coordinator", "edge-client")


def shell_lines() -> Iterator[tuple[str, str]]:
    """Each command of a shell block, with where it stands; comments, prompts and output are left out."""
    for block in blocks():
        if block.info in ("bash", "sh", "console"):
            for line in block.text.replace("\\\n", " ").splitlines():
                if block.info != "console" or line.startswith("$ "):
                    yield shown(block), line.removeprefix("$ ").strip()


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", path.read_text(encoding="utf-8"), flags=re.M)


def inline_code() -> Iterator[tuple[str, str]]:
    for name, path in DOCUMENTS.items():
        for match in re.finditer(r"`([^`]+)`", prose(path)):
            yield name, match[1].replace("\n", " ")


@functools.cache
def app(name: str) -> click.Command:
    with warnings.catch_warnings():
        # typer 0.20 imports names that click 8.5 deprecates.
        warnings.filterwarnings("ignore", "'click.utils", DeprecationWarning)
        import typer

        module = importlib.import_module(f"farfield.{name.replace('-', '_')}.cli")
    return typer.main.get_command(module.app)


def command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words begin with, the first of which is its app, and the words after its name."""
    found, words = app(words[0]), words[1:]
    while isinstance(found, click.Group) and words and not words[0].startswith("-"):
        default = getattr(found, "default", None)
        words = [default, *words] if default and words[0] not in found.commands else words
        assert words[0] in found.commands, f"there is no command {words[0]!r}"
        found, words = found.commands[words[0]], words[1:]
    return found, words


def test_every_command_in_a_block_can_be_given() -> None:
    checked = set()
    for where, line in shell_lines():
        words = shlex.split(line, comments=True)
        if not words or Path(words[0]).name not in APPS:
            continue
        found, arguments = command([Path(words[0]).name, *words[1:]])
        try:
            found.make_context(str(found.name), arguments)
        except click.exceptions.Exit:  # --help
            pass
        except click.ClickException as error:
            pytest.fail(f"{where}: {line}: {error.format_message()}")
        checked.add((Path(words[0]).name, found.name))
    assert checked >= {
        *(("coordinator", name) for name in ("init", "serve", "invite", "run", "runs", "nodes", "status", "revoke")),
        *(("coordinator", name) for name in ("cancel", "export", "simulate", "check")),
        *(("edge-client", name) for name in ("join", "status", "leave", "doctor")),
    }


def test_every_command_in_a_sentence_exists() -> None:
    for where, code in inline_code():
        name, _, rest = code.partition(" ")
        if name not in APPS or not rest:
            continue
        for one in rest.split(" | "):
            found, arguments = command([name, *shlex.split(one)])
            options = {option for parameter in found.params for option in parameter.opts} | {"--help"}
            unknown = {word for word in arguments if word.startswith("--")} - options
            assert not unknown, f"{where}: `{code}`: no option {', '.join(sorted(unknown))}"


def test_the_readme_lists_every_command() -> None:
    text = DOCUMENTS["README.md"].read_text(encoding="utf-8")
    for name in APPS:
        group = app(name)
        assert isinstance(group, click.Group)
        listed = re.findall(rf"\*\*`{name} ([a-z |]+)", text)
        words = {word.strip() for line in listed for word in line.split("|")}
        assert words == {one if one != "plan" else "plan check" for one in group.commands}


def test_the_readme_lists_every_option_of_simulate_and_no_other() -> None:
    listed = set(re.findall(r"^\| `(--[a-z-]+)` \|", DOCUMENTS["README.md"].read_text(encoding="utf-8"), re.M))
    options = {option for parameter in command(["coordinator", "simulate"])[0].params for option in parameter.opts}
    assert listed == {option for option in options if option.startswith("--")}


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    lines = [line for _, line in (*shell_lines(), *inline_code()) if line.startswith("make ")]
    wanted = {word for line in lines for word in shlex.split(line, comments=True)[1:] if "=" not in word}
    assert {"demo", "test"} <= wanted <= targets


def test_every_script_exists() -> None:
    scripts = {word for _, line in shell_lines() for word in line.split() if word.endswith(".py")}
    assert all((ROOT / script).is_file() for script in scripts), scripts


# --- links and markers ----------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_relative_links_lead_somewhere(name: str) -> None:
    path = DOCUMENTS[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{name}: {target}"
        assert found.is_relative_to(ROOT), f"{name}: {target}"
        assert not anchor or anchor in anchors(found), f"{name}: {target}"


@pytest.mark.parametrize(("name", "marker"), [("README.md", "demo"), ("docs/benchmarks.md", "sst2")])
def test_places_for_results_are_marked_once(name: str, marker: str) -> None:
    text = DOCUMENTS[name].read_text(encoding="utf-8")
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    assert (text.count(begin), text.count(end)) == (1, 1)
    assert text.index(begin) < text.index(end)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_document_names_a_path_of_some_machine(name: str) -> None:
    found = re.search(r"(?<![\w.])/(work|home|root|tmp|Users)/\S*", DOCUMENTS[name].read_text(encoding="utf-8"))
    assert found is None, found


# --- code -----------------------------------------------------------------------------------------


def python_blocks(document: str) -> list[str]:
    return [block.text for block in blocks() if block.document == document and block.info == "python"]


def test_the_python_interface_of_the_readme_is_real() -> None:
    (text,) = python_blocks("README.md")
    imports = "\n".join(line for line in text.splitlines() if line.startswith(("from ", "import ")))
    namespace: dict[str, Any] = {}
    exec(compile(imports, "README.md", "exec"), namespace)
    # Everything but the simulation itself: the same program with its one long call taken out.
    assert text.count("simulate(request, progress)") == 1
    compile(text, "README.md", "exec")
    (made,) = re.findall(r"^request = (.+)$", text, re.M)
    request = eval(made, namespace)
    assert request.plan == Path("plan.toml")
    wanted = set(re.findall(r"\bresult\.(\w+)", text))
    assert wanted <= set(sys.modules["farfield.coordinator.simulate"].Result.__dataclass_fields__)


WORKED_EXAMPLE = """
import importlib.util, json, sys
from pathlib import Path

import peft, torch
from farfield.coordinator import plans
from farfield.emulator.methods import Setting, registered

folder, tests = Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, tests)
from families import FAMILIES, build, batch
from test_methods import REFUSED, UNMERGEABLE

name = "farfield.emulator.methods.loha"
spec = importlib.util.spec_from_file_location(name, folder / "loha.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)

plan = plans.parse((folder / "plan.toml").read_text())
assert plan.tuning.kind == "loha" and plan.tuning.rank == 4
tuned = plan.tuning.install(build("llama"), Setting("causal-lm", seed=0, steps=1))
assert tuned.trainable() and all(".hada_w" in name for name in tuned.trainable())

optimizer = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
for _ in range(3):
    tuned.model(**batch("llama")).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

inputs = {key: value for key, value in batch("llama").items() if key != "labels"}
tuned.model.eval()
with torch.no_grad():
    after = tuned.model(**inputs).logits
    assert not torch.equal(build("llama")(**inputs).logits, after)
    plan.tuning.save(tuned, folder / "adapter")
    loaded = peft.PeftModel.from_pretrained(build("llama"), str(folder / "adapter")).eval()
    torch.testing.assert_close(loaded(**inputs).logits, after, rtol=0, atol=1e-6)
    torch.testing.assert_close(plan.tuning.merge(tuned)(**inputs).logits, after, rtol=0, atol=1e-5)
print(json.dumps([sorted(FAMILIES), *(sorted(map(list, pairs)) for pairs in (REFUSED, UNMERGEABLE))]))
"""
"""In a process of its own, so that the new method is registered nowhere else."""


def exceptions(title: str, families: list[str]) -> list[list[str]]:
    """The pairs of method and family in the reference's table whose second column is called `title`."""
    text = REFERENCE.read_text(encoding="utf-8")
    table = re.search(rf"^\| method \| {title} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M)
    assert table is not None
    pairs = []
    for row in table[1].splitlines():
        kinds, named = (re.findall(r"`([\w-]+)`", cell) for cell in row.split("|")[1:3])
        pairs += [[kind, family] for kind in kinds for family in named or families]
    return sorted(pairs)


def test_the_worked_example_works_and_the_exceptions_are_those_of_the_tests(tmp_path: Path) -> None:
    (code,) = python_blocks(NEW_METHOD)
    (plan,) = (block.text for block in PLANS if block.document == NEW_METHOD)
    assert "loha" not in methods.registered()
    (tmp_path / "loha.py").write_text(code, encoding="utf-8")
    (tmp_path / "plan.toml").write_text(plan, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", WORKED_EXAMPLE, tmp_path, ROOT / "tests" / "emulator"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    families, refused, unmergeable = json.loads(done.stdout)
    assert exceptions("is refused by", families) == refused
    assert exceptions("cannot be merged into", families) == unmergeable
    (tested,) = re.findall(r"^Every method is tested .+?\n\n", REFERENCE.read_text(encoding="utf-8"), re.M | re.S)
    assert sorted(re.findall(r"`([\w-]+)`", tested)) == families
