"""State shared by all trials of a sweep, prepared before the first one: paths, data, features, number of steps."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_ray.config.data import DataConfig
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.geometry import FEATURE_KEYS
from llava_ray.config.model import MODEL_PATHS
from llava_ray.config.sources import LOOKED_AT, SOURCE_PATHS
from llava_ray.config.space import Space, SweepConfig
from llava_ray.config.sweep_recipes import corners
from llava_ray.data.preparation import check_data, check_held_out_sources, check_source, prepare_data
from llava_ray.data.storage import absolute_path
from llava_ray.model.blueprint import read_blueprint
from llava_ray.optional_trackers import check_trackers
from llava_ray.runtime import Resources
from llava_ray.sweep.sampling import TrialSettings
from llava_ray.sweep.searching import check_optuna
from llava_ray.tracking import check_store
from llava_ray.train.identity import identify_run
from llava_ray.train.planning.automatic import Workers, decide_settings
from llava_ray.train.run_data import held_out_samples, make_plan, plan_stream
from llava_ray.train.runs import absolute_paths

# Settings of which the frozen tower's features depend.
_FEATURE_KEYS = ("model.vision_tower", *FEATURE_KEYS, "train.bf16")


def common_config(config: SweepConfig, folder: str, tracking_uri: str, parent_run_id: str) -> SweepConfig:
    """Return the config that every trial starts from, with absolute paths, the sweep's folder and MLflow run."""
    paths = {
        "data.cache_dir": absolute_path(config.data.cache_dir),
        **_absolute_data(config.data),
    }
    if config.data.image_folder:
        paths["data.image_folder"] = absolute_path(config.data.image_folder)
    if config.held_out.path:
        paths["held_out.path"] = absolute_path(config.held_out.path)
    if config.held_out.images:
        paths["held_out.images"] = absolute_path(config.held_out.images)
    trials = {
        "run.storage_path": f"{folder}/trials",
        "run.max_failures": config.sweep.max_retries,
        "run.restart": False,
        "tracking.tracking_uri": tracking_uri,
        "tracking.parent_run_id": parent_run_id,
        "tracking.log_model": False,  # the sweep keeps the best one
    }
    return config.replaced(paths | absolute_paths(config) | trials)


def _absolute_data(data: DataConfig) -> dict[str, Any]:
    """Return changes that make the paths of the data absolute, those of each source of a mixture too."""
    if not data.sources:
        return {"data.data_path": absolute_path(data.data_path)}
    keys = (*SOURCE_PATHS, *LOOKED_AT)
    sources = [
        source.model_dump() | {key: absolute_path(path) for key in keys if (path := getattr(source, key))}
        for source in data.sources
    ]
    return {"data.sources": sources}


def absolute_space(space: Space) -> Space:
    """Return the space with absolute paths of models."""
    dimensions = space.model_dump()["dimensions"]
    for key in MODEL_PATHS:
        for value in (dimensions.get(key) or {}).get("choice") or ():
            if isinstance(value, str) and Path(value).exists():
                choice = dimensions[key]["choice"]
                dimensions[key]["choice"] = tuple(str(Path(v).resolve()) if v == value else v for v in choice)
    return Space.parsed({"dimensions": dimensions})


def check_sweep(config: SweepConfig, space: Space) -> None:
    """Check a sweep before its start, without Ray.

    Raises ConfigError, DataError, or ModelError for a corner of the space whose parts do not fit.
    """
    if config.sweep.method == "optuna":
        check_optuna()
    check_data(config.data)
    check_held_out_sources(config.data)
    if config.held_out.path:
        check_source(config.held_out.path)
    base = config.base
    for settings in corners(space):
        variant = base.replaced(settings)
        read_blueprint(variant.model, variant.data.image_aspect_ratio)
    check_store(config.tracking.tracking_uri)
    check_trackers(config.tracking.report_to, config.run.storage_path)


def share(config: FinetuneConfig, space: Space, resources: Resources) -> int:
    """Prepare data, lengths, features and the reference for all trials; return the steps of a whole run."""
    prepared = prepare_data(config.data)
    for settings in _feature_variants(space):
        variant, _ = decide_settings(config.replaced(settings), Workers.of(resources))
        blueprint = read_blueprint(variant.model, variant.data.image_aspect_ratio)
        identity = identify_run(variant, prepared.data_hash)
        held_out_samples(variant, blueprint, identity, resources)
        plan_stream(variant, prepared, blueprint, identity, resources)
    _, plan = make_plan(config, prepared, read_blueprint(config.model, config.data.image_aspect_ratio))
    return plan.num_steps


def _feature_variants(space: Space) -> Iterator[TrialSettings]:
    """Yield the combinations of settings that features depend on."""
    dimensions = {key: part for key, part in space.dimensions.items() if key in _FEATURE_KEYS}
    seen: list[TrialSettings] = []
    for values in itertools.product(*(part.choice or () for part in dimensions.values())):
        wanted = dict(zip(dimensions, values, strict=True))
        settings = {key: value for key, value in wanted.items() if dimensions[key].matters(wanted)}
        if settings not in seen:
            seen.append(settings)
            yield settings
