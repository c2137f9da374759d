"""Preparation of requests for the model: token ids, and images as pixels or as cached embeddings."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import jinja2
from jaxtyping import Float32
from torch import Tensor

from llava_ray.chat.conversation import IGNORE_INDEX
from llava_ray.chat.prompt_ends import CONTINUED
from llava_ray.chat.template import Template
from llava_ray.chat.tokens import expand_images, tokenize_prompt, tokenizer_image_token
from llava_ray.config.data import MAX_IMAGE_PIXELS
from llava_ray.errors import RecordError, TemplateError
from llava_ray.generate.answer_text import AnswerText
from llava_ray.generate.constraints.answer_grammar import AnswerGrammar
from llava_ray.generate.constraints.answer_start import begin_answer, find_lead
from llava_ray.generate.constraints.call_grammars import call_constraint
from llava_ray.generate.constraints.compiling import GrammarCompiler
from llava_ray.generate.decoding import Stops, default_stops
from llava_ray.generate.engine import Constraint, GenerationRequest
from llava_ray.generate.image_places import PromptImage, place_prompt_images
from llava_ray.generate.logit_edits import check_biased_tokens
from llava_ray.generate.model_tools import ModelTools, find_offered
from llava_ray.generate.readings import check_token_ids
from llava_ray.generate.sampling import check_sampling
from llava_ray.generate.vision_cache import VisionCache, image_key
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.processing import normalize_pixels
from llava_ray.images.views import OpenedImage, open_views
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.blueprint import Blueprint

P = TypeVar("P", bound="PromptText")


@dataclass
class Prompt:
    """The model's input for one request, and the stops of its answer."""

    ids: list[int]
    images: list[PromptImage]
    stops: Stops
    stop_texts: tuple[str, ...]
    num_cached_images: int = field(default=0)
    grammar: AnswerGrammar | None = None
    """What the answer may be; None for any text."""
    decode: Callable[[Sequence[int]], str] | None = None
    """Decodes an answer that may call tools; None for the tokenizer's own way."""

    def answer_text(self, decode: Callable[[Sequence[int]], str], request: GenerationRequest) -> AnswerText:
        """Return an empty answer to a request; ``decode`` is the tokenizer's own way."""
        return begin_answer(self, decode, request, self.ids)


@dataclass(frozen=True)
class BegunPrompt:
    """A request before its images are decoded."""

    short: list[int]
    """Its ids, with one -200 for each image."""
    keys: list[str]
    known: list[Float32[Tensor, "_ d"] | None]
    """Cached embeddings of the images; None for new images."""

    @property
    def unknown(self) -> list[int]:
        """Return the indices of images that are not cached."""
        return [index for index, known in enumerate(self.known) if known is None]


class PromptText:
    """Tokenisation of requests to one model or adapter, without its weights. Thread-safe."""

    def __init__(self, model: Blueprint, stops: Stops, max_model_len: int) -> None:
        """Initialise with the model's own ``stops``; ``max_model_len`` bounds prompt and answer together."""
        self.model = model
        self.max_model_len = max_model_len
        self.limit_reason = ""
        """What bounds ``max_model_len``, where it is not the model."""
        self.stops = stops
        self.grammars = GrammarCompiler(model.tokenizer, stops.ids)
        self.tools = ModelTools(model)

    def read(self, request: GenerationRequest) -> list[int]:
        """Return a request's ids with one -200 for each image. Raises RecordError for an invalid request."""
        check_sampling(request.sampling)
        if request.sampling.logit_bias:
            check_biased_tokens(request.sampling, *self.known_tokens)
        if find_offered(request):
            self.tools.format()
        short = self.tokenize(request)
        if not short:
            raise RecordError("the prompt has no tokens; expected at least one.", reason="empty_prompt")
        # Before any image is opened: a long prompt costs nothing.
        self.check_length(len(short), request.sampling.max_tokens)
        expand_images(short, [IGNORE_INDEX] * len(short), [1] * len(request.images))
        return short

    def tokenize(self, request: GenerationRequest) -> list[int]:
        """Return the ids with one -200 for each image. Raises RecordError."""
        if (request.prompt is not None) + bool(request.turns) + bool(request.prompt_ids) != 1:
            raise RecordError("expected either turns or a prompt, and not both.", reason="turns")
        if request.prompt is not None and request.continue_final_message:
            raise RecordError("a prompt has no last message to continue.", reason="turns", field=CONTINUED)
        if request.prompt_ids:
            check_token_ids(request.prompt_ids, len(self.model.tokenizer), "prompt")
            return list(request.prompt_ids)
        if request.prompt is not None:
            # Without a template control tokens are allowed: the whole prompt is the client's own, as in vLLM.
            ids = tokenizer_image_token(request.prompt, self.model.tokenizer)
            assert isinstance(ids, list)
            return ids
        try:
            template = self.template(request.system)
        except TemplateError as error:
            raise RecordError(str(error), reason="system_prompt") from error
        try:
            return tokenize_prompt(request.turns, template, self.model.tokenizer, end=request.prompt_end)
        except jinja2.TemplateError as error:  # raised by the template itself, with its own message
            raise RecordError(f"the model's chat template rejects the messages: {error}", reason="turns") from error
        except TemplateError as error:
            raise RecordError(str(error), reason="template") from error

    @functools.cached_property
    def known_tokens(self) -> tuple[int, frozenset[int]]:
        """Return the size of the model's vocabulary, and the tokenizer's ids."""
        num_rows = self.model.language_config.get_text_config().vocab_size
        return max(num_rows, *(token + 1 for token in self.model.new_token_ids), 0), frozenset(
            self.model.tokenizer.get_vocab().values()
        )

    def find_constraint(self, request: GenerationRequest) -> Constraint | None:
        """Return what the answer may be; None for any text. Raises RecordError."""
        tools = find_offered(request)
        if not tools or request.tool_choice.mode == "auto":
            return request.sampling.constraint
        return call_constraint(json.loads(tools), request.tool_choice, self.tools.format(), self.tools.mark_tokens())

    def make_grammar(self, request: GenerationRequest) -> AnswerGrammar | None:
        """Compile what the answer may be; takes up to seconds. Raises RecordError for what cannot be held."""
        if (constraint := self.find_constraint(request)) is None:
            return None
        lead = find_lead(self.model.template, request, constraint)
        return AnswerGrammar(self.grammars.grammar(constraint, lead), self.grammars, constraint.field, lead)

    def template(self, system: str | None) -> Template:
        """Return the model's template, with another system prompt where one is given. Raises TemplateError."""
        template = self.model.template
        return template if system is None else template.with_system(system)

    def find_stops(self, request: GenerationRequest) -> tuple[Stops, tuple[str, ...]]:
        """Return the tokens and texts that end the answer of a request.

        A stop text that is a single token (``<|im_end|>``) is not decoded when it appears as that token; a model may
        still spell it in several others.
        """
        added = self.model.tokenizer.get_added_vocab()
        texts = list(request.sampling.stop)
        ids = {added[stop] for stop in texts if stop in added}
        stops = replace(self.stops, ids=frozenset(ids))
        is_held = self.find_constraint(request) is not None  # the grammar decides where the answer may end
        if is_held or not request.sampling.ignore_eos:
            stops = replace(stops, ids=frozenset(ids | self.stops.ids))
            texts += [self.stops.text] if self.stops.text and request.prompt is None and not is_held else []
        return stops, tuple(texts)

    def check_length(self, num_tokens: int, max_tokens: int) -> None:
        """Check that prompt and answer fit the engine's context. Raises RecordError."""
        if num_tokens + max_tokens > self.max_model_len:
            raise RecordError(
                f"the prompt has {num_tokens} tokens and max_tokens is {max_tokens}, but this engine holds "
                f"{self.max_model_len} tokens of prompt and answer together{self.limit_reason}. Shorten the "
                "conversation, or request fewer new tokens.",
                reason="too_long",
            )


