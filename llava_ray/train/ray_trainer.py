"""Ray Train's trainer of a run: its workers, its stream, its checkpoints."""

from collections.abc import Sequence
from functools import partial

from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback

from llava_ray.config.sections import FinetuneConfig
from llava_ray.data.lengths import TokenLengths
from llava_ray.data.plan import Plan
from llava_ray.data.stream import DealToRanks, TrainStream
from llava_ray.placement import pool_selector
from llava_ray.runtime import Resources
from llava_ray.train.process_group import ProcessGroupConfig
from llava_ray.train.runs import RunFolder, SnapshotKeeper, committed_step
from llava_ray.train.settings import LoopSettings
from llava_ray.train.stopping import StoppableTrainer
from llava_ray.train.worker import run_worker
from llava_ray.worker_forks import import_environment


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
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.save_total_limit),
            callbacks=[SnapshotKeeper(run), *callbacks],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
        datasets={"train": TrainStream(partial(committed_step, run.storage_path, run.name), until)},
        dataset_config=DealToRanks(plan, until, lengths, settings.stream),
    )
