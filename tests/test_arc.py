"""Arc as a person meets it: the guide's examples as typed, in Python, in cells and in a terminal."""
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import arc_tables
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT
from small import until

from arc_nb import Arc, register_layer
from arc_nb.arc import ConfigError, DataError, ModelError
from arc_nb.commands import Desk, as_text, run
from arc_nb.graph.build import build
from arc_nb.graph.spec import Graph
from arc_nb.magics import completions, lines_of
from arc_nb.tasks.tabular.training import rehearse, train

SEED = yaml.safe_load((ROOT / "tests/data/arc_seed.yaml").read_text())
GUIDE = ROOT / "../shared/seeds/arc-model-training-guide.txt"
NUMBER = r"\d+\.\d{4}"
EPOCH = re.compile(rf"Epoch (\d+)/(\d+):\n  Train Loss: {NUMBER}  Train Acc: {NUMBER}\n  Val Loss:   {NUMBER}  Val Acc:   {NUMBER}\n")


def examples(*kinds: str) -> list:
    return [pytest.param(item, id=f"{n}-{item['section']}".replace(" ", "_")) for n, item in enumerate(SEED) if item["kind"] in kinds]


@pytest.fixture(scope="module")
def arc(tmp_path_factory) -> Arc:
    "A home with the guide's tables."
    arc = Arc(tmp_path_factory.mktemp("arc"))
    for name, frame in arc_tables.tables().items(): arc.load(frame, table=name)
    return arc


class Terminal:
    "A place where commands are typed: what it shows is kept as text."
    def __init__(self, arc: Arc, waits: bool = True):
        self.shown: list[str] = []
        self.desk = Desk(lambda: arc, lambda value: self.shown.append(as_text(value)), waits=waits)

    def type(self, line: str) -> str:
        self.shown.clear()
        run(line, self.desk)
        return "\n".join(self.shown)


@pytest.fixture
def terminal(arc: Arc) -> Terminal: return Terminal(arc)


def brief(graph: Graph, epochs: int = 2) -> Graph:
    "The same graph, trained for a moment."
    return graph.model_copy(update={"trainer": graph.trainer.model_copy(update={"epochs": epochs})})


# --- the guide

def test_every_fenced_example_of_the_guide_is_kept():
    if not GUIDE.exists(): pytest.skip(f"{GUIDE} is not there to compare with")
    assert [item["text"] for item in SEED] == re.findall(r"^```\w*\n(.*?)^```$", GUIDE.read_text(), re.S | re.M)


@pytest.fixture(scope="module")
def older(arc: Arc) -> str:
    "A model with an embedding, from which another may take it."
    arc.start("older", brief(arc.choose("older", "Predict price", "cities").graph), "cities", tensorboard=False).wait()
    return "older"


@pytest.mark.filterwarnings("ignore:.*no effect|.*CUDA|.*GPU")
@pytest.mark.parametrize("item", examples("sentence"))
def test_a_sentence_of_the_guide_trains(item, arc, older, tmp_path):
    "As typed, on a real table, in this process; two epochs instead of its own."
    plan = arc.plan(item["text"].replace("<model_name>", older), item["table"])
    assert not plan.questions and set(plan.not_understood) <= {"action", "comedy", "drama"}  # genres that are not in iris
    graph, table, *_ = arc.choose("seed", plan=plan)
    frame, pretrained = arc.store.frame(table), arc.registry.find(older) if "<model_name>" in item["text"] else None
    assert rehearse(graph, frame).success
    model = train(brief(graph), frame, tmp_path, run=False, board=False, say=lambda line: None, pretrained=pretrained)
    assert all(np.isfinite(value) for value in model.metadata["metrics"].values())
    assert set(model.targets) == set(plan.targets) and len(model.predict(frame.head(3))) == 3


