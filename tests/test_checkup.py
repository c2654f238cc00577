"""The checkup: silent on healthy models, told of each fault in its own words, without a trace, within its time."""
import random
import re
import time
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from small import classes, net, trainer, weights
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from arc_nb import Trainer
from arc_nb.diagnose.check import Check
from arc_nb.diagnose.checkup import TITLES, Checkup, asked, checkup
from arc_nb.diagnose.facts import column_names, facts
from arc_nb.diagnose.showing import show_batch
from arc_nb.engine.randomness import random_state
from arc_nb.engine.scaling import Scaling, Standardised

DIGITS = load_digits()
X, Y = (DIGITS.data / 16).astype("float32"), DIGITS.target


def layers(*sizes: int, act: type[nn.Module] = nn.ReLU, end: nn.Module | None = None, seed: int = 0) -> nn.Sequential:
    "A stack of linear layers of its own seed."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = [part for a, b in zip(sizes, sizes[1:]) for part in (nn.Linear(a, b), act())]
    return nn.Sequential(*parts[:-1], *([end] if end else []))


def looked(model: nn.Module | None = None, data: Any = None, valid: Any = None, **settings: Any) -> Checkup:
    "The checkup of a quiet Trainer on digits, or on what is given."
    quiet: dict[str, Any] = {"run": False, "board": False, **({} if "step" in settings else {"loss": "cross_entropy"})}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the optimizer does not hold")
        made = Trainer(model or layers(64, 32, 10), (X, Y) if data is None else data, valid, **quiet | settings)
        return made.checkup()


class Last(nn.Module):
    "An LSTM whose last state is read."
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.LSTM(3, 16, batch_first=True), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor: return self.head(self.inner(x)[0][:, -1])


class Small(nn.Module):
    "A transformer of one block, for characters."
    def __init__(self, words: int = 27) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(words, 32), nn.LayerNorm(32), nn.Linear(32, words)
        self.block = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.block(self.table(x), src_mask=torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1))
        return self.head(self.norm(hidden))


def waves() -> tuple[Tensor, Tensor]:
    "Windows of three sines, and what comes next."
    time = torch.arange(600.0)[:, None] * torch.tensor([0.1, 0.23, 0.37])
    windows = time.sin().unfold(0, 25, 1).transpose(1, 2)
    return windows[:, :24], windows[:, 24, 0]


def text() -> tuple[Tensor, Tensor]:
    "Sentences as numbers, and their next letters."
    letters = "the quick brown fox jumps over the lazy dog and the rain in spain stays mainly in the plain "
    ids = torch.tensor([" abcdefghijklmnopqrstuvwxyz".index(c) for c in letters * 40])
    rows = ids[:3600].reshape(-1, 36)
    return rows[:, :-1], rows[:, 1:]


def table(load: Callable[[], Any]) -> tuple[np.ndarray, np.ndarray]:
    "A standardised table."
    data = load()
    return ((data.data - data.data.mean(0)) / data.data.std(0)).astype("float32"), data.target


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    x, y = table(load_diabetes)
    return x, ((y - y.mean()) / y.std()).astype("float32")


