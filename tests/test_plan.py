"The planner: a corpus of phrasings with the plan that each has to become, and what a plan must never do."
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from arc_nb.graph.build import build
from arc_nb.graph.plan import Plan, make_plan
from arc_nb.tables.profile import profile_frame

CORPUS = yaml.safe_load((Path(__file__).parent / "data" / "instructions.yaml").read_text())


def tables() -> dict[str, pd.DataFrame]:
    rng = np.random.default_rng(0)
    n, pick, num = 600, rng.choice, lambda mean, std, digits=1: np.round(rng.normal(mean, std, 600), digits)
    days = pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 500, n), "D")
    flag = lambda p=0.5: (rng.random(n) < p).astype(int)
    emails = pd.DataFrame({"word_freq_free": num(1, .4, 3), "word_freq_money": num(1, .3, 3), "capitals": rng.integers(1, 500, n),
                           "links": rng.integers(0, 9, n), "subject": [f"mail {k} about {k % 7}" for k in range(n)],
                           "is_spam": flag(.4).astype(bool)})
    houses = pd.DataFrame({"area": num(120, 30), "bedrooms": rng.integers(1, 6, n), "bathrooms": rng.integers(1, 4, n),
                           "city": pick([f"city {k}" for k in range(25)], n), "condition": pick(["poor", "fair", "good"], n),
                           "year_built": rng.integers(1900, 2020, n), "demand": num(40, 9), "price": num(3e5, 8e4, 0)})
    ads = pd.DataFrame({"user_age": rng.integers(18, 80, n), "device": pick(["phone", "tablet", "laptop"], n),
                        "hour": rng.integers(0, 24, n), "ad_position": rng.integers(1, 6, n), "impressions": rng.integers(1, 90, n),
                        "click": flag(.3), "conversion": flag(.1), "time_spent": num(30, 9)})
    customers = pd.DataFrame({"customer_id": np.arange(n) + 1000, "gender": pick(["female", "male"], n), "age": rng.integers(18, 80, n),
                              "tenure": rng.integers(0, 72, n), "contract": pick(["monthly", "yearly", "two years"], n),
                              "monthly_charges": num(60, 20, 2), "total_charges": np.where(rng.random(n) < .05, np.nan,
                                  num(2000, 700, 2)), "signup_date": days, "churn": pick(["no", "yes"], n)})
    return {
        "processed_diabetes_data": pd.DataFrame({"pregnancies": rng.integers(0, 14, n), "glucose": num(120, 30, 0),
                                                 "blood_pressure": num(70, 12, 0), "skin_thickness": num(20, 9, 0),
                                                 "insulin": num(80, 60, 0), "bmi": num(32, 7), "diabetes_pedigree": num(.5, .3, 3),
                                                  "age": rng.integers(21, 70, n), "outcome": flag(.35)}),
        "customers": customers, "housing_features": houses, "processed_emails": emails, "ad_events": ads,
        "movie_features": pd.DataFrame({"title": [f"film number {k}" for k in range(n)], "year": rng.integers(1950, 2024, n),
                                        "runtime": rng.integers(60, 200, n), "budget": num(50, 20), "votes": rng.integers(10, 9999, n),
                                        "rating": num(6.5, 1), "genre": pick(["action", "comedy", "drama", "horror"], n)}),
        "iris": pd.DataFrame({"sepal_length": num(5.8, .8), "sepal_width": num(3, .4), "petal_length": num(3.7, 1.7),
                              "petal_width": num(1.2, .7), "species": pick(["setosa", "versicolor", "virginica"], n)}),
        "loans": pd.DataFrame({"income": num(5e4, 1e4, 0), "requested_amount": num(1e4, 3e3, 0), "approved_amount": num(9e3, 3e3, 0),
                               "term": pick([12, 24, 36], n), "approved": flag(), "default": flag(.1)}),
        "sales": pd.DataFrame({"date": days, "store": pick(["north", "south", "east", "west"], n),
                               "product": pick([f"p{k}" for k in range(30)], n), "unit_price": num(9, 2, 2), "promo": flag(.2),
                               "units": rng.integers(0, 400, n)}),
        "grid": pd.DataFrame(rng.normal(size=(n, 20)), columns=[f"x{k}" for k in range(20)]).assign(y=flag()),
    }


