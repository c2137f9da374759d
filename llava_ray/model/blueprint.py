"""Everything that is known of a model before its weights are read."""

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

from llava_ray.chat.templates import Template
from llava_ray.config.sections import ModelConfig
from llava_ray.errors import ModelError
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.tokens import ImageTokens
from llava_ray.model.image_geometry import find_s2_scales, read_image_geometry
from llava_ray.model.layout import TOKENIZER_FILES, Kind, Layout, check_whole
from llava_ray.model.layouts import read_layout
from llava_ray.model.manifest import Manifest
from llava_ray.model.preprocessor import check_preprocessor
from llava_ray.model.published_layouts import PROCESSOR_FILES
from llava_ray.model.sources import (
    PartName,
    Source,
    find_part,
    find_source,
    loading,
    make_config,
    part_of,
)
from llava_ray.model.tensor_files import read_json
from llava_ray.model.token_rows import check_rows
from llava_ray.model.tower import feature_width, read_tower_config
from llava_ray.model.vocabulary import image_token_ids, load_text_side
from llava_ray.reading import is_file, is_folder

LANGUAGE_MODEL: PartName = "language_model"
VISION_TOWER: PartName = "vision_tower"

# LLaVA's own image processors in transformers: CLIP's with a way of making images square or tiles, which is ours here.
LLAVA_PROCESSORS = ("LlavaImageProcessor", "LlavaNextImageProcessor")
# Settings that may be added to a model, and what they are without.
ADDABLE: dict[str, tuple[Any, ...]] = {
    "mm_patch_merge_type": ("flat",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "s2_scales": (None, ()),
    "image_grid_pinpoints": (None, ()),
}
# What must be the same in a base's config as in the config that an adapter or projector was trained with.
SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


@dataclass(frozen=True)
class Blueprint:
    """A model without its weights: all that the data path needs, cheap enough for every process.

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


def read_blueprint(config: ModelConfig, image_aspect_ratio: str, *, weights: bool = False) -> Blueprint:
    """Read configs, tokenizer, template and image geometry of any kind of model folder.

    ``weights`` downloads those of hub ids as well, and refuses a folder that is not whole. Raises ModelError or
    ConfigError.
    """
    root, layout = find_layout(config.model_name_or_path, weights=weights)
    if weights:
        check_whole(layout)
    config = completed(config, layout)
    check_settings(config, layout)
    language = find_language_model(config, root, layout, weights=weights)
    tower = find_vision_tower(config, root, layout, weights=weights)
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
        bundle=layout.folder if layout.kind is Kind.BUNDLE else None,
        manifest=layout.manifest,
    )


def find_layout(name: str, *, weights: bool) -> tuple[Source, Layout]:
    """Find a model folder or hub id and what it is. Raises ModelError."""
    root = find_source(name, "language model", weights=weights)
    layout = read_layout(root.folder)
    if layout.kind is Kind.ORIGINAL and not layout.tensors and root.name != str(root.folder):
        # Without its weight files a hub's projector-only folder cannot be told from a whole model.
        root = find_source(name, "language model")
        layout = read_layout(root.folder)
    if layout.kind is Kind.VISION_TOWER:
        raise ModelError(f"{name} is a vision tower, not a language model; give it as vision_tower.")
    if layout.folder != root.folder:  # a run's checkpoint, whose model lies below
        root = Source(str(layout.folder), layout.folder, str(layout.folder))
    return root, layout


def find_language_model(config: ModelConfig, root: Source, layout: Layout, *, weights: bool) -> Source:
    """Find the language model: inside the folder, else the base that is configured or named. Raises ModelError."""
    if layout.has_language_model:
        inside = part_of(layout, root.name, LANGUAGE_MODEL, weights=weights)
        refuse_other(config.model_base, inside, LANGUAGE_MODEL, layout)
        return inside
    base = config.model_base or layout.base
    if base is None:
        raise ModelError(
            f"{root.name} ({layout.kind}) holds no language model and does not name its base; give the one that it "
            "was trained over as model_base."
        )
    if config.model_base is None:
        check_there(base, LANGUAGE_MODEL, root, "model_base")
    source = find_part(base, LANGUAGE_MODEL, weights=weights)
    check_base(layout, source)
    return source


def find_vision_tower(config: ModelConfig, root: Source, layout: Layout, *, weights: bool) -> Source:
    """Find the tower: inside the folder, else the one that is configured or named. Raises ModelError."""
    if layout.has_vision_tower:
        inside = part_of(layout, root.name, VISION_TOWER, weights=weights, settings_from=config.vision_tower)
        if inside.beside == inside.folder:
            refuse_other(config.vision_tower, inside, VISION_TOWER, layout)
        return inside
    named = layout.vision_tower
    if named and is_folder(layout.folder / named):
        named = str(layout.folder / named)
    tower = config.vision_tower or named
    if not tower:
        raise ModelError(
            f"{config.model_name_or_path} is a {layout.kind} that names no vision tower, and model.vision_tower is not "
            "set; name a CLIP, SigLIP or DINOv2 tower, or start from a llava_ray bundle, which brings its own."
        )
    if config.vision_tower is None:
        check_there(tower, VISION_TOWER, root, "vision_tower")
    return find_part(tower, VISION_TOWER, weights=weights)


def check_there(named: str, part: PartName, root: Source, setting: str) -> None:
    """Raise ModelError if the folder of a part that a model names is not there."""
    if Path(named).is_absolute() and not is_folder(Path(named)):
        raise ModelError(
            f"no such {part.replace('_', ' ')}: {root.name} names the folder {named}, which is not there. Copy both so "
            f"that they lie to each other as before, or say where it is with {setting}."
        )


def refuse_other(given: str | None, inside: Source, part: PartName, layout: Layout) -> None:
    """Raise ModelError if another part is configured than the one that the folder brings."""
    if given is not None and given != inside.origin and str(Path(given).resolve()) != inside.origin:
        raise ModelError(
            f"{layout.folder} brings its own {part.replace('_', ' ')} (from {inside.origin}), but {given} is "
            "configured; leave the setting out, or start from the plain language model."
        )


def check_base(layout: Layout, base: Source) -> None:
    """Raise ModelError if an adapter or projector says that it was trained over another language model."""
    if layout.language_config is None:
        return
    trained = make_config(layout.language_config, layout.folder, "language model").to_dict()
    given = make_config(base.config, base.folder, "language model").to_dict()
    for key in SHAPE_KEYS:
        if trained.get(key) != given.get(key):
            raise ModelError(
                f"{base.name} is not the base that {layout.folder} was trained over: {key} is {given.get(key)!r} in "
                f"its config.json, expected {trained.get(key)!r}. Give the right one as model_base"
                + (f" ({layout.base})." if layout.base else ".")
            )


def load_image_processor(folder: Path) -> BaseImageProcessor:
    """Load the image processor that lies beside a tower. Raises ModelError."""
    processors: Any = AutoImageProcessor  # untyped in transformers
    for name in PROCESSOR_FILES:
        if is_file(folder / name):
            read_json(folder / name)  # transformers reads it without bounds
    with loading(folder, "image processor"):
        # A folder may name code of its own: refused here at once, asked for at the terminal otherwise.
        image_processor: BaseImageProcessor = processors.from_pretrained(folder, trust_remote_code=False)
        settings = image_processor.to_dict()
        if str(settings.get("image_processor_type")).removesuffix("Pil").removesuffix("Fast") in LLAVA_PROCESSORS:
            known = CLIPImageProcessorPil().to_dict()
            kept = {key: value for key, value in settings.items() if key in known and key != "image_processor_type"}
            clip: Any = CLIPImageProcessorPil
            image_processor = clip(**kept)
            settings = image_processor.to_dict()
    check_preprocessor(settings, f"{folder}, the image processor")
    return image_processor


def completed(config: ModelConfig, layout: Layout) -> ModelConfig:
    """Return the config with the folder's values for what it leaves open."""
    open_keys = ["image_grid_pinpoints"] + (["s2_scales"] if config.s2 else [])
    changes = {
        key: layout.settings[key] for key in open_keys if getattr(config, key) is None and layout.settings.get(key)
    }
    return config.replaced(changes) if changes else config


def check_settings(config: ModelConfig, layout: Layout) -> None:
    """Raise ModelError where the config contradicts what the folder's projector was trained with.

    What was trained without one of ADDABLE may go on with it, not the other way round.
    """
    for key in sorted(layout.settings.keys() & ModelConfig.model_fields.keys() - {"version"}):
        found, expected = getattr(config, key), layout.settings[key]
        if key in ADDABLE and expected in ADDABLE[key]:
            continue
        if found != expected:
            raise ModelError(
                f"model.{key} is {found!r}, but the projector in {layout.folder} was trained with {expected!r}; set "
                "it so."
            )
