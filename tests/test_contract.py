"""The contract of DESIGN section 1, rule by rule, over every row of the case table."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case
from conftest import START, TARGET, quadratic

from evoopt import strategies, trees, wrappers
from evoopt.answers import as_values
from evoopt.population import Population
from evoopt.run.checkpoint import digest

KEY = jax.random.key(1)
NOWHERE = jax.tree.map(jnp.zeros_like, START)  # a shift that moves nothing


def rows(claim=lambda case: True):
    """The rows that claim something, each kept to one worker so that it is compiled once."""
    return [
        pytest.param(name, marks=pytest.mark.xdist_group(name), id=name.replace(" ", "-"))
        for name, case in CASES.items()
        if claim(case)
    ]


NAMES = rows()


class Harness(NamedTuple):
    """A case with its compiled functions and one evaluated generation; made once for all rules."""

    case: Case
    strategy: Any
    oracle: Callable[..., Any]  # one object, so that workers compile it once
    traces: list[int]  # one entry for each time `tell` was traced
    init: Callable[..., Any]
    ask: Callable[..., Any]
    evaluate: Callable[..., Any]
    tell: Callable[..., Any]
    state: Any
    population: Population
    answers: Any

    def run(self, shift, key, steps):
        """What is recommended after `steps` generations on the quadratic, start and target moved by `shift`."""
        state = self.init(self.strategy, jax.tree.map(jnp.add, START, shift), jax.random.key(0))
        for i in range(steps):
            population = self.ask(self.strategy, state, jax.random.fold_in(key, i))
            state = self.tell(self.strategy, state, population, self.evaluate(population, shift))
        return self.strategy.recommend(state)


@functools.cache
def harness(name):
    case = CASES[name]
    strategy = case.make()
    oracle = strategy.oracle(quadratic)
    traces = []

    def counted(s, state, population, answers):
        traces.append(1)
        return s.tell(state, population, answers)

    init = jax.jit(lambda s, params, key: trees.strong(s.init(params, key)))
    ask = jax.jit(lambda s, state, key: s.ask(state, key))
    evaluate = jax.jit(lambda population, shift: population.map(oracle, shift, batch_size=4))
    tell = jax.jit(counted)
    state = init(strategy, START, jax.random.key(0))
    for i in range(2):  # past the first generation, which may be special
        population = ask(strategy, state, jax.random.key(100 + i))
        state = tell(strategy, state, population, evaluate(population, NOWHERE))
    population = ask(strategy, state, KEY)
    answers = evaluate(population, NOWHERE)
    return Harness(case, strategy, oracle, traces, init, ask, evaluate, tell, state, population, answers)


def with_values(answers, values):
    return (values, *answers[1:]) if isinstance(answers, tuple) else values


def finite(tree):
    return all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(tree))


def test_every_strategy_has_a_row():
    words = {word for name in CASES for word in name.split()}
    assert set(strategies.__all__) <= words, "a strategy without a row in tests/cases.py"
    others = {"reparameterized", "choices"}  # rows have it as bounded; choices start from indices: test_wrapped.py
    assert set(wrappers.__all__) - others <= words, "a wrapper without a row in tests/cases.py"


@pytest.mark.parametrize("name", NAMES)
def test_rule_1_ask_and_tell_are_pure(name):
    h = harness(name)
    before = digest(h.state)
    assert digest(h.ask(h.strategy, h.state, KEY)) == digest(h.population)
    a, b = (h.tell(h.strategy, h.state, h.population, h.answers) for _ in range(2))
    assert digest(a) == digest(b)
    assert digest(h.state) == before
    if len(h.population) > 1 and h.case.draws:
        assert digest(h.ask(h.strategy, h.state, jax.random.key(2))) != digest(h.population)


@pytest.mark.parametrize("name", NAMES)
def test_rule_2_values_are_minimised(name):
    h = harness(name)
    reached = h.run(NOWHERE, jax.random.key(3), 150)
    assert float(quadratic(reached)) < h.case.reaches
    assert h.case.reaches < float(quadratic(START)) or name.startswith("from_evosax")  # two of its hardly move


@pytest.mark.parametrize("name", NAMES)
def test_rule_3_no_answer_never_wins_and_never_poisons(name):
    h = harness(name)
    values = as_values(h.answers)
    told = lambda v: h.tell(h.strategy, h.state, h.population, with_values(h.answers, v))
    if values.size > 1:
        lost = told(values.at[3].set(jnp.nan))
        assert finite(h.strategy.recommend(lost))
        assert digest(told(values.at[3].set(-jnp.inf))) == digest(lost), "-inf is no answer, like NaN"
        assert finite(h.strategy.recommend(told(values.at[5].set(jnp.inf))))
    for nothing in (jnp.nan, jnp.inf, -jnp.inf):
        after = told(jnp.full_like(values, nothing))
        assert digest(h.strategy.recommend(after)) == digest(h.strategy.recommend(h.state))
        assert digest(drop_count(after)) == digest(drop_count(h.state))
        assert int(after.unanswered) == int(h.state.unanswered) + 1


def drop_count(state):
    if hasattr(state, "inner"):
        return state._replace(inner=drop_count(state.inner))
    return state._replace(unanswered=0)


@pytest.mark.parametrize("name", NAMES)
def test_rule_4_noise_is_random_access(name):
    h = harness(name)
    together = jax.jit(lambda p: jax.vmap(p.decode)(p.genomes))(h.population)
    in_turn = jax.jit(lambda p: jax.lax.map(p.decode, p.genomes))(h.population)
    assert digest(together) == digest(in_turn)
    i = len(h.population) - 1
    alone = jax.jit(lambda p: p.decode(p.genomes))(
        dataclasses.replace(h.population, genomes=jax.tree.map(lambda g: g[i], h.population.genomes))
    )
    assert digest(alone) == digest(jax.tree.map(lambda x: x[i], together))
    if len(h.population) > 1:
        with pytest.raises(TypeError, match="threefry"):
            h.strategy.ask(h.state, jax.random.key(0, impl="rbg"))


@pytest.mark.parametrize("name", rows(lambda case: case.own_genomes))
def test_rule_5_tell_reads_genomes(name):
    h = harness(name)
    decode = h.population.decode
    for field in ("mean", "sigma"):  # what (candidate - mean) / sigma would need
        if hasattr(decode, field):
            nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), getattr(decode, field))
            decode = dataclasses.replace(decode, **{field: nothing})
    blind = Population(decode, h.population.genomes)
    told = lambda population: h.tell(h.strategy, h.state, population, h.answers)
    assert digest(told(blind)) == digest(told(h.population))


@pytest.mark.parametrize("name", NAMES)
def test_rule_6_types_never_change_and_one_trace_serves_a_run(name):
    h = harness(name)
    new = h.tell(h.strategy, h.state, h.population, h.answers)
    first = trees.types(jax.eval_shape(h.strategy.init, START, jax.random.key(0)))
    assert trees.types(new) == trees.types(h.state) == first
    assert not any(x.weak_type for x in jax.tree.leaves(first))
    if h.case.scale:
        changed = dataclasses.replace(h.strategy, **{h.case.scale: 0.123})
        before = len(h.traces)
        assert digest(h.tell(changed, h.state, h.ask(changed, h.state, KEY), h.answers)) != digest(new)
        assert len(h.traces) == before == 1, "a hyperparameter that is not a leaf"

        def reached(x):
            s = dataclasses.replace(h.strategy, **{h.case.scale: x})
            population = s.ask(h.state, KEY)
            return s.recommend(s.tell(h.state, population, population.map(s.oracle(quadratic))))

        assert finite(jax.jit(jax.vmap(reached))(jnp.array([0.03, 0.1])))
    assert len(h.traces) == 1


@pytest.mark.parametrize("name", NAMES)
def test_rule_7_the_whole_is_the_sum_of_its_parts(name):
    h = harness(name)
    n = len(h.population)
    if n < 16:
        return  # one candidate has no parts
    parts = [slice(8, n), slice(0, 4), slice(4, 8)]  # whole micro-batches of 4, out of order
    answers = [(p, h.evaluate(h.population[p], NOWHERE)) for p in parts]
    answers = jax.tree.map(lambda *x: jnp.concatenate(x), *(a for _, a in sorted(answers, key=lambda x: x[0].start)))
    assert digest(answers) == digest(h.answers)
    sent = jax.tree.unflatten(  # over the wire: as host arrays
        jax.tree.structure(h.population), jax.device_get(jax.tree.leaves(as_data(h.population)))
    )
    a = h.tell(h.strategy, h.state, as_keys(sent, h.population), answers)
    assert digest(a) == digest(h.tell(h.strategy, h.state, h.population, h.answers))


def spread(h, replicate, workers, policy, fate):
    """Two generations evaluated by workers of this process, told by the contract's compiled `tell`."""
    from evoopt.distributed import LocalEvaluator

    evaluate, state = LocalEvaluator(workers, fate, policy=policy, batch_size=4, replicate=replicate), h.state
    for i in range(2):
        key = jax.random.fold_in(KEY, i)
        population = h.ask(h.strategy, state, key)
        answers = evaluate(population, h.oracle, NOWHERE, source=(h.strategy, state, key))
        state = h.tell(h.strategy, state, population, answers)
    return digest(state)


