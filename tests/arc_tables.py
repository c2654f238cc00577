"""Real rows under the names that the guide's examples use: scikit-learn's own tables, so nothing is downloaded."""
from functools import cache

import pandas as pd
from sklearn import datasets


@cache
def breast_cancer() -> pd.DataFrame:
    "569 rows, 30 measurements, and whether the growth is benign: two classes."
    found = datasets.load_breast_cancer(as_frame=True).frame
    return found.rename(columns=lambda name: name.replace(" ", "_"))


@cache
def iris() -> pd.DataFrame:
    "150 rows, 4 measurements, three species by name."
    found = datasets.load_iris(as_frame=True)
    frame = found.frame.rename(columns=lambda name: name.replace(" (cm)", "").replace(" ", "_"))
    return frame.assign(species=found.target_names[frame.target]).drop(columns="target")


@cache
def digits() -> pd.DataFrame:
    "1,797 rows, 64 grey values, ten classes."
    return datasets.load_digits(as_frame=True).frame


@cache
def diabetes() -> pd.DataFrame:
    "442 rows, 10 measurements, and how far the illness went in a year: a number."
    return datasets.load_diabetes(as_frame=True, scaled=False).frame


def named(frame: pd.DataFrame, **names: str) -> pd.DataFrame:
    "The frame with some columns under other names, the new ones last."
    renamed = frame.rename(columns={old: new for new, old in names.items()})
    return renamed[[c for c in renamed if c not in names] + list(names)]


def tables() -> dict[str, pd.DataFrame]:
    "The tables of the examples by name."
    cancer, sick = breast_cancer(), diabetes()
    outcome = sick.assign(diabetes=(sick.target > sick.target.median()).astype(int)).drop(columns="target")
    two = cancer.assign(click=cancer.target, conversion=(cancer.mean_radius > cancer.mean_radius.median()).astype(int))
    ads = named(two.drop(columns=["target", "mean_radius"]), time_spent="mean_texture")[
        [*two.columns[2:20], "click", "conversion", "time_spent"]]
    city = pd.qcut(sick.bmi, 15, labels=[f"city {k}" for k in range(15)]).astype(str)  # enough of them for an embedding
    return {
        "processed_diabetes_data": outcome,
        "customers": named(cancer, churn="target"),
        "processed_emails": named(cancer, spam="target"),
        "movies": named(iris(), genre="species"),
        "movie_features": named(digits(), genre="target"),
        "houses": named(sick, price="target"),
        "housing_features": named(sick, price="target"),
        "sales": named(sick, price="target", demand="s5"),
        "ads": ads,
        "twenty": named(cancer[[*cancer.columns[:20], "target"]], bought="target"),
        "cities": named(sick.assign(city=city), price="target"),
    }
