"""DARTS: the order of its difference, what it equals, and what it leaves alone."""

import pytest
import torch
from problems import DataWeights, Logistic, Quadratic, Ridge, flat
from test_state import Case, same

import torch_bilevel as tb
from torch_bilevel.estimators.finite_difference import cross_difference

SGD = torch.optim.SGD


class Curved(Logistic):
    """∇_x g of third order in y, and of the weights as well as the penalties."""

    def train_loss(self):
        return super().train_loss() + (self.lam * torch.sin(3 * self.w)).sum()


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_error_is_of_second_order_in_the_radius(scale):
    """×100 per ×10, whatever the length of v."""
    problem = Curved()
    optimizer = problem.optimizer(estimator="darts")
    problem.steps(optimizer)
    calls = optimizer._recorder.window.steps()[0].calls
    v = scale * torch.randn(5)
    exact = optimizer.problem.linearize(calls).cross(v)
    errors = torch.stack(
        [
            (cross_difference(optimizer.problem, calls, v, R)[0] - exact).norm()
            for R in (1e-1, 1e-2, 1e-3)
        ]
    )
    ratios = errors[:-1] / errors[1:]
    assert ((ratios - 100).abs() < 5).all(), f"errors {errors}, ratios {ratios}"
    assert errors[-1] < 1e-5 * exact.norm()


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_equals_the_one_step_implicit_gradient_on_a_quadratic(kind):
    problem, lr = Quadratic(), kind(0.05)
    optimizer = problem.optimizer(inner=SGD(problem.y, lr=lr), estimator="darts")
    problem.steps(optimizer, 3)
    found = problem.hypergradient(optimizer)
    assert optimizer.last_report.products == 0 and optimizer.last_report.steps == 3
    expected = problem.hypergradient(optimizer, estimator="identity(scale=0.05)")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    to_x, to_y = problem.partials(flat(problem.y).detach())
    torch.testing.assert_close(found, to_x - 0.05 * problem.C @ to_y)
    found = problem.hypergradient(optimizer, estimator="darts(step_size=0.5)")
    torch.testing.assert_close(found, to_x - 0.5 * problem.C @ to_y)


def test_is_the_gradient_of_one_step_of_gradient_descent():
    """At a point that the step does not leave: with a rate for every group."""
    problem = Quadratic()
    problem.solve()
    inner = SGD(
        [{"params": problem.y[:1]}, {"params": problem.y[1:], "lr": 0.3}], lr=0.05
    )
    optimizer = problem.optimizer(inner=inner, estimator="unrolled")
    problem.steps(optimizer)
    found = problem.hypergradient(optimizer, estimator="darts")
    expected = problem.hypergradient(optimizer)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_steps_are_averaged_as_by_an_implicit_estimator():
    problem = DataWeights(batch=6)
    optimizer = problem.optimizer(estimator="darts")
    problem.steps(optimizer, 4)
    for option in ("", "cross_calls=2, "):
        found = problem.hypergradient(
            optimizer, estimator=f"darts({option}radius=1e-4)".replace(", )", ")")
        )
        expected = problem.hypergradient(
            optimizer, estimator=f"identity({option}scale=0.05)"
        )
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    few = problem.optimizer(estimator="darts(cross_calls=2)", unused="zero")
    problem.steps(few, 7)
    assert len(few._recorder.window) == 2


@pytest.mark.filterwarnings("ignore::torch_bilevel.errors.ZeroHypergradientWarning")
def test_no_nan_where_the_outer_loss_is_flat():
    problem = Quadratic()
    valid = problem.valid_loss
    problem.valid_loss = lambda: valid().detach() * 0 + 0 * valid()
    optimizer = problem.optimizer(estimator="darts")
    problem.steps(optimizer)
    assert (problem.hypergradient(optimizer) == 0).all()


def test_maximisation_and_decay_enter_as_in_an_implicit_estimator():
    problem = Ridge()
    problem.train_loss = lambda loss=problem.train_loss: -loss()
    inner = SGD(problem.y, lr=0.05, maximize=True, weight_decay=0.2)
    optimizer = problem.optimizer(inner=inner, estimator="darts(radius=1e-4)")
    problem.steps(optimizer, 2)
    found = problem.hypergradient(optimizer)
    expected = problem.hypergradient(optimizer, estimator="identity(scale=0.05)")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)

    y, decay = torch.ones(3, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([decay], lr=0.1), estimator="darts"
    )
    train = optimizer.inner_loss(lambda: ((y - 2) ** 2).sum())
    optimizer.outer_loss(lambda: (y**3).sum())
    optimizer.inner_hyperparameters(lambda: {"weight_decay": decay**2})
    train().backward()
    optimizer.step()
    (found,) = optimizer.hypergradient(write=False)
    # −⟨2 decay y, η ∂_y f⟩
    exact = -2 * decay.detach() * 0.1 * (y * 3 * y**2).sum().detach()
    torch.testing.assert_close(found, exact)


