#!/usr/bin/env python
"""Images per second of the training stream, beside a bare Pillow loop on the same cores and the same files.

python tests/benchmarks/bench_stream.py --num-images 20000 --output tests/benchmarks/results/stream.json

Both decode, resize, crop and normalise every image once. The stream also shuffles, tokenises, packs and deals to two
consumers in exact order; its time counts from the first image, and its start-up is given beside it.
"""

import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import ray
from bench_prepare import NUM_CORES, parse_options, time_bare_loop, write_images, write_records
from fakes import make_language_model, make_vision_tower
from outcome import keep_result
from ray.data import DataIterator

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.batches import iterate_steps
from llava_ray.data.blocks import start_blocks
from llava_ray.data.encoder_settings import EncoderSettings
from llava_ray.data.lengths import measure_lengths
from llava_ray.data.plan import Plan
from llava_ray.data.preparation import prepare_data
from llava_ray.data.shards import PreparedData
from llava_ray.data.stream import DealToRanks, StreamSettings, TrainStream
from llava_ray.data.token_lengths import TokenLengths
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.blueprint import Blueprint, read_blueprint

WORLD_SIZE = 2
TARGET = 0.7


@ray.remote(num_cpus=0)
class Consumer:
    """Stands for a train worker: takes its rank's steps and normalises the pixels."""

    def consume(self, shard: DataIterator, rank: int, settings: StreamSettings) -> tuple[int, float, float]:
        """Return how many images came, and when the first and the last did."""
        num_images, first = 0, 0.0
        for batches in iterate_steps(start_blocks(lambda: shard), rank, 0, settings):
            for batch in batches:
                if batch.pixels is not None:
                    first = first or time.time()
                    num_images += len(normalize_pixels(batch.pixels, settings.image_spec))
        return num_images, first, time.time()


def main() -> None:
    """Write the files, time both ways, print and keep the ratio."""
    options = parse_options(__doc__)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = write_images(Path(folder), options.num_images)
        bare = time_bare_loop(paths)
        config = stream_config(Path(folder), write_records(Path(folder), paths, "data"))
        ray.init(address="local", num_cpus=NUM_CORES, include_dashboard=False, log_to_driver=False)
        start_up, streamed = time_stream(config, options.num_images)
        ray.shutdown()
    result = {
        "num_images": options.num_images,
        "num_cores": NUM_CORES,
        "bare_images_per_second": round(options.num_images / bare, 1),
        "stream_images_per_second": round(options.num_images / streamed, 1),
        "stream_start_up_seconds": round(start_up, 1),
        "ratio": round(bare / streamed, 3),
        "ratio_with_start_up": round(bare / (start_up + streamed), 3),
        "target": TARGET,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    keep_result(result, options.output)


def stream_config(folder: Path, data_path: Path) -> FinetuneConfig:
    """Return a run with LLaVA-1.5's rows and image tokens; its model is tiny, only its data path is used."""
    return FinetuneConfig.parsed(
        {
            "model": {
                "model_name_or_path": str(make_language_model(folder / "language_model")),
                "vision_tower": str(make_vision_tower(folder / "vision_tower", image_size=336, patch_size=14)),
            },
            "data": {
                "data_path": str(data_path),
                "image_folder": str(folder / "images"),
                "cache_dir": str(folder / "cache"),
                "samples_per_shard": 256,
            },
            "train": {"global_batch_size": 128, "model_max_length": 2048},
        }
    )


def measure_lengths_of(config: FinetuneConfig) -> tuple[PreparedData, Blueprint, EncoderSettings, TokenLengths]:
    """Prepare the data and count tokens, or find that done."""
    prepared = prepare_data(config.data)
    blueprint = read_blueprint(config.model, config.data.image_aspect_ratio)
    encoder = EncoderSettings.of(blueprint, config.data, config.train)
    return prepared, blueprint, encoder, measure_lengths(prepared, encoder, 0.0)


def time_stream(config: FinetuneConfig, num_images: int) -> tuple[float, float]:
    """Return the seconds until the first image came, and from then to the last."""
    prepared, blueprint, encoder, lengths = measure_lengths_of(config)
    plan = Plan(lengths.column("num_tokens"), lengths.column("shard"), config.train.global_batch_size, 1, 0, 4)
    settings = StreamSettings(
        prepared_path=prepared.path,
        shard_names=tuple(shard.name for shard in prepared.shards),
        encoder=encoder,
        model=config.model,
        image_spec=blueprint.image_spec,
        image_tokens=blueprint.image_tokens,
        mm_hidden_size=blueprint.mm_hidden_size,
        row_length=config.train.row_length,
        data=config.data,
        bf16=False,
        vision_gpus=0,
    )
    start = time.time()
    steps = TrainStream(lambda: 0, plan.num_steps)()
    shards = DealToRanks(plan, plan.num_steps, lengths, settings).configure({"train": steps}, WORLD_SIZE, None, None)
    consumers = [Consumer.remote() for _ in shards]
    counts = ray.get(
        [
            consumer.consume.remote(shard["train"], rank, settings)
            for rank, (consumer, shard) in enumerate(zip(consumers, shards, strict=True))
        ]
    )
    if sum(count for count, _, _ in counts) != num_images:
        raise SystemExit(f"{counts} images came, {num_images} were expected: the comparison would be unfair")
    first = min(first for _, first, _ in counts)
    return first - start, max(last for _, _, last in counts) - first


if __name__ == "__main__":
    main()
