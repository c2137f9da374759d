"""Atomic writing of bundle folders, and of full tensors as ordinary transformers folders."""

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from llava_ray.errors import BundleError
from llava_ray.model.formats.manifest import is_bundle

_MAX_SHARD_SIZE = "5GB"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_weights(folder: Path, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` under the names that ``model.save_pretrained`` would give them, with config.json.

    ``model`` supplies class and config only: under ZeRO 3 its own tensors are empty, and transformers would write wrong
    names for them. So a skeleton on the meta device, which takes no memory, stands in for it. A tensor shared by two
    names is written once.
    Raises BundleError for a tensor that is missing, unknown or of another shape.
    """
    with torch.device("meta"):
        skeleton: PreTrainedModel = type(model)(copy.deepcopy(model.config))
    nn.Module.to(skeleton, next(iter(tensors.values())).dtype)
    if skeleton.can_generate():
        skeleton.generation_config = sanitize_generation_config(model.generation_config)
    skeleton.save_pretrained(folder, state_dict=_check_tensors(skeleton, tensors), max_shard_size=_MAX_SHARD_SIZE)


def _check_tensors(skeleton: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return exactly the tensors to write. Raises BundleError."""
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

    Some published models (Vicuna among them) have sampling settings without ``do_sample``: saving these unchanged would
    fail at the end of a whole training run.
    """
    try:
        config.validate(strict=True)
    except ValueError:
        return GenerationConfig.from_dict({key: getattr(config, key) for key in _TOKEN_IDS})
    return config


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield a new folder that replaces the bundle ``folder`` once all of it is written.

    Raises BundleError if it cannot be written, or if ``folder`` holds anything but a bundle.
    """
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    try:
        if folder.exists() and not is_bundle(folder) and any(folder.iterdir()):
            raise BundleError(f"{folder} exists already and is not a llava_ray bundle; choose another folder.")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        # Renames are atomic within one filesystem: at any moment the old or the new bundle is complete under some name.
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"the model cannot be written to {folder} ({error}); free space, or choose a folder that can be written. "
            "A bundle that was there before has not been lost."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
