"""`scipy.optimize.minimize`'s call for any strategy: the same arguments, the same result."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from evoopt import bounds as boxes
from evoopt.answers import Answer, number
from evoopt.checks import check_strategy, nearest
from evoopt.recipes.scipy_constraints import Limits, limits_of
from evoopt.run.minimize import Result, minimize
from evoopt.stopping import Stops
from evoopt.strategies import cma_es
from evoopt.strategy import value
from evoopt.types import error, pytree
from evoopt.wrappers.reparameterized import Reparameterized

EVALUATIONS = 10_000  # times the number of variables
OPTIONS = ("maxfev", "maxiter", "maxtime", "xtol", "ftol", "target", "popsize", "seed", "sigma", "ctol", "disp")
SAME = {"xatol": "xtol", "fatol": "ftol", "maxfun": "maxfev", "rng": "seed", "random_state": "seed"}  # scipy's names


def scipy_minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    method: Any = None,
    jac: Any = None,
    hess: Any = None,
    hessp: Any = None,
    bounds: Any = None,
    constraints: Any = (),
    tol: float | None = None,
    callback: Callable[..., Any] | None = None,
    options: dict[str, Any] | None = None,
    *,
    evaluator: Any = None,
) -> Any:
    """`scipy.optimize.minimize(fun, x0, args, ...)`, searched by a strategy, in float64.

    Args:
        fun: `fun(x, *args)`, x a vector of float64; NaN where it has no value.
        x0: where to start. None: the middle of the bounds, of which all must be given.
        args: more arguments of fun.
        method: a strategy, whose step-size is in units of `options["sigma"]`, and which gets the bounds if it takes
            some and has none; None: CMA-ES. With constraints it is wrapped in an augmented Lagrangian, unless it reads
            violations itself.
        jac: for a first-order strategy, such as `gradient(optax.adam(.1))`: the gradient `jac(x, *args)`, or True where
            fun answers (value, gradient). Other strategies have no use for it.
        hess, hessp: not used.
        bounds: `scipy.optimize.Bounds`, or a pair for each variable, None where there is no bound. fun is never called
            outside.
        constraints: dicts, `NonlinearConstraint`, `LinearConstraint`, or a list of them.
        tol: for xtol and ftol both.
        callback: called after each generation as scipy does: `callback(x)`, or `callback(intermediate_result)` with an
            `OptimizeResult`. It ends the search by raising StopIteration, or by returning True.
        options: maxfev, maxiter (generations), maxtime (seconds), xtol (tolerance of x, in units of sigma), ftol (of
            the values of a generation), target (a value that is good enough), popsize, seed, sigma, ctol, disp. sigma
            is the initial standard deviation, a number or one for each variable: by default a quarter of the range
            between two bounds, otherwise a third of |x0|, at least .3. ctol is how far an equality may be off, 1e-6.
            Without any budget 10,000 evaluations a variable.
        evaluator: calls fun in parallel, such as `evoopt.distributed.ProcessEvaluator(4)`.

    Returns:
        `scipy.optimize.OptimizeResult` with x, fun, nfev, nit, success, status, message, `maxcv` with constraints, and
        `evoopt`, our own `Result`. success is False where a budget ended the search or no feasible point was found.

    Raises:
        ValueError: for options, bounds or a method that it does not know.

    >>> from scipy.optimize import rosen
    >>> result = scipy_minimize(rosen, [1.3, 0.7, 0.8], options={"maxfev": 4000, "target": 1e-10})
    >>> result.success, result.x.round(4).tolist()
    (True, [1.0, 1.0, 1.0])
    """
    del hess, hessp
    chosen = _options(options or {}, tol)
    with jax.enable_x64(True):
        lower, upper, start = _box(bounds, x0)
        scale = _scale(chosen.get("sigma"), start, lower, upper)
        limits = limits_of(constraints, np.asarray(start))
        strategy = cma_es(chosen.get("popsize")) if method is None else _checked(method)
        oracle = strategy.oracle(fun)
        derives = oracle is not fun and strategy.oracle is not value
        if derives and jac is None:
            cause = "a strategy that asks for derivatives, of which a function in Python has none by itself"
            raise error("jac, the gradient of fun or True where fun answers both", "jac=None", cause)
        if jac is not None and jac is not True and not derives:
            warnings.warn("this strategy does not use gradient information (jac)", RuntimeWarning, stacklevel=2)
        strategy = _boxed(strategy, (lower - start) / scale, (upper - start) / scale)
        move = Moved(start, scale, lower, upper)
        # Pytrees, so that another call compiles nothing.
        search: Any = Reparameterized(strategy, move, Partial(Moved.inverse, move))
        if limits.count and not hasattr(strategy, "violated"):
            search = _constrained(search, limits, float(chosen.get("ctol", 1e-6)))
        result = minimize(
            Objective(fun, args if isinstance(args, tuple) else (args,), jac, derives, limits),
            start,
            search,
            key=int(chosen.get("seed", 0)),
            generations=chosen.get("maxiter"),
            evaluations=_evaluations(chosen, len(start)),
            seconds=chosen.get("maxtime"),
            target=chosen.get("target"),
            callbacks=[] if callback is None else [_Callback(callback, limits)],
            every=None if callback is None else 1,
            progress=bool(chosen.get("disp", False)),
            jit=False,
            evaluator=evaluator,
            stop=_stops(chosen),
        )
        return _said(result, limits)


def _boxed(strategy: Any, lower: np.ndarray, upper: np.ndarray) -> Any:
    """The strategy between these walls, if it takes bounds, has none, and there are some on both sides."""
    names = {f.name for f in dataclasses.fields(strategy)} if dataclasses.is_dataclass(strategy) else set()
    takes = {"lower", "upper"} <= names and strategy.lower is None and strategy.upper is None  # type: ignore[union-attr]
    if not takes or not (np.isfinite([lower, upper]).all() and (lower < upper).all()):
        return strategy
    return dataclasses.replace(strategy, lower=lower, upper=upper)  # type: ignore[type-var]


def _constrained(strategy: Any, limits: Limits, tolerance: float) -> Any:
    from evoopt.wrappers import augmented_lagrangian

    equality = [i >= limits.count - limits.equal for i in range(limits.count)]
    return augmented_lagrangian(strategy, equality, tolerance=tolerance)


# What is called ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Objective:
    """scipy's function of a vector, as an objective in Python."""

    fun: Callable[..., Any]
    args: tuple
    jac: Any
    derives: bool  # whether the gradient is asked for
    limits: Limits

    def __call__(self, x: Any) -> Any:
        x = np.array(x, float)  # its own, which it may write into
        answer, grad = self.fun(x, *self.args), None
        if self.jac is True:
            answer, grad = answer
        elif self.derives:
            grad = self.jac(np.array(x), *self.args)
        if self.derives:
            return number(answer), np.asarray(grad, float)
        return Answer(number(answer), self.limits.violation(x)) if self.limits.count else answer


