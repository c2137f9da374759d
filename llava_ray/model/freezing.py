"""The switches that set which parameters are trained, and a report of the result."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from llava_ray.config.model import ModelConfig
from llava_ray.model.lora.adapters import adapted_parts, adapter_parameters, has_adapter
from llava_ray.model.network.llava import Llava
from llava_ray.model.network.quantization import count_elements
from llava_ray.model.network.tower import VisionTower


@dataclass(frozen=True)
class TrainableCount:
    """The number of trainable parameters of a part."""

    part: str
    num_trainable: int
    num_total: int

    def __str__(self) -> str:
        """Format the count, e.g. ``projector 3,104 of 3,104``."""
        return f"{self.part} {self.num_trainable:,} of {self.num_total:,}"


def freeze(
    llava: Llava, tower: VisionTower | None, config: ModelConfig, new_token_ids: Sequence[int] = ()
) -> list[TrainableCount]:
    """Set which parameters are trained, by the config's switches, and count them part by part.

    ``freeze_backbone`` includes the head, which the original left training; ``freeze_embeddings`` includes it where it
    shares the embeddings' tensor. The base weights of an adapter stay frozen. image_newline is trained with the
    projector. A trainable tower is registered in ``llava``. ``new_token_ids`` are new in the vocabulary: alignment,
    which otherwise freezes the language model, trains their input embeddings, unless the head shares them.
    """
    model = llava.language_model
    trains_language = not (config.tune_mm_mlp_adapter or config.freeze_backbone)
    adapted = adapted_parts(llava)
    if "projector" not in adapted:
        llava.projector.requires_grad_(not config.freeze_mm_mlp_adapter)
    if llava.image_newline is not None:
        llava.image_newline.requires_grad_(not config.freeze_mm_mlp_adapter)
    if not has_adapter(model):
        model.requires_grad_(trains_language)
        if trains_language and config.freeze_embeddings:
            model.get_input_embeddings().requires_grad_(False)
    if config.tune_mm_mlp_adapter and new_token_ids:
        _train_new_tokens(llava, new_token_ids)
    if tower is not None and config.unfreeze_mm_vision_tower:
        llava.adopt_tower(tower if "vision_tower" in adapted else tower.unfreeze())
    elif tower is not None:
        tower.freeze()
    return _count_trainable_parts(llava, tower)


def _count_trainable_parts(llava: Llava, tower: VisionTower | None) -> list[TrainableCount]:
    """Count the trainable parameters of each part; the adapter separately from its language model."""
    adapter = adapter_parameters(llava.language_model)
    own = [p for name, p in llava.language_model.named_parameters() if name not in adapter]
    parts: dict[str, Iterable[nn.Parameter]] = {"projector": llava.projector.parameters(), "language_model": own}
    if adapter:
        parts["adapter"] = adapter.values()
    if tower is not None:
        parts["vision_tower"] = tower.parameters()
    return [_count_trainable(name, parameters) for name, parameters in parts.items()]


def _train_new_tokens(llava: Llava, new_token_ids: Sequence[int]) -> None:
    """Train the input embeddings of new tokens; all other rows get no gradient, so they stay unchanged."""
    embeddings, head = llava.language_model.get_input_embeddings(), llava.language_model.get_output_embeddings()
    if head is None or head.weight is not embeddings.weight:
        # autograd cannot train single rows: the table is trainable, and ``Llava.embed`` detaches its old rows.
        embeddings.requires_grad_(True)
        llava.first_learnt_token = min(new_token_ids)


def _count_trainable(name: str, parameters: Iterable[nn.Parameter]) -> TrainableCount:
    """Count a part's parameters; quantised and partitioned ones count with their full size."""
    sizes = [(parameter.requires_grad, count_elements(parameter)) for parameter in parameters]
    return TrainableCount(name, sum(size for trainable, size in sizes if trainable), sum(size for _, size in sizes))
