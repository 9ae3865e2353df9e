"""Every Triton kernel against its `reference`, on a GPU or in Triton's interpreter.

Memory that nothing was written to is NaN in all of these tests.
"""

from __future__ import annotations

import contextlib
import itertools
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from torch_bilevel import ops
from torch_bilevel.errors import KernelUnavailable
from torch_bilevel.kernels import (
    cg_step,
    head_cg,
    joint,
    language,
    momentum_step,
    one_pass,
    richardson_step,
    rows,
    sums,
    two_pass,
)
from torch_bilevel.kernels.one_pass import Direction
from torch_bilevel.ops import fused
from torch_bilevel.ops.linear_cross_entropy import _Indices
from torch_bilevel.ops.linear_logistic import _Logistic
from torch_bilevel.ops.linear_squared_error import _Squared

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# relative errors against float64 on the same numbers
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])
LINKS = {
    "softmax": _Indices(),
    "smoothed": _Indices(smoothing=0.1),
    "logistic": _Logistic(),
    "squared": _Squared(),
}
DIFFERENT = ["smoothed", "logistic", "squared"]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan(monkeypatch):
    def poisoned(allocate):
        def call(*args, **options):
            found = allocate(*args, **options)
            return found.fill_(torch.nan) if found.is_floating_point() else found

        return call

    for owner in (torch, torch.Tensor):
        for name in {"empty", "empty_like", "new_empty"} & set(dir(owner)):
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape).to(DEVICE, dtype)


def mapped(change, value):
    """All numbers in a structure changed."""
    if isinstance(value, tuple):
        return type(value)(*(mapped(change, part) for part in value))
    numbers = isinstance(value, Tensor) and value.is_floating_point()
    return change(value) if numbers else value


exactly = partial(mapped, Tensor.double)


def flat(found):
    """All tensors of a result."""
    if isinstance(found, Tensor) or found is None:
        return [] if found is None else [found]
    return [tensor for part in found for tensor in flat(part)]


def close(found, exact, tolerance, size=0.0):
    """Relative errors in the norm, or against a size where sums cancel."""
    for one, other in zip(flat(found), flat(exact), strict=True):
        assert one.shape == other.shape
        scale = max(float(other.double().norm()), size)
        assert float((one.double() - other.double()).norm()) <= tolerance * scale


def same(found, other):
    return all(map(torch.equal, flat(found), flat(other)))


# kernels of losses


class Problem(NamedTuple):
    """What kernels of losses take."""

    link: Any
    x: Tensor
    at: Direction
    v: Direction
    both: Tensor  # W xᵀ and V xᵀ, (2c, n), rounded
    state: Tensor
    target: Tensor
    seed: Tensor
    share: Tensor | None
    omega: Tensor | None

    @property
    def u(self):
        return self.both[len(self.state) :]


def problem(n, d, c, dtype=torch.float64, link="smoothed", size=1.0):
    link, x = LINKS[link], size * draw(n, d, dtype=dtype)
    target = draw(c, n, dtype=dtype).sigmoid()
    if not link.elementwise:
        target = torch.randint(c, (n,)).to(DEVICE)
    scale = d**-0.5
    W, b, V, v = (draw(*s, dtype=dtype) for s in ((c, d), (c,), (c, d), (c,)))
    at, v = Direction(W * scale, b), Direction(V * scale, v)
    both = torch.cat([at.weight, v.weight]) @ x.mT
    state = link.value(both[:c] + b[:, None], target)[1]
    weights = [draw(*s, dtype=dtype).sigmoid() for s in ((), (n,), (n,))]
    return Problem(link, x, at, v, both, state, target, *weights)


def by_rows(p, **options):
    _, _, _, v, _, state, target, *weights = p
    return rows.curved_rows(p.link, state, target, p.u, *weights, v.bias, **options)


def of_rows(p):
    u = p.u if p.v.bias is None else p.u + p.v.bias[:, None]
    return rows.reference(p.link, p.state, p.target, u, p.seed, p.share, p.omega)


