"""Forecasting from the door that people use: the contract, the guide's examples, files, several processes, and what goes wrong."""
import copy
import math
import os
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT
from small import fences

from arc_nb import Callback, Checkpoints, Plots
from arc_nb.study import BlockedFolds, TimeSeriesFolds, cross_validate
from arc_nb.tasks.forecast import (
    GRU, LSTM, MLP, NHITS, Conformal, DeepAR, DLinear, Forecaster, SeasonalNaive, Transformer, air_passengers, synthetic)

SEED = yaml.safe_load((ROOT / "tests/data/forecast_seed.yaml").read_text())
GUIDE = ROOT / "../shared/seeds/neuro-divergent-training.txt"
HERE = [item for item in SEED if item["kind"] == "here"]
QUIET = {"board": False, "run": False}


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


SMALL = dict(horizon=4, input_size=8, hidden_size=8, max_steps=5, **QUIET)


def columns_of_all_kinds(series: int = 12, steps: int = 96) -> pd.DataFrame:
    rng, days = np.random.default_rng(0), pd.date_range("2015-01-01", periods=steps, freq="MS")
    return pd.concat([pd.DataFrame({
        "unique_id": f"s{k:02}", "ds": days, "y": 10 + k + np.sin(np.arange(steps) / 3) + 0.1 * rng.normal(size=steps),
        "temp": rng.normal(size=steps), "promo": rng.integers(0, 2, steps) * 1.0}) for k in range(series)], ignore_index=True)


@pytest.mark.parametrize("loss", ["mae", "scaled", "quantile"])
@pytest.mark.parametrize("scale_by", ["window", "series"])
def test_what_comes_later_changes_nothing_before_it(scale_by, loss):
    "Neither weights, validation's scales, columns nor forecasts at the cutoff know the rows after it; of new series neither."
    frame, cut = columns_of_all_kinds(), pd.Timestamp("2021-01-01")
    later = frame["ds"] > cut
    spoiled = frame.copy()
    spoiled.loc[later, ["y", "temp"]] = 1e4 * np.random.default_rng(1).normal(size=(later.sum(), 2))
    how = dict(val_size=int(later.sum() / 12), scale_by=scale_by, loss=loss, restore_best=False, future=["promo"], calendar=("month",))
    one, other = MLP(**SMALL, **how).fit(frame), MLP(**SMALL, **how).fit(spoiled)
    assert all(torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), other.model.state_dict().values()))
    wanted = one.predict_at(frame, [cut])["MLP"]
    for model, rows in ((one, spoiled), (other, spoiled), (other, frame)): assert model.predict_at(rows, [cut])["MLP"].equals(wanted)
    assert np.allclose(one.predict(frame[~later], future=frame[later])["MLP"], wanted, rtol=1e-5)
    new, new_spoiled = (f.assign(unique_id="new " + f["unique_id"]) for f in (frame, spoiled))
    assert one.predict_at(new, [cut]).equals(one.predict_at(new_spoiled, [cut]))


def test_intervals_of_new_series_do_not_know_what_comes_later():
    frame, cut = columns_of_all_kinds(4).drop(columns=["temp", "promo"]), pd.Timestamp("2021-01-01")
    model = MLP(**SMALL, intervals=Conformal(levels=(80,))).fit(frame)
    new = frame.assign(unique_id="new " + frame["unique_id"])
    spoiled = new.assign(y=np.where(new["ds"] > cut, 1e4, new["y"]))
    assert model.predict_at(new, [cut]).equals(model.predict_at(spoiled, [cut]))