SHORT = {"diabetes": "processed_diabetes_data", "houses": "housing_features", "emails": "processed_emails", "ads": "ad_events",
         "movies": "movie_features"}


@pytest.fixture(scope="module")
def profiles():
    return {name: profile_frame(frame, name) for name, frame in tables().items()}


def followed(expect: dict, say: str) -> dict:
    "What follows from other choices, and is not written in the corpus each time."
    optimizer = expect.get("optimizer", "AdamW")
    more = {"early_stopping": False} if "epochs" in expect and "at most" not in say else {}
    if optimizer != "AdamW": more |= {"weight_decay": 0.0}
    if optimizer == "SGD": more |= {"learning_rate": 0.01}
    return more | expect


def judged(entry: dict, profiles: dict) -> tuple[str, str]:
    "exact, asked, listed or wrong; and what is wrong."
    profile = profiles[SHORT.get(entry["table"], entry["table"])]
    plan = make_plan(entry["say"], profile, target=entry.get("given"))
    asks, faults = entry.get("asks", []), []
    if plan.not_understood != entry.get("listed", []): faults.append(f"listed {plan.not_understood}, not {entry.get('listed', [])}")
    if sorted(q.about for q in plan.questions) != sorted(asks): faults.append(f"asks {[q.about for q in plan.questions]}, not {asks}")
    if "target" not in asks:
        targets = entry["target"] if isinstance(entry["target"], list) else [entry["target"]]
        plain = make_plan("", profile, target=targets).choices
        wanted = {**plain, "features": [f for f in plain["features"] if f not in entry.get("without", [])],
                  **followed(entry.get("expect", {}), entry["say"])}
        got, free = plan.choices, {*asks, *({"output"} if "loss" in asks else {}), *({"weight_decay"} if "optimizer" in asks else {})}
        name = {"name"} if "name" not in entry.get("expect", {}) else set()
        for what in sorted({*wanted, *got} - free - name):
            if got.get(what) != wanted.get(what): faults.append(f"{what} is {got.get(what)!r}, not {wanted.get(what)!r}")
    return ("wrong" if faults else "asked" if asks else "listed" if entry.get("listed") else "exact"), "; ".join(faults)


def test_corpus(profiles):
    verdicts = [(judged(entry, profiles), entry["say"]) for entry in CORPUS]
    count = Counter(v for (v, _), _ in verdicts)
    wrong = [f"{say!r}: {why}" for (v, why), say in verdicts if v == "wrong"]
    print(f"\n{len(CORPUS)} phrasings over {len({e['table'] for e in CORPUS})} tables: {count['exact']} exact plans, "
          f"{count['asked']} questions and {count['listed']} listed phrases as expected, {count['wrong']} wrong")
    assert len(CORPUS) >= 120 and not wrong, "\n".join(wrong)


