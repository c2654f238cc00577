"""The character model: causal, the same with a cache as without, compiled, divided, and in fewer bits."""
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from arc_nb import Trainer
from arc_nb.engine.windows import Windows
from arc_nb.tasks.text.attention import Attention, Cache, attend
from arc_nb.tasks.text.maps import Surface, head_jobs, loss_surface, maps_picture
from arc_nb.tasks.text.settings import ModelSettings
from arc_nb.tasks.text.transformer import (Transformer, attention_maps, count_parameters, decay_groups, flops_per_token,
                                           peak_flops)

WAYS = [dict(zip(("positions", "norm", "tied", "bias"), way))
        for way in itertools.product(("learned", "sinusoidal", "rotary"), ("rms", "layer"), (True, False), (True, False))]


def make(seed=0, **given):
    torch.manual_seed(seed)
    return Transformer(ModelSettings(**{"model_dim": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 12, "dropout": 0.0,
                                        "vocab_size": 11} | given))


def texts(rows, length, seed=1): return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(f"{v}" for v in way.values()))
def test_causal_cached_and_all_of_it_is_trained(way):
    model, tokens = make(**way), texts(3, 12)
    whole = model(tokens)
    assert whole.shape == (3, 12, 11)
    later = tokens.clone()
    later[:, 7:] = (later[:, 7:] + 1) % 11
    assert torch.equal(model(later)[:, :7], whole[:, :7]) and not torch.equal(model(later)[:, 7:], whole[:, 7:])
    with torch.no_grad():
        for cuts in ([12], [1] * 12, [5, 3, 4], [4, 1, 1, 6]):
            cache, at, found = model.cache(3), 0, []
            for n in cuts:
                found.append(model(tokens[:, at:at + n], cache))
                at += n
            assert torch.allclose(torch.cat(found, 1), whole, atol=1e-5) and cache.room == 0
    F.cross_entropy(whole.flatten(0, 1), tokens.flatten()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_order_matters(positions):
    model, tokens = make(positions=positions), texts(1, 6)
    swapped = tokens[:, [1, 0, 2, 3, 4, 5]]
    assert tokens[0, 0] != tokens[0, 1]
    assert not torch.allclose(model(tokens)[:, -1], model(swapped)[:, -1], atol=1e-6)


def test_a_cache_can_be_cleared_and_its_rows_picked():
    model, tokens = make(positions="rotary"), texts(2, 12)
    with torch.no_grad():
        cache = model.cache(2)
        model(tokens[:, :6], cache)
        picked = cache.pick(torch.tensor([1, 1, 0]))
        assert picked.rows == 3 and picked.length == 6 and picked.room == 6
        found = model(tokens[[1, 1, 0], 6:], picked)
        assert torch.allclose(found, model(tokens)[[1, 1, 0], 6:], atol=1e-5)
        assert cache.length == 6  # the other one goes its own way
        assert torch.allclose(model(tokens[:, 6:], cache), model(tokens)[:, 6:], atol=1e-5)
        cache.clear()
        assert torch.allclose(model(tokens[:, :3], cache), model(tokens)[:, :3], atol=1e-5)


def test_a_cache_is_where_the_model_is_and_in_its_type():
    model = make().double()
    cache = model.cache(2)
    assert cache.keys[0].dtype == torch.float64 and cache.keys[0].shape == (2, 2, 12, 8) and len(cache.keys) == 2
    with torch.no_grad(): assert model(texts(2, 4), cache).dtype == torch.float64


def test_a_cache_keeps_no_graph():
    model, tokens = make(), texts(2, 12)
    cache = model.cache(2)
    model(tokens[:, :6], cache)
    model(tokens[:, 6:], cache).sum().backward()
    assert not cache.keys[0].requires_grad


@pytest.mark.parametrize("tokens, cached, words", [
    (torch.zeros(1, 13, dtype=torch.long), 0, "13 tokens are more .* max_seq_len is 12"),
    (torch.zeros(1, 3, dtype=torch.long), 10, "3 tokens behind 10 in the cache"),
    (torch.zeros(4, dtype=torch.long), 0, r"shape \(4,\)")])
def test_what_cannot_be_read_is_said(tokens, cached, words):
    model = make()
    cache = model.cache(1)
    cache.length = cached
    with pytest.raises(ValueError, match=words): model(tokens, cache if cached else None)


def test_more_errors():
    with pytest.raises(TypeError, match="torch.uint8"): make()(torch.zeros(1, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="vocab_size=None"): make(vocab_size=None)
    with pytest.raises(ValueError, match=r"heads=7 .*\[1, 2, 4, 8, 16\]"): Attention(16, 7)


def test_dropout_only_in_training():
    model, tokens = make(dropout=0.5), texts(2, 12)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_first_weights_are_gpt2s():
    model = make(model_dim=128, num_layers=8, vocab_size=500, max_seq_len=64, tied=False, bias=True)
    for name, p in model.named_parameters():
        if name.endswith("bias"): assert p.abs().max() == 0
        elif p.ndim == 1: assert (p == 1).all()
        else: assert abs(float(p.detach().std()) / (0.02 / 4 if name.endswith(("out.weight", "down.weight")) else 0.02) - 1) < 0.05, name


def test_what_is_tied_is_there_once():
    tied, loose = make(positions="learned"), make(positions="learned", tied=False)
    assert count_parameters(loose) - count_parameters(tied) == 11 * 16
    assert len(tied.state_dict()) == len(list(tied.parameters()))  # no positions among the weights that are kept
    assert len(make(positions="rotary").state_dict()) == len(tied.state_dict()) - 1


def test_parameters_of_the_nanogpt_setting():
    model = make(model_dim=128, num_layers=4, num_heads=4, max_seq_len=64, vocab_size=65, positions="learned")
    blocks = 4 * (12 * 128 * 128 + 2 * 128)
    assert count_parameters(model) == blocks + 65 * 128 + 64 * 128 + 128


@pytest.mark.parametrize("way", WAYS[::5], ids=str)
def test_decay_is_for_matrices(way):
    model = make(**way)
    trainer = Trainer(model, Windows(texts(1, 200)[0].numpy(), 12), loss="cross_entropy", groups=decay_groups(model, 0.3), run=False,
                      board=False)
    trainer.fit(steps=2)
    seen = 0
    for group in trainer.setup.optimizer.param_groups:
        for p in group["params"]:
            assert group["weight_decay"] == (0.3 if p.ndim > 1 else 0.0)
            seen += p.numel()
    assert seen == count_parameters(model)


@pytest.mark.parametrize("length", [4, 12])
def test_operations_are_those_that_torch_counts(length):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model, tokens = make(tied=False, ff_dim=40), texts(3, length)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): model(tokens).sum().backward()
    assert counter.get_total_flops() / tokens.numel() == pytest.approx(flops_per_token(model.settings, length), rel=1e-3)
    assert flops_per_token(model.settings) == flops_per_token(model.settings, 12)


@pytest.mark.parametrize("name, precision, peak", [
    ("NVIDIA A100-SXM4-40GB", "bf16", 312e12), ("NVIDIA A100 80GB PCIe", "fp32", 156e12), ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
    ("NVIDIA H100 PCIe", "bf16", 756e12), ("NVIDIA H200", "fp16", 989.4e12), ("NVIDIA L4", "bf16", 121e12), ("Tesla T4", "fp16", 65e12),
    ("Tesla T4", "fp32", 8.1e12), ("Tesla T4", "bf16", None), ("Tesla V100-SXM2-16GB", "fp16", 125e12),
    ("NVIDIA GeForce RTX 3090", "bf16", 71e12), ("NVIDIA GeForce RTX 4090 D", "bf16", None), ("NVIDIA GeForce RTX 5090", "fp32", 104.8e12),
    ("NVIDIA GeForce RTX 3090 Laptop GPU", "bf16", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None), ("cpu", "fp32", None)])
def test_peaks(name, precision, peak): assert peak_flops(name, precision) == peak


def test_peak_of_an_unknown_precision():
    with pytest.raises(ValueError, match="'int8'"): peak_flops("NVIDIA L4", "int8")


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_maps_are_what_the_model_computes(positions):
    model, tokens = make(positions=positions, dropout=0.3, num_heads=4), texts(1, 9)[0]
    model.blocks[0].eval()
    maps = attention_maps(model, tokens)
    assert maps.shape == (2, 4, 9, 9) and torch.allclose(maps.sum(-1), torch.ones(2, 4, 9)) and (maps.triu(1) == 0).all()
    assert model.training and not model.blocks[0].training and not model.blocks[0].attention._forward_pre_hooks
    # the values, weighted by the maps, give what the layer gives
    model.eval()
    seen = []
    hook = model.blocks[1].attention.register_forward_hook(lambda layer, given, out: seen.append((given[0], given[1], out)))
    model(tokens[None])
    hook.remove()
    x, turn, out = seen[0]
    layer = model.blocks[1].attention
    assert torch.allclose(layer.out((maps[1:2] @ layer.parts(x, turn)[2]).transpose(1, 2).flatten(2)), out, atol=1e-5)


def test_checkpointed_activations_give_the_same_training():
    values, curves = texts(1, 400)[0].numpy(), []
    for switch, more in ((False, {}), (True, {}), (False, {"strategy": ("auto", {"checkpoint_activations": True})})):
        model = make(dropout=0.2)
        model.checkpointing = switch
        trainer = Trainer(model, Windows(values, 12), loss="cross_entropy", batch_size=4, run=False, board=False, **more)
        trainer.fit(steps=6)
        curves.append(trainer.history.series("train", "loss")[1].tolist())
    assert curves[0] == curves[1] == curves[2]


def test_bf16_trains():
    trainer = Trainer(make(positions="rotary"), Windows(texts(1, 400)[0].numpy(), 12), loss="cross_entropy", batch_size=4, precision="bf16",
                      run=False, board=False)
    trainer.fit(steps=3)
    assert math.isfinite(trainer.history.series("train", "loss")[1][-1])


def test_head_jobs():
    tokens = torch.tensor([3, 5, 7, 3, 5, 7])
    again = torch.zeros(6, 6)
    for i, j in enumerate([0, 0, 0, 1, 2, 3]): again[i, j] = 1
    found = head_jobs(torch.stack([torch.eye(6), again])[None], tokens)
    assert [(one["layer"], one["head"]) for one in found] == [(1, 1), (1, 2)]
    assert found[0]["itself"] == 1 and found[0]["before"] == 0 and found[1]["again"] == 1 and found[0]["again"] == 0
    assert math.isnan(head_jobs(torch.eye(3)[None, None], torch.tensor([1, 2, 3]))[0]["again"])


@pytest.mark.parametrize("shape, labels", [
    ((2, 3, 5, 5), list("a b\n<")), ((1, 1, 300, 300), []), ((12, 4, 20, 20), []), ((7, 7), list("abcdefg"))])
def test_pictures_of_any_size(shape, labels):
    from xml.etree import ElementTree
    svg = maps_picture(torch.rand(shape).tril().softmax(-1), labels)
    ElementTree.fromstring(svg)
    assert len(svg) < 600_000 and ("⏎" in svg) == ("\n" in labels)


def test_pictures_that_cannot_be():
    with pytest.raises(ValueError, match="4 labels for 5 tokens"): maps_picture(torch.eye(5), list("abcd"))
    with pytest.raises(ValueError, match="49 heads"): maps_picture(torch.rand(7, 7, 4, 4))
    with pytest.raises(ValueError, match="shape"): maps_picture(torch.rand(2, 4, 4))


def test_loss_surface_leaves_the_model_alone_and_holds_its_loss():
    model, tokens = make(tied=False, dropout=0.2), texts(4, 12)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    surface = loss_surface(model, tokens, tokens, size=5, seed=3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.training
    assert torch.equal(torch.get_rng_state(), state)
    own = F.cross_entropy(model.eval()(tokens).flatten(0, 1), tokens.flatten()).item()
    assert surface.middle == pytest.approx(own, rel=1e-5) and surface.losses.shape == (5, 5)
    assert loss_surface(model, tokens, tokens, size=5, seed=3).losses.tolist() == surface.losses.tolist()
    assert isinstance(surface, Surface) and surface.picture("dark").startswith("<svg")
    with pytest.raises(ValueError, match="odd"): loss_surface(model, tokens, tokens, size=4)


def test_attend_with_a_hand_made_softmax():
    q, k, v = torch.randn(3, 2, 2, 7, 4, generator=torch.Generator().manual_seed(0)).unbind()
    for n in (1, 3, 7):
        scores = q[:, :, -n:] @ k.transpose(-1, -2) / 2
        seen = torch.ones(7, 7).tril()[-n:].bool()
        by_hand = scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
        assert torch.allclose(attend(q[:, :, -n:], k, v), by_hand, atol=1e-6)
    assert Cache(2, (1, 2, 7, 4)).room == 7


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses parts of torch that torch calls old
def test_compiled_it_is_the_same_with_and_without_cache():
    model, tokens = make(positions="rotary").eval(), texts(2, 12)
    compiled = torch.compile(model)
    with torch.no_grad():
        assert torch.allclose(compiled(tokens), model(tokens), atol=1e-5)
        cache = model.cache(2)
        found = [compiled(tokens[:, :4], cache)] + [compiled(tokens[:, i:i + 1], cache) for i in range(4, 12)]
        assert torch.allclose(torch.cat(found, 1), model(tokens), atol=1e-5)
    assert torch.allclose(attention_maps(compiled, tokens[0]), attention_maps(model, tokens[0]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler uses parts of torch that torch calls old
@pytest.mark.parametrize("mode, again", [(True, False), ("step", False), (True, True)])
def test_compiled_training_follows_the_other(mode, again):
    curves = []
    for compile in (False, mode):
        model = make()
        model.checkpointing = again
        trainer = Trainer(model, Windows(texts(1, 400)[0].numpy(), 12), loss="cross_entropy", batch_size=4, compile=compile, run=False,
                          board=False)
        trainer.fit(steps=6)
        curves.append(torch.tensor(trainer.history.series("train", "loss")[1]))
    assert torch.allclose(curves[0], curves[1], atol=1e-4)
