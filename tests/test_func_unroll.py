"""Unrolling as a pure function: closed forms, other memory with the same derivatives, errors."""

import pytest
import torch
import torchopt
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import torch_bilevel as tb
from torch_bilevel.func.rules import rule
from torch_bilevel.func.unrolling import unroll

SGD, ADAM = torch.optim.SGD, torch.optim.Adam


def close(found, expected, rtol=1e-12, atol=1e-13):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def leaves_of(tree):
    return tree_map(lambda t: t.clone().requires_grad_(), tree)


# --- closed forms ----------------------------------------------------------------------


def quadratic(n=4, m=3):
    S = torch.randn(n, n)
    return S @ S.T / n + torch.eye(n), torch.randn(m, n), torch.randn(n)


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpoint_every": 3}, {"checkpoint_every": "auto"}, {"mode": "forward"}],
    ids=str,
)
@pytest.mark.parametrize("T", [1, 7])
def test_iterative_differentiation_of_a_quadratic(T, options):
    """∇̂ = ∇_x f − C (I − M^T) A⁻¹ ∇_y f at y_T = y* + M^T (y_0 − y*)."""
    (Q, C, a), alpha = quadratic(), 0.1
    y0, x = torch.randn(4), torch.randn(3)
    train = unroll(rule(SGD, lr=alpha), T, **options)(
        lambda y, x: y @ Q @ y / 2 + x @ C @ y + a @ y
    )
    star, M = -torch.linalg.solve(Q, C.T @ x + a), torch.eye(4) - alpha * Q
    power = torch.linalg.matrix_power(M, T)
    y = star + power @ (y0 - star)
    close(train(y0, x), y)
    found = grad(lambda x: (train(y0, x) ** 2).sum() / 2 + (x**3).sum())(x)
    adjoint = torch.linalg.solve(Q, (torch.eye(4) - power) @ y)
    close(found, 3 * x**2 - C @ adjoint)


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}], ids=str)
def test_maml(options):
    """(I − αA)^N ∇ℓ(w_N), w_N = A⁻¹b + (I − αA)^N (w − A⁻¹b), task by task and in lanes."""
    alpha, N, w = 0.1, 5, torch.randn(4)
    tasks = [quadratic() for _ in range(3)]
    Q, b = torch.stack([t[0] for t in tasks]), torch.stack([t[2] for t in tasks])
    train = unroll("sgd(lr=0.1)", N, **options)(
        lambda y, outer, Q, b: y @ Q @ y / 2 - b @ y
    )

    def task_loss(w, Q, b):
        return train(w, None, Q, b).cosh().sum()

    found = vmap(grad(task_loss), in_dims=(None, 0, 0))(w, Q, b)
    for i in range(3):
        star = torch.linalg.solve(Q[i], b[i])
        M = torch.linalg.matrix_power(torch.eye(4) - alpha * Q[i], N)
        close(found[i], M @ (star + M @ (w - star)).sinh())


# --- other memory, same derivatives ----------------------------------------------------

C = torch.linspace(-2, 2, 9).cos().reshape(3, 3).double()


def loss(y, x):
    fit = ((C @ y["a"] - x["x"]) ** 2).sum() / 2
    decay = (y["a"] ** 2 * x["s"].exp()).sum() + y["b"] ** 2 * x["x"].sum() ** 2
    return fit + decay + (y["a"].sin() * y["b"]).sum() + (y["b"] * y["a"]).sum() ** 2


def variables():
    y = {"a": torch.randn(3), "b": torch.randn(())}
    x = {"x": 0.3 * torch.randn(3), "s": torch.randn(()), "unused": torch.randn(2)}
    return y, x


def of_outer(given, num_steps=7, **options):
    train = unroll(given, num_steps, **options)(loss)

    def outcome(x, y):
        y = train(y, x)
        return (y["a"] ** 3).sum() + y["b"] ** 2 * x["x"][0]

    return outcome


def by_backward(f, x, y):
    x = leaves_of(x)
    return torch.autograd.grad(f(x, y), tree_leaves(x), materialize_grads=True)


def by_backward_twice(f, x, y):
    x = leaves_of(x)
    options = {"materialize_grads": True}
    slopes = torch.autograd.grad(f(x, y), tree_leaves(x), create_graph=True, **options)
    return torch.autograd.grad(
        sum(s.sin().sum() for s in slopes), tree_leaves(x), **options
    )


def backward_through_grad(f, x, y):
    x = leaves_of(x)
    slopes = tree_leaves(grad(f)(x, y))
    return torch.autograd.grad(
        sum(s.sin().sum() for s in slopes), tree_leaves(x), materialize_grads=True
    )


def lanes(x, count=3):
    return tree_map(lambda t: t + 0.1 * torch.sin(torch.randn(count, *t.shape)), x)


def tangent(x):
    return tree_map(lambda t: torch.full_like(t, 0.3).cumsum(-1), x)


