"""A graph and a table become a model: nothing is learned from rows that judge, and the folder answers as memory did."""
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
import torch

from arc_nb import Trainer
from arc_nb.engine.callbacks import EarlyStopping
from arc_nb.engine.keeping import Checkpoints
from arc_nb.graph.spec import Graph, Prepared, Split, Training
from arc_nb.tables.store import as_frame
from arc_nb.tasks.tabular import source
from arc_nb.tasks.tabular.columns import encode, learn
from arc_nb.tasks.tabular.model import TabularModel
from arc_nb.tasks.tabular.predicting import answers
from arc_nb.tasks.tabular.preparing import Preparation
from arc_nb.tasks.tabular.recipe import IDLE, paired, recipe
from arc_nb.tasks.tabular.rows import Rows, load_parts
from arc_nb.tasks.tabular.source import open_source
from arc_nb.tasks.tabular.splitting import rows_of
from arc_nb.tasks.tabular.targets import Target, fit_target, to_target
from arc_nb.tasks.tabular.training import rehearse, train

ODD = 'x"; DROP TABLE y; --'  # a column may be called anything


def people(rows=240, seed=0):
    """A table with a column of every kind, some of it missing."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({ODD: rng.normal(50, 10, rows), "city": rng.choice(["Rome", "Oslo", "Bonn"], rows),
                          "smokes": rng.choice([True, False], rows),
                          "seen": pd.Timestamp("2023-01-01") + pd.to_timedelta(rng.integers(0, 700, rows), "D"),
                          "note": rng.choice(["chest pain", "no complaint", "headache and fever"], rows),
                          "ward": rng.choice(["a", "b", "c", "d"], rows)})
    frame["sick"] = np.where(frame[ODD] + 10 * (frame.city == "Rome") + rng.normal(0, 3, rows) > 55, "yes", "no")
    frame["cost"] = 1000 + 20 * frame[ODD] + rng.normal(0, 50, rows)
    frame["stage"] = np.digitize(frame[ODD], [45, 55])
    frame.loc[rng.random(rows) < 0.1, ODD] = np.nan
    frame.loc[rng.random(rows) < 0.1, "city"] = None
    return frame


def graph(trainer="", outputs="{logits: score.output}", size=1, last="", preprocessing="", loss="torch.nn.BCEWithLogitsLoss",
          target="sick"):
    """A small network over all kinds of columns."""
    score = f"  - {{name: score, type: torch.nn.Linear, params: {{in_features: 16, out_features: {size}}}, inputs: {{input: act}}}}"
    named = f"loss: {loss}\n  target: {target}" if loss else ""
    return Graph.from_yaml(f"""
inputs:
  features: {{dtype: float32, shape: [null, 20], columns: ['{ODD}', city, smokes, seen, note]}}
  ward: {{dtype: int64, shape: [null, 1], columns: [ward], categorical: true, vocab_size: 5, embedding_dim: 3}}
