"""Long frames of all kinds become the same panel, or an error names the series and the way out; windows never see what is held back."""
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from arc_nb.engine.batches import make_batches
from arc_nb.tasks.forecast.augment import Augment, augment_of
from arc_nb.tasks.forecast.dates import CALENDAR, Clock, infer_freq
from arc_nb.tasks.forecast.layout import Layout
from arc_nb.tasks.forecast.panel import Panel, from_dict, to_dict
from arc_nb.tasks.forecast.pieces import Inputs, Pieces, inputs_at
from arc_nb.tasks.forecast.samples import air_passengers, synthetic
from arc_nb.tasks.forecast.scaling import SCALERS, column_scales, measure, series_scales

FREQS = ("ME", "MS", "QE", "QS", "YE", "YS", "W-SUN", "W-WED", "D", "B", "h", "15min", "min", "s", "2h", "2MS", "3D", "2W-MON",
         "QE-FEB", "YS-JUL", "BME", "SMS", 1, 5)


def long(ids=("a", "b"), steps=8, freq="MS", start="2023-11-30", **columns):
    """A small regular frame."""
    dates = 100 + np.arange(steps) * freq if isinstance(freq, int) else pd.date_range(start, periods=steps, freq=freq)
    found = pd.DataFrame({"unique_id": np.repeat(list(ids), steps), "ds": np.tile(dates, len(ids))})
    if not isinstance(freq, int): found["ds"] = pd.concat([pd.Series(dates)] * len(ids), ignore_index=True)
    return found.assign(y=np.arange(len(found), dtype=float), **columns)


# frequencies

@pytest.mark.parametrize("freq", FREQS)
def test_a_frequency_is_told_read_and_continued(freq):
    frame = long(steps=30, freq=freq)
    panel = Panel.read(frame, freq=freq if freq == "SMS" else None)
    given = Panel.read(frame, freq=freq)
    assert Clock(panel.freq).step == Clock(freq).step
    for one in (panel, given):
        assert one.frame().ds.tolist() == frame.ds.tolist() and one.frame().y.tolist() == frame.y.tolist()
        assert one.frame().unique_id.tolist() == frame.unique_id.tolist()
        times, _ = one.ahead(5)
        more = long(steps=35, freq=freq).ds.to_numpy()
        assert (times[0] == more[30:35]).all() and (times[1] == more[30:35]).all()
        half = one.before(frame.ds.iloc[17])
        assert half.lengths.tolist() == [17, 17] and half.frame().ds.tolist() == [*frame.ds[:17]] * 2
        assert one.cuts(frame.ds.iloc[0]).tolist() == [0, 0] and one.cuts(more[34]).tolist() == [30, 30]
    holes = frame.drop([4, 5, 20, 41])
    filled = Panel.read(holes, fill="interpolate",
        freq=freq if freq in ("BME", "SMS", "bh") else None)  # with holes these show too many distances
    assert filled.y.tolist() == frame.y.tolist() and filled.frame().ds.tolist() == frame.ds.tolist()
    with pytest.raises(ValueError, match="'a' has a gap: after .* Steps that are missing: 'a' .3., 'b' .1.*fill="):
        Panel.read(holes, freq=freq)


@pytest.mark.parametrize("freq", [f for f in FREQS if isinstance(f, str)])
@pytest.mark.parametrize("tz", ["Europe/Berlin", "UTC", "America/New_York", "+05:30"])
def test_time_zones_are_kept_across_the_changes_of_the_clock(freq, tz):
    frame = long(steps=400 if freq in ("h", "D", "2h", "B") else 40, freq=freq, start=pd.Timestamp("2024-03-01", tz=tz))
    panel = Panel.read(frame, freq=freq if freq == "SMS" else None)
    assert panel.frame().ds.equals(frame.ds) or panel.frame().ds.tolist() == frame.ds.tolist()
    assert str(panel.frame().ds.dt.tz) == str(frame.ds.dt.tz)
    more = pd.date_range(frame.ds.iloc[0], periods=panel.lengths[0] + 7, freq=freq)[-7:]
    times, _ = panel.ahead(7)
    assert panel.clock.stamps(times[0]).tolist() == more.tolist()
    assert panel.cuts(frame.ds.iloc[9])[0] == 9
    again = from_dict(to_dict(panel))
    assert again.frame().ds.tolist() == frame.ds.tolist()


def test_a_month_has_its_time_of_day():
    frame = long(start="2024-01-01 08:00", freq="MS")
    panel = Panel.read(frame)
    assert panel.frame().ds.tolist() == frame.ds.tolist() and panel.ahead(1)[0][0, 0] == np.datetime64("2024-09-01T08:00")
    with pytest.raises(ValueError, match="no step of the frequency 'MS'.*'a' .1."):
        Panel.read(frame.assign(ds=frame.ds.where(frame.index != 3, frame.ds + pd.Timedelta("1h"))), freq="MS")


def test_nanoseconds_and_centuries():
    frame = long(steps=6).assign(ds=np.tile(np.datetime64("2024-01-01", "ns") + np.arange(6) * np.timedelta64(500, "ns"), 2))
    panel = Panel.read(frame)
    assert panel.frame().ds.tolist() == frame.ds.tolist()
    old = long(steps=5).assign(ds=np.tile(np.array(["1500-01-01", "1501-01-01", "1502-01-01", "1503-01-01", "1504-01-01"], "M8[us]"), 2))
    assert Panel.read(old).freq == "YS-JAN" and Panel.read(old).frame().ds.tolist() == old.ds.tolist()


