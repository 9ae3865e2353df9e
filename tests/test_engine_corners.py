"""Programs that engines of products once got wrong, or would if nobody looked."""

import contextlib

import pytest
import torch
from test_engines import network
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import torch_bilevel as tb
from torch_bilevel.products import parse

EXACT = ["double_backward", "traced", "gauss_newton"]


def problem(loss, inner, outer, products="double_backward", **options):
    """A recorded step of length zero on a loss; the engine's point and double backward's."""
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(inner, lr=0.0),
        torch.optim.SGD(outer, lr=0.1),
        products=products,
        **options,
    )
    train = optimizer.inner_loss(loss)
    optimizer.outer_loss(lambda: sum(p.sum() for p in inner if p.requires_grad))
    optimizer.zero_grad()
    train().backward()
    optimizer.step()
    return optimizer, optimizer._recorder.window.steps()[-1].calls


def agree(ours, theirs, tolerance=1e-9):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * b.norm().clamp_min(1e-6)


class SquareOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (z,) = ctx.saved_tensors
        return 2 * g * z


@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("place", ["last", "inside", "behind the outputs"])
def test_what_is_differentiable_once_only_is_found(engine, place):
    """Also as the last operation, where its incoming gradient is a constant."""
    y = torch.randn(3, requires_grad=True)
    x = torch.ones(3, requires_grad=True)

    def loss():
        if place == "last":
            return SquareOnce.apply(tb.model_output(x.exp() * y))
        if place == "inside":
            return F.mse_loss(SquareOnce.apply(x.exp() * y)[None], torch.ones(1))
        return SquareOnce.apply(tb.model_output(y * x)) + (x * y).sum()

    optimizer, _ = problem(loss, [y], [x], engine)
    with pytest.raises(tb.NoSecondDerivative, match="SquareOnce"):
        optimizer.hypergradient()
    # a function of constants is no matter
    optimizer, _ = problem(
        lambda: (y * x * y).sum() + SquareOnce.apply(x), [y], [x], "double_backward"
    )
    optimizer.hypergradient()


def test_numbers_and_flags_that_the_loss_reads_choose_the_recording():
    """Although the loss is the same number in both."""
    y = torch.ones(3, requires_grad=True)
    x = torch.zeros(3, requires_grad=True)
    settings = {"penalty": 1.0}

    class Model(nn.Module):
        stop = False

        def forward(self, y):
            h = y * (1 + x)
            return (h.detach() if self.stop else h) + 0 * y

    model = Model()
    model.stop = False

    def loss():
        pulled = 0.5 * settings["penalty"] * ((y - 1) ** 2).sum()
        return pulled + model(y).square().sum() + y.sum() * x.sum()

    optimizer, calls = problem(loss, [y], [x], "traced", modules=model)
    v = torch.randn(3)
    for penalty, stop in ((1.0, False), (100.0, False), (100.0, True), (1.0, False)):
        settings["penalty"], model.stop = penalty, stop
        at = optimizer.products.linearize(optimizer.problem, calls)
        agree(at.joint(v), optimizer.problem.linearize(calls).joint(v))


@pytest.mark.parametrize(
    "engine", [*EXACT, "finite_difference", "forward_over_reverse"]
)
def test_frozen_parameters_are_constants_to_every_engine(engine):
    optimizer, model, _ = network(engine)
    model[0].requires_grad_(False)
    x, y, index = torch.randn(9, 5), torch.arange(9) % 3, torch.arange(9)
    optimizer.zero_grad()
    optimizer.inner_losses["train_loss"](x, y, index).backward()
    optimizer.step()
    calls = optimizer._recorder.window.steps()[-1].calls
    v = torch.randn(optimizer.problem.inner.layout.numel)
    at = optimizer.products.linearize(optimizer.problem, calls)
    exact = optimizer.problem.linearize(calls).joint(v)
    if engine == "gauss_newton":  # linear in what is left
        assert exact[0].norm() > 0
    agree(at.joint(v), exact, 1e-5 if engine == "finite_difference" else 1e-9)