ONCE = {
    "value": lambda f, x, y: f(x, y),
    "grad": lambda f, x, y: grad(f)(x, y),
    "backward": by_backward,
    "jvp": lambda f, x, y: jvp(lambda x: f(x, y), (x,), (tangent(x),)),
    "jacrev": lambda f, x, y: jacrev(f)(x, y),
    "jacfwd": lambda f, x, y: jacfwd(f)(x, y),
    "vmap": lambda f, x, y: vmap(f, (0, None))(x, y),
    "vmap grad": lambda f, x, y: vmap(grad(f), (0, None))(x, y),
    "grad vmap": lambda f, x, y: grad(lambda x: vmap(f, (0, None))(x, y).sum())(x),
    "jvp vmap": lambda f, x, y: jvp(
        lambda x: vmap(f, (0, None))(x, y), (x,), (tangent(x),)
    ),
    "vmap jvp": lambda f, x, y: vmap(
        lambda x, t: jvp(lambda x: f(x, y), (x,), (t,))[1]
    )(x, tangent(x)),
}
TWICE = {
    "backward twice": by_backward_twice,
    "backward of grad": backward_through_grad,
    "jvp of grad": lambda f, x, y: jvp(lambda x: grad(f)(x, y), (x,), (tangent(x),)),
    "hessian": lambda f, x, y: hessian(f)(x, y),
    "jacrev jacrev": lambda f, x, y: jacrev(jacrev(f))(x, y),
    "jacrev jacfwd": lambda f, x, y: jacrev(jacfwd(f))(x, y),
    "vmap hessian": lambda f, x, y: vmap(hessian(f), (0, None))(x, y),
}
ADAM_RULE = rule(ADAM, lr=0.05)
IN_LANES = {kind for kind in [*ONCE, *TWICE] if "vmap" in kind} | {"jacfwd", "hessian"}
IN_LANES |= {"jacrev jacfwd"}
GIVEN = {"adam": ADAM_RULE, "torchopt": torchopt.adam(0.05)}


@pytest.mark.parametrize("kind", [*ONCE, *TWICE])
@pytest.mark.parametrize("name", GIVEN)
def test_checkpoints_change_nothing(name, kind):
    if name == "torchopt" and kind in IN_LANES:
        pytest.skip("TorchOpt's Adam writes in place into what is not batched yet")
    y, x = variables()
    x = lanes(x) if "vmap" in kind else x
    of = {**ONCE, **TWICE}[kind]
    expected = of(of_outer(GIVEN[name]), x, y)
    for every in (1, 3, "auto", 100):
        close(of(of_outer(GIVEN[name], checkpoint_every=every), x, y), expected)
    windowed = of(of_outer(GIVEN[name], window=4), x, y)
    both = of_outer(GIVEN[name], window=4, checkpoint_every=3)
    close(of(both, x, y), windowed)


@pytest.mark.parametrize("kind", ONCE)
@pytest.mark.parametrize("window", [None, 4])
def test_forward_mode_is_reverse_mode(kind, window):
    y, x = variables()
    x = lanes(x) if "vmap" in kind else x
    expected = ONCE[kind](of_outer(ADAM_RULE, window=window), x, y)
    close(
        ONCE[kind](of_outer(ADAM_RULE, window=window, mode="forward"), x, y), expected
    )


@pytest.mark.parametrize("kind", TWICE)
def test_forward_mode_refuses_a_second_derivative(kind):
    y, x = variables()
    x = lanes(x) if "vmap" in kind else x
    with pytest.raises(tb.NoSecondDerivative, match="twice.*mode='reverse'"):
        TWICE[kind](of_outer(ADAM_RULE, mode="forward"), x, y)


def test_forward_over_forward_is_right_or_refused():
    y, x = variables()
    f = of_outer(ADAM_RULE)
    close(jacfwd(jacfwd(f))(x, y), hessian(f)(x, y))
    for options in ({"checkpoint_every": 3}, {"mode": "forward"}):
        kinds = (tb.errors.ForwardOverForward, tb.NoSecondDerivative)
        with pytest.raises(kinds, match="nested forward modes|twice"):
            jacfwd(jacfwd(of_outer(ADAM_RULE, **options)))(x, y)


