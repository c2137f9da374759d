"""Questions as Arrow batches with decoded images.

Decoding tasks import this module and not torch: on two cores that import takes longer than their work.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from llava_ray.chat.conversation import Turn
from llava_ray.config.data import MAX_IMAGE_PIXELS
from llava_ray.errors import ImageError
from llava_ray.images.anyres import Size
from llava_ray.images.geometry import ImageSpec, crop_views
from llava_ray.images.reading import open_image, read_bytes


@dataclass(frozen=True)
class ModelQuestion:
    """A question: ``image`` is an encoded image, a path or URL to one, several of them, or None.

    A question with images and without a marker gets their markers in front. With ``candidates`` no answer is generated;
    the likelihood of each of them is computed. ``follow_ups`` are later questions of the same conversation, each asked
    with the earlier ones and the model's own answers before it; an image marker in them is text. ``history`` are turns
    before the question, which may hold its images' markers. With ``seeds`` an answer is sampled for each of them.
    """

    id: str
    question: str
    image: bytes | str | Sequence[bytes | str] | None = None
    candidates: Sequence[str] = ()
    follow_ups: Sequence[str] = ()
    history: Sequence[Turn] = ()
    seeds: Sequence[int] = ()
    noise: tuple[int, int] | None = None
    """Steps of diffusion noise on the images, and its seed."""

    @property
    def images(self) -> list[bytes | str]:
        """Return the images as a list."""
        if self.image is None:
            return []
        return [self.image] if isinstance(self.image, bytes | str) else list(self.image)


def to_table(questions: Sequence[ModelQuestion]) -> pa.Table:
    """Return a batch of questions as Arrow columns: id, question, follow_ups, candidates, each image's data or path."""
    images = [question.images for question in questions]
    data = [[image if isinstance(image, bytes) else None for image in some] for some in images]
    paths = [[image if isinstance(image, str) else None for image in some] for some in images]
    return pa.table(
        {
            "id": pa.array([question.id for question in questions], pa.string()),
            "question": pa.array([question.question for question in questions], pa.string()),
            "follow_ups": pa.array([list(question.follow_ups) for question in questions], pa.list_(pa.string())),
            "candidates": pa.array([list(question.candidates) for question in questions], pa.list_(pa.string())),
            "history": pa.array([json.dumps([turn.to_row() for turn in q.history]) for q in questions], pa.string()),
            "seeds": pa.array([list(question.seeds) for question in questions], pa.list_(pa.int64())),
            "noise": pa.array([list(question.noise or ()) for question in questions], pa.list_(pa.int64())),
            "images": pa.array(data, pa.list_(pa.large_binary())),
            "paths": pa.array(paths, pa.list_(pa.string())),
        }
    )


def decode_question_images(table: pa.Table, spec: ImageSpec, *, tolerant: bool = False) -> pa.Table:
    """Replace images and paths by "pixels", bytes of all their views (n, 3, h, w), and "image_sizes".

    Raises ImageError; or with ``tolerant``, its text is in the column "unreadable", and the question has no pixels.
    """
    pixels: list[bytes] = []
    sizes: list[list[Size]] = []
    unreadable: list[str | None] = []
    for name, data, paths in zip(*(table[key].to_pylist() for key in ("id", "images", "paths")), strict=True):
        failure = None
        try:
            images = [
                open_image(
                    read_bytes(path) if path is not None else encoded,
                    path or f"image {number} of question {name!r}",
                    max_pixels=MAX_IMAGE_PIXELS,
                )
                for number, (encoded, path) in enumerate(zip(data, paths, strict=True), start=1)
            ]
        except ImageError as error:
            if not tolerant:
                raise
            images, failure = [], str(error)
        unreadable.append(failure)
        pixels.append(b"".join(crop_views(image, spec).tobytes() for image in images))
        sizes.append([image.size for image in images])
    return (
        table.drop_columns(["images", "paths"])
        .append_column("unreadable", pa.array(unreadable, pa.string()))
        .append_column("pixels", pa.array(pixels, pa.large_binary()))
        .append_column("image_sizes", pa.array(sizes, pa.list_(pa.list_(pa.int32(), 2))))
    )
