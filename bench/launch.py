"""What several processes cost: seconds until two ranks are at work and until their results are here, beside a plain start of Python with
torch; microseconds a message; milliseconds until a killed rank is noticed; seconds that 200 MB need to get to two ranks.

usage: python bench/launch.py   writes bench/results/launch.json
"""
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from arc_nb.engine.crew import ProcessKilled
from arc_nb.engine.launch import channel, cores, launch
from arc_nb.engine.shipping import ship

torch.set_num_threads(1)
ROUNDS, SENT = 7, 2000


def begin():
    "Says when this rank is at work, and what it has cost until then."
    channel().send((time.monotonic(), time.process_time()))


def start():
    "Seconds of a launch of two ranks, beside one plain Python that imports torch."
    rows = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch, torch.distributed"], check=True)
        row, heard, began = {"plain import": time.perf_counter() - began}, [], time.monotonic()
        launch(begin, on_message=lambda rank, said, heard=heard: heard.append(said))
        rows.append(row | {"all at work": max(when for when, _ in heard) - began, "all over": time.monotonic() - began,
                           "CPU of a rank": statistics.mean(cpu for _, cpu in heard)})
    return {name: round(statistics.median(row[name] for row in rows), 3) for name in rows[0]}


def talk(value, count):
    "CPU microseconds of a send; the parent sees how long each is under way."
    line = channel()
    time.sleep(0.2)
    began = time.process_time()
    for _ in range(count): line.send((time.monotonic(), value)); time.sleep(0.001)
    plain = time.process_time()
    for _ in range(count): (time.monotonic(), value); time.sleep(0.001)
    return (plain - began - (time.process_time() - plain)) / count * 1e6


def messages():
    "Cost and delay of a message, small and large."
    found = {}
    small = {"step": 1, "loss": 0.3, "lr": 1e-3, "seconds": [0.1, 0.2]}
    for name, value, count in (("record", small, SENT), ("1 MB tensor", torch.zeros(250_000), 200)):
        delays = []
        [cost] = launch(talk, (value, count), processes=1, on_message=lambda rank, said, to=delays: to.append(time.monotonic() - said[0]))
        ordered = sorted(delays)
        found[name] = {"CPU of the rank, us": round(cost, 1), "delay, us": round(statistics.median(delays) * 1e6),
                       "delay of the slowest of 100, us": round(ordered[int(0.99 * len(ordered))] * 1e6)}
    return found


def killed():
    dist.barrier()
    if dist.get_rank() == 1:
        channel().send(time.monotonic())
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def noticed():
    "Milliseconds from the signal until the error is raised here, all ended."
    took = []
    for _ in range(ROUNDS):
        when = []
        try: launch(killed, on_message=lambda rank, at, when=when: when.append(at))
        except ProcessKilled: took.append((time.monotonic() - when[0] - 0.2) * 1e3)
    return round(statistics.median(took))


def parcels():
    "Seconds for 200 MB: packed once, opened, read through; beside pickle, which every rank needs anew."
    import pickle
    model = torch.nn.Sequential(*[torch.nn.Linear(1000, 1000) for _ in range(50)])
    rows = []
    for _ in range(ROUNDS):
        marks = [time.perf_counter()]
        parcel = ship(model); marks.append(time.perf_counter())
        opened = parcel.open(); marks.append(time.perf_counter())
        sum(float(p.detach().sum()) for p in opened.parameters()); marks.append(time.perf_counter())
        parcel.open(private=True); marks.append(time.perf_counter())
        pickle.loads(pickle.dumps(model)); marks.append(time.perf_counter())
        rows.append([b - a for a, b in zip(marks, marks[1:])])
    names = ("pack", "open, mapped", "read through once", "open, copied", "pickle and unpickle, for each rank")
    return {name: round(statistics.median(column), 4) for name, column in zip(names, zip(*rows))}


def main():
    out = {"machine": platform.platform(), "cores": cores(), "torch": torch.__version__, "python": platform.python_version(), "ranks": 2,
           "start, s": start(), "messages": messages(), "a killed rank is raised after, ms": noticed(), "200 MB, s": parcels()}
    print(json.dumps(out, indent=1))
    path = Path(__file__).parent / "results" / "launch.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print("written:", path)


if __name__ == "__main__": main()
