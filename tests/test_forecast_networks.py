"""The networks that see a window at once: what they share, what the papers say of each, and that each learns."""
import copy
import io
import pickle
import warnings

import pytest
import torch

from arc_nb.tasks.forecast.linear import DLinearNetwork, Level, NLinearNetwork, moving_average
from arc_nb.tasks.forecast.looking import influence, map_picture, parts_picture, shades
from arc_nb.tasks.forecast.mlp import MLPNetwork
from arc_nb.tasks.forecast.nbeats import NBEATSNetwork, polynomials, waves
from arc_nb.tasks.forecast.network import Sizes, Window
from arc_nb.tasks.forecast.nhits import NHITSNetwork, fitted_pools, hats, spread_rates
from arc_nb.tasks.forecast.samples import synthetic
from arc_nb.tasks.forecast.tcn import TCNNetwork, enough_depth, receptive_field, seen_steps

WIDE = (MLPNetwork, NBEATSNetwork, NHITSNetwork, TCNNetwork)  # take columns
ALONE = (DLinearNetwork, NLinearNetwork)
EVERY = WIDE + ALONE


def sizes_for(network, horizon=12, input_size=24, **more):
    columns = {} if network in ALONE else {"past": 3, "future": 2, "static": 1}
    return Sizes(horizon, input_size, **columns, **more)


def window_for(sizes, rows=5):
    return Window(torch.randn(rows, sizes.input_size), torch.randn(rows, sizes.input_size, sizes.past),
                  torch.randn(rows, sizes.horizon, sizes.future), torch.randn(rows, sizes.static))


@pytest.mark.parametrize("network", EVERY)
@pytest.mark.parametrize("horizon, input_size, outputs", [(12, 24, 1), (1, 1, 1), (1, 8, 3), (7, 2, 2), (48, 13, 5)])
def test_shapes_and_gradients(network, horizon, input_size, outputs):
    torch.manual_seed(0)
    sizes = sizes_for(network, horizon, input_size, outputs=outputs, locations=(0,))
    model, window = network(sizes), window_for(sizes)
    assert model.autoregressive is False
    assert model(window).shape == (5, horizon, outputs)
    model(window).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, f"{name} takes no part"
        if input_size > 2 and horizon > 1: assert p.grad.abs().sum() > 0, f"{name} takes no part"


@pytest.mark.parametrize("network", EVERY)
def test_windows_do_not_mix_and_seeds_hold(network):
    sizes = sizes_for(network, outputs=2)
    torch.manual_seed(3); first = network(sizes)
    torch.manual_seed(3); second = network(sizes)
    window = window_for(sizes, 6)
    assert torch.equal(first(window), second(window))
    one = Window(*(part[2:3] for part in window[:4]))
    assert torch.allclose(first(one), first(window)[2:3], atol=1e-5)
    assert first(Window(*(part[:0] for part in window[:4]))).shape == (0, 12, 2)


@pytest.mark.parametrize("network", EVERY)
def test_copies_and_files(network):
    sizes = sizes_for(network)
    model, window = network(sizes), window_for(sizes)
    assert torch.equal(copy.deepcopy(model)(window), model(window))
    assert torch.equal(pickle.loads(pickle.dumps(model))(window), model(window))
    kept, other = io.BytesIO(), network(sizes)
    torch.save(model.state_dict(), kept); kept.seek(0)
    other.load_state_dict(torch.load(kept, weights_only=True))
    assert torch.equal(other(window), model(window))
    assert sum(v.numel() for v in model.state_dict().values()) == sum(p.numel() for p in model.parameters())  # no tables in files


@pytest.mark.parametrize("network", WIDE)
def test_every_column_reaches_the_forecast(network):
    torch.manual_seed(0)
    sizes = sizes_for(network)
    model, window = network(sizes).eval(), window_for(sizes)
    for name in ("y", "past", "future", "static"):
        part = getattr(window, name)
        for column in range(part.shape[-1]):
            moved = part.clone(); moved[..., column] += 1
            if name == "y" and column: continue
            assert not torch.allclose(model(window._replace(**{name: moved})), model(window)), (name, column)


@pytest.mark.parametrize("network", ALONE)
def test_columns_without_effect_are_said(network):
    with pytest.warns(UserWarning, match="2 future, 1 static columns have no effect"): network(Sizes(12, 24, future=2, static=1))


