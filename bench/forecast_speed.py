"""Fit and predict beside neuralforecast: the same model, windows a step, steps and data; CPU time, interleaved pairs, one thread.

neuralforecast lives in an environment of its own, made the first time (some gigabytes); ARC_NB_NEURALFORECAST names the Python of another.
usage: python bench/forecast_speed.py [pairs, default 7] [--smoke]   writes bench/results/forecast_speed.json (not with --smoke)
"""
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pandas as pd
import torch

from arc_nb.tasks import forecast

ROOT = Path(__file__).parents[1]
STEPS, WINDOWS = 500, 128
OWN = {"LSTM": dict(hidden_size=64, num_layers=1, states=1),
       "NHITS": dict(hidden_size=512, num_layers=2, pooling=[2, 2, 1], downsample=[4, 2, 1])}


def environment() -> str:
    """The Python of neuralforecast's environment."""
    if found := os.environ.get("ARC_NB_NEURALFORECAST"): return found
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "arc_nb" / "neuralforecast"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for what in (["torch"], ["neuralforecast"]):
            subprocess.run([str(python), "-m", "pip", "install", "-qq", "-c", str(ROOT / "constraints.txt"), *what], check=True)
    return str(python)


def ours(name: str, steps: int, path: str) -> dict:
    """One measurement of this package, in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    frame = pd.read_csv(path, parse_dates=["ds"])
    how = dict(horizon=12, input_size=24, loss="mae", scaler="standard", batch_size=WINDOWS, lr=1e-3, schedule=None, clip_norm=None,
               val_size=0, metrics=(), board=False, run=False, **OWN[name])
    made = getattr(forecast, name)
    made(max_steps=5, **how).fit(frame).predict()  # warm
    model = made(max_steps=steps, **how)
    began = time.process_time(); model.fit(frame); fitted = time.process_time(); model.predict(); ended = time.process_time()
    return {"fit": fitted - began, "predict": ended - fitted, "parameters": sum(p.numel() for p in model.model.parameters())}


def told(command: list[str]) -> dict:
    """What a measurement in another process says."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode: raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def pair(mine: list[str], other: list[str], name: str, turned: bool) -> tuple[dict, dict]:
    """One measurement of each, in turns."""
    b = told(other) if turned else None
    a = told(mine)
    b = b or told(other)
    print(f"{name}: fit {a['fit']:.2f} and {b['fit']:.2f} s, predict {a['predict']:.3f} and {b['predict']:.3f} s", flush=True)
    return a, b


def compared(name: str, steps: int, found: list[tuple[dict, dict]]) -> dict:
    """Medians of the ratios, and of the times."""
    ratio = {what: statistics.median(a[what] / b[what] for a, b in found) for what in ("fit", "predict")}
    print(f"{name}: fit takes {ratio['fit']:.2f} of neuralforecast's CPU time (goal: at most 1.3), predict {ratio['predict']:.2f}")
    middle = lambda k: round(statistics.median(one[k]["fit"] for one in found), 2)
    return {"model": name, "steps": steps, "windows a step": WINDOWS, "pairs": len(found), "fit ratio": round(ratio["fit"], 3),
            "predict ratio": round(ratio["predict"], 3), "fit s": middle(0), "neuralforecast fit s": middle(1),
            "parameters": found[0][0]["parameters"], "neuralforecast parameters": found[0][1]["parameters"]}


def main() -> None:
    if "--one" in sys.argv: print(json.dumps(ours(sys.argv[2], int(sys.argv[3]), sys.argv[4]))); return
    smoke = "--smoke" in sys.argv
    pairs = 1 if smoke else int(next((a for a in sys.argv[1:] if a.isdigit()), 7))
    steps, theirs, rows = 20 if smoke else STEPS, environment(), []
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/series.csv"
        forecast.synthetic(100, 120, freq="MS", season=12, seed=0).to_csv(path, index=False)
        for name in OWN:
            mine = [sys.executable, __file__, "--one", name, str(steps), path]
            other = [theirs, str(ROOT / "bench" / "_neuralforecast.py"), name, str(steps), str(WINDOWS), path]
            found = [pair(mine, other, name, bool(k % 2)) for k in range(pairs)]
            rows.append(compared(name, steps, found))
    if smoke: return
    about = {"python": platform.python_version(), "torch": torch.__version__, "neuralforecast": found[0][1]["version"],
             "machine": platform.machine(), "threads": 1}
    (ROOT / "bench/results/forecast_speed.json").write_text(json.dumps({"rows": rows, "machine": about}, indent=1) + "\n")


if __name__ == "__main__": main()
