"""Charts: a point lies where its value says, and every axis can be read."""

from __future__ import annotations

import math
import random
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from tools import charts
from tools.charts import Chart, _Axis, svg

NS = "{http://www.w3.org/2000/svg}"
LEFT, RIGHT = charts.LEFT, charts.WIDTH - charts.RIGHT  # edges of the plot [px]
TOP, BOTTOM = charts.TOP, charts.HEIGHT - charts.BOTTOM
NAN, INF = math.nan, math.inf


def parse(*drawn: Chart) -> list[ET.Element]:
    """The group of each chart in a document."""
    root = ET.fromstring(svg(list(drawn)))
    assert root.tag == f"{NS}svg"
    groups = root.findall(f"{NS}g")
    assert len(groups) == len(drawn)
    for group in groups:
        for element in group.iter():
            for name, value in element.attrib.items():
                assert not {"nan", "inf"} & set(value.replace(",", " ").split()), (name, value)
    return groups


def curves(group: ET.Element) -> list[np.ndarray]:
    """The pixels of each curve, shape (n, 2)."""
    lines = [line.get("points").split() for line in group.findall(f"{NS}polyline")]
    return [np.array([p.split(",") for p in line], float).reshape(-1, 2) for line in lines]


def texts(group: ET.Element) -> list[str]:
    return [text.text for text in group.findall(f"{NS}text")]


def position(group: ET.Element, text: str) -> tuple[float, float]:
    (found,) = [t for t in group.findall(f"{NS}text") if t.text == text]
    return float(found.get("x")), float(found.get("y"))


def x_ticks(group: ET.Element) -> dict[float, float]:
    """Pixel of each number written below the plot."""
    labels = [t for t in group.findall(f"{NS}text") if float(t.get("y")) == BOTTOM + 16]
    return {float(t.text): float(t.get("x")) for t in labels}


def y_ticks(group: ET.Element) -> dict[float, float]:
    """Pixel of each number written to the left of the plot."""
    labels = [t for t in group.findall(f"{NS}text") if t.get("text-anchor") == "end"]
    return {float(t.text): float(t.get("y")) - 4 for t in labels}


def chart_of(*points: tuple[float, float], **settings: object) -> Chart:
    return Chart("Title", "across", {"curve": list(points)}, **settings)


# --- Points -------------------------------------------------------------------------------------


def test_points_lie_in_proportion_to_their_values_and_higher_ones_higher():
    (group,) = parse(chart_of((0, 0), (1, 10), (2, 20), (10, 100)))
    (pixels,) = curves(group)
    shares = np.array([0, 0.1, 0.2, 1])
    np.testing.assert_allclose((pixels - pixels[0])[:, 0], shares * np.ptp(pixels[:, 0]), atol=0.11)
    np.testing.assert_allclose(
        (pixels - pixels[0])[:, 1], -shares * np.ptp(pixels[:, 1]), atol=0.11
    )
    # 4 % of the range is left free on every side.
    np.testing.assert_allclose(pixels[0, 0], LEFT + (RIGHT - LEFT) * 0.04 / 1.08, atol=0.06)
    np.testing.assert_allclose(pixels[-1, 0], RIGHT - (RIGHT - LEFT) * 0.04 / 1.08, atol=0.06)
    np.testing.assert_allclose(pixels[0, 1], BOTTOM - (BOTTOM - TOP) * 0.04 / 1.08, atol=0.06)
    np.testing.assert_allclose(pixels[-1, 1], TOP + (BOTTOM - TOP) * 0.04 / 1.08, atol=0.06)


def test_a_point_lies_at_the_numbers_written_beside_it():
    points = [(0, -5), (5, 5), (5, 15), (10, 0)]
    (group,) = parse(chart_of(*points))
    across, up = x_ticks(group), y_ticks(group)
    assert {0, 5, 10} <= set(across)
    assert {-5, 0, 5, 15} <= set(up)
    expected = [(across[x], up[y]) for x, y in points]
    np.testing.assert_allclose(curves(group)[0], expected, atol=0.11)


