"""PZOBO: exact along coordinates, its laws along Gaussian directions, and what it refuses."""

import math

import pytest
import torch
from cases import ADAM, ADAMW, RULES, SGD, rule_id
from problems import DataWeights, Quadratic, flat
from test_forward import Classifier
from test_hyperparameters import SCHEDULES
from test_hyperparameters import program as scheduled
from test_rules import program
from test_state import Case, roundtrip, same
from test_tasks import QuadraticTasks

import torch_bilevel as tb
from torch_bilevel.estimators import EstimatorMemory
from torch_bilevel.estimators.response_jacobian import response_jacobian
from torch_bilevel.optim.losses import outer_calls


def coordinates(d):
    """√d e_i: their mean is exact, (1/d) Σ √d e_i √d e_iᵀ = I, as that of Gaussian ones is."""
    return list(math.sqrt(d) * torch.eye(d))


def along(optimizer, directions, smoothing, *batch, **options):
    """The indirect part of the hypergradient along given directions."""
    problem = optimizer.problem
    calls, _ = outer_calls(optimizer, batch, {}, None)
    run = tb.ResponseJacobian(**options).rerun(optimizer._situation(EstimatorMemory()))
    adjoint = problem.outer_gradients(calls).inner
    return response_jacobian(run, run(), adjoint, directions, smoothing)[0]


def indirect(optimizer, *batch, estimator="unrolled"):
    """The gradient through the steps, and that of the outer loss alone."""
    calls, _ = outer_calls(optimizer, batch, {}, None)
    direct = optimizer.problem.outer_gradients(calls).outer
    parts = optimizer.hypergradient(*batch, estimator=estimator, write=False)
    return flat(parts) - direct


# --- exact along coordinates -------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [1e-3, 10.0])
def test_coordinates_are_exact_on_a_quadratic_at_any_smoothing(smoothing):
    """And the scale is d: the authors' unit directions without a factor give 1/d of it."""
    problem = Quadratic()
    optimizer = problem.optimizer(estimator="pzobo")
    problem.steps(optimizer, 7)
    d = flat(problem.x).numel()
    to_y = problem.partials(flat(problem.y).detach())[1]
    eye = torch.eye(len(to_y))
    M = torch.linalg.matrix_power(eye - 0.05 * problem.A, 7)
    exact = -problem.C @ torch.linalg.solve(problem.A, (eye - M) @ to_y)
    found = along(optimizer, coordinates(d), smoothing)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
    unit = along(optimizer, torch.eye(d), smoothing)
    torch.testing.assert_close(unit, exact / d, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 6])
@pytest.mark.parametrize(
    "case", [case for case in RULES if case[0] in (SGD, ADAM, ADAMW)], ids=rule_id
)
def test_coordinates_equal_unrolled_through_sgd_and_adam(case, num_steps):
    x = torch.tensor([0.2, -0.4], requires_grad=True)
    optimizer = program(case, x, num_steps, "pzobo")
    expected = indirect(program(case, x, num_steps, "unrolled"))
    found = along(optimizer, coordinates(2), 1e-7)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", SCHEDULES)
def test_hyperparameters_are_those_of_the_moved_outer_variables(name):
    kind, options, function = SCHEDULES[name]
    x = torch.tensor([0.3, -0.5], requires_grad=True)
    expected = indirect(scheduled(kind, options, function, x, 5, "unrolled"))
    optimizer = scheduled(kind, options, function, x, 5, "pzobo")
    found = along(optimizer, coordinates(2), 1e-7)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)


def messy(estimator, count=4):
    case = Classifier(estimator)
    torch.manual_seed(5)
    case.steps(count)
    return case


