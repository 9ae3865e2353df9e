"""Hyperparameters of the inner optimizers that outer variables determine."""

import pytest
import torch
from cases import ADAM, ADAMW, SGD

import torch_bilevel as tb

# optimizer, options, what the function returns from (position, x)
SCHEDULES = {
    "lr": (SGD, {}, lambda k, x: {"lr": x[k % 2].exp() / 10}),
    "lr and momentum": (
        SGD,
        {"momentum": 0.1, "nesterov": True},
        lambda k, x: {"lr": 0.05 * x[0].exp(), "momentum": x[1].sigmoid()},
    ),
    "weight decay": (SGD, {"momentum": 0.5}, lambda k, x: {"weight_decay": x[0] ** 2}),
    "dampening": (
        SGD,
        {"momentum": 0.5, "dampening": 0.1},
        lambda k, x: {"dampening": x[1].sigmoid(), "weight_decay": x[0]},
    ),
    "per group": (
        SGD,
        {"momentum": 0.5},
        lambda k, x: [
            {"lr": x[0].exp() / 20},
            {"lr": 0.02, "momentum": x[1].sigmoid()},
        ],
    ),
    "Adam": (
        ADAM,
        {"weight_decay": 0.1},
        lambda k, x: {
            "lr": x[0].exp() / 20,
            "betas": (x[1].sigmoid(), 0.9 + 0.05 * x[0].tanh()),
            "weight_decay": x[1] ** 2,
        },
    ),
    "AdamW, one value in two places": (
        ADAMW,
        {"amsgrad": True},
        lambda k, x: (lambda h: {"lr": h / 10, "weight_decay": h})(
            x[0].exp() / 2 + x[1]
        ),
    ),
    "tensor lr": (
        SGD,
        {"lr": torch.tensor(0.1, dtype=torch.float64)},
        lambda k, x: {"lr": x.exp().sum() / 30},
    ),
}


def program(kind, options, function, x, num_steps, library=None):
    """An inner loop whose options are written by hand, or by the library."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 2).requires_grad_(), torch.randn(2).requires_grad_()
    A, target = torch.randn(6, 3), torch.randn(6, 2)
    inner = kind([{"params": [a]}, {"params": [b]}], **{"lr": 0.1, **options})

    def train_loss():
        return ((torch.tanh(A @ a + b) - target) ** 2).mean()

    def valid_loss():
        return (torch.sin(a) ** 2).sum() + (b**2).sum()

    if library:
        optimizer = tb.BilevelOptimizer(inner, SGD([x], lr=0.1), estimator=library)
        train_loss = optimizer.inner_loss(train_loss)
        optimizer.outer_loss(valid_loss)
        optimizer.inner_hyperparameters(lambda step: function(step, x))
    for k in range(num_steps):
        if not library:
            found = function(k, x)
            for i, group in enumerate(inner.param_groups):
                for key, value in (
                    found[i] if isinstance(found, list) else found
                ).items():
                    plain = (
                        tuple(float(v) for v in value)
                        if isinstance(value, tuple)
                        else float(value)
                    )
                    group[key] = torch.tensor(plain) if key == "lr" else plain
        inner.zero_grad()
        train_loss().backward()
        inner.step()
    return optimizer if library else valid_loss().item()


@pytest.mark.parametrize("num_steps", [1, 2, 5])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("estimator", ["unrolled", "unrolled(checkpoint_every=2)"])
def test_unrolled_equals_finite_differences_of_a_plain_program(
    name, num_steps, estimator
):
    kind, options, function = SCHEDULES[name]
    x = torch.tensor([0.3, -0.5], requires_grad=True)
    optimizer = program(kind, options, function, x, num_steps, estimator)
    (found,) = optimizer.hypergradient(write=False)
    next(iter(optimizer.outer_losses.values()))().backward()
    assert torch.equal(x.grad, found)
    expected = torch.zeros(2)
    for i, e in enumerate(torch.eye(2)):
        ends = [
            program(kind, options, function, (x + s * 1e-5 * e).detach(), num_steps)
            for s in (1, -1)
        ]
        expected[i] = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-9)
    assert tb.check_hypergradient(optimizer).relative_error < 1e-6


@pytest.mark.parametrize("kind", [SGD, ADAM, ADAMW])
@pytest.mark.parametrize(
    "estimator", ["cg(rtol=1e-12)", "direct", "neumann(num_steps=5000)"]
)
def test_weight_decay_with_an_implicit_estimator_equals_ridge(kind, estimator):
    """y* = (AᵀA/n + wd)⁻¹Aᵀb/n in closed form; AdamW's decay is wd·D with D held."""
    torch.manual_seed(0)
    n, d = 20, 4
    A, b, y0 = torch.randn(n, d), torch.randn(n), torch.randn(d)
    x = torch.tensor(-1.0, requires_grad=True)
    y = torch.zeros(d, requires_grad=True)
    inner = kind([y], lr=0.05, weight_decay=0.0)
    optimizer = tb.BilevelOptimizer(inner, SGD([x], lr=0.1), estimator=estimator)
    train = optimizer.inner_loss(lambda: ((A @ y - b) ** 2).sum() / (2 * n))
    optimizer.outer_loss(lambda: ((y - y0) ** 2).sum() / 2)
    optimizer.inner_hyperparameters(lambda: {"weight_decay": x.exp()})
    for _ in range(5):
        optimizer.zero_grad()
        train().backward()
        optimizer.step()
    assert inner.param_groups[0]["weight_decay"] == x.exp().item()
    H, wd = A.T @ A / n, x.detach().exp()
    D = torch.ones(d)
    if kind is ADAMW:
        state = inner.state[y]
        D = state["exp_avg_sq"].sqrt() / (1 - 0.999**5) ** 0.5 + 1e-8
    else:
        with torch.no_grad():
            y.copy_(torch.linalg.solve(H + wd * torch.eye(d), A.T @ b / n))
    (found,) = optimizer.hypergradient()
    v = torch.linalg.solve(H + wd * torch.diag(D), y.detach() - y0)
    torch.testing.assert_close(
        found, -(v * D * y.detach()).sum() * wd, rtol=1e-8, atol=1e-12
    )


def test_position_counts_from_restart_and_survives_a_checkpoint():
    seen = []
    x = torch.tensor(-2.0, requires_grad=True)
    y = torch.ones(1, requires_grad=True)

    def make():
        optimizer = tb.BilevelOptimizer(
            SGD([y], lr=1.0), SGD([x], lr=0.1), estimator="unrolled"
        )
        train = optimizer.inner_loss(lambda: (y**2).sum())
        optimizer.outer_loss(lambda: (y**2).sum())

        @optimizer.inner_hyperparameters
        def schedule(step):
            seen.append(step)
            return {"lr": x.exp()}

        return optimizer, train

    def run(optimizer, train, count):
        for _ in range(count):
            optimizer.zero_grad()
            train().backward()
            optimizer.step()

    optimizer, train = make()
    run(optimizer, train, 2)
    optimizer.outer_step()
    seen.clear()
    run(optimizer, train, 1)  # an outer step does not start a new trajectory
    assert seen == [2]
    saved = optimizer.state_dict()
    optimizer.remove()
    optimizer, train = make()
    optimizer.load_state_dict(saved)
    seen.clear()
    run(optimizer, train, 1)
    assert seen == [3]
    assert [r.position for r in optimizer._recorder.window] == [2, 3]
    optimizer.restart()
    seen.clear()
    run(optimizer, train, 2)
    assert seen == [0, 1]
    with optimizer.paused():
        run(optimizer, train, 1)
    assert seen == [0, 1]
