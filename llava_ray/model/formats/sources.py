"""Locations of a part's files: a folder, or a hub id in the hub's own cache."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.errors import ModelError
from llava_ray.model.formats.declared_sizes import check_declared, read_config
from llava_ray.model.formats.hub.settings import hub_language_config, is_hub
from llava_ray.model.formats.hub_ids import HubId, download, is_hub_url, parse_hub_id
from llava_ray.model.formats.known_models import KNOWN_CONFIGS
from llava_ray.model.formats.layout import CONFIG, Layout, LayoutKind
from llava_ray.model.formats.layouts import TOWER_TYPES, read_layout
from llava_ray.model.formats.original.settings import is_original, original_language_config
from llava_ray.model.tensors.tensor_files import NO_WEIGHTS, StoredTensor
from llava_ray.reading import is_file, is_folder, short_repr, wrap_errors

PartName = Literal["language_model", "vision_tower"]


@dataclass(frozen=True)
class Source:
    """The location of a part: its ``name`` (hub id, or absolute folder) and the ``folder`` of its weights.

    ``origin`` is what the part was tuned from, or ``name`` again.
    """

    name: str
    folder: Path
    origin: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """The part's own config.json."""
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)
    """Its weights by the part's own names; empty where they were not requested."""
    settings_folder: Path | None = None
    """Folder of image processor or generation config, if not ``folder``."""

    @property
    def beside(self) -> Path:
        """Return the folder of the settings that belong to the weights."""
        return self.settings_folder or self.folder


def find_source(name: str | Path, part: str, *, weights: bool = True, offline: bool = False) -> Source:
    """Find a part's files, downloading a hub id into the hub's cache. Without ``weights`` only small files are fetched.

    ``offline`` fetches nothing: see ``_find_offline``. Raises ModelError that names the path and the remedy when there
    is nothing to be found.
    """
    if is_hub_url(name):
        hub_id = parse_hub_id(name)
    else:
        try:
            folder = Path(name).expanduser()
        except (TypeError, RuntimeError) as error:  # not text, or the home of an unknown user
            raise ModelError(f"no such {part}: {short_repr(name)} is neither a folder nor a hub id.") from error
        if is_folder(folder):
            return Source(str(folder.resolve()), folder.resolve(), str(folder.resolve()))
        hub_id = HubId(str(name))
    if offline:
        return _find_offline(hub_id, part)
    return Source(str(hub_id), download(hub_id, part, weights=weights), str(hub_id))


def _find_offline(hub_id: HubId, part: str) -> Source:
    """Find a hub id in the hub's cache, or its config among those that are built in.

    Raises ModelError where a download would be needed.
    """
    name = str(hub_id)
    try:
        cached = try_to_load_from_cache(hub_id.name, CONFIG, revision=hub_id.revision)
    except HFValidationError:
        cached = None
    if isinstance(cached, str):
        return Source(name, Path(cached).parent, name)
    if name in KNOWN_CONFIGS:
        return Source(name, Path(name), name, KNOWN_CONFIGS[name])
    raise ModelError(
        f"the size of the {part} cannot be known: {name!r} is no folder here, its config is not in the hub's cache, "
        f"and it is none of {', '.join(KNOWN_CONFIGS)}. A dry run downloads nothing: fetch its config.json first "
        f"(hf download {hub_id.name} config.json), or give a folder."
    )


def read_layout_of(root: Source) -> Layout:
    """Return what a found folder is; of a config that is built in, a plain model without files. Raises ModelError."""
    if not root.config:
        return read_layout(root.folder)
    is_tower = root.config["model_type"] in TOWER_TYPES
    kind = LayoutKind.VISION_TOWER if is_tower else LayoutKind.LANGUAGE_MODEL
    return Layout(root.folder, kind, root.config, language_config=None if is_tower else root.config)


def find_part(name: str | Path, part: PartName, *, weights: bool = True, offline: bool = False) -> Source:
    """Find a language model or vision tower: a folder of its own, or the one inside any kind of model folder.

    Without ``weights`` its tensors may be missing. Raises ModelError.
    """
    root = find_source(name, _words(part), weights=weights, offline=offline)
    return part_of(read_layout_of(root), root.name, part, weights=weights, offline=offline)


