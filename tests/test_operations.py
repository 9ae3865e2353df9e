"""Every engine's products on every operation, against double backward and differences.

Two references share nothing with the library: double backward written out in plain torch on the
case without its fast path (and with the mathematical form of attention), and central differences
of the user's own gradient, which find second derivatives that torch itself has wrong.
"""

import random

import numpy as np
import pytest
import torch
from operations import OPERATIONS
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_bilevel as tb
from torch_bilevel.problem import raise_if_no_second_derivative
from torch_bilevel.products import parse

ENGINES = ["double_backward"]
TOLERANCES = {"double_backward": 1e-9}  # relative, against double backward
DIFFERENCES = 1e-5  # relative, of central differences
STEP = 1e-5  # ... along a vector of norm one
SEED = 5  # of what the loss itself draws


def linearization(engine, problem, calls):
    """The engine's linearisation of recorded calls."""
    return parse(engine).linearize(problem, calls)


SUPPORTED = [name for name, build in OPERATIONS.items() if not build().unsupported]
UNSUPPORTED = [name for name in OPERATIONS if name not in SUPPORTED]
every_engine = pytest.mark.parametrize("engine", ENGINES)
every_operation = pytest.mark.parametrize("name", SUPPORTED)


def seed():
    """As torch.manual_seed, which without a GPU takes milliseconds."""
    torch.default_generator.manual_seed(SEED)


def recorded(case):
    """A bilevel optimizer that has taken one step, of length zero, on the case's loss."""
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(case.inner, lr=0.0),
        torch.optim.SGD([case.outer], lr=0.1),
        modules=case.module,
        estimator="cg(max_steps=1)",
    )
    train = optimizer.inner_loss(case.loss)
    optimizer.outer_loss(lambda: sum(y.square().sum() for y in case.inner))
    seed()
    train().backward()
    optimizer.step()
    (record,) = optimizer._recorder.window.steps()
    return optimizer, record.calls


def products(engine, case, *vectors):
    """(H v, J v) for each vector; errors are named as around every estimator."""
    optimizer, calls = recorded(case)
    try:
        at = linearization(engine, optimizer.problem, calls)
        return [at.joint(v) for v in vectors]
    except RuntimeError as error:
        raise_if_no_second_derivative(error)
        raise


class Plain:
    """Derivatives of another copy of the case, where the recorded one is evaluated.

    The user has called the loss once, which may have updated buffers.
    """

    def __init__(self, name):
        self.case = OPERATIONS[name]()
        seed()
        self.case.loss()
        module = self.case.module or torch.nn.Module()
        self.buffers = [(b, b.clone()) for b in module.buffers()]

    def gradient(self, loss, **options):
        with torch.no_grad():
            for buffer, value in self.buffers:
                buffer.copy_(value)
        seed()
        found = torch.autograd.grad(loss(), self.case.inner, **options)
        return torch.cat([part.reshape(-1) for part in found])

    def products(self, v, loss):
        """(H v, J v) by double backward."""
        with sdpa_kernel(SDPBackend.MATH):
            along = self.gradient(loss, create_graph=True) @ v
            *Hv, Jv = torch.autograd.grad(along, [*self.case.inner, self.case.outer])
        return torch.cat([part.reshape(-1) for part in Hv]), Jv

    def differences(self, v):
        """(H v, J v) from central differences of the user's own gradient."""
        inner, outer = self.case.inner, self.case.outer
        steps = torch.split(STEP * v, [y.numel() for y in inner])
        steps = [s.view_as(y) for s, y in zip(steps, inner, strict=True)]
        Hv = self.difference(inner, steps)
        Jv = [self.difference([outer], [e]) @ v for e in STEP * torch.eye(3)]
        return Hv, torch.stack(Jv)

    def difference(self, tensors, steps):
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                torch._foreach_add_(tensors, steps, alpha=sign)
            ends.append(self.gradient(self.case.loss))
        with torch.no_grad():
            torch._foreach_add_(tensors, steps)
        return (ends[0] - ends[1]) / (2 * STEP)


def draw(case, seed):
    size = sum(y.numel() for y in case.inner)
    v = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return v / v.norm()


def assert_near(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert b.norm() > 1e-3  # the case tests something
        assert (a - b).norm() <= tolerance * b.norm()


@every_engine
@every_operation
def test_products_equal_double_backward(engine, name):
    case, plain = OPERATIONS[name](), Plain(name)
    v = draw(case, 1)
    (found,) = products(engine, case, v)
    assert_near(found, plain.products(v, plain.case.reference), TOLERANCES[engine])


@every_engine
@every_operation
def test_products_equal_differences_of_the_gradient(engine, name):
    case, plain = OPERATIONS[name](), Plain(name)
    v = draw(case, 2)
    (found,) = products(engine, case, v)
    expected = plain.differences(v)
    if case.differentiable:
        assert_near(found, expected, max(DIFFERENCES, TOLERANCES[engine]))
    else:  # a gradient that is not that of a function
        assert (found[0] - expected[0]).norm() > 1e-3 * expected[0].norm()


@every_engine
@every_operation
def test_hessian_is_symmetric(engine, name):
    case = OPERATIONS[name]()
    u, v = draw(case, 3), draw(case, 4)
    (Hu, _), (Hv, _) = products(engine, case, u, v)
    assert (u @ Hv - v @ Hu).abs() <= TOLERANCES[engine] * Hv.norm()


@every_operation
def test_smooth_says_whether_the_operation_itself_is_curved(name):
    plain = Plain(name)
    case = plain.case

    def weighted():
        out = case.plain()
        return torch.arange(len(out)).to(out).cos() @ out

    with sdpa_kernel(SDPBackend.MATH):
        gradient = plain.gradient(weighted, create_graph=True)
        found = [None]
        if gradient.requires_grad:
            along = gradient @ draw(case, 5)
            found = torch.autograd.grad(along, case.inner, allow_unused=True)
    curvature = sum(float(part.norm()) for part in found if part is not None)
    assert (curvature > 1e-6) == case.smooth


def bits(tensor):
    return tensor.detach().numpy().tobytes()


def state(case):
    """What products must leave alone: values, versions, generators, buffers, gradients."""
    module = case.module or torch.nn.Module()
    tensors = [*case.inner, case.outer, *module.buffers()]
    return (
        [(id(t), t._version, t.requires_grad, bits(t)) for t in tensors],
        [t.grad if t.grad is None else bits(t.grad) for t in tensors],
        [m.training for m in module.modules()],
        bits(torch.get_rng_state()),
        random.getstate(),
        np.random.get_state()[1].tobytes(),
    )


@every_engine
@every_operation
def test_products_leave_everything_as_it_was(engine, name):
    case = OPERATIONS[name]()
    optimizer, calls = recorded(case)
    torch.rand(3)
    before = state(case)
    at = linearization(engine, optimizer.problem, calls)
    assert state(case) == before
    at.joint(draw(case, 6)), at.hvp(draw(case, 7)), at.cross(draw(case, 8))
    assert state(case) == before


@every_engine
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_torch_cannot_differentiate_twice_is_named(engine, name):
    """The error says which operation, then the way round."""
    case = OPERATIONS[name]()
    with pytest.raises(tb.NoSecondDerivative, match=case.unsupported):
        products(engine, case, draw(case, 1))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_hypergradient_names_it_too(name):
    case = OPERATIONS[name]()
    optimizer, _ = recorded(case)
    with pytest.raises(tb.NoSecondDerivative, match=case.unsupported):
        optimizer.hypergradient()


def test_there_are_enough_operations():
    assert len(SUPPORTED) >= 80
