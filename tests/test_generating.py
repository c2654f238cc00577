"""Generating: what a seed stands for, what a context costs, and the panel and the prompt around it."""
import asyncio
import copy
import itertools
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

from arc_nb.tasks.text.beams import beam_search
from arc_nb.tasks.text.chatting import Chat, interactive
from arc_nb.tasks.text.context import Context
from arc_nb.tasks.text.generating import OPTIONS, gathered, generate, stream
from arc_nb.tasks.text.play import CONTROLS, play
from arc_nb.tasks.text.sampling import RANGES, Sampling, kept
from arc_nb.tasks.text.settings import ModelSettings
from arc_nb.tasks.text.tokens import ByteTokenizer, CharTokenizer, UnknownCharacters
from arc_nb.tasks.text.transformer import Transformer

LETTERS = "\n abcdefghijklmnop"


def build(positions="learned", size=18, length=24, norm="rms", spread=0.5):
    "A model that is sure of some things, with dropout, in training."
    torch.manual_seed(0)
    settings = ModelSettings(model_dim=16, num_layers=2, num_heads=2, max_seq_len=length, dropout=0.3, positions=positions, norm=norm,
                             vocab_size=size, tied=False)
    model = Transformer(settings)
    torch.nn.init.normal_(model.token.weight, std=spread)
    torch.nn.init.normal_(model.head.weight, std=spread)
    return model.train()


@pytest.fixture
def letters(): return CharTokenizer.fit([LETTERS])


@pytest.fixture
def model(): return build()


class Small:
    "The least that a panel and a prompt need."
    def __init__(self, model, tokenizer): self.model, self.tokenizer = model, tokenizer
    def stream(self, prompt, **options): return stream(self.model, self.tokenizer, prompt, **gathered(options))
    def generate(self, prompt, **options): return generate(self.model, self.tokenizer, prompt, **gathered(options))


WAYS = [Sampling(), Sampling(temperature=0), Sampling(temperature=0.7, top_k=5), Sampling(top_p=0.8, min_p=0.02),
        Sampling(temperature=1.4, repetition_penalty=1.3)]


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way.options))
def test_one_seed_one_text(letters, positions, way):
    "With a cache, without, alone or among others, and past the model's length: the same text."
    model = build(positions)
    texts = {cache: generate(model, letters, "abc", 60, sampling=way, seed=5, cache=cache) for cache in (True, False)}
    many = generate(model, letters, "abc", 60, sampling=way, seed=5, num_samples=3)
    assert texts[True] == texts[False] == many[0] and len(texts[True]) == 63
    assert "abc" + "".join(stream(model, letters, "abc", 60, sampling=way, seed=5)) == texts[True]
    if way != Sampling(temperature=0): assert len(set(many)) == 3 and generate(model, letters, "abc", 60, sampling=way, seed=6) != many[0]


