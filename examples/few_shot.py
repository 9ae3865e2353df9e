"""
Few-shot classification by learned initialisations
==================================================

An episode shows a few images of classes never seen before and asks for the classes of others.
What is learned over many episodes is where adaptation begins (MAML, FOMAML, iMAML, Reptile), that
and the features while only the head adapts (ANIL), or the features alone (ITD-BiO). The loop is the
same for all: the inner steps and the query loss of an episode inside ``with optimizer.task():``.

    python examples/few_shot.py --method maml                    # digits bundled with scikit-learn
    python examples/few_shot.py --method anil --data FILE.npz    # Omniglot, 28x28
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = {
    # name: (class, inner steps in training)
    "maml": (tb.MAML, 5),
    "fomaml": (tb.FOMAML, 5),
    "anil": (tb.ANIL, 5),
    "imaml": (tb.IMAML, 12),
    "reptile": (tb.Reptile, 8),
    "itd": (tb.BilevelOptimizer, 5),
}


class Problem(Exception):
    """Bad input: one line for the user, exit code 2."""


def digits():
    """Images by class; six classes to learn from, the other four to be tested on."""
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    by_class = [images[torch.tensor(labels == c)] for c in range(10)]
    return by_class[:6], by_class[6:]


def omniglot(path):
    """Images by class, in the official split: background to learn from, evaluation to test on."""
    try:
        with np.load(path) as file:
            bits, classes, held_out = file["bits"], file["cls"], file["evaluation"]
    except (OSError, KeyError, ValueError) as error:
        raise Problem(f"{path} is not the Omniglot archive ({error})") from error
    images = np.unpackbits(bits, axis=1, count=784).reshape(-1, 1, 28, 28)
    images = torch.tensor(images, dtype=torch.float32)
    found = {c: images[torch.tensor(classes == c)] for c in np.unique(classes)}
    test = {int(c) for c in np.unique(classes[held_out == 1])}
    train = [rows for c, rows in found.items() if c not in test]
    return train, [found[c] for c in sorted(test)]


def episode(classes, ways, shots, generator, queries=10):
    """Support and query images with labels, from classes and images drawn at random."""
    chosen = torch.randperm(len(classes), generator=generator)[:ways]
    support, query = [], []
    for c in chosen.tolist():
        order = torch.randperm(len(classes[c]), generator=generator)
        support.append(classes[c][order[:shots]])
        query.append(classes[c][order[shots : shots + queries]])
    labels = torch.arange(ways)
    return [
        (torch.cat(parts), labels.repeat_interleave(len(parts[0])))
        for parts in (support, query)
    ]


def network(size, ways):
    """Blocks of convolution, batch norm, ReLU and pooling; and a linear head."""
    channels, blocks, before = (64, 4, 1) if size > 8 else (32, 2, 1)
    layers = []
    for _ in range(blocks):
        layers += [
            nn.Conv2d(before, channels, 3, padding=1),
            nn.BatchNorm2d(channels, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        before = channels
    features = nn.Sequential(*layers, nn.Flatten())
    return features, nn.Linear(channels * (size // 2**blocks) ** 2, ways)


def build(method, features, head, inner_lr, outer_lr):
    """The optimizer of a method, its inner steps, and its registered losses."""
    make, inner_steps = METHODS[method]
    every = [*features.parameters(), *head.parameters()]
    head_only = method in ("anil", "itd")
    inner = torch.optim.SGD(head.parameters() if head_only else every, lr=inner_lr)
    learned = list(features.parameters()) if method == "itd" else every
    options = {"estimator": "unrolled"} if method == "itd" else {}
    if method == "imaml":
        options = {"estimator": "cg(max_steps=5, damping=1.0)", "proximal_term": 1.0}
    # Reptile's gradient is a displacement, so its rate is a fraction of it
    reptile = method == "reptile"
    outer = torch.optim.SGD(learned, 0.5) if reptile else torch.optim.Adam(learned)
    outer.param_groups[0]["lr"] = 0.5 if reptile else outer_lr
    optimizer = make(inner, outer, **options)

    @optimizer.inner_loss
    def support_loss(x, y):
        return F.cross_entropy(head(features(x)), y)

    @optimizer.outer_loss
    def query_loss(x, y):
        return F.cross_entropy(head(features(x)), y)

    return optimizer, inner_steps, support_loss, query_loss


def adapt(optimizer, support_loss, support, num_steps):
    """The inner loop."""
    for _ in range(num_steps):
        optimizer.zero_grad()
        support_loss(*support).backward()
        optimizer.step()


def evaluate(parts, model, classes, args, steps, episodes):
    """Accuracy on query images after every number of adaptation steps up to ``steps``."""
    optimizer, _, support_loss, _ = parts
    generator = torch.Generator().manual_seed(args.seed + 1)
    table = torch.zeros(episodes, steps + 1)
    for row in tqdm(table, desc="test episodes"):
        support, (x, y) = episode(classes, args.ways, args.shots, generator)
        with optimizer.task(record=False):
            for k in range(steps + 1):
                with torch.no_grad():
                    row[k] = (model(x).argmax(1) == y).float().mean()
                adapt(optimizer, support_loss, support, 1)
    return 100 * table


def train(parts, classes, args):
    """Learn from episodes; the query losses, averaged over each outer step's tasks."""
    optimizer, inner_steps, support_loss, query_loss = parts
    generator = torch.Generator().manual_seed(args.seed)
    losses = []
    bar = tqdm(range(args.outer_steps), desc=f"{args.method}, outer steps")
    for _ in bar:
        total = 0.0
        for _ in range(args.tasks):
            support, query = episode(classes, args.ways, args.shots, generator)
            if args.method == "reptile":  # learns from all images, as its authors do
                support = [torch.cat(both) for both in zip(support, query, strict=True)]
            with optimizer.task():
                adapt(optimizer, support_loss, support, inner_steps)
                loss = query_loss(*query)
                loss.backward()
                total += loss.item() / args.tasks
        optimizer.outer_step()
        losses.append(total)
        bar.set_postfix(query=f"{np.mean(losses[-20:]):.3f}")
    return losses


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(description="Few-shot classification")
    parser.add_argument("--method", choices=METHODS, default="maml")
    parser.add_argument("--data", type=Path, help="omniglot28_1bit.npz")
    parser.add_argument(
        "--ways", type=int, help="classes of an episode (3; Omniglot: 5)"
    )
    parser.add_argument(
        "--shots", type=int, default=1, help="support images of a class"
    )
    parser.add_argument("--tasks", type=int, default=4, help="tasks of an outer step")
    parser.add_argument("--outer-steps", type=int, default=150)
    parser.add_argument("--test-episodes", type=int, default=600)
    parser.add_argument("--inner-lr", type=float, default=0.1)
    parser.add_argument("--outer-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the figure")
    args = parser.parse_args(arguments)
    args.ways = args.ways or (5 if args.data else 3)
    for name in ("shots", "tasks", "outer_steps"):
        if getattr(args, name) < 1:
            raise Problem(f"--{name.replace('_', '-')} must be at least 1")
    if args.test_episodes < 2:
        raise Problem("--test-episodes must be at least 2")
    return args


