"""Random numbers a second: ours against `jax.random`'s, for the same shape, consumed by a sum.

    python benchmarks/noise.py --json results/noise.json

Compilation is not counted. The sum stands for what uses the noise: both sides may fuse it with the drawing.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from common import header, interleaved, parser, row, write

from evoopt import noise

PAIRS = {  # ours and the peer, (key, n) -> (n,) float32
    "normals": (noise.normals, lambda key, n: jax.random.normal(key, (n,))),
    "signs": (noise.signs, lambda key, n: jax.random.rademacher(key, (n,), jnp.float32)),
}


def main() -> None:
    """Time all pairs."""
    p = parser(__doc__)
    p.add_argument("--size", type=int, default=1 << 22)
    options = p.parse_args()
    head = header((), repeats=options.repeats, size=options.size)
    rows, key = [], jax.random.key(0)
    for name, pair in PAIRS.items():
        sides = {}
        for side, draw in zip(("ours", "peer"), pair, strict=True):
            run = jax.jit(lambda key, draw=draw: jnp.sum(draw(key, options.size)))
            jax.block_until_ready(run(key))
            sides[side] = partial(run, key)
        t = interleaved(sides, options.repeats)
        rate = lambda side, t=t: options.size / t[side] / 1e6
        rows.append(row(name, rate("ours"), "million a second", rate("peer"), more_is_better=True))
    write(options.json, head, rows)


if __name__ == "__main__":
    main()
