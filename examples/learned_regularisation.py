"""
One penalty per feature
=======================

A linear model has a ridge penalty, of which one number is usually chosen by trying a grid on
validation data. Here every feature j has a penalty of its own,

    w*(ρ) = argmin_w  loss(X w + b, y) + ½ Σ_j exp(ρ_j) ‖w_j‖²,

and all ρ_j are learned together, by the gradient of the validation loss of w*(ρ): more numbers than
a grid can try. To see whether they are learned sensibly, features of noise are appended to the real
ones. So many numbers can also overfit a validation set: the loss on test data, which neither side
has seen, says on every split of the data which was better.

    python examples/learned_regularisation.py                  # diabetes, from scikit-learn
    python examples/learned_regularisation.py --data ijcnn1.trn.bz2          # LIBSVM format
    python examples/learned_regularisation.py --data 20news_counts_full.npz  # the commonest words
"""

import argparse
import bz2
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes, load_svmlight_file
from tqdm import tqdm

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GRID, LEARNED = "one penalty, grid", "per feature, learned"


class Problem(Exception):
    """Bad input: one line for the user, exit code 2."""


def read(path, words):
    """Features, and labels 0, 1, ... of a file or the numbers to predict of the bundled data."""
    if path is None:
        x, y = load_diabetes(return_X_y=True)
        return x, (y - y.mean()) / y.std()
    try:
        if path.suffix == ".npz":
            return read_counts(path, words)
        with (bz2.open if path.suffix == ".bz2" else open)(path, "rb") as file:
            x, y = load_svmlight_file(file)
    except (OSError, EOFError, KeyError, ValueError) as error:
        reason = f"{error}"[:80]
        raise Problem(f"--data {path} cannot be read ({reason})") from error
    return x.toarray(), np.unique(y, return_inverse=True)[1]


def read_counts(path, words):
    """log(1 + count) of the commonest words of the 20 Newsgroups archive, training part."""
    with np.load(path) as file:
        counts, columns = file["train_data"], file["train_indices"]
        starts, y, shape = file["train_indptr"], file["train_y"], file["shape"]
    words = min(words, int(shape[1]))
    in_documents = np.bincount(columns, minlength=int(shape[1]))
    place = np.full(int(shape[1]), -1)
    place[np.argsort(-in_documents, kind="stable")[:words]] = np.arange(words)
    rows, kept = np.repeat(np.arange(len(y)), np.diff(starts)), place[columns] >= 0
    x = np.zeros((len(y), words))
    x[rows[kept], place[columns[kept]]] = np.log1p(counts[kept])
    return x, y.astype(np.int64)