graph:
  - {{name: all, type: torch.cat, params: {{dim: 1}}, inputs: {{tensors: [features, ward]}}}}
  - {{name: hidden, type: torch.nn.Linear, params: {{in_features: 23, out_features: 16}}, inputs: {{input: all}}}}
  - {{name: act, type: torch.nn.ReLU, inputs: {{input: hidden}}}}
{score if size else ""}
{last}
outputs: {outputs}
trainer:
  {named}
  epochs: 3
  optimizer: {{type: torch.optim.Adam, params: {{lr: 0.01}}}}
{trainer}
preprocessing:
  columns:
    '{ODD}': {{kind: number, size: 2, flag: true}}
    city: {{kind: onehot, size: 4}}
    smokes: {{kind: boolean}}
    seen: {{kind: date, size: 5}}
    note: {{kind: text, size: 8}}
{preprocessing}
""")


def fit(tmp_path, made=None, frame=None, name="m", **more):
    made, frame = graph() if made is None else made, people() if frame is None else frame
    return train(made, frame, tmp_path / name, board=False, say=lambda text: None, **more)


# ---- splits

@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("by, column", [("random", None), ("group", "ward"), ("time", "seen"), ("column", "fold")])
def test_parts_are_whole_and_apart(by, column, seed):
    frame = people(400, seed).assign(ward=lambda t: np.random.default_rng(seed).integers(0, 40, len(t)))
    frame["fold"] = np.random.default_rng(seed).choice(["TRAIN", "val", "Test"], len(frame), p=[0.7, 0.15, 0.15])
    parts = rows_of(Split(by=by, column=column, seed=seed), frame, "sick")
    together = np.concatenate(list(parts.values()))
    assert sorted(together.tolist()) == list(range(400))
    assert all(len(rows) for rows in parts.values()) and all((np.diff(rows) > 0).all() for rows in parts.values())
    if by == "random":
        shares = [(frame.sick[rows] == "yes").mean() for rows in parts.values()]
        assert max(shares) - min(shares) < 0.02 and [len(rows) for rows in parts.values()] == [280, 60, 60]


def test_a_class_of_two_rows_stays_in_training():
    frame = pd.DataFrame({"y": ["a"] * 50 + ["b"] * 48 + ["rare"] * 2})
    for seed in range(10): assert set(rows_of(Split(seed=seed), frame, "y")["train"]) >= {98, 99}


# ---- nothing is learned from rows that judge

def test_other_rows_change_nothing_that_is_learned():
    frame, made = people(), graph()
    parts = Rows.read(made, frame).parts
    before = Preparation.fit(made, frame, parts["train"])
    changed, rest = frame.copy(), np.concatenate([parts["valid"], parts["test"]])
    changed.loc[rest, ODD] = 1e6
    changed.loc[rest, "city"] = "Atlantis"
    changed.loc[rest, "seen"] = pd.Timestamp("2099-01-01")
    changed.loc[rest, "ward"] = "z"
    assert Preparation.fit(made, changed, parts["train"]) == before
    changed.loc[parts["train"][:5], ODD] = 1e6
    assert Preparation.fit(made, changed, parts["train"]) != before


def test_missing_targets_and_duplicates_are_left_out_and_said():
    frame = people(100)
    frame.loc[:9, "sick"] = None
    doubled = pd.concat([frame, frame.iloc[50:60]], ignore_index=True)
    made = graph(preprocessing="  drop_duplicates: true")
    with pytest.warns(UserWarning, match="'sick' is missing in 10 of 110"): parts = Rows.read(made, doubled).parts
    used = np.concatenate(list(parts.values()))
    assert len(used) == 90 and used.min() == 10 and used.max() == 99


# ---- a folder answers as memory did

def test_same_rows_same_numbers(tmp_path):
    frame = people()
    with duckdb.connect() as connection: connection.execute(f"COPY frame TO '{tmp_path}/t.parquet'")
    from_file, from_frame = fit(tmp_path, frame=tmp_path / "t.parquet"), fit(tmp_path, frame=frame, name="n")
    assert all(torch.equal(a, b) for a, b in zip(from_file.module.state_dict().values(), from_frame.module.state_dict().values()))
    assert from_file.metadata["digests"] == from_frame.metadata["digests"]
    new = people(50, seed=9)
    said = from_file.predict(new)
    shuffled = new[[*reversed(new.columns)]].assign(more=1)
    alone = pd.concat([from_file.predict(new.iloc[[k]]) for k in range(50)])
    for other in (TabularModel.load(tmp_path / "m").predict(shuffled), alone, pd.concat(from_file.batches([new[:20], new[20:]]))):
        assert np.allclose(said.probability, other.probability, atol=1e-6) and other.index.equals(new.index)
    assert list(said) == ["prediction", "probability", "predicted_class"] and set(said.predicted_class) <= {"no", "yes"}
    assert from_file.part("test").equals(from_file.part("test", frame)) and len(from_file.part("test")) == 36
    assert len(from_file.predict(new[:0])) == 0


def test_strangers_are_taken_and_nonsense_is_refused(tmp_path):
    model, new = fit(tmp_path), people(5, seed=3)
    strange = new.assign(city="Atlantis", ward="q", note=None, seen=None, smokes=None)
    strange[ODD] = np.nan
    assert np.isfinite(model.predict(strange).probability).all()
    wrong = ((ODD, "old", "is no number"), (ODD, np.inf, "is infinite"), ("seen", "soon", "is no date"), ("smokes", "maybe", "is none of"))
    for column, value, said in wrong:
        bad = new.astype({column: object}).copy()
        bad.loc[3, column] = value
        with pytest.raises(ValueError, match=re.escape(f"column {column!r}, row 3: ") + ".*" + said): model.predict(bad)
    with pytest.raises(ValueError, match="no column .*seen|seen"): model.predict(new.drop(columns="seen"))


def test_the_folder(tmp_path):
    model, folder = fit(tmp_path), tmp_path / "m"
    assert {p.name for p in folder.iterdir()} == {"model.pt", "final_model.pt", "arc_graph.yaml", "metadata.json", "preparation.json",
                                                  "splits.npz", "history.csv", "history.json", "environment.json", "run"}
    about = json.loads((folder / "metadata.json").read_text())
    assert about["task"] == "binary" and about["targets"] == ["sick"]
    assert about["rows"] == {"train": 168, "valid": 36, "test": 36, "left out": 0}
    assert about["status"] == "completed" and 0 < about["metrics"]["valid_accuracy"] <= 1
    assert Graph.from_yaml(folder / "arc_graph.yaml").inputs == model.graph.inputs and len(pd.read_csv(folder / "history.csv")) == 3
    assert sum(map(len, load_parts(folder).values())) == 240
    kept = (folder / "preparation.json").read_text()
    for broken in (kept[:-9], kept.replace('"kind"', '"sort"'), "[]"):
        (folder / "preparation.json").write_text(broken)
        with pytest.raises(ValueError, match="preparation.json is damaged"): TabularModel.load(folder)
    (folder / "preparation.json").write_text(kept)
    (folder / "model.pt").write_bytes((folder / "model.pt").read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="damaged"): TabularModel.load(folder)
    text = (folder / "arc_graph.yaml").read_text()
    (folder / "arc_graph.yaml").write_text(text.replace("_features: 16", "_features: 17"))
    with pytest.raises(ValueError, match="weights are not those"): TabularModel.load(folder, "final")


def test_best_and_last(tmp_path):
    frame = people(80)
    frame["sick"] = np.random.default_rng(0).choice(["no", "yes"], 80)  # nothing to learn: validation gets worse
    model = fit(tmp_path, graph("  early_stopping_patience: 4"), frame, epochs=60, lr=0.05)
    history = pd.read_csv(tmp_path / "m" / "history.csv")
    assert model.metadata["best_epoch"] == history.valid_loss.idxmin() + 1 < len(history) < 60
    last = TabularModel.load(tmp_path / "m", "final")
    assert not torch.equal(last.module.layers._modules["score"].weight, model.module.layers._modules["score"].weight)
    inputs, y = Rows.read(model.graph, frame).tensors(["valid"])["valid"]
    with torch.no_grad(): loss = torch.nn.functional.binary_cross_entropy_with_logits(model.module.eval()(**inputs)[:, 0], y["sick"])
    assert abs(float(loss) - history.valid_loss.min()) < 1e-5


# ---- what the graph says is used, or said to have no effect

USED = {"optimizer": "sgd", "epochs": 2, "batch_size": 7, "validation_split": 0.3, "shuffle": False, "early_stopping_patience": 2,
        "early_stopping_min_delta": 0.5, "early_stopping_monitor": "val_accuracy", "early_stopping_mode": "max", "checkpoint_every": 3,
        "save_best_only": True, "device": "cpu", "gradient_clip_val": 0.5, "gradient_clip_norm": 2.0, "accumulate_grad_batches": 2,
        "log_every": 5, "verbose": False, "seed": 7, "metrics": ["f1", "accuracy"], "target_output_key": "logits", "scheduler": "cosine",
        "mixed_precision": "bf16", "processes": 2, "strategy": "ddp", "class_weights": "balanced",
        "l1": 0.1, "l2": 0.1, "loss": "torch.nn.BCEWithLogitsLoss", "target": "sick", "pretrained_embeddings": "other"}


def test_every_field_is_known_here(): assert set(USED) | set(IDLE) == set(Training.model_fields)


def test_fields_reach_the_trainer():
    apart = ("optimizer", "loss", "target", "pretrained_embeddings", "epochs", "verbose", "log_every")
    said = {k: v for k, v in USED.items() if k not in apart}
    made = graph("\n".join(f"  {k}: {json.dumps(v)}" for k, v in said.items()) + "\n")
    trainer = recipe(made, people(), run="unused", board=False, optimizer="torch.optim.SGD")
    given = trainer.setup.given
    assert isinstance(trainer, Trainer) and type(trainer.optimizer) is torch.optim.SGD
    assert [given[k] for k in ("batch_size", "accumulate", "clip_norm", "clip_value", "l1", "l2")] == [7, 2, 2.0, 0.5, 0.1, 0.1]
    assert (given["seed"], given["device"], given["precision"], given["strategy"], given["shuffle"]) == (7, "cpu", "bf16", "ddp", False)
    assert given["schedule"] == ("cosine", {}) and list(given["metrics"]) == ["f1", "accuracy"] and not trainer.setup.train.shuffle
    stop, keeper = (next(c for c in trainer.callbacks if isinstance(c, kind)) for kind in (EarlyStopping, Checkpoints))
    assert (stop.monitor, stop.patience, stop.min_delta, stop.sign) == ("valid_accuracy", 2, 0.5, 1) and keeper.spec is None
    assert trainer.setup.valid.rows == round(0.3 * 0.85 * 240) and trainer.setup.compute.objective.losses is not None


@pytest.mark.parametrize("field, value", [("num_workers", 2), ("pin_memory", True), ("save_dir", "/tmp/x"), ("reshape_targets", False)])
def test_idle_fields_are_said(field, value):
    made = graph(f"  {field}: {json.dumps(value)}")
    with pytest.warns(UserWarning, match=f"{field}=.*has no effect") as heard: recipe(made, people(), run=False, board=False)
    assert len(heard) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without GPUs")
def test_a_graph_for_gpus_trains_without(tmp_path):
    made = graph("  device: cuda\n  processes: auto\n")
    with pytest.warns(UserWarning) as heard: model = fit(tmp_path, made, epochs=1)
    said = [str(w.message) for w in heard]
    assert any("device='cuda' is not on this machine" in s for s in said) and any("one process trains" in s for s in said)
    assert model.metadata["status"] == "completed"


def test_class_weights_find_more_of_the_rare(tmp_path):
    frame = people(600)
    frame["sick"] = np.where(frame[ODD].fillna(0) + np.random.default_rng(1).normal(0, 8, 600) > 66, "yes", "no")
    found = [fit(tmp_path, graph(f"  class_weights: {w}"), frame, name=f"m{k}", epochs=15) for k, w in enumerate(("null", "balanced"))]
    recalls = [(m.predict(t := m.part("test", frame)).predicted_class[t.sick == "yes"] == "yes").mean() for m in found]
    assert recalls[1] > recalls[0]


# ---- losses, targets, several of them

@pytest.mark.parametrize("loss, last, out", [
    ("torch.nn.BCELoss", "  - {name: p, type: torch.nn.Sigmoid, inputs: {input: score}}", "{probability: p.output}"),
    ("torch.nn.BCEWithLogitsLoss", "", "{logits: score.output}"),
    ("torch.nn.functional.binary_cross_entropy_with_logits", "", "{logits: score.output}")])
def test_binary_losses(tmp_path, loss, last, out):
    model = fit(tmp_path, graph("  class_weights: [1.0, 2.0]", out, last=last, loss=loss), epochs=2)
    assert model.kinds == {"sick": "binary"} and model.predict(people(9)).probability.between(0, 1).all()


@pytest.mark.parametrize("loss, last, out", [
    ("torch.nn.CrossEntropyLoss", "", "{logits: score.output}"),
    ("torch.nn.NLLLoss", "  - {name: p, type: torch.nn.LogSoftmax, params: {dim: 1}, inputs: {input: score}}", "{logp: p.output}")])
def test_class_losses(tmp_path, loss, last, out):
    model = fit(tmp_path, graph("  class_weights: balanced", out, size=3, last=last, loss=loss, target="stage"), epochs=2)
    said = model.predict(people(9))
    assert list(said) == ["predicted_class", "class_0_prob", "class_1_prob", "class_2_prob"]
    assert np.allclose(said.iloc[:, 1:].sum(axis=1), 1, atol=1e-5)
    assert said.predicted_class.dtype.kind == "i"


@pytest.mark.parametrize("loss", ["MSELoss", "L1Loss", "HuberLoss", "SmoothL1Loss"])
def test_quantities_come_back_in_their_unit(tmp_path, loss):
    model = fit(tmp_path, graph("  metrics: [mae, r2]", "{prediction: score.output}", loss=f"torch.nn.{loss}", target="cost"), epochs=40)
    test = model.part("test", people())
    said = model.predict(test)
    assert abs(said.prediction.mean() - 2000) < 100 and list(said) == ["prediction", "confidence_interval_low", "confidence_interval_high"]
    known = said.prediction - test.cost
    assert abs(known.abs().mean() - model.metadata["metrics"]["valid_mae"]) < 60  # both in the unit of the column
    assert ((said.confidence_interval_low <= test.cost) & (test.cost <= said.confidence_interval_high)).mean() > 0.7


def test_a_bounded_output_keeps_its_targets():
    last = "  - {name: p, type: torch.nn.Sigmoid, inputs: {input: score}}"
    made = graph(outputs="{share: p.output}", last=last, loss="torch.nn.MSELoss", target="share")
    goal = Preparation.fit(made, people().assign(share=0.5)).goals["share"]
    assert (goal.shift, goal.scale) == (0.0, 1.0)


SEVERAL = """
  loss:
    - {type: torch.nn.BCEWithLogitsLoss, input: sick, target: sick}
    - {type: torch.nn.MSELoss, input: cost, target: cost, weight: 0.5}
    - {type: torch.nn.L1Loss, input: cost, target: cost, weight: 0.1}
    - {type: torch.nn.CrossEntropyLoss, input: stage, target: stage}
