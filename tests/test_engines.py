"""Engines of products: right on every operation or a clear refusal, and what each promises."""

import pytest
import torch
from operations import OPERATIONS
from test_operations import SUPPORTED, UNSUPPORTED, Plain, assert_near, draw, products
from torch import nn
from torch.nn import functional as F

import torch_bilevel as tb
from torch_bilevel.products import REGISTRY, parse

# relative, against double backward in float64; central differences leave u^{2/3}
TOLERANCES = {
    "traced": 1e-9,
    "gauss_newton": 1e-9,
    "forward_over_reverse": 1e-9,
    "finite_difference": 1e-5,
}
# what an engine cannot do: the error, and what it says
REFUSED = {
    "traced": {
        "gaussian_nll_loss": (tb.CaptureFailed, r"operations\.py:\d+.*_local_scalar"),
        "one_hot": (tb.CaptureFailed, r"operations\.py:\d+"),
        "LSTM, packed": (tb.CaptureFailed, r"operations\.py:\d+"),
        "scatter_reduce prod": (tb.CaptureFailed, "_local_scalar"),
    },
    "forward_over_reverse": {
        **{
            name: (tb.NoSecondDerivative, f"(?s){word}.*double_backward")
            for name, word in {
                "mish": "mish", "silu": "silu", "logit": "logit", "huber_loss": "huber",
                "soft_margin_loss": "soft_margin", "sparse.mm": "sparse",
                "group_norm": "group_norm", "spectral_norm": "div_out",
                "grid_sample": "grid_sampler", "grid_sample bicubic": "grid_sampler",
                "grid_sample 3d": "grid_sampler", "LSTM, packed": "pack_padded",
                "autograd.Function": "jvp", "masked_scatter": "forward gradient",
                "func.jvp": "forward mode",
            }.items()
        },
        **{
            name: (tb.NoSecondDerivative, "another H v than double backward")
            for name in ("det", "slogdet", "logdet", "solve", "cholesky_inverse")
        },
        "scatter_reduce prod": (tb.NoSecondDerivative, "another H v"),
    },
}  # fmt: skip
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
    REFUSED["traced"]["quantile"] = tb.CaptureFailed, r"operations\.py:\d+.*aten\.equal"
    REFUSED["forward_over_reverse"]["checkpoint"] = (
        tb.NoSecondDerivative,
        "(?s)jvp.*double_backward",
    )
# recording takes a third of a second: every third operation, and all that are refused
TRACED = [n for i, n in enumerate(SUPPORTED) if i % 3 == 0 or n in REFUSED["traced"]]
TRACED.remove("Normal.rsample")  # whether distributions validate depends on other tests
PAIRS = [
    (engine, name)
    for engine in TOLERANCES
    for name in (TRACED if engine == "traced" else SUPPORTED)
    if engine != "gauss_newton" or not OPERATIONS[name]().smooth
]


@pytest.mark.parametrize("engine, name", PAIRS)
def test_an_engine_is_right_or_refuses(engine, name):
    """Gauss–Newton where the operation is not curved, so that it is exact."""
    case, plain = OPERATIONS[name](), Plain(name)
    v = draw(case, 1)
    if engine == "gauss_newton":
        output = case.output
        case.output = lambda: tb.model_output(output())
    if name in REFUSED.get(engine, ()):
        error, message = REFUSED[engine][name]
        with pytest.raises(error, match=message):
            products(engine, case, v)
        return
    (found,) = products(engine, case, v)
    if engine == "finite_difference" and not case.differentiable:
        return  # the gradient is not that of a function, and differences say so
    assert_near(found, plain.products(v, plain.case.reference), TOLERANCES[engine])


@pytest.mark.parametrize(
    "name", ["embedding_bag mean", "ctc_loss", "hardsigmoid", "cdist"]
)
def test_differences_need_one_derivative_only(name):
    names = [n for n in UNSUPPORTED if n.startswith(name.split()[0])]
    case, plain = OPERATIONS[names[0]](), Plain(names[0])
    v = draw(case, 1)
    (found,) = products("finite_difference", case, v)
    assert_near(found, plain.differences(v), 1e-5)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_names_round_trip(name):
    assert str(parse(name)) == name and parse(str(parse(name))) == parse(name)
    assert name in tb.products()


