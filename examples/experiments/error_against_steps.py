"""Error of ITD, AID-FP and AID-CG against T, on ridge regression and on one number.

T gradient steps of size α = 1/L from zero; then ITD goes back through them, AID-FP takes T
fixed-point steps of the same size from zero, AID-CG T steps of conjugate gradients, all at y_T. On
ridge regression with a penalty for every coordinate the exact hypergradient is

    ∇_λΦ = −e^λ ∘ w* ∘ (XᵀX/n + diag e^λ)⁻¹ X_vᵀ(X_v w* − y_v)/m.

On g = ½eˣ(y − b)², f = f(y), it is zero, and with h = eˣ, q = 1 − αh the methods give

    ITD      −αh T q^(T−1) (y₀ − b) f'(y_T)
    AID-FP   −q^T (1 − q^T) (y₀ − b) f'(y_T)
    AID-CG   −q^T (y₀ − b) f'(y_T)

so that ITD's error has a factor T more.
"""

import math

import matplotlib
import numpy as np
import torch
from rows import grouped

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "error_against_steps"
METHODS = {
    "ITD": lambda steps, alpha: tb.Unrolled(),
    "AID-FP": lambda steps, alpha: tb.Implicit(
        tb.Richardson(steps, step_size=alpha, rtol=0.0), cross_calls=1
    ),
    "AID-CG": lambda steps, alpha: tb.Implicit(tb.CG(steps, rtol=0.0), cross_calls=1),
}


def configurations(args):
    ridge = (60, 20) if args.quick else (1000, 100)
    return [
        {"problem": problem, "examples": n, "features": d, "longest": longest}
        for problem, (n, d), longest in (
            ("ridge", ridge, 100 if args.quick else 400),
            ("one number", (1, 1), 100),
        )
    ]


class Ridge:
    """Validation data of other weights than the training data, so that f has a slope at y*."""

    def __init__(self, n, d, seed):
        rng = np.random.default_rng(seed)
        X, Xv = rng.normal(size=(2, n, d)) / np.arange(1, d + 1) ** 0.3
        w, noise = rng.normal(size=(2, d)), rng.normal(size=(2, n))
        t, tv = X @ w[0] + noise[0], Xv @ (w[0] + w[1]) + noise[1]
        lam = rng.normal(size=d) - 1.5
        H = X.T @ X / n + np.diag(np.exp(lam))
        best = np.linalg.solve(H, X.T @ t / n)
        r = Xv.T @ (Xv @ best - tv) / n
        self.exact = -np.exp(lam) * best * np.linalg.solve(H, r)
        self.alpha = 1 / np.linalg.eigvalsh(H)[-1]
        self.X, self.Xv, self.t, self.tv = map(torch.tensor, (X, Xv, t, tv))
        self.x = torch.tensor(lam, requires_grad=True)
        self.y = torch.zeros(d, dtype=torch.float64, requires_grad=True)

    def train_loss(self):
        """½ mean (Xy − t)² + ½ Σ e^λ y²."""
        penalty = (self.x.exp() * self.y**2).sum() / 2
        return ((self.X @ self.y - self.t) ** 2).mean() / 2 + penalty

    def valid_loss(self):
        """½ mean (X_v y − t_v)²."""
        return ((self.Xv @ self.y - self.tv) ** 2).mean() / 2


class OneNumber:
    """y₀ = 2, b = 0.7, f = y², x = 0.3 and α h = 0.1."""

    def __init__(self):
        self.alpha = 0.1 / math.exp(0.3)
        self.exact = np.zeros(1)
        self.x = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
        self.y = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)

    def train_loss(self):
        """½ eˣ(y − b)²."""
        return (self.x.exp() * (self.y - 0.7) ** 2).sum() / 2

    def valid_loss(self):
        """y²."""
        return (self.y**2).sum()


def law(T):
    """What the methods give on one number, in size."""
    q, distance = 0.9, 2.0 - 0.7
    common = distance * 2 * (0.7 + q**T * distance)  # (y₀ − b) f'(y_T)
    return {
        "ITD": 0.1 * T * q ** (T - 1) * common,
        "AID-FP": q**T * (1 - q**T) * common,
        "AID-CG": q**T * common,
    }


def measure(configuration, args):
    ridge = configuration["problem"] == "ridge"
    sizes = (configuration[key] for key in ("examples", "features", "seed"))
    problem = Ridge(*sizes) if ridge else OneNumber()
    optimizer = tb.BilevelOptimizer(
        inner=torch.optim.SGD([problem.y], lr=problem.alpha),
        outer=torch.optim.SGD([problem.x], lr=0.0),
        estimator="unrolled",
    )
    train_loss = optimizer.inner_loss(problem.train_loss)
    optimizer.outer_loss(problem.valid_loss)
    # From y₀ = 0 one step of ridge regression does not depend on λ: begin with two.
    shown = {round(10 ** (k / 10)) for k in range(3, 40)}
    rows = []
    for T in range(1, configuration["longest"] + 1):
        optimizer.zero_grad()
        train_loss().backward()
        optimizer.step()
        for name in METHODS if T in shown else ():
            method = METHODS[name](T, problem.alpha)
            (found,) = optimizer.hypergradient(estimator=method, write=False)
            error = np.linalg.norm(found.numpy() - problem.exact)
            if ridge:
                error /= np.linalg.norm(problem.exact)
            known = "" if ridge else law(T)[name]
            rows.append({"method": name, "T": T, "error": error, "law": known})
    return rows


def curves(rows):
    """(problem, method) → its rows."""
    return grouped(rows, "problem", "method")


def table(rows):
    """Error after some T, relative on ridge regression."""
    shown = (2, 5, 10, 20, 50, 100, 200, 398)
    return [
        {
            "problem": problem,
            "method": method,
            **{f"T = {T}": "" for T in shown},
            **{f"T = {r['T']}": f"{r['error']:.1e}" for r in part if r["T"] in shown},
        }
        for (problem, method), part in curves(rows).items()
    ]


def draw(rows, path):
    """Errors against T, with the laws on one number."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    colors = dict(zip(METHODS, ("tab:red", "tab:orange", "tab:blue"), strict=True))
    for (problem, method), part in curves(rows).items():
        left = problem == "ridge"
        axis = axes[0] if left else axes[1]
        steps = [row["T"] for row in part]
        style = {"color": colors[method], "label": method}
        axis.plot(steps, [row["error"] for row in part], "o", markersize=3, **style)
        if not left:
            axis.plot(steps, [row["law"] for row in part], color=colors[method])
    axes[0].set(title="ridge regression", ylabel="relative error")
    axes[1].set(title="one number (lines: closed form)", ylabel="error")
    for axis in axes:
        axis.set(xlabel="T", yscale="log")
        axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
