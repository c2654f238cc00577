"""Cross-validation: what is trained, what is known when, what comes back, and how it ends when something goes wrong."""
import io
import os
import signal
import threading
import time
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from arc_nb import Callback, Trainer
from arc_nb.engine.callbacks import EarlyStopping
from arc_nb.runs import Run
from arc_nb.study import BlockedFolds, TimeSeriesFolds, cross_validate
from arc_nb.study import running
from arc_nb.study.crossval import CrossValidation, Shown
from arc_nb.study.running import Workers


def walks(series: int = 3, steps: int = 72, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    ds = pd.date_range("2018-01-01", periods=steps, freq="MS")
    parts = [pd.DataFrame({"unique_id": f"w{k}", "ds": ds, "y": 100 + 10 * k + rng.normal(size=steps).cumsum()}) for k in range(series)]
    return pd.concat(parts, ignore_index=True)


class AR:
    "Next is a share of now, learned from all pairs of neighbours: what it saw in training can be told from its forecasts."
    def __init__(self, horizon=6): self.horizon, self.fits = horizon, 0
    def fit(self, frame):
        self.fits += 1
        self.last = frame.sort_values(["unique_id", "ds"]).groupby("unique_id").tail(1)
        now, after = frame.y, frame.groupby("unique_id").y.shift(-1)
        self.share = float((now * after).sum() / (now[after.notna()] ** 2).sum())
        return self
    def predict(self, frame=None):
        newest = self.last if frame is None else frame.groupby("unique_id").tail(1)
        said = lambda k: {"unique_id": newest.unique_id, "ds": newest.ds + pd.DateOffset(months=k), "AR": newest.y * self.share**k}
        return pd.concat([pd.DataFrame(said(k)) for k in range(1, self.horizon + 1)])


class Plain(AR):
    def predict(self, h): return AR.predict(self).groupby("unique_id").head(h)


def recipe(train, valid):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(.1), nn.Linear(8, 3))
    return Trainer(model, train, valid, loss="cross_entropy", metrics=["accuracy"], lr=1e-2, run=False)


