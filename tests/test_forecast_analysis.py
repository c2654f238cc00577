"""Baselines, pictures, backtests, residuals and comparisons: against reference values, on odd data, and without a look into the future."""

import math
import re
import warnings
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from arc_nb.draw.timeaxis import moment, time_marks, to_numbers
from arc_nb.tasks.forecast import (MLP, Drift, MovingAverage, Naive, SeasonalNaive, Statistical, air_passengers, analyse, backtest,
                                   diebold_mariano, synthetic)
from arc_nb.tasks.forecast.backtesting import origins
from arc_nb.tasks.forecast.comparison import compare, overlap
from arc_nb.tasks.forecast.picture import figure, picture, spread
from arc_nb.tasks.forecast.residuals import acf, breusch_pagan, jarque_bera, ljung_box

AIR = air_passengers()
BASELINES = [Naive(12), SeasonalNaive(12, 12), Drift(12), MovingAverage(12, 12)]


def plain(svg: str) -> list[str]:
    """The texts of a picture; fails where it is no XML, or holds a number that is none."""
    tree = ElementTree.fromstring(svg)
    for element in tree.iter():
        for name, value in element.attrib.items():
            if name in ("aria-label", "class", "style", "font-family"): continue
            assert "nan" not in value and "inf" not in value, (element.tag, name, value)
    return [t.text or "" for t in tree.iter() if t.tag.endswith(("text", "tspan"))]


def around(frame: pd.DataFrame, model: str = "M", wide: float = 1.) -> pd.DataFrame:
    """Forecasts that are what came true, with intervals."""
    ends = {f"{model}-{side}-{level}": frame.y + sign * wide * level / 10 for level in (80, 95) for side, sign in (("lo", -1), ("hi", 1))}
    return pd.DataFrame({"unique_id": frame.unique_id, "ds": frame.ds, model: frame.y, **ends})


# ---- time axis
@pytest.mark.parametrize("start", ["1677-10-01", "1949-01-01", "2024-02-28 23:59:59", "2199-12-31"])
def test_ticks_are_few_inside_and_in_order(start):
    at = to_numbers([start])[0]
    for span in np.geomspace(.05, 3e9, 60):
        for most in (2, 4, 9):
            found = time_marks(at, at + span, most)
            assert len(found) <= most + 1 and all(at <= m.at <= at + span for m in found)
            assert [m.at for m in found] == sorted({m.at for m in found}) and all(m.label for m in found)


def test_ticks_stand_on_mondays_and_months():
    lo, hi = to_numbers(["2024-01-01", "2024-03-05"])
    assert all(pd.Timestamp(m.at, unit="s").weekday() == 0 for m in time_marks(lo, hi, 10))
    assert [m.label for m in time_marks(lo, hi, 4)] == ["Jan", "Feb", "Mar"]
    assert moment(lo, 86400) == "1 Jan 2024" and moment(7., 1., False) == "7"


# ---- pictures
@pytest.mark.parametrize("freq", ["YS", "QS", "MS", "W", "D", "B", "h", "15min", "s", 1, 5])
def test_a_picture_of_any_frequency_is_sound(freq):
    data = synthetic(series=2, steps=80, freq=freq, season=4, seed=1)
    ends = data.groupby("unique_id").tail(10)
    for theme in ("light", "dark", "auto"): texts = plain(picture(data, around(ends), theme=theme))
    assert {"s0", "s1", "M", "80%", "95%", "actual"} <= set(texts)
    single = plain(picture(data, around(ends), series=["s1"], unit="kW"))
    assert "s1" in single and any("kW" in t and "ahead" in t for t in single)
    drawn = figure(data, around(ends))
    assert len(drawn.layout.updatemenus[0].buttons) == 2 and len(drawn.to_json()) < 100_000


