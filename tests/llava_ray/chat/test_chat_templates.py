import hashlib
import pickle

import pytest

from llava_ray.chat import system_prompts
from llava_ray.chat.template import JinjaTemplate
from llava_ray.chat.templates import TEMPLATES, find_template
from llava_ray.errors import ConfigError

NAMES = [
    "default",
    "v0",
    "llava_v0",
    "v0_mmtag",
    "v1",
    "vicuna_v1",
    "llava_v1",
    "v1_mmtag",
    "llama_2",
    "llava_llama_2",
    "mistral_instruct",
    "chatml_direct",
    "mistral_direct",
    "mpt",
    "plain",
    "v0_plain",
]


def test_the_table_holds_llavas_templates_under_their_names():
    assert sorted(TEMPLATES) == sorted(NAMES)
    assert all(find_template(name).name == name for name in NAMES)


@pytest.mark.parametrize(
    ("text", "num_chars", "digest"),
    [
        (system_prompts.VICUNA_HUMAN, 156, "ace78a978005f68a"),
        (system_prompts.VICUNA_USER, 154, "1fa69e2371b762d1"),
        (system_prompts.IMAGE_TAGS, 311, "563c2a621b1102ed"),
        (system_prompts.LLAMA_2_CHAT, 508, "d52c188a3c969c4e"),
        (system_prompts.LANGUAGE_AND_VISION, 186, "790f4cfc05523b0e"),
        (system_prompts.CHATML, 40, "9ce12280308edf14"),
        (system_prompts.MPT_CHAT, 127, "c20002e5cc3abfc8"),
    ],
)
def test_system_prompts_are_the_originals_to_the_byte(text, num_chars, digest):
    assert (len(text), hashlib.sha256(text.encode()).hexdigest()[:16]) == (num_chars, digest)


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"'vicuna_v2'.*Did you mean 'vicuna_v1'\?.*mistral_instruct.*chat_template"):
        find_template("vicuna_v2")


def test_chat_template_needs_a_tokenizer_that_has_one(make_byte_tokenizer):
    with pytest.raises(ConfigError, match="no tokenizer was given"):
        find_template("chat_template")
    with pytest.raises(ConfigError, match=r"has none.*chat_template\.jinja"):
        find_template("chat_template", make_byte_tokenizer("<|im_end|>"))


def test_chat_template_is_the_tokenizers_own(make_byte_tokenizer):
    template = find_template("chat_template", make_byte_tokenizer("<|im_end|>", chat_template="{{ messages }}"))
    assert isinstance(template, JinjaTemplate)
    assert (template.stop, template.add_bos) == ("<|im_end|>", False)


def test_templates_travel_to_workers():
    assert pickle.loads(pickle.dumps(TEMPLATES)) == TEMPLATES
