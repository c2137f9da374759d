"""Tiny random models and a small tokenizer, written as the folders that real ones come in."""

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llava_ray.model.formats.manifest import Manifest

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
UNK, BOS, EOS = 0, 1, 2

WIDTH = 32
TOWER_WIDTH = 48
PATCH = 8
IMAGE_SIZE = 32  # 16 patches

LANGUAGE_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama_tied": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 6}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"pad_token_id": UNK}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 8, "sliding_window": 6}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"pad_token_id": UNK, "no_rope_layers": [1, 0]}),
}

TOWERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", {"image_size": IMAGE_SIZE, "intermediate_size": 64}),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", {"image_size": IMAGE_SIZE, "intermediate_size": 64}),
    # The kind for any aspect ratio; it has as many position embeddings as our images have patches.
    "siglip2": ("Siglip2VisionConfig", "Siglip2VisionModel", {"num_patches": 16, "intermediate_size": 64}),
    # DINOv2 interpolates its position embeddings: its own image size is another.
    "dinov2": ("Dinov2Config", "Dinov2Model", {"image_size": 2 * IMAGE_SIZE, "mlp_ratio": 2}),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        {"image_size": 2 * IMAGE_SIZE, "mlp_ratio": 2, "num_register_tokens": 4},
    ),
}


def make_tokenizer(folder: Path, more_words: Sequence[str] = ()) -> Path:
    """Write a byte-level BPE tokenizer of 300 tokens that adds <s>, and return ``folder``.

    With ``more_words``, which stand between spaces, it has a token for each of them too.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000 if more_words else 300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    words = [
        "what",
        "is",
        "it",
        "question",
        "assistant",
        "user",
        "yes",
        "no",
        "image",
        "circle",
        "square",
        "red",
        "blue",
    ]
    spaced = [" ".join(("", *more_words, ""))] * 2 if more_words else []
    tokenizer.train_from_iterator([*words, *spaced, *string.ascii_letters], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=2048
    )
    fast.save_pretrained(folder)
    return folder


def make_language_model(
    folder: Path, kind: str = "llama", *, seed: int = 0, vocab_size: int = 300, **changes: Any
) -> Path:
    """Write a two-layer language model of that kind (a key of LANGUAGE_MODELS) with a tokenizer."""
    config_class, model_class, extra = LANGUAGE_MODELS[kind]
    config = getattr(transformers, config_class)(
        **{
            "vocab_size": vocab_size,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            # Larger than usual, so that random models do not all say the same.
            "initializer_range": 0.2,
            **extra,
            **changes,
        }
    )
    torch.manual_seed(seed)
    getattr(transformers, model_class)(config).save_pretrained(folder)
    return make_tokenizer(folder)


def make_vision_tower(
    folder: Path,
    kind: str = "clip",
    *,
    seed: int = 1,
    hidden_size: int = TOWER_WIDTH,
    image_size: int = IMAGE_SIZE,
    patch_size: int = PATCH,
) -> Path:
    """Write a three-block vision tower of that kind (a key of TOWERS) with its image processor."""
    config_class, model_class, extra = TOWERS[kind]
    if image_size != IMAGE_SIZE:
        extra = extra | {"image_size": image_size}
    config = getattr(transformers, config_class)(
        hidden_size=hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        patch_size=patch_size,
        initializer_range=0.2,
        **extra,
    )
    torch.manual_seed(seed)
    getattr(transformers, model_class)(config).save_pretrained(folder)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    processor.save_pretrained(folder)
    return folder


def make_manifest(base: Path, **changes: Any) -> Manifest:
    """Describe a bundle whose parts lie in ``base``, without any weights."""
    parts = {
        "language_model": {"inside": False, "base": str(base), "fingerprint": "a" * 64},
        "vision_tower": {"inside": False, "base": "openai/clip-vit-large-patch14-336", "fingerprint": "b" * 64},
    }
    sizes = {"mm_hidden_size": TOWER_WIDTH, "hidden_size": WIDTH, "model_max_length": 512}
    settings = {"mm_projector_type": "linear", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
    return Manifest.model_validate(
        {"version": "v1", "image_aspect_ratio": "square"} | parts | sizes | settings | changes
    )
