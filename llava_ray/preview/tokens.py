"""The text of a conversation split into tokens for display."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, Turn
from llava_ray.chat.rendering import place_images, render_spans
from llava_ray.chat.tokens import encode_spans, tokenize_conversation
from llava_ray.chat.tool_templates import with_tool_frame
from llava_ray.data.examples import Encoder, Example, image_starts
from llava_ray.report.pieces import ReportToken


def collapse_images(example: Example) -> tuple[list[int], list[int]]:
    """Return ids and labels with a single -200 for each image."""
    kept = example.input_ids != IMAGE_TOKEN_INDEX
    kept[image_starts(example)] = True
    return example.input_ids[kept].tolist(), example.labels[kept].tolist()


def split_tokens(turns: Sequence[Turn], encoder: Encoder) -> list[ReportToken]:
    """Return one token per id of the whole conversation; their joined texts are the rendered prompt.

    Of tokens that share a character (the bytes of an emoji) the first has it, so the text of others is empty. A
    beginning-of-sequence token comes before the prompt.
    """
    encoder, turns = encoder.for_record(turns)
    template, tokenizer = with_tool_frame(encoder.template, turns), encoder.tokenizer
    tokenized = tokenize_conversation(turns, template, tokenizer)
    pieces: list[str] = []
    for chunk in encode_spans(render_spans(place_images(turns, template), template), tokenizer, template):
        ends = np.maximum.accumulate([0, *(last for _, last in chunk.offsets)]).tolist()
        ends[-1] = len(chunk.text)  # characters of no token belong to the one before
        pieces += [IMAGE_TOKEN] if chunk.start else []
        pieces += [chunk.text[start:end] for start, end in pairwise(ends)]
    num_added = len(tokenized.input_ids) - len(pieces)
    pieces = [str(tokenizer.convert_ids_to_tokens(token)) for token in tokenized.input_ids[:num_added]] + pieces
    return [
        ReportToken(piece, "image" if token == IMAGE_TOKEN_INDEX else "learnt" if label != IGNORE_INDEX else "context")
        for piece, token, label in zip(pieces, tokenized.input_ids, tokenized.labels, strict=True)
    ]


def join_tokens(tokens: Sequence[ReportToken]) -> list[ReportToken]:
    """Join adjacent unsupervised tokens; drop tokens without text."""
    joined: list[ReportToken] = []
    for token in tokens:
        if joined and token.kind == joined[-1].kind and token.kind in ("context", "cut"):
            joined[-1] = ReportToken(joined[-1].text + token.text, token.kind)
        elif token.text:
            joined.append(token)
    return joined