"""


def several():
    """Three heads, one of them with two losses, and an output that no loss reads."""
    heads = [f" - {{name: {name}_head, type: torch.nn.Linear, params: {{in_features: 16, out_features: {n}}}, inputs: {{input: act}}}}"
             for name, n in (("sick", 1), ("cost", 1), ("stage", 3))] + [" - {name: p, type: torch.nn.Sigmoid, inputs: {input: sick_head}}"]
    outputs = "{sick: sick_head.output, cost: cost_head.output, stage: stage_head.output, probability: p.output}"
    return graph(SEVERAL, outputs, 0, "\n".join(f" {head}" for head in heads), loss="")


def test_several_targets(tmp_path):
    lines = []
    model = train(several(), people(), tmp_path / "m", board=False, say=lines.append, epochs=30)
    assert model.task == "multi-task" and model.kinds == {"sick": "binary", "cost": "regression", "stage": "multi-class"}
    test = model.part("test", people())
    said = model.predict(test)
    assert {"sick_probability", "cost_prediction", "cost_confidence_interval_low", "stage_class_2_prob"} <= set(said)
    assert (said.sick_predicted_class == test.sick).mean() > 0.7 and abs(said.cost_prediction - test.cost).mean() < 200
    assert "sick Acc" in lines[0] and "cost MAE" in lines[0] and set(model.outputs(test)) == {"sick", "cost", "stage"}


def test_binary_needs_two_values_and_a_fitting_width():
    with pytest.raises(ValueError, match="has 3 values .*CrossEntropyLoss"): Rows.read(graph(target="stage"), people())
    with pytest.raises(ValueError, match="3 numbers a row"): recipe(graph(size=3), people(), run=False, board=False)
    wide = graph()
    wide.inputs["features"].shape = [None, 21]
    with pytest.raises(ValueError, match=r"say shape: \[null, 20\]"): Rows.read(wide, people())


def test_a_rehearsal_tells_what_will_fail():
    frame = people()
    frame.loc[:3, "sick"] = None
    assert rehearse(graph(), frame).success and rehearse(several(), frame).success
    assert "3 columns" not in str(rehearse(graph(), frame)) and not rehearse(graph(size=3), frame).success
    with pytest.raises(ValueError, match="no column|There is no|no .*'sick'"): rehearse(graph(), frame.drop(columns="sick"))


# ---- runs

def test_console_lines_are_those_of_the_guide(tmp_path):
    heard = []
    train(graph(), people(), tmp_path / "m", board=False, say=heard.append, epochs=2)
    pattern = r"Epoch {}/2:\n  Train Loss: \d\.\d{{4}}  Train Acc: \d\.\d{{4}}\n  Val Loss:   \d\.\d{{4}}  Val Acc:   \d\.\d{{4}}\n"
    assert len(heard) == 2 and all(re.fullmatch(pattern.format(k + 1), text) for k, text in enumerate(heard))


def test_the_seed_decides(tmp_path):
    one, two, other = (fit(tmp_path, name=f"m{k}", seed=seed) for k, seed in enumerate((3, 3, 4)))
    weights = [torch.cat([p.flatten() for p in m.module.state_dict().values()]) for m in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_run_goes_on(tmp_path):
    whole = fit(tmp_path, epochs=4)
    fit(tmp_path, name="half", epochs=2, run=tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # larger total: told, and not what is tested
        again = fit(tmp_path, name="half", epochs=4, run=tmp_path / "run", resume=True)
    assert again.metadata["epochs"] == 4
    for a, b in zip(whole.module.state_dict().values(), again.module.state_dict().values()): assert torch.equal(a, b)


def test_a_stop_keeps_the_work(tmp_path):
    from arc_nb import Callback
    class Stop(Callback):
        def on_epoch_end(self, trainer):
            if trainer.epoch == 2: trainer.stop()
    model = fit(tmp_path, epochs=50, callbacks=[Stop()])
    assert model.metadata["status"] == "stopped" and model.metadata["epochs"] == 2 and len(model.predict(people(5))) == 5


def test_embeddings_of_another_model(tmp_path):
    first = fit(tmp_path, name="first")
    frame = people().assign(ward=lambda t: t.ward.replace({"a": "zeta"}))
    made = graph("  pretrained_embeddings: first")
    with pytest.raises(ValueError, match="give its folder"): fit(tmp_path, made, frame)
    from arc_nb.tasks.tabular.recipe import network
    from arc_nb.tasks.tabular.training import borrow
    module, preparation = network(made, 1), Preparation.fit(made, frame)
    assert borrow(module, preparation, first) == {"ward": 4}  # b, c, d, and what is unknown
    mine, theirs = (m.state_dict()["embeddings.ward.weight"] for m in (module, first.module))
    assert torch.equal(mine[1], theirs[2]) and not torch.equal(mine[4], theirs[1])
    assert fit(tmp_path, made, frame, pretrained=tmp_path / "first").metadata["embeddings_from"] == {"ward": 4}


def test_sample_and_fold_column(tmp_path):
    frame = people().assign(fold=["train"] * 200 + ["test"] * 40)
    with pytest.warns(UserWarning, match="held out"):
        parts = Rows.read(graph(preprocessing="  split: {by: column, column: fold}"), frame).parts
    assert parts["test"].tolist() == list(range(200, 240)) and len(parts["train"]) + len(parts["valid"]) == 200
    assert sum(map(len, Rows.read(graph(preprocessing="  sample: 0.5"), people()).parts.values())) == 120
    early = graph("  early_stopping_patience: 3", preprocessing="  split: {train: 1.0, valid: 0.0, test: 0.0}")
    with pytest.raises(ValueError, match="no rows are for validation"): recipe(early, people(), run=False, board=False)
    alone = fit(tmp_path, graph(preprocessing="  split: {train: 1.0, valid: 0.0, test: 0.0}"))
    assert alone.metadata["rows"]["valid"] == 0 and alone.metadata["best_epoch"] == 3


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot be read as Parquet"): open_source(tmp_path / "t.parquet")
    with pytest.raises(FileNotFoundError): open_source(tmp_path / "none.parquet")


@pytest.mark.slow
def test_two_processes_train_the_same_table(tmp_path):
    model = fit(tmp_path, graph("  processes: 2"), epochs=5)
    assert model.metadata["epochs"] == 5 and model.metadata["metrics"]["valid_accuracy"] > 0.6


@pytest.mark.slow
def test_a_million_rows_need_little_more_than_their_size():
    code = "import sys; sys.path.insert(0, 'bench'); import tabular, json; print(json.dumps(tabular.memory()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["times its size"] <= 1.2


# -- messy tables
def small(columns, rows=60, seed=0):
    """A table of these columns with a target that the first one tells."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({name: make(rng, rows) for name, make in columns.items()})
    return frame.assign(y=np.where(rng.random(rows) < 0.5, "yes", "no"))


