"""The data of a run: lengths, the plan of every step, the settings of the stream, the reference, held-out samples."""

from dataclasses import replace
from functools import partial
from typing import Any

from llava_ray.config.data import DataConfig
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.mixtures import source_data
from llava_ray.config.sources import SourceConfig
from llava_ray.data.encoder_settings import EncoderSettings
from llava_ray.data.feature_writing import cache_features
from llava_ray.data.lengths import measure_lengths
from llava_ray.data.mixture import naming_source
from llava_ray.data.plan import Plan
from llava_ray.data.preparation import prepare_data
from llava_ray.data.settings import StreamSettings
from llava_ray.data.shards import PreparedData, is_prepared
from llava_ray.data.token_lengths import TokenLengths
from llava_ray.model.blueprint import Blueprint
from llava_ray.objectives.table import build_held_out_objective
from llava_ray.runtime import Resources
from llava_ray.train.identity import Identity
from llava_ray.train.mixture_plan import describe_shares, plan_sources, split_settings
from llava_ray.train.planning.costs import estimate_cost
from llava_ray.train.reference import cache_reference
from llava_ray.train.score_history import check_score
from llava_ray.train.settings import HeldOut

_HELD_OUT_BATCH = 64  # held-out samples that are packed into one step


def plan_stream(
    config: FinetuneConfig, prepared: PreparedData, blueprint: Blueprint, identity: Identity, resources: Resources
) -> tuple[TokenLengths, Plan, StreamSettings]:
    """Build the plan of every step and the settings of the stream, with all that is computed before the run."""
    lengths, plan = make_plan(config, prepared, blueprint)
    stream = stream_settings(config, prepared, blueprint, resources)
    return lengths, plan, replace(stream, reference=cache_reference(config, stream, lengths, identity, resources))


def make_plan(config: FinetuneConfig, prepared: PreparedData, blueprint: Blueprint) -> tuple[TokenLengths, Plan]:
    """Measure the examples' lengths (or load them) and build the plan of every step."""
    data, train = config.data, config.train
    encoder = EncoderSettings.of(blueprint, data, train)
    settings: dict[str, Any] = {
        "global_batch_size": train.global_batch_size,
        "num_epochs": train.num_train_epochs,
        "seed": train.seed,
        "shuffle_window": data.shuffle_window,
        "max_steps": train.max_steps,
    }
    lengths: TokenLengths
    if prepared.sources:
        lengths, plan = plan_sources(data, prepared, encoder, **settings)
    else:
        lengths = measure_lengths(prepared, encoder, data.max_rejected)
        plan = Plan(lengths.column("num_tokens"), lengths.column("shard"), **settings)
    print(  # noqa: T201 - for the person who started the run
        f"Plan: {len(plan.num_tokens)} examples ({lengths.num_truncated} truncated, {lengths.num_rejected} rejected), "
        f"{plan.num_steps} steps of {plan.global_batch_size} samples; lengths in {lengths.path}",
        *describe_shares(data, plan),
        sep="\n",
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
    if prepared.sources:
        parts = split_settings(settings, prepared)
        pairs = zip(parts, prepared.sources, strict=True)
        return replace(settings, sources=tuple(_with_features(part, own, blueprint) for part, own in pairs))
    return _with_features(settings, prepared, blueprint)


def _with_features(settings: StreamSettings, prepared: PreparedData, blueprint: Blueprint) -> StreamSettings:
    """Add the entry of cached features where there is to be one, computed if needed."""
    if settings.data.vision_features != "cached":
        return settings
    return replace(settings, features=cache_features(prepared, blueprint, settings))


def held_out_samples(
    config: FinetuneConfig, blueprint: Blueprint, identity: Identity, resources: Resources
) -> tuple[HeldOut, ...]:
    """Prepare the held-out samples of a run, and of each source that has some, in that order.

    Raises ConfigError where they have no score by which the run is to end or keep its best checkpoint.
    """
    asked, found = config.held_out, []
    check_score(asked, build_held_out_objective(config).metric_names)
    prepare = partial(_held_out_of, config, blueprint=blueprint, identity=identity, resources=resources)
    if asked.path is not None:
        folder = asked.images or config.data.image_folder
        changes = {"data_path": asked.path, "image_folder": folder, "max_samples": None, "epoch_samples": None}
        kind = config.data.kind if asked.kind == "auto" else asked.kind
        found.append(prepare(config.data.replaced(changes | {"sources": (), "kind": kind}), None))
    for number, source in enumerate(config.data.sources):
        if source.held_out is not None:
            folder = source.held_out_images or source.image_folder or config.data.image_folder
            with naming_source(config.data, number):
                data = source_data(config.data, number, data_path=source.held_out, image_folder=folder)
                found.append(prepare(data, source))
    return tuple(found)


def _held_out_of(
    config: FinetuneConfig,
    data: DataConfig,
    source: SourceConfig | None,
    *,
    blueprint: Blueprint,
    identity: Identity,
    resources: Resources,
) -> HeldOut:
    """Prepare one set of held-out samples, those of a source by its own template and length rule."""
    asked = config.held_out
    most = None if is_prepared(data.data_path) else asked.num_samples
    data = data.replaced({"max_samples": most, "shuffle_window": 0})
    prepared = prepare_data(data, show_progress=False)
    # Only [data] is of these samples: the run's own sources have been checked with the run.
    settings = stream_settings(config.model_copy(update={"data": data}), prepared, blueprint, resources)
    if source is not None:
        settings = replace(settings, encoder=settings.encoder.for_source(source))
    lengths = measure_lengths(prepared, settings.encoder, data.max_rejected)
    settings = replace(settings, reference=cache_reference(config, settings, lengths, identity, resources))
    plan = Plan(
        lengths.column("num_tokens"),
        lengths.column("shard"),
        global_batch_size=_HELD_OUT_BATCH,
        num_epochs=1,
        seed=0,
        shuffle_window=0,
    )
    name = None if source is None else source.name
    return HeldOut(settings, plan, lengths, asked.num_answers, asked.max_new_tokens, name)
