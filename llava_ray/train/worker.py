"""Where Ray Train enters a worker: the stream sets out first, then come the imports that take seconds."""

import logging
from typing import Any

import ray.train

from llava_ray.data.blocks import start_blocks


def run_worker(given: dict[str, Any]) -> None:
    """Tune as ``given["settings"]`` (LoopSettings) say."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # or it tells of every checkpoint, across the progress bar
    blocks = start_blocks(lambda: ray.train.get_dataset_shard("train"))
    from llava_ray.train.loop import train_loop  # torch, transformers and DeepSpeed

    train_loop(given["settings"], blocks)
