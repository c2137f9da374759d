"""The work that one file may cause: counted while its container is walked, and refused beyond any ordinary file."""

from collections import Counter

from llava_ray.errors import ImageError


class WorkBudget:
    """A counter of one file's blocks, entries and referenced bytes."""

    def __init__(self, name: str) -> None:
        """Start counting for a file that messages call ``name``."""
        self.name = name
        self._taken = Counter[str]()

    def take(self, what: str, limit: int, amount: int = 1) -> None:
        """Add ``amount`` to the count of ``what``. Raises ImageError beyond ``limit``."""
        self._taken[what] += amount
        if self._taken[what] > limit:
            raise ImageError(
                f"{self.name}: more than {limit:,} {what}, far beyond any ordinary file, and reading them would cost "
                "too much; save the picture again, without its metadata",
                reason="image_too_costly",
            )
