"""Linear solvers on known systems: laws of `torch_bilevel.solvers.base`."""

import subprocess
import sys

import pytest
import torch
from cases import ESTIMATORS, SYMMETRIC_ONLY
from hypothesis import given
from hypothesis import strategies as st

import torch_bilevel as tb
from torch_bilevel.kernels.language import unavailable
from torch_bilevel.solvers import (
    CG,
    CGNR,
    GMRES,
    MINRES,
    REGISTRY,
    Direct,
    HeavyBall,
    Identity,
    Memory,
    Nesterov,
    Neumann,
    Operator,
    Richardson,
    cg,
    momentum,
    richardson,
)

ACCURATE = {name: text for name, text in ESTIMATORS.items() if text}
WARM = sorted(name for name in ACCURATE if REGISTRY[name].uses_start)


def accurate(name):
    return tb.estimator(ACCURATE[name]).solver


def system(eigenvalues, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=g))
    A = Q @ torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    b = torch.randn(n, generator=g)
    return A, b, torch.linalg.solve(A, b)


@pytest.mark.parametrize("name", ACCURATE)
@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("warm", [False, True])
def test_solves_a_positive_definite_system(name, n, warm):
    A, b, x = system(torch.linspace(0.5, 4.0, n).tolist())
    x0 = x + 0.1 * torch.ones(n) if warm else None
    operator = Operator(A.mv, n)
    found = accurate(name).solve(operator, b, x0, Memory())
    torch.testing.assert_close(found.value, x, rtol=1e-9, atol=1e-10)
    residual = torch.linalg.vector_norm(b - A @ found.value) / torch.linalg.vector_norm(
        b
    )
    assert abs(float(found.residual - residual)) < 1e-9
    assert found.status in ("converged", "max steps")


@pytest.mark.parametrize("name", WARM)
def test_a_start_that_solves_the_system_is_returned(name):
    A, b, x = system([1.0, 2.0, 3.0])
    found = accurate(name).solve(Operator(A.mv, 3), b, x, Memory())
    assert int(found.num_steps) == 0 or name == "richardson"
    torch.testing.assert_close(found.value, x)


@pytest.mark.parametrize("name", WARM)
def test_the_start_is_never_worse_than_zero(name):
    A, b, _ = system([1.0, 2.0, 3.0])
    solver = type(accurate(name))(max_steps=1)
    cold = solver.solve(Operator(A.mv, 3), b, None, Memory())
    wild = solver.solve(Operator(A.mv, 3), b, 1e9 * torch.ones(3), Memory())
    assert torch.equal(cold.value, wild.value)
    lost = solver.solve(Operator(A.mv, 3), b, torch.full((3,), torch.nan), Memory())
    assert torch.equal(cold.value, lost.value)


@pytest.mark.parametrize("name", sorted(REGISTRY))
@pytest.mark.parametrize("x0", [None, "given"])
def test_a_zero_right_hand_side_gives_zero(name, x0):
    A, b, x = system([1.0, 2.0])
    start = x if x0 else None
    half = torch.full((2,), 0.5)
    factors = torch.eye(2), A - half.diag(), half  # for 'sample_space'
    operator = Operator(A.mv, 2, factors=lambda limit: factors)
    found = REGISTRY[name]().solve(operator, torch.zeros(2), start, Memory())
    assert torch.equal(found.value, torch.zeros(2))


