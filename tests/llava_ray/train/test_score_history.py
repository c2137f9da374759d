"""Where a run ends by its held-out scores, and which checkpoint is the best: a function of the evaluations alone."""

import json
import math

import pytest

from llava_ray.config.held_out import HeldOutConfig
from llava_ray.errors import ConfigError
from llava_ray.train.score_history import ScoreHistory, check_score

TURNING = [3.0, 2.0, 1.5, 1.4, 1.45, 1.6, 1.9, 1.2]


def end_of(curve: list[float], resumed: bool = False, **settings) -> tuple[int | None, tuple[int, float] | None]:
    """Return after which evaluation a run with this curve ends, and its best; ``resumed`` starts anew after each."""
    held_out = HeldOutConfig.parsed({"path": "h", "keep_best": True} | settings)
    history = ScoreHistory(held_out)
    for number, score in enumerate(curve, 1):
        history.add(number, {held_out.metric: score})
        if resumed:
            history = ScoreHistory(held_out, json.loads(json.dumps(history.scores)))
        if history.has_stalled:
            return number, history.best
    return None, history.best


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(
    ("settings", "end", "best"),
    [
        ({"early_stopping_patience": 1}, 5, (4, 1.4)),
        ({"early_stopping_patience": 3}, 7, (4, 1.4)),
        ({"early_stopping_patience": 4}, None, (8, 1.2)),
        ({"early_stopping_patience": 2, "early_stopping_min_delta": 0.2}, 5, (4, 1.4)),
        ({"early_stopping_patience": 2, "early_stopping_min_delta": 0.9}, 4, (4, 1.4)),
        ({}, None, (8, 1.2)),
    ],
)
def test_a_run_ends_where_its_curve_has_turned_and_kills_change_nothing(settings, end, best, resumed):
    assert end_of(TURNING, resumed, **settings) == (end, best)


def test_higher_is_better_for_an_accuracy():
    settings = {"metric": "held_out_accuracy", "early_stopping_patience": 2}
    assert end_of([0.1, 0.5, 0.5, 0.4, 0.9], **settings) == (4, (2, 0.5))


def test_small_gains_add_up_before_they_count():
    # Each gain is below the least that counts, but not the sum of two.
    curve = [1.0, 0.94, 0.88, 0.82, 0.76, 0.7]
    assert end_of(curve, early_stopping_patience=2, early_stopping_min_delta=0.1)[0] is None
    assert end_of(curve, early_stopping_patience=1, early_stopping_min_delta=0.1)[0] == 2


def test_a_score_that_is_not_finite_is_no_better_and_never_the_best():
    assert end_of([math.nan, 2.0, math.inf, math.nan], early_stopping_patience=2) == (4, (2, 2.0))
    assert end_of([math.nan, math.nan], early_stopping_patience=3) == (None, None)


def test_ray_keeps_the_checkpoint_that_is_the_best_so_far():
    history = ScoreHistory(HeldOutConfig(path="h", keep_best=True))
    ranks = []
    for step, score in enumerate([3.0, 3.0, 2.0, 2.5, 1.0], 1):
        history.add(step, {"held_out_loss": score})
        ranks.append(history.rank_of(step))
    assert ranks == [1.0, -1.0, 3.0, -1.0, 5.0]
    assert history.rank_of(6) == -1.0  # saved on Ctrl-C, without an evaluation
    assert history.model_step == 5


def test_without_a_choice_nothing_is_noted():
    history = ScoreHistory(HeldOutConfig(path="h"))
    history.add(1, {"held_out_loss": 1.0})
    assert (history.scores, history.model_step, history.has_stalled) == ([], None, False)


def test_a_score_that_the_objective_does_not_have_is_refused():
    held_out = HeldOutConfig(path="h", keep_best=True, metric="held_out_margin/a")
    check_score(held_out, ["margin"])
    with pytest.raises(ConfigError, match=r"'held_out_margin/a': evaluations of this run have held_out_loss, held_out"):
        check_score(held_out, [])
