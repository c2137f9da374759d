"""Adapter folders loaded for a base that is in memory: their terms, projectors and templates.

An adapter may bring a projector (with image_newline), a tower and a template; tokenizer and the geometry of images are
the base's, because all requests share them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llava_ray.config.geometry import GEOMETRY_NAMES
from llava_ray.errors import ModelError
from llava_ray.generate.row_adapters import AdapterName, RowAdapters
from llava_ray.invocation import command
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.blueprint import Blueprint, read_blueprint
from llava_ray.model.formats.layout import CONFIG, EMBED_TOKENS, NON_LORA_FILE, Layout, LayoutKind, check_whole
from llava_ray.model.formats.part_sources import find_layout
from llava_ray.model.formats.vocabulary import image_token_ids
from llava_ray.model.loading import aspect_ratio, pretrained_config
from llava_ray.model.lora.adapter_terms import Terms, extract_lora_weights, load_terms
from llava_ray.model.lora.adapters import MERGE_TOLERANCE, compute_probe_logits, has_adapter, measure_drift
from llava_ray.model.network.int8_linear import has_int8_weights
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.quantization import find_dtype
from llava_ray.model.network.tower import VisionTower
from llava_ray.model.parts import find_newline, load_projector, load_tower_of
from llava_ray.model.tensors.tensor_reading import read_tensors


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter with its base's parts."""

    name: AdapterName
    """The name that requests use; None for the base's own adapter, where the base is a bundle with one."""
    terms: Terms
    parts: LlavaParts
    """The base's, with the adapter's own projector, tower and template."""

    def has_own_features(self, base: LlavaParts) -> bool:
        """Return whether it makes other embeddings of an image than the base: by its projector or tower."""
        return self.parts.llava is not base.llava or self.parts.tower is not base.tower


@dataclass(frozen=True)
class ServedAdapters:
    """All adapters of an engine, and a function that restores the base's own."""

    adapters: tuple[ServedAdapter, ...] = ()
    restore_base: Callable[[], None] = lambda: None

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names that requests may use."""
        return tuple(adapter.name for adapter in self.adapters if adapter.name is not None)


NO_ADAPTERS = ServedAdapters()


def load_adapters(base: LlavaParts, folders: Mapping[str, str | Path], *, extract_own: bool = False) -> ServedAdapters:
    """Load each folder (a bundle with an adapter, LLaVA's LoRA folder, or peft's) once, for the base.

    Where the base itself is such a bundle, its own adapter becomes one of them and is removed from the base; without
    ``folders`` only with ``extract_own``.
    Raises ModelError for an adapter of another base, or one that changes what requests share.
    """
    if not folders and not extract_own:
        return NO_ADAPTERS
    model, adapters = base.llava.language_model, list[ServedAdapter]()
    put_back = NO_ADAPTERS.restore_base
    if has_adapter(model):
        terms, expected, put_back = extract_lora_weights(model, base.layout.folder)
        _check_terms(model, terms, expected, base.layout.folder)
        adapters.append(ServedAdapter(None, terms, base))
    try:
        adapters += [load_beside(base, name, folder) for name, folder in folders.items()]
    except BaseException:
        put_back()
        raise
    return ServedAdapters(tuple(adapters), put_back)


def load_beside(base: LlavaParts, name: str, folder: str | Path) -> ServedAdapter:
    """Load one adapter for the base. Raises ModelError."""
    layout, is_pefts = find_adapter(name, folder)
    parts = base if is_pefts else _parts_beside(base, name, layout)
    assert layout.adapter is not None
    model, fingerprint = base.llava.language_model, base.manifest.language_model.fingerprint
    terms, expected = load_terms(model, layout.adapter, base_fingerprint=fingerprint)
    _check_terms(model, terms, expected, layout.adapter)
    return ServedAdapter(name, terms, parts)


def find_adapter(name: str, folder: str | Path) -> tuple[Layout, bool]:
    """Return the layout of an adapter's folder, and whether it holds peft's files only.

    Raises ModelError for any other folder.
    """
    _, layout = find_layout(str(folder), weights=True)
    beside = [file for file in (CONFIG, NON_LORA_FILE) if (layout.folder / file).is_file()]
    is_pefts = layout.kind is LayoutKind.ORIGINAL_LORA and not beside
    if not is_pefts:
        check_whole(layout)
    if layout.adapter is None:
        raise ModelError(
            f"adapter {name!r}: {layout.folder} ({layout.kind}) is no adapter; expected a bundle with an "
            "adapter, LLaVA's LoRA folder or peft's. A whole model goes into model=."
        )
    return layout, is_pefts


def read_beside(base: Blueprint, name: str, layout: Layout, *, own_tower: bool = False) -> Blueprint:
    """Read an adapter's own settings, and check them against the base's. Raises ModelError.

    With ``own_tower`` it may have a tower inside that is not the base's.
    """
    config = pretrained_config(
        layout,
        layout.folder,
        model_base=base.language_source.folder,
        vision_tower=None if layout.has_vision_tower else base.tower_source.folder,
        version=layout.settings.get("version") or base.config.version,
    )
    own = read_blueprint(config, aspect_ratio(layout), weights=True)
    _check_shared(base, own, name, own_tower=own_tower)
    return own


def _parts_beside(base: LlavaParts, name: str, layout: Layout) -> LlavaParts:
    """Return the base with an adapter's own parts. Raises ModelError if it changes what requests share."""
    own, companions = read_beside(base, name, layout, own_tower=True), read_tensors(layout.companions)
    _check_embeddings(base, companions.get(EMBED_TOKENS), name)
    manifest = base.manifest.model_copy(update={"mm_projector_type": own.config.mm_projector_type})
    model = base.llava.language_model
    device, dtype = model.device, find_dtype(model)
    projector = load_projector(own, manifest, seed=0).to(device, dtype)
    newline = find_newline(own, companions, seed=0).to(device, dtype)
    llava = Llava(projector, model, base.mm_hidden_size, base.image_tokens, newline)
    _check_finite({key: part for key, part in llava.state_dict().items() if _is_beside(key)}, layout.folder)
    return replace(
        base,
        llava=base.llava if _is_same(llava, base.llava) else llava.eval(),
        tower=_tower_beside(base, own),
        template=own.template,
    )


