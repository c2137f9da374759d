"""The plan and the stream of a mixture: its sources' lengths, shares and settings, in the order of the recipe."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llava_ray.config.data import DataConfig
from llava_ray.config.mixtures import source_data
from llava_ray.data.encoder_settings import EncoderSettings
from llava_ray.data.lengths import measure_lengths
from llava_ray.data.mixed_lengths import MixedLengths
from llava_ray.data.mixture import count_draws, list_shares, naming_source
from llava_ray.data.plan import Plan, PlanSource
from llava_ray.data.settings import StreamSettings
from llava_ray.data.shards import PreparedData
from llava_ray.errors import ConfigError


def plan_sources(
    data: DataConfig, prepared: PreparedData, encoder: EncoderSettings, **settings: Any
) -> tuple[MixedLengths, Plan]:
    """Measure the lengths of each source by its own rules, and build the plan; ``settings`` are those of ``Plan``.

    Raises ConfigError or DataError that names the source.
    """
    parts, sources = [], []
    for number, (source, own) in enumerate(zip(data.sources, prepared.sources, strict=True)):
        with naming_source(data, number):
            lengths = measure_lengths(own, encoder.for_source(source), data.max_rejected)
            parts.append(lengths)
            shard = lengths.column("shard")
            if len(shard) and int(shard.max()) >= len(own.shards):
                raise ConfigError(f"token lengths {lengths.path} are of other data; delete the folder")
            sources.append(PlanSource(lengths.column("num_tokens"), shard, len(own.shards)))
    sizes = [len(source.shard) for source in sources]
    draws = count_draws(data.sources, sizes, data.epoch_samples)
    plan = Plan.of_sources(list(zip(sources, draws, strict=True)), **settings)
    return MixedLengths.of(parts, sizes, prepared), plan


def split_settings(settings: StreamSettings, prepared: PreparedData) -> list[StreamSettings]:
    """Return the stream's settings of each source: its own folder, data settings and encoder."""
    data = settings.data
    return [
        replace(
            settings,
            prepared_path=own.path,
            shard_names=tuple(shard.name for shard in own.shards),
            data=source_data(data, number),
            encoder=settings.encoder.for_source(source),
            name=source.name,
        )
        for number, (source, own) in enumerate(zip(data.sources, prepared.sources, strict=True))
    ]


def describe_shares(data: DataConfig, plan: Plan) -> Iterator[str]:
    """Yield how much of an epoch each source of a mixture is, a line each; nothing without a mixture."""
    if data.sources:
        sizes = [(size, drawn) for size, drawn in plan.draws or ((len(plan.shard), len(plan.shard)),)]
        yield from list_shares(data, sizes)
