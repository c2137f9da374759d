"""Preferences as one example: what both sides share, where they part, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from fakes import make_tokenizer

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Turn
from llava_ray.chat.templates import find_template
from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.data.examples import Encoder, Example
from llava_ray.data.record_examples import encode_pair, encode_row
from llava_ray.errors import RecordError
from llava_ray.images.tokens import ImageTokens

SIZE = (40, 30)
QUESTION = Turn("human", "<image>\nwhat is it?")
EARLIER = [Turn("human", "hello"), Turn("gpt", "yes", supervised=False)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return load_tokenizer(make_tokenizer(Path(tmp_path_factory.mktemp("tokenizer"))))


def make(tokenizer, limit: int = 3000, template: str = "v1") -> Encoder:
    return Encoder(tokenizer, find_template(template), ImageTokens(4, 4), limit)


def sides_of(example: Example) -> tuple[tuple[list[int], list[int]], tuple[list[int], list[int]]]:
    """Take a pair apart again: ids and labels of each side by itself."""
    assert example.pair is not None
    shared, end = example.pair.shared, example.pair.shared + example.pair.chosen
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    return (ids[:end], labels[:end]), (ids[:shared] + ids[end:], labels[:shared] + labels[end:])


@pytest.mark.parametrize("template", ["v1", "llama_2", "v0"])
@pytest.mark.parametrize("earlier", [[], EARLIER])
def test_both_sides_are_the_conversations_that_they_would_be_alone(tokenizer, template, earlier) -> None:
    encoder = make(tokenizer, template=template)
    better, worse = Turn("gpt", "a red circle"), Turn("gpt", "a red square or no")
    pair = encode_pair(encoder, [*earlier, QUESTION, better], [worse], [SIZE])
    for (ids, labels), answer in zip(sides_of(pair), (better, worse), strict=True):
        [alone] = encoder.encode([*earlier, QUESTION, answer], [SIZE])
        assert ids == alone.input_ids.tolist()
        assert labels == alone.labels.tolist()
    assert pair.images == (0,), "both sides share one encoding of the image"
    assert np.count_nonzero(pair.input_ids == IMAGE_TOKEN_INDEX) == 16
    assert (pair.labels[: pair.pair.shared] == IGNORE_INDEX).all()
    assert pair.num_chosen == np.count_nonzero(np.array(sides_of(pair)[0][1]) != IGNORE_INDEX)
    positions = pair.pair.position_ids
    assert positions[0] == 0 and np.count_nonzero(positions == 0) == 1, "one sample of a row"
    assert len(positions) == len(pair.input_ids)


def test_a_pair_from_a_shard_and_a_conversation(tokenizer) -> None:
    row = {"turns": [QUESTION.to_row(), Turn("gpt", "yes").to_row()], "widths": [40], "heights": [30]}
    [conversation] = encode_row(make(tokenizer), row | {"rejected": None})
    assert (conversation.pair, conversation.num_chosen) == (None, 0)
    [pair] = encode_row(make(tokenizer), row | {"rejected": [Turn("gpt", "no").to_row()]})
    assert pair.pair is not None


def test_a_pair_is_never_truncated(tokenizer) -> None:
    turns, rejected = [QUESTION, Turn("gpt", "yes")], [Turn("gpt", "no " * 40)]
    with pytest.raises(RecordError, match=r"of the prompt, \d+ and \d+ of the answers") as caught:
        encode_pair(make(tokenizer, 120), turns, rejected, [SIZE])
    assert caught.value.reason == "too_long"


def test_a_pair_without_a_supervised_answer_is_refused(tokenizer) -> None:
    quiet = Turn("gpt", "yes", supervised=False)
    for turns, rejected in (([QUESTION, quiet], [Turn("gpt", "no")]), ([QUESTION, Turn("gpt", "yes")], [quiet])):
        with pytest.raises(RecordError) as caught:
            encode_pair(make(tokenizer), turns, rejected, [SIZE])
        assert caught.value.reason == "nothing_to_learn"


def test_a_template_without_text_before_the_answer_is_refused(tokenizer) -> None:
    with pytest.raises(RecordError, match="a prompt whose text stands between its images and the answer") as caught:
        encode_pair(make(tokenizer, template="plain"), [QUESTION, Turn("gpt", "yes")], [Turn("gpt", "no")], [SIZE])
    assert caught.value.reason == "no_prompt"


def test_sides_that_the_template_renders_alike_are_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tokenizer(tmp_path))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}"
    encoder = Encoder(tokenizer, find_template("chat_template", tokenizer), ImageTokens(4, 4), 3000)
    turns = [Turn("human", "<image>\nwhat is it?"), Turn("gpt", "yes")]
    assert encode_pair(encoder, turns, [Turn("gpt", "no ")], [SIZE]).pair is not None
    with pytest.raises(RecordError, match="the same tokens") as caught:
        encode_pair(encoder, turns, [Turn("gpt", " yes\n")], [SIZE])
    assert caught.value.reason == "equal_sides"
