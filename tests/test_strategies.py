"""Every strategy makes the steps of one process: two processes run the cases of strategy_cases.py, and the tests look at the table."""
import copy

import cloudpickle
import pytest
import strategy_cases
import torch
from strategy_cases import Net, Tied, Tokens, Unused, rows

from arc_nb.engine.batches import make_batches
from arc_nb.engine.launch import launch
from arc_nb.engine.objectives import objective
from arc_nb.engine.optimizers import optimizer
from arc_nb.engine.ranks import ALONE
from arc_nb.engine.step import Computation
from arc_nb.engine.strategies import Strategy, check_strategy, place
from arc_nb.engine.units import checkpoint_blocks, eager, units_of, unused

CLOSE = 1e-6


@pytest.fixture(scope="session")
def table():
    "What the ranks found; nothing of it is checked there."
    return launch(strategy_cases.everything, first_only=True)[0]


@pytest.mark.parametrize("name", ["ddp", "zero1", "zero2", "fsdp"])
def test_fifty_steps_equal_one_process(table, name):
    "AdamW, accumulation, clipping, fp32."
    row = table["fp32"][name]
    print(f"{name}: largest loss difference {row['loss']:.2g}, of the norm {row['norm']:.2g}, units {row['units']}")
    assert row["loss"] <= CLOSE and row["norm"] <= CLOSE
    assert row["weights"] > 0.1  # it learned something
    assert row["units"] == (("blocks.0", "blocks.1") if name in ("zero2", "fsdp") else ())


@pytest.mark.parametrize("name", ["ddp, activations", "fsdp, activations", "fsdp, whole", "fsdp, units", "function", "tensor parallel",
                                  "ddp, buckets"])
def test_options_change_no_number(table, name):
    assert table["fp32"][name]["loss"] <= CLOSE and table["fp32"][name]["norm"] <= CLOSE


@pytest.mark.parametrize("case", strategy_cases.CASES)
def test_whatever_the_rows_and_the_model(table, case):
    "Uneven shares, a rank without rows, weights, tokens, tied, frozen and unused parameters."
    for name, row in table["cases"][case].items():
        print(f"{case}, {name}: {row['loss']:.2g}, norm {row['norm']:.2g}")
        assert row["loss"] <= CLOSE and row["norm"] <= 2e-6, name


def test_numbers_of_a_step_of_ones_own_are_means_over_all_rows(table):
    ours, alone = table["cases"]["step="]["ddp"]["extras"]
    assert ours["mae"] == pytest.approx(float(alone["mae"]), abs=1e-6) and ours["note"] == "text"


def test_unused_parameters_are_found(table):
    assert table["cases"]["unused"]["ddp"]["ddp"] is True and table["cases"]["unused"]["zero1"]["ddp"] is True
    assert table["fp32"]["ddp"]["ddp"] is False


def test_bf16_equals_one_process_with_the_same_micro_batches(table):
    "A divided norm is rounded otherwise in its last bit, which may tip a bf16 number over: without clipping nothing differs."
    for clip in (0.5, None):
        for name, row in table[f"bf16, clip_norm={clip}"].items():
            print(f"clip_norm={clip}, {name}: {row['loss']:.2g}")
            assert row["loss"] <= (5e-3 if clip and name in ("zero2", "fsdp") else CLOSE), (clip, name)


def test_fp16_scales_on_all_ranks_alike(table):
    for row in table["fp16"].values(): assert row["loss"] <= CLOSE


def test_what_stays_on_the_device_gives_the_same(table):
    "The way of a GPU, with tensors on the CPU."
    assert len(table["tensors"]) == 6
    for name, row in table["tensors"].items():
        assert row["loss"] <= CLOSE and row["norm"] <= 2e-6, name
        assert set(row["extras"][0]) == set(row["extras"][1])


