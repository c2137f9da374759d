"""One forward pass for many requests: the next token of those that write, pieces of prompts of those that join."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from llava_ray.errors import ModelError
from llava_ray.generate.builtin import row_attention
from llava_ray.generate.builtin.kv_cache import SHORTEST, CacheSlot, KvCache
from llava_ray.generate.builtin.row_attention import BatchStep, NextTokens, PromptChunk, TokenSpan
from llava_ray.generate.row_adapters import AdapterName, RowAdapters
from llava_ray.generate.sampling import not_finite
from llava_ray.model.lora.adapters import measure_drift
from llava_ray.model.network.quantization import find_dtype

_PROBE_LENGTH = 12
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}  # of the logits' spread


@dataclass(frozen=True)
class Placed:
    """Embeddings of an image that take the place of tokens: those from ``first`` to ``last`` of a line."""

    first: int
    last: int
    embeddings: Float[Tensor, "t d"]


@dataclass(frozen=True)
class SequenceInput:
    """What a step is to do for one request: read these ids after the ``start`` tokens of its row.

    Ids of image positions are never looked at; their embeddings are ``images``, in places counted from the first id.
    """

    row: CacheSlot
    start: int
    ids: Sequence[int]
    wants_next: bool = True
    """Whether a token is to follow; not within a prompt."""
    is_prompt: bool = False
    images: Sequence[Placed] = field(default=())
    adapter: AdapterName = None
    """Whose adapter these tokens go through."""


class RowModel:
    """A language model that reads lines of tokens of many requests, each over its own row of the cache."""

    def __init__(self, language_model: PreTrainedModel, adapters: RowAdapters | None = None) -> None:
        """Take the model over: until ``give_back`` its attention knows rows and nothing else.

        ``adapters`` are those that lie over it. Raises ModelError for a model that cannot be batched.
        """
        self.language_model = language_model
        self.adapters = adapters
        self.embed = language_model.get_input_embeddings()
        self.device = language_model.device
        self._attention = language_model.config._attn_implementation
        self.cache_bytes = 0
        """Memory of keys and values of one token."""
        try:
            language_model.set_attn_implementation(row_attention.NAME)
        except ValueError as error:
            raise ModelError(
                f"{language_model.config.name_or_path}: the attention of {type(language_model).__name__} cannot be "
                f"replaced, so its requests cannot be batched ({error}). Serve it with another engine."
            ) from error
        try:
            self.check()
        except BaseException:
            self.give_back()
            raise

    def give_back(self) -> None:
        """Leave the model as it was."""
        self.language_model.set_attn_implementation(self._attention)

    @torch.inference_mode()
    def check(self) -> None:
        """Compare with the model's own attention on a fixed text, and see what keys and values a token takes.

        Raises ModelError for a model that keeps more of what it has read than keys and values, or attends in a way of
        its own.
        """
        model, device = self.language_model, self.device
        ids = torch.linspace(0, model.config.get_text_config().vocab_size - 1, _PROBE_LENGTH).long().tolist()
        model.set_attn_implementation(self._attention)
        if self.adapters is not None:  # the base may have one of its own
            self.adapters.choose_one(None, _PROBE_LENGTH)
        expected = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -2:].float()
        if not bool(expected.isfinite().all()):
            raise not_finite(f"what {model.config.name_or_path} makes of a fixed text")
        model.set_attn_implementation(row_attention.NAME)
        cache = KvCache(2 * SHORTEST)
        first, row = cache.reserve(1), cache.reserve(_PROBE_LENGTH)
        assert first is not None
        assert row is not None
        self.run([SequenceInput(row, 0, ids[:5], wants_next=False, is_prompt=True)])
        works = [SequenceInput(row, 5, ids[5:-1], is_prompt=True), SequenceInput(first, 0, ids[:3], is_prompt=True)]
        wanted, logits = self.run(works)
        found = [logits[wanted.index(0)], self.run([SequenceInput(row, _PROBE_LENGTH - 1, ids[-1:])])[1][0]]
        drift = measure_drift(torch.stack(found), expected)
        layers = row.shelf.layers.values()
        self.cache_bytes = sum(part[0, :, 0].nbytes for layer in layers for part in (layer.keys, layer.values))
        if not drift <= _PROBE_TOLERANCE[find_dtype(model)]:
            raise ModelError(
                f"{model.config.name_or_path}: {type(model).__name__} in a batch does not say what it says alone "
                f"(logits of a fixed text differ by {drift:.2g} of their spread). Serve it with another engine."
            )

    @torch.inference_mode()
    def run(self, works: Sequence[SequenceInput]) -> tuple[list[int], Float[Tensor, "n vocab"]]:
        """Read all of it in one pass; return which works want a token to follow, and the fp32 logits of these."""
        order = sorted(range(len(works)), key=lambda place: _place_in_line(works[place]))
        line = [works[place] for place in order]
        ids: list[int] = [0 if token < 0 else token for work in line for token in work.ids]
        embedded: Tensor = self.embed(torch.tensor(ids, device=self.device)[None])
        step = self._plan(line, embedded)
        first = 0
        for work in line:
            for image in work.images:
                embedded[0, first + image.first : first + image.last] = image.embeddings
            first += len(work.ids)
        if self.adapters is not None:
            self.adapters.choose([work.adapter for work in line], [len(work.ids) for work in line], step.last)
        output = self.language_model(
            inputs_embeds=embedded,
            position_ids=step.positions,
            use_cache=False,
            logits_to_keep=step.last,
            step=step,
        )
        wanted = [place for place in order if works[place].wants_next]
        return wanted, output.logits[0].float()

    def _plan(self, line: Sequence[SequenceInput], like: Tensor) -> BatchStep:
        parts: list[NextTokens | PromptChunk] = []
        positions: list[int] = []
        last: list[int] = []
        for (is_prompt, _), together in groupby(line, key=lambda work: (work.is_prompt, id(work.row.shelf))):
            first, works = len(positions), list(together)
            for work in works:
                if is_prompt:
                    parts.append(PromptChunk(TokenSpan(work.row, work.start, len(work.ids)), len(positions)))
                positions += range(work.start, work.start + len(work.ids))
                if work.wants_next:
                    last.append(len(positions) - 1)
            if not is_prompt:
                spans = [TokenSpan(work.row, work.start, 1) for work in works]
                parts.append(NextTokens(works[0].row.shelf, spans, first, like))
        places = torch.tensor(positions, device=like.device)
        return BatchStep(parts, places[None], torch.tensor(last, device=like.device, dtype=torch.long))


def _place_in_line(work: SequenceInput) -> tuple[bool, int, int]:
    return work.is_prompt, work.row.shelf.length, work.row.index
