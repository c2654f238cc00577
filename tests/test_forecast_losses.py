"Losses, likelihoods, scores and conformal intervals of forecasts: what no chapter shows."
import math
import pickle
import warnings

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from arc_nb import Trainer
from arc_nb.engine.objectives import objective
from arc_nb.tasks.forecast.conformal import Conformal, errors_of, needed, rank
from arc_nb.tasks.forecast.goals import ForecastLoss, Output
from arc_nb.tasks.forecast.likelihoods import LIKELIHOODS
from arc_nb.tasks.forecast.losses import LOSSES, loss_of, losses, phases, time_weights
from arc_nb.tasks.forecast.panel import Panel
from arc_nb.tasks.forecast.samples import synthetic
from arc_nb.tasks.forecast.scaling import measure
from arc_nb.tasks.forecast.scores import coverage, crps_quantiles, crps_samples, interval_score, pinball, score

L, H = 24, 4
SPECS = {"mae": "mae", "mse": "mse", "rmse": "rmse", "mape": "mape", "smape": "smape", "mase": ("mase", {"season_length": 12}),
         "huber": ("huber", {"delta": 0.5}), "quantile": "quantile",
         "quantile-weights": ("quantile", {"levels": [0.9, 0.1, 0.5], "weights": [3, 1, 2]}),
         "one-quantile": ("quantile", {"levels": [0.7]}), "gaussian": "gaussian", "normal": "normal", "student_t": "student_t",
         "negative_binomial": "negative_binomial", "nll": ("nll", {"distribution": "student_t"}),
         "weighted": ("weighted", {"base": "quantile", "weights": [4, 3, 2, 1]}),
         "weighted-rmse": ("weighted", {"base": "rmse", "weights": [4, 0, 2, 1]}),
         "weighted-mape": ("weighted", {"base": "mape", "weights": [4, 0, 2, 1]}),
         "by-time": ("weighted", {"base": "gaussian", "by": lambda ds, y: np.ones(len(y))}),
         "both": ("weighted", {"base": "mae", "weights": [1, 2, 3, 4], "by": lambda ds, y: np.ones(len(y))}),
         "seasonal": ("seasonal", {"season_length": 2, "weights": [1, 3], "base": "smape"}),
         "scaled": ("scaled", {"base": ("quantile", {"levels": [0.2, 0.8]}), "by": "robust"}),
         "nested": ("weighted", {"base": ("scaled", {"base": "huber"}), "weights": [1, 1, 2, 2]}),
         "module": nn.SmoothL1Loss(reduction="mean"), "l1-module": nn.L1Loss()}
ROWS = {"by-time", "both", "seasonal"} # that need weights
MEANS = {"module"} # a mean, which cannot be weighed


def batch(loss, n=11, seed=0, counts=False):
    "Outputs and targets of n windows"
    g = torch.Generator().manual_seed(seed)
    level = 10 ** torch.rand(n, 1, generator=g) * 5
    y = (level * (2 + torch.rand(n, L + H, generator=g))).round()
    loc, scale = measure(y[:, :L], "mean" if loss.scaler or counts else "standard")
    return Output(torch.randn(n, H, loss.outputs, generator=g), loc, scale, y[:, :L]), y[:, L:]


def part(output, rows): return Output(*(v[rows] for v in output))


