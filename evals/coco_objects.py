"""COCO's ground truth for object hallucination: an image's annotated objects, and those named in its captions."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.files import check_complete, find, list_first, need, read_json_value, read_utf8
from evals.matching.object_words import ObjectVocabulary
from llava_ray.errors import DataError

_ANIMALS = ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub"]
_VEHICLES = ("jet", "train")


@dataclass
class CocoImage:
    """An image's file name, annotated objects (COCO's class names), and captions by people."""

    file_name: str
    classes: set[str] = field(default_factory=set)
    captions: list[str] = field(default_factory=list)


def read_object_vocabulary(path: Path, pairs: Sequence[str]) -> ObjectVocabulary:
    """Read synonyms of COCO's objects: a line an object, with its name first. Raises DataError."""
    found = build_object_vocabulary(read_utf8(path).splitlines(), pairs)
    if not found.objects:
        raise DataError(f"{path} is empty: it should hold a line of synonyms for each of COCO's 80 objects.")
    return found


def build_object_vocabulary(synonyms: Sequence[str], pairs: Sequence[str]) -> ObjectVocabulary:
    """Build a vocabulary from lines of synonyms; ``pairs`` are two words that are read as one.

    Of an animal a "baby" or "adult" is no person, nor is the "passenger" of a vehicle.
    """
    objects: dict[str, str] = {}
    for line in synonyms:
        words = [word.strip() for word in line.split(", ") if word.strip()]
        objects |= dict.fromkeys(words, words[0] if words else "")
    joined = {pair: pair for pair in pairs}
    joined |= {f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")}
    joined |= {f"passenger {vehicle}": vehicle for vehicle in _VEHICLES}
    return ObjectVocabulary(objects, joined | {"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"})


def read_coco_images(folder: Path, splits: Sequence[str]) -> dict[int, CocoImage]:
    """Read images with objects and captions from ``captions_SPLIT.json`` and ``instances_SPLIT.json``.

    Raises DataError. Of the splits those whose captions the folder (or its ``annotations/``) has.
    """
    named = [split for split in splits if any(_places(folder, f"captions_{split}.json"))]
    if not named:
        find(folder, *(f"captions_{split}.json" for split in splits))
    images: dict[int, CocoImage] = {}
    for split in named:
        _add_split(folder, split, images)
    return images


def _places(folder: Path, name: str) -> list[Path]:
    return [*folder.glob(name), *folder.glob(f"annotations/{name}")]


def _add_split(folder: Path, split: str, images: dict[int, CocoImage]) -> None:
    captions, instances = (
        find(folder, f"{kind}_{split}.json", f"annotations/{kind}_{split}.json") for kind in ("captions", "instances")
    )
    content = read_json_value(captions)
    for row in need(content, "images", captions):
        images[read_coco_id(row, "id", captions)] = CocoImage(str(need(row, "file_name", captions)))
    told: dict[int, list[str]] = defaultdict(list)
    for row in need(content, "annotations", captions):
        told[read_coco_id(row, "image_id", captions)].append(str(need(row, "caption", captions)))
    content = read_json_value(instances)
    names = {
        need(row, "id", instances): str(need(row, "name", instances)) for row in need(content, "categories", instances)
    }
    for row in need(content, "annotations", instances):
        image, category = read_coco_id(row, "image_id", instances), need(row, "category_id", instances)
        if category not in names:
            raise DataError(f"{instances}: an annotation of image {image} has the unknown category {category!r}.")
        if image in images:
            images[image].classes.add(names[category])
    for number, texts in told.items():
        if number in images:
            images[number].captions = texts


def read_coco_id(row: Any, key: str, path: Path) -> int:
    """Return COCO's id, a whole number or its digits, out of a row. Raises DataError."""
    value = need(row, key, path)
    if isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError):
            return int(value)
    raise DataError(f"{path}: the {key} {value!r:.80} is no COCO id (a whole number); obtain the file again.")


def check_known_images(
    ids: Sequence[int], images: Mapping[int, CocoImage], where: Path, vocabulary: ObjectVocabulary
) -> None:
    """Check that all images have captions, and that all their classes are in the vocabulary. Raises DataError."""
    unknown = [str(number) for number in ids if number not in images or not images[number].captions]
    check_complete(unknown, len(ids), f"{where}/captions_….json has no image with captions", "the image")
    classes = sorted({name for number in ids for name in images[number].classes} - vocabulary.objects.keys())
    if classes:
        raise DataError(
            f"the synonyms in {where} lack COCO's {list_first(classes)}: obtain the authors' file again, with a line "
            "for each of the 80 objects."
        )


def find_coco_image(folder: Path, name: str) -> Path:
    """Return the path of an image file, in whichever of COCO's folders it is."""
    places = [folder / place / name for place in ("val2014", "train2014", "val2017", "images")]
    return next((path for path in places if path.exists()), places[0])


def describe_objects(objects: set[str]) -> str:
    """Format the objects of an image as text."""
    return ", ".join(sorted(objects)) or "none of COCO's objects"


def list_true_objects(image: CocoImage, vocabulary: ObjectVocabulary, *, literally: bool) -> set[str]:
    """Return the objects of an image: annotated ones, and those that people name in its captions."""
    named = {vocabulary.objects[name] for name in image.classes}
    return named | {name for text in image.captions for _, name in vocabulary.find(text, literally=literally)}
