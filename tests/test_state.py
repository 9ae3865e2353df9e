"""Everything comes back: after a hypergradient, after an exception, after a resume."""

import io
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import torch_bilevel as tb

ESTIMATORS = [
    "cg",
    "unrolled",
    "checkpointed",
    "minres",
    "neumann",
    "unrolled(keep_graph=True)",
]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tb.NegativeCurvatureWarning)
        warnings.simplefilter("ignore", tb.ZeroHypergradientWarning)
        yield


class Model(nn.Module):
    """Dropout, BatchNorm, a custom buffer, and every kind of random number."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(6, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += len(x)
        noise = random.random() + np.random.randn() + self.seen / 1000
        hidden = torch.tanh(self.drop(self.norm(self.first(x))))
        return self.last(hidden) * (1 + 0.1 * noise)


class Case:
    def __init__(
        self, estimator="cg", inner=torch.optim.Adam, fail_after=None, **options
    ):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        self.model = Model()
        self.lam = torch.randn(6, requires_grad=True)
        self.X, self.t = torch.randn(30, 4), torch.randint(0, 2, (30,))
        self.fail_after, self.count = fail_after, 0
        self.inner = inner(self.model.parameters(), lr=0.02)
        self.outer = torch.optim.Adam([self.lam], lr=0.05)
        self.optimizer = tb.BilevelOptimizer(
            self.inner, self.outer, modules=self.model, estimator=estimator, **options
        )
        self.train = self.optimizer.inner_loss(self.train_loss)
        loader = DataLoader(TensorDataset(self.X[:15], self.t[:15]), 5, shuffle=True)
        self.valid = self.optimizer.outer_loss(self.valid_loss, data=loader)

    def train_loss(self, x, t):
        self.count += 1
        if self.fail_after is not None and self.count > self.fail_after:
            raise ZeroDivisionError("in the middle of a replay")
        penalty = (self.lam.exp() * self.model.last.weight**2).sum()
        return F.cross_entropy(self.model(x), t) + 0.01 * penalty

    def valid_loss(self, x, t):
        return F.cross_entropy(self.model(x), t)

    def step(self, k):
        index = torch.arange(30).split(10)[k % 3]
        self.optimizer.zero_grad()
        self.train(self.X[index], self.t[index]).backward()
        self.optimizer.step()

    def everything(self):
        found = {n: v.clone() for n, v in self.model.state_dict().items()}
        found |= {f"grad {n}": p.grad.clone() for n, p in self.model.named_parameters()}
        found |= {
            f"state {i} {k}": v.clone()
            for i, s in self.inner.state_dict()["state"].items()
            for k, v in s.items()
            if v is not None
        }
        found |= {f"version {n}": p._version for n, p in self.model.named_parameters()}
        found |= {f"version {n}": b._version for n, b in self.model.named_buffers()}
        found |= {f"at {n}": b.data_ptr() for n, b in self.model.named_buffers()}
        found |= {f"flag {n}": m.training for n, m in self.model.named_modules()}
        found["lam"], found["lam flag"] = self.lam.clone(), self.lam.requires_grad
        found["torch"], found["python"] = torch.get_rng_state(), random.getstate()
        found["numpy"] = str(np.random.get_state())
        found["hyper"] = str([dict(g, params=0) for g in self.inner.param_groups])
        return found


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        equal = (
            torch.equal(value, b[key]) if torch.is_tensor(value) else value == b[key]
        )
        assert equal, key


@pytest.mark.parametrize("inner", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_hypergradient_leaves_everything_bit_identical(estimator, inner):
    case = Case(estimator, inner)
    for k in range(5):
        case.step(k)
    before = case.everything()
    case.optimizer.hypergradient()
    same(case.everything(), before)
    case.valid(case.X, case.t).backward()
    same(case.everything(), before)
    tb.check_hypergradient(case.optimizer, case.X, case.t, max_steps=30)
    same(case.everything(), before)


@pytest.mark.parametrize("extra", [1, 2, 4, 6])
@pytest.mark.parametrize("estimator", ESTIMATORS[:-1])  # a kept graph replays nothing
def test_also_when_the_loss_raises_in_the_middle(estimator, extra):
    case = Case(estimator)
    for k in range(5):
        case.step(k)
    before = case.everything()
    case.fail_after = case.count + extra
    raised = False
    for call in (
        case.optimizer.hypergradient,
        lambda: tb.check_hypergradient(case.optimizer),
    ):
        try:
            call()
        except ZeroDivisionError:
            raised = True
            same(case.everything(), before)
    assert raised
    assert case.lam.grad is None or extra == 6
    case.fail_after = None
    case.step(0)  # and the loop goes on


@pytest.mark.parametrize("estimator", ["unrolled", "unrolled(checkpoint_every=2)"])
@pytest.mark.parametrize("inner", [torch.optim.SGD, torch.optim.Adam])
def test_dropout_batchnorm_and_buffers_equal_finite_differences(estimator, inner):
    """Each replayed call sees the masks, statistics and random numbers of the user's own."""
    case = Case(estimator, inner)
    for k in range(5):
        case.step(k)
    assert tb.check_hypergradient(case.optimizer, case.X, case.t).relative_error < 1e-6


