"""fit(processes=2): the same training as in one process, and everything comes back. What ranks can do alone runs in one launch."""
import os
import re
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from small import until
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from arc_nb import EMA, Callback, EarlyStopping, Trainer, notebook_launch
from arc_nb.engine.crew import ProcessKilled

X = torch.randn(203, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, :2].sum(1) > 0).long() + (X[:, 2] > 1).long()
CLOSE = 2e-6  # of losses, after some dozens of steps in fp32


def model(dropout: float = 0.) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 3))


def trainer(**given) -> Trainer:
    data = {"train": (X, Y), "valid": (X[:67], Y[:67]), "loss": "cross_entropy", "metrics": ["accuracy"], "lr": 1e-2, "batch_size": 30,
            "run": False, "board": False}
    net = given.pop("model", None) or model(given.pop("dropout", 0.))
    return Trainer(net, **(data | given))


def losses(t: Trainer, split: str = "train", name: str = "loss") -> np.ndarray: return t.history.series(split, name)[1]


def same(a: dict, b: dict, close: float = 0.) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(v, b[k], rtol=0, atol=close) for k, v in a.items())


def apart(a: Trainer, b: Trainer) -> float: return float(np.abs(losses(a) - losses(b)).max())


class Items(Dataset):
    "Items that draw: what they draw depends on their index."
    def __len__(self): return len(X)
    def __getitem__(self, k): return X[k] + .01 * torch.randn(6), Y[k]


class Halves(Callback):
    def on_epoch_end(self, trainer): trainer.lr *= .5


class Freezes(Callback):
    "Fine-tunes: the first layer rests from the start, is trained for an epoch, and rests again; said on rank 0 only."
    def _rest(self, trainer, rests):
        for p in trainer.model[0].parameters(): p.requires_grad_(not rests)
    def on_fit_start(self, trainer): self._rest(trainer, True)
    def on_epoch_end(self, trainer): self._rest(trainer, trainer.epoch != 1)


class Early(Callback):
    "Stops in the middle of an epoch, by a callback of rank 0."
    def on_step_end(self, trainer):
        if trainer.step == 5: trainer.stop()


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
    def forward(self, x): return self.head(self.embed(x))


WORDS = torch.randint(0, 11, (45, 7), generator=torch.Generator().manual_seed(3))
NEXT = torch.where(torch.arange(7) < torch.randint(1, 8, (45, 1), generator=torch.Generator().manual_seed(4)), WORDS.roll(-1, 1), -100)


def own_step(net, batch):
    x, y = batch
    output = net(x)
    return {"loss": nn.functional.cross_entropy(output, y), "right": (output.argmax(1) == y).float().mean()}


CASES = {
    "plain": {},
    "odd rows": {"batch_size": 7},
    "fewer rows than ranks": {"batch_size": 1, "train": (X[:9], Y[:9])},
    "accumulated, clipped": {"batch_size": 16, "accumulate": 3, "clip_norm": .05},
    "clipped by value": {"clip_value": .001},
    "weights a row": {"train": (X, Y, torch.arange(203.) % 3), "valid": (X[:67], Y[:67], torch.arange(67.) % 2), "weighted": True},
    "tokens, some ignored": {"model": Tokens, "train": (WORDS, NEXT), "valid": (WORDS[:9], NEXT[:9]), "batch_size": 8, "accumulate": 2},
    "a dict": {"train": {"input": X, "y": Y}, "valid": {"input": X[:67], "y": Y[:67]}},
    "a data set that draws": {"train": Items},
    "a data set, with workers": {"train": Items, "workers": 1},
    "a loader that shuffles": {"train": lambda: DataLoader(TensorDataset(X, Y), batch_size=30, shuffle=True)},
    "a list of batches": {"train": lambda: list(zip(X.split(25), Y.split(25))), "metrics": ["auroc", "f1", "confusion_matrix"]},
    "a step of its own": {"loss": None, "metrics": (), "step": lambda: own_step},
    "train metrics": {"train_metrics": ["accuracy", "auroc"]},
    "a schedule": {"schedule": "one_cycle"},
    "a plateau": {"schedule": ("plateau", {"patience": 0})},
    "an average": {"callbacks": lambda: [EMA(.9)]},
    "a rate that a callback sets": {"callbacks": lambda: [Halves()]},
    "a callback that stops": {"callbacks": lambda: [Early()]},
    "a callback that freezes": {"callbacks": lambda: [Freezes()]},
    "a callback that freezes, zero1": {"callbacks": lambda: [Freezes()], "strategy": "zero1"},
    "stopped early": {"callbacks": lambda: [EarlyStopping(patience=1, min_delta=.5)]},
    "l2": {"l2": 1e-3},
    "sgd": {"optimizer": ("sgd", {"momentum": .9})},
    "groups": {"groups": {"0.*": {"lr": 1e-4}}},
    "bf16": {"precision": "bf16"},
    "zero1": {"strategy": "zero1", "clip_norm": .05},
    "zero2": {"strategy": ("zero2", {"min_params": 50}), "clip_norm": .05, "callbacks": lambda: [EMA(.9)]},
    "zero3": {"strategy": ("zero3", {"min_params": 50}), "batch_size": 7, "accumulate": 2, "train_metrics": ["accuracy"]},
    "activations computed again": {"strategy": ("ddp", {"checkpoint_activations": True, "units": "0"})},
}