def test_both_points_see_the_same_batches_and_dropout_masks():
    """Accumulation, BatchNorm, clipping, weight decay and a parameter without gradient too."""
    case, reference = messy("pzobo"), messy("unrolled")
    batch = [part[2] for part in case.data]
    expected = indirect(reference.optimizer, *batch)
    found = along(case.optimizer, coordinates(4), 1e-7, *batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert (case.gradient() - reference.gradient()).norm() < 5 * expected.norm()
    assert len(case.optimizer._recorder.window) == 4


def test_minibatches():
    problem = DataWeights(batch=6)
    optimizer = problem.optimizer(estimator="pzobo_s")
    problem.steps(optimizer, 8)
    d = problem.logits.numel()
    found = along(optimizer, coordinates(d), 1e-7)
    other = problem.optimizer(estimator="unrolled")
    torch.manual_seed(0)
    again = DataWeights(batch=6)
    other = again.optimizer(estimator="unrolled")
    again.steps(other, 8)
    torch.testing.assert_close(again.w, problem.w)
    torch.testing.assert_close(found, indirect(other), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"proximal_term": 0.7}])
def test_an_initialisation_moves_the_start(options):
    problem = QuadraticTasks("pzobo(directions=3)", **options)
    reference = QuadraticTasks("unrolled", **options)
    w = problem.w.detach().clone()
    with problem.optimizer.task(), reference.optimizer.task():
        problem.adapt(1, 3)
        reference.adapt(1, 3)
        found = along(problem.optimizer, coordinates(4), 0.3, problem.t[1])
        problem.query(problem.t[1]).backward()
        reference.query(problem.t[1]).backward()
    torch.testing.assert_close(found, reference.w.grad, rtol=1e-10, atol=1e-11)
    assert torch.equal(problem.w, w)
    u = list(tb.ResponseJacobian(3).basis(problem.optimizer.problem.outer.layout, 1))
    expected = sum(torch.dot(reference.w.grad, e) * e for e in u) / 3
    torch.testing.assert_close(problem.w.grad, expected, rtol=1e-8, atol=1e-9)


def test_a_fixed_point_iteration():
    def make(estimator):
        torch.manual_seed(0)
        y, x = torch.randn(4, requires_grad=True), torch.randn(3, requires_grad=True)
        W, U = torch.randn(4, 4) / 4, torch.randn(4, 3)
        inner = tb.FixedPointIteration([y], damping=0.7)
        optimizer = tb.BilevelOptimizer(inner, SGD([x], lr=0.1), estimator=estimator)
        optimizer.fixed_point_map(lambda: torch.tanh(W @ y + U @ x))
        optimizer.outer_loss(lambda: (y**3).sum())
        for _ in range(4):
            optimizer.step()
        return optimizer

    optimizer = make("pzobo")
    found = along(optimizer, coordinates(3), 1e-7)
    torch.testing.assert_close(found, indirect(make("unrolled")), rtol=1e-5, atol=1e-7)
    optimizer.hypergradient()  # x is found to be reached


def test_learned_rates():
    def make(estimator):
        torch.manual_seed(0)
        y, x = torch.randn(3, requires_grad=True), torch.ones(2, requires_grad=True)
        optimizer = tb.BilevelOptimizer(
            SGD([y], lr=0.1, momentum=0.5), SGD([x], lr=0.1), estimator=estimator
        )
        optimizer.learn_rates()
        optimizer.gradient_transform(lambda gs: [g * x[0] for g in gs])
        train = optimizer.inner_loss(lambda: ((y - 1) ** 4).sum() + x[1] * y.sum())
        optimizer.outer_loss(lambda: (y**2).sum())
        for _ in range(3):
            optimizer.zero_grad()
            train().backward()
            y.grad.mul_(x[0].detach())
            optimizer.step()
        return optimizer

    found = along(make("pzobo"), coordinates(5), 1e-7)
    torch.testing.assert_close(found, indirect(make("unrolled")), rtol=1e-5, atol=1e-7)
    make("pzobo").hypergradient()  # every outer variable is found to be reached