def test_every_engine_is_tested():
    assert set(REGISTRY) == {"double_backward", *TOLERANCES}
    assert len(TRACED) >= 80
    with pytest.raises(tb.UnknownName, match="Did you mean 'traced'"):
        parse("trace")


def network(
    engine,
    dtype=torch.float64,
    dropout=0.0,
    estimator="cg(max_steps=200, rtol=1e-12, damping=0.5)",
):
    """A trained small network with a weight for every example, and a weight decay."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 5, dtype=dtype), torch.randint(0, 3, (40,))
    model = nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 3)
    ).to(dtype)
    weights = torch.zeros(40, dtype=dtype, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1),
        torch.optim.SGD([weights], lr=1.0),
        modules=model,
        estimator=estimator,
        products=engine,
    )

    @optimizer.inner_loss
    def train_loss(x, y, index):
        losses = F.cross_entropy(model(x), y, reduction="none")
        return (weights[index].sigmoid() * losses).mean()

    @optimizer.outer_loss
    def valid_loss():
        return F.cross_entropy(model(x), y)

    index = torch.arange(40)
    for first in range(0, 40, 10):
        part = index[first : first + 10]
        optimizer.zero_grad()
        train_loss(x[part], y[part], part).backward()
        optimizer.step()
    return optimizer, model, weights


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("engine", ["traced", "finite_difference", "gauss_newton"])
def test_a_whole_hypergradient(engine, dropout):
    """Over a window of batches, with weight decay; Gauss–Newton says that it is approximate."""
    reference, _, _ = network("double_backward", dropout=dropout)
    (exact,) = reference.hypergradient()
    optimizer, _, _ = network(engine, dropout=dropout)
    (found,) = optimizer.hypergradient()
    error = float((found - exact).norm() / exact.norm())
    assert (
        error < {"traced": 1e-8, "finite_difference": 1e-4, "gauss_newton": 1}[engine]
    )
    assert (parse(engine).note in optimizer.last_report.notes) == (engine != "traced")


def test_a_recording_serves_every_batch_of_its_shapes():
    optimizer, model, weights = network("traced")
    optimizer.hypergradient()
    assert len(optimizer.problem.recorded) == 1
    with torch.no_grad():
        weights += 0.3 * torch.randn(40)
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
    (found,) = optimizer.hypergradient()
    (exact,) = optimizer.hypergradient(write=False)
    optimizer.products = "double_backward"
    (exact,) = optimizer.hypergradient(write=False)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-12)
    assert len(optimizer.problem.recorded) == 1


def test_what_the_loss_reads_besides_its_arguments_is_noticed():
    """A rebound number makes another program; what changes at every call is refused."""
    y = torch.randn(3, dtype=torch.float64, requires_grad=True)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.0), torch.optim.SGD([x], lr=0.1), products="traced"
    )
    scale = 1.0

    @optimizer.inner_loss
    def train_loss():
        return scale * (x.exp() * y**4).sum()

    optimizer.outer_loss(lambda: y.sum())
    for scale in (1.0, 3.0):  # noqa: B007
        train_loss().backward()
        optimizer.step()
        at = optimizer.products.linearize(
            optimizer.problem, optimizer._recorder.window.steps()[-1].calls
        )
        expected = scale * 12 * x.exp() * y**2
        torch.testing.assert_close(at.hvp(torch.ones(3)), expected.detach())


def test_control_flow_on_values_is_refused_with_its_line():
    y = torch.ones(3, requires_grad=True)
    x = torch.ones(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1), products="traced"
    )

    @optimizer.inner_loss
    def train_loss():
        loss = (x * y**2).sum()
        return loss if loss > 0 else -loss

    optimizer.outer_loss(lambda: y.sum())
    train_loss().backward()
    optimizer.step()
    with pytest.raises(
        tb.CaptureFailed, match=r"test_engines\.py:\d+: 'return loss if"
    ):
        optimizer.hypergradient()


def test_an_argument_that_cannot_be_looked_into():
    class Batch:
        def __init__(self, x):
            self.x = x

    y = torch.ones(3, requires_grad=True)
    x = torch.ones(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.1), torch.optim.SGD([x], lr=0.1), products="traced"
    )
    train = optimizer.inner_loss(lambda batch: (x * (y - batch.x) ** 2).sum())
    optimizer.outer_loss(lambda: y.sum())
    train(Batch(torch.zeros(3))).backward()
    optimizer.step()
    with pytest.raises(tb.CaptureFailed, match="called with a Batch"):
        optimizer.hypergradient()
    with pytest.raises(tb.CaptureFailed, match="cuda_graph=True"):
        optimizer.products = tb.Traced(cuda_graph=True)
        train_y = optimizer.inner_loss(lambda: (x * y**2).sum())
        optimizer.restart()
        optimizer.zero_grad()
        train_y().backward()
        optimizer.step()
        optimizer.hypergradient()


def test_compiled_by_inductor():
    optimizer, _, _ = network("traced(compile=True)", torch.float32)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    (found,) = optimizer.hypergradient()
    assert counters["stats"]["unique_graphs"] > before  # it did not run eagerly
    optimizer.products = "double_backward"
    (exact,) = optimizer.hypergradient(write=False)
    assert (found - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize(
    "engine", ["traced", "finite_difference", "forward_over_reverse"]
)
def test_the_gradient_of_a_point_that_was_left(engine):
    """It is evaluated when asked for, and then it is that of the point, or an error."""
    optimizer, model, _ = network(engine)
    calls = optimizer._recorder.window.steps()[-1].calls
    exact = optimizer.problem.linearize(calls).gradient
    points = [optimizer.products.linearize(optimizer.problem, calls) for _ in range(2)]
    torch.testing.assert_close(points[0].gradient, exact)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    torch.testing.assert_close(points[0].gradient, exact)
    with pytest.raises(tb.StalePoint, match="another point"):
        points[1].gradient  # noqa: B018


def test_gauss_newton_needs_outputs():
    y = torch.ones(3, requires_grad=True)
    x = torch.ones(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.1),
        torch.optim.SGD([x], lr=0.1),
        products="gauss_newton",
    )
    train = optimizer.inner_loss(lambda: (x * y**2).sum())
    optimizer.outer_loss(lambda: y.sum())
    train().backward()
    optimizer.step()
    with pytest.raises(tb.InvalidLoss, match=r"tb\.model_output\(model\(x\)\)"):
        optimizer.hypergradient()


def test_gauss_newton_is_the_formula():
    """B = [Z; I]ᵀ ∇²ℓ [Z; I] with a penalty of its own and an outer variable in the model."""
    torch.manual_seed(0)
    features, target = torch.randn(7, 3, dtype=torch.float64), torch.randint(0, 4, (7,))
    W = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)  # inner, in the loss
    x = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def outputs(W):
        return ((features * x.exp()) @ W.T).tanh()

    def loss(z, W, s):
        losses = F.cross_entropy(z, target, reduction="none")
        return (-s).exp() * losses.mean() + s**2 + 0.1 * (x.exp() * W**2).sum()

    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([W, s], lr=0.0),
        torch.optim.SGD([x], lr=0.1),
        products="gauss_newton",
    )
    train = optimizer.inner_loss(lambda: loss(tb.model_output(outputs(W)), W, s))
    train().backward()
    optimizer.step()
    at = optimizer.products.linearize(
        optimizer.problem, optimizer._recorder.window.steps()[-1].calls
    )
    Z = torch.autograd.functional.jacobian(outputs, W).reshape(28, 12)
    Z = torch.cat([Z, torch.zeros(28, 1, dtype=torch.float64)], 1)
    whole = torch.autograd.functional.hessian(
        lambda z, p: loss(z.view(7, 4), p[:12].view(4, 3), p[12]),
        (
            outputs(W).detach().reshape(-1),
            torch.cat([W.detach().reshape(-1), s.detach()[None]]),
        ),
    )
    stack = torch.cat([Z, torch.eye(13, dtype=torch.float64)])
    curved = torch.cat([torch.cat(row, 1) for row in whole])
    B = stack.T @ curved @ stack
    ours = torch.stack([at.hvp(e) for e in torch.eye(13, dtype=torch.float64)], 1)
    torch.testing.assert_close(ours, B)
    exact = optimizer.problem.linearize(at.calls)
    v = torch.randn(13, dtype=torch.float64)
    torch.testing.assert_close(at.cross(v), exact.cross(v))
    torch.testing.assert_close(at.gradient, exact.gradient)


def test_the_operations_tell_their_outputs():
    torch.manual_seed(0)
    features, target = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 4, (9,))
    W = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(9, dtype=torch.float64, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([W], lr=0.0), torch.optim.SGD([x], lr=0.1)
    )

    @optimizer.inner_loss
    def train():
        return tb.ops.linear_cross_entropy(
            features, W, None, target, example_weights=x.sigmoid()
        )

    train().backward()
    optimizer.step()
    calls = optimizer._recorder.window.steps()[-1].calls
    v = torch.randn(12, dtype=torch.float64)
    points = [
        parse(e).linearize(optimizer.problem, calls)
        for e in ("double_backward", "gauss_newton", "traced")
    ]
    exact = points[0].joint(v)
    for point in points[1:]:
        for ours, theirs in zip(point.joint(v), exact, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_certify_refuses_approximate_products():
    optimizer, _, _ = network("gauss_newton", estimator="cg(certify=True, damping=0.5)")
    optimizer.smoothness(
        lambda: tb.Smoothness(strong_convexity=1.0, hessian=1.0, cross=1.0, outer=1.0)
    )
    with pytest.raises(tb.BilevelError, match="approximate"):
        optimizer.hypergradient()


def few_shot_head(estimator, products="gauss_newton", weight_decay=0.2, ops=False):
    """A linear head of 5 classes on 6 examples with 30 features; outer: the features."""
    torch.manual_seed(0)
    features = torch.randn(6, 30, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    W = torch.zeros(5, 30, dtype=torch.float64, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([W], lr=0.1, weight_decay=weight_decay),
        torch.optim.SGD([features], lr=0.1),
        estimator=estimator,
        products=products,
    )

    @optimizer.inner_loss
    def train_loss():
        if ops:
            return tb.ops.linear_cross_entropy(features, W, None, target)
        return F.cross_entropy(features @ W.T, target)

    query = torch.randn(4, 30, dtype=torch.float64)
    optimizer.outer_loss(lambda: F.cross_entropy(query @ W.T, target[:4]))
    for _ in range(50):
        optimizer.zero_grad()
        train_loss().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("ops", [True, False])
def test_a_few_shot_head_is_solved_in_the_space_of_its_outputs(ops):
    optimizer = few_shot_head("sample_space", ops=ops)
    (found,) = optimizer.hypergradient()
    (exact,) = optimizer.hypergradient(estimator="direct", write=False)
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    assert optimizer.last_report.status == "converged"


def test_what_a_solve_in_the_space_of_outputs_needs():
    with pytest.raises(tb.SolverLimit, match="products='gauss_newton'"):
        few_shot_head("sample_space", "double_backward").hypergradient()
    with pytest.raises(tb.SolverLimit, match="positive diagonal.*damping="):
        few_shot_head("sample_space", weight_decay=0.0).hypergradient()
    with pytest.raises(tb.SolverLimit, match=r"30 × 150 matrix"):
        few_shot_head("sample_space(max_bytes=1000)").hypergradient()
    with pytest.raises(tb.SolverLimit, match="has no factors|needs factors"):
        tb.SampleSpace().solve(tb._solvers.Operator(lambda v: v, 3), torch.ones(3))


def test_explain_names_the_engine_its_cost_and_what_would_be_faster():
    optimizer, _, _ = network("traced")
    optimizer.hypergradient()
    text = optimizer.explain()
    assert "products: 'traced', as you asked: a recorded program" in text
    assert "cost: " in text and "products in" in text
    assert "recorded program of 'train_loss'" in text and "operations a product" in text
    optimizer, _, _ = network("double_backward")
    assert "'double_backward', the default" in optimizer.explain()
    assert "few parameters: estimator='direct'" in optimizer.explain()
    assert "products='traced(compile=True)'" in optimizer.explain()
    W, x = torch.ones(2, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([W], lr=0.1), torch.optim.SGD([x], lr=0.1)
    )
    optimizer.inner_loss(lambda: F.cross_entropy((W * x).T, torch.tensor([0, 1, 1])))
    assert "ops.linear_cross_entropy" in optimizer.explain()
    fused = few_shot_head("cg", "double_backward", ops=True)
    assert "ops.linear_cross_entropy" not in fused.explain()
    layer = nn.TransformerEncoderLayer(4, 1, 8, dropout=0.0, batch_first=True)
    x = torch.ones(2, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(layer.parameters(), lr=0.1),
        torch.optim.SGD([x], lr=0.1),
        modules=layer,
    )
    assert "fused attention by its mathematical form" in optimizer.explain()
