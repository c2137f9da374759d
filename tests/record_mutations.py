"""Record files with damage in them, made from numbers: JSON, JSON lines, Parquet tables and WebDataset tars."""

import base64
import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SUFFIXES = {"json": ".json", "jsonl": ".jsonl", "parquet": ".parquet", "tar": ".tar"}
KEYS = [
    "id", "image", "images", "conversations", "messages", "system", "system_prompt", "video", "videos", "audio",
    "tools",
    "function_call", "weight", "loss", "mask", "prompt", "chosen", "rejected", "source", "foo", "", "\ud800", "a\x00b",
    "k" * 5000, "image_path", "url", "label", "reasoning_content", "bbox", "Image", "conversation",
    "trainable", "media", "image2", "loss_mask",
]  # fmt: skip
TURN_KEYS = [
    "from",
    "value",
    "role",
    "content",
    "weight",
    "loss",
    "train",
    "name",
    "tool_calls",
    "thinking",
    "image",
    "masked",
]
PART_KEYS = ["type", "text", "image", "image_url", "video", "index", "input_audio", "path", "url", "source"]
ROLES = [
    "human",
    "gpt",
    "User",
    "ASSISTANT",
    "system",
    "developer",
    "tool",
    "function_call",
    "observation",
    "",
    " gpt ",
]
TYPES = ["text", "image", "image_url", "input_text", "video", "audio", "input_audio", "file", "tool_use", None, 5, []]
TEXTS = ["", " ", "<image>", "<image>\nq", "a", "\ud800", "é😀", "a\x00b", "<im", "x" * 20_000, "[]", "{}", "</s>"]
PATHS = [
    "a.png", "gone.png", "", ".", "..", "a\x00.png", "\ud800.png", "x" * 5000, "/dev/zero", "/dev/null", "/", 
    "~nobody/x",
    "nosuch://a/b", "file:///nowhere.png", "data:image/png;base64,AAAA", "data:,", "data:image/png;base64,%%%", "://",
    "memory://nothing.png", "iVBORw0KGgo" + "A" * 3000, "/9j/" + "A" * 39, "zip://x::file://y", "[", "s3:/x",
    "a/b/../c", "reference://x", "dir://a", "ftp://127.0.0.1:1/a.png", "generic://x",
]  # fmt: skip


def png(color: int) -> bytes:
    """Return a small image."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), color, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png(7)


def good_record(draw: random.Random, number: int) -> dict[str, Any]:
    """Return a record that is read, of one of the forms there are."""
    form = draw.randrange(6)
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": f"a{number}"}]
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    parts = [{"type": "image"}, {"type": "text", "text": "q"}]
    records: list[dict[str, Any]] = [
        {"image": "a.png", "conversations": turns},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": messages},
        {"images": ["a.png"], "messages": [{"role": "user", "content": parts}, messages[1]]},
        {"system": "Be brief.", "messages": messages},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                *messages,
                {**messages[0]},
                {**messages[1], "weight": 0},
            ]
        },
    ]
    return {"id": str(number), **records[form]}


def odd_value(draw: random.Random, kind: str = "any") -> Any:
    """Return a value that somebody may have put there."""
    choices: list[Callable[[], Any]] = [
        lambda: draw.choice(TEXTS),
        lambda: draw.choice(PATHS),
        lambda: draw.choice([None, True, False, 0, 1, -1, 0.5, 1e308, 2**70, 10**3999]),
        lambda: draw.choice(
            [[], {}, [[]], [None], {"a": None}, [1, 2], ["a.png"], [{}], {"bytes": None, "path": None}]
        ),
        lambda: {"bytes": draw.choice([base64.b64encode(PNG).decode(), "no", [1, 2], "%", None, "é"]), "path": "a.png"},
        lambda: [{"from": draw.choice(ROLES), "value": draw.choice(TEXTS)} for _ in range(draw.randrange(4))],
        lambda: [{"type": draw.choice(TYPES), draw.choice(PART_KEYS): draw.choice(TEXTS)} for _ in range(3)],
        lambda: nested(draw.choice([3, 70, 500])),
        lambda: "data:image/png;base64," + base64.b64encode(PNG).decode()[: draw.randrange(200)],
    ]
    if kind == "role":
        choices += [lambda: draw.choice(ROLES)] * 8
    if kind == "path":
        choices += [lambda: draw.choice(PATHS)] * 8
    if kind == "text":
        choices += [lambda: draw.choice(TEXTS)] * 8
    return draw.choice(choices)()


def nested(depth: int) -> Any:
    """Return lists in each other."""
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def damage_values(draw: random.Random, record: dict[str, Any]) -> None:
    """Change keys and values at some place of a record."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        turns = record.get("conversations") or record.get("messages")
        place = draw.random()
        if place < 0.35 or not isinstance(turns, list) or not turns:
            key = draw.choice(KEYS)
            record[key] = odd_value(draw, "path" if "image" in key else "any")
            if draw.random() < 0.2:
                record.pop(draw.choice(list(record)))
            continue
        index = draw.randrange(len(turns))
        turn = turns[index]
        if place < 0.75 and isinstance(turn, dict):
            key = draw.choice(TURN_KEYS)
            turn[key] = odd_value(
                draw, {"from": "role", "role": "role", "value": "text", "content": "text"}.get(key, "any")
            )
            continue
        parts = turn.get("content") if isinstance(turn, dict) else None
        if place < 0.9 and isinstance(parts, list) and parts and isinstance(parts[0], dict):
            parts[0][draw.choice(PART_KEYS)] = draw.choice([odd_value(draw), draw.choice(TYPES)])
        else:
            action = draw.randrange(3)
            if action == 0:
                turns.insert(index, odd_value(draw))
            elif action == 1:
                del turns[index]
            else:
                turns[index] = odd_value(draw)


