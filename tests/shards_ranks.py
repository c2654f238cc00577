"""What two ranks do for test_sharded.py: many cases in one pair of processes, since starting a pair takes seconds."""
import copy
import errno
import json
import os
import pickle
import shutil
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from arc_nb.engine.checkpoint import listed, read_checkpoint, sealed, verify, write_checkpoint
from arc_nb.engine.gathered import full, likeness, offered, optimizer_state, put_whole, spread, whole_state
from arc_nb.engine.ranks import ALONE, join
from arc_nb.engine.sharded import ShardedSaver, each, newest_together, read_together, verify_together

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own: its import scripts functions
    from torch.distributed.optim import ZeroRedundancyOptimizer

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp")


class Net(nn.Module):
    "Tied weights, buffers, a frozen layer, a layer that is not used, and parameters too small for two."
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.norm, self.frozen = nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.frozen.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("hidden", torch.arange(3.), persistent=False)
        self.to(dtype)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks: x = torch.tanh(block(x))
        return self.head(self.norm(self.frozen(x)) * self.scale)


def groups(model):
    "Two groups with settings of their own, the frozen layer in one of them."
    small = [p for p in model.parameters() if p.ndim == 1]
    large = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": large, "weight_decay": 0.1}, {"params": small, "lr": 0.05, "betas": (0.8, 0.9)}]


def made(strategy, seed=0, dtype=torch.float32):
    "What a step calls, the model itself, and its optimizer."
    torch.manual_seed(seed)
    model = Net(dtype)
    adamw = lambda: torch.optim.AdamW(groups(model), lr=0.01)
    if strategy == "alone": return model, model, adamw()
    if strategy == "ddp": return DistributedDataParallel(model), model, adamw()
    if strategy == "zero1": return DistributedDataParallel(model), model, zero(model)
    for block in model.blocks: fully_shard(block, reshard_after_forward=strategy == "fsdp")
    fully_shard(model, reshard_after_forward=strategy == "fsdp")
    return model, model, adamw()


def zero(model):
    "AdamW whose state is divided by parameters."
    return ZeroRedundancyOptimizer(groups(model), torch.optim.AdamW, lr=0.01)


def train(wrapped, optimizer, steps=3):
    "The same rows on every rank, so that the mean gradient is that of one process."
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randint(0, 7, (8,), generator=generator)
        optimizer.zero_grad()
        wrapped(x).float().square().mean().backward()
        optimizer.step()


def same(a, b, close=0.0):
    "Whether two nests are equal; tensors to the bit, or nearly."
    if isinstance(a, torch.Tensor):
        if not (isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype): return False
        return torch.allclose(a.float(), b.float(), atol=close, rtol=0) if close else a.equal(b)
    if isinstance(a, dict): return isinstance(b, dict) and a.keys() == b.keys() and all(same(v, b[k], close) for k, v in a.items())
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(same(v, w, close) for v, w in zip(a, b))
    return a == b


def plain(state):
    "Whether no DTensor is left in it, and all lies on the CPU."
    if isinstance(state, dict): return all(map(plain, state.values()))
    if isinstance(state, (list, tuple)): return all(map(plain, state))
    return not isinstance(state, DTensor) and (not isinstance(state, torch.Tensor) or state.device.type == "cpu")


def alone(steps=3):
    "What one process knows after the same steps."
    wrapped, model, optimizer = made("alone")
    train(wrapped, optimizer, steps)
    return copy.deepcopy({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()})


def whole_is_that_of_one_process(strategy, ranks, folder, steps=3):
    wrapped, model, optimizer = made(strategy)
    train(wrapped, optimizer, steps)
    state = whole_state(model, optimizer, ranks)
    assert (state is None) == (ranks.rank > 0)
    if not ranks.first: return
    one = alone(steps)
    assert plain(state) and same(state, one, 1e-5), strategy
    assert state["model"]["embed.weight"] is state["model"]["head.weight"]
    fresh, model, optimizer = made("alone", 1)
    model.load_state_dict(state["model"]); optimizer.load_state_dict(state["optimizer"])
    train(fresh, optimizer, 1)


def before_the_first_step_there_is_no_optimizer_state(strategy, ranks, folder):
    whole_is_that_of_one_process(strategy, ranks, folder, 0)