def normed() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


RUNS = {  # other numbers than in one process, for a reason
    "batch norm, a last batch of three": {"model": normed, "train": (X[:33], Y[:33])},
    "batch norm, a last batch of two, in a data set": {"model": normed, "train": lambda: TensorRows(32)},
    "batch norm, a last batch of two, in a list": {"model": normed, "train": lambda: [(X[:30], Y[:30]), (X[30:32], Y[30:32])]},
}


class TensorRows(Dataset):
    def __init__(self, rows): self.rows = rows
    def __len__(self): return self.rows
    def __getitem__(self, k): return X[k], Y[k]


def made(name: str) -> Trainer:
    given = dict((CASES | RUNS)[name])
    for key in ("model", "train", "step", "callbacks"):
        if callable(given.get(key)): given[key] = given[key]()
    if "strategy" in given and not torch.distributed.is_initialized(): del given["strategy"]
    return trainer(**given)


def run_all(names) -> dict:
    "Each case in this process, or in each of those that train together: what it left."
    found = {}
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        for name in names:
            t = made(name)
            t.fit(epochs=3, limit_batches=8)
            state = t.setup.weights("whole")["model"]
            found[name] = {"loss": losses(t), "valid": {n: t.history.series("valid", n)[1] for s, n in t.history.names() if s == "valid"},
                           "epoch": t.history.epochs().drop(columns=["seconds", "samples_per_second", "data_seconds", "metric_seconds"],
                                                            errors="ignore"),
                           "lr": t.lr, "step": t.step, "state": t.status.state, "weights": state, "steps": len(losses(t)),
                           "extra": t.history.series("train", "right")[1], "saved": len(t.state_dict()["model"])}
    return found


@pytest.fixture(scope="module")
def two(): return notebook_launch(run_all, args=(list(CASES | RUNS),), processes=2)


@pytest.fixture(scope="module")
def one(): return run_all(list(CASES))


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_train_as_one(one, two, name):
    a, b = one[name], two[name]
    assert (a["step"], a["state"], a["lr"]) == (b["step"], b["state"], b["lr"])
    rough = 2e-2 if name == "bf16" else CLOSE  # bf16: the rows are added up in another order; tests/test_strategies.py compares it exactly
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=0, atol=rough)
    for metric, values in a["valid"].items(): np.testing.assert_allclose(values, b["valid"][metric], rtol=0, atol=max(rough, 1e-5))
    assert list(a["epoch"].columns) == list(b["epoch"].columns)
    np.testing.assert_allclose(a["epoch"].to_numpy(float), b["epoch"].to_numpy(float), rtol=0, atol=max(rough, 1e-5))
    np.testing.assert_allclose(a["extra"], b["extra"], atol=1e-6)
    assert a["weights"].keys() == b["weights"].keys()
    assert all(torch.allclose(v, b["weights"][k], rtol=0, atol=50 * rough) for k, v in a["weights"].items())


