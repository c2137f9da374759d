"""Examples: expanded images, cuts that never enter an image, splits at turns, and what cannot be learnt from."""

from pathlib import Path

import numpy as np
import pytest
from fakes import make_tokenizer

from llava_ray.chat.conversation import IMAGE_TOKEN_INDEX, Turn
from llava_ray.chat.templates import find_template
from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.data.examples import Encoder, image_starts
from llava_ray.errors import RecordError
from llava_ray.images.tokens import ImageTokens

NUM_IMAGE_TOKENS = 16
SIZE = (40, 30)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return load_tokenizer(make_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))


def make(tokenizer, limit: int, on_too_long="truncate") -> Encoder:
    return Encoder(tokenizer, find_template("v1"), ImageTokens(4, 4), limit, on_too_long)


def ask(*exchanges: tuple[str, str]) -> list[Turn]:
    return [Turn(role, text) for pair in exchanges for role, text in zip(("human", "gpt"), pair, strict=True)]


def test_an_image_takes_its_patch_tokens(tokenizer):
    (example,) = make(tokenizer, 1000).encode(ask(("<image>\nwhat is it?", "a circle")), [SIZE])
    assert np.count_nonzero(example.input_ids == IMAGE_TOKEN_INDEX) == NUM_IMAGE_TOKENS
    assert example.images == (0,)
    assert example.num_supervised == np.count_nonzero(example.labels != -100)


def test_too_many_markers_for_the_images_are_refused(tokenizer):
    with pytest.raises(RecordError) as caught:
        make(tokenizer, 1000).encode(ask(("<image>\nwhat?", "a circle")), [SIZE] * 2)
    assert caught.value.reason == "image_count"


def test_truncation_cuts_at_the_right_and_counts(tokenizer):
    turns = ask(("<image>\nwhat is it?", "yes"), ("and?", "no " * 50))
    whole = make(tokenizer, 5000).encode(turns, [SIZE])[0]
    limit = len(whole.input_ids) - 30
    cut = make(tokenizer, limit).encode(turns, [SIZE])[0]
    assert cut.truncated
    assert list(cut.input_ids) == list(whole.input_ids[:limit])


def test_truncation_never_enters_an_image(tokenizer):
    turns = ask(("what is it?", "yes"), ("<image>\nand this?", "no"))
    whole = make(tokenizer, 5000).encode(turns, [SIZE])[0]
    first = int(np.flatnonzero(whole.input_ids == IMAGE_TOKEN_INDEX)[0])
    cut = make(tokenizer, first + 5).encode(turns, [SIZE])[0]
    assert len(cut.input_ids) == first
    assert cut.images == ()


def test_a_sample_left_with_nothing_to_learn_is_rejected(tokenizer):
    with pytest.raises(RecordError, match="nothing to learn") as caught:
        make(tokenizer, 40).encode(ask(("<image>\nwhat is it?", "yes")), [SIZE])
    assert caught.value.reason == "nothing_to_learn"


def test_rejecting_names_the_length_and_the_limit(tokenizer):
    with pytest.raises(RecordError, match=r"tokens, over model_max_length = 60") as caught:
        make(tokenizer, 60, "reject").encode(ask(("<image>\nwhat is it?", "yes " * 40)), [SIZE])
    assert caught.value.reason == "too_long"


def test_splitting_at_turns_keeps_every_answer_once_and_shows_the_image_again(tokenizer):
    turns = ask(("<image>\nwhat is it?", "a circle"), ("is it red?", "yes it is"), ("is it blue?", "no it is not"))
    whole = make(tokenizer, 5000).encode(turns, [SIZE])[0]
    parts = make(tokenizer, len(whole.input_ids) - 1, "split").encode(turns, [SIZE])
    assert len(parts) == 2
    assert sum(part.num_supervised for part in parts) == whole.num_supervised
    assert all(part.images == (0,) for part in parts)
    assert all(np.count_nonzero(part.input_ids == IMAGE_TOKEN_INDEX) == NUM_IMAGE_TOKENS for part in parts)


