"""The on-premises cluster for real, over SSH to this machine: up, a job with a quickstart recipe, the app, down."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava_ray.quickstart import easy_vqa
from llava_ray.quickstart.easy_vqa_records import write_conversations
from llava_ray.quickstart.registry_weights import make_language_model, make_vision_tower

ROOT = Path(__file__).parents[2]
NEEDED = ("sshd", "ssh-keygen", "rsync", "unshare", "ip")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

pytestmark = [
    pytest.mark.verify,
    pytest.mark.ray,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(name, path=PATH) for name in NEEDED),
        reason="needs root (for namespaces) and openssh-server, rsync, iproute2",
    ),
]


def test_up_job_serve_down(tmp_path: Path) -> None:
    cache = ROOT / "runs/cache/quickstart"
    data = write_conversations(tmp_path, seed=0)
    job = [
        "python",
        "pipelines/finetune.py",
        "pipelines/recipes/quickstart/tune.toml",
        *("--model.model_name_or_path", str(make_language_model(cache).path)),
        *("--model.vision_tower", str(make_vision_tower(cache).path)),
        *("--data.data_path", str(data), "--data.image_folder", str(easy_vqa.image_folder("train"))),
        *("--data.cache_dir", str(tmp_path / "cache"), "--data.max_samples", "64", "--train.max_steps", "2"),
        *("--run.storage_path", str(tmp_path / "runs"), "--run.name", "job", "--tracking.log_model", "False"),
    ]
    model = tmp_path / "runs/job/model"
    program = [sys.executable, str(ROOT / "tests/ssh_cluster.py"), str(tmp_path), json.dumps(job), str(model)]
    done = subprocess.run(
        ["unshare", "--pid", "--net", "--mount", "--fork", "--mount-proc", *program],
        env={"PATH": PATH, "LANG": os.environ.get("LANG", "C.UTF-8")},
        capture_output=True,
        text=True,
        timeout=1400,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    told = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(told, indent=1))
    assert told["token_is_asked_for"]
    assert (model / "llava.json").exists()
    assert told["answer"]
    assert {"gcs_server", "raylet"} <= set(told["processes_up"])
    assert told["processes_down"] == []
