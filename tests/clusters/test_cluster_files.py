"""Every shipped cluster file: valid for Ray, KubeRay or Serve, installs the constraints, fits its recipes."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llava_ray.config.cluster_files import find_misfits, read_cluster_file
from llava_ray.config.evaluate import EvaluateConfig
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.improve import ImproveConfig
from llava_ray.config.preferences import PreferencesConfig
from llava_ray.config.recipes import load_recipe, load_settings
from llava_ray.config.sweep_recipes import load_sweep
from llava_ray.errors import ConfigError

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "clusters"
LAUNCHER = sorted(CLUSTERS.glob("*.yaml"))
KUBERAY = sorted((CLUSTERS / "kuberay").glob("ray*.yaml"))
# A review takes its calls to a judge, whatever the cluster.
RECIPES = sorted(path for path in (ROOT / "pipelines/recipes").glob("*/*.toml") if path.parent.name != "review")


def stem(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_there_are_files() -> None:
    assert [path.stem for path in LAUNCHER] == ["a100", "gcp_a100", "h100", "laptop"]
    assert [path.stem for path in KUBERAY] == ["rayjob_finetune", "rayjob_sweep", "rayservice"]


@pytest.mark.parametrize("path", LAUNCHER, ids=stem)
def test_ray_takes_a_launcher_file(path: Path) -> None:
    import ray
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    document = read(path)
    jsonschema.validate(document, schema)
    validate_config(prepare_config(document))


@pytest.mark.parametrize("path", LAUNCHER, ids=stem)
def test_a_launcher_file_installs_the_constraints_and_asks_for_the_token(path: Path) -> None:
    document = read(path)
    mounted = document["file_mounts"]
    for remote, local in mounted.items():
        assert local.startswith("~") or (ROOT / local).exists()
        assert remote.startswith("~/")
    setup = "\n".join(document["setup_commands"] + document.get("head_setup_commands", []))
    assert mounted["~/llava_ray/constraints.txt"] == "constraints.txt"
    assert len(re.findall(r"pip install", setup)) == len(re.findall(r"--constraint ~/llava_ray/constraints.txt", setup))
    assert mounted["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [
        line
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in document[key]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)


@pytest.mark.parametrize("path", [path for path in LAUNCHER if path.stem != "laptop"], ids=stem)
def test_a_cloud_file_has_three_pools_that_prefer_spot_and_can_do_without(path: Path) -> None:
    document = read(path)
    types = document["available_node_types"]
    head = types[document["head_node_type"]]
    assert head["labels"] == {"pools": "decode.vision.train"}
    assert head["resources"]["CPU"] == 0
    for pool in ("decode", "vision", "train"):
        spot, demand = types[f"{pool}_spot"], types[f"{pool}_on_demand"]
        assert spot["labels"] == demand["labels"] == {"pool": pool}
        assert spot["priority"] > demand["priority"]
        assert spot["resources"] == demand["resources"]
        assert "spot" in json.dumps(spot["node_config"]).lower()
        assert "spot" not in json.dumps(demand["node_config"]).lower()
        assert spot.get("min_workers", 0) == demand.get("min_workers", 0) == 0
    assert document["idle_timeout_minutes"] <= 10
    assert "/mnt/llava_ray" in "\n".join(document["setup_commands"])


def closed(required: str = "", **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": required.split(), "additionalProperties": False}


TEXT, WHOLE, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
SIZES = closed("limits requests", limits=TEXTS, requests=TEXTS)
CONTAINER = closed(
    "name image resources",
    name=TEXT,
    image=TEXT,
    workingDir=TEXT,
    resources=SIZES,
    volumeMounts={"type": "array", "items": closed("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)},
)
POD = closed(
    "containers",
    containers={"type": "array", "items": CONTAINER, "minItems": 1},
    volumes={"type": "array"},
    nodeSelector=TEXTS,
    tolerations={"type": "array", "items": closed(key=TEXT, operator=TEXT, effect=TEXT)},
    terminationGracePeriodSeconds=WHOLE,
)
GROUP = {"labels": TEXTS, "resources": TEXTS, "rayStartParams": TEXTS, "template": closed("spec", spec=POD)}
RAY_CLUSTER = closed(
    "rayVersion headGroupSpec",
    rayVersion=TEXT,
    authOptions=closed("mode", mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed(version={"enum": ["v1", "v2"]}, idleTimeoutSeconds=WHOLE),
    headGroupSpec=closed("template rayStartParams", **GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": closed(
            "groupName minReplicas maxReplicas template",
            groupName=TEXT,
            priority=WHOLE,
            replicas=WHOLE,
            minReplicas=WHOLE,
            maxReplicas=WHOLE,
            **GROUP,
        ),
    },
)
# The fields that our files use, as in KubeRay's v1 definitions.
SPECS = {
    "RayJob": closed(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
        backoffLimit=WHOLE,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=WHOLE,
        rayClusterSpec=RAY_CLUSTER,
    ),
    "RayService": closed(
        "serveConfigV2 rayClusterConfig",
        upgradeStrategy=closed(type={"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}),
        rayClusterDeletionDelaySeconds=WHOLE,
        excludeHeadPodFromServeSvc=FLAG,
        serveConfigV2=TEXT,
        rayClusterConfig=RAY_CLUSTER,
    ),
}


@pytest.mark.parametrize("path", KUBERAY, ids=stem)
def test_kuberay_takes_a_file(path: Path) -> None:
    document = read(path)
    assert document["apiVersion"] == "ray.io/v1"
    jsonschema.validate(document["spec"], SPECS[document["kind"]])
    cluster = document["spec"].get("rayClusterSpec") or document["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]  # type: ignore[index]
    for group in cluster["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        told = group.get("resources", {})
        assert told.get("CPU", limits["cpu"]) == limits["cpu"]
        assert told.get("GPU") == limits.get("nvidia.com/gpu")


@pytest.mark.parametrize("path", [path for path in KUBERAY if path.stem.startswith("rayjob")], ids=stem)
def test_a_rayjob_starts_a_pipeline_that_the_image_holds(path: Path) -> None:
    program = re.search(r"/opt/llava_ray/(\S+\.py)", read(path)["spec"]["entrypoint"])
    image = (CLUSTERS / "Dockerfile").read_text()
    assert program is not None
    assert (ROOT / program[1]).parent.name == "pipelines"
    assert "COPY --chown=ray pipelines pipelines" in image


def test_the_rayservice_serves_what_autoscaled_yaml_does() -> None:
    from ray.serve.schema import ServeDeploySchema

    told = yaml.safe_load(read(CLUSTERS / "kuberay" / "rayservice.yaml")["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(told)
    shipped = read(CLUSTERS / "serve" / "autoscaled.yaml")
    for config in (told, shipped):
        for application in config["applications"]:
            application["args"]["model"] = "elsewhere"
    assert told == shipped


def test_the_image_installs_the_constraints_and_only_files_that_are_there() -> None:
    text = (CLUSTERS / "Dockerfile").read_text()
    assert re.findall(r"pip install .*", text) == [
        'pip install --no-cache-dir --constraint constraints.txt --editable ".[qlora,report,sweep]"'
    ]
    for line in re.findall(r"^COPY --chown=ray (.+)$", text, re.M):
        assert all((ROOT / source).exists() for source in line.split()[:-1])


@pytest.mark.parametrize("path", RECIPES, ids=stem)
def test_a_recipe_fits_a_cluster_file(path: Path) -> None:
    offers = [read_cluster_file(file) for file in (*LAUNCHER, *KUBERAY)]
    if path.parent.name in ("evaluate", "preferences"):
        asked = (
            load_recipe(EvaluateConfig, [str(path), "--evaluate.model_path", "model"])
            if path.parent.name == "evaluate"
            else load_settings(PreferencesConfig, [str(path), "--models", "model", "--data_path", "data.json"])
        )
        assert asked.actors.cpus_per_actor == "auto"  # one on a GPU
        fitting = [offer for offer in offers if offer.places("train", 1.0, 1)]
    elif path.parent.name == "improve":
        rounds = load_settings(ImproveConfig, [str(path), "--model.model_name_or_path", "model"])
        fitting = [offer for offer in offers if not find_misfits(offer, rounds)]
    else:
        sweep = path.parent.name == "sweep"
        config = load_sweep([str(path)])[0].base if sweep else load_recipe(FinetuneConfig, [str(path)])
        fitting = [offer for offer in offers if not find_misfits(offer, config)]
    names = {Path(offer.path).stem for offer in fitting}
    assert names >= ({"laptop"} if "quickstart" in stem(path) else {"a100", "h100", "gcp_a100"})


def test_what_does_not_fit_is_said_with_a_remedy() -> None:
    a100, laptop = (read_cluster_file(CLUSTERS / f"{name}.yaml") for name in ("a100", "laptop"))
    recipe = load_recipe(FinetuneConfig, [str(ROOT / "pipelines/recipes/finetune/llava_v1_5_7b.toml")])
    assert find_misfits(a100, recipe) == []
    (needs_gpus,) = find_misfits(laptop, recipe)[:1]
    assert needs_gpus.startswith("8 workers x 1 CPU + 1 GPU: there is room for 0 (1 x machine: 2 CPU, 0 GPU); lower")
    wide = recipe.replaced({"cluster.num_workers": 40, "cluster.accelerator_type": "A100-80G"})
    assert "40 workers x 1 CPU + 1 A100-80G: there is room for 32" in find_misfits(a100, wide)[0]
    other = recipe.replaced({"cluster.accelerator_type": "H100"})
    assert "there is room for 0" in find_misfits(a100, other)[0]
    streamed = {"data.vision_features": "streamed", "data.num_vision_actors": 32}
    assert find_misfits(a100, recipe.replaced(streamed)) == []
    (too_many,) = find_misfits(a100, recipe.replaced(streamed | {"data.num_vision_actors": 33}))
    assert "33 actors for vision features: there is room for 32" in too_many


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "cannot read cluster file"),
        ("a: 1", "is no cluster file"),
        ("cluster_name: x\nprovider: {type: local, head_ip: a}", "node_resources"),
    ],
)
def test_a_file_that_says_too_little_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_cluster_file(tmp_path / "file.yaml")


def test_everything_to_fill_in_is_in_the_readme() -> None:
    told = (CLUSTERS / "README.md").read_text()
    for path in (*LAUNCHER, *(CLUSTERS / "kuberay").glob("*.yaml")):
        if "CHANGE_ME" in path.read_text():
            assert f"`{path.relative_to(CLUSTERS)}`" in told
