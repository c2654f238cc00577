"""Trainings that are killed and resumed, forked from this process, which has loaded everything and has never run a thread.

usage: python tests/victim.py kills folder [seed]   prints one line of JSON
"""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pandas  # noqa: F401  loaded once, before the forks
import torch
import torchmetrics.classification  # noqa: F401
from torch import nn
from torch.utils.data import Dataset

from arc_nb import Trainer
from arc_nb.engine import loop
from arc_nb.engine.callbacks import EMA, EarlyStopping
from arc_nb.engine.keeping import Checkpoints

TIMED = ("seconds", "data_seconds", "samples_per_second", "checkpoint_seconds", "metric_seconds")
EPOCHS = 3


class Noisy(Dataset):
    "Items that are augmented with all three generators."
    def __init__(self, rows=150):
        self.x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))
        self.y = (self.x[:, 0] * self.x[:, 1] > 0).long()
    def __len__(self): return len(self.x)
    def __getitem__(self, k):
        return self.x[k] * random.uniform(.9, 1.1) + .1 * torch.randn(6) + np.random.normal(0, .01), self.y[k]


def make(folder, workers=2, **more):
    "The training of the test, with everything on that makes a resume hard."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(.2), nn.Linear(32, 2))
    settings = dict(loss="cross_entropy", metrics=["accuracy"], train_metrics=["accuracy"], lr=1e-2, schedule="one_cycle", batch_size=5,
                    accumulate=2, precision="fp16", workers=workers, clip_norm=1.0, run=folder, board=False,
                    callbacks=[EMA(.9), EarlyStopping(patience=50), Checkpoints(every=2, keep_last=3)])
    return Trainer(model, Noisy(), (Noisy(40).x, Noisy(40).y), **settings | more)


def outcome(trainer):
    "Everything that an uninterrupted and a resumed run must have in common, to the bit."
    rows = trainer.history.frame().query("name not in @TIMED").sort_values(["step", "split", "name"])
    state = trainer.state_dict()
    return {"weights": [p.detach() for p in trainer.model.state_dict().values()], "raw": state["raw"], "optimizer": state["optimizer"],
            "callbacks": state["callbacks"], "precision": state["precision"], "schedule": state["schedule"],
            "history": [tuple(row) for row in rows.itertuples(index=False)]}


def same(a, b):
    "Equal to the bit, in nested tuples, lists and dicts."
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def fork(folder, result, resume=True, spoil=False):
    "Trains in a process of its own, with a group of its own for its workers."
    pid = os.fork()
    if pid: return pid
    os.setsid()
    code = 1
    try:
        sys.stdout = open(os.devnull, "w")
        if spoil: loop.set_random_state = lambda state: None
        trainer = make(folder)
        trainer.fit(epochs=EPOCHS, resume=resume)
        torch.save(outcome(trainer), result)
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally: os._exit(code)


def end(pid, kill_after=None, ready=lambda: True):
    "Waits for a training, or kills it after so many seconds, as soon as it is ready. Whether it was killed."
    began = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if status: raise RuntimeError("the training failed")
            return False
        due = kill_after is not None and time.monotonic() - began > kill_after
        if due and ready():
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
        time.sleep(.0002 if due else .002)


def main(kills, home, seed):
    rng, home = random.Random(seed), Path(home)
    found = {"kills": 0, "in_a_save": 0, "finished": 0, "equal": 0, "control_differs": False}
    began = time.monotonic()
    end(fork(home / "whole", home / "whole.pt"))
    took, whole = time.monotonic() - began, torch.load(home / "whole.pt", weights_only=True)
    while found["kills"] < kills:
        folder, result = home / f"run{found['finished']}", home / f"run{found['finished']}.pt"
        while True:
            more = found["kills"] < kills
            pid = fork(folder, result)
            wait = rng.uniform(.1, .6) * took if more else None
            saving = lambda folder=folder: any((folder / "checkpoints").glob(".tmp-*"))
            if not end(pid, wait, saving if rng.random() < .5 else lambda: True): break
            found["kills"] += 1
            found["in_a_save"] += saving()
        found["finished"] += 1
        found["equal"] += same(whole, torch.load(result, weights_only=True))
    spoiled = home / "spoiled"  # the control: killed as well, and resumed without the states of the generators
    assert end(fork(spoiled, home / "spoiled.pt"), 0, lambda: len(list((spoiled / "checkpoints").glob("step-*"))) > 2)
    end(fork(spoiled, home / "spoiled.pt", spoil=True))
    found["control_differs"] = not same(whole, torch.load(home / "spoiled.pt", weights_only=True))
    print(json.dumps(found | {"seconds_a_run": round(took, 2), "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), sys.argv[2], int((sys.argv[3:] or ["0"])[0]))
