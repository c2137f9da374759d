"""The preview command: golden tokens, losses of packed samples, the report, what goes wrong."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from engines import spoil
from fakes import make_language_model, make_tokenizer, make_vision_tower
from originals import copy_golden
from PIL import Image
from samples import write_mixed_samples, write_samples

from llava_ray.chat.conversation import read_turns
from llava_ray.chat.templates import find_template
from llava_ray.chat.tokens import expand_images, tokenize_conversation
from llava_ray.config.model import ModelConfig
from llava_ray.errors import BundleError, ConfigError, ModelError
from llava_ray.images.geometry import ImageSpec
from llava_ray.images.processing import crop_pixels, process_images
from llava_ray.model.assembly import assemble
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.saving import save_bundle
from llava_ray.preview import losses
from pipelines.preview import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CASES = json.loads((GOLDEN / "tokens.json").read_text())


def key(case):
    return case["template"], case["legacy"]


GROUPS = {name: list(cases) for name, cases in groupby(sorted(CASES, key=key), key=key)}


def lines_of(capsys, *arguments):
    main([*map(str, arguments), "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bundle and twelve samples, one without an image, and one that training would reject."""
    folder = tmp_path_factory.mktemp("preview")
    data = write_samples(folder, 12)
    rows = json.loads(data.read_text())
    rows[3]["image"] = "gone.jpg"
    data.write_text(json.dumps(rows))
    config = ModelConfig(
        model_name_or_path=str(make_language_model(folder / "language_model")),
        vision_tower=str(make_vision_tower(folder / "vision_tower")),
        version="llava_v1",
    )
    parts = assemble(config, "pad", model_max_length=512)
    save_bundle(folder / "bundle", parts)
    save_bundle(folder / "projector_only", parts, include="projector")
    return folder


@pytest.fixture
def asked(folder):
    return ["--data", str(folder / "data.json"), "--image_folder", str(folder / "images")]


