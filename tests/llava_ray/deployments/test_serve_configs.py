"""The shipped Serve files: each is valid for Serve, and each of its applications can be built."""

import contextlib
import importlib
from pathlib import Path

import pytest
import yaml

from llava_ray.deployments import message_sizes
from llava_ray.deployments.settings import ServeSettings
from llava_ray.errors import ConfigError

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
        # Both ends of each call, in whichever application, are told how large a message may be.
        models = [one for one in bound._bound_deployment.init_args if isinstance(one, dict)]
        for deployment in (options, *(model._bound_deployment for found in models for model in found.values())):
            variables = deployment.ray_actor_options["runtime_env"]["env_vars"]
            assert variables[message_sizes.GRPC_SIZE_VARIABLE] == str(message_sizes.MAX_MESSAGE_BYTES)


def test_there_are_files() -> None:
    assert [file.stem for file in FILES] == ["autoscaled", "laptop", "scale_to_zero"]


@pytest.mark.parametrize(
    ("num_bytes", "error"),
    [
        (128 * 2**20, None),
        (2**30, None),
        (2**30 + 1, "max_body_bytes = 1,073,741,825: .* 1,073,741,824 .*lower max_body_bytes"),
    ],
)
def test_a_body_that_no_message_can_hold_is_refused_at_start(num_bytes: int, error: str | None) -> None:
    settings = ServeSettings.parsed({"model": "echo", "max_body_bytes": num_bytes})
    with pytest.raises(ConfigError, match=error) if error else contextlib.nullcontext():
        message_sizes.check_sizes(settings)


def test_a_process_without_our_limit_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Serve file's ray_actor_options replace the application's own."""
    monkeypatch.setenv(message_sizes.GRPC_SIZE_VARIABLE, str(message_sizes.MAX_MESSAGE_BYTES))
    message_sizes.check_environment("model-echo")
    monkeypatch.delenv(message_sizes.GRPC_SIZE_VARIABLE)
    with pytest.raises(ConfigError, match=r"'model-echo': RAY_SERVE_\w+ is None .* give num_cpus, num_gpus"):
        message_sizes.check_environment("model-echo")
