"""
Thirty-two few-shot tasks at once
=================================

A task shows five images of each of five digits, ordered from the smallest digit to the largest, and
asks which of the five other images are. Only a linear head on fixed random features is trained for
it, near an initialisation that all tasks share:

    g(y, x) = cross-entropy on the support images + exp(ρ)/2 ‖y − y_0‖²,    x = (y_0, ρ)

The initialisation y_0 and the log-penalty ρ are learned from the losses on query images. With
``tb.func`` the hypergradient is a function, and ``torch.func.vmap`` makes it one of all tasks
together. The first part compares that with a Python loop over the tasks; the second learns x by
``tb.func.task_gradient``, through the steps (MAML) and implicitly (iMAML).

    python examples/batched_tasks.py [--tasks 32] [--ways 5] [--shots 5] [--output DIR]
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.func import vmap
from torch.utils import _pytree as pytree
from tqdm import tqdm

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

QUERIES = 10  # images of a class
RULE = "sgd(lr=2.0, momentum=0.8)"
METHODS = {
    # name: options of task_gradient
    "MAML": {"estimator": "unrolled", "rule": RULE, "num_steps": 10},
    "iMAML": {"estimator": "cg(max_steps=10)", "rule": RULE, "num_steps": 30},
}


class Problem(Exception):
    """Bad input: one line for the user, exit code 2."""


def random_features(count):
    """Random ReLU features of the digits, of norm about 1, by class: to learn, to test."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(x.shape[1], count, generator=generator) / 4
    bias = torch.rand(count, generator=generator)
    h = torch.relu((x - x.mean(0)) @ weight + bias)
    h = (h - h.mean(0)) / (h.std(0) + 1e-6) / math.sqrt(count)
    by_class = [h[torch.tensor(labels == c)] for c in range(10)]
    return [rows[:100] for rows in by_class], [rows[100:] for rows in by_class]


def draw_tasks(classes, tasks, ways, shots, generator):
    """Support and query batches (features, labels), with a leading axis of tasks."""
    episodes = []
    for _ in range(tasks):
        chosen = torch.randperm(len(classes), generator=generator)[:ways].sort().values
        rows = []
        for c in chosen.tolist():
            order = torch.randperm(len(classes[c]), generator=generator)
            rows.append(classes[c][order[: shots + QUERIES]])
        episodes.append(torch.stack(rows))
    h = torch.stack(episodes)  # (tasks, ways, shots + queries, features)
    labels = torch.arange(ways)[:, None].expand(h.shape[:-1])
    return [
        (h[:, :, part].flatten(1, 2), labels[:, :, part].flatten(1))
        for part in (slice(0, shots), slice(shots, None))
    ]


def logits(head, h):
    """The linear head."""
    return h @ head["weight"] + head["bias"]


def query_loss(head, outer, batch):
    """Cross-entropy of one task: f."""
    h, labels = batch
    return F.cross_entropy(logits(head, h), labels)


def support_loss(head, outer, batch):
    """The same and the pull towards y_0: g of one task, strongly convex."""
    start, log_penalty = outer
    distance = sum(((head[name] - start[name]) ** 2).sum() for name in head)
    return query_loss(head, outer, batch) + log_penalty.exp() / 2 * distance


def initialisation(outer):
    """y_0, the part of x where adaptation begins."""
    return outer[0]


def compare(outer, support, query, repetitions):
    """All tasks at once against one after the other: (largest difference, their seconds)."""
    train = tb.func.unroll(RULE, num_steps=100)(support_loss)
    with torch.no_grad():
        heads = vmap(lambda batch: train(outer[0], outer, batch))(support)
    gradient = tb.func.hypergradient(support_loss, query_loss, "cg(max_steps=10)")

    def together():
        return vmap(gradient, in_dims=(0, None, 0, 0))(heads, outer, support, query)

    def one_by_one():
        tasks = range(len(support[1]))
        lanes = [
            pytree.tree_map(lambda t, i=i: t[i], (heads, support, query)) for i in tasks
        ]
        found = [gradient(head, outer, s, q) for head, s, q in lanes]
        return pytree.tree_map(lambda *each: torch.stack(each), *found)

    seconds = {together: [], one_by_one: []}
    for repetition in range(repetitions + 1):
        for function, measured in seconds.items():
            began = time.perf_counter()
            found = function()
            if repetition:  # the first warms up
                measured.append(time.perf_counter() - began)
    pairs = zip(
        pytree.tree_leaves(together()[0]), pytree.tree_leaves(found[0]), strict=True
    )
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    size = max(float(leaf.abs().max()) for leaf in pytree.tree_leaves(found[0]))
    unsolved = int((~found[1].converged).sum())
    medians = [statistics.median(measured) for measured in seconds.values()]
    print(
        f"vmap against loop, {len(support[1])} tasks: largest difference {difference:.1e} of "
        f"{size:.1e}; {unsolved} linear systems unsolved"
    )
    print(
        f"    {1e3 * medians[0]:.0f} ms together, {1e3 * medians[1]:.0f} ms one by one "
        f"(medians of {repetitions}, interleaved): ratio {medians[1] / medians[0]:.1f}"
    )
    return difference, seconds.values()


