"""Images on their way through the stream's stages, run here one after the other without Ray."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from losses import sample_losses
from samples import SHAPES, small_run, write_mixed_samples

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.batches import MicroBatch, micro_batch
from llava_ray.data.descriptors import describe_micro_batches
from llava_ray.data.encoder_settings import EncoderSettings
from llava_ray.data.features import FeatureActor
from llava_ray.data.lengths import measure_lengths
from llava_ray.data.packing import NO_STEP
from llava_ray.data.plan import Plan
from llava_ray.data.records import RawRecord
from llava_ray.data.settings import StreamSettings
from llava_ray.data.shards import PreparedData, ShardWriter, write_shards_manifest
from llava_ray.data.stages import decode_block_images, read_micro_batches
from llava_ray.data.token_lengths import TokenLengths
from llava_ray.data.validation import validate
from llava_ray.errors import DataError
from llava_ray.images.geometry import crop_views
from llava_ray.images.processing import normalize_pixels
from llava_ray.images.reading import open_image
from llava_ray.model.assembly import LlavaParts, assemble

pytestmark = pytest.mark.slow

ANYRES = {"data.image_aspect_ratio": "anyres", "model.mm_patch_merge_type": "spatial_unpad"}
NUM_SAMPLES = 16


@dataclass(frozen=True)
class Streamed:
    """A run's data path, up to what its workers would be dealt."""

    config: FinetuneConfig
    parts: LlavaParts
    lengths: TokenLengths
    settings: StreamSettings
    table: pa.Table

    def batches(self, table: pa.Table) -> list[MicroBatch]:
        return [micro_batch(row, self.settings) for row in table.to_pylist() if row["step"] != NO_STEP]


def prepare_here(config: FinetuneConfig, folder: Path) -> PreparedData:
    """What prepare_data does, in this process."""
    writer = ShardWriter(str(folder), "shard-00000", max_rows=100, max_bytes=10**9)
    for index, record in enumerate(json.loads(Path(config.data.data_path).read_text())):
        raw = RawRecord(record["id"], f"data.json:{index}", record)
        writer.append(validate(raw, str(config.data.image_folder), max_pixels=10**9))
    return write_shards_manifest(str(folder), writer.flush(), {}, {})


def stream_here(folder: Path, **changes: object) -> Streamed:
    write_mixed_samples(folder, NUM_SAMPLES)
    config = small_run(folder, **{**ANYRES, "train.model_max_length": 600, **changes})
    parts = assemble(config.model, config.data.image_aspect_ratio)
    prepared = prepare_here(config, folder / "prepared")
    encoder = EncoderSettings.of(parts, config.data, config.train)
    lengths = measure_lengths(prepared, encoder, 1.0)
    plan = Plan(lengths.column("num_tokens"), lengths.column("shard"), 8, 1, 0, 0)
    settings = StreamSettings(
        prepared_path=prepared.path,
        shard_names=tuple(shard.name for shard in prepared.shards),
        encoder=encoder,
        model=config.model,
        image_spec=parts.image_spec,
        image_tokens=parts.image_tokens,
        mm_hidden_size=parts.mm_hidden_size,
        row_length=config.train.row_length,
        data=config.data,
        bf16=False,
        vision_gpus=0,
    )
    descriptors = describe_micro_batches(plan, lengths, range(plan.num_steps), config.train.row_length, 1)
    table = pa.concat_tables([part for some in descriptors for part in read_micro_batches(some, settings)])
    return Streamed(config, parts, lengths, settings, table)


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Streamed:
    return stream_here(tmp_path_factory.mktemp("stream"))


def test_views_of_all_images_travel_as_bytes_in_order(streamed: Streamed) -> None:
    decoded = decode_block_images(streamed.table, streamed.settings)
    assert decoded.schema.field("pixels").type == pa.large_binary()
    records = {r["id"]: r for r in json.loads(Path(streamed.config.data.data_path).read_text())}
    seen: set[int] = set()
    for batch in streamed.batches(decoded):
        names = [name for sample in batch.ids for name in records[sample].get("images", [])]
        images = [
            open_image((Path(str(streamed.config.data.image_folder)) / name).read_bytes(), name, max_pixels=10**9)
            for name in names
        ]
        assert batch.image_sizes == [image.size for image in images]
        expected = [crop_views(image, streamed.settings.image_spec) for image in images]
        seen |= {len(views) for views in expected}
        if images:
            assert batch.pixels is not None and batch.pixels.dtype == torch.uint8
            assert np.array_equal(batch.pixels.numpy(), np.concatenate(expected))
        else:
            assert batch.pixels is None
    assert seen == {3, 4, 5}


def test_text_only_samples_and_several_images_are_among_them(streamed: Streamed) -> None:
    assert set(streamed.lengths.column("num_images").tolist()) == {0, 1, 2, 3}
    assert streamed.lengths.num_rejected == 0
    for batch in streamed.batches(decode_block_images(streamed.table, streamed.settings)):
        counted = sum(streamed.settings.image_tokens.count(*size) for size in batch.image_sizes)
        assert int((batch.input_ids == -200).sum()) == counted


