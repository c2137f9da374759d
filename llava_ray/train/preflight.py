"""Checks before Ray starts: the run's data and model can be read, and its name is free."""

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.grpo import GRPO
from llava_ray.data.encoder_settings import EncoderSettings, load_encoder
from llava_ray.data.mixture import naming_source
from llava_ray.data.preparation import check_data, check_held_out_sources, check_source
from llava_ray.data.storage import absolute_path
from llava_ray.model.blueprint import Blueprint, read_blueprint
from llava_ray.optional_trackers import check_trackers
from llava_ray.tracking import check_store
from llava_ray.train.identity import DATA, identify_run, recipe_of_name
from llava_ray.train.rollouts.rewards import Rewards
from llava_ray.train.runs import RunFolder, find_run


def check_run(config: FinetuneConfig) -> None:
    """Check a run's name, data, model and store before it starts. Raises ConfigError, DataError or ModelError."""
    _check_name(config)
    check_data(config.data)
    if config.held_out.path is not None:
        check_source(config.held_out.path)
    check_held_out_sources(config.data)
    blueprint = read_blueprint(config.model, config.data.image_aspect_ratio)
    check_templates(config, blueprint)
    if config.train.objective == GRPO:
        Rewards.of(config.grpo)
    check_store(config.tracking.tracking_uri)
    check_trackers(config.tracking.report_to, config.run.storage_path)


def check_templates(config: FinetuneConfig, blueprint: Blueprint) -> None:
    """Raise ConfigError for a template of a source that does not exist or that the tokenizer does not have."""
    for number, source in enumerate(config.data.sources):
        if source.version is not None:
            with naming_source(config.data, number):
                load_encoder(EncoderSettings.of(blueprint, config.data, config.train).for_source(source))


def _check_name(config: FinetuneConfig) -> None:
    """Check that no run with other settings or models has the name. Raises ConfigError.

    Whether its data are the same is known once they are prepared.
    """
    run = RunFolder(absolute_path(config.run.storage_path), str(config.run.name))
    if config.run.restart or recipe_of_name(config) is not None or not run.is_claimed:
        return
    saved = run.noted_settings() or {}
    find_run(config, identify_run(config, (saved.get("identity") or {}).get(DATA, "")))
