"""A function in several processes: what comes back, every way of dying, and nothing left behind."""
import gc
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT

from arc_nb.engine import shipping
from arc_nb import notebook_launch
from arc_nb.engine.crew import ProcessKilled
from arc_nb.engine.launch import channel, launch, processes_of
from arc_nb.engine.shipping import ship, unpicklable

WINDOW = 3.0  # seconds within which the parent raises after a rank has failed: a tenth of that, where the machine is quiet


def left():
    "What a launch may not leave behind."
    gc.collect()
    ours = subprocess.run(["ps", "-eo", "ppid,cmd", "--no-headers"], capture_output=True, text=True).stdout.splitlines()
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return {"children": [line for line in ours if line.split()[0] == str(os.getpid()) and "worker" in line],
            "handles": sorted(os.readlink(link).split(":")[0] for link in links if os.path.islink(link)),
            "threads": len(os.listdir("/proc/self/task")), "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
            "files": [name for folder in ("/dev/shm", "/tmp") for name in os.listdir(folder) if name.startswith(f"arc_nb-{os.getpid()}-")],
            "environment": {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}, "argv": list(sys.argv)}


@pytest.fixture(scope="module", autouse=True)
def fresh():
    "What earlier tests have left to the garbage collector is not told here."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture
def clean():
    "Nothing may be left after the test; torch's first store leaves a handle or two, so one is made before."
    from arc_nb.engine.launch import meeting_point
    meeting_point()
    before = left()
    yield
    assert left() == before


def together(x, scale=1):
    "What a rank sees, and a sum over all of them."
    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return {"sum": total.item() * scale, "x": x, "pid": os.getpid(), "threads": torch.get_num_threads(), "group": dist.get_backend(),
            "names": [os.environ[name] for name in names], "main": "test_launch" in str(getattr(sys.modules["__main__"], "__file__", ""))}


def test_ranks_see_what_torchrun_would_give_them(clean):
    x = torch.randn(300_000)
    results = launch(together, (x,), {"scale": 10}, processes=2)
    for rank, found in enumerate(results):
        assert found["sum"] == 30 and torch.equal(found["x"], x) and found["group"] == "gloo" and not found["main"]
        assert found["names"] == [str(rank), str(rank), "2", "2", "127.0.0.1"]
        assert not Path(f"/proc/{found['pid']}").exists()


def dies(how, survivor):
    "Rank 1 dies; rank 0 waits for it in a collective, or is busy and hears of nothing."
    dist.barrier()
    channel().send(time.monotonic())
    if dist.get_rank() == 1: how()
    if survivor == "collective": dist.all_reduce(torch.ones(1))
    while True: time.sleep(0.01)


class Packed(Exception):
    "An error that pickles, and cannot be unpickled."
    def __init__(self, a, b): super().__init__(f"{a}, {b}")


class Locked(Exception):
    "An error that cannot be pickled."
    def __init__(self): super().__init__("holds a lock"); self.lock = threading.Lock()


def throw(error): raise error


DEATHS = {
    "raise": (lambda: throw(KeyError("no such word")), KeyError, "no such word"),
    "exit": (lambda: sys.exit(3), RuntimeError, r"rank 1 called sys\.exit\(3\)"),
    "_exit": (lambda: os._exit(3), ProcessKilled, "rank 1 has left with exit code 3"),
    "_exit 0": (lambda: os._exit(0), ProcessKilled, "rank 1 has left with exit code 0"),
    "SIGKILL": (lambda: os.kill(os.getpid(), signal.SIGKILL), ProcessKilled, "rank 1 was ended by SIGKILL after .* memory"),
    "SIGSEGV": (lambda: os.kill(os.getpid(), signal.SIGSEGV), ProcessKilled, "rank 1 was ended by SIGSEGV"),
    "packed": (lambda: throw(Packed(1, 2)), RuntimeError, "rank 1 raised Packed: 1, 2"),
    "locked": (lambda: throw(Locked()), RuntimeError, "rank 1 raised Locked: holds a lock"),
}
SLOW = {("exit", "busy"), ("raise", "collective"), ("SIGSEGV", "busy"), ("_exit 0", "busy"), ("_exit 0", "collective"), ("packed", "busy"),
        ("locked", "collective"), ("_exit", "busy")}


@pytest.mark.parametrize("way,survivor", [pytest.param(way, where, marks=pytest.mark.slow if (way, where) in SLOW else ())
                                          for way in DEATHS for where in ("collective", "busy")])
