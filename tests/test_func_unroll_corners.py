"""Unrolling as a pure function: corner cases and what is refused."""

import pytest
import torch
from torch.func import grad, jacfwd, jvp, vmap

import torch_bilevel as tb
from torch_bilevel.func.rules import rule
from torch_bilevel.func.unrolling import unroll

SGD = torch.optim.SGD


def close(found, expected, rtol=1e-12, atol=1e-13):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 1}, {"mode": "forward"}])
def test_one_step_of_a_number(options):
    train = unroll("sgd(lr=0.5)", 1, **options)(lambda y, x: x["used"] * y**2)
    y, x = torch.tensor(1.0), {"used": torch.tensor(0.2), "unused": torch.ones(2)}
    close(train(y, x), torch.tensor(0.8))
    found = grad(train, argnums=1)(y, x)
    close(found, {"used": torch.tensor(-1.0), "unused": torch.zeros(2)})
    assert train.__wrapped__


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}, {"mode": "forward"}])
def test_float32_and_attention(options):
    """Dtypes stay; attention has its second derivative."""
    q = torch.randn(1, 1, 4, 8, dtype=torch.float32)

    def g(y, x):
        out = torch.nn.functional.scaled_dot_product_attention(y, y * x, y)
        return (out**2).sum()

    train = unroll("adam(lr=0.1)", 3, **options)(g)
    x = torch.tensor(0.7, dtype=torch.float32, requires_grad=True)
    y = train(q, x)
    assert y.dtype == torch.float32
    (found,) = torch.autograd.grad((y**2).sum(), x)
    assert found.dtype == torch.float32
    assert torch.isfinite(found)


def test_what_unroll_refuses():
    for wrong in (0, -1, 2.5, True, "3"):
        with pytest.raises(ValueError, match="num_steps must be a whole number"):
            unroll("sgd", wrong)
    for name in ("window", "checkpoint_every"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            unroll("sgd", 3, **{name: 0})
    with pytest.raises(tb.UnknownName, match="'sideways'.*'reverse' or 'forward'"):
        unroll("sgd", 3, mode="sideways")
    with pytest.raises(tb.BilevelError, match="nothing to checkpoint"):
        unroll("sgd", 3, mode="forward", checkpoint_every=2)


@pytest.mark.parametrize(
    "loss, error, match",
    [
        (lambda y, x: y * x, tb.InvalidLoss, r"shape \(2,\).*one real number"),
        (lambda y, x: 3.0, tb.InvalidLoss, "returned a float"),
        (lambda y, x: (y.detach() * x).sum(), tb.Disconnected, "functional_call"),
    ],
    ids=["vector", "number", "detached"],
)
@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}, {"mode": "forward"}])
def test_losses_that_are_refused(loss, error, match, options):
    train = unroll("sgd", 3, **options)(loss)
    with pytest.raises(error, match=match):
        train(torch.ones(2), torch.ones(2))
    with pytest.raises(error, match=match):
        vmap(grad(lambda x: train(torch.ones(2), x).sum()))(torch.ones(3, 2))


def test_variables_that_are_refused():
    train = unroll("sgd", 3)(lambda y, x: (y["a"] * x).sum())
    with pytest.raises(tb.UnsupportedParameter, match=r"initial\['a'\].*int64"):
        train({"a": torch.ones(2, dtype=torch.int64)}, torch.ones(2))
    with pytest.raises(tb.UnsupportedParameter, match="outer.*a float"):
        train({"a": torch.ones(2)}, 3.0)


