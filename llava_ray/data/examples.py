"""Training examples built from records: expanded ids, labels and the remaining images.

Works on tokens, not pixels: the number of tokens of an image follows from its size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Int32, Int64

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, Turn, split_system
from llava_ray.chat.template import Template
from llava_ray.chat.tokens import TokenizedConversation, expand_images, tokenize_conversation
from llava_ray.data.pair_lengths import PairLengths
from llava_ray.errors import RecordError, TemplateError
from llava_ray.images.anyres import Size
from llava_ray.images.tokens import ImageTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """One sample in the form that the model takes; t tokens, image positions hold -200."""

    input_ids: Int32[np.ndarray, " t"]
    labels: Int32[np.ndarray, " t"]
    images: tuple[int, ...]
    """The indices of the record's images that it contains, in order."""
    image_tokens: tuple[int, ...] = ()
    """The number of positions of each of them."""
    truncated: bool = False
    pair: PairLengths | None = None
    """Of a preference; its two sides are one sample, which no row or rank divides."""

    @property
    def num_chosen(self) -> int:
        """Count the supervised tokens of a preference's chosen answer; 0 for a conversation."""
        end = self.pair.shared + self.pair.chosen if self.pair else 0
        return int(np.count_nonzero(self.labels[1:end] != IGNORE_INDEX))

    @property
    def num_supervised(self) -> int:
        """Count the supervised tokens. The first is never a target: nothing precedes it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE_INDEX))


@dataclass(frozen=True)
class Encoder:
    """The encoder of conversations to examples in one run."""

    tokenizer: "PreTrainedTokenizerBase"
    template: Template
    image_tokens: ImageTokens
    model_max_length: int
    on_too_long: Literal["truncate", "split", "reject"] = "truncate"

    def encode(self, turns: Sequence[Turn], image_sizes: Sequence[Size]) -> list[Example]:
        """Return the record's examples: one, or several when a long one is split at its turns.

        ``image_sizes`` are the (width, height) of its images in pixels. Raises RecordError: "image_count",
        "image_too_long" for an image that would not fit alone, "nothing_to_learn", "system_prompt" where the template
        has no system prompt but the record does, or "too_long" where truncation is not allowed.
        """
        encoder, spoken = self.for_record(turns)
        return encoder.encode_spoken(spoken, image_sizes)

    def for_record(self, turns: Sequence[Turn]) -> tuple["Encoder", Sequence[Turn]]:
        """Return an encoder whose template has the turns' system prompt, and the turns after it."""
        system, spoken = split_system(turns)
        if system is None:
            return self, spoken
        try:
            return replace(self, template=self.template.with_system(system)), spoken
        except TemplateError as error:
            raise RecordError(str(error), reason="system_prompt") from error

    def encode_spoken(self, turns: Sequence[Turn], image_sizes: Sequence[Size]) -> list[Example]:
        """Return the examples of turns without a system turn."""
        counts = [self.image_tokens.count(*size) for size in image_sizes]
        self.check_images(counts, image_sizes)
        whole = self.example(turns, range(len(counts)), counts)
        if not whole.num_supervised:
            raise unsupervised_error(turns)
        if len(whole.input_ids) <= self.model_max_length:
            examples = [whole]
        elif self.on_too_long == "truncate":
            examples = [self.truncated(whole)]
        elif self.on_too_long == "split":
            examples = self.split(turns, counts)
            if not all(turn.supervised for turn in turns):  # a part may then hold no supervised answer: drop it
                examples = [example for example in examples if example.num_supervised]
        else:
            raise self.too_long(len(whole.input_ids), 'or set data.on_too_long to "truncate" or "split"')
        if not all(example.num_supervised for example in examples):
            raise RecordError(
                f"nothing to learn: no answer token is left within model_max_length = {self.model_max_length}; "
                "raise it, or drop the sample",
                reason="nothing_to_learn",
            )
        return examples

    def check_images(self, counts: Sequence[int], image_sizes: Sequence[Size]) -> None:
        """Raise RecordError for an image that alone exceeds the length limit."""
        for number, (count, (width, height)) in enumerate(zip(counts, image_sizes, strict=True), start=1):
            if count > self.model_max_length:
                raise RecordError(
                    f"image {number} of {len(counts)} ({width} x {height} pixels) alone takes {count} tokens, over "
                    f"model_max_length = {self.model_max_length}; raise it, choose smaller image_grid_pinpoints, or "
                    "drop the sample",
                    reason="image_too_long",
                )

    def example(self, turns: Sequence[Turn], images: Sequence[int], counts: Sequence[int]) -> Example:
        """Tokenise turns with these ``images`` of the record, markers expanded; ``counts`` has tokens per image."""
        tokenized: TokenizedConversation = tokenize_conversation(turns, self.template, self.tokenizer)
        lengths = tuple(counts[image] for image in images)
        ids, labels = expand_images(tokenized.input_ids, tokenized.labels, lengths)
        return Example(np.asarray(ids, np.int32), np.asarray(labels, np.int32), tuple(images), lengths)

    def truncated(self, example: Example) -> Example:
        """Truncate at the right like the original, but never inside an image: one that does not fit is dropped."""
        end = self.model_max_length
        starts = image_starts(example)
        for start, count in zip(starts.tolist(), example.image_tokens, strict=True):
            # Half of an image's features would be misread as those of a smaller image.
            if start < end < start + count:
                end = start
        num_images = int(np.count_nonzero(starts < end))
        return Example(
            example.input_ids[:end],
            example.labels[:end],
            example.images[:num_images],
            example.image_tokens[:num_images],
            truncated=True,
        )

    def split(self, turns: Sequence[Turn], counts: Sequence[int]) -> list[Example]:
        """Split between exchanges into as few examples as possible; later ones repeat the images of earlier turns."""
        starts = [index for index, turn in enumerate(turns) if turn.role == "human"]
        exchanges = [tuple(turns[start:stop]) for start, stop in pairwise([*starts, len(turns)])]
        examples: list[Example] = []
        chunk: tuple[Turn, ...] = ()
        seen: list[int] = []  # images of the chunk, repeated ones included
        next_image = 0
        for exchange in exchanges:
            new = list(range(next_image, next_image + sum(turn.value.count(IMAGE_TOKEN) for turn in exchange)))
            next_image += len(new)
            if chunk and len(self.example(chunk + exchange, seen + new, counts).input_ids) > self.model_max_length:
                examples.append(self.example(chunk, seen, counts))
                # Later questions refer to earlier images, so each part must show them again.
                shown = f"{IMAGE_TOKEN}\n" * len(seen) + exchange[0].value
                chunk = (replace(exchange[0], value=shown, tools=turns[0].tools), *exchange[1:])
            else:
                chunk += exchange
            seen += new
        examples.append(self.example(chunk, seen, counts))
        for example in examples:
            if len(example.input_ids) > self.model_max_length:
                raise self.too_long(len(example.input_ids), "even one question and answer does not fit")
        return examples

    def too_long(self, num_tokens: int, remedy: str) -> RecordError:
        """Build the error for a sample over the length limit."""
        return RecordError(
            f"{num_tokens} tokens, over model_max_length = {self.model_max_length}; "
            f"raise it, drop the sample, {remedy}",
            reason="too_long",
        )


def unsupervised_error(turns: Sequence[Turn]) -> RecordError:
    """Build the error for a record without a supervised turn."""
    num_answers = sum(turn.role == "gpt" for turn in turns)
    what = (
        f"none of its {num_answers} answer(s) is supervised (weight, loss or train is 0 or false)"
        if num_answers
        else "the record has no answer, only a question: expected a gpt turn after it"
    )
    return RecordError(f"nothing to learn: {what}. Fix or remove the record", reason="nothing_to_learn")


def image_starts(example: Example) -> Int64[np.ndarray, " k"]:
    """Return the position of each image's first token."""
    places = np.flatnonzero(example.input_ids == IMAGE_TOKEN_INDEX)
    return places[np.cumsum((0, *example.image_tokens))[:-1]]
