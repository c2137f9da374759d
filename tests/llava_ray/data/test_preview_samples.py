"""What a preview shows of records: tokens, cuts, reasons, order. No model."""

import json
import random
import tarfile
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import make_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX, Turn
from llava_ray.chat.rendering import place_images, render_prompt, render_spans
from llava_ray.chat.templates import find_template
from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.chat.tokens import tokenize_conversation
from llava_ray.config.preview import PreviewSettings
from llava_ray.data.examples import Encoder
from llava_ray.data.ordered_records import read_records
from llava_ray.errors import ConfigError, DataError, ModelError
from llava_ray.images.tokens import ImageTokens
from llava_ray.preview.samples import Rejection, SampleView, token_viewer
from llava_ray.preview.tokens import collapse_images, join_tokens, split_tokens
from llava_ray.report.pieces import ReportToken

CAT = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def view_all(tmp_path, tokenizer_folder):
    """Return a function that views records with a tokenizer only, by default under vicuna_v1."""

    def view_all(records, *, version="vicuna_v1", **settings):
        data = tmp_path / "data.json"
        data.write_text(json.dumps(records))
        viewer = token_viewer(
            PreviewSettings(data=str(data), tokenizer=str(tokenizer_folder), version=version, **settings)
        )
        return viewer, [viewer.view(record) for record in read_records(str(data))]

    return view_all


WORDS = ["cat", " ", "  ", "\n", "ASSISTANT:", "</s>", "一只猫", "😀", "👩‍👩‍👧", "é", "<", "image>", IMAGE_TOKEN]


@pytest.mark.parametrize("version", ["vicuna_v1", "llava_llama_2", "v1_mmtag", "mpt"])
def test_tokens_are_the_rendered_text_cut_at_the_ids(tokenizer_folder, version):
    draw = random.Random(version)
    tokenizer = load_tokenizer(tokenizer_folder)
    template = find_template(version)
    encoder = Encoder(tokenizer, template, ImageTokens(1, 1), 2048)
    for _ in range(30):
        turns = [
            Turn(role, start + "".join(draw.choices(WORDS, k=draw.randint(1, 8))))
            for _ in range(draw.randint(1, 3))
            for role, start in (("human", "Q"), ("gpt", "A"))
        ]
        tokens = split_tokens(turns, encoder)
        tokenized = tokenize_conversation(turns, template, tokenizer)
        assert len(tokens) == len(tokenized.input_ids)
        assert tokens[0] == ReportToken("<s>", "context")
        assert "".join(token.text for token in tokens[1:]) == render_prompt(place_images(turns, template), template)
        learnt = "".join(span.text for span in render_spans(place_images(turns, template), template) if span.supervised)
        shown = "".join(token.text for token in tokens if token.kind == "learnt")
        assert shown == learnt.replace(IMAGE_TOKEN, "")
        images = [token == IMAGE_TOKEN_INDEX for token in tokenized.input_ids]
        assert [token.kind == "image" for token in tokens] == images
        joined = join_tokens(tokens)
        assert "".join(token.text for token in joined) == "".join(token.text for token in tokens)
        assert all(token.text for token in joined)
        assert not any(a.kind == b.kind == "context" for a, b in pairwise(joined))


def test_text_that_no_token_stands_for_is_shown_all_the_same():
    backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # its tokens cover no space
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    turns = [Turn("human", "<image>\nWhat  is it?"), Turn("gpt", "A cat")]
    tokens = split_tokens(turns, Encoder(tokenizer, find_template("v1"), ImageTokens(1, 1), 2048))
    assert "".join(token.text for token in tokens) == render_prompt(turns, find_template("v1"))


def test_each_image_collapses_to_one_id(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    turns = [Turn("human", "<image><image> and <image>?"), Turn("gpt", "Yes")]
    template = find_template("v1")
    whole = tokenize_conversation(turns, template, tokenizer)
    example = Encoder(tokenizer, template, ImageTokens(1, 1), 2048).example(turns, range(3), [5, 1, 3])
    assert len(example.input_ids) == len(whole.input_ids) + 4 + 2
    assert collapse_images(example) == (whole.input_ids, whole.labels)


def test_a_long_sample_is_cut_and_says_how_much(view_all):
    records = [{"id": "a", "conversations": [*CAT, *[{"from": "human", "value": "And?"}, CAT[1]] * 3]}]
    _, [whole] = view_all(records)
    viewer, [cut] = view_all(records, model_max_length=whole.num_tokens - 20)
    assert not whole.example.truncated
    assert cut.example.truncated
    assert (cut.num_tokens, cut.num_cut) == (whole.num_tokens - 20, 20)
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:-20], whole.labels[:-20])
    tokens = viewer.tokens(cut)
    assert [token.kind for token in tokens].count("cut") == 1
    assert tokens[-1].kind == "cut"
    assert tokens[-1].text.endswith("A cat.</s>")


def test_nothing_is_cut_without_a_limit(view_all):
    viewer, [view] = view_all([{"id": "a", "conversations": CAT * 200}])
    assert not viewer.is_limited
    assert len(view.input_ids) > 5000


