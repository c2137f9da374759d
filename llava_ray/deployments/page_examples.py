"""Two questions to begin with, and their pictures, drawn here: nobody's property, and small."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from gradio.components.chatbot import ExampleMessage

SIDE = 384


def draw_examples(folder: Path | None = None) -> list[ExampleMessage]:
    """Write the pictures to ``folder`` and return the questions as the chatbot takes them."""
    place = folder or Path(mkdtemp(prefix="llava_ray_examples_"))
    shapes, chart = place / "shapes.png", place / "chart.png"
    draw_shapes().save(shapes)
    draw_chart().save(chart)
    return [
        {"text": "What shape is in this image, and what colour is it?", "files": [str(shapes)], "icon": str(shapes)},
        {"text": "Which bar of this chart is the highest?", "files": [str(chart)], "icon": str(chart)},
    ]


def draw_shapes() -> Image.Image:
    """A blue circle on a light ground."""
    image = Image.new("RGB", (SIDE, SIDE), (236, 229, 216))
    ImageDraw.Draw(image).ellipse((110, 90, 280, 260), fill=(38, 84, 188))
    return image


def draw_chart() -> Image.Image:
    """Four bars."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    for index, (height, colour) in enumerate(((120, "#4477aa"), (250, "#ee6677"), (180, "#228833"), (90, "#ccbb44"))):
        left = 50 + 78 * index
        draw.rectangle((left, 330 - height, left + 52, 330), fill=colour)
    draw.line((36, 330, 350, 330), fill="black", width=3)
    return image