def put_is_the_reverse(strategy, ranks, folder):
    "From each strategy into each other one, and what comes back is the same to the bit."
    wrapped, model, optimizer = made(strategy)
    train(wrapped, optimizer)
    for group in optimizer.param_groups: group["lr"] *= 0.5
    state = copy.deepcopy(whole_state(model, optimizer, ranks))
    for other in STRATEGIES:
        wrapped, model, optimizer = made(other, seed=5)
        train(wrapped, optimizer, 1)
        put_whole(model, optimizer, copy.deepcopy(state), ranks)
        back = whole_state(model, optimizer, ranks)
        if ranks.first: assert same(back, state), (strategy, other)
        train(wrapped, optimizer, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.025]


def bf16_and_other_types_travel(ranks, folder):
    wrapped, model, optimizer = made("fsdp", dtype=torch.bfloat16)
    train(wrapped, optimizer, 1)
    state = whole_state(model, optimizer, ranks)
    if ranks.first: assert state["model"]["blocks.0.weight"].dtype == state["optimizer"]["state"][0]["exp_avg"].dtype == torch.bfloat16
    kept = copy.deepcopy(state)
    put_whole(model, optimizer, state, ranks)
    again = whole_state(model, optimizer, ranks)
    assert same(again, kept)
    nest = {"u8": torch.arange(5, dtype=torch.uint8), "b": torch.tensor(True), "none": torch.empty(0, 3), "c": torch.tensor([1 + 2j]),
            "f8": torch.ones(3).to(torch.float8_e4m3fn),
            "turned": torch.arange(6).view(2, 3).T, "inf": float("inf"), "t": (1, [2, None], {3: "x"})}
    found = spread(lambda: nest, likeness(model, optimizer), ranks)
    assert same({k: v for k, v in found.items() if k != "f8"}, {k: v for k, v in nest.items() if k != "f8"})
    assert found["f8"].float().equal(nest["f8"].float())


def callbacks_state_may_be_divided(ranks, folder):
    "An average on every rank, and a callback that only rank 0 has before it, so that the paths differ."
    wrapped, model, optimizer = made("fsdp")
    average = {name: value.detach().clone() for name, value in model.state_dict().items() if value.is_floating_point()}
    others = [{"name": "EarlyStopping", "state": {"best": 0.5}}] if ranks.first else []
    state = {"callbacks": [*others, {"name": "EMA", "state": {"average": average, "twice": average["embed.weight"]}}]}
    found = full(state, ranks)
    if ranks.first:
        inside = found["callbacks"][1]["state"]
        assert plain(found) and found["callbacks"][0]["state"]["best"] == 0.5
        assert inside["average"]["embed.weight"] is inside["twice"]
    back = spread(lambda: found, likeness(model, optimizer), ranks)
    assert all(isinstance(back["callbacks"][1]["state"]["average"][name], DTensor) for name, _ in model.named_parameters())
    saver = ShardedSaver(folder, ranks)
    saver.save({"model": model.state_dict(), **state}, {"step": 1}); saver.wait()
    assert saver.take_error() is None
    read, _ = read_together(saver.latest, model, optimizer, ranks)
    mine = read["callbacks"][1]["state"]["average"]
    assert mine["blocks.0.weight"].to_local().equal(average["blocks.0.weight"].to_local())
    assert read["callbacks"][0]["name"] == "EarlyStopping"
    one, _ = read_checkpoint(saver.latest)
    if ranks.first: assert same(one["callbacks"], found["callbacks"])


def raised(make, kind, *args):
    "What it says."
    try: make(*args)
    except kind as error: return str(error)
    raise AssertionError(f"no {kind.__name__}")


