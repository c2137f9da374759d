"""Tune's search algorithms: our own list of settings, or Optuna."""

from collections.abc import Sequence
from typing import Any

from ray import tune
from ray.tune.search import Repeater, Searcher
from ray.tune.search.optuna import OptunaSearch  # imports without optuna

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.space import SearchConfig, Space
from llava_ray.errors import ConfigError
from llava_ray.sweep.sampling import Suggest, default_settings, is_inside, list_settings
from llava_ray.sweep.trial import TRIAL_KEY
from llava_ray.sweep.trials import LOWER_IS_BETTER, Trial

_SECONDS = "time_total_s"  # Tune's own metric: the cost of a trial


class ReplayingOptuna(OptunaSearch):
    """Optuna's search, which ignores reports without a metric (of a trial's end)."""

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Delegate reports with a metric."""
        if isinstance(self.metric, list) or self.metric in result:
            super().on_trial_result(trial_id, result)


def list_trial_arguments(space: Space, search: SearchConfig, base: FinetuneConfig) -> list[dict[str, Any]]:
    """Return the arguments of each trial of a grid or random search, all seeds of a setting together."""
    return [
        {"settings": settings, "seed": base.train.seed + offset}
        for settings in list_settings(space, search, base)
        for offset in range(search.num_seeds)
    ]


def build_search(space: Space, search: SearchConfig, base: FinetuneConfig) -> dict[str, Any]:
    """Build the arguments of ``Tuner`` and ``TuneConfig`` that determine the settings."""
    if search.method != "optuna":
        return {
            "param_space": {TRIAL_KEY: tune.grid_search(list_trial_arguments(space, search, base))},
            "num_samples": 1,
        }
    searcher = build_optuna(space, search, base)
    if search.num_seeds > 1:
        searcher = Repeater(searcher, repeat=search.num_seeds)
    return {"param_space": {}, "search_alg": searcher, "num_samples": search.num_trials * search.num_seeds}


def build_round_search(trials: Sequence[Trial]) -> dict[str, Any]:
    """Build the same arguments for another round of trials."""
    arguments = [{"settings": trial.settings, "seed": trial.seed, "id": trial.id} for trial in trials]
    return {"param_space": {TRIAL_KEY: tune.grid_search(arguments)}, "num_samples": 1}


def check_optuna() -> None:
    """Check that Optuna is installed. Raises ConfigError."""
    try:
        import optuna  # noqa: F401  (only whether it is installed)
    except ImportError as error:
        raise ConfigError(
            "sweep.method = 'optuna' needs optuna, which is not installed; pip install 'llava_ray[sweep]'"
        ) from error


def build_optuna(space: Space, search: SearchConfig, base: FinetuneConfig) -> Searcher:
    """Build Optuna's TPE over the space. Raises ConfigError if it is not installed."""
    check_optuna()
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)

    mode = "min" if LOWER_IS_BETTER[search.metric] else "max"
    own = _enqueued(space, base) if search.include_default else None
    return ReplayingOptuna(
        Suggest(space),
        metric=[search.metric, _SECONDS] if search.weigh_cost else search.metric,
        mode=[mode, "min"] if search.weigh_cost else mode,
        points_to_evaluate=own,
        seed=search.search_seed,
    )


def _enqueued(space: Space, base: FinetuneConfig) -> list[dict[str, Any]] | None:
    """Return the recipe's own settings in Optuna's form, to try them first; None outside the space."""
    own = default_settings(space, base)
    if not is_inside(space, own):
        return None
    return [{key: repr(value) if space.dimensions[key].choice is not None else value for key, value in own.items()}]