def classes(rows: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


class Slow(RegressorMixin, BaseEstimator):
    "A mean that takes its time: `wait` seconds a row more than 20."
    def __init__(self, wait=0.0, die=False, stop=0): self.wait, self.die, self.stop = wait, die, stop
    def fit(self, X, y):
        if self.die and len(X) > 60: os.kill(os.getpid(), signal.SIGKILL)
        if self.stop and len(X) >= self.stop: raise KeyboardInterrupt
        if len(X) > 20: time.sleep(self.wait)
        self.mean_ = float(np.mean(y))
        return self
    def predict(self, X): return np.full(len(X), self.mean_)


@pytest.fixture(scope="module")
def pools():
    "Two worker processes for the whole file: starting them costs most of a test."
    found = []
    yield found
    for pool in found: pool.shutdown(wait=True, kill_workers=True)


@pytest.fixture
def shared(pools, monkeypatch):
    "Workers that use these processes, and leave them be if none of them is at work; ended ones are begun anew."
    class Shared(Workers):
        def __init__(self, jobs, threads):
            pools[:] = [pool for pool in pools if not (pool._flags.shutdown or pool._flags.broken)]
            super().__init__(max(0, jobs - len(pools)), threads)
            pools.extend(self.free)
            self.free, self.all = pools[:jobs], pools[:jobs]
        def end(self):
            if self.busy: super().end()
    monkeypatch.setattr(running, "Workers", Shared)


FOLDS = TimeSeriesFolds(n_splits=3, test_size=6, gap=2, purge=1)

# --- Forecasters -----------------------------------------------------------------------------------------------------


def test_a_row_a_fold_with_mean_and_deviation():
    result = cross_validate(AR(), walks(), FOLDS, board=False)
    assert isinstance(result, CrossValidation) and result.index.name == "fold" and list(result.index) == [1, 2, 3]
    assert list(result) == ["mae", "rmse", "mape", "smape", "train_rows", "test_rows", "seconds"]
    assert result.train_rows.tolist() == [3 * 51, 3 * 57, 3 * 63] and (result.test_rows == 18).all()
    assert result.mean()["mae"] == pytest.approx(np.mean(result["mae"].tolist()))
    assert result.std()["mae"] == pytest.approx(np.std(result["mae"].tolist(), ddof=1))
    said = result.forecasts
    assert list(said) == ["unique_id", "ds", "cutoff", "fold", "y", "AR"] and len(said) == 54 and said.notna().all().all()
    for fold, part in said.groupby("fold"): assert result.mae[fold] == pytest.approx((part.y - part.AR).abs().mean())


def test_gap_is_kept_out_of_training_and_known_when_forecasting():
    frame = walks()
    result = cross_validate(AR(), frame, FOLDS, board=False)
    for _, row in result.forecasts.iterrows():
        own = frame[(frame.unique_id == row.unique_id) & (frame.ds == row.cutoff)]
        first = result.splits[(result.splits.fold == row.fold) & (result.splits.part == "test")]["first"].iloc[0]
        train = result.splits[(result.splits.fold == row.fold) & (result.splits.part == "train")]["last"].iloc[0]
        assert len(own) == 1 and row.cutoff == first - pd.DateOffset(months=1) and train == first - pd.DateOffset(months=4)


def test_no_future_value_changes_an_earlier_forecast():
    "Whatever comes from the first test date on, the forecasts of that fold, and of the folds before it, stay to the bit."
    frame = walks()
    before = cross_validate(AR(), frame, FOLDS, board=False).forecasts
    for fold in (1, 2, 3):
        start = before[before.fold == fold].ds.min()
        wild = frame.assign(y=np.where(frame.ds >= start, 1e5 * np.random.default_rng(fold).normal(size=len(frame)), frame.y))
        after = cross_validate(AR(), wild, FOLDS, board=False).forecasts
        same = (before.AR == after.AR).groupby(before.fold).all()
        assert same.loc[:fold].all() and not same.loc[fold + 1:].any()


def test_a_trained_network_does_not_know_the_future_either():
    from arc_nb.tasks.forecast.mlp import MLP
    frame, folds = walks(2, 60), TimeSeriesFolds(2, test_size=6, gap=2)
    wild = frame.assign(y=np.where(frame.ds >= frame.ds.unique()[48], 1e4, frame.y))
    make = lambda: MLP(horizon=6, input_size=12)
    before, after = (cross_validate(make(), data, folds, steps=15, board=False).forecasts for data in (frame, wild))
    first = before.fold == 1
    assert (before.MLP[first] == after.MLP[first]).all() and not (before.MLP[~first] == after.MLP[~first]).all()


def test_unsorted_rows_and_long_tests():
    frame = walks()
    mixed = frame.sample(frac=1, random_state=1)
    one, other = (cross_validate(AR(), data, FOLDS, board=False) for data in (frame, mixed))
    assert one.drop(columns="seconds").equals(other.drop(columns="seconds"))
    long = cross_validate(AR(horizon=5), frame, TimeSeriesFolds(1, test_size=12), board=False)
    assert long.forecasts.groupby("cutoff", sort=True).size().tolist() == [15, 15, 6]
    assert (long.forecasts.cutoff < long.forecasts.ds).all()


def test_a_plain_predict_speaks_from_the_end_of_training():
    result = cross_validate(Plain(horizon=20), walks(), FOLDS, board=False)
    assert len(result.forecasts) == 54 and (result.forecasts.groupby("fold").cutoff.max() < result.forecasts.groupby("fold").ds.min()).all()


def test_the_model_itself_stays_untouched():
    model = AR()
    cross_validate(model, walks(), FOLDS, board=False)
    assert model.fits == 0 and not hasattr(model, "share")
    class Cloned(AR):
        made = 0
        def clone(self): Cloned.made += 1; return Cloned(self.horizon)
    cross_validate(Cloned(), walks(), FOLDS, board=False)
    assert Cloned.made == 3


def test_series_of_their_own_ends_and_missing_forecasts():
    frame = walks()
    short = frame[(frame.unique_id != "w2") | (frame.ds < frame.ds.unique()[60])]
    result = cross_validate(AR(), short, FOLDS, board=False)
    assert result.test_rows.tolist() == [18, 12, 12]
    new = pd.concat([frame, frame[frame.unique_id == "w0"].tail(4).assign(unique_id="new")])
    with pytest.warns(RuntimeWarning, match="4 of 22 test rows have no forecast and are not scored, 'new' at"):
        cross_validate(AR(), new, TimeSeriesFolds(1, test_size=6), board=False)
    with pytest.raises(ValueError, match="none of the 18 test rows has a forecast") as error:
        cross_validate(Plain(horizon=2), walks(), FOLDS, board=False)
    assert error.value.__notes__ == ["in fold 1 of 3"]


def test_metrics_intervals_and_other_names():
    class Wide(AR):
        def predict(self, frame):
            return AR.predict(self, frame).assign(**{"AR-lo-80": -1e9, "AR-hi-80": 1e9, "AR-lo-95": 0.0, "AR-hi-95": 0.0})
    def worst(y, p): return float(np.abs(y - p).max())
    result = cross_validate(Wide(), walks(), FOLDS, metrics=["mae", worst], board=False)
    assert list(result)[:4] == ["mae", "worst", "coverage_80", "coverage_95"]
    assert (result.coverage_80 == 100).all() and (result.coverage_95 == 0).all()
    class Named(AR):
        def fit(self, frame): return AR.fit(self, frame.rename(columns={"when": "ds", "sales": "y", "shop": "unique_id"}))
        def predict(self, frame):
            said = AR.predict(self, frame.rename(columns={"when": "ds", "sales": "y", "shop": "unique_id"}))
            return said.rename(columns={"ds": "when", "unique_id": "shop"})
    renamed = walks().rename(columns={"ds": "when", "y": "sales", "unique_id": "shop"})
    folds = TimeSeriesFolds(3, test_size=6, gap=2, purge=1, time="when", id="shop")
    other = cross_validate(Named(), renamed, folds, target="sales", board=False)
    assert other.mae.tolist() == cross_validate(AR(), walks(), FOLDS, board=False).mae.tolist()
    with pytest.raises(ValueError, match="no measure is called 'mea'.*'mae'"):
        cross_validate(AR(), walks(), FOLDS, metrics="mea", board=False)


def test_a_number_goes_forward_in_time_and_other_folds_are_told():
    result = cross_validate(AR(), walks(), 4, board=False)
    train, test = (result.splits[result.splits.part == part] for part in ("train", "test"))
    assert len(result) == 4 and (train["last"].to_numpy() < test["first"].to_numpy()).all()
    with pytest.warns(UserWarning, match="AR then knows the future"):
        cross_validate(AR(), walks(), BlockedFolds(3, 6, test_ratio=.1, seed=2), board=False)


def test_columns_known_ahead_reach_the_model():
    seen = []
    class Ahead(AR):
        future = ("price",)
        def predict(self, frame, future): seen.append(future); return AR.predict(self, frame)
    frame = walks().assign(price=1.0, weather=2.0)
    cross_validate(Ahead(), frame, TimeSeriesFolds(1, test_size=6, gap=1), board=False)
    assert list(seen[0]) == ["unique_id", "ds", "price"] and len(seen[0]) == 18
    assert seen[0].ds.min() == frame.ds.unique()[-6]
    with pytest.raises(ValueError, match="fold 1: Ahead forecasts 6 steps from .* the data end 3 steps too early: take test_size=6"):
        cross_validate(Ahead(), frame, TimeSeriesFolds(1, test_size=3), board=False)


# --- Recipes and estimators ------------------------------------------------------------------------------------------

def test_a_recipe_gets_train_and_valid_only_and_its_own_scores():
    seen = []
    def watched(**given): seen.append({k: len(v[0]) for k, v in given.items()}); return recipe(**given)
    result = cross_validate(watched, classes(), 3, epochs=5, board=False)
    assert seen == [{"train": 60, "valid": 30}] * 3 and list(result) == ["loss", "accuracy", "train_rows", "test_rows", "seconds"]
    assert result.forecasts is None
    with pytest.raises(ValueError, match="no forecasts"): result.figure("forecasts")
    with pytest.warns(UserWarning, match="metrics= has no effect"):
        cross_validate(recipe, classes(), 2, epochs=1, metrics="mae", board=False)
    with pytest.raises(ValueError, match="how far"): cross_validate(recipe, classes(), 2, board=False)


def test_folds_are_the_same_whatever_ran_before():
    torch.manual_seed(1)
    one = cross_validate(recipe, classes(), 3, epochs=2, board=False)
    torch.manual_seed(2); state = torch.get_rng_state()
    other = cross_validate(recipe, classes(), 3, epochs=2, board=False)
    assert one.drop(columns="seconds").equals(other.drop(columns="seconds")) and torch.equal(state, torch.get_rng_state())
    assert not one.loss.equals(cross_validate(recipe, classes(), 3, epochs=2, seed=1, board=False).loss)


def test_each_fold_may_keep_its_run(tmp_path):
    cross_validate(recipe, classes(), 2, epochs=2, board=False, run=tmp_path / "cv")
    for fold in (1, 2):
        run = Run(tmp_path / "cv" / f"fold-{fold}")
        assert run.status.state == "completed" and len(run.history.epochs()) == 2


def test_callbacks_of_a_recipe_stay():
    def stops(train, valid):
        trainer = recipe(train, valid)
        trainer.callbacks.append(EarlyStopping(patience=1, min_delta=1e9))
        return trainer
    result = cross_validate(stops, classes(), 2, epochs=30, board=False)
    assert [len(fold.x) for fold in result.view.folds] == [2, 2]


def test_estimators():
    x, y = classes()
    by_class = cross_validate(LogisticRegression(), (x.numpy(), y.numpy()), "stratified", board=False)
    assert list(by_class)[:2] == ["accuracy", "balanced_accuracy"] and by_class.accuracy.min() > .7
    frame = pd.DataFrame(x.numpy(), columns=list("abcd")).assign(y=x.numpy() @ [1, 2, 3, 4])
    ridge = cross_validate(Ridge(), frame, 4, metrics=["r2", "max_error", "neg_mean_squared_error"], board=False)
    assert ridge.r2.min() > .99 and (ridge.neg_mean_squared_error <= 0).all()


# --- In processes ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["recipe", "forecaster"])
def test_processes_give_the_same_to_the_bit(kind, shared):
    torch.set_num_threads(1)
    args = (recipe, classes(), 3) if kind == "recipe" else (AR(), walks(), FOLDS)
    fit = {"epochs": 2} if kind == "recipe" else {}
    one, two = (cross_validate(*args, board=False, jobs=jobs, **fit) for jobs in (1, 2))
    assert one.drop(columns="seconds").equals(two.drop(columns="seconds"))
    if kind == "forecaster": assert one.forecasts.equals(two.forecasts)
    else: assert all(len(fold.x) for fold in two.view.folds)


PARTS = [(np.arange(k), np.arange(k, k + 5)) for k in (20, 70, 30)]
ZEROS = np.zeros((80, 1)), np.zeros(80)


def test_a_fold_that_fails_is_named(shared):
    class Fails(Slow):
        def fit(self, X, y):
            if len(X) < 60: return Slow.fit(self, X, y)
            time.sleep(.3)  # the other process has ended by then
            raise ValueError("no")
    for jobs in (1, 2):
        with pytest.raises(ValueError, match="^no") as error: cross_validate(Fails(), ZEROS, PARTS[:2], jobs=jobs, board=False)
        assert any(note.startswith("in fold ") for note in error.value.__notes__)
    with pytest.raises(TypeError, match="cannot run in other processes.*lock"):
        class Locked(Slow):
            def __sklearn_clone__(self): return self
        locked = Locked(); locked.lock = threading.Lock()
        cross_validate(locked, ZEROS, PARTS, jobs=2, board=False)
    for jobs in (0, 1.5, "many"):
        with pytest.raises(ValueError, match="jobs"): cross_validate(Slow(), ZEROS, PARTS, jobs=jobs, board=False)


def test_warnings_of_workers_are_heard_once(shared):
    class Warns(Slow):
        def fit(self, X, y): warnings.warn("mind this", UserWarning, stacklevel=1); return Slow.fit(self, X, y)
    data = np.zeros((40, 1)), np.zeros(40)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cross_validate(Warns(), data, 4, metrics="mae", jobs=2, board=False)
    assert [str(w.message) for w in said] == ["mind this"]


def test_a_fold_that_tells_nothing_is_shown_as_begun(monkeypatch, shared):
    "A long fold of something that tells nothing: the first one is no longer said to wait, and in processes the clock goes on."
    import IPython.display

    import arc_nb.study.crossval as module
    seen = []
    class Handle:
        def update(self, bundle, raw): seen.append(bundle["image/svg+xml"])
    monkeypatch.setattr(module, "place", lambda: "kernel")
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw, display_id: Handle())
    cross_validate(Slow(wait=.3), (np.zeros((90, 1)), np.zeros(90)), 2, metrics="mae")
    assert seen[0].count("begins") == 1 and seen[0].count("waits") == 1
    seen.clear()
    cross_validate(Slow(wait=2.4), (np.zeros((90, 1)), np.zeros(90)), 2, metrics="mae", jobs=2)
    assert sum("begins" in svg for svg in seen) >= 3 and "1 s</tspan>" in "".join(seen)