@pytest.mark.parametrize(
    "engine", ["traced", "gauss_newton", "finite_difference", "forward_over_reverse"]
)
def test_maps_need_double_backward(engine):
    z, x = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        tb.FixedPointIteration([z]),
        torch.optim.SGD([x], lr=0.1),
        estimator="gmres",
        products=engine,
    )
    step = optimizer.fixed_point_map(lambda: 0.5 * z.sin() + x)
    optimizer.outer_loss(lambda: z.sum())
    step()
    optimizer.inners[0].step()
    with pytest.raises(tb.NonSymmetricSystem, match="double_backward"):
        optimizer.hypergradient()


@pytest.mark.parametrize(
    "engine, tolerance",
    [
        ("traced", 3e-2),
        ("forward_over_reverse", 3e-2),
        ("gauss_newton", 3e-2),
        ("finite_difference", 0.2),
    ],
)
@pytest.mark.parametrize("where", ["around", "inside"])
def test_under_autocast(engine, tolerance, where):
    """Tolerances and steps are those of bfloat16, not of the parameters."""
    region = torch.autocast("cpu", dtype=torch.bfloat16)
    inside, around = region, contextlib.nullcontext()
    if where == "around":
        inside, around = around, inside
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).float()
    data, target = torch.randn(64, 6).float(), torch.randint(0, 3, (64,))
    x = torch.zeros(6, dtype=torch.float32, requires_grad=True)

    def loss():
        with inside:
            return F.cross_entropy(model(data * x.exp()), target)

    inner = list(model.parameters())[2:]  # linear in these: Gauss–Newton is exact
    for p in list(model.parameters())[:2]:
        p.requires_grad_(False)
    optimizer, _ = problem(loss, inner, [x], engine)
    optimizer.zero_grad()
    with around:
        optimizer.inner_losses["loss"]().backward()
    optimizer.step()
    calls = optimizer._recorder.window.steps()[-1].calls
    v = torch.randn(optimizer.problem.inner.layout.numel).float()
    exact = optimizer.problem.linearize(calls).joint(v)
    agree(
        optimizer.products.linearize(optimizer.problem, calls).joint(v),
        exact,
        tolerance,
    )


def test_the_step_of_differences_in_half_precision():
    """Float32's is lost in rounding, the cube root of bfloat16's unit in curvature."""
    errors = torch.tensor([_errors_in_half_precision(seed) for seed in range(4)])
    ours, float32s, cube_root = errors.mean((0, 1))
    assert errors[..., 0].max() < 0.15
    assert float32s > 1.5 * ours and cube_root > 3 * ours


