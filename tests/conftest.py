"""What all tests share: strict dtype promotion, and an objective with no zero and no symmetry."""

import os
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("EVOOPT_CACHE", "off")  # nothing is left in the home of who runs the tests
# Compilation is nearly all of the suite's time: emitters of fused loops that take half of it, and no threads. From jax
# 0.11 on there is no choice of the first.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=4 --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if metadata.version("jax").startswith("0.10.") else ""),
)

import jax
import jax.numpy as jnp
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

TARGET = {"w": jnp.array([[2.0, -1.0], [0.5, 3.0], [-2.5, 1.5]]), "b": jnp.array(-0.7)}
START = {"w": jnp.ones((3, 2)), "b": jnp.array(0.3)}


def quadratic(params, shift=None):
    """Sum of squares around TARGET (+ shift); 22.75 at START."""
    goal = TARGET if shift is None else jax.tree.map(jnp.add, TARGET, shift)
    return sum(jnp.sum((x - t) ** 2) for x, t in zip(jax.tree.leaves(params), jax.tree.leaves(goal), strict=True))


@pytest.fixture(autouse=True)
def _quiet_mujoco(tmp_path_factory, monkeypatch):
    """MuJoCo writes its log into the working folder; tests work elsewhere."""
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