def test_operations_without_a_second_derivative_and_a_proximal_term():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a)
            return a**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    y, x = torch.zeros(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.25), SGD([x], lr=0.1), estimator="darts"
    )
    train = optimizer.inner_loss(lambda: Square.apply(y - x).sum())
    optimizer.outer_loss(lambda: (y - 3).sum())
    train().backward()
    optimizer.step()
    (found,) = optimizer.hypergradient()
    torch.testing.assert_close(found, torch.full((2,), 0.5))

    w = torch.ones(2, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([w], lr=0.1), SGD([w], lr=0.1), estimator="darts", proximal_term=0.7
    )
    train = optimizer.inner_loss(lambda: (w**2).sum())
    valid = optimizer.outer_loss(lambda: (w**3).sum())
    with optimizer.task():
        train().backward()
        optimizer.step()
        end = w.detach().clone()
        valid().backward()
    torch.testing.assert_close(w.grad, 0.1 * 0.7 * 3 * end**2)


def test_what_it_refuses():
    y, x = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    lost = torch.ones(1, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([x, lost], lr=0.1), estimator="darts"
    )
    train = optimizer.inner_loss(lambda: ((y - x) ** 2).sum())
    optimizer.outer_loss(lambda: (y**2).sum())
    train().backward()
    optimizer.step()
    with pytest.raises(tb.UnusedOuter, match=r"outer\[1\]|lost"):
        optimizer.hypergradient()

    class NoRate(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            pass

    with pytest.raises(tb.BilevelError, match="step_size=0.1"):
        tb.BilevelOptimizer(NoRate([y]), SGD([x], lr=0.1), estimator="darts")
    tb.BilevelOptimizer(NoRate([y]), SGD([x], lr=0.1), estimator="darts(step_size=0.1)")
    for options in ("step_size=0.0", "radius=0.0", "cross_calls=0"):
        with pytest.raises(ValueError, match="FiniteDifference"):
            tb.estimator(f"darts({options})")
    assert "DARTS" in tb.citation(optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_digits_that_rounding_takes_are_told(dtype):
    y = torch.ones(400, dtype=dtype, requires_grad=True)
    x = torch.ones(400, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([x], lr=0.1), estimator="darts"
    )
    train = optimizer.inner_loss(lambda: ((y - x * 2) ** 2).sum() + (x**2).sum())
    optimizer.outer_loss(lambda: (y.float() ** 2).sum())
    train().backward()
    optimizer.step()
    optimizer.hypergradient(estimator="darts(radius=10.0)")
    assert "rounding" not in str(optimizer.last_report), str(optimizer.last_report)
    optimizer.hypergradient(estimator="darts(radius=0.2)")
    told = "rounding may be" in str(optimizer.last_report)
    assert told == (dtype is torch.bfloat16), str(optimizer.last_report)
    if dtype is torch.float32:
        optimizer.hypergradient()
        assert "rounding" not in str(optimizer.last_report)
        optimizer.hypergradient(estimator="darts(radius=1e-5)")
        assert "raise radius=1e-05" in str(optimizer.last_report)


@pytest.mark.parametrize("inner", [torch.optim.Adam, SGD])
def test_everything_is_left_bit_identical(inner):
    case = Case("darts", inner)
    for k in range(5):
        case.step(k)
    before = case.everything()
    case.optimizer.hypergradient()
    same(case.everything(), before)
    case.valid(case.X, case.t).backward()
    same(case.everything(), before)


@pytest.mark.parametrize("extra", [1, 2, 3, 7, 10])
def test_also_when_the_loss_raises_in_the_middle(extra):
    case = Case("darts")
    for k in range(5):
        case.step(k)
    before = case.everything()
    case.fail_after = case.count + extra
    with pytest.raises(ZeroDivisionError):
        case.optimizer.hypergradient()
    same(case.everything(), before)
    assert case.lam.grad is None
    case.fail_after = None
    case.step(0)
