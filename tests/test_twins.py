"""Every strategy against a plain NumPy re-statement of its paper's equations, fed the same noise and the same values.

The papers maximise a return; here the return is minus the value. A twin gets the population's directions and the
values, and must come to the same mean (and sigma) for 20 generations.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evoopt import noise, shaping, strategies
from evoopt.strategies.gaussian import sampling
from evoopt.strategies.gaussian.evolution_strategy import EvolutionStrategy

STEPS = 20
START = {"b": np.array(0.3), "w": np.array([[1.0, -0.5], [0.25, 2.0]])}
TARGET = np.array([-0.7, 2.0, -1.0, 0.5, 3.0])  # in the order of the leaves: b, then w
D = TARGET.size


def quadratic(x):
    return ((x - TARGET) ** 2 * [1.0, 3.0, 0.5, 2.0, 5.0]).sum(axis=-1) + 0.3 * (x[..., 0] - 1) * (x[..., 1] + 2)


def rosenbrock(x):
    y = x - TARGET + 1
    return (100 * (y[..., 1:] - y[..., :-1] ** 2) ** 2 + (1 - y[..., :-1]) ** 2).sum(axis=-1)


def vectors(tree):
    """Leaves (n, ...) -> (n, d) in float64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def vector(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


# ---- the papers' equations ----


def ranks_of_returns(returns):
    """0 for the least return to n - 1 for the greatest; no ties here."""
    return np.argsort(np.argsort(returns))


class Adam:
    """Kingma & Ba 2015, algorithm 1: the step to add when `g` is to be descended along."""

    def __init__(self):
        self.m = self.v = np.zeros(D)
        self.t = 0

    def __call__(self, g, rate):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        return -rate * (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)


class OpenAI:
    """Salimans et al. 2017, algorithm 2 with mirrored sampling, ranks in [-0.5, 0.5], Adam and weight decay."""

    def __init__(self, sigma, rate, decay):
        self.mean, self.sigma, self.rate, self.decay, self.adam = vector(START), sigma, rate, decay, Adam()

    def candidates(self, eps):
        return self.mean + self.sigma * eps

    def update(self, eps, values):
        n = len(values)
        shaped = ranks_of_returns(-values) / (n - 1) - 0.5
        ascent = sum(f * e for f, e in zip(shaped, eps, strict=True)) / (n * self.sigma)
        self.mean = self.mean + self.adam(-ascent, self.rate) - self.rate * self.decay * self.mean


class ARS:
    """Mania et al. 2018, algorithm 2: the b best of N directions, sigma_R over their 2b returns."""

    def __init__(self, nu, alpha, b):
        self.mean, self.nu, self.alpha, self.b = vector(START), nu, alpha, b

    def candidates(self, delta):
        return self.mean + self.nu * delta

    def update(self, delta, values):
        plus, minus, delta = -values[0::2], -values[1::2], delta[0::2]
        best = np.argsort(-np.maximum(plus, minus))[: self.b]
        deviation = np.concatenate([plus[best], minus[best]]).std()
        total = sum((plus[k] - minus[k]) * delta[k] for k in best)
        self.mean = self.mean + self.alpha / (self.b * deviation) * total


class SPSA:
    """Spall 1992: (y+ - y-) / (2 c Delta_i) for each coordinate, averaged over the pairs."""

    def __init__(self, c, a):
        self.mean, self.c, self.a = vector(START), c, a

    def candidates(self, delta):
        return self.mean + self.c * delta

    def update(self, delta, values):
        pairs = zip(values[0::2], values[1::2], delta[0::2], strict=True)
        g = np.mean([(plus - minus) / (2 * self.c * signs) for plus, minus, signs in pairs], axis=0)
        self.mean = self.mean - self.a * g


class ForwardDifferences:
    """Nesterov & Spokoiny 2017, eq. 22, averaged over the directions: (f(x + sigma u) - f(x)) / sigma u."""

    def __init__(self, sigma, rate):
        self.mean, self.sigma, self.rate = vector(START), sigma, rate

    def candidates(self, u):
        return self.mean + self.sigma * u

    def update(self, u, values):
        assert not u[0].any()  # the first candidate is the mean
        g = np.mean([(f - values[0]) / self.sigma * row for f, row in zip(values[1:], u[1:], strict=True)], axis=0)
        self.mean = self.mean - self.rate * g


class PGPE:
    """Sehnke et al. 2010, algorithm 2 without the reward normalisation: returns are shaped to `r` instead."""

    def __init__(self, sigma, rate, sigma_rate, max_change, shape, adam):
        self.mean, self.sigma = vector(START), np.full(D, sigma)
        self.rate, self.sigma_rate, self.max_change = rate, sigma_rate, max_change
        self.shape, self.adam = shape, Adam() if adam else None

    def candidates(self, z):
        return self.mean + self.sigma * z

    def update(self, z, values):
        r = self.shape(-values)
        plus, minus, eps, b = r[0::2], r[1::2], self.sigma * z[0::2], r.mean()
        ascent = np.mean([e * (p - m) / 2 for e, p, m in zip(eps, plus, minus, strict=True)], axis=0)
        s = (eps**2 - self.sigma**2) / self.sigma
        terms = [((p + m) / 2 - b) * row for p, m, row in zip(plus, minus, s, strict=True)]
        bound = self.max_change * self.sigma
        self.mean = self.mean + (self.adam(-ascent, self.rate) if self.adam else self.rate * ascent)
        self.sigma = self.adapted = self.sigma + np.clip(self.sigma_rate * np.mean(terms, axis=0), -bound, bound)


class SNES:
    """Wierstra et al. 2014, algorithm 6 with the utilities of section 3.1 and the learning rates of table 1."""

    def __init__(self, sigma, eta_sigma=None):
        self.mean, self.sigma = vector(START), np.full(D, sigma)
        self.eta_sigma = (3 + np.log(D)) / (5 * np.sqrt(D)) if eta_sigma is None else eta_sigma

    def candidates(self, s):
        return self.mean + self.sigma * s

    def update(self, s, values):
        n = len(values)
        k = np.arange(1, n + 1)
        u = np.maximum(0, np.log(n / 2 + 1) - np.log(k))
        u = u / u.sum() - 1 / n
        s = s[np.argsort(values)]  # the best first
        self.mean = self.mean + self.sigma * (u @ s)
        self.sigma = self.adapted = self.sigma * np.exp(self.eta_sigma / 2 * (u @ (s**2 - 1)))


class GuidedES:
    """Maheswaranathan et al. 2019, algorithm 1, eq. 2: beta / (2 sigma^2 P) sum eps_i (f(x + eps_i) - f(x - eps_i))."""

    def __init__(self, sigma, beta):
        self.mean, self.sigma, self.beta = vector(START), sigma, beta

    def candidates(self, eps):
        return self.mean + eps

    def update(self, eps, values):
        differences = values[0::2] - values[1::2]
        self.mean = self.mean - self.beta / (2 * self.sigma**2 * len(differences)) * differences @ eps[0::2]


# ---- 20 generations ----

centered = lambda returns: ranks_of_returns(returns) / (len(returns) - 1) - 0.5
as_they_are = lambda returns: returns
es = functools.partial(EvolutionStrategy, utility=shaping.identity)
PLAIN = optax.identity()  # one object, so that strategies that differ by a number share what is compiled


def surrogate(params):
    """Roughly the quadratic's gradient."""
    return jax.tree.map(lambda x: x - jnp.asarray(0.5, x.dtype), params)


# name: (the strategy for a learning rate, its twin, the rates for the quadratic and for Rosenbrock's function)
TWINS = {
    "openai_es": (
        lambda rate, **kw: strategies.openai_es(12, sigma=0.1, learning_rate=rate, weight_decay=0.2, **kw),
        lambda rate: OpenAI(0.1, rate, 0.2),
        (0.05, 0.05),
    ),
    "ars": (
        lambda rate, **kw: strategies.ars(12, top=4, sigma=0.1, learning_rate=rate, **kw),
        lambda rate: ARS(0.1, rate, 4),
        (0.05, 0.05),
    ),
    "spsa": (
        lambda rate, **kw: strategies.spsa(6, sigma=0.1, learning_rate=rate, **kw),
        lambda rate: SPSA(0.1, rate),
        (1e-2, 2e-5),
    ),
    "forward differences": (
        lambda rate, **kw: es(7, 0.1, rate, scheme=sampling.forward, **kw),
        lambda rate: ForwardDifferences(0.1, rate),
        (1e-2, 2e-5),
    ),
    "pgpe": (
        lambda rate, **kw: strategies.pgpe(12, sigma=0.3, learning_rate=rate, sigma_learning_rate=0.4, **kw),
        lambda rate: PGPE(0.3, rate, 0.4, 0.2, centered, adam=True),
        (0.05, 0.05),
    ),
    "pgpe without shaping": (  # so that the baseline matters, and for some coordinates the bound on the change
        lambda rate, **kw: strategies.pgpe(
            8,
            sigma=0.3,
            learning_rate=rate,
            sigma_learning_rate=rate,
            max_change=0.05,
            optimizer=PLAIN,
            utility=shaping.identity,
            **kw,
        ),
        lambda rate: PGPE(0.3, rate, rate, 0.05, as_they_are, adam=False),
        (0.05, 1e-5),
    ),
    "snes": (
        lambda rate, **kw: strategies.snes(8, sigma=rate, **kw),
        lambda rate: SNES(rate),
        (0.5, 0.1),  # not a learning rate: the first sigma
    ),
    "guided_es": (
        lambda rate: strategies.guided_es(
            6,
            surrogate=surrogate,
            subspace=2,
            sigma=0.1,
            learning_rate=rate,
            optimizer=PLAIN,
            utility=shaping.identity,
        ),
        lambda rate: GuidedES(0.1, rate),
        (0.05, 2e-5),
    ),
}


@functools.cache
def made(name, rate=None, **options):
    """A strategy of TWINS, the same object every time."""
    make, _, rates = TWINS[name]
    return make(rates[0] if rate is None else rate, **options)


@jax.jit
def begun(strategy, params, key):
    return strategy.init(params, key)


@jax.jit
def asked(strategy, state, key):
    """The population, its candidates, and the directions they sit on, sign * z; of guided ES the perturbations."""
    population = strategy.ask(state, key)
    direction = getattr(population.decode, "direction", lambda genome: genome)
    return population, population.decoded(), jax.vmap(direction)(population.genomes)


@jax.jit
def told(strategy, state, population, values):
    return strategy.tell(state, population, values)


@jax.jit
def recommended(strategy, state):
    return strategy.recommend(state)


def start(dtype):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), START)