def main(arguments=None):
    """Learn, test on classes never seen, draw."""
    args = parse_arguments(arguments)
    seen, unseen = omniglot(args.data) if args.data else digits()
    if not 2 <= args.ways <= min(len(seen), len(unseen)):
        raise Problem(f"--ways must lie between 2 and {min(len(seen), len(unseen))}")
    torch.manual_seed(args.seed)
    features, head = network(seen[0].shape[-1], args.ways)
    model = nn.Sequential(features, head)
    parts = build(args.method, features, head, args.inner_lr, args.outer_lr)
    inner_steps = parts[1]
    count = args.test_episodes
    before = evaluate(parts, model, unseen, args, 2 * inner_steps, min(count, 100))
    train(parts, seen, args)
    after = evaluate(parts, model, unseen, args, 2 * inner_steps, count)

    figure, axes = plt.subplots(figsize=(6, 4))
    results = {}
    for name, table in (("untrained", before), (args.method, after)):
        mean = table.mean(0)
        half = 1.96 * table.std(0) / math.sqrt(len(table))
        axes.plot(mean, label=name)
        axes.fill_between(range(len(mean)), mean - half, mean + half, alpha=0.3)
        results[name] = mean[inner_steps].item(), half[inner_steps].item()
        print(
            f"{name:10s} {args.ways}-way {args.shots}-shot, unseen classes, {inner_steps} steps: "
            f"{results[name][0]:.1f} ± {results[name][1]:.1f} % ({len(table)} episodes)"
        )
    axes.axvline(inner_steps, color="gray", linestyle=":")
    axes.set(xlabel="adaptation steps", ylabel="test accuracy, %", title=args.method)
    axes.legend()
    figure.tight_layout()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output / f"few_shot_{args.method}.png", dpi=120)
    return results


if __name__ == "__main__":
    try:
        main()
    except Problem as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
