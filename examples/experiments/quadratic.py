"""Finite-sum quadratics: SOBA, SABA, SRBA, stocBiO, MRBO and AmIGO with published step sizes.

The simulated problem of benchmark_bilevel, written from its description: 1,024 inner and 1,024
outer samples in batches of 64, 100 inner and 10 outer variables, mean Hessians with spectra in
[0.1, 1], cross terms of norm 0.1, y = 0 and x = −2 at the start. The measure is ‖∇Φ‖², in closed
form.
"""

import time

import matplotlib
import torch
from rows import grouped

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "quadratic"
# estimator, inner steps, step of y (and v), ratio: step of x = step/ratio, exponent of the decay
METHODS = {
    "soba": ("soba", 1, 0.1, 1.0, 0.5),
    "soba, constant": ("soba", 1, 0.1, 1.0, 0.0),
    "saba": ("saba", 1, 0.1, 1.0, 0.0),
    "srba": ("srba", 1, 0.1, 1.0, 0.0),
    "stocbio": ("stocbio(step_size=0.1, cross_batches=1)", 10, 0.1, 1.0, 0.0),
    "mrbo": ("mrbo(step_size=0.1, cross_batches=1)", 1, 0.1, 0.1, 1 / 3),
    "amigo": ("amigo(lr=0.01, cross_batches=1)", 10, 0.01, 0.1, 0.0),
}


def configurations(args):
    updates = 500 if args.quick else 4000  # of y, the same for every method
    n, p = (256, 20) if args.quick else (1024, 100)
    names = ["soba", "saba", "stocbio"] if args.quick else METHODS
    return [
        {"method": name, "updates": updates, "samples": n, "p": p} for name in names
    ]


def spd(n, generator):
    """A matrix with eigenvalues between 0.1 and 1."""
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
    return Q @ torch.diag(torch.linspace(0.1, 1, n)) @ Q.T


class Level:
    """Batches of quadratics ½ yᵀ A_i y + ½ xᵀ H_i x + xᵀ C_i y + a_iᵀ y + b_iᵀ x."""

    def __init__(self, samples, p, d, generator):
        def spread(mean):
            """Sample matrices around a mean, averaged over each batch of 64."""
            noise = torch.randn(samples // 64, *mean.shape, generator=generator) / 8
            noise = noise * torch.linalg.vector_norm(mean) / mean.numel() ** 0.5
            return mean + noise - noise.mean(0)

        cross = torch.randn(d, p, generator=generator)
        self.A, self.H = spread(spd(p, generator)), spread(spd(d, generator))
        self.A, self.H = (self.A + self.A.mT) / 2, (self.H + self.H.mT) / 2
        self.C = spread(0.1 * cross / torch.linalg.matrix_norm(cross, 2))
        self.a = spread(torch.randn(p, generator=generator))
        self.b = spread(torch.randn(d, generator=generator))

    def value(self, x, y, index):
        """The mean loss of one batch."""
        i = int(index)
        linear = self.a[i] @ y + self.b[i] @ x + x @ self.C[i] @ y
        return y @ self.A[i] @ y / 2 + x @ self.H[i] @ x / 2 + linear

    def means(self):
        """The matrices of the whole data."""
        return [part.mean(0) for part in (self.A, self.H, self.C, self.a, self.b)]


def hypergradient(inner, outer, x):
    """∇Φ(x) = ∂_x f − C A⁻¹ ∂_y f at y*(x), from the means."""
    (A, _, C, a, _), (F, H, K, f, h) = inner.means(), outer.means()
    y = -torch.linalg.solve(A, C.T @ x + a)
    v = torch.linalg.solve(A, F @ y + K.T @ x + f)
    return H @ x + K @ y + h - C @ v


def measure(configuration, args):
    torch.set_default_dtype(torch.float64)  # run.py puts it back
    estimator, inner_steps, step, ratio, exponent = METHODS[configuration["method"]]
    samples, p, d = configuration["samples"], configuration["p"], 10
    generator = torch.Generator().manual_seed(configuration["seed"])
    inner, outer = (Level(samples, p, d, generator) for _ in range(2))
    y = torch.zeros(p, requires_grad=True)
    x = torch.full((d,), -2.0, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        inner=torch.optim.SGD([y], lr=step),
        outer=torch.optim.SGD([x], lr=step / ratio),
        estimator=estimator,
        inner_steps=inner_steps,
        history=1,
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda k: (k + 1) ** -exponent)
        for o in (optimizer, optimizer.outer)
        if exponent
    ]
    batches, valid = (
        tb.Batches((torch.arange(samples // 64),), 1, seed=s) for s in (1, 2)
    )
    train_loss = optimizer.inner_loss(
        lambda index: inner.value(x, y, index), data=batches
    )
    optimizer.outer_loss(lambda index: outer.value(x, y, index), data=valid)

    rows, began, spent = [], time.process_time(), 0.0
    every = max(1, configuration["updates"] // 100)
    k = 0
    while k < configuration["updates"]:
        for (index,) in batches:
            if k % every == 0:
                spent += time.process_time() - began
                error = hypergradient(inner, outer, x.detach()).square().sum()
                rows.append({"update": k, "error": float(error), "seconds": spent})
                began = time.process_time()
            optimizer.zero_grad()
            train_loss(index).backward()
            optimizer.step()
            for schedule in schedules:
                schedule.step()
            k += 1
            if k == configuration["updates"]:
                break
    error = hypergradient(inner, outer, x.detach()).square().sum()
    rows.append({"update": k, "error": float(error), "seconds": spent})
    return rows


def curves(rows):
    """Method → its rows."""
    return grouped(rows, "method")


def table(rows):
    """What is left at the end, and when 1e-3 of the start was reached."""
    found = []
    for method, part in curves(rows).items():
        first = part[0]["error"]
        small = [r for r in part if r["error"] <= 1e-3 * first]
        found.append(
            {
                "method": method,
                "‖∇Φ‖² at the end": f"{part[-1]['error']:.1e}",
                "of the start": f"{part[-1]['error'] / first:.1e}",
                "updates to 1e-3": small[0]["update"] if small else "–",
                "seconds to 1e-3": f"{small[0]['seconds']:.1f}" if small else "–",
            }
        )
    return found


def draw(rows, path):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method, part in curves(rows).items():
        errors = [r["error"] for r in part]
        axes[0].semilogy([r["update"] for r in part], errors, label=method)
        axes[1].semilogy([r["seconds"] for r in part], errors)
    axes[0].set(xlabel="updates of y", ylabel="‖∇Φ‖²")
    axes[1].set(xlabel="seconds")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