@pytest.mark.parametrize("item", examples("command"))
def test_a_command_of_the_guide_runs_as_typed(item, arc, terminal, capfd, monkeypatch):
    plan = arc.plan("Build a binary classifier to predict diabetes, 3 epochs", "processed_diabetes_data")
    done = arc.queue.list(1)[0].id if arc.queue.list(1) else arc.model("first", plan=plan, wait=True, tensorboard=False).id
    text = item["text"].replace("<plan_id>", plan.id).replace("<job_id>", done)
    started = arc.start
    shorter = lambda name, graph, table, *more, **options: started(name, brief(graph, 3), table, *more, **options, tensorboard=False)
    monkeypatch.setattr(arc, "start", shorter)
    assert [piece for is_command, piece in lines_of(text.splitlines(keepends=True)) if is_command] == [text]  # one, as a cell reads it
    said = terminal.type(text)
    if "ml model" not in text: assert done in said; return
    name = re.search(r"--name (\w+)", text)[1]
    log = capfd.readouterr().out
    assert len(re.findall(r"^Epoch \d+/3:$", log, re.M)) == 3 and f"model {name}-v" in log
    if "price" not in name: assert len(EPOCH.findall(log)) == 3  # the lines of the guide, to the blank
    folder = arc.home / "models" / name
    assert {"model.pt", "arc_graph.yaml", "metadata.json"} <= {path.name for path in folder.iterdir()}
    kept = {path.name for path in (folder / "v1").iterdir()}
    assert {"model.pt", "final_model.pt", "preparation.json", "history.csv", "environment.json"} <= kept


def test_what_the_guide_prints_and_how_it_splits(arc):
    console, split = (next(item["text"] for item in SEED if item["kind"] == kind) for kind in ("console", "split"))
    assert EPOCH.findall(console) == [("1", "50"), ("2", "50")]
    asked, default = (arc.plan(words, "customers").graph.preprocessing.split for words in (f"Predict churn. {split}", "Predict churn"))
    assert (asked.train, asked.valid, asked.test) == (default.train, default.valid, default.test) == (.7, .15, .15)


def pasted() -> str:
    "The three pieces of YAML of the guide, one below the other."
    return "\n".join(item["text"] for item in SEED if item["kind"] == "yaml")


def test_the_guides_yaml_trains_as_pasted(arc, tmp_path):
    graph = Graph.from_yaml(pasted())
    assert sum(p.numel() for p in build(graph).parameters()) == 8 * 64 + 64
    frame = arc.store.frame("processed_diabetes_data").rename(columns={"s6": "glucose"})
    arc.load(frame[["bp", "age", "bmi", "glucose", "s1", "s2", "s3", "s4", "diabetes"]], table="patients")
    (tmp_path / "arc_graph.yaml").write_text(pasted())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        chosen = arc.choose("pasted", data_table="patients", graph=tmp_path / "arc_graph.yaml")
    told = " ".join(str(w.message) for w in said)
    assert "diabetes" in told and "outputs" in told  # what was added is said
    job = arc.start("pasted", brief(chosen.graph, 8), chosen.table, tensorboard=False).wait()
    assert job.status == "completed", job.error
    assert arc.evaluate("pasted")["accuracy"] > .6
    kept = Graph.from_yaml(arc.home / "models/pasted/arc_graph.yaml")
    assert kept.inputs["features"].columns[:3] == ["age", "bmi", "glucose"]
    assert (kept.trainer.optimizer.lr, kept.trainer.batch_size) == (.001, 32)


# --- a person's day

def test_from_a_file_to_predictions(tmp_path):
    arc = Arc(home=tmp_path / "home")
    arc_tables.breast_cancer().to_csv(tmp_path / "diabetes.csv", index=False)
    arc.load(str(tmp_path / "diabetes.csv"), table="processed_diabetes_data")
    plan = arc.plan("Predict target with early stopping (patience=4 epochs), 6 epochs", table="processed_diabetes_data")
    assert "early_stopping_patience: 4" in plan.graph.to_yaml() and plan.reasons and plan.id
    job = arc.model("diabetes_predictor", plan_id=plan.id, wait=True, tensorboard=False)
    assert (arc.job(job.id).status, arc.jobs()["Status"].tolist()) == ("completed", ["completed"])
    assert {"train_loss", "valid_loss", "valid_accuracy"} <= set(job.metrics)
    scores = arc.evaluate("diabetes_predictor")
    assert scores["accuracy"] > .9
    row = arc.sql("SELECT * FROM evaluations").iloc[0]
    assert row.accuracy == scores["accuracy"] and row.f1_score == scores["f1"] and row.model_id == "diabetes_predictor-v1"
    frame = arc.store.frame("processed_diabetes_data")
    answers = arc.predict("diabetes_predictor", frame)
    assert len(answers) == len(frame) and ((answers.probability >= .5) == answers.prediction.astype(bool)).all()
    made, rows = arc.predict_table("diabetes_predictor", "processed_diabetes_data", batch_size=100)
    stored = arc.store.frame(made)
    assert (made, rows) == ("diabetes_predictor_predictions", len(frame))
    np.testing.assert_allclose(stored.probability, answers.probability, atol=1e-7)  # same rows, same numbers, in whatever batches
    again = Arc(home=tmp_path / "home")  # another day
    pd.testing.assert_frame_equal(again.predict("diabetes_predictor-v1", frame), answers)
    with pytest.warns(UserWarning, match="used before"): again.evaluate("diabetes_predictor")
    assert completions("/ml evaluate --model-id dia", again) == ["diabetes_predictor"]  # what Tab gives
    assert completions("/ml predict --data proc", again) == ["processed_diabetes_data"]
    assert completions("/ml jobs status ", again) == [job.id]


