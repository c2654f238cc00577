"""compile="step" gives the losses of the uncompiled step; compiling takes seconds, so no chapter does it."""
import copy

import numpy as np
import pytest
import torch
from small import classes, numbers, trainer
from torch import nn

from arc_nb.engine.batches import make_batches
from arc_nb.engine.compiled import CompiledStep
from arc_nb.engine.objectives import objective
from arc_nb.engine.step import Computation

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


RULES = {"adamw": (torch.optim.AdamW, {"weight_decay": 0.1}), "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True})}


def compiled(rule, state=None):
    "A model and its compiled step; `state` as `states` gives it."
    net = model()
    make, options = RULES[rule]
    step = CompiledStep(Computation(net, objective("cross_entropy")), make(net.parameters(), 1e-2, **options), clip_norm=1.0)
    if state is not None: load(step, state)
    return step


def states(step):
    return copy.deepcopy([step.compute.model.state_dict(), step.optimizer.state_dict(), step.state_dict(), torch.get_rng_state()])


def load(step, state):
    step.compute.model.load_state_dict(state[0]); step.optimizer.load_state_dict(copy.deepcopy(state[1])); step.load_state_dict(state[2])
    torch.set_rng_state(state[3])


def equal(a, b):
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def check_resume(rule, batches, cut):
    "All steps at once, or the last after `cut` of them with fresh objects, or with the objects that have gone on meanwhile."
    torch.manual_seed(7)
    step = compiled(rule)
    with step.settings():
        first = [step([b]) for b in batches[:cut]]
        kept = states(step)
        rest = [step([b]) for b in batches[cut:]]
        end, seconds = states(step), step.compile_seconds
        fresh = compiled(rule, kept)
        assert [fresh([b]) for b in batches[cut:]] == rest and equal(states(fresh), end)
        load(step, kept)
        with torch._dynamo.config.patch(error_on_recompile=True): assert [step([b]) for b in batches[cut:]] == rest
        assert equal(states(step), end) and step.compile_seconds == seconds
    assert all(np.isfinite(o.loss) for o in first + rest) and step.sound


def test_a_compiled_step_goes_on_to_the_bit():
    check_resume("adamw", [b for e in (1, 2) for b in make_batches(classes(40), 16).epoch(e)], 3)  # 16, 16, 8, 16, 16, 8


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cut", [1, 2, 5])  # 2: the first batch after it is the short one
def test_a_compiled_step_goes_on_to_the_bit_from_anywhere(rule, cut):
    check_resume(rule, [b for e in (1, 2) for b in make_batches(classes(40), 16).epoch(e)], cut)


def test_an_error_inside_a_compiled_step_may_have_changed_weights():
    step = compiled("adamw")
    [batch] = make_batches(classes(8), 8).epoch()
    step.graph.rows = -1  # nothing is compiled
    with pytest.raises(RuntimeError): step([batch._replace(inputs=(torch.ones(8, 5),))])
    assert not step.sound
    assert step([batch]).good and step.sound


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
