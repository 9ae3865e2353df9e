"""Hypergradients of many few-shot heads: vmap against a loop and against batched formulas.

    python tests/benchmarks/batched.py [--tasks 32] [--threads 1] [--repeats 9]

For every task, penalised softmax regression on 512 features and the derivative of a validation
loss with respect to the log of the penalty, by a fixed number of steps of CG. The formulas are
written by hand for these losses, on tensors with a dimension of tasks. Medians of interleaved runs.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import torch_bilevel as tb

SIZES = [
    (25, 5, 10),
    (75, 5, 10),
    (100, 10, 10),
    (100, 5, 20),
]  # examples, classes, steps


def inner_loss(W, log_penalty, batch):
    # W * W, for the second derivative of W**2 costs three times as much
    x, t = batch
    return F.cross_entropy(x @ W.mT, t) + log_penalty.exp() / 2 * (W * W).sum()


def outer_loss(W, log_penalty, batch):
    x, t = batch
    return F.cross_entropy(x @ W.mT, t)


def by_hand(W, log_penalty, train, valid, steps):
    """The same by formulas for all tasks at once."""
    x, t = train
    n, penalty = x.shape[1], log_penalty.exp()
    p = torch.softmax(x @ W.mT, -1)

    def product(V):
        z = x @ V.mT
        return (p * (z - (p * z).sum(-1, keepdim=True))).mT @ x / n + penalty * V

    off = torch.softmax(valid[0] @ W.mT, -1)
    off.scatter_add_(2, valid[1][..., None], -torch.ones_like(off[..., :1]))
    r = off.mT @ valid[0] / n  # ∂_y f
    v, q, rr = torch.zeros_like(r), r, (r * r).sum((1, 2))
    for _ in range(steps):
        Aq = product(q)
        alpha = (rr / (q * Aq).sum((1, 2)))[:, None, None]
        v, r = v + alpha * q, r - alpha * Aq
        rr, before = (r * r).sum((1, 2)), rr
        q = r + (rr / before)[:, None, None] * q
    return -(penalty * W * v).sum((1, 2))


def ways(tasks, examples, classes, steps, features=512):
    """Three ways to compute the same numbers."""
    torch.manual_seed(0)
    scale = 4 / features**0.5

    def batch():
        x = scale * torch.randn(tasks, examples, features)
        return x, torch.randint(classes, (tasks, examples))

    W, penalty = 0.1 * torch.randn(tasks, classes, features), torch.tensor(-2.0)
    train, valid = batch(), batch()
    h = tb.func.hypergradient(
        inner_loss, outer_loss, f"cg(max_steps={steps}, rtol=0.0)"
    )

    def one(W, train, valid):
        return h(W, penalty, train, valid)[0]

    def loop():
        rows = zip(W, *train, *valid, strict=True)
        return torch.stack([one(w, (a, b), (c, d)) for w, a, b, c, d in rows])

    return {
        "vmap": lambda: torch.func.vmap(one)(W, train, valid),
        "loop": loop,
        "formulas": lambda: by_hand(W, penalty, train, valid, steps),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, {options.threads} threads, {options.tasks} tasks"
    )
    for examples, classes, steps in SIZES:
        made = ways(options.tasks, examples, classes, steps)
        exact = made["formulas"]()
        off = {
            k: float((run() - exact).abs().max() / exact.abs().max())
            for k, run in made.items()
        }
        seconds = {name: [] for name in made}
        for _ in range(options.repeats):
            for name, run in made.items():
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
        ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
        print(
            f"{examples} examples, {classes} classes, {steps} steps: "
            + ", ".join(f"{name} {value:.1f} ms" for name, value in ms.items())
            + f"; loop/vmap {ms['loop'] / ms['vmap']:.1f}, vmap/formulas "
            f"{ms['vmap'] / ms['formulas']:.2f}; off by {max(off.values()):.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
