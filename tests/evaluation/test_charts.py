"""Axes must hold their data and read well; curves must break where a value is missing."""

from __future__ import annotations

from math import nan

import pytest

from refreward_trl.evaluation.charts import Axis, DotPlot, DotRow, Line, LineChart, Mark, signed_minus


@pytest.mark.parametrize(
    "values",
    [(0, 1), (-3.2, 7.9), (0.00012, 0.00019), (1e4, 3e4), (5, 5), (-2, -2), (0.1, 0.1000001), (nan, 2, 3), (nan,), ()],
)
def test_axis_holds_all_values_and_has_a_few_even_ticks(values: tuple[float, ...]) -> None:
    axis = Axis.fitting(values)
    for value in values:
        if value == value:
            assert axis.low - 1e-9 <= value <= axis.high + 1e-9
    positions = [tick.position for tick in axis.ticks]
    assert 2 <= len(positions) <= 13
    assert positions[0] == pytest.approx(0)
    assert positions[-1] == pytest.approx(100)
    assert len({tick.text for tick in axis.ticks}) == len(positions)


def test_ticks_are_round_numbers() -> None:
    assert [tick.text for tick in Axis.fitting((-0.13, 0.31)).ticks] == [
        "\N{MINUS SIGN}0.2",
        "\N{MINUS SIGN}0.1",
        "0.0",
        "0.1",
        "0.2",
        "0.3",
        "0.4",
    ]
    assert [tick.text for tick in Axis.fitting((0, 200), ticks=4).ticks] == ["0", "50", "100", "150", "200"]


def test_minus_signs_and_negative_zero() -> None:
    assert signed_minus("-0.00") == "0.00"
    assert signed_minus("-1.50") == "\N{MINUS SIGN}1.50"
    assert signed_minus("1.50") == "1.50"


def test_curve_breaks_at_missing_values_and_runs_upwards() -> None:
    line = Line("reward", [0, 1, 2, 3, 4], [0.0, 1.0, nan, 2.0, 4.0])
    chart = LineChart("t", [line])
    assert chart.path(line) == "M0.00 100.00 L25.00 75.00 M75.00 50.00 L100.00 0.00"
    assert chart.dots(line).count("M") == 4


def test_points_keep_their_names_and_the_order_in_which_they_are_joined() -> None:
    line = Line("reward", [0, 2, -2, 1], [0.0, 4.0, 2.0, nan], names=["before", "after", "hacked", "broken"])
    other = Line("held-out", [0, 2], [0.0, 2.0], names=["before", "after"])
    chart = LineChart("t", [line, other, Line("plain", [0, 1], [0.0, 1.0])])
    assert chart.path(line) == "M50.00 100.00 L100.00 0.00 L0.00 50.00"
    named = [(50.0, 0.0, "before"), (100.0, 100.0, "after"), (0.0, 50.0, "hacked"), (100.0, 50.0, "after")]
    assert chart.captions == named


def test_a_chart_without_values_still_draws() -> None:
    line = Line("reward", [0, 1], [nan, nan])
    assert LineChart("t", [line]).path(line) == ""


def test_zero_is_on_the_axis_when_asked_for() -> None:
    line = Line("gain", [0, 1], [5.0, 6.0])
    assert LineChart("t", [line], zero=True).y_axis.low == 0.0
    assert LineChart("t", [line]).y_axis.low > 0.0


def test_dot_plot_axis_holds_intervals_and_the_reference() -> None:
    plot = DotPlot("t", ["gain"], [DotRow("a", [Mark(0, 0.4, "0.4", 0.1, 0.9)])], reference=0.0)
    assert plot.axis.low <= 0.0
    assert plot.axis.high >= 0.9
    assert not Mark(0, 0.4, "0.4").has_interval