def what_differs_is_an_error_on_all(ranks, folder):
    model = made("fsdp")[1]
    extra = {"extra": model.scale.detach().clone()} if ranks.first else {}
    said = raised(lambda: full({"model": model.state_dict(), **extra}, ranks), ValueError)
    assert "rank 1 has" in said and "rank 0 also has extra" in said and "everywhere = True" in said
    odd = {"other": model.blocks[0].weight if ranks.first else model.embed.weight}
    assert "rank 1 has other (7, 6)" in raised(lambda: full(odd, ranks), ValueError)
    for culprit in (0, 1):
        bad = {"callbacks": [print if ranks.rank == culprit else 1]}
        said = raised(full, TypeError, bad, ranks)
        assert "callbacks.0 is a builtin_function_or_method: a file holds" in said and f"(rank {culprit})" in said
        saver = ShardedSaver(folder, ranks)
        assert "callbacks.0" in raised(saver.save, TypeError, {"model": model.state_dict(), **bad}, {"step": 1}) and not saver.busy
        saver.follow({"model": model.state_dict(), **bad})
        assert isinstance(saver.take_error(), TypeError)
        if ranks.rank == culprit: raised(saver.check, TypeError, bad)
        else: saver.check(bad)
    raised(lambda: saver.save({"model": {}}, {"step": 1, "bad": print} if ranks.first else {}), TypeError)
    raised(lambda: put_whole(*made("fsdp")[1:], None, ranks), ValueError)
    wrong = {"model": {"scale": torch.ones(2)}, "optimizer": {}}
    assert "size mismatch" in raised(lambda: put_whole(*made("fsdp")[1:], wrong, ranks), RuntimeError)
    assert raised(lambda: each(ranks, lambda: 1 / (1 - ranks.rank)), ZeroDivisionError)
    assert each(ranks, lambda: ranks.rank) == [0, 1]


def saved(strategy, ranks, folder, steps=3, at=3):
    "A training, and the checkpoint that it has written."
    wrapped, model, optimizer = made(strategy)
    train(wrapped, optimizer, steps)
    saver = ShardedSaver(folder, ranks, last=5)
    saver.save({"step": at, "optimizer": optimizer.state_dict(), "model": model.state_dict(), "random": {"rank0": torch.arange(3)}},
               {"step": at, "monitors": {"valid_loss": 0.5}})
    saver.wait()
    error = saver.take_error()
    if error: raise error
    return wrapped, model, optimizer, saver


def what_is_written_is_read(ranks, folder):
    "By one process, by these ranks, and it goes on to the bit as if nothing had been."
    wrapped, model, optimizer, saver = saved("fsdp", ranks, folder)
    path = saver.latest
    assert path.name == "step-00000003" and {"__0_0.distcp", "__1_0.distcp", ".metadata"} < verify(path)["files"].keys()
    now = copy.deepcopy(whole_state(model, optimizer, ranks))
    state, metadata = read_checkpoint(path)  # each rank by itself, as one process would
    assert plain(state) and metadata["monitors"] == {"valid_loss": 0.5} and state["random"]["rank0"].equal(torch.arange(3))
    assert state["model"]["head.weight"] is state["model"]["embed.weight"]
    if ranks.first: assert same({k: state[k] for k in now}, now)
    train(wrapped, optimizer, 2)
    went = copy.deepcopy(whole_state(model, optimizer, ranks))
    for strategy in STRATEGIES:
        wrapped, model, optimizer = made(strategy, 7)
        found, told = read_together(path, model, optimizer, ranks)
        divided = isinstance(found["model"]["blocks.0.weight"], DTensor)
        assert divided == (strategy in ("zero2", "fsdp")) and told == metadata and found["step"] == 3
        model.load_state_dict(found["model"]); optimizer.load_state_dict(found["optimizer"])
        again = whole_state(model, optimizer, ranks)
        if ranks.first: assert same(again, now), strategy
        train(wrapped, optimizer, 2)
        again = whole_state(model, optimizer, ranks)
        if ranks.first: assert same(again, went, 0 if strategy in ("zero2", "fsdp") else 1e-6), strategy


def one_process_wrote_it(ranks, folder):
    "A checkpoint of a single process, and a single file, come to many ranks."
    one = alone()
    path = ranks.share(lambda: write_checkpoint(folder, {**one, "step": 3}, {"step": 3}))
    for strategy in STRATEGIES:
        wrapped, model, optimizer = made(strategy, 7)
        state, metadata = read_together(path, model, optimizer, ranks)
        model.load_state_dict(state["model"]); optimizer.load_state_dict(state["optimizer"])
        again = whole_state(model, optimizer, ranks)
        assert metadata["step"] == state["step"] == 3
        if ranks.first: assert same(again, one), strategy
        train(wrapped, optimizer, 1)
    said = raised(lambda: read_together(Path(folder) / "nothing", model, optimizer, ranks), FileNotFoundError)
    assert "there is no checkpoint" in said


