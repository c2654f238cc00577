"""Watching a run's layers: nothing of the training changes, whatever the step is; what was put on comes off; what is kept stays bounded."""
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import On, classes, trainer, weights
from test_browser import BOARD, CHROMIUM, FLAGS, PICTURE, Page, jupyter, notebook
from torch import Tensor, nn
from torch.nn import functional as F

from arc_nb import Trainer
from arc_nb.diagnose.layers import Layer, Layers
from arc_nb.diagnose.probes import Probes, look
from arc_nb.engine.keeping import Checkpoints
from arc_nb.watch.widget import BUNDLE


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    "Time is not asked about, so that a slow machine samples the same steps."
    monkeypatch.setattr("arc_nb.diagnose.probes.FREE", 60.0)


class Wide(nn.Module):
    "Batch norm, dropout, an activation as a module, one as a function, a tied weight, and an unused layer."
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.act, self.drop = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Dropout(0.3)
        self.second, self.back, self.unused, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(3, 3), nn.Linear(16, 3)
        self.back.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.norm(self.first(x))))
        return self.head(torch.tanh(self.back(F.gelu(self.second(x)))))


def wide() -> nn.Module:
    torch.manual_seed(0)
    return Wide()


STEPS: dict[str, dict[str, Any]] = {
    "adamw": {}, "sgd": dict(optimizer=("sgd", {"momentum": 0.9})), "lbfgs": dict(optimizer="lbfgs", lr=0.1),
    "accumulate": dict(accumulate=3), "fp16": dict(precision="fp16"), "clipped": dict(clip_norm=0.05),
    "bf16": dict(precision="bf16"), "l2": dict(l2=1e-3),
    "one_cycle": dict(schedule="one_cycle"), "metrics": dict(train_metrics=["accuracy"]),
}


def fitted(watch: Any, epochs: int = 4, model: nn.Module | None = None, **settings: Any) -> tuple[Trainer, Tensor, np.ndarray]:
    t = trainer(model or wide(), classes(100), valid=classes(40, 1), **settings)
    history = t.fit(epochs=epochs, watch=watch)
    rest = [b.double().reshape(-1) for b in t.model.buffers()]
    return t, torch.cat([weights(t.model).double(), *rest]), history.series("train", "loss")[1]


def same(watch: Any = None, **settings: Any) -> Trainer:
    "Trains with and without; the weights, buffers and losses have to be equal to the bit. The watched trainer."
    _, alone, losses = fitted(False, **settings)
    t, watched, seen = fitted(watch or Probes(share=1.0), **settings)
    assert torch.equal(alone, watched) and np.array_equal(losses, seen)
    assert bare(t)
    return t


def bare(t: Trainer) -> bool:
    "Whether nothing is left of hooks, modes and listeners."
    hooks = [m for m in t.model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]
    return not hooks and t.setup.step.heard is None and torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("name", STEPS)
def test_the_training_is_the_same_to_the_bit(name: str) -> None:
    layers = same(**STEPS[name]).layers
    assert len(layers.steps) >= 4 and {"gradient", "weight", "update", "ratio", "dead", "mean"} <= set(layers.quantities)
    assert ("noise" if name == "accumulate" else "") == ("noise" if len(layers.noise[0]) else "")


def frozen() -> nn.Module:
    model = wide()
    for p in [*model.first.parameters(), model.norm.weight]: p.requires_grad_(False)
    return model


def test_frozen_shared_and_unused_parameters() -> None:
    _, alone, _ = fitted(False, model=frozen())
    t, watched, _ = fitted(Probes(share=1.0), model=frozen())
    layers = t.layers
    gradient, at = dict(zip(layers.names, layers.latest("gradient"))), {layer.name: layer for layer in layers.layers}
    assert torch.equal(alone, watched)
    assert np.isnan(gradient["first"]) and np.isnan(gradient["unused"]) and gradient["norm"] > 0 and not at["first"].trained
    assert gradient["second"] > 0 and gradient["back"] > 0 and at["back"].parameters == 16 * 16 + 16  # the tied weight counts for both
    assert layers.latest("weight")[layers.names.index("first")] > 0
    assert layers.names.index("back") < layers.names.index("head")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses parts of torch that torch calls old
