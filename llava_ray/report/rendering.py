"""Rendering of a report as one self-contained HTML file, without external scripts, fonts, styles or images."""

import base64
import math
import uuid
from functools import cache
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from llava_ray.errors import ConfigError
from llava_ray.report.charts import WIDTHS, Chart, describe_chart, draw_chart, list_lines
from llava_ray.report.pieces import Bar, LineChart, Link, ParallelChart, Report

# The first bytes of the formats that browsers draw.
_MEDIA_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


def write_report(path: str | Path, report: Report) -> Path:
    """Write a report to a file, atomically, and return its path. Raises ConfigError."""
    target = Path(path)
    page = render_report(report)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_text(page, encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the report cannot be written to {target}: {error.strerror}; choose a folder that can be written"
        ) from error
    return target


def render_report(report: Report) -> str:
    """Render a report as HTML, with lone surrogates replaced so that it can be encoded.

    Raises ConfigError for a chart without matplotlib, an unsafe link, or a picture in an unsupported format.
    """
    return _template().render(report=report).encode(errors="replace").decode()


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "number": _number,
        "data_uri": _data_uri,
        "drawings": _drawings,
        "described": describe_chart,
        "target": _target,
        "anchor": _anchor,
    }
    environment.tests |= {"line_chart": _is_line_chart, "link": _is_link, "bar": _is_bar}
    environment.globals["list_lines"] = list_lines
    return environment.from_string((files(__package__) / "template.html").read_text(encoding="utf-8"))


def _is_line_chart(piece: object) -> bool:
    return isinstance(piece, LineChart | ParallelChart)


def _is_link(cell: object) -> bool:
    return isinstance(cell, Link)


def _is_bar(cell: object) -> bool:
    return isinstance(cell, Bar)


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if math.isfinite(value) else "–"


def _data_uri(content: bytes) -> str:
    kind = next((kind for start, kind in _MEDIA_TYPES.items() if content.startswith(start)), None)
    if kind is None:
        raise ConfigError(f"a report's picture begins {content[:8]!r}; expected PNG, JPEG, WebP or GIF: convert it")
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _drawings(chart: Chart) -> list[tuple[str, Markup]]:
    # Markup: matplotlib has escaped its text.
    return [(name, Markup(draw_chart(chart, width))) for name, width in WIDTHS.items()]


def _target(link: Link) -> str:
    scheme = urlsplit(link.target.strip()).scheme
    if scheme not in ("", "http", "https"):
        raise ConfigError(f"link {link.text!r} leads to {link.target!r}; expected #anchor, a path or an http(s) URL")
    return link.target.strip()


def _anchor(title: str) -> str:
    return "-".join("".join(char if char.isalnum() else " " for char in title.lower()).split())
