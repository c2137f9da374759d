"""The ledger: what is noted comes back, restarts and repeated looks included."""

import pytest

from llava_ray.errors import CheckpointError
from llava_ray.sweep.ledger import TrialLedger, list_unfinished, read_ledger
from llava_ray.sweep.trials import Evaluation


def test_what_is_noted_comes_back(tmp_path):
    ledger = TrialLedger(str(tmp_path))
    ledger.start("a", {"train.learning_rate": 1e-3}, 42)
    ledger.add_evaluation("a", Evaluation(10, 0.5, 0.25))
    ledger.start("b", {"train.learning_rate": 1e-2}, 42)
    ledger.add_evaluation("a", Evaluation(20, 0.4, None))
    ledger.end("a", "finished")
    ledger.end("b", "failed", "OSError: disk")
    again = TrialLedger(str(tmp_path))
    assert [trial.to_dict() for trial in again.trials.values()] == [trial.to_dict() for trial in ledger.trials.values()]
    assert [(trial.number, trial.state) for trial in again.trials.values()] == [(1, "finished"), (2, "failed")]
    assert again.trials["a"].curve == [Evaluation(10, 0.5, 0.25), Evaluation(20, 0.4, None)]


def test_a_restarted_trial_keeps_number_looks_and_time(tmp_path):
    ledger = TrialLedger(str(tmp_path))
    ledger.start("a", {}, 0)
    ledger.add_evaluation("a", Evaluation(10, 0.5))
    ledger.add_evaluation("a", Evaluation(20, 0.4))
    again = TrialLedger(str(tmp_path))
    assert [trial.id for trial in list_unfinished(list(again.trials.values()))] == ["a"]
    again.start("a", {}, 0)
    again.add_evaluation("a", Evaluation(10, 0.5))  # from before its last checkpoint
    trial = again.trials["a"]
    assert (trial.attempts, trial.number, trial.steps) == (2, 1, 20)


def test_a_ledger_that_cannot_be_read_says_what_to_do(tmp_path):
    (tmp_path / "trials.json").write_text('[{"id": 1}]')
    with pytest.raises(CheckpointError, match=r"run\.restart"):
        read_ledger(str(tmp_path))
