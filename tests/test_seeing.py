"""What is tried on a Trainer leaves no trace; what is seen is told, kept with the run, and mended where it can be."""
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from small import On, classes, net, numbers, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import arc_nb
from arc_nb import EMA, Trainer
from arc_nb.diagnose.probes import Probes
from arc_nb.engine.scaling import Scaling, Standardised
from arc_nb.runs import Run


class Own(Dataset):
    "Items from a generator of its own, and from torch's."
    def __init__(self): self.rng = np.random.default_rng(0)
    def __len__(self): return 60
    def __getitem__(self, k):
        x, y = classes()
        return x[k] + 0.1 * float(self.rng.random()) + 0.1 * torch.rand(()), y[k]


class Remembering(nn.Module):
    "Has a batch norm, dropout, a buffer that no state_dict shows, and a frozen layer."
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)
        self.first.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


DATA = {"tensors": lambda: classes(), "data set": lambda: TensorDataset(*classes()), "own generator": Own,
        "loader": lambda: DataLoader(TensorDataset(*classes()), batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(3))}
KINDS = {"adamw": {}, "momentum": {"optimizer": ("sgd", {"momentum": 0.9})}, "lbfgs": {"optimizer": "lbfgs"}, "clipped": {"clip_norm": 0.1},
         "accumulate": {"accumulate": 2}, "one_cycle": {"schedule": "one_cycle"}, "plateau": {"schedule": "plateau"},
         "fp16": {"precision": "fp16"}, "bf16": {"precision": "bf16"}}


def made(data="tensors", kind="adamw", **more):
    torch.manual_seed(0)
    settings = KINDS[kind] | ({"valid": classes(30, 1)} if kind == "plateau" else {}) | more
    return trainer(Remembering(), DATA[data](), **settings)


def everything(t):
    "All that a person could see of a trainer's state, as text."
    rng = random.getstate()[1][:5], np.random.get_state()[1][:5].tolist(), torch.get_rng_state().sum().item()
    setup = t.setup
    return repr((weights(t.model).tolist(), t.model.calls.item(), t.model.norm.running_mean.tolist(), t.optimizer.state_dict(),
                 setup.compute.precision.state_dict(), setup.step.state_dict(), t.lr, t.status.step, rng, len(t.history.frame()),
                 [m.training for m in t.model.modules()], [p.grad for p in t.model.parameters()], t.status.state))


