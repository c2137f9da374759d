"""What a report is made of: plain values that know nothing of HTML.

Every piece has a ``kind``, by which the template chooses how to draw it. All text is taken literally.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

AnswerVerdict = Literal["right", "wrong"]
_TokenKind = Literal["context", "learnt", "image", "cut"]


@dataclass(frozen=True)
class Note:
    """A paragraph set apart; ``warning`` for what the reader should act on."""

    kind: ClassVar[str] = "note"
    text: str
    warning: bool = False


@dataclass(frozen=True)
class Fact:
    """A number worth large type, with what it is and a few words about it."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Facts:
    """A row of facts."""

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
        """Length of the bar, 0..100."""
        return _percent(self.value, self.maximum)

    @property
    def reference_percent(self) -> float | None:
        """Place of the mark, 0..100."""
        return None if self.reference is None else _percent(self.reference, self.maximum)


@dataclass(frozen=True)
class Link:
    """A table cell or list entry that leads to a ``#anchor`` of this report, a relative path or an http(s) URL."""

    kind: ClassVar[str] = "link"
    text: str
    target: str


Cell = str | int | float | Bar | Link | None


@dataclass(frozen=True)
class Table:
    """Rows under a header; numbers are aligned at the right, None is a dash. The first column names the row."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    legend: str = ""
    """What the mark of its bars means."""

    @property
    def numeric(self) -> list[bool]:
        """Tell for each column whether it holds numbers."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.header)
        return [any(isinstance(cell, int | float) for cell in column) for column in columns]


@dataclass(frozen=True)
class Series:
    """A line through n points; a ``faint`` one stands behind the others (raw values behind a smoothed line).

    ``ends_early`` marks its last point with a cross: it would have gone on.
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
    """An upright axis: its name, and where (0 at the bottom to 1 at the top) which values are written."""

    name: str
    ticks: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Path:
    """A line from axis to axis, at a height (0 to 1) on each, None where it has no value; ``name`` is its colour's."""

    name: str
    heights: Sequence[float | None]
    faint: bool = False


@dataclass(frozen=True)
class ParallelChart:
    """Parallel coordinates: how things with several properties compare in each."""

    kind: ClassVar[str] = "chart"
    title: str
    axes: Sequence[Axis]
    paths: Sequence[Path]
    summary: str
    """What there is to see, in words."""


@dataclass(frozen=True)
class Histogram:
    """How values are distributed, with a vertical line at ``limit``."""

    kind: ClassVar[str] = "chart"
    title: str
    values: Sequence[float]
    x_label: str
    y_label: str
    limit: float | None = None
    limit_label: str = ""


@dataclass(frozen=True)
class Picture:
    """An image file (PNG, JPEG, WebP or GIF), what it shows in words, and what was asked and said about it."""

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
    """A piece of a text as a model takes it: "learnt", "context", "image" or "cut" off."""

    text: str
    kind: _TokenKind


@dataclass(frozen=True)
class TokenText:
    """A text as tokens, those that are learnt marked one by one."""

    kind: ClassVar[str] = "tokens"
    tokens: Sequence[ReportToken]


@dataclass(frozen=True)
class Links:
    """A list of places to go on to."""

    kind: ClassVar[str] = "links"
    links: Sequence[Link]


@dataclass(frozen=True)
class Card:
    """A frame around what belongs to one thing, pictures first; links of the report lead to ``anchor``."""

    kind: ClassVar[str] = "card"
    title: str
    pieces: Sequence["Piece"]
    pictures: Sequence[Picture] = ()
    facts: str = ""
    """A few words beside the title."""
    anchor: str = ""


Piece = Note | Facts | Table | LineChart | ParallelChart | Histogram | Gallery | TokenText | Links | Card


@dataclass(frozen=True)
class Section:
    """A part of a report under its own heading."""

    title: str
    pieces: Sequence[Piece]
    text: str = ""


@dataclass(frozen=True)
class Report:
    """A page: title, a summary in a sentence or two, the facts that matter most, and sections."""

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
    """Return bars of ``rows`` (name, value, reference), e.g. accuracy by kind beside a baseline.

    ``legend`` says what the reference is; ``percent`` writes values and references as percentages.
    """

    def written(value: float) -> str:
        return f"{value:.1%}" if percent else f"{value:.4g}"

    beside = bool(legend)
    cells: list[list[Cell]] = []
    for name, value, reference in rows:
        bar = Bar(value, written(value), maximum, reference)
        cells.append([name, bar, *([None if reference is None else written(reference)] if beside else [])])
    return Table([*header, *([legend] if beside else [])], cells, title, legend)


def _percent(value: float, maximum: float) -> float:
    # Written so that NaN, which compares as false, draws nothing.
    return 100 * min(value / maximum, 1.0) if maximum > 0 and value > 0 else 0.0
