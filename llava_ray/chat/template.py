"""Conversation templates: fixed strings around turns, or a tokenizer's own Jinja."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn, break_markers
from llava_ray.errors import TemplateError

if TYPE_CHECKING:  # Ray's own processes import this module
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Template:
    """The properties that every template has.

    ``stop`` is the text that ends an answer; ``image_tags`` are written on either side of an image marker;
    ``add_bos`` is whether the tokenizer's beginning-of-sequence token goes before the rendered text.
    """

    name: str = ""
    stop: str
    image_tags: tuple[str, str] = ("", "")
    add_bos: bool = True

    @property
    def frame(self) -> tuple[str, ...]:
        """Return what it writes itself around messages."""
        return self.image_tags

    def with_system(self, system: str) -> Template:
        """Return this template with another system prompt, which cannot contain an image.

        Raises TemplateError where it has none.
        """
        raise TemplateError(
            f"template {self.name!r} has no place for a system prompt; leave it out, or put it into the first question."
        )


@dataclass(frozen=True, kw_only=True)
class StringTemplate(Template):
    """A template made of fixed strings, in the places that the docstring of ``templates`` shows.

    ``examples`` are (question, answer) pairs written before the conversation and never supervised.
    With ``only_images`` a question is reduced to its image markers (stage-1 captions).
    """

    opening: str
    question: str
    question_end: str
    cue: str
    lead: str
    end: str
    examples: tuple[tuple[str, str], ...] = ()
    only_images: bool = False
    system: str = ""
    """The system prompt within ``opening``."""
    # Named so in the ``repr`` that keys stored token lengths: another name would have all data tokenised again.
    said: tuple[int, int] = (0, 0)
    """The range in ``opening`` of a system prompt that replaced the table's own."""

    @property
    def frame(self) -> tuple[str, ...]:
        """Return what it writes itself around messages."""
        start, stop = self.said
        opening = (self.opening[:start], self.opening[stop:])
        return (*opening, self.question, self.question_end, self.cue, self.end, *self.image_tags)

    def with_system(self, system: str) -> Template:
        """Return this template with another system prompt. Raises TemplateError where it has none."""
        if not self.system:
            return super().with_system(system)
        start = self.said[0] if any(self.said) else self.opening.index(self.system)
        before, after = self.opening[:start], self.opening[start + len(self.system) :]
        system = break_markers(system)
        return replace(self, opening=before + system + after, system=system, said=(start, start + len(system)))


@dataclass(frozen=True, kw_only=True)
class JinjaTemplate(Template):
    """The Jinja chat template of a tokenizer. It writes its own beginning-of-sequence token.

    ``end`` matches any added token of the vocabulary, one of which must end each answer, and spaces before it.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)
    end: re.Pattern[str]
    system: str | None = None
    """A system message before the conversation; None for the Jinja text's own default."""
    around: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """The texts that the Jinja template writes around questions and answers."""

    @property
    def frame(self) -> tuple[str, ...]:
        """Return what it writes itself around messages."""
        return (*self.around, *self.image_tags)

    def with_system(self, system: str) -> Template:
        """Return this template with a system message, which its Jinja text may reject when it is rendered."""
        return replace(self, system=break_markers(system))


@dataclass(frozen=True)
class Conversation:
    """A template and the turns so far; ``ask`` and ``answer`` return a longer conversation."""

    template: Template
    turns: tuple[Turn, ...] = ()

    def ask(self, question: str) -> Conversation:
        """Return this conversation with a question at its end."""
        return replace(self, turns=(*self.turns, Turn("human", question)))

    def answer(self, answer: str) -> Conversation:
        """Return this conversation with an answer at its end."""
        return replace(self, turns=(*self.turns, Turn("gpt", answer)))

    @property
    def num_images(self) -> int:
        """Count the image markers of all turns."""
        return sum(turn.value.count(IMAGE_TOKEN) for turn in self.turns)
