"""`solve_linear_heads` against the Hessian of each head's loss, written with `torch.func`."""

import pytest
import torch
from torch.func import hessian
from torch.nn import functional as F

from torch_bilevel.errors import InvalidLoss, KernelUnavailable
from torch_bilevel.kernels.language import unavailable
from torch_bilevel.ops import solve_linear_heads

PLAIN = {
    "cross_entropy": F.cross_entropy,
    "logistic": F.binary_cross_entropy_with_logits,
    "squared_error": F.mse_loss,
}
NO_KERNELS = unavailable(torch.zeros(1))
KERNELS = [
    "torch",
    pytest.param(
        "one_program",
        marks=pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS)),
    ),
]


def heads(T=3, n=4, d=5, c=3, bias=True, dtype=torch.float64):
    x, W = torch.randn(T, n, d, dtype=dtype), torch.randn(T, c, d, dtype=dtype)
    b_W, b_b = torch.randn_like(W), torch.randn(T, c, dtype=dtype)
    b = torch.randn(T, c, dtype=dtype)
    return (x, W, b, b_W, b_b) if bias else (x, W, None, b_W, None)


def exact(x, W, b, b_W, b_b, damping, loss, omega):
    """The solution for one task, by the dense Hessian of its loss."""
    target = torch.zeros(len(x), dtype=torch.int64)
    if loss != "cross_entropy":
        target = torch.rand(len(x), len(W))
    shapes = [W.numel()] if b is None else [W.numel(), b.numel()]

    def value(flat):
        parts = flat.split(shapes)
        z = F.linear(x, parts[0].view_as(W), None if b is None else parts[1])
        losses = PLAIN[loss](z, target, reduction="none")
        losses = losses if losses.dim() == 1 else losses.mean(1)
        return (losses * omega).mean()

    flat, right = (
        torch.cat([p.flatten() for p in pair if p is not None])
        for pair in ((W, b), (b_W, b_b))
    )
    H = hessian(value)(flat)
    return torch.linalg.solve(H + damping * torch.eye(len(H)), right)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("loss", PLAIN)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n, d", [(4, 5), (4, 70), (9, 2), (1, 1)])
def test_solutions(kernel, loss, bias, n, d):
    given = heads(n=n, d=d, bias=bias)
    omega, damping = torch.rand(3, n), torch.tensor([0.5, 1.0, 2.0])
    found = solve_linear_heads(
        *given, damping=damping, num_steps=20, loss=loss, example_weights=omega,
        kernel=kernel,
    )  # fmt: skip
    for t in range(3):
        one = [part if part is None else part[t] for part in given]
        expected = exact(*one, damping[t], loss, omega[t])
        parts = [p[t].flatten() for p in found.value if p is not None]
        torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-7, atol=1e-9)
    assert (found.residual < 1e-8).all() and not found.negative_curvature.any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_task_that_is_done_or_cannot_be_solved_leaves_the_others_alone(kernel):
    x, W, b, b_W, b_b = heads()
    b_W[0], b_b[0] = 0, 0
    damping = torch.tensor([1.0, -5.0, 1.0])
    found = solve_linear_heads(
        x, W, b, b_W, b_b, damping=damping, num_steps=9, kernel=kernel
    )
    assert found.num_steps.tolist()[:2] == [0, 0] and found.num_steps[2] > 3
    assert found.negative_curvature.tolist() == [False, True, False]
    assert (found.value.weight[:2] == 0).all() and found.value.weight.isfinite().all()
    assert found.residual[0] == 0 and found.residual[2] < 0.1


def test_what_does_not_fit():
    x, W, b, b_W, b_b = heads()
    for args, options, message in (
        ((x[0], W, b, b_W, b_b), {}, r"\(T, n, d\)"),
        ((x, W, b[:2], b_W, b_b), {}, r"bias .*\(2, 3\).*\(3, 3\)"),
        ((x, W, b, b_W, None), {}, "both"),
        ((x, W, b, b_W.float(), b_b), {}, "float32.*float64"),
        ((x, W, b, b_W, b_b), {"loss": "hinge"}, "'hinge'.*'logistic'"),
        (tuple(t.half() for t in (x, W, b, b_W, b_b)), {}, r"x\.float\(\)"),
    ):
        with pytest.raises(InvalidLoss, match=message):
            solve_linear_heads(*args, damping=1.0, num_steps=1, **options)
    many = heads(c=17)
    for args, kernel, message in (
        ((x, W, b, b_W, b_b), "fast", "'one_program'"),
        (many, "one_program", NO_KERNELS or "17 classes"),
        (heads(n=65), "one_program", NO_KERNELS or "65 examples"),
    ):
        with pytest.raises(KernelUnavailable, match=message):
            solve_linear_heads(*args, damping=1.0, num_steps=1, kernel=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_damping_and_steps_are_checked(kernel):
    given = heads()
    options = {"num_steps": 5, "kernel": kernel}
    exact = solve_linear_heads(*given, damping=2.0, **options)
    for damping in (2, torch.tensor(2.0).expand(3), torch.full((6,), 2.0)[::2]):
        found = solve_linear_heads(*given, damping=damping, **options)
        torch.testing.assert_close(found.value.weight, exact.value.weight)
    for damping in (torch.ones(1), torch.ones(2), torch.ones(3, 1)):
        with pytest.raises(InvalidLoss, match=r"damping has shape .*\(3,\)"):
            solve_linear_heads(*given, damping=damping, **options)
    with pytest.raises(ValueError, match="num_steps"):
        solve_linear_heads(*given, damping=2.0, num_steps=-3, kernel=kernel)
    none = [part[:0] for part in given]
    assert len(solve_linear_heads(*none, damping=1.0, **options).residual) == 0
