"""A gallery of broken models, one fault each, beside healthy ones: what trainer.diagnose() calls them. Real data: scikit-learn's digits,
wine, breast_cancer and diabetes, and from ARC_NB_DATA ETTh1 and tiny Shakespeare. Thresholds were set on one half of tables and seeds
("set"), and are reported on the other ("report"). A fault is right where the first or the second finding names it, a healthy model where
nothing severe is found.

usage: python bench/gallery.py [--smoke]   writes bench/results/gallery.json (not with --smoke)
"""
import copy
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from _gpt import Block
from sklearn import datasets
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from arc_nb import Trainer
from arc_nb.diagnose.curves import rise_of, risen
from arc_nb.diagnose.inside import profile, thirds, worst
from arc_nb.diagnose.signs import path, update_ratio

torch.set_num_threads(1)
DATA = Path(os.environ.get("ARC_NB_DATA", Path(__file__).parents[2] / "shared/data"))
HALVES = {"set": (("digits", "diabetes"), (0, 1)), "report": (("wine", "breast_cancer", "oil"), (12, 13))}
# Four reports came before, and something was changed after each: hence fresh seeds, and the table oil from the second on.
EARLIER = [{"tables": ["wine", "breast_cancer"], "seeds": [2, 3], "broken": {"right": 111, "missed": 11},
            "healthy": {"right": 60, "false": 0},
            "changed": "the rule not-learning; weight decay and two columns, which had done no harm, became others"},
           {"tables": ["wine", "breast_cancer", "oil"], "seeds": [4, 5], "broken": {"right": 173, "missed": 7},
            "healthy": {"right": 84, "false": 0},
            "changed": "noisy-validation measures the noise with heavy tails; a strong dropout, which did no harm, was left out"},
           {"tables": ["wine", "breast_cancer", "oil"], "seeds": [6, 7], "broken": {"right": 171, "missed": 3},
            "healthy": {"right": 81, "false": 3},
            "changed": "overfitting: whether the accuracy held is judged by what it had gained, not by a hundredth"},
           {"tables": ["wine", "breast_cancer", "oil"], "seeds": [8, 9], "broken": {"right": 172, "missed": 2},
            "healthy": {"right": 84, "false": 0},
            "changed": "nothing below a hundred steps is severe because it has not learned yet; the code constant-target"},
           {"tables": ["wine", "breast_cancer", "oil"], "seeds": [10, 11], "broken": {"right": 177, "missed": 3},
            "healthy": {"right": 84, "false": 0},
            "changed": "overfitting tells a wide gap too, not-learning losses that are flat from the first validation on"}]


# ---- data -------------------------------------------------------------------------------------------------------------------------------
@dataclass
class Table:
    "Rows, standardised as a sensible person would; `raw` as they came."
    X: torch.Tensor
    y: torch.Tensor
    loss: str
    out: int
    raw: torch.Tensor
    images: bool = False


@lru_cache
def table(name: str, half: str = "set") -> Table:
    "A table of scikit-learn, a part of it for the two halves where the name says so."
    if name == "images":  # 0 to 4 in one half, 5 to 9 in the other
        X, y = datasets.load_digits(return_X_y=True)
        keep = (y < 5) == (half == "set")
        X, y = X[keep], y[keep] % 5
    elif name == "oil":  # ETTh1 as a table: the oil temperature of an hour from its six loads
        rows = np.loadtxt(DATA / "ETTh1.csv", delimiter=",", skiprows=1, usecols=range(1, 8), max_rows=6000)[::6]
        X, y = rows[:, :6], rows[:, 6]
    else: X, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    raw = torch.tensor(X, dtype=torch.float32)
    spread = raw.std(0)
    scaled = (raw - raw.mean(0)) / torch.where(spread > 0, spread, 1.)
    if name in ("digits", "images"): scaled = raw / 16
    if name in ("diabetes", "oil"):
        target = torch.tensor(y, dtype=torch.float32)
        return Table(scaled, (target - target.mean()) / target.std(), "mse", 1, raw)
    if name == "images": scaled = scaled.view(-1, 1, 8, 8)
    return Table(scaled, torch.tensor(y), "cross_entropy", int(y.max()) + 1, raw, name == "images")


