"""
Layers and programs defined by an equation
==========================================

The output of a deep-equilibrium layer is the z that its map sends to itself,

    z = tanh(W z + U x + b),

whatever found it: here Anderson's iteration, of which nothing is recorded. One line,
``tb.func.implicit_fixed_point``, makes it differentiable in the input and the parameters; it is
trained to read digits and compared with z = tanh(U x + b), the explicit layer.

The second equation is solved by SciPy. Masses hang on a chain of springs between two hooks; the
stiffnesses of the springs are learned from the equilibria under a few loads, through
``scipy.optimize.minimize``, and tested under loads that were not seen. The gradient is compared
with finite differences of the whole program.

    python examples/implicit_layer.py [--width 64] [--epochs 20] [--springs 8] [--output DIR]
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NOISE = 1e-3  # of the measured positions, where the hooks are 1 apart


class Problem(Exception):
    """Bad input: one line for the user, exit code 2."""


# --- a layer ----------------------------------------------------------------------------------


def anderson(step, z, memory=5, max_steps=100, rtol=1e-5):
    """A fixed point of ``step``, every row on its own; and the steps it took.

    The next iterate is the combination of the last images, with weights that sum to one, whose
    residual would be the smallest if ``step`` were affine (Anderson 1965).
    """
    iterates, images = [], []
    while True:
        iterates, images = [*iterates, z], [*images, step(z)]
        Z, T = (torch.stack(each[-memory:], 1) for each in (iterates, images))
        R = T - Z
        if R[:, -1].norm() <= rtol * T[:, -1].norm() or len(images) == max_steps:
            return images[-1], len(images)
        # weights ∝ (R Rᵀ)⁻¹ 1, with a little of the identity against rounding
        gram = R @ R.mT
        size = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)[:, None, None]
        gram = gram / size + 1e-6 * torch.eye(R.shape[1])
        weights = torch.linalg.solve(gram, torch.ones(len(z), R.shape[1]))
        weights = weights / weights.sum(1, keepdim=True)
        z = torch.einsum("nm,nmd->nd", weights, T)


class Equilibrium(nn.Module):
    """z = tanh(W z + U x + b), with max_i Σ_j |W_ij| < 1 so that there is one such z."""

    def __init__(self, inputs, width):
        super().__init__()
        self.input = nn.Linear(inputs, width)
        self.recurrent = nn.Parameter(torch.randn(width, width) / width)
        self.steps = []  # of Anderson's iteration in each call

    def map(self, z, x):
        """One application, T(z, x)."""
        rows = self.recurrent.abs().sum(1, keepdim=True)
        W = 0.95 * self.recurrent / rows.clamp(min=1)
        return torch.tanh(z @ W.mT + self.input(x))

    def iterate(self, z, x):
        """Any program; it sees plain tensors, and nothing of it is recorded."""
        with torch.no_grad():
            z, steps = anderson(lambda z: self.map(z, x), z)
        self.steps.append(steps)
        return z

    def forward(self, x):
        """The fixed point."""
        # made here, not in __init__: a copy of the module then solves with its own parameters
        implicit = tb.func.implicit_fixed_point(
            self.map, solver="gmres(max_steps=40, rtol=1e-4)", parameters=self
        )
        return implicit(self.iterate)(x.new_zeros(len(x), len(self.recurrent)), x)


def digits(seed):
    """Images and labels for training (1,000) and test (797)."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    y = torch.tensor(labels)[order]
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def train(model, data, args, name):
    """An ordinary training loop."""
    x, y = data
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in tqdm(range(args.epochs), desc=name):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()


