"""Where Ray Train enters a worker: the stream sets out first, then come the imports that take seconds."""

import logging
from typing import Any

import ray.train

from llava_ray.data.blocks import start_blocks


def run_worker(given: dict[str, Any]) -> None:
    """Tune as ``given["settings"]`` (LoopSettings) say."""
    # Ray Train sets the root to INFO, and tells there of every checkpoint (its logger has a file's name, not its own).
    logging.getLogger().setLevel(logging.WARNING)
    blocks = start_blocks(lambda: ray.train.get_dataset_shard("train"))
    from llava_ray.train.loop import train_loop  # torch, transformers and DeepSpeed

    train_loop(given["settings"], blocks)
