"""Conversations as the model will see them: rendered, tokenised, masked, truncated and cropped. No Ray, no training.

A record that training would reject is shown with its reason instead.
"""

import sys
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn
from llava_ray.chat.templates import find_template
from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.config.data import MAX_IMAGE_PIXELS
from llava_ray.config.preview import PreviewSettings
from llava_ray.data.examples import Encoder, Example
from llava_ray.data.json_files import clean_id
from llava_ray.data.preference_records import is_preference
from llava_ray.data.record_examples import encode_record
from llava_ray.data.records import RawRecord, Record, find_files
from llava_ray.data.shards import is_prepared
from llava_ray.data.storage import absolute_path
from llava_ray.data.validation import fetch_images, parse_values, read_record
from llava_ray.errors import ConfigError, ImageError, RecordError, TemplateError
from llava_ray.images.anyres import Size
from llava_ray.images.geometry import ImageSpec, crop_views
from llava_ray.images.reading import open_image
from llava_ray.images.tokens import ImageTokens
from llava_ray.model.formats.sources import find_source
from llava_ray.preview.tokens import collapse_images, join_tokens, split_tokens
from llava_ray.reading import short_repr as excerpt
from llava_ray.report.pieces import ReportToken

_UNKNOWN_SIZE = (1, 1)  # stands for an image that is not opened and counts as one token


@dataclass(frozen=True)
class Rejection:
    """A record that training would reject."""

    id: str | int
    source: str
    reason: str
    message: str


@dataclass(frozen=True)
class SampleView:
    """One conversation as the model sees it; ``input_ids`` and ``labels`` have one -200 for a whole image."""

    id: str | int
    source: str
    turns: tuple[Turn, ...]
    example: Example
    input_ids: list[int]
    labels: list[int]
    pixels: UInt8[np.ndarray, "n 3 h w"] | None
    """Views for the tower, before normalisation; None where no image was opened."""
    image_sizes: tuple[Size, ...]
    """(width, height) of each image in the sample, where it was opened."""
    num_cut: int
    """Truncated positions at the end."""
    loss: float | None = None
    """Mean loss over its supervised tokens, in fp32; None without a model, and where it is not finite."""
    no_loss: str = ""
    """Reason why there is no finite loss."""
    ignored: tuple[str, ...] = ()
    """Ignored keys of the record."""

    @property
    def num_tokens(self) -> int:
        """Count its positions in the model."""
        return len(self.example.input_ids)


