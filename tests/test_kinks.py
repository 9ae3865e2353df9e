"""Kernels that round differently may move an activation across a kink; that is no mismatch."""

import pytest
import torch
from cases import ADAM, SGD

import torch_bilevel as tb


def relu(u):
    """Where fused attention is allowed u is a little larger, as another kernel might round it."""
    fused = torch.backends.cuda.flash_sdp_enabled()  # off inside tb.second_order()
    return (u + (1e-7 if fused else 0.0)).relu()


class Kinked:
    """A sum of ReLUs; at some steps one of 200 lies between the two kernels' kinks."""

    def __init__(self, estimator, kind=SGD):
        torch.manual_seed(0)
        self.w = torch.randn(4, requires_grad=True)
        self.x = torch.randn(4, requires_grad=True)
        self.optimizer = tb.BilevelOptimizer(
            kind([self.w], lr=0.01), SGD([self.x], lr=0.1), estimator=estimator
        )
        self.train = self.optimizer.inner_loss(
            lambda A: relu(A @ self.w).mean() + (self.x.exp() * self.w**2).sum()
        )
        self.optimizer.outer_loss(lambda: ((self.w - 1) ** 2).sum())

    def step(self, near, extra=0.0):
        A = torch.randn(200, 4)
        if near:  # the first row times w is −5e-8
            w = self.w.detach()
            A[0] -= (A[0] @ w + 5e-8) / (w @ w) * w
        self.optimizer.zero_grad()
        (self.train(A) + extra * self.w.sum()).backward()
        self.optimizer.step()


@pytest.mark.parametrize("kind", [SGD, ADAM])
@pytest.mark.parametrize(
    "estimator", ["cg", "unrolled", "unrolled(checkpoint_every=2)"]
)
@pytest.mark.parametrize("near", [(0,), (1,), (2,), (0, 1, 2, 3)])
def test_a_kink_between_two_kernels_is_not_a_mismatch(estimator, near, kind):
    case = Kinked(estimator, kind)
    for k in range(4):
        case.step(k in near)
    assert case.optimizer.hypergradient()[0].isfinite().all()


@pytest.mark.parametrize("at", [0, 2])
def test_a_small_unregistered_term_still_is(at):
    case = Kinked("unrolled")
    for k in range(4):
        case.step(True, extra=1e-3 if k == at else 0.0)
    with pytest.raises(tb.ReplayMismatch):
        case.optimizer.hypergradient()
