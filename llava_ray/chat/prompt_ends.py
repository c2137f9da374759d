"""Prompts that end elsewhere than where the template has an answer begin: within an answer, or behind a whole turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from llava_ray.chat.conversation import Span, Turn, check_turns
from llava_ray.chat.rendering import apply_jinja, list_messages, locate_messages, render_spans, render_strings
from llava_ray.chat.template import JinjaTemplate, StringTemplate, Template
from llava_ray.chat.tool_templates import find_tools, with_tool_frame
from llava_ray.errors import RecordError

PromptEnd = Literal["open", "continued", "closed"]

# Written behind a message that is continued, to find its end. A template that trims messages leaves out the space.
_MARK = "\U0010fffd"
CONTINUED = "continue_final_message"


def render_to_end(turns: Sequence[Turn], template: Template, end: PromptEnd) -> list[Span]:
    """Render the turns as spans up to the end of the prompt.

    "open" ends where an answer begins; "continued" within the last turn, which is an answer's beginning, as
    transformers has it: white space at its end stays if the template trims no messages; "closed" behind the last turn.
    An empty beginning is none. Raises RecordError or TemplateError as `rendering.render_spans`, and RecordError for an
    answer that cannot be continued.
    """
    if end == "continued":
        _check_continued(turns)
        if not turns[-1].value.strip():
            turns, end = turns[:-1], "open"
    if end == "open":
        return render_spans(turns, template, open_turn=True)
    check_turns(turns, supervised=False)
    template = with_tool_frame(template, turns)
    if isinstance(template, StringTemplate):
        spans = render_strings(turns, template, open_turn=False)
        if end == "continued":
            spans[-1] = replace(spans[-1], text=spans[-1].text.removesuffix(template.end))
        return [replace(span, supervised=False) for span in spans]
    assert isinstance(template, JinjaTemplate)
    return _render_messages(turns, template, continued=end == "continued")


def _check_continued(turns: Sequence[Turn]) -> None:
    """Check that the last turn is an answer of text alone. Raises RecordError."""
    last = turns[-1] if turns else None
    if last is None or last.role != "gpt":
        raise RecordError(
            f"{CONTINUED} asks for the last message to be continued, but that is not the assistant's; add the "
            "beginning of the answer as an assistant message, or leave the field out.",
            reason="turns",
            field=CONTINUED,
        )
    if last.calls:
        raise RecordError(
            f"{CONTINUED}: the last message calls tools, and only text can be continued; leave the field out.",
            reason="turns",
            field=CONTINUED,
        )


def _render_messages(turns: Sequence[Turn], template: JinjaTemplate, *, continued: bool) -> list[Span]:
    messages, tools = list_messages(turns, template), find_tools(turns)

    def write(messages: list[dict[str, Any]]) -> str:
        """Write messages as the template does, to the end of the prompt."""
        if not continued:
            return apply_jinja(messages, template, tools, add_generation_prompt=False)
        marked = [*messages[:-1], {**messages[-1], "content": f"{messages[-1]['content']}{_MARK} "}]
        before, mark, after = apply_jinja(marked, template, tools, add_generation_prompt=False).rpartition(_MARK)
        if not mark:
            raise RecordError(
                f"{CONTINUED}: this model's chat template does not write the last message, so it cannot be continued; "
                "leave the field out.",
                reason="turns",
                field=CONTINUED,
            )
        return before if after.startswith(" ") else before.rstrip()

    text = write(messages)
    return [Span(text, supervised=False, message_ranges=tuple(locate_messages(text, messages, template, write)))]