def test_a_rank_that_dies_ends_the_launch_with_its_own_error(way, survivor, clean, capfd):
    how, kind, words = DEATHS[way]
    last = []
    with pytest.raises(kind, match=words) as caught: launch(dies, (how, survivor), on_message=lambda rank, when: last.append(when))
    took = time.monotonic() - max(last)
    print(f"{way}, rank 0 {survivor}: raised here {took:.2f} s after")
    assert took < WINDOW
    if kind is ProcessKilled: assert caught.value.rank == 1
    else: assert "in rank 1" in str(caught.value.__cause__) and "test_launch.py" in str(caught.value.__cause__)
    if way == "SIGSEGV":
        assert "Segmentation fault" in capfd.readouterr().err and any("test_launch.py" in line for line in caught.value.last)


def first():
    if dist.get_rank() == 0: raise ValueError("rank 0 it is")
    dist.all_reduce(torch.ones(1))


def early():
    if dist.get_rank() == 0: dist.all_reduce(torch.ones(1))


def test_rank_0_and_a_rank_that_returns_early(clean):
    with pytest.raises(ValueError, match="rank 0 it is"): launch(first)
    with pytest.raises(RuntimeError, match="Connection (closed|reset) by peer") as caught: launch(early)
    assert "rank 1 had returned" in caught.value.__notes__[0]


def stubborn():
    "Rank 0 holds on, and has a child."
    if dist.get_rank() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen(["sleep", "1000"])
        channel().send(child.pid)
        while True: time.sleep(1)
    time.sleep(1)
    raise ValueError("enough")


def test_who_does_not_want_to_end_is_killed_with_its_children(clean):
    heard = []
    with pytest.raises(ValueError, match="enough"): launch(stubborn, grace=0.5, on_message=lambda rank, pid: heard.append(pid))
    [pid] = heard
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


def handled():
    "Rank 0 has a handler for SIGTERM, which cannot run while it waits in a collective."
    if dist.get_rank() == 0:
        signal.signal(signal.SIGTERM, lambda *_: None)
        channel().send("ready")
        dist.all_reduce(torch.ones(1))
    time.sleep(1)
    raise ValueError("enough")


def test_who_waits_for_a_partner_leaves_with_it(clean):
    heard = []
    with pytest.raises(ValueError, match="enough"): launch(handled, grace=30, on_message=lambda *_: heard.append(time.monotonic()))
    assert time.monotonic() - heard[0] < 1 + WINDOW


def returns(value): return threading.Lock() if value is None else value


def test_what_cannot_be_sent_is_named(clean):
    began = time.monotonic()
    with pytest.raises(TypeError, match=r"args\[0\]\['callbacks'\]\[1\]\.guard \(a lock\)"):
        launch(returns, ({"callbacks": [1, type("Mine", (), {"__init__": lambda self: setattr(self, "guard", threading.Lock())})()]},))
    assert time.monotonic() - began < 1, "before anything is started"
    with pytest.raises(TypeError, match=r"what rank \d returned cannot be sent back: result \(a lock\)"): launch(returns, (None,))


def listens():
    "Sends numbers until it is told to stop."
    line = channel()
    told = []
    while "stop" not in told:
        line.send({"rank": line.rank, "tensor": torch.ones(2)})
        told += line.received()
        time.sleep(0.01)
    return told


def test_messages_go_both_ways_and_the_parent_ticks(clean):
    heard, ticks, wishes = [], [], ["faster", {"lr": 0.1}, "stop"]
    def asked(): return wishes.pop(0) if heard and wishes else None
    def tick(): ticks.append(time.monotonic())
    [told] = launch(listens, processes=1, on_message=lambda *said: heard.append(said), on_tick=tick, asked=asked)
    assert told == ["faster", {"lr": 0.1}, "stop"] and heard[0][0] == 0 and heard[0][1]["tensor"].tolist() == [1, 1]
    gaps = np.diff(ticks)
    assert len(ticks) > 3 and np.median(gaps) < 0.2


def test_an_error_of_the_parent_ends_the_ranks(clean):
    with pytest.raises(ZeroDivisionError): launch(listens, on_message=lambda rank, value: 1 / 0)


def test_one_interrupt_asks_two_insist(clean, capsys):
    def once(rank, value): fired or (fired.append(1), signal.raise_signal(signal.SIGINT))
    fired = []
    assert launch(listens, on_message=once) == [["stop"], ["stop"]]
    assert "asked to stop" in capsys.readouterr().err
    fired, asked = [], []
    def thrice(rank, value):
        fired.append(1)
        if len(fired) in (1, 10): signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt): launch(listens, on_message=thrice, on_interrupt=lambda: asked.append(1))
    assert asked == [1]