def test_a_compiled_model_trains_the_same_and_its_outputs_are_seen() -> None:
    t = same(compile=True, epochs=2)
    assert t.setup.compute.model is not t.model and {"dead", "mean", "gradient", "ratio"} <= set(t.layers.quantities)
    assert not t.setup.compute.model._forward_pre_hooks


def test_a_compiled_step_trains_the_same_to_rounding() -> None:
    def mlp() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    _, alone, losses = fitted(False, 3, mlp(), compile="step")
    t, watched, seen = fitted(Probes(share=0.5), 3, mlp(), compile="step")
    assert np.abs(losses - seen).max() < 1e-5 and (alone - watched).abs().max() < 1e-4
    assert {"gradient", "update", "dead"} <= set(t.layers.quantities) and bare(t)


def test_custom_steps_containers_and_loops_over_time() -> None:
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.ModuleDict({"a": nn.Linear(4, 4)})
            self.lstm, self.head, self.scale = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(40): x = torch.tanh(self.cells["a"](x))
            return self.head(self.lstm(x[:, None])[0][:, -1]) * self.scale

    def run(watch: Any) -> tuple[Trainer, Tensor]:
        torch.manual_seed(0)
        t = trainer(Cell(), classes(), step=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
        t.fit(epochs=2, watch=watch)
        return t, weights(t.model)

    (_, alone), (t, watched) = run(False), run(Probes(share=1.0))
    layers = t.layers
    assert torch.equal(alone, watched) and set(layers.names) == {"model", "cells.a", "lstm", "head"}
    value = lambda name, layer: layers.latest(name)[layers.names.index(layer)]
    assert value("mean", "lstm") == value("mean", "lstm") and value("gradient", "model") > 0 and value("saturated", "cells.a") >= 0


def test_sparse_gradients_and_half_precision_weights() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (64, 6))
    sparse = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Flatten(), nn.Linear(48, 3))
    t = trainer(sparse, (tokens, tokens[:, 0] % 3), optimizer="sgd")
    t.fit(epochs=1, watch=Probes(share=1.0))
    assert t.layers.latest("gradient")[0] > 0
    x, y = classes()
    half = trainer(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).bfloat16(), (x.bfloat16(), y), optimizer="sgd")
    half.fit(epochs=1, watch=Probes(share=1.0))
    assert np.isfinite(half.layers.latest("ratio")[[0, 2]]).all()


def test_names_choose_what_is_measured() -> None:
    t = trainer(wide(), classes())
    t.fit(epochs=1, watch="gradients")
    assert set(t.layers.quantities) == {"gradient", "nonfinite"} and t.layers.names[0] == "first"
    with pytest.raises(ValueError, match="did you mean 'activations'"): t.fit(epochs=1, watch=["activation"])
    with pytest.raises(ValueError, match="share=2"): Probes(share=2)


