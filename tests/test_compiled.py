"""compile="step" gives the losses of the uncompiled step; compiling takes seconds, so no chapter does it."""
import numpy as np
import pytest
import torch
from small import classes, numbers, trainer
from torch import nn

SETTINGS = {
    "adamw, clipped, one_cycle": dict(clip_norm=0.5, schedule="one_cycle"),
    "sgd, penalty": dict(optimizer=("sgd", {"momentum": 0.9, "nesterov": True}), l2=1e-3),
    "adam, weight decay, groups": dict(optimizer=("adam", {"weight_decay": 0.01}), groups={"4*": {"lr": 1e-3}}),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def losses(compile: bool | str, **settings) -> np.ndarray:
    t = trainer(model(), classes(210), valid=classes(60, 1), metrics=["accuracy"], compile=compile, **settings)
    return t.fit(epochs=8).series("train", "loss")[1]


def check(name: str) -> None:
    plain, compiled = losses(False, **SETTINGS[name]), losses("step", **SETTINGS[name])
    assert len(plain) == 112 and plain[-14:].mean() < plain[:14].mean()  # 13 batches of 16 and a short one, 8 epochs
    assert np.abs(plain - compiled)[:100].max() < 1e-5


def test_the_whole_step_in_one_graph_gives_the_same_losses(): check("adamw, clipped, one_cycle")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_losses_with_every_rule(name): check(name)


@pytest.mark.slow
def test_more_trainers_than_torch_keeps_graphs_of_one_function():
    for width in range(1, 11):
        t = trainer(nn.Linear(4, 1), numbers(16 * width), loss="mse", compile="step", batch_size=16 * width)
        t.fit(epochs=2)
        assert t.status.state == "completed" and t.setup.step.compile_seconds > 0


def test_a_batch_that_is_not_finite_changes_nothing():
    x, y = classes(32)
    x[20] = float("nan")
    t = trainer(model(), [(x[:16], y[:16]), (x[16:], y[16:])], compile="step")
    kept = {}
    with pytest.warns(RuntimeWarning, match="batch 2: the data"):
        from arc_nb import Callback
        class Keep(Callback):
            def on_step_end(self, trainer): kept.update({k: v.clone() for k, v in trainer.model.state_dict().items()})
        t.callbacks.append(Keep())
        t.fit(epochs=1)
    assert all(torch.equal(v, kept[k]) for k, v in t.model.state_dict().items() if "num_batches" not in k)


@pytest.mark.parametrize("settings, said", [({"accumulate": 2}, "accumulate"), ({"optimizer": "lbfgs"}, "adamw, adam and sgd"),
                                            ({"train_metrics": ["accuracy"]}, "metrics="), ({"precision": "fp16"}, "loss scaler")])
def test_what_cannot_be_part_of_a_graph_is_refused(settings, said):
    with pytest.raises(ValueError, match=said): trainer(compile="step", **settings)