def _tower_beside(base: LlavaParts, own: Blueprint) -> VisionTower:
    """Return an adapter's own tower, the base's if it has none. Raises ModelError."""
    if not _has_own_tower(base, own):
        return base.tower
    like = next(base.tower.parameters())
    tower = load_tower_of(own, like.dtype).to(like.device).eval()
    _check_finite(tower.state_dict(), own.layout.folder)
    return tower


def _has_own_tower(base: Blueprint, own: Blueprint) -> bool:
    """Return whether an adapter's folder holds a tower that is not known to be the base's."""
    if not own.layout.has_vision_tower:
        return False
    towers = [one.manifest and one.manifest.vision_tower.fingerprint for one in (base, own)]
    return towers[0] is None or towers[0] != towers[1]


def _check_shared(base: Blueprint, own: Blueprint, name: str, *, own_tower: bool) -> None:
    """Check that an adapter was trained with the base's tokenizer, image settings and tower. Raises ModelError.

    With ``own_tower`` a tower inside its folder may have other weights, but not another form.
    """
    shared = [name for name in GEOMETRY_NAMES if name != "mm_projector_type"]
    found = {name: (getattr(own.geometry, name), getattr(base.geometry, name)) for name in shared}
    if _has_own_tower(base, own):
        found["image_processor"] = own.image_spec, base.image_spec
        found["image_tokens"] = own.image_tokens, base.image_tokens
        found["mm_hidden_size"] = own.mm_hidden_size, base.mm_hidden_size
        found["vision_tower"] = ("a tower of its own", "a tower of its own" if own_tower else "another one")
    elif own.manifest is not None and base.manifest is not None:
        towers = own.manifest.vision_tower.fingerprint[:12], base.manifest.vision_tower.fingerprint[:12]
        found["vision_tower (fingerprint)"] = towers
    for key, (mine, shared) in found.items():
        if mine != shared:
            raise ModelError(
                f"adapter {name!r} ({own.layout.folder}) was trained with {key} {mine!r}, but "
                f"{base.config.model_name_or_path} has {shared!r}, which all requests share. Serve it as a separate "
                "model: put it into model=."
            )


def _check_embeddings(base: LlavaParts, embeddings: Tensor | None, name: str) -> None:
    """Check that an adapter keeps the base's embeddings of image tokens. Raises ModelError."""
    if embeddings is None:
        return
    ids = list(image_token_ids(base.tokenizer))
    rows = base.llava.language_model.get_input_embeddings().get_parameter("weight")[ids]
    if len(embeddings) < len(ids) or not torch.equal(rows, embeddings[-len(ids) :].to(rows)):
        raise ModelError(
            f"adapter {name!r} brings embeddings of its own for the tokens around images, which all requests share. "
            "Serve it as a separate model: put it into model=."
        )


def _is_same(one: Llava, other: Llava) -> bool:
    """Return whether two models have equal projectors."""
    mine, theirs = (
        {name: tensor for name, tensor in llava.state_dict().items() if _is_beside(name)} for llava in (one, other)
    )
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _is_beside(name: str) -> bool:
    """Return whether a tensor of a model is none of its language model's."""
    return not name.startswith("language_model.")


def _check_finite(tensors: Mapping[str, Tensor | None], folder: Path) -> None:
    """Check that an adapter's tensors have neither NaN nor infinite values. Raises ModelError that names the first."""
    for name, tensor in tensors.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            raise ModelError(
                f"the adapter in {folder} has values in {name} that are not finite (NaN or infinite). Its training "
                "diverged, or the file is damaged: copy it again, or use an earlier checkpoint."
            )


@torch.no_grad()
def _check_terms(model: PreTrainedModel, terms: Terms, expected: Tensor, folder: Path) -> None:
    """Check that the model with these terms gives the same logits as with peft's layers. Raises ModelError."""
    for name, term in terms.items():
        _check_finite({f"{name} ({key})": tensor for key, tensor in vars(term).items()}, folder)
    rows = RowAdapters(model, {"it": terms})
    try:
        rows.choose_one("it", len(expected))
        drift = measure_drift(compute_probe_logits(model), expected)
    finally:
        rows.remove()
    precision = torch.bfloat16 if has_int8_weights(model) else find_dtype(model)
    if not drift <= MERGE_TOLERANCE[precision]:
        raise ModelError(
            f"the adapter in {folder} does more than low-rank terms can say (logits of a fixed text differ by "
            f"{drift:.2g} of their spread). Merge it ({command('export', 'merge')}) and serve the whole model."
        )
