"""Seeded damage to files of models: structural where a file has a structure, of bytes everywhere."""

import copy
import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

NUMBERS: list[Any] = [0, 1, -1, -2, 3, 7, 255, 4096, 10**6, 2**31, 2**63 - 1, 2**63, 2**64, 10**9, 10**40, -(10**12)]
NUMBERS += [0.0, 0.5, -1.5, 1e-300, 1e308, 1e999, -1e999, float("nan")]
TEXTS: list[Any] = ["", "a", "0", "llama", "clip", "gelu", "../..", "/etc/passwd", "~nobody/x", "\0", "\ud800"]
TEXTS += ["<image>", "cuda:0", "float16", "torch.float99", "1,2", "((((((((((", "[" * 2000, "x" * 5000, "é" * 300]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [1], [1, [2]], ["a", 1], {"a": 1}, {"": {}}, [0] * 10_000]
OPCODES = b"()012.0FIJKLMNRSTUVX]abcdeghijlqrst}" + bytes([*range(0x80, 0x96)])


def odd_value(random: random.Random, old: Any = None) -> Any:
    """Return a value that may stand in the place of another: of its kind and near it, or not at all."""
    if isinstance(old, int | float) and not isinstance(old, bool) and random.random() < 0.4:
        return random.choice([old + 1, old - 1, old * 2, -old, old // 2, old * 1000, float(old), str(old), [old]])
    if isinstance(old, str) and random.random() < 0.3:
        return random.choice([old[:-1], old + "x", old.upper(), [old], old * 3, old.encode("utf-8", "replace").hex()])
    if isinstance(old, list) and old and random.random() < 0.5:
        return random.choice([old[:-1], old + old, old[::-1], [old], old[0], old * 50, [*old, None]])
    if random.random() < 0.03:
        return deep(random.choice([70, 500, 100_000]))
    return copy.deepcopy(random.choice(random.choice([NUMBERS, TEXTS, OTHERS])))


class Raw(str):
    """JSON that is written as it is."""


def deep(levels: int) -> Any:
    """Return lists in each other, as JSON text where no encoder could write them."""
    return Raw("[" * levels + "]" * levels)


def dumped(value: Any) -> str:
    """Write JSON, with raw pieces in it."""
    pieces: list[str] = []

    def marked(item: Any) -> Any:
        if isinstance(item, Raw):
            pieces.append(str(item))
            return f"@raw{len(pieces) - 1}@"
        if isinstance(item, dict):
            return {key: marked(inner) for key, inner in item.items()}
        return [marked(inner) for inner in item] if isinstance(item, list) else item

    text = json.dumps(marked(value))
    for number, piece in enumerate(pieces):
        text = text.replace(f'"@raw{number}@"', piece)
    return text


def damage_json(random: random.Random, content: bytes) -> bytes:
    """Change, drop, add or repeat a few values of a JSON file."""
    try:
        tree = json.loads(content)
    except ValueError:
        return damage_bytes(random, content)
    if random.random() < 0.05:
        return dumped(odd_value(random)).encode("utf-8", "surrogatepass")
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        places = list(containers(tree))
        if not places:
            break
        # Large tables (a vocabulary) would otherwise take all the damage.
        holder = random.choice(random.choice([places, places[:8]]))
        key = random.choice(list(holder)) if isinstance(holder, dict) else random.randrange(len(holder))
        action = random.random()
        if action < 0.12:
            del holder[key]
        elif action < 0.2 and isinstance(holder, dict):
            added = random.choice(["hidden_size", "auto_map", "quantization_config", "num_labels", "llava_ray", "x"])
            holder[added] = odd_value(random)
        elif action < 0.25:
            holder[key] = {"a": holder[key]}
        else:
            holder[key] = odd_value(random, holder[key])
    text = dumped(tree)
    if random.random() < 0.03:
        text = text.replace("{", '{"a": 1, "a": 2, ', 1)
    if random.random() < 0.03:
        text = text.replace("1", "1" * random.choice([20, 5000]), 1)
    return text.encode("utf-8", "surrogatepass")


def containers(tree: Any) -> list[Any]:
    """Return all tables and lists that hold something, the outermost first."""
    found, queue = [], [tree]
    while queue:
        item = queue.pop(0)
        if isinstance(item, dict | list) and item:
            found.append(item)
            queue += list(item.values() if isinstance(item, dict) else item)[:200]
    return found


def damage_bytes(random: random.Random, content: bytes) -> bytes:
    """Flip, cut, repeat, insert or splice bytes."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 8])):
        place = random.randrange(len(data) + 1)
        action = random.random()
        if action < 0.4 and data:
            data[place % len(data)] = random.randrange(256)
        elif action < 0.55:
            del data[place:]
        elif action < 0.7:
            del data[place : place + random.choice([1, 8, 100])]
        elif action < 0.85:
            data[place:place] = random.randbytes(random.choice([1, 8, 100]))
        else:
            start = random.randrange(len(data) + 1)
            data[place:place] = data[start : start + random.choice([4, 64, 1000])]
    return bytes(data)


def damage_safetensors(random: random.Random, content: bytes) -> bytes:
    """Change the header of a safetensors file, its length, or its numbers."""
    length = int.from_bytes(content[:8], "little")
    header, body = content[8 : 8 + length], content[8 + length :]
    action = random.random()
    if action < 0.1:
        length = random.choice([0, 1, 2, length - 1, length + 8, 2**24, 2**60, 2**64 - 1])
        return length.to_bytes(8, "little") + content[8:]
    if action < 0.2:
        return damage_bytes(random, content)
    if action < 0.3:  # numbers that are NaN or infinite somewhere
        place = 8 + length + random.randrange(max(1, len(body) // 4)) * 4
        return content[:place] + random.choice([b"\0\0\xc0\x7f", b"\0\0\x80\xff"]) + content[place + 4 :]
    if action < 0.5:
        header = damage_bytes(random, header)
    elif action < 0.8:
        header = damage_entry(random, header)
    else:
        header = damage_json(random, header)
    return len(header).to_bytes(8, "little") + header + body


def damage_entry(random: random.Random, header: bytes) -> bytes:
    """Change what a header says of a tensor, so that it is still nearly right."""
    entries = json.loads(header)
    names = [name for name in entries if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry = entries[name]
    action = random.randrange(8)
    if action == 0:
        entry["dtype"] = random.choice(["F16", "BF16", "F32", "F64", "I8", "U8", "BOOL", "F8_E5M2", "I64", "U64", "F4"])
    elif action == 1:
        entry["shape"] = entry["shape"][::-1]
    elif action == 2:
        entry["shape"] = [1, *entry["shape"]]
    elif action == 3:
        entry["data_offsets"] = [offset + random.choice([-4, 4, 2**40]) for offset in entry["data_offsets"]]
    elif action == 4:
        entries[name], entries[other] = entries[other], entry
    elif action == 5:
        entries[name + random.choice(["x", ".weight", "\0", "é"])] = entries.pop(name)
    elif action == 6:
        entry["shape"] = [2**32, 2**32, *entry["shape"]]
    else:
        del entries[name]
    return json.dumps(entries).encode()


def damage_pytorch(random: random.Random, content: bytes) -> bytes:
    """Change a PyTorch file: its pickle, its members, or what the archive says of them."""
    if random.random() < 0.25:
        return damage_bytes(random, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    [index] = [name for name in members if name.endswith("data.pkl")]
    action, kind = random.random(), zipfile.ZIP_STORED
    if action < 0.5:
        members[index] = damage_pickle(random, members[index])
    elif action < 0.6:
        members[index] = pickle_bomb(random)
    elif action < 0.7:
        kind = zipfile.ZIP_DEFLATED
        name = random.choice(list(members))
        members[name] = random.choice([members[name], b"\0" * 2**22])
    elif action < 0.8:
        del members[random.choice(list(members))]
    else:
        name = random.choice(list(members))
        members[random.choice([name, "../../x", "/etc/x", "a" * 300, index + "x", f"b/{index}"])] = damage_bytes(
            random, members[name]
        )
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
        if random.random() < 0.05:
            archive.writestr(index, members.get(index, b""))
    result = bytearray(written.getvalue())
    if random.random() < 0.2:  # sizes and places in the directory
        place = result.rfind(b"PK\1\2") + random.choice([10, 16, 20, 24, 42])
        result[place : place + 4] = struct.pack("<I", random.choice([0, 1, 2**31, 2**32 - 1, random.randrange(5000)]))
    return bytes(result)


def damage_pickle(random: random.Random, data: bytes) -> bytes:
    """Change a pickle's operations or numbers."""
    changed = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5])):
        place = random.randrange(len(changed))
        action = random.random()
        if action < 0.4:
            changed[place] = random.choice(OPCODES)
        elif action < 0.7:
            changed[place] = random.randrange(256)
        elif action < 0.85:
            changed[place:place] = bytes([random.choice(OPCODES)])
        else:
            start = random.randrange(len(changed))
            changed[place:place] = changed[start : start + random.randrange(60)]
    return bytes(changed)


