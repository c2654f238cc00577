"""What cannot work is refused: one clear sentence, before the first step, and nothing half-made."""
import os
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from small import On, classes, files, net, numbers, saved, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from arc_nb import Callback, Trainer
from arc_nb.engine.callbacks import EMA, SWA, EarlyStopping

X, Y = classes()
NAN = X.clone()
NAN[7, 2] = float("nan")
FRAME = pd.DataFrame(X.numpy(), columns=["age", "weight", "height", "score"])


class Nothing(Dataset):
    def __len__(self): return 0
    def __getitem__(self, i): raise IndexError(i)


class NoStream(IterableDataset):
    def __iter__(self): return iter(())


class Holes(Dataset):
    "The first row is missing a value."
    def __len__(self): return 60
    def __getitem__(self, i): return (X[i] if i else X[i] * float("nan")), Y[i]


class Unsized(Dataset):
    def __getitem__(self, i): return X[i], Y[i]


DATA = {
    "no rows": ((X[:0], Y[:0]), ValueError, "train has no rows"),
    "an empty frame": ((FRAME[:0], pd.Series(Y.numpy())[:0]), ValueError, "train has no rows"),
    "an empty dict": ({}, ValueError, "train"),
    "an empty tuple": ((), ValueError, "train"),
    "an empty list": ([], ValueError, "train has no batches"),
    "an empty generator": ((b for b in ()), ValueError, "train has no batches"),
    "an empty Dataset": (Nothing(), ValueError, "train has no rows"),
    "an empty stream": (NoStream(), ValueError, "train has no batches"),
    "an empty loader": (DataLoader(Nothing()), ValueError, "train has no batches"),
    "NaN": ((NAN, Y), ValueError, r"missing or infinite values in 1 of 60 rows \(column 2\)"),
    "infinity": ((NAN.nan_to_num(float("inf")), Y), ValueError, "missing or infinite"),
    "NaN in a frame": ((FRAME.mask(FRAME == FRAME.age[5]), Y), ValueError, "1 of 60 rows.*age"),
    "NaN in a target": ((X, Y.float().where(Y > 0, float("nan"))), ValueError, "missing or infinite|NaN"),
    "NaN in a Dataset": (Holes(), ValueError, "missing or infinite"),
    "NaN in batches": ([(NAN, Y)], ValueError, "missing or infinite"),
    "words in a frame": ((FRAME.assign(name="Ann"), Y), ValueError, "name.*no numbers"),
    "words as labels": ((X, np.array(["a", "b", "c"] * 20)), ValueError, "numpy.unique"),
    "objects": ((np.array([[object()] * 4] * 60), Y), ValueError, "object"),
    "other lengths": ((X, Y[:5]), ValueError, "different lengths.*60.*5"),
    "no target": ((X,), ValueError, "target"),
    "one tensor": (X, ValueError, "target"),
    "batches without target": ([X[:8], X[8:]], ValueError, "target"),
    "too few columns": ((X[:, :3], Y), ValueError, r"cannot take its inputs, float32 \((16|32), 3\)"),
    "rows without columns": ((X[:, 0], Y), ValueError, "cannot take its inputs"),
    "whole numbers for a linear layer": ((torch.zeros(60, 4, dtype=torch.int64), Y), ValueError, "cannot take its inputs, int64"),
    "too many inputs": ((X, X, Y), ValueError, "cannot take its inputs"),
    "targets out of range": ((X, Y + 2), ValueError, "3 classes.*targets hold"),
    "targets below zero": ((X, Y - 1), ValueError, "targets hold"),
    "float classes": ((X, Y.float()), ValueError, "cross_entropy|classes"),
    "two columns of targets": ((X, torch.stack([Y, Y], 1)), ValueError, "cross_entropy|classes"),
    "a single value": ((X, torch.tensor(1)), ValueError, "rows"),
    "a word": ("train.csv", TypeError, "train is a str"),
    "a number": (5, TypeError, "train is a int"),
    "a Dataset without length": (Unsized(), TypeError, "IterableDataset"),
    "a dict without target": ({"x": X, "label": Y}, ValueError, "target="),
}


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("what", ["train", "valid"])
def test_bad_data_are_refused_before_anything_is_made(name, what, tmp_path):
    data, kind, message = DATA[name]
    if name == "an empty generator": data = (b for b in ())
    if name == "an empty generator" and what == "valid": message = "valid is a generator.*read only once"
    pair = (data, None) if what == "train" else ((X, Y), data)
    with pytest.raises(kind, match=message.replace("train", what) if name not in ("a word",) else f"{what} is a str"):
        Trainer(net(), *pair, loss="cross_entropy", run=tmp_path / "r", board=False,
                **({"batch_size": 16} if isinstance(pair[0], (tuple, dict)) else {}))
    assert not files(tmp_path)


