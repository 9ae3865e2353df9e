"""One log-penalty per feature, or per class, for logistic regression: loss against cost.

    inner   mean CE(x w, y) + ½ Σ_jc exp(λ_j) w_jc²      or exp(λ_c), one per class
    outer   mean CE on validation data

Full batches and w kept from one outer step to the next, so that what differs is the
hypergradient. A gradient is an evaluation of the inner loss with its derivative, or a product.
Seconds are those of the processor.
"""

import functools
import time

import matplotlib
import torch
import torch.nn.functional as F
from data import breast_cancer, covtype, digits, ijcnn1, newsgroups
from rows import nested
from tqdm import tqdm

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "penalties"
# All steps of a window see the one full batch: J v of one of them is that of all.
FIXED = "penalties fixed"  # the same inner steps without outer steps
METHODS = [
    FIXED,
    "cg(max_steps=10, cross_calls=1)",
    "heavy_ball(max_steps=10, cross_calls=1)",
    "nesterov(max_steps=10, cross_calls=1)",
    "richardson(max_steps=10, cross_calls=1)",
    "neumann(num_steps=10, cross_calls=1)",
    "identity(scale={lr}, cross_calls=1)",
    "unrolled",
]
FEW = ["forward", "pzobo(directions=5)"]  # for a few dozen outer numbers
QUICK = [FIXED, METHODS[1], METHODS[6], "unrolled"]
SETS = {
    # penalties per, λ₀, classes, inner steps, lr, momentum, outer: lr, steps
    "ijcnn1": ("feature", -2.0, 2, 20, 0.5, 0.9, 0.2, 50),
    "covtype": ("class", -2.0, 7, 20, 0.1, 0.9, 0.2, 50),
    "20news": ("feature", -9.0, 20, 10, 10.0, 0.9, 0.2, 50),
    "breast_cancer": ("feature", 0.0, 2, 20, 0.1, 0.9, 0.2, 50),
    "digits": ("feature", 0.0, 10, 20, 0.1, 0.9, 0.2, 50),
}
READ = {
    "ijcnn1": ijcnn1,
    "covtype": covtype,
    "20news": functools.partial(newsgroups, least=3),  # words of 3 documents or more
}


def configurations(args):
    sets = READ if args.data else ("breast_cancer", "digits")
    if args.quick:
        sets = ("breast_cancer",)
    return [
        {
            "data": name,
            "method": method.format(lr=SETS[name][4]),
            "outer_steps": 10 if args.quick else SETS[name][-1],
        }
        for name in sets
        for method in (
            QUICK if args.quick else METHODS if name == "20news" else METHODS + FEW
        )
    ]


@functools.cache
def load(name, folder):
    """Training, validation and test data."""
    if name in READ:
        return READ[name](folder)
    return breast_cancer() if name == "breast_cancer" else digits()


def measure(configuration, args):
    name = configuration["data"]
    per, start, classes, inner_steps, lr, momentum, outer_lr, _ = SETS[name]
    (x, y), (x_valid, y_valid), (x_test, y_test) = load(name, args.data)
    torch.manual_seed(configuration["seed"])
    w = torch.zeros(x.shape[1], classes if classes > 2 else 1, requires_grad=True)
    shape = (x.shape[1], 1) if per == "feature" else (classes,)
    log_penalty = torch.full(shape, start, requires_grad=True)
    evaluations = 0

    def loss(z, y):
        if classes > 2:
            return F.cross_entropy(z, y)
        return F.binary_cross_entropy_with_logits(z[:, 0], y.float())

    def train_loss():
        nonlocal evaluations
        evaluations += 1
        return loss(x @ w, y) + (log_penalty.exp() * w**2).sum() / 2

    def valid_loss():
        return loss(x_valid @ w, y_valid)

    learns = configuration["method"] != FIXED
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum)
    if learns:
        outer = torch.optim.Adam([log_penalty], lr=outer_lr)
        optimizer = tb.BilevelOptimizer(
            optimizer, outer, estimator=configuration["method"]
        )
        train_loss = optimizer.inner_loss(train_loss)
        valid_loss = optimizer.outer_loss(valid_loss)
    seconds, products, rows = 0.0, 0, []
    for step in tqdm(range(configuration["outer_steps"] + 1), leave=False, desc=name):
        began = time.process_time()
        for _ in range(inner_steps):
            optimizer.zero_grad()
            train_loss().backward()
            optimizer.step()
        seconds += time.process_time() - began
        with torch.no_grad():
            z = x_test @ w
            said = z.argmax(1) if classes > 2 else z[:, 0] > 0
            row = {
                "outer_step": step,
                "gradients": evaluations + products,
                "seconds": round(seconds, 4),
                "valid_loss": valid_loss().item(),
                "test_loss": loss(z, y_test).item(),
                "test_error": 100 * (said != y_test).float().mean().item(),
            }
        rows.append(row)
        began = time.process_time()
        if learns:
            products += optimizer.outer_step().products
        seconds += time.process_time() - began
    return rows


def curves(rows):
    """Data set → method → its rows."""
    return nested(rows, "data", "method")


def table(rows):
    """After the last outer step."""
    return [
        {
            "data": data,
            "method": f"`{method}`" if method != FIXED else method,
            "validation loss": f"{part[-1]['valid_loss']:.4f}",
            "test loss": f"{part[-1]['test_loss']:.4f}",
            "test error, %": f"{part[-1]['test_error']:.2f}",
            "gradients": part[-1]["gradients"],
            "seconds": f"{part[-1]['seconds']:.1f}",
        }
        for data, methods in curves(rows).items()
        for method, part in methods.items()
    ]


def draw(rows, path):
    """Validation loss against gradients and seconds, a row for each data set."""
    found = curves(rows)
    figure, axes = plt.subplots(
        len(found),
        2,
        figsize=(9, 3.2 * len(found)),
        squeeze=False,
        layout="constrained",
    )
    for (left, right), (data, methods) in zip(axes, found.items(), strict=True):
        for method, part in methods.items():
            losses = [row["valid_loss"] for row in part]
            label = method.split("(")[0]
            left.plot([row["gradients"] for row in part], losses, label=label)
            right.plot([row["seconds"] for row in part], losses)
        left.set(xlabel="gradients and products", ylabel="validation loss", title=data)
        right.set(xlabel="seconds", title=data)
        left.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)
