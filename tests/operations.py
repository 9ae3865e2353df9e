"""One small inner loss per operation of PyTorch, for the products of every engine.

`OPERATIONS` maps a name to a builder of a `Case`: inner tensors y, an outer tensor x ∈ R³ and the
operation's outputs o(y) ∈ Rⁿ, from which every case has a loss of the same form,

    g(x, y) = Σ_i x_{i mod 3} sin(o_i(y)) + ½ mean_i o_i(y)²,

so that H depends on x, J ≠ 0, and H ≠ 0 even where the operation is piecewise linear. A row

    "pow": on(torch.pow, p(3, 4), n(3, 4))        "topk": linear(torch.topk, 2)

names a function and its arguments. What `n` (normal), `u` (uniform in (-0.9, 0.9)), `p` (uniform
in (0.5, 2)) and `spd` (symmetric positive definite) draw are inner tensors, ``n(3, 4)`` if there
are none; the rest are constants. ``module(make, ...)`` calls a module, whose parameters are inner
tensors too. Builders are deterministic.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, linalg, nn, special
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint


@dataclass
class Case:
    """An operation in an inner loss.

    Attributes:
        inner: the inner tensors y.
        outer: the outer tensor x.
        output: the operation's outputs as functions of y.
        plain: the same outputs without the fast path that the operation is about.
        module: the module it belongs to, with the buffers it updates.
        unsupported: what NoSecondDerivative says, where torch has no second derivative: the name
            of the operation, then the way round.
        smooth: False where the outputs are piecewise linear in y: their own second derivatives
            are zero and Gauss-Newton is exact.
        differentiable: False where the gradient is, on purpose, not that of a function.
    """

    inner: list[Tensor]
    outer: Tensor
    output: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    module: nn.Module | None = None
    unsupported: str | None = None
    smooth: bool = True
    differentiable: bool = True

    def loss(self) -> Tensor:
        """The inner loss, as a user writes it."""
        return head(self.output(), self.outer)

    def reference(self) -> Tensor:
        """The inner loss without the fast path."""
        return head(self.plain(), self.outer)


def head(out: Tensor, x: Tensor) -> Tensor:
    """Σ_i x_{i mod 3} sin(o_i) + ½ mean_i o_i²."""
    weights = x.repeat(-(-len(out) // 3))[: len(out)]
    return weights @ out.sin() + 0.5 * out.square().mean()


def outputs(found: Any) -> Tensor:
    """Every real output of an operation in one vector."""
    if isinstance(found, Tensor):
        return found.reshape(-1)
    parts = [outputs(part) for part in found if part is not None]
    return torch.cat([part for part in parts if part.is_floating_point()])


class Draw:
    """An inner tensor to be drawn."""

    def __init__(self, sample: Callable[..., Tensor], *shape: int):
        self.sample, self.shape = sample, shape

    def __call__(self, g: torch.Generator) -> Tensor:
        return self.sample(self.shape, generator=g, dtype=torch.float64)


def n(*shape: int) -> Draw:
    return Draw(torch.randn, *shape)


def p(*shape: int) -> Draw:
    return Draw(lambda *a, **k: 1.5 * torch.rand(*a, **k) + 0.5, *shape)


def u(*shape: int) -> Draw:
    return Draw(lambda *a, **k: 1.8 * torch.rand(*a, **k) - 0.9, *shape)


def spd(size: int) -> Draw:
    def sample(*args: Any, **kwargs: Any) -> Tensor:
        root = torch.randn(*args, **kwargs)
        return root @ root.T + torch.eye(size, dtype=root.dtype)

    return Draw(sample, size, size)


FLAGS = ("unsupported", "smooth", "differentiable")


def on(function: Callable[..., Any], *arguments: Any, plain: Any = None, **keywords):
    """A row: a function of inner tensors; ``plain`` is another way to compute the same."""
    flags = {name: keywords.pop(name) for name in FLAGS if name in keywords}
    if not any(isinstance(a, Draw) for a in arguments):
        arguments = (n(3, 4), *arguments)

    def build() -> Case:
        g = torch.Generator().manual_seed(7)
        args = [a(g).requires_grad_() if isinstance(a, Draw) else a for a in arguments]
        return Case(
            [a for a, b in zip(args, arguments, strict=True) if isinstance(b, Draw)],
            p(3)(g).requires_grad_(),
            lambda: outputs(function(*args, **keywords)),
            lambda: outputs((plain or function)(*args, **keywords)),
            **flags,
        )

    return build


def linear(function: Callable[..., Any], *arguments: Any, **keywords: Any):
    """A row whose outputs are (piecewise) linear in the inner tensors."""
    return on(function, *arguments, smooth=False, **keywords)


def module(make: Callable[[], nn.Module], *arguments: Any, **keywords: Any):
    """A row: a module, in training mode unless ``make`` says not.

    ``call`` and ``plain`` are functions of the module and the arguments.
    """
    call, plain = keywords.pop("call", None), keywords.pop("plain", None)

    def build() -> Case:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the old weight_norm
            torch.default_generator.manual_seed(3)
            made = make().double()
        case = on(
            partial(call, made) if call else made,
            *arguments,
            plain=plain and partial(plain, made),
            **keywords,
        )()
        case.module = made
        case.inner += list(made.parameters())
        return case

    return build


def named(space: Any, names: str, *arguments: Any, row: Any = on, **keywords: Any):
    """A row for each of several functions, named as they are."""
    return {
        name: row(getattr(space, name), *arguments, **keywords)
        for name in names.split()
    }


def missing(operation: str, way_round: str | None = None) -> str:
    """What the error says: torch's words with the operation, then the way round it."""
    return rf"(?s){operation}.*\n.*{way_round or operation}"


