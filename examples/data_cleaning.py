"""
Clean a training set whose labels were corrupted
================================================

One weight per training example is the outer variable. The training loop is the usual one; the
library watches it and moves the weights by the gradient of the loss on a small clean validation
set. Examples with wrong labels end up with weights near zero.

    python examples/data_cleaning.py                         # digits bundled with scikit-learn
    python examples/data_cleaning.py --data DIR              # MNIST idx files in DIR
    python examples/data_cleaning.py --estimator "unrolled"  # any name with options
    python examples/data_cleaning.py --ops --products traced # faster second-order products
    python examples/data_cleaning.py --data DIR --train 55000 --device cuda  # all of MNIST
"""

import argparse
import csv
import gzip
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
from tqdm import tqdm

import torch_bilevel as tb
from torch_bilevel.ops import linear_cross_entropy

OUTER = {"adam": (torch.optim.Adam, 0.2), "sgd": (torch.optim.SGD, 300.0)}


def read_digits():
    """Images and labels for training (1,000), validation (300) and test (497)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order] / 16.0, labels[order]
    return [
        (images[a:b], labels[a:b]) for a, b in ((0, 1000), (1000, 1300), (1300, 1797))
    ]


def read_mnist(folder, train):
    """Images and labels for training, validation (the next 5,000) and test (10,000)."""
    names = (
        "train-images-idx3",
        "train-labels-idx1",
        "t10k-images-idx3",
        "t10k-labels-idx1",
    )
    x, y, x_test, y_test = (read_idx(Path(folder), f"{name}-ubyte") for name in names)
    x, x_test = (a.reshape(len(a), -1) / 255.0 for a in (x, x_test))
    last = train + 5000
    if last > len(x):
        raise SystemExit2(f"--train {train} leaves no 5,000 of {len(x)} for validation")
    return [(x[:train], y[:train]), (x[train:last], y[train:last]), (x_test, y_test)]


def read_idx(folder, name):
    """One idx file, compressed or not."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.exists()), None)
    if path is None:
        raise SystemExit2(f"no file {name} or {name}.gz in {folder}")
    try:
        raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError) as error:
        raise SystemExit2(
            f"{path} cannot be read ({error}); is the download complete?"
        ) from error
    dims = raw[3] if len(raw) > 4 else 0
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    if not dims or len(raw) != 4 + 4 * dims + int(np.prod(shape)):
        raise SystemExit2(f"{path} is truncated or not an idx file ({len(raw)} bytes)")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


class SystemExit2(Exception):
    """Bad input: one line for the user, exit code 2."""


def corrupt(labels, rate, classes, seed):
    """Give a fraction of the examples another label, uniformly among the wrong ones."""
    rng = np.random.default_rng(seed)
    corrupted = rng.permutation(len(labels)) < round(rate * len(labels))
    wrong = (labels + rng.integers(1, classes, len(labels))) % classes
    return np.where(corrupted, wrong, labels), corrupted


def loader(x, y, batch_size, seed):
    """Shuffled batches of (x, y, index)."""
    data = TensorDataset(x, y, torch.arange(len(x), device=x.device))
    generator = torch.Generator().manual_seed(seed)
    order = RandomSampler(data, generator=generator)
    rows = BatchSampler(order, batch_size, drop_last=False)  # a batch in one look-up
    return DataLoader(data, batch_size=None, sampler=rows, generator=generator)


def forever(batches):
    """Epoch after epoch."""
    while True:
        yield from batches


def new_model(inputs, classes, args):
    """The classifier and its optimizer, the same every time."""
    torch.manual_seed(args.seed)
    model = torch.nn.Linear(inputs, classes).to(args.device)
    return model, torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3
    )


def train(x, y, classes, args):
    """Ordinary training; returns the model and the seconds it took."""
    model, optimizer = new_model(x.shape[1], classes, args)
    batches = forever(loader(x, y, args.batch_size, args.seed))
    began = time.perf_counter()
    for _ in range(args.outer_steps * args.inner_steps):
        inputs, labels, _ = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model, seconds_since(began, args.device)