# --- laws of random directions -----------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 4])
def test_mean_and_variance(count):
    """E ĝ = w and E‖ĝ − w‖² = (d + 1)/Q ‖w‖² for a linear response and Gaussian directions."""
    d, p, number = 6, 9, 8000
    Z, y, a = torch.randn(p, d), torch.randn(p), torch.randn(p)
    w = a @ Z
    layout = tb.BilevelOptimizer(
        SGD([torch.zeros(p, requires_grad=True)], lr=0.1),
        SGD([torch.zeros(d, requires_grad=True)], lr=0.1),
    ).problem.outer.layout
    estimator = tb.ResponseJacobian(directions=count)
    samples = torch.stack(
        [
            response_jacobian(
                lambda e: y + Z @ e, y, a, estimator.basis(layout, n), 0.1
            )[0]
            for n in range(number)
        ]
    )
    law = (d + 1) / count * w.pow(2).sum()
    spread = (samples - w).pow(2).sum(1)
    ratio = float(spread.mean() / law)
    margin = 4 * float(spread.std() / law) / number**0.5
    assert abs(ratio - 1) < margin, f"measured {ratio:.3f} of the law, ± {margin:.3f}"
    assert (samples.mean(0) - w).norm() < 4 * (law / number).sqrt()
    scale = float(samples.mean(0) @ w / w.pow(2).sum())
    assert abs(scale - 1) < 4 * ((d + 1) / count / number) ** 0.5, scale  # not 1/d


def test_the_mean_of_hypergradients_is_that_of_unrolled():
    problem = Quadratic(shapes_y=((2,), (2,)), shapes_x=((3,),))
    optimizer = problem.optimizer(estimator="pzobo(directions=4)")
    problem.steps(optimizer, 3)
    exact = along(optimizer, coordinates(3), 1.0)
    direct = problem.partials(flat(problem.y).detach())[0]
    samples = torch.stack(
        [
            flat(optimizer.hypergradient(estimator=tb.ResponseJacobian(4, seed=seed)))
            for seed in range(300)
        ]
    )
    law = 4 / 4 * exact.pow(2).sum()  # (d + 1)/Q; ∂_x f has no noise
    assert (samples.mean(0) - direct - exact).norm() < 4 * (law / 300).sqrt()
    spread = (samples - direct - exact).pow(2).sum(1)
    ratio = float(spread.mean() / law)
    margin = 4 * float(spread.std() / law) / 300**0.5
    assert abs(ratio - 1) < margin, f"measured {ratio:.3f} of the law, ± {margin:.3f}"


@pytest.mark.parametrize("order", [1, 2])
def test_the_bias_is_of_first_order_in_the_smoothing(order):
    """Of a forward difference; of second order along u and −u together."""
    case = messy("pzobo", 3)
    batch = [part[2] for part in case.data]
    exact = indirect(messy("unrolled", 3).optimizer, *batch)
    basis = coordinates(4)
    if order == 2:
        basis += [-u for u in basis]
    smoothings = torch.tensor([1e-2, 1e-3, 1e-4])
    errors = torch.stack(
        [
            (along(case.optimizer, basis, float(mu), *batch) - exact).norm()
            for mu in smoothings
        ]
    )
    slopes = errors.log10().diff() / smoothings.log10().diff()
    assert ((slopes - order).abs() < 0.05).all(), f"errors {errors}, slopes {slopes}"


def test_one_outer_number_and_a_unit_direction_are_exact():
    y = torch.randn(3, requires_grad=True)
    x = torch.tensor(0.4, requires_grad=True)

    def make(estimator):
        torch.manual_seed(0)
        with torch.no_grad():
            y.copy_(torch.randn(3))
        optimizer = tb.BilevelOptimizer(
            SGD([y], lr=0.05, momentum=0.5), SGD([x], lr=0.1), estimator=estimator
        )
        train = optimizer.inner_loss(lambda: ((y - x) ** 2).sum())
        optimizer.outer_loss(lambda: (y**3).sum())
        for _ in range(3):
            optimizer.zero_grad()
            train().backward()
            optimizer.step()
        return optimizer

    expected = indirect(make("unrolled"))
    found = along(make("pzobo"), [torch.ones(1)], 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_new_directions_for_every_window():
    problem = Quadratic()
    optimizer = problem.optimizer(estimator="pzobo(directions=2)")
    layout = optimizer.problem.outer.layout
    basis = [torch.stack(list(optimizer.estimator.basis(layout, n))) for n in (0, 0, 1)]
    assert torch.equal(basis[0], basis[1])
    assert not torch.allclose(basis[0], basis[2])
    other = torch.stack(list(tb.ResponseJacobian(2, seed=1).basis(layout, 0)))
    assert not torch.allclose(basis[0], other)
    state = torch.get_rng_state()
    problem.steps(optimizer, 1)
    found = [problem.hypergradient(optimizer) for _ in (0, 1)]
    assert torch.equal(*found) and torch.equal(torch.get_rng_state(), state)


# --- what is kept and what it costs ------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 3, 5, 20])
def test_a_window_of_the_last_steps(window):
    """One or two iterates and at most 2 K − 1 steps are kept."""
    option = f"(window={window})"
    x = torch.tensor([0.2, -0.4], requires_grad=True)
    case = ADAM, {"lr": 0.02}
    optimizer = program(case, x, 11, f"pzobo{option}")
    records = list(optimizer._recorder.window)
    assert sum(record.has_iterate for record in records) in (1, 2)
    assert len(records) <= max(1, min(11, 2 * window - 1))
    found = along(optimizer, coordinates(2), 1e-7, window=window)
    unrolled = f"unrolled{option}"
    expected = indirect(program(case, x, 11, unrolled), estimator=unrolled)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-7)
    optimizer.hypergradient()
    assert optimizer.last_report.steps == min(window, 11)


