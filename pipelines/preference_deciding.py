"""The decision which of two answers is better: by a judge, by a rule that knows the truth, or by perturbation."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.benchmark import Benchmark
from llava_ray.config.preferences import PERTURBATIONS, PreferencesConfig
from llava_ray.errors import ConfigError, DataError
from pipelines.preference_jobs import SamplingJob
from pipelines.preference_judging import Judgement, is_judgeable, judge_pairs
from pipelines.preference_pairs import (
    AnswerPair,
    CandidateAnswer,
    DecidedPair,
    choose_pairs,
    decide_by_scores,
    draw,
    drop_unusable,
    list_pairs,
    normalise,
)
from pipelines.preference_questions import PromptSource, PromptToAnswer
from pipelines.preference_words import WordGroups, find_words, read_words, replace_words

_TRUTH = "truth"


@dataclass(frozen=True)
class Decisions:
    """The decided pairs of all questions, and the judge's part."""

    pairs: Sequence[DecidedPair]
    judgement: Judgement | None = None


@dataclass
class Decider:
    """Decides on the pairs of a source's questions from the answers on the disk."""

    config: PreferencesConfig
    source: PromptSource
    samplings: Sequence[SamplingJob]
    folder: Path
    counts: Counter[str]

    def decide(self) -> Decisions:
        """Return the decided pairs. Raises ConfigError, DataError, JudgeError."""
        rule = self.config.preferences.rule
        if rule == "judge":
            return self._judge()
        if rule in PERTURBATIONS:
            return Decisions(self._perturb())
        check_scores(self.config, self.source)
        return Decisions([pair for prompt in self.source.prompts for pair in self._score(prompt)])

    def _samples(self, prompt: PromptToAnswer) -> list[CandidateAnswer]:
        """Return the usable samples of all models for a prompt."""
        settings = self.config.preferences
        own = [job for job in self.samplings if job.kind == "sample"]
        answers = [answer for job in own for answer in job.answers(prompt)]
        self.counts["sampled_answers"] += len(answers)
        return drop_unusable(answers, self.counts, keep_cut_off=settings.cut_off == "keep")

    def _judge(self) -> Decisions:
        settings, pairs = self.config.preferences, list[AnswerPair]()
        for prompt in self.source.prompts:
            samples = self._samples(prompt)
            if not is_judgeable(prompt, self.config):
                self.counts["questions_with_several_images"] += 1
                continue
            pairs += list_pairs(prompt.id, samples, settings.max_pairs_per_question, settings.seed, self.counts)
        if not pairs:
            return Decisions([])
        by_id = {prompt.id: prompt for prompt in self.source.prompts}
        judgement = judge_pairs(self.config, by_id, pairs, self.folder, self.counts)
        return Decisions(judgement.decided, judgement)

    def _score(self, prompt: PromptToAnswer) -> list[DecidedPair]:
        settings, samples = self.config.preferences, self._samples(prompt)
        if not prompt.truths:
            self.counts["questions_without_truth"] += 1
            return []
        score = make_scorer(self.config, self.source.benchmark, prompt)
        if settings.chosen == "sample":
            most = settings.max_pairs_per_question
            return decide_by_scores(prompt.id, samples, score, most, settings.seed, self.counts)
        truth = CandidateAnswer(prompt.truths[0], "truth", origin={"kind": _TRUTH})
        wrong = [answer for answer in samples if (score(answer) or 0.0) < (score(truth) or 1.0)]
        self.counts["right_answers"] += len(samples) - len(wrong)
        return self._different([AnswerPair(prompt.id, truth, answer) for answer in wrong], {})

    def _different(self, pairs: Sequence[AnswerPair], evidence: Mapping[str, str]) -> list[DecidedPair]:
        """Return some of one question's pairs, without equal and repeated ones."""
        settings, found = self.config.preferences, dict[tuple[str, str], AnswerPair]()
        self.counts["possible_pairs"] += len(pairs)
        for pair in pairs:
            texts = normalise(pair.first.text), normalise(pair.second.text)
            if texts[0] == texts[1]:
                self.counts["equal_pairs"] += 1
            elif texts in found:
                self.counts["repeated_pairs"] += 1
            else:
                found[texts] = pair
        chosen = choose_pairs(list(found.values()), settings.max_pairs_per_question, settings.seed, self.counts)
        return [DecidedPair(pair, dict(evidence)) for pair in chosen]

    def _perturb(self) -> list[DecidedPair]:
        rule = self.config.preferences.rule
        words = self._words() if rule == "replaced_words" else None
        decided: list[DecidedPair] = []
        for prompt in self.source.prompts:
            made = list(self._replaced(prompt, words) if words else self._answered_otherwise(prompt))
            usable = [pair for pair in made if not self._is_right(prompt, pair)]
            self.counts["rejected_answers_that_are_right"] += len(made) - len(usable)
            decided += self._different(usable, {"perturbation": rule})
        return decided

    def _chosen(self, prompt: PromptToAnswer) -> list[CandidateAnswer]:
        """Return the answers that are to be the better ones."""
        if self.config.preferences.chosen == "sample":
            return self._samples(prompt)
        if not prompt.truths:
            self.counts["questions_without_truth"] += 1
        return [CandidateAnswer(text, "truth", origin={"kind": _TRUTH}) for text in prompt.truths[:1] if text.strip()]

    def _answered_otherwise(self, prompt: PromptToAnswer) -> Iterator[AnswerPair]:
        """Yield pairs of an answer and the one with the same number to the perturbed image."""
        settings = self.config.preferences
        others = [job for job in self.samplings if job.kind == settings.rule]
        if not all(job.images.get(prompt.id) for job in others):
            self.counts["questions_without_other_image"] += 1
            return
        chosen = self._chosen(prompt)
        answers = [answer for job in others for answer in job.answers(prompt)]
        self.counts["perturbed_answers"] += len(answers)
        for other in drop_unusable(answers, self.counts, keep_cut_off=settings.cut_off == "keep"):
            place = (other.model, other.sample)
            for one in chosen:
                if one.kind == "truth" or (one.model, one.sample) == place:
                    yield AnswerPair(prompt.id, one, other)

    def _words(self) -> WordGroups:
        path = self.config.preferences.words
        if path:
            return read_words(Path(path))
        truths = [truth for prompt in self.source.prompts for truth in prompt.truths]
        if truths:
            return find_words(truths)
        samples = [a.text for job in self.samplings for prompt in self.source.prompts for a in job.answers(prompt)]
        return find_words(samples)

    def _replaced(self, prompt: PromptToAnswer, words: WordGroups) -> Iterator[AnswerPair]:
        """Yield pairs of an answer and itself with other words."""
        settings = self.config.preferences
        truth = " ".join(prompt.truths)
        for one in self._chosen(prompt):
            seed = draw(settings.seed, "words", prompt.id, one.label)
            text = replace_words(one.text, words, settings.num_replaced, seed, truth)
            if text is None:
                self.counts["answers_without_object_words"] += 1
                continue
            origin = {**one.origin, "words_seed": seed}
            yield AnswerPair(prompt.id, one, CandidateAnswer(text, "replaced_words", one.model, one.sample, origin))

    def _is_right(self, prompt: PromptToAnswer, pair: AnswerPair) -> bool:
        """Return whether the rejected answer of a pair is known to be as right as the chosen one."""
        if not prompt.truths:
            return False
        truths = {normalise(truth) for truth in prompt.truths}
        return normalise(pair.second.text) in truths


