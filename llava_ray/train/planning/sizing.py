"""A run's model and settings as inputs of the memory estimate."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.model.network.attention_shape import AttentionShape
from llava_ray.model.network.head_loss import find_plain_head
from llava_ray.model.network.tower import VisionTower
from llava_ray.model.summary import ModelSummary, count_positions, summarize_model
from llava_ray.train.planning.memory import Blocks, Memory, ModelSizes, RunSettings, estimate_memory
from llava_ray.train.zero import FUSED_ADAM, zero_config


def estimate_run(config: FinetuneConfig) -> Memory:
    """Return the memory that each worker needs. Raises ModelError if the model's size cannot be known from here."""
    return estimate_memory(measure_sizes(summarize_model(config)), run_settings(config))


def measure_sizes(summary: ModelSummary) -> ModelSizes:
    """Return a model's sizes as the memory estimate takes them."""
    language = summary.language_model
    text: Any = language.config.get_text_config()
    totals = {part.name: part for part in summary.parts}
    tables = [p.numel() for name, p in language.named_parameters() if ".layers." not in name and p.dim() == 2]
    blocks = [sum(p.numel() for p in block.parameters()) for block in find_blocks(language)]
    scales = summary.tower.s2_scales or (summary.image_side,)
    return ModelSizes(
        language_model=totals["language_model"].num_total,
        language_linears=sum(inputs * outputs for inputs, outputs in summary.linears.values()),
        largest_layer=max(blocks, default=0),
        embeddings=max(tables, default=0),
        projector=totals["projector"].num_total,
        vision_tower=sum(p.numel() for p in summary.tower.parameters()),
        trainable=sum(part.num_trainable for part in summary.parts),
        adapter=totals["adapter"].num_total if "adapter" in totals else 0,
        blocks=_language_blocks(text, summary.linears),
        vocab_size=int(text.vocab_size),
        tower_blocks=_tower_blocks(summary.tower),
        mm_hidden_size=summary.tower.hidden_size,
        tokens_per_view=count_positions(summary.tower, min(scales)),
        image_side=max(scales),
        passes_per_view=summary.tower.passes_per_view,
        tower_learns=totals["vision_tower"].num_trainable > 0,
        plain_head=find_plain_head(language) is not None,
    )


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """Return a language model's transformer blocks: its longest list of modules."""
    lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _language_blocks(text: Any, linears: Mapping[str, tuple[int, int]]) -> Blocks:
    """Return the shapes of a language model's blocks from its config."""
    attention = AttentionShape.of(text)
    return Blocks(
        num_layers=int(text.num_hidden_layers),
        hidden_size=int(text.hidden_size),
        intermediate_size=int(text.intermediate_size),
        num_heads=attention.num_heads,
        attention_width=attention.width,
        gated=any("gate" in name for name in linears),
    )


def _tower_blocks(tower: VisionTower) -> Blocks:
    """Return the shapes of a tower's blocks from its config; those after the selected layer do not run."""
    config: Any = tower.config
    width = int(config.hidden_size)
    inner = config.to_dict().get("intermediate_size") or int(width * config.mlp_ratio)
    depth = max(len(find_blocks(tower.backbone)), 1)
    return Blocks(depth, width, inner, int(config.num_attention_heads), width, gated=False)


def run_settings(config: FinetuneConfig) -> RunSettings:
    """Return the settings of a run that its memory depends on."""
    train, lora = config.train, config.lora
    return RunSettings(
        zero_stage=train.zero_stage,
        num_workers=config.cluster.num_workers,
        row_length=train.row_length,
        bf16=train.uses_bf16,
        gradient_checkpointing=train.gradient_checkpointing,
        offload_optimizer=train.offload_optimizer,
        inline_tower=config.data.vision_features == "inline",
        anyres=config.data.image_aspect_ratio == "anyres",
        eager_attention=config.model.attn_implementation == "eager",
        masked_attention=config.model.attn_implementation == "masked_sdpa",
        fused_optimizer=FUSED_ADAM,
        fp32_gradients=zero_config(train, gpu=True)["data_types"]["grad_accum_dtype"] == "fp32",
        bits=lora.bits,
        double_quant=lora.double_quant,
        lora_dropout=lora.lora_enable and lora.lora_dropout > 0,
    )