def plain_graph(prepared, more=""):
    """A linear network over these columns; the width follows from how they are prepared."""
    width = sum(how.get("size", 1) for how in prepared.values())
    return Graph.from_yaml(f"""
inputs: {{features: {{dtype: float32, shape: [null, {width}], columns: {json.dumps(list(prepared))}}}}}
graph:
  - {{name: score, type: torch.nn.Linear, params: {{in_features: {width}, out_features: 1}}, inputs: {{input: features}}}}
outputs: {{logits: score.output}}
trainer: {{loss: torch.nn.BCEWithLogitsLoss, target: y, epochs: 1{more}}}
preprocessing: {{columns: {json.dumps(prepared)}}}
""")


def parquet(frame, path):
    with duckdb.connect() as connection: connection.execute(f"COPY frame TO '{path}'")
    return path


def test_truths_with_gaps_train_from_a_file(tmp_path):
    table = small({"b": lambda g, n: g.choice([True, False, None], n)})
    model = train(plain_graph({"b": {"kind": "boolean", "size": 2, "flag": True}}), parquet(table, tmp_path / "t.parquet"), tmp_path / "m",
                  board=False, verbose=False)
    assert len(model.part("test")) == 9 and len(model.part("test", table)) == 9  # the frame has the file's digests


def test_a_truth_that_training_never_saw(tmp_path):
    table = small({"b": lambda g, n: np.arange(n) == n - 1})
    graph = plain_graph({"b": {"kind": "boolean", "size": 1}})
    graph.preprocessing.split = Split(by="time", column="when")
    table["when"] = np.arange(len(table))
    model = train(graph, table, tmp_path, board=False, verbose=False)
    assert model.preparation.feeds["features"].columns[0].facts["words"] == ["false", ""]
    found = model.preparation.transform(pd.DataFrame({"b": [True, False, "TRUE", "False", None]}))["features"].reshape(-1).tolist()
    assert found == [1, 0, 1, 0, 0]


