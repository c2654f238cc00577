"""Every notebook is executed: the lessons in the chapters are the unit tests."""
import pytest
from conftest import notebooks


def run_all(call, *flags: str) -> None:
    said = call("nbdev-test", "--n_workers", "2", "--timing", *flags, timeout=1800)
    print(said)
    assert "Success." in said


def test_every_notebook_runs(call):
    assert notebooks()
    run_all(call)


@pytest.mark.slow
def test_every_notebook_runs_with_its_slow_cells(call):
    run_all(call, "--flags", "slow")
