"""Requests to the service made from numbers: valid ones, and what is left of them after a few mutations."""

import base64
import copy
import json
import random
import string
import textwrap
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

from request_oddities import ANSWER, HEADERS, IMAGES, KEYS, METHODS, ODD_TEXTS, ODD_VALUES, PATHS, RAW


@dataclass
class Asked:
    """One request as a server hands it to an application."""

    method: str
    path: str
    query: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    leaves: bool = False
    """Whether the client goes before its body has come."""

    @property
    def is_preflight(self) -> bool:
        names = {name for name, _ in self.headers}
        return self.method == "OPTIONS" and {b"origin", b"access-control-request-method"} <= names


def make_request(seed: int) -> Asked:
    """The request of that number."""
    draw = random.Random(seed)
    is_chat = draw.random() < 0.85
    body = chat(draw) if is_chat else completion(draw)
    for _ in range(draw.choice([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 3, 6])):
        body = mutate(body, draw)
    asked = Asked("POST", "/v1/chat/completions" if is_chat else "/v1/completions")
    data = mutate_bytes(written(body, draw), draw) if draw.random() < 0.08 else written(body, draw)
    asked.chunks = cut(data, draw)
    asked.headers = [(b"host", b"127.0.0.1:8000"), (b"content-type", b"application/json")]
    if draw.random() < 0.3:
        asked.headers.append((b"content-length", str(len(data)).encode()))
    if draw.random() < 0.25:
        mutate_outside(asked, draw)
    return asked


TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}},
    {"type": "function", "function": {"name": "g", "description": "x", "strict": True}},
]
CHOICE = {"type": "function", "function": {"name": "f"}}
CALLS = [
    {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
    {"id": "2", "type": "function", "function": {"name": "g", "arguments": ""}},
]
RESULTS = [{"role": "tool", "tool_call_id": call, "content": "4"} for call in ("2", "1")]
FORMATS = [
    {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"type": "object"}}},
]


def chat(draw: random.Random) -> dict[str, Any]:
    """A chat that would be answered."""
    turns: list[dict[str, Any]] = []
    if draw.random() < 0.3:
        turns.append({"role": draw.choice(["system", "developer"]), "content": draw.choice(["be brief", ""])})
    for _ in range(draw.choice([0, 0, 1, 2])):
        turns += [{"role": "user", "content": words(draw)}, copy.deepcopy(ANSWER)]
        if draw.random() < 0.2:
            turns[-1] |= {"content": None, "tool_calls": copy.deepcopy(CALLS)}
            turns += copy.deepcopy(RESULTS)
            turns.append(copy.deepcopy(ANSWER))
        if draw.random() < 0.3:
            turns[-1]["content"] = draw.choice([None, "", [], [{"type": "refusal", "refusal": "no"}], words(draw)])
    parts = [image_part(draw) for _ in range(draw.choice([0, 1, 1, 2, 3]))]
    turns.append({"role": "user", "content": [*parts, {"type": "text", "text": words(draw)}] if parts else words(draw)})
    return {"model": draw.choice(["echo"] * 19 + ["other"]), "messages": turns, **options(draw)}


def completion(draw: random.Random) -> dict[str, Any]:
    """A text that would be gone on with."""
    prompt = words(draw)
    fields = {**options(draw), "logprobs": draw.choice([None, None, 0, 2]), "max_completion_tokens": None}
    return {"model": "echo", "prompt": draw.choice([prompt, [prompt]]), **fields}