class Runs:
    """What runs something when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Ask for a command."""
        import os

        return os.mkdir, ("it-ran",)


def pickle_bomb(random: random.Random) -> bytes:
    """Return a pickle that hangs, fills the memory or runs something where it is read without care."""
    nested = b"\x80\x02)" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(100))
    return random.choice(
        [
            b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".",
            b"\x80\x02}" + nested[2:] + b"K\x01s.",  # a key whose hash takes for ever
            nested + b"Q.",
            b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
            b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
            b"\x80\x02" + b"(" * 100_000 + b".",
            b"\x80\x02" + b"]q\0" + b"h\0h\0a" * 1000 + b".",
            pickle.dumps(Runs()),
            pickle.dumps({"a": Runs()}, 0),
            b"\x80\x02cbuiltins\neval\nX\x03\0\0\0" + b"1+1\x85R.",
            b"\x80\x02\x8b" + struct.pack("<I", 2**20) + b"\x7f" * 2**20 + b".",
            b"\x80\x02I" + b"9" * 10_000 + b"\n.",
        ]
    )


def damage(random: random.Random, file: Path) -> bytes | None:
    """Return a file's content damaged in the way that suits it; None for a file that is not there any more."""
    content = file.read_bytes()
    action = random.random()
    if action < 0.03:
        return None
    if action < 0.06:
        return b""
    if action < 0.08:
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
    if file.suffix == ".safetensors":
        return damage_safetensors(random, content)
    if file.suffix == ".bin":
        return damage_pytorch(random, content)
    return damage_json(random, content) if file.suffix == ".json" and action < 0.9 else damage_bytes(random, content)
