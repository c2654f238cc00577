"""Kills processes in the middle of their saves, and looks at what they leave. Run by test_checkpoint.py: a process without threads.

usage: killed_saves.py FOLDER COUNT
"""
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from arc_nb.engine.checkpoint import listed, newest_good, read_checkpoint, sweep, verify
from arc_nb.engine.saver import Saver


def state(step: int) -> dict:
    "Two million bytes that all say the step."
    full = lambda: torch.full((250_000,), float(step))
    return {"model": {"weight": full()}, "optimizer": {"state": {0: {"exp_avg": full()}}}, "step": step}


def train(folder: Path, done: Path) -> None:
    "Saves without end, and notes each step whose checkpoint was proven."
    newest = newest_good(folder)
    saver = Saver(folder, last=2, best=0)
    for step in range(read_checkpoint(newest)[0]["step"] + 1 if newest else 1, 10**6):
        saver.save(state(step), {"step": step})
        if random.random() < 0.5: saver.wait()
        if saver.latest: done.write_text(saver.latest.name[5:])  # one write of few bytes


def moment(folder: Path, how: int) -> None:
    "Returns when the child is to die: at a random moment, or just after it began to write one."
    if how == 0: return time.sleep(random.uniform(0, 0.1))
    time.sleep(random.uniform(0, 0.05))
    until = time.monotonic() + 20
    while not list(folder.glob(".tmp-[0-9]*")) and time.monotonic() < until: pass
    if how == 2: time.sleep(random.uniform(0, 0.01))


def kill_one(folder: Path, k: int) -> bool:
    "Whether the killed process left a checkpoint half-written; all others are whole, and none that was proven is lost."
    done = folder.parent / "done"
    child = os.fork()
    if not child:
        try: train(folder, done)
        finally: os._exit(1)  # it is killed before
    if k == 0: time.sleep(0.3)
    moment(folder, k % 3)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "the child ended by itself"
    for path in listed(folder): verify(path)
    newest, proven = newest_good(folder), int(done.read_text() or 0) if done.exists() else 0
    step = read_checkpoint(newest)[0]["step"] if newest else 0
    assert step >= proven, f"step {proven} was proven, and {step} is the newest that is left"
    if newest:
        kept = read_checkpoint(newest)[0]
        assert (kept["model"]["weight"] == step).all() and (kept["optimizer"]["state"][0]["exp_avg"] == step).all()
    left = bool(sweep(folder))
    assert not list(folder.glob(".tmp*"))
    return left


def main() -> None:
    folder, count = Path(sys.argv[1]) / "checkpoints", int(sys.argv[2])
    torch.set_num_threads(1)
    random.seed(count)
    left = sum(kill_one(folder, k) for k in range(count))
    print(f"killed {count} times, in the middle of a save {left} times; the newest is {newest_good(folder).name}")
    assert left >= count // 4, "too few were killed in the middle of a save to mean anything"


if __name__ == "__main__": main()
