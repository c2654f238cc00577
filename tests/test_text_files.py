"""The files of a character model: whole or not there, each enough to write text, each a place to go on from, to the bit."""
import errno
import json
import random
import signal
import subprocess
import sys
import time
import warnings
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from small import On, files, net, saved, until
from test_checkpoint import gifts, spoil, trained
from test_checkpoint import same as same_values
from text_run import CUT, EPOCH, SETTINGS, TEXT, TOKENIZER, TRAINING, digest, make
from victim import outcome, same

import arc_nb.engine.onefile as onefile_room
from arc_nb import EMA, EarlyStopping, Trainer
from arc_nb.engine.checkpoint import FORMAT, read_checkpoint
from arc_nb.engine.onefile import peek_one, read_one, write_one
from arc_nb.engine.packing import read_file
from arc_nb.engine.single import is_single, write_single
from arc_nb.tasks.text.config import read_config
from arc_nb.tasks.text.files import Files, read_lm, resumable, write_lm
from arc_nb.tasks.text.tokens import load_tokenizer
from arc_nb.tasks.text.transformer import Transformer


def stop_at(step): return On(on_step_end=lambda t: t.stop() if t.step == step else None)


def assert_same(a, b): assert [] == [k for k in a if not same(a[k], b[k])]


def models(folder): return {p.name for p in Path(folder).glob("*.pt")}


# ---- one file ----

def test_a_file_is_for_torch_what_it_is_for_us(tmp_path):
    state = trained()
    about = {"step": 3, "epoch": 1, "monitors": {"valid_loss": float("nan")}}
    path = write_one(tmp_path / "x.pt", state, about, {"words": ["a"], "n": (1, 2)})
    told = ("import sys, torch; c = torch.load(sys.argv[1], weights_only=True)\n"
            "print(sorted(c), c['state']['step'], c['extra'], 'arc_nb' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", told, path], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['extra', 'format', 'metadata', 'state'] 3 {'words': ['a'], 'n': (1, 2)} False"
    back, metadata, extra = read_one(path)
    assert same_values(back, {**state, "model": dict(state["model"])}) and extra == {"words": ["a"], "n": (1, 2)}
    assert metadata["step"] == peek_one(path)["step"] == 3 and metadata["format"] == FORMAT and metadata["monitors"] == {"valid_loss": None}
    assert metadata["versions"].keys() >= {"arc_nb", "torch"} and same_values(read_checkpoint(path)[0], back)
    with pytest.raises(ValueError, match="lacks the step"): write_one(path, state, {})


def test_one_flipped_byte_or_a_lost_one_anywhere_is_found(tmp_path):
    rng = random.Random(0)
    path = write_one(tmp_path / "x.pt", trained(), {"step": 3})
    good = path.read_bytes()
    places = [*rng.sample(range(len(good)), 300), *range(len(good) - 120, len(good)), *range(60)]
    bad = [one for place in places for one in spoil(good, place, rng)]
    bad += [good[:k] for k in rng.sample(range(len(good)), 50)] + [b"", good + b"\0", good + good, good[1:]]
    bad += [b"\0" * len(good), b"text " * 99]
    for one in bad:
        path.write_bytes(one)
        for read in (read_one, read_checkpoint, lambda p: net().load_state_dict(read_checkpoint(p)[0]["model"])):
            with pytest.raises(ValueError, match="x.pt"): read(path)
    path.write_bytes(good)
    assert read_one(path)[0]["step"] == 3
    with pytest.raises(FileNotFoundError): read_one(tmp_path / "y.pt")


def resealed(data):
    "A zip file with a right digest at its end."
    end = b"arc_nb sha256 " + sha256(data).hexdigest().encode()
    return data[:-2] + len(end).to_bytes(2, "little") + end


def test_a_forged_file_runs_nothing(tmp_path):
    marker, path = tmp_path / "code-ran", tmp_path / "x.pt"
    for gift in gifts(marker, tmp_path):
        for data in (gift, resealed(gift)):
            path.write_bytes(data)
            for read in (read_one, read_checkpoint, peek_one, read_lm):
                with pytest.raises(ValueError, match="x.pt"): read(path)
    assert not marker.exists()


