"""Export to the hub layout (llava-hf, llava-next-hf), which old and new transformers and vLLM load."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava_ray.chat.conversation import IMAGE_TOKEN
from llava_ray.chat.template import Template
from llava_ray.chat.templates import find_template
from llava_ray.config.geometry import find_unknown_elsewhere
from llava_ray.errors import ModelError
from llava_ray.invocation import command
from llava_ray.model.formats.export_folder import (
    WITH_VISION_MODEL,
    Exported,
    load_own_tokenizer,
    new_folder,
    with_dtype,
    write_json_file,
)
from llava_ray.model.formats.exported_tokenizer import (
    add_image_token,
    check_image_token,
    num_ids,
    write_template,
    write_tokenizer,
)
from llava_ray.model.formats.hub.names import to_hub
from llava_ray.model.formats.hub.processor import pixels_of, write_preprocessor, write_processor
from llava_ray.model.formats.hub.settings import select_strategy, write_hub_settings
from llava_ray.model.formats.manifest import Manifest, relative_base, with_bases
from llava_ray.model.formats.model_files import ModelFiles
from llava_ray.model.formats.names import IMAGE_NEWLINE, LANGUAGE_MODEL_PREFIX, VISION_TOWER_PREFIX
from llava_ray.model.formats.noted_settings import OUR_KEY
from llava_ray.model.formats.part_configs import num_prefix_tokens
from llava_ray.model.formats.vocabulary import with_image_tags
from llava_ray.model.formats.vocabulary_rows import EMBEDDINGS, TABLES, Vocabulary, choose_rows, with_rows
from llava_ray.model.tensors.weight_files import write_folder

_LANGUAGE_NAMES = ("model.", *(name.removeprefix(LANGUAGE_MODEL_PREFIX) for name in TABLES))


def export_hub(
    model: ModelFiles, output: str | Path, vocabulary: Vocabulary = "auto", *, for_vllm: bool = True
) -> Exported:
    """Write the hub layout. Raises ModelError, naming the part, for a model that it cannot express.

    ``for_vllm`` also rejects models that transformers loads and vLLM does not.
    """
    _check_hub(model)
    if for_vllm:
        _check_vllm(model)
    plain, tokenizer = load_own_tokenizer(model), load_own_tokenizer(model)
    image_token = add_image_token(tokenizer)
    check_image_token(image_token, tokenizer)
    rows = choose_rows(
        vocabulary, found=model.tensors[EMBEDDINGS].shape[0], own=model.num_rows, needed=num_ids(tokenizer)
    )
    template = _template(model, plain)
    jinja, note = write_template(template, plain, tokenizer, image_token)
    notes = [
        f"the vocabulary has {rows} rows, {model.num_rows} of them the language model's; {IMAGE_TOKEN} is {image_token}"
    ]
    notes += [note] if note else []
    notes += _image_notes(model)
    with new_folder(output) as new:
        settings = _settings(model, rows, image_token, plain, output)
        write_json_file(new / "config.json", settings)
        write_json_file(new / "generation_config.json", _generation_config(model, template, plain))
        write_json_file(new / "preprocessor_config.json", write_preprocessor(model.preprocessor, model.manifest))
        processor = write_processor(
            settings,
            num_prefix_tokens=num_prefix_tokens(model.tower_config),
            patch_size=model.tower_config["patch_size"],
            image_token=IMAGE_TOKEN,
        )
        write_json_file(new / "processor_config.json", processor)
        level = model.tower_config["model_type"] in WITH_VISION_MODEL
        tensors = {to_hub(n, vision_model=level): t for n, t in with_rows(model.tensors, rows).items()}
        if settings["model_type"] == "llava":
            tensors.pop(IMAGE_NEWLINE, None)
        write_folder(new, tensors)
        tokenizer.chat_template = jinja
        write_tokenizer(tokenizer, model.tokenizer_folder, new, num_rows=rows, template_inside=True)
        (new / "chat_template.jinja").write_text(jinja)
        write_json_file(new / "chat_template.json", {"chat_template": jinja})  # read by older processors
    return Exported(Path(output), tuple(notes))


def _check_hub(model: ModelFiles) -> None:
    """Raise ModelError, naming the part, for a model that transformers' LLaVA classes cannot express."""
    manifest = model.manifest
    _check_settings(manifest)
    if model.tower_config["model_type"] == "siglip2_vision_model":
        raise _inexpressible(
            "vision tower",
            "a SigLIP 2 for any aspect ratio takes patches and their grid, the layout gives it pixels",
        )
    strange = [name for name in model.part(LANGUAGE_MODEL_PREFIX) if not name.startswith(_LANGUAGE_NAMES)]
    if strange:
        raise _inexpressible("language model", f"the layout expects names such as model.layers.0…, found {strange[0]}")
    if manifest.image_aspect_ratio == "anyres":
        if manifest.mm_patch_merge_type != "spatial_unpad":
            raise _inexpressible(
                "image_newline",
                f"mm_patch_merge_type is {manifest.mm_patch_merge_type!r}, the layout supports spatial_unpad only",
            )
        if manifest.mm_vision_select_feature == "cls_patch" and num_prefix_tokens(model.tower_config):
            raise _inexpressible(
                "vision tower", "cls_patch with anyres: a class token has no place in the grid of views"
            )
    select_strategy(manifest, model.tower_config)


