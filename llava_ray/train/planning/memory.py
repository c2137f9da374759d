"""An estimate of a train worker's GPU memory: arithmetic on the model's shapes and the run's settings alone.

Sources: what ZeRO partitions, *ZeRO* (https://arxiv.org/abs/1910.02054, section 5): with W workers each of weights,
gradients and optimiser state is whole or a W-th. What a layer keeps for its backward pass, counted as in *Reducing
Activation Recomputation* (https://arxiv.org/abs/2205.05198, section 4), but of the layers that are trained here:
RMSNorm, a gated MLP, attention without a table of scores, no dropout. Sizes of 4-bit weights: *QLoRA*
(https://arxiv.org/abs/2305.14314, section 3). DeepSpeed's buffers: its defaults, which ``train/zero.py`` leaves alone.

It is an estimate and meant to be a little high: every position counts as supervised, every row as full of images.
"""

from dataclasses import dataclass, fields
from typing import Literal

GIB = 2**30

# DeepSpeed's defaults, in numbers (deepspeed/runtime/zero/config.py).
_REDUCE_BUCKET = 500_000_000
_PREFETCH_BUCKET = 50_000_000
_MAX_LIVE = 1_000_000_000
_SUB_GROUP = 1_000_000_000

_LOGITS_CHUNK = 512  # tokens whose logits are in fp32 at one time (objectives/cross_entropy.py)
HEAD_CHUNK = 256  # tokens whose logits exist at one time (model/network/head_loss.py)
_IMAGES_PER_FORWARD = 64  # of a frozen tower

# CUDA context, NCCL's buffers, cuBLAS workspaces, fragmentation: no formula gives it.
_RESERVED = 1.5 * GIB

# Usable GiB, by Ray's names of accelerators: a little below the nominal size.
GPU_MEMORY_GIB: dict[str, float] = {
    "T4": 14.6,
    "P100": 15.9,
    "V100": 15.8,
    "A10G": 22.1,
    "L4": 22.1,
    "L40S": 44.4,
    "A100": 39.4,
    "A100-40G": 39.4,
    "A100-80G": 79.2,
    "H100": 79.1,
    "H20": 95.0,
    "H200": 139.8,
    "B200": 178.0,
}


@dataclass(frozen=True)
class Blocks:
    """A stack of transformer blocks. ``attention_width`` is that of all heads together."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    attention_width: int
    gated: bool
    """Whether the MLP has a gate (Llama's SwiGLU) or one activation (a ViT's GELU)."""


@dataclass(frozen=True)
class ModelSizes:
    """A model in numbers of parameters, and the shapes that activations depend on."""

    language_model: int
    language_linears: int
    """Parameters of the language model's Linear layers without the head: what bitsandbytes quantises."""
    largest_layer: int
    """Parameters of one of its blocks."""
    embeddings: int
    """Parameters of its largest single table."""
    projector: int
    vision_tower: int
    trainable: int
    """Trainable parameters in all parts, adapters included."""
    adapter: int
    """Parameters of adapters, which come on top of the parts."""
    blocks: Blocks
    vocab_size: int
    tower_blocks: Blocks
    mm_hidden_size: int
    tokens_per_view: int
    """Positions that the tower computes for one view of an image, class token included."""
    image_side: int
    """Pixels."""
    passes_per_view: int = 1
    """Forwards of the tower for one view: with S2 one for each square of each scale."""
    tower_learns: bool = False
    plain_head: bool = False
    """Whether head and cross-entropy can be computed together, so that the logits of a row never exist."""


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run that its memory depends on."""

    zero_stage: Literal[0, 1, 2, 3]
    num_workers: int
    row_length: int
    bf16: bool = True
    gradient_checkpointing: bool = True
    offload_optimizer: bool = False
    inline_tower: bool = True
    eager_attention: bool = False
    masked_attention: bool = False
    """Whether attention is over the whole row, under a mask that keeps samples apart."""
    fused_optimizer: bool = True
    """Whether AdamW updates in one kernel; otherwise it holds one fp32 value a parameter more."""
    fp32_gradients: bool = False
    """Whether gradients are added up and reduced in fp32."""
    bits: Literal[4, 8, 16] = 16
    double_quant: bool = True
    anyres: bool = False
    """Whether images are cut into views, whose padding takes no tokens."""
    lora_dropout: bool = False
    """Whether adapters see a dropped-out copy of their input, which has to be kept."""

    @property
    def width(self) -> int:
        """Return the bytes of a number in the compute dtype."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True)
