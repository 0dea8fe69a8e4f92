"""What a user waits for: whole processes, from `import` to a result at 1e-9 on the 10-D Rosenbrock function.

    python benchmarks/first_second.py --json results/first_second.json

Every program is a process of its own, run in turn with the others; processor seconds of the process and its children
count, because machines are shared. `cold` has an empty cache of compiled programs, `warm` the one that the run before
left. `second call` is the same call again in the same process, another seed. `20 seeds` are 20 such calls.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from common import header, parser, row, write

OURS = """
import json, sys, time
clock = time.process_time
begun = clock()
import jax, jax.numpy as jnp
imported = clock()
import numpy as np
from evoopt import minimize
from evoopt.strategies import cma_es
host = sys.argv[1] == "host"
one = lambda m: lambda x: m.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)
f = one(np if host else jnp)
def call(seed):
    return minimize(f, np.zeros(10), cma_es(sigma=0.5), key=seed, generations=1200, target=1e-9, jit=not host)
first = call(0)
done = clock()
second = call(1)
again = clock()
for seed in range(2, 2 + int(sys.argv[2])):
    call(seed)
ends = clock()
print(json.dumps({
    "import jax": imported - begun, "first": done - begun, "second": again - done, "many": ends - again,
    "generations": second.generations, "reached": [first.reason, second.reason],
}))
"""
PYCMA = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
clock = time.process_time
begun = clock()
import numpy as np
import cma
f = lambda x: float(np.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2))
def call(seed):
    es = cma.CMAEvolutionStrategy(np.zeros(10), 0.5, {"seed": seed + 1, "verbose": -9, "ftarget": 1e-9})
    es.optimize(f, iterations=1200)
    return es
first = call(0)
done = clock()
second = call(1)
again = clock()
for seed in range(2, 2 + int(sys.argv[2])):
    call(seed)
print(json.dumps({"first": done - begun, "second": again - done, "many": clock() - again,
                  "generations": second.countiter, "reached": [first.result.fbest, second.result.fbest]}))
"""
SCIPY = """
import json, sys, time
clock = time.process_time
begun = clock()
import numpy as np
from scipy.optimize import differential_evolution
f = lambda x: float(np.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2))
def call(seed):
    return differential_evolution(f, [(-2, 2)] * 10, seed=seed, tol=0, atol=1e-12, maxiter=1000, polish=True)
first = call(0)
done = clock()
second = call(1)
again = clock()
for seed in range(2, 2 + int(sys.argv[2])):
    call(seed)
print(json.dumps({"first": done - begun, "second": again - done, "many": clock() - again,
                  "generations": second.nit, "reached": [first.fun, second.fun]}))
"""
CMAES = """
import json, sys, time
clock = time.process_time
begun = clock()
import numpy as np
from cmaes import CMA
f = lambda x: float(np.sum(100.0 * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2))
def call(seed):
    es, best = CMA(np.zeros(10), 0.5, seed=seed), np.inf
    for generation in range(1200):
        solutions = [(x, f(x)) for x in (es.ask() for _ in range(es.population_size))]
        es.tell(solutions)
        best = min(best, min(value for _, value in solutions))
        if best <= 1e-9:
            break
    return generation + 1, best
first = call(0)
done = clock()
second = call(1)
again = clock()
for seed in range(2, 2 + int(sys.argv[2])):
    call(seed)
print(json.dumps({"first": done - begun, "second": again - done, "many": clock() - again,
                  "generations": second[0], "reached": [first[1], second[1]]}))
"""


def process(program: str, kind: str, many: int, cache: str) -> dict[str, Any]:
    """What a process says of itself."""
    environment = {**os.environ, "EVOOPT_CACHE": cache, "JAX_PLATFORMS": "cpu"}
    for name in [n for n in environment if n.startswith(("JAX_COMPILATION_CACHE", "JAX_PERSISTENT"))]:
        environment.pop(name, None)  # the library's own setting is what is measured
    command = [sys.executable, "-c", program, kind, str(many)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def main() -> None:
    """Run all sides in turn."""
    p = parser(__doc__)
    p.add_argument("--seeds", type=int, default=20, help="calls of the last row")
    options = p.parse_args()
    head = header(("numpy", "cma"), repeats=options.repeats, seeds=options.seeds)
    peers = {"pycma": PYCMA, "cmaes": CMAES, "scipy differential_evolution": SCIPY}
    for name in list(peers):
        package = {"pycma": "cma", "cmaes": "cmaes"}.get(name, "scipy")
        if subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True).returncode:
            print(f"{package} is not installed: its rows are left out")
            del peers[name]
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("jax", "host"):
                for heat in ("cold", "warm"):
                    many = options.seeds if heat == "warm" else 0
                    found.setdefault(f"{kind} {heat}", []).append(process(OURS, kind, many, cache))
            for name, program in peers.items():
                many = 0 if name.startswith("scipy") else options.seeds
                found.setdefault(name, []).append(process(program, "", many, cache))
    median = lambda side, what: statistics.median(run[what] for run in found[side])
    pycma = {what: median("pycma", what) for what in ("first", "second", "many")} if "pycma" in found else {}
    rows = [row("import jax alone", median("jax warm", "import jax"), "s")]
    for kind in ("jax", "host"):
        for heat in ("cold", "warm"):
            beyond = median(f"{kind} {heat}", "first") - median(f"{kind} {heat}", "import jax")
            rows.append(
                row(f"{kind} objective, {heat}: first result beyond import jax", beyond, "s", pycma.get("first"))
            )
        second, generations = median(f"{kind} warm", "second"), median(f"{kind} warm", "generations")
        rows.append(row(f"{kind} objective: second call", second, "s", pycma.get("second")))
        rows.append(row(f"{kind} objective: second call, a generation", 1e3 * second / generations, "ms"))
        rows.append(
            row(f"{kind} objective: {options.seeds} seeds", median(f"{kind} warm", "many"), "s", pycma.get("many"))
        )
    for name in peers:
        rows.append(row(f"{name}: first result", median(name, "first"), "s"))
        rows.append(row(f"{name}: second call", median(name, "second"), "s"))
    write(options.json, head, rows)


if __name__ == "__main__":
    main()