@lru_cache
def windows(half: str, rows: int = 1500, size: int = 24) -> Table:
    "ETTh1: the oil temperature (set) or the useful load (report), the next hour from the last 24."
    column = {"set": 7, "report": 1}[half]
    series = torch.tensor(np.loadtxt(DATA / "ETTh1.csv", delimiter=",", skiprows=1, usecols=column, max_rows=4000), dtype=torch.float32)
    series = (series - series.mean()) / series.std()
    cut = series.unfold(0, size + 1, 1)[:2 * rows:2]
    return Table(cut[:, :-1, None].contiguous(), cut[:, -1].contiguous(), "mse", 1, cut)


@lru_cache
def letters(half: str, rows: int = 1600, size: int = 32) -> Table:
    "Tiny Shakespeare: windows from its first half (set) or its second (report)."
    text = (DATA / "tinyshakespeare.txt").read_text()
    code = {c: i for i, c in enumerate(sorted(set(text)))}
    start = 0 if half == "set" else len(text) // 2
    ids = torch.tensor([code[c] for c in text[start:start + rows * (size + 1)]]).view(rows, size + 1)
    return Table(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), "cross_entropy", len(code), ids)


def split(t: Table, seed: int, share: float = 0.25) -> tuple[Any, Any]:
    "Train and valid, drawn by the seed."
    order = torch.randperm(len(t.X), generator=torch.Generator().manual_seed(seed))
    cut = int(len(order) * (1 - share))
    y = t.y[:, None] if t.loss == "mse" else t.y
    return (t.X[order[:cut]], y[order[:cut]]), (t.X[order[cut:]], y[order[cut:]])


# ---- models -----------------------------------------------------------------------------------------------------------------------------
def mlp(inputs: int, out: int, width: int = 64, depth: int = 2, act: type[nn.Module] = nn.ReLU, drop: float = 0,
        norm: bool = False) -> nn.Sequential:
    "Depth hidden layers."
    layers: list[nn.Module] = []
    for k in range(depth):
        layers.append(nn.Linear(inputs if k == 0 else width, width))
        layers += [nn.BatchNorm1d(width)] * norm + [act()] + [nn.Dropout(drop)] * bool(drop)
    return nn.Sequential(*layers, nn.Linear(width, out))


def cnn(out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
                         nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, out))


class Recurrent(nn.Module):
    "The last output of an LSTM, or of another recurrent layer, and a linear head."
    def __init__(self, kind: Callable = nn.LSTM, width: int = 24):
        super().__init__()
        self.cell, self.head = kind(1, width, batch_first=True), nn.Linear(width, 1)
    def forward(self, x): return self.head(self.cell(x)[0][:, -1])


class GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int = 48, layers: int = 2, heads: int = 4, context: int = 32):
        super().__init__()
        self.token, self.place = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
    def forward(self, tokens): return self.head(self.norm(self.blocks(self.token(tokens) + self.place)))


class Log(nn.Module):
    "Was right as long as the numbers were above -1."
    def forward(self, x): return torch.log(1 + x)


class Dropped(nn.Module):
    "Dropout that somebody wrote as a function, and that is on in evaluation too."
    def __init__(self, share: float): super().__init__(); self.share = share
    def forward(self, x): return F.dropout(x, self.share)


class Branched(nn.Module):
    "A branch that was built and never called."
    def __init__(self, body: nn.Module, inputs: int):
        super().__init__()
        self.body, self.extra = body, mlp(inputs, 8)
    def forward(self, x): return self.body(x)


class Rows(Dataset):
    "Rows that come one by one, from a slow disk where it takes seconds."
    def __init__(self, data, seconds: float = 0.): self.data, self.seconds = data, seconds
    def __len__(self): return len(self.data[0])
    def __getitem__(self, k):
        if self.seconds: time.sleep(self.seconds)
        return self.data[0][k], self.data[1][k]


