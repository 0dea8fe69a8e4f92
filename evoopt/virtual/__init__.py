"""Virtual parameters: arrays that act like `weight + scale * z` and are never made.

A population of perturbed models must not cost population x parameters. `perturbed` makes a tree whose large leaves know
their weight, the seeds of their noise and its scale. `call` runs any JAX function of such a tree, unchanged, under
`quax.quaxify`: every primitive that meets a virtual leaf is handed to a rule.

- Low-rank noise: x (W + s a b^T) = x W + (x s a) b^T in every layout of `dot_general`; transpose, conversion, reshape,
  slices, gathered rows, sums and products with scalars act on W, a and b. Under `vmap` over members x W is one product.
  If they are small, the factors of all layers of a stack are drawn before `scan` cuts it.
- Full-rank noise: a stack of layers is cut by `scan` and perturbed layer by layer, so that the noise of one layer is
  alive at a time. Of a large matrix that is no stack (an embedding, an output head) only the rows that are gathered, or
  one chunk of a product, are perturbed at a time.
- A primitive without a rule makes the one leaf that it meets. `explain` lists which leaves, for what, and where.

Weights are only read, so probing needs no restoring and nothing drifts.
"""

from evoopt.virtual import private as _private  # noqa: F401 (first, for its error about versions)
from evoopt.virtual.call import call, explain, perturbed, transformed
from evoopt.virtual.leaves import Factored, Leaf, Log, Materialised, Virtual, folded, is_virtual, materialised

__all__ = [
    "Factored",
    "Leaf",
    "Log",
    "Materialised",
    "Virtual",
    "call",
    "explain",
    "folded",
    "is_virtual",
    "materialised",
    "perturbed",
    "transformed",
]
