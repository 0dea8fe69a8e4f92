"""Fitness shaping: small examples worked by hand, formulas from the papers, and what no utility may do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evoopt import answers, shaping
from evoopt.strategies.gaussian.evolution_strategy import best_pairs

NAN, INF = float("nan"), float("inf")
RANKED = {"centered_rank": shaping.centered_rank, "log_rank": shaping.log_rank, "nes": shaping.nes}
SCALED = {"z_score": shaping.z_score, "normalised": shaping.normalised, "identity": shaping.identity}
ALL = RANKED | SCALED
LN2, LN3 = math.log(2), math.log(3)


def weights(utility, values, dtype=jnp.float32):
    return np.asarray(jax.jit(utility)(jnp.asarray(values, dtype)), np.float64)


# ---- worked by hand ----

# log_rank, m = 4: ln(2.5) - ln(1, 2) = 0.91629, 0.22314, sum 1.13943. m = 3: ln(2) - ln(1) only.
# nes, m = 4: ln(3) - ln(1, 2) = 1.09861, 0.40547, sum 1.50408; less 1/4. m = 2: ln(2) only; less 1/2.
BY_HAND = [
    ("centered_rank", [3, 1, 4, 2], [1 / 6, -0.5, 0.5, -1 / 6]),
    ("centered_rank", [3, 1, NAN, 2], [0.5, -0.5, 0.0, 0.0]),
    ("centered_rank", [7, -INF, 5], [0.5, 0.0, -0.5]),
    ("centered_rank", [INF, 1, 2, INF], [1 / 3, -0.5, -1 / 6, 1 / 3]),
    ("centered_rank", [1, 1, 2], [-0.25, -0.25, 0.5]),
    ("centered_rank", [0.0, -0.0, 1], [-0.25, -0.25, 0.5]),
    ("centered_rank", [2, 2, 2], [0, 0, 0]),
    ("centered_rank", [9], [0]),
    ("centered_rank", [9, -9], [0.5, -0.5]),
    ("centered_rank", [NAN, 3], [0, 0]),
    ("log_rank", [4, 2, 1, 3], [0, -0.195838, -0.804162, 0]),
    ("log_rank", [4, NAN, 1, 3, -INF, NAN], [0, 0, -1, 0, 0, 0]),
    ("log_rank", [1, 1, 9, 9], [-0.5, -0.5, 0, 0]),
    ("log_rank", [5, INF], [-1, 0]),
    ("log_rank", [5], [0]),
    ("nes", [4, 2, 1, 3], [0.25, 0.25 - 0.269579, 0.25 - 0.730421, 0.25]),
    ("nes", [4, NAN, 1], [0.5, 0, -0.5]),
    ("nes", [-INF, 8, 8], [0, 0, 0]),
    ("nes", [1, 1, 2, 3], [-0.25, -0.25, 0.25, 0.25]),
    ("nes", [INF, 5], [0.5, -0.5]),
    ("nes", [5], [0]),
    ("z_score", [1, 2, 3], [-1.224745, 0, 1.224745]),  # the population's deviation sqrt(2/3), not the sample's
    ("z_score", [1, NAN, 3, -INF], [-1, 0, 1, 0]),
    ("z_score", [1, INF, 3], [-1.414214, 0.707107, 0.707107]),  # +inf counts as the 3
    ("z_score", [5], [0]),
    ("z_score", [4, 6], [-1, 1]),
    ("normalised", [10, 20, 15, 40], [-0.5, -1 / 6, -1 / 3, 0.5]),
    ("normalised", [10, NAN, INF, 20], [-0.5, 0, 0.5, 0.5]),
    ("normalised", [10, -INF, 30], [-0.5, 0, 0.5]),
    ("normalised", [3, 3], [0, 0]),
    ("normalised", [3], [0]),
    ("normalised", [3e38, -3e38, 0], [0.5, -0.5, 0]),
    ("z_score", [3e38, -3e38], [1, -1]),
    ("identity", [3, NAN, INF, -2, -INF, 1], [3, 0, 3, -2, 0, 1]),
    ("identity", [-3, NAN], [-3, 0]),
]


@pytest.mark.parametrize(("name", "values", "expected"), BY_HAND)
def test_small_examples_worked_by_hand(name, values, expected):
    np.testing.assert_allclose(weights(ALL[name], values), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("k", "shape", "values", "expected"),
    [
        (2, shaping.centered_rank, [4, 1, 3, 2], [0, -0.5, 0, 0.5]),
        (2, shaping.identity, [4, 1, NAN, 2], [0, 1, 0, 2]),
        (3, shaping.identity, [5, -INF, 7, NAN], [5, 0, 7, 0]),
        (1, shaping.identity, [INF, 6], [0, 6]),
        (9, shaping.centered_rank, [4, 1], [0.5, -0.5]),
        (2, shaping.z_score, [9, 5, 7, 8], [0, -1, 1, 0]),
    ],
)
def test_top_k_shapes_the_best_k_among_themselves(k, shape, values, expected):
    np.testing.assert_allclose(weights(shaping.top_k(k, shape), values), expected, atol=1e-6)


def test_best_pairs_of_augmented_random_search():
    # Pairs (1, 9), (5, 4), (8, 7); the better ones are 1, 4, 7, so b = 2 takes the first two. Their values 1, 9, 5, 4
    # have mean 4.75 and deviation sqrt((14.0625 + 18.0625 + 0.0625 + 0.5625) / 4) = sqrt(8.1875); factor n / b = 6 / 2.
    deviation = math.sqrt(8.1875)
    got = weights(best_pairs(2), [1, 9, 5, 4, 8, 7])
    np.testing.assert_allclose(got, [3 * (v - 4.75) / deviation for v in (1, 9, 5, 4)] + [0, 0], rtol=1e-6)
    # A lost pair: m = 4 answers, and only one pair may be used; its factor is 4 / 1.
    lost = weights(best_pairs(1), [NAN, NAN, 5, 4, 8, 7])
    np.testing.assert_allclose(lost, [0, 0, 4, -4, 0, 0], rtol=1e-6)
    # Fewer pairs than b: those there are.
    np.testing.assert_allclose(weights(best_pairs(3), [NAN, NAN, 5, 4, NAN, NAN]), [0, 0, 2, -2, 0, 0], rtol=1e-6)


# ---- against the papers' formulas ----


def places(values):
    """Rank of each value, 1 is best; no ties."""
    return np.argsort(np.argsort(values)) + 1


FORMULAS = {
    "centered_rank": lambda rank, n: (rank - 1) / (n - 1) - 0.5,
    "log_rank": lambda rank, n: -np.maximum(0, np.log((n + 1) / 2) - np.log(rank)),
    "nes": lambda rank, n: -np.maximum(0, np.log(n / 2 + 1) - np.log(rank)),
}


@pytest.mark.parametrize("n", [2, 3, 4, 33, 256])
@pytest.mark.parametrize("name", RANKED)
def test_rank_utilities_are_the_papers_formulas(name, n):
    values = np.random.default_rng(n).permutation(n) * 3.0 - 7
    expected = FORMULAS[name](places(values), n)
    if name != "centered_rank":
        expected = expected / np.abs(expected).sum()
    if name == "nes":
        expected = expected + 1 / n
    np.testing.assert_allclose(weights(RANKED[name], values), expected, rtol=2e-5, atol=1e-6 / n)


@pytest.mark.parametrize("name", RANKED)
def test_ranks_of_many_with_ties_and_lost_ones(name):
    """More than 1024, where ranks come from a sort: by hand, tie by tie."""
    n = 1500
    values = np.random.default_rng(0).integers(0, 400, n).astype(np.float32)
    values[::7], values[3::11], values[5::13] = np.nan, np.inf, -np.inf
    x = values[~np.isnan(values) & (values != -np.inf)]
    table = FORMULAS[name](np.arange(1, len(x) + 1), len(x))
    if name != "centered_rank":
        table = table / np.abs(table).sum() + (1 / len(x) if name == "nes" else 0)
    ordered, expected = np.sort(x), np.zeros(n)
    for v in np.unique(x):
        expected[values == v] = table[ordered == v].mean()
    np.testing.assert_allclose(weights(RANKED[name], values), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("n", [2, 3, 33])
def test_scaled_utilities_are_numpys(n):
    values = np.random.default_rng(n).normal(100, 3, n).astype(np.float32)
    x = values.astype(np.float64)
    np.testing.assert_allclose(weights(shaping.z_score, values), (x - x.mean()) / x.std(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(weights(shaping.normalised, values), (x - x.min()) / np.ptp(x) - 0.5, atol=1e-5)
    np.testing.assert_array_equal(weights(shaping.identity, values), x)


@pytest.mark.parametrize("name", ["centered_rank", "nes", "z_score"])
@pytest.mark.parametrize("values", [[1, 2, 3, 4], [1, 1, 2, 9, 9, 9], [3, NAN, 1, INF, -INF, INF], [NAN] * 4])
def test_these_sum_to_zero(name, values):
    assert abs(weights(ALL[name], values).sum()) < 1e-6


@pytest.mark.parametrize("n", [2, 4, 33])
def test_recombination_weights_sum_to_minus_one(n):
    assert weights(shaping.log_rank, np.arange(n)).sum() == pytest.approx(-1, abs=1e-6)


# ---- what no utility may do ----


@pytest.mark.parametrize("utility", ALL.values(), ids=ALL)
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("lost", [NAN, -INF])
def test_no_answers_weigh_nothing(utility, n, lost):
    np.testing.assert_array_equal(weights(utility, [lost] * n), np.zeros(n))


@pytest.mark.parametrize("utility", ALL.values(), ids=ALL)
def test_only_worst_values_weigh_nothing_or_alike(utility):
    got = weights(utility, [INF, INF, INF])
    assert np.isfinite(got).all()
    assert np.ptp(got) < 1e-7


@pytest.mark.parametrize("utility", [shaping.centered_rank, shaping.nes, shaping.z_score, shaping.normalised])
@pytest.mark.parametrize("value", [0.1, -7.3, 1e-30, 1e30, 12345.678])
def test_equal_values_give_no_direction(utility, value):
    for n in (1, 2, 3, 33):  # 33 times 0.1 adds up to something else than 3.3
        np.testing.assert_allclose(weights(utility, [value] * n), 0, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-35, 1e-12, 1.0, 1e15, 1e35])
def test_scaled_utilities_do_not_see_the_scale(scale):
    values = [1 * scale, 2 * scale, 3 * scale]
    np.testing.assert_allclose(weights(shaping.z_score, values), [-1.224745, 0, 1.224745], atol=1e-5)
    np.testing.assert_allclose(weights(shaping.normalised, values), [-0.5, 0, 0.5], atol=1e-5)


value = st.one_of(
    st.sampled_from([NAN, INF, -INF, 0.0, 1.0]), st.floats(-100, 100, width=16), st.integers(-3, 3).map(float)
)
some_values = st.lists(value, min_size=6, max_size=6)  # one shape, one compilation
few = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", ALL)
@few
@given(values=some_values, order=st.permutations(range(6)))
def test_permuted_values_give_permuted_weights(name, values, order):
    values, order = np.asarray(values, np.float32), np.asarray(order)
    straight, permuted = weights(ALL[name], values), weights(ALL[name], values[order])
    np.testing.assert_allclose(permuted, straight[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
@few
@given(values=some_values)
def test_weights_are_finite_ordered_like_the_values_and_nothing_for_no_answer(name, values):
    values = np.asarray(values, np.float32)
    got = weights(ALL[name], values)
    ok = np.asarray(answers.answered(jnp.asarray(values)))
    np.testing.assert_array_equal(ok, ~np.isnan(values) & (values != -np.inf))
    assert np.isfinite(got).all()
    assert (got[~ok] == 0).all()
    order = np.argsort(values[ok], kind="stable")
    assert (np.diff(got[ok][order]) >= -1e-6).all()
    for v in values[ok]:
        assert np.ptp(got[ok][values[ok] == v]) <= 1e-6


@pytest.mark.parametrize("name", RANKED)
@few
@given(values=some_values)
def test_rank_utilities_do_not_see_monotone_transforms_bit_for_bit(name, values):
    values = np.asarray(values, np.float32)
    levels = np.unique(values[np.isfinite(values)])
    # Any other values in the same order: 2^k for the k-th level, +-inf and NaN as they are.
    transformed = values.copy()
    transformed[np.isfinite(values)] = 2.0 ** np.searchsorted(levels, values[np.isfinite(values)]) - 40
    assert weights(ALL[name], values).tobytes() == weights(ALL[name], transformed).tobytes()


@pytest.mark.parametrize("name", ALL)
@few
@given(values=some_values)
def test_lost_candidates_shape_the_others_as_if_they_were_not_there(name, values):
    values = np.asarray(values, np.float32)
    ok = ~np.isnan(values) & (values != -np.inf)
    lost = np.where(ok, values, np.nan).astype(np.float32)
    np.testing.assert_array_equal(weights(ALL[name], values), weights(ALL[name], lost))
    if ok.sum() in (2, 4):  # two more shapes, two more compilations
        alone = weights(ALL[name], values[ok])
        np.testing.assert_allclose(weights(ALL[name], values)[ok], alone, rtol=1e-5, atol=1e-5)


def test_finite_and_count():
    values = jnp.array([2.0, NAN, INF, -INF, -5.0])
    assert answers.finite(values).tolist() == [2.0, 0.0, 2.0, 0.0, -5.0]
    assert float(answers.count(values)) == 3.0
    assert float(answers.count(jnp.full(3, NAN))) == 1.0
    assert answers.answered(values).tolist() == [True, False, True, False, True]


def test_values_are_the_answers_or_the_first_of_them():
    values, grads = jnp.arange(3.0), jnp.ones((3, 2))
    assert answers.as_values(values) is values
    assert answers.as_values((values, grads)) is values


@pytest.mark.parametrize("utility", ALL.values(), ids=ALL)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_stay_and_nothing_promotes(utility, dtype):
    with jax.numpy_dtype_promotion("strict"):
        assert jax.eval_shape(utility, jnp.arange(6).astype(dtype)).dtype == dtype