def test_empty_columns_are_zeros(tmp_path):
    table = small({"b": lambda g, n: np.full(n, None), "x": lambda g, n: np.full(n, np.nan), "c": lambda g, n: np.full(n, None)})
    graph = plain_graph({"b": {"kind": "boolean", "size": 1}, "x": {"kind": "number", "size": 1}, "c": {"kind": "onehot", "size": 3}})
    table["b"], table["x"] = table.b.astype("boolean"), table.x.astype(float)
    model = train(graph, table, tmp_path, board=False, verbose=False)
    assert model.preparation.transform(table)["features"][:, :2].abs().max() == 0


@pytest.mark.parametrize("size", [1e-19, 1e-6, 1e9, 1e30])
def test_small_and_large_numbers_are_scaled(size):
    x = pd.Series(np.random.default_rng(0).normal(size=200) * size)
    column = learn("x", Prepared(kind="number"), x)
    assert abs(encode(column, x).std() - 1) < 1e-6
    goal = fit_target("x", "regression", x, x)
    assert abs(float(to_target(goal, x).std()) - 1) < 1e-2


@pytest.mark.parametrize("value,why", [(np.inf, "is infinite"), (1e300, "is too large")])
@pytest.mark.parametrize("column", ["x", "cost"])
def test_what_no_network_can_learn_is_named_by_its_row(column, value, why):
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"x": rng.normal(size=100), "cost": rng.normal(size=100)})
    table.loc[57, column] = value
    graph = plain_graph({"x": {"kind": "number", "size": 1}})
    graph = graph.model_copy(update={"trainer": Training(loss="torch.nn.MSELoss", target="cost")})
    with pytest.raises(ValueError, match=rf"row 57: {re.escape(repr(value))} {why}"): Rows.read(graph, table).tensors()


