"""Loading of adapters for a base that is answering requests."""

import copy
from dataclasses import replace
from pathlib import Path

from torch import nn

from llava_ray.errors import ModelError
from llava_ray.generate.served_adapters import ServedAdapter, load_beside
from llava_ray.model.assembly import LlavaParts
from llava_ray.model.network.llava import Llava


class AdapterLoader:
    """Loads adapters for a base while it answers requests.

    Each is checked in a model of its own, which shares the base's weights but none of its modules and is thrown away.
    """

    def __init__(self, base: LlavaParts, max_rank: int) -> None:
        """Initialise before the base is prepared for batching, and after `load_adapters`."""
        self.base = base
        self.max_rank = max_rank
        self.plain = _share_weights(base.llava)

    def load(self, name: str, folder: str | Path) -> ServedAdapter:
        """Load one adapter; only one thread may call it at a time. Raises ModelError."""
        second = replace(self.base, llava=_share_weights(self.plain))
        loaded = load_beside(second, name, folder)
        rank = max((len(term.down) for term in loaded.terms.values()), default=0)
        if rank > self.max_rank:
            raise ModelError(
                f"the adapter in {folder} has rank {rank}; at most {self.max_rank} is served here (max_lora_rank). "
                "Start the service with a larger one, or train the adapter with a smaller lora_r."
            )
        if loaded.parts.llava is second.llava:
            return replace(loaded, parts=replace(loaded.parts, llava=self.base.llava))
        loaded.parts.llava.language_model = self.plain.language_model
        return loaded


def _share_weights(llava: Llava) -> Llava:
    """Return a copy of a model with modules of its own and the same tensors, except for the biases.

    peft writes an adapter's trained biases into the model.
    """
    shared = {id(tensor): tensor for tensor in (*llava.parameters(), *llava.buffers())}
    for name, bias in llava.language_model.named_parameters():
        if name.endswith("bias"):
            shared[id(bias)] = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return copy.deepcopy(llava, shared)
