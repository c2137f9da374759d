"""Approximate export of a tower in another architecture, with its loss measured before anything is written."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_ray.errors import ConfigError, DataError, RecordError, TemplateError

if TYPE_CHECKING:
    from torch import Tensor

    from llava_ray.data.records import Record
    from llava_ray.model.assembly import LlavaParts
    from llava_ray.model.formats.hub.siglip_form import FeatureDifference
    from llava_ray.model.formats.model_files import ModelFiles

_ENOUGH_COSINE = 0.95  # below it the features differ too much from those in training
_ROUNDING = 1e-6
_FURTHEST = 2.0  # one minus the cosine of opposite features
_AT_ONCE = 16
_MAX_NEW_TOKENS = 64
_MOST_SAMPLES = 200
_NO_ANSWER, _NO_PLACE = "no answer that is learnt", "system_prompt"  # as preparation and training call it


@dataclass(frozen=True)
class Approximation:
    """The flags of an approximate export."""

    approximate: bool = False
    """Write a DINOv2 tower as a SigLIP, which vLLM supports, and measure the change of its features."""
    images: tuple[Path, ...] = ()
    """Images for the measurement; default: generated ones."""
    samples: str | None = None
    """Records with answers, in any form of data.data_path, on which to measure the loss of accuracy."""
    image_folder: str | None = None
    """Folder of their images; default: the records' folder."""
    max_samples: int | None = None
    """Number of records to use; default: 200."""
    accept_difference: float | None = None
    """Largest accepted change of the features, one minus the mean cosine, if the cosine is below 0.95."""

    def check(self) -> None:
        """Check the flags against each other, and their ranges. Raises ConfigError."""
        if not self.approximate and (self.images or self.samples or self.accept_difference is not None):
            raise ConfigError("--images, --samples and --accept_difference belong to --approximate: give it, or none")
        if self.samples is None and (self.image_folder is not None or self.max_samples is not None):
            raise ConfigError("--image_folder and --max_samples belong to --samples: give it, or none of them")
        if self.max_samples is not None and self.max_samples < 1:
            raise ConfigError(f"--max_samples {self.max_samples}: expected at least 1")
        if self.accept_difference is not None and not 0 <= self.accept_difference <= _FURTHEST:
            raise ConfigError(f"--accept_difference {self.accept_difference:g}: expected one minus a cosine, 0 to 2")


@dataclass(frozen=True)
class Loss:
    """The numbers of correct answers to records' first questions, before and after."""

    num_samples: int
    before: int
    after: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Numbers of skipped records by reason."""

    def __str__(self) -> str:
        """Format the result."""
        was, now = self.before / self.num_samples, self.after / self.num_samples
        return (
            f"answers on {self.num_samples} samples: {was:.1%} right with the model's own tower, {now:.1%} with the "
            f"approximate one ({100 * (now - was):+.1f} points){_describe_left_out(self.left_out)}"
        )


def _describe_left_out(counts: Mapping[str, int]) -> str:
    """Format the numbers of skipped samples by reason; empty without any."""
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in sorted(counts.items()))
    return f"; {sum(counts.values()):,} left out: {reasons}" if reasons else ""


@dataclass(frozen=True)
class ApproximationQuestion:
    """A sample's first question: its prompt, its record's images with their number, and the answer."""

    record: "Record"
    prompt: list[int]
    num_images: int
    answer: str


def check_difference(difference: "FeatureDifference", accepted: float | None) -> None:
    """Check that a tower's features change little enough, or that the change is accepted. Raises ConfigError."""
    found = 1 - difference.mean_cosine
    if found <= max(1 - _ENOUGH_COSINE, accepted or 0.0) + _ROUNDING:
        return
    rounded = f"{math.ceil(100 * (found - _ROUNDING)) / 100:.2f}"
    raise ConfigError(
        f"the approximate tower is not this model's any more: {difference}. Nothing is written. Without loss: "
        "--transformers_only writes the tower as it is, for transformers, and the built-in engine serves the model as "
        "it is. To write the approximation all the same, see with --samples what accuracy it loses, and accept the "
        f"difference (one minus the cosine): --accept_difference {rounded}"
    )


def bring_near(load: Callable[[], "LlavaParts"], opened: "ModelFiles", asked: Approximation) -> "ModelFiles":
    """Convert a model's DINOv2 tower to a SigLIP, and print the loss.

    ``load`` gives the model with its weights, for samples. Raises ConfigError if it costs more than is accepted.
    """
    from llava_ray.model.formats.hub.siglip_form import approximate, open_images

    near, difference = approximate(opened, open_images(asked.images))
    print(difference)
    if asked.samples is not None:
        print(
            measure_loss(
                load(), near, read_samples(asked.samples, asked.image_folder, asked.max_samples or _MOST_SAMPLES)
            )
        )
    check_difference(difference, asked.accept_difference)
    return near