def test_words_of_one_letter_are_words():
    column = learn("grade", Prepared(kind="text", size=32), pd.Series(["A", "B"]))
    found = encode(column, pd.Series(["A", "B", "a", None]))
    assert (found[0] == found[2]).all() and (found[0] != found[1]).any() and found[0].any() and not found[3].any()


def test_hundreds_of_columns_are_read_at_once(tmp_path, monkeypatch):
    wide = pd.DataFrame(np.zeros((20, 400)), columns=[f"c{k}" for k in range(400)])
    asked, real = [], source.asked
    monkeypatch.setattr(source, "asked", lambda query, path: asked.append(query) or real(query, path))
    table = open_source(parquet(wide, tmp_path / "w.parquet"))
    assert table.take(table.names).equals(wide) and len(asked) == 3
    monkeypatch.setattr(source, "SMALL", 10)
    assert open_source(table.path).frame is None


def test_what_is_no_frame_is_refused():
    preparation = Preparation.fit(plain_graph({"x": {"kind": "number", "size": 1}}), small({"x": lambda g, n: g.normal(size=n)}))
    for wrong in ({"x": 1.0}, pd.Series({"x": 1.0}), [1.0]):
        with pytest.raises(TypeError, match="one row is pd.DataFrame"): preparation.transform(wrong)
    with pytest.raises(ValueError, match="several columns called x"):
        preparation.transform(pd.DataFrame([[1.0, 2.0]], columns=["x", "x"]))


