"""Records, settings and a tiny model to make preferences of, and answers as a run would have sampled them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fakes
from pictures import picture

from llava_ray.config.model import ModelConfig
from llava_ray.config.preferences import PreferencesConfig
from llava_ray.model.assembly import assemble
from llava_ray.model.saving import save_bundle

NUM = 6
TEXT_ONLY = "text"
PRICE = {"input_dollars": 1.0, "output_dollars": 2.0}
TRUTHS = {"one": "a red dog", "last": "a blue cat", TEXT_ONLY: "a fox"}


def make_bundle(root: Path) -> Path:
    """A tiny model with random weights."""
    config = ModelConfig(
        model_name_or_path=str(fakes.make_language_model(root / "language_model")),
        vision_tower=str(fakes.make_vision_tower(root / "tower")),
    )
    save_bundle(root / "bundle", assemble(config, "pad"))
    return root / "bundle"


def write_records(folder: Path) -> Path:
    """Records of one question and of two about an image, and one without."""
    folder.mkdir(parents=True)
    records: list[dict[str, Any]] = []
    for number in range(NUM):
        (folder / f"{number}.png").write_bytes(picture(colour=["red", "green", "blue"][number % 3], width=40 + number))
        turns = [("human", "<image>\nWhat is it?"), ("gpt", TRUTHS["one"])]
        turns += [] if number % 2 else [("human", "And behind it?"), ("gpt", TRUTHS["last"])]
        listed = [{"from": role, "value": text} for role, text in turns]
        records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": listed})
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": TRUTHS[TEXT_ONLY]}]
    (folder / "data.json").write_text(json.dumps([*records, {"id": TEXT_ONLY, "conversations": talk}]))
    return folder


def write_colours(folder: Path, num: int) -> Path:
    """A custom benchmark whose answer is the colour of the picture."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(num):
        colour = ["red", "green", "blue"][number % 3]
        (folder / f"{number}.png").write_bytes(picture(colour=colour))
        lines.append({"id": f"c{number}", "image": f"{number}.png", "question": "Which colour?", "answer": colour})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def settings(bundle: Path, output: Path, source: Mapping[str, str], **more: Any) -> PreferencesConfig:
    """Settings of a small run; ``section__key`` changes one."""
    section = {
        "models": [str(bundle)],
        "num_samples": 3,
        "max_new_tokens": 6,
        "cut_off": "keep",
        "output": str(output),
        "batch_size": 2,
        **source,
    }
    sections: dict[str, Any] = {"preferences": section, "actors": {"num_actors": 1, "cpus_per_actor": 0.5}}
    for key, value in more.items():
        place, _, name = key.partition("__")
        sections.setdefault(place, {})[name] = value
    return PreferencesConfig.parsed(sections)


def write_sampled(config: PreferencesConfig, text_of: Callable[[str, int], str], kind: str = "sample") -> Path:
    """Write answers of a kind as if the models had sampled them; a second model's numbers follow the first one's."""
    from pipelines.preference_jobs import list_samplings
    from pipelines.preference_questions import read_prompts_to_answer

    source = read_prompts_to_answer(config.preferences)
    jobs = [one for one in list_samplings(config, source, Path(config.preferences.output)) if one.kind == kind]
    for job in jobs:
        first = job.model.number * job.settings.num_samples
        with job.file:
            for prompt in job.prompts:
                for sample, key in enumerate(job.keys(prompt)):
                    row = {"question_id": key, "prompt": prompt.prompt[-1]["content"], "seed": job.seed(prompt, sample)}
                    job.file.append([row | {"text": text_of(prompt.id, first + sample), "ended": True}])
    return jobs[0].file.path


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
