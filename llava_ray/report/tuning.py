"""The report of a fine-tuning: accuracy, loss curves and sample answers."""

import math
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

_SMOOTHING = 0.9


@dataclass(frozen=True)
class Accuracy:
    """Held-out accuracy of the model and of the blind baseline, for all questions or some."""

    name: str
    model: float
    blind: float
    num_questions: int


def tuning_report(
    title: str,
    accuracies: Sequence[Accuracy],
    by_position: Sequence[Accuracy],
    losses: Mapping[str, Sequence[float]],
    pictures: Sequence[Picture],
    seconds: Mapping[str, float],
    links: Links,
) -> Report:
    """Build a fine-tuning's report; the first accuracy is that of all questions, the others are by kind.

    ``by_position`` are the accuracies of the first, the second ... questions of conversations, ``losses`` are by stage
    and step.
    """
    total = accuracies[0]
    facts = [
        Fact("held-out accuracy", f"{total.model:.1%}", f"{total.num_questions:,} test questions"),
        Fact("blind baseline", f"{total.blind:.1%}", "most frequent answer, image unseen"),
        Fact("time", f"{sum(seconds.values()):.0f} s", "all stages"),
    ]
    charts = [
        _accuracy_chart("Accuracy by kind of question", accuracies),
        _accuracy_chart("Accuracy by place in the conversation", by_position),
    ]
    no_better = [] if total.model > total.blind else [Note("The model is no better than guessing blind.", warning=True)]
    times = Table(["stage", "seconds"], [[stage, round(value, 1)] for stage, value in seconds.items()])
    return Report(
        title,
        f"{total.model:.1%} of {total.num_questions:,} held-out questions answered right. Without the image, the most "
        f"frequent answer to each question gets {total.blind:.1%}.",
        [
            Section("Accuracy", [*charts, *no_better]),
            Section("Loss", [_loss_chart(stage, values) for stage, values in losses.items()]),
            Section(
                "Test images", [Gallery(pictures)], "Questions about images never seen in training, drawn at random."
            ),
            Section("Time", [times]),
            Section("Files", [links]),
        ],
        facts,
    )


def _accuracy_chart(title: str, accuracies: Sequence[Accuracy]) -> Table:
    """Draw accuracies beside those of the blind baseline."""
    rows = [(f"{a.name} ({a.num_questions:,})", a.model, a.blind) for a in accuracies]
    return bar_chart(title, ("questions", "model"), rows, legend="blind baseline")


def _loss_chart(stage: str, losses: Sequence[float]) -> LineChart:
    """Draw a stage's loss, the raw values faint behind a smoothed line."""
    steps = list(range(1, len(losses) + 1))
    raw = Series("each step", steps, losses, faint=True)
    return LineChart(stage, [raw, Series("smoothed", steps, smoothed(losses))], "step", "loss", log_y=True)


def smoothed(values: Sequence[float]) -> list[float]:
    """Compute the exponential moving average, corrected for the bias towards 0 at its start.

    A value that is not finite (of a skipped step) counts for nothing: the average stays as it was.
    """
    averages, sum_of_values, sum_of_weights = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            sum_of_values = _SMOOTHING * sum_of_values + value
            sum_of_weights = _SMOOTHING * sum_of_weights + 1
        averages.append(sum_of_values / sum_of_weights if sum_of_weights else math.nan)
    return averages
