"""Plots as SVG that stands in a page: no script, no font, nothing to fetch; colours come from the page's variables.

A drawing is 400 units wide, which is about what a telephone shows, so its text stays readable there and is not large
elsewhere. Series differ in colour, dashes and markers, so that no one needs the colour.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from .axes import Scale, scale
from .finding import Mark, Plot, Series
from .wording import number, printable

Point: TypeAlias = tuple[float, float]

WIDTH: Final = 400
HEIGHT: Final = 290

_SIZE: Final = 13.0  # of the largest text, as page.css has it
_WIDE: Final = 0.56 * _SIZE  # what a character takes, on the safe side for sans-serif
_RIGHT: Final = 14.0
_BOTTOM: Final = 44.0
_LINE: Final = 15.0
_KINDS: Final = 6  # of colours, dashes and markers
_DASHES: Final = ("", "7 4", "2 3", "9 3 2 3", "4 2", "12 4")
_SWATCH: Final = '<svg class="swatch" viewBox="0 0 32 16" width="32" height="16" aria-hidden="true">'
_FEW: Final = 24  # points that still get a marker each


@dataclass(frozen=True, slots=True)
class Box:
    """Where the curves are, in the drawing."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Bound:
    """One measured bound, as `bounds` draws it."""

    label: str
    value: float
    ceiling: float | None
    claimed: float | None


def plot(drawn: Plot, name: str) -> str:
    """The plot as an `<svg>` element.

    Args:
        name: what the identifiers in it begin with, so that each is there once in a page.
    """
    y_title = _wrapped(drawn.y.label, int((WIDTH - 8) / _WIDE), 2)
    top = 10 + _LINE * len(y_title)
    y = scale(drawn.y, _values(drawn, "y"), HEIGHT - _BOTTOM, top)
    left = 14 + _WIDE * max((len(label) for _, label in y.ticks), default=1)
    x = scale(drawn.x, _values(drawn, "x"), left, WIDTH - _RIGHT)
    box = Box(left, top, WIDTH - _RIGHT, HEIGHT - _BOTTOM)
    clip = f"{name}-clip"
    inside = [_diagonal(x, y)] if drawn.diagonal else []
    inside += [_band(one, index, x, y) for index, one in enumerate(drawn.series)]
    inside += [_curve(one, index, x, y) for index, one in enumerate(drawn.series)]
    parts = [
        f'<clipPath id="{clip}"><rect x="{box.left:.1f}" y="{box.top - 1:.1f}" '
        f'width="{box.right - box.left:.1f}" height="{box.bottom - box.top + 2:.1f}"/></clipPath>',
        *(_text(2, 12 + _LINE * line, words, "title") for line, words in enumerate(y_title)),
        _grid(box, x, y),
        f'<g clip-path="url(#{clip})">{"".join(inside)}</g>',
        # Markers may stand on the edge of the box, and are whole there.
        *(_markers(one, index, x, y) for index, one in enumerate(drawn.series)),
        _marks(drawn.marks, box, y),
        _text((box.left + box.right) / 2, HEIGHT - 6, _cut(drawn.x.label, box.right - box.left), "title", "middle"),
    ]
    return _svg(name, drawn.title, _described(drawn), HEIGHT, "".join(parts))


def swatch(index: int, *, points: bool = False, band: bool = False) -> str:
    """What a legend shows beside the name of series `index`; hidden from who cannot see it, for the name is enough."""
    colour = f"c{index % _KINDS}"
    line = "" if points else f'<path class="line {colour}" d="M1 8H31"{_dashed(index)}/>'
    shade = ""
    if band:
        bar = f'<path class="whisker {colour}" d="M16 1V15"/>'
        shade = bar if points else f'<rect class="band {colour}" x="1" y="1" width="30" height="14"/>'
    return f"{_SWATCH}{shade}{line}{_marker(index, 16, 8)}</svg>"


def swatch_of_chance() -> str:
    """The same for the diagonal."""
    return f'{_SWATCH}<path class="chance" d="M1 15L31 1"/></svg>'


