"""Examples: expanded images, cuts that never enter an image, splits at turns, and what cannot be learnt from."""

from pathlib import Path

import numpy as np
import pytest
from fakes import make_tokenizer

from llava_ray.chat.conversation import IMAGE_TOKEN_INDEX, Turn
from llava_ray.chat.templates import find_template
from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.data.examples import Encoder
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
