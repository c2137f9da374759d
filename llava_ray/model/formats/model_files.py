"""A whole model as files: what it is and where its tensors lie, whatever layout it comes in. Nothing is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.model.formats.manifest import Manifest
from llava_ray.model.tensors.weight_files import Stored

ORIGINAL_CONFIG = "original_config"  # in a manifest's training: what of the original's config means nothing to us
TOWER_FOLDER = "vision_tower"


@dataclass(frozen=True)
class ModelFiles:
    """A model that has not been loaded. ``tensors`` are under our names (see ``published_names``).

    ``num_rows`` is how many rows of the vocabulary are the language model's own: the hub layout may have added more.
    ``preprocessor`` is the tower's image processor as its preprocessor_config.json holds it. ``kept`` is LLaVA's part
    of an original config.json, to be given back to it. ``noted_template`` is () or the one chat template (or None) that
    the tokenizer had before it was exported to the hub layout.
    """

    folder: Path
    manifest: Manifest
    language_config: dict[str, Any]
    tower_config: dict[str, Any]
    preprocessor: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_folder: Path
    tensors: dict[str, Stored]
    num_rows: int
    kept: dict[str, Any]
    noted_template: tuple[str | None, ...] = ()
    notes: tuple[str, ...] = ()

    def part(self, prefix: str) -> dict[str, Stored]:
        """Return one part's tensors, without its prefix."""
        return {name.removeprefix(prefix): tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
