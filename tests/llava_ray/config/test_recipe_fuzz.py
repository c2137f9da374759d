"""Recipes, cluster files and key files with damage in them: settings or an error of ours, never anything else."""

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzzing import NUM_INPUTS, fuzz, fuzz_at_length

from llava_ray.errors import ConfigError

ROOT = Path(__file__).parents[3]
KEYS = (
    '[keys.alice]\nkey = "0123456789abcdef0123"\nrequests_per_minute = 60\n[keys.bob]\nsha256 = "' + "0a" * 32 + '"\n'
)
RUBRIC = 'name = "mine"\nsystem = "Judge."\n[prompts]\ndefault = "Rate it."\ncomplex = """Rate\nit."""\n'
VALUES = [
    "0", "-1", "1", "3", "1e999", "inf", "-inf", "nan", "1e-300", "0.5", "true", "false", '""', '"x"', "'auto'",
    "1979-05-27", "1979-05-27T07:32:00Z", "07:32:00", "[]", "[1]", '["a", 1]', "{}", "{ a = 1 }", "[[[[1]]]]",
    "0x" + "f" * 5000, "9" * 5000, "9" * 30, "1_000", "-9223372036854775809", "[" * 400 + "]" * 400, "[" * 5000,
    '"' + "x" * 100_000 + '"', '"\\u0000"', '"\\ud800"', '"""\n', "{ a = { b = { c = { d = 1 } } } }", "0b" + "1" * 99,
    '"mlp99999999999x_gelu"', '"[(1, 2), (3"', '"((((((((((((((((((((((((("', "[" + "1, " * 10_000 + "1]",
]  # fmt: skip
LINES = [
    "[model]", "[train]", "[[train]]", "[train.seed]", "train = 5", "train.seed = 1", "a." * 40_000 + "a = 1", "= 1",
    "a.b = 1\na = 2", '"" = 1', '"\u00e9" = 1', "[a.b.c]", "seed = 1\nseed = 2", "\x00", "\ufeff", "# \x01", "[space]",
    '"train.learning_rate" = { choice = [1e-3, 2e-3], when = { "train.seed" = [1] } }', "[" * 3000, "x" * 200_000,
    '"train.x" = { log_uniform = [0, 1] }', '"model.version" = { choice = [[[1]], {}] }', "\n".join(["[[a]]"] * 2000),
    "\n".join(f"k{n} = {n}" for n in range(3000)),
]  # fmt: skip
FLAGS = [
    "--train.seed", "--seed", "--learning_rate", "--train.learning_rate", "--model.mm_vision_select_layer", "--bits",
    "--data.data_path", "--run.name", "--nothing", "--train", "--", "-x", "--=", "--train.seed=", "--lora_alpha",
    "--image_grid_pinpoints", "--model.s2_scales", "--output_dir", "--a.b.c.d", "--\u00e9", "--" + "x" * 10_000,
]  # fmt: skip
# What shipped recipes leave to flags.
NEEDED = {
    "evaluate": ["--evaluate.model_path", "m"],
    "preferences": ["--models", "m", "--data_path", "d"],
    "review": ["--questions", "q", "--references", "r", "--answers", "a", "b", "--data", "d"],
}
WORDS = ["1", "-1", "nan", "inf", "1e999", "x", "", "None", "True", "[1]", "9" * 5000, "é", "\ud800", "1.5", "(1, 2)"]


def damaged_text(random: random.Random, text: str) -> bytes:
    """Change values, keys, lines or bytes of a text of settings."""
    lines = text.splitlines()
    for _ in range(random.choice([1, 1, 2, 4])):
        place, action = random.randrange(len(lines) + 1), random.random()
        settings = [number for number, line in enumerate(lines) if " = " in line or ": " in line]
        if action < 0.5 and settings:
            number = random.choice(settings)
            mark = " = " if " = " in lines[number] else ": "
            lines[number] = lines[number].partition(mark)[0] + mark + random.choice(VALUES)
        elif action < 0.65:
            lines.insert(place, random.choice(LINES))
        elif action < 0.75 and lines:
            del lines[place % len(lines)]
        elif action < 0.85 and lines:
            lines.insert(place, random.choice(lines))
        elif lines:
            number = place % len(lines)
            cut = random.randrange(len(lines[number]) + 1)
            lines[number] = lines[number][:cut] + random.choice(["", "\\", '"', "[", "{", ".", "é", "\x00", "<<: *a"])
    content = bytearray("\n".join(lines).encode())
    if random.random() < 0.1:
        content[random.randrange(len(content) + 1) :] = random.choice([b"", b"\xff\xfe", b"\x80" * 9, b"\0" * 2**21])
    return bytes(content)


