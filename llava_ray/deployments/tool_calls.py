"""Separation of an answer's tool calls from its text, piece by piece."""

import json
from dataclasses import replace

from llava_ray.chat.tool_formats import TOOL_FORMATS, CallReader
from llava_ray.deployments.messages import Task
from llava_ray.deployments.refusal import refuse
from llava_ray.generate.engine import GenerationChunk, GenerationRequest, ModelCard
from llava_ray.generate.model_tools import find_offered


def check_abilities(task: Task, card: ModelCard, source_name: str) -> None:
    """Check that the engine does what a task asks for; ``source_name`` names the base. Raises RefusalError."""
    if task.job is not None and task.job.kind == "embed" and not card.has_features:
        raise refuse(
            400,
            "this model's engine only generates and returns no features; serve the model with engine=builtin for them",
            "engine",
            "model",
        )
    constraint = task.sampling.constraint
    if constraint is not None and not card.holds_constraints:
        raise refuse(
            400,
            f"{constraint.field}: this model's engine cannot restrict its answers; leave it out",
            "structured_output",
            constraint.field,
        )
    model = card.name if task.model == source_name else task.model
    if task.turns and task.turns[0].tools and model not in card.tool_formats:
        raise refuse(
            400,
            "this model cannot call tools: its chat template has none, or writes calls in no known format "
            f"(known: {', '.join(TOOL_FORMATS)}); leave tools out, or use another model",
            "tools",
            "tools",
        )


class AnswerCalls:
    """The calls of one answer."""

    def __init__(self, reader: CallReader) -> None:
        """Initialise for an answer that ``reader`` reads."""
        self.reader = reader
        self.has_called = False

    @classmethod
    def of_request(cls, request: GenerationRequest, card: ModelCard) -> "AnswerCalls | None":
        """Return the reader of an answer that may call tools; None for any other."""
        tools = find_offered(request)
        if not tools:
            return None
        tool_format = card.tool_formats[request.model or card.name]
        names = [tool["function"]["name"] for tool in json.loads(tools)]
        return cls(CallReader(TOOL_FORMATS[tool_format], names, most=None if request.tool_choice.parallel else 1))

    def separate(self, chunk: GenerationChunk) -> GenerationChunk:
        """Return a piece with its calls apart from its text; an answer with calls ends with ``tool_calls``."""
        told = self.reader.push(chunk.text)
        text, calls, reason = told.text, told.calls, chunk.finish_reason
        if reason is not None:
            rest = self.reader.finish()
            text, calls = text + rest.text, calls + rest.calls
            if reason == "stop" and (self.has_called or calls):
                reason = "tool_calls"
        self.has_called = self.has_called or bool(calls)
        return replace(chunk, text=text, calls=calls, finish_reason=reason)
