"""The standard library as the clients' data: clean prose, dealt to any number of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.edge_client import stdlib
from farfield.emulator.stdlib import sources
from farfield.protocols.errors import DataError

MODULE = '''#!/usr/bin/env python3
# -*- coding: utf-8 -*-
# vim: set ts=4 sw=4:
"""A module for nothing but the tests of this one.

    Indented, and kept so.

Heading
=======
"""

#######################################
#  Screen - Singleton, of which there is only one  ########
#######################################

# -- Private methods that do a great deal of work -----------------------------
x = 1  # too short

# A comment that is long enough to be learnt,
#     with an indented line,
#no space here.
# type: ignore[whatever] because the checker is wrong here
# $Id: tests.py 3375 2008-02-13 08:05:08Z fredrik $

#print("code that someone switched off", x, x, x)
#if x:
#    x = 2

# Issue #13305: prose that begins like an expression

def f():
    """Return the answer to what was asked of it."""
    return "# not a comment, but a string that is long enough"
'''


@pytest.fixture(scope="module")
def library() -> dict[str, list[str]]:
    return stdlib.client_prose()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A library of three client units of 2,000, 3,000 and 9,000 characters, one that is too small, and others."""
    sizes = {"json/__init__.py": 3, "json/tool.py": 0, "uuid.py": 2, "xml/dom/a.py": 4, "xml/sax.py": 5, "heapq.py": 1}
    words = (f"w{number:03d} " for number in range(1000))
    for name, count in sizes.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(f'def f():\n    """{next(words) * 199 + "end.."}"""\n' for _ in range(count)))
    (tmp_path / "test" / "test_json").mkdir(parents=True)
    for other in ("test/test_json/test_a.py", "json/tests.txt", "abc.py", "xml/broken.py"):
        (tmp_path / other).write_text(f'"""{"never " * 400}"""\n' + "def (" * (other == "xml/broken.py"))
    (tmp_path / "json" / "tests").mkdir()
    (tmp_path / "json" / "tests" / "a.py").write_text(f'"""{"never " * 400}"""\n')
    return tmp_path


# Prose


def test_prose_is_clean_and_in_order() -> None:
    assert stdlib.prose(MODULE) == [
        "A module for nothing but the tests of this one.\n\n    Indented, and kept so.\n\nHeading",
        "Screen - Singleton, of which there is only one",
        "Private methods that do a great deal of work",
        "A comment that is long enough to be learnt,\n    with an indented line,\nno space here.",
        "Issue #13305: prose that begins like an expression",
        "Return the answer to what was asked of it.",
    ]


def test_nothing_drawn_or_for_tools_is_left(library: dict[str, list[str]]) -> None:
    unwanted = re.compile(r"^[^\w\n]*[-=*~_#]{4,}[^\w\n]*$|^#!|-\*-|\bvim?:|\$Id|[^\S\n]$", re.MULTILINE)
    for unit, texts in library.items():
        for text in texts:
            assert len(text) >= stdlib.MIN_PROSE_CHARS
            found = unwanted.search(text)
            assert found is None, (unit, found, text)
            assert "\n\n\n" not in text


@given(st.text(st.sampled_from("#\"'\n ab:=()-!\\"), max_size=80))
@settings(deadline=None)
def test_any_comment_can_be_read(comment: str) -> None:
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    assert all(len(text) >= stdlib.MIN_PROSE_CHARS for text in stdlib.prose(lines + "pass\n"))


def test_warnings_hide_no_prose(tmp_path: Path) -> None:
    # Pytest makes an invalid escape's warning an error, and that a SyntaxError of the file.
    (tmp_path / "json.py").write_text(f'"""A pattern: \\d+ digits. {"And prose enough. " * 100}"""\n')
    assert list(stdlib.client_prose(tmp_path)) == ["json"]


# Units


def test_clients_read_their_own_units_without_tests(small: Path) -> None:
    found = stdlib.client_prose(small)
    assert {unit: len(texts) for unit, texts in found.items()} == {"json": 3, "uuid": 2, "xml": 9}
    assert not any("never" in text for texts in found.values() for text in texts)


def test_client_prose_agrees_with_sources(small: Path) -> None:
    expected: dict[str, list[str]] = {}
    for source in sources(small):
        if source.unit in ("json", "uuid", "xml") and not source.is_test:
            expected.setdefault(source.unit, []).extend(stdlib.prose(source.text))
    assert stdlib.client_prose(small) == expected