def _errors_in_half_precision(seed):
    """Of H v of a trained perceptron, a row for each v and a column for each step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).float()
    data, target = torch.randn(64, 6).float(), torch.randint(0, 3, (64,))
    x = torch.zeros(1, dtype=torch.float32, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.05), torch.optim.SGD([x], lr=0.1)
    )

    @optimizer.inner_loss
    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x.exp() * F.cross_entropy(model(data), target)

    optimizer.outer_loss(lambda: F.cross_entropy(model(data), target))
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    problem, calls = optimizer.problem, optimizer._recorder.window.steps()[-1].calls
    exact = problem.linearize(calls)
    rows = []
    for v in (exact.gradient.detach(), torch.randn(problem.inner.layout.numel).float()):
        known = exact.hvp(v)
        found = [
            tb.CentralDifference(step).linearize(problem, calls).hvp(v)
            for step in (None, 5e-3, 0.2)
        ]
        rows.append([float((Hv - known).norm() / known.norm()) for Hv in found])
    return rows


@pytest.mark.parametrize("how", ["vmap", "checkpoint"])
def test_single_loop_methods_with_operations_inside(how):
    """A direction foreseen for an operation that is evaluated elsewhere, or later."""
    W = torch.randn(4, 3, 5, requires_grad=True)
    x = torch.zeros(4, requires_grad=True)
    data, target = torch.randn(4, 9, 5), torch.randint(0, 3, (4, 9))

    def one(w, d, t, x):
        return x.exp() * tb.ops.linear_cross_entropy(d, w, None, t)

    def loss():
        if how == "vmap":
            return torch.vmap(one)(W, data, target, x).sum()
        checkpoint = torch.utils.checkpoint.checkpoint
        return checkpoint(one, W[0] + 0, data[0], target[0], x[0], use_reentrant=False)

    found = []
    for _ in range(2):
        optimizer, _ = problem(loss, [W], [x], estimator="soba(adjoint_lr=0.1)")
        found.append(optimizer.hypergradient()[0])
    assert torch.equal(*found)


def test_traced_at_a_solution_that_interpolates():
    """The loss is zero up to rounding, which other formulas would round differently."""
    torch.manual_seed(0)
    data, w = torch.randn(8, 20), torch.randn(20)
    target = data @ w
    y, x = w.clone().requires_grad_(), torch.zeros(8, requires_grad=True)
    optimizer, calls = problem(
        lambda: tb.ops.linear_squared_error(
            data, y, None, target, example_weights=x.exp()
        ),
        [y],
        [x],
        "traced",
    )
    v = torch.randn(20)
    at = optimizer.products.linearize(optimizer.problem, calls)
    agree(at.joint(v)[:1], optimizer.problem.linearize(calls).joint(v)[:1])


def test_gauss_newton_splits_where_it_is_told():
    torch.manual_seed(0)
    data, target = torch.randn(9, 4), torch.randint(0, 3, (9,))
    W, x = torch.randn(3, 4, requires_grad=True), torch.ones(4, requires_grad=True)

    def temperature():
        z = tb.model_output((data * x) @ W.T)
        return F.cross_entropy(z / 2, target)

    def written_to():
        z = tb.model_output((data * x) @ W.T)
        z += 1.0
        return F.cross_entropy(z, target)

    for loss in (temperature, written_to):
        optimizer, calls = problem(loss, [W], [x], "gauss_newton")
        v = torch.randn(12)
        at = optimizer.products.linearize(optimizer.problem, calls)
        agree(at.joint(v), optimizer.problem.linearize(calls).joint(v))

    def gradient_penalty():
        z = (data * x) @ W.T
        value = F.cross_entropy(z, target)
        (g,) = torch.autograd.grad(value, W, create_graph=True)
        return value + g.square().sum()

    optimizer, _ = problem(gradient_penalty, [W], [x], "gauss_newton")
    with pytest.raises(tb.InvalidLoss, match="differentiates by itself"):
        optimizer.hypergradient()


def test_operations_with_16_bit_parameters_tell_their_outputs():
    data, target = torch.randn(9, 4).bfloat16(), torch.randint(0, 3, (9,))
    W = torch.randn(3, 4).bfloat16().requires_grad_()
    b = torch.zeros(3).bfloat16().requires_grad_()
    x = torch.zeros(9, requires_grad=True)
    optimizer, calls = problem(
        lambda: tb.ops.linear_cross_entropy(
            data, W, b, target, example_weights=x.exp()
        ),
        [W, b],
        [x],
        "gauss_newton",
    )
    v = torch.randn(15).to(optimizer.problem.inner.layout.dtype)
    at = optimizer.products.linearize(optimizer.problem, calls)
    agree(at.joint(v), optimizer.problem.linearize(calls).joint(v), 5e-2)


def test_recordings_are_bounded_and_say_when_they_never_end():
    y, x = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.0), torch.optim.SGD([x], lr=0.1), products="traced"
    )
    train = optimizer.inner_loss(lambda scale: scale * (x * y**2).sum())
    optimizer.outer_loss(lambda: y.sum())
    with pytest.warns(tb.RecordingWarning, match="a number among the arguments"):
        for step in range(20):
            optimizer.zero_grad()
            train(1.0 + step).backward()
            optimizer.step()
            calls = optimizer._recorder.window.steps()[-1].calls
            optimizer.products.linearize(optimizer.problem, calls)
    assert len(optimizer.problem.recorded) <= 17


def test_explain_does_not_claim_an_engine_that_unrolling_does_not_use():
    y, x = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.1),
        torch.optim.SGD([x], lr=0.1),
        estimator="unrolled",
        products="gauss_newton",
    )
    assert "'gauss_newton' is not used" in optimizer.explain()


def test_options_are_checked():
    with pytest.raises(tb.UnknownName, match="True or False"):
        parse("traced(compile='yes')")
    with pytest.raises(tb.InvalidLoss, match="label_smoothing"):
        tb.ops.linear_cross_entropy(
            torch.ones(2, 3), torch.ones(2, 3), None, torch.tensor([0, 1]),
            label_smoothing=1.5,
        )  # fmt: skip


def test_traced_draws_the_same_numbers_in_every_memory_layout():
    """A dropout of a permuted tensor, as in attention."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    data, target = torch.randn(5, 4, 8), torch.randn(5, 4, 8)
    x = torch.zeros(8, requires_grad=True)

    def loss():
        return ((layer(data * x.exp()) - target) ** 2).mean()

    inner = list(layer.parameters())
    optimizer, calls = problem(loss, inner, [x], "traced", modules=layer)
    v = torch.randn(optimizer.problem.inner.layout.numel)
    at = optimizer.products.linearize(optimizer.problem, calls)
    agree(at.joint(v), optimizer.problem.linearize(calls).joint(v))


