"""Tables: the default plan beside scikit-learn's defaults on the same rows, several splits of each table; and what a table of 1,000,000
rows x 30 columns needs beyond its own size in memory, and how many rows a second it trains.

Accuracy: each seed draws a split of 70/15/15; the plan trains on the first part and stops by the second; scikit-learn's estimators are
given both parts, as they hold out their own. All are measured on the same test rows: accuracy, or R2 for quantities.
Memory: resident memory in a process of its own, above what the imports and a training on 300 rows need, sampled every 10 ms.

usage: python bench/tabular.py [accuracy|memory]   writes bench/results/tabular.json
"""
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn import datasets
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from arc_nb.graph.plan import make_plan
from arc_nb.tables.profile import profile_frame
from arc_nb.tasks.tabular.rows import load_parts
from arc_nb.tasks.tabular.training import train

torch.set_num_threads(1)
RESULTS = Path(__file__).parent / "results" / "tabular.json"
SEEDS, ROWS, COLUMNS = 8, 1_000_000, 30
TABLES = {"breast_cancer": "Build a binary classifier to predict target", "iris": "Build a classifier to predict target",
          "wine": "Build a classifier to predict target", "digits": "Build a classifier to predict target",
          "diabetes": "Build a regression model to predict target"}


def table(name):
    """One of scikit-learn's tables, its columns named as a database would."""
    frame = getattr(datasets, f"load_{name}")(as_frame=True).frame
    return frame.rename(columns=lambda c: "".join(x if x.isalnum() else "_" for x in c).strip("_"))


def quiet(text): pass


def ours(frame, instruction, seed):
    """(score, positions of the test rows, epochs, CPU seconds) of the default plan."""
    graph = make_plan(instruction, profile_frame(frame, "bench")).graph
    told = graph.preprocessing.model_copy(update={"split": graph.preprocessing.split.model_copy(update={"seed": seed})})
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        model = train(graph.model_copy(update={"preprocessing": told}), frame, folder, seed=seed, board=False, say=quiet)
        test = model.part("test", frame)
        said, positions = model.predict(test), load_parts(folder)["test"]
    seconds, truth = time.process_time() - began, test.target.to_numpy()
    right = said.predicted_class.to_numpy() == truth if "predicted_class" in said else None
    score = float(right.mean()) if right is not None else r2(truth, said.prediction.to_numpy())
    return score, positions, model.metadata["epochs"], seconds


def r2(truth, said): return float(1 - np.square(truth - said).sum() / np.square(truth - truth.mean()).sum())


def theirs(frame, test, kind, seed):
    """{estimator: score} on the same test rows, given by their positions."""
    marked = np.isin(np.arange(len(frame)), test)
    X, y = frame.drop(columns="target").to_numpy(), frame.target.to_numpy()
    net, trees = (MLPRegressor, HistGradientBoostingRegressor) if kind == "regression" else (MLPClassifier, HistGradientBoostingClassifier)
    found = {}
    scaled = make_pipeline(StandardScaler(), net(random_state=seed, max_iter=500))
    for name, estimator in (("MLP", scaled), ("HGB", trees(random_state=seed))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            estimator.fit(X[~marked], y[~marked])
        found[name] = float(estimator.score(X[marked], y[marked]))
    return found


def accuracy():
    """A row a table: mean and deviation of each way, in points (per cent)."""
    rows = []
    for name, instruction in TABLES.items():
        frame, kind = table(name), "regression" if name == "diabetes" else "classes"
        seen = []
        for seed in range(SEEDS):
            score, test, epochs, seconds = ours(frame, instruction, seed)
            seen.append({"plan": score, **theirs(frame, test, kind, seed), "epochs": epochs, "seconds": seconds})
        row = {"table": name, "rows": len(frame), "columns": frame.shape[1] - 1, "score": "R2" if kind == "regression" else "accuracy"}
        for way in ("plan", "MLP", "HGB"):
            points = [100 * one[way] for one in seen]
            row[way] = {"mean": round(statistics.mean(points), 2), "sd": round(statistics.stdev(points), 2),
                        "each": [round(p, 1) for p in points]}
        row["behind the better one"] = round(max(row["MLP"]["mean"], row["HGB"]["mean"]) - row["plan"]["mean"], 2)
        row["epochs"] = statistics.median(one["epochs"] for one in seen)
        row["cpu seconds"] = round(statistics.median(one["seconds"] for one in seen), 2)
        print({k: v["mean"] if isinstance(v, dict) else v for k, v in row.items()})
        rows.append(row)
    return rows


def resident(): return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def large(path):
    """Makes the table: 1,000,000 x 30 numbers and a target that two of them decide together."""
    import duckdb
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(ROWS, COLUMNS)), columns=[f"x{k}" for k in range(COLUMNS)])
    frame["y"] = (frame.x0 + frame.x1 * frame.x2 > 0).astype(np.int64)
    with duckdb.connect() as connection: connection.execute(f"COPY frame TO '{path}' (COMPRESSION zstd)")


