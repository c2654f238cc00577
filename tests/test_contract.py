"""The Trainer's contract, line by line, as somebody outside would check it: data, losses, steps, schedules, histories, results."""
import json
import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from small import On, classes, files, net, numbers, saved, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from arc_nb import Callback, Trainer
from arc_nb.engine.callbacks import EMA, SWA, EarlyStopping
from arc_nb.engine.history import History, Status
from arc_nb.engine.metrics import known_metrics
from arc_nb.engine.objectives import losses
from arc_nb.engine.optimizers import optimizers
from arc_nb.engine.rates import schedules
from arc_nb.runs import Run


class Rows(Dataset):
    "Items one by one; each may draw random numbers."
    def __init__(self, rows=60, noise=0.0): (self.x, self.y), self.noise = classes(rows), noise
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return self.x[i] + self.noise * torch.randn(4), self.y[i]


class Stream(IterableDataset):
    def __iter__(self): yield from zip(*classes())


class Endless:
    "Batches for ever, from the beginning each time."
    def __iter__(self):
        x, y = classes(16)
        while True: yield x, y


class Named(nn.Module):
    "Takes its inputs by name."
    def __init__(self): super().__init__(); self.inner = net()
    def forward(self, left, right): return self.inner(torch.cat([left, right], 1))


X, Y = classes()
BATCHES = [(X[i:i + 16], Y[i:i + 16]) for i in range(0, 60, 16)]

# --- Data in ---------------------------------------------------------------------------------------------------------

FORMS = {
    "tensors": lambda: (X, Y), "arrays": lambda: (X.numpy(), Y.numpy()), "float64": lambda: (X.double().numpy(), Y.numpy()),
    "frames": lambda: (pd.DataFrame(X.numpy(), columns=list("abcd")), pd.Series(Y.numpy(), name="label")),
    "column": lambda: (X, Y[:, None]), "int32": lambda: (X, Y.int()), "read-only": lambda: (np.broadcast_to(X.numpy(), X.shape), Y),
    "TensorDataset": lambda: TensorDataset(X, Y), "Dataset": Rows, "IterableDataset": Stream,
    "DataLoader": lambda: DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True),
    "batches": lambda: list(BATCHES), "lists": lambda: [list(b) for b in BATCHES],
    "array batches": lambda: [(x.double().numpy(), y.numpy()) for x, y in BATCHES], "generator": lambda: (b for b in BATCHES)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_trains_for_one_pass(form):
    t = trainer(data=FORMS[form](), valid=classes(30, 1), metrics=["accuracy"])
    t.fit(epochs=1)
    assert t.step == 4 and t.status.state == "completed"
    assert {"train_loss", "valid_loss", "valid_accuracy"} <= set(t.history.epochs())


@pytest.mark.parametrize("form", [f for f in FORMS if f != "generator"])
def test_every_form_of_data_can_be_validated_evaluated_and_predicted(form):
    t = trainer(valid=FORMS[form](), metrics=["accuracy"])
    t.fit(epochs=2)
    scores, direct = t.evaluate(FORMS[form]()), t.evaluate((X, Y))
    assert scores == pytest.approx(direct, rel=1e-5) and set(scores) == {"loss", "accuracy"}
    assert t.history.epochs().valid_loss.iloc[-1] == pytest.approx(scores["loss"], rel=1e-5)
    if form != "DataLoader": torch.testing.assert_close(t.predict(FORMS[form]()), t.predict(X), rtol=1e-5, atol=1e-6)


def test_dict_data_go_to_the_model_by_name():
    data = {"left": X[:, :2], "right": X[:, 2:].double().numpy(), "label": Y}
    t = trainer(Named(), data, valid=0.25, target="label", metrics=["accuracy"])
    t.fit(epochs=2)
    assert t.setup.train.rows == 45
    p = t.predict({"left": X[:, :2], "right": X[:, 2:]})
    torch.testing.assert_close(p, t.predict(data))
    assert t.evaluate(data)["accuracy"] == pytest.approx((p.argmax(1) == Y).float().mean().item())
    t = trainer(Named(), [{"left": x[:, :2], "right": x[:, 2:], "y": y} for x, y in BATCHES])
    assert t.fit(epochs=1).latest("train_loss") > 0


@pytest.mark.parametrize("nested", [True, False])
def test_several_inputs(nested):
    parts = (X[:, :2], X[:, 2:])
    data = (parts, Y) if nested else (*parts, Y)
    t = trainer(Named(), data, valid=0.2)
    t.fit(epochs=1)
    torch.testing.assert_close(t.predict(parts), t.predict(data))
    loader = [((x[:, :2], x[:, 2:]), y) if nested else (x[:, :2], x[:, 2:], y) for x, y in BATCHES]
    t = trainer(Named(), loader)
    t.fit(epochs=1)
    torch.testing.assert_close(t.predict(loader), t.predict(parts))


def test_weights_per_sample_count_like_rows():
    w = torch.tensor([1.0, 0.0, 2.0] * 20)
    heavy = (torch.cat([X[w == 1], X[w == 2], X[w == 2]]), torch.cat([Y[w == 1], Y[w == 2], Y[w == 2]]))
    a, b = trainer(data=(X, Y, w), weighted=True, batch_size=60), trainer(data=heavy, batch_size=60)
    a.fit(epochs=3); b.fit(epochs=3)
    torch.testing.assert_close(weights(a.model), weights(b.model), rtol=1e-4, atol=1e-5)
    assert a.evaluate((X, Y, w))["loss"] == pytest.approx(b.evaluate(heavy)["loss"], rel=1e-4)
    torch.testing.assert_close(a.predict((X, Y, w)), a.predict(X))
    t = trainer(data=DataLoader(TensorDataset(X, Y, w), 16), weighted=True)
    t.fit(epochs=1)
    torch.testing.assert_close(t.predict(DataLoader(TensorDataset(X, Y, w), 16)), t.predict(X))


