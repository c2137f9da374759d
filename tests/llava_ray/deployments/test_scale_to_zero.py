"""clusters/serve/scale_to_zero.yaml for real: no replica, an answer, and no replica again."""

import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml
from commands import free_port
from serving import asking

pytestmark = [pytest.mark.verify, pytest.mark.ray, pytest.mark.timeout(600)]

FILE = Path(__file__).parents[3] / "clusters" / "serve" / "scale_to_zero.yaml"
KEY = "a key of more than sixteen characters"
# The file's own settings, but for what this machine has: no GPU, models that echo, seconds instead of minutes.
HERE = {
    "model": "small@echo,large@echo",
    "engine": "serving:make_engine",
    "num_gpus": 0,
    "num_cpus": 0.1,
    "downscale_delay_s": 4,
    "max_ingress_replicas": 1,
}


@pytest.fixture
def address(ray_cluster: None, tmp_path: Path) -> Iterator[str]:
    from ray import serve

    from llava_ray.deployments import api

    (tmp_path / "keys.toml").write_text(f'[keys.operator]\nkey = "{KEY}"\n')
    (application,) = yaml.safe_load(FILE.read_text())["applications"]
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = application["args"] | HERE | {"api_keys_file": str(tmp_path / "keys.toml")}
    serve.run(api(args), name=application["name"], route_prefix=application["route_prefix"])
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


def replicas() -> dict[str, int]:
    """How many replicas each model has, in whatever state."""
    from ray import serve

    deployments = serve.status().applications["api"].deployments
    return {
        name.removeprefix("model-"): sum(status.replica_states.values())
        for name, status in deployments.items()
        if name.startswith("model-")
    }


def wait_until(expected: dict[str, int], seconds: float) -> float:
    start = time.monotonic()
    while (found := replicas()) != expected:
        assert time.monotonic() - start < seconds, f"{found}, expected {expected}"
        time.sleep(0.2)
    return time.monotonic() - start


def test_models_come_when_asked_and_go_when_not(address: str) -> None:
    asleep = {"small": 0, "large": 0}
    client = openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=120)
    first = wait_until(asleep, 60)
    start = time.monotonic()
    answer = client.chat.completions.create(**{**asking("are you there?"), "model": "small"})
    woken = time.monotonic() - start
    assert answer.choices[0].message.content == "are you there?"
    assert replicas() == {"small": 1, "large": 0}
    again = wait_until(asleep, 60)
    print(f"asleep after {first:.1f} s, answered after {woken:.1f} s, asleep again after {again:.1f} s")
