"""Peak memory of unrolling, against plain training, `higher` and TorchOpt.

A 330 k-parameter MLP at batch 512, T inner steps and one hypergradient. Every measurement is a
process of its own: the growth of its peak resident set since its imports. The bar of
the replay is 1.3 × plain training plus the stored iterates (parameters and optimizer state); with
``checkpoint_every``, plain training plus 20 iterates.

    python tests/benchmarks/memory.py [--steps 5 20 80] [--peers]
"""

import argparse
import importlib
import resource
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import nn

SIZES, BATCH = (784, 300, 300, 10), 512


tb = higher = torchopt = None  # imported by the process that needs it


def model():
    torch.manual_seed(0)
    layers = []
    for a, b in zip(SIZES, SIZES[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, SIZES[0], generator=g), torch.randint(
        0, 10, (BATCH,), generator=g
    )


def optimizer_of(kind, parameters):
    options = {"momentum": 0.9} if kind == "SGD" else {}
    return getattr(torch.optim, kind)(parameters, lr=1e-3, **options)


def plain(kind, steps):
    net, (x, y) = model(), data()
    optimizer = optimizer_of(kind, net.parameters())
    weights = torch.zeros(BATCH)
    for _ in range(steps):
        optimizer.zero_grad()
        losses = F.cross_entropy(net(x), y, reduction="none")
        (weights.sigmoid() * losses).mean().backward()
        optimizer.step()


def ours(kind, steps, estimator):
    net, (x, y) = model(), data()
    weights = torch.zeros(BATCH, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        optimizer_of(kind, net.parameters()),
        torch.optim.SGD([weights], lr=0.1),
        modules=net,
        estimator=estimator,
    )

    @optimizer.inner_loss
    def train_loss(x, y):
        return (weights.sigmoid() * F.cross_entropy(net(x), y, reduction="none")).mean()

    @optimizer.outer_loss
    def valid_loss(x, y):
        return F.cross_entropy(net(x), y)

    for _ in range(steps):
        optimizer.zero_grad()
        train_loss(x, y).backward()
        optimizer.step()
    optimizer.hypergradient(x, y)


def higher_unrolled(kind, steps):
    net, (x, y) = model(), data()
    weights = torch.zeros(BATCH, requires_grad=True)
    optimizer = optimizer_of(kind, net.parameters())
    with higher.innerloop_ctx(net, optimizer) as (fnet, diffopt):
        for _ in range(steps):
            losses = F.cross_entropy(fnet(x), y, reduction="none")
            diffopt.step((weights.sigmoid() * losses).mean())
        F.cross_entropy(fnet(x), y).backward()


def torchopt_unrolled(kind, steps):
    net, (x, y) = model(), data()
    weights = torch.zeros(BATCH, requires_grad=True)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torchopt, f"Meta{kind}")(net, lr=1e-3, **options)
    for _ in range(steps):
        losses = F.cross_entropy(net(x), y, reduction="none")
        optimizer.step((weights.sigmoid() * losses).mean())
    F.cross_entropy(net(x), y).backward()


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux


def measure(method, kind, steps):
    """Run one configuration in a process of its own; MiB of peak growth, or None."""
    command = [sys.executable, __file__, "--one", method, kind, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None


def one(method, kind, steps):
    package = {"plain": "torch", "higher": "higher", "torchopt": "torchopt"}
    name = package.get(method, "torch_bilevel")
    globals()[{"torch_bilevel": "tb"}.get(name, name)] = importlib.import_module(name)
    baseline = peak()
    if method == "plain":
        plain(kind, steps)
    elif method in ("higher", "torchopt"):
        globals()[f"{method}_unrolled"](kind, steps)
    else:
        ours(kind, steps, method)
    print(peak() - baseline)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 80])
    parser.add_argument("--peers", action="store_true", help="also higher and TorchOpt")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(args.one[0], args.one[1], int(args.one[2]))
    numbers = sum(p.numel() for p in model().parameters())
    mib = numbers * 4 / 2**20
    print(f"torch {torch.__version__}, {numbers:,} parameters, batch {BATCH}; MiB")
    methods = ["plain", "cg", "unrolled", "unrolled(checkpoint_every=9)"]
    methods += ["higher", "torchopt"] if args.peers else []
    for kind, vectors in (("SGD", 2), ("Adam", 3)):
        print(f"\n{kind}: an iterate is {vectors * mib:.1f} MiB")
        print(f"{'T':>4s}" + "".join(f"{m:>30s}" for m in methods) + f"{'bars':>22s}")
        for steps in args.steps:
            found = {method: measure(method, kind, steps) for method in methods}
            bars = (
                1.3 * found["plain"] + steps * vectors * mib,
                found["plain"] + 20 * vectors * mib,
            )
            cells = "".join(
                f"{'-' if v is None else format(v, '.0f'):>30s}" for v in found.values()
            )
            print(f"{steps:4d}{cells}{bars[0]:11.0f}{bars[1]:11.0f}")


if __name__ == "__main__":
    main()
