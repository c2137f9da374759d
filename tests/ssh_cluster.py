"""The on-premises file for real: ray up over SSH, a job, the service, ray down. Prints what happened, as JSON.

Run by tests/clusters/test_ssh_cluster.py as root in namespaces of its own, for three reasons: ``ray up`` and ``ray
down`` call ``ray stop``, which ends every Ray it sees; ports 22, 6379, 8000 and 8265 are free there; and /etc/passwd
can give root another home, so that nothing of the real one is touched.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DASHBOARD, SERVICE = "http://127.0.0.1:8265", "http://127.0.0.1:8000"
QUESTION = {"messages": [{"role": "user", "content": "Is there a circle?"}], "max_tokens": 4, "temperature": 0}


def main(folder: Path, job: list[str], model: Path) -> None:
    """Go through a cluster's life."""
    home = make_home(folder)
    os.environ |= {
        "HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "PATH": f"{Path(sys.prefix, 'bin')}:{os.environ['PATH']}",
    }
    cluster = folder / "laptop.yaml"
    cluster.write_text((ROOT / "clusters/laptop.yaml").read_text().replace("ssh_user: ubuntu", "ssh_user: root"))
    run("ray", "get-auth-token", "--generate")
    told: dict[str, object] = {}
    with ssh_server(folder, home):
        told["up_s"] = run("ray", "up", "--yes", str(cluster))
        told["token_is_asked_for"] = not answers_without_token()
        told["job_s"] = run("ray", "job", "submit", "--address", DASHBOARD, "--working-dir", ".", "--", *job)
        told["serve_s"] = run("serve", "deploy", "--address", DASHBOARD, str(service_file(folder, model)))
        told["answer"], told["answer_s"] = ask(600)
        told["processes_up"] = ray_processes()
        told["down_s"] = run("ray", "down", "--yes", str(cluster))
    told["processes_down"] = ray_processes()
    print(json.dumps(told))


def make_home(folder: Path) -> Path:
    """Give root a home of its own: a key that may log in, and the environment of these tests instead of a new one."""
    run("ip", "link", "set", "lo", "up")
    home = folder / "home"
    for name in (".ssh", "llava_ray"):
        (home / name).mkdir(parents=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / ".ssh/id_ed25519"))
    shutil.copy(home / ".ssh/id_ed25519.pub", home / ".ssh/authorized_keys")
    (home / "llava_ray/.venv").symlink_to(sys.prefix)
    (home / ".bashrc").write_text(
        f"export PYTHONPATH={ROOT} OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0\n"
    )
    passwd = folder / "passwd"
    lines = Path("/etc/passwd").read_text().splitlines()
    passwd.write_text(
        "\n".join(f"root:x:0:0:root:{home}:/bin/bash" if x.startswith("root:") else x for x in lines) + "\n"
    )
    (folder / "ray").mkdir()
    Path("/tmp/ray").mkdir(exist_ok=True)
    for own, place in ((passwd, "/etc/passwd"), (folder / "ray", "/tmp/ray")):
        run("mount", "--bind", str(own), place)
    return home


@contextlib.contextmanager
def ssh_server(folder: Path, home: Path) -> Iterator[None]:
    """Debian's sshd on 127.0.0.1, with a key of its own."""
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
    Path("/run/sshd").mkdir(exist_ok=True)
    options = ["ListenAddress=127.0.0.1", "UsePAM=no", "StrictModes=no", "PidFile=none", "PermitRootLogin=yes"]
    flags = [flag for option in options for flag in ("-o", option)]
    keys = ["-h", str(folder / "host_key"), "-o", f"AuthorizedKeysFile={home}/.ssh/authorized_keys"]
    with (folder / "sshd.log").open("wb") as log:
        server = subprocess.Popen(["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *flags, *keys], stderr=log)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def run(*command: str) -> float:
    """Run in the repository's root, as the README says; return the seconds. Raises CalledProcessError."""
    began = time.monotonic()
    print("$", " ".join(command), file=sys.stderr, flush=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    return round(time.monotonic() - began, 1)


def answers_without_token() -> bool:
    """Return whether the dashboard tells a stranger about its jobs."""
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{DASHBOARD}/api/jobs/", timeout=30):
        return True
    return False


def service_file(folder: Path, model: Path) -> Path:
    """clusters/serve/laptop.yaml with another model."""
    text = (ROOT / "clusters/serve/laptop.yaml").read_text()
    path = folder / "serve.yaml"
    path.write_text(text.replace("model: runs/quickstart/model", f"model: {model}"))
    return path


def ask(patience_s: float) -> tuple[str, float]:
    """Ask until there is an answer; return it and the seconds that it took."""
    began = time.monotonic()
    while True:
        with contextlib.suppress(OSError):  # not there yet; HTTPError and URLError are OSErrors
            with urllib.request.urlopen(f"{SERVICE}/v1/models", timeout=30) as response:
                name = json.load(response)["data"][0]["id"]
            body = json.dumps({"model": name, **QUESTION}).encode()
            asked = urllib.request.Request(f"{SERVICE}/v1/chat/completions", body, {"content-type": "application/json"})
            with urllib.request.urlopen(asked, timeout=60) as response:
                said: str = json.load(response)["choices"][0]["message"]["content"]
            return said, round(time.monotonic() - began, 1)
        if time.monotonic() - began > patience_s:
            raise TimeoutError(f"no answer from {SERVICE} in {patience_s:g} s")
        time.sleep(1)


def ray_processes() -> list[str]:
    """Return the names of Ray's processes; there are no others than this cluster's in the namespace."""
    names = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            for name in ("gcs_server", "raylet", "ray::", "dashboard.py"):
                if name in command.split(" -")[0]:
                    names.append(name)
    return sorted(names)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
