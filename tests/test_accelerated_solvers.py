"""Heavy ball, Nesterov, GMRES and CGNR: rates, bounds of the spectrum, finite termination."""

import io
import math
import warnings

import pytest
import torch

import torch_bilevel as tb
from torch_bilevel.solvers import (
    CGNR,
    GMRES,
    MINRES,
    HeavyBall,
    Memory,
    Nesterov,
    Operator,
    Richardson,
)
from torch_bilevel.solvers import cgnr as cgnr_module
from torch_bilevel.solvers import gmres as gmres_module
from torch_bilevel.solvers import momentum as momentum_module
from torch_bilevel.solvers.krylov import orthogonalise
from torch_bilevel.solvers.spectrum import extreme_eigenvalues

MOMENTUM = [HeavyBall, Nesterov]
SPECTRA = {
    "one": [3.7],
    "repeated": [0.2] * 6,
    "two": [0.01, 5.0],
    "clustered": [h + k / 1e4 for h in (0.01, 0.9) for k in range(15)],
    "log-spaced": torch.logspace(-2, 2, 40).tolist(),
    "even": torch.linspace(1e-3, 1.0, 60).tolist(),
    "tiny": [1e-9, 3e-9, 2e-8],
}


def system(eigenvalues, seed=0):
    """A symmetric with these eigenvalues, b, and the solution."""
    g = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=g))
    A = Q @ torch.diag(torch.as_tensor(eigenvalues)) @ Q.T
    A = (A + A.T) / 2  # without rounding
    b = torch.randn(n, generator=g)
    return A, b, torch.linalg.solve(A, b)


def unsymmetric(n, seed=0):
    """A far from symmetric and not definite, b, and the solution."""
    g = torch.Generator().manual_seed(seed)
    A, b = torch.randn(n, n, generator=g), torch.randn(n, generator=g)
    return A, b, torch.linalg.solve(A, b)


def operator(A):
    return Operator(A.mv, len(A), torch.equal(A, A.T), transpose=A.T.mv)


def residual(A, b, v):
    return float(torch.linalg.vector_norm(b - A @ v) / torch.linalg.vector_norm(b))


# ------------------------------------------------------------------ momentum: rates


def theory(solver, kappa):
    """(q, s): after k steps the error at the lower end is (1 + k s) qᵏ of that at the start."""
    root = math.sqrt(kappa)
    if solver is Nesterov:
        return 1 - 1 / root, 1 / root
    q = (root - 1) / (root + 1)
    return q, (1 - q * q) / (1 + q * q)


