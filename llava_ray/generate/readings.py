"""Results of requests that ask for no answer: tokens, texts and features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from llava_ray.generate.engine import GenerationRequest

Features = Literal["language", "projector", "tower"]


@dataclass(frozen=True)
class PromptReading:
    """What a request was read as, if it asks for no answer."""

    token_ids: tuple[int, ...] = ()
    token_texts: tuple[str, ...] = ()
    """As they stand in the vocabulary."""
    text: str = ""
    vector: bytes = b""
    """Features in fp32, little-endian."""


@runtime_checkable
class ReadsPrompts(Protocol):
    """An engine that says how it reads a request, without answering it."""

    async def read_prompt(self, request: "GenerationRequest") -> PromptReading:
        """Return the tokens of a request, those of its images included. Raises RecordError."""
        ...

    async def read_ids(self, token_ids: Sequence[int], model: str | None, field: str) -> str:
        """Return the text of tokens of the base, or of an adapter.

        Raises RecordError about ``field`` of the request for tokens out of range.
        """
        ...
