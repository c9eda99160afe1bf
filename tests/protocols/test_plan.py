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
from farfield.protocols.rules import Rule

MINIMAL = """
[model]
backbone = "builtin:tiny-llama-py"
[tuning]
kind = "lora"
[training]
rounds = 3
steps = 2
"""


def minimal(kind: str) -> str:
    """MINIMAL with another method, and the optimiser that goes with it."""
    by_gradient = methods.registered()[kind].model_validate({"kind": kind}).by_gradient
    return MINIMAL.replace('"lora"', f'"{kind}"') + ("" if by_gradient else 'optimizer = "sgd"\n')


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
    plan = plans.parse(minimal(kind))
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
        (lambda plan: plan | {"protection": plan["protection"] | {"kind": None}}, "other keys or defaults"),
        (lambda plan: without(plan, "protection", "kind"), "other keys or defaults"),
        (lambda plan: plan | {"protection": {"kind": "secagg"}}, "other keys or defaults"),
        (lambda plan: plan | {"cohort": plan["cohort"] | {"size": 2}}, "a sum of 2 hides nobody"),
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


@pytest.mark.parametrize(
    ("extra", "kind"),
    [
        ("", "secagg"),
        ("[cohort]\nsize = 3\n", "secagg"),
        ("[cohort]\nsize = 2\n", "sealed"),
        ("[cohort]\nsize = 1\n", "sealed"),
        ("[cohort]\nfraction = 0.01\n", "secagg"),
        ("[protection]\nbits = 8\n", "secagg"),
        ('[protection]\nkind = "sealed"\n', "sealed"),
        ('[protection]\nkind = "none"\n', "none"),
        ('[protection]\nkind = "secagg"\n', "secagg"),
    ],
)
def test_a_plan_that_does_not_say_hides_single_updates_where_it_can(extra: str, kind: str) -> None:
    plan = plans.parse(MINIMAL + extra)
    assert plan.protection.kind == kind
    assert plan.smallest_cohort == (3 if kind == "secagg" else 1)
    assert restored(plan.canonical()) == plan


def test_what_is_said_and_what_follows_have_one_digest() -> None:
    digests = {plans.parse(MINIMAL + extra).digest for extra in ("", '[protection]\nkind = "secagg"\n')}
    assert len(digests) == 1
    for kind in ("sealed", "none"):
        digests.add(plans.parse(MINIMAL + f'[protection]\nkind = "{kind}"\n').digest)
    assert len(digests) == 3


RULES = {"mean": Rule(), "median": Rule(views=True)}


def with_rules(extra: str) -> Plan:
    return plan_module.parse(MINIMAL + extra, methods.registered(), RULES)


def test_a_rule_that_must_see_each_update_gets_sealed_replies_and_no_sums() -> None:
    assert with_rules('[aggregation]\nrule = "median"\n').protection.kind == "sealed"
    assert with_rules("").protection.kind == "secagg"
    with pytest.raises(PlanError, match=r"aggregation\.rule = 'median' must see each update.* or kind = \"sealed\""):
        with_rules('[aggregation]\nrule = "median"\n[protection]\nkind = "secagg"\n')


def test_at_a_client_the_rule_is_not_known_and_the_kind_is_as_the_coordinator_resolved_it() -> None:
    plan = with_rules('[aggregation]\nrule = "median"\n')
    assert restored(plan.canonical()).protection.kind == "sealed"


def test_how_many_must_be_there() -> None:
    def fewest(extra: str) -> int:
        return plans.parse(MINIMAL + extra).smallest_cohort

    assert fewest("[cohort]\nminimum = 7\n") == 7
    assert fewest("[cohort]\nminimum = 2\n") == 3
    assert fewest('[cohort]\nminimum = 2\n[protection]\nkind = "sealed"\n') == 2


