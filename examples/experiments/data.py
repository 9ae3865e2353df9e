"""The data sets of the experiments: files under ``--data DIR``, or what scikit-learn bundles.

DIR holds ``mnist/*.gz``, ``libsvm/ijcnn1.{trn,tst}.bz2``, ``covtype15k/train.csv.bz2`` and
``20news/20news_counts_full.npz``. Every reader returns ``(x, y)`` for training, validation and
test: features in float32 with a column of ones, labels in int64.
"""

import bz2
import sys
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import data_cleaning
from data_cleaning import SystemExit2 as BadInput


class Sparse:
    """A constant sparse matrix X that knows ``X @ w``, kept with its transpose."""

    def __init__(self, x):
        with warnings.catch_warnings():  # torch calls its CSR format beta, once
            warnings.simplefilter("ignore", UserWarning)
            csr = x if x.layout is torch.sparse_csr else x.to_sparse_csr()
            self.pair = narrow(csr), narrow(csr.to_sparse_csc().transpose(0, 1))
        self.shape = x.shape

    def __len__(self):
        return self.shape[0]

    def __matmul__(self, w):
        return Product.apply(*self.pair, w)


def narrow(x):
    """With indices of 32 bits: products of MNIST took a third less time."""
    rows, columns = x.crow_indices().int(), x.col_indices().int()
    return torch.sparse_csr_tensor(rows, columns, x.values(), x.shape)


class Product(torch.autograd.Function):
    """X w; differentiable as often as one likes, for its derivative is another product."""

    @staticmethod
    def forward(ctx, x, transposed, w):
        """X w."""
        ctx.pair = transposed, x
        return x @ w

    @staticmethod
    def backward(ctx, gradient):
        """Xᵀ times the gradient."""
        return None, None, Product.apply(*ctx.pair, gradient)


def pair(x, y, ones=True):
    """One part of a data set as tensors."""
    x = np.hstack([x, np.ones((len(x), 1))]) if ones else x
    return torch.tensor(x, dtype=torch.float32), torch.tensor(np.asarray(y, np.int64))


def need(folder, *names):
    """The file, or one line for the user."""
    path = Path(folder, *names)
    if not path.is_file():
        raise BadInput(f"no file {Path(*names)} in {folder}")
    return path


def standardised(x, train):
    """Columns with mean 0 and deviation 1 on the training rows."""
    deviation = x[train].std(0)
    return (x - x[train].mean(0)) / np.where(deviation > 0, deviation, 1)


def split(x, y, sizes, ones=True):
    """Shuffled once, the same way for every seed, and cut."""
    order = np.random.default_rng(0).permutation(len(x))
    cuts = np.cumsum([0, *sizes])
    parts = [order[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    return [pair(x[index], y[index], ones) for index in parts]


# --- images, pixels in [0, 1] -------------------------------------------------------------


def mnist(folder):
    """The first 20,000 training images, the next 5,000, and the 10,000 test images."""
    need(folder, "mnist", "train-images-idx3-ubyte.gz")
    return [pair(x, y) for x, y in data_cleaning.read_mnist(Path(folder, "mnist"))]


def digits():
    """scikit-learn's digits: 1,000, 300 and 497 images of 8 × 8 pixels."""
    return [pair(x, y) for x, y in data_cleaning.read_digits()]


# --- tables and documents -----------------------------------------------------------------


def ijcnn1(folder):
    """Binary, 22 features: 40,000 and 9,990 of the training file, 91,701 of the test file."""

    def read(name):
        lines = bz2.open(need(folder, "libsvm", f"{name}.bz2"), "rt").readlines()
        x, y = np.zeros((len(lines), 22)), np.zeros(len(lines))
        for row, line in enumerate(lines):
            label, *entries = line.split()
            y[row] = float(label) > 0
            for entry in entries:
                index, value = entry.split(":")
                x[row, int(index) - 1] = float(value)
        return x, y

    return [*split(*read("ijcnn1.trn"), (40000, 9990)), pair(*read("ijcnn1.tst"))]


def covtype(folder):
    """7 classes, 54 features, standardised: 9,676, 2,420 and 3,024 rows of the sample."""
    with bz2.open(need(folder, "covtype15k", "train.csv.bz2"), "rt") as file:
        table = np.loadtxt(file, delimiter=",")
    order = np.random.default_rng(0).permutation(len(table))
    x, y = table[order, 1:55], table[order, 55] - 1
    x = standardised(x, slice(9676))
    bounds = (0, 9676), (9676, 12096), (12096, 15120)
    return [pair(x[a:b], y[a:b]) for a, b in bounds]


def newsgroups(folder, least=1):
    """20 classes, word counts with rows of unit length: 5,657, 5,657 and 7,532 documents.

    Words of fewer than ``least`` training documents are left out.
    """
    z = np.load(need(folder, "20news", "20news_counts_full.npz"))
    width = int(z["shape"][1])
    rows = {}
    for part in ("train", "test"):
        data, indices, indptr = (
            z[f"{part}_{field}"] for field in ("data", "indices", "indptr")
        )
        rows[part] = [
            (indices[a:b], data[a:b] / np.linalg.norm(data[a:b].astype(float)))
            for a, b in zip(indptr[:-1], indptr[1:], strict=True)
        ]
    order = np.random.default_rng(0).permutation(len(rows["train"]))  # come by class
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    seen = np.concatenate([rows["train"][i][0] for i in halves[0]])
    kept = np.flatnonzero(np.bincount(seen, minlength=width) >= least)
    place = np.full(width, -1)
    place[kept] = np.arange(len(kept))

    def part(name, chosen):
        columns, values, ends = [], [], [0]
        for i in chosen:
            there = place[rows[name][i][0]]
            columns.append(there[there >= 0])
            values.append(rows[name][i][1][there >= 0])
            ends.append(ends[-1] + len(columns[-1]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            x = torch.sparse_csr_tensor(
                torch.tensor(ends),
                torch.tensor(np.concatenate(columns), dtype=torch.int64),
                torch.tensor(np.concatenate(values), dtype=torch.float32),
                size=(len(chosen), len(kept)),
            )
        return Sparse(x), torch.tensor(z[f"{name}_y"][chosen].astype(np.int64))

    test = np.arange(len(rows["test"]))
    return [part("train", halves[0]), part("train", halves[1]), part("test", test)]


def breast_cancer():
    """scikit-learn's: binary, 30 features, standardised; 284, 142 and 143 rows."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = standardised(x[order], slice(284)), y[order]
    return [pair(x[a:b], y[a:b]) for a, b in ((0, 284), (284, 426), (426, 569))]
