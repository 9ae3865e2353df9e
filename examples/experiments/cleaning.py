"""Ehrhardt-Roberts data cleaning: what tolerances and solvers do to the loss within a budget.

    inner   mean_i σ(λ_i) CE_i(w) + 0.001 ‖w‖²    20,000 images, a tenth with a wrong label
    outer   mean CE(w)                            the first 5,000 MNIST *test* images, as published

Full batches, outer gradient descent with step 10, warm-started w. The inner solver stops when
‖∇_w g‖ ≤ μ · tolerance, the linear one when ‖∇_w f − H v‖ ≤ tolerance, from v = 0: an absolute
tolerance, which the library does not offer on purpose (where ‖∇_w f‖ is below it the hypergradient
is silently zero), so ``rtol=tolerance/‖∇_w f‖`` is set anew for every outer step. "Ours" is a
relative tolerance and a warm start instead. Inner steps and products of the linear solver share a
budget of 100,000. From the bounds μ = 0.002 and L = mean (‖a_i‖² + 1) σ(λ_i) + μ:

    HB      α = 4/(√L + √μ)²,  β = ((√L − √μ)/(√L + √μ))²         GD   α = 2/(L + μ)
    FISTA   of Calatroni & Chambolle (2019) for strongly convex functions

The state is saved every half minute: a run that was interrupted goes on from there.
"""

import math
import time
import warnings
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from data import Sparse, digits, mnist, need
from rows import grouped
from tqdm import tqdm

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "cleaning"
REG = 0.001
SAVE_EVERY = 30  # seconds
PUBLISHED = {  # (inner solver, tolerance, linear solver, tolerance): final outer loss
    ("HB", 0.1, "CG", 0.01): 0.4413,
    ("HB", 0.01, "CG", 0.1): 0.4548,
    ("FISTA", 0.1, "CG", 0.1): 0.4553,
    ("HB", 0.1, "HB", 0.1): 0.4976,
    ("HB", 0.1, "GD", 0.1): 0.5618,
}
OURS = [("HB", 0.1, "CG", 0.1)]


def configurations(args):
    data = "mnist" if args.data else "digits"
    if args.data:
        need(args.data, "mnist", "train-images-idx3-ubyte.gz")
    budget = args.budget or (1200 if args.quick else 100_000)
    chosen = [*((c, "relative") for c in OURS), *((c, "absolute") for c in PUBLISHED)]
    if args.quick:
        chosen = [chosen[0], chosen[-1]]
    return [
        {
            "data": data,
            "budget": budget,
            "inner": inner,
            "inner_tolerance": inner_tolerance,
            "linear": linear,
            "linear_tolerance": linear_tolerance,
            "rule": rule,
        }
        for (inner, inner_tolerance, linear, linear_tolerance), rule in chosen
    ]


def load(data, args):
    """Training images with wrong labels, ‖a_i‖² + 1, and the outer images."""
    if data == "mnist":
        (x, y), _, (x_outer, y_outer) = mnist(args.data)
        x_outer, y_outer = x_outer[:5000], y_outer[:5000]
    else:
        (x, y), _, (x_outer, y_outer) = digits()
    norms = x.square().sum(1)
    if data == "mnist":  # four fifths of the pixels are 0
        x, x_outer = Sparse(x), Sparse(x_outer)
    return x, corrupted(y, 0.1, args.seed), norms, x_outer, y_outer