@torch.no_grad()
def loss_alone(parts, record, image_folder, version, ratio):
    """Return a sample's loss and its number of tokens, straight from the language model's logits."""
    tokens = tokenize_conversation(read_turns(record["conversations"]), find_template(version), parts.tokenizer)
    images = [Image.open(image_folder / record["image"])] if "image" in record else []
    ids, labels = expand_images(tokens.input_ids, tokens.labels, [16] * len(images))
    settings = type("Settings", (), {"image_aspect_ratio": ratio})
    features = parts.tower(process_images(images, parts.image_processor, settings)) if images else None
    logits = parts.llava.language_model(inputs_embeds=parts.llava.embed(torch.tensor([ids]), features)).logits[0]
    targets = torch.tensor(labels[1:])
    loss = torch.nn.functional.cross_entropy(logits[:-1].float(), targets, ignore_index=-100)
    return loss.item(), int((targets != -100).sum())


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{group[0]}-{'legacy' * group[1]}")
def test_golden_tokens_come_out_of_the_command(tmp_path, capsys, group):
    template, legacy = group
    shutil.copy(GOLDEN / "tokenizer.model", tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    cases = GROUPS[group]
    data = [{"id": str(i), "conversations": case["conversations"]} for i, case in enumerate(cases)]
    (tmp_path / "data.json").write_text(json.dumps(data))
    lines = lines_of(capsys, "--tokenizer", tmp_path, "--version", template, "--data", tmp_path / "data.json")
    assert lines == [{"id": str(i), "ids": case["ids"], "labels": case["labels"]} for i, case in enumerate(cases)]


def test_all_golden_cases_are_in_a_group():
    assert sum(map(len, GROUPS.values())) == 136


@pytest.mark.parametrize(
    ("extra", "version", "ratio"),
    [
        ([], "llava_v1", "pad"),
        (["--model_max_length", "2048"], "llava_v1", "pad"),  # more samples to a row
        (["--version", "v1", "--image_aspect_ratio", "square"], "v1", "square"),
    ],
)
def test_losses_are_those_of_each_sample_alone(folder, asked, capsys, extra, version, ratio):
    lines = lines_of(capsys, "--model", folder / "bundle", *asked, *extra)
    parts = load_pretrained_model(folder / "bundle")
    records = json.loads((folder / "data.json").read_text())
    assert [line["id"] for line in lines] == [record["id"] for record in records]
    for line, record in zip(lines, records, strict=True):
        if record.get("image") == "gone.jpg":
            assert line.keys() == {"id", "error"}
            continue
        loss, supervised = loss_alone(parts, record, folder / "images", version, ratio)
        assert line["loss"] == pytest.approx(loss, abs=1e-5)
        assert line["supervised"] == supervised
        assert line["ids"].count(-200) == ("image" in record)


def test_anyres_samples_have_the_losses_of_each_alone(folder, capsys, tmp_path):
    data = write_mixed_samples(tmp_path, 4)  # with no, one, two and three images
    config = ModelConfig(
        model_name_or_path=str(folder / "language_model"),
        vision_tower=str(folder / "vision_tower"),
        mm_patch_merge_type="spatial_unpad",
    )
    save_bundle(tmp_path / "bundle", assemble(config, "anyres", model_max_length=1024))
    asked = ["--model", tmp_path / "bundle", "--image_folder", tmp_path / "images"]
    together = lines_of(capsys, *asked, "--data", data)
    assert [line["ids"].count(-200) for line in together] == [0, 1, 2, 3]
    for record, line in zip(json.loads(data.read_text()), together, strict=True):
        (tmp_path / "one.json").write_text(json.dumps([record]))
        (alone,) = lines_of(capsys, *asked, "--data", tmp_path / "one.json")
        assert alone | {"loss": pytest.approx(alone["loss"], abs=1e-5)} == line
    main([*map(str, asked), "--data", str(data), "--output", str(tmp_path / "report")])
    report = (tmp_path / "report" / "report.html").read_text()
    parts = load_pretrained_model(tmp_path / "bundle")
    for name in ("0001-0.jpg", "0003-2.jpg"):
        count = parts.image_tokens.count(*Image.open(tmp_path / "images" / name).size)
        assert f"image · {count} tokens" in report
    assert "view 4 of image 3 of sample m0003" in report


def test_a_projector_only_bundle_takes_its_parts_from_elsewhere(folder, asked, capsys, tmp_path):
    whole = lines_of(capsys, "--model", folder / "bundle", *asked)
    moved = shutil.copytree(folder / "language_model", tmp_path / "language_model")
    tower = shutil.copytree(folder / "vision_tower", tmp_path / "vision_tower")
    parts = ["--model_base", moved, "--vision_tower", tower]
    assert lines_of(capsys, "--model", folder / "projector_only", *asked, *parts) == whole


def test_a_plain_language_model_takes_a_tower(folder, asked, capsys):
    parts = ["--model", folder / "language_model", "--vision_tower", folder / "vision_tower", "--version", "v1"]
    lines = lines_of(capsys, *parts, *asked)
    assert sum("loss" in line for line in lines) == 11
    text_only = json.loads((folder / "data.json").read_text())[0]
    expected, _ = loss_alone(load_pretrained_model(folder / "bundle"), text_only, folder / "images", "v1", "square")
    assert lines[0]["loss"] == pytest.approx(expected, abs=1e-5)


def test_losses_of_a_published_model_are_the_originals(tmp_path, capsys):
    """Of a folder in the original's layout, through the command."""
    golden = copy_golden("v15_mlp_pad", tmp_path / "v15")
    cases = json.loads((golden / "expected.json").read_text())["cases"]
    data = [{"id": str(i), "conversations": case["conversations"]} for i, case in enumerate(cases)]
    data = [row | ({"image": case["image"]} if case["image"] else {}) for row, case in zip(data, cases, strict=True)]
    (tmp_path / "data.json").write_text(json.dumps(data))
    given = ["--model", golden, "--vision_tower", golden / "tower", "--image_folder", golden / "images"]
    lines = lines_of(capsys, *given, "--data", tmp_path / "data.json")
    assert [line["supervised"] for line in lines] == [case["supervised"] for case in cases]
    assert [line["loss"] for line in lines] == pytest.approx([case["loss"] for case in cases], abs=1e-4)


def test_samples_are_cut_as_in_training(folder, asked, capsys):
    whole = lines_of(capsys, "--model", folder / "bundle", *asked)
    lengths = [len(line["ids"]) + 15 * line["ids"].count(-200) for line in whole if "ids" in line]
    limit = sorted(lengths)[-2]  # all but one fit, into rows of one sample
    cut = lines_of(capsys, "--model", folder / "bundle", *asked, "--model_max_length", limit)
    changed = [(old, new) for old, new in zip(whole, cut, strict=True) if "truncated" in new]
    assert len(changed) == sum(length > limit for length in lengths) == 1
    [(old, new)] = changed
    assert new["ids"] == old["ids"][: len(new["ids"])]
    assert len(new["ids"]) + 15 * new["ids"].count(-200) == limit
    for old, new in zip(whole, cut, strict=True):
        if "loss" in new and "truncated" not in new:
            assert new["loss"] == pytest.approx(old["loss"], abs=1e-5)


def test_the_report_shows_samples_pictures_lengths_losses_and_rejections(folder, asked, capsys, tmp_path):
    path = main(["--model", str(folder / "bundle"), *asked, "--output", str(tmp_path / "out")])
    assert path == tmp_path / "out" / "report.html"
    page = path.read_text()
    capsys.readouterr()
    lines = lines_of(capsys, "--model", folder / "bundle", *asked)
    highest = max(lines, key=lambda line: line.get("loss", 0))
    assert page.index('id="sample-0"') < page.index(f"<h3>{highest['id']} <small>") < page.index('id="sample-1"')
    assert page.count("<article") == 11
    assert page.count('class="image">image · 16 tokens<') == page.count("data:image/png;base64,") == 8
    assert "model_max_length 512" in page
    assert "image_missing" in page
    assert "gone.jpg" in page
    assert "<mark>yes</mark>" in page
    assert "Highest losses" in page


def test_the_pictures_are_the_models_own_crops(folder, asked, tmp_path):
    page = main(["--model", str(folder / "bundle"), *asked, "--output", str(tmp_path)]).read_text()
    spec = ImageSpec.from_processor(load_pretrained_model(folder / "bundle").image_processor, "pad")
    crop = crop_pixels(Image.open(folder / "images" / "0001.jpg"), spec)
    sink = io.BytesIO()
    Image.fromarray(crop.transpose(1, 2, 0)).save(sink, "PNG")
    assert base64.b64encode(sink.getvalue()).decode() in page


def test_the_summary_counts_and_points_to_the_report(folder, asked, capsys, tmp_path):
    main(["--model", str(folder / "bundle"), *asked, "--output", str(tmp_path)])
    said = " ".join(capsys.readouterr().out.split())
    assert "samples 11 rejected 1 (1 image_missing)" in said
    assert said.endswith(f"Report: {tmp_path}/report.html")
    assert "\x1b" not in said  # no terminal


def test_without_a_model_no_image_is_opened(folder, asked, capsys, tmp_path):
    main(["--tokenizer", str(folder / "language_model"), "--version", "v1", *asked, "--output", str(tmp_path)])
    assert "samples 12 rejected 0" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "report.html").read_text()
    assert "no image was opened" in page
    assert "<img" not in page
    assert "Losses" not in page


