import json
import random
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import example, given
from hypothesis import strategies as st

from farfield.coordinator import plans
from farfield.emulator import methods
from farfield.protocols import plan as plan_module
from farfield.protocols.errors import PlanError
from farfield.protocols.plan import Plan

MINIMAL = """
[model]
backbone = "builtin:tiny-llama-py"
[tuning]
kind = "lora"
[training]
rounds = 3
steps = 2
"""


def test_the_digest_is_that_of_the_meaning_not_of_the_text() -> None:
    plan = plans.parse(MINIMAL)
    reordered = (
        '[training]\nsteps=2\nrounds =   3 # three\nseed = 0\n[tuning]\nkind="lora"\n' + MINIMAL.split("[tuning]")[0]
    )
    assert plans.parse(reordered).digest == plan.digest
    assert plans.parse(MINIMAL + "seed = 1\n").digest != plan.digest


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_keys_and_sections_has_one_digest(seed: int) -> None:
    document = tomllib.loads(Path("examples/quickstart.toml").read_text(encoding="utf-8"))
    generator = random.Random(seed)

    def shuffled(table: dict[str, object]) -> dict[str, object]:
        items = [(key, shuffled(value) if isinstance(value, dict) else value) for key, value in table.items()]
        generator.shuffle(items)
        return dict(items)

    assert plans.parse(tomli_w.dumps(shuffled(document))).digest == plans.load(Path("examples/quickstart.toml")).digest


def test_an_integer_where_a_number_is_meant_is_that_number() -> None:
    one, same = (plans.parse(MINIMAL + f"learning_rate = {text}\n") for text in ("1", "1.0"))
    assert one.digest == same.digest


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.toml")), ids=str)
def test_the_canonical_bytes_read_back_as_the_same_plan(path: Path) -> None:
    plan = plans.load(path)
    again = restored(plan.canonical())
    assert again == plan
    assert (again.canonical(), again.digest) == (plan.canonical(), plan.digest)


@pytest.mark.parametrize("kind", methods.registered())
def test_the_canonical_bytes_of_every_method_read_back(kind: str) -> None:
    plan = plans.parse(MINIMAL.replace('"lora"', f'"{kind}"'))
    assert type(restored(plan.canonical()).tuning) is methods.registered()[kind]


def restored(canonical: bytes) -> Plan:
    return plan_module.restore(canonical, methods.registered(), where="run 7")


def without(document: dict[str, Any], section: str, key: str) -> dict[str, Any]:
    return document | {section: {name: value for name, value in document[section].items() if name != key}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: without(plan, "cohort", "over_selection"), "a Plan with other keys or defaults .* bring them to"),
        (lambda plan: without(plan, "tuning", "rank"), "a Plan with other keys or defaults .* bring them to the same"),
        (lambda plan: plan | {"training": plan["training"] | {"learning_rate": 1}}, "other keys or defaults"),
        (lambda plan: plan | {"training": plan["training"] | {"rate": 1}}, "unknown key 'training.rate'"),
        (lambda plan: plan | {"secure": {}}, "unknown key 'secure'"),
        (
            lambda plan: plan | {"tuning": plan["tuning"] | {"kind": "of the future"}},
            "no tuning method 'of the future'",
        ),
        (lambda plan: plan | {"tuning": None}, r"tuning: 'kind' \(a string\) is missing"),
        (lambda plan: plan | {"protection": {"kind": "secagg"}}, "'secagg' is not available in this release"),
        (lambda plan: without(plan, "training", "rounds"), "'training.rounds' is missing"),
        (lambda plan: [plan], "Plan = "),
        (lambda plan: "plan", "Plan = 'plan'"),
        (lambda plan: None, "Plan = None"),
    ],
)
def test_what_is_no_plan_of_this_version_is_not_restored(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    """As canonical bytes are written, so that only what they say is wrong."""
    document = change(json.loads(plans.parse(MINIMAL).canonical()))
    raw = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    with pytest.raises(PlanError, match=message) as caught:
        restored(raw)
    assert str(caught.value).startswith("run 7: ")


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw + b"\n",
        lambda raw: raw.replace(b":", b": ", 1),
        lambda raw: b'{"training":{},' + raw[1:],
        lambda raw: raw.replace(b'"rounds":3', b'"rounds":3,"rounds":3'),
        lambda raw: json.dumps(dict(reversed(json.loads(raw).items())), separators=(",", ":")).encode(),
        lambda raw: raw.replace(b"builtin:tiny-llama-py", b"builtin:tiny-ll\\u0061ma-py"),
    ],
)
def test_other_bytes_of_the_same_meaning_are_not_restored(change: Callable[[bytes], bytes]) -> None:
    """One Plan, one digest: what is signed and consented to is what is done."""
    raw = change(plans.parse(MINIMAL).canonical())
    assert json.loads(raw) == json.loads(plans.parse(MINIMAL).canonical())
    with pytest.raises(PlanError, match="other keys or defaults"):
        restored(raw)


