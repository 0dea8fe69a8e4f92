"""Any strategy samples an Optuna study: storage, dashboard, pruning and distributed workers come from Optuna.

Nothing of a search is kept besides Optuna's own storage. A trial has an attribute that says which generation and place
it is, and the rest follows: a strategy's state is a function of the seed and the values told, so every worker, and a
study that is loaded again, comes to the same state by telling the finished generations over.
"""

from __future__ import annotations

import hashlib
import math
import random
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from evoopt import noise as noises
from evoopt import spaces
from evoopt.checks import check_strategy
from evoopt.envs.libraries import load
from evoopt.run import programs
from evoopt.run.session import Session
from evoopt.types import error

optuna = load("optuna")
PLACE, SEED = "evoopt:place", "evoopt:seed"  # attributes of a trial: [search, generation, place]; of a study
KEPT = 4  # searches of a study in memory; the others are told again from the storage
FINISHED = ("COMPLETE", "PRUNED", "FAIL")


class EvooptSampler(optuna.samplers.BaseSampler):
    """An Optuna sampler that searches with a strategy. Studies that maximise are maximised: the study owns the sign.

        study = optuna.create_study(sampler=EvooptSampler(cma_es(8), seed=1))
        study.optimize(objective, n_trials=200, n_jobs=4)

    The parameters that all finished trials have are searched together, by the strategy; the others (those under a
    condition, those that are new, all of the first trial) are drawn by `independent`. When that set changes, a new
    search begins. A failed trial has no answer, a pruned one the worst value. With several workers at once, a worker
    that finds the generation all handed out draws from the same distribution besides; such trials count for the best
    value only, so that popsize should be well above the number of workers.

    The first worker writes its seed into the study, for all of them. A study with one worker is reproducible.

    Args:
        strategy: from `evoopt.strategies`, without bounds of its own. Its step-size is in units of a quarter of a
            parameter's range.
        seed: of the search and of `independent`.
        independent: another sampler, for what is not searched. None: random.

    Raises:
        TypeError: something that is not a strategy.
        ValueError: (at the first trial) a study with several objectives.
    """

    def __init__(self, strategy: Any, *, seed: int | None = None, independent: Any = None) -> None:
        check_strategy(strategy)
        self.strategy = strategy
        self.seed = random.SystemRandom().randrange(1 << 31) if seed is None else int(seed)
        self.independent = independent or optuna.samplers.RandomSampler(seed=seed)
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._studies: weakref.WeakKeyDictionary[Any, _Known] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("strategy", "seed", "independent")}

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.__dict__.update(kept)
        self._forget()

    def reseed_rng(self) -> None:
        """For workers that are copies of one another; what the strategy draws is by the study."""
        self.independent.reseed_rng()

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        """The parameters of all finished trials that have more than one value."""
        del trial
        with self._lock:
            common = self._known(study).common.calculate(study)
        return {name: kind for name, kind in common.items() if not kind.single()}

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        """The trial's place in the strategy's generation, and its parameters."""
        if len(study.directions) != 1:
            cause = "a study with several directions: a multi-objective sampler of Optuna's"
            raise error("one objective", f"{len(study.directions)} directions", cause)
        if not search_space:
            return {}
        with self._lock:
            search = self._search(study, search_space)
            trials = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
            mine = [
                (t, *t.system_attrs[PLACE][1:]) for t in trials if t.system_attrs.get(PLACE, [""])[0] == search.name
            ]
            search.advance(mine, study.direction.name == "MAXIMIZE")
            held = {place for _, number, place in mine if number == search.number}
            place = next(i for i in range(len(held) + 1) if i not in held)
            # Written at once, so that no other worker takes it; where two do, the first answer counts.
            study._storage.set_trial_system_attr(trial._trial_id, PLACE, [search.name, search.number, place])
            return search.parameters(place)

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        """A parameter that is not searched."""
        return self.independent.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Any, trial: Any) -> None:
        """For `independent`."""
        self.independent.before_trial(study, trial)

    def after_trial(self, study: Any, trial: Any, state: Any, values: Sequence[float] | None) -> None:
        """For `independent`; values are read from the study when a generation is complete."""
        self.independent.after_trial(study, trial, state, values)

    def _known(self, study: Any) -> _Known:
        if study not in self._studies:
            self._studies[study] = _Known(optuna.search_space.IntersectionSearchSpace(), {})
        return self._studies[study]

    def _search(self, study: Any, search_space: dict[str, Any]) -> _Search:
        searches = self._known(study).searches
        name = hashlib.sha256(repr(sorted(search_space.items())).encode()).hexdigest()[:12]
        if name not in searches:
            attributes = study._storage.get_study_system_attrs(study._study_id)
            if SEED not in attributes:
                study._storage.set_study_system_attr(study._study_id, SEED, self.seed)
            while len(searches) >= KEPT:
                searches.pop(next(iter(searches)))
            searches[name] = _Search(self.strategy, search_space, name, attributes.get(SEED, self.seed))
        return searches[name]


