"""The guide's commands, as typed, and a run that is stopped and goes on: character models from the door that people use."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from small import fences, until

from arc_nb import CharLM
from arc_nb.cli import main

SEED = yaml.safe_load((ROOT / "tests/data/text_seed.yaml").read_text())
GUIDE = ROOT / "../shared/seeds/fundamentallm-training.txt"
ARC_NB = str(Path(sys.executable).parent / "arc-nb")
SHAKESPEARE = Path(os.environ["ARC_NB_DATA"]) / "tinyshakespeare.txt"
TEXT = "Once the quick brown fox jumps over the lazy dog. " * 16
FILES = ("data/raw/shakespeare/shakespeare25k.txt", "data/raw/shakespeare/shakespeare100k.txt", "data/raw/shakespeare/shakespeare1mil.txt",
         "data/samples/sample_data.txt", "data.txt")
SMALL = "--model-dim 64 --num-layers 1 --num-heads 2 --max-seq-len 16 --batch-size 8 --epochs 2"


def examples(kind: str) -> list[dict]: return [item for item in SEED if item["kind"] == kind]


def lines_of(text: str) -> list[list[str]]:
    "The words of each line, without comments; a backslash joins lines."
    joined = re.sub(r"\\\s*\n\s*", " ", text)
    return [words for line in joined.splitlines() if (words := shlex.split(line.removesuffix("\\"), comments=True))]


def test_the_examples_are_the_guides():
    if not GUIDE.is_file(): pytest.skip(f"{GUIDE} is not there: the guide is compared where it lies beside the project")
    assert [(item["section"], item["text"]) for item in SEED] == list(fences(GUIDE.read_text()))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    "A folder with the guide's texts."
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(TEXT)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*mixed_precision", "ignore:.*num_heads=16 leaves")
def test_the_guides_commands_run_as_typed(here, capsys):
    "In its order: one command uses what another one made. Smaller sizes go behind; a model that goes on keeps its own."
    run = 0
    for item in examples("command"):
        for _, *words in lines_of(item["text"]):
            smaller = ["--epochs", "3"] if "--resume-from" in words else SMALL.split() if words[0] == "train" else ["--max-tokens", "9"]
            heads = ["--num-heads", words[words.index("--num-heads") + 1]] if "--num-heads" in words and words[0] == "train" else []
            assert main([*words, *smaller, *heads]) == 0, (words, capsys.readouterr().err)
            folder = Path(words[words.index("--output-dir") + 1]) if words[0] == "train" else None
            if folder: assert {"best.pt", "final_model.pt", "tokenizer.json", "config.yaml"} <= {p.name for p in folder.iterdir()}
            run += 1
    assert run == 10 and Path("my_model/checkpoint_epoch_3.pt").is_file()
    assert "Once upon a time" in (said := capsys.readouterr().out) and "val_loss=" in said


@pytest.mark.filterwarnings("ignore:.*mixed_precision", "ignore:.*has no effect", "ignore:.*numbers a head")
@pytest.mark.parametrize("item", [pytest.param(i, id=f"{k}-{i['section']}".replace(" ", "_")) for k, i in enumerate(examples("flags"))])
def test_the_guides_flags_are_taken(item, here, capsys):
    "One step with all flags of an example; of several values for one flag the last counts, and smaller sizes go behind."
    flags = [word for words in lines_of(item["text"]) if words[0].startswith("--") for word in words]
    if "--wandb" in flags: pytest.importorskip("wandb", reason="wandb is not installed: the extra arc_nb[wandb] has it")
    smaller = ["--model-dim", "64", "--num-layers", "1", "--max-seq-len", "16", *["--warmup-steps", "0"] * ("--warmup-steps" in flags)]
    assert main(["train", "data.txt", "--output-dir", "m", "--max-steps", "1", *flags, *smaller]) == 0, capsys.readouterr().err
    if "--tensorboard" in flags: assert list(Path("runs").rglob("events.out.*"))


def test_the_guides_error_for_heads_lists_what_fits(here, capsys):
    [item] = examples("heads")
    good, bad = re.findall(r"model_dim=(\d+), num_heads=(\d+)", item["text"])
    for (dim, heads), code in ((good, 0), (bad, 2)):
        words = f"train data.txt --max-seq-len 16 --max-steps 1 --num-layers 1 --output-dir m --model-dim {dim} --num-heads {heads}"
        assert main(words.split()) == code
    assert "1, 2, 4, 8, 16, 32, 64, 128, 256" in capsys.readouterr().err


def test_the_guides_line_of_a_running_training(here):
    "The bar, rewritten in place, as a terminal shows it."
    [item] = examples("console")
    shape = re.escape(re.sub(r"\d+\.\d+(e-\d+)?|\d+", "N", re.sub("[█░]+", "BAR", item["text"].splitlines()[1])))
    shape = shape.replace("BAR", "[█░]{10}").replace("N", r"[\d.]+(?:e-\d+)?").replace(r"\ ", " +")
    import pty
    parent, child = pty.openpty()
    Path("data.txt").write_text(TEXT * 60)  # more than a second an epoch: the speed is told about four times a second
    words = [ARC_NB, "train", "data.txt", "--output-dir", "m", *SMALL.split()]
    running = subprocess.Popen(words, stdout=child, stderr=child, stdin=subprocess.DEVNULL,
                               env={**os.environ, "COLUMNS": "120"})  # a narrow terminal has shorter words
    os.close(child)
    said = b""
    try:
        while part := os.read(parent, 4096): said += part
    except OSError: pass  # the terminal is closed
    os.close(parent)
    assert running.wait() == 0, said.decode()
    found = said.decode()
    assert re.search(r"Epoch 1/2\s", found) and re.search(shape, found), (shape, found)


def test_stopped_by_a_signal_resumed_generates_and_scores_the_same(here, capsys):
    "SIGTERM in the middle of an epoch; then the same text and the same scores, to the last digit, as of a run that nobody stopped."
    def answer(*words: str) -> str:
        assert main([*words]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    sizes = "--model-dim 64 --num-layers 2 --max-seq-len 16 --batch-size 4 --epochs 4 --lr-schedule cosine --seed 3".split()
    Path("data.txt").write_text(TEXT * 8)
    running = subprocess.Popen([ARC_NB, "train", "data.txt", "--output-dir", "stopped", *sizes], stdout=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    until(lambda: Path("stopped/checkpoint_epoch_1.pt").exists())
    running.send_signal(signal.SIGTERM)
    said = running.communicate()[0]
    assert running.returncode == 143 and "--resume-from stopped" in said and not Path("stopped/final_model.pt").exists()
    answer("train", "data.txt", "--output-dir", "stopped", "--resume-from", "stopped", "--epochs", "4")
    answer("train", "data.txt", "--output-dir", "whole", *sizes)
    for name in ("best.pt", "final_model.pt"):
        more = "--prompt the --max-tokens 80 --seed 1".split()
        texts = [answer("generate", f"{run}/{name}", *more) for run in ("stopped", "whole")]
        assert texts[0] == texts[1] and len(texts[0]) > 80
    for run in ("stopped", "whole"): answer("evaluate", f"{run}/final_model.pt", f"{run}/validation.txt", "--output", f"{run}.json")
    assert json.loads(Path("stopped.json").read_text()) == json.loads(Path("whole.json").read_text())
    assert Path("stopped/history.csv").read_text().count("\n") == Path("whole/history.csv").read_text().count("\n")


def needs_shakespeare() -> None:
    if not SHAKESPEARE.is_file(): pytest.skip(f"{SHAKESPEARE} is not there: ARC_NB_DATA names the folder with tinyshakespeare.txt")


def test_every_door_gives_one_number(tmp_path):
    "The board's validation loss, evaluate on what was held out, the command's on the file of it: over all characters of a real text."
    needs_shakespeare()
    (tmp_path / "some.txt").write_text(SHAKESPEARE.read_text()[:60_000])
    lm = CharLM.from_file(tmp_path / "some.txt", model_dim=64, num_layers=1, max_seq_len=48, label_smoothing=0.1)
    history = lm.fit(max_steps=60, batch_size=12, learning_rate=3e-3, output_dir=tmp_path / "m", board=False)
    run = tmp_path / "m"
    assert main(["evaluate", f"{run}/final_model.pt", f"{run}/validation.txt", "--output", f"{tmp_path}/s.json"]) == 0
    numbers = [history.latest("valid_loss"), lm.evaluate()["loss"], json.loads((tmp_path / "s.json").read_text())["loss"]]
    assert max(numbers) - min(numbers) < 1e-5 and 2 < numbers[0] < 3.2
    assert lm.evaluate()["tokens"] == 5_999


@pytest.mark.slow
def test_tiny_shakespeare_is_learned_as_well_as_nanogpt_does():
    "The whole run of bench/shakespeare.py: some minutes."
    needs_shakespeare()
    from bench.shakespeare import trained
    assert trained("cpu")["scores"]["loss"] <= 1.88


def test_the_stored_run_of_tiny_shakespeare():
    "What the tutorial draws is a run with the settings of the published one, over all held-out characters."
    found = json.loads((ROOT / "bench/results/shakespeare.json").read_text())["cpu"]
    wanted = {"num_layers": 4, "num_heads": 4, "model_dim": 128, "max_seq_len": 64, "batch_size": 12, "max_steps": 2000,
              "learning_rate": 1e-3, "min_lr": 1e-4, "lr_schedule": "cosine", "warmup_steps": 100, "beta2": 0.99, "dropout": 0.0}
    assert wanted.items() <= found["settings"].items() and found["scores"]["tokens"] == 111_539
    assert found["scores"]["loss"] <= found["published"] == 1.88
    assert found["curves"]["valid_loss"][-1][1] == pytest.approx(found["scores"]["loss"], abs=1e-3)