@given(st.binary(max_size=200))
@example(b"[" * 100_000)
@example(b"1" * 5_000)
@example(b"\xff")
@example(b"NaN")
@example(b'{"model":{"backbone":"\\ud800"}}')
@example(b'{"\\ud800":1}')
@example(b'{"tuning":{"kind":"\\ud800"}}')
@example(b'{"tuning":{"kind":"lora","\\ud800":1}}')
def test_bytes_from_nowhere_are_a_plan_error(raw: bytes) -> None:
    with pytest.raises(PlanError):
        restored(raw)


@given(st.data())
def test_a_flipped_bit_is_a_plan_error_or_another_plan(data: st.DataObject) -> None:
    plan = plans.parse(MINIMAL)
    raw = bytearray(plan.canonical())
    position = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[position // 8] ^= 1 << position % 8
    try:
        other = restored(bytes(raw))
    except PlanError as error:
        assert str(error).encode()
        return
    assert other.canonical() == raw
    assert other.digest != plan.digest


def test_replies_are_sealed_unless_the_plan_says_otherwise() -> None:
    assert plans.parse(MINIMAL).protection.kind == "sealed"
    bare = plans.parse(MINIMAL + '[protection]\nkind = "none"\n')
    assert bare.protection.kind == "none"
    assert bare.digest != plans.parse(MINIMAL).digest


def test_a_plan_cannot_be_changed() -> None:
    plan = plans.parse(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        plan.training.rounds = 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rounds = 3", "roundz = 3"), r"unknown key 'training.roundz'. Did you mean 'rounds'\?|'training.rounds' is"),
        (('kind = "lora"', 'kind = "lora"\nrnak = 3'), r"unknown key 'tuning.rnak'. Did you mean 'rank'\?"),
        (('"lora"', '"lroa"'), r"no tuning method 'lroa'. Did you mean 'lora'\?"),
        (('kind = "lora"', 'kind = "lora"\ntargets = "q_proj"'), r"tuning.targets: give \"all-linear\", or a list of"),
        (('kind = "lora"', 'kind = "lora"\ntargets = []'), r"tuning.targets: give \"all-linear\", or a list of"),
        (("steps = 2", f"steps = 2\nseed = {'1' * 5000}"), r"not valid TOML"),
        (('kind = "lora"', ""), r"tuning: 'kind' \(a string\) is missing; known are: .*lora"),
        (("rounds = 3", 'rounds = "3"'), r"training.rounds = '3': .* integer"),
        (("rounds = 3", "rounds = 0"), r"training.rounds = 0: .*greater than or equal to 1"),
        (("rounds = 3", ""), r"'training.rounds' is missing"),
        (("steps = 2", "steps = 2\nepochs = 1"), r"training: give the budget of a round as 'steps' or as 'epochs'"),
        (("steps = 2", ""), r"training: give the budget"),
        (("steps = 2", "steps = 2\nlearning_rate = nan"), r"training.learning_rate = nan: .*finite"),
        (("steps = 2", 'steps = 2\nschedule = "cos"'), r"training.schedule = 'cos' is not one of 'constant', 'linear'"),
        (("[training]", "[cohrt]\nsize = 2\n[training]"), r"unknown key 'cohrt'. Did you mean 'cohort'\?"),
        (("[training]", "[cohort]\nsize = 2\nminimum = 3\n[training]"), r"'minimum' \(3\) is more than 'size' \(2\)"),
        (
            ("[training]", '[aggregation]\nrule = "meen"\n[training]'),
            r"no aggregation rule 'meen'. Did you mean 'mean'",
        ),
        (("[training]", "[cohort]\nover_selection = 0.5\n[training]"), r"cohort: 'over_selection' goes with 'size' or"),
        (
            ("[training]", "[cohort]\nsize = 2\nover_selection = 4.5\n[training]"),
            r"cohort.over_selection = 4.5: .*equal",
        ),
        (("[training]", "[cohort]\nsize = 2\nover_selection = -0.1\n[training]"), r"cohort.over_selection = -0.1: "),
        (("[training]", "[cohort]\nsize = 2\nover_selection = nan\n[training]"), r"cohort.over_selection = nan: "),
        (("[training]", '[protection]\nkind = "secagg"\n[training]'), r"protection.kind = 'secagg' is not available"),
        (("[training]", '[privacy]\nkind = "client"\n[training]'), r"privacy.kind = 'client' is not available"),
        (("[training]", '[delivery]\nkind = "emulator"\n[training]'), r"delivery.kind = 'emulator' is not available"),
        (("[tuning]", 'quantization = "nf4"\n[tuning]'), r"model.quantization = 'nf4' is not available"),
        (("[tuning]", 'task = "sequence-classification"\n[tuning]'), r"'labels' \(how many classes\)"),
        (("[model]", "[model"), r"not valid TOML: .*line 2"),
    ],
)
def test_a_bad_plan_is_one_message_with_file_and_key(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(MINIMAL.replace(*change), encoding="utf-8")
    with pytest.raises(PlanError, match=message) as caught:
        plans.load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_or_unreadable_file_is_a_plan_error(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such file"):
        plans.load(tmp_path / "none.toml")
    with pytest.raises(PlanError, match="cannot be read"):
        plans.load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(PlanError, match="UTF-8"):
        plans.load(tmp_path / "latin.toml")


@pytest.mark.parametrize("path", sorted(Path("examples").glob("*.toml")), ids=str)
def test_every_example_is_a_valid_plan(path: Path) -> None:
    plans.load(path)