def test_from_a_thread_and_some_in_a_row(clean):
    found = []
    thread = threading.Thread(target=lambda: found.append(launch(together, (1,))))
    thread.start()
    thread.join()
    assert [one["sum"] for one in found[0]] == [3, 3]
    for k in range(2): assert notebook_launch(together, (k,), processes=2)["x"] == k


@pytest.mark.slow
def test_ten_in_a_row(clean, monkeypatch):
    for k in range(10): assert notebook_launch(together, (k,), processes=2)["x"] == k


def speaks():
    "All that a rank may write."
    rank = dist.get_rank()
    print("whole line")
    print("half a", end="", flush=True)
    time.sleep(0.1)
    print(" line")
    for k in range(0, 101, 20): print(f"\r{k}%", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    os.write(1, "bytes of é\n".encode())
    sys.stdout.write("x" * 300_000 + "\n")
    warnings.warn("all say this", stacklevel=1)
    if rank == 1: warnings.warn("one says this", RuntimeWarning, stacklevel=1)
    sys.stdout.write("no end")


def test_prints_and_warnings_come_with_their_rank(clean, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        launch(speaks)
    out, err = capfd.readouterr()
    for rank in range(2):
        mine = [line.removeprefix(f"[rank {rank}] ") for line in out.splitlines() if line.startswith(f"[rank {rank}] ")]
        assert mine[:3] == ["whole line", "half a line", "bytes of é"] and mine[-1] == "no end" and sum(map(len, mine[3:-1])) == 300_000
        assert f"[rank {rank}] 100%\n" in err and "80%" not in err
    assert sorted((w.category.__name__, str(w.message)) for w in caught) == [
        ("RuntimeWarning", "[rank 1] one says this"), ("UserWarning", "all say this")]
    assert all(w.filename == __file__ for w in caught)


def loads():
    "A rank whose loader forks."
    rows = torch.utils.data.DataLoader(torch.arange(8.0), 2, num_workers=1)
    return sum(batch.sum().item() for batch in rows), channel() is not None


def test_a_loader_may_fork_in_a_rank(clean):
    assert launch(loads) == [(28.0, True)] * 2


class Stuck:
    "Is never unpacked."
    def __reduce__(self): return time.sleep, (600,)


def test_ranks_that_hang_before_they_begin_are_given_up(clean, monkeypatch):
    monkeypatch.setattr("arc_nb.engine.launch.START", 8.)
    with pytest.raises(TimeoutError, match="2 of 2 processes have not begun within 8 s"): launch(together, (Stuck(),), grace=.2)


class Warns:
    "A cycle that warns when it is collected."
    def __init__(self): self.me = self
    def __del__(self): warnings.warn("collected", RuntimeWarning, stacklevel=1)


class Collects:
    "A pipe, in the middle of whose messages garbage is collected."
    def __init__(self, pipe): self.pipe, self.inside = pipe, 0
    def send_bytes(self, data):
        self.inside += 1
        assert self.inside == 1, "a message in the middle of another"
        gc.collect()
        self.pipe.send_bytes(data)
        self.inside -= 1
    def __getattr__(self, name): return getattr(self.pipe, name)


def warns_while_it_tells():
    line = channel()
    line.pipe = Collects(line.pipe)
    for k in range(3):
        Warns()
        line.send(k)
    line.pipe = line.pipe.pipe


def test_a_warning_in_the_middle_of_a_message_comes_after_it(clean):
    heard = []
    with pytest.warns(RuntimeWarning, match="collected"):
        launch(warns_while_it_tells, processes=1, on_message=lambda rank, value: heard.append(value))
    assert heard == [0, 1, 2]


def nested():
    try: launch(together, (1,))
    except RuntimeError as error: return str(error)


def test_where_nothing_can_be_launched(clean, monkeypatch):
    assert "launched process already" in launch(nested, processes=1)[0]
    for wrong in (0, 1.5, "two"):
        with pytest.raises(ValueError, match="processes="): launch(together, (1,), processes=wrong)
    with pytest.raises(ValueError, match="devices='tpu'"): launch(together, (1,), devices="tpu")
    with pytest.raises(TypeError, match="is no function"): launch(3)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match="torchrun"): launch(together, (1,))


def test_how_many_processes(monkeypatch):
    assert processes_of(2) == (2, "cpu") or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert processes_of("auto") == processes_of(2) == (2, "cuda") and processes_of(3, "cpu") == (3, "cpu")
    with pytest.raises(ValueError, match="more than the 2 GPUs"): processes_of(3)


def fails_once(path):
    "Rank 1 is killed the first time."
    dist.barrier()
    if dist.get_rank() == 1 and not Path(path).exists():
        Path(path).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return "done"


def test_retry_begins_again(clean, tmp_path):
    with pytest.warns(RuntimeWarning, match="begins again .attempt 1 of 1., since ProcessKilled: rank 1 was ended by SIGKILL"):
        assert notebook_launch(fails_once, (str(tmp_path / "once"),), retry=1) == "done"


def weigh(model, x):
    "Trains a little, on data and weights that came through shared memory."
    with torch.no_grad(): model[0].weight.add_(dist.get_rank() + 1)
    x[0] = dist.get_rank()
    return float(model[0].weight.detach().sum()), float(x.sum())


@pytest.mark.parametrize("place", ["memory", "shm", "temporary", "nowhere"])
def test_parcels_take_the_best_place_that_has_room(place, clean, monkeypatch, tmp_path):
    "`/dev/shm` of a container may be too small, and not every Python has memfd_create."
    real = os.posix_fallocate
    if place != "memory": monkeypatch.delattr(os, "memfd_create")
    def reserve(handle, start, size):
        where = os.readlink(f"/proc/self/fd/{handle}")
        if place == "nowhere" or (place == "temporary" and where.startswith("/dev/shm")): raise OSError(28, "No space left on device")
        real(handle, start, size)
    monkeypatch.setattr(os, "posix_fallocate", reserve)
    model, x = torch.nn.Sequential(torch.nn.Linear(400, 400)), torch.zeros(100_000)
    before = float(model[0].weight.detach().sum())
    if place == "nowhere":
        with pytest.raises(OSError, match="has room for 1 MB"): ship((model, x))
        return
    parcel = ship((model, x))
    assert parcel.path.startswith({"memory": "/proc", "shm": "/dev/shm/arc_nb-", "temporary": "/tmp/arc_nb-"}[place])
    del parcel
    for rank, (weights, data) in enumerate(launch(weigh, (model, x))):
        assert abs(weights - before - (rank + 1) * 160_000) < 1 and data == rank, "a rank writes into pages of its own"
    assert float(model[0].weight.detach().sum()) == before and not x.any()


def test_a_parcel_without_room_leaves_nothing_and_may_lie_in_a_cycle(monkeypatch):
    "Python 3.11's garbage collector crashes over memoryviews in cycles: none may be kept."
    monkeypatch.setattr(shipping, "_places", lambda: iter(()))
    for _ in range(20):
        with pytest.raises(OSError, match="has room") as caught: ship((torch.zeros(10**5), np.asfortranarray(np.eye(300))))
        caught.value.itself = caught.value
        del caught
        gc.collect()


def test_what_parcels_carry():
    base = torch.arange(12.0)
    complex_ = torch.ones(2, dtype=torch.cfloat)
    values = {"views": [base[:4], base[4:]], "empty": torch.empty(0), "half": torch.ones(3).bfloat16(), "complex": complex_,
              "conj": complex_.conj(), "bool": torch.tensor([True]), "sparse": torch.eye(3).to_sparse(),
              "meta": torch.empty(3, device="meta"), "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
              "strided": base.view(3, 4).t(), "frozen": np.arange(3), "fortran": np.asfortranarray(np.eye(3)),
              "objects": np.array([1, "a", None], object), "lambda": lambda: 3, "generator": torch.Generator().manual_seed(3)}
    values["frozen"].flags.writeable = False
    for inline in (0, 1 << 30):
        found = ship(values, inline).open()
        a, b = found["views"]
        assert a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and torch.equal(torch.cat([a, b]), base)
        assert found["empty"].shape == (0,) and found["half"].dtype == torch.bfloat16 and found["conj"].is_conj() and found["meta"].is_meta
        assert torch.equal(found["sparse"].to_dense(), torch.eye(3)) and not found["parameter"].requires_grad and found["lambda"]() == 3
        assert found["strided"].stride() == (1, 4) and not found["frozen"].flags.writeable and found["fortran"].flags.f_contiguous
        assert found["objects"].tolist() == [1, "a", None] and found["generator"].initial_seed() == 3


def test_a_memmap_stays_in_its_file(tmp_path):
    data = np.memmap(tmp_path / "x.bin", "float32", "w+", shape=(500_000, 4))
    data[:] = np.arange(2_000_000).reshape(-1, 4)
    data.flush()
    read = np.memmap(tmp_path / "x.bin", "float32", "r", offset=16, shape=(499_999, 4))
    for view in (read, read[100:200], read[::-3], read[:, 1]):
        parcel = ship(view)
        assert parcel.nbytes < 10_000 and (parcel.open() == view).all()
    copied = np.memmap(tmp_path / "x.bin", "float32", "c", shape=(500_000, 4))
    copied[0] = -1
    assert (ship(copied).open()[0] == -1).all(), "what was written here only is sent"


def test_unpicklable_finds_the_innermost():
    lock = threading.Lock()
    def uses(): return lock
    class Holder:
        def __init__(self): self.inner = {"a": [0, lock]}
    holder = Holder()
    holder.itself = holder
    assert unpicklable({"f": uses}).startswith("f, which uses lock (a lock)")
    assert unpicklable({"x": 1, "h": holder}).startswith("h.inner['a'][1] (a lock)")
    assert unpicklable({"m": Holder().__init__}).startswith("m.__self__.inner['a'][1] (a lock)")
    assert unpicklable({"g": (k for k in range(3))}).startswith("g (a generator)")


def run(script, tmp_path, **more):
    "A script in a Python of its own."
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(script))
    return subprocess.Popen([sys.executable, str(file)], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)}, **more)


