"""A record made ready to learn from: expanded ids, labels and the images that stayed.

Knows tokens, not pixels: how many tokens an image takes is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Int32

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, Turn
from llava_ray.chat.templates import Template
from llava_ray.chat.tokens import TokenizedConversation, expand_images, tokenize_conversation
from llava_ray.errors import RecordError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """One sample as the model sees it; t tokens, image positions hold -200."""

    input_ids: Int32[np.ndarray, " t"]
    labels: Int32[np.ndarray, " t"]
    images: tuple[int, ...]
    """Which of the record's images are in it, in order."""
    truncated: bool = False

    @property
    def num_supervised(self) -> int:
        """Count the tokens that are learnt. The first is never a target: nothing precedes it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE_INDEX))


@dataclass(frozen=True)
class Encoder:
    """How conversations become examples in one run."""

    tokenizer: "PreTrainedTokenizerBase"
    template: Template
    num_image_tokens: int
    model_max_length: int
    on_too_long: Literal["truncate", "split", "reject"] = "truncate"

    def encode(self, turns: Sequence[Turn], num_images: int) -> list[Example]:
        """Return the record's examples: one, or several when a long one is split at its turns.

        Raises RecordError: "image_count", "nothing_to_learn", or "too_long" where cutting is not allowed.
        """
        whole = self.example(turns, range(num_images))
        if len(whole.input_ids) <= self.model_max_length:
            examples = [whole]
        elif self.on_too_long == "truncate":
            examples = [self.truncated(whole)]
        elif self.on_too_long == "split":
            examples = self.split(turns)
        else:
            raise self.too_long(len(whole.input_ids), 'or set data.on_too_long to "truncate" or "split"')
        if not all(example.num_supervised for example in examples):
            raise RecordError(
                f"nothing to learn: no answer token is left within model_max_length = {self.model_max_length}; "
                "raise it, or drop the sample",
                reason="nothing_to_learn",
            )
        return examples

    def example(self, turns: Sequence[Turn], images: Sequence[int]) -> Example:
        """Tokenise turns that show the record's ``images``, each marker expanded to its patch tokens."""
        tokenized: TokenizedConversation = tokenize_conversation(turns, self.template, self.tokenizer)
        ids, labels = expand_images(tokenized.input_ids, tokenized.labels, [self.num_image_tokens] * len(images))
        return Example(np.asarray(ids, np.int32), np.asarray(labels, np.int32), tuple(images))

    def truncated(self, example: Example) -> Example:
        """Cut at the right like the original, but never inside an image: an image that does not fit goes whole."""
        end = self.model_max_length
        starts = np.flatnonzero(example.input_ids == IMAGE_TOKEN_INDEX)[:: self.num_image_tokens]
        for start in starts:
            if start < end < start + self.num_image_tokens:
                end = int(start)
        kept = int(np.count_nonzero(starts < end))
        return Example(example.input_ids[:end], example.labels[:end], example.images[:kept], truncated=True)

    def split(self, turns: Sequence[Turn]) -> list[Example]:
        """Cut between exchanges into as few examples as fit; each later one shows the images seen before it again."""
        exchanges = [tuple(turns[i : i + 2]) for i in range(0, len(turns), 2)]
        examples: list[Example] = []
        chunk: tuple[Turn, ...] = ()
        seen: list[int] = []  # images of the chunk, those carried over included
        next_image = 0
        for exchange in exchanges:
            new = list(range(next_image, next_image + sum(turn.value.count(IMAGE_TOKEN) for turn in exchange)))
            next_image += len(new)
            if chunk and len(self.example(chunk + exchange, seen + new).input_ids) > self.model_max_length:
                examples.append(self.example(chunk, seen))
                chunk = (Turn("human", f"{IMAGE_TOKEN}\n" * len(seen) + exchange[0].value), *exchange[1:])
            else:
                chunk += exchange
            seen += new
        examples.append(self.example(chunk, seen))
        for example in examples:
            if len(example.input_ids) > self.model_max_length:
                raise self.too_long(len(example.input_ids), "even one question and answer does not fit")
        return examples

    def too_long(self, num_tokens: int, remedy: str) -> RecordError:
        """Say that a sample exceeds the limit."""
        return RecordError(
            f"{num_tokens} tokens, over model_max_length = {self.model_max_length}; "
            f"raise it, drop the sample, {remedy}",
            reason="too_long",
        )
