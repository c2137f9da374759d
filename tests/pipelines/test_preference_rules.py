"""Rules that know the truth, perturbations and verdicts, from answers and ledgers that are there already: no Ray."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preference_data import NUM, PRICE, TRUTHS, make_bundle, rows, settings, write_colours, write_records, write_sampled

import pipelines.preference_results
import pipelines.review_calls
from llava_ray.config.preferences import PreferencesConfig
from llava_ray.errors import ConfigError, DataError
from llava_ray.images.opening import open_image
from llava_ray.review.ledger_file import LedgerFile
from pipelines import preference_sampling
from pipelines.preference_deciding import Decider
from pipelines.preference_jobs import list_samplings, swap_images
from pipelines.preference_judging import plan_calls
from pipelines.preference_pairs import list_pairs
from pipelines.preference_questions import ImageFolder, read_prompts_to_answer
from pipelines.preferences import PreferencesMade, describe_preferences, main, make_preferences

JUDGED = {"judge__model": "scripted", "judge__base_url": "http://127.0.0.1:9/v1"} | {
    f"judge__{key}": value for key, value in PRICE.items()
}
Settings = Callable[..., PreferencesConfig]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("ruled"))


@pytest.fixture(autouse=True)
def neither_ray_nor_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*others: object, **more: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(pipelines.review_calls, "connected", started)
    monkeypatch.setattr(preference_sampling, "connected", started)
    monkeypatch.setattr(pipelines.preference_results, "log_preferences", lambda *others: None)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def of_records(bundle: Path, tmp_path: Path) -> Settings:
    data = write_records(tmp_path / "data")

    def make(**more: Any) -> PreferencesConfig:
        return settings(bundle, tmp_path / "out", {"data_path": str(data / "data.json")}, **more)

    return make


@pytest.fixture
def of_colours(bundle: Path, tmp_path: Path) -> Settings:
    data = write_colours(tmp_path / "colours", 6)

    def make(**more: Any) -> PreferencesConfig:
        return settings(
            bundle, tmp_path / "out", {"benchmark": f"custom={data}"}, preferences__rule="benchmark", **more
        )

    return make


def contents(made: PreferencesMade) -> list[tuple[str, str, str]]:
    return [
        (row["provenance"]["question"], row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in rows(made.path)
    ]


def test_a_benchmarks_scorer_tells_right_from_wrong(of_colours: Settings) -> None:
    said = {"c0": ["Red", "blue", "red"], "c1": ["blue", "red", "BLUE"], "c2": ["blue", "blue", "blue"]}
    config = of_colours()
    write_sampled(config, lambda name, sample: said.get(name, ["green", "blue", ""])[sample])
    made = make_preferences(config)
    assert contents(made) == [("c0", "Red", "blue"), ("c4", "green", "blue"), ("c5", "blue", "green")]
    first = rows(made.path)[0]
    assert first["prompt"] == [{"role": "user", "content": "<image>\nWhich colour?"}]
    assert first["provenance"]["scores"] == {"chosen": 1.0, "rejected": 0.0}
    assert first["provenance"]["source"] == "custom"
    assert first["id"] == "c0#0.0>0.1"
    counts = made.summary["counts"]
    assert counts["empty_answers"] == 3
    assert counts["sampled_answers"] == 18
    assert counts["tied_pairs"] == 2
    assert made.summary["lengths"]["chosen_longer_share"] == 0.3333
    # Two of three rejected answers are the longer ones: the most unequal of them goes.
    before = made.path.read_bytes()
    balanced = make_preferences(of_colours(preferences__balance_lengths=True))
    assert balanced.summary["lengths"] | {"mean_length_difference": 0} == {
        "chosen_longer": 1,
        "rejected_longer": 1,
        "chosen_longer_share": 0.5,
        "mean_length_difference": 0,
    }
    assert balanced.summary["counts"]["dropped_for_length"] == 1
    assert make_preferences(config).path.read_bytes() == before


def test_answers_of_several_models_are_compared(of_colours: Settings, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "same")
    both = {"preferences__models": [str(bundle), str(tmp_path / "same")], "preferences__num_samples": 1}
    with pytest.raises(ConfigError, match=r"same and .*bundle are the same model"):
        make_preferences(of_colours(**both))
    (tmp_path / "same/README.md").write_text("Another one.")
    config = of_colours(**both, preferences__temperature=0.0)
    write_sampled(config, lambda name, sample: "green" if name == "c1" else ["red", "blue"][sample])
    made = make_preferences(config)
    assert [pair[0] for pair in contents(made)] == ["c0", "c2", "c3", "c5"]
    found = [rows(made.path)[0]["provenance"][side] for side in ("chosen", "rejected")]
    assert [side["label"] for side in found] == ["0.0", "1.0"]
    assert [side["model"] for side in found] == ["bundle", "same"]
    assert found[0]["fingerprint"] != found[1]["fingerprint"]


def test_the_datas_own_answer_can_be_the_chosen_one(of_records: Settings) -> None:
    config = of_records(preferences__rule="answer", preferences__chosen="truth", preferences__num_samples=1)
    write_sampled(config, lambda name, _: "A red dog." if name == "r1" else "nothing")
    made = make_preferences(config)
    assert {(chosen, rejected) for _, chosen, rejected in contents(made)} == {
        (truth, "nothing") for truth in TRUTHS.values()
    }
    assert made.summary["counts"]["right_answers"] == 1
    assert len(contents(made)) == NUM
    assert rows(made.path)[0]["provenance"]["chosen"] == {"kind": "truth", "label": "truth"}
    # With nothing wrong there is no pair, and an older file is not left to be learnt from.
    answers = next(Path(config.preferences.output).glob("answers/*/sample.jsonl"))
    answers.unlink()
    truth = {f"r{number}": TRUTHS["one" if number % 2 else "last"] for number in range(NUM)} | {"text": "A fox"}
    write_sampled(config, lambda name, _: truth[name])
    with pytest.raises(DataError, match=r"no preference is left of 7 questions \(7 right answers"):
        make_preferences(config)
    assert not made.path.exists()


def test_answers_to_noised_images_are_the_rejected_ones(of_records: Settings) -> None:
    config = of_records(preferences__rule="noised_image", preferences__num_samples=2)
    write_sampled(config, lambda name, sample: f"{name} has a dog")
    write_sampled(config, lambda name, sample: ["a red dog", f"{name} has a kite"][sample], "noised_image")
    made = make_preferences(config)
    assert contents(made)[0] == ("r0", "r0 has a dog", "a red dog")
    assert ("r1", "r1 has a dog", "a red dog") not in contents(made), "the rejected answer is r1's truth"
    assert made.summary["counts"]["rejected_answers_that_are_right"] == 3
    assert made.summary["counts"]["questions_without_other_image"] == 1
    assert rows(made.path)[0]["provenance"]["rejected"]["noise_steps"] == 500


def test_swapped_images_are_other_ones_chosen_by_the_seed(of_records: Settings) -> None:
    prompts = read_prompts_to_answer(of_records(**JUDGED).preferences).prompts
    swapped = swap_images(prompts, 0)
    assert "text" not in swapped
    assert all(swapped[prompt.id] and swapped[prompt.id] != prompt.images for prompt in prompts if prompt.images)
    assert swapped == swap_images(prompts, 0)
    assert any(swap_images(prompts, seed) != swapped for seed in range(1, 5))
    same = [prompt for prompt in prompts if prompt.id == "r0"] * 2
    assert swap_images(same, 0) == {"r0": ()}


def test_object_words_are_replaced_by_other_objects_of_the_data(of_records: Settings, tmp_path: Path) -> None:
    config = of_records(preferences__rule="replaced_words", preferences__chosen="truth")
    made = make_preferences(config)
    for _, chosen, rejected in contents(made):
        assert chosen != rejected
        assert rejected.split()[-1] in {"dog", "cat", "fox"} - {chosen.split()[-1]}
    before = made.path.read_bytes()
    assert make_preferences(config).path.read_bytes() == before
    (tmp_path / "words.txt").write_text("dog\nunicorn\n")
    listed = make_preferences(config.replaced({"preferences.words": str(tmp_path / "words.txt")}))
    assert {pair[1:] for pair in contents(listed)} == {("a red dog", "a red unicorn")}
    assert listed.summary["counts"]["answers_without_object_words"] == 4


def judged(config: PreferencesConfig, verdict: Callable[[str, str], list[float] | str | None]) -> None:
    """Write the replies of a judge that sees two answers, in the order that it sees, into the ledger."""
    source, folder = read_prompts_to_answer(config.preferences), Path(config.preferences.output)
    jobs = list_samplings(config, source, folder)
    pairs = []
    for job in jobs:
        with job.file:
            for prompt in source.prompts:
                pairs += list_pairs(prompt.id, job.answers(prompt), 4, 0, Counter())
    job = plan_calls(config, {prompt.id: prompt for prompt in source.prompts}, pairs, folder)
    ledger = LedgerFile(job.ledger, "test")
    for number, call in zip(job.plan.slots, job.plan, strict=True):
        item = job.plan.items[number[0]]
        said = verdict(*(item.answers if call.order == "given" else item.answers[::-1]))
        row = {"key": call.key, "judge": call.judge, "item": call.item_id, "dollars": 0.01, "time": 0.0}
        if isinstance(said, list):
            ledger.finish(row | {"state": "done", "scores": said, "content": "", "model": "m", "fingerprint": "f"})
        elif said:
            ledger.finish(row | {"state": "failed", "reason": said})
    ledger.close()


def test_verdicts_of_both_orders_decide(of_records: Settings) -> None:
    config = of_records(**JUDGED)
    write_sampled(
        config, lambda name, sample: f"{name} {'good' if sample == 0 else 'bad' if sample == 1 else 'long bad'}"
    )

    def verdict(first: str, second: str) -> list[float]:
        name = first.split()[0]
        if name == "r0":
            return [9.0, 2.0]  # always the first
        if name == "r1":
            return [5.0, 5.0]
        return [8.0 if "good" in one else 3.0 for one in (first, second)]

    judged(config, verdict)
    made = make_preferences(config)
    counts = made.summary["counts"]
    assert counts["inconsistent_pairs"] == 3
    assert counts["tied_pairs"] == 3 + NUM - 1  # those of two bad ones, too
    assert counts["decided_pairs"] == made.num_pairs == 2 * (NUM - 1)
    assert all("good" in chosen and "bad" in rejected for _, chosen, rejected in contents(made))
    assert made.complete
    assert made.dollars == pytest.approx(0.01 * 6 * (NUM + 1))
    assert made.summary["order"]["first_wins"] > 0.5
    assert rows(made.path)[0]["provenance"]["calls"][0]["scores"] in ([8.0, 3.0], [3.0, 8.0])


def test_failed_and_open_pairs_are_no_preferences(of_records: Settings) -> None:
    config = of_records(**JUDGED, budget__dollars=1.0)
    write_sampled(config, lambda name, sample: f"{name} {['good', 'bad', 'bad'][sample]}")

    def verdict(first: str, second: str) -> list[float] | str | None:
        name = first.split()[0]
        if name == "r0":
            return "HTTP 500" if "good" in first else [9.0, 3.0]
        if name == "r1":
            return None
        return [40.0 if "good" in one else 3.0 for one in (first, second)]

    judged(config, verdict)
    # What is spent leaves no room for a call: nothing is sent, and what exists is kept.
    made = make_preferences(config.replaced({"budget.dollars": 0.11}))
    assert not made.complete
    assert "budget.dollars = 0.11 is below the price of one call" in made.summary["partial_because"]
    counts = made.summary["counts"]
    assert (counts["failed_pairs"], counts["open_pairs"], counts["decided_pairs"]) == (1, 1, NUM - 1)
    assert {name for name, *_ in contents(made)} == {f"r{number}" for number in range(2, NUM)} | {"text"}
    assert made.summary["judge_failures"] == {"reviews": 1, "most_common": "HTTP 500"}


def test_what_the_judge_is_shown(of_records: Settings, tmp_path: Path) -> None:
    config = of_records(**JUDGED, preferences__show_truth=True)
    write_sampled(config, lambda name, sample: f"{name} {sample}")
    source, folder = read_prompts_to_answer(config.preferences), tmp_path / "out"
    prompts = {prompt.id: prompt for prompt in source.prompts}
    pair = list_pairs("r0", list_samplings_answers(config), 1, 0, Counter())
    job = plan_calls(config, prompts, pair, folder)
    given, swapped = job.plan
    text = given.body["messages"][-1]["content"]
    assert "[Context]\nReference answer: a blue cat" in text
    assert "User: What is it?\nAssistant: a red dog\nUser: And behind it?" in text
    assert "faithful to the image" in text
    assert given.image == tmp_path / "data/0.png"
    assert given.key != swapped.key
    content = (tmp_path / "data/0.png").read_bytes()
    image = open_image(content, "x", max_pixels=10**6)
    image.save(tmp_path / "data/0.bmp")
    bitmap = {"r0": prompts["r0"].__class__("r0", prompts["r0"].turns, (str(tmp_path / "data/0.bmp"),))}
    shown = plan_calls(config, bitmap, pair, folder).plan[0].image
    assert shown is not None
    assert shown.parent == folder / "images"
    assert shown.read_bytes().startswith(b"\x89PNG")
    assert ImageFolder(folder).name(shown.read_bytes()) == f"images/{shown.name}"


def list_samplings_answers(config: PreferencesConfig) -> Any:
    source = read_prompts_to_answer(config.preferences)
    (job,) = list_samplings(config, source, Path(config.preferences.output))
    with job.file:
        return job.answers(next(prompt for prompt in source.prompts if prompt.id == "r0"))


def test_equal_and_cut_off_answers_are_told_with_the_remedy(of_colours: Settings) -> None:
    config = of_colours()
    path = write_sampled(config, lambda *_: "Red")
    with pytest.raises(DataError, match=r"all 18 pairs of answers to 6 questions are equal: raise preferences\.temp"):
        make_preferences(config)
    path.write_text(path.read_text().replace('"ended": true', '"ended": false'))
    with pytest.raises(DataError, match=r"18 cut off answers, .*answers were cut off; raise preferences\.max_new_tok"):
        make_preferences(of_colours(preferences__cut_off="drop"))


def test_answers_sampled_otherwise_are_not_mixed_in(of_colours: Settings, tmp_path: Path) -> None:
    config = of_colours()
    write_sampled(config, lambda name, sample: ["red", "blue", "green"][sample])
    make_preferences(config)
    with pytest.raises(
        ConfigError, match=r"has answers made with another sampling: choose another preferences\.output"
    ):
        make_preferences(of_colours(preferences__temperature=0.5))
    file = tmp_path / "colours/questions.jsonl"
    file.write_text(file.read_text().replace("Which colour?", "What colour?"))
    with pytest.raises(ConfigError, match=r"has answers to another question 'c0/0'"):
        make_preferences(config)


def test_questions_that_cannot_be_asked_are_named_and_counted(of_records: Settings, tmp_path: Path) -> None:
    path = tmp_path / "data/data.json"
    config = of_records(preferences__rule="replaced_words", preferences__chosen="truth")
    records = json.loads(path.read_text())
    (tmp_path / "data/2.png").unlink()
    del records[3]["image"]
    path.write_text(json.dumps(records))
    with pytest.raises(DataError, match=r"2 of 7 questions cannot be asked .*r3.* 0 image\(s\).*r2.*does not exist"):
        make_preferences(config)
    made = make_preferences(config.replaced({"preferences.max_rejected": 0.5}))
    assert made.summary["rejected"] == {"image_count": 1, "image_missing": 1}
    assert (made.summary["questions"], made.summary["asked"]) == (7, 5)
    # A question that nothing answers yet is one; a conversation with tools is none.
    records[-1]["conversations"] = records[-1]["conversations"][:1]
    called = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": '[{"name": "f", "arguments": {}}]'}]
    path.write_text(json.dumps([records[-1], {"id": "tools", "conversations": called}]))
    source = read_prompts_to_answer(config.preferences.replaced({"max_rejected": 0.5}))
    assert [(prompt.id, prompt.truths) for prompt in source.prompts] == [("text", ())]
    assert source.reasons == {"unsupported": 1}
    path.write_text(json.dumps(records[-1:]))
    with pytest.raises(DataError, match="none of the 1 questions has an image"):
        make_preferences(of_records(preferences__rule="noised_image"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preferences.num_samples": 1}, "a pair needs two answers"),
        ({"preferences.temperature": 0.0}, "samples the same answer every time"),
        ({"preferences.rule": "benchmark"}, "needs preferences.benchmark"),
        ({"preferences.benchmark": "custom=x"}, "one of them"),
        ({"preferences.benchmark": "custom", "preferences.data_path": None}, "expected NAME=FOLDER"),
        ({"preferences.models": ()}, "at least one model"),
        ({"preferences.top_p": 0.0}, "greater than 0"),
        ({"preferences.chosen": "truth"}, "needs no judge"),
        ({"judge.model": ""}, "needs judge.model"),
        ({"judge.sees_images": False}, "sees the image"),
        ({"tracking.report_to": ("wandb",)}, "only training runs write to"),
    ],
)
def test_settings_that_cannot_be_are_refused(of_records: Settings, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        of_records(**JUDGED).replaced(changes)


def test_wrong_places_and_unscored_benchmarks_are_told_before_anything_starts(
    of_records: Settings, of_colours: Settings, bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"preferences\.models, 1 = '/nowhere': nothing is there"):
        make_preferences(of_records(**JUDGED).replaced({"preferences.models": ("/nowhere",)}))
    with pytest.raises(ConfigError, match=r"preferences\.data_path = '.*': nothing is there"):
        make_preferences(of_records(**JUDGED).replaced({"preferences.data_path": str(tmp_path / "no.json")}))
    with pytest.raises(ConfigError, match=r"budget\.dollars needs the price of scripted"):
        config = of_records(judge__model="scripted", budget__dollars=1.0)
        write_sampled(config, lambda name, sample: f"{name} {sample}")
        make_preferences(config)
    config = of_colours().replaced({"preferences.benchmark": f"mm_vet={tmp_path / 'colours'}"})
    with pytest.raises(DataError, match=r"mm-vet\.json"):
        make_preferences(config)


def test_a_dry_run_counts_and_starts_nothing(of_records: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    config = of_records(**JUDGED)
    found = describe_preferences(config)
    assert (found["questions"], found["answers to sample"], found["judge's calls, at most"]) == (7, 21, 42)
    flags = ["--models", config.preferences.models[0], "--data_path", str(config.preferences.data_path)]
    assert main([*flags, "--judge.model", "m", "--num_samples", "3", "--dry-run"]) is None
    assert "judge's calls, at most     42" in capsys.readouterr().out


def test_a_decider_counts_questions_with_several_images(of_records: Settings, tmp_path: Path) -> None:
    path = tmp_path / "data/data.json"
    records = json.loads(path.read_text())
    records[1] |= {"image": ["1.png", "2.png"]}
    records[1]["conversations"][0]["value"] = "<image><image>\nWhich?"
    path.write_text(json.dumps(records[1:2]))
    config = of_records(**JUDGED)
    write_sampled(config, lambda name, sample: f"{name} {sample}")
    source, counts = read_prompts_to_answer(config.preferences), Counter[str]()
    jobs = list_samplings(config, source, tmp_path / "out")
    with jobs[0].file:
        assert Decider(config, source, jobs, tmp_path / "out", counts).decide().pairs == []
    assert counts["questions_with_several_images"] == 1
