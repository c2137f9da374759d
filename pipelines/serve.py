#!/usr/bin/env python
"""Serve models on this machine or a Ray cluster: OpenAI's API and a chat page on http://127.0.0.1:8000.

python pipelines/serve.py model=runs/quickstart/model page_examples=runs/quickstart/examples.json
python pipelines/serve.py api model=a@MODEL,b@MODEL api_keys_file=keys.toml --name api --route_prefix /
python pipelines/serve.py clusters/serve/laptop.yaml          # a config file of Ray Serve

The first word may be app (API and page, the default), api or page. It serves until Ctrl-C or SIGTERM; answers that are
being written then are cut.
"""

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from llava_ray.deployments.settings import ServeSettings, spell_key
from llava_ray.errors import ConfigError
from llava_ray.invocation import as_started, command
from llava_ray.reading import short_repr
from pipelines.command import run_command, stop
from pipelines.places import check_files, check_models

WHEN_STOPPED = "Stopped."

_BUILDERS = ("app", "api", "page")
_CONFIG_FILES = (".yaml", ".yml")
_OWN_ENGINES = ("builtin", "vllm")  # others may take models from anywhere
# Options of `serve run` that people need; its help lists more.
_OPTIONS = {
    "address": "Ray cluster to serve on, auto for the one here; default: RAY_ADDRESS, or a new local one",
    "name": "name of the application",
    "route_prefix": "path under which it answers",
    "working_dir": "folder that the cluster's nodes get a copy of",
}


def main(arguments: Sequence[str]) -> None:
    """Check what is asked for, then have Ray Serve run it."""
    run_serve(read_command_line(arguments))


def read_command_line(arguments: Sequence[str]) -> list[str]:
    """Return the arguments for ``serve run``. Raises ConfigError for what cannot be served; ``--help`` exits."""
    parser = _make_parser()
    options, unknown = parser.parse_known_args(list(arguments))
    if unknown:
        raise ConfigError(
            f"{unknown[0].partition('=')[0]} is no option of {command('serve')}; settings are written without dashes, "
            "as key=value"
        )
    given = [f"--{name.replace('_', '-')}={value}" for name in _OPTIONS if (value := getattr(options, name))]
    words = list(options.words)
    if words and words[0].endswith(_CONFIG_FILES):
        check_files({"the config file": words[0]})
        if len(words) > 1:
            raise ConfigError(f"{words[1]}: settings stand in the config file {words[0]}; write it there")
        return [*given, "--", *words]
    builder = words.pop(0) if words and words[0] in _BUILDERS else _BUILDERS[0]
    _check_settings(words)
    return [*given, "--", f"llava_ray.deployments:{builder}", *words]


def _check_settings(words: Sequence[str]) -> None:
    """Raise ConfigError for settings that the application would refuse, before Ray is started."""
    values: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not value:
            hint = f"; did you mean model={word}?" if not equals and Path(word).exists() else ""
            raise ConfigError(f"{short_repr(word)}: expected key=value{hint}")
        if key in values:
            raise ConfigError(f"{key} is given twice; several values stand in one, with commas")
        values[key] = value
    without_model = not {"model", "models"} & values.keys()
    settings = ServeSettings.parsed({"model": "MODEL"} | values if without_model else values)  # unknown keys come first
    if without_model:
        raise ConfigError(f"{command('serve')} needs a model: model=PATH, or the path of a config file (.yaml)")
    if settings.engine in _OWN_ENGINES:
        for source in settings.sources:
            named = {"model": source.path} | {f"adapter {name}": path for name, path in source.adapters}
            check_models({key: path.partition("?")[0] for key, path in named.items()})
    check_files({"page_examples": settings.page_examples, "api_keys_file": settings.api_keys_file})


def run_serve(arguments: Sequence[str]) -> None:
    """Run Serve's own command in this process, until it ends. Raises ConfigError for what it refuses."""
    import click
    from ray._private import worker
    from ray.serve.scripts import cli

    if not any(argument.startswith("--address=") for argument in arguments):
        # Serve would join whatever cluster it finds on this machine: another run's, or one that is ending.
        os.environ.setdefault("RAY_ADDRESS", "local")
    worker._post_init_hooks.append(_handle_sigterm)  # Ray's start replaces the handler by one that ends the process
    try:
        cli.main(["run", *arguments], prog_name="serve", standalone_mode=False)
    except click.ClickException as error:
        raise ConfigError(f"serve run: {error.format_message()}") from error
    except click.Abort:  # its word for Ctrl-C while things are being started
        raise KeyboardInterrupt from None
    finally:
        worker._post_init_hooks.remove(_handle_sigterm)


def _handle_sigterm() -> None:
    """Handle SIGTERM as Serve does Ctrl-C: it ends its processes."""
    signal.signal(signal.SIGTERM, stop)


def _make_parser() -> argparse.ArgumentParser:
    """Return the parser, whose help lists every setting."""
    parser = argparse.ArgumentParser(
        prog=command("serve"),
        usage=f"{command('serve')} [app|api|page] KEY=VALUE … | FILE.yaml [options]",
        description=as_started(str(__doc__)),
        epilog=_describe_settings(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    for name, text in _OPTIONS.items():
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, help=text, metavar="TEXT")
    return parser


def _describe_settings() -> str:
    """Return each setting with its default and description."""
    lines = ["settings:"]
    for name, field in ServeSettings.model_fields.items():
        default = "" if field.is_required() else f" (default: {field.default})"
        lines += [
            f"  {spell_key(name, field)}{default}",
            *(f"      {line}" for line in str(field.description).splitlines()),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, when_stopped=WHEN_STOPPED)