# --- Interrupts ------------------------------------------------------------------------------------------------------

def test_an_interrupt_keeps_the_folds_that_are_done():
    data, pairs = (np.zeros((80, 1)), np.zeros(80)), [(np.arange(k), np.arange(k, k + 5)) for k in (20, 30, 70, 40)]
    with pytest.warns(RuntimeWarning, match="2 of 4 folds that were done"):
        result = cross_validate(Slow(stop=60), data, pairs, metrics="mae", board=False)
    assert list(result.index) == [1, 2] and result.view.state == "interrupted"
    assert [f.state for f in result.view.folds] == ["done", "done", "stopped", "waiting"]
    with pytest.raises(KeyboardInterrupt): cross_validate(Slow(stop=1), data, pairs, metrics="mae", board=False)


def test_an_interrupt_of_a_training_is_no_score():
    class Interrupts(Callback):
        def on_epoch_end(self, trainer):
            if trainer.epoch == 2 and len(made) == 2: os.kill(os.getpid(), signal.SIGINT)
    made = []
    def stopped(train, valid):
        made.append(1)
        trainer = recipe(train, valid)
        trainer.callbacks.append(Interrupts())
        return trainer
    with pytest.warns(RuntimeWarning, match="1 of 3 folds"): result = cross_validate(stopped, classes(), 3, epochs=5, board=False)
    assert list(result.index) == [1] and len(made) == 2


