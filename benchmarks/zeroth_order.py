"""Zeroth-order steps of a language model: memory and time over inference, and against a textbook MeZO in PyTorch.

    python benchmarks/zeroth_order.py --json results/zeroth_order-cpu.json

The model has SmolLM2-135M's shape (30 layers, d 576, 9 heads, 3 of keys and values, feed-forward 1536, vocabulary
49152, tied) with random float32 weights: memory and time do not depend on their values. A step is ask, two evaluations
one at a time, and tell, in one program with the state donated. Memory is XLA's own account of the compiled program,
arguments and results included; time is over two calls of the compiled loss, interleaved. PyTorch's row is skipped
where torch is not installed; it runs in a process of its own, in turn, on the same device, with the same precision of
products (JAX's default on a GPU is TF32). Its memory is what its allocator handed out at most; on a CPU the process's
peak resident size, less what it was before the model was made. Every state of ours is held for these rows: three times
the parameters, of which a step needs one.
On a GPU set XLA_PYTHON_CLIENT_PREALLOCATE=false, or PyTorch finds no memory left.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from common import header, parser, row, write
from finetuning import replayed

from evoopt import noise, strategies, trees

SHAPE = {"layers": 30, "d": 576, "heads": 9, "kv": 3, "ff": 1536, "vocabulary": 49152}
NOISES = {
    "low-rank, rank 1": (noise.LowRank(1), 1.05, 1.15),
    "Rademacher": (noise.rademacher, 1.05, 1.5),
    "Gaussian": (noise.gaussian, 1.15, None),
}


def init(key: Any, shape: dict[str, int]) -> Any:
    """Random weights, stacked over layers."""
    n, d, ff, kv = shape["layers"], shape["d"], shape["ff"], shape["kv"] * shape["d"] // shape["heads"]
    sizes = {"q": (d, d), "k": (d, kv), "v": (d, kv), "o": (d, d), "gate": (d, ff), "up": (d, ff), "down": (ff, d)}
    keys = iter(jax.random.split(key, len(sizes) + 1))
    layers = {name: jax.random.normal(next(keys), (n, *s)) * s[0] ** -0.5 for name, s in sizes.items()}
    norms = {"attention_norm": jnp.ones((n, d)), "mlp_norm": jnp.ones((n, d))}
    embed = jax.random.normal(next(keys), (shape["vocabulary"], d)) * d**-0.5
    return {"embed": embed, "norm": jnp.ones(d), "layers": layers | norms}


def loss(params: Any, tokens: Any, shape: dict[str, int]) -> Any:
    """Cross-entropy of the next token of a Llama-type decoder, tokens (batch, time)."""
    heads, kv = shape["heads"], shape["kv"]
    x = params["embed"][tokens[:, :-1]]
    (b, t, d), size = x.shape, x.shape[-1] // heads
    angle = jnp.arange(t)[:, None] * 1e5 ** (-jnp.arange(0, size, 2) / size)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    causal = jnp.tril(jnp.ones((t, t), bool))

    def normed(x: Any, w: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * w

    def rotated(x: Any) -> Any:
        u, v = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([u * cos - v * sin, v * cos + u * sin], axis=-1)

    def layer(x: Any, w: Any) -> Any:
        y = normed(x, w["attention_norm"])
        q = rotated((y @ w["q"]).reshape(b, t, heads, size)).reshape(b, t, kv, heads // kv, size)
        k, v = rotated((y @ w["k"]).reshape(b, t, kv, size)), (y @ w["v"]).reshape(b, t, kv, size)
        scores = jnp.where(causal, jnp.einsum("btkgd,bskd->bkgts", q, k) * size**-0.5, -1e30)
        attended = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores, -1), v).reshape(b, t, d)
        x = x + attended @ w["o"]
        y = normed(x, w["mlp_norm"])
        return x + (jax.nn.silu(y @ w["gate"]) * (y @ w["up"])) @ w["down"], None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    logits = normed(x, params["norm"]) @ params["embed"].T
    right = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return jnp.mean(jax.scipy.special.logsumexp(logits, -1) - right)


def peak(compiled: Any) -> int:
    """Bytes alive at most, by XLA's account."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


def step_of(kind: Any, objective: Any) -> tuple[Any, Any]:
    """(MeZO, its step in one program)."""
    strategy = strategies.mezo(sigma=1e-3, learning_rate=1e-6, noise=kind)

    def step(state: Any, key: Any, tokens: Any) -> Any:
        population = strategy.ask(state, key)
        values = population.map(objective, tokens)
        return strategy.tell(state, population, values), values

    return strategy, jax.jit(step, donate_argnums=0)


def in_turn(a: Any, b: Any, repeats: int) -> tuple[float, float, float]:
    """(median of the ratios a / b of neighbouring calls, median seconds of each)."""
    times = []
    for _ in range(repeats):
        pair = []
        for run in (a, b):
            start = time.perf_counter()
            jax.block_until_ready(run())
            pair.append(time.perf_counter() - start)
        times.append(pair)
    ratio = statistics.median(x / y for x, y in times)
    return ratio, statistics.median(x for x, _ in times), statistics.median(y for _, y in times)


