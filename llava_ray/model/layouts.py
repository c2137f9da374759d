"""What a model folder is, and what of it lies where: decided by config.json, llava.json and tensor names. No torch.

Canonical tensor names are those of ``Llava`` and its parts: ``projector.0.weight``, ``language_model.<own name>``,
``vision_tower.<own name>``, ``image_newline``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.model.manifest import MANIFEST_FILE, Manifest, is_bundle, read_manifest
from llava_ray.model.published_settings import (
    find_version,
    hub_language_config,
    hub_settings,
    hub_tower_config,
    is_hub,
    is_original,
    original_language_config,
    original_settings,
)
from llava_ray.model.tensor_files import NO_WEIGHTS, StoredTensor, Weights, read_json, read_tensor_file, read_weights

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
TRAINER_STATE, COMPLETE = "trainer_state.json", "COMPLETE"
PROJECTOR_FILE, ORIGINAL_PROJECTOR = "projector.safetensors", "mm_projector.bin"
NON_LORA = "non_lora_trainables.bin"
IMAGE_NEWLINE, EMBED_TOKENS = "image_newline", "embed_tokens.weight"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOWER_TYPES = (
    "clip",
    "clip_vision_model",
    "dinov2",
    "dinov2_with_registers",
    "siglip",
    "siglip2",
    "siglip2_vision_model",
    "siglip_vision_model",
)
# Kept by older versions of transformers, and computed by newer ones.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


class Kind(StrEnum):
    """What a folder can be."""

    BUNDLE = "llava_ray bundle"
    ORIGINAL = "original LLaVA"
    ORIGINAL_LORA = "original LLaVA, LoRA over a base"
    ORIGINAL_PROJECTOR = "original LLaVA, projector only"
    HUB = "llava-hf"
    LANGUAGE_MODEL = "plain language model"
    VISION_TOWER = "vision tower"


@dataclass(frozen=True)
class Layout:
    """A model folder, described. Nothing of its weights has been read but their headers."""

    folder: Path
    kind: Kind
    config: Mapping[str, Any] = field(default_factory=dict)
    """Its config.json; empty for a bundle."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it says of a model's settings, by the names of ModelConfig and Manifest."""
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)
    """By canonical name."""
    names: frozenset[str] = field(default=frozenset(), repr=False)
    """Of all tensors that it should hold, by canonical name; more than ``tensors`` where shards are not there."""
    language_config: Mapping[str, Any] | None = None
    """config.json of the language model: of the one inside, or of the one that an adapter or projector belongs to."""
    tower_config: Mapping[str, Any] | None = None
    """The same of the vision tower inside, where the folder has it."""
    base: str | None = None
    """Language model that it only names."""
    vision_tower: str | None = None
    """Vision tower that it names, whether its weights are inside or not."""
    manifest: Manifest | None = None
    missing: tuple[str, ...] = ()
    """What it should hold and does not, a sentence each."""

    @property
    def has_language_model(self) -> bool:
        """Tell whether a whole language model is in it."""
        named = self.manifest is not None and not self.manifest.language_model.inside
        return not named and self.kind not in (Kind.ORIGINAL_LORA, Kind.ORIGINAL_PROJECTOR, Kind.VISION_TOWER)

    @property
    def has_vision_tower(self) -> bool:
        """Tell whether the vision tower's weights are in it."""
        if self.manifest is not None:
            return self.manifest.vision_tower.inside
        return self.kind is Kind.HUB or any(name.startswith("vision_tower.") for name in self.names)

    @property
    def adapter(self) -> Path | None:
        """Folder of the LoRA adapter that lies over the base, in PEFT's format."""
        inside = self.folder / "adapter"
        if self.kind is Kind.BUNDLE and inside.is_dir():
            return inside
        return self.folder if self.kind is Kind.ORIGINAL_LORA else None

    @property
    def companions(self) -> dict[str, StoredTensor]:
        """Return what is learnt beside a projector: ``image_newline``, and ``embed_tokens.weight`` with new tokens."""
        beside = {name: tensor for name, tensor in self.tensors.items() if name == IMAGE_NEWLINE}
        if not self.has_language_model:
            beside |= {EMBED_TOKENS: t for name, t in self.tensors.items() if name.endswith(f".{EMBED_TOKENS}")}
        return beside

    def part(self, name: str) -> dict[str, StoredTensor]:
        """Return the tensors of ``projector``, ``language_model`` or ``vision_tower`` under the part's own names."""
        return {key.removeprefix(f"{name}."): t for key, t in self.tensors.items() if key.startswith(f"{name}.")}


