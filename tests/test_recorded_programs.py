"""What recorded programs go through: fewer operations, the same values in the same layouts."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_bilevel.products.trace import product, record, split

A, B, S = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 3)
ROW, COLUMN, ONE = torch.randn(4), torch.randn(3, 1), torch.randn(())
BATCH = torch.randn(2, 3, 4)
TOTAL = {"add", "addmm", "baddbmm"}


def left(function, v):
    """Operations left of ``function(v)``, after comparing its value and layout."""
    v = v.clone()  # the functions read the example, too
    module, others = record(lambda v: (v.sum(), function(v)), [v])
    prefix, kept, order = split(module, 0, [])
    graph = product(module, kept, order, [1])
    values = prefix(v, *others)
    (found,), known = graph(v, *values), function(v)
    torch.testing.assert_close(found, known, rtol=1e-5, atol=1e-6)
    assert found.stride() == known.stride()
    nodes = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return [getattr(target, "__name__", str(target)).split(".")[0] for target in nodes]


@pytest.mark.parametrize(
    "function, v, expected",
    [
        (lambda v: torch.zeros_like(v) + 2 * v, A, ["mul"]),
        (lambda v: 2 * v + v.new_zeros(3, 4), A, ["mul"]),
        (lambda v: 2 * v + torch.zeros_like(v).view(4, 3).view(3, 4), A, ["mul"]),
        # zeros that make something larger, change its layout or its type are not nothing
        (lambda v: (v + v.new_zeros(2, 3, 4)).view(-1), A, ["add", "view"]),
        (lambda v: v[:1].expand(3, 4) + torch.zeros_like(v), A, ["add"]),
        (lambda v: 2 * v + torch.zeros_like(v, dtype=torch.float64), A, ["add"]),
        (lambda v: torch.add(torch.zeros_like(v), v.sin(), alpha=3), A, ["add"]),
        (lambda v: (v.t() + (2 * v).t()).t(), A, ["mul", "add"]),
        (lambda v: (v.t() + (2 * v).t()).t().reshape(-1), A, ["mul", "add", "view"]),
        (lambda v: (v.t() + v.t().contiguous()).t(), A, ["add"]),
        (lambda v: (v.t() + torch.ones_like(v)).t().t(), S, ["add"]),
        (lambda v: v.sum().expand(3, 4).t() + v.mean().expand(3, 4).t(), A, ["add"]),
    ],
)
def test_what_is_known_is_not_computed(function, v, expected):
    found = left(function, v)
    assert [name for name in found if name in {*expected}] == expected
    if "add" not in expected:
        assert "add" not in found


@pytest.mark.parametrize(
    "function, v, expected",
    [
        (lambda v: v @ B.t() + S, A, ["addmm"]),
        (lambda v: S + v @ B.t(), A, ["addmm"]),
        (lambda v: v[0].expand(3, 4) + S @ v, A, ["addmm"]),
        (lambda v: S @ v + COLUMN, A, ["addmm"]),
        (lambda v: S @ v + ONE, A, ["addmm"]),
        (lambda v: S @ v + S.t() @ v + S @ v.abs(), A, ["addmm", "addmm"]),
        (lambda v: torch.bmm(BATCH.mT, v) + ROW, BATCH, ["baddbmm"]),
        # needed elsewhere, of another shape, layout or type, weighted, of itself
        (lambda v: (S @ v).sin() * (S @ v + B), A, ["add"]),
        (lambda v: S @ v + BATCH, A, ["add"]),
        (lambda v: B.t().contiguous().t() + S @ v, A, ["add"]),
        (lambda v: S @ v + B.double(), A, ["add"]),
        (lambda v: S @ v + B.half(), A, ["add"]),
        (lambda v: S @ v + B.to(torch.complex64), A, ["add"]),
        (lambda v: torch.add(S @ v, B, alpha=2), A, ["add"]),
        (lambda v: (S @ v).add(S @ v), A, ["add"]),
        (lambda v: torch.add(S @ v, 2.0), A, ["add"]),
        (lambda v: S.to_sparse() @ v + B, A, ["add"]),
    ],
)
def test_a_product_and_a_sum_are_one_operation(function, v, expected):
    found = left(function, v)
    assert [name for name in found if name in TOTAL] == expected
    assert "expand" not in found


def test_hessian_products_of_a_perceptron_take_eight_matrix_products_and_seven_more():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    params, x, y = list(net.parameters()), torch.randn(8, 6), torch.arange(8) % 3
    weights = torch.rand(8)

    def times(v):
        loss = (weights * F.cross_entropy(net(x), y, reduction="none")).mean()
        parts = torch.autograd.grad(loss, params, create_graph=True)
        vs = [
            part.view_as(p)
            for part, p in zip(
                v.split([p.numel() for p in params]), params, strict=True
            )
        ]
        found = torch.autograd.grad(parts, params, vs)
        return torch.cat([part.reshape(-1) for part in found]).detach()

    names = left(times, torch.randn(sum(p.numel() for p in params)))
    views = {"view", "t", "getitem", "split_with_sizes"}
    assert Counter(name for name in names if name not in views) == {
        "addmm": 5,
        "mm": 3,
        "threshold_backward": 2,
        "mul": 1,
        "_log_softmax_backward_data": 1,
        "sum": 2,
        "cat": 1,
    }


def test_a_product_that_does_not_depend_on_v_stays_with_the_point():
    assert "mm" not in "".join(left(lambda v: v + S @ A, A))


def test_what_depends_on_v_only_through_zeros_is_of_the_point():
    assert left(lambda v: torch.zeros_like(2 * v) + A.sin(), A) == []


def test_merging_is_not_done_before_it_is_known_what_is_run():
    """H v takes a product that J v adds something to: two outputs, then one of them."""
    module, others = record(lambda v: (v.sum(), S @ v, (S @ v) + B), [A.clone()])
    prefix, kept, order = split(module, 0, [])
    values = prefix(A, *others)
    for results, expected in (([1, 2], {"mm", "add"}), ([2], {"addmm"})):
        run = product(module, kept, order, results)
        torch.testing.assert_close(
            run(A, *values), tuple((S @ A, S @ A + B)[k - 1] for k in results)
        )
        names = {n.target.__name__ for n in run.graph.nodes if n.op == "call_function"}
        assert names == expected
