"""Log-probabilities in responses."""

from typing import Any

from llava_ray.generate.logprobs import PromptLogprobs

_LEAST_LOGPROB = -9999.0


def format_prompt_logprobs(found: PromptLogprobs) -> dict[str, Any]:
    """Return the field with the log-probabilities of a prompt, in vLLM's form; {} without any."""
    if not found:
        return {}
    rows = [
        None
        if row is None
        else {
            str(one.token_id): {"logprob": as_json_logprob(one.logprob), "rank": one.rank, "decoded_token": one.text}
            for one in row
        }
        for row in found
    ]
    return {"prompt_logprobs": rows}


def as_json_logprob(logprob: float) -> float:
    """Clamp a log-probability to OpenAI's minimum, since JSON has no infinity."""
    return max(logprob, _LEAST_LOGPROB)