def damage_bytes(draw: random.Random, content: bytes) -> bytes:
    """Flip, cut, insert, repeat or overwrite bytes."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 3, 10])):
        if not data:
            break
        place, action = draw.randrange(len(data)), draw.random()
        if action < 0.45:
            data[place] = draw.choice([draw.randrange(256), data[place] ^ (1 << draw.randrange(8)), 0, 255])
        elif action < 0.6:
            del data[place : place + draw.choice([1, 4, 100, 512])]
        elif action < 0.75:
            data[place:place] = draw.choice(
                [b"\0" * 512, b"[" * 2000, b'"', b"\\", b"9" * 5000, b"\xff", b"},{", b"\xed\xa0\x80"]
            )
        elif action < 0.85:
            end = min(len(data), place + draw.choice([8, 64, 512]))
            data[place:end] = bytes(end - place)
        elif action < 0.93:
            other = draw.randrange(len(data))
            data[place:place] = data[other : other + draw.choice([16, 512, 1024])]
        else:
            del data[place:]
    return bytes(data)


def as_json(records: list[dict[str, Any]], draw: random.Random) -> bytes:
    """Write a JSON list in one of the ways there are."""
    indent, ascii_only = draw.choice([None, None, 2]), draw.random() < 0.7
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    encoding = draw.choice(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "latin-1", "utf-32"])
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


def as_jsonl(records: list[dict[str, Any]], draw: random.Random) -> bytes:
    """Write a record a line, or what is only called so."""
    indent = 2 if draw.random() < 0.05 else None
    return draw.choice(["\n", "\n", "\r\n", "\n\n"]).join(json.dumps(row, indent=indent) for row in records).encode()


def as_parquet(records: list[dict[str, Any]], draw: random.Random) -> bytes:
    """Write a table: what Arrow cannot hold as it is becomes JSON text."""
    sink = io.BytesIO()
    columns: dict[str, Any] = {}
    for name in list(dict.fromkeys(key for record in records for key in record)):
        cells = [record.get(name) for record in records]
        safe = name.encode("utf-8", "replace").decode()[:100]
        try:
            columns[safe] = pa.array(cells)
            pq.write_table(pa.table({safe: columns[safe]}), io.BytesIO())  # no objects without keys
        except (pa.ArrowException, OverflowError, ValueError, TypeError, UnicodeError):
            columns[safe] = pa.array([None if cell is None else json.dumps(cell) for cell in cells])
    if draw.random() < 0.5:
        columns["image"] = pa.array([{"bytes": PNG, "path": "a.png"}] * len(records))
    if not {"conversations", "messages"} & set(columns):
        columns["conversations"] = pa.array([json.dumps([])] * len(records))
    pq.write_table(
        pa.table(columns),
        sink,
        row_group_size=draw.choice([1, 2, 100]),
        compression=draw.choice(["snappy", "none", "zstd", "gzip"]),
        use_dictionary=draw.random() < 0.5,
    )
    return sink.getvalue()


def as_tar(records: list[dict[str, Any]], draw: random.Random) -> bytes:
    """Write a WebDataset tar, some of its members odd."""
    sink = io.BytesIO()
    form = draw.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    with tarfile.open(fileobj=sink, mode=draw.choice(["w", "w", "w:gz"]), format=form) as tar:
        for number, record in enumerate(records):
            name = draw.choice([str(number)] * 8 + ["/etc/x", "é", "n" * 90, "x.y", "", "../up"])
            files = [(f"{name}.json", json.dumps(record).encode())]
            if "<image>" in str(record) or draw.random() < 0.2:
                files.append((f"{name}.png", PNG))
            files += [(f"{name}{draw.choice(['.txt', '.mp4', '.wav', '.json', '.cls'])}", b"x")] * (draw.random() < 0.1)
            for path, content in files:
                info = tarfile.TarInfo(path)
                info.size = len(content)
                if draw.random() < 0.03:
                    info.type, info.linkname = draw.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE]), "x"
                tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    return sink.getvalue()


WRITERS = {"json": as_json, "jsonl": as_jsonl, "parquet": as_parquet, "tar": as_tar}


def make_file(seed: int) -> tuple[str, bytes, int, bool]:
    """Return the suffix and content of one file, its number of records, and whether its bytes were damaged."""
    draw = random.Random(seed)
    kind = draw.choice(list(SUFFIXES))
    records = [good_record(draw, number) for number in range(draw.choice([1, 3, 5]))]
    records[-1] = good_record(draw, len(records) - 1)
    for record in records[:-1] if len(records) > 1 else records:
        if draw.random() < 0.6:
            damage_values(draw, record)
    content = WRITERS[kind](records, draw)
    suffix = SUFFIXES[kind]
    if kind in ("json", "jsonl") and draw.random() < 0.1:
        content, suffix = gzip.compress(content), suffix + draw.choice([".gz", ""])
    damaged = draw.random() < 0.5
    return suffix, damage_bytes(draw, content) if damaged else content, len(records), damaged
