"""Label cleaning with clean rules: noise drawn once, zero start, every weight a gradient.

A linear classifier on images of which a fraction p carries a wrong label; the outer variables are
the logits of one weight per training image; the outer loss is that of a small clean set. A window
is one epoch, so that every weight receives its gradient in every outer step. Baselines: no
cleaning, and an oracle that leaves the wrong labels out. Seconds
are those of the processor.
"""

import functools
import time

import matplotlib
import torch
import torch.nn.functional as F
from data import data_cleaning, digits, mnist, need
from rows import nested
from tqdm import tqdm

import torch_bilevel as tb

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAME = "hyper_cleaning"
REG = 0.001
BASELINES = "no cleaning", "oracle"
METHODS = [
    "cg(max_steps=10)",
    "heavy_ball(max_steps=10)",
    "richardson(max_steps=10)",
    "neumann(num_steps=10)",
    "identity",
    "unrolled",
    "stocbio",
    "mrbo",
    "vrbo",
    "sid",
    "amigo",
    "soba",
    "saba",
]
QUICK = ["cg(max_steps=10)", "unrolled", "stocbio", "soba"]


def configurations(args):
    if args.data:
        need(args.data, "mnist", "train-images-idx3-ubyte.gz")
    return [
        {
            "data": "mnist" if args.data else "digits",
            "corruption": corruption,
            "method": method,
            "outer_steps": 15 if args.quick else 50,
        }
        for corruption in ((0.4,) if args.quick else (0.1, 0.4))
        for method in (*BASELINES, *(QUICK if args.quick else METHODS))
    ]


@functools.cache
def load(data, folder):
    """Training, validation and test images."""
    return mnist(folder) if data == "mnist" else digits()


def measure(configuration, args):
    method, seed = configuration["method"], configuration["seed"]
    (x, true), (x_valid, y_valid), test = load(configuration["data"], args.data)
    y, wrong = data_cleaning.corrupt(
        true.numpy(), configuration["corruption"], 10, seed
    )
    y = torch.tensor(y)
    if method == "oracle":
        x, y = x[~wrong], y[~wrong]
    learns = method not in BASELINES
    batch_size = 500 if configuration["data"] == "mnist" else 100
    batches = tb.Batches((x, y, torch.arange(len(x))), batch_size, seed)
    clean = tb.Batches((x_valid, y_valid), len(x_valid))  # one, of all
    model = torch.nn.Linear(x.shape[1], 10, bias=False)  # x has a column of ones
    torch.nn.init.zeros_(model.weight)
    weights = torch.zeros(len(x), requires_grad=True)  # logits

    def train_loss(x, y, index):
        losses = F.cross_entropy(model(x), y, reduction="none")
        weighted = weights[index].sigmoid() * losses if learns else losses
        return weighted.mean() + REG * model.weight.square().sum()

    def valid_loss(x, y):
        return F.cross_entropy(model(x), y)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if learns:
        outer = torch.optim.Adam([weights], lr=0.2)
        optimizer = tb.BilevelOptimizer(
            optimizer, outer, modules=model, estimator=method
        )
        train_loss = optimizer.inner_loss(train_loss, data=batches)
        valid_loss = optimizer.outer_loss(valid_loss, data=clean)
    seconds, rows = 0.0, []
    torch.manual_seed(seed)
    for step in tqdm(range(configuration["outer_steps"]), leave=False, desc=method):
        began = time.process_time()
        for batch in batches:
            optimizer.zero_grad()
            train_loss(*batch).backward()
            optimizer.step()
        if learns:
            optimizer.outer_step()
        seconds += time.process_time() - began
        with torch.no_grad():
            row = {
                "outer_step": step + 1,
                "seconds": round(seconds, 4),
                "valid_loss": valid_loss(x_valid, y_valid).item(),
                "test_accuracy": data_cleaning.accuracy(model, *test),
                "f1": "",
            }
            if learns:
                found = weights.detach().sigmoid()
                row["f1"] = float(data_cleaning.detection(found, wrong)[2])
        rows.append(row)
    return rows


def curves(rows):
    """Corruption → method → its rows."""
    return nested(rows, "corruption", "method")


def reached(part, loss):
    """Seconds until the validation loss was that low."""
    times = [row["seconds"] for row in part if row["valid_loss"] <= loss]
    return f"{times[0]:.1f}" if times else "–"


def table(rows):
    """After the last outer step; seconds until half of the oracle's gain was made."""
    result = []
    for corruption, methods in curves(rows).items():
        without, oracle = (methods[name][-1]["valid_loss"] for name in BASELINES)
        half = (without + oracle) / 2
        for method, part in methods.items():
            last = part[-1]
            result.append(
                {
                    "data": last["data"],
                    "wrong labels": f"{corruption:.0%}",
                    "method": f"`{method}`" if method not in BASELINES else method,
                    "test accuracy, %": f"{last['test_accuracy']:.1f}",
                    "F1": f"{last['f1']:.3f}" if last["f1"] != "" else "–",
                    "validation loss": f"{last['valid_loss']:.4f}",
                    "seconds": f"{last['seconds']:.1f}",
                    "seconds to half of the oracle's gain": reached(part, half),
                }
            )
    return result


def draw(rows, path):
    """Validation loss against seconds."""
    found = curves(rows)
    figure, axes = plt.subplots(
        1, len(found), figsize=(6 * len(found), 4), squeeze=False, layout="constrained"
    )
    for axis, (corruption, methods) in zip(axes[0], found.items(), strict=True):
        for method, part in methods.items():
            seconds = [row["seconds"] for row in part]
            losses = [row["valid_loss"] for row in part]
            style = ":" if method in BASELINES else "-"
            axis.plot(seconds, losses, style, label=method.split("(")[0])
        axis.set(xlabel="seconds", ylabel="validation loss", yscale="log")
        axis.set_title(f"{corruption:.0%} wrong labels")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    plt.close(figure)