def test_an_interrupt_ends_the_processes(shared):
    data, pairs = (np.zeros((80, 1)), np.zeros(80)), [(np.arange(k), np.arange(k, k + 5)) for k in (10, 30, 40)]
    began = time.monotonic()
    def interrupt():
        while time.monotonic() - began < 60 and not done.wait(.05):
            if shown and shown[0].finished(): os.kill(os.getpid(), signal.SIGINT); return
    done, shown = threading.Event(), []
    import arc_nb.study.crossval as module
    class Seen(Shown):
        def __init__(self, view, kind): super().__init__(view, kind); shown.append(view)
    original, module.Shown = module.Shown, Seen
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.warns(RuntimeWarning, match="1 of 3 folds"):
            result = cross_validate(Slow(wait=120), data, pairs, metrics="mae", jobs=2, board=False)
    finally:
        module.Shown = original
        done.set(); thread.join()
    assert list(result.index) == [1] and time.monotonic() - began < 60


def test_a_fold_that_dies_is_named(shared):
    with pytest.raises(RuntimeError, match="the process of fold 2 has died"):
        cross_validate(Slow(die=True), ZEROS, PARTS, jobs=2, board=False)


# --- What is seen ----------------------------------------------------------------------------------------------------

def test_text_and_pictures(capsys):
    result = cross_validate(AR(), walks(), FOLDS, board="text")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].startswith("fold 1 of 3:  mae ")
    shown = Shown(result.view, "text")  # folds in processes end in any order: each is told once
    for fold in result.view.folds: fold.state = "waiting"
    for number in (2, 3, 1):
        result.view.folds[number - 1].done({"mae": 1.}, 1.)
        shown.refresh()
    assert [line[:6] for line in capsys.readouterr().out.splitlines()] == ["fold 2", "fold 3", "fold 1"]
    for theme in ("auto", "light", "dark"):
        svg = result.picture(theme)
        assert svg.startswith("<svg") and "fold 3" in svg and "completed" in svg and svg._repr_svg_() == svg
    assert len(result.figure().data) == 3 and len(result.figure("forecasts", theme="dark").data) == 3 * 4
    with pytest.raises(ValueError, match="figure"): result.figure("fold")
    for wrong in ("live", True):
        with pytest.raises(ValueError, match="board"): cross_validate(AR(), walks(), FOLDS, board=wrong)