def test_a_terminal_gets_a_few_samples_in_colour(folder, asked, capsys, monkeypatch, tmp_path):
    rows = json.loads((folder / "data.json").read_text())[:2]
    rows[0]["conversations"][0]["value"] = "What is \x1b[2J?"
    (tmp_path / "data.json").write_text(json.dumps(rows))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tokens = ["--tokenizer", str(folder / "language_model"), "--version", "v1", "--output", str(tmp_path)]
    main([*tokens, "--data", str(tmp_path / "data.json")])
    out = capsys.readouterr().out
    assert "\x1b[32m</s>\x1b[0m" in out
    assert "\x1b[2J" not in out  # what the data says is no command
    assert "What is \N{REPLACEMENT CHARACTER}[2J?" in out


def test_a_split_stop_string_is_warned_of_everywhere(folder, asked, capsys, tmp_path):
    tokens = ["--tokenizer", str(folder / "language_model"), "--version", "v0", *asked]
    main([*tokens, "--output", str(tmp_path)])
    assert "Attention: template 'v0' stops at '###'" in capsys.readouterr().out
    assert "not a single token" in (tmp_path / "report.html").read_text()
    main([*tokens, "--json"])
    assert "not a single token" in capsys.readouterr().err


def test_max_samples_are_the_first(folder, asked, capsys):
    tokens = ["--tokenizer", folder / "language_model", "--version", "v1"]
    assert [line["id"] for line in lines_of(capsys, *tokens, *asked, "--max_samples", 2)] == ["s0000", "s0001"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--model", "bundle", "--tokenizer", "language_model"], ConfigError, "give one of them"),
        (["--model", "language_model"], ModelError, r"plain language model\) does not say which conversation template"),
        (["--model", "language_model", "--version", "v1"], ModelError, "names no vision tower"),
        (["--model", "bundle", "--version", "vicuna_v2"], ConfigError, "no conversation template is called"),
        (["--model", "nowhere", "--version", "v1", "--vision_tower", "vision_tower"], ModelError, "no such language"),
        (["--model", "projector_only", "--model_base", "other"], BundleError, "not the one that the bundle was made"),
        (
            ["--tokenizer", "language_model", "--version", "v1", "--output", "data.json"],
            ConfigError,
            "cannot be written",
        ),
    ],
)
def test_what_does_not_fit_is_named(folder, asked, monkeypatch, arguments, error, message):
    monkeypatch.chdir(folder)
    if not (folder / "other").exists():
        make_language_model(folder / "other", seed=5)
    with pytest.raises(error, match=message):
        main([*arguments, *asked])