HEALTHY: dict[str, Callable[[], Checkup]] = {
    "mlp": lambda: looked(valid=0.2),
    "sgd": lambda: looked(valid=0.2, optimizer=("sgd", {"momentum": 0.9}), lr=0.05),
    "deep mlp with normalisation": lambda: looked(
        nn.Sequential(*[m for k in range(8) for m in (nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU())], nn.Linear(64, 10)), valid=0.2),
    "cnn": lambda: looked(nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(576, 10)),
                          (X.reshape(-1, 1, 8, 8), Y), 0.2, schedule="one_cycle"),
    "lstm": lambda: looked(Last(), waves(), 0.2, loss="mse", lr=3e-3),
    "transformer": lambda: looked(Small(), text(), 0.2, lr=3e-3, batch_size=8),
    "binary": lambda: looked(layers(30, 32, 1), (lambda x, y: (x, y.astype("float32")))(*table(load_breast_cancer)), 0.2,
                             loss="bce_with_logits", lr=3e-3),
    "regression": lambda: looked(layers(10, 32, 1), diabetes(), 0.2, loss="mse", lr=3e-3),
    "smoothed labels": lambda: looked(loss=("cross_entropy", {"label_smoothing": 0.1}), lr=3e-3),
    "loader": lambda: looked(data=DataLoader(TensorDataset(torch.tensor(X), torch.tensor(Y)), 32, shuffle=True)),
    "accumulated": lambda: looked(accumulate=4, batch_size=16),
    "bf16": lambda: looked(precision="bf16"),
    "penalised": lambda: looked(l2=1.0, l1=0.01),
    "autoencoder": lambda: looked(layers(64, 48, 64), (X, X), loss="mse", lr=3e-3),
    "own step": lambda: looked(nn.Linear(64, 64), (X,), step=lambda model, batch: (model(batch[0]) - batch[0]).square().mean(), lr=1e-2)}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_model_is_left_in_peace(name: str) -> None:
    torch.manual_seed(0)
    found = HEALTHY[name]()
    assert found.passed and not found.of("warning"), repr(found)
    assert [check.name for check in found] == list(TITLES)
    assert found["one-batch"].verdict == "ok" and found["gradients"].verdict == "ok"
    assert not any("error" in check.evidence for check in found), repr(found)


def constant(value: float) -> np.ndarray:
    "The digits with a column of one number."
    return np.c_[X, np.full(len(X), value, "float32")]


def frozen_head() -> nn.Sequential:
    model = layers(64, 32, 10)
    model[2].requires_grad_(False)
    return model


def with_bias(value: float) -> nn.Sequential:
    model = layers(64, 32, 10)
    nn.init.constant_(model[0].bias, value)
    return model


def alike() -> nn.Sequential:
    model = layers(64, 32, 10)
    nn.init.constant_(model[0].weight, 0.05)
    return model


class Unused(nn.Module):
    "A layer that forward forgets."
    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = layers(64, 32, 10), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor: return self.used(x)


class Detached(Unused):
    "The first layer is cut off."
    def forward(self, x: Tensor) -> Tensor: return self.used[2](self.used[:2](x).detach()) + 0 * self.idle.weight.sum()


class Wrong(nn.Module):
    "Changes in place what the backward pass needs."
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x).sigmoid()
        if torch.is_grad_enabled(): out.mul_(2)
        return out


class NaN(nn.Linear):
    "The logarithm of numbers of both signs."
    def forward(self, x: Tensor) -> Tensor: return super().forward(x).log() if self.training else super().forward(x)


