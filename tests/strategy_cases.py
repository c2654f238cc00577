"What each of the processes of test_strategies does: the same training under every strategy, beside one process with the same batches."
import copy
import warnings
from functools import partial
from itertools import islice

import torch
from torch import nn

from arc_nb.engine.batches import make_batches
from arc_nb.engine.memory import piece
from arc_nb.engine.objectives import objective, penalty
from arc_nb.engine.optimizers import optimizer
from arc_nb.engine.precision import Precision
from arc_nb.engine.ranks import ALONE, join, parted
from arc_nb.engine.rankstep import RankStep
from arc_nb.engine.shards import bounds, share
from arc_nb.engine.step import Computation, Step
from arc_nb.engine.strategies import check_strategy, divide, place

SMALL = {"min_params": 100}  # each block is a unit
FOUR = {"ddp": "ddp", "zero1": "zero1", "zero2": ("zero2", SMALL), "fsdp": ("fsdp", SMALL)}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x): return x + self.b(torch.tanh(self.a(self.norm(x))))


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.first, self.last = nn.Linear(6, width), nn.Linear(width, 1)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks: x = block(x)
        return self.last(x)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.blocks[1].a.weight = self.blocks[0].a.weight


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.blocks[0].requires_grad_(False)


class Unused(Net):
    def __init__(self):
        super().__init__()
        self.extra = nn.Linear(3, 3)


class Norm(Net):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.blocks, self.out.weight = nn.Sequential(Block(16), Block(16)), self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.1)  # losses of about ln 11, where 1e-6 is four steps of fp32

    def forward(self, tokens): return self.out(self.blocks(self.embed(tokens)))


def rows(n=480):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, 6, generator=g)
    return X, torch.sin(X.sum(1, keepdim=True)) + 0.1 * torch.randn(n, 1, generator=g)


def weighted(n=293):
    g = torch.Generator().manual_seed(5)
    return *rows(n), torch.rand(n, generator=g) * (torch.rand(n, generator=g) > 0.3)


def tokens(n=300):
    "Rows of which very different numbers of tokens count."
    g = torch.Generator().manual_seed(3)
    X = torch.randint(0, 11, (n, 7), generator=g)
    return X, X.roll(-1, 1).masked_fill(torch.rand(n, 7, generator=g) < torch.rand(n, 1, generator=g), -100)


def own_step(model, batch):
    x, y = batch
    output = model(x)
    return {"loss": (output - y).square().mean(), "mae": (output - y).abs().mean(), "note": "text"}


CASES = {"one row left over": dict(data=rows(12 * 5 + 1), accumulate=1), "odd shares": dict(data=rows(7 * 9 + 3), size=7, accumulate=3),
         "weights": dict(data=weighted(), weighted=True),
         "tokens": dict(make=Tokens, data=tokens(), loss="cross_entropy", size=6, accumulate=3),
         "step=": dict(step=own_step), "momentum": dict(opt=("sgd", {"momentum": 0.9}), lr=0.05), "tied": dict(make=Tied),
         "frozen": dict(make=Frozen), "unused": dict(make=Unused), "clip by value": dict(clip=None, value=0.01),
         "one batch": dict(accumulate=1)}


def parts(spec, ranks, make=Net, data=None, size=12, opt="adamw", lr=3e-3, precision="fp32", loss="mse", weighted=False, step=None,
          clip=0.5, value=None, compile=False, groups=None):
    "A step and its batches: of several ranks where there is a strategy."
    torch.manual_seed(0)
    model, goal = make(), None if step else objective(loss)
    batches = make_batches(rows() if data is None else data, size, seed=1, weighted=weighted, cast=goal.cast if goal else None)
    compute = Computation(model, goal, step, None, Precision(precision))
    made = optimizer(opt, model, lr, groups=groups)
    if spec is None: return Step(compute, made, clip, value), batches
    strategy = check_strategy(spec)
    ranks = divide(strategy, ranks)
    placed = place(strategy, model, made, ranks, compile, trial=lambda: compute(batches.peek()))
    return RankStep(compute, placed, clip, value), share(batches, ranks)


def train(spec, ranks=ALONE, steps=50, accumulate=2, micro=None, as_on_a_gpu=False, **settings):
    "Losses and norms of the steps, and what else a step gave."
    step, batches = parts(spec, ranks, **settings)
    if as_on_a_gpu: step.host = step.sums.host = False  # nothing is read back: what is measured stays in tensors
    losses, norms, epoch = [], [], 0
    while len(losses) < steps:
        epoch += 1
        found = batches.epoch(epoch)
        while len(losses) < steps and (group := tuple(islice(found, accumulate))):
            outcome = step(tuple(p for batch in group for p in micro(batch)) if micro else group)
            losses.append(outcome.loss)
            norms.append(outcome.norm)
    return torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64), step


def halves(batch): return [piece(batch, *bounds(batch.rows, rank, 2)) for rank in range(2) if batch.rows > rank]