def close(got, expected, tolerance):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def follow(strategy, twin, function, params, tolerance):
    """20 generations of both, the twin fed the strategy's noise."""
    state = begun(strategy, params, jax.random.key(0))
    for key in jax.random.split(jax.random.key(1), STEPS):
        population, candidates, z = asked(strategy, state, key)
        candidates, z = vectors(candidates), vectors(z)
        close(candidates, twin.candidates(z), tolerance)
        values = function(candidates)
        state = told(strategy, state, population, jnp.asarray(values, jax.tree.leaves(params)[0].dtype))
        twin.update(z, values)
        close(vector(recommended(strategy, state)), twin.mean, tolerance)
        if hasattr(twin, "adapted"):
            close(vector(state.sigma), twin.adapted, tolerance)
        yield z
    assert function(twin.mean) < 0.99 * function(vector(START))  # the rates do something


@pytest.mark.parametrize("name", TWINS)
def test_twenty_generations_are_those_of_the_paper(name):
    _, twin, rates = TWINS[name]
    with jax.enable_x64(True):
        for function, rate in zip((quadratic, rosenbrock), rates, strict=True):
            for z in follow(made(name, rate), twin(rate), function, jnp.asarray(vector(START)), 1e-6):
                if name not in ("snes", "forward differences"):
                    np.testing.assert_array_equal(z[0::2], -z[1::2])