def damage_is_found_by_all(ranks, folder):
    *_, saver = saved("fsdp", ranks, folder, 1, at=1)
    older = saver.latest
    model, optimizer, newer = [*saved("fsdp", ranks, folder, 1, at=2)[1:3], None]
    newer = listed(folder)[0]
    for name in sorted(verify(newer)["files"]):
        ranks.barrier()
        if ranks.first:
            data = bytearray((newer / name).read_bytes()); data[len(data) // 2] ^= 1; (newer / name).write_bytes(data)
        ranks.barrier()
        said = raised(lambda: read_together(newer, model, optimizer, ranks), ValueError)
        assert str(newer / name) in said
        assert name in raised(lambda: read_checkpoint(newer), ValueError)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert newest_together(folder, ranks) == older
        assert len(caught) == (1 if ranks.first else 0), caught
        ranks.barrier()
        if ranks.first: data[len(data) // 2] ^= 1; (newer / name).write_bytes(data)
        ranks.barrier()
    assert newest_together(folder, ranks) == newer and newest_together(Path(folder) / "none", ranks) is None


class Code:
    "A pickle that leaves a file behind when it is read."
    def __init__(self, file): self.file = str(file)
    def __reduce__(self): return os.mkdir, (self.file,)


def reseal(path):
    "A manifest that fits what is in the folder."
    import hashlib
    manifest = json.loads((path / "manifest.json").read_bytes())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(sealed(manifest))


def forged(path, mark):
    "Lists of pieces that are not what was written, and what is said of each."
    listing = pickle.loads((path / ".metadata").read_bytes())
    def with_(change):
        other = copy.deepcopy(listing); change(other); return other
    first = next(iter(listing.state_dict_metadata))
    def elsewhere(one): next(iter(one.storage_data.values())).relative_path = "../../secret"
    def huge(one):
        entry = one.state_dict_metadata[first]
        entry.size = entry.chunks[0].sizes = torch.Size([10**7])
    def hole(one): one.state_dict_metadata["model.embed.weight"].chunks.pop()
    def bytes_(one):
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata
        one.state_dict_metadata[first] = BytesStorageMetadata()
    return {"asks for posix.mkdir": Code(mark), "asks for \\['../../secret'\\]": with_(elsewhere), "asks for more bytes": with_(huge),
            "numbers, and": with_(hole), "no list of shards": [1, 2], "BytesStorageMetadata": with_(bytes_), "no list of shards: ": b""}


def crafted_lists_are_refused(ranks, folder):
    import re
    model, optimizer, saver = saved("fsdp", ranks, folder, 1)[1:]
    mark = Path(folder) / "ran"
    lists = forged(saver.latest, mark)
    for number, (said, listing) in enumerate(lists.items()):
        path = Path(folder) / f"forged-{number}"
        if ranks.first:
            shutil.copytree(saver.latest, path)
            (path / ".metadata").write_bytes(pickle.dumps(listing) if listing != b"" else b"nonsense")
        ranks.barrier()
        for read in ((read_checkpoint, ValueError, path), (read_together, ValueError, path, model, optimizer, ranks)):
            assert "is damaged" in raised(*read)  # unread: it does not fit the manifest
        assert "is damaged" in raised(read_checkpoint, ValueError, path, "cpu", True)  # nor where somebody says that it was verified
        ranks.barrier()
        if ranks.first: reseal(path)
        ranks.barrier()
        verify(path)
        for read in ((read_checkpoint, ValueError, path), (read_together, ValueError, path, model, optimizer, ranks)):
            told = raised(*read)
            assert re.search(said, told), (said, told)
    assert not mark.exists()


def a_rank_that_cannot_write(ranks, folder):
    "Its error comes on all ranks; what was there before stays, nothing half-made is left, and the next save works."
    wrapped, model, optimizer, saver = saved("fsdp", ranks, folder, 1, at=1)
    before, write = saver.latest, FileSystemWriter.write_data
    state = lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    def full_disk(self, *args): raise OSError(errno.ENOSPC, "No space left on device")
    for culprit in (0, 1):
        if ranks.rank == culprit: FileSystemWriter.write_data = full_disk
        saver.save(state(), {"step": 2}); saver.wait()
        FileSystemWriter.write_data = write
        error = saver.take_error()
        assert isinstance(error, OSError) and error.errno == errno.ENOSPC and f"(rank {culprit} could not write" in str(error.__notes__)
        ranks.barrier()
        assert saver.latest == before and verify(before) and [p.name for p in Path(folder).iterdir()] == [before.name]
        ranks.barrier()
    saver.save(state(), {"step": 2}); saver.wait()
    assert saver.take_error() is None and saver.latest.name == "step-00000002"
    ranks.barrier()
    if ranks.first: shutil.move(folder, f"{folder}-away"); Path(folder).touch()  # rank 0 cannot make the folder
    ranks.barrier()
    saver.save(state(), {"step": 3}); saver.wait()
    assert isinstance(saver.take_error(), OSError)


def training_goes_on_meanwhile(ranks, folder):
    "Saves at every second step while the ranks talk to each other for training; each checkpoint is of one moment."
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    for layer in model: fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    saver = ShardedSaver(folder, ranks, last=None, best=0)
    for step in range(1, 41):
        with torch.no_grad():
            for p in model.parameters(): p.to_local().fill_(float(step))
        model(torch.ones(4, 64)).mean().backward(); optimizer.step(); optimizer.zero_grad()
        if step % 2 == 0: saver.save({"model": model.state_dict(), "step": step}, {"step": step} if ranks.first else {})
    saver.wait()
    assert saver.take_error() is None and len(listed(folder)) == 20
    for path in listed(folder):
        state, metadata = read_checkpoint(path)
        assert all((w == state["step"]).all() for w in state["model"].values()) and metadata["step"] == state["step"]
    few = ShardedSaver(folder, ranks, last=2, best=1, compress=True)
    few.save({"model": model.state_dict(), "more": torch.zeros(1000)}, {"step": 41, "monitors": {"valid_loss": 0.1}}); few.wait()
    ranks.barrier()
    assert few.take_error() is None and [p.name for p in listed(folder)] == ["step-00000041", "step-00000040"]
    assert read_checkpoint(few.latest)[0]["more"].equal(torch.zeros(1000)) and few.stalled <= few.seconds


def peak(work):
    "By how many MB the process grew at most meanwhile."
    lines = lambda: Path("/proc/self/status").read_text().splitlines()
    at = lambda word: next(int(line.split()[1]) / 1024 for line in lines() if line.startswith(word))
    Path("/proc/self/clear_refs").write_text("5")
    before = at("VmRSS")
    kept = work()
    return at("VmHWM") - before, kept


def the_others_hold_no_second_copy(ranks, folder):
    "128 MB of weights: rank 1 holds half of that, and needs little more to hand it over, or to take it."
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 1024, bias=False) for _ in range(16)))
    for layer in model: fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters())
    gathering, state = peak(lambda: whole_state(model, optimizer, ranks))
    spreading, _ = peak(lambda: put_whole(model, optimizer, state, ranks))
    if ranks.first: assert gathering > 100, gathering
    else: assert gathering < 64 and spreading < 144, (gathering, spreading)  # what it keeps meanwhile is its own half
    return f"rank {ranks.rank}: {gathering:.0f} MB to gather 128 MB, {spreading:.0f} MB to spread them"


