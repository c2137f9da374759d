"""The findings of a preview as a report, as a few lines for a terminal, or as JSON lines."""

import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from llava_ray.config.preview import PreviewSettings
from llava_ray.data.record_keys import describe_ignored
from llava_ray.preview.samples import Rejection, SampleView, Viewer
from llava_ray.report.pieces import (
    Bar,
    Card,
    Cell,
    Fact,
    Histogram,
    Link,
    Note,
    Picture,
    Report,
    Section,
    Table,
    TokenText,
)

_NUM_WORST = 12
_NUM_IN_TERMINAL = 3
_NUM_NAMED = 5  # samples without a finite loss that are listed by id
_SHOWN_CHARS = 40  # characters of an id
_LOSSLESS_UP_TO = 128  # pixels; larger crops are encoded as JPEG, to keep the page small

_PLAIN = "\x1b[0m"
_PAINT = {"context": _PLAIN, "learnt": "\x1b[32m", "image": "\x1b[90m", "cut": "\x1b[90;9m"}


@dataclass(frozen=True)
class Findings:
    """All views of a preview, and statistics of them."""

    settings: PreviewSettings
    viewer: Viewer
    views: Sequence[SampleView | Rejection]

    @cached_property
    def samples(self) -> list[SampleView]:
        """Return the samples: with a model those without a finite loss first, then by descending loss.

        Without a model they are in the order of the data.
        """
        samples = [view for view in self.views if isinstance(view, SampleView)]
        return sorted(samples, key=lambda sample: (not sample.no_loss, -(sample.loss or 0.0)))

    @cached_property
    def rejections(self) -> list[Rejection]:
        """Return the records that training would reject."""
        return [view for view in self.views if isinstance(view, Rejection)]

    @cached_property
    def losses(self) -> list[float]:
        """Return the losses, highest first; none without a model."""
        return [sample.loss for sample in self.samples if sample.loss is not None]

    @cached_property
    def without_loss(self) -> list[SampleView]:
        """Return the samples without a finite loss."""
        return [sample for sample in self.samples if sample.no_loss]

    @cached_property
    def lengths(self) -> list[int]:
        """Return the samples' lengths as they would be without a limit, in tokens."""
        return [sample.num_tokens + sample.num_cut for sample in self.samples]

    @cached_property
    def notes(self) -> list[str]:
        """Return notes for the user on the model, and on ignored keys of the data."""
        ignored = Counter(key for sample in self.samples for key in sample.ignored)
        return [*self.viewer.warnings(), *([describe_ignored(ignored) + "."] if ignored else [])]

    def facts(self) -> list[Fact]:
        """Return the key statistics."""
        num_tokens = sum(sample.num_tokens for sample in self.samples)
        num_learnt = sum(sample.example.num_supervised for sample in self.samples)
        num_cut = sum(sample.example.truncated for sample in self.samples)
        reasons = Counter(rejection.reason for rejection in self.rejections).most_common()
        lengths = self.lengths or [0]
        facts = [
            Fact("samples", f"{len(self.samples):,}"),
            Fact("rejected", f"{len(self.rejections):,}", ", ".join(f"{count} {reason}" for reason, count in reasons)),
            Fact("tokens, median", f"{int(np.median(lengths)):,}", f"longest {max(lengths):,}"),
            Fact("supervised tokens", f"{num_learnt / max(1, num_tokens):.0%}", f"{num_learnt:,} of {num_tokens:,}"),
        ]
        if num_cut:
            facts.append(Fact("cut off", f"{num_cut:,}", f"over {self.viewer.encoder.model_max_length:,} tokens"))
        if self.without_loss:
            facts.append(Fact("no finite loss", f"{len(self.without_loss):,}", _format_ids(self.without_loss)))
        if self.losses:
            facts.append(Fact("loss, median", f"{np.median(self.losses):.3f}", f"highest {self.losses[0]:.3f}"))
        return facts


def make_preview_report(findings: Findings) -> Report:
    """Build the report: warnings, lengths, losses, rejected records, and every sample token by token."""
    settings = findings.settings
    limit = findings.viewer.encoder.model_max_length if findings.viewer.is_limited else None
    histogram = Histogram(
        "Sample lengths", findings.lengths, "tokens", "samples", limit, f"model_max_length {limit:,}" if limit else ""
    )
    sections = [
        Section("Lengths", [*(Note(text, warning=True) for text in findings.notes), histogram]),
        *([_loss_section(findings)] if findings.losses or findings.without_loss else []),
        *([_rejection_section(findings)] if findings.rejections else []),
        Section(
            "Samples",
            [_card(sample, number, findings.viewer) for number, sample in enumerate(findings.samples)],
            "Tokens that the model is trained to produce are marked; all others are context."
            + (" Those with the highest loss, or none that is finite, come first." if findings.losses else ""),
        ),
    ]
    template = findings.viewer.encoder.template.name
    summary = f"{settings.data}, written by template {template} for {settings.model or settings.tokenizer}."
    if findings.viewer.image_spec is None:
        summary += " Without a model no image was opened, and each counts as one token."
    return Report("What the model will see", summary, sections, findings.facts())


