"""ANIL and the number N of inner steps, when the inner problem is strongly convex and when not.

Ji's thesis expects a larger N to help when only the last linear layer adapts (with a ridge term
the support loss is strongly convex in it) and to hurt when the last two layers adapt (not
convex). Here both cases have one network, convolutions - hidden layer - ReLU - head, and one
support loss (cross-entropy plus a ridge term on the head), so that only what adapts differs.

Step rules: a fixed step, and 1/(N L) with one constant L for both cases, 1/L being the fixed step:
the rules are the same run at N = 1, and a larger N cuts one step into N. The largest curvature of
the support loss at the start is printed beside L, for each case.

Cost: a task takes 3 N + 1 gradient computations: N inner gradients, N gradients of the steps
evaluated again and N products in the hypergradient (either case counts alike, although a gradient
of two layers costs more), and one gradient of the query loss. Every run of a seed starts from the
same network, sees the same episodes in the same order, and stops at the same budget of gradient
computations: runs of a small N make more outer steps. So the table also gives the training loss
after as many outer steps as the run of the largest N made.

    python tests/benchmarks/inner_steps.py [--data FILE.npz] [--budget 5000] [--output DIR]
"""

import argparse
import csv
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import torch_bilevel as tb

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import few_shot
import matplotlib.pyplot as plt

CASES = {"head": "head: strongly convex", "two": "last two layers: not convex"}
RULES = {"fixed": "fixed step", "1/(NL)": "step 1/(N L)"}


def gradients(inner_steps):
    """Gradient computations of a task."""
    return 3 * inner_steps + 1


class Learner:
    """One case of ANIL: the network, the two losses and the optimizer."""

    def __init__(self, case, inner_lr, size, seed, args):
        torch.manual_seed(seed)
        features, wide = few_shot.network(size, args.ways)
        hidden = nn.Linear(wide.in_features, args.hidden)
        head = nn.Linear(args.hidden, args.ways)
        self.model = nn.Sequential(features, hidden, nn.ReLU(), head)
        layers = (head,) if case == "head" else (hidden, head)
        self.adapted = [p for layer in layers for p in layer.parameters()]
        self.optimizer = tb.ANIL(
            torch.optim.SGD(self.adapted, lr=inner_lr),
            torch.optim.Adam(self.model.parameters(), lr=args.outer_lr),
        )

        def regularized(x, y):
            ridge = sum(p.square().sum() for p in head.parameters())
            return F.cross_entropy(self.model(x), y) + args.ridge / 2 * ridge

        self.plain = regularized
        self.support_loss = self.optimizer.inner_loss(regularized)
        self.query_loss = self.optimizer.outer_loss(
            lambda x, y: F.cross_entropy(self.model(x), y)
        )

    def outer_step(self, episodes, inner_steps):
        """Learn from some tasks; their mean query loss."""
        total = 0.0
        for support, query in episodes:
            with self.optimizer.task():
                few_shot.adapt(self.optimizer, self.support_loss, support, inner_steps)
                loss = self.query_loss(*query)
                loss.backward()
            total += loss.item() / len(episodes)
        self.optimizer.outer_step()
        return total

    def test(self, episodes, inner_steps):
        """Query loss and accuracy (%) of each episode after adaptation."""
        table = []
        for support, (x, y) in episodes:
            with self.optimizer.task(record=False):
                few_shot.adapt(self.optimizer, self.support_loss, support, inner_steps)
                with torch.no_grad():
                    out = self.model(x)
                right = (out.argmax(1) == y).float().mean().item()
                table.append((F.cross_entropy(out, y).item(), 100 * right))
        return np.array(table)

    def curvature(self, support, iterations=30):
        """Largest eigenvalue, in size, of the support loss's Hessian in what adapts."""
        first = torch.autograd.grad(
            self.plain(*support), self.adapted, create_graph=True
        )
        vector = [torch.randn_like(p) for p in self.adapted]
        norm = 0.0
        for _ in range(iterations):
            norm = sum(v.square().sum() for v in vector).sqrt()
            vector = [v / norm for v in vector]
            vector = torch.autograd.grad(first, self.adapted, vector, retain_graph=True)
        return float(sum(v.square().sum() for v in vector).sqrt())