VARIANTS = {
    "pgpe": lambda **kw: TWINS["pgpe"][0](0.05, **kw),
    "snes with its own rate": lambda **kw: strategies.snes(9, sigma=0.5, sigma_learning_rate=0.3, **kw),
    "forward differences": lambda **kw: TWINS["forward differences"][0](0.01, **kw),
    "one-sided rademacher": lambda **kw: es(7, 0.1, 0.01, scheme=sampling.one_sided, noise=noise.rademacher, **kw),
    "orthogonal": lambda **kw: strategies.openai_es(12, sigma=0.1, noise=noise.Orthogonal(group=4), **kw),
}


@functools.cache
def variant(name, regenerate=None):
    return VARIANTS[name](regenerate=regenerate)


FLOAT32 = {
    "pgpe": lambda: PGPE(0.3, 0.05, 0.4, 0.2, centered, adam=True),
    "snes with its own rate": lambda: SNES(0.5, 0.3),
}


@pytest.mark.parametrize("name", FLOAT32)
def test_twenty_generations_of_a_tree_in_float32(name):
    for _ in follow(variant(name), FLOAT32[name](), quadratic, start("float32"), 1e-5):
        pass


@pytest.mark.parametrize("name", VARIANTS)
def test_noise_that_is_drawn_again_gives_the_same_run(name):
    stored, again = variant(name), variant(name, regenerate=True)
    one = two = begun(stored, start("float32"), jax.random.key(0))
    for key in jax.random.split(jax.random.key(1), 5):
        (population, candidates, z), (regenerated, others, y) = asked(stored, one, key), asked(again, two, key)
        assert population.decode.rows is not None
        assert regenerated.decode.rows is None
        np.testing.assert_array_equal(vectors(y), vectors(z))
        close(vectors(others), vectors(candidates), 1e-5)
        values = jnp.asarray(quadratic(vectors(candidates)), jnp.float32)
        one, two = told(stored, one, population, values), told(again, two, regenerated, values)
        close(vector(two.mean), vector(one.mean), 1e-5)
        if hasattr(one, "sigma"):
            close(vector(two.sigma), vector(one.sigma), 1e-5)