def test_one_iterate_whatever_the_number_of_steps():
    problem = Quadratic()
    optimizer = problem.optimizer(estimator="pzobo")
    problem.steps(optimizer, 1)
    window, size = optimizer._recorder.window, flat(problem.y).numel() * 8
    allocated = window.pool.allocated
    assert allocated == size
    problem.steps(optimizer, 40)
    assert window.pool.allocated == allocated
    assert [r.has_iterate for r in window] == [True] + 40 * [False]


def test_gradients_evaluated(monkeypatch):
    """(Q + 1) K, and one to see which outer variables are reached; no products."""
    problem = Quadratic()
    optimizer = problem.optimizer(estimator="pzobo(directions=3)")
    problem.steps(optimizer, 5)
    optimizer.hypergradient()
    calls = []
    at = optimizer.problem
    evaluate = at.inner_gradients

    def counted(*args, **options):
        assert not options.get("create_graph")
        calls.append(1)
        return evaluate(*args, **options)

    monkeypatch.setattr(at, "inner_gradients", counted)
    optimizer.hypergradient()
    assert (
        len(calls) == 4 * 5
    )  # both outer tensors are reached by the outer loss itself
    assert optimizer.last_report.products == 0


def test_operations_without_a_second_derivative():
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
        SGD([y], lr=0.25), SGD([x], lr=0.1), estimator="pzobo", verify_every=1
    )
    train = optimizer.inner_loss(lambda: Square.apply(y - x).sum())
    optimizer.outer_loss(lambda: (y - 3).sum())
    train().backward()
    optimizer.step()
    found = along(optimizer, coordinates(2), 0.1)
    torch.testing.assert_close(found, torch.full((2,), 0.5))
    optimizer.hypergradient()


# --- everything put back -----------------------------------------------------------------------


