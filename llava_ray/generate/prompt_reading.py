"""Reading of prompts without an answer: the tokens of a request, and the text of tokens."""

import asyncio
import functools
from collections.abc import Sequence
from concurrent.futures import Executor

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava_ray.chat.tokens import expand_images
from llava_ray.config.data import MAX_IMAGE_PIXELS
from llava_ray.generate.engine import GenerationRequest
from llava_ray.generate.prompts import PromptText
from llava_ray.generate.readings import PromptReading, check_token_ids
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.views import ImageDecoder, OpenedImage, open_views


async def decode_images(
    images: Sequence[bytes],
    spec: ImageSpec | None,
    decoder: ImageDecoder | None,
    executor: Executor,
    *,
    only: Sequence[int] | None = None,
) -> list[OpenedImage]:
    """Decode a request's images, or those at the indices ``only``; in a thread where there is no decoder.

    One by one, so that no request occupies every decoder. Raises ImageError.
    """
    loop, opened = asyncio.get_running_loop(), []
    for index in range(len(images)) if only is None else only:
        name, data = f"image {index + 1}", images[index]
        if decoder is None:
            opening = functools.partial(open_views, data, name, max_pixels=MAX_IMAGE_PIXELS, spec=spec)
            opened.append(await loop.run_in_executor(executor, opening))
        else:
            opened.append(await decoder.open_views(data, name, max_pixels=MAX_IMAGE_PIXELS, spec=spec))
    return opened


def read_tokens(prompts: PromptText, request: GenerationRequest, opened: Sequence[OpenedImage]) -> PromptReading:
    """Return the tokens of a request of any length, with one -200 for each feature of an image. Raises RecordError."""
    tokenizer = prompts.model.tokenizer
    if request.prompt is not None and not request.add_special_tokens:
        short: list[int] = tokenizer(request.prompt, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        short = prompts.tokenize(request)
    counts = [prompts.model.image_tokens.count(*image.size) for image in opened]
    ids = expand_images(short, [IGNORE_INDEX] * len(short), counts)[0]
    texts = tokenizer.convert_ids_to_tokens([0 if token == IMAGE_TOKEN_INDEX else token for token in ids])
    assert isinstance(texts, list)
    spelt = (IMAGE_TOKEN if token == IMAGE_TOKEN_INDEX else text for token, text in zip(ids, texts, strict=True))
    return PromptReading(tuple(ids), tuple(spelt))


def read_text(prompts: PromptText, token_ids: Sequence[int], field: str) -> str:
    """Return the text of tokens, control tokens included. Raises RecordError for tokens that the model has not."""
    check_token_ids(token_ids, len(prompts.model.tokenizer), field)
    text = prompts.model.tokenizer.decode(list(token_ids), skip_special_tokens=False)
    assert isinstance(text, str)
    return text
