"""Runs that hang, steps that are not finite, memory that runs out: what is noticed, named and advised, without Ray."""

import math
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError
from ray.train import FailureConfig, WorkerGroupError

from llava_ray.config.finetune import FinetuneConfig
from llava_ray.data.batches import MicroBatch
from llava_ray.errors import (
    BundleError,
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    ModelError,
    RecordError,
    TrainingError,
)
from llava_ray.objectives.objective import ObjectiveOutput
from llava_ray.train import failures, heartbeat, nonfinite, stopping
from llava_ray.train.engine import check_bf16
from llava_ray.train.failures import EndAtOnce, describe_failure, find_cause, translate_error
from llava_ray.train.heartbeat import Heartbeat, Patience, describe_stacks
from llava_ray.train.nonfinite import MOST_IN_A_ROW, StepGuard, find_bad_features, find_bad_losses
from llava_ray.train.out_of_memory import naming_memory
from llava_ray.train.rank_watch import SILENT_BEATS, Orders, Position, RankWatch
from llava_ray.train.run_recorder import TRAINING

CONFIG = FinetuneConfig.parsed(
    {
        "model": {"model_name_or_path": "language_model", "vision_tower": "tower"},
        "data": {"data_path": "data.json"},
        "train": {"gradient_checkpointing": False},
    }
)
STREAM = SimpleNamespace(bf16=False, model=CONFIG.model)


def at(process: str, marks: int = 1, doing: str = "step 3, optimiser") -> Position:
    return Position(process, marks, doing, "1.0 GiB at most")


class TestRankWatch:
    def test_a_rank_is_silent_after_so_many_heartbeats_of_another(self):
        watch = RankWatch()
        watch.beat(1, at("pid 2"))
        answers = [watch.beat(0, at("pid 1", 5)) for _ in range(SILENT_BEATS)]
        assert [answer.silent for answer in answers] == [()] * (SILENT_BEATS - 1) + [(1,)]
        assert answers[-1].total_marks == 6
        watch.beat(1, at("pid 2", 2))
        assert watch.beat(0, at("pid 1", 5)) == Orders(7)

    def test_a_machine_that_slept_has_no_silent_rank(self):
        watch = RankWatch()
        for rank in (0, 1, 0, 1):  # whatever time passes between two of them
            assert watch.beat(rank, at(f"pid {rank}")).silent == ()

    def test_once_a_rank_hangs_the_others_are_asked_for_their_stacks(self):
        watch = RankWatch()
        for rank in range(3):
            watch.beat(rank, at(f"pid {rank}", doing=f"step {rank}"))
        watch.add_stacks(0, "  loop.py:70 in all_reduce")
        assert not watch.beat(0, at("pid 0")).send_stacks
        assert watch.beat(1, at("pid 1")).send_stacks
        watch.add_stacks(1, "  loop.py:70 in all_reduce")
        told = watch.describe_hang()
        assert "rank 2 (pid 2), step 2: does not answer" in told
        assert "rank 0 (pid 0), step 3, optimiser:\n  loop.py:70" in told
        assert watch.describe_hang() is None  # once

    def test_replaced_workers_start_without_a_past(self):
        watch = RankWatch()
        watch.beat(0, at("pid 1"))
        watch.beat(1, at("pid 2"))
        watch.add_stacks(0, "stacks")
        assert watch.beat(0, at("pid 3", 1)) == Orders(1)
        assert watch.describe(1) == "never"
        assert not watch.stacks


class TestPatience:
    def over(self, patience: Patience, beats: int, *, training: bool = True, **orders: Any) -> list[bool]:
        return [patience.is_over(7, Orders(14, **orders), training=training) for _ in range(beats)]

    def test_progress_of_any_rank_counts(self):
        patience = Patience(4)
        assert not any(patience.is_over(1, Orders(total), training=True) for total in range(50))
        assert self.over(patience, 6) == [False] * 4 + [True, True]

    def test_a_silent_rank_halves_the_time_and_loading_takes_longer(self):
        assert self.over(Patience(4), 4, silent=(1,)) == [False, False, True, True]
        assert self.over(Patience(4), 34, training=False).index(True) == 32
        assert self.over(Patience(4), 18, training=False, silent=(1,)).index(True) == 16

    def test_ten_times_the_slowest_step_is_not_too_long(self):
        patience = Patience(4)
        self.over(patience, 4)  # three beats without progress, and then some
        patience.is_over(8, Orders(15), training=True)
        assert [patience.is_over(8, Orders(15), training=True) for _ in range(31)].index(True) == 29


