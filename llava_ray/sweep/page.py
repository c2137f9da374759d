"""The sweep's report from its results."""

from collections.abc import Sequence

from llava_ray.report.pieces import Link, Links, Report
from llava_ray.report.sweep import BAD, BEST_KIND, EARLY, WHOLE, SweepSummary, TrialKind, TrialRow, sweep_report
from llava_ray.sweep.results import Results
from llava_ray.sweep.table import describe_settings, describe_state, short_key
from llava_ray.sweep.trials import Trial


def build_sweep_page(name: str, results: Results, seconds: float) -> Report:
    """Build the report of a sweep."""
    best = results.ranking[0] if results.ranking else None
    winner = best.trials[0] if best else None
    states = [f"{sum(t.state == state for t in results.trials)} {state}" for state in _states(results.trials)]
    summary = SweepSummary(
        title=f"Sweep {name}",
        summary=f"{len(results.trials)} trials: {', '.join(states)}. {results.default.text if results.default else ''}",
        best=f"The best is trial {winner.number}: {describe_settings(winner.settings)}."
        if winner
        else "No trial finished.",
        beats_default=results.default.better if results.default else None,
        default=results.default.text if results.default else "",
        saved=results.saved,
        num_steps=results.num_steps,
        seconds=seconds,
        importance={short_key(key): share for key, share in results.importance.items()},
        advice=results.advice,
        pareto_front=[
            [
                f"trial {one.trials[0].number}",
                one.loss,
                None if one.accuracy is None else f"{one.accuracy:.1%}",
                round(one.seconds),
            ]
            for one in results.pareto_front
        ],
    )
    links = [Link("report.json", "report.json"), Link("all trials", "trials.json")]
    if winner is not None:
        links += [Link("the best model, a bundle", "best/model/llava.json"), Link("its recipe", "best.toml")]
    return sweep_report(summary, [_make_trial_row(trial, winner) for trial in results.trials], Links(links))


def _make_trial_row(trial: Trial, winner: Trial | None) -> TrialRow:
    """Return a trial's row of the report."""
    accuracies = [
        evaluation.held_out_accuracy for evaluation in trial.curve if evaluation.held_out_accuracy is not None
    ]
    return TrialRow(
        number=trial.number,
        settings={short_key(key): _plain_value(value) for key, value in trial.settings.items()},
        seed=trial.seed,
        kind=_kind_of(trial, winner),
        state=describe_state(trial),
        steps=[evaluation.step for evaluation in trial.curve],
        losses=[evaluation.held_out_loss for evaluation in trial.curve],
        accuracies=accuracies if len(accuracies) == len(trial.curve) else [],
        seconds=trial.seconds,
    )


def _kind_of(trial: Trial, winner: Trial | None) -> TrialKind:
    """Return the kind of a trial in the report."""
    if winner is not None and trial.id == winner.id:
        return BEST_KIND
    if trial.state == "finished":
        return WHOLE
    return EARLY if trial.state == "stopped" else BAD


def _plain_value(value: object) -> str | float:
    """Return a setting as a number or text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _states(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(trial.state for trial in trials))