def test_foreign_later_and_other_files_are_told_apart(tmp_path):
    path = tmp_path / "x.pt"
    def says(words, read=read_one):
        with pytest.raises(ValueError, match=words) as caught: read(path)
        assert str(path) in str(caught.value)
    torch.save({"model_state": {}, "epoch": 3}, path); says("no file of arc_nb"); says("no format number", read_checkpoint)
    path.write_bytes(resealed(path.read_bytes())); says("no format number")
    torch.save({"format": FORMAT + 1}, path); path.write_bytes(resealed(path.read_bytes()))
    says(f"has format {FORMAT + 1}.*update arc_nb"); says("update arc_nb", read_checkpoint)
    write_single(path, {"step": 1}); says("no checkpoint of arc_nb"); says("no checkpoint of arc_nb", read_checkpoint)
    path.write_bytes(write_one(path, trained(), {"step": 1}).read_bytes()[:-500])
    says("its end is missing"); says("its end is missing", read_checkpoint)
    write_one(path, trained(), {"step": 1}); says("a checkpoint in one file", read_file)
    with pytest.raises(ValueError, match="checkpoint in one file"): Trainer.load(path, model=net())
    assert is_single(path) and not is_single(tmp_path) and not is_single(tmp_path / "y")


def test_tied_weights_stay_tied_and_views_do_not_take_the_rest_along(tmp_path):
    model = Transformer(SETTINGS)
    state = {"model": {**model.state_dict(), "head": model.token.weight}, "big": torch.zeros(10**6)[:2]}
    path = write_one(tmp_path / "x.pt", state, {"step": 1})
    back = read_one(path)[0]
    assert back["model"]["head"].data_ptr() == back["model"]["token.weight"].data_ptr() and path.stat().st_size < 60_000


def test_a_kill_in_the_middle_of_a_save_leaves_the_file_before_it(tmp_path):
    script = ("import sys, torch; from arc_nb.engine.onefile import write_one\n"
              "for k in range(10**6): write_one(sys.argv[1], {'model': {'w': torch.full((3_000_000,), float(k))}}, {'step': k})")
    path, rng, steps = tmp_path / "x.pt", random.Random(0), []
    for _ in range(4):
        going = subprocess.Popen([sys.executable, "-c", script, path])
        until(lambda: path.exists() and (not steps or len(list(tmp_path.iterdir())) > 1), "a save")
        time.sleep(rng.uniform(0, .3))
        going.kill(); going.wait()
        state, metadata, _ = read_one(path)
        assert state["model"]["w"].eq(metadata["step"]).all()
        steps.append(metadata["step"])
    assert len(steps) == 4


def test_a_disk_that_refuses_leaves_the_file_before_it(tmp_path, monkeypatch):
    path = write_one(tmp_path / "x.pt", {"model": {}}, {"step": 1})
    monkeypatch.setattr(torch, "save", lambda content, file: (file.write(b"half"), (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))[0])
    with pytest.raises(OSError, match="full"): write_one(path, {"model": {}}, {"step": 2})
    monkeypatch.undo()
    assert peek_one(path)["step"] == 1 and files(tmp_path) == {"x.pt"}


def test_the_trainer_takes_a_file_wherever_it_takes_a_folder(tmp_path):
    whole, parts = make(tmp_path / "whole"), make(tmp_path / "parts")
    whole.fit(epochs=4); parts.fit(epochs=2, plan=4)
    path = parts.save_checkpoint(tmp_path / "new" / "x.pt")
    assert is_single(path) and parts.save_checkpoint(path) == path  # written anew
    again = make(tmp_path / "again")
    with pytest.warns(UserWarning, match="lies outside of its run"): again.fit(epochs=4, resume=str(path))
    assert_same({**outcome(whole), "history": 0}, {**outcome(again), "history": 0})
    other = make(tmp_path / "other")
    other.load_checkpoint(path)
    assert digest(other.model.state_dict()) == digest(parts.model.state_dict()) and other.step == parts.step == 2 * EPOCH
    other.restore(tmp_path / "whole" / "final_model.pt")
    assert digest(other.model.state_dict()) == digest(whole.model.state_dict())
    with pytest.raises(ValueError, match="exists already"): parts.save_checkpoint(tmp_path / "new")


# ---- which file when ----

