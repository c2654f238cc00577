"""A step of two live ranks: the Trainer's and the step alone, beside DDP loops written by hand. Interleaved pairs, CPU and wall time.

usage: python bench/ddp.py [pairs, default 20] [--smoke]   writes bench/results/ddp.json (not with --smoke)
"""
import contextlib
import io
import json
import platform
import random
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from _gpt import GPT, flat_entropy
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from arc_nb import Callback, Trainer
from arc_nb.engine.batches import make_batches
from arc_nb.engine.launch import launch
from arc_nb.engine.objectives import objective
from arc_nb.engine.optimizers import optimizer
from arc_nb.engine.ranks import join
from arc_nb.engine.rankstep import RankStep
from arc_nb.engine.shards import share
from arc_nb.engine.step import Computation
from arc_nb.engine.strategies import check_strategy, place

CONTEXT, GOAL = 128, 1.05


def mlp(): return nn.Sequential(nn.Linear(20, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1))


def settings(smoke):
    """name, model, data, global batch size, our loss, the same by hand; a measurement is one epoch."""
    g = torch.Generator().manual_seed(0)
    rows, lines = (512, 32) if smoke else (16384, 128)
    tokens = torch.randint(0, 65, (lines, CONTEXT + 1), generator=g)
    return [("mlp_256", mlp, (torch.randn(rows, 20, generator=g), torch.randn(rows, 1, generator=g)), 256, "mse", F.mse_loss),
            ("gpt_16", GPT, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), 16, "cross_entropy", flat_entropy)]


def fresh(make):
    torch.manual_seed(0)
    return make()


class Clock(Callback):
    """Seconds from the first step to the last, of CPU and by the wall, on every rank."""
    order, everywhere = 99, True
    def on_fit_start(self, trainer): self.began = time.process_time(), time.perf_counter()
    def on_fit_end(self, trainer): self.took = time.process_time() - self.began[0], time.perf_counter() - self.began[1]


def runs(setting, ranks, home):
    """Four ways to train an epoch, by name: each a function that gives CPU and wall seconds."""
    name, make, data, size, loss, by_hand = setting
    batches = share(make_batches(data, size, seed=1), ranks)
    models = [DistributedDataParallel(fresh(make)) for _ in range(2)]
    rules = [torch.optim.AdamW(model.parameters(), 1e-3, fused=True) for model in models]
    model = fresh(make)
    compute = Computation(model, objective(loss))
    step = RankStep(compute, place(check_strategy("ddp"), model, optimizer("adamw", model, 1e-3), ranks))
    clock = Clock()
    trainer = Trainer(fresh(make), data, loss=loss, batch_size=size, run=f"{home}/{name}", board=False, callbacks=[clock], strategy="ddp")

    def tight():
        for batch in batches.epoch(1):
            value = by_hand(models[0](*batch.inputs), batch.target)
            rules[0].zero_grad(); value.backward(); rules[0].step()

    def usual():  # with the global loss and the norm of each step, as ours
        for batch in batches.epoch(1):
            value = by_hand(models[1](*batch.inputs), batch.target)
            rules[1].zero_grad(); value.backward()
            norm = nn.utils.clip_grad_norm_(models[1].parameters(), 1e9)
            mean = value.detach().clone()
            dist.all_reduce(mean)
            rules[1].step()
            (mean / ranks.world).item(), norm.item()

    def ours():
        for batch in batches.epoch(1): step([batch])

    def fit():
        with contextlib.redirect_stdout(io.StringIO()): trainer.fit(epochs=1)
        return clock.took

    return {"by hand, tight": timed(tight), "by hand, with loss and norm": timed(usual), "RankStep": timed(ours), "Trainer.fit": fit}


def timed(call):
    def run():
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        return time.process_time() - cpu, time.perf_counter() - wall
    return run


def interval(ratios):
    """Median with its 95 % interval by bootstrap."""
    rng, ratios = np.random.default_rng(0), np.array(ratios)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return [round(float(v), 3) for v in (np.median(ratios), *np.quantile(medians, (.025, .975)))]


def measure(pairs, home, smoke):
    """Inside each rank: rows by setting, with the CPU seconds of both ranks together."""
    warnings.simplefilter("ignore")
    ranks, out = join("cpu"), {}
    home = ranks.share(lambda: home)
    for setting in settings(smoke):
        ways = runs(setting, ranks, home)
        steps, found = -(-len(setting[2][0]) // setting[3]), {name: [] for name in ways}
        for call in ways.values(): call()
        for k in range(pairs):
            for name in random.Random(k).sample(sorted(ways), len(ways)):
                ranks.barrier()
                taken = ranks.gather(ways[name]())
                found[name].append((sum(cpu for cpu, _ in taken), max(wall for _, wall in taken)))
        ratio = lambda a, b, what, found=found: interval([x[what] / y[what] for x, y in zip(found[a], found[b])])
        hand, usual = list(ways)[:2]
        out[setting[0]] = [{"name": name, "cpu_us_a_step": round(1e6 * statistics.median(c for c, _ in found[name]) / steps / ranks.world),
                            "wall_us_a_step": round(1e6 * statistics.median(w for _, w in found[name]) / steps),
                            "cpu_of_tight": ratio(name, hand, 0), "cpu_of_usual": ratio(name, usual, 0),
                            "wall_of_usual": ratio(name, usual, 1)} for name in ways]
        if ranks.first:
            for row in out[setting[0]]: print(setting[0], row, flush=True)
    return out


def main():
    smoke, numbers = "--smoke" in sys.argv, [int(a) for a in sys.argv[1:] if a.isdigit()]
    pairs = numbers[0] if numbers else 2 if smoke else 20
    with tempfile.TemporaryDirectory() as home: found = launch(measure, (pairs, home, smoke), first_only=True)[0]
    out = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1, "processes": 2,
           "pairs": pairs, "measure": "an epoch in two live ranks (gloo), interleaved; CPU time of both ranks, a step and a rank; medians "
                                      "with 95 % intervals; Trainer.fit with history, norm and checkpoints on", **found}
    for name, rows in found.items():
        for row in rows[2:]:
            median, low, high = row["cpu_of_usual"]
            print(f"{name}, {row['name']}: {median} of the loop by hand ({low} to {high}), goal at most {GOAL}: "
                  f"{'met' if median <= GOAL else 'MISSED'}")
    if smoke: return
    path = Path(__file__).parent / "results" / "ddp.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print("written:", path)


if __name__ == "__main__": main()
