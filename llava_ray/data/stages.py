"""The stages of the stream as functions of tables: read and tokenise, then decode images or look up their features.

Several of Ray's own processes import this module to pass it on, so it imports neither torch nor transformers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from llava_ray.data.descriptors import describe_window
from llava_ray.data.encoder_settings import load_encoder
from llava_ray.data.examples import Example
from llava_ray.data.feature_cache import fetch_features, location_key, split_location
from llava_ray.data.packing import (
    PACKED_SCHEMA,
    ROWS_PER_BLOCK,
    pack_block,
    pack_micro_batch,
    replace_cells,
    unpack_block,
)
from llava_ray.data.record_examples import encode_row
from llava_ray.data.settings import StreamSettings
from llava_ray.data.shards import read_shard_rows
from llava_ray.data.token_lengths import TokenLengths
from llava_ray.errors import DataError
from llava_ray.images.geometry import crop_views
from llava_ray.images.reading import open_image

_RECORD_COLUMNS = ["id", "turns", "rejected", "images", "widths", "heights"]


def read_blocks(
    windows: pa.Table, settings: StreamSettings, lengths: TokenLengths, world_size: int
) -> Iterator[pa.Table]:
    """Yield the micro-batches of windows (see ``descriptors.StepWindow``), a block at a time."""
    for window in windows.to_pylist():
        descriptors = describe_window(
            window, lengths, settings.row_length, world_size, settings.cost, settings.reference
        )
        yield from map(pack_block, read_micro_batches(descriptors, settings))


class BlockImageDecoder:
    """An actor that turns the encoded images of a block into pixels, or into their cached features."""

    def __init__(self, settings: StreamSettings) -> None:
        """Store the settings."""
        self.settings = settings

    def __call__(self, block: pa.Table) -> pa.Table:
        """Decode the images of a block, or look up their features."""
        return pack_block(add_images(unpack_block(block), self.settings))


def read_micro_batches(descriptors: pa.Table, settings: StreamSettings) -> Iterator[pa.Table]:
    """Read the records of one window and yield its micro-batches, packed, images still encoded."""
    encode = _row_encoder(settings)
    records = fetch_records(descriptors, settings)
    for start in range(0, descriptors.num_rows, ROWS_PER_BLOCK):
        rows = descriptors.slice(start, ROWS_PER_BLOCK).to_pylist()
        yield pa.Table.from_pylist([pack_micro_batch(row, records, encode) for row in rows], schema=PACKED_SCHEMA)


def _row_encoder(settings: StreamSettings) -> Callable[[Mapping[str, Any]], list[Example]]:
    """Return what encodes a record by the tokenizer, template and length rule of its source."""
    encoders = [load_encoder(source.encoder) for source in settings.sources or (settings,)]

    return lambda record: encode_row(encoders[record.get("source_number", 0)], record)


def fetch_records(descriptors: pa.Table, settings: StreamSettings) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the records that the descriptors name, each shard read once.

    Those of a mixture are named by their source and id, which is then unique, and have the number of the source.
    """
    wanted: dict[int, set[int]] = {}
    for shards, rows in zip(descriptors["shard"].to_pylist(), descriptors["row"].to_pylist(), strict=True):
        for shard, row in zip(shards, rows, strict=True):
            wanted.setdefault(shard, set()).add(row)
    records: dict[tuple[int, int], dict[str, Any]] = {}
    columns = [name for name in _RECORD_COLUMNS if name != "images" or not settings.is_cached]
    for shard, row_set in wanted.items():
        rows = sorted(row_set)
        place = settings.find_shard(shard)
        source = place.settings
        table = read_shard_rows(source.prepared_path, source.shard_names[place.shard], rows, columns=columns)
        for row, record in zip(rows, table.to_pylist(), strict=True):
            if source.name is not None:
                record |= {"id": f"{source.name}/{record['id']}", "source_number": place.source}
            records[shard, row] = record
    return records


def add_images(table: pa.Table, settings: StreamSettings) -> pa.Table:
    """Replace each row's images by the model's input: pixels, or features from a cache."""
    return load_features(table, settings) if settings.is_cached else decode_block_images(table, settings)


def load_features(table: pa.Table, settings: StreamSettings) -> pa.Table:
    """Replace each row's images by their features from the cache: bytes of (n, p, v) in the tower's dtype."""
    places = table["places"].to_pylist()
    parts = iter(_fetch_from_sources(settings, [place for row in places for place in row]))
    return replace_cells(table, "images", "features", [b"".join(next(parts) for _ in row) for row in places])


def _fetch_from_sources(settings: StreamSettings, places: Sequence[int]) -> list[bytes]:
    """Return the features of images anywhere in a mixture, in order, each from its source's entry of the cache."""
    by_source: dict[int, list[tuple[int, int]]] = {}
    for index, place in enumerate(places):
        shard, row, number = split_location(place)
        found = settings.find_shard(shard)
        by_source.setdefault(found.source, []).append((index, location_key(found.shard, row, number)))
    features: dict[int, bytes] = {}
    for source, asked in by_source.items():
        entry = (settings.sources or (settings,))[source].features
        assert entry is not None
        cells = fetch_features(entry, [place for _, place in asked])
        features |= {index: cell for (index, _), cell in zip(asked, cells, strict=True)}
    return [features[index] for index in range(len(places))]


def decode_block_images(table: pa.Table, settings: StreamSettings) -> pa.Table:
    """Replace each row's encoded images by pixels: bytes of uint8 (n, 3, h, w), views before normalisation."""
    columns = (table[name].to_pylist() for name in ("ids", "images", "image_sizes"))
    pixels = [
        b"".join(decode_views(image, size, ", ".join(ids), settings) for image, size in zip(images, sizes, strict=True))
        for ids, images, sizes in zip(*columns, strict=True)
    ]
    return replace_cells(table, "images", "pixels", pixels)


def decode_views(image: bytes, size: Sequence[int], name: str, settings: StreamSettings) -> bytes:
    """Return one image's pixels; its views were planned for ``size``."""
    opened = open_image(image, name, max_pixels=settings.data.max_image_pixels)
    if opened.size != tuple(size):
        raise DataError(
            f"{name}: an image decodes to {opened.size} pixels, but was prepared as {tuple(size)}; another version of "
            f"Pillow wrote {settings.prepared_path}: delete the folder and prepare again"
        )
    return crop_views(opened, settings.image_spec).tobytes()
