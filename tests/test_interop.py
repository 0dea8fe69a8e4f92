"""Objectives of other libraries, and other libraries' calls: each against the library itself, where it is installed."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evoopt import minimize, scipy_minimize, spaces, wrappers
from evoopt.envs import coco, ioh, pymoo, sklearn, torch
from evoopt.envs.command import command
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
    result = minimize(f, space, differential_evolution(6), evaluations=12, jit=False)
    assert result.best_value < -0.94
    assert f.configured(result.best).fit(X, y).score(X, y) > 0.94
    with pytest.warns(UserWarning, match="no score for"):
        assert np.isnan(f({"svc__C": -1.0}))
    with pytest.raises(ValueError, match=r"(?s)expected a parameter of Pipeline.*svc__C"):
        f({"svc_C": 1.0})


# Optuna ------------------------------------------------------------


def sampled(t):
    x, n = t.suggest_float("x", -5, 5), t.suggest_int("n", 0, 20, step=2)
    y, c = t.suggest_float("y", 1e-4, 1.0, log=True), t.suggest_categorical("c", ["a", None, 3.5])
    z = t.suggest_float("z", 0.0, 1.0, step=0.25) if c == "a" else 0.0
    w = t.suggest_int("w", 1, 1000, log=True)
    t.suggest_float("fixed", 2.0, 2.0)
    return (x - 1.2) ** 2 + (np.log10(y) + 2) ** 2 + 0.1 * (n - 6) ** 2 + (c is not None) + z + np.log10(w / 30) ** 2


@pytest.fixture
def optuna(monkeypatch):
    package = pytest.importorskip("optuna")
    before = package.logging.get_verbosity()
    package.logging.set_verbosity(package.logging.WARNING)
    yield package
    package.logging.set_verbosity(before)


def study(optuna, sampler, **options):
    return optuna.create_study(sampler=sampler, **options)


@pytest.mark.parametrize(
    "strategy", [cma_es(8), pytest.param(differential_evolution(8), marks=pytest.mark.slow)], ids=["cma_es", "de"]
)
def test_optuna_studies_are_searched_and_reproducible(optuna, strategy):
    from evoopt.recipes.optuna import EvooptSampler

    first, again = (study(optuna, EvooptSampler(strategy, seed=4)) for _ in range(2))
    first.optimize(sampled, n_trials=90)
    again.optimize(sampled, n_trials=40)
    assert [t.params for t in first.trials[:40]] == [t.params for t in again.trials]
    assert np.mean([t.value for t in first.trials[-20:]]) < 0.5 * np.mean([t.value for t in first.trials[:20]])
    up = study(optuna, EvooptSampler(strategy, seed=4), direction="maximize")
    up.optimize(lambda t: -sampled(t), n_trials=40)
    assert [t.params for t in up.trials] == [t.params for t in again.trials]


def test_an_optuna_study_goes_on_in_another_process_and_with_other_workers(optuna, tmp_path):
    import pickle

    from evoopt.recipes.optuna import EvooptSampler

    sampler = lambda: EvooptSampler(cma_es(6), seed=1)
    sampled = lambda t: (t.suggest_float("x", -5, 5) - 1.2) ** 2 + 0.1 * (t.suggest_int("n", 0, 20, step=2) - 6) ** 2
    whole = study(optuna, sampler())
    whole.optimize(sampled, n_trials=30)
    url = f"sqlite:///{tmp_path}/study.db"
    study(optuna, sampler(), storage=url, study_name="s").optimize(sampled, n_trials=14)
    workers = [
        optuna.load_study(study_name="s", storage=url, sampler=one)
        for one in (
            EvooptSampler(cma_es(6), seed=99, independent=sampler().independent),
            pickle.loads(pickle.dumps(sampler())),
        )
    ]  # the seed is the study's
    for i in range(16):
        workers[i % 2].optimize(sampled, n_trials=1)
    assert [t.params for t in whole.trials] == [t.params for t in workers[0].trials]


def test_optuna_trials_that_fail_are_pruned_enqueued_or_run_at_once(optuna):
    from evoopt.recipes.optuna import EvooptSampler

    sampler = EvooptSampler(cma_es(6), seed=2)
    s = study(optuna, sampler)

    def objective(t):
        x = t.suggest_float("x", -3.0, 3.0)
        y = t.suggest_float("y", -3.0, 3.0)
        if t.number % 5 == 3:
            raise optuna.TrialPruned
        if t.number % 7 == 4:
            raise ArithmeticError
        return float("nan") if t.number == 9 else (x - 1) ** 2 + (y + 2) ** 2

    s.enqueue_trial({"x": 0.0, "y": 0.0})
    s.optimize(objective, n_trials=20, catch=ArithmeticError)
    s.enqueue_trial({"x": 3.0})
    s.optimize(objective, n_trials=60, n_jobs=3, catch=ArithmeticError)
    assert len(s.trials) == 80
    assert s.best_value < 0.3
    (search,) = sampler._studies[s].searches.values()
    assert search.number >= 8  # 80 trials in generations of 6, less what came besides
    lost = study(optuna, sampler)
    for _ in range(40):  # one of the workers never answers
        trial = lost.ask()
        value = sampled(trial)
        if trial.number != 3:
            lost.tell(trial, value)
    assert {t.system_attrs["evoopt:place"][1] for t in lost.trials[1:]} >= {0, 1, 2}


def test_optuna_refusals(optuna, monkeypatch):
    from evoopt.recipes.optuna import EvooptSampler

    with pytest.raises(TypeError, match=THREE_PARTS):
        EvooptSampler("cma_es")
    several = optuna.create_study(directions=["minimize", "maximize"], sampler=EvooptSampler(cma_es(6)))
    with pytest.raises(ValueError, match=r"(?s)expected one objective.*got.*usual cause"):
        several.optimize(lambda t: (t.suggest_float("x", 0, 1), 1.0), n_trials=2)
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "evoopt.recipes.optuna")
    with pytest.raises(ImportError, match=r"pip install evoopt-jax\[optuna\]"):
        import evoopt.recipes.optuna  # noqa: F401


# scipy's call ------------------------------------------------------------


def valley(x, a=1.0):
    return float(100 * (x[1] - x[0] ** 2) ** 2 + (a - x[0]) ** 2 + 3.0 * (x[2] - 0.25) ** 2)


def test_scipy_results_bounds_and_callbacks():
    from scipy.optimize import Bounds, OptimizeResult

    x0 = np.array([0.5, 0.3, 0.8])
    before = jnp.ones(1).dtype
    result = scipy_minimize(valley, x0, options={"maxfev": 5000, "target": 1e-13})
    assert isinstance(result, OptimizeResult)
    assert result.success
    assert result.fun == valley(result.x) < 1e-13
    assert result.nfev == result.evoopt.evaluations <= 5000
    assert x0.tolist() == [0.5, 0.3, 0.8]
    assert jnp.ones(1).dtype == before
    seen, whole = [], []

    def inside(x):
        assert (x >= [0, -1, 0.5]).all()
        assert (x <= [0.6, 9, 0.5]).all()
        return valley(x)

    walls = [(0, 0.6), (-1, None), (0.5, 0.5)]
    result = scipy_minimize(inside, [0.5, 0.3, 0.5], bounds=walls, callback=seen.append, options={"maxiter": 60})
    np.testing.assert_allclose(result.x, [0.6, 0.36, 0.5], atol=1e-3)
    assert (result.status, result.success, result.nit, len(seen)) == (2, False, 60, 60)

    def stops(intermediate_result):
        whole.append(intermediate_result)
        if len(whole) == 3:
            raise StopIteration

    box = Bounds([-1, -1, -1], [2, 2, 2])
    result = scipy_minimize(valley, None, (1.5,), bounds=box, callback=stops, options={"seed": 3})
    assert (result.status, result.nit, whole[-1].nit) == (99, 3, 3)
    assert whole[-1].fun == result.fun == valley(result.x, 1.5)


def test_scipy_takes_any_strategy_and_gradients():
    start = np.array([0.5, 0.3, 0.8])
    square = lambda x, c: (float(((x - c) ** 2).sum()), 2 * (x - c))
    options = {"maxiter": 40, "sigma": 1.0}
    result = scipy_minimize(square, start, (2.0,), gradient(optax.sgd(0.3)), jac=True, options=options)
    np.testing.assert_allclose(result.x, 2.0, atol=1e-6)
    apart = scipy_minimize(
        lambda x, c: square(x, c)[0], start, (2.0,), gradient(optax.sgd(0.3)), jac=lambda x, c: square(x, c)[1],
        options=options,
    )  # fmt: skip
    assert apart.x.tolist() == result.x.tolist()
    result = scipy_minimize(
        valley, None, method=differential_evolution(20), bounds=[(-1, 2)] * 3, options={"maxfev": 4000, "target": 0.05}
    )
    assert result.success


def test_scipy_tolerances_end_a_search():
    result = scipy_minimize(valley, np.ones(3), options={"xtol": 1e-3, "seed": 1})
    assert result.success
    assert result.evoopt.reason == "tolx"
    assert 1e-12 < result.fun < 1e-3
    assert scipy_minimize(valley, np.ones(3), tol=1e-8, options={"seed": 1}).fun < 1e-9


@pytest.mark.skipif(not hasattr(wrappers, "augmented_lagrangian"), reason="without constraints")
def test_scipy_constraints_of_all_kinds():
    from scipy.optimize import LinearConstraint, NonlinearConstraint

    square = lambda x: float((x**2).sum() + 3.0)
    dicts = [
        {"type": "ineq", "fun": lambda x, c: x[0] - c, "args": (1.0,)},
        {"type": "eq", "fun": lambda x: x[1] - 0.5},
    ]
    result = scipy_minimize(square, [2.0, 2.0, 2.0], constraints=dicts, options={"seed": 1, "maxfev": 6000})
    np.testing.assert_allclose(result.x, [1, 0.5, 0], atol=1e-4)
    assert result.maxcv < 1e-4
    objects = [
        LinearConstraint([[1, 1, 0], [0, 1, 0]], [1.5, 0.5], [np.inf, 0.5]),
        NonlinearConstraint(lambda x: x[2] ** 3, -np.inf, 8.0),
    ]
    result = scipy_minimize(square, [2.0, 2.0, 1.0], constraints=objects, options={"seed": 1, "maxfev": 6000})
    np.testing.assert_allclose(result.x, [1, 0.5, 0], atol=1e-4)
    impossible = {"type": "ineq", "fun": lambda x: -1.0 - x[0] ** 2}
    result = scipy_minimize(square, np.ones(2), constraints=impossible, options={"maxfev": 200})
    assert (result.success, result.status) == (False, 4)
    assert "off by 1" in result.message


def test_scipy_refusals():
    with pytest.raises(TypeError, match=r"(?s)expected a strategy as the method.*SLSQP.*usual cause"):
        scipy_minimize(valley, np.ones(3), method="SLSQP")
    for options in ({"maxfevs": 3}, {"sigma": -1.0}):
        with pytest.raises(ValueError, match=THREE_PARTS):
            scipy_minimize(valley, np.ones(3), options=options)
    for given in (None, [(0, 1)] * 2, [0, 1, 2], [(1, 0)] * 3):
        with pytest.raises(ValueError, match=THREE_PARTS):
            scipy_minimize(valley, None if given is None else np.ones(3), bounds=given)
    with pytest.raises(ValueError, match=r"(?s)expected jac"):
        scipy_minimize(valley, np.ones(3), method=gradient(optax.sgd(0.1)))
    with pytest.raises(ValueError, match=r"(?s)expected a constraint.*usual cause"):
        scipy_minimize(valley, np.ones(3), constraints={"type": "leq", "fun": valley})
    with pytest.raises(TypeError, match=r"(?s)expected constraints as scipy has them"):
        scipy_minimize(valley, np.ones(3), constraints=valley)
    with pytest.warns(RuntimeWarning, match="clipped"):
        scipy_minimize(valley, np.ones(3), bounds=[(2, 3)] * 3, options={"maxiter": 1})


# A program as the objective ------------------------------------------------------------


def test_programs_as_objectives(caplog):
    code = (
        "import sys, time; x = float(sys.argv[1]); print('x', x); x > 8 and time.sleep(99); print('cost', (x - 2) ** 2)"
    )
    f = command([sys.executable, "-c", code, "{gain}"], timeout=2.0)
    assert f({"gain": np.float32(0.5)}) == 2.25
    assert np.isnan(f({"gain": 9.0}))
    assert "longer than 2 s" in caplog.text
    assert np.isnan(command([sys.executable, "-c", "import sys; sys.exit('broken')"])(1.0))
    assert "status 1, broken" in caplog.text
    vector = command(lambda c: ["echo", *c], parse=lambda text: len(text.split()))
    assert vector(np.ones(3)) == 3
    assert command(["echo", "{x}"]).line([1, 2.5]) == ["echo", "1,2.5"]
    with pytest.raises(ValueError, match=THREE_PARTS):
        command(["/no/such/program"])(1.0)
    with pytest.raises(ValueError, match=THREE_PARTS):
        f({"gains": 1.0})
    with pytest.raises(ValueError, match=THREE_PARTS):
        command(["echo", "nothing"])(1.0)
