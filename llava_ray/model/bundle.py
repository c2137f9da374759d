"""Models put together from their parts, and kept in one self-describing folder.

llava.json              what it is (manifest.Manifest)
projector.safetensors   under LLaVA's tensor names, without prefix
tokenizer files         with the chat template
language_model/         an ordinary transformers folder; may be left out and named in llava.json instead
vision_tower/           the same, with preprocessor_config.json
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llava_ray.config.sections import ModelConfig
from llava_ray.errors import BundleError, ModelError
from llava_ray.model.blueprint import LANGUAGE_MODEL, VISION_TOWER, Blueprint, read_blueprint
from llava_ray.model.llava import Llava
from llava_ray.model.manifest import (
    MANIFEST_FILE,
    Manifest,
    Part,
    check_fingerprint,
    fingerprint,
    is_bundle,
    library_versions,
    read_manifest,
)
from llava_ray.model.packing import check_packing
from llava_ray.model.projector import PROJECTOR_FILE, adopt_projector, build_projector, load_projector_weights
from llava_ray.model.sources import Source, check_loaded, loading
from llava_ray.model.tower import VisionTower, load_vision_tower
from llava_ray.model.weights import save_weights


@dataclass(frozen=True)
class LlavaParts(Blueprint):
    """A model with its weights. ``manifest`` describes it as a bundle that names its parts and holds none."""

    manifest: Manifest
    tower: VisionTower
    llava: Llava


def read_parts(config: ModelConfig, image_aspect_ratio: str) -> Blueprint:
    """Return tokenizer, template, image geometry and configs, without weights. Raises ModelError or ConfigError."""
    return read_blueprint(config, image_aspect_ratio)


def load_tower(config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> VisionTower:
    """Load only the frozen vision tower of a model. Raises ModelError."""
    # The geometry does not matter here, any aspect ratio will do.
    return _load_tower(read_blueprint(config, "square", weights=True), dtype)


def assemble(
    config: ModelConfig,
    image_aspect_ratio: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    model_max_length: int = 2048,
    language_model: str | Path | None = None,
    language_model_context: AbstractContextManager[Any] | None = None,
) -> LlavaParts:
    """Load a language model and a tower with a projector, on the CPU.

    ``config.model_name_or_path`` is a plain language model or a bundle. A new projector depends on ``seed`` alone, so
    it is the same on every rank. ``language_model`` is where the base of a bundle without one lies now;
    ``language_model_context`` is entered only while the language model loads (ZeRO 3 partitions what is loaded inside
    it, which must not happen to the tower). Raises ModelError where parts are missing or do not fit.
    """
    blueprint = read_blueprint(config, image_aspect_ratio, language_model=language_model, weights=True)
    manifest = _describe(blueprint, model_max_length)
    check_fingerprint(blueprint.language_source.folder, manifest.language_model.fingerprint, "language model")
    check_fingerprint(blueprint.tower_source.folder, manifest.vision_tower.fingerprint, "vision tower")
    projector = _load_projector(blueprint, manifest, seed).to(dtype)
    tower = _load_tower(blueprint, dtype)
    with language_model_context or nullcontext():
        model = _load_language_model(blueprint, dtype)
    known = {**vars(blueprint), "manifest": manifest}
    return LlavaParts(**known, tower=tower, llava=Llava(projector, model, blueprint.mm_hidden_size))


def load_bundle(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    language_model: str | Path | None = None,
    vision_tower: str | Path | None = None,
) -> LlavaParts:
    """Load a bundle for use, in evaluation mode on ``device``.

    ``language_model`` and ``vision_tower`` say where parts that the bundle only names lie now. Raises BundleError for a
    folder that is no bundle, or whose parts are not those it was made with; ModelError where parts are missing.
    """
    manifest = read_manifest(Path(path))
    config = ModelConfig(
        model_name_or_path=str(path),
        vision_tower=None if vision_tower is None else str(vision_tower),
        version=manifest.version,
        mm_projector_type=manifest.mm_projector_type,
        mm_vision_select_layer=manifest.mm_vision_select_layer,
        mm_vision_select_feature=manifest.mm_vision_select_feature,
    )
    parts = assemble(
        config,
        manifest.image_aspect_ratio,
        dtype=dtype,
        model_max_length=manifest.model_max_length,
        language_model=language_model,
    )
    parts.tower.to(device)
    parts.llava.to(device).eval()
    return parts


def save_bundle(
    folder: str | Path,
    parts: LlavaParts,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    include: Literal["all", "projector"] = "all",
    training: Mapping[str, Any] | None = None,
) -> None:
    """Write a bundle, whole or not at all; one that is already there is replaced.

    ``tensors`` are full tensors under Llava's names (``projector.0.weight``, ``language_model.lm_head.weight``), as
    gathered from a training engine; by default those of ``parts.llava``. With ``include="projector"`` language model
    and tower are named instead of copied. ``training`` is kept in the manifest. Raises BundleError if the folder
    cannot be written, is something else, or a tensor is missing.
    """
    tensors = parts.llava.state_dict() if tensors is None else tensors
    with _replacing(Path(folder)) as new:
        save_file(_below("projector.", tensors), new / PROJECTOR_FILE)
        parts.tokenizer.save_pretrained(new)
        language, tower = parts.manifest.language_model, parts.manifest.vision_tower
        if include == "all":
            save_weights(new / LANGUAGE_MODEL, parts.llava.language_model, _below("language_model.", tensors))
            save_weights(new / VISION_TOWER, parts.tower.backbone, parts.tower.full_state_dict())
            parts.image_processor.save_pretrained(new / VISION_TOWER)
            language = _held(parts.language_source, new / LANGUAGE_MODEL)
            tower = _held(parts.tower_source, new / VISION_TOWER)
        manifest = parts.manifest.model_copy(
            update={
                "language_model": language,
                "vision_tower": tower,
                "libraries": library_versions(),
                "training": dict(training or {}),
            }
        )
        (new / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")


def _describe(blueprint: Blueprint, model_max_length: int) -> Manifest:
    """Return the manifest of the model as a bundle that names its parts."""
    config, old = blueprint.config, blueprint.manifest
    return Manifest(
        version=config.version,
        mm_projector_type=config.mm_projector_type,
        mm_hidden_size=blueprint.mm_hidden_size,
        hidden_size=blueprint.hidden_size,
        mm_vision_select_layer=config.mm_vision_select_layer,
        mm_vision_select_feature=config.mm_vision_select_feature,
        image_aspect_ratio=blueprint.image_spec.aspect_ratio,
        model_max_length=model_max_length,
        language_model=_named(blueprint.language_source, old.language_model if old else None),
        vision_tower=_named(blueprint.tower_source, old.vision_tower if old else None),
        libraries=library_versions(),
        training=old.training if old else {},
    )


def _named(source: Source, known: Part | None) -> Part:
    return Part(inside=False, base=source.name, fingerprint=known.fingerprint if known else fingerprint(source.folder))


def _held(source: Source, folder: Path) -> Part:
    return Part(inside=True, base=source.origin, fingerprint=fingerprint(folder))


def _load_tower(blueprint: Blueprint, dtype: torch.dtype) -> VisionTower:
    config = blueprint.config
    return load_vision_tower(
        blueprint.tower_source.folder,
        select_layer=config.mm_vision_select_layer,
        select_feature=config.mm_vision_select_feature,
        dtype=dtype,
    )


def _load_language_model(blueprint: Blueprint, dtype: torch.dtype) -> PreTrainedModel:
    folder, wanted = blueprint.language_source.folder, blueprint.config.attn_implementation
    # SDPA is transformers' own default, with eager where a model has none (Gemma 2); asked for by name it is refused.
    attention = None if wanted == "sdpa" else wanted
    with loading(folder, "language model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    model: PreTrainedModel = loaded[0]
    check_loaded(loaded[1], folder, "language model")
    check_packing(model)
    return model


def _load_projector(blueprint: Blueprint, manifest: Manifest, seed: int) -> nn.Module:
    """Return the projector that the config asks for: new, the bundle's, or that of pretrain_mm_mlp_adapter."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        projector = build_projector(manifest.mm_projector_type, manifest.mm_hidden_size, manifest.hidden_size)
    source = blueprint.config.pretrain_mm_mlp_adapter or blueprint.bundle
    if source is not None:
        _check_adapter(Path(source), manifest)
        adopt_projector(projector, load_projector_weights(source), str(source))
    return projector


def _check_adapter(source: Path, manifest: Manifest) -> None:
    """Raise ModelError if a bundle's projector was trained on other features than it would get here."""
    if not is_bundle(source):
        return
    trained = read_manifest(source)
    for key in ("mm_vision_select_layer", "mm_vision_select_feature"):
        if getattr(trained, key) != getattr(manifest, key):
            raise ModelError(
                f"the projector in {source} was trained with {key} {getattr(trained, key)!r}, but the model is "
                f"configured with {getattr(manifest, key)!r}; set it as it was trained."
            )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.detach().contiguous()
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Give a new folder that takes the place of ``folder`` when all of it is written. Raises BundleError."""
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    try:
        if folder.exists() and not is_bundle(folder) and any(folder.iterdir()):
            raise BundleError(f"{folder} is there already and is no llava_ray bundle; choose another folder.")
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise BundleError(
            f"the model cannot be written to {folder} ({error}); free space or choose a folder that can be written. "
            "Nothing that was there has been touched."
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