def read_layout(folder: Path) -> Layout:
    """Find out what ``folder`` is. Raises ModelError for a folder that is no model, or whose files are damaged.

    What is merely not there (weights that were not downloaded, say) is listed in ``missing``: see ``check_whole``.
    """
    if is_bundle(folder):
        return _read_bundle(folder)
    if (folder / TRAINER_STATE).is_file() and is_bundle(folder / "model"):
        return _read_checkpoint(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        return _read_lora(folder)
    if not (folder / CONFIG).is_file():
        raise ModelError(_unknown(folder))
    config = read_json(folder / CONFIG)
    if is_hub(config):
        return _read_hub(folder, config)
    if is_original(config):
        has_projector_only = (folder / ORIGINAL_PROJECTOR).is_file() and not _has_weights(folder)
        return _read_projector_only(folder, config) if has_projector_only else _read_original(folder, config)
    model_type = config.get("model_type")
    if model_type is None or str(model_type).startswith("llava"):
        raise ModelError(
            f"{folder / CONFIG}: model_type {model_type!r} is of no known layout. Known are the original's (llava, "
            "llava_llama, llava_mistral, with mm_vision_tower beside), transformers' llava and llava_next (with "
            "text_config and vision_config), llava_ray bundles and plain language models."
        )
    return _read_plain(folder, config, Kind.VISION_TOWER if model_type in TOWER_TYPES else Kind.LANGUAGE_MODEL)


def check_whole(layout: Layout) -> None:
    """Raise ModelError with the first thing that is missing."""
    if layout.missing:
        more = f" ({len(layout.missing) - 1} more things are missing.)" if len(layout.missing) > 1 else ""
        raise ModelError(f"{layout.folder} ({layout.kind}) is not whole: {layout.missing[0]}{more}")


def original_name(name: str) -> str:
    """Return the canonical name of a tensor in the original layout, with or without PEFT's prefix."""
    own = name.removeprefix("base_model.model.")
    if projector := re.search(r"(?:^|\.)mm_projector\.(.+)", own):
        return f"projector.{projector[1]}"
    if own.startswith("model.vision_tower.vision_tower."):
        return f"vision_tower.{own.removeprefix('model.vision_tower.vision_tower.')}"
    return IMAGE_NEWLINE if own == "model.image_newline" else f"language_model.{own}"


def hub_name(name: str) -> str:
    """Return the canonical name of a tensor in transformers' LLaVA layout, as older or newer versions write it."""
    own = name.removeprefix("model.")
    if projector := re.fullmatch(r"multi_modal_projector\.linear_([12])\.(weight|bias)", own):
        return f"projector.{2 * int(projector[1]) - 2}.{projector[2]}"
    if own.startswith("vision_tower.") or own == IMAGE_NEWLINE:
        return own
    if name.startswith("model.language_model."):
        return f"language_model.model.{name.removeprefix('model.language_model.')}"
    return name if name.startswith("language_model.") else f"language_model.{name}"


def _read_bundle(folder: Path) -> Layout:
    manifest = read_manifest(folder)
    missing: list[str] = []
    weights = Weights({}, frozenset())
    if (folder / PROJECTOR_FILE).is_file():
        weights = _read_files([folder / PROJECTOR_FILE], lambda own: own if own == IMAGE_NEWLINE else f"projector.{own}")
    elif manifest.mm_projector_type != "identity":
        missing.append(f"{PROJECTOR_FILE} is not there; copy the bundle again.")
    configs: dict[str, Mapping[str, Any]] = {}
    parts = {"language_model": manifest.language_model, "vision_tower": manifest.vision_tower}
    for name in [name for name, part in parts.items() if part.inside]:
        inside = _renamed(read_weights(folder / name), lambda own, part=name: f"{part}.{own}")
        weights = Weights(weights.tensors | inside.tensors, weights.names | inside.names)
        configs[name] = _config_of(folder / name, missing)
        missing += [f"{name}/: {what}" for what in inside.missing]
    _expect_any(folder, TOKENIZER_FILES, "tokenizer", missing)
    return Layout(
        folder,
        Kind.BUNDLE,
        settings=manifest.model_dump(exclude={*parts, "libraries", "training"}),
        tensors=weights.tensors,
        names=weights.names,
        language_config=configs.get("language_model"),
        tower_config=configs.get("vision_tower"),
        base=None if manifest.language_model.inside else manifest.language_model.base,
        vision_tower=None if manifest.vision_tower.inside else manifest.vision_tower.base,
        manifest=manifest,
        missing=tuple(missing),
    )


def _read_checkpoint(folder: Path) -> Layout:
    """Read the model of a run's checkpoint, which is a bundle."""
    layout = _read_bundle(folder / "model")
    if (folder / COMPLETE).is_file():
        return layout
    half = f"{COMPLETE} is not in {folder}: the checkpoint was never finished. Use an earlier one."
    return replace(layout, missing=(half, *layout.missing))


def _read_original(folder: Path, config: Mapping[str, Any]) -> Layout:
    weights = _renamed(read_weights(folder), original_name)
    missing = list(weights.missing)
    _expect_part(weights, "language_model", missing)
    _expect_projector(weights, config, missing)
    if "unpad" in str(config.get("mm_patch_merge_type")) and weights.names and IMAGE_NEWLINE not in weights.names:
        missing.append("model.image_newline is in none of its weight files, though mm_patch_merge_type needs it.")
    _expect_any(folder, TOKENIZER_FILES, "tokenizer", missing)
    return _original(folder, Kind.ORIGINAL, config, weights, missing)


def _read_projector_only(folder: Path, config: Mapping[str, Any]) -> Layout:
    weights = _read_files([folder / ORIGINAL_PROJECTOR], original_name)
    missing: list[str] = []
    _expect_projector(weights, config, missing)
    _refuse_others(folder / ORIGINAL_PROJECTOR, weights)
    return _original(folder, Kind.ORIGINAL_PROJECTOR, config, weights, missing)


def _read_lora(folder: Path) -> Layout:
    missing: list[str] = []
    adapter, config = read_json(folder / ADAPTER_CONFIG), _config_of(folder, missing)
    if config and not is_original(config):
        raise ModelError(f"{folder / CONFIG} lies beside {ADAPTER_CONFIG} but has no mm_vision_tower: not a LLaVA's.")
    _expect_any(folder, ADAPTER_FILES, "adapter", missing)
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            read_tensor_file(folder / name)  # PEFT will read it, this only refuses what is damaged or holds code
    weights = Weights({}, frozenset())
    if (folder / NON_LORA).is_file():
        weights = _read_files([folder / NON_LORA], original_name)
        _expect_projector(weights, config, missing)
        _refuse_others(folder / NON_LORA, weights)
    else:
        missing.append(
            f"{NON_LORA}, which holds the projector, is not there. The original's checkpoints before the end of a "
            "LoRA run lack it: use the last one."
        )
    return _original(folder, Kind.ORIGINAL_LORA, config, weights, missing, adapter.get("base_model_name_or_path"))


def _original(  # noqa: PLR0913 - all that the three kinds differ in
    folder: Path,
    kind: Kind,
    config: Mapping[str, Any],
    weights: Weights,
    missing: list[str],
    base: str | None = None,
) -> Layout:
    settings = original_settings(config, str(folder / CONFIG)) if config else {}
    language_config = original_language_config(config) if config else None
    tower_folder = folder / "vision_tower"  # where an export of ours puts it
    return Layout(
        folder,
        kind,
        config,
        settings | {"version": find_version(config, language_config or {})},
        weights.tensors,
        weights.names,
        language_config,
        base=base or None,
        vision_tower=str(tower_folder) if tower_folder.is_dir() else config.get("mm_vision_tower"),
        missing=tuple(missing),
    )


def _read_hub(folder: Path, config: Mapping[str, Any]) -> Layout:
    weights = _renamed(read_weights(folder), hub_name)
    missing = list(weights.missing)
    _expect_part(weights, "language_model", missing)
    _expect_part(weights, "vision_tower", missing)
    _expect_part(weights, "projector", missing)
    if config["model_type"] == "llava_next" and weights.names and IMAGE_NEWLINE not in weights.names:
        missing.append("image_newline is in none of its weight files.")
    _expect_any(folder, TOKENIZER_FILES, "tokenizer", missing)
    _expect_any(folder, PROCESSOR_FILES, "image processor", missing)
    language_config = hub_language_config(config)
    settings = hub_settings(config, str(folder / CONFIG))
    if settings["image_aspect_ratio"] == "square" and _pads(folder):
        settings["image_aspect_ratio"] = "pad"
    return Layout(
        folder,
        Kind.HUB,
        config,
        settings | {"version": find_version(config, language_config)},
        weights.tensors,
        weights.names,
        language_config,
        hub_tower_config(config),
        missing=tuple(missing),
    )


def _read_plain(folder: Path, config: Mapping[str, Any], kind: Kind) -> Layout:
    is_tower = kind is Kind.VISION_TOWER
    weights = _renamed(read_weights(folder), lambda own: f"{kind.name.lower()}.{own}")
    return Layout(
        folder,
        kind,
        config,
        tensors=weights.tensors,
        names=weights.names,
        language_config=None if is_tower else config,
        tower_config=config if is_tower else None,
        missing=weights.missing,
    )


def _read_files(files: list[Path], rename: Callable[[str], str]) -> Weights:
    tensors = {name: tensor for file in files for name, tensor in read_tensor_file(file).items()}
    return _renamed(Weights(tensors, frozenset(tensors)), rename)


def _renamed(weights: Weights, rename: Callable[[str], str]) -> Weights:
    """Return the weights by canonical name, without what newer versions of transformers compute."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in weights.tensors.items():
        if COMPUTED.search(name):
            continue
        if (other := tensors.get(rename(name))) is not None:
            raise ModelError(f"{tensor.file}: {name} is the same tensor as {other.name} in {other.file.name}.")
        tensors[rename(name)] = tensor
    names = frozenset(rename(name) for name in weights.names if not COMPUTED.search(name))
    return Weights(tensors, names, weights.missing)


def _refuse_others(file: Path, weights: Weights) -> None:
    """Raise ModelError if a file beside an adapter or projector holds language model weights that learnt too."""
    others = [t for name, t in weights.tensors.items() if name.startswith("language_model.")]
    for tensor in others:
        if not tensor.name.endswith(f".{EMBED_TOKENS}"):
            raise ModelError(
                f"{file} holds weights of the language model itself, {tensor.name} the first, which no adapter or "
                "projector has. Merge it into its base with the program that wrote it."
            )


def _config_of(folder: Path, missing: list[str]) -> dict[str, Any]:
    if (folder / CONFIG).is_file():
        return read_json(folder / CONFIG)
    missing.append(f"{CONFIG} is not in {folder}, which says what the model is.")
    return {}


def _pads(folder: Path) -> bool:
    """Tell whether the image processor makes images square before it resizes them."""
    settings = [read_json(folder / name) for name in PROCESSOR_FILES if (folder / name).is_file()]
    return any(found.get("image_processor", found).get("do_pad") for found in settings)


def _has_weights(folder: Path) -> bool:
    stems = ("model.safetensors", "pytorch_model.bin")
    return any((folder / f"{stem}{end}").is_file() for stem in stems for end in ("", ".index.json"))


def _expect_part(weights: Weights, part: str, missing: list[str]) -> None:
    if weights.names and not any(name.startswith(f"{part}.") for name in weights.names):
        missing.append(f"no tensor of the {part.replace('_', ' ')} is in its weight files.")


def _expect_projector(weights: Weights, config: Mapping[str, Any], missing: list[str]) -> None:
    if config.get("mm_projector_type") != "identity":
        _expect_part(weights, "projector", missing)


def _expect_any(folder: Path, names: tuple[str, ...], what: str, missing: list[str]) -> None:
    if not any((folder / name).is_file() for name in names):
        missing.append(f"no {what}: none of {', '.join(names)} is there.")


def _unknown(folder: Path) -> str:
    if (folder / ORIGINAL_PROJECTOR).is_file():
        return (
            f"{folder} holds {ORIGINAL_PROJECTOR} but no {CONFIG}, which says what it was trained with. Copy that too, "
            "or use the file as model.pretrain_mm_mlp_adapter."
        )
    if (folder / TRAINER_STATE).is_file():
        return f"{folder} is a training state without a model; the same finetune.py command goes on from it."
    if is_bundle(folder / "model"):
        return f"{folder} is a run's folder; its model is {folder / 'model'}."
    return (
        f"{folder} is no model that is known here: it has neither {MANIFEST_FILE}, {CONFIG} nor {ADAPTER_CONFIG}. "
        "Expected a llava_ray bundle, a LLaVA in the original or llava-hf layout, or a plain language model."
    )
