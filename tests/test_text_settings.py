"""Settings of a character model: the guide's flags, ranges and sizes, the reference's defaults and words, and what is refused."""
import os
import pickle
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from arc_nb import Trainer
from arc_nb.engine.rates import preview
from arc_nb.tasks.text.config import IDLE, NAMES, WAYS, read_config, sort_settings, write_config
from arc_nb.tasks.text.fields import ranges_picture
from arc_nb.tasks.text.settings import (
    FIELDS, NEEDS, SIZES, Learning, ModelSettings, TrainSettings, check_ranges, schedule_of, size, warmup_of,
)

ROOT = Path(__file__).parents[1]
SEED = "".join(f"{item['text']}\n" for item in yaml.safe_load((ROOT / "tests/data/text_seed.yaml").read_text()))
DOOR = {"prompt", "resume-from", "logdir"}  # of commands, not of a model; --logdir is TensorBoard's own


def test_every_flag_of_the_guide_has_a_home():
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", SEED)) - DOOR
    assert len(flags) > 18 and {flag.replace("-", "_") for flag in flags} <= set(FIELDS)
    assert FIELDS["model_dim"].flag == "--model-dim" and FIELDS["early_stopping"].flag == "--early-stopping/--no-early-stopping"


DEFAULTS = {"epochs": 10, "batch_size": 16, "learning_rate": 1e-3, "model_dim": 128, "num_heads": 2, "num_layers": 6, "dropout": 0.1,
            "max_seq_len": 256, "val_split": 0.1, "device": "auto", "mixed_precision": False, "seed": 42, "gradient_clip": 1.0,
            "profile": False, "quiet": False, "accumulation_steps": 1, "early_stopping": False, "patience": 5, "tensorboard": False,
            "log_dir": "runs/",
            "wandb": False, "optimizer": "adamw", "weight_decay": 0.01}
TYPICAL = {"model_dim": (64, 1024), "num_layers": (3, 24), "num_heads": (2, 16), "learning_rate": (1e-5, 1e-2), "batch_size": (8, 128),
           "epochs": (5, 100), "dropout": (0, 0.3), "max_seq_len": (128, 2048), "val_split": (0.05, 0.2)}


def test_defaults_and_typical_ranges_are_the_guides():
    assert {name: FIELDS[name].default for name in DEFAULTS} == DEFAULTS
    assert {name: FIELDS[name].typical for name in TYPICAL} == TYPICAL
    assert all(f"Typical: {low:g} to {high:g}." in FIELDS[name].help for name, (low, high) in TYPICAL.items())
    assert all(one.text.endswith(".") and "\n" not in one.help for one in FIELDS.values())
    assert all(one.check(one.default) == one.default for one in FIELDS.values())
    assert all(one.odd[0] <= one.default <= one.odd[1] for one in FIELDS.values() if one.odd)


def test_the_sizes_are_the_guides_commands():
    words = {"tiny_model": "tiny", "small_model": "small", "medium_model": "medium", "large_model": "large"}
    for command in re.findall(r"fundamentallm train(?:.*\\\n)+.*\n", SEED):
        name = re.search(r"--output-dir (\w+)", command)[1]
        if name not in words or "--learning-rate" not in command: continue
        said = {flag.replace("-", "_"): value for flag, value in re.findall(r"--([a-z-]+) ([\d.]+)", command)}
        said |= {"mixed_precision": True} if "--mixed-precision" in command else {}
        assert {key: float(value) for key, value in said.items()} == {key: float(value) for key, value in size(words.pop(name)).items()}
    assert not words and all(name in FIELDS for one in SIZES.values() for name in one)
    with pytest.raises(ValueError, match="Did you mean 'small'"): size("smal")


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match=r"model_dim=256 .* num_heads=7: take 1, 2, 4, 8, 16, 32, 64, 128, 256 heads .*nearest lower is 4"):
        ModelSettings(model_dim=256, num_heads=7)
    with pytest.warns(UserWarning, match="num_heads=4 is taken"): assert ModelSettings.fixed(model_dim=256, num_heads=7).num_heads == 4
    with pytest.warns(UserWarning): assert ModelSettings.fixed(model_dim=7, num_heads=3, positions="learned").num_heads == 1
    with pytest.warns(UserWarning): assert ModelSettings.fixed(model_dim=12, num_heads=5, positions="rotary").head_dim % 2 == 0
    with pytest.warns(UserWarning): assert ModelSettings.fixed(model_dim=4, num_heads=9, positions="learned").num_heads == 4
    assert ModelSettings.fixed(model_dim=64, num_heads=4) == ModelSettings(model_dim=64, num_heads=4)
    with pytest.raises(ValueError, match="rotary"): ModelSettings(model_dim=6, positions="rotary")
    with pytest.raises(ValueError, match="model_dim='64'"): ModelSettings.fixed(model_dim="64")


