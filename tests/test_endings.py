"""However a run ends, by itself, by a stop, a signal, an error or NaN, what it leaves is in order and nothing is left on."""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from small import On, classes, files, net, saved, trainer, weights
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from arc_nb import Callback
from arc_nb.engine.callbacks import EMA, EarlyStopping
from arc_nb.engine.controls import FileControls
from arc_nb.engine.history import History, Status

X, Y = classes()


def around(model):
    "What a fit must leave as it was."
    names = [n for m in model.modules() for n in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)]
    return {"signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)], "autocast": torch.is_autocast_enabled("cpu"),
            "grad": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled(), "anomaly": torch.is_anomaly_enabled(),
            "matmul": torch.get_float32_matmul_precision(), "modes": [m.training for m in model.modules()], "hooks": sum(map(len, names)),
            "gradients": [p.grad for p in model.parameters()], "threads": threading.active_count(), "requires": [
                p.requires_grad for p in model.parameters()], "dtype": torch.get_default_dtype(), "deterministic":
            torch.are_deterministic_algorithms_enabled(),
            "random": (random.getstate(), torch.get_rng_state().tolist(), str(np.random.get_state())),
            "torch threads": torch.get_num_threads(), "cwd": os.getcwd()}


class Boom(Exception): pass


def fail(*_): raise Boom("it broke")


ENDINGS = {
    "completed": ([], None), "stopped": ([On(on_step_end=lambda t: t.stop())], None),
    **{f"error at {e}": ([On(**{e: fail})], Boom) for e in (
        "on_fit_start", "on_epoch_start", "on_step_start", "on_step_end", "on_valid_start", "on_valid_end", "on_epoch_end", "on_fit_end",
        "cleanup")},
    "interrupt": ([On(on_step_end=lambda t: signal.raise_signal(signal.SIGINT))], None),
    "terminated": ([On(on_step_end=lambda t: signal.raise_signal(signal.SIGTERM))], None),
    "two interrupts": ([On(on_step_end=lambda t: [signal.raise_signal(signal.SIGINT) for _ in range(2)])], KeyboardInterrupt),
    "exit": ([On(on_step_end=lambda t: sys.exit(3))], SystemExit)}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_is_left_on(ending, precision, tmp_path):
    callbacks, error = ENDINGS[ending]
    model = net(dropout=0.3)
    model.train(); model[2].eval()  # the person froze this one
    cleaned = []
    t = trainer(model, valid=0.2, callbacks=[*callbacks, EMA(0.9), On(cleanup=cleaned.append)], precision=precision, run=tmp_path / "r")
    before = around(model)
    if error:
        with pytest.raises(error) as caught: t.fit(epochs=2, detect_anomaly=True)
        if error is Boom:
            event = ending.removeprefix("error at ")
            assert type(caught.value) is Boom and str(caught.value) == "it broke"
            assert any("On" in note and event in note for note in caught.value.__notes__)
    else: t.fit(epochs=2)
    assert around(model) == before and len(cleaned) == 1
    states = {"completed": "completed", "stopped": "stopped", "interrupt": "interrupted", "terminated": "terminated",
              "two interrupts": "interrupted"}
    if ending != "error at cleanup": assert t.status.state == states.get(ending, "failed")
    assert Status.read(tmp_path / "r").state == t.status.state and not t.status.alive
    assert len(History.read(tmp_path / "r").frame()) == len(t.history.frame())
    assert t.step == 0 or saved(tmp_path / "r")[0]["step"] == t.step
    assert not [f for f in files(tmp_path) if "tmp" in f]


def test_a_run_can_go_on_after_an_error():
    faults = [Boom("once")]
    def once(t):
        if t.step == 6 and faults: raise faults.pop()
    t, plain = trainer(callbacks=[On(on_step_end=once)]), trainer()
    with pytest.raises(Boom): t.fit(epochs=4)
    t.fit(epochs=1)
    assert t.status.state == "completed" and weights(t.model).isfinite().all() and t.step == 10
    plain.fit(epochs=1)


