"""Train PyTorch models in notebooks: a live board, one Trainer, nothing lost

Modules:

- `arc_nb.engine.worker`: What runs in a process that `engine.launch` has started: a plain module, as process start-up makes bad reading.
- `arc_nb.track.attend`: What runs in the process of a TensorBoard: a plain module, as process start-up makes bad reading."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

_rooms = {"Trainer": "trainer", "show": "runs", "Callback": "engine.events", "Checkpoints": "engine.keeping",
          "EarlyStopping": "engine.callbacks", "EMA": "engine.callbacks", "SWA": "engine.callbacks", "Plots": "watch.plots",
          "notebook_launch": "relay", "Cluster": "engine.cluster", "Arc": "arc",
          "register_layer": "graph.catalogue", "CharLM": "tasks.text.charlm"}
__all__ = ["Trainer", "Callback", "Checkpoints", "EarlyStopping", "EMA", "SWA", "Plots", "show", "notebook_launch", "Cluster", "Arc",
           "register_layer", "CharLM"]

if TYPE_CHECKING:
    from .arc import Arc
    from .engine.callbacks import EMA, SWA, EarlyStopping
    from .engine.cluster import Cluster
    from .engine.events import Callback
    from .engine.keeping import Checkpoints
    from .graph.catalogue import register_layer
    from .relay import notebook_launch
    from .runs import show
    from .tasks.text.charlm import CharLM
    from .trainer import Trainer
    from .watch.plots import Plots


def __getattr__(name: str):
    from importlib import import_module
    if name not in _rooms: raise AttributeError(f"module 'arc_nb' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_rooms[name]}", __name__), name)


def __dir__() -> list[str]: return sorted([*globals(), *__all__])


def load_ipython_extension(shell) -> None:
    "What `%load_ext arc_nb` calls: lines that begin with a slash become commands."
    from .magics import load
    load(shell)


def unload_ipython_extension(shell) -> None:
    "What `%unload_ext arc_nb` calls."
    from .magics import unload
    unload(shell)