def make(**settings): return lambda: trainer(**settings)


NAMES = {
    "loss": (make(loss="cross_entrpy"), "no loss.*'cross_entrpy'.*cross_entropy"),
    "loss option": (make(loss=("huber", {"delt": 1})), "delt.*delta"),
    "metric": (make(metrics=["acuracy"]), "no metric.*'acuracy'.*accuracy"),
    "train metric": (make(train_metrics=["acuracy"]), "no metric.*'acuracy'.*accuracy"),
    "optimizer": (make(optimizer="adamv"), "no optimizer.*'adamv'.*adam"),
    "optimizer option": (make(optimizer=("sgd", {"momentun": 0.9})), "momentun.*momentum"),
    "schedule": (make(schedule="cosin"), "no schedule.*'cosin'.*cosine"),
    "schedule option": (make(schedule=("cosine", {"flor": 0.1})), "flor.*floor"),
    "group": (make(groups={"weigths": {"lr": 1.0}}), "weigths"),
    "precision": (make(precision="fp8"), "'fp8'.*bf16"), "device": (make(device="gpu"), "'gpu'.*cuda"),
    "board": (make(board="html"), "'html'.*widget"), "strategy": (make(strategy="dpp"), "did you mean.*ddp|'dpp'"),
    "compile": (make(compile="all"), "'all'.*step"), "track": (make(track="tensorbord"), "no tracker.*'tensorbord'.*'tensorboard'"),
    "checkpoint_every": (make(checkpoint_every="1 fortnight"), "1 fortnight.*10 min"),
    "valid_every": (make(valid_every="never"), "never"),
    "batch_size": (make(batch_size=0), "batch_size=0"), "batch_size float": (make(batch_size=1.5), "batch_size=1.5"),
    "accumulate": (make(accumulate=0), "accumulate=0"), "workers": (make(workers=-1), "workers=-1"),
    "lr": (make(lr=-1.0), "lr=-1"), "lr text": (make(lr="fast"), "lr='fast'"), "lr nan": (make(lr=float("nan")), "lr=nan"),
    "lr inf": (make(lr=float("inf")), "lr=inf"), "lr None": (make(lr=None), "lr=None"),
    "clip_norm": (make(clip_norm=0), "clip_norm=0"), "clip_value": (make(clip_value=-2), "clip_value=-2"),
    "seed": (make(seed="a"), "seed='a'"), "seed None": (make(seed=None), "seed=None"), "seed 1.5": (make(seed=1.5), "seed=1.5"),
    "seed too large": (make(seed=2**64), "seed=1844"), "seed True": (make(seed=True), "seed=True"),
    "a generator as valid": (lambda: trainer(valid=iter([(X, Y)])), "valid is a list_iterator.*list of batches"),
    "train without target": (make(data=[(X,)]), "^train: a batch has to be"),
    "valid without target": (make(valid=[(X,)]), "^valid: a batch has to be"),
    "l1": (make(l1=-1.0), "l1"), "valid 1.5": (make(valid=1.5), "1.5.*between 0 and 1"), "valid 0.0": (make(valid=0.0), "between 0 and 1"),
    "too small a share": (make(valid=0.001), "no rows in one of the splits"), "too large a share": (make(valid=0.999), "no rows"),
    "drop_last": (make(drop_last=True, batch_size=100), "60 rows.*100"),
    "no loss": (make(loss=None), "loss="), "both": (make(step=lambda m, b: 0, loss="mse"), "not both"),
    "metrics of a step": (make(step=lambda m, b: 0, metrics=["accuracy"]), "step="),
    "shapes that would be broadcast": (lambda: trainer(net(3), numbers(), loss="mse"), r"\(16, 3\).*\(16, 1\)"),
    "weights below zero": (make(data=(X, Y, -torch.ones(60)), weighted=True), "at least 0"),
    "weights of another length": (make(data=(X, Y, torch.ones(50)), weighted=True), "length"),
    "everything frozen": (lambda: trainer(net().requires_grad_(False)), "frozen"),
    "lbfgs with fp16": (make(optimizer="lbfgs", precision="fp16"), "lbfgs.*fp16"),
    "a model without parameters": (lambda: trainer(nn.Identity()), "no parameters|nothing to train"),
    "a foreign optimizer": (make(optimizer=torch.optim.SGD(net().parameters(), lr=1.0)), "model"),
    "a foreign schedule": (make(schedule=torch.optim.lr_scheduler.StepLR(torch.optim.SGD(net().parameters(), lr=1.0), 1)), "optimizer"),
    "decay": (lambda: EMA(2), "decay"), "start": (lambda: SWA(1.0), "start"),
    "patience": (lambda: EarlyStopping(patience=0), "patience"),
    "mode": (lambda: EarlyStopping(mode="least"), "mode"),
    "a misspelled event": (lambda: trainer(callbacks=[type("C", (Callback,), {"on_epoch_ends": lambda s, t: 0})()]), "on_epoch_end"),
}
TYPES = {
    "a class": (lambda: Trainer(nn.Linear, (X, Y), loss="mse", run=False), "Module.*object"),
    "no model": (lambda: Trainer("gpt", (X, Y), loss="mse", run=False), "Module"),
    "a number as loss": (make(loss=3), "a loss is"), "a number as metric": (make(metrics=[3]), "a metric is"),
    "a number as optimizer": (make(optimizer=3), "an optimizer is"), "a number as schedule": (make(schedule=3), "a schedule is"),
    "a class as callback": (make(callbacks=[EMA]), r"EMA\(\)"), "a function as callback": (make(callbacks=[print]), "Callback"),
    "a class alone": (make(callbacks=EMA), r"EMA\(\)"), "a number as callbacks": (make(callbacks=3), "Callback"),
    "a share of a loader": (lambda: trainer(data=DataLoader(TensorDataset(X, Y)), valid=0.2), "DataLoader"),
    "a whole number as valid": (make(valid=1), "valid is a int"),
    "another argument": (make(epochs=3), "epochs"),
}


