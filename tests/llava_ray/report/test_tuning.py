"""The tuning report: the numbers it is given, in words, bars and curves."""

import math

import pytest

from llava_ray.report.pieces import Link, Links, Note
from llava_ray.report.rendering import render_report
from llava_ray.report.tuning import Accuracy, smoothed, tuning_report


def make(model: float):
    accuracies = [Accuracy("all", model, 0.718, 1000), Accuracy("colour", 0.99, 0.2, 125)]
    by_position = [Accuracy("first", 0.97, 0.6, 334), Accuracy("second", 0.961, 0.6, 333)]
    losses = {"alignment": [3.0, 2.0], "instruction tuning": [1.0]}
    return tuning_report(
        "Title", accuracies, by_position, losses, [], {"align": 30.0, "tune": 12.5}, Links([Link("here", "model/")])
    )


def test_numbers_stand_in_summary_and_page():
    report = make(0.93)
    assert "93.0% of 1,000 held-out questions" in report.summary
    assert "71.8%" in report.summary
    page = render_report(report)
    assert "colour (125)" in page
    assert "second (333)" in page
    assert "96.1%" in page
    assert "42 s" in page


def test_a_model_no_better_than_blind_is_said_to_be():
    def notes(report):
        return [piece for piece in report.sections[0].pieces if isinstance(piece, Note)]

    assert not notes(make(0.93))
    assert notes(make(0.7))[0].warning


def test_smoothing_starts_at_the_first_value_and_follows_slowly():
    assert smoothed([2.0, 2.0]) == pytest.approx([2.0, 2.0])
    assert smoothed([1.0, 0.0])[1] == pytest.approx(0.9 / 1.9)
    skipped = smoothed([math.nan, 1.0, math.nan, math.inf, 0.0])
    assert math.isnan(skipped[0])
    assert skipped[1:] == pytest.approx([1.0, 1.0, 1.0, 0.9 / 1.9])


def test_a_logarithmic_axis_is_labelled_in_plain_numbers():
    page = render_report(make(0.93))
    assert "mathdefault" not in page
