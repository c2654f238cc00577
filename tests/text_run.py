"""A small character model with its files, the same every time; as a program, one that a signal ends and that goes on.

usage: python tests/text_run.py folder [seconds a step] [processes]   prints a digest of the weights; goes on where the folder has something
"""
import hashlib
import sys
import time
from pathlib import Path

import torch

from arc_nb import Callback, Trainer
from arc_nb.engine.controls import exit_code
from arc_nb.engine.windows import Windows
from arc_nb.tasks.text.files import Files, read_lm, resumable
from arc_nb.tasks.text.settings import ModelSettings, TrainSettings
from arc_nb.tasks.text.tokens import CharTokenizer
from arc_nb.tasks.text.transformer import Transformer

TEXT = "The quick brown fox jumps over the lazy dog; the dog sleeps on. " * 9
CUT = 460  # characters to train on
TOKENIZER = CharTokenizer.fit([TEXT])
SETTINGS = ModelSettings(model_dim=16, num_layers=1, num_heads=2, max_seq_len=16, dropout=0.2, vocab_size=TOKENIZER.size)
TRAINING = TrainSettings(epochs=4, batch_size=4, learning_rate=1e-2)
EPOCH = 7  # steps


class Slow(Callback):
    "Takes its time, so that a signal comes in the middle."
    def __init__(self, seconds): self.seconds = seconds
    def on_step_end(self, trainer): time.sleep(self.seconds)


def make(run, *callbacks, keep=None, folder=None, **more):
    "A quiet Trainer of the model."
    torch.manual_seed(0)
    tokens = TOKENIZER.encode(TEXT)
    data = Windows(tokens[:CUT], 16), Windows(tokens[CUT:], 16, whole=True)
    files = Files(folder, TOKENIZER, SETTINGS, TRAINING, keep=keep, valid_text=TEXT[CUT:])
    given = dict(loss="cross_entropy", lr=1e-2, schedule="cosine", batch_size=4, run=run, board=False, callbacks=[*callbacks, files])
    return Trainer(Transformer(SETTINGS), *data, **given | more)


def digest(weights):
    "A digest of a state_dict."
    return hashlib.sha256(b"".join(w.cpu().numpy().tobytes() for w in weights.values())).hexdigest()[:16]


def main(folder, seconds="0", processes="1"):
    try: resume = resumable(folder)
    except FileNotFoundError: resume = False
    trainer = make(folder, Slow(float(seconds)), schedule=None)
    trainer.fit(epochs=6, resume=resume, processes=int(processes))
    print(trainer.status.state, trainer.step, digest(read_lm(Path(folder) / "final_model.pt").weights)
          if trainer.status.state == "completed" else "", flush=True)
    return exit_code(trainer.status.state)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(*sys.argv[1:]))