@pytest.mark.parametrize("solver", [CG, MINRES, GMRES, CGNR])
@pytest.mark.parametrize(
    "eigenvalues", [[2.0], [3.0] * 5, [1.0] * 4 + [5.0] * 3, [1.0, 2.0, 2.0, 7.0, 7.0]]
)
@pytest.mark.parametrize("rtol", [0.0, 1e-10])
def test_exact_in_as_many_steps_as_distinct_eigenvalues(solver, eigenvalues, rtol):
    """Including one: the classical bug returns the iterate before."""
    A, b, x = system(eigenvalues)
    distinct = len(set(eigenvalues))
    found = solver(max_steps=distinct, rtol=rtol).solve(Operator(A.mv, len(b)), b)
    torch.testing.assert_close(found.value, x, rtol=1e-12, atol=1e-12)
    # and running on past convergence gives no 0/0
    found = solver(max_steps=distinct + 10, rtol=0.0).solve(Operator(A.mv, len(b)), b)
    torch.testing.assert_close(found.value, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kappa", [10, 100])
def test_rates(kappa):
    """CG's A-norm error falls by at least (√κ − 1)/(√κ + 1), Richardson's residual by 1 − 1/κ."""
    A, b, x = system(torch.logspace(0, torch.log10(torch.tensor(kappa)), 40).tolist())
    for steps in (5, 10, 20):
        error = CG(steps, rtol=0.0).solve(Operator(A.mv, 40), b).value - x
        ratio = (kappa**0.5 - 1) / (kappa**0.5 + 1)
        assert (error @ A @ error).sqrt() <= 2 * ratio**steps * (x @ A @ x).sqrt()
        found = Richardson(steps, step_size=1 / kappa, rtol=0.0).solve(
            Operator(A.mv, 40), b
        )
        assert float(found.residual) <= (1 - 1 / kappa) ** steps + 1e-12


def test_neumann_closed_form_and_cost():
    A, b, x = system([0.5, 1.0, 2.0])
    for K in (1, 2, 7):
        operator = Operator(A.mv, 3)
        found = Neumann(K, step_size=0.3).solve(operator, b)
        M = torch.linalg.matrix_power(torch.eye(3) - 0.3 * A, K)
        torch.testing.assert_close(found.value, torch.linalg.solve(A, b - M @ b))
        assert operator.num_products == K - 1
        same = Richardson(K, step_size=0.3, rtol=0.0).solve(Operator(A.mv, 3), b)
        torch.testing.assert_close(found.value, same.value)


@pytest.mark.parametrize(
    "solver", [MINRES(60, 1e-12), GMRES(60, 1e-12), CGNR(60, 1e-12), Direct()]
)
def test_indefinite_systems(solver):
    A, b, x = system([-3.0, -1.0, 0.5, 2.0, 4.0])
    found = solver.solve(Operator(A.mv, 5), b)
    torch.testing.assert_close(found.value, x, rtol=1e-9, atol=1e-9)


def test_cg_stops_at_the_last_good_iterate():
    A = torch.diag(torch.tensor([1.0, 4.0, -2.0]))
    b = torch.tensor([1.0, 1.0, 1e-3])
    steps = []
    found = CG(20, 1e-12).solve(Operator(lambda v: (steps.append(1), A @ v)[1], 3), b)
    assert bool(found.negative_curvature) and found.status == "negative curvature"
    assert float(found.curvature) < 0
    before = CG(int(found.num_steps), 0.0).solve(Operator(A.mv, 3), b)
    assert torch.equal(found.value, before.value)
    # no step possible at all: the one-step answer along b
    found = CG().solve(Operator(lambda v: -2 * v, 3), b)
    torch.testing.assert_close(found.value, b / 2)
    assert float(found.curvature) == -2.0 and int(found.num_steps) == 0


def test_singular_consistent_systems():
    """Softmax heads without penalty: a null space that b is orthogonal to."""
    A = torch.diag(torch.tensor([0.0, 1.0, 3.0]))
    b = torch.tensor([0.0, 1.0, 3.0])
    for solver in (
        CG(20, 1e-12),
        MINRES(20, 1e-12),
        GMRES(20, 1e-12),
        CGNR(20, 1e-12),
        Direct(),
        Richardson(500, rtol=1e-12),
        HeavyBall(500, 1e-12),
        Nesterov(500, 1e-12),
    ):
        found = solver.solve(Operator(A.mv, 3), b, None, Memory())
        torch.testing.assert_close(found.value, torch.tensor([0.0, 1.0, 1.0]))
        assert not bool(found.negative_curvature)


@pytest.mark.parametrize("name", sorted(set(ACCURATE) - SYMMETRIC_ONLY))
def test_nonsymmetric_systems(name):
    A = torch.tensor([[2.0, 1.0], [-1.0, 1.5]])
    b = torch.tensor([1.0, 2.0])
    operator = Operator(A.mv, 2, symmetric=False, transpose=A.T.mv)
    found = accurate(name).solve(operator, b, None, Memory())
    torch.testing.assert_close(
        found.value, torch.linalg.solve(A, b), rtol=1e-8, atol=1e-9
    )


def test_identity_needs_no_product():
    operator = Operator(torch.neg, 3)
    found = Identity(scale=0.2).solve(operator, torch.ones(3))
    assert torch.equal(found.value, torch.full((3,), 0.2))
    assert operator.num_products == 0 and torch.isnan(found.residual)


def test_the_automatic_step_size_is_remembered():
    A, b, _ = system(torch.linspace(1, 5, 20).tolist())
    memory = Memory()
    operator = Operator(A.mv, 20)
    Richardson(5, rtol=0.0).solve(operator, b, None, memory)
    first = operator.num_products
    assert 0.9 * 5 < float(memory.eigenvalue) <= 5.0001
    Richardson(5, rtol=0.0).solve(operator, b, None, memory)
    assert operator.num_products - first == 5 and first <= 5 + 20


def test_float32():
    A, b, x = system(torch.linspace(0.5, 4.0, 30).tolist())
    A, b = A.float(), b.float()
    for solver in (
        CG(60, 1e-6),
        MINRES(60, 1e-6),
        GMRES(60, 1e-6),
        CGNR(60, 1e-6),
        HeavyBall(60, 1e-6),
        Nesterov(120, 1e-6),
        Direct(),
    ):
        found = solver.solve(Operator(A.mv, 30), b)
        assert found.value.dtype == torch.float32
        torch.testing.assert_close(found.value.double(), x, rtol=1e-4, atol=1e-5)


@given(
    st.lists(st.floats(0.1, 10.0), min_size=1, max_size=8),
    st.integers(0, 1000),
    st.floats(-3, 3).filter(lambda c: abs(c) > 1e-3),
)
def test_solutions_are_linear_in_the_right_hand_side(eigenvalues, seed, c):
    A, b, _ = system(eigenvalues, seed)
    for solver in (
        CG(40, 1e-13),
        MINRES(40, 1e-13),
        GMRES(40, 1e-13),
        Neumann(7, 0.05),
        HeavyBall(7, 0.0),
        Nesterov(7, 0.0),
        Direct(),
    ):
        one = solver.solve(Operator(A.mv, len(b)), b, None, Memory()).value
        other = solver.solve(Operator(A.mv, len(b)), c * b, None, Memory()).value
        torch.testing.assert_close(other, c * one, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinite numbers
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rtol", [0.0, 1e-6])
@pytest.mark.parametrize("kind", ["definite", "indefinite", "singular", "zero", "nan"])
def test_cg_on_the_host_and_on_a_device_are_the_same(kind, rtol, dtype):
    """Numbers in Python, or masks: three operations on vectors a step, no look at the device."""
    torch.manual_seed(0)
    d = {
        "definite": torch.linspace(1, 30, 12),
        "indefinite": torch.linspace(-1, 30, 12),
        "singular": torch.linspace(0, 30, 12),
        "zero": torch.ones(12),
        "nan": torch.full((12,), torch.nan),
    }[kind].to(dtype)
    Q = torch.linalg.qr(torch.randn(12, 12, dtype=dtype))[0]
    b = torch.zeros(12, dtype=dtype) if kind == "zero" else torch.randn(12, dtype=dtype)
    if kind == "singular":
        b = Q @ (d * torch.randn(12, dtype=dtype))
    A = Q @ (d[:, None] * Q.T)
    for steps, x0 in ((3, None), (9, None), (9, 0.1 * torch.ones(12, dtype=dtype))):
        host, *others = (
            tb.CG(max_steps=steps, rtol=rtol).solve(Operator(A.mv, 12), b, x0)
            for _, kernels in everywhere()
            if not (kernels and NO_KERNELS)
        )
        agree(host, others, 1e-9 if dtype == torch.float64 else 1e-3)


def everywhere():
    """Solvers as on the host, as on a device without kernels, and as on one with kernels."""
    for host, kernels in ((True, False), (False, False), (False, True)):
        with pytest.MonkeyPatch.context() as patch:
            for module in (cg, momentum, richardson):
                patch.setattr(module, "by_kernels", lambda b, k=kernels: k)
            patch.setattr(cg, "on_host", lambda b, h=host: h)
            yield host, kernels


def agree(host, others, close):
    for found in others:
        torch.testing.assert_close(
            host.value, found.value, rtol=close, atol=close, equal_nan=True
        )
        assert host.status == found.status
        assert int(host.num_steps) == int(found.num_steps)
        if not torch.isfinite(host.value).all():
            continue  # a residual of what is lost says nothing
        torch.testing.assert_close(
            host.residual, found.residual, rtol=close, atol=close, equal_nan=True
        )
        torch.testing.assert_close(
            host.curvature.double(), found.curvature.double(), rtol=close, atol=close,
            equal_nan=True,
        )  # fmt: skip


NO_KERNELS = unavailable(torch.zeros(1))


@pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinite numbers
@pytest.mark.parametrize("kind", ["definite", "indefinite", "zero", "nan", "unit"])
@pytest.mark.parametrize(
    "solver",
    [
        tb.Richardson(7, 0.03, rtol=0.0), tb.Richardson(40, 0.05, rtol=0.1),
        tb.Richardson(7, 0.2, rtol=0.0), tb.Richardson(1, 0.03), tb.Richardson(9),
        tb.Neumann(6, 0.03), tb.Neumann(1, 0.03), tb.Neumann(7, 0.2), tb.Neumann(5),
        tb.HeavyBall(8, 0.0), tb.HeavyBall(60, 0.1), tb.HeavyBall(8, 0.0, 1.0, 30.0),
        tb.HeavyBall(8, 0.0, 1.0, 10.0), tb.Nesterov(8, 0.0), tb.Nesterov(60, 0.1),
        tb.Nesterov(8, 0.0, 1.0, 10.0),
    ],
    ids=str,
)  # fmt: skip
def test_steps_by_kernels_and_by_operations_are_the_same(solver, kind):
    d = {
        "definite": torch.linspace(1, 30, 12),
        "indefinite": torch.linspace(-1, 30, 12),
        "zero": torch.linspace(1, 30, 12),
        "nan": torch.full((12,), torch.nan),
        "unit": torch.ones(12),
    }[kind]
    Q = torch.linalg.qr(torch.randn(12, 12))[0]
    A = Q @ (d[:, None] * Q.T)
    b = torch.zeros(12) if kind == "zero" else torch.randn(12)
    for x0 in (None, 0.1 * torch.ones(12)):
        host, _, kernels = (
            solver.solve(Operator(A.mv, 12), b, x0, Memory()) for _ in everywhere()
        )
        agree(host, [kernels], 1e-9)


def test_cg_takes_three_operations_on_vectors_a_step_and_waits_for_nothing():
    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        vectors = waits = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            kinds = [r.alias_info for r in function._schema.returns]
            view = any(kind and not kind.is_write for kind in kinds)
            sizes = [t.numel() for t in (*args, out) if isinstance(t, torch.Tensor)]
            self.vectors += not view and max(sizes, default=0) >= 100
            self.waits += "_local_scalar_dense" in str(function)
            return out

    def count(steps, run):
        solver, counter = tb.CG(max_steps=steps, rtol=0.0), Counter()
        b = torch.ones(100)
        A = torch.linspace(1, 9, 100)
        fixed = A * b  # what the product costs is not counted
        with counter:
            operator = Operator(lambda p: fixed, 100)
            getattr(solver, run)(operator, b, b.new_zeros(()), torch.tensor(True))
        return counter.vectors, counter.waits

    for run in ("_on_host", "_on_device"):
        more, less = count(6, run), count(2, run)
        assert more[0] - less[0] <= 4 * 3 and more[1] - less[1] == 0


@pytest.mark.parametrize("scale_A", [1e-25, 1e-20, 1.0, 1e20])
@pytest.mark.parametrize("scale_b", [1e-30, 1e-12, 1.0, 1e15])
def test_cg_does_not_depend_on_units(scale_A, scale_b):
    """In float32, whose squares end at 1e-45 and 1e38."""
    torch.manual_seed(0)
    d, b = torch.linspace(1, 10, 6, dtype=torch.float32), torch.randn(6).float()
    found = CG(max_steps=20, rtol=1e-5).solve(
        Operator(lambda v: scale_A * (d * v), 6), scale_b * b
    )
    expected = (b / d).double() * (scale_b / scale_A)
    if expected.abs().max() > 1e37 or expected.abs().max() < 1e-37:
        return  # not a number of this precision
    error = (found.value.double() - expected).norm() / expected.norm()
    assert error < 1e-4 and found.status == "converged"


@pytest.mark.parametrize("flag", ["allow_tf32", "fp32_precision"])
def test_inner_products_are_not_rounded_whichever_flag_lets_products_be(flag):
    """In a process of its own: PyTorch does not let both flags be used in one."""
    code = f"""
import torch
from torch_bilevel.kernels.language import full_precision, tf32
matmul = torch.backends.cuda.matmul
assert not tf32()
matmul.{flag} = {{"allow_tf32": True, "fp32_precision": "tf32"}}["{flag}"]
assert tf32()
with full_precision(torch.device("cuda")):
    assert not tf32()
assert tf32() and matmul.{flag} in (True, "tf32")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
