"""Random directions: Threefry's published vectors, moments, independence, the same bits however they are asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from evoopt import noise
from evoopt.noise import Orthogonal, gaussian, rademacher

KEY = jax.random.key(20240229)
N = 1 << 18  # draws of a moment test: standard errors of 0.002
ERRORS = 4.5  # standard errors allowed; a true statement fails with probability 7e-6, and the keys are fixed
LIKE = {"b": jnp.zeros(()), "layers": jnp.zeros((3, 4, 5)), "none": jnp.zeros(0)}
NOISES = {"gaussian": gaussian, "rademacher": rademacher, "orthogonal": Orthogonal(group=3)}
DISTRIBUTIONS = {"gaussian": (noise.normals, 3.0, 96.0), "rademacher": (noise.signs, 1.0, 0.0)}  # z^4: mean, variance


def same_bits(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(a, b, strict=True)
    )


def correlation(x, y):
    """In standard errors under independence."""
    return np.corrcoef(np.ravel(x), np.ravel(y))[0, 1] * np.sqrt(np.size(x))


@functools.cache
def drawn(name):
    return np.asarray(jax.jit(lambda: DISTRIBUTIONS[name][0](KEY, N))(), np.float64)


@functools.cache
def compiled(name, dtype="float32"):
    """Five directions like LIKE from a key, and one from an address."""
    kind, like = NOISES[name], jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), LIKE)
    return jax.jit(lambda key: kind.rows(key, 5, like)), jax.jit(lambda address: kind.draw(address, like))


# ---- the generator ----


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [  # Random123's kat_vectors, threefry2x32 with 20 rounds
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_published_words(key, counter, expected):
    got = noise.threefry._threefry(*(np.asarray([word], np.uint32) for word in key + counter))
    assert tuple(int(word[0]) for word in got) == expected


def test_words_count_in_the_first_word_of_the_counter():
    j = np.arange(5, dtype=np.uint32)
    k0, k1 = np.asarray(jax.random.key_data(KEY))
    expected = noise.threefry._threefry(*np.broadcast_arrays(k0, k1, j, np.uint32(0)))
    got = jax.jit(lambda: noise.words(KEY, 5))()
    assert np.stack(got).tolist() == np.stack(expected).tolist()


def test_fold_in_is_jaxs():
    numbers = jnp.array([0, 1, 2, 77, 2**31 - 1], jnp.int32)
    theirs = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(numbers)
    assert jnp.array_equal(jax.random.key_data(noise.fold_in(KEY, numbers)), jax.random.key_data(theirs))
    for i in (0, 5):
        assert noise.fold_in(KEY, i) == jax.random.fold_in(KEY, i)
    keys = jax.random.split(KEY, 3)
    assert (jax.vmap(lambda k: noise.fold_in(k, 9))(keys) == jax.vmap(lambda k: jax.random.fold_in(k, 9))(keys)).all()


def test_keys_that_replay():
    typed = jax.random.key(3, impl="threefry2x32")
    assert noise.replayable(typed) is typed
    assert noise.replayable(3) == typed
    assert noise.replayable(jax.random.key_data(typed)) == typed  # the old raw form


@pytest.mark.parametrize("implementation", ["rbg", "unsafe_rbg"])
def test_rbg_keys_are_refused_with_the_sentence(implementation):
    with pytest.raises(TypeError, match="whose noise under vmap") as caught:
        noise.replayable(jax.random.key(0, impl=implementation))
    assert f"a key of '{implementation}'" in str(caught.value)
    assert "usual cause: jax_default_prng_impl was set to rbg" in str(caught.value)


@pytest.mark.parametrize("key", [np.random.default_rng(0), 1.5, "seed", None, jnp.zeros(3, jnp.uint32)])
def test_what_is_no_key_is_refused(key):
    with pytest.raises(TypeError, match="expected a PRNG key or an integer seed"):
        noise.replayable(key)


# ---- moments ----


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mean_variance_skewness_and_fourth_moment(name):
    z, (_, fourth, spread), root = drawn(name), DISTRIBUTIONS[name], np.sqrt(N)
    assert abs(z.mean()) * root < ERRORS
    assert abs((z**3).mean()) * root < ERRORS * np.sqrt(15)
    assert abs((z**2).mean() - 1) * root <= ERRORS * np.sqrt(fourth - 1)
    assert abs((z**4).mean() - fourth) * root <= ERRORS * np.sqrt(spread)


def test_gaussian_is_the_normal_distribution():
    z = np.sort(drawn("gaussian"))
    distance = np.abs(ndtr(z) - (np.arange(N) + 0.5) / N).max()
    assert distance * np.sqrt(N) < 1.95  # Kolmogorov-Smirnov at the 0.1% level


def test_tails_have_the_weight_they_should():
    z = np.abs(np.asarray(jax.jit(lambda: noise.normals(jax.random.fold_in(KEY, 1), 1 << 22))()))
    for bound in (3.0, 4.0, 4.5):
        expected = 2 * ndtr(-bound) * len(z)  # 11326, 266, 28
        assert abs((z > bound).sum() - expected) < ERRORS * np.sqrt(expected), bound
    assert 4.7 < z.max() < 5.43


def test_extreme_words_give_the_ends_of_the_normal_and_nothing_infinite(monkeypatch):
    high = np.array([0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32)
    low = np.array([0, 0xFFFFFFFF, 0, 0xFFFFFFFF], np.uint32)
    monkeypatch.setattr(noise.threefry, "words", lambda key, n: (jnp.asarray(high), jnp.asarray(low)))
    z = noise.normals(KEY, 4)
    np.testing.assert_allclose(z, [0, 5.41998, -5.41998, 0], rtol=1e-4, atol=1e-6)
    with jax.enable_x64(True):
        z = noise.normals(KEY, 4, jnp.float64)
    np.testing.assert_allclose(z, [0, 8.29236, -8.29236, 0], rtol=1e-4, atol=1e-6)


def test_signs_are_the_bits_of_the_words():
    assert set(np.unique(drawn("rademacher"))) == {-1.0, 1.0}
    w = 3  # ceil(70 / 32) words; sign j is bit j // w of word j % w
    high = np.asarray(noise.words(KEY, w)[0])
    expected = [1 - 2.0 * ((int(high[j % w]) >> (j // w)) & 1) for j in range(70)]
    assert np.asarray(noise.signs(KEY, 70)).tolist() == expected


# ---- independence ----


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_neighbours_are_independent(name):
    z = drawn(name)
    for lag in (1, 2, 3, N // 32):  # N / 32: the next bit of the same word
        assert abs(correlation(z[:-lag], z[lag:])) < ERRORS, lag
        if name == "gaussian":
            assert abs(correlation(z[:-lag] ** 2, z[lag:] ** 2)) < ERRORS, lag
    assert abs(correlation(z[:-2] * z[1:-1], z[2:])) < ERRORS


@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_leaves_layers_and_keys_are_independent(name):
    side = 128
    like = {"a": jnp.zeros((side, side)), "b": jnp.zeros((2, side, side)), "c": jnp.zeros(side * side)}
    z = jax.jit(lambda: NOISES[name].rows(KEY, 2, like))()
    a, b, c = (np.asarray(z[leaf], np.float64).reshape(-1, side * side) for leaf in "abc")
    parts = np.concatenate([a, b, c])  # two directions of a, two times two layers of b, two directions of c
    for i in range(len(parts)):
        for j in range(i):
            assert abs(correlation(parts[i], parts[j])) < ERRORS, (i, j)


# ---- random access ----


@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_a_leaf_and_a_layer_alone_have_the_bits_of_the_whole(name):
    kind = NOISES[name]
    whole = compiled(name)[1](KEY)
    alone = jax.jit(lambda: {part: kind.leaf(KEY, i, LIKE[part]) for i, part in enumerate(LIKE)})()
    assert same_bits(whole, alone)
    layer = jax.jit(lambda key: kind.sample(key, 20, jnp.float32))
    for i in range(3):
        key = jax.random.fold_in(jax.random.fold_in(KEY, 1), i)
        assert same_bits(whole["layers"][i].ravel(), layer(key))
    # Nothing depends on how many layers or what other leaves there are.
    longer = jax.jit(lambda: kind.draw(KEY, {"b": LIKE["b"], "layers": jnp.zeros((5, 4, 5)), "w": jnp.zeros(2)}))()
    assert same_bits(whole["layers"], longer["layers"][:3])
    assert same_bits(whole["b"], longer["b"])


@pytest.mark.parametrize("name", NOISES)
def test_a_direction_alone_in_a_batch_or_mapped_has_the_same_bits(name):
    kind, (together, one) = NOISES[name], compiled(name)
    rows, addresses = together(KEY), kind.addresses(KEY, 5)
    assert all(leaf.shape[0] == 5 for leaf in jax.tree.leaves((rows, addresses)))
    assert same_bits(rows, jax.jit(jax.vmap(one))(addresses))
    for i in range(5):
        assert same_bits(jax.tree.map(lambda r, i=i: r[i], rows), one(jax.tree.map(lambda a, i=i: a[i], addresses)))


@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_without_compilation_the_bits_are_the_same(name):
    kind, like = NOISES[name], jnp.zeros(4)
    together = jax.jit(lambda: kind.rows(KEY, 2, like))()
    assert same_bits(together[0], kind.draw(jax.tree.map(lambda a: a[0], kind.addresses(KEY, 2)), like))


@pytest.mark.parametrize("name", NOISES)
def test_every_direction_is_another_one(name):
    rows = compiled(name)[0]
    every = np.concatenate([np.asarray(rows(key)["layers"]).reshape(5, -1) for key in jax.random.split(KEY)])
    assert len(np.unique(every.round(5), axis=0)) == 10


# ---- dtypes and shapes ----


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", NOISES)
def test_every_dtype_and_shape(name, dtype):
    plain = compiled(name)[0](KEY)
    with jax.enable_x64(dtype == "float64"):
        z = compiled(name, dtype)[0](KEY)
    assert jax.tree.map(lambda x: x.shape[1:], z) == jax.tree.map(lambda x: x.shape, LIKE)
    tolerance = {"bfloat16": 0.02, "float64": 1e-4}[dtype]  # the same direction, to the digits there are
    for narrow, leaf in zip(jax.tree.leaves(plain), jax.tree.leaves(z), strict=True):
        assert leaf.dtype == dtype
        np.testing.assert_allclose(np.asarray(leaf, np.float64), narrow, rtol=tolerance, atol=tolerance)
        if name != "orthogonal" and dtype == "bfloat16":
            assert same_bits(leaf, narrow.astype(dtype))


def test_float64_has_more_digits():
    with jax.enable_x64(True):
        z = np.asarray(jax.jit(lambda: noise.normals(KEY, 4096, jnp.float64))())
    assert abs(z.mean()) * 64 < ERRORS
    assert abs((z**2).mean() - 1) * 64 < ERRORS * np.sqrt(2)
    digits = (ndtr(z) * 2.0**32) % 1  # those of the low word: uniform, where float32's alone would give a constant
    assert abs(digits.mean() - 0.5) * np.sqrt(12 * 4096) < ERRORS
    assert abs(digits.var() - 1 / 12) < 0.005


# ---- orthogonal directions ----


def cosines(rows):
    """|cosine| between different directions of each group: (groups, group, group), 0 on the diagonal."""
    unit = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.abs(unit @ unit.swapaxes(-1, -2)) * (1 - np.eye(rows.shape[1]))


def orthogonal_rows(n, group, d, base=gaussian):
    return np.asarray(jax.jit(lambda: Orthogonal(base, group).rows(KEY, n, jnp.zeros(d)))(), np.float64)


@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_directions_of_a_group_are_orthogonal_and_others_are_not(name):
    rows = orthogonal_rows(24, 8, 40, NOISES[name])
    assert cosines(rows.reshape(3, 8, 40)).max() < 1e-5
    assert cosines(rows[None])[0, :8, 8:].max() > 0.1


def test_orthogonality_is_over_all_leaves_together():
    rows = jax.tree.leaves(compiled("orthogonal")[0](KEY))
    rows = np.concatenate([np.asarray(r, np.float64).reshape(5, -1) for r in rows], axis=1)
    assert rows.shape == (5, 1 + 60)
    assert cosines(rows[None, :3]).max() < 1e-5


def test_a_group_larger_than_the_space_is_cut_at_the_dimension():
    rows = orthogonal_rows(7, 7, 3)
    for block in (rows[:3], rows[3:6]):
        assert cosines(block[None]).max() < 1e-5
    assert np.linalg.norm(rows, axis=1).min() > 0


def test_lengths_are_those_of_the_rows_before_they_were_turned():
    turned = orthogonal_rows(8, 4, 9)
    plain = jax.jit(jax.vmap(lambda k: gaussian.rows(k, 4, jnp.zeros(9))))(jax.random.split(KEY, 2)).reshape(8, 9)
    np.testing.assert_allclose(np.linalg.norm(turned, axis=1), np.linalg.norm(plain, axis=1), rtol=1e-5)
    # The first of a group has nothing to be orthogonal to: it is the row itself, and not its negative.
    np.testing.assert_allclose(turned[::4], plain[::4], rtol=1e-4, atol=1e-5)


def test_orthogonal_directions_are_standard_normal_one_by_one():
    d, group, n = 4, 3, 60_000
    rows, root = orthogonal_rows(n, group, d), np.sqrt(n // group)
    for place in range(group):  # each place of a group has to be right, not only their mixture
        z = rows[place::group]
        assert np.abs(z.mean(axis=0)).max() * root < ERRORS, place
        assert np.abs(z.T @ z / len(z) - np.eye(d)).max() * root < ERRORS * np.sqrt(2), place
        distance = np.abs(ndtr(np.sort(z[:, 0])) - (np.arange(len(z)) + 0.5) / len(z)).max()
        assert distance * root < 1.95, place
        squared = (z**2).sum(axis=1)  # chi-squared with d degrees of freedom
        assert abs(squared.mean() - d) * root < ERRORS * np.sqrt(2 * d)
        assert abs(squared.var() - 2 * d) * root < ERRORS * np.sqrt(8 * d * d + 48 * d)


# ---- sums ----


@pytest.mark.parametrize("name", NOISES)
def test_weighted_sum_is_the_dense_product(name):
    kind = NOISES[name]
    weights = np.random.default_rng(0).normal(size=5).astype(np.float32)
    rows = compiled(name)[0](KEY)
    drawn = noise.weighted_sum(lambda a: kind.draw(a, LIKE), kind.addresses(KEY, 5), jnp.asarray(weights), LIKE)
    stored = noise.weighted_sum(lambda row: row, rows, jnp.asarray(weights), LIKE)
    product = noise.weighted_rows(rows, jnp.asarray(weights))
    expected = jax.tree.map(lambda r: np.tensordot(weights.astype(np.float64), np.asarray(r, np.float64), 1), rows)
    for got in (drawn, stored, product):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_weighted_sum_of_two_things_with_their_own_weights():
    n, like = 5, jnp.zeros(4)
    w1, w2 = (jnp.asarray(w, jnp.float32) for w in ([-2, -1, 0, 1, 2], [0, 1, 4, 9, 16]))
    z = np.asarray(jax.jit(lambda: gaussian.rows(KEY, n, like))(), np.float64)
    both = lambda x: (x, x * x - 1)
    draw = lambda address: gaussian.draw(address, like)
    first, second = noise.weighted_sum(draw, gaussian.addresses(KEY, n), (w1, w2), like, of=both)
    np.testing.assert_allclose(first, np.asarray(w1) @ z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(second, np.asarray(w2) @ (z**2 - 1), rtol=1e-5, atol=1e-5)


def test_sums_of_bfloat16_are_float32():
    n, like = 300, {"a": jnp.zeros(4, jnp.bfloat16), "b": jnp.zeros(4)}
    weights = jnp.full(n, 0.01, jnp.bfloat16)
    rows = jax.jit(lambda: gaussian.rows(KEY, n, like))()
    sums = (
        noise.weighted_sum(lambda a: gaussian.draw(a, like), gaussian.addresses(KEY, n), weights, like),
        noise.weighted_rows(rows, weights),
    )
    for got in sums:
        for name in like:
            expected = np.asarray(weights, np.float64) @ np.asarray(rows[name], np.float64)
            assert got[name].dtype == jnp.float32
            np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding_is_right_on_average(dtype):
    """The mean of n roundings is within 5 standard errors of x: the deviation of one is at most half the spacing."""
    n, key = 100_000, jax.random.key(0)
    for value in (1.001, -0.02013, 3.7e-6, 60_000.0):
        x = jnp.full((n,), value, jnp.float32)
        rounded = np.asarray(noise.stochastic_round(x, key, dtype)).astype(np.float64)
        neighbours = np.unique(rounded)
        assert len(neighbours) == (1 if float(x[0].astype(dtype)) == float(x[0]) else 2)
        assert neighbours[0] <= float(x[0]) <= neighbours[-1]
        spacing = neighbours[-1] - neighbours[0]
        assert abs(rounded.mean() - float(x[0])) <= 5 * spacing / 2 / np.sqrt(n)
        assert (rounded == np.asarray(noise.stochastic_round(x, key, dtype)).astype(np.float64)).all()  # replayable


def test_stochastic_rounding_keeps_small_updates():
    """A thousand steps of a hundredth of bfloat16's spacing: rounding to the nearest would lose them all."""
    w, update = jnp.full((1000,), 0.02, jnp.bfloat16), jnp.float32(2.0**-13 / 100)

    def step(w, i):
        return noise.stochastic_round(
            w.astype(jnp.float32) + update, jax.random.fold_in(jax.random.key(1), i), w.dtype
        ), None

    moved = jax.lax.scan(step, w, jnp.arange(1000))[0].astype(jnp.float32) - w.astype(jnp.float32)
    assert moved.mean() == pytest.approx(1000 * float(update), rel=0.02)  # its standard error is 0.8%


def test_stochastic_rounding_of_what_has_no_neighbours():
    x = jnp.array([0.0, 1.0, jnp.nan, jnp.inf, -jnp.inf, 3.4e38, -3.4e38, 70_000.0], jnp.float32)
    rounded = noise.stochastic_round(x, jax.random.key(0), jnp.float16).astype(jnp.float32)
    assert rounded[:2].tolist() == [0, 1]
    assert jnp.isnan(rounded[2])
    assert rounded[3:5].tolist() == [jnp.inf, -jnp.inf]
    assert rounded[5:].tolist() == [65504, -65504, 65504]  # the largest
    wide = jnp.array([1.5], jnp.bfloat16)
    assert noise.stochastic_round(wide, jax.random.key(0), jnp.float32).tolist() == [1.5]
