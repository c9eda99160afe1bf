"""The record of an emulator: what follows from it, and what is refused of one that comes from outside."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farfield.emulator.layout import LAYOUT, Layout, Record, is_emulator, read
from farfield.emulator.methods import registered
from farfield.emulator.split import Split
from farfield.protocols import plan as plans
from farfield.protocols.errors import EmulatorError

DIGEST = "ab" * 32

PLAN = """
[model]
backbone = "anywhere"
[delivery]
kind = "emulator"
[training]
rounds = 2
steps = 3
[tuning]
kind = "lora"
"""


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    first, last, between = (draw(st.integers(1, 4)) for _ in range(3))
    parts = Split(first + last + between, first, last)
    middle = draw(st.lists(st.sampled_from(list(parts.middle)), min_size=1, max_size=between))
    layers = st.sampled_from([f"{number}.mlp.up" for number in middle])
    ranks = draw(st.dictionaries(layers, st.integers(1, 2**40)))
    return Layout(parts, tuple(sorted(middle)), ranks, draw(st.sampled_from(["none", "nf4"])))


@given(layouts())
def test_blocks_keep_the_order_that_they_have_in_the_backbone(layout: Layout) -> None:
    origins = layout.origins
    assert list(origins) == sorted(origins)
    assert tuple(origins[number] for number in layout.inner) == layout.middle
    assert tuple(origins[number] for number in layout.outer) == layout.split.outer
    assert sorted((*layout.inner, *layout.outer)) == list(range(len(origins)))


@given(layouts(), st.integers(0, 10**6), st.integers(0, 99))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path: Path, layout: Layout, distilled: int, number: int) -> None:
    record = Record(layout, DIGEST, DIGEST, distilled, number)
    record.write(tmp_path)
    assert read(tmp_path) == record
    assert is_emulator(tmp_path)


def document(**changes: Any) -> dict[str, Any]:
    """A record of six blocks; a key of `changes` with a dot names what is inside, and None removes it."""
    whole: dict[str, Any] = {
        "format": 1,
        "layout": {
            "split": {"depth": 6, "first": 1, "last": 2},
            "middle": [1, 3],
            "ranks": {"1.mlp.up": 4},
            "quantization": "nf4",
        },
        "plan": DIGEST,
        "backbone": DIGEST,
        "distilled": 10,
        "round": 0,
    }
    for path, value in changes.items():
        *above, key = path.split("__")
        place = whole
        for one in above:
            place = place[one]
        if value is None:
            del place[key]
        else:
            place[key] = value
    return whole


def refusal(folder: Path, content: str | bytes) -> str:
    (folder / LAYOUT).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(EmulatorError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_document_of_these_tests_is_fine(tmp_path: Path) -> None:
    (tmp_path / LAYOUT).write_text(json.dumps(document()), encoding="utf-8")
    assert read(tmp_path).layout == Layout(Split(6, 1, 2), (1, 3), {"1.mlp.up": 4}, "nf4")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format: "),
        ({"format": None}, "format: "),
        ({"more": 1}, "more: "),
        ({"plan": "x"}, "plan: "),
        ({"plan": "AB" * 32}, "plan: "),
        ({"backbone": "x"}, "backbone: "),
        ({"distilled": -1}, "distilled: "),
        ({"distilled": 1.5}, "distilled: "),
        ({"distilled": True}, "distilled: "),
        ({"round": -1}, "round: "),
        ({"layout__middle": []}, r"layout\.middle: "),
        ({"layout__middle": [0]}, "not of the middle"),
        ({"layout__middle": [4]}, "not of the middle"),
        ({"layout__middle": [-1]}, "not of the middle"),
        ({"layout__middle": ["1"]}, r"layout\.middle\.0: "),
        ({"layout__middle": [1, 2, 3, 3]}, "more blocks than the middle"),
        ({"layout__middle": [3, 1]}, "another order"),
        ({"layout__split__depth": 3}, "nothing is between"),
        ({"layout__split__depth": 10**9}, "depth"),
        ({"layout__split__first": 0}, "first"),
        ({"layout__split__last": -1}, "last"),
        ({"layout__ranks": {"2.mlp.up": 4}}, "ranks of blocks that it does not have"),
        ({"layout__ranks": {"": 4}}, "ranks of blocks that it does not have"),
        ({"layout__ranks": {"1.mlp.up": 0}}, "ranks"),
        ({"layout__ranks": {"1.mlp.up": -4}}, "ranks"),
        ({"layout__ranks": {"1.mlp.up": "4"}}, "ranks"),
        ({"layout__quantization": "int8"}, "quantization"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(tmp_path, json.dumps(document(**changes))))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "[" * 100_000, '{"format": ' + "9" * 9999 + "}", b"\xff\xfe", "NaN"]
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str | bytes) -> None:
    assert "not the record of an emulator" in refusal(tmp_path, content)


@given(st.integers(0, 2**32), st.integers(1, 6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_record_is_refused_or_read_as_a_sound_one(tmp_path: Path, seed: int, count: int) -> None:
    generator, content = random.Random(seed), bytearray(json.dumps(document()).encode())
    for _ in range(count):
        content[generator.randrange(len(content))] = generator.choice(b'{}[]",:0123456789-.e truefalsn')
    (tmp_path / LAYOUT).write_bytes(content)
    try:
        layout = read(tmp_path).layout
    except EmulatorError:
        return
    assert set(layout.middle) <= set(layout.split.middle)
    assert all(rank > 0 for rank in layout.ranks.values())


def test_a_folder_without_a_record(tmp_path: Path) -> None:
    assert not is_emulator(tmp_path)
    with pytest.raises(EmulatorError, match=r"there is no emulator\.json"):
        read(tmp_path)
    (tmp_path / LAYOUT).mkdir()
    with pytest.raises(EmulatorError, match="not the record"):
        read(tmp_path)


def test_an_emulator_of_another_plan_is_refused(tmp_path: Path) -> None:
    plan = plans.parse(PLAN, registered(), None)
    layout = Layout(Split(6, 2, 2), (2,))
    Record(layout, plan.emulator_digest, "0" * 64, 0).check(plan, tmp_path)
    other = plans.parse(PLAN.replace("rounds = 2", "rounds = 2\nseed = 1"), registered(), None)
    with pytest.raises(EmulatorError, match=r"emulator\.json: made for another Plan: .* must be the same"):
        Record(layout, plan.emulator_digest, "0" * 64, 0).check(other, tmp_path)