@pytest.mark.parametrize(("name", "value"), [
    ("epochs", 0), ("epochs", 2.5), ("epochs", "3"), ("epochs", True), ("epochs", None), ("learning_rate", 0), ("learning_rate",
            float("nan")),
    ("learning_rate", float("inf")), ("dropout", 1.0), ("dropout", -0.1), ("val_split", 1), ("batch_size", 0), ("gradient_clip",
            -1), ("beta1", 1.0),
    ("optimizer", "adamx"), ("lr_schedule", "cosinus"), ("eval_every", "soon"), ("eval_every", 0), ("checkpoint_every",
            True), ("patience", 0),
    ("seed", -1), ("seed", 2**63), ("vocab_size", 255), ("mixed_precision", 1), ("device", 3), ("min_lr", 0.1), ("split_by",
            "line"), ("max_seq_len", 1),
    ("num_layers", 0), ("norm", None), ("label_smoothing", 1), ("augment_case", 1.5)])
def test_wrong_values_are_quoted(name, value):
    kind = ModelSettings if FIELDS[name].group == "model" else TrainSettings
    with pytest.raises(ValueError, match=name) as caught: kind(**{name: value})
    assert f"{value!r}" in str(caught.value) or f"{value}" in str(caught.value)


def test_settings_travel():
    for one in (ModelSettings(model_dim=64, vocab_size=65), TrainSettings(epochs=3, min_lr=1e-5, eval_every=100)):
        assert type(one).from_dict(one.to_dict()) == one == pickle.loads(pickle.dumps(one)) and hash(one) == hash(replace(one))
        assert all(isinstance(value, (int, float, str, bool, type(None))) for value in one.to_dict().values())
    with pytest.raises(ValueError, match="Did you mean 'batch_size'"): TrainSettings.from_dict({"batchsize": 3})
    with pytest.raises(ValueError, match="gradient_clip"): replace(TrainSettings(), gradient_clip=-1)
    assert TrainSettings(output_dir=Path("a") / "b").output_dir == os.path.join("a", "b")
    with pytest.raises(ValueError, match="val_split=0 leaves no text"): TrainSettings(early_stopping=True, val_split=0)


@pytest.mark.parametrize(("kind", "first", "last"), [
    ("constant", 1, 1), ("warmup", 1 / 51, 1), ("cosine", 1 / 51, 0.1), ("linear", 1 / 51, 0.1), ("step", 1, 0.5), ("exponential", 1,
            0.9 ** 9)])
def test_schedules_begin_peak_and_end_where_they_say(kind, first, last):
    how = TrainSettings(lr_schedule=kind, learning_rate=0.01, epochs=10)
    lr = preview(schedule_of(how, 100), lr=0.01, steps=1000, steps_per_epoch=100).lr
    assert lr.iloc[0] == pytest.approx(0.01 * first) and lr.max() == pytest.approx(0.01) and lr.iloc[-1] == pytest.approx(0.01 * last,
            rel=0.01)
    if kind in ("cosine", "linear"):
        for floor in ({"min_lr": 0.002}, {"min_lr_ratio": 0.2}):
            assert preview(schedule_of(replace(how, **floor), 100), 0.01, 1000, 100).lr.iloc[-1] == pytest.approx(0.002, rel=0.02)