@pytest.mark.parametrize("inner", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("estimator", ["pzobo(directions=2)", "pzobo(window=2)"])
def test_everything_is_left_bit_identical(estimator, inner):
    case = Case(estimator, inner)
    for k in range(5):
        case.step(k)
    before = case.everything()
    case.optimizer.hypergradient()
    same(case.everything(), before)
    case.valid(case.X, case.t).backward()
    same(case.everything(), before)


@pytest.mark.parametrize("extra", [1, 2, 4, 8, 14])
def test_also_when_the_loss_raises_in_the_middle(extra):
    case = Case("pzobo(directions=2)")
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


def test_resume_in_mid_window_is_exact():
    def make():
        return messy("pzobo(directions=2)", 0)

    whole = make()
    whole.steps(5)
    half = make()
    half.steps(2)
    saved = roundtrip(half.optimizer.state_dict())
    rng, weights = torch.get_rng_state(), half.model.state_dict()
    again = make()
    again.model.load_state_dict(weights)
    again.optimizer.load_state_dict(saved)
    torch.set_rng_state(rng)
    for k in (2, 3, 4):
        again.optimizer.zero_grad()
        for j in (0, 1):
            (again.train(*(d[(k + j) % 3] for d in again.data)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(again.model.parameters(), 0.4)
        again.optimizer.step()
    assert torch.equal(again.gradient(), whole.gradient())


# --- what it refuses, and what it tells ---------------------------------------------------------


def changed_gradient(change, num_steps=5, inner=SGD):
    problem = Quadratic()
    optimizer = problem.optimizer(inner=inner(problem.y, lr=0.05), estimator="pzobo")
    for k in range(num_steps):
        optimizer.zero_grad()
        problem.train().backward()
        if k == 2:
            change(problem.y)
        optimizer.step()
    return problem, optimizer


@pytest.mark.parametrize("inner", [SGD, ADAM])
@pytest.mark.parametrize("factor", [1.0 + 1e-6, 0.5])
def test_a_gradient_that_was_changed_after_backward(factor, inner):
    def change(y):
        y[0].grad.mul_(factor)
        if inner is ADAM:
            y[0].grad.add_(factor - 1)

    problem, optimizer = changed_gradient(change, inner=inner)
    before = flat(problem.y).clone()
    with pytest.raises(tb.ReplayMismatch, match="steps 0 to 4 of this window"):
        optimizer.hypergradient()
    assert torch.equal(flat(problem.y), before)


def test_a_parameter_that_was_written_to():
    def change(y):
        y[0].data.add_(1e-3)

    with pytest.raises(tb.ReplayMismatch, match="of the way"):
        changed_gradient(change)[1].hypergradient()
    changed_gradient(lambda y: None)[1].hypergradient()


class Chaotic(torch.optim.SGD):
    """Plain gradient descent, whose rule below rounds differently."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-group["lr"])


def test_rounding_that_a_chaotic_loop_magnifies_is_no_mismatch():
    """y ← 4 y (1 − y) doubles a difference every step; 1e-16 is 1e-8 of the way after 27."""
    tb.register_update_rule(
        Chaotic, lambda y, g, s, h: ((y / 3 - h["lr"] * g / 3) * 3, s)
    )
    y = torch.tensor([0.3, 0.2], requires_grad=True)
    x = torch.ones(2, requires_grad=True)

    def make(factor):
        with torch.no_grad():
            y.copy_(torch.tensor([0.3, 0.2]))
        optimizer = tb.BilevelOptimizer(
            Chaotic([y], lr=1.0), SGD([x], lr=0.1), estimator="pzobo(smoothing=1e-12)"
        )
        # y − ∇g = 4 y (1 − y)
        train = optimizer.inner_loss(lambda: (x * (4 * y**3 / 3 - 1.5 * y**2)).sum())
        optimizer.outer_loss(lambda: y.sum())
        for k in range(27):
            optimizer.zero_grad()
            train().backward()
            if k == 15:
                y.grad.mul_(factor)
            optimizer.step()
        return optimizer

    optimizer = make(1.0)
    run = optimizer.estimator.rerun(optimizer._situation(EstimatorMemory()))
    off = (run() - y.detach()).norm()
    assert off > 1e-10  # it does round differently
    optimizer.hypergradient()
    with pytest.raises(tb.ReplayMismatch):
        make(1 + 1e-6).hypergradient()


def test_outer_variables_that_reach_nothing():
    y, x = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    lost = torch.ones(3, requires_grad=True)
    late = torch.ones(1, requires_grad=True)

    def make(**options):
        optimizer = tb.BilevelOptimizer(
            SGD([y], lr=0.1), SGD([x, lost, late], lr=0.1), estimator="pzobo", **options
        )
        train = optimizer.inner_loss(
            lambda k: ((y - x) ** 2).sum() + (late * y.sum() if k == 2 else 0)
        )
        optimizer.outer_loss(lambda: (y**2).sum())
        for k in range(3):
            optimizer.zero_grad()
            train(k).backward()
            optimizer.step()
        return optimizer

    names = "outer variables .*reach neither"
    with pytest.raises(tb.UnusedOuter, match=names) as caught:
        make().hypergradient()
    found = str(caught.value).split(" reach neither")[0]
    assert found.count(",") == 0, found  # `late` is reached in the last step, x in all
    optimizer = make(unused="zero")
    optimizer.hypergradient()
    assert optimizer.last_report.steps == 3


def test_a_window_without_iterates_and_an_opaque_step():
    problem = Quadratic()
    optimizer = problem.optimizer(estimator="cg")
    problem.steps(optimizer, 2)
    with pytest.raises(tb.NoInnerStep, match="'pzobo'"):
        optimizer.hypergradient(estimator="pzobo")
    optimizer.estimator = "pzobo"
    optimizer.restart()

    def closure():
        optimizer.zero_grad()
        loss = problem.train()
        loss.backward()
        return loss

    class Twice(Chaotic):
        def step(self, closure=None):
            closure()
            closure()
            for p in self.param_groups[0]["params"]:
                p.data.add_(p.grad, alpha=-self.param_groups[0]["lr"])

    inner = Twice(problem.y, lr=0.1)
    tb.register_update_rule(Twice, lambda y, g, s, h: (y - h["lr"] * g, s))
    optimizer = problem.optimizer(inner=inner, estimator="pzobo")
    inner.step(closure)
    with pytest.raises(tb.OpaqueStep, match="cannot be run again"):
        optimizer.hypergradient()


def test_values_that_leave_their_domain():
    y, x = torch.ones(1, requires_grad=True), torch.tensor([1e-4], requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([x], lr=0.1), estimator="pzobo"
    )
    train = optimizer.inner_loss(lambda: (x.sqrt() * y**2).sum())
    optimizer.outer_loss(lambda: (y**2).sum())
    train().backward()
    optimizer.step()
    with pytest.raises(tb.NonFinite, match="smaller smoothing"):
        optimizer.hypergradient()
    assert torch.isfinite(y).all() and float(x.detach()) == 1e-4
    optimizer.hypergradient(estimator="pzobo(smoothing=1e-6)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_digits_that_rounding_takes_are_told(dtype):
    y = torch.ones(4, requires_grad=True, dtype=torch.float32)
    x = torch.full((4,), 3.0, dtype=dtype, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([x], lr=0.1), estimator="pzobo(directions=4)"
    )
    train = optimizer.inner_loss(lambda: ((y - x.float()) ** 2).sum())
    optimizer.outer_loss(lambda: (y**2).sum())
    for _ in range(3):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
    optimizer.hypergradient()
    told = "rounding may be" in str(optimizer.last_report)
    assert told == (dtype is torch.bfloat16), str(optimizer.last_report)
    if dtype is torch.float32:
        optimizer.hypergradient(estimator="pzobo(smoothing=1e-6)")
        assert "raise smoothing=1e-06" in str(optimizer.last_report)
    optimizer.hypergradient(estimator="pzobo(smoothing=1.0)")
    assert "rounding" not in str(optimizer.last_report)


def test_a_response_that_is_exactly_zero():
    y, x = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([x], lr=0.1), estimator="pzobo"
    )
    train = optimizer.inner_loss(lambda: (y**2).sum() + 0 * x.sum())
    optimizer.outer_loss(lambda: (y**2).sum() + (x**2).sum())
    train().backward()
    optimizer.step()
    assert float(optimizer.hypergradient()[0]) == 2.0
    assert "rounding may be 100% of a response" in str(optimizer.last_report)


def test_names_and_bad_options():
    assert tb.estimator("pzobo_s(directions=3)") == tb.ResponseJacobian(directions=3)
    assert str(tb.estimator("pzobo_s")) == "pzobo"
    for options in ("directions=0", "smoothing=0.0", "window=0"):
        with pytest.raises(ValueError, match="ResponseJacobian"):
            tb.estimator(f"pzobo({options})")
    y, x = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    with pytest.raises(tb.NoUpdateRule):
        tb.BilevelOptimizer(torch.optim.LBFGS([y]), SGD([x], lr=1.0), estimator="pzobo")
    optimizer = tb.BilevelOptimizer(
        SGD([y], lr=0.1), SGD([x], lr=1.0), estimator="pzobo"
    )
    assert "Hessian-Free" in tb.citation(optimizer)
