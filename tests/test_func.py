"""`tb.func.hypergradient`: one table of transforms × estimators, against dense linear algebra."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

import torch_bilevel as tb
from torch_bilevel import _blocks, ops
from torch_bilevel.solvers import REGISTRY as SOLVERS

TASKS = 3
# exact within rounding on the problem below, but for the last three
ESTIMATORS = {
    "cg": "cg(max_steps=40, rtol=1e-14)",
    "minres": "minres(max_steps=40, rtol=1e-14)",
    "direct": "direct",
    "gmres": "gmres(max_steps=12, rtol=1e-14)",
    "cgnr": "cgnr(max_steps=60, rtol=1e-14)",
    "richardson": "richardson(max_steps=250, rtol=1e-14)",
    "heavy_ball": "heavy_ball(max_steps=120, rtol=1e-14)",
    "nesterov": "nesterov(max_steps=150, rtol=1e-14)",
    "neumann": "neumann(num_steps=200)",
    "stochastic_neumann": "stochastic_neumann(num_steps=200)",
    "stochastic_richardson": "stochastic_richardson(num_steps=200)",
    "damped": "cg(max_steps=40, rtol=1e-14, damping=0.3)",
    "identity": "identity(scale=0.7)",
    "darts": "darts(step_size=0.7, radius=1e-3)",
}
APPROXIMATE = {"identity", "darts"}
# what a compiled solver unrolls is kept short: a second a step
COMPILED = {
    **ESTIMATORS,
    "gmres": "gmres(max_steps=3)",
    "heavy_ball": "heavy_ball(max_steps=20, lower=0.1, upper=3.0)",
    "nesterov": "nesterov(max_steps=20, lower=0.1, upper=3.0)",
    "stochastic_neumann": "stochastic_neumann(num_steps=3, step_size=0.3)",
    "stochastic_richardson": "stochastic_richardson(num_steps=3, step_size=0.3)",
}


def g(y, x, batch):
    """A multinomial head with learned penalties and a learned scale of the inputs."""
    inputs, labels = batch
    logits = (inputs * x["scale"]) @ y["weight"] + y["bias"]
    penalty = sum((p**2).sum() for p in y.values())
    return F.cross_entropy(logits, labels) + x["penalty"].exp().sum() / 2 * penalty


def f(y, x, batch):
    inputs, labels = batch
    return (
        F.cross_entropy(inputs @ y["weight"] + y["bias"], labels)
        + 0.1 * (x["penalty"] ** 2).sum()
    )


def batch():
    return torch.randn(TASKS, 12, 3), torch.randint(2, (TASKS, 12))


class Tasks:
    """Points and batches with a leading axis of tasks; x is shared."""

    def __init__(self):
        torch.manual_seed(0)
        self.y = {"weight": torch.randn(TASKS, 3, 2), "bias": torch.randn(TASKS, 2)}
        self.x = {"scale": 1 + 0.1 * torch.randn(3), "penalty": torch.tensor(-1.0)}
        self.data = batch(), batch()

    def task(self, i):
        return pytree.tree_map(lambda t: t[i], (self.y, *self.data))


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def dense(y, x, inner, outer, damping=0.0):
    """∂_x f − J (H + δ)⁻¹ ∂_y f from whole matrices."""
    names, shapes = list(y), [v.shape for v in y.values()]
    sizes = [v.numel() for v in y.values()]

    def tree(v):
        parts = torch.split(v, sizes)
        return {k: p.reshape(s) for k, p, s in zip(names, parts, shapes, strict=True)}

    at = torch.cat([v.reshape(-1) for v in y.values()])

    def g_y(v, x):
        return grad(lambda v: g(tree(v), x, inner))(v)

    f_y, f_x = grad(lambda v, x: f(tree(v), x, outer), argnums=(0, 1))(at, x)
    H = jacrev(g_y)(at, x) + damping * torch.eye(len(at))
    J = jacrev(g_y, argnums=1)(at, x)
    v = torch.linalg.solve(H, f_y)
    return {k: f_x[k] - torch.tensordot(v, J[k], 1) for k in x}


def reference(name):
    """What the estimator's gradient is, by an independent computation."""
    if name == "damped":
        return partial(dense, damping=0.3)
    if name not in APPROXIMATE:
        return dense

    def one_step(y, x, inner, outer):  # ∂_x f − J v with v = 0.7 ∂_y f
        f_y, f_x = grad(f, argnums=(0, 1))(y, x, outer)
        g_x = grad(g, argnums=1)
        _, dot = jvp(lambda y: g_x(y, x, inner), (y,), (f_y,))
        return pytree.tree_map(lambda a, b: a - 0.7 * b, f_x, dot)

    return one_step


