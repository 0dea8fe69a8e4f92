"""Fine-tuning with real weights and real text: held-out accuracy after 1,000, 2,000 and 4,000 forward passes.

The sentence encoder all-MiniLM-L6-v2 learns to tell positive from negative movie-review snippets of at most 12 words
(evoopt.envs.language.bundled): 1,024 to train on, the other 1,317 held out. Searched are its 29,952 biases and norm
scales. A forward pass is one of a batch of 16 snippets; a step of AdamW counts as three, since going backward costs
two. Every strategy sees the same batches. Rates and sizes are given in STRATEGIES; they were chosen by a run each with
another seed, by its accuracy on other snippets, the 701 of 13 or 14 words: neither trained on nor held out.

Every run has a folder in --runs, and every finished one a line in --partial: a stopped benchmark goes on where it was.

`--smollm2` is for a GPU: MeZO on all 134.5 M parameters of SmolLM2-135M-Instruct, the same snippets as prompts. Its
rate was not tuned.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

from evoopt import minimize, noise, strategies
from evoopt.envs import language
from evoopt.envs.language import bundled
from evoopt.recipes.finetune import finetune
from evoopt.run import trajectory
from evoopt.run.folder import Run

TRAINED, LENGTH, BATCH = 1024, 20, 16
CANDIDATES = {"negative": "It was terrible.", "positive": "It was great."}
MARKS = (1000, 2000, 4000)

# name: (forward passes a step, strategy)
STRATEGIES: dict[str, tuple[int, Callable[[], Any]]] = {
    "mezo": (2, lambda: strategies.mezo(learning_rate=1e-3)),
    "adamw (backpropagation)": (3, lambda: strategies.gradient(optax.adamw(3e-4))),
    "fzoo, 12 probes": (13, lambda: strategies.fzoo(13, learning_rate=1.2e-2)),
    "zo_adamu": (2, lambda: strategies.zo_adamu(2000, learning_rate=1e-3)),
    "eggroll, 32 members of rank 1": (32, lambda: strategies.eggroll(32, sigma=1e-3, learning_rate=2e-5)),
}


def split() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The snippets to train on, and those held out."""
    rows = bundled.snippets(words=12)
    rows = [rows[i] for i in np.random.RandomState(0).permutation(len(rows))]
    return rows[:TRAINED], rows[TRAINED:]


def data() -> tuple[Any, Any, Any]:
    """(task, x, held-out data)."""
    model, params, tokenizer = language.load(bundled.minilm())
    options = {"candidates": CANDIDATES, "length": LENGTH, "truncate": True}
    train, held_out = (language.data.similarity(model, tokenizer, part, **options) for part in split())
    x, merge = language.trainable.biases_and_norms(params)
    return language.Task(model, train, merge, batch_size=BATCH), x, held_out


