#!/usr/bin/env python
"""Chat with a LLaVA of any layout in the terminal, or ask it one question.

python pipelines/chat.py MODEL --image photo.jpg --prompt "What is this?" --max_new_tokens 64 --temperature 0 --json
python pipelines/chat.py llava-v1.5-7b-lora --model_base vicuna-7b-v1.5 --vision_tower clip-vit-large-patch14-336
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import tyro

from llava_ray.config.booleans import find_boolean_parameters, strip_boolean_values
from llava_ray.config.chat import ChatSettings
from llava_ray.errors import LlavaRayError
from llava_ray.invocation import command
from pipelines.command import run_command
from pipelines.places import check_models

if TYPE_CHECKING:
    from llava_ray.generate.chat import ChatSession

with contextlib.suppress(ImportError):  # not available on all systems
    import readline  # noqa: F401 - lets input() edit and remember lines

WHEN_STOPPED = "Stopped."
_HELP = "/image FILE shows an image with the next question, /clear begins anew; Ctrl-C stops an answer, Ctrl-D leaves."


def main(arguments: Sequence[str]) -> None:
    """Load the model and answer the prompt, or lines from the terminal until Ctrl-D."""
    settings = tyro.cli(
        ChatSettings,
        args=strip_boolean_values(arguments, find_boolean_parameters(ChatSettings)),
        use_underscores=True,
        prog=command("chat"),
    )
    from llava_ray.images.reading import read_bytes

    check_models({key: getattr(settings, key) for key in ("model", "model_base", "vision_tower")})
    for place in settings.image:
        if "://" not in place:
            read_bytes(place)
    from transformers.utils import logging

    from llava_ray.generate.chat import load_session
    from llava_ray.model.loading import describe_model

    logging.disable_progress_bar()
    session = load_session(settings)
    print(describe_model(session.parts), file=sys.stderr)
    if settings.prompt is None:
        print(_HELP)
        _converse(session)
    else:
        reply = session.ask(settings.prompt)
        print(json.dumps(vars(reply)) if settings.json else reply.text)


def _converse(session: "ChatSession") -> None:
    """Answer lines until the input ends; print errors and continue."""
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            _obey(session, line)
        except LlavaRayError as error:
            print(error, file=sys.stderr)


def _obey(session: "ChatSession", line: str) -> None:
    """Do what a line says."""
    word, _, rest = line.partition(" ")
    if word == "/image" and rest:
        session.show(rest.strip())
    elif word == "/clear":
        session.clear()
    elif line.startswith("/"):
        print(_HELP)
    elif line:
        session.ask(line, on_text=lambda piece: print(piece, end="", flush=True))
        print()


if __name__ == "__main__":
    run_command(main, when_stopped=WHEN_STOPPED)
