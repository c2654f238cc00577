"""Any place in the data can be come back to: keyed data at no cost, foreign data by reading again; every comparison is to the bit."""
import random
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Subset, WeightedRandomSampler

from arc_nb.engine.batches import LoaderBatches, TensorBatches, hold_out, make_batches
from arc_nb.engine.randomness import random_state, seed_all, set_random_state

ROWS = 27


def noise() -> list[float]:
    "A number from each of the three generators, and a normal one, which numpy and Python draw in pairs."
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()),
            float(torch.rand(())), float(torch.randn(()))]


class Items(Dataset):
    "Items that are drawn at random in every way; it counts how many were read."
    def __init__(self, rows: int = ROWS): self.rows, self.read = rows, 0
    def __len__(self) -> int: return self.rows
    def __getitem__(self, k: int) -> tuple:
        self.read += 1
        return torch.tensor([k, *noise()], dtype=torch.float64), k


class Many(Items):
    "Gives a batch of items at once, as the data sets of Hugging Face do."
    def __getitems__(self, ks: list[int]) -> list[tuple]:
        self.read += len(ks)
        shared = noise()
        return [(torch.tensor([k, *shared, *noise()], dtype=torch.float64), k) for k in ks]


class Own(Items):
    "Draws from generators that it holds itself."
    def __init__(self, rows: int = ROWS):
        super().__init__(rows)
        self.a, self.b, self.c = np.random.default_rng(0), random.Random(0), torch.Generator().manual_seed(0)
    def __getitem__(self, k: int) -> tuple:
        return torch.tensor([k, self.a.random(), self.b.gauss(0, 1), float(torch.rand((), generator=self.c))]), k


class Stream(IterableDataset):
    "A stream that shuffles in a buffer, with torch's generator, the one that dropout draws from."
    def __init__(self, rows: int = ROWS): self.rows = rows
    def __iter__(self) -> Iterator[tuple]:
        worker, buffer = torch.utils.data.get_worker_info(), []
        share = range(worker.id if worker else 0, self.rows, worker.num_workers if worker else 1)
        for k in [*share, *[None] * 4]:
            if k is not None: buffer.append(k)
            if len(buffer) < 4 and k is not None: continue
            if not buffer: return
            picked = buffer.pop(int(torch.randint(len(buffer), ())))
            yield torch.tensor([picked, *noise()]), picked


class Anew:
    "Batches in an order that is drawn with numpy and Python at the beginning, noise in each."
    def __iter__(self) -> Iterator[tuple]:
        order = np.random.permutation(9).tolist()
        for k in order: yield torch.tensor([[k, *noise()]]), torch.tensor([order[k % 9] + random.randrange(9)])


class Held:
    "Batches drawn from a generator that the object holds."
    def __init__(self): self.rng = np.random.default_rng(1)
    def __iter__(self) -> Iterator[tuple]:
        for k in self.rng.permutation(9).tolist(): yield torch.tensor([[k, self.rng.random()]]), torch.tensor([k])


def once() -> Iterator[tuple]:
    "A generator that can be read only once; longer than two epochs of ten."
    order = list(range(40))
    random.shuffle(order)
    for k in order: yield torch.tensor([[k, random.random(), float(torch.rand(()))]]), torch.tensor([k])


def flat(batch: Any) -> list[float]:
    "All numbers of a batch."
    return [*batch.inputs[0].double().flatten().tolist(), *batch.target.double().flatten().tolist()]


def whole(batches: Any, number: int = 1, start: int = 0) -> list[list[float]]:
    return [flat(b) for b in batches.epoch(number, start)]


# --- Keyed -----------------------------------------------------------------------------------------------------------

X, Y = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0)), torch.arange(ROWS)
KEYED: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (X, Y), "dict": lambda: {"x": X, "y": Y}, "Dataset": Items, "__getitems__": Many,
    "Subset": lambda: Subset(Items(), list(range(20, 0, -1))), "Subset of __getitems__": lambda: Subset(Many(), list(range(20))),
    "Subset of a Subset": lambda: Subset(Subset(Items(), list(range(20))), list(range(15))), "held out": lambda: hold_out(Items(), 0.3)[0],
    "list of batches": lambda: [(X[i:i + 4], Y[i:i + 4]) for i in range(0, ROWS, 4)]}


def flat_any(batch: Any) -> list[float]:
    if isinstance(batch.inputs, dict): batch = batch._replace(inputs=tuple(batch.inputs.values()))
    return flat(batch)


