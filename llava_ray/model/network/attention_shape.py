"""The shape of a language model's attention, from its config."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionShape:
    """Heads of queries, heads of keys and values, and the width of one."""

    num_heads: int
    num_keys: int
    head_width: int

    @classmethod
    def of(cls, text: Any) -> "AttentionShape":
        """Read the shape from the config of a language model's text part."""
        heads = int(text.num_attention_heads)
        return cls(
            heads,
            int(getattr(text, "num_key_value_heads", None) or heads),
            int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        )

    @property
    def width(self) -> int:
        """Return the width of all heads of queries together."""
        return self.num_heads * self.head_width
