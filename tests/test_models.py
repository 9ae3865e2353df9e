"""Models with fast paths that have no second derivative; recurrent and unusual modules."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_bilevel as tb

ESTIMATORS = [
    "cg(max_steps=5)",
    "minres(max_steps=5)",
    "unrolled",
    "unrolled(keep_graph=True)",
]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", tb.NegativeCurvatureWarning)
        yield
    torch._dynamo.reset()


class Attention(nn.Module):
    """A transformer encoder layer on short sequences."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            8, 2, 16, dropout=dropout, batch_first=True
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Plain(nn.Module):
    """Dropout and BatchNorm."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(32, 6),
            nn.BatchNorm1d(6),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(6, 3),
        )

    def forward(self, x):
        return self.body(x)


def hypergradient(
    model, estimator, wrap=lambda m: m, num_steps=3, dtype=torch.float64, **options
):
    torch.manual_seed(1)
    model = model().to(dtype)
    X, t = torch.randn(12, 4, 8).to(dtype), torch.randint(0, 3, (12,))
    lam = torch.zeros(12, dtype=dtype).requires_grad_()
    called = wrap(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = tb.BilevelOptimizer(
        inner,
        torch.optim.SGD([lam], lr=1.0),
        modules=called,
        estimator=estimator,
        **options,
    )

    @optimizer.inner_loss
    def train_loss(x, y):
        return (lam.exp() * F.cross_entropy(called(x), y, reduction="none")).mean()

    @optimizer.outer_loss
    def valid_loss(x, y):
        return F.cross_entropy(called(x), y)

    torch.manual_seed(2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        train_loss(X, t).backward()
        optimizer.step()
    return (
        optimizer.hypergradient(X.flip(0), t.flip(0))[0],
        optimizer,
        (X.flip(0), t.flip(0)),
    )


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_attention_equals_math_attention(estimator, dtype):
    found, *_ = hypergradient(Attention, estimator, dtype=dtype)
    with sdpa_kernel(SDPBackend.MATH):
        expected, *_ = hypergradient(Attention, estimator, dtype=dtype)
    error = float((found - expected).norm() / expected.norm())
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "model", [Attention, lambda: Plain(0.0)], ids=["attention", "batchnorm"]
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_compiled_model_equals_the_same_uncompiled(estimator, model, dtype):
    """aot_eager runs the whole of AOTAutograd, which is what has no double backward."""
    calls = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        compiled = aot_eager(graph, inputs)
        return lambda *args: (calls.append(1), compiled(*args))[1]

    found, *_ = hypergradient(
        model, estimator, wrap=lambda m: torch.compile(m, backend=backend), dtype=dtype
    )
    # the user's own steps did run compiled, unless their graphs are kept
    assert (len(calls) >= 3) == ("keep_graph" not in estimator)
    with sdpa_kernel(SDPBackend.MATH):
        expected, *_ = hypergradient(model, estimator, dtype=dtype)
    error = float((found - expected).norm() / expected.norm())
    assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("estimator", ["cg(max_steps=5)", "unrolled"])
def test_a_model_compiled_by_inductor(estimator):
    found, *_ = hypergradient(lambda: Plain(0.0), estimator, wrap=torch.compile)
    expected, *_ = hypergradient(lambda: Plain(0.0), estimator)
    assert float((found - expected).norm() / expected.norm()) < 1e-10


def test_inductor_with_dropout_names_fallback_random():
    for estimator in ("cg", "unrolled"):
        with pytest.raises(tb.ReplayMismatch, match="fallback_random"):
            hypergradient(Plain, estimator, wrap=torch.compile)
    found, *_ = hypergradient(
        Plain,
        "unrolled",
        wrap=lambda m: torch.compile(m, options={"fallback_random": True}),
    )
    expected, *_ = hypergradient(Plain, "unrolled")
    assert float((found - expected).norm() / expected.norm()) < 1e-10


@pytest.mark.parametrize(
    "model", [Plain, lambda: Attention(0.2)], ids=["plain", "attention"]
)
def test_dropout_and_batchnorm_equal_finite_differences(model):
    _, optimizer, batch = hypergradient(model, "unrolled")
    with sdpa_kernel(SDPBackend.MATH):
        assert tb.check_hypergradient(optimizer, *batch).relative_error < 1e-6


def test_compiled_losses_and_a_compiled_training_step():
    """Hooks and decorated losses are never traced."""
    torch.manual_seed(0)
    w, lam = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    A, b = torch.randn(8, 3), torch.randn(8)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([w], lr=0.1),
        torch.optim.SGD([lam], lr=0.1),
        estimator="unrolled",
    )

    @optimizer.inner_loss
    @torch.compile(backend="aot_eager")
    def train_loss():
        return ((A @ w - b) ** 2).mean() + (lam.exp() * w**2).sum()

    @optimizer.outer_loss
    def valid_loss():
        return (w**3).sum()

    @torch.compile(backend="aot_eager")
    def train_step():
        optimizer.zero_grad()
        train_loss().backward()
        optimizer.step()

    for _ in range(3):
        train_step()
    assert tb.check_hypergradient(optimizer).relative_error < 1e-6
    assert optimizer.last_report.steps == 3


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Tied(nn.Module):
    """One weight used twice, one frozen parameter, one that nothing uses."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 3)
        self.head.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x.mean(1))))))


