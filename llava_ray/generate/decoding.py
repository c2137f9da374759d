"""Batched decoding: prompts left-padded and masked, one token for all rows at a time.

Greedy answers are those of each prompt alone: padding is masked, positions count from each prompt's own first token.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava_ray.chat.tokens import expand_images
from llava_ray.errors import ConfigError, ModelError
from llava_ray.generate.sampling import COLDEST, find_finite_rows, not_finite_error
from llava_ray.images.anyres import Size
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.blueprint import Blueprint

_STOP_WINDOW = 8  # tokens that are decoded to find a stop text longer than one token
_ANY_SIZE = (1, 1)  # of an image whose number of tokens does not depend on it


@dataclass(frozen=True)
class Stops:
    """End of an answer: any of these tokens, or this text (which some tokenizers split into several tokens)."""

    ids: frozenset[int]
    text: str = ""


@torch.inference_mode()
def generate_batch(  # noqa: PLR0913 - LLaVA's own arguments, and callbacks
    parts: LlavaParts,
    prompts: Sequence[Sequence[int]],
    pixels: Sequence[Float[Tensor, "_ 3 h w"] | None],
    *,
    max_new_tokens: int,
    image_sizes: Sequence[Sequence[Size]] | None = None,
    temperature: float = 0.0,
    stops: Stops | None = None,
    seed: int = 0,
    on_tokens: Callable[[Sequence[list[int]]], None] | None = None,
    extract: Callable[[Tensor], Tensor] | None = None,
) -> list[list[int]]:
    """Generate the token ids that follow each prompt, without the end token.

    A prompt has one -200 for each of its images (``chat.tokens.tokenize_prompt``), or one for each image token.
    ``pixels`` are the preprocessed views of its images, None for none; ``image_sizes`` their images' (width, height)
    before they were cut, which only anyres needs. Temperature 0 is greedy. ``on_tokens`` receives all answers so far
    after each step. ``extract`` computes features of all views together, for ``pixels`` of another form; default: the
    tower. Raises ConfigError for a negative temperature, ModelError or RecordError if a prompt's images and markers
    differ in number, ModelError for logits that are not finite.
    """
    if temperature < 0:
        raise ConfigError(f"temperature is {temperature}; expected 0 (greedy) or more.")
    if not prompts:
        return []
    stops = stops or default_stops(parts)
    rows = read_prompts(parts, prompts, pixels, image_sizes, extract)
    generator = torch.Generator(rows.logits.device).manual_seed(seed)
    answers: list[list[int]] = [[] for _ in prompts]
    unfinished = [True] * len(prompts)
    for step in range(max_new_tokens):
        _check_logits(rows, unfinished, step)
        tokens = _pick_tokens(rows.logits, temperature, generator)
        for index, token in zip(rows.indices, tokens.tolist(), strict=True):
            if unfinished[index]:
                answers[index].append(token)
                unfinished[index] = not has_ended(parts, answers[index], stops)
        if on_tokens is not None:
            on_tokens(answers)
        if step + 1 == max_new_tokens or not any(unfinished):
            break
        rows.advance(tokens, [unfinished[index] for index in rows.indices])
    return [answer[:-1] if answer and answer[-1] in stops.ids else answer for answer in answers]


def read_prompts(
    parts: LlavaParts,
    prompts: Sequence[Sequence[int]],
    pixels: Sequence[Float[Tensor, "_ 3 h w"] | None],
    image_sizes: Sequence[Sequence[Size]] | None = None,
    extract: Callable[[Tensor], Tensor] | None = None,
) -> "Rows":
    """Prefill prompts, as ``generate_batch`` takes them. Raises ModelError or RecordError as it does."""
    known = [None] * len(prompts) if image_sizes is None else image_sizes
    sizes = [find_sizes(parts, views, some) for views, some in zip(pixels, known, strict=True)]
    expanded = [expand_prompt(parts, ids, of_images) for ids, of_images in zip(prompts, sizes, strict=True)]
    input_ids, mask = _pad_left(expanded, parts.llava.language_model.device)
    views = [stack for stack in pixels if stack is not None and len(stack)]
    features = (extract or parts.tower.extract)(torch.cat(views)) if views else None
    embeddings = parts.llava.embed(input_ids, features, [size for of_images in sizes for size in of_images])
    return Rows(parts, embeddings, mask)


class Rows:
    """The unfinished answers: their cache, mask and next logits, one row each."""

    def __init__(self, parts: LlavaParts, embeddings: Float[Tensor, "b t d"], mask: Bool[Tensor, "b t"]) -> None:
        """Prefill the prompts."""
        self.language_model = parts.llava.language_model
        self.indices = list(range(len(mask)))
        self.mask = mask
        self.cache = DynamicCache(config=self.language_model.config)
        self._run(embeddings, (mask.cumsum(1) - 1).clamp(min=0))

    def advance(self, tokens: Int[Tensor, " b"], unfinished: list[bool]) -> None:
        """Feed each row its new token; drop finished rows once they are half of the batch."""
        if sum(unfinished) <= len(unfinished) // 2:
            remaining = torch.tensor([row for row, active in enumerate(unfinished) if active], device=tokens.device)
            self.indices = [self.indices[row] for row in remaining.tolist()]
            self.mask, tokens = self.mask[remaining], tokens[remaining]
            self.cache.batch_select_indices(remaining)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        embeddings = self.language_model.get_input_embeddings()(tokens[:, None])
        self._run(embeddings, self.mask.sum(1, keepdim=True) - 1)

    def _run(self, embeddings: Float[Tensor, "b t d"], position_ids: Int[Tensor, "b t"]) -> None:
        output = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=self.mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits: Tensor = output.logits[:, -1].float()


def default_stops(parts: LlavaParts) -> Stops:
    """Return the end tokens of tokenizer and model, and the text that ends an answer in the template."""
    return find_stops(parts, parts.llava.language_model.generation_config.eos_token_id)


def find_stops(model: Blueprint, declared: int | Sequence[int] | None) -> Stops:
    """Return a model's stops from its ``declared`` end tokens, without its weights."""
    ids = {model.tokenizer.eos_token_id, *([declared] if declared is None or isinstance(declared, int) else declared)}
    stop = model.template.stop
    known = model.tokenizer.get_vocab().get(stop)
    if known is not None:
        return Stops(frozenset({*ids, known} - {None}))
    return Stops(frozenset(ids - {None}), stop)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode tokens to text, without special ones."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def decode_with_marks(tokenizer: PreTrainedTokenizerBase, marks: Mapping[int, str], ids: Sequence[int]) -> str:
    """Decode tokens to text, without special ones but these marks."""
    pieces, start = [], 0
    for place, token in enumerate(ids):
        if token in marks:
            pieces += [decode(tokenizer, ids[start:place]), marks[token]]
            start = place + 1
    return "".join([*pieces, decode(tokenizer, ids[start:])])