def check_scores(config: PreferencesConfig, source: PromptSource) -> None:
    """Check that a rule can score answers. Raises ConfigError, DataError."""
    settings, benchmark = config.preferences, source.benchmark
    if benchmark is not None and settings.rule == "benchmark" and settings.profile in benchmark.needs_judge:
        raise ConfigError(
            f"{benchmark.title} needs a judge under preferences.profile = {settings.profile!r}; no rule can score its "
            "answers: set preferences.rule = 'judge'"
        )
    if not any(prompt.truths for prompt in source.prompts):
        raise DataError(
            f"these questions of {settings.benchmark or settings.data_path} come without answers, so that no rule can "
            "score them: set preferences.rule = 'judge', or point to a split with answers"
        )


def make_scorer(
    config: PreferencesConfig, benchmark: Benchmark | None, prompt: PromptToAnswer
) -> Callable[[CandidateAnswer], float | None]:
    """Return the function that scores answers to a prompt, from 0 to 1; None where an answer has no score."""
    profile = config.preferences.profile
    truths = {normalise(truth) for truth in prompt.truths}

    def by_benchmark(answer: CandidateAnswer) -> float | None:
        assert benchmark is not None
        assert prompt.asked is not None
        grade = benchmark.grade(prompt.asked, answer.text, profile)
        return None if grade.state == "failed" else grade.score

    def by_answer(answer: CandidateAnswer) -> float | None:
        return float(normalise(answer.text) in truths)

    return by_benchmark if config.preferences.rule == "benchmark" else by_answer
