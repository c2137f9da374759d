"""Tasks that ask for no answer: how a request is read, or the features of texts and images."""

from dataclasses import dataclass
from typing import Literal

from llava_ray.generate.readings import Features


@dataclass(frozen=True)
class ReadingJob:
    """A wish of a task that asks for no answer; without texts and tokens, about its turns, prompt or images."""

    kind: Literal["tokenize", "detokenize", "embed"]
    texts: tuple[str, ...] = ()
    """Texts whose features are wanted, one vector each."""
    token_ids: tuple[tuple[int, ...], ...] = ()
    """The same as tokens, or the only list of tokens whose text is wanted."""
    features: Features = "language"
    add_special_tokens: bool = True
    field: str = "messages"
    """The field of the request that holds all this, for error messages."""
