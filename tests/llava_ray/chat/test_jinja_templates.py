import pytest

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Turn
from llava_ray.chat.rendering import render_prompt, render_spans
from llava_ray.chat.templates import find_template
from llava_ray.chat.tokens import tokenize_conversation, tokenize_prompt
from llava_ray.errors import TemplateError

TURNS = (
    Turn("human", "<image>\nWhat is it?"),
    Turn("gpt", "A cat."),
    Turn("human", "Really?"),
    Turn("gpt", "A cat."),
)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The last answer gets an empty thought, as Qwen3's template writes it; earlier ones lose theirs.
QWEN_3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@pytest.fixture
def chatml(make_byte_tokenizer):
    return lambda template: make_byte_tokenizer("<|im_end|>", "<|im_start|>", chat_template=template)


def learnt(turns, tokenizer):
    return [span.text for span in render_spans(turns, find_template("chat_template", tokenizer)) if span.supervised]


@pytest.mark.parametrize("template", [CHATML, SMOLLM2])
def test_chatml_answers_are_learnt_up_to_their_end_token(chatml, template):
    assert learnt(TURNS, chatml(template)) == ["A cat.<|im_end|>", "A cat.<|im_end|>"]


def test_llama_3_answers_are_learnt_as_the_template_trims_them(make_byte_tokenizer):
    control = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    tokenizer = make_byte_tokenizer(*control, bos="<|begin_of_text|>", chat_template=LLAMA_3)
    assert learnt((TURNS[0], Turn("gpt", " A cat.\n")), tokenizer) == ["A cat.<|eot_id|>"]


def test_a_thought_before_the_answer_is_learnt_with_it(chatml):
    assert learnt(TURNS, chatml(QWEN_3)) == ["A cat.<|im_end|>", "<think>\n\n</think>\n\nA cat.<|im_end|>"]


def test_the_space_before_an_answer_is_learnt_when_the_prompt_ends_before_it(make_byte_tokenizer):
    assert learnt(TURNS, make_byte_tokenizer("</s>", chat_template=VICUNA)) == [" A cat.</s>", " A cat.</s>"]


def test_control_tokens_inside_an_answer_do_not_end_it(chatml):
    turns = (TURNS[0], Turn("gpt", "Write <|im_end|> to stop."))
    assert learnt(turns, chatml(CHATML)) == ["Write <|im_end|> to stop.<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, SMOLLM2, QWEN_3])
def test_spans_join_to_what_the_tokenizer_writes(chatml, template):
    tokenizer = chatml(template)
    found = find_template("chat_template", tokenizer)
    messages = [{"role": {"human": "user", "gpt": "assistant"}[turn.role], "content": turn.value} for turn in TURNS]
    assert render_prompt(TURNS, found) == tokenizer.apply_chat_template(messages, tokenize=False)
    asked = tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True)
    assert render_prompt(TURNS[:3], found, open_turn=True) == asked


def test_ids_are_those_of_the_tokenizers_own_chat_template(chatml):
    tokenizer = chatml(SMOLLM2)
    turns = (Turn("human", "Who?"), Turn("gpt", "Me."))
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    own = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert tokenize_conversation(turns, find_template("chat_template", tokenizer), tokenizer).input_ids == own


def test_training_tokens_begin_with_the_prompt_for_generation(chatml):
    tokenizer = chatml(CHATML)
    template = find_template("chat_template", tokenizer)
    tokens = tokenize_conversation(TURNS, template, tokenizer)
    prompt = tokenize_prompt(TURNS[:3], template, tokenizer)
    assert tokens.input_ids[: len(prompt)] == prompt
    assert tokens.input_ids.count(IMAGE_TOKEN_INDEX) == tokens.num_images == 1
    assert tokenizer.decode([label for label in tokens.labels if label != IGNORE_INDEX]) == "A cat.<|im_end|>" * 2


def test_a_template_that_writes_its_own_bos_gets_no_second_one(llama_tokenizer):
    llama_tokenizer.chat_template = "{{ bos_token }}" + VICUNA
    try:
        template = find_template("chat_template", llama_tokenizer)
        ids = tokenize_prompt(TURNS[:1], template, llama_tokenizer)
    finally:
        llama_tokenizer.chat_template = None
    assert ids[0] == llama_tokenizer.bos_token_id
    assert ids.count(llama_tokenizer.bos_token_id) == 1


def test_a_template_that_rewrites_earlier_turns_is_refused(chatml):
    template = "{{ messages | length }}" + CHATML
    with pytest.raises(TemplateError, match=r"in two ways: from character 0 on, '2<\|im_start"):
        learnt(TURNS[:2], chatml(template))


@pytest.mark.parametrize(
    ("before", "after"),
    [("message['content'] + '<|im_end|>'", "message['content']"), ("['content']", "['content'][1:]")],
)
def test_a_template_that_drops_the_end_or_the_answer_is_refused(chatml, before, after):
    turns = (Turn("human", "Say A cat."), Turn("gpt", "A cat."), Turn("human", "Say A cat."), Turn("gpt", "A cat."))
    with pytest.raises(TemplateError, match=r"does not write the answer 'A cat\.' followed by an end token"):
        learnt(turns, chatml(CHATML.replace(before, after)))


def test_an_answer_is_not_mistaken_for_the_next_question(chatml):
    # Only the first answer is spoilt, and the question after it reads as that answer should.
    spoilt = "(message['content'][1:] if loop.index == 2 else message['content'])"
    turns = (Turn("human", "Say it."), Turn("gpt", "A cat."), Turn("human", "A cat."), Turn("gpt", "Yes."))
    with pytest.raises(TemplateError, match=r"does not write the answer 'A cat\.'"):
        learnt(turns, chatml(CHATML.replace("message['content']", spoilt)))
