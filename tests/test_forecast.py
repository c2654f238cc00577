"""Forecasting from the door that people use: the contract, the guide's examples, files, several processes, and what goes wrong."""
import math
import os
import textwrap
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT

from arc_nb import Callback, Checkpoints, Plots
from arc_nb.study import BlockedFolds, TimeSeriesFolds, cross_validate
from arc_nb.tasks.forecast import (GRU, LSTM, MLP, NHITS, DeepAR, Forecaster, SeasonalNaive, Transformer, air_passengers, synthetic)

SEED = yaml.safe_load((ROOT / "tests/data/forecast_seed.yaml").read_text())
GUIDE = ROOT / "../shared/seeds/neuro-divergent-training.txt"
HERE = [item for item in SEED if item["kind"] == "here"]
QUIET = {"board": False, "run": False}


def fences(text: str) -> Iterator[tuple[str, str]]:
    "(section, text) of each fenced example of a guide."
    section, inside = "", None
    for line in text.splitlines():
        if inside is not None and line.strip() == "```": yield section, textwrap.dedent("\n".join(inside)) + "\n"; inside = None
        elif inside is not None: inside.append(line)
        elif line.strip().startswith("```"): inside = []
        elif line.startswith("#"): section = line.lstrip("# ").strip()


def test_the_examples_are_the_guides():
    if not GUIDE.is_file(): pytest.skip(f"{GUIDE} is not there: the guide is compared where it lies beside the project")
    assert [(item["section"], item["text"]) for item in SEED] == list(fences(GUIDE.read_text()))


def quick(cls):
    "The same model, small, short and silent where nothing else is said."
    small = {"MLP": {"hidden_size": 16}, "Transformer": {"hidden_size": 16}}.get(cls.__name__, {"hidden_size": 8})

    def make(horizon: int, **given):
        epochs = given.pop("max_epochs", None)  # as typed; two of them are trained
        make_it = cls(horizon, **{**small, "input_size": 24, "board": False, **given}, **({} if epochs is None else {"max_epochs": epochs}))
        fit = make_it.fit
        def short(frame, **how):
            if "epochs" not in how and "steps" not in how: how["steps"] = 4
            return fit(frame, **how)
        make_it.fit = short
        return make_it
    return make


