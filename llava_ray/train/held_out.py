"""Held-out evaluation at every save: the samples' loss, and the share of correct answers.

Each rank keeps its part in memory, images as features of the frozen tower (as pixels where the tower is trainable).
No gradient is computed and no random number is drawn: a run's own loss curve is the same with and without.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from llava_ray.chat.conversation import Turn, first_question
from llava_ray.chat.tokens import tokenize_question
from llava_ray.data.batches import MicroBatch, micro_batch
from llava_ray.data.descriptors import describe_micro_batches
from llava_ray.data.feature_cache import fetch_features, location_key
from llava_ray.data.packing import NO_STEP, unpack_features, unpack_pixels
from llava_ray.data.settings import StreamSettings
from llava_ray.data.stages import add_images, decode_views, fetch_records, read_micro_batches
from llava_ray.generate.decoding import answer_text, generate_batch
from llava_ray.images.anyres import Size
from llava_ray.images.processing import normalize_pixels
from llava_ray.model.assembly import LlavaParts
from llava_ray.objectives.objective import Objective
from llava_ray.train.objective import move_row
from llava_ray.train.settings import HeldOut

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_ANSWERS_AT_ONCE = 32


@dataclass(frozen=True)
class HeldOutQuestion:
    """A question for the model, the views of its images as pixels or features (n, ...), and the record's answer."""

    prompt: list[int]
    images: Tensor | None
    sizes: list[Size]
    answer: str


class HeldOutEvaluator:
    """One rank's part of the held-out samples."""

    def __init__(
        self, held_out: HeldOut | None, parts: LlavaParts, objective: Objective, rank: int, world_size: int
    ) -> None:
        """Read the samples, and run a frozen tower over their images once; with None ``evaluate`` returns nothing."""
        self.held_out = held_out
        self.parts = parts
        self.objective = objective
        self.batches: list[tuple[MicroBatch, Tensor | None]] = []
        self.asked: list[HeldOutQuestion] = []
        if held_out is None:
            return
        self.tower_learns = held_out.stream.model.unfreeze_mm_vision_tower
        for batch in _read_batches(held_out, rank, world_size):
            self.batches.append((batch, self.kept(batch.features if batch.pixels is None else batch.pixels)))
        for asked in _read_questions(held_out, parts, rank, world_size):
            self.asked.append(HeldOutQuestion(asked.prompt, self.kept(asked.images), asked.sizes, asked.answer))

    def evaluate(self, engine: "DeepSpeedEngine", device: torch.device) -> dict[str, float]:
        """Return ``held_out_loss``, the objective's metrics and ``held_out_accuracy`` over all ranks; collective."""
        return {} if self.held_out is None else self.name_sums(self.sum_up(engine, device))

    def sum_up(self, engine: "DeepSpeedEngine", device: torch.device) -> list[float]:
        """Return sums over all ranks: losses, metrics, their terms, right answers, questions; collective."""
        engine.eval()
        try:
            with torch.no_grad():
                sums = torch.tensor([*self.losses(engine, device), *self.answers(device)], device=device)
        finally:
            engine.train()
        dist.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found

    def name_sums(self, sums: Sequence[float]) -> dict[str, float]:
        """Return means by name, the loss as of a step over all samples, from sums as ``sum_up`` returns them."""
        *totals, right, asked = sums
        kinds = self.objective.num_kinds
        losses, counts, metrics = totals[:kinds], totals[kinds : 2 * kinds], totals[2 * kinds :]
        loss = sum(total / max(count, 1) for total, count in zip(losses, counts, strict=True))
        named = zip(self.objective.metric_names, metrics, strict=True) if counts[0] else ()
        judged = {"held_out_loss": loss} | {f"held_out_{name}": total / counts[0] for name, total in named}
        return judged | ({"held_out_accuracy": right / asked} if asked else {})

    def losses(self, engine: "DeepSpeedEngine", device: torch.device) -> list[float]:
        """Return this rank's sums: of the losses of each kind, of the number of their terms, and of the metrics."""
        names, kinds = self.objective.metric_names, self.objective.num_kinds
        totals = [0.0] * (2 * kinds + len(names))
        for batch, images in self.batches:
            row = move_row(batch, device, None if images is None else self.features(images))
            output = self.objective.compute(engine, row)
            counts, metrics = output.counts(kinds), [float(output.metrics[name]) for name in names]
            found = [*output.sums(kinds).tolist(), *counts, *metrics]
            totals = [known + new for known, new in zip(totals, found, strict=True)]
        return totals

    def answers(self, device: torch.device) -> tuple[float, float]:
        """Return the number of this rank's correct answers, and of its questions."""
        assert self.held_out is not None
        right = 0
        for start in range(0, len(self.asked), _ANSWERS_AT_ONCE):
            some = self.asked[start : start + _ANSWERS_AT_ONCE]
            with self.parts.llava.own_attention():  # these batches are padded, not packed
                written = generate_batch(
                    self.parts,
                    [asked.prompt for asked in some],
                    [asked.images for asked in some],
                    image_sizes=[asked.sizes for asked in some],
                    max_new_tokens=self.held_out.max_new_tokens,
                    extract=lambda images: self.features(images).to(device),
                )
            said = [answer_text(self.parts, ids) for ids in written]
            right += sum(same(text, asked.answer) for text, asked in zip(said, some, strict=True))
        return right, len(self.asked)

    def kept(self, images: Tensor | None) -> Tensor | None:
        """Return the form in which views are kept in memory: features, or pixels while the tower is trainable."""
        return images if images is None or self.tower_learns else self.features(images).cpu()

    def features(self, images: Tensor) -> Tensor:
        """Return the features of views that are pixels (uint8), and others unchanged."""
        if images.dtype != torch.uint8:
            return images
        assert self.held_out is not None
        spec = self.held_out.stream.image_spec
        return self.parts.tower.extract(images, lambda views: normalize_pixels(views, spec))