@pytest.mark.parametrize("wrong, words",
    [("M", "did you mean 'ME'"), ("2H", "did you mean '2h'"), ("Q-DEC", "did you mean 'QE-DEC'"), ("monthly", "is unknown.*'MS'"),
                                          ("-1D", "does not go forward"), (0, "whole number from 1"), (True, "is unknown"),
                                          (2.5, "is unknown"), ([1], "is unknown")])
def test_unknown_frequencies(wrong, words):
    with pytest.raises(ValueError, match=words): Panel.read(long(), freq=wrong)


def test_a_frequency_that_does_not_fit():
    with pytest.raises(ValueError,
        match="series 'a': 2023-12-01 is no step of the frequency 'ME'. Rows of this kind: 'a' .8., 'b' .8..*freq="):
        Panel.read(long(), freq="ME")
    with pytest.raises(ValueError, match="ds holds whole numbers"): Panel.read(long(freq=1), freq="MS")
    with pytest.raises(ValueError, match="ds holds dates"): Panel.read(long(), freq=1)
    with pytest.raises(ValueError, match="series 'a': 101 is no step"): Panel.read(long(freq=1), freq=2)
    with pytest.raises(ValueError, match="no frequency can be told from series 'a': a single row"): Panel.read(long(steps=1))
    with pytest.raises(ValueError, match="different steps"): Panel.read(long(steps=6).assign(ds=np.tile([1, 2, 4, 8, 16, 32], 2)))
    assert Panel.read(long(steps=1), freq="MS").lengths.tolist() == [1, 1]
    assert Panel.read(long(steps=1), freq="MS").ahead(2)[0][0].astype("M8[D]").tolist()[1].month == 2
    with pytest.raises(ValueError, match="is too fine"):
        Panel.read(long(steps=2).assign(ds=pd.to_datetime(["1900-01-01", "2024-01-01"] * 2)), freq="min", fill=0)


def test_series_of_their_own_phase():
    frame = pd.concat([long(["a"], freq="3D"), long(["b"], freq="3D", start="2023-12-01"),
        long(["c"], steps=3, freq="3D", start="1999-01-01")])
    panel = Panel.read(frame)
    assert panel.freq == "3D" and panel.frame().ds.tolist() == frame.ds.tolist() and panel.lengths.tolist() == [8, 8, 3]
    assert panel.cuts("2023-12-05").tolist() == [2, 2, 3]


def test_whether_the_frequency_is_told_from_the_longest_series():
    frame = pd.concat([long(["a"], steps=3, freq="D", start="2024-01-01"), long(["b"], steps=20, freq="B", start="2024-01-01")])
    assert Panel.read(frame).freq == "B"
    assert infer_freq(np.array(["2024-01-01", "2024-02-01"], "M8[us]")) == "MS"


# columns of all kinds

@pytest.mark.parametrize("kind", ["int8", "uint16", "int64", "float32", "float64", "Int64", "Float32", "object", "bool", "boolean"])
def test_kinds_of_y(kind):
    frame = long()
    values = pd.Series(np.arange(16) % 2 if kind in ("bool", "boolean") else np.arange(16)).astype(kind)
    panel = Panel.read(frame.assign(y=values, price=values), future=["price"])
    assert panel.y.dtype == np.float32 and panel.y.tolist() == values.astype(float).tolist() == panel.future[:, 0].tolist()


def test_pandas_missing_values_are_gaps():
    frame = long().assign(y=pd.array([1, None, 3, 4, 5, 6, 7, 8] * 2, dtype="Int64"))
    with pytest.raises(ValueError, match="series 'a': 'y' is missing at 2024-01-01. Rows: 'a' .1., 'b' .1..*fill='interpolate'"):
        Panel.read(frame)
    assert Panel.read(frame, fill="interpolate").y.tolist() == [*range(1, 9)] * 2
    assert Panel.read(frame, fill="interpolate").report().filled.tolist() == [1, 1]


@pytest.mark.parametrize("kind", ["object", "str", "category", "int", "Int64", "bool", "tuple"])
def test_kinds_of_ids(kind):
    make = {"object": lambda k: pd.Series(["a", "b"] * 4, dtype=object), "str": lambda k: pd.Series(["a", "b"] * 4),
        "category": lambda k: pd.Series(["a", "b"] * 4, dtype="category"),
            "int": lambda k: pd.Series([7, 3] * 4), "Int64": lambda k: pd.Series([7, 3] * 4, dtype="Int64"),
            "bool": lambda k: pd.Series([True, False] * 4),
            "tuple": lambda k: pd.Series([("x", 1), ("x", 2)] * 4)}
    frame = pd.DataFrame({"unique_id": make[kind](0), "ds": np.repeat(np.arange(4), 2), "y": np.arange(8.)})
    panel = Panel.read(frame)
    assert panel.index.tolist() == frame.unique_id.tolist()[:2]
    assert panel.y.tolist() == [0, 2, 4, 6, 1, 3, 5, 7]  # by date: the rows of the series are mixed
    assert panel.frame().unique_id.tolist()[:4] == [frame.unique_id[0]] * 4
    if kind == "tuple":
        with pytest.raises(ValueError, match="to str"): to_dict(panel)
    else: assert from_dict(to_dict(panel)).frame().equals(panel.frame())
    with pytest.raises(ValueError, match="series .* has a gap"): Panel.read(frame.drop(2), freq=1)


@pytest.mark.parametrize("make",
    [lambda d: d.astype("M8[ns]"), lambda d: d.astype("M8[s]"), lambda d: d.astype(str), lambda d: d.astype(object),
    lambda d: d.astype("category"),
                                  lambda d: d.dt.to_period("M"), lambda d: d.dt.date, lambda d: d.dt.strftime("%Y-%m-%dT%H:%M:%S"),
                                  lambda d: d.dt.strftime("%Y-%m-%d").astype("category")])