def test_dual_numbers_of_autograd():
    """A learned rate that is a dual number is not read as a plain number."""
    train = unroll(lambda lr, step: rule(SGD, lr=lr), 3)(lambda y, lr: (y**2).sum())
    lr, y = torch.tensor(0.1), torch.ones(2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(lr, torch.ones(()))
        found = torch.autograd.forward_ad.unpack_dual(train(y, dual)).tangent
    close(found, jacrev(train, argnums=1)(y, lr))


def test_checkpoints_draw_the_same_random_numbers():
    dropout = torch.nn.functional.dropout

    def noisy(y, x):
        return ((dropout(C, 0.5) @ y - x * torch.randn(3)) ** 2).sum()

    def slope(**options):
        torch.manual_seed(3)
        x = torch.ones(3, requires_grad=True)
        y = unroll("adam(lr=0.1)", 7, **options)(noisy)(torch.ones(3), x)
        (g,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
        after = torch.rand(())
        return y, g, *torch.autograd.grad(g.sin().sum(), x), after

    close(slope(checkpoint_every=3), slope())


# --- windows, batches, other rules -------------------------------------------------------


def test_a_window_is_the_written_out_truncation():
    y0, x = torch.randn(3), torch.randn(3, requires_grad=True)

    def g(y, x):
        return ((C @ y - x) ** 2).sum() / 2 + (y**4).sum() / 4

    def step(y, b, x):
        b = 0.9 * b + C.T @ (C @ y - x) + y**3
        return y - 0.05 * b, b

    y, b = y0, torch.zeros(3)
    for k in range(6):
        if k == 4:
            start = y = y.requires_grad_()
        y, b = step(y, b, x.detach() if k < 4 else x)
    expected = torch.autograd.grad((y**3).sum(), (start, x))
    train = unroll(rule(SGD, lr=0.05, momentum=0.9), 6, window=2)(g)
    close(train(y0, x), y)
    found = grad(lambda y, x: (train(y, x) ** 3).sum(), argnums=(0, 1))(y0, x.detach())
    close(found, expected)
    whole = unroll(rule(SGD, lr=0.05, momentum=0.9), 6)(g)
    longer = unroll(rule(SGD, lr=0.05, momentum=0.9), 6, window=50)(g)
    close(jacrev(longer)(y0, x.detach()), jacrev(whole)(y0, x.detach()))


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpoint_every": 2}, {"mode": "forward"}, {"window": 3}],
    ids=str,
)
def test_one_batch_for_each_step(options):
    batches, y0, x = torch.randn(5, 4, 3), torch.randn(3), torch.tensor(0.3)

    def g(y, x, batch):
        return ((batch["X"] @ y - batch["scale"]) ** 2).mean() + x.exp() * (y**2).sum()

    data = {"X": batches, "scale": 0.5}
    train = unroll("sgd(lr=0.1)", 5, per_step=True, **options)(g)
    y = y0
    for k in range(5):
        at = x.detach() if k < 5 - options.get("window", 5) else x
        y = y - 0.1 * grad(g)(y, at, {**data, "X": batches[k]})
    close(train(y0, x, data), y)

    def outcome(x, X):
        return (train(y0, x, {**data, "X": X}) ** 2).sum()

    def expected(x, X):
        y = y0
        for k in range(5):
            first = k < 5 - options.get("window", 5)
            at, batch = (x.detach(), X[k].detach()) if first else (x, X[k])
            y = y - 0.1 * grad(g)(y, at, {**data, "X": batch})
        return (y**2).sum()

    close(grad(outcome)(x, batches), grad(expected)(x, batches))
    if "mode" not in options:
        close(grad(outcome, 1)(x, batches), grad(expected, 1)(x, batches))
    with pytest.raises(tb.BilevelError, match=r"\(4, 3\).*must have length 5"):
        train(y0, x, {**data, "X": batches[0]})


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "ours, theirs",
    [
        (torchopt.adam(1e-2), rule(ADAM, lr=1e-2)),
        (torchopt.sgd(1e-2, momentum=0.9), "sgd(lr=0.01, momentum=0.9)"),
        (torchopt.rmsprop(1e-2), "rmsprop(lr=0.01)"),
        (torchopt.chain(torchopt.transform.scale(0.5), torchopt.sgd(0.2)), "sgd(lr=0.1)"),
    ],
    ids=["adam", "sgd", "rmsprop", "chain"],
)  # fmt: skip
def test_gradient_transformations_are_rules(ours, theirs):
    y, x = variables()
    f, expected = of_outer(ours, 5), of_outer(theirs, 5)
    for kind in ["value", "grad", "backward", "vmap grad"]:
        at = lanes(x) if "vmap" in kind else x
        torch.manual_seed(2)
        found = ONCE[kind](f, at, y)
        close(found, ONCE[kind](expected, at, y), 1e-6, 1e-8)


# --- torch.compile -----------------------------------------------------------------------

COMPILED = {
    "sgd": "sgd(lr=0.1, momentum=0.9)",
    "adam": "adam(lr=0.05)",
    "learned": lambda outer, step: rule(ADAM, lr=outer["s"]),
}


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_and_differentiated_outside(name):
    (y, x), f = variables(), of_outer(COMPILED[name], 2)
    x["s"] = torch.tensor(0.02)
    program = compiled(f)
    for _ in range(2):
        close(by_backward(program, x, y), by_backward(f, x, y))
        x = tree_map(lambda t: t * 0.9, x)


@pytest.mark.parametrize(
    "name, kind", [("learned", "vmap grad"), ("sgd", "jacrev jacrev")]
)
def test_compiled_with_its_derivatives(name, kind):
    (y, x), f = variables(), of_outer(COMPILED[name], 2)
    x["s"] = torch.tensor(0.02)
    x = lanes(x) if "vmap" in kind else x
    of = {**ONCE, **TWICE}[kind]
    close(compiled(lambda x, y: of(f, x, y))(x, y), of(f, x, y))
