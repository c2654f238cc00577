"""Jobs outlive those who began them, and are found out when they are gone: real processes, killed at real moments."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small import PATIENCE, until

from arc_nb.engine.alive import birth
from arc_nb.ops.jobs import Jobs
from arc_nb.ops.queue import there
from arc_nb.ops.registry import Models
from arc_nb.ops.store import Store, move


@pytest.fixture
def jobs(tmp_path):
    "Jobs of a home of their own; what still runs at the end of a test is killed."
    found = Jobs(tmp_path / "home")
    yield found
    for job in found.list(1000):
        row = job.row()
        if row["status"] in ("pending", "running"):
            with found.store.writing() as db: move(db, job.id, "cancelled")
            if there(row): os.killpg(row["pid"], signal.SIGKILL)


def hold(job, path):
    "Works until a file is there."
    while not Path(path).exists() and not job.cancelled(): time.sleep(.02)
    return {"pid": os.getpid(), "cancelled": job.cancelled()}


def train(job, epochs, slow=0.0, processes=None):
    "A training, small."
    import torch
    from torch import nn

    from arc_nb import Callback, Trainer

    class Slow(Callback):
        "Takes its time."
        def on_step_end(self, trainer): time.sleep(slow)

    torch.manual_seed(0)
    X = torch.randn(256, 2)
    model = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    trainer = Trainer(model, (X, X.prod(1)), (X, X.prod(1)), loss="mse", run=job.run, board=False, callbacks=[job.listener(), Slow()])
    trainer.fit(epochs=epochs, processes=processes)
    return {"epochs": trainer.epoch, "loss": trainer.history.latest("valid_loss")}


def deaf(job):
    "Hears nothing."
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    job.say("deaf")
    while True: time.sleep(1)


def raises(job, text): raise ValueError(text)


def test_what_a_job_says_is_kept(jobs):
    def work(job, n):
        print("printed")
        job.say("said"); job.report({"n": n})
        return {"n": n + 1, "run": job.run, "folder": str(job.folder)}
    job = jobs.submit("demo", "one", work, {"n": 3}, wait=True)
    assert (job.status, job.message, job.metrics, job.kind, job.name) == ("completed", "said", {"n": 3}, "demo", "one")
    assert job.result == {"n": 4, "run": str(job.run), "folder": str(job.folder)} and job.log() == "printed\n"
    assert job.created <= job.started <= job.ended and not (job.folder / "work.pkl").exists()
    assert job.folder.stat().st_mode & 0o077 == 0
    assert {"Type:       demo", "Status:     completed", "Metrics:    n 3"} <= set(str(job).splitlines())
    frame = jobs.frame()
    assert list(frame.columns) == ["Job ID", "Type", "Name", "Status", "Message", "Updated"] and frame["Job ID"].tolist() == [job.id]


def test_a_job_that_raises_has_failed_and_says_why(jobs):
    job = jobs.submit("demo", "bad", raises, {"text": "no column 'x'\nsecond line"}, wait=True)
    assert job.status == "failed" and job.message == "ValueError: no column 'x'" and "second line" in job.error and "raises" in job.error
    assert "ValueError" in job.log()


def test_only_two_run_at_once_and_in_their_order(jobs, tmp_path):
    gates = [tmp_path / f"gate{k}" for k in range(5)]
    some = [jobs.submit("demo", str(k), hold, {"path": str(gate)}) for k, gate in enumerate(gates)]
    now = lambda: [job.status for job in some]
    until(lambda: now().count("running") == 2)
    assert now() == ["running", "running", "pending", "pending", "pending"]
    gates[1].touch()
    until(lambda: now() == ["running", "completed", "running", "pending", "pending"])
    os.kill(some[0].pid, signal.SIGKILL)  # a place that is free because somebody was killed
    until(lambda: now() == ["failed", "completed", "running", "running", "pending"])
    assert "lost" in some[0].message
    for gate in gates: gate.touch()
    until(lambda: now()[2:] == ["completed"] * 3)
    times = [(job.started, job.ended) for job in some[1:]]
    for started, _ in times: assert sum(a <= started < b for a, b in times) <= 2


def test_a_killed_job_is_lost_and_a_killed_waiter_begins_again(jobs, tmp_path):
    some = [jobs.submit("demo", str(k), hold, {"path": str(tmp_path / "gate")}) for k in range(3)]
    until(lambda: [job.status for job in some] == ["running", "running", "pending"])
    waiting = some[2].pid
    os.kill(waiting, signal.SIGKILL)
    until(lambda: some[2].pid != waiting)
    assert some[2].status == "pending"
    os.kill(some[1].pid, signal.SIGKILL)
    assert until(lambda: some[1].status == "failed" and some[1].message).startswith("lost: its process")
    (tmp_path / "gate").touch()
    assert some[2].wait(PATIENCE).status == "completed" and some[0].wait(PATIENCE).status == "completed"


def test_a_training_is_followed_cancelled_and_keeps_its_work(jobs):
    job = jobs.submit("train_model", "m", train, {"epochs": 100_000, "slow": .001})
    until(lambda: job.metrics.get("epoch", 0) >= 2)
    assert job.message.startswith("Epoch ") and "val_loss" in job.message and "%" in job.message
    seen = job.history().epochs()
    assert len(seen) >= 2 and "valid_loss" in seen
    assert job.cancel() is job and job.wait(PATIENCE).status == "cancelled"
    assert job.result["epochs"] >= 2 and job.message == "cancelled: what was done is kept"
    from arc_nb.engine.checkpoint import newest_good
    assert newest_good(job.run / "checkpoints")
    with pytest.raises(ValueError, match="is cancelled and cannot become cancelled: it has ended"): job.cancel()
    assert job.show().source.name == "m" and "<svg" in job._repr_html_()


def test_a_training_of_two_processes_can_be_cancelled_too(jobs):
    job = jobs.submit("train_model", "m", train, {"epochs": 100_000, "slow": .001, "processes": 2})
    until(lambda: job.metrics.get("epoch", 0) >= 2)
    job.cancel().wait(PATIENCE)
    assert job.status == "cancelled" and job.result["epochs"] >= 2


def test_cancel_before_the_training_begins_and_before_the_turn(jobs, tmp_path):
    some = [jobs.submit("demo", str(k), hold, {"path": str(tmp_path / "gate")}) for k in range(3)]
    until(lambda: some[1].status == "running")
    late = some[2].cancel()
    assert late.status == "cancelled" and late.message == "cancelled before it began"
    until(lambda: not there(late.row()))  # its waiting process goes by itself
    some[0].cancel()
    assert some[0].wait(PATIENCE).status == "cancelled" and some[0].result["cancelled"]
    assert some[1].status == "running"


def test_a_deaf_job_is_ended_after_its_grace(tmp_path):
    jobs = Jobs(tmp_path / "home", grace=.2)
    job = jobs.submit("demo", "deaf", deaf)
    until(lambda: job.message == "deaf")
    pid = job.pid
    job.cancel()
    until(lambda: job.status == "cancelled")
    assert "was ended" in job.message
    until(lambda: birth(pid) is None)
    assert job.status == "cancelled"


def test_even_a_stopped_process_is_ended_by_who_looks(tmp_path):
    jobs = Jobs(tmp_path / "home", grace=.1)
    job = jobs.submit("demo", "frozen", hold, {"path": str(tmp_path / "never")})
    until(lambda: job.status == "running")
    pid = job.pid
    os.kill(pid, signal.SIGSTOP)
    job.cancel()
    until(lambda: job.status == "cancelled" and birth(pid) is None)


def test_sigterm_is_an_exception_outside_and_a_stop_inside_of_a_training(jobs, tmp_path):
    plain = jobs.submit("demo", "plain", hold, {"path": str(tmp_path / "never")})
    training = jobs.submit("train_model", "m", train, {"epochs": 100_000, "slow": .001})
    until(lambda: plain.status == "running" and training.metrics.get("epoch", 0) >= 1)
    os.kill(plain.pid, signal.SIGTERM); os.kill(training.pid, signal.SIGTERM)
    assert plain.wait(PATIENCE).status == "failed" and "SIGTERM" in plain.message
    assert training.wait(PATIENCE).status == "cancelled" and training.result["epochs"] >= 1


KERNEL = """
import sys, time
from pathlib import Path
from arc_nb.ops.jobs import Jobs
def work(job, gate):
    while not Path(gate).exists(): time.sleep(.02)
    return {"went_on": True}