def test_kinds_of_dates(make):
    frame = long()
    assert Panel.read(frame.assign(ds=make(frame.ds))).frame().ds.tolist() == frame.ds.tolist()


@pytest.mark.parametrize("ds, kind, words", [
    (lambda d: d.where(d.index != 9), ValueError, "series 'b': 'ds' in row 9 is missing"),
    (lambda d: d.astype(str).where(d.index != 9, "soon"), ValueError, "series 'b': 'ds' in row 9 is 'soon', and no date"),
    (lambda d: d.dt.strftime("%d.%m.%Y"), ValueError, "series 'a': 'ds' in row 0 is '01.12.2023'.*format=.*'a' .8., 'b' .8."),
    (lambda d: pd.Series(np.arange(16) / 2), TypeError, "the column 'ds' holds float64"),
    (lambda d: pd.Series([True] * 16), TypeError, "the column 'ds' holds bool"),
    (lambda d: pd.Series([*range(15), None], dtype="Int64"), ValueError, "series 'b': 'ds' in row 15 is missing"),
    (lambda d: pd.Series(list(range(16)), dtype=object), TypeError, "numbers as objects"),
    (lambda d: pd.Series([pd.Timestamp("2024-01-01", tz="UTC"), pd.Timestamp("2024-01-01", tz="Asia/Tokyo")] * 8, dtype=object), TypeError,
    "time zones|go together"),
    (lambda d: d - d[0], TypeError, "holds timedelta")])
def test_dates_that_cannot_be_read(ds, kind, words):
    frame = long()
    with pytest.raises(kind, match=words): Panel.read(frame.assign(ds=ds(frame.ds)))


class Polars:
    """Looks like a frame of polars."""
    columns = ["unique_id", "ds", "y"]
    def to_pandas(self): return long()


@pytest.mark.parametrize("change, kind, words", [
    (lambda f: Polars(), TypeError, "frame.to_pandas"), (lambda f: f.y, TypeError, "is a pandas.Series"),
    (lambda f: [[1]], TypeError, "is a list"),
    (lambda f: None, TypeError, "DataFrame with the columns"), (lambda f: f[:0], ValueError, "no rows"),
    (lambda f: f.rename(columns={"y": "Y"}), ValueError, "lacks the column 'y'"),
    (lambda f: f.rename(columns={"ds": "dss"}), ValueError, "did you mean 'dss'.*time="),
    (lambda f: f.drop(columns="unique_id"), ValueError, "assign.unique_id="),
    (lambda f: f.set_index("unique_id"), ValueError, "reset_index"),
    (lambda f: pd.concat([f, f[["y"]]], axis=1), ValueError, "y more than once"),
    (lambda f: f.assign(y="high"), ValueError, "the column 'y' holds str, such as 'high'"),
    (lambda f: f.assign(y=1j), ValueError, "no numbers"), (lambda f: f.assign(y=f.ds), ValueError, "no numbers"),
    (lambda f: f.assign(y=f.y.where(f.y != 9, np.inf)), ValueError,
    "series 'b': 'y' is inf, no finite float32, at 2024-01-01. Rows: 'b' .1."),
    (lambda f: f.assign(y=f.y.where(f.y != 9, -1e39)), ValueError, "is -1e.39"),
    (lambda f: f.assign(y=f.y.where(f.y != 9)), ValueError, "series 'b': 'y' is missing at 2024-01-01"),
    (lambda f: f.assign(unique_id=[None, *f.unique_id[1:]]), ValueError, "'unique_id' is missing in 1 rows, the first is row 0"),
    (lambda f: f[::-1], ValueError,
    "series 'b' is not sorted by date: 2024-06-01 stands after 2024-07-01. Steps back: 'b' .7., 'a' .7..*sort=True"),
    (lambda f: pd.concat([f, f[9:11]]), ValueError, "series 'b' is not sorted by date"),
    (lambda f: pd.concat([f[:10], f[9:]]), ValueError, "series 'b' has 2024-01-01 more than once. Rows too many: 'b' .1..*duplicates="),
    (lambda f: f.drop([9, 10, 3]), ValueError,
    "series 'a' has a gap: after 2024-02-01 follows 2024-04-01, at the frequency 'MS'. Steps that are missing: 'a' .1., 'b' .2."),
    (lambda f: f.assign(price=f.y.where(f.y != 3)), ValueError, "series 'a': 'price' is missing at 2024-03-01"),
    (lambda f: f.assign(shop="x"), ValueError, "the column 'shop' holds str, such as 'x'.*static=.*past=")])
def test_frames_that_are_refused(change, kind, words):
    with pytest.raises(kind, match=words): Panel.read(change(long()), freq="MS")


@pytest.mark.parametrize("how, words", [
    (dict(future=["promo"]), "lacks the column 'promo'"), (dict(past=["prize"]), "did you mean 'price'"),
    (dict(static=["shop"]), "lacks the column 'shop'"),
    (dict(future=["price"], past=["price"]), "named twice: price"), (dict(future=["y"]), "named twice: y"),
    (dict(static=["price"]), "varies within series 'a'"),
    (dict(fill="linear"), "fill='linear' is unknown"), (dict(fill={"y": 0}), "says nothing of price"),
    (dict(fill={"y": 0, "price": 0, "x": 1}), "names x"),
    (dict(fill=np.nan), "fill=nan"), (dict(fill=True), "fill=True"), (dict(duplicates="max"), "duplicates='max'"),
    (dict(calendar=["months"]), "did you mean 'month'"),
    (dict(target="cost"), "lacks the column 'cost'"),
    (dict(static_frame=pd.DataFrame({"unique_id": ["a"], "size": [1]})), "static_frame lacks series: 'b'"),
    (dict(static_frame=pd.DataFrame({"unique_id": ["a", "b", "b"], "size": [1, 2, 3]})), "'b' more than once"),
    (dict(static_frame=[1]), "static_frame is a list"),
    (dict(static_frame=pd.DataFrame({"unique_id": ["a", "b"], "size": [1, None]})), "series 'b': the static column 'size' is missing")])
