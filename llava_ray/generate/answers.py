"""Whole data sets answered with Ray Data: images decoded in tasks, answers written by a pool of model actors."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy
from torch import Tensor

from llava_ray.chat.conversation import Turn, break_markers, with_markers
from llava_ray.chat.tokens import tokenize_conversation, tokenize_prompt
from llava_ray.errors import DataError, ModelError
from llava_ray.generate.decoding import answer_text, generate_batch
from llava_ray.generate.likelihoods import find_log_likelihoods
from llava_ray.generate.questions import ModelQuestion, decode_question_images, to_table
from llava_ray.images.anyres import Size
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.loading import load_pretrained_model, read_pretrained_blueprint
from llava_ray.placement import in_pool, pool_resources

_DECODE_CPUS = 0.5


@dataclass(frozen=True)
class GeneratedAnswer:
    """What the model wrote to the question of that id; or what it thinks of the candidates, where there are some."""

    id: str
    answer: str
    likelihoods: tuple[tuple[float, int], ...] = ()
    """Of each candidate the natural log-likelihood as the whole answer, and its number of tokens."""


@dataclass(frozen=True)
class Actors:
    """The pool that answers: how many actors (None: one for each GPU, or one), and the CPUs of each."""

    num: int | None = None
    num_cpus: float = 1.0


_ONE_ACTOR = Actors()


@dataclass(frozen=True)
class ModelToLoad:
    """What ``load_pretrained_model`` has to be told; folders are absolute."""

    model_path: str
    model_base: str | None = None
    vision_tower: str | None = None
    version: str | None = None


@dataclass(frozen=True)
class Decoding:
    """How answers are written: at most so many new tokens, greedily at temperature 0, so many questions at once."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    batch_size: int = 16


def answer_questions(  # noqa: PLR0913 - which model, what it is asked, and by whom
    model_path: str | Path,
    questions: Sequence[ModelQuestion],
    *,
    model_base: str | None = None,
    vision_tower: str | None = None,
    version: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    batch_size: int = 16,
    actors: Actors = _ONE_ACTOR,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[GeneratedAnswer]:
    """Answer every question, in the order given, on a running Ray cluster.

    The model is of any layout, see ``load_pretrained_model``. Each actor loads it once; where the cluster has GPUs it
    takes one and computes in bfloat16. ``on_progress`` hears how many of all are answered. Raises DataError for an id
    that occurs twice, ModelError; faults of an image or of the weights come out of Ray as they are.
    """
    model = locate_model(model_path, model_base, vision_tower, version)
    answers: dict[str, str] = {}
    for batch in stream_answers(model, questions, Decoding(max_new_tokens, temperature, batch_size), actors):
        answers.update({answer.id: answer.answer for answer in batch})
        if on_progress is not None:
            on_progress(len(answers), len(questions))
    return [GeneratedAnswer(question.id, answers[question.id]) for question in questions]


def locate_model(
    model_path: str | Path, model_base: str | None, vision_tower: str | None, version: str | None
) -> ModelToLoad:
    """Return what actors have to be told of a model: they have another working directory."""
    base, tower = (_absolute_path(given) if given else None for given in (model_base, vision_tower))
    return ModelToLoad(_absolute_path(model_path), base, tower, version)


def stream_answers(
    model: ModelToLoad, questions: Sequence[ModelQuestion], decoding: Decoding, actors: Actors = _ONE_ACTOR
) -> Iterator[list[GeneratedAnswer]]:
    """Yield answers batch by batch, as they come, so that a caller can keep them at once.

    A killed actor is replaced and its batch asked again. All questions have candidates, or none. Raises as
    ``answer_questions``.
    """
    counts = Counter(question.id for question in questions)
    if twice := next((name for name, count in counts.items() if count > 1), None):
        raise DataError(f"two questions have the id {twice!r}; answers are told apart by it: make ids unique.")
    if not questions:
        return
    num_gpus = int(pool_resources("train")["GPU"])  # a model answers on the GPUs that could train it
    spec = read_pretrained_blueprint(**vars(model)).image_spec
    size = decoding.batch_size
    tables = [to_table(questions[start : start + size]) for start in range(0, len(questions), size)]
    answered = (
        ray.data.from_arrow(tables)
        .map_batches(
            decode_question_images,
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"spec": spec},
            num_cpus=_DECODE_CPUS,
            **in_pool("decode"),
        )
        .map_batches(
            AnswerActor,
            batch_size=None,
            batch_format="pyarrow",
            fn_constructor_args=(model, decoding.max_new_tokens, decoding.temperature, actors.num_cpus),
            compute=ActorPoolStrategy(size=actors.num or max(1, num_gpus)),
            num_cpus=actors.num_cpus,
            num_gpus=1 if num_gpus else None,
            **in_pool("train"),
        )
    )
    for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
        for failure in filter(None, batch["failure"].to_pylist()):
            raise ModelError(failure)
        columns = (batch[key].to_pylist() for key in ("id", "answer", "likelihoods", "num_tokens"))
        yield [
            GeneratedAnswer(name, answer, tuple(zip(likelihoods, counts, strict=True)))
            for name, answer, likelihoods, counts in zip(*columns, strict=True)
        ]