class Journal:
    """The recorder, in this process."""

    def __init__(self) -> None:
        self.watch, self.said = RankWatch(), []
        self.beat = SimpleNamespace(remote=self.watch.beat)
        self.report_hang = SimpleNamespace(remote=self.watch.add_stacks)
        self.tell_hang = SimpleNamespace(remote=lambda: self.said.append(self.watch.describe_hang()))
        self.enter = self.say = SimpleNamespace(remote=self.said.append)
        self.tell_failure = SimpleNamespace(
            remote=lambda rank, told: f"{told} (last seen: {self.watch.describe(rank)})"
        )


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    for module in (heartbeat, failures):
        monkeypatch.setattr(module.ray, "get", lambda value, timeout=None: value)
    return Journal()


def test_a_loop_that_stands_still_is_left_with_its_stacks(journal, capsys):
    left = threading.Event()
    heart = Heartbeat(journal, 0, 0.24 / 60, left.set)  # heartbeats every 0.01 s
    with heart.watching():
        heart.mark(TRAINING, "step 3, row of 5 samples, 400 tokens and 4 images")
        assert left.wait(5)
    [told] = journal.said
    assert "step 3, row of 5 samples" in told
    assert "in test_a_loop_that_stands_still_is_left_with_its_stacks" in told
    assert "rank 0 hangs" in capsys.readouterr().err


def test_a_loop_that_goes_on_and_one_that_may_wait_for_ever_are_left_alone(journal):
    left = threading.Event()
    with Heartbeat(journal, 0, 0.0, left.set).watching():
        assert not left.wait(0.05)
    heart = Heartbeat(journal, 0, 0.24 / 60, left.set)
    with heart.watching():
        for step in range(30):
            heart.mark(TRAINING, f"step {step}")
            assert not left.wait(0.02)
    assert not journal.said


def test_stacks_show_the_loop_first_and_not_the_one_who_asks():
    lines = describe_stacks(threading.get_ident()).splitlines()
    assert not any("describe_stacks" in line for line in lines)
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.append(describe_stacks(main)))
    main = threading.get_ident()
    asking.start()
    asking.join()
    assert found[0].startswith("  thread MainThread:")


def died(text: str = "The actor died unexpectedly") -> Exception:
    return RayActorError(error_msg=text)


class TestFailures:
    def test_the_cause_is_our_own_error_then_a_death_then_the_first_other(self):
        lost, ours = RuntimeError("[gloo] Connection closed by peer [127.0.0.1]"), TrainingError("no token")
        assert find_cause({0: lost, 1: ours}) == (1, ours)
        assert find_cause({0: lost, 1: died()})[0] == 1
        assert find_cause({0: lost, 1: KeyError("x")})[0] == 1
        assert find_cause({0: lost})[0] == 0

    def test_a_worker_that_the_memory_monitor_ended_is_named_with_what_saves_memory(self):
        said = describe_failure({1: died("Worker killed: the node was running low on memory")})[1]
        assert "rank 1 because its node ran out of memory" in said
        assert "train.tokens_per_micro_batch" in said

    def test_the_last_of_too_many_failures_is_told_with_where_the_rank_was(self, journal):
        journal.watch.beat(1, at("pid 7 on host", doing="step 12, row of 5 samples"))
        error = translate_error(WorkerGroupError("many words of Ray", {1: died()}), "tune", journal)
        assert isinstance(error, TrainingError)
        for part in ("rank 1 died without a word", "pid 7 on host, step 12, row of 5 samples", "run.max_failures"):
            assert part in str(error)
        ours = DivergedError("step 3: the loss is nan")
        assert translate_error(WorkerGroupError("words", {0: ours}), "tune", journal) is ours


PERMANENT = [
    ConfigError("no bfloat16"),
    ModelError("attention cannot be computed sample by sample"),
    BundleError("other weights"),
    RecordError("record 'a': no image", reason="image_unreadable"),
    DivergedError("step 3: the loss is nan"),
]
PASSING = [
    died(),
    RuntimeError("NCCL error"),
    TrainingError("rank 1 ran out of memory"),
    CheckpointError("No space left on device"),
    DataError("shard 3 cannot be read"),
]