def zero_state_has_its_owner(ranks, folder):
    "ZeRO-1: each rank takes the state of its own parameters, and others' never arrive."
    wrapped, model, optimizer = made("zero1")
    train(wrapped, optimizer)
    state = whole_state(model, optimizer, ranks)
    ours = {id(p) for g in optimizer.optim.param_groups for p in g["params"]}
    put_whole(model, optimizer, state, ranks)
    assert {id(p) for p in optimizer.optim.state} <= ours
    counts = ranks.gather(len(optimizer.optim.state))
    assert sum(counts) == len([p for p in model.parameters() if p.requires_grad]) and min(counts) > 0
    assert optimizer_state(made("ddp")[2], ranks)["state"] == {}


def cut_within_layers(ranks, folder):
    "Tensor parallelism, alone and with FSDP over it: columns, rows, and tensors that every rank has."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    def build(sizes, seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3), nn.LayerNorm(3))
        if sizes:
            mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp"))
            parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
            if sizes[0] > 1: fully_shard(model, mesh=mesh["dp"])
        return model, torch.optim.AdamW(model.parameters(), foreach=False)
    def step(model, optimizer):
        optimizer.zero_grad(); model(torch.ones(4, 6)).square().sum().backward(); optimizer.step()
    one, its = build(None, 0)
    step(one, its)
    plainly = copy.deepcopy({"model": dict(one.state_dict()), "optimizer": its.state_dict()})
    for sizes in ((1, 2), (2, 1)):
        model, optimizer = build(sizes, 0)
        step(model, optimizer)
        state = copy.deepcopy(whole_state(model, optimizer, ranks))
        if ranks.first: assert same(state, plainly, 1e-5), sizes
        saver = ShardedSaver(f"{folder}-{sizes[0]}", ranks)
        saver.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, {"step": 1}); saver.wait()
        error = saver.take_error()
        assert error is None, error
        if ranks.first: assert same(read_checkpoint(saver.latest)[0], state), sizes
        other, its = build(sizes, 1)
        found, _ = read_together(saver.latest, other, its, ranks)
        other.load_state_dict(found["model"]); its.load_state_dict(found["optimizer"])
        again = whole_state(other, its, ranks)
        assert same(again, state), sizes
        put_whole(other, its, state, ranks)
        step(other, its)


