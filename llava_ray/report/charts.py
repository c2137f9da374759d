"""Line charts and histograms as SVG with the colours and fonts of the surrounding page.

Each is drawn twice, for wide and narrow pages, because shrunk text is illegible. Matplotlib is used without pyplot, so
no global state changes.
"""

import hashlib
import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava_ray.errors import ConfigError
from llava_ray.report.pieces import Histogram, LineChart, ParallelChart

Chart = LineChart | ParallelChart | Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTHS = {"wide": 720, "narrow": 340}  # CSS pixels
_HEIGHT = 260
_POINTS_PER_INCH = 72  # of an SVG file: one unit of the drawing is one pixel of the page
_MAX_BINS = 40

# Placeholder colours, replaced by the page's CSS variables, light or dark.
_SERIES = [f"#0{i}fe0{i}" for i in range(1, 6)]
_INK, _MUTED, _LINE = "#06fe06", "#07fe07", "#08fe08"
_PAGE_COLOURS = {colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, start=1)} | {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _LINE: "var(--line)",
}

SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "llava_ray",  # reproducible output
    "text.parse_math": False,  # a dollar sign is no mathematics
    "font.size": 12,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelpad": 8,
    "axes.xmargin": 0.01,
    "grid.color": _LINE,
    "grid.linewidth": 1,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "path.simplify": True,
    "path.simplify_threshold": 0.5,
}


def check_plotting() -> None:
    """Check that matplotlib is installed, before hours of work that end in a report. Raises ConfigError."""
    try:
        import matplotlib  # noqa: F401  (only whether it is installed)
    except ImportError as error:
        raise ConfigError(
            "reports with charts need matplotlib, which is not installed; pip install 'llava_ray[report]'"
        ) from error


def draw_chart(chart: Chart, width: int) -> str:
    """Draw a chart as an SVG element ``width`` pixels wide, without a fixed size. Raises ConfigError."""
    check_plotting()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(width / _POINTS_PER_INCH, _HEIGHT / _POINTS_PER_INCH), facecolor="none")
        figure.set_layout_engine("tight", pad=0.2)
        axes = figure.add_subplot(facecolor="none")
        if isinstance(chart, ParallelChart):
            _draw_parallel(axes, chart, width)
        else:
            if isinstance(chart, LineChart):
                _draw_lines(axes, chart)
            else:
                _draw_histogram(axes, chart, width)
            axes.set_xlabel(_drawable(chart.x_label), loc="right")
            axes.locator_params(axis="x", nbins=4 if width < WIDTHS["wide"] else 8)
        sink = io.StringIO()
        figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return _inline_svg(sink.getvalue())


def _colour_of(index: int) -> str:
    """Return the CSS colour of a line."""
    return _PAGE_COLOURS[_SERIES[index % len(_SERIES)]]


def list_lines(chart: LineChart | ParallelChart) -> list[tuple[str, str]]:
    """Return name and colour of each line of the legend; faint lines share the entry of their colour."""
    lines = chart.paths if isinstance(chart, ParallelChart) else chart.series
    names = list(dict.fromkeys(line.name for line in lines))
    return [(name, _colour_of(index)) for index, name in enumerate(names)]