def _check_settings(manifest: Manifest) -> None:
    """Raise ModelError for settings that the layout has no word for."""
    if manifest.mm_projector_type != "mlp2x_gelu":
        raise _inexpressible(
            "projector", f"it is {manifest.mm_projector_type!r}, and the layout has two linear layers with GELU only"
        )
    if unknown := find_unknown_elsewhere(manifest):
        raise _inexpressible("settings", f"{unknown} is {getattr(manifest, unknown)!r}, the layout has no word for it")
    if manifest.s2:
        raise _inexpressible("vision tower", f"s2 uses several scales {manifest.s2_scales}, the layout at one")


def _check_vllm(model: ModelFiles) -> None:
    """Raise ModelError, naming the part, for a model that transformers loads in this layout and vLLM does not."""
    kind, layer = model.tower_config["model_type"], model.manifest.mm_vision_select_layer
    if kind not in WITH_VISION_MODEL:
        approximate = " --approximate writes a DINOv2 as a SigLIP, with another result;" if kind == "dinov2" else ""
        raise ModelError(
            f"vision tower: vLLM takes CLIP and SigLIP towers, this one is {kind!r}.{approximate} --transformers_only "
            "exports it as it is, for transformers alone."
        )
    if not isinstance(layer, int):
        raise ModelError(
            f"vision tower: features of several layers {layer} are selected, vLLM's projector takes those of one. "
            "--transformers_only exports the model for transformers alone."
        )


def _template(model: ModelFiles, tokenizer: PreTrainedTokenizerBase) -> Template:
    template = find_template(model.manifest.version, tokenizer)
    return with_image_tags(template, start_end=model.manifest.mm_use_im_start_end)


def _inexpressible(part: str, why: str) -> ModelError:
    return ModelError(
        f"{part}: the hub layout cannot express this model: {why}. Keep the bundle, or use "
        f"{command('export', 'original')} if the original has it."
    )


def _settings(
    model: ModelFiles, rows: int, image_token: int, tokenizer: PreTrainedTokenizerBase, place: str | Path
) -> dict[str, Any]:
    language = with_dtype({**model.language_config, "vocab_size": rows}, model.part(LANGUAGE_MODEL_PREFIX))
    height, width = pixels_of(model.preprocessor)
    patch = model.tower_config["patch_size"]
    num_tokens = (height // patch) * (width // patch)
    if model.manifest.mm_vision_select_feature == "cls_patch":
        num_tokens += num_prefix_tokens(model.tower_config)
    settings = write_hub_settings(
        model.manifest,
        language,
        with_dtype(model.tower_config, model.part(VISION_TOWER_PREFIX)),
        image_token=image_token,
        num_image_tokens=num_tokens,
    )
    parts = {
        key: getattr(model.manifest, key).model_copy(update={"inside": True})
        for key in ("language_model", "vision_tower")
    }
    manifest = with_bases(model.manifest.model_copy(update=parts), lambda base: relative_base(base, place))
    noted = {
        "manifest": manifest.model_dump(mode="json"),
        "num_rows": model.num_rows,
        "preprocessor": model.preprocessor,
        "kept": model.kept,
        "chat_template": tokenizer.chat_template,
    }
    return dict(sorted(settings.items())) | {OUR_KEY: noted}


def _generation_config(model: ModelFiles, template: Template, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the begin, end and padding tokens: answers end with the template's end token."""
    settings: Mapping[str, Any] = {**model.language_config, **model.generation_config}
    ends = settings.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    stop = tokenizer.get_vocab().get(template.stop)
    if stop is not None and stop not in ends:
        ends = [*ends, stop]
    return {
        "bos_token_id": settings.get("bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends,
        "pad_token_id": settings.get("pad_token_id", tokenizer.pad_token_id),
    }


def _image_notes(model: ModelFiles) -> list[str]:
    notes = []
    if model.manifest.image_aspect_ratio == "pad":
        notes.append("images are padded to squares by transformers' LlavaImageProcessor, which it has since 4.51")
    if IMAGE_NEWLINE in model.tensors and model.manifest.image_aspect_ratio != "anyres":
        notes.append(
            f"image_newline is left out: with image_aspect_ratio {model.manifest.image_aspect_ratio!r} nothing uses it"
        )
    return notes
