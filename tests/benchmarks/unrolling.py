"""Time of unrolling, against plain training, `higher` and TorchOpt: ratios of one run.

The models of ``memory.py``, T inner steps and one hypergradient. All methods take turns in one
process, in random order; what is printed are medians over the median of plain training. This
library goes on from window to window, as in a training run, so that its first window, with the
verification of a step and the first use of its buffers, is not counted.

    python tests/benchmarks/unrolling.py [--steps 5 20 80] [--rounds 7] [--model transformer]
"""

import argparse
import random
import statistics
import time
from functools import partial

import memory
import torch

OURS = (
    "unrolled",
    "unrolled(checkpoint_every=9)",
    "unrolled(keep_graph=True)",
)
PEERS = ("higher", "torchopt")


def compare(kind, steps, rounds, methods):
    """Median seconds of every method."""
    runs = {
        method: memory.window(kind, steps, method)
        if method in OURS
        else partial(memory.run, method, kind, steps)
        for method in methods
    }
    seconds = {method: [] for method in runs}
    order = list(runs)
    shuffle = random.Random(0).shuffle  # the global generator stands still
    for round_ in range(rounds + 1):
        shuffle(order)
        for method in order:
            began = time.perf_counter()
            runs[method]()
            if round_:
                seconds[method].append(time.perf_counter() - began)
    return {method: statistics.median(found) for method, found in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 80])
    parser.add_argument("--kinds", nargs="+", default=["SGD", "Adam"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", choices=memory.KINDS, default="mlp")
    args = parser.parse_args()
    memory.MODEL = args.model
    methods = ["plain", *OURS, *PEERS]
    for method in methods:
        memory.use(method)
    print(f"torch {torch.__version__}, {args.model}, {args.rounds} rounds; x plain")
    header = "".join(f"{m:>30s}" for m in methods[1:])
    print(f"{'':5s}{'T':>4s}{'plain ms':>10s}{header}")
    for kind in args.kinds:
        for steps in args.steps:
            found = compare(kind, steps, args.rounds, methods)
            cells = "".join(f"{found[m] / found['plain']:30.2f}" for m in methods[1:])
            print(f"{kind:5s}{steps:4d}{1e3 * found['plain']:10.1f}{cells}", flush=True)


if __name__ == "__main__":
    main()