def test_rank_0_hears_its_own_gradient_and_the_whole(table):
    first, second = table["heard"]
    for k in (0, 2):
        step = first[k]
        assert step["shared"][0] == 14 and step["shared"][1] == pytest.approx(step["mine"], rel=1e-5)  # 7 of each 13
        assert step["norm"] == pytest.approx(step["whole"], rel=1e-5) and step["moved"] == 1
        assert step["rows"] == 26 and second[k]["rows"] == 26
    assert first[1]["shared"] is None


def test_all_know_that_one_asks_and_who_is_slow(table):
    for rank in table["heard"]:
        assert [step["asked"] for step in rank] == [False, True, False]
        assert all(0.5 < step["busy"][1] < 10 and 0 < step["busy"][0] < step["busy"][1] for step in rank)
    assert [s["busy"] for s in table["heard"][0]] == [s["busy"] for s in table["heard"][1]]


def test_one_bad_row_is_bad_for_all(table):
    for rank in table["bad"]: assert set(rank.values()) == {(False, True, True)}


def test_the_optimizer_goes_on_with_state_and_groups(table):
    for name, (off, groups) in table["kept"][0].items():
        assert off <= CLOSE, name
        assert groups == [("rest", pytest.approx(3e-3 * 0.9**15)), ("first", 5e-3)]


def test_a_step_goes_on_to_the_bit(table):
    assert table["resumed"] == [(True, True, 4.0)] * 2


def test_statistics_are_rank_0s(table):
    for said, before, buffers, weights in table["statistics"]:
        assert len(said) == 1 and "batch normalisation sees the rows of one rank" in said[0]
        assert before and before[0] == 1 and buffers is None and weights is None


def test_a_rank_without_rows_keeps_company(table):
    assert table["listened"] == [([6, 1], [12, 1], True), ([6], [12, 1], True)]


@pytest.mark.parametrize("what, kind, words", [
    ("lbfgs", "ValueError", "take another optimizer"), ("step", "ValueError", "compile=True compiles the model"),
    ("mesh", "ValueError", "has 3 places, and there are 2 processes"), ("no module", "TypeError", "has to return a module"),
    ("new names", "ValueError", "keep their names"), ("fp16", "ValueError", "use bf16"), ("l1", "ValueError", "weight_decay"),
    ("unused", "RuntimeError", '("ddp", {"find_unused": True})')])
def test_what_ranks_cannot_do_is_refused(table, what, kind, words):
    for rank in table["refused"]: assert rank[what][0] == kind and words in rank[what][1]


@pytest.mark.slow
def test_compiled_all_of_them_are_the_same():
    found = launch(strategy_cases.everything, (True,), first_only=True)[0]
    print(found)
    assert len(found) == 8 and max(found.values()) <= CLOSE


@pytest.mark.slow
def test_four_processes_in_two_dimensions():
    found, shares = launch(strategy_cases.square_mesh, processes=4, first_only=True)[0]
    print({name: row["loss"] for name, row in found.items()})
    assert shares == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert all(row["loss"] <= CLOSE and row["norm"] <= 2e-6 for row in found.values())


def test_specs():
    assert check_strategy("auto") == Strategy() and check_strategy("fsdp").name == "zero3" == check_strategy("zero3").name
    own = check_strategy((strategy_cases.split_linear, {"mesh": {"dp": 1, "tp": 2}}))
    assert own.name == "parallelize" and own.mesh(2) == {"dp": 1, "tp": 2} and check_strategy(own) is own


@pytest.mark.parametrize("spec, words", [
    ("zero5", "Did you mean 'zero"), ("dpp", "Did you mean 'ddp'"), (3, "no strategy is called 3"), (Net, "no strategy is called"),
    (("ddp", {"min_params": 10}), "no option of strategy 'ddp' is called 'min_params'"),
    (("fsdp", {"reshardd": True}), "Did you mean 'reshard'"),
    (("fsdp", {"min_params": -1}), "min_params=-1 has to be"),
    (("ddp", {"find_unused": "yes"}), "find_unused='yes' has to be True or False"),
    (("fsdp", {"param_dtype": "int8"}), "param_dtype='int8'"),
    ((strategy_cases.leave, {"mesh": {"dp": 0}}), "mesh={'dp': 0}"),
    ((strategy_cases.leave, {"offload": True}), "Known: checkpoint_activations, mesh, units"),
    (("fsdp", {"offload": 1}), "offload=1"), (("ddp", 3), "not understood")])