def test_the_display_is_one_and_is_drawn_in_place(monkeypatch):
    import IPython.display

    import arc_nb.study.crossval as module
    shown, updates = [], []
    class Handle:
        def update(self, bundle, raw): updates.append(bundle["image/svg+xml"])
    monkeypatch.setattr(module, "place", lambda: "kernel")
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw, display_id: shown.append(bundle) or Handle())
    cross_validate(Slow(wait=.45), (np.zeros((90, 1)), np.zeros(90)), 4, metrics="mae")
    assert len(shown) == 1 and 2 <= len(updates) <= 10 and "completed" in updates[-1] and "waits" in shown[0]["image/svg+xml"]
    heights = {svg.split('height="')[1].split('"')[0] for svg in [shown[0]["image/svg+xml"], *updates]}
    assert len(heights) == 1  # nothing jumps


def test_settings_and_data_that_cannot_be_are_named_before_training():
    cases = [(lambda: cross_validate(AR(), walks(), FOLDS, epochs=3), "fit of 'AR' has no option 'epochs'"),
             (lambda: cross_validate(Ridge(), classes(), 3, epoch=3), "fit of 'Ridge' has no option 'epoch'"),
             (lambda: cross_validate(Ridge(), pd.DataFrame({"a": [1., 2, 3], "b": 1.}), 3), "no column is called 'y'.*target="),
             (lambda: cross_validate(recipe, classes(), "grouped", epochs=1), "GroupKFold keeps groups .*groups="),
             (lambda: cross_validate(AR(), walks(), 3, metrics=[lambda y, p: 1., lambda y, p: 2.]), "two measures are called '<lambda>'"),
             (lambda: cross_validate(AR(), pd.concat([walks(), walks().tail(1)]), FOLDS), "series 'w2' has several rows at 2023-12-01")]
    for run, text in cases:
        with pytest.raises(ValueError, match=text) as error: run()
        assert not getattr(error.value, "__notes__", [])


