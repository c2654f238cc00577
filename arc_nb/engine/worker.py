"""What runs in a process that `engine.launch` has started: a plain module, as process start-up makes bad reading.

The parent starts `python -c "...; main(fd)"` in a process group of its own. No `__main__` is imported; the order, with the function
in a parcel, comes through the socket `fd`, and so do the parent's messages. When that socket closes, the parent is gone, and the
process ends with everything that it has started. Nothing heavy is imported before the reading thread stands.
"""
from __future__ import annotations

import atexit
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .shipping import Parcel

WHOLE = 1 << 62  # bytes: a message never needs a file
_live: Channel | None = None  # of this process


class Channel:
    """The line from a rank to the process that has launched it."""
    def __init__(self, rank: int, pipe: Connection):
        self.rank, self.pipe = rank, pipe
        self.leave = threading.Event()  # set when the parent has all that it wants of us
        self._sending, self._reading, self._heard = threading.RLock(), threading.Lock(), list[Any]()
        self._unsent, self._busy = deque[bytes](), False
        self.files: list[str] = []  # removed if the parent dies before it could

    def send(self, value: Any) -> None:
        """Sends it to the parent, from any thread; tensors arrive in host memory. Raises what pickle raises where it cannot be sent."""
        from .shipping import ship
        self.tell("message", ship(value, WHOLE))

    def received(self) -> list[Any]:
        """What the parent has sent since the last call."""
        with self._reading: heard, self._heard = self._heard, []
        return heard

    def tell(self, kind: str, value: Any = None) -> None:
        """What the parent's loop understands. A thread that comes here again in the middle of a message, led by the garbage collector into
        something that warns, leaves its words for itself to send afterwards."""
        self._unsent.append(pickle.dumps((kind, value), protocol=5))
        with self._sending:
            while self._unsent and not self._busy:
                self._busy = True
                try: self.pipe.send_bytes(self._unsent.popleft())
                finally: self._busy = False

    def read(self) -> None:
        """A thread's work: takes what comes, until the parent is gone, and then ends the process."""
        try:
            while True:
                kind, value = pickle.loads(self.pipe.recv_bytes())
                if kind == "leave": self.leave.set()
                else:
                    value = value.open()
                    with self._reading: self._heard.append(value)
        except (EOFError, OSError): self.orphaned()

    def orphaned(self) -> None:
        """The parent is gone: this process ends at once, with all that it has started."""
        for path in self.files: Path(path).unlink(missing_ok=True)
        os.killpg(0, signal.SIGKILL)


def channel() -> Channel | None:
    """The line to the parent; None in a process that `launch` has not started."""
    return _live


def main(fd: int) -> None:
    """The life of a rank."""
    global _live
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears the interrupt, and asks
    pipe = Connection(fd)
    os.set_inheritable(fd, False)
    _, order = pickle.loads(pipe.recv_bytes())
    _live = line = Channel(order["rank"], pipe)
    line.files = [path for path in [order["parcel"].path] if path and not path.startswith("/proc/")]
    threading.Thread(target=line.read, name="arc_nb channel", daemon=True).start()
    sys.argv[:] = order["argv"]
    for stream in (sys.stdout, sys.stderr): stream.reconfigure(  # type: ignore[union-attr]
        encoding="utf-8", errors="backslashreplace", line_buffering=True)
    plain = warnings.showwarning
    warnings.showwarning = lambda message, category, filename, lineno, file=None, line=None: _warned(message, category, filename, lineno)
    os.register_at_fork(after_in_child=lambda: _forked(pipe, plain))
    try: value = work(line, order)
    except BaseException as error: _failed(line, error)  # SystemExit too: the function has not returned
    else:
        line.tell("result", value)
        line.leave.wait()
        if value is not None: value.remove()
    end()


def end() -> None:
    """Ends as a program does, up to the point where torch's own threads may still be at work: taking Python down around them may abort."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread(): thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr): stream.flush()
    os._exit(0)


def work(line: Channel, order: dict[str, Any]) -> Parcel | None:
    """Joins the group, runs the function, and packs what it returned."""
    import faulthandler

    from .ranks import leave
    from .shipping import ship
    faulthandler.enable(all_threads=False)
    _begin(order)
    fn, args, kwargs = order["parcel"].open()
    line.tell("opened")
    line.files = []
    _die_with_parent()
    value = fn(*args, **kwargs)
    leave()
    if not order["wanted"]: return None
    try: return ship(value)
    except Exception as error: raise _unsendable(value, order["rank"]) from error


def _begin(order: dict[str, Any]) -> None:
    """Threads, device and process group, as the environment says."""
    import torch
    import torch.distributed as dist

    from .ranks import PATIENCE
    torch.set_num_threads(order["threads"])
    if order["devices"] == "cpu": dist.init_process_group("gloo", timeout=PATIENCE)
    else:
        device = torch.device("cuda", order["rank"])
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=PATIENCE, device_id=device)
    dist.barrier()  # a function that returns at once would close connections that others have not yet made


def _unsendable(value: Any, rank: int) -> TypeError:
    from .shipping import unpicklable
    why = unpicklable({"result": value})
    return TypeError(f"what rank {rank} returned cannot be sent back: {why}. Return what other processes can hold")


def _die_with_parent() -> None:
    """Linux ends this process with its parent even while compiled code keeps the reading thread from running."""
    if sys.platform != "linux": return
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _forked(pipe: Connection, plain: Any) -> None:
    """A process that this rank forks, such as a loader's, is no rank: the line to the parent is not its own."""
    global _live
    _live, warnings.showwarning = None, plain
    pipe.close()


def _warned(message: Any, category: type[Warning], filename: str, lineno: int) -> None:
    """A warning goes to the parent, as text where the category is not known there."""
    assert _live
    from .shipping import ship
    try: parcel = ship((str(message), category, filename, lineno), WHOLE)
    except Exception: parcel = ship((f"{category.__name__}: {message}", UserWarning, filename, lineno), WHOLE)
    _live.tell("warning", parcel)


def _failed(line: Channel, error: BaseException) -> None:
    """Tells the parent what went wrong, and when; source lines are looked up there, where the notebook's cells are known."""
    when = time.monotonic()
    from .shipping import ship
    report = traceback.TracebackException.from_exception(error, lookup_lines=False)
    _only_theirs(report)
    sent = error if isinstance(error, Exception) else RuntimeError(_left(error, line.rank))
    said = f"{type(error).__qualname__}: {error}"
    line.tell("failed", (when, said, _packed(ship, sent), _packed(ship, report), "".join(traceback.format_exception(error))))
    line.leave.wait()
    os._exit(1)  # others may hang in a collective: nothing is waited for


def _packed(ship: Callable[..., Parcel], value: Any) -> Parcel | None:
    """In a parcel, unless it cannot be pickled: the parent has the text."""
    try: return ship(value, WHOLE)
    except Exception: return None


def _left(error: BaseException, rank: int) -> str:
    if isinstance(error, SystemExit): return f"rank {rank} called sys.exit({error.code!r}) before its function returned"
    return f"rank {rank} was ended by {type(error).__name__}: {error}"


def _only_theirs(report: traceback.TracebackException) -> None:
    """Takes this file's own lines out of it."""
    report.stack[:] = [frame for frame in report.stack if frame.filename != __file__]
    for one in (report.__cause__, report.__context__):
        if one is not None: _only_theirs(one)
