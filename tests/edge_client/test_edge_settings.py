"""The settings of an edge client: what is written reads back, and what is wrong is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farfield.edge_client.consent import Consent
from farfield.edge_client.settings import CacheSettings, CoordinatorSettings, DataSettings, NodeSettings, Settings
from farfield.protocols.errors import HomeError

SETTINGS = Settings(
    coordinator=CoordinatorSettings(host="c.example", enrolment_port=9094, fleet_port=9092, federation_port=9093),
    node=NodeSettings(name="ward-3"),
    data=DataSettings(path="/data/notes"),
)


def test_the_file_says_what_every_key_is_for_and_offers_those_that_are_not_set() -> None:
    lines = SETTINGS.render().splitlines()
    for section, model in Settings.model_fields.items():
        assert f"[{section}]" in lines
        kind: Any = model.annotation
        for key in kind.model_fields:
            (at,) = (number for number, line in enumerate(lines) if line.removeprefix("# ").startswith(f"{key} = "))
            assert lines[at - 1].startswith("# ")
    text = SETTINGS.render()
    assert "# max_rounds = 100\n" in text
    offered = text.replace("# max_", "max_")
    assert Settings.parse(offered).consent.max_epsilon == 8.0
    assert Settings.parse(offered).consent.max_rounds == 100
    assert Settings.parse(offered).consent.max_memory_bytes == 16_000_000_000


CHANGED = SETTINGS.model_copy(
    update={
        "data": DataSettings(path="builtin:stdlib/2/3"),
        "cache": CacheSettings(max_bytes=0),
        "consent": Consent(
            methods=("lora", "ia3"),
            max_rounds=7,
            max_backbone_bytes=12_345_678,
            hours="22:00-06:00",
            max_epsilon=2.5,
            delta=1e-7,
        ),
    }
)


def test_what_is_written_reads_back() -> None:
    assert Settings.parse(SETTINGS.render()) == SETTINGS
    assert Settings.parse(CHANGED.render()) == CHANGED


@given(st.text().filter(lambda text: "\0" not in text))
def test_any_path_reads_back(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return
    settings = SETTINGS.model_copy(update={"data": DataSettings(path=f"/{name}")})
    assert Settings.parse(settings.render()) == settings


WRONG = {
    "max_rouds": ("min_cohort = 1", "max_rouds = 3", "unknown key 'consent.max_rouds'. Did you mean 'max_rounds'?"),
    "section": ("[cache]", "[cach]", "unknown key 'cach'. Did you mean 'cache'?"),
    "port": ("fleet_port = 9092", "fleet_port = 0", "coordinator.fleet_port = 0: "),
    "type": ("fleet_port = 9092", 'fleet_port = "9092"', "coordinator.fleet_port = '9092': "),
    "missing": ('name = "ward-3"', "", "'node.name' is missing"),
    "name": ('name = "ward-3"', 'name = "ward 3"', "node.name: 'ward 3' is no name for a node"),
    "path": ('path = "/data/notes"', 'path = "notes"', "data.path: notes: not an absolute path"),
    "builtin": ('path = "/data/notes"', 'path = "builtin:stdlib/4/3"', "no such builtin data"),
    "hours": ('hours = ""', 'hours = "night"', "consent.hours: 'night' is not a span of hours"),
    "protection": ('"sealed", "secagg"', '"seald"', "consent.protections.0 = 'seald' is not one of 'sealed' or "),
    "no TOML": ("[cache]", "[cache", "not valid TOML: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_one_sentence_about_one_key(case: str) -> None:
    old, new, sentence = WRONG[case]
    text = SETTINGS.render()
    assert old in text
    with pytest.raises(HomeError) as caught:
        Settings.parse(text.replace(old, new, 1))
    said = str(caught.value)
    assert said.startswith("edge-client.toml: ") and sentence in said and "\n" not in said
