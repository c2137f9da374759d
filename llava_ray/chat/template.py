"""What a conversation template is: fixed strings around turns, or a tokenizer's own Jinja."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn, break_markers
from llava_ray.errors import TemplateError


@dataclass(frozen=True, kw_only=True)
class Template:
    """What every template says about itself.

    ``stop`` is the text an answer ends with; ``image_tags`` stand on either side of an image marker;
    ``add_bos`` is whether the tokenizer's beginning-of-sequence token goes in front of the written text.
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
        """Return this template with another system prompt, in which no image can stand.

        Raises TemplateError where it has none.
        """
        raise TemplateError(
            f"template {self.name!r} has no place for a system prompt; leave it out, or put it into the first question."
        )


@dataclass(frozen=True, kw_only=True)
class StringTemplate(Template):
    """A template made of fixed strings, in the places that the module's docstring draws.

    ``examples`` are (question, answer) pairs written before the conversation and never learnt from.
    With ``only_images`` nothing of a question is written but its image markers (stage-1 captions).
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
    said: tuple[int, int] = (0, 0)
    """Where in ``opening`` a system prompt stands that is not the table's own."""

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
    """The Jinja chat template that travels with a tokenizer. It writes its own beginning-of-sequence token.

    ``end`` matches any added token of the vocabulary, one of which must end each answer, and spaces before it.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)
    end: re.Pattern[str]
    system: str | None = None
    """A system message in front of the conversation; None for what the Jinja text does by itself."""
    around: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """What the Jinja text writes around questions and answers."""

    @property
    def frame(self) -> tuple[str, ...]:
        """Return what it writes itself around messages."""
        return (*self.around, *self.image_tags)

    def with_system(self, system: str) -> Template:
        """Return this template with a system message, which its Jinja text may refuse when it is rendered."""
        return replace(self, system=break_markers(system))


@dataclass(frozen=True)
class Conversation:
    """A template and the turns so far; asking and answering return a longer conversation."""

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
