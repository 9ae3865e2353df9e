"""Many hypergradients at once: one recording for all lanes, and CG on many systems."""

import pytest
import torch
from torch.func import vmap

import torch_bilevel as tb
from torch_bilevel.func.levels import batches
from torch_bilevel.func.two_losses import TwoLosses
from torch_bilevel.solvers import CG, Operator


def inner(y, x, data):
    """Squared errors with a penalty for every entry of y; x may be longer than y."""
    inputs, targets = data
    k = min(len(y), x.numel())
    errors = ((inputs @ y - targets) ** 2).mean()
    return errors + (x.reshape(-1)[:k].exp() * y[:k] ** 2).sum() + (y**2).sum()


def outer(y, x, data):
    inputs, targets = data
    return ((inputs @ y - targets) ** 2).mean() + 0.1 * (x**2).sum()


def rows(h, dims, y, x, data, count):
    """The loop over lanes."""

    def at(tensor, dim, i):
        return tensor if dim is None else tensor.select(dim, i)

    found = []
    for i in range(count):
        inputs, targets = (at(t, d, i) for t, d in zip(data, dims[2], strict=True))
        lane = at(y, dims[0], i), at(x, dims[1], i)
        found.append(h(*lane, (inputs, targets), (inputs, targets)))
    return found


DIMS = {
    "all": (0, 0, (0, 0)),
    "y": (0, None, (None, None)),
    "x": (None, 0, (None, None)),
    "data": (None, None, (0, 0)),
    "other dimensions": (1, 1, (2, 1)),
    "x is shared": (0, None, (0, 0)),
    "targets only": (0, None, (None, 1)),
}


@pytest.mark.parametrize("length", [1, 4, 9])
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("dims", DIMS)
def test_lanes_equal_the_loop(dims, warm, length):
    """Whatever has lanes and whatever is shared; a long x is not put into lanes."""
    dims = DIMS[dims]
    torch.manual_seed(0)

    def draw(dim, *shape):
        shape = list(shape)
        if dim is not None:
            shape.insert(dim, 3)
        return torch.randn(shape)

    y, x = draw(dims[0], 4), draw(dims[1], length)
    data = draw(dims[2][0], 6, 4), draw(dims[2][1], 6)
    h = tb.func.hypergradient(inner, outer, "cg(max_steps=40, rtol=1e-14)")
    start = torch.randn(4) if warm else None

    def one(y, x, data, adjoint):
        return h(y, x, data, data, adjoint=adjoint)

    found, report = vmap(one, in_dims=(*dims, None))(y, x, data, start)
    expected = rows(h, dims, y, x, data, 3)
    assert found.shape == (3, length)
    for i, (gradient, told) in enumerate(expected):
        assert torch.allclose(found[i], gradient, rtol=1e-10, atol=1e-12)
        assert torch.allclose(report.adjoint[i], told.adjoint, rtol=1e-9, atol=1e-12)
        assert torch.allclose(report.loss[i], told.loss) and report.converged[i]
        assert torch.allclose(report.norm[i], told.norm)