def test_graph_holds_the_choices(profiles):
    "What the reasons say is what the YAML trains: all of the corpus."
    for entry in CORPUS:
        plan = make_plan(entry["say"], profiles[SHORT.get(entry["table"], entry["table"])], target=entry.get("given"))
        said, t, prep = plan.choices, plan.graph.trainer, plan.graph.preprocessing
        assert (t.epochs, t.batch_size, t.optimizer.lr) == (said["epochs"], said["batch_size"], said["learning_rate"]), entry["say"]
        assert t.optimizer.type == f"torch.optim.{said['optimizer']}" and (t.early_stopping_patience or False) == said["early_stopping"]
        assert t.optimizer.params.get("weight_decay", 0.0) == said["weight_decay"] and (t.l1, t.l2) == (said["l1"], said["l2"])
        assert (t.gradient_clip_norm, t.gradient_clip_val) == (said["clip_norm"], said["clip_value"])
        assert (t.mixed_precision, t.device, t.processes, t.seed) == (said["mixed_precision"], said["device"], said["processes"],
            said["seed"])
        assert (t.scheduler.type if t.scheduler else None) == said["schedule"] and t.class_weights == said["class_weights"]
        assert [prep.split.train, prep.split.valid, prep.split.test] == list(said["split"]) and prep.split.by == said["split_by"]
        assert (prep.scale, prep.missing, prep.sample) == (said["scale"], said["missing"], said.get("sample"))
        assert {c for i in plan.graph.inputs.values() for c in i.columns} == set(said["features"]) and t.targets == list(plan.targets)
        losses = said["loss"] if isinstance(said["loss"], list) else [said["loss"]] * len(plan.targets)
        assert [loss.type for loss in t.loss] == [f"torch.nn.{name}" for name in losses]
        if said["architecture"] in ("mlp", "residual", "wide_deep"):
            widths = [n.params["out_features"] for n in plan.graph.graph if n.name.startswith("hidden")]
            assert widths == said["layers"], entry["say"]


@pytest.mark.parametrize("words", ["MLP", "DCN", "wide & deep", "ResNet", "attention", "MMOE"])
def test_every_architecture_runs_on_every_table(profiles, words):
    import torch
    for name, profile in profiles.items():
        last = list(profile.columns)[-2:] if words == "MMOE" else [list(profile.columns)[-1]]
        plan = make_plan(words, profile, target=last)
        batch = {k: torch.zeros(5, 1, dtype=torch.int64) if i.categorical else torch.randn(5, *i.shape[1:]) for k,
                 i in plan.graph.inputs.items()}
        out = build(plan.graph)(**batch)
        found = out if isinstance(out, dict) else {next(iter(plan.graph.outputs)): out}
        assert {loss.input for loss in plan.graph.trainer.loss} <= set(found) and all(torch.isfinite(v).all() for v in found.values()), name


def test_plans_are_pure_and_come_back(profiles, tmp_path):
    profile = profiles["customers"]
    words = "predict churn with 2 hidden layers (64, 32) and glitter"
    first, second = make_plan(words, profile), make_plan(words, profile)
    assert first == second and first.id != make_plan(words + "!", profile).id and first.graph.plan_id == first.id
    later = first.revise("30 epochs, no dropout, ignore age").revise("use age after all, features are age and tenure")
    assert later.choices["epochs"] == 30 and later.choices["layers"] == [64, 32] and later.choices["features"] == ["age", "tenure"]
    path = later.save(tmp_path / "plans")
    assert Plan.load(path) == later and json.loads(path.read_text())["id"] == later.id and Plan.load(path).revise("5 epochs").choices[
        "epochs"] == 5
    assert later.graph.from_yaml(later.graph.to_yaml()) == later.graph and len(later.frame()) == len(later.reasons)
    (tmp_path / "bad.json").write_text("{")
    for bad in ("bad.json", "missing.json"):
        with pytest.raises(ValueError, match="holds no plan"): Plan.load(tmp_path / bad)


def test_what_cannot_be_planned(profiles):
    with pytest.raises(ValueError, match="chrun"): make_plan("", profiles["customers"], target="chrun")
    with pytest.raises(TypeError, match="instruction"): make_plan(None, profiles["customers"])
    with pytest.raises(ValueError, match="no rows"): make_plan("", profile_frame(pd.DataFrame({"a": [], "b": []}), "empty"))
    with pytest.raises(ValueError, match="left to predict"): make_plan("predict b",
        profile_frame(pd.DataFrame({"a": [1, 1], "b": [0, 1]}), "small"))