def test_a_script_needs_no_guard(tmp_path):
    script = run("""
        import torch.distributed as dist, helper
        print("the script runs")
        from arc_nb import notebook_launch
        class Net: size = 3
        def work(net): return helper.double(net.size) + dist.get_world_size(), type(net).__name__
        print(notebook_launch(work, (Net(),)))
    """, tmp_path)
    (tmp_path / "helper.py").write_text("def double(x): return 2 * x")
    assert script.communicate(timeout=120)[0] == "the script runs\n(8, 'Net')\n"


@pytest.mark.parametrize("memfd", [True, False])
def test_workers_end_when_the_parent_is_killed(memfd, tmp_path):
    script = run(f"""
        import os, time, torch
        {'' if memfd else 'del os.memfd_create'}
        from arc_nb.engine.launch import launch, channel
        def work(x):
            channel().send(os.getpid())
            while True: pass
        launch(work, (torch.zeros(10**6),), on_message=lambda rank, pid: print(pid, flush=True))
    """, tmp_path)
    pids = [int(script.stdout.readline()) for _ in range(2)]
    script.kill()
    script.wait()
    script.stdout.close()
    until = time.monotonic() + 5
    alive = lambda pid: Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    while any(map(alive, pids)) and time.monotonic() < until: time.sleep(0.05)
    assert not any(map(alive, pids)) and not [name for name in os.listdir("/dev/shm") if name.startswith(f"arc_nb-{script.pid}-")]


