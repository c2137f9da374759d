"""Several LoRA adapters over one language model: each token of a step gets its own adapter's low-rank terms, or none.

The adapters' matrices of a layer are concatenated, so that a step takes two small products per layer, however many
adapters its requests use; a mask selects each token's own. Adapters are added and removed between two steps: each has
its own columns of the concatenated matrices, which are free for another one afterwards.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from llava_ray.errors import ModelError
from llava_ray.model.lora.adapter_terms import LayerTerm, Terms

# An adapter's name; None for requests without an adapter.
AdapterName = str | None


@dataclass(frozen=True)
class TokenAdapters:
    """The adapters of the tokens that a layer sees: rows in the adapters' tables, the first for none."""

    places: Int[Tensor, " t"]
    foreign: Bool[Tensor, "t r"]
    """True in the columns of other adapters than the token's own, among the selected ones."""


@dataclass
class AdapterChoice:
    """The step's adapters, shared by all adapted layers; set before the step, by its thread."""

    columns: slice = field(default_factory=lambda: slice(0, 0))
    """The columns of the step's adapters."""
    every: TokenAdapters | None = None
    """Of all tokens of the step; None if none of them has an adapter."""
    last: TokenAdapters | None = None
    """Of the tokens that the head sees."""


@dataclass(frozen=True)
class _Span:
    """The place of one adapter: its row in the tables and its columns in the concatenated matrices."""

    row: int
    start: int
    end: int


class AdaptedLinear(nn.Module):
    """A linear layer, plain or packed, with its adapters' terms."""

    def __init__(self, plain: Any, like: LayerTerm, choice: AdapterChoice, *, is_head: bool) -> None:
        """Wrap a layer without any adapter yet; ``like`` is a term of it, ``choice`` is shared by all layers."""
        super().__init__()
        self.plain = plain
        self.weight, self.bias = plain.weight, plain.bias  # for code that reads a Linear's attributes
        self.choice = choice
        self.is_head = is_head
        self.down = like.down.new_zeros(0, like.down.shape[1])
        self.up = like.up.new_zeros(0, like.up.shape[1])
        # The first row is for tokens without an adapter; None while no adapter has any.
        self.gains: Tensor | None = None
        self.shifts: Tensor | None = None
        self.rows: set[int] = set()
        """Rows of the adapters that have a term here."""

    def forward(self, inputs: Float[Tensor, "1 t i"]) -> Float[Tensor, "1 t o"]:
        """Apply the layer, and add each token's adapter term."""
        return self.adapt(inputs, self.plain(inputs))

    def adapt(self, inputs: Float[Tensor, "1 t i"], outputs: Float[Tensor, "1 t o"]) -> Float[Tensor, "1 t o"]:
        """Add each token's adapter term to the outputs of the layer itself."""
        adapters = self.choice.last if self.is_head else self.choice.every
        if adapters is None:
            return outputs
        if self.gains is not None:
            own = outputs if self.bias is None else outputs - self.bias
            outputs = outputs + own * (self.gains[adapters.places] - 1)
        # Filled, not multiplied: an overflow in another adapter's columns times 0 would be NaN.
        low = nn.functional.linear(inputs[0], self.down[self.choice.columns]).masked_fill(adapters.foreign, 0)
        outputs = torch.addmm(outputs[0], low, self.up[self.choice.columns]).unsqueeze(0)
        return outputs if self.shifts is None else outputs + self.shifts[adapters.places]

    def grow(self, num_rows: int, num_columns: int) -> None:
        """Make room for so many adapters and columns."""
        self.down, self.up = _longer(self.down, num_columns), _longer(self.up, num_columns)
        self.gains = None if self.gains is None else _longer(self.gains, num_rows, 1.0)
        self.shifts = None if self.shifts is None else _longer(self.shifts, num_rows)

    def put(self, span: _Span, term: LayerTerm, num_rows: int) -> None:
        """Write an adapter's term into its place."""
        end = span.start + len(term.down)
        self.down[span.start : end], self.up[span.start : end] = term.down, term.up
        if term.gain is not None:
            if self.gains is None:
                self.gains = term.gain.new_ones(num_rows, len(term.gain))
            self.gains[span.row] = term.gain
        if term.shift is not None:
            if self.shifts is None:
                self.shifts = term.shift.new_zeros(num_rows, len(term.shift))
            self.shifts[span.row] = term.shift
        self.rows.add(span.row)

    def clear(self, span: _Span) -> None:
        """Remove an adapter's term, if it has one here."""
        if span.row not in self.rows:
            return
        self.down[span.start : span.end], self.up[span.start : span.end] = 0, 0
        if self.gains is not None:
            self.gains[span.row] = 1
        if self.shifts is not None:
            self.shifts[span.row] = 0
        self.rows.discard(span.row)