def test_each_file_says_what_the_history_says(tmp_path):
    t = make(tmp_path / "r", schedule=None, lr=0.08)
    t.fit(epochs=6)
    rows = t.history.epochs()
    assert models(t.path) == {"best.pt", "final_model.pt", *(f"checkpoint_epoch_{k}.pt" for k in range(1, 7))}
    for row in rows.itertuples():
        found = read_lm(t.path / f"checkpoint_epoch_{row.epoch}.pt")
        assert (found.epoch, found.step, found.metrics["valid_loss"]) == (row.epoch, row.epoch * EPOCH, row.valid_loss)
        assert found.metrics["train_loss"] == row.train_loss
    best = rows.loc[rows.valid_loss.idxmin()]
    assert read_lm(t.path).epoch == best.epoch and read_lm(t.path).metrics["valid_loss"] == best.valid_loss
    assert digest(read_lm(t.path / "final_model.pt").weights) == digest(t.model.state_dict())
    assert load_tokenizer(t.path / "tokenizer.json") == TOKENIZER and (t.path / "validation.txt").read_text() == TEXT[CUT:]
    model, training = read_config(t.path / "config.yaml")
    assert model["model_dim"] == 16 and training["batch_size"] == 4
    import pandas as pd
    assert pd.read_csv(t.path / "history.csv").valid_loss.tolist() == pytest.approx(rows.valid_loss.tolist())
    assert not [f for f in files(t.path) if "tmp" in f]


def test_a_file_alone_is_enough_to_use_the_model(tmp_path):
    t = make(tmp_path / "r")
    t.fit(epochs=1)
    alone = tmp_path / "elsewhere.pt"
    (t.path / "best.pt").rename(alone)
    found = read_lm(alone)
    model = Transformer(found.model).eval()
    model.load_state_dict(found.weights)
    ids = torch.from_numpy(found.tokenizer.encode("The quick").astype("int64"))[None]
    with torch.no_grad(): assert model(ids).equal(t.model.eval()(ids))
    assert found.training == TRAINING.to_dict() and found.model == SETTINGS and "epoch 1" in repr(found)


def test_only_so_many_epochs_stay(tmp_path):
    t = make(tmp_path / "r", keep=2)
    t.fit(epochs=5)
    assert models(t.path) == {"best.pt", "final_model.pt", "checkpoint_epoch_4.pt", "checkpoint_epoch_5.pt"}
    t = make(tmp_path / "s", keep=0)
    t.fit(epochs=2)
    assert models(t.path) == {"best.pt", "final_model.pt"}
    for bad in (-1, 1.5):
        with pytest.raises((ValueError, TypeError), match="keep"): make(tmp_path / "t", keep=bad)


def test_a_stop_from_outside_writes_no_file_and_early_stopping_the_final_one(tmp_path):
    t = make(tmp_path / "r", stop_at(EPOCH + 3))
    t.fit(epochs=4)
    assert models(t.path) == {"best.pt", "checkpoint_epoch_1.pt"} and resumable(t.path).name == f"step-{EPOCH + 3:08d}"
    t = make(tmp_path / "s", EarlyStopping(patience=1), schedule=None, lr=.3)
    t.fit(epochs=30)
    assert t.epoch < 30 and t.status.state == "stopped" and read_lm(t.path / "final_model.pt").epoch == t.epoch
    assert f"checkpoint_epoch_{t.epoch}.pt" in models(t.path) and read_lm(t.path).epoch < t.epoch
    again = make(tmp_path / "s", EarlyStopping(patience=1), schedule=None, lr=.3)
    again.fit(epochs=30, resume=t.path / "final_model.pt")
    assert again.step == t.step  # it had decided


def test_without_validation_there_is_no_best_one(tmp_path):
    t = make(tmp_path / "r")
    t.setup.given["valid"] = None
    t = Trainer(Transformer(SETTINGS), t.setup.given["train"], loss="cross_entropy", board=False, run=tmp_path / "s", callbacks=[
        Files(None, TOKENIZER, SETTINGS, {"epochs": 2})])
    t.fit(epochs=2)
    assert models(t.path) == {"final_model.pt", "checkpoint_epoch_1.pt", "checkpoint_epoch_2.pt"}
    assert read_lm(t.path).path.name == "final_model.pt" and read_lm(t.path).training == {"epochs": 2}


def test_files_of_their_own_folder_with_and_without_a_run(tmp_path):
    t = make(tmp_path / "r", folder=tmp_path / "a" / "b")
    t.fit(epochs=1)
    t.fit(epochs=1)  # goes on
    assert len(models(tmp_path / "a" / "b")) == 4 and not models(t.path)
    t = make(False, folder=tmp_path / "c")
    t.fit(epochs=1)
    assert read_lm(tmp_path / "c").epoch == 1
    with pytest.raises(ValueError, match="another training: best.pt.*resume="): make(False, folder=tmp_path / "c").fit(epochs=1)
    with pytest.raises(ValueError, match="needs a folder"): make(False).fit(epochs=1)


