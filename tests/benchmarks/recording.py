"""What recording costs an implicit user's loop, per inner step.

The same loop runs plain and wrapped, steps interleaved in random order in one process; medians of
paired differences. Bars: 60 µs a step, and 3 % where a step takes 3 ms or more.

    python tests/benchmarks/recording.py [--rounds 400]
"""

import argparse
import statistics
import time
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

import torch_bilevel as tb

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


def make(sizes, batch):
    """A plain and a recorded training step on the same model, optimizer and batch.

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

    return plain, recorded


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=400)
    args = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    print(
        f"{'case':36s} {'plain ms':>9s} {'recorded ms':>12s} {'added µs':>9s} {'ratio':>6s}"
    )
    for name, (sizes, batch) in CASES.items():
        plain, recorded = make(sizes, batch)
        for _ in range(20):
            plain(), recorded()
        pairs = []
        for k in range(args.rounds):
            if k % 2:
                a, b = plain(), recorded()
            else:
                b, a = recorded(), plain()
            pairs.append((a, b))
        plain_s = statistics.median(a for a, _ in pairs)
        recorded_s = statistics.median(b for _, b in pairs)
        added = statistics.median(b - a for a, b in pairs)
        print(
            f"{name:36s} {plain_s * 1e3:9.3f} {recorded_s * 1e3:12.3f} {added * 1e6:9.1f} "
            f"{1 + added / plain_s:6.3f}"
        )


if __name__ == "__main__":
    main()