def test_a_picture_of_odd_data():
    holes = AIR.assign(y=AIR.y.where(AIR.index % 7 != 3))
    plain(picture(holes, around(AIR[132:])))
    plain(picture(AIR.assign(y=5.), around(AIR[132:].assign(y=5.), wide=0)))  # constant, intervals without width
    plain(picture(AIR[:132], around(AIR[132:133])))  # one step ahead
    plain(picture(AIR[:1], around(AIR[1:3])))        # one row of history
    plain(picture(AIR.assign(unique_id=7), around(AIR[132:].assign(unique_id=7))))
    plain(picture(AIR, around(AIR[132:]).assign(M=np.nan, N=1.), models=["N"]))
    texts = plain(picture(AIR.assign(unique_id="<b>&\"x\"</b>"), around(AIR[132:].assign(unique_id="<b>&\"x\"</b>"))))
    assert '<b>&"x"</b>' in texts
    far = around(AIR[132:]).assign(ds=pd.date_range("1970", periods=12, freq="MS"))  # not right after the history
    plain(picture(AIR, far))
    many = pd.concat([around(AIR[132:], f"model number {k}").set_index(["unique_id", "ds"]) for k in range(7)], axis=1).reset_index()
    assert "model … number 6" not in plain(picture(AIR, many)) and picture(AIR, many).count("<polygon") == 0


def test_names_keep_their_distance():
    rng = np.random.default_rng(0)
    for _ in range(200):
        wanted = rng.uniform(0, 100, rng.integers(1, 7)).tolist()
        found = spread(wanted, 14, 0, 100)
        order = np.argsort(wanted, kind="stable")
        assert (np.diff(np.array(found)[order]) >= 14 - 1e-9).all() and min(found) >= 0 and max(found) <= 100 + 1e-9
        if len(wanted) == 1: assert found == wanted


def test_what_came_true_is_not_part_of_the_past():
    seen = picture(AIR, around(AIR[132:]))
    without = picture(AIR[:132], around(AIR[132:]))
    assert seen.count("<circle") == without.count("<circle") + 12
    assert "actual" in plain(seen) and "actual" not in plain(without)
    given = picture(AIR[:132], around(AIR[132:]), actual=AIR[132:])
    assert given.count("<circle") == seen.count("<circle")


def test_a_figure_of_a_long_past_stays_small():
    n = 300_000
    walk = np.random.default_rng(0).normal(size=n).cumsum()
    long = pd.DataFrame({"unique_id": "a", "ds": pd.date_range("1990", periods=n, freq="h"), "y": walk})
    drawn = figure(long[:-96], around(long[-96:]), theme="dark")
    assert sum(len(t.x) for t in drawn.data) < 4000 and len(drawn.to_json()) < 300_000
    assert drawn.layout.xaxis.rangeslider.visible


# ---- baselines
@pytest.mark.parametrize("model", BASELINES, ids=lambda m: m.name)
def test_a_baseline_does_not_look_ahead(model):
    data = synthetic(series=5, steps=60, seed=3)
    cut = sorted(data.ds.unique())[40]
    spoiled = data.assign(y=data.y.where(data.ds <= cut, 1e7))
    one, two = (model.clone().fit(data).predict_at(frame, [cut]) for frame in (data, spoiled))
    pd.testing.assert_frame_equal(one, two)
    alone = model.clone().fit(data[data.ds <= cut]).predict()
    pd.testing.assert_frame_equal(one.drop(columns="cutoff"), alone)


def test_the_flat_panel_gives_what_a_loop_gives():
    lengths = {"a": 30, "b": 41, "c": 13}
    rng = np.random.default_rng(1)
    walks = {k: 50 + rng.normal(size=n).cumsum() for k, n in lengths.items()}
    frame = pd.concat([pd.DataFrame({"unique_id": k, "ds": np.arange(len(y)), "y": y}) for k, y in walks.items()])
    said = {m.name: m.clone().fit(frame).predict(level=80).set_index("unique_id") for m in BASELINES}
    z = 1.2815515655446004
    for name, part in frame.groupby("unique_id"):
        y, h = part.y.to_numpy(), np.arange(1, 13)
        d = np.diff(y)
        half = lambda m, name=name: ((said[m].loc[name, f"{m}-hi-80"] - said[m].loc[name, m]) / z).to_numpy()
        assert np.allclose(half("Naive"), np.sqrt((d**2).mean() * h), rtol=1e-4)
        drift = (y[-1] - y[0]) / (len(y) - 1)
        assert np.allclose(said["Drift"].loc[name, "Drift"], y[-1] + drift * h, rtol=1e-5)
        assert np.allclose(half("Drift"), np.sqrt(((d - drift)**2).sum() / (len(d) - 1) * h * (1 + h / (len(y) - 1))), rtol=1e-4)
        assert np.allclose(half("SeasonalNaive"), np.sqrt(((y[12:] - y[:-12])**2).mean()), rtol=1e-4)
        means = np.array([y[k - 12:k].mean() for k in range(12, len(y) + 1)])
        assert np.allclose(said["MovingAverage"].loc[name, "MovingAverage"], means[-1], rtol=1e-5)
        for k in h[:len(y) - 12]:
            errors = np.array([y[i + k - 1] - means[i - 12] for i in range(12, len(y) - k + 1)])
            assert np.isclose(half("MovingAverage")[k - 1], np.sqrt((errors**2).mean()), rtol=1e-3)
    assert said["MovingAverage"].loc["c", "MovingAverage-lo-80"].isna().sum() == 11  # one error of one step, none of more: not known


