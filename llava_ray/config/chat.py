"""What `chat` can be told."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from llava_ray.config.lora import Bits
from llava_ray.errors import ConfigError


@dataclass(frozen=True)
class ChatSettings:
    """Talk with a LLaVA, or ask it one question with --prompt."""

    model: Annotated[str, tyro.conf.Positional]
    """Folder or hub id: a llava_ray bundle, LLaVA's original layout (LoRA and projector-only too), or llava-hf's."""
    image: tuple[str, ...] = ()
    """Images of the first question: files or URLs."""
    prompt: str | None = None
    """Ask only this. <image> says where an image stands; without it they stand in front."""
    max_new_tokens: int = 512
    """At most so many tokens an answer."""
    temperature: float = 0.2
    """0 takes the likeliest token each time."""
    json: bool = False
    """With --prompt: the last line is one JSON object with ids, the new tokens, and text."""
    model_base: str | None = None
    """Language model under an adapter or a projector, where the folder does not name it."""
    vision_tower: str | None = None
    """Vision tower, where the folder does not bring or name it."""
    version: str | None = None
    """Conversation template, where the folder does not say it."""
    bits: Bits | None = None
    """Of the language model's matrices, by default as it was trained; 8 and 4 need bitsandbytes."""

    def __post_init__(self) -> None:
        """Refuse what would be ignored."""
        if self.json and self.prompt is None:
            raise ConfigError("--json writes one answer: give the question with --prompt")
        if self.max_new_tokens < 1:
            raise ConfigError(f"--max_new_tokens {self.max_new_tokens}: expected at least 1")
