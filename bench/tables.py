"""What a table of a million rows costs: loading it, looking at it, taking it out again. CPU and wall seconds, and the memory that the
process needed beyond what it had; each in a process of its own, two threads.

usage: python bench/tables.py [ROWS]   writes bench/results/tables.json
"""
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

from arc_nb.tables.store import Tables

COLUMNS = 30


def frame_of(rows):
    """25 columns of numbers, one of categories, of texts, of dates, of whole numbers, and a target."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(rows, COLUMNS - 5)), columns=[f"x{i}" for i in range(COLUMNS - 5)])
    return frame.assign(city=rng.choice(["Bern", "Basel", "Chur"], rows), key=[f"k{i}" for i in range(rows)],
                        on=pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 10**7, rows), "s"), age=rng.integers(18, 90, rows),
                        target=(frame.x0 + rng.normal(size=rows) > 0).astype(int))


def work(name, folder, rows):
    """One of the things measured; its preparation isn't."""
    tables = Tables(folder / "arc.duckdb")
    load = lambda source: tables.load(source, "new", replace=True)
    ways = {"load a frame": lambda: load(frame), "load CSV": lambda: load(folder / "t.csv"),
            "load Parquet": lambda: load(folder / "t.parquet"), "profile": lambda: tables.describe("t"),
            "associations": lambda: tables.associations("t", "target"), "snapshot": lambda: tables.snapshot("t", folder / "s.parquet"),
            "as a frame": lambda: tables.frame("t"), "in batches": lambda: sum(len(b) for b in tables.batches("t", 50_000))}
    frame = frame_of(rows) if name == "load a frame" else None
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    had = peak()
    wall, cpu = time.perf_counter(), time.process_time()
    ways[name]()
    row = {"wall_s": round(time.perf_counter() - wall, 2), "cpu_s": round(time.process_time() - cpu, 2)}
    return row | {"extra_mb": round((peak() - had) / 1024)}


def peak():
    """The most memory of this process so far, KB."""
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])


NAMES = ["load a frame", "load CSV", "load Parquet", "profile", "associations", "snapshot", "as a frame", "in batches"]


def main(rows):
    """All of them, one after the other."""
    with tempfile.TemporaryDirectory() as home:
        folder, frame = Path(home), frame_of(rows)
        frame.to_csv(folder / "t.csv", index=False)
        Tables(folder / "arc.duckdb").load(frame, "t")
        Tables(folder / "arc.duckdb").snapshot("t", folder / "t.parquet")
        size = round(frame.memory_usage(deep=True).sum() / 2**20)
        del frame
        call = lambda name: subprocess.check_output([sys.executable, __file__, "one", name, home, str(rows)], text=True)
        found = {name: json.loads(call(name)) for name in NAMES}
    for name, row in found.items(): print(f"{name:14} {row['wall_s']:7.2f} s   {row['extra_mb']:6,} MB")
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    versions = {"duckdb": duckdb.__version__, "pandas": pd.__version__}
    result = {"rows": rows, "columns": COLUMNS, "frame_mb": size, "took": found, **machine, **versions}
    Path(__file__).with_name("results").joinpath("tables.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]: print(json.dumps(work(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
    else: main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