class Sampled(Dataset):
    "A few other rows each time that it is read."
    def __init__(self, data, rows: int, seed: int): self.data, self.rows, self.rng = data, rows, np.random.default_rng(seed)
    def __len__(self): return self.rows
    def __getitem__(self, k): k = int(self.rng.integers(len(self.data[0]))); return self.data[0][k], self.data[1][k]


# ---- cases ------------------------------------------------------------------------------------------------------------------------------
@dataclass
class Setting:
    "What a case is made of, before it is spoiled."
    name: str
    t: Table
    seed: int
    half: str = "set"
    train: Any = None
    valid: Any = None
    model: nn.Module = field(default_factory=nn.Identity)
    trainer: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=lambda: {"epochs": 12})

    @property
    def inputs(self) -> int: return self.t.X.shape[1]
    @property
    def rng(self) -> torch.Generator: return torch.Generator().manual_seed(1000 + self.seed)
    def epochs(self, steps: int, batch: int = 32) -> int: return max(3, round(steps / math.ceil(len(self.train[0]) / batch)))


def tabular(name: str, seed: int, half: str = "set") -> Setting:
    "A table with its MLP, as a sensible person would train it; diabetes has few and noisy rows, so a small one that stops in time."
    s = Setting(name, table(name, half), seed, half)
    s.train, s.valid = split(s.t, seed)
    torch.manual_seed(seed)
    if not s.t.images: s.model = mlp(s.inputs, s.t.out)
    s.trainer = {"loss": s.t.loss, "lr": 1e-3, "batch_size": 32, "seed": seed, "metrics": ["accuracy"] if s.t.loss != "mse" else ()}
    s.fit = {"epochs": s.epochs(400)}
    if name == "diabetes": s.model, s.fit = mlp(s.inputs, 1, 16), {"epochs": s.epochs(200)}
    return s


def series(seed: int, half: str) -> Setting:
    "An LSTM on windows, cut in time."
    t = windows(half)
    s = Setting("ETTh1", t, seed, half, (t.X[:1100], t.y[:1100, None]), (t.X[1112:], t.y[1112:, None]))
    torch.manual_seed(seed)
    s.model = Recurrent()
    s.trainer, s.fit = {"loss": "mse", "lr": 3e-3, "batch_size": 32, "seed": seed}, {"epochs": 8}
    return s


def text(seed: int, half: str) -> Setting:
    "A small GPT on letters."
    t = letters(half)
    s = Setting("Shakespeare", t, seed, half, (t.X[:1400], t.y[:1400]), (t.X[1400:], t.y[1400:]))
    torch.manual_seed(seed)
    s.model = GPT(t.out)
    s.trainer, s.fit = {"loss": "cross_entropy", "lr": 2e-3, "batch_size": 32, "seed": seed}, {"epochs": 4}
    return s


def images(seed: int, half: str) -> Setting:
    "A CNN on the digits as pictures."
    s = tabular("images", seed, half)
    torch.manual_seed(seed)
    s.model = cnn(s.t.out)
    return s


BROKEN: dict[str, tuple[tuple[str, ...], Callable[[Setting], Any]]] = {}  # name -> (codes that name it, what spoils a setting)
HEALTHY: dict[str, Callable[[int, str], list[Setting]]] = {}  # name -> settings of a half and a seed

def broken(*codes: str):
    def register(spoil): BROKEN[spoil.__name__.replace("_", " ")] = (codes, spoil); return spoil
    return register


