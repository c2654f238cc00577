"""A training script as somebody would write it for several machines: it is run by torchrun in tests/test_cluster.py.

usage: cluster_script.py RUN [RANK TO KILL], at its eighth step, once"""
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from small import classes, net

from arc_nb import Callback, Trainer


class Kill(Callback):
    "Ends a process without a word, as a system that runs out of memory does; once."
    everywhere = True

    def __init__(self, rank: int, marker: Path):
        self.rank, self.marker = rank, marker

    def on_step_start(self, trainer: Trainer) -> None:
        if trainer.step == 7 and trainer.ranks.rank == self.rank and not self.marker.exists():
            self.marker.touch()
            if os.environ.get("WHOLE_MACHINE"): os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


def make(run: Path, callbacks: Sequence[Callback] = (), dropout: float = 0.2) -> Trainer:
    "What is trained."
    return Trainer(net(dropout=dropout), classes(150), classes(40, 1), loss="cross_entropy", metrics=["accuracy"], batch_size=32, lr=1e-2,
                   clip_norm=0.5, checkpoint_every=int(os.environ.get("EVERY", 2)), run=run, board=False, callbacks=callbacks, device="cpu")


def main() -> None:
    run = Path(sys.argv[1])
    dropout = 0.0 if os.environ.get("WHOLE_MACHINE") else 0.2  # it draws other numbers on another number of processes
    trainer = make(run, [Kill(int(sys.argv[2]), run.with_suffix(".killed"))] if len(sys.argv) > 2 else [], dropout)
    trainer.fit(epochs=int(os.environ.get("EPOCHS", 4)), resume=True)
    if trainer.ranks.first:
        losses = trainer.history.frame().query("name == 'loss'")
        weights = [p.detach().flatten().tolist() for p in trainer.model.parameters()]
        told = {"world": trainer.ranks.world, "local": trainer.ranks.local_world, "node": os.environ["GROUP_RANK"], "weights": weights,
                "steps": losses["step"].tolist(), "losses": losses["value"].tolist()}
        run.with_suffix(".json").write_text(json.dumps(told))


if __name__ == "__main__": main()
