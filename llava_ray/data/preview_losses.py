"""What a model makes of each sample: losses in fp32, several samples packed into a row."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from llava_ray.chat.templates import find_template
from llava_ray.config.sections import ModelConfig
from llava_ray.data.examples import Encoder
from llava_ray.data.preview import PreviewSettings, Rejection, SampleView, Viewer, find_images
from llava_ray.errors import ConfigError
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.processing import normalise
from llava_ray.model.bundle import LlavaParts, assemble, load_bundle
from llava_ray.model.image_geometry import read_image_geometry
from llava_ray.model.losses import sample_losses
from llava_ray.model.manifest import is_bundle
from llava_ray.model.vocabulary import with_image_tags

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class Judge:
    """A model that tells how surprised it is by a sample. ``row_length`` bounds the tokens of one forward pass."""

    parts: LlavaParts
    image_spec: ImageSpec
    row_length: int

    def add_losses(self, views: Iterable[SampleView | Rejection]) -> Iterator[SampleView | Rejection]:
        """Yield the views in their order, each sample with its loss."""
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
        return [replace(view, loss=next(losses)) if isinstance(view, SampleView) else view for view in row]

    @torch.inference_mode()
    def losses(self, samples: Sequence[SampleView]) -> list[float]:
        """Return the mean loss of each sample over its supervised tokens, all of them in one packed row."""
        device = next(self.parts.llava.parameters()).device
        ids = np.concatenate([sample.example.input_ids for sample in samples])
        labels = np.concatenate([sample.example.labels for sample in samples])
        positions = np.concatenate([np.arange(sample.num_tokens) for sample in samples])
        input_ids, position_ids, row_labels = (
            torch.from_numpy(values.astype(np.int64))[None].to(device) for values in (ids, positions, labels)
        )
        sizes = [size for sample in samples for size in sample.image_sizes]
        losses, _ = sample_losses(self.parts.llava, input_ids, position_ids, row_labels, self.features(samples), sizes)
        return [float(loss) for loss in losses]

    def features(self, samples: Sequence[SampleView]) -> Float[Tensor, "n p v"] | None:
        """Return the tower's features of all views of the row's images, in order; None without images."""
        pixels = [sample.pixels for sample in samples if sample.pixels is not None and len(sample.pixels)]
        if not pixels:
            return None
        views = torch.from_numpy(np.concatenate(pixels))
        return self.parts.tower.extract(views, lambda some: normalise(some, self.image_spec))


def model_viewer(settings: PreviewSettings) -> tuple[Viewer, Judge]:
    """Load a model and return what shows samples as it sees them, and what it makes of them.

    Raises ConfigError or ModelError.
    """
    if settings.model is None or settings.tokenizer is not None:
        raise ConfigError(
            f"--model {settings.model} and --tokenizer {settings.tokenizer}: give one of them; a model has its own "
            "tokenizer"
        )
    parts = load_parts(settings, Path(settings.model))
    length = settings.model_max_length or parts.manifest.model_max_length
    ratio = settings.image_aspect_ratio or parts.manifest.image_aspect_ratio
    spec, tokens = read_image_geometry(parts.config, ratio, parts.tower_config, parts.image_processor)
    parts.llava.image_tokens = tokens
    version = settings.version or parts.manifest.version
    template = with_image_tags(find_template(version, parts.tokenizer), start_end=parts.config.mm_use_im_start_end)
    encoder = Encoder(parts.tokenizer, template, tokens, length)
    return Viewer(encoder, find_images(settings), spec, _notes(settings, parts)), Judge(parts, spec, length)


def _notes(settings: PreviewSettings, parts: LlavaParts) -> tuple[str, ...]:
    notes = []
    if parts.bundle is None:
        notes.append("the projector is new and has learnt nothing: losses of samples with images say little.")
    if settings.version not in (None, parts.manifest.version):
        notes.append(f"the model was trained with template {parts.manifest.version!r}, not {settings.version!r}.")
    return tuple(notes)


def load_parts(settings: PreviewSettings, folder: Path) -> LlavaParts:
    """Load a bundle, or a plain language model with a tower and a new projector, in fp32 for evaluation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if is_bundle(folder):
        return load_bundle(
            folder, device=device, language_model=settings.model_base, vision_tower=settings.vision_tower
        )
    if settings.version is None or settings.vision_tower is None:
        raise ConfigError(
            f"--model {folder} is no llava_ray bundle (it has no llava.json), so it does not say its template or "
            f"tower; add --version (found {settings.version}) and --vision_tower (found {settings.vision_tower})"
        )
    config = ModelConfig(model_name_or_path=str(folder), vision_tower=settings.vision_tower, version=settings.version)
    ratio = settings.image_aspect_ratio or "square"
    parts = assemble(config, ratio, model_max_length=settings.model_max_length or DEFAULT_LENGTH)
    parts.tower.to(device)
    parts.llava.to(device).eval()
    return parts
