"""One request of the batch, from the moment its prompt is ready to its last token."""

import random
import time
from asyncio import Queue
from dataclasses import dataclass, field

from torch import Tensor

from llava_ray.generate.answer_text import AnswerText
from llava_ray.generate.builtin.drafts import DraftSource
from llava_ray.generate.builtin.kv_cache import CacheSlot
from llava_ray.generate.builtin.prefix_keys import BlockKeys
from llava_ray.generate.builtin.prompt_scores import PromptScores
from llava_ray.generate.engine import FinishReason, GenerationChunk, GenerationRequest
from llava_ray.generate.logit_edits import LogitEdits
from llava_ray.generate.prompts import Prompt


@dataclass(eq=False)
class RunningRequest:
    """A request from the moment its prompt is ready to its last token."""

    request: GenerationRequest
    prompt: Prompt
    queue: "Queue[GenerationChunk | Exception | None]"
    text: AnswerText
    draws: random.Random
    keys: BlockKeys
    drafts: DraftSource | None = None
    """Guesses of its next tokens, where its answer allows them."""
    draft: list[int] = field(default_factory=list)
    """The guess that the step checks."""
    row: CacheSlot | None = None
    num_read: int = 0
    """Tokens of the prompt that are in its slot."""
    num_written: int = 0
    """Tokens of prompt and answer that are in its slot."""
    num_reused: int = 0
    """Of them, those copied from the cache of known text."""
    new_ids: list[int] = field(default_factory=list)
    joined: float = field(default_factory=time.monotonic)
    """When it joined the waiting queue."""
    queued_s: float = 0.0
    """Seconds in the waiting queue, once it is admitted."""
    ended: bool = False
    """Whether its last chunk was delivered or its caller disconnected."""
    held: Tensor | None = None
    """Logits of its next token, until its grammar has decided which tokens may follow."""
    edits: LogitEdits | None = None
    """Changes of its logits that the request asks for."""
    scores: PromptScores | None = None
    """Log-probabilities of its prompt, where the request asks for them."""

    @property
    def num_unread(self) -> int:
        """Return the number of prompt tokens that are not in the cache yet."""
        return len(self.prompt.ids) - self.num_read

    @property
    def reads_known(self) -> bool:
        """Return whether it copies what is known of its prompt: that has no logits."""
        return self.scores is None

    @property
    def is_spoilt(self) -> bool:
        """Return whether the logits of its prompt were not finite."""
        return self.scores is not None and not self.scores.is_finite

    @property
    def num_tokens(self) -> int:
        """Return the most tokens of prompt and answer."""
        return len(self.prompt.ids) + self.request.sampling.max_tokens

    def append(self, token: int) -> tuple[str, tuple[int, ...], FinishReason | None]:
        """Append a token to the answer, or end the answer with it; return its text, its ids and why it ended."""
        if token in self.prompt.stops.ids:
            return self.text.finish(), (), "stop"
        text = self.text.push(token)
        if self.text.stopped:
            return text, (), "stop"
        self.new_ids.append(token)
        if self.drafts is not None:
            self.drafts.extend((token,))
        if self.edits is not None:
            self.edits.count(token)
        reason: FinishReason | None = None
        if self.prompt.grammar is not None and self.prompt.grammar.advance(token):
            reason = "stop"
        elif len(self.new_ids) == self.request.sampling.max_tokens:
            reason = "length"
        return text + self.text.finish() if reason else text, (token,), reason
