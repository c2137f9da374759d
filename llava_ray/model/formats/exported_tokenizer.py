"""Export of a model's tokenizer for the published layouts, with or without the hub's ``<image>``."""

import contextlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AddedToken, PreTrainedTokenizerBase

from llava_ray.chat.conversation import IMAGE_TOKEN, IMAGE_TOKEN_INDEX, Turn
from llava_ray.chat.jinja import write_jinja
from llava_ray.chat.template import StringTemplate, Template
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.errors import ModelError, RecordError

SENTENCEPIECE_FILE = "tokenizer.model"  # the only file that the original's slow tokenizer reads
# Settings of transformers 5 that older versions fail on.
_NEW_KEYS = ("backend", "is_local", "local_files_only", "add_prefix_space", "processor_class")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

_PROBES: tuple[tuple[Turn, ...], ...] = (
    (Turn("human", "<image>\nWhat is it?"),),
    (Turn("human", "What is  it?"), Turn("gpt", "A cat."), Turn("human", "Really?")),
    (Turn("human", "<image>"), Turn("gpt", "No."), Turn("human", "<image>\n一?")),
)


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, source: Path, folder: Path, *, num_rows: int, template_inside: bool = False
) -> None:
    """Write a tokenizer that old and new versions of transformers read; ids from ``num_rows`` on are dropped.

    ``source`` is where it was loaded from: its SentencePiece file, if it has one, is copied. ``template_inside`` writes
    the chat template into its settings as well, where old versions expect it.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    whole: dict[str, Any] = json.loads(file.read_text())
    dropped = {token["content"] for token in whole["added_tokens"] if token["id"] >= num_rows}
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["id"] < num_rows]
    file.write_text(json.dumps(whole, ensure_ascii=False, indent=2))
    settings_file = folder / "tokenizer_config.json"
    settings = _older(json.loads(settings_file.read_text()), dropped, tokenizer)
    if template_inside:
        settings["chat_template"] = tokenizer.chat_template
    settings_file.write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n")
    if (source / SENTENCEPIECE_FILE).is_file():
        shutil.copyfile(source / SENTENCEPIECE_FILE, folder / SENTENCEPIECE_FILE)


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the hub's ``<image>`` to the tokenizer if needed, and return its id."""
    untyped: Any = tokenizer
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        untyped.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    return int(untyped.convert_tokens_to_ids(IMAGE_TOKEN))


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of vocabulary rows that the tokenizer's ids need."""
    return max(tokenizer.get_vocab().values()) + 1


def check_image_token(token: int, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError if ``<image>`` is not one token of this tokenizer."""
    if tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False) != [token]:
        raise ModelError(
            f"tokenizer: {IMAGE_TOKEN} is not encoded as one token (id {token}); expected a tokenizer that splits off "
            "added tokens, as every fast one does."
        )


def write_template(
    template: Template, plain: PreTrainedTokenizerBase, hub: PreTrainedTokenizerBase, image_token: int
) -> tuple[str, str | None]:
    """Return a Jinja template with which ``hub`` produces the ids of training, and a note if none does exactly.

    ``plain`` is the tokenizer of training. Candidates are tested on a few conversations, because tokenizers differ in
    how they encode the text after a special token.
    """
    expected = _expected(template, plain, image_token)
    if isinstance(template, StringTemplate):
        bos = template.add_bos and expected[0][1][:1] == [plain.bos_token_id]
        candidates = [write_jinja(template, bos=bos, joint=joint) for joint in ("", " ")]
    else:
        candidates = [str(plain.chat_template)]
    differing = [_differences(candidate, hub, expected) for candidate in candidates]
    best = min(range(len(candidates)), key=lambda index: len(differing[index]))
    if not differing[best]:
        return candidates[best], None
    found, wanted = map(hub.convert_ids_to_tokens, differing[best][0])
    return candidates[best], (
        f"chat template: transformers splits {len(differing[best])} of {len(expected)} test conversations "
        f"otherwise than training did, first into {found}, expected {wanted}; "
        "answers may differ a little from llava_ray's own."
    )


def _expected(
    template: Template, tokenizer: PreTrainedTokenizerBase, image_token: int
) -> list[tuple[tuple[Turn, ...], list[int]]]:
    """Return the test conversations that the template can render, with their ids in training."""
    pairs = []
    for turns in _PROBES:
        with contextlib.suppress(RecordError):  # caption templates render only one exchange
            ids = tokenize_prompt(turns, template, tokenizer)
            pairs.append((turns, [image_token if token == IMAGE_TOKEN_INDEX else token for token in ids]))
    return pairs


def _differences(
    jinja: str, tokenizer: PreTrainedTokenizerBase, expected: Sequence[tuple[tuple[Turn, ...], list[int]]]
) -> list[tuple[list[int], list[int]]]:
    words = {"human": "user", "gpt": "assistant"}
    pairs = []
    for turns, wanted in expected:
        messages = [{"role": words[turn.role], "content": turn.value} for turn in turns]
        untyped: Any = tokenizer
        text = untyped.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=True)
        found = untyped(text, add_special_tokens=False)["input_ids"]
        if found != wanted:
            pairs.append((found, wanted))
    return pairs


def _older(settings: dict[str, Any], dropped: set[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    values = {key: value for key, value in settings.items() if key not in _NEW_KEYS}
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in _NAMED_TOKENS:
        if key in values and _content(values[key]) in dropped:
            del values[key]
    values.setdefault("pad_token", tokenizer.unk_token or tokenizer.eos_token)
    if isinstance(values.get("extra_special_tokens"), list):  # older versions expect a dict with names
        named = {_content(values[key]) for key in _NAMED_TOKENS if key in values}
        extra = [token for token in values.pop("extra_special_tokens") if _content(token) not in named | dropped]
        if extra:
            values["additional_special_tokens"] = extra
    if "added_tokens_decoder" in values:
        decoder: dict[str, Any] = values["added_tokens_decoder"]
        values["added_tokens_decoder"] = {key: t for key, t in decoder.items() if _content(t) not in dropped}
    return values


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
