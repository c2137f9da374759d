"""Conversion of validated requests to tasks: turns with markers, images by address, sampling settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn, break_markers, join_parts
from llava_ray.chat.tool_call import ToolCall
from llava_ray.deployments.adapters.places import AdapterRef
from llava_ray.deployments.http.schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    GenerationFields,
    ImagePart,
    TextPart,
)
from llava_ray.deployments.reading_jobs import ReadingJob
from llava_ray.deployments.refusal import refuse
from llava_ray.deployments.settings import ServeSettings
from llava_ray.generate.engine import Sampling, ToolChoice

_ROLES: dict[str, Literal["human", "gpt", "tool"]] = {"user": "human", "assistant": "gpt", "tool": "tool"}


@dataclass(frozen=True)
class Task:
    """A replica's task: a request whose images are still addresses."""

    request_id: str
    model: str
    """A name of the replica's ModelSource: its own, one of its adapters', or that of ``adapter``."""
    turns: tuple[Turn, ...] = ()
    prompt: str | None = None
    system: str | None = None
    media: tuple[str, ...] = ()
    """Data URIs and addresses, in the order of their markers."""
    sampling: Sampling = field(default_factory=Sampling)
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    """For turns with tools."""
    num_choices: int = 1
    stream: bool = True
    """Whether to send pieces as they come, or all at the end."""
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    adapter: AdapterRef | None = None
    """The adapter that ``model`` names, if it was loaded while the service runs: the replica may not know it yet."""
    job: ReadingJob | None = None
    """What is asked for instead of an answer."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Return all texts of the task."""
        calls = (call.arguments for turn in self.turns for call in turn.calls)
        tools = (turn.tools for turn in self.turns if turn.tools)
        inputs = () if self.job is None else self.job.texts
        return (*(turn.value for turn in self.turns), self.system or "", self.prompt or "", *calls, *tools, *inputs)


def chat_task(request: ChatRequest, request_id: str, settings: ServeSettings) -> Task:
    """Convert a chat to a task. Raises RefusalError for too many images or characters, or turns out of order."""
    system = "\n".join(_text_of(message) for message in request.messages if message.role in ("system", "developer"))
    spoken = [message for message in request.messages if message.role in _ROLES]
    _check_order(spoken, request)
    media = tuple(part.image_url.url for message in spoken for part in message.parts if isinstance(part, ImagePart))
    turns = with_tools([as_turn(message) for message in spoken], request.offered_tools)
    check_image_count(media, settings, "messages")
    check_prompt_length(sum(map(_count_chars, turns)) + len(system), settings, "messages")
    wanted = request.max_completion_tokens or request.max_tokens
    top = (request.top_logprobs or 0) if request.logprobs else None
    return Task(
        request_id=request_id,
        model=request.model,
        turns=turns,
        system=system or None,
        media=media,
        sampling=sampling(request, wanted, top, settings),
        tool_choice=request.choice,
        num_choices=_check_choices(request, settings),
        stream=request.stream,
        continue_final_message=request.continue_final_message,
        add_generation_prompt=request.add_generation_prompt,
    )


def completion_task(request: CompletionRequest, request_id: str, settings: ServeSettings) -> Task:
    """Convert a completion to a task. Raises RefusalError for too many characters or image markers."""
    check_prompt_length(len(request.prompt), settings, "prompt")
    if IMAGE_TOKEN in request.prompt:
        raise refuse(
            400, f"{IMAGE_TOKEN} in a prompt: images are asked about in /v1/chat/completions", "image_marker", "prompt"
        )
    return Task(
        request_id=request_id,
        model=request.model,
        prompt=request.prompt,
        sampling=sampling(request, request.max_tokens, request.logprobs, settings),
        num_choices=_check_choices(request, settings),
        stream=request.stream,
    )


def sampling(request: GenerationFields, wanted: int | None, logprobs: int | None, settings: ServeSettings) -> Sampling:
    """Return the sampling settings of a request."""
    return Sampling(
        max_tokens=wanted or settings.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=max(0, request.top_k),
        stop=request.stop,
        seed=request.seed,
        logprobs=logprobs,
        ignore_eos=request.ignore_eos,
        constraint=request.constraint(),
        min_p=request.min_p,
        logit_bias=request.logit_bias,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        prompt_logprobs=request.prompt_logprobs,
    )


