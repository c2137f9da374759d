"""The start of an answer: what is written before its text, and how it is decoded, as what restricts it requires."""

from collections.abc import Callable, Sequence
from typing import Protocol

from llava_ray.chat.template import StringTemplate, Template
from llava_ray.generate.answer_text import AnswerText
from llava_ray.generate.constraints.answer_grammar import AnswerGrammar
from llava_ray.generate.engine import Constraint, GenerationRequest


class DecodesAnswer(Protocol):
    """The part of an engine's prompt that says how its answer is decoded."""

    @property
    def grammar(self) -> AnswerGrammar | None:
        """Return what the answer may be."""

    @property
    def decode(self) -> Callable[[Sequence[int]], str] | None:
        """Return how an answer that may call tools is decoded."""

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Return the texts that end it."""


def begin_answer(
    prompt: DecodesAnswer,
    decode: Callable[[Sequence[int]], str],
    request: GenerationRequest,
    ids: Sequence[int],
) -> AnswerText:
    """Return an empty answer to a request with these ``ids`` as its prompt; ``decode`` is the tokenizer's own way.

    Without tools one that a grammar restricts is exactly what it has accepted. A message's continuation is exactly what
    follows it, spaces included.
    """
    grammar = prompt.grammar
    if prompt.decode is not None or grammar is None:
        before = ids if request.continue_final_message else ()
        strip = request.prompt is None and not request.continue_final_message
        return AnswerText(prompt.decode or decode, prompt.stop_texts, strip=strip, before=before)
    return AnswerText(grammar.decode, prompt.stop_texts, strip=False, lead=grammar.lead)


def find_lead(template: Template, request: GenerationRequest, constraint: Constraint) -> str:
    """Return the space that the template writes before an answer, as the model was trained."""
    has_lead = isinstance(template, StringTemplate) and request.opens_answer and constraint.kind != "grammar"
    return template.lead if has_lead and isinstance(template, StringTemplate) else ""
