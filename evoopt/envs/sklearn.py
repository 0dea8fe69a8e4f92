"""Hyperparameters of a scikit-learn estimator, scored by cross-validation.

f = sklearn.cross_validated(make_pipeline(StandardScaler(), SVC()), X, y)
space = {"svc__C": real(1e-3, 1e3, log=True), "svc__kernel": categorical(["linear", "rbf"])}
minimize(f, space, cma_es(), evaluations=200, jit=False)
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np

from evoopt.checks import nearest
from evoopt.envs.libraries import load
from evoopt.types import error


@dataclasses.dataclass(frozen=True, eq=False)
class CrossValidated:
    """Minus an estimator's mean score; see `cross_validated`."""

    estimator: Any
    X: Any
    y: Any
    cv: Any
    scoring: Any

    def __call__(self, params: dict[str, Any]) -> float:
        """Minus the mean score with these parameters; NaN, with a warning, where the estimator can't be fitted."""
        selection = load("sklearn.model_selection", "scikit-learn")
        estimator = self.configured(params)
        try:
            scores = selection.cross_val_score(
                estimator, self.X, self.y, cv=self.cv, scoring=self.scoring, error_score="raise"
            )
        except Exception as reason:  # parameters that do not go together are no end of a search
            warnings.warn(f"no score for {params}: {type(reason).__name__}: {reason}", stacklevel=2)
            return float("nan")
        return -float(np.mean(scores))

    def configured(self, params: dict[str, Any]) -> Any:
        """A new estimator with these parameters: `configured(result.best).fit(X, y)`.

        Raises:
            ValueError: for a parameter that it does not have.
        """
        estimator = load("sklearn.base", "scikit-learn").clone(self.estimator)
        known = estimator.get_params()
        for name in params:
            if name not in known:
                near = nearest(name, known)
                cause = f"misspelt: {', '.join(near)}" if near else "a step of the pipeline left out of the name"
                raise error(f"a parameter of {type(estimator).__name__}", f"'{name}'", cause)
        return estimator.set_params(**{name: _plain(x) for name, x in params.items()})


def cross_validated(estimator: Any, X: Any, y: Any, *, cv: Any = 5, scoring: Any = None) -> CrossValidated:
    """An objective over a dict of an estimator's parameters: minus its cross-validated score.

    Args:
        estimator: any estimator or pipeline; a parameter of a step is `step__name`. One with a fixed `random_state`
            has the same score each time.
        X, y: the data.
        cv: folds, or a splitter; the same folds for all candidates.
        scoring: as of `cross_val_score`: higher is better. None: the estimator's own.

    What a conditional variable leaves absent keeps the estimator's own setting.
    """
    return CrossValidated(estimator, X, y, cv, scoring)


def _plain(x: Any) -> Any:
    """Numbers of Python, which scikit-learn checks for."""
    return x.item() if isinstance(x, (np.ndarray, np.generic)) and np.ndim(x) == 0 else x
