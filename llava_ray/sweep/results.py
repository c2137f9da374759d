"""A sweep's results as plain values: for ``report.json``, the page, MLflow and the terminal. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llava_ray.config.space import Space, SweepConfig
from llava_ray.sweep.advice import advise
from llava_ray.sweep.importance import compute_importance
from llava_ray.sweep.sampling import default_settings
from llava_ray.sweep.trial_ranking import (
    Comparison,
    TrialStatus,
    compare_with_default,
    compute_saved_share,
    pareto_front,
    rank_trials,
)
from llava_ray.sweep.trials import Trial


@dataclass(frozen=True)
class Results:
    """The results of a sweep."""

    trials: Sequence[Trial]
    ranking: Sequence[TrialStatus]
    """Settings whose trials finished, best first."""
    default: Comparison | None
    saved: float
    """Share of the steps of whole runs that were saved."""
    importance: dict[str, float]
    advice: Sequence[str]
    pareto_front: Sequence[TrialStatus]
    num_steps: int

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``report.json``."""
        best = self.ranking[0] if self.ranking else None
        return {
            "num_trials": len(self.trials),
            "states": {state: sum(t.state == state for t in self.trials) for state in sorted(_states(self.trials))},
            "best": None if best is None else _status_to_dict(best),
            "beats_default": None if self.default is None else self.default.better,
            "default": "" if self.default is None else self.default.text,
            "num_steps": self.num_steps,
            "steps_saved": round(self.saved, 4),
            "importance": {key: round(value, 4) for key, value in self.importance.items()},
            "unbeaten": [_status_to_dict(one) for one in self.pareto_front],
            "next": list(self.advice),
            "trials": [trial.to_dict() for trial in self.trials],
        }


def _states(trials: Sequence[Trial]) -> set[str]:
    return {trial.state for trial in trials}


def _status_to_dict(status: TrialStatus) -> dict[str, Any]:
    """Return the fields of a setting's status."""
    return {
        "trials": [trial.number for trial in status.trials],
        "id": status.trials[0].id,
        "settings": status.settings,
        "held_out_loss": status.loss,
        "held_out_accuracy": status.accuracy,
        "seconds": status.seconds,
    }


def summarize_trials(config: SweepConfig, space: Space, trials: Sequence[Trial], num_steps: int) -> Results:
    """Compute the results of a sweep."""
    ranking = rank_trials(trials, config.sweep.metric)
    own = default_settings(space, config.base)
    shares = compute_importance(trials, space)
    return Results(
        trials=trials,
        ranking=ranking,
        default=compare_with_default(ranking[0], trials, own, config.sweep.metric) if ranking else None,
        saved=compute_saved_share(trials, num_steps),
        importance=shares,
        advice=advise(trials, ranking, space, config.sweep, shares, config.held_out.num_answers),
        pareto_front=pareto_front(ranking, config.sweep.metric),
        num_steps=num_steps,
    )
