"""Rendering of turns by a template, as spans that are supervised or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import jinja2

from llava_ray.chat.controls import find_control_ranges
from llava_ray.chat.conversation import IMAGE_TOKEN, Span, Turn, break_markers, check_turns
from llava_ray.chat.messages import find_messages
from llava_ray.chat.template import JinjaTemplate, StringTemplate, Template
from llava_ray.chat.tool_templates import find_tools, tool_fields, with_tool_frame
from llava_ray.errors import RecordError, TemplateError


def render_prompt(turns: Sequence[Turn], template: Template, *, open_turn: bool = False) -> str:
    """Render the turns as one text; with ``open_turn`` it ends where an answer begins."""
    return "".join(span.text for span in render_spans(turns, template, open_turn=open_turn))


def render_spans(turns: Sequence[Turn], template: Template, *, open_turn: bool = False) -> list[Span]:
    """Render the turns as spans; joined, they are the prompt.

    Supervised are the answers (but those that a record excludes) with the space before and the text that ends them:
    without that end text a model would never learn to stop. Raises RecordError for turns that no template can render
    (see `check_turns`), TemplateError for turns that this one cannot.
    """
    check_turns(turns, supervised=not open_turn)
    if open_turn and turns[-1].role == "gpt":
        raise TemplateError(
            f"an open turn was requested after an answer ({turns[-1].value[:40]!r}); expected a human turn last. "
            "Add a question, or render without open_turn."
        )
    template = with_tool_frame(template, turns)
    if isinstance(template, JinjaTemplate):
        return _render_jinja(turns, template, open_turn)
    if isinstance(template, StringTemplate):
        return render_strings(turns, template, open_turn)
    raise TemplateError(f"{type(template).__name__} cannot be rendered; get templates from find_template.")


def place_images(turns: Sequence[Turn], template: Template) -> tuple[Turn, ...]:
    """Move a turn's image marker to the front, on a line of its own, inside the template's image tags.

    Several markers in one turn stay in place: moving them would lose which text belongs to which image (the original
    merged them into one). Idempotent.
    """
    return tuple(
        replace(turn, value=_place_image(turn.value, *template.image_tags)) if IMAGE_TOKEN in turn.value else turn
        for turn in turns
    )


def _place_image(text: str, before: str, after: str) -> str:
    text = text.replace(before + IMAGE_TOKEN + after, IMAGE_TOKEN)
    if text.count(IMAGE_TOKEN) == 1:
        rest = break_markers(
            text.replace(IMAGE_TOKEN, "").strip()
        )  # removing the marker may have joined a new one from its two sides
        text = f"{IMAGE_TOKEN}\n{rest}".strip()
    return text.replace(IMAGE_TOKEN, before + IMAGE_TOKEN + after)


def render_strings(turns: Sequence[Turn], template: StringTemplate, open_turn: bool) -> list[Span]:
    """Render checked turns by a template of fixed strings."""
    if template.only_images:
        turns = _keep_images(turns, template)
    ranges: tuple[tuple[int, int], ...] = (template.said,) if any(template.said) else ()
    spans, before = [], template.opening
    for question, answer in template.examples:
        written = question + template.question_end + template.cue + template.lead + answer + template.end
        spans.append(Span(before + written, supervised=False, message_ranges=ranges))
        before, ranges = template.question, ()
    for turn in turns:
        if turn.role == "human":
            ranges += _message_ranges(turn.value, len(before), template)
            spans.append(Span(before + turn.value + template.question_end, supervised=False, message_ranges=ranges))
            before, ranges = template.question, ()
        else:
            answer_ranges = _message_ranges(turn.value, len(template.lead), template)
            spans.append(Span(template.cue, supervised=False))
            spans.append(
                Span(
                    template.lead + turn.value + template.end, supervised=turn.supervised, message_ranges=answer_ranges
                )
            )
    if open_turn:
        spans.append(Span(template.cue, supervised=False))
    return [span for span in spans if span.text]


def _message_ranges(message: str, start: int, template: Template) -> tuple[tuple[int, int], ...]:
    """Return the ranges of a message's own characters: all but the template's tags around images."""
    before, after = template.image_tags
    ranges = []
    for part in message.split(before + IMAGE_TOKEN + after) if before or after else [message]:
        ranges.append((start, start + len(part)))
        start += len(part) + len(before + IMAGE_TOKEN + after)
    return tuple((first, last) for first, last in ranges if first < last)


def _keep_images(turns: Sequence[Turn], template: StringTemplate) -> list[Turn]:
    # They render no question text: a second exchange, or one without an image, would train an answer to nothing.
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
    messages, tools = list_messages(turns, template), find_tools(turns)

    def write(messages: list[dict[str, Any]]) -> str:
        """Write messages as the template does."""
        return apply_jinja(messages, template, tools, add_generation_prompt=open_turn)

    text = write(messages)
    ranges = locate_messages(text, messages, template, write)
    borders, written = [], 0
    for index, turn in enumerate(turns):
        if turn.role != "gpt" or open_turn:  # nothing of an open turn is supervised
            continue
        start = _find_answer_start(text, turns[:index], template)
        if turn.calls:
            stop = _find_calls_end(text, start, turns[: index + 1], template)
        else:
            stop = start + _measure_answer(text[start:], turn, template)
        borders += [(written, start, False), (start, stop, turn.supervised)]
        written = stop
    borders.append((written, len(text), False))
    return [
        Span(text[start:stop], supervised=supervised, message_ranges=_within(ranges, start, stop))
        for start, stop, supervised in borders
        if start < stop
    ]


def locate_messages(
    text: str, messages: list[dict[str, Any]], template: JinjaTemplate, write: Callable[[list[dict[str, Any]]], str]
) -> list[tuple[int, int]]:
    """Return the ranges of ``write(messages)``, which is ``text``, that are characters of messages."""
    ranges = find_messages(
        text,
        messages,
        write=write,
        find_control=lambda content: find_control_ranges(content, template.tokenizer, template),
    )
    if any(template.image_tags):
        ranges = [own for start, stop in ranges for own in _message_ranges(text[start:stop], start, template)]
    return ranges


def _within(ranges: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[tuple[int, int], ...]:
    clipped = ((max(first, start) - start, min(last, stop) - start) for first, last in ranges)
    return tuple((first, last) for first, last in clipped if first < last)


def find_frame(template: JinjaTemplate) -> tuple[str, ...]:
    """Return what a Jinja template writes around questions and answers, without empty reasoning before an answer.

    For a template that cannot render the probe turns, return its source instead.
    """
    try:
        spans = render_spans((Turn("human", "Q"), Turn("gpt", "A"), Turn("human", "Q")), template, open_turn=True)
    except (TemplateError, jinja2.TemplateError, TypeError, ValueError, LookupError):
        return (str(template.tokenizer.chat_template),)
    texts = []
    for span in spans:
        place = span.message_ranges[-1][1] if span.supervised and span.message_ranges else 0
        for first, last in () if span.supervised else span.message_ranges:
            texts.append(span.text[place:first])
            place = last
        texts.append(span.text[place:])
    return tuple(texts)


def _find_answer_start(text: str, turns: Sequence[Turn], template: JinjaTemplate) -> int:
    prompt = apply_jinja(list_messages(turns, template), template, find_tools(turns), add_generation_prompt=True)
    if not text.startswith(prompt):
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(text, prompt, strict=False)))
        raise TemplateError(
            f"the tokenizer's chat template writes the first {len(turns)} turns in two ways: from character {same} on, "
            f"{text[same : same + 60]!r} within the conversation but {prompt[same : same + 60]!r} as a prompt for "
            "generation. A model trained on the one would not recognise the other. "
            "Choose a template from the table, such as 'chatml_direct', or fix the tokenizer's chat_template."
        )
    return len(prompt)


def _measure_answer(rest: str, turn: Turn, template: JinjaTemplate) -> int:
    # Templates may trim the answer, and may write something before it (such as empty reasoning): find the answer and
    # the vocabulary token that ends it. White space after that token belongs to the template and is not supervised.
    answer = turn.value.strip()
    start, end = rest.find(answer), None
    while start >= 0 and not (end := template.end.match(rest, start + len(answer))):
        start = rest.find(answer, start + 1)
    if end is None or end[1] in rest[:start]:
        raise TemplateError(
            f"the tokenizer's chat template does not write the answer {answer[:60]!r} followed by an end token where "
            f"its turn begins, but {rest[:80]!r}. Without an end token a model never learns to stop. "
            "Choose a template from the table, such as 'chatml_direct', or fix the tokenizer's chat_template."
        )
    return end.end()


def _find_calls_end(text: str, start: int, turns: Sequence[Turn], template: JinjaTemplate) -> int:
    """Return where the last turn, which calls tools, ends: behind the vocabulary token that ends it."""
    turn = apply_jinja(list_messages(turns, template), template, find_tools(turns), add_generation_prompt=False)
    stop = len(turn.rstrip())
    ends = [end for end in template.end.finditer(text[start:stop]) if end.end() == stop - start]
    if not ends or not text.startswith(turn[:stop]):
        raise TemplateError(
            "the tokenizer's chat template does not end the calls of an answer with an end token, or writes them in "
            f"another way in the midst of a conversation: {text[start : start + 80]!r}. Without an end token a model "
            "never learns to stop. Fix the tokenizer's chat_template, or remove the records with tools."
        )
    return stop


def list_messages(turns: Sequence[Turn], template: JinjaTemplate) -> list[dict[str, Any]]:
    """Return turns as the messages of a chat template, its system prompt first."""
    words = {"human": "user", "gpt": "assistant", "tool": "tool"}
    messages: list[dict[str, Any]] = [] if template.system is None else [{"role": "system", "content": template.system}]
    return [*messages, *({"role": words[turn.role], "content": turn.value, **tool_fields(turn)} for turn in turns)]


def apply_jinja(
    messages: list[dict[str, Any]],
    template: JinjaTemplate,
    tools: list[Any] | None = None,
    *,
    add_generation_prompt: bool,
) -> str:
    """Write messages by a tokenizer's chat template."""
    text = template.tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return cast("str", text)
