"""Axes that a person can read, and drawings in which everything is where it belongs, whatever was measured."""

from __future__ import annotations

import itertools
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farfield.protocols.audit import svg
from farfield.protocols.audit.axes import scale
from farfield.protocols.audit.finding import Axis, Mark, Plot, Series
from farfield.protocols.audit.wording import number

SVG = "{http://www.w3.org/2000/svg}"
PLAIN = Axis(label="value")

finite = st.floats(allow_nan=False, allow_infinity=False)
limits = st.none() | finite


def drawn(text: str) -> ElementTree.Element:
    """As XML, which it has to be, too."""
    return ElementTree.fromstring(text.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))


def plot(
    *series: Series, x: Axis = PLAIN, y: Axis = PLAIN, marks: tuple[Mark, ...] = (), diagonal: bool = False
) -> Plot:
    return Plot(title="a title", x=x, y=y, series=series, marks=marks, diagonal=diagonal)


def points(element: ElementTree.Element, kind: str) -> list[list[tuple[float, float]]]:
    """The points of every path of this class, in the order of drawing."""
    found = []
    for path in element.iter(f"{SVG}path"):
        if kind in path.get("class", "").split():
            pairs = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.get("d", ""))
            found.append([(float(a), float(b)) for a, b in pairs])
    return found


def labels(axis: Axis, values: list[float]) -> list[str]:
    return [label for _, label in scale(axis, values, 0, 100).ticks]


@pytest.mark.parametrize(
    ("axis", "values", "wanted"),
    [
        (Axis(label=""), [0, 1], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (Axis(label=""), [0, 18], ["0", "5", "10", "15", "20"]),
        (Axis(label=""), [1, 3], ["1", "2", "3"]),
        (Axis(label=""), [-0.31, 0.4], ["−0.4", "−0.2", "0.0", "0.2", "0.4"]),
        (Axis(label=""), [3.0, 3.0], ["1", "2", "3", "4", "5"]),
        (Axis(label=""), [0, 12_000], ["0", "5,000", "10,000", "15,000"]),
        (Axis(label=""), [], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (Axis(label="", low=0.25, high=0.5), [0.1, 0.9], ["0.25", "0.30", "0.35", "0.40", "0.45", "0.50"]),
        (Axis(label="", log=True), [0.002, 0.9], ["0.001", "0.01", "0.1", "1"]),
        (Axis(label="", log=True), [1, 8], ["1", "2", "5", "10"]),
        (Axis(label="", log=True), [0.0, 1e-9, 1.0], ["10⁻⁸", "10⁻⁶", "0.0001", "0.01", "1"]),
        (Axis(label="", log=True, low=0.0005, high=1), [], ["0.001", "0.01", "0.1", "1"]),
        (Axis(label="", log=True), [-1.0, 0.0], ["0.001", "0.01", "0.1", "1"]),
    ],
)
def test_ticks_are_where_a_person_would_put_them(axis: Axis, values: list[float], wanted: list[str]) -> None:
    assert labels(axis, values) == wanted


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (0, "0"),
        (0.05, "0.05"),
        (7.99941, "7.999"),
        (-3.2, "−3.2"),
        (1234.5, "1,234"),
        (999.96, "1000"),
        (1e-5, "10⁻⁵"),
        (2.5e-7, "2.5×10⁻⁷"),
        (-2e9, "−2×10⁹"),
        (1e300, "10³⁰⁰"),
    ],
)
def test_numbers_are_written_as_a_person_writes_them(value: float, wanted: str) -> None:
    assert number(value) == wanted


@given(st.booleans(), limits, limits, st.lists(finite, max_size=6))
def test_every_axis_spans_something_and_has_its_ticks_within(
    log: bool, low: float | None, high: float | None, values: list[float]
) -> None:
    made = scale(Axis(label="", log=log, low=low, high=high), values, 40, 386)
    assert made.low < made.high
    places = [made.at(value) for value, _ in made.ticks]
    assert places == sorted(places) and 1 <= len(places) <= 12
    assert all(40 <= place <= 386 for place in places)
    assert all(40 <= made.at(value) <= 386 for value in values)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.booleans())
