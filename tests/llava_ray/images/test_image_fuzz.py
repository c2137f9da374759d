"""Images made from numbers go through what the service and the training reader call."""

import pytest
from fuzzing import NUM_INPUTS, Target, fuzz, fuzz_at_length
from image_mutations import make_image, originals

from llava_ray.errors import ImageError
from llava_ray.images.reading import check_header, check_image, open_image

MAX_PIXELS = 50_000_000
MAX_FRAMES = 64


def make_target() -> Target:
    originals()
    return read


def read(seed: int) -> str:
    """Read one image in each way there is; say how far the furthest came."""
    data, outcomes = make_image(seed), []
    for check in (
        lambda: check_header(data, "image 1", max_pixels=MAX_PIXELS, max_frames=MAX_FRAMES),
        lambda: check_image(data, "image 1", max_pixels=MAX_PIXELS),
        lambda: open_image(data, "image 1", max_pixels=MAX_PIXELS).size,
    ):
        try:
            outcomes.append(check())
        except ImageError as error:
            assert "image 1" in str(error)
            assert len(str(error)) < 1000
            outcomes.append(error.reason)
    if isinstance(outcomes[2], tuple):
        assert outcomes[1] == outcomes[2], "checking and opening find different sizes"
        return "read"
    return f"{outcomes[2]}, header {'read' if isinstance(outcomes[0], tuple) else 'refused'}"


@pytest.mark.slow
def test_mutated_images_are_read_or_refused() -> None:
    report = fuzz("images", make_target, NUM_INPUTS)
    assert not report.faults
    assert report.outcomes["read"] > NUM_INPUTS / 5


@pytest.mark.verify
@pytest.mark.timeout(7200)
def test_twenty_thousand_mutated_images_are_read_or_refused() -> None:
    report = fuzz_at_length("images", make_target)
    assert not report.faults
