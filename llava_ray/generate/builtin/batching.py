"""One forward pass for many requests: the next token of decoding requests, prompt chunks of new ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from llava_ray.errors import ModelError
from llava_ray.generate.builtin import row_attention
from llava_ray.generate.builtin.kv_cache import SHORTEST, CacheSlot, KvCache
from llava_ray.generate.builtin.plain_layers import PlainLayers, has_plain_layers
from llava_ray.generate.builtin.row_attention import BatchStep, NextTokens, PromptChunk, TokenSpan
from llava_ray.generate.row_adapters import AdapterName, RowAdapters
from llava_ray.generate.sampling import not_finite_error
from llava_ray.model.lora.adapters import measure_drift
from llava_ray.model.network.int8_linear import has_int8_weights
from llava_ray.model.network.quantization import find_dtype

_PROBE_LENGTH = 12
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}  # of the logits' spread


@dataclass(frozen=True)
class ImageSpan:
    """Embeddings of an image that replace the tokens from ``first`` to ``last`` of a sequence."""

    first: int
    last: int
    embeddings: Float[Tensor, "t d"]


@dataclass(frozen=True)
class SequenceInput:
    """One request's input of a step: these ids, after the ``start`` tokens in its cache slot.

    Ids at image positions are ignored; their embeddings are ``images``, at positions counted from the first id.
    """

    row: CacheSlot
    start: int
    ids: Sequence[int]
    num_wanted: int = 1
    """How many of the last tokens' logits to compute: 0 before the end of a prompt, more than 1 to check a draft."""
    is_prompt: bool = False
    """Whether there may be several ids: part of a prompt, or an answer's next token with a draft."""
    images: Sequence[ImageSpan] = field(default=())
    adapter: AdapterName = None
    """The adapter of these tokens."""
    wants_states: bool = False
    """Whether the states of the wanted tokens are needed besides their logits."""


