"""A template of fixed strings as a Jinja chat template, for programs that accept only those (transformers, vLLM).

They tokenise its output as one text, so a message that spells out control tokens forges them there: only our own
rendering separates the two (see `tokens`).
"""

from __future__ import annotations

from llava_ray.chat.conversation import IMAGE_TOKEN
from llava_ray.chat.template import StringTemplate

_NO_SYSTEM = "this model was trained with one fixed system prompt, which its template writes: leave system messages out"

# A message's text: its content, or the texts and image markers of its content's items.
_JOINED = (
    "{% set ns = namespace(text='') %}"
    "{% if message['content'] is string %}{% set ns.text = message['content'] %}"
    "{% else %}{% for item in message['content'] %}"
    f"{{% set ns.text = ns.text + (item['text'] if item['type'] == 'text' else '{IMAGE_TOKEN}') %}}"
    "{% endfor %}{% endif %}"
)


def write_jinja(template: StringTemplate, *, bos: bool, joint: str = "") -> str:
    """Return Jinja that renders conversations as ``template`` does, image markers moved to the front included.

    A message's content is a string with markers, or a list of ``{"type": "image"}`` and ``{"type": "text"}`` items.
    ``bos`` writes the tokenizer's beginning-of-sequence token first. ``joint`` is inserted after that token and
    after an image where no space follows: our tokenizer encodes the text behind an image as a text of its own, which
    SentencePiece begins with a space; in one joined text that space has to be written.
    """
    first = template.opening
    for question, answer in template.examples:
        first += question + template.question_end + template.cue + template.lead + answer + template.end
        first += template.question
    joined = joint + first if first else ""
    start = f"bos_token + {_quoted(joined)}" if bos else _quoted(first)
    answer = f"{{{{ {_quoted(template.cue + template.lead)} + ns.text + {_quoted(template.end)} }}}}"
    return (
        f"{{% for message in messages %}}{_JOINED}"
        "{% if message['role'] == 'user' %}"
        f"{{% if loop.first %}}{{{{ {start} }}}}{{% else %}}{{{{ {_quoted(template.question)} }}}}{{% endif %}}"
        f"{_content(template, joint)}{{{{ {_quoted(template.question_end)} }}}}"
        f"{{% elif message['role'] == 'assistant' %}}{answer}"
        f"{{% else %}}{{{{ raise_exception({_quoted(_NO_SYSTEM)}) }}}}"
        "{% endif %}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {_quoted(template.cue)} }}}}{{% endif %}}"
    )


def _content(template: StringTemplate, joint: str) -> str:
    """Return Jinja for a question: its markers where training puts them, the joints after them."""
    marker = _quoted(IMAGE_TOKEN)
    parts = f"ns.text.split({marker})"
    if template.only_images:
        placed = f"{{% set ns.text = {marker} * ({parts} | length - 1) %}}"
    else:
        in_front = f"({marker} + '\\n' + ({parts} | join('') | trim)) | trim"
        placed = f"{{% if {parts} | length == 2 %}}{{% set ns.text = {in_front} %}}{{% endif %}}"
    before, after = template.image_tags
    if before or after:
        placed += f"{{% set ns.text = ns.text | replace({marker}, {_quoted(before + IMAGE_TOKEN + after)}) %}}"
    last_joint = "" if template.question_end.startswith(" ") else joint
    return (
        f"{placed}{{% for part in {parts} %}}"
        f"{{% if not loop.first %}}{{{{ {marker} }}}}"
        f"{{% if part %}}{{% if part[0] != ' ' %}}{{{{ {_quoted(joint)} }}}}{{% endif %}}"
        f"{{% elif loop.last %}}{{{{ {_quoted(last_joint)} }}}}{{% endif %}}{{% endif %}}"
        "{{ part }}{% endfor %}"
    )


def _quoted(text: str) -> str:
    """Return ``text`` as a Jinja literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
