"""Settings of a chat in the terminal."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from llava_ray.config.lora import Bits
from llava_ray.errors import ConfigError


@dataclass(frozen=True)
class ChatSettings:
    """Chat with a LLaVA, or ask it one question with --prompt."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id: a llava_ray bundle, LLaVA's original layout (LoRA and projector-only too), or llava-hf's."""
    image: tuple[str, ...] = ()
    """Images of the first question: files or URLs."""
    prompt: str | None = None
    """Ask only this question. <image> marks the place of an image; without it the images come first."""
    max_new_tokens: int = 512
    """Maximum length of an answer in tokens."""
    temperature: float = 0.2
    """Sampling temperature; 0 decodes greedily."""
    json: bool = False
    """With --prompt: print one JSON object with the new tokens' ids and the text as the last line."""
    model_base: str | None = None
    """Language model under an adapter or a projector, where the folder does not name it."""
    vision_tower: str | None = None
    """Vision tower, where the folder neither holds nor names it."""
    version: str | None = None
    """Conversation template, where the folder does not record it."""
    bits: Bits | None = None
    """Bits of the language model's matrices; default: as it was trained. 8 and 4 need bitsandbytes."""

    def __post_init__(self) -> None:
        """Reject settings that would be ignored."""
        if self.json and self.prompt is None:
            raise ConfigError("--json writes one answer: give the question with --prompt")
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max_new_tokens {self.max_new_tokens}: expected at least 1")
