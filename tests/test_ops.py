"""`torch_bilevel.ops` against torch.nn.functional: values, two derivatives, transforms, corners."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from torch_bilevel import _blocks, ops
from torch_bilevel.errors import InvalidLoss, NoThirdDerivative
from torch_bilevel.ops import formulas


def plain(name):
    """The same loss of plain torch operations."""

    def loss(
        x, weight, bias, target, example_weights=None, reduction="mean", **options
    ):
        z = F.linear(x, weight, bias)
        function = {
            "linear_cross_entropy": F.cross_entropy,
            "linear_logistic": F.binary_cross_entropy_with_logits,
            "linear_squared_error": F.mse_loss,
        }[name]
        if example_weights is None:
            return function(z, target, reduction=reduction, **options)
        losses = function(z, target, reduction="none", **options)
        losses = losses * (
            example_weights if losses.dim() == 1 else example_weights[:, None]
        )
        if reduction == "none":
            return losses
        count = losses.numel()
        if target.dtype == torch.int64:
            count = (target != options.get("ignore_index", -100)).sum()
        return losses.sum() / (count if reduction == "mean" else 1)

    return loss


@pytest.fixture(autouse=True)
def fused(request, monkeypatch):
    """The formulas at every size, except where a test is about the plain operations."""
    if "operations" not in request.node.name:
        monkeypatch.setattr(formulas, "SMALL", -1)
        monkeypatch.setattr(formulas, "ALONG", -1)


by_both = pytest.mark.parametrize("by", ["formulas", "operations"])


# name, kind of target, options
CASES = {
    "indices": ("linear_cross_entropy", "indices", {}),
    "smoothing": ("linear_cross_entropy", "indices", {"label_smoothing": 0.2}),
    "ignored": ("linear_cross_entropy", "indices", {"ignore_index": 1}),
    "probabilities": ("linear_cross_entropy", "real", {}),
    "smooth probabilities": ("linear_cross_entropy", "real", {"label_smoothing": 0.1}),
    "logistic": ("linear_logistic", "real", {}),
    "squared": ("linear_squared_error", "real", {}),
}


def arguments(kind, n=6, d=4, c=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    target = (
        torch.randint(c, (n,), generator=g)
        if kind == "indices"
        else torch.softmax(2 * draw(n, c), 1)
    )
    return [draw(n, d), draw(c, d), draw(c), target, draw(n).sigmoid()]


def leaves(args):
    return [
        t.clone().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in args
    ]


def two_derivatives(loss, args, **options):
    """Value, gradient, and second derivative along a fixed direction, of every argument."""
    args = leaves(args)
    value = loss(*args[:4], example_weights=args[4], **options)
    wanted = [t for t in args if t is not None and t.requires_grad]
    g = torch.Generator().manual_seed(5)
    seed = torch.randn(value.shape, generator=g, dtype=torch.float64).to(value.dtype)
    first = torch.autograd.grad(value, wanted, seed, create_graph=True)
    along = [
        torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype)
        for t in wanted
    ]
    second = torch.autograd.grad(first, wanted, along, retain_graph=True)
    return [value, *first, *second]


def agree(found, expected, tolerance):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        scale = max(float(theirs.detach().double().norm()), 1.0)
        error = float((ours.detach().double() - theirs.detach().double()).norm())
        assert error <= tolerance * scale


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_two_derivatives_in_every_argument(case, bias, weighted, reduction):
    name, kind, options = CASES[case]
    args = arguments(kind)
    args[2] = args[2] if bias else None
    args[4] = args[4] if weighted else None
    options = {**options, "reduction": reduction}
    ours = two_derivatives(getattr(ops, name), args, **options)
    agree(ours, two_derivatives(plain(name), args, **options), 1e-12)


@by_both
@pytest.mark.parametrize("case", CASES)
def test_gradcheck_and_gradgradcheck(case, by):
    name, kind, options = CASES[case]
    args = leaves(arguments(kind, n=4, d=2, c=3))

    def loss(x, weight, bias, target, example_weights):
        return getattr(ops, name)(
            x, weight, bias, target, example_weights=example_weights, **options
        )

    assert gradcheck(loss, args) and gradgradcheck(loss, args)


@pytest.mark.parametrize(
    "n, d, c", [(0, 3, 2), (1, 1, 1), (5, 3, 1), (1, 7, 4), (700, 3, 2)]
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("by", ["formulas", "formulas, no state", "operations"])
def test_sizes_and_chunks(case, n, d, c, by, monkeypatch):
    """Also an empty batch, one class, chunks, and outputs that are not kept."""
    monkeypatch.setattr(formulas, "CHUNK", 1)  # 256 rows
    monkeypatch.setattr(_blocks, "BLOCK", 1)  # 128 rows
    monkeypatch.setattr(formulas, "KEEP", -1 if by == "formulas, no state" else 2**24)
    name, kind, options = CASES[case]
    if case == "ignored":
        options = {"ignore_index": -100}
    args = arguments(kind, n, d, c)
    options = {**options, "reduction": "sum"}
    ours = two_derivatives(getattr(ops, name), args, **options)
    agree(ours, two_derivatives(plain(name), args, **options), 1e-12)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("nothing", ["ignored", "indices", "logistic", "squared"])
@pytest.mark.parametrize("by", ["formulas", "operations", "operations under func"])
def test_a_mean_over_nothing_is_nan_and_its_derivatives_are_zero(by, nothing, weighted):
    """An empty batch, or one whose examples are all ignored."""
    name, kind, options = CASES[nothing]
    args = arguments(kind, n=5 if nothing == "ignored" else 0)
    if nothing == "ignored":
        args[3] = torch.ones_like(args[3])
    omega = args[4] if weighted else None

    def loss(weight):
        x, _, bias, target, _ = args
        return getattr(ops, name)(
            x, weight, bias, target, example_weights=omega, **options
        )

    if by == "operations under func":
        gradient, value = torch.func.grad_and_value(loss)(args[1])
        second = torch.func.hessian(loss)(args[1])
    else:
        weight = args[1].requires_grad_()
        value = loss(weight)
        (gradient,) = torch.autograd.grad(value, weight, create_graph=True)
        second = torch.zeros(())
        if gradient.requires_grad:
            (second,) = torch.autograd.grad(gradient.sum(), weight)
    assert value.isnan() and not gradient.any() and not second.any()


@pytest.mark.parametrize("n", [0, 1, 128, 129, 400])
@pytest.mark.parametrize("bias", [True, False])
def test_products_in_blocks_of_rows(n, bias, monkeypatch):
    """A ragged last block, x that is not contiguous, and the same at once."""
    monkeypatch.setattr(_blocks, "BLOCK", 1)
    x, W, L = torch.randn(3, n).mT, torch.randn(2, 3), torch.randn(2, n)
    b = torch.randn(2) if bias else None
    parts = _blocks.blocks(x)
    assert sum(map(len, parts)) == n and len(parts) == max(1, -(-n // 128))
    z = F.linear(x, W, b).mT
    torch.testing.assert_close(_blocks.outputs(x, W, b), z)
    torch.testing.assert_close(_blocks.plus_sum(None, L, x), L @ x)
    torch.testing.assert_close(_blocks.plus_sum(W, L, x), W + L @ x)
    found = torch.func.vmap(lambda W: _blocks.outputs(x, W, b))(W[None])
    torch.testing.assert_close(found[0], z)


def test_outputs_are_never_materialised_when_there_are_many(monkeypatch):
    monkeypatch.setattr(formulas, "CHUNK", 1)
    monkeypatch.setattr(formulas, "KEEP", 0)
    largest = []

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and "mm" in str(function):
                largest.append(out.numel())
            return out

    x, W, b, t, _ = leaves(arguments("indices", n=2048, d=3, c=50))
    x = x.detach()
    with Largest():
        loss = ops.linear_cross_entropy(x, W, b, t)
        first = torch.autograd.grad(loss, [W, b], create_graph=True)
        torch.autograd.grad(first, [W, b], first)
    assert largest and max(largest) <= 256 * 50


@by_both
@pytest.mark.parametrize("case", ["indices", "probabilities", "logistic", "squared"])
def test_extreme_outputs_are_finite_and_right(case, by):
    name, kind, options = CASES[case]
    args = arguments(kind)
    args[0] = args[0] * 1e4
    ours = two_derivatives(getattr(ops, name), args, **options)
    assert all(bool(t.isfinite().all()) for t in ours)
    agree(ours, two_derivatives(plain(name), args, **options), 1e-10)


def test_one_output_without_a_dimension():
    x, W, b, t, w = arguments("real", c=1)
    for name in ("linear_logistic", "linear_squared_error"):
        for reduction in ("mean", "none"):
            options = {"reduction": reduction}
            squeezed = [x, W[0], b[0], t[:, 0], w]
            value = getattr(ops, name)(*squeezed[:4], example_weights=w, **options)
            other = plain(name)(x, W, b, t, w, **options)
            agree([value], [other.reshape(value.shape)], 1e-12)
            assert value.shape == ((6,) if reduction == "none" else ())


def test_one_example_without_a_dimension():
    x, W, b, t, _ = arguments("indices")
    for reduction in ("mean", "none"):
        value = ops.linear_cross_entropy(x[0], W, b, t[0], reduction=reduction)
        other = F.cross_entropy(F.linear(x[0], W, b), t[0], reduction=reduction)
        agree([value], [other], 1e-12)


def test_layouts():
    """Transposed, strided, expanded, channels-last."""
    x, W, b, t, w = arguments("indices", n=8, d=12)
    images = torch.randn(8, 3, 2, 2, dtype=torch.float64)
    images = images.to(memory_format=torch.channels_last)
    variants = [
        (x.T.contiguous().T, W.T.contiguous().T, b),
        (torch.cat([x, x], 1)[:, ::2], W[:, :].flip(0), b[:1].expand(3)),
        (images.flatten(1), W, b),
        (x[:1].expand(8, 12), W, b),
    ]
    for x_, W_, b_ in variants:
        args = [x_, W_, b_, t, w]
        ours = two_derivatives(ops.linear_cross_entropy, args)
        agree(ours, two_derivatives(plain("linear_cross_entropy"), args), 1e-12)


# relative errors of the loss and of both derivatives, against float64 on the stored numbers
STORED = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}  # rounding of what is returned


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("case", ["indices", "probabilities", "logistic", "squared"])
def test_16_bit_storage_accumulates_in_float32(case, dtype):
    name, kind, options = CASES[case]
    args = arguments(kind, n=300, d=40, c=5, dtype=dtype)
    exact = [t.double() if t.is_floating_point() else t for t in args]
    loss = getattr(ops, name)
    ours = two_derivatives(loss, args, reduction="sum", **options)
    theirs = two_derivatives(plain(name), exact, reduction="sum", **options)
    assert ours[0].dtype == torch.float32
    agree(ours[:1], theirs[:1], 1e-6)
    agree(ours[1:], theirs[1:], STORED[dtype])
    # with only the features stored so, no rounding is left
    exact = exact[:4]
    mixed = [args[0], *(t.float() if t.is_floating_point() else t for t in exact[1:])]

    def of_weights(loss, x, W, *rest):
        W = W.clone().requires_grad_()
        value = loss(x, W, *rest, reduction="sum", **options)
        (first,) = torch.autograd.grad(value, W, create_graph=True)
        return first, *torch.autograd.grad(first, W, exact[1].sin().to(W.dtype))

    agree(of_weights(loss, *mixed), of_weights(plain(name), *exact), 2e-6)


@pytest.mark.parametrize("case", ["indices", "logistic", "squared"])
def test_under_autocast(case):
    name, kind, options = CASES[case]
    args = arguments(kind, n=50, d=20, dtype=torch.float32)

    def inside(loss):
        def call(*a, **k):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss(*a, **k)

        return call

    ours = two_derivatives(inside(getattr(ops, name)), args, **options)
    assert all(t.dtype == torch.float32 for t in ours)
    agree(ours, two_derivatives(plain(name), args, **options), 2e-2)
    # a backward inside the region computes the same
    W = args[1].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = getattr(ops, name)(args[0], W, args[2], args[3], **options)
        (a,) = torch.autograd.grad(value, W, retain_graph=True)
    (b,) = torch.autograd.grad(value, W)
    assert torch.equal(a, b)


@by_both
@pytest.mark.parametrize("case", CASES)
def test_torch_func(case, by):
    """vmap over tasks, grad, vmap∘grad, grad∘grad and vmap∘grad∘grad equal the loop."""
    name, kind, options = CASES[case]
    tasks = [arguments(kind, seed=seed) for seed in range(3)]
    x, W, b, t, w = (torch.stack(parts) for parts in zip(*tasks, strict=True))

    def of(loss):
        def scalar(weight, x, b, t, w):
            return loss(x, weight, b, t, example_weights=w, **options)

        def curved(weight, x, b, t, w):
            inner = torch.func.grad(scalar)
            return torch.func.grad(
                lambda u: (inner(u, x, b, t, w) * weight.detach().sin()).sum()
            )(weight)

        maps = {"value": scalar, "grad": torch.func.grad(scalar), "second": curved}
        cross = torch.func.grad(
            lambda w, weight, x, b, t: torch.func.grad(scalar)(weight, x, b, t, w).sum()
        )
        found = {}
        for key, function in maps.items():
            found[key] = torch.func.vmap(function)(W, x, b, t, w)
            found[f"shared {key}"] = torch.func.vmap(
                function, in_dims=(0, None, None, None, None)
            )(W, x[0], b[0], t[0], w[0])
            found[f"one {key}"] = function(W[0], x[0], b[0], t[0], w[0])
        found["cross"] = torch.func.vmap(cross)(w, W, x, b, t)
        return found

    ours, theirs = of(getattr(ops, name)), of(plain(name))
    for key in theirs:
        agree([ours[key]], [theirs[key]], 1e-12)


def test_jacobians_of_both_kinds():
    x, W, b, t, _ = arguments("indices")

    def loss(weight):
        return ops.linear_cross_entropy(x, weight, b, t)

    def other(weight):
        return F.cross_entropy(F.linear(x, weight, b), t)

    jacobian = torch.func.jacrev(torch.func.grad(loss))(W)
    agree([jacobian], [torch.func.jacrev(torch.func.grad(other))(W)], 1e-12)


def test_the_cross_derivative_can_be_transposed():
    """Linear in the direction: ∂_v⟨J v, u⟩ = Jᵀ u, which needs the graph of a product."""
    for case in CASES:
        name, kind, options = CASES[case]
        found = []
        for loss in (getattr(ops, name), plain(name)):
            args = leaves(arguments(kind))
            value = loss(*args[:4], example_weights=args[4], **options)
            wanted = [t for t in args if t.requires_grad]
            first = torch.autograd.grad(value, wanted[:-1], create_graph=True)
            v = [torch.ones_like(t, requires_grad=True) for t in first]
            product = torch.autograd.grad(first, wanted, v, create_graph=True)
            u = [t.detach().sin() for t in wanted]
            found.append(torch.autograd.grad(product, v, u))
        agree(*found, 1e-12)


def test_a_third_derivative_raises():
    for case in CASES:
        name, kind, options = CASES[case]
        args = leaves(arguments(kind))
        value = getattr(ops, name)(*args[:4], example_weights=args[4], **options)
        (first,) = torch.autograd.grad(value, args[1], create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), args[1], create_graph=True)
        with pytest.raises(NoThirdDerivative, match="differentiated three times"):
            torch.autograd.grad(second.sum(), args[1])
    with pytest.raises(NoThirdDerivative):
        grad = torch.func.grad
        grad(lambda W: grad(lambda W: grad(value_of)(W).sum())(W).sum())(
            torch.ones(2, 2)
        )


def value_of(W):
    return ops.linear_cross_entropy(
        torch.eye(2), W, None, torch.tensor([0, 1])
    ).square()


def test_a_frozen_argument_costs_nothing():
    """No product with W where only W is trained: two matrix products a product."""
    names = []

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    x, W, b, t, w = arguments("indices")
    W.requires_grad_()
    w.requires_grad_()
    value = ops.linear_cross_entropy(x, W, b, t, example_weights=w)
    (first,) = torch.autograd.grad(value, W, create_graph=True)
    with Names():
        torch.autograd.grad(first, [W, w], torch.ones_like(W))
    assert sum("mm" in name for name in names) == 2


WRONG = {
    "reduction": ({"reduction": "average"}, "'mean', 'sum' or 'none'"),
    "x": ({"x": torch.zeros(2, 3, 4)}, r"x\.flatten\(0, -2\)"),
    "bias": ({"bias": torch.zeros(4)}, r"bias must be \(3,\)"),
    "integers": ({"x": torch.zeros(6, 4, dtype=torch.int64)}, r"x\.float\(\)"),
    "weights": ({"example_weights": torch.zeros(5)}, "each of the 6 rows"),
    "target": ({"target": torch.zeros(6, dtype=torch.int32)}, "int64 of shape"),
    "real": ({"target": torch.zeros(6, 2)}, r"outputs have shape \(6, 3\)"),
    "float classes": ({"target": torch.zeros(6)}, r"target\.long\(\)"),
    "layer": ({"weight": torch.nn.Linear(4, 3)}, r"layer\.weight, layer\.bias"),
    "number": ({"example_weights": 0.5}, "example_weights is a float"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit(what):
    changed, message = WRONG[what]
    x, W, b, t, w = arguments("indices")
    given = {"x": x, "weight": W, "bias": b, "target": t, "example_weights": w}
    with pytest.raises(InvalidLoss, match=message):
        ops.linear_cross_entropy(**{**given, **changed})


def test_every_operation_has_a_case():
    losses = set(ops.__all__) - {"solve_linear_heads"}  # test_heads.py
    assert {name for name, _, _ in CASES.values()} == losses


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_a_foreseen_direction_changes_nothing_but_the_cost(case, weighted, bias):
    """Loss, gradient and products along it, and along another direction; x is read twice."""
    name, kind, options = CASES[case]
    x, W, b, t, w = arguments(kind)
    W.requires_grad_(), b.requires_grad_(), w.requires_grad_()
    wanted = [W, b, w] if bias and weighted else [W, b] if bias else [W, w]
    if not (bias or weighted):
        wanted = [W]
    trained = wanted[: 2 if bias else 1]
    v = [torch.randn_like(p) for p in trained]
    other = [torch.randn_like(p) for p in trained]

    def run(loss):
        value = 3 * loss(
            x, W, b if bias else None, t,
            example_weights=w if weighted else None, **options,
        ) + W.square().sum()  # fmt: skip
        first = torch.autograd.grad(value, wanted, create_graph=True)
        products = [
            torch.autograd.grad(first[: len(v)], wanted, d, retain_graph=True)
            for d in (v, other)
        ]
        whole = torch.autograd.grad(
            first, wanted, [*v, torch.ones_like(w)][: len(wanted)], retain_graph=True
        )
        return [value, *first, *products[0], *products[1], *whole]

    with ops.foreseen(trained, v):
        ours = run(getattr(ops, name))
    agree(ours, run(plain(name)), 1e-12)


@pytest.mark.parametrize("case", CASES)
def test_a_foreseen_direction_over_chunks(case, monkeypatch):
    name, kind, options = CASES[case]
    x, W, b, t, w = arguments(kind, n=600)
    W.requires_grad_(), b.requires_grad_(), w.requires_grad_()
    v = [torch.randn_like(W), torch.randn_like(b)]

    def run():
        with ops.foreseen([W, b], v):
            value = getattr(ops, name)(x, W, b, t, example_weights=w, **options)
        first = torch.autograd.grad(value, [W, b, w], create_graph=True)
        return [value, *first, *torch.autograd.grad(first[:2], [W, b, w], v)]

    whole = run()
    monkeypatch.setattr(formulas, "KEEP", 0)
    monkeypatch.setattr(formulas, "CHUNK", 1)  # 256 rows
    agree(run(), whole, 1e-12)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the shape of what every matrix product multiplies from the left."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in str(function):
            self.shapes.append(tuple(args[-2].shape))
        return function(*args, **(kwargs or {}))


def test_what_a_foreseen_direction_saves():
    x, W, _, t, w = arguments("indices", n=8)
    W.requires_grad_(), w.requires_grad_()
    v = torch.randn_like(W)
    with ops.foreseen([W], [v]), Products() as seen:
        value = ops.linear_cross_entropy(x, W, None, t, example_weights=w)
        (first,) = torch.autograd.grad(value, W, create_graph=True)
        torch.autograd.grad(first, [W, w], v)
    assert seen.shapes == [(6, 4), (6, 8)]  # twice the classes, and nothing else
    with ops.foreseen([W], [v]):
        value = ops.linear_cross_entropy(x, W, None, t)
    (first,) = torch.autograd.grad(value, W, create_graph=True)
    with pytest.raises(NoThirdDerivative, match="single-loop"):
        torch.autograd.grad(first.sum(), W, create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_plain_operations_for_small_sizes(case, weighted, reduction):
    name, kind, options = CASES[case]
    args = arguments(kind)
    args[4] = args[4] if weighted else None
    options = {**options, "reduction": reduction}
    loss = getattr(ops, name)
    agree(
        two_derivatives(loss, args, **options),
        two_derivatives(plain(name), args, **options),
        1e-12,
    )
    value = loss(*leaves(args)[:4], **options)
    assert not type(value.grad_fn).__name__.startswith("_Loss")
    big = loss(*leaves(arguments(kind, n=2000, d=1500))[:4], **options).sum()
    nodes, names = [big.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [n for n, _ in node.next_functions if n is not None]
    assert any(name.startswith("_Loss") for name in names)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_logistic"])
def test_which_operations_many_outputs_of_few_features_are_made_of(name):
    """A softmax of many outputs costs more than a function in Python; a sigmoid does not."""
    kind = "indices" if name == "linear_cross_entropy" else "real"
    x, W, b, t, _ = leaves(arguments(kind, n=9000, d=2))
    made = type(getattr(ops, name)(x, W, b, t, reduction="sum").grad_fn).__name__
    assert made.startswith("_Loss") == (kind == "indices")


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("asked", ["W b", "w", "b", "x", "x w", "W w", "W b w", "b w"])
def test_any_part_of_a_product_alone_is_that_of_the_whole(asked, leaf, monkeypatch):
    """Any subset, of leaves and of what was computed, equals the whole."""
    monkeypatch.setattr(formulas, "SMALL", 0)
    x, W, b, t, w = arguments("indices", n=30)
    leaves = {"x": x, "W": W, "b": b, "w": w}
    leaves = {k: v.requires_grad_() for k, v in leaves.items()}
    at = leaves if leaf else {k: 1.5 * v for k, v in leaves.items()}
    loss = ops.linear_cross_entropy(
        at["x"], at["W"], at["b"], t, example_weights=at["w"]
    )
    first = torch.autograd.grad(loss, [at["W"], at["b"]], create_graph=True)
    v = [torch.randn_like(part) for part in first]
    found = torch.autograd.grad(
        first, [leaves[k] for k in asked.split()], v, retain_graph=True
    )
    whole = torch.autograd.grad(first, list(leaves.values()), v, retain_graph=True)
    whole = dict(zip(leaves, whole, strict=True))
    agree(found, [whole[k] for k in asked.split()], 1e-14)
    z = F.linear(at["x"], at["W"], at["b"])
    plain = (at["w"] * F.cross_entropy(z, t, reduction="none")).mean()
    first = torch.autograd.grad(plain, [at["W"], at["b"]], create_graph=True)
    known = torch.autograd.grad(first, [leaves[k] for k in asked.split()], v)
    agree(found, known, 1e-12)


def test_j_v_multiplies_nothing_with_x_but_v(monkeypatch):
    monkeypatch.setattr(formulas, "SMALL", 0)
    x, W, b, t, w = arguments("indices", n=30)
    W.requires_grad_(), w.requires_grad_()
    loss = ops.linear_cross_entropy(x, W, b, t, example_weights=w.sigmoid())
    first = torch.autograd.grad(loss, W, create_graph=True)
    v = [torch.randn_like(W)]
    for wanted, count in ((w, 1), (W, 2), ([W, w], 2)):
        with Products() as seen:
            torch.autograd.grad(first, wanted, v, retain_graph=True)
        assert len(seen.shapes) == count, (wanted, seen.shapes)
