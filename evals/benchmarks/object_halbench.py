"""Object HalBench: 300 descriptions; a judge lists the objects of each, and COCO says which of them are there."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path

from evals.benchmark import FAILED, Benchmark, Grade, Graded, Judge, Profile, Question, Total, percentage
from evals.coco_objects import (
    CocoImage,
    check_known_images,
    describe_objects,
    find_coco_image,
    list_true_objects,
    read_coco_id,
    read_coco_images,
    read_object_vocabulary,
)
from evals.files import as_lines, check_unique, find, need_text, read_lines
from evals.hallucination_replies import parse_object_list, parse_object_list_loosely
from evals.matching.noun_tools import describe_missing_tools, join_nouns, lemmatise_words, tag_phrase
from evals.matching.object_counts import count_named_objects, read_counts, share_of
from evals.matching.object_words import ObjectVocabulary, split_words
from evals.prompts_in_code import read_text_constant
from llava_ray.errors import DataError

_QUESTIONS = "obj_halbench_300_with_image.jsonl"
_PAIRS = ("home plate", "train track")
_BETWEEN = ("of", "on", "in", "with", "at", "under", "near", "and", "or", "for", "from", "by")
_SHORTEST = 4
"""Words of an answer that the authors' script has listed; a shorter one names no object."""
_OURS = (
    "Below are a question about a picture and an answer, which is taken to be right. List the objects that the answer "
    "says are visible in the picture: only those it names, by their bare names, without colour, material or other "
    'attributes. Reply with nothing but a JSON list such as ["dog", "frisbee"]; with [] if there is none.\n\n'
    "[Question]\n{question}\n\n[Answer]\n{answer}\n"
)


class ObjectHalBench(Benchmark):
    """The share of answers without hallucinated objects, among those that name objects of COCO ("response correct").

    Beside it, in per cent: response_hallucination (100 - that), object_hallucination (mentions of objects that are not
    there, among all mentions) and object_recall. A mention is a name that the judge lists, each once an answer. Objects
    are COCO's 80 with RLHF-V's synonyms; there are those annotated, and those that people name in captions.

    Obtain: ``eval/`` of https://github.com/RLHF-V/RLHF-V (or RLAIF-V) and COCO's 2014 train/val annotations. The folder
    holds ``obj_halbench_300_with_image.jsonl`` and ``synonyms_refine.txt`` (both also in ``data/``),
    ``captions_val2014.json``, ``instances_val2014.json`` (also in ``annotations/``; and ``…train2014.json`` if images
    are of that part) and, for the authors' prompt, ``eval_gpt_obj_halbench.py``, which is read and not run; without it
    the judge is asked in our own words. Images are in the questions' file, or in ``val2014/``. Reviews are
    ``{"question_id", "content"}`` lines, ids COCO's. The authors' judge is ``gpt-3.5-turbo-0613``, and takes the prompt
    as a system message; here it is the user's.

    llava and official: the authors' script, which finds the nouns of each name by spaCy's ``en_core_web_trf`` and those
    of captions by NLTK; both have to be installed. An answer of up to three words names nothing. robust: of each name
    the longest end that is a word of the vocabulary, in the singular ("wooden kitchen table" is a table, where the
    official rule takes "kitchen table" for no object of COCO); the two are not comparable. A reply without exactly one
    list is left out and counted.

    Robust, review | truth | score::

        '["dog", "frisbee"]' | dog, frisbee | 1
        '["Dogs"]' | dog | 1
        '["puppy", "sofa"]' | dog, couch | 1
        '["dog", "cat"]' | dog | 0
        '["brown dog"]' | dog | 1
        '["wooden kitchen table"]' | dining table | 1
        '["hot dog"]' | dog | 0
        '[]' | dog | 1
        '["sky"]' | dog | 1
        'Objects: ["dog"]' | dog | 1
        '<think>["cat"]</think>["dog"]' | dog | 1
        '["dog"] or ["cat"]' | dog | failed
        '["dog", 3]' | dog | failed
        'A dog.' | dog | failed
        '' | dog | failed
    """

    name = "object_halbench"
    title = "Object HalBench"
    metric = "response correct"
    needs_judge = ("llava", "official", "robust")
    max_new_tokens = 1024

    def read(self, folder: Path) -> list[Question]:
        """Read questions with their images' objects and captions."""
        path = find(folder, _QUESTIONS, f"data/{_QUESTIONS}", f"eval/data/{_QUESTIONS}")
        vocabulary = _read_vocabulary(folder)
        prompt = read_text_constant(folder, "eval_gpt_obj_halbench.py", "prompt_template") or _OURS
        if "{question}" not in prompt or "{answer}" not in prompt:
            raise DataError(f"{folder}: the authors' prompt lacks {{question}} or {{answer}}; obtain the script again.")
        rows = read_lines(path)
        ids = [read_coco_id(row, "image_id", path) for row in rows]
        check_unique([str(one) for one in ids], path, "image_id")
        images = read_coco_images(folder, ("val2014",))
        if set(ids) - images.keys():
            images = read_coco_images(folder, ("train2014", "val2014"))
        check_known_images(ids, images, folder, vocabulary)
        questions = []
        for number, row in zip(ids, rows, strict=True):
            facts = {"image": images[number], "vocabulary": vocabulary, "prompt": prompt}
            truth = describe_objects(list_true_objects(images[number], vocabulary, literally=False))
            image = _picture(row, folder, images[number], path)
            text = need_text(row, "question", path)
            questions.append(Question(str(number), text, (image,), (truth,), cluster=str(number), facts=facts))
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade an answer by the list of its objects: 1 without hallucinated ones. Raises DataError."""
        if judge is None:
            raise DataError(f"{self.title} needs a judge: provide its reviews with --reviews FILE")
        facts = question.facts
        vocabulary: ObjectVocabulary = facts["vocabulary"]
        if profile == "robust":
            listed = parse_object_list_loosely(judge(question.id, object_request(question, answer)) or "")
            names = None if listed is None else [word for name in listed for word in _bare_names(name, vocabulary)]
            there = list_true_objects(facts["image"], vocabulary, literally=False)
        else:
            names = _list_officially(question, answer, judge)
            there = _true_objects_officially(facts["image"], vocabulary)
        if names is None:
            return FAILED
        counts = count_named_objects(vocabulary.name(dict.fromkeys(names)), there)
        return Grade(float(not counts.hallucinated), counts.to_json())

    def lacks(self, profile: Profile) -> str | None:
        """Return which of the authors' tools is missing."""
        return None if profile == "robust" else describe_missing_tools("nltk", "spacy")

    def averaged(self, rows: Sequence[Graded], category: str | None = None) -> Sequence[Graded]:
        """Leave out answers that name no object of COCO."""
        return [row for row in rows if row.parsed is None or read_counts([row])[0].mentioned]

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute correct and hallucinated responses, hallucinated objects and recall in per cent."""
        counts = read_counts(rows)
        naming = [one for one in counts if one.mentioned]
        metrics = {
            "response_hallucination": share_of(sum(bool(one.hallucinated) for one in naming), len(naming)),
            "object_hallucination": share_of(
                sum(len(one.hallucinated) for one in counts), sum(one.mentioned for one in counts)
            ),
            "object_recall": share_of(sum(one.covered for one in counts), sum(one.present for one in counts)),
            "answers with objects": float(len(naming)),
        }
        return Total(percentage(self.averaged(rows)).value, metrics)

    def submit(self, questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, bytes]:
        """Build the file for the authors' eval_gpt_obj_halbench.py."""
        rows = [{"image_id": int(q.id), "question": q.prompt, "answer": answers.get(q.id, "")} for q in questions]
        return {"obj_halbench_answer.jsonl": as_lines(rows)}


