"""The chain of the lower bounds: information moves by one coordinate a product.

g = ½ yᵀ A y − xᵀ Z y − e₁ᵀ y, f = ½ ‖y‖² + ½ ‖x‖², A and Z tridiagonal (Nesterov's chain, as in
the lower bounds of Ji & Liang 2021). From zero, a method whose inner steps, linear solver and outer
steps stay in the span of the gradients and products it has seen can have reached, after k outer
steps, only so many coordinates: whatever is beyond is exactly zero, not just small.
"""

import pytest
import torch

import torch_bilevel as tb

N = 90


def chain():
    off = torch.ones(N - 1)
    A = torch.diag(2.2 * torch.ones(N)) - torch.diag(off, 1) - torch.diag(off, -1)
    Z = torch.eye(N) - torch.diag(off, -1)
    return A, Z


def last(vector):
    """The number of coordinates up to the last one that is not exactly zero."""
    where = vector.detach().nonzero()
    return int(where[-1]) + 1 if len(where) else 0


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("T, N_solver", [(1, 1), (3, 2), (2, 5)])
@pytest.mark.parametrize(
    "solver",
    [
        "cg(max_steps={n}, rtol=0.0)",
        "richardson(max_steps={n}, rtol=0.0)",
        "heavy_ball(max_steps={n}, rtol=0.0)",
        "heavy_ball(max_steps={n}, rtol=0.0, lower=0.2, upper=4.2)",
        "accelerated(base='cg(max_steps={n}, rtol=0.0)', strong_convexity=1.0)",
    ],
)
@pytest.mark.filterwarnings("ignore::torch_bilevel.errors.ZeroHypergradientWarning")
def test_only_the_allowed_coordinates_are_reached(solver, T, N_solver, momentum):
    A, Z = chain()
    x, y = torch.zeros(N, requires_grad=True), torch.zeros(N, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.2, momentum=momentum, nesterov=momentum > 0),
        torch.optim.SGD([x], lr=0.05),
        estimator=solver.format(n=N_solver),
        inner_steps=T,
    )
    train = optimizer.inner_loss(lambda: y @ A @ y / 2 - x @ Z @ y - y[0])
    optimizer.outer_loss(lambda: (y**2).sum() / 2 + (x**2).sum() / 2)
    reached_x = reached_y = reached_v = 0
    for _ in range(5):
        for _ in range(T):
            optimizer.zero_grad()
            train().backward()
            optimizer.step()
            # A y reaches one further; Zᵀ x and e₁ reach what they have, and Z x one more
            reached_y = max(reached_y + 1 if reached_y else 0, reached_x, 1)
        # a product with H a step, from ∂_y f = y and the last v
        reached_v = max(reached_y, reached_v) + N_solver
        # J v = −Z v, of bandwidth one
        reached_x = max(reached_x, reached_v + 1)
        assert last(y) <= reached_y and last(x) <= reached_x
    # the count is the truth up to the last product, so that the check could fail
    assert last(x) >= reached_x - 6 and last(x) < N


def test_a_direct_solve_is_not_of_that_class():
    A, Z = chain()
    x, y = torch.zeros(N, requires_grad=True), torch.zeros(N, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.2),
        torch.optim.SGD([x], lr=0.05),
        estimator="direct",
        inner_steps=1,
    )
    train = optimizer.inner_loss(lambda: y @ A @ y / 2 - x @ Z @ y - y[0])
    optimizer.outer_loss(lambda: (y**2).sum() / 2 + (x**2).sum() / 2)
    train().backward()
    optimizer.step()
    assert last(x) > 20
