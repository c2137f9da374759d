"""A response as it grows, and the events that tell a client of it."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from llava_ray.chat.tool_formats import CallDelta
from llava_ray.deployments.http.responses import Choice, chat_logprobs
from llava_ray.deployments.http.responses_api.fields import ResponsesRequest
from llava_ray.deployments.refusal import Refused
from llava_ray.generate.engine import GenerationChunk

ResponseEvent = dict[str, Any]

_CODES = {429: "rate_limit_exceeded"}  # OpenAI's error codes of failed responses, by status; other codes are ours


@dataclass
class ResponseWriter:
    """One response: its items so far, and the number of the next event."""

    response_id: str
    request: ResponsesRequest
    items: list[dict[str, Any]] = field(default_factory=list)
    choice: Choice = field(default_factory=Choice)
    created_at: int = field(default_factory=lambda: int(time.time()))
    completed_at: int | None = None
    error: dict[str, Any] | None = None
    num_events: int = 0
    call: int | None = None
    """The call whose item is open."""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    """Of tokens whose text has not come yet."""

    def begin(self) -> list[ResponseEvent]:
        """Return the events before the first piece."""
        response = self.response("in_progress")
        return [self.event("created", response=response), self.event("in_progress", response=response)]

    def add(self, chunk: GenerationChunk) -> list[ResponseEvent]:
        """Append a piece, and return its events."""
        if self.request.with_logprobs:
            self.logprobs += chat_logprobs(chunk.logprobs)
        events = self._add_text(chunk.text) if chunk.text else []
        for call in chunk.calls:
            events += self._add_call(call)
        self.choice.add(chunk)
        return events

    def end(self) -> list[ResponseEvent]:
        """Return the events after the last piece."""
        events = [] if self.items else self._add_text("")
        status = "incomplete" if self.choice.finish_reason == "length" else "completed"
        events += self._close(status)
        self.completed_at = int(time.time()) if status == "completed" else None
        return [*events, self.event(status, response=self.response(status))]

    def fail(self, refused: Refused) -> list[ResponseEvent]:
        """Return the last event of an answer that failed."""
        message = refused.body()["error"]["message"]
        code = _CODES.get(refused.status, "server_error" if refused.status >= 500 else refused.code)
        self.error = {"code": code, "message": message}
        return [*self._close("incomplete"), self.event("failed", response=self.response("failed"))]

    def response(self, status: str) -> dict[str, Any]:
        """Format the response as it is now."""
        asked, reason = self.request, {"reason": "max_output_tokens"}
        wanted = asked.text.format
        return {
            "id": self.response_id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": self.completed_at,
            "status": status,
            "background": False,
            "error": self.error,
            "incomplete_details": reason if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata,
            "model": asked.model,
            "output": [_copied(item) for item in self.items],
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": wanted.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": asked.tool_choice if isinstance(asked.tool_choice, str) else self._tool_choice(),
            "tools": [
                {"description": None, "parameters": None, "strict": None} | tool.model_dump(exclude_none=True)
                for tool in asked.tools
            ],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._usage(),
            "user": None,
        }

    def event(self, kind: str, **fields: Any) -> ResponseEvent:
        """Format one event with the next number."""
        self.num_events += 1
        return {"type": f"response.{kind}", "sequence_number": self.num_events - 1, **fields}

    def _tool_choice(self) -> Any:
        chosen = self.request.tool_choice
        return "auto" if chosen is None or isinstance(chosen, str) else chosen.model_dump()

    def _usage(self) -> dict[str, Any]:
        choice = self.choice
        return {
            "input_tokens": choice.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": choice.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": choice.num_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": choice.num_prompt_tokens + choice.num_tokens,
        }

    @property
    def _place(self) -> dict[str, Any]:
        """Return where the open item is."""
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}

    def _open(self, item: dict[str, Any]) -> list[ResponseEvent]:
        events = self._close("completed")
        self.items.append(item)
        return [*events, self.event("output_item.added", output_index=len(self.items) - 1, item=_copied(item))]

    def _add_text(self, text: str) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        if not (self.items and self.items[-1]["type"] == "message" and self.items[-1]["status"] == "in_progress"):
            message = {"type": "message", "id": _new_id("msg"), "status": "in_progress", "role": "assistant"}
            events = self._open({**message, "content": []})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.items[-1]["content"].append(part)
            events.append(self.event("content_part.added", **self._place, content_index=0, part=_copied(part)))
        part = self.items[-1]["content"][0]
        part["text"] += text
        logprobs, self.logprobs = self.logprobs, []
        part["logprobs"] += logprobs
        if text:
            events.append(
                self.event("output_text.delta", **self._place, content_index=0, delta=text, logprobs=logprobs)
            )
        return events

    def _add_call(self, call: CallDelta) -> list[ResponseEvent]:
        events: list[ResponseEvent] = []
        if call.index != self.call or self.items[-1]["status"] != "in_progress":
            call_id = self.choice.call(call.index).id
            head = {"type": "function_call", "id": _new_id("fc"), "status": "in_progress", "call_id": call_id}
            events = self._open({**head, "name": call.name, "arguments": ""})
            self.call = call.index
        if call.arguments:
            self.items[-1]["arguments"] += call.arguments
            events.append(self.event("function_call_arguments.delta", **self._place, delta=call.arguments))
        return events

    def _close(self, status: str) -> list[ResponseEvent]:
        """End the open item, if there is one."""
        if not self.items or self.items[-1]["status"] != "in_progress":
            return []
        item = self.items[-1]
        item["status"] = status
        events: list[ResponseEvent] = []
        if item["type"] == "function_call":
            ended = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self.event("function_call_arguments.done", **self._place, **ended))
            self.call = None
        else:
            part = item["content"][0]
            part["logprobs"] += self.logprobs
            self.logprobs = []
            ended = {"text": part["text"], "logprobs": part["logprobs"]}
            events.append(self.event("output_text.done", **self._place, content_index=0, **ended))
            events.append(self.event("content_part.done", **self._place, content_index=0, part=_copied(part)))
        return [*events, self.event("output_item.done", output_index=len(self.items) - 1, item=_copied(item))]


def _copied(item: dict[str, Any]) -> dict[str, Any]:
    """Copy an item or a part as deep as it changes."""
    return {
        **item,
        **({"content": [_copied(part) for part in item["content"]]} if "content" in item else {}),
        **({"logprobs": list(item["logprobs"])} if "logprobs" in item else {}),
    }


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