def test_an_error_in_one_cleanup_does_not_keep_the_others_from_theirs():
    cleaned = []
    t = trainer(callbacks=[On(cleanup=cleaned.append), On(cleanup=fail), On(on_step_end=lambda t: 1 / 0), On(cleanup=cleaned.append)])
    with pytest.raises(ZeroDivisionError) as caught: t.fit(epochs=1)
    assert len(cleaned) == 2 and any("it broke" in note for note in caught.value.__notes__)


def test_an_error_in_the_model_or_the_data_comes_through():
    def broken():
        yield X[:8], Y[:8]
        raise Boom("disk gone")
    t = trainer(data=broken())
    before = around(t.model)
    with pytest.raises(Boom, match="disk gone"): t.fit(steps=5)
    assert around(t.model) == before and t.status.state == "failed" and "disk gone" in t.status.message and t.step == 1


def test_modes_while_training_and_validating():
    seen = []
    class Spy(nn.Module):
        def __init__(self): super().__init__(); self.inner = net()
        def forward(self, x): seen.append((self.training, torch.is_grad_enabled())); return self.inner(x)
    t = trainer(Spy().eval(), valid=0.5, batch_size=30)
    seen.clear()
    t.fit(epochs=1)
    assert seen == [(True, True), (False, False)] and not t.model.training
    seen.clear(); t.predict(X); t.evaluate((X, Y))
    assert set(seen) == {(False, False)}


def test_worker_processes_end_with_the_fit():
    import multiprocessing
    loader = DataLoader(TensorDataset(X, Y), batch_size=16, num_workers=1)
    t = trainer(data=loader, valid=DataLoader(TensorDataset(X, Y), batch_size=16, num_workers=1))
    t.fit(epochs=1); t.predict(X)
    deadline = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < deadline: time.sleep(0.05)
    assert not multiprocessing.active_children()


# --- Not a number ----------------------------------------------------------------------------------------------------

class Fragile(nn.Module):
    "A layer in the middle takes a logarithm."
    def __init__(self, norm=False):
        super().__init__()
        self.first, self.log, self.last = nn.Linear(4, 8), Log(), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
    def forward(self, x): return self.last(self.log(self.first(self.norm(x)).abs() * x.abs().max()))


class Log(nn.Module):
    def forward(self, x): return x.log()


