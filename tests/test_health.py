"""The watchdog names the line that hangs: in a data set, at a lock, in a worker process, in another thread than the main one."""
import inspect
import queue
import threading
import time
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from arc_nb.engine.batches import make_batches
from arc_nb.engine.health import Watchdog
from arc_nb.engine.objectives import objective
from arc_nb.engine.step import Computation, Step

PATIENCE = 0.3  # seconds


class Slow(Dataset):
    "Hangs for a second at one item."
    def __init__(self, at): self.at = at
    def __len__(self): return 24
    def __getitem__(self, index):
        if index == self.at: time.sleep(1.2)
        return torch.ones(4), torch.zeros(1)


def line(function, text):
    "The number of the line of a function that holds the text."
    lines, first = inspect.getsourcelines(function)
    return first + next(k for k, found in enumerate(lines) if text in found)


def train(batches, told, watched=True):
    "Steps over the batches under a watchdog; the number of steps."
    model = nn.Linear(4, 1)
    step, count = Step(Computation(model, objective("mse")), torch.optim.SGD(model.parameters(), 0.1)), 0
    with Watchdog(PATIENCE if watched else None, lambda: count, told.append):
        for batch in batches.epoch(): step([batch]); count += 1
    return count


def watchdogs(): return [t.name for t in threading.enumerate() if "watchdog" in t.name]


@pytest.fixture(autouse=True)
def nobody_is_left():
    yield
    assert not watchdogs()


def test_a_data_set_that_hangs():
    told = []
    assert train(make_batches(Slow(13), 4, shuffle=False), told) == 6
    here = f"test_health.py line {line(Slow.__getitem__, 'sleep')}, __getitem__: `if index == self.at: time.sleep(1.2)`"
    assert told == [f"no step has ended for 0.3 s: it is in {here}"]  # once a stall


def test_nothing_is_said_while_steps_end():
    told = []
    assert train(make_batches(TensorDataset(torch.ones(80, 4), torch.ones(80, 1)), 4), told) == 20 and not told


def test_a_worker_process_that_hangs():
    told = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of newer Pythons, on forks beside threads
        train(make_batches(DataLoader(Slow(13), 4, num_workers=1, prefetch_factor=1), 4), told)
    assert len(told) == 1 and "it waits for the worker processes of a DataLoader" in told[0] and "workers=0" in told[0]


def test_a_worker_process_behind_a_generator_of_ones_own():
    def mine():
        for raw in DataLoader(Slow(13), 4, num_workers=1): yield raw  # noqa: UP028

    told = []
    train(make_batches(mine(), 4), told)
    assert len(told) == 1 and "worker processes of a DataLoader" in told[0] and f"line {line(mine, 'DataLoader')}, mine" in told[0]


def test_a_model_that_hangs():
    class Waits(nn.Module):
        def forward(self, x):
            time.sleep(0.8)
            return x
    model = nn.Sequential(nn.Linear(4, 1), Waits())
    told = []
    step = Step(Computation(model, objective("mse")), torch.optim.SGD(model.parameters(), 0.1))
    [batch] = make_batches((torch.ones(4, 4), torch.ones(4)), 4).epoch()
    with Watchdog(PATIENCE, lambda: 0, told.append): step([batch])
    assert len(told) == 1 and f"line {line(Waits, 'sleep')}, forward: `time.sleep(0.8)`" in told[0]


@pytest.mark.parametrize("hang, said", [
    (lambda lock, q: lock.acquire(timeout=0.8), "lock.acquire"), (lambda lock, q: wait(q), "q.get(timeout")])
def test_a_lock_and_a_queue(hang, said):
    lock, told = threading.Lock(), []
    lock.acquire()
    with Watchdog(PATIENCE, lambda: 0, told.append): hang(lock, queue.Queue())
    assert len(told) == 1 and said in told[0]


def wait(q):
    try: q.get(timeout=0.8)
    except queue.Empty: pass


def test_the_thread_that_entered_is_the_one_that_is_watched():
    told, done = [], []
    def fit(): done.append(train(make_batches(Slow(5), 4, shuffle=False), told))
    thread = threading.Thread(target=fit)
    thread.start()
    while thread.is_alive(): time.sleep(0.01)  # the main thread is busy elsewhere
    assert done == [6] and len(told) == 1 and "__getitem__" in told[0]


def test_two_stalls_are_told_twice_and_a_pause_is_none():
    now, told = [0], []
    with Watchdog(PATIENCE, lambda: now[0], told.append):
        time.sleep(0.9)
        now[0] = 1; time.sleep(0.9)
        now[0] = None; time.sleep(0.9)
        now[0] = 1; time.sleep(0.15)
    assert len(told) == 2


def test_what_hangs_in_a_library_is_named_as_it_is():
    told = []
    done = threading.Event()
    with Watchdog(PATIENCE, lambda: 0, told.append): train(make_batches(Slow(99), 4), [], watched=False); done.wait(0.8)
    assert len(told) == 1 and "done.wait(0.8)" in told[0]


def test_an_error_ends_the_watch():
    with pytest.raises(ZeroDivisionError), Watchdog(60, lambda: 0, print): 1 / 0  # noqa: B018
    began = time.monotonic()
    with Watchdog(60, lambda: 0, print): assert watchdogs()
    assert time.monotonic() - began < 0.5  # it does not wait for its next look


def test_nobody_watches():
    told = []
    with Watchdog(None, lambda: 0, told.append): assert not watchdogs()
    for odd in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"seconds={odd!r}"): Watchdog(odd, lambda: 0, print)


def test_it_looks_at_most_once_a_second():
    looks = []
    with Watchdog(60, lambda: looks.append(time.monotonic()), print): time.sleep(2.2)
    assert len(looks) == 3 and min(b - a for a, b in zip(looks, looks[1:])) > 0.99
