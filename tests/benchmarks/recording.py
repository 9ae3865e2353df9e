"""What recording costs an implicit user's loop, per inner step.

The same loop runs plain and wrapped, steps interleaved in random order in one process; medians of
paired differences. Bars: 60 µs a step, and 3 % where a step takes 3 ms or more.

The column "bare" is the least that a recorder written in Python can do: hooks, the arguments, a
glance at the random generators, outer variables constant; no check, no record, nothing else.

    python tests/benchmarks/recording.py [--rounds 400]
"""

import argparse
import random
import statistics
import time
from collections import OrderedDict, deque
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Variable

import torch_bilevel as tb
from torch_bilevel.problem.randomness import capture

CASES = {
    # name: (layers, batch)
    "softmax 784-10, batch 64": ([784, 10], 64),
    "MLP 784-300-10, batch 64": ([784, 300, 10], 64),
    "MLP 784-300-10, batch 512": ([784, 300, 10], 512),
    "MLP 784-400-10, batch 1024": ([784, 400, 10], 1024),
    "MLP 784-400-400-400-10, batch 512": ([784, 400, 400, 400, 10], 512),
}


def network(sizes):
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def bare_recorder(loss, weights, parameters):
    """Hooks around a loss that keep what a hypergradient needs, as short as can be."""
    kept = deque(maxlen=20)

    def constant(flag):
        weights.requires_grad = not flag

    def on_backward(call, weight):
        constant(True)
        Variable._execution_engine.queue_callback(lambda: constant(False))
        kept.append((call, weight.item()))

    def call(*args):
        versions = [(value, value._version) for value in args]
        state = versions, capture(), all(p.requires_grad for p in parameters)
        constant(True)
        value = loss(*args)
        constant(False)
        value.register_hook(partial(on_backward, state))
        return value

    return call


def make(sizes, batch):
    """A plain, a recorded and a bare training step on the same model, optimizer and batch.

    The same tensors, because where a model happens to lie in memory moves a step of several
    milliseconds by more than recording does.
    """
    torch.manual_seed(0)
    model = network(sizes)
    sgd = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    weights = torch.zeros(batch, requires_grad=True)
    x, y = torch.randn(batch, sizes[0]), torch.randint(0, 10, (batch,))
    constant = weights.detach()

    def weighted(x, y, weights):
        return (
            weights.sigmoid() * F.cross_entropy(model(x), y, reduction="none")
        ).mean()

    # the window is a ring, so that a long benchmark holds a few calls only
    optimizer = tb.BilevelOptimizer(
        sgd,
        torch.optim.SGD([weights], lr=0.1),
        modules=model,
        estimator="cg(cross_calls=20)",
    )
    train_loss = optimizer.inner_loss(lambda x, y: weighted(x, y, weights))
    hooks = sgd._optimizer_step_pre_hooks, sgd._optimizer_step_post_hooks
    nothing = OrderedDict({0: lambda *_: None})
    bare_loss = bare_recorder(
        lambda x, y: weighted(x, y, weights), weights, list(model.parameters())
    )

    def recorded():
        sgd._optimizer_step_pre_hooks, sgd._optimizer_step_post_hooks = hooks
        began = time.perf_counter()
        optimizer.zero_grad()
        train_loss(x, y).backward()
        optimizer.step()
        return time.perf_counter() - began

    def plain():
        sgd._optimizer_step_pre_hooks = sgd._optimizer_step_post_hooks = OrderedDict()
        began = time.perf_counter()
        sgd.zero_grad()
        weighted(x, y, constant).backward()
        sgd.step()
        return time.perf_counter() - began

    def bare():
        sgd._optimizer_step_pre_hooks = sgd._optimizer_step_post_hooks = nothing
        began = time.perf_counter()
        sgd.zero_grad()
        bare_loss(x, y).backward()
        sgd.step()
        return time.perf_counter() - began

    return plain, recorded, bare


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    print(
        f"{'case':36s} {'plain ms':>9s} {'recorded ms':>12s} {'added µs':>9s} {'ratio':>6s} "
        f"{'bare µs':>8s}"
    )
    for name, (sizes, batch) in CASES.items():
        steps = make(sizes, batch)
        for _ in range(20):
            for step in steps:
                step()
        rounds, shuffle = [], random.Random(0)  # the global generator stands still
        for _ in range(args.rounds):
            order = shuffle.sample(steps, 3)
            took = {step: step() for step in order}
            rounds.append([took[step] for step in steps])
        plain_s, recorded_s, _ = map(statistics.median, zip(*rounds, strict=True))
        added = statistics.median(b - a for a, b, _ in rounds)
        bare = statistics.median(c - a for a, _, c in rounds)
        print(
            f"{name:36s} {plain_s * 1e3:9.3f} {recorded_s * 1e3:12.3f} {added * 1e6:9.1f} "
            f"{1 + added / plain_s:6.3f} {bare * 1e6:8.1f}"
        )


if __name__ == "__main__":
    main()
