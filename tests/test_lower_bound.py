"""The chain of the lower bounds: information moves by one coordinate a product.

g = ½ yᵀ A y − xᵀ Z y − e₁ᵀ y, f = ½ ‖y‖² + ½ ‖x‖², A and Z tridiagonal (Nesterov's chain, as in
the lower bounds of Ji & Liang 2021), and the shape of their own instance. From zero, a method whose
inner steps, linear solver and outer steps stay in the span of the gradients and products it has
seen can have reached, after k outer steps, only so many coordinates: whatever is beyond is exactly
zero, not just small.
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


def build(x, y, estimator, T, momentum=0.0):
    return tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.2, momentum=momentum, nesterov=momentum > 0),
        torch.optim.SGD([x], lr=0.05),
        estimator=estimator,
        inner_steps=T,
    )


def inner_steps(optimizer, train, T):
    for _ in range(T):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()


def after(T, reached_y, reached_x):
    """How far y reaches after T steps, each of one product with H, one with Z, and e₁."""
    for _ in range(T):
        reached_y = max(reached_y + 1 if reached_y else 0, reached_x, 1)
    return reached_y


SOLVERS = [
    "cg(max_steps={n}, rtol=0.0)",
    "richardson(max_steps={n}, rtol=0.0)",
    "heavy_ball(max_steps={n}, rtol=0.0)",
    "heavy_ball(max_steps={n}, rtol=0.0, lower=0.2, upper=4.2)",
    "accelerated(base='cg(max_steps={n}, rtol=0.0)', strong_convexity=1.0)",
]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("T, N_solver", [(1, 1), (3, 2), (2, 5)])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.filterwarnings("ignore::torch_bilevel.errors.ZeroHypergradientWarning")
def test_only_the_allowed_coordinates_are_reached(solver, T, N_solver, momentum):
    A, Z = chain()
    x, y = torch.zeros(N, requires_grad=True), torch.zeros(N, requires_grad=True)
    optimizer = build(x, y, solver.format(n=N_solver), T, momentum)
    train = optimizer.inner_loss(lambda: y @ A @ y / 2 - x @ Z @ y - y[0])
    optimizer.outer_loss(lambda: (y**2).sum() / 2 + (x**2).sum() / 2)
    reached_x = reached_y = reached_v = 0
    for _ in range(5):
        inner_steps(optimizer, train, T)
        # A y reaches one further; Z x and e₁ reach what they have
        reached_y = after(T, reached_y, reached_x)
        # a product with H a step, from ∂_y f = y and the last v
        reached_v = max(reached_y, reached_v) + N_solver
        # J v = −Z v, of bandwidth one
        reached_x = max(reached_x, reached_v + 1)
        assert last(y) <= reached_y and last(x) <= reached_x
    # the count is the truth up to the last product, so that the check could fail
    assert last(x) >= reached_x - 6 and last(x) < N


def mirror():
    """Z: 1 where i + j = N + 1, −1 where i + j = N, counted from one, so that Z² is the chain."""
    Z = torch.eye(N).flip(1)
    Z[:-1, :-1] -= torch.eye(N - 1).flip(1)
    return Z


def test_the_square_of_the_mirrored_chain_is_the_chain():
    Z = mirror()
    square = Z @ Z
    off = torch.ones(N - 1)
    chain = 2 * torch.eye(N) - torch.diag(off, 1) - torch.diag(off, -1)
    chain[-1, -1] = 1.0
    assert torch.equal(square, chain)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("T, N_solver", [(1, 1), (3, 2), (2, 5)])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.filterwarnings("ignore::torch_bilevel.errors.ZeroHypergradientWarning")
def test_the_instance_with_cubes_of_the_chain(solver, T, N_solver, momentum):
    """Ji & Liang's strongly convex instance, up to constants: Z mirrors, so x fills from its end.

    g = ½ yᵀ(Z² + 0.2) y − ½ xᵀZ y + e₁ᵀy,   f = ½ xᵀ(Z² + 1) x − 0.3 xᵀZ³y + ½ ‖y‖²
    """
    Z = mirror()
    Z2, Z3 = Z @ Z, Z @ Z @ Z
    x, y = torch.zeros(N, requires_grad=True), torch.zeros(N, requires_grad=True)
    optimizer = build(x, y, solver.format(n=N_solver), T, momentum)
    train = optimizer.inner_loss(
        lambda: y @ (Z2 @ y) / 2 + 0.1 * y @ y - x @ (Z @ y) / 2 + y[0]
    )
    optimizer.outer_loss(
        lambda: x @ (Z2 @ x) / 2 + x @ x / 2 - 0.3 * x @ (Z3 @ y) + y @ y / 2
    )
    reached_x = reached_y = reached_v = 0
    for _ in range(5):
        inner_steps(optimizer, train, T)
        # Z² y reaches one further, Z x mirrors what x has, e₁ is one
        reached_y = after(T, reached_y, reached_x)
        # ∂_y f = y − 0.3 Z³ x, and a product with H a step
        seen = max(reached_y, reached_x + 1 if reached_x else 0)
        reached_v = max(seen, reached_v) + N_solver
        # Z² x reaches one further, Z³ y two, Z v one
        reached_x = max(reached_x + 1, reached_y + 2, reached_v + 1)
        assert last(y) <= reached_y and last(x.flip(0)) <= reached_x
    assert last(x.flip(0)) >= reached_x - 6 and last(x.flip(0)) < N


def test_a_direct_solve_is_not_of_that_class():
    A, Z = chain()
    x, y = torch.zeros(N, requires_grad=True), torch.zeros(N, requires_grad=True)
    optimizer = build(x, y, "direct", 1)
    train = optimizer.inner_loss(lambda: y @ A @ y / 2 - x @ Z @ y - y[0])
    optimizer.outer_loss(lambda: (y**2).sum() / 2 + (x**2).sum() / 2)
    train().backward()
    optimizer.step()
    assert last(x) > 20
