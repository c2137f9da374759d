"""An actor that answers batches of questions with one model."""

import json
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor

from llava_ray.chat.conversation import IMAGE_TOKEN, Turn, break_markers, with_markers
from llava_ray.chat.tokens import tokenize_conversation, tokenize_prompt
from llava_ray.errors import ModelError
from llava_ray.generate.decoding import answer_text, generate_batch
from llava_ray.generate.engine import Sampling
from llava_ray.generate.likelihoods import compute_log_likelihoods
from llava_ray.generate.sampled_answers import add_diffusion_noise, sample_batch
from llava_ray.images.anyres import Size
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.loading import load_pretrained_model


@dataclass(frozen=True)
class ModelToLoad:
    """The arguments of ``load_pretrained_model``; folders are absolute."""

    model_path: str
    model_base: str | None = None
    vision_tower: str | None = None
    version: str | None = None


class AnswerActor:
    """A model that answers batches, on a GPU if the actor has one."""

    def __init__(
        self, model: ModelToLoad, max_new_tokens: int, temperature: float, num_cpus: float, top_p: float = 1.0
    ) -> None:
        """Load the model once per actor."""
        torch.set_num_threads(max(1, int(num_cpus)))
        on_gpu = bool(ray.get_gpu_ids())
        self.parts = load_pretrained_model(
            **vars(model), dtype=torch.bfloat16 if on_gpu else torch.float32, device="cuda" if on_gpu else "cpu"
        )
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.sampling = Sampling(max_tokens=max_new_tokens, temperature=temperature, top_p=top_p)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the columns id, answers, likelihoods and num_tokens of candidates, samples, and failures."""
        questions = Questions.of(table)
        readable = [index for index, failure in enumerate(questions.unreadable) if not failure]
        results = [_Result() for _ in questions.ids]
        failure = None
        try:
            for index, result in zip(readable, self.answer(questions.at(readable)) if readable else [], strict=True):
                results[index] = result
        except ModelError as error:  # as a value: Ray Data would turn an exception into the text of its traceback
            failure = f"{error} (In the batch of questions {questions.ids[0]!r} to {questions.ids[-1]!r}.)"
        likelihoods = [result.likelihoods for result in results]
        return pa.table(
            {
                "id": table["id"],
                "answers": pa.array([result.answers for result in results], pa.list_(pa.string())),
                "likelihoods": pa.array([[one for one, _ in some] for some in likelihoods], pa.list_(pa.float64())),
                "num_tokens": pa.array([[count for _, count in some] for some in likelihoods], pa.list_(pa.int64())),
                "samples": pa.array([[text for text, _ in r.samples] for r in results], pa.list_(pa.string())),
                "ended": pa.array([[ended for _, ended in r.samples] for r in results], pa.list_(pa.bool_())),
                "unreadable": pa.array(questions.unreadable, pa.string()),
                "failure": pa.array([failure] * len(results), pa.string()),
            }
        )

    def answer(self, asked: "Questions") -> list["_Result"]:
        """Answer questions, sample answers to them, or compute the likelihoods of their candidates."""
        pixels = [self.pixels(cell, noise) for cell, noise in zip(asked.pixels, asked.noise, strict=True)]
        if any(asked.seeds):
            prompts = self.tokenize(asked.conversations)
            sampled = sample_batch(self.parts, prompts, pixels, asked.seeds, self.sampling, asked.sizes)
            return [_Result(samples=[(answer_text(self.parts, ids), ended) for ids, ended in some]) for some in sampled]
        if any(asked.candidates):
            found = self.compute_likelihoods(asked.conversations, asked.candidates, pixels, asked.sizes)
            return [_Result(likelihoods=some) for some in found]
        return [_Result(some) for some in self.converse(asked.conversations, asked.follow_ups, pixels, asked.sizes)]

    def converse(
        self,
        conversations: list[list[Turn]],
        follow_ups: list[list[str]],
        pixels: list[Tensor | None],
        sizes: list[list[Size]],
    ) -> list[list[str]]:
        """Generate the answers to questions, then those to their follow-ups: all the first ones together, and so on."""
        histories = [list(turns) for turns in conversations]
        answers: list[list[str]] = [[] for _ in conversations]
        asked = list(range(len(conversations)))
        while asked:
            said = self.write(
                [histories[index] for index in asked],
                [pixels[index] for index in asked],
                [sizes[index] for index in asked],
            )
            for index, answer in zip(asked, said, strict=True):
                answers[index].append(answer)
            asked = [index for index in asked if len(answers[index]) <= len(follow_ups[index])]
            for index in asked:
                question = follow_ups[index][len(answers[index]) - 1]
                histories[index].append(Turn("gpt", break_markers(answers[index][-1])))
                histories[index].append(Turn("human", break_markers(question)))
        return answers

    def write(self, conversations: list[list[Turn]], pixels: list[Tensor | None], sizes: list[list[Size]]) -> list[str]:
        """Generate the answers to the last question of each conversation."""
        answers = generate_batch(
            self.parts,
            self.tokenize(conversations),
            pixels,
            image_sizes=sizes,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
        )
        return [answer_text(self.parts, ids) for ids in answers]

    def tokenize(self, conversations: list[list[Turn]]) -> list[list[int]]:
        """Tokenise the prompts of conversations that end with a question."""
        return [tokenize_prompt(turns, self.parts.template, self.parts.tokenizer) for turns in conversations]

    def compute_likelihoods(
        self,
        conversations: list[list[Turn]],
        candidates: list[list[str]],
        pixels: list[Tensor | None],
        sizes: list[list[Size]],
    ) -> list[list[tuple[float, int]]]:
        """Compute the log-likelihood of each candidate."""
        template, tokenizer = self.parts.template, self.parts.tokenizer
        answered = [
            [
                tokenize_conversation([*turns, Turn("gpt", break_markers(answer))], template, tokenizer)
                for answer in some
            ]
            for turns, some in zip(conversations, candidates, strict=True)
        ]
        return compute_log_likelihoods(self.parts, answered, pixels, sizes)

    def pixels(self, cell: bytes, noise: list[int]) -> Tensor | None:
        """Return the normalised views (n, 3, h, w) of one question's images, noised where it says so."""
        if not cell:
            return None
        spec = self.parts.image_spec
        views = normalize_pixels(np.frombuffer(cell, np.uint8).reshape(-1, 3, spec.height, spec.width).copy(), spec)
        return add_diffusion_noise(views, *noise) if noise else views