@pytest.mark.parametrize("item", HERE, ids=lambda item: item["section"].replace(" ", "-"))
def test_the_guides_examples_as_they_are_typed_here(item, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    frame = synthetic(4, 96, freq="MS", season=12, seed=0)
    frame.to_csv("data.csv", index=False)
    names = dict(np=np, pd=pd, math=math, os=os, pytest=pytest, frame=frame, Plots=Plots, Callback=Callback, Checkpoints=Checkpoints,
                 TimeSeriesFolds=TimeSeriesFolds, BlockedFolds=BlockedFolds, cross_validate=cross_validate, SeasonalNaive=SeasonalNaive)
    names |= {cls.__name__: quick(cls) for cls in (LSTM, GRU, DeepAR, Transformer, NHITS, MLP)}
    exec(compile(item["typed"], item["section"], "exec"), names)


def test_the_contract():
    frame = air_passengers()
    model = LSTM(horizon=12, input_size=24, hidden_size=128, loss="mae", seed=0, max_steps=30, **QUIET)
    assert model.fit(frame) is model
    found = model.predict()
    assert list(found) == ["unique_id", "ds", "LSTM"] and len(found) == 12 and found["ds"].iloc[0] == pd.Timestamp("1961-01-01")
    likely = LSTM(horizon=12, input_size=24, hidden_size=16, loss="gaussian", max_steps=5, **QUIET).fit(frame).predict()
    assert list(likely) == ["unique_id", "ds", "LSTM", "LSTM-lo-80", "LSTM-hi-80", "LSTM-lo-95", "LSTM-hi-95"]
    other = LSTM(horizon=12, input_size=24, hidden_size=128, loss="mae", seed=0, max_steps=30, **QUIET).fit(frame).predict()
    assert other.equals(found)  # the same seed, the same forecast


def test_folds_of_the_contract():
    frame, folds = synthetic(3, 120, seed=1), TimeSeriesFolds(n_splits=5, test_size=12, gap=7, expanding=True, purge=3)
    model = LSTM(horizon=12, input_size=12, hidden_size=8, max_steps=3, **QUIET)
    result = cross_validate(model, frame, folds)
    assert len(result) == 5 and {"mae", "mape"} <= set(result) and result.mean()["mae"] > 0 and result.std()["mae"] >= 0
    assert model.model is None  # each fold has a model of its own


def test_columns_of_all_kinds_reach_the_model():
    "A column that is known ahead, and decides the next values, makes the forecast nearly right."
    rng = np.random.default_rng(0)
    days = pd.date_range("2024-01-01", periods=200, freq="D")
    def one(name, factor):
        promo = rng.integers(0, 2, 200).astype(float)
        y, noise = factor * (10 + 5 * promo), rng.normal(size=200)
        return pd.DataFrame({"unique_id": name, "ds": days, "y": y, "promo": promo, "kind": f"k{factor}", "noise": noise})
    frame = pd.concat([one("a", 1), one("b", 3)])
    model = MLP(horizon=7, input_size=14, future=["promo"], static=["kind"], max_steps=400, lr=3e-3, **QUIET)
    known, rest = frame[frame["ds"] < days[-7]], frame[frame["ds"] >= days[-7]]
    forecast = model.fit(known).predict(future=rest.drop(columns="y"))
    truth = rest.sort_values(["unique_id", "ds"])["y"].to_numpy()
    assert np.abs(forecast["MLP"].to_numpy() - truth).mean() < 0.15 * np.abs(truth - truth.mean()).mean()
    with pytest.raises(ValueError, match="promo.*known ahead|known ahead.*promo"): model.predict()
    with pytest.raises(ValueError, match="'b'"): model.predict(future=rest[rest["unique_id"] == "a"])


def test_a_file_is_the_model(tmp_path):
    frame = synthetic(3, 80, seed=2)
    model = NHITS(horizon=6, input_size=12, max_steps=5, scale_by="series", loss="quantile", **QUIET).fit(frame)
    model.save(tmp_path / "m.arc")
    again = Forecaster.load(tmp_path / "m.arc")
    assert again.predict().equals(model.predict()) and repr(again) == repr(model)
    new = synthetic(2, 40, seed=9).assign(unique_id=lambda f: "new " + f["unique_id"].astype(str))
    assert again.predict(new).equals(model.predict(new))
    with pytest.raises(ValueError, match="NHITS"): LSTM.load(tmp_path / "m.arc")
    again.fit(frame, steps=2)  # and goes on learning
    with pytest.raises(ValueError, match="history"): print(Forecaster.load(tmp_path / "m.arc").history)


def test_two_processes_learn_what_one_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    frame, how = synthetic(4, 80, seed=3), dict(horizon=6, input_size=12, hidden_size=8, max_steps=6, batch_size=32, **QUIET)
    one, two = MLP(**how).fit(frame).predict(), MLP(**how).fit(frame, processes=2).predict()
    assert np.allclose(one["MLP"], two["MLP"], rtol=1e-4)


def test_a_run_that_was_stopped_goes_on_to_the_bit(tmp_path):
    frame, how = synthetic(3, 80, seed=4), dict(horizon=6, input_size=12, hidden_size=8, num_layers=2, dropout=0.2, board=False, seed=5)
    again = LSTM(**{**how, "schedule": None}, run=tmp_path / "plain").fit(frame, steps=7)
    on = LSTM(**{**how, "schedule": None}, run=tmp_path / "plain").fit(frame, steps=12, resume=True).predict()
    undisturbed = LSTM(**{**how, "schedule": None}, run=tmp_path / "undisturbed").fit(frame, steps=12).predict()
    assert on.equals(undisturbed) and not on.equals(again.predict())


WRONG = {
    "unsorted": (lambda f: f.iloc[::-1], "sort"),
    "duplicates": (lambda f: pd.concat([f, f.iloc[[5]]]).sort_values(["unique_id", "ds"]), "s|duplicate"),
    "missing column": (lambda f: f.rename(columns={"y": "sales"}), "y"),
    "too short": (lambda f: f.groupby("unique_id").head(10), "input_size|horizon"),
    "gap": (lambda f: f.drop(f.index[20]), "missing|gap"),
    "words": (lambda f: f.assign(y="a"), "y"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_frames_are_one_clear_error(name):
    change, word = WRONG[name]
    frame = synthetic(2, 60, seed=0)
    with pytest.raises((ValueError, TypeError), match=word) as told: MLP(horizon=12, max_steps=5, **QUIET).fit(change(frame))
    text = str(told.value)
    assert "\n" not in text and len(text) < 400
    if name in ("duplicates", "too short", "gap"): assert str(frame["unique_id"].iloc[0]) in text


def test_unknown_frequency():
    with pytest.raises(ValueError, match="fortnight"): MLP(horizon=6, freq="fortnight", max_steps=5, **QUIET).fit(synthetic(2, 60))
    odd = synthetic(1, 60).assign(ds=lambda f: pd.Timestamp("2020-01-01") + pd.to_timedelta(np.arange(60) ** 2, "D"))
    with pytest.raises(ValueError, match="freq"): MLP(horizon=6, max_steps=5, **QUIET).fit(odd)


def test_weights_of_time_change_what_is_learned():
    frame = synthetic(2, 80, seed=1)
    def recent(ds, y): return np.where(ds > ds.max() - pd.Timedelta(days=400), 1.0, 0.0)
    plain = MLP(horizon=6, input_size=12, max_steps=30, **QUIET).fit(frame).predict()
    weighted = MLP(horizon=6, input_size=12, max_steps=30, loss=("weighted", {"by": recent}), **QUIET).fit(frame).predict()
    assert not np.allclose(plain["MLP"], weighted["MLP"])


def test_validation_is_the_end_and_training_never_sees_it():
    frame = air_passengers()
    spoiled = frame.assign(y=np.where(np.arange(144) >= 132, 1e6, frame["y"]))
    how = dict(horizon=12, input_size=24, max_steps=10, val_size=12, restore_best=False, **QUIET)
    one, other = MLP(**how).fit(frame), MLP(**how).fit(spoiled)
    assert all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values()))