def test_statistical_says_what_is_missing():
    try: import statsforecast  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r'pip install "arc_nb\[forecast\]"'): Statistical("AutoETS", horizon=12, season_length=12)
    else:
        found = Statistical("AutoETS", horizon=12, season_length=12, model="ZMZ").fit(AIR[:132]).predict()
        assert abs(np.abs(found.AutoETS - AIR.y[132:].to_numpy()).mean() - 16.222) < .01


# ---- residuals: reference values of statsmodels 0.15.0 (acorr_ljungbox, jarque_bera, het_breuschpagan) and scipy
def test_residual_tests_agree_with_statsmodels():
    growth = np.diff(np.log(AIR.y))
    r = growth[12:] - growth[:-12]
    assert np.isclose(ljung_box(r, 10)[0], 28.986885, atol=1e-6) and np.isclose(ljung_box(r, 10)[1], .001252, atol=1e-6)
    assert np.allclose(jarque_bera(r), (7.222612945543032, 0.02701652744195725, 0.03819064176880328, 4.147777286196501))
    e = AIR.y.to_numpy()[12:] - AIR.y.to_numpy()[:-12]
    assert np.allclose(breusch_pagan(e, AIR.y.to_numpy()[:-12])[:2], (35.08425104789768, 3.157441090327371e-09))
    assert np.isclose(ljung_box(e, 10, parameters=2)[1], 3.904623e-46, rtol=1e-5)
    assert np.isclose(analyse(e)["bias"].p_value, 4.461305031856944e-43)


def test_pooled_tests_reject_as_often_as_they_say():
    rng, found = np.random.default_rng(0), np.zeros(4)
    for _ in range(150): found += [not f.fine for f in analyse(rng.normal(size=(30, 40)) * rng.lognormal(0, 3, (30, 1))).findings]
    print("share of findings where nothing is", found / 150)
    assert (found / 150 < .11).all()
    noise = rng.normal(size=(30, 41))
    errors = noise[:, 1:] + .5 * noise[:, :-1]  # a moving average: autocorrelation 0.4 at lag 1
    assert not analyse(errors)["autocorrelation"].fine and abs(acf(errors.ravel(), 1, np.repeat(range(30), 40))[0] - .4) < .1


# ---- comparison
def test_diebold_mariano_by_a_loop():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=50), 1.2 * rng.normal(size=50)
    for h in (1, 2, 4):
        d = a**2 - b**2
        n, mean = len(d), d.mean()
        gamma = [sum((d[t] - mean) * (d[t - k] - mean) for t in range(k, n)) / n for k in range(h)]
        dm = mean / math.sqrt((gamma[0] + 2 * sum(gamma[1:])) / n)
        found = diebold_mariano(a, b, h, "squared")
        assert np.isclose(found.statistic, dm * math.sqrt((n + 1 - 2 * h + h * (h - 1) / n) / n))
        less, more = (diebold_mariano(a, b, h, "squared", alternative=k).p_value for k in ("less", "greater"))
        assert np.isclose(less + more, 1) and np.isclose(found.p_value, 2 * min(less, more))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        saw = np.tile([1., -1.], 20) + .01 * rng.normal(size=40)
        diebold_mariano(2 + saw, np.full(40, 2.), 2)  # autocovariances that add up to less than nothing
    assert "Newey and West" in str(told[0].message)


