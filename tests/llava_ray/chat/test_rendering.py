import hashlib

import pytest

from llava_ray.chat.conversation import Span, Turn
from llava_ray.chat.rendering import place_images, render_prompt, render_spans
from llava_ray.chat.template import Template
from llava_ray.chat.templates import TEMPLATES
from llava_ray.errors import RecordError, TemplateError

ASKED = (Turn("human", "<image>\nHi"), Turn("gpt", "Hello."), Turn("human", "More?"))
EXCHANGE = (Turn("human", "Hi"), Turn("gpt", "Hello."))
CONVERSATIONAL = sorted(name for name in TEMPLATES if name not in ("plain", "v0_plain"))

# Characters and sha256[:16] of ASKED with an open turn, from the original code.
RENDERED = {
    "v1": (215, "85a504577696af5d"),
    "vicuna_v1": (215, "85a504577696af5d"),
    "llava_v1": (217, "37825b1bc34cc8d9"),
    "v1_mmtag": (372, "c555d39a4b8015a4"),
    "v0_mmtag": (379, "3156757671cb7729"),
    "v0": (1711, "dcb19cffd328c978"),
    "default": (1711, "dcb19cffd328c978"),
    "llava_v0": (224, "26a2e239360f7f8d"),
    "llama_2": (587, "2da2c6dbe1321d0e"),
    "llava_llama_2": (265, "7a61e6644d26a084"),
    "mistral_instruct": (57, "10f7a518738e8e06"),
    "chatml_direct": (179, "6e39f9bb86fccb53"),
    "mistral_direct": (179, "6e39f9bb86fccb53"),
    "mpt": (266, "bcd80939eb9b2b1d"),
}


def test_every_conversational_template_has_a_rendered_hash():
    assert sorted(RENDERED) == CONVERSATIONAL


@pytest.mark.parametrize("name", CONVERSATIONAL)
def test_prompts_are_the_originals_to_the_byte(name):
    prompt = render_prompt(ASKED, TEMPLATES[name], open_turn=True)
    assert (len(prompt), hashlib.sha256(prompt.encode()).hexdigest()[:16]) == RENDERED[name]


@pytest.mark.parametrize("name", CONVERSATIONAL)
def test_what_is_learnt_follows_the_prompt_for_generation(name):
    spans = render_spans((*ASKED, Turn("gpt", "No.")), TEMPLATES[name])
    assert all(span.text for span in spans)
    assert "".join(span.text for span in spans[:-1]) == render_prompt(ASKED, TEMPLATES[name], open_turn=True)
    assert [span.supervised for span in spans][-1]


@pytest.mark.parametrize(
    ("name", "learnt"),
    [
        ("v1", [" Hello.</s>", " No.</s>"]),
        ("v1_mmtag", [" Hello.</s>", " No.</s>"]),
        ("llama_2", [" Hello. </s>", " No. </s>"]),
        ("mistral_instruct", [" Hello. </s>", " No. </s>"]),
        ("llava_v0", [" Hello.###", " No.###"]),
        ("mpt", ["Hello.<|im_end|>", "No.<|im_end|>"]),
    ],
)
def test_learnt_spans_are_answers_with_their_ends(name, learnt):
    spans = render_spans((*ASKED, Turn("gpt", "No.")), TEMPLATES[name])
    assert [span.text for span in spans if span.supervised] == learnt


def test_v0_writes_its_example_and_does_not_learn_it():
    spans = render_spans(EXCHANGE, TEMPLATES["v0"])
    assert "renewable energy sources" in spans[0].text
    assert [span.text for span in spans if span.supervised] == [" Hello.###"]


def test_llama_2_begins_without_the_separator_the_tokenizer_adds():
    prompt = render_prompt((*EXCHANGE, *EXCHANGE), TEMPLATES["llava_llama_2"])
    assert prompt.startswith("[INST] <<SYS>>\n")
    assert prompt.count("<s>[INST] Hi [/INST] Hello. </s>") == 1


def test_llama_2_keeps_a_question_that_begins_like_its_separator():
    # The original strips the characters '<', 's' and '>' off the prompt's front; '[INST]' always stops it in time.
    assert render_prompt([Turn("human", "<s>so")], TEMPLATES["mistral_instruct"]) == "[INST] <s>so [/INST]"


def test_plain_renders_where_the_original_raised():
    # get_prompt of the original adds None to a string here (TypeError); its training code goes around it.
    turns = (Turn("human", "Describe.\n<image>"), Turn("gpt", "A cat."))
    spans = render_spans(turns, TEMPLATES["plain"])
    assert spans == [Span("<image>", supervised=False), Span("A cat.\n", supervised=True)]
    assert render_prompt(turns[:1], TEMPLATES["plain"], open_turn=True) == "<image>"


@pytest.mark.parametrize("turns", [EXCHANGE, (*ASKED, Turn("gpt", "No."))])
def test_plain_refuses_what_is_not_an_image_and_its_caption(turns):
    with pytest.raises(RecordError, match="expected one exchange") as caught:
        render_spans(turns, TEMPLATES["plain"])
    assert caught.value.reason == "plain_turns"


@pytest.mark.parametrize("name", CONVERSATIONAL)
def test_an_empty_answer_is_refused_where_the_original_merged_two_turns(name):
    with pytest.raises(RecordError) as caught:
        render_spans((Turn("human", "Hi"), Turn("gpt", "")), TEMPLATES[name])
    assert caught.value.reason == "empty_answer"


def test_an_empty_question_keeps_its_place():
    turns = (Turn("human", ""), Turn("gpt", "Hello."))
    assert render_prompt(turns, TEMPLATES["v1"]).endswith("questions. USER:  ASSISTANT: Hello.</s>")


def test_a_last_question_without_answer_is_written_and_closed():
    assert render_prompt(ASKED, TEMPLATES["v1"]).endswith("</s>USER: More? ")


def test_an_open_turn_needs_a_question_before_it():
    with pytest.raises(TemplateError, match="open turn was requested after an answer"):
        render_spans(EXCHANGE, TEMPLATES["v1"], open_turn=True)


def test_a_template_of_another_kind_is_refused():
    with pytest.raises(TemplateError, match="find_template"):
        render_spans(EXCHANGE, Template(name="mine", stop=""))


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("v1", "What is it?", "What is it?"),
        ("v1", "What is it?\n<image>", "<image>\nWhat is it?"),
        ("v1", " Look: <image> there ", "<image>\nLook:  there"),
        ("v1", "<image>", "<image>"),
        ("v1", "First <image>, then <image>. ", "First <image>, then <image>. "),
        ("v1_mmtag", "What is it?\n<image>", "<Image><image></Image>\nWhat is it?"),
        ("v0_mmtag", "<image> or <image>", "<Image><image></Image> or <Image><image></Image>"),
    ],
)
def test_markers_are_placed_as_in_the_original(name, before, after):
    placed = place_images([Turn("human", before)], TEMPLATES[name])
    assert placed == (Turn("human", after),)
    assert place_images(placed, TEMPLATES[name]) == placed
