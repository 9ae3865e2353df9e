"""Captured products and whole solves, with a stand-in for CUDA graphs that replays a tape.

Like a graph, the tape repeats the launches of one run on the memory they had: it executes no Python
of the library, reads no tensor that was made later, and writes where the first run wrote. What it
cannot show is whether CUDA lets everything be captured: tests marked ``gpu`` do.
"""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import torch_bilevel as tb
from torch_bilevel import ops
from torch_bilevel._program import Program
from torch_bilevel.kernels import cg_step, momentum_step, richardson_step
from torch_bilevel.kernels.language import unavailable
from torch_bilevel.optim import explain
from torch_bilevel.products import capture as product_capture
from torch_bilevel.products import traced
from torch_bilevel.solvers import Operator, cg, device, momentum, richardson

NO_KERNELS = unavailable(torch.zeros(1))
CAPTURE = device.capture
pytestmark = pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))


class Tape(TorchDispatchMode):
    """Operations of one run, to be repeated."""

    current = None

    def __init__(self, run):
        super().__init__()
        run()
        self.calls, self.silent = [], False
        with self:
            Tape.current = self
            run()
            Tape.current = None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        assert "_local_scalar_dense" not in str(function) or self.silent, "a host waits"
        if not self.silent:
            self.calls.append((function, args, kwargs, tree_flatten(out)[0]))
        return out

    def replay(self):
        for function, args, kwargs, old in self.calls:
            new = tree_flatten(function(*args, **kwargs))[0]
            for kept, found in zip(old, new, strict=True):
                if isinstance(found, torch.Tensor) and found is not kept:
                    if kept.data_ptr() != found.data_ptr():  # no view, not in place
                        kept.copy_(found)


def on_tape(step):
    """A step of kernels as one call on the tape: launches are none of PyTorch's operations."""

    @functools.wraps(step)
    def call(*args, **kwargs):
        tape = Tape.current
        if tape is None:
            return step(*args, **kwargs)
        tape.silent = True
        state = step(*args, **kwargs)
        tape.silent = False
        tape.calls.append(
            (lambda *a, **k: (step(*a, **k), None)[1], args, kwargs, [None])
        )
        return state

    return call


@pytest.fixture
def captures(monkeypatch):
    """As on a CUDA device; returns the list of what was captured."""
    made = []

    def capture(run, where, what):
        made.append(Tape(run))
        return made[-1]

    monkeypatch.setattr(device, "capture", capture)
    monkeypatch.setattr(product_capture, "capture", capture)
    monkeypatch.setattr(traced, "supported", lambda asked, v: asked is not False)
    for module in (cg, device, momentum, richardson):
        monkeypatch.setattr(module, "by_kernels", lambda b: True)
    monkeypatch.setattr(cg, "on_host", lambda b: False)
    for module, name in (
        (cg_step, "cg_step"),
        (richardson_step, "richardson_step"),
        (momentum_step, "momentum_step"),
    ):
        monkeypatch.setattr(module, name, on_tape(getattr(module, name)))
    return made


def problem(estimator, products, weight_decay=0.4, parts=1, where="cpu"):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    )
    x, y = torch.randn(24, 4).to(where), torch.randint(3, (24,)).to(where)
    model.to(where)
    weights = torch.zeros(24, device=where, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.2, weight_decay=weight_decay),
        torch.optim.SGD([weights], lr=5.0),
        estimator=estimator,
        products=products,
    )

    @optimizer.inner_loss
    def train_loss(rows):
        losses = torch.nn.functional.cross_entropy(
            model(x[rows]), y[rows], reduction="none"
        )
        return (weights[rows].sigmoid() * losses).mean()

    optimizer.outer_loss(
        lambda: torch.nn.functional.cross_entropy(model(x.flip(0)), y.roll(1))
    )

    def rounds(count):
        for k in range(count):
            optimizer.zero_grad()
            for part in torch.arange(24, device=where).roll(k).chunk(parts):
                (train_loss(part) / parts).backward()
            optimizer.step()
            optimizer.outer_step()
            yield weights.grad.clone(), optimizer.last_report

    return rounds, optimizer


ESTIMATORS = [
    "cg(max_steps=5, rtol=0.)",
    "cg(max_steps=11, rtol=1e-9)",
    "cg(max_steps=3, rtol=0., warm_start=False)",
    "neumann(num_steps=6, step_size=0.3)",
    "neumann(num_steps=4)",
    "neumann(num_steps=1)",
    "richardson(max_steps=7, step_size=0.3, rtol=0.)",
    "richardson(max_steps=9, step_size=0.3, rtol=1e-2)",
    "heavy_ball(max_steps=6, rtol=0.)",
    "nesterov(max_steps=6, rtol=0., lower=0.3, upper=1.5)",
]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_replayed_solves_are_those_of_double_backward(captures, estimator, parts):
    """Over outer steps: other parameters, other batches, another right-hand side and start."""
    ours, optimizer = problem(estimator, "traced", parts=parts)
    with pytest.MonkeyPatch.context() as plain:
        for module in (cg, device, momentum, richardson):
            plain.setattr(module, "by_kernels", lambda b: False)
        plain.setattr(cg, "on_host", lambda b: True)
        theirs, _ = problem(estimator, "double_backward", parts=parts)
        expected = [(g, (str(r.status), r.products)) for g, r in theirs(4)]
    made = []
    for (found, report), (exact, (status, products)) in zip(
        ours(4), expected, strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-10)
        assert str(report.status) == status
        fixed = "rtol=1e" not in estimator  # else in blocks
        if fixed and made:  # the first time the recording is verified
            assert report.products == products
        made.append(len(captures))
    assert made[0] > 0 and made[1:] == made[1:2] * 3, (
        made
    )  # later systems capture nothing


