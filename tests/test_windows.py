"""Data read by position: each row once an epoch whatever divides it, any place in an epoch, exact resume, two processes."""
import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from arc_nb import Trainer
from arc_nb.engine.batches import KeyedBatches, make_batches
from arc_nb.engine.randomness import item_seed, keyed_seed, permutation
from arc_nb.engine.ranks import ALONE, over
from arc_nb.engine.shards import share
from arc_nb.engine.windows import IGNORED, Keyed, Order, Windows, bits_at

ROW = (np.cumsum(np.random.default_rng(0).integers(0, 3, 3000)) % 10).astype(np.uint8)

LOSS = ("cross_entropy", {"class_dim": -1})


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.drop, self.out = nn.Embedding(10, 16), nn.Dropout(0.2), nn.Linear(16, 10)

    def forward(self, x): return self.out(self.drop(self.embed(x)))


def noisy(values, starts, key):
    """An augmentation: what it changes depends on the key and the position."""
    at = starts[:, None] + np.arange(values.shape[1])
    return np.where(bits_at(key, at) % 10 == 0, 0, values).astype(values.dtype)


def make(run=False, transform=noisy, **more):
    torch.manual_seed(0)
    settings = dict(loss=LOSS, lr=1e-2, batch_size=16, run=run, board=False, seed=3) | more
    return Trainer(Small(), Windows(ROW[:2500], 15, phase=True, transform=transform), Windows(ROW[2500:], 15, whole=True), **settings)


def weights(trainer): return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 16, 17, 100, 1023, 1024, 1025])
def test_an_order_has_every_row_once(rows):
    for key in (0, 1, 2**63 - 1): assert sorted(Order(rows, key)[:].tolist()) == list(range(rows))
    assert Order(rows, None)[:].tolist() == list(range(rows))


def test_an_order_is_as_random_as_a_shuffle():
    """Every row is as often at every place (chi-square), all 24 orders of four rows occur, and neighbours go apart."""
    places = np.zeros((7, 7))
    for key in range(7000): places[np.arange(7), Order(7, keyed_seed(key))[:].numpy()] += 1
    assert ((places - 1000)**2 / 1000).sum() < 36 + 5 * 72**.5  # 36 degrees of freedom
    found = np.unique([Order(4, keyed_seed(key))[:].tolist() for key in range(4800)], axis=0, return_counts=True)[1]
    assert len(found) == 24 and ((found - 200)**2 / 200).sum() < 23 + 5 * 46**.5
    order = Order(100_000, 5)[:].double()
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < .02 and abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < .02


def test_an_order_of_a_trillion_rows_costs_nothing():
    part = Order(10**12, 1)[5 * 10**11:5 * 10**11 + 1000]
    assert len(part.unique()) == 1000 and 0 <= part.min() and part.max() < 10**12


def test_orders_of_other_data_are_what_they_were():
    assert permutation(10, 3, 2).tolist() == torch.randperm(10, generator=torch.Generator().manual_seed(keyed_seed(3, 2))).tolist()
    batches = make_batches((torch.arange(10),) * 2, 4, seed=3).epoch(2)
    assert torch.cat([b.target for b in batches]).tolist() == permutation(10, 3, 2).tolist()
    assert bits_at(7, np.arange(3)).tolist() == [item_seed(7, k) for k in range(3)]


@pytest.mark.parametrize("length,stride,n", [(4, 4, 41), (4, 4, 5), (4, 3, 40), (7, 1, 30), (10, 10, 12), (3, 3, 10)])
def test_whole_windows_ask_for_every_number_once(length, stride, n):
    data = Windows(np.arange(n), length, stride, whole=True)
    inputs, targets = data.take(torch.arange(len(data)))
    asked = targets != IGNORED
    assert targets[asked].tolist() == list(range(1, n)) and (targets[asked] == inputs[asked] + 1).all()