def test_values_and_places_are_each_others_inverse(one: float, other: float, log: bool) -> None:
    made = scale(Axis(label="", log=log), [one, other], 300, 20)
    for value in (one, other):
        assert made.value(made.at(value)) == pytest.approx(value, rel=1e-6, abs=1e-9)


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.tuples(finite, finite), max_size=5), max_size=4),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["line", "steps", "points"]),
    st.lists(finite, max_size=3),
    st.text(max_size=80),
)
def test_whatever_is_drawn_stays_in_its_box(
    curves: list[list[tuple[float, float]]], log_x: bool, log_y: bool, style: str, marks: list[float], words: str
) -> None:
    series = [
        Series.model_validate(
            {
                "label": words,
                "x": [a for a, _ in one],
                "y": [b for _, b in one],
                "low": [b for _, b in one],
                "high": [b for _, b in one],
                "style": style,
            }
        )
        for one in curves
    ]
    made = plot(
        *series,
        x=Axis(label=words, log=log_x),
        y=Axis(label=words, log=log_y),
        marks=tuple(Mark(label="m", y=value) for value in marks),
        diagonal=True,
    )
    element = drawn(svg.plot(made, "p"))
    (box,) = element.iter(f"{SVG}rect")
    left, top, width, height = (float(box.get(name, "")) for name in ("x", "y", "width", "height"))
    assert width > 150 and height > 150
    for kind in ("line", "marker", "band", "chance"):
        for path in points(element, kind):
            for a, b in path:
                assert left - 0.1 <= a <= left + width + 0.1 and top - 0.1 <= b <= top + height + 0.1
    assert all(
        math.isfinite(float(text.get("x", "")) + float(text.get("y", ""))) for text in element.iter(f"{SVG}text")
    )


def test_a_line_goes_through_its_points_in_order() -> None:
    element = drawn(svg.plot(plot(Series(label="a", x=(0, 1, 2), y=(0, 4, 2))), "p"))
    ((a, b, c),) = points(element, "line")
    assert a[0] < b[0] < c[0] and b[1] < c[1] < a[1]  # up is where y is small
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.2) and a[1] - c[1] == pytest.approx(c[1] - b[1], abs=0.2)
    assert len(points(element, "marker")) == 3


def test_steps_hold_their_height_until_the_next_point() -> None:
    element = drawn(svg.plot(plot(Series(label="roc", x=(0, 0.5, 1), y=(0, 0.7, 1), style="steps")), "p"))
    (path,) = points(element, "line")
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in itertools.pairwise(path))
    assert path[1][1] == path[0][1] and path[2][0] == path[1][0]  # across first, then up
    assert not points(element, "marker")


def test_zero_on_a_logarithmic_axis_is_at_its_edge() -> None:
    log = Axis(label="", log=True, low=0.001, high=1)
    element = drawn(svg.plot(plot(Series(label="", x=(0.0, 0.001, 1), y=(0.0, 0.1, 1)), x=log, y=log), "p"))
    (path,) = points(element, "line")
    assert path[0][0] == path[1][0] and path[0][1] > path[1][1]


def test_an_interval_is_a_band_or_a_whisker() -> None:
    one = Series(label="a", x=(0.0, 1.0), y=(1.0, 2.0), low=(0.5, 1.5), high=(1.5, 2.5))
    lines = drawn(svg.plot(plot(one), "p"))
    ((a, b, c, d),) = points(lines, "band")
    assert a[0] == d[0] and b[0] == c[0] and a[1] > d[1] and b[1] > c[1]
    dots = drawn(svg.plot(plot(one.model_copy(update={"style": "points"})), "p"))
    assert len(points(dots, "whisker")[0]) == 2 and not points(dots, "band") and not points(dots, "line")


