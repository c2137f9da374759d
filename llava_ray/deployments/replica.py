"""A replica of a model: admits tasks, reads and moderates their images, and streams the answers."""

import functools
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace

from prometheus_client.core import Metric

from llava_ray.deployments.adapters.loaded import ReplicaAdapters, for_request
from llava_ray.deployments.adapters.places import AdapterRef
from llava_ray.deployments.admission import Admission
from llava_ray.deployments.media.addresses import Network
from llava_ray.deployments.media.request_images import MediaReader, make_decoder
from llava_ray.deployments.merging import MERGE_S, merge_streams
from llava_ray.deployments.messages import Task
from llava_ray.deployments.metrics import ReplicaMetrics
from llava_ray.deployments.model_source import ModelSource
from llava_ray.deployments.moderation import Moderator
from llava_ray.deployments.reading import count_places, decode_inputs, start_reading
from llava_ray.deployments.refusal import RefusalError, Refused, from_record_error
from llava_ray.deployments.settings import ServeSettings
from llava_ray.deployments.tool_calls import AnswerCalls, check_abilities
from llava_ray.errors import BusyError, LlavaRayError, RecordError
from llava_ray.generate.engine import Engine, GenerationChunk, GenerationRequest, ModelCard
from llava_ray.generate.engine_abilities import DecodesElsewhere

log = logging.getLogger(__name__)

# The index of a choice, and the next piece of it.
AnswerPiece = tuple[int, GenerationChunk]