@broken("overfitting")
def few_rows_and_wrong_labels(s):
    n, g = 48, s.rng
    X, y = s.train[0][:n], s.train[1][:n].clone()
    wrong = torch.randperm(n, generator=g)[:n // 3]
    other = torch.randint(0, s.t.out, (len(wrong),), generator=g)
    y[wrong] = y[wrong][torch.randperm(len(wrong), generator=g)] if s.t.loss == "mse" else other
    s.train, s.model, s.fit = (X, y), mlp(s.inputs, s.t.out, 256), {"epochs": 150}
    s.trainer["batch_size"] = 16

@broken("underfitting", "not-learning")
def two_weak_columns(s):
    target = F.one_hot(s.train[1]).float() if s.t.loss != "mse" else s.train[1]
    X = s.train[0]
    strength = torch.nan_to_num(torch.corrcoef(torch.cat([X, target], 1).T)[:X.shape[1], X.shape[1]:].abs().amax(1))
    weak = (strength - strength.max() / 3).abs().argsort()[:2]  # a third of the correlation of the best
    s.train, s.valid, s.model = (X[:, weak], s.train[1]), (s.valid[0][:, weak], s.valid[1]), mlp(2, s.t.out, 16, 1)
    s.trainer["lr"], s.fit = 5e-3, {"epochs": s.epochs(800 if s.name == "digits" else 400)}

@broken("underfitting", "lr-too-low")
def stopped_after_two_epochs(s):
    s.trainer |= {"optimizer": ("sgd", {"momentum": .9}), "lr": 1e-2 if s.t.loss != "mse" else 1e-3}
    s.fit = {"epochs": 2}

@broken("not-learning")
def shuffled_labels(s): s.train = (s.train[0], s.train[1][torch.randperm(len(s.train[1]), generator=s.rng)])

@broken("constant-target")
def one_target_for_all(s): s.train, s.valid = ((X, y[:1].expand_as(y).clone()) for X, y in (s.train, s.valid))

@broken("not-learning")
def inputs_that_are_noise(s):
    g = s.rng
    s.train, s.valid = ((torch.randn(X.shape, generator=g), y) for X, y in (s.train, s.valid))

@broken("lr-too-high")
def lr_x_1000_adamw(s): s.trainer["lr"] = 1.

@broken("lr-too-high")
def lr_x_1000_sgd(s): s.trainer |= {"optimizer": ("sgd", {"momentum": .9}), "lr": 50.}

@broken("lr-too-high")
def lr_x_100_adamw(s): s.trainer["lr"] = .1 if s.name == "digits" else .3

@broken("lr-too-low")
def lr_divided_by_1000_adamw(s): s.trainer["lr"] = 1e-6

@broken("lr-too-low")
def lr_divided_by_1000_sgd(s): s.trainer |= {"optimizer": ("sgd", {"momentum": .9}), "lr": 5e-5}

@broken("vanishing-gradients")
def sigmoid_x_20_layers(s): s.model = mlp(s.inputs, s.t.out, 64, 20, nn.Sigmoid)

@broken("vanishing-gradients")
def tanh_with_small_weights_x_15_layers(s):
    s.model = mlp(s.inputs, s.t.out, 64, 15, nn.Tanh)
    with torch.no_grad():
        for p in s.model.parameters(): p.mul_(.3)

@broken("exploding-gradients")
def weights_x_4_in_12_layers(s):
    s.model = mlp(s.inputs, s.t.out, 64, 12)
    with torch.no_grad():
        for layer in s.model:
            if isinstance(layer, nn.Linear): nn.init.kaiming_normal_(layer.weight).mul_(4)

@broken("dead-units")
def relu_bias_of_minus_10(s):
    with torch.no_grad(): s.model[2].bias.fill_(-10)

@broken("saturation")
def tanh_with_weights_x_50(s):
    s.model = mlp(s.inputs, s.t.out, 64, 3, nn.Tanh)
    with torch.no_grad():
        for layer in s.model[:-1]:
            if isinstance(layer, nn.Linear): layer.weight.mul_(50)

@broken("nan")
def log_of_what_becomes_negative(s):
    s.model = nn.Sequential(nn.Linear(s.inputs, 32), nn.Tanh(), nn.Linear(32, 16), Log(), nn.Linear(16, s.t.out))
    with torch.no_grad(): s.model[2].weight.mul_(.3)
    s.trainer["lr"] = 5e-3

@broken("nan")
def a_missing_value_in_the_inputs(s):
    X = s.train[0].clone(); X[-3:, 0] = math.nan  # read item by item: rows in memory are checked before the start
    s.train = Rows((X, s.train[1]))
    s.trainer["shuffle"] = False

@broken("plateau")
def a_schedule_that_ends_too_soon(s):
    s.fit = {"epochs": s.epochs(800)}
    s.trainer["schedule"] = ("exponential", {"rate": .98, "per": "step"})

@broken("noisy-validation")
def dropout_that_stays_on_and_20_rows(s):
    s.model, s.valid = nn.Sequential(*s.model[:-1], Dropped(.8), s.model[-1]), (s.valid[0][:20], s.valid[1][:20])
    s.fit = {"epochs": s.epochs(600)}

@broken("noisy-validation")
def other_six_rows_at_each_validation(s): s.valid = Sampled(s.valid, 6, s.seed); s.fit = {"epochs": s.epochs(600)}

@broken("slow-data")
def rows_from_a_slow_disk(s):
    s.train, s.fit = Rows((s.train[0][:128], s.train[1][:128]), .0005), {"epochs": 20}

@broken("unused-parameters")
def a_branch_that_is_never_called(s): s.model = Branched(s.model, s.inputs)

@broken("unused-parameters")
def a_layer_the_optimizer_never_got(s):
    head = list(s.model[-1].parameters())
    s.trainer["optimizer"] = torch.optim.AdamW([p for p in s.model.parameters() if not any(p is h for h in head)], lr=1e-3)

@broken("frozen-layer")
def head_frozen_by_mistake(s): s.model[-1].requires_grad_(False)

@broken("overlap")
def half_of_valid_is_in_train(s):
    n = len(s.valid[0]) // 2
    s.train = tuple(torch.cat([a, b[:n]]) for a, b in zip(s.train, s.valid))

@broken("class-imbalance")
def one_class_is_3_per_cent(s):
    if s.t.loss == "mse": return False
    def thin(data, share, g):
        few = (data[1] == 0).nonzero().flatten()
        rest = (data[1] != 0).nonzero().flatten()
        size = max(2, int(share * len(rest) / max(1, s.t.out - 1)))
        keep = torch.cat([few[:size], rest])
        return data[0][keep], data[1][keep]
    s.train, s.valid = thin(s.train, .03, s.rng), thin(s.valid, .03, s.rng)

@broken("inputs-not-scaled")
def one_constant_feature_of_1e6(s):
    put = lambda X: torch.cat([X, torch.full((len(X), 1), 1e6)], 1)
    s.train, s.valid, s.model = (put(s.train[0]), s.train[1]), (put(s.valid[0]), s.valid[1]), mlp(s.inputs + 1, s.t.out)

@broken("inputs-not-scaled")
def one_feature_in_other_units(s):
    def put(X): X = X.clone(); X[:, 2] = X[:, 2] * 1e4 + 3e4; return X
    s.train, s.valid = (put(s.train[0]), s.train[1]), (put(s.valid[0]), s.valid[1])

@broken("leak")
def the_target_among_the_inputs(s):
    put = lambda d: (torch.cat([d[0], d[1].reshape(-1, 1).float()], 1), d[1])
    s.train, s.valid, s.model = put(s.train), put(s.valid), mlp(s.inputs + 1, s.t.out)


@broken("exploding-gradients")
def a_recurrent_layer_that_amplifies(s):
    if s.name not in ("diabetes", "oil"): return False  # once a half: on the series
    other = series(s.seed, s.half)
    s.__dict__.update(other.__dict__)
    s.model = Recurrent(partial(nn.RNN, nonlinearity="relu"))
    with torch.no_grad(): s.model.cell.weight_hh_l0.zero_().add_(torch.eye(24) * 1.5)
    s.trainer["lr"] = 1e-3


def healthy(make): HEALTHY[make.__name__.replace("_", " ")] = make; return make

def each(seed: int, half: str, change: Callable[[Setting], Any] = lambda s: None) -> list[Setting]:
    "The change on every table of a half."
    found = [tabular(name, seed, half) for name in HALVES[half][0]]
    for s in found: change(s)
    return found

@healthy
def mlp_adamw(seed, half): return each(seed, half)
@healthy
def mlp_short(seed, half): return each(seed, half, lambda s: s.fit.update(epochs=3))
@healthy
def mlp_long_until_it_interpolates(seed, half):
    return each(seed, half, lambda s: s.fit.update(epochs=s.epochs(2000)) if s.t.loss != "mse" else None)
@healthy
def mlp_one_cycle(seed, half): return each(seed, half, lambda s: s.trainer.update(lr=1e-2, schedule="one_cycle"))
@healthy
def mlp_sgd(seed, half): return each(seed, half, lambda s: s.trainer.update(lr=.02, optimizer=("sgd", {"momentum": .9})))
@healthy
def mlp_small_lr_and_more_steps(seed, half):
    return each(seed, half, lambda s: (s.trainer.update(lr=2e-4), s.fit.update(epochs=s.epochs(1200))))
@healthy
def mlp_with_dropout(seed, half): return each(seed, half, lambda s: setattr(s, "model", mlp(s.inputs, s.t.out, 128, 2, drop=.3)))
@healthy
def tanh_mlp(seed, half): return each(seed, half, lambda s: setattr(s, "model", mlp(s.inputs, s.t.out, 64, 2, nn.Tanh)))
@healthy
def deep_mlp_with_batch_norm(seed, half): return each(seed, half, lambda s: setattr(s, "model", mlp(s.inputs, s.t.out, 64, 6, norm=True)))
@healthy
def gelu_mlp_cosine(seed, half):
    def change(s): s.model = mlp(s.inputs, s.t.out, 96, 3, nn.GELU); s.trainer |= {"schedule": "warmup_cosine", "lr": 2e-3}
    return each(seed, half, change)
@healthy
def linear_model(seed, half):
    def change(s): s.model = nn.Linear(s.inputs, s.t.out); s.trainer["lr"] = 1e-2
    return each(seed, half, change)
@healthy
def fine_tuned_head(seed, half):
    def change(s):
        first = Trainer(s.model, s.train, s.valid, **quiet(s))
        first.fit(**s.fit)
        s.model = copy.deepcopy(first.model)
        s.model[:2].requires_grad_(False)
        s.trainer["lr"] = 3e-4
        s.fit = {"epochs": 5}
    return each(seed, half, change)
@healthy
def cnn_adamw(seed, half): return [images(seed, half)]
@healthy
def cnn_one_cycle_sgd(seed, half):
    s = images(seed, half); s.trainer |= {"lr": .1, "schedule": "one_cycle", "optimizer": ("sgd", {"momentum": .9})}
    return [s]
@healthy
def lstm_adamw(seed, half): return [series(seed, half)]
@healthy
def lstm_clipped_and_long(seed, half): s = series(seed, half); s.trainer["clip_norm"] = 1.; s.fit = {"epochs": 20}; return [s]
@healthy
def small_gpt(seed, half): return [text(seed, half)]
@healthy
def small_gpt_warmup_cosine(seed, half):
    s = text(seed, half); s.trainer |= {"schedule": "warmup_cosine", "clip_norm": 1., "lr": 4e-3}
    return [s]


def quiet(s: Setting) -> dict[str, Any]: return s.trainer | {"run": False, "board": False, "device": "cpu"}

def cases(half: str, seeds: tuple[int, ...]):
    "(kind, name, codes that name it, setting) of a half."
    for seed in seeds:
        for name, (codes, spoil) in BROKEN.items():
            for tab in HALVES[half][0]:
                s = tabular(tab, seed, half)
                if spoil(s) is not False: yield "broken", name, codes, s
        for name, make in HEALTHY.items():
            for s in make(seed, half): yield "healthy", name, (), s


def train(s: Setting, **more: Any) -> Trainer:
    "Trains in silence; a run that ends with NaN has said so in its status."
    torch.manual_seed(s.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(s.model, s.train, s.valid, **quiet(s))
        trainer.fit(**s.fit, **more)
    return trainer


def measured(trainer: Trainer) -> dict[str, float]:
    "The numbers that the thresholds divide."
    seen = trainer.diagnose().seen
    ratio, valid = update_ratio(seen), seen.valid
    gain = (max(seen.base, valid.start) - valid.values.min() if len(valid) else math.nan) or math.nan
    found = {"update_ratio": np.nanmax(ratio, initial=0), "path": path(seen), "rise": risen(seen)[0], "profile": thirds(profile(seen)[1]),
             "dead": worst(seen, "dead")[1], "saturated": worst(seen, "saturated")[1], "learned": seen.learned,
             "start": seen.train.start / max(seen.base, 1e-12), "lost": rise_of(valid)[0] / gain, "tremor": valid.tremor / gain}
    return {name: float(f"{value:.3g}") for name, value in found.items() if np.isfinite(value)}


def judge(half: str, kind: str, name: str, codes: tuple[str, ...], s: Setting) -> dict[str, Any]:
    "A row of the table: what was found in one run, and whether that is right."
    began = time.process_time()
    trainer = train(s, watch=True)
    found = trainer.diagnose()
    told = [f"{f.severity} {f.code}" + (f" < {f.because}" if f.because else "") for f in found]
    if kind == "broken": verdict = "right" if any(f.code in codes for f in found[:2]) else "missed"
    else: verdict = "false" if any(f.severity == "severe" for f in found) else "right"
    return {"half": half, "kind": kind, "name": name, "wanted": list(codes), "table": s.name, "seed": s.seed, "verdict": verdict,
            "found": told, "measured": measured(trainer), "seconds": round(time.process_time() - began, 2)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    "How many are right, missed and false, a half."
    count = lambda half, kind, verdict: sum(r["half"] == half and r["kind"] == kind and r["verdict"] == verdict for r in rows)
    warned = lambda half: sum(t.startswith("warning") for r in rows if r["half"] == half and r["kind"] == "healthy" for t in r["found"])
    tally = lambda half, kind, verdicts: {v: count(half, kind, v) for v in verdicts}
    return {half: {"broken": tally(half, "broken", ("right", "missed")),
                   "healthy": tally(half, "healthy", ("right", "false")) | {"warnings": warned(half)}} for half in HALVES}


def main() -> None:
    smoke, rows = "--smoke" in sys.argv, []
    halves = {"set": ((), (0,))} if smoke else HALVES
    for half, (_, seeds) in halves.items():
        for kind, name, codes, s in cases(half, seeds):
            if smoke and (s.name not in ("digits", "ETTh1") or (kind == "healthy" and len(rows) % 3)): continue
            rows.append(judge(half, kind, name, codes, s))
            row = rows[-1]
            print(f"{half:7}{kind:8}{name[:40]:41}{s.name:14}{s.seed}  {row['verdict']:7}{', '.join(row['found'][:3])}", flush=True)
    halved = {half: {"tables": list(tables), "seeds": list(seeds)} for half, (tables, seeds) in HALVES.items()}
    out = {"machine": platform.platform(), "torch": torch.__version__, "sklearn": sklearn.__version__, "python": platform.python_version(),
           "halves": halved, "summary": summary(rows), "earlier": EARLIER, "rows": rows}
    print(json.dumps(out["summary"], indent=1))
    if smoke: return
    path = Path(__file__).parent / "results" / "gallery.json"
    lines = ",\n  ".join(json.dumps(r) for r in rows)
    path.write_text(json.dumps(out | {"rows": []}, indent=1).replace('"rows": []', f'"rows": [\n  {lines}\n ]') + "\n")
    print("written:", path)


if __name__ == "__main__": main()
