"""Everything that is known of a model before its weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedConfig, PreTrainedTokenizerBase

from llava_ray.chat.templates import Template, find_template
from llava_ray.config.sections import ModelConfig
from llava_ray.errors import ModelError
from llava_ray.images.geometry import ImageSpec
from llava_ray.model.manifest import Manifest, Part, is_bundle, read_manifest
from llava_ray.model.sources import Source, find_source, load_padding_tokenizer, loading, read_config
from llava_ray.model.tower import count_image_tokens, find_family, read_tower_config

LANGUAGE_MODEL = "language_model"
VISION_TOWER = "vision_tower"
ADAPTER = "adapter"


@dataclass(frozen=True)
class Blueprint:
    """A model without its weights: all that the data path needs, cheap enough for every process.

    ``bundle`` and ``manifest`` are the llava_ray bundle that the model goes on from, if it does.
    """

    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    template: Template
    image_processor: BaseImageProcessor
    image_spec: ImageSpec
    num_image_tokens: int
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
        """Width of the tower's features."""
        return int(self.tower_config.hidden_size)


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
        check_settings(config, manifest, bundle)
        language = part_source(manifest.language_model, bundle / LANGUAGE_MODEL, language_model, weights=weights)
        tower = part_source(manifest.vision_tower, bundle / VISION_TOWER, config.vision_tower, weights=weights)
    else:
        language, tower = root, find_tower_source(config, weights=weights)
    tokenizer = load_padding_tokenizer(root.folder)
    language_config = read_config(language.folder, "language model")
    tower_config = read_tower_config(tower.folder)
    image_processor = load_image_processor(tower.folder)
    spec = ImageSpec.from_processor(image_processor, image_aspect_ratio)
    check_image_size(tower_config, spec, tower.folder)
    return Blueprint(
        config=config,
        tokenizer=tokenizer,
        template=find_template(config.version, tokenizer),
        image_processor=image_processor,
        image_spec=spec,
        num_image_tokens=count_image_tokens(tower_config, config.mm_vision_select_feature, spec.height, spec.width),
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


def check_settings(config: ModelConfig, manifest: Manifest, bundle: Path) -> None:
    """Raise ModelError where the config contradicts what the bundle's projector was trained with."""
    for key in ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"):
        found, expected = getattr(config, key), getattr(manifest, key)
        if found != expected:
            raise ModelError(
                f"model.{key} is {found!r}, but the projector in {bundle} was trained with {expected!r}; set it so."
            )


def check_image_size(config: PreTrainedConfig, spec: ImageSpec, folder: Path) -> None:
    """Raise ModelError if the image processor makes another size than the tower takes."""
    if find_family(config).fixed_size and (spec.height, spec.width) != (config.image_size, config.image_size):
        raise ModelError(
            f"the image processor in {folder} makes {spec.height} x {spec.width} pixels, but the tower takes "
            f"{config.image_size} x {config.image_size}; mend crop_size or size in preprocessor_config.json."
        )