@pytest.mark.parametrize("form", KEYED)
def test_any_place_in_keyed_data_can_be_entered(form):
    def made() -> Any: return make_batches(KEYED[form](), 4, seed=5)
    batches = made()
    assert batches.keyed and batches.state_dict() == {}
    for number in (1, 3):
        seed_all(number)
        full = [flat_any(b) for b in batches.epoch(number)]
        for start in range(len(batches) + 1):
            fresh = made()
            fresh.load_state_dict({})
            seed_all(99)
            assert [flat_any(b) for b in fresh.epoch(number, start)] == full[start:]
            assert fresh.drawn == len(full) - start
    assert batches.drawn == 2 * len(full)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("data", [Items, Many, lambda: Subset(Items(), list(range(20)))], ids=["Dataset", "__getitems__", "Subset"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_items_and_order_are_the_same_for_any_number_of_workers(data, drop_last):
    alone = whole(make_batches(data(), 4, drop_last=drop_last), 2)
    for workers in (0, 2, 3):
        seed_all(workers)
        for start in (0, 3):
            batches = make_batches(data(), 4, drop_last=drop_last, workers=workers)
            assert whole(batches, 2, start) == alone[start:]


def test_items_differ_by_epoch_seed_and_index():
    def drawn(seed: int, number: int) -> dict[float, tuple]:
        return {row[0]: tuple(row[1:]) for b in make_batches(Items(), 4, seed=seed).epoch(number) for row in b.inputs[0].tolist()}
    found = [drawn(0, 1), drawn(0, 2), drawn(1, 1)]
    values = [v for numbers in found for row in numbers.values() for v in row]
    assert len(set(values)) == len(values) == 3 * ROWS * 6
    assert drawn(0, 1) == found[0]


@pytest.mark.parametrize("data", [Items, Many])
def test_skipping_reads_nothing(data):
    for start, items in ((0, 400), (99, 4), (100, 0)):
        rows = data(400)
        batches = make_batches(rows, 4)
        assert len(list(batches.epoch(2, start))) == 100 - start
        assert rows.read == items


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", [Items, Many, Own, lambda: (X, Y)], ids=["Dataset", "__getitems__", "own generator", "tensors"])
def test_our_loaders_leave_the_generators_of_the_process_alone(data, workers):
    seed_all(3)
    np.random.randn(); random.gauss(0, 1)  # the second of each pair is kept, and has to come next
    before = random_state()
    expected = noise()
    set_random_state(before)
    batches = make_batches(data(), 4, workers=workers)
    batches.peek()
    for k, _ in enumerate(batches.epoch(1)):
        if k == 2: break
    list(batches.epoch(2))
    assert noise() == expected


def test_an_item_that_raises_leaves_them_alone_too():
    class Broken(Items):
        def __getitem__(self, k: int) -> tuple:
            noise()
            raise KeyError("no such picture")
    seed_all(3)
    expected = noise()
    seed_all(3)
    with pytest.raises(KeyError, match="picture"): next(make_batches(Broken(), 4).epoch(1))
    assert noise() == expected


def test_evaluation_data_are_the_same_every_time():
    batches = make_batches(Items(), 4, shuffle=False)
    assert whole(batches) == whole(batches)
    loader = make_batches(DataLoader(Stream(), 4), 4)
    seed_all(0); first = [row[0] for row in whole(loader)]
    torch.rand(5)
    assert [row[0] for row in whole(loader)] == first


# --- Read again ------------------------------------------------------------------------------------------------------

def shuffled(**options: Any) -> DataLoader: return DataLoader(Items(), 4, shuffle=True, **options)


def seeded(**options: Any) -> DataLoader: return shuffled(generator=torch.Generator().manual_seed(7), **options)


def sampled(**options: Any) -> DataLoader:
    "Two samplers with a generator of their own, one that is drawn from as it goes."
    return DataLoader(Items(), 4, sampler=RandomSampler(Items(), True, 200, torch.Generator().manual_seed(2)), **options)


def weighed() -> DataLoader:
    return DataLoader(Items(), 4, sampler=WeightedRandomSampler([1.0] * 9 + [5.0] * 18, 30, generator=torch.Generator().manual_seed(2)))


FOREIGN: dict[str, Callable[[], Any]] = {
    "DataLoader": shuffled, "DataLoader with generator": seeded, "workers": lambda: shuffled(num_workers=2),
    "workers with generator": lambda: seeded(num_workers=2), "replacement": sampled, "replacement, workers": lambda: sampled(num_workers=2),
    "weighted sampler": weighed, "DataLoader over own generators": lambda: DataLoader(Own(), 4, shuffle=True),
    "own generators, workers": lambda: DataLoader(Own(), 4, shuffle=True, num_workers=2),
    "object with __iter__": Anew, "object that holds a generator": Held, "IterableDataset": Stream,
    "IterableDataset in a DataLoader": lambda: DataLoader(Stream(), 4),
    "IterableDataset, workers": lambda: DataLoader(Stream(), 4, num_workers=2),
    "its own generators, a Dataset": Own, "generator": once}


class Run:
    "Trains as the loop does: draws a batch, lets the model draw (dropout), counts; `seen` is all of it."
    def __init__(self, data: Any, seed: int):
        self.batches = make_batches(data, 4, seed=5)
        seed_all(5); self.batches.peek()  # as the Trainer does, seeded
        seed_all(seed)
        self.seen: list[list[float]] = []

    def epoch(self, number: int, start: int = 0, stop: int | None = None, reading: Any = None) -> None:
        reading = reading or self.batches.epoch(number, start)
        for batch in islice(reading, None if stop is None else stop - start):
            self.seen.append([*flat(batch), *torch.rand(3).tolist()])

    def save(self) -> tuple[dict, dict, int]: return self.batches.state_dict(), random_state(), len(self.seen)


def stopped(data: Any, at: tuple[int, int], length: int | None) -> tuple[list, tuple[dict, dict, int]]:
    "All of an uninterrupted run over three epochs, and what a checkpoint held at (epoch, batches)."
    run, saved = Run(data, seed=1), None
    for number in (1, 2, 3):
        reading = run.batches.epoch(number)
        if number == at[0]:
            run.epoch(number, 0, at[1], reading)
            saved = run.save()
            run.epoch(number, at[1], length, reading)
        else: run.epoch(number, 0, length, reading)
    assert saved
    return run.seen, saved


def resumed(data: Any, at: tuple[int, int], length: int | None, saved: tuple[dict, dict, int],
            load: bool = True, restore: bool = True) -> list:
    "What a new process sees from there on."
    run, (state, generators, _) = Run(data, seed=77), saved
    if load: run.batches.load_state_dict(state)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        reading = run.batches.epoch(*at)
    told = [str(w.message) for w in told]
    again = at[1] or (isinstance(data, Iterator) and at != (1, 0))
    assert run.batches.keyed or bool(told) == bool(again), told
    if told: assert told[0].startswith("train is a ") and "read again" in told[0] and "Dataset" in told[0]
    if restore: set_random_state(generators)
    run.epoch(*at, length, reading)
    for number in range(at[0] + 1, 4): run.epoch(number, 0, length)
    return run.seen


@pytest.mark.parametrize("at", [(1, 0), (1, 3), (2, 0), (2, 1), (2, 4), (3, 6)], ids=str)
@pytest.mark.parametrize("form", FOREIGN)
def test_foreign_data_come_back_to_the_bit(form, at):
    seen, saved = stopped(FOREIGN[form](), at, 6)
    assert len(seen) == 18
    assert resumed(FOREIGN[form](), at, 6, saved) == seen[saved[2]:]


@pytest.mark.parametrize("form", [f for f in FOREIGN if f != "generator"])
def test_epochs_that_are_read_to_their_end(form):
    seen, saved = stopped(FOREIGN[form](), (2, 4), None)
    assert resumed(FOREIGN[form](), (2, 4), None, saved) == seen[saved[2]:]


@pytest.mark.parametrize("form, length", [(f, n) for f in FOREIGN for n in (6, None) if n or f != "generator"])
def test_a_checkpoint_between_two_epochs(form, length):
    "Saved after an epoch has ended, loaded for the next."
    run = Run(FOREIGN[form](), 1)
    run.epoch(1, 0, length)
    saved = run.save()
    run.epoch(2, 0, length); run.epoch(3, 0, length)
    again = Run(FOREIGN[form](), 77)
    again.batches.load_state_dict(saved[0])
    with warnings.catch_warnings(action="ignore"): reading = again.batches.epoch(2)
    set_random_state(saved[1])
    again.epoch(2, 0, length, reading); again.epoch(3, 0, length)
    assert again.seen == run.seen[saved[2]:]


@pytest.mark.parametrize("form", ["DataLoader", "DataLoader with generator", "weighted sampler", "object with __iter__", "IterableDataset",
                                  "DataLoader over own generators", "generator"])
def test_without_the_states_the_comparison_fails(form):
    "The negative control: each half of what is saved is needed."
    at = (2, 3)
    seen, saved = stopped(FOREIGN[form](), at, 6)
    assert resumed(FOREIGN[form](), at, 6, saved, restore=False) != seen[saved[2]:]
    if form not in ("DataLoader", "IterableDataset"):  # whose order is keyed
        assert resumed(FOREIGN[form](), at, 6, saved, load=False) != seen[saved[2]:]


def test_what_was_resumed_can_be_resumed_again():
    seen, saved = stopped(seeded(), (2, 2), 6)
    run = Run(seeded(), 77)
    run.batches.load_state_dict(saved[0])
    with pytest.warns(UserWarning, match="first 2 batches"): reading = run.batches.epoch(2, 2)
    set_random_state(saved[1])
    run.epoch(2, 2, 4, reading)
    later = run.save()
    assert resumed(seeded(), (2, 4), 6, later) == seen[saved[2] + 2:]


def test_the_way_back_leaves_the_generators_of_the_process_alone():
    _, saved = stopped(Anew(), (2, 3), 6)
    run = Run(Anew(), 77)
    run.batches.load_state_dict(saved[0])
    expected, before = noise(), seed_all(77)
    assert before is None
    with pytest.warns(UserWarning, match="read again"): run.batches.epoch(2, 3)
    assert noise() == expected


def test_persistent_workers_are_named():
    def made() -> LoaderBatches: return make_batches(shuffled(num_workers=2, persistent_workers=True), 4)
    run = made()
    next(run.epoch(1)); state = run.state_dict()
    again = made()
    again.load_state_dict(state)
    with pytest.warns(UserWarning, match="persistent_workers=True keep their generators"): again.epoch(2)
    again.load_state_dict(state)
    with pytest.warns(UserWarning) as told: again.epoch(1, 1)
    assert any("persistent_workers" in str(w.message) for w in told) and any("read again" in str(w.message) for w in told)
    fresh = made()
    fresh.load_state_dict(state)
    with pytest.warns(UserWarning) as told: fresh.epoch(1, 1)  # of new workers, in their first epoch
    assert not any("persistent_workers" in str(w.message) for w in told)


def test_persistent_workers_in_their_first_epoch_come_back_to_the_bit():
    def made() -> LoaderBatches: return make_batches(shuffled(num_workers=2, persistent_workers=True), 4)
    run = made()
    reading = run.epoch(1)
    for _ in range(3): next(reading)
    state, rest = run.state_dict(), [flat(b) for b in reading]
    again = made()
    again.load_state_dict(state)
    with pytest.warns(UserWarning, match="read again"): assert whole(again, 1, 3) == rest


def test_generators_inside_workers_of_ours_are_named():
    run = make_batches(Own(), 4, workers=2)
    with pytest.warns(UserWarning, match="holds a generator of its own"): run.epoch(1, 2)


def test_an_iterator_read_beyond_the_place_or_too_short_is_refused():
    run = make_batches(once(), 4)
    reading = run.epoch(1)
    for _ in range(3): next(reading)
    state = run.state_dict()
    next(reading)
    run.load_state_dict(state)
    with pytest.raises(ValueError, match="only once: 4 batches have been read, and the run is to go on after 3; make it anew"):
        run.epoch(1, 3)
    short = make_batches(islice(once(), 2), 4)
    short.load_state_dict(state)
    with pytest.raises(ValueError, match="ended after 2 batches"), pytest.warns(UserWarning): short.epoch(1, 3)
    fewer = make_batches(DataLoader(Items(8), 4), 4)
    with pytest.raises(ValueError, match="ended after 2 batches"), pytest.warns(UserWarning): fewer.epoch(1, 3)


def test_the_states_are_plain_types_and_arrays():
    def check(value: Any) -> None:
        if isinstance(value, dict): [check(v) for v in (*value, *value.values())]
        elif isinstance(value, (list, tuple)): [check(v) for v in value]
        else: assert value is None or type(value) in (bool, int, float, str) or isinstance(value, (torch.Tensor, np.ndarray)), type(value)
    for form in FOREIGN:
        run = make_batches(FOREIGN[form](), 4)
        check(run.state_dict())
        next(run.epoch(1))
        check(run.state_dict())


def test_what_is_drawn_is_counted_on_the_way_back_too():
    run = make_batches(seeded(), 4)
    next(run.epoch(1))
    assert run.drawn == 1
    with pytest.warns(UserWarning): reading = run.epoch(1, 3)
    assert run.drawn == 4
    next(reading)
    assert run.drawn == 5
    assert isinstance(make_batches((X, Y), 4), TensorBatches)
