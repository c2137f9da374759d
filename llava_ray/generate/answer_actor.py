"""An actor that answers batches of questions with one model."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import ray
import torch
from torch import Tensor

from llava_ray.chat.conversation import Turn, break_markers, with_markers
from llava_ray.chat.tokens import tokenize_conversation, tokenize_prompt
from llava_ray.errors import ModelError
from llava_ray.generate.decoding import answer_text, generate_batch
from llava_ray.generate.likelihoods import compute_log_likelihoods
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

    def __init__(self, model: ModelToLoad, max_new_tokens: int, temperature: float, num_cpus: float) -> None:
        """Load the model once per actor."""
        torch.set_num_threads(max(1, int(num_cpus)))
        on_gpu = bool(ray.get_gpu_ids())
        self.parts = load_pretrained_model(
            **vars(model), dtype=torch.bfloat16 if on_gpu else torch.float32, device="cuda" if on_gpu else "cpu"
        )
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the columns id, answers, likelihoods and num_tokens of candidates, and the model's failure."""
        pixels = [self.pixels(cell) for cell in table["pixels"].to_pylist()]
        sizes = [[(width, height) for width, height in some] for some in table["image_sizes"].to_pylist()]
        turns = [
            Turn("human", with_markers(question, len(some)))
            for question, some in zip(table["question"].to_pylist(), sizes, strict=True)
        ]
        candidates, follow_ups = table["candidates"].to_pylist(), table["follow_ups"].to_pylist()
        answers, failure = [[""] for _ in turns], None
        likelihoods: list[list[tuple[float, int]]] = [[] for _ in turns]
        try:
            if any(candidates):
                likelihoods = self.compute_likelihoods(turns, candidates, pixels, sizes)
            else:
                answers = self.converse(turns, follow_ups, pixels, sizes)
        except ModelError as error:  # as a value: Ray Data would turn an exception into the text of its traceback
            ids = table["id"].to_pylist()
            failure = f"{error} (In the batch of questions {ids[0]!r} to {ids[-1]!r}.)"
        return pa.table(
            {
                "id": table["id"],
                "answers": pa.array(answers, pa.list_(pa.string())),
                "likelihoods": pa.array([[one for one, _ in some] for some in likelihoods], pa.list_(pa.float64())),
                "num_tokens": pa.array([[count for _, count in some] for some in likelihoods], pa.list_(pa.int64())),
                "failure": pa.array([failure] * len(turns), pa.string()),
            }
        )

    def converse(
        self, turns: list[Turn], follow_ups: list[list[str]], pixels: list[Tensor | None], sizes: list[list[Size]]
    ) -> list[list[str]]:
        """Generate the answers to questions, then those to their follow-ups: all the first ones together, and so on."""
        histories = [[turn] for turn in turns]
        answers: list[list[str]] = [[] for _ in turns]
        asked = list(range(len(turns)))
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
            [tokenize_prompt(turns, self.parts.template, self.parts.tokenizer) for turns in conversations],
            pixels,
            image_sizes=sizes,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
        )
        return [answer_text(self.parts, ids) for ids in answers]

    def compute_likelihoods(
        self, turns: list[Turn], candidates: list[list[str]], pixels: list[Tensor | None], sizes: list[list[Size]]
    ) -> list[list[tuple[float, int]]]:
        """Compute the log-likelihood of each candidate."""
        template, tokenizer = self.parts.template, self.parts.tokenizer
        answered = [
            [tokenize_conversation([turn, Turn("gpt", break_markers(answer))], template, tokenizer) for answer in some]
            for turn, some in zip(turns, candidates, strict=True)
        ]
        return compute_log_likelihoods(self.parts, answered, pixels, sizes)

    def pixels(self, cell: bytes) -> Tensor | None:
        """Return the normalised views (n, 3, h, w) of one question's images."""
        if not cell:
            return None
        spec = self.parts.image_spec
        return normalize_pixels(np.frombuffer(cell, np.uint8).reshape(-1, 3, spec.height, spec.width).copy(), spec)
