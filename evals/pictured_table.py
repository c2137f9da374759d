"""Reading OpenCompass's tables: tab-separated rows with an index and a base64 image, or another row's."""

import base64
import binascii
from pathlib import Path

from evals.files import list_first, need, read_table
from llava_ray.errors import DataError

PicturedRow = tuple[dict[str, str], bytes | None]


def read_pictured_rows(path: Path) -> list[PicturedRow]:
    """Read a table's rows, each with its image; an image cell that is an index means that row's. Raises DataError."""
    rows: list[tuple[dict[str, str], str]] = []
    images: dict[str, bytes] = {}
    for number, row in enumerate(read_table(path), start=2):
        if None in row or None in row.values():
            raise DataError(
                f"{path}, line {number}: a row has not as many cells as the header; obtain the table again."
            )
        index = need(row, "index", path).strip()
        if not index.isascii() or not index.isdigit():
            raise DataError(f"{path}, line {number}: the index is {index!r}, no number; obtain the table again.")
        cell = row.pop("image", "").strip()
        row["index"] = str(int(index))
        if cell and not cell.isdigit():
            images[row["index"]] = _decode(cell, row["index"], path)
            cell = row["index"]
        rows.append((row, str(int(cell)) if cell else ""))
    lost = [row["index"] for row, source in rows if source and source not in images]
    if lost:
        raise DataError(
            f"{path}: the images of rows {list_first(lost)} are those of rows without one; obtain it again."
        )
    return [(row, images[source] if source else None) for row, source in rows]


def _decode(text: str, index: str, path: Path) -> bytes:
    try:
        return base64.b64decode(text)
    except binascii.Error as error:
        raise DataError(f"{path}: the image of row {index} is not base64: {error}; obtain the table again.") from error
