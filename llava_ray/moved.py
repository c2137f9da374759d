"""Names that moved to other modules, under their old ones for one version: one table, thin modules that read it."""

import importlib
import warnings
from collections.abc import Callable
from typing import Any

# Old module → each of its names → where that is now, "module" or "module:name". The old paths go with version 0.3.
MOVED: dict[str, dict[str, str]] = {
    "llava_ray.model.bundle": {
        "LlavaParts": "llava_ray.model.assembly",
        "assemble": "llava_ray.model.assembly",
        "find_tower": "llava_ray.model.assembly",
        "load_tower": "llava_ray.model.assembly",
        "save_bundle": "llava_ray.model.saving",
    },
    "llava_ray.model.llava": {
        "Llava": "llava_ray.model.network.llava",
    },
    "llava_ray.model.projector": {
        "build_projector": "llava_ray.model.network.projector",
        "load_projector_weights": "llava_ray.model.formats.projector_files",
    },
    "llava_ray.model.tower": {
        "VisionTower": "llava_ray.model.network.tower",
        "load_vision_tower": "llava_ray.model.formats.tower_loading",
    },
    "llava_ray.data.preview": {
        "Rejection": "llava_ray.preview.samples",
        "SampleView": "llava_ray.preview.samples",
        "Viewer": "llava_ray.preview.samples",
        "token_viewer": "llava_ray.preview.samples",
    },
    "evals.easy_vqa": {
        "Question": "llava_ray.quickstart.easy_vqa:ShapeQuestion",
        "image_folder": "llava_ray.quickstart.easy_vqa",
        "questions": "llava_ray.quickstart.easy_vqa:read_questions",
        "test_questions": "llava_ray.quickstart.easy_vqa",
        "write_benchmark": "llava_ray.quickstart.easy_vqa",
    },
}


def forward(old_module: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for an old module that finds its names where they are now, with a DeprecationWarning."""
    targets = MOVED[old_module]

    def find_moved(name: str) -> Any:
        if name not in targets:  # also the names that the import system asks every module for
            raise AttributeError(f"module {old_module!r} has no attribute {name!r}")
        module, _, renamed = targets[name].partition(":")
        new_name = renamed or name
        warnings.warn(
            f"{old_module}.{name} is {module}.{new_name} now; the old path goes with version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(module), new_name)

    return find_moved
