"""Studies: the same model again and again, on other rows or with other settings, and what that tells"""

from typing import TYPE_CHECKING

_rooms = {"TimeSeriesFolds": "engine.splits", "BlockedFolds": "engine.splits", "Folds": "engine.splits", "folds": "engine.folds",
          "lanes_picture": "study.lanes", "cross_validate": "study.crossval", "CrossValidation": "study.crossval"}
__all__ = ["TimeSeriesFolds", "BlockedFolds", "Folds", "folds", "lanes_picture", "cross_validate", "CrossValidation"]

if TYPE_CHECKING:
    from ..engine.folds import folds
    from ..engine.splits import BlockedFolds, Folds, TimeSeriesFolds
    from .crossval import CrossValidation, cross_validate
    from .lanes import lanes_picture


def __getattr__(name: str):
    from importlib import import_module
    if name not in _rooms: raise AttributeError(f"module 'arc_nb.study' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"arc_nb.{_rooms[name]}"), name)


def __dir__() -> list[str]: return sorted([*globals(), *__all__])
