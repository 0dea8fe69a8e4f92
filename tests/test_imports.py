"""Who may import whom, and what `import evoopt` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "evoopt"
LEVELS = {
    "types": 0, "reading": 1, "trees": 1, "bounds": 2, "answers": 2, "noise": 2, "utilities": 2, "virtual": 3,
    "population": 3, "sampling": 3, "strategy": 4, "recombination": 4, "vectors": 4, "probes": 4,
    "checkpoint": 4, "identity": 5, "progress": 4, "runs": 5, "loop": 5, "engines": 5, "minimize": 5,
    "wrappers": 5, "strategies": 5, "black_box_tuning": 6, "trajectory": 6, "finetune": 7,
    "cli_settings": 8, "cli": 9, "cli_finetune": 9,
    "__main__": 9, "__init__": 9, "envs": 4, "distributed": 5,
}  # fmt: skip
FORBIDDEN = {"strategies": {"minimize", "loop", "wrappers", "envs", "distributed", "runs", "checkpoint"},
             "wrappers": {"strategies", "minimize", "loop", "envs", "distributed", "runs", "checkpoint"},
             "envs": {"strategies", "minimize", "loop", "wrappers", "distributed", "runs", "checkpoint", "strategy"},
             "distributed": {"strategies", "envs", "wrappers"}}  # fmt: skip


def imports(path):
    """(module of evoopt, whole dotted name, whether at the top) for each import of our own."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "evoopt":
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                yield dotted.split(".")[1], dotted
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("evoopt."):
                    yield alias.name.split(".")[1], alias.name


FILES = sorted(p for p in ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for module, dotted in imports(path):
        if module not in LEVELS:
            continue  # a name of the package itself
        assert LEVELS[module] <= LEVELS[part], f"{part} imports {dotted}"
        assert module not in FORBIDDEN.get(part, ()), f"{part} imports {dotted}"
        if part == "strategies" and path.name != "__init__.py":
            assert module != "strategies", f"strategies never import each other: {path.name} imports {dotted}"


def test_import_evoopt_is_light():
    heavy = ["ray", "brax", "flax", "matplotlib", "evosax", "gymnax", "mujoco", "transformers", "torch", "safetensors",
             "tokenizers", "gguf"]  # fmt: skip
    code = "import sys, evoopt, evoopt.strategies, evoopt.wrappers, evoopt.envs.language, evoopt.distributed\n"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
