"""What the gradient's norm costs a step: one concatenation, a norm a tensor, or one flat buffer. CPU time a call, medians.

usage: python bench/norms.py   writes bench/results/norms.json
"""
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from arc_nb.engine.step import norm_of

torch.set_num_threads(1)


def micros(call, calls=400, rounds=15):
    """Median CPU microseconds of a call."""
    found = []
    for _ in range(rounds + 1):
        began = time.process_time()
        for _ in range(calls): call()
        found.append((time.process_time() - began) / calls * 1e6)
    return round(statistics.median(found[1:]), 1)


def mlp(width): return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))


def step(model, x, y, clear):
    """Forward, backward and the clearing of gradients, without an optimizer."""
    def call():
        clear()
        F.mse_loss(model(x), y).backward()
    return call


def measure(width):
    torch.manual_seed(0)
    model, x, y = mlp(width), torch.randn(32, 20), torch.randn(32, 1)
    parameters = list(model.parameters())

    def none():
        for p in parameters: p.grad = None
    plain = micros(step(model, x, y, none), 200)
    step(model, x, y, none)()
    grads = [p.grad for p in parameters]
    row = {"numbers": sum(p.numel() for p in parameters), "concatenated": micros(lambda: norm_of(grads, True)),
           "a norm a tensor": micros(lambda: norm_of(grads, False))}
    flat, at = torch.zeros(row["numbers"]), 0
    for p in parameters: p.grad, at = flat[at:at + p.numel()].view_as(p), at + p.numel()
    return row | {"flat buffer, with what it adds to the backward pass": round(
        micros(step(model, x, y, flat.zero_), 200) - plain + micros(lambda: torch.linalg.vector_norm(flat)), 1)}


def main():
    out = {"machine": platform.platform(), "torch": torch.__version__, "unit": "CPU microseconds a step",
           "mlp": [measure(width) for width in (64, 512, 8192)]}
    for row in out["mlp"]: print(row)
    path = Path(__file__).parent / "results" / "norms.json"
    path.write_text(json.dumps(out, indent=1) + "\n")
    print("written:", path)


if __name__ == "__main__": main()
