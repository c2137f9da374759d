"""What an actor does with records: the questions it asks, its random numbers, and the weights that it takes over."""

from pathlib import Path

import numpy as np
import pytest
import torch
from samples import small_run

from llava_ray.chat.asked_turns import final_question
from llava_ray.chat.conversation import Turn
from llava_ray.data.preparation import prepare_data
from llava_ray.errors import DataError
from llava_ray.model.blueprint import read_blueprint
from llava_ray.runtime import Resources
from llava_ray.train.rollouts import actor as module
from llava_ray.train.rollouts.actor import RolloutActor, draw_numbers
from llava_ray.train.run_data import stream_settings

GRPO = {
    "data.shuffle_window": 0,
    "train.objective": "grpo",
    "data.on_too_long": "reject",
    "grpo.group_size": 2,
    "grpo.max_new_tokens": 3,
}


def test_random_numbers_depend_on_seed_step_record_and_answer_alone() -> None:
    drawn = draw_numbers(1, 2, "r", 3, 4)
    assert (drawn == draw_numbers(1, 2, "r", 3, 4)).all()
    assert (drawn == draw_numbers(1, 2, "r", 3, 9)[:4]).all(), "whatever the longest of the batch is"
    for other in ((0, 2, "r", 3), (1, 0, "r", 3), (1, 2, "s", 3), (1, 2, "r", 0)):
        assert not (drawn == draw_numbers(*other, 4)).any()


def test_the_last_supervised_answer_is_asked_for() -> None:
    turns = [Turn("system", "Be brief."), Turn("human", "a"), Turn("gpt", "1"), Turn("human", "b"), Turn("gpt", "2")]
    unlearnt = [*turns, Turn("human", "c"), Turn("gpt", "3", supervised=False)]
    assert final_question(turns) == final_question(unlearnt) == ("Be brief.", turns[1:4], turns[4])
    assert final_question([Turn("human", "a"), Turn("gpt", "1", supervised=False)]) is None


@pytest.fixture(scope="module")
def actor(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> RolloutActor:
    """An actor in this process; Ray prepares its data."""
    folder: Path = tmp_path_factory.mktemp("actor")
    config = small_run(folder, num_samples=12, **GRPO, **{"grpo.beta": 0.1, "grpo.rewards": ("exact", "format:.*e.*")})
    prepared = prepare_data(config.data, show_progress=False)
    resources = Resources(1, 1.0, use_gpu=False, accelerator_type=None)
    stream = stream_settings(config, prepared, read_blueprint(config.model, "square"), resources)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.ray, "get_gpu_ids", list)
        return RolloutActor(config, stream, 1)


@pytest.mark.ray
def test_a_batch_is_answered_rewarded_and_compared_with_the_first_weights(actor: RolloutActor) -> None:
    places = [(0, row) for row in (1, 0, 2, 3, 4, 5)]
    names = [one.id for one in actor.read(places)]
    assert len(set(names)) == len(places)
    groups = actor.sample(5, places, 0, [])
    assert isinstance(groups, list), groups
    assert [group.asked.id for group in groups] == names
    assert [group.asked.images is None for group in groups] == [int(name[1:]) % 5 == 0 for name in names]
    for group in groups:
        assert group.rewards.shape == (2, 2)
        assert group.asked.truth in ("yes", "no")
        assert group.asked.prompt.count(-200) == sum(
            actor.parts.image_tokens.count(*size) for size in group.asked.sizes
        )
        assert group.reference is not None
        for answer, reference in zip(group.answers, group.reference, strict=True):
            assert reference == pytest.approx(answer.log_probs, abs=1e-5), "no step has been taken"
    [alone] = actor.sample(5, places[:1], 0, [])
    assert [one.token_ids for one in alone.answers] == [one.token_ids for one in groups[0].answers]
    [later] = actor.sample(6, places[:1], 0, [])
    assert [one.token_ids for one in later.answers] != [one.token_ids for one in alone.answers]


@pytest.mark.ray
def test_weights_are_taken_over_and_the_first_ones_stay_the_reference(
    actor: RolloutActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    new = {name: one + 0.3 * torch.randn(one.shape, generator=generator) for name, one in actor.learnt.items()}
    monkeypatch.setattr(module.ray, "get", lambda ref: ref)
    try:
        [changed] = actor.sample(5, [(0, 1)], 7, [new])
        assert actor.version == 7
        assert all(torch.equal(actor.learnt[name], new[name]) for name in new)
        gaps = np.abs(np.subtract(changed.reference[0], changed.answers[0].log_probs))
        assert gaps.max() > 1e-3
    finally:
        actor.load(0, [actor.first])


@pytest.mark.ray
def test_a_record_without_an_answer_in_words_is_named(actor: RolloutActor, monkeypatch: pytest.MonkeyPatch) -> None:
    name = actor.read([(0, 3)])[0].id
    monkeypatch.setattr(module, "final_question", lambda turns: None)
    failure = actor.sample(0, [(0, 3)], 0, [])
    assert isinstance(failure, DataError)
    assert f"record '{name}' has no supervised answer" in str(failure)