class Memory:
    """Bytes on each worker's GPU, and with an offloaded optimiser in its share of the host's memory."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    vision: float
    buffers: float
    reserved: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """Return the bytes that the GPU must have."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "host")


def estimate_memory(sizes: ModelSizes, run: RunSettings) -> Memory:
    """Return the memory of a worker at the peak of a step."""
    logits = logits_bytes(sizes, run)
    activations = activation_bytes(sizes, run)
    # The optimiser's step comes when activations are gone, with fp32 copies of gradients in their place.
    step = step_bytes(sizes, run)
    return Memory(
        weights=weight_bytes(sizes, run),
        gradients=gradient_bytes(sizes, run),
        optimizer=0.0 if run.offload_optimizer else optimizer_bytes(sizes, run),
        activations=max(activations, step - logits),
        logits=logits,
        vision=vision_bytes(sizes, run),
        buffers=buffer_bytes(sizes, run),
        reserved=_RESERVED,
        # DeepSpeedCPUAdam keeps fp32 gradients beside its states.
        host=optimizer_bytes(sizes, run) + 4 * sizes.trainable / run.num_workers if run.offload_optimizer else 0.0,
    )


def weight_bytes(sizes: ModelSizes, run: RunSettings) -> float:
    """Return the bytes of all weights: a W-th of the engine's at stage 3; a frozen tower is never partitioned."""
    tower = run.width * sizes.vision_tower if run.inline_tower or sizes.tower_learns else 0
    plain = sizes.language_model + sizes.projector + sizes.adapter
    quantized = 0.0
    if run.bits < 16:
        plain -= sizes.language_linears
        quantized = sizes.language_linears * bytes_per_quantized(run)
    inside = run.width * plain + quantized + (tower if sizes.tower_learns else 0)
    outside = 0 if sizes.tower_learns else tower
    return inside / (run.num_workers if run.zero_stage == 3 else 1) + outside


def bytes_per_quantized(run: RunSettings) -> float:
    """Return the bytes of a quantised weight: 4 bits, per 64 weights an fp32 scale or, in blocks of 256, one of 8 bits.

    With 8 bits a row's fp32 scale is negligible.
    """
    if run.bits == 8:
        return 1.0
    scale = 1 / 64 + 4 / (64 * 256) if run.double_quant else 4 / 64
    return 0.5 + scale


def gradient_bytes(sizes: ModelSizes, run: RunSettings) -> float:
    """Return the bytes of gradients, in the weights' dtype or fp32: a W-th from stage 2 on, none there with offload.

    Below stage 2 gradients that are added up in fp32 come beside those of one backward pass.
    """
    width = 4 if run.fp32_gradients else run.width
    if run.zero_stage < 2:
        return (run.width + (width if width != run.width else 0)) * sizes.trainable
    return 0.0 if run.offload_optimizer else width * sizes.trainable / run.num_workers


def optimizer_bytes(sizes: ModelSizes, run: RunSettings) -> float:
    """Return the bytes of AdamW's two fp32 moments and, with bf16 or ZeRO, of an fp32 copy of the weights."""
    master = 4 if run.bf16 or run.zero_stage else 0
    return (8 + master) * sizes.trainable / (run.num_workers if run.zero_stage else 1)


def step_bytes(sizes: ModelSizes, run: RunSettings) -> float:
    """Return the bytes of gradients cast to fp32 for the optimiser, on the GPU, and of what it computes beside them.

    AdamW that is not fused takes the square roots of all second moments at once, in fp32.
    """
    if run.offload_optimizer:
        return 0.0
    own = sizes.trainable / (run.num_workers if run.zero_stage else 1)
    return (4 if run.fused_optimizer else 8) * (min(own, _SUB_GROUP) if run.zero_stage == 3 else own)


def layer_bytes(blocks: Blocks, run: RunSettings) -> float:
    """Return the bytes that one block keeps of one position for its backward pass.

    Two norms keep their fp32 input, what their gain multiplies and their output; attention keeps queries, keys and
    values (for every head) and its output, with a number in fp32 for each head; a gated MLP keeps gate, activation, up
    and their product, a plain one what goes into its activation, a factor of it and what comes out.
    """
    norms = 2 * (4 + 2 * run.width) * blocks.hidden_size
    attention = 4 * run.width * blocks.attention_width + 4 * blocks.num_heads
    if run.eager_attention:  # scores after softmax in fp32 and as they are used, for each earlier position
        attention += (4 + run.width) * blocks.num_heads * run.row_length
    mlp = (4 if blocks.gated else 3) * run.width * blocks.intermediate_size
    dropped = 0
    if run.lora_dropout:  # a copy and a mask of the input of each of the seven matrices
        inputs = 5 * blocks.hidden_size + blocks.attention_width + blocks.intermediate_size
        dropped = (run.width + 1) * inputs
    return norms + attention + mlp + dropped


