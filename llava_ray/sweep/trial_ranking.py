"""Which trials are good: ranking, the best, what it beats, what stopping early has saved. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from llava_ray.sweep.sampling import TrialSettings, settings_key
from llava_ray.sweep.trials import ACCURACY, LOSS, LOWER_IS_BETTER, Trial


@dataclass(frozen=True)
class TrialStatus:
    """One setting with its runs that came to their end, one for each seed."""

    settings: TrialSettings
    trials: tuple[Trial, ...]
    loss: float
    accuracy: float | None
    seconds: float
    """Mean of a run."""

    def value(self, metric: str) -> float | None:
        """Return the mean over seeds of one of the two."""
        return self.loss if metric == LOSS else self.accuracy


def rank_trials(trials: Sequence[Trial], metric: str) -> list[TrialStatus]:
    """Return the settings whose runs all came to their end, best first; the other number decides between equals."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(settings_key(trial.settings), []).append(trial)
    whole = [group for group in groups.values() if all(trial.state == "finished" for trial in group)]
    standings = [_classify(group) for group in whole if all(trial.curve for trial in group)]
    other = ACCURACY if metric == LOSS else LOSS
    return sorted(standings, key=lambda one: (sort_key(one.value(metric), metric), sort_key(one.value(other), other)))


def _classify(group: Sequence[Trial]) -> TrialStatus:
    """Take the mean over a setting's runs."""
    last = [trial.curve[-1] for trial in group]
    said = [look.held_out_accuracy for look in last if look.held_out_accuracy is not None]
    return TrialStatus(
        settings=group[0].settings,
        trials=tuple(group),
        loss=mean(look.held_out_loss for look in last),
        accuracy=mean(said) if len(said) == len(last) else None,
        seconds=mean(trial.seconds for trial in group),
    )


def sort_key(value: float | None, metric: str) -> float:
    """Return a number that is lower for what is better; what is unknown or not a number comes last."""
    if value is None or math.isnan(value):
        return math.inf
    return value if LOWER_IS_BETTER[metric] else -value


def pareto_front(standings: Sequence[TrialStatus], metric: str) -> list[TrialStatus]:
    """Return those that no other beats in both quality and cost (the Pareto front), cheapest first."""

    def key(one: TrialStatus) -> tuple[float, float]:
        return sort_key(one.value(metric), metric), one.seconds

    def beaten(one: TrialStatus) -> bool:
        return any(
            key(other) != key(one) and all(a <= b for a, b in zip(key(other), key(one), strict=True))
            for other in standings
        )

    return sorted((one for one in standings if not beaten(one)), key=lambda one: one.seconds)


@dataclass(frozen=True)
class Comparison:
    """The best beside the recipe's own settings, at the last step that both were seen at."""

    better: bool
    text: str


def compare_with_default(best: TrialStatus, trials: Sequence[Trial], default: TrialSettings, metric: str) -> Comparison:
    """Say whether the best beats the recipe's own settings."""
    own = [trial for trial in trials if settings_key(trial.settings) == settings_key(default)]
    if settings_key(best.settings) == settings_key(default):
        return Comparison(False, "The best settings are the recipe's own: nothing that was tried beats them.")
    seen = [trial for trial in own if trial.curve]
    if not seen:
        why = f"ended as {own[0].state}" if own else "was not tried"
        return Comparison(bool(own), f"The recipe's own setting {why}, so there is nothing to compare the best with.")
    trial = next((one for one in seen if one.state == "finished"), seen[0])
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
    """Return the share of the steps of whole runs that the stopped and failed ones did not take."""
    return 1 - sum(trial.steps for trial in trials) / (num_steps * len(trials)) if trials else 0.0


def find_common_step(trials: Sequence[Trial]) -> int | None:
    """Return the last step at which every trial that was ever seen was seen; None for none."""
    seen = [{look.step for look in trial.curve} for trial in trials if trial.curve]
    return max(set.intersection(*seen), default=None) if seen else None