def disturb(t):
    "Trains aside, changes what can be changed, draws."
    t.model.eval()
    for groups, _ in zip(t._aside(), range(5)): t.setup.step(list(groups))
    t.optimizer.param_groups[0]["lr"] = 7.0
    t.model.first.bias.requires_grad_(True)
    with torch.no_grad(): t.model.calls += 5; t.model.last.weight.zero_()
    random.random(); np.random.rand(); torch.rand(3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", DATA)
def test_what_is_tried_leaves_no_trace(data, kind):
    ends = []
    for tried in (False, True):
        t = made(data, kind)
        t.fit(steps=6)
        before = everything(t)
        if tried:
            with t.untouched(): disturb(t)
            assert everything(t) == before
        t.fit(steps=6)
        ends.append((weights(t.model), t.model.calls.item(), t.history.series("train", "loss")[1]))
    (plain, calls, losses), (after, calls_after, losses_after) = ends
    assert torch.equal(plain, after) and calls == calls_after and (losses == losses_after).all()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_middle_leaves_no_trace_either(error):
    t = made()
    t.fit(steps=3)
    before = everything(t)
    with pytest.raises(error), t.untouched():
        disturb(t)
        raise error("in the middle")
    assert everything(t) == before
    t.fit(steps=2)


def test_an_interrupt_while_things_are_put_back_waits(monkeypatch):
    t = made()
    before, put = everything(t), t._put_back

    def interrupted(state):
        os.kill(os.getpid(), signal.SIGINT)
        put(state)

    monkeypatch.setattr(t, "_put_back", interrupted)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may have it ignored
    try:
        with pytest.raises(KeyboardInterrupt), t.untouched(): disturb(t)
    finally: signal.signal(signal.SIGINT, handler)
    assert everything(t) == before and t._thread is None


def test_gradients_that_a_person_holds_stay():
    t = made()
    t.model.last.weight.grad = torch.ones_like(t.model.last.weight)
    held = t.model.last.weight.grad
    with t.untouched():
        assert t.model.last.weight.grad is None
        disturb(t)
    assert t.model.last.weight.grad is held and (held == 1).all()


def test_it_is_refused_while_training_and_for_data_that_can_be_read_once():
    said = []
    def ask(t):
        for call in (t.lr_find, t.checkup):
            try: call()
            except RuntimeError as error: said.append(str(error))
    t = trainer(callbacks=[On(on_step_end=ask)])
    t.fit(steps=1)
    assert len(said) == 2 and all("is training" in text for text in said)
    x, y = classes()
    once = trainer(net(), (pair for pair in [(x, y)] * 4))
    for call in (once.lr_find, once.checkup):
        with pytest.raises(ValueError, match="only once"): call()
    assert len(once.fit(steps=4).series("train", "loss")[0]) == 4 and once.diagnose() is not None


def test_nothing_else_trains_meanwhile():
    t = made()
    with t.untouched():
        with pytest.raises(RuntimeError, match="training already"): t.fit(steps=1)
        with pytest.raises(RuntimeError, match="is training"): t.lr_find()
    t.fit(steps=1)


def test_callbacks_hear_nothing_of_it():
    listener = On(**dict.fromkeys(["on_fit_start", "on_step_end", "on_epoch_end", "cleanup"], lambda trainer: None))
    t = made(callbacks=[listener, EMA()])
    t.lr_find(steps=12)
    assert not listener.seen and not t.history.names()


@pytest.mark.parametrize("wrong", ["gradient", ["weights", "activation"], 3])
def test_an_unknown_name_is_refused_before_the_start(wrong, tmp_path):
    t = trainer(run=tmp_path / "run")
    with pytest.raises((ValueError, TypeError), match="watch="): t.fit(steps=1, watch=wrong)
    assert not (tmp_path / "run").exists() and t.step == 0
    t.fit(steps=1)


@pytest.mark.parametrize("watch", [True, "gradients", ["weights", "updates"], Probes("activations", share=0.5)])
def test_watching_changes_nothing_and_is_kept_with_the_run(watch, tmp_path):
    plain, watched = made(), made(run=tmp_path / "run")
    plain.fit(epochs=3); watched.fit(epochs=3, watch=watch)
    assert torch.equal(weights(plain.model), weights(watched.model))
    again = Run(tmp_path / "run").layers
    assert again.names == watched.layers.names and again.steps.tolist() == watched.layers.steps.tolist()
    assert len(again.steps) >= 1 and again.quantities


def test_the_layers_go_on_with_a_further_fit_and_a_resume(tmp_path):
    t = made(run=tmp_path / "run")
    t.fit(epochs=1, watch=True); t.fit(epochs=1); t.fit(epochs=1, watch=True)
    assert min(t.layers.steps) == 1 and max(t.layers.steps) > 8
    resumed = made(run=tmp_path / "run")
    resumed.fit(epochs=5, resume=True, watch=True)  # of one fit of one epoch, as the last one was
    assert set(t.layers.steps) <= set(resumed.layers.steps)
    assert set(Run(tmp_path / "run").layers.steps) == set(resumed.layers.steps)


def spectral():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3))


def per_row(model, batch):
    "A penalty on each row's own derivatives, as physics-informed networks have."
    slopes = torch.func.vmap(torch.func.jacrev(lambda row: model(row)))(batch[0])
    return nn.functional.cross_entropy(model(batch[0]), batch[1]) + 1e-3 * slopes.square().mean()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is old, and models made with it are about
@pytest.mark.parametrize("name", ["spectral norm", "torch.func", "scripted in part"])
def test_watching_unusual_models_changes_nothing(name):
    ends = []
    for watch in (False, True):
        torch.manual_seed(0)
        model = spectral() if name == "spectral norm" else net()
        if name == "scripted in part": model = nn.Sequential(torch.jit.trace(model[:2], torch.zeros(2, 4)), model[2:])
        t = trainer(model, classes(), **({"step": per_row} if name == "torch.func" else {}))
        t.fit(epochs=3, watch=watch)
        ends.append(torch.cat([v.reshape(-1) for v in t.model.state_dict().values()]))
        assert t.diagnose() is not None
    assert torch.equal(*ends) and len(t.layers.steps)


def test_what_cannot_be_watched_costs_no_training(monkeypatch):
    monkeypatch.setattr("arc_nb.diagnose.activations.measure", lambda *_: 1 / 0)
    t = trainer()
    with pytest.warns(RuntimeWarning, match="cannot be watched any longer"): t.fit(epochs=3, watch=True)
    assert t.status.state == "completed" and not t.model._forward_hooks


def test_findings_come_while_it_trains_too():
    said = []
    t = made(callbacks=[On(on_epoch_end=lambda trainer: said.append(trainer.diagnose()))])
    t.fit(epochs=2)
    assert len(said) == 2