def transforms(h, tasks):
    """Name → the result of a transform of h(y, x, inner, outer), a tree."""
    one, x = tasks.task(1), tasks.x
    tangent = pytree.tree_map(torch.ones_like, x)

    def number(y, x, *data):
        return (flat(h(y, x, *data)) ** 2).sum()

    def lanes(function):
        return vmap(lambda y, *data: function(y, x, *data))(tasks.y, *tasks.data)

    y, *data = one
    return {
        "plain": lambda: h(y, x, *data),
        "vmap": lambda: lanes(h),
        "grad": lambda: grad(number, argnums=1)(y, x, *data),
        "grad of y": lambda: grad(number)(y, x, *data),
        "jvp": lambda: jvp(lambda x: h(y, x, *data), (x,), (tangent,))[1],
        "vmap∘grad": lambda: lanes(grad(number, argnums=1)),
        "jacrev": lambda: jacrev(h, argnums=1)(y, x, *data),
        "jacfwd": lambda: jacfwd(h, argnums=1)(y, x, *data),
        "grad∘vmap": lambda: grad(
            lambda x: sum(
                (leaf**2).sum()
                for leaf in pytree.tree_leaves(
                    vmap(lambda y, *data: h(y, x, *data))(tasks.y, *tasks.data)
                )
            )
        )(x),
    }


def loop(h, tasks):
    """The same by a Python loop over tasks of a function that needs no transform of ours."""
    found = transforms(h, tasks)
    x = tasks.x

    def each(function):
        rows = [function(y, x, *data) for y, *data in map(tasks.task, range(TASKS))]
        return pytree.tree_map(lambda *leaves: torch.stack(leaves), *rows)

    def number(y, x, *data):
        return (flat(h(y, x, *data)) ** 2).sum()

    found["vmap"] = lambda: each(h)
    found["vmap∘grad"] = lambda: each(grad(number, argnums=1))
    found["grad∘vmap"] = lambda: pytree.tree_map(
        lambda leaf: leaf.sum(0), each(grad(number, argnums=1))
    )
    return found


def close(found, expected, tolerance=1e-10):
    a, b = flat(found), flat(expected)
    assert a.shape == b.shape and torch.isfinite(b).all()
    assert (a - b).abs().max() <= tolerance * (1 + b.abs().max())


NAMES = list(transforms(None, Tasks()))


@pytest.mark.parametrize("transform", NAMES)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_transform_of_every_estimator(name, transform):
    tasks = Tasks()
    made = tb.func.hypergradient(g, f, ESTIMATORS[name])

    def h(*arguments):
        return made(*arguments)[0]

    # DARTS is a difference of radius 1e-3: its error is of order 1e-6
    tolerance = 1e-5 if name == "darts" else 1e-10
    found = transforms(h, tasks)[transform]()
    close(found, loop(reference(name), tasks)[transform](), tolerance)
    if transform in ("vmap", "vmap∘grad"):  # and itself, lane by lane
        close(found, loop(h, tasks)[transform]())