@pytest.mark.parametrize("name", ["openai_es", "ars", "spsa", "pgpe without shaping", "guided_es"])
def test_half_a_pair_is_no_pair(name):
    """A candidate whose partner was lost is told as if it was lost too, and without a whole pair nothing moves."""
    with jax.enable_x64(True):
        strategy = made(name)
        state = begun(strategy, jnp.asarray(vector(START)), jax.random.key(0))
        population, candidates, _ = asked(strategy, state, jax.random.key(1))
        values = quadratic(vectors(candidates))
        half, whole, none = values.copy(), values.copy(), values.copy()
        half[[1, 4]] = np.nan, -np.inf
        whole[[0, 1, 4, 5]] = np.nan
        none[::2] = np.nan
        one, two, after = (told(strategy, state, population, jnp.asarray(v)) for v in (half, whole, none))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(vector(one.mean) - vector(state.mean)).max() > 0
    assert int(after.unanswered) == 1
    for a, b in zip(jax.tree.leaves(after._replace(unanswered=state.unanswered)), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


# ---- guided ES: where the directions lie ----


@pytest.mark.parametrize("mix", [0.0, 1.0])
def test_guided_directions_span_the_last_surrogate_gradients(mix):
    strategy = strategies.guided_es(8, surrogate=surrogate, subspace=2, mix=mix, learning_rate=0.1)
    state = begun(strategy, start("float32"), jax.random.key(0))
    last = [vector(surrogate(start("float32")))]
    for key in jax.random.split(jax.random.key(1), 5):
        population, candidates, eps = asked(strategy, state, key)
        eps = vectors(eps)
        if len(last) >= 2:
            basis = np.linalg.qr(np.stack(last[-2:], axis=1))[0]
            outside = np.linalg.norm(eps - eps @ basis @ basis.T) / np.linalg.norm(eps)
            assert outside < 1e-5 if mix == 0 else outside > 0.3
            assert np.linalg.matrix_rank(eps, tol=1e-5) == (2 if mix == 0 else 4)
        state = told(strategy, state, population, jnp.asarray(quadratic(vectors(candidates)), jnp.float32))
        last.append(vector(surrogate(recommended(strategy, state))))


# ---- the genetic algorithm, against one that holds every network ----


def parent_of(parents, child):
    """The place of a parent whose chain is that of the child without its last link."""
    n = int(child.length) - 1
    for i in range(len(parents.length)):
        if parents.length[i] == n and parents.base[i] == child.base and (parents.seeds[i][:n] == child.seeds[:n]).all():
            return i
    raise AssertionError("a child without a parent")


@pytest.mark.parametrize("elites", [0, 2])
def test_deep_ga_is_algorithm_1_and_replays_every_network_bit_for_bit(elites):
    """Such et al. 2017, algorithm 1; `networks` are the T parents as arrays, best first, kept as they were asked."""
    sigma, t = 0.125, 4
    strategy = strategies.deep_ga(10, sigma=sigma, parents=t, elites=elites, chain=3)
    draw = jax.jit(lambda seed: noise.gaussian.draw(jax.random.wrap_key_data(seed), start("float32")))
    state, rebased = begun(strategy, start("float32"), jax.random.key(0)), 0
    networks = [vector(START).astype(np.float32).astype(np.float64)] * t
    for key in jax.random.split(jax.random.key(1), STEPS):
        population, candidates, _ = asked(strategy, state, key)
        parents, genomes, candidates = *jax.device_get((state.parents, population.genomes)), vectors(candidates)
        for i in range(len(population)):
            genome = jax.tree.map(lambda g, i=i: g[i], genomes)
            if i < elites:  # the parents themselves, bit for bit
                np.testing.assert_array_equal(candidates[i], networks[i])
            else:  # theta' = theta + sigma eps
                eps = vector(draw(genome.seeds[genome.length - 1]))
                expected = networks[parent_of(parents, genome)] + sigma * eps
                np.testing.assert_allclose(candidates[i], expected, rtol=0, atol=1e-3 * sigma)
        values = quadratic(candidates).astype(np.float32)
        state = told(strategy, state, population, jnp.asarray(values))
        best = np.argsort(values, kind="stable")[:t]
        networks = [candidates[i] for i in best]
        np.testing.assert_array_equal(vector(recommended(strategy, state)), networks[0])
        np.testing.assert_array_equal(np.asarray(state.values), values[best])
        rebased += int((state.parents.length == 0).all())
    assert rebased >= 5
    assert values.min() < quadratic(vector(START)) / 3


def test_deep_ga_does_not_depend_on_the_length_of_chains():
    """Short chains are rebased all the time, long ones never: the same networks, bit for bit, at any mutation power."""
    one, two = (strategies.deep_ga(10, sigma=0.1, parents=3, chain=chain) for chain in (1, STEPS + 1))
    a, b = (begun(s, start("float32"), jax.random.key(0)) for s in (one, two))
    for key in jax.random.split(jax.random.key(1), STEPS):
        (short, candidates, _), (long, others, _) = asked(one, a, key), asked(two, b, key)
        np.testing.assert_array_equal(vectors(candidates), vectors(others))
        values = jnp.asarray(quadratic(vectors(candidates)), jnp.float32)
        a, b = told(one, a, short, values), told(two, b, long, values)
        np.testing.assert_array_equal(vector(recommended(one, a)), vector(recommended(two, b)))
    assert int(b.parents.length.max()) > 5


# ---- types ----


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("name", ["openai_es", "ars", "pgpe", "snes", "orthogonal", "guided_es", "deep_ga"])
def test_narrow_types_stay_under_strict_promotion(name, dtypes):
    strategy = {"deep_ga": lambda: strategies.deep_ga(8), "orthogonal": lambda: variant("orthogonal")}.get(
        name, lambda: made(name)
    )()
    params = {"b": jnp.zeros((), dtypes[0]), "stack": jnp.zeros((2, 3, 4), dtypes[1])}
    with jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(strategy.init, params, jax.random.key(0))
        population = jax.eval_shape(strategy.ask, state, jax.random.key(0))
        candidates = jax.eval_shape(lambda p: p.decoded(), population)
        values = jax.ShapeDtypeStruct((len(population),), "float32")
        after = jax.eval_shape(strategy.tell, state, population, values)
    assert jax.tree.map(lambda x: x.dtype, candidates) == jax.tree.map(lambda x: x.dtype, params)
    kind = lambda x: (x.shape, x.dtype, x.weak_type)
    assert jax.tree.map(kind, after) == jax.tree.map(kind, state)


def test_deep_ga_tells_float64_values_apart():
    with jax.enable_x64(True):
        strategy = strategies.deep_ga(6, parents=3, elites=0)
        state = begun(strategy, start("float64"), jax.random.key(0))
        population, candidates, _ = asked(strategy, state, jax.random.key(1))
        values = 1 + 1e-12 * jnp.array([5.0, 3.0, 1.0, 0.0, 2.0, 4.0])
        state = told(strategy, state, population, values)
        np.testing.assert_array_equal(vector(recommended(strategy, state)), vectors(candidates)[3])


def test_guided_es_runs_in_bfloat16():
    strategy = strategies.guided_es(6)
    state = begun(strategy, start("bfloat16"), jax.random.key(0))
    population, candidates, _ = asked(strategy, state, jax.random.key(1))
    after = told(strategy, state, population, jnp.asarray(quadratic(vectors(candidates)), jnp.float32))
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, state)
    assert after.mean["w"].dtype == jnp.bfloat16
    assert np.abs(vector(after.mean) - vector(state.mean)).max() > 0