class _Known(NamedTuple):
    """What is remembered of a study; all of it can be read from the storage again."""

    common: Any  # the parameters that all trials have
    searches: dict[str, _Search]


class _Search:
    """A strategy over one set of parameters, told what a study's storage has of it."""

    def __init__(self, strategy: Any, kinds: dict[str, Any], name: str, seed: int) -> None:
        self.name, self.kinds = name, kinds
        self.space = {name: _variable(kind) for name, kind in kinds.items()}
        self.session = Session(strategy, self.space, key=seed)
        self._asked: tuple[int, Any, list[Any]] | None = None
        self._more: dict[int, list[Any]] = {}

    @property
    def number(self) -> int:
        """The generation that is to be answered."""
        return self.session.number

    def advance(self, trials: list[tuple[Any, int, int]], maximize: bool) -> None:
        """Tell all generations that are complete. `trials` are (trial, generation, place)."""
        while True:
            generation, candidates = self._generation()
            done = [(t, place) for t, number, place in trials if number == self.number and t.state.name in FINISHED]
            first: dict[int, Any] = {}
            for t, place in sorted(done, key=lambda x: x[0].number):
                first.setdefault(place, t)
            n = len(candidates)
            # A worker that died holds its place for ever: it is given up after as many trials besides.
            if not all(i in first for i in range(n)) and len(done) < 2 * n:
                return
            values = [self._value(first.get(i), self._named(candidates[i]), maximize) for i in range(n)]
            self.session.tell(generation, values)
            self._more.clear()

    def parameters(self, place: int) -> dict[str, Any]:
        """What a place of the generation tries."""
        _, candidates = self._generation()
        n = len(candidates)
        if place < n:
            return self._named(candidates[place])
        return self._named(self._besides(place // n)[place % n])

    def _generation(self) -> tuple[Any, list[Any]]:
        if self._asked is None or self._asked[0] != self.number:
            generation = self.session.ask()
            self._asked = self.number, generation, list(generation)
        return self._asked[1:]

    def _besides(self, round_: int) -> list[Any]:
        """Other draws from the same distribution."""
        if round_ not in self._more:
            session = self.session
            key = noises.fold_in(noises.fold_in(session.key, session.number), _BESIDES + round_)
            self._more[round_] = list(programs.Bound(session.strategy).ask(session.state, key))
        return self._more[round_]

    def _named(self, candidate: dict[str, Any]) -> dict[str, Any]:
        return {name: _external(kind, candidate[name]) for name, kind in self.kinds.items()}

    def _value(self, trial: Any, asked: dict[str, Any], maximize: bool) -> float:
        """What the strategy is told: NaN for no answer, infinity for a pruned trial."""
        if trial is None or not all(_same(trial.params.get(name), x) for name, x in asked.items()):
            return math.nan  # its parameters were given by somebody else, as by `enqueue_trial`
        if trial.state.name == "PRUNED":
            return math.inf
        if trial.state.name == "FAIL" or trial.value is None:
            return math.nan
        return -trial.value if maximize else trial.value


_BESIDES = 0x6265  # folded into the key for draws besides the generation


def _variable(kind: Any) -> Any:
    """The variable of a distribution; steps and choices are counted."""
    if isinstance(kind, optuna.distributions.CategoricalDistribution):
        return spaces.categorical(range(len(kind.choices)))
    if isinstance(kind, optuna.distributions.IntDistribution) and kind.log:
        return spaces.integer(kind.low, kind.high, log=True)
    if kind.step is not None:
        return spaces.integer(0, round((kind.high - kind.low) / kind.step))
    return spaces.real(kind.low, kind.high, log=kind.log)


def _external(kind: Any, x: Any) -> Any:
    """A value of the variable as Optuna's parameter."""
    if isinstance(kind, optuna.distributions.CategoricalDistribution):
        return kind.choices[int(x)]
    if isinstance(kind, optuna.distributions.IntDistribution):
        return int(x) if kind.log else kind.low + int(x) * kind.step
    if kind.step is not None:
        return min(kind.low + int(x) * kind.step, kind.high)
    return min(max(float(x), kind.low), kind.high)


def _same(a: Any, b: Any) -> bool:
    """Whether a trial has the parameter that it was asked for; storages may round."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9)
    return a == b
