"""The outer loss whose backward is the hypergradient; gradients land where they should."""

from collections import namedtuple
from types import SimpleNamespace

import cases
import pytest
import torch
from problems import DataWeights, HyperRepresentation, Quadratic, flat
from torch.utils._python_dispatch import TorchDispatchMode

import torch_bilevel as tb


def ready(estimator="cg", num_steps=3, problem=None):
    problem = problem or HyperRepresentation()
    optimizer = problem.optimizer(estimator=estimator)
    problem.steps(optimizer, num_steps)
    return problem, optimizer


ESTIMATORS = [*cases.ESTIMATORS, "checkpointed"]


@pytest.mark.parametrize(
    "estimator", sorted(set(ESTIMATORS) - cases.RANDOM - cases.NEEDS_OUTPUTS)
)
def test_backward_is_the_hypergradient_bit_for_bit(estimator):
    problem, optimizer = ready(estimator)
    problem.valid().backward()
    written = [x.grad.clone() for x in problem.x]
    found = optimizer.hypergradient(write=False)
    assert all(torch.equal(a, b) for a, b in zip(found, written, strict=True))
    optimizer.hypergradient()
    assert all(torch.equal(x.grad, b) for x, b in zip(problem.x, written, strict=True))


def test_what_a_solver_learns_is_kept_with_the_outer_step():
    """λ̂_max, which the step size comes from: asked twice, a hypergradient is the same."""
    torch.manual_seed(0)
    problem = DataWeights()
    optimizer = problem.optimizer(estimator="neumann(num_steps=5)")
    problem.steps(optimizer, 2)
    first = optimizer.hypergradient(write=False)
    assert all(map(torch.equal, first, optimizer.hypergradient(write=False)))
    assert optimizer._memories[("valid_loss",)].solver.eigenvalue is None
    optimizer.outer_step()
    assert optimizer._memories[("valid_loss",)].solver.eigenvalue is not None


EVERY = {*ESTIMATORS, "unrolled(keep_graph=True)", "cg(hessian_calls=3)"}


@pytest.mark.parametrize(
    "estimator", sorted(EVERY - cases.RANDOM - cases.NEEDS_OUTPUTS)
)
def test_nor_does_it_matter_where_gradients_are_accumulated(estimator):
    """A backward runs under no_grad: sums of several calls' graphs must not lose them."""

    def found(how):
        torch.manual_seed(0)
        problem = HyperRepresentation()
        optimizer = problem.optimizer(estimator=estimator)
        for _ in range(3):
            optimizer.zero_grad()
            for part in (0.75, 0.25):
                (part * problem.train()).backward()
            optimizer.step()
        how(problem, optimizer)
        return problem.H.grad

    def under_no_grad(problem, optimizer):
        with torch.no_grad():
            optimizer.hypergradient()

    known = found(lambda problem, optimizer: optimizer.hypergradient())
    assert torch.equal(found(lambda problem, _: problem.valid().backward()), known)
    assert torch.equal(found(under_no_grad), known)
    torch.testing.assert_close(known, once(estimator), rtol=1e-6, atol=1e-9)


def once(estimator):
    """The same with one call a step."""
    torch.manual_seed(0)
    problem, optimizer = ready(estimator)
    optimizer.hypergradient()
    return problem.H.grad