@pytest.mark.parametrize("options", [{"checkpoint_every": 2}, {"mode": "forward"}])
def test_a_derivative_that_would_be_lost_is_an_error(options):
    y, one = torch.ones(2), torch.ones(2)

    def through_closure(hidden):
        train = unroll("sgd", 3, **options)(lambda y, x: (y * x * hidden).sum() ** 2)
        return train(y, one).sum()

    for around in (
        lambda: through_closure(one.clone().requires_grad_()),
        lambda: grad(through_closure)(one),
        lambda: jvp(through_closure, (one,), (one,)),
        lambda: vmap(grad(through_closure))(torch.ones(3, 2)),
    ):
        with pytest.raises(tb.errors.UnnamedClosure, match="Pass it in outer"):
            around()
    rate = torch.tensor(0.1, requires_grad=True)

    def by_rule(given):
        return unroll(given, 3, **options)(lambda y, x: (y * x).sum() ** 2)(y, one)

    with pytest.raises(tb.errors.UnnamedClosure, match="lambda outer, step"):
        by_rule(lambda outer, step: rule(SGD, lr=rate))
    if "mode" in options:
        with pytest.raises(tb.ArgumentCarriesGraph, match="the rule requires"):
            by_rule(rule(SGD, lr=rate))
        square = unroll("sgd", 3, **options)(lambda y, x: (y * x).sum() ** 2)
        with pytest.raises(tb.ArgumentCarriesGraph, match="in initial.*detach"):
            square(y.clone().requires_grad_(), one)
    else:
        (found,) = torch.autograd.grad(by_rule(rule(SGD, lr=rate)).sum(), rate)
        plain = unroll(rule(SGD, lr=rate), 3)(lambda y, x: (y * x).sum() ** 2)
        close(found, torch.autograd.grad(plain(y, one).sum(), rate)[0])


@pytest.mark.parametrize("options", [{"checkpoint_every": 2}, {"mode": "forward"}])
def test_lanes_of_a_closure_are_right_or_refused(options):
    """With as many lanes as entries, so that a mistaken axis would not show in shapes."""
    y, x, H = torch.ones(3), torch.randn(3), torch.randn(3, 3)

    def outcome(x, h, **options):
        def g(y, x):
            return ((y * h - x) ** 2).sum() + (y**4).sum()

        return (unroll("sgd(lr=0.05)", 3, **options)(g)(y, x) ** 2).sum()

    def inside(**options):
        return vmap(lambda h: grad(lambda x: outcome(x, h, **options))(x))(H)

    close(inside(**options), inside())
    nested = vmap(lambda x: vmap(lambda h: outcome(x, h, **options))(H))(H)
    close(nested[1, 2], outcome(H[1], H[2]))

    def outside(x):
        return vmap(lambda h: outcome(x, h, **options))(H).sum()

    for derivative in (
        lambda: grad(outside)(x),
        lambda: jvp(outside, (x,), (x,)),
        lambda: outside(x.clone().requires_grad_()),
    ):
        with pytest.raises(tb.errors.UnnamedClosure, match="as data"):
            derivative()
    train = unroll("sgd(lr=0.05)", 3, **options)(
        lambda y, x, h: ((y * h - x) ** 2).sum() + (y**4).sum()
    )
    named = grad(lambda x: vmap(lambda h: (train(y, x, h) ** 2).sum())(H).sum())(x)
    close(named, inside().sum(0))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo's, where it resumes
@pytest.mark.parametrize("options", [{"checkpoint_every": 2}, {"mode": "forward"}])
def test_a_compiled_program_steps_out_for_other_memory(options):
    torch._dynamo.reset()
    f = unroll("sgd(lr=0.1)", 3, **options)(lambda y, x: ((y - x) ** 2).sum())
    y, x = torch.ones(3), torch.randn(3, requires_grad=True)
    program = torch.compile(lambda y, x: f(y, x).sin().sum(), backend="aot_eager")
    (found,) = torch.autograd.grad(program(y, x), x)
    close(found, grad(lambda x: f(y, x).sin().sum())(x.detach()))


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}, {"mode": "forward"}])
def test_complex_data(options):
    """Right where nothing differentiates it; where something does, right or refused."""
    x, start = torch.randn(4), torch.zeros(4)

    def g(y, x, c):
        return ((y * c - x).abs() ** 2).sum() / 2

    def outcome(x, c, **options):
        return (unroll("sgd(lr=0.1)", 5, **options)(g)(start, x, c) ** 2).sum()

    c = torch.fft.fft(torch.randn(4))
    close(
        grad(outcome)(x, c)
        if not options
        else grad(lambda x: outcome(x, c, **options))(x),
        grad(outcome)(x, c),
    )

    def through(x):
        return outcome(x, torch.fft.fft(x) / 4 + 1, **options)

    eye = 1e-6 * torch.eye(4)
    difference = torch.stack([(through(x + e) - through(x - e)) / 2e-6 for e in eye])
    for derivative in (grad(through), jacfwd(through)):
        if options:
            with pytest.raises(
                (tb.UnsupportedParameter, tb.errors.ArgumentCarriesGraph),
                match="complex|data requires",
            ):
                derivative(x)
        else:
            torch.testing.assert_close(derivative(x), difference, rtol=1e-6, atol=1e-7)