class AnswerActor:
    """A model that answers batches; on a GPU where the actor was given one."""

    def __init__(self, model: ModelToLoad, max_new_tokens: int, temperature: float, num_cpus: float) -> None:
        """Load the model once."""
        torch.set_num_threads(max(1, int(num_cpus)))
        on_gpu = bool(ray.get_gpu_ids())
        self.parts = load_pretrained_model(
            **vars(model), dtype=torch.bfloat16 if on_gpu else torch.float32, device="cuda" if on_gpu else "cpu"
        )
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the columns id and answer, of candidates likelihoods and num_tokens, and a failure of the model."""
        pixels = [self.pixels(cell) for cell in table["pixels"].to_pylist()]
        sizes = [[(width, height) for width, height in some] for some in table["image_sizes"].to_pylist()]
        asked = [
            Turn("human", with_markers(question, len(some)))
            for question, some in zip(table["question"].to_pylist(), sizes, strict=True)
        ]
        candidates = table["candidates"].to_pylist()
        answers, failure = [""] * len(asked), None
        weighed: list[list[tuple[float, int]]] = [[] for _ in asked]
        try:
            if any(candidates):
                weighed = self.weigh(asked, candidates, pixels, sizes)
            else:
                answers = self.write(asked, pixels, sizes)
        except ModelError as error:  # as a value: what is raised comes out of Ray Data as the text of a traceback
            ids = table["id"].to_pylist()
            failure = f"{error} (In the batch of questions {ids[0]!r} to {ids[-1]!r}.)"
        return pa.table(
            {
                "id": table["id"],
                "answer": pa.array(answers, pa.string()),
                "likelihoods": pa.array([[one for one, _ in some] for some in weighed], pa.list_(pa.float64())),
                "num_tokens": pa.array([[count for _, count in some] for some in weighed], pa.list_(pa.int64())),
                "failure": pa.array([failure] * len(asked), pa.string()),
            }
        )

    def write(self, asked: list[Turn], pixels: list[Tensor | None], sizes: list[list[Size]]) -> list[str]:
        """Return what the model writes."""
        answers = generate_batch(
            self.parts,
            [tokenize_prompt([turn], self.parts.template, self.parts.tokenizer) for turn in asked],
            pixels,
            image_sizes=sizes,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
        )
        return [answer_text(self.parts, ids) for ids in answers]

    def weigh(
        self, asked: list[Turn], candidates: list[list[str]], pixels: list[Tensor | None], sizes: list[list[Size]]
    ) -> list[list[tuple[float, int]]]:
        """Return how likely the model finds each candidate."""
        template, tokenizer = self.parts.template, self.parts.tokenizer
        answered = [
            [tokenize_conversation([turn, Turn("gpt", break_markers(answer))], template, tokenizer) for answer in some]
            for turn, some in zip(asked, candidates, strict=True)
        ]
        return find_log_likelihoods(self.parts, answered, pixels, sizes)

    def pixels(self, cell: bytes) -> Tensor | None:
        """Return the normalised views (n, 3, h, w) of one question's images."""
        if not cell:
            return None
        spec = self.parts.image_spec
        return normalize_pixels(np.frombuffer(cell, np.uint8).reshape(-1, 3, spec.height, spec.width).copy(), spec)


def _absolute_path(name: str | Path) -> str:
    """Return a folder's absolute path, or a hub id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)