def beside(ranks, specs, alone=None, **settings):
    "By name: the largest difference from one process of the loss, and of the norm (relative where that is above 1); and what a step has."
    reference = train(None, **settings | (alone or {})) if ranks.first else None
    found = {}
    for name, spec in specs.items():
        losses, norms, step = train(spec, ranks, **settings)
        if not reference: continue
        off = [(a - b).abs() for a, b in zip((losses, norms), reference)]
        found[name] = {"loss": float(off[0].max()), "norm": float((off[1] / reference[1].clamp(min=1)).max()),
                       "extras": (step.compute.extras, reference[2].compute.extras),
                       "units": step.placed.units, "ddp": step.placed.ddp and step.placed.ddp.find_unused_parameters,
                       "weights": float(losses[0] - losses[-1])}
    return found


def split_linear(model, mesh):
    "Tensor parallelism: each rank has half of the columns, then half of the rows."
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    for block in model.blocks: parallelize_module(block, mesh["tp"], {"a": ColwiseParallel(), "b": RowwiseParallel()})


def leave(model, mesh): "Does nothing: the rows are divided, as by ddp."


def everything(compiled=False):
    "The table."
    ranks = join("cpu")
    if compiled: return compile_all(ranks)
    again = {"checkpoint_activations": True}
    more = {"ddp, activations": ("ddp", again), "fsdp, activations": ("fsdp", SMALL | again), "fsdp, whole": "fsdp",
            "fsdp, units": ("fsdp", {"units": "blocks.*", "reshard": False}), "function": leave,
            "tensor parallel": (split_linear, {"mesh": {"dp": 1, "tp": 2}}), "ddp, buckets": ("ddp", {"bucket_mb": 0.001})}
    table = {"fp32": beside(ranks, FOUR | more), "cases": {}}
    for name, case in CASES.items():
        some = FOUR if name in ("tokens", "unused") else {k: FOUR[k] for k in ("ddp", "fsdp")}
        table["cases"][name] = beside(ranks, some, **{"steps": 15} | case)
    pieces = {"micro": halves}
    for clip in (0.5, None):
        table[f"bf16, clip_norm={clip}"] = beside(ranks, FOUR, pieces, precision="bf16", clip=clip)
    table["fp16"] = beside(ranks, {k: FOUR[k] for k in ("ddp", "zero1")}, pieces, precision="fp16", accumulate=1, steps=20)
    table["tensors"] = {}
    for case in ({}, CASES["weights"], CASES["step="]): table["tensors"] |= {f"{k} {list(case)}": v for k, v in beside(
        ranks, {k: FOUR[k] for k in ("ddp", "fsdp")}, {"as_on_a_gpu": False}, as_on_a_gpu=True, steps=15, **case).items()}
    for what in (heard, bad, kept, resumed, statistics, listened, refused): table[what.__name__] = ranks.gather(what(ranks))
    return table


def compile_all(ranks):
    found = {}
    for name, spec in FOUR.items():
        for on in (False, True):
            of, options = spec if isinstance(spec, tuple) else (spec, {})
            key, full = f"{name}{', activations' if on else ''}", (of, options | {"checkpoint_activations": on})
            losses = train(full, ranks, compile=True, steps=20)[0]
            found[key] = float((losses - train(None, steps=20)[0]).abs().max())
            torch._dynamo.reset()
            ranks.barrier()
    return found


class Ear:
    def __init__(self): self.shared, self.norm, self.moved = [], 0.0, 0
    def piece(self, rows): raise AssertionError("a step of ranks shares its own gradient instead")
    def before(self, grads): self.norm = float(sum(g.square().sum() for g in grads))
    def after(self): self.moved += 1
    def share(self, rows, square): self.shared.append((rows, square))


def square_of(model, batches):
    "The squared norm of the gradient of the mean loss over all their rows."
    model.zero_grad()
    n = sum(b.rows for b in batches)
    sum(nn.functional.mse_loss(model(*b.inputs), b.target) * b.rows / n for b in batches).backward()
    return float(sum(p.grad.square().sum() for p in model.parameters()))


def heard(ranks):
    "By step: what rank 0's listener hears beside the truth; whether somebody asked; the seconds of each rank."
    step, batches = parts("ddp", ranks, data=rows(13 * 8), size=13, clip=0.5)
    _, whole = parts(None, ALONE, data=rows(13 * 8), size=13)
    mine, all_ = list(batches.epoch(1)), list(whole.epoch(1))
    found = []
    for k in range(3):
        twin = copy.deepcopy(step.placed.module)
        mine_square, whole_square = square_of(twin, mine[2 * k:2 * k + 2]), square_of(twin, all_[2 * k:2 * k + 2])
        step.heard = ear = Ear() if ranks.first and k != 1 else None
        step.asking, step.waited = (lambda: not ranks.first) if k == 1 else bool, 0.5 * ranks.rank
        outcome = step(mine[2 * k:2 * k + 2])
        found.append({"asked": step.asked, "busy": step.busy, "rows": outcome.rows, "moved": ear and ear.moved,
                      "shared": ear and ear.shared[0], "mine": mine_square, "norm": ear and ear.norm, "whole": whole_square})
    return found


def local(tensor): return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach().clone()


