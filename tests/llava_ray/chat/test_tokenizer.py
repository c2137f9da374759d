import json
import random
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.errors import ModelError

GOLDEN = Path(__file__).parents[2] / "golden"
WORDS = ["What", "USER", "Qu'est-ce", "这张图片", "cat", "\n", "\t", "é", "😀", "75%", "###", "foo.bar()", "{x}", ","]
SPACES = [0, 1, 1, 1, 2, 2, 3, 4, 5, 8, 9, 16, 31]


def make_text(rng):
    return "".join(rng.choice(WORDS) + " " * rng.choice(SPACES) for _ in range(rng.randint(1, 9)))


def test_pieces_are_sentencepieces_own(llama_tokenizers):
    pieces = SentencePieceProcessor()
    pieces.Load(str(GOLDEN / "tokenizer.model"))
    tokenizer = llama_tokenizers[True]
    rng = random.Random(0)
    for _ in range(1000):
        text = make_text(rng)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


def test_the_repair_is_still_needed(llama_folder, llama_tokenizers):
    # When this fails, transformers ranks merges by score again and load_tokenizer can go.
    assert AutoTokenizer.from_pretrained(llama_folder(True)).tokenize("a  b") == ["▁a", "▁▁", "b"]
    assert llama_tokenizers[True].tokenize("a  b") == ["▁a", "▁", "▁b"]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_saved_tokenizer_loads_as_it_was(llama_tokenizers, tmp_path, legacy):
    tokenizer = llama_tokenizers[legacy]
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    again = load_tokenizer(tmp_path)
    for text in ("a  b", "Look:  What</s>USER: 一只猫", "\n 😀"):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"(?s)can be loaded from .*Expected a folder with tokenizer\.json"):
        load_tokenizer(tmp_path)
