"""Objectives of other libraries, and other libraries' calls: each against the library itself, where it is installed."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evoopt import minimize, spaces
from evoopt.envs import coco, ioh, pymoo, sklearn, torch
from evoopt.envs.foreign import Problem, middle
from evoopt.strategies import cma_es, differential_evolution, gradient

THREE_PARTS = r"(?s)expected.*got.*usual cause"


# COCO, ioh, pymoo ------------------------------------------------------------


def suite(name, function=1, dimension=5):
    cocoex = pytest.importorskip("cocoex")
    return cocoex.Suite(name, "", f"dimensions:{dimension} function_indices:{function} instance_indices:1")


def test_coco_values_bounds_and_whole_numbers():
    problems = suite("bbob-mixint")
    given = problems[0]
    f = coco.problem(given)
    variables = f.space()
    assert [type(v).__name__ for v in variables] == ["Integer"] * 4 + ["Real"]
    assert [v.high for v in variables] == given.upper_bounds.tolist()
    x = [np.array([1]), np.array([0]), np.array([3]), np.array([9]), np.array([-1.25])]
    assert f(x) == given(np.array([1, 0, 3, 9, -1.25]))
    result = minimize(f, variables, cma_es(8), evaluations=160, jit=False)
    assert given.evaluations == 162
    assert result.best_value == f(result.best) < f(f.start)


def test_coco_constraints_and_several_objectives():
    problems = suite("bbob-constrained", function=4, dimension=2)
    f = coco.problem(problems[0])
    answer = f(np.array([1.5, -2.0]))
    assert answer.violation.tolist() == problems[0].constraint(np.array([1.5, -2.0])).tolist()
    assert f(f.start).violation.max() <= 0  # COCO's start is feasible
    several = suite("bbob-biobj")
    with pytest.raises(ValueError, match=THREE_PARTS):
        coco.problem(several[0])


def test_ioh_is_minimised_whatever_its_direction():
    package = pytest.importorskip("ioh")
    given = package.get_problem(3, 2, 4, package.ProblemClass.BBOB)
    f = ioh.problem(given)
    assert f.optimum == given.optimum.y
    assert f(np.array(given.optimum.x)) == pytest.approx(f.optimum)
    onemax = ioh.problem(package.get_problem(1, 1, 6, package.ProblemClass.PBO))
    assert onemax.optimum == -6
    assert onemax(np.array([1, 1, 0, 1, 1, 1])) == -5
    result = minimize(onemax, onemax.space(), cma_es(8), evaluations=400, target=-6, jit=False)
    assert result.reason == "target"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pymoo_bounds_constraints_and_named_variables():
    package = pytest.importorskip("pymoo.problems")
    from pymoo.core.problem import ElementwiseProblem
    from pymoo.core.variable import Binary, Choice, Integer, Real

    given = package.get_problem("g5")
    f = pymoo.problem(given)
    x = np.array([600.0, 700.0, 0.1, -0.2])
    out = given.evaluate(x, return_as_dictionary=True)
    answer = f(x)
    assert answer.value == out["F"][0]
    assert answer.violation.tolist() == [*out["G"], *out["H"]]
    assert f.equalities == 3
    assert [v.high for v in f.space()] == [1200.0, 0.55]

    class Named(ElementwiseProblem):
        def __init__(self):
            kinds = {
                "a": Binary(),
                "b": Choice(options=["x", "y"]),
                "c": Integer(bounds=(-2, 9)),
                "d": Real(bounds=(-5, 5)),
            }
            super().__init__(vars=kinds, n_obj=1)

        def _evaluate(self, X, out, *args, **kwargs):
            out["F"] = (X["c"] - 4) ** 2 + (X["d"] - 1.5) ** 2 + (X["b"] == "x") + (not X["a"])

    named = pymoo.problem(Named())
    assert named({"a": True, "b": "y", "c": 4, "d": 1.5}) == 0
    result = minimize(named, named.space(), cma_es(10), evaluations=1500, target=1e-3, jit=False)
    assert result.reason == "target"
    assert result.best["b"] == "y"
    with pytest.raises(ValueError, match=THREE_PARTS):
        pymoo.problem(package.get_problem("zdt1"))


def test_problems_of_vectors():
    lower, upper = np.array([-np.inf, 0.0, -1.0, -1.0]), np.array([np.inf, np.inf, 3.0, 3.0])
    f = Problem("f", lambda x: float(x.sum()), lower, upper, middle(lower, upper))
    assert f.start.tolist() == [0, 0, 1, 1]
    assert [v.shape for v in f.space()] == [(1,), (1,), (2,)]
    with pytest.raises(ValueError, match=THREE_PARTS):
        f(np.ones(3))


# PyTorch ------------------------------------------------------------


def loss(p):
    return ((p["w"] - 2.0) ** 2).sum() + (p["b"] + 1.0) ** 2


def test_torch_values_and_gradients():
    package = pytest.importorskip("torch")
    start = {"w": jnp.zeros(3), "b": jnp.array(0.5)}
    f = torch.objective(loss)
    assert f(start) == pytest.approx(12 + 2.25)
    assert f(jax.device_get(start)) == f(start)
    value, grad = torch.with_gradient(f)(start)
    assert value == f(start)
    np.testing.assert_allclose(grad["w"], [-4, -4, -4])
    np.testing.assert_allclose(grad["b"], 3.0)
    assert minimize(f, start, cma_es(8), evaluations=800, target=1e-4, jit=False).reason == "target"
    found = minimize(torch.with_gradient(loss), start, gradient(optax.sgd(0.3)), generations=40, jit=False)
    assert found.best_value < 1e-6
    x = jnp.ones(4)
    assert f.tensors(x).data_ptr() == x.unsafe_buffer_pointer()  # no copy
    assert package.equal(f.tensors(x), package.ones(4))


def test_missing_packages_are_named(monkeypatch):
    for name in ("torch", "sklearn", "sklearn.base", "sklearn.model_selection"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"(?s)expected the package torch.*pip install torch"):
        torch.objective(loss)({"w": np.zeros(2), "b": np.zeros(())})
    with pytest.raises(ImportError, match=r"(?s)expected the package sklearn.*pip install scikit-learn"):
        sklearn.cross_validated(object(), None, None)({})


# scikit-learn ------------------------------------------------------------


def test_sklearn_pipelines_are_scored_by_cross_validation():
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_iris
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    X, y = load_iris(return_X_y=True)
    f = sklearn.cross_validated(make_pipeline(StandardScaler(), SVC()), X, y, cv=3)
    space = {
        "svc__C": spaces.real(1e-3, 1e3, log=True),
        "svc__kernel": spaces.categorical(["linear", "rbf"]),
        "svc__gamma": spaces.conditional(spaces.real(1e-4, 10.0, log=True), on="svc__kernel", equal="rbf"),
    }
    by_hand = cross_val_score(make_pipeline(StandardScaler(), SVC(C=0.5, kernel="linear")), X, y, cv=3).mean()
    assert f({"svc__C": np.float32(0.5), "svc__kernel": "linear"}) == -by_hand
    result = minimize(f, space, differential_evolution(6), evaluations=18, jit=False)
    assert result.best_value < -0.94
    assert f.configured(result.best).fit(X, y).score(X, y) > 0.94
    with pytest.warns(UserWarning, match="no score for"):
        assert np.isnan(f({"svc__C": -1.0}))
    with pytest.raises(ValueError, match=r"(?s)expected a parameter of Pipeline.*svc__C"):
        f({"svc_C": 1.0})