@cache
def grid_sample_twice() -> bool:
    """Whether this PyTorch has its second derivative: 2.11 does not, 2.13 does."""
    y = torch.zeros(1, 1, 2, 2, requires_grad=True)
    out = F.grid_sample(y, torch.zeros(1, 1, 1, 2), align_corners=False).square().sum()
    (g,) = torch.autograd.grad(out, y, create_graph=True)
    try:
        torch.autograd.grad(g.sum(), y)
    except RuntimeError:
        return False
    return True


def grid_sample(*arguments: Any, **keywords: Any):
    """A row of F.grid_sample."""
    unsupported = (
        None if grid_sample_twice() else missing("grid_sampler", "F.grid_sample")
    )
    return on(F.grid_sample, *arguments, **keywords, unsupported=unsupported)


def fixed(*shape: int) -> Tensor:
    """A constant: an input or a target."""
    return n(*shape)(torch.Generator().manual_seed(11))


CLASSES = torch.tensor([0, 2, 1, 3, 2])  # of five examples, four classes
SIGNS = torch.tensor([1.0, -1, 1, 1, -1], dtype=torch.float64)
TARGET, WEIGHTS, ONES = fixed(5, 4), fixed(4).exp(), torch.ones(4, dtype=torch.float64)
LABELS, MASK = (fixed(5, 4) > 0).double(), fixed(3, 4) > 0
INDEX = torch.tensor([[0, 2, 1, 1], [1, 0, 0, 2]])
BAGS = torch.tensor([[0, 2, 2], [1, 4, 3]])
SPARSE = torch.eye(4, dtype=torch.float64)[[0, 2, 2, 1, 3]].to_sparse()

SCORES = n(5, 4)
MLP, QKV, SEQUENCE = [n(5, 4), n(4, 3), n(3)], [n(1, 2, 4, 3)] * 3, n(4, 2, 3)
LINE, IMAGE, VOLUME = n(2, 3, 6), n(1, 2, 4, 4), n(1, 2, 3, 3, 3)


