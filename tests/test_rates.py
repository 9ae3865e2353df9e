"""Learned factors of the gradient, and transforms of it that depend on outer variables."""

import pytest
import torch
from cases import ADAM, SGD

import torch_bilevel as tb

WAYS = [
    "unrolled",
    "unrolled(keep_graph=True)",
    "unrolled(checkpoint_every=3)",
    "forward",
]


class Loop:
    """g = Σ x (A w + b − t)² of two parameters, five steps; rates and x are learned.

    Args:
        kind: the inner optimizer's class.
        options: its options.
        clip: declare and do clipping by a norm that is an outer variable too.
        estimator: as in the library.
    """

    def __init__(self, kind=SGD, options=None, clip=False, estimator="unrolled"):
        torch.manual_seed(0)
        self.w, self.b = (torch.randn(*s, requires_grad=True) for s in ((3,), (4,)))
        self.A, self.t = torch.randn(4, 3), torch.randn(4)
        self.x = torch.randn(4, requires_grad=True)
        self.norm = torch.tensor(0.8, requires_grad=True)
        self.start = [self.w.detach().clone(), self.b.detach().clone()]
        self.clip = clip
        outer = [self.x, self.norm] if clip else [self.x]
        self.optimizer = tb.BilevelOptimizer(
            kind([self.w, self.b], lr=0.05, **(options or {})),
            SGD(outer, lr=0.1),
            estimator=estimator,
        )
        self.rates = self.optimizer.learn_rates()
        with torch.no_grad():
            for rate in self.rates:
                rate.copy_(torch.rand_like(rate) + 0.3)
        if clip:
            self.optimizer.gradient_transform(self.clipped)
        self.train = self.optimizer.inner_loss(self.inner)
        self.optimizer.outer_loss(self.outer)

    def inner(self, w=None, b=None):
        w, b = (self.w, self.b) if w is None else (w, b)
        return (self.x.exp() * (self.A @ w + b - self.t) ** 2).mean()

    def outer(self, w=None, b=None):
        w, b = (self.w, self.b) if w is None else (w, b)
        return (w**3).sum() + (b**2).sum()

    def clipped(self, gradients):
        total = torch.cat([g.reshape(-1) for g in gradients]).norm()
        return [g * (self.norm / total).clamp(max=1.0) for g in gradients]

    def go(self, count=5):
        for _ in range(count):
            self.optimizer.zero_grad()
            self.train().backward()
            if self.clip:
                with torch.no_grad():
                    new = self.clipped([self.w.grad, self.b.grad])
                    self.w.grad, self.b.grad = new
            self.optimizer.step()
        return self.optimizer.hypergradient(write=False)

    def by_hand(self, momentum=0.0, count=5):
        """The same loop written out on the graph of all steps."""
        y = [value.clone().requires_grad_() for value in self.start]
        buffers = [torch.zeros_like(v) for v in y]
        for _ in range(count):
            g = torch.autograd.grad(self.inner(*y), y, create_graph=True)
            g = self.clipped(g) if self.clip else g
            scaled = [rate * part for rate, part in zip(self.rates, g, strict=True)]
            buffers = [
                momentum * m + part for m, part in zip(buffers, scaled, strict=True)
            ]
            y = [value - 0.05 * m for value, m in zip(y, buffers, strict=True)]
        outer = [self.x, *([self.norm] if self.clip else []), *self.rates]
        return torch.autograd.grad(self.outer(*y), outer)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("estimator", WAYS)