def bounds(rows: Sequence[Bound], title: str, name: str) -> str:
    """Lower bounds on ε: what was measured, how far each measurement could have gone, and what is claimed.

    Args:
        rows: one at least.
    """
    values, ceilings = [row.value for row in rows], [row.ceiling for row in rows if row.ceiling is not None]
    claims = {row.claimed for row in rows if row.claimed is not None}
    # What is far beyond the rest is cut off at the right: it would press all bars together at the left.
    shown = [claim for claim in claims if claim <= 8 * max(values + ceilings)]
    near = max(values + shown)
    most = max(near, *(one for one in ceilings if not shown or one <= 3 * near), 1e-9)
    left, right, each = 4.0, WIDTH - 26.0, 62.0
    top = 26.0 if len(claims) == 1 else 6.0

    def place(value: float) -> float:
        return left + (right - left) * min(max(value, 0.0) / most, 1.03)

    parts, told = [], []
    for index, row in enumerate(rows):
        y = top + each * index
        claim = "" if row.claimed is None else f"claimed: {number(row.claimed, 3)}"
        label = f"{row.label} ({claim})" if claim and len(claims) > 1 else row.label
        reach = "" if row.ceiling is None else f", of at most {number(row.ceiling, 3)} that it could show"
        parts.append(_text(left, y + 13, _cut(label, WIDTH - left), "strong"))
        parts.append(_text(left, y + 29, f"at least {number(row.value, 3)}{reach}", "title"))
        if row.ceiling is not None:
            parts.append(_rect("reach", left, y + 36, place(row.ceiling) - left, 14))
        parts.append(_rect("bar", left, y + 36, max(place(row.value) - left, 2.5), 14))
        if row.claimed is not None:
            parts.append(f'<path class="claim" d="M{place(row.claimed):.1f} {y + 32:.1f}V{y + 54:.1f}"/>')
        told.append(f"{row.label}: at least {number(row.value, 3)}{reach}{claim and f'; {claim}'}.")
    if len(claims) == 1:
        (only,) = claims
        at, far = place(only), "" if only in shown else " (far beyond the right edge)"
        end = at > WIDTH / 2
        parts.append(
            _text(at + 4 if end else at, 13, f"claimed: {number(only, 3)}{far}", "strong", "end" if end else "start")
        )
    return _svg(name, title, " ".join(told), top + each * len(rows), "".join(parts))


def _svg(name: str, title: str, told: str, height: float, inner: str) -> str:
    return (
        f'<svg class="plot" role="img" viewBox="0 0 {WIDTH} {height:g}" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{_escaped(title)}</title><desc id="{name}-d">{_escaped(told)}</desc>{inner}</svg>'
    )


def _values(drawn: Plot, axis: str) -> list[float]:
    values: list[float] = []
    for one in drawn.series:
        values += one.x if axis == "x" else (*one.y, *one.low, *one.high)
    return values + ([mark.y for mark in drawn.marks] if axis == "y" else [])


def _grid(box: Box, x: Scale, y: Scale) -> str:
    parts = []
    for value, label in y.ticks:
        at = y.at(value)
        parts.append(f'<path class="grid" d="M{box.left:.1f} {at:.1f}H{box.right:.1f}"/>')
        parts.append(_text(box.left - 6, at + 4, label, "tick", "end"))
    room = -math.inf
    for value, label in x.ticks:
        at, half = x.at(value), _WIDE * len(label) / 2
        parts.append(f'<path class="grid" d="M{at:.1f} {box.top:.1f}V{box.bottom + 4:.1f}"/>')
        middle = min(at, WIDTH - half - 1)
        if middle - half > room:
            parts.append(_text(middle, box.bottom + 17, label, "tick", "middle"))
            room = middle + half + 6
    parts.append(f'<path class="axis" d="M{box.left:.1f} {box.bottom:.1f}H{box.right:.1f}"/>')
    return "".join(parts)


def _points(one: Series, x: Scale, y: Scale, values: Sequence[float] | None = None) -> list[Point]:
    """Where the points are, in steps where it is drawn in steps; none twice in a row."""
    found: list[Point] = []
    for a, b in zip(one.x, one.y if values is None else values, strict=False):
        point = (round(x.at(a), 1), round(y.at(b), 1))
        if found and one.style == "steps" and found[-1][0] != point[0] and found[-1][1] != point[1]:
            found.append((point[0], found[-1][1]))
        if not found or found[-1] != point:
            found.append(point)
    return found


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{a:g} {b:g}" for a, b in points)


def _curve(one: Series, index: int, x: Scale, y: Scale) -> str:
    points = _points(one, x, y)
    if one.style == "points" or not points:
        return ""
    return f'<path class="line c{index % _KINDS}" d="{_path(points)}"{_dashed(index)}/>'


