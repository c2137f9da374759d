"""Request fields without effect, accepted as if absent, in explicit lists.

All other unknown fields are rejected by name, so that nothing is ignored silently.
"""

from collections.abc import Mapping
from typing import Any

Neutral = Mapping[str, tuple[Any, ...]]

# Fields without effect on an answer, whatever their value.
IGNORED = frozenset(
    {
        "include_reasoning",
        "metadata",
        "prediction",  # would only save time
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# Fields of OpenAI's API and compatible servers with the values that change nothing.
NEUTRAL: Neutral = {
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "detokenize": (True,),
    "early_stopping": (False,),
    "enable_thinking": (False,),
    "extra_body": ({},),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "priority": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": ({},),
    "thinking": ({"type": "disabled"},),
    "tools": ([],),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
OF_CHATS: Neutral = {
    "add_special_tokens": (False,),
    "documents": ([],),
    "echo": (False,),
}
OF_COMPLETIONS: Neutral = {
    "add_special_tokens": (True,),
    "echo": (False,),
    "logprobs": (False,),
    "parallel_tool_calls": (True, False),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
}
OF_STREAMS: Neutral = {"continuous_usage_stats": (False,)}

# Caching hints in a part of a message.
OF_PARTS = frozenset({"cache_control", "uuid"})

# Metadata of an assistant message that is not part of its text. No template uses them.
OF_ANSWERS = frozenset({"annotations", "reasoning", "reasoning_content"})
TOOL_FIELDS = frozenset({"functions", "function_call"})
ANSWER_NEUTRAL: Neutral = {"tool_calls": ([],), "refusal": ("",)}


def is_neutral(fields: Neutral, name: str, value: Any) -> bool:
    """Return whether a field's value has no effect. Unlike in Python, ``True`` is not 1 here."""
    return any(
        value == nothing and isinstance(value, bool) == isinstance(nothing, bool) for nothing in fields.get(name, ())
    )
