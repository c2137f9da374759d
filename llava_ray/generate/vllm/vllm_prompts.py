"""Preparation of requests for vLLM: our token ids with its image token, images, and its sampling parameters."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from llava_ray.chat.conversation import IMAGE_TOKEN_INDEX
from llava_ray.config.data import MAX_IMAGE_PIXELS
from llava_ray.errors import RecordError
from llava_ray.generate.constraints.answer_grammar import AnswerGrammar
from llava_ray.generate.decoding import Stops, find_stops
from llava_ray.generate.engine import GenerationRequest, Sampling
from llava_ray.generate.prompts import PromptText
from llava_ray.generate.vision_cache import image_key
from llava_ray.generate.vllm.vllm_model import VllmModel
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.views import OpenedImage, open_views
from llava_ray.model.blueprint import Blueprint


@dataclass(frozen=True)
class VllmPrompt:
    """The arguments of ``AsyncLLM.generate``, and the stops of the answer."""

    inputs: dict[str, Any]
    params: Any
    stops: Stops
    stop_texts: tuple[str, ...]
    grammar: AnswerGrammar | None = None
    """What the answer may be; vLLM holds it, and here it only decodes the answer."""
    decode: Callable[[Sequence[int]], str] | None = None
    """Decodes an answer that may call tools; None for the tokenizer's own way."""
    text_ids: Sequence[int] = ()
    """Its ids, with one -200 for each image."""
    image_token: int | None = None
    """The id in the place of images in vLLM's own ids."""


class VllmPrompts(PromptText):
    """Builds prompts for a model, or one of its adapters."""

    def __init__(self, blueprint: Blueprint, model: VllmModel, max_model_len: int) -> None:
        """Initialise with the blueprint of the base or an adapter."""
        super().__init__(blueprint, find_stops(blueprint, sorted(model.stops.ids)), max_model_len)
        self.image_token = model.image_token

    @property
    def view_spec(self) -> ImageSpec | None:
        """Return our image settings, whose views vLLM keeps unchanged; None for anyres, where it cuts tiles itself."""
        spec = self.model.image_spec
        return None if spec.aspect_ratio == "anyres" else spec

    def make(self, request: GenerationRequest) -> VllmPrompt:
        """Tokenise a request and open its images here. Raises RecordError (ImageError for an image)."""
        short = self.read(request)
        opened = [
            open_views(data, f"image {number}", max_pixels=MAX_IMAGE_PIXELS, spec=self.view_spec)
            for number, data in enumerate(request.images, start=1)
        ]
        return self.finish(request, short, opened)

    def finish(self, request: GenerationRequest, short: Sequence[int], opened: Sequence[OpenedImage]) -> VllmPrompt:
        """Build the prompt of a request from its ids and opened images. Raises RecordError."""
        if self.image_token in short:
            raise RecordError(
                "the prompt contains the image token as text; expected an image there.", reason="image_count"
            )
        ids = [self.image_token if token == IMAGE_TOKEN_INDEX else token for token in short]
        num_image_tokens = sum(self.model.image_tokens.count(*image.size) for image in opened)
        self.check_length(len(ids) - len(opened) + num_image_tokens, request.sampling.max_tokens)
        inputs: dict[str, Any] = {"prompt_token_ids": ids}
        if opened:
            inputs["multi_modal_data"] = {"image": [as_image(image) for image in opened]}
            inputs["multi_modal_uuids"] = {"image": [image_key(data) for data in request.images]}
        stops, texts = self.find_stops(request)
        grammar = self.make_grammar(request)
        if grammar is not None:
            stops = replace(stops, ids=self.keep_special(stops.ids))
        params = _sampling_params(request.sampling, stops, None if grammar is None else grammar.text)
        return VllmPrompt(inputs, params, stops, texts, grammar, self.tools.decoder(request), short, self.image_token)

    def keep_special(self, ids: Collection[int]) -> frozenset[int]:
        """Return the stop tokens that are no text, and the one with which vLLM's grammars end.

        The grammars take all other tokens for words of the answer.
        """
        tokenizer = self.model.tokenizer
        return frozenset(ids) & frozenset(tokenizer.added_tokens_decoder) | {tokenizer.eos_token_id}


def as_image(opened: OpenedImage) -> Image.Image:
    """Convert the single view of an image, or the whole image, for vLLM."""
    pixels = opened.pixels
    return Image.fromarray(pixels if pixels.ndim == 3 else pixels[0].transpose(1, 2, 0).copy())


def _sampling_params(sampling: Sampling, stops: Stops, grammar: str | None = None) -> Any:
    """Build vLLM's SamplingParams; detokenisation and stops are ours (``vllm_answer``). Raises RecordError."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    try:
        return SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
            min_p=sampling.min_p,
            logit_bias=dict(sampling.logit_bias) or None,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logprobs=sampling.logprobs,
            prompt_logprobs=sampling.prompt_logprobs,
            ignore_eos=True,  # only our own stop tokens end an answer
            structured_outputs=None if grammar is None else StructuredOutputsParams(grammar=grammar),
            stop_token_ids=sorted(stops.ids),
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
    except VLLMClientError as error:  # vLLM has its own limits, such as temperatures up to 2
        raise RecordError(f"vLLM rejects the request: {error}", reason="sampling") from error