def _band(one: Series, index: int, x: Scale, y: Scale) -> str:
    if not one.low or not one.high:
        return ""
    if one.style == "points":
        bars = zip(one.x, one.low, one.high, strict=False)
        d = "".join(f"M{x.at(a):.1f} {y.at(low):.1f}V{y.at(high):.1f}" for a, low, high in bars)
        return f'<path class="whisker c{index % _KINDS}" d="{d}"/>'
    low, high = _points(one, x, y, one.low), _points(one, x, y, one.high)
    return f'<path class="band c{index % _KINDS}" d="{_path([*low, *reversed(high)])}Z"/>'


def _markers(one: Series, index: int, x: Scale, y: Scale) -> str:
    if one.style != "points" and (one.style == "steps" or len(one.x) > _FEW):
        return ""
    return "".join(_marker(index, x.at(a), y.at(b)) for a, b in zip(one.x, one.y, strict=False))


def _marker(index: int, x: float, y: float) -> str:
    shapes = (
        "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",  # circle
        "m-3.2 -3.2h6.4v6.4h-6.4z",  # square
        "m0 -4.2l4 7h-8z",  # triangle
        "m0 -4.5l4.5 4.5l-4.5 4.5l-4.5 -4.5z",  # diamond
        "m0 4.2l4 -7h-8z",  # triangle on its head
        "m-3.2 -1.2h2v-2h2.4v2h2v2.4h-2v2h-2.4v-2h-2z",  # plus
    )
    shape = shapes[(index + 2 * (index // _KINDS)) % _KINDS]
    return f'<path class="marker c{index % _KINDS}" d="M{x:.1f} {y:.1f}{shape}"/>'


def _diagonal(x: Scale, y: Scale) -> str:
    low, high = max(x.low, y.low), min(x.high, y.high)
    if low >= high:
        return ""
    # On axes of two kinds y = x is no straight line.
    values = [x.value(x.at(low) + (x.at(high) - x.at(low)) * step / 64) for step in range(65)]
    return f'<path class="chance" d="{_path([(round(x.at(v), 1), round(y.at(v), 1)) for v in values])}"/>'


def _marks(marks: Sequence[Mark], box: Box, y: Scale) -> str:
    """Lines across, each with its label above it at the right, moved apart where they would lie on one another."""
    placed = sorted(((y.at(mark.y), mark.label) for mark in marks), key=lambda one: one[0])
    parts = [f'<path class="mark" d="M{box.left:.1f} {at:.1f}H{box.right:.1f}"/>' for at, _ in placed]
    lowest, tops = box.top + 11 - _LINE, []
    for at, _ in placed:
        lowest = max(at - 4, lowest + _LINE)
        tops.append(lowest)
    highest = box.bottom - 3 + _LINE
    for (_, words), wanted in zip(reversed(placed), reversed(tops), strict=True):
        highest = min(wanted, highest - _LINE)
        parts.append(_text(box.right - 2, highest, _cut(words, box.right - box.left), "label", "end"))
    return "".join(parts)


def _dashed(index: int) -> str:
    dashes = _DASHES[(index + index // _KINDS) % _KINDS]  # the seventh has the first one's colour, and other dashes
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:g}" rx="2"/>'


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_escaped(words)}</text>'


def _escaped(words: str) -> str:
    """For XML, which has no place for control characters, however they are written."""
    return html.escape(printable(words))


def _cut(words: str, width: float) -> str:
    most = int(width / _WIDE)
    return words if len(words) <= most else f"{words[: most - 1].rstrip()}…"


def _wrapped(words: str, most: int, lines: int) -> list[str]:
    found = [""]
    for word in words.split():
        if found[-1] and len(found[-1]) + 1 + len(word) > most and len(found) < lines:
            found.append("")
        found[-1] = f"{found[-1]} {word}".strip()
    return [*found[:-1], _cut(found[-1], most * _WIDE)]


def _described(drawn: Plot) -> str:
    """For who cannot see it: the axes, and where each curve begins and ends."""
    told = [f"{_kind(drawn.y.log)} {drawn.y.label} against {_kind(drawn.x.log)} {drawn.x.label}."]
    for one in drawn.series:
        if not one.x:
            told.append(f"{one.label}: no points.")
            continue
        first, last = (f"{number(one.y[k])} at {number(one.x[k])}" for k in (0, -1))
        told.append(f"{one.label}: {first}." if len(one.x) == 1 else f"{one.label}: from {first} to {last}.")
    told += [f"Line at {number(mark.y)}: {mark.label}." for mark in drawn.marks]
    return " ".join([*told, *(["The diagonal is what guessing gives."] if drawn.diagonal else [])])


def _kind(log: bool) -> str:
    return "Logarithmic" if log else "Linear"
