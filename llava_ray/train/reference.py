"""The reference's log-probabilities of all preferences, computed once by an actor pool and kept beside the lengths.

The reference is the model that the run starts from. The policy is equal to it before the first step, which is checked
then: log-probabilities of other weights would be learnt from silently.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import ray
import torch
import torch.distributed as dist
from jaxtyping import Float
from ray.util import ActorPool
from tqdm import tqdm

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.preference import WITH_REFERENCE
from llava_ray.data.batches import MicroBatch, micro_batch
from llava_ray.data.descriptors import describe_window
from llava_ray.data.mixed_lengths import MixedLengths
from llava_ray.data.packing import NO_STEP
from llava_ray.data.reference_file import ReferenceFiles, has_reference, write_reference
from llava_ray.data.settings import StreamSettings
from llava_ray.data.shards import PREFERENCES
from llava_ray.data.stages import add_images, read_micro_batches
from llava_ray.data.storage import file_size, read_stored, write_stored
from llava_ray.data.token_lengths import TokenLengths
from llava_ray.errors import TrainingError
from llava_ray.log_file import terminal
from llava_ray.objectives.cross_entropy import compute_row_losses
from llava_ray.objectives.objective import LogitsModel, PackedRow
from llava_ray.objectives.preference import sum_by_answer
from llava_ray.placement import in_pool
from llava_ray.runtime import Resources
from llava_ray.train.engine import assemble_for, check_bf16
from llava_ray.train.identity import DATA, Identity
from llava_ray.train.objective import build_row

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_CHUNK = 256  # preferences whose log-probabilities an actor computes and writes at a time
_FORMAT_VERSION = 1
_RESTARTS = 3  # of an actor whose process or node is lost
# Largest mean difference of a token's log-probability between reference and untrained policy: rows of other lengths
# round differently, other weights differ by far more.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class ReferenceJob:
    """Everything that an actor needs to compute log-probabilities."""

    config: FinetuneConfig
    stream: StreamSettings
    lengths: TokenLengths
    folder: str
    num_threads: int


def cache_reference(
    config: FinetuneConfig, stream: StreamSettings, lengths: TokenLengths, identity: Identity, resources: Resources
) -> ReferenceFiles | None:
    """Return the reference's log-probabilities, computing what is missing; None where nothing needs them.

    Needs a connected Ray. An interrupted computation resumes with the missing chunks. Raises DataError, ModelError.
    """
    if config.train.objective not in WITH_REFERENCE:
        return None
    parts = lengths.parts if isinstance(lengths, MixedLengths) else (lengths,)
    first_examples = lengths.first_examples[:-1] if isinstance(lengths, MixedLengths) else (0,)
    folders = tuple(
        _cache_source(config, source, part, identity, resources) if source.data.kind_of_records == PREFERENCES else None
        for source, part in zip(stream.sources or (stream,), parts, strict=True)
    )
    return ReferenceFiles(folders, first_examples) if any(folders) else None


def _cache_source(
    config: FinetuneConfig, stream: StreamSettings, lengths: TokenLengths, identity: Identity, resources: Resources
) -> str:
    """Return the folder with the log-probabilities of one source's preferences, computing what is missing."""
    folder = f"{lengths.path}/reference-{_reference_key(config, identity)}"
    if has_reference(folder):
        print(f"Reference: log-probabilities reused from {folder}", flush=True)  # noqa: T201 - for the user
        return folder
    num_examples = len(lengths.column("num_tokens"))
    print(f"Reference: log-probabilities of {num_examples:,} examples into {folder}", flush=True)  # noqa: T201
    firsts = range(0, num_examples, _CHUNK)
    missing = [first for first in firsts if file_size(_chunk_path(folder, first)) is None]
    frozen = stream.model.replaced({"unfreeze_mm_vision_tower": False})  # the tower as it is, beside the model
    job = ReferenceJob(config, replace(stream, model=frozen), lengths, folder, resources.num_threads)
    _compute_chunks(job, [(first, min(first + _CHUNK, num_examples)) for first in missing], resources)
    chunks = [json.loads(read_stored(_chunk_path(folder, first))) for first in firsts]
    write_reference(folder, np.array([row for chunk in chunks for row in chunk], np.float64).reshape(-1, 2))
    return folder