def test_overlap_of_origins():
    frame = lambda step: backtest(Naive(6), AIR, windows=8, step=step).frame()
    assert [overlap(frame(step)) for step in (1, 2, 3, 4, 6, 9)] == [6, 3, 2, 2, 1, 1]


# ---- backtest
def test_a_backtest_of_a_network_does_not_look_ahead():
    data = synthetic(series=3, steps=72, seed=5)
    network = MLP(6, 12, max_steps=20, hidden_size=16)
    whole = backtest(network, data, windows=3).frame()
    assert network.model is None  # a copy was trained
    cut = sorted(whole.cutoff.unique())
    spoiled = backtest(network, data.assign(y=data.y.where(data.ds <= cut[1], -1e5)), windows=3).frame()
    early = whole.cutoff <= cut[1]
    assert (whole.loc[early, "MLP"].to_numpy() == spoiled.loc[early, "MLP"].to_numpy()).all()
    assert not np.allclose(whole.loc[~early, "MLP"], spoiled.loc[~early, "MLP"])
    once = network.clone().fit(data[data.ds <= cut[0]], run=False, board=False)
    for c in cut:
        said = once.predict(data[data.ds <= c]).MLP.to_numpy()
        assert np.allclose(said, whole.loc[whole.cutoff == c, "MLP"], rtol=1e-4)


def test_refit_trains_at_each_origin():
    counts = []

    class Last:
        horizon = 2
        def clone(self): return type(self)()
        def fit(self, frame): counts.append(frame.ds.max()); self.frame = frame; return self
        def predict(self, frame=None):
            end = (self.frame if frame is None else frame).groupby("unique_id").tail(1)
            return pd.concat([pd.DataFrame({"unique_id": end.unique_id, "ds": end.ds + k, "Last": end.y}) for k in (1, 2)])

    data = synthetic(series=2, steps=40, freq=1)
    for refit, times in ((True, 6), (False, 1), (2, 3), (4, 2)):
        counts.clear()
        found = backtest(Last(), data, windows=6, refit=refit)
        assert len(counts) == times and counts[0] == found.cutoffs[0]
        naive = backtest(Naive(2), data, windows=6).frame()
        assert np.allclose(found.frame().Last, naive.Naive)


def test_scores_and_pictures_of_a_backtest():
    found = backtest([SeasonalNaive(12, 12), Naive(12)], AIR, windows=4)
    table = found.frame()
    by_step = found.scores("step", ["mae"])
    assert np.isclose(by_step.loc[(3, "Naive"), "mae"], np.abs(table.y - table.Naive)[table.step == 3].mean())
    assert found.residuals("Naive", step=None).by_step.shape[0] == 12
    texts = plain(found.picture())
    assert "Error by step" in texts and "1957" in texts
    assert compare(table, "Naive")[0].names == ("SeasonalNaive", "Naive")
    assert len(found.figure(theme="dark").data) == 1 + 2 * 2 + 4  # the past, two models with their starts, two levels each
    plain(found.residuals("Naive", step=None).picture())
    with pytest.raises(ValueError, match="the tests need 8"): found.residuals("Naive")


@pytest.mark.parametrize("call, words", [
    (lambda: origins(AIR, 12, 12), "145 dates, and the frame has 144"),
    (lambda: backtest(object(), AIR), "horizon="),
    (lambda: backtest(Naive(12), AIR, refit=-1), "every n-th"),
    (lambda: backtest(Naive(12), AIR).scores(by="month"), "step"),
    (lambda: picture(AIR, around(AIR[132:]), levels=[50]), "those are 80, 95"),
    (lambda: picture(AIR, AIR), "predict"),
    (lambda: picture(AIR.assign(unique_id="x"), around(AIR[132:])), "no rows of 'AirPassengers'"),
    (lambda: picture(AIR, around(AIR[132:]), theme="pink"), "'light'"),
    (lambda: analyse(np.zeros((2, 3, 4))), "(series, n)"),
    (lambda: analyse(AIR), "no column of a model"),
    (lambda: diebold_mariano(np.ones(5), np.r_[1., 2, np.nan, 1, 1]), "NaN"),
    (lambda: SeasonalNaive(12, 12).fit(AIR[:5]), "AirPassengers"),
    (lambda: Naive(3).fit(AIR).predict_at(AIR, ["1930-01-01"]), "cutoffs"),
])
def test_errors_say_what_to_do(call, words):
    with pytest.raises(ValueError, match=re.escape(words)): call()


