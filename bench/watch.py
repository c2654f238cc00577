"""What `fit(watch=True)` costs: CPU time with and without in interleaved pairs, and the calls of a step that would make a GPU's host wait.

usage: python bench/watch.py [pairs, default 30] [--smoke] [name ...]   writes bench/results/watch.json (not with --smoke)
"""
import json
import platform
import random
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from speed import GPT, Clock, fit, fresh, interval, settings  # the models and clocks of bench/speed.py; one thread, board drawn as live
from torch.utils._python_dispatch import TorchDispatchMode

from arc_nb import Callback, Trainer
from arc_nb.diagnose.probes import Probes

GOAL = 1.03  # on the GPT
WAITS = ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select",
         "aten::unique")



def fits(setting, home, epochs, watch):
    """A new Trainer, and the CPU seconds of the steps of its first fit, watched or not."""
    name, make, data, batch, loss, _, _ = setting
    trainer = Trainer(fresh(make), data, loss=loss, batch_size=batch, run=f"{home}/{name}", board="widget", callbacks=[Clock()])
    plain = trainer.fit
    trainer.fit = lambda epochs: plain(epochs=epochs, watch=watch)
    return trainer, fit(trainer, epochs)[0]


def overhead(setting, pairs, home, seconds):
    """The ratio of CPU time, its interval, and what the account of the probes says."""
    rows, batch, epochs = len(setting[2][0]), setting[3], setting[6]
    for _ in range(2): _, once = fits(setting, home, epochs, False)
    epochs = max(epochs, round(epochs * seconds / once))  # long enough that a fit is a fit, and not its beginning
    found, shares, layers = {False: [], True: []}, [], None
    for k in range(pairs):
        for watch in random.Random(k).sample([False, True], 2):
            trainer, took = fits(setting, home, epochs, watch)
            found[watch].append(took)
            if watch: layers = trainer.layers; shares.append(layers.share)
    ratios = [w / n for w, n in zip(found[True], found[False])]
    return {"ratio": interval(ratios), "pairs": pairs, "steps_a_fit": epochs * -(-rows // batch), "layers": len(layers.names),
            "seconds_a_fit": round(statistics.median(found[False]), 2), "own_account": round(statistics.median(shares), 4),
            "samples_a_fit": len(layers.steps)}


class Count(TorchDispatchMode):
    """Counts operations, those that read a value back, and copies from one device to another."""
    def __init__(self):
        super().__init__()
        self.calls = self.waits = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func.name().split(".")[0]
        self.waits += name in WAITS or (name == "aten::_to_copy" and "device" in (kwargs or {}) and kwargs["device"] != args[0].device)
        return func(*args, **(kwargs or {}))


class Counting(Callback):
    """Counts one step."""
    order = -99
    def __init__(self, at): self.at, self.count = at, None
    def on_step_start(self, trainer):
        if trainer.step + 1 == self.at: self.count = Count(); self.count.__enter__()


class Ending(Callback):
    """Stops counting, when everybody has heard of the step's end."""
    order = 99
    def __init__(self, counting): self.counting = counting
    def on_step_end(self, trainer):
        if trainer.step == self.counting.at: self.counting.count.__exit__(None, None, None)


def counts(names=()):
    """Operations and waits of the third step of the GPT: not watched, and watched."""
    out = {}
    tokens = torch.randint(0, 65, (64, 129), generator=torch.Generator().manual_seed(0))
    data = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    for watch in (False, Probes(*names, share=1.0)):
        counting = Counting(3)
        trainer = Trainer(fresh(GPT), data, loss="cross_entropy", batch_size=16, run=False, board=False,
                          callbacks=[counting, Ending(counting)])
        trainer.fit(steps=4, watch=watch)
        if watch: assert 3 in trainer.layers.steps
        out["watched" if watch else "plain"] = {"operations": counting.count.calls, "waits": counting.count.waits}
    return out


def keep(out, anew):
    """Writes what has been measured; what an earlier call measured stays, unless this is the first of all."""
    path = Path(__file__).parent / "results" / "watch.json"
    before = json.loads(path.read_text()) if path.exists() and not anew else {}
    path.write_text(json.dumps(before | out, indent=1) + "\n")
    print("written:", path, flush=True)


def main():
    smoke, numbers = "--smoke" in sys.argv, [int(a) for a in sys.argv[1:] if a.isdigit()]
    chosen = [a for a in sys.argv[1:] if not a.isdigit() and not a.startswith("-")]
    pairs = numbers[0] if numbers else 2 if smoke else 30
    warnings.simplefilter("ignore")
    out = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1,
           "measure": "CPU seconds from the first step to the last of a fit with watch=True, over those of one without, interleaved; "
                      "history, checkpoints and live board on in both; medians with 95 % intervals. waits: operations of one sampled "
                      "step that read a value back or copy between devices",
           "one_step": counts()}
    print("one step:", out["one_step"], flush=True)
    with tempfile.TemporaryDirectory() as home:
        for setting in reversed(settings(smoke)):
            if chosen and setting[0] not in chosen: continue
            out[setting[0]] = overhead(setting, pairs, home, 0.2 if smoke else 3.0 if setting[0].startswith("gpt") else 2.0)
            print(setting[0], out[setting[0]], flush=True)
            if not smoke: keep(out, anew=setting[0].startswith("gpt") and not chosen)
    step = out["one_step"]
    print(f"waits on a sampled step: {step['watched']['waits'] - step['plain']['waits']} more than on another; goal 0")
    if "gpt_16" in out:
        median, low, high = out["gpt_16"]["ratio"]
        print(f"gpt_16: {median} (interval {low} to {high}), goal at most {GOAL}: {'met' if median <= GOAL else 'MISSED'}")


if __name__ == "__main__": main()
