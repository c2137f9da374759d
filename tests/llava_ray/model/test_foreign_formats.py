from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from llava_ray.errors import ModelError
from llava_ray.quickstart.foreign_formats import (
    CLASS_POSITION,
    PATCH_POSITIONS,
    build_tokenizer,
    read_language_config,
    read_language_tensors,
    read_vision_tensors,
    split_rotary_pairs,
)


@dataclass
class Constant:
    """An initialiser of an ONNX graph."""

    name: str
    array: np.ndarray


@dataclass
class Node:
    """A node of an ONNX graph."""

    name: str
    op_type: str
    input: list[str]


@dataclass
class Graph:
    """As much of an ONNX graph as is read."""

    initializer: list[Constant]
    node: list[Node] = field(default_factory=list)


@dataclass
class GgufTensor:
    """As much of a GGUF tensor as is read; here ``tensor_type`` is a factor on its data."""

    name: str
    data: np.ndarray
    tensor_type: float = 1.0


def dequantize(data: np.ndarray, tensor_type: float) -> np.ndarray:
    assert np.isfinite(data).all(), "a tensor that is not needed was dequantised"
    return (data * tensor_type).astype(np.float32)


def settings(**changed: object) -> dict[str, Any]:
    """A GGUF file's settings, of a model with two heads of four and one key-value head."""
    return {
        "llama.vocab_size": 4,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 16,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.rope.dimension_count": 4,
        "llama.context_length": 128,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.freq_base": 100_000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b", "1", "2", "12", "Ġ", "ab", "Ġa", "Ġ1", "ĠĠ"],
        "tokenizer.ggml.token_type": [3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b", "Ġ a", "1 2", "Ġ 1", "Ġ Ġ"],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
        **changed,
    }


@pytest.fixture
def config() -> LlamaConfig:
    return read_language_config(settings(), num_layers=1)


def test_linear_weights_are_named_by_their_node_and_turned() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    graph = Graph(
        [
            Constant("backbone.encoder.layer.0.mlp.fc1.bias", np.ones(3, np.float32)),
            Constant("backbone.encoder.layer.10.mlp.fc1.bias", np.ones(3, np.float32)),
            Constant("head.weight", np.ones(3, np.float32)),
            Constant("onnx::MatMul_7", weight),
            Constant("onnx::MatMul_8", weight),
            Constant(CLASS_POSITION, np.zeros((1, 1, 3), np.float32)),
            Constant(PATCH_POSITIONS, np.ones((1, 4, 3), np.float32)),
        ],
        [
            Node("/backbone/encoder/layer.0/mlp/fc1/MatMul", "MatMul", ["x", "onnx::MatMul_7"]),
            Node("/backbone/encoder/layer.0/attention/MatMul", "MatMul", ["queries", "keys"]),
            Node("/head/MatMul", "MatMul", ["x", "onnx::MatMul_8"]),
        ],
    )
    tensors = read_vision_tensors(graph, lambda constant: constant.array, num_layers=10)
    assert set(tensors) == {
        "encoder.layer.0.mlp.fc1.bias",
        "encoder.layer.0.mlp.fc1.weight",
        "embeddings.position_embeddings",
        "embeddings.mask_token",
    }
    assert tensors["encoder.layer.0.mlp.fc1.weight"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tensors["embeddings.position_embeddings"][0, :, 0].tolist() == [0, 1, 1, 1, 1]


def test_rotary_pairs_become_halves_head_by_head() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert split_rotary_pairs(rows, num_heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert split_rotary_pairs(rows, num_heads=1)[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_layers_cut_off_are_not_dequantised_and_the_norm_starts_plain(config: LlamaConfig) -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]
    tensors = [
        GgufTensor("token_embd.weight", rows, 2.0),
        GgufTensor("output_norm.weight", np.full(8, 7.0)),
        GgufTensor("blk.0.attn_q.weight", rows),
        GgufTensor("blk.0.attn_k.weight", rows),
        GgufTensor("blk.0.attn_v.weight", rows),
    ]
    whole = read_language_tensors(tensors, dequantize, config)
    assert whole["model.norm.weight"].tolist() == [7.0] * 8
    state = read_language_tensors([*tensors, GgufTensor("blk.1.attn_q.weight", rows * np.nan)], dequantize, config)
    assert {name: tensor.flatten().tolist() for name, tensor in state.items()} == {
        "model.embed_tokens.weight": [0, 2, 4, 6, 8, 10, 12, 14],
        "model.norm.weight": [1] * 8,
        "model.layers.0.self_attn.q_proj.weight": [0, 2, 1, 3, 4, 6, 5, 7],
        "model.layers.0.self_attn.k_proj.weight": [0, 2, 4, 6, 1, 3, 5, 7],
        "model.layers.0.self_attn.v_proj.weight": list(range(8)),
    }
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}


def test_the_config_says_what_the_file_says(config: LlamaConfig) -> None:
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (1, 2, 1)
    assert (config.hidden_size, config.head_dim, config.intermediate_size) == (8, 4, 16)
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100_000.0}
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert config.tie_word_embeddings


def test_the_tokenizer_sets_digits_apart() -> None:
    tokenizer = build_tokenizer(settings())
    assert tokenizer.tokenize("ab a 12  1</s>a") == ["ab", "Ġa", "Ġ", "1", "2", "ĠĠ", "1", "</s>", "a"]
    assert tokenizer.decode(tokenizer("ab a 12  1").input_ids) == "ab a 12  1"
    assert tokenizer("ab").input_ids == [9]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (tokenizer.chat_template, tokenizer.model_max_length) == ("{{ messages }}", 128)


def test_another_kind_of_tokenizer_is_refused() -> None:
    with pytest.raises(ModelError, match=r"'gpt2' with 'qwen2' words; expected 'gpt2' with 'smollm'"):
        build_tokenizer(settings(**{"tokenizer.ggml.pre": "qwen2"}))