@dataclass(frozen=True)
class _Result:
    """What the model made of one question."""

    answers: list[str] = field(default_factory=lambda: [""])
    likelihoods: list[tuple[float, int]] = field(default_factory=list)
    samples: list[tuple[str, bool]] = field(default_factory=list)


@dataclass(frozen=True)
class Questions:
    """The columns of a batch of questions whose images are decoded."""

    ids: list[str]
    conversations: list[list[Turn]]
    pixels: list[bytes]
    sizes: list[list[Size]]
    candidates: list[list[str]]
    follow_ups: list[list[str]]
    seeds: list[list[int]]
    noise: list[list[int]]
    unreadable: list[str | None]

    @classmethod
    def of(cls, table: pa.Table) -> "Questions":
        """Read the columns of a table of ``decode_question_images``."""
        names = ("id", "pixels", "candidates", "follow_ups", "seeds", "noise", "unreadable", "question", "history")
        columns = {name: table[name].to_pylist() for name in names}
        sizes = [[(width, height) for width, height in some] for some in table["image_sizes"].to_pylist()]
        histories = [[Turn.from_row(row) for row in json.loads(text)] for text in columns.pop("history")]
        conversations = [
            _with_question(history, question, len(some))
            for history, question, some in zip(histories, columns.pop("question"), sizes, strict=True)
        ]
        return cls(ids=columns.pop("id"), conversations=conversations, sizes=sizes, **columns)

    def at(self, indices: list[int]) -> "Questions":
        """Return some of the questions."""
        return Questions(**{name: [column[index] for index in indices] for name, column in vars(self).items()})


def _with_question(history: list[Turn], question: str, num_images: int) -> list[Turn]:
    """Return the conversation that ends with a question; markers stand in front unless there are any."""
    has_markers = any(IMAGE_TOKEN in turn.value for turn in history if turn.role != "system")
    return [*history, Turn("human", question if has_markers else with_markers(question, num_images))]
