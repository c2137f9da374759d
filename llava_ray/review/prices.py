"""Prices of judges, with their date."""

from dataclasses import dataclass

from llava_ray.config.review import JudgeConfig

AS_OF = "2025-04-14"
_BATCH_SHARE = 0.5  # of the price, with OpenAI's Batch API
_MILLION = 1_000_000

# Dollars per million tokens: prompt, cached prompt, output.
PRICES = {
    "gpt-4-0613": (30.0, 30.0, 60.0),
    "gpt-4-turbo-2024-04-09": (10.0, 10.0, 30.0),
    "gpt-4o-2024-08-06": (2.5, 1.25, 10.0),
    "gpt-4o-mini-2024-07-18": (0.15, 0.075, 0.6),
    "gpt-4.1-2025-04-14": (2.0, 0.5, 8.0),
    "gpt-4.1-mini-2025-04-14": (0.4, 0.1, 1.6),
}
ALIASES = {
    "gpt-4": "gpt-4-0613",
    "gpt-4-turbo": "gpt-4-turbo-2024-04-09",
    "gpt-4o": "gpt-4o-2024-08-06",
    "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
    "gpt-4.1": "gpt-4.1-2025-04-14",
    "gpt-4.1-mini": "gpt-4.1-mini-2025-04-14",
}


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    prompt: float
    cached: float
    output: float

    def cost(self, prompt_tokens: int, output_tokens: int, cached_tokens: int = 0) -> float:
        """Compute the dollars of a call; ``cached_tokens`` are among the prompt's."""
        uncached = prompt_tokens - cached_tokens
        return (uncached * self.prompt + cached_tokens * self.cached + output_tokens * self.output) / _MILLION


def find_price(config: JudgeConfig, model: str) -> Price | None:
    """Return a model's price from the settings or the table; None if neither has it."""
    if config.input_dollars is not None and config.output_dollars is not None:
        cached = config.input_dollars if config.cached_input_dollars is None else config.cached_input_dollars
        listed: tuple[float, float, float] | None = (config.input_dollars, cached, config.output_dollars)
    else:
        listed = PRICES.get(ALIASES.get(model, model))
    if listed is None:
        return None
    share = _BATCH_SHARE if config.delivery == "batch" and config.input_dollars is None else 1.0
    return Price(*(dollars * share for dollars in listed))