def alone(h):
    state = h.state
    for i in range(2):
        population = h.ask(h.strategy, state, jax.random.fold_in(KEY, i))
        state = h.tell(h.strategy, state, population, h.evaluate(population, NOWHERE))
    return digest(state)


@pytest.mark.parametrize("name", NAMES)
def test_rule_7_any_workers_any_slices_any_deaths(name):
    from evoopt.distributed import Policy
    from evoopt.distributed.local import Fate

    h = harness(name)
    ends = ("answer", "twice", "die", "lose", "answer", "late")
    faulty = lambda worker, message, i: Fate(ends[i % 6], 0.1 + 0.01 * (i % 3))
    expected = alone(h)
    assert spread(h, False, 1, Policy(), None) == expected
    for workers, micro_batches in ((2, 1), (3, 2)):
        assert spread(h, False, workers, Policy(slice=micro_batches, deaths=9), faulty) == expected


@pytest.mark.parametrize("name", NAMES)
def test_rule_7_replicas_too(name):
    from evoopt.distributed import Policy
    from evoopt.distributed.local import Fate

    h = harness(name)
    chance = np.random.RandomState(0)  # by turns, one slice may meet every death, and be quarantined, as it should
    faulty = lambda worker, message, i: Fate("die" if chance.rand() < 1 / 3 else "answer", 0.1)
    assert spread(h, True, 3, Policy(slice=1, deaths=9), faulty) == alone(h)