def test_leaks_constants_and_keys_are_left_out_and_flagged():
    n = 400
    y = np.arange(n) % 2
    frame = pd.DataFrame({"id": np.arange(n), "same": 7, "copy": y * 3, "x": np.random.default_rng(0).normal(size=n), "y": y})
    plan = make_plan("predict y", profile_frame(frame, "t"), associations=lambda target: {"copy": 1.0, "x": 0.01})
    assert plan.choices["features"] == ["x"] and len(plan.flags) == 3 and any("leak" in f for f in plan.flags)
    kept = make_plan("predict y using only copy and x", profile_frame(frame, "t"), associations=lambda target: {"copy": 1.0})
    assert kept.choices["features"] == ["x", "copy"] or kept.choices["features"] == ["copy", "x"]


def test_names_of_any_kind():
    rng = np.random.default_rng(0)
    names = ['x"; DROP TABLE y; --', "a.b(c)*[d]?", "epochs", "dropout", "weiß ich", "<b>bold</b>", "price $", "hidden layers"]
    frame = pd.DataFrame(rng.normal(size=(300, len(names))), columns=names).assign(**{"batch size": rng.integers(0, 2, 300)})
    profile = profile_frame(frame, "odd")
    for name in frame.columns:
        plan = make_plan("20 epochs", profile, target=name)
        assert list(plan.targets) == [name] and "<b>" not in plan._repr_html_()
    plan = make_plan("predict dropout, 3 epochs", profile)
    assert list(plan.targets) == ["dropout"] and plan.choices["epochs"] == 3 and plan.choices["dropout"] == 0.1
    assert list(make_plan("predict hidden layers with 2 hidden layers", profile).targets) == ["hidden layers"]


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_and_broken_words_never_break_it(profiles, seed):
    "Words in any order, cut anywhere: a plan with a graph that passes its checks, and nothing lost."
    rng = np.random.default_rng(seed)
    for k in range(100):
        entry = CORPUS[int(rng.integers(len(CORPUS)))]
        profile = profiles[SHORT.get(entry["table"], entry["table"])]
        words = entry["say"].split(" ")
        if k % 2: rng.shuffle(words)
        said = " ".join(words)[int(rng.integers(0, 12)):]
        plan = make_plan(said, profile, target=entry.get("given"))
        assert plan.graph.check(profile) is not None and plan.graph.trainer.targets == list(plan.targets)


def test_a_long_text_is_quick(profiles):
    import time
    began = time.process_time()
    plan = make_plan("use 3 hidden layers, 20 epochs; " + "lorem ipsum dolor sit amet " * 400, profiles["customers"], target="churn")
    assert plan.choices["epochs"] == 20 and plan.not_understood and time.process_time() - began < 20


def test_settings_of_losses_optimizers_and_schedules_are_trained_with(profiles):
    plan = make_plan("predict price, Huber loss with delta=2, AdamW with betas (0.9, 0.95), plateau with factor 0.2 and patience 3, "
                     "30 epochs", profiles["housing_features"])
    t = plan.graph.trainer
    assert t.loss[0].params == {"delta": 2.0} and t.optimizer.params["betas"] == [0.9, 0.95] and t.early_stopping_patience is None
    assert (t.scheduler.type, t.scheduler.params) == ("plateau", {"factor": 0.2, "patience": 3})
    from arc_nb.graph.spec import Graph
    assert Graph.from_yaml(plan.graph.to_yaml()) == plan.graph
    weighed = make_plan("predict outcome, pos_weight 2.5", profiles["processed_diabetes_data"]).graph
    assert weighed.trainer.loss[0].params == {"pos_weight": 2.5} and weighed.check() is not None
    asked = make_plan("predict outcome, label smoothing 0.1, SGD with betas 0.9, 0.99", profiles["processed_diabetes_data"])
    assert [q.about for q in asked.questions] == ["loss", "optimizer"]