class RowAdapters:
    """Adapters injected into one language model, until ``remove``. Only the thread of the steps changes them."""

    def __init__(self, language_model: PreTrainedModel, adapters: Mapping[AdapterName, Terms]) -> None:
        """Wrap the model's adapted layers."""
        self.language_model = language_model
        self.choice = AdapterChoice()
        self.layers: dict[str, AdaptedLinear] = {}
        self.spans: dict[AdapterName, _Span] = {}
        self.foreign = torch.ones(1, 0, dtype=torch.bool, device=language_model.device)
        """Of each adapter, the columns that are not its own; the first row is of none."""
        ranks = [_find_rank(terms) for terms in adapters.values()]
        self._grow(1 + len(ranks), sum(ranks))
        for name, terms in adapters.items():
            self.add(name, terms)

    def add(self, name: AdapterName, terms: Terms) -> None:
        """Add an adapter between two steps. The others keep their places."""
        if name in self.spans:
            raise ModelError(f"there is an adapter {name!r} already; remove it first.")
        span = self._free_span(_find_rank(terms))
        self._grow(span.row + 1, span.end)
        try:
            for layer_name in sorted(terms):
                self._wrapped(layer_name, terms[layer_name]).put(span, terms[layer_name], len(self.foreign))
            self.foreign[span.row] = True
            self.foreign[span.row, span.start : span.end] = False
        except BaseException:
            self._clear(span)
            raise
        self.spans[name] = span

    def discard(self, name: AdapterName) -> None:
        """Remove an adapter between two steps, if it is there; no request of the next steps may have it."""
        span = self.spans.pop(name, None)
        if span is not None:
            self._clear(span)

    def choose(self, names: Sequence[AdapterName], counts: Sequence[int], last: Int[Tensor, " n"]) -> None:
        """Set the adapters of the next step: ``counts`` tokens of each name; the head sees those at ``last``."""
        spans = [self._span_of(name) for name in names]
        present = [span for span in spans if span is not None]
        if not present:
            self.choice.every = self.choice.last = None
            return
        self.choice.columns = slice(min(span.start for span in present), max(span.end for span in present))
        rows = [0 if span is None else span.row for span in spans]
        of_tokens = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
        indices = torch.tensor(of_tokens, device=self.foreign.device)
        self.choice.every = TokenAdapters(indices, self.foreign[indices, self.choice.columns])
        self.choice.last = TokenAdapters(indices[last], self.choice.every.foreign[last])

    def choose_one(self, name: AdapterName, num_tokens: int) -> None:
        """Set one adapter for all tokens of a text, the head included."""
        self.choose([name], [num_tokens], torch.arange(num_tokens, device=self.foreign.device))

    def remove(self) -> None:
        """Restore the model's own layers."""
        for name, layer in self.layers.items():
            self.language_model.set_submodule(name, layer.plain)
        self.layers.clear()
        self.spans.clear()

    def _span_of(self, name: AdapterName) -> _Span | None:
        """Return an adapter's place; None for tokens without one. Raises ModelError: the base is no substitute."""
        span = self.spans.get(name)
        if span is None and name is not None:
            raise ModelError(f"the adapter {name!r} was removed while a request used it.")
        return span

    def _free_span(self, rank: int) -> _Span:
        """Return the first free row and the first free columns for an adapter."""
        rows = {span.row for span in self.spans.values()}
        start = 0
        for span in sorted(self.spans.values(), key=lambda span: span.start):
            if span.start - start >= rank:
                break
            start = max(start, span.end)
        return _Span(next(row for row in itertools.count(1) if row not in rows), start, start + rank)

    def _grow(self, num_rows: int, num_columns: int) -> None:
        """Make room for so many rows and columns, and for half of the old ones more where it was too little."""
        rows, columns = self.foreign.shape
        if num_rows <= rows and num_columns <= columns:
            return
        num_rows = rows if num_rows <= rows else max(num_rows, rows + rows // 2)
        num_columns = columns if num_columns <= columns else max(num_columns, columns + columns // 2)
        for layer in self.layers.values():
            layer.grow(num_rows, num_columns)
        foreign = torch.ones(num_rows, num_columns, dtype=torch.bool, device=self.foreign.device)
        foreign[:rows, :columns] = self.foreign
        self.foreign = foreign

    def _wrapped(self, name: str, like: LayerTerm) -> AdaptedLinear:
        """Return the layer with this name, wrapped now or earlier."""
        if name not in self.layers:
            plain = self.language_model.get_submodule(name)
            is_head = plain is self.language_model.get_output_embeddings()
            layer = AdaptedLinear(plain, like, self.choice, is_head=is_head)
            layer.grow(*self.foreign.shape)
            self.layers[name] = layer
            self.language_model.set_submodule(name, layer)
        return self.layers[name]

    def _clear(self, span: _Span) -> None:
        """Free a place; layers without any adapter are restored."""
        for name, layer in list(self.layers.items()):
            layer.clear(span)
            if not layer.rows:
                self.language_model.set_submodule(name, layer.plain)
                del self.layers[name]


def _find_rank(terms: Terms) -> int:
    """Return the largest rank of an adapter's terms."""
    return max((len(term.down) for term in terms.values()), default=0)


def _longer(rows: Float[Tensor, "n x"], num_rows: int, fill: float = 0.0) -> Float[Tensor, "m x"]:
    """Return rows with more of them, filled with ``fill``; the same tensor if there are enough."""
    if len(rows) >= num_rows:
        return rows
    return torch.cat([rows, rows.new_full((num_rows - len(rows), rows.shape[1]), fill)])
