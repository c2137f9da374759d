"""Preparation of raw records: Ray Data tasks check and write chunks of records to a prepared folder, once.

Every name derives from the content of the data: a task that runs twice overwrites its own shards, an interrupted
preparation resumes where it stopped, and two concurrent ones write the same bytes.
"""

import hashlib
import json
import logging
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import pyarrow as pa
import ray.data
from tqdm import tqdm

from llava_ray.config.data import DataConfig
from llava_ray.config.mixtures import learnt_paths
from llava_ray.data.chunk_writing import MAX_KEYS, ChunkResult, Rules, write_chunk
from llava_ray.data.chunks import RecordChunk, fingerprint_data, make_chunks
from llava_ray.data.mixture import naming_source, prepare_sources
from llava_ray.data.record_keys import describe_ignored
from llava_ray.data.records import find_files
from llava_ray.data.shards import (
    PREFERENCES,
    REJECTED,
    SHARDS_VERSION,
    PreparedData,
    is_prepared,
    open_prepared,
    write_shards_manifest,
)
from llava_ray.data.storage import absolute_path, read_stored, relative_path, write_stored
from llava_ray.errors import ConfigError, DataError
from llava_ray.log_file import terminal
from llava_ray.placement import in_pool

# Incremented with each change of how a record is read, so that data prepared before is prepared again.
# 2: media, tools, weights and system texts are obeyed or refused; 3: also flags that are false, second images, lists
_READER_VERSION = 3

logger = logging.getLogger(__name__)

# Messages quoted in the error about too many rejected records.
_NUM_SHOWN = 3


def prepare_data(config: DataConfig, *, show_progress: bool = True) -> PreparedData:
    """Prepare ``config.data_path`` in ``config.cache_dir`` and return the folder; open it if it is prepared already.

    The folder's name is a hash of the records and of every setting that changes the shards, so it is written once.
    Image files are not part of the hash: after replacing some, delete the folder. Needs a running Ray.

    Raises DataError when more than ``config.max_rejected`` of the records are rejected (the good shards stay and are
    reused), when none is left, or when data cannot be found or written.
    """
    if config.sources:
        return prepare_sources(config, partial(prepare_data, show_progress=show_progress))
    if is_prepared(config.data_path):
        prepared = open_prepared(config.data_path)
        if config.max_samples is not None and config.max_samples < prepared.num_samples:
            raise ConfigError(
                f"data.max_samples = {config.max_samples} cuts raw records, but {prepared.path} is prepared already, "
                f"with {prepared.num_samples}; point data.data_path at the raw records, or leave max_samples out"
            )
        if prepared.kind != config.kind_of_records:
            raise ConfigError(
                f"{prepared.path} holds {prepared.kind} records, but {config.kind_of_records} records are wanted "
                "(data.kind, which follows train.objective); point data.data_path at others"
            )
    else:
        prepared = _prepare_raw(config, show_progress)
    _check_lost_share(prepared.path, prepared.num_samples, prepared.rejected_reasons, config.max_rejected)
    return prepared


def check_data(config: DataConfig) -> None:
    """Raise DataError where there is no data to prepare, or a prepared folder is incomplete, of any source."""
    for number, path in enumerate(learnt_paths(config).values()):
        with naming_source(config, number):
            check_source(path)


def check_held_out_sources(config: DataConfig) -> None:
    """Raise DataError where a source's held-out samples are missing, or a prepared folder is incomplete."""
    for number, source in enumerate(config.sources):
        if source.held_out is not None:
            with naming_source(config, number):
                check_source(source.held_out)


def check_source(data_path: str) -> None:
    """Raise DataError where there is no data to prepare, or a prepared folder is incomplete."""
    if is_prepared(data_path):
        open_prepared(data_path)
    else:
        find_files(absolute_path(data_path))