@pytest.mark.parametrize("network", WIDE)
def test_dropout_is_for_training(network):
    sizes = sizes_for(network)
    model, window = network(sizes, dropout=0.5), window_for(sizes)
    assert not torch.equal(model(window), model(window))
    model.eval()
    assert torch.equal(model(window), model(window))


WRONG = {
    MLPNetwork: [{"hidden_size": 0}, {"num_layers": 0}, {"dropout": 1}, {"dropout": None}, {"activation": "rellu"}],
    DLinearNetwork: [{"kernel": 0}, {"start": "zero"}],
    NBEATSNetwork: [{"stacks": ()}, {"stacks": ("tred",)}, {"stacks": "exogenous"}, {"blocks": (1, 2)}, {"blocks": 1.5}, {"degree": -1},
                    {"hidden_size": True}],
    NHITSNetwork: [{"pooling": ()}, {"pooling": "8"}, {"pooling": (2, 2), "downsample": (4,)}, {"downsample": (2.5, 1)}, {"downsample": 0},
                   {"interpolation": "spline"}, {"dropout": "no"}],
    TCNNetwork: [{"kernel": 1}, {"depth": 0}, {"channels": -3}, {"dropout": -0.1}]}


@pytest.mark.parametrize("network, options", [(network, options) for network, several in WRONG.items() for options in several])
def test_wrong_options_are_named(network, options):
    with pytest.raises(ValueError) as said: network(Sizes(12, 24), **options)
    [name] = list(options)[-1:]
    assert any(word in str(said.value) for word in (*options, name.rstrip("s"), "stack")), said.value


# ---- the linear ones

def test_moving_average_repeats_the_ends():
    y = torch.arange(6.)[None]
    assert torch.allclose(moving_average(y, 3), torch.tensor([[1 / 3, 1, 2, 3, 4, 14 / 3]]))
    assert torch.equal(moving_average(y, 1), y)
    assert torch.allclose(moving_average(y, 4), torch.tensor([[3 / 4, 6 / 4, 10 / 4, 14 / 4, 17 / 4, 19 / 4]]))


def test_kernel_fits_the_window():
    assert [DLinearNetwork(Sizes(12, length)).kernel for length in (336, 24, 1)] == [25, 23, 1]
    assert DLinearNetwork(Sizes(12, 24), kernel=24).kernel == 24
    with pytest.warns(UserWarning, match="kernel=25 is longer than the window"): shorter = DLinearNetwork(Sizes(12, 24), kernel=25)
    assert shorter.kernel == 23


def test_linear_networks_are_one_matrix():
    torch.manual_seed(0)
    sizes = Sizes(6, 12)
    zero = Window(*(torch.zeros_like(part) for part in window_for(sizes)[:4]))
    for model in (DLinearNetwork(sizes), NLinearNetwork(sizes), DLinearNetwork(sizes, start="mean")):
        window = window_for(sizes)
        found = window.y @ influence(model, window).T + model(zero)[:1, :, 0]
        assert torch.allclose(model(window)[..., 0], found, atol=1e-5)


def test_only_values_of_the_series_get_the_level():
    y = torch.randn(4, 9)
    assert torch.equal(Level(Sizes(3, 9, outputs=3, locations=(0, 2)))(y)[:, 0], torch.stack([y[:, -1], torch.zeros(4), y[:, -1]], 1))
    assert torch.equal(Level(Sizes(3, 9, outputs=2, locations=(), centre=None))(y), torch.zeros(4, 1, 2))


# ---- N-BEATS and N-HiTS

def test_shapes_of_trend_and_season():
    assert polynomials(10, 3).shape == (4, 10) and torch.allclose(polynomials(10, 3)[3, 5], torch.tensor(0.125))
    for steps, rows in ((1, 1), (3, 1), (4, 3), (12, 11), (13, 11)): assert waves(steps).shape == (rows, steps)


@pytest.mark.parametrize("network, options", [
    (NBEATSNetwork, {}), (NBEATSNetwork, {"stacks": ("generic", "generic"), "blocks": 2}), (NHITSNetwork, {}),
    (NHITSNetwork, {"blocks": (2, 1, 3)}), (NHITSNetwork, {"from_last": False}), (DLinearNetwork, {})])
def test_parts_add_up(network, options):
    sizes = sizes_for(network, outputs=2)
    model, window = network(sizes, **options), window_for(sizes)
    parts = model.parts(window)
    assert all(part.shape == (5, 12, 2) for part in parts.values())
    assert torch.allclose(sum(parts.values()), model(window), atol=1e-5)


