"""Omniglot, N-way K-shot: MAML and ANIL of this library beside MAML written with `higher`.

Every method starts from the same network and sees the same episodes; their outer steps are
interleaved in one process, so that seconds can be compared. Every few hundred tasks each is
tested on the same unseen classes.

    python tests/benchmarks/omniglot.py --data FILE.npz [--tasks 4000] [--output DIR]
"""

import argparse
import copy
import csv
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import few_shot

METHODS = ("maml", "anil", "higher")


class Ours:
    """A method of ``examples/few_shot.py``."""

    def __init__(self, method, features, head, args):
        self.parts = few_shot.build(
            method, features, head, args.inner_lr, args.outer_lr
        )
        self.outer = self.parts[0].outer

    def outer_step(self, episodes):
        optimizer, inner_steps, support_loss, query_loss = self.parts
        for support, query in episodes:
            with optimizer.task():
                few_shot.adapt(optimizer, support_loss, support, inner_steps)
                query_loss(*query).backward()
        optimizer.outer_step()


class Higher:
    """The same outer step as `higher`'s documentation writes it."""

    def __init__(self, features, head, args):
        import higher

        self.higher = higher
        self.model = nn.Sequential(features, head)
        self.inner = torch.optim.SGD(self.model.parameters(), lr=args.inner_lr)
        self.outer = torch.optim.Adam(self.model.parameters(), lr=args.outer_lr)
        self.inner_steps = few_shot.METHODS["maml"][1]

    def outer_step(self, episodes):
        self.outer.zero_grad()
        for (x, y), (query_x, query_y) in episodes:
            with self.higher.innerloop_ctx(
                self.model, self.inner, copy_initial_weights=False
            ) as (net, optimizer):
                for _ in range(self.inner_steps):
                    optimizer.step(F.cross_entropy(net(x), y))
                loss = F.cross_entropy(net(query_x), query_y) / len(episodes)
                loss.backward()
        self.outer.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tasks", type=int, default=4000, help="tasks in all")
    parser.add_argument("--batch", type=int, default=4, help="tasks of an outer step")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--inner-lr", type=float, default=0.4)
    parser.add_argument("--outer-lr", type=float, default=3e-3)
    parser.add_argument("--cosine", action="store_true", help="decay the outer lr")
    parser.add_argument(
        "--average",
        type=float,
        default=0.0,
        metavar="DECAY",
        help="test an exponential average of the initialisation",
    )
    parser.add_argument("--rotate", action="store_true", help="rotated classes too")
    parser.add_argument("--every", type=int, default=500, help="tasks between tests")
    parser.add_argument("--test-episodes", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    seen, unseen = few_shot.omniglot(args.data)
    if args.rotate:
        seen = [rows.rot90(k, (2, 3)) for rows in seen for k in range(4)]
    torch.manual_seed(args.seed)
    start = few_shot.network(seen[0].shape[-1], args.ways)
    learners, testers = {}, {}
    for method in args.methods:
        features, head = copy.deepcopy(start)
        make = (Higher,) if method == "higher" else (Ours, method)
        learners[method] = make[0](*make[1:], features, head, args)
        kind = "maml" if method == "higher" else method
        parts = few_shot.build(kind, features, head, args.inner_lr, args.outer_lr)
        testers[method] = parts, nn.Sequential(features, head)
    steps = args.tasks // args.batch
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(learner.outer, steps)
        for learner in learners.values()
        if args.cosine
    ]
    averages = {}
    if args.average:
        decay = get_ema_multi_avg_fn(args.average)
        for method, (_, model) in testers.items():
            averages[method] = AveragedModel(model, multi_avg_fn=decay)
    generator = torch.Generator().manual_seed(args.seed)
    seconds = dict.fromkeys(learners, 0.0)
    rows = []

    def test(tasks, episodes):
        for method, (parts, model) in testers.items():
            present = copy.deepcopy(model.state_dict())
            if averages:
                model.load_state_dict(averages[method].module.state_dict())
            table = few_shot.evaluate(parts, model, unseen, args, parts[1], episodes)
            model.load_state_dict(present)
            final = table[:, -1]
            half = float(1.96 * final.std() / len(final) ** 0.5)
            rows.append((tasks, method, float(final.mean()), half, seconds[method]))
            print(
                f"{tasks:6d} tasks  {method:7s} {rows[-1][2]:5.1f} ± {half:.1f} %  "
                f"{seconds[method] / max(tasks, 1):.3f} s a task",
                flush=True,
            )

    for step in tqdm(range(steps), disable=None):
        if step * args.batch % args.every < args.batch:
            test(step * args.batch, 100)
        episodes = [
            few_shot.episode(seen, args.ways, args.shots, generator)
            for _ in range(args.batch)
        ]
        for method, learner in learners.items():
            began = time.perf_counter()
            learner.outer_step(episodes)
            seconds[method] += time.perf_counter() - began
            if averages:
                averages[method].update_parameters(testers[method][1])
        for schedule in schedules:
            schedule.step()
    test(steps * args.batch, args.test_episodes)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        with open(args.output / "omniglot.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("tasks", "method", "accuracy", "interval", "seconds"))
            writer.writerows(rows)


if __name__ == "__main__":
    main()
