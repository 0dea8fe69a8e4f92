"""What evaluation by Ray workers costs: efficiency, overhead, bytes, recovery, and where scale ends.

    python benchmarks/distributed.py --json results/distributed.json

The objectives of the efficiency rows sleep, so that they need no processor: with as many workers as cores, what is
measured is the way of the work to the workers and back, not the quarrel over the cores. Bytes are those of our messages
(Ray's own a call are a row of their own). The thousand workers are simulated: the real scheduler and driver loop, on a
simulated clock, with the latency and the cost of a call that were measured before, and the driver's own time added.
"""

from __future__ import annotations

import os
import signal
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from common import header, parser, row, write

from evoopt import Population, noise, strategies
from evoopt.distributed import LocalEvaluator, Policy, RayEvaluator
from evoopt.distributed.local import Fate
from evoopt.distributed.worker import Message, Reply

TARGETS = {0.05: 0.90, 0.5: 0.97}


def sleeping(seconds: float) -> Any:
    """A Python objective that takes `seconds` and no processor."""

    def objective(x: Any) -> float:
        import time

        time.sleep(seconds)
        return float(x)

    return objective


def numbers(n: int) -> Population:
    """n candidates of one number."""
    return Population(lambda g: g, jnp.arange(float(n)))


def timed(evaluate: Any, population: Population, objective: Any, **options: Any) -> float:
    """Seconds of a generation."""
    begun = time.perf_counter()
    jax.block_until_ready(evaluate(population, objective, **options))
    return time.perf_counter() - begun


def both(evaluate: Any) -> None:
    """Wait until two workers are up."""
    while len(evaluate.scheduler.workers) < 2:
        evaluate.turn(0.2)


def efficiency(evaluate: Any, repeats: int) -> list[dict[str, Any]]:
    """Share of the ideal time, of two workers."""
    rows = []
    for seconds, n in ((0.05, 64), (0.5, 32)):
        objective, population = sleeping(seconds), numbers(n)
        timed(evaluate, population, objective, jit=False)
        median = statistics.median(timed(evaluate, population, objective, jit=False) for _ in range(repeats))
        name = f"efficiency, 2 workers, n={n}, objective sleeps {1000 * seconds:g} ms"
        rows.append({**row(name, n * seconds / 2 / median, "of ideal"), "target": TARGETS[seconds]})
    return rows


def overhead(evaluate: Any, repeats: int) -> list[dict[str, Any]]:
    """What a generation costs whose evaluation costs nothing."""
    population, trivial = numbers(256), lambda x: x * 2.0
    for _ in range(5):
        timed(evaluate, population, trivial, batch_size=16)
    walls, own = [], []
    for _ in range(4 * repeats):
        before = time.process_time()
        walls.append(timed(evaluate, population, trivial, batch_size=16))
        own.append(time.process_time() - before)
    return [
        {**row("a generation of nothing, n=256, wall clock", 1000 * statistics.median(walls), "ms"), "target": 30},
        row("a generation of nothing, n=256, processor time of the driver", 1000 * statistics.median(own), "ms"),
    ]


def calls(evaluate: Any) -> tuple[list[dict[str, Any]], float, float]:
    """Ray's own share: latency of a call, time of the driver for it, bytes for it on the loopback device."""
    import ray

    actor = next(iter(evaluate.executor._actors.values()))
    message = Message(0, 0, 1, (), (("task", -1),))  # is refused at once
    import pickle

    head = pickle.dumps(message)
    lo = lambda: psutil.net_io_counters(pernic=True)["lo"].bytes_sent
    begun, before = time.perf_counter(), lo()
    time.sleep(2)
    idle = (lo() - before) / (time.perf_counter() - begun)
    own, begun, before = time.process_time(), time.perf_counter(), lo()
    for _ in range(300):
        ray.get(actor.evaluate.remote(head, []))
    wall = time.perf_counter() - begun
    sent = (lo() - before - idle * wall) / 300
    latency = wall / 300
    own = time.process_time()
    references = [actor.evaluate.remote(head, []) for _ in range(1000)]
    ray.get(references)
    cost = (time.process_time() - own) / 1000
    return [
        row("a call of a worker and back", 1000 * latency, "ms"),
        row("a call of a worker, processor time of the driver", 1000 * cost, "ms"),
        row(f"a call of a worker, bytes on the loopback device (our message has {len(head)})", sent, "bytes"),
    ], latency, cost  # fmt: skip


