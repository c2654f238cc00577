"""Every notebook is executed: the lessons in the chapters are the unit tests."""
import pytest
from conftest import notebooks


def run_all(folder, call, *flags: str) -> None:
    "In a copy of the project, so that the runs which the notebooks make do not pile up in it."
    said = call("nbdev-test", "--n-workers", "2", "--timing", *flags, cwd=folder, timeout=1800)
    print(said)
    assert "Success." in said


@pytest.mark.timeout(1800)
def test_every_notebook_runs(project_copy, call):
    assert notebooks(project_copy)
    run_all(project_copy, call)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_notebook_runs_with_its_slow_cells(project_copy, call):
    run_all(project_copy, call, "--flags", "slow")
