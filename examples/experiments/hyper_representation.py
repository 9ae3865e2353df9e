"""Learned representations: PZOBO against AID, ITD and the direct gradient alone.

The inner variables are a last layer, the outer variables all that comes before it; the inner loss
is that of training data, the outer loss that of validation data.

- linear: ½ mean (X H w − y)² with X ~ N(0, 1) of 500 × 64, H of 64 × 128, T = 20 steps from w = 0
  in every outer step, Adam at 0.05, μ = 0.01, as in Sow, Ji & Liang 2022. The published learning
  rate, 0.001, suits the mean (not the sum). y has unit variance before noise of 0.1, and w a
  penalty of 0.001, for H has more columns than rows.
- LeNet: cross-entropy on MNIST, T = 10 steps on batches of 256 that go on from the last w, Adam at
  0.001, μ = 0.01. The inner learning rate, 0.1, is ours. On digits a smaller net takes its place,
  with Adam at 0.005.

Both losses depend on x directly, and `first_order` has that part of the gradient only. Directions
of PZOBO are Gaussian; those of its released code have unit norm in every tensor, which shrinks the
indirect part by the number of its entries: the rows "unit directions".

Features that grow raise the curvature of the inner loss, past 2/learning rate if nothing stops
them. Gradients of the steps taken (`unrolled`, `pzobo`) see inner steps that begin to diverge; the
direct gradient does not, and neither does that of the minimum. So it goes on the linear problem
with `first_order`, and went with AID on LeNet until the features ended in tanh, which bounds them.
Evaluations are those of the inner loss, by training and estimator together. Seconds are those of
the processor.
"""

import functools
import time

import matplotlib
import torch
import torch.nn.functional as F
from data import data_cleaning, digits, mnist, need
from rows import nested
from torch import nn
from tqdm import tqdm

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "hyper_representation"
FIXED = "features fixed"
UNIT = "pzobo, unit directions"
METHODS = [
    FIXED,
    "first_order",
    "aid_fp",
    "aid_cg",
    "unrolled",
    "pzobo(directions=1)",
    "pzobo(directions=10)",
    UNIT,
]
QUICK = [FIXED, "aid_cg", "pzobo(directions=1)"]
TOO_SLOW = "aid_fp", "pzobo(directions=10)"  # on MNIST


def configurations(args):
    if args.data:
        need(args.data, "mnist", "train-images-idx3-ubyte.gz")
    net = "LeNet, mnist" if args.data else "small net, digits"
    methods = QUICK if args.quick else METHODS
    return [
        {
            "problem": problem,
            "method": method,
            "outer_steps": 12 if args.quick else 100 if problem == "linear" else 200,
        }
        for problem in ("linear", net)
        for method in methods
        if not (problem == "LeNet, mnist" and method in TOO_SLOW)
    ]


class UnitDirections(tb.ResponseJacobian):
    """One direction, of unit norm in every outer tensor, as in the authors' code."""

    def basis(self, layout, number):
        """The Gaussian ones, normalised."""
        for u in super().basis(layout, number):
            yield torch.cat([part / part.norm() for part in u.split(layout.sizes)])


class Linear:
    """½ mean (X H w − y)², from w = 0 in every outer step."""

    inner_steps, inner_lr, outer_lr, every = 20, 0.001, 0.05, 1

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        draw = functools.partial(torch.randn, generator=generator)
        true = draw(64, 128) @ draw(128) / (64 * 128) ** 0.5
        self.parts = []
        for _ in range(2):
            x = draw(500, 64)
            self.parts.append((x, x @ true + 0.1 * draw(500)))
        self.H = draw(64, 128).requires_grad_()
        self.w = torch.zeros(128, requires_grad=True)
        self.inner, self.outer, self.modules = [self.w], [self.H], None

    def begin(self):
        """The inner loop starts over."""
        with torch.no_grad():
            self.w.zero_()

    def batch(self, part):
        """All of the training (0) or validation (1) data."""
        return self.parts[part]

    def loss(self, x, y):
        """Of the predictions (X H) w."""
        return (x @ (self.H @ self.w) - y).square().mean() / 2

    def penalty(self):
        """½ · 0.001 ‖w‖²."""
        return 0.001 * self.w.square().sum() / 2

    def measures(self):
        """The outer loss at the end of the inner loop."""
        return {"valid_loss": self.loss(*self.parts[1]).item(), "test_accuracy": ""}


@functools.cache
def images(folder):
    """Training, validation and test images as squares."""
    parts = mnist(folder) if folder else digits()
    side = 28 if folder else 8
    return [(x[:, :-1].reshape(-1, 1, side, side), y) for x, y in parts]


def network(large):
    """LeNet-5, or one for 8 × 8 pixels; the last layer apart."""
    if not large:
        features = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(64, 32), nn.Tanh()),
        )
        return features, nn.Linear(32, 10)
    features = nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.Tanh()),
    )
    return features, nn.Linear(84, 10)


