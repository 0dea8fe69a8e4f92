"""Policies: sizes, starts, bounds, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evoopt.envs import policies

KEY = jax.random.key(0)


@pytest.mark.parametrize("make", [policies.linear, policies.mlp, policies.gru])
def test_actions_have_the_size_asked_for_and_are_bounded(make):
    policy = make(5, 3)
    params = jax.tree.map(lambda x: x + 3.0, policy.init(KEY))
    action, _ = policy.step(params, jnp.full(5, 7.0), policy.carry)
    assert action.shape == (3,)
    assert action.dtype == jnp.float32
    assert (jnp.abs(action) <= 1).all()
    logits, _ = make(5, 3, squash=None).step(params, jnp.full(5, 7.0), policy.carry)
    np.testing.assert_allclose(jnp.tanh(logits), action, rtol=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("make", [policies.linear, policies.mlp, policies.gru])
def test_observations_of_any_shape_are_flattened(make):
    policy = make(6, 2)
    params, x = policy.init(KEY), jnp.arange(6.0)
    a, b = (policy.step(params, x.reshape(shape), policy.carry)[0] for shape in [(6,), (2, 3)])
    np.testing.assert_array_equal(a, b)


def test_starts():
    linear = policies.linear(4, 2)
    assert not linear.init(KEY)["w"].any()
    assert policies.linear(40, 20, scale=0.5).init(KEY)["w"].std() == pytest.approx(0.5, rel=0.1)
    assert "b" in policies.linear(4, 2, bias=True).init(KEY)
    mlp = policies.mlp(50, 2, hidden=(40, 30))
    layers = mlp.init(KEY)
    assert [layer["w"].shape for layer in layers] == [(50, 40), (40, 30), (30, 2)]
    assert layers[0]["w"].std() == pytest.approx(50**-0.5, rel=0.1)
    action = mlp.apply(layers, jax.random.normal(KEY, (50,)))
    assert (jnp.abs(action) > 0).all()
    assert (jnp.abs(action) < 0.05).all()
    gate = policies.gru(3, 1, hidden=8).init(KEY)["recurrent"]["w"][:, :8]
    np.testing.assert_allclose(gate @ gate.T, jnp.eye(8), atol=1e-5)


def test_gru_equals_its_equations():
    policy = policies.gru(2, 1, hidden=3, squash=None)
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(lambda leaf: draw(size=leaf.shape).astype(np.float32), policy.init(KEY))
    x, h = np.array([0.3, -0.7]), np.array([0.1, 0.2, -0.4])
    (wx, bx), (wh, bh), (wo, bo) = (
        (np.asarray(params[name]["w"], float), np.asarray(params[name]["b"], float))
        for name in ("input", "recurrent", "output")
    )
    sigmoid = lambda z: 1 / (1 + np.exp(-z))
    part = lambda i: slice(3 * i, 3 * i + 3)
    r = sigmoid(x @ wx[:, part(0)] + bx[part(0)] + h @ wh[:, part(0)] + bh[part(0)])
    z = sigmoid(x @ wx[:, part(1)] + bx[part(1)] + h @ wh[:, part(1)] + bh[part(1)])
    n = np.tanh(x @ wx[:, part(2)] + bx[part(2)] + r * (h @ wh[:, part(2)] + bh[part(2)]))
    h = (1 - z) * n + z * h
    action, carry = jax.jit(policy.apply)(params, jnp.asarray(x, jnp.float32), jnp.asarray([0.1, 0.2, -0.4]))
    np.testing.assert_allclose(carry, h, rtol=1e-5)
    np.testing.assert_allclose(action, h @ wo + bo, rtol=1e-5)


def test_any_function_is_a_policy():
    policy = policies.as_policy(lambda params, observation: params * observation)
    assert policy.step(2.0, 3.0, None) == (6.0, None)
    assert policies.as_policy(policy) is policy
    assert hash(policy) == hash(policy)
    hash(policies.gru(2, 1))  # static in jit, although it holds an array
    with pytest.raises(TypeError, match="expected a Policy"):
        policies.as_policy({"w": 1.0})
