"""
Distil a training set into ten images per class
===============================================

The outer variable is the training data itself: a handful of images, and the learning rates of the
few steps that a fresh network takes on them. Every outer step trains a network from a new random
initialisation on the learned images and moves them by the gradient of the loss on real images,
through all training steps. The network is never the result; the images are.

    python examples/dataset_distillation.py               # digits bundled with scikit-learn
    python examples/dataset_distillation.py --data DIR    # MNIST idx files in DIR
"""

import argparse
import gzip
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tqdm import tqdm

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CLASSES = 10


class Problem(Exception):
    """Bad input: one line for the user, exit code 2."""


def digits():
    """Real images and labels to learn from (1,297) and to test on (500)."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x = torch.tensor(images[order] / 16, dtype=torch.float32)
    y = torch.tensor(labels[order])
    return (x[:1297], y[:1297]), (x[1297:], y[1297:])


def mnist(folder):
    """Real images and labels to learn from (60,000) and to test on (10,000)."""
    arrays = []
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3",
                 "t10k-labels-idx1"):  # fmt: skip
        found = sorted(folder.glob(f"{name}-ubyte*"))
        if not found:
            raise Problem(f"no file {name}-ubyte or {name}-ubyte.gz in {folder}")
        try:
            zipped = found[0].suffix == ".gz"
            raw = gzip.open(found[0]).read() if zipped else found[0].read_bytes()
            head = 16 if "images" in name else 8
            count = int.from_bytes(raw[4:8], "big")
            array = np.frombuffer(raw, np.uint8, offset=head).reshape(count, -1)
        except (EOFError, OSError, ValueError) as error:
            raise Problem(f"{found[0]} cannot be read ({error})") from error
        arrays.append(torch.tensor(array))
    x, y, x_test, y_test = arrays
    return (x / 255, y.flatten().long()), (x_test / 255, y_test.flatten().long())


def network(inputs, seed):
    """A fresh classifier."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(inputs, 64), torch.nn.Tanh(), torch.nn.Linear(64, CLASSES)
    )


