"""Forward mode: equal to reverse mode, and unbiased along random directions."""

import pytest
import torch
from cases import RULES, SGD, rule_id
from test_hyperparameters import SCHEDULES
from test_hyperparameters import program as scheduled
from test_rules import program

import torch_bilevel as tb


@pytest.mark.parametrize("num_steps", [1, 2, 6])
@pytest.mark.parametrize("case", RULES, ids=rule_id)
def test_forward_equals_unrolled(case, num_steps):
    x = torch.tensor([0.2, -0.4], requires_grad=True)
    (expected,) = program(case, x, num_steps, "unrolled").hypergradient()
    (found,) = program(case, x, num_steps, "forward").hypergradient()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_forward_equals_unrolled_with_learned_hyperparameters(name):
    kind, options, function = SCHEDULES[name]
    x = torch.tensor([0.3, -0.5], requires_grad=True)
    found, expected = (
        scheduled(kind, options, function, x, 5, estimator).hypergradient()[0]
        for estimator in ("forward", "unrolled")
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


class Classifier:
    """Dropout, BatchNorm, clipping, accumulation, a parameter without gradient, a 3-vector x."""

    def __init__(self, estimator):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 5),
            torch.nn.BatchNorm1d(5),
            torch.nn.Tanh(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(5, 1),
        )
        unused = torch.ones(2, requires_grad=True)
        self.x = torch.tensor([0.1, -0.3, 0.5], requires_grad=True)
        self.direct = torch.tensor(0.7, requires_grad=True)
        inner = torch.optim.SGD(
            [*self.model.parameters(), unused], lr=0.3, momentum=0.9, weight_decay=0.01
        )
        self.optimizer = tb.BilevelOptimizer(
            inner, SGD([self.x, self.direct], lr=0.1), estimator=estimator
        )
        self.optimizer.gradient_transform(tb.clip_grad_norm(0.4))
        self.data = torch.randn(3, 6, 4), torch.randn(3, 6, 1)
        self.train = self.optimizer.inner_loss(self.loss)
        self.valid = self.optimizer.outer_loss(
            lambda a, b: ((self.model(a) - b) ** 2).mean() * self.direct.exp()
        )

    def loss(self, a, b):
        error = (self.model(a) - b) ** 2
        return (error * self.x.exp().repeat(2)[:, None]).mean() + (
            self.x[0] * self.model[0].weight
        ).pow(2).sum()

    def steps(self, count):
        for k in range(count):
            self.optimizer.zero_grad()
            for j in (0, 1):
                (self.train(*(d[(k + j) % 3] for d in self.data)) / 2).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.4)
            self.optimizer.step()

    def gradient(self, **options):
        parts = self.optimizer.hypergradient(*(d[2] for d in self.data), **options)
        return torch.cat([part.reshape(-1) for part in parts])


def test_forward_equals_unrolled_in_a_messy_loop():
    found, expected = Classifier("forward"), Classifier("unrolled")
    torch.manual_seed(5)
    found.steps(4)
    torch.manual_seed(5)
    expected.steps(4)
    for a, b in zip(
        found.model.state_dict().values(),
        expected.model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)  # following the loop leaves it as it is
    torch.testing.assert_close(
        found.gradient(), expected.gradient(), rtol=1e-9, atol=1e-12
    )
    assert found.optimizer.last_report.steps == 4
    assert len(found.optimizer._recorder.window) == 1


