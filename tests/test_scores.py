"""Scores, curves, importance and reports of tabular models: against scikit-learn, on odd inputs, with a trained model."""

import json
import re
import warnings
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from arc_nb.draw.figures import figure
from arc_nb.draw.panels import sheet
from arc_nb.graph.spec import Graph
from arc_nb.tasks.tabular import curves
from arc_nb.tasks.tabular.evaluation import Evaluation
from arc_nb.tasks.tabular.importance import importance
from arc_nb.tasks.tabular.pictures import PANELS, panel_of, panels_of
from arc_nb.tasks.tabular.report import LEDGER, evaluate, importance_of, uses_of
from arc_nb.tasks.tabular.scores import METRICS, checked, interval, metric_named, scores
from arc_nb.tasks.tabular.training import train


def two(n=400, seed=0, labels=("no", "yes")):
    rng = np.random.default_rng(seed)
    truth = rng.random(n) < 0.3
    return np.where(truth, labels[1], labels[0]), np.clip(rng.normal(np.where(truth, 0.6, 0.35), 0.2), 0, 1)


def several(k, n=500, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, k, n)
    proba = rng.dirichlet(np.ones(k), n) + 1.5 * np.eye(k)[truth] * rng.random((n, 1))
    return truth, proba / proba.sum(1, keepdims=True)