def kept_for_one_process(ranks, folder):
    "What test_sharded.py then reads in a process of its own, and another number of ranks."
    model, optimizer = saved("fsdp", ranks, folder)[1:3]
    state = whole_state(model, optimizer, ranks)
    if ranks.first: torch.save(state, f"{folder}.whole")


def per_strategy(case):
    "The case for each strategy."
    return {f"{case.__name__}[{strategy}]": (lambda ranks, folder, s=strategy: case(s, ranks, folder)) for strategy in STRATEGIES}


ONCE = (bf16_and_other_types_travel, callbacks_state_may_be_divided, what_differs_is_an_error_on_all, what_is_written_is_read,
        one_process_wrote_it, damage_is_found_by_all, crafted_lists_are_refused, a_rank_that_cannot_write, training_goes_on_meanwhile,
        the_others_hold_no_second_copy, zero_state_has_its_owner, cut_within_layers, kept_for_one_process)
CASES = {**per_strategy(whole_is_that_of_one_process), **per_strategy(before_the_first_step_there_is_no_optimizer_state),
         **per_strategy(put_is_the_reverse), **{case.__name__: case for case in ONCE}}


def begin(rank, world, port_file):
    "The ranks, on a process group that gives up after a while."
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    if not dist.is_initialized():  # launched ranks have one
        store = dist.FileStore(port_file, world)
        dist.init_process_group("gloo", rank=rank, world_size=world, store=store, timeout=timedelta(seconds=20))
    return join("cpu") if world > 1 else ALONE


def launched(work, world, home):
    "What a launched rank does."
    work(int(os.environ["RANK"]), world, home)


def run_cases(rank, world, home):
    "Runs every case, and writes down what each said."
    ranks, table = begin(rank, world, f"{home}/store"), {}
    for number, (name, case) in enumerate(CASES.items()):
        folder = Path(home) / f"{number}" / "checkpoints"
        if ranks.first: folder.parent.mkdir()
        ranks.barrier()
        began = time.monotonic()
        try: said, error = case(ranks, folder if name != "kept_for_one_process" else Path(home) / "kept"), ""
        except Exception: said, error = None, traceback.format_exc()
        table[name] = {"said": said, "error": error, "seconds": time.monotonic() - began}
        Path(home, f"table-{rank}.json").write_text(json.dumps(table))
        if error: raise RuntimeError(error)  # the other rank may wait in the middle of the case
    dist.destroy_process_group()


def goes_on(rank, world, home):
    "A checkpoint of two ranks, on another number of them."
    ranks = begin(rank, world, f"{home}/store-{world}")
    path = newest_together(Path(home) / "kept", ranks)
    for strategy in STRATEGIES:
        wrapped, model, optimizer = made(strategy, 9)
        state, _ = read_together(path, model, optimizer, ranks)
        model.load_state_dict(state["model"]); optimizer.load_state_dict(state["optimizer"])
        again = whole_state(model, optimizer, ranks)
        if ranks.first: assert same(again, torch.load(f"{home}/kept.whole")), strategy
        train(wrapped, optimizer, 1)
    structure, tensors, shards = offered({"model": made("fsdp")[1].state_dict()}, ranks)
    assert "model.head.weight" not in shards and len(shards) == len([*Net().parameters()])
    verify_together(path, ranks)
    dist.destroy_process_group()