def test_the_script_runs_by_itself_and_keeps_stdout_clean(tmp_path):
    make_tokenizer(tmp_path)
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "yes"}]
    records = [{"id": "a", "conversations": turns}, {"id": "b", "conversations": turns[:1] * 2}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    command = [ROOT / "pipelines" / "preview.py", "--tokenizer", tmp_path, "--version", "v1", "--json"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*command, "--data", tmp_path / "data.jsonl"], capture_output=True, text=True, env=os.environ | {"PATH": path}
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(line) for line in lines] == [{"id", "ids", "labels"}, {"id", "error"}]
    assert lines[1]["error"]["reason"] == "alternation"
    assert "2 conversations, 1 rejected" in done.stderr


def test_samples_without_a_finite_loss_are_named(folder, tmp_path, capsys, monkeypatch):
    """Two of eight, in rows that are packed with others: valid JSON, counted on the screen, first in the report."""
    load = losses.load_pretrained_model
    monkeypatch.setattr(losses, "load_pretrained_model", lambda *some, **named: spoil(load(*some, **named), "~"))
    texts = ["red", "a ~ b", "blue", "what is it", "~", "yes", "no", "circle"]
    turns = [[{"from": "human", "value": text}, {"from": "gpt", "value": "it is red"}] for text in texts]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"id": f"s{index}", "conversations": some} for index, some in enumerate(turns)]))
    asked = ["--model", str(folder / "bundle"), "--data", str(data)]
    main([*asked, "--json"])
    printed = capsys.readouterr()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in printed.out.splitlines()]
    without = [line["id"] for line in lines if line["loss"] is None]
    assert without == ["s1", "s4"] == [line["id"] for line in lines if line.get("no_loss") == "not finite"]
    assert all(0 < line["loss"] < 100 for line in lines if line["id"] not in without)
    assert "8 conversations, 0 rejected, 2 without a finite loss" in printed.err
    main([*asked, "--output", str(tmp_path / "report")])
    assert "no finite loss  2  (s1, s4)" in capsys.readouterr().out
    report = (tmp_path / "report" / "report.html").read_text()
    assert "2 of 8 samples have no finite loss" in report
    assert "nan" not in report.casefold().replace("nano", "")
