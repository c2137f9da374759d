"""Successive halving in rounds: all trials run to the same step, and the best of them go on. Pure.

Ray's own ASHA decides as each trial arrives, which keeps a large cluster busy; where few run at a time, most trials
are the best so far when they come and go on for that alone. Its HyperBand pauses trials, and a paused run would have
to be killed and started again at the same moment. Here a run ends by itself at the step where it is compared.

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
    """All trials that are left run up to the step ``until``; ``share`` of all settings go on after it."""

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
    """Tell whether all of a sweep's trials have been started and have ended, or come to ``until`` and beyond."""
    there = [
        trial.state in ENDED or trial.steps > until or (trial.state == "waiting" and trial.steps == until)
        for trial in trials
    ]
    return len(trials) >= num_trials and all(there)


def find_eliminated(trials: Sequence[Trial], this: Round, metric: str) -> list[Trial]:
    """Return the trials that do not go on after a round: a setting goes on with all its seeds, by their mean.

    Those that failed on the way count among all settings, so that more do not go on because of them; the same is
    returned when some have been told already.
    """
    settings = {settings_key(trial.settings) for trial in trials}
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.state not in ENDED:
            groups.setdefault(settings_key(trial.settings), []).append(trial)

    def standing(group: Sequence[Trial]) -> float:
        looks = [trial.evaluation_at(this.until) for trial in group]
        return mean(sort_key(look.value(metric) if look else None, metric) for look in looks)

    ranked = sorted(groups.values(), key=standing)
    return [trial for group in ranked[max(1, int(this.share * len(settings) + 1e-9)) :] for trial in group]
