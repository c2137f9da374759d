"""Turns written down by a template, as spans that say what is learnt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import cast

from llava_ray.chat.conversation import IMAGE_TOKEN, Span, Turn, check_turns
from llava_ray.chat.templates import JinjaTemplate, StringTemplate, Template
from llava_ray.errors import RecordError, TemplateError


def render_prompt(turns: Sequence[Turn], template: Template, *, open_turn: bool = False) -> str:
    """Write the turns down as one text; with ``open_turn`` it ends where an answer begins."""
    return "".join(span.text for span in render_spans(turns, template, open_turn=open_turn))


def render_spans(turns: Sequence[Turn], template: Template, *, open_turn: bool = False) -> list[Span]:
    """Write the turns down as spans; joined, they are the prompt.

    Learnt are the answers with the space before them and the text that ends them. Raises RecordError for turns
    that no template can write (see `check_turns`), TemplateError for turns that this template cannot.
    """
    check_turns(turns, learnt=not open_turn)
    if open_turn and turns[-1].role != "human":
        raise TemplateError(
            f"an open turn was asked for after an answer ({turns[-1].value[:40]!r}); expected a human turn last. "
            "Add a question, or render without open_turn."
        )
    if isinstance(template, JinjaTemplate):
        return _render_jinja(turns, template, open_turn)
    if isinstance(template, StringTemplate):
        return _render_strings(turns, template, open_turn)
    raise TemplateError(f"{type(template).__name__} cannot be rendered; get templates from find_template.")


def place_images(turns: Sequence[Turn], template: Template) -> tuple[Turn, ...]:
    """Move a turn's image marker to the front, on a line of its own, inside the template's image tags.

    Several markers in one turn stay where they stand: moving them would lose which text belongs to which image
    (the original merged them into one). Placing twice changes nothing.
    """
    return tuple(
        Turn(turn.role, _place_image(turn.value, *template.image_tags)) if IMAGE_TOKEN in turn.value else turn
        for turn in turns
    )


def _place_image(text: str, before: str, after: str) -> str:
    text = text.replace(before + IMAGE_TOKEN + after, IMAGE_TOKEN)
    if text.count(IMAGE_TOKEN) == 1:
        text = f"{IMAGE_TOKEN}\n{text.replace(IMAGE_TOKEN, '').strip()}".strip()
    return text.replace(IMAGE_TOKEN, before + IMAGE_TOKEN + after)


def _render_strings(turns: Sequence[Turn], template: StringTemplate, open_turn: bool) -> list[Span]:
    if template.only_images:
        turns = _keep_images(turns, template)
    spans, before = [], template.opening
    for question, answer in template.examples:
        written = question + template.question_end + template.cue + template.lead + answer + template.end
        spans.append(Span(before + written, learnt=False))
        before = template.question
    for turn in turns:
        if turn.role == "human":
            spans.append(Span(before + turn.value + template.question_end, learnt=False))
            before = template.question
        else:
            spans.append(Span(template.cue, learnt=False))
            spans.append(Span(template.lead + turn.value + template.end, learnt=True))
    if open_turn:
        spans.append(Span(template.cue, learnt=False))
    return [span for span in spans if span.text]


def _keep_images(turns: Sequence[Turn], template: StringTemplate) -> list[Turn]:
    # Without questions a second exchange, or one without an image, would teach answers to nothing.
    num_images = turns[0].value.count(IMAGE_TOKEN)
    if len(turns) > 2 or not num_images:
        raise RecordError(
            f"template {template.name!r} writes only images and their caption: expected one exchange whose question "
            f"holds {IMAGE_TOKEN}, found {len(turns)} turns and {num_images} markers in the first. "
            "Use a conversation template such as 'v1' for this record.",
            reason="plain_turns",
        )
    before, after = template.image_tags
    return [Turn("human", (before + IMAGE_TOKEN + after) * num_images), *turns[1:]]


def _render_jinja(turns: Sequence[Turn], template: JinjaTemplate, open_turn: bool) -> list[Span]:
    text = _apply_jinja(turns, template, add_generation_prompt=open_turn)
    if open_turn:  # nothing is learnt of it
        return [Span(text, learnt=False)]
    spans, written = [], 0
    for index, turn in enumerate(turns):
        if turn.role == "human":
            continue
        start = _find_answer_start(text, turns[:index], template)
        stop = start + _measure_answer(text[start:], turn, template)
        spans += [Span(text[written:start], learnt=False), Span(text[start:stop], learnt=True)]
        written = stop
    return [span for span in [*spans, Span(text[written:], learnt=False)] if span.text]


def _find_answer_start(text: str, turns: Sequence[Turn], template: JinjaTemplate) -> int:
    prompt = _apply_jinja(turns, template, add_generation_prompt=True)
    if not text.startswith(prompt):
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, prompt, strict=False)))
        raise TemplateError(
            f"the tokenizer's chat template writes the first {len(turns)} turns in two ways: from character {same} on, "
            f"{text[same : same + 60]!r} within the conversation but {prompt[same : same + 60]!r} as a prompt for "
            "generation. A model trained on the one would not know the other. "
            "Choose a template from the table, such as 'chatml_direct', or mend the tokenizer's chat_template."
        )
    return len(prompt)


def _measure_answer(rest: str, turn: Turn, template: JinjaTemplate) -> int:
    # Templates may trim the answer, and may write something before it (an empty thought, say): find it,
    # and the token of the vocabulary that ends it. Whitespace after that token is the template's, not learnt.
    answer = turn.value.strip()
    start, end = rest.find(answer), None
    while start >= 0 and not (end := template.end.match(rest, start + len(answer))):
        start = rest.find(answer, start + 1)
    if end is None or end[1] in rest[:start]:
        raise TemplateError(
            f"the tokenizer's chat template does not write the answer {answer[:60]!r} followed by an end token where "
            f"its turn begins, but {rest[:80]!r}. Without an end token a model never learns to stop. "
            "Choose a template from the table, such as 'chatml_direct', or mend the tokenizer's chat_template."
        )
    return end.end()


def _apply_jinja(turns: Sequence[Turn], template: JinjaTemplate, *, add_generation_prompt: bool) -> str:
    words = {"human": "user", "gpt": "assistant"}
    messages = [] if template.system is None else [{"role": "system", "content": template.system}]
    messages += [{"role": words[turn.role], "content": turn.value} for turn in turns]
    text = template.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return cast("str", text)