def test_watching_changes_nothing(tmp_path):
    "The same losses with the files and without."
    t = make(tmp_path / "r", valid_every=3)
    t.fit(epochs=3)
    plain = Trainer(Transformer(SETTINGS), loss="cross_entropy", run=False, board=False)
    torch.manual_seed(0)
    plain = Trainer(Transformer(SETTINGS), t.setup.given["train"], t.setup.given["valid"], loss="cross_entropy", lr=1e-2, schedule="cosine",
                    batch_size=4, board=False, run=False, valid_every=3)
    plain.fit(epochs=3)
    assert digest(plain.model.state_dict()) == digest(t.model.state_dict())
    losses = [history.frame().query("name == 'loss'").value.tolist() for history in (plain.history, t.history)]
    assert losses[0] == losses[1]


# ---- going on ----

GOALS = {"cosine": {}, "ema": {"callbacks": lambda: [EMA(.9)]}, "one_cycle": {"schedule": "one_cycle"}, "accumulate": {"accumulate": 2},
         "plateau": {"schedule": ("plateau", {"patience": 0})}, "valid every 3": {"valid_every": 3}}
PLANNED = {"cosine", "ema", "one_cycle", "accumulate", "valid every 3"}  # whose schedule ends with the run


@pytest.mark.parametrize("name", GOALS)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_from_any_file_on_it_is_as_if_nothing_had_been(name, elsewhere, tmp_path):
    given = dict(GOALS[name])
    callbacks = given.pop("callbacks", list)
    whole, first = make(tmp_path / "whole", *callbacks(), **given), make(tmp_path / "first", *callbacks(), **given)
    whole.fit(epochs=4)
    first.fit(epochs=3, plan=4 if name in PLANNED else None)
    for file in ("checkpoint_epoch_1.pt", "best.pt", "checkpoint_epoch_2.pt", "final_model.pt"):
        t = make(tmp_path / (f"to {file}" if elsewhere else "first"), *callbacks(), **given)
        t.fit(epochs=4, resume=first.path / file if elsewhere else str(tmp_path / "first" / file))
        assert_same(outcome(whole), outcome(t))
        if not elsewhere: assert t.path == first.path and read_lm(t.path / "checkpoint_epoch_4.pt").step == whole.step


@pytest.mark.parametrize("steps", [EPOCH + 3, 2 * EPOCH, 5])
def test_a_run_of_so_many_steps_goes_on_in_the_middle_of_its_epoch(steps, tmp_path):
    whole, first = make(tmp_path / "whole", schedule=None), make(tmp_path / "first", schedule=None)
    whole.fit(steps=20); first.fit(steps=steps)
    row = first.history.epochs().iloc[-1]
    final = read_lm(first.path / "final_model.pt")
    assert (final.step, final.metrics["valid_loss"]) == (steps, row.valid_loss)
    for file in ("final_model.pt", f"checkpoint_epoch_{first.epoch}.pt"):
        t = make(tmp_path / file, schedule=None)
        t.fit(steps=20, resume=first.path / file)
        assert_same(outcome(whole), outcome(t))


def test_the_best_one_is_never_replaced_by_a_worse_one(tmp_path):
    t = make(tmp_path / "r", schedule=None, lr=3e-2)
    t.fit(epochs=3)
    best = read_lm(t.path / "best.pt")
    worse = make(tmp_path / "r", schedule=None, lr=3.0)
    with pytest.warns(UserWarning): worse.fit(epochs=5, resume="force")
    assert worse.history.epochs().valid_loss.iloc[-1] > best.metrics["valid_loss"] and worse.path == t.path
    assert (t.path / "best.pt").stat().st_mtime < (t.path / "checkpoint_epoch_4.pt").stat().st_mtime
    assert read_lm(t.path / "best.pt").metrics == best.metrics and read_lm(t.path).step == best.step
    (t.path / "best.pt").write_bytes(b"broken")
    with pytest.warns(RuntimeWarning, match="best.pt is damaged"):
        make(tmp_path / "r", schedule=None, lr=3.0).fit(epochs=6, resume=True)
    assert read_lm(t.path / "best.pt").epoch == 6


def test_a_disk_that_refuses_is_told_and_the_next_best_one_is_kept(tmp_path, monkeypatch):
    real, fails = onefile_room.write_one, [2, 3]
    def write(path, state, metadata, extra):
        if metadata["epoch"] in fails: raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, state, metadata, extra)
    monkeypatch.setattr(onefile_room, "write_one", write)
    t = make(tmp_path / "r")
    with pytest.warns(RuntimeWarning, match="could not be written: No space left"): t.fit(epochs=5)
    assert t.status.state == "completed" and models(t.path) == {
        "best.pt", "final_model.pt", "checkpoint_epoch_1.pt", "checkpoint_epoch_4.pt", "checkpoint_epoch_5.pt"}
    assert read_lm(t.path / "best.pt").metrics["valid_loss"] == min(t.history.epochs().valid_loss)


