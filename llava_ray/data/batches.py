"""The end of the stream inside a train worker: Arrow rows to tensors, grouped into steps."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from llava_ray.data.packing import NO_STEP, STEP_TOTALS, unpack_block, unpack_features, unpack_pixels, unpack_tokens
from llava_ray.data.pair_lengths import PairLengths
from llava_ray.data.settings import StreamSettings
from llava_ray.images.anyres import Size


@dataclass(frozen=True)
class MicroBatch:
    """One packed row of one rank, with pixels or features depending on where the tower runs; neither without images."""

    step: int
    rank: int
    num_supervised: int
    """Supervised tokens of the step's conversations, over all ranks: what the loss is divided by."""
    num_micro_batches: int
    ids: list[str]
    num_tokens: list[int]
    input_ids: Int[Tensor, "1 t"]
    position_ids: Int[Tensor, "1 t"]
    labels: Int[Tensor, "1 t"]
    image_sizes: list[Size]
    """(width, height) of each image before it was cut into views, in order; together they have n views."""
    pixels: UInt8[Tensor, "n 3 h w"] | None
    features: Float[Tensor, "n p v"] | None
    num_pairs: int = 0
    """Preferences of the whole step, over all ranks."""
    num_chosen: int = 0
    """Supervised tokens of their chosen answers."""
    pairs: list[PairLengths | None] = field(default_factory=list)
    """The lengths of each sample that is a preference; None for a conversation. [] in a step without preferences."""
    reference: Float[Tensor, "m 2"] | None = None
    """The reference's log-probabilities of the row's m preferences, where the objective needs them."""
    sources: list[int] = field(default_factory=list)
    """The number of each sample's source in a mixture; 0 without one."""


def iterate_steps(
    blocks: Iterable[pa.Table], rank: int, first_step: int, settings: StreamSettings
) -> Iterator[list[MicroBatch]]:
    """Yield this rank's micro-batches step by step, from ``first_step`` on, checking order and rank."""
    step, pending = first_step, []
    for block in blocks:
        for row in unpack_block(block).to_pylist():
            if row["step"] == NO_STEP:
                continue
            if (row["step"], row["rank"]) != (step, rank):
                raise AssertionError(
                    f"rank {rank} expected step {step} and was dealt step {row['step']} of rank {row['rank']}"
                )
            pending.append(micro_batch(row, settings))
            if len(pending) == row["num_micro_batches"]:
                yield pending
                step, pending = step + 1, []
    if pending:
        raise AssertionError(f"the stream ended inside step {step}")


def micro_batch(row: dict[str, Any], settings: StreamSettings) -> MicroBatch:
    """Convert one row of the stream to tensors on the CPU."""
    input_ids, position_ids, labels = unpack_tokens(row)
    pixels = features = None
    if row.get("pixels"):
        pixels = torch.from_numpy(unpack_pixels(row["pixels"], settings.image_spec.height, settings.image_spec.width))
    elif row.get("features"):
        features = unpack_features(row["features"], **settings.feature_form)
    return MicroBatch(
        step=row["step"],
        rank=row["rank"],
        **{name: row[name] for name in STEP_TOTALS},
        num_micro_batches=row["num_micro_batches"],
        ids=row["ids"],
        num_tokens=row["num_tokens"],
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        labels=torch.from_numpy(labels)[None],
        image_sizes=[(width, height) for width, height in row["image_sizes"]],
        pixels=pixels,
        features=features,
        pairs=[PairLengths(*lengths) if lengths else None for lengths in row["pairs"]],
        reference=_reference_of(row),
        sources=row["sources"],
    )


def _reference_of(row: dict[str, Any]) -> Float[Tensor, "m 2"] | None:
    """Return the reference's log-probabilities of a row's preferences; None where they were not computed."""
    if not row["reference"]:
        return None
    is_pair = torch.tensor([bool(lengths) for lengths in row["pairs"]])
    return torch.tensor(row["reference"], dtype=torch.float64).view(-1, 2)[is_pair]


def describe_row(batch: MicroBatch) -> str:
    """Return what a row holds, for people."""
    return f"row of {len(batch.ids)} samples, {sum(batch.num_tokens)} tokens and {len(batch.image_sizes)} images"
