"""Hypergradients against closed forms, in float64."""

import pytest
import torch
from problems import (
    DataWeights,
    HyperRepresentation,
    Logistic,
    Quadratic,
    Ridge,
    Scalar,
    flat,
)

EXACT = {
    "cg": "cg(max_steps=60, rtol=1e-13)",
    "minres": "minres(max_steps=60, rtol=1e-13)",
    "direct": "direct",
    "richardson": "richardson(max_steps=20000, rtol=1e-13)",
    "neumann": "neumann(num_steps=20000)",
}
PROBLEMS = [Quadratic, Ridge, DataWeights, HyperRepresentation, Logistic, Scalar]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("estimator", EXACT)
def test_implicit_is_exact_at_the_solution(problem, estimator):
    problem = problem()
    optimizer = problem.optimizer(estimator=EXACT[estimator])
    problem.solve()
    problem.steps(optimizer)
    found = problem.hypergradient(optimizer)
    torch.testing.assert_close(found, problem.exact(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_unrolled_quadratic(num_steps):
    """∇ = ∂_x f(x, y_T) − C(I − M^T)A⁻¹∂_y f(x, y_T),  M = I − αA."""
    problem = Quadratic()
    optimizer = problem.optimizer(estimator="unrolled")
    problem.steps(optimizer, num_steps)
    y = flat(problem.y).detach()
    to_x, to_y = problem.partials(y)
    eye = torch.eye(len(y))
    M = torch.linalg.matrix_power(eye - 0.05 * problem.A, num_steps)
    exact = to_x - problem.C @ torch.linalg.solve(problem.A, (eye - M) @ to_y)
    found = problem.hypergradient(optimizer)
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("num_steps", [1, 5, 12])
def test_scalar_laws(num_steps):
    """ITD carries the factor T, AID by fixed-point steps does not."""
    problem = Scalar()
    optimizer = problem.optimizer(
        inner=torch.optim.SGD(problem.y, lr=0.1), estimator="unrolled"
    )
    problem.steps(optimizer, num_steps)
    y, h = problem.y[0].detach(), problem.x[0].detach().exp()
    slope, q = torch.cos(y) + 2 * y, 1 - 0.1 * h
    start = 2.0 - problem.b
    itd = -0.1 * h * num_steps * q ** (num_steps - 1) * start * slope
    torch.testing.assert_close(problem.hypergradient(optimizer)[0], itd)
    fixed_point = f"richardson(max_steps={num_steps}, step_size=0.1, rtol=0.)"
    aid = -(q**num_steps) * start * (1 - q**num_steps) * slope
    found = problem.hypergradient(optimizer, estimator=fixed_point)[0]
    torch.testing.assert_close(found, aid)


def test_fixed_point_neumann_and_truncation_agree():
    """At y*: AID-FP(K) = Neumann(K) = reverse through the last K steps."""
    problem = Quadratic()
    problem.solve()
    optimizer = problem.optimizer(estimator="unrolled(window=6)")
    problem.steps(optimizer, 10)
    truncated = problem.hypergradient(optimizer)
    for name in (
        "neumann(num_steps=6, step_size=0.05, cross_calls=1)",
        "richardson(max_steps=6, step_size=0.05, rtol=0., cross_calls=1)",
    ):
        found = problem.hypergradient(optimizer, estimator=name)
        torch.testing.assert_close(found, truncated, rtol=1e-10, atol=1e-10)


def test_window_rule_is_the_mean_of_per_batch_closed_forms():
    """H of the last step, J v averaged over every step since the last outer step."""
    problem = DataWeights(batch=6)
    optimizer = problem.optimizer(estimator="cg(max_steps=50, rtol=1e-14)")
    problem.steps(optimizer, 4)
    w, indices = problem.w.detach(), [batch[2] for batch in problem.batches]
    right = problem.validation_gradient(w)
    v = torch.linalg.solve(problem.matrix(indices[-1]), right)
    exact = -sum(problem.cross(i, w, v) for i in indices) / 4
    found = problem.hypergradient(optimizer)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
    assert (found != 0).all()
    # two Hessians averaged, J from the last two steps only
    option = "cg(max_steps=50, rtol=1e-14, hessian_calls=2, cross_calls=2)"
    H = sum(problem.matrix(i) for i in indices[-2:]) / 2
    v = torch.linalg.solve(H, right)
    exact = -sum(problem.cross(i, w, v) for i in indices[-2:]) / 2
    found = problem.hypergradient(optimizer, estimator=option)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize("estimator", ["cg", "minres", "direct"])
def test_weight_decay_is_part_of_the_system(kind, estimator):
    problem = Ridge(weight_decay=0.4)
    inner = getattr(torch.optim, kind)(problem.y, lr=1e-9, weight_decay=0.4)
    optimizer = problem.optimizer(inner=inner, estimator=EXACT[estimator])
    problem.solve()
    problem.steps(optimizer)
    found = problem.hypergradient(optimizer)
    torch.testing.assert_close(found, problem.exact(), rtol=1e-8, atol=1e-10)


def test_maximize_is_part_of_the_system():
    problem = Ridge()
    problem.train_loss = lambda loss=problem.train_loss: -loss()
    inner = torch.optim.SGD(problem.y, lr=0.05, maximize=True)
    optimizer = problem.optimizer(inner=inner, estimator=EXACT["cg"])
    problem.solve()
    problem.steps(optimizer)
    found = problem.hypergradient(optimizer)
    torch.testing.assert_close(found, problem.exact(), rtol=1e-8, atol=1e-10)


def test_adamw_fixed_point_with_its_preconditioner_held():
    """∇g + wd·D y = 0 with D = √v̂ + ε: a ridge with penalty wd·D."""
    problem = Ridge()
    inner = torch.optim.AdamW(problem.y, lr=1e-12, weight_decay=0.3)
    optimizer = problem.optimizer(inner=inner, estimator=EXACT["cg"])
    problem.steps(optimizer, 3)
    w, state = problem.w.detach(), inner.state[problem.w]
    D = (state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8
    matrix = problem.matrix() + torch.diag(0.3 * D)
    right = problem.Xv.T @ (problem.Xv @ w - problem.tv) / len(problem.Xv)
    exact = -problem.lam.detach().exp() * w * torch.linalg.solve(matrix, right)
    found = problem.hypergradient(optimizer)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    assert "preconditioner" in str(optimizer.last_report)


def test_damping_is_added_to_the_diagonal():
    problem = Quadratic()
    problem.solve()
    optimizer = problem.optimizer(estimator="cg(max_steps=60, rtol=1e-13, damping=0.7)")
    problem.steps(optimizer)
    to_x, to_y = problem.partials(problem.solution())
    damped = problem.A + 0.7 * torch.eye(len(problem.A))
    exact = to_x - problem.C @ torch.linalg.solve(damped, to_y)
    torch.testing.assert_close(problem.hypergradient(optimizer), exact)


def test_identity():
    problem = Quadratic()
    optimizer = problem.optimizer(estimator="identity(scale=0.5)")
    problem.steps(optimizer)
    to_x, to_y = problem.partials(flat(problem.y).detach())
    exact = to_x - 0.5 * problem.C @ to_y
    torch.testing.assert_close(problem.hypergradient(optimizer), exact)