def make_line(view: SampleView | Rejection) -> str:
    """Build one line of JSON: id, ids and labels, with a model the loss and its number of tokens; or the error."""
    if isinstance(view, Rejection):
        return json.dumps({"id": view.id, "error": {"reason": view.reason, "message": view.message}})
    values: dict[str, Any] = {"id": view.id, "ids": view.input_ids, "labels": view.labels}
    if view.loss is not None or view.no_loss:
        values |= {"loss": view.loss, "supervised": view.example.num_supervised}
    if view.no_loss:
        values["no_loss"] = view.no_loss
    return json.dumps(values | ({"truncated": True} if view.example.truncated else {}))


def describe_findings(findings: Findings) -> str:
    """Format facts and warnings as a few lines for a terminal."""
    lines = [
        f"{fact.label:>15}  {fact.value}{f'  ({fact.detail})' if fact.detail else ''}" for fact in findings.facts()
    ]
    return "\n".join([*lines, *(f"Attention: {text}" for text in findings.notes)])


def paint_samples(findings: Findings) -> str:
    """Format a few samples in ANSI colours: supervised tokens green, truncated ones struck through."""
    parts = []
    for sample in findings.samples[:_NUM_IN_TERMINAL]:
        tokens = findings.viewer.tokens(sample)
        # A terminal would execute escape codes in the data.
        text = "".join(_PAINT[token.kind] + _printable(token.text) for token in tokens)
        parts.append(f"{sample.id} ({_counts(sample)})\n{text}{_PLAIN}\n")
    return "\n".join(parts)


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)


def _format_ids(samples: Sequence[SampleView]) -> str:
    """Return the ids of the first few samples."""
    ids = ", ".join(str(sample.id)[:_SHOWN_CHARS] for sample in samples[:_NUM_NAMED])
    return f"{ids}, …" if len(samples) > _NUM_NAMED else ids


def _loss_section(findings: Findings) -> Section:
    num_without = len(findings.without_loss)
    shown = findings.samples[: num_without + _NUM_WORST]
    rows: list[list[Cell]] = [
        [Link(str(sample.id), f"#sample-{number}"), _loss(sample, findings), sample.example.num_supervised]
        for number, sample in enumerate(shown)
    ]
    parts: list[Note | Histogram | Table] = [Table(["id", "loss", "supervised tokens"], rows, "Highest losses")]
    if findings.losses:
        parts.insert(0, Histogram("Losses", findings.losses, "mean loss of a sample", "samples"))
    if num_without:
        text = (
            f"{num_without:,} of {len(findings.samples):,} samples have no finite loss: training would diverge there."
        )
        parts.insert(0, Note(text, warning=True))
    return Section("Losses", parts, "Samples with a high loss are rare, hard, or wrong.")


def _loss(sample: SampleView, findings: Findings) -> Bar | str:
    if sample.loss is None:
        return sample.no_loss
    return Bar(sample.loss, f"{sample.loss:.3f}", findings.losses[0])


def _rejection_section(findings: Findings) -> Section:
    rows = [[str(found.id), found.reason, found.message] for found in findings.rejections]
    return Section("Rejected", [Table(["id", "reason", "message"], rows)], "Training would reject these.")


def _card(sample: SampleView, number: int, viewer: Viewer) -> Card:
    pixels = () if sample.pixels is None else sample.pixels
    pictures = [
        Picture(_encode_pixels(crop), f"{name} of sample {sample.id}", f"{crop.shape[2]} × {crop.shape[1]} pixels")
        for name, crop in zip(_view_names(sample, viewer), pixels, strict=True)
    ]
    return Card(str(sample.id), [TokenText(viewer.tokens(sample))], pictures, _counts(sample), f"sample-{number}")


def _view_names(sample: SampleView, viewer: Viewer) -> list[str]:
    """Name each crop by its image, and by its view where there are several."""
    names = []
    for number, size in enumerate(sample.image_sizes, start=1):
        num_views = viewer.encoder.image_tokens.num_views(*size)
        views = [f"view {view} of image {number}" for view in range(1, num_views + 1)]
        names += views if num_views > 1 else [f"image {number}"]
    return names


def _counts(sample: SampleView) -> str:
    counts = [f"{sample.num_tokens:,} tokens", f"{sample.example.num_supervised:,} supervised"]
    if sample.num_cut:
        counts.append(f"{sample.num_cut:,} cut off")
    if sample.loss is not None:
        counts.append(f"loss {sample.loss:.3f}")
    if sample.no_loss:
        counts.append(f"loss {sample.no_loss}")
    return ", ".join(counts)


def _encode_pixels(pixels: UInt8[np.ndarray, "3 h w"]) -> bytes:
    """Encode a crop as an image file."""
    sink = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    if max(image.size) <= _LOSSLESS_UP_TO:
        image.save(sink, "PNG")
    else:
        image.save(sink, "JPEG", quality=85)
    return sink.getvalue()
