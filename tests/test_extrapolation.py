"""AccBiO: the outer variables at extrapolated points."""

import pytest
import torch
from problems import Quadratic

import torch_bilevel as tb


class Spectrum:
    """y* = x exactly after one step of SGD(lr=1); Φ = ½ xᵀ D x − cᵀ x with eigenvalues 1/κ … 1."""

    def __init__(self, kappa, n=20):
        self.y = torch.zeros(n, requires_grad=True)
        self.x = torch.zeros(n, requires_grad=True)
        self.D = torch.logspace(0, -torch.log10(torch.tensor(float(kappa))).item(), n)
        self.c = self.D * torch.linspace(1, 2, n)  # x* = 1 … 2

    def optimizer(self, estimator, lr):
        optimizer = tb.BilevelOptimizer(
            torch.optim.SGD([self.y], lr=1.0),
            torch.optim.SGD([self.x], lr=lr),
            estimator=estimator,
            inner_steps=1,
        )
        self.train = optimizer.inner_loss(lambda: ((self.y - self.x) ** 2).sum() / 2)
        optimizer.outer_loss(lambda: (self.D * self.y**2).sum() / 2 - self.c @ self.y)
        return optimizer

    def steps_to(self, estimator, lr, accuracy=1e-6, limit=20000):
        """Outer steps until ‖x − x*‖ ≤ accuracy ‖x*‖."""
        optimizer = self.optimizer(estimator, lr)
        best = self.c / self.D
        for k in range(1, limit + 1):
            optimizer.zero_grad()
            self.train().backward()
            optimizer.step()
            if (self.x.detach() - best).norm() <= accuracy * best.norm():
                return k
        return limit


def gradient_descent_steps(kappa, accuracy=1e-6):
    """The same by the closed form of gradient descent with step 1."""
    problem = Spectrum(kappa)
    best = problem.c / problem.D
    e, k = best.clone(), 0
    while e.norm() > accuracy * best.norm():
        e, k = (1 - problem.D) * e, k + 1
    return k


IDENTITY = "identity(scale=1.0)"  # exact here: H = I


def test_the_number_of_outer_steps_grows_as_the_root_of_kappa():
    kappas = [50, 200, 800]
    counts = [
        Spectrum(k).steps_to(tb.Accelerated(IDENTITY, strong_convexity=1 / k), lr=0.5)
        for k in kappas
    ]
    slope = torch.tensor(counts).double().log().diff() / torch.tensor(4.0).log()
    assert 0.4 < float(slope.mean()) < 0.6, (counts, slope)


@pytest.mark.parametrize("strong_convexity", [1e-3, None])
def test_five_times_fewer_outer_steps_at_kappa_1000(strong_convexity):
    count = Spectrum(1000).steps_to(
        tb.Accelerated(IDENTITY, strong_convexity=strong_convexity), lr=0.5
    )
    descent = gradient_descent_steps(1000)
    assert 5 * count <= descent, (count, descent)


def test_it_is_the_papers_recursion():
    """x, z and x̃ by hand, to rounding."""
    torch.manual_seed(0)
    problem = Spectrum(50, n=4)
    alpha, mu = 0.4, 0.02
    optimizer = problem.optimizer(tb.Accelerated(IDENTITY, mu), lr=alpha)
    root = (alpha * mu) ** 0.5
    beta, tau, eta = (alpha / mu) ** 0.5, root / 2, root / (root + 2)
    x = z = query = torch.zeros(4)
    for _ in range(7):
        optimizer.zero_grad()
        problem.train().backward()
        optimizer.step()
        G = problem.D * query - problem.c
        x = tau * query + (1 - tau) * x - beta * G
        z = query - alpha * G
        query = eta * x + (1 - eta) * z
        torch.testing.assert_close(problem.x.detach(), query, rtol=1e-12, atol=1e-12)


def test_a_whole_run_with_heavy_ball_reaches_the_optimum():
    torch.manual_seed(0)
    problem = Quadratic()
    problem.K, problem.C = 0.1 * problem.K, 0.3 * problem.C
    inner = torch.optim.SGD(problem.y, lr=0.25, momentum=1 / 3, nesterov=True)
    # the floor is the tolerance of the linear solve
    estimator = "accbio(base='heavy_ball(max_steps=40, rtol=1e-9)')"
    optimizer = problem.optimizer(
        inner, torch.optim.SGD(problem.x, lr=0.1), estimator=estimator, inner_steps=15
    )
    before = problem.exact().norm()
    problem.steps(optimizer, 15 * 80)
    problem.solve()
    assert problem.exact().norm() < 1e-6 * before


def test_other_outer_optimizers_are_refused_with_what_to_write():
    y, x = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    inner = torch.optim.SGD([y], lr=0.1)
    for outer in (
        torch.optim.Adam([x]),
        torch.optim.SGD([x], lr=0.1, momentum=0.9),
        torch.optim.SGD([x], lr=0.1, weight_decay=0.1),
    ):
        with pytest.raises(tb.errors.BilevelError, match=r"outer=torch\.optim\.SGD"):
            tb.BilevelOptimizer(inner, outer, estimator="accbio")
        optimizer = tb.BilevelOptimizer(inner, outer)
        with pytest.raises(tb.errors.BilevelError, match=r"outer=torch\.optim\.SGD"):
            optimizer.estimator = "accbio"
        assert str(optimizer.estimator) == "cg"
        optimizer.remove()


def test_outer_step_and_step_of_the_outer_optimizer_both_extrapolate():
    found = []
    for way in range(2):
        problem = Spectrum(10, n=3)
        optimizer = problem.optimizer(tb.Accelerated(IDENTITY, 0.1), lr=0.5)
        optimizer.inner_steps = None
        (valid,) = optimizer.outer_losses.values()
        for _ in range(3):
            optimizer.zero_grad()
            problem.train().backward()
            optimizer.step()
            if way:
                optimizer.outer.zero_grad()
                valid().backward()
                optimizer.outer.step()
            else:
                optimizer.outer_step()
        found.append(problem.x.detach().clone())
    assert torch.equal(*found)


def test_a_resumed_run_is_bit_exact():
    def run(n, saved=None):
        problem = Spectrum(10, n=3)
        optimizer = problem.optimizer(tb.Accelerated(IDENTITY), lr=0.5)
        if saved:
            optimizer.load_state_dict(saved)
        for _ in range(n):
            optimizer.zero_grad()
            problem.train().backward()
            optimizer.step()
        return problem, optimizer

    _, optimizer = run(5)
    resumed, _ = run(4, optimizer.state_dict())
    whole, _ = run(9)
    assert torch.equal(resumed.x, whole.x)
