import random
import tomllib
from pathlib import Path

import pytest
import tomli_w

from farfield.coordinator import plans
from farfield.emulator import methods
from farfield.protocols import plan as plan_module
from farfield.protocols.errors import PlanError

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


def test_the_canonical_bytes_read_back_as_the_same_plan() -> None:
    plan = plans.load(Path("examples/quickstart.toml"))
    again = plan_module.Plan.model_validate_json(
        plan.canonical(), context={"tuning_kinds": methods.registered(), "rules": None}
    )
    assert again == plan


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