def seconds_since(began, device):
    """Wall time, of what a GPU still has to do too."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def clean(x, y, x_valid, y_valid, classes, args):
    """The same loop, with the weight of every example learned."""
    model, sgd = new_model(x.shape[1], classes, args)
    # logits; the weight is their sigmoid
    weights = torch.zeros(len(x), device=args.device, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        inner=sgd,
        outer=OUTER[args.outer][0]([weights], lr=args.outer_lr),
        modules=model,
        estimator=args.estimator,
        products=args.products,
        inner_steps=args.inner_steps,
    )

    # where stochastic estimators draw batches of their own from
    @optimizer.inner_loss(data=loader(x, y, args.batch_size, args.seed + 1))
    def train_loss(inputs, labels, index):
        omega = weights[index].sigmoid()
        if args.ops:  # the same number by one operation
            return linear_cross_entropy(
                inputs, model.weight, model.bias, labels, example_weights=omega
            )
        losses = F.cross_entropy(model(inputs), labels, reduction="none")
        return (omega * losses).mean()

    @optimizer.outer_loss(data=[(x_valid, y_valid)])
    def valid_loss(inputs, labels):
        return F.cross_entropy(model(inputs), labels)

    batches = forever(loader(x, y, args.batch_size, args.seed))
    touched = torch.zeros(len(x), dtype=torch.bool, device=args.device)
    history = []
    bar = tqdm(total=args.outer_steps, desc=args.estimator, unit="outer step")

    def after_outer_step(_, report):
        touched.logical_or_(weights.grad != 0)
        history.append(float(report.loss))
        bar.update()
        bar.set_postfix(outer_loss=f"{history[-1]:.4f}")

    optimizer.register_outer_step_post_hook(after_outer_step)
    began = time.perf_counter()
    for _ in range(args.outer_steps * args.inner_steps):
        inputs, labels, index = next(batches)
        optimizer.zero_grad()
        train_loss(inputs, labels, index).backward()
        optimizer.step()
    seconds = seconds_since(began, args.device)
    bar.close()
    return model, weights.detach().sigmoid().cpu(), touched.cpu(), history, seconds


def accuracy(model, x, y):
    """Percent of correct predictions."""
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).float().mean().item()


def detection(weights, corrupted):
    """Precision, recall and F1 of "weight < ½ means corrupted"."""
    said = weights.numpy() < 0.5
    right = (said & corrupted).sum()
    precision = right / said.sum() if said.any() else float("nan")
    recall = right / corrupted.sum() if corrupted.any() else float("nan")
    return precision, recall, 2 * right / max(said.sum() + corrupted.sum(), 1)


def draw(path, x, given, weights, corrupted, history):
    """Histogram of the weights, the outer loss, and the images trusted least."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 6), layout="constrained")
    grid = figure.add_gridspec(3, 8)
    axes = figure.add_subplot(grid[:2, :4])
    bins = np.linspace(0, 1, 41)
    axes.hist(weights[~corrupted], bins, alpha=0.7, label="clean")
    axes.hist(weights[corrupted], bins, alpha=0.7, label="corrupted")
    axes.set(xlabel="learned weight", ylabel="examples", title="Weights")
    axes.legend()
    axes = figure.add_subplot(grid[:2, 4:])
    axes.plot(range(1, len(history) + 1), history)
    axes.set(xlabel="outer step", ylabel="validation loss", title="Outer loss")
    side = int(x.shape[1] ** 0.5)
    for place, index in enumerate(np.argsort(weights, kind="stable")[:8]):
        axes = figure.add_subplot(grid[2, place])
        axes.imshow(x[index].reshape(side, side), cmap="gray_r")
        axes.set_title(f"given: {given[index]}", fontsize=9)
        axes.axis("off")
    figure.savefig(path, dpi=120)