def against_many_steps(layer, x, steps=200):
    """The layer's gradients against those through many recorded steps, in float64."""
    layer, x = layer.double(), x.double()
    weights = torch.linspace(-1, 1, len(layer.recurrent), dtype=x.dtype)
    exact = tb.func.implicit_fixed_point(
        layer.map, solver="gmres(max_steps=100, rtol=1e-10)", parameters=layer
    )

    def iterated(z, x):
        for _ in range(steps):
            z = layer.map(z, x)
        return z

    gradients, start = [], x.new_zeros(len(x), len(weights))
    for function in (exact(iterated), iterated):
        loss = (function(start, x) @ weights).square().mean()
        found = torch.autograd.grad(loss, list(layer.parameters()))
        gradients.append(torch.cat([g.flatten() for g in found]))
    layer.float()
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def layers(args):
    """Train both networks: {name: test accuracy}."""
    data, (x_test, y_test) = digits(args.seed)
    accuracies = {}
    for name in ("explicit", "equilibrium"):
        torch.manual_seed(args.seed)
        explicit = nn.Sequential(nn.Linear(64, args.width), nn.Tanh())
        layer = explicit if name == "explicit" else Equilibrium(64, args.width)
        model = nn.Sequential(layer, nn.Linear(args.width, 10))
        train(model, data, args, name)
        with torch.no_grad():
            correct = (model(x_test).argmax(1) == y_test).float().mean()
        accuracies[name] = 100 * correct.item()
        count = sum(p.numel() for p in model.parameters())
        print(f"{name:12s} test accuracy {accuracies[name]:.1f} %, {count} parameters")
    steps = layer.steps
    print(
        f"    Anderson's steps: {steps[0]} at the first batch, {steps[-1]} at the last; gradient "
        f"against 200 recorded steps: {against_many_steps(layer, x_test[:20]):.1e} relative"
    )
    return accuracies


# --- a program of SciPy -----------------------------------------------------------------------


def energy(position, log_stiffness, loads):
    """Of springs between hooks at (0, 0) and (1, 0), and the masses between them.

    Shapes: ``position`` (n, 2), ``log_stiffness`` (n + 1,), ``loads`` (n,).
    """
    hooks = position.new_tensor([[0.0, 0.0], [1.0, 0.0]])
    points = torch.cat([hooks[:1], position, hooks[1:]])
    lengths = points.diff(dim=0).norm(dim=1)
    stretched = lengths - 0.8 / len(lengths)  # in rest, 4/5 of the way in all
    return (log_stiffness.exp() * stretched**2).sum() / 2 + loads @ position[:, 1]


# ∂_y F is the Hessian of the energy, small enough to be formed
@tb.func.implicit_root(torch.func.grad(energy), solver="direct")
def at_rest(start, log_stiffness, loads):
    """The equilibrium, by SciPy's trust-region method with exact derivatives."""

    def flat(function):
        def of_numbers(numbers):
            position = torch.from_numpy(numbers).view_as(start)
            return function(position, log_stiffness, loads).detach()

        return of_numbers

    size, force = start.numel(), torch.func.grad(energy)
    found = minimize(
        lambda y: float(flat(energy)(y)),  # SciPy 1.18 wants a number
        start.flatten().numpy(),
        jac=lambda y: flat(force)(y).flatten().numpy(),
        hess=lambda y: flat(torch.func.jacrev(force))(y).reshape(size, size).numpy(),
        method="trust-exact",
        options={"gtol": 1e-9},
    )
    force_left = abs(found.jac).max()  # SciPy calls the end of rounding a failure too
    if not force_left < 1e-6:
        raise Problem(
            f"no equilibrium, a force of {force_left:.0e} left: {found.message}"
        )
    return found.x.reshape(start.shape)


def straight_chain(masses):
    """Masses in a row, a little below the hooks."""
    across = torch.linspace(0, 1, masses + 2, dtype=torch.float64)[1:-1]
    return torch.stack([across, torch.full_like(across, -0.1)], 1)


def finite_difference(function, x, step=1e-5):
    """∇ by central differences, one coordinate at a time."""
    gradient = torch.zeros_like(x)
    for i in range(len(x)):
        shift = torch.zeros_like(x).index_fill(0, torch.tensor(i), step)
        gradient[i] = (function(x + shift) - function(x - shift)) / (2 * step)
    return gradient