def describe_chart(chart: Chart) -> str:
    """Describe a chart in words, for screen readers."""
    if isinstance(chart, ParallelChart):
        return f"{chart.title}: {', '.join(axis.name for axis in chart.axes)}. {chart.summary}"
    if isinstance(chart, LineChart):
        lines = [_describe_line(series.name, series.y) for series in chart.series if not series.faint and len(series.y)]
        return f"{chart.title}: {chart.y_label} by {chart.x_label}. " + " ".join(lines)
    values = sorted(chart.values)
    if not values:
        return f"{chart.title}: no values."
    middle = values[len(values) // 2]
    limit = "" if chart.limit is None else f" {chart.limit_label or 'limit'}: {chart.limit:g}."
    return (
        f"{chart.title}: {len(values)} {chart.y_label} by {chart.x_label}, from {values[0]:g} to {values[-1]:g}, "
        f"median {middle:g}.{limit}"
    )


def _drawable(text: str) -> str:
    """Replace lone surrogates, for which matplotlib's fonts raise TypeError."""
    return text.encode(errors="replace").decode()


def _describe_line(name: str, values: Sequence[float]) -> str:
    known = [value for value in values if math.isfinite(value)]
    return f"{name}: from {known[0]:.4g} to {known[-1]:.4g}." if known else f"{name}: no values."


def _draw_lines(axes: "Axes", chart: LineChart) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    names = list(dict.fromkeys(series.name for series in chart.series))
    for series in chart.series:
        colour = _SERIES[names.index(series.name) % len(_SERIES)]
        style = {"alpha": 0.28, "linewidth": 1.2, "zorder": 1} if series.faint else {"zorder": 2}
        dot = len(series.y) == 1 and not series.ends_early
        axes.plot(series.x, series.y, color=colour, marker="o" if dot else None, **style)
        if series.ends_early:
            axes.plot(series.x[-1:], series.y[-1:], color=colour, marker="x", markersize=7, markeredgewidth=2)
    if chart.log_y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        plain = FuncFormatter(lambda value, _: f"{value:g}")  # without mathematical markup
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
    axes.set_title(_drawable(chart.y_label), loc="left", color=_MUTED, fontsize=12)


def _draw_parallel(axes: "Axes", chart: ParallelChart, width: int) -> None:
    names = list(dict.fromkeys(path.name for path in chart.paths))
    for path in chart.paths:
        style = {"alpha": 0.35, "linewidth": 1.2, "zorder": 1} if path.faint else {"zorder": 2}
        known = [(x, height) for x, height in enumerate(path.heights) if height is not None]
        axes.plot(*zip(*known, strict=True), color=_SERIES[names.index(path.name) % len(_SERIES)], **style)
    size = 12 if width >= WIDTHS["wide"] else 10
    for x, axis in enumerate(chart.axes):
        axes.axvline(x, color=_LINE, linewidth=1, zorder=0)
        last = x == len(chart.axes) - 1
        for height, label in axis.ticks:
            axes.annotate(
                _drawable(label),
                (x, height),
                xytext=(-5 if last else 5, -3 if height == 1 else 3),
                textcoords="offset points",
                ha="right" if last else "left",
                va="top" if height == 1 else "bottom",
                color=_MUTED,
                fontsize=size - 1,
                zorder=3,
            )
        place = "left" if x == 0 else "right" if last else "center"
        # On a narrow page neighbouring names would overlap on one line.
        above = 1.06 if width >= WIDTHS["wide"] or x % 2 == 0 else 1.14
        axes.text(x, above, _drawable(axis.name), ha=place, va="bottom", color=_INK, fontsize=size)
    axes.set_xlim(-0.02, len(chart.axes) - 1 + 0.02)
    axes.set_ylim(-0.05, 1.05)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)


def _draw_histogram(axes: "Axes", chart: Histogram, width: int) -> None:
    from matplotlib.ticker import MaxNLocator

    values = [value for value in chart.values if math.isfinite(value)]
    most = _MAX_BINS if width >= WIDTHS["wide"] else _MAX_BINS // 2
    num_bins = min(most, len(set(values)), 1 + 2 * math.isqrt(len(values)))
    if values:
        axes.hist(values, bins=num_bins, color=_SERIES[0], rwidth=0.92)
    if chart.limit is not None:
        axes.axvline(chart.limit, color=_SERIES[1], linewidth=1.5)
        near_the_end = chart.limit > sum(axes.get_xlim()) / 2
        axes.annotate(
            _drawable(chart.limit_label),
            (chart.limit, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-6 if near_the_end else 6, -4),
            textcoords="offset points",
            ha="right" if near_the_end else "left",
            va="top",
            color=_SERIES[1],
        )
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(_drawable(chart.y_label), loc="left", color=_MUTED, fontsize=12)


def _inline_svg(document: str) -> str:
    """Extract the SVG element from its file, with the page's colours and unique ids."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', svg)
    unique = hashlib.sha256(svg.encode()).hexdigest()[:8]
    svg = re.sub(r'\bid="', f'id="c{unique}-', svg)
    svg = re.sub(r'xlink:href="#', f'href="#c{unique}-', svg)
    svg = svg.replace("url(#", f"url(#c{unique}-")
    for drawn, replacement in _PAGE_COLOURS.items():
        svg = svg.replace(drawn, replacement)
    return svg
