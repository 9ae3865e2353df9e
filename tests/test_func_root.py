"""`implicit_root` and `implicit_fixed_point`: closed forms, any solver, transforms, closures."""

import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import torch_bilevel as tb

SYMMETRIC = ["cg(max_steps=40, rtol=1e-14)", "minres(max_steps=40, rtol=1e-14)"]
ANY = [
    "gmres(max_steps=50, rtol=1e-13)",
    "cgnr(max_steps=80, rtol=1e-14)",
    "direct",
    "richardson(max_steps=200, rtol=1e-13)",
]


def data(n, d, phase):
    """What the recorded numbers of jaxopt were computed on."""
    i, j = np.arange(n)[:, None], np.arange(d)[None]
    inputs = np.sin(1.0 + phase + 0.7 * i + 1.3 * j * j + 0.11 * i * j)
    return torch.tensor(inputs), torch.tensor(np.cos(phase + 1.9 * np.arange(n)))


TRAIN, VALID = data(12, 4, 0.0), data(9, 4, 0.5)
PENALTY = torch.tensor([-1.0, 0.5, 0.0, -2.0], dtype=torch.float64)


def ridge_condition(w, penalty, inputs, targets):
    return inputs.mT @ (inputs @ w - targets) / len(targets) + penalty.exp() * w


def ridge_solution(penalty, inputs, targets):
    H = inputs.mT @ inputs / len(targets) + torch.diag(penalty.exp())
    return torch.linalg.solve(H, inputs.mT @ targets / len(targets))


def by_numpy(initial, penalty, inputs, targets):
    """Any program: NumPy cannot be differentiated, batched or traced."""
    inputs, targets = inputs.numpy(), targets.numpy()
    H = inputs.T @ inputs / len(targets) + np.diag(np.exp(penalty.numpy()))
    return np.linalg.solve(H, inputs.T @ targets / len(targets))


def validation(w):
    inputs, targets = VALID
    return ((inputs @ w - targets) ** 2).mean() / 2


def ridge(solver):
    solve = tb.func.implicit_root(ridge_condition, solver=solver)(by_numpy)

    def phi(penalty, inputs=TRAIN[0], targets=TRAIN[1]):
        return validation(solve(torch.zeros(4), penalty, inputs, targets))

    return solve, phi


def exact(penalty, inputs=TRAIN[0], targets=TRAIN[1]):
    return validation(ridge_solution(penalty, inputs, targets))


MANY = torch.stack([PENALTY, PENALTY.flip(0), 0.1 * PENALTY])
CELLS = {
    "grad": lambda f, s: grad(f)(PENALTY),
    "grad of data": lambda f, s: grad(lambda X: f(PENALTY, X))(TRAIN[0]),
    "jvp": lambda f, s: jvp(f, (PENALTY,), (torch.ones(4),))[1],
    "vmap": lambda f, s: vmap(f)(MANY),
    "vmap∘grad": lambda f, s: vmap(grad(f))(MANY),
    "jacrev": lambda f, s: jacrev(s)(PENALTY),
    "jacfwd": lambda f, s: jacfwd(s)(PENALTY),
    "reverse over reverse": lambda f, s: jacrev(jacrev(f))(PENALTY),
    "forward over reverse": lambda f, s: hessian(f)(PENALTY),
    "reverse over forward": lambda f, s: jacrev(jacfwd(f))(PENALTY),
    "vmap∘hessian": lambda f, s: vmap(hessian(f))(MANY),
    "third": lambda f, s: jacrev(jacrev(jacrev(f)))(PENALTY),
}


def by_loop(cell):
    """The cell of the closed form; of each penalty in turn where it is batched.

    (In torch 2.13 ``vmap`` of a Hessian and reverse over forward are wrong through
    ``torch.linalg.solve``.)
    """
    if cell == "reverse over forward":
        return hessian(exact)(PENALTY)
    if cell == "vmap":
        return torch.stack([exact(p) for p in MANY])
    if cell == "vmap∘grad":
        return torch.stack([grad(exact)(p) for p in MANY])
    if cell == "vmap∘hessian":
        return torch.stack([hessian(exact)(p) for p in MANY])
    if cell == "third":  # by autograd alone, for the same reason
        f = exact
        return torch.autograd.functional.jacobian(
            lambda p: torch.autograd.functional.hessian(f, p, create_graph=True),
            PENALTY,
        )
    return CELLS[cell](exact, lambda p: ridge_solution(p, *TRAIN))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("solver", [*SYMMETRIC, *ANY])
