"""Products of a linearisation: linearity, symmetry, adjointness; the flat vector."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import torch_bilevel as tb
from torch_bilevel._vector import Layout
from torch_bilevel.problem import gradients


def problem(order=(0, 1, 2), seed=0):
    """A nonlinear inner loss on three leaves of different shapes, in a given order."""
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
    leaves = [make(2, 3), make(), make(4)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    lam = make(5).requires_grad_()
    A = make(5, 2)
    inner = [leaves[i] for i in order]
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(inner, lr=0.1), torch.optim.SGD([lam], lr=0.1)
    )

    def loss():
        a, s, c = leaves
        return ((torch.tanh(A @ a) * s).sum(1) * lam.exp()).sin().sum() + (
            c**4
        ).sum() * lam.sum()

    train = optimizer.inner_loss(loss)
    train().backward()
    optimizer.step()
    (record,) = optimizer._recorder.window.steps()
    return optimizer.problem, record.calls, loss, inner, lam


vectors = st.integers(0, 10**6)


def draw(seed, n):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=g, dtype=torch.float64)


@given(vectors, vectors, st.floats(-2, 2), st.integers(0, 5))
def test_linear_symmetric_adjoint(s1, s2, c, seed):
    p, calls, loss, inner, lam = problem(seed=seed)
    at = p.linearize(calls)
    u, v, w = draw(s1, 11), draw(s2, 11), draw(s1 + s2, 5)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # noqa: E731
    close(at.hvp(c * u + v), c * at.hvp(u) + at.hvp(v))
    close(at.cross(c * u + v), c * at.cross(u) + at.cross(v))
    close(u @ at.hvp(v), v @ at.hvp(u))
    Hv, Jv = at.joint(v)
    close(Hv, at.hvp(v))
    close(Jv, at.cross(v))
    # ⟨w, J v⟩ = ⟨Jᵀw, v⟩ with Jᵀw = ∂_y⟨∂_x g, w⟩, the other order of differentiation
    (gx,) = torch.autograd.grad(loss(), lam, create_graph=True)
    Jtw = torch.autograd.grad(gx @ w, inner, allow_unused=True)
    Jtw = p.inner.layout.flatten(Jtw)
    close(w @ Jv, Jtw @ v)


def test_products_equal_the_dense_derivatives():
    p, calls, loss, inner, lam = problem()
    at = p.linearize(calls)

    def of(y, x):
        with p.inner.swapped(), p.outer.swapped():
            p.inner.overwrite(p.inner.layout.split(y))
            p.outer.overwrite(p.outer.layout.split(x))
            return p.inner.layout.flatten(p.inner_gradients(calls))

    y, x = p.inner.read(), p.outer.read()
    torch.testing.assert_close(at.gradient, of(y, x))
    for size, product, of_y in ((11, at.hvp, True), (5, None, False)):
        for e in torch.eye(size):
            step = 1e-6 * e
            ends = [
                of(y + s * step, x) if of_y else of(y, x + s * step) for s in (1, -1)
            ]
            column = (ends[0] - ends[1]) / 2e-6
            if of_y:
                torch.testing.assert_close(product(e), column, rtol=1e-6, atol=1e-7)
            else:
                v = draw(3, 11)
                torch.testing.assert_close(
                    at.cross(v) @ e, column @ v, rtol=1e-6, atol=1e-7
                )


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0)])
def test_permuting_the_leaves_permutes_the_products(order):
    p, calls, *_ = problem()
    q, other, *_ = problem(order)
    v = draw(5, 11)
    parts = p.inner.layout.split(v)
    w = q.inner.layout.flatten([parts[i] for i in order])
    Hv, Jv = p.linearize(calls).joint(v)
    Hw, Jw = q.linearize(other).joint(w)
    torch.testing.assert_close(
        Hw, q.inner.layout.flatten([p.inner.layout.split(Hv)[i] for i in order])
    )
    torch.testing.assert_close(Jw, Jv)


def test_layout():
    tensors = [
        torch.ones(2, 3),
        torch.tensor(5.0),
        torch.zeros(0),
        torch.ones(2).bfloat16(),
    ]
    layout = Layout(tensors, ["a", "b", "empty", "half"])
    assert layout.numel == 9 and layout.dtype == torch.float64
    vector = layout.flatten(tensors)
    for part, tensor in zip(layout.split(vector), tensors, strict=True):
        assert torch.equal(part, tensor) and part.dtype == tensor.dtype
    assert torch.equal(layout.flatten([None] * 4), layout.zeros())
    assert Layout([torch.ones(2).bfloat16()], ["h"]).dtype == torch.float32
    assert layout == Layout(tensors, ["a", "b", "empty", "half"])
    assert layout != Layout(tensors[:2], ["a", "b"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_flat_vector_is_no_view_of_its_parts_and_the_same_where_it_is_looked_at(
    count, dtype
):
    parts = [torch.randn(2, k).to(dtype) for k in range(count)]
    layout = Layout(parts, list("abcde")[:count])
    flat = layout.flatten(parts)
    assert flat.dtype == layout.dtype and flat.shape == (layout.numel,)
    for k, there in enumerate(layout.split(flat)):
        assert torch.equal(there, parts[k]) and there.dtype == dtype
    if len(flat):
        before = [part.clone() for part in parts]
        flat += 1
        assert all(map(torch.equal, parts, before))
    # under a transform, and where it is differentiated, by other operations
    double = torch.func.vmap(lambda v: layout.flatten([2 * p for p in layout.split(v)]))
    torch.testing.assert_close(double(flat[None])[0], (2 * flat.to(dtype)).to(flat))
    leaf = flat.clone().requires_grad_()
    (found,) = torch.autograd.grad(layout.flatten(layout.split(leaf)).sum(), leaf)
    assert torch.equal(found, torch.ones_like(flat))
    other = [part.to(torch.float64) for part in parts]  # parts of another dtype
    assert layout.flatten(other).dtype == layout.dtype


def test_a_linear_inner_loss_has_a_zero_hessian():
    y, x = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.1, weight_decay=2.0), torch.optim.SGD([x], lr=0.1)
    )
    train = optimizer.inner_loss(lambda: (x * y).sum())
    optimizer.outer_loss(lambda: (y**2).sum())
    train().backward()
    optimizer.step()
    (found,) = optimizer.hypergradient()  # (H + wd) v = 2 y with H = 0;  J = I
    torch.testing.assert_close(found, -2 * y.detach() / 2.0)


def test_second_order_region_is_quiet_about_what_it_does_not_need():
    with tb.second_order(recurrent=True):
        assert (
            not torch.backends.cudnn.enabled or not torch.backends.cudnn.is_available()
        )


@pytest.mark.parametrize("draws", range(4))
@pytest.mark.parametrize("where", ["in place", "in full"])
def test_every_generator_is_captured_and_restored(draws, where, monkeypatch):
    """Cached normal deviates included, which are kept beside the twister."""
    import random

    import numpy as np

    from torch_bilevel.problem import Randomness
    from torch_bilevel.problem.randomness import _python, _torch

    if (
        where == "in full"
    ):  # as on an interpreter or torch that lays them out in another way
        monkeypatch.setattr(_python, "near", None)
        monkeypatch.setattr(_torch, "pieces", None)
    elif sys.implementation.name == "cpython":
        assert _python.near is not None and _torch.pieces is not None
    for _ in range(draws):
        np.random.randn(), random.gauss(0, 1), torch.randn(1)

    def sample():
        return (
            [random.random(), random.gauss(0, 1), random.gauss(0, 1)],
            np.random.rand(2).tolist() + np.random.randn(3).tolist(),
            torch.randn(3).tolist() + torch.randn(1, dtype=torch.float64).tolist(),
        )

    state = Randomness()
    first = sample()
    again = Randomness()
    for saved, expected in ((state, first), (again, sample()), (state, first)):
        saved.restore()
        assert sample() == expected
    loaded = Randomness.from_state_dict(state.state_dict())
    loaded.restore()
    assert sample() == first
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    np.random.randn()
    odd = Randomness()
    one = np.random.randn()  # consumes the cached deviate without moving the twister
    even = Randomness()
    two = np.random.randn()
    odd.restore()
    assert np.random.randn() == one
    even.restore()
    assert np.random.randn() == two


def test_a_hook_that_freezes_a_tensor_shifts_no_gradient():
    a, b, frozen = (torch.randn(2, requires_grad=True) for _ in range(3))
    frozen.requires_grad_(False)
    doubled = 2 * a

    def freeze(_):
        a.requires_grad_(False)
        frozen.requires_grad_(True)

    doubled.register_hook(freeze)
    loss = doubled.sum() + 5 * b.sum()
    (first, second), (third,) = gradients(loss, None, [frozen, a], [b])
    assert first is None
    assert second.tolist() == [2.0, 2.0]
    assert third.tolist() == [5.0, 5.0]
