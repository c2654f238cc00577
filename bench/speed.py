"""Time a step: the Trainer, with history, gradient norm and board on, beside loops written by hand. CPU time, interleaved pairs.

usage: python bench/speed.py [pairs, default 30] [--smoke]   writes bench/results/speed.json (not with --smoke)
"""
import contextlib
import io
import json
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from _gpt import GPT, flat_entropy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import arc_nb.watch.board as board_room
from arc_nb import Callback, Trainer

torch.set_num_threads(1)
board_room.place = lambda: "kernel"  # the live board is drawn and serialised as in a notebook, though nobody looks


def mlp(): return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))


def settings(smoke):
    """name, model, data, batch size, the Trainer's loss, the same loss by hand, epochs a measurement."""
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(32768, 20, generator=g), torch.randn(32768, 1, generator=g)
    rows = 32 if smoke else 96
    tokens = torch.randint(0, 65, (rows, 129), generator=g)
    small = 4096 if smoke else 32768
    return [("mlp_32", mlp, (X[:small], y[:small]), 32, "mse", F.mse_loss, 1),
            ("mlp_256", mlp, (X[:small], y[:small]), 256, "mse", F.mse_loss, 4),
            ("gpt_16", GPT, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), 16, "cross_entropy", flat_entropy, 1)]


def tight(model, data, batch, loss, epochs):
    """Permuted once an epoch, sliced, fused AdamW."""
    optimizer, (X, y) = torch.optim.AdamW(model.parameters(), 1e-3, fused=True), data
    for _ in range(epochs):
        order = torch.randperm(len(X))
        x, t = X[order], y[order]
        for i in range(0, len(X), batch):
            value = loss(model(x[i:i + batch]), t[i:i + batch])
            optimizer.zero_grad(); value.backward(); optimizer.step()


def usual(model, data, batch, loss, epochs):
    """What most people write."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(epochs):
        for x, t in DataLoader(TensorDataset(*data), batch, shuffle=True):
            value = loss(model(x), t)
            optimizer.zero_grad(); value.backward(); optimizer.step()


class Clock(Callback):
    """CPU seconds from the first step to the last, without the still picture that is drawn once at the end."""
    order = 99
    def on_fit_start(self, trainer): self.began = time.process_time()
    def on_fit_end(self, trainer): self.steps_took = time.process_time() - self.began


def fit(trainer, epochs):
    """CPU seconds of the steps of a fit, and of the whole fit."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        began = time.process_time()
        trainer.fit(epochs=epochs)
        return trainer.callbacks[0].steps_took, time.process_time() - began


def cpu(call):
    """CPU seconds of a call, its prints swallowed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        began = time.process_time()
        call()
        return time.process_time() - began


def interval(ratios):
    """Median with its 95 % interval by bootstrap."""
    rng, ratios = np.random.default_rng(0), np.array(ratios)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return [round(float(v), 3) for v in (np.median(ratios), *np.quantile(medians, (.025, .975)))]


def fresh(make):
    torch.manual_seed(0)
    return make()


NAMES = {"ours": "arc_nb", "compiled": 'arc_nb, compile="step"', "tight": "tight loop by hand", "usual": "usual DataLoader loop"}


def measure(setting, pairs, home, modes):
    name, make, data, batch, loss, by_hand, epochs = setting
    steps = epochs * -(-len(data[0]) // batch)
    trainers = {mode: Trainer(fresh(make), data, loss=loss, batch_size=batch, run=f"{home}/{name}-{mode}", board="widget",
                              callbacks=[Clock()], compile="step" if mode == "compiled" else False) for mode in modes}
    for trainer in trainers.values(): fit(trainer, 1)
    runs = {"tight": lambda: tight(fresh(make), data, batch, by_hand, epochs),
            "usual": lambda: usual(fresh(make), data, batch, by_hand, epochs)}
    found, ends = {key: [] for key in (*runs, *trainers)}, []
    for k in range(pairs):
        for key in random.Random(k).sample(sorted(found), len(found)):
            if key in runs: found[key].append(cpu(runs[key])); continue
            took, whole = fit(trainers[key], epochs)
            found[key].append(took); ends.append(whole - took)
    ratio = lambda a, b: interval([x / y for x, y in zip(found[a], found[b])])
    rows = [{"name": NAMES[key], "us_a_step": round(1e6 * statistics.median(found[key]) / steps, 1), "of_tight": ratio(key, "tight"),
             "of_usual": ratio(key, "usual")[0], "usual_over": ratio("usual", key)} for key in found]
    for row in rows[2:]: row["once_a_fit_seconds"] = round(statistics.median(ends), 3)
    if "compiled" in trainers: rows[-1]["compile_seconds"] = round(trainers["compiled"].setup.step.compile_seconds, 1)
    return sorted(rows, key=lambda row: row["us_a_step"])


def same_losses(home):
    """Largest difference of the first 100 losses, compiled and not."""
    g = torch.Generator().manual_seed(0)
    data = torch.randn(3200, 20, generator=g), torch.randn(3200, 1, generator=g)
    curves = []
    for mode in (False, "step"):
        trainer = Trainer(fresh(mlp), data, loss="mse", run=f"{home}/same{mode}", board=False, compile=mode)
        cpu(lambda t=trainer: t.fit(steps=100))
        curves.append(trainer.history.series("train", "loss")[1])
    return float(np.abs(curves[0] - curves[1]).max())


def train_metric(pairs, home):
    """What a training metric costs, as a ratio of CPU time."""
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(8192, 20, generator=g), torch.randint(0, 2, (8192,), generator=g)
    make = lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
    with_, without = [Trainer(fresh(make), (X, y), loss="cross_entropy", run=f"{home}/metric{bool(names)}", board=False,
                              train_metrics=names) for names in (["accuracy"], ())]
    for trainer in (with_, without): cpu(lambda t=trainer: t.fit(epochs=1))
    return interval([cpu(lambda: with_.fit(epochs=1)) / cpu(lambda: without.fit(epochs=1)) for _ in range(pairs)])


GOALS = {"mlp_32": ("of_tight", 1.2), "mlp_256": ("of_tight", 1.15), "gpt_16": ("of_tight", 1.05)}


def main():
    smoke, numbers = "--smoke" in sys.argv, [int(a) for a in sys.argv[1:] if a.isdigit()]
    pairs = numbers[0] if numbers else 2 if smoke else 30
    warnings.simplefilter("ignore")
    out = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1, "pairs": pairs,
           "measure": "CPU seconds from the first step to the last, interleaved; history, gradient norm, checkpoints and live board on; "
                      "medians with 95 % intervals; once_a_fit_seconds: set-up and the still picture at the end"}
    with tempfile.TemporaryDirectory() as home:
        for setting in settings(smoke):
            modes = ["ours"] + ([] if smoke or setting[0].startswith("gpt") else ["compiled"])
            out[setting[0]] = measure(setting, pairs, home, modes)
            for row in out[setting[0]]: print(setting[0], row, flush=True)
        if not smoke: out["largest_loss_difference_100_steps"] = same_losses(home)
        out["train_metric_cost"] = train_metric(pairs, home)
    print("loss difference, compiled:", out.get("largest_loss_difference_100_steps"), " train metric:", out["train_metric_cost"])
    for name, (key, goal) in GOALS.items():
        ours = next(row for row in out[name] if row["name"] == "arc_nb")
        median, low, high = ours[key]
        print(f"{name}: {median} (interval {low} to {high}), goal at most {goal}: {'met' if median <= goal else 'MISSED'}")
    if smoke: return
    path = Path(__file__).parent / "results" / "speed.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print("written:", path)


if __name__ == "__main__": main()
