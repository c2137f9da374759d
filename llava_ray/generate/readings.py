"""Results of requests that ask for no answer: tokens, texts and features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from llava_ray.chat.conversation import IMAGE_TOKEN_INDEX
from llava_ray.errors import RecordError

if TYPE_CHECKING:
    from llava_ray.generate.engine import GenerationRequest

Features = Literal["language", "projector", "tower"]


@dataclass(frozen=True)
class PromptReading:
    """The result of a request that asks for no answer."""

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


def check_token_ids(token_ids: Sequence[int], num_tokens: int, field: str) -> None:
    """Check that tokens are among a tokenizer's ``num_tokens``. Raises RecordError about ``field`` of the request."""
    for place, token in enumerate(token_ids):
        if not 0 <= token < num_tokens:
            hint = " (-200 stands for an image's feature, which has no text)" if token == IMAGE_TOKEN_INDEX else ""
            raise RecordError(
                f"token {place + 1} is {token}; this model has tokens from 0 to {num_tokens - 1}{hint}.",
                reason="tokens",
                field=field,
            )