def test_the_range_of_values_follows_from_how_far_training_can_go() -> None:
    def range_of(training: str, extra: str = "") -> float | None:
        return plans.parse(MINIMAL + training + '[protection]\nkind = "sealed"\n' + extra).value_range

    assert range_of("learning_rate = 0.01\n") == pytest.approx(2 * 0.01 * 2)
    assert range_of('learning_rate = 0.01\noptimizer = "sgd"\n') == pytest.approx(0.01 * 2)
    sgd = 'learning_rate = 0.01\noptimizer = "sgd"\nmomentum = 0.9\nmax_grad_norm = 5\n'
    assert range_of(sgd) == pytest.approx(0.01 * 5 * 2 / 0.1)
    assert range_of('optimizer = "sgd"\nmax_grad_norm = 0\n') is None
    assert range_of("", "clip_range = 0.25\n") == 0.25
    epochs = plans.parse(MINIMAL.replace("steps = 2", "epochs = 2"))
    assert epochs.value_range == pytest.approx(2 * 1e-3 * 1000)


def test_what_ε_does_not_cover_is_measured_only_if_the_plan_says_so() -> None:
    client = '[aggregation]\nweighting = "uniform"\n[privacy]\nkind = "client"\nnoise_multiplier = 1.0\n'
    assert plans.parse(MINIMAL).measures
    assert not plans.parse(MINIMAL + client).measures
    assert plans.parse(MINIMAL + client + "exact_evaluation = true\n").measures


