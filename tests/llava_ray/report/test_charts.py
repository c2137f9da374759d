import re
import sys

import matplotlib as mpl
import pytest

from llava_ray.errors import ConfigError
from llava_ray.report.charts import SETTINGS, WIDTHS, check_plotting, describe_chart, draw_chart, list_lines
from llava_ray.report.pieces import Histogram, LineChart, Series

LOSSES = LineChart(
    "Loss",
    [
        Series("align", [0, 1, 2], [5.0, 3.0, 2.5], faint=True),
        Series("align", [0, 1, 2], [5.0, 4.0, 3.25]),
        Series("tune", [0, 1, 2], [2.0, 1.0, 0.5]),
    ],
    "step",
    "loss",
)
LENGTHS = Histogram("Lengths", [10, 20, 20, 300], "tokens", "samples", limit=256, limit_label="model_max_length")


@pytest.mark.parametrize("chart", [LOSSES, LENGTHS])
@pytest.mark.parametrize("width", WIDTHS.values())
def test_a_chart_takes_size_colours_and_letters_from_the_page(chart, width):
    svg = draw_chart(chart, width)
    assert svg.startswith(f'<svg viewBox="0 0 {width} 260"')
    assert svg.rstrip().endswith("</svg>")
    assert "width=" not in svg.split(">")[0]
    assert "var(--series-1)" in svg
    assert "var(--muted)" in svg
    assert not re.findall(r"#0[0-9]fe0[0-9]", svg)
    assert not re.findall(r"#(?!fff)[0-9a-f]{6}\b", svg)
    assert "<metadata" not in svg
    assert f">{chart.x_label}</text>" in svg


def test_lines_of_one_name_share_a_colour():
    svg = draw_chart(LOSSES, 720)
    assert svg.count("stroke: var(--series-1)") == 2
    assert svg.count("stroke: var(--series-2)") == 1
    assert "var(--series-3)" not in svg
    assert list_lines(LOSSES) == [("align", "var(--series-1)"), ("tune", "var(--series-2)")]


def test_names_inside_a_drawing_are_used_nowhere_else():
    first, second = draw_chart(LOSSES, 720), draw_chart(LENGTHS, 720)
    ids = [set(re.findall(r'id="([^"]+)"', svg)) for svg in (first, second)]
    assert not ids[0] & ids[1]
    for svg, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg)) <= own


def test_the_limit_is_drawn_and_named():
    assert ">model_max_length</text>" in draw_chart(LENGTHS, 720)
    assert "var(--series-2)" in draw_chart(LENGTHS, 720)


@pytest.mark.parametrize(
    "chart",
    [
        LineChart("Loss", [], "step", "loss"),
        LineChart("Loss", [Series("one", [3], [1.0])], "step", "loss", log_y=True),
        LineChart("Loss", [Series("gap", [0, 1, 2], [1.0, float("nan"), 2.0])], "step", "loss"),
        Histogram("Lengths", [], "tokens", "samples", limit=5),
        Histogram("Lengths", [7, 7], "tokens", "samples"),
        Histogram("Lengths", [float("nan"), 7], "tokens", "samples"),
    ],
)
def test_little_or_nothing_can_be_drawn(chart):
    assert draw_chart(chart, 340).startswith("<svg")
    assert describe_chart(chart).startswith(chart.title)


def test_charts_are_described_in_words():
    assert describe_chart(LOSSES) == "Loss: loss by step. align: from 5 to 3.25. tune: from 2 to 0.5."
    assert describe_chart(LENGTHS) == (
        "Lengths: 4 samples by tokens, from 10 to 300, median 20. model_max_length: 256."
    )


def test_nothing_global_changes():
    draw_chart(LOSSES, 340)
    assert {key: mpl.rcParams[key] for key in SETTINGS} == {key: mpl.rcParamsOrig[key] for key in SETTINGS}


def test_without_matplotlib_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'llava_ray\[report\]'"):
        check_plotting()
    with pytest.raises(ConfigError, match="matplotlib, which is not installed"):
        draw_chart(LOSSES, 340)
