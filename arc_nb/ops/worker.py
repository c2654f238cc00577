"""What runs in the process of a job: a plain module, as process start-up makes bad reading.

`ops.queue.detach` starts it. Until it is the job's turn nothing is imported that is large: a hundred that wait need little memory.
"""
from __future__ import annotations

import os
import sys
import time

from ..engine.worker import end
from .queue import take_turn
from .store import Store, write

PAUSE = 0.25  # seconds between two looks of a job that waits
SIGN = 5.0  # seconds between two signs of life


def main(home: str, id: str) -> None:
    """The life of a job: it waits, works and ends."""
    store = Store(home)
    with store.writing(): pass  # whoever has started this process writes its number in the table first
    if not wait_for_turn(store, id): return
    for stream in (sys.stdout, sys.stderr): stream.reconfigure(  # type: ignore[union-attr]
        encoding="utf-8", errors="backslashreplace", line_buffering=True)
    from ..track.server import leased
    from .work import perform
    with leased(home): perform(store, id)  # a TensorBoard of this home goes on until the job has ended
    end()


def wait_for_turn(store: Store, id: str) -> bool:
    """Waits until the job may begin; False where it is no longer this process's to run."""
    signed = time.monotonic()
    while True:
        mine = take_turn(store, id, os.getpid())
        if mine is not False: return bool(mine)
        time.sleep(PAUSE)
        if time.monotonic() - signed > SIGN:
            with store.writing() as db: write(db, id, beat=time.time())
            signed = time.monotonic()
