"""Towers of timm: any of its vision transformers, described by the config.json that timm writes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llava_ray.errors import ModelError
from llava_ray.model.network.tower_families import TIMM, find_family

_NEEDED = ("blocks", "embed_dim", "num_prefix_tokens", "patch_embed", "forward_features", "forward_intermediates")


class TimmConfig(PreTrainedConfig):
    """What is known of a timm tower, under the names that other towers' configs have.

    ``timm`` is the config.json as it was read.
    """

    model_type = TIMM
    timm: dict[str, Any] | None = None


class TimmNetwork:
    """A tower that is one of timm's vision transformers (see ``TowerNetwork``)."""

    def __init__(self, config: TimmConfig) -> None:
        """Take what the config says."""
        self.config = config
        self.family = find_family(config)

    def extract(
        self, backbone: nn.Module, pixel_values: Float[Tensor, "n 3 h w"], depths: Sequence[int]
    ) -> Float[Tensor, "n t v"]:
        """Return hidden states side by side. Raises ModelError for the embeddings among several layers."""
        model: Any = backbone
        if len(depths) == 1:
            last: Tensor = model.forward_features(pixel_values)
            return last
        if 0 in depths:  # timm gives what comes after blocks
            raise ModelError(
                "mm_vision_select_layer names the embeddings (0) beside other layers, which timm's models do not "
                "return; select layers from 1 on, or 0 alone."
            )
        blocks = sorted(set(depths))
        states = model.forward_intermediates(
            pixel_values,
            indices=[depth - 1 for depth in blocks],
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        whole = {depth: _with_prefix(state) for depth, state in zip(blocks, states, strict=True)}
        return torch.cat([whole[depth] for depth in depths], dim=-1)

    def enable_checkpointing(self, backbone: nn.Module) -> None:
        """Let the blocks compute their activations again in the backward pass."""
        model: Any = backbone
        model.set_grad_checkpointing(True)


def _with_prefix(state: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return a hidden state with its prefix tokens first, as the blocks have it."""
    return state if isinstance(state, Tensor) else torch.cat([state[1], state[0]], dim=1)


def make_timm_config(values: Mapping[str, Any], where: str) -> TimmConfig:
    """Read the shapes of a timm tower off its modules, made without memory. Raises ModelError."""
    with torch.device("meta"):
        model = build_timm(values, where)
    missing = [name for name in _NEEDED if not hasattr(model, name)]
    patch, image = (getattr(getattr(model, "patch_embed", None), name, None) for name in ("patch_size", "img_size"))
    if missing or patch is None or image is None or len({*patch}) != 1 or len({*image}) != 1:
        raise ModelError(
            f"{where}: {values['architecture']!r} is no vision transformer with square patches and images "
            f"({', '.join(missing) or f'patches {patch}, images {image}'}). Choose one of timm's vit_, deit or eva."
        )
    config = TimmConfig()
    config.timm = dict(values)
    config.hidden_size, config.num_hidden_layers = int(model.embed_dim), len(model.blocks)
    config.patch_size, config.image_size = int(patch[0]), int(image[0])
    config.num_prefix_tokens = int(model.num_prefix_tokens)
    attention, mlp = model.blocks[0].attn, model.blocks[0].mlp
    config.num_attention_heads = int(attention.num_heads)
    config.intermediate_size = max(m.out_features for m in mlp.modules() if isinstance(m, nn.Linear))
    config.name_or_path = where
    return config


def build_timm(values: Mapping[str, Any], where: str) -> Any:
    """Build the modules of a timm tower with new weights, leaving the random state as it is. Raises ModelError."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # torchvision of another torch raises the latter
        raise ModelError(
            f"{where} is a tower of timm, which cannot be imported here ({error}). Install it: "
            "pip install 'llava_ray[timm]', with the torchvision of the installed torch."
        ) from error
    arguments = dict(values.get("model_args") or {})
    if arguments.get("patch_drop_rate"):
        raise ModelError(f"{where}: model_args.patch_drop_rate drops patches in training; set it to 0.")
    try:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(values["architecture"], pretrained=False, **arguments)
    except (RuntimeError, TypeError, ValueError, AssertionError, ArithmeticError) as error:
        raise ModelError(
            f"{where}: timm {timm.__version__} makes no {values['architecture']!r} of these model_args ({error}). "
            "Expected a folder as timm.models.save_for_hf writes it; copy it again, or install the timm that wrote it."
        ) from error
