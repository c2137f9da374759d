import pytest

from llava_ray.chat.conversation import Turn, check_turns, read_turns, with_markers
from llava_ray.chat.template import Conversation
from llava_ray.chat.templates import TEMPLATES
from llava_ray.errors import RecordError

ASKED = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWERED = {"from": "gpt", "value": "A cat."}


def test_turns_are_read_from_llavas_words():
    assert read_turns([ASKED, ANSWERED]) == (Turn("human", "<image>\nWhat is it?"), Turn("gpt", "A cat."))


def test_turns_are_read_from_openais_words():
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert read_turns(messages) == (Turn("human", "Hi"), Turn("gpt", "Hello."))


def test_a_leading_answer_is_dropped_as_in_the_original():
    assert read_turns([ANSWERED, ASKED, ANSWERED]) == read_turns([ASKED, ANSWERED])


@pytest.mark.parametrize(
    ("conversations", "reason", "words"),
    [
        ([], "no_turns", "human turn first"),
        ([ANSWERED], "no_turns", "human turn first"),
        ([ANSWERED, ANSWERED, ASKED], "alternation", "turn 1 of 2 is from 'gpt'"),
        ([ASKED, ASKED, ANSWERED], "alternation", "turn 2 of 3 is from 'human'"),
        ([ASKED, {"from": "gpt", "value": " \n"}], "empty_answer", "turn 2 of 2"),
        ([ASKED, {"from": "system", "value": "Be kind."}, ANSWERED], "roles", "turn 2 of 3 is a system turn"),
        ([{"from": "system", "value": "Be kind."}], "no_turns", "human turn first"),
        ([{"role": "tool", "content": "4"}], "alternation", "turn 1 of 1 is from 'tool'"),
        ([{"role": "tools", "content": "4"}], "roles", "turn 1: 'role' is 'tools'"),
        ([{"value": "4"}], "roles", "turn 1: 'from' is None"),
        ([ASKED, {"from": "gpt", "value": None}], "malformed", "turn 2 (from 'gpt'): 'value' is NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "malformed", "'content' is list"),
        (["Hi"], "malformed", "turn 1 is str"),
        ("Hi", "malformed", "`conversations` is str"),
        (None, "malformed", "`conversations` is NoneType"),
    ],
)
def test_bad_records_say_what_is_wrong(conversations, reason, words):
    with pytest.raises(RecordError) as caught:
        read_turns(conversations)
    assert caught.value.reason == reason
    assert words in str(caught.value)


def test_check_turns_accepts_a_question_without_answer():
    check_turns([Turn("human", "")])


def test_a_conversation_grows_without_changing():
    start = Conversation(TEMPLATES["v1"])
    grown = start.ask("<image>\nWhat is it?").answer("A cat.").ask("And in <image>?")
    assert start.turns == ()
    assert [turn.role for turn in grown.turns] == ["human", "gpt", "human"]
    assert grown.num_images == 2


def test_marker_is_put_where_there_is_none() -> None:
    assert with_markers("What?", 1) == "<image>\nWhat?"
    assert with_markers("Which?", 2) == "<image>\n<image>\nWhich?"
    assert with_markers("What <image>?", 1) == "What <image>?"
    assert with_markers("What?", 0) == "What?"
