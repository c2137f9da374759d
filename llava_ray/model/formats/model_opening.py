"""Opening of a model of any layout as files: its manifest and tensors, checked. Nothing is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llava_ray.config.geometry import compute_feature_width
from llava_ray.config.model import ModelConfig
from llava_ray.errors import ModelError
from llava_ray.invocation import command
from llava_ray.model.formats.declared_sizes import read_config
from llava_ray.model.formats.inspection import notes_of
from llava_ray.model.formats.layout import (
    CONFIG,
    EMBED_TOKENS,
    TOKENIZER_FILES,
    Layout,
    LayoutKind,
    check_whole,
    is_timm,
)
from llava_ray.model.formats.manifest import Manifest, ManifestPart, check_fingerprint, faults_of
from llava_ray.model.formats.model_checks import check_parts, find_preprocessor
from llava_ray.model.formats.model_files import ORIGINAL_CONFIG, ModelFiles
from llava_ray.model.formats.names import (
    COMPUTED,
    IMAGE_NEWLINE,
    LANGUAGE_MODEL_PREFIX,
    PROJECTOR_PREFIX,
    VISION_MODEL_PREFIX,
    VISION_TOWER_PREFIX,
    bare_tower_name,
)
from llava_ray.model.formats.noted_settings import MIRRORED, OF_TYPE, OUR_KEY, find_noted, read_noted_manifest
from llava_ray.model.formats.original.settings import read_kept
from llava_ray.model.formats.part_configs import fill_defaults, vision_part
from llava_ray.model.formats.part_sources import find_language_model, find_layout, find_vision_tower
from llava_ray.model.formats.sources import Source
from llava_ray.model.formats.stated_settings import find_length, find_version
from llava_ray.model.formats.token_rows import check_layout_rows, find_image_token
from llava_ray.model.network.tower_families import WITH_TEXT_PART
from llava_ray.model.tensors.tensor_files import StoredTensor
from llava_ray.model.tensors.weight_files import Stored, to_stored
from llava_ray.reading import is_file, wrap_errors


def open_model(
    path: str | Path,
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    version: str | None = None,
) -> ModelFiles:
    """Open a model folder: find its kind and its tensors from what it declares.

    ``model_base`` and ``vision_tower`` locate parts that it only names, ``version`` is its conversation template where
    it does not record it. Raises ModelError for a folder that is not a LLaVA, lacks a part or is damaged.
    """
    asked = ModelConfig(model_name_or_path=str(path), model_base=model_base, vision_tower=vision_tower)
    root, layout = find_layout(str(path), weights=True)
    _check_exportable(layout)
    check_whole(layout)
    check_layout_rows(layout)
    language = find_language_model(asked, root, layout, weights=True)
    tower = find_vision_tower(asked, root, layout, weights=True)
    if is_timm(tower.config):
        raise ModelError(
            f"vision tower: {tower.beside} is timm's {tower.config['architecture']!r}, which no layout of other "
            "programs holds. Keep the bundle."
        )
    noted = find_noted(layout.config, str(layout.folder / CONFIG))
    with wrap_errors(f"{layout.folder} ({layout.kind})", "Copy the folder again.", says="cannot be described"):
        manifest = _describe(layout, language, tower, version)
    language_config = fill_defaults(
        {**_language_architecture(language), **language.config}, f"{language.folder / CONFIG}"
    )
    num_rows = _find_own_rows(layout, noted, language_config)
    training = dict(manifest.training)
    kept = training.pop(ORIGINAL_CONFIG, noted.get("kept", {}))
    kept = dict(kept) if isinstance(kept, Mapping) else {}
    if layout.kind is not LayoutKind.HUB:
        kept |= read_kept(layout.config)
    has_tokenizer = any(is_file(root.folder / name) for name in TOKENIZER_FILES)
    preprocessor, notes = find_preprocessor(layout, tower, noted, manifest)
    model = ModelFiles(
        folder=root.folder,
        manifest=manifest.model_copy(update={"training": training}),
        language_config={**language_config, "vocab_size": num_rows},
        tower_config=fill_defaults(vision_part(tower.config), f"{tower.beside / CONFIG}"),
        preprocessor=preprocessor,
        generation_config=_optional_json(language.beside / "generation_config.json"),
        tokenizer_folder=root.folder if has_tokenizer else language.folder,
        tensors=_name_tensors(layout, language, tower),
        num_rows=num_rows,
        kept=kept,
        noted_template=(noted["chat_template"],) if "chat_template" in noted else (),
        notes=(*notes_of(layout), *notes),
    )
    check_parts(model, language, tower, language_config)
    return model


def _find_own_rows(layout: Layout, noted: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Return the number of vocabulary rows of the language model itself. Raises ModelError."""
    size = int(config["vocab_size"])
    image_token = None
    if layout.kind is LayoutKind.HUB:
        image_token = find_image_token(layout.folder)
        image_token = layout.config.get("image_token_index") if image_token is None else image_token
    rows = noted.get("num_rows", image_token if type(image_token) is int and 0 < image_token < size else size)
    if rows > size:
        raise ModelError(
            f"{layout.folder / CONFIG}: {OUR_KEY}.num_rows is {rows:,}, but the vocabulary has {size:,} rows; fix it."
        )
    return int(rows)