def test_the_default_warm_up_is_of_the_data_not_of_the_length():
    assert schedule_of(Learning(epochs=10), 245) == schedule_of(Learning(epochs=30), 245)  # a longer run resumes without a word
    assert warmup_of(Learning(warmup_steps=7), 245) == 7 and warmup_of(Learning(warmup_steps=0), 245) == 0 and warmup_of(Learning(),
            None) == 500
    for steps, epochs in ((1, 1), (2, 1), (3, 1), (24, 1), (5000, 1)):
        for kind in ("warmup", "cosine", "linear"):
            preview(schedule_of(Learning(lr_schedule=kind, epochs=epochs), steps), 1e-3, steps * epochs, steps)
    for most in (1, 5, 20): preview(schedule_of(Learning(lr_schedule="cosine", max_steps=most), 245), 1e-3, most, 245)


@pytest.mark.parametrize("name", FIELDS["optimizer"].choices)
@pytest.mark.parametrize("kind", FIELDS["lr_schedule"].choices)
def test_a_trainer_takes_the_arguments(name, kind):
    import torch
    how = TrainSettings(optimizer=name, lr_schedule=kind, device="cpu", early_stopping=True, label_smoothing=0.1, max_steps=2, batch_size=4)
    data = (torch.arange(16) % 5, torch.arange(1, 17) % 5)
    trainer = Trainer(torch.nn.Embedding(5, 5), data, data, **how.trainer_arguments(4), run=False, board=False)
    assert trainer.fit(**how.fit_arguments()).epochs().train_loss.notna().all()


def test_the_arguments_of_a_trainer():
    given = TrainSettings(gradient_clip=0, wandb=True, project="p", tensorboard=True, log_dir="logs", eval_every=50,
            device="cpu").trainer_arguments(100)
    assert given["clip_norm"] is None and given["valid_every"] == 50 and given["loss"] == ("cross_entropy", {"class_dim": -1})
    assert given["track"] == [("tensorboard", {"folder": "logs"}), ("wandb", {"project": "p"})] and given["callbacks"] == []
    assert "weight_decay" not in given["optimizer"][1] and given["optimizer"] == ("adamw", {"betas": (0.9, 0.999), "eps": 1e-8})
    assert TrainSettings(max_steps=9, processes=2).fit_arguments() == {"steps": 9, "processes": 2}
    with pytest.warns(UserWarning, match="mixed_precision=True has no effect on cpu"):
        assert TrainSettings(mixed_precision=True, device="cpu").precision == "fp32"


