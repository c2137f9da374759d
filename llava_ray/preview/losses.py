"""Losses of a model on each sample, in fp32, with several samples packed into a row."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_ray.config.preview import PreviewSettings
from llava_ray.data.examples import Encoder
from llava_ray.errors import ConfigError, ModelError
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.formats.layout import LayoutKind
from llava_ray.model.image_geometry import read_image_geometry
from llava_ray.model.loading import load_pretrained_model
from llava_ray.objectives.cross_entropy import CrossEntropy
from llava_ray.objectives.objective import Objective, PackedRow, mean_by_sample
from llava_ray.preview.samples import Rejection, SampleView, Viewer, find_image_folder


@dataclass(frozen=True)
class LossScorer:
    """A model that computes its loss on samples. ``row_length`` bounds the tokens of one forward pass."""

    parts: LlavaParts
    image_spec: ImageSpec
    row_length: int
    objective: Objective = field(default_factory=CrossEntropy)

    def add_losses(self, views: Iterable[SampleView | Rejection]) -> Iterator[SampleView | Rejection]:
        """Yield the views in order, each sample with its loss."""
        row: list[SampleView | Rejection] = []
        room = self.row_length
        for view in views:
            num_tokens = view.num_tokens if isinstance(view, SampleView) else 0
            if num_tokens > room:
                yield from self._scored(row)
                row, room = [], self.row_length
            row.append(view)
            room -= num_tokens
        yield from self._scored(row)

    def _scored(self, row: Sequence[SampleView | Rejection]) -> list[SampleView | Rejection]:
        samples = [view for view in row if isinstance(view, SampleView)]
        losses = iter(self.losses(samples) if samples else [])
        return [_with_loss(view, next(losses)) if isinstance(view, SampleView) else view for view in row]

    def losses(self, samples: Sequence[SampleView]) -> list[float]:
        """Return the mean loss of each sample over its supervised tokens.

        All samples share one packed row; if a loss is not finite, each is computed alone, as attention may spread a NaN
        over the row.
        """
        losses = self.losses_of_row(samples)
        if len(samples) == 1 or all(map(math.isfinite, losses)):
            return losses
        return [loss for sample in samples for loss in self.losses_of_row([sample])]

    @torch.inference_mode()
    def losses_of_row(self, samples: Sequence[SampleView]) -> list[float]:
        """Return the mean loss of each sample of one packed row."""
        device = next(self.parts.llava.parameters()).device
        ids = np.concatenate([sample.example.input_ids for sample in samples])
        labels = np.concatenate([sample.example.labels for sample in samples])
        positions = np.concatenate([np.arange(sample.num_tokens) for sample in samples])
        input_ids, position_ids, row_labels = (
            torch.from_numpy(values.astype(np.int64))[None] for values in (ids, positions, labels)
        )
        sizes = [size for sample in samples for size in sample.image_sizes]
        features = self.features(samples)
        packed = PackedRow.on_device(input_ids, position_ids, row_labels, device, features=features, image_sizes=sizes)
        losses, _ = mean_by_sample(self.objective.compute(self.parts.llava, packed), packed.position_ids)
        return [float(loss) for loss in losses]

    def features(self, samples: Sequence[SampleView]) -> Float[Tensor, "n p v"] | None:
        """Return the tower's features of all views of the row's images, in order; None without images."""
        pixels = [sample.pixels for sample in samples if sample.pixels is not None and len(sample.pixels)]
        if not pixels:
            return None
        views = torch.from_numpy(np.concatenate(pixels))
        return self.parts.tower.extract(views, lambda some: normalize_pixels(some, self.image_spec))


def _with_loss(sample: SampleView, loss: float) -> SampleView:
    """Return a sample with its loss, or with the reason why it has none."""
    return replace(sample, loss=loss) if math.isfinite(loss) else replace(sample, no_loss="not finite")


def model_viewer(settings: PreviewSettings) -> tuple[Viewer, LossScorer]:
    """Load a model; return a viewer that shows samples as it sees them, and a scorer of its losses.

    Raises ConfigError or ModelError.
    """
    if settings.model is None or settings.tokenizer is not None:
        raise ConfigError(
            f"--model {settings.model} and --tokenizer {settings.tokenizer}: give one of them; a model has its own "
            "tokenizer"
        )
    parts = load_pretrained_model(
        settings.model,
        settings.model_base,
        vision_tower=settings.vision_tower,
        version=settings.version,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    with contextlib.suppress(ModelError):  # whose attention cannot: the row under a mask gives the same losses
        parts.llava.attend_by_sample()  # as training does
    length = settings.model_max_length or parts.manifest.model_max_length
    ratio = settings.image_aspect_ratio or parts.manifest.image_aspect_ratio
    spec, tokens = read_image_geometry(parts.config, ratio, parts.tower_config, parts.image_processor)
    parts.llava.image_tokens = tokens
    encoder = Encoder(parts.tokenizer, parts.template, tokens, length)
    return Viewer(encoder, find_image_folder(settings), spec, _notes(settings, parts)), LossScorer(parts, spec, length)


def _notes(settings: PreviewSettings, parts: LlavaParts) -> tuple[str, ...]:
    notes = []
    if parts.layout.kind is LayoutKind.LANGUAGE_MODEL:
        notes.append("the projector is new and untrained: losses of samples with images say little.")
    trained = parts.layout.settings.get("version")
    if trained is not None and settings.version not in (None, trained):
        notes.append(f"the model was trained with template {trained!r}, not {settings.version!r}.")
    return tuple(notes)
