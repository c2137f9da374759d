"""What one description says of objects: named ones, hallucinated ones, and what was there and is named."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from evals.benchmark import Graded


@dataclass(frozen=True)
class ObjectCounts:
    """The counts of one description; ``hallucinated`` has a word for each mention of an object that is not there."""

    mentioned: int
    hallucinated: tuple[str, ...] = ()
    covered: int = 0
    present: int = 0
    """Objects that are there; ``covered``: those of them that are named."""
    imagined: int = 0
    expected: int = 0
    """Objects that people would imagine beside (AMBER); ``imagined``: those of them that are named."""

    def to_json(self) -> str:
        """Format the counts as one line, which a stored grade keeps."""
        return json.dumps(asdict(self), ensure_ascii=False)


def count_named_objects(mentions: Sequence[tuple[str, str]], there: Iterable[str]) -> ObjectCounts:
    """Count mentions (word, object) against the objects that are there."""
    objects = set(there)
    wrong = tuple(word for word, name in mentions if name not in objects)
    return ObjectCounts(len(mentions), wrong, len({name for _, name in mentions} & objects), len(objects))


def read_counts(rows: Sequence[Graded]) -> list[ObjectCounts]:
    """Return the counts of all rows with counts, in order."""
    return [
        ObjectCounts(**{**found, "hallucinated": tuple(found["hallucinated"])})
        for row in rows
        if row.parsed is not None
        for found in [json.loads(row.parsed)]
    ]


def share_of(part: int, whole: int) -> float | None:
    """Return a part in per cent of the whole; None of nothing."""
    return 100 * part / whole if whole else None
