"""AMBER's official files: queries, annotations, vocabulary and images."""

from pathlib import Path
from typing import Any

from evals.files import check_unique, find, find_all, list_first, need, read_json_value, read_utf8
from evals.matching.amber_objects import AmberWords
from llava_ray.errors import DataError

AMBER_SOURCE = "https://github.com/junyangwang0410/AMBER"


def _places(name: str) -> tuple[str, str]:
    return name, f"data/{name}"


def read_amber_words(folder: Path) -> AmberWords:
    """Read the vocabulary. Raises DataError."""
    path = find(folder, *_places("relation.json"))
    related = read_json_value(path)
    if not isinstance(related, dict) or not all(
        isinstance(words, list) and all(isinstance(word, str) for word in words) for words in related.values()
    ):
        raise DataError(f"{path} is no object of lists of words; obtain it again from {AMBER_SOURCE}.")
    safe = read_utf8(find(folder, *_places("safe_words.txt"))).splitlines()
    return AmberWords(related, frozenset(word.strip() for word in safe if word.strip()))


def read_amber_queries(folder: Path, task: str) -> list[tuple[dict[str, Any], Any, Path]]:
    """Return the queries of a task, each with its annotation and the annotations' file. Raises DataError."""
    names = (f"query_{task}", "query_all", f"query_{task}-*")
    places = (place for name in names for place in (*_places(f"query/{name}.json"), f"{name}.json"))
    paths = find_all(folder, *places)
    notes_path = find(folder, *_places("annotations.json"))
    notes = {str(need(note, "id", notes_path)): note for note in read_json_value(notes_path)}
    rows = [
        {"id": str(need(row, "id", path))} | {key: str(need(row, key, path)) for key in ("image", "query")}
        for path in paths
        for row in read_json_value(path)
    ]
    path = paths[0]
    check_unique([row["id"] for row in rows], path, "query")
    if odd := [row["id"] for row in rows if not row["id"].isascii() or not row["id"].isdigit()]:
        raise DataError(f"{path}: the ids {list_first(odd)} are no numbers; obtain it again from {AMBER_SOURCE}.")
    if lost := [row["id"] for row in rows if row["id"] not in notes]:
        raise DataError(
            f"{notes_path} has no annotation of {len(lost):,} of the {len(rows):,} queries in {path.name}: "
            f"{list_first(lost)}; obtain both files again from {AMBER_SOURCE}."
        )
    kinds = {row["id"]: str(need(notes[row["id"]], "type", notes_path)) for row in rows}
    wanted = [row for row in rows if (kinds[row["id"]] == "generative") == (task == "generative")]
    if not wanted or (len(wanted) < len(rows) and path.stem != "query_all"):
        raise DataError(
            f"{path} and {notes_path} disagree on which queries are {task}; obtain both again from {AMBER_SOURCE}."
        )
    return [(row, notes[row["id"]], notes_path) for row in wanted]


def need_word_list(value: Any, note: Any, path: Path) -> tuple[str, ...]:
    """Return an annotation's list of words. Raises DataError."""
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise DataError(f"{path}: question {note['id']} has {value!r:.80} where a list of words should be.")
    return tuple(value)


def find_amber_image(folder: Path, name: str) -> Path:
    """Return the path of an image, in whichever folder it is."""
    places = [folder / place / name for place in ("image", "images", "../image", ".")]
    return next((path for path in places if path.exists()), places[0])