def test_every_number_comes_first_some_day():
    data = Windows(np.arange(50), 8, phase=True)
    first = {int(start) for epoch in range(200) for start in data.starts(np.arange(len(data)), keyed_seed(0, epoch, 1))}
    assert first == set(range(42)) and all(len(data.take(torch.arange(len(data)), keyed_seed(k))[0]) == len(data) for k in range(9))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_divide_every_batch(world, drop_last):
    data = make_batches(Windows(ROW, 15, phase=True, transform=noisy), 16, seed=3, drop_last=drop_last)
    whole = list(data.epoch(2))
    shares = [list(share(data, over(ALONE, rank, world)).epoch(2)) for rank in range(world)]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        kept = [part for part in parts if part.rows]
        assert torch.equal(batch.inputs[0], torch.cat([p.inputs[0] for p in kept]))
        assert torch.equal(batch.target, torch.cat([p.target for p in kept]))
    late = [list(share(data, over(ALONE, rank, world)).epoch(2, start=5)) for rank in range(world)]
    assert all(torch.equal(a.target, b.target) for one, other in zip(late, shares) for a, b in zip(one, other[5:], strict=True))


def test_batches_do_not_depend_on_their_size_or_chunks():
    seen = []
    for size, chunk in ((4, 4), (4, 64), (32, 32)):
        data = make_batches(Windows(ROW, 15, phase=True, transform=noisy), size, seed=1)
        data.chunk = chunk
        seen.append(torch.cat([b.inputs[0] for b in data.epoch(3)]))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_what_is_drawn_changes_by_epoch_and_not_in_validation():
    data = make_batches(Windows(ROW, 15, transform=noisy), 16, shuffle=False)
    one, two, peek = (next(data.epoch(1)).inputs[0], next(data.epoch(2)).inputs[0], data.peek().inputs[0])
    assert not torch.equal(one, two) and torch.equal(peek.flatten(), torch.from_numpy(ROW[:240].astype(np.int64)))


def test_a_model_that_works_in_place_reaches_nothing():
    row = ROW.copy()
    data = make_batches(Windows(row.astype(np.int64), 15), 8)
    for batch in data.epoch(1):
        target = batch.target.clone()
        batch.inputs[0].zero_()
        assert torch.equal(batch.target, target)
    assert np.array_equal(row, ROW)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path, accumulate):
    whole = make(tmp_path / "whole", accumulate=accumulate)
    whole.fit(epochs=3)
    first = make(tmp_path / "parts", accumulate=accumulate, checkpoint_every=5)
    first.fit(steps=8)
    again = make(tmp_path / "parts", accumulate=accumulate, checkpoint_every=5)
    again.fit(epochs=3, resume=True)
    assert torch.equal(weights(whole), weights(again))


def test_changed_data_are_named(tmp_path):
    make(tmp_path / "run").fit(epochs=1)
    with pytest.raises(ValueError, match="train has other values"): make(tmp_path / "run", transform=None).fit(epochs=2, resume=True)
    train, valid = Windows(ROW[1:2501], 15, phase=True, transform=noisy), Windows(ROW[2500:], 15, whole=True)
    other = Trainer(Small(), train, valid, run=tmp_path / "run", loss=LOSS, lr=1e-2, batch_size=16, board=False, seed=3)
    with pytest.raises(ValueError, match="train has other values"): other.fit(epochs=2, resume=True)


def test_two_processes_see_what_one_sees(tmp_path):
    """Without dropout, whose draws belong to a process, the losses are the same; the data are in a file."""
    path = tmp_path / "row.bin"
    ROW.tofile(path)
    losses = []
    for processes in (None, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 10))
        row = np.memmap(path, np.uint8, "r")
        trainer = Trainer(model, Windows(row[:2500], 15, phase=True), Windows(row[2500:], 15, whole=True), board=False, run=False,
                          loss=LOSS, lr=1e-2, batch_size=16)
        losses.append(trainer.fit(epochs=2, **({"processes": processes} if processes else {})).epochs())
    assert losses[0].train_loss.tolist() == pytest.approx(losses[1].train_loss.tolist(), rel=1e-5)
    assert losses[0].valid_loss.tolist() == pytest.approx(losses[1].valid_loss.tolist(), rel=1e-5)


