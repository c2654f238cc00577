"""Trackers beside real trainings, and a TensorBoard whose users are killed."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path

import pytest
import torch
from small import PATIENCE, until
from torch import nn

from arc_nb import Callback, Trainer
from arc_nb.engine.alive import birth, lives
from arc_nb.ops.jobs import Jobs
from arc_nb.track.server import Places, free_port, serve
from arc_nb.track.tensorboard import TensorBoard
from arc_nb.track.tracking import Tracker

torch.manual_seed(0)
X = torch.randn(240, 2)
Y = (X[:, 0] * X[:, 1] > 0).long()


def make(run, track=(), model=None, **more):
    "A small training."
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.1), nn.Linear(16, 2))
    settings = dict(loss="cross_entropy", metrics=["accuracy"], train_metrics=["accuracy"], lr=1e-2, board=False, checkpoint_every=4)
    return Trainer(model, (X, Y), (X, Y), run=run, track=track, **settings | more)


def read(folder):
    "Event files, as TensorBoard reads them."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def steps(folder, tag="val/loss"):
    return [event.step for event in read(folder).Scalars(tag)]


@pytest.fixture
def home(tmp_path):
    "A home whose TensorBoard does not outlive the test."
    yield tmp_path / "home"
    places = Places(tmp_path / "home")
    places.let_go()
    if found := places.read(): os.killpg(found["pid"], signal.SIGKILL)


# ---------------------------------------------------------------- event files

def test_tags_of_the_guide_and_the_settings(tmp_path):
    trainer = make(tmp_path / "a", "tensorboard")
    trainer.fit(epochs=3)
    events = read(tmp_path / "a/tensorboard")
    tags = events.Tags()
    assert {"train/loss", "val/loss", "train/accuracy", "val/accuracy", "lr", "gradient_norm", "best/val_accuracy"} <= set(tags["scalars"])
    assert {"weights/0.weight", "gradients/4.bias"} <= set(tags["histograms"]) and tags["graph"]
    assert [e.step for e in events.Scalars("val/accuracy")] == [8, 16, 24]
    assert events.Histograms("gradients/0.weight")[0].histogram_value.num == 32
    from tensorboard.plugins.hparams import plugin_data_pb2
    found = plugin_data_pb2.HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/experiment").plugin_data.content)
    assert {info.name.tag for info in found.experiment.metric_infos} == {"best/val_loss", "best/val_accuracy"}
    assert events.SummaryMetadata("_hparams_/session_end_info").plugin_data.content


@pytest.mark.parametrize("more", [{}, {"compile": "step"}, {"optimizer": "lbfgs", "train_metrics": ()}, {"accumulate": 2, "clip_norm": .1}],
                         ids=["plain", "compiled step", "lbfgs", "accumulated"])
def test_a_tracked_run_is_the_same_to_the_bit(more, tmp_path):
    if more.get("compile"): more = more | {"train_metrics": ()}
    plain, tracked = make(tmp_path / "a", **more), make(tmp_path / "b", "tensorboard", **more)
    for one in (plain, tracked): one.fit(epochs=2)
    for a, b in zip(plain.model.state_dict().values(), tracked.model.state_dict().values()): assert torch.equal(a, b)
    assert tracked.setup.step.heard is None and "weights/0.weight" in (tags := read(tmp_path / "b/tensorboard").Tags()["histograms"])
    assert ("gradients/0.weight" in tags) == (more.get("compile") != "step")


def test_watching_layers_and_tracking_go_together(tmp_path):
    trainer = make(tmp_path / "a", "tensorboard")
    trainer.fit(epochs=3, watch=True)
    assert len(trainer.layers.steps) and steps(tmp_path / "a/tensorboard") == [8, 16, 24] and trainer.setup.step.heard is None


def test_further_fits_go_on_and_a_new_run_begins_anew(tmp_path):
    trainer = make(tmp_path / "a", "tensorboard")
    for _ in range(3): trainer.fit(epochs=1)
    assert steps(tmp_path / "a/tensorboard") == [8, 16, 24]
    make(tmp_path / "a", "tensorboard").fit(epochs=1)
    assert steps(tmp_path / "a/tensorboard") == [8] and steps(tmp_path / "a-1/tensorboard") == [8, 16, 24]


def test_a_resumed_run_goes_on_without_doubles(tmp_path):
    make(tmp_path / "a", "tensorboard").fit(epochs=2)
    again = make(tmp_path / "a", "tensorboard")
    again.fit(epochs=4, resume=True)
    assert steps(tmp_path / "a/tensorboard") == [8, 16, 24, 32]
    train = steps(tmp_path / "a/tensorboard", "train/loss")
    assert train == sorted(set(train)) and train[-1] == 32


def test_models_that_cannot_be_traced_and_take_names(tmp_path):
    class Odd(nn.Module):
        "A dict comes out, of which a tracer makes nothing."
        def __init__(self): super().__init__(); self.layer = nn.Linear(2, 2)
        def forward(self, x): return self.layer(x) if self.training or x.shape[0] != 2 else object()
    with pytest.warns(RuntimeWarning, match="no graph of this model"): make(tmp_path / "a", "tensorboard", model=Odd()).fit(epochs=1)

    class Named(nn.Module):
        def __init__(self): super().__init__(); self.layer = nn.Linear(2, 2)
        def forward(self, left, right): return self.layer(left) + right.mean()
    torch.manual_seed(0)
    data = {"left": X, "right": X, "y": Y}
    Trainer(Named(), data, loss="cross_entropy", run=tmp_path / "b", board=False, track="tensorboard").fit(epochs=1)
    assert read(tmp_path / "b/tensorboard").Tags()["graph"]

    class Two(Named):
        "Inputs by name, outputs by name: what an Arc-Graph is."
        def forward(self, left, right): return {"logits": super().forward(left, right), "probabilities": self.layer(left).softmax(1)}
    loss = lambda out, y: nn.functional.cross_entropy(out["logits"], y)
    Trainer(Two(), data, loss=loss, run=tmp_path / "d", board=False, track="tensorboard").fit(epochs=1)
    assert read(tmp_path / "d/tensorboard").Tags()["graph"]
    step = lambda model, batch: model(batch[0]).mean()
    Trainer(nn.Linear(2, 1), (X, Y), step=step, run=tmp_path / "c", board=False, track="tensorboard").fit(epochs=1)
    assert "train/loss" in read(tmp_path / "c/tensorboard").Tags()["scalars"]


def test_two_processes_are_tracked_once(tmp_path):
    trainer = make(tmp_path / "a", "tensorboard", model=nn.Linear(2, 2))
    trainer.fit(epochs=2, processes=2)
    assert steps(tmp_path / "a/tensorboard") == [8, 16]
    trainer.fit(epochs=1)
    assert steps(tmp_path / "a/tensorboard") == [8, 16, 24]


def test_a_tracker_that_fails_is_told_once_and_the_run_goes_on(tmp_path):
    class Full(Tracker):
        closed = False
        def write(self, tag, steps, values): raise OSError(28, "No space left on device")
        def close(self, trainer): Full.closed = True
    trainer = make(tmp_path / "a", Full())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(epochs=3)
    assert trainer.status.state == "completed" and sum("stopped tracking" in str(w.message) for w in caught) == 1 and Full.closed


def test_what_cannot_work_is_said_before_the_training(tmp_path):
    class Mine(Callback): "One of my own."
    assert [type(c) for c in make(tmp_path / "a", ["tensorboard", Mine()]).callbacks] == [TensorBoard, Mine]
    assert [type(c) for c in make(tmp_path / "b", ("tensorboard", {"graph": False})).callbacks] == [TensorBoard]
    with pytest.raises(ValueError, match="Did you mean 'tensorboard'"): make(tmp_path / "c", "tensorbord")
    with pytest.raises(ValueError, match="no option 'foldr'.*'folder'"): make(tmp_path / "c", ("tensorboard", {"foldr": 1}))
    with pytest.raises(TypeError, match="is a class"): make(tmp_path / "c", Mine)
    trainer = make(False, "tensorboard", checkpoint_every="1 epoch")
    with pytest.raises(ValueError, match="needs a folder to write to"): trainer.fit(epochs=1)
    trainer = make(False, ("tensorboard", {"folder": tmp_path / "logs"}), checkpoint_every="1 epoch")
    trainer.fit(epochs=1)
    assert steps(tmp_path / "logs") == [8]


# ---------------------------------------------------------------- wandb and mlflow, where they are installed

def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # wandb's own
        trainer = make(tmp_path / "a", ("wandb", {"mode": "offline", "project": "p"}))
        trainer.fit(epochs=2)
        trainer.fit(epochs=1)
    files = list((tmp_path / "a/wandb").rglob("*.wandb"))
    assert wandb and len(files) == 2 and all(f.stat().st_size > 1000 for f in files)
    id = (tmp_path / "a/wandb/run-id.txt").read_text()
    assert all(id in f.name for f in files) and b"val/accuracy" in files[0].read_bytes()


def test_mlflow_in_a_file(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        trainer = make(tmp_path / "a", ("mlflow", {"uri": uri, "experiment": "e"}))
        trainer.fit(epochs=2)
        trainer.fit(epochs=1)
        client = mlflow.MlflowClient(tracking_uri=uri)
        run = client.search_runs([client.get_experiment_by_name("e").experiment_id])
        assert len(run) == 1 and run[0].info.status == "FINISHED" and run[0].data.params["lr"] == "0.01"
        assert [m.step for m in client.get_metric_history(run[0].info.run_id, "val/accuracy")] == [8, 16, 24]


# ---------------------------------------------------------------- the server's life

USER = {"serve": "from arc_nb.track.server import serve\nprint(serve(sys.argv[1]).port, flush=True); sys.stdin.read()",
        "lease": "from arc_nb.track.server import leased\nwith leased(sys.argv[1]): print('held', flush=True); sys.stdin.read()"}


def user(home, kind="serve"):
    "Another process that wants the server; it has its own group, and what it said."
    one = subprocess.Popen([sys.executable, "-c", f"import sys\n{USER[kind]}", str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           text=True, start_new_session=True)
    return one


def kill(one):
    os.killpg(one.pid, signal.SIGKILL)
    one.communicate()


def children(pid):
    "The processes that another has started."
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try: fields = path.read_text().rpartition(")")[2].split()
        except OSError: continue
        if int(fields[1]) == pid: found.append(int(path.parent.name))
    return found


def test_one_for_all_on_this_machine_only_and_gone_with_the_last(home):
    some = [user(home) for _ in range(4)]  # at once
    ports = [int(one.stdout.readline()) for one in some]
    assert len(set(ports)) == 1
    found = Places(home).read()
    page = urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/").read()
    assert b"TensorBoard" in page
    with socket.socket() as other:  # no other address of this machine answers
        known = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
        for address in known - {a for a in known if a.startswith("127.")}: assert other.connect_ex((address, ports[0])) != 0
    below = children(found["pid"])
    for one in some[:3]: kill(one)
    until(lambda: Places(home).holders() == [some[3].pid])
    time.sleep(1.5)  # longer than its look
    assert lives(found["pid"], found["birth"])
    kill(some[3])
    until(lambda: not lives(found["pid"], found["birth"]), "the end of the server")
    until(lambda: not any(birth(pid) for pid in below))
    assert not Places(home).server.exists()


def test_a_lease_alone_starts_nothing_and_keeps_it_alive(home):
    job = user(home, "lease")
    assert job.stdout.readline() and Places(home).read() is None
    kernel = user(home)
    assert kernel.stdout.readline()
    found = Places(home).read()
    kill(kernel)
    until(lambda: Places(home).holders() == [job.pid])
    time.sleep(1.5)
    assert lives(found["pid"], found["birth"])
    job.communicate()  # it ends as it should
    until(lambda: not lives(found["pid"], found["birth"]))


def test_a_killed_server_is_replaced_and_a_taken_port_passed_over(home):
    with socket.socket() as taken:
        first = free_port(21_000)
        taken.bind(("127.0.0.1", first)); taken.listen()
        server = serve(home, port=first)
        assert server.port > first and serve(home, port=first).pid == server.pid
        below = children(server.pid)
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: not server.alive and not any(birth(pid) for pid in below))
        new = serve(home, port=first)
        assert new.pid != server.pid and b"TensorBoard" in urllib.request.urlopen(new.url).read()
    new.stop()


def test_it_shows_the_runs_of_a_home(home):
    for name in ("a", "b"): make(home / "runs" / name, "tensorboard").fit(epochs=1)
    server = serve(home, port=22_000)
    get = lambda path: json.loads(urllib.request.urlopen(server.url + path).read())
    runs = until(lambda: sorted(get("data/runs")))
    assert runs == ["runs/a/tensorboard", "runs/b/tensorboard"]
    tags = until(lambda: get("data/plugin/scalars/tags"))
    assert "val/accuracy" in tags["runs/a/tensorboard"]
    server.stop()


def test_what_cannot_be_served_is_said(home, monkeypatch):
    for port in (0, 70_000, "6006"):
        with pytest.raises(ValueError, match="port="): serve(home, port=port)
    monkeypatch.setattr("arc_nb.track.server.SCRIPT", "raise SystemExit('no TensorBoard here')")
    with pytest.raises(RuntimeError, match="no TensorBoard here"): serve(home)


def tracked(job, gate):
    "A job that trains, tracked."
    from arc_nb.engine.events import Callback as Base

    class Wait(Base):
        def on_step_end(self, trainer):
            while not Path(gate).exists(): time.sleep(.02)
    make(job.run, ["tensorboard", Wait()]).fit(epochs=1)


def test_a_job_keeps_the_server_of_its_home_until_it_ends(home, tmp_path):
    jobs = Jobs(home)
    job = jobs.submit("train_model", "m", tracked, {"gate": str(tmp_path / "gate")})
    kernel = user(home)
    assert kernel.stdout.readline()
    found = Places(home).read()
    until(lambda: job.pid in Places(home).holders())
    kill(kernel)
    until(lambda: kernel.pid not in Places(home).holders())
    time.sleep(1.5)
    assert lives(found["pid"], found["birth"])
    (tmp_path / "gate").touch()
    assert job.wait(PATIENCE).status == "completed", job.error
    until(lambda: not lives(found["pid"], found["birth"]))
    assert steps(job.run / "tensorboard") == [8]


def test_a_killed_job_lets_the_server_go_too(home, tmp_path):
    jobs = Jobs(home)
    job = jobs.submit("train_model", "m", tracked, {"gate": str(tmp_path / "gate")})
    until(lambda: job.pid in Places(home).holders())
    kernel = user(home)
    assert kernel.stdout.readline()
    found = Places(home).read()
    kill(kernel)
    os.kill(job.pid, signal.SIGKILL)
    until(lambda: not lives(found["pid"], found["birth"]))
    assert job.status == "failed"
