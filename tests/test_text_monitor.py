"""What is measured, shown and said while a language model trains: one number for a text, samples that change nothing, honest speeds."""
import io
import math
import re
import time

import numpy as np
import pytest
import torch

import arc_nb
from arc_nb import Trainer
from arc_nb.diagnose.findings import diagnose
from arc_nb.diagnose.signs import Evidence
from arc_nb.draw.still import board
from arc_nb.engine.callbacks import EarlyStopping, direction
from arc_nb.engine.history import History, Status
from arc_nb.engine.texts import Texts, find_texts
from arc_nb.engine.windows import Windows
from arc_nb.tasks.text.console import Console, results
from arc_nb.tasks.text.monitor import Monitor, Samples
from arc_nb.tasks.text.scores import evaluate
from arc_nb.tasks.text.settings import ModelSettings
from arc_nb.tasks.text.tokens import ByteTokenizer, CharTokenizer
from arc_nb.tasks.text.transformer import Transformer, flops_per_token
from arc_nb.watch.board import Text
from arc_nb.watch.view import Look

TEXT = "the cat sat on the mat; the dog ate the hat.\n" * 60
TOKENIZER = CharTokenizer.fit([TEXT])
IDS = TOKENIZER.encode(TEXT)
SETTINGS = ModelSettings(model_dim=16, num_layers=1, num_heads=2, max_seq_len=32, dropout=0.1, vocab_size=TOKENIZER.size)


def trainer(*callbacks, model=None, **how):
    "A small language model, before its training."
    torch.manual_seed(0)
    model = model or Transformer(SETTINGS)
    settings = {"loss": "cross_entropy", "lr": 3e-3, "batch_size": 16, "seed": 0, "run": False, "board": False} | how
    return Trainer(model, Windows(IDS[:-415], 32), Windows(IDS[-415:], 32, whole=True), callbacks=callbacks, **settings)


def draws():
    "A writer that uses every generator there is."
    return f"{torch.rand(1).item():.3f} {np.random.rand():.3f}"


@pytest.mark.parametrize("batch_size", [1, 5, 13, 64])
def test_the_trainers_valid_loss_is_the_number_that_evaluate_gives(batch_size):
    made = trainer(batch_size=batch_size)
    made.fit(epochs=1)
    scores = evaluate(made.model, IDS[-415:], TOKENIZER, batch_size=3)
    assert scores["tokens"] == 414  # 12 windows and a rest, which is counted once
    assert made.history.latest("valid_loss") == pytest.approx(scores["loss"], abs=2e-6)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert made.evaluate(Windows(IDS[-415:], 32, whole=True))["loss"] == pytest.approx(scores["loss"], abs=2e-6)


def test_every_token_with_a_predecessor_counts_once_and_the_model_stays_as_it_was():
    model = Transformer(SETTINGS).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = evaluate(model, IDS[:100], TOKENIZER)
    model.eval()
    with torch.no_grad():
        whole = [torch.from_numpy(IDS[a:b].astype(np.int64)) for a, b in ((0, 33), (32, 65), (64, 97), (67, 100))]
        losses = [torch.nn.functional.cross_entropy(model(w[None, :-1])[0], w[1:], reduction="none") for w in whole]
    losses[-1] = losses[-1][-3:]  # the last window begins earlier, and three of its targets are new
    assert scores["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5) and scores["tokens"] == 99
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_bits_a_character_do_not_depend_on_what_a_token_is():
    text, bytes_ = "naïve 漢字 " * 30, ByteTokenizer()
    model = Transformer(ModelSettings(model_dim=16, num_layers=1, num_heads=2, max_seq_len=32, vocab_size=256))
    scores = evaluate(model, bytes_.encode(text), bytes_)
    assert scores["characters"] == len(text) - 1 < scores["tokens"]
    assert scores["bits_per_char"] == pytest.approx(scores["loss"] * scores["tokens"] / math.log(2) / scores["characters"])


def test_samples_and_monitor_change_no_bit_of_the_training(tmp_path):
    plain, watched = trainer(), trainer(Monitor(SETTINGS), Samples(3, draws), run=tmp_path / "run")
    plain.fit(epochs=3); watched.fit(epochs=3)
    for name in ("loss", "grad_norm"):
        assert plain.history.series("train", name)[1].tolist() == watched.history.series("train", name)[1].tolist()
    assert plain.history.series("valid", "loss")[1].tolist() == watched.history.series("valid", "loss")[1].tolist()
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), watched.model.parameters()))
    assert watched.model.training == plain.model.training
    assert [one.step for one in watched.texts] == [3, 6, 9, 12, 15]
    assert [one.text for one in watched.texts] == [one.text for one in find_texts(tmp_path / "run")]