def test_the_table_has_every_solver_that_is_pure():
    pure = {name for name, cls in SOLVERS.items() if cls.pure}
    assert pure == set(ESTIMATORS) - {"damped", "darts"}
    for name in set(tb.estimators()) - set(SOLVERS) - {"darts"}:
        made = tb.estimator(name)
        solves = getattr(made, "solver", None)
        if solves is not None and solves.pure and not made.directs:
            tb.func.hypergradient(g, f, name)  # a published name for one of the table
        else:
            with pytest.raises(tb.NeedsLoop, match="tb.BilevelOptimizer"):
                tb.func.hypergradient(g, f, name)
    for name in set(SOLVERS) - pure:
        with pytest.raises(tb.NeedsLoop, match="more than a linear system"):
            tb.func.hypergradient(g, f, name)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_without_a_break_and_without_recompiling(name):
    tasks = Tasks() if name == "cg" else without_numbers()
    h = tb.func.hypergradient(g, f, COMPILED[name])
    torch._dynamo.reset()
    compiled = torch.compile(h, fullgraph=True, backend="aot_eager")
    found, report = compiled(*order(tasks, 0))
    expected, told = h(*order(tasks, 0))
    close(found, expected)
    assert torch.equal(report.solver_steps, told.solver_steps)
    close(report.adjoint, told.adjoint)
    with torch.compiler.set_stance("fail_on_recompile"):
        close(compiled(*order(tasks, 2))[0], h(*order(tasks, 2))[0])


def without_numbers():
    """Dynamo traces everything twice where an argument is a 0-d tensor of the CPU."""
    tasks = Tasks()
    tasks.x = {**tasks.x, "penalty": tasks.x["penalty"][None]}
    return tasks


def order(tasks, i):
    y, *data = tasks.task(i)
    return y, tasks.x, *data


def test_compiled_over_vmap():
    tasks = without_numbers()
    h = tb.func.hypergradient(g, f, "cg(max_steps=4)")

    def lanes(y, inner, outer):
        return vmap(lambda y, a, b: h(y, tasks.x, a, b)[0])(y, inner, outer)

    torch._dynamo.reset()
    compiled = torch.compile(lanes, fullgraph=True, backend="aot_eager")
    close(compiled(tasks.y, *tasks.data), lanes(tasks.y, *tasks.data))


def test_a_derivative_inside_compile_is_refused():
    tasks = without_numbers()
    h = tb.func.hypergradient(g, f, "cg(max_steps=4)")

    def number(x):
        y, *data = tasks.task(0)
        return flat(h(y, x, *data)[0]).sum()

    torch._dynamo.reset()
    compiled = torch.compile(grad(number), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="differentiated inside torch.compile"):
        compiled(tasks.x)

    def lanes(x):
        rows = vmap(lambda y, *data: h(y, x, *data)[0])(tasks.y, *tasks.data)
        return flat(rows).sum()

    torch._dynamo.reset()
    compiled = torch.compile(grad(lanes), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="differentiated inside torch.compile"):
        compiled(tasks.x)
    leaves = {k: v.clone().requires_grad_() for k, v in tasks.x.items()}
    y, *data = tasks.task(0)
    torch._dynamo.reset()
    found, _ = torch.compile(h, fullgraph=True, backend="aot_eager")(y, leaves, *data)
    assert not found["penalty"].requires_grad  # it says so; never a wrong derivative


def test_forward_over_forward_is_refused():
    tasks = Tasks()
    h = tb.func.hypergradient(g, f, "cg")
    y, *data = tasks.task(0)

    def number(t):
        x = {**tasks.x, "penalty": t}
        return flat(h(y, x, *data)[0]).sum()

    with pytest.raises(tb.errors.ForwardOverForward, match="forward over reverse"):
        jacfwd(jacfwd(number))(tasks.x["penalty"])


