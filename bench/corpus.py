"""What large texts cost: megabytes a second and memory while a text is tokenised to a file and while batches are read from it, by size.

usage: python bench/corpus.py [MB ...]   writes bench/results/corpus.json

Each size has a process of its own. The text is made on the spot of words drawn at random. Memory is what the process holds for itself
(RssAnon of /proc/self/status, beyond what it held before) at its highest; pages of the mapped file, which the system takes back when it
needs them, are told apart (RssFile).
"""
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

SIZES = (10, 100, 300, 1000)  # MB


def memory():
    """{"RssAnon": MB, "RssFile": MB} of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


class Watched:
    """The highest memory of the process inside `with`, beyond what it held before, and the seconds that it took."""
    def __enter__(self):
        self.before, self.peak, self.done = memory(), {"RssAnon": 0.0, "RssFile": 0.0}, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def watch(self):
        while not self.done.wait(0.01):
            for name, value in memory().items(): self.peak[name] = max(self.peak[name], value - self.before[name])

    def __exit__(self, *_):
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.done.set()
        self.thread.join()

    def told(self, megabytes):
        return {"seconds": round(self.wall, 2), "cpu_seconds": round(self.cpu, 2), "mb_a_cpu_second": round(megabytes / self.cpu, 1),
                "memory_mb": round(self.peak["RssAnon"], 1), "mapped_mb": round(self.peak["RssFile"], 1)}


def write(path, megabytes):
    """A text of so many MB: words in lines, with some characters of two bytes."""
    draw = np.random.default_rng(0)
    words = np.array(["the", "king", "lord", "naïve", "crown", "night", "sword,", "blood;", "moon", "and", "not", "true.\n"])
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 1e6: file.write(" ".join(words[draw.integers(0, len(words), 200_000)]))


def one(megabytes):
    """A size, in this process."""
    from arc_nb.engine.batches import make_batches
    from arc_nb.tasks.text.corpus import Corpus
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        write(path, megabytes)
        read = lambda: Corpus.from_files(path, folder=folder, limit=1)
        with Watched() as tokenised: corpus = read()
        with Watched() as found: corpus = read()
        batches = make_batches(corpus.windows(256)[0], batch_size=64)
        with Watched() as epoch: rows = sum(batch.rows for batch in batches.epoch(1))
        size = path.stat().st_size / 1e6
        return {"mb": megabytes, "tokens": len(corpus.train) + len(corpus.valid), "tokenised": tokenised.told(size),
                "found_again_seconds": round(found.wall, 3), "epoch": epoch.told(rows * 256 / 1e6),
                "tokens_a_cpu_second": round(rows * 256 / epoch.cpu)}


def main():
    rows = []
    for megabytes in map(int, sys.argv[1:] or SIZES):
        done = subprocess.run([sys.executable, __file__, "--one", str(megabytes)], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1])
    out = {"machine": platform.platform(), "torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version(),
           "threads": 1, "rows": rows}
    path = Path(__file__).parent / "results" / "corpus.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print("written:", path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]: print(json.dumps(one(int(sys.argv[2]))))
    else: main()
