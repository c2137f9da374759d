"""The report of a mixture: what was drawn of each source, and its curves."""

import math

from llava_ray.report.mixture import mixture_report, source_sections
from llava_ray.report.pieces import Link, Links
from llava_ray.report.rendering import render_report

ROWS = [
    {"loss": 3.0, "loss/a": 3.0, "loss/b": None, "loss_share/a": 3.0, "loss_share/b": 0.0},
    {"loss": 2.0, "loss/a": 1.0, "loss/b": 4.0, "loss_share/a": 0.5, "loss_share/b": 1.5, "held_out_loss/b": 4.5},
    {"loss": None, "loss/a": math.nan, "loss/b": 2.0, "loss_share/a": None, "loss_share/b": 1.0},
]


def test_each_source_has_its_lines_and_gaps_are_left_out():
    losses, held_out = source_sections(ROWS)
    first, shares = losses.pieces
    assert [(line.name, line.x) for line in first.series] == [("a", [1, 2]), ("b", [2, 3])]
    assert [line.x for line in shares.series] == [[1, 2], [1, 2, 3]]
    [chart] = held_out.pieces
    assert (chart.title, [(line.name, line.x, line.y) for line in chart.series]) == (
        "held out loss",
        [("b", [2], [4.5])],
    )


def test_the_page_says_what_was_drawn():
    page = render_report(mixture_report("run", ROWS, {"a": 30, "b": 10}, Links([Link("m", "metrics.jsonl")])))
    for text in ("75.0%", "25.0%", "Loss by source", "last loss", "2.0000"):
        assert text in page


def test_a_run_without_sources_has_no_such_sections():
    assert source_sections([{"loss": 1.0, "held_out_loss": 2.0}]) == []