def test_what_is_watched_is_measured(profiles):
    plan = make_plan("predict churn, metrics: accuracy, early stopping on validation f1, patience 2", profiles["customers"])
    assert plan.graph.trainer.metrics == ["accuracy", "f1"] and plan.graph.trainer.early_stopping_monitor == "val_f1"
    warm = make_plan("predict churn, cosine with 1 warm-up epoch, 4 epochs", profiles["customers"])
    assert warm.choices["schedule_params"] == {"warmup": 0.25} and not warm.questions and not warm.not_understood
    steps = make_plan("predict churn, step decay every 2 epochs with gamma 0.5", profiles["customers"])
    assert steps.choices["schedule_params"] == {"every": 2, "factor": 0.5} and not steps.not_understood


def test_slips_of_the_finger_are_said(profiles):
    plan = make_plan("trian for 25 epohcs, predict chrun", profiles["customers"])
    assert plan.choices["epochs"] == 25 and list(plan.targets) == ["churn"] and not plan.not_understood and not plan.questions
    assert {"“epohcs” is read as “epochs”", "“chrun” is read as “churn”"} <= set(plan.flags)


def test_an_output_layer_tells_the_target_where_one_column_fits():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(300, 20)), columns=[f"m{k}" for k in range(20)]).assign(bought=rng.integers(0, 2, 300))
    said = "Build a model with:\n- Input layer with 20 features\n- Output layer: 1 neuron with sigmoid"
    plan = make_plan(said, profile_frame(frame, "t"))
    assert plan.targets == {"bought": "binary"} and not plan.questions and plan.choices["loss"] == "BCELoss"


def test_pretrained_embeddings_need_embeddings(profiles):
    plan = make_plan("predict price using pre-trained embeddings from old_model", profiles["housing_features"])
    assert {"city", "condition"} <= {c for i in plan.graph.inputs.values() if i.categorical for c in i.columns}
    none = make_plan("pre-trained embeddings from old_model", profiles["processed_diabetes_data"])
    assert any("no column holds categories" in flag for flag in none.flags)


def test_odd_columns_are_flagged():
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    frame = pd.DataFrame({"x": x, "again": x, "cost": [f"{k % 17},{k % 9}00" for k in range(200)], "y": rng.integers(0, 2, 200), "same": 1})
    plan = make_plan("predict y", profile_frame(frame, "t"))
    assert any("numbers written as text" in f for f in plan.flags) and any("again looks the same as x" in f for f in plan.flags)
    with pytest.raises(ValueError, match="only one value"): make_plan("predict same", profile_frame(frame, "t"))


def test_plans_and_graphs_are_readable_in_a_terminal(profiles):
    plan = make_plan("predict price, lr 0.1 or 0.2, 3 epochs and glitter", profiles["housing_features"])
    text = str(plan)
    assert "“glitter”" in text and "which learning rate" in text and "3 epochs" in text and len(text) < 4000 and len(repr(plan)) < 100
    assert max(map(len, text.splitlines())) < 200 and "MSELoss (price), 3 epochs" in str(plan.graph)


def test_a_wide_picture_fits_its_sheet(profiles):
    plan = make_plan("MMOE model to predict both click and conversion", profiles["ad_events"])
    assert "net fit" in plan._repr_html_() and ".fit svg{max-width:100%" in plan._repr_html_()


def test_other_words_are_no_slips_and_no_targets(profiles):
    law = make_plan("predict churn for 3 lawyers; contact matters", profiles["customers"])
    assert law.choices["layers"] == [128, 64] and "contact matters" in law.not_understood and not any("read as" in f for f in law.flags)
    left = make_plan("predict churn, total_charges must not be scaled", profiles["customers"])
    assert list(left.targets) == ["churn"] and left.not_understood
    both = make_plan("price, demand must be predicted", profiles["housing_features"])
    assert list(both.targets) == ["price", "demand"]
