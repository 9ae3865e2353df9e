"""Ehrhardt-Roberts least squares: hypergradient error against steps of the linear solver.

    Φ(w) = ‖A x(w) − b‖²,    x(w) = argmin_x ‖C w + D x − e‖²,
    ∇Φ = −(2 DᵀC)ᵀ (2 DᵀD)⁻¹ 2 Aᵀ(A x − b)

at w = 1, from inner solutions of so many heavy-ball steps. The inner Hessian is constant, so the
a-posteriori bound is ‖J‖ r/μ + ‖J‖ L_f ‖∇_x g‖/μ², with r the residual of the linear system.
"""

import matplotlib
import numpy as np
import torch
from rows import grouped

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "least_squares"
SOLVERS = {
    "GD": lambda n, mu, L: tb.Richardson(n, step_size=2 / (L + mu), rtol=0.0),
    "HB": lambda n, mu, L: tb.HeavyBall(n, lower=mu, upper=L, rtol=0.0),
    "CG": lambda n, mu, L: tb.CG(n, rtol=0.0),
}
COLORS = {"GD": "tab:orange", "HB": "tab:green", "CG": "tab:blue"}
STEPS = [*range(1, 16), 20, 25, 30, 40, 50, 60, 80, 100, 120, 150, 200]


def configurations(args):
    inner = [40] if args.quick else [20, 40, 60, 80, 100]
    longest = 50 if args.quick else 200
    return [
        {"size": 1000, "inner_steps": steps, "solver": solver, "longest": longest}
        for steps in [*inner, "exact"]
        for solver in SOLVERS
    ]


class Problem:
    """The data, and what is known in closed form."""

    def __init__(self, size, seed, n=10):
        rng = np.random.default_rng(seed)
        self.A, self.C, self.D = rng.uniform(size=(3, size, n))
        noise = 0.01 * rng.normal(size=(2, size))
        self.b = self.A @ rng.uniform(size=n) + noise[0]
        self.e = self.C @ rng.uniform(size=n) + self.D @ rng.uniform(size=n) + noise[1]
        self.w = np.ones(n)
        self.H, self.J = 2 * self.D.T @ self.D, 2 * self.C.T @ self.D
        self.J_norm, self.L_f = (
            np.linalg.norm(self.J, 2),
            2 * np.linalg.norm(self.A, 2) ** 2,
        )
        self.mu, *_, self.L = np.linalg.eigvalsh(self.H)
        self.x = np.linalg.lstsq(self.D, self.e - self.C @ self.w, rcond=None)[0]
        outer = 2 * self.A.T @ (self.A @ self.x - self.b)
        self.exact = -self.J @ np.linalg.solve(self.H, outer)

    def bound(self, x, residual):
        """Of the hypergradient's error at x, where ‖∂_y f − H v‖ = residual·‖∂_y f‖."""
        norm = np.linalg.norm
        r = residual * norm(2 * self.A.T @ (self.A @ x - self.b))
        inner = norm(2 * self.D.T @ (self.C @ self.w + self.D @ x - self.e))
        return self.J_norm * (r / self.mu + self.L_f * inner / self.mu**2)


def measure(configuration, args):
    problem = Problem(configuration["size"], configuration["seed"])
    L, mu = problem.L, problem.mu
    A, b, C, D, e = map(
        torch.tensor, (problem.A, problem.b, problem.C, problem.D, problem.e)
    )
    w = torch.tensor(problem.w, requires_grad=True)
    exact = configuration["inner_steps"] == "exact"
    start = problem.x if exact else np.zeros_like(problem.x)
    x = torch.tensor(start, requires_grad=True)

    # heavy ball:  α = 4/(√L + √μ)²,  β = ((√L − √μ)/(√L + √μ))²
    alpha = 4 / (L**0.5 + mu**0.5) ** 2
    beta = ((L**0.5 - mu**0.5) / (L**0.5 + mu**0.5)) ** 2
    optimizer = tb.BilevelOptimizer(
        inner=torch.optim.SGD([x], lr=alpha, momentum=beta),
        outer=torch.optim.SGD([w], lr=0.0),
    )
    train_loss = optimizer.inner_loss(lambda: ((C @ w + D @ x - e) ** 2).sum())
    optimizer.outer_loss(lambda: ((A @ x - b) ** 2).sum())
    for _ in range(1 if exact else configuration["inner_steps"]):
        optimizer.zero_grad()
        train_loss().backward()
        optimizer.step()

    rows, size = [], np.linalg.norm(problem.exact)
    for steps in [k for k in STEPS if k <= configuration["longest"]]:
        solver = SOLVERS[configuration["solver"]](steps, mu, L)
        # J is the same at every recorded step: that of the last one will do.
        estimator = tb.Implicit(solver, cross_calls=1)
        (found,) = optimizer.hypergradient(estimator=estimator, write=False)
        residual = float(optimizer.last_report.residual)
        error = np.linalg.norm(found.numpy() - problem.exact)
        bound = problem.bound(x.detach().numpy(), residual)
        rows.append(
            {
                "steps": steps,
                "residual": residual,
                "error": error / size,
                "bound": bound / size,
            }
        )
    return rows


def curves(rows):
    """(inner steps, solver) → its rows."""
    return grouped(rows, "inner_steps", "solver")


def table(rows):
    """Relative error after some steps, and the largest of error/bound."""
    shown = (5, 10, 20, 50, 100, 200)
    return [
        {
            "inner steps": inner,
            "solver": solver,
            **{
                f"{r['steps']} steps": f"{r['error']:.1e}"
                for r in part
                if r["steps"] in shown
            },
            "largest error / bound": f"{max(r['error'] / r['bound'] for r in part):.2f}",
        }
        for (inner, solver), part in curves(rows).items()
    ]


def draw(rows, path):
    """A panel for each inner solution: error, and the bound dashed."""
    found = curves(rows)
    panels = list(dict.fromkeys(inner for inner, _ in found))
    figure, axes = plt.subplots(
        2,
        (len(panels) + 1) // 2,
        figsize=(10, 6),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, inner in zip(axes.flat, panels, strict=False):
        for solver, color in COLORS.items():
            part = found[inner, solver]
            steps = [row["steps"] for row in part]
            axis.plot(steps, [row["error"] for row in part], color=color, label=solver)
            axis.plot(steps, [row["bound"] for row in part], ":", color=color)
        title = f"{inner} inner steps" if inner != "exact" else "exact inner solution"
        axis.set(yscale="log", title=title)
    figure.supxlabel("steps of the linear solver")
    figure.supylabel("relative error of the hypergradient (dotted: its bound)")
    axes.flat[0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
