#!/usr/bin/env python
"""Images per second of `prepare_data`, beside a bare Pillow loop on the same cores and the same files.

python tests/benchmarks/bench_prepare.py --num-images 20000 --output tests/benchmarks/results/prepare.json
"""

import argparse
import json
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")

import numpy as np
import ray
from outcome import keep_result
from PIL import Image

from llava_ray.config.data import DataConfig
from llava_ray.data.preparation import prepare_data

NUM_CORES = 2
WIDTH, HEIGHT = 640, 480
NUM_PICTURES = 64  # different ones; each is written many times, as its own file
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
TARGET = 0.7


def main() -> None:
    """Write the files, time both ways, print and keep the ratio."""
    options = parse_options()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = write_images(Path(folder), options.num_images)
        bare = time_bare_loop(paths)
        ray.init(address="local", num_cpus=NUM_CORES, include_dashboard=False, log_to_driver=False)
        prepare(Path(folder), paths[:NUM_CORES], "warm_up")  # starts the worker processes
        prepared = prepare(Path(folder), paths, "cache")
        ray.shutdown()
    result = {
        "num_images": options.num_images,
        "image_size": [WIDTH, HEIGHT],
        "num_cores": NUM_CORES,
        "bare_images_per_second": round(options.num_images / bare, 1),
        "prepare_images_per_second": round(options.num_images / prepared, 1),
        "ratio": round(bare / prepared, 3),
        "target": TARGET,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    keep_result(result, options.output)


def parse_options(description: str | None = __doc__) -> argparse.Namespace:
    """Read the command line of a benchmark over images."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--num-images", type=int, default=20_000)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, help="where the images are written; default: the temporary folder")
    return parser.parse_args()


def write_images(folder: Path, count: int) -> list[Path]:
    """Write photo-like JPEGs (smooth shapes with some grain, about 60 kB) and the JSON that names them."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    pictures = []
    for _ in range(NUM_PICTURES):
        coarse = Image.fromarray(draw.integers(0, 256, (15, 20, 3), np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        grain = draw.integers(-12, 13, smooth.shape, np.int16)
        path = folder / "picture.jpg"
        Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(path, quality=85)
        pictures.append(path.read_bytes())
    paths = [folder / "images" / f"{index}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        path.write_bytes(pictures[index % NUM_PICTURES])
    return paths


def time_bare_loop(paths: list[Path]) -> float:
    """Return the seconds in which plain processes decode, resize, crop and normalise every image."""
    with ProcessPoolExecutor(NUM_CORES) as pool:
        list(pool.map(decode_all, [paths[:1]] * NUM_CORES))  # starts the processes
        start = time.perf_counter()
        list(pool.map(decode_all, [paths[core::NUM_CORES] for core in range(NUM_CORES)]))
        return time.perf_counter() - start


def decode_all(paths: list[Path]) -> None:
    for path in paths:
        image = Image.open(path).convert("RGB").resize((448, 336), Image.Resampling.BICUBIC)
        pixels = np.asarray(image.crop((56, 0, 392, 336)), np.float32)
        ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1).copy()


def prepare(folder: Path, paths: list[Path], cache: str) -> float:
    """Return the seconds that preparing the images takes, from records to manifest."""
    config = DataConfig(
        data_path=str(write_records(folder, paths, cache)),
        image_folder=str(folder / "images"),
        cache_dir=str(folder / cache),
    )
    start = time.perf_counter()
    prepared = prepare_data(config)
    seconds = time.perf_counter() - start
    if prepared.num_samples != len(paths):
        raise SystemExit(f"{prepared.num_samples} of {len(paths)} images prepared: the comparison would be unfair")
    return seconds


def write_records(folder: Path, paths: list[Path], name: str) -> Path:
    """Write a record for each image, and return the JSON's path."""
    records: list[dict[str, Any]] = [
        {
            "id": str(index),
            "image": path.name,
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is shown?"},
                {"from": "gpt", "value": f"Picture number {index}."},
            ],
        }
        for index, path in enumerate(paths)
    ]
    (folder / f"{name}.json").write_text(json.dumps(records))
    return folder / f"{name}.json"


if __name__ == "__main__":
    main()
