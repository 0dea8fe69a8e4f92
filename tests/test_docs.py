"""The examples in README and docs run as they stand."""

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


@pytest.mark.parametrize("block", BLOCKS)
def test_example(block):
    import jax

    with jax.numpy_dtype_promotion("standard"):  # as a user has it
        exec(compile(block, "example", "exec"), {"__name__": "example"})
