"""The number of tokens of each example: computed once with Ray, and stored beside the shards.

The file is keyed by everything that decides the lengths (shards, tokenizer, template, tokens of an image, limit), so a
second run with the same settings starts at once.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from tqdm import tqdm

from llava_ray.data.encoder_settings import EncoderSettings, load_encoder
from llava_ray.data.record_examples import encode_row
from llava_ray.data.shards import PreparedData, read_shard_rows
from llava_ray.data.token_lengths import LENGTHS_FILE, SCHEMA, TokenLengths
from llava_ray.errors import DataError, RecordError
from llava_ray.log_file import terminal
from llava_ray.placement import in_pool

_FORMAT_VERSION = 4  # 3: control tokens in messages are encoded as text; 4: tokens of a preference's chosen answer
_SAMPLES_WITHOUT_RAY = 10_000
_ROWS_PER_GROUP = 2**18  # in the file: a task of the stream reads the groups that hold its examples
_SHARDS_AT_ONCE = 1_000  # whose lengths are counted or wait to be written


def measure_lengths(prepared: PreparedData, settings: EncoderSettings, max_rejected: float) -> TokenLengths:
    """Return the lengths of every example of ``prepared``, from the file if it exists.

    Raises DataError when more than ``max_rejected`` of the rows are rejected here and in preparation together.
    """
    key = _lengths_key(prepared, settings)
    folder = f"{prepared.path}/tokens-{key}"
    files, root = fsspec.core.url_to_fs(folder)
    path = f"{root}/{LENGTHS_FILE}"
    if not files.exists(path):
        files.makedirs(root, exist_ok=True)
        # Renamed when complete: the existence of the file means that every length is in it.
        with files.open(f"{path}.part", "wb") as stream:
            rejected = _write_lengths(stream, _measure_shards(prepared, settings), key)
        with files.open(f"{root}/rejected.jsonl", "w") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rejected)
        _check_rejected_share(prepared, rejected, max_rejected, f"{folder}/rejected.jsonl")
        files.mv(f"{path}.part", path)
    return TokenLengths.open(folder, key)


def _write_lengths(
    stream: BinaryIO, shards: Iterable[tuple[pa.Table, list[dict[str, str]]]], key: str
) -> list[dict[str, str]]:
    """Write the shards' rows as they come, in groups, and return the rejected ones; ``key`` is of the settings."""
    rejected: list[dict[str, str]] = []
    waiting: list[pa.Table] = []
    with pq.ParquetWriter(stream, SCHEMA) as writer:
        for table, refused in shards:
            waiting.append(table)
            rejected += refused
            if sum(map(len, waiting)) >= _ROWS_PER_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
        writer.add_key_value_metadata({"rejected": str(len(rejected)), "settings": key})
    return rejected


def _measure_shards(
    prepared: PreparedData, settings: EncoderSettings
) -> Iterator[tuple[pa.Table, list[dict[str, str]]]]:
    """Tokenise all shards, a Ray task each; a few thousand samples are faster in this process than a task starts."""
    shards = [(prepared.path, shard.name, index, settings) for index, shard in enumerate(prepared.shards)]
    # Below this, starting worker processes takes longer than tokenising here.
    if prepared.num_samples <= _SAMPLES_WITHOUT_RAY:
        yield from (_measure_shard(*shard) for shard in shards)
        return
    measure = ray.remote(_measure_shard).options(**in_pool("decode"))
    pending: deque[ray.ObjectRef] = deque()
    with tqdm(total=len(shards), desc="token lengths", unit="shard", file=terminal()) as bar:
        for number in range(len(shards) + _SHARDS_AT_ONCE):
            if number < len(shards):
                pending.append(measure.remote(*shards[number]))
            if number >= _SHARDS_AT_ONCE and pending:
                yield ray.get(pending.popleft())
                bar.update()


def _measure_shard(
    path: str, name: str, index: int, settings: EncoderSettings
) -> tuple[pa.Table, list[dict[str, str]]]:
    """Return the example rows of one shard, and the rejected rows with their reasons."""
    encoder = load_encoder(settings)
    shard = read_shard_rows(
        path, name, None, columns=["id", "turns", "rejected", "widths", "heights", "source"]
    ).to_pylist()
    rows: list[tuple[Any, ...]] = []
    rejected: list[dict[str, str]] = []
    for number, record in enumerate(shard):
        try:
            examples = encode_row(encoder, record)
        except RecordError as error:
            message = f"record {record['id']} ({record['source']}): {error}"
            rejected.append(
                {"id": record["id"], "source": record["source"], "reason": error.reason, "message": message}
            )
            continue
        rows += [
            (
                index,
                number,
                part,
                record["id"],
                len(e.input_ids),
                e.num_supervised,
                e.num_chosen,
                len(e.images),
                e.truncated,
            )
            for part, e in enumerate(examples)
        ]
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in SCHEMA]
    return pa.table(columns, schema=SCHEMA), rejected


def _check_rejected_share(
    prepared: PreparedData, rejected: list[dict[str, str]], max_rejected: float, path: str
) -> None:
    """Raise DataError for too many rejected rows, with counts and the first messages."""
    total = prepared.num_samples + prepared.num_rejected
    lost = len(rejected) + prepared.num_rejected
    if lost > max_rejected * total or lost == total:
        first = "; ".join(row["message"] for row in rejected[:3])
        raise DataError(
            f"{lost} of {total} rows are rejected, over data.max_rejected = {max_rejected:g}: {first}; "
            f"all are in {path}; fix the data, or raise data.max_rejected"
        )


def _lengths_key(prepared: PreparedData, settings: EncoderSettings) -> str:
    """Return 12 hex digits of everything that decides token lengths."""
    encoder = load_encoder(settings)
    tokenizer = encoder.tokenizer
    parts = [
        str(_FORMAT_VERSION),
        prepared.data_hash,
        tokenizer.backend_tokenizer.to_str(),
        str(tokenizer.chat_template),
        str(tokenizer.bos_token),
        repr(encoder.template),
        repr(encoder.image_tokens),
        str(settings.model_max_length),
        settings.on_too_long,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
