"""Example requests of each route, valid for the service that shows them."""

from typing import Any

from llava_ray.deployments.settings import ServeSettings

_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
_SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "sizes": {"type": "array", "items": {"type": "integer"}}},
    "required": ["colour"],
    "additionalProperties": False,
}

Examples = dict[str, dict[str, Any]]


def list_examples(settings: ServeSettings) -> dict[str, Examples]:
    """Return examples by route and name."""
    model = settings.sources[0].name
    image_part = {"type": "image_url", "image_url": {"url": _IMAGE}}
    text_part = {"type": "text", "text": "What is this?"}
    about_image = {"role": "user", "content": [image_part, text_part]}
    question = {"role": "user", "content": "Which colour is the sky?"}
    named = {"name": "colour", "strict": True, "schema": _SCHEMA}
    embeddings: Examples = {
        "texts": {"model": model, "input": ["a red square", "a blue circle"]},
        "images": {"model": model, "input": [_IMAGE], "features": "projector", "encoding_format": "base64"},
        "chat": {"model": model, "messages": [about_image]},
    }
    return {
        "/v1/chat/completions": {
            "image": {"model": model, "messages": [about_image], "max_tokens": 16},
            "stream": {
                "model": model,
                "messages": [{"role": "system", "content": "Be brief."}, question],
                "max_tokens": 16,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            "schema": {
                "model": model,
                "messages": [question],
                "max_tokens": 64,
                "response_format": {"type": "json_schema", "json_schema": named},
            },
            "choices": {
                "model": model,
                "messages": [question],
                "n": 2,
                "seed": 1,
                "stop": ["."],
                "max_tokens": 8,
                "logprobs": True,
                "top_logprobs": 2,
            },
        },
        "/v1/completions": {
            "prompt": {"model": model, "prompt": "Once upon a time", "max_tokens": 16, "temperature": 0},
            "stream": {"model": model, "prompt": "Once upon a time", "max_tokens": 4, "stream": True},
        },
        "/v1/responses": {
            "text": {
                "model": model,
                "instructions": "Be brief.",
                "input": "Which colour is the sky?",
                "max_output_tokens": 16,
            },
            "image": {
                "model": model,
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_image", "image_url": _IMAGE},
                            {"type": "input_text", "text": "What is this?"},
                        ],
                    }
                ],
                "max_output_tokens": 16,
                "stream": True,
            },
            "schema": {
                "model": model,
                "input": "Which colour is the sky?",
                "max_output_tokens": 64,
                "text": {"format": {"type": "json_schema", **named}},
            },
        },
        "/v1/embeddings": embeddings if settings.engine != "vllm" else {},  # which refuses them
        "/tokenize": {
            "prompt": {"model": model, "prompt": "a red square", "return_token_strs": True},
            "chat": {"model": model, "messages": [about_image]},
        },
        "/detokenize": {"tokens": {"model": model, "tokens": [1, 2, 3]}},
        "/v1/load_lora_adapter": {"adapter": {"lora_name": "birds", "lora_path": _adapter_place(settings)}},
        "/v1/unload_lora_adapter": {"adapter": {"lora_name": "birds"}},
    }


def _adapter_place(settings: ServeSettings) -> str:
    places = (*settings.allowed_adapter_paths, *settings.allowed_adapter_urls, "/adapters")
    return f"{places[0].rstrip('/')}/birds"