def test_options_that_are_refused(how, words):
    with pytest.raises((ValueError, TypeError), match=words): Panel.read(long(price=1. * np.arange(16)), **how)


def test_words_that_are_too_many():
    ids = [f"s{k}" for k in range(201)]
    with pytest.raises(ValueError, match="201 different words.*another id"):
        Panel.read(long(ids, 3).assign(name=lambda f: f.unique_id), static=["name"])


# gaps and duplicates

def test_filling():
    frame = long(steps=10).drop([3, 4, 15])
    fill = lambda how: Panel.read(frame, fill=how, freq="MS")
    assert fill("interpolate").y.tolist() == list(range(20)) and fill("ffill").y.tolist()[:6] == [0, 1, 2, 2, 2, 5]
    assert fill("zero").y.tolist()[3:5] == [0, 0] and fill(-2.5).y.tolist()[15] == -2.5
    report = fill("zero").report()
    assert report.gaps.tolist() == [2, 1] and report.filled.tolist() == [2, 1] and report.rows.tolist() == [8, 9]
    assert report.steps.tolist() == [10, 10]
    rich = Panel.read(frame.assign(price=5.), fill={"y": 0, "price": "ffill"}, freq="MS")
    assert rich.past[3, 0] == 5 and rich.y[3] == 0
    same = frame.copy()
    Panel.read(same.assign(y=same.y.where(same.y != 5)), fill=0, freq="MS")
    pd.testing.assert_frame_equal(same, frame)  # the frame stays as it is


def test_a_frame_is_never_changed():
    frame = long().assign(y=lambda f: f.y.where(f.y != 5))
    before = frame.copy(deep=True)
    Panel.read(frame, fill=0)
    pd.testing.assert_frame_equal(frame, before)


def test_filling_never_reaches_into_another_series():
    frame = long(("a", "b", "c"), steps=5).assign(y=[0, 1, 2, 3, np.nan, np.nan, 6, 7, 8, np.nan, np.nan, 11, 12, 13, 14])
    assert Panel.read(frame, fill="interpolate").y.tolist() == [0, 1, 2, 3, 3, 6, 6, 7, 8, 8, 11, 11, 12, 13, 14]
    with pytest.raises(ValueError,
        match="series 'b': 'y' is missing, and fill='ffill' finds nothing to take, at 2023-12-01. Rows: 'b' .1., 'c' .1."):
        Panel.read(frame, fill="ffill")
    empty = frame.assign(y=frame.y.where(frame.unique_id != "b"))
    with pytest.raises(ValueError, match="series 'b': 'y' is missing, and fill='interpolate' finds nothing"):
        Panel.read(empty, fill="interpolate")
    with pytest.raises(ValueError, match="finds nothing"): Panel.read(frame.assign(y=np.nan), fill="interpolate")
    assert Panel.read(frame.assign(y=np.nan), fill=1).y.tolist() == [1] * 15