def test_a_resumed_run_goes_on_with_its_texts_and_forgets_those_after_its_state(tmp_path):
    trainer(Samples(2, draws), run=tmp_path / "run").fit(epochs=2)
    Texts(tmp_path / "run").add(999, 9, "from a future that did not come")
    again = trainer(Samples(2, draws), run=tmp_path / "run")
    again.fit(epochs=3, resume=True)
    steps = [one.step for one in again.texts]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 15] and [one.step for one in Texts(tmp_path / "run")] == steps


def test_the_board_of_a_folder_shows_the_texts(tmp_path):
    trainer(Samples("1 epoch", lambda: "ROMEO: <b> \x00 &"), run=tmp_path / "run").fit(epochs=2)
    shown = arc_nb.show(tmp_path / "run")
    assert [one.title for one in shown.view().texts] == ["step 10", "step 5"]
    svg = board(shown.view(), "auto")
    assert "ROMEO: &lt;b&gt; � &amp;" in svg and "\x00" not in svg


def test_a_writer_that_fails_or_gives_no_text_ends_the_samples_and_not_the_run():
    for write, why in ((lambda: 1 / 0, "ZeroDivisionError"), (lambda: ["a", "b"], "a list")):
        made = trainer(Samples(2, write))
        with pytest.warns(RuntimeWarning, match=why): made.fit(epochs=1)
        assert made.status.state == "completed" and len(made.texts) == 0
    with pytest.raises(TypeError, match="function"): Samples(5, "ROMEO:")
    with pytest.raises(ValueError, match="not understood"): Samples("now and then", draws)


def test_neither_a_validation_nor_a_slow_writer_slows_the_speed():
    rest = lambda: time.sleep(0.3) or "text"
    plain = trainer(Monitor(SETTINGS))
    plain.fit(epochs=4)
    slow = trainer(Monitor(SETTINGS), Samples(1, rest), valid_every=2)
    slow.fit(epochs=2)
    for row in slow.history.epochs().itertuples():
        assert row.seconds > 1.2  # five pauses in five steps
        assert row.tokens_per_second == pytest.approx(32 * row.samples_per_second)
    fast = np.median(plain.history.epochs().tokens_per_second)
    assert np.median(slow.history.epochs().tokens_per_second) > fast / 6  # with the pauses it would be about a fifteenth


def test_perplexity_and_bits_are_in_the_history_and_can_be_watched():
    made = trainer(Monitor(SETTINGS, characters=2.0), EarlyStopping("valid_perplexity", patience=50))
    frame = made.fit(epochs=2).epochs()
    assert np.allclose(frame.valid_perplexity, np.exp(frame.valid_loss))
    assert np.allclose(frame.valid_bits_per_char, frame.valid_loss / math.log(2) / 2)
    assert direction("valid_bits_per_char") == direction("valid_perplexity") == -1
    alone = Trainer(Transformer(SETTINGS), Windows(IDS, 32), loss="cross_entropy", run=False, board=False, callbacks=[Monitor(SETTINGS)])
    frame = alone.fit(epochs=1).epochs()
    assert np.allclose(frame.train_perplexity, np.exp(frame.train_loss)) and "valid_perplexity" not in frame


def test_mfu_is_the_share_of_the_peak_and_absent_where_nobody_knows_it():
    made = trainer(Monitor(SETTINGS, peak=1e12))
    frame = made.fit(epochs=1).epochs()
    assert frame.mfu.iloc[0] == pytest.approx(frame.tokens_per_second.iloc[0] * flops_per_token(SETTINGS) / 1e12)
    assert "mfu" not in trainer(Monitor(SETTINGS)).fit(epochs=1).epochs()
    made.history.extend(1, "train", [5], {"tokens_per_second": [98_091.0], "mfu": [0.31]})
    cards = {card.title: (card.value, card.unit) for card in Look(made).view().cards}
    assert cards["tokens a second"] == ("98,091", "") and cards["MFU"] == ("31.0", "% of peak") and len(cards) <= 6


LINE = r"Epoch {} completed \| train_loss=\d\.\d{{4}} \| val_loss=\d\.\d{{4}} \| lr=3\.00e-03 \| throughput=\d+ tokens/sec"

def test_a_log_gets_a_line_an_epoch():
    out = io.StringIO()
    trainer(Monitor(SETTINGS), Samples("1 epoch", lambda: "ROMEO:\nWhat"), Console(out)).fit(epochs=2)
    lines = [line for line in out.getvalue().splitlines() if line.startswith("Epoch")]
    assert len(lines) == 2 and all(re.fullmatch(LINE.format(f"{k}/2"), line) for k, line in enumerate(lines, 1)), lines
    assert out.getvalue().count("sample at step") == 2 and "  ROMEO:\n  What\n" in out.getvalue() and "\r" not in out.getvalue()


