"""A whole model as files: its manifest and the location of its tensors, in any layout. Nothing is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_ray.model.formats.manifest import Manifest
from llava_ray.model.tensors.weight_files import Stored

ORIGINAL_CONFIG = "original_config"  # in a manifest's training: settings of the original's config that we do not use
TOWER_FOLDER = "vision_tower"


@dataclass(frozen=True)
class ModelFiles:
    """A model that has not been loaded. ``tensors`` have canonical names (see ``names``).

    ``num_rows`` is the number of vocabulary rows of the language model itself: the hub layout may have added more.
    ``preprocessor`` is the content of the tower's preprocessor_config.json. ``kept`` are settings of an original
    config.json that we do not use, written back on export. ``noted_template`` is () or the one chat template (or None)
    that the tokenizer had before it was exported to the hub layout.
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