def wire(evaluate: Any, size: int, n: int) -> list[dict[str, Any]]:
    """Bytes a worker and generation in both modes; the objective reads ten parameters, the rest is only carried."""
    strategy = strategies.openai_es(n, sigma=0.1, learning_rate=0.1, noise=noise.rademacher, regenerate=True)
    params = {"read": jnp.ones(10), "carried": jnp.zeros(size - 10)}
    objective = lambda p: (p["read"] ** 2).sum()
    ask, tell = jax.jit(strategy.ask), jax.jit(strategy.tell)
    rows = []
    for mode in ("candidates", "replicas"):
        evaluate.mode, state, per_generation = mode, strategy.init(params, jax.random.key(0)), []
        for i in range(4):
            key, before = jax.random.key(i), dict(evaluate.sent)
            population = ask(state, key)
            values = evaluate(population, objective, batch_size=4, source=(strategy, state, key))
            state = tell(state, population, values)
            per_generation.append(max(evaluate.sent[w] - before.get(w, 0) for w in evaluate.scheduler.workers))
        name = f"bytes a worker and generation, {size / 1e6:g} million parameters, n={n}, {mode}"
        extra = {"target": 8 * n + 1000} if mode == "replicas" else {}
        rows.append({**row(name, float(per_generation[-1]), "bytes"), **extra, "generations": per_generation})
    evaluate.mode = "auto"
    return rows


def recovery(evaluate: Any, repeats: int) -> list[dict[str, Any]]:
    """A worker is killed in the middle of a generation."""
    population, objective, n = numbers(64), sleeping(0.05), 64
    whole = statistics.median(timed(evaluate, population, objective, jit=False) for _ in range(3))
    after, until = [], []
    for _ in range(repeats):
        job = evaluate.submit(population, objective, jit=False)
        while evaluate.scheduler.jobs[job.number].left > n // 2:
            evaluate.turn(0.05)
        victim = next(w for w in evaluate.scheduler.workers if evaluate.scheduler.workers[w].queue)
        os.kill(evaluate.facts[victim]["pid"], signal.SIGKILL)
        begun = time.perf_counter()
        evaluate.collect(job)
        after.append(time.perf_counter() - begun)
        both(evaluate)
        until.append(time.perf_counter() - begun)
        timed(evaluate, population, objective, jit=False)
    alone = n / 2 * 0.05  # what the other worker needs for the second half
    return [
        row("generation of 64 x 50 ms, 2 workers, undisturbed", whole, "s"),
        {**row("from killing one worker in its middle to its end", statistics.median(after), "s"), "ideal": alone},
        row("from killing a worker to its replacement's being ready", statistics.median(until), "s"),
    ]


def simulated(latency: float, cost: float) -> list[dict[str, Any]]:
    """Efficiency of up to a thousand workers: simulated clock, real driver loop, measured latency and cost of calls."""
    rows = []
    for seconds, n in ((0.05, 10_000), (1.0, 10_000), (10.0, 10_000)):
        for workers in (10, 100, 1000):
            chance = np.random.default_rng(0)

            def fate(worker: str, message: Message, i: int, chance: Any = chance, seconds: float = seconds) -> Fate:
                size = message.stop - message.start
                noisy = seconds * size * (1 + 0.1 * abs(chance.standard_normal()) / size**0.5)
                return Fate("answer", noisy + latency)

            reply = lambda m: Reply(m.start, m.stop, 0.0, np.zeros(m.stop - m.start, np.float32))
            evaluate = LocalEvaluator(workers, fate, policy=Policy(deadline=1e9), evaluate=reply)
            population = numbers(n)
            evaluate(population, lambda x: x)  # the workers join, and their speed becomes known
            executor: Any = evaluate.executor
            clock, own, sends = executor.clock, time.process_time(), executor.sends
            evaluate(population, lambda x: x)
            clock = executor.clock - clock
            sends = executor.sends - sends
            driver = time.process_time() - own + cost * sends
            total = max(clock, driver)  # both go on at once; the slower one sets the pace
            name = f"simulated: {workers} workers, n={n}, {seconds:g} s an evaluation"
            extra = {"generation_s": total, "workers_s": clock, "driver_s": driver, "calls": sends}
            rows.append({**row(name, n * seconds / workers / total, "of ideal"), **extra})
            print(f"{'':10} generation {total:.2f} s, workers {clock:.2f} s, driver {driver:.2f} s, {sends} calls")
    return rows


def main() -> None:
    """Run all."""
    p = parser(__doc__)
    p.add_argument("--parameters", type=int, default=10_000_000)
    options = p.parse_args()
    head = header(["ray", "numpy"], repeats=options.repeats, seeds=[0])
    with RayEvaluator(2, object_store=400 << 20) as evaluate:
        begun = time.perf_counter()
        evaluate(numbers(2), sleeping(0.0), jit=False)
        both(evaluate)
        rows = [row("start of Ray and two workers", time.perf_counter() - begun, "s")]
        rows += efficiency(evaluate, options.repeats)
        rows += overhead(evaluate, options.repeats)
        more, latency, cost = calls(evaluate)
        rows += more
        rows += recovery(evaluate, min(3, options.repeats))
        rows += wire(evaluate, options.parameters, 32)
    rows += simulated(latency, cost)
    head["load_at_end"] = round(os.getloadavg()[0], 1)
    write(options.json, head, rows)


if __name__ == "__main__":
    main()