@pytest.mark.parametrize("event", ["on_step_start", "on_step_end", "on_epoch_end"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_come_off_after_an_error(event: str, error: type[BaseException]) -> None:
    def fail(t: Trainer) -> None:
        if t.step >= 2: raise error("now")
    t = trainer(wide(), classes(), callbacks=[On(**{event: fail})])
    with pytest.raises(error): t.fit(epochs=5, watch=Probes(share=1.0))
    assert bare(t) and len(t.layers.steps) >= 2


def test_hooks_come_off_after_an_error_inside_the_model_and_a_stop() -> None:
    model = wide()
    t = trainer(model, classes())
    before = model.second.forward

    def broken(x: Tensor) -> Tensor:
        if t.step == 3: raise RuntimeError("in the middle")
        return before(x)

    model.second.forward = broken
    with pytest.raises(RuntimeError, match="in the middle"): t.fit(epochs=5, watch=Probes(share=1.0))
    assert bare(t)
    model.second.forward = before
    threading.Timer(0.05, t.stop).start()
    t.fit(epochs=10_000, watch=True)
    assert bare(t) and t.status.state == "stopped"


def test_a_step_that_is_not_finite_is_seen() -> None:
    class Sick(nn.Module):
        def __init__(self): super().__init__(); self.fc, self.steps = nn.Linear(4, 3), 0
        def forward(self, x: Tensor) -> Tensor:
            self.steps += self.training
            return self.fc(x) * (torch.inf if self.steps == 3 else 1.0)

    t = trainer(Sick(), classes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: t.fit(epochs=1, watch=Probes(share=1.0))
        except FloatingPointError: pass
    assert t.status.state == "failed" or not np.isfinite(t.history.series("train", "loss")[1]).all()
    assert np.isinf(t.layers.values("gradient")).any() and t.layers.values("nonfinite")[-1].max() > 0 and bare(t)


def test_samples_grow_with_the_logarithm_of_the_steps() -> None:
    t = trainer(nn.Linear(4, 3), classes(), batch_size=60)
    t.fit(steps=3000, watch=Probes(share=1.0), log_every=100)
    assert 100 < len(t.layers.steps) <= 64 * (1 + np.log(3000 / 64)) + 2
    assert len(t.layers.histogram("model", "weight")[0]) < 8 * (1 + np.log(3000)) + 8


def test_the_folder_tells_another_process(tmp_path: Path) -> None:
    t = trainer(wide(), classes(), run=tmp_path / "run")
    t.fit(epochs=2, watch=True)
    code = "import sys; from arc_nb.diagnose.layers import Layers; l = Layers.read(sys.argv[1]); print(len(l.steps), *l.names)"
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=True)
    assert told.stdout.split() == [str(len(t.layers.steps)), *t.layers.names]
    for line in (tmp_path / "run" / "layers.jsonl").read_text().splitlines(): json.loads(line)


def test_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    layers = Layers([Layer("a", "Linear", 1)], tmp_path)
    layers.add(1, {"gradient": [1.0]})
    layers.flush()
    with layers.path.open("a") as file: file.write('{"step": 2, "values": {"gradient": [1, 2]}}\n{"step": 3, "val\nnonsense\n')
    with pytest.warns(RuntimeWarning, match="damaged line"): found = Layers.read(tmp_path)
    assert found.steps.tolist() == [1]


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    whole = trainer(wide(), classes(), run=tmp_path / "whole")
    whole.fit(epochs=4, watch=Probes(share=1.0))

    first = trainer(wide(), classes(), run=tmp_path / "run", callbacks=[Checkpoints(every=4, keep_last=5)])
    first.fit(epochs=3, watch=Probes(share=1.0))
    assert first.layers.steps.max() == 12
    again = trainer(wide(), classes(), run=tmp_path / "run", callbacks=[Checkpoints(every=4, keep_last=5)])
    again.fit(epochs=4, resume=tmp_path / "run" / "checkpoints" / "step-00000008", watch=Probes(share=1.0))
    assert torch.equal(weights(whole.model), weights(again.model))
    assert Layers.read(tmp_path / "run").steps.tolist() == again.layers.steps.tolist() == list(range(1, 17))


def test_a_second_fit_goes_on_in_the_same_layers(tmp_path: Path) -> None:
    t = trainer(wide(), classes(), run=tmp_path / "run")
    t.fit(epochs=1, watch=Probes(share=1.0))
    t.fit(epochs=1, watch=Probes(share=1.0))
    assert t.layers.steps.tolist() == list(range(1, 9)) == Layers.read(tmp_path / "run").steps.tolist()


def test_nothing_of_the_model_is_held_after_a_fit() -> None:
    t = trainer(wide(), classes())
    probes = Probes(share=1.0)
    t.fit(epochs=1, watch=probes)
    model = weakref.ref(t.model)
    probes.owner = None  # who it was is known, so that its next fit goes on
    del t
    gc.collect()
    assert model() is None and len(probes.layers.steps) == 4


def test_two_listeners_do_not_meet() -> None:
    t = trainer(wide(), classes(), callbacks=[Probes("gradients", share=1.0)])
    t.fit(epochs=1, watch=Probes("weights", share=1.0))
    assert t.setup.step.heard is None and bare(t)


def test_a_disk_that_refuses_is_told_once(tmp_path: Path) -> None:
    layers = Layers([Layer("a", "Linear", 1)], tmp_path / "gone")
    layers.add(1, {"gradient": [1.0]})
    with pytest.warns(RuntimeWarning, match="kept in memory"): layers.flush()
    layers.flush()
    assert layers.latest("gradient")[0] == 1


def test_one_look_leaves_no_trace() -> None:
    t = trainer(wide(), classes(), precision="bf16")
    before = [b.clone() for b in t.model.state_dict().values()]
    batch = next(iter(t.setup.train.epoch(1)))
    layers = look(t.setup.compute, t.setup.step, [batch, batch])
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.state_dict().values())) and bare(t)
    assert layers.steps.tolist() == [1] and {"gradient", "dead", "weight"} <= set(layers.quantities) and "update" not in layers.quantities
    assert all(p.grad is None for p in t.model.parameters())


