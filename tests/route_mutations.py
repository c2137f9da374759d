"""Requests to the routes beside chats and completions, made from numbers: valid ones, and mutated ones."""

import copy
import random
from typing import Any

from request_mutations import TOOLS, Asked, chat, cut, data_uri, mutate, mutate_bytes, mutate_outside, words, written
from request_oddities import ODD_VALUES

FIELDS = [
    "input", "instructions", "max_output_tokens", "previous_response_id", "conversation", "store", "background",
    "include", "text", "format", "metadata", "truncation", "reasoning", "call_id", "output", "encoding_format",
    "dimensions", "features", "prompt", "tokens", "add_special_tokens", "return_token_strs", "prompt_ids", "item_id",
]  # fmt: skip
CALL = {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "1", "output": "4"}
TEXT_FORMATS = [
    {"type": "text"},
    {"type": "json_object"},
    {"type": "json_schema", "name": "a", "schema": {"type": "object"}, "strict": True},
]


def make_route_request(seed: int) -> Asked:
    """The request of that number."""
    draw = random.Random(seed)
    path, make = draw.choice(
        [("/v1/responses", response)] * 4
        + [("/v1/embeddings", embedding)] * 3
        + [("/tokenize", tokenizing), ("/tokenize", tokenizing), ("/detokenize", detokenizing)]
    )
    body = make(draw)
    for _ in range(draw.choice([0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 3, 6])):
        body = mutate(body, draw)
    if isinstance(body, dict) and draw.random() < 0.1:
        body[draw.choice(FIELDS)] = copy.deepcopy(draw.choice(ODD_VALUES))
    asked = Asked("POST", path)
    data = written(body, draw)
    asked.chunks = cut(mutate_bytes(data, draw) if draw.random() < 0.08 else data, draw)
    asked.headers = [(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json")]
    if draw.random() < 0.1:
        mutate_outside(asked, draw)
    return asked


def response(draw: random.Random) -> dict[str, Any]:
    """A conversation that would be answered."""
    items: list[dict[str, Any]] = []
    for _ in range(draw.choice([0, 0, 1])):
        answer = {"type": "output_text", "text": words(draw), "annotations": []}
        items += [
            {"role": "user", "content": words(draw)},
            {"type": "message", "id": "m", "status": "completed", "role": "assistant", "content": [answer]},
        ]
        if draw.random() < 0.3:
            items += [copy.deepcopy(CALL), copy.deepcopy(RESULT), {"role": "assistant", "content": "it is"}]
    parts = [{"type": "input_image", "image_url": data_uri(draw)} for _ in range(draw.choice([0, 1, 2]))]
    last: Any = [*parts, {"type": "input_text", "text": words(draw)}] if parts else words(draw)
    items.append({"role": "user", "content": last})
    given: dict[str, Any] = {
        "instructions": draw.choice([None, "", "be brief"]),
        "temperature": draw.choice([0, 0.7]),
        "stream": draw.random() < 0.5,
        "include": draw.choice([[], ["message.output_text.logprobs"]]),
        "text": {"format": copy.deepcopy(draw.choice(TEXT_FORMATS))},
        "tools": [{"type": "function", **copy.deepcopy(one["function"])} for one in TOOLS],  # type: ignore[dict-item]
        "tool_choice": draw.choice(["auto", "none", "required", {"type": "function", "name": "f"}]),
        "metadata": {"a": "b"},
        "store": False,
    }
    chosen = {name: given[name] for name in draw.sample(sorted(given), draw.randrange(4))}
    entry = words(draw) if draw.random() < 0.2 else items
    return {"model": "echo", "input": entry, "max_output_tokens": draw.choice([1, 2, 3]), **chosen}


def embedding(draw: random.Random) -> dict[str, Any]:
    """Texts, tokens, images or a chat with features."""
    kind = draw.randrange(5)
    encoding = draw.choice(["float", "base64"])
    body: dict[str, Any] = {"model": "echo", "encoding_format": encoding}
    ids = [draw.randrange(320) for _ in range(draw.randint(1, 9))]
    if kind == 0:
        return {**body, "messages": chat(draw)["messages"]}
    if kind == 1:
        places = [data_uri(draw) for _ in range(draw.randint(1, 3))]
        return {**body, "input": places, "features": draw.choice(["projector", "tower"])}
    if kind == 2:
        return {**body, "input": draw.choice([ids, [ids, ids[:1]]])}
    texts = [words(draw) for _ in range(draw.randint(1, 12))]
    return {**body, "input": texts[0] if kind == 3 else texts}


def tokenizing(draw: random.Random) -> dict[str, Any]:
    """A prompt or a chat to be read."""
    body: dict[str, Any] = {"model": draw.choice(["echo", None]), "return_token_strs": draw.random() < 0.5}
    if draw.random() < 0.5:
        return {**body, "messages": chat(draw)["messages"]}
    return {**body, "prompt": words(draw), "add_special_tokens": draw.choice([True, False, None])}


def detokenizing(draw: random.Random) -> dict[str, Any]:
    """Tokens to be written."""
    return {"model": "echo", "tokens": [draw.choice([draw.randrange(330), -200]) for _ in range(draw.randint(0, 9))]}