def activation_bytes(sizes: ModelSizes, run: RunSettings) -> float:
    """Return the bytes of one row's activations; with checkpointing those of each block's input and of one block.

    The block at work also has the gradients of its widest values.
    """
    blocks, row = sizes.blocks, run.row_length
    layer = layer_bytes(blocks, run)
    working = run.width * (2 * blocks.intermediate_size + 4 * blocks.hidden_size)
    if run.gradient_checkpointing:
        saved = blocks.num_layers * run.width * blocks.hidden_size + layer
    else:
        saved = blocks.num_layers * layer
    ends = run.width * (sizes.mm_hidden_size + 5 * blocks.hidden_size)  # the projector, and embeddings with features
    return row * (saved + working + ends) + mask_bytes(run)


def mask_bytes(run: RunSettings) -> float:
    """Return the bytes of the mask of a whole row, a boolean and what is added to scores for each pair of tokens."""
    return (1 + run.width) * run.row_length**2 if run.masked_attention or run.eager_attention else 0.0


def logits_bytes(sizes: ModelSizes, run: RunSettings) -> float:
    """Return the bytes of a row's logits and gradients; in bf16 also a chunk in fp32, three times (cross-entropy).

    A plain head, below stage 3, holds a chunk of them, gradients of its input and, where it learns, its own in fp32
    with those of a chunk.
    """
    if sizes.plain_head and run.zero_stage < 3:
        width = sizes.blocks.hidden_size
        own = 4 + (run.width if run.bf16 else 0)
        head = own * sizes.vocab_size * width if sizes.trainable >= sizes.language_model else 0
        return (2 * run.width + 8) * HEAD_CHUNK * sizes.vocab_size + run.width * run.row_length * width + head
    row = 2 * run.width * run.row_length * sizes.vocab_size
    if run.bf16:
        return row + 3 * 4 * min(_LOGITS_CHUNK, run.row_length) * sizes.vocab_size
    return row + 4 * run.row_length * sizes.vocab_size


def vision_bytes(sizes: ModelSizes, run: RunSettings) -> float:
    """Return the bytes of the tower for the views of a row: one block's if it is frozen, all blocks' if trainable."""
    if not run.inline_tower and not sizes.tower_learns:
        return 0.0
    blocks = sizes.tower_blocks
    # Padding tokens of an anyres canvas are dropped: ordinary photographs keep more than half of the tokens.
    num_views = -(-run.row_length // (sizes.tokens_per_view // (2 if run.anyres else 1)))
    pixels = num_views * 3 * sizes.image_side**2 * (4 + run.width)
    positions = num_views * sizes.passes_per_view * sizes.tokens_per_view
    if not sizes.tower_learns:
        passes = min(num_views * sizes.passes_per_view, max(_IMAGES_PER_FORWARD, sizes.passes_per_view))
        positions = passes * sizes.tokens_per_view
        return pixels + positions * run.width * (6 * blocks.hidden_size + 2 * blocks.intermediate_size)
    plain = RunSettings(run.zero_stage, run.num_workers, sizes.tokens_per_view, bf16=run.bf16)
    layer = layer_bytes(blocks, plain)
    if run.gradient_checkpointing:
        return pixels + positions * (blocks.num_layers * run.width * blocks.hidden_size + layer)
    return pixels + positions * blocks.num_layers * layer


def buffer_bytes(sizes: ModelSizes, run: RunSettings) -> float:
    """Return the bytes of DeepSpeed's buffers: reduction buckets, and at stage 3 gathered layers."""
    bucket = run.width * _REDUCE_BUCKET
    if run.zero_stage == 0:
        return min(run.width * sizes.trainable, bucket) if run.num_workers > 1 else 0.0
    if run.zero_stage < 3:
        return bucket * (2 if run.zero_stage == 2 else 1)  # overlap_comm doubles it
    gathered = min(sizes.embeddings + 2 * sizes.largest_layer, _MAX_LIVE)
    return bucket + run.width * (_PREFETCH_BUCKET + gathered)