def stream(classes, count, seed, args):
    """The first episodes of a seed."""
    generator = torch.Generator().manual_seed(seed)
    return [
        few_shot.episode(classes, args.ways, args.shots, generator)
        for _ in range(count)
    ]


def run(case, inner_lr, inner_steps, seed, seen, unseen, args):
    """Train within the budget; losses, (cost, held-out loss) along the way, final test,
    seconds, and the curvature of the support loss after training.
    """
    learner = Learner(case, inner_lr, seen[0].shape[-1], seed, args)
    generator = torch.Generator().manual_seed(seed)
    test = stream(unseen, args.test_episodes, seed + 1000, args)
    cost = args.tasks * gradients(inner_steps)
    steps = args.budget // cost
    stops = {round(steps * k / args.tests) for k in range(args.tests)}
    losses, held_out, seconds = [], [], 0.0
    for step in range(steps):
        if step in stops:
            few = learner.test(test[: args.test_episodes // 4], inner_steps)
            held_out.append((step * cost, few[:, 0].mean()))
        episodes = [
            few_shot.episode(seen, args.ways, args.shots, generator)
            for _ in range(args.tasks)
        ]
        began = time.perf_counter()
        losses.append(learner.outer_step(episodes, inner_steps))
        seconds += time.perf_counter() - began
    final = learner.test(test, inner_steps)
    held_out.append((steps * cost, final[:, 0].mean()))
    support = [s for s, _ in stream(seen, 5, seed, args)]
    curvature = np.mean([learner.curvature(s) for s in support])
    return np.array(losses), np.array(held_out), final, seconds, curvature


def smoothed(losses, cost, width):
    """Means over the last ``width`` gradient computations, with the cost they end at."""
    span = max(1, round(width / cost))
    total = np.cumsum(np.concatenate([[0.0], losses]))
    end = np.arange(span, len(losses) + 1)
    return end * cost, (total[end] - total[end - span]) / span


def report(results, args):
    """Print the table; its rows."""
    largest = args.budget // (args.tasks * gradients(max(args.steps)))
    rows = []
    print(
        f"\n{'adapts':7s}{'step rule':10s}{'N':>3s}{'step':>7s}{'outer steps':>12s}"
        f"{'train loss':>15s}{f'at {largest} outer':>14s}{'held-out loss':>16s}"
        f"{'accuracy, %':>14s}{'gradients':>10s}{'seconds':>8s}{'curvature':>14s}"
    )
    for (case, rule, n), (inner_lr, runs) in results.items():
        last = [r[0][-max(1, len(r[0]) // 10) :].mean() for r in runs]
        near = slice(max(0, largest - max(1, largest // 5)), largest)
        same = [r[0][near].mean() for r in runs]
        tests = [r[2][:, 0].mean() for r in runs]
        accuracy = np.concatenate([r[2][:, 1] for r in runs])
        half = 1.96 * accuracy.std() / len(accuracy) ** 0.5
        steps = len(runs[0][0])
        cost = steps * args.tasks * gradients(n)
        seconds = np.median([r[3] for r in runs])
        bends = [r[4] for r in runs]
        rows.append(
            (case, rule, n, inner_lr, steps, np.mean(last), np.std(last))
            + (np.mean(same), np.mean(tests), np.std(tests), accuracy.mean(), half)
            + (cost, seconds, np.median(bends), max(bends))
        )
        print(
            f"{case:7s}{rule:10s}{n:3d}{inner_lr:7.3f}{steps:12d}"
            f"{f'{np.mean(last):.3f} ± {np.std(last):.3f}':>15s}{np.mean(same):14.3f}"
            f"{f'{np.mean(tests):.3f} ± {np.std(tests):.3f}':>16s}"
            f"{f'{accuracy.mean():.1f} ± {half:.1f}':>14s}{cost:10d}{seconds:8.1f}"
            f"{f'{np.median(bends):.0f} ({max(bends):.0f})':>14s}"
        )
    print(
        "losses: mean ± standard deviation over seeds (train: last tenth of the outer steps; "
        f"'at {largest} outer': the\nfifth of them before outer step {largest}); "
        "accuracy: 95 % interval over held-out episodes of all seeds; seconds of\n"
        "training, median of seeds; curvature: of the support loss after training, median and "
        "largest of seeds"
    )
    return rows


def draw(results, args, where):
    """Four panels: outer loss against gradient computations."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex=True, sharey=True)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(args.steps)))
    width = args.budget / 10
    for (case, rule, n), (_, runs) in results.items():
        axis = axes[list(CASES).index(case), list(RULES).index(rule)]
        color = colors[args.steps.index(n)]
        cost = args.tasks * gradients(n)
        curves = [smoothed(r[0], cost, width) for r in runs]
        x, mean = curves[0][0], np.mean([c[1] for c in curves], axis=0)
        axis.plot(x, mean, color=color, label=f"N = {n}")
        held_out = np.mean([r[1] for r in runs], axis=0)
        axis.plot(*held_out.T, "o:", color=color, markersize=4, linewidth=1)
        axis.set_title(f"{CASES[case]}, {RULES[rule]}", fontsize=11)
    for axis in axes.flat:
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
    for axis in axes[1]:
        axis.set_xlabel("gradient computations")
    for axis in axes[:, 0]:
        axis.set_ylabel("query loss")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles += [
        plt.Line2D([], [], color="gray"),
        plt.Line2D([], [], color="gray", linestyle=":", marker="o", markersize=4),
    ]
    labels += ["training classes, smoothed", "unseen classes"]
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(where / "inner_steps.png", dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="omniglot28_1bit.npz (else digits)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 3, 5, 10])
    parser.add_argument("--budget", type=int, default=5000, help="gradients of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=4, help="tasks of an outer step")
    parser.add_argument("--ways", type=int, help="3; Omniglot: 5")
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--ridge", type=float, default=0.1)
    parser.add_argument("--inner-lr", type=float, default=0.1, help="the fixed step")
    parser.add_argument("--outer-lr", type=float, default=3e-3)
    parser.add_argument("--tests", type=int, default=5, help="tests along the way")
    parser.add_argument("--test-episodes", type=int, default=120, help="of each seed")
    parser.add_argument("--output", type=Path, help="folder for the figure and tables")
    args = parser.parse_args()
    args.ways = args.ways or (5 if args.data else 3)
    args.steps = sorted(set(args.steps))
    if args.budget < args.tasks * gradients(args.steps[-1]) * args.tests:
        parser.error("--budget is too small for the largest of --steps")

    # hidden units that no support image of a task switches on have a hypergradient of zero
    warnings.simplefilter("ignore", tb.ZeroHypergradientWarning)
    seen, unseen = few_shot.omniglot(args.data) if args.data else few_shot.digits()
    print(
        f"{args.ways}-way {args.shots}-shot, {args.tasks} tasks an outer step, ridge "
        f"{args.ridge}; {len(seen)} training and {len(unseen)} unseen classes\n"
        f"fixed step {args.inner_lr}; L = {1 / args.inner_lr:g}"
    )
    for case in CASES:
        learner = Learner(case, args.inner_lr, seen[0].shape[-1], 0, args)
        support = [s for s, _ in stream(seen, 5, 0, args)]
        values = [learner.curvature(s) for s in support]
        print(f"largest curvature at the start, {case}: {np.mean(values):.2f}")

    results = {}
    plan = [
        (seed, case, n, rule)
        for seed in range(args.seeds)
        for case in CASES
        for n in args.steps
        for rule in RULES
    ]
    for seed, case, n, rule in tqdm(plan, disable=None):
        lr = args.inner_lr / (1 if rule == "fixed" else n)
        runs = results.setdefault((case, rule, n), (lr, []))[1]
        if rule != "fixed" and n == 1:  # the same run
            runs.append(results[case, "fixed", n][1][-1])
        else:
            runs.append(run(case, lr, n, seed, seen, unseen, args))
    order = [(c, r, n) for c in CASES for r in RULES for n in args.steps]
    results = {key: results[key] for key in order}
    rows = report(results, args)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        with open(args.output / "inner_steps.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                "adapts rule N step outer_steps train_loss train_std train_loss_same_steps "
                "held_out_loss held_out_std accuracy interval gradients seconds "
                "curvature curvature_largest".split()
            )
            writer.writerows(rows)
        draw(results, args, args.output)


if __name__ == "__main__":
    main()