def test_filling_against_pandas():
    draw = np.random.default_rng(0)
    frame = long([f"s{k}" for k in range(20)], steps=60, freq="D").assign(y=lambda f: draw.normal(size=len(f)),
        price=lambda f: draw.normal(size=len(f)))
    frame.loc[draw.random(len(frame)) < .1, "price"] = np.nan
    inner = frame.ds.isin(frame.ds.iloc[[0, 59]])
    frame.loc[inner, "price"] = 0.
    kept = frame[(draw.random(len(frame)) > .2) | inner]
    full = frame[["unique_id", "ds"]].merge(kept, how="left")
    panel = Panel.read(kept, fill="interpolate", freq="D")
    for name, values in (("y", panel.y), ("price", panel.past[:, 0])):
        theirs = full.groupby("unique_id")[name].transform(lambda v: v.interpolate())
        np.testing.assert_allclose(values, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(Panel.read(kept, fill="ffill", freq="D").y, full.groupby("unique_id").y.ffill(), rtol=1e-6)


def test_duplicates():
    frame = pd.concat([long(), long()[3:5].assign(y=100.)]).assign(price=lambda f: f.y * 2).sort_values(["unique_id", "ds"], kind="stable")
    read = lambda how: Panel.read(frame, duplicates=how, freq="MS")
    assert [read(how).y.tolist()[3] for how in ("last", "first", "mean", "sum")] == [100, 3, 51.5, 103]
    assert [read(how).past[3, 0] for how in ("last", "first", "mean", "sum")] == [200, 6, 103, 200]
    assert read("last").report().duplicates.tolist() == [2, 0] and read("last").report().rows.tolist() == [10, 8]


def test_order_of_rows_does_not_matter_where_it_is_said():
    frame = long(("b", "a", "c"), steps=12, price=np.arange(36.), kind=np.repeat([1, 2, 3], 12))
    whole = Panel.read(frame, static=["kind"], future=["price"])
    by_date = Panel.read(frame.sort_values("ds", kind="stable"), static=["kind"], future=["price"])
    mixed = Panel.read(frame.sample(frac=1, random_state=3), static=["kind"], future=["price"], sort=True)
    assert by_date.y.tolist() == whole.y.tolist() and by_date.static.tolist() == whole.static.tolist()
    for name, k in zip(mixed.ids, range(3)):
        at = list(whole.ids).index(name)
        assert mixed.y[12 * k:12 * k + 12].tolist() == whole.y[12 * at:12 * at + 12].tolist() and mixed.static[k] == whole.static[at]
        assert mixed.future[12 * k:12 * k + 12].tolist() == whole.future[12 * at:12 * at + 12].tolist()


def test_any_index_of_the_frame():
    frame = long(price=np.arange(16.), kind="x").set_index(pd.Index(np.arange(16)[::-1] // 3))
    panel = Panel.read(frame, static=["kind"])
    assert panel.y.tolist() == list(range(16)) and panel.past[:, 0].tolist() == list(range(16))


# static columns, calendar, layout

def test_static_columns():
    frame = long(region=np.repeat(["north", "south"], 8), size=np.repeat([3, 5], 8), open=np.repeat([True, False], 8))
    panel = Panel.read(frame, static=["region", "size", "open"])
    assert panel.static_names == ("region=north", "region=south", "size", "open") and panel.static.tolist() == [[1, 0, 3, 1], [0, 1, 5, 0]]
    again = Panel.read(frame[frame.unique_id == "b"], like=panel.layout)
    assert again.static.tolist() == [[0, 1, 5, 0]]
    with pytest.raises(ValueError, match="series 'a': region='east' was not there.*north, south"):
        Panel.read(frame.assign(region="east"), like=panel.layout)
    own = Panel.read(frame[["unique_id", "ds", "y"]],
        static_frame=pd.DataFrame({"unique_id": ["b", "a"], "region": ["south", "north"], "a=b": [1, 2]}))
    assert own.static_names == ("region=north", "region=south", "a=b") and own.static.tolist() == [[1, 0, 2], [0, 1, 1]]
    assert own.layout.static == ("region", "a=b")
    with pytest.raises(ValueError, match="lacks the column 'region'"): Panel.read(frame[["unique_id", "ds", "y"]], like=own.layout)
    category = Panel.read(frame.assign(region=frame.region.astype("category")), static="region", past=())
    assert category.static_names == ("region=north", "region=south")


def test_the_calendar():
    frame = long(steps=400, freq="h", start="2024-02-20")
    panel = Panel.read(frame, calendar=list(set(CALENDAR) - {"minute"}))
    names = panel.future_names
    for part, theirs in {"month": frame.ds.dt.month - 1, "weekday": frame.ds.dt.day_of_week, "hour": frame.ds.dt.hour,
        "day": frame.ds.dt.day - 1, "yearday": frame.ds.dt.day_of_year - 1}.items():
        angle = 2 * np.pi * theirs / CALENDAR[part]
        np.testing.assert_allclose(panel.future[:, [names.index(f"{part}_sin"), names.index(f"{part}_cos")]],
            np.stack([np.sin(angle), np.cos(angle)], 1), atol=1e-5)
    _, ahead = panel.ahead(30)
    np.testing.assert_allclose(ahead[0], Panel.read(long(["a"], 430, "h", "2024-02-20"), calendar=panel.layout.calendar).future[-30:])
    berlin = long(["a"], 200, "h", pd.Timestamp("2024-03-28", tz="Europe/Berlin"))
    waves = Panel.read(berlin, calendar=["hour"]).future[:, 0]
    np.testing.assert_allclose(waves, np.sin(2 * np.pi * berlin.ds.dt.hour / 24),
        atol=1e-6)  # as the clock on the wall shows it, in March too
    with pytest.warns(UserWarning, match="calendar='hour' has no effect"): Panel.read(long(), calendar=["hour"])
    with pytest.raises(ValueError, match="needs dates"): Panel.read(long(freq=1), calendar=["month"])


def test_a_frame_like_another():
    frame = synthetic(4, 48, columns=True)
    panel = Panel.read(frame, future=["promo"], static=["region"], calendar=["month"], fill="ffill")
    layout = Layout.from_dict(panel.layout.to_dict())
    assert layout == panel.layout and Panel.read(frame, like=layout).frame().equals(panel.frame())
    swapped = frame[["region", "y", "visitors", "ds", "unique_id", "promo"]].assign(more=1.)
    assert (Panel.read(swapped, like=layout).columns == panel.columns).all()  # columns in their places, and what is new is left out
    with pytest.raises(ValueError, match="lacks the column 'visitors'"): Panel.read(frame.drop(columns="visitors"), like=layout)
    with pytest.raises(ValueError, match="leave the other options out"): Panel.read(frame, like=layout, sort=True)
    with pytest.raises(ValueError, match="no step of the frequency 'MS'"): Panel.read(synthetic(4, 48, "D", columns=True), like=layout)
    with pytest.raises(ValueError, match="holds whole numbers"): Panel.read(synthetic(4, 48, 1, columns=True), like=layout)
    with pytest.raises(ValueError, match="has the time zone UTC, and had none"):
        Panel.read(frame.assign(ds=frame.ds.dt.tz_localize("UTC")), like=layout)
    assert len(Panel.read(frame[:1], like=layout)) == 1  # one row is enough, since the frequency is known
    pickle.loads(pickle.dumps(panel))


def test_other_names_of_the_columns():
    frame = long().rename(columns={"unique_id": "shop", "ds": "day", "y": "sold"})
    panel = Panel.read(frame, id="shop", time="day", target="sold")
    assert panel.frame().equals(frame.astype({"sold": np.float32}))


# parts of a panel

def test_before_tail_and_longer():
    frame = pd.concat([long(["a"], 20), long(["b"], 6, start="2024-06-01"), long(["c"], 3)])
    panel = Panel.read(frame)
    half = panel.before("2024-06-15")
    assert half.ids.tolist() == ["a", "b", "c"] and half.lengths.tolist() == [7, 1, 3]
    assert panel.before("2024-01-15").ids.tolist() == ["a", "c"]
    assert panel.before("2024-01-15").frame().ds.max() == pd.Timestamp("2024-01-01")
    assert half.frame().equals(frame[frame.ds < "2024-06-15"].reset_index(drop=True).astype({"y": np.float32}))
    assert panel.tail(4).lengths.tolist() == [4, 4, 3] and panel.tail(4).frame().ds.tolist()[:4] == frame.ds.tolist()[16:20]
    assert panel.without_last(3).ids.tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="no series has more than 20 steps"): panel.without_last(20)
    with pytest.raises(ValueError, match="no series has a step before 1990.*the first is 2023-12-01"): panel.before("1990")
    with pytest.warns(UserWarning, match="1 of 3 series have fewer than 5 steps and are left out: 'c' .3."):
        assert panel.longer(5).ids.tolist() == ["a", "b"]
    with pytest.raises(ValueError, match="no series has 99 steps: the longest has 20"): panel.longer(99)
    with pytest.raises(ValueError,
        match="2 of 3 series are shorter than 12 steps .input_size=8 . horizon=4.. The shortest: 'c' .3., 'b' .6..*longer.12."):
        panel.check_length(12, "input_size=8 + horizon=4")
    assert panel.y[panel.last(3)].shape == (3, 3)
    with pytest.raises(ValueError, match="'c' .3."): panel.last(4)
    for wrong in ("soon", 5, None, pd.NaT, True):
        with pytest.raises(ValueError, match="is no date"): panel.cuts(wrong)
    with pytest.raises(ValueError, match="has a time zone, and the series have none"): panel.cuts(pd.Timestamp("2024-01-01", tz="UTC"))
    for wrong in ("2024", 5.5, True):
        with pytest.raises(ValueError, match="ds counts steps"): Panel.read(long(freq=1)).cuts(wrong)


def test_what_is_known_ahead():
    frame = synthetic(3, 40, columns=True).drop(columns=["region", "visitors"])
    past, rest = frame.groupby("unique_id").head(30), frame.groupby("unique_id").tail(10)
    panel = Panel.read(past, future=["promo"])
    times, known = panel.ahead(10, rest.sample(frac=1, random_state=0).drop(columns="y"))
    assert (known[..., 0].ravel() == rest.promo.to_numpy()).all() and (times.ravel() == rest.ds.to_numpy()).all()
    assert (panel.ahead(4, frame)[1] == known[:, :4]).all()  # other rows are not looked at
    with pytest.raises(ValueError, match="future= is missing, and these columns are known ahead: promo"): panel.ahead(10)
    with pytest.raises(ValueError, match="series 's0': future= has no number for 'promo' at 2018-05-01.*'s0' .1., 's1' .1., 's2' .1."):
        panel.ahead(11, rest)
    with pytest.raises(ValueError, match="series 's1': .* at 2017-07-01"): panel.ahead(10, rest[rest.unique_id != "s1"])
    with pytest.raises(ValueError, match="series 's2': .* at 2018-04-01"): panel.ahead(10, rest[:-1])
    with pytest.raises(ValueError, match="future lacks the column 'promo'"): panel.ahead(10, rest.drop(columns="promo"))
    with pytest.raises(ValueError, match="no number for 'promo'"): panel.ahead(10, rest.assign(promo=np.inf))
    with pytest.raises(ValueError, match="no number for 'promo'"): panel.ahead(10, rest.assign(ds=rest.ds + pd.Timedelta("1D")))
    with pytest.raises(ValueError, match="time zone"): panel.ahead(10, rest.assign(ds=rest.ds.dt.tz_localize("UTC")))
    with pytest.raises(ValueError, match="horizon=0"): panel.ahead(0, rest)
    with pytest.raises(TypeError, match="future is a list"): panel.ahead(1, [1])
    with pytest.warns(UserWarning, match="future= has no effect"): Panel.read(past, past=[]).ahead(2, rest)


# windows

def test_no_training_window_sees_what_is_held_back():
    frame = synthetic(5, 60, columns=True)
    other = frame.copy()
    late = other.groupby("unique_id").cumcount() >= 48
    other.loc[late, ["y", "visitors", "promo"]] = 1e6
    read = lambda f: Panel.read(f, future=["promo"], static=["region"])
    one, two = read(frame), read(other)
    sets = [Pieces(p, 24, 6, skip_last=12, scales=series_scales(p, "standard", 12)) for p in (one, two)]
    rows = torch.arange(len(sets[0]))
    for a, b in zip(sets[0].take(rows), sets[1].take(rows)): assert torch.equal(a, b)
    for kind in SCALERS: assert torch.equal(series_scales(one, kind, 12), series_scales(two, kind, 12))
    for a, b in zip(column_scales(one, 12), column_scales(two, 12)): assert torch.equal(a, b)


@pytest.mark.parametrize("step", [1, 2, 5])
@pytest.mark.parametrize("skip", [0, 7])
@pytest.mark.parametrize("only", [None, 9])
def test_windows_against_a_loop(step, skip, only):
    frame = pd.concat([long(["a"], 30), long(["b"], 25, start="2020-01-01"), long(["c"], 41)]).assign(y=lambda f: np.arange(len(f)) * 1.)
    panel, found = Panel.read(frame), []
    for _, one in frame.groupby("unique_id"):
        y, end = one.y.to_numpy(), len(one) - skip
        lowest = 8 if only is None else max(8, end - only)
        found += [(y[c - 8:c], y[c:c + 4]) for c in sorted(range(end - 4, lowest - 1, -step))]
    pieces = Pieces(panel, 8, 4, step=step, skip_last=skip, only_last=only)
    y, past, future, static, level, target = pieces.take(torch.arange(len(pieces)))
    assert len(pieces) == len(found) and np.array_equal(y.numpy(), [f[0] for f in found])
    assert np.array_equal(target.numpy(), [f[1] for f in found])
    assert past.shape == (len(found), 8, 0) and future.shape == (len(found), 4, 0) and static.shape == (len(found), 0)
    assert level.shape == (len(found), 0)
    back = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))
    assert torch.equal(pieces.take(back)[0], y[back]) and all(part.is_contiguous() for part in pieces.take(back))


