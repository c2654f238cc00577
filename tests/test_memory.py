"""A step whose batch does not fit is made in pieces, and is the same step. Memory runs out by order here: no GPU is needed."""
import copy
import gc
import weakref

import pytest
import torch
from small import classes, net, trainer, weights
from torch import nn

from arc_nb.engine.batches import make_batches, unpack
from arc_nb.engine.memory import Cuts, check_on_oom, cut, sizes
from arc_nb.engine.metrics import metrics
from arc_nb.engine.objectives import objective
from arc_nb.engine.optimizers import optimizer as make_optimizer
from arc_nb.engine.precision import Precision
from arc_nb.engine.step import Computation, evaluate, make_step


class Burst(torch.autograd.Function):
    "Runs out of memory in the backward pass above a number of rows."
    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if len(grad) > ctx.limit: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return grad, None


class Tight(nn.Module):
    "Has room for `limit` rows, in the forward or the backward pass; notes how many rows came."
    def __init__(self, inner, limit=10**9, where="forward"):
        super().__init__()
        self.inner, self.limit, self.where, self.seen = inner, limit, where, []

    def forward(self, x):
        self.seen.append(len(x))
        out = self.inner(x)
        if self.where == "forward" and len(x) > self.limit: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if self.where == "forward": return out
        return [Burst.apply(o, self.limit) for o in out] if isinstance(out, list) else Burst.apply(out, self.limit)


class Two(nn.Module):
    def __init__(self): super().__init__(); self.a, self.b = net(3), net(1)
    def forward(self, x): return [self.a(x), self.b(x)]


class Tokens(nn.Module):
    def __init__(self): super().__init__(); self.table = nn.Embedding(7, 5)
    def forward(self, x): return self.table(x)


def tokens(rows):
    g = torch.Generator().manual_seed(3)
    x, y = torch.randint(0, 7, (rows, 6), generator=g), torch.randint(0, 5, (rows, 6), generator=g)
    y[:, 3:] = torch.where(torch.rand(rows, 3, generator=g) < 0.5, -100, y[:, 3:])
    y[:rows // 2] = -100  # nothing at all counts in the first pieces
    return x, y


def own_step(model, raw): return {"loss": ((model(raw["x"]) - raw["y"]) ** 2).mean(), "size": raw["x"].abs().mean()}


ROWS = 22  # not a power of two
X, Y = classes(ROWS)
XD, W = X.double(), torch.arange(ROWS).double()
W[::3] = 0
KINDS = {  # model, loss, raw batch, how it is read
    "mean of classes": (net, "cross_entropy", (XD, Y), {}),
    "weights a row": (net, "cross_entropy", (XD, Y, W), {"weighted": True}),
    "weights a class": (net, ("cross_entropy", {"weight": [1.0, 5.0, 0.25]}), (XD, Y), {}),
    "weighted numbers": (lambda: net(1), "mse", (XD, XD[:, :1], W), {"weighted": True}),
    "tokens that are ignored": (Tokens, "cross_entropy", tokens(ROWS), {}),
    "tokens ignored by another number": (Tokens, ("cross_entropy", {"ignore_index": -100}), tokens(ROWS), {}),
    "several targets": (Two, ["cross_entropy", ("mse", {}, 0.3)], (XD, [Y, XD[:, 1:2]]), {}),
    "several targets, weighted": (Two, ["cross_entropy", ("mse", {}, 0.3)], (XD, [Y, XD[:, 1:2]], W), {"weighted": True}),
    "a dict": (net, "cross_entropy", {"x": XD, "y": Y}, {}),
    "a function": (net, nn.functional.cross_entropy, (XD, Y), {}),
    "a step of one's own": (lambda: net(1), own_step, {"x": XD, "y": XD[:, :1], "table": torch.ones(3)}, {}),
    "a regular norm": (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)), "cross_entropy", (XD, Y), {})}