RARE = np.r_[np.flatnonzero(Y != 3), np.flatnonzero(Y == 3)[:9]]
ORDER = np.random.default_rng(0).permutation(len(X))
BROKEN: dict[str, tuple[Callable[[], Checkup], str, str, str]] = {  # how, the check that tells, its verdict, a part of what it says
    "labels shuffled": (lambda: looked(data=(X, Y[ORDER])), "labels", "warning", "nothing to do with each other"),
    "one target for two": (lambda: looked(data=(np.r_[X, X], np.r_[Y, (Y + 1) % 10])), "labels", "warning", "another target"),
    "softmax twice": (lambda: looked(layers(64, 32, 10, end=nn.Softmax(1))), "loss", "failed", "softmax itself"),
    "sigmoid twice": (lambda: looked(layers(64, 32, 1, end=nn.Sigmoid()), (X, (Y % 2).astype("float32")), loss="bce_with_logits"),
                      "loss", "failed", "sigmoid itself"),
    "scores for nll": (lambda: looked(loss="nll"), "loss", "failed", "log-probabilities"),
    "classes as numbers": (lambda: looked(layers(64, 32, 1), (X, Y.astype("float32")), loss="mse"), "loss", "warning", "10 different"),
    "relu at the end": (lambda: looked(layers(64, 32, 1, end=nn.ReLU()), (X, X.mean(1) - 0.5), loss="mse"), "loss", "failed", "outside"),
    "too many outputs": (lambda: looked(layers(64, 32, 100)), "loss", "warning", "100 outputs"),
    "large inputs": (lambda: looked(data=(X * 2000, Y)), "initial-loss", "warning", "cannot know"),
    "target far away": (lambda: looked(layers(64, 32, 1), (X, X.mean(1) + 100), loss="mse"), "initial-loss", "warning", "lies far"),
    "pixels to 255": (lambda: looked(data=(X * 255, Y)), "inputs", "warning", "badly scaled"),
    "a column of a million": (lambda: looked(layers(65, 32, 10), (constant(1e6), Y)), "inputs", "warning", "column 64"),
    "inputs that never change": (lambda: looked(data=(X * 0 + 1, Y)), "inputs", "failed", "same in all rows"),
    "one target": (lambda: looked(data=(X, Y * 0)), "target", "failed", "same in all"),
    "a copy of the target": (lambda: looked(layers(65, 32, 10), (np.c_[X, Y / 10].astype("float32"), Y)), "leaks", "warning", "column 64"),
    "text not shifted": (lambda: looked(Small(), (text()[0], text()[0])), "leaks", "failed", "only to copy"),
    "a large target": (lambda: looked(layers(10, 32, 1), (diabetes()[0], diabetes()[1] * 1000), loss="mse"),
                       "target", "warning", "far smaller"),
    "one row at the end": (lambda: looked(nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)), (X[:33], Y[:33])),
                           "lr", "failed", "more than 1 value per channel"),
    "a rare class": (lambda: looked(data=(X[RARE], Y[RARE])), "classes", "warning", "class 3 has 9"),
    "the same rows twice": (lambda: looked(valid=(X[:50], Y[:50])), "splits", "failed", "50 validation rows"),
    "weights alike": (lambda: looked(alike()), "initialisation", "failed", "same number"),
    "a bias of -10": (lambda: looked(with_bias(-10)), "initialisation", "failed", "100% of the units"),
    "20 sigmoids": (lambda: looked(layers(64, *[32] * 20, 10, act=nn.Sigmoid)), "gradients", "warning", "times smaller"),
    "20 sigmoids forward": (lambda: looked(layers(64, *[32] * 20, 10, act=nn.Sigmoid)), "initialisation", "warning", "gets lost"),
    "an unused layer": (lambda: looked(Unused()), "gradients", "warning", "idle.weight"),
    "a detached layer": (lambda: looked(Detached()), "gradients", "warning", "used.0.weight"),
    "a frozen head": (lambda: looked(frozen_head()), "gradients", "warning", "frozen"),
    "an optimizer of half": (lambda: (lambda m: looked(m, optimizer=torch.optim.Adam(m[2].parameters())))(layers(64, 32, 10)),
                             "gradients", "warning", "not in the optimizer"),
    "backward raises": (lambda: looked(Wrong()), "gradients", "failed", "RuntimeError"),
    "nan while training": (lambda: looked(NaN(64, 10)), "gradients", "failed", "not finite"),
    "a rate too small": (lambda: looked(lr=1e-7), "one-batch", "warning", "Adam with"),
    "a rate too large": (lambda: looked(lr=50.0), "one-batch", "warning", "Adam with"),
    "nothing can be learnt": (lambda: looked(with_bias(-1e4)[:2].append(nn.Linear(32, 10)), (X, Y)), "one-batch", "failed", "cannot"),
    "a rate far too small": (lambda: looked(lr=1e-7), "lr", "warning", "suggests"),
    "a rate far too large": (lambda: looked(lr=9.0, optimizer="sgd"), "lr", "warning", "the loss rose")}


@pytest.mark.parametrize("fault", BROKEN)
def test_each_fault_is_told(fault: str) -> None:
    torch.manual_seed(0)
    how, name, verdict, part = BROKEN[fault]
    found = how()
    assert found[name].verdict == verdict and part in found[name].told, repr(found)
    assert found[name].advice or verdict == "ok"


