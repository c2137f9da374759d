"""Token ids and labels of a rendered conversation, computed in one pass.

The text between two images is tokenised once as a whole, so the ids are those of the plain prompt. The tokenizer's
offsets give the characters of each token, and a token is supervised if its last character is. Nothing is split on
separators and no prefix is tokenised again to count it (as the original does), so no text can shift the mask.

Messages cannot forge control tokens: ``</s>`` or ``<|im_end|>`` in a question, answer or system prompt is encoded as
ordinary text, so no message can end its turn and begin another. Only the template's own are control tokens (see
`controls`). Separators for which a tokenizer has no token (``USER:``, ``###``, or ``<|im_end|>`` in Llama's vocabulary)
are text wherever they occur, and cannot be distinguished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_ray.chat.controls import find_controls
from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, Span, Turn
from llava_ray.chat.encoding import EncodedText, without_forged
from llava_ray.chat.prompt_ends import PromptEnd, render_to_end
from llava_ray.chat.rendering import place_images, render_spans
from llava_ray.chat.tool_templates import with_tool_frame
from llava_ray.errors import ConfigError, RecordError, TemplateError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from llava_ray.chat.template import Template


@dataclass(frozen=True)
class TokenizedConversation:
    """Ids with one -200 for each image, and labels of the same length with -100 where nothing is supervised."""

    input_ids: list[int]
    labels: list[int]

    @property
    def num_supervised(self) -> int:
        """Count the supervised tokens."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    @property
    def num_images(self) -> int:
        """Count the images."""
        return self.input_ids.count(IMAGE_TOKEN_INDEX)


def tokenize_conversation(
    turns: Sequence[Turn], template: Template, tokenizer: PreTrainedTokenizerBase
) -> TokenizedConversation:
    """Return the ids and labels of these turns for training. Raises RecordError or TemplateError."""
    template = with_tool_frame(template, turns)
    spans = render_spans(place_images(turns, template), template)
    return tokenize_spans(spans, tokenizer, add_bos=template.add_bos, template=template)


def tokenize_prompt(
    turns: Sequence[Turn], template: Template, tokenizer: PreTrainedTokenizerBase, *, end: PromptEnd = "open"
) -> list[int]:
    """Return the ids of a prompt for generation: the same tokens that precede an answer in training.

    ``end`` is where the prompt ends: where an answer begins, or as `prompt_ends.render_to_end` says.
    """
    template = with_tool_frame(template, turns)
    spans = render_to_end(place_images(turns, template), template, end)
    return tokenize_spans(spans, tokenizer, add_bos=template.add_bos, template=template).input_ids