@pytest.mark.parametrize("length", [2, 3, 24])
@pytest.mark.parametrize("prompt", ["", "a", "abcdefghijklmnopabcdefghijklmnop"])
def test_every_length_of_prompt_and_window(letters, length, prompt):
    model = build(length=length)
    assert generate(model, letters, prompt, 30, seed=1) == generate(model, letters, prompt, 30, seed=1, cache=False)
    context = Context(model, torch.ones(1, 40, dtype=torch.int64))
    assert context.window.shape[1] == max(1, length // 2)


def test_nothing_is_left_behind(letters, model):
    "Modes, gradients and generators are as before, also in the middle of a stream and after an error."
    model.blocks[0].eval()
    modes = [part.training for part in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    pieces = stream(model, letters, "abc", 50, seed=1)
    next(pieces)
    assert [part.training for part in model.modules()] == modes and torch.is_grad_enabled()
    generate(model, letters, num_samples=2, max_new_tokens=10); beam_search(model, letters, "a", 5)
    with pytest.raises(UnknownCharacters): generate(model, letters, "Z")
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()           # and it can still be trained


def test_stop_strings_are_never_seen(letters, model):
    "For every stop string that a text contains: the text ends in front of it, and no piece shows a part of it."
    whole = generate(model, letters, "abc", 80, seed=3)[3:]
    for start, size in itertools.product((0, 1, 7, 30, 60), (1, 2, 5)):
        stop = whole[start:start + size]
        want = whole[:whole.find(stop)]
        pieces = list(stream(model, letters, "abc", 80, seed=3, stop=stop))
        assert "".join(pieces) == want and generate(model, letters, "abc", 80, seed=3, stop=[stop, "none"]) == "abc" + want
        assert generate(model, letters, "abc", 80, seed=3, stop=stop, num_samples=2)[0] == "abc" + want
    begun = whole[-3:] + "!"                                                # begun at the very end, never finished
    assert "".join(stream(model, letters, "abc", 80, seed=3, stop=begun)) == whole


def test_bytes_come_as_whole_characters():
    model, tokenizer = build(size=256, spread=0.05), ByteTokenizer()
    pieces = list(stream(model, tokenizer, "é", 120, seed=0))
    assert "é" + "".join(pieces) == generate(model, tokenizer, "é", 120, seed=0)
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode("".join(pieces)))


def test_a_compiled_model_and_bf16(letters, model):
    low = copy.deepcopy(model).bfloat16()
    assert len(generate(low, letters, "abc", 40, seed=1)) == 43
    compiled = torch.compile(model, backend="eager")
    assert generate(compiled, letters, "abc", 20, seed=1) == generate(model, letters, "abc", 20, seed=1)


# ---------------------------------------------------------------- sampling

def by_hand(logits, way):
    "The rules, written as loops over one row."
    scores = [v / way.temperature for v in logits]
    top = max(scores)
    weights = [np.exp(v - top) for v in scores]
    chances = {i: w / sum(weights) for i, w in enumerate(weights)}
    order = sorted(chances, key=lambda i: (-chances[i], i))
    if way.top_k: order = order[:way.top_k]
    share = sum(chances[i] for i in order)
    chances = {i: chances[i] / share for i in order}
    held, total = [], 0.0
    for i in order:
        if way.top_p < 1 and total >= way.top_p * (1 - 1e-9): break
        held.append(i); total += chances[i]
    held = [i for i in held if chances[i] >= way.min_p * chances[order[0]]]
    share = sum(chances[i] for i in held)
    return [chances[i] / share if i in held else 0.0 for i in range(len(logits))]


def test_filters_against_loops():
    rng = np.random.default_rng(0)
    for _ in range(200):
        logits = np.round(rng.normal(size=12) * 3, 1)                       # rounded: ties come up
        way = Sampling(temperature=float(rng.choice([0.3, 1.0, 2.0])), top_k=[None, 1, 3, 12, 50][rng.integers(5)],
                       top_p=float(rng.choice([0.1, 0.5, 0.9, 1.0])), min_p=float(rng.choice([0.0, 0.05, 0.5])))
        found = way.probabilities(torch.tensor(logits)[None])[0].numpy()
        np.testing.assert_allclose(found, by_hand(logits, way), atol=1e-12)
        assert found.sum() == pytest.approx(1) and way.draw(torch.tensor(logits)[None]).item() in np.flatnonzero(found)


def test_extreme_logits_and_temperatures():
    logits = torch.tensor([[1e4, 0.0, -1e4, float("-inf")]])
    for temperature in (1e-300, 1e-9, 1.0, 1e9):
        chances = Sampling(temperature=temperature).probabilities(logits)
        assert chances.isfinite().all() and chances[0, 3] == 0 and float(chances.sum()) == pytest.approx(1)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"): Sampling().draw(torch.tensor([[0.0, bad]]))
    with pytest.raises(ValueError, match="not finite"): Sampling().draw(torch.full((1, 4), float("-inf")))
    assert (kept(torch.full((1, 4), 0.25), top_p=1e-12) > 0).sum() == 1


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", -0.1), ("temperature", float("inf")), ("temperature", "hot"), ("temperature", True), ("top_k", 0), ("top_k", 2.5),
    ("top_k", True), ("top_p", 0), ("top_p", 1.1), ("min_p", 1), ("min_p", -0.1), ("repetition_penalty", 0), ("greedy", 1)])