def options(draw: random.Random) -> dict[str, Any]:
    """Some settings."""
    given: dict[str, Any] = {
        "temperature": draw.choice([0, 0.0, 0.7, 2, 1e-9, 1e-320]),
        "top_p": draw.choice([1, 0.5, 1e-9]),
        "top_k": draw.choice([-1, 0, 1, 5]),
        "n": draw.choice([1, 2, 3]),
        "stop": draw.choice([None, "a", ["a", "\n"], "</s>"]),
        "seed": draw.choice([None, 0, -1, 2**63 - 1]),
        "stream": draw.random() < 0.4,
        "logprobs": True,
        "max_completion_tokens": 2,
        "tools": draw.choice([[], [], copy.deepcopy(TOOLS)]),
        "response_format": copy.deepcopy(draw.choice([{"type": "text"}, {"type": "text"}, *FORMATS])),
        "guided_choice": draw.choice([None, None, ["a", "b"]]),
        "structured_outputs": copy.deepcopy(draw.choice([None, {}, {"regex": "a"}, {"json": {"type": "object"}}])),
        "tool_choice": copy.deepcopy(draw.choice([None, "none", "auto", "required", CHOICE])),
    }
    chosen = {name: given[name] for name in draw.sample(sorted(given), draw.randrange(5))}
    if chosen.get("stream"):
        chosen["stream_options"] = draw.choice([None, {}, {"include_usage": True}])
    return {"max_tokens": draw.choice([1, 2, 3]), **chosen}


def words(draw: random.Random) -> str:
    if draw.random() < 0.15:
        return draw.choice(ODD_TEXTS)
    return " ".join(draw.choices(["is", "it", "red", "a", "circle", "Größe", "?", "<image>"], k=draw.randint(0, 8)))


def image_part(draw: random.Random) -> dict[str, Any]:
    place = data_uri(draw) if draw.random() < 0.9 else address(draw)
    part: dict[str, Any] = {"type": "image_url", "image_url": {"url": place} if draw.random() < 0.8 else place}
    if draw.random() < 0.2:
        part |= draw.choice([{"uuid": "x"}, {"cache_control": {}}, {"uuid": None}])
    return part


def data_uri(draw: random.Random) -> str:
    """An image in one of the forms of data URIs, damaged now and then."""
    data = draw.choice(IMAGES)
    if draw.random() < 0.08:
        data = mutate_bytes(data, draw)
    text = base64.b64encode(data).decode()
    text = draw.choice(
        [
            *[text] * 9,
            "\r\n".join(textwrap.wrap(text, 76)),
            text.rstrip("="),
            text.translate(str.maketrans("+/", "-_")),
            urllib.parse.quote(text, safe=""),
            "".join(f"%{ord(char):02x}" for char in text),
            text + "=" * draw.randrange(4),
            text[: draw.randrange(len(text) or 1)],
            text.replace("A", draw.choice(["%", "%4", "é", "\0", "=", " ", "\ud7ff", "%zz"]), 1),
        ]
    )
    heads = ["data:image/png;base64,"] * 40 + [
        "data:;base64,", "DATA:image/jpg;charset=utf-8;BASE64,", "data:base64,", " data: image/png ; base64 ,",
        "data:,",
        "data:image/png,", "data:", 'data:image/png;a="b,c";base64,', "data:" + "x" * 2000 + ";base64,", 'data:"' * 300,
    ]  # fmt: skip
    return draw.choice(heads) + text


def address(draw: random.Random) -> str:
    """A place on the network or the disk, mostly one that may not be read."""
    scheme = draw.choice(
        ["http://", "https://", "HTTP://", "file://", "ftp://", "//", "", "http:", "file:", "javascript:"]
    )
    hosts = [
        "xn--", "xn--a", "[", "]", "[::1]", "[::1", "[zz]", "[fe80::1%25eth0]", "a" * 64 + ".test", "a." * 200,
        "é.test",
        "ß" * 80, "\u2100.test", "media.test", "media.test.", "MEDIA.test", "inside.test", "127.0.0.1", "0", "0x7f.1",
        "user:pass@media.test", "media.test@evil.test", "", ".", "..", "a..b", " ", "a b", "%00", "media.test%2f.evil",
        "media.test\\@evil", "\0", "\r\nhost: x", "x" * 9000, "169.254.169.254", "[::ffff:127.0.0.1]", "2130706433",
    ]  # fmt: skip
    port = draw.choice(["", "", ":80", ":99999", ":-1", ":", ":x", ":" + "9" * 5000, ":٣"])
    path = draw.choice(
        ["", "/", "/a.png", "/../../etc/passwd", "/%zz", "?\0", "#é", "/" + "a" * 9000, "/\ud7ff", "/red.png%00"]
    )
    return scheme + draw.choice(hosts) + port + path


