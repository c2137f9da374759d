"""A cache of image embeddings by image content, bounded in bytes."""

import hashlib
from collections import OrderedDict
from threading import Lock

from jaxtyping import Float
from torch import Tensor


def image_key(data: bytes) -> str:
    """Return an image's key: the hash of its encoded bytes, never a name that a client chose."""
    return hashlib.sha256(data).hexdigest()


class VisionCache:
    """An LRU cache of the embeddings (t, d) of images.

    Thread-safe.
    """

    def __init__(self, max_bytes: int) -> None:
        """Initialise an empty cache; 0 bytes cache nothing."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_queries = 0
        self.num_hits = 0
        self._images: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    def find(self, key: str) -> Float[Tensor, "t d"] | None:
        """Return an image's embeddings if they are cached, and count the query."""
        with self._lock:
            self.num_queries += 1
            found = self._images.get(key)
            if found is not None:
                self.num_hits += 1
                self._images.move_to_end(key)
            return found

    def keep(self, key: str, embeddings: Float[Tensor, "t d"]) -> None:
        """Add an image, unless it is larger than the whole cache."""
        with self._lock:
            if embeddings.nbytes > self.max_bytes:
                return
            old = self._images.pop(key, None)
            self.num_bytes += embeddings.nbytes - (0 if old is None else old.nbytes)
            self._images[key] = embeddings
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._images.popitem(last=False)[1].nbytes

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._images)
