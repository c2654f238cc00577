"""What many series cost: seconds and memory while a long frame becomes a panel and while an epoch of windows is read, by size.

usage: python bench/panel.py [SERIES ...]   writes bench/results/panel.json

Each size has a process of its own: so many series of 100 months with gaps and a calendar column, windows of 24 + 12 months, batches of
1024. Memory is what the process holds for itself (RssAnon of /proc/self/status) at its highest, beyond what it held before. `table_mb` is
what the windows would take as a table. An epoch of more than 2,000 batches is measured over 2,000 of them and told as a whole.
"""
import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from corpus import Watched

SIZES = (1_000, 10_000, 100_000)
STEPS, INPUT, HORIZON, BATCH, MOST = 100, 24, 12, 1024, 2000


def made(series):
    """A long frame of so many series, one row in 200 left out."""
    import pandas as pd
    names = np.array([f"series_{k:06d}" for k in range(series)])
    months = pd.date_range("2015-01-01", periods=STEPS, freq="MS")
    frame = pd.DataFrame({"unique_id": np.repeat(names, STEPS), "ds": np.tile(months, series),
                          "y": np.random.default_rng(0).gamma(2, 50, series * STEPS)})
    return frame.drop(np.arange(50, len(frame), 200))


def one(series):
    """A size, in this process."""
    from arc_nb.engine.batches import make_batches
    from arc_nb.tasks.forecast.panel import Panel
    from arc_nb.tasks.forecast.pieces import Pieces
    from arc_nb.tasks.forecast.scaling import series_scales
    torch.set_num_threads(1)
    Panel.read(made(10), fill="ffill")  # what is imported late
    frame = made(series)
    with Watched() as read: panel = Panel.read(frame, fill="interpolate", calendar=["month"])
    with Watched() as scaled: scales = series_scales(panel, "robust", HORIZON)
    batches = make_batches(Pieces(panel, INPUT, HORIZON, skip_last=HORIZON, scales=scales), batch_size=BATCH)
    rows = 0
    with Watched() as epoch:
        for k, batch in enumerate(batches.epoch(1)):
            rows += batch.rows
            if k + 1 == MOST: break
    windows, whole = len(batches.data), len(batches.data) / rows
    return {"series": series, "rows": len(frame), "windows": windows,
            "table_mb": round(windows * (INPUT + HORIZON) * 3 * 4 / 1e6), "frame_mb": round(frame.memory_usage(deep=True).sum() / 1e6),
            "panel_mb": round((panel.y.nbytes + panel.columns.nbytes) / 1e6, 1),
            "read_cpu_seconds": round(read.cpu, 2), "read_memory_mb": round(read.peak["RssAnon"]),
            "scales_cpu_seconds": round(scaled.cpu, 2),
            "epoch_cpu_seconds": round(epoch.cpu * whole, 2), "epoch_memory_mb": round(epoch.peak["RssAnon"], 1),
            "windows_a_cpu_second": round(rows / epoch.cpu)}


def main():
    rows = []
    for series in map(int, sys.argv[1:] or SIZES):
        done = subprocess.run([sys.executable, __file__, "--one", str(series)], capture_output=True, text=True)
        if done.returncode: sys.exit(done.stderr)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1])
    import pandas as pd
    out = {"machine": platform.platform(), "torch": torch.__version__, "numpy": np.__version__, "pandas": pd.__version__,
           "python": platform.python_version(), "threads": 1, "rows": rows}
    path = Path(__file__).parent / "results" / "panel.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print("written:", path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]: print(json.dumps(one(int(sys.argv[2]))))
    else: main()
