"""A tokenizer as the keys of a GGUF file: byte-level BPE by its known ways of splitting, and SentencePiece's BPE."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_ray.errors import ModelError
from llava_ray.model.formats.export_folder import load_own_tokenizer
from llava_ray.model.formats.gguf.files import import_gguf
from llava_ray.model.formats.model_files import ModelFiles

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
_BYTE = "<0x{:02X}>"


@dataclass(frozen=True)
class GgufVocabulary:
    """The keys of a tokenizer."""

    model: str
    """llama.cpp's name of its kind."""
    split: str
    """llama.cpp's name of how text is split before merges apply."""
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    special: Mapping[str, int]
    """Ids of the special tokens by gguf's names."""
    adds_begin: bool
    adds_space: bool
    chat_template: str | None

    def write(self, writer: Any) -> None:
        """Write the keys."""
        writer.add_vocab_size(len(self.tokens))
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        if self.scores:
            writer.add_token_scores(list(self.scores))
            writer.add_add_space_prefix(self.adds_space)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.adds_begin)
        writer.add_add_eos_token(False)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def find_vocabulary(model: ModelFiles, *, num_rows: int) -> GgufVocabulary:
    """Return the vocabulary of a model, with a token for each of its rows. Raises ModelError for an unknown kind."""
    tokenizer: Any = load_own_tokenizer(model)
    if not getattr(tokenizer, "is_fast", False):
        raise _unread(f"{type(tokenizer).__name__} has no tokenizer.json")
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary: dict[str, int] = whole["model"]["vocab"] if whole["model"]["type"] == "BPE" else {}
    if not vocabulary:
        raise _unread(f"it is of the kind {whole['model']['type']}, and exported is BPE")
    by_bytes = not whole["model"].get("byte_fallback")
    split = _find_split(whole) if by_bytes else "default"
    added = {token["id"]: token for token in whole["added_tokens"] if token["id"] < num_rows}
    tokens, types = _list_tokens(vocabulary, added, num_rows)
    merges = [one if isinstance(one, str) else " ".join(one) for one in whole["model"]["merges"]]
    special = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    begin = tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [tokenizer.bos_token_id]
    return GgufVocabulary(
        model="gpt2" if by_bytes else "llama",
        split=split,
        tokens=tokens,
        types=types,
        merges=merges if by_bytes else (),
        scores=() if by_bytes else _score(whole["model"], tokens),
        special={name: int(token) for name, token in special.items() if token is not None and token < num_rows},
        adds_begin=begin,
        adds_space=not by_bytes and tokenizer.tokenize("a")[0].startswith("▁"),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _list_tokens(
    vocabulary: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], num_rows: int
) -> tuple[list[str], list[int]]:
    """Return the text and gguf's type of each row's token; rows without one are unused."""
    kinds = import_gguf().TokenType
    by_id = {token: text for text, token in vocabulary.items()}
    bytes_of = {_BYTE.format(value) for value in range(256)}
    tokens, types = [], []
    for row in range(num_rows):
        if row in added:
            text = added[row]["content"]
            kind = kinds.CONTROL if added[row]["special"] else kinds.USER_DEFINED
        elif row in by_id:
            text = by_id[row]
            kind = kinds.BYTE if text in bytes_of else kinds.NORMAL
        else:
            text, kind = f"[PAD{row}]", kinds.UNUSED
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _find_split(whole: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a byte-level tokenizer's splitting of text. Raises ModelError for an unknown one."""
    given = whole.get("pre_tokenizer") or {}
    steps = given.get("pretokenizers", [given])
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    if kinds[-1:] != ["ByteLevel"] or last.get("add_prefix_space"):
        raise _unread(f"it splits text by {kinds or 'nothing'}, which llama.cpp has no name for")
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    named = {_QWEN2_SPLIT: "qwen2", _LLAMA3_SPLIT: "llama-bpe"}.get(pattern or "")
    if named is None or last.get("use_regex", True):
        raise _unread(f"it splits text by {kinds} {pattern or ''}, which llama.cpp has no name for")
    return named


def _score(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Return the scores by which llama.cpp chooses merges: SentencePiece numbers tokens as they were merged.

    Raises ModelError where the order of ids is not that of the merges.
    """
    ids = {text: place for place, text in enumerate(tokens)}
    pairs = (one.split(" ", 1) if isinstance(one, str) else one for one in model["merges"])
    merged = list(dict.fromkeys(ids["".join(pair)] for pair in pairs if "".join(pair) in ids))
    if merged != sorted(merged):
        raise _unread("its tokens are not numbered in the order of its merges, and llama.cpp goes by that")
    first = merged[0] if merged else len(tokens)
    return [0.0 if place < first else float(first - place) for place in range(len(tokens))]


def _unread(why: str) -> ModelError:
    return ModelError(f"tokenizer: llama.cpp cannot read this one: {why}. Keep the bundle, or export it as hub.")