@pytest.mark.parametrize("trained,given", [([True, False], [1, 0]), ([True, False], ["TRUE", "False"]), ([1, 0], [True, False]),
                                           ([1, 0], [1.0, 0.0]), (["1", "0"], [True, False])])
def test_a_truth_is_one_and_zero_too(trained, given):
    column = learn("b", Prepared(kind="boolean"), pd.Series(trained * 3))
    assert encode(column, pd.Series(given))[:, 0].tolist() == [1, 0]
    goal = fit_target("b", "binary", pd.Series(trained * 3))
    assert to_target(goal, pd.Series(given)).tolist() == [1, 0]
    with pytest.raises(ValueError, match="row 1: 2 is none of"): to_target(goal, pd.Series([1, 2]))


def test_one_truth_knows_the_other():
    column = learn("b", Prepared(kind="boolean"), pd.Series([False, False]))
    assert encode(column, pd.Series([0, 1, False, True, "false"]))[:, 0].tolist() == [0, 1, 0, 1, 0]


def test_missing_texts_are_missing_as_in_loading():
    column = learn("x", Prepared(kind="number", size=2, flag=True), pd.Series([1.0, 3.0, np.nan]))
    assert encode(column, pd.Series(["1", "", " NA ", "nan", None]))[:, 1].tolist() == [0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="row 1: 'x' is no number"): encode(column, pd.Series(["", "x"]))