def test_the_guard_names_step_loss_layer_and_keeps_the_weights(tmp_path):
    batches = [(X[:20], Y[:20]), (X[20:40], Y[20:40]), (torch.zeros(20, 4), Y[40:])]
    last: list = []
    t = trainer(Fragile(), batches, run=tmp_path / "r", callbacks=[kept := On(on_step_start=lambda t: last.append(weights(t.model)))])
    with pytest.warns(RuntimeWarning, match=r"(?s)step 3 .*epoch 1.*loss is (nan|-?inf).*log \(Log\)"): t.fit(epochs=2)
    assert kept.seen and t.step == 3 and t.status.state == "failed" and "log (Log)" in t.status.message
    assert torch.equal(weights(t.model), last[-1]) and weights(t.model).isfinite().all()
    assert Status.read(tmp_path / "r").message == t.status.message
    assert all(torch.isfinite(v).all() for v in saved(tmp_path / "r")[0]["model"].values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_guard_names_a_batch_whose_data_are_not_finite(accumulate):
    bad = X[:20].clone(); bad[3, 1] = float("nan")
    t = trainer(data=[(X[20:40], Y[20:40]), (bad, Y[:20])], accumulate=accumulate)
    with pytest.warns(RuntimeWarning, match="data of .*batch.* not finite"): t.fit(epochs=1)
    assert weights(t.model).isfinite().all()


def test_the_guard_says_which_batch_of_the_epoch():
    bad = X[:20].clone(); bad[3, 1] = float("nan")
    t = trainer(data=[(X[20:40], Y[20:40])] * 3 + [(bad, Y[:20])], accumulate=3)
    with pytest.warns(RuntimeWarning, match="batch 4"): t.fit(epochs=1)


def test_the_guard_warns_once_where_the_same_step_would_be_validated():
    bad = X[:20].clone(); bad[3, 1] = float("nan")
    t = trainer(data=[(X[20:40], Y[20:40]), (bad, Y[:20])], valid=(X[40:], Y[40:]), valid_every=1)
    with pytest.warns(RuntimeWarning, match="batch 2") as told: t.fit(epochs=1)
    assert len(told) == 1 and t.history.series("valid", "loss")[0].tolist() == [1]


def test_batch_norm_keeps_its_statistics_when_the_guard_stops():
    bad = X[:20].clone(); bad[3, 1] = float("nan")
    t = trainer(Fragile(norm=True), [(X[20:40], Y[20:40]), (bad, Y[:20])])
    with pytest.warns(RuntimeWarning): t.fit(epochs=1)
    assert all(v.isfinite().all() for v in t.model.state_dict().values())


def test_an_infinite_gradient_of_a_finite_loss_is_found():
    class Root(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(4, 1))
        def forward(self, x): return (x @ self.w).abs().sqrt()
    t = trainer(Root(), (X, X.sum(1)), loss="mse")
    with pytest.warns(RuntimeWarning, match="gradient of w"): t.fit(epochs=1)
    assert weights(t.model).isfinite().all() and all(p.grad is None for p in t.model.parameters())


def test_a_run_that_diverges_keeps_finite_weights_and_says_nan_in_the_curve():
    t = trainer(nn.Linear(4, 1), (X, X.sum(1)), loss="mse", optimizer="sgd", lr=1e6)
    with pytest.warns(RuntimeWarning, match="loss is (inf|nan)"): t.fit(epochs=20)
    assert weights(t.model).isfinite().all() and t.status.state == "failed" and len(t.history.epochs()) == t.epoch
    assert not np.isfinite(t.history.series("train", "loss")[1][-1]) and np.isfinite(t.history.series("train", "loss")[1][:-1]).all()


# --- Requests --------------------------------------------------------------------------------------------------------

def slow(t): time.sleep(0.02)


def in_background(t, **goal):
    "Starts a fit in a thread; returns it once the first step is done."
    thread = threading.Thread(target=t.fit, kwargs=goal or {"epochs": 1000}, daemon=True)
    thread.start()
    wait_for(lambda: t.step > 1)
    return thread


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def test_stop_from_a_thread_ends_after_the_current_step():
    t = trainer(callbacks=[On(on_step_end=slow)], valid=0.2)
    thread = in_background(t)
    at = t.step
    t.stop()
    thread.join(5)
    assert not thread.is_alive() and t.step <= at + 2 and t.status.state == "stopped" and "stop()" in t.status.message


def test_pause_holds_and_time_does_not_run(tmp_path):
    t = trainer(callbacks=[On(on_step_end=slow)], run=tmp_path / "r")
    thread = in_background(t)
    t.controls.pause()
    wait_for(lambda: t.status.state == "paused")
    at, elapsed = t.step, t.status.elapsed
    time.sleep(0.4)
    assert t.step == at and t.status.elapsed - elapsed < 0.1 and Status.read(tmp_path / "r").state == "paused"
    t.lr = 0.5
    wait_for(lambda: t.lr == 0.5)
    t.controls.resume()
    wait_for(lambda: t.step > at + 2)
    assert t.history.latest("lr") == 0.5 or t.lr == 0.5
    t.controls.pause(); t.stop()
    thread.join(5)
    assert not thread.is_alive()


def test_requests_from_another_process_through_the_folder(tmp_path):
    t = trainer(callbacks=[On(on_step_end=slow)], run=tmp_path / "r", checkpoint_every=None)
    thread = in_background(t)
    other = FileControls(tmp_path / "r")
    ask = "import sys; sys.path.insert(0, sys.argv[2])\nfrom arc_nb.engine.controls import FileControls\nFileControls(sys.argv[1]).pause()"
    subprocess.run([sys.executable, "-c", ask, str(tmp_path / "r"), str(ROOT)], check=True)
    wait_for(lambda: Status.read(tmp_path / "r").state == "paused")
    other.set_lr(0.25)
    wait_for(lambda: t.lr == 0.25)
    other.save()
    wait_for(lambda: list((tmp_path / "r/checkpoints").glob("step-*")))
    other.resume()
    wait_for(lambda: Status.read(tmp_path / "r").state == "training")
    with (tmp_path / "r/requests.jsonl").open("a") as file: file.write('nonsense\n{"do": "dance"}\n')
    other.stop("seen enough")
    thread.join(5)
    status = Status.read(tmp_path / "r")
    assert not thread.is_alive() and status.state == "stopped" and status.message == "seen enough"


def test_old_requests_do_not_reach_the_next_fit(tmp_path):
    t = trainer(run=tmp_path / "r")
    t.fit(epochs=1)
    FileControls(tmp_path / "r").stop()
    t.fit(epochs=2)
    assert t.epoch == 3


def test_fit_async_can_be_awaited_and_cancelled():
    import asyncio
    t = trainer(callbacks=[On(on_step_end=slow)], valid=0.2)
    async def both():
        await t.fit_async(epochs=1)
        task = asyncio.create_task(t.fit_async(epochs=1000))
        while t.step < 6: await asyncio.sleep(0.01)
        task.cancel()
        return await task
    history = asyncio.run(both())
    assert history is t.history and t.status.state == "interrupted"


AWAITED = """
import sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from small import On, trainer
t = trainer(callbacks=[On(on_step_end=lambda trainer: time.sleep(.01))])
print("ready")
await t.fit_async(epochs=100)
print("ended", t.status.state)
"""

KERNEL = """
import sys, threading, time
from jupyter_client.manager import start_new_kernel
manager, client = start_new_kernel(kernel_name="python3")
client.execute(sys.argv[1])
text, end = "", time.monotonic() + 60
while "ended" not in text and time.monotonic() < end:
    message = client.get_iopub_msg(timeout=60)
    if message["msg_type"] != "stream": continue
    text += message["content"]["text"]
    if "ready" in message["content"]["text"]: threading.Timer(1, manager.interrupt_kernel).start()
print(text)
manager.shutdown_kernel(now=True)
"""

def test_the_interrupt_of_a_kernel_stops_an_awaited_fit():
    "ipykernel cancels the cell, and nothing of its own wakes the event loop."
    done = subprocess.run([sys.executable, "-c", KERNEL, AWAITED.format(root=str(ROOT))], capture_output=True, text=True, timeout=120)
    assert "ended interrupted" in done.stdout, done.stdout + done.stderr


# --- Signals, in a process of their own ------------------------------------------------------------------------------

SCRIPT = """
import sys, time
sys.path[:0] = sys.argv[2:]
from small import On, trainer
from arc_nb.engine.callbacks import EarlyStopping
wait = float(sys.argv[1])
def told(t):
    print(t.step, flush=True)
    time.sleep(wait if t.step > 6 else 0.02)
t = trainer(valid=0.2, run="r", callbacks=[On(on_step_end=told), EarlyStopping(patience=1000)])
t.model.eval()
t.fit(epochs=100000)
print("after", t.status.state, t.model.training, len(t.history.frame()), flush=True)
"""


def start(folder: Path, wait: float) -> subprocess.Popen:
    "A process that trains in the folder, some steps in."
    (folder / "script.py").write_text(SCRIPT)
    child = subprocess.Popen([sys.executable, "-W", "error", "script.py", str(wait), str(ROOT), str(ROOT / "tests")], cwd=folder, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout
    for line in child.stdout:
        if line.strip() == "7": break
    return child


@pytest.mark.parametrize("number, state", [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_the_run_in_order(number, state, tmp_path):
    child = start(tmp_path, 0.05)
    child.send_signal(number)
    out, errors = child.communicate(timeout=20)
    assert child.returncode == 0, errors
    last = out.strip().splitlines()[-1].split()
    assert last[:3] == ["after", state, "False"]
    status, history = Status.read(tmp_path / "r"), History.read(tmp_path / "r")
    assert status.state == state and signal.Signals(number).name in status.message and 7 <= status.step <= 10
    assert history.series("train", "loss")[0].tolist() == list(range(1, status.step + 1)) and len(history.frame()) == int(last[3])
    assert saved(tmp_path / "r")[0]["step"] == status.step and saved(tmp_path / "r", "best")[0]["step"] <= status.step
    json.loads((tmp_path / "r/config.json").read_text())


def test_a_second_interrupt_is_immediate(tmp_path):
    child = start(tmp_path, 30.0)
    child.send_signal(signal.SIGINT)
    time.sleep(0.3)
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    out, errors = child.communicate(timeout=20)
    assert time.monotonic() - began < 10 and child.returncode != 0 and "KeyboardInterrupt" in errors and "after" not in out
    assert Status.read(tmp_path / "r").state == "interrupted" and saved(tmp_path / "r")[0]["step"] == 7
    assert History.read(tmp_path / "r").series("train", "loss")[0].tolist() == list(range(1, 8))


def test_a_killed_run_is_shown_as_lost(tmp_path):
    child = start(tmp_path, 0.05)
    time.sleep(0.5)
    child.kill(); child.communicate()
    status = Status.read(tmp_path / "r")
    assert status.state == "failed" and "lost" in status.message and len(History.read(tmp_path / "r").frame())


def test_early_stopping_restores_after_a_stop():
    kept = {}
    keep = On(on_epoch_end=lambda t: kept.update({t.epoch: weights(t.model)}))
    halt = On(on_step_end=lambda t: t.stop() if t.step == 19 else None)
    t = trainer(valid=0.5, lr=0.5, callbacks=[EarlyStopping(patience=50), keep, halt])
    t.fit(epochs=50)
    assert torch.equal(weights(t.model), kept[t.history.best("valid", "loss")[2]])


def test_a_trainer_that_trains_cannot_be_started_again():
    t = trainer(callbacks=[On(on_step_end=slow)])
    thread = in_background(t)
    with pytest.raises(RuntimeError, match="training already"): t.fit(epochs=1)
    t.stop(); thread.join(5)
    assert t.status.state == "stopped"
    again = trainer(callbacks=[On(on_epoch_end=lambda t: t.fit(epochs=1))])
    with pytest.raises(RuntimeError, match="training already"): again.fit(epochs=2)


def test_fit_where_gradients_are_off(tmp_path):
    t = trainer(run=tmp_path / "r")
    with torch.no_grad(), pytest.raises(RuntimeError, match="no_grad"): t.fit(epochs=1)
    assert not files(tmp_path)


def test_the_next_trainer_works_after_any_ending():
    class Bad(Callback):
        def on_step_end(self, trainer): raise Boom
    with pytest.raises(Boom): trainer(callbacks=[Bad()], precision="bf16").fit(epochs=1)
    a, b = trainer(), trainer()
    a.fit(epochs=1); b.fit(epochs=1)
    assert torch.equal(weights(a.model), weights(b.model)) and a.predict(X).dtype == torch.float32


WORKERS = """
import time, torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from arc_nb import Trainer
class Slow(Dataset):
    def __len__(self): return 64
    def __getitem__(self, k): time.sleep(0.03); return torch.randn(4), torch.tensor(1.0)
loader = DataLoader(Slow(), 8, num_workers=2, persistent_workers=True)
next(iter(loader))  # the workers are there before anybody looks after them
t = Trainer(nn.Linear(4, 1), loader, loss="mse", run=False, board=False)
class Say(__import__("arc_nb").Callback):
    def on_step_end(self, trainer): print("step", flush=True)
t.callbacks.append(Say())
t.fit(epochs=100)
print(t.status.state, flush=True)
"""


def test_an_interrupt_that_ends_the_loaders_processes_first_is_still_a_stop():
    child = subprocess.Popen([sys.executable, "-c", WORKERS], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             start_new_session=True)
    try:
        assert child.stdout and child.stdout.readline() == "step\n"
        os.killpg(child.pid, signal.SIGINT)  # as Jupyter and a terminal do: to the whole group
        said = child.communicate(timeout=60)[0]
    finally:
        child.kill()
    assert child.returncode == 0 and said.splitlines()[-1] == "interrupted", said
