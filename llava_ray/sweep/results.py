"""A sweep's results as plain values: for ``report.json``, the page, MLflow and the terminal. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_ray.config.space import Space, SweepConfig
from llava_ray.sweep.advice import advise
from llava_ray.sweep.importance import compute_importance
from llava_ray.sweep.sampling import default_settings
from llava_ray.sweep.trial_ranking import Comparison, TrialStatus, compare_with_default, pareto_front, rank_trials, compute_saved_share
from llava_ray.sweep.trials import Trial


@dataclass(frozen=True)
class Results:
    """What came out."""

    trials: Sequence[Trial]
    ranking: Sequence[TrialStatus]
    """Settings that came to their end, best first."""
    default: Comparison | None
    saved: float
    """Share of the steps of whole runs that were not taken."""
    importance: dict[str, float]
    advice: Sequence[str]
    pareto_front: Sequence[TrialStatus]
    num_steps: int

    def to_dict(self) -> dict[str, Any]:
        """Return what ``report.json`` holds."""
        best = self.ranking[0] if self.ranking else None
        return {
            "num_trials": len(self.trials),
            "states": {state: sum(t.state == state for t in self.trials) for state in sorted(_states(self.trials))},
            "best": None if best is None else _describe_standing(best),
            "beats_default": None if self.default is None else self.default.better,
            "default": "" if self.default is None else self.default.text,
            "num_steps": self.num_steps,
            "steps_saved": round(self.saved, 4),
            "importance": {key: round(value, 4) for key, value in self.importance.items()},
            "unbeaten": [_describe_standing(one) for one in self.pareto_front],
            "next": list(self.advice),
            "trials": [trial.to_dict() for trial in self.trials],
        }


def _states(trials: Sequence[Trial]) -> set[str]:
    return {trial.state for trial in trials}


def _describe_standing(standing: TrialStatus) -> dict[str, Any]:
    """Return a setting's own line."""
    return {
        "trials": [trial.number for trial in standing.trials],
        "id": standing.trials[0].id,
        "settings": standing.settings,
        "held_out_loss": standing.loss,
        "held_out_accuracy": standing.accuracy,
        "seconds": standing.seconds,
    }


def summarize_trials(config: SweepConfig, space: Space, trials: Sequence[Trial], num_steps: int) -> Results:
    """Judge the trials of a sweep."""
    standings = rank_trials(trials, config.sweep.metric)
    own = default_settings(space, config.base)
    shares = compute_importance(trials, space)
    return Results(
        trials=trials,
        standings=standings,
        default=compare_with_default(standings[0], trials, own, config.sweep.metric) if standings else None,
        saved=compute_saved_share(trials, num_steps),
        importance=shares,
        advice=advise(trials, standings, space, config.sweep, shares, config.held_out.num_answers),
        pareto_front=pareto_front(standings, config.sweep.metric),
        num_steps=num_steps,
    )