def test_endless_data_need_steps():
    t = trainer(data=Endless())
    assert len(t.fit(steps=7).series("train", "loss")[0]) == 7
    t.fit(steps=3)
    assert t.step == 10
    with pytest.raises(ValueError, match="how far"): t.fit()


def test_an_endless_generator_goes_on_in_a_second_fit():
    t = trainer(data=iter(Endless()))
    t.fit(steps=4); t.fit(steps=3)
    assert t.step == 7


def test_a_generator_read_to_its_end_says_so_and_predict_still_works():
    t = trainer(data=(b for b in BATCHES))
    t.fit(epochs=1)
    assert t.predict(X).shape == (60, 3)
    with pytest.raises(ValueError, match="generator.*read to its end"): t.fit(epochs=1)


def test_valid_as_a_share_is_held_out_and_keyed_by_the_seed():
    for data in ((X, Y), TensorDataset(X, Y), Rows()):
        t = trainer(data=data, valid=0.2, batch_size=60)
        held, kept = next(iter(t.setup.valid.epoch())).inputs[0], next(iter(t.setup.train.epoch())).inputs[0]
        assert len(held) == 12 and len(kept) == 48
        assert not (set(map(tuple, held.tolist())) & set(map(tuple, kept.tolist())))
    same = [next(iter(trainer(valid=0.2, seed=s).setup.valid.epoch())).inputs[0] for s in (1, 1, 2)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_valid_may_be_missing():
    t = trainer()
    t.fit(epochs=2)
    assert not [c for c in t.history.epochs() if c.startswith("valid")]


def test_the_last_short_batch_and_drop_last():
    def sizes(**settings):
        seen = []
        def step(model, batch): seen.append(len(batch[0])); return nn.functional.cross_entropy(model(batch[0]), batch[1])
        trainer(step=step, **settings).fit(epochs=1)
        return seen
    assert sizes() == [16, 16, 16, 12] and sizes(drop_last=True) == [16, 16, 16]


def test_the_order_depends_on_seed_and_epoch_and_nothing_else():
    def orders(seed, before):
        torch.manual_seed(before)
        t = trainer(seed=seed)
        return [torch.cat([b.inputs[0] for b in t.setup.train.epoch(n)]) for n in (1, 2)]
    a, b, c = orders(0, 1), orders(0, 2), orders(1, 1)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], a[1]) and not torch.equal(a[0], c[0])


@pytest.mark.parametrize("loss", ["mse", "l1", "huber", "gaussian"])
def test_targets_of_both_shapes_match(loss):
    spec = nn.MSELoss() if loss == "gaussian" else loss
    x, y = numbers()
    got = []
    for target in (y, y[:, 0], y.double(), y[:, 0].double().numpy()):
        t = trainer(net(1), (x, target), loss=spec, valid=(x, target), metrics=["mae"])
        t.fit(epochs=2)
        got.append((weights(t.model), t.evaluate((x, target))["mae"]))
    for w, mae in got[1:]:
        torch.testing.assert_close(w, got[0][0]); assert mae == pytest.approx(got[0][1])


# --- Names -----------------------------------------------------------------------------------------------------------

class Two(nn.Module):
    "A positive and a free column."
    def __init__(self): super().__init__(); self.inner = net(2)
    def forward(self, x): out = self.inner(x); return out[:, :1], nn.functional.softplus(out[:, 1:]) + 1e-3


def case(loss):
    "Model and data that a loss fits."
    x, y = numbers()
    binary = (y > 0).float()
    if loss in ("cross_entropy", "nll"): return (net() if loss == "cross_entropy" else nn.Sequential(net(), nn.LogSoftmax(1))), (X, Y)
    if loss == "bce": return nn.Sequential(net(1), nn.Sigmoid()), (x, binary)
    if loss == "bce_with_logits": return net(1), (x, binary)
    if loss == "poisson_nll": return net(1), (x, y.abs().round())
    if loss == "gaussian_nll": return Two(), (x, y)
    if loss == "student_t_nll": return nn.Sequential(net(3), nn.Softplus()), (x, y)
    if loss == "negative_binomial_nll": return nn.Sequential(net(2), nn.Softplus()), (x, y.abs().round())
    if loss == "quantile": return net(3), (x, y)
    return net(1), (x, y)


@pytest.mark.parametrize("loss", losses())
def test_every_loss_by_name_learns(loss):
    model, data = case(loss)
    spec = ("quantile", {"levels": [0.1, 0.5, 0.9]}) if loss == "quantile" else loss
    t = trainer(model, data, loss=spec, valid=0.2)
    before = t.evaluate(data)["loss"]
    t.fit(epochs=5)
    assert t.evaluate(data)["loss"] < before and t.predict(data[0]) is not None


METRIC_CASES = {"ndcg": None, "map": None, "bleu": None, "rouge": None, "perplexity": "tokens"}