@dataclass(frozen=True)
class Viewer:
    """A converter of records to views. Without ``image_spec`` no image is opened, and each counts as one token."""

    encoder: Encoder
    image_folder: str
    image_spec: ImageSpec | None = None
    notes: tuple[str, ...] = ()
    """Notes for the user on the model or tokenizer."""

    @property
    def is_limited(self) -> bool:
        """Return whether long samples are truncated."""
        return self.encoder.model_max_length < sys.maxsize

    def view_sides(self, raw: RawRecord | Record) -> list[SampleView | Rejection]:
        """Return a record's view; of a preference two, of the chosen answer and of the rejected one."""
        record = raw
        if isinstance(raw, RawRecord):
            try:
                if not is_preference(parse_values(raw)):
                    return [self.view(raw)]
                record = self._read(raw, pairs=True)
            except RecordError as error:
                return [Rejection(_name_of(raw), raw.source, error.reason, str(error))]
        assert isinstance(record, Record)
        if not record.rejected:
            return [self.view(record)]
        asked = next(i for i, turn in enumerate(record.turns) if turn.role == "gpt" and turn.supervised)
        sides = {"chosen": record.turns, "rejected": (*record.turns[:asked], *record.rejected)}
        names = {side: f"{record.id} ({side})" for side in sides}
        return [self.view(replace(record, id=names[side], turns=turns, rejected=())) for side, turns in sides.items()]

    def view(self, raw: RawRecord | Record) -> SampleView | Rejection:
        """Return a record as the model sees it, or the reason why training would reject it."""
        name = _name_of(raw)
        try:
            record = raw if isinstance(raw, Record) else self._read(raw)
            images = self._open(record)
            sizes = [image.size for image in images] if self.image_spec else [_UNKNOWN_SIZE] * len(record.images)
            [example] = encode_record(self.encoder, record.turns, sizes)
            shown = tuple(sizes[index] for index in example.images) if self.image_spec else ()
            pixels = self._crop([images[index] for index in example.images]) if self.image_spec else None
        except RecordError as error:
            return Rejection(name, raw.source, error.reason, str(error))
        ids, labels = collapse_images(example)
        num_cut = self._measure(record, sizes) - len(example.input_ids) if example.truncated else 0
        return SampleView(
            name, raw.source, record.turns, example, ids, labels, pixels, shown, num_cut, ignored=record.ignored
        )

    def tokens(self, view: SampleView) -> list[ReportToken]:
        """Return the rendered text of a view token by token, truncated tokens included."""
        pieces = split_tokens(view.turns, self.encoder)
        counts = iter(f" · {count} tokens" for count in view.example.image_tokens if self.image_spec)
        shown = [
            ReportToken(f"image{next(counts, '')}", "image") if piece.kind == "image" else piece for piece in pieces
        ]
        kept = len(view.input_ids)
        return join_tokens([*shown[:kept], *(ReportToken(piece.text, "cut") for piece in shown[kept:])])

    def warnings(self) -> list[str]:
        """Return warnings for the user before training."""
        stop = self._check_stop()
        return [*self.notes, *([stop] if stop else [])]

    def _check_stop(self) -> str | None:
        """Return a warning if an answer does not end with one token of its own, None otherwise."""
        template, tokenizer = self.encoder.template, self.encoder.tokenizer
        try:
            pieces = split_tokens((Turn("human", f"{IMAGE_TOKEN}\nWho?"), Turn("gpt", "No one")), self.encoder)
        except (RecordError, TemplateError):
            return None  # the error is reported for each conversation
        last = next(piece.text for piece in reversed(pieces) if piece.kind == "learnt")
        if last.strip(" ") == template.stop:
            return None
        return (
            f"template {template.name!r} stops at {template.stop!r}, but the last supervised token of an answer is "
            f"{last!r}: the stop string is not a single token of {tokenizer.name_or_path}, or the template ends "
            "answers differently. The model may not learn where answers end, and generation may not stop there. "
            "Choose a template made for this tokenizer, such as 'chat_template', or add the stop string to its "
            "special tokens."
        )

    def _measure(self, record: Record, sizes: list[Size]) -> int:
        counts = [self.encoder.image_tokens.count(*size) for size in sizes]
        encoder, turns = self.encoder.for_record(record.turns)
        return len(encoder.example(turns, range(len(counts)), counts).input_ids)

    def _read(self, raw: RawRecord, *, pairs: bool = False) -> Record:
        # Where no image is opened, images may also be unnamed.
        return read_record(raw, self.image_folder, unnamed_images=self.image_spec is None, pairs=pairs)

    def _open(self, record: Record) -> list[Image.Image]:
        if self.image_spec is None:
            return []
        images = []
        for index, content in enumerate(fetch_images(record, self.image_folder)):
            named = record.images[index]
            name = f"image {excerpt(named)}" if isinstance(named, str) else f"image {index + 1} of {len(record.images)}"
            try:
                images.append(open_image(content, name, max_pixels=MAX_IMAGE_PIXELS))
            except ImageError as error:
                message = f"record {record.id!r} ({record.source}): {error}"
                raise ImageError(message, reason=error.reason) from error
        return images

    def _crop(self, images: list[Image.Image]) -> UInt8[np.ndarray, "n 3 h w"]:
        assert self.image_spec is not None
        empty = np.empty((0, 3, self.image_spec.height, self.image_spec.width), np.uint8)
        return np.concatenate([empty, *(crop_views(image, self.image_spec) for image in images)])


def token_viewer(settings: PreviewSettings) -> Viewer:
    """Build a viewer from a tokenizer alone. Raises ConfigError or ModelError."""
    if settings.tokenizer is None or settings.version is None:
        raise ConfigError(
            "give --model BUNDLE, or --tokenizer DIR with --version TEMPLATE (such as vicuna_v1): "
            f"found --tokenizer {settings.tokenizer}, --version {settings.version}, --model {settings.model}"
        )
    # Once through the hub's cache: transformers would ask an unreachable hub for every file, several times each.
    tokenizer = load_tokenizer(find_source(settings.tokenizer, "tokenizer", weights=False).folder)
    template = find_template(settings.version, tokenizer)
    encoder = Encoder(tokenizer, template, ImageTokens(1, 1), settings.model_max_length or sys.maxsize)
    return Viewer(encoder, find_image_folder(settings))


def find_image_folder(settings: PreviewSettings) -> str:
    """Return the folder of relative image paths, by default the data's own."""
    if settings.image_folder is not None or is_prepared(settings.data):
        return absolute_path(settings.image_folder or settings.data)
    _, files = find_files(absolute_path(settings.data))
    return files[0].rpartition("/")[0]


def _name_of(raw: RawRecord | Record) -> str | int:
    """Return a record's id as in its JSON, for joins."""
    if isinstance(raw, Record):
        return raw.id
    try:
        own = parse_values(raw).get("id")
    except RecordError:  # its fault is reported elsewhere
        return raw.id
    return own if isinstance(own, int) and not isinstance(own, bool) and clean_id(own) == raw.id else raw.id
