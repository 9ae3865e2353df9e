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
    (100, 20, 20),
]  # examples, classes, steps
LOG_PENALTY = torch.tensor(-6.0)  # of which 20 steps do not reach rounding


def penalty(W, log_penalty):
    # W * W, for the second derivative of W**2 costs three times as much
    return log_penalty.exp() / 2 * (W * W).sum()


def plain(W, x, t):
    return F.cross_entropy(x @ W.mT, t)


def fused(W, x, t):
    return tb.ops.linear_cross_entropy(x, W, None, t)


def by_hand(W, log_penalty, train, valid, steps, outputs):
    """The same by formulas for all tasks at once; arrays of outputs are (tasks, n, c)."""
    x, t = train
    n, penalty = x.shape[1], log_penalty.exp()
    p = torch.softmax(outputs(x, W), -1)

    def product(V):
        z = outputs(x, V)
        return (p * (z - (p * z).sum(-1, keepdim=True))).mT @ x / n + penalty * V

    off = torch.softmax(outputs(valid[0], W), -1)
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
    """Ways to compute the same numbers."""
    torch.manual_seed(0)
    scale = 4 / features**0.5

    def batch():
        x = scale * torch.randn(tasks, examples, features)
        return x, torch.randint(classes, (tasks, examples))

    W = 0.1 * torch.randn(tasks, classes, features)
    train, valid = batch(), batch()

    def one(loss):
        h = tb.func.hypergradient(
            lambda W, s, batch: loss(W, *batch) + penalty(W, s),
            lambda W, s, batch: loss(W, *batch),
            f"cg(max_steps={steps}, rtol=0.0)",
        )
        return lambda W, train, valid: h(W, LOG_PENALTY, train, valid)[0]

    def loop(one):
        rows = zip(W, *train, *valid, strict=True)
        return torch.stack([one(w, (a, b), (c, d)) for w, a, b, c, d in rows])

    given = W, LOG_PENALTY, train, valid, steps
    plainly, fusing = one(plain), one(fused)
    return {
        "loop": lambda: loop(plainly),
        "vmap": lambda: torch.func.vmap(plainly)(W, train, valid),
        "formulas": lambda: by_hand(*given, lambda x, W: x @ W.mT),
        "loop, ops": lambda: loop(fusing),
        "vmap, ops": lambda: torch.func.vmap(fusing)(W, train, valid),
        "formulas, W xᵀ": lambda: by_hand(*given, lambda x, W: (W @ x.mT).mT),
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
        off = max(float((run() - exact).abs().max()) for run in made.values())
        seconds = {name: [] for name in made}
        for _ in range(options.repeats):
            for name, run in made.items():
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)
        ms = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
        print(f"{examples} examples, {classes} classes, {steps} steps")
        print("   ", ", ".join(f"{name} {value:.1f} ms" for name, value in ms.items()))
        for more, formulas in (("", "formulas"), (", ops", "formulas, W xᵀ")):
            vmap = ms["vmap" + more]
            print(
                f"    vmap{more}: loop/vmap {ms['loop' + more] / vmap:.1f}, "
                f"vmap/formulas {vmap / ms[formulas]:.2f}"
            )
        print(f"    off by {off / float(exact.abs().max()):.0e}", flush=True)


if __name__ == "__main__":
    main()
