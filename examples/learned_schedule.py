"""
Learn a learning-rate schedule
==============================

The outer variables are the learning rate of each of the K training steps, and the momentum. Every
outer step trains a small network from its initialisation for K steps and moves the schedule by the
gradient of the validation loss after the last of them, through all K steps. The result is compared
with the best constant learning rate of a grid.

    python examples/learned_schedule.py [--steps 50] [--runs 100] [--output DIR]
"""

import argparse
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tqdm import tqdm

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TRAIN, VALID = slice(0, 1000), slice(1000, 1400)
GRID = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0]


def digits():
    """All images and labels in a fixed random order."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    return x, torch.tensor(labels)[order]


def network(seed=0):
    """A small classifier."""
    torch.manual_seed(seed)
    layers = torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)
    return torch.nn.Sequential(*layers)


def batches(steps, seed, size=50):
    """Indices of the training batches of one run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, TRAIN.stop, (steps, size), generator=generator)


def learn(x, y, steps, runs):
    """The learned schedule: a learning rate for every step, and the momentum."""
    log_lr = torch.full((steps,), -2.3, requires_grad=True)  # 0.1 everywhere
    momentum = torch.zeros((), requires_grad=True)  # ½, through a sigmoid
    model = network()
    optimizer = tb.BilevelOptimizer(
        inner=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5),
        outer=torch.optim.Adam([log_lr, momentum], lr=0.03),
        estimator="unrolled",
    )

    @optimizer.inner_hyperparameters
    def schedule(step):
        return {"lr": log_lr[step].exp(), "momentum": momentum.sigmoid()}

    @optimizer.inner_loss
    def train_loss(x, y):
        return F.cross_entropy(model(x), y)

    @optimizer.outer_loss
    def valid_loss(x, y):
        return F.cross_entropy(model(x), y)

    bar = tqdm(range(runs), desc="outer steps")
    for run in bar:
        model.load_state_dict(network(run).state_dict())
        optimizer.restart()  # a new trajectory: fresh momentum, step 0
        for index in batches(steps, run):
            optimizer.zero_grad()
            train_loss(x[index], y[index]).backward()
            optimizer.step()
        report = optimizer.outer_step(x[VALID], y[VALID])
        bar.set_postfix(validation=f"{float(report.loss):.3f}")
    return log_lr.detach().exp().tolist(), momentum.sigmoid().item()


def evaluate(x, y, rates, momentum, seeds=range(1000, 1005)):
    """Plain training with a schedule: mean validation loss after every step, test accuracy."""
    curves, correct = [], []
    for seed in seeds:
        model = network(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        curve = []
        for rate, index in zip(rates, batches(len(rates), seed), strict=True):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            with torch.no_grad():
                curve.append(F.cross_entropy(model(x[VALID]), y[VALID]).item())
        curves.append(curve)
        test = slice(VALID.stop, None)
        correct.append((model(x[test]).argmax(1) == y[test]).float().mean().item())
    return torch.tensor(curves).mean(0), 100 * sum(correct) / len(correct)


def main(arguments=None):
    """Learn a schedule, compare, draw."""
    parser = argparse.ArgumentParser(description="Learn a learning-rate schedule")
    parser.add_argument("--steps", type=int, default=50, help="training steps of a run")
    parser.add_argument("--runs", type=int, default=100, help="outer steps")
    parser.add_argument("--output", type=Path, help="folder for the figure")
    args = parser.parse_args(arguments)
    x, y = digits()
    rates, momentum = learn(x, y, args.steps, args.runs)
    constants = {}
    for lr in GRID:
        for fixed in (0.0, 0.5, 0.9):
            constants[lr, fixed] = evaluate(x, y, [lr] * args.steps, fixed)
    best = min(constants, key=lambda key: float(constants[key][0][-1].nan_to_num(1e9)))
    results = {
        "learned schedule": evaluate(x, y, rates, momentum),
        f"best constant of {len(constants)}: lr {best[0]}, momentum {best[1]}": constants[
            best
        ],
        "where it began: lr 0.1, momentum 0.5": constants[0.1, 0.5],
    }
    for name, (curve, accuracy) in results.items():
        print(f"{name:44s} validation loss {curve[-1]:.3f}, test {accuracy:.1f} %")
    print(
        f"learned momentum {momentum:.2f}, learning rates {min(rates):.2f} – {max(rates):.2f}"
    )

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot(rates, color="tab:blue")
    left.axhline(best[0], color="tab:gray", linestyle="--", label="best constant")
    left.set(xlabel="training step", ylabel="learning rate", title="learned schedule")
    left.legend()
    for name, (curve, _) in results.items():
        right.plot(curve, label=name.split(":")[0])
    right.set(xlabel="training step", ylabel="validation loss", yscale="log")
    right.legend()
    figure.tight_layout()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output / "learned_schedule.png", dpi=120)
    return {
        name: (float(curve[-1]), accuracy)
        for name, (curve, accuracy) in results.items()
    }


if __name__ == "__main__":
    main()
