"""Full tensors written as an ordinary transformers folder, wherever they were gathered from."""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from llava_ray.errors import BundleError

MAX_SHARD_SIZE = "5GB"


def save_weights(folder: Path, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` under the names that ``model.save_pretrained`` would give them, with config.json.

    ``model`` gives class and config only: under ZeRO 3 its own tensors are empty, and transformers would write wrong
    names for them. So a skeleton without memory stands in for it. A tensor shared by two names is written once.
    Raises BundleError for a tensor that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        skeleton: PreTrainedModel = type(model)(copy.deepcopy(model.config))
    nn.Module.to(skeleton, next(iter(tensors.values())).dtype)
    if skeleton.can_generate():
        skeleton.generation_config = sanitize_generation_config(model.generation_config)
    skeleton.save_pretrained(folder, state_dict=check_tensors(skeleton, tensors), max_shard_size=MAX_SHARD_SIZE)


def check_tensors(skeleton: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return exactly the tensors that have to be written. Raises BundleError."""
    tied = skeleton.all_tied_weights_keys
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items() if name not in tied}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name not in tied}
    if found != shapes:
        wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        name = wrong[0]
        raise BundleError(
            f"{len(wrong)} tensors do not fit {type(skeleton).__name__}, the first is {name}: found "
            f"{found.get(name, 'none')}, expected {shapes.get(name, 'none')}. Gather partitioned tensors before saving."
        )
    return {name: tensors[name].detach().contiguous() for name in shapes}


def sanitize_generation_config(config: GenerationConfig) -> GenerationConfig:
    """Return ``config``, or only its token ids where transformers would refuse to save it.

    Some published models (Vicuna among them) carry sampling settings without ``do_sample``: saving them as they are
    fails at the end of a whole training run.
    """
    try:
        config.validate(strict=True)
    except ValueError:
        return GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
    return config