class Checkpointed(nn.Module):
    """Activation checkpointing runs the forward again inside backward."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)

    def block(self, x):
        return F.dropout(torch.tanh(self.norm(self.a(x))), 0.3, self.training)

    def forward(self, x):
        from torch.utils.checkpoint import checkpoint

        return self.head(checkpoint(self.block, x.mean(1), use_reentrant=False))


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.b = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x.mean(1))))))


def test_weight_norm_has_a_wrong_second_derivative_in_torch_and_a_right_one_here():
    v, g = torch.randn(3, 4, requires_grad=True), torch.randn(3, 1, requires_grad=True)
    function = lambda v, g: torch._weight_norm(v, g, 0)  # noqa: E731
    right = torch.autograd.gradgradcheck(function, (v, g), raise_exception=False)
    if right:
        pytest.fail("torch has mended _weight_norm: the special case can go")
    with tb.second_order(weight_norm=True):
        assert torch.autograd.gradgradcheck(function, (v, g))


class OldWeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.a = nn.utils.weight_norm(nn.Linear(8, 3))

    def forward(self, x):
        return self.a(x.mean(1))


@pytest.mark.parametrize(
    "model", [Recurrent, Tied, Checkpointed, Normalised, OldWeightNorm]
)
def test_unusual_modules_equal_finite_differences(model):
    _, optimizer, batch = hypergradient(model, "unrolled")
    assert tb.check_hypergradient(optimizer, *batch).relative_error < 1e-6
    optimizer.hypergradient(*batch, estimator="cg(max_steps=3)")


def test_bfloat16_parameters_get_float32_vectors():
    found, optimizer, _ = hypergradient(
        lambda: Plain(0.0), "cg(max_steps=3)", dtype=torch.bfloat16
    )
    assert optimizer.problem.inner.layout.dtype == torch.float32
    expected, *_ = hypergradient(
        lambda: Plain(0.0), "cg(max_steps=3)", dtype=torch.float32
    )
    assert found.dtype == torch.bfloat16 and torch.isfinite(found).all()
    assert float((found - expected).norm() / expected.norm()) < 0.2
    unrolled, *_ = hypergradient(lambda: Plain(0.0), "unrolled", dtype=torch.bfloat16)
    assert torch.isfinite(unrolled).all()


def test_flags_recorded_with_the_call_not_with_the_hypergradient():
    """model.eval() for validation does not turn off the dropout of the recorded steps."""
    _, optimizer, batch = hypergradient(Plain, "unrolled")
    model = next(iter(optimizer._modules.members.values()))
    model.eval()
    check = tb.check_hypergradient(optimizer, *batch)
    assert check.relative_error < 1e-6 and not model.training


ALL = pytest.mark.parametrize(
    "estimator",
    [
        "cg",
        "direct",
        "minres",
        "gmres",
        "unrolled",
        "unrolled(keep_graph=True)",
        "checkpointed",
        "forward",
    ],
)


def complex_parameters(estimator, odd=3):
    """Filters of a Fourier operator, complex views of real parameters at odd places."""
    torch.manual_seed(0)
    X, target = torch.randn(12, 6), torch.randn(12, 6)
    bias, c = nn.Parameter(torch.zeros(odd)), nn.Parameter(torch.randn(4, 2))
    x = torch.tensor([-1.0], requires_grad=True)

    def model(inputs):
        spectrum = torch.fft.rfft(inputs) * torch.view_as_complex(c)
        return torch.fft.irfft(spectrum, n=6) + bias.mean()

    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([bias, c], lr=0.1),
        torch.optim.SGD([x], lr=0.1),
        estimator=estimator,
    )
    train = optimizer.inner_loss(
        lambda: F.mse_loss(model(X), target) + x.exp() * ((c**2).mean() + bias @ bias)
    )
    optimizer.outer_loss(lambda: F.mse_loss(model(X.flip(0)), target))
    return optimizer, train, c


@ALL
@pytest.mark.parametrize("odd", [1, 2, 3])
def test_complex_views_of_real_parameters(estimator, odd):
    torch.set_default_dtype(torch.float64)
    optimizer, train, _ = complex_parameters(estimator, odd)
    implicit = estimator in ("cg", "direct", "minres", "gmres")
    for _ in range(800 if implicit else 3):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
    (found,) = optimizer.hypergradient()
    assert found.abs() > 1e-3
    if estimator == "forward":
        optimizer, train, _ = complex_parameters("unrolled", odd)
        for _ in range(3):
            optimizer.zero_grad()
            train().backward()
            optimizer.step()
        torch.testing.assert_close(found, optimizer.hypergradient()[0])
        return
    assert tb.check_hypergradient(optimizer).relative_error < 1e-6


def test_gradients_through_complex_views_beside_kept_graphs():
    """What the graph saved of the memory of a parameter was another reading of it."""
    torch.set_default_dtype(torch.float64)
    gradients = []
    for estimator in ("unrolled(keep_graph=True)", "cg"):
        _, train, c = complex_parameters(estimator)
        train().backward()
        gradients.append(c.grad)
    torch.testing.assert_close(*gradients)


@ALL
def test_embeddings_whose_gradient_is_sparse_or_no_derivative(estimator):
    for options, error, words in (
        ({"sparse": True}, tb.UnsupportedParameter, "is sparse.*sparse=True"),
        ({"scale_grad_by_freq": True}, tb.InvalidLoss, "scale_grad_by_freq=True"),
    ):
        table = nn.Embedding(5, 2, **options)
        x = torch.ones(3, requires_grad=True)
        optimizer = tb.BilevelOptimizer(
            torch.optim.SGD(table.parameters(), lr=0.1),
            torch.optim.SGD([x], lr=0.1),
            estimator=estimator,
        )
        rows = torch.tensor([0, 1, 1])
        train = optimizer.inner_loss(
            lambda table=table, x=x, rows=rows: (x[:, None] * table(rows) ** 2).sum()
        )
        optimizer.outer_loss(lambda table=table, rows=rows: table(rows).sum())
        with pytest.raises(error, match=words):
            train().backward()
            optimizer.step()
            optimizer.hypergradient()


@pytest.mark.parametrize("estimator", ["forward", "forward_gradient", "unrolled", "cg"])
def test_an_operation_without_a_second_derivative_is_named(estimator):
    bag, x = nn.EmbeddingBag(5, 2), torch.ones(1, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(bag.parameters(), lr=0.1),
        torch.optim.SGD([x], lr=0.1),
        estimator=estimator,
    )
    rows = torch.arange(4)[None]
    train = optimizer.inner_loss(lambda: (x * bag(rows) ** 2).sum())
    optimizer.outer_loss(lambda: bag(rows).sum())
    with pytest.raises(tb.NoSecondDerivative, match="_embedding_bag_backward"):
        train().backward()
        optimizer.step()
        optimizer.hypergradient()


def test_constant_sparse_matrices_beside_kept_graphs():
    """A graph convolution's adjacency."""
    torch.set_default_dtype(torch.float64)
    A, found = torch.rand(3, 3).round().to_sparse(), []
    for estimator in ("unrolled", "unrolled(keep_graph=True)"):
        y, x = torch.ones(3, 1, requires_grad=True), torch.ones(1, requires_grad=True)
        optimizer = tb.BilevelOptimizer(
            torch.optim.SGD([y], lr=0.1),
            torch.optim.SGD([x], lr=0.1),
            estimator=estimator,
        )
        train = optimizer.inner_loss(
            lambda y=y, x=x: x * (torch.sparse.mm(A, y).sin() ** 2).sum() + (y**4).sum()
        )
        optimizer.outer_loss(lambda y=y: y.sum())
        for _ in range(3):
            optimizer.zero_grad()
            train().backward()
            optimizer.step()
        found += optimizer.hypergradient()
    torch.testing.assert_close(*found)
