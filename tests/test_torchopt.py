"""TorchOpt's transformations as inner optimizers, and its custom_root on our machinery."""

import copy
import gc
import io
import subprocess
import sys

import pytest
import torch
import torchopt
from problems import Quadratic, flat, leaves
from torch.optim import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    RAdam,
    RMSprop,
)

import torch_bilevel as tb
from torch_bilevel.func.rules import rule
from torch_bilevel.func.unrolling import unroll
from torch_bilevel.integrations.torchopt import Optimizer, custom_root, wrap

# TorchOpt's transformation, its torch.optim class and options, and where it rests (None: unknown)
CASES = {
    "sgd": (torchopt.sgd(0.05), (SGD, {"lr": 0.05}), (1, 0)),
    "momentum": (
        torchopt.sgd(0.05, momentum=0.9),
        (SGD, {"lr": 0.05, "momentum": 0.9}),
        (1, 0),
    ),
    "nesterov": (
        torchopt.sgd(0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        (SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (1, 0.1),
    ),
    "maximize": (
        torchopt.sgd(0.05, weight_decay=7.0, maximize=True),
        (SGD, {"lr": 0.05, "weight_decay": 7.0, "maximize": True}),
        (-1, 7.0),
    ),
    "adam": (
        torchopt.adam(0.02, weight_decay=0.1),
        (Adam, {"lr": 0.02, "weight_decay": 0.1}),
        (1, 0.1),
    ),
    "accelerated": (
        torchopt.adam(0.02, use_accelerated_op=True),
        (Adam, {"lr": 0.02}),
        (1, 0),
    ),
    "adamw": (
        torchopt.adamw(0.02, weight_decay=0.1),
        (AdamW, {"lr": 0.02, "weight_decay": 0.1}),
        None,
    ),
    "rmsprop": (torchopt.rmsprop(0.02), (RMSprop, {"lr": 0.02}), (1, 0)),
    "centered": (
        torchopt.rmsprop(0.02, centered=True, momentum=0.5),
        (RMSprop, {"lr": 0.02, "centered": True, "momentum": 0.5}),
        (1, 0),
    ),
    "adagrad": (
        torchopt.adagrad(0.02, lr_decay=0.1),
        (Adagrad, {"lr": 0.02, "lr_decay": 0.1}),
        (1, 0),
    ),
    "adadelta": (torchopt.adadelta(0.5), (Adadelta, {"lr": 0.5}), (1, 0)),
    "adamax": (
        torchopt.adamax(0.02, eps=1e-8),
        (Adamax, {"lr": 0.02, "eps": 1e-8}),
        (1, 0),
    ),
    "radam": (
        torchopt.radam(0.02, eps=1e-8),
        (RAdam, {"lr": 0.02, "eps": 1e-8}),
        (1, 0),
    ),
}
cases = pytest.mark.parametrize("case", CASES)


def pair(case, **options):
    """The same problem with TorchOpt's optimizer and with torch's."""
    transformation, (kind, hyper), _ = CASES[case]
    problems = []
    for build in (lambda y: Optimizer(y, transformation), lambda y: kind(y, **hyper)):
        torch.manual_seed(0)
        problem = Quadratic()
        problems.append((problem, problem.optimizer(build(problem.y), **options)))
    return problems


@cases
def test_value_equals_torch_optim(case):
    ours, theirs = pair(case, estimator="unrolled")
    for problem, optimizer in (ours, theirs):
        problem.steps(optimizer, 7)
    torch.testing.assert_close(ours[0].y, theirs[0].y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", [case for case in CASES if case != "accelerated"])
def test_unrolled_equals_our_rule_and_finite_differences(case):
    found = []
    for problem, optimizer in pair(case, estimator="unrolled"):
        problem.steps(optimizer, 7)
        found.append(problem.hypergradient(optimizer))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)
    problem, optimizer = pair(case, estimator="unrolled")[0]
    problem.steps(optimizer, 7)
    assert tb.check_hypergradient(optimizer).relative_error < 1e-5


@pytest.mark.parametrize("estimator", ["unrolled(checkpoint_every=3)", "forward"])
@pytest.mark.parametrize("case", ["momentum", "adam", "radam"])
def test_other_estimators_equal_unrolled(case, estimator):
    expected, found = (
        problem.hypergradient(optimizer)
        for name in ("unrolled", estimator)
        for problem, optimizer in pair(case, estimator=name)[:1]
        if problem.steps(optimizer, 7) is None
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][2]])
def test_implicit_knows_sign_and_decay(case):
    (ours, a), (theirs, b) = pair(case, estimator="direct")
    for problem, optimizer in ((ours, a), (theirs, b)):
        problem.steps(optimizer, 1)
    assert torch.equal(flat(ours.x), flat(theirs.x))
    g, h = ours.hypergradient(a), theirs.hypergradient(b)
    torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-10)
    sign, decay = CASES[case][2]
    rest = tb.inner.RULES[Optimizer].stationarity(
        ours.y[0], None, {}, a.inners[0].param_groups[0]
    )
    assert rest.sign == sign and rest.decay == pytest.approx(decay, rel=1e-9)


