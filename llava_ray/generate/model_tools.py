"""How a model calls tools: the format of its calls, and the tokens that mark them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from llava_ray.chat.template import JinjaTemplate
from llava_ray.chat.tool_formats import TOOL_FORMATS, ToolFormat
from llava_ray.chat.tool_templates import find_tool_support
from llava_ray.errors import RecordError
from llava_ray.generate.decoding import decode
from llava_ray.generate.engine import GenerationRequest
from llava_ray.model.blueprint import Blueprint

if TYPE_CHECKING:
    from llava_ray.generate.prompts import PromptText


class ModelTools:
    """The tools of one model or adapter, by its chat template."""

    def __init__(self, model: Blueprint) -> None:
        """Initialise for a model."""
        self.model = model
        self.named_format: str | None = None
        """The format of calls that a setting names; None for the one that the chat template shows."""

    def format(self) -> ToolFormat:
        """Return the format of the model's calls. Raises RecordError for a model without tools."""
        name = self.find_format()
        if name is None:
            raise RecordError(
                "this model cannot call tools: its chat template has none, or writes calls in no known format "
                f"(known: {', '.join(TOOL_FORMATS)}). Leave tools out, or use another model.",
                reason="tools",
                field="tools",
            )
        return TOOL_FORMATS[name]

    def find_format(self) -> str | None:
        """Return the name of the format of the model's calls; None for a model without tools."""
        template = self.model.template
        support = find_tool_support(self.model.tokenizer) if isinstance(template, JinjaTemplate) else None
        return None if support is None else self.named_format or support.format

    def mark_tokens(self) -> dict[str, int]:
        """Return the tokens of the vocabulary that mark calls; the tokenizer's own decoding leaves some of them out."""
        one, added = self.format(), self.model.tokenizer.get_added_vocab()
        return {mark: added[mark] for mark in (one.start, one.optional_start, one.end, "[ARGS]") if mark in added}

    def decoder(self, request: GenerationRequest) -> Callable[[Sequence[int]], str] | None:
        """Return a decoding that keeps the marks of calls; None for a request without tools."""
        if not find_offered(request):
            return None
        spelt = {token: mark for mark, token in self.mark_tokens().items()}
        return functools.partial(decode_with_marks, self.model.tokenizer, spelt)


def find_offered(request: GenerationRequest) -> str:
    """Return the tools that a request's answer may call, as a JSON list; empty without any."""
    return request.turns[0].tools if request.turns else ""


def may_be_held(request: GenerationRequest) -> bool:
    """Return whether a grammar may restrict the answer of a request."""
    return request.sampling.constraint is not None or bool(find_offered(request))


def list_tool_formats(prompts: Mapping[str | None, "PromptText"], name: str) -> dict[str, str]:
    """Return the format of calls of each model or adapter that has tools; ``name`` is the base's."""
    found = {own or name: one.tools.find_format() for own, one in prompts.items()}
    return {own: tool_format for own, tool_format in found.items() if tool_format is not None}


def share_grammars(prompts: Mapping[str | None, "PromptText"]) -> None:
    """Let adapters with the tokenizer and end tokens of their base use its grammars."""
    base = prompts[None]
    for one in prompts.values():
        if one.model.tokenizer is base.model.tokenizer and one.stops.ids == base.stops.ids:
            one.grammars = base.grammars


def decode_with_marks(tokenizer: PreTrainedTokenizerBase, marks: Mapping[int, str], ids: Sequence[int]) -> str:
    """Decode tokens to text, without special ones but these marks."""
    pieces, start = [], 0
    for place, token in enumerate(ids):
        if token in marks:
            pieces += [decode(tokenizer, ids[start:place]), marks[token]]
            start = place + 1
    return "".join([*pieces, decode(tokenizer, ids[start:])])
