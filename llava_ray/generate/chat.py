"""A conversation with a model: several turns, several images, answers heard while they are written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
import tyro
from PIL import Image

from llava_ray.chat.conversation import Turn, with_markers
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.config.lora import Bits
from llava_ray.config.sections import MAX_IMAGE_PIXELS
from llava_ray.errors import ConfigError, RecordError
from llava_ray.generate.answer_text import UNFINISHED
from llava_ray.generate.decoding import answer_text, expand_prompt, generate_batch
from llava_ray.images.geometry import crop_views
from llava_ray.images.processing import normalise
from llava_ray.images.reading import open_image, read_bytes
from llava_ray.model.bundle import LlavaParts
from llava_ray.model.loading import load_pretrained_model


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

    def load(self) -> "ChatSession":
        """Load the model, on the GPU in bfloat16 if there is one, and show it the images. Raises ModelError."""
        on_gpu = torch.cuda.is_available()
        parts = load_pretrained_model(
            self.model,
            self.model_base,
            vision_tower=self.vision_tower,
            version=self.version,
            bits=self.bits,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            device="cuda" if on_gpu else "cpu",
        )
        session = ChatSession(parts, self.max_new_tokens, self.temperature)
        for place in self.image:
            session.show(place)
        return session


@dataclass(frozen=True)
class Reply:
    """The new tokens of an answer, without the one that ended it, and their text."""

    ids: list[int]
    text: str


@dataclass
class ChatSession:
    """What has been said so far; of an interrupted answer, what it had come to."""

    parts: LlavaParts
    max_new_tokens: int = 512
    temperature: float = 0.2
    turns: list[Turn] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    pending: list[Image.Image] = field(default_factory=list)
    """Images that the next question shows."""

    def show(self, place: str) -> None:
        """Add an image (a path or URL) to the next question. Raises ImageError."""
        self.pending.append(open_image(read_bytes(place), place, max_pixels=MAX_IMAGE_PIXELS))

    def clear(self) -> None:
        """Begin anew."""
        self.turns, self.images, self.pending = [], [], []

    def ask(self, question: str, on_text: Callable[[str], None] = lambda piece: None) -> Reply:
        """Ask, and return the answer; ``on_text`` hears it piece by piece.

        A question without markers gets one in front for each new image. KeyboardInterrupt ends the answer early, not
        the conversation. Raises RecordError if markers and images differ in number, or the conversation has become
        longer than the model can read.
        """
        images = [*self.images, *self.pending]
        turns = [*self.turns, Turn("human", with_markers(question, len(self.pending)))]
        prompt = tokenize_prompt(turns, self.parts.template, self.parts.tokenizer)
        spec, sizes = self.parts.image_spec, [image.size for image in images]
        views = [normalise(crop_views(image, spec), spec) for image in images]
        check_room(self.parts, len(expand_prompt(self.parts, prompt, sizes)), self.max_new_tokens)
        writer = Writer(self.parts, on_text)
        try:
            [ids] = generate_batch(
                self.parts,
                [prompt],
                [torch.cat(views) if views else None],
                image_sizes=[sizes],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                on_tokens=lambda answers: writer.hear(answers[0]),
            )
        except KeyboardInterrupt:
            ids = writer.ids
        reply = Reply(ids, answer_text(self.parts, ids))
        writer.finish(reply.text)
        if reply.text:  # no template takes an empty answer: where nothing was said, nothing was asked
            self.turns, self.images, self.pending = [*turns, Turn("gpt", reply.text)], images, []
        return reply


class Writer:
    """Turns growing lists of tokens into pieces of text, never half a character."""

    def __init__(self, parts: LlavaParts, on_text: Callable[[str], None]) -> None:
        """Tell ``on_text`` each piece once."""
        self.parts = parts
        self.on_text = on_text
        self.ids: list[int] = []
        self.written = ""

    def hear(self, ids: Sequence[int]) -> None:
        """Write what the newest token adds, unless it may still change."""
        self.ids = list(ids)
        text = answer_text(self.parts, self.ids)
        stop = self.parts.template.stop
        if not text.endswith(UNFINISHED) and not any(text.endswith(stop[:end]) for end in range(1, len(stop))):
            self.finish(text)

    def finish(self, text: str) -> None:
        """Write what is left of the whole text."""
        if text.startswith(self.written):
            self.on_text(text.removeprefix(self.written))
            self.written = text


def check_room(parts: LlavaParts, num_tokens: int, max_new_tokens: int) -> None:
    """Raise RecordError if prompt and answer are longer than the language model has positions for."""
    positions = parts.language_config.get_text_config().to_dict().get("max_position_embeddings")
    if positions is not None and num_tokens + max_new_tokens > positions:
        raise RecordError(
            f"the conversation has {num_tokens} tokens and an answer may take {max_new_tokens}, but the model reads "
            f"{positions}. Clear the conversation, or allow fewer new tokens.",
            reason="too_long",
        )