def test_every_transform_with_every_solver(solver, cell):
    solve, phi = ridge(solver)
    found = CELLS[cell](phi, lambda p: solve(torch.zeros(4), p, *TRAIN))
    torch.testing.assert_close(found, by_loop(cell), rtol=1e-9, atol=1e-12)


def test_the_hessian_of_ridge_in_closed_form():
    """Φ(λ) = V(w*(λ)), w* = H⁻¹c;  ∂w = −H⁻¹ D_i w,  D_i = e^λ_i e_i e_iᵀ."""
    inputs, targets = TRAIN
    H = inputs.mT @ inputs / len(targets) + torch.diag(PENALTY.exp())
    w = torch.linalg.solve(H, inputs.mT @ targets / len(targets))
    A = torch.linalg.inv(H)
    V, t = VALID
    r, Q = V.mT @ (V @ w - t) / len(t), V.mT @ V / len(t)
    e, q = PENALTY.exp(), A @ r
    dw = -A * (e * w)  # column i: ∂w/∂λ_i
    cross = torch.diag(e) @ dw  # row i: D_i ∂w/∂λ_j
    expected = dw.mT @ Q @ dw - q[:, None] * cross - (q[:, None] * cross).mT
    expected = expected - torch.diag(e * w * q)
    for solver in (SYMMETRIC[0], ANY[0]):
        _, phi = ridge(solver)
        torch.testing.assert_close(
            hessian(phi)(PENALTY), expected, rtol=1e-10, atol=1e-13
        )


