"""One fine-tuning run on a Ray cluster, from resolved settings to a bundle."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import ray
from ray.train import UserCallback

from llava_ray.config.sections import FinetuneConfig
from llava_ray.data.encoder_settings import EncoderSettings
from llava_ray.data.feature_writing import cache_features
from llava_ray.data.lengths import measure_lengths
from llava_ray.data.plan import Plan
from llava_ray.data.preparation import prepare_data
from llava_ray.data.settings import StreamSettings
from llava_ray.data.shards import PreparedData, is_prepared
from llava_ray.data.token_lengths import TokenLengths
from llava_ray.errors import ConfigError
from llava_ray.model.blueprint import Blueprint, read_blueprint
from llava_ray.runtime import Resources
from llava_ray.tracking import default_tracking_uri
from llava_ray.train.finished_run import FinishedRun, note_finished, reuse_finished
from llava_ray.train.identity import identify_run, identity_hash
from llava_ray.train.planning.automatic import Workers, decide_settings
from llava_ray.train.planning.costs import estimate_cost
from llava_ray.train.progress import closing_run, progress_bar
from llava_ray.train.ray_trainer import build_trainer
from llava_ray.train.rollouts.coordinator import RolloutSettings, check_rollout_gpus, ending_rollouts, start_rollouts
from llava_ray.train.run_recorder import start_recorder
from llava_ray.train.runs import (
    RunFolder,
    absolute_paths,
    claim_run,
    committed_step,
    find_run,
    repair_run,
)
from llava_ray.train.settings import HeldOut, LoopSettings
from llava_ray.train.stopping import fit

_HELD_OUT_BATCH = 64  # held-out samples that are packed into one step


def finetune(
    config: FinetuneConfig,
    prepared: PreparedData,
    resources: Resources,
    *,
    profile: tuple[int, int] | None = None,
    show_progress: bool = True,
) -> FinishedRun:
    """Fine-tune to the last step, resuming a run of the same name. Needs a connected Ray.

    ``profile`` names the first and the last step of which a trace is written.

    Raises ConfigError, DataError, ModelError, CheckpointError or TrainingError; whatever was committed stays.
    """
    finished = train_until(config, prepared, resources, profile=profile, show_progress=show_progress)
    assert finished is not None  # only a run with ``until`` stops before its end
    return finished


def train_until(
    config: FinetuneConfig,
    prepared: PreparedData,
    resources: Resources,
    *,
    until: int | None = None,
    callbacks: Sequence[UserCallback] = (),
    profile: tuple[int, int] | None = None,
    show_progress: bool = True,
) -> FinishedRun | None:
    """Fine-tune up to the step ``until`` (default: the last), with a checkpoint there; return None before the end.

    Everything but the stopping point is as in the whole run; the next call resumes there. ``callbacks`` are Ray
    Train's, and receive every checkpoint with its held-out metrics. Raises as ``finetune`` does.
    """
    identity = identify_run(config, prepared.data_hash)
    run = find_run(config, identity)
    if (finished := reuse_finished(config, run, prepared)) is not None:
        return finished
    check_rollout_gpus(config, resources)
    begun = run.noted_settings() if run.is_claimed and not config.run.restart else None
    config, decided = decide_settings(config, Workers.of(resources), begun)
    if show_progress and decided:
        print(*decided, sep="\n", flush=True)  # noqa: T201 - for the person who started the run
    config = config.replaced(absolute_paths(config) | {"run.name": run.name})
    blueprint = read_blueprint(config.model, config.data.image_aspect_ratio)
    lengths, plan = make_plan(config, prepared, blueprint)
    until = min(until or plan.num_steps, plan.num_steps)
    if profile is not None and profile[1] >= until:
        raise ConfigError(f"--profile names the step {profile[1]}, the last of this run is {until - 1}; name others")
    stream = stream_settings(config, prepared, blueprint, resources)
    held_out = held_out_samples(config, blueprint, resources)
    tracking_uri = config.tracking.tracking_uri or default_tracking_uri(config.run.storage_path)
    claim_run(run, config, identity)
    repair_run(run)
    journal = start_recorder(run, config, tracking_uri, identity_hash(config, identity))
    settings = LoopSettings(
        config,
        stream,
        held_out=held_out,
        profile=profile,
        num_steps=plan.num_steps,
        until=until,
        plan_hash=plan.hash,
        data_hash=prepared.data_hash,
        run_folder=run.path,
        bundle_folder=run.bundle,
        num_threads=resources.num_threads,
        journal=journal,
        rollouts=start_rollouts(RolloutSettings(config, stream, plan, lengths, until, journal), resources),
    )
    trainer = build_trainer(settings, run, plan, lengths, resources, callbacks)
    first_step = _find_first_step(run, profile)
    bar = progress_bar(journal, plan.num_steps, first_step) if show_progress else nullcontext()
    with closing_run(journal), bar, ending_rollouts(settings.rollouts):
        fit(trainer, run, journal, until)
    if until < plan.num_steps:
        ray.get(journal.flush.remote())
        return None
    return note_finished(config, run, plan, prepared, journal, tracking_uri)


def _find_first_step(run: RunFolder, profile: tuple[int, int] | None) -> int:
    """Return the step at which a run starts; say so where the steps to profile are behind it."""
    first_step = committed_step(run.storage_path, run.name)
    if profile is not None and profile[1] < first_step:
        print(f"Nothing is profiled: the run resumes at step {first_step}", flush=True)  # noqa: T201
    return first_step


def make_plan(config: FinetuneConfig, prepared: PreparedData, blueprint: Blueprint) -> tuple[TokenLengths, Plan]:
    """Measure the examples' lengths (or load them) and build the plan of every step."""
    encoder = EncoderSettings.of(blueprint, config.data, config.train)
    lengths = measure_lengths(prepared, encoder, config.data.max_rejected)
    plan = Plan(
        lengths.column("num_tokens"),
        lengths.column("shard"),
        global_batch_size=config.train.global_batch_size,
        num_epochs=config.train.num_train_epochs,
        seed=config.train.seed,
        shuffle_window=config.data.shuffle_window,
        max_steps=config.train.max_steps,
    )
    print(  # noqa: T201 - for the person who started the run
        f"Plan: {len(plan.num_tokens)} examples ({lengths.num_truncated} truncated, {lengths.num_rejected} rejected), "
        f"{plan.num_steps} steps of {plan.global_batch_size} samples; lengths in {lengths.path}",
        flush=True,
    )
    return lengths, plan


