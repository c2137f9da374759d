"""Where libraries' and workers' lines go, without Ray."""

import logging
import sys

from llava_ray.log_file import LibraryLog, terminal


def test_the_error_stream_and_handlers_that_hold_it_write_to_the_file_until_the_end(tmp_path, capsys):
    logger = logging.getLogger("third.party")
    logger.propagate = False
    logger.addHandler(logging.StreamHandler())  # made before, as Ray's and transformers' are
    screen = sys.stderr
    log = LibraryLog(str(tmp_path))
    with log.taking_over():
        assert terminal() is screen
        logger.warning("old handler")
        late = logging.StreamHandler()
        logger.addHandler(late)
        print("a print of a library", file=sys.stderr)
        print("a line of ours", file=terminal())
        print("a result of ours")
    logger.warning("afterwards")
    logger.handlers.clear()
    shown = capsys.readouterr()
    assert shown.out == "a result of ours\n"
    assert shown.err == "a line of ours\nafterwards\nafterwards\n"
    kept = log.path.read_text()
    assert all(words in kept for words in ("old handler", "a print of a library"))
    assert terminal() is sys.stderr


def test_lines_of_workers_say_whose_they_are_and_bars_and_reports_of_an_idle_autoscaler_are_left_out(tmp_path):
    log = LibraryLog(str(tmp_path))
    log.write_lines({"actor_name": "RayTrainWorker", "pid": 7, "ip": "::1", "lines": ["[WARNING] DeepSpeed"]})
    log.write_lines({"pid": 7, "ip": "::1", "lines": ['{"__ray_tqdm_magic_token__": 1}']})
    log.write_lines({"pid": "autoscaler", "ip": "::1", "lines": ["Pending: none", ":event_summary:Adding a node"]})
    assert log.path.read_text() == (
        "(RayTrainWorker pid=7, ip=::1) [WARNING] DeepSpeed\n( pid=autoscaler, ip=::1) :event_summary:Adding a node\n"
    )


def test_each_log_has_a_name_of_its_own_and_remote_runs_have_theirs_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = LibraryLog("s3://bucket/runs"), LibraryLog("s3://bucket/runs")
    assert first.path != second.path
    assert {first.path.parent, second.path.parent} == {tmp_path.relative_to(tmp_path) / "runs/logs"}
