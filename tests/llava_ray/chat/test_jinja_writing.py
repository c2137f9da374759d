"""Fixed strings written as Jinja say what rendering says, and tokenise to what training saw."""

import pytest
from originals import GOLDEN
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from llava_ray.chat.conversation import IMAGE_TOKEN_INDEX, Turn
from llava_ray.chat.jinja import write_jinja
from llava_ray.chat.rendering import place_images, render_prompt
from llava_ray.chat.templates import TEMPLATES
from llava_ray.chat.tokenizer import load_tokenizer
from llava_ray.chat.tokens import tokenize_prompt
from llava_ray.errors import RecordError
from llava_ray.model.formats.exported_tokenizer import add_image_token, write_template

WORDS = {"human": "user", "gpt": "assistant"}
CONVERSATIONS = [
    [Turn("human", "<image>\nWhat is it?")],
    [Turn("human", "What is it? <image>"), Turn("gpt", "A 'cat'."), Turn("human", "Really?")],
    [Turn("human", "Hi"), Turn("gpt", "A \\ back\nslash.")],
    [Turn("human", "<image>")],
    [Turn("human", "first <image> then <image>\nwhich?"), Turn("gpt", "Both."), Turn("human", "<image>\n?")],
]


def render(jinja: str, messages: list[dict], *, open_turn: bool) -> str:
    return render_jinja_template(
        conversations=[messages], chat_template=jinja, add_generation_prompt=open_turn, bos_token="<s>"
    )[0][0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_writes_what_rendering_writes(name: str) -> None:
    template, num_written = TEMPLATES[name], 0
    for turns in CONVERSATIONS:
        open_turn = turns[-1].role == "human"
        try:
            expected = render_prompt(place_images(turns, template), template, open_turn=open_turn)
        except RecordError:  # more than a caption
            continue
        messages = [{"role": WORDS[turn.role], "content": turn.value} for turn in turns]
        assert render(write_jinja(template, bos=False), messages, open_turn=open_turn) == expected
        assert render(write_jinja(template, bos=True), messages, open_turn=open_turn) == "<s>" + expected
        num_written += 1
    assert num_written


def test_content_may_be_a_list_of_items() -> None:
    jinja = write_jinja(TEMPLATES["v1"], bos=False)
    items = [{"type": "text", "text": "What is it?"}, {"type": "image"}]
    listed = [
        {"role": "user", "content": items},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    plain = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A cat."}]
    assert render(jinja, listed, open_turn=False) == render(jinja, plain, open_turn=False)


def test_a_system_message_is_refused_not_dropped() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(Exception, match="trained with one fixed system prompt"):
        render(write_jinja(TEMPLATES["v1"], bos=False), messages, open_turn=True)


@pytest.fixture(scope="module")
def with_image_token(llama_folder) -> dict[bool, tuple[PreTrainedTokenizerBase, int]]:
    """The same tokenizers once more, with the hub's image token."""
    tokenizers = {legacy: load_tokenizer(llama_folder(legacy)) for legacy in (True, False)}
    return {legacy: (tokenizer, add_image_token(tokenizer)) for legacy, tokenizer in tokenizers.items()}


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    "name", ["v1", "llava_llama_2", "mistral_instruct", "chatml_direct", "v0", "v1_mmtag", "plain"]
)
def test_sentencepiece_sees_what_training_saw(name: str, legacy: bool, llama_tokenizers, with_image_token) -> None:
    """The text after an image begins anew in training; one space says so where all is one text."""
    plain, (hub, image_token) = llama_tokenizers[legacy], with_image_token[legacy]
    jinja, note = write_template(TEMPLATES[name], plain, hub, image_token)
    assert note is None
    turns = [Turn("human", "<image>\nHow  many?")]
    expected = [image_token if i == IMAGE_TOKEN_INDEX else i for i in tokenize_prompt(turns, TEMPLATES[name], plain)]
    messages = [{"role": "user", "content": turns[0].value}]
    text = hub.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=True)
    assert hub(text, add_special_tokens=False)["input_ids"] == expected


def test_a_template_that_splits_otherwise_is_told(tmp_path) -> None:
    """A tokenizer's own template without the space: said, with the tokens that differ."""
    from llava_ray.chat.templates import find_template

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((GOLDEN / "v15_mlp_pad" / name).read_bytes())
    (tmp_path / "tokenizer.model").write_bytes((GOLDEN / "tokenizer.model").read_bytes())
    plain, hub = load_tokenizer(tmp_path), load_tokenizer(tmp_path)
    own = "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    plain.chat_template = hub.chat_template = own
    _, note = write_template(find_template("chat_template", plain), plain, hub, add_image_token(hub))
    assert note is not None
    assert "transformers splits" in note
    assert "'<0x0A>'" in note