@pytest.mark.parametrize("error", [*PERMANENT, *PASSING], ids=lambda error: type(error).__name__)
def test_a_run_ends_at_once_where_new_workers_would_fail_again(error):
    policy = EndAtOnce(FailureConfig(max_failures=1))
    failed = WorkerGroupError("words", {0: RuntimeError("[gloo] Connection closed by peer"), 1: error})
    decided = [policy.make_decision(failed).value for _ in range(2)]
    assert decided == (["RAISE", "RAISE"] if error in PERMANENT else ["RETRY", "RAISE"])


def test_a_trainer_gives_its_controller_that_policy(monkeypatch):
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        stopping.DataParallelTrainer, "_initialize_and_run_controller", lambda self, **settings: given.update(settings)
    )
    monkeypatch.delenv(stopping.SERVER_VARIABLE, raising=False)
    trainer = object.__new__(stopping.StoppableTrainer)
    trainer.run_config = SimpleNamespace(failure_config=FailureConfig(max_failures=7))
    trainer._initialize_and_run_controller(failure_policy=None, callbacks=[])
    assert isinstance(given["failure_policy"], EndAtOnce)
    assert given["failure_policy"].failure_config.max_failures == 7


def make_batch(**changes: Any) -> MicroBatch:
    """Return a row of three samples of 3, 4 and 2 tokens, with an image of two features in the second."""
    fields: dict[str, Any] = {
        "step": 3, "rank": 0, "num_supervised": 4, "num_micro_batches": 1, "ids": ["a", "b", "c"],
        "num_tokens": [3, 4, 2], "input_ids": torch.tensor([[1, 2, 3, 4, -200, -200, 5, 6, 7]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]]),
        "labels": torch.full((1, 9), -100), "image_sizes": [(8, 8)], "pixels": None, "features": None,
        "num_pairs": 0, "num_chosen": 0, "pairs": [None] * 3, "reference": None,
    }  # fmt: skip
    return MicroBatch(**fields | changes)


class Engine:
    """An engine of which only the end of a step matters."""

    def __init__(self) -> None:
        self.skipped_steps, self.applied = 0, 0
        self.lr_scheduler = SimpleNamespace(step=lambda: None)
        self.optimizer = SimpleNamespace(step=self.apply)

    def apply(self) -> None:
        self.applied += 1

    def step(self) -> None:
        self.optimizer.step()