def test_cg_at_the_solution():
    problem = Quadratic()
    inner = Optimizer(problem.y, torchopt.sgd(0.2))
    optimizer = problem.optimizer(inner, estimator="cg(max_steps=60, rtol=1e-13)")
    problem.solve()
    problem.steps(optimizer, 1)
    torch.testing.assert_close(problem.hypergradient(optimizer), problem.exact())


DECOUPLED = {
    "adamw": torchopt.adamw(0.02),
    "momentum": torchopt.chain(
        torchopt.transform.trace(0.9),
        torchopt.transform.add_decayed_weights(0.1),
        torchopt.transform.scale(-0.1),
    ),
    "no step yet": torchopt.sgd(lambda count: 0.0 * count),
}


@pytest.mark.parametrize("name", DECOUPLED)
def test_implicit_refuses_what_it_cannot_explain(name):
    problem = Quadratic()
    inner = Optimizer(problem.y, DECOUPLED[name])
    with pytest.raises(tb.NoUpdateRule, match="where it comes to rest"):
        problem.optimizer(inner, estimator="cg").hypergradient()


def test_schedule():
    """lr_k = 0.1/(1 + k), as torch's LambdaLR has it."""
    schedule = torchopt.sgd(lambda count: 0.1 / (1 + count), momentum=0.9)
    found = []
    for scheduled in (True, False):
        torch.manual_seed(0)
        problem = Quadratic()
        inner = Optimizer(problem.y, schedule)
        if not scheduled:
            inner = SGD(problem.y, lr=0.1, momentum=0.9)
            rates = torch.optim.lr_scheduler.LambdaLR(inner, lambda k: 1 / (1 + k))
        optimizer = problem.optimizer(inner, estimator="unrolled")
        for _ in range(5):
            problem.steps(optimizer)
            if not scheduled:
                rates.step()
        found.append(problem.hypergradient(optimizer))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_dead_unit():
    """TorchOpt's derivative is NaN where a gradient is exactly zero from the first step on."""
    found = []
    for build in (lambda y: Optimizer(y, torchopt.adam(0.1)), lambda y: Adam(y, 0.1)):
        y = torch.tensor([1.0, 2.0], requires_grad=True)
        x = torch.tensor([0.5, 0.3], requires_grad=True)
        optimizer = tb.BilevelOptimizer(build([y]), SGD([x], 0.1), estimator="unrolled")
        train = optimizer.inner_loss(lambda y=y, x=x: (y[0] - x[0]) ** 2 + 0 * y[1])
        optimizer.outer_loss(lambda y=y, x=x: (y**2).sum() + x[1] ** 2)
        for _ in range(3):
            optimizer.zero_grad()
            train().backward()
            optimizer.step()
        found.append(optimizer.hypergradient()[0])
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_groups_and_closure():
    y = leaves((2,), (3,))
    inner = Optimizer(
        [
            {"params": y[:1]},
            {"params": y[1:], "transformation": torchopt.sgd(0.5)},
        ],
        torchopt.sgd(0.1),
    )
    start = [t.detach().clone() for t in y]

    def closure():
        inner.zero_grad()
        loss = sum(t.sum() for t in y)
        loss.backward()
        return loss

    assert inner.step(closure) == sum(t.sum() for t in start)
    torch.testing.assert_close(y[0].detach(), start[0] - 0.1)
    torch.testing.assert_close(y[1].detach(), start[1] - 0.5)


