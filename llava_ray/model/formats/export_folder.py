"""Shared steps of all exports: an atomically written folder, configs, tokenizer, tower."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from llava_ray.errors import ModelError
from llava_ray.model.formats.model_files import ModelFiles
from llava_ray.model.formats.names import IMAGE_NEWLINE, PROJECTOR_PREFIX, VISION_MODEL_PREFIX, VISION_TOWER_PREFIX
from llava_ray.model.formats.saved_weights import replacing
from llava_ray.model.formats.sources import load_padding_tokenizer
from llava_ray.model.formats.vocabulary_rows import EMBEDDINGS, with_rows
from llava_ray.model.tensors.weight_files import Stored, write_folder

# Towers whose tensors transformers 4 and vLLM expect one level deeper.
WITH_VISION_MODEL = ("clip_vision_model", "siglip_vision_model")


@dataclass(frozen=True)
class Exported:
    """The folder of an export, and notes for the user."""

    folder: Path
    notes: tuple[str, ...] = ()


def load_own_tokenizer(model: ModelFiles) -> PreTrainedTokenizerBase:
    """Load the tokenizer with the language model's own chat template, which a hub folder replaces by LLaVA's."""
    tokenizer = load_padding_tokenizer(model.tokenizer_folder)
    if model.noted_template:
        tokenizer.chat_template = model.noted_template[0]
    return tokenizer


@contextmanager
def new_folder(output: str | Path) -> Iterator[Path]:
    """Yield a new folder that becomes ``output`` once all is written. Raises ModelError if that exists already."""
    check_not_existing(output)
    with replacing(Path(output).absolute()) as new:
        yield new


def check_not_existing(output: str | Path) -> None:
    """Raise ModelError if the output exists already."""
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists already; an export overwrites nothing. Choose another folder.")


def with_dtype(config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """Return a part's config with the dtype that its tensors have."""
    values = {key: value for key, value in config.items() if key != "torch_dtype"}
    return values | {"dtype": str(next(iter(tensors.values())).dtype).removeprefix("torch.")}


def write_json_file(file: Path, values: Mapping[str, Any]) -> None:
    """Write an indented JSON file."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def with_vocabulary(model: ModelFiles, vocabulary: Literal["kept", "truncated"]) -> tuple[ModelFiles, int]:
    """Return the model with its vocabulary rows kept or truncated to the language model's own, and their number."""
    if EMBEDDINGS not in model.tensors:  # names other than Llama's: never extended, so never truncated
        return model, model.num_rows
    rows = model.num_rows if vocabulary == "truncated" else model.tensors[EMBEDDINGS].shape[0]
    config = {**model.language_config, "vocab_size": rows}
    return replace(model, tensors=with_rows(model.tensors, rows), language_config=config), rows


def projector_tensors_of(model: ModelFiles) -> dict[str, Stored]:
    """Return the tensors of the projector, and ``image_newline`` where the model has it, by canonical name."""
    return {n: t for n, t in model.tensors.items() if n.startswith(PROJECTOR_PREFIX) or n == IMAGE_NEWLINE}


def write_tower(folder: Path, model: ModelFiles) -> None:
    """Write the vision tower as an ordinary transformers folder, with its preprocessor_config.json."""
    folder.mkdir()
    write_json_file(folder / "config.json", with_dtype(model.tower_config, model.part(VISION_TOWER_PREFIX)))
    write_json_file(folder / "preprocessor_config.json", model.preprocessor)
    level = VISION_MODEL_PREFIX if model.tower_config["model_type"] in WITH_VISION_MODEL else ""
    write_folder(folder, {level + name: tensor for name, tensor in model.part(VISION_TOWER_PREFIX).items()})