def test_rates_and_a_learned_clipping_norm_equal_the_graph_of_the_loop(
    estimator, momentum, clip
):
    loop = Loop(options={"momentum": momentum}, clip=clip, estimator=estimator)
    found = loop.go()
    for a, b in zip(found, loop.by_hand(momentum), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", WAYS[:3])
@pytest.mark.parametrize("kind", [SGD, ADAM])
def test_rates_equal_finite_differences_of_the_recorded_steps(kind, estimator):
    loop = Loop(kind, {"weight_decay": 0.1}, estimator=estimator)
    loop.go()
    assert tb.check_hypergradient(loop.optimizer).relative_error < 1e-6


def test_rates_that_outer_has_already():
    y = torch.tensor([3.0, -1.0], requires_grad=True)
    rate = torch.tensor([0.5, -0.2], requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([rate], lr=1.0), estimator="unrolled"
    )
    assert optimizer.learn_rates([rate])[0] is rate
    train = optimizer.inner_loss(lambda: (y**2).sum())
    valid = optimizer.outer_loss(lambda: (y**2).sum())
    start = y.detach().clone()
    train().backward()
    optimizer.step()
    valid().backward()
    after = (1 - 0.2 * rate.detach()) * start  # y₁ = (1 − 2 lr ρ) y₀
    torch.testing.assert_close(y.detach(), after)
    torch.testing.assert_close(rate.grad, 2 * after * -0.2 * start)


def test_two_inner_optimizers_have_rates():
    torch.manual_seed(0)
    a, b = (torch.randn(3, requires_grad=True) for _ in range(2))
    x = torch.randn(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        [SGD([a], lr=0.1), ADAM([b], lr=0.1)], SGD([x], lr=0.1), estimator="unrolled"
    )
    optimizer.learn_rates()
    train = optimizer.inner_loss(lambda: ((a + b - x) ** 2 * (1 + a**2)).sum())
    optimizer.outer_loss(lambda: (a * b).sum())
    for _ in range(3):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
    assert tb.check_hypergradient(optimizer).relative_error < 1e-6


def test_rates_resume_bit_for_bit():
    whole, half, again = Loop(), Loop(), Loop()
    for loop, count in ((whole, 5), (half, 3)):
        loop.go(count)
    with torch.no_grad():
        for mine, other in ((again.w, half.w), (again.b, half.b)):
            mine.copy_(other)
    again.optimizer.load_state_dict(half.optimizer.state_dict())
    again.go(2)
    for a, b in zip(whole.go(0), again.go(0), strict=True):
        assert torch.equal(a, b)


def test_meta_sgd_on_a_quadratic_task():
    """w_N = w* + Π (I − α ρ A)(w − w*), and its derivative by the graph of the loop."""
    torch.manual_seed(0)
    w = torch.randn(4, requires_grad=True)
    root = torch.randn(4, 4)
    A, b, t = root @ root.mT / 4 + 0.5 * torch.eye(4), torch.randn(4), torch.randn(4)
    optimizer = tb.MetaSGD(SGD([w], lr=0.1), SGD([w], lr=0.5))
    (rate,) = optimizer.rates
    with torch.no_grad():
        rate.copy_(torch.randn(4))
    support = optimizer.inner_loss(lambda: w @ A @ w / 2 - b @ w)
    query = optimizer.outer_loss(lambda: ((w - t) ** 2).sum() / 2)
    with optimizer.task():
        for _ in range(3):
            optimizer.zero_grad()
            support().backward()
            optimizer.step()
        query().backward()
    minimum = torch.linalg.solve(A, b)
    M = torch.eye(4) - 0.1 * torch.diag(rate) @ A
    reached = minimum + torch.linalg.matrix_power(M, 3) @ (w - minimum)
    exact = torch.autograd.grad(((reached - t) ** 2).sum() / 2, [w, rate])
    torch.testing.assert_close(w.grad, exact[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rate.grad, exact[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wrong", ["count", "shape", "elsewhere"])
def test_rates_that_do_not_fit_are_refused(wrong):
    y, x = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    rates = {
        "count": [],
        "shape": [torch.ones(3, requires_grad=True)],
        "elsewhere": [torch.ones(2, requires_grad=True)],
    }[wrong]
    optimizer = tb.BilevelOptimizer(SGD([y], lr=0.1), SGD([x, *rates], lr=0.1))
    if wrong == "elsewhere":
        rates = [torch.ones(2, requires_grad=True)]
    with pytest.raises(tb.BilevelError, match="one of the shape of each inner"):
        optimizer.learn_rates(rates)


def test_an_implicit_estimator_does_not_know_rates():
    loop = Loop(estimator="cg")
    with pytest.raises(tb.InvalidHyperparameters, match="Use 'unrolled'"):
        loop.go()