def measure_loss(parts: "LlavaParts", approximated: "ModelFiles", records: Iterable["Record | RecordError"]) -> Loss:
    """Evaluate the first question of each sample with the model's own tower and with the approximate one.

    Those that training would reject, or learn nothing from, are counted. Raises DataError where none is left.
    """
    questions, left_out = make_questions(parts, records)
    if not questions:
        raise DataError(
            f"--samples holds no record to ask{_describe_left_out(left_out)}; give records with answers that are learnt"
        )
    own = _count_right(parts, questions)
    other = _count_right(replace(parts, tower=_approximate_tower(parts, approximated)), questions)
    return Loss(len(questions), own, other, left_out)


def read_samples(path: str, image_folder: str | None, most: int) -> Iterator["Record | RecordError"]:
    """Yield the first records of some data, or the reason why training would reject one. Raises DataError."""
    from llava_ray.config.data import MAX_IMAGE_PIXELS
    from llava_ray.data.ordered_records import read_records
    from llava_ray.data.records import RawRecord
    from llava_ray.data.validation import check_images, fetch_images, read_record

    folder = image_folder or str(Path(path).parent)
    for found in read_records(path, most):
        try:
            record = read_record(found, folder) if isinstance(found, RawRecord) else found
            check_images(record, fetch_images(record, folder), max_pixels=MAX_IMAGE_PIXELS)
        except RecordError as error:
            yield error
        else:
            yield record  # with the paths of its images: many samples need no more memory than few


def make_questions(
    parts: "LlavaParts", records: Iterable["Record | RecordError"]
) -> tuple[list[ApproximationQuestion], dict[str, int]]:
    """Return the usable questions, and the numbers of skipped records by reason."""
    from llava_ray.chat.asked_turns import first_question
    from llava_ray.chat.tokens import tokenize_question

    questions: list[ApproximationQuestion] = []
    left_out: Counter[str] = Counter()
    for record in records:
        found = None if isinstance(record, RecordError) else first_question(record.turns)
        if isinstance(record, RecordError) or found is None:
            left_out[record.reason if isinstance(record, RecordError) else _NO_ANSWER] += 1
            continue
        system, asked, answer = found
        try:
            prompt = tokenize_question(system, asked, parts.template, parts.tokenizer)
        except (RecordError, TemplateError) as error:
            left_out[error.reason if isinstance(error, RecordError) else _NO_PLACE] += 1
            continue
        num_images = sum(turn.value.count("<image>") for turn in asked)
        questions.append(ApproximationQuestion(record, prompt, num_images, answer.value))
    return questions, dict(left_out)


def _approximate_tower(parts: "LlavaParts", approximated: "ModelFiles") -> Any:
    """Return the tower of an approximated model, with the same selected layer."""
    from transformers import SiglipVisionModel

    from llava_ray.model.formats.hub.siglip_form import load_backbone
    from llava_ray.model.formats.names import VISION_TOWER_PREFIX
    from llava_ray.model.formats.part_configs import build_config
    from llava_ray.model.network.tower import VisionTower

    state = {name: tensor.load().float() for name, tensor in approximated.part(VISION_TOWER_PREFIX).items()}
    backbone = load_backbone(SiglipVisionModel, build_config(approximated.tower_config, "the vision tower"), state)
    return VisionTower(backbone, parts.manifest.mm_vision_select_layer, "patch", parts.s2_scales)


def _count_right(parts: "LlavaParts", questions: Sequence[ApproximationQuestion]) -> int:
    """Count the first questions that are answered, greedily, like the record."""
    from llava_ray.generate.decoding import answer_text, generate_batch
    from llava_ray.train.held_out import same

    right = 0
    for start in range(0, len(questions), _AT_ONCE):
        some = questions[start : start + _AT_ONCE]
        shown = [_open_first_images(parts, question) for question in some]
        written = generate_batch(
            parts,
            [question.prompt for question in some],
            [pixels for pixels, _ in shown],
            image_sizes=[sizes for _, sizes in shown],
            max_new_tokens=_MAX_NEW_TOKENS,
        )
        said = [answer_text(parts, ids) for ids in written]
        right += sum(same(text, question.answer) for text, question in zip(said, some, strict=True))
    return right


def _open_first_images(
    parts: "LlavaParts", question: ApproximationQuestion
) -> tuple["Tensor | None", list[tuple[int, int]]]:
    """Return the normalised views of the images in a first question, and their sizes. Raises ImageError."""
    import numpy as np

    from llava_ray.config.data import MAX_IMAGE_PIXELS
    from llava_ray.data.validation import fetch_images
    from llava_ray.images.geometry import crop_views
    from llava_ray.images.processing import normalize_pixels
    from llava_ray.images.reading import open_image

    record = question.record
    images = [
        open_image(data, f"an image of record {record.id}", max_pixels=MAX_IMAGE_PIXELS)
        for data in fetch_images(record)[: question.num_images]
    ]
    if not images:
        return None, []
    views = np.concatenate([crop_views(image, parts.image_spec) for image in images])
    return normalize_pixels(views, parts.image_spec), [image.size for image in images]
