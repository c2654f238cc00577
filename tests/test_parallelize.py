"""Tensor and pipeline parallelism through strategy=parallelize: two processes train as one does, and one resumes their checkpoints."""
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from small import classes
from torch import nn
from torch.nn.functional import cross_entropy, gelu

from arc_nb import Trainer, notebook_launch
from arc_nb.diagnose.samples import noise_pieces
from arc_nb.engine.pipelined import Pipelined


class Block(nn.Module):
    "A residual block of two layers."
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor: return x + self.down(gelu(self.up(x)))


def net(normed: bool = True) -> nn.Sequential:
    "Some layers, one with statistics of its own: they have to come from the stage that moves them."
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), Block(), Block(), nn.BatchNorm1d(8, momentum=0.5), nn.Linear(8, 3)]
    return nn.Sequential(*(layer for layer in layers if normed or not isinstance(layer, nn.BatchNorm1d)))


def tensor_parallel(model: nn.Module, mesh: Any) -> None:
    "Divides the matrices of the blocks, in place."
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    for block in (model[1], model[2]): parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})


def pipeline(model: nn.Module, mesh: Any) -> Pipelined:
    "Two stages; statistics of a batch in pieces would be others than those of the whole batch, so there is one piece."
    return Pipelined(model, [model[:2], model[2:]], mesh["stage"], cross_entropy, pieces=1)


def one_forward_one_backward(model: nn.Module, mesh: Any) -> Pipelined:
    "Another schedule, in pieces."
    from torch.distributed.pipelining import Schedule1F1B
    return Pipelined(model, [model[:1], model[1:]], mesh["stage"], cross_entropy, schedule=Schedule1F1B)


def step(model: nn.Module, batch: Any) -> torch.Tensor:
    "The loss of either kind of model."
    x, y = batch
    return model(x, y) if isinstance(model, Pipelined) else cross_entropy(model(x), y)


WAYS: dict[str, dict[str, Any]] = {  # the last is none of these: rows are divided, and the noise scale is measured
    "tensor": {"loss": "cross_entropy", "metrics": ["accuracy"], "strategy": (tensor_parallel, {"mesh": {"tp": 2}})},
    "pipeline": {"step": step, "optimizer": "sgd", "strategy": (pipeline, {"mesh": {"stage": 2}})},
    "1f1b": {"step": step, "strategy": (one_forward_one_backward, {"mesh": {"stage": 2}})},
    "data": {"loss": "cross_entropy"}}


CUT = [way for way in WAYS if way != "data"]


def make(way: str, run: Any = False, **settings: Any) -> Trainer:
    "A Trainer that accumulates, clips, validates, and has a last batch that is smaller."
    return Trainer(net(way == "pipeline"), classes(150), classes(40, 1), batch_size=32, accumulate=2, clip_norm=0.3, lr=1e-2, run=run,
                   board=False, **{**WAYS[way], **settings})


def in_two_processes(folder: Path) -> dict[str, Any]:
    "Each way: two epochs, a copy of the run folder, and two epochs more, resumed by a new Trainer."
    found = {}
    for way in CUT:
        first = make(way, folder / way)
        first.fit(epochs=2)
        if first.ranks.first: shutil.copytree(folder / way, folder / f"{way}-2")
        second = make(way, folder / way)
        second.fit(epochs=4, resume=True)
        found[way] = (second.history.frame(), second.predict(classes(10)[0]), second.evaluate(classes(40, 1)))
    watched = make("data")
    watched.fit(steps=1, watch=("gradients",))
    return found | {"noise": watched.layers.pieces}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, notebook_launch(in_two_processes, (folder,), processes=2)


def numbers(frame: Any) -> torch.Tensor:
    "Losses, norms and metrics of a run, in order."
    return torch.tensor(frame[frame["name"].isin(["loss", "grad_norm", "accuracy"])]["value"].to_numpy())


@pytest.mark.parametrize("way", CUT)
def test_two_processes_train_as_one_does_and_one_resumes_them(way: str, two: tuple[Path, dict[str, Any]]) -> None:
    folder, found = two
    frame, output, scores = found[way]
    one = make(way, strategy="auto")
    one.fit(epochs=4)
    assert (numbers(frame) - numbers(one.history.frame())).abs().max() < 2e-6
    assert (output - one.predict(classes(10)[0])).abs().max() < 1e-4
    assert abs(scores["loss"] - one.evaluate(classes(40, 1))["loss"]) < 1e-5
    resumed = make(way, folder / f"{way}-2", strategy="auto")
    resumed.fit(epochs=4, resume=True)
    assert (numbers(resumed.history.frame()) - numbers(one.history.frame())).abs().max() < 2e-6


def test_the_weights_come_back_whole_into_the_notebook() -> None:
    trainer, one = make("tensor"), make("tensor", strategy="auto")
    trainer.fit(epochs=1, processes=2)
    one.fit(epochs=1)
    for a, b in zip(trainer.model.parameters(), one.model.parameters(), strict=True):
        assert type(a) is nn.Parameter and (a - b).abs().max() < 1e-5


def test_the_noise_scale_comes_from_the_rows_of_one_rank_and_of_all(two: tuple[Path, dict[str, Any]]) -> None:
    one = make("data")
    batches = [*islice(one.setup.train.epoch(1), 2)]
    def square(rows: slice) -> float:
        "Of the norm of the mean gradient over these rows of both batches."
        x, y = (torch.cat([part(b)[rows] for b in batches]) for part in (lambda b: b.inputs[0], lambda b: b.target))
        return float(sum(g.square().sum() for g in torch.autograd.grad(cross_entropy(one.model(x), y), list(one.model.parameters()))))
    assert two[1]["noise"][1] == pytest.approx(noise_pieces(square(slice(16)), square(slice(32)), 32, 64), rel=1e-3)
