"""Ray Train's entry point in a worker: the stream starts first, then come the imports that take seconds."""

import logging
from typing import Any

import ray.train

from llava_ray.data.blocks import start_blocks


def run_worker(arguments: dict[str, Any]) -> None:
    """Run the training loop with ``arguments["settings"]`` (LoopSettings)."""
    # Ray Train sets the root to INFO, and logs every checkpoint there (its logger has a file's name, not its own).
    logging.getLogger().setLevel(logging.WARNING)
    settings = arguments["settings"]
    blocks = iter(()) if settings.rollouts else start_blocks(lambda: ray.train.get_dataset_shard("train"))
    from llava_ray.train.loop import train_loop  # torch, transformers and DeepSpeed

    train_loop(settings, blocks)