@pytest.mark.parametrize("method", ["split", "cross"])
def test_intervals_hold_what_they_promise(method):
    "200 series with noise of their own: 80 and 95 percent of what comes lie within, give or take 3 points."
    rng, count, steps = np.random.default_rng(1), 200, 60
    months = pd.date_range("2018-01-01", periods=steps, freq="MS")
    level, phase, noise = (rng.uniform(*ends, (count, 1)) for ends in ((5, 50), (0, 6), (0.5, 3)))
    y = level + 5 * np.sin(2 * np.pi * np.arange(steps) / 12 + phase) + noise * rng.normal(size=(count, steps))
    frame = pd.DataFrame({"unique_id": np.repeat([f"s{k:03}" for k in range(count)], steps), "ds": np.tile(months, count), "y": y.ravel()})
    model = MLP(horizon=6, input_size=12, hidden_size=16, max_steps=100, intervals=Conformal(method), **QUIET)
    found = model.fit(frame[frame["ds"] < months[-6]]).predict().merge(frame)
    assert len(found) == 6 * count
    for level in (80, 95):
        assert abs(100 * found["y"].between(found[f"MLP-lo-{level}"], found[f"MLP-hi-{level}"]).mean() - level) < 3


def test_the_models_of_a_cross_learn_as_far_as_the_one_they_stand_for(monkeypatch):
    seen, learn = [], MLP.learn
    monkeypatch.setattr(MLP, "learn", lambda self, panel, *given, **far: seen.append((given, far)) or learn(self, panel, *given, **far))
    MLP(**{**SMALL, "max_steps": None}, intervals=Conformal("cross", windows=2, levels=(50,))).fit(synthetic(3, 60), steps=3)
    assert len(seen) == 3 and all(far["steps"] == 3 for _, far in seen[1:])


def test_a_cross_that_was_broken_off_trains_no_further_models(monkeypatch):
    class Interrupted(Callback):
        def on_step_end(self, trainer): trainer.controls.stop("interrupted", "interrupted")
    model = MLP(**SMALL, intervals=Conformal("cross"))
    with pytest.warns(UserWarning, match="no intervals"): model.fit(synthetic(12, 60), callbacks=[Interrupted()])
    assert list(model.predict()) == ["unique_id", "ds", "MLP"] and model.history.frame()["step"].max() < 5


def test_a_fit_that_never_began_leaves_no_trace():
    frame, model = synthetic(12, 60), MLP(**SMALL)
    with pytest.raises(ValueError, match="steps=0"): model.fit(frame, steps=0)
    with pytest.raises(ValueError, match="shorter than"): model.fit(frame.groupby("unique_id").head(9).assign(other=1.0))
    with pytest.raises(ValueError, match="learned nothing"): model.predict()
    model.fit(frame)  # the columns of the frame that was refused are forgotten, too
    sure = MLP(**SMALL, intervals=Conformal(levels=(50,))).fit(frame)
    before = sure.predict()
    with pytest.raises(ValueError, match="steps=0"): sure.fit(frame, steps=0)
    assert sure.predict().equals(before)


def test_copies_forecast_the_same_and_learn_on():
    model = MLP(**SMALL, loss="gaussian").fit(synthetic(3, 60))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.predict().equals(model.predict())
        copied.fit(synthetic(3, 60), steps=2)


SLIPS = {
    "seed": (lambda f: MLP(**SMALL, seed=1.5), "seed=1.5"),
    "alias of a column": (lambda f: MLP(**SMALL, alias="ds"), "alias='ds'"),
    "alias no word": (lambda f: MLP(**SMALL, alias=3), "alias=3"),
    "weight decay": (lambda f: MLP(**SMALL, weight_decay=0.1), "adamw"),
    "levels of conformal": (lambda f: Conformal(levels=(0.8,)), "would be 80"),
    "seasonal": (lambda f: MLP(**SMALL, loss=("seasonal", {"season_length": 12})), "needs weights"),
    "setting to fit": (lambda f: MLP(**SMALL).fit(f, lr=0.1), r"MLP\(\.\.\., lr="),
    "other name to fit": (lambda f: MLP(**SMALL).fit(f, learning_rate=0.1), r"MLP\(\.\.\., lr="),
    "validation to fit": (lambda f: MLP(**SMALL).fit(f, val_df=f), "val_size"),
    "slip to fit": (lambda f: MLP(**SMALL).fit(f, stepps=3), "'steps'"),
    "quantile": (lambda f: MLP(**SMALL, loss="gaussian").fit(f).predict(quantiles="a"), "between 0 and 1"),
    "level": (lambda f: MLP(**SMALL, loss="gaussian").fit(f).predict(level=0.8), "level=.*would be 80"),
}


