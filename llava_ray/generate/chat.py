"""A chat with a model in memory: several turns, several images, streamed answers."""

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor

from llava_ray.chat.conversation import Turn, break_markers, with_markers
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.config.chat import ChatSettings
from llava_ray.config.data import MAX_IMAGE_PIXELS
from llava_ray.errors import RecordError
from llava_ray.generate.answer_text import AnswerText
from llava_ray.generate.decoding import decode, default_stops, expand_prompt, generate_batch
from llava_ray.images.anyres import Size
from llava_ray.images.geometry import crop_views
from llava_ray.images.processing import normalize_pixels
from llava_ray.images.reading import open_image, read_bytes
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.loading import load_pretrained_model


@dataclass(frozen=True)
class ChatReply:
    """The tokens of an answer, without its end token, and their text."""

    ids: list[int]
    text: str


@dataclass
class ChatSession:
    """The conversation so far; an interrupted answer is included as far as it was generated."""

    parts: LlavaParts
    max_new_tokens: int = 512
    temperature: float = 0.2
    turns: list[Turn] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    pending: list[Image.Image] = field(default_factory=list)
    """Images for the next question."""

    def show(self, place: str) -> None:
        """Add an image (a path or URL) to the next question. Raises ImageError."""
        self.pending.append(open_image(read_bytes(place), place, max_pixels=MAX_IMAGE_PIXELS))

    def clear(self) -> None:
        """Clear the conversation and its images."""
        self.turns, self.images, self.pending = [], [], []

    def ask(self, question: str, on_text: Callable[[str], None] = lambda piece: None) -> ChatReply:
        """Ask a question and return the answer; ``on_text`` receives it piece by piece.

        A question without markers gets one in front for each new image. KeyboardInterrupt ends the answer early, not
        the conversation. Raises RecordError if markers and images differ in number, or the conversation has become
        longer than the model's context.
        """
        images = [*self.images, *self.pending]
        turns = [*self.turns, Turn("human", with_markers(question, len(self.pending)))]
        prompt = tokenize_prompt(turns, self.parts.template, self.parts.tokenizer)
        spec, sizes = self.parts.image_spec, [image.size for image in images]
        views = [normalize_pixels(crop_views(image, spec), spec) for image in images]
        _check_positions(self.parts, len(expand_prompt(self.parts, prompt, sizes)), self.max_new_tokens)
        reply = self.write(prompt, torch.cat(views) if views else None, sizes, on_text)
        if reply.text:  # no template accepts an empty answer: without one the question is dropped
            self.turns, self.images, self.pending = [*turns, Turn("gpt", break_markers(reply.text))], images, []
        return reply

    def write(
        self,
        prompt: Sequence[int],
        pixels: Float32[Tensor, "n 3 h w"] | None,
        sizes: Sequence[Size],
        on_text: Callable[[str], None],
    ) -> ChatReply:
        """Generate the answer to a prompt; KeyboardInterrupt ends it early."""
        stops = default_stops(self.parts)
        text = AnswerText(functools.partial(decode, self.parts.tokenizer), (stops.text,) if stops.text else ())
        ids: list[int] = []
        pieces: list[str] = []

        def on_tokens(answers: Sequence[list[int]]) -> None:
            token = answers[0][-1]
            if token not in stops.ids:
                ids.append(token)
                add_piece(text.push(token))

        def add_piece(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        with suppress(KeyboardInterrupt):
            generate_batch(
                self.parts,
                [prompt],
                [pixels],
                image_sizes=[sizes],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                stops=stops,
                on_tokens=on_tokens,
            )
        add_piece(text.finish())
        return ChatReply(ids, "".join(pieces))


def load_session(settings: ChatSettings) -> ChatSession:
    """Load the model, on the GPU in bfloat16 if there is one, and add the images. Raises ModelError."""
    on_gpu = torch.cuda.is_available()
    parts = load_pretrained_model(
        settings.model,
        settings.model_base,
        vision_tower=settings.vision_tower,
        version=settings.version,
        bits=settings.bits,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        device="cuda" if on_gpu else "cpu",
    )
    session = ChatSession(parts, settings.max_new_tokens, settings.temperature)
    for place in settings.image:
        session.show(place)
    return session


def _check_positions(parts: LlavaParts, num_tokens: int, max_new_tokens: int) -> None:
    """Check that prompt and answer fit the language model's positions. Raises RecordError."""
    positions = parts.language_config.get_text_config().to_dict().get("max_position_embeddings")
    if positions is not None and num_tokens + max_new_tokens > positions:
        raise RecordError(
            f"the conversation has {num_tokens} tokens and an answer may take {max_new_tokens}, but the model reads "
            f"{positions}. Clear the conversation, or allow fewer new tokens.",
            reason="too_long",
        )