def bad(ranks):
    "Of a step for which only rank 1 has rows that are not finite: by strategy, whether it was good, and whether the weights stayed."
    found = {}
    for name, spec in FOUR.items():
        step, batches = parts(spec, ranks)
        first, second = islice(batches.epoch(1), 2)
        before = [local(p) for p in step.parameters]
        if ranks.rank == 1: first.inputs[0][0, 0] = float("nan")
        outcome = step([first])
        stayed = all(torch.equal(a, local(b)) for a, b in zip(before, step.parameters))
        found[name] = outcome.good, stayed, step([second]).good
    return found


def kept(ranks):
    "An optimizer that has made steps is put in place: the largest difference of the next losses, and its groups."
    found = {}
    for name, spec in FOUR.items():
        torch.manual_seed(0)
        groups = {"first": {"lr": 5e-3}}
        step, batches = parts(None, ALONE, groups=groups)
        alone = list(batches.epoch(1))
        for batch in alone[:5]: step([batch])
        model = copy.deepcopy(step.compute.model)
        own = optimizer("adamw", model, 3e-3, groups=groups)
        own.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
        placed = place(check_strategy(spec), model, own, ranks)
        other = RankStep(Computation(model, objective("mse")), placed, 0.5)
        off = 0.0
        for whole, mine in list(zip(alone, share(batches, ranks).epoch(1)))[5:20]:
            for one in (step, other): one.optimizer.param_groups[0]["lr"] *= 0.9
            off = max(off, abs(step([whole]).loss - other([mine]).loss))
        found[name] = off, [(group["name"], group["lr"]) for group in placed.optimizer.param_groups]
    return found


def resumed(ranks):
    "Whether a step that takes over the state of another goes on to the bit, though its first batch is another."
    step, batches = parts("ddp", ranks, data=rows(7 * 9 + 3), size=7)
    some = list(batches.epoch(1))
    for batch in some[:3]: step([batch])
    other, _ = parts("ddp", ranks, data=rows(7 * 9 + 3), size=7)
    other.placed.module.load_state_dict(copy.deepcopy(step.placed.module.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    other.load_state_dict(step.state_dict())
    ends = [[one([batch]) for batch in reversed(some[3:])] for one in (step, other)]
    weights = [torch.cat([p.detach().flatten() for p in one.parameters]) for one in (step, other)]
    return ends[0] == ends[1], torch.equal(*weights), step.reference


def statistics(ranks):
    "What is said of batch normalisation; whether the ranks' buffers and weights are one, before and after they settle."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step, batches = parts("ddp", ranks, make=Norm)
    for batch in islice(batches.epoch(1), 5): step([batch])
    model = step.placed.module
    before = parted(ranks, model.named_buffers())
    step.placed.settle()
    return [str(one.message) for one in said], before, parted(ranks, model.named_buffers()), parted(ranks, model.named_parameters())


def listened(ranks):
    "How many rows a listener to batches hears, of 13: the last is one rank's alone."
    step, batches = parts("ddp", ranks, data=rows(13))
    rows_heard = []
    step.compute.heard = lambda batch: rows_heard.append(batch.rows)
    outcomes = [step([batch]) for batch in batches.epoch(1)]
    return rows_heard, [outcome.rows for outcome in outcomes], step.compute.heard is not None


def refused(ranks):
    "The errors, by what was asked for."
    model, found = Net(), {}
    compute = Computation(model, objective("mse"), None, penalty(model, 1e-3, 0))
    sgd = optimizer("sgd", model, 0.1)
    asks = {"lbfgs": lambda: place(check_strategy("ddp"), model, optimizer("lbfgs", model, 0.1), ranks),
            "step": lambda: place(check_strategy("ddp"), model, sgd, ranks, "step"),
            "mesh": lambda: place(check_strategy((leave, {"mesh": {"dp": 3}})), model, sgd, ranks),
            "no module": lambda: place(check_strategy(lambda model, mesh: 3), model, sgd, ranks),
            "new names": lambda: place(check_strategy(lambda model, mesh: Unused()), model, sgd, ranks),
            "fp16": lambda: parts("fsdp", ranks, precision="fp16"),
            "l1": lambda: RankStep(compute, place(check_strategy("fsdp"), model, sgd, ranks)),
            "unused": partial(train, ("ddp", {"find_unused": False}), ranks, make=Unused)}
    for name, ask in asks.items():
        try: ask()
        except (ValueError, TypeError, RuntimeError) as error:
            found[name] = type(error).__name__, " ".join([str(error), *getattr(error, "__notes__", [])])
    return found


def square_mesh():
    "Four ranks, two of which have the same rows: largest differences of loss and norm from one process."
    ranks = join("cpu")
    spec = {"2 x 2": (split_linear, {"mesh": {"dp": 2, "tp": 2}}), "ddp": "ddp", "fsdp": ("fsdp", SMALL)}
    shares = divide(check_strategy(spec["2 x 2"]), ranks)
    return beside(ranks, spec, steps=10, data=rows(7 * 9 + 1), size=7), ranks.gather((shares.data_rank, shares.data_world))
