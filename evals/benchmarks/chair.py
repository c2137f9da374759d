"""CHAIR: which objects of COCO a description names that are not in the image."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.benchmark import UNPARSED, Benchmark, Grade, Graded, Judge, Profile, Question, Total, percentage
from evals.coco_objects import (
    check_known_images,
    describe_objects,
    find_coco_image,
    list_true_objects,
    read_coco_images,
    read_object_vocabulary,
)
from evals.files import as_json, check_unique, find, read_json_value
from evals.matching.object_counts import count_named_objects, read_counts, share_of
from evals.matching.plain_text import to_plain_text
from llava_ray.errors import DataError

_PROMPT = "Please describe this image in detail."
_SPLITS = ("val2014", "all2014", "val2017")
_PAIRS = [
    "motor bike",
    "motor cycle",
    "air plane",
    "traffic light",
    "street light",
    "traffic signal",
    "stop light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "suit case",
    "sports ball",
    "baseball bat",
    "baseball glove",
    "tennis racket",
    "wine glass",
    "hot dog",
    "cell phone",
    "mobile phone",
    "teddy bear",
    "hair drier",
    "potted plant",
    "bow tie",
    "laptop computer",
    "stove top oven",
    "home plate",
]


class CHAIR(Benchmark):
    """The share of descriptions without hallucinated objects; beside it CHAIRs, CHAIRi and recall.

    CHAIRs: descriptions that name an object which is not there (lower is better). CHAIRi: mentions of such objects
    among all mentions. recall: named objects among those there (not in the authors' script). Objects are COCO's 80 with
    their synonyms; there are those annotated, and those that people name in the image's captions.

    Obtain: https://cocodataset.org (2014 train/val annotations) and ``data/synonyms.txt`` of
    https://github.com/LisaAnne/Hallucination. The folder holds ``captions_val2014.json``, ``instances_val2014.json``
    (also in ``annotations/``), ``synonyms.txt`` and ``val2014/``; ``image_ids.json``, a list of COCO's ids, leaves out
    all other images (many papers take 500). The authors scored captioning models, which have no prompt; the one here is
    the usual one of papers on language models.

    llava and official: the authors' words, with their errors: every final s is taken away, so that "bus" and "tennis
    racket" are not seen. Their tagger of plurals (``pattern.en``) is replaced by rules that agree with it on every word
    of an English dictionary that it maps to an object; their sentence splitter by rules for punctuation. An empty
    description has no hallucination. robust: a word of the vocabulary stays as it is, a hyphen divides words, and an
    empty description is unparsed.

    Robust, answer | truth | score::

        'A dog catches a frisbee.' | dog, frisbee | 1
        'Two dogs.' | dog | 1
        'A puppy on a sofa' | dog, couch | 1
        'A dog and a cat.' | dog | 0
        'A man walks his dog.' | dog | 0
        'A baby elephant' | elephant | 1
        'A hot dog' | hot dog | 1
        'A hot dog' | dog | 0
        'Buses and a tennis-racket.' | bus, tennis racket | 1
        'A red bus' | car | 0
        'The toilet has a seat.' | toilet | 1
        'Nothing but the sky.' | dog | 1
        '' | dog | unparsed
    """

    name = "chair"
    title = "CHAIR"
    metric = "descriptions without hallucination"
    max_new_tokens = 512

    def read(self, folder: Path) -> list[Question]:
        """Read the images' objects and captions."""
        vocabulary = read_object_vocabulary(_find_synonyms(folder), _PAIRS)
        images = read_coco_images(folder, _SPLITS)
        ids = _read_image_ids(folder) or list(images)
        check_known_images(ids, images, folder, vocabulary)
        questions = []
        for number in ids:
            image = images[number]
            truth = describe_objects(list_true_objects(image, vocabulary, literally=False))
            file = find_coco_image(folder, image.file_name)
            facts = {"image": image, "vocabulary": vocabulary}
            known = (image.file_name, image.file_name.rpartition(".")[0])
            questions.append(
                Question(str(number), _PROMPT, (file,), (truth,), cluster=str(number), aliases=known, facts=facts)
            )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade a description: 1 without hallucinated objects."""
        literally = profile != "robust"
        if not literally:
            answer = to_plain_text(answer)
            if not answer:
                return UNPARSED
        vocabulary = question.facts["vocabulary"]
        there = list_true_objects(question.facts["image"], vocabulary, literally=literally)
        counts = count_named_objects(vocabulary.find(answer, literally=literally), there)
        return Grade(float(not counts.hallucinated), counts.to_json())

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute the share of descriptions without hallucination, CHAIRs, CHAIRi and recall in per cent."""
        counts = read_counts(rows)
        metrics = {
            "CHAIRs": share_of(sum(bool(one.hallucinated) for one in counts), len(counts)),
            "CHAIRi": share_of(sum(len(one.hallucinated) for one in counts), sum(one.mentioned for one in counts)),
            "recall": share_of(sum(one.covered for one in counts), sum(one.present for one in counts)),
        }
        return Total(percentage(rows).value, metrics)

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the file that CHAIR's later scripts read; the first one wants captioning metrics beside."""
        rows = [{"image_id": int(q.id), "caption": answers.get(q.id, "")} for q in questions]
        return {"chair_captions.json": as_json(rows)}


def _find_synonyms(folder: Path) -> Path:
    """Return the authors' synonyms. Raises DataError, which says where they are."""
    for place in ("synonyms.txt", "data/synonyms.txt"):
        if (folder / place).is_file():
            return folder / place
    raise DataError(
        f"{folder} has no synonyms.txt, the words for COCO's objects: copy data/synonyms.txt of "
        "https://github.com/LisaAnne/Hallucination there."
    )


def _read_image_ids(folder: Path) -> list[int]:
    """Read the ids of the images to be asked about; none where all are. Raises DataError."""
    path = folder / "image_ids.json"
    if not path.is_file():
        return []
    ids = read_json_value(find(folder, path.name))
    if (
        not isinstance(ids, list)
        or not ids
        or not all(isinstance(one, int) and not isinstance(one, bool) for one in ids)
    ):
        raise DataError(f"{path} holds {ids!r:.80}; expected a list of COCO image ids, such as [42, 73].")
    check_unique([str(one) for one in ids], path, "image")
    return ids