@pytree
class Moved:
    """u -> x: from the start in units of the scale, mirrored at the bounds."""

    start: Any
    scale: Any
    lower: Any
    upper: Any

    def __call__(self, u: Any) -> Any:
        x = boxes.fold(self.start + self.scale * u, self.lower, self.upper)
        return jnp.where(self.lower == self.upper, self.lower, x)

    def virtual(self, u: Any) -> Any:
        return self(u)

    def inverse(self, x: Any) -> Any:
        return (x - self.start) / self.scale


class _Callback:
    """A callback of scipy's, called after each generation."""

    def __init__(self, callback: Callable[..., Any], limits: Limits) -> None:
        self.callback, self.limits, self.nfev = callback, limits, 0
        try:
            names = set(inspect.signature(callback).parameters)
        except ValueError:  # written in C
            names = set()
        self.whole = names == {"intermediate_result"}

    def __call__(self, carry: Any, rows: list[dict[str, Any]]) -> bool:
        from scipy.optimize import OptimizeResult

        self.nfev = rows[-1]["evaluations"]
        x = np.array(carry.best, float)
        try:
            if self.whole:
                now = OptimizeResult(x=x, fun=float(carry.best_value), nfev=self.nfev, nit=int(carry.generation))
                return self.callback(intermediate_result=now) is True
            return self.callback(x) is True
        except StopIteration:
            return True


# scipy's words ------------------------------------------------------------


def _options(given: dict[str, Any], tol: float | None) -> dict[str, Any]:
    found = {} if tol is None else {"xtol": tol, "ftol": tol}
    for name, option in given.items():
        own = SAME.get(name, name)
        if own not in OPTIONS:
            near = nearest(own, [*OPTIONS, *SAME])
            cause = f"misspelt: {', '.join(near)}" if near else "an option of another method"
            raise error(f"options among {', '.join(OPTIONS)}", f"'{name}'", cause)
        if option is not None:
            found[own] = option
    return found


