"""One fine-tuning run on a Ray cluster, from resolved settings to a bundle."""

from collections.abc import Sequence
from contextlib import nullcontext

import ray
from ray.train import UserCallback

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.shards import PreparedData
from llava_ray.errors import ConfigError
from llava_ray.model.blueprint import read_blueprint
from llava_ray.runtime import Resources
from llava_ray.tracking import default_tracking_uri
from llava_ray.train.finished_run import FinishedRun, note_finished, reuse_finished
from llava_ray.train.identity import identify_run, identity_hash
from llava_ray.train.planning.automatic import Workers, decide_settings
from llava_ray.train.progress import closing_run, progress_bar
from llava_ray.train.ray_trainer import build_trainer
from llava_ray.train.rollouts.coordinator import RolloutSettings, check_rollout_gpus, ending_rollouts, start_rollouts
from llava_ray.train.run_data import held_out_samples, plan_stream
from llava_ray.train.run_recorder import start_recorder
from llava_ray.train.runs import (
    RunFolder,
    absolute_paths,
    claim_run,
    committed_step,
    find_run,
    repair_run,
)
from llava_ray.train.settings import LoopSettings
from llava_ray.train.stopping import fit


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
    lengths, plan, stream = plan_stream(config, prepared, blueprint, identity, resources)
    until = min(until or plan.num_steps, plan.num_steps)
    if profile is not None and profile[1] >= until:
        raise ConfigError(f"--profile names the step {profile[1]}, the last of this run is {until - 1}; name others")
    held_out = held_out_samples(config, blueprint, identity, resources)
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