@pytest.mark.parametrize("solver", ["cg(rtol=1e-14)", "gmres(rtol=1e-13)"])
def test_gradcheck(solver):
    solve, phi = ridge(solver)
    leaves = [t.clone().requires_grad_() for t in (PENALTY, TRAIN[0], TRAIN[1])]
    assert torch.autograd.gradcheck(phi, leaves)
    assert torch.autograd.gradcheck(phi, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(phi, leaves)


# jaxopt 0.8.5, jax 0.10.2, float64; implicit differentiation of these problems
JAXOPT_RIDGE = [
    -0.00017052376051264467,
    0.0014922697689449711,
    0.000675207391778109,
    -0.0009807137587708023,
]
JAXOPT_RIDGE_HESSIAN = [
    [2.479308452974226e-4, -1.2039510912583681e-4, -3.354205850659068e-4]
    + [-1.1119008594784046e-4],
    [-1.2039510912583681e-4, -7.118592905084304e-4, 2.1838574694004847e-4]
    + [-5.280986923436716e-05],
    [-3.3542058506590676e-4, 2.1838574694004847e-4, -4.3149198549766025e-4]
    + [2.7917921596792015e-4],
    [-1.1119008594784049e-4, -5.280986923436706e-05, 2.7917921596792026e-4]
    + [-2.016624648450852e-4],
]
JAXOPT_LOGISTIC = [
    -0.0072742781355827155,
    0.0029346671137996778,
    0.0004163812317653407,
    -0.013055083390296873,
]


def logistic(w, penalty, inputs, targets):
    return (
        F.softplus(-targets.sign() * (inputs @ w)).mean()
        + (penalty.exp() * w**2).sum() / 2
    )


def newton(initial, penalty, inputs, targets):
    w = initial
    for _ in range(30):
        H = hessian(logistic)(w, penalty, inputs, targets)
        w = w - torch.linalg.solve(H, grad(logistic)(w, penalty, inputs, targets))
    return w


def logistic_validation(w):
    return F.softplus(-VALID[1].sign() * (VALID[0] @ w)).mean()


def test_jaxopt_on_ridge():
    _, phi = ridge("cg(max_steps=40, rtol=1e-15)")
    expected = torch.tensor(JAXOPT_RIDGE)
    torch.testing.assert_close(grad(phi)(PENALTY), expected, rtol=1e-11, atol=0)
    expected = torch.tensor(JAXOPT_RIDGE_HESSIAN)
    torch.testing.assert_close(hessian(phi)(PENALTY), expected, rtol=1e-9, atol=1e-14)
    h = tb.func.hypergradient(
        lambda w, p, b: (
            ((b[0] @ w - b[1]) ** 2).mean() / 2 + (p.exp() * w**2).sum() / 2
        ),
        lambda w, p, b: validation(w),
        "cg(rtol=1e-15)",
    )
    found, _ = h(ridge_solution(PENALTY, *TRAIN), PENALTY, TRAIN, None)
    torch.testing.assert_close(found, torch.tensor(JAXOPT_RIDGE), rtol=1e-11, atol=0)


def test_jaxopt_on_logistic_regression():
    expected = torch.tensor(JAXOPT_LOGISTIC)
    solve = tb.func.implicit_root(grad(logistic), solver="cg(rtol=1e-15)")(newton)

    def phi(penalty):
        return logistic_validation(solve(torch.zeros(4), penalty, *TRAIN))

    assert float(phi(PENALTY)) == pytest.approx(0.716765190028391, abs=1e-14)
    torch.testing.assert_close(grad(phi)(PENALTY), expected, rtol=1e-11, atol=0)

    def step(w, penalty, inputs, targets):
        return w - 0.3 * grad(logistic)(w, penalty, inputs, targets)

    @tb.func.implicit_fixed_point(step, solver="gmres(rtol=1e-14)")
    def descend(w, penalty, inputs, targets):
        for _ in range(1500):
            w = step(w, penalty, inputs, targets)
        return w

    def at_fixed_point(penalty):
        return logistic_validation(descend(torch.zeros(4), penalty, *TRAIN))

    torch.testing.assert_close(
        grad(at_fixed_point)(PENALTY), expected, rtol=1e-9, atol=0
    )
    h = tb.func.hypergradient(
        lambda w, p, b: logistic(w, p, *b),
        lambda w, p, b: logistic_validation(w),
        "cg(rtol=1e-15)",
    )
    w = newton(torch.zeros(4), PENALTY, *TRAIN)
    found, _ = h(w, PENALTY, TRAIN, None)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=0)


def test_scipy_solves():
    @tb.func.implicit_root(grad(logistic), solver="cg(rtol=1e-14)")
    def solve(initial, penalty, inputs, targets):
        def value(w):
            return float(logistic(torch.from_numpy(w), penalty, inputs, targets))

        def slope(w):
            return grad(logistic)(torch.from_numpy(w), penalty, inputs, targets).numpy()

        found = scipy.optimize.minimize(
            value, initial.numpy(), jac=slope, method="BFGS", options={"gtol": 1e-12}
        )
        return found.x

    def phi(penalty):
        return logistic_validation(solve(torch.zeros(4), penalty, *TRAIN))

    torch.testing.assert_close(
        grad(phi)(PENALTY), torch.tensor(JAXOPT_LOGISTIC), rtol=1e-5, atol=0
    )
    many = vmap(grad(phi))(MANY)
    torch.testing.assert_close(many, torch.stack([grad(phi)(p) for p in MANY]))


def test_scalars():
    """TorchOpt's custom_root gives −0 here."""
    solve = tb.func.implicit_root(lambda y, x: y**3 - x)(
        lambda initial, x: float(x) ** (1 / 3)
    )
    x = torch.tensor(8.0, requires_grad=True)
    y = solve(torch.tensor(1.0), x)
    assert y.item() == pytest.approx(2.0) and y.shape == ()
    y.backward()
    assert float(x.grad) == pytest.approx(1 / 12)
    y = vmap(grad(solve, argnums=1), in_dims=(None, 0))(
        torch.tensor(1.0), torch.tensor([1.0, 8.0])
    )
    torch.testing.assert_close(y, torch.tensor([1 / 3, 1 / 12]))
    assert float(hessian(solve, argnums=1)(torch.tensor(1.0), torch.tensor(8.0))) == (
        pytest.approx(-2 / 9 * 8 ** (-5 / 3))
    )


