"""CharLM as a stranger uses it: copies, second fits, other words, odd texts, and the same number through every door."""
import copy
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from arc_nb import Callback, CharLM
from arc_nb.tasks.text.recipe import recipe

SMALL = {"model_dim": 64, "num_layers": 1, "num_heads": 2, "max_seq_len": 16, "dropout": 0.1}
TEXT = "".join(random.Random(0).choices(["the sea ", "was quiet, ", "and a bird ", "sang.\n", "Who? "], k=400))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch): monkeypatch.chdir(tmp_path)


def new(text=TEXT, **settings): return CharLM.from_text(text, **{**SMALL, **settings})


def fitted(*epochs, lm=None, **options):
    lm = lm or new()
    lm.fit(*epochs or (1,), **{"board": False, **options})
    return lm


def losses(lm): return lm.trainer.history.series_by_name["train", "loss"].since(0)[2].tolist()


def test_a_trained_model_can_be_copied_and_sent():
    lm = fitted(output_dir="a")
    for other in (copy.deepcopy(lm), pickle.loads(pickle.dumps(lm)), copy.copy(lm)):
        assert other.trainer is None and other.generate("the", 9, seed=1) == lm.generate("the", 9, seed=1)
        assert other.evaluate() == lm.evaluate()
    before = lm.evaluate()["loss"]
    other = copy.deepcopy(lm)
    fitted(lm=other, output_dir="b")
    assert lm.evaluate()["loss"] == before != other.evaluate()["loss"] and lm.trainer is not None


def test_a_second_fit_has_the_board_that_it_asks_for(capsys):
    lm = fitted(output_dir="a")
    assert "Loss" not in capsys.readouterr().out
    fitted(lm=lm, output_dir="a", board="text")
    assert "Loss" in capsys.readouterr().out and lm.trainer.epoch == 2
    fitted(lm=lm, output_dir="a")
    assert "Loss" not in capsys.readouterr().out and lm.trainer.epoch == 3


def test_loading_takes_the_words_that_reading_takes():
    fitted(output_dir="a").save("x.pt")
    (here_text := Path("t.txt")).write_text(TEXT)
    lm = CharLM.load("x.pt", data=here_text, lr=3e-3, val_split=0.2)
    assert (lm.how.learning_rate, lm.how.val_split) == (3e-3, 0.2)
    for name, value in (("model_dim", 32), ("tokenizer", "byte"), ("vocab_size", 300)):
        with pytest.raises(ValueError, match=f"{name} is settled in x.pt"): CharLM.load("x.pt", data=here_text, **{name: value})
    with pytest.raises(ValueError, match="did you mean 'batch_size'"): CharLM.load("x.pt", bach_size=3)


def test_a_text_of_one_character_has_nothing_to_teach():
    with pytest.raises(ValueError, match="one character only"): CharLM.from_text("a" * 3000, **SMALL)
    assert 0 < fitted(lm=CharLM.from_text("ab" * 500, **SMALL)).evaluate()["loss"] < 0.75


@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.1}, {"tokenizer": "byte"}, {"max_seq_len": 20}])
def test_every_door_gives_the_same_number(more):
    lm = fitted(lm=new(TEXT + "é😀שלום e\u0301 " * 40, **more), output_dir="a")
    scores = lm.evaluate()
    assert lm.trainer.history.latest("valid_loss") == pytest.approx(scores["loss"], abs=1e-5)
    assert CharLM.load("a/best.pt").evaluate(path="a/validation.txt") == pytest.approx(scores, rel=1e-9)
    held = lm.corpus.text("valid")
    assert scores["bits_per_char"] == pytest.approx(scores["loss"] * scores["tokens"] / np.log(2) / (len(held) - 1), rel=1e-9)
    assert lm.trainer.history.latest("valid_bits_per_char") == pytest.approx(scores["bits_per_char"], abs=1e-5)


def test_a_vocabulary_as_large_as_the_window():
    size = new().tokenizer.size
    for smoothing in (0.0, 0.1):
        lm = fitted(lm=new(max_seq_len=size, label_smoothing=smoothing), output_dir=False)
        assert lm.trainer.history.latest("valid_loss") == pytest.approx(lm.evaluate()["loss"], abs=1e-5)


def test_samples_and_generators_leave_no_trace():
    states = lambda: (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    before = states()
    plain, watched = fitted(output_dir="a"), fitted(output_dir="b", sample_every=5)
    watched.generate("the", 20)
    assert losses(plain) == losses(watched)
    assert states() == before
    rows = [json.loads(line) for line in Path("b/samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows][:2] == [5, 10] and rows[0]["text"] != rows[-1]["text"]


class Interrupt(Callback):
    def on_step_end(self, trainer):
        if trainer.step == 7: trainer.controls.stop("interrupted", "interrupted")


def test_a_stopped_run_is_loaded_and_goes_on_as_if_undisturbed():
    whole = fitted(2, output_dir="a")
    fitted(2, output_dir="b", callbacks=[Interrupt()])
    assert CharLM.load("b").generate("the", 5, seed=0)                 # the folder of a run that was stopped in its first epoch
    with pytest.warns(UserWarning, match="callbacks"): back = fitted(2, output_dir="b", resume=True)
    assert losses(back) == losses(whole) and back.evaluate() == whole.evaluate()


def test_early_stopping_leaves_the_best_weights():
    lm = fitted(60, lm=new(TEXT[:900], dropout=0.0), learning_rate=2e-2, early_stopping=True, patience=2, output_dir="a")
    valid = lm.trainer.history.epochs()["valid_loss"]
    assert len(valid) < 60 and lm.evaluate()["loss"] == pytest.approx(valid.min(), abs=1e-5)
    assert CharLM.load("a/best.pt").evaluate(lm.corpus.text("valid"))["loss"] == lm.evaluate()["loss"]


def test_a_recipe_in_a_loop():
    Path("t.txt").write_text(TEXT)
    found = []
    for rate in (1e-3, 1e-2):
        trainer = recipe("t.txt", **SMALL, learning_rate=rate, run=f"r{rate}", board=False)
        trainer.fit(epochs=1)
        found.append(trainer.history.latest("valid_loss"))
    assert found[1] < found[0]


def test_line_ends_are_those_of_files():
    lm = fitted(lm=new(TEXT.replace("\n", "\r\n")), output_dir="a")
    assert "\r" not in lm.tokenizer.alphabet and lm.evaluate(path="a/validation.txt") == lm.evaluate()