def object_request(question: Question, answer: str) -> str:
    """Build the judge's request: the prompt with question and answer, which are filled in once."""
    filled = [part.replace("{answer}", answer) for part in question.facts["prompt"].split("{question}")]
    return question.prompt.join(filled)


def _list_officially(question: Question, answer: str, judge: Judge) -> list[str] | None:
    """Return the nouns of the listed objects by the authors' rule; None without a list."""
    if len(answer.split()) < _SHORTEST:
        return []
    listed = parse_object_list(judge(question.id, object_request(question, answer)) or "")
    if listed is None:
        return None
    vocabulary: ObjectVocabulary = question.facts["vocabulary"]
    names = []
    for text in listed:
        tagged = tag_phrase(text)
        pairs = vocabulary.join_pairs([lemma for lemma, _ in tagged], alone=False)
        names += pairs or join_nouns(tagged)
    return names


def _true_objects_officially(image: CocoImage, vocabulary: ObjectVocabulary) -> set[str]:
    words = [vocabulary.join_pairs(lemmatise_words(text)) for text in image.captions]
    named = {name for some in words for _, name in vocabulary.name(some)}
    return named | {vocabulary.objects[name] for name in image.classes}


def _bare_names(listed: str, vocabulary: ObjectVocabulary) -> list[str]:
    """Return of a listed name, and of each part around a word such as "of", the longest end that the vocabulary has."""
    names, part = [], list[str]()
    for word in [*split_words(listed, literally=False), _BETWEEN[0]]:
        if word not in _BETWEEN and any(char.isalnum() for char in word):
            part.append(vocabulary.singular(word))
            continue
        joined = vocabulary.join_pairs(part)
        ends = (" ".join(joined[start:]) for start in range(len(joined)))
        names += [next((end for end in ends if end in vocabulary.objects), " ".join(part))]
        part = []
    return names


def _read_vocabulary(folder: Path) -> ObjectVocabulary:
    """Read RLHF-V's synonyms; each of two words is read as one. Raises DataError, which says where they are."""
    name = "synonyms_refine.txt"
    path = next(
        (folder / place / name for place in (".", "data", "eval/data") if (folder / place / name).is_file()), None
    )
    if path is None:
        raise DataError(
            f"{folder} has no {name}, the words for COCO's objects: copy eval/data/{name} of "
            "https://github.com/RLHF-V/RLHF-V there."
        )
    pairs = [word for word in read_object_vocabulary(path, ()).objects if " " in word]
    return read_object_vocabulary(path, (*pairs, *_PAIRS))


def _picture(row: Mapping[str, object], folder: Path, image: CocoImage, path: Path) -> Path | bytes:
    """Return the image inside a row, or else its file. Raises DataError."""
    encoded = row.get("image")
    if not encoded:
        return find_coco_image(folder, image.file_name)
    try:
        return base64.b64decode(str(encoded), validate=True)
    except binascii.Error as error:
        raise DataError(
            f"{path}: the image of row {row['image_id']!r} is not base64: {error}; obtain the file again."
        ) from error