def quiet(call, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return call(*args)


@pytest.mark.parametrize("kind", ["none", "windows", "cells"])
@pytest.mark.parametrize("name", SPECS)
def test_batches_of_any_size_add_up_to_the_mean_over_all(name, kind):
    loss = loss_of(SPECS[name])
    if kind == "none" and name in ROWS: kind = "cells"
    if kind != "none" and name in MEANS: pytest.skip("a mean cannot be weighed")
    output, target = batch(loss)
    target[2, 1] = 0.0 # mape leaves it out
    g = torch.Generator().manual_seed(1)
    weight = {"none": None, "windows": torch.rand(11, generator=g), "cells": torch.rand(11, H, generator=g)}[kind]
    quiet(loss.check, output, target, weight)
    pieces = [(part(output, s), target[s], None if weight is None else weight[s]) for s in (slice(0, 4), slice(4, 8), slice(8, 11))]
    total = sum(float(loss(*p)) * float(loss.count(*p)) for p in pieces) / sum(float(loss.count(*p)) for p in pieces)
    assert float(loss(output, target, weight)) == pytest.approx(total, rel=1e-5)
    assert float(loss(*pieces[0])) >= 0 or loss.name in LIKELIHOODS or name in {"by-time", "nll"}
    if name not in {"weighted-rmse", *MEANS} and kind == "none" and name != "mape" and "mape" not in name:
        assert float(loss.losses(output, target).mean()) == pytest.approx(total, rel=1e-5)
    assert loss.losses(output, target).shape == loss.point(output).shape == (11, H)


@pytest.mark.parametrize("name", SPECS)
def test_a_window_of_weight_zero_counts_for_nothing(name):
    loss = loss_of(SPECS[name])
    if name in MEANS: pytest.skip("a mean cannot be weighed")
    output, target = batch(loss)
    weight = torch.ones(11)
    weight[3:] = 0
    assert float(loss(output, target, weight)) == pytest.approx(float(loss(part(output, slice(3)), target[:3], weight[:3])), rel=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_losses_go_to_other_processes_and_to_files(name):
    loss = loss_of(SPECS[name])
    output, target = batch(loss)
    weight = torch.rand(11, H, generator=torch.Generator().manual_seed(0)) if name in ROWS else None
    there = pickle.loads(cloudpickle.dumps(loss))
    assert torch.equal(there(output, target, weight), loss(output, target, weight)) and objective(loss) is loss


@pytest.mark.parametrize("name", SPECS)
def test_gradients_are_finite_where_it_hurts(name):
    loss = loss_of(SPECS[name])
    for kind in ("right", "far", "still"):
        output, target = batch(loss)
        values = output.values.clone()
        if kind == "right" and loss.scaler is None: values = ((target - output.loc) / output.scale)[..., None].expand_as(values).clone()
        if kind == "far": values = values * 100
        if kind == "still": output = output._replace(past=output.past[:, :1].expand(-1, L)); target = target * 0
        values.requires_grad_()
        value = loss(output._replace(values=values), target, torch.rand(11, H) if name in ROWS else None)
        value.backward()
        assert value.isfinite() and values.grad.isfinite().all(), kind


@pytest.mark.parametrize("name", SPECS)
def test_half_precision_outputs_are_measured_in_single(name):
    loss = loss_of(SPECS[name])
    output, target = batch(loss)
    half = output._replace(values=output.values.to(torch.bfloat16))
    weight = torch.ones(11, H) if name in ROWS else None
    assert loss(half, target, weight).dtype == torch.float32 and loss.point(half).dtype == torch.float32
    assert float(loss(half, target, weight)) == pytest.approx(float(loss(output, target, weight)), rel=0.05, abs=0.05)


def numbers(loss):
    "Outputs and targets in 64 bits, in units of y"
    output, target = batch(loss)
    f = (output.values[..., 0] * output.scale + output.loc).double().numpy()
    return output, target, f, target.double().numpy(), output.scale.double().numpy(), output.past.double().numpy()


@pytest.mark.parametrize("name,formula", {
    "mae": lambda f, y, s, past: (np.abs(y - f) / s).mean(),
    "mse": lambda f, y, s, past: (((y - f) / s) ** 2).mean(),
    "rmse": lambda f, y, s, past: np.sqrt((((y - f) / s) ** 2).mean(1)).mean(),
    "mape": lambda f, y, s, past: 100 * (np.abs(y - f) / np.abs(y)).mean(),
    "smape": lambda f, y, s, past: 200 * (np.abs(y - f) / (np.abs(y) + np.abs(f))).mean(),
    "mase": lambda f, y, s, past: (np.abs(y - f) / np.abs(past[:, 12:] - past[:, :-12]).mean(1, keepdims=True)).mean(),
    "huber": lambda f, y, s, past: np.where(np.abs(y - f) / s < 0.5, ((y - f) / s) ** 2 / 2, 0.5 * (np.abs(y - f) / s - 0.25)).mean(),
    "one-quantile": lambda f, y, s, past: np.maximum(0.7 * (y - f) / s, -0.3 * (y - f) / s).mean(),
    "gaussian": None}.items())
def test_losses_are_the_formulas(name, formula):
    loss = loss_of(SPECS[name])
    output, target, f, y, scale, past = numbers(loss)
    if name == "gaussian":
        spread = np.log1p(np.exp(output.values[..., 1].double().numpy())) + 1e-3
        expected = -stats.norm.logpdf((y - f) / scale / spread).mean() + np.log(spread).mean()
    else: expected = formula(f, y, scale, past)
    assert float(loss(output, target)) == pytest.approx(expected, rel=1e-5)


def test_a_weighted_root_is_the_root_of_the_weighted_mean():
    loss = loss_of("rmse")
    output, target, f, y, scale, _ = numbers(loss)
    weight = torch.rand(11, H, generator=torch.Generator().manual_seed(0))
    w = weight.double().numpy()
    roots = np.sqrt((w * ((y - f) / scale) ** 2).sum(1) / w.sum(1))
    assert float(loss(output, target, weight)) == pytest.approx((roots * w.sum(1)).sum() / w.sum(), rel=1e-5)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_samples_and_quantiles_are_of_one_distribution(name):
    loss = loss_of(name)
    output, target = batch(loss, 3)
    levels = [0.05, 0.25, 0.5, 0.9, 0.975]
    draws = loss.sample(output, 20000, torch.Generator().manual_seed(0))
    again = loss.sample(output, 20000, torch.Generator().manual_seed(0))
    cuts = loss.quantiles(output, levels)
    assert torch.equal(draws, again) and draws.shape == (20000, 3, H) and cuts.shape == (3, H, 5) and bool((cuts.diff(dim=-1) >= 0).all())
    below, at_most = (draws[..., None] < cuts).float().mean(0), (draws[..., None] <= cuts).float().mean(0)
    for i, level in enumerate(levels): assert bool(((below[..., i] - 0.015 <= level) & (level <= at_most[..., i] + 0.015)).all()), level
    assert torch.allclose(loss.quantiles(output, torch.tensor(levels)), cuts, rtol=1e-4)
    mean = loss.point(output)
    if name != "student_t": assert torch.allclose(draws.mean(0), mean, atol=0.05 * float(draws.std()))


def test_the_likelihood_is_that_of_windows_of_different_sizes():
    "One set of raw outputs explains draws of many scales: the parameters found are those that the data were made with."
    rng = np.random.default_rng(0)
    n = 4000
    scale = torch.tensor(rng.lognormal(3, 1.5, (n, 1)), dtype=torch.float32)
    for name, true in {"gaussian": (0.3, 0.8), "student_t": (0.3, 0.8, 5.0)}.items():
        z = rng.normal(true[0], true[1], (n, H)) if name == "gaussian" else true[0] + true[1] * rng.standard_t(true[2], (n, H))
        target = 3 * scale + scale * torch.tensor(z, dtype=torch.float32)
        found = fitted(loss_of(name), 3 * scale, scale, target)
        assert all(abs(a - b) < 0.15 * b for a, b in zip(found, true)), (name, found)
    size = torch.tensor(rng.integers(5, 60, (n, 1)), dtype=torch.float32)
    mean, spread = 1.4 * size.numpy(), 0.9 / np.sqrt(size.numpy())
    counts = rng.poisson(rng.gamma(1 / spread, spread * mean, (n, H)))
    loss = loss_of("negative_binomial")
    raw = fitted(loss, size * 0, size, torch.tensor(counts, dtype=torch.float32), raw=True)
    assert abs(math.log1p(math.exp(raw[0])) - 1.4) < 0.05 and abs(math.log1p(math.exp(raw[1])) - 0.9) < 0.06


def fitted(loss, loc, scale, target, raw=False):
    "The parameters, scaled or raw, that make the targets likeliest"
    free = torch.zeros(1, 1, loss.outputs, requires_grad=True)
    moves = torch.optim.LBFGS([free], max_iter=60, line_search_fn="strong_wolfe")
    give = lambda: Output(free.expand(len(target), target.shape[1], -1), loc, scale)
    loss.check(give(), target)
    def again():
        moves.zero_grad()
        value = loss(give(), target)
        value.backward()
        return value
    moves.step(again)
    return [float(v) for v in free.detach().flatten()] if raw else [p.detach()[0, 0].item() for p in loss.parameters(give())]


def test_crossing_quantiles_are_sorted_and_read_between():
    loss = loss_of(("quantile", {"levels": [0.1, 0.5, 0.9]}))
    output = Output(torch.tensor([[[2.0, 1.0, 0.0]]]), torch.tensor([[50.0]]), torch.tensor([[10.0]]))
    assert loss.quantiles(output, [0.1, 0.3, 0.5, 0.9]).flatten().tolist() == pytest.approx([50, 55, 60, 70])
    assert float(loss.point(output)) == 60
    many = loss_of(("quantile", {"levels": [0.975, 0.025, 0.1, 0.9, 0.5]}))
    assert many.levels == [0.025, 0.1, 0.5, 0.9, 0.975] and many.centre == 2
    assert loss_of("quantile", levels=[0.2, 0.8]).levels == [0.2, 0.8]


@pytest.mark.parametrize("spec,says", [
    ("mea", "Did you mean"), (("huber", {"delta": 0}), "delta > 0"), (("quantile", {"levels": []}), "between 0 and 1"),
    (("quantile", {"levels": [0, 0.5]}), "between 0 and 1"),
    (("quantile", {"levels": [0.1, 0.9], "weights": [1]}), "weight of at least 0 for each"),
    (("quantile", {"levels": [0.1, 0.9], "weights": [0, 0]}), "not all 0"),
    (("mase", {"season_length": 0}), "season_length=0"), (("mase", {"season_length": 1.5}), "season_length=1.5"),
    (("weighted", {}), "needs weights"),
    (("weighted", {"weights": []}), "at least 0"), (("weighted", {"weights": [1, float("nan")]}), "at least 0"),
    (("weighted", {"base": "nope", "weights": [1]}), "nope"),
    (("seasonal", {"season_length": 3, "weights": [1, 2]}), "3 phases"), (("scaled", {"by": "size"}), "scaler='size'"),
    (("scaled", {"base": "student_t"}), "likelihood"),
    (("nll", {"distribution": "poisson"}), "no distribution"), (("mae", {"season_length": 12}), "no option"),
    ("cross_entropy", "no loss of forecasts"),
    (nn.CrossEntropyLoss(), "other things than forecasts"), (("mae", 3), "not understood"), ({"a": "mae"}, "sum compares")])
def test_a_spec_that_cannot_be_meant_is_refused(spec, says):
    with pytest.raises((ValueError, TypeError), match=says): loss_of(spec)


def test_context_goes_where_it_belongs():
    for name in LOSSES:
        options = {"weights": [1.0] * 12} if name in ("weighted", "seasonal") else {}
        found = loss_of((name, options), season_length=12, horizon=12, levels=[0.1, 0.5, 0.9])
        assert isinstance(found, ForecastLoss) and losses()[name]
        assert found.outputs == len(found.locations) or found.name in LIKELIHOODS
    assert loss_of(found) is found


def test_the_first_batch_is_looked_at():
    for name, change, says in [("mae", {"values": torch.zeros(11, H, 2)}, "1 output"),
                               ("quantile", {"values": torch.zeros(11, H)}, "3 outputs"),
                               ("mae", {"scale": torch.zeros(11, 1)}, "above 0"), ("mae", {"loc": torch.zeros(11)}, "one a window"),
                               ("mase", {"past": None}, "past"),
                               ("scaled", {"past": None}, "past"), ("negative_binomial", {"loc": torch.ones(11, 1)}, 'scaler="mean"')]:
        loss = loss_of(name)
        output, target = batch(loss)
        with pytest.raises((ValueError, TypeError), match=says): loss.check(output._replace(**change), target)
    output, target = batch(loss_of("mae"))
    for change, says in [(lambda y: y[:, :3], "shape"), (lambda y: y / 0, "NaN or infinite"), (lambda y: y.tolist(), "give a tensor")]:
        with pytest.raises((ValueError, TypeError), match=says): loss_of("mae").check(output, change(target))
    for weight, says in [(torch.ones(10), "one weight a row"), (-torch.ones(11), "at least 0"), (torch.zeros(11, H), "not all 0")]:
        with pytest.raises(ValueError, match=says): loss_of("mae").check(output, target, weight)
    counts, whole = batch(loss_of("negative_binomial"))
    with pytest.raises(ValueError, match="44 of 44 targets are not, such as"): loss_of("negative_binomial").check(counts, whole + 0.5)
    with pytest.raises(ValueError, match="all are"): loss_of("mape").check(output, target * 0)
    with pytest.warns(UserWarning, match="2 of the first 44"): loss_of("mape").check(output, target * (torch.arange(44).reshape(11, H) > 1))
    with pytest.warns(UserWarning, match="1 of 11 windows"):
        loss_of("mase").check(output._replace(past=output.past * (torch.arange(11) > 0)[:, None]), target)
    with pytest.raises(ValueError, match="4 steps ahead"): loss_of(("weighted", {"weights": [1, 2]})).check(output, target)
    with pytest.raises(ValueError, match="weighs rows"): loss_of(SPECS["seasonal"]).check(output, target)
    with pytest.raises(ValueError, match="one loss a cell"): loss_of(lambda f, y: torch.zeros(3)).check(output, target)
    with pytest.raises(ValueError, match="weights cannot reach"): loss_of(nn.SmoothL1Loss()).check(output, target, torch.ones(11))


class Net(nn.Module):
    "A linear map of the scaled window"
    def __init__(self, loss):
        super().__init__()
        self.outputs, self.kind = loss.outputs, "mean" if loss.scaler else "standard"
        self.inner, self.noise = nn.Linear(L, H * loss.outputs), nn.Dropout(0.1)

    def forward(self, y):
        loc, scale = measure(y, self.kind)
        return Output(self.inner(self.noise((y - loc) / scale)).unflatten(1, (H, self.outputs)), loc, scale, y)


def windows(n=107):
    "Windows of counts with a season"
    g, t = torch.Generator().manual_seed(0), torch.arange(n + L + H)
    y = (30 + 10 * torch.sin(t * math.pi / 6) + 5 * torch.rand(len(t), generator=g)).round()
    cut = y.unfold(0, L + H, 1)[:n]
    return cut[:, :L], cut[:, L:]


def trainer(name, run=False, **more):
    loss = loss_of(SPECS[name])
    x, y = windows()
    data = (x, y, torch.rand(len(y), H, generator=torch.Generator().manual_seed(1)) + 0.1) if name in ROWS else (x, y)
    torch.manual_seed(0)
    t = Trainer(Net(loss), data, data, loss=loss, metrics=["mae"], weighted=name in ROWS, batch_size=16, lr=0.01, run=run, board=False,
                **more)
    return t, loss, data


@pytest.mark.parametrize("name", SPECS)
def test_in_the_trainer_the_validation_loss_is_the_mean_over_all_windows(name):
    t, loss, data = trainer(name)
    before = t.evaluate(data)["loss"]
    history = t.fit(epochs=3).epochs()
    output = t.predict(data[0])
    whole = float(loss(output, *data[1:]))
    assert history.valid_loss.iloc[-1] == pytest.approx(whole, rel=1e-5, abs=1e-6) and whole < before
    assert history.valid_mae.iloc[-1] == pytest.approx(float((loss.point(output) - data[1]).abs().mean()), rel=1e-4)


@pytest.mark.parametrize("name", ["quantile", "student_t", "both", "scaled"])
def test_resumed_is_as_if_it_had_never_stopped(name, tmp_path):
    once = trainer(name, tmp_path / "once")[0].fit(epochs=4).epochs()
    trainer(name, tmp_path / "twice")[0].fit(epochs=2)
    twice = trainer(name, tmp_path / "twice")[0].fit(epochs=4, resume=True).epochs()
    assert once.train_loss.tolist() == twice.train_loss.tolist() and once.valid_loss.tolist() == twice.valid_loss.tolist()


def test_in_several_processes_it_is_the_same_mean():
    one, loss, data = trainer("both")
    two = trainer("both")[0]
    there, here = (t.fit(epochs=1, **how).epochs().valid_loss.tolist() for t, how in ((two, {"processes": 2}), (one, {})))
    assert there == pytest.approx(here, rel=0.02)
    assert float(loss(two.predict(data[0]), *data[1:])) == pytest.approx(two.history.epochs().valid_loss.iloc[-1], rel=1e-5)


def test_phases_and_weights_of_rows():
    dates = pd.date_range("1999-11-01", periods=30, freq="MS")
    panel = Panel.read(pd.DataFrame({"unique_id": ["a"] * 30 + ["b"] * 20, "ds": [*dates, *dates[5:25]], "y": np.arange(50.0)}))
    assert phases(panel.ordinals, panel.clock, 12).tolist() == [d.month - 1 for d in [*dates, *dates[5:25]]]
    counted = Panel.read(pd.DataFrame({"unique_id": "a", "ds": range(5, 25), "y": 1.0}))
    assert phases(counted.ordinals, counted.clock, 7).tolist() == [k % 7 for k in range(5, 25)]
    seasonal, late = loss_of(("seasonal", {"season_length": 12, "weights": range(12)})), lambda ds, y: (ds >= "2001-01-01") * 2.0
    assert np.allclose(seasonal.row_weights(panel), phases(panel.ordinals, panel.clock, 12) / 5.5)
    both = loss_of(("weighted", {"base": ("seasonal", {"season_length": 12, "weights": range(12)}), "by": late}))
    assert np.allclose(both.row_weights(panel), seasonal.row_weights(panel) * time_weights(panel.times, panel.y, late))
    assert loss_of("mae").row_weights(panel) is None and loss_of(SPECS["weighted"]).row_weights(panel) is None
    for fn, says in [(lambda ds, y: 1.0, "called once"), (lambda ds, y: -y, "at least 0"), (lambda ds, y: y * np.nan, "at least 0"),
                     (lambda ds, y: y * 0, "nothing counts")]:
        with pytest.raises(ValueError, match=says): time_weights(panel.times, panel.y, fn)


def forecasts(seed=0, series=5, h=6):
    "A frame with two models, one with intervals and quantiles, and its history"
    rng = np.random.default_rng(seed)
    ids, steps = np.repeat([f"s{k}" for k in range(series)], h), np.tile(np.arange(20, 20 + h), series)
    y = rng.normal(100, 20, series * h)
    frame = pd.DataFrame({"unique_id": ids, "ds": steps, "y": y, "A": y + rng.normal(3, 5, len(y)), "B": y + rng.normal(0, 9, len(y))})
    frame["A-lo-80"], frame["A-hi-80"], frame["A-q-0.3"] = frame.A - 8, frame.A + 6, frame.A - 2
    train = pd.DataFrame({"unique_id": np.repeat([f"s{k}" for k in range(series)], 20), "ds": np.tile(np.arange(20), series),
                          "y": rng.normal(100, 20, series * 20)})
    return frame, train


@pytest.mark.filterwarnings("ignore:.*torchmetrics.*")
def test_scores_are_those_of_other_programs():
    import sklearn.metrics as sk
    from torchmetrics.functional import symmetric_mean_absolute_percentage_error as smape
    frame, train = forecasts()
    table = score(frame, train, metrics=["mae", "mse", "rmse", "mape", "smape", "bias", "pinball", "coverage", "interval"])
    for name in "AB":
        y, f, row = frame.y.to_numpy(), frame[name].to_numpy(), table.loc[name]
        assert row.mae == pytest.approx(sk.mean_absolute_error(y, f)) and row.mse == pytest.approx(sk.mean_squared_error(y, f))
        assert row.rmse == pytest.approx(sk.root_mean_squared_error(y, f))
        assert row.mape == pytest.approx(100 * sk.mean_absolute_percentage_error(y, f))
        assert row.smape == pytest.approx(100 * float(smape(torch.tensor(f), torch.tensor(y))))
        assert row.bias == pytest.approx((f - y).mean())
    ends = {"A-lo-80": 0.1, "A-q-0.3": 0.3, "A": 0.5, "A-hi-80": 0.9}
    costs = [sk.mean_pinball_loss(frame.y, frame[column], alpha=level) for column, level in ends.items()]
    assert table.pinball["A"] == pytest.approx(np.mean(costs)) and np.isnan(table.pinball["B"])
    assert table["coverage-80"]["A"] == pytest.approx(((frame.y >= frame["A-lo-80"]) & (frame.y <= frame["A-hi-80"])).mean())
    y, lo, hi = frame.y, frame["A-lo-80"], frame["A-hi-80"]
    assert table["interval-80"]["A"] == pytest.approx((hi - lo + 10 * np.maximum(lo - y, 0) + 10 * np.maximum(y - hi, 0)).mean())


def test_scaled_scores_by_series_and_together():
    frame, train = forecasts()
    by, all_ = score(frame, train, season_length=3, by="unique_id"), score(frame, train, season_length=3)
    for name in frame.unique_id.unique():
        past, rows = train[train.unique_id == name].y.to_numpy(), frame[frame.unique_id == name]
        e, d = (rows.A - rows.y).to_numpy(), past[3:] - past[:-3]
        assert by.mase[name, "A"] == pytest.approx(np.abs(e).mean() / np.abs(d).mean())
        assert by.rmsse[name, "A"] == pytest.approx(np.sqrt((e**2).mean() / (d**2).mean()))
    for metric in ("mae", "mase", "rmsse", "smape", "crps"):
        assert all_[metric]["A"] == pytest.approx(by[metric].xs("A", level="model").mean())
    mixed = score(frame.sample(frac=1, random_state=0), train.sample(frac=1, random_state=0), season_length=3, by="unique_id")
    pd.testing.assert_frame_equal(mixed, by)
    two = score(frame.assign(step=frame.ds - 19), by=["step", "unique_id"], metrics="mae")
    assert two.index.names == ["step", "unique_id", "model"] and len(two) == 6 * 5 * 2
    assert score(frame.rename(columns={"unique_id": "shop", "y": "sold"}), id="shop", target="sold", models=["B"]).index.tolist() == ["B"]


def test_scores_of_many_series_fit_into_memory():
    frame = pd.DataFrame({"unique_id": np.arange(50_000), "ds": 1, "y": 1.0, "A": np.arange(50_000) % 3})
    train = pd.concat([frame.assign(ds=-1, y=0.0), frame.assign(ds=0, y=2.0)])
    table = score(frame, train, by="unique_id")
    assert len(table) == 50_000 and table.rmsse.iloc[:4].tolist() == [0.5, 0.0, 0.5, 0.5] == table.mase.iloc[:4].tolist()


def test_scores_refuse_what_they_cannot_score():
    frame, train = forecasts()
    for call, says in [(lambda: score(frame.drop(columns="y")), "no column is called 'y'"),
                       (lambda: score(frame.assign(A=frame.A.where(frame.index > 3))), "4 of 30 rows"),
                       (lambda: score(frame, metrics="rmsse"), "train="), (lambda: score(frame, train[train.unique_id != "s1"]), "'s1'"),
                       (lambda: score(frame, models=["C"]), "Known"),
                       (lambda: score(frame[["unique_id", "ds", "y"]]), "no column holds forecasts"),
                       (lambda: score(frame, metrics=["crsp"]), "crps"),
                       (lambda: score(frame.drop(columns="A-lo-80")), "one end only"),
                       (lambda: score(frame[["unique_id", "ds", "y", "B"]], metrics="crps"), "needs quantiles"),
                       (lambda: score(frame, train, season_length=0), "season_length=0")]:
        with pytest.raises(ValueError, match=says): call()
    with pytest.warns(UserWarning, match="1 of 5 series, such as 's1'"):
        short = score(frame, train[(train.unique_id != "s1") | (train.ds < 3)], season_length=3, by="unique_id", metrics="mase")
    assert short.mase.isna().sum() == 2
    with pytest.warns(UserWarning, match="6 of 30 rows"):
        assert score(frame.assign(y=frame.y.where(frame.unique_id != "s0", 0.0)), metrics="mape").mape.notna().all()


def test_crps_in_a_sort_is_crps_of_all_pairs():
    rng = np.random.default_rng(0)
    y, draws = rng.normal(size=(4, 3)), rng.standard_t(3, size=(31, 4, 3))
    for fair, n in ((True, 31 * 30), (False, 31 * 31)):
        slow = np.abs(draws - y).mean(0) - np.abs(draws[:, None] - draws[None]).sum((0, 1)) / n / 2
        assert np.allclose(crps_samples(y, draws, fair), slow)
    exact = stats.norm.pdf(0) * 2 - 1 / math.sqrt(math.pi) # of a standard normal at 0
    few = np.mean([crps_samples(np.zeros(1), rng.normal(size=(3, 1)))[0] for _ in range(40000)])
    assert few == pytest.approx(exact, abs=0.01) # fair: right on average with three samples
    levels = np.arange(1, 200) / 200
    assert crps_quantiles(np.zeros(1), stats.norm.ppf(levels)[None], levels)[0] == pytest.approx(exact, rel=0.01)
    assert crps_quantiles(np.array([3.0]), np.array([[1.0]]), [0.5])[0] == 2 # without spread: the absolute error
    for call in (lambda: crps_samples(y, draws[:1]), lambda: crps_quantiles(y[0], draws[:3, 0], [0.5, 0.1, 0.9]),
                 lambda: pinball(y, y, 1.0), lambda: interval_score(y, y, y, 0)):
        with pytest.raises(ValueError): call()
    assert coverage(np.array([1.0, 3.0]), np.array([1.0, 1.0]), np.array([2.0, 2.0])).tolist() == [1, 0]


def naive_windows(n_windows, seed=0, h=12):
    "Errors of last year's value on 200 synthetic series with known noise: (windows + 1, series, h), and the sizes of the series"
    frame = synthetic(series=200, steps=60 + 12 * (n_windows + 1), seed=seed, noise=0.1)
    y = frame.sort_values(["unique_id", "ds"]).y.to_numpy().reshape(200, -1)
    e = y[:, 12:] - y[:, :-12]
    cut = [e[:, 48 + 12 * w:48 + 12 * w + h] for w in range(n_windows + 1)]
    return np.stack(cut), y[:, :60].std(1)


@pytest.mark.parametrize("pool,count,method", [("all", 3, "split"), ("series", 19, "split"), ("auto", 19, "cross"), ("auto", 5, "cross")])
def test_coverage_on_200_series_is_within_3_points(pool, count, method, record_property):
    inside = {80: [], 95: []}
    for seed in range(3):
        errors, size = naive_windows(count, seed)
        bands = Conformal(method, pool=pool).calibrate(errors[:-1], scale=size).intervals(np.zeros((200, 12)), scale=size)
        for level, (low, high) in bands.items(): inside[level].append(((errors[-1] >= low) & (errors[-1] <= high)).mean())
    print({level: np.round(shares, 3).tolist() for level, shares in inside.items()})
    for level, shares in inside.items(): assert max(abs(np.array(shares) - level / 100)) < 0.03


def test_the_rank_is_exact_for_few_errors():
    rng = np.random.default_rng(0)
    for n, level in [(4, 80), (5, 80), (19, 95), (20, 95), (39, 97.5), (9, 50)]:
        e = np.abs(rng.exponential(size=(200000 // n, n + 1)))
        held = (e[:, -1] <= np.sort(e[:, :-1], 1)[:, rank(n, level) - 1]).mean()
        assert held == pytest.approx(rank(n, level) / (n + 1), abs=0.012) and rank(n, level) / (n + 1) >= level / 100 - 1e-12
        assert rank(needed(level), level) <= needed(level) and rank(needed(level) - 1, level) > needed(level) - 1


def test_cv_plus_holds_what_it_promises():
    "Jackknife+ of a mean: leave-one-out errors and forecasts, 1 - 2 alpha at least and about 1 - alpha (Barber et al. 2021)"
    rng = np.random.default_rng(0)
    y = rng.normal(size=(2000, 20))
    left = (y[:, :19].sum(1, keepdims=True) - y[:, :19]) / 18 # without each of the nineteen
    errors, models = (y[:, :19] - left).T[:, :, None], left.T[:, :, None]
    bands = Conformal("cross", pool="series").calibrate(errors).intervals(np.zeros((2000, 1)), models=models)
    for level, (low, high) in bands.items():
        held = ((y[:, 19:] >= low) & (y[:, 19:] <= high)).mean()
        assert held == pytest.approx(level / 100, abs=0.03)


def test_conformal_goes_into_a_file_and_refuses_what_does_not_fit(tmp_path):
    errors, size = naive_windows(5)
    made = Conformal(pool="all", levels=(50, 80)).calibrate(errors[:-1], scale=size)
    torch.save(made.to_dict(), tmp_path / "c.pt")
    again = Conformal.from_dict(torch.load(tmp_path / "c.pt", weights_only=True))
    for level, ends in made.intervals(np.ones((200, 12)), scale=size).items():
        assert np.array_equal(ends, again.intervals(np.ones((200, 12)), scale=size)[level])
    one = Conformal(pool="series", levels=(80,)).calibrate(errors[:-1])
    assert np.array_equal(one.intervals(np.zeros((2, 12)), series=[3, 7])[80][1], one.intervals(np.zeros((200, 12)))[80][1][[3, 7]])
    assert Conformal().windows_for(1) == 19 and Conformal().windows_for(7) == 3 and Conformal(pool="series").windows_for(7) == 19
    assert Conformal(windows=8).windows_for(7) == 8
    for call, says in [(lambda: Conformal("jackknife"), "split"), (lambda: Conformal(pool="step"), "pool"),
                       (lambda: Conformal(levels=()), "levels"), (lambda: Conformal(windows=0), "windows=0"),
                       (lambda: Conformal().intervals(np.zeros((1, 1))), "calibrate"),
                       (lambda: Conformal().calibrate(np.zeros((18, 4))), "needs 19 errors"),
                       (lambda: Conformal().calibrate(np.zeros((0, 2, 3))), "shape"),
                       (lambda: Conformal().calibrate(errors, scale=size[:3]), "one a series"),
                       (lambda: Conformal().calibrate(errors, scale=size * 0), "above 0"),
                       (lambda: made.intervals(np.zeros((200, 12))), "those of these series"),
                       (lambda: made.intervals(np.zeros((200, 5)), scale=size), "steps ahead"),
                       (lambda: one.intervals(np.zeros((3, 12))), "series="),
                       (lambda: made.intervals(np.zeros((200, 12)), levels=[101], scale=size), "between 0 and 100"),
                       (lambda: one.intervals(np.zeros((200, 12)), levels=[95]), "give 19 windows")]:
        with pytest.raises(ValueError, match=says): call()


def test_errors_come_out_of_a_backtest_in_order():
    rows = [{"unique_id": s, "ds": c + k, "cutoff": c, "y": 100.0 * (s == "b") + c + k, "m": 0.0}
            for s in "ab" for c in (7, 1, 4) for k in (1, 2, 3)]
    errors, names = errors_of(pd.DataFrame(rows).sample(frac=1, random_state=0), "m")
    assert errors.shape == (3, 2, 3) and names.tolist() == ["a", "b"] and errors[:, 0].tolist() == [[2, 3, 4], [5, 6, 7], [8, 9, 10]]
    assert (errors[:, 1] == errors[:, 0] + 100).all()
    with pytest.raises(ValueError, match="uneven"): errors_of(pd.DataFrame(rows[1:]), "m")
    with pytest.raises(ValueError, match="cutoff"): errors_of(pd.DataFrame(rows).drop(columns="cutoff"), "m")
