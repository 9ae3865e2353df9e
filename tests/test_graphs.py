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
from torch_bilevel.kernels import cg_step, momentum_step, richardson_step
from torch_bilevel.kernels.language import unavailable
from torch_bilevel.products import capture as product_capture
from torch_bilevel.products import traced
from torch_bilevel.solvers import cg, device, momentum, richardson

NO_KERNELS = unavailable(torch.zeros(1))
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

    def capture(run, where):
        made.append(Tape(run))
        return made[-1]

    monkeypatch.setattr(device, "capture", capture)
    monkeypatch.setattr(product_capture, "capture", capture)
    monkeypatch.setattr(traced, "supported", lambda asked, v: asked is not False)
    for module in (cg, momentum, richardson):
        monkeypatch.setattr(module, "by_kernels", lambda b: True)
    monkeypatch.setattr(cg, "on_host", lambda b: False)
    for module, name in (
        (cg_step, "cg_step"),
        (richardson_step, "richardson_step"),
        (momentum_step, "momentum_step"),
    ):
        monkeypatch.setattr(module, name, on_tape(getattr(module, name)))
    return made


def problem(estimator, products, weight_decay=0.4, parts=1):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    )
    x, y = torch.randn(24, 4), torch.randint(3, (24,))
    weights = torch.zeros(24, requires_grad=True)
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
            for part in torch.arange(24).roll(k).chunk(parts):
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
        for module in (cg, momentum, richardson):
            plain.setattr(module, "by_kernels", lambda b: False)
        plain.setattr(cg, "on_host", lambda b: True)
        theirs, _ = problem(estimator, "double_backward", parts=parts)
        expected = [(g, str(r.status)) for g, r in theirs(4)]
    made = []
    for (found, report), (exact, status) in zip(ours(4), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-10)
        assert str(report.status) == status
        made.append(len(captures))
    assert made[0] > 0 and made[1:] == made[1:2] * 3, (
        made
    )  # later systems capture nothing


def test_a_solve_without_tolerance_is_one_graph(captures):
    rounds, optimizer = problem("cg(max_steps=6, rtol=0., warm_start=False)", "traced")
    memory = optimizer._memories
    list(rounds(2))
    (held,) = (m.solver.captured for m in memory.values())
    (iteration,) = held.values()
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