@pytest.mark.parametrize("estimator", ["cg", "unrolled", "unrolled(keep_graph=True)"])
def test_weights_direct_terms_and_sums(estimator):
    problem, optimizer = ready(estimator)
    other = optimizer.outer_loss(lambda: (problem.w**3).sum() + problem.H.sum())
    f1, f2 = optimizer.outer_losses.values()
    (g1,) = optimizer.hypergradient(loss=f1, write=False)
    (g2,) = optimizer.hypergradient(loss=f2, write=False)
    H = problem.H

    for _ in range(4):
        (problem.valid() / 4).backward()
    torch.testing.assert_close(H.grad, g1)

    H.grad = None
    (problem.valid() + 1e-2 * H.abs().mean()).backward()
    torch.testing.assert_close(H.grad, g1 + 1e-2 * H.detach().sign() / H.numel())

    H.grad = None
    (2.0 * problem.valid() - 3.0 * other()).backward()
    torch.testing.assert_close(H.grad, 2 * g1 - 3 * g2)

    optimizer.hypergradient()  # both registered losses together
    torch.testing.assert_close(H.grad, g1 + g2, rtol=1e-3, atol=1e-4)
    optimizer.hypergradient(loss=f1, accumulate=True)
    torch.testing.assert_close(H.grad, 2 * g1 + g2, rtol=1e-3, atol=1e-4)


def test_inner_gradients_stay_as_they_are():
    problem, optimizer = ready()
    before = [y.grad for y in problem.y]
    values = [g.clone() for g in before]
    problem.valid().backward()
    for y, g, v in zip(problem.y, before, values, strict=True):
        assert y.grad is g and torch.equal(g, v)


