"""Small models, data and listeners that the tests of the Trainer share."""
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from arc_nb import Callback, Trainer
from arc_nb.engine.checkpoint import best_good, newest_good, read_checkpoint


PATIENCE = 240  # seconds until a test of other processes gives up; none of them measures time


def until(true, what="it"):
    "Waits for a condition, and gives what it was."
    end = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < end, f"{what} did not happen in {PATIENCE} s"
        time.sleep(.02)
    return found


def fences(text: str) -> Iterator[tuple[str, str]]:
    "(section, text) of each fenced example of a guide."
    section, inside = "", None
    for line in text.splitlines():
        if inside is not None and line.strip() == "```": yield section, textwrap.dedent("\n".join(inside)) + "\n"; inside = None
        elif inside is not None: inside.append(line)
        elif line.strip().startswith("```"): inside = []
        elif line.startswith("#"): section = line.lstrip("# ").strip()


def classes(rows: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    "Three classes that four numbers tell apart."
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


def numbers(rows: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    "A linear target of four numbers, (rows, 1)."
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]]) + 1


def net(out: int = 3, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    "A small network with weights of its own seed."
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, out))


def trainer(model: nn.Module | None = None, data: Any = None, **settings: Any) -> Trainer:
    "A quiet Trainer on three classes, or on what is given."
    quiet: dict[str, Any] = {"run": False, "board": False, "batch_size": 16, "lr": 1e-2}
    data = classes() if data is None else data
    if not isinstance(data, (tuple, dict, Tensor, Dataset)): del quiet["batch_size"]  # they come in batches of their own
    if "step" not in settings: quiet["loss"] = "cross_entropy"
    return Trainer(model or net(), data, **quiet | settings)


def weights(model: nn.Module) -> Tensor:
    "A copy of all weights, end to end."
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


class On(Callback):
    "Calls functions at events: On(on_step_end=lambda trainer: ...)."
    def __init__(self, order: int = 0, **handlers: Any):
        self.order, self.seen = order, []
        def method(event: str, do: Any) -> Any:
            return lambda listener, trainer: (listener.seen.append(event), do(trainer))[1]
        self.__class__ = type("On", (On,), {event: method(event, do) for event, do in handlers.items()})


def saved(run: Path, which: str = "last") -> tuple[dict[str, Any], dict[str, Any]]:
    "State and metadata of a run's last or best checkpoint."
    path = newest_good(run / "checkpoints") if which == "last" else best_good(run / "checkpoints")
    assert path, f"{run} has no {which} checkpoint"
    return read_checkpoint(path)


def files(folder: Path) -> set[str]:
    "What lies under a folder."
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}