def test_an_edited_graph_becomes_the_next_version(arc, tmp_path):
    plan = arc.plan("Predict churn, 2 epochs, hidden layers (16, 8)", "customers")
    arc.model("edited", plan=plan, wait=True, tensorboard=False)
    text = (arc.home / "models/edited/arc_graph.yaml").read_text().replace("epochs: 2", "epochs: 3").replace("p: 0.1", "p: 0.3")
    (tmp_path / "mine.yaml").write_text(text)
    job = arc.model("edited", graph=tmp_path / "mine.yaml", wait=True, tensorboard=False)
    assert job.result["model"] == "edited-v2" and [arc.open(name).metadata["epochs"] for name in ("edited", "edited-v1")] == [3, 2]
    assert "p: 0.3" in (arc.home / "models/edited/arc_graph.yaml").read_text()


class Gate(torch.nn.Module):
    "A layer of a person's own: numbers times how much they matter."
    def __init__(self, width: int):
        super().__init__()
        self.weigh = torch.nn.Linear(width, width)
    def forward(self, input): return input * torch.sigmoid(self.weigh(input))


def test_a_layer_of_ones_own_goes_to_the_job(arc):
    register_layer("Gate", Gate)
    plan = arc.plan("Predict churn, 2 epochs, one hidden layer with 16 neurons, no dropout", "customers")
    text = plan.graph.to_yaml().replace("type: torch.nn.ReLU", "type: custom.Gate\n    params: {width: 16}")
    assert "custom.Gate" in text
    job = arc.model("gated", graph=text, data_table="customers", wait=True, tensorboard=False)
    assert job.status == "completed" and isinstance(arc.open("gated").module, torch.nn.Module)


def test_a_job_that_fails_leaves_no_model(arc, monkeypatch):
    arc.sql("CREATE OR REPLACE TABLE odd AS SELECT * FROM customers")
    chosen = arc.choose("odd", "Predict churn, 2 epochs", "odd")
    def damaged(self, table: str, path: Path) -> Path: path.parent.mkdir(exist_ok=True); path.write_bytes(b"no parquet"); return path
    monkeypatch.setattr(type(arc.store), "snapshot", damaged)
    job = arc.start("odd", chosen.graph, "odd", tensorboard=False).wait()
    assert job.status == "failed" and "parquet" in job.error.lower()
    with pytest.raises(ModelError, match="no model 'odd'"): arc.open("odd")
    assert not list((arc.home / "models").glob("odd/*"))


def test_a_cancelled_job_stops_and_publishes_nothing(arc):
    job = arc.model("long", "Predict churn, 100000 epochs, no early stopping", "customers", tensorboard=False)
    until(lambda: job.metrics)
    job.cancel().wait()
    assert job.status == "cancelled" and (job.run / "checkpoints").is_dir() and len(job.history().epochs()) >= 1
    with pytest.raises(ModelError): arc.open("long")
    last = len(job.history().epochs())
    again = arc.resume(job.id, tensorboard=False)  # on from there, in a job of its own
    until(lambda: again.metrics)
    again.cancel().wait()
    epochs = again.history().epochs().epoch.tolist()
    assert epochs == list(range(1, len(epochs) + 1)) and len(epochs) > last and len(job.history().epochs()) == last
    with pytest.raises(ConfigError, match="no job"): arc.resume("nobody")


# --- what cannot be

