"""The start of an answer: what is written before its text, and how it is decoded, as what restricts it requires."""

from collections.abc import Callable, Sequence

from llava_ray.chat.template import StringTemplate, Template
from llava_ray.generate.answer_text import AnswerText
from llava_ray.generate.constraints.answer_grammar import AnswerGrammar
from llava_ray.generate.engine import Constraint, GenerationRequest


def begin_answer(
    grammar: AnswerGrammar | None,
    of_tools: Callable[[Sequence[int]], str] | None,
    decode: Callable[[Sequence[int]], str],
    stop_texts: tuple[str, ...],
    *,
    strip: bool,
) -> AnswerText:
    """Return an empty answer; without tools one that a grammar restricts is exactly what it has accepted."""
    if of_tools is not None or grammar is None:
        return AnswerText(of_tools or decode, stop_texts, strip=strip)
    return AnswerText(grammar.decode, stop_texts, strip=False, lead=grammar.lead)


def find_lead(template: Template, request: GenerationRequest, constraint: Constraint) -> str:
    """Return the space that the template writes before an answer, as the model was trained."""
    has_lead = isinstance(template, StringTemplate) and request.prompt is None and constraint.kind != "grammar"
    return template.lead if has_lead and isinstance(template, StringTemplate) else ""
