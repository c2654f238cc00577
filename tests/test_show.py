"""arc_nb.show follows a run that another process trains, and steers it through the run's folder."""
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import arc_nb
from arc_nb import Trainer
from arc_nb.engine.history import Status

SECONDS = 60  # the longest wait for another process on a busy machine
CODE = """
import sys, torch
from torch import nn
from arc_nb import Trainer
torch.manual_seed(0)
x = torch.randn(512, 4)
t = Trainer(nn.Linear(4, 1), (x, x.sum(1, keepdim=True)), loss="mse", lr=1e-3, run=sys.argv[1], board=False)
t.fit(max_time=300)
print(t.status.state, t.status.message)
"""


def until(reached: Callable[[], object], what: str) -> None:
    "Waits; fails with what was waited for."
    limit = time.monotonic() + SECONDS
    while not reached():
        if time.monotonic() > limit: pytest.fail(f"{what}: not within {SECONDS} s")
        time.sleep(0.02)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen]]:
    "A folder, and the process that trains in it."
    folder = tmp_path / "live"
    process = subprocess.Popen([sys.executable, "-c", CODE, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until(lambda: process.poll() is not None or Status.read(folder).step > 0, "the first steps")
        assert process.poll() is None, process.communicate()[0]
        yield folder, process
    finally:
        process.kill()
        process.communicate()


def test_show_follows_another_process_and_steers_it(other):
    folder, process = other
    board = arc_nb.show(folder)
    run = board.source
    before = run.status.step
    until(lambda: run.status.step > before, "news of the run")
    assert run.status.alive and run.status.pid == process.pid and len(run.history.series("train", "loss")[0])

    run.controls.pause()
    until(lambda: run.status.state == "paused", "the pause")
    held = run.status.step
    time.sleep(1)
    assert run.status.state == "paused" and run.status.step == held and not board.done

    run.controls.set_lr(1e-5)
    run.controls.resume()
    until(lambda: run.status.state == "training" and run.status.step > held and run.status.lr == 1e-5, "the new rate")

    run.controls.stop("seen enough")
    until(lambda: board.done, "the end")
    assert process.communicate(timeout=SECONDS)[0].strip() == "stopped seen enough"
    assert run.status.state == "stopped" and run.status.message == "seen enough"
    assert len(run.history.series("train", "loss")[0]) == run.status.step


def test_a_run_whose_process_was_killed_is_shown_as_lost(other):
    folder, process = other
    board = arc_nb.show(folder)
    process.kill()
    process.wait()
    until(lambda: board.done, "the end")
    assert board.source.status.state == "failed" and "lost" in board.source.status.message


def test_show_refuses_what_is_no_run(tmp_path):
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match="no run at"): arc_nb.show(missing)


def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    Status("training", pid=os.getppid()).write(run)
    t = Trainer(torch.nn.Linear(4, 1), (torch.randn(8, 4), torch.randn(8)), loss="mse", run=run, board=False)
    with pytest.raises(ValueError, match=f"process {os.getppid()}"): t.fit(epochs=1)
    assert [p.name for p in tmp_path.iterdir()] == ["run"] and [p.name for p in run.iterdir()] == ["status.json"] and t.step == 0