@pytest.mark.parametrize(("kind", "what", "call"), [
    (ConfigError, "not allowed", lambda arc: arc.model("../away", "Predict churn", "customers")),
    (ConfigError, "instruction", lambda arc: arc.model("x", data_table="customers")),
    (ConfigError, "The tables are", lambda arc: arc.model("x", "Predict churn")),
    (ConfigError, "same thing twice", lambda arc: arc.model("x", plan_id="1", graph="a.yaml")),
    (ConfigError, "share of the rows", lambda arc: arc.model("x", "Predict churn", "customers", sample=-1)),
    (ConfigError, "no job", lambda arc: arc.job("zzz")),
    (DataError, "did you mean 'customers'", lambda arc: arc.model("x", "Predict churn", "customer")),
    (DataError, "is no table", lambda arc: arc.model("x", "Predict churn", 'customers"; DROP TABLE customers; --')),
    (DataError, "nothing.csv", lambda arc: arc.load("nothing.csv")),
    (DataError, "already", lambda arc: arc.load(pd.DataFrame({"a": [1]}), table="customers")),
    (DataError, "syntax", lambda arc: arc.sql("SELEC 1")),
    (ModelError, "no plan", lambda arc: arc.model("x", plan_id="nonsense")),
    (ModelError, "which column", lambda arc: arc.model("x", "Predict the weather", "customers")),
    (ModelError, "line 1", lambda arc: arc.model("x", graph="inputs: {a: {shap: [null, 2]}}", data_table="customers")),
    (ModelError, "no model", lambda arc: arc.predict("nobody", pd.DataFrame())),
])
def test_what_cannot_be_is_one_error_before_anything_starts(arc, kind, what, call):
    before = len(arc.jobs(1000)), arc.store.names()
    with pytest.raises(kind, match=re.escape(what)) as caught: call(arc)
    assert isinstance(caught.value, ValueError)
    assert (len(arc.jobs(1000)), arc.store.names()) == before


# --- a terminal

def shell(home: Path, *words: str) -> subprocess.CompletedProcess:
    "arc-nb in a process of its own."
    code = "import sys; from arc_nb.cli import main; sys.exit(main())"
    environment = os.environ | {"ARC_NB_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def test_a_terminal_has_exit_codes(tmp_path):
    arc_tables.iris().to_csv(tmp_path / "iris.csv", index=False)
    (tmp_path / "bad.csv").write_bytes(b"\x00\x01\x02")
    codes = {("load", str(tmp_path / "iris.csv")): 0, ("tables",): 0, ("ml", "modle"): 2, ("ml", "model", "--name", "x"): 2,
             ("load", str(tmp_path / "none.csv")): 3, ("sql", "SELECT * FROM nothing"): 3,
             ("ml", "model", "--name", "x", "--instruction", "Predict species", "--data-table", "irs"): 3,
             ("ml", "evaluate", "--model-id", "nobody"): 4,
             ("ml", "model", "--name", "x", "--instruction", "Predict the price of gold", "--data-table", "iris"): 4}
    for words, code in codes.items():
        done = shell(tmp_path / "home", *words)
        assert done.returncode == code, (words, done)
        assert "Traceback" not in done.stderr and (code == 0 or done.stderr.startswith("arc-nb: "))


def test_a_terminal_trains_scores_and_predicts(tmp_path):
    arc_tables.iris().to_csv(tmp_path / "iris.csv", index=False)
    assert shell(tmp_path, "load", str(tmp_path / "iris.csv")).returncode == 0
    done = shell(tmp_path, "ml", "model", "--name", "flowers", "--instruction", "Predict species, 30 epochs", "--data-table", "iris")
    assert done.returncode == 0 and len(re.findall(r"^Epoch \d+/30:$", done.stdout, re.M)) >= 1, done
    scored = shell(tmp_path, "ml", "evaluate", "--model-id", "flowers", "--metrics", "accuracy")
    assert scored.returncode == 0 and "accuracy" in scored.stdout
    assert shell(tmp_path, "ml", "predict", "--model", "flowers", "--data", "iris", "--filter", "petal_length > 5").returncode == 0
    made = shell(tmp_path, "sql", "SELECT predicted_class, count(*) AS n FROM flowers_predictions GROUP BY ALL").stdout.split()[2:]
    assert set(made[::2]) <= {"versicolor", "virginica"} and sum(map(int, made[1::2])) == 42