def some_real(x, y, per_class, seed):
    """Real images drawn at random, so many of each class, class by class."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c in range(CLASSES):
        of_class = (y == c).nonzero().flatten()
        order = torch.randperm(len(of_class), generator=generator)[:per_class]
        chosen.append(of_class[order])
    return x[torch.cat(chosen)]


def distil(x, y, labels, args):
    """The learned images, the learning rate of every step, and the loss over outer steps."""
    images = some_real(x, y, args.per_class, args.seed).requires_grad_()
    log_lr = torch.full((args.steps,), 0.5).log().requires_grad_()
    model = network(x.shape[1], 0)
    optimizer = tb.BilevelOptimizer(
        inner=torch.optim.SGD(model.parameters(), lr=0.5),
        outer=torch.optim.Adam([images, log_lr], lr=args.outer_lr),
        modules=model,
        estimator=args.estimator,
    )

    @optimizer.inner_hyperparameters
    def schedule(step):
        return {"lr": log_lr[step].exp()}

    @optimizer.inner_loss
    def distilled_loss():
        return F.cross_entropy(model(images), labels)

    @optimizer.outer_loss
    def real_loss(inputs, targets):
        return F.cross_entropy(model(inputs), targets)

    schedule_of_outer = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer.outer, args.outer_steps
    )
    generator = torch.Generator().manual_seed(args.seed)
    curve = []
    bar = tqdm(range(args.outer_steps), desc="outer steps")
    for outer_step in bar:
        model.load_state_dict(network(x.shape[1], outer_step).state_dict())
        optimizer.restart()  # a new trajectory: step 0 of the schedule
        for _ in range(args.steps):
            optimizer.zero_grad()
            distilled_loss().backward()
            optimizer.step()
        batch = torch.randint(0, len(x), (args.batch_size,), generator=generator)
        report = optimizer.outer_step(x[batch], y[batch])
        schedule_of_outer.step()
        curve.append(float(report.loss))
        bar.set_postfix(real=f"{np.mean(curve[-20:]):.3f}")
    return images.detach(), log_lr.exp().tolist(), curve


def accuracy(images, labels, rates, test, seeds=range(10_000, 10_010)):
    """Test accuracy of fresh networks after training on the images: mean and deviation."""
    found = []
    for seed in seeds:
        model = network(images.shape[1], seed)
        sgd = torch.optim.SGD(model.parameters())
        for rate in rates:
            sgd.param_groups[0]["lr"] = rate
            F.cross_entropy(model(images), labels).backward()
            sgd.step()
            sgd.zero_grad()
        with torch.no_grad():
            found.append((model(test[0]).argmax(1) == test[1]).float().mean().item())
    return 100 * np.mean(found), 100 * np.std(found)


def best_way(images, labels, steps, valid):
    """The best of a grid of learning rates and numbers of steps for given images."""
    grid = [[lr] * n for lr in (0.1, 0.2, 0.5, 1.0, 2.0) for n in (steps, 10 * steps)]
    return max(grid, key=lambda way: accuracy(images, labels, way, valid, range(3))[0])


def draw(images, real, curve, folder):
    """The real images, what became of them, and the loss."""
    side = round(images.shape[1] ** 0.5)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.5))
    for axes, title, rows in ((left, "real", real), (middle, "learned", images)):
        shown = rows.view(CLASSES, -1, side, side)[:, :10]
        shown = F.pad(shown, (1, 1, 1, 1), value=float("nan"))  # a margin around each
        sheet = shown.permute(0, 2, 1, 3).reshape(CLASSES * (side + 2), -1)
        limit = float(rows.abs().max())
        axes.imshow(sheet.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(xticks=[], yticks=[], title=f"{title}: a row for every class")
    right.plot(curve)
    right.set(yscale="log", xlabel="outer step", ylabel="loss on real images")
    figure.tight_layout()
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "dataset_distillation.png", dpi=120)


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description="Distil a training set")
    parser.add_argument("--data", type=Path, help="folder with MNIST's idx files")
    parser.add_argument("--per-class", type=int, default=10, help="learned images")
    parser.add_argument("--steps", type=int, default=10, help="training steps on them")
    parser.add_argument("--outer-steps", type=int, default=200)
    parser.add_argument("--outer-lr", type=float, default=0.04)
    parser.add_argument("--batch-size", type=int, default=256, help="real images")
    parser.add_argument("--estimator", default="unrolled")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the figure")
    args = parser.parse_args(arguments)
    for name in ("per_class", "steps", "outer_steps", "batch_size"):
        if getattr(args, name) < 1:
            raise Problem(f"--{name.replace('_', '-')} must be at least 1")
    try:
        tb.estimator(args.estimator)
    except (tb.BilevelError, ValueError) as error:
        raise Problem(str(error)) from error
    return args


def main(arguments=None):
    """Distil, train fresh networks on the result, draw."""
    args = parse_arguments(arguments)
    (x, y), test = mnist(args.data) if args.data else digits()
    fewest = int(torch.bincount(y, minlength=CLASSES).min())
    if args.per_class > fewest:
        raise Problem(f"--per-class must be at most {fewest}, the images of a class")
    labels = torch.arange(CLASSES).repeat_interleave(args.per_class)
    real = some_real(x, y, args.per_class, args.seed)
    images, rates, curve = distil(x, y, labels, args)
    held = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:1000]
    valid = x[held], y[held]
    best = best_way(real, labels, args.steps, valid)
    many = x[:5000], y[:5000]
    results = {
        f"{len(real)} real images, {len(best)} steps of {best[0]:g} (best of 10 ways)": (
            accuracy(real, labels, best, test)
        ),
        f"{len(images)} learned images, {args.steps} steps of learned length": (
            accuracy(images, labels, rates, test)
        ),
        f"{len(many[0])} real images, 1000 steps of 0.5": (
            accuracy(*many, [0.5] * 1000, test, range(10_000, 10_002))
        ),
    }
    for name, (mean, deviation) in results.items():
        print(f"{name:52s} test accuracy {mean:.1f} ± {deviation:.1f} %")
    print("learned learning rates:", *(f"{rate:.2f}" for rate in rates))
    draw(images, real, curve, args.output)
    return {name: mean for name, (mean, _) in results.items()}


if __name__ == "__main__":
    try:
        main()
    except Problem as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