def is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def as_data(tree):
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


def as_keys(tree, like):
    return jax.tree.map(lambda x, k: jax.random.wrap_key_data(x) if is_key(k) else jnp.asarray(x), tree, like)


@pytest.mark.parametrize("name", rows(lambda case: case.own_genomes and not case.ties))
def test_rule_8_translation_changes_nothing(name):
    h = harness(name)
    here, there = (h.run(shift, KEY, 5) for shift in (NOWHERE, jax.tree.map(lambda x: jnp.full_like(x, 8.0), START)))
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        np.testing.assert_allclose(a + 8.0, b, atol=2e-2)  # ranks of near ties may fall the other way


@pytest.mark.parametrize("name", rows(lambda case: case.rank_invariant))
def test_rule_8_monotone_transforms_change_no_bit(name):
    h = harness(name)
    inner = lambda s: drop_value(s)
    a = h.tell(h.strategy, h.state, h.population, h.answers)
    b = h.tell(h.strategy, h.state, h.population, jnp.exp(h.answers / 30) - 7)
    assert digest(inner(a)) == digest(inner(b))


def drop_value(state):
    """Without the values that a state remembers: they are not invariant, nor need they be."""
    return state._replace(**{k: 0 for k in ("value", "values") if hasattr(state, k) and k in state._fields})