@pytest.mark.parametrize("metric", [m for m in known_metrics() if METRIC_CASES.get(m, m)])
def test_every_metric_by_name_is_measured(metric):
    if metric == "perplexity":
        tokens = torch.randint(0, 5, (40, 6), generator=torch.Generator().manual_seed(0))
        model, data, loss = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 5)), (tokens, tokens), "cross_entropy"
    elif metric in ("mae", "mse", "rmse", "r2", "mape", "smape"): (model, data), loss = case("mse"), "mse"
    else: (model, data), loss = case("cross_entropy"), "cross_entropy"
    t = trainer(model, data, loss=loss, valid=0.5, metrics=[metric], train_metrics=[metric])
    t.fit(epochs=1)
    if metric == "confusion_matrix":  # a table has no place in the history
        assert sum(map(sum, t.evaluate(data)[metric])) == 60
        return
    columns = [c for c in t.history.epochs() if c.startswith(f"valid_{metric}")]
    assert columns and all(math.isfinite(v) for v in t.history.epochs()[columns].iloc[0])
    assert any(name.startswith(metric) for name in t.evaluate(data))


@pytest.mark.parametrize("name", [*optimizers(), "Adamax", torch.optim.RAdam, ("sgd", {"momentum": 0.9, "nesterov": True})])
def test_every_optimizer_trains(name):
    t = trainer(optimizer=name, batch_size=60)
    before = t.evaluate(classes())["loss"]
    t.fit(epochs=3)
    assert t.evaluate(classes())["loss"] < before


@pytest.mark.parametrize("name", [*schedules(), "StepLR", "OneCycleLR", "ReduceLROnPlateau",
                                  lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)])
def test_every_schedule_trains(name):
    spec = {"StepLR": ("StepLR", {"step_size": 1}), "OneCycleLR": ("OneCycleLR", {"max_lr": 0.1, "total_steps": 12})}.get(name, name) \
        if isinstance(name, str) else name
    t = trainer(schedule=spec, valid=0.2)
    history = t.fit(epochs=4)
    assert history.epochs().lr.notna().all() and (history.epochs().lr > 0).all()


def test_a_schedule_moves_the_rate_that_the_optimizer_uses():
    rates = []
    trainer(schedule="cosine", callbacks=[On(on_step_end=lambda t: rates.append(t.lr))]).fit(epochs=2)
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)])
    t = trainer(schedule=("step", {"every": 1, "factor": 0.1}))
    assert t.fit(epochs=3).epochs().lr.tolist() == pytest.approx([1e-2, 1e-3, 1e-4])


def test_plateau_lowers_the_rate_when_validation_stands_still():
    t = trainer(net(), lr=1e-12, valid=0.5, schedule=("plateau", {"patience": 1, "factor": 0.5, "cooldown": 1, "min_lr": 3e-13}))
    assert t.fit(epochs=9).epochs().lr.tolist() == sorted(t.history.epochs().lr, reverse=True)
    assert t.lr == pytest.approx(3e-13)


# --- A loss of one's own ----------------------------------------------------------------------------------------------