def test_trend_is_a_polynomial_and_season_has_its_waves():
    torch.manual_seed(0)
    sizes = Sizes(12, 24)
    parts = NBEATSNetwork(sizes, stacks=("trend", "seasonality"), degree=1).parts(window_for(sizes))
    assert parts["trend"][..., 0].diff(n=2).abs().max() < 1e-5  # a line
    free = parts["seasonality"][..., 0] - parts["seasonality"][..., 0] @ torch.linalg.pinv(waves(12)) @ waves(12)
    assert free.abs().max() < 1e-5


def test_each_block_reads_what_is_left():
    torch.manual_seed(0)
    sizes = Sizes(4, 8)
    model, window = NBEATSNetwork(sizes, stacks=("generic", "generic"), hidden_size=16), window_for(sizes)
    (first,), (second,) = model.members
    nothing = torch.zeros(5, 0)
    back, ahead = first(window.y, nothing, window)
    none, rest = second(window.y - back, nothing, window)
    assert none is None and torch.allclose(ahead + rest, model(window), atol=1e-6)


def test_shared_weights_are_few():
    count = lambda **o: sum(p.numel() for p in NBEATSNetwork(Sizes(12, 24), blocks=3, **o).parameters())
    assert count(share_weights=True) < count() / 2.5
    with pytest.warns(UserWarning, match="no effect with one block"): NBEATSNetwork(Sizes(12, 24), share_weights=True)


def test_exogenous_stack_is_a_sum_of_columns():
    torch.manual_seed(0)
    sizes = Sizes(6, 12, past=3, future=2)
    model, window = NBEATSNetwork(sizes, stacks=("exogenous", "generic")), window_for(sizes)
    part = model.parts(window)["exogenous"][..., 0]
    for row, columns in zip(part, window.future):  # each window's part lies in the plane of its columns
        assert torch.allclose(columns @ torch.linalg.lstsq(columns, row[:, None]).solution, row[:, None], atol=1e-4)
    assert model.parts(window._replace(future=torch.zeros(5, 6, 2)))["exogenous"].abs().max() == 0


@pytest.mark.parametrize("interpolation", ["nearest", "linear", "cubic"])
def test_hats_add_up_to_one(interpolation):
    for knots, steps in ((1, 7), (2, 7), (3, 96), (96, 96)):
        assert torch.allclose(hats(knots, steps, interpolation).sum(0), torch.ones(steps), atol=1e-5)
    assert torch.allclose(torch.tensor([1., 5.]) @ hats(2, 5), torch.arange(1., 6.))


def test_rates_follow_the_lengths():
    assert spread_rates(720, 3) == [180, 13, 1] and spread_rates(96, 1) == [1] and spread_rates(3, 2) == [1, 1]
    assert fitted_pools(480, 3) == [8, 4, 1] and fitted_pools(8, 3) == [1, 1, 1]
    assert NHITSNetwork(Sizes(4, 8), pooling=99, downsample=99)(window_for(Sizes(4, 8))).shape == (5, 4, 1)  # one number, one knot
    model = NHITSNetwork(Sizes(96, 480), pooling=(16, 2))
    assert model.rates == [24, 1]
    assert [(len(stack[0].before), len(stack[0].behind)) for stack in model.members] == [(4, 20), (96, 480)]


# ---- the convolutional one

@pytest.mark.parametrize("kernel, depth", [(2, 1), (2, 4), (3, 3), (5, 2)])
def test_the_field_is_what_is_seen(kernel, depth):
    torch.manual_seed(0)
    field = receptive_field(kernel, depth)
    sizes = Sizes(3, field + 5)
    with pytest.warns(UserWarning, match="the first 5 of"): model = TCNNetwork(sizes, kernel=kernel, depth=depth, channels=32)
    reached = influence(model, window_for(sizes, 64)).abs().sum(0)
    assert (reached[:5] == 0).all() and reached[5] > 0
    assert seen_steps(kernel, depth)[-1].tolist() == list(range(field))


def test_depth_is_enough_and_no_more():
    for length in (1, 2, 24, 48, 100, 336):
        for kernel in (2, 3, 7):
            depth = enough_depth(kernel, length)
            assert receptive_field(kernel, depth) >= length and (depth == 1 or receptive_field(kernel, depth - 1) < length)


# ---- pictures

