"""A model's blueprint: everything that is known before its weights are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoImageProcessor,
    BaseImageProcessor,
    CLIPImageProcessorPil,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from llava_ray.chat.template import Template
from llava_ray.config.geometry import ModelGeometry, compute_feature_width, is_addable
from llava_ray.config.model import ModelConfig
from llava_ray.errors import ModelError
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.tokens import ImageTokens
from llava_ray.model.formats.declared_sizes import read_config
from llava_ray.model.formats.hub.read import PROCESSOR_FILES
from llava_ray.model.formats.layout import CONFIG, TOKENIZER_FILES, Layout, LayoutKind, check_whole, is_timm
from llava_ray.model.formats.manifest import Manifest
from llava_ray.model.formats.part_sources import find_language_model, find_layout, find_vision_tower
from llava_ray.model.formats.preprocessor import check_preprocessor
from llava_ray.model.formats.sources import (
    Source,
    loading,
    make_config,
)
from llava_ray.model.formats.timm_towers import make_timm_processor
from llava_ray.model.formats.token_rows import check_rows
from llava_ray.model.formats.tower_loading import read_tower_config
from llava_ray.model.formats.vocabulary import image_token_ids, load_text_side
from llava_ray.model.image_geometry import find_s2_scales, read_image_geometry
from llava_ray.model.tensors.tensor_files import read_json_object
from llava_ray.reading import is_file

# LLaVA's own image processors in transformers: CLIP's with a way of making images square or tiles, which is ours here.
_LLAVA_PROCESSORS = ("LlavaImageProcessor", "LlavaNextImageProcessor")


@dataclass(frozen=True)
class ResolvedParts:
    """Where a model's parts are, and its config with the folder's values for what it leaves open."""

    config: ModelConfig
    root: Source
    layout: Layout
    language: Source
    tower: Source


@dataclass(frozen=True)
class Blueprint:
    """A model without its weights: everything that the data path needs, cheap enough for every process.

    ``layout`` is the folder that it goes on from; ``bundle`` and ``manifest`` are that folder's if it is a bundle.
    ``new_token_ids`` have no embeddings of their own in the language model's files.
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
    tokenizer_source: Source
    layout: Layout
    bundle: Path | None
    manifest: Manifest | None

    @property
    def hidden_size(self) -> int:
        """Return the width of the language model's embeddings."""
        return int(self.language_config.get_text_config().hidden_size)

    @property
    def mm_hidden_size(self) -> int:
        """Width of the tower's features, all layers and scales together."""
        width = int(self.tower_config.hidden_size)
        return compute_feature_width(width, self.config.mm_vision_select_layer, self.s2_scales)

    @property
    def s2_scales(self) -> tuple[int, ...]:
        """Return the sides in pixels of S2's scales; () without S2."""
        return find_s2_scales(self.config, self.image_processor)

    @property
    def geometry(self) -> ModelGeometry:
        """The model's geometry, with nothing left open."""
        return ModelGeometry.resolve(
            self.config,
            mm_hidden_size=self.mm_hidden_size,
            hidden_size=self.hidden_size,
            s2_scales=self.s2_scales,
            image_aspect_ratio=self.image_spec.aspect_ratio,
            image_grid_pinpoints=self.image_spec.grid_pinpoints,
        )


def resolve_parts(config: ModelConfig, *, weights: bool = False, offline: bool = False) -> ResolvedParts:
    """Find out where the parts of a model are, for a run, an export or a dry run alike.

    ``weights`` downloads those of hub ids as well, and refuses a folder that is not whole. ``offline`` downloads
    nothing: a hub id is known by its config in the hub's cache, or by a built-in one. Raises ModelError for a part that
    cannot be found, or settings that are not those of the projector which the folder brings.
    """
    root, layout = find_layout(config.model_name_or_path, weights=weights, offline=offline)
    if weights:
        check_whole(layout)
    config = completed(config, layout)
    check_projector_settings(config, layout)
    language = find_language_model(config, root, layout, weights=weights, offline=offline)
    tower = find_vision_tower(config, root, layout, weights=weights, offline=offline)
    return ResolvedParts(config, root, layout, language, tower)


