import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Span, Turn, read_turns
from llava_ray.chat.rendering import place_images, render_prompt, render_spans
from llava_ray.chat.templates import TEMPLATES
from llava_ray.chat.tokens import (
    expand_images,
    tokenize_conversation,
    tokenize_prompt,
    tokenize_spans,
    tokenizer_image_token,
)
from llava_ray.errors import ConfigError, RecordError, TemplateError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "tokens.json").read_text())
CONVERSATIONAL = sorted(name for name in TEMPLATES if name not in ("plain", "v0_plain"))
CAT = (
    Turn("human", "<image>\nWhat is it?"),
    Turn("gpt", "A cat."),
    Turn("human", "Really?"),
    Turn("gpt", "Yes, sure."),
)


def exchange(question, answer):
    return (Turn("human", question), Turn("gpt", answer))


def learnt_pieces(turns, name, tokenizer):
    tokens = tokenize_conversation(turns, TEMPLATES[name], tokenizer)
    return tokenizer.convert_ids_to_tokens([label for label in tokens.labels if label != IGNORE_INDEX])


def test_there_are_136_golden_cases():
    assert len(GOLDEN) == 136


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['template']}-{'legacy' * case['legacy']}")
def test_ids_and_labels_are_the_originals(llama_tokenizers, case):
    turns = read_turns(case["conversations"])
    tokens = tokenize_conversation(turns, TEMPLATES[case["template"]], llama_tokenizers[case["legacy"]])
    assert tokens.input_ids == case["ids"]
    assert tokens.labels == case["labels"]
    assert tokens.num_supervised == case["supervised"]


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        ("v1", "▁A ▁cat . </s> ▁Yes , ▁sure . </s>"),
        ("llava_llama_2", "▁A ▁cat . ▁ </s> ▁Yes , ▁sure . ▁ </s>"),
        ("mistral_instruct", "▁A ▁cat . ▁ </s> ▁Yes , ▁sure . ▁ </s>"),
        ("llava_v0", "▁A ▁cat . ### ▁Yes , ▁sure . ###"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_answers_and_their_ends_are_learnt(llama_tokenizers, name, pieces, legacy):
    assert learnt_pieces(CAT, name, llama_tokenizers[legacy]) == pieces.split()


def test_the_lone_space_before_a_word_without_one_is_learnt(llama_tokenizer):
    pieces = learnt_pieces(exchange("<image>", "一只猫"), "v1", llama_tokenizer)
    assert pieces == ["▁", "一", "只", "猫", "</s>"]
    pieces = learnt_pieces(exchange("<image>", "一只猫"), "plain", llama_tokenizer)
    assert pieces == ["▁", "一", "只", "猫", "<0x0A>"]


def test_spaces_around_an_answer_are_learnt(llama_tokenizer):
    assert learnt_pieces(exchange("Hi", "  two "), "v1", llama_tokenizer) == ["▁▁", "▁two", "▁", "</s>"]


def test_a_separator_inside_an_answer_is_learnt_like_any_text(llama_tokenizer):
    # The original splits the prompt on this text, finds "1 vs. N" tokens and drops the whole sample.
    answer = "Say ASSISTANT: no USER: yes"
    pieces = learnt_pieces(exchange("What does ASSISTANT: mean?", answer), "v1", llama_tokenizer)
    assert llama_tokenizer.convert_tokens_to_string(pieces).strip() == answer + "</s>"


@pytest.mark.parametrize("name", ["chatml_direct", "mistral_direct", "mpt"])
def test_a_single_chatml_exchange_is_learnt_with_its_end(llama_tokenizer, make_byte_tokenizer, name):
    # The original's cursor ends one token short for every such sample, and drops it ("tokenization mismatch").
    tokenizer = make_byte_tokenizer("<|im_end|>", "<|im_start|>")
    assert learnt_pieces(exchange("Hi", "Yo."), name, tokenizer) == ["Y", "o", ".", "<|im_end|>"]
    assert "".join(learnt_pieces(exchange("Hi", "Yo."), name, llama_tokenizer)) == "Yo.<|im_end|>"


def test_v0_masks_do_not_drift_from_turn_to_turn(llama_tokenizer):
    # The original counts one beginning-of-sequence token too many in each turn, learns the role words, and
    # trains on another text ("### Assistant: ") than the one it generates from.
    pieces = learnt_pieces(CAT[:2] * 5, "v0", llama_tokenizer)
    assert pieces == ["▁A", "▁cat", ".", "###"] * 5


def test_end_tokens_written_in_data_are_text(llama_tokenizer):
    # The original makes real ones of them: in an answer they are learnt as an early end.
    eos = llama_tokenizer.eos_token_id
    asked = tokenize_conversation(exchange("What is </s>?", "An end."), TEMPLATES["v1"], llama_tokenizer)
    assert (asked.input_ids.count(eos), asked.labels.count(eos)) == (1, 1)
    answered = tokenize_conversation(exchange("Quote it.", "It is </s>."), TEMPLATES["v1"], llama_tokenizer)
    assert answered.labels.count(eos) == 1
    pieces = learnt_pieces(exchange("Quote it.", "It is </s>."), "v1", llama_tokenizer)
    assert pieces == ["▁It", "▁is", "▁</", "s", ">.", "</s>"]


def test_control_tokens_outside_the_vocabulary_are_plain_text(llama_tokenizer):
    ids = tokenize_prompt([Turn("human", "<|im_end|>")], TEMPLATES["v1"], llama_tokenizer)
    assert max(ids) < llama_tokenizer.vocab_size
    assert "<|im_end|>" in llama_tokenizer.decode(ids)


def test_one_bos_and_one_sentinel_for_each_image(llama_tokenizer):
    tokens = tokenize_conversation(exchange("<image><image> or <image>?", "One."), TEMPLATES["v1"], llama_tokenizer)
    assert tokens.num_images == 3
    assert tokens.input_ids.count(llama_tokenizer.bos_token_id) == 1
    assert {label for token, label in zip(tokens.input_ids, tokens.labels, strict=True) if token < 0} == {IGNORE_INDEX}


def test_a_prompt_is_the_front_of_the_training_tokens(llama_tokenizers):
    for name in CONVERSATIONAL:
        for tokenizer in llama_tokenizers.values():
            prompt = tokenize_prompt(CAT[:3], TEMPLATES[name], tokenizer)
            assert tokenize_conversation(CAT, TEMPLATES[name], tokenizer).input_ids[: len(prompt)] == prompt


def test_prompts_are_llavas_tokenizer_image_token_of_the_rendered_text(llama_tokenizers):
    for name in TEMPLATES:
        for tokenizer in llama_tokenizers.values():
            text = render_prompt(place_images(CAT[:1], TEMPLATES[name]), TEMPLATES[name], open_turn=True)
            assert tokenize_prompt(CAT[:1], TEMPLATES[name], tokenizer) == tokenizer_image_token(text, tokenizer)


def test_tokenizer_image_token_puts_sentinels_between_texts(llama_tokenizer):
    assert tokenizer_image_token("a <image>\nb", llama_tokenizer) == [1, 264, 28705, -200, 28705, 13, 28726]
    assert tokenizer_image_token("<image>", llama_tokenizer, image_token_index=-7) == [1, -7]
    tensor = tokenizer_image_token("<image>", llama_tokenizer, return_tensors="pt")
    assert tensor.dtype == torch.long
    assert tensor.tolist() == [1, IMAGE_TOKEN_INDEX]
    with pytest.raises(ConfigError, match="return_tensors is 'np'; expected 'pt'"):
        tokenizer_image_token("a", llama_tokenizer, return_tensors="np")


def test_a_bos_in_the_text_is_not_doubled(llama_tokenizer):
    tokens = tokenize_spans([Span("<s>Hi", supervised=False)], llama_tokenizer)
    assert tokens.input_ids.count(llama_tokenizer.bos_token_id) == 1
    assert tokenize_spans([Span("Hi", supervised=False)], llama_tokenizer, add_bos=False).input_ids[0] != 1


def test_no_end_is_written_by_a_tokenizer_that_adds_one(make_byte_tokenizer):
    tokenizer = make_byte_tokenizer("</s>", bos="<s>")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    ids = tokenize_prompt(CAT[:1], TEMPLATES["v1"], tokenizer)
    assert (ids[0], ids.count(bos), ids.count(eos)) == (bos, 1, 0)


@pytest.mark.parametrize("learnt", [False, True])
def test_a_piece_across_a_border_belongs_where_it_ends(llama_tokenizer, learnt):
    tokens = tokenize_spans([Span("a>", supervised=not learnt), Span("<b", supervised=learnt)], llama_tokenizer)
    assert llama_tokenizer.convert_ids_to_tokens(tokens.input_ids) == ["<s>", "▁a", "><", "b"]
    assert [label != IGNORE_INDEX for label in tokens.labels] == [False, not learnt, learnt, learnt]


def test_a_tokenizer_without_offsets_is_refused():
    class SlowTokenizer:
        is_fast = False

    with pytest.raises(TemplateError, match=r"SlowTokenizer gives no character offsets.*use_fast=True"):
        tokenize_spans([Span("Hi", supervised=True)], SlowTokenizer())


def test_images_expand_to_their_tokens():
    ids, labels = expand_images([1, -200, 5, -200, 6], [-100, 7, 5, 7, 6], [3, 1])
    assert ids == [1, -200, -200, -200, 5, -200, 6]
    assert labels == [-100, -100, -100, -100, 5, -100, 6]


@pytest.mark.parametrize("num_image_tokens", [[], [4, 4]])
def test_markers_and_images_must_agree(num_image_tokens):
    with pytest.raises(RecordError, match=r"1 <image> markers but [02] images") as caught:
        expand_images([1, -200, 5], [-100, -100, 5], num_image_tokens)
    assert caught.value.reason == "image_count"


WORDS = ["cat", " ", "  ", "\n", "ASSISTANT:", "USER:", "###", "</s>", "[/INST]", "一只猫", "😀", "é", "75%", "<", "s>"]


def make_turns(rng):
    def text():
        return "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 8)))

    turns = [Turn("human", "<image>\n" + text()), Turn("gpt", "So" + text())]
    for _ in range(rng.randint(0, 3)):
        turns += [Turn("human", text()), Turn("gpt", "No" + text())]
    return turns


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_learnt_tokens_are_the_answers_and_nothing_else(llama_tokenizers, make_byte_tokenizer, name):
    rng = random.Random(name)
    template = TEMPLATES[name]
    # Without ChatML's tokens in its vocabulary Llama's makes one piece of the "><" between two of them.
    chatml = template.stop == "<|im_end|>"
    tokenizers = [make_byte_tokenizer("<|im_end|>", "<|im_start|>")] if chatml else [*llama_tokenizers.values()]
    for _ in range(40):
        turns = make_turns(rng)[: 2 if "plain" in name else None]
        spans = render_spans(place_images(turns, template), template)
        for tokenizer in tokenizers:
            tokens = tokenize_spans(spans, tokenizer)
            text = "".join(span.text for span in spans)
            if not any("s>" in turn.value for turn in turns):
                assert tokens.input_ids == tokenizer_image_token(text, tokenizer)
            runs, run = [], []
            for label in [*tokens.labels, IGNORE_INDEX]:
                if label != IGNORE_INDEX:
                    run.append(label)
                elif run:
                    runs, run = [*runs, run], []
            answers = [span.text for span in spans if span.supervised]
            # Legacy tokenizers decode "</s>a" with a space before the a: compare all but spaces.
            written = ["".join(tokenizer.decode(run).split()) for run in runs]
            assert written == ["".join(answer.split()) for answer in answers]
