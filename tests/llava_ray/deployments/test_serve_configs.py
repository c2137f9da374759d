"""The shipped Serve files: each is valid for Serve, and each of its applications can be built."""

import importlib
from pathlib import Path

import pytest
import yaml

FILES = sorted((Path(__file__).parents[3] / "clusters" / "serve").glob("*.yaml"))
KEYS = '[keys.operator]\nkey = "a key of more than sixteen characters"\n'


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_serve_file_builds(file: Path, tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    (tmp_path / "keys.toml").write_text(KEYS)
    text = file.read_text().replace("/etc/llava_ray/keys.toml", str(tmp_path / "keys.toml"))
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    for application in config.applications:
        module, _, name = application.import_path.partition(":")
        builder = getattr(importlib.import_module(module), name)
        bound = builder(application.args)
        options = bound._bound_deployment
        assert options.name == ("page" if name == "page" else "api")
        assert options.max_ongoing_requests > 1000


def test_there_are_files() -> None:
    assert [file.stem for file in FILES] == ["autoscaled", "laptop", "scale_to_zero"]