def test_every_lane_stops_on_its_own():
    tasks = Tasks()
    h = tb.func.hypergradient(g, f, "cg(max_steps=30, rtol=1e-3)")
    tasks.y["weight"][0] *= 20  # saturated: another spectrum
    rows = [h(*order(tasks, i))[1] for i in range(TASKS)]
    report = vmap(lambda y, a, b: h(y, tasks.x, a, b)[1])(tasks.y, *tasks.data)
    steps = torch.stack([row.solver_steps for row in rows])
    assert torch.equal(report.solver_steps, steps) and len(set(steps.tolist())) > 1
    assert report.converged.all()
    close(report.residual, torch.stack([row.residual for row in rows]))
    close(
        report.adjoint,
        pytree.tree_map(lambda *v: torch.stack(v), *[r.adjoint for r in rows]),
    )


@pytest.mark.parametrize("name", ["cg", "minres", "gmres", "richardson", "nesterov"])
def test_a_warm_start(name):
    tasks = Tasks()
    exact = tb.func.hypergradient(g, f, ESTIMATORS[name])
    gradient, report = exact(*order(tasks, 0))
    again, told = tb.func.hypergradient(g, f, name)(
        *order(tasks, 0), adjoint=report.adjoint
    )
    close(again, gradient)
    assert told.solver_steps == 0 and told.converged
    cold, told = tb.func.hypergradient(g, f, f"{name}(warm_start=False)")(
        *order(tasks, 0), adjoint=report.adjoint
    )
    assert told.solver_steps > 0
    lanes = vmap(
        lambda y, a, b, v: tb.func.hypergradient(g, f, name)(
            y, tasks.x, a, b, adjoint=v
        )
    )
    starts = pytree.tree_map(lambda leaf: leaf.expand(TASKS, *leaf.shape), report)
    _, told = lanes(tasks.y, *tasks.data, starts.adjoint)
    assert told.solver_steps[0] == 0 and (told.solver_steps[1:] > 0).all()


def test_a_module_and_its_parameters():
    """Parameters that require grad, by name, through functional_call."""
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    )
    x = torch.zeros(10, requires_grad=True)
    inputs, labels = torch.randn(10, 3), torch.randint(2, (10,))

    def inner(y, x, _):
        losses = F.cross_entropy(
            functional_call(model, y, inputs), labels, reduction="none"
        )
        return (x.sigmoid() * losses).mean() + sum((p**2).sum() for p in y.values())

    def outer(y, x, _):
        return F.cross_entropy(functional_call(model, y, inputs), 1 - labels)

    h = tb.func.hypergradient(inner, outer, "cg(max_steps=60, rtol=1e-13)")
    gradient, report = h(dict(model.named_parameters()), x, None, None)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        torch.optim.SGD([x], lr=0.1),
        modules=model,
        estimator="cg(max_steps=60, rtol=1e-13)",
    )
    train = optimizer.inner_loss(lambda: inner(dict(model.named_parameters()), x, None))
    valid = optimizer.outer_loss(lambda: outer(dict(model.named_parameters()), x, None))
    train().backward()
    optimizer.step()
    (expected,) = optimizer.hypergradient()
    assert valid is not None
    close(gradient, expected)
    assert not report.loss.requires_grad
    gradient.sum().backward()  # autograd goes on
    assert torch.isfinite(x.grad).all()


