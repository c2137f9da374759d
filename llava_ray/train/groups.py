"""Parameter groups: {decays, does not} x {projector, language model, vision tower}."""

from typing import Any

from torch import nn

from llava_ray.config.train import TrainConfig
from llava_ray.errors import TrainingError
from llava_ray.model.formats.names import IMAGE_NEWLINE
from llava_ray.model.network.llava import Llava


def parameter_groups(llava: Llava, train: TrainConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups of trainable parameters; matrices decay, biases and norms (below two dimensions) do not.

    Each group has a "name". Raises TrainingError when nothing is trainable.
    """
    # Under ZeRO-3 a parameter is a slice; DeepSpeed keeps its true shape in ds_shape.
    trainable = [
        (name, p, len(getattr(p, "ds_shape", p.shape))) for name, p in llava.named_parameters() if p.requires_grad
    ]
    if not trainable:
        raise TrainingError(
            "nothing is trainable: every parameter is frozen; check the model section's freezing switches"
        )
    rates = {
        "projector": train.mm_projector_lr or train.learning_rate,
        "language_model": train.learning_rate,
        "vision_tower": train.mm_vision_tower_lr or train.learning_rate,
    }
    groups = []
    for part, rate in rates.items():
        for decays in (True, False):
            members: list[nn.Parameter] = [
                p for name, p, num_axes in trainable if _find_part(name) == part and (num_axes >= 2) == decays
            ]
            if members:
                decay = train.weight_decay if decays else 0.0
                name = f"{part}.{'decay' if decays else 'no_decay'}"
                groups.append({"name": name, "params": members, "lr": rate, "weight_decay": decay})
    return groups


def _find_part(name: str) -> str:
    """Return the part whose learning rate a parameter uses: image_newline is trained with the projector."""
    part = name.partition(".")[0]
    return "projector" if part == IMAGE_NEWLINE else part
