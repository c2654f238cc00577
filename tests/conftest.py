"""What the tests share: where the project is, a copy of it to spoil, and a way to run its tools."""
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCE = (".git", ".venv", "__pycache__", "*.egg-info", ".ipynb_checkpoints", ".*_cache",
              "build", "dist", "_proc", "runs", "out", "node_modules")

# The tools beside this Python come first, and every process that a test starts keeps to one thread: the tests share two cores.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("ARC_NB_DATA", str(ROOT.parent / "shared/data"))

# A shell in the background starts its programs with Ctrl-C ignored, others with signals blocked, and children inherit both.
signal.pthread_sigmask(signal.SIG_SETMASK, ())
signal.signal(signal.SIGINT, signal.default_int_handler)
for _number in (signal.SIGTERM, signal.SIGCHLD): signal.signal(_number, signal.SIG_DFL)


@pytest.fixture(scope="session")
def root() -> Path:
    "The project's folder."
    return ROOT


@pytest.fixture
def project_copy(tmp_path: Path) -> Path:
    "The project's sources in a folder of their own, without what builds and runs leave behind."
    return Path(shutil.copytree(ROOT, tmp_path / "project", ignore=shutil.ignore_patterns(*NOT_SOURCE), symlinks=True))


@pytest.fixture(scope="session")
def call() -> Callable[..., str]:
    "Run a command and return what it printed; a command that fails fails the test, with all that it said."
    def run(*command: str | Path, cwd: Path = ROOT, timeout: float = 600, **environment: str) -> str:
        done = subprocess.run([str(c) for c in command], cwd=cwd, timeout=timeout, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | environment)
        if done.returncode:
            pytest.fail(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-20_000:]}", pytrace=False)
        return done.stdout
    return run


def notebooks(root: Path = ROOT) -> Sequence[Path]:
    "The source notebooks, in reading order."
    return [p for p in sorted((root / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts and not p.name.startswith("_")]