def entry(vector, k):
    """vector[k], also of a k that is batched."""
    return torch.index_select(vector, 0, torch.as_tensor(k).reshape(1))[0]


def test_pytrees_and_arguments_without_gradient():
    """y = {a, (b,)} with a = s·x₁, b = a + x₂[k]; a string, an integer and None are data."""

    def condition(y, x, k, kind, nothing):
        assert kind == "double" and nothing is None
        return {
            "a": y["a"] - 2 * x[0],
            "b": (y["b"][0] - y["a"] - entry(x[1], k),),
        }

    @tb.func.implicit_root(condition)
    def solve(initial, x, k, kind, nothing):
        return {"a": 2 * x[0], "b": (2 * x[0] + entry(x[1], k),)}

    x = torch.tensor(1.5), torch.tensor([1.0, 2.0, 3.0])
    for k in (2, torch.tensor(2)):
        found = grad(lambda x, k=k: solve(None, x, k, "double", None)["b"][0])(x)
        torch.testing.assert_close(
            found, (torch.tensor(2.0), torch.tensor([0.0, 0.0, 1.0]))
        )
    rows = vmap(
        lambda k: grad(lambda x: solve(None, x, k, "double", None)["b"][0])(x)[1]
    )
    torch.testing.assert_close(rows(torch.arange(3)), torch.eye(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    solve = tb.func.implicit_root(lambda y, x: y - x**2)(lambda initial, x: x**2)
    x = torch.tensor([1.0, 2.0], dtype=dtype, requires_grad=True)
    y = solve(torch.zeros(2), x)
    assert y.dtype == dtype
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([2.0, 4.0], dtype=dtype))


def test_auxiliary_results():
    @tb.func.implicit_root(lambda y, x: y - 2 * x, has_aux=True)
    def solve(initial, x):
        return 2 * x, {"steps": torch.tensor(7), "loss": x.sum()}

    x = torch.ones(2, requires_grad=True)
    y, aux = solve(None, x)
    assert int(aux["steps"]) == 7
    assert y.requires_grad and not aux["loss"].requires_grad
    gradient, aux = grad(
        lambda x: (lambda y, a: (y.sum(), a))(*solve(None, x)), has_aux=True
    )(x)
    torch.testing.assert_close(gradient, torch.full((2,), 2.0))
    assert int(aux["steps"]) == 7
    value = hessian(lambda x: (solve(None, x)[0] ** 2).sum())(x.detach())
    torch.testing.assert_close(value, 8 * torch.eye(2))


# --- closures -----------------------------------------------------------------------------------


class Equilibrium:
    def __init__(self):
        self.layer = torch.nn.Linear(4, 4)

    def map(self, z, x):
        return 0.3 * torch.tanh(self.layer(z) + x)

    def solve(self, z, x):
        for _ in range(120):
            z = self.map(z, x)
        return z


def test_a_module_reached_by_closure():
    model = Equilibrium()
    z0, x = torch.zeros(4), torch.ones(4, requires_grad=True)
    named = tb.func.implicit_fixed_point(
        model.map, parameters=model.layer, solver="gmres(rtol=1e-14)"
    )(model.solve)
    (named(z0, x) ** 2).sum().backward()
    found = [x.grad, model.layer.weight.grad, model.layer.bias.grad]
    x.grad = None
    model.layer.zero_grad()
    (model.solve(z0, x) ** 2).sum().backward()  # through all steps
    for a, b in zip(
        found, [x.grad, *(p.grad for p in model.layer.parameters())], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    leaves = (x, *model.layer.parameters())
    assert torch.autograd.gradgradcheck(lambda x, *_: named(z0, x), leaves)
    batched = vmap(lambda x: named(z0, x))(torch.stack([x, 2 * x]).detach())
    torch.testing.assert_close(batched[1], model.solve(z0, 2 * x).detach())


def test_an_unnamed_closure_is_an_error():
    model = Equilibrium()
    z0, x = torch.zeros(4), torch.ones(4)
    solve = tb.func.implicit_fixed_point(model.map)(model.solve)
    with pytest.raises(tb.UnnamedClosure, match="parameters=module"):
        solve(z0, x)
    for p in model.layer.parameters():
        p.requires_grad_(False)
    solve(z0, x)  # frozen: nothing is missing

    def outer(t):
        """T is differentiated by a transform, and reached by closure."""
        return tb.func.implicit_root(lambda y, x: y - t * x)(lambda i, x: t * x)(
            None, torch.ones(2)
        ).sum()

    for transform in (grad, lambda f: lambda t: jvp(f, (t,), (t,))[1]):
        with pytest.raises(tb.UnnamedClosure):
            transform(outer)(torch.tensor(2.0))
    named = tb.func.implicit_root(
        lambda y, x: y - t * x, parameters=(t := torch.ones(2, requires_grad=True))
    )
    named(lambda i, x: (t * x).detach())(None, torch.full((2,), 3.0)).sum().backward()
    torch.testing.assert_close(t.grad, torch.full((2,), 3.0))


class Layer(torch.nn.Module):
    """z = √(a x), the fixed point of Heron's map."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        @tb.func.implicit_fixed_point(
            lambda z, x: (z + self.a * x / z) / 2, parameters=self
        )
        def solve(z, x):
            return (self.a * x).sqrt()

        return solve(torch.ones_like(x), x)


def test_a_module_under_functional_call():
    """The backward pass runs when the module has its own parameters again."""
    model, x = Layer(), torch.tensor(2.0)

    def out(a, x=x):
        return torch.func.functional_call(model, {"a": a}, (x,))

    a = torch.tensor(8.0)
    assert float(grad(out)(a)) == pytest.approx(0.125 * 2)  # √(x/a)/2
    assert float(grad(lambda x: out(a, x))(x)) == pytest.approx(1.0)
    leaf = a.clone().requires_grad_()
    out(leaf).backward()
    assert float(leaf.grad) == pytest.approx(0.25) and model.a.grad is None
    many = vmap(grad(out))(torch.tensor([2.0, 8.0]))
    torch.testing.assert_close(many, torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(
        hessian(out)(a), torch.tensor(-(2**0.5) / 4 * 8 ** (-1.5))
    )
    model(x).backward()
    assert float(model.a.grad) == pytest.approx(0.5)


def test_a_batched_closure_is_an_error():
    def of(d):
        root = tb.func.implicit_root(lambda y, x: y - d * x)(lambda i, x: 2 * x)
        return root(None, torch.ones(3)).sum()

    with pytest.raises(tb.UnnamedClosure, match="batches"):
        vmap(of)(torch.ones(3))


def test_a_solver_may_write_into_its_start():
    @tb.func.implicit_root(lambda y, x: y - x)
    def solve(y, x):
        return y.add_(x)

    start = torch.zeros(2)
    torch.testing.assert_close(
        vmap(lambda x: solve(start, x))(torch.eye(2)), torch.eye(2)
    )
    assert torch.equal(start, torch.zeros(2))
    with pytest.raises(tb.UnsupportedTransform, match="no lanes"):
        vmap(lambda x: solve(start, x))(torch.empty(0, 2))


def test_what_can_be_named():
    with pytest.raises(tb.UnsupportedParameter, match="a str"):
        tb.func.implicit_root(lambda y, x: y - x, parameters="model")(lambda i, x: x)(
            None, torch.ones(1)
        )


# --- products that the user supplies ------------------------------------------------------------


def test_supplied_products():
    """A C library has no derivative that torch knows: H v, Jᵀ-like products are its own."""
    A = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    calls = []

    def hvp(v, y, x):
        calls.append("hvp")
        return A @ v

    def hvp_transpose(v, y, x):
        calls.append("hvp_transpose")
        return A.mT @ v

    def cross(u, y, x):  # F = A y − x²
        calls.append("cross")
        return -2 * x * u

    def cross_transpose(w, y, x):
        calls.append("cross_transpose")
        return -2 * x * w

    def solve(initial, x):
        return np.linalg.solve(A.numpy(), x.numpy() ** 2)

    x = torch.tensor([1.0, 2.0])
    expected = torch.linalg.inv(A) @ torch.diag(2 * x)
    for options in (
        {"hvp": hvp, "cross": cross, "cross_transpose": cross_transpose},
        {
            "hvp": hvp,
            "hvp_transpose": hvp_transpose,
            "cross": cross,
            "cross_transpose": cross_transpose,
        },
    ):
        calls.clear()
        root = tb.func.implicit_root(None, **options)(solve)
        torch.testing.assert_close(jacrev(root, argnums=1)(None, x), expected)
        backwards = "hvp_transpose" if "hvp_transpose" in options else "hvp"
        assert set(calls) == {backwards, "cross"}
        torch.testing.assert_close(jacfwd(root, argnums=1)(None, x), expected)
    with pytest.raises(tb.UnsupportedParameter, match="Pass the parameters in outer"):
        tb.func.implicit_root(None, hvp=hvp, cross=cross, parameters=[A])
    missing = tb.func.implicit_root(None, hvp=hvp)(solve)
    with pytest.raises(tb.UnsupportedParameter, match="optimality is None"):
        jacrev(missing, argnums=1)(None, x)
    wrong = tb.func.implicit_root(None, hvp=hvp, cross=lambda u, y, x: u.sum())(solve)
    with pytest.raises(tb.UnsupportedParameter, match="cross must return"):
        jacrev(wrong, argnums=1)(None, x)


# --- what is refused, and what is told ----------------------------------------------------------


def test_forward_over_forward_is_refused():
    _, phi = ridge("cg")
    with pytest.raises(tb.errors.ForwardOverForward, match="torch.func.hessian"):
        jacfwd(jacfwd(phi))(PENALTY)


def test_compile():
    _, phi = ridge("cg")
    torch._dynamo.reset()
    with pytest.raises(Exception, match="cannot be part of a fullgraph"):
        torch.compile(phi, fullgraph=True, backend="eager")(PENALTY)
    torch._dynamo.reset()
    broken = torch.compile(phi, backend="eager")(PENALTY)
    torch.testing.assert_close(broken, phi(PENALTY))


def test_an_unsolved_derivative_warns():
    solve, phi = ridge("cg(max_steps=1)")
    with pytest.warns(tb.UnsolvedWarning, match="1 steps of CG.*more steps"):
        grad(lambda p: phi(p))(PENALTY.clone())
        p = PENALTY.clone().requires_grad_()
        phi(p).backward()


@pytest.mark.parametrize(
    "solver", ["unrolled", "identity", "sgd", "random_truncated_neumann", "soba"]
)
def test_solvers_that_do_not_solve_one_system(solver):
    with pytest.raises(tb.UnknownName, match="no solver named.*Known: cg, "):
        tb.func.implicit_root(lambda y, x: y - x, solver=solver)


def test_solvers_with_options():
    for solver in (tb.CG(max_steps=3), "cg(max_steps=3)"):
        tb.func.implicit_root(lambda y, x: y - x, solver=solver)
    with pytest.raises(tb.UnknownName, match="no option 'damping'"):
        tb.func.implicit_root(lambda y, x: y - x, solver="cg(damping=1.0)")
    with pytest.raises(tb.UnsupportedParameter, match="one linear system"):
        tb.func.implicit_root(lambda y, x: y - x, solver=tb.Identity())


def test_backward_runs_under_the_autocast_of_the_call():
    layer = torch.nn.Linear(3, 3).float()
    x = torch.ones(2, 3, dtype=torch.float32, requires_grad=True)
    z0 = torch.zeros(2, 3, dtype=torch.float32)

    def step(z, x):
        return torch.tanh(0.2 * layer(z) + x)

    @tb.func.implicit_fixed_point(step, parameters=layer, solver="gmres(rtol=1e-3)")
    def solve(z, x):
        for _ in range(20):
            z = step(z, x)
        return z

    with torch.autocast("cpu", torch.bfloat16):
        loss = solve(z0, x).float().pow(2).sum()
    loss.backward()
    found, x.grad = x.grad, None
    solve(z0, x).pow(2).sum().backward()
    torch.testing.assert_close(found, x.grad, rtol=0.05, atol=0.02)


def test_structures_that_do_not_fit():
    solve = tb.func.implicit_root(lambda y, x: [y - x])(lambda i, x: x)
    with pytest.raises(tb.UnsupportedParameter, match="optimality condition returned"):
        solve(None, torch.ones(2))
    solve = tb.func.implicit_root(lambda y, x: (y - x)[:1])(lambda i, x: x)
    with pytest.raises(tb.UnsupportedParameter, match=r"shape \(2,\)"):
        solve(None, torch.ones(2))
    solve = tb.func.implicit_root(lambda y, x: y)(lambda i, x: "solved")
    with pytest.raises(tb.UnsupportedParameter, match="a str"):
        solve(None, torch.ones(2))


def test_the_solver_may_use_autograd_and_keeps_nothing():
    """A loop with an optimizer, as people write them."""

    def condition(y, x):
        return grad(lambda y: ((y - x) ** 2).sum() + (y**2).sum())(y)

    @tb.func.implicit_root(condition, solver="cg")
    def solve(initial, x):
        assert not x.requires_grad and torch.is_grad_enabled()
        y = initial.clone().requires_grad_()
        optimizer = torch.optim.SGD([y], lr=0.2)
        for _ in range(100):
            optimizer.zero_grad()
            (((y - x) ** 2).sum() + (y**2).sum()).backward()
            optimizer.step()
        return y

    x = torch.ones(3, requires_grad=True)
    y = solve(torch.zeros(3), x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 0.5))
    found = vmap(grad(lambda x: solve(torch.zeros(3), x).sum()))(torch.ones(2, 3))
    torch.testing.assert_close(found, torch.full((2, 3), 0.5))


def test_solvers_that_write_into_what_they_are_given():
    """Here y = x²; also NumPy's memory of it."""

    def by_numpy(initial, x, c):
        array = x.numpy()
        array *= array
        c.numpy()[:] = 7
        return array

    for write in (lambda initial, x, c: x.mul_(x) + c.zero_(), by_numpy):
        solve = tb.func.implicit_root(lambda y, x, c: y - x**2 * c, solver="direct")(
            write
        )
        x, c = torch.tensor([1.0, 3.0]), torch.ones(2)
        found = grad(lambda x, c=c, solve=solve: solve(None, x, c).sum())(x)
        torch.testing.assert_close(found, torch.tensor([2.0, 6.0]))
        assert torch.equal(x, torch.tensor([1.0, 3.0])) and torch.equal(
            c, torch.ones(2)
        )


def test_arrays_take_the_precision_of_their_own_start():
    def solver(initial, x):
        return {"a": np.ones(2) / 3, "b": np.ones(2) / 3}

    condition = tb.func.implicit_root(
        lambda y, x: {k: 3 * v - x.to(v) for k, v in y.items()}, solver="direct"
    )
    start = {"a": torch.zeros(2).float(), "b": torch.zeros(2).double()}
    found = condition(solver)(start, torch.ones(2))
    assert found["a"].dtype is torch.float32 and found["b"].dtype is torch.float64
    assert torch.equal(found["b"], torch.ones(2).double() / 3)
    alone = tb.func.implicit_root(lambda y, x: 3 * y - x, solver="direct")(
        lambda initial, x: np.ones(2) / 3
    )
    for dtype in (torch.float32, torch.float64):
        assert alone(None, torch.ones(2, dtype=dtype)).dtype is dtype


def test_complex_arguments_are_not_differentiated():
    solve = tb.func.implicit_root(
        lambda y, x: y - (x.conj() * x).real, solver="direct"
    )(lambda initial, x: (x.conj() * x).real)
    x = torch.randn(3)
    close = torch.testing.assert_close
    close(solve(None, torch.fft.fft(x)), torch.fft.fft(x).abs() ** 2)
    for derivative in (jacrev, jacfwd):
        with pytest.raises(tb.UnsupportedParameter, match="complex tensor"):
            derivative(lambda x: solve(None, torch.fft.fft(x)))(x)
