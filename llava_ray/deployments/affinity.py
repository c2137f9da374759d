"""Which replica probably has a request's text, or its images, in its caches: from where earlier requests went.

Replicas are not asked: each ingress remembers where it sent what. A wrong guess costs time only.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from llava_ray.chat.conversation import IMAGE_TOKEN
from llava_ray.deployments.messages import Task

_PIECE = 2048  # characters after which a long text has another beginning
_IMAGE_SIZE = 1000  # characters that an image counts for
_LEAST_SIZE = 256  # characters of a beginning that is worth going elsewhere for
_LONG_MEDIUM = 64 * 1024  # characters of an image's address or data that are hashed
_MAX_HOLDERS = 4
_MAX_KEYS = 50_000  # remembered beginnings and images, of about 200 bytes each


@dataclass(frozen=True)
class Beginning:
    """A request's first characters."""

    key: bytes
    size: int


@dataclass(frozen=True)
class CacheableContents:
    """The parts of a request that a cache may know."""

    beginnings: tuple[Beginning, ...]
    """Growing: the last is the whole text."""
    known_size: int
    """The size of what an earlier turn of the chat has sent."""
    images: tuple[bytes, ...]


def read_contents(task: Task) -> CacheableContents:
    """Return the beginnings and images of a task; the adapter is part of each."""
    images = tuple(_hash_medium(medium) for medium in task.media)
    digest = hashlib.blake2b(f"{task.model}\0{task.system or ''}".encode("utf-8", "surrogatepass"), digest_size=16)
    size, next_image = len(task.system or ""), 0
    found: list[Beginning] = []
    ends: list[int] = []
    for text in [turn.value for turn in task.turns] or [task.prompt or ""]:
        count = text.count(IMAGE_TOKEN)
        for key in images[next_image : next_image + count]:
            digest.update(key)
        size, next_image = size + count * _IMAGE_SIZE, next_image + count
        for start in range(0, len(text) + 1, _PIECE):
            piece = text[start : start + _PIECE]
            digest.update(piece.encode("utf-8", "surrogatepass"))
            size += len(piece)
            if len(piece) == _PIECE:
                found.append(Beginning(digest.digest(), size))
        digest.update(b"\0turn")
        found.append(Beginning(digest.digest(), size))
        ends.append(size)
    return CacheableContents(tuple(found), ends[-3] if len(ends) > 2 else ends[-1], images)


@dataclass
class Placements:
    """The replicas that got each beginning and each image, the last few of them; the oldest keys are forgotten."""

    max_keys: int = _MAX_KEYS
    _holders: OrderedDict[bytes, tuple[str, ...]] = field(default_factory=OrderedDict)

    def record(self, contents: CacheableContents, replica: str) -> None:
        """Remember that a replica got a request."""
        for key in (*(one.key for one in contents.beginnings), *contents.images):
            others = tuple(other for other in self._holders.pop(key, ()) if other != replica)
            self._holders[key] = (replica, *others)[:_MAX_HOLDERS]
        while len(self._holders) > self.max_keys:
            self._holders.popitem(last=False)

    def find_holders(self, contents: CacheableContents, replicas: Collection[str]) -> list[str]:
        """Return those of ``replicas`` that hold most of a request: its text, else its images; none if too little."""
        for beginning in reversed(contents.beginnings):
            if beginning.size < max(_LEAST_SIZE, contents.known_size / 2):
                break
            if holders := self._among(beginning.key, replicas):
                return holders
        held: dict[str, int] = {}
        for key in contents.images:
            for replica in self._among(key, replicas):
                held[replica] = held.get(replica, 0) + 1
        return [replica for replica, count in held.items() if count == max(held.values())]

    def __len__(self) -> int:
        """Return the number of remembered keys."""
        return len(self._holders)

    def _among(self, key: bytes, replicas: Collection[str]) -> list[str]:
        return [replica for replica in self._holders.get(key, ()) if replica in replicas]


def rank_replicas(session: str, replicas: Sequence[str], holders: Collection[str]) -> list[str]:
    """Return the replicas in the order in which a request should try them.

    Those that hold most of it come first. Among equals a session has its own order, the same in every ingress.
    """

    def weight(replica: str) -> bytes:
        return hashlib.blake2b(f"{session}\0{replica}".encode(), digest_size=8).digest()

    return sorted(replicas, key=lambda replica: (replica in holders, weight(replica)), reverse=True)


def _hash_medium(medium: str) -> bytes:
    """Return the key of an image's address or data: of its length and its end, for it may be long."""
    end = f"{len(medium)}\0{medium[-_LONG_MEDIUM:]}"
    return hashlib.blake2b(end.encode("utf-8", "surrogatepass"), digest_size=16).digest()