def test_what_training_rejects_is_told_with_its_reason(view_all):
    human, gpt = CAT
    records = {
        "fine": CAT,
        "twice": [human, human, gpt],
        "silent": [human, {"from": "gpt", "value": " "}],
        "stranger": [{"from": "bob", "value": "Hi"}],
        "nobody": [],
        "unanswered": [human],
    }
    _, views = view_all([{"id": name, "conversations": turns} for name, turns in records.items()])
    assert isinstance(views[0], SampleView)
    reasons = {view.id: view.reason for view in views[1:]}
    assert reasons == {
        "twice": "alternation",
        "silent": "empty_answer",
        "stranger": "roles",
        "nobody": "no_turns",
        "unanswered": "nothing_to_learn",
    }
    assert "record 'twice' (data.json:1): turn 2 of 3" in views[1].message


def test_what_a_template_cannot_write_is_told(view_all):
    _, [view] = view_all([{"id": "a", "conversations": CAT * 2}], version="plain")
    assert (view.id, view.reason) == ("a", "plain_turns")


def test_images_need_not_be_there_but_must_agree_if_named(view_all):
    _, [unnamed, named, wrong] = view_all(
        [
            {"id": "unnamed", "conversations": CAT},
            {"id": "named", "image": "nowhere.jpg", "conversations": CAT},
            {"id": "wrong", "image": ["a.jpg", "b.jpg"], "conversations": CAT},
        ]
    )
    assert unnamed.input_ids == named.input_ids
    assert unnamed.input_ids.count(IMAGE_TOKEN_INDEX) == 1
    assert unnamed.pixels is None
    assert isinstance(wrong, Rejection)
    assert wrong.reason == "image_count"


def test_ids_are_as_the_data_writes_them(view_all):
    records = [{"conversations": CAT}, *({"id": name, "conversations": CAT} for name in ("a", 7, 7, "7"))]
    _, views = view_all(records)
    assert [view.id for view in views] == ["0", "a", 7, "7#2", "7#3"]


def test_records_come_in_the_order_of_their_file(tmp_path):
    records = [{"id": f"r{index}", "conversations": CAT} for index in range(50)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "data.parquet", row_group_size=7)
    names = [record["id"] for record in records]
    for kind in ("json", "jsonl", "parquet"):
        path = str(tmp_path / f"data.{kind}")
        assert [record.id for record in read_records(path)] == names
        assert [record.id for record in read_records(path, 9)] == names[:9]


def test_tars_bring_their_own_ids(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps({"conversations": CAT}))
    with tarfile.open(tmp_path / "part.tar", "w") as tar:
        tar.add(tmp_path / "one.json", "one.json")
    assert [record.id for record in read_records(str(tmp_path / "part.tar"))] == ["part/one"]


@pytest.mark.parametrize(("version", "warned"), [("vicuna_v1", False), ("plain", False), ("v0", True), ("mpt", False)])
def test_a_stop_string_of_several_tokens_is_warned_of(view_all, version, warned):
    viewer, _ = view_all([], version=version)  # "###" is three tokens of this tokenizer
    warnings = viewer.warnings()
    assert len(warnings) == warned
    if warned:
        assert "'v0' stops at '###', but the last supervised token of an answer is '#'" in warnings[0]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"version": "v1"}, ConfigError, "give --model BUNDLE, or --tokenizer DIR with --version TEMPLATE"),
        ({"tokenizer": "HERE"}, ConfigError, "found --tokenizer .*, --version None"),
        ({"tokenizer": "/nowhere", "version": "v1"}, ModelError, "no such tokenizer: '/nowhere' is neither a folder"),
        ({"tokenizer": "HERE", "version": "vicuna"}, ConfigError, "no conversation template is called 'vicuna'"),
        ({"tokenizer": "HERE", "version": "v1", "data": "/nowhere.json"}, DataError, "does not exist"),
    ],
)
def test_what_is_missing_is_named(tmp_path, tokenizer_folder, settings, error, message):
    (tmp_path / "data.json").write_text("[]")
    given = {"data": str(tmp_path / "data.json"), **settings}
    given = {key: str(tokenizer_folder) if value == "HERE" else value for key, value in given.items()}
    with pytest.raises(error, match=message):
        token_viewer(PreviewSettings(**given))


@pytest.mark.parametrize("name", ["max_samples", "model_max_length"])
def test_a_limit_that_leaves_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=f"--{name} 0: expected at least 1"):
        PreviewSettings(data="data.json", **{name: 0})


def test_labels_are_masked_with_the_images(view_all):
    _, [view] = view_all([{"id": "a", "conversations": CAT}])
    place = view.input_ids.index(IMAGE_TOKEN_INDEX)
    assert view.labels[place] == IGNORE_INDEX
    assert view.example.num_supervised == sum(label != IGNORE_INDEX for label in view.labels)


def test_a_preference_is_shown_as_its_two_conversations(tmp_path, tokenizer_folder):
    asked, images = "<image>\nWhat is it?", ["a.jpg"]
    data = tmp_path / "pairs.json"
    pair = {"id": "p", "images": images, "prompt": asked, "chosen": "A cat.", "rejected": "A dog."}
    data.write_text(json.dumps([pair, pair | {"id": "q", "rejected": "A cat."}, {"id": "r", "conversations": CAT}]))
    viewer = token_viewer(PreviewSettings(data=str(data), tokenizer=str(tokenizer_folder), version="v1"))
    views = [view for record in read_records(str(data)) for view in viewer.view_sides(record)]
    assert [view.id for view in views] == ["p (chosen)", "p (rejected)", "q", "r"]
    assert [view.turns[-1].value for view in views if isinstance(view, SampleView)] == ["A cat.", "A dog.", "A cat."]
    assert isinstance(views[2], Rejection) and views[2].reason == "equal_sides"
