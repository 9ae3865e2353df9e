"""
Sinusoid regression with MAML
=============================

Every task is a sinusoid y = A sin(x + φ), shown at ten points. A network trained on all tasks at
once learns their mean, which is close to nothing; MAML (Finn, Abbeel & Levine 2017) learns an
initialisation from which a few gradient steps on ten points give the sinusoid. Both, and an
untrained network, are adapted to tasks none of them has seen.

    python examples/sinusoid.py [--outer-steps 300] [--tasks 4] [--output DIR]
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TEST_STEPS = 10
REPORTED = (0, 1, 5, 10)
GRID = (0.003, 0.01, 0.03)  # adaptation rates tried for the networks compared with


class Problem(Exception):
    """Bad input: one line for the user, exit code 2."""


class Sinusoid:
    """A task: amplitude in [0.1, 5], phase in [0, π]."""

    def __init__(self, generator):
        amplitude, phase = torch.rand(2, generator=generator).tolist()
        self.amplitude, self.phase = 0.1 + 4.9 * amplitude, math.pi * phase
        self.generator = generator

    def __call__(self, x):
        """The sinusoid at x."""
        return self.amplitude * torch.sin(x + self.phase)

    def sample(self, count):
        """Points with x uniform in [-5, 5]."""
        x = 10 * torch.rand(count, 1, generator=self.generator) - 5
        return x, self(x)


def network(seed):
    """The network of the paper: two hidden layers of 40 ReLUs."""
    torch.manual_seed(seed)
    layers = nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    return nn.Sequential(*layers)


def build(model, inner_lr, outer_lr):
    """MAML on a model, and its registered losses: both the mean squared error."""
    optimizer = tb.MAML(
        torch.optim.SGD(model.parameters(), lr=inner_lr),
        torch.optim.Adam(model.parameters(), lr=outer_lr),
    )

    @optimizer.inner_loss
    def support_loss(x, y):
        return F.mse_loss(model(x), y)

    @optimizer.outer_loss
    def query_loss(x, y):
        return F.mse_loss(model(x), y)

    return optimizer, support_loss, query_loss


def learn(model, args):
    """MAML: every outer step moves the initialisation by the query losses of a few tasks."""
    optimizer, support_loss, query_loss = build(model, args.inner_lr, args.outer_lr)
    generator = torch.Generator().manual_seed(args.seed)
    average = None
    bar = tqdm(range(args.outer_steps), desc="MAML, outer steps")
    for _ in bar:
        for _ in range(args.tasks):
            sinusoid = Sinusoid(generator)
            support, query = sinusoid.sample(args.points), sinusoid.sample(args.points)
            with optimizer.task():
                for _ in range(args.inner_steps):
                    optimizer.zero_grad()
                    support_loss(*support).backward()
                    optimizer.step()
                loss = query_loss(*query)
                loss.backward()
            now = loss.item()
            average = now if average is None else 0.99 * average + 0.01 * now
        optimizer.outer_step()
        bar.set_postfix(query=f"{average:.2f}")


def pretrain(model, args):
    """Ordinary training on the points of all tasks together, with more tasks and more steps."""
    generator = torch.Generator().manual_seed(args.seed)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in tqdm(range(2 * args.outer_steps), desc="pretraining, steps"):
        tasks = [Sinusoid(generator).sample(2 * args.points) for _ in range(25)]
        x, y = (torch.cat(column) for column in zip(*tasks, strict=True))
        adam.zero_grad()
        F.mse_loss(model(x), y).backward()
        adam.step()


def adapt(model, support, rate, args):
    """The network's predictor before and after every step on the support points."""
    optimizer, support_loss, _ = build(model, rate, args.outer_lr)
    with optimizer.task(record=False):  # the model is put back at the end
        for step in range(TEST_STEPS + 1):
            if step:
                optimizer.zero_grad()
                support_loss(*support).backward()
                optimizer.step()
            yield torch.no_grad()(model)


