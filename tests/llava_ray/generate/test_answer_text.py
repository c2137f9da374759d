"""Text that comes token by token is the text of all tokens, and nothing of it has to be taken back."""

import random
from collections.abc import Sequence
from pathlib import Path

import fakes
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from llava_ray.generate.answer_text import AnswerText, find_stop_prefix

TEXTS = ["is it red?\n\nYes,  it is.", "Größe: 你好 👋🏽 ñ", " a ### b\n", "", "  ", "👩‍👩‍👧‍👦" * 9, "\ta\n" * 30]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder: Path = fakes.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return AutoTokenizer.from_pretrained(folder)


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: AnswerText) -> list[str]:
    shown = []
    for token in ids:
        shown.append(text.push(token))
        if text.stopped:
            break
    return [*shown, text.finish()]


def decoder(tokenizer: PreTrainedTokenizerBase):
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_whole(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    raw = pieces(tokenizer, ids, AnswerText(decoder(tokenizer), strip=False))
    assert "".join(raw) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in raw)
    assert "".join(pieces(tokenizer, ids, AnswerText(decoder(tokenizer)))) == text.strip()


def test_any_tokens_at_all(tokenizer: PreTrainedTokenizerBase) -> None:
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(5, 300) for _ in range(60)]
        whole = tokenizer.decode(ids)
        shown = "".join(pieces(tokenizer, ids, AnswerText(decoder(tokenizer), strip=False)))
        assert whole.startswith(shown)
        assert set(whole[len(shown) :]) <= {"\N{REPLACEMENT CHARACTER}"}


def test_half_a_character_at_the_end_stays_out(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer.encode("a👋", add_special_tokens=False)
    assert len(ids) > 3
    assert pieces(tokenizer, ids[:-1], AnswerText(decoder(tokenizer)))[-1] == ""
    assert "".join(pieces(tokenizer, ids[:-1], AnswerText(decoder(tokenizer)))) == "a"


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        (("###",), "one # two ## three"),
        (("#!", "###"), "one # two ## three"),
        (("two", "one"), ""),
        (("three ###",), "one # two ##"),
        (("#### not this",), "one # two ## three ### four"),
        ((" two",), "one #"),
    ],
)
def test_stop_texts(tokenizer: PreTrainedTokenizerBase, stops: tuple[str, ...], shown: str) -> None:
    ids = tokenizer.encode("one # two ## three ### four", add_special_tokens=False)
    text = AnswerText(decoder(tokenizer), stops)
    said = pieces(tokenizer, ids, text)
    assert "".join(said) == shown
    assert text.stopped == (shown != "one # two ## three ### four")
    so_far = ""
    for piece in said:  # nothing that was shown belongs to a stop text
        so_far += piece
        assert shown.startswith(so_far)


def test_longest_beginning() -> None:
    assert find_stop_prefix("ab#", ("###",)) == 1
    assert find_stop_prefix("ab##", ("###", "#b")) == 2
    assert find_stop_prefix("abab", ("abac", "babx")) == 3
    assert find_stop_prefix("ab", ()) == find_stop_prefix("", ("x",)) == find_stop_prefix("ab", ("b",)) == 0
