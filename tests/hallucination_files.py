"""Tiny folders of the hallucination benchmarks in their official formats."""

import base64
from pathlib import Path
from typing import Any

from drawn_files import encoded, lines, put

SYNONYMS = """person, girl, boy, man, woman, child, people, children, baby, passenger, adult
bus, minibus, trolley
train, locomotive
bird, ostrich, duck
cat, kitten, feline, tabby
dog, puppy, beagle, pup
elephant
frisbee
tennis racket, racket
wine glass
knife, pocketknife
hot dog
chair, seat, stool
couch, sofa, recliner
dining table, table, desk, coffee table
toilet, urinal, commode
tie, bow, bow tie
zebra
"""
NAMES = {1: "person", 18: "dog", 34: "frisbee", 63: "couch"}
ANNOTATED = {9: (18, 34), 25: (18,), 30: (18, 1)}
CAPTIONS = {9: ("A dog with a frisbee.", "A puppy plays."), 25: ("A dog on a sofa.",), 30: ("A dog and its owner.",)}


def coco(folder: Path, place: str = "annotations/") -> None:
    """Write captions and instances of three images, each with a dog."""
    images = [{"id": number, "file_name": f"COCO_val2014_{number:012d}.jpg"} for number in ANNOTATED]
    told = [
        {"image_id": number, "id": n, "caption": text}
        for number, some in CAPTIONS.items()
        for n, text in enumerate(some)
    ]
    put(folder, f"{place}captions_val2014.json", {"images": images, "annotations": told})
    boxes = [{"image_id": number, "category_id": one} for number, some in ANNOTATED.items() for one in some]
    names = [{"id": number, "name": name} for number, name in NAMES.items()]
    put(folder, f"{place}instances_val2014.json", {"images": images, "annotations": boxes, "categories": names})


def chair(folder: Path) -> None:
    coco(folder)
    put(folder, "synonyms.txt", SYNONYMS)
    for number in ANNOTATED:
        put(folder, f"val2014/COCO_val2014_{number:012d}.jpg", encoded(number, "JPEG"))


RELATED = {
    "person": ["people", "individual", "man", "woman"],
    "man": ["person", "people", "individual"],
    "beach": ["sand", "ground", "desert"],
    "grass": ["ground"],
    "sky": [],
    "dog": [],
    "cat": [],
    "zebra": [],
    "tree": ["forest", "leave", "bush"],
    "forest": ["tree", "leave", "bush"],
    "watch": [],
    "can": [],
    "orange": ["tangerine"],
    "light": [],
    "note": ["sticker"],
    "television": ["TV", "screen"],
}
DESCRIBED = ((1, ("sky", "beach", "dog"), ("person", "cat")), (2, ("man", "grass"), ("dog", "sky")))
ASKED = (
    (1005, "Is the sky gloomy in this image?", "discriminative-attribute-state", "no"),
    (1006, "Is the sky sunny in this image?", "discriminative-attribute-state", "yes"),
    (1007, "Are there two dogs in this image?", "discriminative-attribute-number", "no"),
    (1008, "Does the dog run in this image?", "discriminative-attribute-action", "yes"),
    (1009, "Is there a cat in this image?", "discriminative-hallucination", "no"),
    (1010, "Is there direct contact between the dog and beach?", "discriminative-relation", "yes"),
    (1011, "Is there direct contact between the dog and sky?", "relation", "no"),
)


def amber(folder: Path) -> None:
    """Write AMBER's repository: two descriptions and seven yes-or-no questions."""
    described = [{"id": n, "image": f"AMBER_{n}.jpg", "query": "Describe this image."} for n, _, _ in DESCRIBED]
    asked = [{"id": n, "image": "AMBER_1.jpg", "query": text} for n, text, _, _ in ASKED]
    notes: list[dict[str, Any]] = [
        {"id": n, "type": "generative", "truth": list(truth), "hallu": list(wrong)} for n, truth, wrong in DESCRIBED
    ]
    notes += [{"id": n, "type": kind, "truth": truth} for n, _, kind, truth in ASKED]
    put(folder, "data/query/query_all.json", [*described, *asked])
    put(folder, "data/query/query_generative.json", described)
    put(folder, "data/query/query_discriminative.json", asked)
    put(folder, "data/annotations.json", notes)
    put(folder, "data/relation.json", RELATED)
    put(folder, "data/safe_words.txt", "orange\nlight")
    for n in (1, 2):
        put(folder, f"image/AMBER_{n}.jpg", encoded(n, "JPEG"))


def amber_generative(folder: Path) -> None:
    amber(folder)


def amber_discriminative(folder: Path) -> None:
    amber(folder)


def mmhal_bench(folder: Path) -> None:
    kinds = ("attribute", "adversarial", "comparison")
    rows = [
        {
            "question_type": kinds[n],
            "question_topic": "outdoor",
            "image_id": f"df62a56fdc1bb12{n}",
            "image_src": f"https://c4.staticflickr.com/8/7211/720607205{n}_o.jpg",
            "image_content": ["Fire hydrant", "Tree"][: n + 1],
            "question": f"What colour is number {n}?",
            "gt_answer": f"Number {n} is yellow.",
            "model_answer": "",
        }
        for n in range(3)
    ]
    put(folder, "response_template.json", rows)
    put(
        folder,
        "eval_gpt4.py",
        "import json\n\ntemplate = '''Rate.\n{}|{}|{}|{}\n'''\n\nif __name__ == '__main__':\n    boom()\n",
    )
    for n in range(3):
        put(folder, f"images/720607205{n}_o.jpg", encoded(n, "JPEG"))


def object_halbench(folder: Path) -> None:
    coco(folder)
    put(folder, "data/synonyms_refine.txt", SYNONYMS)
    pictures = {number: base64.b64encode(encoded(number, "JPEG")).decode() for number in (9, 25)}
    rows = [
        {"image_id": str(number), "question": "Please describe the image.", "image": pictures.get(number, "")}
        for number in ANNOTATED
    ]
    put(folder, "data/obj_halbench_300_with_image.jsonl", lines(rows))
    put(folder, "val2014/COCO_val2014_000000000030.jpg", encoded(3, "JPEG"))