LIVE = """\
import torch
from torch import nn
from arc_nb import Trainer
torch.set_num_threads(1); torch.manual_seed(0)
X = torch.randn(4096, 20, generator=torch.Generator().manual_seed(0))
y = (X[:, :3].sum(1) > 0).long()
model = nn.Sequential(*[m for i in range(9) for m in (nn.Linear(20, 20), nn.ReLU())], nn.Linear(20, 2))
with torch.no_grad(): model[6].bias[:10] = -10
t = Trainer(model, (X, y), (X[:512], y[:512]), loss="cross_entropy", metrics=["accuracy"], optimizer="sgd", lr=.1, run="runs/layers")
t.fit(epochs=400, watch=True);"""
MAPS = "() => [...document.querySelectorAll('.arc-board .map canvas')].map(c => {" \
       " const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let n = 0;" \
       " for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n / (d.length / 4) })"


@pytest.mark.browser
@pytest.mark.skipif(not (Path(CHROMIUM).exists() and BUNDLE.exists()), reason="no browser, or the board's bundle has not been built")
@pytest.mark.parametrize("width", [1240, 640])
def test_the_board_shows_the_layers(tmp_path: Path, width: int) -> None:
    from playwright.sync_api import sync_playwright
    out = Path(os.environ.get("BROWSER_OUT") or tempfile.mkdtemp(prefix="arc-browser-"))
    notebook(tmp_path, "layers.ipynb", [LIVE])
    with jupyter(tmp_path) as base, sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        p = Page(chromium, base, width=width, height=1000)
        p.open("layers.ipynb")
        p.command("notebook:run-all-cells")
        p.points(300)
        p.until("() => document.querySelectorAll('.arc-board .map').length === 3")
        p.until(f"() => ({MAPS})().every(share => share > .3)")
        p.page.locator(BOARD).scroll_into_view_if_needed()
        canvas = p.page.locator(".arc-board .map canvas").nth(2)
        canvas.hover(position={"x": 8, "y": 13 * 3 + 6})
        told = p.page.locator(".arc-board .map .tip:not([hidden])").inner_text()
        assert "6 · to step" in told and "%" in told, told
        p.shot(out / f"layers-{width}.png")
        inside = p.page.evaluate("() => { const r = document.querySelector('.arc-board'); return [r.scrollWidth, r.clientWidth] }")
        assert inside[0] <= inside[1]
        p.theme("JupyterLab Dark")
        p.shot(out / f"layers-{width}-dark.png")
        p.command("notebook:interrupt-kernel")
        p.done(0)
        p.page.wait_for_selector(PICTURE, timeout=60_000)
        p.shot(out / f"layers-{width}-end.png", whole=True)
        assert not p.errors, p.errors
        chromium.close()
