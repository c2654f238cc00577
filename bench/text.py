"""Character models: tokens a second of Trainer.fit beside a loop by hand, and writing with the cache beside writing without it.

usage: python bench/text.py [training] [generation] [--pairs N, default 12] [--plain] [--smoke]   all parts where none is named;
--plain leaves out what is compiled; writes bench/results/text.json, a key a part (not with --smoke or --plain)
"""
import argparse
import contextlib
import io
import json
import math
import platform
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import arc_nb.watch.board as board_room
from arc_nb import Callback, Trainer
from arc_nb.engine.windows import Windows
from arc_nb.tasks.text.generating import generate
from arc_nb.tasks.text.sampling import Sampling
from arc_nb.tasks.text.settings import ModelSettings
from arc_nb.tasks.text.tokens import CharTokenizer
from arc_nb.tasks.text.transformer import Transformer, count_parameters, decay_groups

torch.set_num_threads(1)
board_room.place = lambda: "kernel"  # the live board is drawn and serialised as in a notebook, though nobody looks
RESULTS = Path(__file__).parent / "results" / "text.json"
LETTERS = "".join(map(chr, range(32, 97)))  # 65, as many as tiny Shakespeare has
AT_LEAST, TIMES = 0.97, 5.0  # the goals


def quietly(call):
    """The CPU seconds of a call, its prints swallowed, and what it gave."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        began = time.process_time()
        found = call()
        return time.process_time() - began, found


def interval(ratios):
    """Median with its 95 % interval by bootstrap."""
    rng, ratios = np.random.default_rng(0), np.array(ratios)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    return [round(float(v), 3) for v in (np.median(ratios), *np.quantile(medians, (.025, .975)))]


def fresh(settings):
    torch.manual_seed(0)
    return Transformer(settings)


# Training. The loop by hand does what a good one does: windows at random places of the text in one tensor, fused AdamW, decay on matrices,
# warm-up and cosine, clipping, and the loss read at every step, as a progress bar has to.
def settings_to_train(smoke):
    """name, model, batch size, steps a measurement."""
    small = ModelSettings(model_dim=128, num_layers=4, num_heads=4, max_seq_len=64, dropout=0.0, vocab_size=65, positions="learned")
    usual = ModelSettings(vocab_size=65)
    return [("nanogpt_cpu", small, 12, 6 if smoke else 40)] + ([] if smoke else [("default", usual, 16, 4)])


class ByHand:
    """A loop that goes on where it stopped, as a Trainer does."""
    def __init__(self, settings, size, values, compiled):
        self.model = fresh(settings)
        self.call, self.settings, self.size, self.values = torch.compile(self.model) if compiled else self.model, settings, size, values
        flat, matrices = [[p for p in self.model.parameters() if (p.ndim > 1) == many] for many in (False, True)]
        self.rule = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}], 1e-3, fused=True)
        self.done, self.horizon = 0, 10_000

    def fit(self, steps):
        length, began, losses = self.settings.max_seq_len, time.process_time(), []
        for _ in range(steps):
            at = torch.randint(len(self.values) - length, (self.size,)).tolist()
            x = torch.stack([self.values[i:i + length] for i in at])
            y = torch.stack([self.values[i + 1:i + length + 1] for i in at])
            lr = 1e-3 * min((self.done + 1) / 100, 0.5 * (1 + math.cos(math.pi * self.done / self.horizon)))
            for group in self.rule.param_groups: group["lr"] = lr
            loss = F.cross_entropy(self.call(x).flatten(0, 1), y.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.rule.step()
            self.rule.zero_grad()
            losses.append(loss.item())
            self.done += 1
        return time.process_time() - began


class Clock(Callback):
    """CPU seconds to the end of the last step: without the checkpoint and the still picture that come once, when all is done."""
    order = 99
    def on_fit_start(self, trainer): self.began = time.process_time()
    def on_step_end(self, trainer): self.took = time.process_time() - self.began


class Ours:
    """The Trainer with history, gradient norm, checkpoints and the live board on."""
    def __init__(self, settings, size, values, compiled, run):
        self.clock, model = Clock(), fresh(settings)
        self.trainer = Trainer(model, Windows(values, settings.max_seq_len), loss="cross_entropy", batch_size=size, lr=1e-3, clip_norm=1.0,
                               groups=decay_groups(model, 0.1), schedule=("warmup_cosine", {"warmup": 100, "horizon": 10_000}),
                               compile=compiled, run=run, board="widget", callbacks=[self.clock])

    def fit(self, steps):
        quietly(lambda: self.trainer.fit(steps=steps))
        return self.clock.took


def training(pairs, smoke, plain, home):
    values, out = np.random.default_rng(0).integers(0, 65, 400_000, dtype=np.uint8), {}
    for name, settings, size, steps in settings_to_train(smoke):
        modes = {"": False} | ({} if plain else {", compiled": True}) | ({} if plain or settings.dropout else {", compile='step'": "step"})
        ways = {f"arc_nb{say}": Ours(settings, size, values, mode, f"{home}/{name}{say}") for say, mode in modes.items()}
        text = torch.from_numpy(values).long()
        ways |= {f"by hand{say}": ByHand(settings, size, text, True if mode else False) for say, mode in modes.items() if mode != "step"}
        found = {way: [] for way in ways}
        for way in ways.values(): way.fit(3)  # and compiles
        for k in range(pairs):
            for way in random.Random(k).sample(sorted(ways), len(ways)): found[way].append(ways[way].fit(steps))
        tokens = steps * size * settings.max_seq_len
        rivals = {way: way.replace("arc_nb", "by hand").replace("compile='step'", "compiled") for way in ways if way.startswith("arc_nb")}
        rows = [{"name": way, "tokens_a_second": round(tokens / statistics.median(found[way]))} for way in ways]
        for row in rows:
            if (rival := rivals.get(row["name"])): row["of_by_hand"] = interval([b / a for a, b in zip(found[row["name"]], found[rival])])
        out[name] = {"parameters": count_parameters(ways["arc_nb"].trainer.model), "settings": settings.changed(), "batch_size": size,
                     "rows": rows}
        for row in rows: print(name, row, flush=True)
        for row in rows:
            if "of_by_hand" in row: tell(f"{name}, {row['name']}, of a loop by hand", row["of_by_hand"], AT_LEAST)
    return out


# Generation: greedy, a text of one character and 512 more; both ways write the same.
def generation(pairs, smoke, plain, home):
    count = 64 if smoke else 512
    settings = ModelSettings(max_seq_len=count + 1, dropout=0.0, vocab_size=65)
    model, tokenizer, rows = fresh(settings).eval(), CharTokenizer.fit([LETTERS]), []
    ways = {"": model} | ({} if plain else {", compiled": torch.compile(model)})
    for say, called in ways.items():
        write = lambda cache, called=called: quietly(lambda: generate(called, tokenizer, "A", count, sampling=Sampling(greedy=True),
                                                                      cache=cache))
        texts = [write(cache)[1] for cache in (True, False, True, False)]  # and compiles
        if len(set(texts)) != 1: raise SystemExit(f"the texts differ with and without cache{say}")
        took = [(write(True)[0], write(False)[0]) for _ in range(max(2, pairs // 3))]
        row = {"name": f"cache{say}", "tokens_a_second": round(count / statistics.median(a for a, _ in took)),
               "without": round(count / statistics.median(b for _, b in took)), "times": interval([b / a for a, b in took])}
        rows.append(row)
        print("generation", row, flush=True)
        tell(f"{count} tokens with the cache{say}, times as fast", row["times"], TIMES)
    return {"tokens": count, "parameters": count_parameters(model), "rows": rows}


def tell(what, found, goal):
    median, low, high = found
    print(f"{what}: {median} (interval {low} to {high}), goal at least {goal}: {'met' if median >= goal else 'MISSED'}", flush=True)


PARTS = {"training": training, "generation": generation}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all where none is named")
    parser.add_argument("--pairs", type=int, default=0, help="interleaved measurements of each; 12, or 2 with --smoke")
    parser.add_argument("--plain", action="store_true", help="nothing is compiled, and nothing written")
    parser.add_argument("--smoke", action="store_true", help="small, to see that it runs; nothing is written")
    given = parser.parse_args()
    for part in given.parts:
        if part not in PARTS: parser.error(f"{part!r} is no part: take {', '.join(PARTS)}")
    warnings.simplefilter("ignore")
    about = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1,
             "measure": "CPU seconds, interleaved, medians with 95 % intervals; training: to the end of the last step, with history, "
                        "gradient norm, clipping, schedule and live board on; generation: greedy, one text"}
    out = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as home:
        for part in given.parts or PARTS:
            found = PARTS[part](given.pairs or (2 if given.smoke else 12), given.smoke, given.plain or given.smoke, home)
            out[part] = {"pairs": given.pairs or 12, **about, **found}
            if not (given.smoke or given.plain): RESULTS.write_text(json.dumps(out, indent=1) + "\n")
    if not (given.smoke or given.plain): print("written:", RESULTS)


if __name__ == "__main__": main()