def test_a_finding_that_cannot_be_made_costs_no_run(monkeypatch):
    t = made()
    monkeypatch.setattr(type(t), "findings_so_far", lambda self: 1 / 0)
    monkeypatch.setattr("arc_nb.seeing.Telling.share", 1000.0)
    with pytest.warns(RuntimeWarning, match="findings of this run cannot be told"): t.fit(max_time=2, steps=10**6, watch=True)
    assert t.status.state == "stopped"


def test_the_worst_finding_is_told_while_it_trains_and_changes_nothing(monkeypatch):
    monkeypatch.setattr("arc_nb.seeing.Telling.share", 1000.0)
    x, _ = classes(200)
    told, ends = [], []
    for watch in (False, True):
        heard = On(on_tick=lambda trainer: told.append(trainer.status.finding), order=99)
        t = trainer(Remembering(), (x * 1e4, torch.arange(200) % 3), callbacks=[heard], lr=1.0, optimizer="sgd")
        for p in t.model.parameters(): torch.nn.init.constant_(p, 0.1)
        t.fit(steps=1500, watch=watch)
        ends.append((weights(t.model), t.model.calls.item()))
    assert any(told) and torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_the_remedies_do_what_they_say(tmp_path):
    x, y = classes(200)
    scale = torch.tensor([1.0, 500.0, 1.0, 1.0])
    t = trainer(net(), (x * scale, y), valid=0.3, run=tmp_path / "run", batch_size=32)
    t.fit(epochs=3)
    remedies = t._remedies()
    assert set(remedies) == {"lr", "clip", "best", "normalise"}
    remedies["lr"](2e-3); assert t.lr == 2e-3
    remedies["clip"](0.5); assert t.setup.step.clip_norm == 0.5
    best = t.history.best("valid", "loss")[0]
    with torch.no_grad(): t.model[0].weight.zero_()
    remedies["best"](); assert t.evaluate((x * scale, y))["loss"] < 10 * best
    before = t.predict(x)
    remedies["normalise"]()
    with pytest.raises(ValueError, match="scaled already"): remedies["normalise"]()
    assert not torch.equal(t.predict(x), before) and t.model.scaling["0"].spread[1] > 100
    t.fit(epochs=2)
    assert t.predict(x).shape == (200, 3) and not t.facts.badly_scaled


def test_a_model_with_scaled_inputs_is_saved_and_loaded(tmp_path):
    t = trainer(net(), classes())
    t._remedies()["normalise"]()
    path = t.save(tmp_path / "model")
    with pytest.raises(ValueError, match="Standardised"): Trainer.load(path, model=net())
    again = Trainer.load(path, model=Standardised(net(seed=4), {0: Scaling(torch.zeros(4), torch.ones(4))}))
    assert torch.equal(again.predict(classes()[0]), t.predict(classes()[0]))


def test_a_checkpoint_without_the_layer_says_so(tmp_path):
    t = trainer(net(), classes(), run=tmp_path / "run")
    t.fit(epochs=1)
    t._remedies()["normalise"]()
    with pytest.raises(ValueError, match="scales the inputs"): t.fit(epochs=2, resume=True)


def test_no_remedy_changes_the_model_while_it_trains():
    said = []
    def ask(t):
        for name in ("normalise", "best"):
            try: t._remedies().get(name, t._check_idle)()
            except RuntimeError as error: said.append(str(error))
    t = trainer(net(), classes(), callbacks=[On(on_epoch_end=ask)])
    t.fit(epochs=1)
    assert len(said) == 2 and not isinstance(t.model, Standardised)


def test_the_input_that_is_named_is_the_one_that_is_scaled():
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.net = net()
        def forward(self, a, b): return self.net(a) + self.net(b)
    x, y = classes(100)
    t = trainer(Two(), (x, x * 1e5, y), run=False)
    t._remedies()["normalise"]()
    assert list(t.model.scaling) == ["1"]


def test_a_custom_step_can_be_tried_and_diagnosed():
    t = trainer(net(1), numbers(), step=lambda model, batch: (model(batch[0]) - batch[1]).square().mean())
    found = t.lr_find(steps=20)
    assert found.suggestion is None or found.suggestion > 0
    t.fit(epochs=2, watch=True)
    assert t.diagnose() is not None and t.checkup() is not None


def test_another_thread_may_choose_while_it_trains():
    t = trainer()
    found = t.lr_find(steps=12)
    chooser = On(on_step_end=lambda trainer: trainer.step == 2 and threading.Thread(target=found.choose, args=(3e-4,)).start())
    t.callbacks.append(chooser)
    t.fit(steps=40, max_time=30)
    assert t.lr == pytest.approx(3e-4)


def test_the_front_door_knows_them():
    for name in ("lr_find", "checkup", "diagnose", "layers", "facts"): assert hasattr(arc_nb.Trainer, name)