def test_a_plan_cannot_be_changed() -> None:
    plan = plans.parse(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        plan.training.rounds = 9


EXAMPLE = 'kind = "example"\nnoise_multiplier = 1\nsampling_rate = 0.1'
ONE_BY_ONE = "[data]\npacking = false\ntruncate = true\n"
CLIENT = 'kind = "client"\nnoise_multiplier = 1'


def sections(text: str) -> tuple[str, str]:
    return "[training]", f"{text}\n[training]"


PROTECTION_AND_PRIVACY = [
    (
        sections('[cohort]\nsize = 2\n[protection]\nkind = "secagg"'),
        r"protection: a sum of 2 hides nobody: .*3 or more",
    ),
    (sections("[evaluation]\nclients = 2"), r"adds up 3 clients or more, in evaluations too: evaluation\.clients is 2"),
    (
        ("steps = 2", 'steps = 2\noptimizer = "sgd"\nmax_grad_norm = 0'),
        r"how large the values of an update can be: give protection\.clip_range, or training\.max_grad_norm above 0",
    ),
    (sections('[protection]\nkind = "open"'), r"protection.kind = 'open' is not one of 'none', 'sealed'"),
    (sections("[protection]\nbits = 3"), r"protection.bits = 3: .*greater than or equal to 4"),
    (sections("[protection]\nbits = 25"), r"protection.bits = 25: .*less than or equal to 24"),
    (sections("[protection]\nweight_limit = 0"), r"protection.weight_limit = 0: "),
    (sections("[protection]\nclip_range = 0.0"), r"protection.clip_range = 0.0: "),
    (sections("[protection]\ncorrupt = 0.5"), r"protection.corrupt = 0.5: .*less than 0.5"),
    (sections("[protection]\ndropouts = -0.1"), r"protection.dropouts = -0.1: "),
    (sections("[protection]\nsecs = 1"), r"unknown key 'protection.secs'"),
    (
        sections("[privacy]\nnoise_multiplier = 1"),
        r'privacy: the other keys go with kind = "example" or kind = "client"',
    ),
    (sections("[privacy]\nsampling_rate = 0.1"), r'privacy: the other keys go with kind = "example"'),
    (sections("[privacy]\nparticipations = 1"), r'privacy: the other keys go with kind = "example"'),
    (
        sections('[privacy]\nkind = "client"'),
        r"privacy: give how much noise .* 'target_epsilon' or as 'noise_multiplier'",
    ),
    (sections(f"[privacy]\n{CLIENT}\ntarget_epsilon = 8"), r"privacy: give how much noise there is"),
    (sections(f"[privacy]\n{CLIENT}\nsampling_rate = 0.1"), r"privacy: 'sampling_rate' goes with kind = \"example\""),
    (sections(f"[privacy]\n{CLIENT}"), r'privacy.kind = "client" bounds .* use aggregation.weighting = "uniform"'),
    (
        sections(
            f'[cohort]\nsize = 2\n[aggregation]\nweighting = "uniform"\n[privacy]\n{CLIENT}\nnoise = "distributed"'
        ),
        r'privacy.noise = "distributed" hides in a sum: use protection.kind = "secagg"',
    ),
    (sections(f"[privacy]\n{EXAMPLE}"), r"each must be one example: use data.packing = false and data.truncate = true"),
    (sections('[privacy]\nkind = "example"\nnoise_multiplier = 1'), r"privacy: 'sampling_rate' goes with kind"),
    (sections(f'{ONE_BY_ONE}[privacy]\n{EXAMPLE}\nclipping = "adaptive"'), r"examples get theirs at the client"),
    (sections(f'{ONE_BY_ONE}[privacy]\n{EXAMPLE}\nnoise = "distributed"'), r"examples get theirs at the client"),
    (
        ("steps = 2", f"epochs = 2\n{ONE_BY_ONE}[privacy]\n{EXAMPLE}"),
        r"counts its steps: use training.steps, not epochs",
    ),
    (
        ("steps = 2", f"steps = 2\ngradient_accumulation = 2\n{ONE_BY_ONE}[privacy]\n{EXAMPLE}"),
        r"leave training.gradient_accumulation out",
    ),
    (
        sections("[data]\ntruncate = true"),
        r"data: 'truncate' cuts each record by itself, so it goes with packing = false",
    ),
    (sections('[privacy]\npopulation = "a/b"'), r"privacy.population = 'a/b': "),
    (sections("[privacy]\ndelta = 1.0"), r"privacy.delta = 1.0: "),
]
"""What is refused about them, each with its sentence."""


EMULATED = '[delivery]\nkind = "emulator"\n'

EMULATORS = [
    (
        ("[tuning]", "owner_only = true\n[tuning]"),
        r'model.owner_only = true: the backbone never leaves its owner, .* ships it; use "emulator"',
    ),
    (("[tuning]", "owner_only = true\n[delivery]\nfirst = 1\nlast = 1\n[tuning]"), r"model.owner_only = true"),
    (("[tuning]", "owner_only = 1\n[tuning]"), r"model.owner_only = 1: "),
    (sections("[delivery]\nfirst = 2"), r"delivery: give 'first' and 'last' together"),
    (sections(EMULATED + "last = 2"), r"delivery: give 'first' and 'last' together"),
    (sections(EMULATED + "first = 0\nlast = 2"), r"delivery.first = 0: "),
    (sections(EMULATED + "plug_in_every = 0"), r"delivery.plug_in_every = 0: "),
    (sections("[delivery]\nredistill_every = 2"), r"delivery: 'redistill_every' goes with kind = \"emulator\""),
    (sections('[delivery]\nkind = "backbone"'), r"delivery.kind = 'backbone' is not one of 'adapter' or 'emulator'"),
    (
        ('"lora"', f'"prefix-tuning"\n{EMULATED}'),
        r"tuning.kind = 'prefix-tuning' reaches into every block, .* use 'lora' or 'full'",
    ),
    (('"lora"', '"prefix-tuning"\n[delivery]\nfirst = 1\nlast = 1'), r"reaches into every block"),
    (sections(f"{EMULATED}[emulator]\nselect = 'random'"), r"emulator.select = 'random' is not one of 'uniform'"),
    (sections(f"{EMULATED}[emulator]\nblocks = 0"), r"emulator.blocks = 0: "),
    (sections(f"{EMULATED}[emulator]\nlow_rank = 0.0"), r"emulator.low_rank = 0.0: .*greater than 0"),
    (sections(f"{EMULATED}[emulator]\nlow_rank = 1.0"), r"emulator.low_rank = 1.0: .*less than 1"),
    (sections(f"{EMULATED}[emulator]\nquantization = 'int8'"), r"emulator.quantization = 'int8' is not one of 'none'"),
    (sections(f"{EMULATED}[emulator]\nlowrank = 0.5"), r"unknown key 'emulator.lowrank'. Did you mean 'low_rank'"),
    (sections("[distillation]\nsteps = -1"), r"distillation.steps = -1: "),
    (sections("[distillation]\nhidden_weight = 0.0"), r"distillation.hidden_weight = 0.0: "),
    (sections("[distillation]\nlm_weight = nan"), r"distillation.lm_weight = nan: "),
    (sections("[distillation]\npatience = 0"), r"distillation.patience = 0: "),
    (sections("[distillation]\ncheck_every = 0"), r"distillation.check_every = 0: "),
]
"""What is refused about emulators, each with its sentence."""


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
        *PROTECTION_AND_PRIVACY,
        *EMULATORS,
        (("[tuning]", 'quantization = "fp4"\n[tuning]'), r"model.quantization = 'fp4' is not one of 'none'"),
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


@pytest.mark.parametrize(
    ("delivery", "ends"),
    [
        ("", None),
        ("first = 1\nlast = 3", (1, 3)),
        ('kind = "emulator"', (2, 2)),
        ('kind = "emulator"\nfirst = 1\nlast = 3', (1, 3)),
    ],
)
def test_how_many_blocks_are_tuned_at_the_ends(delivery: str, ends: tuple[int, int] | None) -> None:
    plan = plans.parse(f"{MINIMAL}[delivery]\n{delivery}\n")
    assert plan.delivery.ends == ends
    assert restored(plan.canonical()) == plan


def test_a_backbone_that_stays_with_its_owner() -> None:
    plan = plans.parse(MINIMAL.replace("[tuning]", "owner_only = true\n[tuning]") + EMULATED)
    assert plan.model.owner_only
    assert restored(plan.canonical()) == plan
    raw = plan.canonical().replace(b'"kind":"emulator"', b'"kind":"adapter"')
    with pytest.raises(PlanError, match="never leaves its owner"):
        restored(raw)


@pytest.mark.parametrize("kind", methods.registered())
def test_a_method_that_can_be_kept_to_blocks_goes_with_an_emulator(kind: str) -> None:
    text = minimal(kind) + EMULATED
    if plans.parse(minimal(kind)).tuning.by_block:
        assert restored(plans.parse(text).canonical()).tuning.kind == kind
    else:
        with pytest.raises(PlanError, match="reaches into every block"):
            plans.parse(text)


def test_an_emulator_is_shared_by_plans_that_ask_for_the_same_one() -> None:
    plan = plans.parse(MINIMAL + EMULATED)
    alike = [
        MINIMAL + EMULATED + "first = 2\nlast = 2\n",
        MINIMAL + EMULATED + "plug_in_every = 3\nredistill_every = 2\n",
        MINIMAL.replace("rounds = 3", "rounds = 7") + EMULATED,
        MINIMAL.replace('"lora"', '"full"') + EMULATED,
        MINIMAL + EMULATED + f'[emulator]\nselect = "{plan.emulator.select}"\n',
        MINIMAL + EMULATED + f"[distillation]\nhidden_weight = {plan.distillation.hidden_weight:g}\n",
        MINIMAL + EMULATED + "[cohort]\nsize = 5\n",
    ]
    assert {plans.parse(text).emulator_digest for text in alike} == {plan.emulator_digest}
    assert len({plans.parse(text).digest for text in alike}) == 5, "three only say what holds anyway"
    others = [
        MINIMAL + EMULATED + "first = 1\nlast = 2\n",
        MINIMAL + EMULATED + "first = 2\nlast = 1\n",
        MINIMAL + EMULATED + "[emulator]\nblocks = 2\n",
        MINIMAL + EMULATED + "[emulator]\nlow_rank = 0.5\n",
        MINIMAL + EMULATED + "[emulator]\nquantization = 'nf4'\n",
        MINIMAL + EMULATED + "[distillation]\nsteps = 0\n",
        MINIMAL + EMULATED + "[data]\nmax_length = 64\n",
        MINIMAL + "seed = 1\n" + EMULATED,
        MINIMAL.replace("[tuning]", 'dtype = "float32"\n[tuning]') + EMULATED,
    ]
    assert len({plan.emulator_digest, *(plans.parse(text).emulator_digest for text in others)}) == len(others) + 1


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
