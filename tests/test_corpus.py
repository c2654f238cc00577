"""Texts become corpora: split without overlap, in memory and in a file, found again, whole or not at all; what is no text is refused."""
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from arc_nb import Trainer
from arc_nb.tasks.text.augment import Augment
from arc_nb.tasks.text.corpus import Corpus
from arc_nb.tasks.text.reading import Source, normalise_whitespace, normalised, read_pieces
from arc_nb.tasks.text.tokens import ByteTokenizer, CharTokenizer, UnknownCharacters

WORDS = ["the", "King", "Tale; so", "naïve", "crown,", "night", "…", "😀", "moon.", "blood"]


def tale(number=4000, seed=0):
    """Words in documents of some lines."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" "] * 9 + ["\n", "\n\n"]) for _ in range(number))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tale.txt"
    path.write_text(tale(), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
@pytest.mark.parametrize("split_by", ["position", "document"])
@pytest.mark.parametrize("val_split", [0, .1, .37])
def test_memory_and_file_hold_the_same(file, tmp_path, kind, split_by, val_split, monkeypatch):
    if kind == "bpe": pytest.importorskip("tokenizers")
    options = dict(val_split=val_split, split_by=split_by, seed=1) | ({"vocab_size": 280} if kind == "bpe" else {})
    held = Corpus.from_files(file, kind, **options)
    monkeypatch.setattr("arc_nb.tasks.text.tokenised.PIECE", 1000)
    monkeypatch.setattr(read_pieces, "__defaults__", ("utf-8", 777))
    large = Corpus.from_files(file, kind, limit=10, folder=tmp_path / "corpora", **options)
    assert large.digest == held.digest and large.chars == held.chars and large.tokenizer == held.tokenizer
    assert isinstance(large.train, np.memmap) and np.array_equal(large.train, held.train)
    assert (held.valid is None) == (not val_split) and set(held.chars) == ({"train", "valid"} if val_split else {"train"})
    if split_by == "position":
        assert held.text("train") + (held.text("valid") if val_split else "") == tale()
        if val_split: assert held.chars["train"] == int(len(tale()) * (1 - val_split))


def test_documents_are_on_one_side_with_their_copies():
    texts = [f"Document {k % 60}. {'x' * (k % 60)}" for k in range(90)]
    random.Random(0).shuffle(texts)
    for seed in range(5):
        corpus = Corpus.from_text("\n\n".join(texts), split_by="document", val_split=.25, seed=seed)
        train, valid = (corpus.text(split).split("\n\n") for split in ("train", "valid"))
        train, valid = {t for t in train if t}, {t for t in valid if t}
        assert not train & valid and train | valid == set(texts) and len(valid) == 15
    one, two = (Corpus.from_text(texts, split_by="document", seed=seed).text("valid") for seed in (0, 1))
    assert one != two and one == Corpus.from_text(texts, split_by="document", seed=0).text("valid")


def test_several_files_are_documents(tmp_path):
    paths = []
    for k in range(4):
        paths.append(tmp_path / f"{k}.txt")
        paths[-1].write_text(f"tale number {k}, long enough")
    corpus = Corpus.from_files(paths, split_by="document", val_split=.25, separator="\n\n---\n\n")
    assert corpus.text("valid").strip("\n-") in [p.read_text() for p in paths] and len(corpus.source) == 4 and "1 more" in repr(corpus)
    assert Corpus.from_files(paths, val_split=0).text() == "\n\n".join(p.read_text() for p in paths)


def test_tiny_shakespeare_is_divided_as_nanogpt_does():
    path = Path(os.environ.get("ARC_NB_DATA", "../shared/data")) / "tinyshakespeare.txt"
    if not path.exists(): pytest.skip(f"{path} is not here")
    corpus = Corpus.from_files(path)
    text = path.read_text()
    assert corpus.tokenizer.size == 65 and corpus.chars == {"train": 1_003_854, "valid": 111_540}
    assert corpus.text("valid") == text[int(.9 * len(text)):] and corpus.train.dtype == np.uint8


def test_a_folder_is_found_again_and_a_changed_file_makes_another(file, tmp_path, monkeypatch):
    make = lambda **more: Corpus.from_files(file, limit=10, folder=tmp_path / "c", **more)
    first = make()
    monkeypatch.setattr("arc_nb.tasks.text.corpus.survey", lambda *_: pytest.fail("it was read again"))
    assert make().folder == first.folder and make().digest == first.digest
    monkeypatch.undo()
    assert make(val_split=.2).folder != first.folder and make(tokenizer="byte").folder != first.folder
    file.write_text(tale(seed=1), encoding="utf-8")
    assert make().folder != first.folder and make().digest != first.digest


@pytest.mark.parametrize("harm", ["cut", "changed", "note", "gone", "tokenizer"])
def test_a_damaged_folder_is_made_anew(file, tmp_path, harm):
    make = lambda: Corpus.from_files(file, limit=10, folder=tmp_path / "c")
    first = make()
    digest, tokens = first.digest, first.folder / "train.bin"
    content = tokens.read_bytes()
    if harm == "cut": tokens.write_bytes(content[:-100])
    elif harm == "changed": tokens.write_bytes(content[:50] + bytes(100) + content[150:])
    elif harm == "note": (first.folder / "corpus.json").write_text("{")
    elif harm == "gone": tokens.unlink()
    else: (first.folder / "tokenizer.json").write_text("[]")
    with pytest.warns(UserWarning, match="damaged"): again = make()
    assert again.digest == digest and make().digest == digest and [p.name for p in (tmp_path / "c").iterdir()] == [first.folder.name]


def test_a_killed_process_leaves_no_half_corpus(file, tmp_path):
    """Killed in the middle of writing: the next call makes it, and what was half-written goes."""
    code = textwrap.dedent(f"""
        import time
        import arc_nb.tasks.text.corpus as room
        parts = room.Recipe.parts
        def slow(self, *args):
            for k, part in enumerate(parts(self, *args)):
                yield part
                if k == 1: print("writing", flush=True); time.sleep(60)
        room.Recipe.parts = slow
        room.Corpus.from_files({str(file)!r}, split_by="document", limit=10, folder={str(tmp_path / "c")!r})
    """)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert [p.suffix for p in (tmp_path / "c").iterdir()] == [".tmp"]
    made = Corpus.from_files(file, split_by="document", limit=10, folder=tmp_path / "c")
    assert [p.name for p in (tmp_path / "c").iterdir()] == [made.folder.name]
    assert made.digest == Corpus.from_files(file, split_by="document").digest


@pytest.mark.parametrize("content,told", [
    (b"", "is empty"), (b"\x89PNG\r\n\x1a\n\0\0", "NUL byte at byte 8"), ("…".encode()[:2], "is the file whole"),
    ("naïve\n".encode("latin-1") * 9, 'line 1. encoding="latin-1" reads it'),
    ("“naïve”\n".encode("cp1252"), 'encoding="cp1252" reads it'), ("tale".encode("utf-16"), 'encoding="utf-16"')])
def test_what_is_no_text_is_refused(tmp_path, content, told):
    path = tmp_path / "some.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=told): Corpus.from_files(path)
    with pytest.raises(ValueError, match=told): Corpus.from_files(path, limit=0, folder=tmp_path / "c")
    assert not (tmp_path / "c").exists() or not any((tmp_path / "c").iterdir())


def test_a_place_in_a_large_file_is_told_exactly(tmp_path):
    path = tmp_path / "some.txt"
    path.write_bytes(("naïve line\n" * 300_000).encode() + b"caf\xe9\n")
    told = "byte 0xe9 at byte 3,600,003, in line 300,001. What stands before it is utf-8"
    with pytest.raises(ValueError, match=told): Corpus.from_files(path)
    path.write_bytes(b"plain line\n" * 300_000 + b"\0")
    with pytest.raises(ValueError, match="NUL byte at byte 3,300,000"): Corpus.from_files(path)


def test_settings_are_checked_before_anything_is_read(file, tmp_path):
    for options, told in (({"val_split": 1}, "val_split=1"), ({"val_split": -.1}, "val_split"), ({"val_split": True}, "val_split"),
                          ({"split_by": "documents"}, "Did you mean 'document'"), ({"tokenizer": "chars"}, "char"),
                          ({"encoding": "utf9"}, "utf9"), ({"encoding": "hex"}, "hex"),
                          ({"split_by": "document", "separator": ""}, "separator"),
                          ({"split_by": "document", "separator": "@@"}, "split_by='position'")):
        with pytest.raises(ValueError, match=told): Corpus.from_files(file, **options)
    with pytest.raises(FileNotFoundError, match="did you mean tale.txt"): Corpus.from_files(tmp_path / "tail.txt")
    with pytest.raises(IsADirectoryError, match="is a folder"): Corpus.from_files(tmp_path)
    with pytest.raises(ValueError, match="no file"): Corpus.from_files([])
    with pytest.raises(TypeError, match="a text is a str"): Corpus.from_text([b"abc"])
    with pytest.raises(ValueError, match="max_seq_len=5000 needs 5,001"): Corpus.from_files(file).windows(5000)
    with pytest.raises(ValueError, match="held-out text has"): Corpus.from_files(file, val_split=.001).check(256)
    with pytest.raises(ValueError, match="this corpus has train"): Corpus.from_text("abc", val_split=0).text("valid")


def test_a_given_tokenizer_and_unknown_characters(file):
    tokenizer = CharTokenizer.fit("the king naïve")
    with pytest.raises(UnknownCharacters): Corpus.from_files(file, tokenizer, val_split=0)
    with pytest.warns(UserWarning, match="left out"): corpus = Corpus.from_files(file, tokenizer, val_split=0, unknown="skip")
    assert corpus.chars["train"] == len(tale()) and len(corpus.train) < len(tale()) and corpus.tokenizer is tokenizer


def test_blanks_in_pieces_are_the_blanks_of_the_whole():
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice("ab \t\n\r…") for _ in range(40))
        for size in (1, 2, 7):
            assert "".join(normalised(text[k:k + size] for k in range(0, 40, size))) == normalise_whitespace(text), repr(text)
        assert normalise_whitespace(normalise_whitespace(text)) == normalise_whitespace(text)
    assert Corpus.from_text("a  b\n\n\n\nc " * 9, normalise=True, val_split=0).text().startswith("a b\n\nc a b")
    assert list(Source.of_text(["a\n\n b", "c"]).documents()) == ["a", " b", "c"]


class Table(nn.Module):
    def __init__(self, size): super().__init__(); self.weights = nn.Embedding(size, size)
    def forward(self, x): return self.weights(x)


def test_an_augmented_run_resumes_and_divides_to_the_same(file, tmp_path):
    corpus = Corpus.from_files(file)
    augment = Augment(corpus.tokenizer, case=.1, punctuation=.2, whitespace=.1)

    def make(run=False):
        torch.manual_seed(0)
        train, valid = corpus.windows(40, augment=augment)
        return Trainer(Table(corpus.tokenizer.size), train, valid, loss=("cross_entropy", {"class_dim": -1}), lr=1e-2, run=run, board=False)

    whole, parts = make(), make(tmp_path / "run")
    whole.fit(epochs=2)
    parts.fit(steps=7)
    again = make(tmp_path / "run")
    again.fit(epochs=2, resume=True)
    assert torch.equal(whole.model.weights.weight, again.model.weights.weight)
    losses = make().fit(epochs=2, processes=2).epochs().train_loss.tolist()
    assert losses == pytest.approx(whole.history.epochs().train_loss.tolist(), rel=1e-5)


def test_augmentation_takes_tokens_of_the_same_kind_only():
    text = tale()
    for tokenizer in (CharTokenizer.fit(text), ByteTokenizer()):
        augment, ids = Augment(tokenizer, case=1, punctuation=1, whitespace=1), tokenizer.encode(text)[None, :3000]
        changed = augment(ids, np.array([0]), 5)
        assert changed.dtype == ids.dtype and changed.max() < tokenizer.size and (changed != ids).any()
        before, after = tokenizer.decode(ids[0]), tokenizer.decode(changed[0])
        for a, b in zip(before, after, strict=True):
            assert (a.isspace(), a.isalpha()) == (b.isspace(), b.isalpha()) and (a.lower() == b.lower() or not a.isalpha())
    for wrong in (-.1, 1.5, "x", True):
        with pytest.raises(ValueError, match="is a probability"): Augment(ByteTokenizer(), case=wrong)


@pytest.mark.slow
def test_300_mb_train_in_bounded_memory(tmp_path):
    """What the process holds for itself, beyond what torch needs, stays far below the size of the text."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "bench/corpus.py", "--one", "300"], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1])
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{time.perf_counter() - began:.0f} s", found)
    assert found["tokenised"]["memory_mb"] < 100 and found["epoch"]["memory_mb"] < 50 and found["found_again_seconds"] < 2
