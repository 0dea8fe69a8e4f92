"""Tune a simulator that is a program: candidate -> command line -> output -> value, several at a time, with a timeout.

    python examples/simulator.py

The simulator here is a few lines of Python: a cart is brought to rest at 1 by a controller with two gains and a mode.
Settings that make it unstable end with an error, and one kind of controller hangs: both have no value (NaN), and the
search goes on.
"""

import argparse
import sys
import time


def simulate(gain: float, damping: float, mode: str) -> float:
    """The mean squared distance from 1 over five seconds, and a little for the force."""
    x = v = cost = 0.0
    if mode == "broken":
        time.sleep(3600)
    for _ in range(500):
        force = gain * (1.0 - x) - damping * v
        force = max(-8.0, min(8.0, force)) if mode == "clipped" else force
        v += 0.01 * force
        x += 0.01 * v
        cost += 0.01 * ((1.0 - x) ** 2 + 1e-4 * force**2)
        if abs(x) > 100.0:
            sys.exit("unstable")
    return cost


def main(evaluations: int) -> None:
    from evoopt import minimize  # here, because this file is the simulator too, which starts without it
    from evoopt.distributed import ThreadEvaluator
    from evoopt.envs.command import command
    from evoopt.spaces import categorical, real
    from evoopt.strategies import cma_es

    space = {
        "gain": real(0.1, 100.0, log=True),
        "damping": real(0.0, 20.0),
        "mode": categorical(["plain", "clipped", "broken"]),
    }
    line = [sys.executable, __file__, "--gain", "{gain}", "--damping", "{damping}", "--mode", "{mode}"]
    f = command(line, timeout=2.0)
    with ThreadEvaluator(2) as evaluator:  # threads are enough: they wait for the program
        result = minimize(f, space, cma_es(8), evaluations=evaluations, jit=False, evaluator=evaluator, progress=True)
    print(result)
    print(result.best)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=80)
    parser.add_argument("--gain", type=float, help="run the simulator once")
    parser.add_argument("--damping", type=float)
    parser.add_argument("--mode")
    given = parser.parse_args()
    if given.gain is None:
        main(given.evaluations)
    else:
        print("cost", simulate(given.gain, given.damping, given.mode))