def test_pytrees_numbers_and_dtypes():
    def inner(y, x, batch):
        (a, b), c = y
        return ((a - x[0]) ** 2).sum() + ((b - x[1]) ** 2).sum() + (c - x[2]) ** 2

    def outer(y, x, batch):
        (a, b), c = y
        return a.sum() + 2 * b.sum() + 3 * c

    y = ((torch.zeros(2), torch.zeros(2, 2)), torch.tensor(0.0))
    x = [torch.zeros(2), torch.zeros(2, 2), torch.tensor(0.0)]
    gradient, report = tb.func.hypergradient(inner, outer)(y, x)
    assert isinstance(gradient, list) and isinstance(report.adjoint, tuple)
    close(gradient, [torch.ones(2), 2 * torch.ones(2, 2), torch.tensor(3.0)])
    half = pytree.tree_map(lambda t: t.bfloat16(), (y, x))
    gradient, report = tb.func.hypergradient(inner, outer)(*half)
    assert gradient[0].dtype == report.adjoint[1].dtype == torch.bfloat16
    # an outer leaf in neither loss, a scalar problem, a converged start
    gradient, _ = tb.func.hypergradient(inner, outer)(y, [*x, torch.ones(3)])
    assert torch.equal(gradient[3], torch.zeros(3))
    one = tb.func.hypergradient(
        lambda y, x, b: (y - x) ** 2, lambda y, x, b: (y - 1) ** 2
    )
    assert one(torch.tensor(0.5), torch.tensor(0.5))[0] == -1
    zero, report = one(torch.tensor(1.0), torch.tensor(1.0))
    assert zero == 0 and report.residual == 0 and report.converged


def test_negative_curvature_and_divergence_are_told():
    h = tb.func.hypergradient(
        lambda y, x, b: (y[0] ** 2 - y[1] ** 2) / 2 + x * y.sum(),
        lambda y, x, b: y @ torch.tensor([1.0, 2.0]),
    )
    _, report = h(torch.zeros(2), torch.tensor(1.0))
    assert report.negative_curvature and not report.converged
    lanes = vmap(lambda y: h(y, torch.tensor(1.0))[1])(torch.zeros(3, 2))
    assert lanes.negative_curvature.all()
    h = tb.func.hypergradient(
        lambda y, x, b: (y**2).sum() * x,
        lambda y, x, b: y.sum(),
        "neumann(num_steps=50, step_size=5.0)",
    )
    assert h(torch.ones(2), torch.tensor(1.0))[1].diverged


def test_an_unnamed_closure_is_an_error():
    weights = torch.ones(2, requires_grad=True)
    h = tb.func.hypergradient(
        lambda y, x, b: (weights * (y - x) ** 2).sum(), lambda y, x, b: y.sum()
    )
    with pytest.raises(tb.UnnamedClosure, match="none of its arguments"):
        h(torch.zeros(2), torch.zeros(2))
    weights.requires_grad_(False)
    assert torch.equal(h(torch.zeros(2), torch.zeros(2))[0], torch.ones(2))


def test_a_batched_closure_is_an_error():
    """Lanes of a tensor that is no argument would be taken for another axis."""
    y, x = torch.ones(3), torch.ones(3)

    def of(d):
        return tb.func.hypergradient(
            lambda y, x, b: ((y - d * x) ** 2).sum(), lambda y, x, b: (y**2).sum()
        )

    for transform in (vmap, lambda f: grad(lambda d: vmap(f)(d).sum())):
        with pytest.raises(tb.UnnamedClosure, match="batches"):
            transform(lambda d: of(d)(y, x)[0].sum())(torch.ones(3))
    with pytest.raises(tb.UnnamedClosure):
        vmap(lambda d: vmap(lambda x: of(d)(y, x)[0])(torch.ones(3, 3)))(torch.ones(3))
    # what is looked for once in plain code is looked for in every transformed call
    held = [torch.tensor(1.0)]
    h = tb.func.hypergradient(
        lambda y, x, b: held[0] * (y - x) ** 2 + y**2, lambda y, x, b: y**2
    )
    h(torch.tensor(1.0), torch.tensor(1.0))

    def number(scale):
        held[0] = scale
        return h(torch.tensor(1.0), torch.tensor(1.0))[0]

    with pytest.raises(tb.UnnamedClosure):
        grad(number)(torch.tensor(1.0))