@pytest.mark.parametrize(("bf16", "name"), [(True, "bf16"), (False, "fp16")])
def test_mixed_precision_takes_what_the_gpu_is_good_at(monkeypatch, bf16, name):
    import torch

    from arc_nb.tasks.text import settings
    monkeypatch.setattr(settings, "pick_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert TrainSettings(mixed_precision=True).precision == name and TrainSettings().precision == "fp32"


def test_steps_are_a_number_however_they_are_typed():
    assert TrainSettings(eval_every="200", checkpoint_every=" 50 ") == TrainSettings(eval_every=200, checkpoint_every=50)
    assert TrainSettings(eval_every="10 min").eval_every == "10 min"


ODD = {"model_dim": (32, 16384), "epochs": (20_000,), "batch_size": (4096,), "learning_rate": (0.2, 1e-7), "max_seq_len": (10_000,),
       "gradient_clip": (20.0,), "num_layers": (49,), "dropout": (0.9,)}


def test_odd_values_warn_by_the_references_table():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_ranges(ModelSettings(), TrainSettings())
        for one in SIZES.values(): check_ranges(*(kind(**values) for kind, values in zip((ModelSettings, TrainSettings),
                sort_settings(one))))
    for name, values in ODD.items():
        for value in values:
            kind = ModelSettings if FIELDS[name].group == "model" else TrainSettings
            with pytest.warns(UserWarning, match=f"{name}={value:g} is odd"): check_ranges(kind(**{name: value}))
    with pytest.warns(UserWarning, match="leaves 4 numbers a head"): check_ranges(ModelSettings(model_dim=64, num_heads=16))


@pytest.mark.parametrize("given", [
    {"patience": 3}, {"min_delta": 0.1}, {"log_dir": "a"}, {"project": "b"}, {"separator": "x"}, {"momentum": 0.5}, {"beta1": 0.8,
            "optimizer": "sgd"},
    {"epsilon": 1e-6, "optimizer": "sgd"}, {"warmup_steps": 5, "lr_schedule": "step",
            "epochs": 20}, {"min_lr": 1e-5}, {"min_lr_ratio": 0.5},
    {"decay_every": 2}, {"decay_factor": 0.5}, {"max_steps": 5, "epochs": 3}, {"lr_schedule": "step", "epochs": 3}])
def test_what_has_no_effect_warns(given):
    with pytest.warns(UserWarning, match="has no effect"): check_ranges(TrainSettings(**given))


def test_what_needs_another_setting_is_known():
    assert all(name in FIELDS and other in FIELDS for name, (other, _) in NEEDS.items())
    assert all(value in FIELDS[other].choices for other, values in NEEDS.values() for value in values if FIELDS[other].choices)


REFERENCE = {  # every key of FundamentaLLM's files, with a value of its own
    "model": {"vocab_size": 69, "d_model": 64, "num_heads": 4, "num_layers": 2, "sequence_length": 64, "dropout": 0.2, "ffn_expansion": 4,
              "pos_encoding": "rope"},
    "training": {"data_path": "a.txt", "train_split": 0.8, "sequence_length": 64, "batch_size": 4, "num_workers": 2, "learning_rate": 3e-4,
                 "optimizer": "AdamW", "optimizer_eps": 1e-7, "optimizer_weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95,
                 "scheduler": "linear_warmup", "warmup_steps": 5, "total_steps": 100, "min_lr_ratio": 0.2, "max_grad_norm": 2.0,
                 "gradient_accumulation_steps": 2, "accumulation_steps": 2, "gradient_clip_norm": 2.0, "gradient_checkpointing": True,
                 "mixed_precision": False, "num_epochs": 3, "max_epochs": 3, "epochs": 3, "max_steps": 50, "eval_steps": 10, "dropout": 0.2,
                 "checkpoint_dir": "out", "checkpoint_keep_last": 3, "save_every_n_epochs": 2, "early_stopping_patience": 4,
                 "early_stopping_metric": "val_loss", "early_stopping_mode": "min", "early_stopping_min_delta": 0.01, "seed": 1,
                 "deterministic": True, "device": "cpu"}}


@pytest.mark.filterwarnings("ignore:.*has no effect:UserWarning")
@pytest.mark.parametrize("flat", [False, True])
def test_every_key_of_the_reference_is_understood(flat, tmp_path):
    path = tmp_path / "config.yaml"
    told = {name: value for part in REFERENCE.values() for name, value in part.items() if name != "vocab_size"} if flat else REFERENCE
    path.write_text(yaml.safe_dump(told))
    model, training = read_config(path)
    assert model.pop("vocab_size", 69) == 69
    assert model == {"model_dim": 64, "num_heads": 4, "num_layers": 2, "max_seq_len": 64, "dropout": 0.2, "ff_dim": 256,
            "positions": "rotary"}
    assert training == {
        "data_path": "a.txt", "val_split": 0.2, "batch_size": 4, "learning_rate": 3e-4, "optimizer": "adamw", "epsilon": 1e-7,
        "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "lr_schedule": "warmup", "warmup_steps": 5, "min_lr_ratio": 0.2,
        "gradient_clip": 2.0,
        "accumulation_steps": 2, "gradient_checkpointing": True, "mixed_precision": False, "epochs": 3, "max_steps": 50, "eval_every": 10,
        "output_dir": "out",
        "keep_checkpoints": 3, "checkpoint_every": "2 epochs", "early_stopping": True, "patience": 4, "min_delta": 0.01,
        "seed": 1, "device": "cpu"}
    ModelSettings(**model), TrainSettings(**training)


def test_aliases_lead_somewhere_and_hide_nothing():
    assert all(ours in FIELDS for ours in NAMES.values())
    assert not (set(NAMES) | set(WAYS) | set(IDLE)) & set(FIELDS)
    assert sort_settings({"hidden_dim": 64, "max_seq_len": 32, "normalize": True}) == ({"model_dim": 64, "max_seq_len": 32},
            {"normalise": True})


def test_a_config_comes_back_equal(tmp_path):
    model, training = ModelSettings(model_dim=64, vocab_size=65, ff_dim=99), TrainSettings(separator="\n\n\n", checkpoint_every=None,
            learning_rate=3e-5)
    for given in ((model, training), (model.to_dict(), training.to_dict())):
        path = write_config(tmp_path / "new" / "config.yaml", *given, tokenizer="65 characters", chars={"train": 10})
        assert read_config(path) == (model.to_dict(), training.to_dict())
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]
    assert path.read_text().startswith("# arc-nb train TEXT --config config.yaml")
    assert (ModelSettings(**read_config(path)[0]), TrainSettings(**read_config(path)[1])) == (model, training)


