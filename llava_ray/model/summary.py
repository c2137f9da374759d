"""A model's summary: its parts, their sizes and their trainable parameters, from configs alone.

The parts are built without memory (on torch's meta device), so the numbers are those of the real classes, and nothing
is downloaded: a hub id is known if its config is in the hub's cache or one that the shipped recipes name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from llava_ray.config.lora import LoraConfig
from llava_ray.config.sections import FinetuneConfig
from llava_ray.errors import ModelError
from llava_ray.model.blueprint import check_projector_settings, completed
from llava_ray.model.formats.hub.processor import pixels_of
from llava_ray.model.formats.layouts import read_layout
from llava_ray.model.formats.part_configs import build_config, vision_part
from llava_ray.model.freezing import freeze
from llava_ray.model.image_geometry import choose_s2_scales
from llava_ray.model.known_models import KNOWN_CONFIGS
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.projector import build_projector
from llava_ray.model.network.tower import VisionTower
from llava_ray.model.network.tower_families import find_family
from llava_ray.model.tensors.tensor_files import read_json_object

_LANGUAGE_MODEL, _VISION_TOWER = "language_model", "vision_tower"


@dataclass(frozen=True)
class PartSummary:
    """One part: what it is, where it is from, and its parameters."""

    name: str
    kind: str
    origin: str
    num_total: int
    num_trainable: int


@dataclass(frozen=True)
class ModelSummary:
    """A model of parts that have no memory. ``linears`` are (inputs, outputs) of each Linear of the language model."""

    parts: tuple[PartSummary, ...]
    language_model: PreTrainedModel
    tower: VisionTower
    image_side: int
    """Pixels of a view of an image."""
    linears: dict[str, tuple[int, int]]

    def part(self, name: str) -> PartSummary | None:
        """Return the summary of a part, or None."""
        return next((part for part in self.parts if part.name == name), None)


@dataclass(frozen=True)
class FoundConfig:
    """A part's config, where it is from, and the image processor that lies beside a tower's."""

    origin: str
    values: Mapping[str, Any]
    preprocessor: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, origin: str, config: Mapping[str, Any], folder: Path) -> "FoundConfig":
        """Build a FoundConfig, with the image processor in ``folder`` if there is one. Raises ModelError."""
        beside = folder / "preprocessor_config.json"
        return cls(origin, config, read_json_object(beside) if beside.is_file() else None)


def summarize_model(config: FinetuneConfig) -> ModelSummary:
    """Summarise the model that a run would train. Raises ModelError where a config is unknown without a download."""
    language, tower, projector_origin = _find_configs(config)
    tower_config = build_config(vision_part(tower.values), tower.origin)
    side = pixels_of(tower.preprocessor)[0] if tower.preprocessor else int(tower_config.image_size)
    with torch.device("meta"), no_init_weights():  # drawing numbers takes its time even where none are kept
        model = build_language_model(build_config(language.values, language.origin))
        backbone = AutoModel.from_config(tower_config)
        model_config, scales = config.model, choose_s2_scales(config.model, side)
        cut = VisionTower(backbone, model_config.mm_vision_select_layer, model_config.mm_vision_select_feature, scales)
        width = int(model.config.get_text_config().hidden_size)
        projector = build_projector(config.model.mm_projector_type, cut.hidden_size, width)
        llava = Llava(projector, model, cut.hidden_size)
    learning = {part.part: part for part in freeze(llava, cut, config.model)}
    idle = sum(tensor.numel() for tensor in cut.full_state_dict().values()) - learning[_VISION_TOWER].num_total
    head = model.get_output_embeddings()
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    adapter = count_adapter(config.lora, linears)
    kinds = {
        _LANGUAGE_MODEL: (model.config.model_type, language.origin),
        "projector": (config.model.mm_projector_type, projector_origin),
        _VISION_TOWER: (backbone.config.model_type, tower.origin),
    }
    parts = [
        PartSummary(
            name,
            *kinds[name],
            learning[name].num_total + (idle if name == _VISION_TOWER else 0),
            # An adapter learns in place of the weights that it lies over.
            0 if adapter and name == _LANGUAGE_MODEL else learning[name].num_trainable,
        )
        for name in (_LANGUAGE_MODEL, "projector", _VISION_TOWER)
    ]
    if adapter:
        parts.insert(1, PartSummary("adapter", "LoRA", f"r {config.lora.lora_r}", adapter, adapter))
    return ModelSummary(tuple(parts), model, cut, side, linears)


def _find_configs(config: FinetuneConfig) -> tuple[FoundConfig, FoundConfig, str]:
    """Return the configs of the language model and the tower, as far as they can be known without a download.

    And where the projector is from. Raises ModelError as a start would for settings that are not those of a projector
    which the folder brings.
    """
    model = config.model
    projector = model.pretrain_mm_mlp_adapter or "new"
    folder = Path(model.model_name_or_path).expanduser()
    if not folder.is_dir():
        if model.vision_tower is None:
            raise ModelError(
                f"{model.model_name_or_path} is no folder here and model.vision_tower is not set; name one."
            )
        language = find_config(model.model_name_or_path, "language model")
        return language, find_config(model.vision_tower, "vision tower"), projector
    layout = read_layout(folder)
    check_projector_settings(completed(model, layout), layout)
    if model.pretrain_mm_mlp_adapter is None and "mm_projector_type" in layout.settings:
        projector = str(folder)
    if layout.has_language_model and layout.language_config is not None:
        language = FoundConfig(str(folder), layout.language_config)
    else:
        language = find_config(model.model_base or layout.base, "language model")
    if layout.tower_config is not None:
        inside = layout.folder / _VISION_TOWER
        found = FoundConfig.read(str(folder), layout.tower_config, inside if inside.is_dir() else layout.folder)
        return language, found, projector
    return language, find_config(model.vision_tower or layout.vision_tower, "vision tower"), projector


def find_config(name: str | None, part: str) -> FoundConfig:
    """Return the config of a folder, of a hub id in the hub's cache, or a built-in one.

    Raises ModelError if it is none of these: a download would be needed.
    """
    if name is None:
        raise ModelError(f"the {part} is neither inside the model's folder nor named; name it in the recipe.")
    folder = Path(name).expanduser()
    if folder.is_dir():
        layout = read_layout(folder)
        config = layout.tower_config if part == "vision tower" else layout.language_config
        return FoundConfig.read(name, config or layout.config, folder)
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        cached = None
    if isinstance(cached, str):
        return FoundConfig.read(name, read_json_object(Path(cached)), Path(cached).parent)
    if name in KNOWN_CONFIGS:
        return FoundConfig(name, KNOWN_CONFIGS[name])
    raise ModelError(
        f"the size of the {part} cannot be known: {name!r} is no folder here, its config is not in the hub's cache, "
        f"and it is none of {', '.join(KNOWN_CONFIGS)}. A dry run downloads nothing: fetch its config.json first "
        f"(hf download {name} config.json), or give a folder."
    )


def build_language_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a language model on the meta device."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.tie_weights()  # without first weights it is left out too
    return model


def count_adapter(lora: LoraConfig, linears: Mapping[str, tuple[int, int]]) -> int:
    """Count the parameters of a LoRA: for each target r x (inputs + outputs), with DoRA a magnitude for each output."""
    if not lora.lora_enable:
        return 0
    targets = lora.lora_target_modules
    return sum(
        lora.lora_r * (inputs + outputs) + (outputs if lora.use_dora else 0)
        for name, (inputs, outputs) in linears.items()
        if targets is None or any(name == target or name.endswith(f".{target}") for target in targets)
    )


def count_positions(tower: VisionTower, side: int) -> int:
    """Count the tokens that a tower computes for one view of ``side`` x ``side`` pixels, prefix tokens included."""
    patches = (side // tower.config.patch_size) ** 2
    return patches + find_family(tower.config).num_prefix_tokens(tower.config)