@pytest.mark.parametrize("name", ["cg", "gmres", "direct"])
def test_layer_norm_in_lanes(name):
    """PyTorch 2.13 batches its second derivative wrongly; the products notice."""
    inputs, targets = torch.randn(5, 3), torch.randn(5)

    def outputs(w):
        hidden = F.layer_norm(inputs @ w[:12].view(3, 4), (4,), w[12:16], w[16:])
        return hidden.pow(2).tanh().sum(1)

    def inner(w, x, batch):
        return (x.sigmoid() * (outputs(w) - targets) ** 2).mean() + 2 * (w**2).sum()

    h = tb.func.hypergradient(inner, lambda w, x, b: (outputs(w) ** 2).mean(), name)
    ws, xs = torch.randn(3, 20), torch.randn(3, 5)
    for dims in ((None, 0), (0, None), (0, 0)):
        rows = [
            h(ws[0 if dims[0] is None else i], xs[0 if dims[1] is None else i])[0]
            for i in range(3)
        ]
        ends = [ws[0] if dims[0] is None else ws, xs[0] if dims[1] is None else xs]
        found = vmap(lambda w, x: h(w, x)[0], in_dims=dims)(*ends)
        close(found, torch.stack(rows))


def test_random_numbers_are_the_same_in_a_call_and_not_in_the_next():
    drop, inputs = torch.nn.Dropout(0.5), torch.randn(6, 3)
    x, w = torch.zeros(3), torch.ones(3)

    def inner(w, x, batch):
        return (x.exp() * w**2).sum() + ((drop(inputs) @ w - 1) ** 2).mean()

    def outer(w, x, batch):
        return ((inputs @ w - 1) ** 2).mean()

    h = tb.func.hypergradient(inner, outer, "direct")
    found = []
    for _ in range(3):
        torch.manual_seed(7)
        found.append(h(w, x)[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])
    assert not torch.equal(h(w, x)[0], h(w, x)[0])
    fresh = tb.func.hypergradient(inner, outer, "direct")  # looks for closures first
    assert not torch.equal(fresh(w, x)[0], fresh(w, x)[0])
    torch.manual_seed(7)
    mask = drop(torch.ones(6, 3))  # that of the call: H and J see one mask
    fixed = tb.func.hypergradient(
        lambda w, x, b: (
            (x.exp() * w**2).sum() + (((mask * inputs) @ w - 1) ** 2).mean()
        ),
        outer,
        "direct",
    )
    close(found[0], fixed(w, x)[0])
    torch.manual_seed(7)  # and so do derivatives
    found = grad(lambda x: (h(w, x)[0] ** 2).sum())(x)
    close(found, grad(lambda x: (fixed(w, x)[0] ** 2).sum())(x))
    for randomness in ("same", "different"):
        torch.manual_seed(7)
        lanes = vmap(lambda x: h(w, x)[0], randomness=randomness)(torch.zeros(4, 3))
        assert (lanes[0] == lanes[1]).all() == (randomness == "same")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_what_is_not_finite_stays_so(name, value):
    """NaN is never turned into a number, nor called converged."""

    def outer(y, x, batch):
        return torch.stack([value * y[0], y[1]]).sum()

    h = tb.func.hypergradient(
        lambda y, x, b: (y**2).sum() / 2 - x @ y, outer, ESTIMATORS[name]
    )
    found, report = h(torch.ones(2), torch.ones(2))
    assert not torch.isfinite(found).all() and not report.converged
    found, report = vmap(lambda y: h(y, torch.ones(2)))(torch.ones(2, 2))
    assert not torch.isfinite(found).all(1).any() and not report.converged.any()


