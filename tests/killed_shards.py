"""Kills ranks in the middle of sharded saves, and looks at what they leave. Run by test_sharded.py: without threads, so that it can fork.

usage: killed_shards.py FOLDER COUNT
"""
import os
import random
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # the optimizer would import it, in every child anew
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from arc_nb.engine.checkpoint import listed, newest_good, read_checkpoint, sweep, verify
from arc_nb.engine.ranks import join
from arc_nb.engine.sharded import ShardedSaver, newest_together, read_together


def train(rank: int, home: Path, number: int) -> None:
    "Saves without end, while the ranks talk to each other for training too; notes each step whose checkpoint was proven."
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{home}/store-{number}", 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=timedelta(seconds=30))
    ranks, folder = join("cpu"), home / "checkpoints"
    model = fully_shard(nn.Linear(500, 500))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    newest = newest_together(folder, ranks)
    start = read_together(newest, model, optimizer, ranks, proven=True)[0]["step"] if newest else 0
    saver = ShardedSaver(folder, ranks, last=2, best=0)
    for step in range(start + 1, 10**6):
        model(torch.ones(2, 500)).mean().backward(); optimizer.step(); optimizer.zero_grad()
        with torch.no_grad():
            for p in model.parameters():
                for tensor in (p, optimizer.state[p]["momentum_buffer"]): tensor.to_local().fill_(float(step))
        saver.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, {"step": step})
        if ranks.agree(random.random() < 0.5): saver.wait()
        if saver.latest and ranks.first: (home / "done").write_text(saver.latest.name[5:])  # one write of few bytes
        if saver.error: raise saver.error


def moment(folder: Path, how: int) -> None:
    "Returns when somebody is to die: at a random moment, or just after a checkpoint was begun."
    time.sleep(random.uniform(0.2, 0.5))
    if how == 0: return
    until = time.monotonic() + 20
    while not list(folder.glob(".tmp-[0-9]*")) and time.monotonic() < until: pass
    if how == 2: time.sleep(random.uniform(0, 0.03))


def kill_some(home: Path, k: int) -> bool:
    "Whether a checkpoint was left half-written; all others are whole, and none that was proven is lost."
    folder, children = home / "checkpoints", []
    began = len(listed(folder)) and int(listed(folder)[0].name[5:13])
    for rank in range(2):
        child = os.fork()
        if not child:
            sys.stderr = open(os.devnull, "w")  # the one that is left complains
            try: train(rank, home, k)
            finally: os._exit(1)
        children.append(child)
    until = time.monotonic() + 60
    while time.monotonic() < until and not (listed(folder) and int(listed(folder)[0].name[5:13]) > began): time.sleep(0.02)
    moment(folder, k % 3)
    first, *rest = [children, children[:1], children[1:]][k // 3 % 3]  # both, or rank 0, or rank 1: then the other one has time to see it
    for child in (first, *rest): os.kill(child, signal.SIGKILL)
    if len(rest) == 0: time.sleep(0.3)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    for path in listed(folder): verify(path)
    newest, proven = newest_good(folder), int((home / "done").read_text() or 0) if (home / "done").exists() else 0
    assert newest, "nothing was saved before the kill"
    state = read_checkpoint(newest)[0]
    assert state["step"] >= proven, f"step {proven} was proven, and {state['step']} is the newest that is left"
    momenta = [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
    assert all((t == state["step"]).all() for t in [*state["model"].values(), *momenta])
    left = bool(sweep(folder))
    assert not list(folder.glob(".tmp*"))
    return left


def main() -> None:
    home, count = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    random.seed(count)
    left = sum(kill_some(home, k) for k in range(count))
    print(f"killed {count} times, in the middle of a save {left} times; the newest is {newest_good(home / 'checkpoints').name}")
    assert left >= count // 5, "too few were killed in the middle of a save to mean anything"


if __name__ == "__main__": main()