def _checked(method: Any) -> Any:
    if isinstance(method, str):
        cause = "the name of a method of scipy: None takes CMA-ES"
        raise error("a strategy as the method, such as differential_evolution()", repr(method), cause, TypeError)
    check_strategy(method)
    return method


def _stops(chosen: dict[str, Any]) -> Stops:
    """The tolerances by which a search ends by itself."""
    names = {"xtol": ("tolx",), "ftol": ("tolfun", "tolfunhist")}
    return Stops(**{own: float(chosen[name]) for name, owns in names.items() if name in chosen for own in owns})


def _evaluations(chosen: dict[str, Any], d: int) -> int | None:
    budgets = ("maxfev", "maxiter", "maxtime")
    return chosen.get("maxfev") if any(name in chosen for name in budgets) else EVALUATIONS * d


def _box(bounds: Any, x0: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(lower, upper, start), each (d,)."""
    if bounds is None:
        if x0 is None:
            raise error("a start x0, or bounds", "neither", "an argument left out")
        start = np.atleast_1d(np.asarray(x0, float)).ravel()
        return np.full(start.shape, -np.inf), np.full(start.shape, np.inf), start
    if hasattr(bounds, "lb"):
        lower, upper = np.atleast_1d(bounds.lb).astype(float), np.atleast_1d(bounds.ub).astype(float)
    else:
        absent = lambda side, number: number if side is None else float(side)
        try:
            pairs = [(absent(low, -np.inf), absent(high, np.inf)) for low, high in bounds]
        except (TypeError, ValueError):
            cause = "lower and upper bounds apart: scipy.optimize.Bounds(lower, upper)"
            raise error("a pair of bounds for each variable", repr(bounds)[:60], cause) from None
        lower, upper = (np.array(side) for side in zip(*pairs, strict=True))
    if x0 is None:
        if not np.isfinite([lower, upper]).all():
            raise error("two bounds for each variable where there is no x0", repr(bounds)[:60], "an infinite bound")
        x0 = (lower + upper) / 2
    start = np.atleast_1d(np.asarray(x0, float)).ravel()
    try:
        lower, upper = (np.broadcast_to(side, start.shape) for side in (lower, upper))
    except ValueError:
        got = f"{len(lower)} for {len(start)} variables"
        raise error("a pair of bounds for each variable", got, "a start of another length") from None
    if not (lower <= upper).all():
        raise error("lower <= upper", f"{lower} and {upper}", "bounds in the wrong order")
    if ((start < lower) | (start > upper)).any():
        warnings.warn("x0 is outside the bounds, and is clipped into them", RuntimeWarning, stacklevel=3)
    return lower, upper, np.clip(start, lower, upper)


def _scale(sigma: Any, start: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """The initial standard deviation of each variable, (d,)."""
    if sigma is not None:
        scale = np.broadcast_to(np.asarray(sigma, float), start.shape)
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise error("sigma > 0, a standard deviation or one for each variable", str(sigma), "a slipped sign")
        return scale
    with np.errstate(invalid="ignore"):
        width = upper - lower
    return np.where(np.isfinite(width) & (width > 0), width / 4, np.maximum(abs(start) / 3, 0.3))


def _said(result: Result, limits: Limits) -> Any:
    """The result as scipy gives it."""
    from scipy.optimize import OptimizeResult

    x = np.array(result.best, float)
    status, message = _STATUS.get(result.reason, (0, f"Optimization terminated successfully: {result.why}."))
    if result.reason in _DIVERGED:
        status, message = 5, f"The search did not converge: {result.why}."
    found = OptimizeResult(
        x=x, fun=float(result.best_value), nfev=result.evaluations, nit=result.generations, evoopt=result
    )
    if limits.count:
        found.maxcv = limits.most(x)
        if not result.feasible:
            status, message = 4, f"No feasible point was found: the least violated one is off by {found.maxcv:.3g}."
    if not np.isfinite(found.fun):
        status, message = 3, "The function had no value at any point."
    found.update(success=status == 0, status=status, message=message)
    return found


_DIVERGED = ("tolfacupx", "tolupsigma", "tolconditioncov")
_STATUS = {
    "evaluations": (1, "Maximum number of function evaluations has been exceeded."),
    "generations": (2, "Maximum number of iterations has been exceeded."),
    "seconds": (1, "Maximum time has been exceeded."),
    "target": (0, "Optimization terminated successfully: the target is reached."),
    "unanswered": (3, "The function had no value at any point."),
    "callback": (99, "`callback` raised `StopIteration` or returned True."),
    "interrupted": (99, "Interrupted."),
    "terminated": (99, "Terminated."),
}