def main() -> None:
    """Measure, print, write."""
    p = parser(__doc__)
    p.add_argument("--batch", type=int, default=16, help="sequences in a batch: 16 is MeZO's")
    p.add_argument("--tokens", type=int, default=40, help="tokens of a sequence")
    p.add_argument("--layers", type=int, default=SHAPE["layers"])
    p.add_argument("--vocabulary", type=int, default=SHAPE["vocabulary"])
    p.add_argument("--members", type=int, default=64, help="members of the row at once; 0 leaves it out")
    p.add_argument("--member-tokens", type=int, nargs="+", default=[8], help="tokens of a member's sequence there")
    p.add_argument("--memory-only", action="store_true", help="compile, and run nothing")
    args = p.parse_args()
    shape = SHAPE | {"layers": args.layers, "vocabulary": args.vocabulary}
    objective = functools.partial(loss, shape=shape)
    head = header(("quax",), batch=args.batch, tokens=args.tokens, repeats=args.repeats, seed=0, **shape)
    abstract = jax.eval_shape(lambda key: init(key, shape), jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (args.batch, args.tokens + 1), 0, shape["vocabulary"])
    size = 4 * trees.size(abstract)
    rows: list[dict[str, Any]] = []
    inference = jax.jit(objective).lower(abstract, tokens).compile()
    rows.append(row("inference: peak memory over the parameters", peak(inference) / size, "P"))

    compiled = {}
    for name, (kind, most, _) in NOISES.items():
        strategy, step = step_of(kind, objective)
        state = jax.eval_shape(
            lambda p, s=strategy: s.init(jax.tree.map(jnp.ones_like, p), jax.random.key(0)), abstract
        )
        start = time.perf_counter()
        compiled[name] = (strategy, step.lower(state, jax.random.key(0), tokens).compile())
        took = time.perf_counter() - start
        ratio = peak(compiled[name][1]) / peak(inference)
        rows.append(row(f"{name}: peak memory of a step over inference (target {most})", ratio, "times", 1.0))
        rows.append(row(f"{name}: compilation", took, "s"))
    write(args.json, head, rows)
    if args.memory_only:
        return

    params = jax.jit(lambda key: init(key, shape))(jax.random.key(0))
    runs: dict[str, Any] = {}
    for name, (_, _, most) in NOISES.items():
        strategy, step = compiled[name]
        held = [jax.jit(lambda p, s=strategy: s.init(p, jax.random.key(0)))(jax.tree.map(jnp.copy, params))]

        def run(held: list[Any] = held, step: Any = step) -> Any:
            held[0], values = step(held[0], jax.random.key(2), tokens)
            return values, held[0]

        forwards = lambda: [jax.block_until_ready(inference(params, tokens)) for _ in range(2)]
        jax.block_until_ready((run(), forwards()))
        runs[name] = run
        ratio, ours, two = in_turn(run, forwards, args.repeats)
        target = "" if most is None else f" (target {most})"
        rows.append(row(f"{name}: time of a step over two forward passes{target}", ratio, "times", 1.0))
        rows.append(row(f"{name}: a step", ours, "s", two))
        write(args.json, head, rows)

    for length in args.member_tokens if args.members else ():
        rows += at_once(params, objective, args.members, length, args.repeats)
        write(args.json, head, rows)
    rows += torch_rows(args, shape, runs, {name: peak(c) for name, (_, c) in compiled.items()})
    write(args.json, head, rows)
    rows += replayed()
    write(args.json, head, rows)


def at_once(params: Any, objective: Any, n: int, length: int, repeats: int) -> list[dict[str, Any]]:
    """n low-rank members, one sequence of `length` tokens each, over a forward pass of a batch of n."""
    from evoopt.strategies.gaussian import sampling

    tokens = jax.random.randint(jax.random.key(1), (n, length + 1), 0, params["embed"].shape[0])

    @jax.jit
    def members(params: Any, tokens: Any) -> Any:
        kind, scheme = noise.LowRank(1), sampling.antithetic
        population = sampling.sample(kind, scheme, jax.random.key(3), n, params, 1e-3, regenerate=True)
        return population.vmap(lambda p, own: objective(p, own[None]), each=tokens)

    forward = jax.jit(objective)
    a, b = (lambda: members(params, tokens)), (lambda: forward(params, tokens))
    jax.block_until_ready((a(), b()))
    ratio, ours, theirs = in_turn(b, a, repeats)
    print(f"  {n} members at once {theirs:.3g} s, batched inference {ours:.3g} s")
    target = 0.7 if jax.default_backend() == "cpu" else 0.85
    name = f"{n} low-rank members of {length} tokens at once: throughput over batched inference (target {target})"
    return [row(name, ratio, "times", 1.0, more_is_better=True)]