@pytest.mark.parametrize("case", NAMES)
def test_bad_settings_are_refused_with_what_is_known(case):
    call, message = NAMES[case]
    with pytest.raises(ValueError, match=f"(?s){message}"): call()


@pytest.mark.parametrize("case", TYPES)
def test_wrong_types_are_refused(case):
    call, message = TYPES[case]
    with pytest.raises(TypeError, match=message): call()


def test_one_callback_needs_no_list():
    t = trainer(callbacks=EMA())
    assert [type(c) for c in t.callbacks] == [EMA] == [type(c) for c in trainer(track=EMA()).callbacks]


@pytest.mark.parametrize("settings, message", [
    ({}, "how far"), ({"epochs": 0}, "epochs=0"), ({"epochs": 1.5}, "epochs=1.5"), ({"epochs": "3"}, "epochs='3'"),
    ({"steps": -1}, "steps=-1"), ({"epochs": 1, "limit_batches": 0}, "limit_batches=0"), ({"epochs": 1, "log_every": 0}, "log_every=0"),
    ({"max_time": "2 moons"}, "2h"),
    ({"max_time": -5}, "2h"), ({"epochs": True}, "epochs=True")])
def test_a_fit_that_makes_no_sense_leaves_nothing(settings, message, tmp_path):
    t = trainer(run=tmp_path / "r")
    with pytest.raises(ValueError, match=message): t.fit(**settings)
    assert not files(tmp_path) and t.step == 0
    t.fit(epochs=1)
    assert t.step == 4


def test_a_schedule_without_an_end_is_refused_before_the_start(tmp_path):
    def endless():
        while True: yield X, Y
    t = trainer(data=endless(), schedule="cosine", run=tmp_path / "r")
    with pytest.raises(ValueError, match="steps="): t.fit(max_time=1)
    assert not files(tmp_path)
    assert t.fit(steps=3) and t.step == 3


def test_plateau_without_validation_is_refused(tmp_path):
    for name in ("plateau", "ReduceLROnPlateau"):
        with pytest.raises(ValueError, match="valid="): trainer(schedule=name, run=tmp_path / "r")
    assert not files(tmp_path)


def test_no_training_data():
    t = Trainer(net(), loss="cross_entropy", run=False, board=False)
    with pytest.raises(ValueError, match="train="): t.fit(epochs=1)
    assert t.evaluate((X, Y))["loss"] > 0 and t.predict(X).shape == (60, 3)


