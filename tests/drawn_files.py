"""Drawn images and written files for tiny benchmark folders."""

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = ("red", "green", "blue", "yellow")


def encoded(number: int = 0, kind: str = "PNG") -> bytes:
    """A drawn image."""
    file = io.BytesIO()
    Image.new("RGB", (32, 24), COLOURS[number % 4]).save(file, kind)
    return file.getvalue()


def put(folder: Path, name: str, content: Any) -> None:
    """Write bytes, a list of JSON lines (.jsonl and POPE's), or JSON."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    else:
        path.write_text(json.dumps(content), encoding="utf-8")


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