class Replica:
    """A started engine with admission, moderation and metrics; independent of Ray, HTTP and OpenAI's API."""

    def __init__(
        self, engine: Engine, source: ModelSource, settings: ServeSettings, network: Network | None = None
    ) -> None:
        """Initialise for a started ``engine`` with the names of ``source``."""
        self.engine = engine
        self.source = source
        self.settings = settings
        self.admission = Admission(settings.max_num_seqs, settings.max_queued_requests, settings.retry_after_s)
        self.decoder = make_decoder(settings)
        decodes_elsewhere = isinstance(engine, DecodesElsewhere)
        if isinstance(engine, DecodesElsewhere):
            engine.use_decoder(self.decoder)
        # An engine that decodes in its own process gets images that were decoded completely in the pool before.
        self.media = MediaReader(settings, network, self.decoder, decode_whole=not decodes_elsewhere)
        self.moderator = Moderator(settings)
        self.metrics = ReplicaMetrics(source.name)
        self.adapters = ReplicaAdapters(engine, settings)

    def card(self) -> ModelCard:
        """Return the model's capabilities."""
        return self.engine.card

    def check_health(self) -> None:
        """Check that the engine can still answer. Raises ModelError."""
        self.engine.check_health()

    def collect(self) -> list[Metric]:
        """Return all current metrics."""
        return self.metrics.collect(self.engine.stats())

    async def load_adapter(self, adapter: AdapterRef) -> Refused | None:
        """Load an adapter; return a refusal, as a value, if it cannot be served."""
        try:
            await self.adapters.load(adapter)
        except RefusalError as error:
            return error.refused
        return None

    async def run(self, task: Task) -> AsyncGenerator[Refused | list[AnswerPiece], None]:
        """Yield the answer's pieces, or, as the last item, the reason for its failure.

        Refusals are values because they cross processes unchanged; an exception here is a bug or a crash.
        """
        try:
            with self.admission.admitted(count_places(task, self.settings.max_num_seqs)):
                async with aclosing(self.answer(task)) as pieces:
                    async for piece in pieces:
                        yield piece
        except RefusalError as error:
            self.metrics.refused.labels(self.source.name, error.refused.code).inc()
            yield error.refused
        except RecordError as error:
            self.metrics.refused.labels(self.source.name, error.reason).inc()
            field = "messages" if task.job is None else task.job.field
            yield from_record_error(error, field if task.prompt is None else "prompt")
        except BusyError as error:
            self.metrics.refused.labels(self.source.name, "queue_full").inc()
            yield Refused(429, str(error), "queue_full", retry_after_s=self.admission.retry_after_s)
        except LlavaRayError as error:
            log.exception("request %s failed", task.request_id)
            self.metrics.refused.labels(self.source.name, "engine_failed").inc()
            yield Refused(500, f"the engine failed: {error}", "engine_failed")

    async def answer(self, task: Task) -> AsyncGenerator[list[AnswerPiece], None]:
        """Read the images and generate each choice. Raises RefusalError, RecordError or ModelError.

        Moderation gets the same bytes as the model, not an address whose content may change.
        """
        arrived = time.monotonic()
        check_abilities(task, self.engine.card, self.source.name)
        images = await self.media.read_all(task.media) if task.media else ()
        if images:
            self.metrics.media.observe(time.monotonic() - arrived)
        await self.moderator.check(task.texts, images)
        async with AsyncExitStack() as stack:
            model = await self.find_adapter(task, stack)
            if task.job is None:
                streams = [
                    self.timed(_generation_request(task, index, images, model), arrived)
                    for index in range(task.num_choices)
                ]
            else:
                await self.moderator.check(await decode_inputs(self.engine, task.job, model), ())
                generate = functools.partial(self.timed, arrived=arrived)
                streams = start_reading(self.engine, task, task.job, images, model, generate)
            pieces = await stack.enter_async_context(aclosing(merge_streams(streams, MERGE_S if task.stream else None)))
            async for piece in pieces:
                yield piece

    async def find_adapter(self, task: Task, stack: AsyncExitStack) -> str | None:
        """Return the engine's name of a task's adapter, None for the base; it stays until ``stack`` is left.

        Raises RefusalError.
        """
        if task.adapter is None:
            return None if task.model == self.source.name else task.model
        try:
            return await stack.enter_async_context(self.adapters.used(task.adapter))
        except RefusalError as error:
            raise RefusalError(for_request(error.refused)) from error

    async def timed(self, request: GenerationRequest, arrived: float) -> AsyncGenerator[GenerationChunk, None]:
        """Yield one choice and record its latencies; leaving the iterator cancels the request in the engine."""
        metrics, num_prompt, num_new = self.metrics, 0, 0
        last: float | None = None
        calls = AnswerCalls.of_request(request, self.engine.card)
        async with aclosing(self.engine.generate(request)) as chunks:  # type: ignore[type-var]  # a generator
            async for piece in chunks:
                chunk = piece if calls is None else calls.separate(piece)
                now = time.monotonic()
                if last is None:
                    if chunk.reading is None:
                        metrics.first_token.observe(now - arrived)
                    metrics.queue.observe(chunk.queued_s)
                else:
                    for _ in chunk.token_ids:
                        metrics.between_tokens.observe((now - last) / len(chunk.token_ids))
                last = now
                num_prompt, num_new = max(num_prompt, chunk.num_prompt_tokens), num_new + len(chunk.token_ids)
                if chunk.finish_reason is not None:
                    metrics.success.labels(self.source.name, chunk.finish_reason).inc()
                    metrics.whole.observe(now - arrived)
                    metrics.prompt_tokens.observe(num_prompt)
                    if chunk.reading is None:
                        metrics.new_tokens.observe(num_new)
                yield chunk


def _generation_request(task: Task, index: int, images: tuple[bytes, ...], model: str | None) -> GenerationRequest:
    """Build the engine's request for one choice; each choice has its own seed."""
    sampling = task.sampling
    if sampling.seed is not None and index:
        sampling = replace(sampling, seed=sampling.seed + index)
    if index:  # they have one prompt
        sampling = replace(sampling, prompt_logprobs=None)
    return GenerationRequest(
        request_id=f"{task.request_id}-{index}",
        turns=task.turns,
        prompt=task.prompt,
        images=images,
        system=task.system,
        model=model,
        sampling=sampling,
        tool_choice=task.tool_choice,
        continue_final_message=task.continue_final_message,
        add_generation_prompt=task.add_generation_prompt,
    )