def test_without_a_trace() -> None:
    def run(look: bool) -> tuple[Tensor, list, dict]:
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        model = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 10))
        data = DataLoader(TensorDataset(torch.tensor(X), torch.tensor(Y)), 32, shuffle=True)
        made = Trainer(model, data, (X[:50], Y[:50]), loss="cross_entropy", schedule="one_cycle", run=False, board=False)
        made.fit(steps=5)
        before = (random_state(), made.lr, model.training)
        if look:
            made.checkup()
            assert str((random_state(), made.lr, model.training)) == str(before)
            assert all(p.grad is None for p in model.parameters())
        made.fit(steps=20)
        frame = made.history.frame()
        return weights(model), frame[frame.name.str.contains("loss")].value.tolist(), dict(model.named_buffers())
    (a, history, buffers), (b, other, same) = run(False), run(True)
    assert torch.equal(a, b) and len(history) > 20 and history == other and all(torch.equal(v, same[k]) for k, v in buffers.items())


def test_a_check_that_fails_itself_does_not_stop_the_others() -> None:
    def broken() -> Check: raise RuntimeError("a bug\nwith a second line")
    told = asked("inputs", broken)
    assert told.verdict == "skipped" and told.told == "It could not be checked: RuntimeError: a bug"
    def stopped() -> Check: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): asked("inputs", stopped)

    setup = trainer().setup
    found = checkup(setup.compute, setup.step, setup.train, None, facts(setup.train, None, setup.compute), lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    assert found["lr"].verdict == "skipped" and "ZeroDivisionError" in found["lr"].told and found["memory"].verdict == "ok"


class Slow(nn.Module):
    "A linear layer that takes its time."
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.06)
        return self.inner(x)


def test_the_time_budget_is_kept() -> None:
    setup = trainer(Slow(), lr=1e-6).setup
    known = facts(setup.train, None, setup.compute)
    began = time.perf_counter()
    found = checkup(setup.compute, setup.step, setup.train, None, known, lambda: pytest.fail("there is no time"), budget=1.5)  # type: ignore[arg-type, return-value]
    assert time.perf_counter() - began < 6  # with room for a loaded machine
    assert found["lr"].verdict == "skipped" and "60 steps" in found["lr"].told
    assert found["one-batch"].verdict in ("skipped", "warning")


def test_digits_take_less_than_ten_seconds() -> None:
    began = time.perf_counter()
    looked(valid=0.2)
    assert time.perf_counter() - began < 10


def test_a_compiled_model_is_not_compiled_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(nn.Module):
        "As torch.compile leaves it: calling it would compile."
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

        def forward(self, *_: Any) -> Tensor: raise AssertionError("it was compiled")
    made = trainer(net())
    made.setup.compute.model = Wrapped(made.model)
    setup = made.setup
    found = checkup(setup.compute, setup.step, setup.train, None, facts(setup.train, None, setup.compute))
    assert found.passed and not any("error" in check.evidence for check in found), repr(found)


class Tags(HTMLParser):
    "Whether tags are closed in order."
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag), self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None: assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None: self.seen.add(tag)


def test_the_page_is_sound_and_says_everything() -> None:
    rows = torch.randn(80, 3, generator=torch.Generator().manual_seed(0)).numpy()
    frame = pd.DataFrame(rows, columns=["<b>age</b>", "a & b", "c"])
    frame["<script>"] = (rows[:, 0] > 0) * 1e6
    found = Trainer(nn.Linear(4, 2), (frame, (rows[:, 0] > 0).astype(int)), loss="cross_entropy", run=False, board=False).checkup()
    html, reader = found._repr_html_(), Tags()
    reader.feed(html)
    assert not reader.open and not {"script", "b>age"} & reader.seen and "&lt;script&gt;" in html
    for check in found: assert TITLES[check.name] in html and check.told.split("<")[0][:20] in repr(found)
    assert html.count('class="mark') >= len(found) and "Leaks<span class='say'> (to look at)</span>" in html  # not by colour alone
    assert "prefers-color-scheme:dark" in html and len(html) < 60_000
    assert list(found.frame().name) == list(TITLES) and found["leaks"].verdict == "warning" and "<script>" in found["leaks"].told
    with pytest.raises(KeyError, match="no check is called 'leak'"): found["leak"]
    with pytest.raises(ValueError, match="verdict='bad'"): found.of("bad")


