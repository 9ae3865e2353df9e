"""Update rules: value equals torch.optim, derivative equals finite differences."""

import pytest
import torch
from cases import ADAM, RULES, SGD, rule_id

import torch_bilevel as tb
from torch_bilevel.inner import RULES as REGISTERED
from torch_bilevel.inner import find_rule


def build(case, parameters, **extra):
    kind, options = case
    fixed = {k: v.clone() if torch.is_tensor(v) else v for k, v in options.items()}
    return kind(parameters, **fixed, **extra)


MODES = {
    "single": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_value_equals_torch_optim(case, mode):
    """Step by step from the first, and from a state loaded into a new optimizer."""
    if mode == "foreach" and torch.is_tensor(case[1]["lr"]):
        pytest.skip("torch refuses a tensor lr with foreach")
    parameters = [torch.randn(3, 2), torch.randn(()), torch.randn(4)]
    parameters = [p.requires_grad_() for p in parameters]
    optimizer = build(case, parameters, **MODES[mode])
    rule = find_rule(optimizer, REGISTERED)
    for step in range(5):
        if step == 3:
            saved = optimizer.state_dict()
            optimizer = build(case, parameters, **MODES[mode])
            optimizer.load_state_dict(saved)
        before = [
            (p.detach().clone(), {k: copied(v) for k, v in optimizer.state[p].items()})
            for p in parameters
        ]
        for p in parameters:
            p.grad = torch.randn_like(p)
        gradients = [p.grad.clone() for p in parameters]  # foreach writes into .grad
        optimizer.step()
        group = optimizer.param_groups[0]
        for p, g, (value, state) in zip(parameters, gradients, before, strict=True):
            new, new_state = rule.step(value, g, clean(state), group)
            assert torch.allclose(new, p.detach(), rtol=1e-13, atol=1e-14)
            if mode == "single":
                assert torch.equal(new, p.detach())
            for key, expected in clean(optimizer.state[p]).items():
                expected = torch.as_tensor(expected, dtype=torch.float64)
                found = torch.as_tensor(new_state[key], dtype=torch.float64)
                torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


def copied(value):
    return value.clone() if torch.is_tensor(value) else value


def clean(state):
    return {k: v for k, v in state.items() if v is not None}


def program(case, x, num_steps, library=None):
    """An inner loop on two tensors of different shapes; returns the validation loss."""
    torch.manual_seed(1)
    a, b = torch.randn(3, 2), torch.randn(2)
    A, target = torch.randn(5, 3), torch.randn(5, 2)
    a, b = a.requires_grad_(), b.requires_grad_()
    inner = build(case, [{"params": [a]}, {"params": [b], "lr": 0.03}])
    sign = -1 if case[1].get("maximize") else 1

    def train_loss(scale):
        fit = (torch.tanh(A @ a + b) - target) ** 2
        return scale * sign * ((x.exp() * fit).mean() + (x[0] - x[1] * b).pow(2).sum())

    def valid_loss():
        return (torch.sin(a) ** 2).sum() + (b * x).sum()

    if library:
        optimizer = tb.BilevelOptimizer(
            inner, torch.optim.SGD([x], lr=0.1), estimator=library
        )
        train_loss = optimizer.inner_loss(train_loss)
        optimizer.outer_loss(valid_loss)
    for k in range(num_steps):
        inner.zero_grad()
        train_loss(1.0 + 0.1 * k).backward(inputs=None if library else [a, b])
        inner.step()
    return optimizer if library else valid_loss().item()


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_unrolled_equals_finite_differences_of_a_plain_program(case, num_steps):
    x = torch.tensor([0.2, -0.4], requires_grad=True)
    optimizer = program(case, x, num_steps, library="unrolled")
    (found,) = optimizer.hypergradient()
    difference = torch.zeros(2)
    for i, e in enumerate(torch.eye(2)):
        ends = [program(case, (x + s * 1e-5 * e).detach(), num_steps) for s in (1, -1)]
        difference[i] = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close(found, difference, rtol=2e-6, atol=2e-8)
    assert tb.check_hypergradient(optimizer).relative_error < 1e-6


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1}])
def test_adam_has_no_nan_where_a_gradient_is_exactly_zero(options):
    """Unused embedding rows: v = 0, and √v has no derivative."""
    table = torch.randn(4, 3, requires_grad=True)
    x = torch.tensor(0.5, requires_grad=True)
    inner = ADAM([table], lr=0.1, **options)
    optimizer = tb.BilevelOptimizer(inner, SGD([x], lr=0.1), estimator="unrolled")
    train = optimizer.inner_loss(lambda: ((table[:2] - x) ** 4).sum())
    optimizer.outer_loss(lambda: (table**3).sum())
    for _ in range(3):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
    (found,) = optimizer.hypergradient()
    assert torch.isfinite(found) and found != 0
    assert tb.check_hypergradient(optimizer).relative_error < 1e-6


def test_a_parameter_without_gradient_is_skipped_as_torch_does():
    """Weight decay does not touch it; it passes the adjoint through."""
    used, unused = (
        torch.randn(3, requires_grad=True),
        torch.randn(2, requires_grad=True),
    )
    x = torch.randn(3, requires_grad=True)
    inner = SGD([used, unused], lr=0.1, momentum=0.9, weight_decay=0.5)
    optimizer = tb.BilevelOptimizer(inner, SGD([x], lr=1.0), estimator="unrolled")
    train = optimizer.inner_loss(lambda: torch.cosh(used - x).sum())
    optimizer.outer_loss(lambda: (used.sin() * unused.sum()).sum())
    for _ in range(3):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
    assert tb.check_hypergradient(optimizer).relative_error < 1e-6


def test_subclasses():
    class Renamed(SGD):
        pass

    class Changed(SGD):
        def step(self, closure=None):
            return super().step(closure)

    y = torch.zeros(2, requires_grad=True)
    x = torch.zeros(2, requires_grad=True)
    outer = SGD([x], lr=0.1)
    assert find_rule(Renamed([y], lr=0.1), REGISTERED) is REGISTERED[SGD]
    with pytest.raises(tb.NoUpdateRule, match="Changed.*implicit estimator"):
        tb.BilevelOptimizer(Changed([y], lr=0.1), outer, estimator="unrolled")
    # an implicit estimator works, unless weight decay enters in an unknown way
    tb.BilevelOptimizer(Changed([y], lr=0.1), outer).remove()
    with pytest.raises(tb.NoUpdateRule, match="weight_decay=0.1"):
        tb.BilevelOptimizer(Changed([y], lr=0.1, weight_decay=0.1), outer)
