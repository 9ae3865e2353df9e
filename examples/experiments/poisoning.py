"""Data poisoning: how much a fifth of the training images, each moved a little, can do.

An attack, studied to know what it costs (Grazzi, Pontil & Salzo 2023). A quarter of the data is
for validation, and a fifth of the training images may be changed:

    inner   mean CE(w; x + δ, y) + 0.1 · mean w²        a linear model
    outer   − mean CE(w; validation data)               so descent does harm
    δ_i     ‖δ_i‖ ≤ 5 and 0 ≤ x_i + δ_i ≤ 1             (digits, of 64 pixels: ‖δ_i‖ ≤ 1.5)

"cold" is without warm start, which the paper finds competitive: w and v begin at zero after every
outer step, so T has to be large. "warm" keeps w, and v where the estimator says so. All share a
budget of per-example gradients: the examples of inner steps, of products and of outer batches.

The outer optimizer is SGD. The published step, 4e8, puts every image on its sphere at once; ours
for n training images is about 50 n over the number of outer steps, so that every method can
travel as far. Images are projected onto ball and box together (`NearImages`).

Harm is that to another model, trained from zero on the poisoned images by 500 iterations of
L-BFGS: the largest entry of its gradient was at most 2e-4, and 1,500 more changed the one
validation loss looked at by 4e-4. Seconds are those of the processor, without that.
"""

import functools
import time
import warnings
from dataclasses import dataclass

import matplotlib
import torch
import torch.nn.functional as F
from data import data_cleaning, digits, mnist, need
from rows import grouped
from torch import Tensor
from tqdm import tqdm

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "poisoning"
REG = 0.1
INNER_LR = 0.09
LOOKS = 5  # at the attack on the way
BASELINES = "no poisoning", "random"
METHODS = {
    # method: estimator, warm, inner batch, T, outer batch (None: all), outer lr / n
    "bsgm, cold": ("bsgm(num_steps=300)", False, 90, 300, None, 2.0),
    "bsgm, warm": ("bsgm(num_steps=300, warm_start=True)", True, 90, 300, None, 2.0),
    "sid, cold": ("sid(num_steps=300)", False, 90, 300, None, 2.0),
    "sid, warm": ("sid(num_steps=300, warm_start=True)", True, 90, 300, None, 2.0),
    "stocbio": ("stocbio(num_steps=30)", True, 90, 30, 300, 0.2),
    "amigo": ("amigo", True, 90, 10, 300, 0.07),
    "soba": ("soba", True, 300, 1, 300, 0.025),
    "cg, cold": ("cg(max_steps=10)", False, 1500, 30, None, 2.5),
    "cg, warm": ("cg(max_steps=10)", True, 1500, 30, None, 2.5),
}
QUICK = ["bsgm, cold", "soba", "cg, warm"]


def configurations(args):
    if args.data:
        need(args.data, "mnist", "train-images-idx3-ubyte.gz")
    result = []
    for method in (*BASELINES, *(QUICK if args.quick else METHODS)):
        values = METHODS.get(method, ("", False, 0, 0, None, 0.0))
        estimator, warm, batch, steps, outer_batch, lr = values
        result.append(
            {
                "data": "mnist" if args.data else "digits",
                "method": method,
                "estimator": estimator,
                "warm": int(warm),
                "batch": batch,
                "inner_steps": steps,
                "outer_batch": outer_batch or 0,  # 0: all
                "outer_lr": lr,
                "budget": 100_000 if args.quick else 2_000_000,
            }
        )
    return result


@functools.cache
def load(data, folder):
    """Training, validation and test images without the column of ones; the radius."""
    parts = mnist(folder) if data == "mnist" else digits()
    sizes = (6000, 2000, 10000) if data == "mnist" else (900, 300, 497)
    train, valid, test = (
        (x[:size, :-1].contiguous(), y[:size])
        for (x, y), size in zip(parts, sizes, strict=True)
    )
    return train, valid, test, 5.0 if data == "mnist" else 1.5


@dataclass(frozen=True, eq=False)
class NearImages(tb.Constraint):
    """Projection of every row δ_i onto {‖δ_i‖ ≤ radius, 0 ≤ image_i + δ_i ≤ 1}, exactly.

    By the optimality conditions δ = clip(s z) with the largest s ≤ 1 that has ‖δ‖ ≤ radius. The
    norm grows with s, and is small enough at s = radius/‖z‖: bisection, of log s.
    """

    images: Tensor
    radius: float
    name = "near_images"

    def __str__(self):
        return f"{self.name}(radius={self.radius})"

    def apply(self, tensor, step_size):
        """See `tb.Constraint.apply`."""
        found = torch.clamp(tensor, -self.images, 1 - self.images)
        # a row that was put on the sphere before is there up to rounding
        far = (found.norm(dim=1) > self.radius * (1 + 1e-6)).nonzero()[:, 0]
        if len(far):
            z, lower = tensor[far], -self.images[far]
            low = self.radius / z.norm(dim=1, keepdim=True)
            high = torch.ones_like(low)
            for _ in range(30):
                s = (low * high).sqrt()
                norm = torch.clamp(s * z, lower, 1 + lower).norm(dim=1, keepdim=True)
                low = torch.where(norm <= self.radius, s, low)
                high = torch.where(norm <= self.radius, high, s)
            found[far] = torch.clamp(low * z, lower, 1 + lower)
        return found


