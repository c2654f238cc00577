"Recurrent networks, DeepAR, Transformer and PatchTST: what they learn, what reaches the forecast, and that a resumed training is the same."
import contextlib
import io

import numpy as np
import pytest
import torch

from arc_nb.tasks.forecast.deepar import DeepAR, DeepARNetwork
from arc_nb.tasks.forecast.losses import loss_of
from arc_nb.tasks.forecast.network import Sizes, Window
from arc_nb.tasks.forecast.patchtst import PatchTST, PatchTSTNetwork
from arc_nb.tasks.forecast.recurrent import GRU, LSTM, RNN, GRUNetwork, LSTMNetwork, RNNNetwork
from arc_nb.tasks.forecast.samples import synthetic
from arc_nb.tasks.forecast.transformer import Transformer, TransformerNetwork, looks

NETWORKS = [(RNNNetwork, {}), (LSTMNetwork, {}), (GRUNetwork, {}), (LSTMNetwork, {"decoder": "recursive", "teacher_forcing": 0.5}),
            (LSTMNetwork, {"bidirectional": True, "num_layers": 2, "dropout": 0.1}), (TransformerNetwork, {}), (PatchTSTNetwork, {})]


def window(rows=6, length=24, horizon=12, past=0, future=0, static=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    return Window(draw(rows, length), draw(rows, length, past), draw(rows, horizon, future), draw(rows, static), draw(rows, horizon))


@pytest.mark.parametrize("kind, options", NETWORKS)
@pytest.mark.parametrize("outputs", [1, 3])
def test_one_window_at_a_time_is_the_same_as_all_together(kind, options, outputs):
    torch.manual_seed(0)
    sizes = Sizes(12, 24, outputs=outputs, locations=tuple(range(outputs)), centre=outputs // 2)
    network, given = kind(sizes, hidden_size=16, **options).eval(), window()
    together = network(given)
    assert together.shape == (6, 12, outputs)
    alone = torch.cat([network(Window(*(t[k:k + 1] for t in given))) for k in range(6)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, options", NETWORKS)
def test_the_same_seed_gives_the_same_weights(kind, options):
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(kind(Sizes(12, 24), hidden_size=16, **options))
    assert all(torch.equal(a, b) for a, b in zip(*(network.parameters() for network in made)))


@pytest.mark.parametrize("length, horizon", [(2, 1), (5, 20), (7, 3), (96, 1)])
def test_any_lengths(length, horizon):
    for kind, options in [*NETWORKS, (DeepARNetwork, {})]:
        network = kind(Sizes(horizon, length, outputs=2, locations=(0,)), hidden_size=8, **options)
        assert network(window(4, length, horizon)).shape == (4, horizon, 2), (kind, length, horizon)


def test_teacher_forcing_tosses_its_coins_with_torchs_generator():
    torch.manual_seed(0)
    network, given = LSTMNetwork(Sizes(12, 24), hidden_size=8, decoder="recursive", teacher_forcing=0.5), window()
    state = torch.get_rng_state()
    first = network(given)
    second = network(given)
    torch.set_rng_state(state)
    assert torch.equal(network(given), first) and not torch.equal(first, second)
    network.decoder.teacher_forcing = 0.0
    assert torch.equal(network(given), network.eval()(given))


def test_a_share_of_the_steps_is_told_the_truth():
    torch.manual_seed(0)
    network = LSTMNetwork(Sizes(30, 24), hidden_size=8, decoder="recursive", teacher_forcing=0.3)
    given = window(300, 24, 30)
    given.ahead.requires_grad_()
    network(given).sum().backward()  # the truth of a step moves the forecasts after it, where the coin fell so
    told = (given.ahead.grad[:, :-1] != 0).float().mean().item()
    assert abs(told - 0.3) < 0.02, told


@pytest.mark.parametrize("model", [LSTM, GRU, RNN, Transformer, PatchTST, DeepAR])
def test_better_than_last_year(model, tmp_path):
    frame = synthetic(series=12, steps=120, season=12, seed=1)
    step = frame.groupby("unique_id").cumcount()
    truth = frame[step >= 108].y.to_numpy()
    options = {"max_steps": 400 if model is Transformer else 250}
    fitted = model(horizon=12, input_size=24, seed=0, run=tmp_path / "run", board=False, **options)
    with contextlib.redirect_stdout(io.StringIO()): fitted.fit(frame[step < 108])
    error = np.abs(fitted.predict()[model.__name__].to_numpy() - truth).mean()
    naive = np.abs(frame[step.between(96, 107)].y.to_numpy() - truth).mean()
    assert error < naive, (error, naive)


@pytest.mark.parametrize("model, options", [(LSTM, {"decoder": "recursive", "teacher_forcing": 0.5}), (DeepAR, {"hidden_size": 16})])
def test_resume_is_exact(model, options, tmp_path):
    frame = synthetic(series=4, steps=72, season=12, seed=1)
    def trained(name, parts):
        for resume, steps in parts:
            fitted = model(horizon=6, input_size=12, seed=0, run=tmp_path / name, board=False, checkpoint_every=5, restore_best=False,
                           schedule=None, **options)
            with contextlib.redirect_stdout(io.StringIO()): fitted.fit(frame, steps=steps, resume=resume)
        return fitted
    whole, halves = trained("whole", [(False, 20)]), trained("halves", [(False, 10), (True, 20)])
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(), halves.model.state_dict().values()))


@pytest.mark.parametrize("loss", ["mae", "quantile"])
def test_a_recursive_network_forecasts_by_its_forward(loss, tmp_path):
    frame = synthetic(series=4, steps=72, season=12, seed=1)
    fitted = LSTM(horizon=6, input_size=12, decoder="recursive", loss=loss, hidden_size=8, run=tmp_path / "run", board=False)
    with contextlib.redirect_stdout(io.StringIO()): fitted.fit(frame, steps=5)
    forecast = fitted.predict()
    assert len(forecast) == 24 and np.isfinite(forecast.LSTM).all()
    if loss == "quantile": assert (forecast["LSTM-hi-80"] > forecast["LSTM-lo-80"]).any()


def test_deepar_paths_are_one_batch_and_follow_its_own_distribution():
    torch.manual_seed(0)
    loss, sizes = loss_of("gaussian"), Sizes(3, 12, outputs=2)
    network, given = DeepARNetwork(sizes, hidden_size=8, dropout=0.0).eval(), window(2, 12, 3)
    loc, scale = torch.tensor([[100.0], [-5.0]]), torch.tensor([[10.0], [0.1]])
    paths = network.simulate(given, 20000, loss, loc, scale, torch.Generator().manual_seed(0))
    with torch.no_grad(): mean, deviation = loss.parameters((network(given)[:, :1], loc, scale))
    torch.testing.assert_close(paths[:, :, 0].mean(0), mean[:, 0], rtol=0, atol=0.03)
    torch.testing.assert_close(paths[:, :, 0].std(0), deviation[:, 0], rtol=0.03, atol=0)
    again = network.simulate(given, 20000, loss, loc, scale, torch.Generator().manual_seed(0))
    assert torch.equal(paths, again)


def test_deepar_counts_are_whole_numbers_in_their_own_units():
    torch.manual_seed(0)
    loss = loss_of("negative_binomial")
    network = DeepARNetwork(Sizes(6, 12, outputs=2, locations=(), centre=None), hidden_size=8).eval()
    given, loc, scale = window(3, 12, 6), torch.zeros(3, 1), torch.full((3, 1), 7.0)
    counts = scale * network.simulate(given, 50, loss, loc, scale, torch.Generator().manual_seed(0))
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-3)
    assert counts.min() >= -1e-3
    with pytest.raises(ValueError, match="simulate"): network(given._replace(ahead=None))


def test_deepar_reads_its_lags():
    torch.manual_seed(0)
    network, given = DeepARNetwork(Sizes(12, 24, outputs=2), hidden_size=8, num_layers=1, lags=(12,)).eval(), window()
    far = given.y.clone()
    far[:, 0] += 1  # the lag of the first step that is walked, and of nothing else
    assert not torch.equal(network(given), network(given._replace(y=far)))
    without = DeepARNetwork(Sizes(12, 24, outputs=2), hidden_size=8).lags
    assert network.lags == (1, 12) and without == (1,)


def test_deepar_wants_a_distribution():
    for loss in ("mae", "quantile"):
        with pytest.raises(ValueError, match="is no distribution"): DeepAR(horizon=12, loss=loss)
    for loss in ("gaussian", "student_t", "negative_binomial"): DeepAR(horizon=12, loss=loss)


def test_columns_that_cannot_be_read_are_said():
    with pytest.warns(UserWarning, match="3 known only up to now have no effect"): DeepARNetwork(Sizes(12, 24, past=4, future=1, outputs=2))
    with pytest.warns(UserWarning, match="columns beside it have no effect"): PatchTSTNetwork(Sizes(12, 24, past=2))
    with pytest.warns(UserWarning, match="teacher_forcing has no effect"): LSTMNetwork(Sizes(12, 24), teacher_forcing=0.5)


def test_attention_off_in_eval_is_the_same_twice_and_rows_add_up():
    torch.manual_seed(0)
    network, given = TransformerNetwork(Sizes(12, 24, future=2, past=3, static=1), dropout=0.3), window(past=3, future=2, static=1)
    assert not torch.equal(network(given), network(given))
    maps = looks(network, given)
    assert network.training and torch.allclose(maps.sum(-1), torch.ones(1, 4, 12), atol=1e-5)
    network.eval()
    assert torch.equal(network(given), network(given))
