"""The switch of a language model's attention: by sample in training rows, the model's own everywhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from llava_ray.errors import ModelError
from llava_ray.model.network import sample_attention
from llava_ray.model.network.packing import PROVEN, are_close, embed_probe, is_partitioned
from llava_ray.model.network.sample_attention import SampleBorders


class SampleAttention:
    """The attention by sample of one language model, beside the one that it came with.

    With gradient checkpointing a forward pass is repeated in the backward pass: never switch in between.
    """

    def __init__(self, language_model: PreTrainedModel) -> None:
        """Switch it on. Raises ModelError for a model whose attention cannot be computed sample by sample."""
        self.language_model = language_model
        self.former: str | None = language_model.config._attn_implementation
        self._guard: RemovableHandle | None = None
        try:
            self.switch_on()
            self._check()
        except ModelError as error:
            self.switch_off()
            raise ModelError(
                f"language models of type {language_model.config.model_type!r}: attention cannot be computed sample by "
                f'sample: {error}. Set model.attn_implementation = "masked_sdpa" (the whole row under a mask, slower).'
            ) from error

    def switch_on(self) -> None:
        """Attend by sample from now on, and refuse masks: transformers drops them without a word."""
        self._choose(sample_attention.SAMPLE_ATTENTION)
        decoder: nn.Module = self.language_model.base_model
        self._guard = self._guard or decoder.register_forward_pre_hook(_refuse_mask, with_kwargs=True)

    def switch_off(self) -> None:
        """Attend as the model came, from now on."""
        if self._guard is not None:
            self._guard.remove()
            self._guard = None
        self._choose(self.former)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Attend as the model came within this block, such as to generate answers."""
        self.switch_off()
        try:
            yield
        finally:
            self.switch_on()

    def _choose(self, name: str | None) -> None:
        """Set the model's attention function. Raises ModelError for a model that does not take one."""
        model: Any = self.language_model
        if name == model.config._attn_implementation:
            return
        try:
            model.set_attn_implementation(name)
        except ValueError as error:
            raise ModelError(str(error)) from error
        if model.config._attn_implementation != name:  # transformers has but logged a warning
            raise ModelError(f"{type(model).__name__} takes no other attention function")

    @torch.no_grad()
    def _check(self) -> None:
        """Raise ModelError if a type that the tests do not cover computes something else by sample."""
        model: Any = self.language_model
        if model.config.model_type in PROVEN:
            return
        if is_partitioned(model):
            raise ModelError("it has to be tried, which cannot be done while ZeRO 3 has the weights partitioned")
        embedded, positions = embed_probe(model)
        borders = SampleBorders.of((4, 4), embedded.device)
        packed = model(inputs_embeds=embedded, position_ids=positions, use_cache=False, borders=borders).logits[:, 4:]
        with self.paused():
            second = {"inputs_embeds": embedded[:, 4:], "position_ids": positions[:, 4:]}
            alone = model(**second, use_cache=False).logits
        if not are_close(packed, alone):
            raise ModelError("a sample's logits differ from those of the sample alone")
        _check_windows(model.config.get_text_config(), borders.windows)


def _check_windows(config: PreTrainedConfig, seen: list[int | None]) -> None:
    """Raise ModelError if a layer limits its attention otherwise than by the window that it tells its function.

    The few tokens of a trial are within every window, so their logits say nothing of it.
    """
    kinds = list(getattr(config, "layer_types", None) or ())
    others = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if others:
        raise ModelError(f"it has layers of {', '.join(others)}")
    told = sum(window is not None for window in seen)
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    expected = kinds.count("sliding_attention") if kinds else (len(seen) if window else 0)
    if told < expected:
        raise ModelError(f"{expected} of its layers attend within a window, and {told} of them say so")


def _refuse_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ModelError for a call with a padding mask, before the model forgets it."""
    if kwargs.get("attention_mask") is not None:
        raise ModelError(
            "a padding mask was given to a language model that attends by sample, which is for packed training rows "
            "alone and would ignore it. Generate answers while its SampleAttention is paused."
        )
