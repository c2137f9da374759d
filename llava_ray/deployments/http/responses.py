"""OpenAI's response objects, written from an engine's pieces."""

import functools
import secrets
import string
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from llava_ray.chat.tool_formats import CallDelta
from llava_ray.deployments.http.logprob_forms import as_json_logprob, format_prompt_logprobs
from llava_ray.deployments.replica import AnswerPiece
from llava_ray.generate.engine import GenerationChunk
from llava_ray.generate.logprobs import PromptLogprobs, TokenLogprob

# Of a call's id: some chat templates accept only nine letters and digits.
_ID_CHARACTERS, _ID_LENGTH = string.ascii_letters + string.digits, 9


@functools.cache
def find_system_fingerprint() -> str:
    """Return the package's version as OpenAI's system fingerprint."""
    try:
        return f"llava_ray-{version('llava_ray')}"
    except PackageNotFoundError:  # run from its source tree
        return "llava_ray"


@dataclass
class AnswerCall:
    """One tool call so far."""

    name: str = ""
    arguments: str = ""
    id: str = field(default_factory=lambda: "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH)))

    def format(self) -> dict[str, Any]:
        """Format the whole call."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Choice:
    """One answer so far."""

    text: str = ""
    calls: list[AnswerCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: PromptLogprobs = ()

    def add(self, chunk: GenerationChunk) -> None:
        """Append a piece to the answer."""
        self.text += chunk.text
        for call in chunk.calls:
            self.call(call.index).name += call.name
            self.call(call.index).arguments += call.arguments
        self.logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.num_prompt_tokens = max(self.num_prompt_tokens, chunk.num_prompt_tokens)
        self.num_tokens += len(chunk.token_ids)
        self.num_cached_tokens = max(self.num_cached_tokens, chunk.num_cached_tokens)
        self.prompt_logprobs = self.prompt_logprobs or chunk.prompt_logprobs

    def call(self, index: int) -> AnswerCall:
        """Return the call of that index, begun where it is new."""
        while len(self.calls) <= index:
            self.calls.append(AnswerCall())
        return self.calls[index]

    def message(self) -> dict[str, Any]:
        """Format the message of a chat; one of calls alone has no content."""
        calls = {"tool_calls": [call.format() for call in self.calls]} if self.calls else {}
        content = None if self.calls and not self.text else self.text
        return {"role": "assistant", "content": content, "refusal": None, **calls}


async def collect_choices(pieces: AsyncIterator[list[AnswerPiece]], num_choices: int) -> list[Choice]:
    """Read an answer to its end."""
    choices = [Choice() for _ in range(num_choices)]
    async for batch in pieces:
        for index, chunk in batch:
            choices[index].add(chunk)
    return choices


def usage(choices: Sequence[Choice]) -> dict[str, Any]:
    """Count the tokens; the prompt once for all choices, cached as far as it was before the first of them."""
    num_prompt, num_new = max(choice.num_prompt_tokens for choice in choices), sum(c.num_tokens for c in choices)
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new} | {
        "prompt_tokens_details": {"cached_tokens": min(choice.num_cached_tokens for choice in choices)}
    }


@dataclass(frozen=True)
class ChatForm:
    """The format of chat responses."""

    request_id: str
    model: str
    with_logprobs: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        """Return the common fields of every object."""
        return {
            "id": self.request_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": find_system_fingerprint(),
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Format a complete answer."""
        return {
            **self.head("chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": choice.message(),
                    "logprobs": self.logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage(choices),
            **format_prompt_logprobs(choices[0].prompt_logprobs),
        }

    def first(self, num_choices: int) -> list[dict[str, Any]]:
        """Format the first events of a stream, with the role."""
        return [self.event(index, {"role": "assistant", "content": ""}, None, None) for index in range(num_choices)]

    def next(self, index: int, before: Choice, chunk: GenerationChunk) -> dict[str, Any]:
        """Format a piece as an event."""
        is_silent = not chunk.text and (chunk.calls or chunk.finish_reason is not None)
        delta: dict[str, Any] = {} if is_silent else {"content": chunk.text}
        if chunk.calls:
            delta["tool_calls"] = [_call_delta(call, before) for call in chunk.calls]
        return self.event(index, delta, self.logprobs(chunk.logprobs), chunk.finish_reason)

    def event(self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """Format one event of a stream."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self.head("chat.completion.chunk"), "choices": [choice]}

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Format the event with token counts."""
        return {**self.head("chat.completion.chunk"), "choices": [], "usage": usage(choices)}

    def logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """Format a piece's log-probabilities."""
        if not self.with_logprobs:
            return None
        return {
            "content": chat_logprobs(tokens),
            "refusal": None,
        }


def _call_delta(call: CallDelta, choice: Choice) -> dict[str, Any]:
    """Format a piece of a call; the first has its id and name."""
    head = {"id": choice.call(call.index).id, "type": "function"} if call.name else {}
    named = {"name": call.name} if call.name else {}
    return {"index": call.index, **head, "function": {**named, "arguments": call.arguments}}


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Format the log-probabilities of tokens in a chat's form."""
    return [
        {
            **_chat_token(token.text, token.logprob),
            "top_logprobs": [_chat_token(text, logprob) for _, text, logprob in token.top],
        }
        for token in tokens
    ]


def _chat_token(text: str, logprob: float) -> dict[str, Any]:
    """Format one token of a chat."""
    return {"token": text, "logprob": as_json_logprob(logprob), "bytes": list(text.encode())}


@dataclass(frozen=True)
class CompletionForm(ChatForm):
    """The format of completion responses."""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Format a complete answer."""
        prompt = format_prompt_logprobs(choices[0].prompt_logprobs)
        formatted = [
            {**self.choice(index, choice.text, self.tokens(choice.logprobs, 0), choice.finish_reason), **prompt}
            for index, choice in enumerate(choices)
        ]
        return {**self.head("text_completion"), "choices": formatted, "usage": usage(choices)}

    def first(self, num_choices: int) -> list[dict[str, Any]]:
        """Return no events before the first piece."""
        del num_choices
        return []

    def next(self, index: int, before: Choice, chunk: GenerationChunk) -> dict[str, Any]:
        """Format a piece as an event."""
        logprobs = self.tokens(chunk.logprobs, len(before.text))
        return {
            **self.head("text_completion"),
            "choices": [self.choice(index, chunk.text, logprobs, chunk.finish_reason)],
        }

    def last(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Format the event with token counts."""
        return {**self.head("text_completion"), "choices": [], "usage": usage(choices)}

    def choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """Format one choice."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}

    def tokens(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        """Format a piece's log-probabilities in the completions API's form."""
        if not self.with_logprobs:
            return None
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [as_json_logprob(token.logprob) for token in tokens],
            "top_logprobs": [{text: as_json_logprob(logprob) for _, text, logprob in token.top} for token in tokens],
            "text_offset": offsets,
        }