WRONG = {
    "epochs: 3\nlearning_rat: 1\n": "config.yaml, line 2, learning_rat is no setting: did you mean 'learning_rate'",
    "training:\n  batch_size: 4\n  epochs: many\n": "line 3, training.epochs: epochs='many' has to be a whole number at least 1",
    "trainig:\n  epochs: 3\n": "line 1, trainig is no section: did you mean 'training'",
    "training:\n  epochs: {a: 1}\n": "line 2, training.epochs is no section: there are",
    "model: 3\n": "line 1, model has to be settings", "- a\n": "is no configuration", "epochs: [3]\n": "line 1, epochs: epochs=[3]",
    "model:\n  num_heads: 4\n  n_head: 8\n": "line 3, model.n_head says num_heads=8, config.yaml, line 2, model.num_heads says 4",
    "train_split: most\n": "line 1, train_split='most' is not understood",
    "ffn_expansion: '4'\n": "line 1, ffn_expansion='4' is not understood",
    "epochs: 3\nepochs: 4\n": "given twice", "a: b: c": "not YAML", "x" * 10: "is no configuration", "3: 4\n": "[3] is no setting"}


@pytest.mark.parametrize("text", WRONG)
def test_a_slip_is_shown_with_its_line(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as caught: read_config(path)
    assert WRONG[text] in str(caught.value)


def test_files_that_say_nothing_or_are_not_there(tmp_path):
    (path := tmp_path / "config").write_text("")  # without a suffix it is a file still
    assert read_config(path) == ({}, {})
    path.write_text('{"model": null, "training": {"epochs": 2, "warmup_steps": null, "seed": null}, "about": {"what": "ever"}}')
    assert read_config(path) == ({}, {"epochs": 2, "warmup_steps": None})
    for wrong in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ValueError, match="cannot be read"): read_config(wrong)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"): read_config(path)


def test_the_picture_shows_what_is_odd():
    svg = ranges_picture(ModelSettings(model_dim=16384), TrainSettings(), only=["model_dim", "epochs"], theme="light")
    assert svg.count("<circle") == 2 and "16,384" in svg and "#c62828" in svg and "val_split" not in svg