def _prepare_raw(config: DataConfig, show_progress: bool) -> PreparedData:
    kind, files = find_files(absolute_path(config.data_path))
    image_folder = absolute_path(config.image_folder or files[0].rpartition("/")[0])
    settings = {
        "format_version": SHARDS_VERSION,
        "reader_version": _READER_VERSION,
        "content": fingerprint_data(kind, files),
        "mixed": config.shuffle_window > 0,  # a curriculum keeps the order of the file
        "image_folder": relative_path(absolute_path(config.cache_dir), image_folder),
        **config.model_dump(include={"max_image_pixels", "max_samples", "samples_per_shard", "shard_size_mb"}),
    }
    pairs = config.kind_of_records == PREFERENCES
    if pairs:  # absent for instructions: folders prepared before there were preferences keep their names
        settings["kind"] = PREFERENCES
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    folder = f"{absolute_path(config.cache_dir)}/prepared-{key}"
    if finished := _open_finished(folder):
        if show_progress:
            tqdm.write(f"Prepared data reused: {finished.num_samples:,} samples in {folder}")
        return finished
    rules = Rules(
        folder, image_folder, config.max_image_pixels, config.samples_per_shard, config.shard_size_mb * 10**6, pairs
    )
    chunks = make_chunks(kind, files, config.samples_per_shard, config.max_samples, mixed=config.shuffle_window > 0)
    results = _write_chunks(chunks, rules, show_progress)
    rejected = sorted((row for result in results for row in result.rejected), key=_place)
    reasons = Counter(row["reason"] for row in rejected)
    write_stored(f"{folder}/{REJECTED}", "".join(json.dumps(row) + "\n" for row in rejected).encode())
    shards = [shard for result in results for shard in result.shards]
    _check_lost_share(folder, sum(shard.num_rows for shard in shards), reasons, config.max_rejected)
    ignored = sum((Counter(result.ignored_keys) for result in results), Counter[str]())
    if ignored and show_progress:
        tqdm.write(describe_ignored(ignored))
    write_shards_manifest(
        folder,
        shards,
        reasons,
        {"data_path": relative_path(folder, absolute_path(config.data_path)), **settings},
        dict(ignored.most_common(MAX_KEYS)),
    )
    return replace(open_prepared(folder), reused=False)  # opening checks that all nodes wrote to the same storage


def _open_finished(folder: str) -> PreparedData | None:
    if not is_prepared(folder):
        return None
    try:
        return open_prepared(folder)
    except DataError as error:
        logger.warning("preparing again, because %s", error)
        return None


def _place(row: Mapping[str, str]) -> tuple[str, int, str]:
    path, _, number = row["source"].rpartition(":")
    return path, int(number) if number.isdigit() else 0, row["id"]


def _check_lost_share(folder: str, num_samples: int, reasons: Mapping[str, int], max_rejected: float) -> None:
    """Raise DataError where too many records are rejected, or none is left."""
    lost = sum(reasons.values())
    if num_samples and lost <= max_rejected * (num_samples + lost):
        return
    if not num_samples and not lost:
        raise DataError(f"{folder}: the data has no records; check data.data_path and data.max_samples")
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    lines = read_stored(f"{folder}/{REJECTED}").splitlines()[:_NUM_SHOWN]
    raise DataError(
        f"{lost:,} of {num_samples + lost:,} records are rejected, more than data.max_rejected = {max_rejected:g} "
        f"allows: {counts}. The first: {'; '.join(json.loads(line)['message'] for line in lines)}. All are listed in "
        f"{folder}/{REJECTED}. Fix the data and start again (finished shards are reused), or raise data.max_rejected"
    )


def _write_chunks(chunks: Iterator[RecordChunk], rules: Rules, show_progress: bool) -> list[ChunkResult]:
    """Write every chunk with Ray Data; return their results in order."""
    # Chunks go to the object store one by one, which may spill them to disk, so this process never holds them all.
    references = [
        ray.put(pa.table({"index": [index], "chunk": pa.array([pickle.dumps(chunk)], pa.large_binary())}))
        for index, chunk in enumerate(chunks)
    ]
    if not references:
        return []
    dataset = ray.data.from_arrow_refs(references).map_batches(
        write_chunk,
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"rules": rules},
        num_cpus=1,
        **in_pool("decode"),
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    results: dict[int, ChunkResult] = {}
    with tqdm(desc="preparing", unit=" samples", disable=not show_progress, file=terminal()) as bar:
        for row in dataset.iter_rows():
            if row["error"] is not None:
                raise DataError(row["error"])
            result = results[row["index"]] = ChunkResult.from_json(row["result"])
            bar.update(sum(shard.num_rows for shard in result.shards) + len(result.rejected))
    return [results[index] for index in sorted(results)]