def _read_batches(held_out: HeldOut, rank: int, world_size: int) -> Iterator[MicroBatch]:
    """Yield this rank's packed rows; every rank has the same number of them."""
    settings, plan = held_out.stream, held_out.plan
    steps = range(plan.num_steps)
    for window in describe_micro_batches(plan, held_out.lengths, steps, settings.row_length, world_size):
        mine = [row == rank for row in window["rank"].to_pylist()]
        for table in read_micro_batches(window.filter(pa.array(mine)), settings):
            rows = add_images(table, settings).to_pylist()
            yield from (micro_batch(row, settings) for row in rows if row["step"] != NO_STEP)


def _read_questions(held_out: HeldOut, parts: LlavaParts, rank: int, world_size: int) -> Iterator[HeldOutQuestion]:
    """Yield this rank's questions: the first turns of every ``world_size``-th record."""
    places = zip(*(held_out.lengths.column(name).tolist() for name in ("shard", "row", "part")), strict=True)
    records = [(shard, row) for shard, row, part in places if part == 0][: held_out.num_answers]
    mine = records[rank::world_size]
    shards, rows = [shard for shard, _ in mine], [row for _, row in mine]
    found = fetch_records(pa.table({"shard": [shards], "row": [rows]}), held_out.stream)
    for place in mine:
        yield make_question(held_out.stream, parts, place, found[place])


def make_question(
    settings: StreamSettings,
    parts: LlavaParts,
    place: tuple[int, int],
    record: Mapping[str, Any],
    find: Callable[[Sequence[Turn]], tuple[str | None, Sequence[Turn], Turn] | None] = first_question,
) -> HeldOutQuestion:
    """Return a record's turns up to its first supervised answer, or another to ``find``, with their images, and it."""
    found = find([Turn.from_row(turn) for turn in record["turns"]])
    assert found is not None  # the plan has none without a learnt answer
    system, asked, answer = found
    num_images = sum(turn.value.count("<image>") for turn in asked)
    sizes = list(zip(record["widths"], record["heights"], strict=True))[:num_images]
    if settings.features:
        cells = fetch_features(settings.features, [location_key(*place, number) for number in range(len(sizes))])
        images = unpack_features(b"".join(cells), **settings.feature_form) if sizes else None
    else:
        shown = zip(record["images"], sizes, strict=False)
        cell = b"".join(decode_views(image, size, record["id"], settings) for image, size in shown)
        spec = settings.image_spec
        images = torch.from_numpy(unpack_pixels(cell, spec.height, spec.width)) if sizes else None
    return HeldOutQuestion(
        tokenize_question(system, asked, parts.template, parts.tokenizer), images, sizes, answer.value
    )


def same(said: str, answer: str) -> bool:
    """Return whether an answer equals the record's, ignoring case, white space and one final period."""
    return said.strip().lower().removesuffix(".") == answer.strip().lower().removesuffix(".")