def answer_text(parts: LlavaParts, ids: Sequence[int]) -> str:
    """Decode an answer, without special tokens and without what follows the template's stop text.

    Where the stop is an added token, an answer that spells it in other tokens is quoting it.
    """
    text = decode(parts.tokenizer, ids)
    stop = parts.template.stop
    return (text.partition(stop)[0] if stop and stop not in parts.tokenizer.get_added_vocab() else text).strip()


def find_sizes(
    parts: LlavaParts, views: Float[Tensor, "_ 3 h w"] | None, image_sizes: Sequence[Size] | None
) -> list[Size]:
    """Return the size of each image of a prompt; any size for single views. Raises ModelError."""
    num_views, tokens = 0 if views is None else len(views), parts.image_tokens
    if image_sizes is not None:
        expected = sum(tokens.num_views(*size) for size in image_sizes)
        if expected != num_views:
            raise ModelError(
                f"{num_views} views were given, but images of {list(image_sizes)} pixels are cut into {expected}; give "
                "image_sizes as (width, height) of each image before it was cut, and all its views."
            )
        return list(image_sizes)
    if num_views and tokens.grid_pinpoints:
        raise ModelError(
            f"{num_views} views were given without image_sizes, so they cannot be assigned to images; with anyres give "
            "the (width, height) of each image before it was cut."
        )
    return [_ANY_SIZE] * num_views


def expand_prompt(parts: LlavaParts, ids: Sequence[int], image_sizes: Sequence[Size]) -> list[int]:
    """Repeat each -200 by its image's number of tokens, unless done already. Raises RecordError."""
    counts = [parts.image_tokens.count(*size) for size in image_sizes]
    if ids.count(IMAGE_TOKEN_INDEX) == sum(counts):
        return list(ids)
    return expand_images(ids, [IGNORE_INDEX] * len(ids), counts)[0]


def _pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Int[Tensor, "b t"], Bool[Tensor, "b t"]]:
    """Return the prompts left-padded in one tensor, and their mask. The padding's id is never read."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    starts = torch.tensor([[width - len(prompt)] for prompt in prompts], device=device)
    return torch.tensor(ids, device=device), torch.arange(width, device=device) >= starts


def _check_logits(rows: Rows, unfinished: Sequence[bool], step: int) -> None:
    """Check that the logits of unfinished answers are finite. Raises ModelError."""
    for index, finite in zip(rows.indices, find_finite_rows(rows.logits), strict=True):
        if unfinished[index] and not finite:
            raise not_finite_error(f"token {step + 1} of the answer to prompt {index + 1} of {len(unfinished)}")


def _pick_tokens(logits: Float[Tensor, "b vocab"], temperature: float, generator: torch.Generator) -> Int[Tensor, " b"]:
    """Return the most likely token of each row, or a sampled one."""
    if temperature < COLDEST:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)


def has_ended(parts: LlavaParts, answer: list[int], stops: Stops) -> bool:
    """Return whether the newest token completes an answer."""
    if answer[-1] in stops.ids:
        return True
    return bool(stops.text) and stops.text in str(parts.tokenizer.decode(answer[-_STOP_WINDOW:]))
