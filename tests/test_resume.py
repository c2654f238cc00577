"""A run that is interrupted and resumed ends as the uninterrupted one: weights, optimizer, callbacks and history, to the bit."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from small import On, classes, net, saved, weights
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from victim import Noisy, outcome, same

import arc_nb.fitting as fitting_room
from arc_nb import EMA, SWA, Callback, Checkpoints, EarlyStopping, Trainer
from arc_nb.engine.history import History, Status

X, Y = classes(120)
HELD = classes(40, 1)


class Boom(Exception): pass


class StopAt(Callback):
    "Ends the run at a step, in one of the ways in which runs end."
    order = 60
    def __init__(self, step, how): self.at, self.how = step, how
    def on_step_end(self, trainer):
        if trainer.step != self.at: return
        if self.how == "stop": trainer.stop()
        elif self.how == "error": raise Boom("it broke")
        else: signal.raise_signal(getattr(signal, self.how))


class Rows(IterableDataset):
    "An endless kind of data: no keys, no length, drawn as it goes."
    def __iter__(self):
        for k in range(30): yield X[k] + .1 * torch.randn(4), Y[k]


class Odd:
    "An iterable that begins anew, without a length."
    def __iter__(self): return iter([(X[k:k + 10] + torch.randn(4), Y[k:k + 10]) for k in range(0, 120, 10)])


def loader(**more): return DataLoader(TensorDataset(X, Y), batch_size=10, shuffle=True, **more)


def with_norm(inputs=4, out=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.3), nn.Linear(16, out))


def make(run, data=(X, Y), valid=HELD, model=None, callbacks=(), stop=(None, ""), **more):
    "A quiet trainer, the same every time; a function makes new objects for each."
    made = [one() if type(one).__name__ == "function" else one for one in (data, model, callbacks)]
    data, model, callbacks = made[0], made[1] or net(dropout=.2), made[2]
    settings = dict(loss="cross_entropy", lr=2e-2, board=False, run=run)
    if isinstance(data, (tuple, Dataset)): settings["batch_size"] = 10
    return Trainer(model, data, valid, callbacks=[*callbacks, StopAt(*stop)], **settings | more)


def both(folder, stops, goal, **more):
    "The outcomes of a run in one go, and of one that ends at some steps and is resumed with new objects each time."
    whole = make(folder / "whole", **more)
    whole.fit(**goal)
    for stop in stops:
        t = make(folder / "parts", stop=stop, **more)
        try: t.fit(**goal, resume=(folder / "parts").exists())
        except Boom: pass
        assert t.step == stop[0] and t.status.state != "completed"
    parts = make(folder / "parts", **more)
    parts.fit(**goal, resume=True)
    assert parts.step == whole.step and parts.status.state == whole.status.state
    return outcome(whole), outcome(parts)


def assert_same(a, b):
    "Says which part differs."
    assert [] == [k for k in a if not same(a[k], b[k])]


NOISY = {"data": lambda: Noisy(120), "valid": (Noisy(40).x, Noisy(40).y), "model": lambda: with_norm(6, 2)}
SETTINGS = {
    "plain": {}, "one_cycle": {"schedule": "one_cycle"}, "cosine": {"schedule": "cosine"},
    "plateau": {"schedule": ("plateau", {"patience": 0})},
    "step by epoch": {"schedule": ("step", {"every": 2})}, "OneCycleLR": {"schedule": ("OneCycleLR", {"max_lr": .05, "total_steps": 100})},
    "MultiStepLR": {"schedule": ("MultiStepLR", {"milestones": [1, 3]})},
    "accumulate": {"accumulate": 5}, "batch norm": {"model": with_norm}, "fp16": {"precision": "fp16"}, "bf16": {"precision": "bf16"},
    "momentum": {"optimizer": ("sgd", {"momentum": .9})}, "lbfgs": {"optimizer": "lbfgs", "lr": .1},
    "clip": {"clip_norm": .1, "clip_value": .05}, "ema": {"callbacks": lambda: [EMA(.9)]},
    "ema beside": {"callbacks": lambda: [EMA(.9, use=False)]}, "swa": {"callbacks": lambda: [SWA(.5)]},
    "early stopping": {"callbacks": lambda: [EarlyStopping(patience=1)], "lr": .3},
    "train metrics": {"train_metrics": ["accuracy", "auroc", "f1"]}, "valid every 5 steps": {"valid_every": 5},
    "no shuffle": {"shuffle": False},
    "drop last": {"drop_last": True, "batch_size": 14}, "two groups": {"groups": {"0.*": {"lr": 1e-3}}, "schedule": "one_cycle"},
    "compressed": {"callbacks": lambda: [Checkpoints(every=4, compress=True)]}, "held out": {"valid": 0.25},
    "dataset": NOISY, "dataset, 2 workers": NOISY | {"workers": 2}, "dataset, held out": NOISY | {"valid": 0.25},
    "everything": NOISY | {"callbacks": lambda: [EMA(.9), EarlyStopping(patience=9)], "schedule": "one_cycle", "accumulate": 2,
                           "precision": "fp16", "train_metrics": ["accuracy", "auroc"], "metrics": ["accuracy"], "clip_norm": 1.0}}


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_is_as_if_nothing_had_been(name, tmp_path):
    settings = SETTINGS[name]
    epoch = -(-{"drop last": 8, "held out": 9, "dataset, held out": 9}.get(name, 12) // settings.get("accumulate", 1))
    stops = [(epoch // 2 + 1, "stop"), (2 * epoch, "SIGTERM"), (3 * epoch + 1, "SIGINT")]
    if name == "early stopping": stops = [(2 * epoch - 1, "stop")]
    assert_same(*both(tmp_path, stops, {"epochs": 4}, **settings))


@pytest.mark.filterwarnings("ignore:.*kept after an error in a callback")  # StopAt is the last to hear of a step: nobody misses it
@pytest.mark.parametrize("stops", [[(k, "stop")] for k in (1, 11, 12, 13, 24)] + [[(7, "error")], [(k, "stop") for k in range(1, 30, 4)]])
def test_anywhere(stops, tmp_path):
    assert_same(*both(tmp_path, stops, {"epochs": 3}, schedule="one_cycle", callbacks=lambda: [EMA(.9)]))


@pytest.mark.parametrize("goal", [{"steps": 20}, {"epochs": 3, "limit_batches": 5}, {"epochs": 9, "steps": 30}, {"steps": 24}])
def test_every_kind_of_goal(goal, tmp_path):
    assert_same(*both(tmp_path, [(7, "stop")], goal, schedule="cosine"))


FOREIGN = {"loader": loader, "loader, generator": lambda: loader(generator=torch.Generator().manual_seed(3)),
           "loader, 2 workers": lambda: loader(num_workers=2), "iterable data set": Rows, "without a length": Odd}


@pytest.mark.parametrize("name", FOREIGN)
def test_data_of_your_own_are_read_again_and_that_is_said(name, tmp_path):
    with pytest.warns(UserWarning, match="train.*read again"):
        assert_same(*both(tmp_path, [(2, "stop"), (5, "stop")], {"epochs": 3}, data=lambda: FOREIGN[name]()))


def test_a_finished_run_has_nothing_to_do(tmp_path, capsys):
    t = make(tmp_path / "r", callbacks=lambda: [EMA(.9)])
    t.fit(epochs=3)
    before = (tmp_path / "r/history.jsonl").read_bytes()
    again = make(tmp_path / "r", callbacks=lambda: [EMA(.9), On(on_step_start=lambda _: 1 / 0)][:1])
    again.fit(epochs=3, resume=True)
    assert "nothing to do" in capsys.readouterr().out and (tmp_path / "r/history.jsonl").read_bytes() == before
    assert torch.equal(weights(again.model), weights(t.model)) and again.step == 36 and again.status.state == "completed"
    again.fit(epochs=2, resume=True)
    assert again.step == 36 and torch.equal(weights(again.model), weights(t.model))


def test_early_stopping_is_an_end(tmp_path):
    settings = {"callbacks": lambda: [EarlyStopping(patience=1)], "lr": .3}
    t = make(tmp_path / "r", **settings)
    t.fit(epochs=30)
    assert t.status.state == "stopped" and t.epoch < 30
    again = make(tmp_path / "r", **settings)
    again.fit(epochs=30, resume=True)
    assert again.epoch == t.epoch and "has not improved" in again.status.message and torch.equal(weights(again.model), weights(t.model))


def test_nothing_to_resume_begins_and_says_so(tmp_path, capsys):
    for folder in (tmp_path / "r", tmp_path / "empty"):
        if folder.name == "empty": folder.mkdir()
        t = make(folder)
        t.fit(epochs=1, resume=True)
        assert "no good checkpoint to resume" in capsys.readouterr().out and t.step == 12


def test_a_trainer_resumes_its_own_run(tmp_path):
    t = make(tmp_path / "r", stop=(15, "stop"), callbacks=lambda: [EMA(.9)], schedule="one_cycle")
    t.fit(epochs=3)
    t.fit(epochs=3, resume=True)  # StopAt is past
    whole = make(tmp_path / "whole", callbacks=lambda: [EMA(.9)], schedule="one_cycle")
    whole.fit(epochs=3)
    assert_same(outcome(whole), outcome(t))


def test_the_second_of_two_fits_is_resumed(tmp_path):
    whole = make(tmp_path / "whole", schedule="one_cycle")
    whole.fit(epochs=2); whole.fit(epochs=2)
    first = make(tmp_path / "r", schedule="one_cycle", stop=(31, "stop"))
    first.fit(epochs=2); first.fit(epochs=2)
    assert first.step == 31
    parts = make(tmp_path / "r", schedule="one_cycle")
    parts.fit(epochs=4, resume=True)
    assert_same(outcome(whole), outcome(parts))


def test_a_rate_that_was_set_by_hand_is_kept(tmp_path):
    def run(folder, **more): return make(folder, schedule="one_cycle", callbacks=lambda: [On(on_step_end=halve)], **more)
    def halve(t):
        if t.step == 9: t.lr *= .5
    whole, part = run(tmp_path / "whole"), run(tmp_path / "r", stop=(14, "stop"))
    whole.fit(epochs=3); part.fit(epochs=3)
    parts = run(tmp_path / "r")
    parts.fit(epochs=3, resume=True)
    assert_same(outcome(whole), outcome(parts))


# --- Longer, planned, changed ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("unit, more", [("epochs", {"schedule": "one_cycle"}), ("steps", {"schedule": "one_cycle"}),
                                        ("epochs", {"callbacks": lambda: [SWA(.5)]})])
def test_planned_ahead_is_exact(unit, more, tmp_path):
    part, total = (2, 4) if unit == "epochs" else (19, 40)
    whole = make(tmp_path / "whole", **more)
    whole.fit(**{unit: total})
    make(tmp_path / "r", **more).fit(**{unit: part}, plan=total)
    parts = make(tmp_path / "r", **more)
    parts.fit(**{unit: total}, resume=True)
    assert_same(outcome(whole), outcome(parts))


def test_longer_than_planned(tmp_path):
    for schedule, told in ((("exponential", {"rate": .9}), False), (None, False), ("cosine", True)):
        run = tmp_path / str(told) / str(schedule)[:5]
        make(run, schedule=schedule).fit(epochs=2)
        t = make(run, schedule=schedule)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            t.fit(epochs=4, resume=True)
        assert t.epoch == 4 and [("planned for 24 steps and is now to have 48" in str(w.message)) for w in heard] == [True] * told
        if told: assert "rate goes from" in str(heard[0].message) and t.history.series("train", "lr")[1][24] > 1e-3
        if schedule is None:
            whole = make(tmp_path / "whole")
            whole.fit(epochs=4)
            assert_same(outcome(whole), outcome(t))


def test_a_plan_without_effect_is_told(tmp_path):
    with pytest.warns(UserWarning, match="plan=5 has no effect"): make(tmp_path / "r").fit(epochs=1, plan=5)
    for bad in ({"epochs": 3, "plan": 2}, {"max_time": 1, "plan": 2}, {"epochs": 1, "plan": 1.5}):
        with pytest.raises(ValueError, match="plan"): make(tmp_path / "s").fit(**bad)
    assert not (tmp_path / "s").exists()


CHANGES = {"lr": {"lr": 1e-3}, "batch_size": {"batch_size": 12}, "loss": {"loss": ("cross_entropy", {"label_smoothing": .1})},
           "optimizer": {"optimizer": "sgd"}, "schedule": {"schedule": "cosine"}, "seed": {"seed": 1},
           "train had 120 rows": {"data": classes(100)}, "train has other values": {"data": classes(120, 5)},
           "valid": {"valid": classes(40, 7)}, "callbacks": {"callbacks": lambda: [EMA()]},
           "valid was given": {"valid": None}, "precision": {"precision": "bf16"}, "accumulate": {"accumulate": 2}}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_is_named_and_refused_or_forced(name, tmp_path):
    make(tmp_path / "r", stop=(15, "stop")).fit(epochs=3)
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    t = make(tmp_path / "r", **CHANGES[name])
    start = weights(t.model)
    with pytest.raises(ValueError, match=f"(?s){name}.*resume='force'"): t.fit(epochs=3, resume=True)
    assert {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()} == before
    assert torch.equal(weights(t.model), start) and t.step == 0
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        t.fit(epochs=3, resume="force")
    assert any("not to the bit" in str(w.message) for w in heard)
    assert t.epoch == 3 and t.status.state == "completed" and t.history.series("train", "loss")[0].tolist() == list(range(1, t.step + 1))
    if name == "lr": assert t.lr == 1e-3


def test_another_model_is_refused_even_by_force(tmp_path):
    make(tmp_path / "r").fit(epochs=1)
    for resume in (True, "force"):
        other = make(tmp_path / "r", model=with_norm)
        with pytest.raises(ValueError, match=r"0.weight was \(8, 4\).*is \(16, 4\)"): other.fit(epochs=2, resume=resume)


def test_bad_uses_are_refused(tmp_path):
    with pytest.raises(ValueError, match="resume= needs.*run folder"): make(False).fit(epochs=1, resume=True)
    with pytest.raises(ValueError, match="retry= needs.*run folder"): make(False).fit(epochs=1, retry=2)
    with pytest.raises(FileNotFoundError): make(tmp_path / "r").fit(epochs=1, resume=tmp_path / "nothing")
    for bad in (-1, 1.5, True, "2"):
        with pytest.raises(ValueError, match="retry"): make(tmp_path / "r").fit(epochs=1, retry=bad)
    with pytest.raises(ValueError, match="on_oom"): make(tmp_path / "r").fit(epochs=1, on_oom="less")
    with pytest.raises(ValueError, match="duration"): make(tmp_path / "r").fit(epochs=1, stalled_after="soon")
    assert not (tmp_path / "r").exists()
    for bad in ({"keep_last": 0}, {"keep_best": -1}, {"every": "often"}, {"on_error": "cry"}):
        with pytest.raises(ValueError, match=next(iter(bad)) if "every" not in bad else "often"): Checkpoints(**bad)
    with pytest.raises(ValueError, match="same"): make(tmp_path / "r", callbacks=[Checkpoints()], checkpoint_every=5)
    with pytest.raises(ValueError, match="folder"): make(False, callbacks=[Checkpoints()])
    class Odd(Callback):
        def state_dict(self): return {"model": object()}
    with pytest.raises(TypeError, match=r"callbacks.*object"): make(tmp_path / "o", callbacks=[Odd()]).fit(epochs=1)


def test_a_run_that_is_alive_is_left_alone(tmp_path):
    make(tmp_path / "r").fit(epochs=1)
    status = Status.read(tmp_path / "r")
    status.state, status.pid = "training", 1  # a process that lives
    status.write(tmp_path / "r")
    with pytest.raises(ValueError, match="being trained by process 1"): make(tmp_path / "r").fit(epochs=2, resume=True)


def test_another_run_can_begin_from_a_checkpoint(tmp_path):
    t = make(tmp_path / "a", callbacks=lambda: [Checkpoints(every=6, keep_last=9)])
    t.fit(epochs=3)
    at = tmp_path / "a/checkpoints/step-00000018"
    before = (tmp_path / "a/history.jsonl").read_bytes()
    branch = make(tmp_path / "b", callbacks=lambda: [Checkpoints(every=6, keep_last=9)])
    branch.fit(epochs=3, resume=at)
    assert_same(outcome(t), outcome(branch))
    assert (tmp_path / "a/history.jsonl").read_bytes() == before and len(History.read(tmp_path / "b").epochs()) == 3
    back = make(tmp_path / "a", callbacks=lambda: [Checkpoints(every=6, keep_last=9)])
    back.fit(epochs=3, resume=tmp_path / "a/checkpoints/step-00000012")  # later ones lie there; what is made now is newer
    assert_same(outcome(t), outcome(back))
    assert saved(tmp_path / "a")[1]["step"] == 36


# --- Damage, disks, retries ------------------------------------------------------------------------------------------

def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    t = make(tmp_path / "r", callbacks=lambda: [Checkpoints(every=5)], stop=(17, "stop"))
    t.fit(epochs=3)
    newest = tmp_path / "r/checkpoints/step-00000017"
    file = newest / "state.safetensors"
    data = bytearray(file.read_bytes()); data[len(data) // 2] ^= 1; file.write_bytes(data)
    parts, whole = (make(tmp_path / name, callbacks=lambda: [Checkpoints(every=5)]) for name in ("r", "whole"))
    with pytest.warns(RuntimeWarning, match="step-00000017.*state.safetensors"): parts.fit(epochs=3, resume=True)
    whole.fit(epochs=3)
    assert newest.exists() and file.read_bytes() == data
    assert_same(outcome(whole), outcome(parts))


def test_a_history_that_was_damaged_is_told_and_the_weights_are_exact(tmp_path):
    make(tmp_path / "r", stop=(17, "stop")).fit(epochs=3)
    (tmp_path / "r/history.jsonl").write_text("nonsense\n")
    parts, whole = make(tmp_path / "r"), make(tmp_path / "whole")
    with pytest.warns(RuntimeWarning, match="0 of its .* lines"): parts.fit(epochs=3, resume=True)
    whole.fit(epochs=3)
    assert torch.equal(weights(parts.model), weights(whole.model))


@pytest.mark.parametrize("on_error", ["warn", "stop"])
@pytest.mark.parametrize("loss", ["deleted", "replaced by a file"])
def test_a_folder_that_is_lost_while_training(loss, on_error, tmp_path):
    def lose(t):
        if t.step != 15: return
        t._keeper.saver.wait()
        shutil.rmtree(tmp_path / ("r" if loss == "deleted" else "r/checkpoints"))
        if loss != "deleted": (tmp_path / "r/checkpoints").write_text("")
    def slowly(t): time.sleep(.01)
    t = make(tmp_path / "r", callbacks=[Checkpoints(every=4, on_error=on_error), On(on_step_end=lose, on_step_start=slowly)])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        t.fit(epochs=12)
    told = [str(w.message) for w in heard if "could not be written" in str(w.message)]
    assert told and weights(t.model).isfinite().all()
    assert (t.status.state, t.step == 144) == (("completed", True) if on_error == "warn" else ("failed", False))
    assert len(t.history.series("train", "loss")[0]) == t.step


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="a small disk is mounted, which only root may do")
def test_a_disk_that_is_full_for_a_while(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode: pytest.skip("no mounting here")
    try:
        def fill(t):
            if t.step == 20:  # somebody else fills it to the last byte
                with contextlib.suppress(OSError): (disk / "film").write_bytes(bytes(10**6))
            if t.step == 60: (disk / "film").unlink()
        slow = On(on_step_start=lambda t: time.sleep(.01))
        wide = nn.Sequential(nn.Linear(4, 2000), nn.ReLU(), nn.Linear(2000, 3))  # 190 kB a checkpoint
        t = make(disk / "r", model=wide, callbacks=[Checkpoints(every=10), slow, On(order=90, on_step_start=fill)])
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            t.fit(epochs=8)
        told = [str(w.message) for w in heard]
        assert t.status.state == "completed" and any("could not be written" in s and "No space left" in s for s in told)
        assert sum("history cannot be written" in s for s in told) <= 1 and sum("status cannot be written" in s for s in told) <= 1
        assert saved(disk / "r")[1]["step"] == 96 and not list((disk / "r/checkpoints").glob(".tmp*"))
        assert len(History.read(disk / "r").series("train", "loss")[0]) == 96  # what had to wait was written later
    finally: subprocess.run(["umount", disk], check=True)


def test_a_file_of_the_first_format_gives_weights_and_optimizer_but_no_place(tmp_path):
    old = Path(__file__).parent / "formats/1.pt"
    state = torch.load(old, weights_only=True)
    t = make(tmp_path / "r", model=net())
    t.load_checkpoint(old)
    assert all(torch.equal(v, state["model"][k]) for k, v in t.model.state_dict().items()) and t.step == state["step"] > 0
    assert torch.equal(t.optimizer.state_dict()["state"][0]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"])
    with pytest.raises(ValueError, match="does not say where.*load_checkpoint"): make(tmp_path / "s").fit(epochs=1, resume=old)


def test_save_now_and_by_hand(tmp_path):
    kept = []
    def ask(t):
        if t.step == 5: kept.append(t.save_checkpoint())
    t = make(tmp_path / "r", callbacks=[On(on_step_end=ask)], checkpoint_every=None, valid=None)
    t.fit(epochs=1)
    assert kept == [None] and [p.name for p in sorted((tmp_path / "r/checkpoints").iterdir())] == ["step-00000005", "step-00000012"]
    path = t.save_checkpoint(tmp_path / "elsewhere/mine")
    assert path == tmp_path / "elsewhere/mine" and t.save_checkpoint().parent == (tmp_path / "r/checkpoints").resolve()
    with pytest.raises(ValueError, match="exists"): t.save_checkpoint(path)
    other = make(False)
    with pytest.raises(ValueError, match="run folder"): other.save_checkpoint()
    other.load_checkpoint(path)
    assert torch.equal(weights(other.model), weights(t.model)) and other.step == 12
    a, b = (v["state"][0]["exp_avg"] for v in (other.optimizer.state_dict(), t.optimizer.state_dict()))
    assert torch.equal(a, b)
    with pytest.raises(FileNotFoundError): other.load_checkpoint("best")
    with pytest.raises(ValueError, match="model"): make(False, model=with_norm).load_checkpoint(path)


@pytest.mark.parametrize("form", ["tensors", "dataset", "loader"])
def test_retry_goes_on_from_the_last_good_checkpoint(form, tmp_path, monkeypatch):
    monkeypatch.setattr(fitting_room, "PAUSE", .01)
    faults = [9, 20, 26]
    def fail(t):
        if faults and t.step == faults[0]: faults.pop(0); raise OSError("the file server is away")
    data = {"tensors": (X, Y), "dataset": lambda: TensorDataset(X, Y).__class__(X, Y), "loader": loader}[form]
    t = make(tmp_path / "r", data=data, callbacks=lambda: [EMA(.9), On(on_step_start=fail)], schedule="one_cycle")
    whole = make(tmp_path / "whole", data=data, callbacks=lambda: [EMA(.9), On(on_step_start=lambda t: None)], schedule="one_cycle")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        t.fit(epochs=3, retry=3)
    assert sum("goes on from its last good checkpoint" in str(w.message) for w in heard) == 3
    whole.fit(epochs=3)
    assert_same(outcome(whole), outcome(t))


def test_retry_gives_up_with_the_error_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting_room, "PAUSE", .01)
    def fail(t): raise Boom("always")
    t = make(tmp_path / "r", callbacks=[On(on_step_end=fail)])
    with warnings.catch_warnings(record=True) as heard, pytest.raises(Boom):
        warnings.simplefilter("always")
        t.fit(epochs=1, retry=2)
    told = [str(w.message) for w in heard]
    assert [f"attempt {k} of 2" in s for k, s in ((1, told[0]), (2, told[2]))] == [True, True] and "Boom: always" in told[0]
    assert len(told) == 4 and all("in a callback, at on_step_end" in s and "not to the bit" in s for s in (told[1], told[3]))
    assert t.status.state == "failed" and t.step == 3  # a step was made before each error, and kept


def test_a_step_that_broke_in_the_middle_is_not_kept(tmp_path):
    t = make(tmp_path / "r", callbacks=lambda: [Checkpoints(every=4)])
    step = t.optimizer.step
    def half(*args):
        if t.step == 9: t.model[0].weight.data.add_(99); raise Boom("in the middle")
        return step(*args)
    t.optimizer.step = half
    with pytest.raises(Boom): t.fit(epochs=1)
    assert saved(tmp_path / "r")[1]["step"] == 8
    parts, whole = (make(tmp_path / name, callbacks=lambda: [Checkpoints(every=4)]) for name in ("r", "whole"))
    parts.fit(epochs=2, resume=True); whole.fit(epochs=2)
    assert_same(outcome(whole), outcome(parts))


def test_an_error_in_the_data_or_in_validation(tmp_path):
    for event, step in (("on_valid_start", 12), ("on_valid_end", 24), ("on_epoch_end", 12), ("on_epoch_start", 12), ("on_step_start", 7)):
        hit = []
        def fail(t, step=step, hit=hit):
            if t.step == step and not hit: hit.append(1); raise Boom(f"at {step}")
        run = tmp_path / f"{event}"
        t = make(run, callbacks=lambda event=event, fail=fail: [EMA(.9), On(**{event: fail})], schedule="one_cycle")
        with pytest.raises(Boom): t.fit(epochs=3)
        assert len(History.read(run).series("train", "loss")[0]) == step == saved(run)[1]["step"]
        told = pytest.warns(RuntimeWarning, match=event) if saved(run)[1]["broken"] else contextlib.nullcontext()
        calm = lambda event=event: [EMA(.9), On(**{event: lambda t: None})]
        parts, whole = (make(folder, callbacks=calm, schedule="one_cycle") for folder in (run, run / "w"))
        with told: parts.fit(epochs=3, resume=True)
        whole.fit(epochs=3)
        assert_same(outcome(whole), outcome(parts))  # `On` is the last to hear of these: the others have done their part


@pytest.mark.parametrize("valid_every, step", [("1 epoch", 12), (5, 5), (5, 10)])
def test_a_stop_in_the_middle_of_a_validation_is_heard_and_made_up_for(valid_every, step, tmp_path):
    class Slow(Dataset):
        trainer, seen = None, 0
        def __len__(self): return 100
        def __getitem__(self, k):
            if self.trainer and self.trainer.step == step: Slow.seen += 1; time.sleep(.02)
            if Slow.seen == 30: self.trainer.stop()
            return X[k], Y[k]
    Slow.seen = 0
    calm = dict(valid=Slow(), valid_every=valid_every, callbacks=lambda: [EMA(.9)], schedule="one_cycle")
    t, whole, parts = (make(tmp_path / name, **calm) for name in ("r", "whole", "r"))
    t.setup.given["valid"].trainer = t
    t.fit(epochs=2)
    assert t.step == step and Slow.seen < 60 and t.status.state == "stopped"
    assert len(t.history.series("valid", "loss")[0]) == (1 if step == 10 else 0)
    t.setup.given["valid"].trainer = None
    whole.fit(epochs=2); parts.fit(epochs=2, resume=True)
    assert_same(outcome(whole), outcome(parts))


def test_nan_leaves_a_good_checkpoint_and_a_resume_goes_on_behind_it(tmp_path):
    bad = X.clone(); bad[:] = X
    hit = []
    def spoil(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        if len(hit) == 20: hit.append(1); return loss * float("nan")
        hit.append(1)
        return loss
    t = make(tmp_path / "r", loss=None, step=spoil)
    with pytest.warns(RuntimeWarning, match="stopped at step"): t.fit(epochs=3)
    step = t.step
    state = saved(tmp_path / "r")[0]
    assert t.status.state == "failed" and state["step"] == step and all(v.isfinite().all() for v in state["model"].values())
    t.fit(epochs=3, resume=True)
    assert t.status.state == "completed" and t.step == 36


def test_a_time_limit_keeps_the_place(tmp_path):
    slow = lambda: [On(on_step_end=lambda t: time.sleep(.02))]
    t = make(tmp_path / "r", callbacks=slow)
    t.fit(epochs=3, max_time=.3)
    assert t.status.state == "stopped" and 0 < t.step < 36
    while t.step < 36:
        before, t = t.step, make(tmp_path / "r", callbacks=slow)
        t.fit(epochs=3, max_time=1, resume=True)  # a second more each time
        assert t.step > before
    whole = make(tmp_path / "whole", callbacks=lambda: [On(on_step_end=lambda t: None)])
    whole.fit(epochs=3)
    assert_same(outcome(whole), outcome(t))


def test_a_stall_is_reported_with_its_place(tmp_path):
    def hang(t):
        if t.step == 3: time.sleep(1.2)
    t = make(tmp_path / "r", callbacks=[On(on_step_end=hang)])
    with pytest.warns(RuntimeWarning, match=r"step .* test_resume.py.*hang"): t.fit(epochs=1, stalled_after=.4)
    assert t.status.state == "completed" and threading.active_count() < 20


class Large(nn.Module):
    "Needs more memory than there is for more than some rows."
    def __init__(self, rows): super().__init__(); self.body, self.rows = net(), rows
    def forward(self, x):
        if self.training and len(x) > self.rows: raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return self.body(x)


def test_out_of_memory_accumulates_and_a_resume_remembers(tmp_path):
    settings = dict(model=lambda: Large(4), schedule="one_cycle")
    with pytest.raises(torch.OutOfMemoryError): make(tmp_path / "r", **settings).fit(epochs=1)
    t, plain = make(tmp_path / "s", stop=(15, "stop"), **settings), make(tmp_path / "plain", model=lambda: Large(99), schedule="one_cycle")
    with pytest.warns(RuntimeWarning, match="out of memory with 10 rows.*effective batch stays 10"): t.fit(epochs=3, on_oom="accumulate")
    parts = make(tmp_path / "s", **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it knows the size of the pieces
        parts.fit(epochs=3, on_oom="accumulate", resume=True)
    plain.fit(epochs=3)
    assert parts.step == 36 and torch.allclose(weights(parts.model), weights(plain.model), atol=1e-4)


def test_config_remembers_resumes(tmp_path):
    make(tmp_path / "r", stop=(5, "stop")).fit(epochs=1)
    (tmp_path / "r/config.json").write_text('{"half')
    make(tmp_path / "r").fit(epochs=1, resume=True)
    assert json.loads((tmp_path / "r/config.json").read_text())["resumed"][0]["from"] == "step-00000005"


# --- What a person does by the way -----------------------------------------------------------------------------------

class Remembers(nn.Module):
    "A loss with a memory, and a module that a state_dict leaves out a part of."
    def __init__(self): super().__init__(); self.register_buffer("mean", torch.zeros(()))
    def forward(self, output, target):
        loss = nn.functional.cross_entropy(output, target)
        self.mean = .9 * self.mean + .1 * loss.detach()
        return loss * (1 + self.mean)


class Counts(nn.Module):
    def __init__(self): super().__init__(); self.body = net(); self.register_buffer("seen", torch.zeros(()), persistent=False)
    def forward(self, x):
        if self.training: self.seen = self.seen + len(x) / 1000
        return self.body(x) * (1 + self.seen)


def thaw(t):
    for p in t.model[0].parameters(): p.requires_grad_(t.epoch > 1)


@pytest.mark.parametrize("more", [{"loss": Remembers}, {"model": lambda: Counts()}, {"callbacks": lambda: [On(on_epoch_start=thaw)]}],
                         ids=["loss with a memory", "buffer that is not persistent", "layers thawed by epoch"])
def test_what_lies_beside_the_weights_is_kept(more, tmp_path):
    more = {k: v() if k == "loss" else v for k, v in more.items()}
    whole = make(tmp_path / "whole", **more)
    whole.fit(epochs=3)
    if "loss" in more: more["loss"] = Remembers()
    make(tmp_path / "r", stop=(17, "stop"), **more).fit(epochs=3)
    if "loss" in more: more["loss"] = Remembers()
    parts = make(tmp_path / "r", **more)
    parts.fit(epochs=3, resume=True)
    assert_same(outcome(whole), outcome(parts))


def test_metrics_may_change(tmp_path):
    make(tmp_path / "r", stop=(17, "stop")).fit(epochs=3)
    t = make(tmp_path / "r", train_metrics=["accuracy"], metrics=["accuracy"])
    t.fit(epochs=3, resume=True)
    assert t.history.epochs().train_accuracy.notna().tolist() == [False, True, True]


def test_larger_batches_by_force_keep_the_shape_of_the_schedule(tmp_path):
    make(tmp_path / "r", stop=(18, "stop"), schedule="one_cycle").fit(epochs=3)  # half of 36
    t = make(tmp_path / "r", schedule="one_cycle", batch_size=20)
    with pytest.warns(UserWarning) as heard: t.fit(epochs=3, resume="force")
    assert t.epoch == 3 and t.step == 18 + 9 and len(heard) == 2
    rates = t.history.series("train", "lr")[1]
    assert rates[18] == pytest.approx(rates[17], rel=.15) and rates[-1] < .05 * rates[18]


def test_the_folder_of_a_run_stands_for_its_newest_checkpoint(tmp_path):
    make(tmp_path / "a", stop=(17, "stop")).fit(epochs=3)
    whole = make(tmp_path / "whole")
    whole.fit(epochs=3)
    for k, path in enumerate((tmp_path / "a", tmp_path / "a/checkpoints")):
        t = make(tmp_path / f"b{k}")
        t.fit(epochs=3, resume=path)
        assert_same(outcome(whole), outcome(t))
    other = make(False)
    other.load_checkpoint(tmp_path / "a")
    assert other.step == 17
    for wrong in ("last", "froce", 1):
        with pytest.raises(ValueError, match="none of True, 'force', or the path"): make(tmp_path / "a").fit(epochs=3, resume=wrong)


def test_a_checkpoint_that_lies_outside_of_its_run(tmp_path):
    t = make(tmp_path / "a")
    t.fit(epochs=1)
    path = t.save_checkpoint(tmp_path / "mine")
    branch, whole = make(tmp_path / "b"), make(tmp_path / "whole")
    with pytest.warns(UserWarning, match="outside of its run: the history begins at step 12"): branch.fit(epochs=2, resume=path)
    whole.fit(epochs=2)
    assert torch.equal(weights(branch.model), weights(whole.model)) and branch.history.epochs().epoch.tolist() == [2]


def test_a_goal_that_lies_behind(tmp_path, capsys):
    t = make(tmp_path / "r", stop=(30, "stop"))
    t.fit(epochs=2); t.fit(epochs=2)
    assert t.step == 30
    again = make(tmp_path / "r")
    again.fit(epochs=2, resume=True)
    assert again.step == 30 and "nothing to do" in capsys.readouterr().out


def test_mistakes_are_told_before_the_work(tmp_path):
    for callback in (EarlyStopping("valid_acuracy"), Checkpoints(monitor="valid_acuracy")):
        with pytest.raises(ValueError, match="did you mean 'valid_accuracy'"):
            make(tmp_path / "r", metrics=["accuracy"], callbacks=[callback]).fit(epochs=1)
    with pytest.raises(ValueError, match="whole"): Checkpoints(every=2.5)
    with pytest.raises(ValueError, match="keep_last"): Checkpoints(keep_last=True)
    with pytest.warns(UserWarning, match="checkpoint_every has no effect"): make(False, checkpoint_every=5)
    def load(t): t.load_checkpoint("last")
    with pytest.raises(RuntimeError, match="training.*stop"): make(tmp_path / "s", callbacks=[On(on_epoch_end=load)]).fit(epochs=1)


def test_a_damaged_status_does_not_keep_anybody_from_a_run(tmp_path):
    make(tmp_path / "r", stop=(5, "stop")).fit(epochs=1)
    for damaged in ("", "[1", "null", "7"):
        (tmp_path / "r/status.json").write_text(damaged)
        assert Status.read(tmp_path / "r").state == "failed"
    t = make(tmp_path / "r")
    t.fit(epochs=1, resume=True)
    assert t.step == 12


def test_every_checkpoint_can_be_kept(tmp_path):
    make(tmp_path / "r", callbacks=[Checkpoints(every=3, keep_last=None, keep_best=0)]).fit(epochs=2)
    assert len(list((tmp_path / "r/checkpoints").iterdir())) == 8


def test_a_state_that_is_not_finite_pushes_no_healthy_one_out(tmp_path):
    def spoil(t):
        if t.step > 14: t.model[0].weight.data.fill_(float("nan"))
    t = make(tmp_path / "r", callbacks=lambda: [On(on_step_end=spoil)], valid=None)
    with pytest.warns(RuntimeWarning, match="not finite"): t.fit(epochs=3)
    assert all(v.isfinite().all() for v in saved(tmp_path / "r")[0]["model"].values()) and saved(tmp_path / "r")[1]["step"] == 12


def test_stopping_for_a_disk_is_a_failure_also_at_the_very_end(tmp_path):
    def lose(t):
        if t.step == 3: shutil.rmtree(tmp_path / "r")
    t = make(tmp_path / "r", callbacks=[Checkpoints(every=4, on_error="stop"), On(on_step_end=lose)])
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        t.fit(steps=6)
    assert t.status.state == "failed" and "could not be written" in t.status.message
    assert {w.filename for w in heard} == {__file__}  # warnings point at the person's own line


def test_a_batch_that_does_not_fit_is_no_reason_to_refuse_the_model(tmp_path):
    class Tight(Large):
        def forward(self, x):
            if len(x) > self.rows: raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
            return self.body(x)
    t = make(tmp_path / "r", model=lambda: Tight(4))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        t.fit(epochs=2, on_oom="accumulate")
    assert t.step == 24 and sum("out of memory" in str(w.message) for w in heard) == 2  # training, and validation, whose batches are larger
    with pytest.raises(torch.OutOfMemoryError): make(False, model=lambda: Tight(4)).fit(epochs=1)


def test_a_resume_finds_its_run_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    t = make("rel", stop=(17, "stop"))
    t.fit(epochs=3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    t.fit(epochs=3, resume=True)
    assert t.step == 36 and not list((tmp_path / "elsewhere").iterdir())
    shutil.rmtree(tmp_path / "rel/checkpoints")
    with pytest.raises(ValueError, match="no good checkpoint any more"): t.fit(epochs=4, resume=True)


class Scaled(Dataset):
    def __init__(self, factor, seed=0): self.factor, self.draw = factor, torch.Generator().manual_seed(seed) if seed else None
    def __len__(self): return 120
    def __getitem__(self, k): return self.factor * X[k] + (torch.randn(4, generator=self.draw) if self.draw else 0), Y[k]


QUIET = {"activation": ({"model": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))},
                        {"model": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))}, "Tanh.*ReLU"),
         "decay of an average": ({"callbacks": lambda: [EMA(.9)]}, {"callbacks": lambda: [EMA(.5)]}, r"EMA\(0.9\).*EMA\(0.5\)"),
         "built optimizer": ({"optimizer": ("sgd", {"momentum": .9})}, {"optimizer": ("sgd", {"momentum": .5})}, "momentum"),
         "values of a data set": ({"data": lambda: Scaled(1)}, {"data": lambda: Scaled(2)}, "train has other values")}


@pytest.mark.parametrize("name", QUIET)
def test_changes_that_no_shape_shows_are_named(name, tmp_path):
    before, after, told = QUIET[name]
    make(tmp_path / "r", stop=(17, "stop"), **before).fit(epochs=2)
    with pytest.raises(ValueError, match=f"(?s){told}"): make(tmp_path / "r", **after).fit(epochs=2, resume=True)
    make(tmp_path / "r", **before).fit(epochs=2, resume=True)


def test_optimizers_that_were_built_are_compared_by_their_settings(tmp_path):
    def run(momentum, **more):
        model = net(dropout=.2)
        return make(tmp_path / "r", model=model, optimizer=torch.optim.SGD(model.parameters(), lr=.1, momentum=momentum), lr=.1, **more)
    run(.9, stop=(17, "stop")).fit(epochs=2)
    with pytest.raises(ValueError, match="momentum"): run(.5).fit(epochs=2, resume=True)
    run(.9).fit(epochs=2, resume=True)


def test_data_that_nobody_seeded_are_not_taken_for_changed(tmp_path):
    make(tmp_path / "r", data=lambda: Scaled(1, seed=3), stop=(17, "stop")).fit(epochs=2)
    make(tmp_path / "r", data=lambda: Scaled(1, seed=4)).fit(epochs=2, resume=True)


def test_precision_and_numbers_are_compared_by_what_they_mean(tmp_path):
    make(tmp_path / "r", stop=(17, "stop")).fit(epochs=2)
    t = make(tmp_path / "r", precision="fp32")
    t.fit(epochs=2, resume=True)
    assert t.step == 24 and make(False, lr=np.float32(.02)).lr == pytest.approx(.02)


def test_a_linked_folder_stays_a_link(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "r").symlink_to(tmp_path / "big/run")
    for _ in range(2): make(tmp_path / "r").fit(epochs=1)
    assert (tmp_path / "r").is_symlink() and {p.name for p in (tmp_path / "big").iterdir()} == {"run", "run-1"}


def test_the_watchdog_outlives_warnings_that_are_errors(tmp_path):
    def hang(t):
        if t.step in (3, 6): time.sleep(1.2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        t = make(tmp_path / "r", callbacks=[On(on_step_end=hang)])
        t.fit(epochs=1, stalled_after=.4)
    assert t.status.state == "completed" and "hang" in t.status.message


def test_two_good_checkpoints_are_kept_beside_a_damaged_one(tmp_path):
    many = lambda: [Checkpoints(every=5, keep_best=0)]
    make(tmp_path / "r", callbacks=many, stop=(17, "stop")).fit(epochs=3)
    file = tmp_path / "r/checkpoints/step-00000017/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    again = make(tmp_path / "r", callbacks=many, stop=(21, "stop"))
    with pytest.warns(RuntimeWarning, match="step-00000017"): again.fit(epochs=3, resume=True)
    assert {p.name for p in file.parents[1].iterdir()} == {"step-00000017", "step-00000020", "step-00000021"}


@pytest.mark.parametrize("kind", ["ReduceLROnPlateau", "StepLR", "CosineAnnealingLR"])
def test_schedulers_that_were_built_are_compared_by_what_they_were_made_with(kind, tmp_path):
    def run(folder, number, **more):
        model = net(dropout=.2)
        optimizer = torch.optim.SGD(model.parameters(), lr=.1)
        argument = {"ReduceLROnPlateau": "patience", "StepLR": "step_size", "CosineAnnealingLR": "T_max"}[kind]
        scheduler = getattr(torch.optim.lr_scheduler, kind)(optimizer, **{argument: number + 1})
        return make(folder, model=model, optimizer=optimizer, schedule=scheduler, lr=.1, **more)
    t, whole = run(tmp_path / "r", 1, stop=(17, "stop")), run(tmp_path / "whole", 1)
    t.fit(epochs=3); whole.fit(epochs=3)
    with pytest.raises(ValueError, match="schedule was"): run(tmp_path / "r", 2).fit(epochs=3, resume=True)
    t.fit(epochs=3, resume=True)  # the same objects, which have moved
    assert_same(outcome(whole), outcome(t))


def test_a_rate_that_is_set_before_a_resume_holds(tmp_path):
    for schedule in (None, "one_cycle"):
        t = make(tmp_path / str(schedule), schedule=schedule, stop=(17, "stop"))
        t.fit(epochs=3)
        before = t.lr
        t.lr = before / 10
        t.fit(epochs=3, resume=True)
        rates = t.history.series("train", "lr")
        at = rates[1][np.searchsorted(rates[0], 18)] if schedule else t.lr
        assert at == pytest.approx(before / 10, rel=.1)


def test_a_history_that_is_gone_is_told_and_the_run_stays_where_it_is(tmp_path):
    make(tmp_path / "r", stop=(17, "stop")).fit(epochs=3)
    (tmp_path / "r/history.jsonl").unlink()
    t = make(tmp_path / "r")
    with pytest.warns(RuntimeWarning, match="0 of its"): t.fit(epochs=3, resume=True)
    assert t.step == 36 and {p.name for p in tmp_path.iterdir()} == {"r"}


def test_a_disk_that_stays_away_is_told_once(tmp_path, monkeypatch):
    def full(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    t = make(tmp_path / "r", callbacks=[Checkpoints(every=2)])
    with pytest.warns(RuntimeWarning) as heard: t.fit(epochs=3)
    assert len([w for w in heard if "could not be written" in str(w.message)]) == 1