@pytest.mark.parametrize("name", SLIPS)
def test_slips_are_told_in_a_line(name):
    make, word = SLIPS[name]
    with pytest.raises(ValueError, match=word) as told: make(synthetic(3, 60))
    assert "\n" not in str(told.value)


def test_one_quantile_needs_no_list_and_levels_that_do_nothing_are_told():
    found = MLP(**SMALL, loss="gaussian").fit(synthetic(3, 60)).predict(level=[], quantiles=0.5)
    assert list(found)[2:] == ["MLP", "MLP-q-0.5"]
    with pytest.warns(UserWarning, match="levels.*no effect"): model = MLP(**SMALL, levels=(90,), intervals=Conformal())
    assert "Conformal('split', windows=None" in repr(model)


def test_columns_without_effect_are_told_once_and_with_their_number():
    model = DLinear(4, 8, future=["promo"], max_steps=2, **QUIET)  # says nothing: no column has been seen
    with pytest.warns(UserWarning, match="no effect") as told: model.fit(columns_of_all_kinds(3, 40))
    assert len(told) == 1


def test_paths_are_whole_futures():
    frame, how = synthetic(3, 80, seed=1), dict(horizon=6, input_size=12, max_steps=5, loss="gaussian", **QUIET)
    for model in (MLP(**how).fit(frame), DeepAR(**how, hidden_size=8).fit(frame)):
        found = model.sample(50)
        assert list(found) == ["unique_id", "ds", "path", model.name] and len(found) == 3 * 50 * 6 and found.equals(model.sample(50))
        assert not found.equals(model.sample(50, seed=1))
        middle = found.groupby(["unique_id", "ds"])[model.name].median().to_numpy()
        point = model.predict()[model.name].to_numpy()
        spread = found.groupby(["unique_id", "ds"])[model.name].std().to_numpy()
        assert (np.abs(middle - point) < spread).all()  # and the paths of a series are its own
    with pytest.raises(ValueError, match="gaussian"): MLP(horizon=6, input_size=12, max_steps=2, **QUIET).fit(frame).sample()


CUTOFFS = {"nonsense": "cutoff='nonsense'", (): "cutoffs is empty", 3.5: "cutoff=3.5", "2030-01-01": "no series.*2030-01-01"}


@pytest.mark.parametrize("cutoffs", CUTOFFS, ids=str)
def test_cutoffs_that_are_none(cutoffs):
    frame = synthetic(2, 40)
    with pytest.raises(ValueError, match=CUTOFFS[cutoffs]): MLP(**SMALL).fit(frame).predict_at(frame, cutoffs)


def test_one_cutoff_needs_no_list():
    frame, model = synthetic(2, 40), MLP(**SMALL)
    date = frame["ds"].iloc[20]
    assert model.fit(frame).predict_at(frame, date).equals(model.predict_at(frame, [str(date.date())]))
    whole = frame.assign(ds=frame.groupby("unique_id").cumcount())
    with pytest.raises(ValueError, match="whole number"): MLP(**SMALL).fit(whole).predict_at(whole, [30.0])


def test_numbers_of_numpy_and_offsets_of_pandas_go_into_a_file(tmp_path):
    given = dict(seed=np.int64(3), levels=np.array([80]), loss="gaussian", freq=pd.offsets.MonthBegin())
    model = MLP(np.int64(4), np.int64(8), max_steps=2, **given, **QUIET).fit(synthetic(2, 40))
    assert Forecaster.load(model.save(tmp_path / "m.arc")).predict().equals(model.predict())