class PromptMaker(PromptText):
    """Builds prompts for one model, or one adapter, in memory."""

    def __init__(self, parts: LlavaParts, cache: VisionCache, max_model_len: int, projector: str = "") -> None:
        """Initialise for a model; ``projector`` distinguishes the keys of several projectors in one cache."""
        super().__init__(parts, default_stops(parts), max_model_len)
        self.parts = parts
        self.cache = cache
        self.projector = projector

    @property
    def view_spec(self) -> ImageSpec:
        """Return the image settings with which a decoder prepares views for ``finish``."""
        return self.parts.image_spec

    def make(self, request: GenerationRequest) -> Prompt:
        """Tokenise and preprocess a request, and decode its images here.

        Raises RecordError (ImageError for an image) for an invalid request.
        """
        begun = self.begin(request)
        opened = [
            open_views(request.images[index], f"image {index + 1}", max_pixels=MAX_IMAGE_PIXELS, spec=self.view_spec)
            for index in begun.unknown
        ]
        return self.finish(request, begun, opened)

    def begin(self, request: GenerationRequest) -> BegunPrompt:
        """Tokenise a request and look up its images in the cache. Raises RecordError."""
        short = self.read(request)
        keys = [f"{image_key(data)}{self.projector}" for data in request.images]
        return BegunPrompt(short, keys, [self.cache.find(key) for key in keys])

    def finish(self, request: GenerationRequest, begun: BegunPrompt, opened: Sequence[OpenedImage]) -> Prompt:
        """Build the prompt; ``opened`` are its images that are not cached. Raises RecordError."""
        new = iter(opened)
        images = [
            PromptImage(key, len(known), self.parts.llava, self.parts.tower, embeddings=known)
            if known is not None
            else self.prepare(key, next(new))
            for key, known in zip(begun.keys, begun.known, strict=True)
        ]
        counts = [image.num_tokens for image in images]
        ids = expand_images(begun.short, [IGNORE_INDEX] * len(begun.short), counts)[0]
        self.check_length(len(ids), request.sampling.max_tokens)
        place_prompt_images(ids, images)
        stops, texts = self.find_stops(request)
        num_cached = sum(image.embeddings is not None for image in images)
        return Prompt(ids, images, stops, texts, num_cached, decode=self.tools.decoder(request))

    def prepare(self, key: str, opened: OpenedImage) -> PromptImage:
        """Return a new image with preprocessed views."""
        count = self.parts.image_tokens.count(*opened.size)
        views = normalize_pixels(opened.pixels, self.parts.image_spec)
        return PromptImage(key, count, self.parts.llava, self.parts.tower, opened.size, views)


def find_prompt_maker(prompts: Mapping[str | None, P], name: str | None) -> P:
    """Return the prompt maker of an adapter, the base's for None. Raises RecordError."""
    if name not in prompts:
        known = ", ".join(repr(other) for other in prompts if other is not None) or "its base only"
        raise RecordError(f"there is no adapter {name!r} here; this engine serves {known}.", reason="model")
    return prompts[name]
