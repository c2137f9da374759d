"""Workers forked from one process: who may fork, what a fork takes over, and what happens without a server."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from llava_ray import fork_server, forked_worker, worker_forks
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.recipes import load_recipe
from llava_ray.worker_forks import can_fork, import_environment, starts_here

RECIPE = Path(__file__).parents[2] / "pipelines/recipes/quickstart/words.toml"


@pytest.fixture
def config() -> FinetuneConfig:
    """A run's settings."""
    return load_recipe(FinetuneConfig, [str(RECIPE)])


@pytest.mark.parametrize(
    ("address", "variables", "expected"),
    [
        (None, {}, True),
        ("auto", {}, False),
        (None, {"RAY_ADDRESS": "127.0.0.1:6379"}, False),
        (None, {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, False),  # inside a job, which Ray has told its cluster
    ],
)
def test_only_a_cluster_that_the_command_starts_itself_has_forked_workers(monkeypatch, address, variables, expected):
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert starts_here(address) is expected


def test_a_gpu_or_the_switch_keeps_workers_from_being_forked(monkeypatch, tmp_path):
    monkeypatch.setattr(worker_forks, "_GPU_DRIVERS", (str(tmp_path / "none"),))
    assert can_fork()
    monkeypatch.setenv(worker_forks.SWITCH, "0")
    assert not can_fork()
    monkeypatch.delenv(worker_forks.SWITCH)
    monkeypatch.setattr(worker_forks, "_GPU_DRIVERS", (str(tmp_path),))
    assert not can_fork()


def test_a_process_that_has_imported_torch_already_is_left_alone(monkeypatch, config):
    monkeypatch.setitem(sys.modules, "torch", sys.modules.get("torch") or os)
    before = dict(os.environ)
    worker_forks.prepare_forks(config)
    assert os.environ == before
    assert not worker_forks._forks.prepared


def test_the_compiler_is_left_out_but_where_weights_are_quantised(config):
    assert import_environment(config) == {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
    assert import_environment(config, use_gpu=True) == {"TORCHDYNAMO_DISABLE": "1"}
    quantised = config.replaced({"lora.lora_enable": True, "lora.bits": 4})
    assert import_environment(quantised) == {"DS_ACCELERATOR": "cpu"}


def test_without_a_server_a_worker_is_asked_for_in_vain(tmp_path):
    assert not forked_worker.ask_for_worker(str(tmp_path / "nobody"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "gone"))
    assert not forked_worker.ask_for_worker(str(tmp_path / "gone"))


def test_the_script_of_a_worker_imports_nothing_slow():
    code = f"import runpy, sys; runpy.run_path({str(worker_forks.WORKER_SCRIPT)!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"ray", "llava_ray", "pathlib", "subprocess", "asyncio"} & set(loaded.split())


# A server that says of each worker what it has taken over, instead of becoming Ray's.
SERVER = """
import json, os, signal, socket, sys
from llava_ray import fork_server

def become_worker(request, files):
    fork_server.take_over(request, files)
    said = {"marker": os.environ.get("MARKER"), "folder": os.getcwd(), "arguments": request["arguments"],
            "leads": os.getpgrp() == os.getpid(), "loaded": "decimal" in sys.modules,
            "blocked": signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []),
            "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler}
    print(json.dumps(said), flush=True)
    os._exit(0)

fork_server.become_worker = become_worker
fork_server.keep_random_ids_apart()
listener, owner = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
fork_server.serve(listener, owner, ["decimal", "no.such"])
"""


@pytest.mark.slow
def test_a_fork_takes_over_what_the_process_had_that_asked_and_ends_with_the_owner(tmp_path):
    address = str(tmp_path / "forks")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(address)
    listener.listen(4)
    ours, theirs = socket.socketpair()
    files = (listener.fileno(), theirs.fileno())
    server = subprocess.Popen([sys.executable, "-c", SERVER, *map(str, files)], pass_fds=files)
    listener.close()
    theirs.close()
    asking = subprocess.Popen(
        [sys.executable, str(worker_forks.WORKER_SCRIPT), "--node-id=7"],
        cwd=tmp_path,
        env=os.environ | {forked_worker.SERVER_VARIABLE: address, "MARKER": "here"},
        stdout=subprocess.PIPE,
        process_group=0,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]),
    )
    said = json.loads(asking.communicate(timeout=60)[0])
    assert said == {
        "marker": "here",
        "folder": str(Path(tmp_path).resolve()),
        "arguments": ["--node-id=7"],
        "leads": True,
        "loaded": True,
        "blocked": True,
        "interrupt": True,
    }
    ours.close()
    assert server.wait(timeout=10) == 0


@pytest.mark.slow
def test_forks_draw_different_ids_of_rays_unless_one_was_drawn_before():
    code = "from llava_ray.fork_server import *; {}; import ray.data; print(draws_apart())"
    for line, expected in (("keep_random_ids_apart()", "True"), ("pass", "False")):
        command = [sys.executable, "-c", code.format(line)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [expected]


def test_a_torn_request_forks_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fork_server.os, "fork", lambda: pytest.fail("forked"))
    address = str(tmp_path / "forks")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen(1)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(address)
            socket.send_fds(client, [(100).to_bytes(8, "big")], [0, 1, 2])
            client.sendall(b'{"argum')
        fork_server.fork_for_request(listener, listener)
