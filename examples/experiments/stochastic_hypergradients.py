"""SID: error of the hypergradient against the number of samples, four schedules.

An ℓ2-regularised logistic regression on digits (two classes); K = J products, batches of one tenth.
Constant steps fall fast and stop at a plateau, decreasing steps go on as 1/K; "batch" is the
deterministic fixed point iteration with as many passes as the samples pay for; "mixed" lets steps
decrease more slowly (half after K/2).
"""

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "stochastic_hypergradients"
BATCHES = 10
SCHEDULES = {
    "batch": lambda K: f"richardson(max_steps={max(1, K // BATCHES)}, rtol=0.0)",
    "constant": lambda K: f"sid(num_steps={K}, cross_batches={K}, decay=None)",
    "decreasing": lambda K: f"sid(num_steps={K}, cross_batches={K}, decay=20.0)",
    "mixed": lambda K: f"sid(num_steps={K}, cross_batches={K}, decay={K / 2})",
}


def configurations(args):
    counts = [20, 80] if args.quick else [10, 20, 40, 80, 160, 320, 640]
    runs = 12 if args.quick else 20
    return [
        {"schedule": schedule, "K": K, "runs": 1 if schedule == "batch" else runs}
        for schedule in SCHEDULES
        for K in counts
    ]


def measure(configuration, args):
    torch.set_default_dtype(torch.float64)  # run.py puts it back
    images, labels = load_digits(n_class=2, return_X_y=True)
    rng = np.random.default_rng(configuration["seed"])
    order = rng.permutation(len(images))
    X = torch.tensor(images[order] / 16)
    t = torch.tensor(labels[order] * 2.0 - 1)
    (X, Xv), (t, tv) = (part.split([300, len(part) - 300]) for part in (X, t))
    w = torch.zeros(64, requires_grad=True)
    penalty = torch.full((64,), -2.0, requires_grad=True)  # log, one per pixel

    def loss(x, target):
        fit = F.softplus(-target * (x @ w)).mean()
        return fit + (penalty.exp() * w**2).sum() / 2

    newton = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-13, tolerance_change=0
    )

    def closure():
        newton.zero_grad()
        value = loss(X, t)
        value.backward(inputs=[w])
        return value

    newton.step(closure)
    optimizer = tb.BilevelOptimizer(
        inner=torch.optim.SGD([w], lr=0.0),  # at the minimum already
        outer=torch.optim.SGD([penalty], lr=0.0),
        estimator="direct",
    )
    batches = tb.Batches((X, t), len(X) // BATCHES)
    train_loss = optimizer.inner_loss(loss, data=batches)
    optimizer.outer_loss(lambda: F.softplus(-tv * (Xv @ w)).mean())
    optimizer.zero_grad()
    train_loss(X, t).backward()
    optimizer.step()
    (exact,) = optimizer.hypergradient(write=False)
    estimator = SCHEDULES[configuration["schedule"]](configuration["K"])
    errors = [
        (optimizer.hypergradient(estimator=estimator, write=False)[0] - exact)
        .square()
        .sum()
        for _ in range(configuration["runs"])
    ]
    size = exact.square().sum()
    return [{"error": float(torch.stack(errors).mean() / size)}]


def table(rows):
    """Relative mean squared error."""
    return [
        {
            "schedule": schedule,
            **{
                f"K = {row['K']}": f"{row['error']:.1e}"
                for row in rows
                if row["schedule"] == schedule
            },
        }
        for schedule in SCHEDULES
    ]


def draw(rows, path):
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for schedule in SCHEDULES:
        part = [row for row in rows if row["schedule"] == schedule]
        axes.loglog(*zip(*((r["K"], r["error"]) for r in part), strict=True), "o-")
    axes.legend(SCHEDULES)
    axes.set(xlabel="K = J (batches of one tenth)", ylabel="relative squared error")
    figure.savefig(path, dpi=120)
    plt.close(figure)