def measure(path):
    """In a process of its own: what training on the file needs."""
    from arc_nb.tasks.tabular.source import open_source
    small = open_source(path).take([f"x{k}" for k in range(COLUMNS)] + ["y"], np.arange(20_000))
    graph = make_plan("Build a binary classifier to predict y", profile_frame(small.iloc[:300], "warm")).graph
    plan = planned(path)
    with tempfile.TemporaryDirectory() as folder:
        train(graph, small.iloc[:300], f"{folder}/warm", board=False, say=quiet, epochs=2)
        base, peak, going, marks = resident(), [0.0], [True], []
        began = time.time()
        def look():
            while going[0]: peak[0] = max(peak[0], resident()); time.sleep(0.01)
        def mark(text): marks.append((round(time.time() - began, 2), time.process_time()))
        watcher = threading.Thread(target=look)
        watcher.start()
        model = train(plan, path, f"{folder}/large", board=False, say=mark, epochs=2)
        going[0] = False
        watcher.join()
        seconds = pd.read_csv(f"{folder}/large/history.csv").seconds.iloc[-1]
    size = ROWS * COLUMNS * 8 / 1e6
    return {"rows": ROWS, "columns": COLUMNS, "megabytes in memory": size, "extra megabytes": round(peak[0] - base, 1),
            "times its size": round((peak[0] - base) / size, 2), "first epoch done after s": marks[0][0],
            "seconds an epoch": round(float(seconds), 2),
            "rows a second": round(model.metadata["rows"]["train"] / float(seconds)),
            "rows a CPU second": round(model.metadata["rows"]["train"] / (marks[1][1] - marks[0][1])),
            "batch size": plan.trainer.batch_size, "parameters": model.metadata["parameters"],
            "valid accuracy": round(model.metadata["metrics"].get("valid_accuracy", float("nan")), 4)}


def planned(path):
    """The default plan for the large table, made in a process of its own: profiles are not what is measured."""
    code = ("import sys, pandas as pd, duckdb\nfrom arc_nb.graph.plan import make_plan\nfrom arc_nb.tables.profile import profile_frame\n"
            "frame = duckdb.connect().execute('SELECT * FROM read_parquet(?)', [sys.argv[1]]).df()\n"
            "make_plan('Build a binary classifier to predict y', profile_frame(frame, 'large')).graph.to_yaml(sys.argv[2])")
    from arc_nb.graph.spec import Graph
    subprocess.run([sys.executable, "-c", code, str(path), f"{path}.yaml"], check=True, stdout=subprocess.DEVNULL)
    return Graph.from_yaml(Path(f"{path}.yaml"))


def memory():
    """The large table, trained in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.parquet"
        large(path)
        done = subprocess.run([sys.executable, __file__, "measure", str(path)], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


def main(what):
    if what[:1] == ["measure"]: print(json.dumps(measure(what[1]))); return
    out = json.loads(RESULTS.read_text()) if RESULTS.exists() and what else {}
    out |= {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1,
            **{name: version(name) for name in ("scikit-learn", "pandas", "duckdb", "numpy")}}
    if not what or "accuracy" in what: out |= {"seeds": SEEDS, "unit": "points (per cent) on the test rows", "accuracy": accuracy()}
    if not what or "memory" in what: out["memory"] = memory()
    RESULTS.write_text(json.dumps(out, indent=1) + "\n")
    print("written:", RESULTS)


if __name__ == "__main__": main(sys.argv[1:])
