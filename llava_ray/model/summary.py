"""A model's summary: its parts, their sizes and their trainable parameters, from configs alone.

The parts are built without memory (on torch's meta device), so the numbers are those of the real classes, and nothing
is downloaded: a hub id is known if its config is in the hub's cache or one that the shipped recipes name. What the
parts are is decided by ``blueprint.resolve_parts``, as for a run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.geometry import ModelGeometry
from llava_ray.config.lora import LoraConfig
from llava_ray.images.geometry import ImageSpec
from llava_ray.model.blueprint import ResolvedParts, load_image_processor, resolve_parts
from llava_ray.model.formats.hub.read import PROCESSOR_FILES
from llava_ray.model.formats.layout import is_timm
from llava_ray.model.formats.part_configs import build_config
from llava_ray.model.formats.tower_loading import build_backbone, read_tower_config
from llava_ray.model.freezing import freeze
from llava_ray.model.image_geometry import choose_s2_scales, find_s2_scales
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.projector import build_projector_of
from llava_ray.model.network.tower import VisionTower
from llava_ray.model.network.tower_families import find_family
from llava_ray.reading import is_file

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


def summarize_model(config: FinetuneConfig) -> ModelSummary:
    """Describe the model that a run would train. Raises ModelError for a config that cannot be known from here."""
    found = resolve_parts(config.model, offline=True)
    model_config, tower_config = found.config, read_tower_config(found.tower)
    side, scales = _find_sides(found, int(tower_config.image_size))
    with torch.device("meta"), no_init_weights():  # drawing numbers takes its time even where none are kept
        model = build_language_model(build_config(found.language.config, found.language.name))
        backbone = build_backbone(tower_config)
        cut = VisionTower(backbone, model_config.mm_vision_select_layer, model_config.mm_vision_select_feature, scales)
        geometry = ModelGeometry.resolve(
            model_config,
            mm_hidden_size=cut.hidden_size,
            hidden_size=model.config.get_text_config().hidden_size,
            s2_scales=scales,
            image_aspect_ratio=config.data.image_aspect_ratio,
            image_grid_pinpoints=model_config.image_grid_pinpoints or (),
        )
        projector = build_projector_of(geometry)
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
    origins = _name_origins(found)
    kinds = {
        _LANGUAGE_MODEL: (model.config.model_type, origins[_LANGUAGE_MODEL]),
        "projector": (config.model.mm_projector_type, origins["projector"]),
        _VISION_TOWER: (tower_config.model_type, origins[_VISION_TOWER]),
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


def _find_sides(found: ResolvedParts, image_size: int) -> tuple[int, tuple[int, ...]]:
    """Return the pixels of a view's side and the scales of S2; ``image_size`` is the tower's own.

    It counts where no image processor lies beside the tower's config, as in a hub's cache or among built-in configs.
    """
    beside = [is_file(found.tower.beside / name) for name in PROCESSOR_FILES]
    if not any(beside) and not is_timm(found.tower.config):
        return image_size, choose_s2_scales(found.config, image_size)
    processor = load_image_processor(found.tower.beside)
    return ImageSpec.from_processor(processor, "square").height, find_s2_scales(found.config, processor)


def _name_origins(found: ResolvedParts) -> dict[str, str]:
    """Return where each part is from, as the user or the model's folder names it."""
    config, layout = found.config, found.layout
    named = {
        _LANGUAGE_MODEL: None if layout.has_language_model else config.model_base or layout.base,
        "projector": config.pretrain_mm_mlp_adapter or (None if "mm_projector_type" in layout.settings else "new"),
        _VISION_TOWER: None if layout.has_vision_tower else config.vision_tower or layout.vision_tower,
    }
    return {part: name or config.model_name_or_path for part, name in named.items()}


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
