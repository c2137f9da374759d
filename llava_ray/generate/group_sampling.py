"""Several sampled answers to each prompt, with the probabilities that they had; and their probabilities elsewhere.

A prompt is read once for all of its answers. An answer depends on its own random numbers alone, not on its batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_ray.generate.decoding import Rows, default_stops, has_ended, read_prompts
from llava_ray.generate.engine import Sampling
from llava_ray.generate.sampling import find_finite_rows, not_finite_error, sample_tokens
from llava_ray.images.anyres import Size
from llava_ray.model.assembly import LlavaParts


@dataclass(frozen=True)
class SampledAnswer:
    """The tokens of one answer, the one that ended it included, and the log-probability that each had."""

    token_ids: list[int]
    log_probs: list[float]
    """At the temperature of the sampling."""
    ended: bool
    """Whether it ended by itself, not at the limit of its length."""


@dataclass(frozen=True)
class GroupPrompts:
    """Prompts as ``decoding.generate_batch`` takes them."""

    prompts: Sequence[Sequence[int]]
    pixels: Sequence[Float[Tensor, "_ 3 h w"] | None]
    image_sizes: Sequence[Sequence[Size]]
    extract: Callable[[Tensor], Tensor] | None = None

    def read(self, parts: LlavaParts, group_size: int) -> Rows:
        """Prefill each prompt once, and repeat it for a group of answers. Raises ModelError or RecordError."""
        rows = read_prompts(parts, self.prompts, self.pixels, self.image_sizes, self.extract)
        owners = torch.arange(len(self.prompts), device=rows.logits.device).repeat_interleave(group_size)
        rows.cache.batch_select_indices(owners)
        rows.mask, rows.logits = rows.mask[owners], rows.logits[owners]
        rows.indices = list(range(len(owners)))
        return rows


@torch.inference_mode()
def sample_groups(
    parts: LlavaParts,
    asked: GroupPrompts,
    draws: Float[np.ndarray, "n g t"],
    limits: Sequence[int],
    temperature: float,
) -> list[list[SampledAnswer]]:
    """Sample a group of answers to each prompt; ``draws`` has a number of [0, 1) for each of their tokens.

    ``limits`` are the most tokens of an answer, prompt by prompt, at most t. Raises ModelError for logits that are not
    finite, and as ``read_prompts`` does.
    """
    num_prompts, group_size, longest = draws.shape
    flat = draws.reshape(num_prompts * group_size, longest)
    stops, sampling = default_stops(parts), Sampling(temperature=temperature)
    rows = asked.read(parts, group_size)
    tokens: list[list[int]] = [[] for _ in flat]
    log_probs: list[list[float]] = [[] for _ in flat]
    ended, active = [False] * len(flat), [True] * len(flat)
    for step in range(longest):
        _check_finite(rows, active, group_size, step)
        drawn = sample_tokens(rows.logits, [sampling] * len(rows.indices), flat[rows.indices, step].tolist())
        newest = torch.tensor(drawn, device=rows.logits.device)
        known = (rows.logits / temperature).log_softmax(-1).gather(1, newest[:, None])[:, 0].tolist()
        for index, token, log_prob in zip(rows.indices, drawn, known, strict=True):
            if active[index]:
                tokens[index].append(token)
                log_probs[index].append(log_prob)
                ended[index] = has_ended(parts, tokens[index], stops)
                active[index] = not ended[index] and len(tokens[index]) < limits[index // group_size]
        if step + 1 == longest or not any(active):
            break
        rows.advance(newest, [active[index] for index in rows.indices])
    answers = [SampledAnswer(*one) for one in zip(tokens, log_probs, ended, strict=True)]
    return [answers[start : start + group_size] for start in range(0, len(answers), group_size)]


def _check_finite(rows: Rows, active: Sequence[bool], group_size: int, step: int) -> None:
    """Check that the logits of unfinished answers are finite. Raises ModelError."""
    for index, finite in zip(rows.indices, find_finite_rows(rows.logits), strict=True):
        if active[index] and not finite:
            prompt, answer = divmod(index, group_size)
            raise not_finite_error(f"token {step + 1} of answer {answer + 1} to prompt {prompt + 1}")


@torch.inference_mode()
def score_groups(
    parts: LlavaParts, asked: GroupPrompts, groups: Sequence[Sequence[Sequence[int]]], temperature: float
) -> list[list[list[float]]]:
    """Compute the log-probability of each token of each prompt's answers, all groups being of the same size."""
    flat = [torch.tensor(ids) for some in groups for ids in some]
    group_size = len(flat) // len(groups)
    rows = asked.read(parts, group_size)
    device = rows.logits.device
    ids = pad_sequence(flat, batch_first=True, padding_value=0).to(device)
    lengths = torch.tensor([len(one) for one in flat], device=device)
    is_there = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    after = parts.llava.language_model(
        inputs_embeds=parts.llava.language_model.get_input_embeddings()(ids),
        attention_mask=torch.cat([rows.mask, is_there], dim=1),
        position_ids=rows.mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=device),
        past_key_values=rows.cache,
        use_cache=True,
    ).logits[:, :-1]
    logits = torch.cat([rows.logits[:, None], after.float()], dim=1)
    known = (logits / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0].tolist()
    each = [some[: len(one)] for some, one in zip(known, flat, strict=True)]
    return [each[start : start + group_size] for start in range(0, len(each), group_size)]