CELLS = """
import torch, torch.distributed as dist, threading
from torch import nn
from arc_nb import notebook_launch
torch.nn.Linear(50, 50)(torch.randn(500, 50)).sum().backward()   # threads and autograd have been used here
scale = 3
class Net(nn.Module):
    def __init__(self): super().__init__(); self.inner = nn.Linear(2, 2)
    def forward(self, x): return scale * self.inner(x)
twice = lambda x: 2 * thrice(x)
def thrice(x): return 3 * x
---
def train(model, x):
    print("training")
    return twice(1), model(x).shape, model
net = Net()
found = [notebook_launch(train, (net, torch.ones(4, 2))) for _ in range(2)]
assert [f[:2] for f in found] == [(6, (4, 2))] * 2 and type(found[0][2]) is Net
print("both")
---
def broken(): raise ValueError("in a cell")
notebook_launch(broken)
---
from arc_nb.engine.launch import channel
import time
def waits():
    print("waiting")
    while "stop" not in channel().received(): time.sleep(0.01)
    return "stopped when asked"
print(notebook_launch(waits))
"""


def test_in_a_kernel_with_everything_defined_in_cells(tmp_path):
    from jupyter_client.manager import start_new_kernel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        manager, client = start_new_kernel(cwd=str(tmp_path))
    said = []
    def heard(message):
        content = message["content"]
        said.append(content.get("text") or "\n".join(content.get("traceback", [])))
        if "[rank 0] waiting" in said[-1]: manager.interrupt_kernel()
    try:
        replies = [client.execute_interactive(cell, timeout=120, output_hook=heard)["content"]["status"] for cell in CELLS.split("---\n")]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    text = "".join(said)
    assert replies == ["ok", "ok", "error", "ok"], text
    assert text.count("[rank 0] training") == text.count("[rank 1] training") == 2 and "both" in text
    assert "asked to stop" in text and "stopped when asked" in text
    assert "in a cell" in text and 'def broken(): raise ValueError("in a cell")' in text and "in rank" in text, json.dumps(text[-3000:])