# Dealing


@pytest.fixture
def given_library(library: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Read the library once for all tests that deal it."""
    monkeypatch.setattr(stdlib, "client_prose", lambda folder=None: library)
    yield


@pytest.mark.parametrize("count", [1, 2, 8, 21, 22, 100, 256])
@pytest.mark.usefixtures("given_library")
def test_every_text_goes_to_one_client(library: dict[str, list[str]], count: int) -> None:
    dealt = stdlib.clients(count)
    assert len(dealt) == len({name for name, _ in dealt}) == count
    everything = Counter(text for texts in library.values() for text in texts)
    assert Counter(text for _, texts in dealt for text in texts) == everything
    assert all(sum(map(len, texts)) >= stdlib.MIN_CLIENT_CHARS for _, texts in dealt)
    assert dealt == stdlib.clients(count)
    assert all(re.fullmatch(r"[a-z0-9+-]{3,60}", name) for name, _ in dealt)


@pytest.mark.usefixtures("given_library")
def test_whole_units_are_dealt_evenly(library: dict[str, list[str]]) -> None:
    sizes = [sum(map(len, texts)) for _, texts in stdlib.clients(4)]
    largest_unit = max(sum(map(len, texts)) for texts in library.values())
    assert max(sizes) - min(sizes) <= largest_unit
    assert {name for name, _ in stdlib.clients(len(library))} == set(library)


def test_names(small: Path) -> None:
    assert [name for name, _ in stdlib.clients(1, small)] == ["xml+json+uuid"]
    assert [name for name, _ in stdlib.clients(2, small)] == ["xml", "json+uuid"]
    assert [(name, len(texts)) for name, texts in stdlib.clients(5, small)] == [
        ("json", 3), ("uuid", 2), ("xml-1", 3), ("xml-2", 3), ("xml-3", 3),
    ]  # fmt: skip


@pytest.mark.usefixtures("given_library")
def test_a_client_of_many_units_has_a_short_name() -> None:
    ((name, _),) = stdlib.clients(1)
    assert re.fullmatch(r"[a-z]+\+[a-z]+\+\d+-more", name)


def test_more_clients_than_there_is_prose_for(small: Path) -> None:
    assert len(stdlib.clients(6, small)) == 6
    with pytest.raises(DataError) as caught:
        stdlib.clients(7, small)
    assert str(caught.value) == (
        f"{small}: holds prose for at most 6 clients, not 7. "
        "Ask for fewer, or give the clients data of your own with --data."
    )
    with pytest.raises(DataError, match="cannot be dealt to 0 clients"):
        stdlib.clients(0, small)


@given(st.lists(st.integers(40, 4000), min_size=1, max_size=12), st.data())
@settings(deadline=None)
def test_parts_are_as_even_as_whole_texts_allow(sizes: list[int], data: st.DataObject) -> None:
    texts = [str(number % 10) * size for number, size in enumerate(sizes)]
    most = stdlib._most_parts(texts)
    best = [cut for cut in every_cut(sizes) if min(map(sum, cut)) >= stdlib.MIN_CLIENT_CHARS]
    assert most == max(map(len, best), default=0)
    if most:
        count = data.draw(st.integers(1, most))
        parts = stdlib._even_parts(texts, count)
        assert [text for part in parts for text in part] == texts
        squares = [sum(sum(part) ** 2 for part in cut) for cut in best if len(cut) == count]
        assert sum(sum(map(len, part)) ** 2 for part in parts) == min(squares)


def every_cut(sizes: list[int]) -> list[list[list[int]]]:
    """Every way to cut `sizes` into contiguous parts: the reference, exponentially slow."""
    if len(sizes) == 1:
        return [[sizes]]
    rest = every_cut(sizes[1:])
    return [[sizes[:1], *cut] for cut in rest] + [[[sizes[0], *cut[0]], *cut[1:]] for cut in rest]


def test_the_real_library_gives_enough_for_a_large_demonstration(library: dict[str, list[str]]) -> None:
    assert len(library) >= 20
    assert sum(map(stdlib._most_parts, library.values())) >= 256


def test_no_text_is_held_twice() -> None:
    """A duplicate could be trained on by one client and held out by another."""
    texts = [text for _, held in stdlib.clients(8) for text in held]
    assert len(set(texts)) == len(texts)