def damaged_flags(random: random.Random) -> list[str]:
    """Return a few flags, most of them with values."""
    flags: list[str] = []
    for _ in range(random.choice([0, 0, 1, 1, 2])):
        flags.append(random.choice(FLAGS))
        flags += [random.choice(WORDS)] if random.random() < 0.9 else []
    return flags


YAML_BOMB = "a0: &a0 {k: v}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}], k{n}: v}}\n" for n in range(1, 12)
)
YAML_LINES = [
    YAML_BOMB, "provider: 5", "provider: {type: local}", "kind: [RayJob]", "spec:", "max_workers: .nan",
    "available_node_types: 7", "x: !!python/object/apply:os.system [ls]", "? [a]\n: b", "x: 2001-99-99", "&a [*a]",
    "max_workers: 1e400", "kind: RayCluster", "x: !!binary '='", "y: " + "[" * 2000, "z: " + "9" * 5000,
]  # fmt: skip


def make_target() -> Callable[[int], str]:
    """Return what reads a damaged recipe of each stage, a cluster file, a key file or a rubric."""
    from llava_ray.config.cluster_files import find_misfits, read_cluster_file
    from llava_ray.config.evaluate import EvaluateConfig
    from llava_ray.config.finetune import FinetuneConfig
    from llava_ray.config.preferences import PreferencesConfig
    from llava_ray.config.recipes import load_recipe, load_settings
    from llava_ray.config.review import ReviewConfig
    from llava_ray.config.sweep_recipes import load_sweep
    from llava_ray.deployments.http.auth import read_api_keys
    from llava_ray.review.rubric import read_rubric

    recipes = {file: file.read_text() for file in sorted((ROOT / "pipelines/recipes").rglob("*.toml"))}
    clusters = {file: file.read_text() for file in sorted((ROOT / "clusters").rglob("*.yaml"))}
    run = load_recipe(FinetuneConfig, [str(ROOT / "pipelines/recipes/quickstart/tune.toml")])
    others = {"sweep": load_sweep, "review": lambda told: load_settings(ReviewConfig, told)}
    others["preferences"] = lambda told: load_settings(PreferencesConfig, told)
    others["evaluate"] = lambda told: load_recipe(EvaluateConfig, told)
    folder = Path(tempfile.mkdtemp())

    def read_cluster(file: Path) -> object:
        return find_misfits(read_cluster_file(file), run)

    def read(seed: int) -> str:
        generator = random.Random(seed)
        kind = generator.choice(["recipe"] * 6 + ["cluster", "cluster", "keys", "rubric"])
        path = folder / "damaged.toml"
        if kind == "recipe":
            source, text = generator.choice(list(recipes.items()))
            told = [str(path), *NEEDED.get(source.parent.name, ()), *damaged_flags(generator)]
            reader = others.get(source.parent.name, lambda told: load_recipe(FinetuneConfig, told))
            kind, run_reader = source.parent.name, lambda: reader(told)
        elif kind == "cluster":
            text = generator.choice(list(clusters.values()))
            text += "\n" + generator.choice(YAML_LINES) if generator.random() < 0.3 else ""
            run_reader = lambda: read_cluster(path)  # noqa: E731
        elif kind == "keys":
            text, run_reader = KEYS, lambda: read_api_keys(str(path), {})
        else:
            text, run_reader = RUBRIC, lambda: read_rubric(path, "pair")
        path.write_bytes(damaged_text(generator, text))
        try:
            run_reader()
        except ConfigError as error:
            assert len(str(error)) < 6000, str(error)[:500]
            return f"{kind} refused"
        return f"{kind} read"

    return read


@pytest.mark.slow
def test_damaged_recipes_are_read_or_refused() -> None:
    report = fuzz("recipes", make_target, NUM_INPUTS)
    assert not report.faults
    assert report.num_inputs == NUM_INPUTS


@pytest.mark.verify
@pytest.mark.timeout(7200)
def test_damaged_recipes_are_read_or_refused_at_length() -> None:
    report = fuzz_at_length("recipes", make_target)
    assert not report.faults
