"""A training that is killed again and again, in the middle of saves too, ends as if nothing had been: to the bit."""
import json
import sys

import pytest


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_as_if_nothing_had_been(kills, call, tmp_path):
    out = call(sys.executable, "-W", "error::UserWarning", "tests/victim.py", str(kills), tmp_path, timeout=900, PYTHONPATH="tests")
    found = json.loads(out.strip().splitlines()[-1])
    print(found)
    assert found["kills"] == kills and found["in_a_save"] >= kills // 5
    assert found["finished"] == found["equal"] >= 1
    assert found["control_differs"]  # without the generators' states the same comparison fails