def springs(args):
    """Learn stiffnesses from equilibria: (true, learned, seen shapes, gradient error)."""
    generator = torch.Generator().manual_seed(args.seed)
    draw = {"generator": generator, "dtype": torch.float64}
    masses = args.springs - 1
    true = math.log(20 * args.springs) + 0.5 * torch.randn(args.springs, **draw)
    loads = (0.5 + torch.rand(4 + 4, masses, **draw)) * 10 / masses
    # SciPy solves for one load after the other; the derivatives are those of all of them at once
    shapes_of = torch.func.vmap(at_rest, in_dims=(0, None, 0))
    straight = straight_chain(masses).expand(len(loads), masses, 2)
    shapes = shapes_of(straight, true, loads)
    measured = shapes[:4] + NOISE * torch.randn(shapes[:4].shape, **draw)
    x = torch.full_like(true, math.log(20 * args.springs))
    first = x.clone()

    def misfit(x, starts):
        found = shapes_of(starts, x, loads[:4])
        return (found - measured).square().mean() / NOISE**2, found

    gradient_of = torch.func.grad_and_value(misfit, has_aux=True)
    gradient, (_, starts) = gradient_of(x, straight[:4])
    expected = finite_difference(lambda x: misfit(x, starts)[0], x)
    error = float((gradient - expected).norm() / expected.norm())
    # the outer problem is small and smooth: quasi-Newton steps
    options = {"max_iter": args.iterations, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([x], **options)
    history = []

    def closure():
        nonlocal starts  # a solve begins where the last one ended
        x.grad, (loss, starts) = gradient_of(x, starts)
        history.append(float(loss))
        return loss

    optimizer.step(closure)
    print(f"springs      gradient against finite differences: {error:.1e} relative")
    for name, stiffness in (("all equal", first), ("learned", x)):
        away = (shapes_of(straight, stiffness, loads) - shapes)[4:]
        away = away.square().sum(-1).mean().sqrt()
        wrong = (stiffness - true).abs().mean()
        print(
            f"    {name:10s} stiffnesses off by {wrong:.3f} (mean |log ratio|), positions under "
            f"unseen loads by {away:.1e}"
        )
    print(
        f"    misfit {history[0]:.1f} → {history[-1]:.2f} in {len(history)} evaluations "
        "(1 is the noise of the measurements)"
    )
    return true, x, history, error


def parse_arguments(arguments):
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Layers defined by an equation")
    parser.add_argument("--width", type=int, default=64, help="of the layers")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--springs", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=20, help="of L-BFGS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the figure")
    args = parser.parse_args(arguments)
    for name in ("width", "epochs", "iterations"):
        if getattr(args, name) < 1:
            raise Problem(f"--{name} must be at least 1")
    if args.springs < 2:
        raise Problem("--springs must be at least 2, with a mass between them")
    return args


def main(arguments=None):
    """Both equations; returns the figures."""
    args = parse_arguments(arguments)
    accuracies = layers(args)
    true, learned, history, error = springs(args)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    places = range(1, len(true) + 1)
    left.plot(places, true.exp(), "o-", label="true")
    left.plot(places, learned.exp(), "x--", label="learned")
    left.set(xlabel="spring", ylabel="stiffness", title="springs, through SciPy")
    left.legend()
    right.plot(range(1, len(history) + 1), history)
    right.axhline(1, color="tab:gray", linestyle=":", label="noise")
    right.set(xlabel="evaluation", ylabel="misfit", yscale="log", title="learning")
    right.legend()
    figure.tight_layout()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output / "implicit_layer.png", dpi=120)
    return {**accuracies, "gradient error": error, "misfit": history[-1]}


if __name__ == "__main__":
    try:
        main()
    except (Problem, tb.BilevelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
