"""What a run would stumble over before its first round is found without any weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, build

from farfield.emulator.bench import loaded
from farfield.emulator.methods import Setting, TuningMethod, registered
from farfield.emulator.rehearsal import rehearse
from farfield.protocols import plan as plans
from farfield.protocols.errors import EmulatorError, FarfieldError, TuningError
from farfield.protocols.plan import Plan

FEW = ("llama", "gpt2", "bert")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family in FEW:
        made[family] = tmp_path_factory.mktemp(family)
        build(family, torch.float32).save_pretrained(made[family])
    return made


def plan_of(kind: str, task: str = "causal-lm", more: str = "", model: str = "", **tuning: Any) -> Plan:
    labels = "labels = 3" if task == "sequence-classification" else ""
    settings = "\n".join(f"{key} = {value}" for key, value in tuning.items())
    optimizer = "adamw" if registered()[kind].model_validate({"kind": kind}).by_gradient else "sgd"
    text = f"""
        {more}
        [model]
        backbone = "somewhere"
        task = "{task}"
        {labels}
        {model}
        [tuning]
        kind = "{kind}"
        {settings}
        [training]
        rounds = 2
        steps = 3
        optimizer = "{optimizer}"
    """
    return plans.parse(text, registered(), None)


SMALL: dict[str, dict[str, Any]] = {"fed-sb": {"rank": 4}}


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("kind", registered())
def test_says_of_a_model_without_weights_what_installing_says_of_the_model(
    kind: str, family: str, folders: dict[str, Path]
) -> None:
    plan = plan_of(kind, FAMILIES[family].task, **SMALL.get(kind, {}))
    assert isinstance(plan.tuning, TuningMethod)
    said: list[str | None] = []
    for way in (
        lambda: plan.tuning.install(
            loaded(plan, folders[family], torch.device("cpu"))[0], Setting(plan.model.task, 0, 6)
        ),
        lambda: rehearse(plan, folders[family]),
    ):
        try:
            way()
            said.append(None)
        except FarfieldError as error:
            said.append(str(error))
    assert said[0] == said[1]


def test_ends_that_leave_nothing_between_them_are_found(folders: dict[str, Path]) -> None:
    with pytest.raises(EmulatorError, match="leave nothing between them"):
        rehearse(plan_of("lora", more="[delivery]\nfirst = 1\nlast = 1\n"), folders["llama"])


def test_a_rank_that_no_layer_can_hold_is_found(folders: dict[str, Path]) -> None:
    with pytest.raises(TuningError, match=re.escape("which cannot hold rank 64")):
        rehearse(plan_of("fed-sb", rank=64), folders["llama"])


def test_a_start_that_needs_the_weights_needs_none_here(folders: dict[str, Path]) -> None:
    rehearse(plan_of("lora", model='quantization = "nf4"', initial='"loftq"'), folders["llama"])