def run(parts: tuple[Any, Any, Any], folder: Path, name: str, seed: int) -> dict[str, Any]:
    """Held-out accuracy at the last evaluation within each mark."""
    task, x, held_out = parts
    passes, make = STRATEGIES[name]
    short = f"{name.split(',')[0].split(' ')[0]}-{seed}"
    path = folder / short
    with Run.open(path) if (path / "config.json").exists() else Run.create(folder, short, {"strategy": name}) as place:
        tuned = finetune(
            task, x, make(), key=seed, held_out=held_out, every=MARKS[0] // passes, generations=MARKS[-1] // passes,
            progress=True, label=short, run=place,
        )  # fmt: skip
    if tuned.result.reason == "interrupted":
        raise KeyboardInterrupt  # it goes on from its folder the next time, and is no result until then
    found = {}
    for mark in MARKS:
        row = [row for row in tuned.evaluations if row["generation"] * passes <= mark][-1]
        found[str(mark)] = {"accuracy": row["accuracy"], "loss": row["loss"], "passes": row["generation"] * passes}
    zero = tuned.evaluations[0]["accuracy"]
    where = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    return {"name": name, "seed": seed, "marks": found, "zero-shot": zero, **where}


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the report: medians with quartiles, and the share of the way from MeZO to AdamW."""
    accuracy: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        for mark in MARKS:
            accuracy.setdefault((row["name"], mark), []).append(100 * row["marks"][str(mark)]["accuracy"])
    medians = {k: statistics.median(v) for k, v in accuracy.items()}
    report = [common.row("zero-shot", 100 * rows[0]["zero-shot"], "%")]
    for (name, mark), values in accuracy.items():
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        low, high = medians.get(("mezo", mark)), medians.get(("adamw (backpropagation)", mark))
        made = common.row(f"{name}, {mark} forward passes", medians[name, mark], "%", low, more_is_better=True)
        closed = None if low is None or high is None or high == low else (medians[name, mark] - low) / (high - low)
        print(f"    quartiles {quartiles[0]:.1f} to {quartiles[2]:.1f}, {len(values)} seeds"
              + ("" if closed is None else f"; of the way from MeZO to AdamW: {closed:.2f}"))  # fmt: skip
        report.append({**made, "quartiles": [quartiles[0], quartiles[2]], "seeds": len(values), "closed": closed})
    for row in rows:
        name = f"{row['name']}, seed {row['seed']}, {MARKS[-1]} forward passes"
        report.append({**common.row(name, 100 * row["marks"][str(MARKS[-1])]["accuracy"], "%"), "marks": row["marks"]})
    return report


def smollm2(passes: int = 2000) -> list[dict[str, Any]]:
    """Held-out accuracy of a language model, before and while all its parameters are searched."""
    model, params, tokenizer = language.load(bundled.smollm2())
    candidates = {"negative": " negative", "positive": " positive"}
    options = {"prompt": "Review: {text}\nSentiment:", "candidates": candidates}
    train, held_out = (language.data.classification(model, tokenizer, part, **options) for part in split())
    task = language.Task(model, train, batch_size=BATCH)
    strategy = strategies.mezo(learning_rate=1e-6, noise=noise.rademacher)
    tuned = finetune(task, params, strategy, held_out=held_out, every=passes // 8, generations=passes // 2)
    name = f"SmolLM2-135M, all parameters, MeZO, {passes} forward passes and their compilation"
    report = [common.row(name, tuned.result.seconds, "s")]
    for row in tuned.evaluations:
        name = f"SmolLM2-135M, all parameters, MeZO, after {2 * row['generation']} forward passes"
        report.append({**common.row(name, 100 * row["accuracy"], "%"), "loss": row["loss"]})
    return report


def replayed(steps: int = 20_000) -> list[dict[str, Any]]:
    """Size of a trajectory of `steps` MeZO steps, and whether its replay has the same bits."""
    model = language.tiny()
    x = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 12), 0, 32, jnp.int32)

    def loss(params: Any) -> Any:
        logits = jax.nn.log_softmax(model.apply(params, tokens[:, :-1]))
        return -jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1).mean()

    strategy = strategies.mezo(learning_rate=1e-4)
    start = time.perf_counter()
    result = minimize(loss, x, strategy, key=3, generations=steps, summarize=trajectory.told_values, keep_best=False)
    middle = time.perf_counter()
    values = [row["values"] for row in result.history]
    made = trajectory.record(strategy, x, 3, values, end=result.recommended)
    with tempfile.TemporaryDirectory() as folder:
        path = trajectory.write(Path(folder) / "run.trajectory", made)
        size = path.stat().st_size
        trajectory.replay(trajectory.read(path), strategy, x)  # raises where a bit differs
    print(f"run {middle - start:.1f} s, replay {time.perf_counter() - middle:.1f} s, replay bit-exact")
    return [common.row(f"trajectory file, {steps} steps", size / 1e6, "MB", 1.0)]


def main() -> None:
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU as on a CPU
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", action="append", help="names of strategies; leaves the trajectory's row out")
    parser.add_argument("--partial", default="finetuning.jsonl", help="finished runs, a JSON object a line")
    parser.add_argument("--runs", default="runs/finetuning", help="where the runs' folders are")
    parser.add_argument("--report", action="store_true", help="make the table of --partial, run nothing")
    parser.add_argument("--smollm2", action="store_true", help="fine-tune SmolLM2 instead")
    parser.add_argument("--trajectory", action="store_true", help="the trajectory's row only")
    options = parser.parse_args()
    head = common.header(["optax"], trained=TRAINED, length=LENGTH, batch=BATCH, seeds=options.seeds)
    if options.trajectory or options.smollm2:
        return common.write(options.json, head, replayed() if options.trajectory else smollm2())
    partial = Path(options.partial)
    rows = [json.loads(line) for line in partial.read_text().splitlines()] if partial.exists() else []
    if not options.report:
        parts = data()
        for seed in range(options.seeds):
            for name in options.only or STRATEGIES:
                if any(row["name"] == name and row["seed"] == seed for row in rows):
                    continue
                rows.append(run(parts, Path(options.runs), name, seed))
                print(json.dumps(rows[-1]), flush=True)
                with open(partial, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    ran = {name: ", ".join(sorted({row[name] for row in rows})) for name in ("device", "jax")}
    common.write(options.json, head | ran, table(rows) + ([] if options.report or options.only else replayed()))


if __name__ == "__main__":
    main()
