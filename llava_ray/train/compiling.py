"""The language model's blocks compiled by torch, where ``train.torch_compile`` asks for it."""

import os

import torch
from transformers import AttentionInterface, PreTrainedModel

from llava_ray.model.network.sample_attention import SAMPLE_ATTENTION, attend_samples
from llava_ray.train.planning.sizing import find_blocks

_SWITCH = "TORCHDYNAMO_DISABLE"  # workers start with it, which spares them the compiler's import


def compile_blocks(language_model: PreTrainedModel, backend: str = "inductor") -> int:
    """Compile each block at its first call, for rows of any length; return their number.

    Attention by sample stays as it is, with a row's borders: each row has others, and would be compiled anew.
    """
    os.environ.pop(_SWITCH, None)  # torch would compile nothing, without a word
    AttentionInterface.register(SAMPLE_ATTENTION, torch.compiler.disable(attend_samples))
    blocks = find_blocks(language_model)
    for block in blocks:
        block.compile(dynamic=True, backend=backend)
    return len(blocks)