def tokenize_question(
    system: str | None, turns: Sequence[Turn], template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the ids of `tokenize_prompt` with a record's own system prompt; None keeps the template's.

    Raises TemplateError for a template without a system prompt.
    """
    return tokenize_prompt(turns, template if system is None else template.with_system(system), tokenizer)


def tokenize_spans(
    spans: Sequence[Span],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_bos: bool = True,
    template: Template | None = None,
) -> TokenizedConversation:
    """Tokenise the joined text once, and label the tokens that end inside a supervised span.

    A beginning-of-sequence token comes first if the tokenizer adds one, ``add_bos`` allows it and the template writes
    none. Raises what `encode_spans` does.
    """
    is_supervised = b"".join((b"\1" if span.supervised else b"\0") * len(span.text) for span in spans)
    input_ids: list[int] = []
    labels: list[int] = []
    for chunk in encode_spans(spans, tokenizer, template):
        # A chunk that does not begin the text follows an image, which stays one -200 until its size is known.
        if chunk.start:
            input_ids.append(IMAGE_TOKEN_INDEX)
            labels.append(IGNORE_INDEX)
        elif add_bos and not _writes_bos(spans, tokenizer):
            input_ids = _find_bos(tokenizer)
            labels = [IGNORE_INDEX] * len(input_ids)
        input_ids += chunk.ids
        start = chunk.start
        # A token of no characters (the prefix space before a chunk) takes the label of the character after it.
        labels += [
            token if is_supervised[start + (last - 1 if last > first else first)] else IGNORE_INDEX
            for token, (first, last) in zip(chunk.ids, chunk.offsets, strict=True)
        ]
    return TokenizedConversation(input_ids, labels)


def encode_spans(
    spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase, template: Template | None = None
) -> list[EncodedText]:
    """Encode the texts before, between and after the images, treating control tokens in messages as plain text.

    Raises TemplateError if the tokenizer gives no character offsets, RecordError ("control_tokens") if it cannot
    distinguish a message's control tokens from the template's.
    """
    if not tokenizer.is_fast:
        raise TemplateError(
            f"{type(tokenizer).__name__} gives no character offsets, from which the mask is computed. "
            "Load it with AutoTokenizer.from_pretrained(..., use_fast=True), or convert it to a tokenizer.json."
        )
    text = "".join(span.text for span in spans)
    owners = _find_owners(spans)
    starts, texts = _split_images(text, owners)
    encoded = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    chunks = list(map(EncodedText, starts, texts, encoded["input_ids"], encoded["offset_mapping"]))
    if not any(owners):
        return chunks
    controls = find_controls(tokenizer, template)
    return [without_forged(chunk, owners[chunk.start : chunk.start + len(chunk.text)], controls) for chunk in chunks]


def _find_owners(spans: Sequence[Span]) -> bytes:
    """Return one byte a character: 0 for the template's, alternating 1 and 2 for those of successive messages."""
    pieces: list[bytes] = []
    number = 0
    for span in spans:
        place = 0
        for start, stop in span.message_ranges:
            pieces += [b"\0" * (start - place), (b"\1", b"\2")[number % 2] * (stop - start)]
            place, number = stop, number + 1
        pieces.append(b"\0" * (len(span.text) - place))
    return b"".join(pieces)


def _split_images(text: str, owners: bytes) -> tuple[list[int], list[str]]:
    """Split on image markers. A match that crosses the border of a message is not a marker."""
    starts, texts, place = [0], [], 0
    found = text.find(IMAGE_TOKEN)
    while found >= 0:
        end = found + len(IMAGE_TOKEN)
        if len(set(owners[found:end])) == 1:
            texts.append(text[place:found])
            starts.append(place := end)
        found = text.find(IMAGE_TOKEN, end)
    return starts, [*texts, text[place:]]


def _writes_bos(spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the template itself begins with a beginning-of-sequence token."""
    bos = tokenizer.bos_token
    if bos is None or not spans:
        return False
    start = spans[0].message_ranges[0][0] if spans[0].message_ranges else len(spans[0].text)
    return spans[0].text[:start].startswith(str(bos))


def tokenizer_image_token(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_index: int = IMAGE_TOKEN_INDEX,
    return_tensors: str | None = None,
) -> list[int] | torch.Tensor:
    """Tokenise a rendered prompt with one ``image_token_index`` for each marker; LLaVA's own function name.

    The whole prompt is trusted, template included: control tokens that it spells out are control tokens.

    Returns a list, or with ``return_tensors="pt"`` a 1-D int64 tensor. Raises ConfigError for any other value.
    """
    chunks = tokenizer(prompt.split(IMAGE_TOKEN), add_special_tokens=False, verbose=False)["input_ids"]
    ids: list[int] = _find_bos(tokenizer) + chunks[0]
    for chunk in chunks[1:]:
        ids += [image_token_index, *chunk]
    if return_tensors is None:
        return ids
    if return_tensors != "pt":
        raise ConfigError(f"return_tensors is {return_tensors!r}; expected 'pt' for a tensor, or None for a list.")
    import torch

    return torch.tensor(ids, dtype=torch.long)


def expand_images(
    input_ids: Sequence[int], labels: Sequence[int], num_image_tokens: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Repeat each -200 once for each token of its image, with labels -100.

    So every length is known before the model runs. Raises RecordError with reason ``image_count`` if markers and images
    differ in number.
    """
    num_markers = input_ids.count(IMAGE_TOKEN_INDEX)
    if num_markers != len(num_image_tokens):
        raise RecordError(
            f"the conversation has {num_markers} {IMAGE_TOKEN} markers but {len(num_image_tokens)} images; "
            "expected equal numbers. Fix the record's markers or its list of images.",
            reason="image_count",
        )
    counts = iter(num_image_tokens)
    long_ids: list[int] = []
    long_labels: list[int] = []
    for token, label in zip(input_ids, labels, strict=True):
        repeats = next(counts) if token == IMAGE_TOKEN_INDEX else 1
        long_ids += [token] * repeats
        long_labels += [IGNORE_INDEX if token == IMAGE_TOKEN_INDEX else label] * repeats
    return long_ids, long_labels


def _find_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # The tokens that the tokenizer adds to an empty text: its beginning-of-sequence token, if any. Not an
    # end-of-sequence token, which some add as well and which would end the text before the answer.
    return [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]
