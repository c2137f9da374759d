"""LLaVA-Bench (in the wild): 60 questions about 24 images, reviewed against GPT-4's text-only answers."""

from collections.abc import Sequence
from pathlib import Path

from evals.benchmark import (
    FAILED,
    Benchmark,
    Grade,
    Graded,
    Judge,
    MetricValue,
    Profile,
    Question,
    Total,
    split_by_category,
)
from evals.files import check_complete, check_unique, find, index_by_id, need, need_text, read_lines
from llava_ray.errors import DataError
from llava_ray.replies import _MAX_SCORE, parse_pair, parse_pair_strictly

_FAILURE = -1.0
_RULE = (
    "Please judge the two answers above to the user's question about an image. The image's content is given to you as "
    "sentences under [Context].\nRate how helpful, relevant, accurate and detailed each answer is, on a scale of 1 to "
    "10, 10 being best.\nOn the first line write only the two scores, of Assistant 1 and of Assistant 2, with a space "
    "between them. From the second line on, explain your ratings; stay impartial, and do not let the order of the "
    "answers sway you."
)


class LLaVABench(Benchmark):
    r"""Relative score: 100 x the mean score of the answers / the mean score of the references (the ratio of means).

    Also the two means x 10; LLaVA's tables report the relative score of all. It varies by ten points and more
    between judges: report the judge with it.

    Obtain: https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild. The folder holds ``questions.jsonl``,
    ``context.jsonl``, ``answers_gpt4.jsonl`` and ``images/``. Reviews are ``{"question_id", "content"}`` lines.

    llava and official: the first line is exactly two numbers and a space; a failure counts as (-1, -1), as in the
    original. robust: a line of nothing but two scores of 1 to 10, or scores with the labels of their answers in any
    order, thoughts left out; two verdicts that differ, ranges, and numbers in prose are none. A failure is left out and
    counted.

    Robust, review | scores::

        '8 7' | 8, 7
        '8, 7' | 8, 7
        '8,7' | 8, 7
        '8 7 ' | 8, 7
        '8.5 9' | 8.5, 9
        '8/10 7/10' | 8, 7
        'Assistant 1: 8\nAssistant 2: 7' | 8, 7
        '**8 7**' | 8, 7
        'Scores: 8 7' | 8, 7
        '\n8 7\nThe first …' | 8, 7
        'Assistant 2: 7, Assistant 1: 8' | 8, 7
        'On a scale of 1 to 10:\n8 7' | 8, 7
        '<think>3 or 4</think>\n8 7' | 8, 7
        '<think>3 or 4' | failed
        '-1 7' | failed
        '7-8 9' | failed
        '8 and 7 dogs' | failed
        '8' | failed
        '8 7 6' | failed
        '80 70' | failed
        'I cannot rate these.' | failed
        '' | failed
    """

    name = "llava_bench"
    title = "LLaVA-Bench (in the wild)"
    metric = "relative score"
    maximum = 120.0
    category_maximum = 120.0
    needs_judge = ("llava", "official", "robust")
    is_mean = False
    max_new_tokens = 1024

    def read(self, folder: Path) -> list[Question]:
        """Read questions, image descriptions and references, joined by id and image."""
        path = find(folder, "questions.jsonl")
        context, references = _captions(find(folder, "context.jsonl")), _references(find(folder, "answers_gpt4.jsonl"))
        rows = [(str(need(row, "question_id", path)), need_text(row, "image", path), row) for row in read_lines(path)]
        check_unique([name for name, _, _ in rows], path, "question")
        unanswered = [name for name, _, _ in rows if name not in references]
        undescribed = [name for name, image, _ in rows if image not in context]
        check_complete(unanswered, len(rows), f"{folder}/answers_gpt4.jsonl has no reference", "the question")
        check_complete(undescribed, len(rows), f"{folder}/context.jsonl has no image description", "the question")
        questions = []
        for name, image, row in rows:
            facts = {"context": context[image]}
            questions.append(
                Question(
                    name,
                    need_text(row, "text", path),
                    (folder / "images" / image,),
                    (references[name],),
                    (),
                    (str(need(row, "category", path)),),
                    image,
                    facts=facts,
                )
            )
        return questions

    def grade(self, question: Question, answer: str, profile: Profile, judge: Judge | None = None) -> Grade:
        """Grade the answer by its review; ``parsed`` are the scores of reference and answer. Raises DataError."""
        if judge is None:
            raise DataError(f"{self.title} needs a judge: provide its reviews with --reviews FILE")
        reply = judge(question.id, _review_request(question, answer))
        pair = (parse_pair_strictly if profile != "robust" else parse_pair)(reply or "")
        if pair is None:
            return FAILED
        return Grade(pair[1] / _MAX_SCORE, f"{pair[0]:g} {pair[1]:g}")

    def add_up(self, rows: Sequence[Graded], profile: Profile) -> Total:
        """Compute relative scores, and the means x 10, of all and by category."""
        all_pairs = _pairs(rows, profile)
        categories = {
            name: MetricValue(relative_score(_pairs(some, profile)), len(_pairs(some, profile)))
            for name, some in split_by_category(rows).items()
        }
        means = _means(all_pairs)
        metrics = {"reference x 10": means[0] * 10, "answer x 10": means[1] * 10} if means else {}
        return Total(relative_score(all_pairs), metrics, categories)


def _captions(path: Path) -> dict[str, str]:
    """Read the images' descriptions by image; a list of sentences is one text."""
    found = []
    for row in read_lines(path):
        image, caption = need_text(row, "image", path), need(row, "caption", path)
        sentences = [caption] if isinstance(caption, str) else caption
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise DataError(f"{path}: the caption of {image!r} is neither a text nor a list of texts: {caption!r:.80}")
        found.append((image, "\n".join(sentences)))
    return index_by_id(found, path, "descriptions")


def _references(path: Path) -> dict[str, str]:
    """Read the reference answers by question."""
    rows = [(str(need(row, "question_id", path)), need_text(row, "text", path)) for row in read_lines(path)]
    return index_by_id(rows, path, "references")


def _review_request(question: Question, answer: str) -> str:
    """Build the judge's request, in LLaVA's form."""
    parts = {
        "Context": question.facts["context"],
        "Question": question.prompt,
        "Assistant 1": f"{question.truths[0]}\n\n[End of Assistant 1]",
        "Assistant 2": f"{answer}\n\n[End of Assistant 2]",
        "System": _RULE,
    }
    return "".join(f"[{name}]\n{text}\n\n" for name, text in parts.items())


def relative_score(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Compute 100 x mean(answer) / mean(reference), or None without scores."""
    means = _means(pairs)
    return 100 * means[1] / means[0] if means and means[0] else None


def _pairs(rows: Sequence[Graded], profile: Profile) -> list[tuple[float, float]]:
    pairs = []
    for row in rows:
        if row.parsed is not None:
            reference, answer = map(float, row.parsed.split())
            pairs.append((reference, answer))
        elif row.state == "failed" and profile != "robust":
            pairs.append((_FAILURE, _FAILURE))
    return pairs


def _means(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    return (sum(a for a, _ in pairs) / len(pairs), sum(b for _, b in pairs) / len(pairs)) if pairs else None
