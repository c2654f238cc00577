"""What runs in the process of a TensorBoard: a plain module, as process start-up makes bad reading.

`track.server.serve` starts it. The server answers in a thread; the main thread looks whether anybody is left who wants it, and ends the
process when nobody is. There is no second process that could be forgotten: whatever ends this one ends the server.
"""
from __future__ import annotations

import os
import time

from .server import Places, free_port, locked

LOOK = 1.0  # seconds between two looks at who is left
TRIES = 20  # ports that were free a moment ago and are not any more


def main(home: str, logdir: str, port: int) -> None:
    """Serves until the last lease is gone."""
    places = Places(home)
    taken = start(logdir, port)
    places.write(taken, logdir)
    while True:
        time.sleep(LOOK)
        if places.holders(): continue
        with locked(places):  # nobody can take a lease meanwhile
            if places.holders(): continue
            places.server.unlink(missing_ok=True)
            os._exit(0)


def start(logdir: str, port: int) -> int:
    """Starts the server on this machine's own address only; returns its port."""
    from tensorboard import program
    for _ in range(TRIES):
        found = free_port(port)
        server = program.TensorBoard()
        server.configure(argv=[None, "--logdir", logdir, "--host", "127.0.0.1", "--port", str(found), "--reload_interval", "3"])
        try: server.launch()
        except program.TensorBoardPortInUseError: port = found + 1
        else: return found
    raise OSError(f"no port from {port} on could be had in {TRIES} tries")
