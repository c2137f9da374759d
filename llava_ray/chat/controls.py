"""The control tokens of a tokenizer, and an encoding of text in which nobody can forge them.

Control tokens mark where turns, texts and images begin and end: all that the tokenizer calls special, and those of its
other added tokens that the template writes around messages. Any other added token (``<think>``, ``<box>``, a run of
spaces) is an ordinary word of the vocabulary, in messages too.

A tokenizer matches the spelling of such tokens in any text, whoever wrote it. `Controls.respelt` is the same tokenizer
with random names in place of the spellings: the template's own tokens are written by these names, and a spelling in a
message is then plain text, which neither the added tokens nor the model's own vocabulary match.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

    from llava_ray.chat.template import Template

Range = tuple[int, int]


@dataclass(frozen=True)
class Controls:
    """The control tokens of one tokenizer, for templates that write the same around messages."""

    tokenizer: Tokenizer
    spellings: Mapping[int, str]
    names: Mapping[int, str]
    """Random text for each token, which no message can contain by intent."""
    unknown: int | None
    """The unknown token, which any text may produce."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Return a pattern of all spellings, the longest first, as the tokenizer matches them."""
        return re.compile("|".join(map(re.escape, sorted(self.spellings.values(), key=len, reverse=True))) or "(?!)")

    @cached_property
    def respelt(self) -> Tokenizer:
        """Return the tokenizer with the random names in place of the spellings; all ids stay the same."""
        from tokenizers import Tokenizer

        names = {spelling: self.names[token] for token, spelling in self.spellings.items()}
        values = json.loads(self.tokenizer.to_str())
        for token in values["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        values.update(model=_rename(values["model"], names), post_processor=None, truncation=None, padding=None)
        return Tokenizer.from_str(json.dumps(values))

    def find(self, ids: Sequence[int], offsets: Sequence[Range], text: str) -> list[tuple[int, int, int]]:
        """Return id, start and stop of each control token of an encoded text, without white space that it absorbed."""
        found, known = [], self.spellings
        for index in [index for index, token in enumerate(ids) if token in known]:
            start, stop = offsets[index]
            covered = text[start:stop]
            start += len(covered) - len(covered.lstrip())
            found.append((ids[index], start, start + len(covered.strip())))
        return found


def find_controls(tokenizer: PreTrainedTokenizerBase, template: Template | None) -> Controls:
    """Return the tokenizer's control tokens under this template. Cached until tokens are added."""
    known = _VOCABULARIES.get(tokenizer)
    if known is None or known.size != len(tokenizer):
        known = _VOCABULARIES[tokenizer] = _Vocabulary(tokenizer)
    return known.controls(template.frame if template and known.words else ())


def find_control_ranges(content: str, tokenizer: PreTrainedTokenizerBase, template: Template | None) -> list[Range]:
    """Return where a text spells out control tokens."""
    controls = find_controls(tokenizer, template)
    encoded = tokenizer(content, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = controls.find(encoded["input_ids"], encoded["offset_mapping"], content)
    return [(start, stop) for _, start, stop in found if start < stop]


class _Vocabulary:
    """The special tokens and the other added tokens of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        untyped: Any = tokenizer
        added = {token: str(entry) for token, entry in untyped.added_tokens_decoder.items()}
        special = {token for token, entry in untyped.added_tokens_decoder.items() if entry.special}
        named = dict(zip(untyped.all_special_ids, untyped.all_special_tokens, strict=True))
        # A single character is never control: ordinary text needs it (some padding token is "!").
        spelt = {**{token: added[token] for token in special}, **named}
        self.special = {token: spelling for token, spelling in spelt.items() if len(spelling) > 1}
        self.words = {
            token: spelling
            for token, spelling in added.items()
            if token not in spelt and len(spelling) > 1 and not spelling.isspace()
        }
        self.size = len(tokenizer)
        self.unknown = tokenizer.unk_token_id
        self.backend: Tokenizer = untyped.backend_tokenizer
        self.known: dict[tuple[str, ...], Controls] = {}

    def controls(self, frame: tuple[str, ...]) -> Controls:
        if frame not in self.known:
            written = [token for token, spelling in self.words.items() if any(spelling in text for text in frame)]
            spellings = self.special | {token: self.words[token] for token in written}
            alike = (other for other in self.known.values() if other.spellings == spellings)
            self.known[frame] = next(alike, None) or self.named(spellings)
        return self.known[frame]

    def named(self, spellings: Mapping[int, str]) -> Controls:
        nonce = secrets.token_hex(16)
        names = {token: f"{nonce}{number:06x}" for number, token in enumerate(spellings)}
        return Controls(self.backend, spellings, names, self.unknown)


_VOCABULARIES: WeakKeyDictionary[PreTrainedTokenizerBase, _Vocabulary] = WeakKeyDictionary()


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename pieces of a tokenizer's model, and remove the merges that would produce them."""
    vocab, merges = model["vocab"], model.get("merges")
    if isinstance(vocab, dict):
        renamed: Any = {names.get(piece, piece): token for piece, token in vocab.items()}
    else:  # pieces with their scores; the index of each is its id
        renamed = [[names.get(piece, piece), score] for piece, score in vocab]
    model = {**model, "vocab": renamed}
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if merges is not None:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if not names.keys() & {left, right, left + right, left + right.removeprefix(prefix)}
        ]
    return model