def test_an_exchange_too_long_even_alone_is_rejected(tokenizer):
    with pytest.raises(RecordError, match="even one question and answer does not fit"):
        make(tokenizer, 70, "split").encode(ask(("<image>\nwhat is it?", "yes " * 60), ("more?", "no")), [SIZE])


# Views of 4 x 4 patches; a wide image takes 16 + 2 x 9 positions, a square one of four views 16 + 8 x 9.
ANYRES = ImageTokens(4, 4, 0, "spatial_unpad", ((64, 32), (64, 64)), 32)
WIDE, SQUARE = (60, 15), (80, 80)


def make_anyres(tokenizer, limit: int, on_too_long="truncate") -> Encoder:
    return Encoder(tokenizer, find_template("v1"), ANYRES, limit, on_too_long)


def image_runs(ids: np.ndarray) -> list[int]:
    """Lengths of the runs of image positions."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], ids == IMAGE_TOKEN_INDEX, [False]]).astype(int)))
    return (edges[1::2] - edges[::2]).tolist()


def test_images_of_different_sizes_take_their_own_numbers_of_tokens(tokenizer):
    turns = ask(("is <image> like <image>?", "no"), ("<image>\nand this?", "yes"))
    (example,) = make_anyres(tokenizer, 1000).encode(turns, [SQUARE, WIDE, SQUARE])
    assert ANYRES.count(*WIDE) == 34
    assert image_runs(example.input_ids) == [88, 34, 88]
    assert (example.images, example.image_tokens) == ((0, 1, 2), (88, 34, 88))
    assert (
        image_starts(example).tolist() == np.flatnonzero(example.input_ids == IMAGE_TOKEN_INDEX)[[0, 88, 122]].tolist()
    )


def test_neighbouring_images_are_told_apart(tokenizer):
    (example,) = make_anyres(tokenizer, 1000).encode(ask(("<image><image> which?", "the second")), [WIDE, SQUARE])
    first = int(np.flatnonzero(example.input_ids == IMAGE_TOKEN_INDEX)[0])
    assert image_starts(example).tolist() == [first, first + 34]
    for limit in (first + 35, first + 34 + 87):
        cut = make_anyres(tokenizer, limit).truncated(example)
        assert (len(cut.input_ids), cut.images, cut.image_tokens) == (first + 34, (0,), (34,))
    assert make_anyres(tokenizer, first + 34).truncated(example).images == (0,)
    assert make_anyres(tokenizer, first + 33).truncated(example).images == ()


@pytest.mark.parametrize("on_too_long", ["truncate", "split", "reject"])
def test_an_image_too_long_alone_rejects_its_sample(tokenizer, on_too_long):
    # Cut before the second image, something would be left to learn.
    turns = ask(("<image>\nwhat is it?", "yes"), ("<image>\nand this?", "no"))
    with pytest.raises(RecordError, match=r"image 2 of 2 \(80 x 80 pixels\) alone takes 88 tokens, over") as caught:
        make_anyres(tokenizer, 87, on_too_long).encode(turns, [WIDE, SQUARE])
    assert caught.value.reason == "image_too_long"


def test_splitting_shows_each_image_with_its_own_length_again(tokenizer):
    turns = ask(("<image>\nwhat?", "red"), ("and <image>?", "blue"), ("sure?", "yes it is"), ("really?", "no"))
    whole = make_anyres(tokenizer, 5000).encode(turns, [WIDE, SQUARE])[0]
    parts = make_anyres(tokenizer, len(whole.input_ids) - 1, "split").encode(turns, [WIDE, SQUARE])
    assert [part.images for part in parts] == [(0, 1), (0, 1)]
    assert [image_runs(part.input_ids) for part in parts] == [[34, 88], [34, 88]]
    assert sum(part.num_supervised for part in parts) == whole.num_supervised


def test_text_only_samples_are_as_without_anyres(tokenizer):
    turns = ask(("what is it?", "a circle"))
    (one,), (other,) = make(tokenizer, 1000).encode(turns, []), make_anyres(tokenizer, 1000).encode(turns, [])
    assert np.array_equal(one.input_ids, other.input_ids)