@torch.no_grad()
def losses(parts: LlavaParts, batch: MicroBatch, features: torch.Tensor | None) -> torch.Tensor:
    return sample_losses(parts.llava, batch.input_ids, batch.position_ids, batch.labels, features, batch.image_sizes)[0]


@pytest.mark.parametrize("changes", [{}, {"model.s2": True}], ids=["one scale", "s2"])
def test_streamed_features_are_those_of_the_worker(changes: dict[str, object], tmp_path: Path) -> None:
    streamed = stream_here(tmp_path, **changes)
    decoded = decode_block_images(streamed.table, streamed.settings)
    actor = FeatureActor(streamed.settings)
    ahead = actor.replace_pixels(decoded)
    assert "pixels" not in ahead.column_names
    num_with_images = 0
    for inline, batch in zip(streamed.batches(decoded), streamed.batches(ahead), strict=True):
        features = None
        if inline.pixels is not None:
            num_with_images += 1
            features = streamed.parts.tower(normalize_pixels(inline.pixels, streamed.settings.image_spec))
            torch.testing.assert_close(batch.features, features, rtol=0, atol=1e-5)
        expected, found = losses(streamed.parts, inline, features), losses(streamed.parts, batch, batch.features)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert num_with_images


def test_packed_rows_have_the_losses_of_each_sample_alone(streamed: Streamed) -> None:
    decoded = decode_block_images(streamed.table, streamed.settings)
    actor = FeatureActor(streamed.settings)
    num_packed = 0
    for batch in streamed.batches(actor.replace_pixels(decoded)):
        together = losses(streamed.parts, batch, batch.features)
        start = first_image = first_view = 0
        for number, length in enumerate(batch.num_tokens):
            place = slice(start, start + length)
            ids = batch.input_ids[:, place]
            count, num_images, num_views = int((ids == -200).sum()), 0, 0
            while count:
                size = batch.image_sizes[first_image + num_images]
                count -= streamed.settings.image_tokens.count(*size)
                num_views += streamed.settings.image_tokens.num_views(*size)
                num_images += 1
            features = None
            if num_images:
                assert batch.features is not None
                features = batch.features[first_view : first_view + num_views]
            alone = sample_losses(
                streamed.parts.llava,
                ids,
                batch.position_ids[:, place],
                batch.labels[:, place],
                features,
                batch.image_sizes[first_image : first_image + num_images],
            )[0]
            torch.testing.assert_close(alone.detach(), together[number : number + 1], rtol=0, atol=1e-5)
            start, first_image, first_view = start + length, first_image + num_images, first_view + num_views
        num_packed += len(batch.num_tokens) > 1
    assert num_packed


def test_a_sample_with_an_image_too_long_alone_is_rejected_and_counted(tmp_path: Path) -> None:
    # The square of four views takes 16 + 8 x 9 = 88 positions, more than a whole sample may. A template of few words
    # leaves room for the others.
    streamed = stream_here(tmp_path, **{"train.model_max_length": 87, "model.version": "mistral_instruct"})
    rejected = [json.loads(line) for line in Path(streamed.lengths.path, "rejected.jsonl").read_text().splitlines()]
    messages = [row["message"] for row in rejected if row["reason"] == "image_too_long"]
    assert messages
    assert all("64 x 64 pixels) alone takes 88 tokens, over model_max_length = 87" in message for message in messages)
    kept = {sample for row in streamed.table["ids"].to_pylist() for sample in row}
    assert kept
    assert not kept & {row["id"] for row in rejected}
    assert len(kept) + len(rejected) == NUM_SAMPLES


def test_an_image_of_another_size_than_was_prepared_is_an_error(streamed: Streamed) -> None:
    sizes = [[[width + 1, height] for width, height in row] for row in streamed.table["image_sizes"].to_pylist()]
    position = streamed.table.column_names.index("image_sizes")
    field = streamed.table.schema.field("image_sizes")
    changed = streamed.table.set_column(position, field, pa.array(sizes, field.type))
    with pytest.raises(DataError, match=r"decodes to \(\d+, \d+\) pixels, but was prepared as"):
        decode_block_images(changed, streamed.settings)


def test_lengths_are_measured_again_for_other_canvases(streamed: Streamed, tmp_path: Path) -> None:
    other = stream_here(tmp_path, **{"model.image_grid_pinpoints": [[32, 64], [64, 32]]})
    assert Path(other.lengths.path).name != Path(streamed.lengths.path).name
    assert max(other.lengths.column("num_tokens")) < max(streamed.lengths.column("num_tokens"))


def test_the_shapes_of_the_samples_are_told_apart(streamed: Streamed) -> None:
    counts = [streamed.settings.image_tokens.count(*size) for size in SHAPES]
    assert len(set(counts)) == len(counts)
