"""Schemas of the responses of each route."""

from typing import Any

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_NUMBER: Schema = {"type": "number"}
_FLAG: Schema = {"type": "boolean"}


def _object(fields: dict[str, Schema], optional: tuple[str, ...] = ()) -> Schema:
    return {"type": "object", "properties": fields, "required": [name for name in fields if name not in optional]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_TOKEN = {"token": _TEXT, "logprob": _NUMBER, "bytes": _list(_COUNT)}
_HEAD = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "system_fingerprint": _TEXT}
_FINISH: Schema = {"enum": ["stop", "length", "tool_calls"]}
_CALL = _object({"id": _TEXT, "type": {"const": "function"}, "function": _object({"name": _TEXT, "arguments": _TEXT})})
_OUTPUT_TEXT = _object(
    {
        "type": {"const": "output_text"},
        "text": _TEXT,
        "annotations": _list({}),
        "logprobs": _list(_ref("TokenLogprobs")),
    }
)
_STATUS: Schema = {"enum": ["in_progress", "completed", "incomplete"]}
_OUTPUT_ITEM: Schema = {
    "oneOf": [
        _object(
            {
                "type": {"const": "message"},
                "id": _TEXT,
                "status": _STATUS,
                "role": {"const": "assistant"},
                "content": _list(_OUTPUT_TEXT),
            }
        ),
        _object(
            {
                "type": {"const": "function_call"},
                "id": _TEXT,
                "status": _STATUS,
                "call_id": _TEXT,
                "name": _TEXT,
                "arguments": _TEXT,
            }
        ),
    ]
}
_MODEL = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _COUNT,
        "owned_by": _TEXT,
        "root": _TEXT,
        "parent": _or_null(_TEXT),
        "max_model_len": _COUNT,
        "capabilities": {"type": "object"},
        "template": _TEXT,
    }
)

SCHEMAS: dict[str, Schema] = {
    "Error": _object({"error": _object({"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _TEXT})}),
    "Usage": _object(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
        }
    ),
    "TokenLogprobs": _object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))}),
    "ChatCompletion": _object(
        {
            **_HEAD,
            "object": {"const": "chat.completion"},
            "choices": _list(
                _object(
                    {
                        "index": _COUNT,
                        "message": _object(
                            {
                                "role": {"const": "assistant"},
                                "content": _or_null(_TEXT),
                                "refusal": {"type": "null"},
                                "tool_calls": _list(_CALL),
                            },
                            optional=("tool_calls",),
                        ),
                        "logprobs": _or_null(
                            _object({"content": _list(_ref("TokenLogprobs")), "refusal": {"type": "null"}})
                        ),
                        "finish_reason": _FINISH,
                    }
                )
            ),
            "usage": _ref("Usage"),
        }
    ),
    "TextCompletion": _object(
        {
            **_HEAD,
            "object": {"const": "text_completion"},
            "choices": _list(
                _object(
                    {"index": _COUNT, "text": _TEXT, "logprobs": _or_null({"type": "object"}), "finish_reason": _FINISH}
                )
            ),
            "usage": _ref("Usage"),
        }
    ),
    "Response": _object(
        {
            "id": _TEXT,
            "object": {"const": "response"},
            "created_at": _COUNT,
            "status": {"enum": ["in_progress", "completed", "incomplete", "failed"]},
            "error": _or_null(_object({"code": _TEXT, "message": _TEXT})),
            "incomplete_details": _or_null(_object({"reason": _TEXT})),
            "model": _TEXT,
            "output": _list(_OUTPUT_ITEM),
            "usage": _or_null(
                _object(
                    {
                        "input_tokens": _COUNT,
                        "input_tokens_details": _object({"cached_tokens": _COUNT}),
                        "output_tokens": _COUNT,
                        "output_tokens_details": _object({"reasoning_tokens": _COUNT}),
                        "total_tokens": _COUNT,
                    }
                )
            ),
        }
    ),
    "Embeddings": _object(
        {
            "object": {"const": "list"},
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": _COUNT,
                        "embedding": {
                            "anyOf": [_list(_NUMBER), _TEXT],
                            "description": "Numbers, or base64 of fp32 in little-endian order.",
                        },
                    }
                )
            ),
            "model": _TEXT,
            "usage": _object({"prompt_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
    "Tokens": _object(
        {
            "count": _COUNT,
            "max_model_len": _COUNT,
            "tokens": {**_list({"type": "integer"}), "description": "-200 stands for one feature of an image."},
            "token_strs": _or_null(_list(_TEXT)),
        }
    ),
    "Text": _object({"prompt": _TEXT}),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": _list(_ref("Model"))}),
    "Health": _object({"status": {"const": "ok"}}),
    "Readiness": _object({"ready": _FLAG, "models": {"type": "object", "additionalProperties": _FLAG}}),
    "Version": _object({"version": _TEXT}),
}