def as_turn(message: ChatMessage) -> Turn:
    """Convert a message to a turn as in training: each part on its own line, a marker for each image.

    A marker inside a user's text would refer to a missing image, so it is broken up. Two parts cannot form one, because
    a line break separates them.
    """
    if message.role != "user" and any(isinstance(part, ImagePart) for part in message.parts):
        raise refuse(400, f"the {message.role}'s message holds an image; only a user's may", "image_role", "messages")
    texts = (break_markers(part.text) if isinstance(part, TextPart) else None for part in message.parts)
    calls = tuple(
        ToolCall(call.function.name, break_markers(call.function.arguments or "{}"), call.id)
        for call in message.tool_calls
    )
    return Turn(_ROLES[message.role], join_parts(texts), calls=calls, call_id=message.tool_call_id or "")


def with_tools(turns: Sequence[Turn], tools: str) -> tuple[Turn, ...]:
    """Attach the tools to the first turn, and the functions' names to the results of their calls."""
    names = {call.id: call.name for turn in turns for call in turn.calls}
    named = [replace(turn, name=names[turn.call_id]) if turn.role == "tool" else turn for turn in turns]
    return (replace(named[0], tools=break_markers(tools)), *named[1:])


def _text_of(message: ChatMessage) -> str:
    """Return a system message's text. Raises RefusalError for images in it."""
    if any(isinstance(part, ImagePart) for part in message.parts):
        raise refuse(400, f"a {message.role} message holds an image; only a user's may", "image_role", "messages")
    return break_markers(join_parts(part.text for part in message.parts if isinstance(part, TextPart)))


def _check_order(spoken: list[ChatMessage], request: ChatRequest) -> None:
    """Check that user and assistant alternate, the user first, and that the results of calls follow these.

    The last message must be what the request's prompt may end with. Raises RefusalError.
    """
    pending: list[str] = []  # calls without results
    before = ""
    for index, message in enumerate(spoken):
        expected = ("tool",) if pending else _FOLLOWING[before]
        if message.role not in expected:
            words = " or ".join(f"the {role}'s" for role in expected)
            tools = f": the results of the calls {', '.join(map(repr, pending))[:100]} are missing" if pending else ""
            raise refuse(
                400,
                f"message {index + 1} that is not a system message is the {message.role}'s, expected {words}{tools}; "
                "user and assistant alternate, the user first; join neighbouring messages of one role",
                "message_order",
                "messages",
            )
        if message.role == "tool":
            if message.tool_call_id not in pending:
                raise refuse(
                    400,
                    f"message {index + 1} that is not a system message answers no call of the message before: its "
                    "tool_call_id is none of theirs, or was answered already",
                    "tool_call_id",
                    "messages",
                )
            pending.remove(message.tool_call_id)
        else:
            pending = [call.id for call in message.tool_calls]
            if len(set(pending)) < len(pending):
                raise refuse(400, "two calls of a message have the same id", "tool_call_id", "messages")
        before = message.role
    _check_last(before, pending, request)


def _check_last(last: str, pending: list[str], request: ChatRequest) -> None:
    """Check the role of the last message, after which the calls ``pending`` have no results. Raises RefusalError."""
    if request.continue_final_message:
        if last != "assistant" or pending:
            found = "calls tools" if pending else f"is the {last}'s" if last else "is missing"
            raise refuse(
                400,
                f"continue_final_message: the last message {found}; expected the beginning of an answer, an assistant "
                "message of text",
                "message_order",
                "continue_final_message",
            )
    elif pending or last not in (("user", "tool") if request.add_generation_prompt else ("user", "tool", "assistant")):
        missing = "the results of the last message's calls are missing" if pending else "it is the question"
        raise refuse(400, f"the last message must be the user's, or a tool's: {missing}", "message_order", "messages")


# The roles that may follow a role, after all calls have their results.
_FOLLOWING = {"": ("user",), "user": ("assistant",), "assistant": ("user",), "tool": ("assistant", "user")}


def _count_chars(turn: Turn) -> int:
    return len(turn.value) + len(turn.tools) + sum(len(call.name) + len(call.arguments) for call in turn.calls)


def check_image_count(media: Sequence[str], settings: ServeSettings, param: str) -> None:
    """Check the number of images. Raises RefusalError."""
    if len(media) > settings.max_images:
        raise refuse(
            400, f"{len(media)} images; at most {settings.max_images} a request (max_images)", "too_many_images", param
        )


def check_prompt_length(num_chars: int, settings: ServeSettings, param: str) -> None:
    """Check the number of characters before tokenising. Raises RefusalError."""
    if num_chars > settings.max_text_chars:
        raise refuse(
            400,
            f"{num_chars:,} characters; at most {settings.max_text_chars:,} (max_text_chars)",
            "text_too_long",
            param,
        )


def _check_choices(request: GenerationFields, settings: ServeSettings) -> int:
    """Return n within the service's limit. Raises RefusalError."""
    if request.n > settings.max_choices:
        raise refuse(400, f"n = {request.n}; at most {settings.max_choices} (max_choices)", "too_many_choices", "n")
    return request.n
