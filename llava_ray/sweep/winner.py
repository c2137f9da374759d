"""Export of a sweep's best model: its bundle, and a recipe for fine-tuning."""

from pathlib import Path

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.space import SweepConfig
from llava_ray.config.sweep_recipes import as_toml
from llava_ray.data.storage import write_stored
from llava_ray.images.reading import open_filesystem
from llava_ray.model.formats.manifest import read_manifest, write_manifest
from llava_ray.sweep.table import describe_settings
from llava_ray.sweep.trial import build_trial_config
from llava_ray.sweep.trial_ranking import TrialStatus
from llava_ray.sweep.trials import Trial


def export_best_model(config: SweepConfig, common: FinetuneConfig, best: TrialStatus, folder: str) -> None:
    """Write ``best/model`` and ``best.toml`` of the best setting's first seed."""
    trial = best.trials[0]
    filesystem, place = open_filesystem(folder)
    if filesystem.exists(f"{place}/best"):
        filesystem.rm(f"{place}/best", recursive=True)
    filesystem.makedirs(f"{place}/best")
    filesystem.copy(f"{place}/trials/{trial.id}/model", f"{place}/best/model", recursive=True)
    if "://" not in folder:  # a local bundle refers to its parts by paths relative to its own folder
        best_model = Path(place, "best/model")
        write_manifest(best_model, read_manifest(Path(place, "trials", trial.id, "model")), best_model)
    write_stored(f"{folder}/best.toml", _winning_recipe(config, common, trial).encode())


def _winning_recipe(config: SweepConfig, common: FinetuneConfig, trial: Trial) -> str:
    """Build the recipe of a trial's run, with the sweep's own storage and tracking settings."""
    run = build_trial_config(common, {"trial": {"settings": trial.settings, "seed": trial.seed}}, trial.id)
    own = {
        "run": config.run.model_dump() | {"name": None, "restart": False},
        "tracking": config.tracking.model_dump(),
    }
    comment = (
        f"Trial {trial.number} of the sweep {config.run.name}: {describe_settings(trial.settings)}, seed {trial.seed}."
    )
    return as_toml(FinetuneConfig.parsed(run.model_dump() | own), comment)
