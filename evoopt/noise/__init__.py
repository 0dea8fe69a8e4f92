"""Random directions: drawn from a key, in part or whole, alone or in a batch, with the same bits.

`kinds` says what noise is; `independent`, `low_rank`, `masks`, `orthogonal` and `derived` are noise; `sums` adds it up.
"""

from evoopt.noise.derived import Elementwise, Fresh, Kept
from evoopt.noise.independent import Independent, gaussian, rademacher
from evoopt.noise.kinds import (
    Address,
    Kind,
    Like,
    LowRankKind,
    Noise,
    Seed,
    Sliced,
    Whole,
    by_leaf,
    draw,
    is_cut,
    is_low_rank,
    leaf,
)
from evoopt.noise.layers import are_vectors, is_large, is_stack, name_stacks, stacks
from evoopt.noise.low_rank import UNROLLED, LowRank, outer, split
from evoopt.noise.masks import Blocks, Masked, thresholds
from evoopt.noise.orthogonal import Orthogonal
from evoopt.noise.rounding import Narrow, rounding, stochastic_round, wide
from evoopt.noise.sums import (
    Terms,
    add_to_leaf,
    add_weighted,
    chunk_of,
    chunked,
    decayed,
    slice_sum,
    weighted_rows,
    weighted_sum,
)
from evoopt.noise.threefry import computed, fold_in, normals, replayable, signs, stored, words

__all__ = [
    "UNROLLED",
    "Address",
    "Blocks",
    "Elementwise",
    "Fresh",
    "Independent",
    "Kept",
    "Kind",
    "Like",
    "LowRank",
    "LowRankKind",
    "Masked",
    "Narrow",
    "Noise",
    "Orthogonal",
    "Seed",
    "Sliced",
    "Terms",
    "Whole",
    "add_to_leaf",
    "add_weighted",
    "are_vectors",
    "by_leaf",
    "chunk_of",
    "chunked",
    "computed",
    "decayed",
    "draw",
    "fold_in",
    "gaussian",
    "is_cut",
    "is_large",
    "is_low_rank",
    "is_stack",
    "leaf",
    "name_stacks",
    "normals",
    "outer",
    "rademacher",
    "replayable",
    "rounding",
    "signs",
    "slice_sum",
    "split",
    "stacks",
    "stochastic_round",
    "stored",
    "thresholds",
    "weighted_rows",
    "weighted_sum",
    "wide",
    "words",
]