def corrupted(y, rate, seed):
    """Other labels for a tenth of the examples; with seed 0 the very ones of the authors' runs."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):  # what their two data loaders draw
        torch.empty((), dtype=torch.int64).random_(generator=generator)
    count = int(rate * len(y))
    moved = torch.randint(1, 10, (count,), generator=generator)
    index = torch.randperm(len(y), generator=generator)[:count]
    y = y.clone()
    y[index] = (y[index] + moved) % 10
    return y


class Fista(torch.optim.Optimizer):
    """FISTA for L-smooth, μ-strongly convex functions; the parameter is its extrapolated point."""

    def __init__(self, params):
        super().__init__(params, {"L": 1.0, "mu": 1.0})

    @torch.no_grad()
    def step(self, closure=None):
        """One step, from ``.grad`` at the extrapolated point."""
        for group in self.param_groups:
            q = group["mu"] / group["L"]
            for z in group["params"]:
                state = self.state[z]
                y, t = z - z.grad / group["L"], state.get("t", 0.0)
                # t⁺ = (1 − q t² + √((1 − q t²)² + 4 t²))/2,  β = (t − 1)(1 − q t⁺)/(t⁺(1 − q))
                t = (1 - q * t**2 + math.sqrt((1 - q * t**2) ** 2 + 4 * t**2)) / 2
                ahead = (1 - q * t**2 + math.sqrt((1 - q * t**2) ** 2 + 4 * t**2)) / 2
                beta = (t - 1) * (1 - q * ahead) / (ahead * (1 - q))
                z.copy_(y + beta * (y - state.get("y", y)))
                state.update(y=y, t=t)


def set_steps(inner, L, mu):
    """Step sizes of the inner solver, and a fresh start of its momentum."""
    inner.state.clear()
    for group in inner.param_groups:
        if isinstance(inner, Fista):
            group.update(L=L, mu=mu)
        elif group["momentum"]:
            group["lr"] = 4 / (L**0.5 + mu**0.5) ** 2
            group["momentum"] = ((L**0.5 - mu**0.5) / (L**0.5 + mu**0.5)) ** 2
        else:
            group["lr"] = 2 / (L + mu)


def published(configuration, norm, L, mu, left):
    """The linear solver with its absolute tolerance, within what is left of the budget."""
    rtol = configuration["linear_tolerance"] / norm
    solver = {
        "CG": tb.CG(left, rtol=rtol),
        "HB": tb.HeavyBall(left, rtol=rtol, lower=mu, upper=L),
        "GD": tb.Richardson(left, rtol=rtol, step_size=2 / (L + mu)),
    }[configuration["linear"]]
    return tb.Implicit(solver, cross_calls=1, warm_start=False)


def measure(configuration, args):
    x, y, norms, x_outer, y_outer = load(configuration["data"], args)
    w = torch.zeros(x.shape[1], 10, requires_grad=True)
    weights = torch.zeros(len(y), requires_grad=True)  # λ
    inner = {
        "HB": lambda: torch.optim.SGD([w], lr=0.1, momentum=0.9),
        "GD": lambda: torch.optim.SGD([w], lr=0.1),
        "FISTA": lambda: Fista([w]),
    }[configuration["inner"]]()
    ours = tb.CG(max_steps=1000, rtol=configuration["linear_tolerance"])
    optimizer = tb.BilevelOptimizer(
        inner=inner,
        outer=torch.optim.SGD([weights], lr=10.0),
        estimator=tb.Implicit(ours, cross_calls=1),
    )

    @optimizer.inner_loss
    def train_loss():
        losses = F.cross_entropy(x @ w, y, reduction="none")
        return (weights.sigmoid() * losses).mean() + REG * w.square().sum()

    @optimizer.outer_loss
    def valid_loss():
        return F.cross_entropy(x_outer @ w, y_outer)

    budget, mu = configuration["budget"], 2 * REG
    used = {"inner": 0, "linear": 0, "outer": 0, "zero": 0, "seconds": 0.0}
    rows = []
    name = "-".join(str(value) for value in configuration.values())
    checkpoint = args.output / f"{NAME}-{name}.pt"
    if checkpoint.exists() and not args.fresh:
        saved = torch.load(checkpoint, weights_only=True)
        with torch.no_grad():
            w.copy_(saved["w"])
        optimizer.load_state_dict(saved["optimizer"])
        used, rows = saved["used"], saved["rows"]
    began, saved_at = time.perf_counter() - used["seconds"], time.perf_counter()
    spent = used["inner"] + used["linear"]
    bar = tqdm(total=budget, initial=spent, desc=name, leave=False, mininterval=2)
    while spent < budget:
        L = float((norms * weights.detach().sigmoid()).mean()) + mu
        set_steps(inner, L, mu)
        steps = 0
        while steps < budget - spent:
            optimizer.zero_grad()
            train_loss().backward()
            if steps and w.grad.norm() <= mu * configuration["inner_tolerance"]:
                break
            optimizer.step()
            steps += 1
        optimizer.zero_grad()
        if configuration["rule"] == "absolute":
            (slope,) = torch.autograd.grad(F.cross_entropy(x_outer @ w, y_outer), w)
            norm, left = float(slope.norm()), max(budget - spent - steps, 1)
            optimizer.estimator = published(configuration, norm, L, mu, left)
        with warnings.catch_warnings():  # the finding itself, counted below
            warnings.simplefilter("ignore", tb.ZeroHypergradientWarning)
            report = optimizer.outer_step()
        used["inner"] += steps
        used["linear"] += report.products - 1  # without J v
        used["outer"] += 1
        used["zero"] += int(report.norm == 0)
        used["seconds"] = time.perf_counter() - began
        bar.update(used["inner"] + used["linear"] - spent)
        spent = used["inner"] + used["linear"]
        if not rows or spent >= min(budget, rows[-1]["iterations"] + budget // 200):
            rows.append(progress(spent, used, report))
        if time.perf_counter() > saved_at + SAVE_EVERY:
            saved_at = time.perf_counter()
            save(checkpoint, w, optimizer, used, rows)
    bar.close()
    checkpoint.unlink(missing_ok=True)
    return rows


def progress(spent, used, report):
    """A row: where the run is."""
    return {
        "iterations": spent,
        "inner_iterations": used["inner"],
        "linear_iterations": used["linear"],
        "outer_steps": used["outer"],
        "zero_hypergradients": used["zero"],
        "seconds": round(used["seconds"], 2),
        "outer_loss": float(report.loss),
        "norm": float(report.norm),
    }


def save(path, w, optimizer, used, rows):
    """In one move, so that an interrupt leaves the old state or the new one."""
    state = {"w": w.detach(), "optimizer": optimizer.state_dict()}
    part = Path(f"{path}.part")
    torch.save({**state, "used": used, "rows": rows}, part)
    part.replace(path)


def curves(rows):
    """(inner, tolerance, linear, tolerance, rule) → its rows."""
    columns = ("inner", "inner_tolerance", "linear", "linear_tolerance", "rule")
    return grouped(rows, *columns)


def table(rows):
    """First and last outer loss, beside the published one."""
    return [
        {
            "data": part[-1]["data"],
            "inner solver": f"{key[0]} {key[1]}",
            "linear solver": f"{key[2]} {key[3]}",
            "tolerance": "absolute, from zero" if key[4] == "absolute" else "ours",
            "iterations": f"{part[-1]['iterations']:,}",
            "inner": f"{part[-1]['inner_iterations']:,}",
            "outer steps": f"{part[-1]['outer_steps']:,}",
            "of them zero": part[-1]["zero_hypergradients"],
            "first loss": f"{part[0]['outer_loss']:.4f}",
            "last loss": f"{part[-1]['outer_loss']:.4f}",
            "published": PUBLISHED[key[:4]]
            if part[-1]["data"] == "mnist" and key[4] == "absolute"
            else "–",
            "minutes": f"{part[-1]['seconds'] / 60:.1f}",
        }
        for key, part in curves(rows).items()
    ]


def draw(rows, path):
    """Outer loss against iterations."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for key, part in curves(rows).items():
        ours = key[4] == "relative"
        label = f"{key[0]} {key[1]}, {key[2]} {key[3]}{', ours' if ours else ''}"
        line = axis.plot(
            [row["iterations"] for row in part],
            [row["outer_loss"] for row in part],
            color="black" if ours else None,
            label=label,
        )
        if not ours and part[0]["data"] == "mnist":
            axis.plot(100_000, PUBLISHED[key[:4]], "o", color=line[0].get_color())
    axis.set(
        xlabel="inner steps and products of the linear solver",
        ylabel="outer loss",
        title="(inner solver and tolerance, linear solver and tolerance)",
    )
    axis.title.set_fontsize(9)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
