"""How well a character model learns tiny Shakespeare, beside nanoGPT's published numbers: bench/results/shakespeare.json.

The settings are those of nanoGPT's README: `cpu` (4 layers, 4 heads, 128 wide, context 64, batch 12, 2000 steps: validation loss 1.88)
and, where there is a GPU, `gpu` (6 layers, 6 heads, 384 wide, context 256, batch 64, 5000 steps, dropout 0.2: 1.4697). Positions are
rotary, as by default here; `learned` is the cpu setting with learned positions, as nanoGPT has them. The loss is the mean over all
held-out characters, in windows that do not overlap. The tutorial draws the curves.

usage: python bench/shakespeare.py [cpu] [learned] [gpu] [--seed 42]
"""
import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch

import arc_nb
from arc_nb import CharLM

HERE = Path(__file__).parent
DATA = Path(os.environ.get("ARC_NB_DATA", HERE.parent.parent / "shared/data")) / "tinyshakespeare.txt"
SHARED = {"lr_schedule": "cosine", "warmup_steps": 100, "learning_rate": 1e-3, "min_lr": 1e-4, "beta2": 0.99, "weight_decay": 0.1}
CPU = dict(num_layers=4, num_heads=4, model_dim=128, max_seq_len=64, dropout=0.0, batch_size=12, max_steps=2000, eval_every=250, **SHARED)
GPU = dict(num_layers=6, num_heads=6, model_dim=384, max_seq_len=256, dropout=0.2, batch_size=64, max_steps=5000, eval_every=250,
           mixed_precision=True, compile=True, **SHARED)
SETTINGS = {"cpu": CPU, "learned": {**CPU, "positions": "learned"}, "gpu": GPU}
PUBLISHED = {"cpu": 1.88, "learned": 1.88, "gpu": 1.4697}  # nanoGPT's README


def trained(name: str, seed: int = 42, **changed) -> dict:
    "One run: its curves, its scores, and what it writes."
    with tempfile.TemporaryDirectory() as folder:
        lm = CharLM.from_file(DATA, val_split=0.1, seed=seed, **{**SETTINGS[name], **changed})
        began, cpu = time.perf_counter(), time.process_time()
        history = lm.fit(output_dir=Path(folder) / "run", board=False)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        points = {split: zip(*history.series(split, "loss")) for split in ("train", "valid")}
        curves = {f"{split}_loss": [[int(s), round(float(v), 4)] for s, v in found] for split, found in points.items()}
        curves["train_loss"] = curves["train_loss"][::10]
        scores = lm.evaluate()
        best = CharLM.load(Path(folder) / "run" / "best.pt", data=DATA).evaluate()["loss"]
        return {"seed": seed, "parameters": sum(p.numel() for p in lm.model.parameters()), "scores": scores, "best_loss": best,
                "published": PUBLISHED[name], "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "curves": curves,
                "settings": {**SETTINGS[name], **changed}, "text": lm.generate("\n", max_new_tokens=400, temperature=0.8, seed=0)}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument("part", nargs="*", choices=list(SETTINGS), default=["cpu", "learned"] + ["gpu"] * torch.cuda.is_available())
    args.add_argument("--seed", type=int, default=42)
    given = args.parse_args()
    if not DATA.is_file():
        print(f"skipped: {DATA} is not there (ARC_NB_DATA names the folder with tinyshakespeare.txt)")
        return
    path = HERE / "results/shakespeare.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    machine = {"python": platform.python_version(), "torch": torch.__version__, "arc_nb": arc_nb.__version__, "cores": os.cpu_count(),
               "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    for part in given.part:
        found[part] = {**trained(part, given.seed), "machine": machine}
        scores = found[part]["scores"]
        said = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float))
        print(f"{part}: {said}; nanoGPT's loss {PUBLISHED[part]}; {found[part]['seconds']:.0f} s", flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
