"""Tokenizers for the chat tests: the golden folder's 32,000 pieces, and one of bytes for Jinja templates."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava_ray.chat.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """Return a function that makes a tokenizer folder as Vicuna's, with ``legacy`` on or off."""

    def make(legacy: bool) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        shutil.copy(GOLDEN / "tokenizer.model", folder)
        config = {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": legacy,
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "<unk>",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.fixture(scope="session")
def llama_tokenizers(llama_folder: Callable[[bool], Path]) -> dict[bool, PreTrainedTokenizerBase]:
    return {legacy: load_tokenizer(llama_folder(legacy)) for legacy in (False, True)}


@pytest.fixture(scope="session")
def llama_tokenizer(llama_tokenizers: dict[bool, PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    return llama_tokenizers[False]


@pytest.fixture
def make_byte_tokenizer() -> Callable[..., PreTrainedTokenizerBase]:
    """Return a function that makes a tokenizer of single bytes with these control tokens; the first ends a turn."""

    def make(*control: str, bos: str | None = None, chat_template: str | None = None) -> PreTrainedTokenizerBase:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([*control, *([bos] if bos else [])])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=control[0], bos_token=bos)
        tokenizer.chat_template = chat_template
        return tokenizer

    return make
