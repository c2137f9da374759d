"""Recipes, cluster files and key files that no person wrote: refused at once, by file and key."""

import time
from pathlib import Path

import pytest

from llava_ray.config.cluster_files import read_cluster_file
from llava_ray.config.finetune import FinetuneConfig
from llava_ray.config.recipes import load_recipe, read_toml
from llava_ray.config.sweep_recipes import load_sweep
from llava_ray.deployments.http.auth import read_api_keys
from llava_ray.errors import ConfigError
from llava_ray.review.rubric import read_rubric

ATTACK = Path(__file__).parents[2] / "attack"
FLAGS = ("--model_name_or_path", "m", "--data_path", "x")


@pytest.fixture(autouse=True)
def quick():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 10


def test_a_number_of_thousands_of_digits() -> None:
    with pytest.raises(ConfigError, match=r"bigint\.toml' cannot be read \(ValueError: Exceeds the limit"):
        read_toml(str(ATTACK / "bigint.toml"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"x = " + b"[" * 5000, "cannot be read"),
        (b"x = " + b"[" * 100 + b"]" * 100, "more than 64 nested lists or tables"),
        (b"x = 0x" + b"f" * 5000, "x is a number of 20,000 bits, beyond 64 bits"),
        (b"[train]\nseed = 9223372036854775808", "train.seed is 9223372036854775808, beyond 64 bits"),
        (b"\xff\xfex", "cannot read recipe"),
        (b"\xef\xbb\xbfx = 1", "begins with a byte order mark"),
        (b"x\0 = 1", "is not valid TOML"),
        (b"#" * (2**20 + 1), "has more than 1,048,576 bytes"),
        (b"a = 1\n" + b"a." * 40_000 + b"a = 1", "line 2 has a key of more than 32 parts"),
        (b'"a b" . ' * 40 + b"a = 1", "line 1 has a key of more than 32 parts"),
        (b"[train]\nlearning_rate = inf", "'train.learning_rate' = inf: Input should be a finite number"),
        (b"[train]\nlearning_rate = nan", "'train.learning_rate' = nan"),
        (b"[train]\nseed = 1979-05-27", "'train.seed' = datetime.date"),
        (b"[[train]]\nseed = 1", "'train' = "),
        (b"train = 5", "'train' = 5"),
        (b"[train]\nseed = 1\nseed = 2", "is not valid TOML"),
        (b"\n".join(b"k%d = 1" % number for number in range(3000)), r"; and 2990 more"),
        (b"k" * 100_000 + b" = 1", "unknown key 'k{200}'"),
        (b"[model]\nmm_projector_type = 'mlp999999999x_gelu'", "unknown projector"),
        (b"[model]\nimage_grid_pinpoints = '" + b"(" * 3000 + b"'", "model.image_grid_pinpoints"),
        (b"[model]\ns2_scales = [1000000000]", "model.s2_scales"),
    ],
)
def test_hostile_recipes_are_refused_by_name(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        load_recipe(FinetuneConfig, [str(path), *FLAGS])
    assert "bad.toml" in str(caught.value)
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize("path", ["", "\0", "x" * 5000, "~nobody/x.toml", "\ud800.toml"])
def test_a_recipe_that_is_none(path: str, tmp_path: Path) -> None:
    for wrong in (path, str(tmp_path)):
        with pytest.raises(ConfigError):
            load_recipe(FinetuneConfig, [wrong, *FLAGS])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--train.seed", "9" * 5000], "flags: "),
        (["--train.seed", "9" * 30], "flags: .*seed .*at most 64 bits"),
        (["--learning_rate", "nan"], "flags: .*learning_rate .*a finite number"),
        (["--learning_rate", "inf"], "flags: .*learning_rate .*a finite number"),
        (["--train.seed", "x"], r"flags: .*train\.seed"),
        (["--train.seed"], r"flags: .*train\.seed"),
        (["--" + "x" * 5000, "1"], "unknown key"),
    ],
)
def test_odd_flags_are_refused_by_name(flags: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load_recipe(FinetuneConfig, [*FLAGS, *flags])
    assert len(str(caught.value)) < 1000


def test_a_space_of_too_many_corners(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    numbers = list(range(1, 101))
    dimensions = [("lora.lora_r", ""), ("train.warmup_steps", ""), ("lora.lora_alpha", "")]
    lines = [f'"{key}" = {{ choice = {numbers} }}' for key, _ in dimensions]
    when = ", ".join(f'"{key}" = {numbers}' for key, _ in dimensions)
    lines.append(f'"train.weight_decay" = {{ choice = [0.1, 0.2], when = {{ {when} }} }}')
    path.write_text("[space]\n" + "\n".join(lines))
    with pytest.raises(ConfigError, match=r"space\.train\.weight_decay has 2,000,000 combinations|is no setting"):
        load_sweep([str(path), *FLAGS, "--held_out.path", "x"])


BOMB = "a0: &a0 {k: v}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: v}}\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "too many merged keys"),
        ("x: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("x: " + "[" * 3000, "cannot read cluster file"),
        ("x: " + "9" * 5000, "cannot read cluster file"),
        ("x: 2001-99-99", "cannot read cluster file"),
        ("#" * 2**18, "has more than 131,072 bytes"),
        ("provider: 5", "lacks a key"),
        ("provider: {type: gcp}", "lacks a key .*available_node_types"),
        ("kind: RayJob", "lacks a key .*spec"),
        ("kind: [RayJob]\nprovider: {type: gcp}\navailable_node_types: 5", "lacks a key"),
        (
            "provider: {type: gcp}\nmax_workers: .inf\navailable_node_types: {a: {resources: {CPU: 1}}}",
            "lacks a key",
        ),
        ("provider: {type: gcp}\navailable_node_types: {a: {resources: {CPU: .nan}}}", "'a' has nan CPU"),
        ("provider: {type: gcp}\navailable_node_types: {a: {resources: {CPU: -4}}}", "'a' has -4 CPU"),
    ],
)
def test_hostile_cluster_files_are_refused_by_name(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_cluster_file(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[keys.a]\nsha256 = 5", "keys.a is invalid"),
        ("[keys.a]\nkey = 5", "keys.a is invalid"),
        (f"[keys.a]\nkey = '{'k' * 20}'\nsha256 = '{'a' * 64}'", "keys.a is invalid"),
        (f"[keys.a]\nsha256 = '{'é' * 64}'", "other characters than hexadecimal digits"),
        ("[keys.a]\nsha256 = ['x']", "keys.a is invalid"),
        ("[keys]\na = 'secretsecretsecret'", "keys.a is invalid"),
        ("keys = 5", "expected"),
        ("keys = [1]", "expected"),
        (f"[keys.a]\nkey = '{'k' * 20}'\nrequests_per_minute = 1e9", "keys.a is invalid"),
        (f"[keys.a]\nkey = '{'k' * 20}'\nrequests_per_minute = {'9' * 30}", "beyond 64 bits"),
        ("x = " + "9" * 5000, "api_keys_file .*cannot be read"),
        ("x = " + "[" * 5000, "api_keys_file .*cannot be read"),
        ("x" * (2**20 + 1), "has more than"),
    ],
)
def test_hostile_key_files_are_refused(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        read_api_keys(str(tmp_path / "keys.toml"), {})
    assert "secretsecret" not in str(caught.value)
    assert "kkkk" not in str(caught.value)


def test_hostile_rubrics_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "rubric.toml"
    for text in ("x = " + "9" * 5000, "x = " + "[" * 5000, "prompts = 5", "[prompts]\ndefault = 1979-05-27", "a." * 99):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"rubric\.toml"):
            read_rubric(path, "pair")