class Watch(TorchDispatchMode):
    """Counts operations that produce something of the outer variable's shape."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.seen = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.seen.append(str(func))
        return result


def test_the_inner_backward_does_nothing_for_outer_variables():
    problem = DataWeights(n=23, d=5, batch=23)
    optimizer = problem.optimizer()
    batch = problem.batches[0]
    loss = problem.train(*batch)
    with Watch((23,)) as watch:
        loss.backward()
    with_library = watch.seen
    assert problem.logits.grad is None and problem.logits.requires_grad
    optimizer.remove()
    problem.logits.requires_grad_(False)
    problem.w.grad = None
    loss = problem.train_loss(*batch)
    with Watch((23,)) as watch:
        loss.backward()
    assert with_library == watch.seen


def test_an_outer_step_between_forward_and_backward_of_the_inner_loss():
    problem, optimizer = ready(problem=DataWeights(batch=6), num_steps=4)
    batch = problem.batches[0]
    y = [p.detach().clone() for p in problem.y]
    expected = torch.autograd.grad(problem.train_loss(*batch), problem.y)
    optimizer.zero_grad()
    loss = problem.train(*batch)
    optimizer.outer_step()
    loss.backward()
    assert all(torch.equal(p, before) for p, before in zip(problem.y, y, strict=True))
    assert torch.equal(problem.w.grad, expected[0])
    optimizer.step()


def test_without_backward_or_grad_it_is_an_ordinary_evaluation():
    problem, optimizer = ready()
    with torch.no_grad():
        value = problem.valid()
    assert not value.requires_grad
    torch.testing.assert_close(value, problem.valid().detach(), rtol=0, atol=0)
    torch.testing.assert_close(value, problem.valid_loss().detach(), rtol=0, atol=0)
    assert optimizer.last_report is None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda loss, extra: (loss, extra),
        lambda loss, extra: [loss, extra],
        lambda loss, extra: namedtuple("Out", "loss extra")(loss, extra),
        lambda loss, extra: SimpleNamespace(loss=loss, extra=extra),
    ],
    ids=["tuple", "list", "namedtuple", "object"],
)
def test_losses_that_return_more(wrap):
    problem, reference = ready()
    expected = problem.hypergradient(reference)
    problem2 = HyperRepresentation()
    for a, b in zip(problem2.y + problem2.x, problem.y + problem.x, strict=True):
        a.data.copy_(b)
    for name in ("X", "t", "Xv", "tv"):
        setattr(problem2, name, getattr(problem, name))
    inner, outer = problem2.train_loss, problem2.valid_loss
    problem2.train_loss = lambda: wrap(inner(), "more")
    problem2.valid_loss = lambda: wrap(outer(), problem2.w * 2)
    optimizer = problem2.optimizer(inner=torch.optim.SGD(problem2.y, lr=1e-30))

    def loss_of(result):
        return result.loss if hasattr(result, "loss") else result[0]

    result = problem2.train()
    assert (result.extra if hasattr(result, "extra") else result[1]) == "more"
    loss_of(result).backward()
    optimizer.step()
    result = problem2.valid()
    extra = result.extra if hasattr(result, "extra") else result[1]
    assert torch.equal(extra, problem2.w.detach() * 2) and not extra.requires_grad
    loss_of(result).backward()
    torch.testing.assert_close(problem2.H.grad.reshape(-1), expected)


def test_one_function_registered_as_both():
    torch.manual_seed(0)
    w, lam = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    A, b = torch.randn(8, 3), torch.randn(8)

    def loss(A, b):
        return ((A @ w - b) ** 2).mean() + (lam.exp() * w**2).sum()

    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([w], lr=0.1), torch.optim.SGD([lam], lr=0.1)
    )
    train, valid = optimizer.inner_loss(loss), optimizer.outer_loss(loss)
    train(A, b).backward()
    optimizer.step()
    assert lam.grad is None
    valid(A, b).backward()
    assert lam.grad is not None


def test_several_inner_losses_with_weights():
    """The inner objective is what was back-propagated, with its weights."""
    torch.manual_seed(0)
    problem = Quadratic()
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(problem.y, lr=0.05),
        torch.optim.SGD(problem.x, lr=0.1),
        estimator="direct",
    )
    first = optimizer.inner_loss(problem.train_loss)
    second = optimizer.inner_loss(lambda: flat(problem.y).pow(2).sum() / 2)
    optimizer.outer_loss(problem.valid_loss)
    (2 * first() + 0.5 * second()).backward()
    optimizer.step()
    y = flat(problem.y).detach()
    to_x, to_y = problem.partials(y)
    H = 2 * problem.A + 0.5 * torch.eye(len(y))
    exact = to_x - 2 * problem.C @ torch.linalg.solve(H, to_y)
    torch.testing.assert_close(flat(optimizer.hypergradient()), exact)


def test_weight_and_batches_of_outer_losses():
    problem = DataWeights()
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(problem.y, lr=0.05),
        torch.optim.SGD(problem.x, lr=0.1),
        estimator="direct",
    )
    train = optimizer.inner_loss(problem.train_loss)
    data = [(problem.Xv[:5], problem.tv[:5]), (problem.Xv[5:10], problem.tv[5:10])]
    data += [(problem.Xv[10:], problem.tv[10:])]

    @optimizer.outer_loss(data=data, batches="all", weight=0.5)
    def valid(X, t):
        return ((X @ problem.w - t) ** 2).mean() / 2

    train(*problem.batches[0]).backward()
    optimizer.step()
    w = problem.w.detach()
    v = torch.linalg.solve(problem.matrix(), problem.validation_gradient(w))
    exact = -0.5 * problem.cross(problem.batches[0][2], w, v)
    torch.testing.assert_close(flat(optimizer.hypergradient()), exact)
    products = optimizer.last_report.products
    assert products == 5 + 1  # one solve for all batches: 5 columns and one J v


def test_a_second_opinion_changes_nothing():
    problem, optimizer = ready("cg(max_steps=2)")
    first = problem.hypergradient(optimizer)
    grads = [x.grad.clone() for x in problem.x]
    optimizer.hypergradient(estimator="minres(max_steps=40, rtol=1e-12)", write=False)
    assert all(torch.equal(x.grad, g) for x, g in zip(problem.x, grads, strict=True))
    assert torch.equal(first, problem.hypergradient(optimizer))


def test_outer_loss_refuses_a_point_that_moved():
    problem, optimizer = ready()
    value = problem.valid()
    problem.steps(optimizer, 1)
    with pytest.raises(tb.StalePoint, match="moved between"):
        value.backward()


def test_the_hypergradient_is_not_differentiable_again():
    problem, optimizer = ready()
    (g,) = torch.autograd.grad(problem.valid(), problem.x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        g.sum().backward()
    (g,) = torch.autograd.grad(problem.valid() ** 2, problem.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
