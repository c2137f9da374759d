"""transformers' models made of stored tensors: its own loading, fed one tensor at a time."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from llava_ray.errors import ModelError
from llava_ray.model.sources import Source, loading
from llava_ray.model.tensor_files import StoredTensor
from llava_ray.model.tensor_reading import LazyTensor, map_tensor

GENERATION_CONFIG = "generation_config.json"


def load_pretrained(
    classes: Any, config: PreTrainedConfig, source: Source, part: str, **options: Any
) -> PreTrainedModel:
    """Make a model of exactly the source's tensors.

    ``classes`` is transformers' mapping from configs to models, ``options`` are those of ``from_pretrained``. Raises
    ModelError that names the first tensor that is missing, unknown or of another shape.
    """
    with loading(source.folder, part):
        model, info = classes[type(config)].from_pretrained(
            None,
            config=config,
            state_dict=as_state_dict(source.tensors),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    check_loaded(info, source, part)
    model.config.name_or_path = str(source.folder)
    if model.can_generate() and (source.beside / GENERATION_CONFIG).is_file():
        generation: Any = GenerationConfig  # untyped in transformers
        with loading(source.beside / GENERATION_CONFIG, part):
            model.generation_config = generation.from_pretrained(source.beside)
    loaded: PreTrainedModel = model
    return loaded


def as_state_dict(tensors: Mapping[str, StoredTensor]) -> dict[str, LazyTensor | Tensor]:
    """Return tensors as transformers takes them: read when wanted.

    Under ZeRO 3 they must be real ones, of which only rank 0 looks at the values: there they are mapped.
    """
    if is_deepspeed_zero3_enabled():
        return {name: map_tensor(tensor) for name, tensor in tensors.items()}
    return {name: LazyTensor(tensor) for name, tensor in tensors.items()}


def check_loaded(info: Mapping[str, Any], source: Source, part: str) -> None:
    """Raise ModelError unless the model has taken every tensor, and made up none."""
    where = f"the {part} in {source.folder}"
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise ModelError(
            f"{where}: {len(mismatched)} tensors have another shape than its config.json says, the first is {name}: "
            f"found {list(found)}{_file_of(name, source)}, expected {list(expected)}. These are not one model's files."
        )
    if made_up := sorted(info["missing_keys"]):
        raise ModelError(
            f"{where} lacks {len(made_up)} tensors, the first is {made_up[0]}; they would be random. "
            "Expected all weights of the class named in config.json; copy the folder again."
        )
    if unknown := sorted(info["unexpected_keys"]):
        raise ModelError(
            f"{where} holds {len(unknown)} tensors that a model of type {source.config.get('model_type')!r} does not "
            f"have, the first is {unknown[0]}{_file_of(unknown[0], source)}. These are not one model's files."
        )
    if errors := info.get("error_msgs"):
        raise ModelError(f"{where} cannot be loaded: {errors[0]}")


def _file_of(name: str, source: Source) -> str:
    return f" in {source.tensors[name].file.name}" if name in source.tensors else ""