def test_lanes_of_lanes():
    h = tb.func.hypergradient(inner, outer, "cg(max_steps=40, rtol=1e-14)")
    ys, xs = torch.randn(3, 4), torch.randn(2, 4)
    data = torch.randn(6, 4), torch.randn(6)

    def one(y, x):
        return h(y, x, data, data)[0]

    found = vmap(vmap(one, in_dims=(0, None)), in_dims=(None, 0))(ys, xs)
    loop = torch.stack([torch.stack([one(y, x) for y in ys]) for x in xs])
    assert torch.allclose(found, loop, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("length, shared", [(8, False), (9, True)])
def test_a_large_x_is_shared(length, shared):
    """What all lanes read is read once, unless it is small."""
    seen = []

    def watching(y, x, data):
        seen.append(bool(batches(x)))
        return inner(y, x, data)

    h = tb.func.hypergradient(watching, outer, "cg")
    ys, x, data = torch.randn(3, 4), torch.randn(length), (torch.eye(4), torch.ones(4))
    vmap(lambda y: h(y, x, data, data)[0])(ys)
    seen.clear()
    vmap(lambda y: h(y, x, data, data)[0])(ys)
    assert set(seen) == {not shared}


@pytest.mark.parametrize(
    "estimator", ["cg", "minres", "direct", "neumann(step_size=0.1)"]
)
@pytest.mark.parametrize("lanes", [True, False])
def test_each_loss_is_evaluated_once(estimator, lanes):
    """Where nothing differentiates; derivatives are products with what was recorded."""
    if lanes and estimator != "cg":
        pytest.skip("takes one system at a time")
    calls = []

    def counted(loss):
        def call(*args):
            calls.append(loss)
            return loss(*args)

        return call

    h = tb.func.hypergradient(counted(inner), counted(outer), estimator)
    data = torch.randn(6, 4), torch.randn(6)
    y, x = torch.randn(3, 4), torch.randn(3, 4)

    def one(y, x):
        return h(y, x, data, data)[0]

    def run():
        return vmap(one)(y, x) if lanes else one(y[0], x[0])

    run()
    calls.clear()
    run()
    assert sorted(map(id, calls)) == sorted(map(id, (inner, outer)))


@pytest.mark.parametrize("lanes", [True, False])
def test_the_result_is_differentiable_where_autograd_records(lanes):
    h = tb.func.hypergradient(inner, outer, "cg(max_steps=40, rtol=1e-14)")
    data = torch.randn(6, 4), torch.randn(6)
    y, x = torch.randn(3, 4), torch.randn(3, 4)

    def run(y, x):
        def one(y, x):
            return h(y, x, data, data)[0]

        return vmap(one)(y, x) if lanes else one(y[0], x[0])

    value = run(y, x)
    assert not value.requires_grad
    for name in ("y", "x"):
        at = {"y": y, "x": x, name: {"y": y, "x": x}[name].clone().requires_grad_()}
        recorded = run(**at)
        assert recorded.requires_grad
        assert torch.allclose(recorded, value, rtol=1e-10, atol=1e-12)
        with torch.no_grad():
            assert not run(**at).requires_grad
    if not lanes:
        assert torch.autograd.gradcheck(lambda x: run(y, x), x.clone().requires_grad_())


NOTHING = {
    "g without x": (lambda y, x, b: (y**2).sum(), lambda y, x, b: (y * x).sum()),
    "f without y": (lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (x**2).sum()),
    "f without x": (lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: y.sum()),
    "f constant": (lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: b.sum()),
    "g linear": (lambda y, x, b: (y * x).sum(), lambda y, x, b: (y**2).sum()),
    "g without y": (lambda y, x, b: (x**2).sum(), lambda y, x, b: (y**2).sum()),
    "g constant": (lambda y, x, b: b.sum(), lambda y, x, b: (y * x).sum()),
}


@pytest.mark.parametrize("lanes", [True, False])
@pytest.mark.parametrize("name", NOTHING)
def test_what_depends_on_nothing_has_derivative_zero(name, lanes):
    g, f = NOTHING[name]
    h = tb.func.hypergradient(g, f, "cg(damping=1.0, max_steps=10, rtol=1e-14)")
    y, x, b = torch.randn(3, 2), torch.randn(3, 2), torch.ones(2)

    def one(y, x):
        return h(y, x, b, b)[0]

    def expected(y, x):
        f_y, f_x = torch.func.grad(f, (0, 1))(y, x, b)
        g_y = torch.func.grad(g)
        H = torch.func.jacrev(g_y)(y, x, b) + torch.eye(2)
        J = torch.func.jacrev(g_y, 1)(y, x, b)
        return f_x - J.mT @ torch.linalg.inv(H) @ f_y

    found = (
        vmap(one)(y, x)
        if lanes
        else torch.stack([one(*p) for p in zip(y, x, strict=True)])
    )
    wanted = torch.stack([expected(*p) for p in zip(y, x, strict=True)])
    assert torch.allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_two_ways_to_products_are_compared():
    """Were they to differ, those of vmap would be taken."""
    h = tb.func.hypergradient(inner, outer, "cg(max_steps=40, rtol=1e-14)")
    data = torch.randn(6, 4), torch.randn(6)
    y, x = torch.randn(3, 4), torch.randn(3, 4)

    def run():
        return vmap(lambda y, x: h(y, x, data, data)[0])(y, x)

    expected, products = run(), TwoLosses.products
    assert all(h._trust.below.values())
    h._trust.below.clear()
    with pytest.MonkeyPatch.context() as patch:
        off = [1.0, 1.0, 1.0, 1.001, 1.0]  # H u alone
        patch.setattr(
            TwoLosses,
            "products",
            lambda *a: tuple(map(lambda s, p: s * p, off, products(*a))),
        )
        patch.setattr(TwoLosses, "solve", None)
        found = run()
    assert not all(h._trust.below.values())
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


def systems():
    """Matrices and right-hand sides of every kind, by name."""
    torch.manual_seed(1)
    n = 6
    A = torch.randn(n, n)
    spd = A @ A.mT + torch.eye(n)
    indefinite = spd - 4 * torch.eye(n)
    b = torch.randn(n)
    holed = b.clone()
    holed[2] = torch.nan
    infinite = spd.clone()
    infinite[0, 0] = torch.inf
    return {
        "definite": (spd, b),
        "the identity": (torch.eye(n), b),
        "indefinite": (indefinite, b),
        "negative": (-spd, b),
        "zero": (spd, torch.zeros(n)),
        "tiny": (spd, 1e-170 * b),
        "no matrix": (torch.zeros(n, n), b),
        "nan": (spd, holed),
        "infinite matrix": (infinite, b),
        "singular": (torch.diag(torch.tensor([1.0, 1, 1, 2, 2, 0])), b),
    }


@pytest.mark.parametrize("numbers", ["arrays", "tensors"])
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("rtol", [0.0, 1e-3, 1e-12])
@pytest.mark.parametrize("max_steps", [1, 4, 30])
def test_cg_of_many_systems_is_that_of_each(max_steps, rtol, warm, numbers):
    """Every lane by its own rule, among lanes that end in every other way."""
    with torch.set_grad_enabled(numbers == "tensors"):
        check_many_systems(max_steps, rtol, warm)


def check_many_systems(max_steps, rtol, warm):
    made, solver = systems(), CG(max_steps=max_steps, rtol=rtol)
    matrices, bs = (torch.stack(parts) for parts in zip(*made.values(), strict=True))
    x0 = torch.linspace(-1, 1, 6)
    starts = x0.expand_as(bs) if warm else None

    def product(V):
        return (matrices @ V.unsqueeze(-1)).squeeze(-1)

    together = solver.solve(Operator(product, 6), bs, starts)
    nested = solver.solve(
        Operator(lambda V: product(V.reshape(10, 6)).reshape(2, 5, 6), 6),
        bs.reshape(2, 5, 6),
        None if starts is None else starts.reshape(2, 5, 6),
    )
    same = {"rtol": 0.0, "atol": 0.0, "equal_nan": True}
    assert torch.allclose(nested.value.reshape(10, 6), together.value, **same)
    for i, (name, (A, b)) in enumerate(made.items()):
        alone = solver.solve(Operator(A.mv, 6), b, x0 if warm else None)
        value = together.value[i]
        close = torch.allclose(value, alone.value, rtol=1e-8, atol=1e-9, equal_nan=True)
        if rtol or name not in ("definite", "infinite matrix"):
            assert close, (name, value, alone.value)
        assert bool(together.negative_curvature[i]) == bool(alone.negative_curvature)
        if rtol:
            assert bool(together.converged[i]) == bool(alone.converged), name
            assert int(together.num_steps[i]) == int(alone.num_steps), name


def test_cg_of_many_systems_in_any_dtype_and_recorded():
    twice = Operator(lambda v: 2 * v, 3)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            found = CG().solve(twice, torch.ones(2, 3, dtype=dtype))
            assert found.value.dtype is dtype
            assert torch.allclose(found.value.double(), torch.full((2, 3), 0.5))
        assert CG().solve(Operator(lambda v: v, 0), torch.ones(2, 0)).value.numel() == 0
    b = torch.ones(2, 3, requires_grad=True)
    CG().solve(twice, b).value.sum().backward()
    assert b.grad is not None


def test_a_vmap_of_which_nothing_has_lanes():
    """Its random numbers are drawn as it says, whatever was computed before."""

    def noisy(y, x, b):
        return ((torch.dropout(y, 0.5, True) - x) ** 2).sum() + (y**2).sum()

    h = tb.func.hypergradient(noisy, lambda y, x, b: ((y - 1) ** 2).sum(), "cg")
    y, x = torch.randn(2, 4), torch.randn(4)

    def rows(randomness):
        one = lambda scale: h(y[0], x)[0] * scale  # noqa: E731
        return vmap(one, randomness=randomness)(torch.ones(3))

    def nested():
        def one():
            return vmap(lambda y: h(y, x)[0], randomness="different")(y)

        return vmap(lambda s: one() * s, randomness="different")(torch.ones(3))

    same = rows("same")
    assert (same == same[0]).all()
    assert not (rows("different") == rows("different")[0]).all()
    with pytest.raises(RuntimeError, match="random"):
        rows("error")
    vmap(lambda y: h(y, x)[0], randomness="different")(y)
    assert not (nested() == nested()[0]).all()


def test_a_closure_with_lanes_beside_random_numbers():
    """It cannot be told from the lanes of random numbers; it is an error of PyTorch's."""

    def of(scale):
        def inner(y, x, b):
            kept = 0 * torch.dropout(torch.ones(4), 0.5, True)
            return ((y * scale - x) ** 2).sum() + (kept * y).sum() + (y**2).sum()

        return tb.func.hypergradient(inner, lambda y, x, b: ((y - 1) ** 2).sum(), "cg")

    x, scales = torch.randn(4), torch.tensor([1.0, 2.0, 3.0])

    def one(scale, y):
        return of(scale)(y, x)[0]

    with pytest.raises(RuntimeError):
        vmap(one, randomness="different")(scales, torch.randn(3, 4))


def test_no_numbers_at_all():
    h = tb.func.hypergradient(
        lambda y, x, b: (y**2).sum() + x.sum(), lambda y, x, b: y.sum(), "cg"
    )
    nothing = torch.zeros(0)
    found = vmap(lambda y: h(y, nothing)[0])(torch.randn(3, 4))
    assert found.shape == (3, 0)


@pytest.mark.parametrize("lanes", [True, False])
def test_a_loss_that_writes_into_its_batch(lanes):
    def writing(y, x, b):
        b -= 1
        return ((y * b - x) ** 2).sum()

    h = tb.func.hypergradient(writing, lambda y, x, b: (y**2).sum(), "cg")
    y, x, b = torch.randn(3, 4), torch.randn(3, 4), torch.ones(4)
    with pytest.raises(tb.BatchChanged, match="writes in place"):
        vmap(lambda y, x: h(y, x, b))(y, x) if lanes else h(y[0], x[0], b)


def test_a_lane_that_is_not_finite_says_nothing_of_other_points():
    h = tb.func.hypergradient(inner, outer, "cg")
    data, y = (torch.eye(4), torch.ones(4)), torch.randn(3, 4)
    broken = y.clone()
    broken[1, 2] = torch.nan

    def rows(y):
        return vmap(lambda y: h(y, torch.ones(4), data, data)[0])(y)

    found = rows(broken)
    assert found[1].isnan().all()
    expected = rows(y)
    assert h._trust.below and all(h._trust.below.values())
    assert torch.allclose(found[[0, 2]], expected[[0, 2]], rtol=1e-8)
