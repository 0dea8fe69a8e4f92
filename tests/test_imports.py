"""Who may import whom, and what `import evoopt` costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "evoopt"
# From the bottom up: what stands in a line imports from the lines above it only, and a package from itself. `kits` are
# what the strategies of a family share.
ORDER = [
    "types", "reading", "trees", "when", "answers", "checks", "shaping", "bounds", "noise", "virtual", "population",
    "constraints", "strategy", "injection", "stopping", "transforms", "indicators", "kits", "spaces", "wrappers",
    "strategies", "automatic", "envs", "run", "distributed", "recipes", "cli",
]  # fmt: skip
PLACE = {name: i for i, name in enumerate(ORDER)} | {"lazy": -1, "__init__": len(ORDER), "__main__": len(ORDER)}
KITS = {
    "strategies.gaussian.sampling",
    "strategies.local.gaussian_process",
    "strategies.covariance.recombination",
    "strategies.populations.variation",
    "strategies.zeroth_order.probes",
    "strategies.first_order.updates",
}
# Neither knows of strategies, and they do not know each other: what brings them together is the command line.
APART = [
    {"envs", "distributed"}, {"envs", "strategies"}, {"envs", "wrappers"}, {"envs", "run"}, {"run", "strategies"},
    {"run", "wrappers"}, {"distributed", "strategies"}, {"distributed", "wrappers"},
]  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def module(path):
    """The dotted name of a file below evoopt, `strategies.gaussian.snes`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module(path) for path in FILES}


def room(name):
    """Where a module stands in `ORDER`."""
    return "kits" if name in KITS else name.split(".")[0]


def imports(path):
    """The modules of evoopt that a file imports, wherever in it; not what only a type checker sees."""
    tree = ast.parse(path.read_text())
    unseen = {id(n) for top in ast.walk(tree) if isinstance(top, ast.If) and ast.unparse(top.test) == "TYPE_CHECKING"
              for n in ast.walk(top)}  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "evoopt":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}".removeprefix("evoopt.")
                yield whole if whole in MODULES else whole.rpartition(".")[0]
        elif isinstance(node, ast.Import):
            yield from (alias.name[7:] for alias in node.names if alias.name.startswith("evoopt."))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    name = module(path)
    mine = room(name)
    for other in imports(path):
        if not other:
            continue  # `from evoopt import __version__`
        theirs = room(other)
        assert theirs in PLACE, f"{other} has no place in the order"
        assert theirs == mine or PLACE[theirs] < PLACE[mine], f"{name} imports {other}"
        assert {mine, theirs} not in APART, f"{name} imports {other}"
        assert not (mine == theirs == "strategies" and "." in name), f"strategies never import each other: {other}"


def test_no_circles():
    needs = {module(path): {m for m in imports(path) if m} - {module(path)} for path in FILES}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path, name])}"
        if name in done:
            return
        path.append(name)
        for other in sorted(needs.get(name, ())):
            visit(other)
        done.add(path.pop())

    for name in sorted(needs):
        visit(name)


def test_private_parts_of_jax_and_quax_are_imported_in_one_module():
    for path in FILES:
        tree = ast.parse(path.read_text())
        from_ = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        named = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        private = [name for name in from_ + named if name.split(".")[0] in ("jax", "quax") and "._" in name]
        assert not private or module(path) == "virtual.private", (module(path), private)


def test_another_jax_or_quax_is_refused_with_the_versions_that_were_tested():
    code = "import quax._compat; del quax._compat.unpack_scan_args; import evoopt.virtual"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: expected the private parts of jax" in out.stderr
    assert "install the tested versions" in out.stderr


def test_modules_are_short():
    """None above 400 lines."""
    long = {module(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_the_protocol_is_read_on_the_first_day():
    first = ["types", "trees", "population", "strategy", "answers", "shaping", "checks"]
    assert sum(len((ROOT / f"{name}.py").read_text().splitlines()) for name in first) < 900


def test_import_evoopt_is_light():
    heavy = ["ray", "brax", "flax", "matplotlib", "evosax", "gymnax", "mujoco", "transformers", "torch", "safetensors",
             "tokenizers", "gguf"]  # fmt: skip
    code = "import sys, evoopt, evoopt.strategies, evoopt.wrappers, evoopt.envs.language, evoopt.distributed\n"
    code += "evoopt.minimize, evoopt.Session, evoopt.Run\n"
    code += f"print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_is_there_and_nothing_is_imported_before():
    code = "import sys, evoopt\nassert 'jax' not in sys.modules\n"
    code += "for name in evoopt.__all__: assert getattr(evoopt, name) is not None\n"
    code += "assert set(evoopt.__all__) <= set(dir(evoopt))\n"
    code += "for name in evoopt.strategies.__all__: assert callable(getattr(evoopt.strategies, name)), name\n"
    subprocess.run([sys.executable, "-c", code], check=True)