class RowModel:
    """A language model over flattened batches: tokens of many requests, each attending to its own cache slot."""

    def __init__(self, language_model: PreTrainedModel, adapters: RowAdapters | None = None) -> None:
        """Replace the model's attention: until ``restore`` it attends to cache slots only.

        ``adapters`` are those injected into it. Raises ModelError for a model that cannot be batched.
        """
        self.language_model = language_model
        self.adapters = adapters
        self.embed = language_model.get_input_embeddings()
        self.device = language_model.device
        self.plain_layers = PlainLayers(language_model) if has_plain_layers(language_model) else None
        self._attention = language_model.config._attn_implementation
        self.states: Float[Tensor, "n d"] | None = None
        """The states that the logits of the last run were computed from, if an input wanted them."""
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
            self.restore()
            raise

    def restore(self) -> None:
        """Restore the model's own attention."""
        self.language_model.set_attn_implementation(self._attention)

    @torch.inference_mode()
    def check(self) -> None:
        """Compare with the model's own attention on a fixed text, and measure the cache bytes of a token.

        Raises ModelError for a model that keeps other state than keys and values, or has its own kind of attention.
        """
        model, device = self.language_model, self.device
        ids = torch.linspace(0, model.config.get_text_config().vocab_size - 1, _PROBE_LENGTH).long().tolist()
        model.set_attn_implementation(self._attention)
        if self.adapters is not None:  # the base may have one of its own
            self.adapters.choose_one(None, _PROBE_LENGTH)
        expected = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, -2:].float()
        if not bool(expected.isfinite().all()):
            raise not_finite_error(f"the output of {model.config.name_or_path} for a fixed text")
        model.set_attn_implementation(row_attention.NAME)
        cache = KvCache(2 * SHORTEST)
        first, row = cache.reserve(1), cache.reserve(_PROBE_LENGTH)
        assert first is not None
        assert row is not None
        self.run([SequenceInput(row, 0, ids[:5], num_wanted=0, is_prompt=True)])
        inputs = [SequenceInput(row, 5, ids[5:-1], is_prompt=True), SequenceInput(first, 0, ids[:3], is_prompt=True)]
        wanted, logits = self.run(inputs)
        found = [logits[wanted.index(0)], self.run([SequenceInput(row, _PROBE_LENGTH - 1, ids[-1:])])[1][0]]
        drift = measure_drift(torch.stack(found), expected)
        layers = row.size_class.layers.values()
        self.cache_bytes = sum(part[0, :, 0].nbytes for layer in layers for part in (layer.keys, layer.values))
        # Rounded inputs turn the last bit of a sum into a whole step.
        precision = torch.bfloat16 if has_int8_weights(model) else find_dtype(model)
        if not drift <= _PROBE_TOLERANCE[precision]:
            raise ModelError(
                f"{model.config.name_or_path}: {type(model).__name__} in a batch differs from itself alone "
                f"(logits of a fixed text differ by {drift:.2g} of their spread). Serve it with another engine."
            )

    @torch.inference_mode()
    def run(self, inputs: Sequence[SequenceInput]) -> tuple[list[int], Float[Tensor, "n vocab"]]:
        """Run one forward pass; return the inputs' fp32 logits and the index of the input that each belongs to."""
        order = sorted(range(len(inputs)), key=lambda index: _batch_order(inputs[index]))
        ordered = [inputs[index] for index in order]
        ids: list[int] = [0 if token < 0 else token for one in ordered for token in one.ids]
        embedded: Tensor = self.embed(torch.tensor(ids, device=self.device)[None])
        step = self._plan(ordered, embedded)
        first = 0
        for one in ordered:
            for image in one.images:
                embedded[0, first + image.first : first + image.last] = image.embeddings
            first += len(one.ids)
        if self.adapters is not None:
            self.adapters.choose([one.adapter for one in ordered], [len(one.ids) for one in ordered], step.last)
        wants_states = any(one.wants_states for one in inputs)
        with self._keeping_states(step) if wants_states else nullcontext():
            logits = self._forward(embedded, step)
        self.states = step.states if wants_states else None
        wanted = [index for index in order for _ in range(inputs[index].num_wanted)]
        return wanted, logits.float()

    @contextmanager
    def _keeping_states(self, step: BatchStep) -> Iterator[None]:
        """Keep the states before the head, whatever the model does with them afterwards."""

        def keep(_module: Any, _arguments: Any, output: Any) -> None:
            step.states = output[0][0, step.last]

        hook = self.language_model.base_model.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def _forward(self, embedded: Float[Tensor, "1 t d"], step: BatchStep) -> Float[Tensor, "n vocab"]:
        """Return the logits at the step's last tokens."""
        if self.plain_layers is not None:
            return self.plain_layers.run(embedded, step)
        output = self.language_model(
            inputs_embeds=embedded,
            position_ids=step.positions,
            use_cache=False,
            logits_to_keep=step.last,
            step=step,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _plan(self, ordered: Sequence[SequenceInput], like: Tensor) -> BatchStep:
        parts: list[NextTokens | PromptChunk] = []
        positions: list[int] = []
        last: list[int] = []
        for (is_prompt, _), group in groupby(ordered, key=lambda one: (one.is_prompt, id(one.row.size_class))):
            first, inputs = len(positions), list(group)
            for one in inputs:
                if is_prompt:
                    parts.append(PromptChunk(TokenSpan(one.row, one.start, len(one.ids)), len(positions)))
                positions += range(one.start, one.start + len(one.ids))
                last += range(len(positions) - one.num_wanted, len(positions))
            if not is_prompt:
                spans = [TokenSpan(one.row, one.start, 1) for one in inputs]
                parts.append(NextTokens(inputs[0].row.size_class, spans, first, like))
        places = torch.tensor(positions, device=like.device)
        return BatchStep(parts, places[None], torch.tensor(last, device=like.device, dtype=torch.long))


def _batch_order(one: SequenceInput) -> tuple[bool, int, int]:
    return one.is_prompt, one.row.size_class.length, one.row.index
