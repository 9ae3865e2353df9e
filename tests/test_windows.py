"""Which steps an estimator is about, when another one recorded them; checks of short windows."""

import pytest
import torch

import torch_bilevel as tb

EXACT = -1.6 * 6 * 0.8**11  # d/dx 4 (1 − 0.2 x)^12 at x = 1


class Scalar:
    """y ← y − 0.1 · 2 x y, six times from 2, and f = y²."""

    def __init__(self, estimator):
        self.y, self.x = (torch.tensor([v], requires_grad=True) for v in (2.0, 1.0))
        self.optimizer = tb.BilevelOptimizer(
            torch.optim.SGD([self.y], lr=0.1),
            torch.optim.SGD([self.x], lr=0.1),
            estimator=estimator,
        )
        self.train = self.optimizer.inner_loss(lambda: (self.x * self.y**2).sum())
        self.valid = self.optimizer.outer_loss(lambda: (self.y**2).sum())

    def steps(self, count):
        for _ in range(count):
            self.optimizer.zero_grad()
            self.train().backward()
            self.optimizer.step()
        return self


@pytest.mark.parametrize(
    "before, after",
    [
        ("forward", "forward"),
        ("unrolled", "unrolled"),
        ("unrolled", "checkpointed"),
        ("unrolled(keep_graph=True)", "unrolled"),
        ("forward_gradient(directions=1)", "forward_gradient(directions=1)"),
    ],
)
def test_an_estimator_takes_over_what_another_recorded(before, after):
    problem = Scalar(before).steps(4)
    problem.optimizer.estimator = after
    (at_once,) = problem.optimizer.hypergradient(write=False)
    torch.testing.assert_close(at_once, torch.tensor([-1.6 * 4 * 0.8**7]))
    (found,) = problem.steps(2).optimizer.hypergradient()
    torch.testing.assert_close(found, torch.tensor([EXACT]))


@pytest.mark.parametrize(
    "before, after, words",
    [
        ("unrolled", "forward", "through 2 of the 6"),
        ("cg", "forward", "through 2 of the 6"),
        ("forward_gradient(directions=1)", "forward", "through 2 of the 6"),
        ("forward", "unrolled", "6 of the 6 inner steps.*only 3 of them"),
        ("forward", "checkpointed", "only 3 of them"),
        ("one_step", "unrolled", "only 3 of them"),
        ("unrolled(window=2)", "unrolled", "only 4 of them"),
        ("unrolled(window=2)", "unrolled(window=5)", "5 of the 6 .*only 4 of them"),
        ("first_order", "cg", "only 3 of them"),
        ("cg", "unrolled", "no iterates"),
    ],
)
def test_steps_that_were_not_kept_are_missed(before, after, words):
    problem = Scalar(before).steps(4)
    problem.optimizer.estimator = after
    with pytest.raises(tb.NoInnerStep, match=words):
        problem.steps(2).optimizer.hypergradient()
    with pytest.warns(tb.NoOuterStepWarning):  # right from the next window on
        problem.optimizer.outer.step()
    problem.steps(2).optimizer.hypergradient()


@pytest.mark.parametrize("second", ["unrolled", "checkpointed", "cg"])
@pytest.mark.parametrize("first", ["forward", "one_step", "unrolled(window=2)"])
def test_a_second_opinion_needs_the_steps_it_is_about(first, second):
    problem = Scalar(first).steps(6)
    with pytest.raises(tb.NoInnerStep, match=r"6 of the 6.*only [12] of them"):
        problem.optimizer.hypergradient(estimator=second, write=False)
    shorter = {"cg": "cg(cross_calls=1)"}.get(second, "unrolled(window=1)")
    (found,) = problem.optimizer.hypergradient(estimator=shorter, write=False)
    (expected,) = Scalar(shorter).steps(6).optimizer.hypergradient()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("last", [1, 2, 5, 6, 50])
@pytest.mark.parametrize("beside", ["unrolled", "unrolled(window=5)"])
def test_a_second_opinion_is_about_its_own_window(beside, last):
    problem, second = Scalar(beside).steps(6), f"unrolled(window={last})"
    if beside != "unrolled" and last > 5:
        with pytest.raises(tb.NoInnerStep, match="only 5 of them"):
            problem.optimizer.hypergradient(estimator=second)
        return
    (found,) = problem.optimizer.hypergradient(estimator=second, write=False)
    (expected,) = Scalar(second).steps(6).optimizer.hypergradient()
    assert torch.equal(found, expected)
    check = tb.check_hypergradient(problem.optimizer, estimator=second)
    assert check.relative_error < 1e-8 and check.steps == min(last, 6)


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 7])
@pytest.mark.parametrize("every", [2, 5, "'auto'"])
def test_checks_of_windows_with_checkpoints(every, num_steps, initial):
    """The steps before the window are run once: through them x is a constant."""
    y, x = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.01, momentum=0.9),
        torch.optim.SGD([x, y] if initial else [x], lr=0.1),
        estimator=f"unrolled(window=3, checkpoint_every={every})",
    )
    train = optimizer.inner_loss(lambda a: (x.exp() * a * y**4).sum())
    valid = optimizer.outer_loss(lambda: y.sin().sum())
    with optimizer.task():
        for _ in range(num_steps):
            optimizer.zero_grad()
            train(torch.rand(3)).backward()
            optimizer.step()
        found = tb.check_hypergradient(optimizer)
        valid().backward()
    assert found.relative_error < 1e-7 and found.steps == min(num_steps, 3)


@pytest.mark.parametrize("second", ["soba", "stochastic_neumann(num_steps=3)"])
def test_estimators_about_the_present_step_need_no_other(second):
    """Samples come from data, or there is one step a step."""
    y, x = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([y], lr=0.1),
        torch.optim.SGD([x], lr=0.1),
        estimator="unrolled(window=2)",
    )
    batches = tb.Batches((torch.rand(8, 3),), batch_size=4)
    train = optimizer.inner_loss(lambda X: ((X * (y - x)) ** 2).sum(), data=batches)
    optimizer.outer_loss(lambda: (y**2).sum())
    for (X,), _ in zip(batches, range(4), strict=False):
        optimizer.zero_grad()
        train(X).backward()
        optimizer.step()
    optimizer.hypergradient(estimator=second, write=False)
