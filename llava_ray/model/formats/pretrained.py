"""Loading of transformers' models from stored tensors, one tensor at a time."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled

from llava_ray.errors import ModelError
from llava_ray.model.formats.declared_sizes import POSITIVE, check_declared
from llava_ray.model.formats.sources import Source, loading
from llava_ray.model.tensors.tensor_files import StoredTensor, read_json_object
from llava_ray.model.tensors.tensor_reading import LazyTensor, map_tensor
from llava_ray.reading import is_file

# Allow for tied heads, which are stored once, and for masks and tables, which are not stored.
_MAX_EXCESS, _MARGIN = 2, 2**24
_GENERATION_CONFIG = "generation_config.json"


def load_pretrained(
    classes: Any, config: PreTrainedConfig, source: Source, part: str, **options: Any
) -> PreTrainedModel:
    """Load a model from exactly the source's tensors.

    ``classes`` is transformers' mapping from configs to models, ``options`` are those of ``from_pretrained``. Raises
    ModelError that names the first tensor that is missing, unknown or of another shape.
    """
    with loading(source.folder, part):
        model, info = classes[type(config)].from_pretrained(
            None,
            config=config,
            # Lazy tensors: transformers reads one at a time, so the peak is the model plus its largest tensor.
            state_dict=_as_state_dict(source.tensors),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **options,
        )
    _check_loaded(info, source, part)
    model.config.name_or_path = str(source.folder)
    if model.can_generate() and is_file(source.beside / _GENERATION_CONFIG):
        generation: Any = GenerationConfig  # untyped in transformers
        check_declared(read_json_object(source.beside / _GENERATION_CONFIG), str(source.beside / _GENERATION_CONFIG))
        with loading(source.beside / _GENERATION_CONFIG, part):
            model.generation_config = generation.from_pretrained(source.beside)
    loaded: PreTrainedModel = model
    return loaded


def check_amount(classes: Any, config: PreTrainedConfig, source: Source, part: str) -> None:
    """Raise ModelError if a config describes a much larger model than the weight files hold.

    transformers would allocate the missing part before noticing. Smaller gaps are reported by name after loading.
    """
    where = f"the {part} in {source.folder}: config.json"
    layers, stored = config.get_text_config().num_hidden_layers, sum(t.numel for t in source.tensors.values())
    if layers > len(source.tensors):
        raise ModelError(f"{where} says num_hidden_layers is {layers:,}, but there are {len(source.tensors)} tensors.")
    skeleton = _make_skeleton(classes, config, source, part)
    described = sum(t.numel() for t in (*skeleton.parameters(), *skeleton.buffers()))
    if described > _MAX_EXCESS * stored + _MARGIN:
        sides = {side for tensor in source.tensors.values() for side in tensor.shape}
        values = config.get_text_config().to_dict()
        odd = [f"{key} {values[key]:,}" for key in sorted(POSITIVE) if _is_odd(values.get(key), sides)]
        raise ModelError(
            f"{where} describes a model of {described:,} numbers, but its weight files hold {stored:,}. These are not "
            f"one model's files (no stored tensor has a side of {', '.join(odd) or 'these sizes'}): copy it again."
        )


def check_shapes(classes: Any, config: PreTrainedConfig, source: Source, part: str) -> None:
    """Raise ModelError if tensors have other shapes than a config implies, matched by name; none is read."""
    check_amount(classes, config, source, part)
    skeleton = _make_skeleton(classes, config, source, part)
    base = f"{skeleton.base_model_prefix}."
    expected = {name.removeprefix(base): tensor.shape for name, tensor in skeleton.state_dict().items()}
    found = {name.removeprefix(base): tensor for name, tensor in source.tensors.items()}
    tied = {name.removeprefix(base) for name in skeleton.all_tied_weights_keys}
    lost = sorted(expected.keys() - found.keys() - tied)
    if lost and found.keys() <= expected.keys():  # otherwise they may have been renamed in newer versions
        raise ModelError(
            f"the {part} in {source.folder} lacks {len(lost)} tensors, the first is {lost[0]}. Expected all weights of "
            "the class named in config.json; copy the folder again."
        )
    for name, tensor in found.items():
        wanted = expected.get(name)
        if wanted is not None and tuple(wanted) != tensor.shape:
            raise ModelError(
                f"the {part} in {source.folder}: {name} in {tensor.file.name} is {list(tensor.shape)}, expected "
                f"{list(wanted)} of its config.json. These are not one model's files."
            )


def _make_skeleton(classes: Any, config: PreTrainedConfig, source: Source, part: str) -> PreTrainedModel:
    """Build a skeleton on the meta device, with shapes but no memory. Raises ModelError for an invalid config."""
    with loading(source.folder, part), torch.device("meta"), no_init_weights():
        skeleton: PreTrainedModel = classes[type(config)](copy.deepcopy(config))
    return skeleton


def _is_odd(value: object, sides: set[int]) -> bool:
    return type(value) is int and value not in sides and value > max(sides, default=0)


def _as_state_dict(tensors: Mapping[str, StoredTensor]) -> dict[str, LazyTensor | Tensor]:
    """Convert tensors for transformers, such that each is read when it is used.

    Under ZeRO 3 transformers needs real tensors, of which only rank 0 uses the values: there they are memory-mapped.
    """
    if is_deepspeed_zero3_enabled():
        return {name: map_tensor(tensor) for name, tensor in tensors.items()}
    return {name: LazyTensor(tensor) for name, tensor in tensors.items()}


def _check_loaded(info: Mapping[str, Any], source: Source, part: str) -> None:
    """Raise ModelError unless the model uses every tensor, and initialised none itself."""
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
