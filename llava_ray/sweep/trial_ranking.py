"""Ranking of trials: the best, its comparison with the default, the Pareto front, saved steps. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from llava_ray.sweep.sampling import TrialSettings, settings_key
from llava_ray.sweep.trials import ACCURACY, LOSS, LOWER_IS_BETTER, Trial


@dataclass(frozen=True)
class TrialStatus:
    """A setting with its finished runs, one for each seed."""

    settings: TrialSettings
    trials: tuple[Trial, ...]
    loss: float
    accuracy: float | None
    seconds: float
    """Mean of a run."""

    def value(self, metric: str) -> float | None:
        """Return the mean over seeds of a metric."""
        return self.loss if metric == LOSS else self.accuracy


def rank_trials(trials: Sequence[Trial], metric: str) -> list[TrialStatus]:
    """Rank the settings whose runs all finished, best first; the other metric breaks ties."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(settings_key(trial.settings), []).append(trial)
    finished = [group for group in groups.values() if all(trial.state == "finished" for trial in group)]
    ranking = [_classify(group) for group in finished if all(trial.curve for trial in group)]
    other = ACCURACY if metric == LOSS else LOSS
    return sorted(ranking, key=lambda one: (sort_key(one.value(metric), metric), sort_key(one.value(other), other)))


def _classify(group: Sequence[Trial]) -> TrialStatus:
    """Compute the means over a setting's runs."""
    last = [trial.curve[-1] for trial in group]
    accuracies = [evaluation.held_out_accuracy for evaluation in last if evaluation.held_out_accuracy is not None]
    return TrialStatus(
        settings=group[0].settings,
        trials=tuple(group),
        loss=mean(evaluation.held_out_loss for evaluation in last),
        accuracy=mean(accuracies) if len(accuracies) == len(last) else None,
        seconds=mean(trial.seconds for trial in group),
    )


def sort_key(value: float | None, metric: str) -> float:
    """Return a key that sorts better values first, and unknown or NaN last."""
    if value is None or math.isnan(value):
        return math.inf
    return value if LOWER_IS_BETTER[metric] else -value


def pareto_front(ranking: Sequence[TrialStatus], metric: str) -> list[TrialStatus]:
    """Return the Pareto front of quality and cost, cheapest first."""

    def key(one: TrialStatus) -> tuple[float, float]:
        return sort_key(one.value(metric), metric), one.seconds

    def is_dominated(one: TrialStatus) -> bool:
        return any(
            key(other) != key(one) and all(a <= b for a, b in zip(key(other), key(one), strict=True))
            for other in ranking
        )

    return sorted((one for one in ranking if not is_dominated(one)), key=lambda one: one.seconds)


@dataclass(frozen=True)
class Comparison:
    """The best compared with the recipe's own settings, at the last common evaluation."""

    better: bool
    text: str


def compare_with_default(best: TrialStatus, trials: Sequence[Trial], default: TrialSettings, metric: str) -> Comparison:
    """Compare the best with the recipe's own settings."""
    own = [trial for trial in trials if settings_key(trial.settings) == settings_key(default)]
    if settings_key(best.settings) == settings_key(default):
        return Comparison(False, "The best settings are the recipe's own: nothing that was tried beats them.")
    evaluated = [trial for trial in own if trial.curve]
    if not evaluated:
        why = f"ended as {own[0].state}" if own else "was not tried"
        return Comparison(bool(own), f"The recipe's own setting {why}, so there is nothing to compare the best with.")
    trial = next((one for one in evaluated if one.state == "finished"), evaluated[0])
    step, winner = trial.steps, best.trials[0]
    mine, theirs = winner.evaluation_at(step), trial.evaluation_at(step)
    if mine is None or theirs is None:
        return Comparison(False, f"The recipe's own setting was last seen at step {step}, where the best was not.")
    keys = (metric, LOSS if metric == ACCURACY else ACCURACY)
    better = [sort_key(mine.value(key), key) for key in keys] < [sort_key(theirs.value(key), key) for key in keys]
    return Comparison(
        better,
        f"The best {'beats' if better else 'does not beat'} the recipe's own settings (trial {trial.number}, "
        f"{trial.state}) at step {step}: held-out loss {mine.held_out_loss:.4f} against {theirs.held_out_loss:.4f}"
        + (
            f", accuracy {mine.held_out_accuracy:.1%} against {theirs.held_out_accuracy:.1%}."
            if mine.held_out_accuracy is not None and theirs.held_out_accuracy is not None
            else "."
        ),
    )


def compute_saved_share(trials: Sequence[Trial], num_steps: int) -> float:
    """Compute the share of the steps of whole runs that stopped and failed trials did not take."""
    return 1 - sum(trial.steps for trial in trials) / (num_steps * len(trials)) if trials else 0.0


def find_common_step(trials: Sequence[Trial]) -> int | None:
    """Return the last step at which all evaluated trials were evaluated; None if there is none."""
    evaluated_steps = [{evaluation.step for evaluation in trial.curve} for trial in trials if trial.curve]
    return max(set.intersection(*evaluated_steps), default=None) if evaluated_steps else None
