"""Peak memory of unrolling, against plain training, `higher` and TorchOpt.

A 330 k-parameter MLP at batch 512, or a transformer of two layers, T inner steps and one
hypergradient. Every measurement is a process of its own: the growth of its peak resident set since
its imports. The bar of the replay is 1.3 × plain training plus the stored iterates (parameters and
optimizer state); with ``checkpoint_every``, plain training plus 20 iterates. ``unrolling.py``
measures the time of the same.

    python tests/benchmarks/memory.py [--steps 5 20 80] [--peers] [--model transformer]
"""

import argparse
import importlib
import resource
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SIZES, BATCH = (784, 300, 300, 10), 512
TOKENS, WIDTH, SEQUENCES = 32, 64, 64
KINDS = ("mlp", "transformer")


tb = higher = torchopt = None  # imported by the process that needs it


class Transformer(nn.Module):
    """Two encoder layers, the mean over tokens, a linear head."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True
        )
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        return self.head(self.body(x).mean(1))


MODEL = "mlp"


def model():
    torch.manual_seed(0)
    if MODEL == "transformer":
        return Transformer()
    layers = []
    for a, b in zip(SIZES, SIZES[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def data():
    g = torch.Generator().manual_seed(1)
    if MODEL == "transformer":
        x = torch.randn(SEQUENCES, TOKENS, WIDTH, generator=g)
        return x, torch.randint(0, 10, (SEQUENCES,), generator=g)
    return torch.randn(BATCH, SIZES[0], generator=g), torch.randint(
        0, 10, (BATCH,), generator=g
    )


def optimizer_of(kind, parameters):
    options = {"momentum": 0.9} if kind == "SGD" else {}
    return getattr(torch.optim, kind)(parameters, lr=1e-3, **options)


def plain(kind, steps):
    net, (x, y) = model(), data()
    optimizer = optimizer_of(kind, net.parameters())
    weights = torch.zeros(len(x))
    for _ in range(steps):
        optimizer.zero_grad()
        losses = F.cross_entropy(net(x), y, reduction="none")
        (weights.sigmoid() * losses).mean().backward()
        optimizer.step()


def ours(kind, steps, estimator):
    window(kind, steps, estimator)()


def window(kind, steps, estimator):
    """A function that takes some inner steps and one hypergradient, again and again."""
    net, (x, y) = model(), data()
    weights = torch.zeros(len(x), requires_grad=True)
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

    def run():
        for _ in range(steps):
            optimizer.zero_grad()
            train_loss(x, y).backward()
            optimizer.step()
        optimizer.hypergradient(x, y)
        optimizer.outer.step()  # the next window begins

    return run


def higher_unrolled(kind, steps):
    net, (x, y) = model(), data()
    weights = torch.zeros(len(x), requires_grad=True)
    optimizer = optimizer_of(kind, net.parameters())
    with higher.innerloop_ctx(net, optimizer) as (fnet, diffopt):
        for _ in range(steps):
            losses = F.cross_entropy(fnet(x), y, reduction="none")
            diffopt.step((weights.sigmoid() * losses).mean())
        F.cross_entropy(fnet(x), y).backward()


def torchopt_unrolled(kind, steps):
    net, (x, y) = model(), data()
    weights = torch.zeros(len(x), requires_grad=True)
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
    command = [sys.executable, __file__, "--model", MODEL]
    command += ["--one", method, kind, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None


def one(method, kind, steps):
    use(method)
    baseline = peak()
    run(method, kind, steps)
    print(peak() - baseline)


def use(method):
    """Import what a method needs, and what the first optimizer of a process would."""
    importlib.import_module("torch._dynamo")
    package = {"plain": "torch", "higher": "higher", "torchopt": "torchopt"}
    name = package.get(method, "torch_bilevel")
    globals()[{"torch_bilevel": "tb"}.get(name, name)] = importlib.import_module(name)


def run(method, kind, steps):
    """Some inner steps and one hypergradient, from scratch."""
    if method == "plain":
        plain(kind, steps)
    elif method in ("higher", "torchopt"):
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
            globals()[f"{method}_unrolled"](kind, steps)
    else:
        ours(kind, steps, method)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 80])
    parser.add_argument("--peers", action="store_true", help="also higher and TorchOpt")
    parser.add_argument("--model", choices=KINDS, default="mlp")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    globals()["MODEL"] = args.model
    if args.one:
        return one(args.one[0], args.one[1], int(args.one[2]))
    numbers = sum(p.numel() for p in model().parameters())
    mib = numbers * 4 / 2**20
    print(f"torch {torch.__version__}, {numbers:,} parameters; MiB")
    methods = ["plain", "cg", "unrolled", "unrolled(checkpoint_every=9)"]
    methods += ["unrolled(checkpoint_every=20)", "unrolled(keep_graph=True)"]
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
            print(f"{steps:4d}{cells}{bars[0]:11.0f}{bars[1]:11.0f}", flush=True)


if __name__ == "__main__":
    main()