def test_the_diagonal_is_bent_where_the_axes_differ() -> None:
    x, straight = Axis(label="", log=True, low=0.01, high=1), Axis(label="", low=0, high=1)
    (bent,) = points(drawn(svg.plot(plot(x=x, y=straight, diagonal=True), "p")), "chance")
    middle = bent[len(bent) // 2]
    assert middle[1] > (bent[0][1] + bent[-1][1]) / 2 + 30  # y = 0.1 in the middle, not 0.5
    (even,) = points(drawn(svg.plot(plot(x=x, y=x, diagonal=True), "p")), "chance")
    assert even[len(even) // 2][1] == pytest.approx((even[0][1] + even[-1][1]) / 2, abs=0.2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_no_label_of_a_line_lies_on_another(values: list[float]) -> None:
    marks = tuple(Mark(label=f"mark {n}", y=value) for n, value in enumerate(values))
    element = drawn(svg.plot(plot(y=Axis(label="", low=0, high=1), marks=marks), "p"))
    placed = [float(one.get("y", "")) for one in element.iter(f"{SVG}text") if one.get("class") == "label"]
    assert len(placed) == len(values) and len(points(element, "mark")) == len(values)
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(sorted(placed)))
    assert all(0 < one < svg.HEIGHT for one in placed)


@settings(max_examples=50)
@given(st.lists(finite, min_size=2, max_size=5))
def test_no_tick_label_lies_on_another(values: list[float]) -> None:
    for log in (False, True):
        element = drawn(
            svg.plot(plot(Series(label="", x=tuple(values), y=tuple(values)), x=Axis(label="", log=log)), "p")
        )
        ticks = [one for one in element.iter(f"{SVG}text") if one.get("class") == "tick"]
        across = [(float(one.get("x", "")), len(one.text or "")) for one in ticks if one.get("text-anchor") == "middle"]
        assert across
        for (a, wide), (b, wider) in itertools.pairwise(across):
            assert b - a >= 6 * (wide + wider) / 2
        assert all(
            float(one.get("x", "")) - 7 * len(one.text or "") >= 0 for one in ticks if one.get("text-anchor") == "end"
        )


def test_series_differ_in_more_than_colour() -> None:
    series = [Series(label=str(n), x=(0, 1), y=(n, n + 1)) for n in range(6)]
    element = drawn(svg.plot(plot(*series), "p"))
    lines = [path for path in element.iter(f"{SVG}path") if path.get("class", "").startswith("line ")]
    assert len({path.get("stroke-dasharray") for path in lines}) == 6
    shapes = {
        path.get("d", "").partition("m")[2] for path in element.iter(f"{SVG}path") if "marker" in path.get("class", "")
    }
    assert len(shapes) == 6
    swatches = [svg.swatch(index) for index in range(18)]
    looks = [(re.findall(r'stroke-dasharray="[^"]*"', one), re.findall(r" c\d", one)) for one in swatches]
    assert all(looks.count(one) == 1 for one in looks)


def test_what_cannot_be_seen_is_said() -> None:
    series = Series(label="LiRA <b>", x=(0.001, 1), y=(0.02, 1))
    element = drawn(svg.plot(plot(series, marks=(Mark(label="chance", y=0.5),)), "name"))
    title, told = element.find(f"{SVG}title"), element.find(f"{SVG}desc")
    assert title is not None and told is not None and title.text == "a title"
    assert element.get("role") == "img" and element.get("aria-labelledby") == f"{title.get('id')} {told.get('id')}"
    assert told.text is not None and "LiRA <b>: from 0.02 at 0.001 to 1 at 1." in told.text
    assert "Line at 0.5: chance." in told.text


def widths(text: str, kind: str) -> list[float]:
    return [float(one.get("width", "")) for one in drawn(text).iter(f"{SVG}rect") if one.get("class") == kind]


def claim(text: str) -> list[float]:
    paths = [one.get("d", "") for one in drawn(text).iter(f"{SVG}path") if one.get("class") == "claim"]
    return [float(path[1:].split()[0]) - 4 for path in paths]


def test_bounds_are_as_long_as_they_are_large() -> None:
    rows = [svg.Bound("canaries", 2.0, 6.0, 8.0), svg.Bound("releases", 4.0, None, 8.0)]
    text = svg.bounds(rows, "bounds", "b")
    two, four = widths(text, "bar")
    (six,) = widths(text, "reach")
    assert four == pytest.approx(2 * two, abs=0.2) and six == pytest.approx(3 * two, abs=0.3)
    assert claim(text) == pytest.approx([4 * two] * 2, abs=0.5)
    assert "claimed: 8" in text and "at least 2, of at most 6 that it could show" in text


def test_a_claim_beyond_all_bounds_does_not_press_them_together() -> None:
    near, far = (svg.bounds([svg.Bound("canaries", 1.0, 3.0, claimed)], "t", "b") for claimed in (3.0, 3000.0))
    assert widths(near, "bar") == widths(far, "bar")
    assert "far beyond the right edge" in far and "far beyond" not in near and claim(far)[0] <= svg.WIDTH


def test_a_ceiling_beyond_all_else_does_not_press_bounds_together() -> None:
    short, long = (svg.bounds([svg.Bound("a", 2.0, ceiling, 6.0)], "t", "b") for ceiling in (6.0, 600.0))
    assert widths(short, "bar") == widths(long, "bar") and widths(long, "reach")[0] <= svg.WIDTH - 4
    assert "of at most 600" in long
    (alone,) = widths(svg.bounds([svg.Bound("a", 2.0, 600.0, None)], "t", "b"), "bar")
    assert alone < widths(short, "bar")[0] / 10  # without a claim, the ceiling is what it is beside


def test_claims_that_differ_stand_at_their_bounds() -> None:
    text = svg.bounds(
        [svg.Bound("one", 1.0, 3.0, 2.0), svg.Bound("two", 0.0, 3.0, 4.0), svg.Bound("three", 0, 0, None)], "t", "b"
    )
    assert "one (claimed: 2)" in text and "two (claimed: 4)" in text and len(claim(text)) == 2
    assert min(widths(text, "bar")) >= 2  # a bound of 0 is seen, too
