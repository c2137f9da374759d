"""A language model as a GGUF file: its settings and tensors by llama.cpp's names."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llava_ray.errors import ModelError
from llava_ray.model.formats.gguf.files import TensorType, import_gguf, write_gguf
from llava_ray.model.formats.gguf.vocabulary_keys import find_vocabulary
from llava_ray.model.formats.model_files import ModelFiles
from llava_ray.model.formats.names import LANGUAGE_MODEL_PREFIX
from llava_ray.model.tensors.weight_files import Stored

# transformers' model types → llama.cpp's architectures whose graphs compute the same.
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def write_language_model(model: ModelFiles, file: Path, wanted: TensorType) -> None:
    """Write the language model of a model. Raises ModelError, naming what, for one that llama.cpp does not read."""
    config = model.language_config
    architecture = _find_architecture(config)
    tensors = _name_tensors(model, architecture)
    vocabulary = find_vocabulary(model, num_rows=tensors["token_embd.weight"].shape[0])

    def describe(writer: Any) -> None:
        writer.add_name(model.folder.name)
        _describe(writer, config, model.manifest.model_max_length)
        vocabulary.write(writer)

    write_gguf(file, architecture, tensors, wanted, describe)


def check_language_model_for_gguf(model: ModelFiles) -> None:
    """Check that llama.cpp reads a language model. Raises ModelError that names what it does not."""
    architecture = _find_architecture(model.language_config)
    rows = _name_tensors(model, architecture)["token_embd.weight"].shape[0]
    find_vocabulary(model, num_rows=rows)


def _find_architecture(config: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a model's architecture. Raises ModelError."""
    kind = config["model_type"]
    if kind not in _ARCHITECTURES:
        raise _unread("language model", f"it is {kind!r}, and exported are {', '.join(_ARCHITECTURES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise _unread("language model", f"its hidden_act is {config['hidden_act']!r}, and llama.cpp computes silu")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling not in ("default", "linear"):
        raise _unread("language model", f"its positions are scaled by {scaling!r}, and exported are default and linear")
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < config["max_position_embeddings"]:
        raise _unread(
            "language model",
            f"its attention has a sliding window of {window:,} tokens, and llama.cpp's {_ARCHITECTURES[kind]} none",
        )
    return _ARCHITECTURES[kind]


def _describe(writer: Any, config: Mapping[str, Any], max_length: int) -> None:
    """Write the sizes of a model."""
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head_width = config.get("head_dim") or width // heads
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    writer.add_context_length(config["max_position_embeddings"] or max_length)
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_rope_dimension_count(head_width)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0))
    if "factor" in rope:
        writer.add_rope_scaling_type(import_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _name_tensors(model: ModelFiles, architecture: str) -> dict[str, Stored]:
    """Return the tensors by llama.cpp's names, in its order of rows. Raises ModelError."""
    gguf, config = import_gguf(), model.language_config
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    own = model.part(LANGUAGE_MODEL_PREFIX)
    if config.get("tie_word_embeddings"):
        own.pop(_HEAD, None)
    elif _HEAD not in own and _EMBEDDINGS in own:
        raise _unread("language model", f"{_HEAD} is missing, and its config does not tie it to the embeddings")
    named: dict[str, Stored] = {}
    for name, tensor in own.items():
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _unread("language model", f"llama.cpp's {architecture} has no tensor for {name}")
        named[found] = _with_rows_in_order(name, tensor, config) if architecture == "llama" else tensor
    return named


def _with_rows_in_order(name: str, tensor: Stored, config: Mapping[str, Any]) -> Stored:
    """Return queries and keys with the halves of each head interleaved: Llama's own order, which llama.cpp rotates."""
    layer = name.split(".")[-2]
    if layer not in ("q_proj", "k_proj"):
        return tensor
    heads = config["num_attention_heads"]
    if layer == "k_proj":
        heads = config.get("num_key_value_heads") or heads

    def interleave(values: Tensor) -> Tensor:
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)

    return replace(tensor, load=lambda: interleave(tensor.load()))


def _unread(part: str, why: str) -> ModelError:
    return ModelError(f"{part}: llama.cpp cannot read this one: {why}. Keep the bundle, or export it as hub.")