def test_labels_that_differ_in_case_fit_a_table():
    found = answers(Target("y", "multi-class", ("Yes", "YES", "yes_2", "yes")), np.full((1, 4), 0.25), prefix="y_")
    assert len({name.casefold() for name in found}) == 5


def test_time_is_no_alphabet():
    day = pd.date_range("2024-08-20", periods=90)
    parts = rows_of(Split(by="time", column="day"), pd.DataFrame({"day": day.strftime("%m/%d/%Y"), "y": 1}))
    assert parts["train"].max() < parts["valid"].min() and parts["valid"].max() < parts["test"].min()
    with pytest.raises(ValueError, match="'ward', row 0: 'a' is no date"):
        rows_of(Split(by="time", column="ward"), pd.DataFrame({"ward": ["a", "b"] * 20, "y": 1}))


def test_batch_normalisation_never_meets_one_row(tmp_path):
    table = small({"x": lambda g, n: g.normal(size=n)}, rows=140)
    bare = plain_graph({"x": {"kind": "number", "size": 1}}, ", batch_size: 97").to_yaml()
    normed = Graph.from_yaml(bare.replace("graph:\n", "graph:\n  - {name: norm, type: torch.nn.BatchNorm1d, params: {num_features: 1}, "
                                          "inputs: {input: features}}\n", 1).replace("input: features\noutputs", "input: norm\noutputs"))
    with pytest.warns(UserWarning, match="batch_size=97 would leave the last of 98 rows alone.*: 98 is taken"):
        model = train(normed, table, tmp_path, board=False, verbose=False)
    assert model.metadata["status"] == "completed"
    assert paired(torch.nn.Linear(1, 1), 98, 97) == 97 and paired(torch.nn.BatchNorm1d(1), 1, 1) == 1
    with pytest.warns(UserWarning): assert [paired(torch.nn.BatchNorm1d(1), n, 2) for n in (3, 5, 7)] == [3, 3, 4]


def test_a_rehearsal_says_what_has_no_effect():
    table = small({"x": lambda g, n: g.normal(size=n)})
    graph = plain_graph({"x": {"kind": "number", "size": 1}}, ", num_workers: 4")
    with pytest.warns(UserWarning, match="num_workers=4 has no effect"): assert rehearse(graph, table).success
    table.loc[7, "x"] = np.inf
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="row 7: inf is infinite.*among the 60 that were tried"):
        rehearse(graph, table)


def test_dates_of_all_times(tmp_path):
    days = ["0001-01-01", "1969-12-31", "9999-12-31", None]
    with duckdb.connect() as connection: stored = as_frame(connection.execute("SELECT unnest(?)::DATE AS d", [days])).d
    column = learn("d", Prepared(kind="date", size=6, flag=True), stored)
    assert np.isfinite(encode(column, stored)).all() and encode(column, stored)[:, 5].tolist() == [0, 0, 0, 1]
    assert np.allclose(encode(column, stored), encode(column, pd.Series(days)))
    moment = pd.Series(pd.to_datetime(["2024-03-31 02:30+01:00", "2024-10-27 03:30+01:00"]).tz_convert("Europe/Rome"))
    when = learn("t", Prepared(kind="date", size=7), moment)
    for same in (moment.dt.tz_convert("UTC"), moment.dt.tz_convert(None), moment.astype(str)):
        assert np.allclose(encode(when, moment), encode(when, same))
    table = pd.DataFrame({"t": moment})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert source.digest(open_source(table), "t") == source.digest(open_source(parquet(table, tmp_path / "t.parquet")), "t")


def test_classes_that_are_too_rare_to_be_shared_out():
    with pytest.warns(UserWarning, match="no class of the target has three rows: the rows are drawn"):
        rows_of(Split(), pd.DataFrame({"y": np.arange(20) // 2}), "y")
    with pytest.warns(UserWarning, match="10 classes .* the rows for valid and test are fewer"):
        rows_of(Split(), pd.DataFrame({"y": np.arange(40) // 4}), "y")


def test_test_rows_leave_no_trace(tmp_path):
    table = people()
    first = train(graph(), table, tmp_path / "a", board=False, verbose=False)
    test = load_parts(first.folder)["test"]
    other = table.copy()
    other.loc[test, ODD], other.loc[test, "city"], other.loc[test, "ward"] = 1e6, "Nowhere", "z"
    second = train(first.graph, other, tmp_path / "b", board=False, verbose=False)
    assert second.preparation == first.preparation and (load_parts(second.folder)["test"] == test).all()
    assert all(torch.equal(a, b) for a, b in zip(first.module.state_dict().values(), second.module.state_dict().values()))
