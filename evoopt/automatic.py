"""What searches if no strategy is given: one table of rules, read from the top, of which the first that holds decides.

`minimize(f, x0)` and `Session(auto(), x0)` use it, `evoopt explain` prints it. It looks at what is known before the
first evaluation: how many numbers, of which kinds, how many evaluations, how many at once, noise, constraints. So the
same call always takes the same strategy. `docs/which_strategy.md` has the measurements that the table was chosen by.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from evoopt import spaces, strategies, trees, wrappers
from evoopt.spaces import Space
from evoopt.spaces.kinds import Real, Simplex
from evoopt.strategies.covariance import recombination
from evoopt.types import Key, Params, error

EVALUATIONS = 1000  # for each number that is searched, where the budget isn't known
COORDINATES = 400  # evaluations a number for a search that goes by coordinates, if the function is separable
LOCAL = 100  # evaluations a number for one local search
NEAR = 0.4  # first step-size of a surrogate search, which begins where the coordinates were left
EDGE = 0.3  # first step of a local search, which begins there too
FEW = 3  # numbers up to which the simplex search is better than quasi-Newton steps
MEMORY = 300  # points that Bayesian optimization is fitted to
LARGE = 2000  # numbers beyond which a covariance matrix costs too much
HUGE = 200_000  # numbers beyond which a generation of candidates is not held


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a problem before it is searched.

    Attributes:
        numbers: how many are searched: d.
        evaluations: the budget.
        parallel: candidates that are evaluated at once.
        noisy: the same candidate has another value the next time.
        constraints: how many violations the objective answers.
        several: several good solutions are wanted.
        real: nothing but real numbers.
        start: where it starts, or the origin of its space.
        box: trees (lower, upper) like the start, in the strategy's units; None without two finite bounds a number.
    """

    numbers: int
    evaluations: float
    parallel: int
    noisy: bool
    constraints: int
    several: bool
    real: bool
    start: Params
    box: tuple[Params, Params] | None

    @property
    def each(self) -> float:
        """Evaluations for each number."""
        return self.evaluations / self.numbers

    @property
    def walls(self) -> dict[str, Params]:
        """The box as arguments."""
        return {} if self.box is None else {"lower": self.box[0], "upper": self.box[1]}

    @property
    def popsize(self) -> int:
        """CMA-ES's own, but as many as are evaluated at once."""
        return max(recombination.default_popsize(self.numbers), self.parallel)

    def anywhere(self, key: Key) -> Params:
        """A start drawn evenly from the box; without one, a step of 1 from the start in every number."""
        leaves, treedef = jax.tree.flatten(self.start)
        keys = jax.random.split(key, len(leaves))
        if self.box is None:
            step = lambda key, x: jnp.asarray(x) + jax.random.normal(key, jnp.shape(x), jnp.result_type(x))
            return treedef.unflatten([step(k, x) for k, x in zip(keys, leaves, strict=True)])
        sides = zip(keys, leaves, *map(jax.tree.leaves, self.box), strict=True)
        even = lambda key, x, low, high: jax.random.uniform(key, jnp.shape(x), jnp.result_type(x), low, high)
        return treedef.unflatten([even(*side) for side in sides])

    def room(self, generations: int = 100) -> int:
        """The largest popsize that restarts may grow to: of a run of so many generations within the budget."""
        most = min(self.evaluations / generations, 512 * self.popsize)
        return self.popsize * 2 ** max(0, int(math.log2(max(1.0, most / self.popsize))))


class Rule(NamedTuple):
    """A row of the table."""

    when: str
    holds: Callable[[Facts], bool]
    what: str
    build: Callable[[Facts], Any]
    why: str


class Choice(NamedTuple):
    """What was chosen: the strategy, by which rule, and the reason in words."""

    strategy: Any
    rule: Rule
    why: str


def _cma_es(facts: Facts, sigma: float = 1.0) -> Any:
    return strategies.cma_es(facts.room(), sigma=sigma)