def test_a_terminal_gets_one_line_that_is_rewritten(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out = io.StringIO()
    trainer(Monitor(SETTINGS), Console(out, inplace=True)).fit(epochs=2)
    said = out.getvalue()
    assert said.count("Epoch 1/2\n") == 1 and said.count("\n") == 4
    last = said.rstrip("\n").split("\r")[-1]
    line = r"\[█{10}\] 100%  \|  train_loss=\S+ \| val_loss=\S+ \| lr=\S+ \| throughput=\d+ (tokens|samples)/sec *"
    assert re.fullmatch(line, last), last


def test_a_stop_is_said_and_the_line_ended():
    class Stops(arc_nb.Callback):
        def on_step_end(self, trainer):
            if trainer.step == 7: trainer.stop()
    out = io.StringIO()
    trainer(Console(out), Stops()).fit(epochs=5)
    assert "Epoch 2/5 ended at step 7 | " in out.getvalue() and out.getvalue().endswith("stopped: trainer.stop()\n")


def test_the_results_are_a_table():
    said = results({"loss": 3.813, "perplexity": 45.2874, "accuracy": 0.1191})
    assert said == "Evaluation results (validation split)\nloss        : 3.8130\nperplexity  : 45.2874\naccuracy    : 0.1191"


def test_the_text_board_prints_a_new_text_once():
    made, out = trainer(Monitor(SETTINGS), Samples(5, lambda: "ROMEO:\nWhat")), io.StringIO()
    made.fit(epochs=1)
    text, look = Text("bar", out), Look(made)
    for _ in range(3): look.curves.read(); text.update(look)
    assert out.getvalue().count("sample at step 5:\n  ROMEO:\n  What\n") == 1 and "/sec" in out.getvalue()


@pytest.mark.slow
def test_texts_come_from_other_processes_too(tmp_path):
    made = trainer(Monitor(SETTINGS), Samples("1 epoch", draws), run=tmp_path / "run")
    made.fit(epochs=2, processes=2)
    assert [one.step for one in made.texts] == [5, 10] and len(find_texts(tmp_path / "run")) == 2
    assert made.history.latest("tokens_per_second")


def losses(*epochs, each=40, start=4.17):
    "A run of this (training, validation) loss after each epoch."
    history, at = History(), np.arange(each * len(epochs) + 1)
    train = np.interp(at, each * np.arange(len(epochs) + 1), [start, *(t for t, _ in epochs)])[1:]
    noisy = train + np.random.default_rng(0).normal(0, 0.02, len(train))
    history.extend(1, "train", at[1:].tolist(), {"loss": noisy.tolist(), "grad_norm": [1.0] * len(train)})
    history.extend(1, "valid", [each * (k + 1) for k in range(len(epochs))], {"loss": [v for _, v in epochs]})
    return Evidence(history, Status("completed", len(train), len(train)))


def between(*known):
    "The losses of ten epochs, from those that the guide's table has."
    return [tuple(float(np.interp(e, [k for k, *_ in known], [row[i] for row in known])) for i in (1, 2)) for e in range(1, 11)]


GUIDE = [("healthy", between((1, 3.2, 3.18), (5, 2.1, 2.09), (10, 1.5, 1.52))), ("healthy", between((1, 3.0, 3.05), (10, 1.5, 1.7))),
         ("overfitting", between((1, 3.2, 3.18), (5, 1.8, 2.2), (10, 0.9, 2.8))), ("overfitting", between((1, 3.0, 3.0), (10, 0.8, 2.5))),
         ("overfitting", [(3.2, 3.18), (2.8, 2.75), (2.5, 2.4), (2.2, 2.15), (1.9, 2.0), (1.6, 2.05), (1.3, 2.18), (1.1, 2.35), (0.9, 2.52),
                          (0.75, 2.68)]),
         ("misconfigured", between((1, 3.2, 3.18), (5, 3.1, 3.22), (10, 3.05, 3.25))), ("misconfigured", [(4.17, 4.17)] * 10),
         ("underfitting", between((1, 3.3, 3.35), (3, 3.05, 3.15), (10, 3.0, 3.1)))]

@pytest.mark.parametrize("name, epochs", GUIDE)
def test_the_guides_patterns_are_named_with_evidence_and_advice(name, epochs):
    found = diagnose(losses(*epochs))
    assert found.pattern.name == name, (found, found.pattern)
    assert found.pattern.meaning and found.pattern.advice and name in found.headline
    assert set(found.pattern.evidence) == {"train", "valid", "gap", "learned"}


def test_bits_that_lie_between_0_and_1_are_no_score():
    seen = losses(*between((1, 3.2, 3.18), (5, 1.8, 2.2), (10, 0.9, 2.8)))
    degree = diagnose(seen)[0].severity
    seen.history.extend(1, "valid", [40 * k for k in range(1, 11)], {"bits_per_char": [0.5] * 10})
    assert diagnose(Evidence(seen.history, seen.status))[0].severity == degree


def test_a_real_run_says_what_its_losses_look_like():
    made = trainer()
    assert made.diagnose().pattern is None
    made.fit(epochs=40)
    found = made.diagnose()
    assert found.pattern.name == "healthy" and "The losses look healthy" in repr(found), found
