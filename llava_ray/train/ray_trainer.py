"""Ray Train's trainer of a run: its workers, its stream, its checkpoints."""

import os
from collections.abc import Sequence
from functools import partial

from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.plan import Plan
from llava_ray.data.stream import DealToRanks, TrainStream
from llava_ray.data.token_lengths import TokenLengths
from llava_ray.placement import pool_selector
from llava_ray.runtime import Resources
from llava_ray.train.failures import FailureTeller
from llava_ray.train.process_group import ProcessGroupConfig
from llava_ray.train.runs import RunFolder, SnapshotKeeper, committed_step
from llava_ray.train.score_history import KEPT_BY
from llava_ray.train.settings import LoopSettings
from llava_ray.train.stopping import StoppableTrainer
from llava_ray.train.worker import run_worker
from llava_ray.worker_forks import import_environment

# How long Ray's controller waits for a worker that does not answer: the only one there is, or all, may be stopped.
_HEALTH_CHECK = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
_SHORTEST_HEALTH_CHECK_S = 60.0
_health_check_of_user = os.environ.get(_HEALTH_CHECK)


def scaling(resources: Resources) -> ScalingConfig:
    """Return the workers' resources and placement."""
    return ScalingConfig(
        num_workers=resources.num_workers,
        use_gpu=resources.use_gpu,
        resources_per_worker=resources.bundle,
        accelerator_type=resources.accelerator_type,
        label_selector=pool_selector("train"),
    )


def worker_environment(config: FinetuneConfig, resources: Resources) -> dict[str, str]:
    """Return the environment variables of the train workers, which they set before they import torch."""
    variables = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(resources.num_threads)}
    if resources.use_gpu:  # rows of different lengths would leave gaps that nothing fits into
        variables["PYTORCH_CUDA_ALLOC_CONF"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return variables | import_environment(config, use_gpu=resources.use_gpu)


def build_trainer(
    settings: LoopSettings,
    run: RunFolder,
    plan: Plan,
    lengths: TokenLengths,
    resources: Resources,
    callbacks: Sequence[UserCallback],
) -> StoppableTrainer:
    """Build Ray Train's trainer of a run: its workers, its stream, its checkpoints."""
    config, until = settings.config, settings.until
    if config.run.hang_minutes and _health_check_of_user is None:  # Ray passes this variable on to its controller
        os.environ[_HEALTH_CHECK] = str(max(_SHORTEST_HEALTH_CHECK_S, config.run.hang_minutes * 60 / 2))
    return StoppableTrainer(
        run_worker,
        train_loop_config={"settings": settings},
        backend_config=ProcessGroupConfig(
            "nccl" if resources.use_gpu else "gloo", environment=worker_environment(config, resources)
        ),
        scaling_config=scaling(resources),
        run_config=RunConfig(
            name=run.name,
            storage_path=run.storage_path,
            failure_config=FailureConfig(max_failures=config.run.max_failures),
            # The best beside the last, or the last.
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.train.save_total_limit,
                checkpoint_score_attribute=KEPT_BY if config.held_out.keep_best else None,
            ),
            callbacks=[SnapshotKeeper(run), FailureTeller(settings.journal), *callbacks],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        datasets=None
        if settings.rollouts
        else {"train": TrainStream(partial(committed_step, run.storage_path, run.name), until)},
        dataset_config=DealToRanks(plan, until, lengths, settings.stream),
    )