def test_a_logarithmic_axis_gives_every_decade_the_same_width():
    points = [(10.0**i, i) for i in range(-5, 1)]
    (group,) = parse(chart_of(*points, log_x=True))
    (pixels,) = curves(group)
    steps = np.diff(pixels[:, 0])
    np.testing.assert_allclose(steps, (RIGHT - LEFT) / 5 / 1.08, atol=0.11)
    across = x_ticks(group)
    np.testing.assert_allclose(pixels[:, 0], [across[x] for x, _ in points], atol=0.11)


def test_values_that_have_no_logarithm_lie_on_a_linear_axis():
    for first in (0, -1):
        (group,) = parse(chart_of((first, 0), (10, 1), log_x=True))
        (linear,) = parse(chart_of((first, 0), (10, 1)))
        np.testing.assert_array_equal(curves(group)[0], curves(linear)[0])


def test_points_that_are_not_finite_are_left_out():
    odd = [(1, NAN), (NAN, 1), (1, INF), (-INF, 1), (NAN, NAN)]
    whole = [(0, 0), (1, 2), (2, 1)]
    (found,) = parse(chart_of(whole[0], *odd[:3], whole[1], *odd[3:], whole[2]))
    (expected,) = parse(chart_of(*whole))
    assert ET.tostring(found) == ET.tostring(expected)


def test_lines_that_are_not_finite_are_left_out():
    points = [(0, 0), (1, 2)]
    for value in (NAN, INF, -INF):
        lines = {"odd": value}
        (found,) = parse(chart_of(*points, levels=lines, marks=lines))
        (expected,) = parse(chart_of(*points))
        assert ET.tostring(found) == ET.tostring(expected)


def test_a_single_point_is_a_dot_in_the_middle():
    for x, y in ((3, 0.3), (0, 0), (1e9, -1e9), (1e-9, 1e-9), (1e30, -1e30)):
        for log_x in (False, True):
            (group,) = parse(chart_of((x, y), log_x=log_x))
            (dot,) = group.findall(f"{NS}circle")
            expected = (LEFT + RIGHT) / 2, (TOP + BOTTOM) / 2
            assert (float(dot.get("cx")), float(dot.get("cy"))) == pytest.approx(expected, abs=0.1)
    (group,) = parse(chart_of((0, 0), (1, 1)))
    assert not group.findall(f"{NS}circle")


def test_a_constant_curve_is_level_in_the_middle():
    for y in (0, 1, -5, 1e-12, 1e12, 1e30, -1e100):
        (group,) = parse(chart_of((0, y), (1, y), (2, y)))
        np.testing.assert_allclose(curves(group)[0][:, 1], (TOP + BOTTOM) / 2, atol=0.06)


def test_curves_without_points_leave_an_empty_plot():
    for chart in (
        Chart("Title", "across", {}),
        chart_of(),
        chart_of((NAN, 1)),
        chart_of(log_x=True),
        Chart("Title", "across", {"a": [], "b": []}),
    ):
        (group,) = parse(chart)
        assert all(len(curve) == 0 for curve in curves(group))
        assert "Title" in texts(group)
        assert x_ticks(group)
        assert y_ticks(group)
    (group,) = parse(Chart("Title", "across", {"none": [], "some": [(0, 0), (1, 1)]}))
    assert [len(curve) for curve in curves(group)] == [0, 2]
    assert {"none", "some"} <= set(texts(group))


def test_everything_lies_inside_the_plot_and_several_curves_share_it():
    rng = np.random.default_rng(0)
    points = {name: list(map(tuple, rng.normal(size=(30, 2)) * 100)) for name in "abcdef"}
    (group,) = parse(Chart("Title", "across", points, {"level": 1e3}, {"mark": -1e3}))
    found = curves(group)
    assert len(found) == 6
    for name, pixels in zip(points, found, strict=True):
        assert ((pixels >= (LEFT, TOP)) & (pixels <= (RIGHT, BOTTOM))).all()
        order = np.argsort(np.array(points[name])[:, 0])
        assert (np.diff(pixels[order, 0]) >= 0).all()
    together = np.concatenate(found)
    assert together[:, 1].min() > TOP + 50, "the level is above all curves"
    assert together[:, 0].min() > LEFT + 50, "the mark is left of all curves"