def test_the_loss_of_a_validation_is_the_mean_over_its_numbers():
    trainer = make()
    scores = {size: trainer.evaluate(Windows(ROW[2500:], 15, whole=True)) for size in (1,)}
    with torch.no_grad():
        trainer.model.eval()
        row = torch.from_numpy(ROW[2500:].astype(np.int64))
        exact = nn.functional.cross_entropy(trainer.model(row[None, :-1])[0], row[1:])  # this model looks at one number at a time
    assert scores[1]["loss"] == pytest.approx(float(exact), rel=1e-6)
    assert make(batch_size=7).evaluate(Windows(ROW[2500:], 15, whole=True))["loss"] == pytest.approx(float(exact), rel=1e-6)


def test_a_share_of_the_end_is_held_out():
    trainer = Trainer(Small(), Windows(ROW, 15, phase=True, transform=noisy), .1, loss=LOSS, board=False, run=False)
    train, valid = trainer.setup.train.data, trainer.setup.valid.data
    assert isinstance(trainer.setup.train, KeyedBatches) and np.shares_memory(train.values, ROW) and valid.whole and not valid.transform
    assert len(train.values) == 2700 and np.array_equal(valid.values, ROW[2700:])
    with pytest.raises(ValueError, match="shorter than one window"): make_batches_of_share(.001)
    with pytest.raises(ValueError, match="between 0 and 1"): make_batches_of_share(1.5)


def make_batches_of_share(share):
    return Trainer(Small(), Windows(ROW, 15), share, loss=LOSS, board=False, run=False)


def test_own_keyed_data_work_in_a_trainer():
    class Line(Keyed):
        def __len__(self): return 64
        def take(self, rows, key=0): return rows[:, None] / 64, rows / 32
        def __repr__(self): return "Line()"

    trainer = Trainer(nn.Linear(1, 1), Line(), .25, loss="mse", lr=.1, board=False, run=False)
    assert trainer.fit(epochs=30).epochs().valid_loss.iloc[-1] < .05 and len(trainer.setup.valid.data) == 16
    assert trainer.predict(torch.zeros(3, 1)).shape == (3, 1)


def test_checkup_diagnosis_and_finder_know_windows():
    trainer = make()
    found = trainer.checkup()
    assert found.passed and "int64 (16, 15)" in found["batch"].told and "10 classes" in found["target"].told
    assert trainer.lr_find() is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(epochs=2)
    assert json.dumps([f.code for f in trainer.diagnose()])


def test_settings_without_effect_are_told():
    with pytest.warns(UserWarning, match="workers has no effect: train is a Windows"): make(workers=2)


@pytest.mark.parametrize("made,told", [
    (lambda: Windows(np.arange(8), 8), "shorter than one window"), (lambda: Windows(np.zeros((9, 2)), 4), "one row of numbers"),
    (lambda: Windows(np.arange(50), 8, stride=9, whole=True), "would leave gaps"), (lambda: Windows(np.arange(9), 0), "length=0"),
    (lambda: Windows(np.arange(9), 4, whole=True, phase=True), "take one of them"),
    (lambda: Windows(np.arange(9.), 4, whole=True), "float64"),
    (lambda: make_batches(Windows(np.arange(9), 4), 32, drop_last=True), "fewer than one batch")])
def test_what_cannot_be_done_is_said(made, told):
    with pytest.raises(ValueError, match=told): made()
    with pytest.raises(TypeError, match="list"): Windows([1, 2, 3], 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_the_gpu():
    batch = next(make_batches(Windows(ROW, 15), 16, "cuda").epoch(1))
    assert batch.inputs[0].device.type == batch.target.device.type == "cuda" and torch.equal(
        batch.inputs[0].cpu(), next(make_batches(Windows(ROW, 15), 16).epoch(1)).inputs[0])