def stream_settings(
    config: FinetuneConfig, prepared: PreparedData, blueprint: Blueprint, resources: Resources
) -> StreamSettings:
    """Build the settings of the stream's tasks; features that are to be cached are computed here."""
    settings = StreamSettings(
        prepared_path=prepared.path,
        shard_names=tuple(shard.name for shard in prepared.shards),
        encoder=EncoderSettings.of(blueprint, config.data, config.train),
        model=config.model,
        image_spec=blueprint.image_spec,
        image_tokens=blueprint.image_tokens,
        mm_hidden_size=blueprint.mm_hidden_size,
        row_length=config.train.row_length,
        data=config.data,
        bf16=config.train.uses_bf16,
        vision_gpus=1 if resources.use_gpu else 0,
        vision_threads=max(1, resources.cores // config.data.num_vision_actors),
        cost=estimate_cost(config, blueprint),
    )
    if config.data.vision_features != "cached":
        return settings
    return replace(settings, features=cache_features(prepared, blueprint, settings))


def held_out_samples(config: FinetuneConfig, blueprint: Blueprint, resources: Resources) -> HeldOut | None:
    """Prepare the held-out samples of a run, or return None."""
    settings_held_out = config.held_out
    if settings_held_out.path is None:
        return None
    folder = settings_held_out.images or config.data.image_folder
    most = None if is_prepared(settings_held_out.path) else settings_held_out.num_samples
    changes = {"data_path": settings_held_out.path, "image_folder": folder, "max_samples": most}
    config = config.replaced({f"data.{key}": value for key, value in changes.items()} | {"data.shuffle_window": 0})
    prepared = prepare_data(config.data, show_progress=False)
    settings = stream_settings(config, prepared, blueprint, resources)
    lengths = measure_lengths(prepared, settings.encoder, config.data.max_rejected)
    plan = Plan(
        lengths.column("num_tokens"),
        lengths.column("shard"),
        global_batch_size=_HELD_OUT_BATCH,
        num_epochs=1,
        seed=0,
        shuffle_window=0,
    )
    return HeldOut(settings, plan, lengths, settings_held_out.num_answers, settings_held_out.max_new_tokens)