def evaluate(gradient, outer, support, query):
    """Query loss and accuracy of every task after adaptation."""
    heads = gradient.adapt(outer, support)
    z = vmap(logits)(heads, query[0])
    accuracy = 100 * (z.argmax(-1) == query[1]).float().mean(1)
    losses = vmap(F.cross_entropy)(z, query[1])
    return losses, accuracy


def learn(gradient, outer, classes, args):
    """Move x by Adam along the mean hypergradient; the query loss of every outer step."""
    generator = torch.Generator().manual_seed(args.seed + 1)
    start, log_penalty = pytree.tree_leaves(outer[0]), outer[1]
    groups = [{"params": start}, {"params": [log_penalty], "lr": 0.1}]
    optimizer = torch.optim.Adam(groups, lr=args.outer_lr)
    history = []
    for _ in tqdm(range(args.outer_steps), desc="outer steps"):
        tasks = draw_tasks(classes, args.tasks, args.ways, args.shots, generator)
        found, report = gradient(outer, *tasks)
        for leaf, g in zip(
            [*start, log_penalty], pytree.tree_leaves(found), strict=True
        ):
            leaf.grad = g
        optimizer.step()
        history.append(float(report.losses.mean()))
    return history


def parse_arguments(arguments):
    """The command line, checked."""
    parser = argparse.ArgumentParser(description="Few-shot tasks, all at once")
    parser.add_argument("--tasks", type=int, default=32, help="tasks at once")
    parser.add_argument("--ways", type=int, default=5, help="classes of a task")
    parser.add_argument("--shots", type=int, default=5, help="support images a class")
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--outer-steps", type=int, default=40)
    parser.add_argument("--outer-lr", type=float, default=0.01, help="of y_0")
    parser.add_argument("--test-tasks", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=5, help="of the timing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for the figure")
    args = parser.parse_args(arguments)
    for name in ("tasks", "shots", "features", "outer_steps", "repetitions"):
        if getattr(args, name) < 1:
            raise Problem(f"--{name.replace('_', '-')} must be at least 1")
    if not 2 <= args.ways <= 10:
        raise Problem("--ways must lie between 2 and 10, the number of digits")
    if args.shots > 60:
        raise Problem("--shots must be at most 60; a digit has 74 test images or more")
    if args.test_tasks < 2:
        raise Problem("--test-tasks must be at least 2")
    if not 0 < args.outer_lr < math.inf:
        raise Problem("--outer-lr must be a positive number")
    return args


def main(arguments=None):
    """Compare, learn, draw; returns the figures."""
    args = parse_arguments(arguments)
    seen, unseen = random_features(args.features)
    sizes = args.ways, args.shots
    generator = torch.Generator().manual_seed(args.seed)
    tasks = draw_tasks(seen, args.tasks, *sizes, generator)
    test = draw_tasks(unseen, args.test_tasks, *sizes, generator)

    def untrained():
        weight, bias = torch.zeros(args.features, args.ways), torch.zeros(args.ways)
        return {"weight": weight, "bias": bias}, torch.tensor(-2.0)

    difference, seconds = compare(untrained(), *tasks, args.repetitions)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.boxplot([[1e3 * s for s in part] for part in seconds])
    left.set_xticklabels(["vmap", "loop"])
    left.set(ylabel="ms", title=f"hypergradients of {args.tasks} tasks", ylim=(0, None))

    results = {"difference": difference}
    for name, options in METHODS.items():
        gradient = tb.func.task_gradient(
            support_loss, query_loss, initial=initialisation, **options
        )
        outer = untrained()
        before = evaluate(gradient, outer, *test)
        history = learn(gradient, outer, seen, args)
        after = evaluate(gradient, outer, *test)
        print(
            f"{name}: {options['num_steps']} steps of adaptation, {args.ways}-way "
            f"{args.shots}-shot, new images, {args.test_tasks} tasks; "
            f"learned penalty exp(ρ) = {outer[1].exp():.3f}"
        )
        for label, (losses, accuracy) in (("before", before), ("after", after)):
            half = 1.96 * accuracy.std() / math.sqrt(len(accuracy))
            print(
                f"    {label:6s} query loss {losses.mean():.3f}, "
                f"accuracy {accuracy.mean():.1f} ± {half:.1f} %"
            )
            results[name, label] = losses.mean().item(), accuracy.mean().item()
        right.plot(range(1, len(history) + 1), history, label=name)
    right.set(xlabel="outer step", ylabel="query loss", title="meta-learning")
    right.legend()
    figure.tight_layout()
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output / "batched_tasks.png", dpi=120)
    return results


if __name__ == "__main__":
    try:
        main()
    except (Problem, tb.BilevelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
