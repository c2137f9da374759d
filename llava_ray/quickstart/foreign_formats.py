"""Readers of a DINOv2 backbone in ONNX and a Llama-like model in GGUF.

Only the tensors needed are read: those of dropped layers are never dequantised.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedTokenizerFast

from llava_ray.errors import ModelError

# The exporter stored the position embeddings of the class token and of the patches as unnamed constants.
CLASS_POSITION, PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"

_GGUF_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_GGUF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type


def read_vision_tensors(graph: Any, to_array: Callable[[Any], np.ndarray], num_layers: int) -> dict[str, Tensor]:
    """Read the backbone of an ONNX graph under DINOv2's names in transformers."""
    constants = {tensor.name: to_array(tensor) for tensor in graph.initializer}
    arrays = {name: array for name, array in constants.items() if name.startswith("backbone.")}
    for node in graph.node:
        # Linear weights are anonymous; their node's path (/backbone/.../dense/MatMul) names the module.
        if node.op_type == "MatMul" and node.input[1] in constants:
            module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            arrays[f"{module}.weight"] = constants[node.input[1]].T
    tensors = {
        name.removeprefix("backbone."): torch.tensor(array)
        for name, array in arrays.items()
        if name.startswith("backbone.") and _layer_of(name) < num_layers
    }
    positions = np.concatenate([constants[CLASS_POSITION], constants[PATCH_POSITIONS]], axis=1)
    tensors["embeddings.position_embeddings"] = torch.tensor(positions)
    tensors["embeddings.mask_token"] = torch.zeros(1, positions.shape[2])  # used only in DINOv2's own training
    return tensors


def read_language_config(values: Mapping[str, Any], num_layers: int) -> LlamaConfig:
    """Convert a GGUF file's Llama settings to a config of ``num_layers`` layers."""
    config = LlamaConfig(
        vocab_size=values["llama.vocab_size"],
        hidden_size=values["llama.embedding_length"],
        intermediate_size=values["llama.feed_forward_length"],
        num_hidden_layers=num_layers,
        num_attention_heads=values["llama.attention.head_count"],
        num_key_value_heads=values["llama.attention.head_count_kv"],
        head_dim=values["llama.rope.dimension_count"],
        max_position_embeddings=values["llama.context_length"],
        rms_norm_eps=round(values["llama.attention.layer_norm_rms_epsilon"], 9),  # an fp32 number near 1e-5
        rope_parameters={"rope_type": "default", "rope_theta": values["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=values["tokenizer.ggml.bos_token_id"],
        eos_token_id=values["tokenizer.ggml.eos_token_id"],
        pad_token_id=values["tokenizer.ggml.padding_token_id"],
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    return config


def read_language_tensors(
    tensors: Iterable[Any], dequantize: Callable[..., Float32[np.ndarray, "..."]], config: LlamaConfig
) -> dict[str, Tensor]:
    """Read the tensors of the layers that ``config`` keeps, under Llama's names in transformers, in bf16."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads or config.num_attention_heads}
    state: dict[str, Tensor] = {}
    is_cut = False
    for tensor in tensors:
        *block, part, _ = tensor.name.split(".")  # blk.N.part.weight, or part.weight
        if not block:
            name = _GGUF_NAMES[tensor.name]
        elif int(block[1]) < config.num_hidden_layers:
            name = f"model.layers.{block[1]}.{_GGUF_LAYER_NAMES[part]}.weight"
        else:
            is_cut = True
            continue
        array = dequantize(tensor.data, tensor.tensor_type)
        if part in heads:
            array = split_rotary_pairs(array, heads[part])
        state[name] = torch.tensor(array).to(torch.bfloat16)
    if is_cut:
        # The final norm's gains fit the last layer's output; on that of layer 8 the first loss was 35.
        state["model.norm.weight"] = torch.ones_like(state["model.norm.weight"])
    return state


def split_rotary_pairs(weight: Float32[np.ndarray, "out in"], num_heads: int) -> Float32[np.ndarray, "out in"]:
    """Reorder a head's rows from GGUF's rotary pairs side by side to transformers' two halves."""
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weight.shape)


def build_tokenizer(values: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Build SmolLM2's byte-level BPE from a GGUF file's own lists.

    (transformers' reading of the file ignores ``tokenizer.ggml.pre`` and would not set digits apart first.)
    """
    if (values["tokenizer.ggml.model"], values["tokenizer.ggml.pre"]) != ("gpt2", "smollm"):
        raise ModelError(
            f"the GGUF file's tokenizer is {values['tokenizer.ggml.model']!r} with "
            f"{values['tokenizer.ggml.pre']!r} words; expected 'gpt2' with 'smollm', the only kind read here."
        )
    words: list[str] = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={word: token for token, word in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = values["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([word for word, kind in zip(words, kinds, strict=True) if kind == _GGUF_CONTROL_TOKEN])
    fast_class: Any = PreTrainedTokenizerFast  # untyped in transformers
    fast: PreTrainedTokenizerFast = fast_class(
        tokenizer_object=tokenizer,
        bos_token=words[values["tokenizer.ggml.bos_token_id"]],
        eos_token=words[values["tokenizer.ggml.eos_token_id"]],
        unk_token=words[values["tokenizer.ggml.unknown_token_id"]],
        pad_token=words[values["tokenizer.ggml.padding_token_id"]],
        model_max_length=values["llama.context_length"],
    )
    fast.chat_template = values["tokenizer.chat_template"]
    return fast


def _layer_of(name: str) -> int:
    found = re.match(r"backbone\.encoder\.layer\.(\d+)\.", name)
    return int(found[1]) if found else -1
