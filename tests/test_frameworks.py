"""Optimizers as training frameworks prepare them, and the page about frameworks."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import torch_bilevel as tb

PAGE = Path(__file__).parent.parent / "docs" / "frameworks.md"


class Prepared(torch.optim.Optimizer):
    """As Accelerate's: an optimizer by type, without hooks, that passes everything on."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.sync = True

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state

    @property
    def defaults(self):
        return self.optimizer.defaults

    def zero_grad(self, set_to_none=True):
        if self.sync:
            self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        if self.sync:
            self.optimizer.step(closure)


class Shared:
    """As Lightning's: of a class made for it, with the hooks of the optimizer it holds."""

    def __init__(self, optimizer):
        own = {k: v for k, v in optimizer.__dict__.items() if k != "step"}
        self.__dict__.update(own)
        self._inside = optimizer
        kind = type(optimizer)
        self.__class__ = type("Shared" + kind.__name__, (Shared, kind), {})

    @property
    def optimizer(self):
        return self._inside

    def step(self, closure=None):
        return self._inside.step()


class Problem:
    def __init__(self, estimator, prepare, several=False):
        torch.manual_seed(0)
        self.X, self.t = torch.randn(12, 4), torch.randint(0, 3, (12,))
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.x = torch.zeros(12, requires_grad=True)
        first, last = self.model[0].parameters(), self.model[2].parameters()
        make = torch.optim.SGD
        self.prepared = (
            [prepare(make(first, lr=0.1)), prepare(make(last, lr=0.1, momentum=0.5))]
            if several
            else prepare(make(self.model.parameters(), lr=0.1, momentum=0.9))
        )
        outer = prepare(make([self.x], lr=1.0))
        self.optimizer = tb.BilevelOptimizer(
            self.prepared, outer, modules=self.model, estimator=estimator
        )
        self.train = self.optimizer.inner_loss(self._train)
        self.valid = self.optimizer.outer_loss(
            lambda: F.cross_entropy(self.model(self.X.flip(1)), self.t)
        )

    def _train(self, rows):
        losses = F.cross_entropy(
            self.model(self.X[rows]), self.t[rows], reduction="none"
        )
        return (self.x[rows].exp() * losses).mean()

    def run(self, set_to_none=True, accumulate=1):
        for k, rows in enumerate(torch.arange(12).split(3) * 2):
            last = k % accumulate == accumulate - 1
            if isinstance(self.prepared, Prepared):
                self.prepared.sync = last
                (self.train(rows) / accumulate).backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none)
                continue
            (self.train(rows) / accumulate).backward()
            if last:
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none)
        return self.optimizer.hypergradient()[0]


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("kind", [Prepared, Shared, lambda o: Prepared(Prepared(o))])
@pytest.mark.parametrize("estimator", ["unrolled", "cg", "soba"])
def test_prepared_optimizers_are_those_inside(estimator, kind, several):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tb.NegativeCurvatureWarning)
        prepared = Problem(estimator, kind, several)
        found = prepared.run()
        expected = Problem(estimator, lambda o: o, several).run()
    assert found.any() and torch.equal(found, expected)
    prepared.optimizer.outer_step()
    assert prepared.optimizer.outer_steps == 1 and prepared.x.any()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_a_prepared_optimizer_accumulates(set_to_none):
    """Its ``step`` and ``zero_grad`` do nothing meanwhile, and calls are not forgotten."""
    prepared = Problem("unrolled", Prepared)
    found = prepared.run(set_to_none, accumulate=2)
    assert len(prepared.optimizer._recorder.window) == 4
    expected = Problem("unrolled", lambda o: o).run(set_to_none, accumulate=2)
    assert torch.equal(found, expected)


def test_an_optimizer_around_another_with_hooks_of_its_own_is_one_itself():
    """Lookahead, say, whose steps do more than those of what it holds."""

    class Around(torch.optim.Optimizer):
        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups, {})
            self.optimizer = optimizer

        def step(self, closure=None):
            self.optimizer.step()

    with pytest.raises(tb.NoUpdateRule, match="Around"):
        Problem("unrolled", Around)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tb.NegativeCurvatureWarning)
        assert (
            Problem("cg", lambda o: Around(o) if o.defaults["momentum"] else o)
            .run()
            .any()
        )


def test_what_has_an_optimizer_and_is_none_is_refused():
    y, x = (torch.ones(1, requires_grad=True) for _ in range(2))
    inner, outer = torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1)
    with pytest.raises(TypeError, match="inner= must be a torch.optim optimizer"):
        tb.BilevelOptimizer(scheduler, outer)


def test_gradients_averaged_over_processes_are_named(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    problem = Problem("cg", lambda o: o)
    problem.train(torch.arange(3)).backward()
    problem.model[0].weight.grad += 0.1
    problem.optimizer.step()
    with pytest.raises(tb.ReplayMismatch, match="process group of 2.*one process"):
        problem.optimizer.hypergradient()


@pytest.mark.parametrize("name", ["accelerate", "lightning", "transformers"])
def test_the_page_runs(name, monkeypatch):
    """Where the framework is installed."""
    pytest.importorskip(name)
    monkeypatch.setattr(torch, "get_default_dtype", torch.get_default_dtype)
    torch.set_default_dtype(torch.float32)
    X, t = torch.randn(40, 5), torch.randint(0, 3, (40,))
    space = {
        "model": nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)),
        "weights": torch.zeros(40, requires_grad=True),
        "train_loader": DataLoader(TensorDataset(X, t, torch.arange(40)), 5),
        "valid_loader": DataLoader(TensorDataset(X, t), 20),
    }
    common, *blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf8"), re.S)
    (block,) = (b for b in blocks if f"import {name}" in b or f"from {name}" in b)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(common + block, space)
        if name == "lightning":
            module = space["Weighted"](space["model"], 40)
            trainer = space["lightning"].Trainer(
                max_epochs=2, accelerator="cpu", logger=False, barebones=True
            )
            trainer.fit(module, space["train_loader"])
            assert module.weights.any()
        elif name == "accelerate":
            assert space["weights"].any()
