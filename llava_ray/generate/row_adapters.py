"""Several LoRA adapters over one language model: each token of a step gets its own adapter's low-rank terms, or none.

The adapters' matrices of a layer are concatenated, so that a step takes two small products per layer, however many
adapters its requests use; a mask selects each token's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_ray.model.lora.adapter_terms import LayerTerm, Terms
from llava_ray.model.network.quantization import find_dtype

# An adapter's name; None for requests without an adapter.
AdapterName = str | None


@dataclass(frozen=True)
class TokenAdapters:
    """The adapters of the tokens that a layer sees: rows in the adapters' tables, the last for none."""

    places: Int[Tensor, " t"]
    mask: Float[Tensor, "t r"]
    """1 in the columns of a token's own adapter, among the selected ones."""


@dataclass
class AdapterChoice:
    """The step's adapters, shared by all adapted layers; set before the step, by its thread."""

    columns: slice = field(default_factory=lambda: slice(0, 0))
    """The columns of the step's adapters."""
    every: TokenAdapters | None = None
    """Of all tokens of the step; None if none of them has an adapter."""
    last: TokenAdapters | None = None
    """Of the tokens that the head sees."""


class AdaptedLinear(nn.Module):
    """A linear layer, plain or packed, with its adapters' terms."""

    def __init__(
        self, plain: Any, terms: Sequence[LayerTerm | None], ranks: Sequence[int], choice: AdapterChoice
    ) -> None:
        """Concatenate the terms, each padded to its adapter's rank; ``choice`` is shared by all layers."""
        super().__init__()
        self.plain = plain
        self.weight, self.bias = plain.weight, plain.bias  # for code that reads a Linear's attributes
        self.choice = choice
        self.is_head = False
        some = next(term for term in terms if term is not None)
        known = [term or LayerTerm(some.down[:0], some.up[:0]) for term in terms]
        self.down = torch.cat([_padded(term.down, rank) for term, rank in zip(known, ranks, strict=True)])
        self.up = torch.cat([_padded(term.up, rank) for term, rank in zip(known, ranks, strict=True)])
        # The last row is for tokens without an adapter.
        self.gains = _table([term.gain for term in known], 1.0)
        self.shifts = _table([term.shift for term in known], 0.0)

    def forward(self, inputs: Float[Tensor, "1 t i"]) -> Float[Tensor, "1 t o"]:
        """Apply the layer, and add each token's adapter term."""
        outputs: Tensor = self.plain(inputs)
        adapters = self.choice.last if self.is_head else self.choice.every
        if adapters is None:
            return outputs
        if self.gains is not None:
            own = outputs if self.bias is None else outputs - self.bias
            outputs = outputs + own * (self.gains[adapters.places] - 1)
        low = torch.nn.functional.linear(inputs[0], self.down[self.choice.columns]) * adapters.mask
        outputs = torch.addmm(outputs[0], low, self.up[self.choice.columns]).unsqueeze(0)
        return outputs if self.shifts is None else outputs + self.shifts[adapters.places]


class RowAdapters:
    """Adapters injected into one language model, until ``remove``."""

    def __init__(self, language_model: PreTrainedModel, adapters: Mapping[AdapterName, Terms]) -> None:
        """Wrap the model's adapted layers."""
        self.language_model = language_model
        self.choice = AdapterChoice()
        self.places = {name: place for place, name in enumerate(adapters)}
        self.ranks = [max((len(term.down) for term in terms.values()), default=0) for terms in adapters.values()]
        self.starts = [sum(self.ranks[:place]) for place in range(len(self.ranks))]
        masks = torch.zeros(len(self.ranks) + 1, sum(self.ranks), dtype=find_dtype(language_model))
        for place, (start, rank) in enumerate(zip(self.starts, self.ranks, strict=True)):
            masks[place, start : start + rank] = 1
        self.masks = masks.to(language_model.device)
        self.plain: dict[str, nn.Module] = {}
        head = language_model.get_output_embeddings()
        for name in sorted({name for terms in adapters.values() for name in terms}):
            plain = self.plain[name] = language_model.get_submodule(name)
            layer = AdaptedLinear(plain, [terms.get(name) for terms in adapters.values()], self.ranks, self.choice)
            layer.is_head = plain is head
            language_model.set_submodule(name, layer)

    def choose(self, names: Sequence[AdapterName], counts: Sequence[int], last: Int[Tensor, " n"]) -> None:
        """Set the adapters of the next step: ``counts`` tokens of each name; the head sees those at ``last``."""
        places = [self.places.get(name, len(self.ranks)) for name in names]
        present = sorted({place for place in places if place < len(self.ranks)})
        if not present:
            self.choice.every = self.choice.last = None
            return
        self.choice.columns = slice(self.starts[present[0]], self.starts[present[-1]] + self.ranks[present[-1]])
        of_tokens = [place for place, count in zip(places, counts, strict=True) for _ in range(count)]
        indices = torch.tensor(of_tokens, device=self.masks.device)
        self.choice.every = TokenAdapters(indices, self.masks[indices, self.choice.columns])
        self.choice.last = TokenAdapters(indices[last], self.choice.every.mask[last])

    def choose_one(self, name: AdapterName, num_tokens: int) -> None:
        """Set one adapter for all tokens of a text, the head included."""
        self.choose([name], [num_tokens], torch.arange(num_tokens, device=self.masks.device))

    def remove(self) -> None:
        """Restore the model's own layers."""
        for name, plain in self.plain.items():
            self.language_model.set_submodule(name, plain)


def _padded(rows: Float[Tensor, "r x"], rank: int) -> Float[Tensor, "rank x"]:
    return torch.cat([rows, rows.new_zeros(rank - len(rows), rows.shape[1])])


def _table(rows: Sequence[Float[Tensor, " o"] | None], otherwise: float) -> Float[Tensor, "k o"] | None:
    """Return one row for each adapter and a last one for none; None if no adapter has any."""
    some = next((row for row in rows if row is not None), None)
    if some is None:
        return None
    return torch.stack([torch.full_like(some, otherwise) if row is None else row for row in (*rows, None)])
