"""Forecasts of ETTh1, 96 hours ahead, beside the published errors.

The usual protocol (Zhou et al. 2021; Zeng et al. 2023): the first 12 months train, the next 4 validate, the next 4 test (8640, 2880 and
2880 hours); each of the seven columns is z-scored by its training part; all windows of the test part count, a step apart, and their inputs
may reach back before it; errors are means over windows, columns and steps, in z-scored units. Every column is a series, and one network
serves them all.

usage: python bench/etth1.py [name ...]   models (DLinear, NHITS, ...); writes bench/results/etth1.json, keeping the rows of other models
"""
import json
import os
import platform
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from arc_nb.tasks.forecast import NHITS, DLinear, PatchTST

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
DATA = Path(os.environ.get("ARC_NB_DATA", Path(__file__).parents[2] / "shared" / "data"))
OUT = Path(os.environ.get("ETTH1_OUT", Path(__file__).parent / "results" / "etth1.json"))
TRAIN, VALID, TEST, HORIZON = 8640, 2880, 2880, 96
QUIET = dict(scaler="none", freq="h", val_size=VALID, board=False, run=False)

# model -> how it is made, where its settings come from, published (MSE, MAE) and where
MODELS = {
    "DLinear": (
        lambda seed: DLinear(HORIZON, 336, loss="mse", lr=0.005, optimizer="adam", schedule=("exponential", {"rate": 0.5, "per": "epoch"}),
                             batch_size=224, max_epochs=10, valid_every="1 epoch", patience=3, seed=seed, **QUIET),
        "cure-lab/LTSF-Linear, scripts/EXP-LongForecasting/Linear/etth1.sh: input 336, Adam, lr 0.005, batches of 32 windows of 7 columns, "
        "10 epochs at most, patience 3, the rate halved each epoch",
        (0.375, 0.399), "Zeng et al. 2023, table 2"),
    "NHITS": (
        lambda seed, **more: NHITS(HORIZON, optimizer="adam", batch_size=256, hidden_size=512, num_layers=2, seed=seed,
                                   **{**QUIET, "valid_every": 50, **more}),
        "Challu et al. 2023 and Nixtla/neuralforecast, experiments/long_horizon/run_nhits.py: inputs of five or seven horizons, batches of "
        "256 windows, three stacks of a block with two layers of 512, a search by the validation MAE, then trained anew on train and "
        "validation part. On one CPU core, so with less of it: 400 steps where theirs has up to 1000, the trials listed where theirs has "
        "20; dropout is on the hidden units, theirs on the knots",
        (0.378, 0.393), "Nixtla/neuralforecast, experiments/long_horizon/README.md"),
    "PatchTST": (
        lambda seed: PatchTST(HORIZON, 336, loss="mse", lr=2e-3, optimizer="adam", schedule="one_cycle", batch_size=128, max_steps=800,
                              valid_every=200, patch_len=16, stride=8, hidden_size=16, heads=4, layers=3, ff_size=128, dropout=0.3,
                              seed=seed, **QUIET),
        "yuqinie98/PatchTST, PatchTST_supervised/scripts/PatchTST/etth1.sh: input 336, patches of 16 every 8, 3 layers of 16 numbers and 4 "
        "heads, dropout 0.3. On one CPU core, so with fewer steps: 800 of 128 windows of one column, where the paper has up to 100 epochs "
        "of 64 steps of 128 windows of 7 columns; the rate is therefore 0.002 in one cycle, not 0.0001; one seed",
        (0.375, 0.399), "Nie et al. 2023, table 3 (PatchTST/42)"),
}
SEEDS = {"PatchTST": (0,)}  # where three take too long without a GPU

# the settings that are searched by the validation part, from the choices of the authors' search
SEVEN = dict(input_size=672, loss=["huber", {"delta": 0.5}], dropout=0.5, max_steps=400)  # as in the script
FIVE = dict(input_size=480, loss="mae", lr=1e-3, schedule=["step", {"every": 100, "factor": 0.5, "per": "step"}], max_steps=400,
            pooling=[8, 4, 1], downsample=[24, 12, 1])  # as in the paper
TRIALS = {"NHITS": [
    {**SEVEN, "lr": 1e-3, "pooling": [16, 8, 1], "downsample": [84, 12, 1]},
    {**SEVEN, "lr": 1e-3, "pooling": [2, 2, 2], "downsample": [84, 12, 1]},
    {**SEVEN, "lr": 3e-4, "pooling": [16, 8, 1], "downsample": [84, 12, 1]},
    {**SEVEN, "lr": 1e-3, "pooling": [16, 8, 1], "downsample": [336, 48, 1]},
    {**FIVE, "dropout": 0.5}, {**FIVE, "dropout": 0.7}, {**FIVE, "dropout": 0.5, "from_last": False}]}


