"""How badly scaled inputs have to be before a model learns less: what the limits of diagnose.facts stand on.

    python bench/scales.py [--smoke]      writes bench/results/scales.json"""
import argparse
import json
import platform
import statistics
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from torch import nn

from arc_nb import Trainer

TABLES = {"digits": load_digits, "breast_cancer": load_breast_cancer, "wine": load_wine, "diabetes": load_diabetes}
OPTIMIZERS: dict[str, tuple[Any, float]] = {"adamw": ("adamw", 3e-3), "sgd": (("sgd", {"momentum": 0.9}), 3e-2)}
FACTORS = {"one column times": (0.01, 0.1, 1, 3, 10, 30, 100, 1000), "all columns times": (0.001, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
           "a constant column of": (0, 1, 3, 10, 30, 100, 1000), "all columns plus": (0, 1, 2, 3, 5, 10, 30, 100)}
STEPS = 400


def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    "Standardised inputs (a constant column stays 0) and the target, a number standardised too."
    data = TABLES[name]()
    spread = data.data.std(0)
    inputs = (data.data - data.data.mean(0)) / np.where(spread > 0, spread, 1)
    target = (data.target - data.target.mean()) / data.target.std() if name == "diabetes" else data.target
    return inputs.astype("float32"), target.astype("float32") if name == "diabetes" else target


def spoilt(inputs: np.ndarray, how: str, factor: float) -> np.ndarray:
    "The inputs, scaled badly."
    if how == "a constant column of": return np.c_[inputs, np.full(len(inputs), factor, "float32")]
    if how == "all columns plus": return inputs + np.float32(factor)
    scaled = inputs.copy()
    scaled[:, slice(None) if how == "all columns times" else 3] *= factor
    return scaled


def valid_loss(name: str, how: str, factor: float, optimizer: str, seed: int, steps: int) -> float:
    "The best validation loss of a short training; infinite where it diverged before the first."
    (inputs, target), (spec, lr) = table(name), OPTIMIZERS[optimizer]
    inputs = spoilt(inputs, how, factor)
    torch.manual_seed(seed)
    outputs = 1 if name == "diabetes" else int(target.max()) + 1
    model = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.ReLU(), nn.Linear(64, outputs))
    trainer = Trainer(model, (inputs, target), valid=0.25, loss="mse" if name == "diabetes" else "cross_entropy", optimizer=spec, lr=lr,
                      seed=seed, run=False, board=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(steps=steps)
    epochs = trainer.history.epochs()
    best = float(epochs.valid_loss.min()) if "valid_loss" in epochs else float("inf")
    return best if best < float("inf") else float("inf")


def measure(smoke: bool) -> list[dict[str, Any]]:
    "A row a table, optimizer, way and factor: the median of the seeds."
    rows = []
    for name in list(TABLES)[:1 if smoke else None]:
        for optimizer in OPTIMIZERS:
            for how, factors in FACTORS.items():
                for factor in factors[::4] if smoke else factors:
                    found = [valid_loss(name, how, factor, optimizer, seed, 20 if smoke else STEPS) for seed in range(1 if smoke else 3)]
                    loss = statistics.median(found)
                    rows.append({"table": name, "optimizer": optimizer, "how": how, "factor": factor,
                                 "loss": round(loss, 4) if loss < float("inf") else None})
                    print(rows[-1], flush=True)
    return rows


def main() -> None:
    "Measures and writes."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="one table, few factors, nothing written")
    smoke = parser.parse_args().smoke
    torch.set_num_threads(1)
    rows = measure(smoke)
    machine = {"machine": platform.machine(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1}
    if smoke: return
    path = Path(__file__).parent / "results" / "scales.json"
    path.write_text(json.dumps({"steps": STEPS, "seeds": 3, **machine, "rows": rows}, indent=0) + "\n")


if __name__ == "__main__": main()