@pytest.mark.parametrize("deep", [False, True])
def test_a_run_folder_that_cannot_be_written(deep, tmp_path):
    (tmp_path / "file").write_text("mine")
    t = trainer(run=tmp_path / "file" / "r" if deep else tmp_path / "file", valid=0.2)
    before, heard = weights(t.model), []
    t.callbacks.append(On(on_fit_start=heard.append, cleanup=heard.append))
    with pytest.raises(OSError, match="cannot be written.*run="): t.fit(epochs=1)
    assert files(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "mine"
    assert t.step == 0 and not heard and torch.equal(weights(t.model), before) and not t.history.names()


@pytest.mark.skipif(os.geteuid() == 0 or sys.platform == "win32", reason="root may write everywhere")
def test_a_used_folder_in_a_place_that_cannot_be_written(tmp_path):
    trainer(run=tmp_path / "r").fit(epochs=1)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="cannot be written"): trainer(run=tmp_path / "r").fit(epochs=1)
    finally: tmp_path.chmod(0o700)
    assert saved(tmp_path / "r")[0]["step"] > 0


def test_a_disk_that_fills_up_is_told_and_training_goes_on(tmp_path, monkeypatch):
    t = trainer(run=tmp_path / "r", valid=0.2)
    t.fit(epochs=1)
    good = saved(tmp_path / "r")[0]["step"]
    def full(*_, **__): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match="could not be written.*No space.*newest good one is step-"): t.fit(epochs=1)
    monkeypatch.undo()
    assert t.epoch == 2 and saved(tmp_path / "r")[0]["step"] == good
    assert not [f for f in files(tmp_path) if "tmp" in f]


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "fast", None])
def test_a_rate_that_makes_no_sense(rate):
    t = trainer()
    with pytest.raises(ValueError, match="positive number"): t.lr = rate
    with pytest.raises(ValueError, match="positive number"): t.controls.set_lr(rate)
    assert t.lr == 1e-2


def test_a_later_batch_of_another_shape_fails_in_plain_words():
    t = trainer(data=[(X[:30], Y[:30]), (X[30:, :3], Y[30:])])
    with pytest.raises(RuntimeError, match="mat1 and mat2|shape"): t.fit(epochs=1)
    assert t.status.state == "failed" and t.step == 1


@pytest.mark.parametrize("returned, kind, message", [
    (3.0, TypeError, "float"), (None, TypeError, "NoneType"),
    ({"los": 1}, ValueError, "without 'loss'.*los"), ("vector", ValueError, "mean")])
def test_a_step_that_returns_no_loss(returned, kind, message):
    t = trainer(step=lambda model, batch: model(batch[0]) if returned == "vector" else returned)
    with pytest.raises(kind, match=message): t.fit(epochs=1)
    assert t.step == 0 and t.status.state == "failed"


def test_bad_data_for_evaluate_and_predict():
    t = trainer()
    for data, message in (((X[:0], Y[:0]), "no rows"), ((NAN, Y), "missing"), ([], "no batches"), ((X,), "target"),
                          ((X[:, :2], Y), "inputs|shapes")):
        with pytest.raises((ValueError, RuntimeError), match=message): t.evaluate(data)
    for data, message in ((X[:0], "no rows"), (NAN, "missing"), ([], "no batches"), (X[:, :2], "inputs|shapes")):
        with pytest.raises((ValueError, RuntimeError), match=message): t.predict(data)
    with pytest.raises(ValueError, match="run folder"): t.save_checkpoint()
    with pytest.raises(FileNotFoundError): t.restore("best")


@pytest.mark.parametrize("settings", [
    {"batch_size": 8}, {"shuffle": False}, {"drop_last": True}, {"workers": 1}])
def test_a_setting_without_effect_warns(settings):
    with pytest.warns(UserWarning, match=f"{next(iter(settings))} has no effect"): trainer(data=DataLoader(TensorDataset(X, Y)), **settings)


def test_data_without_the_weights_that_were_announced():
    with pytest.raises(ValueError, match="weighted"): trainer(data=(X, Y, torch.ones(60)), weighted=True).evaluate((X, Y))


def test_an_unknown_callback_value_says_what_there_is():
    with pytest.raises(ValueError, match="SWA.*epochs="): trainer(callbacks=[SWA()]).fit(steps=3)
    with pytest.raises(ValueError, match="schedule.*class|ReduceLR"): trainer(schedule="ReduceLROnPlato")


def test_batch_norm_and_a_last_batch_of_one_row_name_the_way_out():
    x, y = torch.randn(17, 4), torch.arange(17) % 3
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    one = trainer(model, (x, y), batch_size=16)
    with pytest.raises(ValueError) as caught: one.fit(epochs=1)
    assert any("drop_last=True" in note for note in caught.value.__notes__)
