#!/usr/bin/env python
"""Review answers with GPT-4 or any OpenAI-compatible judge: rate-limited, billed exactly once, within a budget.

python pipelines/review.py RECIPE --questions F --references F --answers F --context F --judge.model M --output DIR
python pipelines/review.py RECIPE --benchmark mm_vet --data data/mm_vet --answers F --budget.dollars 5 --dry-run
python pipelines/review.py summarize REVIEWS.jsonl …

Exit code 0: every review has ended. 3: partial; the same command resumes, and pays nothing twice. 1: nothing was
scored. 130, 143: stopped by Ctrl-C or SIGTERM; the same command resumes.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llava_ray.config.recipes import load_settings
from llava_ray.config.review import ReviewConfig
from pipelines.command import exit_unless_complete, run_command, split_dry_run

if TYPE_CHECKING:
    from pipelines.review_run import Outcome

_NOTHING = 1


def main(arguments: Sequence[str]) -> "Outcome | None":
    """Run a review, print its estimated cost, or summarize review files."""
    if arguments[:1] == ["summarize"]:
        from pipelines.review_summary import summarize

        summarize(arguments[1:])
        return None
    asked, others = split_dry_run(arguments)
    load_settings(ReviewConfig, others)  # handle --help and typos before the slow imports
    from pipelines.review_run import describe_review, review

    if asked.dry_run:
        describe_review(others)
        return None
    return review(others)


def main_with_exit_code(arguments: Sequence[str]) -> None:
    """Run, and exit with a code that says how far the review came."""
    outcome = main(arguments)
    if outcome is None:
        return
    if not outcome.scored and (outcome.complete or not outcome.signal):
        sys.exit(_NOTHING)
    exit_unless_complete(complete=outcome.complete, number=outcome.signal)


if __name__ == "__main__":
    run_command(main_with_exit_code)