def test_ranges(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*is not possible: take "): Sampling(**{name: value})


def test_what_has_no_effect_is_said(letters, model):
    with pytest.warns(UserWarning, match="top_k=5 has no effect"): Sampling(greedy=True, top_k=5)
    with pytest.warns(UserWarning, match="top_p=0.9 has no effect"): Sampling(temperature=0, top_p=0.9)
    with pytest.warns(UserWarning, match="top_k=50 keeps all 18 tokens"): generate(model, letters, "a", 2, sampling=Sampling(top_k=50))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampling(greedy=True, repetition_penalty=1.2); Sampling(temperature=0)


def test_a_penalty_sees_the_window(letters):
    "The penalty makes texts less repetitive, whatever the sign of the logits."
    model = build(spread=0.9)
    plain, pushed = (generate(model, letters, "a", 18, sampling=Sampling(greedy=True, repetition_penalty=p)) for p in (1.0, 1e6))
    assert len(set(pushed)) > len(set(plain))


def test_errors_before_anything_is_computed(letters, model):
    model.forward = None                                                     # would fail, if it were called
    for options, said in [(dict(max_new_tokens=-1), "max_new_tokens=-1"), (dict(max_new_tokens=1.5), "whole number"),
                          (dict(num_samples=0), "num_samples=0"), (dict(beams=0), "beams=0"),
                          (dict(beams=2, num_samples=3), "at most 2 texts"), (dict(seed="a"), "seed='a'"),
                          (dict(beams=2, sampling=Sampling(top_k=3)), "does not go together"), (dict(stop=["a", ""]), "empty text"),
                          (dict(device="cuda:77"), "cuda:77"), (dict(device="tpu9"), "tpu9")]:
        with pytest.raises(ValueError, match=said): generate(model, letters, "abc", **options)
    for call in (generate, stream):
        with pytest.raises(UnknownCharacters, match="'Z'"): call(model, letters, "aZ")
        with pytest.raises(TypeError, match="no text"): call(model, letters, None)
        with pytest.raises(ValueError, match="18 tokens and the tokenizer 256"): call(model, ByteTokenizer(), "a")


def test_options_by_name():
    assert set(RANGES) < set(OPTIONS) and set(CONTROLS) < set(OPTIONS)
    assert all(OPTIONS[name][0] == getattr(Sampling(), name) for name in RANGES)
    for wrong, said in [({"temprature": 1}, "Did you mean 'temperature'"), ({"max_tokens": -1}, "max_new_tokens=-1"),
                        ({"top_p": 3}, "top_p=3")]:
        with pytest.raises(ValueError, match=said): gathered(wrong)


# ---------------------------------------------------------------- beams

@pytest.mark.parametrize("beams", [1, 3, 8])
def test_beams_with_and_without_a_cache(letters, beams):
    model = build(spread=0.3)
    found, slow = (beam_search(model, letters, "abc", 40, beams=beams, cache=cache) for cache in (True, False))
    assert [b.text for b in found] == [b.text for b in slow] and len(found) == beams and len({b.text for b in found}) == beams
    assert [b.score for b in found] == sorted((b.score for b in found), reverse=True)
    if beams == 1: assert "abc" + found[0].text == generate(model, letters, "abc", 40, sampling=Sampling(greedy=True))
    else: assert generate(model, letters, "abc", 40, beams=beams, num_samples=2) == ["abc" + b.text for b in found[:2]]


def test_logprob_is_the_models(letters):
    model = build(spread=0.3).eval()
    beam = beam_search(model, letters, "abc", 12, beams=4)[0]
    ids = torch.tensor(letters.encode("abc" + beam.text).astype("int64"))[None]
    with torch.no_grad(): chances = model(ids).double().log_softmax(-1)
    want = sum(float(chances[0, k, ids[0, k + 1]]) for k in range(2, 14))
    assert beam.logprob == pytest.approx(want, abs=1e-4) and beam.tokens == 12


def test_beams_end_at_stop_strings(letters):
    model = build(spread=0.2)
    found = beam_search(model, letters, "abc", 30, beams=4, stop=["a", "b"])
    assert all("a" not in b.text and "b" not in b.text for b in found)
    short = beam_search(model, letters, "abc", 30, beams=4, stop=["a", "b"], length_penalty=0)
    assert short[0].score == short[0].logprob and short[0].tokens <= found[0].tokens


# ---------------------------------------------------------------- the panel and the prompt

def test_the_panel_writes_on_the_loop_and_stops(letters, model):
    "The click returns at once; the text grows between other things; Stop is heard; a second click meanwhile does nothing."
    async def use():
        panel = play(Small(model, letters), prompt="abc", seed=4, max_new_tokens=500).panel
        panel.go.click()
        assert panel.hand.state == "waiting" and panel.go.disabled and not panel.halt.disabled
        while len(panel.hand.text) < 20: await asyncio.sleep(0)
        panel.start()
        panel.halt.click()
        while panel.hand.state == "writing": await asyncio.sleep(0)
        return panel
    panel = asyncio.run(use())
    text = panel.hand.text
    assert panel.hand.state == "stopped" and 20 <= len(text) < 500 and "stopped" in panel.told.value and not panel.go.disabled
    assert generate(model, letters, "abc", 500, seed=4, sampling=Sampling(temperature=0.8)).startswith("abc" + text)
    assert "lm.generate(&#x27;abc&#x27;, max_new_tokens=500, temperature=0.8, seed=4)" in panel.call.value


def test_a_click_from_another_thread_writes_on_the_loop(letters, model):
    "As a subshell of a busy kernel does it: the model is used by the loop's thread only."
    used = []
    class Telling(Small):
        def stream(self, prompt, **options):
            used.append(threading.get_ident())
            return super().stream(prompt, **options)
    async def use():
        panel = play(Telling(model, letters), prompt="abc", max_new_tokens=10).panel
        await asyncio.to_thread(panel.start)
        while panel.hand.state in ("waiting", "writing"): await asyncio.sleep(0.001)
        return panel.hand
    hand = asyncio.run(use())
    assert used == [threading.get_ident()] and hand.state == "done" and len(hand.text) == 10


def test_a_panel_shows_what_went_wrong(letters, model):
    panel = play(Small(model, letters), prompt="<b>").panel
    panel.go.click()
    assert panel.hand.state == "failed" and "UnknownCharacters" in panel.out.value and "<b>" not in panel.out.value
    panel.prompt.value = "abc"; panel.sliders["top_k"].value = 50; panel.go.click()
    assert panel.hand.state == "done" and "top_k=50 keeps all 18 tokens" in panel.out.value
    for wrong, said in [(dict(temprature=1), "Did you mean 'temperature'"), (dict(top_p=2), "off the slider")]:
        with pytest.raises(ValueError, match=said): play(Small(model, letters), **wrong)


def test_talking_in_a_terminal(letters, model, capsys):
    lines = iter(["/help", "/set temperature=0.5", "/set temperature=hot", "/nothing", "abc", "", "/status", "quit"])
    interactive(Small(model, letters), lambda ask: next(lines), max_new_tokens=10, seed=1)
    out = capsys.readouterr().out
    first = generate(model, letters, "abc", 10, seed=1, sampling=Sampling(temperature=0.5))
    assert first + "\n" in out and "temperature='hot' is not possible" in out and "no command is called '/nothing'" in out
    assert generate(model, letters, first, 10, seed=1, sampling=Sampling(temperature=0.5))[len(first):] in out
    assert "temperature = 0.5" in out and "Traceback" not in out


def test_an_interrupt_ends_the_text_only(letters, model):
    class Interrupted(Small):
        def stream(self, prompt, **options):
            yield "ab"
            raise KeyboardInterrupt
        def generate(self, prompt, **options): raise KeyboardInterrupt
    chat = Chat(Interrupted(model, letters), said.append if (said := []) is not None else print)
    assert chat.line("abc") and chat.history == ["abcab"] == said
    assert chat.line("/set num_samples=2") and chat.line("abc") and said[-1] == "(interrupted)" and len(chat.history) == 1
    with pytest.raises(ValueError, match="Did you mean 'temperature'"): Chat(Small(model, letters), temprature=1)


def test_a_pipe_is_an_end(tmp_path):
    "Lines from a file, and its end, in a process of its own."
    script = tmp_path / "talk.py"
    script.write_text("from arc_nb.tasks.text.chatting import interactive\n"
                      "class Echo:\n    def stream(self, prompt, **options): yield prompt.upper()\n"
                      "interactive(Echo())\n")
    done = subprocess.run([sys.executable, script], input="abc\n/set top_p=7\n", capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))})
    assert done.returncode == 0 and "abcABC\n" in done.stdout and "top_p=7 is not possible" in done.stdout and done.stderr == ""
