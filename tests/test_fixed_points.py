"""Inner problems that are fixed points of maps, also of maps that are no gradient steps."""

import copy

import pytest
import torch
from problems import flat

import torch_bilevel as tb


class Equilibrium:
    """z = tanh(W z + U x + b), a contraction that is no gradient step; two parameters.

    ∇Φ = ∂_x f + ∂_xΨᵀ (I − ∂_zΨᵀ)⁻¹ ∂_z f.
    """

    def __init__(self, n=5, d=3, noise=0.0, size=7):
        self.y = [
            torch.randn(2, requires_grad=True),
            torch.randn(n - 2, requires_grad=True),
        ]
        self.x = [torch.randn(d, requires_grad=True)]
        W = torch.randn(n, n)
        self.W = 0.6 * W / torch.linalg.matrix_norm(W, 2)
        self.U, self.b = torch.randn(n, d), torch.randn(n)
        spread = noise * torch.randn(size, n, n)
        self.Ws = self.W + spread - spread.mean(0)
        self.size = size

    def update(self, index=None):
        W = self.W if index is None else self.Ws[index].mean(0)
        z = torch.tanh(W @ flat(self.y) + self.U @ self.x[0] + self.b)
        return z[:2], z[2:]

    def valid_loss(self):
        z = flat(self.y)
        return (z**2).sum() + z.sum() * self.x[0].sum() + (self.x[0] ** 3).sum()

    def solve(self):
        for _ in range(400):
            new = [part.detach().clone() for part in self.update()]
            with torch.no_grad():
                for tensor, value in zip(self.y, new, strict=True):
                    tensor.copy_(value)

    def exact(self):
        z, x = flat(self.y).detach(), self.x[0].detach()
        t = torch.tanh(self.W @ z + self.U @ x + self.b)
        D = torch.diag(1 - t**2)
        to_z = 2 * z + x.sum()
        v = torch.linalg.solve(torch.eye(len(z)) - (D @ self.W).T, to_z)
        return z.sum() + 3 * x**2 + (D @ self.U).T @ v

    def optimizer(self, estimator, damping=1.0, data=None, **options):
        optimizer = tb.BilevelOptimizer(
            tb.FixedPointIteration(self.y, damping),
            torch.optim.SGD(self.x, lr=0.01),
            estimator=estimator,
            **options,
        )
        self.map = optimizer.fixed_point_map(self.update, data=data)
        self.valid = optimizer.outer_loss(self.valid_loss)
        return optimizer


EXACT = [
    "direct",
    "neumann(num_steps=400)",
    "richardson(max_steps=400, rtol=1e-13)",
    "stochastic_richardson(num_steps=400, step_size=0.9)",
    "unrolled",
]


@pytest.mark.parametrize("damping", [1.0, 0.5])
@pytest.mark.parametrize("estimator", EXACT)
def test_every_method_is_exact_at_the_fixed_point(estimator, damping):
    problem = Equilibrium()
    problem.solve()
    optimizer = problem.optimizer(estimator, damping)
    for _ in range(80 if estimator == "unrolled" else 1):
        optimizer.step()
    found = flat(optimizer.hypergradient())
    torch.testing.assert_close(found, problem.exact(), rtol=1e-8, atol=1e-8)


def test_steps_apply_the_map_and_damping_averages():
    problem = Equilibrium()
    for damping in (1.0, 0.3):
        optimizer = problem.optimizer("direct", damping)
        before = flat(problem.y).detach().clone()
        expected = (1 - damping) * before + damping * flat(problem.update()).detach()
        optimizer.step()
        torch.testing.assert_close(flat(problem.y).detach(), expected)
        torch.testing.assert_close(
            flat([p.grad for p in problem.y]), (before - expected) / damping
        )


def test_the_argument_can_be_chosen_by_calling_the_map():
    problem = Equilibrium(noise=0.2)
    optimizer = problem.optimizer("direct")
    index = torch.tensor([3])
    expected = flat(problem.update(index)).detach()
    returned = problem.map(index)
    torch.testing.assert_close(flat(returned), expected)
    optimizer.step()
    torch.testing.assert_close(flat(problem.y).detach(), expected)


def test_an_unrolled_loop_of_maps_equals_finite_differences():
    problem = Equilibrium()
    optimizer = problem.optimizer("unrolled", 0.7)
    for _ in range(4):
        optimizer.step()
    check = tb.check_hypergradient(optimizer)
    assert check.relative_error < 1e-6, check


def test_the_unrolled_loop_equals_the_graph_of_the_loop():
    problem = Equilibrium()
    start = [y.detach().clone() for y in problem.y]
    optimizer = problem.optimizer("unrolled", 0.7)
    for _ in range(5):
        optimizer.step()
    found = flat(optimizer.hypergradient())
    twin = copy.copy(problem)
    twin.y = start
    for _ in range(5):
        new = twin.update()
        twin.y = [0.3 * y + 0.7 * n for y, n in zip(twin.y, new, strict=True)]
    (expected,) = torch.autograd.grad(twin.valid_loss(), problem.x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["cg", "minres"])
