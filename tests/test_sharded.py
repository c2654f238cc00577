"""States and checkpoints of many ranks. One pair of processes runs all cases of shards_ranks.py; each case is then a test of its own."""
import json
import sys
from pathlib import Path

import pytest
import torch
from shards_ranks import CASES, Net, goes_on, groups, launched, plain, run_cases, same, train

from arc_nb.engine.checkpoint import newest_good, read_checkpoint
from arc_nb.engine.launch import launch


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Where the pair has left its table and its files."
    home = tmp_path_factory.mktemp("ranks")
    launch(launched, (run_cases, 2, str(home)), processes=2)
    return home


@pytest.fixture(scope="module")
def tables(home): return [json.loads(Path(home, f"table-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_ranks(case, tables):
    for table in tables:
        print(f"{table[case]['seconds']:.2f} s", table[case]["said"] or "")
        assert not table[case]["error"], table[case]["error"]


def test_one_process_goes_on_from_two_ranks(home):
    state, metadata = read_checkpoint(newest_good(home / "kept"))
    assert plain(state) and same({k: state[k] for k in ("model", "optimizer")}, torch.load(home / "kept.whole"))
    model = Net()
    optimizer = torch.optim.AdamW(groups(model), lr=0.5)
    model.load_state_dict(state["model"]); optimizer.load_state_dict(state["optimizer"])
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["lr"] == 0.01 and metadata["step"] == state["step"] == 3


@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_ranks(world, home):
    launch(launched, (goes_on, world, str(home)), processes=world)


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_killed_in_the_middle_of_a_sharded_save(kills, call, tmp_path):
    out = call(sys.executable, "tests/killed_shards.py", tmp_path, str(kills), timeout=900, PYTHONPATH="tests")
    print(out.strip().splitlines()[-1])
