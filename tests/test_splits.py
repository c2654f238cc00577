"""Folds: positions of rows, whatever the order, the kind of time and the number of series."""
import time

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.model_selection import KFold, StratifiedKFold, TimeSeriesSplit

from arc_nb.engine.folds import folds, subset
from arc_nb.engine.splits import BlockedFolds, TimeSeriesFolds, timeline
from arc_nb.study.lanes import MOST, lanes_of, lanes_picture, runs_of


def months(*lengths: int, start: str = "2015-01-01") -> pd.DataFrame:
    "Series that begin together and end when they like."
    parts = [pd.DataFrame({"unique_id": f"s{k}", "ds": pd.date_range(start, periods=n, freq="MS"), "y": np.arange(float(n))})
             for k, n in enumerate(lengths)]
    return pd.concat(parts, ignore_index=True)


def times(frame: pd.DataFrame, rows: np.ndarray) -> list:
    return sorted(frame.ds.iloc[rows].unique())


# --- Forward in time -------------------------------------------------------------------------------------------------

def test_the_contract_on_144_months():
    frame = months(144)
    found = list(TimeSeriesFolds(n_splits=5, test_size=12, gap=7, expanding=True, purge=3).split(frame))
    assert [(train[0], train[-1], test[0], test[-1]) for train, test in found] == [
        (0, 73, 84, 95), (0, 85, 96, 107), (0, 97, 108, 119), (0, 109, 120, 131), (0, 121, 132, 143)]
    assert all(part.dtype == np.int64 for pair in found for part in pair)


@pytest.mark.parametrize("spec", [TimeSeriesFolds(4, test_size=3, gap=2, purge=1),
                                  TimeSeriesFolds(3, expanding=False, train_size=8, test_size=4),
                                  TimeSeriesFolds(2, test_size=.1), BlockedFolds(3, 5, purge=1, embargo=1)])
def test_unsorted_frames_give_the_same_rows(spec):
    frame = months(40, 40, 33)
    mixed = frame.sample(frac=1, random_state=3)
    for (a, b), (c, d) in zip(spec.split(frame), spec.split(mixed), strict=True):
        for one, other in ((a, c), (b, d)):
            assert set(frame.index[one]) == set(mixed.index[other]) and (np.diff(other) > 0).all()


def test_series_with_different_ends_share_one_time_line():
    frame = months(36, 30, 12)
    (train, test), = TimeSeriesFolds(1, test_size=6, gap=2).split(frame)
    assert times(frame, test) == list(pd.date_range("2017-07-01", periods=6, freq="MS"))
    assert set(frame.unique_id.iloc[test]) == {"s0"} and frame.ds.iloc[train].max() == pd.Timestamp("2017-04-01")
    assert set(frame.unique_id.iloc[train]) == {"s0", "s1", "s2"}


@pytest.mark.parametrize("kind", ["int", "Int64", "float", "zone", "us"])
def test_kinds_of_time(kind):
    frame = months(20)
    ds = {"int": pd.Series(np.arange(20) * 7 + 3), "Int64": pd.Series(np.arange(20), dtype="Int64"), "float": pd.Series(np.arange(20) / 4),
          "zone": frame.ds.dt.tz_localize("Europe/Berlin"), "us": frame.ds.astype("datetime64[us]")}[kind]
    (train, test), = TimeSeriesFolds(1, test_size=4, gap=1).split(frame.assign(ds=ds))
    assert train.tolist() == list(range(15)) and test.tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize("wrong, words", [
    (lambda f: f.assign(ds=f.ds.astype(str)), r"pd\.to_datetime\(frame\['ds'\]\)"),
    (lambda f: f.assign(ds=f.ds.dt.date), r"pd\.to_datetime"),
    (lambda f: f.assign(ds=f.ds.dt.to_period("M")), r"to_timestamp"),
    (lambda f: f.assign(ds=f.ds.where(f.y > 1)), "2 of 20 rows have no 'ds'"),
    (lambda f: f.rename(columns={"ds": "dss"}), "Did you mean 'dss'"),
])
def test_what_tells_no_time_is_refused_with_the_way_out(wrong, words):
    with pytest.raises(ValueError, match=words): list(TimeSeriesFolds(2, test_size=2).split(wrong(months(20))))


@pytest.mark.parametrize("settings", [{"test_size": 0}, {"test_size": 1.0}, {"test_size": 0.0}, {"test_size": -3}, {"test_size": True},
                                      {"test_size": 1.5},
                                      {"test_size": "12"}, {"n_splits": 0}, {"n_splits": 2.5}, {"gap": -1}, {"purge": 1.5}, {"step": 0},
                                      {"train_size": 0, "expanding": False}, {"embargo": -1}])
def test_settings_without_sense_are_refused_at_once(settings):
    with pytest.raises(ValueError, match=next(iter(settings))): TimeSeriesFolds(**settings)