def test_after_an_error_the_files_are_those_of_the_last_epoch(tmp_path):
    def fail(t):
        if t.step == EPOCH + 2: raise OSError("the data are gone")
    t = make(tmp_path / "r", On(on_step_end=fail))
    with pytest.raises(OSError, match="gone"): t.fit(epochs=3)
    assert models(t.path) == {"best.pt", "checkpoint_epoch_1.pt"} and saved(t.path)[0]["step"] == EPOCH + 2
    assert (t.path / "history.csv").exists()


# ---- reading ----

def test_a_folder_gives_the_best_else_the_final_else_the_newest(tmp_path):
    t = make(tmp_path / "r")
    t.fit(epochs=11)
    order = ["best.pt", "final_model.pt", "checkpoint_epoch_11.pt", "checkpoint_epoch_10.pt", "checkpoint_epoch_9.pt"]
    for name in order:
        assert read_lm(t.path).path.name == name
        (t.path / name).unlink()
    for path in t.path.glob("*.pt"): path.unlink()
    found = read_lm(t.path)
    assert found.path.name.startswith("step-") and found.step == 11 * EPOCH and found.tokenizer == TOKENIZER and found.model == SETTINGS
    assert digest(found.weights) == digest(t.model.state_dict()) and read_lm(found.path).step == found.step
    (t.path / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="config.yaml"): read_lm(t.path)
    with pytest.raises(FileNotFoundError, match="has no model"): read_lm(tmp_path)


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    t = make(tmp_path / "r")
    t.fit(epochs=1)
    path, other = t.path / "best.pt", tmp_path / "x.pt"
    state, metadata, extra = read_one(path)
    def says(words, kind=ValueError, at=other):
        with pytest.raises(kind, match=words) as caught: read_lm(at)
        assert str(at) in str(caught.value) and "\n" not in str(caught.value)
    write_one(other, state, metadata); says("of no character model")
    write_one(other, state, metadata, extra | {"version": 2}); says("version 2.*update arc_nb")
    write_one(other, state, metadata, extra | {"model": extra["model"] | {"model_dims": 3}}); says("model_dims")
    write_one(other, state, metadata, extra | {"model": extra["model"] | {"vocab_size": 3}}); says("3 tokens.*do not belong together")
    write_one(other, state, metadata, extra | {"tokenizer": {}}); says("no character model of arc_nb")
    write_one(other, state, metadata, {k: v for k, v in extra.items() if k != "model"}); says("no character model of arc_nb")
    other.write_text(TEXT); says("no file of arc_nb")
    other.write_bytes(path.read_bytes()[:-9]); says("damaged|no file")
    says("did you mean.*best.pt", FileNotFoundError, t.path / "bets.pt")
    says("there is no", FileNotFoundError, tmp_path / "nowhere" / "x.pt")
    path.write_bytes(path.read_bytes()[:900])
    with pytest.warns(RuntimeWarning, match="best.pt is left out"): assert read_lm(t.path).path.name == "final_model.pt"


def test_a_model_alone(tmp_path):
    model = Transformer(SETTINGS)
    path = write_lm(tmp_path / "x.pt", model, TOKENIZER, SETTINGS, {"epochs": 2}, 7, 1, {"valid_loss": 2.5})
    found = read_lm(path)
    assert (found.step, found.epoch, found.metrics, found.training) == (7, 1, {"valid_loss": 2.5}, {"epochs": 2})
    assert digest(found.weights) == digest(model.state_dict())
    with pytest.raises(ValueError, match=r"restore\(.*x.pt'\) takes its weights"): make(tmp_path / "r").fit(epochs=1, resume=path)
    make(False, folder=tmp_path).restore(path)
    from dataclasses import replace
    with pytest.raises(ValueError, match="do not belong together"): write_lm(path, model, TOKENIZER, replace(SETTINGS, vocab_size=3))


