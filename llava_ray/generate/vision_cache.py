"""What the model has seen: embeddings of images by their content, bounded in bytes."""

import hashlib
from collections import OrderedDict
from threading import Lock

from jaxtyping import Float
from torch import Tensor


def image_key(data: bytes) -> str:
    """Return what stands for an image: the hash of its encoded bytes, never a name that a client chose."""
    return hashlib.sha256(data).hexdigest()


class VisionCache:
    """Embeddings (t, d) of images as the language model reads them; those not used for longest are dropped first.

    Safe to use from several threads.
    """

    def __init__(self, max_bytes: int) -> None:
        """Begin empty; 0 keeps nothing."""
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.num_queries = 0
        self.num_hits = 0
        self._images: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = Lock()

    def find(self, key: str) -> Float[Tensor, "t d"] | None:
        """Return an image's embeddings if they are known, and count the question."""
        with self._lock:
            self.num_queries += 1
            found = self._images.get(key)
            if found is not None:
                self.num_hits += 1
                self._images.move_to_end(key)
            return found

    def keep(self, key: str, embeddings: Float[Tensor, "t d"]) -> None:
        """Remember an image, unless it is larger than all the room there is."""
        with self._lock:
            if embeddings.nbytes > self.max_bytes:
                return
            old = self._images.pop(key, None)
            self.num_bytes += embeddings.nbytes - (0 if old is None else old.nbytes)
            self._images[key] = embeddings
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._images.popitem(last=False)[1].nbytes

    def __len__(self) -> int:
        """Count the images."""
        return len(self._images)
