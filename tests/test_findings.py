"""What trainer.diagnose() says of broken and healthy models, and that its thresholds hold: a small part of bench/gallery.py."""
import json
import math
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from arc_nb import Callback, Trainer
from arc_nb.diagnose.findings import EXPLAINS, Evidence, Finding, Findings, diagnose, explain
from arc_nb.diagnose.advice import ADVICE, TITLES
from arc_nb.engine.history import History, Status

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def gallery():
    "The module bench/gallery.py."
    sys.path.insert(0, str(ROOT / "bench"))
    try: import gallery
    finally: sys.path.pop(0)
    return gallery


def evidence(train, valid=(), state="completed", step=None, steps=None, lr=1e-3, **status):
    "Of a run with these losses."
    history, n = History(), len(train)
    history.extend(1, "train", list(range(1, n + 1)), {"loss": [float(v) for v in train], "grad_norm": [1.0] * n})
    history.extend(1, "train", [1], {"lr": [lr]})
    history.extend(1, "valid", [n * (k + 1) // len(valid) for k in range(len(valid))], {"loss": [float(v) for v in valid]})
    return Evidence(history, Status(state, step or n, steps or n, **status))


def falling(n=400, to=0.1, after=60, noise=0.05, seed=0):
    return to + (2.3 - to) * np.exp(-np.arange(n) / after) + np.random.default_rng(seed).normal(0, noise, n)


QUICK = ["few rows and wrong labels", "shuffled labels", "lr x 1000 adamw", "lr divided by 1000 adamw", "sigmoid x 20 layers",
         "log of what becomes negative", "relu bias of minus 10",
         "a schedule that ends too soon", "a branch that is never called", "a layer the optimizer never got",
         "head frozen by mistake", "half of valid is in train", "one constant feature of 1e6", "the target among the inputs"]


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_is_the_first_or_second_finding(gallery, name):
    codes, spoil = gallery.BROKEN[name]
    setting = gallery.tabular("digits", 0)
    spoil(setting)
    found = gallery.train(setting, watch=True).diagnose()
    assert set(found.codes[:2]) & set(codes), found.codes
    assert found[0].picture == "" or found[0].picture.startswith("<svg")
    for finding in found:
        assert finding.advice and finding.meaning and all(isinstance(v, (int, float)) for v in finding.evidence.values())
        assert finding.code in TITLES and "{" not in " ".join(finding.advice)


@pytest.mark.parametrize("name", ["mlp adamw", "mlp short", "mlp one cycle", "mlp sgd", "cnn adamw", "lstm adamw"])
def test_a_healthy_model_gets_nothing_severe(gallery, name):
    if name.split()[0] in ("lstm", "small") and not (gallery.DATA / "ETTh1.csv").exists(): pytest.skip(f"{gallery.DATA} holds no ETTh1.csv")
    for setting in gallery.HEALTHY[name](0, "set"):
        found = gallery.train(setting, watch=True).diagnose()
        assert not [f for f in found if f.severity == "severe"], found.codes


@pytest.mark.slow
def test_the_whole_gallery(gallery):
    "The half that the thresholds were not set on."
    rows = [gallery.judge("report", *case) for case in gallery.cases("report", (6,))]
    wrong = [(r["name"], r["table"], r["found"]) for r in rows if r["verdict"] != "right"]
    print(f"{len(rows) - len(wrong)} of {len(rows)} right; wrong: {wrong}")
    assert not [r for r in rows if r["verdict"] == "false"] and len(wrong) <= 0.06 * len(rows)


def test_the_stored_table_says_what_its_rows_say(gallery):
    result = json.loads((ROOT / "bench/results/gallery.json").read_text())
    assert gallery.summary(result["rows"]) == result["summary"]
    known = {(kind, name) for kind, names in (("broken", gallery.BROKEN), ("healthy", gallery.HEALTHY)) for name in names}
    assert {(r["kind"], r["name"]) for r in result["rows"]} == known
    assert {code for row in result["rows"] for code in row["wanted"]} == set(TITLES)  # every code has a fault in the gallery
    assert result["summary"]["report"]["healthy"]["false"] == 0


# ---- every rule keeps silent where it knows nothing ----
@pytest.mark.parametrize("losses", [[], [2.3], [2.3, 2.2], [math.nan], [math.inf, math.nan], [0.0] * 50, [-1.0] * 50, [1e-30] * 50,
                                    [1e30] * 50])
@pytest.mark.parametrize("valid", [(), [1.0], [1.0, math.nan, 2.0], [0.0] * 8])
def test_odd_histories(losses, valid):
    "Short, empty, constant, negative and infinite series: no error, and nothing that is not so."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diagnose(evidence(losses, valid[:max(1, len(losses))] if losses else ()))
    assert all(f.severity in ("severe", "warning", "info") for f in found)
    assert ("nan" in found.codes) == any(not math.isfinite(v) for v in losses)
    found.print_summary(); found._repr_html_(); found.frame()


def test_negative_losses_that_fall_are_no_fault():
    "A likelihood: what share is learned is unknown, and nothing severe is made of that."
    found = diagnose(evidence(falling() - 5, falling(10, .1, 2, 0) - 5))
    assert not [f for f in found if f.severity == "severe"]


def test_a_run_that_goes_on_is_judged_by_its_plan():
    "The first steps of a long run need not have learned anything; the end of a short one need."
    early = evidence(falling(100, 2.2, 5000, .02), state="training", step=100, steps=5000)
    assert not diagnose(early)
    assert diagnose(evidence(np.random.default_rng(0).normal(2.3, .02, 100))).codes == ["not-learning"]


def test_the_gap_alone_is_no_overfitting():
    "An interpolating model: training loss near zero, validation loss flat."
    valid = [.6, .3, .2, .15, .14, .13, .13, .132, .131, .13, .131, .132]
    assert "overfitting" not in diagnose(evidence(np.abs(falling(400, .001, 40, .0005)), valid)).codes


def test_a_cause_comes_before_its_consequences():
    made = lambda *codes: [Finding(code, "severe", {}, "", ["."]) for code in codes]
    for cause, brings in EXPLAINS.items():
        for consequence in brings:
            found = Findings(explain(made(consequence, cause)))
            told = [cause] if consequence == "lr-too-low" else [cause, consequence]  # a symptom, and bad advice
            assert found.codes == told and all(f.because == cause for f in found[1:])
    assert set(EXPLAINS) | {c for brings in EXPLAINS.values() for c in brings} <= set(TITLES) == set(ADVICE)


# ---- remedies ----
def small(**settings):
    torch.manual_seed(0)
    X = torch.randn(256, 6)
    settings = {"loss": "cross_entropy", "run": False, "board": False, "valid": 0.25} | settings
    return Trainer(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)), (X, (X[:, 0] > 0).long()), **settings)


