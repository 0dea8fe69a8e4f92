"""Which of the contract's rules about bits hold on this device: slices, batches, and candidates drawn again.

    python benchmarks/exactness.py --json results/exactness.json

For every row of the contract's case table: the answers of slices of whole micro-batches equal those of the whole, the
candidates decoded together equal those decoded one at a time, and `ask` repeats itself. A row's value is the number of
numbers that differ in any bit; 0 is right.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import header, parser, row, write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

BATCH = 4


def differing(a: Any, b: Any) -> int:
    """How many numbers of two trees differ."""
    pairs = zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True)
    return sum(int((np.asarray(x).view(np.uint8) != np.asarray(y).view(np.uint8)).sum() > 0) * x.size for x, y in pairs)


def measure(name: str, make: Any, start: Any, objective: Any) -> list[dict[str, Any]]:
    """The rows of a strategy."""
    strategy = make()
    ask = jax.jit(strategy.ask)
    evaluate = jax.jit(lambda population: population.map(strategy.oracle(objective), batch_size=BATCH))
    state = jax.jit(strategy.init)(start, jax.random.key(0))
    population = ask(state, jax.random.key(1))
    n = len(population)
    together = jax.jit(lambda p: jax.vmap(p.decode)(p.genomes))(population)
    in_turn = jax.jit(lambda p: jax.lax.map(p.decode, p.genomes))(population)
    rows = [row(f"{name}: candidates decoded together and in turn", differing(together, in_turn), "numbers")]
    if n >= 2 * BATCH:
        cut = n // BATCH // 2 * BATCH
        parts = [evaluate(population[:cut]), evaluate(population[cut:])]
        joined = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
        rows.append(
            row(f"{name}: answers of slices and of the whole", differing(joined, evaluate(population)), "numbers")
        )
    again = jax.jit(lambda p: jax.vmap(p.decode)(p.genomes))(ask(state, jax.random.key(1)))
    rows.append(row(f"{name}: the same generation asked again", differing(again, together), "numbers"))
    return rows


def main() -> None:
    """Run all rows, or those of some strategies."""
    p = parser(__doc__)
    p.add_argument("--only", help="names of cases, comma-separated")
    options = p.parse_args()
    devices = jax.devices()  # chosen before the tests' settings, which ask for the CPU
    cases, settings = importlib.import_module("cases").CASES, importlib.import_module("conftest")
    assert jax.devices() == devices
    names = options.only.split(",") if options.only else [name for name in cases if "evosax" not in name]
    head = header(("quax",), repeats=1, batch=BATCH)
    rows = [r for name in names for r in measure(name, cases[name].make, settings.START, settings.quadratic)]
    wrong = [r["name"] for r in rows if r["value"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} hold" + "".join(f"\n  differs: {name}" for name in wrong))
    write(options.json, head, rows)


if __name__ == "__main__":
    main()
