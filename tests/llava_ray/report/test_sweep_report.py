"""A sweep's page: every trial as what it is, and charts that can be read without colours."""

import math
import re

from llava_ray.report.charts import WIDTHS, describe_chart, draw_chart
from llava_ray.report.pieces import Links, ParallelChart
from llava_ray.report.rendering import render_report
from llava_ray.report.sweep import (
    BAD,
    BEST_KIND,
    EARLY,
    WHOLE,
    SweepSummary,
    TrialRow,
    parallel_chart,
    scaled,
    sweep_report,
)


def row(number: int, kind: str, rate: float, losses: list[float], state: str = "done") -> TrialRow:
    settings = {"mm_projector_type": "linear" if number % 2 else "mlp2x_gelu", "learning_rate": rate}
    steps = [10 * i for i in range(1, len(losses) + 1)]
    return TrialRow(number, settings, 42, kind, state, steps, losses, [1 - loss for loss in losses], 12.0)  # type: ignore[arg-type]


ROWS = [
    row(1, WHOLE, 1e-3, [0.9, 0.5, 0.4]),
    row(2, BEST_KIND, 1e-2, [0.8, 0.4, 0.2]),
    row(3, EARLY, 3e-2, [0.95], "stopped early"),
    row(4, BAD, 1.0, [], "diverged: step 3: the loss is nan"),
]
SUMMARY = SweepSummary(
    title="Sweep small",
    summary="4 trials.",
    best="The best is trial 2.",
    beats_default=True,
    default="The best beats the recipe's own settings.",
    saved=0.5,
    num_steps=30,
    seconds=100.0,
    importance={"learning_rate": 0.8, "mm_projector_type": 0.1},
    advice=["Try lower learning rates."],
    pareto_front=[["trial 2", 0.2, "80.0%", 12], ["trial 1", 0.4, "60.0%", 10]],
)


def test_the_page_shows_each_trial_as_what_it_is():
    page = render_report(sweep_report(SUMMARY, ROWS, Links([])))
    for text in (
        "2 ★",
        "stopped early",
        "diverged: step 3: the loss is nan",
        "80.0%",
        "50%",
        "The best beats the recipe&#39;s own settings.",
        "Try lower learning rates.",
        "Settings and results",
        "30/30",
        "Learning curves",
        "Importance of settings",
        "Cost",
        "Pareto front of quality and cost",
    ):
        assert text in page
    assert "Attention" not in page


def test_a_best_that_does_not_beat_the_default_is_a_warning():
    summary = SweepSummary(**{**vars(SUMMARY), "beats_default": False, "default": "It does not beat it."})
    assert "Attention" in render_report(sweep_report(summary, ROWS, Links([])))


def test_a_sweep_in_which_all_failed_still_has_its_page():
    page = render_report(sweep_report(SUMMARY, [row(1, BAD, 1.0, [], "failed: DataError: no")], Links([])))
    assert "failed: DataError: no" in page


def test_parallel_coordinates_take_the_pages_colours_and_say_themselves_in_words():
    chart = parallel_chart([row for row in ROWS if row.steps])
    assert isinstance(chart, ParallelChart)
    for width in WIDTHS.values():
        svg = draw_chart(chart, width)
        assert "var(--series-1)" in svg
        assert ">learning_rate</text>" in svg
        assert not re.findall(r"#0[0-9]fe0[0-9]", svg)
    assert "The best is trial 2: mm_projector_type mlp2x_gelu, learning_rate 0.01." in describe_chart(chart)


def test_axes_are_logarithmic_where_numbers_span_powers_of_ten():
    axis, heights = scaled("learning_rate", [1e-4, 1e-3, 1e-2, None])
    assert heights[:3] == [0.0, 0.5, 1.0] or all(map(math.isclose, heights[:3], (0.0, 0.5, 1.0)))
    assert heights[3] is None
    assert [label for _, label in axis.ticks] == ["0.0001", "0.001", "0.01"]
    names, places = scaled("kind", ["b", "a", "b"])
    assert places == [0.75, 0.25, 0.75]
    assert [label for _, label in names.ticks] == ["a", "b"]
    assert scaled("same", [2.0, 2.0])[1] == [0.5, 0.5]
