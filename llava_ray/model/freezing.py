"""What learns: switches that are declared, applied in the open and reported."""

from dataclasses import dataclass

from torch import nn

from llava_ray.config.sections import ModelConfig
from llava_ray.model.llava import Llava
from llava_ray.model.tower import VisionTower


@dataclass(frozen=True)
class Learning:
    """How many of a part's parameters learn."""

    part: str
    num_trainable: int
    num_total: int


def freeze(llava: Llava, tower: VisionTower | None, config: ModelConfig) -> list[Learning]:
    """Set which parameters learn, by the config's switches, and return what does part by part.

    The tower never learns. ``freeze_backbone`` includes the head, which the original left training;
    ``freeze_embeddings`` includes it where it shares the embeddings' tensor.
    """
    learns_language = not (config.tune_mm_mlp_adapter or config.freeze_backbone)
    llava.projector.requires_grad_(not config.freeze_mm_mlp_adapter)
    llava.language_model.requires_grad_(learns_language)
    if learns_language and config.freeze_embeddings:
        llava.language_model.get_input_embeddings().requires_grad_(False)
    parts: dict[str, nn.Module] = {"projector": llava.projector, "language_model": llava.language_model}
    if tower is not None:
        parts["vision_tower"] = tower.freeze()
    return [count_learning(name, part) for name, part in parts.items()]


def count_learning(name: str, part: nn.Module) -> Learning:
    """Count a part's parameters; those that ZeRO 3 has partitioned count whole."""
    sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in part.parameters()]
    return Learning(name, sum(size for learns, size in sizes if learns), sum(size for _, size in sizes))
