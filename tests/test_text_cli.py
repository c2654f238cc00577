"""`arc-nb train`, `generate` and `evaluate` as a stranger types them: what is said, what is kept, and what does not happen in silence."""
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arc_nb.cli import main

pytestmark = pytest.mark.filterwarnings("always")  # a person in a terminal sees them as lines
SMALL = "--model-dim 16 --num-layers 1 --max-seq-len 16"
LINE = "The quick brown fox jumps over the lazy dog; the dog sleeps on. "


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with a text."
    monkeypatch.chdir(tmp_path)
    Path("fox.txt").write_text(LINE * 30)
    return tmp_path


@pytest.fixture
def typed(here, capsys):
    "Runs a command line: exit code, what was printed, what was complained of."
    def go(line):
        code = main(line.split())
        found = capsys.readouterr()
        return code, found.out, found.err
    return go


def test_the_end_of_training_says_how_to_write(typed):
    code, out, _ = typed(f"train fox.txt --output-dir m {SMALL} --epochs 1")
    assert code == 0
    assert "Epoch 1/1 completed | train_loss=" in out and "Evaluation results (validation split)" in out
    assert out.splitlines()[-1] == "It writes with: arc-nb generate m --prompt TEXT"
    assert typed(f"train fox.txt --output-dir n {SMALL} --epochs 1 --quiet")[1] == ""


@pytest.mark.parametrize(("flags", "words"), [
    ("--vocab-size 300", "vocab_size=300 has no effect with tokenizer='char': it needs 'bpe'"),
    ("--strategy zero1", "strategy='zero1' has no effect in one process"),
    ("--patience 3", "patience=3 has no effect"),
    ("--mixed-precision --device cpu", "mixed_precision=True has no effect on cpu"),
])
def test_what_has_no_effect_is_said(typed, flags, words):
    code, _, err = typed(f"train fox.txt --output-dir m {SMALL} --max-steps 1 {flags}")
    assert code == 0 and words in err


@pytest.mark.parametrize(("flags", "code", "words"), [
    ("--processes 999", 2, "processes=999 divide a batch of 16 rows"),
    ("--model-dim 100000000", 2, "this machine has"),
    ("--num-layers 100000000", 2, "this machine has"),
    ("--model-dim 256 --num-heads 7", 2, "1, 2, 4, 8"),
])
def test_what_the_machine_cannot_do_is_refused_before_it_begins(typed, flags, code, words):
    found, _, err = typed(f"train fox.txt --output-dir m --max-seq-len 16 --max-steps 1 {flags}")
    assert found in (code, 3) and words in err and not Path("m").exists()


def test_resume_takes_the_model_of_the_file(typed):
    assert typed(f"train fox.txt --output-dir m {SMALL} --epochs 1")[0] == 0
    for flags, words in (("--tokenizer byte", "tokenizer='byte', but the model in m has 'char'"),
                         ("--model-dim 64", "model_dim=64, but the model in m has 16")):
        code, _, err = typed(f"train fox.txt --output-dir m --resume-from m --epochs 2 {flags}")
        assert code == 2 and words in err
    code, _, err = typed("train fox.txt --output-dir m --resume-from m --epochs 2 --learning-rate 0.5")
    assert code == 2 and "begin a new run without --resume-from" in err and "resume=" not in err
    assert typed("train fox.txt --output-dir m --resume-from m/best.pt --epochs 2 --tokenizer char")[0] == 0


def test_errors_name_what_is_typed(typed):
    Path("latin.txt").write_bytes(b"caf\xe9 " * 90)
    code, _, err = typed("train latin.txt")
    assert code == 3 and "--encoding latin-1 reads it" in err
    assert typed(f"train fox.txt --output-dir m {SMALL} --max-steps 1")[0] == 0
    code, _, err = typed("generate m --prompt FOX --max-tokens 2")
    assert code == 2 and "encode(" not in err and "'F'" in err
    code, _, err = typed("generate m --prompt fox --max-tokens 2 --output-file fox.txt/x")
    assert code == 2 and "cannot be written" in err and "choose another file" in err


def test_a_prompt_may_come_from_a_pipe(typed, monkeypatch):
    assert typed(f"train fox.txt --output-dir m {SMALL} --max-steps 1")[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("The\n"))
    code, out, _ = typed("generate m --max-tokens 2 --greedy")
    assert code == 0 and out.startswith("The") and "prompt:" not in out
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code, _, err = typed("generate m --max-tokens 2")
    assert code == 2 and "--prompt" in err


def test_a_hopeless_loss_stays_readable(typed):
    _, out, _ = typed(f"train fox.txt --output-dir m {SMALL} --max-steps 3 --learning-rate 9")
    assert max(map(len, out.splitlines()[1:])) < 200


def _begun(folder, *more):
    "A training in a process of its own, in the middle of an epoch."
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = ["train", "fox.txt", "--output-dir", "m", *SMALL.split(), "--epochs", "3", "--batch-size", "1", *more]
    code = ("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); import torch; torch.set_num_threads(1)\n"
            "from arc_nb.cli import main; sys.exit(main(sys.argv[1:]))")
    child = subprocess.Popen([sys.executable, "-c", code, *words], cwd=folder, env=environment, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 60
    while not (folder / "m" / "checkpoint_epoch_1.pt").exists() and child.poll() is None and time.monotonic() < until: time.sleep(0.01)
    return child


def _text(typed, model):
    return typed(f"generate {model} --prompt The --max-tokens 30 --seed 1")[1]


def test_sigterm_then_resume_gives_the_text_of_the_undisturbed_run(typed, here):
    Path("fox.txt").write_text(LINE * 80)
    child = _begun(here)
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 143, said
    assert "on with: arc-nb train fox.txt --output-dir m --resume-from m" in said
    assert typed("train fox.txt --output-dir m --resume-from m")[0] == 0
    assert typed(f"train fox.txt --output-dir whole {SMALL} --epochs 3 --batch-size 1")[0] == 0
    assert _text(typed, "m/final_model.pt") == _text(typed, "whole/final_model.pt")


def test_control_c_keeps_the_run(typed, here):
    Path("fox.txt").write_text(LINE * 80)
    child = _begun(here)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 130, said
    assert "interrupted; on with:" in said and (here / "m" / "best.pt").exists()
