"""An actor that answers a step's questions with the run's newest weights, and rewards the answers."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import ray
import torch
from jaxtyping import Float
from torch import Tensor

from llava_ray.chat.asked_turns import final_question
from llava_ray.chat.conversation import Turn
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.settings import StreamSettings
from llava_ray.data.stages import fetch_records
from llava_ray.errors import DataError, LlavaRayError
from llava_ray.generate.decoding import answer_text, expand_prompt
from llava_ray.generate.group_sampling import GroupPrompts, SampledAnswer, sample_groups, score_groups
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.assembly import LlavaParts
from llava_ray.train.engine import assemble_trainable, check_bf16
from llava_ray.train.held_out import make_question
from llava_ray.train.rollouts.answered import AskedQuestion, RolloutGroup
from llava_ray.train.rollouts.rewards import Attempt, Rewards

# What only training needs; an actor has a whole model.
_OF_TRAINING = {
    "train.zero_stage": 0,
    "train.offload_optimizer": False,
    "train.gradient_checkpointing": False,
    "train.torch_compile": False,
}


class RolloutActor:
    """A model that samples answers."""

    def __init__(self, config: FinetuneConfig, stream: StreamSettings, num_threads: int) -> None:
        """Load the model that the run starts with."""
        torch.set_num_threads(num_threads)
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        check_bf16(config.train, self.device)
        self.config, self.stream = config.replaced(_OF_TRAINING), stream
        self.parts: LlavaParts = assemble_trainable(self.config)[0]
        self.parts.tower.to(self.device)
        self.parts.llava.to(self.device).eval()
        self.rewards = Rewards.of(config.grpo)
        self.learnt = {name: one for name, one in self.parts.llava.named_parameters() if one.requires_grad}
        self.version = 0
        self.first: dict[str, Tensor] | None = None
        """The weights that the run started with, where answers are compared with theirs."""
        if config.grpo.beta > 0:
            self.first = {name: one.detach().cpu().clone() for name, one in self.learnt.items()}

    def sample(
        self, step: int, places: Sequence[tuple[int, int]], version: int, weights: Sequence[ray.ObjectRef]
    ) -> list[RolloutGroup] | LlavaRayError:
        """Answer the records at (shard, row) with the weights of a version.

        A run's own error is returned: Ray would make it the text of a traceback.
        """
        try:
            self.load(version, weights)
            asked = self.read(places)
            return self.answer(step, asked)
        except LlavaRayError as error:
            return error

    def load(self, version: int, weights: Sequence[ray.ObjectRef]) -> None:
        """Take over a version's weights, unless they are here."""
        if version != self.version and weights:
            self.version = -1  # until all are here
            self.put(ray.get(weights[0]))
        self.version = version

    def put(self, tensors: dict[str, Tensor]) -> None:
        """Copy tensors into the trainable parameters of their names."""
        assert tensors.keys() == self.learnt.keys()
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.learnt[name].copy_(tensor)

    def read(self, places: Sequence[tuple[int, int]]) -> list[AskedQuestion]:
        """Read the records' last questions. Raises DataError, also for a record without an answer to compare with."""
        shards, rows = [shard for shard, _ in places], [row for _, row in places]
        records = fetch_records(pa.table({"shard": [shards], "row": [rows]}), self.stream)
        questions = []
        for place in places:
            record = records[place]
            found = final_question([Turn.from_row(turn) for turn in record["turns"]])
            if found is None or not found[2].value.strip():
                raise DataError(
                    f"record {record['id']!r} has no supervised answer in words, with which rewards could compare; "
                    "remove it, or give it one"
                )
            one = make_question(self.stream, self.parts, place, record, final_question)
            images = one.images
            if images is not None and images.dtype == torch.uint8 and not self.stream.model.unfreeze_mm_vision_tower:
                images = self.extract(images).cpu()
            prompt = expand_prompt(self.parts, one.prompt, one.sizes)
            questions.append(AskedQuestion(record["id"], found[1][-1].value, prompt, images, one.sizes, one.answer))
        return questions

    def answer(self, step: int, asked: Sequence[AskedQuestion]) -> list[RolloutGroup]:
        """Sample the answers and reward them."""
        grpo, longest = self.config.grpo, self.config.train.model_max_length
        prompts = GroupPrompts(
            [one.prompt for one in asked], [one.images for one in asked], [one.sizes for one in asked], self.extract
        )
        limits = [min(grpo.max_new_tokens, longest - len(one.prompt)) for one in asked]
        draws = [
            [
                draw_numbers(self.config.train.seed, step, one.id, number, max(limits))
                for number in range(grpo.group_size)
            ]
            for one in asked
        ]
        groups = sample_groups(self.parts, prompts, np.asarray(draws), limits, grpo.temperature)
        texts = [[answer_text(self.parts, answer.token_ids) for answer in some] for some in groups]
        attempts = [
            Attempt(one.id, one.text, one.truth, text) for one, some in zip(asked, texts, strict=True) for text in some
        ]
        rewards = self.rewards.compute(attempts).reshape(len(asked), grpo.group_size, -1)
        reference = self.score_by_reference(prompts, groups) if self.first is not None else [None] * len(asked)
        return [RolloutGroup(*one) for one in zip(asked, groups, texts, rewards, reference, strict=True)]

    def score_by_reference(
        self, prompts: GroupPrompts, groups: Sequence[Sequence[SampledAnswer]]
    ) -> list[list[list[float]]]:
        """Compute the answers' log-probabilities under the weights that the run started with."""
        assert self.first is not None
        now = {name: one.detach().clone() for name, one in self.learnt.items()}
        self.put(self.first)
        try:
            ids = [[answer.token_ids for answer in some] for some in groups]
            return score_groups(self.parts, prompts, ids, self.config.grpo.temperature)
        finally:
            self.put(now)

    def extract(self, images: Tensor) -> Tensor:
        """Return the features of views that are pixels (uint8), and others on the device."""
        if images.dtype != torch.uint8:
            return images.to(self.device)
        return self.parts.tower.extract(images, lambda views: normalize_pixels(views, self.stream.image_spec))


def draw_numbers(seed: int, step: int, name: str, number: int, count: int) -> Float[np.ndarray, " t"]:
    """Draw the random numbers of an answer to a record: a resumed run draws them again, on any number of actors."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint32)[:4]
    return np.random.default_rng([seed, step, number, *words.tolist()]).random(count)
