"""The words of a key, and those that mark it as metadata about a thing rather than the thing itself."""

import re

# A key with one of these words holds metadata about a thing, not the thing itself.
ABOUT = {
    "id", "idx", "index", "num", "number", "n", "count", "has", "is", "length", "len", "duration", "source", "license",
    "score", "hash", "md5", "sha", "phash", "width", "height", "size", "resolution", "fps", "type", "format",
    "name", "category", "caption", "quality", "embedding", "similarity", "date", "time", "copyright", "author", "tag",
    "shape", "stat", "version",
}  # fmt: skip


def words_of(name: str) -> list[str]:
    """Split a key into words in lower case, without trailing numbers and the plural s."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name[:200])
    words = [word.rstrip("0123456789") or word for word in re.split(r"[^a-z0-9]+", split.lower()) if word]
    return [word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words]
