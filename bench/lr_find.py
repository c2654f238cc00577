"""Which learning rate trains best? What the finder suggests, beside a grid of 13 rates: 5 models x 2 optimizers, 3 seeds.

Each setting is a short training as people plan it: all of the steps under a schedule whose peak is the learning rate. The loss of a
rate is the median over 3 seeds; a training that ends in NaN counts as infinitely bad. Every rule is judged by the same trainings, with
the rate that it found from the same seed.

usage: python bench/lr_find.py [--smoke] [--noise] [part of a setting's name ...]   writes bench/results/lr_find.json (not with
--smoke); with names only their rows; --noise measures again only how far a loss falls by chance. About 30 minutes on one core.
"""
import json
import math
import os
import platform
import statistics
import sys
import time
import warnings
from itertools import count
from pathlib import Path

import numpy as np
import torch
from _gpt import Block
from sklearn.datasets import load_digits
from torch import nn

from arc_nb import Trainer
from arc_nb.engine.sweep import Curve, exponential, noise, suggest, sweep, warm

torch.set_num_threads(1)
DATA = Path(os.environ.get("ARC_NB_DATA", Path(__file__).parents[1] / "../shared/data"))
GRID = [float(f"{rate:.3g}") for rate in np.geomspace(1e-5, 10, 13)]  # half a decade apart
SEEDS = (0, 1, 2)
RULES = ("default", "steep", "valley", "slide", "minimum")
GOAL = 0.03  # the default's loss above the best of the grid, at most
OPTIMIZERS = {"sgd": ("sgd", {"momentum": 0.9}), "adamw": "adamw"}


class LSTM(nn.Module):
    """The next hour of seven series, from a window of them."""
    def __init__(self, width=32):
        super().__init__()
        self.lstm, self.head = nn.LSTM(7, width, batch_first=True), nn.Linear(width, 7)

    def forward(self, x): return self.head(self.lstm(x)[0][:, -1])


class GPT(nn.Module):
    """The next character, begun as nanoGPT begins: weights of 0.02, no biases."""
    def __init__(self, vocabulary=65, width=64, layers=2, heads=4, context=64):
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)], nn.LayerNorm(width), nn.Linear(width, vocabulary))
        for part in self.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)): nn.init.normal_(part.weight, 0, 0.02)
            if isinstance(part, nn.Linear): nn.init.zeros_(part.bias)

    def forward(self, tokens): return self.blocks(self.token(tokens) + self.place)


class Chars(nn.Module):
    """The next character, by an LSTM as char-rnn has it."""
    def __init__(self, vocabulary=65, width=96):
        super().__init__()
        self.token, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, tokens): return self.head(self.lstm(self.token(tokens))[0])


def mlp(): return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def cnn():
    return nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Linear(512, 10))


def digits(images=False):
    """1,257 rows to train on, 540 to validate."""
    X, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))
    X, y = torch.tensor(X[order] / 16, dtype=torch.float32), torch.tensor(y[order])
    if images: X = X.reshape(-1, 8, 8)
    return (X[:1257], y[:1257]), (X[1257:], y[1257:])


def temperatures(window=48):
    """Windows of ETTh1's seven series and the hour after each, scaled by the training part: 12 months, then 4."""
    table = np.loadtxt(DATA / "ETTh1.csv", delimiter=",", skiprows=1, usecols=range(1, 8), dtype=np.float32)
    train, valid = table[:8640], table[8640 - window:11520]
    mean, std = train.mean(0), train.std(0)

    def windows(part):
        scaled = torch.from_numpy((part - mean) / std)
        rows = scaled.unfold(0, window, 1)[:-1].transpose(1, 2).contiguous()
        return rows, scaled[window:].contiguous()
    return windows(train), windows(valid)