class Cube(torch.autograd.Function):
    """y³ with a backward of differentiable operations."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y**3

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return 3 * y**2 * grad


class CubeOnce(Cube):
    """y³ with a backward that cannot be differentiated."""

    backward = staticmethod(once_differentiable(Cube.backward))


@torch.library.custom_op("torch_bilevel_tests::cube", mutates_args=())
def cube(y: Tensor) -> Tensor:
    """y³ as a custom operator; its backward is another, which has no derivative."""
    return y**3


@torch.library.custom_op("torch_bilevel_tests::cube_backward", mutates_args=())
def cube_backward(y: Tensor, grad: Tensor) -> Tensor:
    return 3 * y**2 * grad


cube.register_autograd(
    lambda ctx, grad: cube_backward(ctx.saved_tensors[0], grad),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def mlp(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(x @ w + b).softmax(-1)


@cache
def compiled_mlp() -> Callable[..., Tensor]:
    """Made when first needed: importing the compiler takes seconds."""
    return torch.compile(mlp, backend="aot_eager")


def compiled(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return compiled_mlp()(x, w, b)


def gradient_penalty(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(mlp(x, w, b).square().sum(), x, create_graph=True)
    return g


def in_place(y: Tensor) -> Tensor:
    z = y.sin()
    z[0] *= y[1].sin()
    return z.mul_(y).clamp_(max=2.0)


def attention(q: Tensor, k: Tensor, v: Tensor, is_causal=False, **_: Any) -> Tensor:
    """Attention by its formula."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if is_causal:
        future = torch.ones(q.shape[-2], k.shape[-2]).triu(1).bool()
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(-1) @ v


def weight_norm(made: nn.Linear, x: Tensor) -> Tensor:
    """A normalised layer by its formula."""
    b, g, v = made.parameters()
    return F.linear(x, g * v / v.norm(dim=1, keepdim=True), b)


def sym(A: Tensor) -> Tensor:
    return (A + A.mT) / 2


def ctc(y: Tensor) -> Tensor:
    lengths = torch.tensor([6]), torch.tensor([2])
    return F.ctc_loss(y.log_softmax(-1), torch.tensor([[1, 2]]), *lengths)


def svd(A: Tensor) -> Tensor:
    U, S, V = linalg.svd(A, full_matrices=False)
    return U * S @ V.sin()  # the signs of the vectors cancel


def jagged(y: Tensor) -> Tensor:
    offsets = torch.tensor([0, 2, 5])
    return torch.nested.nested_tensor_from_jagged(y, offsets).sin().values()


def packed(made: nn.LSTM, y: Tensor) -> Tensor:
    return made(rnn.pack_padded_sequence(y, [4, 2]))[0].data


def functional_call(made: nn.Linear, y: Tensor) -> Tensor:
    parameters = {name: w.tanh() for name, w in made.named_parameters()}
    return torch.func.functional_call(made, parameters, (y,))


