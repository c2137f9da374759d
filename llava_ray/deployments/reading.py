"""A replica's work on tasks that ask for no answer."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

from llava_ray.deployments.messages import Task
from llava_ray.deployments.reading_jobs import ReadingJob
from llava_ray.deployments.refusal import refuse
from llava_ray.errors import RecordError
from llava_ray.generate.engine import Engine, GenerationChunk, GenerationRequest, Sampling
from llava_ray.generate.readings import PromptReading, ReadsPrompts

Generate = Callable[[GenerationRequest], AsyncGenerator[GenerationChunk, None]]

_AT_ONCE = 8  # inputs of one request that are in the engine at the same time


def count_places(task: Task, max_num_seqs: int) -> int:
    """Return how many of a replica's places a task takes."""
    return task.num_choices if task.job is None else min(task.num_choices, _AT_ONCE, max_num_seqs)


async def decode_inputs(engine: Engine, job: ReadingJob, model: str | None) -> tuple[str, ...]:
    """Return the texts of a job's tokens, which moderation sees too. Raises RecordError, or RefusalError."""
    if not job.token_ids:
        return ()
    reader = _find_reader(engine)
    fields = [job.field if len(job.token_ids) == 1 else f"{job.field}.{i}" for i in range(len(job.token_ids))]
    return tuple([await reader.read_ids(ids, model, name) for ids, name in zip(job.token_ids, fields, strict=True)])


def start_reading(
    engine: Engine, task: Task, job: ReadingJob, images: Sequence[bytes], model: str | None, generate: Generate
) -> list[AsyncGenerator[GenerationChunk, None]]:
    """Return a stream of one chunk for each result of a job; ``generate`` runs a request for features."""
    if job.kind == "tokenize":
        return [_tokenize(engine, task, job, images, model)]
    if job.kind == "detokenize":
        return [_detokenize(engine, job, model)]
    requests = _feature_requests(task, job, images, model)
    places = asyncio.Semaphore(_AT_ONCE)
    return [
        _embed(generate, request, places, index, job.field if len(requests) == 1 else f"{job.field}.{index}")
        for index, request in enumerate(requests)
    ]


async def _tokenize(
    engine: Engine, task: Task, job: ReadingJob, images: Sequence[bytes], model: str | None
) -> AsyncGenerator[GenerationChunk, None]:
    reading = await _find_reader(engine).read_prompt(
        GenerationRequest(
            task.request_id,
            task.turns,
            task.prompt,
            tuple(images),
            task.system,
            model,
            tool_choice=task.tool_choice,
            add_special_tokens=job.add_special_tokens,
        )
    )
    yield _as_chunk(reading)


async def _detokenize(engine: Engine, job: ReadingJob, model: str | None) -> AsyncGenerator[GenerationChunk, None]:
    [text] = await decode_inputs(engine, job, model) or ("",)
    yield _as_chunk(PromptReading(text=text))


def _as_chunk(reading: PromptReading) -> GenerationChunk:
    return GenerationChunk("", (), finish_reason="stop", num_prompt_tokens=len(reading.token_ids), reading=reading)


async def _embed(
    generate: Generate, request: GenerationRequest, places: asyncio.Semaphore, index: int, field: str
) -> AsyncGenerator[GenerationChunk, None]:
    """Run one request for features as soon as there is a place; its errors name ``field``, and its image by number."""
    async with places, aclosing(generate(request)) as chunks:
        try:
            async for chunk in chunks:
                yield chunk
        except RecordError as error:
            words = str(error)
            if error.reason == "too_long":
                words = words.partition(". Shorten")[0] + ". Send less."
            if request.features != "language":  # the engine knows of this image alone
                words = words.replace("image 1", f"image {index + 1}", 1)
            raise type(error)(words, reason=error.reason, field=error.field or field) from error


def _feature_requests(
    task: Task, job: ReadingJob, images: Sequence[bytes], model: str | None
) -> list[GenerationRequest]:
    """Return one request for each vector."""
    one = Sampling(max_tokens=1)
    name, features = task.request_id, job.features
    if features != "language":
        return [
            GenerationRequest(f"{name}-{index}", images=(image,), model=model, features=features)
            for index, image in enumerate(images)
        ]
    if task.turns:
        turns, system = task.turns, task.system
        return [GenerationRequest(f"{name}-0", turns, None, tuple(images), system, model, one, features=features)]
    if job.texts:
        return [
            GenerationRequest(f"{name}-{index}", prompt=text, model=model, sampling=one, features=features)
            for index, text in enumerate(job.texts)
        ]
    return [
        GenerationRequest(f"{name}-{index}", model=model, sampling=one, prompt_ids=ids, features=features)
        for index, ids in enumerate(job.token_ids)
    ]


def _find_reader(engine: Engine) -> ReadsPrompts:
    """Return the engine, if it reads prompts. Raises RefusalError."""
    if not isinstance(engine, ReadsPrompts):
        raise refuse(400, "this model's engine does not tell tokens", "engine", "model")
    return engine
