"""trainer.lr_find() leaves no trace: training after it is the training without it, to the bit, also where it was interrupted or failed."""
import copy
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small import On, classes, files, net, numbers, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from arc_nb import Trainer
from arc_nb.engine.callbacks import EMA
from arc_nb.engine.sweep import Curve, exponential, suggest

ROOT = Path(__file__).parents[1]


class Noisy(Dataset):
    "Items that draw from all three generators."
    def __init__(self): self.x, self.y = classes(48)
    def __len__(self): return len(self.x)
    def __getitem__(self, k): return self.x[k] + random.random() * 0.1 + np.float32(np.random.rand()) * 0.1 + torch.rand(1) * 0.1, self.y[k]


class Streamed(IterableDataset):
    "An order of its own."
    def __iter__(self):
        x, y = classes(48)
        return iter(zip(x, y))


def normed():
    "Dropout, running statistics and a frozen layer."
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in model.parameters():
            if p.ndim > 1: nn.init.normal_(p, 0, 0.3)
            else: nn.init.constant_(p, 0.5)
    model[0].bias.requires_grad_(False)
    return model


def shuffled(): return DataLoader(TensorDataset(*classes(48)), 16, shuffle=True)


SETTINGS = {
    "adamw": dict(), "sgd, one_cycle": dict(optimizer=("sgd", {"momentum": 0.9}), schedule="one_cycle"),
    "warmup_cosine": dict(schedule="warmup_cosine"), "plateau": dict(schedule=("plateau", {"patience": 1}), valid=classes(20, 1)),
    "accumulated": dict(accumulate=3, batch_size=8), "clipped": dict(clip_norm=0.1), "groups": dict(groups={"0.*": {"lr": 1e-3}}),
    "fp16": dict(precision="fp16"), "bf16": dict(precision="bf16"), "lbfgs": dict(optimizer="lbfgs", lr=0.1),
    "train metrics": dict(train_metrics=["accuracy"]), "amsgrad": dict(optimizer=("adam", {"amsgrad": True}))}
DATA = {
    "tensors": classes, "dataset": Noisy, "workers": Noisy, "shuffled loader": shuffled,
    "loader": lambda: DataLoader(TensorDataset(*classes(48)), 16), "batches": lambda: [classes(16, k) for k in range(3)],
    "stream": Streamed, "dict": lambda: dict(zip(("input", "y"), classes()))}


def state(t: Trainer) -> dict:
    "All that a sweep could have changed, copied."
    model, optimizer = t.model, t.setup.optimizer
    return copy.deepcopy({
        "model": model.state_dict(), "grads": [p.grad for p in model.parameters()], "modes": [m.training for m in model.modules()],
        "optimizer": optimizer.state_dict(), "scaler": t.setup.compute.precision.state_dict(), "lr": t.lr, "base": t.setup.base_lrs,
        "step": t.setup.step.state_dict(), "clip": t.setup.step.clip_norm, "status": vars(t.status), "train": t.setup.train.state_dict(),
        "waiting": t.controls.waiting, "history": t.history.frame().to_dict("list"), "columns": t.history.position()})


def generators() -> tuple:
    "What the three generators would give next."
    return random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2:], torch.get_rng_state().numpy().tobytes()


def same(a, b) -> bool:
    "Equal to the bit, through dicts and lists."
    if isinstance(a, torch.Tensor): return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a): return math.isnan(b)
    return a == b


def unchanged(t: Trainer, do) -> None:
    "Does it, and asserts that nothing has changed."
    random.seed(3); np.random.seed(3); torch.manual_seed(3)
    before, drawn = state(t), generators()
    do()
    assert same(before, state(t)) and drawn == generators()


def losses(t: Trainer) -> np.ndarray: return t.history.series("train", "loss")[1]


def same_training(make, between) -> None:
    "A training with something done before and in its middle is the training without."
    plain, other = make(), make()
    plain.fit(epochs=1); plain.fit(epochs=2)
    between(other)
    other.fit(epochs=1)
    between(other)
    other.fit(epochs=2)
    assert np.array_equal(losses(plain), losses(other)) and same(plain.model.state_dict(), other.model.state_dict())
    assert same(plain.optimizer.state_dict(), other.optimizer.state_dict()) and plain.lr == other.lr