def test_one_series_does_not_spoil_the_digits_of_another():
    data = synthetic(series=3, steps=60, seed=2)
    huge = data.assign(y=data.y.where(data.unique_id != "s0", data.y * 1e9))
    for model in BASELINES:
        small, beside = (model.clone().fit(frame).predict().query("unique_id != 's0'") for frame in (data, huge))
        pd.testing.assert_frame_equal(small, beside, rtol=1e-12)


def test_figures_have_dates_and_follow_the_theme():
    found = backtest([SeasonalNaive(12, 12), Naive(12)], AIR, windows=30, step=2)
    report = found.residuals("Naive")
    for which in ("over time", "distribution", "autocorrelation", "by step"):
        for theme in ("light", "dark"): assert report.figure(which, theme).data
    for drawn in (report.figure(), found.compare("Naive")[0].figure()): assert np.issubdtype(drawn.data[1].x.dtype, np.datetime64)
    with pytest.raises(ValueError, match="over time"): report.figure("overtime")


# ---- what a person saw who used it
def test_numbers_of_an_axis_have_room_and_are_a_scale():
    "Millions once ran out of the picture at its left; a low panel had a single number."
    big = AIR.assign(y=AIR.y * 1e4)
    texts = plain(picture(big, around(big.tail(12))))
    assert "4M" in texts and not any(t.count(",") == 2 and len(t) > 7 for t in texts)
    from arc_nb.draw.svg import Axis, Box
    from arc_nb.draw.timeaxis import time_grid
    grid = time_grid(Axis(0, 10, 0, 300), Axis(21, 89, 104, 0), Box(0, 0, 300, 104), False)
    assert sum(f">{v}<" in grid for v in (20, 40, 60, 80)) >= 2


def test_a_long_name_leaves_room_for_what_is_ahead():
    long = AIR.assign(unique_id="a series of some store in the north-west, item 4711, and of its sisters in the south of the country")
    assert "12 months ahead" in plain(picture(long, around(long.tail(12))))


@pytest.mark.parametrize("freq, text", [("W", "8 weeks ahead"), ("2W", "8 × 2 weeks ahead"), ("QS", "8 quarters ahead"),
                                        ("10D", "8 × 10 days ahead"), ("MS", "8 months ahead"), ("h", "8 hours ahead")])
def test_steps_are_counted_as_people_do(freq, text):
    frame = pd.DataFrame({"unique_id": "a", "ds": pd.date_range("2020-01-01", periods=60, freq=freq), "y": np.arange(60.)})
    assert text in plain(picture(frame, around(frame.tail(8))))


def test_a_long_truth_lies_below_the_forecast():
    frame = pd.DataFrame({"unique_id": "a", "ds": np.arange(300), "y": np.sin(np.arange(300.))})
    lines = re.findall(r'<polyline class="s-(fg|a)"', picture(frame, around(frame.tail(100)), levels=()))
    assert lines == ["fg", "a"]


def test_several_errors_at_a_date_are_no_zigzag():
    test = backtest(SeasonalNaive(12, 12), AIR, windows=12, step=3)
    assert "several steps at each date" in plain(test.residuals(step=None).picture())
    assert "several steps at each date" not in plain(test.residuals().picture())


def test_a_backtest_says_how_many_series_there_are():
    data = synthetic(series=6, steps=80, freq="MS", season=12, seed=0)
    texts = plain(backtest(SeasonalNaive(12, 12), data, windows=3).picture())
    assert "6 series, 3 origins, 12 steps ahead" in texts and "one of the series" in texts
    assert "1 origin, 12 steps ahead" in plain(backtest(SeasonalNaive(12, 12), AIR, windows=1).picture())
    assert len(repr(backtest([SeasonalNaive(12, 12), Naive(12)], AIR, windows=5).compare("Naive"))) < 250
    for refit in (0, -1, 1.5, "always"):
        with pytest.raises(ValueError, match="every n-th"): backtest(SeasonalNaive(12, 12), AIR, refit=refit)