def split(x, y, args, seed):
    """(features, labels) for training, validation and test, standardised, with noise."""
    rng = np.random.default_rng(seed)
    count = args.train + args.valid
    if len(y) < count + 50:
        raise Problem(
            f"--train and --valid leave {len(y) - count} of {len(y)} examples for the test; at "
            "least 50 are needed"
        )
    order = rng.permutation(len(y))[: args.train + args.valid + args.test]
    x, y = x[order], y[order]
    if y.dtype.kind == "i" and len(np.unique(y[: args.train])) < max(y.max() + 1, 2):
        raise Problem(
            "the training examples are not of all classes; --train more of them"
        )
    x = np.concatenate([x, rng.standard_normal((len(x), args.noise))], 1)
    spread = x[: args.train].std(0)
    x = (x - x[: args.train].mean(0)) / np.where(spread > 0, spread, 1)
    x = torch.tensor(x, dtype=torch.float64 if x.size < 1e6 else torch.float32)
    y = torch.tensor(y)
    ends = 0, args.train, count, len(y)
    return [(x[a:b], y[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


def outer_loss(w, rho, batch):
    """Squared error of numbers, cross-entropy of classes: f."""
    x, y = batch
    z = x @ w["weight"] + w["bias"]
    if y.is_floating_point():
        return F.mse_loss(z[:, 0], y)
    return F.cross_entropy(z, y)


def inner_loss(w, rho, batch):
    """The same with the penalty of every feature: g."""
    penalty = (rho.exp()[:, None] * w["weight"] ** 2).sum() / 2
    return outer_loss(w, rho, batch) + penalty


class Fit:
    """w*(ρ) by L-BFGS, each fit from where the last one ended."""

    def __init__(self, x, y, tolerance):
        columns = 1 if y.is_floating_point() else int(y.max()) + 1
        self.w = {"weight": x.new_zeros(x.shape[1], columns)}
        self.w["bias"] = x.new_zeros(columns)
        self.batch = x, y
        self.tolerance = tolerance

    def __call__(self, rho):
        """w*(ρ), found in coordinates in which the Hessian is nearer to the identity."""
        scale = {"weight": (1 + rho.exp()).rsqrt()[:, None], "bias": 1.0}
        u = {name: (t / scale[name]).requires_grad_() for name, t in self.w.items()}
        optimizer = torch.optim.LBFGS(
            u.values(),
            max_iter=500,
            history_size=20,
            tolerance_grad=self.tolerance,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure():
            optimizer.zero_grad()
            w = {name: t * scale[name] for name, t in u.items()}
            loss = inner_loss(w, rho, self.batch)
            loss.backward()
            return loss

        optimizer.step(closure)
        self.w = {name: t.detach() * scale[name] for name, t in u.items()}
        return self.w


def search(fit, grid, like, valid):
    """The validation loss for each scalar penalty of the grid, and the best ρ."""
    losses = []
    for rho in tqdm(
        grid, desc="grid", leave=False
    ):  # from the largest penalty, each from the last
        rho = torch.full_like(like, rho)
        losses.append(float(outer_loss(fit(rho), rho, valid)))
    return losses, torch.full_like(like, grid[int(np.argmin(losses))])


def learn(fit, rho, valid, args):
    """Adam on all ρ_j: the validation losses, the best ρ, and the steps of linear solves."""
    gradient = tb.func.hypergradient(
        inner_loss, outer_loss, "cg(max_steps=50, rtol=1e-3)"
    )
    rho = rho.clone()
    optimizer = torch.optim.Adam([rho], lr=args.lr)
    losses, best, adjoint, solver_steps = [], rho.clone(), None, 0
    bar = tqdm(range(args.outer_steps), desc="learning", leave=False)
    for _ in bar:
        w = fit(rho)
        # the adjoint moves as little as w does: the next solve begins with it
        rho.grad, report = gradient(w, rho, fit.batch, valid, adjoint=adjoint)
        adjoint = report.adjoint
        solver_steps += int(report.solver_steps)
        losses.append(float(report.loss))
        if losses[-1] == min(losses):
            best = rho.clone()
        optimizer.step()
        bar.set_postfix(validation=f"{losses[-1]:.4f}")
    return losses, best, solver_steps


def both(parts, args):
    """Search and learn on one split: {name: [losses of the fits, ρ, its losses]}, CG's steps."""
    train, valid, _ = parts
    # as exact as the precision allows at reasonable cost
    tolerance = 1e-6 if train[0].dtype == torch.float64 else 1e-4
    grid = np.linspace(np.log(1e2), np.log(1e-4), args.grid)
    start = train[0].new_full((train[0].shape[1],), float(np.median(grid)))
    searched = search(Fit(*train, tolerance), grid, start, valid)
    *learned, steps = learn(Fit(*train, tolerance), start, valid, args)
    found = {GRID: [*searched], LEARNED: [*learned]}
    for row in found.values():
        w = Fit(*train, tolerance)(row[1])
        row.append([float(outer_loss(w, row[1], batch)) for batch in parts])
    return found, steps


def draw(folder, found, real):
    """Learned penalties of real and of noise features; validation loss against inner solves."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    rho, scalar = ((found[name][1] / np.log(10)).numpy() for name in (LEARNED, GRID))
    bins = np.linspace(rho.min() - 0.1, rho.max() + 0.1, 25)
    left.hist(rho[:real], bins, alpha=0.7, label="real features")
    left.hist(rho[real:], bins, alpha=0.7, label="noise features")
    left.axvline(scalar[0], color="tab:gray", linestyle="--", label="one for all")
    left.set(xlabel="log₁₀ penalty", ylabel="features", title="first split")
    left.legend()
    for name, (losses, _, _) in found.items():
        best = np.minimum.accumulate(losses)
        right.plot(range(1, len(best) + 1), best, label=name)
    right.set(xlabel="inner solves", ylabel="best validation loss")
    right.legend()
    figure.tight_layout()
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "learned_regularisation.png", dpi=120)


def parse_arguments(arguments):
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Learn one penalty per feature")
    parser.add_argument("--data", type=Path, help="LIBSVM file (.bz2 or text), or .npz")
    parser.add_argument("--words", type=int, default=500, help="of 20 Newsgroups")
    parser.add_argument("--noise", type=int, default=20, help="features of noise")
    parser.add_argument("--train", type=int, help="examples (150; of a file 3000)")
    parser.add_argument("--valid", type=int, help="examples (150; of a file 3000)")
    parser.add_argument("--test", type=int, default=20000, help="examples at most")
    parser.add_argument("--splits", type=int, help="of the data (5; of a file 1)")
    parser.add_argument("--outer-steps", type=int, default=30)
    parser.add_argument("--grid", type=int, default=30, help="penalties tried")
    parser.add_argument("--lr", type=float, default=0.3, help="of Adam on ρ")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the figure")
    args = parser.parse_args(arguments)
    defaults = {"train": 3000, "valid": 3000, "splits": 1}
    if args.data is None:
        defaults = {"train": 150, "valid": 150, "splits": 5}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("words", "train", "valid", "test", "splits", "outer_steps"):
        if getattr(args, name) < 1:
            raise Problem(f"--{name.replace('_', '-')} must be at least 1")
    for name, least in (("grid", 2), ("noise", 0)):
        if getattr(args, name) < least:
            raise Problem(f"--{name} must be at least {least}")
    if not 0 < args.lr < np.inf:
        raise Problem("--lr must be a positive number")
    return args


def main(arguments=None):
    """Search, learn, test, draw; returns the mean losses."""
    args = parse_arguments(arguments)
    x, y = read(args.data, args.words)
    real, runs, steps = x.shape[1], [], 0
    for seed in range(args.seed, args.seed + args.splits):
        parts = split(x, y, args, seed)
        found, more = both(parts, args)
        runs.append(found)
        steps += more
    sizes = [len(labels) for _, labels in parts]
    print(
        f"{real} real features and {args.noise} of noise; examples: {sizes[0]} for training, "
        f"{sizes[1]} for validation, {sizes[2]} for the test; means of {args.splits} split(s)"
    )
    results = {}
    for name, fits in ((GRID, args.grid), (LEARNED, args.outer_steps)):
        results[name] = np.mean([found[name][2] for found in runs], 0).tolist()
        train, valid, test = results[name]
        print(
            f"{name:20s} {fits:3d} fits: loss {train:.4f} in training, {valid:.4f} in validation, "
            f"{test:.4f} in the test"
        )
    better = sum(found[LEARNED][2][2] < found[GRID][2][2] for found in runs)
    print(
        f"lower test loss with learned penalties on {better} of {args.splits} split(s); "
        f"{steps / args.splits / args.outer_steps:.0f} steps of CG for a hypergradient"
    )
    rho = torch.stack([found[LEARNED][1] for found in runs])
    for name, part in (("real", rho[:, :real]), ("noise", rho[:, real:])):
        if part.numel():
            low, middle, high = (float(part.quantile(q).exp()) for q in (0.1, 0.5, 0.9))
            print(
                f"    penalties learned for {name:5s} features: median {middle:.2g}, 80 % between "
                f"{low:.2g} and {high:.2g}"
            )
    draw(args.output, runs[0], real)
    return results


if __name__ == "__main__":
    try:
        main()
    except (Problem, tb.BilevelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