def frame():
    """The seven columns as series, z-scored by the training part, up to the end of the test part."""
    wide = pd.read_csv(DATA / "ETTh1.csv", parse_dates=["date"]).iloc[:TRAIN + VALID + TEST].set_index("date")
    wide = (wide - wide.iloc[:TRAIN].mean()) / wide.iloc[:TRAIN].std(ddof=0)
    long = wide.rename_axis("ds").reset_index().melt("ds", var_name="unique_id", value_name="y")
    return long.sort_values(["unique_id", "ds"], ignore_index=True)


def errors(model, long, chunk=250):
    """(MSE, MAE, windows) over all windows of the test part, a step apart."""
    dates = np.sort(long.ds.unique())
    origins = dates[TRAIN + VALID - 1:-HORIZON]
    squared, absolute, count = 0., 0., 0
    truth = long.rename(columns={"y": "truth"})[["unique_id", "ds", "truth"]].set_index(["unique_id", "ds"]).truth
    for start in range(0, len(origins), chunk):
        found = model.predict_at(long, origins[start:start + chunk])
        miss = found[model.name].to_numpy(float) - truth.reindex(pd.MultiIndex.from_frame(found[["unique_id", "ds"]])).to_numpy(float)
        assert np.isfinite(miss).all()
        squared, absolute, count = squared + (miss ** 2).sum(), absolute + np.abs(miss).sum(), count + len(miss)
    assert count == len(origins) * 7 * HORIZON
    return float(squared / count), float(absolute / count), len(origins)


def typed(trial): return {k: tuple(v) if k in ("loss", "schedule") and isinstance(v, list) else v for k, v in trial.items()}


def search(name, known, earlier):
    """(the trial with the smallest validation MAE, up to its best step, to be trained on everything known; what each trial reached)."""
    found, reached = [], {json.dumps(row["trial"], sort_keys=True): row for row in earlier}
    for trial in TRIALS.get(name, []):
        row = reached.get(json.dumps(trial, sort_keys=True))
        if row is None:
            steps, values = MODELS[name][0](0, **typed(trial)).fit(known).history.series("valid", "mae")
            best = int(np.argmin(values))
            row = {"trial": trial, "best_step": int(steps[best]), "valid_mae": round(float(values[best]), 4)}
        found.append(row)
        print(name, row, flush=True)
    if not found: return {}, []
    best = min(found, key=lambda row: row["valid_mae"])
    return best["trial"] | {"max_steps": best["best_step"], "val_size": 0}, found


def measure(name, long, seeds=(0, 1, 2), earlier=()):
    """A row of the table: means over the seeds."""
    make, settings, (mse, mae), source = MODELS[name]
    known, runs = long[long.ds < np.sort(long.ds.unique())[TRAIN + VALID]], []
    chosen, trials = search(name, known, earlier)
    make = partial(make, **typed(chosen))
    for seed in seeds:
        began, model = time.process_time(), make(seed).fit(known)
        fitted = time.process_time() - began
        runs.append((*errors(model, long), fitted))
        print(name, "seed", seed, [round(v, 4) for v in runs[-1]], "steps", model.trainer.status.step, flush=True)
    (squared, absolute), windows = ([r[k] for r in runs] for k in (0, 1)), runs[0][2]
    row = {"mse": round(statistics.mean(squared), 4), "mae": round(statistics.mean(absolute), 4), "seeds": len(runs),
           "mse_by_seed": [round(v, 4) for v in squared], "mae_by_seed": [round(v, 4) for v in absolute],
           "published_mse": mse, "published_mae": mae, "published_by": source, "settings": settings, "test_windows": windows,
           "cpu_seconds_to_fit": round(statistics.mean(r[3] for r in runs), 1)}
    if trials: row |= {"chosen": chosen, "trials": trials}
    return row | {"mse_over_published": round(row["mse"] / mse, 3), "mae_over_published": round(row["mae"] / mae, 3)}


def main():
    names = [a for a in sys.argv[1:] if not a.startswith("-")] or list(MODELS)
    warnings.simplefilter("ignore")
    seeds, long = (0,) if "--smoke" in sys.argv else (0, 1, 2), frame()
    found = json.loads(OUT.read_text()) if OUT.exists() else {}
    machine = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
               "threads": torch.get_num_threads()}
    for name in names:
        row = measure(name, long, SEEDS.get(name, seeds), found.get(name, {}).get("trials", ())) | machine
        print(name, {k: row[k] for k in ("mse", "published_mse", "mae", "published_mae", "cpu_seconds_to_fit")}, flush=True)
        if "--smoke" not in sys.argv:
            found[name] = row
            OUT.write_text(json.dumps(found, indent=1) + "\n")
    if "--smoke" not in sys.argv: print("written:", OUT)


if __name__ == "__main__": main()