def test_coordinate_directions_give_the_gradient_and_random_ones_its_law():
    """E ĝ = ∇Φ and E‖ĝ − ∇Φ‖² = (d − 1)/b ‖indirect part‖² (signs; ∂_x f is exact)."""

    def run(estimator):
        case = Classifier(estimator)
        torch.manual_seed(5)
        case.steps(2)
        return case

    reference = run("unrolled")
    exact = reference.gradient()
    direct = torch.zeros(4)
    value = reference.optimizer.last_report.loss
    direct[3] = value  # ∂_x f: the outer loss is proportional to exp(direct)
    indirect = exact - direct
    for b in (1, 3):
        case = run(f"forward_gradient(directions={b})")
        window = case.optimizer._recorder.window
        full = run("forward").optimizer._recorder.window.tangents
        samples = []
        for seed in range(400):
            chosen = tb.ForwardGradient(directions=b, seed=seed)
            basis = chosen.basis(case.optimizer.problem, 0)
            window.tangents.directions = basis
            window.tangents.values = basis @ full.values
            samples.append(case.gradient(estimator=chosen))
        samples = torch.stack(samples)
        law = 3 / b * indirect.pow(2).sum()
        spread = (samples - exact).pow(2).sum(1)
        assert abs(spread.mean() - law) < 4 * spread.std() / 20
        assert (samples.mean(0) - exact).norm() < 4 * (law / 400).sqrt()
    one = run("forward_gradient(directions=2, seed=3)")
    tangents = one.optimizer._recorder.window.tangents
    torch.testing.assert_close(tangents.values, tangents.directions @ full.values)


def test_one_outer_number_needs_one_direction():
    def run(estimator):
        torch.manual_seed(0)
        y = torch.randn(3, requires_grad=True)
        x = torch.tensor(0.4, requires_grad=True)
        inner = SGD([y], lr=0.05, momentum=0.5)
        optimizer = tb.BilevelOptimizer(inner, SGD([x], lr=0.1), estimator=estimator)
        train = optimizer.inner_loss(lambda: ((y - x) ** 4).sum())
        optimizer.outer_loss(lambda: (y**3).sum())
        for _ in range(3):
            optimizer.zero_grad()
            train().backward()
            optimizer.step()
        return optimizer.hypergradient()[0]

    torch.testing.assert_close(run("forward"), run("forward_gradient"))
    torch.testing.assert_close(run("forward"), run("unrolled"))


def test_tangents_begin_anew_or_are_carried_over_an_outer_step():
    """At lr 0 of the outer step x stands still, so carried tangents are those of all steps."""

    def run(estimator, windows):
        y = torch.tensor([1.0, -2.0], requires_grad=True)
        x = torch.tensor([0.3, 0.6], requires_grad=True)
        optimizer = tb.BilevelOptimizer(
            SGD([y], lr=0.02, momentum=0.5), SGD([x], lr=0.0), estimator=estimator
        )
        train = optimizer.inner_loss(lambda: (x.exp() * (y - 1) ** 4).sum())
        optimizer.outer_loss(lambda: (y**2).sum())
        for count in windows:
            for _ in range(count):
                optimizer.zero_grad()
                train().backward()
                optimizer.step()
            optimizer.outer_step()
        return optimizer, x.grad

    whole = run("unrolled", [7])[1]
    carried, found = run("forward(carry=True)", [3, 4])
    torch.testing.assert_close(found, whole)
    assert carried.last_report.steps == 7
    anew = run("forward", [3, 4])[1]
    torch.testing.assert_close(anew, run("unrolled", [3, 4])[1])
    assert not torch.allclose(anew, whole)
    carried.restart()
    assert carried._recorder.window.tangents is None
    drawn = [run(f"forward_gradient(seed={s})", [3, 4])[0] for s in (0, 1)]
    assert drawn[0]._recorder.window.number == 2


@pytest.mark.parametrize(
    "estimator", ["forward", "forward(carry=True)", "forward_gradient"]
)
def test_resume_in_mid_window_is_exact(estimator):
    def make():
        case = Classifier(estimator)
        torch.manual_seed(5)
        return case

    whole = make()
    whole.steps(5)
    half = make()
    half.steps(2)
    saved = half.optimizer.state_dict()
    rng, weights = torch.get_rng_state(), half.model.state_dict()
    again = make()
    again.model.load_state_dict(weights)
    again.optimizer.load_state_dict(saved)
    torch.set_rng_state(rng)
    again.optimizer.zero_grad()
    for k in (2, 3, 4):
        again.optimizer.zero_grad()
        for j in (0, 1):
            (again.train(*(d[(k + j) % 3] for d in again.data)) / 2).backward()
        torch.nn.utils.clip_grad_norm_(again.model.parameters(), 0.4)
        again.optimizer.step()
    assert torch.equal(again.gradient(), whole.gradient())
