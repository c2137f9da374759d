"""Successive halving in rounds: all trials run to the same step, and the best of them continue. Pure.

Ray's own ASHA decides as each trial reports, which keeps a large cluster busy; where few run at a time, most trials
are the best so far when they report, and continue for that reason alone. Its HyperBand pauses trials, and a paused run
would have to be killed and restarted. Here a run ends by itself at the step where it is compared.

Source: Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (2016).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from llava_ray.config.space import SearchConfig
from llava_ray.sweep.sampling import settings_key
from llava_ray.sweep.trial_ranking import sort_key
from llava_ray.sweep.trials import ENDED, Trial


@dataclass(frozen=True)
class Round:
    """A round: all remaining trials run up to the step ``until``, after which ``share`` of all settings continue."""

    until: int
    share: float


def plan_rounds(search: SearchConfig, num_steps: int, grace_steps: int) -> list[Round]:
    """Return the rounds of a sweep; one where trials are not compared by rounds."""
    rounds: list[Round] = []
    factor = search.reduction_factor
    while search.scheduler == "halving":
        until = round(grace_steps * factor ** len(rounds))
        if until >= num_steps:
            break
        rounds.append(Round(until, factor ** -(len(rounds) + 1)))
    return [*rounds, Round(num_steps, 1.0)]


def is_round_complete(trials: Sequence[Trial], until: int, num_trials: int) -> bool:
    """Return whether all of a sweep's trials have started, and have ended or reached ``until``."""
    complete = [
        trial.state in ENDED or trial.steps > until or (trial.state == "waiting" and trial.steps == until)
        for trial in trials
    ]
    return len(trials) >= num_trials and all(complete)


def find_eliminated(trials: Sequence[Trial], this: Round, metric: str) -> list[Trial]:
    """Return the trials that are eliminated after a round: settings compete by the mean over their seeds.

    Failed trials count among all settings, so that no more continue because of them; the result is the same when some
    have been eliminated already.
    """
    settings = {settings_key(trial.settings) for trial in trials}
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.state not in ENDED:
            groups.setdefault(settings_key(trial.settings), []).append(trial)

    def sort_key_of(group: Sequence[Trial]) -> float:
        evaluations = [trial.evaluation_at(this.until) for trial in group]
        return mean(sort_key(evaluation.value(metric) if evaluation else None, metric) for evaluation in evaluations)

    ranked = sorted(groups.values(), key=sort_key_of)
    return [trial for group in ranked[max(1, int(this.share * len(settings) + 1e-9)) :] for trial in group]