def mutate(tree: Any, draw: random.Random) -> Any:
    """Change one place of a JSON value."""
    tree = copy.deepcopy(tree)
    places = list(places_of(tree))
    if not places:
        return tree
    owner, key = draw.choice(places)
    kind = draw.choice([0, 1, 2, 3, 4, 5, 5, 5, 5, 6, 7])
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, dict):
        owner[draw.choice(KEYS)] = draw.choice(ODD_VALUES)
    elif kind == 2 and isinstance(owner, list):
        owner[key:key] = [copy.deepcopy(owner[key])] * draw.choice([1, 2, 9, 300])
    elif kind == 3:
        owner[key] = draw.choice(
            [[owner[key]], {"content": owner[key]}, str(owner[key]), {draw.choice(KEYS): owner[key]}]
        )
    elif kind == 4 and isinstance(owner, dict):
        owner[draw.choice(KEYS)] = owner.pop(key)
    elif kind == 5 and isinstance(owner[key], str):
        text = owner[key]
        place = draw.randint(0, len(text))
        owner[key] = text[:place] + draw.choice(ODD_TEXTS) + text[place:]
    elif kind == 6:
        other, name = draw.choice(places)
        owner[key] = copy.deepcopy(other[name])
    else:
        owner[key] = draw.choice(ODD_VALUES)
    return tree


def places_of(tree: Any) -> "list[tuple[Any, Any]]":
    """Every place of a value, by the list or object that holds it, and its key there."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    found = [(tree, key) for key in keys]
    for key in keys:
        found += places_of(tree[key])
    return found


def written(tree: Any, draw: random.Random) -> bytes:
    """Write JSON, and what only looks like it."""
    text = json.dumps(tree, ensure_ascii=draw.random() < 0.5)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode("utf-8", "surrogatepass")


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Change some bytes."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 8])):
        place = draw.randrange(len(changed) + 1)
        kind = draw.randrange(6)
        if kind == 0:
            changed[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            del changed[place : place + draw.randrange(20)]
        elif kind == 3:
            changed[place:place] = changed[draw.randrange(len(changed) + 1) :][: draw.randrange(200)]
        elif kind == 4:
            changed[place:place] = draw.choice(string.printable).encode() * draw.choice([1, 3, 5000])
        else:
            changed[place:place] = draw.choice([b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\0", b"\\u", b"{", b"]"])
    return bytes(changed)


def mutate_outside(asked: Asked, draw: random.Random) -> None:
    """Change what is not the body."""
    for _ in range(draw.choice([1, 1, 2, 4])):
        kind = draw.randrange(5)
        if kind == 0:
            asked.method = draw.choice(METHODS)
        elif kind == 1:
            asked.path = draw.choice(PATHS)
        elif kind == 2:
            asked.query = draw.choice([b"?", b"a=b", b"%zz=%", b"\xff", b"a" * 5000, b"stream=true", b"&" * 500])
        elif kind == 3 and draw.random() < 0.1:
            asked.leaves = True
        else:
            name = draw.choice(sorted(HEADERS))
            if draw.random() < 0.5:
                asked.headers = [(key, value) for key, value in asked.headers if key != name.encode()]
            asked.headers.append((name.encode(), draw.choice(HEADERS[name])))
    if asked.method == "OPTIONS" and draw.random() < 0.5:
        asked.headers.append((b"access-control-request-method", draw.choice([b"POST", b"\xff", b""])))


def cut(data: bytes, draw: random.Random) -> list[bytes]:
    """The body as it comes: whole, or in pieces of which some are empty."""
    if draw.random() < 0.7:
        return [data]
    places = sorted(draw.randint(0, len(data)) for _ in range(draw.randint(1, 5)))
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]
