"""Ray Train's configuration of the workers of a run."""

from ray.train import ScalingConfig

from llava_ray.config.sections import FinetuneConfig
from llava_ray.placement import pool_selector
from llava_ray.runtime import Resources


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
    """Return the environment variables of the train workers; Ray does not pass on the driver's own."""
    variables = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(resources.num_threads)}
    if not resources.use_gpu:
        variables["DS_ACCELERATOR"] = "cpu"
    if config.lora.quantization is None:
        # We compile nothing, but DeepSpeed decorates an optimizer that we do not use: importing the compiler for it
        # takes seconds of every start. bitsandbytes does compile.
        variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables
