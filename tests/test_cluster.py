"""Machines that train together, on this one: a job of Slurm's (two machines that are played), and torchrun on two loopback addresses."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cluster_script
import pytest

from arc_nb import Cluster
from arc_nb.engine.checkpoint import newest_good, read_checkpoint

HERE = Path(__file__).parent
SCRIPT = str(HERE / "cluster_script.py")
TORCHRUN = f"{sys.executable} -m torch.distributed.run"


def port() -> int:
    "One that is free."
    with socket.create_server(("127.0.0.1", 0)) as free: return int(free.getsockname()[1])


def told(run: Path) -> dict[str, Any]:
    "What rank 0 has written at the end."
    return dict(json.loads(run.with_suffix(".json").read_text()))


def run_all(commands: list[str], timeout: float = 180, **environment: str) -> list[int]:
    "Types each command on its machine; their exit codes. Nothing is left running."
    setting = os.environ | {"PYTHONPATH": str(HERE), "GLOO_SOCKET_IFNAME": "lo"} | environment
    agents = [subprocess.Popen(["bash", "-c", f"exec env {command}"], env=setting, stdin=subprocess.DEVNULL, start_new_session=True)
              for command in commands]
    try: return [agent.wait(timeout) for agent in agents]
    finally:
        for agent in agents: agent.terminate(); agent.wait(60)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    "Two machines with a process each, begun by the script for Slurm; srun and scontrol are played by two shell scripts."
    folder = tmp_path_factory.mktemp("slurm")
    srun = 'shift\nSLURM_NODEID=1 SLURMD_NODENAME=127.0.0.2 "$@" &\nSLURM_NODEID=0 SLURMD_NODENAME=127.0.0.1 "$@" && wait $!'
    for name, text in {"scontrol": 'echo "127.0.0.1\n127.0.0.2"', "srun": srun}.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o700)
    cluster = Cluster(2, 1, SCRIPT, [folder / "run"], port=port(), interface="lo", launcher=TORCHRUN)
    (folder / "job.sh").write_text(cluster.slurm("0:10:00", setup=[f"export PYTHONPATH={HERE}"]))
    subprocess.run(["bash", "-e", folder / "job.sh"], timeout=180, check=True,
                   env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "two", "SLURM_JOB_NUM_NODES": "2",
                                     "SLURM_JOB_ID": "17"})
    return told(folder / "run")


def test_a_job_of_slurm_trains_on_two_machines(undisturbed: dict[str, Any]) -> None:
    assert (undisturbed["world"], undisturbed["local"]) == (2, 1) and undisturbed["steps"][-1] == 20


def test_a_killed_worker_is_begun_anew_and_the_training_ends_as_if_nothing_had_been(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    cluster = Cluster(["127.0.0.1", "127.0.0.2"], 1, SCRIPT, [run, 1], port=port(), max_restarts=1, launcher=TORCHRUN)
    assert run_all(cluster.commands()) == [0, 0] and run.with_suffix(".killed").exists()
    assert told(run) | {"node": ""} == undisturbed | {"node": ""}  # to the bit


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_and_is_resumed(tmp_path: Path) -> None:
    "Slurm tells the processes by SIGTERM."
    run = tmp_path / "run"
    [command] = Cluster(1, 2, SCRIPT, [run], max_restarts=0, launcher=TORCHRUN).commands()
    setting = os.environ | {"PYTHONPATH": str(HERE), "EPOCHS": "100000", "EVERY": "1000000"}
    agent = subprocess.Popen(["bash", "-c", f"exec env {command}"], env=setting, stdin=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (run / "history.jsonl").exists() and time.monotonic() < until: time.sleep(0.1)
    agent.send_signal(signal.SIGTERM)
    agent.wait(60)
    assert json.loads((run / "status.json").read_text())["state"] == "terminated"
    saved = newest_good(run / "checkpoints")
    assert saved and read_checkpoint(saved)[0]["step"] > 0


@pytest.mark.slow
def test_a_lost_machine_leaves_the_rest_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    cluster = Cluster(["127.0.0.1", "127.0.0.2"], 1, SCRIPT, [run, 1], least=1, port=port(), max_restarts=2, launcher=TORCHRUN)
    assert run_all(cluster.commands(), WHOLE_MACHINE="1") == [0, -9]
    found, one = told(run), cluster_script.make(tmp_path / "one", dropout=0.0)
    one.fit(epochs=4)
    assert found["world"] == 1
    assert found["losses"] == pytest.approx(one.history.frame().query("name == 'loss'")["value"].tolist(), abs=1e-5)
