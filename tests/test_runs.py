"""Neighbouring small parameters are pulled back as one vector."""

import pytest
import torch
from cases import ADAM, SGD
from torch import nn

import torch_bilevel as tb
from torch_bilevel.inner import RULES, runs

NADAM = torch.optim.NAdam


class Many:
    """Ten parameters: two groups, one that is never used, one frozen, a scalar."""

    def __init__(self, kind, options):
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)
        )
        self.scale = torch.tensor(1.3, requires_grad=True)
        unused = torch.ones(2, requires_grad=True)
        self.x = torch.randn(6, requires_grad=True)
        parameters = [*self.net.parameters()]
        parameters[3].requires_grad_(False)
        self.optimizer = tb.BilevelOptimizer(
            kind(
                [
                    {"params": [*parameters[:2], unused, *parameters[2:4]]},
                    {"params": [*parameters[4:], self.scale], "lr": 0.02},
                ],
                lr=0.05,
                **options,
            ),
            SGD([self.x], lr=0.1),
            estimator="unrolled",
        )
        a, b = torch.randn(6, 3), torch.randn(6, 1)
        train = self.optimizer.inner_loss(
            lambda: (self.x.exp()[:, None] * (self.net(a) * self.scale - b) ** 2).mean()
        )
        self.optimizer.outer_loss(lambda: ((self.net(b @ a[:1]) - 1) ** 2).mean())
        for _ in range(4):
            self.optimizer.zero_grad()
            train().backward()
            self.optimizer.step()

    def hypergradient(self):
        return self.optimizer.hypergradient(write=False)[0]


@pytest.mark.parametrize(
    "kind, options",
    [(SGD, {}), (SGD, {"momentum": 0.9}), (ADAM, {"amsgrad": True}), (NADAM, {})],
)
def test_together_equals_one_by_one_and_finite_differences(kind, options, monkeypatch):
    case = Many(kind, options)
    together = case.hypergradient()
    assert tb.check_hypergradient(case.optimizer).relative_error < 1e-6
    monkeypatch.setattr(runs, "PIECE", 0)
    torch.testing.assert_close(together, case.hypergradient(), rtol=1e-12, atol=1e-14)


def test_what_may_be_taken_together():
    rule, hyper, other = RULES[SGD], {"lr": 0.1}, {"lr": 0.2}
    ones = [torch.ones(n) for n in (3, 2, 4, 5, 6, 2**16, 1)]
    gradients = [ones[0], ones[1], None, *ones[3:]]
    updates = [(rule, hyper)] * 4 + [(rule, other)] * 3
    empty = [{} for _ in ones]
    bars = [{"momentum_buffer": value} for value in ones]
    found = list(runs.runs(updates, ones, gradients, empty, bars))
    assert found == [
        range(0, 2),
        range(2, 3),
        range(3, 4),
        range(4, 5),
        range(5, 6),
        range(6, 7),
    ]
    states = [{"step": torch.tensor(float(k > 0))} for k in range(len(ones))]
    found = list(runs.runs([(rule, hyper)] * 7, ones, ones, states, bars))
    assert found == [range(0, 1), range(1, 5), range(5, 6), range(6, 7)]
    muon = [(RULES[torch.optim.Muon], hyper)] * 7
    assert len(list(runs.runs(muon, ones, ones, empty, bars))) == 7