OPERATIONS: dict[str, Callable[[], Case]] = {
    # element by element
    **named(F, "celu elu selu gelu mish silu logsigmoid softplus softsign tanhshrink"),
    **named(F, "hardswish glu"),
    **named(F, "relu relu6 leaky_relu hardtanh hardshrink softshrink", row=linear),
    **named(torch, "exp expm1 sin cos tanh sigmoid sinh cosh asinh atan erf square"),
    **named(torch, "log log1p sqrt rsqrt reciprocal tan lgamma digamma", p(3, 4)),
    **named(torch, "asin acos atanh erfinv sinc", u(3, 4)),
    **named(special, "ndtr log_ndtr i0 i0e i1 i1e erfcx entr", p(3, 4)),
    **named(torch, "pow xlogy atan2 hypot logaddexp", p(3, 4), p(4)),
    "logit": on(lambda y: torch.logit(y.square()), u(3, 4)),
    "gelu, tanh": on(F.gelu, approximate="tanh"),
    "hardsigmoid": linear(F.hardsigmoid, unsupported=missing("hardsigmoid")),
    "prelu": on(F.prelu, n(3, 4), p(4)),
    "rrelu": linear(F.rrelu, training=True),
    "threshold": linear(F.threshold, 0.1, 0.2),
    "abs, sign": linear(lambda y: y.abs() + y.sign()),
    "clamp": linear(torch.clamp, -0.5, 0.8),
    "polygamma": on(torch.polygamma, 1, p(3, 4)),
    "multigammaln": on(lambda y: special.multigammaln(y + 1, 2), p(3, 4)),
    "lerp": on(torch.lerp, n(3, 4), n(3, 4), n(4)),
    "addcdiv": on(torch.addcdiv, n(3, 4), n(3, 4), p(4)),
    "in place": on(in_place, p(3, 4)),
    # losses
    **named(F, "mse_loss huber_loss smooth_l1_loss", SCORES, SCORES, reduction="none"),
    **named(F, "pairwise_distance cosine_similarity", SCORES, SCORES),
    **named(
        F,
        "triplet_margin_loss triplet_margin_with_distance_loss",
        *[SCORES] * 3,
        reduction="none",
    ),
    "cross_entropy": on(F.cross_entropy, SCORES, CLASSES),
    "cross_entropy, weighted": on(F.cross_entropy, SCORES, CLASSES, WEIGHTS),
    "cross_entropy, smoothed": on(
        F.cross_entropy, SCORES, CLASSES, label_smoothing=0.1
    ),
    "cross_entropy, probabilities": on(
        lambda y, t: F.cross_entropy(y, t.softmax(1)), SCORES, SCORES
    ),
    "nll_loss": linear(F.nll_loss, SCORES, CLASSES, reduction="none"),
    "nll_loss2d": linear(F.nll_loss, IMAGE, fixed(1, 4, 4).gt(0).long()),
    "binary_cross_entropy": on(F.binary_cross_entropy, Draw(torch.rand, 5, 4), LABELS),
    "binary_cross_entropy_with_logits": on(
        F.binary_cross_entropy_with_logits, SCORES, LABELS, pos_weight=WEIGHTS
    ),
    "l1_loss": linear(F.l1_loss, SCORES, SCORES, reduction="none"),
    "kl_div": on(
        lambda y, t: F.kl_div(y.log_softmax(1), t.softmax(1), reduction="batchmean"),
        SCORES,
        SCORES,
    ),
    "poisson_nll_loss": on(F.poisson_nll_loss, SCORES, TARGET.exp(), full=True),
    "gaussian_nll_loss": on(F.gaussian_nll_loss, SCORES, TARGET, p(5, 1)),
    "hinge_embedding_loss": linear(F.hinge_embedding_loss, SCORES, SIGNS[:, None]),
    "margin_ranking_loss": linear(F.margin_ranking_loss, n(5), n(5), SIGNS, 0.5),
    "soft_margin_loss": on(F.soft_margin_loss, n(5), SIGNS),
    "multi_margin_loss": linear(
        F.multi_margin_loss, SCORES, CLASSES, unsupported=missing("multi_margin_loss")
    ),
    "multilabel_margin_loss": linear(
        F.multilabel_margin_loss,
        n(2, 4),
        INDEX,
        unsupported=missing("multilabel_margin_loss"),
    ),
    "multilabel_soft_margin_loss": on(F.multilabel_soft_margin_loss, SCORES, LABELS),
    "cosine_embedding_loss": on(
        F.cosine_embedding_loss, SCORES, SCORES, SIGNS, margin=-1
    ),
    "ctc_loss": on(ctc, n(6, 1, 4), unsupported=missing("ctc_loss")),
    "adaptive_log_softmax": module(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 6, [2, 4], div_value=2),
        SCORES,
        CLASSES + 1,
    ),
    # products and convolutions
    "linear": on(F.linear, SCORES, n(3, 4), n(3)),
    "bilinear": on(F.bilinear, n(5, 3), n(5, 2), n(2, 3, 2), n(2)),
    "matmul": on(torch.matmul, n(2, 3, 4), n(4, 2)),
    "bmm": on(torch.bmm, n(2, 3, 4), n(2, 4, 2)),
    "baddbmm": on(torch.baddbmm, n(2, 3, 2), n(2, 3, 4), n(2, 4, 2)),
    "einsum": on(torch.einsum, "ij,jkl,lm->ikm", n(2, 3), n(3, 2, 2), n(2, 3)),
    "multi_dot": on(lambda *y: linalg.multi_dot(y), n(3, 2), n(2, 4), n(4, 3)),
    "kron": on(torch.kron, n(3, 1), n(1, 3)),
    "cross": on(linalg.cross, n(4, 3), n(4, 3)),
    "tensordot": on(torch.tensordot, n(2, 3, 4), n(3, 4, 2)),
    "sparse.mm": linear(torch.sparse.mm, SPARSE, n(4, 3)),
    "conv1d": on(F.conv1d, LINE, n(4, 3, 3), n(4), padding=1),
    "conv2d": on(F.conv2d, n(2, 4, 5, 5), n(4, 2, 3, 3), n(4), stride=2, groups=2),
    "conv2d, dilated": on(F.conv2d, n(1, 2, 6, 6), n(2, 2, 3, 3), dilation=2),
    "conv3d": on(F.conv3d, VOLUME, n(2, 2, 2, 2, 2), n(2)),
    "conv_transpose1d": on(F.conv_transpose1d, n(2, 3, 4), n(3, 2, 3), n(2)),
    "conv_transpose2d": on(F.conv_transpose2d, IMAGE, n(2, 2, 2, 2), stride=2),
    "conv_transpose3d": on(F.conv_transpose3d, n(1, 2, 2, 2, 2), n(2, 1, 2, 2, 2)),
    # normalisation
    "batch_norm": module(lambda: nn.BatchNorm1d(4), n(6, 4)),
    "batch_norm2d": module(lambda: nn.BatchNorm2d(2), n(3, 2, 3, 2)),
    "batch_norm, evaluated": module(lambda: nn.BatchNorm1d(4).eval(), n(6, 4)),
    "layer_norm": module(lambda: nn.LayerNorm(4), SCORES),
    "group_norm": module(lambda: nn.GroupNorm(2, 4), n(2, 4, 3)),
    "instance_norm": module(lambda: nn.InstanceNorm1d(3, affine=True), LINE),
    "rms_norm": module(lambda: nn.RMSNorm(4), SCORES),
    "local_response_norm": on(F.local_response_norm, LINE, 2, alpha=1),
    "normalize": on(F.normalize, SCORES),
    "weight_norm": module(
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)), SCORES, plain=weight_norm
    ),
    "weight_norm, as a hook": module(
        lambda: nn.utils.weight_norm(nn.Linear(4, 3)), SCORES, plain=weight_norm
    ),
    "spectral_norm": module(
        lambda: parametrizations.spectral_norm(nn.Linear(4, 3)),
        SCORES,
        differentiable=False,  # the singular vectors count as constants
    ),
    "spectral_norm, evaluated": module(
        lambda: parametrizations.spectral_norm(nn.Linear(4, 3)).eval(), SCORES
    ),
    "orthogonal": module(lambda: parametrizations.orthogonal(nn.Linear(3, 3)), n(5, 3)),
    # pooling and images
    **named(F, "max_pool1d avg_pool1d", LINE, 2, row=linear),
    **named(F, "max_pool2d avg_pool2d", IMAGE, 3, 1, 1, row=linear),
    **named(F, "max_pool3d avg_pool3d", VOLUME, 2, row=linear),
    **named(F, "adaptive_avg_pool1d adaptive_max_pool1d", LINE, 4, row=linear),
    **named(F, "adaptive_avg_pool2d adaptive_max_pool2d", IMAGE, 3, row=linear),
    **named(F, "adaptive_avg_pool3d adaptive_max_pool3d", VOLUME, 2, row=linear),
    "max_unpool2d": linear(
        lambda y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2), IMAGE
    ),
    "fractional_max_pool2d": linear(F.fractional_max_pool2d, n(1, 2, 5, 5), 2, 2),
    "lp_pool2d": on(F.lp_pool2d, p(1, 2, 4, 4), 3, 2),
    "interpolate nearest": linear(F.interpolate, IMAGE, 5),
    "interpolate linear": linear(F.interpolate, LINE, 5, mode="linear"),
    "interpolate bilinear": linear(F.interpolate, IMAGE, 5, mode="bilinear"),
    "interpolate bicubic": linear(F.interpolate, IMAGE, 5, mode="bicubic"),
    "interpolate trilinear": linear(F.interpolate, VOLUME, 4, mode="trilinear"),
    "interpolate area": linear(F.interpolate, IMAGE, 3, mode="area"),
    "interpolate, antialiased": linear(
        F.interpolate, IMAGE, 3, mode="bilinear", antialias=True
    ),
    "grid_sample": grid_sample(IMAGE, u(1, 3, 3, 2), align_corners=False),
    "grid_sample bicubic": grid_sample(
        IMAGE, u(1, 3, 3, 2), "bicubic", align_corners=False
    ),
    "grid_sample 3d": grid_sample(VOLUME, u(1, 2, 2, 2, 3), align_corners=True),
    "affine_grid": linear(F.affine_grid, n(2, 2, 3), [2, 1, 3, 3], align_corners=False),
    "pixel_shuffle": linear(F.pixel_shuffle, n(1, 4, 2, 3), 2),
    "channel_shuffle": linear(F.channel_shuffle, n(1, 4, 2, 3), 2),
    "unfold": linear(F.unfold, IMAGE, 2),
    "fold": linear(F.fold, n(1, 8, 6), (3, 4), 2),
    "pad constant": linear(F.pad, LINE, (1, 2), value=0.3),
    "pad reflect": linear(F.pad, LINE, (1, 2), "reflect"),
    "pad replicate": linear(F.pad, LINE, (1, 2), "replicate"),
    "pad circular": linear(F.pad, LINE, (1, 2), "circular"),
    # embeddings, recurrence, attention
    "embedding": linear(F.embedding, BAGS, n(5, 3)),
    "embedding, renormalised": linear(
        lambda w: F.embedding(BAGS, w.clone(), max_norm=0.7),
        n(5, 3),
        differentiable=False,  # rows are scaled in place, unseen by autograd
    ),
    "one_hot": linear(lambda w: F.one_hot(BAGS, 5).double() @ w, n(5, 3)),
    **{
        f"embedding_bag {mode}": linear(
            F.embedding_bag,
            BAGS,
            n(5, 3),
            mode=mode,
            unsupported=missing("embedding_bag", "EmbeddingBag: nn.Embedding"),
        )
        for mode in ("sum", "mean", "max")
    },
    "LSTM": module(lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True), SEQUENCE),
    "LSTM, projected": module(lambda: nn.LSTM(3, 4, proj_size=2), SEQUENCE),
    "LSTM, packed": module(lambda: nn.LSTM(3, 4), SEQUENCE, call=packed),
    "GRU": module(lambda: nn.GRU(3, 4), SEQUENCE),
    "RNN": module(lambda: nn.RNN(3, 4), SEQUENCE),
    "LSTMCell": module(lambda: nn.LSTMCell(3, 4), n(2, 3)),
    "GRUCell": module(lambda: nn.GRUCell(3, 4), n(2, 3)),
    "attention": on(F.scaled_dot_product_attention, *QKV, plain=attention),
    "attention, causal": on(
        F.scaled_dot_product_attention, *QKV, is_causal=True, plain=attention
    ),
    "attention, masked": on(F.scaled_dot_product_attention, *QKV, n(4, 4)),
    "attention, grouped": on(
        F.scaled_dot_product_attention,
        n(1, 2, 4, 3),
        *[n(1, 1, 4, 3)] * 2,
        enable_gqa=True,
        plain=attention,
    ),
    "MultiheadAttention": module(
        lambda: nn.MultiheadAttention(4, 2), *[n(3, 2, 4)] * 3, need_weights=False
    ),
    "TransformerEncoderLayer": module(
        lambda: nn.TransformerEncoderLayer(4, 2, 5, dropout=0.2), n(3, 2, 4)
    ),
    "TransformerDecoderLayer": module(
        lambda: nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, activation="gelu"),
        *[n(3, 1, 4)] * 2,
    ),
    # randomness
    "dropout": linear(F.dropout, p=0.3),
    "alpha_dropout": linear(F.alpha_dropout, p=0.3, training=True),
    "dropout2d": linear(F.dropout2d, n(2, 4, 2, 2)),
    "gumbel_softmax": on(F.gumbel_softmax),
    "Normal.rsample": linear(
        lambda m, s: torch.distributions.Normal(m, s).rsample(), n(3, 4), p(3, 4)
    ),
    "Gamma.rsample": on(
        lambda a: torch.distributions.Gamma(a, 2.0).rsample(),
        p(3, 4),
        unsupported=missing("standard_gamma"),
    ),
    "Dirichlet.rsample": on(
        lambda a: torch.distributions.Dirichlet(a).rsample(),
        p(3, 4),
        unsupported=missing("Dirichlet"),
    ),
    # distances and linear algebra
    "cdist": on(torch.cdist, n(3, 4), n(2, 4), unsupported=missing("cdist")),
    "cdist, p=1": linear(
        torch.cdist, n(3, 4), n(2, 4), 1, unsupported=missing("cdist")
    ),
    "pdist": on(F.pdist, unsupported=missing("pdist")),
    **named(linalg, "inv det slogdet matrix_exp", n(3, 3)),
    **named(linalg, "pinv qr svdvals vector_norm", n(4, 3)),
    "svd": on(svd, n(3, 2)),
    "solve": on(linalg.solve, spd(3), n(3, 2)),
    "solve_triangular": on(linalg.solve_triangular, spd(3), n(3, 2), upper=True),
    "lstsq": on(lambda A, b: linalg.lstsq(A, b).solution, n(4, 2), n(4, 1)),
    "cholesky": on(lambda A: linalg.cholesky(sym(A)), spd(3)),
    "cholesky_solve": on(
        lambda b, L: torch.cholesky_solve(b, L.tril()), n(3, 1), spd(3)
    ),
    "cholesky_inverse": on(lambda L: torch.cholesky_inverse(L.tril()), spd(3)),
    "logdet": on(torch.logdet, spd(3)),
    "eigvalsh": on(lambda A: linalg.eigvalsh(sym(A)), spd(3)),
    "eigh": on(lambda A: linalg.eigh(sym(A)).eigenvectors.square(), spd(3)),
    "eigvals": on(lambda A: linalg.eigvals(A).abs().sum(), n(3, 3)),
    "matrix_power": on(linalg.matrix_power, n(3, 3), 3),
    "lu": on(lambda A: linalg.lu(A)[1:], n(3, 3)),
    "householder_product": on(linalg.householder_product, u(4, 2), p(2)),
    "vector_norm, p=3": on(linalg.vector_norm, 3, dim=0),
    "vector_norm, p=1": linear(linalg.vector_norm, 1, dim=0),
    "vector_norm, p=inf": linear(linalg.vector_norm, torch.inf, dim=0),
    "nuclear norm": on(linalg.matrix_norm, "nuc"),
    "spectral norm of a matrix": on(linalg.matrix_norm, 2),
    "trace, diagonal": linear(lambda A: A.trace() + A.diagonal(), n(3, 3)),
    "tril, triu": linear(lambda A: A.tril() - 2 * A.triu(), n(3, 3)),
    # Fourier transforms and complex numbers
    "fft": on(lambda y: torch.fft.fft(y).abs(), n(2, 5)),
    "rfft, irfft": on(lambda y: torch.fft.irfft(torch.fft.rfft(y) ** 2), n(2, 6)),
    "fft2, angle": on(lambda y: torch.fft.fft2(y).angle()[1, 1:]),
    "stft": on(
        lambda y: torch.stft(y, 4, window=ONES, return_complex=True).abs(), n(12)
    ),
    "view_as_complex": on(lambda y: torch.view_as_complex(y).exp().real, n(3, 2)),
    "polar": on(lambda r, t: torch.view_as_real(torch.polar(r, t)), p(4), n(4)),
    # reductions, order and indices
    **named(torch, "var std logsumexp softmax log_softmax", dim=1),
    **named(torch, "prod cumprod logcumsumexp", dim=1),
    **named(F, "softmin", dim=1),
    **named(torch, "mean nansum cumsum amax median max", dim=1, row=linear),
    **named(torch, "cummax sort mode trapezoid diff", dim=1, row=linear),
    "prod with a zero": on(lambda y: (y * MASK).prod(1) + (y * MASK[:, :1]).prod(1)),
    "var_mean": on(torch.var_mean, 0),
    "kthvalue": linear(torch.kthvalue, 2, 1),
    "topk": linear(torch.topk, 2),
    "quantile": linear(torch.quantile, ONES[:2] / 3, dim=1),
    "gather": linear(torch.gather, 0, INDEX),
    "scatter": linear(torch.scatter, n(3, 4), 0, INDEX[:1], n(1, 4)),
    "scatter_add": linear(torch.scatter_add, n(3, 4), 0, INDEX, n(2, 4)),
    "scatter_reduce prod": on(torch.scatter_reduce, n(3, 4), 0, INDEX, n(2, 4), "prod"),
    "scatter_reduce mean": linear(
        torch.scatter_reduce, n(3, 4), 0, INDEX, n(2, 4), "mean"
    ),
    "scatter_reduce amax": linear(
        torch.scatter_reduce, n(3, 4), 0, INDEX, n(2, 4), "amax"
    ),
    "index_add": linear(torch.index_add, n(3, 4), 0, INDEX[0], n(4, 4)),
    "index_select": linear(torch.index_select, 0, INDEX[0]),
    "index_put": linear(torch.index_put, n(3, 4), (INDEX[0],), n(4, 4), True),
    "indexing": linear(lambda y: y[INDEX[0], INDEX[1]]),
    "masked_fill": linear(torch.masked_fill, MASK, 0.3),
    "masked_select": linear(torch.masked_select, MASK),
    "masked_scatter": linear(torch.masked_scatter, n(3, 4), MASK, n(12)),
    "where": linear(torch.where, MASK, n(3, 4), n(4)),
    "maximum": linear(torch.maximum, n(3, 4), n(3, 4)),
    "roll": linear(torch.roll, 1, 0),
    "flip": linear(torch.flip, (0,)),
    "cat, repeat": linear(lambda y: torch.cat([y, y.repeat(2, 1)])),
    "Tensor.unfold": linear(Tensor.unfold, 1, 3, 1),
    "as_strided": linear(torch.as_strided, (3, 3), (1, 3), 1),
    "renorm": on(torch.renorm, 2, 0, 0.5),
    # programs
    "checkpoint": on(partial(checkpoint, mlp, use_reentrant=False), *MLP, plain=mlp),
    "checkpoint, reentrant": on(
        partial(checkpoint, mlp, use_reentrant=True),
        *MLP,
        plain=mlp,
        unsupported=missing("checkpoint", "use_reentrant=False"),
    ),
    "compile": on(compiled, *MLP, plain=mlp),
    "autograd.Function": on(Cube.apply, plain=lambda y: y**3),
    "autograd.Function, once_differentiable": on(
        CubeOnce.apply,
        plain=lambda y: y**3,
        unsupported=missing("CubeOnce", "write its backward with differentiable"),
    ),
    "custom_op": on(
        cube,
        plain=lambda y: y**3,
        unsupported=missing("cube_backward", "register_autograd"),
    ),
    "func.vmap": on(torch.func.vmap(mlp, (0, None, None)), *MLP, plain=mlp),
    "func.grad": on(torch.func.vmap(torch.func.grad(lambda y: y.sin().prod()))),
    "func.jvp": on(lambda y, t: torch.func.jvp(torch.sin, (y,), (t,))[1], n(4), n(4)),
    "functional_call": module(lambda: nn.Linear(4, 3), SCORES, call=functional_call),
    "gradient penalty": on(gradient_penalty, *MLP),
    "nested_tensor": on(
        jagged, n(5, 3), plain=torch.sin, unsupported=missing("nested_tensor", "padded")
    ),
}
