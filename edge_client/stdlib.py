"""The clients' side of the standard library: prose, dealt to as many clients as a demonstration wants.

`farfield.emulator.stdlib` says how the library is cut. The clients hold the docstrings and comments of `CLIENT_UNITS`:
of these the backbone has seen nothing, neither the units nor text of this kind.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from farfield.emulator.stdlib import CLIENT_UNITS, docstrings, files, is_test, owner, parse, read
from farfield.protocols.errors import DataError

MIN_PROSE_CHARS = 40
"""Shorter docstrings and comments ("# XXX", "Return self.") say nothing that can be learnt."""

MIN_CLIENT_CHARS = 1500
"""A client of a demonstration holds at least this much prose: enough for a batch or two and a held-out share."""

_RULER = re.compile(r"(?=.*[-=*~_#+]{3})[\W_]+")
"""A line of drawing: an underline, a border of a table, a rule between two parts of a file."""

_RULED_HEADING = re.compile(r"(?:[-=*#]{2,}\s+)?(\S.*?)\s*(?:[-=*~_]{5,}|\s#+)")
"""A heading drawn out with a rule: "-- Private methods --------", "Screen - Singleton  ########"."""

_FOR_TOOLS = re.compile(
    r"-\*-.*-\*-|(vi|vim|ex):\s?\S*(set?\s|\w+=).*|(Local Variables|End):|\$(Id|Revision|Date|Author)\b.*\$"
    r"|(noqa|type: ignore|pragma:|pylint:|mypy:|fmt:|XXX$).*"
)
"""A comment line that speaks to an editor, a linter or a version control system."""


def prose(text: str) -> list[str]:
    """The docstrings and comment blocks of `text` in the order they stand in, each as one string.

    What is drawn (rules, underlines, borders of tables), lines for editors and linters, and code that was commented out
    are not prose and are left out, and so is every piece that is then shorter than `MIN_PROSE_CHARS`.
    """
    return _prose(text, parse(text))


def _prose(text: str, tree: ast.Module) -> list[str]:
    found = [(node.lineno, _cleaned(inspect.cleandoc(str(node.value)))) for node in docstrings(tree)]
    found += [(row, _cleaned(block)) for row, block in _comment_blocks(text) if not _is_code(block)]
    return [piece for _, piece in sorted(found) if len(piece) >= MIN_PROSE_CHARS]


def _comment_blocks(text: str) -> Iterator[tuple[int, str]]:
    """The first row and the text of each run of comments on consecutive rows. Those beside code and those on lines of
    their own do not make one run.
    """
    block: list[str] = []
    start, expected = 0, (0, False)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        if token.type != tokenize.COMMENT or (row == 1 and token.string.startswith("#!")):
            continue
        beside_code = bool(token.line[:column].strip())
        if block and (row, beside_code) != expected:
            yield start, "\n".join(block)
            block = []
        start = start if block else row
        block.append(re.sub(r"^[#!:]+ ?", "", token.string))
        expected = (row + 1, beside_code)
    if block:
        yield start, "\n".join(block)


def _is_code(comment: str) -> bool:
    """Whether a comment is code that someone switched off. Prose is hardly ever valid Python, except as one bare name
    before a comment of its own ("Issue #13305: ...").
    """
    try:
        statements = parse(textwrap.dedent(comment)).body
    except (SyntaxError, ValueError):
        return False
    return not all(isinstance(one, ast.Expr) and isinstance(one.value, ast.Name) for one in statements)


def _cleaned(piece: str) -> str:
    lines = []
    for line in map(str.rstrip, piece.splitlines()):
        bare = line.strip()
        if bare and (_RULER.fullmatch(bare) or _FOR_TOOLS.fullmatch(bare)):
            continue
        heading = _RULED_HEADING.fullmatch(bare)
        lines.append(heading[1] if heading else line)
    return re.sub(r"\n\n\n+", "\n\n", textwrap.dedent("\n".join(lines))).strip()


def client_prose(folder: Path | None = None) -> dict[str, list[str]]:
    """The prose of every client unit, unit by unit in alphabetical order; within a unit in path order, without tests.

    Reads the clients' files only, in about a second. A text that stands in several places is taken once, so that no
    client trains on what another one holds out. Leaves out a unit that this installation lacks or that holds
    less than `MIN_CLIENT_CHARS`.
    """
    found: dict[str, list[str]] = {unit: [] for unit in CLIENT_UNITS}
    seen: set[str] = set()
    for path, file in files(folder, CLIENT_UNITS):
        if is_test(path) or (parsed := read(file)) is None:
            continue
        for piece in _prose(*parsed):
            if piece not in seen:
                seen.add(piece)
                found[owner(path)].append(piece)
    return {unit: texts for unit, texts in found.items() if _size(texts) >= MIN_CLIENT_CHARS}


def clients(count: int, folder: Path | None = None) -> list[tuple[str, list[str]]]:
    """A name and its texts for each of `count` clients; the same for every call on one installation.

    Up to as many clients as there are units, a client holds whole units ("doctest+uuid"). For more, units are cut
    between texts ("xml-3" is the third part of xml), the longest ones into more parts, and the parts of a unit are as
    even as whole texts allow. Every text goes to one client, and every client has at least `MIN_CLIENT_CHARS`.

    Raises:
        DataError: `count` is not positive, or there is too little prose for so many; names the largest count.
    """
    units = client_prose(folder)
    most = {unit: _most_parts(texts) for unit, texts in units.items()}
    where = folder or "the standard library of this Python"
    if count < 1:
        raise DataError(f"cannot be dealt to {count} clients", where=where, hint="A demonstration has at least one.")
    if count > sum(most.values()):
        raise DataError(
            f"holds prose for at most {sum(most.values())} clients, not {count}",
            where=where,
            hint="Ask for fewer, or give the clients data of your own with --data.",
        )
    return _dealt(units, count) if count <= len(units) else _cut(units, most, count)


def _dealt(units: dict[str, list[str]], count: int) -> list[tuple[str, list[str]]]:
    """Whole units, the longest first, each to the client that has least so far."""
    hands: list[list[str]] = [[] for _ in range(count)]
    held = [0] * count
    for unit in sorted(units, key=lambda unit: (-_size(units[unit]), unit)):
        least = held.index(min(held))
        hands[least].append(unit)
        held[least] += _size(units[unit])
    return [(_joined(hand), [text for unit in hand for text in units[unit]]) for hand in hands]


def _joined(units: list[str]) -> str:
    return "+".join(units) if len(units) <= 3 else f"{units[0]}+{units[1]}+{len(units) - 2}-more"


def _cut(units: dict[str, list[str]], most: dict[str, int], count: int) -> list[tuple[str, list[str]]]:
    parts = dict.fromkeys(units, 1)
    while sum(parts.values()) < count:
        divisible = [unit for unit in units if parts[unit] < most[unit]]
        parts[max(divisible, key=lambda unit: _size(units[unit]) / parts[unit])] += 1
    return [
        (unit if parts[unit] == 1 else f"{unit}-{number}", texts)
        for unit in units
        for number, texts in enumerate(_even_parts(units[unit], parts[unit]), 1)
    ]


def _size(texts: list[str]) -> int:
    return sum(map(len, texts))


def _most_parts(texts: list[str]) -> int:
    """The most contiguous parts of at least `MIN_CLIENT_CHARS` each: cut as soon as a part is long enough."""
    parts = held = 0
    for text in texts:
        held += len(text)
        if held >= MIN_CLIENT_CHARS:
            parts, held = parts + 1, 0
    return parts


def _even_parts(texts: list[str], count: int) -> list[list[str]]:
    """`texts` as `count` contiguous parts of at least `MIN_CLIENT_CHARS`, of the least sum of squared sizes.

    By dynamic programming over the ends of parts: `least[end]` is the best sum for the texts before `end`.
    """
    ends = np.array([0, *accumulate(map(len, texts))], dtype=np.float64)
    sizes = ends[None, :] - ends[:, None]
    cost = np.where(sizes >= MIN_CLIENT_CHARS, sizes**2, np.inf)
    least = cost[0]
    starts = []
    for _ in range(count - 1):
        total = least[:, None] + cost
        starts.append(total.argmin(axis=0))
        least = total.min(axis=0)
    cuts = [len(texts)]
    for start in reversed(starts):
        cuts.append(int(start[cuts[-1]]))
    cuts = [0, *reversed(cuts)]
    return [texts[begin:end] for begin, end in pairwise(cuts)]
