"""What learns: switches that are declared, applied in the open and reported."""

from collections.abc import Sequence
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


def freeze(
    llava: Llava, tower: VisionTower | None, config: ModelConfig, new_token_ids: Sequence[int] = ()
) -> list[Learning]:
    """Set which parameters learn, by the config's switches, and return what does part by part.

    ``freeze_backbone`` includes the head, which the original left training; ``freeze_embeddings`` includes it where it
    shares the embeddings' tensor. image_newline learns with the projector. A tower that learns is taken into
    ``llava``. ``new_token_ids`` are new in the vocabulary: alignment, which learns nothing else of the language model,
    learns their input embeddings, unless the head shares them.
    """
    learns_language = not (config.tune_mm_mlp_adapter or config.freeze_backbone)
    llava.projector.requires_grad_(not config.freeze_mm_mlp_adapter)
    if llava.image_newline is not None:
        llava.image_newline.requires_grad_(not config.freeze_mm_mlp_adapter)
    llava.language_model.requires_grad_(learns_language)
    if learns_language and config.freeze_embeddings:
        llava.language_model.get_input_embeddings().requires_grad_(False)
    if config.tune_mm_mlp_adapter and new_token_ids:
        learn_new_tokens(llava, new_token_ids)
    parts: dict[str, nn.Module] = {"projector": llava.projector, "language_model": llava.language_model}
    if tower is not None:
        parts["vision_tower"] = tower.unfreeze() if config.unfreeze_mm_vision_tower else tower.freeze()
        if config.unfreeze_mm_vision_tower:
            llava.adopt_tower(tower)
    return [count_learning(name, part) for name, part in parts.items()]


def learn_new_tokens(llava: Llava, new_token_ids: Sequence[int]) -> None:
    """Let the input embeddings of new tokens learn; all other rows get no gradient, so that they stay what they are."""
    embeddings, head = llava.language_model.get_input_embeddings(), llava.language_model.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        embeddings.requires_grad_(True)
        llava.first_learnt_token = min(new_token_ids)


def count_learning(name: str, part: nn.Module) -> Learning:
    """Count a part's parameters; those that ZeRO 3 has partitioned count whole."""
    sizes = [(p.requires_grad, getattr(p, "ds_numel", p.numel())) for p in part.parameters()]
    return Learning(name, sum(size for learns, size in sizes if learns), sum(size for _, size in sizes))