def test_inference_mode_is_refused():
    h = tb.func.hypergradient(lambda y, x, b: (y - x) ** 2, lambda y, x, b: y**2)
    with (
        torch.inference_mode(),
        pytest.raises(tb.UnsupportedTransform, match="no_grad"),
    ):
        h(torch.tensor(1.0), torch.tensor(1.0))
    with torch.no_grad():
        assert h(torch.tensor(1.0), torch.tensor(1.0))[0] == 2


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda h: h({"w": 1.0}, torch.ones(1)), "UnsupportedParameter", "a float"),
        (
            lambda h: h(torch.ones(2, dtype=torch.int64), torch.ones(1)),
            "UnsupportedParameter",
            "torch.int64",
        ),
        (lambda h: h({}, torch.ones(1)), "UnsupportedParameter", "no tensor"),
        (lambda h: h(torch.ones(2), torch.ones(1)), "InvalidLoss", "mean"),
        (
            lambda h: h(torch.ones(1), torch.ones(1), adjoint=torch.ones(3)),
            "UnsupportedParameter",
            "adjoint",
        ),
    ],
)
def test_errors(call, error, message):
    h = tb.func.hypergradient(lambda y, x, b: y * x, lambda y, x, b: y)
    with pytest.raises(getattr(tb, error), match=message):
        call(h)


def test_it_says_what_it_is():
    h = tb.func.hypergradient(g, f, "cg(max_steps=3)")
    assert repr(h) == "hypergradient(g, f, estimator='cg(max_steps=3)')"
    with pytest.raises(tb.UnknownName, match="Did you mean"):
        tb.func.hypergradient(g, f, "cgg")
    for name in ("darts", "mrbo", "cg(certify=True)"):
        with pytest.raises(tb.NeedsLoop, match="Take "):
            tb.func.hypergradient(g, f, name)


def test_weight_normalisation():
    """The second derivative of torch's fused operation is wrong; it is not used."""
    inputs, targets = torch.randn(6, 3), torch.randn(6, 2)

    def loss_of(weight):
        def inner(y, x, batch):
            out = torch.tanh(inputs @ weight(y["v"], y["g"]).mT)
            penalty = (y["v"] ** 2).sum() + ((y["g"] - 1) ** 2).sum()
            return (x.exp() * (out - targets) ** 2).mean() + penalty

        return inner

    def outer(y, x, batch):
        return (y["v"] ** 2).sum() + y["g"].sum()

    y, x = {"v": torch.randn(2, 3), "g": torch.rand(2, 1) + 1}, torch.zeros(2)
    fused = loss_of(lambda v, g: torch._weight_norm(v, g, 0))
    exact = loss_of(lambda v, g: v * (g / v.norm(dim=1, keepdim=True)))
    found, expected = (
        tb.func.hypergradient(loss, outer, "direct")(y, x)[0] for loss in (fused, exact)
    )
    close(found, expected)


@pytest.mark.parametrize("rows", [12, 600])
def test_compiled_with_fused_losses_of_any_size(rows, monkeypatch):
    """Dynamo took what an autograd function saves for constants: H v was 0."""
    monkeypatch.setattr(ops.formulas, "SMALL", 0)
    monkeypatch.setattr(_blocks, "BLOCK", 1)
    x, t, v = torch.randn(rows, 3), torch.randint(2, (rows,)), torch.randn(rows, 3)
    y, outer = torch.randn(2, 3), torch.randn(1)

    def inner_loss(y, outer, batch):
        penalty = outer.exp().sum() * (y * y).sum() / 2
        return ops.linear_cross_entropy(batch[0], y, None, batch[1]) + penalty

    def outer_loss(y, outer, batch):
        return ops.linear_cross_entropy(batch[0], y, None, batch[1])

    h = tb.func.hypergradient(inner_loss, outer_loss, "cg(max_steps=4)")
    expected, _ = h(y, outer, (x, t), (v, t))
    assert expected.abs() > 1e-4
    torch._dynamo.reset()
    compiled = torch.compile(h, fullgraph=True, backend="aot_eager")
    close(compiled(y, outer, (x, t), (v, t))[0], expected)

    def gradient(y):
        return ops.linear_cross_entropy(x, y, None, t)

    torch._dynamo.reset()
    once = torch.compile(grad(gradient), fullgraph=True, backend="aot_eager")
    close(once(y), grad(gradient)(y))