def test_traced_records_again_where_shapes_depend_on_values():
    torch.manual_seed(0)
    W, x = torch.randn(3, 4, requires_grad=True), torch.zeros(4, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([W], lr=0.0), torch.optim.SGD([x], lr=0.1), products="traced"
    )

    @optimizer.inner_loss
    def loss(data, target):
        kept = target > 0
        return F.cross_entropy(data[kept] * x.exp() @ W.T, target[kept])

    optimizer.outer_loss(lambda: W.sum())
    v = torch.randn(12)
    for _ in range(4):
        optimizer.zero_grad()
        loss(torch.randn(20, 4), torch.randint(0, 3, (20,))).backward()
        optimizer.step()
        calls = optimizer._recorder.window.steps()[-1].calls
        exact = optimizer.problem.linearize(calls).joint(v)
        try:
            at = optimizer.products.linearize(optimizer.problem, calls)
        except tb.CaptureFailed:
            continue
        agree(at.joint(v), exact)


def test_gauss_newton_of_many_heads():
    torch.manual_seed(0)
    data, target = torch.randn(4, 9, 5), torch.randint(0, 3, (4, 9))
    heads, x = (
        torch.randn(4, 3, 5, requires_grad=True),
        torch.zeros(5, requires_grad=True),
    )

    def outside():
        z = tb.model_output(torch.einsum("tnd,tcd->tnc", data * x.exp(), heads))
        return torch.vmap(F.cross_entropy)(z, target).sum()

    def inside():
        def one(head, data, target):
            return F.cross_entropy((data * x.exp()) @ head.T, target)

        return torch.vmap(one)(heads, data, target).sum()

    optimizer, calls = problem(outside, [heads], [x], "gauss_newton")
    v = torch.randn(60)
    at = optimizer.products.linearize(optimizer.problem, calls)
    agree(at.joint(v), optimizer.problem.linearize(calls).joint(v))
    optimizer, _ = problem(inside, [heads], [x], "gauss_newton")
    with pytest.raises(tb.InvalidLoss, match=r"torch\.vmap.*einsum"):
        optimizer.hypergradient()


@pytest.mark.parametrize("engine", [*EXACT, "forward_over_reverse"])
def test_a_loss_that_is_an_object_without_hash(engine):
    class Loss:
        __hash__ = None

        def __call__(self):
            return F.huber_loss(x.exp() * y, torch.zeros(3), delta=9.0)

    if engine == "forward_over_reverse":  # huber_loss has no forward derivative
        Loss.__call__ = lambda self: (x.exp() * y.square()).sum()
    y, x = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer, calls = problem(Loss(), [y], [x], engine)
    v = torch.randn(3)
    at = optimizer.products.linearize(optimizer.problem, calls)
    agree(at.joint(v), optimizer.problem.linearize(calls).joint(v))