@pytest.mark.parametrize("solver", MOMENTUM)
@pytest.mark.parametrize("kappa", [4.0, 1e2, 1e4])
@pytest.mark.parametrize("steps", [1, 2, 7, 60])
def test_the_error_at_both_ends_has_a_closed_form(solver, kappa, steps):
    A, b = torch.tensor([1.0, kappa]), torch.tensor([1.0, 1.0])
    found = solver(steps, 0.0, lower=1.0, upper=kappa).solve(Operator(A.mul, 2), b)
    q, s = theory(solver, kappa)
    low = (1 + steps * s) * q**steps
    high = 0.0 if solver is Nesterov else (-1) ** steps * low
    error = 1 - A * found.value  # of the start's, which is the solution itself
    torch.testing.assert_close(error, torch.tensor([low, high]), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("solver", MOMENTUM)
@pytest.mark.parametrize("kappa", [1e2, 1e4])
def test_the_rate_is_that_of_theory(solver, kappa):
    """In √κ-many steps: the slope of the logarithm of the error, within 10 %."""
    A, b, x = system(torch.logspace(0, math.log10(kappa), 40).tolist())
    count = int((6 if solver is HeavyBall else 10) * math.sqrt(kappa))
    errors = [
        float(
            torch.linalg.vector_norm(
                solver(k, 0.0, 1.0, kappa).solve(operator(A), b).value - x
            )
        )
        for k in (count, 2 * count)
    ]
    slope = math.log(errors[1] / errors[0]) / count
    assert 0.9 < slope / math.log(theory(solver, kappa)[0]) < 1.02


@pytest.mark.parametrize("solver", MOMENTUM)
def test_ten_times_fewer_steps_than_richardson(solver):
    A, b, _ = system(torch.logspace(0, 4, 40).tolist())
    found = solver(4000, 1e-6, lower=1.0, upper=1e4).solve(operator(A), b)
    assert found.status == "converged" and residual(A, b, found.value) < 1.01e-6
    many = 10 * int(found.num_steps)
    best = Richardson(many, step_size=2 / (1 + 1e4), rtol=1e-6)
    assert float(best.solve(operator(A), b).residual) > 1e-4


@pytest.mark.parametrize("solver", MOMENTUM)
@pytest.mark.parametrize("lower", [1.0, 0.1, 30.0])
def test_no_residual_exceeds_that_of_the_start(solver, lower):
    """Which Polyak's own first step does not obey; the spectrum is the worst one, all at L."""
    A, b, x = system([1.0] + [1e4] * 20)
    near = x + 1e-5 * torch.randn(21, generator=torch.Generator().manual_seed(1))
    for x0 in (None, near):
        first = 1.0 if x0 is None else residual(A, b, x0)
        assert first <= 1
        for steps in [*range(1, 40), 100, 300]:
            found = solver(steps, 0.0, lower, 1e4).solve(operator(A), b, x0)
            assert float(found.residual) <= first * (1 + 1e-9)
            assert found.status == "max steps"


@pytest.mark.parametrize("solver", MOMENTUM)
@pytest.mark.parametrize("factor, slower", [(0.25, 2.2), (4.0, 3.3)])
def test_a_wrong_lower_bound_is_only_slower(solver, factor, slower):
    A, b, _ = system(torch.logspace(-4, 0, 60).tolist())
    right, wrong = (
        solver(9000, 1e-6, lower=1e-4 * f, upper=1.0).solve(operator(A), b)
        for f in (1.0, factor)
    )
    assert wrong.status == "converged"
    assert 1.3 < int(wrong.num_steps) / int(right.num_steps) < slower


# ------------------------------------------------------------ momentum: automatic bounds


@pytest.mark.parametrize("solver", MOMENTUM)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("seed", [0, 1])
def test_automatic_bounds_converge(solver, spectrum, seed):
    A, b, x = system(SPECTRA[spectrum], seed)
    found = solver(20000, 1e-12).solve(operator(A), b, None, Memory())
    assert found.status == "converged"
    torch.testing.assert_close(found.value, x, rtol=1e-8, atol=1e-8 * float(x.norm()))
    assert residual(A, b, found.value) < 1e-11


@pytest.mark.parametrize("solver", MOMENTUM)
def test_a_scalar_takes_a_few_steps(solver):
    b = torch.tensor([3.0])
    found = solver(20, 1e-12).solve(Operator(lambda v: 7 * v, 1), b)
    torch.testing.assert_close(found.value, b / 7)
    assert found.status == "converged" and int(found.num_steps) <= 12


def test_extreme_eigenvalues():
    """Exact after as many steps as distinct eigenvalues, otherwise from inside."""
    A, b, _ = system([0.5] * 3 + [2.0] * 4 + [9.0])
    memory, product = Memory(), operator(A)
    assert float(extreme_eigenvalues(product, b, memory)) == pytest.approx(9.0, 1e-12)
    assert float(memory.smallest) == pytest.approx(0.5, 1e-12)
    assert product.num_products <= 4
    assert float(torch.linalg.vector_norm(memory.eigenvector)) == pytest.approx(1.0)

    A, b, _ = system(torch.logspace(0, 4, 300).tolist())
    memory = Memory()
    for near, low in ((0.97, 40.0), (0.999, 5.0), (0.9999, 4.0)):  # each from the last
        size = float(extreme_eigenvalues(operator(A), b, memory))
        assert near * 1e4 < size <= 1e4 * (1 + 1e-12)
        assert 1 - 1e-9 <= float(memory.smallest) < low

    A, b = torch.linspace(1e-4, 1.0, 1000), torch.zeros(1000)
    memory = Memory()
    for near, low in ((0.99, 17.0), (0.997, 3.0), (0.998, 1.5)):
        size = float(extreme_eigenvalues(Operator(A.mul, 1000), b, memory))
        assert near < size <= 1 + 1e-12 and 1 <= 1e4 * float(memory.smallest) < low

    A, b, _ = system([-3.0, 0.0, 1.0, 2.0])
    memory = Memory()
    assert float(extreme_eigenvalues(operator(A), b, memory)) == pytest.approx(3.0)
    assert float(memory.smallest) == pytest.approx(-3.0)
    A, b, _ = system([0.0, 0.0, 1.0, 2.0])
    extreme_eigenvalues(operator(A), b, memory := Memory())
    assert float(memory.smallest) == pytest.approx(1.0)


@pytest.mark.parametrize("solver", MOMENTUM)
def test_both_estimates_are_remembered(solver):
    A, b, _ = system(torch.logspace(0, 1, 50).tolist())
    memory, product = Memory(), operator(A)
    one = solver(5, 0.0).solve(product, b, None, memory)
    first = product.num_products
    assert first == 20 + 5
    assert 9.9 < float(memory.eigenvalue) <= 10.0
    assert 1.0 <= float(memory.smallest) < 1.01
    two = solver(5, 0.0).solve(product, b, None, memory)
    assert product.num_products == first + 5 and torch.equal(one.value, two.value)
    # nothing is estimated where both are given
    product = operator(A)
    solver(5, 0.0, 1.0, 10.0).solve(product, b, None, Memory())
    assert product.num_products == 5


@pytest.mark.parametrize("solver", MOMENTUM)
@pytest.mark.parametrize("lower", [None, 1.0])
def test_a_system_that_grew_is_estimated_again(solver, lower):
    A, b, _ = system(torch.linspace(1.0, 4.0, 30).tolist())
    memory = Memory()
    solver(200, 1e-10, lower).solve(operator(A), b, None, memory)
    grown = 9 * A
    found = solver(200, 1e-10, lower).solve(operator(grown), b, None, memory)
    assert found.status == "converged" and residual(grown, b, found.value) < 1e-9
    assert float(memory.eigenvalue) == pytest.approx(36.0, rel=0.01)
    same = solver(200, 1e-10, lower).solve(operator(grown), b, None, memory)
    assert torch.equal(same.value, found.value)


@pytest.mark.parametrize("solver", MOMENTUM)
@pytest.mark.parametrize("factor", [1.1, 1.2, 1.3, 1.5, 1.65])
def test_growth_that_would_only_be_slow_is_seen_too(solver, factor):
    """A product ‖A p‖ > L ‖p‖ shows it: heavy ball would need 2000 steps at 1.3 instead of 23."""
    A, b, _ = system(torch.linspace(1.0, 4.0, 30).tolist())
    memory = Memory()
    solver(100, 1e-10).solve(operator(A), b, None, memory)
    fresh = solver(100, 1e-10).solve(operator(factor * A), b, None, Memory())
    product = operator(factor * A)
    found = solver(100, 1e-10).solve(product, b, None, memory)
    assert found.status == "converged"
    assert int(found.num_steps) <= int(fresh.num_steps) + 1
    assert product.num_products <= 80


def test_an_estimate_that_stays_too_low_is_not_an_error(monkeypatch):
    """Nesterov converges up to ¾ λ_max, so a second estimate is used as it is."""
    monkeypatch.setattr(momentum_module, "MARGIN", 0.75)
    A, b, x = system(torch.linspace(1.0, 4.0, 30).tolist())
    found = Nesterov(100, 1e-10).solve(operator(A), b, None, Memory())
    assert found.status == "converged"
    torch.testing.assert_close(found.value, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", MOMENTUM)
@pytest.mark.parametrize("lower", [None, 1.0])
def test_divergence_is_reported_with_a_bound_that_converges(solver, lower):
    A, b, x = system(torch.linspace(1.0, 6.0, 30).tolist())
    for x0 in (None, x + 1e-3):
        found = solver(300, 1e-10, lower, 3.5).solve(operator(A), b, x0, Memory())
        assert found.status == "diverged" and not bool(found.converged)
        assert int(found.num_steps) < 100  # long before numbers overflow
        first = 1.0 if x0 is None else residual(A, b, x0)
        assert float(found.residual) == pytest.approx(residual(A, b, found.value))
        assert float(found.residual) <= first * (1 + 1e-9)
        upper = 1 / float(found.safe_step)
        assert 6.0 < upper < 6.4
        again = solver(300, 1e-10, lower, upper).solve(operator(A), b, x0, Memory())
        assert again.status == "converged"


def test_how_small_the_upper_bound_may_be():
    """Heavy ball: λ_max < L + μ;  Nesterov: λ_max < L (1 + 1/(1 + 2β)), at least 4/3 L."""
    A, b, _ = system([1e-3, 1.0])
    beta = 1 - 2 * 1e-3**0.5 / 0.75**0.5
    for solver, limit in ((HeavyBall, 0.999), (Nesterov, 1 / (1 + 1 / (1 + 2 * beta)))):
        over = solver(30000, 1e-8, 1e-3, limit * 1.002).solve(operator(A), b)
        under = solver(30000, 1e-8, 1e-3, limit * 0.995).solve(operator(A), b)
        assert (over.status, under.status) == ("converged", "diverged")


@pytest.mark.parametrize("solver", MOMENTUM)
@pytest.mark.parametrize("bounds", [(None, None), (0.5, 4.0), (0.5, None)])
@pytest.mark.parametrize("x0", [None, "given"])
def test_negative_curvature_is_reported(solver, bounds, x0):
    A, b, x = system([-0.3, 0.5, 1.0, 2.0, 4.0])
    start = x + 0.01 if x0 else None
    found = solver(500, 1e-10, *bounds).solve(operator(A), b, start, Memory())
    assert found.status == "negative curvature" and float(found.curvature) < 0
    assert float(found.residual) == pytest.approx(residual(A, b, found.value))
    assert float(found.residual) <= (1.0 if start is None else residual(A, b, start))


@pytest.mark.parametrize("solver", MOMENTUM)
def test_growth_before_a_negative_direction_shows_is_still_negative_curvature(solver):
    """pᵀA p > 0 as the residual grows: Lanczos tells the cause."""
    A = torch.diag(torch.tensor([-1.0, 100.0]))
    b = torch.tensor([1.0, 0.3])  # bᵀA b > 0
    bounds = {"lower": 0.001, "upper": 100.0}
    found = solver(60, 0.0, **bounds).solve(operator(A), b, None, Memory())
    assert found.status == "negative curvature" and float(found.curvature) < 0
    assert float(found.residual) == pytest.approx(residual(A, b, found.value))


@pytest.mark.parametrize("solver", MOMENTUM)
def test_no_step_possible_at_all_gives_a_multiple_of_b(solver):
    b = torch.tensor([1.0, 2.0])
    for bounds in ((None, None), (1.0, 4.0)):
        product = Operator(lambda v: -2 * v, 2)
        found = solver(20, 1e-4, *bounds).solve(product, b, None, Memory())
        assert found.status == "negative curvature" and int(found.num_steps) == 1
        assert 0 < float(found.value[0]) and torch.equal(
            found.value, found.value[0] * b
        )
        assert float(found.residual) == pytest.approx(1 + 2 * float(found.value[0]))
    assert product.num_products == 1


@pytest.mark.parametrize("solver", MOMENTUM)
def test_a_null_space_does_not_stop_convergence(solver):
    """b orthogonal to it, as with a softmax head without penalty."""
    spectrum = [0.0] * 6 + torch.linspace(0.5, 3.0, 54).tolist()
    A, noise, _ = system([1.0 if h == 0 else h for h in spectrum])
    Q = torch.linalg.eigh(A)[1]
    A = Q @ torch.diag(torch.tensor(spectrum)) @ Q.T
    A = (A + A.T) / 2
    b = A @ noise
    found = solver(2000, 1e-10).solve(operator(A), b, None, Memory())
    assert found.status == "converged" and residual(A, b, found.value) < 1e-9
    expected = torch.linalg.pinv(A, rtol=1e-10, hermitian=True) @ b
    torch.testing.assert_close(found.value, expected, rtol=1e-7, atol=1e-7)
    # b inside it: nothing to find, and nothing is made up
    b = Q[:, 0]
    found = solver(50, 1e-10).solve(operator(A), b, None, Memory())
    assert found.status == "max steps" and float(found.residual) == pytest.approx(1.0)


@pytest.mark.parametrize("solver", MOMENTUM)
@pytest.mark.parametrize("rtol", [0.0, 1e-8])
def test_a_negative_direction_that_b_does_not_have_does_no_harm(solver, rtol):
    """μ cannot be −1 nor 0, where momentum never ends: it is what max_steps resolve."""
    A, b = torch.diag(torch.tensor([-1.0, 2.0, 4.0])), torch.tensor([0.0, 1.0, 1.0])
    memory = Memory()
    found = solver(100, rtol).solve(operator(A), b, None, memory)
    assert float(memory.smallest) == pytest.approx(-1.0)
    assert not bool(found.negative_curvature) and float(found.residual) <= 1e-4
    assert bool(found.converged) == (rtol > 0)


@pytest.mark.parametrize(
    "given",
    [
        {"max_steps": 0},
        {"rtol": -1.0},
        {"lower": 0.0},
        {"upper": -1.0},
        {"lower": 2.0, "upper": 1.0},
    ],
)
@pytest.mark.parametrize("solver", MOMENTUM)
def test_bad_options_are_refused(solver, given):
    with pytest.raises(ValueError, match=solver.__name__):
        solver(**given)


def test_bad_options_of_the_others():
    for make in (GMRES, CGNR):
        for given in ({"max_steps": 0}, {"rtol": -1.0}):
            with pytest.raises(ValueError, match=make.__name__):
                make(**given)
    with pytest.raises(ValueError, match="restarts"):
        GMRES(restarts=0)


# ------------------------------------------------------------------------- GMRES


@pytest.mark.parametrize("n", [1, 2, 5, 30])
@pytest.mark.parametrize("rtol", [0.0, 1e-13])
def test_gmres_is_exact_after_n_steps(n, rtol):
    A, b, x = unsymmetric(n)
    for steps in (n, n + 7):
        found = GMRES(steps, rtol).solve(operator(A), b)
        torch.testing.assert_close(found.value, x, rtol=1e-9, atol=1e-10)
        assert int(found.num_steps) == n
    if n > 1:  # and not before
        assert float(GMRES(n - 1, rtol).solve(operator(A), b).residual) > 1e-4


@pytest.mark.parametrize("warm", [False, True])
def test_gmres_minimises_the_residual_over_the_krylov_space(warm):
    A, b, x = unsymmetric(12)
    x0 = x + 0.1 if warm else None
    r = b if x0 is None else b - A @ x0
    powers, last = [r], 1.0
    for k in range(1, 9):
        found = GMRES(k, 0.0).solve(operator(A), b, x0)
        K = torch.linalg.qr(torch.stack(powers, 1))[0]
        y = torch.linalg.lstsq(A @ K, r.unsqueeze(1)).solution
        best = residual(A, b, (0 if x0 is None else x0) + (K @ y).squeeze(1))
        assert residual(A, b, found.value) == pytest.approx(best, rel=1e-8)
        assert float(found.residual) == pytest.approx(best, rel=1e-8)
        assert best <= last * (1 + 1e-12)
        last = best
        powers.append(A @ powers[-1] / torch.linalg.vector_norm(powers[-1]))


def test_what_is_left_beside_a_basis():
    """Where little is left of w, one Gram–Schmidt pass is not orthogonal."""
    V = torch.linalg.qr(unsymmetric(30)[0])[0][:20]
    noise, h = unsymmetric(30, 1)[1], unsymmetric(20, 2)[1]
    left = noise - V.T @ (V @ noise)
    w, found = orthogonalise(h @ V + 1e-9 * left, V)
    torch.testing.assert_close(found, h)
    torch.testing.assert_close(w, 1e-9 * left, rtol=1e-5, atol=1e-15)
    assert float((V @ w).norm() / w.norm()) < 1e-14


def test_gmres_tells_the_residual_of_an_ill_conditioned_system():
    A, b, _ = system(torch.logspace(-12, 0, 60).tolist())
    A = A + 1e-3 * torch.triu(unsymmetric(60)[0], 1)
    for steps in (20, 40, 60):
        found = GMRES(steps, 0.0).solve(operator(A), b)
        assert residual(A, b, found.value) == pytest.approx(
            float(found.residual), rel=1e-3, abs=1e-12
        )


def test_gmres_equals_minres_on_symmetric_systems():
    A, b, _ = system([-3.0, -1.0, 0.5, 2.0, 4.0, 7.0])
    for k in range(1, 7):
        one, other = (s(k, 0.0).solve(operator(A), b) for s in (GMRES, MINRES))
        torch.testing.assert_close(one.value, other.value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("distinct", [[2.0], [-1.0, 3.0], [1.0, 2.0, 7.0]])
def test_gmres_takes_as_many_steps_as_there_are_distinct_eigenvalues(distinct):
    """Of a diagonalisable A that is far from normal."""
    g = torch.Generator().manual_seed(3)
    S = torch.randn(9, 9, generator=g)
    values = torch.tensor([distinct[i % len(distinct)] for i in range(9)])
    A, b = S @ torch.diag(values) @ torch.linalg.inv(S), torch.randn(9, generator=g)
    found = GMRES(9, 1e-10).solve(operator(A), b)
    assert int(found.num_steps) == len(distinct)
    torch.testing.assert_close(found.value, torch.linalg.solve(A, b))
    A = torch.diag(values)  # with nothing but exhaustion to stop at
    found = GMRES(9, 0.0).solve(operator(A), b)
    assert int(found.num_steps) == len(distinct)
    torch.testing.assert_close(found.value, b / values, rtol=1e-13, atol=1e-13)


def test_gmres_where_nothing_happens_at_first():
    """A cyclic shift: no progress for n − 1 steps, then the solution."""
    A = torch.roll(torch.eye(5), 1, 0)
    b = torch.eye(5)[0]
    for k in range(1, 5):
        found = GMRES(k, 0.0).solve(operator(A), b)
        assert torch.equal(found.value, torch.zeros(5)) and float(found.residual) == 1
    torch.testing.assert_close(GMRES(5).solve(operator(A), b).value, A.T @ b)


def test_gmres_restarts():
    A = torch.eye(30) + 0.1 * unsymmetric(30)[0]
    b = unsymmetric(30)[1]
    last = 1.0
    for restarts in range(1, 8):
        product = operator(A)
        found = GMRES(4, 0.0, restarts).solve(product, b)
        assert int(found.num_steps) == 4 * restarts
        assert product.num_products == 5 * restarts - 1
        assert float(found.residual) == pytest.approx(residual(A, b, found.value))
        assert float(found.residual) < 0.8 * last
        last = float(found.residual)
    product = operator(A)  # no further cycle than it needs
    found = GMRES(4, 1e-6, restarts=500).solve(product, b)
    assert found.status == "converged" and product.num_products < 100


def test_gmres_on_a_singular_system_stays_finite():
    A = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    for b in (torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])):
        found = GMRES(9, 0.0).solve(operator(A), b)
        assert torch.isfinite(found.value).all()
        assert float(found.residual) == pytest.approx(residual(A, b, found.value))
        assert float(found.residual) <= 1


# -------------------------------------------------------------------------- CGNR


@pytest.mark.parametrize("n", [1, 2, 5, 20])
def test_cgnr_solves_systems_that_are_not_symmetric(n):
    A, b, x = unsymmetric(n)
    A = A + 3 * torch.eye(n)
    x = torch.linalg.solve(A, b)
    found = CGNR(60 * n, 1e-12).solve(operator(A), b)
    assert found.status == "converged"
    torch.testing.assert_close(found.value, x, rtol=1e-8, atol=1e-9)
    assert float(found.residual) == pytest.approx(
        residual(A, b, found.value), abs=1e-12
    )


def test_cgnr_minimises_over_the_krylov_space_of_the_normal_equations():
    A, b, x = unsymmetric(12)
    for x0 in (None, x + 0.1):
        r, last = (b, 1.0) if x0 is None else (b - A @ x0, 1.0)
        powers = [A.T @ r]
        for k in range(1, 6):
            product = operator(A)
            found = CGNR(k, 0.0).solve(product, b, x0)
            assert product.num_products == 2 * k + (x0 is not None)
            K = torch.linalg.qr(torch.stack(powers, 1))[0]
            y = torch.linalg.lstsq(A @ K, r.unsqueeze(1)).solution
            best = residual(A, b, (0 if x0 is None else x0) + (K @ y).squeeze(1))
            assert float(found.residual) == pytest.approx(best, rel=1e-8)
            assert residual(A, b, found.value) == pytest.approx(best, rel=1e-8)
            assert best <= last * (1 + 1e-12)
            last = best
            powers.append(A.T @ (A @ powers[-1]) / torch.linalg.vector_norm(powers[-1]))


@pytest.mark.parametrize("distinct", [[2.0], [1.0, 3.0], [1.0, 2.0, 7.0]])
def test_cgnr_takes_as_many_steps_as_there_are_distinct_singular_values(distinct):
    U = torch.linalg.qr(unsymmetric(9, 1)[0])[0]
    V = torch.linalg.qr(unsymmetric(9, 2)[0])[0]
    values = torch.tensor([distinct[i % len(distinct)] for i in range(9)])
    A, b = U @ torch.diag(values) @ V.T, unsymmetric(9)[1]
    for rtol, more in ((1e-12, 0), (0.0, 10)):  # and no 0/0 after it
        found = CGNR(len(distinct) + more, rtol).solve(operator(A), b)
        torch.testing.assert_close(found.value, torch.linalg.solve(A, b))
        assert int(found.num_steps) >= len(distinct)
    if len(distinct) > 1:
        early = CGNR(len(distinct) - 1, 0.0).solve(operator(A), b)
        assert float(early.residual) > 1e-2


def test_cgnr_gives_a_least_squares_solution_of_a_singular_system():
    A = unsymmetric(8)[0]
    A[:, 0] = A[:, 1] + A[:, 2]  # rank 7
    b = unsymmetric(8)[1]
    found = CGNR(200, 0.0).solve(operator(A), b)
    expected = torch.linalg.pinv(A, rtol=1e-10) @ b  # from zero: that of least norm
    torch.testing.assert_close(found.value, expected, rtol=1e-7, atol=1e-7)
    assert float(found.residual) == pytest.approx(residual(A, b, expected), rel=1e-8)
    assert not bool(found.converged)
    assert int(found.num_steps) < 40  # Aᵀr is rounding: nothing is left to do


def test_cgnr_says_that_it_needs_a_transpose():
    with pytest.raises(tb.errors.NonSymmetricSystem, match="gmres"):
        CGNR().solve(Operator(torch.neg, 2, symmetric=False), torch.ones(2))


# --------------------------------------------------------------- laws of every solver

ALL = {
    "heavy_ball": HeavyBall(2000, 1e-12),
    "heavy_ball, given": HeavyBall(2000, 1e-12, 0.5, 4.0),
    "nesterov": Nesterov(2000, 1e-12),
    "nesterov, given": Nesterov(2000, 1e-12, 0.5, 4.0),
    "gmres": GMRES(40, 1e-12),
    "cgnr": CGNR(200, 1e-12),
}


@pytest.fixture(params=sorted(ALL))
def solver(request):
    return ALL[request.param]


def test_a_start_that_solves_the_system_is_returned(solver):
    x = torch.tensor([1.0, -2.0, 4.0])
    A = torch.diag(torch.tensor([0.5, 1.0, 4.0]))  # A x is exact
    product = operator(A)
    memory = Memory(*torch.tensor([4.0, 1.0, 0.5]).unbind())
    for rtol in (1e-12, 0.0):
        chosen = type(solver)(40, rtol)
        found = chosen.solve(product, A @ x, x, memory)
        assert torch.equal(found.value, x) and float(found.residual) == 0
        assert int(found.num_steps) == 0 and found.status == "converged"
    assert product.num_products == 2


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_tolerances_are_relative(solver, scale):
    A, b, x = system([0.5, 1.0, 2.5, 4.0])
    one = solver.solve(operator(A), b, None, Memory())
    other = solver.solve(operator(A), scale * b, None, Memory())
    assert int(one.num_steps) == int(other.num_steps) and bool(other.converged)
    torch.testing.assert_close(other.value / scale, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_residual_is_the_true_one(solver, steps, dtype):
    A, b, x = system(torch.linspace(0.5, 4.0, 9).tolist())
    A, b, x = A.to(dtype), b.to(dtype), x.to(dtype)
    eps = torch.finfo(dtype).eps
    for x0 in (None, x + 0.2, x + 1e-3):
        chosen = type(solver)(steps, 0.0)
        found = chosen.solve(operator(A), b, x0, Memory())
        assert found.value.dtype == found.residual.dtype == dtype
        expected = residual(A.double(), b.double(), found.value.double())
        assert float(found.residual) == pytest.approx(expected, abs=50 * eps)


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_product_that_is_not_finite_gives_nan(solver, after, bad):
    A, b, x = system(torch.linspace(0.5, 4.0, 9).tolist())
    count = 0

    def product(v):
        nonlocal count
        count += 1
        return A @ v if count <= after else bad * v

    memory = Memory(*torch.tensor([4.0, 1.0, 0.5]).unbind())
    memory.eigenvector = b / b.norm()
    found = solver.solve(Operator(product, 9), b, None, memory)
    assert torch.isnan(found.value).all() and not bool(found.converged)
    assert found.status == "max steps"  # not divergence: no step size would help


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_right_hand_side_that_is_not_finite_gives_nan(solver, bad):
    A, b, x = system([0.5, 1.0, 4.0])
    b[1] = bad
    for x0 in (None, x):
        found = solver.solve(operator(A), b, x0, Memory())
        assert not torch.isfinite(found.value).all() and not bool(found.converged)
        assert not bool(found.diverged)


@pytest.mark.parametrize("solver", MOMENTUM)
def test_estimates_are_not_made_of_products_that_are_not_finite(solver):
    A, b, x = system([1.0, 2.0, 4.0])
    memory = Memory()
    found = solver().solve(Operator(lambda v: math.nan * v, 3), b, None, memory)
    assert torch.isnan(found.value).all() and memory.eigenvalue is None
    found = solver(100, 1e-10).solve(operator(A), b, None, memory)  # and it goes on
    torch.testing.assert_close(found.value, x, rtol=1e-8, atol=1e-8)


def test_nothing_is_read_back_without_a_tolerance(solver, monkeypatch):
    """As on a GPU with rtol=0: the same numbers, and no more looks at flags with more steps."""
    A, b, x = system([0.5, 0.5, 2.0, 4.0, 4.0])
    memory = Memory(*torch.tensor([4.0, 1.0, 0.5]).unbind())
    expected = [
        type(solver)(steps, 0.0).solve(operator(A), b, x0, memory)
        for steps in (2, 3, 60)
        for x0 in (None, x + 0.1)
    ]
    for module in (momentum_module, gmres_module, cgnr_module):
        monkeypatch.setattr(module, "may_stop_early", lambda b, rtol: rtol > 0)
    looks, read = [], torch.Tensor.__bool__

    def look(flag):
        looks.append(1)
        return read(flag)

    monkeypatch.setattr(torch.Tensor, "__bool__", look)
    counts = []
    for steps in (2, 3, 60):
        for x0 in (None, x + 0.1):
            looks.clear()
            found = type(solver)(steps, 0.0).solve(operator(A), b, x0, memory)
            counts.append(len(looks))
            other = expected.pop(0)
            torch.testing.assert_close(found.value, other.value, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(
                found.residual, other.residual, rtol=1e-6, atol=1e-12
            )
    assert set(counts) == {1 if isinstance(solver, (HeavyBall, Nesterov)) else 0}


def test_a_zero_right_hand_side_without_looking(solver, monkeypatch):
    for module in (momentum_module, gmres_module, cgnr_module):
        monkeypatch.setattr(module, "may_stop_early", lambda b, rtol: rtol > 0)
    A, b, x = system([0.5, 2.0, 4.0])
    memory = Memory(*torch.tensor([4.0, 1.0, 0.5]).unbind())
    for x0 in (None, x):
        found = type(solver)(9, 0.0).solve(operator(A), 0 * b, x0, memory)
        assert torch.equal(found.value, 0 * b) and float(found.residual) == 0
        assert int(found.num_steps) == 0 and found.status == "converged"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_vectors(solver, dtype):
    """Small matrices are kept in float32, where LAPACK has routines."""
    A, b, x = system([1.0, 2.0, 3.0, 4.0])
    A, b = A.to(dtype), b.to(dtype)
    A = (A + A.T) / 2
    found = type(solver)(30, 0.03).solve(operator(A), b, None, Memory())
    assert found.value.dtype == dtype
    torch.testing.assert_close(found.value.double(), x, rtol=0.2, atol=0.1)


# ------------------------------------------------------------------------ in the loop


def quadratic(estimator):
    """g = ½ yᵀA y − xᵀy with A scaled by a buffer that grows: H differs at every step."""
    A, start, _ = system(torch.linspace(1.0, 6.0, 8).tolist())
    y = torch.zeros(8, requires_grad=True)
    x = (0.1 * start).requires_grad_()
    inner, outer = torch.optim.SGD([y], lr=0.02), torch.optim.SGD([x], lr=0.3)
    optimizer = tb.BilevelOptimizer(inner, outer, estimator=estimator)

    @optimizer.inner_loss
    def train(scale):
        return scale * 0.5 * y @ A @ y - x @ y

    @optimizer.outer_loss
    def valid():
        return ((y - 1) ** 2).sum()

    def run(first, last):
        for k in range(first, last):
            for _ in range(4):
                optimizer.zero_grad()
                train(torch.tensor(1.0 + 0.3 * k)).backward()
                optimizer.step()
            optimizer.outer_step()

    return optimizer, run, x, y


@pytest.mark.parametrize("name", ["heavy_ball", "nesterov"])
def test_a_resume_is_bit_exact(name):
    """λ̂_max, the smallest and the start of the next estimate are part of the state."""
    estimator = f"{name}(max_steps=7, rtol=0.0)"
    optimizer, run, x, _ = quadratic(estimator)
    run(0, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved_y = optimizer.problem.inner.tensors[0].detach().clone()
    run(3, 7)

    other, go_on, x2, y2 = quadratic(estimator)
    with torch.no_grad():
        y2.copy_(saved_y)
    other.load_state_dict(torch.load(file, weights_only=True))
    go_on(3, 7)
    assert torch.equal(x, x2)


@pytest.mark.parametrize("name", ["heavy_ball", "nesterov", "gmres", "cgnr"])
def test_the_hypergradient_is_that_of_cg(name):
    found = []
    for estimator in (
        "cg(max_steps=40, rtol=1e-12)",
        f"{name}(max_steps=400, rtol=1e-12)",
    ):
        optimizer, run, x, _ = quadratic(estimator)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(0, 3)
        found.append(x.detach().clone())
        assert optimizer.last_report.residual < 1e-11
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)