def test_step_replaces_loss_and_batches_and_logs_what_it_returns():
    def step(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        return {"loss": loss, "double": 2 * loss}
    a, b = trainer(step=step, valid=0.2), trainer(valid=0.2)
    a.fit(epochs=3); b.fit(epochs=3)
    assert torch.equal(weights(a.model), weights(b.model))
    assert a.history.series("train", "double")[1] == pytest.approx(2 * a.history.series("train", "loss")[1])
    assert a.evaluate(classes())["loss"] == pytest.approx(b.evaluate(classes())["loss"])


def test_step_with_data_without_targets():
    t = trainer(nn.Linear(4, 4), X, step=lambda model, batch: (model(batch[0]) - batch[0]).square().mean(), valid=X)
    t.fit(epochs=3)
    assert t.history.epochs().valid_loss.is_monotonic_decreasing and t.predict(X).shape == (60, 4)


def test_a_callable_and_a_module_are_losses():
    def own(output, target): return nn.functional.cross_entropy(output, target)
    models = [trainer(loss=loss) for loss in (own, nn.CrossEntropyLoss(), nn.CrossEntropyLoss, "cross_entropy")]
    for t in models: t.fit(epochs=2)
    for t in models[1:]: torch.testing.assert_close(weights(t.model), weights(models[0].model))


def test_several_losses_for_several_outputs():
    class Both(nn.Module):
        def __init__(self): super().__init__(); self.a, self.b = net(3), net(1)
        def forward(self, x): return {"label": self.a(x), "value": self.b(x)}
    data = {"x": X, "y": {"label": Y, "value": X.sum(1)}}
    t = trainer(Both(), data, loss={"label": "cross_entropy", "value": ("mse", {}, 0.5)}, valid=0.2)
    t.fit(epochs=2)
    p = t.predict(X)
    assert set(p) == {"label", "value"} and p["label"].shape == (60, 3) and p["value"].shape == (60, 1)
    expected = nn.functional.cross_entropy(p["label"], Y) + 0.5 * nn.functional.mse_loss(p["value"][:, 0], X.sum(1))
    assert t.evaluate(data)["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_penalties_shrink_weights():
    free, held = trainer(), trainer(l1=0.01, l2=0.1)
    free.fit(epochs=10); held.fit(epochs=10)
    assert weights(held.model).norm() < weights(free.model).norm()


# --- Steps -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec", ["mse", "cross_entropy", ("cross_entropy", {"weight": [1.0, 5.0, 0.2]}), "weights", "ignored"])
def test_accumulation_equals_the_big_batch(spec):
    settings = {"loss": spec}
    data = numbers(50) if spec == "mse" else classes(50)
    if spec == "weights": settings, data = {"weighted": True}, (*classes(50), torch.linspace(0.1, 3, 50))
    if spec == "ignored": settings = {}; data[1][::3] = -100
    out = 1 if spec == "mse" else 3
    small = trainer(net(out), data, batch_size=7, accumulate=3, shuffle=False, **settings)  # 7+7+7, 7+7+7, 7+1
    big = trainer(net(out), data, batch_size=21, shuffle=False, **settings)
    small.fit(steps=5); big.fit(steps=5)
    assert small.step == big.step == 5 and small.epoch == 2
    torch.testing.assert_close(weights(small.model), weights(big.model), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(small.history.series("train", "loss")[1], big.history.series("train", "loss")[1], rtol=1e-4)
    np.testing.assert_allclose(small.history.series("train", "grad_norm")[1], big.history.series("train", "grad_norm")[1], rtol=1e-3)


def test_the_loss_equals_a_loop_written_by_hand():
    t, model = trainer(shuffle=False), net()
    t.fit(epochs=2)
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(2):
        for x, y in BATCHES:
            loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad(); loss.backward(); optimizer.step(); seen.append(loss.item())
    np.testing.assert_allclose(t.history.series("train", "loss")[1], seen, rtol=1e-5)
    torch.testing.assert_close(weights(t.model), weights(model))
    mean = np.average(seen[4:], weights=[16, 16, 16, 12])
    assert t.history.epochs().train_loss.iloc[1] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipping_by_norm_and_by_value(accumulate):
    def moved(**settings):
        t = trainer(net(1), (numbers()[0], 1000 * numbers()[1]), loss="mse", optimizer="sgd", lr=1.0, accumulate=accumulate, **settings)
        before = weights(t.model)
        t.fit(steps=1)
        return weights(t.model) - before, t.history.series("train", "grad_norm")[1][0]
    step, norm = moved(clip_norm=0.5)
    assert step.norm().item() == pytest.approx(0.5, rel=1e-3) and norm > 100  # the norm is that before clipping
    assert moved(clip_value=0.01)[0].abs().max().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_on_the_cpu_is_close_to_fp32(precision):
    a, b = trainer(precision=precision, valid=0.2, metrics=["accuracy"], clip_norm=1.0), trainer(precision="fp32", valid=0.2, clip_norm=1.0)
    a.fit(epochs=5); b.fit(epochs=5)
    assert a.history.epochs().train_loss.iloc[-1] == pytest.approx(b.history.epochs().train_loss.iloc[-1], rel=0.05)
    assert a.predict(X).dtype == torch.float32 and next(a.model.parameters()).dtype == torch.float32
    assert a.evaluate(classes())["loss"] == pytest.approx(b.evaluate(classes())["loss"], rel=0.05)


def test_fp16_scales_small_gradients_and_passes_over_an_overflow():
    t = trainer(net(1), numbers(), loss=lambda o, y: (o - y).square().mean() * 1e-7, precision="fp16", lr=1e-2)
    t.fit(epochs=3)
    assert (t.history.series("train", "grad_norm")[1] > 0).all()
    t = trainer(net(1), numbers(), loss=lambda o, y: (o - y).square().mean() * 3e4, precision="fp16")
    t.fit(epochs=20)
    assert t.status.state == "completed" and weights(t.model).isfinite().all()
    assert t.setup.compute.precision.scaler.get_scale() < 2**16


def test_limit_batches_log_every_and_steps():
    t = trainer(valid=0.5, accumulate=1, batch_size=2)
    t.fit(epochs=2, limit_batches=5, log_every=4)
    assert t.step == 10 and t.history.series("train", "loss")[0].tolist() == [4, 8]
    assert t.history.series("train", "grad_norm")[0].tolist() == [4, 8] and len(t.history.epochs()) == 2
    t = trainer(batch_size=2, accumulate=4)
    t.fit(epochs=5, limit_batches=5)
    assert t.step == 10  # two steps an epoch: four batches, then one
    t.fit(epochs=5, steps=3)
    assert t.step == 13


def test_max_time():
    from time import monotonic
    t, began = trainer(), monotonic()
    t.fit(max_time=0.6)
    assert 0.5 < monotonic() - began < 2.5 and t.status.state == "stopped" and "time" in t.status.message
    with pytest.raises(ValueError, match="2h"): t.fit(max_time="soon")


def test_detect_anomaly_names_the_operation():
    class Root(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(4, 1))
        def forward(self, x): return (x @ self.w).sqrt() * 0
    t = trainer(Root(), numbers(), loss="mse")
    with pytest.raises(RuntimeError, match="SqrtBackward"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.fit(epochs=1, detect_anomaly=True)
    assert not torch.is_anomaly_enabled()


def test_validation_every_few_steps():
    t = trainer(valid=0.2, valid_every=2)
    t.fit(epochs=2)
    assert t.history.series("valid", "loss")[0].tolist() == [2, 4, 6]


def test_early_stopping_waits_for_a_validation_that_comes_later():
    t = trainer(valid=0.2, valid_every="2 epochs", callbacks=[EarlyStopping(patience=5)])
    t.fit(epochs=4)
    assert t.history.series("valid", "loss")[0].tolist() == [6, 12]


def test_plateau_waits_for_a_validation_that_comes_later():
    t = trainer(valid=0.2, valid_every="2 epochs", schedule=("plateau", {"patience": 0}), lr=1e-12)
    t.fit(epochs=8)
    assert t.history.series("valid", "loss")[0].tolist() == [6, 12, 18, 24]


def test_what_a_step_returns_in_validation_is_not_a_training_value():
    def step(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        return loss if model.training else {"loss": loss, "other": loss}
    t = trainer(step=step, valid=0.2)
    t.fit(epochs=2)
    assert ("train", "other") not in t.history.names()


def test_parameter_groups_have_their_own_rate():
    t = trainer(optimizer="sgd", groups={"0.*": {"lr": 1e-12}}, lr=0.1)
    before = [p.detach().clone() for p in t.model.parameters()]
    t.fit(epochs=1)
    moved = [(p - b).norm().item() for p, b in zip(t.model.parameters(), before)]
    assert max(moved[:2]) < 1e-6 < min(moved[2:])


def test_a_lazy_layer_learns_its_shape_from_the_first_rows():
    t = trainer(nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(3)))
    t.fit(epochs=1)
    assert t.predict(X).shape == (60, 3)


def test_frozen_parameters_stay():
    model = net()
    for p in model[0].parameters(): p.requires_grad = False
    before = model[0].weight.detach().clone()
    trainer(model).fit(epochs=1)
    assert torch.equal(model[0].weight, before)


# --- Seeds -----------------------------------------------------------------------------------------------------------

def shuffling(): return DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True)


@pytest.mark.parametrize("form, settings", [
    (lambda: (X, Y), {}), (shuffling, {}), (lambda: Rows(noise=0.1), {}), (lambda: Rows(noise=0.1), {"workers": 2})],
    ids=["tensors", "DataLoader", "Dataset", "workers"])
def test_one_seed_gives_bit_identical_weights(form, settings):
    def run(seed, before):
        torch.manual_seed(before); np.random.seed(before)
        t = trainer(net(dropout=0.3), form(), seed=seed, valid=classes(20, 2), **settings)
        t.fit(epochs=2)
        t.predict(X); t.summary(); torch.rand(1); t.evaluate(classes())
        t.fit(epochs=1)
        return weights(t.model)
    a = run(0, 1)
    assert torch.equal(a, run(0, 2))
    if settings.get("workers") is None: assert not torch.equal(a, run(1, 1))


def test_the_persons_random_numbers_go_on_as_if_nothing_had_been():
    def numbers_after(train):
        torch.manual_seed(3); np.random.seed(3)
        if train:
            t = trainer(net(dropout=0.5), shuffling(), valid=shuffling())
            t.fit(epochs=1); t.evaluate(shuffling()); t.predict(X); t.summary()
        return torch.rand(3).tolist(), np.random.rand(3).tolist()
    assert numbers_after(True) == numbers_after(False)


# --- Callbacks -------------------------------------------------------------------------------------------------------

def test_the_order_of_events():
    seen = []
    class Notes(Callback):
        pass
    for event in ("on_fit_start", "on_epoch_start", "on_step_start", "on_step_end", "on_valid_start", "on_valid_end", "on_epoch_end",
                  "on_fit_end", "cleanup"):
        setattr(Notes, event, lambda self, t, event=event: seen.append(event))
    trainer(callbacks=[Notes()], valid=0.2, batch_size=24).fit(epochs=2)
    epoch = ["on_epoch_start", *["on_step_start", "on_step_end"] * 2, "on_valid_start", "on_valid_end", "on_epoch_end"]
    assert seen == ["on_fit_start", *epoch, *epoch, "on_fit_end", "cleanup"]


def test_callbacks_are_called_by_order_and_order_prints_it(capsys):
    seen = []
    late, early = On(order=5, on_epoch_end=lambda t: seen.append("late")), On(order=-5, on_epoch_end=lambda t: seen.append("early"))
    t = trainer(callbacks=[late, early, EarlyStopping(patience=3)], valid=0.2)
    t.fit(epochs=1)
    t.order()
    lines = capsys.readouterr().out.splitlines()
    assert seen == ["early", "late"] and [int(line.split()[0]) for line in lines[-3:]] == [-5, 5, 50]
    assert "EarlyStopping" in lines[-1] and "on_valid_end" in lines[-1]


def test_a_callback_may_change_the_rate():
    class Slower(Callback):
        def on_epoch_end(self, trainer): trainer.lr *= 0.5
    t = trainer(callbacks=[Slower()], lr=0.08)
    assert t.fit(epochs=3).epochs().lr.tolist() == pytest.approx([0.08, 0.04, 0.02]) and t.lr == pytest.approx(0.01)


def test_a_rate_set_under_a_schedule_scales_the_rest_of_the_curve():
    rates = []
    def half(t):
        if t.step == 4: t.lr = t.lr / 2
    trainer(schedule="linear", callbacks=[On(on_step_start=half, on_step_end=lambda t: rates.append(t.lr))], lr=0.1).fit(epochs=3)
    plain = []
    trainer(schedule="linear", callbacks=[On(on_step_end=lambda t: plain.append(t.lr))], lr=0.1).fit(epochs=3)
    np.testing.assert_allclose(rates[5:], np.array(plain[5:]) / 2)
    np.testing.assert_allclose(rates[:4], plain[:4])


def test_a_rate_set_between_fits_holds():
    for schedule in (None, "constant"):
        t = trainer(schedule=schedule)
        t.fit(epochs=1)
        t.lr = 0.123
        assert t.fit(epochs=1).epochs().lr.iloc[-1] == pytest.approx(0.123)


def test_a_callback_may_stop():
    t = trainer(callbacks=[On(on_epoch_end=lambda t: t.stop() if t.epoch == 2 else None)])
    t.fit(epochs=9)
    assert t.epoch == 2 and t.status.state == "stopped"
    t = trainer(callbacks=[On(on_step_end=lambda t: t.stop() if t.step == 3 else None)])
    t.fit(epochs=9)
    assert t.step == 3


def test_a_stop_that_came_too_late_does_not_end_the_next_fit():
    t = trainer(callbacks=[On(on_fit_end=lambda t: t.stop())])
    t.fit(epochs=1); t.fit(epochs=2)
    assert t.epoch == 3 and t.status.state == "completed"


def scripted(values):
    "Writes validation values of its own, before the early stopping looks."
    left = iter(values)
    return On(order=99, on_valid_end=lambda t: t.history.log(t.step, t.epoch, "valid", "score", next(left)))


@pytest.mark.parametrize("values, mode, patience, delta, start, last, best", [
    ([3, 2, 1, 2, 2, 0], "min", 2, 0, 1, 5, 3), ([1, 2, 1, 1, 9], "max", 2, 0, 1, 4, 2), ([5, 4.9, 4.8, 4.7], "min", 2, 0.5, 1, 3, 1),
    ([1, 5, 4, 3, 5, 5], "min", 2, 0, 2, 6, 4), ([float("nan")] * 4, "min", 3, 0, 1, 3, 0)])
def test_early_stopping(values, mode, patience, delta, start, last, best):
    kept = {}
    stopping = EarlyStopping("valid_score", patience=patience, mode=mode, min_delta=delta, start_epoch=start)
    t = trainer(valid=0.2, callbacks=[stopping, scripted(values), On(on_epoch_end=lambda t: kept.update({t.epoch: weights(t.model)}))])
    t.fit(epochs=len(values))
    assert t.epoch == last and stopping.best_epoch == best
    assert torch.equal(weights(t.model), kept[best or last])


def test_early_stopping_without_restoring_keeps_the_last_weights_and_can_be_used_again():
    kept = []
    stopping = EarlyStopping("valid_score", patience=1, mode="min", restore_best=False)
    t = trainer(valid=0.2, callbacks=[stopping, scripted([1, 2, 3, 4]), On(on_epoch_end=lambda t: kept.append(weights(t.model)))])
    t.fit(epochs=9)
    assert t.epoch == 2 and torch.equal(weights(t.model), kept[-1])
    t.fit(epochs=9)
    assert t.epoch == 3


def test_early_stopping_on_a_value_that_is_not_there():
    with pytest.raises(ValueError, match="valid="): trainer(callbacks=[EarlyStopping()]).fit(epochs=1)
    with pytest.raises(ValueError, match="valid_f2.*valid_loss"): trainer(valid=0.2, callbacks=[EarlyStopping("valid_f2")]).fit(epochs=1)


def test_ema_is_used_for_validation_and_at_the_end_and_leaves_training_alone():
    raw = []
    note = On(on_epoch_end=lambda t: raw.append(weights(t.model)))
    plain, ema = trainer(valid=0.2), trainer(valid=0.2, callbacks=[EMA(0.9), note])
    plain.fit(epochs=3); ema.fit(epochs=3)
    assert torch.equal(raw[-1], weights(plain.model)) and not torch.equal(weights(ema.model), weights(plain.model))
    average, taken = None, []
    other = trainer(valid=0.2, callbacks=[On(on_step_end=lambda t: taken.append(weights(t.model)))])
    other.fit(epochs=3)
    for count, now in enumerate(taken, 1):
        d = min(0.9, (1 + count) / (10 + count))
        average = now if average is None else d * average + (1 - d) * now
    torch.testing.assert_close(weights(ema.model), average)
    assert ema.evaluate(ema.setup.given["train"])["loss"] != plain.evaluate(plain.setup.given["train"])["loss"]
    ema.fit(epochs=1); plain.fit(epochs=1)
    assert torch.equal(raw[-1], weights(plain.model))


def test_swa_is_the_mean_of_the_last_epochs():
    ends = []
    note = On(on_epoch_end=lambda t: ends.append(weights(t.model)))
    t = trainer(callbacks=[SWA(start=0.5), note])
    t.fit(epochs=6)
    torch.testing.assert_close(weights(t.model), torch.stack(ends[3:]).mean(0))


# --- The history -----------------------------------------------------------------------------------------------------

def test_the_frames_of_the_history():
    t = trainer(valid=0.2, metrics=["accuracy", "f1"], train_metrics=["accuracy"])
    history = t.fit(epochs=2)
    assert history is t.history and isinstance(history, History)
    frame, epochs = history.frame(), history.epochs()
    assert list(frame) == ["step", "epoch", "split", "name", "value"] and frame.step.is_monotonic_increasing
    assert list(epochs)[:3] == ["epoch", "train_loss", "valid_loss"] and list(epochs)[-3:] == ["lr", "seconds", "samples_per_second"]
    assert {"valid_accuracy", "valid_f1", "train_accuracy"} <= set(epochs) and epochs.epoch.tolist() == [1, 2]
    assert {("train", "loss"), ("train", "grad_norm"), ("train", "lr"), ("valid", "loss"), ("valid", "accuracy"), ("epoch", "train_loss"),
            ("epoch", "seconds"), ("epoch", "samples_per_second")} <= set(history.names())
    assert (epochs.seconds > 0).all() and (epochs.samples_per_second > 0).all()


def test_several_fits_make_one_history(tmp_path):
    t = trainer(valid=0.2, run=tmp_path / "r")
    t.fit(epochs=2); t.fit(epochs=1); t.fit(steps=2)
    assert t.history.epochs().epoch.tolist() == [1, 2, 3, 4]
    assert t.history.series("train", "loss")[0].tolist() == list(range(1, 12))
    read = History.read(tmp_path / "r")
    pd.testing.assert_frame_equal(read.epochs(), t.history.epochs())
    assert len(read.frame()) == len(t.history.frame())
    assert {p.name for p in (tmp_path / "r").iterdir()} == {"config.json", "history.jsonl", "status.json", "checkpoints"}
    for checkpoint in (tmp_path / "r/checkpoints").iterdir():
        assert files(checkpoint) == {"model.safetensors", "state.safetensors", "state.json", "metadata.json", "manifest.json"}
    assert Status.read(tmp_path / "r").state == "completed" and Run(tmp_path / "r").history.best("valid", "loss")


def test_two_fits_equal_one_long_one():
    a, b = trainer(), trainer()
    a.fit(epochs=4)
    b.fit(epochs=2); b.fit(epochs=2)
    assert torch.equal(weights(a.model), weights(b.model))


def test_log_adds_a_value():
    t = trainer(callbacks=[On(on_epoch_end=lambda t: t.log("temperature", t.epoch * 10))])
    assert t.fit(epochs=2).series("train", "temperature")[1].tolist() == [10, 20]


# --- What can be done with the model ---------------------------------------------------------------------------------

def test_predict_keeps_order_and_kind():
    t = trainer(valid=0.2, batch_size=7)
    t.fit(epochs=1)
    with torch.no_grad(): expected = t.model.eval()(X)
    t.model.train()
    for data in (X, X.numpy(), pd.DataFrame(X.numpy()), (X,), (X, Y), TensorDataset(X, Y), TensorDataset(X), Rows(),
                 DataLoader(TensorDataset(X, Y), 13), DataLoader(X, 13), BATCHES, [x for x, _ in BATCHES], X.double()):
        p = t.predict(data)
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
        assert p.device.type == "cpu" and p.dtype == torch.float32 and not p.requires_grad
    assert t.model.training
    torch.testing.assert_close(t.predict(X, proba=True), expected.softmax(1))
    with pytest.raises(ValueError, match="proba"): trainer(net(1), numbers(), loss="mse").predict(X, proba=True)


def test_a_model_that_works_in_place_leaves_the_data_alone():
    x, given = X.clone(), X.clone()
    t = trainer(nn.Sequential(nn.ReLU(inplace=True), net()), (x, Y), valid=(x, Y))
    t.fit(epochs=1); t.predict(x); t.evaluate((x, Y))
    assert torch.equal(x, given)


def test_evaluate_leaves_no_trace():
    t = trainer(net(dropout=0.5), valid=0.2, metrics=["accuracy"])
    t.fit(epochs=1)
    before, rows = t.history.epochs(), len(t.history.frame())
    assert t.evaluate(classes()) == t.evaluate(classes())
    assert len(t.history.frame()) == rows and before.equals(t.history.epochs())


def test_save_and_load(tmp_path):
    t = trainer(metrics=["accuracy", ("f1", {"average": "micro"})], loss=("cross_entropy", {"label_smoothing": 0.1}))
    t.fit(epochs=1)
    t.save(tmp_path / "model")
    other = Trainer.load(tmp_path / "model", model=net(seed=9), device="cpu")
    assert torch.equal(other.predict(X), t.predict(X)) and other.evaluate(classes()) == t.evaluate(classes())
    assert files(tmp_path) == {"model"}
    assert set(load_file(tmp_path / "model")) >= {f"model.{name}" for name in t.model.state_dict()}  # other tools read it too


WEIGHTED = ("cross_entropy", {"weight": torch.tensor([1.0, 2.0, 3.0])})


@pytest.mark.parametrize("loss", [WEIGHTED, nn.CrossEntropyLoss(), lambda o, y: o.mean()],
                         ids=["weight", "module", "function"])
def test_what_cannot_be_saved_is_asked_for(loss, tmp_path):
    t = trainer(loss=loss)
    t.save(tmp_path / "model")
    if isinstance(loss, tuple): assert Trainer.load(tmp_path / "model", model=t.model).evaluate(classes()) == t.evaluate(classes())
    else:
        with pytest.raises(ValueError, match="give.*loss="): Trainer.load(tmp_path / "model", model=net())
    assert Trainer.load(tmp_path / "model", model=t.model, loss=loss).evaluate(classes()) == t.evaluate(classes())


@pytest.mark.parametrize("form", ["plain", "pair", "nested", "weighted", "dict", "inputs alone"])
def test_a_model_from_a_file_predicts_on_data_with_targets(form, tmp_path):
    left, right, w = X[:, :2], X[:, 2:], torch.ones(60)
    model, data = {
        "plain": (net(), (X, Y)), "inputs alone": (net(), (X,)), "weighted": (net(), (X, Y, w)), "pair": (Named(), (left, right, Y)),
        "nested": (Named(), ((left, right), Y)), "dict": (Named(), {"left": left, "right": right, "y": Y})}[form]
    whole = (X, Y, w) if form == "weighted" else (X, Y) if form == "inputs alone" else data
    t = trainer(model, whole, weighted=form == "weighted")
    t.save(tmp_path / "model")
    loaded, expected = Trainer.load(tmp_path / "model", model=model, board=False), t.predict(whole)
    torch.testing.assert_close(loaded.predict(data), expected)
    torch.testing.assert_close(loaded.predict([data]), expected)  # as a loader gives it


def test_load_refuses_what_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError): Trainer.load(tmp_path / "nothing", model=net())
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="no file of arc_nb"): Trainer.load(tmp_path / "text", model=net())
    trainer().save(tmp_path / "model")
    with pytest.raises(ValueError, match="model"): Trainer.load(tmp_path / "model", model=nn.Linear(2, 2))


def test_export_as_a_program(tmp_path):
    t = trainer(net(dropout=0.5))
    t.fit(epochs=1)
    t.export(tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(program(X[:5]), t.predict(X[:5]))
    with pytest.raises(ValueError, match="onnx"): t.export(tmp_path / "model.zip")


def test_export_as_onnx(tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own
        assert trainer().export(tmp_path / "model.onnx").stat().st_size > 0


def test_summary_shows_layers_and_shapes():
    frame = trainer().summary()
    assert list(frame.layer) == ["0", "1", "2", "3"] and frame.parameters.sum() == 40 + 27 and "(*, 3)" in frame.output.tolist()


def test_restore_brings_the_best_weights_back(tmp_path):
    kept = {}
    t = trainer(valid=0.5, run=tmp_path / "r", lr=0.3, callbacks=[On(on_epoch_end=lambda t: kept.update({t.epoch: weights(t.model)}))])
    t.fit(epochs=8)
    best = t.history.best("valid", "loss")[2]
    t.restore("best")
    assert torch.equal(weights(t.model), kept[best])
    t.restore("last")
    assert torch.equal(weights(t.model), kept[8])
    with pytest.raises(FileNotFoundError): t.restore(tmp_path / "other.pt")


def test_earlier_runs_lie_behind_this_one(tmp_path, capsys):
    def lines(board): return [line.name for line in board.look.view().lines if line.role == "ghost"]
    early, late = str(tmp_path / "early"), str(tmp_path / "late")
    for folder in (early, late): trainer(run=folder).fit(epochs=1)
    seen = []
    def more(t):
        seen.append(lines(t.live))
        if t.epoch == 1: assert t.compare(late) is t
    t = trainer(run=tmp_path / "r", board="text", callbacks=[On(on_epoch_end=more)])
    assert t.compare(early, early) is t and t.live is None
    t.fit(epochs=2)
    assert seen == [[early], [early, late]] and t.live.done
    assert lines(t.board()) == [early, late] == lines(Run(tmp_path / "r").compare(early, late).board())
    t.fit(epochs=1)
    assert seen[-1] == [early, late]


def test_a_run_is_alive_in_its_folder_from_the_first_moment(tmp_path):
    seen = []
    trainer(run=tmp_path / "r", callbacks=[On(on_fit_start=lambda t: seen.append(Status.read(tmp_path / "r").alive))]).fit(epochs=1)
    assert seen == [True] and not Status.read(tmp_path / "r").alive


def test_numpys_whole_numbers_are_seeds(tmp_path):
    a, b = trainer(seed=np.int64(3), run=tmp_path / "r"), trainer(seed=3)
    a.fit(epochs=1); b.fit(epochs=1)
    assert torch.equal(weights(a.model), weights(b.model))
    assert json.loads((tmp_path / "r/config.json").read_text())["settings"]["seed"] == 3


def test_what_is_no_earlier_run_is_refused_at_once(tmp_path):
    trainer(run=tmp_path / "early").fit(epochs=1)
    t = trainer(run=tmp_path / "r")
    with pytest.raises(FileNotFoundError, match="did you mean .*early"): t.compare(tmp_path / "early", tmp_path / "erly")
    with pytest.raises(FileNotFoundError, match="no run"): Run(tmp_path / "early").compare(tmp_path)
    with pytest.raises(ValueError, match="own folder"): t.compare(tmp_path / "r")
    assert t.compared == ()


def test_a_used_run_folder_is_moved_aside(tmp_path, capsys):
    for n in range(3): trainer(run=tmp_path / "r", seed=n).fit(epochs=n + 1)
    assert {p.name for p in tmp_path.iterdir()} == {"r", "r-1", "r-2"}
    assert [len(History.read(tmp_path / name).epochs()) for name in ("r-1", "r-2", "r")] == [1, 2, 3]
    assert len(re.findall("held another run", capsys.readouterr().out)) == 2


def test_nothing_is_written_with_run_false(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(valid=0.2).fit(epochs=1)
    assert not files(tmp_path)
    trainer(run=None).fit(epochs=1)
    assert (tmp_path / "runs/sequential/history.jsonl").exists()


def test_best_keeps_the_lowest_loss_over_several_fits(tmp_path):
    t = trainer(valid=0.5, run=tmp_path / "r")
    t.fit(epochs=5)
    t.lr = 5.0
    t.fit(epochs=2)
    assert saved(tmp_path / "r", "best")[0]["epoch"] == t.history.best("valid", "loss")[2]


def test_checkpoints_come_as_often_as_asked(tmp_path):
    seen = []
    def look(t):
        t._keeper.saver.wait()
        seen.append(sorted(int(p.name[-8:]) for p in (tmp_path / "r/checkpoints").glob("step-*")))
    trainer(run=tmp_path / "r", checkpoint_every=3, callbacks=[On(order=99, on_step_start=look)]).fit(steps=8)
    assert seen == [[], [], [], [3], [3], [3], [3, 6], [3, 6]] and saved(tmp_path / "r")[0]["step"] == 8


def test_plateau_watches_a_metric_that_should_rise():
    rising = trainer(valid=classes(30, 1), metrics=["accuracy"], lr=1e-9,
                     schedule=("plateau", {"monitor": "valid_accuracy", "mode": "max", "patience": 1, "factor": 0.5}))
    rising.fit(epochs=5)
    assert rising.lr == pytest.approx(2.5e-10)
    with pytest.raises(ValueError, match="valid_f1"):
        trainer(valid=classes(30, 1), schedule=("plateau", {"monitor": "valid_f1", "mode": "max"})).fit(epochs=1)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net(2)
    def forward(self, x): return self.body(x).split(1, 1)


def test_a_list_of_losses_for_a_tuple_of_targets_in_memory():
    x, y = numbers()
    t = trainer(TwoHeads(), (x, (y, 2 * y.double())), loss=["mse", ("huber", {"delta": 1.0}, 0.5)], valid=0.25)
    t.fit(epochs=5)
    losses = t.history.epochs().valid_loss
    assert len(losses) == 5 and losses.iloc[-1] < losses.iloc[0]
    assert [part.shape for part in t.predict(x)] == [(60, 1), (60, 1)]