def test_levels_and_marks_lie_at_their_values_and_are_named():
    (group,) = parse(chart_of((0, 0), (20, 20), levels={"bound": 5}, marks={"here": 15}))
    across, up = x_ticks(group), y_ticks(group)
    x, y = position(group, "here")[0] - 4, position(group, "bound")[1] - 4
    assert x == pytest.approx(across[15], abs=0.11)
    assert y == pytest.approx(up[5], abs=0.11)
    ends = [
        tuple(float(line.get(name)) for name in ("x1", "y1", "x2", "y2"))
        for line in group.findall(f"{NS}line")
        if line.get("stroke") == "#555"
    ]
    np.testing.assert_allclose(ends, [(LEFT, y, RIGHT, y), (x, BOTTOM, x, TOP)], atol=0.11)


def test_charts_stand_below_each_other():
    root = ET.fromstring(svg([chart_of((0, 0), (1, 1))] * 3))
    assert float(root.get("height")) == 3 * charts.HEIGHT
    moved = [group.get("transform") for group in root.findall(f"{NS}g")]
    assert moved == [f"translate(0 {i * charts.HEIGHT})" for i in range(3)]


def test_names_may_hold_what_xml_reserves():
    odd = ["<a&b>", 'it\'s "quoted"', "</svg>", "&lt;", "Ünï <3"]
    for name in odd:
        chart = Chart(name, name, {name: [(0, 0), (1, 1)]}, {name: 0.5}, {name: 0.5})
        (group,) = parse(chart)
        assert texts(group).count(name) == 5


# --- Ticks --------------------------------------------------------------------------------------


def is_round(value: float) -> bool:
    """Whether a number is a whole multiple of 1, 2 or 5 times a power of ten, of few digits."""
    digits = f"{abs(value):.10e}".split("e")[0].rstrip("0").replace(".", "")
    return len(digits) <= 6


def ranges() -> list[tuple[float, float]]:
    """Ordinary and less ordinary ranges: constant, huge, tiny, negative and mixed."""
    rng = random.Random(0)
    found = [(0, 0), (0, 1), (-1, 0), (5, 5), (-3, -3), (1e-15, 1e-15), (1e20, 1e20)]
    found += [(0, 10.0**i) for i in range(-100, 101)]
    found += [(-(10.0**i), 0) for i in range(-100, 101)]
    found += [(0, m * 10.0**i) for m in (1.001, 2, 4.9, 5, 5.1, 9.99) for i in range(-15, 16)]
    for _ in range(2000):
        scale = 10 ** rng.uniform(-20, 20)
        low = rng.uniform(-1, 1) * scale
        width = scale * 10 ** rng.uniform(-3, 1)
        found.append((low, low + width))
    return found


def test_ticks_are_round_numbers_evenly_spread_inside_the_range():
    for low, high in ranges():
        axis = _Axis([low, high], 0, 1000)
        ticks = axis.ticks()
        pixels = [axis(tick) for tick in ticks]
        assert 2 <= len(ticks) <= 7, (low, high, ticks)
        assert all(-1e-3 <= pixel <= 1000 + 1e-3 for pixel in pixels), (low, high, ticks)
        np.testing.assert_allclose(np.diff(pixels), pixels[1] - pixels[0], atol=0.01)
        assert all(map(is_round, ticks)), (low, high, ticks)
        step = f"{ticks[1] - ticks[0]:.6e}"
        assert step[0] in "125", (low, high, ticks)
        assert set(step[2:8]) == {"0"}, (low, high, ticks)


def test_ticks_on_a_logarithmic_axis_are_powers_of_ten_where_it_has_two():
    rng = random.Random(0)
    for _ in range(2000):
        low = 10 ** rng.uniform(-12, 6)
        high = low * 10 ** rng.uniform(0, 8)
        axis = _Axis([low, high], 0, 1000, log=True)
        ticks = axis.ticks()
        assert 2 <= len(ticks) <= 11, (low, high, ticks)
        assert all(-1e-3 <= axis(tick) <= 1000 + 1e-3 for tick in ticks), (low, high, ticks)
        assert all(map(is_round, ticks)), (low, high, ticks)
        if high >= 100 * low:
            np.testing.assert_allclose(np.log10(ticks), np.round(np.log10(ticks)), atol=1e-9)


def test_very_many_decades_get_few_ticks():
    axis = _Axis([1e-150, 1e150], 0, 1000, log=True)
    assert 2 <= len(axis.ticks()) <= 11