def test_bfloat16_values_are_counted_in_float32():
    """600 candidates: bfloat16 counts to 256, and has no rank 599."""
    strategy = strategies.openai_es(600, sigma=0.1, optimizer=optax.identity())
    state = begun(strategy, start("float32"), jax.random.key(0))
    population, candidates, _ = asked(strategy, state, jax.random.key(1))
    values = jnp.asarray(quadratic(vectors(candidates)), jnp.bfloat16)
    narrow, wide = (told(strategy, state, population, v) for v in (values, values.astype(jnp.float32)))
    np.testing.assert_array_equal(vector(narrow.mean), vector(wide.mean))


def test_hyperparameters_of_a_recipe_can_be_replaced():
    """A field holds what its name says: ARS had its learning rate times sigma in `learning_rate`."""
    ars = functools.partial(strategies.ars, 8, top=2)
    replaced = dataclasses.replace(ars(sigma=0.5, learning_rate=0.2), learning_rate=0.1, sigma=0.05)
    assert replaced == ars(sigma=0.05, learning_rate=0.1)
    f, x = lambda x: jnp.sum((x - 1.0) ** 2), jnp.zeros(3)
    state = replaced.init(x, jax.random.key(0))
    population = replaced.ask(state, jax.random.key(1))
    small = replaced.tell(state, population, population.map(f)).mean
    large = dataclasses.replace(replaced, learning_rate=0.3).tell(state, population, population.map(f)).mean
    np.testing.assert_allclose(large, 3 * small, rtol=1e-5)