class Images:
    """Cross-entropy of a convolutional net whose last layer goes on from where it is."""

    inner_steps, inner_lr, every = 10, 0.1, 20

    def __init__(self, seed, folder):
        self.outer_lr = 1e-3 if folder else 5e-3
        torch.manual_seed(seed)
        self.features, self.head = network(folder)
        train, valid, self.test = images(folder)
        self.valid = valid
        self.data = [tb.Batches(part, 256, seed) for part in (train, valid)]
        self.inner = list(self.head.parameters())
        self.outer = list(self.features.parameters())
        self.modules = [self.features, self.head]

    def begin(self):
        """Nothing: the last layer is kept."""

    def batch(self, part):
        """A batch of training (0) or validation (1) images."""
        (batch,) = self.data[part].draw()
        return batch

    def predict(self, x):
        """Logits."""
        return self.head(self.features(x))

    def loss(self, x, y):
        """Cross-entropy."""
        return F.cross_entropy(self.predict(x), y)

    def penalty(self):
        """½ · 0.001 ‖w‖²."""
        return 0.001 * sum(p.square().sum() for p in self.inner) / 2

    def measures(self):
        """On all validation and test images."""
        return {
            "valid_loss": self.loss(*self.valid).item(),
            "test_accuracy": data_cleaning.accuracy(self.predict, *self.test),
        }


def estimator(method):
    """What a row's method stands for."""
    if method == UNIT:
        return UnitDirections(directions=1)
    # J v of the last batch: an average over the window costs T evaluations more
    return f"{method}(cross_calls=1)" if method.startswith("aid") else method


def measure(configuration, args):
    method, seed = configuration["method"], configuration["seed"]
    linear = configuration["problem"] == "linear"
    problem = Linear(seed) if linear else Images(seed, args.data)
    learns, evaluations = method != FIXED, 0

    def train_loss(x, y):
        nonlocal evaluations
        evaluations += 1
        return problem.loss(x, y) + problem.penalty()

    optimizer = torch.optim.SGD(problem.inner, lr=problem.inner_lr)
    if learns:
        optimizer = tb.BilevelOptimizer(
            inner=optimizer,
            outer=torch.optim.Adam(problem.outer, lr=problem.outer_lr),
            modules=problem.modules,
            estimator=estimator(method),
        )
        train_loss = optimizer.inner_loss(train_loss)
        optimizer.outer_loss(problem.loss)
    else:
        for parameter in problem.outer:
            parameter.requires_grad_(False)
    seconds, products, rows = 0.0, 0, []
    outer_steps = configuration["outer_steps"]
    for step in tqdm(range(outer_steps + 1), leave=False, desc=method):
        began = time.process_time()
        problem.begin()
        for _ in range(problem.inner_steps):
            optimizer.zero_grad()
            train_loss(*problem.batch(0)).backward(inputs=problem.inner)
            optimizer.step()
        seconds += time.process_time() - began
        if step % problem.every == 0 or step == outer_steps:
            row = {"outer_step": step, "seconds": round(seconds, 4)}
            row |= {"evaluations": evaluations, "products": products}
            with torch.no_grad():
                rows.append(row | problem.measures())
        began = time.process_time()
        if learns and step < outer_steps:
            products += optimizer.outer_step(*problem.batch(1)).products
        seconds += time.process_time() - began
    return rows


def curves(rows):
    """Problem → method → its rows."""
    return nested(rows, "problem", "method")


def table(rows):
    """After the last outer step."""
    result = []
    for problem, methods in curves(rows).items():
        for method, part in methods.items():
            last = part[-1]
            accuracy = last["test_accuracy"]
            result.append(
                {
                    "problem": problem,
                    "method": method if method in (FIXED, UNIT) else f"`{method}`",
                    "validation loss": f"{last['valid_loss']:.4f}",
                    "test accuracy, %": f"{accuracy:.1f}" if accuracy != "" else "–",
                    "evaluations": f"{last['evaluations']:,}",
                    "products": f"{last['products']:,}",
                    "seconds": f"{last['seconds']:.1f}",
                }
            )
    return result


def draw(rows, path):
    """Validation loss against outer steps and against seconds."""
    found = curves(rows)
    figure, axes = plt.subplots(
        len(found),
        2,
        figsize=(10, 3.6 * len(found)),
        squeeze=False,
        layout="constrained",
    )
    for line, (problem, methods) in zip(axes, found.items(), strict=True):
        for axis, key in zip(line, ("outer_step", "seconds"), strict=True):
            for method, part in methods.items():
                style = f"C{METHODS.index(method)}" + (":" if method == FIXED else "-")
                x, y = ([row[k] for row in part] for k in (key, "valid_loss"))
                axis.plot(x, y, style, label=method)
            axis.set(xlabel=key.replace("_", " "), ylabel="validation loss")
            axis.set(yscale="log", title=problem)
        line[0].legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)