TORCH = """
import json, sys, time
import torch, torch.nn.functional as F

shape, batch, length, device = json.loads(sys.argv[1])
torch.manual_seed(0)
torch.set_default_device(device)
torch.backends.cuda.matmul.allow_tf32 = True
d, heads, kv, ff = shape["d"], shape["heads"], shape["kv"], shape["ff"]
size = d // heads
def resident():  # not ru_maxrss, which starts from that of the parent process
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

peak = torch.cuda.max_memory_allocated if device == "cuda" else resident
before = peak()
w = lambda *s: torch.randn(*s) * s[-1] ** -0.5
layer = lambda: dict(q=w(d, d), k=w(kv * size, d), v=w(kv * size, d), o=w(d, d), gate=w(ff, d), up=w(ff, d),
                     down=w(d, ff), n1=torch.ones(d), n2=torch.ones(d))
params = dict(embed=w(shape["vocabulary"], d), norm=torch.ones(d), layers=[layer() for _ in range(shape["layers"])])
leaves = [params["embed"], params["norm"], *(x for l in params["layers"] for x in l.values())]
tokens = torch.randint(0, shape["vocabulary"], (batch, length + 1))
angle = torch.arange(length)[:, None] * 1e5 ** (-torch.arange(0, size, 2) / size)
cos, sin = angle.cos()[None, None], angle.sin()[None, None]

def normed(x, w):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w

def rotated(x):
    u, v = x.chunk(2, -1)
    return torch.cat([u * cos - v * sin, v * cos + u * sin], -1)

@torch.no_grad()
def loss():
    x = params["embed"][tokens[:, :-1]]
    b, t = x.shape[:2]
    for l in params["layers"]:
        y = normed(x, l["n1"])
        split = lambda z, n: z.view(b, t, n, size).transpose(1, 2)
        q, k = rotated(split(F.linear(y, l["q"]), heads)), rotated(split(F.linear(y, l["k"]), kv))
        v = split(F.linear(y, l["v"]), kv)
        k, v = k.repeat_interleave(heads // kv, 1), v.repeat_interleave(heads // kv, 1)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, d)
        x = x + F.linear(a, l["o"])
        y = normed(x, l["n2"])
        x = x + F.linear(F.silu(F.linear(y, l["gate"])) * F.linear(y, l["up"]), l["down"])
    logits = F.linear(normed(x, params["norm"]), params["embed"])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()

@torch.no_grad()
def perturb(seed, scale):
    torch.manual_seed(seed)
    for x in leaves:
        x.add_(torch.randn_like(x), alpha=scale)

def step(seed, sigma=1e-3, rate=1e-6):
    perturb(seed, sigma); plus = loss()
    perturb(seed, -2 * sigma); minus = loss()
    perturb(seed, sigma)
    perturb(seed, -rate * (plus - minus) / (2 * sigma))

def clock(f):
    wait(); start = time.perf_counter(); f(); wait(); return time.perf_counter() - start

wait = torch.cuda.synchronize if device == "cuda" else lambda: None
loss()
inference = peak() - before
for i, what in enumerate(sys.stdin):
    took = clock((lambda: (loss(), loss())) if what.strip() == "forward" else (lambda: step(i)))
    print(json.dumps([took, (peak() - before) / inference, peak() - before]), flush=True)
"""


def torch_rows(args: Any, shape: dict[str, int], runs: dict[str, Any], peaks: dict[str, int]) -> list[dict[str, Any]]:
    """Against MeZO as it is written in PyTorch: perturb in place, evaluate, perturb back, update; noise by seed."""
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    setting = json.dumps([shape, args.batch, args.tokens, device])
    found = subprocess.run([sys.executable, "-c", "import torch"], capture_output=True)
    if found.returncode:
        print("torch is not installed: its rows are left out")
        return []
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", TORCH, setting], **pipes) as peer:

        def ask(what: str) -> list[float]:
            assert peer.stdin
            assert peer.stdout
            peer.stdin.write(what + "\n")
            peer.stdin.flush()
            return json.loads(peer.stdout.readline())

        ask("step")
        steps, forwards, ours = [], [], {name: [] for name in runs}
        for _ in range(args.repeats):  # in turn: ours, then PyTorch's
            for name, run in runs.items():
                start = time.perf_counter()
                jax.block_until_ready(run())
                ours[name].append(time.perf_counter() - start)
            steps.append(ask("step"))
            forwards.append(ask("forward"))
        assert peer.stdin
        peer.stdin.close()
    median = lambda times: statistics.median(times)
    step, two = median(t for t, *_ in steps), median(t for t, *_ in forwards)
    rows = [row("textbook MeZO in PyTorch: time of a step over two forward passes", step / two, "times")]
    rows.append(row("textbook MeZO in PyTorch: peak memory of a step over inference", steps[-1][1], "times"))
    for name, most in peaks.items():
        rows.append(row(f"{name}: peak memory of a step against PyTorch", most / 1e6, "MB", steps[-1][2] / 1e6))
    for name, times in ours.items():
        rows.append(row(f"{name}: seconds a step against PyTorch (target ratio 2)", median(times), "s", step))
    return rows


if __name__ == "__main__":
    main()
