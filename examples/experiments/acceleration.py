"""Outer steps against the condition number: AccBiO's query points and plain gradient descent.

    Φ(x) = ½ xᵀ D x − cᵀ x,  eigenvalues of D log-spaced from 1/κ to 1,    y*(x) = x

Gradient descent needs about κ log(1/ε) outer steps, AccBiO √κ log(1/ε).
"""

import matplotlib
import torch

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "acceleration"
# estimator (κ) and outer learning rate: α ≤ 1/(2 L) for AccBiO, 1/L for gradient descent
METHODS = {
    "gradient descent": (lambda kappa: tb.estimator("identity(scale=1.0)"), 1.0),
    "AccBiO": (lambda kappa: tb.Accelerated("identity(scale=1.0)", 1 / kappa), 0.5),
    "AccBiO, μ unknown": (lambda kappa: tb.Accelerated("identity(scale=1.0)"), 0.5),
}


def configurations(args):
    kappas = [5, 20] if args.quick else [10, 30, 100, 300, 1000]
    return [{"method": m, "kappa": kappa} for m in METHODS for kappa in kappas]


def measure(configuration, args):
    make, lr = METHODS[configuration["method"]]
    kappa = configuration["kappa"]
    torch.set_default_dtype(torch.float64)  # run.py puts it back
    D = torch.logspace(0, -torch.log10(torch.tensor(float(kappa))).item(), 20)
    c = D * torch.linspace(1, 2, 20)
    x, y = (torch.zeros(20, requires_grad=True) for _ in range(2))
    optimizer = tb.BilevelOptimizer(
        inner=torch.optim.SGD([y], lr=1.0),  # one step solves the inner problem
        outer=torch.optim.SGD([x], lr=lr),
        estimator=make(kappa),
        inner_steps=1,
    )
    train_loss = optimizer.inner_loss(lambda: ((y - x) ** 2).sum() / 2)
    optimizer.outer_loss(lambda: (D * y**2).sum() / 2 - c @ y)
    best, steps = c / D, 0
    while torch.linalg.vector_norm(x.detach() - best) > 1e-6 * best.norm():
        optimizer.zero_grad()
        train_loss().backward()
        optimizer.step()
        steps += 1
    return [{"steps": steps}]


def table(rows):
    """Outer steps to 1e-6, and the slope of their logarithm in log κ."""
    found = []
    for method in METHODS:
        part = [row for row in rows if row["method"] == method]
        kappa, steps = (
            torch.tensor([float(row[key]) for row in part]).log()
            for key in ("kappa", "steps")
        )
        slope = (steps[-1] - steps[-2]) / (kappa[-1] - kappa[-2])
        counts = {f"κ = {row['kappa']}": row["steps"] for row in part}
        found.append({"method": method, **counts, "slope at the end": f"{slope:.2f}"})
    return found


def draw(rows, path):
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for method in METHODS:
        part = [row for row in rows if row["method"] == method]
        axes.loglog(*zip(*((r["kappa"], r["steps"]) for r in part), strict=True), "o-")
    axes.legend(METHODS)
    axes.set(xlabel="κ", ylabel="outer steps to 1e-6")
    figure.savefig(path, dpi=120)
    plt.close(figure)