@pytest.mark.parametrize("name", NAMES)
def test_rule_9_strategies_are_frozen_pytrees(name):
    h = harness(name)
    assert dataclasses.is_dataclass(h.strategy)
    leaves, treedef = jax.tree.flatten(h.strategy)
    again = treedef.unflatten(leaves)
    assert digest(h.ask(again, h.state, KEY)) == digest(h.population)
    assert jax.tree.structure(again) == treedef
    assert type(h.strategy).__mro__[1:] == (object,), "no inheritance besides the Protocol"
    with pytest.raises(dataclasses.FrozenInstanceError):
        h.strategy.popsize = 3
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(h.state))


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_is_refused_in_three_parts(name):
    h = harness(name)
    n = len(h.population)
    grads = h.answers[1:] if isinstance(h.answers, tuple) else ()
    for wrong in (jnp.zeros(n + 1), jnp.zeros((n, 2))):
        answers = (wrong, *grads) if grads else wrong
        with pytest.raises(ValueError, match=r"(?s)expected.*got.*usual cause"):
            h.strategy.tell(h.state, h.population, answers)
    bad = {"empty": {}, "integers": jax.tree.map(lambda x: x.astype(int), START)}
    for params in bad.values():
        with pytest.raises((ValueError, TypeError), match=r"(?s)expected.*got.*usual cause"):
            h.strategy.init(params, jax.random.key(0))
    with pytest.raises(ValueError, match="NaN"):
        h.strategy.init({"w": START["w"] * jnp.nan, "b": START["b"]}, jax.random.key(0))


def flat(tree, axes=0):
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(*x.shape[:axes], -1) for x in leaves], axis=-1)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.probe is not None])
def test_the_direction_updated_is_the_direction_probed(name):
    """Five steps, among them those that refresh a subspace or a snapshot; and probes leave the parameters alone."""
    case, seen, moves = CASES[name], [], 0
    with jax.enable_x64(True):
        strategy = case.probe()
        weights = np.array([0.3, -1.0, 0.7, 2.0, -0.4, 1.1, 0.6])
        ask, tell = jax.jit(lambda *a: (p := strategy.ask(*a), p.decoded())), jax.jit(strategy.tell)
        state = trees.strong(strategy.init(jax.tree.map(jnp.float64, START), jax.random.key(0)))
        for i in range(5):
            here = flat(strategy.recommend(state))
            population, candidates = ask(state, jax.random.key(i))
            probes = flat(candidates, 1) - here
            values = jnp.asarray(probes @ weights)  # no curvature: no drift
            active = probes if population.active is None else probes[np.asarray(population.active)]
            if case.still and len(active) % 2 == 0 and np.abs(active[0]).max() > 1e-9:  # pairs: we are in the middle
                np.testing.assert_allclose(active[0::2] + active[1::2], 0, atol=1e-12)
            seen = [*seen, *probes[np.linalg.norm(probes, axis=1) > 1e-12]]
            if case.still:  # without a difference nothing moves, bit for bit
                assert (flat(strategy.recommend(tell(state, population, jnp.ones_like(values)))) == here).all()
            lost = tell(state, population, jnp.full_like(values, jnp.nan))
            assert int(lost.unanswered) == int(state.unanswered) + 1
            assert digest(drop_count(lost)) == digest(drop_count(state)), "a step without an answer does nothing"
            state = tell(state, population, values)
            step = flat(strategy.recommend(state)) - here
            moves += np.abs(step).max() > 0
            if case.still and case.along == "span":
                assert weights @ step <= 0, "it climbs"
            if case.along == "signs":
                assert (np.sign(step) == -np.sign(weights @ probes[-1]) * np.sign(probes[-1])).all()
            elif np.linalg.matrix_rank(np.array(seen)) < step.size:  # else everything is in their span
                basis = np.linalg.qr(np.array(seen).T)[0]
                assert np.linalg.norm(step - basis @ (basis.T @ step)) <= 1e-5 * np.linalg.norm(step)
    assert moves >= 2


def test_every_strategy_of_probes_is_probed():
    for name in strategies.__all__:
        module = sys.modules[getattr(strategies, name).__module__]
        if hasattr(module, "probes"):
            assert CASES[name].probe or name == "lozo_m", f"{name} has no probe in tests/cases.py"


def test_target_has_no_zero_and_no_symmetry():
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(TARGET)])
    assert (flat != 0).all()
    assert len(set(np.abs(flat))) == flat.size