def test_what_is_no_strategy(spec, words):
    with pytest.raises(ValueError) as caught: check_strategy(spec)
    assert words in str(caught.value)


def test_units():
    assert list(units_of(Net(), 100)) == ["blocks.0", "blocks.1"] and list(units_of(Net())) == []
    assert list(units_of(Tied(), 100)) == []  # each shares a weight with the other
    assert list(units_of(Tokens(), 100)) == ["blocks.0", "blocks.1"]
    assert list(units_of(Net(), pattern="blocks.*")) == ["blocks.0", "blocks.1"]
    with pytest.raises(ValueError, match="Did you mean"): units_of(Net(), pattern="block.0")
    nested = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU()), torch.nn.Linear(3, 3))
    assert list(units_of(nested, 1)) == ["0.0", "1"]


def test_a_trial_leaves_no_trace():
    model = strategy_cases.Norm()
    model.add_module("extra", torch.nn.Linear(3, 3))
    compute, batch = Computation(model, objective("mse")), make_batches(rows(), 12).peek()
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert unused(model, lambda: compute(batch) + 0 * torch.rand(())) == ["extra.weight", "extra.bias"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(torch.get_rng_state(), drawn)
    assert unused(Net(), lambda: torch.zeros(())) != [] and unused(Unused(), lambda: torch.zeros(()))


@pytest.mark.slow
def test_a_trial_compiles_nothing():
    model = Unused()
    called = torch.compile(model, backend=lambda graph, inputs: pytest.fail("compiled"))
    assert unused(model, eager(lambda: called(rows(4)[0]).mean())) == ["extra.weight", "extra.bias"]


def test_blocks_that_compute_again_are_copied_sent_and_marked_once():
    torch.manual_seed(0)
    model, (X, _) = Net(), rows(16)
    plain = copy.deepcopy(model)
    checkpoint_blocks(model)
    before = model.blocks[0].forward
    checkpoint_blocks(model)
    assert model.blocks[0].forward is before and list(model.state_dict()) == list(plain.state_dict())
    for other in (copy.deepcopy(model), cloudpickle.loads(cloudpickle.dumps(model))):
        assert other.blocks[0].forward.args[0].__self__ is other.blocks[0]  # its own, not that of the first
        for one in (plain, other):
            one.zero_grad()
            one(X).square().mean().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), other.parameters()))


def test_one_process_has_nothing_to_divide():
    model = Net()
    sgd = optimizer("sgd", model, 0.1)
    placed = place(check_strategy("auto"), model, sgd, ALONE)
    assert placed.model is model and placed.plain is model and placed.optimizer is sgd and not placed.sharded and placed.averaged == 1
    placed.settle()
    with pytest.warns(UserWarning, match="strategy='zero1' has no effect in one process"): place(check_strategy("zero1"), model, sgd, ALONE)
    with pytest.warns(UserWarning, match="no blocks"):
        place(check_strategy(("ddp", {"checkpoint_activations": True})), torch.nn.Linear(3, 3), sgd, ALONE)


def test_activations_are_computed_again_in_one_process_too():
    "The blocks keep their inputs alone; loss and gradient stay."
    kept = {}
    for on in (False, True):
        torch.manual_seed(0)
        model, sizes = Net(), []
        place(check_strategy(("auto", {"checkpoint_activations": on})), model, optimizer("sgd", model, 0.1), ALONE)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            loss = model(rows(64)[0]).square().mean()
        loss.backward()
        kept[on] = sum(sizes), loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])
    assert kept[True][0] < 0.5 * kept[False][0] and kept[True][1] == kept[False][1] and torch.equal(kept[True][2], kept[False][2])
