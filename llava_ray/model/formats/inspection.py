"""Inspection of a model folder from headers alone: without torch, and without reading weights."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llava_ray.config.geometry import FEATURE_NAMES, GEOMETRY_NAMES
from llava_ray.model.formats.layout import ADAPTER_FILES, Layout, LayoutKind
from llava_ray.model.formats.layouts import read_layout
from llava_ray.model.formats.token_rows import check_layout_rows, find_image_token, image_token_note
from llava_ray.model.tensors.tensor_files import StoredTensor, read_tensor_file

_PARTS = ("language_model", "vision_tower", "projector")
_FIRST = (
    "mm_projector_type",
    *FEATURE_NAMES[:2],
    "image_aspect_ratio",
    "mm_patch_merge_type",
    "image_grid_pinpoints",
    "s2",
)
# Settings that are told, in this order, where a folder has them.
_TOLD = (*dict.fromkeys((*_FIRST, *GEOMETRY_NAMES)), "model_max_length")


@dataclass(frozen=True)
class InspectedPart:
    """One part of a model: its contents in the folder, or the place that the folder names."""

    name: str
    model_type: str | None = None
    """transformers' model type, if a config.json states it."""
    named: str | None = None
    """Hub id or folder of a part that is not inside."""
    num_tensors: int = 0
    num_parameters: int = 0
    num_bytes: int = 0
    dtypes: tuple[str, ...] = ()
    """Data types, the most frequent first."""


@dataclass(frozen=True)
class Inspection:
    """The result of ``export.py inspect``; ``missing`` lists what is needed before the model can be loaded."""

    folder: str
    kind: str
    template: str | None
    parts: tuple[InspectedPart, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Notes for the user."""

    def to_json(self) -> str:
        """Convert the inspection to one JSON object."""
        return json.dumps(asdict(self))


def inspect(path: Path) -> Inspection:
    """Inspect a model folder of any layout. Raises ModelError for a folder that is not a model, or is damaged."""
    layout = read_layout(path)
    check_layout_rows(layout)
    parts = [_inspect_part(layout, name) for name in _PARTS]
    if newline := layout.tensors.get("image_newline"):
        parts.append(_describe_part("image_newline", [newline]))
    if layout.adapter is not None:
        files = [layout.adapter / name for name in ADAPTER_FILES if (layout.adapter / name).is_file()]
        tensors = [tensor for file in files[:1] for tensor in read_tensor_file(file).values()]
        parts.append(_describe_part("adapter", tensors))
    return Inspection(
        folder=str(layout.folder),
        kind=str(layout.kind),
        template=layout.settings.get("version"),
        parts=tuple(part for part in parts if part.num_tensors or part.named),
        settings={key: layout.settings[key] for key in _TOLD if layout.settings.get(key) not in (None, False)},
        missing=(*layout.missing, *_untold(layout)),
        notes=notes_of(layout),
    )


def notes_of(layout: Layout) -> tuple[str, ...]:
    """Return notes for the user on a folder."""
    note = image_token_note(layout.config, find_image_token(layout.folder)) if layout.kind is LayoutKind.HUB else None
    return (*layout.notes, note) if note else layout.notes


def _inspect_part(layout: Layout, name: str) -> InspectedPart:
    """Describe a part that is inside, or named."""
    config, named = {
        "language_model": (layout.language_config, layout.base),
        "vision_tower": (layout.tower_config, layout.vision_tower),
    }.get(name, (None, None))
    tensors = layout.part(name) if name != "language_model" or layout.has_language_model else {}
    return _describe_part(name, tensors.values(), (config or {}).get("model_type"), None if tensors else named)


def _describe_part(
    name: str, tensors: Iterable[StoredTensor], model_type: str | None = None, named: str | None = None
) -> InspectedPart:
    """Count a part's tensors."""
    stored = list(tensors)
    return InspectedPart(
        name,
        model_type,
        named,
        len(stored),
        sum(tensor.numel for tensor in stored),
        sum(tensor.num_bytes for tensor in stored),
        tuple(dtype for dtype, _ in Counter(tensor.dtype for tensor in stored).most_common()),
    )


def _untold(layout: Layout) -> list[str]:
    """Return the settings that the user must give on loading, because the folder does not name them."""
    needed: list[str] = []
    if layout.kind is LayoutKind.VISION_TOWER:
        return needed
    if not layout.has_language_model and layout.base is None:
        needed.append("its base is not named: give it as --model_base.")
    if not layout.has_vision_tower and layout.vision_tower is None:
        needed.append("its vision tower is not named: give it as --vision_tower.")
    if layout.settings.get("version") is None:
        needed.append("its conversation template is not known: give it as --version.")
    return needed


def render_inspection(inspection: Inspection) -> str:
    """Format an inspection as lines of text."""
    lines = [f"{inspection.folder}", f"  {'kind':<15} {inspection.kind}"]
    lines.append(f"  {'template':<15} {inspection.template or 'not known'}")
    lines += [f"  {part.name.replace('_', ' '):<15} {_render_part(part)}" for part in inspection.parts]
    lines += [f"  {key:<25}{value}" for key, value in inspection.settings.items()]
    lines += [f"  note: {note}" for note in inspection.notes]
    lines += [f"  missing: {what}" for what in inspection.missing] or ["  nothing is missing"]
    return "\n".join(lines)


def _render_part(part: InspectedPart) -> str:
    """Format a part as text."""
    kind = f"{part.model_type}, " if part.model_type else ""
    if not part.num_tensors:
        return f"{kind}not inside: {part.named}"
    size = part.num_bytes / 2**20
    amount = f"{size / 1024:,.2f} GiB" if size >= 1024 else f"{size:,.2f} MiB"
    return f"{kind}{part.num_parameters:,} parameters in {part.num_tensors} tensors, {amount}, {', '.join(part.dtypes)}"