def test_graphs_the_user_holds_stay_valid():
    case = Case("unrolled")
    case.model.eval()
    held = case.model(case.X).sum()
    expected = torch.autograd.grad(case.model(case.X).sum(), case.model.last.weight)
    case.model.train()
    case.step(0)
    with pytest.raises(RuntimeError, match="inplace"):
        held.backward()  # torch's own rule: the user's step moved the parameters
    held = F.cross_entropy(case.model(case.X), case.t)
    expected = torch.autograd.grad(held, case.model.last.weight, retain_graph=True)
    case.optimizer.hypergradient()
    found = torch.autograd.grad(held, case.model.last.weight)
    assert torch.equal(found[0], expected[0])


# --- resume ------------------------------------------------------------------------------------


def roundtrip(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plain_types(value):
    if isinstance(value, dict):
        return all(
            isinstance(k, (str, int)) and plain_types(v) for k, v in value.items()
        )
    if isinstance(value, (list, tuple)):
        return all(map(plain_types, value))
    return value is None or isinstance(value, (str, int, float, bool, torch.Tensor))


@pytest.mark.parametrize("stop", [6, 8])  # right after an outer step; in mid-window
@pytest.mark.parametrize(
    "estimator",
    ["cg(max_steps=3)", "richardson", "unrolled", "unrolled(checkpoint_every=2)"],
)
def test_resume_is_bit_exact(estimator, stop):
    straight = Case(estimator, inner_steps=3)
    for k in range(14):
        straight.step(k)

    first = Case(estimator, inner_steps=3)
    for k in range(stop):
        first.step(k)
    saved = roundtrip(
        {
            "optimizer": first.optimizer.state_dict(),
            "model": first.model.state_dict(),
            "lam": first.lam.detach(),
        }
    )
    assert plain_types(saved["optimizer"])
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()

    second = Case(estimator, inner_steps=3)
    second.step(0)  # a process that did something else before
    second.model.load_state_dict(saved["model"])
    with torch.no_grad():
        second.lam.copy_(saved["lam"])
    second.optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(generators[0])
    random.setstate(generators[1])
    np.random.set_state(generators[2])
    for k in range(stop, 14):
        second.step(k)
    assert torch.equal(second.lam, straight.lam)
    for (name, a), b in zip(
        straight.model.state_dict().items(),
        second.model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b), name
    assert second.optimizer.outer_steps == straight.optimizer.outer_steps == 4
    assert [float(r.loss) for r in second.optimizer.history] == [
        float(r.loss) for r in straight.optimizer.history
    ]


def test_a_window_that_cannot_be_saved_says_so():
    case = Case()
    train = case.optimizer.inner_loss(lambda thing: case.train_loss(case.X, case.t))
    case.optimizer.zero_grad()
    train(object()).backward()
    case.optimizer.step()
    with pytest.warns(tb.BilevelWarning, match="a object.*right after an outer step"):
        state = case.optimizer.state_dict()
    assert state["window"] == {
        "count": 0,
        "interval": 1,
        "number": 0,
        "tangents": None,
        "records": [],
    }


def test_loading_what_does_not_fit():
    case = Case()
    with pytest.raises(tb.BilevelError, match="not a state_dict of a BilevelOptimizer"):
        case.optimizer.load_state_dict(case.inner.state_dict())
    saved = case.optimizer.state_dict()
    case.optimizer.outer_losses.clear()
    with pytest.raises(tb.BilevelError, match="Register the same losses"):
        case.optimizer.load_state_dict(saved)
