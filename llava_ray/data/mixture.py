"""A mixture's sources as one: their prepared folders, and how many samples of each an epoch draws."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from math import floor

from llava_ray.config.data import DataConfig
from llava_ray.config.mixtures import source_data
from llava_ray.config.sources import SourceConfig, describe_source
from llava_ray.data.shards import PreparedData
from llava_ray.errors import ConfigError, DataError

_MAX_DRAWS = 2**30  # of an epoch, whose order takes 8 bytes each


@contextmanager
def naming_source(data: DataConfig, number: int) -> Iterator[None]:
    """Let errors of a source begin with its key and name; without a mixture they stay as they are."""
    try:
        yield
    except (ConfigError, DataError) as error:
        if not data.sources:
            raise
        kind = ConfigError if isinstance(error, ConfigError) else DataError
        raise kind(f"{describe_source(number, data.sources[number])}: {error}") from error


def prepare_sources(data: DataConfig, prepare: Callable[[DataConfig], PreparedData]) -> PreparedData:
    """Prepare each source of a mixture in a folder of its own. Raises as ``prepare``, naming the source."""
    sources = []
    for number in range(len(data.sources)):
        with naming_source(data, number):
            sources.append(prepare(source_data(data, number)))
    return join_sources([source.name for source in data.sources], sources)


def join_sources(names: Sequence[str], sources: Sequence[PreparedData]) -> PreparedData:
    """Return the prepared data of several sources; their hash is of the names too, which stand in the ledger."""
    named = [[name, source.data_hash] for name, source in zip(names, sources, strict=True)]
    return PreparedData(
        path="",
        shards=tuple(shard for source in sources for shard in source.shards),
        data_hash=hashlib.sha256(json.dumps(named).encode()).hexdigest(),
        num_samples=sum(source.num_samples for source in sources),
        num_rejected=sum(source.num_rejected for source in sources),
        rejected_reasons=dict(sum((Counter(source.rejected_reasons) for source in sources), Counter[str]())),
        ignored_keys=dict(sum((Counter(source.ignored_keys) for source in sources), Counter[str]())),
        reused=all(source.reused for source in sources),
        sources=tuple(sources),
    )


def count_draws(sources: Sequence[SourceConfig], sizes: Sequence[int], epoch_samples: int | None = None) -> list[int]:
    """Return how many samples an epoch draws from each source; ``sizes`` are the samples that it has.

    Sources with ``epochs`` or ``samples`` draw as many as they say. Those with a weight share what these leave of
    ``epoch_samples``; by default as many as possible with none of them drawn more than once. Shares are rounded so that
    they add up: each is less than one sample from its exact value. Raises ConfigError for a source without samples, or
    of which none would be drawn.
    """
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        if not size:
            raise ConfigError(f"{describe_source(number, source)} has no samples; check its data_path, or leave it out")
    draws = [_count_fixed(source, size) for source, size in zip(sources, sizes, strict=True)]
    for number, count in _share_weights(sources, sizes, epoch_samples, sum(draws)).items():
        draws[number] = count
    for number, (source, count) in enumerate(zip(sources, draws, strict=True)):
        if not count:
            raise ConfigError(
                f"{describe_source(number, source)}: none of its samples would be drawn in an epoch of "
                f"{sum(draws):,}; raise its weight or epochs, raise data.epoch_samples, or leave it out"
            )
    if sum(draws) > _MAX_DRAWS:
        raise ConfigError(f"an epoch of {sum(draws):,} samples is too large (at most {_MAX_DRAWS:,}); lower the shares")
    return draws


def _share_weights(
    sources: Sequence[SourceConfig], sizes: Sequence[int], epoch_samples: int | None, num_fixed: int
) -> dict[int, int]:
    """Return the draws of each source that has a weight, by its number; ``num_fixed`` are those of all others."""
    weights = {number: _exact(source.weight) for number, source in enumerate(sources) if source.weight is not None}
    if not weights:
        return {}
    total = sum(weights.values(), Fraction(0))
    left = min(sizes[number] * total / weight for number, weight in weights.items())
    if epoch_samples is not None:
        left = Fraction(epoch_samples - num_fixed)
        if left < 1:
            raise ConfigError(
                f"data.epoch_samples = {epoch_samples:,} leaves nothing for sources with a weight: those with epochs "
                f"or samples draw {num_fixed:,}; raise it, or leave it out"
            )
    return _round_shares({number: floor(left) * weight / total for number, weight in weights.items()})


def list_shares(data: DataConfig, draws: list[tuple[int, int]]) -> Iterator[str]:
    """Yield a line for each source: its samples, those drawn in an epoch, their share and passes."""
    total = sum(drawn for _, drawn in draws)
    yield f"Epoch: {total:,} samples of {len(draws)} source(s)"
    for number, (size, drawn) in enumerate(draws):
        name = describe_source(number, data.sources[number])
        yield f"  {name:<40}{drawn:>12,} of {size:>12,}  {drawn / total:>7.2%}  {drawn / size:.3g} passes"


def _count_fixed(source: SourceConfig, size: int) -> int:
    """Return the samples that a source draws whatever the others do; 0 for one with a weight."""
    if source.samples is not None:
        return source.samples
    return 0 if source.epochs is None else floor(_exact(source.epochs) * size + Fraction(1, 2))


def _exact(number: float) -> Fraction:
    """Return the number as it was written: 0.1 is a tenth."""
    return Fraction(repr(number))


def _round_shares(exact: dict[int, Fraction]) -> dict[int, int]:
    """Round shares to whole numbers with the same sum, by their largest remainders; the first of equal ones."""
    rounded = {number: floor(share) for number, share in exact.items()}
    missing = int(sum(exact.values(), Fraction(0))) - sum(rounded.values())
    for number in sorted(exact, key=lambda number: (rounded[number] - exact[number], number))[:missing]:
        rounded[number] += 1
    return rounded