def _ipop(facts: Facts) -> Any:
    # Choices and whole numbers have distributions of their own, which begin again where they began.
    restarts = wrappers.ipop(_cma_es(facts), facts.popsize, start=facts.anywhere if facts.real else None)
    return dataclasses.replace(restarts, most=facts.room())


def _bipop(facts: Facts, sigma: float = 1.0) -> Any:
    restarts = wrappers.bipop(_cma_es(facts, sigma), facts.popsize, start=facts.anywhere)
    return dataclasses.replace(restarts, most=facts.room())


def _coordinates(facts: Facts) -> Any:
    return strategies.coordinate_search(**facts.walls)


def _local(facts: Facts) -> Any:
    """Local search with restarts: the simplex where it is at its best, in few dimensions."""
    make = strategies.nelder_mead if facts.numbers <= FEW else strategies.quasi_newton
    return make(sigma=EDGE, **facts.walls)


def _before(facts: Facts, last: Any) -> Any:
    """A coordinate search and one local search, both limited, and then the last strategy."""
    d = facts.numbers
    return wrappers.portfolio((_coordinates(facts), COORDINATES * d), (_local(facts), LOCAL * d), last)


def _surrogate(facts: Facts) -> Any:
    """Coordinates, while the function is separable; then CMA-ES with a model of the objective."""
    search = wrappers.surrogate(_bipop(facts, sigma=NEAR))
    return wrappers.portfolio((_coordinates(facts), COORDINATES * facts.numbers), search)


def _bayesian(facts: Facts) -> Any:
    options = {"memory": max(2 * facts.parallel, min(int(facts.evaluations), MEMORY))}
    return strategies.bayesian_optimization(facts.parallel, **facts.walls, **options)