def measure(configuration, args):
    method, seed = configuration["method"], configuration["seed"]
    (x, y), valid, test, radius = load(configuration["data"], args.data)
    torch.manual_seed(seed)
    chosen = torch.randperm(len(x))[: len(x) // 5]
    place = torch.full((len(x),), -1)  # row of δ; −1: the image stays as it is
    place[chosen] = torch.arange(len(chosen))
    ball = NearImages(x[chosen], radius)
    delta = torch.zeros(len(chosen), x.shape[1], requires_grad=True)

    def harm(outer_step=0, gradients=0, seconds=0.0):
        model, slope = retrained(x.index_add(0, chosen, delta.detach()), y)
        with torch.no_grad():
            return {
                "outer_step": outer_step,
                "gradients": gradients,
                "seconds": round(seconds, 3),
                "valid_loss": F.cross_entropy(model(valid[0]), valid[1]).item(),
                "test_accuracy": data_cleaning.accuracy(model, *test),
                "norm": delta.norm(dim=1).mean().item(),
                "slope": slope,
            }

    if method == "random":  # from far outside, so that the box does not make it shorter
        delta = ball.apply(100 * radius * torch.randn_like(delta), 0.0)
    if method in BASELINES:
        return [harm()]
    steps = attack(configuration, (x, y, place), delta, ball, valid)
    return [harm(*progress) for progress in steps]


def attack(configuration, train, delta, ball, valid):
    """Learn δ in place, and stop LOOKS times: outer steps, gradients and seconds so far."""
    budget, seed, T = (configuration[k] for k in ("budget", "seed", "inner_steps"))
    size = len(train[0])
    batches = tb.Batches(train, min(configuration["batch"], size), seed)
    outer_batch = configuration["outer_batch"] or len(valid[1])
    model = linear(train[0])
    optimizer = tb.BilevelOptimizer(
        inner=torch.optim.SGD(model.parameters(), lr=INNER_LR),
        outer=torch.optim.SGD([delta], lr=configuration["outer_lr"] * size),
        modules=model,
        estimator=configuration["estimator"],
        constraints=ball,
        warm_start=bool(configuration["warm"]),
    )

    @optimizer.inner_loss(data=batches)
    def train_loss(x, y, place):
        hit = place >= 0
        rows = delta.index_select(0, place[hit])
        return loss(model, x.index_add(0, hit.nonzero()[:, 0], rows), y)

    @optimizer.outer_loss(data=tb.Batches(valid, outer_batch, seed))
    def harm(x, y):
        return -F.cross_entropy(model(x), y)

    endless = data_cleaning.forever(batches)
    used, seconds, outer_step, looks = 0, 0.0, 0, 0
    bar = tqdm(total=budget, leave=False, desc=configuration["method"], mininterval=2)
    while used < budget:
        began = time.process_time()
        for _ in range(T):
            optimizer.zero_grad()
            train_loss(*next(endless)).backward()
            optimizer.step()
        with warnings.catch_warnings():  # few batches: the other images are left alone
            warnings.simplefilter("ignore", tb.ZeroHypergradientWarning)
            report = optimizer.outer_step()
        seconds += time.process_time() - began
        spent = (T + report.products) * batches.batch_size + outer_batch
        used, outer_step = used + spent, outer_step + 1
        bar.update(spent)
        if used * LOOKS >= budget * (looks + 1):
            looks = used * LOOKS // budget
            yield outer_step, used, seconds
    bar.close()


def linear(x):
    """The model, at zero."""
    model = torch.nn.Linear(x.shape[1], 10)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return model


def loss(model, x, y):
    """The inner objective."""
    return F.cross_entropy(model(x), y) + REG * model.weight.square().mean()


def retrained(x, y):
    """A model trained from zero on (x, y), and the largest entry of its gradient."""
    model = linear(x)
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=500,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(model, x, y)
        value.backward()
        return value

    optimizer.step(closure)
    return model, max(p.grad.abs().max().item() for p in model.parameters())


def curves(rows):
    """Method → its rows."""
    return grouped(rows, "method")


def table(rows):
    """What a model trained from scratch on the poisoned images makes of it, at the end."""
    return [
        {
            "data": row["data"],
            "method": method,
            "`estimator`": f"`{row['estimator']}`" if row["estimator"] else "–",
            "batch, T": f"{row['batch']}, {row['inner_steps']}"
            if row["batch"]
            else "–",
            "outer steps": f"{row['outer_step']:,}",
            "per-example gradients": f"{row['gradients']:,}",
            "validation loss": f"{row['valid_loss']:.3f}",
            "test accuracy, %": f"{row['test_accuracy']:.1f}",
            "mean norm of δ": f"{row['norm']:.2f}",
            "seconds": f"{row['seconds']:.1f}",
        }
        for method, (*_, row) in curves(rows).items()
    ]


def draw(rows, path):
    """Validation loss of retrained models against cost, and their test accuracy at the end."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    found = curves(rows)
    start = found["no poisoning"][0]
    colors = ["black", "silver", *(f"C{index}" for index in range(10))]
    for color, (method, part) in zip(colors, found.items(), strict=False):
        losses = [row["valid_loss"] for row in part]
        if method in BASELINES:
            for axis in axes[:2]:
                axis.axhline(losses[0], color=color, linestyle=":")
        else:
            style = "--o" if "cold" in method else "-o"
            for axis, key in zip(axes, ("gradients", "seconds"), strict=False):
                cost = [0, *(row[key] for row in part)]
                values = [start["valid_loss"], *losses]
                axis.plot(cost, values, style, color=color, markersize=3)
        axes[2].barh(method, part[-1]["test_accuracy"], color=color)
    axes[0].set(xlabel="per-example gradients", ylabel="validation loss, retrained")
    axes[1].set(xlabel="seconds")
    axes[2].invert_yaxis()
    axes[2].set(xlabel=f"test accuracy, retrained ({start['data']}), %")
    figure.savefig(path, dpi=100)
    plt.close(figure)
