"""arc_nb: train PyTorch models in notebooks. Names are loaded when they are first used, so that the import costs little."""
__version__ = "0.1.0"

from typing import TYPE_CHECKING

_rooms = {"Trainer": "trainer", "show": "runs", "Callback": "engine.events", "Checkpoints": "engine.keeping",
          "EarlyStopping": "engine.callbacks", "EMA": "engine.callbacks", "SWA": "engine.callbacks"}
__all__ = ["Trainer", "Callback", "Checkpoints", "EarlyStopping", "EMA", "SWA", "show"]

if TYPE_CHECKING:
    from .engine.callbacks import EMA, SWA, EarlyStopping
    from .engine.events import Callback
    from .engine.keeping import Checkpoints
    from .runs import show
    from .trainer import Trainer


def __getattr__(name: str):
    from importlib import import_module
    if name not in _rooms: raise AttributeError(f"module 'arc_nb' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_rooms[name]}", __name__), name)


def __dir__() -> list[str]: return sorted([*globals(), *__all__])