def test_pictures():
    torch.manual_seed(0)
    assert shades(torch.zeros(2, 3).numpy()).tolist() == [[0] * 3] * 2
    assert shades(torch.tensor([[2., -2.], [1., 0.05]]).numpy()).tolist() == [[8, -8], [4, 0]]
    for theme in ("light", "dark", "auto"):
        assert map_picture(torch.randn(3, 7), theme=theme).startswith("<svg")
        assert "<svg" in parts_picture(torch.randn(20), {"a": torch.randn(5), "b": torch.randn(5)}, torch.randn(5), theme=theme)
    assert len(map_picture(torch.randn(96, 336))) < 700_000
    map_picture(torch.randn(1, 1)); parts_picture(torch.randn(1), {"a": torch.randn(1)})


# ---- they learn, export and compile

def learnt(network, **options):
    """Error on the last year of 20 series, beside that of repeating the year before; a mean and a deviation scale each window."""
    y = torch.tensor(synthetic(series=20, steps=120, season=12, seed=0).y.to_numpy(), dtype=torch.float32).view(20, 120)
    def cut(rows):
        past, target = rows[:, :24], rows[:, 24:]
        loc, scale = past.mean(1, keepdim=True), past.std(1, keepdim=True)
        empty = lambda *shape: torch.zeros(len(rows), *shape)
        return Window((past - loc) / scale, empty(24, 0), empty(12, 0), empty(0)), (target - loc) / scale
    window, target = cut(y[:, :108].unfold(1, 36, 1).flatten(0, 1))
    asked, truth = cut(y[:, -36:])
    torch.manual_seed(0)
    model = network(Sizes(12, 24), **options)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(200):
        at = torch.randint(0, len(target), (128,))
        loss = (model(Window(*(part[at] for part in window[:4])))[..., 0] - target[at]).abs().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    with torch.no_grad(): return (model.eval()(asked)[..., 0] - truth).abs().mean().item(), (asked.y[:, -12:] - truth).abs().mean().item()


@pytest.mark.parametrize("network, options", [
    (MLPNetwork, {"hidden_size": 64}), (DLinearNetwork, {}), (NLinearNetwork, {}), (NBEATSNetwork, {"hidden_size": 64}),
    (NHITSNetwork, {"hidden_size": 64}), (TCNNetwork, {"channels": 16})])
def test_each_learns(network, options):
    error, naive = learnt(network, **options)
    assert error < 0.95 * naive


@pytest.mark.parametrize("network", EVERY)
def test_the_graph_is_traced_for_any_number_of_windows(network):
    sizes = sizes_for(network)
    model, window = network(sizes).eval(), window_for(sizes)

    class Plain(torch.nn.Module):
        def __init__(self): super().__init__(); self.model = model
        def forward(self, y, past, future, static): return self.model(Window(y, past, future, static))

    rows = torch.export.Dim("rows", min=2, max=4096)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Plain(), tuple(window[:4]), dynamic_shapes=[{0: rows}] * 4)
    other = window_for(sizes, 9)
    assert torch.allclose(program.module()(*other[:4]), model(other), atol=1e-5)


# ---- as models

def test_parts_of_a_model_add_up():
    from arc_nb.tasks.forecast import NBEATS, NHITS, DLinear
    frame = synthetic(series=3, steps=60, columns=True)
    early = frame.groupby("unique_id").head(54)
    quick = dict(horizon=6, input_size=12, max_steps=10, board=False, run=False)
    columns = dict(future=("promo",), static=("region",))
    exogenous = NBEATS(stacks=("exogenous", "trend", "generic"), **columns, **quick).fit(early)
    for model, future in ((exogenous, frame), (NHITS(loss="student_t", scale_by="series", **columns, **quick).fit(early), frame),
                          (DLinear(loss="mse", **quick).fit(early[["unique_id", "ds", "y"]]), None)):
        found, point = model.parts(future=future), model.predict(future=future)
        assert (found.iloc[:, :2] == point.iloc[:, :2]).all(axis=None)
        miss = found.iloc[:, 2:].sum(axis=1) - point[model.name]
        assert miss.abs().max() < 1e-4 * point[model.name].abs().max()
        assert "<svg" in model.show_parts(future=future, series="s1").data
    assert list(model.parts().columns) == ["unique_id", "ds", "base", "trend", "remainder"]
    with pytest.raises(ValueError, match="has learned nothing"): NHITS(**quick).parts()
    with pytest.raises(ValueError, match="s9"): model.show_parts(series="s9")
    with pytest.raises(ValueError, match="columns known ahead"): NBEATS(stacks="exogenous", **quick)