def _several(facts: Facts) -> Any:
    """Diffusion evolution from a population that covers the box: three eighths of its width is a standard deviation."""
    n = max(512, facts.parallel)
    steps = max(10, min(100, int(facts.evaluations) // n))
    spread = 3.0
    if facts.box is not None:
        widths = [float(jnp.max(high - low)) for low, high in zip(*map(jax.tree.leaves, facts.box), strict=True)]
        spread = 0.375 * max(widths)
    return strategies.diffusion_evolution(n, steps=steps, spread=spread)


TABLE: tuple[Rule, ...] = (
    Rule(
        "several good solutions are wanted",
        lambda f: f.several,
        "diffusion_evolution",
        _several,
        "its population stays on several optima",
    ),
    Rule(
        "the objective answers violations",
        lambda f: f.constraints > 0,
        "augmented_lagrangian(ipop(cma_es))",
        lambda f: wrappers.augmented_lagrangian(_ipop(f), f.constraints),
        "an augmented Lagrangian converges at the border of what is feasible, as no rule of comparison does",
    ),
    Rule(
        "the objective is noisy",
        lambda f: f.noisy,
        "noisy(ipop(cma_es))",
        lambda f: wrappers.noisy(_ipop(f)),
        "a popsize that follows the noise, and a recommended mean",
    ),
    Rule(
        f"more than {HUGE} numbers",
        lambda f: f.numbers > HUGE,
        "openai_es",
        lambda f: strategies.openai_es(max(64, f.parallel + f.parallel % 2)),
        "its noise is drawn again and not held",
    ),
    Rule(
        f"more than {LARGE} numbers",
        lambda f: f.numbers > LARGE,
        "sep_cma_es",
        lambda f: strategies.sep_cma_es(f.popsize),
        "a whole covariance matrix would cost more than the objective",
    ),
    Rule(
        "whole numbers, choices or orders",
        lambda f: not f.real,
        "ipop(cma_es)",
        _ipop,
        "whole numbers keep a least deviation and choices have probabilities, so none freezes; restarts around it",
    ),
    Rule(
        "at most 20 evaluations a number in a box",
        lambda f: f.each <= 20 and f.numbers <= 40 and f.box is not None,
        "bayesian_optimization",
        _bayesian,
        "so few evaluations are expensive ones: each is thought about for some hundredths of a second",
    ),
    Rule(
        "few evaluations: at most 3000 a number for up to 10 numbers, at most 100 for up to 40",
        lambda f: f.parallel == 1 and ((f.each <= 3000 and f.numbers <= 10) or (f.each <= 100 and f.numbers <= 40)),
        "coordinate_search, surrogate(bipop(cma_es))",
        _surrogate,
        "separable functions are cheap to try, and a model of the objective saves evaluations",
    ),
    Rule(
        "one evaluation at a time",
        lambda f: f.parallel == 1,
        "coordinate_search, a local search, bipop(cma_es)",
        lambda f: _before(f, _bipop(f)),
        "separable and smooth functions cost little to try, and restarts with small and large popsizes the rest",
    ),
    Rule("otherwise", lambda f: True, "bipop(cma_es)", _bipop, "restarts with small and large popsizes"),
)


@dataclasses.dataclass(frozen=True)
class Auto:
    """A strategy that is chosen when the problem is known; see `auto`."""

    parallel: int = 1
    noisy: bool = False
    constraints: int = 0
    several: bool = False
    evaluations: float | None = None

    def chosen(self, x0: Params, evaluations: float | None = None) -> Choice:
        """The strategy for a start or a space, and the budget of the call; None where that has none."""
        facts = self.facts(x0, self.evaluations if evaluations is None else evaluations)
        rule = next(rule for rule in TABLE if rule.holds(facts))
        about = f"{facts.numbers} numbers, {facts.evaluations:.6g} evaluations"
        return Choice(rule.build(facts), rule, f"{rule.what} ({about}; {rule.when}): {rule.why}")

    def facts(self, x0: Params, evaluations: float | None = None) -> Facts:
        """What is known of a problem."""
        space = None
        if spaces.is_space(x0):
            space = x0 if isinstance(x0, Space) else Space(x0)
        start = trees.searchable(x0) if space is None else trees.strong(space.origin())
        d = trees.size(start)
        real = space is None or all(isinstance(v, (Real, Simplex)) for v in space.free.values())
        return Facts(
            d, EVALUATIONS * d if evaluations is None else evaluations, self.parallel, self.noisy, self.constraints,
            self.several, real, start, None if space is None else _box(space),
        )  # fmt: skip


def _box(space: Space) -> tuple[Params, Params] | None:
    """The walls of a space in the strategy's units; None where a number has none."""
    boxes = {name: v.box() for name, v in space.free.items()}
    low, high = ({name: jnp.asarray(box[i]) for name, box in boxes.items()} for i in (0, 1))
    whole = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((low, high)))
    return (low, high) if whole else None


def auto(
    *,
    parallel: int = 1,
    noisy: bool = False,
    constraints: int = 0,
    several: bool = False,
    evaluations: float | None = None,
) -> Auto:
    """The strategy that fits the problem: `minimize` takes it if none is given.

    Args:
        parallel: candidates that are evaluated at once, which no generation should be smaller than.
        noisy: the same candidate has another value the next time.
        constraints: how many violations the objective answers, each at most 0 where it holds.
        several: several good solutions are wanted, not the best one alone.
        evaluations: the budget, where the call does not have it, as a `Session`; otherwise 1000 for each number.

    >>> import jax.numpy as jnp
    >>> from evoopt import minimize
    >>> result = minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(3), auto(parallel=16), evaluations=3000)
    >>> bool(result.best_value < 1e-8)
    True
    >>> auto(noisy=True).chosen(jnp.zeros(3)).rule.what
    'noisy(ipop(cma_es))'
    """
    if parallel < 1:
        raise error("parallel of at least 1", str(parallel), "the number of evaluations that run at once")
    return Auto(parallel, noisy, constraints, several, evaluations)


def usual(x0: Params) -> int:
    """The budget of a call that has none: evaluations."""
    return EVALUATIONS * Auto().facts(x0).numbers


def settled(strategy: Any, x0: Params, evaluations: float | None) -> tuple[Any, str]:
    """A strategy and why it was chosen; "" for one that was given. `auto()` is settled now."""
    if not isinstance(strategy, Auto):
        return strategy, ""
    choice = strategy.chosen(x0, evaluations)
    return choice.strategy, choice.why