REFUSED = {
    "clip": (
        torchopt.chain(torchopt.clip_grad_norm(1.0), torchopt.sgd(0.1)),
        ValueError,
        r"gradient_transform\(tb.clip_grad_norm",
    ),
    "clip above": (
        torchopt.chain(torchopt.clip_grad_norm(1e6), torchopt.adam(0.1)),
        ValueError,
        "mixes parameters",
    ),
    "dampening": (
        torchopt.sgd(0.1, momentum=0.9, dampening=0.5),
        ValueError,
        "not a function of its state",
    ),
    "learned": (
        torchopt.sgd(torch.tensor(0.1, requires_grad=True)),
        ValueError,
        "inner_hyperparameters",
    ),
    "optimizer": (torch.optim.SGD, TypeError, "GradientTransformation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_construction(name):
    transformation, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        Optimizer(leaves((2,)), transformation)


def test_clipping_declared_instead():
    problem = Quadratic()
    inner = Optimizer(problem.y, torchopt.adam(0.05))
    optimizer = problem.optimizer(inner, estimator="unrolled")
    optimizer.gradient_transform(tb.clip_grad_norm(0.5))
    for _ in range(4):
        optimizer.zero_grad()
        problem.train().backward()
        torch.nn.utils.clip_grad_norm_(problem.y, 0.5)
        optimizer.step()
    assert tb.check_hypergradient(optimizer).relative_error < 1e-6


def detached(updates, state, *, params=None, inplace=True):
    return tuple(-0.1 * g * g.detach().abs() for g in updates), state


WRONG = {
    "detached": torchopt.base.GradientTransformation(lambda params: (), detached),
    "accelerated": CASES["accelerated"][0],  # its derivative neglects ε
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_derivative_is_not_unrolled(name):
    problem = Quadratic()
    inner = Optimizer(problem.y, WRONG[name])
    optimizer = problem.optimizer(inner, estimator="unrolled")
    problem.steps(optimizer, 2)
    with pytest.raises(tb.NoUpdateRule, match="is not that of its update"):
        optimizer.hypergradient()


def saved(state):
    """Through a file, as tensors and plain types only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("case", ["sgd", "adam", "radam", "adagrad"])
def test_state_dict_resumes_exactly(case):
    """In the middle of a window, in another optimizer, when the first is gone or not."""
    (first, optimizer), _ = pair(case, estimator="unrolled")
    first.steps(optimizer, 3)
    state = saved(optimizer.state_dict())
    values = [t.detach().clone() for t in first.y]
    first.steps(optimizer, 3)
    expected = first.hypergradient(optimizer)
    for _ in range(2):
        (second, again), _ = pair(case, estimator="unrolled")
        with torch.no_grad():
            for t, value in zip(second.y, values, strict=True):
                t.copy_(value)
        again.load_state_dict(state)
        second.steps(again, 3)
        assert torch.equal(flat(second.y), flat(first.y)) or optimizer is None
        torch.testing.assert_close(second.hypergradient(again), expected)
        end = flat(second.y).detach().clone()
        first.y, optimizer = [end], None
        gc.collect()


def test_loading_does_not_change_the_optimizer_it_came_from():
    y, z = leaves((2,)), leaves((2,))
    one, other = Optimizer(y, torchopt.sgd(0.1)), Optimizer(z, torchopt.sgd(0.5))
    other.load_state_dict(one.state_dict())
    before = [y[0].detach().clone(), z[0].detach().clone()]
    for tensors, optimizer in ((y, one), (z, other)):
        tensors[0].sum().backward()
        optimizer.step()
    torch.testing.assert_close(y[0].detach(), before[0] - 0.1)
    torch.testing.assert_close(z[0].detach(), before[1] - 0.5)


def test_copy():
    y = leaves((2,))
    optimizer = copy.deepcopy(Optimizer(y, torchopt.adam(0.1)))
    gc.collect()
    p = optimizer.param_groups[0]["params"][0]
    p.sum().backward()
    optimizer.step()
    torch.testing.assert_close(p.detach(), y[0].detach() - 0.1)


def test_counters_survive_half_precision():
    y = [torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)]
    optimizer = Optimizer(y, torchopt.adam(0.1))
    y[0].sum().backward()
    for _ in range(300):
        optimizer.step()
    optimizer.load_state_dict(saved(optimizer.state_dict()))
    assert 300 in [v for v in optimizer.state[y[0]].values() if isinstance(v, int)]


WRAPPED = {
    "SGD": (torchopt.SGD, {"lr": 0.05, "momentum": 0.9}),
    "Adam": (torchopt.Adam, {"lr": 0.05}),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrap(name):
    kind, options = WRAPPED[name]
    y = leaves((3,), ())
    z = [t.detach().clone().requires_grad_() for t in y]
    optimizers = [(z, wrap(kind(z, **options))), (y, kind(y, **options))]
    for tensors, optimizer in optimizers:
        for _ in range(4):
            optimizer.zero_grad()
            sum((t**4).sum() for t in tensors).backward()
            optimizer.step()
    torch.testing.assert_close(z, y, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="before its first step"):
        wrap(optimizers[1][1])
    with pytest.raises(TypeError, match="takes a torchopt.Optimizer"):
        wrap(optimizers[0][1])


def test_torchopt_is_not_imported_before_it_is_needed():
    code = (
        "import sys, torch_bilevel, torch_bilevel.integrations.torchopt as t\n"
        "assert 'torchopt' not in sys.modules\n"
        "sys.modules['torchopt'] = None\n"
        "try: t.wrap(1)\n"
        "except ImportError as e: assert 'pip install torchopt' in str(e)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("case", ["momentum", "adam", "rmsprop"])
def test_pure_face(case):
    """A transformation is a rule of `unroll` as it is."""
    transformation, (kind, hyper), _ = CASES[case]

    def loss(y, x):
        return (x * (y - 1) ** 4).sum()

    y, x = torch.randn(3), torch.rand(3)
    found = [
        torch.func.jacrev(unroll(one, num_steps=5)(loss), argnums=1)(y, x)
        for one in (transformation, rule(kind, **hyper))
    ]
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def ridge(w, lam, X, t):
    return X.T @ (X @ w - t) + lam * w


def ridge_solver(w, lam, X, t):
    eye = torch.eye(X.shape[1])
    return torch.linalg.solve(X.T @ X + lam * eye, X.T @ t)


@pytest.fixture
def data():
    return torch.tensor(1.5), torch.randn(10, 3), torch.randn(10)


def ridge_derivative(lam, X, t):
    """∂w*/∂λ = −(XᵀX + λI)⁻¹ w*."""
    w = ridge_solver(None, lam, X, t)
    return -torch.linalg.solve(X.T @ X + lam * torch.eye(3), w)


SOLVES = {
    "default": None,
    "cg": torchopt.linear_solve.solve_cg(rtol=1e-13),
    "cg capped": torchopt.linear_solve.solve_cg(maxiter=40, rtol=1e-13, atol=1e-3),
    "normal cg": torchopt.linear_solve.solve_normal_cg(rtol=1e-13),
    "inverse": torchopt.linear_solve.solve_inv(),
    "ridge": torchopt.linear_solve.solve_cg(rtol=1e-13, ridge=1e-12),
    "normal ridge": torchopt.linear_solve.solve_normal_cg(rtol=1e-13, ridge=1e-12),
    "name": "gmres(max_steps=10, rtol=1e-13)",
    "object": tb.CGNR(max_steps=20, rtol=1e-13),
    "function": lambda matvec, b: torch.linalg.solve(
        torch.stack([matvec(e) for e in torch.eye(len(b))], 1), b
    ),
}


@pytest.mark.parametrize("solve", SOLVES)
def test_root_has_the_closed_form_derivative(solve, data):
    solver = custom_root(ridge, argnums=1, solve=SOLVES[solve])(ridge_solver)
    lam = data[0].requires_grad_()
    w = solver(torch.zeros(3), lam, *data[1:])
    torch.testing.assert_close(w, ridge_solver(None, *data))
    weights = torch.tensor([1.0, -2.0, 0.5])
    (found,) = torch.autograd.grad(weights @ w, lam)
    torch.testing.assert_close(found, weights @ ridge_derivative(*data))


@pytest.mark.parametrize(
    "make",
    [torchopt.linear_solve.solve_cg, torchopt.linear_solve.solve_normal_cg],
)
@pytest.mark.filterwarnings("ignore:.*functorch:FutureWarning")
def test_root_equals_torchopt(make, data):
    found = []
    for decorator in (custom_root, torchopt.diff.implicit.custom_root):
        lam, X, t = (value.clone().requires_grad_() for value in data)
        solver = decorator(ridge, argnums=(1, 2), solve=make(rtol=1e-14))(ridge_solver)
        w = solver(torch.zeros(3), lam, X, t=t)
        grads = torch.autograd.grad((w**2).sum(), [lam, X, t], allow_unused=True)
        assert grads[2] is None  # not in argnums
        found.append([w.detach(), *grads[:2]])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*functorch:FutureWarning")
def test_root_of_a_later_argument(data):
    """TorchOpt raises IndexError where argnums leaves out an argument before one it has."""
    lam, X, t = data
    expected = torch.func.jacrev(lambda t: ridge_solver(None, lam, X, t))(t)
    t.requires_grad_()
    solver = custom_root(ridge, argnums=3)(ridge_solver)
    w = solver(torch.zeros(3), lam, X, t)
    torch.testing.assert_close(torch.autograd.grad(w.sum(), t)[0], expected.sum(0))
    w = torchopt.diff.implicit.custom_root(ridge, argnums=3)(ridge_solver)(
        torch.zeros(3), lam, X, t
    )
    with pytest.raises(IndexError):
        torch.autograd.grad(w.sum(), t)


@pytest.mark.filterwarnings("ignore:.*functorch:FutureWarning")
def test_root_of_a_scalar():
    """TorchOpt's derivative is −0.0: its CG takes no step for 0-d tensors."""
    found = {}
    for decorator in (custom_root, torchopt.diff.implicit.custom_root):
        theta = torch.tensor(4.0, requires_grad=True)
        solver = decorator(lambda y, theta: y**2 - theta, argnums=1)(
            lambda y, theta: theta.sqrt()
        )
        (found[decorator],) = torch.autograd.grad(
            solver(torch.tensor(1.0), theta), theta
        )
    assert found[custom_root] == pytest.approx(0.25, rel=1e-7)
    assert found[torchopt.diff.implicit.custom_root] == 0


def test_root_of_trees():
    """y = {"a": θ₀², "b": (θ₁³,)} with arguments that are dicts."""

    def residual(y, theta, scale):
        return {
            "a": scale * (y["a"] - theta["p"] ** 2),
            "b": (y["b"][0] - theta["q"] ** 3,),
        }

    @custom_root(residual, argnums=1)
    def solver(y, theta, scale=2.0):
        return {"a": theta["p"] ** 2, "b": (theta["q"] ** 3,)}

    start = {"a": torch.zeros(2), "b": (torch.zeros(()),)}
    theta = {"p": torch.tensor([1.0, 2.0]), "q": torch.tensor(3.0)}
    grads = torch.func.grad(
        lambda theta: solver(start, theta)["a"].sum() + solver(start, theta)["b"][0]
    )(theta)
    torch.testing.assert_close(grads["p"], 2 * theta["p"])
    torch.testing.assert_close(grads["q"], 3 * theta["q"] ** 2)


def test_root_under_transforms(data):
    """TorchOpt's raises under every one of these."""
    lam, X, t = data
    solver = custom_root(ridge, argnums=1, solve="direct")(ridge_solver)

    def w(lam):
        return solver(torch.zeros(3), lam, X, t)

    exact = ridge_derivative(lam, X, t)
    torch.testing.assert_close(torch.func.jacrev(w)(lam), exact)
    torch.testing.assert_close(torch.func.jacfwd(w)(lam), exact)
    torch.testing.assert_close(
        torch.func.grad(lambda lam: w(lam).sum())(lam), exact.sum()
    )
    lams = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(
        torch.func.vmap(torch.func.jacrev(w))(lams),
        torch.stack([ridge_derivative(one, X, t) for one in lams]),
    )
    second = torch.func.jacrev(torch.func.jacrev(w))(lam)
    A = X.T @ X + lam * torch.eye(3)
    torch.testing.assert_close(second, -2 * torch.linalg.solve(A, exact))
    theirs = torchopt.diff.implicit.custom_root(ridge, argnums=1)(ridge_solver)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda lam: theirs(torch.zeros(3), lam, X, t).sum())(lam)


def test_root_has_no_derivative_in_other_arguments(data):
    lam, X, t = data
    solver = custom_root(ridge, argnums=1)(ridge_solver)

    def w(X):
        return solver(torch.zeros(3), lam, X, t)

    assert not torch.func.jacrev(w)(X).any()
    assert not torch.func.jvp(w, (X,), (X,))[1].any()


def iterative(w, lam, X, t, num_steps=500):
    for _ in range(num_steps):
        w = w - 0.02 * ridge(w, lam, X, t)
    return w, {"loss": ((X @ w - t) ** 2).sum(), "steps": num_steps}


def with_steps(w, lam, X, t, num_steps):
    return ridge(w, lam, X, t)


@pytest.mark.parametrize("transform", ["none", "grad", "vmap"])
def test_root_with_aux(transform, data):
    lam, X, t = data
    solver = custom_root(with_steps, argnums=1, has_aux=True)(iterative)

    def f(lam):
        w, aux = solver(torch.zeros(3), lam, X, t, num_steps=800)
        assert aux["steps"] == 800
        return w.sum(), aux["loss"]

    if transform == "none":
        lam = lam.requires_grad_()
        total, loss = f(lam)
        (found,) = torch.autograd.grad(total, lam)
        assert not loss.requires_grad
    elif transform == "grad":
        found, loss = torch.func.grad(f, has_aux=True)(lam)
    else:
        found, loss = torch.func.vmap(torch.func.grad(f, has_aux=True))(lam[None])
        found, loss = found[0], loss[0]
    torch.testing.assert_close(found, ridge_derivative(lam, X, t).sum())
    w = ridge_solver(None, *data)
    torch.testing.assert_close(loss, ((X @ w - t) ** 2).sum())


NO_ROOT = {
    "start": ({"argnums": 0}, ValueError, "counted from the start"),
    "none": ({"argnums": ()}, ValueError, "counted from the start"),
    "number": ({"argnums": 1, "solve": 3}, TypeError, "solve=3"),
    "tree": (
        {"argnums": 1, "solve": torchopt.linear_solve.solve_cg(init=(torch.ones(3),))},
        ValueError,
        "init=",
    ),
}


@pytest.mark.parametrize("name", NO_ROOT)
def test_root_refuses(name):
    options, error, message = NO_ROOT[name]
    with pytest.raises(error, match=message):
        custom_root(ridge, **options)


def test_custom_root_says_what_is_wrong_with_its_arguments():
    root = custom_root(lambda y, x: y - x, argnums=3)(lambda y, x: x)
    with pytest.raises(ValueError, match="1 arguments after params"):
        root(torch.ones(1), torch.ones(1))
    with pytest.raises(TypeError, match=r"call it, solve=solve_cg\(\)"):
        custom_root(lambda y, x: y, argnums=1, solve=torchopt.linear_solve.solve_cg)
