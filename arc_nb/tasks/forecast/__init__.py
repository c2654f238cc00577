"""Forecasting: long frames of time series become models, forecasts with intervals, and an account of their errors.

Docs: https://arc-nb.github.io/arc_nb/tasks/forecaster.html.md"""

from typing import TYPE_CHECKING

_rooms = {"Forecaster": "forecaster", "RNN": "recurrent", "LSTM": "recurrent", "GRU": "recurrent", "DeepAR": "deepar",
          "Transformer": "transformer", "PatchTST": "patchtst", "MLP": "mlp", "DLinear": "linear", "NLinear": "linear",
          "NBEATS": "nbeats", "NHITS": "nhits", "TCN": "tcn", "Naive": "baselines", "SeasonalNaive": "baselines", "Drift": "baselines",
          "MovingAverage": "baselines", "Statistical": "statistical", "Panel": "panel", "Conformal": "conformal", "score": "scores",
          "backtest": "backtesting", "analyse": "residuals", "diebold_mariano": "comparison", "air_passengers": "samples",
          "synthetic": "samples"}
__all__ = ["Forecaster", "RNN", "LSTM", "GRU", "DeepAR", "Transformer", "PatchTST", "MLP", "DLinear", "NLinear", "NBEATS", "NHITS", "TCN",
           "Naive", "SeasonalNaive", "Drift", "MovingAverage", "Statistical", "Panel", "Conformal", "score", "backtest", "analyse",
           "diebold_mariano", "air_passengers", "synthetic"]

if TYPE_CHECKING:
    from .backtesting import backtest
    from .baselines import Drift, MovingAverage, Naive, SeasonalNaive
    from .comparison import diebold_mariano
    from .conformal import Conformal
    from .deepar import DeepAR
    from .forecaster import Forecaster
    from .linear import DLinear, NLinear
    from .mlp import MLP
    from .nbeats import NBEATS
    from .nhits import NHITS
    from .panel import Panel
    from .patchtst import PatchTST
    from .recurrent import GRU, LSTM, RNN
    from .residuals import analyse
    from .samples import air_passengers, synthetic
    from .scores import score
    from .statistical import Statistical
    from .tcn import TCN
    from .transformer import Transformer


def __getattr__(name: str):
    from importlib import import_module
    if name not in _rooms: raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f".{_rooms[name]}", __name__), name)


def __dir__() -> list[str]: return sorted([*globals(), *__all__])