def characters(context=64):
    """Tiny Shakespeare in pieces: 4,800 to train on, 256 from its end to validate."""
    text = (DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")
    known = {c: k for k, c in enumerate(sorted(set(text)))}
    tokens = torch.tensor([known[c] for c in text])
    pieces = tokens[:len(tokens) // (context + 1) * (context + 1)].reshape(-1, context + 1)
    cut = lambda rows: (rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
    return cut(pieces[:4800]), cut(pieces[-256:])


# name: model, data, loss, batch size, steps, schedule, clipping, file that it needs
SETTINGS = {"digits MLP": (mlp, digits, "cross_entropy", 64, 120, "one_cycle", None, None),
            "digits CNN": (cnn, lambda: digits(images=True), "cross_entropy", 64, 120, "one_cycle", None, None),
            "ETTh1 LSTM": (LSTM, temperatures, "mse", 64, 270, "one_cycle", None, "ETTh1.csv"),
            "Shakespeare LSTM": (Chars, characters, "cross_entropy", 32, 300, "one_cycle", 5.0, "tinyshakespeare.txt"),
            "Shakespeare GPT": (GPT, characters, "cross_entropy", 16, 600, "warmup_cosine", 1.0, "tinyshakespeare.txt")}


class Setting:
    """A model with an optimizer, to be trained with any rate."""
    def __init__(self, name, optimizer, steps=None):
        self.make, data, self.loss, self.batch, planned, self.schedule, self.clip, _ = SETTINGS[name]
        self.train, self.valid = data()
        self.name, self.optimizer, self.steps = f"{name}, {optimizer}", OPTIMIZERS[optimizer], steps or planned

    def trainer(self, seed, lr=1e-3):
        torch.manual_seed(seed)
        return Trainer(self.make(), self.train, self.valid, loss=self.loss, optimizer=self.optimizer, lr=lr, schedule=self.schedule,
                       batch_size=self.batch, clip_norm=self.clip, seed=seed, run=False, board=False, valid_every="1000 epochs")

    def score(self, lr, seed):
        """The valid loss after a whole training; infinite where it was lost."""
        if lr is None: return math.inf
        trainer = self.trainer(seed, lr)
        trainer.fit(steps=self.steps)
        if trainer.status.state != "completed": return math.inf
        loss = trainer.evaluate(self.valid)["loss"]
        return loss if math.isfinite(loss) else math.inf

    def curve(self, seed, start=1e-7, end=10.0):
        """A sweep of the usual hundred steps."""
        trainer, rates = self.trainer(seed), exponential(start, end)
        trainer.model.train()
        batches = ((batch,) for number in count(10**9) for batch in trainer.setup.train.epoch(number))
        losses, ended = sweep(trainer.setup.step, batches, rates)
        return Curve(rates, [np.array(losses)], [ended])

    def suggested(self, seed):
        """What each rule says after one sweep."""
        found = suggest(self.curve(seed))
        return {"default": found.value} | found.marks

    def falls(self, seeds):
        """How far the smoothed loss falls, in parts of its noise: by chance, with rates too small to do anything, and when it learns."""
        def fall(curve):
            smooth = curve.mean[warm(curve.keep) - 1:]
            return round(float((smooth[0] - smooth.min()) / noise(curve.losses[0], curve.keep)), 1)
        return {"by_chance": max(fall(self.curve(seed, 1e-10, 1e-8)) for seed in seeds),
                "learning": min(fall(self.curve(seed)) for seed in seeds)}


def measure(setting, grid, seeds):
    """The losses of the grid and of what the rules suggest; the same rate is not trained twice."""
    began, known = time.process_time(), {}

    def score(lr, seed):
        if (lr, seed) not in known: known[lr, seed] = setting.score(lr, seed)
        return known[lr, seed]
    plain = lambda losses: [None if math.isinf(v) else round(v, 4) for v in losses]
    table = {lr: [score(lr, seed) for seed in seeds] for lr in grid}
    best = min(table, key=lambda lr: statistics.median(table[lr]))
    row = {"setting": setting.name, "steps": setting.steps, "schedule": setting.schedule, "clip_norm": setting.clip, "best_rate": best,
           "best": round(statistics.median(table[best]), 4), "rules": {},
           "grid": {f"{lr:.3g}": plain(losses) for lr, losses in table.items()}}
    said = [setting.suggested(seed) for seed in seeds]
    for rule in RULES:
        rates = [one.get(rule) for one in said]
        losses = [score(lr, seed) for lr, seed in zip(rates, seeds)]
        middle = statistics.median(losses)
        row["rules"][rule] = {"rates": [lr and float(f"{lr:.3g}") for lr in rates], "losses": plain(losses),
                              "above_best": None if math.isinf(middle) else round(middle - statistics.median(table[best]), 4)}
    row["fall_over_noise"] = setting.falls(range(2 * len(seeds)))
    row["cpu_seconds"] = round(time.process_time() - began)
    return row


def settings(names, steps):
    """Those that were asked for, and whose data are there."""
    for name, (*_, needs) in SETTINGS.items():
        wanted = [optimizer for optimizer in OPTIMIZERS if not names or any(wish in f"{name}, {optimizer}" for wish in names)]
        if wanted and needs and not (DATA / needs).exists():
            print(f"{name}: left out, {DATA / needs} is missing (ARC_NB_DATA says where)"); continue
        for optimizer in wanted: yield Setting(name, optimizer, steps)


def told(row):
    """A row as a line."""
    above = ", ".join(f"{rule} {found['above_best']}" for rule, found in row["rules"].items())
    return (f"{row['setting']}: best {row['best']} at {row['best_rate']:.3g}; above it: {above}; "
            f"default {row['rules']['default']['rates']}, {row['cpu_seconds']} s")


def store(rows):
    """Writes the table; rows that were not measured now stay."""
    path = Path(__file__).parent / "results" / "lr_find.json"
    known = {row["setting"]: row for row in (json.loads(path.read_text())["settings"] if path.exists() else [])}
    known |= {row["setting"]: row for row in rows}
    order = [known[f"{name}, {optimizer}"] for name in SETTINGS for optimizer in OPTIMIZERS if f"{name}, {optimizer}" in known]
    out = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1,
           "measure": "valid loss after a short training, median of 3 seeds; above_best: over the best of a grid of 13 rates from "
                      "1e-5 to 10; null: no suggestion, or a training that was lost",
           "goal": GOAL, "met": sum(map(met, order)), "settings": order}
    path.write_text(json.dumps(out, indent=1) + "\n")
    print(f"written: {path}; default at most {GOAL} above the best of the grid: {out['met']} of {len(order)} settings")


def met(row):
    above = row["rules"]["default"]["above_best"]
    return above is not None and above <= GOAL


def noise_only(names):
    """Measures the falls alone, for rows that are stored."""
    path = Path(__file__).parent / "results" / "lr_find.json"
    known = {row["setting"]: row for row in json.loads(path.read_text())["settings"]}
    for setting in settings(names, None):
        known[setting.name]["fall_over_noise"] = setting.falls(range(6))
        print(setting.name, known[setting.name]["fall_over_noise"], flush=True)
    store(known.values())


def main():
    smoke, names = "--smoke" in sys.argv, [a for a in sys.argv[1:] if not a.startswith("--")]
    warnings.simplefilter("ignore")
    rows = []
    if "--noise" in sys.argv: noise_only(names); return
    for setting in settings(names, 20 if smoke else None):
        rows.append(measure(setting, GRID[6:9] if smoke else GRID, SEEDS[:1] if smoke else SEEDS))
        print(told(rows[-1]), flush=True)
    print(f"default at most {GOAL} above the best of the grid: {sum(map(met, rows))} of {len(rows)} settings")
    if rows and not smoke: store(rows)


if __name__ == "__main__": main()