def test_two_classes_as_sklearn():
    truth, p = two()
    y, said, found = truth == "yes", p >= 0.5, scores("binary", truth, p, ["no", "yes"])
    expected = {
        "accuracy": sk.accuracy_score(y, said),
        "precision": sk.precision_score(y, said),
        "recall": sk.recall_score(y, said),
        "f1": sk.f1_score(y, said),
        "auc": sk.roc_auc_score(y, p),
        "average_precision": sk.average_precision_score(y, p),
        "log_loss": sk.log_loss(y, np.clip(p, 2.3e-16, 1 - 2.3e-16)),
        "brier": sk.brier_score_loss(y, p),
        "mcc": sk.matthews_corrcoef(y, said),
        "macro_f1": sk.f1_score(y, said, average="macro"),
        "weighted_f1": sk.f1_score(y, said, average="weighted"),
        "balanced_accuracy": sk.balanced_accuracy_score(y, said),
        "specificity": sk.recall_score(y, said, pos_label=False),
    }
    assert set(found) == set(METRICS["binary"]) == set(expected) | {"calibration_error"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("k", [3, 10, 40])
def test_many_classes_as_sklearn(k):
    truth, p = several(k)
    said, found = p.argmax(1), scores("multi-class", truth, p)
    expected = {
        "accuracy": sk.accuracy_score(truth, said),
        "f1": sk.f1_score(truth, said, average="macro"),
        "precision": sk.precision_score(truth, said, average="macro"),
        "recall": sk.recall_score(truth, said, average="macro"),
        "weighted_f1": sk.f1_score(truth, said, average="weighted"),
        "auc": sk.roc_auc_score(truth, p, multi_class="ovr", labels=range(k)),
        "log_loss": sk.log_loss(truth, p, labels=range(k)),
        "balanced_accuracy": sk.balanced_accuracy_score(truth, said),
        "mcc": sk.matthews_corrcoef(truth, said),
        "brier": ((p - np.eye(k)[truth]) ** 2).sum(1).mean(),
        "average_precision": sk.average_precision_score(np.eye(k)[truth], p, average="macro"),
    }
    assert set(found) == set(expected) | {"macro_f1", "calibration_error"}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name


def test_numbers_as_sklearn():
    rng = np.random.default_rng(0)
    y = rng.normal(50, 10, 300)
    p = y + rng.normal(1, 4, 300)
    found = scores("regression", y, p)
    expected = {
        "mse": sk.mean_squared_error(y, p),
        "rmse": sk.root_mean_squared_error(y, p),
        "mae": sk.mean_absolute_error(y, p),
        "r2": sk.r2_score(y, p),
        "median_ae": sk.median_absolute_error(y, p),
        "mape": sk.mean_absolute_percentage_error(y, p),
        "max_error": sk.max_error(y, p),
        "bias": (y - p).mean(),
        "correlation": np.corrcoef(y, p)[0, 1],
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_calibration_error_by_hand():
    p, y = np.array([0.05, 0.15, 0.95, 0.85, 0.85]), np.array([0, 1, 1, 1, 0])
    assert scores("binary", y, p)["calibration_error"] == pytest.approx((0.05 + 0.85 + 0.05 + abs(1.7 - 1)) / 5)
    c = curves.calibration(checked("binary", y, p))
    assert c.rows.tolist() == [1, 1, 2, 1] and c.came.tolist() == [0, 1, 0.5, 1]


SPELLINGS = [  # labels as a model holds them, the truth as a table may hold it
    ([0, 1], [True, False]),
    ([0, 1], [1.0, 0.0]),
    ([0, 1], ["1", "0"]),
    ([False, True], [1, 0]),
    (["no", "yes"], np.array(["yes", "no"])),
    (["0", "1"], [1, 0]),
    ([0, 1], np.array([1, 0], np.int8)),
    (["no", "yes"], pd.Categorical(["yes", "no"])),
    ([0, 1], pd.Series([1, 0], index=[7, 9])),
]


@pytest.mark.parametrize("labels,truth", SPELLINGS, ids=range(len(SPELLINGS)))
def test_spellings_of_labels(labels, truth):
    assert checked("binary", truth, [0.9, 0.2], labels).target.tolist() == [1, 0]


def test_shapes_of_probabilities():
    for p in ([0.9, 0.2], [[0.9], [0.2]], [[0.1, 0.9], [0.8, 0.2]], np.array([0.9, 0.2], np.float32)):
        assert checked("binary", [1, 0], p).positive == pytest.approx([0.9, 0.2])
    assert checked("regression", [[1.0], [2]], [[3], [4]]).outputs.tolist() == [3, 4]
    rounded = np.full((5, 3), 1 / 3, np.float32)
    assert (checked("multi-class", [0, 1, 2, 0, 1], rounded).outputs.sum(1) == 1).all()


BAD = [
    (("classes", [0], [0.5]), "binary"),
    (("binary", [], []), "at least one row"),
    (("binary", [0, 1], [0.5]), "2 targets and 1 outputs"),
    (("binary", [0, 1], [3.0, -2]), "sigmoid"),
    (("binary", [0, 1], [0.5, np.nan]), "row 1 is not finite"),
    (("binary", [0, None], [0.5, 0.5]), "row 1 is missing"),
    (("binary", [0, 2], [0.5, 0.5]), "row 1 is 2"),
    (("binary", [0, 1], np.full((2, 3), 1 / 3)), "does not fit"),
    (("multi-class", [0, 1], [0.5, 0.5]), "column of probabilities"),
    (("multi-class", [0], [[0.5, 0.2]]), "add up to 0.7"),
    (("multi-class", [0], [[0.5, 0.5]], ["a", "b", "c"]), "3 labels"),
    (("regression", ["x"], [1.0]), "needs numbers"),
    (("regression", [np.inf], [1.0]), "row 0 is inf"),
    (("regression", [1.0], [[1.0, 2]]), "one number a row"),
    (("binary", [[0, 1], [1, 0]], [0.5, 0.5]), r"shape \(2, 2\)"),
]


@pytest.mark.parametrize("given,words", BAD, ids=[w[:20] for _, w in BAD])
def test_what_does_not_fit_is_said(given, words):
    with pytest.raises(ValueError, match=words):
        checked(*given)


def test_names_of_metrics():
    assert [metric_named("binary", n).name for n in ("F1-Score", "roc auc", "AUROC", "torchmetrics.accuracy", "logloss")] == [
        "f1",
        "auc",
        "auc",
        "accuracy",
        "log_loss",
    ]
    with pytest.raises(ValueError, match="Did you mean 'recall'"):
        metric_named("binary", "recal")
    assert list(scores("regression", [1, 2], [1, 2], metrics=["R2", "mse"])) == ["r2", "mse"]


DEGENERATE = {
    "one class": ("binary", [1, 1, 1], [0.2, 0.7, 0.9], ["no", "yes"]),
    "one row": ("binary", [1], [0.7], None),
    "other class": ("binary", [0, 0], [0.2, 0.9], None),
    "constant": ("binary", [0, 1, 1], [0.5, 0.5, 0.5], None),
    "sure": ("binary", [0, 1], [0.0, 1.0], None),
    "sure and wrong": ("binary", [1, 0], [0.0, 1.0], None),
    "absent class": ("multi-class", [0, 1, 1], np.eye(4)[[0, 1, 0]], None),
    "one class of many": ("multi-class", [2, 2], np.eye(3)[[2, 1]], None),
    "one number": ("regression", [3.0], [4.0], None),
    "constant truth": ("regression", [3.0, 3.0], [4.0, 5.0], None),
    "constant output": ("regression", [3.0, 4.0], [4.0, 4.0], None),
    "perfect": ("regression", [1.0, 2.0], [1.0, 2.0], None),
    "zero": ("regression", [0.0, 2.0], [1.0, 2.0], None),
    "huge": ("regression", [1e12, -3e12], [2e12, 1e11], None),
    "tiny": ("regression", [1e-9, 3e-9], [2e-9, 1e-9], None),
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_tests_have_scores_and_pictures(case):
    kind, truth, out, labels = DEGENERATE[case]
    truth = [labels[t] for t in truth] if labels else truth
    found = Evaluation.of(kind, truth, out, labels)
    assert set(found.metrics) == set(METRICS[kind])
    ElementTree.fromstring(found.picture())
    assert not re.search(r'="-?(nan|inf)', found.picture())
    json.dumps({k: v if v == v else None for k, v in found.metrics.items()}, allow_nan=False)
    found.frame(), repr(found), found.interval("rmse" if kind == "regression" else "accuracy", repeats=5)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("theme", ["light", "dark", "auto"])
def test_each_panel_draws_both_ways(kind, theme):
    rng = np.random.default_rng(0)
    given = {
        "binary": two(labels=('<b>&"no"', "a very long name of a class, much too long for a panel")),
        "multi-class": several(12),
        "regression": (rng.normal(size=2000), rng.normal(size=2000)),
    }[kind]
    labels = ['<b>&"no"', "a very long name of a class, much too long for a panel"] if kind == "binary" else None
    answers = checked(kind, *given, labels)
    for name in PANELS[kind]:
        panel = panel_of(answers, name)
        ElementTree.fromstring(sheet([[panel]], theme=theme))
        if theme != "auto":
            assert len(figure(panel, theme).data)
    assert len(sheet([panels_of(answers)], theme=theme)) < 150_000


def test_curves_agree_with_scores():
    truth, p = two(3000)
    a = checked("binary", truth, p, ["no", "yes"])
    found = scores("binary", truth, p, ["no", "yes"])
    r, t = curves.roc(a), curves.thresholds(a, most=10_000)
    assert np.trapezoid(r.tpr, r.fpr) == pytest.approx(found["auc"])
    steps = curves.pr(checked("binary", truth, p, ["no", "yes"]))
    assert (np.diff(steps.recall) >= 0).all()
    at = t.iloc[t.threshold.searchsorted(0.5)]  # the first threshold from one half on calls the same rows
    assert (
        at.f1 == pytest.approx(found["f1"])
        and at.accuracy == pytest.approx(found["accuracy"])
        and at.specificity == pytest.approx(found["specificity"])
    )
    for by in ("f1", "youden", "accuracy"):
        cut = curves.best_threshold(a, by)
        assert t[by].max() == pytest.approx(t.loc[t.threshold == cut, by].iloc[0])
    assert curves.per_class(a, curves.best_threshold(a)).f1[1] == pytest.approx(t.f1.max())


def test_interval_covers():
    "About 95 % of the intervals of repeated tests hold the true accuracy (0.8), as they say."
    rng, held = np.random.default_rng(0), 0
    for _ in range(40):
        right = rng.random(150) < 0.8
        low, high = interval(checked("binary", np.ones(150), np.where(right, 0.9, 0.1)), "accuracy", repeats=60)
        held += low <= 0.8 <= high
    assert 32 <= held <= 40


def test_importance_finds_the_signal_and_leaves_the_frame_alone():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "a": rng.normal(size=400),
            "b": rng.normal(size=400),
            "city": rng.choice(["x", "y"], 400),
            "when": pd.date_range("2024", periods=400),
        }
    )
    before = frame.copy()
    truth = 3 * frame.a + (frame.city == "x")
    model = lambda f: 3 * f.a + (f.city == "x")
    found = importance(model, frame, truth, "regression", repeats=3)
    assert (
        found.columns[0] == "a"
        and found.drops[found.columns.index("b")].tolist() == [0, 0, 0]
        and found.drops[found.columns.index("when")].max() == 0
    )
    pd.testing.assert_frame_equal(frame, before)
    for metric in ("r2", "mae"):
        assert importance(model, frame, truth, "regression", metric=metric, repeats=2).columns[0] == "a"
    assert importance(model, frame, truth, "regression", rows=50).rows == 50
    with pytest.raises(ValueError, match="best at 0"):
        importance(model, frame, truth, "regression", metric="bias")
    with pytest.raises(ValueError, match="3 targets for 400 rows"):
        importance(model, frame, [1, 2, 3], "regression")


GRAPH = """
name: flowers
inputs: {{features: {{dtype: float32, shape: [null, 4], columns: [a, b, c, d]}}}}
graph:
  - {{name: hidden, type: torch.nn.Linear, params: {{in_features: 4, out_features: 12}}, inputs: {{input: features}}}}
  - {{name: act, type: torch.nn.ReLU, inputs: {{input: hidden}}}}
  - {{name: last, type: torch.nn.Linear, params: {{in_features: 12, out_features: 3}}, inputs: {{input: act}}}}
  - {{name: soft, type: torch.nn.Softmax, params: {{dim: -1}}, inputs: {{input: last}}}}
outputs: {{logits: last.output, probabilities: soft.output}}
trainer:
  {{loss: torch.nn.CrossEntropyLoss, target: kind, epochs: 20, batch_size: 16, verbose: false,
   optimizer: {{type: torch.optim.Adam, lr: 0.02}}}}
evaluator: {{metrics: [{metrics}]{more}}}
"""


@pytest.fixture(scope="module")
def iris():
    from sklearn.datasets import load_iris

    data = load_iris(as_frame=True)
    return data.data.set_axis(list("abcd"), axis=1).assign(kind=data.target_names[data.target])


def test_report_of_a_trained_model(iris, tmp_path):
    model = train(Graph.from_yaml(GRAPH.format(metrics="macro_f1, auc", more="")), iris, tmp_path / "flowers", board=False)
    first = evaluate(model, source=iris, shuffles=2)
    assert (
        list(first.metrics)[:2] == ["macro_f1", "auc"]
        and set(first.metrics) == set(METRICS["multi-class"])
        and first.metrics["accuracy"] > 0.8
    )
    assert first.uses == 1 and first.importances["kind"].columns[0] in "cd" and first["kind"].answers.labels == model.labels["kind"]
    said = model.predict(model.part("test", iris))
    assert (said.predicted_class.to_numpy() == np.array(first["kind"].answers.labels, object)[first["kind"].answers.predicted]).all()
    with pytest.warns(UserWarning, match="used before .once on"):
        assert evaluate(model, source=iris).uses == 2
    with pytest.warns(UserWarning, match="2 times, first"):
        evaluate(model, source=iris)
    assert [use["rows"] for use in uses_of(model.folder)] == [22] * 3 and (model.folder / LEDGER).is_file()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = evaluate(model, iris, name="all rows")  # other rows are not noted
    assert own.uses is None and len(uses_of(model.folder)) == 3 and "all rows" in own.picture()
    ElementTree.fromstring(first.picture())
    assert first.figure("roc").data and first.figure("importance").data
    with pytest.raises(ValueError, match="Did you mean 'kind'"):
        importance_of(model, iris, "kin")


def test_evaluator_names_an_output(iris, tmp_path):
    plain = GRAPH.format(metrics="accuracy", more="")
    a = train(Graph.from_yaml(plain), iris, tmp_path / "a", board=False)
    b = train(Graph.from_yaml(GRAPH.format(metrics="accuracy", more=", output_name: probabilities")), iris, tmp_path / "b", board=False)
    assert evaluate(a, iris).metrics == pytest.approx(evaluate(b, iris).metrics)


def test_unknown_metric_and_missing_target(iris, tmp_path):
    model = train(Graph.from_yaml(GRAPH.format(metrics="", more="")), iris, tmp_path / "flowers", board=False)
    with pytest.raises(ValueError, match="no metric for multi-class is called 'rmse'"):
        evaluate(model, iris, metrics=["rmse"])
    with pytest.raises(ValueError, match="no column is called 'kind'"):
        evaluate(model, iris.drop(columns="kind"))
    with pytest.raises(ValueError, match="no rows"):
        evaluate(model, iter([]))
    with pytest.raises(ValueError, match="needs a frame"):
        evaluate(model, iter([iris]), shuffles=2)
    with pytest.raises(ValueError, match="none of the classes"):
        evaluate(model, iris.assign(kind="rose"))
    assert not (model.folder / LEDGER).exists()