def test_verdicts_and_empty_data() -> None:
    with pytest.raises(ValueError, match="verdict='good'"): Check("a", "good", "b")
    setup = trainer().setup
    setup.train.tensors = [t[:0] for t in setup.train.tensors]
    setup.train.rows = 0
    with pytest.raises(ValueError, match="no batches|nothing to"):
        checkup(setup.compute, setup.step, setup.train, None, facts(trainer().setup.train, None, setup.compute))


torch.manual_seed(0)  # an absolute loss can have a gradient of exactly 0 for a bias, by chance
SHAPES: dict[str, tuple[nn.Module, Any, dict[str, Any]]] = {
    "weighted": (nn.Linear(4, 3), (*classes(), torch.rand(60)), {"loss": "cross_entropy", "weighted": True}),
    "named": (nn.Linear(4, 3), {"input": classes()[0], "y": classes()[1]}, {"loss": "cross_entropy"}),
    "segmentation": (nn.Conv2d(3, 4, 1), (torch.rand(20, 3, 8, 8), torch.randint(0, 4, (20, 8, 8))), {"loss": "cross_entropy"}),
    "labels": (nn.Linear(4, 2), (classes()[0], (classes()[0][:, :2] > 0).float()), {"loss": "bce_with_logits"}),
    "quantiles": (nn.Linear(4, 3), (classes()[0], classes()[0].sum(1, keepdim=True)), {"loss": "quantile"}),
    "variance": (nn.Sequential(nn.Linear(4, 2), nn.Softplus()), (classes()[0], classes()[0].sum(1)), {"loss": "gaussian_nll"}),
    "counts": (nn.Linear(4, 1), (classes()[0], classes()[1].float()), {"loss": "poisson_nll"}),
    "custom loss": (nn.Linear(4, 1), (classes()[0], classes()[0].sum(1, keepdim=True)), {"loss": lambda a, b: (a - b).abs().mean()}),
    "torch loss": (nn.Linear(4, 3), classes(), {"loss": nn.CrossEntropyLoss()}),
    "ragged": (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)), [(torch.arange(n).expand(4, n),) * 2 for n in (5, 7)],
               {"loss": "cross_entropy"}),
    "one row": (nn.Linear(4, 1), (torch.randn(1, 4), torch.randn(1, 1)), {"loss": "mse"}),
    "horizons": (nn.Linear(24, 12), (torch.randn(50, 24), torch.randn(50, 12)), {"loss": "huber"}),
    "lbfgs": (nn.Linear(4, 3), classes(), {"loss": "cross_entropy", "optimizer": "lbfgs", "lr": 1.0}),
    "clipped": (nn.Linear(4, 3), classes(), {"loss": "cross_entropy", "clip_norm": 0.1, "optimizer": "sgd", "lr": 0.1})}


@pytest.mark.parametrize("shape", SHAPES)
def test_any_data_can_be_checked(shape: str) -> None:
    torch.manual_seed(0)
    model, data, settings = SHAPES[shape]
    found = Trainer(model, data, run=False, board=False, **settings).checkup()
    assert not any("error" in check.evidence for check in found), repr(found)
    assert found["gradients"].verdict == "ok" and found["batch"].verdict == "ok", repr(found)


def test_a_picture_of_any_batch() -> None:
    for model, data, settings in SHAPES.values():
        batch = Trainer(model, data, run=False, board=False, **settings).setup.example
        drawn = show_batch(batch)
        assert drawn.startswith("<svg") and len(drawn) < 40_000 and not re.search("nan|None", drawn.split("data:image")[0])


def test_facts_of_overlap_and_names() -> None:
    x, y = classes(200)
    frame = pd.DataFrame(x.numpy(), columns=list("abcd"))
    made = Trainer(net(), (frame, y.numpy()), (frame[:30], y[:30].numpy()), loss="cross_entropy", run=False, board=False)
    found = facts(made.setup.train, made.setup.valid, made.setup.compute, columns=column_names(made.setup.given["train"]))
    assert (found.overlap_rows, found.overlap, found.compared) == (30, 1.0, 200) and [f.name for f in found.inputs] == list("abcd")
    assert found.outputs == 3 and found.absent == [] and found.baseline and abs(found.initial - np.log(3)) < 1e-5  # type: ignore[operator]
    assert made.facts == found  # what the Trainer says