def make_guard(policy: str, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> StepGuard:
    monkeypatch.setattr(nonfinite.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(nonfinite.dist, "all_gather_object", lambda into, mine: into.__setitem__(0, mine))
    config = CONFIG.replaced({"train.on_nonfinite": policy})
    settings = SimpleNamespace(config=config, journal=journal, stream=STREAM)
    parts = SimpleNamespace(llava=SimpleNamespace(arrange=lambda count, sizes: None))
    return StepGuard(Engine(), parts, settings, torch.device("cpu"))


def run_step(guard: StepGuard, loss: float, losses: list[float], step: int = 3) -> DivergedError | None:
    guard.keep(make_batch(), ObjectiveOutput(torch.tensor(losses, dtype=torch.float32), torch.tensor([1, 4, 5, 7])))
    read = SimpleNamespace(reduce=lambda: None, read=lambda: (loss, {}))
    return guard.check(step, loss, guard.step(read, lambda name: nullcontext()))


class TestNonFinite:
    def test_only_samples_with_a_loss_of_their_own_that_is_not_finite_are_named(self):
        output = ObjectiveOutput(torch.tensor([1.0, math.inf, 2.0]), torch.tensor([1, 4, 5]))
        assert find_bad_losses(make_batch(), output) == ["b"]  # "c" has no loss at all

    def test_the_sample_of_a_nan_feature_is_named(self):
        parts = SimpleNamespace(llava=SimpleNamespace(arrange=lambda count, sizes: None))
        settings = SimpleNamespace(stream=STREAM)
        features = torch.zeros(1, 2, 4)
        assert find_bad_features(make_batch(features=features), parts, settings, torch.device("cpu")) == []
        features[0, 1, 2] = math.nan
        assert find_bad_features(make_batch(features=features), parts, settings, torch.device("cpu")) == ["b"]
        order = torch.tensor([2, 1])  # a newline, then the second feature
        parts.llava.arrange = lambda count, sizes: order
        assert find_bad_features(make_batch(features=features), parts, settings, torch.device("cpu")) == ["b"]

    def test_stop_is_the_default_and_names_the_sample(self, journal, monkeypatch):
        guard = make_guard("stop", journal, monkeypatch)
        assert run_step(guard, 1.0, [1, 1, 1, 1]) is None
        error = run_step(guard, math.nan, [1, math.nan, 1, 1])
        assert "step 3: the loss is nan; samples whose own loss is not finite: b." in str(error)
        assert "train.on_nonfinite = 'skip'" in str(error)
        assert "no single sample" in str(run_step(guard, math.inf, [1, 1, 1, 1]))

    def test_skip_leaves_the_step_out_and_gives_up_after_so_many(self, journal, monkeypatch):
        guard = make_guard("skip", journal, monkeypatch)
        run_step(guard, 1.0, [1, 1, 1, 1])
        ends = [run_step(guard, math.nan, [math.nan, 1, 1, 1], step) for step in range(MOST_IN_A_ROW)]
        assert (guard.engine.applied, guard.engine.skipped_steps) == (1, MOST_IN_A_ROW)
        assert ends[:-1] == [None] * (MOST_IN_A_ROW - 1)
        assert "the last 10 steps were skipped" in str(ends[-1]).lower()
        assert journal.said[0].startswith("Skipped step 0: the loss is nan; samples whose own loss is not finite: a")
        assert run_step(guard, 1.0, [1, 1, 1, 1]) is None
        assert guard.engine.applied == 2
        assert guard.in_a_row == 0

    def test_a_step_that_deepspeed_leaves_out_by_itself_is_counted_and_said(self, journal, monkeypatch):
        guard = make_guard("stop", journal, monkeypatch)

        def overflow() -> None:
            guard.engine.skipped_steps += 1

        guard.engine.step = overflow
        assert run_step(guard, 1.0, [1, 1, 1, 1]) is None
        assert "Skipped step 3: the gradients are not finite (the loss is 1)" in journal.said[0]
        for _ in range(MOST_IN_A_ROW - 2):
            assert run_step(guard, 1.0, [1, 1, 1, 1]) is None
        assert run_step(guard, 1.0, [1, 1, 1, 1]) is not None


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"),
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    OSError(12, "Cannot allocate memory"),
]


class TestMemory:
    @pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
    def test_the_error_says_where_and_which_setting(self, error):
        where = "step 3, row of 5 samples, 400 tokens and 4 images"
        with pytest.raises(TrainingError) as caught, naming_memory(1, CONFIG, lambda: where):
            raise error
        said = str(caught.value)
        assert said.startswith(f"rank 1 ran out of memory at {where}: ")
        assert "set train.gradient_checkpointing = true" in said
        assert "raise train.zero_stage = 2" in said
        assert "\n" not in said

    def test_other_errors_pass(self):
        for error in (RuntimeError("mat1 and mat2 shapes"), KeyError("x"), TrainingError("not enough memory")):
            with pytest.raises(type(error)) as caught, naming_memory(1, CONFIG, str):
                raise error
            assert caught.value is error

    def test_what_is_used_already_is_not_advised(self):
        changes = {"train.gradient_checkpointing": True, "train.zero_stage": 3, "lora.lora_enable": True}
        with pytest.raises(TrainingError) as caught, naming_memory(0, CONFIG.replaced(changes), str):
            raise MemoryError
        assert "gradient_checkpointing" not in str(caught.value)
        assert "zero_stage" not in str(caught.value)
        assert "lora.bits = 4" in str(caught.value)


@pytest.mark.parametrize("supported", [False, True])
def test_a_gpu_without_bf16_is_named_with_the_remedy(supported, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    train = CONFIG.replaced({"train.bf16": True}).train
    check_bf16(train, torch.device("cpu"))
    if supported:
        check_bf16(train, torch.device("cuda"))
    else:
        with pytest.raises(ConfigError, match=r"Tesla T4 has no bfloat16.*train.bf16 = false"):
            check_bf16(train, torch.device("cuda"))