def by_joint_rows(p):
    biases = p.at.bias, p.v.bias
    return rows.joint_rows(p.link, p.both, biases, p.target, p.share, p.omega)


def of_joint_rows(p):
    """With the identity for x, outputs are weights, and gradients what stands before it."""
    at, v = Direction(p.both[: len(p.state)], p.at.bias), Direction(p.u, p.v.bias)
    p = p._replace(x=torch.eye(len(p.x), dtype=p.u.dtype, device=DEVICE), at=at, v=v)
    *numbers, gradient, product = of_joint(p)
    return numbers, torch.cat([gradient.weight, product.weight])


def by_one_pass(p, module=one_pass, **options):
    return module.hessian_product(p.link, p.x, p.v, *p[5:], **options)


def of_one_pass(p):
    return one_pass.reference(p.link, p.x, p.v, *p[5:])


def by_joint(p, module=joint, **options):
    losses, slopes, both, sums = module.joint_oracle(
        p.link, p.x, p.at, p.v, p.target, p.share, p.omega, **options
    )
    biases = [None, None] if p.at.bias is None else sums[:-1].view(2, -1)
    return sums[-1], losses, slopes, both[0], biases[0], both[1], biases[1]


def of_joint(p):
    return joint.reference(p.link, p.x, p.at, p.v, p.target, p.share, p.omega)


KERNELS = {
    "rows": (by_rows, of_rows),
    "joint_rows": (by_joint_rows, of_joint_rows),
    "one_pass": (by_one_pass, of_one_pass),
    "joint": (by_joint, of_joint),
    "two_pass": (partial(by_one_pass, module=two_pass), of_one_pass),
    "joint_two_pass": (partial(by_joint, module=two_pass), of_joint),
}
VISITS = ["one_pass", "joint", "two_pass", "joint_two_pass"]  # kernels that read x
N, D, C = (1, 3, 17, 1000), (1, 7, 64, 784, 1000), (1, 2, 10, 17)
SIZES = list(itertools.product(N, D, C))