def find(t: Trainer, **options): return t.lr_find(**{"steps": 25, "start": 1e-5, "end": 5} | options)


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_changes(name):
    t = trainer(normed(), **SETTINGS[name])
    unchanged(t, lambda: find(t))
    t.fit(epochs=1)
    unchanged(t, lambda: find(t))


@pytest.mark.parametrize("name", SETTINGS)
def test_training_after_it_is_training_without_it(name):
    same_training(lambda: trainer(normed(), **SETTINGS[name]), find)


@pytest.mark.parametrize("name", DATA)
def test_the_order_of_the_data_stays(name):
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.seen = net(), []

        def forward(self, input):
            if self.training: self.seen.append(input.detach().sum().item())
            return self.inner(input)

    def make(): return trainer(Spy(), DATA[name](), **({"workers": 2} if name == "workers" else {}))
    plain, other = make(), make()
    for goal in (dict(epochs=1), dict(steps=2), dict(epochs=1)):  # the second ends in the middle of an epoch
        plain.fit(**goal)
        known = list(other.model.seen)
        find(other, steps=12)
        other.model.seen = known
        other.fit(**goal)
    assert plain.model.seen == other.model.seen and len(plain.model.seen) > 4
    assert torch.equal(weights(plain.model), weights(other.model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses parts of torch that torch calls old
@pytest.mark.parametrize("mode", [True, "step"])
def test_a_compiled_model_too(mode):
    def make(): return trainer(normed(), compile=mode, batch_size=15)
    same_training(make, find)


def test_a_generator_that_can_be_read_once_is_refused():
    t = trainer(net(), (classes(16, k) for k in range(5)))
    with pytest.raises(ValueError, match="once"): find(t)


class Failing(nn.Module):
    "Fails at one of its calls in training."
    def __init__(self, at, error):
        super().__init__()
        self.inner, self.calls, self.at, self.error = normed(), 0, at, error

    def forward(self, x):
        if self.training:
            self.calls += 1
            if self.calls == self.at: raise self.error
        return self.inner(x)


@pytest.mark.parametrize("error", [RuntimeError("no such kernel"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_it_may_fail_or_be_interrupted_in_the_middle(error):
    t = trainer(Failing(10**9, error), optimizer=("sgd", {"momentum": 0.9}), schedule="one_cycle")
    t.fit(epochs=1)
    t.model.at = t.model.calls + 14

    def broken():
        if isinstance(error, KeyboardInterrupt):
            found = find(t)
            assert found.suggestion is None and "interrupted" in found.reason and len(found.frame()) == 13
        else:
            with pytest.raises(RuntimeError, match="no such kernel"): find(t)
    unchanged(t, broken)
    plain = trainer(Failing(10**9, error), optimizer=("sgd", {"momentum": 0.9}), schedule="one_cycle")
    plain.fit(epochs=1); plain.fit(epochs=1); t.fit(epochs=1)
    assert torch.equal(weights(plain.model), weights(t.model)) and not t.controls.waiting


def test_data_that_fail_in_the_middle_change_nothing():
    class Broken(Noisy):
        broken = False
        def __getitem__(self, k):
            if self.broken and k == 20: raise OSError("the disk is gone")
            return super().__getitem__(k)
    data = Broken()
    t = trainer(normed(), data)
    t.fit(epochs=1)
    data.broken = True
    def broken():
        with pytest.raises(OSError, match="the disk is gone"): find(t)
    unchanged(t, broken)


def test_a_stop_ends_the_sweep_and_not_the_next_fit():
    t = trainer(normed())
    calls = []
    def ask(module, inputs):
        calls.append(1)
        if len(calls) == 15: t.stop()
    handle = t.model.register_forward_pre_hook(ask)
    found = find(t)
    handle.remove()
    assert len(found.frame()) == 15 and found.curve.ended == ["interrupted"]
    t.fit(epochs=1)
    assert t.status.state == "completed" and t.status.step == 4


def test_ctrl_c_of_a_real_process_leaves_everything_as_it_was():
    code = f"""
import os, signal, sys, threading, torch
sys.path[:0] = [{str(ROOT / "tests")!r}]
from small import net, trainer, weights
torch.set_num_threads(1)
t = trainer(net()); before, calls = weights(t.model), []
def press(module, inputs):
    calls.append(1)
    if len(calls) == 12: os.kill(os.getpid(), signal.SIGINT)
handle = t.model.register_forward_pre_hook(press)
found = t.lr_find(steps=50)
handle.remove()
t.fit(epochs=1)
print(len(found.frame()), found.curve.ended, torch.equal(before, before), t.status.state)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stderr
    assert "12 ['interrupted'] True completed" in said.stdout


def test_nobody_hears_of_it_and_nothing_is_written(tmp_path):
    events = ("on_fit_start", "on_step_start", "on_step_end", "on_epoch_end", "on_fit_end", "cleanup")
    heard = On(**{name: lambda t: None for name in events})
    t = trainer(net(), run=tmp_path / "run", callbacks=[heard])
    find(t)
    assert heard.seen == [] and not (tmp_path / "run").exists() and t.path is None
    t.fit(epochs=1)
    before, seen = files(tmp_path), len(heard.seen)
    find(t)
    assert files(tmp_path) == before and len(heard.seen) == seen


def test_a_run_can_be_resumed_after_it(tmp_path):
    def make(name): return trainer(normed(), run=tmp_path / name, schedule="warmup_cosine")
    plain, other = make("plain"), make("other")
    plain.fit(epochs=3)
    other.fit(epochs=1, plan=3)
    find(other)
    other.fit(epochs=3, resume=True)
    assert torch.equal(weights(plain.model), weights(other.model))


def test_callbacks_that_keep_weights_keep_theirs():
    def make(): return trainer(normed(), callbacks=[EMA(0.9)])
    same_training(make, find)


def test_repeats_begin_anew_each_time():
    t = trainer(net())
    found = find(t, repeats=3)
    first = [losses[0] for losses in found.curve.losses]
    assert len(found.curve.losses) == 3 and max(first) - min(first) < 0.5  # all from the same weights, with other batches
    assert len(set(first)) == 3
    again = find(t, repeats=3)
    assert all(np.array_equal(a, b) for a, b in zip(found.curve.losses, again.curve.losses))
    assert set(found.frame().columns) == {"rate", "loss", "smooth", "repeat"} and found.frame()["repeat"].nunique() == 3
    with pytest.raises(ValueError, match="repeats=0"): find(t, repeats=0)


def separable(): return trainer(net(), classes(512), batch_size=32, lr=1e-3)


def test_choosing_sets_the_rate_and_scales_groups_and_schedules():
    found = separable().lr_find()
    assert found.suggestion and set(found.suggestions) == {"steep", "valley", "slide", "minimum"} and found.lr is None
    assert all(1e-5 < rate < 10 for rate in found.suggestions.values())
    t = trainer(net(), groups={"0.*": {"lr": 1e-3}})
    ratio = [g["lr"] / t.optimizer.param_groups[0]["lr"] for g in t.optimizer.param_groups]
    found = t.lr_find()
    found.choose(3e-3)
    assert t.lr == pytest.approx(3e-3) and found.lr == 3e-3
    assert [g["lr"] / t.lr for g in t.optimizer.param_groups] == pytest.approx(ratio)
    t = trainer(net(), schedule="one_cycle")
    t.lr_find().choose(0.02)
    t.fit(epochs=5)
    assert max(t.history.series("train", "lr")[1]) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("bad", [0, -1e-3, math.nan, math.inf, "fast", None])
def test_what_is_no_rate_is_refused(bad):
    t = separable()
    found = find(t)
    with pytest.raises(ValueError, match="positive number"): found.choose(bad)
    assert t.lr == 1e-3 and found.lr is None


@pytest.mark.parametrize("options,said", [
    (dict(start=0), "start=0"), (dict(start=1, end=1e-3), "below end"), (dict(steps=3), "steps=3"), (dict(steps=10.5), "steps=10.5"),
    (dict(end=math.inf), "end=inf"), (dict(start="a"), "start='a'"), (dict(start=True), "start=True")])
def test_limits_that_make_no_sweep(options, said):
    t = separable()
    with pytest.raises(ValueError, match=said): t.lr_find(**options)
    unchanged(t, lambda: None)


def test_negative_losses_are_followed_to_their_end():
    def shifted(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1]) - 100
    plain = separable().lr_find()
    t = Trainer(net(), classes(512), step=shifted, batch_size=32, run=False, board=False)
    found = t.lr_find()
    assert found.frame()["loss"].max() < 0 and found.suggestion is not None
    assert len(found.frame()) > 60  # a rule of "four times the best" would have stopped it at once
    assert found.suggestion == pytest.approx(plain.suggestion, rel=0.5)


def test_curves_that_tell_nothing_give_the_reason():
    noise = Trainer(net(), classes(512), step=lambda model, batch: 0 * model(batch[0]).sum() + torch.randn(()), batch_size=32,
                    run=False, board=False)
    found = noise.lr_find()
    assert found.suggestion is None and "noise" in found.reason and found.suggestions == {}
    assert "no suggestion" in repr(found) and "noise" in found.view().note
    constant = Trainer(net(), classes(512), step=lambda model, batch: 0 * model(batch[0]).sum() + 2.3, run=False, board=False)
    assert constant.lr_find().suggestion is None
    tiny = separable().lr_find(start=1e-12, end=1e-9)
    assert tiny.suggestion is None and "larger end=" in tiny.reason
    wild = trainer(net(1), numbers(512), loss="mse", optimizer="sgd", batch_size=32).lr_find(start=5, end=1e4)
    assert wild.suggestion is None and "smaller start=" in wild.reason
    assert wild.curve.ended[0] in ("diverged", "not finite")


def test_a_loss_that_is_lost_at_once_is_told():
    t = trainer(net(), step=lambda model, batch: model(batch[0]).sum() * math.nan)
    def lost():
        found = t.lr_find()
        assert found.suggestion is None and "not finite" in found.reason and found.frame().empty and "<svg" in found.still()
    unchanged(t, lost)


def test_while_it_trains_and_without_data_it_is_refused():
    said = []
    def ask(t):
        with pytest.raises(RuntimeError) as error: t.lr_find()
        said.append(str(error.value))
    t = trainer(net(), callbacks=[On(on_epoch_end=ask)])
    t.fit(epochs=1)
    assert "training" in said[0]
    with pytest.raises(ValueError, match="train"): Trainer(net(), loss="cross_entropy", run=False, board=False).lr_find()


def test_noise_is_no_suggestion_and_learning_is():
    draw, rates = np.random.default_rng(0), exponential()
    noisy = [2 + draw.standard_normal(100) * scale for scale in (1e-3, 0.1, 10.0) for _ in range(100)]
    made = [suggest(Curve(rates, [losses], ["end"])).value for losses in noisy]
    assert sum(value is not None for value in made) <= 2
    fall = 2 - 1.5 / (1 + (0.01 / rates) ** 1.5)
    values = [suggest(Curve(rates, [fall + 0.1 * draw.standard_normal(100)], ["end"])).value for _ in range(50)]
    assert all(values) and np.std(np.log10(values)) < 0.25


def test_in_a_terminal_one_line_is_printed(capsys):
    find(separable())
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lr_find, ")


def test_the_bench_runs_and_its_table_is_stored():
    done = subprocess.run([sys.executable, ROOT / "bench/lr_find.py", "--smoke", "digits MLP"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 settings" in done.stdout
    stored = json.loads((ROOT / "bench/results/lr_find.json").read_text())
    assert len(stored["settings"]) == 10 and all(len(row["grid"]) == 13 for row in stored["settings"] if "note" not in row)
    print(f"default at most {stored['goal']} above the best of the grid: {stored['met']} of {len(stored['settings'])}")