def test_apply_lowers_the_rate():
    trainer = small(lr=20.0)
    trainer.fit(epochs=4, watch=True)
    first = trainer.diagnose()[0]
    assert first.code == "lr-too-high"
    first.apply()
    assert trainer.lr == pytest.approx(2.0)


def test_apply_takes_a_tenth_of_the_highest_rate_of_a_schedule():
    trainer = small(lr=20.0, schedule="linear")
    trainer.fit(epochs=4, watch=True)
    assert "to 2" in next(f for f in trainer.diagnose() if f.code == "lr-too-high").remedy


def test_apply_clips_restores_and_normalises():
    done = []
    actions = {"clip": lambda limit: done.append(("clip", limit)), "best": lambda: done.append("best"), "lr": lambda lr: done.append(lr)}
    thrown = evidence([2.3] * 40 + [40.0] * 40)
    thrown.history.series_by_name["train", "grad_norm"].value[38] = 500.0
    over = evidence(falling(), [1.2, .6, .5, .7, .9, 1.1, 1.3, 1.5])
    for seen in (thrown, over):
        found = diagnose(seen, actions)
        found[0].apply()
    assert done == [("clip", 1.0), "best"]
    nothing = diagnose(over)[0]
    with pytest.raises(ValueError, match="best checkpoint"): nothing.apply()


def test_normalise_puts_a_scaling_in_front():
    torch.manual_seed(0)
    X = torch.randn(200, 3) * torch.tensor([1.0, 1e4, 1.0]) + torch.tensor([0.0, 5e4, 0.0])
    trainer = Trainer(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), (X, (X[:, 0] > 0).long()), loss="cross_entropy",
                      run=False, board=False)
    trainer.fit(epochs=2, watch=True)
    first = trainer.diagnose()[0]
    assert first.code == "inputs-not-scaled"
    first.apply()
    assert "inputs-not-scaled" not in Findings(f for f in trainer.diagnose() if f.code == "inputs-not-scaled" and f.since).codes
    trainer.fit(epochs=10)
    assert trainer.history.latest("train_loss") < 0.6


# ---- the surface ----
def test_the_questions_of_the_guides():
    trainer = small()
    trainer.fit(epochs=3, watch=True)
    found = trainer.diagnose()
    assert isinstance(found, list) and isinstance(found.dead_neuron_count(), int) and 0 <= found.avg_utilization() <= 1
    for question in ("has_vanishing_gradients", "has_exploding_gradients", "is_overfitting", "is_underfitting"):
        assert getattr(found, question)() in (True, False)
    found.print_summary()
    assert list(found.frame().columns) == ["code", "severity", "layer", "since", "because", "meaning", "advice", "evidence"]
    assert found.figure().data and found.figure("dark").data
    assert "Looked at the training loss of" in repr(found)


def test_without_activations_there_is_no_count():
    found = diagnose(evidence(falling()))
    for question in (found.dead_neuron_count, found.avg_utilization):
        with pytest.raises(ValueError, match="watch=True"): question()
    with pytest.raises(ValueError, match="by hand"): Findings().figure()


def test_html_is_escaped():
    found = Findings([Finding("nan", "severe", {"a<b": 1}, "<script>alert(1)</script>", ["<b>"], layer="<i>")])
    html = found._repr_html_()
    assert "<script>" not in html and "<b>:" not in html and "&lt;script&gt;" in html and "layer &lt;i&gt;" in html


def test_diagnosing_while_training_and_after_changes_nothing():
    def end(look):
        class Look(Callback):
            def on_epoch_end(self, trainer):
                if look: trainer.diagnose()
        trainer = small(callbacks=[Look()])
        trainer.fit(epochs=3, watch=True)
        if look: trainer.diagnose()
        trainer.fit(epochs=2)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    assert torch.equal(end(True), end(False))


def test_nothing_was_trained():
    assert diagnose(Evidence(History(), Status())) == []
    assert "not been trained" in diagnose(Evidence(History(), Status())).headline
