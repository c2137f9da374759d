"""The chat command: the original's words from the original's folders, a conversation typed in, Ctrl-C."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import originals
import pytest
from engines import spoil
from fakes import make_language_model, make_vision_tower

from llava_ray.config.model import ModelConfig
from llava_ray.errors import ConfigError, ImageError, ModelError, RecordError
from llava_ray.generate import chat
from llava_ray.generate.chat import ChatReply, ChatSession
from llava_ray.generate.decoding import answer_text
from llava_ray.model.assembly import LlavaParts, assemble
from llava_ray.model.saving import save_bundle
from pipelines.chat import main
from pipelines.command import run_command

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return originals.copy_golden("v15_mlp_pad", tmp_path_factory.mktemp("chat") / "v15")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> LlavaParts:
    root = tmp_path_factory.mktemp("parts")
    config = ModelConfig(
        model_name_or_path=str(make_language_model(root / "language_model")),
        vision_tower=str(make_vision_tower(root / "tower")),
    )
    made = assemble(config, "pad", seed=3)
    made.llava.eval()
    return made


@pytest.fixture(scope="module")
def bundle(parts: LlavaParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "model"
    save_bundle(folder, parts)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> str:
    from PIL import Image

    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


def test_the_script_gives_the_originals_words(golden: Path) -> None:
    """As a command of its own; stdout ends with one JSON object."""
    case = json.loads((golden / "expected.json").read_text())["generations"][3]
    command = [sys.executable, ROOT / "pipelines" / "chat.py", golden, "--vision_tower", golden / "tower"]
    command += ["--image", golden / "images" / case["image"], "--prompt", case["question"]]
    done = subprocess.run(
        [*command, "--max_new_tokens", "12", "--temperature", "0", "--json"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout.splitlines()[-1])
    assert reply.keys() == {"ids", "text"}
    assert reply["ids"] == case["new_token_ids"]
    assert "v15: original LLaVA, template 'v1' (that of published models like it)" in done.stderr


def test_every_golden_question(golden: Path, capsys) -> None:
    cases = json.loads((golden / "expected.json").read_text())["generations"]
    for case in cases[:3]:
        question = case["question"].removeprefix("<image>\n")  # its marker is put back
        arguments = [str(golden), "--image", str(golden / "images" / case["image"]), "--prompt", question]
        main([*arguments, "--max_new_tokens", "12", "--temperature", "0", "--json"])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["ids"] == case["new_token_ids"]


def test_a_lora_folder_over_its_base(tmp_path: Path, capsys) -> None:
    """Adapter, projector and tower are found and used; what is said is not what the base alone says."""
    folder = originals.copy_golden("lora", tmp_path / "golden")
    asked = ["--vision_tower", str(folder / "tower"), "--image", str(folder / "images" / "0.png")]
    asked += ["--prompt", "How many?", "--max_new_tokens", "12", "--temperature", "0", "--json"]
    main([str(folder / "lora"), "--model_base", str(folder / "base"), *asked])
    first = capsys.readouterr()
    assert "language model " + str(folder / "base") in first.err
    assert first.err.rstrip().endswith("adapter")
    main([str(folder / "base"), "--version", "v1", *asked])
    second = capsys.readouterr()
    assert "its projector is new and untrained" in second.err
    assert json.loads(first.out.splitlines()[-1])["ids"] != json.loads(second.out.splitlines()[-1])["ids"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["nowhere", "--prompt", "x"], ModelError, "no such language model: 'nowhere'"),
        (["MODEL", "--prompt", "x", "--image", "gone.png"], ImageError, r"gone\.png"),
        (["MODEL", "--prompt", "<image> and <image>", "--image", "IMAGE"], RecordError, "2 <image> markers but 1 ima"),
        (["MODEL", "--prompt", "x", "--max_new_tokens", "3000"], RecordError, r"an answer may take 3000, but .* 2048"),
        (["MODEL", "--prompt", "x", "--version", "v7"], ConfigError, "no conversation template is called 'v7'"),
    ],
)
def test_what_does_not_fit_is_named(arguments, error, message: str, bundle: Path, image: str) -> None:
    places = {"MODEL": str(bundle), "IMAGE": image}
    with pytest.raises(error, match=message):
        main([places.get(argument, argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL", "--json"], "--json writes one answer: give the question with --prompt"),
        (["MODEL", "--prompt", "x", "--max_new_tokens", "0"], "expected at least 1"),
        (["MODEL", "--bits", "5"], "--bits"),
    ],
)
def test_options_that_make_no_sense(arguments, message: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())  # in a box, wrapped


def test_a_conversation_typed_in(parts, image, bundle: Path, capsys, monkeypatch) -> None:
    lines = ["Who?", f"/image {image}", "", "/image gone.png", "What?", "/help", "/clear", "Who?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    main([str(bundle), "--max_new_tokens", "6", "--temperature", "0"])
    heard = capsys.readouterr()
    assert "gone.png" in heard.err
    session = ChatSession(parts, 6, 0.0)
    first = session.ask("Who?").text
    session.show(image)
    second = session.ask("What?").text
    answers = heard.out.split("> ")
    assert answers[1].strip() == answers[8].strip() == first
    assert answers[5].strip() == second
    assert "/clear begins anew" in answers[6]


def test_turns_and_images_add_up(parts, image) -> None:
    session = ChatSession(parts, 4, 0.0)
    session.show(image)
    session.show(image)
    session.ask("Are they alike?")
    session.show(image)
    session.ask("And <image> this?")
    assert [turn.value.count("<image>") for turn in session.turns] == [2, 0, 1, 0]
    assert len(session.images) == 3
    session.clear()
    assert (session.turns, session.images) == ([], [])


def test_an_answer_that_writes_a_marker_asks_for_no_image(parts, monkeypatch) -> None:
    session = ChatSession(parts, 4, 0.0)
    monkeypatch.setattr(session, "write", lambda *_: ChatReply([], "It is <image>.</s>"))
    session.ask("Who?")
    session.ask("Who?")
    assert [turn.value.count("<image>") for turn in session.turns] == [0] * 4


def test_what_is_heard_is_the_answer(parts) -> None:
    pieces: list[str] = []
    reply = ChatSession(parts, 24, 0.0).ask("Who?", pieces.append)
    assert len(reply.ids) == 24
    assert "".join(pieces) == reply.text == answer_text(parts, reply.ids).rstrip("\N{REPLACEMENT CHARACTER}")
    assert len([piece for piece in pieces if piece]) > 4


def test_half_a_character_is_neither_heard_nor_kept(parts, monkeypatch) -> None:
    """A byte-level tokenizer writes most characters in several tokens; the answer ends in the middle of one."""
    ids = parts.tokenizer.encode("一只猫 café", add_special_tokens=False)[:-1]

    def write(*arguments, on_tokens, **options) -> None:
        for end in range(1, len(ids) + 1):
            on_tokens([ids[:end]])

    monkeypatch.setattr(chat, "generate_batch", write)
    pieces: list[str] = []
    reply = ChatSession(parts, 24, 0.0).ask("Who?", pieces.append)
    assert (reply.ids, reply.text) == (ids, "一只猫 caf")
    assert "".join(pieces) == reply.text


def test_ctrl_c_ends_the_answer_not_the_conversation(parts) -> None:
    session = ChatSession(parts, 24, 0.0)
    whole = ChatSession(parts, 24, 0.0).ask("Who?")
    heard: list[str] = []

    def interrupt(piece: str) -> None:
        heard.append(piece)
        if len(heard) == 4:
            raise KeyboardInterrupt

    reply = session.ask("Who?", interrupt)
    assert reply.ids == whole.ids[: len(reply.ids)]
    assert 0 < len(reply.ids) < 24
    assert session.turns[-1].value == reply.text
    assert session.ask("Who else?").ids


def test_nothing_said_is_nothing_asked(parts, image, monkeypatch) -> None:
    """A template takes no empty answer; the question's image stays for the next one."""
    session = ChatSession(parts, 4, 0.0)
    session.show(image)
    monkeypatch.setattr(chat, "generate_batch", lambda *arguments, **options: [[]])
    assert session.ask("Who?").text == ""
    assert (session.turns, session.images, len(session.pending)) == ([], [], 1)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_logits_that_are_not_finite_are_one_line_and_exit_code_1(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, temperature: str
) -> None:
    load = chat.load_pretrained_model
    monkeypatch.setattr(chat, "load_pretrained_model", lambda *given, **named: spoil(load(*given, **named), "~"))
    arguments = [str(bundle), "--prompt", "What ~ is this?", "--temperature", temperature, "--json"]
    monkeypatch.setattr(sys, "argv", ["chat.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert str(ended.value.code).startswith("ModelError: the model's logits are not finite (token 1 of the answer")
    assert "\n" not in str(ended.value.code)
