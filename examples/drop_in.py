"""
An ordinary training script and its bilevel twin
================================================

The two functions below differ only in the lines marked ``# +`` (added) and ``# ~`` (changed). The
first trains on a set in which 40 % of the labels are wrong; the second learns, in the same
loop, which examples to trust.

    python examples/drop_in.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import torch_bilevel as tb


def ordinary(train_loader, valid_loader):
    """Train on what is given."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def train_loss(x, y, index):
        return F.cross_entropy(model(x), y)

    for _ in range(60):
        for x, y, index in train_loader:
            optimizer.zero_grad()
            train_loss(x, y, index).backward()
            optimizer.step()
    return model


def bilevel(train_loader, valid_loader):
    """Learn a weight for every training example on the way."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    weights = torch.zeros(len(train_loader.dataset), requires_grad=True)  # +
    outer = torch.optim.Adam([weights], lr=0.3)  # +
    options = {"estimator": "unrolled", "inner_steps": 10}  # +
    optimizer = tb.BilevelOptimizer(optimizer, outer, **options)  # +

    @optimizer.inner_loss  # +
    def train_loss(x, y, index):
        losses = F.cross_entropy(model(x), y, reduction="none")  # ~
        return (weights[index].sigmoid() * losses).mean()  # +

    @optimizer.outer_loss(data=valid_loader)  # +
    def valid_loss(x, y):  # +
        return F.cross_entropy(model(x), y)  # +

    for _ in range(60):
        for x, y, index in train_loader:
            optimizer.zero_grad()
            train_loss(x, y, index).backward()
            optimizer.step()
    return model


def network():
    """A small classifier, the same every time."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    return torch.nn.Sequential(*layers)


def digits():
    """Loaders for training (1,000 images, 40 % wrong labels) and validation, and the test set."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    y = torch.tensor(labels)[order]
    given, wrong = y[:1000].clone(), torch.arange(1000) < 400
    given[wrong] = (given[wrong] + 1 + torch.arange(400) % 9) % 10
    train = TensorDataset(x[:1000], given, torch.arange(1000))
    valid = TensorDataset(x[1000:1300], y[1000:1300])
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(train, 100, shuffle=True, generator=generator)
    return loader, DataLoader(valid, 300), (x[1300:], y[1300:])


def main():
    """Train both ways and compare."""
    results = {}
    for script in (ordinary, bilevel):
        train_loader, valid_loader, (x, y) = digits()
        model = script(train_loader, valid_loader)
        results[script.__name__] = 100 * (model(x).argmax(1) == y).float().mean().item()
        print(f"{script.__name__:10s} test accuracy {results[script.__name__]:.1f} %")
    return results


if __name__ == "__main__":
    main()
