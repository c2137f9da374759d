"""Example questions of the page, from a file written for the model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

from llava_ray.config.data import MAX_IMAGE_PIXELS
from llava_ray.errors import ConfigError, ImageError
from llava_ray.images.reading import open_image
from llava_ray.reading import is_file, read_bounded, short_repr, wrap_errors

if TYPE_CHECKING:
    from gradio.components.chatbot import ExampleMessage

_MAX_BYTES = 2**20
_MAX_EXAMPLES = 8
_KEYS = {"text", "image"}


def read_examples(file: str | None) -> list[ExampleMessage]:
    """Load the examples of a page, ``[{"text": …, "image": path beside the file}, …]``, as the chatbot takes them.

    Their images are copied to a folder that the page may serve. Raises ConfigError that names file and entry.
    """
    if file is None:
        return []
    path = Path(file).expanduser()
    with wrap_errors(f"page_examples {file}", "Give a JSON file with a list of texts and images.", ConfigError):
        rows = json.loads(read_bounded(path, _MAX_BYTES, ConfigError))
    if not isinstance(rows, list) or len(rows) > _MAX_EXAMPLES:
        raise ConfigError(f"page_examples {file}: expected a list of at most {_MAX_EXAMPLES} examples")
    place = Path(mkdtemp(prefix="llava_ray_examples_"))
    return [_read_example(row, f"page_examples {file}, entry {index}", path, place) for index, row in enumerate(rows)]


def _read_example(row: Any, where: str, file: Path, place: Path) -> ExampleMessage:
    """Return one example, its image copied to ``place``. Raises ConfigError."""
    if not isinstance(row, dict) or row.keys() - _KEYS or not all(isinstance(value, str) for value in row.values()):
        raise ConfigError(
            f'{where} is {short_repr(row)}; expected {{"text": "…", "image": "…"}}, the image if there is one'
        )
    if not row.get("text"):
        raise ConfigError(f"{where} has no text; add the question")
    if "image" not in row:
        return {"text": row["text"]}
    image = file.parent / row["image"]
    if not is_file(image):
        raise ConfigError(f"{where}: no image {image}; its path is relative to the folder of the file")
    try:
        open_image(image.read_bytes(), str(image), max_pixels=MAX_IMAGE_PIXELS)
    except ImageError as error:
        raise ConfigError(f"{where}: {error}; choose another image") from error
    copied = str(shutil.copy(image, place / f"{len(list(place.iterdir()))}{image.suffix}"))
    return {"text": row["text"], "files": [copied], "icon": copied}
