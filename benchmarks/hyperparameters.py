"""A mixed space: ten hyperparameters of a classifier of digits, of three kinds, seven of them conditional.

The loss is the mean squared error of the class indicators (Brier) over three folds of 450 digits of scikit-learn's
bundled data. An evaluation takes some milliseconds.

| variable | kind | exists |
|---|---|---|
| scaler | none, standard, minmax | always |
| components | integer 2 to 60, of a PCA | always |
| model | kernel, neighbours | always |
| alpha | real 1e-8 to 1e3, log | model is kernel |
| kernel | rbf, laplacian, poly | model is kernel |
| gamma | real 1e-6 to 1e2, log | model is kernel |
| sharpness | real 1e-1 to 1e2, log, of the softmax of the scores | model is kernel |
| degree | integer 2 to 6 | kernel is poly |
| neighbours | integer 1 to 60, log | model is neighbours |
| weights | uniform, distance | model is neighbours |
"""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import numpy as np

SAMPLERS = ("tpe", "multivariate tpe", "cma-es", "random")
SAMPLES, FOLDS, CLASSES = 450, 3, 10


@functools.cache
def folds(scaler: str) -> list[tuple[np.ndarray, ...]]:
    """Training and validation data of each fold on all principal components, with indicators (n, 10)."""
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA
    from sklearn.model_selection import StratifiedKFold
    from sklearn.preprocessing import FunctionTransformer, MinMaxScaler, StandardScaler

    x, y = load_digits(return_X_y=True)
    some = np.random.default_rng(0).permutation(len(x))[:SAMPLES]
    x, y = x[some], y[some]
    make = {"none": FunctionTransformer, "standard": StandardScaler, "minmax": MinMaxScaler}[scaler]
    parts = []
    for train, valid in StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(x, y):
        scaled = make().fit(x[train])
        pca = PCA(random_state=0).fit(scaled.transform(x[train]))
        on = lambda rows, scaled=scaled, pca=pca: pca.transform(scaled.transform(x[rows]))
        parts.append((on(train), y[train], on(valid), np.eye(CLASSES)[y[valid]]))
    return parts


def loss(h: dict[str, Any]) -> float:
    """The validation loss of hyperparameters; those that do not exist under the choices made are absent."""
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.neighbors import KNeighborsClassifier

    losses = []
    for x, y, x_valid, wanted in folds(h["scaler"]):
        x, x_valid = x[:, : int(h["components"])], x_valid[:, : int(h["components"])]
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            if h["model"] == "kernel":
                options = {"degree": int(h["degree"])} if h["kernel"] == "poly" else {}
                alpha: Any = float(h["alpha"])
                model = KernelRidge(alpha=alpha, kernel=h["kernel"], gamma=float(h["gamma"]), **options)
                scores = float(h["sharpness"]) * model.fit(x, np.eye(CLASSES)[y]).predict(x_valid)
                got = np.exp(scores - scores.max(axis=1, keepdims=True))
                got /= got.sum(axis=1, keepdims=True)
            else:
                model = KNeighborsClassifier(int(h["neighbours"]), weights=h["weights"])
                got = model.fit(x, y).predict_proba(x_valid)
        losses.append(((got - wanted) ** 2).sum(axis=1).mean())
    value = float(np.mean(losses))
    return value if np.isfinite(value) else 100.0


def suggested(trial: Any) -> dict[str, Any]:
    """The same space for Optuna."""
    h = {
        "scaler": trial.suggest_categorical("scaler", ["none", "standard", "minmax"]),
        "components": trial.suggest_int("components", 2, 60),
        "model": trial.suggest_categorical("model", ["kernel", "neighbours"]),
    }
    if h["model"] == "kernel":
        h["alpha"] = trial.suggest_float("alpha", 1e-8, 1e3, log=True)
        h["kernel"] = trial.suggest_categorical("kernel", ["rbf", "laplacian", "poly"])
        h["gamma"] = trial.suggest_float("gamma", 1e-6, 1e2, log=True)
        h["sharpness"] = trial.suggest_float("sharpness", 1e-1, 1e2, log=True)
        if h["kernel"] == "poly":
            h["degree"] = trial.suggest_int("degree", 2, 6)
    else:
        h["neighbours"] = trial.suggest_int("neighbours", 1, 60, log=True)
        h["weights"] = trial.suggest_categorical("weights", ["uniform", "distance"])
    return h


def optuna_search(name: str, evaluations: int, seed: int) -> np.ndarray:
    """The best loss after each evaluation of an Optuna sampler: tpe, multivariate tpe, cma-es or random."""
    import optuna

    optuna.logging.set_verbosity(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = {
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
            "multivariate tpe": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True),
            "cma-es": lambda: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        }[name]()
        study = optuna.create_study(sampler=sampler)
        study.optimize(lambda trial: loss(suggested(trial)), n_trials=evaluations)
    return np.minimum.accumulate(np.array([float(t.value or 0.0) for t in study.trials]))


def space() -> dict[str, Any]:
    """The same space for evoopt."""
    from evoopt.spaces import categorical, conditional, integer, real

    kernel, neighbours = (functools.partial(conditional, on="model", equal=name) for name in ("kernel", "neighbours"))
    return {
        "scaler": categorical(["none", "standard", "minmax"]),
        "components": integer(2, 60),
        "model": categorical(["kernel", "neighbours"]),
        "alpha": kernel(real(1e-8, 1e3, log=True)),
        "kernel": kernel(categorical(["rbf", "laplacian", "poly"])),
        "gamma": kernel(real(1e-6, 1e2, log=True)),
        "sharpness": kernel(real(1e-1, 1e2, log=True)),
        "degree": conditional(integer(2, 6), on="kernel", equal="poly"),
        "neighbours": neighbours(integer(1, 60, log=True)),
        "weights": neighbours(categorical(["uniform", "distance"])),
    }


def search(evaluations: int, seed: int, strategy: Any = None) -> np.ndarray:
    """The best loss after each evaluation of one of our strategies, CMA-ES by default."""
    from evoopt import minimize
    from evoopt.strategies import cma_es

    losses: list[float] = []

    def f(h: dict[str, Any]) -> float:
        losses.append(loss(h))
        return losses[-1]

    minimize(f, space(), strategy or cma_es(), key=seed, evaluations=evaluations, jit=False, stop=None)
    losses += losses[-1:] * (evaluations - len(losses))  # where the last generation is not a whole one
    return np.minimum.accumulate(losses)[:evaluations]