def test_the_newest_state_of_all_kinds(tmp_path):
    t = make(tmp_path / "the_run")
    t.fit(epochs=3)
    last = f"step-{3 * EPOCH:08d}"
    assert resumable(t.path).name in (last, "final_model.pt")  # the same state; states say their second, which may be the next one
    assert resumable(t.path / "best.pt") == t.path / "best.pt" and resumable(resumable(t.path)) == resumable(t.path)
    newest = t.path / "checkpoints" / last
    assert newest.is_dir()
    for file in newest.iterdir(): file.write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may never look at the damaged one
        assert resumable(t.path) in {t.path / name for name in ("final_model.pt", "checkpoint_epoch_3.pt", "best.pt")}
    for path in (*t.path.glob("*.pt"), *newest.parent.iterdir()):
        for file in [path] if path.is_file() else path.iterdir(): file.write_bytes(b"")
    with pytest.warns(RuntimeWarning), pytest.raises(FileNotFoundError, match="nothing to go on from"): resumable(t.path)
    with pytest.raises(FileNotFoundError, match="did you mean"): resumable(tmp_path / "the run")


def test_going_back_and_on_again_the_newest_is_what_was_trained_last(tmp_path):
    "After a resume from an early epoch, the files of the epochs that are gone are not the newest."
    t = make(tmp_path / "r", schedule=None)
    t.fit(epochs=4)
    time.sleep(1.1)  # a checkpoint says its second
    back = make(tmp_path / "r", stop_at(2 * EPOCH + 2), schedule=None)
    with pytest.warns(UserWarning, match="without a state of their own"): back.fit(epochs=4, resume=t.path / "checkpoint_epoch_2.pt")
    assert resumable(t.path).name == f"step-{2 * EPOCH + 2:08d}" and back.history.epochs().epoch.max() == 3


# ---- signals and processes ----

def program(folder, *more): return [sys.executable, "tests/text_run.py", str(folder), *map(str, more)]


def ended(folder, number, *more):
    "A training that a signal ended in its middle: its exit code and what it said."
    going = subprocess.Popen(program(folder, *more), stdout=subprocess.PIPE, text=True)
    until(lambda: (folder / "checkpoint_epoch_1.pt").exists(), "the first epoch's file")
    time.sleep(.3)
    going.send_signal(number)
    out = going.communicate(timeout=200)[0]
    return going.returncode, out


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_keeps_the_state_and_it_goes_on_exactly(processes, tmp_path, call):
    folder = tmp_path / "parts"
    code, out = ended(folder, signal.SIGTERM, .05, processes)
    assert code == 143 and out.strip().splitlines()[-1].startswith("terminated")
    status = json.loads((folder / "status.json").read_text())
    newest = resumable(folder)
    assert status["state"] == "terminated" and newest.name == f"step-{status['step']:08d}" and "final_model.pt" not in models(folder)
    assert not list(folder.glob(".*"))
    parts = call(*program(folder, 0, processes)).split()[-3:]
    whole = call(*program(tmp_path / "whole", 0, processes)).split()[-3:]
    assert parts == whole and parts[0] == "completed"


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(kills, tmp_path, call):
    folder, rng = tmp_path / "parts", random.Random(0)
    written = lambda: {p: p.stat().st_mtime_ns for p in folder.glob("*.pt")}
    for _ in range(kills):
        before, going = written(), subprocess.Popen(program(folder, .02), stdout=subprocess.DEVNULL)
        until(lambda going=going, before=before: going.poll() is not None or written() != before, "another file")
        time.sleep(rng.uniform(0, .2))
        going.kill(); going.wait()
        for path in folder.glob("*.pt"): read_lm(path)
    parts, whole = call(*program(folder)).split()[-3:], call(*program(tmp_path / "whole")).split()[-3:]
    assert parts == whole and parts[0] == "completed" and not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_several_processes_write_whole_weights_and_go_on(strategy, tmp_path):
    t = make(tmp_path / "r", strategy=strategy, schedule=None)
    t.fit(epochs=2, processes=2)
    assert models(t.path) == {"best.pt", "final_model.pt", "checkpoint_epoch_1.pt", "checkpoint_epoch_2.pt"}
    found = read_lm(t.path / "final_model.pt")
    assert {k: v.shape for k, v in found.weights.items()} == {k: v.shape for k, v in Transformer(SETTINGS).state_dict().items()}
    assert digest(found.weights) == digest(t.model.state_dict())
    Transformer(found.model).load_state_dict(found.weights)
    first = make(tmp_path / "s", strategy=strategy, schedule=None)
    first.fit(epochs=2, resume=t.path / "checkpoint_epoch_1.pt", processes=2)
    assert digest(read_lm(first.path / "final_model.pt").weights) == digest(found.weights)
