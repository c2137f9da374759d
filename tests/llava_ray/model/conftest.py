"""Tiny models on disk, made once a session."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fakes
import pytest
import torch

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ray.config.model import ModelConfig
from llava_ray.model.assembly import LlavaParts, assemble


@dataclass(frozen=True)
class Folders:
    """Where the tiny models are; each is made when it is first asked for."""

    root: Path

    def language_model(self, kind: str = "llama") -> Path:
        folder = self.root / kind
        return folder if folder.exists() else fakes.make_language_model(folder, kind)

    def tower(self, kind: str = "clip") -> Path:
        folder = self.root / f"tower_{kind}"
        return folder if folder.exists() else fakes.make_vision_tower(folder, kind)

    def config(self, language_model: str = "llama", tower: str = "clip", **settings: object) -> ModelConfig:
        paths = {
            "model_name_or_path": str(self.language_model(language_model)),
            "vision_tower": str(self.tower(tower)),
        }
        return ModelConfig.parsed({**paths, **settings})

    def assemble(self, language_model: str = "llama", tower: str = "clip", **settings: object) -> LlavaParts:
        return assemble(self.config(language_model, tower, **settings), "pad", seed=3)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


@dataclass(frozen=True)
class Sample:
    """One sample as a row of its own."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixels: torch.Tensor | None

    @property
    def position_ids(self) -> torch.Tensor:
        return torch.arange(self.input_ids.shape[1])[None]


@dataclass(frozen=True)
class Row:
    """Samples packed into one row, with the features of all their images."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor | None

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.input_ids, self.position_ids, self.labels, self.features


def make_sample(question: list[int], answer: list[int], num_images: int, num_image_tokens: int, seed: int) -> Sample:
    images = [IMAGE_TOKEN_INDEX] * num_image_tokens
    ids = [1, *images * num_images, *question, *answer]
    labels = [IGNORE_INDEX] * (len(ids) - len(answer)) + answer
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(num_images, 3, fakes.IMAGE_SIZE, fakes.IMAGE_SIZE, generator=generator)
    return Sample(torch.tensor([ids]), torch.tensor([labels]), pixels if num_images else None)


@pytest.fixture
def samples() -> Callable[[int], list[Sample]]:
    """Samples with one image, without, with two, and with nothing to learn, for so many tokens an image."""
    return lambda num_image_tokens: [
        make_sample([20, 21], [40, 41, 42, 2], 1, num_image_tokens, seed=0),
        make_sample([22, 23, 24, 25, 26, 27, 28], [43, 2], 0, num_image_tokens, seed=1),
        make_sample([29], [44, 45, 46, 47, 2], 2, num_image_tokens, seed=2),
        make_sample([30, 31], [], 0, num_image_tokens, seed=3),
        # Its very first token is learnt where it stands alone, as some Jinja templates do: never from a neighbour.
        Sample(torch.tensor([[50, 51, 2]]), torch.tensor([[50, 51, 2]]), None),
    ]


@pytest.fixture
def pack() -> Callable[..., Row]:
    """Pack samples into a row with the tower's features."""

    def packed(parts: LlavaParts, samples: list[Sample]) -> Row:
        pixels = [sample.pixels for sample in samples if sample.pixels is not None]
        return Row(
            torch.cat([sample.input_ids for sample in samples], 1),
            torch.cat([sample.position_ids for sample in samples], 1),
            torch.cat([sample.labels for sample in samples], 1),
            parts.tower(torch.cat(pixels)) if pixels else None,
        )

    return packed