def test_facts_of_many_rows_are_quick() -> None:
    generator = torch.Generator().manual_seed(0)
    data = (torch.randn(12_500, 100, generator=generator), torch.randint(0, 5, (12_500,), generator=generator))
    setup = Trainer(nn.Linear(100, 5), data, 0.2, loss="cross_entropy", run=False, board=False).setup
    began = time.process_time()
    found = facts(setup.train, setup.valid, setup.compute)
    assert time.process_time() - began < 2  # a second on a quiet machine
    assert found.overlap == 0 and not found.leaks and not found.badly_scaled and found.relation and abs(found.relation.sigmas) < 3


def scripted(part: str) -> nn.Module:
    "A model that torch.jit.script has compiled, or a part of it."
    model = layers(64, 32, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if part == "all": return torch.jit.script(model)  # type: ignore[return-value]
        model[0] = torch.jit.script(model[0])
    return model


@pytest.mark.parametrize("part", ["all", "first"])
def test_a_scripted_model_is_checked_like_others(part: str) -> None:
    made = Trainer(scripted(part), (X, Y), 0.2, loss="cross_entropy", run=False, board=False)
    found = made.checkup()
    assert found.passed and not any("error" in check.evidence for check in found), repr(found)
    assert found["gradients"].verdict == found["one-batch"].verdict == "ok", repr(found)
    made.fit(1, watch=True)
    assert made.diagnose() is not None and not made.facts.normalised


def test_what_is_scaled_in_front_counts_as_scaled() -> None:
    wide = torch.tensor(X) * 1000
    model = Standardised(layers(64, 32, 10), {0: Scaling(wide.mean(0), wide.std(0))})
    made = Trainer(model, (wide, Y), loss="cross_entropy", run=False, board=False)
    assert made.facts.normalised and not made.facts.badly_scaled and made.checkup()["inputs"].verdict == "ok"

    def step(model: nn.Module, batch: Any) -> Tensor: return model(batch[0]).square().mean()
    made = Trainer(Standardised(layers(64, 32, 10), {0: Scaling(wide.mean(0), wide.std(0))}), (wide,), step=step, run=False, board=False)
    assert made.facts.normalised and not made.facts.badly_scaled


def test_only_the_input_that_is_scaled_is_forgiven() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor: return self.a(a) + self.b(b)
    x, y = classes()
    scaling = {1: Scaling(torch.zeros(4), torch.full((4,), 1e4))}
    for a, left in ((x, 0), (x * 1e4, 4)):
        found = Trainer(Standardised(Two(), scaling), (a, x * 1e4, y), loss="cross_entropy", run=False, board=False).facts
        assert len(found.badly_scaled) == left and found.normalised == False  # noqa: E712


def spectral() -> nn.Sequential:
    "A network with a parametrised layer."
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(64, 32)), nn.ReLU(), nn.Linear(32, 10))


def test_a_parametrised_layer_is_one_layer() -> None:
    torch.manual_seed(0)
    made = trainer(spectral(), (torch.tensor(X), torch.tensor(Y)))
    before = {k: v.clone() for k, v in made.model.state_dict().items()}
    found = made.checkup()
    assert found.passed and not any("error" in check.evidence for check in found), repr(found)
    assert len(found["initialisation"].evidence["stds"]) == 2  # the layer, not its weight
    assert all(torch.equal(v, before[k]) for k, v in made.model.state_dict().items())


class Mapped(nn.Module):
    "Calls a layer under torch.func.vmap."
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor: return self.last(torch.func.vmap(lambda row: self.first(row).relu())(x))


def jacobian(model: nn.Module, batch: Any) -> Tensor:
    "A loss with a penalty on the derivatives of the outputs."
    slopes = torch.func.vmap(torch.func.jacrev(lambda row: model(row)))(batch[0])
    return nn.functional.cross_entropy(model(batch[0]), batch[1]) + 1e-3 * slopes.square().mean()