def _reference_key(config: FinetuneConfig, identity: Identity) -> str:
    """Return 12 hex digits of the reference's weights and of all that changes its log-probabilities."""
    models = {key: value for key, value in identity.items() if key != DATA}
    settings = config.model.model_dump(mode="json", exclude={key.rpartition(".")[2] for key in models})
    others = [config.train.seed, config.train.uses_bf16, config.lora.bits, config.data.image_aspect_ratio]
    text = json.dumps([_FORMAT_VERSION, models, settings, others], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _chunk_path(folder: str, first: int) -> str:
    return f"{folder}/chunks/{first:09d}.json"


def _compute_chunks(job: ReferenceJob, chunks: list[tuple[int, int]], resources: Resources) -> None:
    """Compute and write the chunks, by as many actors as the run has workers; one that dies is started again."""
    reserved = {
        "num_cpus": resources.cpus_per_worker,
        "num_gpus": resources.gpus_per_worker if resources.use_gpu else 0,
        "max_restarts": _RESTARTS,
        "max_task_retries": _RESTARTS,
        **in_pool("train"),
    }
    num_actors = min(len(chunks), resources.num_workers)
    pool = ActorPool([ray.remote(ReferenceActor).options(**reserved).remote(job) for _ in range(num_actors)])
    with tqdm(total=sum(end - first for first, end in chunks), desc="reference", unit="pair", file=terminal()) as bar:
        for number in pool.map_unordered(lambda actor, chunk: actor.write.remote(*chunk), chunks):
            bar.update(number)


class ReferenceActor:
    """The reference, which computes and writes the log-probabilities of chunks of examples."""

    def __init__(self, job: ReferenceJob) -> None:
        """Load the model once per actor."""
        torch.set_num_threads(job.num_threads)
        self.job = job
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        check_bf16(job.config.train, self.device)
        self.parts = assemble_for(job.config, quantization=job.config.lora.quantization)
        self.parts.llava.attend_by_sample()
        if self.device.type == "cuda":
            self.parts.llava.to(self.device)
            self.parts.tower.to(self.device)
        self.parts.llava.eval()

    def write(self, first: int, end: int) -> int:
        """Compute and write the log-probabilities of the examples from ``first`` to ``end``; return their number."""
        rows = self.compute(np.arange(first, end, dtype=np.int32))
        write_stored(_chunk_path(self.job.folder, first), json.dumps(rows.tolist()).encode())
        return end - first

    @torch.no_grad()
    def compute(self, examples: np.ndarray) -> Float[np.ndarray, "n 2"]:
        """Return the log-probabilities of examples in their order; zeros of conversations."""
        job, stream = self.job, self.job.stream
        window = {"first_step": 0, "sizes": [len(examples)], "examples": examples.tobytes()}
        descriptors = describe_window(window, job.lengths, stream.row_length, 1)  # type: ignore[arg-type]
        places = job.lengths.take(examples, ("shard", "row", "part")).to_pylist()
        order = {tuple(place.values()): index for index, place in enumerate(places)}
        found = np.zeros((len(examples), 2))
        samples = iter(zip(*(descriptors[name].to_pylist() for name in ("shard", "row", "part")), strict=True))
        for block in read_micro_batches(descriptors, stream):
            for row in add_images(block, stream).to_pylist():
                members = [order[place] for place in zip(*next(samples), strict=True)]
                if row["step"] == NO_STEP:
                    continue
                batch = micro_batch(row, stream)
                is_pair = [pair is not None for pair in batch.pairs]
                chosen = [member for member, pair in zip(members, is_pair, strict=True) if pair]
                if chosen:
                    packed = build_row(batch, self.parts, stream, self.device)
                    found[chosen] = compute_pair_log_probs(self.parts.llava, packed).double().cpu().numpy()
        return found


def compute_pair_log_probs(model: LogitsModel, row: PackedRow) -> Float[torch.Tensor, "m 2"]:
    """Return the natural log-probabilities of the answers of a row's preferences."""
    _, losses = compute_row_losses(model, row)
    if row.pairs is None:
        return losses.new_zeros(0, 2) + 0.0 * losses.sum()
    return sum_by_answer(losses, row.pairs)


def check_reference(engine: "DeepSpeedEngine", batch: MicroBatch, row: PackedRow, dtype: torch.dtype) -> None:
    """Raise TrainingError if the untrained policy differs from the reference; collective, each rank by its own row.

    Before the first step both are the same model, without dropout.
    """
    engine.eval()
    try:
        with torch.no_grad():
            found = compute_pair_log_probs(engine, row)
    finally:
        engine.train()
    worst = torch.zeros((), device=row.input_ids.device)
    if row.pairs is not None and row.pairs.reference is not None:
        differences = (found - row.pairs.reference).abs().sum(1) / row.pairs.num_tokens.sum(1)
        worst = differences.nan_to_num(nan=torch.inf).max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if float(worst) > _TOLERANCE[dtype]:
        raise TrainingError(
            f"the reference's log-probabilities differ from those of the model that the run starts from by "
            f"{float(worst):.3g} a token (on this rank: {', '.join(batch.ids[:3])}); expected at most "
            f"{_TOLERANCE[dtype]:g}. They were computed with other weights: delete the folder reference-… beside the "
            "token lengths, and start again"
        )
