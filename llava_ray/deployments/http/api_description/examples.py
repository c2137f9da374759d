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


_ABOUT_IMAGE = {
    "role": "user",
    "content": [{"type": "image_url", "image_url": {"url": _IMAGE}}, {"type": "text", "text": "What is this?"}],
}
_TEXT = "Which colour is the sky?"
_QUESTION = {"role": "user", "content": _TEXT}
_NAMED = {"name": "colour", "strict": True, "schema": _SCHEMA}


def list_examples(settings: ServeSettings) -> dict[str, Examples]:
    """Return examples by route and name."""
    found: dict[str, Examples] = {
        "/v1/chat/completions": _CHATS,
        "/v1/completions": {
            "prompt": {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0},
            "stream": {"prompt": "Once upon a time", "max_tokens": 4, "stream": True},
        },
        "/v1/responses": _RESPONSES,
        "/v1/embeddings": _EMBEDDINGS if settings.engine != "vllm" else {},  # which refuses them
        "/tokenize": {
            "prompt": {"prompt": "a red square", "return_token_strs": True},
            "chat": {"messages": [_ABOUT_IMAGE]},
        },
        "/detokenize": {"tokens": {"tokens": [1, 2, 3]}},
    }
    model = settings.sources[0].name
    named = {path: {name: {"model": model, **one} for name, one in some.items()} for path, some in found.items()}
    return named | {
        "/v1/load_lora_adapter": {"adapter": {"lora_name": "birds", "lora_path": _adapter_place(settings)}},
        "/v1/unload_lora_adapter": {"adapter": {"lora_name": "birds"}},
    }


# Without their model.
_CHATS: Examples = {
    "image": {"messages": [_ABOUT_IMAGE], "max_tokens": 16},
    "stream": {
        "messages": [{"role": "system", "content": "Be brief."}, _QUESTION],
        "max_tokens": 16,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "schema": {
        "messages": [_QUESTION],
        "max_tokens": 64,
        "response_format": {"type": "json_schema", "json_schema": _NAMED},
    },
    "choices": {
        "messages": [_QUESTION],
        "n": 2,
        "seed": 1,
        "stop": ["."],
        "max_tokens": 8,
        "logprobs": True,
        "top_logprobs": 2,
    },
}
_RESPONSES: Examples = {
    "text": {"instructions": "Be brief.", "input": _TEXT, "max_output_tokens": 16},
    "image": {
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
    "schema": {"input": _TEXT, "max_output_tokens": 64, "text": {"format": {"type": "json_schema", **_NAMED}}},
}
_EMBEDDINGS: Examples = {
    "texts": {"input": ["a red square", "a blue circle"]},
    "images": {"input": [_IMAGE], "features": "projector", "encoding_format": "base64"},
    "chat": {"messages": [_ABOUT_IMAGE]},
}


def _adapter_place(settings: ServeSettings) -> str:
    places = (*settings.allowed_adapter_paths, *settings.allowed_adapter_urls, "/adapters")
    return f"{places[0].rstrip('/')}/birds"
