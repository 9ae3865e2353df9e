"""``warm_start=False``: every outer step's inner problem begins where the first one did."""

import copy

import pytest
import torch

import torch_bilevel as tb


def A():
    return torch.diag(torch.tensor([1.0, 2.0, 4.0]))


class Loop:
    """g = ½ yᵀAy − yᵀx, f = ½ ‖y − 1‖² + ½ ‖x‖², with an inner optimizer that has state."""

    def __init__(self, kind=torch.optim.Adam, estimator="cg", **options):
        self.y = torch.tensor([3.0, -2.0, 1.0], requires_grad=True)
        self.x = torch.tensor([0.5, 0.0, -0.5], requires_grad=True)
        self.optimizer = tb.BilevelOptimizer(
            kind([self.y], lr=0.1),
            torch.optim.SGD([self.x], lr=0.1),
            estimator=estimator,
            warm_start=False,
            **options,
        )
        self.train = self.optimizer.inner_loss(
            lambda: self.y @ A() @ self.y / 2 - self.y @ self.x
        )
        self.valid = self.optimizer.outer_loss(
            lambda: ((self.y - 1) ** 2).sum() / 2 + (self.x**2).sum() / 2
        )

    def run(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.train().backward()
            self.optimizer.step()
        return self


def by_hand(kind, outer_steps, inner_steps):
    """The loop with a new optimizer and the old start every time, ∇Φ in closed form."""
    x = torch.tensor([0.5, 0.0, -0.5])
    for _ in range(outer_steps):
        y = torch.tensor([3.0, -2.0, 1.0], requires_grad=True)
        inner = kind([y], lr=0.1)
        for _ in range(inner_steps):
            inner.zero_grad()
            (y @ A() @ y / 2 - y @ x).backward()
            inner.step()
        # J = −I, H = A
        x = x - 0.1 * (x + torch.linalg.solve(A(), y.detach() - 1))
    return x, y.detach()


def momentum(params, lr):
    return torch.optim.SGD(params, lr=lr, momentum=0.5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, momentum, torch.optim.Adam])
@pytest.mark.parametrize("written_out", [False, True])
def test_it_is_the_loop_that_begins_anew(kind, written_out):
    loop = Loop(kind, "cg(rtol=1e-14)", inner_steps=None if written_out else 4)
    for _ in range(5):
        loop.run(4)
        if written_out:
            loop.optimizer.outer.zero_grad()
            loop.valid().backward()
            loop.optimizer.outer.step()
    x, y = by_hand(kind, 5, 4)
    assert torch.allclose(loop.x, x, rtol=0, atol=1e-12)
    assert torch.allclose(loop.y, y, rtol=0, atol=1e-14)  # until the next inner loss


def test_what_was_reached_stays_until_the_next_inner_loss():
    loop = Loop(inner_steps=4).run(4)
    reached = loop.y.detach().clone()
    with torch.no_grad():
        loop.train()
    with loop.optimizer.paused():
        loop.train()
    assert torch.equal(loop.y, reached)
    loop.train()
    assert torch.equal(loop.y, torch.tensor([3.0, -2.0, 1.0]))


def test_the_adjoint_begins_anew_and_the_step_size_is_kept():
    loop = Loop(estimator="richardson(max_steps=3)", inner_steps=2).run(4)
    (memory,) = loop.optimizer._memories.values()
    assert memory.adjoint is not None
    loop.train()
    assert memory.adjoint is None and memory.solver.eigenvalue is not None


def test_values_loaded_after_construction_are_the_start():
    loop = Loop(inner_steps=2)
    with torch.no_grad():
        loop.y.copy_(torch.ones(3))
    loop.run(2).train()
    assert torch.equal(loop.y, torch.ones(3))


def test_restart_moves_the_start():
    loop = Loop(inner_steps=2).run(3)
    with torch.no_grad():
        loop.y.copy_(torch.ones(3))
    loop.optimizer.restart()
    loop.run(2).train()
    assert torch.equal(loop.y, torch.ones(3))


def test_a_map_begins_anew():
    z = torch.zeros(2, requires_grad=True)
    x = torch.ones(2, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        tb.FixedPointIteration([z]),
        torch.optim.SGD([x], lr=0.1),
        estimator="gmres",
        inner_steps=1,
        warm_start=False,
    )
    optimizer.fixed_point_map(lambda: (z + x) / 2)
    optimizer.outer_loss(lambda: ((z - 3) ** 2).sum())
    for _ in range(3):
        before = x.detach().clone()
        optimizer.step()
        assert torch.allclose(z, before / 2)  # one application from zero


def test_a_proximal_term_pulls_to_the_start():
    loop = Loop(torch.optim.SGD, inner_steps=3, proximal_term=0.5).run(7)
    y = torch.tensor([3.0, -2.0, 1.0])
    x = loop.x.detach()
    expected = y - 0.1 * (A() @ y - x)  # the pull is zero at the start itself
    assert torch.allclose(loop.y, expected)


@pytest.mark.parametrize("at", [4, 6])
def test_resume_is_bit_exact(at):
    whole = Loop(inner_steps=4).run(11)
    first = Loop(inner_steps=4).run(at)
    saved = copy.deepcopy(first.optimizer.state_dict())
    again = Loop(inner_steps=4)
    with torch.no_grad():
        again.y.copy_(first.y)
    again.optimizer.load_state_dict(saved)
    again.run(11 - at)
    assert torch.equal(again.x, whole.x) and torch.equal(again.y, whole.y)


def test_initialisations_are_refused():
    w = torch.zeros(1, requires_grad=True)
    with pytest.raises(tb.BilevelError, match="Every task begins there by itself"):
        tb.BilevelOptimizer(
            torch.optim.SGD([w], lr=0.1), torch.optim.SGD([w], lr=0.1), warm_start=False
        )


def test_tasks_and_words():
    loop = Loop(estimator="unrolled")
    for _ in range(2):
        with loop.optimizer.task():
            loop.run(3)
            loop.optimizer.outer.zero_grad()
            loop.valid().backward()
        loop.optimizer.outer_step()
        assert torch.equal(loop.y, torch.tensor([3.0, -2.0, 1.0]))
    assert "y then begins anew" in loop.optimizer.explain()
