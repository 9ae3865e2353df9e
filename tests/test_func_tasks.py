"""`tb.func.task_gradient`: closed forms of quadratic tasks, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacrev

import torch_bilevel as tb

TASKS, SIZE, RATE, STEPS = 5, 3, 0.2, 4


def spd():
    a = torch.randn(SIZE, SIZE)
    return a @ a.T / SIZE + 0.3 * torch.eye(SIZE)


def loss(y, x, batch):
    A, b = batch
    return y @ A @ y / 2 - b @ y


def tasks():
    return [
        (torch.stack([spd() for _ in range(TASKS)]), torch.randn(TASKS, SIZE))
        for _ in range(2)
    ]


def adapted(A, b, x):
    """w_N = A⁻¹b + (I − αA)^N (x − A⁻¹b), and (I − αA)^N."""
    M = torch.linalg.matrix_power(torch.eye(SIZE) - RATE * A, STEPS)
    w = torch.linalg.solve(A, b)
    return w + M @ (x - w), M


def gradient(estimator="unrolled", **options):
    options = {"rule": f"sgd(lr={RATE})", "num_steps": STEPS, **options}
    return tb.func.task_gradient(loss, loss, estimator=estimator, **options)


def mean(x, support, query, of):
    rows = zip(*support, *query, strict=True)
    return torch.stack([of(*row, *adapted(*row[:2], x)) for row in rows]).mean(0)


CASES = {
    # MAML; FOMAML: M replaced by I; Reptile: x − w_N
    "unrolled": lambda A, b, Q, q, w, M: M @ (Q @ w - q),
    "unrolled(checkpoint_every=2)": lambda A, b, Q, q, w, M: M @ (Q @ w - q),
    "checkpointed": lambda A, b, Q, q, w, M: M @ (Q @ w - q),
    "first_order": lambda A, b, Q, q, w, M: Q @ w - q,
    # only the last steps of M; those before are a translation
    "unrolled(window=4)": lambda A, b, Q, q, w, M: M @ (Q @ w - q),
    "unrolled(window=3, checkpoint_every=2)": lambda A, b, Q, q, w, M: (
        torch.linalg.matrix_power(torch.eye(SIZE) - RATE * A, 3) @ (Q @ w - q)
    ),
    "one_step": lambda A, b, Q, q, w, M: (torch.eye(SIZE) - RATE * A) @ (Q @ w - q),
}


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}], ids=str)
@pytest.mark.parametrize("estimator", CASES)
def test_quadratic_tasks(estimator, options):
    x, (support, query) = torch.randn(SIZE), tasks()
    found, report = gradient(estimator, **options)(x, support, query)
    torch.testing.assert_close(found, mean(x, support, query, CASES[estimator]))
    losses = [
        loss(adapted(A, b, x)[0], x, (Q, q))
        for A, b, Q, q in zip(*support, *query, strict=True)
    ]
    torch.testing.assert_close(report.losses, torch.stack(losses))
    torch.testing.assert_close(report.norm, torch.linalg.vector_norm(found))
    assert report.residual.isnan().all() and report.converged.all()


@pytest.mark.parametrize("estimator", ["unrolled", "unrolled(window=2)", "one_step"])
def test_the_class_face_gives_the_same(estimator):
    """With momentum, and the pull towards y_0."""
    x, (support, query) = torch.randn(SIZE), tasks()
    options = {"lr": RATE, "momentum": 0.7}
    made = gradient(
        estimator, rule=tb.func.rule(torch.optim.SGD, **options), proximal_term=0.4
    )
    found, _ = made(x, support, query)
    w = x.clone().requires_grad_()
    optimizer = tb.BilevelOptimizer(
        torch.optim.SGD([w], **options),
        torch.optim.SGD([w], lr=1.0),
        estimator=estimator,
        proximal_term=0.4,
    )
    inner = optimizer.inner_loss(lambda *batch: loss(w, None, batch))
    outer = optimizer.outer_loss(lambda *batch: loss(w, None, batch))
    for A, b, Q, q in zip(*support, *query, strict=True):
        with optimizer.task():
            for _ in range(STEPS):
                optimizer.zero_grad()
                inner(A, b).backward()
                optimizer.step()
            outer(Q, q).backward()
    torch.testing.assert_close(found, w.grad / TASKS)


def test_reptile_and_adaptation():
    x, (support, query) = torch.randn(SIZE), tasks()
    found, _ = gradient("displacement")(x, support, query)
    expected = mean(x, support, query, lambda A, b, Q, q, w, M: x - w)
    torch.testing.assert_close(found, expected)
    rows = gradient().adapt(x, support)
    expected = [adapted(A, b, x)[0] for A, b in zip(*support, strict=True)]
    torch.testing.assert_close(rows, torch.stack(expected))


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_imaml(strength):
    """∇Φ = λ (A + λI)⁻¹ ∇ℓ_T(y*),  y* = (A + λI)⁻¹(λx + b)."""
    x, (support, query) = torch.randn(SIZE), tasks()
    made = gradient("cg(rtol=1e-13)", proximal_term=strength, num_steps=400)
    found, report = made(x, support, query)
    expected = torch.zeros(SIZE)
    for A, b, Q, q in zip(*support, *query, strict=True):
        H = A + strength * torch.eye(SIZE)
        y = torch.linalg.solve(H, strength * x + b)
        expected += strength * torch.linalg.solve(H, Q @ y - q) / TASKS
    torch.testing.assert_close(found, expected)
    assert report.converged.all() and (report.residual < 1e-12).all()


def test_anil_with_features_and_a_learned_rate():
    """y_0 is a part of x; the rest are features, and a learning rate."""
    torch.manual_seed(0)
    x = {
        "head": torch.randn(2, 4),
        "features": torch.randn(3, 4),
        "rate": torch.tensor(-1.0),
    }
    support, query = (
        (torch.randn(TASKS, 6, 3), torch.randint(2, (TASKS, 6))) for _ in range(2)
    )

    def task_loss(head, x, batch):
        logits = torch.tanh(batch[0] @ x["features"]) @ head.mT
        return F.cross_entropy(logits, batch[1])

    anil = tb.func.task_gradient(
        task_loss,
        task_loss,
        rule=lambda given, step: tb.func.rule(
            torch.optim.SGD, lr=given[0]["rate"].exp()
        ),
        num_steps=3,
        initial=lambda x: x["head"],
    )
    found, report = anil(x, support, query)

    def written_out(x):
        total = torch.zeros(())
        for i in range(TASKS):
            own, head = [(a[i], b[i]) for a, b in (support, query)], x["head"]
            for _ in range(3):
                g = grad(task_loss)(head, x, own[0])
                head = head - x["rate"].exp() * g
            total = total + task_loss(head, x, own[1])
        return total / TASKS

    expected = grad(written_out)(x)
    for name in x:
        torch.testing.assert_close(found[name], expected[name])
    assert float(report.losses.mean()) == pytest.approx(float(written_out(x)))


def test_second_derivatives():
    x, (support, query) = torch.randn(SIZE), tasks()
    found = jacrev(lambda x: gradient()(x, support, query)[0])(x)
    expected = mean(x, support, query, lambda A, b, Q, q, w, M: M @ Q @ M)
    torch.testing.assert_close(found, expected)
    for estimator in ("first_order", "displacement", "cg(max_steps=5)"):
        made = gradient(estimator, proximal_term=1.0)
        with pytest.raises(tb.NoSecondDerivative, match="estimator='unrolled'"):
            hessian(lambda x, made=made: made(x, support, query)[0].sum())(x)
        leaf = x.clone().requires_grad_()  # a parameter: not a derivative of ours
        assert not made(leaf, support, query)[0].requires_grad


def test_bad_input():
    x, (support, query) = torch.randn(SIZE), tasks()
    with pytest.raises(tb.InvalidLoss, match=r"same length; shapes seen: \(5, 3, 3\)"):
        gradient()(x, support, (query[0][:3], query[1]))
    with pytest.raises(tb.NeedsLoop, match="'unrolled' .MAML"):
        gradient("soba")
    with pytest.raises(tb.UnknownName, match="Did you mean"):
        gradient(rule="sgdd(lr=0.1)")
    with pytest.raises(ValueError, match="proximal_term"):
        gradient(proximal_term=-1.0)
    with pytest.raises(ValueError, match="chunk_size"):
        gradient(chunk_size=0)


def test_leaves_that_are_no_tensors_are_the_same_for_all_tasks():
    x, (support, query) = torch.randn(SIZE), tasks()

    def scaled(y, x, batch):
        return batch["scale"] * loss(y, x, (batch["A"], batch["b"]))

    def batches(pair):
        return {"A": pair[0], "b": pair[1], "scale": 1, "name": "task", "none": None}

    made = tb.func.task_gradient(
        scaled, scaled, rule=f"sgd(lr={RATE})", num_steps=STEPS
    )
    found, _ = made(x, batches(support), batches(query))
    torch.testing.assert_close(found, gradient()(x, support, query)[0])
    alone = tb.func.task_gradient(
        loss, lambda y, x, batch: (y**2).sum(), rule="sgd(lr=0.1)", num_steps=2
    )
    with_none, _ = alone(x, support, None)
    torch.testing.assert_close(with_none, alone(x, support, ())[0])


def test_arrays_have_an_axis_of_tasks():
    x, (support, query) = torch.randn(SIZE), tasks()
    arrays = [tuple(t.numpy() for t in pair) for pair in (support, query)]
    found, _ = gradient()(x, *arrays)
    torch.testing.assert_close(found, gradient()(x, support, query)[0])