@pytest.mark.parametrize("spec", [TimeSeriesFolds(2, test_size=5, gap=100), TimeSeriesFolds(10, test_size=5),
                                  TimeSeriesFolds(1, test_size=40),
                                  TimeSeriesFolds(2, test_size=5, expanding=False, train_size=35), TimeSeriesFolds(50)])
def test_too_few_time_steps(spec):
    with pytest.raises(ValueError, match="there are 40") as error: list(spec.split(months(40)))
    assert "need" in str(error.value)


def test_what_would_fit_does_fit():
    with pytest.raises(ValueError, match="n_splits=7 fits"): TimeSeriesFolds(10, test_size=5, gap=2).spans(40)
    assert TimeSeriesFolds(7, test_size=5, gap=2).spans(40)[0].train == (0, 3)
    with pytest.raises(ValueError): TimeSeriesFolds(8, test_size=5, gap=2).spans(40)


def test_windows_slide_and_tests_overlap():
    spans = TimeSeriesFolds(4, test_size=6, step=2, expanding=False, train_size=10, gap=1).spans(40)
    assert [s.train[1] - s.train[0] for s in spans] == [10] * 4 and [s.test[0] for s in spans] == [28, 30, 32, 34]
    assert all(s.test[0] - s.train[1] == 1 for s in spans)
    free = TimeSeriesFolds(3, test_size=5, expanding=False).spans(40)  # as long as the first fold's
    assert [s.train for s in free] == [(0, 25), (5, 30), (10, 35)]
    spread = TimeSeriesFolds(2, test_size=2, step=10).spans(30)
    assert [s.test for s in spread] == [(18, 20), (28, 30)]


def test_the_seeds_example_works_and_says_what_it_did():
    with pytest.warns(UserWarning, match="they begin 20 steps apart"):
        spans = TimeSeriesFolds(n_splits=5, test_size=.2, gap=7, expanding=True, purge=3).spans(144)
    assert len(spans) == 5 and all(s.test[1] - s.test[0] == 29 and s.test[0] - s.train[1] == 10 for s in spans) and spans[-1].test[1] == 144


def test_settings_without_effect_warn():
    with pytest.warns(UserWarning, match="embargo=3 has no effect"): TimeSeriesFolds(embargo=3)
    with pytest.warns(UserWarning, match="expanding=False"): TimeSeriesFolds(train_size=3)
    with pytest.warns(UserWarning, match="no effect without block_size"): BlockedFolds(2, by_series=True, purge=1)


@pytest.mark.parametrize("n", [17, 50, 101])
def test_like_scikit_learn(n):
    X = np.zeros(n)
    sliding = TimeSeriesFolds(2, test_size=3, expanding=False, train_size=5)
    for theirs, mine in ((TimeSeriesSplit(4), TimeSeriesFolds(4)), (TimeSeriesSplit(2, test_size=3, max_train_size=5), sliding),
                         (TimeSeriesSplit(3, test_size=2, gap=1), TimeSeriesFolds(3, test_size=2, gap=1))):
        for one, other in zip(theirs.split(X), mine.split(X), strict=True):
            assert [part.tolist() for part in one] == [part.tolist() for part in other]


def test_a_million_rows_in_less_than_a_second():
    frame = pd.DataFrame({"unique_id": np.repeat(np.arange(1000), 1000), "ds": np.tile(pd.date_range("2021-01-01", periods=1000), 1000)})
    frame = frame.sample(frac=1, random_state=0)
    began = time.process_time()
    found = list(TimeSeriesFolds(5, test_size=12, gap=7).split(frame))
    took = time.process_time() - began
    print(f"{took:.2f} s")
    assert took < 1 and all(len(test) == 12_000 for _, test in found)


# --- Blocks ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("purge, embargo", [(0, 0), (2, 0), (0, 3), (2, 3)])
def test_blocks_keep_their_distance(purge, embargo):
    frame = months(60, 60)
    at = timeline(frame).at
    for train, test in BlockedFolds(4, 6, test_ratio=.2, purge=purge, embargo=embargo).split(frame):
        away = at[train][:, None] - at[test][None]
        assert not ((away >= -purge) & (away <= embargo)).any() and len(set(at[test])) == 12
        assert len(set(at[train])) >= 60 - 12 - 2 * (purge + embargo)


