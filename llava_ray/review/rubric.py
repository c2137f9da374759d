"""Rubrics: the judge's instructions per category, our own, from a rule file in LLaVA's format, or custom."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava_ray.config.toml_files import read_toml_file
from llava_ray.errors import ConfigError, DataError
from llava_ray.reading import MAX_SHOWN, read_bounded, wrap_errors

_MAX_RULE_BYTES = 2**20

ReviewKind = Literal["pair", "single", "grade", "rating", "objects"]
"""Two answers with a score of 1 to 10 each; one answer with a score of 1 to 10, a grade of 0 to 1, a rating of 0 to 6
(MMHal-Bench), or a list of the objects it names (Object HalBench)."""

_SYSTEM = (
    "You are a helpful and precise assistant for checking the quality of the answer."  # LLaVA's, also of our rubric
)
_ROLE = "Assistant"

_PAIR = (
    "Rate how helpful, relevant, accurate and detailed each of the two answers above is, on a scale of 1 to 10, 10 "
    "being best.{told}{wanted}\nOn the first line write only the two scores, of {role} 1 and of {role} 2, with a space "
    "between them. From the second line on, explain your ratings; stay impartial, and do not let the order of the "
    "answers sway you."
)
_SINGLE = (
    "Rate how helpful, relevant, accurate and detailed the answer above is, on a scale of 1 to 10, 10 being best."
    "{told}{wanted}\nOn the first line write only the score. From the second line on, explain it."
)
_CONTEXT_SENTENCES = {
    "text": "",
    "boxes": " The question is about an image, given to you under [Context] as sentences and as boxes of its objects: "
    "(x1, y1, x2, y2) from 0 to 1, left, top, right, bottom.",
    "sentences": " The question is about an image, given to you under [Context] as sentences.",
}
_CONV = " It belongs to a conversation: what was asked should be answered directly and rightly."
_DETAIL = " It asks for a description: what is there should be there, and nothing else."
_COMPLEX = " It asks for reasoning: the conclusion should follow from what the image shows."
# category: how the image is described, what a good answer is
_OURS = {
    "conv": ("boxes", _CONV),
    "detail": ("boxes", _DETAIL),
    "complex": ("boxes", _COMPLEX),
    "llava_bench_conv": ("sentences", _CONV),
    "llava_bench_detail": ("sentences", _DETAIL),
    "llava_bench_complex": ("sentences", _COMPLEX),
    "text": ("text", ""),
    "default": ("text", ""),
}
AS_JSON = (
    "\n\nInstead of lines, reply with one JSON object of the given schema: the scores in its numbers, your explanation "
    'in "explanation".'
)


@dataclass(frozen=True)
class Rule:
    """The instructions for one category."""

    prompt: str
    role: str = _ROLE


@dataclass(frozen=True)
class Rubric:
    """Rules by category. ``literal``: LLaVA's own requests, byte by byte, including the original's errors."""

    name: str
    kind: ReviewKind
    rules: Mapping[str, Rule]
    system: str = _SYSTEM
    literal: bool = False

    @property
    def version(self) -> str:
        """Return the name and 8 hex digits of a hash of all instructions."""
        contents = [
            self.kind,
            self.system,
            self.literal,
            {key: [r.prompt, r.role] for key, r in sorted(self.rules.items())},
        ]
        return f"{self.name}-{hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:8]}"

    def rule(self, category: str) -> Rule:
        """Return a category's rule, or the default one, which literal rubrics do not have. Raises DataError."""
        found = self.rules.get(category) or (None if self.literal else self.rules.get("default"))
        if found is None:
            known = ", ".join(sorted(self.rules))
            raise DataError(f"the rubric {self.name!r} has no rule for category {category!r}; it has {known}")
        return found