def test_series_that_were_held_out_are_forecast_from_their_own_history():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = cross_validate(AR(), walks(), BlockedFolds(3, by_series=True), board=False)
    assert (result.test_rows == 72).all() and (result.forecasts.groupby("fold").size() == 66).all()
    assert sum("6 of 72 test rows have no forecast" in str(w.message) for w in said) == 3


def test_a_cutoff_is_a_date_of_the_frame():
    frame = walks().assign(ds=lambda f: f.ds.dt.tz_localize("Europe/Berlin"))
    said = cross_validate(AR(), frame, FOLDS, board=False).forecasts
    assert said.cutoff.dtype == frame.ds.dtype and said.cutoff.isin(frame.ds).all()


def test_what_cannot_be_is_refused_before_training():
    for args, kind in (((AR, walks(), 3), TypeError), ((AR(), classes(), 3), TypeError), ((3, classes(), 3), TypeError),
                       ((AR(), walks().drop(columns="y"), 3), ValueError),
                       ((AR(), walks().drop(columns="unique_id"), 3), ValueError), ((AR(), walks(), TimeSeriesFolds(99)), ValueError),
                       ((recipe, classes(), "kfolds"), ValueError),
                       ((lambda train: None, classes(), 3), TypeError), ((lambda train, valid: 1, classes(), 3), TypeError)):
        with pytest.raises(kind): cross_validate(*args, board=False)


def test_the_result_is_a_frame_like_any_other(tmp_path):
    result = cross_validate(AR(), walks(), FOLDS, board=False)
    assert type(result[result.mae > 0]) is pd.DataFrame and type(result.T) is pd.DataFrame
    text = io.StringIO()
    result.to_csv(text)
    assert "train_rows" in text.getvalue() and "mae" in result._repr_html_()
    assert pd.concat([result, result]).shape == (6, 7) and result.copy().mae.equals(result.mae)