def test_models_under_vmap_are_not_blamed_for_it() -> None:
    for found in (looked(Mapped()), looked(layers(64, 32, 10), batch_size=16, step=jacobian)):
        assert found["gradients"].verdict == "ok" and not any("error" in check.evidence for check in found), repr(found)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits"])
def test_shares_are_learnt_by_heart_when_their_entropy_is_reached(loss: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 10)
    y = x[:, :3].softmax(1) if loss == "cross_entropy" else x[:, :3].sigmoid()
    found = looked(layers(10, 16, 3), (x, y), 0.2, loss=loss, lr=1e-2)["one-batch"]
    assert found.verdict == "ok" and found.evidence["floor"] > 0.3, found


def test_streams_of_tokens() -> None:
    count = torch.arange(4000).reshape(400, 10) % 20
    assert looked(Small(20), (count, (count + 1) % 20))["labels"].verdict == "ok"
    noise = torch.randint(0, 9, (300, 24), generator=torch.Generator().manual_seed(0))
    memory = looked(Small(9), (noise, noise.roll(1, 1)))["labels"]
    assert memory.verdict == "ok" and "1 place before" in memory.told
    alone = looked(Small(9), (noise, torch.randint(0, 9, (300, 24), generator=torch.Generator().manual_seed(1))))["labels"]
    assert alone.verdict == "warning" and "no token nearby" in alone.told
    assert looked(Small(400), (torch.arange(400).reshape(40, 10),) * 2)["labels"].verdict == "skipped"


def test_checks_by_name_by_number_and_some_of_them() -> None:
    found = trainer().checkup()
    assert "batch" in found and found[0] in found and "nothing" not in found and 0 not in found
    assert found[0] is found["batch"] and found[-1].name == "memory"
    some = found[:2]
    assert isinstance(some, Checkup) and [check.name for check in some] == list(TITLES)[:2] and "Checkup:" in repr(some)
    with pytest.raises(IndexError): found[99]


def test_small_numbers_and_many_names_are_told_in_good_english() -> None:
    x, y = classes(1000)
    assert looked(net(2), (x[:2], torch.tensor([0, 1])))["classes"].told.startswith("Each of 2 classes has 1 row.")
    both = looked(nn.Linear(3, 1), (torch.cat([x[:, :1] * k for k in (1, 2, 3)], 1), x[:, :1]), loss="mse")["leaks"]
    assert re.match(r"Taken alone, column \d, column \d and column \d each predict a target nearly", both.told) and "them" in both.advice
    one = looked(nn.Linear(1, 1), (x[:, :1], 2 * x[:, :1] + 1), loss="mse")["leaks"]
    assert one.verdict == "ok", one  # there is nothing else to learn from


def test_a_target_that_is_far_too_large_is_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 10)
    found = looked(layers(10, 16, 2), (x, x[:, :2] * 1e5), loss="mse")
    assert "far smaller" in found["target"].told and found["one-batch"].advice.startswith("Standardise the target first"), found


def test_slow_rows_are_read_within_the_time() -> None:
    class Rows(Dataset):
        def __len__(self) -> int: return 3000
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            time.sleep(0.01)
            return torch.randn(4), index % 3
    made = trainer(net(), Rows(), valid=0.2, batch_size=32)
    began = time.perf_counter()
    found = made.checkup()
    assert time.perf_counter() - began < 14  # ten on a quiet machine
    assert found["lr"].verdict == "skipped" and "60 steps" in found["lr"].told


class Shifted(nn.Sequential):
    "What its layers give, and a little less."
    def forward(self, x: Tensor) -> Tensor: return super().forward(x) - 1


def test_the_last_layer_is_the_one_that_gives_the_output() -> None:
    target = X.mean(1) - 0.5  # below 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        end = torch.jit.script(nn.Linear(32, 1))
    for model in (layers(64, 32, end=None).append(nn.ReLU()).append(end), Shifted(*layers(64, 32, 1, end=nn.ReLU()))):
        assert looked(model, (X, target), loss="mse")["loss"].verdict == "ok"
