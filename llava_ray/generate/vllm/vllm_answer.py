"""Conversion of vLLM's outputs to chunks of an answer; vLLM's classes are used by their fields only."""

import functools
import math
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from llava_ray.errors import ModelError
from llava_ray.generate.constraints.answer_start import begin_answer
from llava_ray.generate.decoding import decode
from llava_ray.generate.engine import FinishReason, GenerationChunk, GenerationRequest
from llava_ray.generate.logprobs import PromptLogprobs, RankedLogprob, TokenLogprob
from llava_ray.generate.sampling import not_finite_error
from llava_ray.generate.vllm.vllm_prompts import VllmPrompt


class VllmAnswer:
    """One answer while it is generated."""

    def __init__(self, prompt: VllmPrompt, tokenizer: PreTrainedTokenizerBase, request: GenerationRequest) -> None:
        """Initialise an empty answer."""
        self.stops = prompt.stops
        self.tokenizer = tokenizer
        self.num_logprobs = request.sampling.logprobs
        self.image_token = prompt.image_token
        self.text = begin_answer(prompt, functools.partial(decode, tokenizer), request, prompt.text_ids)

    def take(self, output: Any) -> GenerationChunk:
        """Convert an output (``RequestOutput`` of new tokens only) to a chunk. Raises ModelError if vLLM failed."""
        new = output.outputs[0]
        if new.finish_reason not in (None, "stop", "length"):
            raise ModelError(f"vLLM ended the answer with {new.finish_reason!r}; its log says why. Retry.")
        text, ids = "", []
        reason: FinishReason | None = None
        for token in new.token_ids:
            if token not in self.stops.ids:
                text += self.text.push(token)
                if not self.text.stopped:
                    ids.append(token)
                    continue
            reason = "stop"
            break
        if new.finish_reason is not None and reason is None:
            reason = new.finish_reason
        if reason is not None:
            text += self.text.finish()
        rows = new.logprobs or ()
        logprobs = tuple(self.logprob(token, row) for token, row in zip(ids, rows, strict=False))
        stats = output.metrics
        queued_s = max(0.0, stats.scheduled_ts - stats.queued_ts) if stats is not None else 0.0
        num_prompt, num_cached = len(output.prompt_token_ids), getattr(output, "num_cached_tokens", None) or 0
        return GenerationChunk(
            text, tuple(ids), logprobs, reason, num_prompt, queued_s=queued_s, num_cached_tokens=num_cached
        )

    def read_prompt(self, output: Any) -> PromptLogprobs:
        """Return the log-probabilities of the prompt's tokens, which come with the first output.

        Raises ModelError for NaN.
        """
        text = functools.cache(self.decode_token)
        found: list[tuple[RankedLogprob, ...] | None] = []
        for token, row in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
            if row is None or token == self.image_token:
                found.append(None)
                continue
            if not math.isfinite(row[token].logprob):
                raise not_finite_error("a token of the prompt")
            others = sorted((one for one in row.items() if one[0] != token), key=lambda pair: pair[1].rank)
            entries = [(token, row[token]), *others]
            found.append(tuple(RankedLogprob(other, text(other), one.logprob, one.rank) for other, one in entries))
        return tuple(found)

    def logprob(self, token: int, row: Mapping[int, Any]) -> TokenLogprob:
        """Return a token's log-probability and the highest ones, best first. Raises ModelError for NaN."""
        if not math.isfinite(row[token].logprob):
            raise not_finite_error("a token of this answer")
        best = sorted(row.items(), key=lambda pair: pair[1].rank)[: self.num_logprobs]
        top = tuple((other, self.decode_token(other), value.logprob) for other, value in best)
        return TokenLogprob(token, self.decode_token(token), row[token].logprob, top)

    def decode_token(self, token: int) -> str:
        """Decode a single token."""
        return str(self.tokenizer.decode([token]))
