"""The serve command: what it hands to Serve's own, and what it refuses before Ray is imported."""

import contextlib
import os
import sys
import time
from pathlib import Path

import openai
import psutil
import pytest
from commands import free_port, running
from serving import asking

from llava_ray.errors import ConfigError
from pipelines import serve
from pipelines.serve import main, read_command_line


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "lora").mkdir()
    (tmp_path / "serve.yaml").write_text("applications: []\n")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "handed_on"),
    [
        ("model=model", "-- llava_ray.deployments:app model=model"),
        ("app model=a@model,b@model", "-- llava_ray.deployments:app model=a@model,b@model"),
        ("api models=model adapters=lora", "-- llava_ray.deployments:api models=model adapters=lora"),
        ("page model=llava-hf/llava-1.5-7b-hf api_app=b", None),
        (
            "model=model --route_prefix /b --name=b --address auto",
            "--address=auto --name=b --route-prefix=/b -- llava_ray.deployments:app model=model",
        ),
        ("--route-prefix /b model=model", "--route-prefix=/b -- llava_ray.deployments:app model=model"),
        ("serve.yaml --address auto", "--address=auto -- serve.yaml"),
        (
            "model=elsewhere/x@y engine=module:function",
            "-- llava_ray.deployments:app model=elsewhere/x@y engine=module:function",
        ),
    ],
)
def test_serve_is_given_what_was_asked_for(line: str, handed_on: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (handed_on or "-- llava_ray.deployments:page model=llava-hf/llava-1.5-7b-hf api_app=b").split()
    assert read_command_line(line.split()) == expected
    calls: list[list[str]] = []
    monkeypatch.setattr(serve, "run_serve", calls.append)
    main(line.split())
    assert calls == [expected]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "llava-ray serve needs a model: model=PATH"),
        ("max_num_seqs=4", "llava-ray serve needs a model"),
        ("modle=model", "unknown key 'modle'; did you mean 'model'"),
        ("model", "'model': expected key=value; did you mean model=model?"),
        ("model=", "'model=': expected key=value"),
        ("model=model model=lora", "model is given twice"),
        ("--model model", "--model is no option of llava-ray serve; settings are written without dashes"),
        ("model=model max_num_seqs=0", "'max_num_seqs' = '0'"),
        ("model=./modle", "model = './modle': nothing is there; did you mean"),
        ("model=model adapters=./lorra", "adapter lorra = './lorra': nothing is there; did you mean"),
        ("model=model page_examples=x.json", "page_examples = 'x.json': nothing is there"),
        ("model=model api_keys_file=k.toml", "api_keys_file = 'k.toml': nothing is there"),
        ("sreve.yaml", "the config file = 'sreve.yaml': nothing is there; did you mean"),
        ("serve.yaml max_num_seqs=4", "max_num_seqs=4: settings stand in the config file serve.yaml"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_line(line: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAVA_RAY_STARTED_AS", raising=False)
    with pytest.raises(ConfigError) as caught:
        read_command_line(line.split())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "found", "expected"),
    [
        (["model=model"], None, "local"),
        (["model=model"], "ray://head:10001", "ray://head:10001"),
        (["--address=auto", "model=model"], None, None),
    ],
)
def test_a_cluster_that_happens_to_run_here_is_not_joined(
    line: list[str], found: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.serve import scripts

    monkeypatch.setenv("RAY_ADDRESS", "to be restored")
    monkeypatch.delenv("RAY_ADDRESS")
    if found:
        monkeypatch.setenv("RAY_ADDRESS", found)
    seen: list[str | None] = []
    monkeypatch.setattr(scripts.cli, "main", lambda *_, **__: seen.append(os.environ.get("RAY_ADDRESS")))
    serve.run_serve(line)
    assert seen == [expected]


@pytest.mark.slow
def test_serve_understands_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import click
    from ray.serve import scripts

    given = read_command_line(["api", "model=model", "--name", "b", "--route_prefix", "/b"])
    context = scripts.run.make_context("run", list(given))
    assert context.params["config_or_import_path"] == "llava_ray.deployments:api"
    assert context.params["arguments"] == ("model=model",)
    assert (context.params["name"], context.params["route_prefix"]) == ("b", "/b")

    def refuse(*_: object, **__: object) -> None:
        raise click.ClickException("no such cluster")

    monkeypatch.setattr(scripts.run, "callback", refuse)
    with pytest.raises(ConfigError, match="serve run: no such cluster"):
        serve.run_serve(given)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(scripts.run, "callback", interrupt)
    with pytest.raises(KeyboardInterrupt):
        serve.run_serve(given)


SERVICE = """
http_options: {{host: 127.0.0.1, port: {port}}}
applications:
  - import_path: llava_ray.deployments:api
    args: {{model: "echo@echo?token_s=0.1", engine: "serving:make_engine", num_cpus: 0.1}}
"""


@pytest.mark.ray
def test_sigterm_ends_the_service_and_its_processes(folder: Path) -> None:
    port, log = free_port(), folder / "log"
    (folder / "service.yaml").write_text(SERVICE.format(port=port))
    command = [sys.executable, "-m", "llava_ray", "serve", "service.yaml"]
    with running(command, log, PYTHONPATH=str(Path(__file__).parents[1])) as process:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        for _ in range(600):
            with contextlib.suppress(openai.OpenAIError):
                client.models.list()
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        assert client.chat.completions.create(**asking("a b")).choices[0].finish_reason == "stop"
        processes = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(60) == 0
    assert "SIGTERM received" not in log.read_text()  # with which Ray begins a page of addresses
    assert "Traceback" not in log.read_text()
    assert psutil.wait_procs(processes, timeout=20)[1] == []
