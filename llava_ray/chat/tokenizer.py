"""Loading of tokenizers such that they split text as in the model's training.

transformers 5 builds a BPE tokenizer from a lone SentencePiece ``tokenizer.model`` (what Vicuna and LLaVA-1.5 ship)
by ranking merges by piece id instead of by score. In Llama's and Mistral's vocabularies runs of spaces have low ids
and the lowest scores, so two spaces before a word would become ``▁▁ What`` instead of ``▁ ▁What``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from llava_ray.errors import ModelError
from llava_ray.reading import LARGE_INT_BITS, check_plain, is_file, read_bounded, short_repr, wrap_errors

MAX_TOKENIZER_BYTES = 40 * 2**20  # the largest published has 33 MB; parsing takes 25 times that in memory
_FILES = {
    "tokenizer.json": MAX_TOKENIZER_BYTES,
    "tokenizer.model": MAX_TOKENIZER_BYTES,
    "vocab.json": MAX_TOKENIZER_BYTES // 2,
    "merges.txt": MAX_TOKENIZER_BYTES // 2,
    "tokenizer_config.json": 16 * 2**20,
    "added_tokens.json": 16 * 2**20,
    "special_tokens_map.json": 2**20,
    "chat_template.jinja": 2**20,
    "chat_template.json": 2**20,
}
_REMEDY = "Expected a folder with tokenizer.json or tokenizer.model beside tokenizer_config.json, or a hub name."

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers.models import BPE
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def load_tokenizer(path: str | Path, config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer from a folder or a hub name, its merges in SentencePiece's order.

    ``config`` is the language model's, where the config.json at ``path`` is not. Raises ModelError if there is no
    tokenizer at ``path``.
    """
    from transformers import AutoTokenizer

    known = {} if config is None else {"config": config}
    _check_files(Path(path))
    with wrap_errors("no tokenizer", _REMEDY, says=f"can be loaded from {short_repr(str(path))}"):
        # A folder may name code of its own: without this flag transformers would ask at the terminal whether to run it.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False, **known)
        return _in_order(tokenizer)


def _in_order(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer with its merges in SentencePiece's order, if it was converted from a SentencePiece file."""
    from tokenizers.models import BPE

    if not tokenizer.is_fast:
        return tokenizer
    model, pieces = tokenizer.backend_tokenizer.model, _find_pieces(tokenizer)
    if isinstance(model, BPE) and pieces is not None:
        tokenizer.backend_tokenizer.model = _rank_merges(model, pieces)
    if "legacy" in vars(tokenizer):
        # LlamaTokenizer does not save this switch itself; without it a saved copy loads as legacy=False.
        tokenizer.init_kwargs["legacy"] = vars(tokenizer)["legacy"]
    return tokenizer


def _check_files(folder: Path) -> None:
    """Raise ModelError for tokenizer files that are implausibly large or refer to files outside their folder."""
    for name, limit in _FILES.items():
        file = folder / name
        if not is_file(file):
            continue
        with wrap_errors("no tokenizer", _REMEDY, says=f"can be loaded from {file}"):
            content = read_bounded(file, limit)
            values = json.loads(content) if file.suffix == ".json" else {}
        check_plain(values, str(file), bits=LARGE_INT_BITS)
        for key in ("tokenizer_file", "vocab_file", "merges_file") if name == "tokenizer_config.json" else ():
            named = values.get(key) if isinstance(values, dict) else None
            if named is not None:  # transformers would read that file instead of the folder's own
                raise ModelError(f"{file}: {key} is {short_repr(named)}, a file of another folder; take the key out.")


def _rank_merges(model: BPE, pieces: SentencePieceProcessor) -> BPE:
    """Return ``model`` with the merges that SentencePiece derives from these pieces, best score first."""
    from tokenizers.models import BPE

    vocab = {pieces.IdToPiece(token): token for token in range(pieces.GetPieceSize())}
    # Among equal scores SentencePiece takes the leftmost pair, which lengthens the left half first.
    ranked = [
        (-pieces.GetScore(token), -cut, piece[:cut], piece[cut:])
        for piece, token in vocab.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    return BPE(
        vocab=vocab,
        merges=merges,
        unk_token=model.unk_token,
        fuse_unk=model.fuse_unk,
        byte_fallback=model.byte_fallback,
    )


def _find_pieces(tokenizer: PreTrainedTokenizerBase) -> SentencePieceProcessor | None:
    from sentencepiece import SentencePieceProcessor

    file = Path(tokenizer.init_kwargs.get("vocab_file") or "")
    if file.suffix != ".model" or file.with_name("tokenizer.json").exists():
        return None  # tokenizer.json takes precedence over the model file and stores its merges in order
    pieces = SentencePieceProcessor()
    try:
        pieces.Load(str(file))
    except RuntimeError:
        return None  # a tiktoken file under the same name (Llama 3's original release): its ranks are its merges
    return pieces
