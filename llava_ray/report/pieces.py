"""The elements of a report: plain values, independent of HTML.

Every piece has a ``kind``, by which the template selects its markup. All text is escaped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

AnswerVerdict = Literal["right", "wrong"]
_TokenKind = Literal["context", "learnt", "image", "cut"]


@dataclass(frozen=True)
class Note:
    """A highlighted paragraph; ``warning`` if the reader should act on it."""

    kind: ClassVar[str] = "note"
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Fact:
    """A key number, with its label and a short detail."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Facts:
    """A row of key numbers."""

    kind: ClassVar[str] = "facts"
    facts: Sequence[Fact]


@dataclass(frozen=True)
class Bar:
    """A table cell drawn as a bar from 0 to ``maximum``, with a mark at ``reference``."""

    kind: ClassVar[str] = "bar"
    value: float
    text: str
    maximum: float = 1.0
    reference: float | None = None

    @property
    def percent(self) -> float:
        """Return the length of the bar, 0 to 100."""
        return _percent(self.value, self.maximum)

    @property
    def reference_percent(self) -> float | None:
        """Return the position of the mark, 0 to 100."""
        return None if self.reference is None else _percent(self.reference, self.maximum)


@dataclass(frozen=True)
class Link:
    """A link to a ``#anchor`` of this report, a relative path or an http(s) URL."""

    kind: ClassVar[str] = "link"
    text: str
    target: str


Cell = str | int | float | Bar | Link | None


@dataclass(frozen=True)
class Table:
    """Rows under a header; numbers are right-aligned, None is a dash. The first column is the row's name."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    legend: str = ""
    """The meaning of the bars' mark."""

    @property
    def numeric(self) -> list[bool]:
        """Return whether each column holds numbers."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.header)
        return [any(isinstance(cell, int | float) for cell in column) for column in columns]


@dataclass(frozen=True)
class Series:
    """A line through n points; a ``faint`` one is drawn behind the others (raw values behind a smoothed line).

    ``ends_early`` marks the last point of a stopped line with a cross.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    faint: bool = False
    ends_early: bool = False


@dataclass(frozen=True)
class LineChart:
    """Lines over a common axis."""

    kind: ClassVar[str] = "chart"
    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    log_y: bool = False


@dataclass(frozen=True)
class Axis:
    """A vertical axis: its name, and ticks as (height from 0 to 1, label)."""

    name: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Path:
    """A line across the axes, with a height (0 to 1) on each, None without a value; ``name`` selects its colour."""

    name: str
    heights: Sequence[float | None]
    faint: bool = False


@dataclass(frozen=True)
class ParallelChart:
    """Parallel coordinates: a comparison in several properties."""

    kind: ClassVar[str] = "chart"
    title: str
    axes: Sequence[Axis]
    paths: Sequence[Path]
    summary: str
    """A description for screen readers."""


@dataclass(frozen=True)
class Histogram:
    """A distribution of values, with a vertical line at ``limit``."""

    kind: ClassVar[str] = "chart"
    title: str
    values: Sequence[float]
    x_label: str
    y_label: str
    limit: float | None = None
    limit_label: str = ""


@dataclass(frozen=True)
class Picture:
    """An image file (PNG, JPEG, WebP or GIF) with a description, question, answer and truth."""

    content: bytes = field(repr=False)
    alt: str
    caption: str = ""
    question: str = ""
    answer: str = ""
    truth: str = ""
    verdict: AnswerVerdict | None = None


@dataclass(frozen=True)
class Gallery:
    """A grid of pictures."""

    kind: ClassVar[str] = "gallery"
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class ReportToken:
    """A token of a text: "learnt" (supervised), "context", "image" or "cut" (truncated)."""

    text: str
    kind: _TokenKind


@dataclass(frozen=True)
class TokenText:
    """A text as tokens, with the supervised ones highlighted."""

    kind: ClassVar[str] = "tokens"
    tokens: Sequence[ReportToken]


@dataclass(frozen=True)
class Links:
    """A list of links."""

    kind: ClassVar[str] = "links"
    links: Sequence[Link]


@dataclass(frozen=True)
class Card:
    """A frame around the pieces of one item, pictures first; ``anchor`` is its link target."""

    kind: ClassVar[str] = "card"
    title: str
    pieces: Sequence["Piece"]
    pictures: Sequence[Picture] = ()
    facts: str = ""
    """A short text beside the title."""
    anchor: str = ""


Piece = Note | Facts | Table | LineChart | ParallelChart | Histogram | Gallery | TokenText | Links | Card


@dataclass(frozen=True)
class Section:
    """A section of a report with its heading."""

    title: str
    pieces: Sequence[Piece]
    text: str = ""


@dataclass(frozen=True)
class Report:
    """A report: title, a summary of one or two sentences, key numbers, and sections."""

    title: str
    summary: str
    sections: Sequence[Section]
    facts: Sequence[Fact] = ()


def bar_chart(
    title: str,
    header: tuple[str, str],
    rows: Sequence[tuple[str, float, float | None]],
    *,
    maximum: float = 1.0,
    legend: str = "",
    percent: bool = True,
) -> Table:
    """Build a table of bars from ``rows`` (name, value, reference), e.g. accuracy by kind with a baseline.

    ``legend`` names the reference; ``percent`` formats values and references as percentages.
    """

    def format_value(value: float) -> str:
        return f"{value:.1%}" if percent else f"{value:.4g}"

    has_reference = bool(legend)
    cells: list[list[Cell]] = []
    for name, value, reference in rows:
        bar = Bar(value, format_value(value), maximum, reference)
        cells.append([name, bar, *([None if reference is None else format_value(reference)] if has_reference else [])])
    return Table([*header, *([legend] if has_reference else [])], cells, title, legend)


def _percent(value: float, maximum: float) -> float:
    # The comparisons are false for NaN, which then draws nothing.
    return 100 * min(value / maximum, 1.0) if maximum > 0 and value > 0 else 0.0
