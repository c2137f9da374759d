"""Images of several views in packed rows: the same losses and gradients as one sample at a time, in every merge."""

from dataclasses import dataclass

import fakes
import numpy as np
import pytest
import torch
from losses import sample_losses, token_losses
from PIL import Image

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ray.errors import ModelError
from llava_ray.images.geometry import crop_views
from llava_ray.images.processing import normalize_pixels
from llava_ray.images.tokens import NEWLINE
from llava_ray.model.assembly import LlavaParts, assemble
from llava_ray.model.network.llava import Llava

MERGE_TYPES = ["flat", "spatial", "spatial_unpad"]
SIZES = [[(64, 48)], [], [(20, 90), (33, 33)], [(64, 64), (30, 20), (96, 20)]]
NUM_SUPERVISED = [3, 2, 4, 1]


@dataclass(frozen=True)
class AnyresSample:
    """Words around each image, and something to learn at the end."""

    input_ids: list[int]
    labels: list[int]
    views: list[torch.Tensor]
    sizes: list[tuple[int, int]]


def make_samples(parts: LlavaParts) -> list[AnyresSample]:
    draw = np.random.default_rng(0)
    samples = []
    for number, (sizes, num_supervised) in enumerate(zip(SIZES, NUM_SUPERVISED, strict=True)):
        ids = [1]
        views = []
        for width, height in sizes:
            picture = Image.fromarray(draw.integers(0, 255, (height, width, 3), np.uint8))
            views.append(normalize_pixels(crop_views(picture, parts.image_spec), parts.image_spec))
            ids += [20 + number, *[IMAGE_TOKEN_INDEX] * parts.image_tokens.count(width, height)]
        answer = [40 + number] * (num_supervised - 1) + [2]
        ids += [60, 61, *answer]
        samples.append(AnyresSample(ids, [IGNORE_INDEX] * (len(ids) - len(answer)) + answer, views, sizes))
    return samples


def row_of(parts: LlavaParts, samples: list[AnyresSample]) -> dict[str, object]:
    """What ``sample_losses`` takes of samples packed into a row."""
    views = [stack for sample in samples for stack in sample.views]
    return {
        "input_ids": torch.tensor([[token for sample in samples for token in sample.input_ids]]),
        "position_ids": torch.tensor([[i for sample in samples for i in range(len(sample.input_ids))]]),
        "labels": torch.tensor([[label for sample in samples for label in sample.labels]]),
        "features": parts.tower(torch.cat(views)) if views else None,
        "image_sizes": [size for sample in samples for size in sample.sizes],
    }


def anyres(folders, merge_type: str = "spatial_unpad", **settings: object) -> LlavaParts:
    return assemble(folders.config(mm_patch_merge_type=merge_type, **settings), "anyres", seed=3)


@pytest.mark.parametrize("merge_type", MERGE_TYPES)
@pytest.mark.parametrize("tower", ["clip", "siglip", "siglip2", "dinov2"])
def test_packed_equals_separate(tower: str, merge_type: str, folders) -> None:
    parts = anyres(folders, merge_type, tower=tower)
    samples = make_samples(parts)
    with torch.no_grad():
        packed, counts = sample_losses(parts.llava, **row_of(parts, samples))
        separate = [sample_losses(parts.llava, **row_of(parts, [sample]))[0] for sample in samples]
        backwards, _ = sample_losses(parts.llava, **row_of(parts, samples[::-1]))
    assert counts.tolist() == NUM_SUPERVISED
    torch.testing.assert_close(packed, torch.cat(separate), rtol=0, atol=1e-5)
    torch.testing.assert_close(backwards.flip(0), packed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("merge_type", MERGE_TYPES)
def test_gradient_of_a_packed_row_is_the_sum_of_the_separate_ones(merge_type: str, folders) -> None:
    parts = anyres(folders, merge_type)
    samples = make_samples(parts)
    token_losses(parts.llava, **row_of(parts, samples)).sum().backward()
    packed = {name: p.grad.clone() for name, p in parts.llava.named_parameters()}
    assert ("image_newline" in packed) == (merge_type == "spatial_unpad")
    assert all(gradient.any() for gradient in packed.values())
    parts.llava.zero_grad()
    for sample in samples:
        token_losses(parts.llava, **row_of(parts, [sample])).sum().backward()
    for name, parameter in parts.llava.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_each_feature_stands_where_its_image_has_it(folders) -> None:
    parts = anyres(folders)
    row = row_of(parts, make_samples(parts))
    embedded = parts.llava.embed(row["input_ids"], row["features"], row["image_sizes"])
    at_images = embedded[row["input_ids"] == IMAGE_TOKEN_INDEX]
    projected = parts.llava.projector(row["features"]).flatten(0, 1)
    order = parts.image_tokens.arrange(row["image_sizes"])
    for position, feature in zip(at_images, order.tolist(), strict=True):
        expected = parts.llava.image_newline if feature == NEWLINE else projected[feature]
        torch.testing.assert_close(position, expected)


def test_a_row_without_images_touches_all_that_only_images_use(folders) -> None:
    parts = anyres(folders)
    losses = token_losses(parts.llava, **row_of(parts, [make_samples(parts)[1]]))
    losses.sum().backward()
    for name in ("image_newline", "projector.0.weight"):
        assert not parts.llava.get_parameter(name).grad.any(), name


def test_newline_begins_as_in_the_original(folders) -> None:
    newline = anyres(folders).llava.image_newline
    assert newline.shape == (fakes.WIDTH,)
    assert 0.3 < float(newline.detach().std()) * fakes.WIDTH**0.5 < 3
    assert torch.equal(newline, anyres(folders).llava.image_newline)  # on every rank
    assert anyres(folders, "flat").llava.image_newline is None


def test_features_of_other_sizes_are_refused(folders) -> None:
    parts = anyres(folders)
    row = row_of(parts, make_samples(parts)[:1])
    with pytest.raises(ModelError, match=r"80 image features, but images of \[\(96, 20\)\] pixels have 64 with anyres"):
        token_losses(parts.llava, **row | {"image_sizes": [(96, 20)]})
    with pytest.raises(ModelError, match=r"80 image features, but images of .* pixels have 0"):
        token_losses(parts.llava, **row | {"image_sizes": []})


def test_unpadding_needs_its_vector(folders) -> None:
    parts = anyres(folders)
    with pytest.raises(ModelError, match="expected a tensor image_newline"):
        Llava(parts.llava.projector, parts.llava.language_model, 48, parts.image_tokens)


def test_one_view_of_a_model_with_a_newline_takes_no_newline(folders) -> None:
    parts = assemble(folders.config(mm_patch_merge_type="spatial_unpad"), "pad")
    samples = make_samples(parts)
    assert parts.image_tokens.count(64, 48) == 16
    token_losses(parts.llava, **row_of(parts, samples)).sum().backward()
    assert not parts.llava.image_newline.grad.any()