def _check_exportable(layout: Layout) -> None:
    """Raise ModelError for a folder that is not a whole LLaVA."""
    if layout.adapter is not None:
        raise ModelError(
            f"{layout.folder} ({layout.kind}) holds an adapter that is not merged into its language model. Merge it "
            f"first: {command('export', 'merge')} {layout.folder} OUTPUT, then export OUTPUT."
        )
    if layout.kind is LayoutKind.LANGUAGE_MODEL:
        raise ModelError(
            f"{layout.folder} is a {layout.kind}, without projector and tower: nothing can be exported of it. Point at "
            "a llava_ray bundle, or at a LLaVA in the original or the hub layout."
        )


def _describe(layout: Layout, language: Source, tower: Source, version: str | None) -> Manifest:
    """Return the manifest of a model: its own, or one built from its settings. Raises ModelError."""
    where = str(layout.folder / CONFIG)
    if is_timm(tower.config):
        raise ModelError(
            f"vision tower: {tower.beside} is timm's {tower.config['architecture']!r}, which no layout of other "
            "programs holds. Keep the bundle."
        )
    noted = find_noted(layout.config, where)
    known = layout.manifest
    if known is None and (was := read_noted_manifest(noted, where)) is not None:
        own = {key: layout.settings[key] for key in (*MIRRORED, *OF_TYPE) if key in layout.settings}
        known = was.model_copy(update=own)  # the file's current values
    if known is not None:
        for key, source in (("language_model", language), ("vision_tower", tower)):
            if layout.manifest is not None and not getattr(known, key).inside:
                check_fingerprint(source.folder, getattr(known, key).fingerprint, key.replace("_", " "))
        return known if version is None else known.model_copy(update={"version": version})
    settings = {key: value for key, value in layout.settings.items() if key in Manifest.model_fields}
    tower_width = int(vision_part(tower.config)["hidden_size"])
    width = compute_feature_width(tower_width, settings["mm_vision_select_layer"], settings.get("s2_scales", ()))
    names = {"language_model": layout.config.get("_name_or_path"), "vision_tower": layout.config.get("mm_vision_tower")}
    derived = {
        "version": find_version(layout, version),
        "mm_hidden_size": layout.config.get("mm_hidden_size", width),
        "hidden_size": fill_defaults(language.config, str(language.folder))["hidden_size"],
        "model_max_length": find_length(layout),
        "language_model": ManifestPart(inside=True, base=names["language_model"] or language.origin, fingerprint=""),
        "vision_tower": ManifestPart(inside=True, base=names["vision_tower"] or tower.origin, fingerprint=""),
        "training": noted.get("training", {}),
    }
    try:
        return Manifest.model_validate(settings | derived)
    except ValidationError as error:
        raise ModelError(f"{layout.folder / CONFIG} cannot be read as LLaVA's: {faults_of(error)}; fix it.") from error


def _name_tensors(layout: Layout, language: Source, tower: Source) -> dict[str, Stored]:
    """Return all parts' tensors under canonical names, without buffers that every model computes itself."""
    tensors: dict[str, StoredTensor] = {f"{PROJECTOR_PREFIX}{name}": t for name, t in layout.part("projector").items()}
    if EMBED_TOKENS in layout.companions or PROJECTOR_PREFIX + EMBED_TOKENS in tensors:
        raise ModelError(
            f"language model: {layout.folder} brings {EMBED_TOKENS} for tokens that the language model does not have. "
            "Load it and save all of it (load_pretrained_model, save_bundle with include='all'), then export."
        )
    if IMAGE_NEWLINE in layout.tensors:
        tensors[IMAGE_NEWLINE] = layout.tensors[IMAGE_NEWLINE]
    tensors |= {f"{LANGUAGE_MODEL_PREFIX}{name}": tensor for name, tensor in language.tensors.items()}
    only_vision = tower.config.get("model_type") in WITH_TEXT_PART
    tensors |= {
        f"{VISION_TOWER_PREFIX}{bare_tower_name(name)}": tensor
        for name, tensor in tower.tensors.items()
        if not only_vision or name.startswith(VISION_MODEL_PREFIX)
    }
    return to_stored({name: tensor for name, tensor in tensors.items() if not COMPUTED.search(name)})


def _language_architecture(language: Source) -> dict[str, Any]:
    """Return the class of a language model, which vLLM needs and the original's config.json does not name."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(language.config.get("model_type")))
    return {"architectures": [name]} if name else {}


def _optional_json(file: Path) -> dict[str, Any]:
    """Read a JSON file; {} where it does not exist."""
    return read_config(file) if is_file(file) else {}
