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
from evoopt.distributed import Policy, RayEvaluator
from evoopt.distributed.evaluator import Evaluator
from evoopt.distributed.local import Fate, LocalExecutor
from evoopt.distributed.worker import Message, Reply
from evoopt.run.programs import Bound

TARGETS = {0.05: 0.90, 0.5: 0.97}
WINDOW = 0.01  # seconds that an agent collects answers of its workers
PASSED = ("start", "encode", "kill", "close")
SIMULATED = [(0.05, 10_000, 1000), (1.0, 10_000, 1000), (0.05, 10_000, 100), (1.0, 10_000, 10)]


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
    bound, rows = Bound(strategy), []
    for mode in ("candidates", "replicas"):
        evaluate.replicate, state, per_generation = mode == "replicas", strategy.init(params, jax.random.key(0)), []
        for i in range(4):
            key, before = jax.random.key(i), dict(evaluate.sent)
            population = bound.ask(state, key)
            values = evaluate(population, objective, batch_size=4, source=(strategy, state, key))
            state = bound.tell(state, population, values)
            per_generation.append(max(evaluate.sent[w] - before.get(w, 0) for w in evaluate.scheduler.workers))
        name = f"bytes a worker and generation, {size / 1e6:g} million parameters, n={n}, {mode}"
        extra = {"target": 8 * n + 1000} if mode == "replicas" else {}
        rows.append({**row(name, float(per_generation[-1]), "bytes"), **extra, "generations": per_generation})
    evaluate.replicate = None
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


class Paced:
    """An executor whose driver does one thing after another: each send, each reply and our own time take clock time.

    With `node` workers a node, an agent there takes one call for all that is sent to it in a moment and spreads it, and
    answers at once for all that its workers finished within `WINDOW`.
    """

    def __init__(self, workers: int, fate: Any, cost: float, node: int = 1) -> None:
        reply = lambda m: Reply(m.start, m.stop, 0.0, np.zeros(m.stop - m.start, np.float32))
        self.local, self.node = LocalExecutor(workers, self.fated, evaluate=reply), node
        self.fate, self.call_seconds, self.calls, self.slices, self.own = fate, cost / node, 0, 0, 0.0
        self.cost, self.since = cost, time.process_time()
        self.start, self.encode, self.kill, self.close = map(self.local.__getattribute__, PASSED)

    def fated(self, worker: str, message: Message, i: int) -> Fate:
        """The slice's fate; an agent's answers wait for the end of a window."""
        seconds = self.fate(worker, message, i).seconds
        if self.node > 1:
            begins = max(self.local.clock, self.local._free.get(worker, 0.0))
            seconds += -(begins + seconds) % WINDOW
        return Fate("answer", seconds)

    def now(self) -> float:
        """The simulated clock, with our own time added."""
        spent = time.process_time() - self.since
        self.since += spent
        self.own += spent
        self.local.clock += spent
        return self.local.clock

    def send_many(self, sends: list[tuple[str, int, Message]]) -> list[int]:
        """Half of a call's cost, once a node."""
        nodes: dict[int, list[tuple[str, int, Message]]] = {}
        for one in sends:
            nodes.setdefault(int(one[0][1:]) // self.node if self.node > 1 else len(nodes), []).append(one)
        self.calls += len(nodes)
        self.slices += len(sends)
        for together in nodes.values():
            self.now()
            self.local.clock += self.cost / 2
            for one in together:
                self.local.send(*one)
        return [0] * len(sends)

    def poll(self, seconds: float) -> list[Any]:
        """All that happened meanwhile, and half of a call's cost for each node that something came from."""
        self.now()
        events = self.local.poll(seconds)
        while self.local._events and self.local._events[0][0] <= self.local.clock:
            events += self.local.poll(0.0)
        self.local.clock += self.cost / 2 * len({int(event.worker[1:]) // self.node for event in events})
        return events


def simulated(latency: float, cost: float) -> list[dict[str, Any]]:
    """Up to a thousand workers on a simulated clock: serial hand-out, replies, and our own time in the real loop."""
    rows = []
    for seconds, n, workers in SIMULATED:
        for node in (1, 32) if workers >= 100 else (1,):
            chance, drawn = np.random.default_rng(0), [0.0]

            def fate(
                worker: str, message: Message, i: int, c: Any = chance, s: float = seconds, d: Any = drawn
            ) -> Fate:
                size = message.stop - message.start
                noisy = s * (size + 0.1 * float(np.abs(c.standard_normal(size)).sum()))
                d[0] += noisy
                return Fate("answer", noisy + latency)

            executor: Any = Paced(workers, fate, cost, node)
            evaluate = Evaluator(executor)
            population, objective = numbers(n), lambda x: x
            evaluate(population, objective)  # the workers join, and their speed becomes known
            begun, calls, slices, own, drawn[0] = executor.now(), executor.calls, executor.slices, executor.own, 0.0
            evaluate(population, objective)
            wall = executor.now() - begun
            calls, slices, own = executor.calls - calls, executor.slices - slices, executor.own - own
            t = n * seconds / workers
            how = "one call a worker" if node == 1 else f"an agent a node of {node}"
            name = f"simulated: {workers} workers, n={n}, {seconds:g} s an evaluation, {how}"
            extra = {
                "of_nominal": t / wall, "generation_s": wall, "workers_s": drawn[0] / workers,
                "own_ms_a_slice": 1000 * own / slices, "calls": calls, "slices": slices,
                "bound_of_one_call_a_worker": t / (t + workers * cost),
            }  # fmt: skip
            rows.append({**row(name, drawn[0] / workers / wall, "of ideal"), **extra})
            print(" " * 10, ", ".join(f"{k} {v:.3g}" for k, v in extra.items()))
    return rows


def own_time() -> list[dict[str, Any]]:
    """The scheduler's and the loop's own time a call, at a million candidates."""
    rows = []
    for n in (10_000, 1_000_000):
        executor: Any = Paced(50, lambda w, m, i: Fate("answer", 0.001 * (m.stop - m.start)), 0.0)
        evaluate = Evaluator(executor, Policy(slice=max(1, n // 10_000)))
        packed = Population(lambda g: g, np.arange(n, dtype=np.float32))
        job = evaluate.submit(packed, lambda x: x)
        while not evaluate.scheduler.workers:
            evaluate.turn()
        own, slices = executor.own, executor.slices
        evaluate.collect(job)
        executor.now()
        value = 1000 * (executor.own - own) / (executor.slices - slices)
        rows.append({**row(f"own time a call, n={n}", value, "ms"), "target": 0.3})
    return rows


def main() -> None:
    """Run all."""
    p = parser(__doc__)
    p.add_argument("--parameters", type=int, default=10_000_000)
    p.add_argument("--simulated", type=float, help="only what is simulated, with this cost of a call in seconds")
    options = p.parse_args()
    head = header(["ray", "numpy"], repeats=options.repeats, seeds=[0])
    if options.simulated is not None:
        return write(options.json, head, simulated(0.0013, options.simulated) + own_time())
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
    rows += simulated(latency, cost) + own_time()
    head["load_at_end"] = round(os.getloadavg()[0], 1)
    write(options.json, head, rows)


if __name__ == "__main__":
    main()