def test_curves_that_differ_by_rounding_only_are_drawn_as_constant():
    (group,) = parse(chart_of((0, 1e6), (1, math.nextafter(1e6, 2e6))))
    np.testing.assert_allclose(curves(group)[0][:, 1], (TOP + BOTTOM) / 2, atol=0.2)
    assert len(y_ticks(group)) >= 2


# --- Colours ------------------------------------------------------------------------------------


def test_colours_grow_brighter_with_the_level():
    values = np.linspace(0, 1, 256)
    pixels = charts.colours(values)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (256, 3)
    brightness = pixels @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) >= 0).all()
    assert brightness[0] < 10
    assert brightness[-1] > 220
    np.testing.assert_array_equal(pixels[[0, -1]], [charts.HEAT[0], charts.HEAT[-1]])


def test_every_pixel_is_coloured_in_its_place():
    values = np.random.default_rng(0).random((3, 4))
    pixels = charts.colours(values)
    assert pixels.shape == (3, 4, 3)
    np.testing.assert_array_equal(pixels[1, 2], charts.colours(values[1, 2]))
    np.testing.assert_array_equal(charts.colours(np.array(0.25)), charts.HEAT[1])


# --- Strips -------------------------------------------------------------------------------------


def circles(group: ET.Element) -> np.ndarray:
    """The centre of each circle, shape (n, 2)."""
    found = group.findall(f"{NS}circle")
    return np.array([(c.get("cx"), c.get("cy")) for c in found], float).reshape(-1, 2)


def bars(group: ET.Element) -> list[tuple[float, float]]:
    """Middle and height of each median [px]."""
    found = [line for line in group.findall(f"{NS}line") if line.get("stroke") == "#000"]
    return [((float(b.get("x1")) + float(b.get("x2"))) / 2, float(b.get("y1"))) for b in found]


def test_every_value_has_its_circle_at_its_height_above_the_name_of_its_strip():
    strips = {"one": [0.0, 10.0, 20.0], "another": [5.0, NAN, 15.0, -INF]}
    (group,) = parse(charts.Strips("Title", strips))
    up = y_ticks(group)
    expected = [0, 10, 20, 5, 15]
    np.testing.assert_allclose(circles(group)[:, 1], [up[y] for y in expected], atol=0.11)
    for i, name in enumerate(["one"] * 3 + ["another"] * 2):
        assert circles(group)[i, 0] == pytest.approx(position(group, name)[0], abs=0.11)


def test_the_median_is_a_black_bar_with_its_number():
    (group,) = parse(charts.Strips("Title", {"odd": [0.0, 5.0, 20.0], "even": [0.0, 10, 15, 20]}))
    up = y_ticks(group)
    (x1, y1), (x2, y2) = bars(group)
    assert (x1, x2) == pytest.approx(
        [position(group, name)[0] for name in ("odd", "even")], abs=0.1
    )
    assert y1 == pytest.approx(up[5], abs=0.11)
    assert y2 == pytest.approx((up[10] + up[15]) / 2, abs=0.11)
    assert {"5.00", "12.50"} <= set(texts(group))


def test_equal_values_lie_side_by_side_within_their_strip():
    (group,) = parse(charts.Strips("Title", {"a": [1.0] * 400 + [2.0], "b": [1.0, 1.0, 2.0]}))
    xs = circles(group)[:, 0]
    assert len(set(xs[:400])) > 300
    assert xs[:401].max() < xs[401:].min()


def test_a_strip_without_values_says_so():
    (group,) = parse(charts.Strips("Title", {"a": [1.0], "b": [NAN]}))
    assert "no scores" in texts(group)
    (group,) = parse(charts.Strips("Title", {}))
    assert texts(group)[0] == "Title"


def test_strips_need_no_colour():
    text = svg([charts.Strips("Title", {"a": [1.0, 2.0], "b": [3.0]})])
    for colour in re.findall("#[0-9a-f]{3,6}", text):
        assert len(set(colour[1:])) == 1  # a grey


def test_any_name_gives_a_well_formed_document():
    names = ["a\x01b", "\x1b[31m", "<&>", "\udcff", "é 音"]
    text = charts.svg([charts.Strips("x", {name: [1.0] for name in names})])
    shown = [node.text for node in ET.fromstring(text.encode()).iter() if node.text]
    assert {"<&>", "é 音", "a\ufffdb"} <= set(shown)