def test_every_block_is_tested_before_one_is_tested_twice():
    frame = months(60)
    tested = [tuple(np.unique(timeline(frame).at[test] // 6)) for _, test in BlockedFolds(5, 6, test_ratio=.2).split(frame)]
    assert sorted(sum(tested, ())) == list(range(10))
    again = [tuple(np.unique(timeline(frame).at[test] // 6)) for _, test in BlockedFolds(5, 6, test_ratio=.2, seed=1).split(frame)]
    assert tested != again and sorted(sum(again, ())) == list(range(10))


def test_the_last_block_takes_the_rest():
    frame = months(23)
    covered = np.concatenate([test for _, test in BlockedFolds(4, 5, test_ratio=.25).split(frame)])
    assert sorted(covered) == list(range(23))


def test_series_are_held_out_whole():
    frame = months(*[12] * 10)
    seen = []
    for train, test in BlockedFolds(5, by_series=True, test_ratio=.2).split(frame):
        own = set(frame.unique_id.iloc[test])
        assert own.isdisjoint(frame.unique_id.iloc[train]) and len(test) == 24 and len(train) == 96
        seen += own
    assert len(set(seen)) == 10
    with pytest.raises(ValueError, match="needs a frame"): list(BlockedFolds(2, by_series=True).split(np.zeros(9)))
    with pytest.raises(ValueError, match="there are 1 series"): list(BlockedFolds(2, by_series=True).split(months(9)))


# --- Of any kind -----------------------------------------------------------------------------------------------------

def test_whatever_makes_folds():
    X, y = np.zeros((24, 2)), np.tile([0, 1], 12)
    class Own:
        def split(self, data): yield np.arange(20), np.arange(20, 24)
    for spec, count in ((4, 4), (np.int64(3), 3), ("kfold", 5), (("kfold", {"n_splits": 6}), 6), ("stratified", 5), (KFold(2), 2),
                        (Own(), 1),
                        (lambda data: [(np.arange(9), np.arange(9, 24))], 1), ([([0, 1], [2]), ([1], [0])], 2), (TimeSeriesFolds(3), 3),
                        (("time", {"n_splits": 2}), 2), (("blocked", {"block_size": 4}), 5)):
        assert len(list(folds(spec).split((X, y)))) == count
    frame = pd.DataFrame({"x": np.arange(24.), "y": y, "site": np.repeat(list("abcdef"), 4)})
    for _, test in folds("stratified", target="y").split(frame): assert .3 < frame.y.iloc[test].mean() < .7
    for train, test in folds("grouped", groups="site").split(frame): assert set(frame.site.iloc[train]).isdisjoint(frame.site.iloc[test])
    for _, test in folds(StratifiedKFold(3)).split((X, torch.tensor(y))): assert y[test].mean() == .5


def test_shuffled_folds_are_the_seeds():
    rows = [next(folds(3, seed=seed).split(np.zeros(30)))[1].tolist() for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.parametrize("pairs, kind, words", [
    ([(np.array([0, 1]), np.array([1]))], ValueError, "fold 1: 1 rows are in train and in test"),
    ([([0], [1]), ([], [1])], ValueError, "fold 2, train is empty"), ([([0], [99])], ValueError, "row 99, and there are 10"),
    ([([0], [-1])], ValueError, "row -1"), ([([0.0], [1.0])], TypeError, "positions"), ([3], TypeError, "a pair"),
    ([([[0]], [1])], TypeError, "shape"), ([], ValueError, "no folds")])
def test_pairs_that_cannot_be_trusted(pairs, kind, words):
    with pytest.raises(kind, match=words): list(folds(lambda data: pairs).split(np.zeros(10)))


def test_subsets_keep_their_form():
    rows = np.array([3, 1])
    X, y, frame = torch.arange(8.).reshape(4, 2), np.arange(4), months(4)
    a, b = subset((X, y), rows)
    assert a.tolist() == [[6, 7], [2, 3]] and b.tolist() == [3, 1]
    assert subset(frame, rows).y.tolist() == [3, 1] and subset({"x": X, "more": (y, [9, 8, 7, 6])}, rows)["more"][1] == [6, 8]
    data = subset(torch.utils.data.TensorDataset(X), rows)
    assert len(data) == 2 and data[0][0].tolist() == [6, 7]


# --- The picture -----------------------------------------------------------------------------------------------------

def test_lanes_are_the_rows():
    frame = months(30, 30)
    spec = TimeSeriesFolds(3, test_size=4, gap=2, expanding=False, train_size=10)
    for runs, (train, test) in zip(lanes_of(timeline(frame), spec.split(frame)).lanes, spec.split(frame)):
        assert [run.part for run in runs] == ["train", "out", "test"]
        at = timeline(frame).at
        assert (runs[0].first, runs[0].stop - 1) == (at[train].min(), at[train].max())
        assert (runs[2].first, runs[2].stop - 1) == (at[test].min(), at[test].max())


def test_many_runs_are_binned_and_many_lanes_are_cut():
    noise = np.random.default_rng(0).random(10_000) < .2
    assert len(runs_of((~noise).astype(int), noise.astype(int))) <= MOST
    svg = lanes_picture(("kfold", {"n_splits": 30}), np.zeros(300))
    assert "the first 24 shown" in svg and len(svg) < 300_000
