"""What keyed items cost: CPU microseconds an item with and without keys, and a batch of a foreign loader with and without a stream of
its own. No workers; the ways are measured in turns, medians.

usage: python bench/items.py   writes bench/results/items.json
"""
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from arc_nb.engine.loaders import DatasetReader
from arc_nb.engine.replay import Replay

torch.set_num_threads(1)
ROWS, ROUNDS = 2048, 31


class Rows(Dataset):
    "As cheap as a data set can be: every microsecond beyond it is the loader's."
    def __init__(self): self.x, self.y = list(torch.randn(ROWS, 8)), list(range(ROWS))
    def __len__(self): return ROWS
    def __getitem__(self, k): return self.x[k], self.y[k]


def seconds(batches):
    """CPU seconds of an epoch."""
    began = time.process_time()
    for _ in batches: pass
    return time.process_time() - began


def medians(ways, per):
    """Median CPU microseconds of each way, the ways in turns; the first round does not count."""
    found = {name: [] for name in ways}
    for k in range(ROUNDS + 1):
        for name, make in ways.items():
            took = seconds(make(k + 1))
            if k: found[name].append(took / per * 1e6)
    return {name: round(statistics.median(values), 2) for name, values in found.items()}


def items(batch_size):
    """Our loader over a data set, beside torch's own with shuffle=True."""
    rows = Rows()
    plain, keyed = DataLoader(rows, batch_size, shuffle=True), DatasetReader(rows, batch_size)
    row = {"batch_size": batch_size} | medians({"without keys": lambda number: plain, "with keys": keyed.read}, ROWS)
    return row | {"keys": round(row["with keys"] - row["without keys"], 2)}


def batches():
    """A list's iterator, as it is and as a foreign iterable that draws from a stream of its own."""
    made = [(torch.zeros(1),)] * ROWS
    class Anew:
        def __iter__(self): return iter(made)
    row = medians({"as it is": lambda number: iter(made), "with a stream": Replay(Anew()).read}, ROWS)
    return row | {"stream": round(row["with a stream"] - row["as it is"], 2)}


def main():
    out = {"machine": platform.platform(), "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
           "unit": "CPU microseconds", "items": [items(size) for size in (1, 8, 32, 128)], "a batch of a foreign iterable": batches()}
    for row in out["items"]: print(row)
    print(out["a batch of a foreign iterable"])
    path = Path(__file__).parent / "results" / "items.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print("written:", path)


if __name__ == "__main__": main()