def read_blueprint(config: ModelConfig, image_aspect_ratio: str, *, weights: bool = False) -> Blueprint:
    """Read configs, tokenizer, template and image geometry of any kind of model folder.

    ``weights`` downloads those of hub ids as well, and refuses a folder that is not whole. Raises ModelError or
    ConfigError.
    """
    found = resolve_parts(config, weights=weights)
    config, root, layout = found.config, found.root, found.layout
    language, tower = found.language, found.tower
    has_tokenizer = any(is_file(root.folder / name) for name in TOKENIZER_FILES)
    tokenizer_source = root if has_tokenizer or layout.has_language_model else language
    tokenizer, new_ids, template = load_text_side(
        tokenizer_source.folder,
        config.version,
        start_end=config.mm_use_im_start_end,
        patch=config.mm_use_im_patch_token,
    )
    if not layout.has_language_model:
        new_ids = image_token_ids(tokenizer)  # the folder's tokenizer is ahead of the language model that it names
    language_config = make_config(language.config, language.folder, "language model")
    tower_config = read_tower_config(tower)
    image_processor = load_image_processor(tower.beside)
    with loading(tower.beside, "image geometry"):
        spec, tokens = read_image_geometry(config, image_aspect_ratio, tower_config, image_processor)
    check_rows(tokenizer, new_ids, language, tokenizer_source.folder)
    return Blueprint(
        config=config,
        tokenizer=tokenizer,
        new_token_ids=new_ids,
        template=template,
        image_processor=image_processor,
        image_spec=spec,
        image_tokens=tokens,
        language_config=language_config,
        tower_config=tower_config,
        language_source=language,
        tower_source=tower,
        tokenizer_source=tokenizer_source,
        layout=layout,
        bundle=layout.folder if layout.kind is LayoutKind.BUNDLE else None,
        manifest=layout.manifest,
    )


def load_image_processor(folder: Path) -> BaseImageProcessor:
    """Load the image processor beside a tower. Raises ModelError."""
    processors: Any = AutoImageProcessor  # untyped in transformers
    for name in PROCESSOR_FILES:
        if is_file(folder / name):
            read_json_object(folder / name)  # transformers reads it without bounds
    config = read_config(folder / CONFIG) if is_file(folder / CONFIG) else {}
    if is_timm(config):  # which says it there; transformers would look no further either
        return make_timm_processor(config, str(folder / CONFIG))
    with loading(folder, "image processor"):
        # A folder may name code of its own: refused here at once, asked for at the terminal otherwise.
        image_processor: BaseImageProcessor = processors.from_pretrained(folder, trust_remote_code=False)
        settings = image_processor.to_dict()
        if str(settings.get("image_processor_type")).removesuffix("Pil").removesuffix("Fast") in _LLAVA_PROCESSORS:
            known = CLIPImageProcessorPil().to_dict()
            kept = {key: value for key, value in settings.items() if key in known and key != "image_processor_type"}
            clip: Any = CLIPImageProcessorPil
            image_processor = clip(**kept)
            settings = image_processor.to_dict()
    check_preprocessor(settings, f"{folder}, the image processor")
    return image_processor


def completed(config: ModelConfig, layout: Layout) -> ModelConfig:
    """Return the config with the folder's values for settings that are not set."""
    open_keys = ["image_grid_pinpoints"] + (["s2_scales"] if config.s2 else [])
    changes = {
        key: layout.settings[key] for key in open_keys if getattr(config, key) is None and layout.settings.get(key)
    }
    return config.replaced(changes) if changes else config


def check_projector_settings(config: ModelConfig, layout: Layout) -> None:
    """Raise ModelError where the config contradicts what the folder's projector was trained with.

    What was trained without an addable setting may go on with it, not the other way round.
    """
    for key in sorted(layout.settings.keys() & ModelConfig.model_fields.keys() - {"version"}):
        found, expected = getattr(config, key), layout.settings[key]
        if is_addable(key, expected):
            continue
        if found != expected:
            raise ModelError(
                f"model.{key} is {found!r}, but the projector in {layout.folder} was trained with {expected!r}; set "
                "it so."
            )