def part_of(
    layout: Layout,
    name: str,
    part: PartName,
    *,
    weights: bool,
    settings_from: str | Path | None = None,
    offline: bool = False,
) -> Source:
    """Return the part in the folder called ``name``. Raises ModelError if there is none.

    A tower inside a checkpoint of the original's takes config and image processor from the folder or hub id
    ``settings_from``, by default the tower that the checkpoint names: it holds weights alone.
    """
    holds = layout.has_language_model if part == "language_model" else layout.has_vision_tower
    is_plain = layout.kind in (LayoutKind.LANGUAGE_MODEL, LayoutKind.VISION_TOWER)
    if not holds and not is_plain:
        named = layout.base if part == "language_model" else layout.vision_tower
        raise ModelError(
            f"{name} ({layout.kind}) holds no {_words(part)}" + (f", it names {named!r}: give that." if named else ".")
        )
    tensors = layout.part(layout.kind.name.lower() if is_plain else part)
    is_other_type = layout.kind is LayoutKind.LANGUAGE_MODEL and part == "vision_tower"  # its config is rejected later
    if weights and not is_other_type and (layout.missing or not tensors):
        what = layout.missing[0] if layout.missing else NO_WEIGHTS
        raise ModelError(f"the {_words(part)} in {layout.folder} ({layout.kind}) is incomplete: {what}")
    if is_plain:
        return Source(name, layout.folder, name, layout.config, tensors)
    if layout.manifest is not None:
        inside = layout.folder / part
        origin = getattr(layout.manifest, part).base
        return Source(str(inside), inside, origin, read_config(inside / CONFIG), tensors)
    config = layout.language_config if part == "language_model" else layout.tower_config
    if config is not None:
        return Source(name, layout.folder, name, config, tensors)
    settings = _find_settings(layout, settings_from, offline=offline)
    return Source(name, layout.folder, name, settings.config, tensors, settings.folder)


def _find_settings(layout: Layout, given: str | Path | None, *, offline: bool) -> Source:
    """Find the tower that tells the settings of the one inside a checkpoint. Raises ModelError."""
    tower = given or layout.vision_tower
    if tower is None:
        raise ModelError(
            f"{layout.folder} holds a vision tower without its config.json, and names none in mm_vision_tower; give "
            "the tower that it was tuned from as vision_tower."
        )
    return find_part(tower, "vision_tower", weights=False, offline=offline)


def _words(part: str) -> str:
    return part.replace("_", " ")


def loading(path: str | Path, part: str) -> AbstractContextManager[None]:
    """Convert a failure to load to a ModelError that names the part, its place, and the reason."""
    remedy = "Expected a folder as transformers' save_pretrained writes it; copy it again, or point at another."
    return wrap_errors(f"the {part} in {path}", remedy, says="cannot be loaded")


def make_config(values: Mapping[str, Any], where: str | Path, part: str) -> PreTrainedConfig:
    """Build a part's config from the values of its config.json. Raises ModelError."""
    check_declared(values, f"the {part} in {where}, config.json")
    model_type = str(values.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"the {part} in {where} is of an unknown architecture: model_type is {short_repr(model_type)} in its "
            f"config.json, which transformers {transformers_version} does not know. Check the "
            "file, or install a version that does."
        )
    config_class: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    # Old versions write it as null, and for new ones the key is deprecated.
    settings = {key: value for key, value in values.items() if key != "rope_scaling" or value is not None}
    with loading(where, part):
        config = config_class.from_dict(settings)
    config.name_or_path = str(where)
    return config


def load_padding_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad, without adding to its vocabulary. Raises ModelError.

    Without a padding token its unknown token is used (as in LLaVA), else its end token: padding is always masked, so
    its id does not matter.
    """
    tokenizer = load_tokenizer(path, _language_config(Path(path)))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer in {path} has neither a padding, an unknown nor an end token; expected at least an end "
            "token (eos_token in tokenizer_config.json)."
        )
    return tokenizer


def _language_config(folder: Path) -> PreTrainedConfig | None:
    """Return the language model's config from a published LLaVA's; None where config.json is its own.

    transformers chooses the class of a tokenizer by the config's model type.
    """
    if not is_file(folder / CONFIG):
        return None
    config = read_config(folder / CONFIG)
    if is_original(config):
        return make_config(original_language_config(config), folder, "language model")
    return make_config(hub_language_config(config), folder, "language model") if is_hub(config) else None


LANGUAGE_MODEL: PartName = "language_model"


VISION_TOWER: PartName = "vision_tower"