def build_default_rubric(kind: ReviewKind) -> Rubric:
    """Build our own rubric."""
    template = _SINGLE if kind == "single" else _PAIR
    rules = {
        name: Rule(template.format(told=_CONTEXT_SENTENCES[told], wanted=wanted, role=_ROLE))
        for name, (told, wanted) in _OURS.items()
    }
    if kind in ("rating", "objects"):  # their authors' judges have no role
        return Rubric("llava_ray", kind, rules, system="")
    return Rubric("llava_ray", kind, rules)


def read_rules(path: Path) -> Rubric:
    """Read a rule file in LLaVA's format, ``{category: {"role", "prompt"}}``. Raises ConfigError."""
    with wrap_errors(
        f"{path}", "Expected JSON of categories, each with a role and a prompt.", ConfigError, "is no rule file"
    ):
        content = json.loads(read_bounded(path, _MAX_RULE_BYTES, ConfigError).decode("utf-8-sig"))
        rules = {name: Rule(rule["prompt"], rule["role"]) for name, rule in content.items()}
        if not all(isinstance(text, str) for rule in rules.values() for text in (rule.prompt, rule.role)):
            raise TypeError("a role or prompt is no text")
    return Rubric(path.stem, "pair", rules, literal=True)


def read_rubric(path: Path, kind: ReviewKind) -> Rubric:
    """Load a custom rubric. Raises ConfigError.

    TOML: optional ``name`` and ``system``; a table ``[prompts]`` with a text for each category or for ``default``.
    """
    content = read_toml_file(path, "the rubric")
    prompts = content.get("prompts")
    unknown = sorted(content.keys() - {"name", "system", "role", "prompts"})
    if unknown or not isinstance(prompts, dict) or not prompts or not all(isinstance(p, str) for p in prompts.values()):
        raise ConfigError(
            f"the rubric {path} has {', '.join(unknown)[:MAX_SHOWN] or 'no usable [prompts]'}; expected name, system, "
            "role and a table [prompts] of texts by category"
        )
    role = str(content.get("role", _ROLE))
    rules = {name: Rule(text, role) for name, text in prompts.items()}
    return Rubric(str(content.get("name", path.stem)), kind, rules, str(content.get("system", _SYSTEM)))


def compose_request(
    rubric: Rubric, category: str, context: Any, question: str, answers: Sequence[str], *, as_json: bool
) -> str:
    """Build the text of a request in LLaVA's form; ``context`` is a row of a context file, or None."""
    rule = rubric.rule(category)
    described = _describe_literally(context) if rubric.literal else _describe_context(context)
    blocks = [f"[Context]\n{described}"] if described or rubric.literal else []
    blocks.append(f"[Question]\n{question}")
    for number, answer in enumerate(answers, start=1):
        name = f"{rule.role} {number}" if len(answers) > 1 else rule.role
        blocks.append(f"[{name}]\n{answer}\n\n[End of {name}]")
    blocks.append(f"[System]\n{rule.prompt}{AS_JSON if as_json else ''}")
    return "".join(f"{block}\n\n" for block in blocks)


def _describe_context(context: Any) -> str:
    """Format a context row's captions, then its boxes."""
    if context is None:
        return ""
    return "\n\n".join(part for part in (_lines(_captions(context)), _boxes(context)) if part)


def _boxes(context: Mapping[str, Any]) -> str:
    """Format a context's boxes, one per line."""
    return "\n".join(f"{box['category']}: {box['bbox']}" for box in context.get("instances", ()))


def _captions(context: Mapping[str, Any]) -> Any:
    if "captions" in context:
        return context["captions"]
    return context.get("caption", "")


def _lines(captions: Any) -> str:
    return captions if isinstance(captions, str) else "\n".join(captions)


def _describe_literally(context: Any) -> str:
    """Format a context as the original does, which splits a caption that is one text into letters, one per line."""
    if context is None:
        return ""
    described = "\n".join(_captions(context))
    return f"{described}\n\n{_boxes(context)}" if "instances" in context else described