def test_windows_with_all_columns():
    panel = Panel.read(synthetic(3, 40, columns=True), future=["promo"], static=["region"], calendar=["month"])
    weights = np.arange(120, dtype=np.float32)
    pieces = Pieces(panel, 10, 5, ahead=True, scales=series_scales(panel), weights=weights)
    rows = torch.tensor([0, 25, 26, len(pieces) - 1])
    series, cut = pieces.where(rows)
    y, past, future, static, level, ahead, target, weight = pieces.take(rows)
    for k, (s, c) in enumerate(zip(series, cut)):
        assert (past[k].numpy() == panel.columns[c - 10:c]).all() and (future[k].numpy() == panel.future[c:c + 5]).all()
        assert (static[k].numpy() == panel.static[s]).all()
        assert (y[k].numpy() == panel.y[c - 10:c]).all() and (target[k].numpy() == panel.y[c:c + 5]).all()
        assert weight[k].tolist() == weights[c:c + 5].tolist()
        assert panel.offsets[s] + 10 <= c <= panel.offsets[s + 1] - 5 and torch.equal(level[k], series_scales(panel)[s])
    assert torch.equal(ahead, target) and ahead.data_ptr() != target.data_ptr()
    target.zero_()  # in memory of their own
    assert torch.equal(pieces.take(rows)[6], ahead)


