"""The description of a model folder: its kind, the location of its parts, and what is missing. No torch.

Canonical tensor names are those of ``Llava`` and its parts: ``projector.0.weight``, ``language_model.<own name>``,
``vision_tower.<own name>``, ``image_newline``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.model.formats.manifest import Manifest
from llava_ray.model.formats.names import IMAGE_NEWLINE
from llava_ray.model.tensors.tensor_files import StoredTensor, WeightFiles

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
PROJECTOR_FILE, ORIGINAL_PROJECTOR_FILE = "projector.safetensors", "mm_projector.bin"
ADAPTER_FOLDER = "adapter"  # of a bundle
ADAPTER_FILE, OLD_ADAPTER_FILE = ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILE = "non_lora_trainables.bin"  # weights that an original LoRA run trained beside the adapter
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
EMBED_TOKENS = "embed_tokens.weight"


class LayoutKind(StrEnum):
    """The kinds of model folders."""

    BUNDLE = "llava_ray bundle"
    ORIGINAL = "original LLaVA"
    ORIGINAL_LORA = "original LLaVA, LoRA over a base"
    ORIGINAL_PROJECTOR = "original LLaVA, projector only"
    HUB = "llava-hf"
    LANGUAGE_MODEL = "plain language model"
    VISION_TOWER = "vision tower"


@dataclass(frozen=True)
class Layout:
    """The description of a model folder. Of its weights only headers have been read."""

    folder: Path
    kind: LayoutKind
    config: Mapping[str, Any] = field(default_factory=dict)
    """The folder's config.json; empty for a bundle."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The model settings that it records, by the names of ModelConfig and Manifest."""
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)
    """Its tensors by canonical name."""
    names: frozenset[str] = field(default=frozenset(), repr=False)
    """Names of all tensors that it should hold; more than ``tensors`` where shards are missing."""
    language_config: Mapping[str, Any] | None = None
    """config.json of the language model: the one inside, or the base of an adapter or projector."""
    tower_config: Mapping[str, Any] | None = None
    """config.json of the vision tower inside, if the folder has it."""
    base: str | None = None
    """The language model that it names without holding it."""
    vision_tower: str | None = None
    """The vision tower that it names, whether its weights are inside or not."""
    manifest: Manifest | None = None
    missing: tuple[str, ...] = ()
    """Missing contents, one sentence each."""
    notes: tuple[str, ...] = ()
    """Notes for the user, one sentence each."""

    @property
    def has_language_model(self) -> bool:
        """Return whether it holds a whole language model."""
        named = self.manifest is not None and not self.manifest.language_model.inside
        return not named and self.kind not in (
            LayoutKind.ORIGINAL_LORA,
            LayoutKind.ORIGINAL_PROJECTOR,
            LayoutKind.VISION_TOWER,
        )

    @property
    def has_vision_tower(self) -> bool:
        """Return whether it holds the vision tower's weights."""
        if self.manifest is not None:
            return self.manifest.vision_tower.inside
        return self.kind is LayoutKind.HUB or any(name.startswith("vision_tower.") for name in self.names)

    @property
    def adapter(self) -> Path | None:
        """Return the folder of the LoRA adapter in PEFT's format, None without one."""
        inside = self.folder / ADAPTER_FOLDER
        if self.kind is LayoutKind.BUNDLE and inside.is_dir():
            return inside
        return self.folder if self.kind is LayoutKind.ORIGINAL_LORA else None

    @property
    def companions(self) -> dict[str, StoredTensor]:
        """Return the weights trained with a projector: ``image_newline``, and ``embed_tokens.weight`` of new tokens."""
        beside = {name: tensor for name, tensor in self.tensors.items() if name == IMAGE_NEWLINE}
        embeddings = [tensor for name, tensor in self.tensors.items() if name.endswith(f".{EMBED_TOKENS}")]
        if embeddings and not self.has_language_model:
            beside[EMBED_TOKENS] = embeddings[0]
        return beside

    def part(self, name: str) -> dict[str, StoredTensor]:
        """Return the tensors of ``projector``, ``language_model`` or ``vision_tower`` under the part's own names."""
        return {key.removeprefix(f"{name}."): t for key, t in self.tensors.items() if key.startswith(f"{name}.")}


def is_timm(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is one that timm wrote."""
    return isinstance(config.get("architecture"), str) and isinstance(config.get("pretrained_cfg"), Mapping)


def check_whole(layout: Layout) -> None:
    """Raise ModelError with the first missing item."""
    if layout.missing:
        more = f" ({len(layout.missing) - 1} more items are missing.)" if len(layout.missing) > 1 else ""
        raise ModelError(f"{layout.folder} ({layout.kind}) is incomplete: {layout.missing[0]}{more}")


def expect_any(folder: Path, names: tuple[str, ...], what: str, missing: list[str]) -> None:
    """Add to ``missing`` if none of the files that could be ``what`` is in ``folder``."""
    if not any((folder / name).is_file() for name in names):
        missing.append(f"no {what}: none of {', '.join(names)} is there.")


def expect_part(weights: WeightFiles, part: str, missing: list[str]) -> None:
    """Add to ``missing`` if the weights hold no tensor of a part."""
    if weights.names and not any(name.startswith(f"{part}.") for name in weights.names):
        missing.append(f"no tensor of the {part.replace('_', ' ')} is in its weight files.")


def expect_projector(weights: WeightFiles, config: Mapping[str, Any], missing: list[str]) -> None:
    """Add to ``missing`` if the weights hold no projector, unless its type has no tensors."""
    if config.get("mm_projector_type") != "identity":
        expect_part(weights, "projector", missing)


TRAINER_STATE, COMPLETE = "trainer_state.json", "COMPLETE"