def test_a_solve_without_tolerance_is_one_graph(captures):
    rounds, optimizer = problem("cg(max_steps=6, rtol=0., warm_start=False)", "traced")
    list(rounds(2))
    (recording,) = (
        r for r in optimizer.problem.recorded.values() if hasattr(r, "graphs")
    )
    (iteration,) = recording.graphs.values()
    assert iteration.sizes == [6]


def test_blocks_stop_early(captures):
    """43 parameters: all directions are exhausted long before the cap."""
    rounds, _ = problem("cg(max_steps=400, rtol=1e-6)", "traced")
    ((_, report),) = rounds(1)
    assert str(report.status) == "converged" and report.products < 60


def test_without_graphs_on_request(captures):
    rounds, _ = problem("cg(max_steps=3, rtol=0.)", "traced(cuda_graph=False)")
    list(rounds(2))
    assert not captures


@pytest.mark.parametrize("kernel", ["rows", "two_pass", "one_pass"])
def test_kernels_of_a_fused_loss_are_part_of_the_recording(captures, kernel):
    x, y = torch.randn(20, 6), torch.randint(3, (20,))
    found = []
    for name, products in ((kernel, "traced"), ("torch", "double_backward")):
        torch.manual_seed(0)
        W, w = (
            torch.zeros(3, 6, requires_grad=True),
            torch.zeros(20, requires_grad=True),
        )
        optimizer = tb.BilevelOptimizer(
            torch.optim.SGD([W], lr=0.5, weight_decay=0.1),
            torch.optim.SGD([w], lr=1.0),
            estimator="cg(max_steps=4, rtol=0.)",
            products=products,
        )

        @optimizer.inner_loss
        def train_loss(W=W, w=w, name=name):
            return tb.ops.linear_cross_entropy(
                x, W, None, y, example_weights=w.sigmoid(), kernel=name
            )

        optimizer.outer_loss(lambda W=W: (W[0] - W[1]).square().sum())
        for _ in range(3):
            optimizer.zero_grad()
            train_loss().backward()
            optimizer.step()
            optimizer.outer_step()
        found.append(w.grad)
        if products == "traced":
            (program,) = (
                r for r in optimizer.problem.recorded.values() if hasattr(r, "module")
            )
            assert "linear_hessian_product" in program.module.code
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_solve_of_a_fixed_number_of_steps_waits_for_nothing(captures):
    class Waits(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "_local_scalar_dense" in str(function)
            return function(*args, **(kwargs or {}))

    A = torch.linspace(1, 3, 30)
    program = Program("A", lambda v, d: d * v, [A])
    for _ in range(2):
        operator = Operator(lambda v: A * v, 30, program=lambda: program)
        b = torch.randn(30)
        with Waits() as waits:
            found = tb.CG(max_steps=12, rtol=0.0).solve(operator, b)
        assert operator.num_products == 12
    # the second time; the first compiles
    assert waits.count == 0 and len(captures) == 1
    torch.testing.assert_close(found.value, b / A, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_captured_is_an_error_with_the_way_round(captures, monkeypatch):
    def refuse(where):
        raise RuntimeError("operation not permitted when stream is capturing.")

    monkeypatch.setattr(device, "capture", CAPTURE)
    monkeypatch.setattr(torch.cuda, "device", refuse)
    rounds, _ = problem("cg(max_steps=3, rtol=0., warm_start=False)", "traced")
    with pytest.raises(tb.CaptureFailed, match=r"not permitted.*cuda_graph=False"):
        list(rounds(1))


def test_explain_says_what_runs_as_a_kernel(monkeypatch):
    class There:
        device = torch.device("cuda")

    fused = ops.fused
    monkeypatch.setattr(fused, "choices", {"a": "a by 'rows' (x of 3 MB, 10 classes)"})
    monkeypatch.setattr(explain, "choices", fused.choices)
    monkeypatch.setattr(explain, "unavailable", lambda v: None)
    (line,) = explain._kernels(There())
    assert "steps of cg" in line and "a by 'rows' (x of 3 MB" in line
    monkeypatch.setattr(explain, "unavailable", lambda v: "Triton is not installed")
    assert explain._kernels(There()) == [
        "  kernels: none, because Triton is not installed"
    ]
    assert explain._kernels(torch.zeros(1)) == []


NO_GPU = "" if torch.cuda.is_available() else "there is no CUDA device"


@pytest.mark.gpu
@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_on_a_gpu_replayed_solves_are_those_of_double_backward(estimator):
    ours, theirs = (
        problem(estimator, products, where="cuda")[0]
        for products in ("traced", "double_backward")
    )
    for (found, _), (exact, _) in zip(ours(4), theirs(4), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(bool(NO_GPU), reason=NO_GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_a_gpu_a_solve_of_a_fixed_number_of_steps_waits_for_nothing(dtype):
    A = torch.linspace(1, 3, 30, device="cuda", dtype=dtype)
    program = Program("A", lambda v, d: d * v, [A])
    b = torch.ones_like(A)
    for mode in ("default", "error"):
        operator = Operator(lambda v: A * v, 30, program=lambda: program)
        torch.cuda.set_sync_debug_mode(mode)
        found = tb.CG(max_steps=9, rtol=0.0).solve(operator, b)
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.value, b / A, rtol=1e-5, atol=1e-5)
