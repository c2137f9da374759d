"""The table of LLaVA's conversation templates, and the template of a tokenizer.

A rendered conversation is::

    opening  Q question_end  cue  lead A end   question Q question_end  cue  lead A end   ...
                                  ^^^^^^^^^^ supervised                      ^^^^^^^^^^

Generation begins after ``cue``. ``lead`` is the space before an answer, which SentencePiece makes part of the answer's
first piece. ``end`` makes the model stop.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from llava_ray.chat import system_prompts
from llava_ray.chat.template import JinjaTemplate, StringTemplate, Template
from llava_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATE = "chat_template"


def find_template(name: str, tokenizer: PreTrainedTokenizerBase | None = None) -> Template:
    """Find the template of that name; ``chat_template`` means the tokenizer's own.

    Raises ConfigError for an unknown name (the original fell back to vicuna_v1 in silence), and for
    ``chat_template`` without a tokenizer that has one.
    """
    if name == CHAT_TEMPLATE:
        return _tokenizer_template(tokenizer)
    if name in TEMPLATES:
        return TEMPLATES[name]
    known = [*sorted(TEMPLATES), CHAT_TEMPLATE]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"no conversation template is called {name!r}.{hint} Known templates: {', '.join(known)}.")


def _tokenizer_template(tokenizer: PreTrainedTokenizerBase | None) -> JinjaTemplate:
    if tokenizer is None:
        raise ConfigError(
            f"template {CHAT_TEMPLATE!r} means the tokenizer's own template, but no tokenizer was given. "
            f"Pass the tokenizer, or name one of: {', '.join(sorted(TEMPLATES))}."
        )
    if not tokenizer.chat_template:
        raise ConfigError(
            f"template {CHAT_TEMPLATE!r} means the tokenizer's own template, but {tokenizer.name_or_path!r} has none "
            "(a base model's tokenizer rarely does). Add chat_template.jinja to its folder, or name one of: "
            f"{', '.join(sorted(TEMPLATES))}."
        )
    from llava_ray.chat.rendering import find_frame  # which imports this module

    tokens = sorted(map(re.escape, tokenizer.get_added_vocab()), key=len, reverse=True)
    template = JinjaTemplate(
        name=CHAT_TEMPLATE,
        stop=str(tokenizer.eos_token or ""),
        add_bos=False,
        tokenizer=tokenizer,
        end=re.compile(rf"\s*({'|'.join(tokens) or '(?!)'})"),
    )
    return replace(template, around=find_frame(template))


def _hashes(system: str) -> StringTemplate:
    return StringTemplate(
        system=system,
        opening=f"{system}###Human: ",
        question="Human: ",
        question_end="###",
        cue="Assistant:",
        lead=" ",
        end="###",
        stop="###",
    )


def _vicuna(system: str) -> StringTemplate:
    return StringTemplate(
        system=system,
        opening=f"{system} USER: ",
        question="USER: ",
        question_end=" ",
        cue="ASSISTANT:",
        lead=" ",
        end="</s>",
        stop="</s>",
    )


def _llama_2(system: str, separator: str) -> StringTemplate:
    # The original writes a separator before every question and strips the first: the tokenizer adds that one.
    return StringTemplate(
        system=system,
        opening=f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n" if system else "[INST] ",
        question=f"{separator}[INST] ",
        question_end=" [/INST]",
        cue="",
        lead=" ",
        end=" </s>",
        stop="</s>",
    )


def _chatml(system: str) -> StringTemplate:
    return StringTemplate(
        system=system.removeprefix("<|im_start|>system\n"),
        opening=f"{system}<|im_end|><|im_start|>user\n",
        question="<|im_start|>user\n",
        question_end="<|im_end|>",
        cue="<|im_start|>assistant\n",
        lead="",
        end="<|im_end|>",
        stop="<|im_end|>",
    )


_TAGS = ("<Image>", "</Image>")
_V0 = replace(_hashes(system_prompts.VICUNA_HUMAN), examples=(system_prompts.RENEWABLE_ENERGY,))
_CAPTION = StringTemplate(
    opening="", question="", question_end="", cue="", lead="", end="\n", stop="\n", only_images=True
)

_STYLES: dict[str, StringTemplate] = {
    "default": _V0,
    "v0": _V0,
    "llava_v0": _hashes(system_prompts.VICUNA_HUMAN),
    "v0_mmtag": replace(_hashes(system_prompts.IMAGE_TAGS), image_tags=_TAGS),
    "v1": _vicuna(system_prompts.VICUNA_USER),
    "vicuna_v1": _vicuna(system_prompts.VICUNA_USER),
    "llava_v1": _vicuna(system_prompts.VICUNA_HUMAN),
    "v1_mmtag": replace(_vicuna(system_prompts.IMAGE_TAGS), image_tags=_TAGS),
    "llama_2": _llama_2(system_prompts.LLAMA_2_CHAT, separator="<s>"),
    "llava_llama_2": _llama_2(system_prompts.LANGUAGE_AND_VISION, separator="<s>"),
    "mistral_instruct": _llama_2("", separator=""),
    "chatml_direct": _chatml(system_prompts.CHATML),
    "mistral_direct": _chatml(system_prompts.CHATML),
    "mpt": _chatml(system_prompts.MPT_CHAT),
    "plain": _CAPTION,
    "v0_plain": _CAPTION,
}

TEMPLATES: dict[str, Template] = {name: replace(style, name=name) for name, style in _STYLES.items()}