def test_inputs_before_any_place():
    frame = synthetic(3, 40, columns=True).drop(columns=["region"])
    panel = Panel.read(frame, future=["promo"])
    short = panel.without_last(5)
    known = short.ahead(5, frame)[1]
    ends = inputs_at(short, 10, 5, known, series_scales(short))
    inside = Inputs(panel, 10, 5, cuts=panel.lengths - 5, scales=series_scales(short))
    assert all(torch.equal(a, b) for a, b in zip(ends, inside.take(torch.arange(3))))
    series, cuts = np.array([2, 0, 2]), np.array([33, 35, 12])
    several = Inputs(short, 10, 5, series=series, cuts=cuts, future=known)
    y, past, future, static, level = several.take(torch.arange(3))
    for k, (s, c) in enumerate(zip(series, cuts)):
        assert y[k].tolist() == panel.y[40 * s + c - 10:40 * s + c].tolist()
        assert future[k, :, 0].tolist() == panel.future[40 * s + c:40 * s + c + 5, 0].tolist()
    with pytest.raises(ValueError, match="what is known ahead .promo. is given for 0 steps beyond the end, and 5 are needed"):
        Inputs(short, 10, 5)
    with pytest.raises(ValueError, match="series 's1' has 35 steps, and a forecast after 9 of them needs input_size=10"):
        Inputs(short, 10, 5, cuts=[20, 9, 20])
    with pytest.raises(ValueError, match="a forecast after 36"): Inputs(short, 10, 5, cuts=[20, 36, 20])
    with pytest.raises(ValueError, match="2 cuts for 3 series"): Inputs(short, 10, 5, cuts=[20, 20])
    with pytest.raises(ValueError, match="scales has the shape"): Inputs(panel.without_last(5), 10, 5, future=known, scales=torch.ones(3))


@pytest.mark.parametrize("how, words", [
    (dict(input_size=30, horizon=11), "3 of 3 series are shorter than 41 steps .input_size=30 . horizon=11..*'s0' .40."),
    (dict(skip_last=30), "30 held out"),
    (dict(only_last=2), "only_last=2 holds no window"), (dict(skip_last=-1), "skip_last=-1"), (dict(only_last=True), "only_last=True"),
    (dict(step=0), "step=0"),
    (dict(horizon=0), "horizon=0"), (dict(input_size=1.5), "input_size=1.5"), (dict(short="skip"), "short='skip'"),
    (dict(weights=np.ones(7)), "weights has the shape"),
    (dict(weights=-np.ones(120)), "0 or more"), (dict(weights=np.full(120, np.nan)), "finite"),
    (dict(scales=torch.ones(2, 2)), "scales has the shape")])
def test_pieces_that_cannot_be(how, words):
    with pytest.raises(ValueError, match=words): Pieces(Panel.read(synthetic(3, 40)), **{"input_size": 12, "horizon": 6, **how})


def test_short_series_have_no_windows_where_that_is_said():
    panel = Panel.read(pd.concat([long(["a"], 9), long(["b"], 20), long(["c"], 8)]))
    with pytest.raises(ValueError, match="2 of 3 series.*'c' .8., 'a' .9."): Pieces(panel, 8, 4)
    pieces = Pieces(panel, 8, 4, short="drop")
    assert len(pieces) == 9 and set(pieces.where(torch.arange(9))[0]) == {1}
    with pytest.raises(ValueError, match="3 of 3 series"): Pieces(panel, 18, 4, short="drop")