def build(kind, limit=10**9, where="forward", clip=None, optimizer=("sgd", {"momentum": 0.9}), precision="fp32", penalty=None):
    make, loss, raw, naming = KINDS[kind]
    torch.manual_seed(0)
    model = Tight(make().double(), limit, where)
    own = loss if loss is own_step else None
    compute = Computation(model, None if own else objective(copy.deepcopy(loss)), own, penalty and penalty(model), Precision(precision))
    batch = unpack(raw, **naming)
    assert batch.rows == ROWS
    return make_step(compute, make_optimizer(optimizer, model, 0.1), clip), batch


def asked(step):
    "The step, which may cut."
    check_on_oom(step, "accumulate")
    step.on_oom = "accumulate"
    return step


def same(a, b, exact=False):
    close = torch.equal if exact else lambda x, y: torch.allclose(x, y, rtol=1e-9, atol=1e-12)
    return all(close(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where, accumulate", [("forward", 1), ("backward", 3)])
def test_the_step_in_pieces_is_the_step(kind, where, accumulate):
    penalty = lambda model: lambda: 0.01 * sum(p.square().sum() for p in model.parameters())
    (plain, batch), (tight, _) = build(kind, penalty=penalty, clip=0.5), build(kind, 6, where, penalty=penalty, clip=0.5)
    batches = [batch, *cut(batch, 11)][:accumulate]
    asked(tight)
    with pytest.warns(RuntimeWarning) as said:
        for _ in range(3):
            one, many = plain(batches), tight(batches)
            assert many.loss == pytest.approx(one.loss, rel=1e-9) and many.norm == pytest.approx(one.norm, rel=1e-9)
            assert (many.rows, many.good) == (one.rows, one.good)
            logged = [{name: float(value) for name, value in step.compute.extras.items()} for step in (plain, tight)]
            assert logged[1] == pytest.approx(logged[0])
            assert same(plain.compute.model.state_dict(), tight.compute.model.state_dict())
            assert all(p.grad is None for p in tight.parameters) and tight.sound
    assert [str(w.message) for w in said] == [f"out of memory with 22 rows a batch: from now on 4 pieces of at most 6 rows, accumulated; "
                                              f"the effective batch stays {one.rows}"]
    assert (tight.pieces, tight.cuts.most, max(tight.compute.model.seen[-4:])) == (4, 6, 6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_other_precisions(precision, where):
    (plain, batch), (tight, _) = build("mean of classes", precision=precision), build("mean of classes", 6, where, precision=precision)
    for step in (plain, tight): step.compute.model.float()
    batch = batch._replace(inputs=(X,))
    with pytest.warns(RuntimeWarning, match="4 pieces"):
        for _ in range(4): one, many = plain([batch]), asked(tight)([batch])
    assert many.loss == pytest.approx(one.loss, rel=2e-2) and many.norm == pytest.approx(one.norm, rel=2e-2)
    assert torch.allclose(weights(plain.compute.model), weights(tight.compute.model), atol=1e-2)


def test_a_step_that_was_tried_again_is_the_one_that_knew_from_the_start():
    def made(limit, state=None):
        step, batch = build("mean of classes", limit, optimizer="adamw")
        step.compute.model.inner[2].p = 0.5  # dropout draws
        asked(step).load_state_dict(state or {})
        torch.manual_seed(1)
        outcomes = [step([batch]) for _ in range(3)]
        return outcomes, weights(step.compute.model), step.state_dict()

    with pytest.warns(RuntimeWarning, match="4 pieces"): tried, w, state = made(6)
    knew, v, after = made(6, state)  # no warning: the pieces are part of the state
    assert tried == knew and torch.equal(w, v) and after == state == {"pieces": 4, "rows": 6, "valid": {"pieces": 1, "rows": None}}


def test_pieces_stay_when_nobody_asks_any_more():
    step, batch = build("mean of classes", 6)
    step.load_state_dict({"pieces": 4, "rows": 6})
    assert step([batch]).good and step.on_oom is None and max(step.compute.model.seen) == 6


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_batch_statistics_are_not_moved_by_what_came_to_nothing(where):
    def made(limit):
        torch.manual_seed(0)
        model = Tight(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=None), nn.Linear(8, 3)), limit, where)
        return asked(make_step(Computation(model, objective("cross_entropy")), torch.optim.SGD(model.parameters(), 0.1)))

    batch, tight, knew = unpack((X, Y)), made(6), made(6)
    knew.load_state_dict({"pieces": 4, "rows": 6})
    with pytest.warns(RuntimeWarning, match="batch normalisation now sees one piece at a time"): one = tight([batch])
    assert one == knew([batch]) and same(tight.compute.model.state_dict(), knew.compute.model.state_dict(), exact=True)
    assert tight.compute.model.inner[1].num_batches_tracked == 4


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_training_metrics_count_each_row_once(where):
    step, batch = build("mean of classes", 3, where)
    step.compute.model.limit = 3
    counted, rows = metrics("accuracy"), []

    def heard(piece):
        rows.extend(piece.inputs[0][:, 0].tolist())
        counted.update(step.compute.point(), piece.target)

    step.compute.heard = heard
    with pytest.warns(RuntimeWarning, match="8 pieces of at most 3"): asked(step)([batch])
    assert rows == XD[:, 0].tolist() and step.compute.heard is heard
    with torch.no_grad(): first = build("mean of classes")[0].compute.model(XD).argmax(1)
    assert counted.compute()["accuracy"] == pytest.approx((first == Y).float().mean().item())
    step([batch])
    assert len(rows) == 2 * ROWS


def test_memory_that_runs_out_late_in_the_step_does_not_tell_a_row_twice():
    "The first batch of three fits, the second does not: the first has been told of already."
    step, batch = build("mean of classes")
    model, rows = step.compute.model, []
    step.compute.heard = lambda piece: rows.extend(piece.inputs[0][:, 0].tolist())
    limits = iter([22, 5])  # then always 5
    model.register_forward_pre_hook(lambda m, _: setattr(m, "limit", next(limits, 5)))
    with pytest.warns(RuntimeWarning): outcome = asked(step)([batch] * 3)
    assert rows == XD[:, 0].tolist() * 3 and outcome.rows == 66


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_one_row_does_not_fit_the_error_comes_through(where):
    step, batch = build("mean of classes", 0, where)
    before = copy.deepcopy(step.compute.model.state_dict())
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught: asked(step)([batch])
    assert "one does not fit" in caught.value.__notes__[0]
    assert step.sound and step.pieces == 1 and step.cuts.most is None and same(before, step.compute.model.state_dict(), exact=True)
    assert all(p.grad is None for p in step.parameters)


def test_what_has_no_rows_cannot_be_cut():
    model = Tight(nn.Linear(4, 1), 0)
    step = make_step(Computation(model, step=lambda m, raw: m(X).mean()), torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(torch.OutOfMemoryError) as caught: asked(step)([unpack({"n": 3}, labelled=False)])
    assert "nothing to cut" in caught.value.__notes__[0]


def test_without_on_oom_the_error_comes_through_and_nothing_moved():
    step, batch = build("mean of classes", 6, "backward")
    with pytest.raises(torch.OutOfMemoryError) as caught: step([batch])
    assert not getattr(caught.value, "__notes__", []) and step.sound and all(p.grad is None for p in step.parameters)


@pytest.mark.parametrize("words", ["MPS backend out of memory (MPS allocated: 9 GB)", "DefaultCPUAllocator: can't allocate memory",
                                   "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_other_words_for_the_same(words):
    step, batch = build("mean of classes")
    def tight(m, args):
        if len(args[0]) > 11: raise RuntimeError(words)
    step.compute.model.register_forward_pre_hook(tight)
    with pytest.warns(RuntimeWarning, match="2 pieces of 11 rows"): asked(step)([batch])


def test_other_errors_are_not_taken_for_it():
    step, batch = build("mean of classes")
    def broken(m, args): raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    step.compute.model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="mat1") as caught: asked(step)([batch])
    assert not getattr(caught.value, "__notes__", [])


def test_what_the_failed_try_held_is_free_before_the_next():
    step, batch = build("mean of classes")
    held, alive = [], []

    def tight(m, args, out):
        alive.append(sum(ref() is not None for ref in held))
        held.append(weakref.ref(out))
        if len(args[0]) > 11: raise torch.OutOfMemoryError("CUDA out of memory")
    step.compute.model.inner.register_forward_hook(tight)
    gc.disable()
    try:
        with pytest.warns(RuntimeWarning): asked(step)([batch])
    finally: gc.enable()
    assert alive[:2] == [0, 0]


@pytest.mark.parametrize("optimizer, answer, said", [("lbfgs", "accumulate", "lbfgs asks"), ("adamw", "halve", "'halve' is none of"),
                                                     ("adamw", True, "True is none of")])
def test_who_cannot(optimizer, answer, said):
    step, _ = build("mean of classes", optimizer=optimizer)
    with pytest.raises(ValueError, match=said): check_on_oom(step, answer)
    assert check_on_oom(step, None) is None


def test_a_compiled_step_cannot():
    from arc_nb.engine.compiled import CompiledStep
    model = net()
    step = CompiledStep(Computation(model, objective("cross_entropy")), torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match='compile="step"'): check_on_oom(step, "accumulate")


# --- Cutting ---------------------------------------------------------------------------------------------------------

def test_smaller_pieces_lie_inside_larger_ones():
    for rows in range(1, 70):
        ends = None
        for most in range(rows, 0, -1):
            parts = sizes(rows, most)
            assert sum(parts) == rows and max(parts) <= most and max(parts) - min(parts) <= (1 if most * 2 > rows else rows)
            now = {sum(parts[:k]) for k in range(len(parts) + 1)}
            assert ends is None or ends <= now
            ends = now


def test_pieces_of_every_form():
    n = 6
    boxes = [{"box": torch.ones(k, 4), "label": torch.ones(k)} for k in range(n)]
    raws = [(torch.ones(n, 2), torch.ones(n)), [torch.ones(n, 2), torch.ones(n)], (torch.ones(n, 2), boxes),
            ((torch.ones(n, 2), {"deep": torch.ones(n, 3)}), torch.ones(n)),
            {"x": torch.ones(n), "text": list("abcdef"), "k": 3, "y": torch.ones(n)},
            ([torch.ones(n, 1)] * n, torch.ones(n))]  # as many inputs as rows: still inputs
    for raw in raws:
        batch = unpack(raw)
        pieces = cut(batch, 2)
        assert [p.rows for p in pieces] == [2, 1, 2, 1] and type(pieces[0].raw) is type(raw)
        again = [unpack(p.raw) for p in pieces]
        assert [p.rows for p in again] == [p.rows for p in pieces]
        assert [len(p.target) for p in pieces] == [len(p.target) for p in again] == [2, 1, 2, 1]
        for p, q in zip(pieces, again): assert str(p.inputs) == str(q.inputs) and str(p.target) == str(q.target)
    assert cut(unpack(raws[2]), 2)[3].target == [boxes[5]] and cut(unpack(raws[4]), 2)[1].inputs["text"] == ["c"]
    assert len(cut(unpack(raws[5]), 2)[0].inputs) == n


# --- Evaluation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ask", [None, "accumulate"])
def test_evaluation_in_pieces_gives_the_same_scores(ask):
    data, model = classes(50), net()
    batches = make_batches(data, 20, shuffle=False)
    plain = evaluate(Computation(model, objective("cross_entropy")), batches, metrics(["accuracy", "f1"], activation="softmax"))
    tight, cuts = Tight(model, 6), Cuts()
    compute = Computation(tight, objective("cross_entropy"))
    if ask is None:
        with pytest.raises(torch.OutOfMemoryError): evaluate(compute, batches, cuts=cuts)
        cuts.load_state_dict({"pieces": 4, "rows": 5})
        scores = evaluate(compute, batches, metrics(["accuracy", "f1"], activation="softmax"), cuts=cuts)
    else:
        with pytest.warns(RuntimeWarning, match="20 rows a batch: from now on 4 pieces of 5 rows in validation; the scores do not change"):
            scores = evaluate(compute, batches, metrics(["accuracy", "f1"], activation="softmax"), None, cuts, ask)
    assert scores == pytest.approx(plain, rel=1e-6) and cuts.most == 5


# --- As a person meets it --------------------------------------------------------------------------------------------

class Roomy(nn.Module):
    "Has room for a number of rows while it trains."
    def __init__(self, limit): super().__init__(); self.inner, self.limit = net(), limit
    def forward(self, x):
        if self.training and len(x) > self.limit: raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner(x)


def test_a_fit_that_runs_out_of_memory():
    def fitted(limit, **more):
        t = trainer(Roomy(limit), classes(60), batch_size=32, train_metrics=["accuracy"], lr=1e-2)
        t.fit(epochs=3, **more)
        return t

    with pytest.warns(RuntimeWarning, match="32 rows a batch: from now on 4 pieces of 8 rows, accumulated; the effective batch stays 32"):
        tight = fitted(8, on_oom="accumulate")
    plain = fitted(100)
    assert tight.step == plain.step == 6
    a, b = (t.history.series("train", "loss")[1] for t in (plain, tight))
    assert abs(a - b).max() < 1e-5 and torch.allclose(weights(plain.model), weights(tight.model), atol=1e-5)
    assert tight.history.epochs()["train_accuracy"].tolist() == pytest.approx(plain.history.epochs()["train_accuracy"].tolist(), abs=0.02)


# --- Steps that are broken off ---------------------------------------------------------------------------------------

def broken_off(step, batches):
    "Makes the step, which fails; whether everything is as it was."
    before = copy.deepcopy([step.compute.model.state_dict(), step.optimizer.state_dict()])
    with pytest.raises(KeyboardInterrupt): step(batches)
    after = step.compute.model.state_dict(), step.optimizer.state_dict()
    assert all(p.grad is None for p in step.parameters) and step.compute.output is None
    return all(torch.equal(before[0][k], after[0][k]) for k in after[0]) and str(before[1]) == str(after[1])


@pytest.mark.parametrize("place", ["forward", "count", "backward", "clip", "measure"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("on_oom", [None, "accumulate"])
def test_what_breaks_off_before_the_optimizer_leaves_everything_as_it_was(place, precision, on_oom, monkeypatch):
    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        compute = Computation(model, objective("cross_entropy"), precision=Precision(precision))
        step = make_step(compute, torch.optim.AdamW(model.parameters(), 0.1), 1.0)
        step.on_oom = on_oom
        step(batches)
        return step, model

    def fail(*_): raise KeyboardInterrupt

    batches = [unpack((X, Y)), unpack((X[:5], Y[:5]))]
    (step, model), (twin, other) = made(), made()
    with monkeypatch.context() as patch:
        if place == "forward": patch.setattr(model[2], "forward", fail)
        if place == "count": patch.setattr(step.compute, "count", fail)
        if place == "clip": patch.setattr("arc_nb.engine.step.clip", fail)
        if place == "measure": patch.setattr(step, "_update", fail)
        hook = model[1].bias.register_hook(fail) if place == "backward" else None
        assert broken_off(step, batches) and step.sound
        if hook: hook.remove()
    assert step(batches) == twin(batches) and same(model.state_dict(), other.state_dict(), exact=True)


@pytest.mark.parametrize("optimizer", ["adamw", "lbfgs"])
def test_what_breaks_off_in_the_optimizer_is_not_sound(optimizer):
    step, batch = build("mean of classes", optimizer=optimizer)
    real = step.optimizer.step
    def half(*args):
        step.parameters[0].data += 1
        raise KeyboardInterrupt
    step.optimizer.step = half
    with pytest.raises(KeyboardInterrupt): step([batch])
    assert not step.sound and all(p.grad is None for p in step.parameters)
    step.optimizer.step = real
    assert step([batch]).good and step.sound


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_not_finite_can_be_followed_by_one_that_is(precision):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    compute = Computation(model, objective("cross_entropy"), precision=Precision(precision))
    step, bad = make_step(compute, torch.optim.AdamW(model.parameters(), 0.1)), X.clone()
    bad[3] = float("nan")
    before = copy.deepcopy(model.state_dict())
    assert not step([unpack((bad, Y))]).good and same(before, model.state_dict(), exact=True) and step.sound
    assert step([unpack((X, Y))]).good