def test_symmetric_solvers_are_refused_and_others_named(name):
    problem = Equilibrium()
    optimizer = problem.optimizer(name)
    optimizer.step()
    with pytest.raises(tb.NonSymmetricSystem, match="fixed point of a map.*'gmres'"):
        optimizer.hypergradient()


@pytest.mark.parametrize("name", ["forward", "darts", "forward_gradient"])
def test_estimators_of_minima_are_refused(name):
    problem = Equilibrium()
    optimizer = problem.optimizer(name)
    with pytest.raises(tb.NonSymmetricSystem, match="fixed point of 'update'"):
        optimizer.step()
        optimizer.hypergradient()


def test_the_transpose_is_the_adjoint():
    problem = Equilibrium()
    optimizer = problem.optimizer("direct")
    optimizer.step()
    (record,) = optimizer._recorder.window
    at = optimizer.problem.linearize(record.calls)
    u, v = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(at.hvp(v) @ u, at.transpose(u) @ v)
    assert not torch.allclose(at.hvp(v), at.transpose(v), rtol=1e-3)


def test_sids_error_on_a_stochastic_contraction_that_is_no_gradient_step():
    """MSE of ĝ with decreasing steps: slope −1 in K = J, by the library itself."""
    problem = Equilibrium(noise=0.15)
    # an affine map, so that the mean map's fixed point is known
    problem.update = lambda index=None: torch.split(
        (problem.W if index is None else problem.Ws[index].mean(0)) @ flat(problem.y)
        + problem.U @ problem.x[0]
        + problem.b,
        [2, 3],
    )
    problem.solve()
    z, x = flat(problem.y).detach(), problem.x[0].detach()
    v = torch.linalg.solve(torch.eye(5) - problem.W.T, 2 * z + x.sum())
    exact = z.sum() + 3 * x**2 + problem.U.T @ v
    errors = []
    for K in (20, 80):
        optimizer = problem.optimizer(
            f"sid(num_steps={K}, step_size=0.8, decay=6.0, cross_batches={K})",
            data=tb.Batches((torch.arange(7),), 1),
        )
        optimizer.step()
        with torch.no_grad():
            for tensor, value in zip(problem.y, torch.split(z, [2, 3]), strict=True):
                tensor.copy_(value)
        found = [
            (flat(optimizer.hypergradient(write=False)) - exact).square().sum()
            for _ in range(40)
        ]
        errors.append(float(torch.stack(found).mean()))
        optimizer.remove()
    slope = float((torch.tensor(errors).log().diff() / torch.tensor(4.0).log())[0])
    assert -1.3 < slope < -0.7, (errors, slope)


def test_a_whole_loop_moves_x_downhill():
    problem = Equilibrium()
    optimizer = problem.optimizer("neumann(num_steps=30)", inner_steps=10)
    losses = []
    for _ in range(100):
        optimizer.step()
        losses = [float(report.loss) for report in optimizer.history]
    assert losses[-1] < losses[0] - 0.1 and len(losses) == 10


def test_a_resumed_run_is_bit_exact():
    def run(n, saved=None):
        torch.manual_seed(3)
        problem = Equilibrium(noise=0.1)
        data = tb.Batches((torch.arange(7),), 1)
        optimizer = problem.optimizer("sid(num_steps=5)", data=data, inner_steps=3)
        if saved:
            optimizer.load_state_dict(saved[0])
            with torch.no_grad():
                for tensor, value in zip(problem.y, saved[1], strict=True):
                    tensor.copy_(value)
        for _ in range(n):
            optimizer.step()
        return problem, optimizer

    problem, optimizer = run(7)
    saved = optimizer.state_dict(), [y.detach().clone() for y in problem.y]
    resumed, _ = run(6, saved)
    whole, _ = run(13)
    assert torch.equal(flat(resumed.x), flat(whole.x))
    assert torch.equal(flat(resumed.y), flat(whole.y))


def test_wrong_maps_are_explained():
    problem = Equilibrium()
    problem.update = lambda: torch.zeros(5)
    optimizer = problem.optimizer("direct")
    with pytest.raises(tb.errors.InvalidLoss, match=r"\(5,\).*\(2,\), \(3,\)"):
        optimizer.step()
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(problem.y, lr=0.1), torch.optim.SGD(problem.x, lr=0.1)
    )
    optimizer.inner_loss(lambda: flat(problem.y).sum())
    with pytest.raises(tb.errors.BilevelError, match="An inner loss|an inner loss"):
        optimizer.fixed_point_map(problem.update)
    with pytest.raises(ValueError, match="damping"):
        tb.FixedPointIteration(problem.y, 0.0)