def test_pieces_are_keyed_data():
    panel = Panel.read(synthetic(4, 50))
    pieces = Pieces(panel, 12, 4, augment=Augment(jitter=.1, mask=.2))
    first = [[part.clone() for part in (*batch.inputs, batch.target)] for batch in make_batches(pieces, 16, seed=3).epoch(2)]
    rest = list(make_batches(pieces, 16, seed=3).epoch(2, start=5))
    assert len(first) == len(make_batches(pieces, 16)) and sum(len(parts[0]) for parts in first) == len(pieces)
    assert all(torch.equal(a, b) for a, b in zip(first[5], (*rest[0].inputs, rest[0].target)))  # an epoch that is entered in its middle
    kept, held = pieces.hold_out(.2)
    assert kept.skip_last == 10 and held.only_last == 10 and held.augment is None and kept.augment is pieces.augment
    assert torch.equal(held.take(torch.arange(3), key=5)[0], held.take(torch.arange(3))[0])
    with pytest.raises(ValueError, match="held out"): pieces.hold_out(.9)
    assert len(pickle.loads(pickle.dumps(pieces))) == len(pieces)


# augmentation and scaling

def test_augmentation_leaves_targets_true():
    panel = Panel.read(air_passengers())
    rows = torch.arange(50)
    plain = Pieces(panel, 24, 12).take(rows)
    for spec in ({"jitter": .2}, {"mask": .5}):
        y, *_, target = Pieces(panel, 24, 12, augment=augment_of(spec)).take(rows, key=9)
        assert torch.equal(target, plain[-1]) and not torch.equal(y, plain[0])
    y, *_, target = Pieces(panel, 24, 12, augment=augment_of({"scale": .2})).take(rows, key=9)
    torch.testing.assert_close(target / plain[-1], (y / plain[0])[:, :1].expand(-1, 12))
    masked = Pieces(panel, 24, 12, augment=Augment(mask=.5)).take(torch.arange(109), key=9)[0]
    long_ = (masked != Pieces(panel, 24, 12).take(torch.arange(109))[0]).sum(1)
    assert long_.max() == 12 and long_.min() == 0
    for wrong in ({"jiter": 1}, {"jitter": -1}, {"jitter": "much"}, {"mask": 1.5}, {"warp": True}, {"scale": np.inf}):
        with pytest.raises(ValueError): augment_of(wrong)
    with pytest.raises(TypeError): augment_of(.1)


def test_scales_of_a_window_and_of_a_series_agree():
    draw = np.random.default_rng(0)
    y = np.exp(draw.normal(size=(50, 33))) * np.logspace(-4, 4, 50)[:, None]
    frame = pd.DataFrame({"unique_id": np.repeat(np.arange(50), 33), "ds": np.tile(np.arange(33), 50), "y": y.ravel()})
    panel = Panel.read(frame)
    for kind in SCALERS:
        theirs = torch.cat(measure(torch.tensor(panel.y.reshape(50, 33)), kind), 1)
        torch.testing.assert_close(series_scales(panel, kind), theirs, rtol=1e-4, atol=1e-6)
    for kind in SCALERS:
        assert (measure(torch.zeros(3, 5), kind)[1] == 1).all() and series_scales(Panel.read(frame.assign(y=0.)), kind)[:, 1].eq(1).all()
    near = torch.full((1, 50), 1e6) + torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    assert .5 < measure(near, "standard")[1] < 2 and measure(torch.full((1, 50), .1) , "standard")[1] == 1
    assert series_scales(panel, "standard", 40).shape == (50, 2)  # more than there is: the first value is all that is known
    for call in (lambda: measure(near, "zscore"), lambda: series_scales(panel, "stand")):
        with pytest.raises(ValueError, match="is unknown.*'standard'"): call()


# size

def test_a_hundred_thousand_series_in_seconds():
    code = """
import resource, time
import numpy as np, pandas as pd, torch
from arc_nb.tasks.forecast.panel import Panel
from arc_nb.tasks.forecast.pieces import Pieces
S, T = 100_000, 20
ids = np.repeat([f"s{k}" for k in range(S)], T)
frame = pd.DataFrame({"unique_id": ids, "ds": np.tile(pd.date_range("2020-01-01", periods=T, freq="MS"), S),
                      "y": np.random.default_rng(0).random(S * T).astype(np.float32)})
begin = time.process_time()
panel = Panel.read(frame.drop(np.arange(3, S * T, 200)), fill="interpolate", calendar=["month"])
pieces = Pieces(panel, 8, 4)
pieces.take(torch.randint(len(pieces), (4096,)))
assert len(panel) == S and len(pieces) == S * 9 and panel.counts["gaps"].sum() == S // 10
print(time.process_time() - begin)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20  # 2 s where it was written: a loop over the series would take minutes


def test_synthetic_series_are_as_they_are_said_to_be():
    frame = synthetic(50, 100, truth=True, noise=.1)
    assert frame.groupby("unique_id").size().eq(100).all() and frame.equals(synthetic(50, 100, truth=True, noise=.1))
    assert (synthetic(3, 10, noise=0, truth=True).pipe(lambda f: f.y - f.truth) == 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for freq in FREQS: assert len(synthetic(2, 30, freq)) == 60
    for wrong in (dict(series=0), dict(steps=1.5), dict(noise=-1), dict(season=0), dict(freq=0), dict(freq="MM")):
        with pytest.raises(ValueError): synthetic(**wrong)
