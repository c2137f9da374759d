"""Validation of the page's events before Gradio sees them: closed schemas per component, files resolved.

Gradio reads, copies and downloads the files that an event names, and builds components from message parts that
describe one. So events are parsed here into closed models and serialised again: unknown fields are dropped, and a file
object holds a path inside the upload folder and no URL.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from llava_ray.deployments.chat_page.uploads import Uploads
from llava_ray.deployments.http.schema import MAX_MESSAGES, MAX_PARTS
from llava_ray.deployments.refusal import RefusalError, refuse

SESSION_CHARS = 64
_NAME_CHARS = 512

_ShortText = Annotated[str, Field(max_length=_NAME_CHARS)]
_SessionName = Annotated[str, Field(min_length=1, max_length=SESSION_CHARS, pattern=r"^[A-Za-z0-9_-]+$")]


class _KnownFields(BaseModel):
    """A model that ignores unknown fields, which the browser sends for its own use."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class FileObject(_KnownFields):
    """A file that the browser has uploaded, in Gradio's form. Its ``url`` is dropped: servers would fetch it."""

    path: str
    orig_name: _ShortText | None = None
    mime_type: _ShortText | None = None
    size: Annotated[int, Field(ge=0)] | None = None
    meta: Any = None

    def to_gradio(self, uploads: Uploads) -> dict[str, Any]:
        """Convert to Gradio's form. Raises RefusalError for a path outside the upload folder."""
        return {
            "path": str(uploads.resolve(self.path)),
            "url": None,
            "orig_name": self.orig_name,
            "mime_type": self.mime_type,
            "size": self.size,
            "is_stream": False,
            "meta": {"_type": "gradio.FileData"},
        }


class _PageText(_KnownFields):
    """A text of a message."""

    type: Literal["text"]
    text: str


class FilePart(_KnownFields):
    """An image of a message."""

    type: Literal["file"]
    file: FileObject


class _PageMessage(_KnownFields):
    """One message of the chatbot. Parts of other types, which would become components, are rejected."""

    role: Literal["user", "assistant"]
    content: (
        str
        | FileObject
        | Annotated[
            list[Annotated[_PageText | FilePart, Field(discriminator="type")]],
            Field(max_length=MAX_PARTS),
        ]
    )

    def to_gradio(self, uploads: Uploads) -> dict[str, Any]:
        """Convert to Gradio's form. Raises RefusalError."""
        parts: Sequence[Any] = self.content if isinstance(self.content, list) else [self.content]
        content: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, FileObject | FilePart):
                file = part.file if isinstance(part, FilePart) else part
                content.append({"type": "file", "file": file.to_gradio(uploads)})
            else:
                content.append({"type": "text", "text": part.text if isinstance(part, _PageText) else part})
        return {"role": self.role, "metadata": None, "content": content, "options": None}


class Box(_KnownFields):
    """The contents of the text box."""

    text: str | None = ""
    files: Annotated[list[FileObject], Field(max_length=MAX_PARTS)] = []

    def to_gradio(self, uploads: Uploads) -> dict[str, Any]:
        """Convert to Gradio's form. Raises RefusalError."""
        return {"text": self.text or "", "files": [file.to_gradio(uploads) for file in self.files]}


_History = Annotated[
    list[_PageMessage], Field(max_length=MAX_MESSAGES), BeforeValidator(lambda value: [] if value is None else value)
]

# The schema of each kind of component, by Gradio's names. Inputs of other kinds are rejected.
_FORMS: dict[str, TypeAdapter[Any]] = {
    "chatbot": TypeAdapter(_History),
    "multimodaltextbox": TypeAdapter(Box),
    "dropdown": TypeAdapter(_ShortText | None),
    "textbox": TypeAdapter(str | None),
    "slider": TypeAdapter(Annotated[float, Field(allow_inf_nan=False)]),
    "checkbox": TypeAdapter(bool),
}


class Event(_KnownFields):
    """The body of ``/gradio_api/queue/join``."""

    fn_index: int
    session_hash: _SessionName
    data: list[Any]
    trigger_id: int | None = None
    event_data: Any = None


class Cancel(_KnownFields):
    """The body of ``/gradio_api/cancel``."""

    fn_index: int
    session_hash: _SessionName
    event_id: _ShortText


class PageEvents:
    """Validates the events of one page's handlers."""

    def __init__(self, inputs: Mapping[int, Sequence[str]], uploads: Uploads) -> None:
        """Initialise with the kinds of each handler's components, by the handler's number."""
        self.inputs = inputs
        self.uploads = uploads

    def read(self, body: bytes) -> dict[str, Any]:
        """Return a validated event for Gradio. Raises RefusalError (400)."""
        event = parsed(TypeAdapter(Event), body)
        kinds = self.inputs.get(event.fn_index)
        if kinds is None or len(kinds) != len(event.data):
            raise _not_an_event("fn_index")
        data = [self.value(kind, value) for kind, value in zip(kinds, event.data, strict=True)]
        return {**event.model_dump(), "event_data": _selected(event.event_data), "data": data}

    def read_cancel(self, body: bytes) -> dict[str, Any]:
        """Return a validated cancellation for Gradio. Raises RefusalError (400)."""
        return parsed(TypeAdapter(Cancel), body).model_dump()

    def value(self, kind: str, value: Any) -> Any:
        """Return one validated input. Raises RefusalError."""
        if kind not in _FORMS:
            raise _not_an_event(kind)
        checked = parsed(_FORMS[kind], value)
        if isinstance(checked, list):
            return [message.to_gradio(self.uploads) for message in checked]
        return checked.to_gradio(self.uploads) if isinstance(checked, Box) else checked


def _selected(event_data: Any) -> dict[str, Any] | None:
    """Return the index of the selected item; its value is the server's, and is not taken from the browser."""
    index = event_data.get("index") if isinstance(event_data, dict) else None
    return {"index": index, "value": None} if type(index) is int else None


T = TypeVar("T")


def parsed(form: TypeAdapter[T], value: Any) -> T:
    """Parse a value or JSON. Raises RefusalError that names the field without repeating its value."""
    try:
        return form.validate_json(value) if isinstance(value, bytes) else form.validate_python(value)
    except ValidationError as error:
        place = ".".join(str(part)[:40] for part in error.errors(include_url=False, include_input=False)[0]["loc"])
        raise _not_an_event(place) from None


def _not_an_event(place: str) -> RefusalError:
    """Return the error for an event that no button of the page sends."""
    return refuse(400, f"not an event of this page ({place[:200]}); load the page again", "page_event", "data")
