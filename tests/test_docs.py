"""The examples in README and docs run as they stand."""

import contextlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page.name}-{i}")
    for page in PAGES
    if page.exists()
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
    if "RayEvaluator" not in block  # those run in test_ray.py
]


@contextlib.contextmanager
def _x64_as_before():
    import jax

    before = jax.config.jax_enable_x64
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.mark.parametrize("block", BLOCKS)
def test_example(block):
    import jax

    # As a user has it; what an example sets for its process ends with it.
    with jax.numpy_dtype_promotion("standard"), _x64_as_before():
        exec(compile(block, "example", "exec"), {"__name__": "example"})
