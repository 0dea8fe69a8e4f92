r"""The page "Which strategy do I take?", from the table of `auto` and the figures of `bbob.py --strategy auto`.

    python benchmarks/bbob.py --strategy auto --dimensions 5 --instances 6-15 --budget 1000 \
        --json results/auto-5-1000.json
    python benchmarks/which_strategy.py results/auto-*.json --json FILE > docs/which_strategy.md

A run is told its budget, so each budget has a run of its own; 50 D and 100 D are the same run.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

from evoopt.automatic import TABLE

# The best of the 55 algorithms of the COCO archive in each cell: share of the 360 runs at 1e-8, from cocopp's wheel.
ARCHIVE = {
    2: {50: 0.253, 100: 0.539, 1000: 0.825, 10000: 0.958, 100000: 0.994},
    3: {50: 0.133, 100: 0.319, 1000: 0.619, 10000: 0.897, 100000: 0.958},
    5: {50: 0.125, 100: 0.181, 1000: 0.542, 10000: 0.814, 100000: 0.917},
    10: {50: 0.125, 100: 0.128, 1000: 0.492, 10000: 0.739, 100000: 0.875},
    20: {50: 0.125, 100: 0.125, 1000: 0.436, 10000: 0.681, 100000: 0.806},
}
RUNS = 240  # 24 functions, instances 6-15

HEAD = """# Which strategy do I take?

None, to begin with: `minimize(f, x0)` takes what fits the problem, and `Result.chosen` says what that was and why.
Tell it what it cannot know by `strategy=auto(parallel=8, noisy=True, constraints=2, several=True)`; bounds and whole
numbers it sees in the space. `evoopt explain --numbers 10 --evaluations 5000` prints the choice without a run.

```python
from evoopt import minimize
from evoopt.spaces import real

space = {"x": real(-5, 5), "y": real(-5, 5)}
result = minimize(lambda c: (c["x"] - 1) ** 2 + (c["y"] + 2) ** 2, space, evaluations=150)
print(result.best, result.chosen)
```

The rules, of which the first that holds decides:

| if | it takes | because |
|---|---|---|
"""

FIGURES = """
## How good that is

COCO's 24 noiseless functions, float64, one evaluation at a time in a box of [-5, 5]: the share of {runs} runs solved
to 1e-8 within so many evaluations for each number, by seed 1, and in brackets that of the best of the 55 algorithms
in COCO's archive in the same cell. The table was chosen on instances 1-5 in 2, 5 and 10 dimensions, and is judged on
instances 6-15; 3 dimensions were not used to choose, and what the
surrogate does at a saddle was chosen on instances 1-8 in 5-D. One standard error is about .03. `python
benchmarks/bbob.py --strategy auto` makes a row.

"""


def cells(files: list[Path]) -> dict[tuple[int, int], float]:
    """(dimension, evaluations for each number) -> share, of the run that was told this budget."""
    found = {}
    for file in files:
        match = re.fullmatch(r"auto-(\d+)-(\d+)", file.stem)
        if not match:
            raise SystemExit(f"{file}: its name should be auto-DIMENSION-BUDGET.json")
        dimension, told = map(int, match.groups())
        for row in json.loads(file.read_text()):
            named = re.fullmatch(r"auto \d+-D (\d+) D solved to 1e-8", row["name"])
            if named and (int(named[1]) == told or (int(named[1]), told) == (50, 100)):
                found[dimension, int(named[1])] = row["value"]
    return found


def short(x: float) -> str:
    return f"{x:.3f}".removeprefix("0")


def main() -> None:
    arguments = sys.argv[1:]
    keep = Path(arguments.pop(arguments.index("--json") + 1)) if "--json" in arguments else None
    found = cells([Path(name) for name in arguments if name != "--json"])
    print(HEAD + "\n".join(f"| {rule.when} | `{rule.what}` | {rule.why} |" for rule in TABLE))
    print(FIGURES.format(runs=RUNS), end="")
    budgets = sorted({budget for _, budget in found})
    print("| | " + " | ".join(f"{budget:g} D" for budget in budgets) + " |")
    print("|---|" + "---|" * len(budgets))
    rows = []
    for d in sorted({dimension for dimension, _ in found}):
        line = [f"{d}-D"]
        for budget in budgets:
            value, best = found.get((d, budget)), ARCHIVE[d][budget]
            if value is None:
                line.append(f"not run ({short(best)})")
                continue
            met = value >= best - math.sqrt(best * (1 - best) / RUNS)
            line.append(f"{short(value)} ({short(best)})" + ("" if met else ", not met"))
            name = f"auto {d}-D {budget} D solved to 1e-8, instances 6-15"
            rows.append({"name": name, "value": value, "unit": "share of runs", "peer": best, "ratio": value / best})
        print("| " + " | ".join(line) + " |")
    if keep:
        keep.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
