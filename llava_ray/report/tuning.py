"""The report of a tuning: what it learnt, how the loss fell, and a look at its answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llava_ray.report.pieces import (
    Fact,
    Gallery,
    LineChart,
    Links,
    Note,
    Picture,
    Report,
    Section,
    Series,
    Table,
    bar_chart,
)

SMOOTHING = 0.9


@dataclass(frozen=True)
class Curve:
    """One stage's loss, step by step."""

    stage: str
    losses: Sequence[float]


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy of the model beside the best guess without the image, for all questions or one kind."""

    name: str
    model: float
    blind: float
    num_questions: int


def tuning_report(
    title: str,
    accuracies: Sequence[Accuracy],
    curves: Sequence[Curve],
    pictures: Sequence[Picture],
    seconds: Mapping[str, float],
    links: Links,
) -> Report:
    """Lay out a tuning's report; the first accuracy is that over all questions."""
    total = accuracies[0]
    summary = (
        f"{total.model:.1%} of {total.num_questions:,} held-out questions answered right; "
        f"the most frequent answer to each question, given without looking, gets {total.blind:.1%}."
    )
    facts = [
        Fact("held-out accuracy", f"{total.model:.1%}", f"{total.num_questions:,} test questions"),
        Fact("blind baseline", f"{total.blind:.1%}", "most frequent answer, image unseen"),
        Fact("time", f"{sum(seconds.values()):.0f} s", "all stages"),
    ]
    rows = [(f"{a.name} ({a.num_questions:,})", a.model, a.blind) for a in accuracies]
    accuracy = bar_chart("Accuracy by kind of question", ("questions", "model"), rows, legend="blind baseline")
    times = Table(["stage", "seconds"], [[stage, round(value, 1)] for stage, value in seconds.items()])
    wrong = [] if total.model > total.blind else [Note("The model is no better than guessing blind.", warning=True)]
    return Report(
        title,
        summary,
        [
            Section("What it learnt", [accuracy, *wrong]),
            Section("Loss", [loss_chart(curve) for curve in curves]),
            Section("Test images", [Gallery(pictures)], "Questions the model never saw in training, drawn at random."),
            Section("Time", [times]),
            Section("Where things are", [links]),
        ],
        facts,
    )


def loss_chart(curve: Curve) -> LineChart:
    """Draw a stage's loss, the raw values faint behind a smoothed line."""
    steps = list(range(1, len(curve.losses) + 1))
    raw = Series("each step", steps, curve.losses, faint=True)
    return LineChart(curve.stage, [raw, Series("smoothed", steps, smoothed(curve.losses))], "step", "loss", log_y=True)


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average, without the pull towards 0 at its start."""
    averages, sum_of_values, sum_of_weights = [], 0.0, 0.0
    for value in values:
        sum_of_values = SMOOTHING * sum_of_values + value
        sum_of_weights = SMOOTHING * sum_of_weights + 1
        averages.append(sum_of_values / sum_of_weights)
    return averages