def parse_arguments(argv):
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description="Learn which training labels to trust."
    )
    parser.add_argument("--data", metavar="DIR", help="folder with MNIST idx files")
    parser.add_argument(
        "--train", type=int, default=20000, help="training images of MNIST, up to 55000"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--corruption", type=float, default=0.4, help="fraction of wrong labels"
    )
    parser.add_argument(
        "--estimator", default="cg(max_steps=10)", help="any name with options"
    )
    parser.add_argument(
        "--ops", action="store_true", help="the fused loss of torch_bilevel.ops"
    )
    parser.add_argument(
        "--products", default="double_backward", help="double_backward, traced, ..."
    )
    parser.add_argument(
        "--outer-steps", type=int, default=None, help="30 (MNIST), 60 (digits)"
    )
    parser.add_argument(
        "--inner-steps", type=int, default=20, help="inner per outer step"
    )
    parser.add_argument(
        "--batch-size", type=int, default=None, help="500 (MNIST), 100 (digits)"
    )
    parser.add_argument(
        "--outer", choices=OUTER, default="adam", help="the outer optimizer"
    )
    parser.add_argument(
        "--outer-lr", type=float, default=None, help="0.2 (adam), 300 (sgd)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="DIR", default="data_cleaning_results")
    args = parser.parse_args(argv)
    if args.outer_steps is None:
        args.outer_steps = 30 if args.data else 60
    if args.outer_lr is None:
        args.outer_lr = OUTER[args.outer][1]
    if args.batch_size is None:
        args.batch_size = 500 if args.data else 100
    if not 0 <= args.corruption < 1:
        raise SystemExit2(f"--corruption {args.corruption} must lie in [0, 1)")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit2("--device cuda: PyTorch sees no CUDA device here")
    for name in ("outer_steps", "inner_steps", "batch_size", "train"):
        if getattr(args, name) < 1:
            raise SystemExit2(f"--{name.replace('_', '-')} must be at least 1")
    try:
        tb.estimator(args.estimator)
    except (tb.UnknownName, ValueError, TypeError) as error:
        raise SystemExit2(f"--estimator {args.estimator}: {error}") from error
    if args.products.split("(")[0] not in tb.products():
        raise SystemExit2(f"--products {args.products}: {', '.join(tb.products())}")
    return args


def main(argv=None):
    """Run the example; returns the figures of the table."""
    args = parse_arguments(argv)
    splits = read_mnist(args.data, args.train) if args.data else read_digits()
    (x, true), (x_valid, y_valid), (x_test, y_test) = splits
    classes = int(true.max()) + 1
    true = true.astype(np.int64)
    given, corrupted = corrupt(true, args.corruption, classes, args.seed)

    def tensor(array):
        kind = torch.float32 if array.dtype.kind == "f" else torch.int64
        return torch.tensor(array, dtype=kind, device=args.device)

    x, y, x_valid, y_valid, x_test, y_test, keep = map(
        tensor, (x, given, x_valid, y_valid, x_test, y_test, np.flatnonzero(~corrupted))
    )
    plain, plain_seconds = train(x, y, classes, args)
    oracle, _ = train(x[keep], y[keep], classes, args)
    model, weights, touched, history, seconds = clean(
        x, y, x_valid, y_valid, classes, args
    )
    precision, recall, f1 = detection(weights, corrupted)
    table = {
        "test accuracy without cleaning": f"{accuracy(plain, x_test, y_test):.1f} %",
        "test accuracy with cleaning": f"{accuracy(model, x_test, y_test):.1f} %",
        "test accuracy of the oracle": f"{accuracy(oracle, x_test, y_test):.1f} %",
        "precision (weight < ½)": f"{precision:.3f}",
        "recall": f"{recall:.3f}",
        "F1": f"{f1:.3f}",
        "weights that received a gradient": f"{100 * touched.float().mean():.1f} %",
        "seconds": f"{seconds:.1f} ({seconds / plain_seconds:.1f} × plain training)",
    }
    for name, value in table.items():
        print(f"{name:34s} {value}")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    draw(
        folder / "cleaning.png",
        x.cpu().numpy(),
        given,
        weights.numpy(),
        corrupted,
        history,
    )
    with open(folder / "weights.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "given_label", "true_label", "corrupted", "weight"])
        for index, weight in enumerate(weights.tolist()):
            writer.writerow(
                [index, given[index], true[index], int(corrupted[index]), weight]
            )
    print(f"wrote {folder / 'cleaning.png'} and {folder / 'weights.csv'}")
    return table


if __name__ == "__main__":
    try:
        main()
    except (SystemExit2, tb.BilevelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
