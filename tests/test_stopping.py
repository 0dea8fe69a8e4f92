"""When a search ends by itself, without restarts: which criterion, in what words, and when it must not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_programs import compilations

import evoopt
from evoopt import Run, Stop, Stops, minimize, stopping, strategies, wrappers

ELSEWHERE = jnp.array([1.3, -0.7, 2.1])
OFF = Stops(0.0, 0.0, 0.0, 0.0, *[jnp.inf] * 4, 0.0, jnp.inf)


def bowl(x):
    return jnp.sum(jnp.array([1.0, 10.0, 100.0]) * (x - ELSEWHERE) ** 2)


def run(strategy, f=bowl, x0=(0.0, 0.0, 0.0), **options):
    return minimize(f, jnp.array(x0), strategy, **{"generations": 3000, **options})


SLOW = pytest.mark.slow
WIDTH = ["cma_es", *(pytest.param(name, marks=SLOW) for name in ("sep_cma_es", "snes"))]


@pytest.mark.parametrize("name", WIDTH)
def test_a_converged_run_ends_and_says_why(name):
    strategy = getattr(strategies, name)(8)
    found = run(strategy, stop=Stops(tolx=1e-3))
    assert (found.reason, found.generations < 1000) == ("tolx", True)
    np.testing.assert_allclose(found.recommended, ELSEWHERE, atol=0.02)
    assert "below tolx=0.001" in found.why
    assert found.why in str(found)
    width = strategy.dispersion(found.state, 0)
    assert f"{max(float(width.std.max()), float(jnp.abs(width.path).max())):.3g}" in found.why
    further = run(strategy, stop=None, generations=found.generations + 5)
    assert (further.reason, further.generations, further.why) == ("generations", found.generations + 5, "")
    assert [row["best"] for row in further.history[:-5]] == [row["best"] for row in found.history], "the same run"


@pytest.mark.parametrize(
    ("f", "stops", "expected"),
    [
        (bowl, {"tolfun": 1e-3}, Stop.TOLFUN),
        (bowl, {"tolfunhist": 1e-2}, Stop.TOLFUNHIST),
        (bowl, {"tolfunrel": 1e-4}, Stop.TOLFUNREL),
        (bowl, {"tolconditioncov": 5.0}, Stop.TOLCONDITIONCOV),
        (lambda x: -jnp.sum(x), {"tolfacupx": 1e3}, Stop.TOLFACUPX),
        (bowl, {}, Stop.NOEFFECTCOORD),
    ],
)
def test_criteria_have_names_and_words(f, stops, expected):
    found = run(strategies.cma_es(8), f, stop=Stops(**{name: getattr(OFF, name) for name in OFF.__dict__} | stops))
    assert found.reason == expected.name.lower()
    assert evoopt.Stop[found.reason.upper()] is expected
    number = next(iter(stops.values()), None)
    assert number is None or f"{expected.name.lower()}={number:g}" in found.why
    assert "{" not in found.why


def test_every_criterion_has_its_words():
    watch = stopping.begun(3, 8, jnp.float32(1.0), distribution=True)
    every = watch._replace(ended=np.array([False] + [True] * (len(Stop) - 1)), generation=np.int32(50))
    every = every._replace(ended=every.ended & (np.arange(len(Stop)) != Stop.MAXITER))  # of restarts alone
    from evoopt.run import ending

    reasons = ending.reasons(every._replace(recent_best=np.zeros(5, np.float32)), Stops())
    assert [why.stop for why in reasons.values()] == [stop for stop in Stop if stop not in (Stop.NONE, Stop.MAXITER)]
    assert all(name == why.stop.name.lower() and len(str(why)) > 20 for name, why in reasons.items())
    assert ending.reasons(watch, Stops()) == ending.reasons(None, Stops()) == {}


def test_the_host_and_workers_end_at_the_same_generation():
    host = lambda x: float(bowl(x))
    strategy, stops = strategies.cma_es(8), Stops(tolfun=1e-4)
    found = minimize(host, np.zeros(3), strategy, generations=500, jit=False, stop=stops)
    assert (found.reason, "below tolfun=0.0001" in found.why) == ("tolfun", True)
    far = minimize(lambda x: 1e9 + host(x), np.zeros(3), strategy, generations=500, jit=False, stop=stops)
    assert far.reason in ("tolfun", "tolfunhist")
    assert abs(far.generations - found.generations) <= 3, "an offset is not a value"


def test_dispatches_do_not_change_where_a_run_ends():
    stops, strategy = Stops(tolx=1e-4), strategies.sep_cma_es(8)
    one = run(strategy, stop=stops)
    assert one.generations == run(strategy, stop=stops, every=1, callbacks=[lambda c, rows: None]).generations
    assert one.reason == "tolx"


def test_equal_values_from_the_start_are_no_convergence():
    """A reward that nobody has found yet; and one that was found."""
    sparse = lambda x: jnp.where(jnp.sum((x - 40.0) ** 2) < 1, -1.0, 0.0)
    for strategy in (strategies.cma_es(8), strategies.differential_evolution(8)):
        assert run(strategy, sparse, generations=120).reason == "generations"
    stairs = lambda x: jnp.floor(jnp.sum((x - 1.3) ** 2))
    found = run(strategies.cma_es(8), stairs, (4.0, 4.0, 4.0))
    assert found.best_value == 0
    assert found.reason in ("tolfun", "tolfunhist", "tolflatfitness")
    assert found.generations > 10 + 30 * 3 // 8, "not at the first flat generation"


def test_strategies_without_a_distribution_end_when_all_values_are_the_same():
    found = run(strategies.differential_evolution(16), generations=2000)
    assert (found.reason, found.best_value < 1e-10) == ("tolfun", True)
    assert run(strategies.random_search(8), generations=300).reason == "generations"


def test_a_parent_that_stays_is_no_stagnation():
    found = run(strategies.one_plus_one_es(sigma=0.01), generations=400)
    assert found.reason == "generations"
    converged = run(strategies.one_plus_one_es(), generations=5000, stop=Stops(tolx=1e-3))
    assert (converged.reason, float(bowl(converged.best)) < 1e-2) == ("tolx", True)


def test_what_restarts_by_itself_is_not_ended():
    strategy = wrappers.bounded(wrappers.ipop(strategies.cma_es(16), 8), -5.0)
    found = run(strategy, generations=700)
    assert (found.reason, int(found.state.restarts) > 0) == ("generations", True)
    assert stopping.restarts_itself(strategy)
    assert stopping.restarts_itself(wrappers.bipop(strategies.cma_es(16)))
    assert not stopping.restarts_itself(wrappers.bounded(strategies.cma_es(8), -5.0))


WRAPPED = {
    "bounded": wrappers.bounded(strategies.cma_es(8), -5.0, 5.0),
    "masked": wrappers.masked(strategies.cma_es(8), (True, False)),
    "averaged": wrappers.averaged(wrappers.scheduled(strategies.snes(8), learning_rate=lambda i: 1.0)),
    "best_so_far": wrappers.best_so_far(wrappers.rounded(strategies.sep_cma_es(8))),
    "subspace": wrappers.subspace(strategies.cma_es(8), 3),
}


@pytest.mark.parametrize("name", ["bounded", "masked", *(pytest.param(n, marks=SLOW) for n in list(WRAPPED)[2:])])
def test_wrappers_pass_the_width_on(name):
    f = lambda x: bowl(x[0]) if isinstance(x, tuple) else bowl(x)
    x0 = (jnp.zeros(3), jnp.zeros(2)) if name == "masked" else jnp.zeros(3)
    found = minimize(f, x0, WRAPPED[name], generations=1500, stop=Stops(tolx=1e-3))
    assert found.reason == "tolx"
    width = WRAPPED[name].dispersion(found.state, 1)
    assert width.mean.shape == width.std.shape == (3,)
    assert float(width.std.max()) < 1e-3


@pytest.mark.parametrize(
    "name",
    [
        "xnes",
        "ma_es",
        "cr_fm_nes",
        "pgpe",
        *(pytest.param(n, marks=SLOW) for n in ("one_plus_one_es", "snes", "sep_cma_es")),
    ],
)
def test_the_width_is_that_of_the_samples(name):
    strategy = strategies.one_plus_one_es() if name == "one_plus_one_es" else getattr(strategies, name)(8)
    tell, ask = jax.jit(strategy.tell), jax.jit(strategy.ask)
    state = strategy.init(jnp.array([1.0, 2.0, 3.0]), jax.random.key(0))
    for i in range(12):
        population = ask(state, jax.random.key(i))
        state = tell(state, population, population.vmap(bowl))
    draws = jax.jit(jax.vmap(lambda key: strategy.ask(state, key).decoded()))(jax.random.split(jax.random.key(7), 4000))
    width = strategy.dispersion(state, 1)
    np.testing.assert_allclose(width.std, draws.reshape(-1, 3).std(axis=0), rtol=0.05)
    np.testing.assert_allclose(width.mean, draws.reshape(-1, 3).mean(axis=0), atol=0.1 * float(width.std.max()))
    if name not in ("cr_fm_nes",):  # one standard deviation long, by the covariance of the samples
        c = np.cov(np.asarray(draws.reshape(-1, 3)).T)
        assert 0.9 < float(width.axis @ np.linalg.solve(c, width.axis)) ** 0.5 < 1.1
    assert float(width.longest) >= float(width.shortest) > 0


def test_a_run_that_has_ended_goes_on_with_other_tolerances(tmp_path):
    strategy, stops = strategies.sep_cma_es(8), Stops(tolx=1e-2)
    folder = Run.create(tmp_path, "a", {})
    ended = run(strategy, stop=stops, run=folder)
    assert ended.reason == "tolx"
    again = run(strategy, stop=stops, run=folder)
    assert (again.reason, again.generations, again.why) == ("tolx", ended.generations, ended.why)
    further = run(strategy, stop=Stops(tolx=1e-4), run=folder)
    whole = run(strategy, stop=Stops(tolx=1e-4))
    assert (further.reason, further.generations, further.why) == ("tolx", whole.generations, whole.why)
    on = run(strategy, stop=None, run=folder, generations=further.generations + 7)
    assert (on.reason, on.generations) == ("generations", further.generations + 7)
    last = run(strategy, stop=Stops(tolx=1e-4), run=folder, generations=on.generations + 3)
    assert last.generations in (on.generations, on.generations + 1), "what was not watched begins to be"


def test_other_tolerances_compile_nothing():
    run(strategies.sep_cma_es(8), stop=Stops(tolx=1e-2))
    with compilations() as found:
        run(strategies.sep_cma_es(8), stop=Stops(tolx=1, tolfun=1e-3))
    assert found == [0]


def test_two_runs_under_vmap_end_each_by_itself():
    """`watched` in a loop of one's own."""
    strategy, stops = strategies.sep_cma_es(8), stopping.numbers(Stops(tolx=1e-3))

    def search(x0, key):
        state = strategy.init(x0, key)
        watch = stopping.watching(strategy, state, 8)

        def step(loop):
            state, watch = loop
            population = strategy.ask(state, jax.random.fold_in(key, watch.generation))
            values = population.vmap(bowl)
            state = strategy.tell(state, population, values)
            return state, stopping.watched(strategy, watch, state, values, jnp.int32(8), stops)

        going = lambda loop: ~loop[1].ended.any() & (loop[1].generation < 500)
        return jax.lax.while_loop(going, step, (state, watch))[1]

    starts, keys = jnp.stack([jnp.zeros(3), jnp.full(3, 30.0)]), jax.random.split(jax.random.key(2))
    both = jax.jit(jax.vmap(search))(starts, keys)
    assert (both.ended[:, Stop.TOLX]).all()
    assert len(set(both.generation.tolist())) == 2
    one = jax.jit(search)(starts[1], keys[1])
    assert abs(int(one.generation) - int(both.generation[1])) <= 2