def evaluate(model, rate, count, seed, args):
    """Mean squared error on unseen sinusoids, by task and adaptation step."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.zeros(count, TEST_STEPS + 1)
    for row in table:
        sinusoid = Sinusoid(generator)
        support, (x, y) = sinusoid.sample(args.points), sinusoid.sample(100)
        for step, predict in enumerate(adapt(model, support, rate, args)):
            row[step] = F.mse_loss(predict(x), y)
    return table


def best_rate(model, args):
    """The adaptation rate of the grid with the smallest error, on tasks of its own."""
    errors = {
        rate: evaluate(model, rate, 50, args.seed + 2, args)[:, -1].mean().item()
        for rate in GRID
    }
    return min(errors, key=lambda rate: errors[rate] if errors[rate] < 1e9 else 1e9)


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description="Sinusoid regression with MAML")
    parser.add_argument("--outer-steps", type=int, default=300)
    parser.add_argument("--inner-steps", type=int, default=5, help="in training")
    parser.add_argument("--tasks", type=int, default=4, help="tasks of an outer step")
    parser.add_argument("--points", type=int, default=10, help="shown of a sinusoid")
    parser.add_argument("--test-tasks", type=int, default=200)
    parser.add_argument("--inner-lr", type=float, default=0.01)
    parser.add_argument("--outer-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the figure")
    args = parser.parse_args(arguments)
    for name in ("outer_steps", "inner_steps", "tasks", "points"):
        if getattr(args, name) < 1:
            raise Problem(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("inner_lr", "outer_lr"):
        if not 0 < getattr(args, name) < math.inf:
            raise Problem(f"--{name.replace('_', '-')} must be a positive number")
    if args.test_tasks < 2:
        raise Problem("--test-tasks must be at least 2")
    return args


def interval(table):
    """Mean over tasks and half the width of its 95 % interval, for every step."""
    return table.mean(0), 1.96 * table.std(0) / math.sqrt(len(table))


def draw(path, models, rates, tables, args):
    """A test sinusoid before and after adaptation; the errors by adaptation step."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    sinusoid = Sinusoid(torch.Generator().manual_seed(args.seed + 3))
    sinusoid.amplitude, sinusoid.phase = 4.0, 0.5  # one that is far from the mean
    support = sinusoid.sample(args.points)
    x = torch.linspace(-5, 5, 200).unsqueeze(1)
    left.plot(x, sinusoid(x), color="black", linewidth=1, label="true")
    left.plot(*support, "o", color="black", markersize=5, label="points shown")
    for name, color in (("pretrained", "tab:orange"), ("MAML", "tab:blue")):
        curves = [f(x) for f in adapt(models[name], support, rates[name], args)]
        left.plot(x, curves[0], color=color, linestyle=":", label=f"{name}, before")
        label = f"{name}, {TEST_STEPS} steps"
        left.plot(x, curves[-1], color=color, linewidth=2, label=label)
    left.set(xlabel="x", ylabel="y", title="a sinusoid none has seen")
    left.legend(fontsize=8)
    colors = {"MAML": "tab:blue", "pretrained": "tab:orange", "untrained": "tab:gray"}
    for name, table in tables.items():
        mean, half = interval(table)
        right.plot(mean, "o-", markersize=3, color=colors[name], label=name)
        steps = range(TEST_STEPS + 1)
        right.fill_between(
            steps, mean - half, mean + half, color=colors[name], alpha=0.2
        )
    right.set(xlabel="adaptation steps", ylabel="mean squared error", ylim=(0, None))
    right.set_title(f"{args.test_tasks} unseen sinusoids, 95 % intervals")
    right.legend()
    figure.tight_layout()
    path.mkdir(parents=True, exist_ok=True)
    figure.savefig(path / "sinusoid.png", dpi=120)
    plt.close(figure)


def main(arguments=None):
    """Learn, adapt to unseen sinusoids, compare, draw."""
    args = parse_arguments(arguments)
    models = {name: network(args.seed) for name in ("MAML", "pretrained", "untrained")}
    learn(models["MAML"], args)
    pretrain(models["pretrained"], args)
    rates = {"MAML": args.inner_lr}
    for name in ("pretrained", "untrained"):  # each at its best rate, on other tasks
        rates[name] = best_rate(models[name], args)
    tables = {
        name: evaluate(model, rates[name], args.test_tasks, args.seed + 1, args)
        for name, model in models.items()
    }
    print("mean squared error after adaptation steps, and 95 % interval")
    print(" " * 23 + "".join(f"{k:>14d}" for k in REPORTED))
    results = {}
    for name, table in tables.items():
        mean, half = interval(table)
        results[name] = {k: (mean[k].item(), half[k].item()) for k in REPORTED}
        cells = "".join(f"{m:7.2f} ± {h:4.2f}" for m, h in results[name].values())
        print(f"{name:10s} (rate {rates[name]:.3f}) {cells}")
    if args.output:
        draw(args.output, models, rates, tables, args)
    return results


if __name__ == "__main__":
    try:
        main()
    except Problem as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