def tiles(monkeypatch, rows, columns):
    """Others than the first, which the interpreter takes; large ones save it time."""
    if DEVICE == "cuda":
        return
    monkeypatch.setattr(sums, "COLUMNS", 4096)
    for kernel in (one_pass.CHUNKED, joint.JOINT):
        chosen = {"ROWS": rows, "COLUMNS": columns}
        monkeypatch.setattr(kernel, "configurations", [chosen])
    forward = two_pass.Forward(rows, 4, max(16, columns // 4), 4, 2)
    back = two_pass.Back(4, max(16, rows // 4), columns, 4, 2)
    monkeypatch.setattr(two_pass, "forward_tile", lambda *_: forward)
    monkeypatch.setattr(two_pass, "back_tile", lambda *_: back)


def agree(kernel, given, tolerance, **options):
    """Few rows may cancel: or what relative changes of that size in the numbers given do."""
    by, of = KERNELS[kernel]
    numbers = exactly(given)
    found, exact = flat(by(given, **options)), flat(of(numbers))

    def shaken(t):
        return t + tolerance * t * torch.randn_like(t).sign()

    times = 3 if len(given.x) < 100 else 0
    moved = [flat(of(mapped(shaken, numbers))) for _ in range(times)]
    for one, other, *near in zip(found, exact, *moved, strict=True):
        sizes = [float((t - other).norm()) / tolerance for t in near]
        close(one, other, tolerance, max(sizes, default=0.0))


@pytest.mark.parametrize("c", C)
@pytest.mark.parametrize("n", N)
@pytest.mark.parametrize("link", DIFFERENT)
@DTYPES
@pytest.mark.parametrize("kernel", ["rows", "joint_rows"])
def test_rows_at_every_size(kernel, dtype, link, n, c):
    if c == 1 and not LINKS[link].elementwise:
        link = "logistic"
    agree(kernel, problem(n, 5, c, dtype, link), TOLERANCE[dtype])


def turns(sizes, expensive):
    """Sizes with their numbers and dtypes: both, or by turns where that takes long."""
    found = itertools.product(enumerate(TOLERANCE), enumerate(sizes))
    return [
        pytest.param(dtype, i + j, *size, id="-".join(map(str, [dtype, *size]))[6:])
        for (i, dtype), (j, size) in found
        if not expensive(size) or (i + j) % 2
    ]


@pytest.mark.parametrize(
    "dtype, turn, n, d, c", turns(SIZES, lambda size: size[0] * size[1] > 2000)
)
@pytest.mark.parametrize("kernel", VISITS)
def test_products_at_every_size(kernel, dtype, turn, n, d, c, monkeypatch):
    """Links take turns."""
    tiles(monkeypatch, 128 if n > 100 else 16, min(256, language.padded(d, 16)))
    links = list(LINKS) if c > 1 else ["logistic", "squared"]
    link = links[(turn + turn // 4) % len(links)]
    agree(kernel, problem(n, d, c, dtype, link), TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_class_leaves_nothing_to_learn(kernel):
    """Softmax of one output: rounding of 1 − p, and of sums of it over rows."""
    found = flat(KERNELS[kernel][0](problem(1000, 7, 1, torch.float32)))
    assert all(float(t.abs().max()) <= 1e-7 * 1000 for t in found)


@pytest.mark.parametrize("size", [None, (16, 32), (128, 16)])
@pytest.mark.parametrize("link", DIFFERENT)
@pytest.mark.parametrize("kernel", VISITS)
def test_tiles_as_launched_and_others(kernel, link, size, monkeypatch):
    if size:
        tiles(monkeypatch, *size)
    agree(kernel, problem(100, 140, 10, torch.float32, link), 1e-6)


@pytest.mark.parametrize("classes", [3, 20])
@pytest.mark.parametrize("many", [2**11, 2**14])
@pytest.mark.parametrize("kernel", ["two_pass", "joint_two_pass"])
def test_tiles_of_many_rows(kernel, many, classes, monkeypatch):
    """As launched for so many rows; parts of several tiles, the last one ragged."""
    forward, back = two_pass.forward_tile, two_pass.back_tile
    monkeypatch.setattr(two_pass, "forward_tile", lambda n, *a: forward(many, *a))
    monkeypatch.setattr(two_pass, "back_tile", lambda n, *a: back(many, *a))
    monkeypatch.setattr(language, "INTERPRETED_PROGRAMS", 40)
    agree(kernel, problem(700, 150, classes, torch.float32, "softmax"), 1e-6)


@pytest.mark.parametrize("d", [20, 100, 200, 500, 1000])
@pytest.mark.parametrize("kernel", VISITS)
def test_tf32_where_it_is_allowed(kernel, d):
    """A tile of x stays on the chip up to 1024 features; the interpreter does not round."""
    tolerance = 1e-6 if DEVICE == "cpu" else 2e-3
    agree(kernel, problem(40, d, 10, torch.float32), tolerance, tf32=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("share", ["none", "one", "each"])
@pytest.mark.parametrize("seed", ["one", "each"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_options(kernel, seed, share, weighted, bias):
    """s and κ for all rows or for each, with and without κ, ω and biases."""
    given = problem(17, 7, 3)
    shares = {"none": None, "one": given.seed.cos(), "each": given.share}
    given = given._replace(share=shares[share])
    if seed == "each":
        given = given._replace(seed=draw(17))
    if not weighted:
        given = given._replace(omega=None)
    if not bias:
        at, v = given.at._replace(bias=None), given.v._replace(bias=None)
        given = given._replace(at=at, v=v)
    agree(kernel, given, 1e-12)


@pytest.fixture
def untuned():
    """On a GPU a kernel called with other arguments is tuned anew, and sums in another order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kernel", ["rows", "two_pass", "one_pass"])
def test_slopes_that_are_not_wanted(kernel, untuned):
    given, (found, _) = problem(17, 7, 3), KERNELS[kernel]
    *product, slopes = found(given, wants_slope=False)
    assert slopes is None and same(product, found(given)[:-1])


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [40, 140])
@pytest.mark.parametrize("kernel", VISITS)
def test_16_bit_features_and_float32_weights(kernel, d, stored):
    for link in LINKS:
        given = problem(40, d, 10, torch.float32, link)
        agree(kernel, given._replace(x=given.x.to(stored)), 1e-6)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("kernel", ["joint_rows", "joint", "joint_two_pass"])
def test_extreme_outputs(kernel, link):
    agree(kernel, problem(60, 7, 3, link=link, size=1e4), 1e-12)


@DTYPES
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_call_gives_the_same_bits(kernel, dtype):
    given, (found, _) = problem(150, 130, 10, dtype), KERNELS[kernel]
    assert same(found(given), found(given))


@pytest.mark.parametrize(
    "shape", [(1,), (2, 1), (300, 1), (2, 129), (300, 129), (17, 3, 43), (17, 5000)]
)
@DTYPES
def test_sums(dtype, shape):
    parts = draw(*shape, dtype=dtype)
    narrow, size = draw(999, 21, dtype=dtype), float(parts.double().norm())
    exact = [sums.reference(exactly(array)) for array in (parts, narrow)]
    close(sums.summed(parts), exact[0], TOLERANCE[dtype], size)
    found = sums.both_summed(parts, narrow)
    close(found, exact, TOLERANCE[dtype], size)
    assert same(found, sums.both_summed(parts, narrow))


# steps on vectors


def reflected(n, dtype):
    """v ↦ A v with eigenvalues from 1 to 2, of which the largest is simple, and b."""
    w, values = draw(n, dtype=dtype), torch.linspace(2, 1, n).to(DEVICE, dtype)
    w = w / w.norm()

    def mirrored(v):
        return v - 2 * w * torch.dot(w, v)

    return (lambda v: mirrored(values * mirrored(v))), draw(n, dtype=dtype)


def started(name, b, rtol):
    """From zero; step sizes and momentum for eigenvalues from 1 to 2, of at most 2.2."""
    numbers = torch.tensor([0.5, 0.4, 0.1, 2.2]).to(b)
    start, target, cold = torch.zeros_like(b), rtol**2 * b.dot(b), b[0] == b[0]
    if name == "cg":
        return cg_step.started(b, target, cold)
    if name == "richardson":
        return richardson_step.started(start, b, numbers[0], target, cold)
    coefficients = tuple(numbers[:3])
    return momentum_step.started(start, b, coefficients, numbers[3], target, cold)


def both(module, **options):
    """A step by the kernel and by its reference, and the module with the names of flags."""
    step = getattr(module, module.__name__.split(".")[-1])
    return partial(step, **options), partial(module.reference, **options), module


STEPS = {
    "cg": both(cg_step),
    "richardson": both(richardson_step),
    "heavy ball": both(momentum_step, ahead=False, watch=True),
    "nesterov": both(momentum_step, ahead=True, watch=True),
}
EACH = pytest.mark.parametrize("name", STEPS)


def copied(state):
    return type(state)(*(t.clone() if isinstance(t, Tensor) else t for t in state))


def vectors(state):
    """x, r and what else moves; not A p."""
    if isinstance(state, cg_step.State):
        return list(state.rows[:3, : state.size])
    return [t for t in state if t.dim() == 1]


def added_up(state):
    """The parts of all programs in the first place, where references have their sum."""
    parts = torch.zeros_like(state.parts)
    parts[..., 0] = state.parts.sum(-1)
    return copied(state._replace(parts=parts))


def run(step, state, times, steps):
    for k in range(steps):
        state = step(state, times(state.direction), k)
    return state


@pytest.mark.parametrize("n", [1, 3, 17, 1000, 4097])
@DTYPES
@EACH
def test_a_step_equals_its_reference(name, dtype, n):
    """At all states of an iteration that stops on its way; flags in the same precision."""
    step, reference, _ = STEPS[name]
    times, b = reflected(n, dtype)
    state, tolerance, size = started(name, b, 0.05), TOLERANCE[dtype], float(b.dot(b))
    for k in range(7):
        going, q, before = state.going(k) != 0, times(state.direction), added_up(state)
        exact = reference(exactly(copied(before)), exactly(q), k)
        alike = reference(copied(before), q.clone(), k)
        state = step(state, q, k)
        assert same(state.flags[:, :7], alike.flags[:, :7])
        # where it has stopped, no one needs the direction and the numbers of CG
        moved = slice(None if going or name != "cg" else 2)
        states = (vectors(s)[moved] for s in (state, exact, before))
        for found, other, old in zip(*states, strict=True):
            close(found, other, tolerance, float(old.norm()))
        if going:
            close(state.numbers, exact.numbers, tolerance)
            if name != "cg":
                close(added_up(state).parts, exact.parts, tolerance, size)


@DTYPES
@EACH
def test_steps_give_the_same_bits(name, dtype):
    times, b = reflected(4097, dtype)
    found = [run(STEPS[name][0], started(name, b, 0), times, 2) for _ in "ab"]
    found = [(vectors(state), state.numbers, state.flags) for state in found]
    assert same(*found)


@EACH
def test_solutions(name):
    step, _, module = STEPS[name]
    times, b = reflected(17, torch.float64)
    state = run(step, started(name, b, 0), times, 32)
    A = torch.stack([times(e) for e in torch.eye(17).to(b)])
    unit = state.numbers[0, module.UNIT] if name == "cg" else 1
    close(vectors(state)[0] / unit, torch.linalg.solve(A, b), 1e-8)
    assert not state.flags[:, module.BROKEN].any()


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 0), (torch.float64, 0.01)])
@EACH
def test_far_past_convergence(name, dtype, rtol):
    """No NaN; once it has stopped, and has looked at the last iterate, nothing moves."""
    times, b = reflected(3, dtype)
    state, stopped = started(name, b, rtol), []
    for k in range(60 if rtol == 0 else 24):
        going = state.going(k) != 0
        state = STEPS[name][0](state, times(state.direction), k)
        stopped += [] if going else [copied(state)]
    assert not any(t.isnan().any() for t in [*vectors(state), state.numbers])
    assert stopped or rtol == 0
    assert all(same(vectors(state), vectors(other)) for other in stopped)


@EACH
def test_no_right_hand_side(name):
    times, b = reflected(17, torch.float32)
    state = run(STEPS[name][0], started(name, 0 * b, 0.01), times, 4)
    assert not any(t.any() for t in vectors(state))
    assert not state.numbers.isnan().any() and not state.going(4)


@pytest.mark.parametrize("n", [1, 17, 4097])
@EACH
def test_negative_curvature(name, n):
    """Is flagged where steps stop at it, after one step along b, and has its number."""
    *steps, module = STEPS[name]
    times, b = reflected(n, torch.float64)
    start = started(name, b, 0.01)
    found, exact = (run(f, copied(start), lambda v: -times(v), 4) for f in steps)
    close(vectors(found), vectors(exact), 1e-12)
    assert same(found.flags[:, :7], exact.flags[:, :7])
    assert found.numbers[0, module.CURVATURE] < 0
    if name != "richardson":
        assert found.flags[0, module.NEGATIVE] and not found.going(4)


@pytest.mark.parametrize("factor, watch", [(2.2, False), (1.2, True), (6, True)])
@pytest.mark.parametrize("ahead", [True, False])
def test_divergence(ahead, factor, watch):
    """A residual that grows, by 1.2 in the first case; a product of more than L is enough."""
    *steps, module = both(momentum_step, ahead=ahead, watch=watch)
    times, b = reflected(1, torch.float64)
    start = started("nesterov", b, 0.01)
    found, exact = (
        run(f, copied(start), lambda v: factor * times(v), 2) for f in steps
    )
    close(vectors(found), vectors(exact), 1e-12)
    assert same(found.flags[:, :7], exact.flags[:, :7])
    assert found.flags[0, module.DIVERGED] and not found.going(2)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@EACH
def test_a_product_that_is_not_finite(name, value):
    *steps, module = STEPS[name]
    b = draw(17)
    for step in steps:  # the second looks at what the first has done
        state = run(step, started(name, b, 0.01), lambda v: 0 * v + value, 2)
        assert state.flags[0, module.BROKEN]


# all steps of conjugate gradients for many heads


class Heads(NamedTuple):
    """What `head_cg` takes."""

    link: Any
    x: Tensor
    state: Tensor
    scale: Tensor
    damping: Tensor
    b: Direction


def heads(T, n, d, c, dtype=torch.float64, link="softmax", bias=True):
    link, state = LINKS[link], draw(T, c, n, dtype=dtype)
    state = state if link.elementwise else state.softmax(1)
    x, scale = draw(T, n, d, dtype=dtype) * d**-0.5, draw(T, n, dtype=dtype).sigmoid()
    b = Direction(draw(T, c, d, dtype=dtype), draw(T, c, dtype=dtype) if bias else None)
    return Heads(link, x, state, scale, torch.ones((), dtype=dtype, device=DEVICE), b)


def dense(given, damping):
    """The matrices of all tasks, (T, c(d + 1), c(d + 1))."""
    link, (_, c, n) = given.link, given.state.shape
    x = torch.cat([given.x, torch.ones_like(given.x[..., :1])], 2)
    target = torch.zeros((c, n) if link.elementwise else n, dtype=torch.int64)
    basis = torch.eye(c).to(x)[:, :, None].expand(c, c, n)
    found = []
    for x_, p, a in zip(x, given.state, given.scale, strict=True):
        H = torch.stack([link.along(p, target.to(x.device), e)[1] for e in basis])
        A = torch.einsum("kcn,n,nd,ne->cdke", H, a, x_, x_)
        found.append(A.reshape(c * x.shape[2], -1))
    return torch.stack(found) + damping[:, None, None] * torch.eye(len(found[0])).to(x)


HEADS = list(itertools.product((1, 3, 17), (1, 7, 64, 784, 1000), (1, 2, 10, 16)))


@pytest.mark.parametrize(
    "dtype, turn, n, d, c", turns(HEADS, lambda size: size[1] > 500)
)
def test_heads_at_every_size(dtype, turn, n, d, c):
    """Links and biases take turns."""
    link = list(LINKS)[(turn + turn // 4) % len(LINKS)]
    given = heads(2 if d < 100 else 1, n, d, c, dtype, link, bias=turn % 3 > 0)
    found = head_cg.head_cg(*given, 3)
    exact = head_cg.reference(*exactly(given), 3)
    close(found.value, exact.value, TOLERANCE[dtype])
    close(found.residual, exact.residual, TOLERANCE[dtype], 1.0)
    assert not found.negative_curvature.any()


@pytest.mark.parametrize("n, d", [(3, 2), (3, 100)])
@pytest.mark.parametrize("link", DIFFERENT)
def test_heads_are_solved(link, n, d):
    """One task, beside one without right-hand side and one of negative curvature."""
    given = heads(3, n, d, 2, link=link)
    given.b.weight[1], given.b.bias[1] = 0, 0
    damping = torch.tensor([1.0, 1.0, -1.0]).to(DEVICE)
    found, again = (head_cg.head_cg(*given[:4], damping, given.b, 8) for _ in "ab")
    assert same(found, again)
    right = torch.cat([given.b.weight, given.b.bias[..., None]], 2).flatten(1)
    exact = torch.linalg.solve(dense(given, damping), right).view(3, 2, d + 1)
    value = torch.cat([found.value.weight, found.value.bias[..., None]], 2)
    close(value[0], exact[0], 1e-9)
    assert not value[1].any() and found.num_steps[1] == 0 and found.residual[1] == 0
    assert found.negative_curvature.tolist() == [False, False, True]
    assert all(t.isfinite().all() for t in flat(found))
    reference = head_cg.reference(*given[:4], damping, given.b, 8)
    close(found.value, reference.value, 1e-9)
    assert found.num_steps[2] == reference.num_steps[2]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("d", [4, 100])
def test_nan_stays_nan_and_in_its_task(d):
    given = heads(2, 5, d, 2)
    given.x[0, 1, 2] = torch.nan
    first, second = head_cg.head_cg(*given, 3).value.weight
    assert first.isnan().any() and second.isfinite().all()


@pytest.mark.parametrize(
    "n, c, why", [(64, 16, None), (5, 17, "17 classes"), (65, 5, "65 examples")]
)
def test_tasks_that_do_not_suit(n, c, why):
    found = head_cg.suits(n, c)
    assert found is None if why is None else found.startswith(why)


# operations


class Called(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))

    def kernels(self):
        return {name for name in self.names if name.startswith("torch_bilevel")}


LOSSES = ["linear_cross_entropy", "linear_logistic", "linear_squared_error"]


def two_derivatives(name, kernel, foreseen):
    """Value, gradient, product with the Hessian and its derivative in ω; kernels called."""
    torch.manual_seed(3)
    x, W, b, omega = draw(40, 6), draw(3, 6), draw(3), draw(40).sigmoid()
    target = torch.randint(3, (40,)).to(DEVICE)
    if name != "linear_cross_entropy":
        target = draw(40, 3).sigmoid()
    v, leaves = [W.sin(), b.cos()], [t.requires_grad_() for t in (W, b, omega)]
    known = ops.foreseen(leaves[:2], v) if foreseen else contextlib.nullcontext()
    loss, options = getattr(ops, name), {"example_weights": omega, "kernel": kernel}
    with Called() as called:
        with known:
            value = loss(x, W, b, target, **options)
        first = torch.autograd.grad(value, leaves, create_graph=True)
        products = torch.autograd.grad(first[:2], leaves, v)
    found = value.detach(), [t.detach() for t in first], products
    return found, called.kernels()


@pytest.mark.parametrize("foreseen", [True, False])
@pytest.mark.parametrize("kernel", ["rows", "two_pass", "one_pass"])
@pytest.mark.parametrize("name", LOSSES)
def test_operations_by_kernels(name, kernel, foreseen):
    found, called = two_derivatives(name, kernel, foreseen)
    exact, none = two_derivatives(name, "torch", foreseen)
    close(found, exact, 1e-12)
    called_for = "joint_oracle" if foreseen else "hessian_product"
    assert called == {f"torch_bilevel.linear_{called_for}.default"} and not none


@pytest.mark.parametrize("kernel", ["torch", "rows", "two_pass", "one_pass"])
def test_losses_may_be_changed_in_place(kernel):
    x, W, t = draw(9, 4), draw(3, 4).requires_grad_(), torch.zeros(9, dtype=torch.int64)
    with ops.foreseen([W], [W.detach().sin()]):
        loss = ops.linear_cross_entropy(x, W, None, t.to(DEVICE), kernel=kernel)
    loss += W.square().sum()
    (found,) = torch.autograd.grad(loss, W)
    plain = torch.nn.functional.cross_entropy(x @ W.mT, t.to(DEVICE)) + W.square().sum()
    close(found, torch.autograd.grad(plain, W)[0], 1e-12)


@pytest.mark.parametrize("kernel", ["rows", "two_pass", "one_pass"])
def test_kernels_are_operations(kernel):
    """Schemas, and shapes without memory."""
    given = problem(17, 7, 3)
    link = given.link.kind, given.link.smoothing, kernel
    checks = {"test_utils": ("test_schema", "test_faketensor")}
    for slopes in (True, False):
        args = given.x, *given.v, *given[5:], *link, slopes, False
        torch.library.opcheck(fused._hessian_product, args, **checks)
    args = given.x, *given.at, *given.v, given.target, *given[8:], *link, False
    torch.library.opcheck(fused._joint_oracle, args, **checks)


@pytest.mark.skipif(DEVICE == "cuda", reason="about the CPU")
def test_auto_never_takes_a_kernel_on_the_cpu():
    for foreseen in (True, False):
        assert not two_derivatives("linear_cross_entropy", "auto", foreseen)[1]


REFUSED = {
    "write 'auto', 'torch', 'rows', 'two_pass', 'one_pass'": lambda loss, *a: loss(
        *a, kernel="x"
    ),
    "a function transform": lambda loss, x, W, b, t: torch.func.vmap(
        lambda x: loss(x, W, b, t, kernel="rows")
    )(x[None]),
    "class probabilities": lambda loss, x, W, b, t: loss(
        x, W, b, torch.eye(3).to(x)[t], kernel="rows"
    ),
    r"strides \(1, 5\)": lambda loss, x, *a: loss(
        x.T.contiguous().T, *a, kernel="rows"
    ),
    "is empty": lambda loss, x, W, b, t: loss(x[:0], W, b, t[:0], kernel="rows"),
    "33 classes, and a program holds 32": lambda loss, x, W, b, t: loss(
        x, W.repeat(11, 1), None, t, kernel="two_pass"
    ),
    "66 classes, and a program holds 64": lambda loss, x, W, b, t: loss(
        x, W.repeat(22, 1), None, t, kernel="one_pass"
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_kernel_that_cannot_run_says_why(why):
    x, W, b, t = draw(5, 4), draw(3, 4), draw(3), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(KernelUnavailable, match=why):
        REFUSED[why](ops.linear_cross_entropy, x, W, b, t.to(DEVICE))


@pytest.mark.parametrize(
    "name, value, why",
    [
        ("triton", None, "Triton is not installed"),
        ("INTERPRETED", False, "the tensors are on cpu"),
    ],
)
def test_where_no_kernel_can_run(name, value, why, monkeypatch):
    monkeypatch.setattr(language, name, value)
    arguments = torch.ones(5, 4), torch.ones(3, 4), None, torch.ones(5, 3)
    with pytest.raises(KernelUnavailable, match=f"cannot run here: {why}"):
        ops.linear_logistic(*arguments, kernel="rows")


@pytest.mark.parametrize("kernel", ["rows", "two_pass", "one_pass"])
@pytest.mark.parametrize("foreseen", [False, True])
def test_arguments_with_strides(kernel, foreseen):
    """Columns of a matrix as weights of examples and bias, and the seed of a sum of losses."""
    x, t = draw(9, 4), torch.randint(3, (9,)).to(DEVICE)
    P, w = draw(3, 5).requires_grad_(), draw(9, 2).requires_grad_()
    v = [draw(3, 8)[:, ::2], draw(3, 2)[:, 0]]

    def products(name):
        W, b, omega = P[:, :-1], P[:, -1], w[:, 1]
        if foreseen:
            W, b = W.detach().requires_grad_(), b.detach().requires_grad_()
            with ops.foreseen([W, b], v):
                loss = ops.linear_cross_entropy(
                    x, W, b, t, example_weights=omega, kernel=name
                )
            first = torch.autograd.grad(loss, [W, b], create_graph=True)
            return torch.autograd.grad(first, [W, b, w], v)
        loss = ops.linear_cross_entropy(
            x, W, b, t, example_weights=omega, kernel=name, reduction="none"
        ).sum()
        (first,) = torch.autograd.grad(loss, P, create_graph=True)
        return torch.autograd.grad(first, [P, w], torch.cat([v[0], v[1][:, None]], 1))

    close(products(kernel), products("torch"), 1e-12)


def test_programs_without_a_tile(monkeypatch):
    """More programs than tiles: as many rows as the smallest tile, in the largest one."""
    monkeypatch.setattr(one_pass, "LEAST_ROWS", 1)
    monkeypatch.setattr(joint, "LEAST_ROWS", 1)
    given = problem(5, 200, 3)
    for kernel in ("one_pass", "joint"):
        by, of = KERNELS[kernel]
        close(by(given), of(given), 1e-12)


def test_classes_that_a_program_does_not_hold():
    x, W = draw(2, 3), draw(200, 3)
    t = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(KernelUnavailable, match="200 classes, and a program holds 128"):
        ops.linear_cross_entropy(x, W, None, t, kernel="rows")