@pytest.mark.parametrize("name", list(RUNS))
def test_batch_norm_never_gets_a_single_row(two, name): assert (two[name]["state"], two[name]["step"]) == ("completed", 6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.line, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
    def forward(self, x): return x + self.norm(self.line(x)).relu()


def test_strategies_in_one_process(tmp_path):
    blocks = lambda: nn.Sequential(nn.Linear(6, 16), Block(), nn.Linear(16, 3))
    plain = trainer(model=blocks())
    start = {k: v.clone() for k, v in plain.model.state_dict().items()}
    plain.fit(epochs=2)
    again = blocks()
    again.load_state_dict(start)
    t = trainer(model=again, strategy=("ddp", {"checkpoint_activations": True}), run=tmp_path / "run")
    t.fit(epochs=1)
    t.fit(epochs=2, resume=True)
    assert same(t.model.state_dict(), plain.model.state_dict()) and len(list((tmp_path / "run/checkpoints").iterdir())) == 2


# --- from the notebook's side -------------------------------------------------------------------------------------------------------


class Odd:
    "Can be packed, and not unpacked."
    def __reduce__(self): return int, ("x",)


class Notes(Callback):
    "Has nothing but attributes; they come back, and what belongs to the Trainer is the Trainer's own."
    def __init__(self): self.seen, self.late, self.bar = [], None, None
    def on_fit_start(self, trainer):
        self.trainer, self.net, self.kept = trainer, trainer.model, next(trainer.model.parameters())
        self.bar = Odd() if trainer.ranks.many else None
    def on_epoch_end(self, trainer):
        self.seen.append((trainer.epoch, trainer.ranks.world, os.getpid()))
        print("epoch", trainer.epoch)


def test_everything_comes_back(tmp_path, capsys):
    notes, t = Notes(), None
    t = trainer(run=tmp_path / "run", callbacks=[notes, EMA(.9)], metrics=["accuracy"])
    plain = trainer(callbacks=[EMA(.9)])
    own = t.model
    for fit in (t, plain): fit.fit(epochs=1)
    with pytest.warns(RuntimeWarning, match="bar of the callback"): history = t.fit(epochs=2, processes=2)
    assert notes.trainer is t and notes.net is own and notes.kept is next(own.parameters())
    plain.fit(epochs=2)
    t.fit(epochs=1)                                                     # and on in this process
    plain.fit(epochs=1)
    assert t.model is own and history is t.history and t.step == plain.step and t.epoch == 4 and t.status.state == "completed"
    assert apart(t, plain) < CLOSE and t.evaluate((X, Y))["loss"] == pytest.approx(plain.evaluate((X, Y))["loss"], abs=1e-5)
    assert [epoch for epoch, _, _ in notes.seen] == [1, 2, 3, 4] and [world for _, world, _ in notes.seen] == [1, 2, 2, 1]
    assert len({pid for _, _, pid in notes.seen}) == 2
    assert same(t.callbacks[1].average, plain.callbacks[0].average, 1e-5)
    printed = capsys.readouterr().out
    assert "[rank 0] epoch 2" in printed and "[rank 1] epoch" not in printed
    assert "2 processes on the CPU (gloo): 30 rows a step in all, 15 in each" in printed
    assert (tmp_path / "run" / "history.jsonl").read_text().count("\n") == t.history.position()["lines"]
    assert t.history.epochs()["epoch"].tolist() == [1, 2, 3, 4] and t.save_checkpoint(tmp_path / "kept").exists()


def test_exact_resume_with_two_and_with_other_numbers(tmp_path):
    whole, drop = trainer(dropout=.2), trainer(dropout=.2, run=tmp_path / "drop")
    whole.fit(epochs=3, processes=2)
    drop.fit(steps=10, processes=2)                                     # in the middle of an epoch
    drop = trainer(dropout=.2, run=tmp_path / "drop")
    drop.fit(epochs=3, processes=2, resume=True)
    assert losses(whole).tolist() == losses(drop).tolist() and same(whole.model.state_dict(), drop.model.state_dict())
    assert whole.history.series("valid", "loss")[1].tolist() == drop.history.series("valid", "loss")[1].tolist()
    alone = trainer()
    alone.fit(epochs=3)
    for name, first, then in (("fewer", {"processes": 2}, {}), ("more", {}, {"processes": 2})):
        trainer(run=tmp_path / name).fit(steps=10, **first)
        t = trainer(run=tmp_path / name)
        t.fit(epochs=3, resume=True, **then)
        assert t.step == alone.step and apart(t, alone) < CLOSE, name
        print(f"{name} processes after a resume: largest loss difference {apart(t, alone):.1g}")


def test_divided_weights_resume(tmp_path):
    given = {"dropout": .2, "strategy": ("zero3", {"min_params": 50})}
    averages = lambda: {"callbacks": [EMA(.9)]}
    whole, drop = trainer(**given, **averages()), trainer(**given, **averages(), run=tmp_path / "drop")
    whole.fit(epochs=3, processes=2)
    drop.fit(steps=10, processes=2)
    assert {f.name for f in (tmp_path / "drop/checkpoints").glob("step-*10/*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    drop = trainer(**given, **averages(), run=tmp_path / "drop")
    drop.fit(epochs=3, processes=2, resume=True)
    assert losses(whole).tolist() == losses(drop).tolist() and same(whole.model.state_dict(), drop.model.state_dict())
    assert same(whole.callbacks[0].average, drop.callbacks[0].average)
    drop.restore("best")
    assert drop.evaluate((X[:67], Y[:67]))["loss"] == pytest.approx(min(losses(drop, "valid")), abs=1e-5)
    one = trainer(**{**given, "strategy": "auto"}, **averages(), run=tmp_path / "drop")  # the same run, in one process
    one.fit(epochs=4, resume=True)
    assert one.step == 28 and one.status.state == "completed"


class Kill(Callback):
    "Kills rank 1, once."
    everywhere = True
    def __init__(self, note): self.note = note
    def on_step_end(self, trainer):
        if trainer.step == 12 and trainer.ranks.rank == 1 and not self.note.exists():
            self.note.write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_rank_is_noticed_at_once_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("arc_nb.fitting.PAUSE", .01)
    plain = trainer(dropout=.2)
    plain.fit(epochs=3, processes=2)
    t = trainer(dropout=.2, run=tmp_path / "killed", callbacks=[Kill(tmp_path / "note")], checkpoint_every=5)
    with pytest.raises(ProcessKilled, match="rank 1 was ended by SIGKILL") as caught: t.fit(epochs=3, processes=2)
    took = time.time() - float((tmp_path / "note").read_text())
    print(f"a killed rank was told after {took:.2f} s")
    assert caught.value.rank == 1 and took < 30 and t.status.state == "failed" and "SIGKILL" in t.status.message
    (tmp_path / "note").unlink()
    t = trainer(dropout=.2, run=tmp_path / "again", callbacks=[Kill(tmp_path / "note")], checkpoint_every=5)
    with pytest.warns(RuntimeWarning, match="goes on from its last good checkpoint"): t.fit(epochs=3, processes=2, retry=1)
    assert losses(t).tolist() == losses(plain).tolist() and same(t.model.state_dict(), plain.model.state_dict())


class Fails(Callback):
    everywhere = True
    def __init__(self, rank, at=9): self.rank, self.at = rank, at
    def on_step_end(self, trainer):
        if trainer.step == self.at and trainer.ranks.rank == self.rank: raise LookupError(f"on purpose, in rank {self.rank}")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_a_rank_comes_with_its_own_traceback(tmp_path, rank):
    t = trainer(run=tmp_path / "run", callbacks=[Fails(rank)])
    with pytest.raises(LookupError, match="on purpose") as caught: t.fit(epochs=3, processes=2)
    assert f"in rank {rank}" in str(caught.value.__cause__) and "on_step_end" in str(caught.value.__cause__)
    assert t.status.state == "failed" and "on purpose" in t.status.message and t.step == len(losses(t)) and t.step in (9, 10)
    assert not same(t.model.state_dict(), model().state_dict())          # what rank 0 had is here
    t.callbacks.clear()
    t.fit(epochs=1, processes=2)                                        # and once more, in the same process
    assert t.status.state == "completed"


class Dies(Callback):
    "Rank 0 is killed, when the checkpoint of the first epoch is down."
    def on_step_end(self, trainer):
        if trainer.step == 12: time.sleep(1); os.kill(os.getpid(), signal.SIGKILL)


def test_after_a_lost_fit_the_trainer_stands_where_its_weights_are(tmp_path):
    plain, kept, t = trainer(), trainer(run=tmp_path / "kept", callbacks=[Dies()]), trainer(callbacks=[Dies()])
    plain.fit(epochs=1)
    for one in (kept, t):
        with pytest.raises(ProcessKilled, match="rank 0") as caught: one.fit(epochs=3, processes=2)
        assert "stands at step" in caught.value.__notes__[-1] and one.status.state == "failed"
    assert (t.step, t.epoch, len(losses(t))) == (0, 0, 0) and same(t.model.state_dict(), model().state_dict())
    assert (kept.step, kept.epoch, len(losses(kept))) == (7, 1, 7)                                   # its newest checkpoint
    assert same(kept.model.state_dict(), plain.model.state_dict(), 1e-6) and apart(kept, plain) < CLOSE
    t.callbacks.clear()
    t.fit(epochs=1)
    assert same(t.model.state_dict(), plain.model.state_dict()) and t.history.epochs()["epoch"].tolist() == [1]


def test_an_interrupt_stops_all_ranks_at_one_step():
    t = trainer(batch_size=4)

    def interrupt():
        until(lambda: t.step >= 10, "the tenth step")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    t.fit(epochs=1000, processes=2)
    thread.join()
    assert t.status.state == "interrupted" and t.status.message == "interrupted by SIGINT" and t.step == len(losses(t))


def test_stop_pause_and_rate_reach_all_ranks():
    t = trainer(batch_size=4)
    said = []

    def steer():
        until(lambda: t.step >= 10, "the tenth step")
        t.controls.pause()
        until(lambda: t.status.state == "paused", "a pause")
        said.append(t.step)
        time.sleep(1)
        said.append(t.step)
        t.lr = .25
        t.controls.resume()
        until(lambda: t.status.lr == .25 and t.step >= said[1] + 5, "the new rate")
        t.stop()

    thread = threading.Thread(target=steer, daemon=True)
    thread.start()
    t.fit(epochs=1000, processes=2)
    thread.join()
    assert said[0] == said[1] and t.status.state == "stopped" and t.status.message == "trainer.stop()" and t.lr == .25
    steps, rates = t.history.series("train", "lr")
    assert rates[-1] == .25 and steps[-1] > said[1]


def test_bad_input_is_told_before_processes_start(tmp_path, monkeypatch):
    monkeypatch.setattr("arc_nb.engine.launch.Worker", lambda *given: pytest.fail("a process was started"))

    def refused(kind, match, fit=None, **given):
        began = time.thread_time()  # of this thread's own work: others may load the machine
        with pytest.raises(kind, match=match): trainer(**given).fit(epochs=1, **{"processes": 2, **(fit or {})})
        assert time.thread_time() - began < 3

    refused(ValueError, "processes=0", {"processes": 0})
    refused(ValueError, "processes='all'", {"processes": "all"})
    refused(ValueError, "on_oom", {"on_oom": "accumulate"})
    refused(ValueError, "lbfgs", optimizer="lbfgs")
    refused(ValueError, "compile=\"step\"", compile="step")
    refused(ValueError, "watch", {"watch": True}, strategy="zero2")
    refused(ValueError, "l1= and l2=", strategy="zero3", l2=.1)
    refused(ValueError, "run=False", {"resume": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that batch_size has no effect
        refused(TypeError, "generator", train=((X[k:k + 5], Y[k:k + 5]) for k in range(0, 200, 5)))
    other = nn.Linear(6, 1)
    refused(ValueError, r"uses other \(a Linear\)", loss=None, metrics=(), step=lambda net, batch: (net(batch[0]) + other(batch[0])).mean())
    refused(TypeError, "lock", callbacks=[type("Holds", (Callback,), {"__init__": lambda self: setattr(self, "lock", threading.Lock())})()])
    with pytest.raises(ValueError, match="no strategy is called 'zero4'"): trainer(strategy="zero4")
    with pytest.warns(UserWarning, match="no effect in one process"): trainer(strategy="zero3").fit(epochs=1)


class Moves(Callback):
    "Changes the weights on rank 0 only."
    def on_step_end(self, trainer):
        with torch.no_grad(): next(trainer.model.parameters()).mul_(1.01)


def test_weights_that_part_are_told():
    with pytest.warns(RuntimeWarning, match="everywhere = True"): trainer(callbacks=[Moves()]).fit(epochs=1, processes=2)


def shared() -> set[str]:
    "What we or the dead have in shared memory: torch's names tell whose they are, and browsers of others have their own."
    owner = lambda name: re.match(r"(?:torch_|arc_nb-)(\d+)[_-]", name)
    others = lambda name: (found := owner(name)) and int(found[1]) != os.getpid() and Path("/proc", found[1]).exists()
    return {name for name in os.listdir("/dev/shm") if not name.startswith(".org.") and not others(name)}


def children() -> set[str]: return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_nothing_is_left(tmp_path):
    shm, young = shared(), children()  # tests before this one may have left some
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    handlers, environment = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], dict(os.environ)
    t = trainer(run=tmp_path / "run")
    for _ in range(2): t.fit(epochs=1, processes=2)
    t.callbacks.append(Fails(1, at=16))
    with pytest.raises(LookupError): t.fit(epochs=2, processes=2)
    assert shared() <= shm and len(os.listdir("/proc/self/fd")) <= fds + 1 and threading.active_count() <= threads
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers and dict(os.environ) == environment
    assert children() <= young


def test_a_function_with_a_trainer(tmp_path):
    def work(folder):
        t = trainer(run=folder, board="still")
        t.fit(epochs=2)
        return t.step, t.history.latest("valid_loss")

    steps, loss = notebook_launch(work, args=(tmp_path / "run",))
    assert steps == 14 and (tmp_path / "run" / "status.json").exists()
    t = trainer()
    t.fit(epochs=2)
    assert loss == pytest.approx(t.history.latest("valid_loss"), abs=1e-5)
    shutil.rmtree(tmp_path / "run")