print(Jobs(sys.argv[1]).submit("demo", "outlives", work, {"gate": sys.argv[2]}).id, flush=True)
if sys.argv[3] == "stay": time.sleep(600)
"""


@pytest.mark.parametrize("end", ["leave", "kill"])
def test_the_job_goes_on_when_its_parent_is_gone(end, jobs, tmp_path):
    "A parent that ends, and one that is killed with its whole group; the function is its own, of __main__."
    script = tmp_path / "kernel.py"
    script.write_text(KERNEL)
    command = [sys.executable, str(script), str(jobs.home), str(tmp_path / "gate"), "stay" if end == "kill" else "leave"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path,
                              env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    job = jobs.get(parent.stdout.readline().strip())
    if end == "kill": os.killpg(parent.pid, signal.SIGKILL)
    parent.communicate()
    until(lambda: job.status == "running")
    (tmp_path / "gate").touch()
    assert job.wait(PATIENCE).result == {"went_on": True}


def test_a_jupyter_kernel_that_shuts_down_leaves_its_jobs_alone(jobs, tmp_path):
    "A real kernel: the function is of a cell, and the shutdown is the one of the menu."
    from jupyter_client.manager import start_new_kernel
    manager, client = start_new_kernel(kernel_name="python3", extra_arguments=["--log-level=40"], cwd=str(Path(__file__).parents[1]))
    try:
        cell = (f"import time\nfrom pathlib import Path\nfrom arc_nb.ops.jobs import Jobs\ndef work(job):\n"
                f"    while not Path({str(tmp_path / 'gate')!r}).exists(): time.sleep(.02)\n    return {{'x': 1}}\n"
                f"Jobs({str(jobs.home)!r}).submit('demo', 'of a cell', work)")
        reply = client.execute_interactive(cell, timeout=PATIENCE, output_hook=lambda message: None)
        assert reply["content"]["status"] == "ok", reply
        job = jobs.list()[0]
        until(lambda: job.status == "running")
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    assert job.status == "running"
    (tmp_path / "gate").touch()
    assert job.wait(PATIENCE).result == {"x": 1}


def test_many_submit_at_once(jobs, tmp_path):
    "Six processes make a home and submit; every job runs once."
    script = ("import sys; from arc_nb.ops.jobs import Jobs\n"
              "def work(job, path):\n    with open(path, 'a') as file: file.write(job.id + '\\n')\n"
              "for k in range(2): print(Jobs(sys.argv[1], slots=3).submit('demo', 'x', work, {'path': sys.argv[2]}).id)")
    command = [sys.executable, "-c", script, str(tmp_path / "new"), str(tmp_path / "out.txt")]
    some = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    said = [one.communicate() for one in some]
    assert not any(one.returncode for one in some), said
    ids = [id for out, _ in said for id in out.split()]
    new = Jobs(tmp_path / "new")
    assert len(set(ids)) == 12
    until(lambda: all(job.status == "completed" for job in new.list(100)))
    assert sorted((tmp_path / "out.txt").read_text().split()) == sorted(ids)


def test_states_go_one_way(jobs):
    job = jobs.submit("demo", "x", raises, {"text": "x"}, wait=True)
    for state in ("pending", "running", "completed", "cancelled", "failed"):
        with pytest.raises(ValueError, match="cannot become"), jobs.store.writing() as db: move(db, job.id, state)


def test_what_was_changed_is_not_run(jobs, tmp_path):
    "Somebody who can write into the folder, and not into the table, runs nothing."
    some = [jobs.submit("demo", str(k), hold, {"path": str(tmp_path / "gate")}) for k in range(3)]
    until(lambda: some[1].status == "running")
    path = some[2].folder / "work.pkl"
    assert path.stat().st_mode & 0o077 == 0
    path.write_bytes(path.read_bytes() + b"x")
    (tmp_path / "gate").touch()
    assert some[2].wait(PATIENCE).status == "failed" and "is not run" in some[2].message


def test_a_pid_that_was_given_away_is_nobodys(jobs, tmp_path):
    job = jobs.submit("demo", "x", hold, {"path": str(tmp_path / "gate")})
    until(lambda: job.status == "running")
    with jobs.store.writing() as db: db.execute("UPDATE jobs SET pid = ?", (os.getpid(),))
    assert job.status == "failed" and "lost" in job.message
    (tmp_path / "gate").touch()  # its process finds that it is no longer asked, and changes nothing
    time.sleep(.2)
    assert job.status == "failed"


def test_names_ids_and_arguments_are_checked(jobs):
    first = jobs.submit("demo", "x", raises, {"text": "x"})
    assert jobs.get(first.id[:4]).id == first.id
    for odd, words in ((first.id[:-1] + "g", f"did you mean {first.id}"), ("", "the newest is"), ("; DROP TABLE jobs", "there is no job")):
        with pytest.raises(ValueError, match=words): jobs.get(odd)
    with pytest.raises(TypeError, match="job runs in another process"): jobs.submit("demo", "x", hold, {"path": threading.Lock()})
    with pytest.raises(TypeError, match="has to be a function"): jobs.submit("demo", "x", "hold")
    for kind, name in (("", "x"), ("demo", "a\nb"), ("demo", None)):
        with pytest.raises(ValueError, match="short text"): jobs.submit(kind, name, hold)
    with pytest.raises(ValueError, match="slots"): Jobs(jobs.home, slots=0)
    first.wait(PATIENCE)
    with pytest.raises(ValueError, match="no training to show"): first.show()


def test_wait_gives_up_and_the_job_goes_on(jobs, tmp_path):
    job = jobs.submit("demo", "x", hold, {"path": str(tmp_path / "gate")})
    with pytest.raises(TimeoutError, match=f"job {job.id} is still"): job.wait(timeout=.1)
    (tmp_path / "gate").touch()
    assert job.wait(PATIENCE).status == "completed"


def test_a_waiting_process_is_small(call):
    "Nothing large is loaded before the turn: neither PyTorch nor NumPy nor pandas."
    said = call(sys.executable, "-c", "import json, sys, arc_nb.ops.worker; print(json.dumps(sorted(sys.modules)))")
    assert not {"torch", "numpy", "pandas", "cloudpickle"} & set(json.loads(said))


def test_a_table_of_a_later_version_is_refused(tmp_path):
    store = Store(tmp_path)
    with store.writing() as db: db.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="later version"): Jobs(tmp_path)
    (tmp_path / "odd").mkdir(); (tmp_path / "odd/arc.sqlite").write_bytes(b"no database " * 100)
    with pytest.raises(ValueError, match="cannot be used"): Jobs(tmp_path / "odd")


DRAFT = """
import sys, time
from arc_nb.ops.registry import Models
draft = Models(sys.argv[1]).begin("m")
(draft.folder / "model.pt").write_text(draft.id)
if sys.argv[2] == "moved": draft.models.record = lambda *_: time.sleep(600)
print(draft.version, flush=True)
if sys.argv[2] != "kept": draft.publish({"x": 1})
time.sleep(600)
"""


@pytest.mark.parametrize("moment", ["kept", "moved"])
def test_a_version_whose_author_was_killed(moment, tmp_path):
    "In the middle of its writing it is removed; after its move it is a version, whatever the table says."
    writer = subprocess.Popen([sys.executable, "-c", DRAFT, str(tmp_path), moment], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "1\n"
    models = Models(tmp_path)
    place = models.folder / "m" / ("v1" if moment == "moved" else ".draft-v1")
    until(place.is_dir)
    writer.kill(); writer.communicate()
    assert models.versions("m") == ([1] if moment == "moved" else [])
    with models.begin("m") as draft:
        assert draft.version == 2 and not (models.folder / "m/.draft-v1").exists()
        (draft.folder / "model.pt").write_text("two"); draft.publish()
    assert models.versions("m")[-1] == 2 and (models.folder / "m/model.pt").read_text() == "two"


def test_many_trainings_of_one_model_get_many_numbers(tmp_path):
    script = ("import sys; from arc_nb.ops.registry import Models\n"
              "for _ in range(5):\n    with Models(sys.argv[1]).begin('m') as draft:\n"
              "        (draft.folder / 'model.pt').write_text(draft.id); draft.publish()")
    some = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(6)]
    assert not any(one.wait() for one in some)
    models = Models(tmp_path)
    assert models.versions("m") == list(range(1, 31)) and len(models.frame()) == 30
    assert (models.folder / "m/model.pt").read_text() == "m-v30" == json.loads((models.folder / "m/metadata.json").read_text())["id"]
    assert sorted(p.name for p in (models.folder / "m").iterdir() if not p.is_dir()) == ["metadata.json", "model.pt"]
    assert all((models.find(f"m-v{k}") / "model.pt").read_text() == f"m-v{k}" for k in (1, 17, 30))


def test_a_name_cannot_leave_its_folder(tmp_path):
    models = Models(tmp_path / "home")
    bad = ["../x", "..", "/tmp/x", "a/../../x", "a\\..\\b", ".", ".x", "x/", "x\n", "x\0y", " x", "~root", "-x", "x-v1", "", "ü", "x" * 70]
    for name in bad:
        for method in (models.begin, models.find, models.versions, models.newest):
            with pytest.raises(ValueError, match="model name|no version|no model"): method(name)
    assert not list(tmp_path.rglob("*x*")) and not models.folder.exists()


def test_models_copied_from_elsewhere_are_found_and_not_overwritten(tmp_path):
    with (there := Models(tmp_path / "there")).begin("m") as draft: (draft.folder / "model.pt").write_text("old"); draft.publish()
    here = Models(tmp_path / "here")
    shutil.copytree(there.folder, here.folder)
    assert here.find("m").name == "v1" and here.names() == ["m"]
    with here.begin("m") as draft: assert draft.version == 2; draft.publish()
    assert not (here.folder / "m/model.pt").exists()  # the newest has none


def test_lists_need_no_torch(call, tmp_path):
    said = call(sys.executable, "-c", f"import sys; from arc_nb.ops.jobs import Jobs; from arc_nb.ops.registry import Models\n"
                f"Jobs({str(tmp_path)!r}).frame(); Models({str(tmp_path)!r}).frame(); print('torch' in sys.modules)")
    assert said.strip() == "False"
