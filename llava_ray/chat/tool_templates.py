"""What a tokenizer's chat template does with tools: whether it writes them, and how it writes calls."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import jinja2

from llava_ray.chat.controls import find_controls
from llava_ray.chat.conversation import Turn
from llava_ray.chat.template import JinjaTemplate, Template
from llava_ray.errors import RecordError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME, _ARGUMENT, _RESULT, _ID = "probe_function", "probe_argument", "probe_result", "probe0000"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {_ARGUMENT: {"type": "integer"}}, "required": [_ARGUMENT]},
    },
}
_CALL = {"type": "function", "id": _ID, "function": {"name": _NAME, "arguments": {_ARGUMENT: 1}}}

# How a call is recognised in what a template writes, or else in its source: (format, pattern), the first that matches.
_TRACES = (
    ("hermes", re.compile(r"<tool_call>\s*\{")),
    ("mistral", re.compile(r"\[TOOL_CALLS\]")),
    ("pythonic", re.compile(rf"\[{_NAME}\(|\[func_name1?\(")),
    ("llama_json", re.compile(r'"parameters":|<\|python_tag\|>')),
    ("hermes", re.compile(r"<tool_call>")),
)


@dataclass(frozen=True)
class ToolSupport:
    """The form in which a chat template writes tools."""

    format: str | None
    """The name of the format of its calls (`tool_formats`); None for one that is not known."""
    writes_calls: bool
    """Whether it writes the calls of earlier answers, and their results."""
    around: tuple[str, ...]
    """What it writes around tools, calls and results."""


def find_tool_support(tokenizer: PreTrainedTokenizerBase) -> ToolSupport | None:
    """Return what a tokenizer's chat template does with tools; None for one without. Cached for each tokenizer."""
    if tokenizer not in _KNOWN:
        _KNOWN[tokenizer] = _probe(tokenizer) if tokenizer.chat_template else None
    return _KNOWN[tokenizer]


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, ToolSupport | None] = WeakKeyDictionary()


def with_tool_frame(template: Template, turns: Sequence[Turn]) -> Template:
    """Return the template for turns with tools: what it writes around them counts as its own text.

    Raises RecordError ("tools") for a template that cannot write them, ("control_tokens") for tools or calls that spell
    out control tokens.
    """
    if not any(turn.needs_tools for turn in turns):
        return template
    support = find_tool_support(template.tokenizer) if isinstance(template, JinjaTemplate) else None
    if support is None or not isinstance(template, JinjaTemplate):
        raise RecordError(
            f"template {template.name!r} cannot write tools; leave tools and their turns out, or use a model whose "
            "tokenizer has a chat template with tools (model.version = 'chat_template').",
            reason="tools",
            field="tools",
        )
    if not support.writes_calls and any(turn.role == "tool" or turn.calls for turn in turns):
        raise RecordError(
            "the tokenizer's chat template does not write the calls of earlier answers or their results; leave them "
            "out.",
            reason="tools",
            field="messages",
        )
    known = template.around[-len(support.around) :] == support.around
    framed = template if known else replace(template, around=(*template.around, *support.around))
    pattern = find_controls(template.tokenizer, framed).pattern
    for text, field in _texts(turns):
        if (found := pattern.search(text)) is not None:
            raise RecordError(
                f"tools or calls hold {found[0]!r}, a control token of the model, written out as text; take it out.",
                reason="control_tokens",
                field=field,
            )
    return framed


def _texts(turns: Sequence[Turn]) -> Iterator[tuple[str, str]]:
    """Yield all texts of tools and calls, unescaped, each with the request's field that holds it."""
    for turn in turns:
        if turn.tools:
            yield json.dumps(json.loads(turn.tools), ensure_ascii=False), "tools"
        for call in turn.calls:
            yield f"{call.name} {json.dumps(json.loads(call.arguments), ensure_ascii=False)}", "messages"


def tool_fields(turn: Turn) -> dict[str, Any]:
    """Return the fields of a turn's message that a chat template reads beside role and content."""
    if turn.calls:
        calls = [
            {
                "type": "function",
                **({"id": call.id} if call.id else {}),
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in turn.calls
        ]
        return {"tool_calls": calls}
    named = {"tool_call_id": turn.call_id, "name": turn.name}
    return {key: value for key, value in named.items() if value and turn.role == "tool"}


def find_tools(turns: Sequence[Turn]) -> list[Any] | None:
    """Return the tools of a conversation, as a chat template takes them."""
    return json.loads(turns[0].tools) if turns and turns[0].tools else None


def _probe(tokenizer: PreTrainedTokenizerBase) -> ToolSupport | None:
    question = {"role": "user", "content": "Q"}
    offered = _write(tokenizer, [question])
    if offered is None or _NAME not in offered:
        return None
    answer = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
    result = {"role": "tool", "content": _RESULT, "tool_call_id": _ID, "name": _NAME}
    called = _write(tokenizer, [question, answer, result]) or ""
    writes_calls = called.count(_NAME) > offered.count(_NAME) and _RESULT in called
    source = json.dumps(tokenizer.chat_template, ensure_ascii=False).replace('\\"', '"')
    # Behind the question only: the tools themselves have "parameters", too.
    written = called[offered.rfind("Q") :] if writes_calls else source
    found = next((name for name, pattern in _TRACES if pattern.search(written)), None)
    return ToolSupport(found, writes_calls, (offered, called))


def _write(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=[_TOOL], tokenize=False, add_generation_prompt=True))
    except (jinja2.TemplateError, TypeError, ValueError, LookupError):
        return None
