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
    emails = pd.DataFrame({"word_freq_free": num(1, .4, 3), "word_freq_money": num(1, .3, 3), "capitals": rng.integers(1, 500, n), "links": rng.integers(0, 9, n), "subject": [f"mail {k} about {k % 7}" for k in range(n)], "is_spam": flag(.4).astype(bool)})
    houses = pd.DataFrame({"area": num(120, 30), "bedrooms": rng.integers(1, 6, n), "bathrooms": rng.integers(1, 4, n), "city": pick([f"city {k}" for k in range(25)], n), "condition": pick(["poor", "fair", "good"], n),
                           "year_built": rng.integers(1900, 2020, n), "demand": num(40, 9), "price": num(3e5, 8e4, 0)})
    ads = pd.DataFrame({"user_age": rng.integers(18, 80, n), "device": pick(["phone", "tablet", "laptop"], n), "hour": rng.integers(0, 24, n), "ad_position": rng.integers(1, 6, n), "impressions": rng.integers(1, 90, n),
                        "click": flag(.3), "conversion": flag(.1), "time_spent": num(30, 9)})
    customers = pd.DataFrame({"customer_id": np.arange(n) + 1000, "gender": pick(["female", "male"], n), "age": rng.integers(18, 80, n), "tenure": rng.integers(0, 72, n), "contract": pick(["monthly", "yearly", "two years"], n),
                              "monthly_charges": num(60, 20, 2), "total_charges": np.where(rng.random(n) < .05, np.nan, num(2000, 700, 2)), "signup_date": days, "churn": pick(["no", "yes"], n)})
    return {
        "processed_diabetes_data": pd.DataFrame({"pregnancies": rng.integers(0, 14, n), "glucose": num(120, 30, 0), "blood_pressure": num(70, 12, 0), "skin_thickness": num(20, 9, 0), "insulin": num(80, 60, 0), "bmi": num(32, 7), "diabetes_pedigree": num(.5, .3, 3),
                                                  "age": rng.integers(21, 70, n), "outcome": flag(.35)}),
        "customers": customers, "housing_features": houses, "processed_emails": emails, "ad_events": ads,
        "movie_features": pd.DataFrame({"title": [f"film number {k}" for k in range(n)], "year": rng.integers(1950, 2024, n), "runtime": rng.integers(60, 200, n), "budget": num(50, 20), "votes": rng.integers(10, 9999, n), "rating": num(6.5, 1), "genre": pick(["action", "comedy", "drama", "horror"], n)}),
        "iris": pd.DataFrame({"sepal_length": num(5.8, .8), "sepal_width": num(3, .4), "petal_length": num(3.7, 1.7), "petal_width": num(1.2, .7), "species": pick(["setosa", "versicolor", "virginica"], n)}),
        "loans": pd.DataFrame({"income": num(5e4, 1e4, 0), "requested_amount": num(1e4, 3e3, 0), "approved_amount": num(9e3, 3e3, 0), "term": pick([12, 24, 36], n), "approved": flag(), "default": flag(.1)}),
        "sales": pd.DataFrame({"date": days, "store": pick(["north", "south", "east", "west"], n), "product": pick([f"p{k}" for k in range(30)], n), "unit_price": num(9, 2, 2), "promo": flag(.2), "units": rng.integers(0, 400, n)}),
        "grid": pd.DataFrame(rng.normal(size=(n, 20)), columns=[f"x{k}" for k in range(20)]).assign(y=flag()),
    }


SHORT = {"diabetes": "processed_diabetes_data", "houses": "housing_features", "emails": "processed_emails", "ads": "ad_events", "movies": "movie_features"}


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
        wanted = {**plain, "features": [f for f in plain["features"] if f not in entry.get("without", [])], **followed(entry.get("expect", {}), entry["say"])}
        got, free = plan.choices, {*asks, *({"output"} if "loss" in asks else {}), *({"weight_decay"} if "optimizer" in asks else {})}
        name = {"name"} if "name" not in entry.get("expect", {}) else set()
        for what in sorted({*wanted, *got} - free - name):
            if got.get(what) != wanted.get(what): faults.append(f"{what} is {got.get(what)!r}, not {wanted.get(what)!r}")
    return ("wrong" if faults else "asked" if asks else "listed" if entry.get("listed") else "exact"), "; ".join(faults)


def test_corpus(profiles):
    verdicts = [(judged(entry, profiles), entry["say"]) for entry in CORPUS]
    count = Counter(v for (v, _), _ in verdicts)
    wrong = [f"{say!r}: {why}" for (v, why), say in verdicts if v == "wrong"]
    print(f"\n{len(CORPUS)} phrasings over {len({e['table'] for e in CORPUS})} tables: {dict(count)}")
    assert len(CORPUS) >= 120 and not wrong, "\n".join(wrong)
