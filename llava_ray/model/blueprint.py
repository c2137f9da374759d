"""Everything that is known of a model before its weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from llava_ray.chat.templates import Template, find_template
from llava_ray.config.sections import ModelConfig
from llava_ray.errors import ModelError
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.tokens import ImageTokens
from llava_ray.model.image_geometry import find_s2_scales, read_image_geometry
from llava_ray.model.manifest import Manifest, Part, is_bundle, read_manifest
from llava_ray.model.sources import Source, find_source, load_padding_tokenizer, loading, read_config
from llava_ray.model.tower import feature_width, read_tower_config
from llava_ray.model.vocabulary import add_image_tokens, image_token_ids, with_image_tags

LANGUAGE_MODEL = "language_model"
VISION_TOWER = "vision_tower"


@dataclass(frozen=True)
class Blueprint:
    """A model without its weights: all that the data path needs, cheap enough for every process.

    ``bundle`` and ``manifest`` are the llava_ray bundle that the model goes on from, if it does. ``new_token_ids`` have
    no embeddings of their own in the language model's files.
    """

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    new_token_ids: tuple[int, ...]
    template: Template
    image_processor: BaseImageProcessor
    image_spec: ImageSpec
    image_tokens: ImageTokens
    language_config: PreTrainedConfig
    tower_config: PreTrainedConfig
    language_source: Source
    tower_source: Source
    bundle: Path | None
    manifest: Manifest | None

    @property
    def hidden_size(self) -> int:
        """Width of the language model's embeddings."""
        return int(self.language_config.get_text_config().hidden_size)

    @property
    def mm_hidden_size(self) -> int:
        """Width of the tower's features, all layers and scales together."""
        return feature_width(self.tower_config, self.config.mm_vision_select_layer, self.s2_scales)

    @property
    def s2_scales(self) -> tuple[int, ...]:
        """Sides in pixels at which the tower looks at an image; () without S2."""
        return find_s2_scales(self.config, self.image_processor)


def read_blueprint(
    config: ModelConfig, image_aspect_ratio: str, *, language_model: str | Path | None = None, weights: bool = False
) -> Blueprint:
    """Read configs, tokenizer, template and image geometry. ``weights`` downloads those of hub ids as well.

    ``language_model`` is where the base of a bundle without one lies now. Raises ModelError or ConfigError.
    """
    root = find_source(config.model_name_or_path, "language model", weights=weights)
    bundle = root.folder if is_bundle(root.folder) else None
    manifest = read_manifest(bundle) if bundle else None
    if bundle and manifest:
        config = completed(config, manifest)
        check_settings(config, manifest, bundle)
        language = part_source(manifest.language_model, bundle / LANGUAGE_MODEL, language_model, weights=weights)
        tower = part_source(manifest.vision_tower, bundle / VISION_TOWER, config.vision_tower, weights=weights)
    else:
        language, tower = root, find_tower_source(config, weights=weights)
    tokenizer = load_padding_tokenizer(root.folder)
    new_ids = add_image_tokens(tokenizer, start_end=config.mm_use_im_start_end, patch=config.mm_use_im_patch_token)
    if manifest and not manifest.language_model.inside:
        new_ids = image_token_ids(tokenizer)  # the bundle's tokenizer is ahead of the language model that it names
    language_config = read_config(language.folder, "language model")
    tower_config = read_tower_config(tower.folder)
    image_processor = load_image_processor(tower.folder)
    spec, tokens = read_image_geometry(config, image_aspect_ratio, tower_config, image_processor)
    return Blueprint(
        config=config,
        tokenizer=tokenizer,
        new_token_ids=new_ids,
        template=with_image_tags(find_template(config.version, tokenizer), start_end=config.mm_use_im_start_end),
        image_processor=image_processor,
        image_spec=spec,
        image_tokens=tokens,
        language_config=language_config,
        tower_config=tower_config,
        language_source=language,
        tower_source=tower,
        bundle=bundle,
        manifest=manifest,
    )


def find_tower_source(config: ModelConfig, *, weights: bool) -> Source:
    """Find the tower of a model that does not go on from a bundle. Raises ModelError."""
    if config.vision_tower is None:
        raise ModelError(
            f"{config.model_name_or_path} is a plain language model and model.vision_tower is not set; name a CLIP, "
            "SigLIP or DINOv2 tower, or start from a llava_ray bundle, which brings its own."
        )
    return find_source(config.vision_tower, "vision tower", weights=weights)


def part_source(part: Part, inside: Path, given: str | Path | None, *, weights: bool) -> Source:
    """Find a bundle's part: in the bundle, else where ``given`` or the manifest says. Raises ModelError."""
    name = inside.name.replace("_", " ")
    if not part.inside:
        return find_source(given or part.base, name, weights=weights)
    if given is not None and str(given) != part.base and str(Path(given).resolve()) != part.base:
        raise ModelError(
            f"{inside.parent} brings its own {name} (from {part.base}), but {given} is configured; leave the setting "
            "out, or start from the plain language model."
        )
    return Source(str(inside), inside, part.base)


def load_image_processor(folder: Path) -> BaseImageProcessor:
    """Load the image processor that lies beside a tower. Raises ModelError."""
    processors: Any = AutoImageProcessor  # untyped in transformers
    with loading(folder, "image processor"):
        image_processor: BaseImageProcessor = processors.from_pretrained(folder)
    return image_processor


def completed(config: ModelConfig, manifest: Manifest) -> ModelConfig:
    """Return the config with the bundle's values for what it leaves open."""
    changes: dict[str, Any] = {}
    if config.image_grid_pinpoints is None and manifest.image_grid_pinpoints:
        changes["image_grid_pinpoints"] = manifest.image_grid_pinpoints
    if config.s2 and config.s2_scales is None and manifest.s2_scales:
        changes["s2_scales"] = manifest.s2_scales
    return config.replaced(changes) if changes else config


def check_settings(config: ModelConfig, manifest: Manifest, bundle: Path) -> None:
    """Raise ModelError where the config contradicts what the bundle's projector was trained with."""
    keys = ["mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "s2"]
    # What was trained without them may go on with them, not the other way round.
    keys += ["s2_scales"] if manifest.s2 else []
    keys += ["mm_patch_merge_type"] if manifest.mm_patch_merge_type != "flat" else []
    keys += ["mm_use_im_start_end"] if manifest.mm_use_im_start_end else []
    for key in keys:
        found, expected = getattr(config, key), getattr(manifest, key)
        if found != expected:
            raise ModelError(
                f"model.{key} is {found!r}, but the projector in {bundle} was trained with {expected!r}; set it so."
            )
